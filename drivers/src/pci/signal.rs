//! Eventfds that a device, or the process that plays it, signals.
//!
//! Owner: control threads. **Invariant:** looking at one never blocks: `O_NONBLOCK` belongs to the open file, which a
//! vfio-user server has as well and can change.

use std::io::IoSliceMut;
use std::os::fd::AsFd;

use rustix::io::ReadWriteFlags;

/// Empties an eventfd; true when it was signalled.
pub(crate) fn take_signal(fd: impl AsFd) -> bool {
    let mut count = [0; 8];
    let into = &mut [IoSliceMut::new(&mut count)];
    rustix::io::preadv2(fd, into, u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_signal_is_taken_once_and_nobody_waits_for_it() {
        for flags in [EventfdFlags::NONBLOCK, EventfdFlags::empty()] {
            let fd = eventfd(0, flags).unwrap();
            assert!(!take_signal(&fd));
            rustix::io::write(&fd, &3_u64.to_ne_bytes()).unwrap();
            assert!(take_signal(&fd) && !take_signal(&fd));
        }
    }
}
