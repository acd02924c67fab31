//! HOT PATH
//! A port onto one virtqueue: a ring and the descriptor that kicks its device.
//!
//! Owner: the load's thread. **Invariant:** a kick is sent only when the device asks for it, and a device that asks is
//! kicked: if it was not seen to ask when a batch was published, it is asked again after a few empty polls.

use std::os::fd::OwnedFd;

use ringmill_core::mem::Segment;

use super::PerfError;
use super::port::Port;
use super::ring::{DriverRing, RingFault};
use super::slots::Op;

/// Empty polls before the device is asked again whether it wants a kick: far longer than a store takes to be seen.
const ASK_AGAIN_POLLS: u32 = 64;

/// A virtqueue.
#[derive(Debug)]
pub(crate) struct VhostPort<R> {
    ring: R,
    depth: u16,
    kick: OwnedFd,
    place: String,
    /// Empty polls since a batch for which no kick was sent; `None`: nobody needs to be asked.
    unasked_polls: Option<u32>,
}

impl<R: DriverRing> VhostPort<R> {
    /// A port on a started ring.
    #[cold]
    pub(crate) fn new(ring: R, depth: u16, kick: OwnedFd, place: String) -> VhostPort<R> {
        VhostPort { ring, depth, kick, place, unasked_polls: None }
    }

    #[cold]
    #[inline(never)]
    fn kick(&self) -> Result<(), PerfError> {
        match rustix::io::write(&self.kick, &1u64.to_ne_bytes()) {
            // A full counter is a kick that has not been taken yet.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(errno) => Err(PerfError::Kick { place: self.place.clone(), source: errno.into() }),
        }
    }

    #[cold]
    #[inline(never)]
    fn fault(&self, fault: RingFault) -> PerfError {
        let RingFault { what, index } = fault;
        PerfError::Ring { place: self.place.clone(), what: what.into(), index }
    }

    #[cold]
    #[inline(never)]
    fn ask_again(&mut self) -> Result<(), PerfError> {
        self.unasked_polls = None;
        if self.ring.kick_wanted() { self.kick() } else { Ok(()) }
    }
}

impl<R: DriverRing> Port for VhostPort<R> {
    fn depth(&self) -> u16 {
        self.depth
    }

    #[inline]
    fn push(&mut self, slot: u16, op: Op, offset_bytes: u64) {
        self.ring.push(slot, op, offset_bytes);
    }

    #[inline]
    fn publish(&mut self) -> Result<(), PerfError> {
        if self.ring.publish() {
            self.unasked_polls = None;
            return self.kick();
        }
        self.unasked_polls = Some(0);
        Ok(())
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<u16>) -> Result<(), PerfError> {
        if let Err(fault) = self.ring.poll(done) {
            return Err(self.fault(fault));
        }
        if done.is_empty()
            && let Some(polls) = &mut self.unasked_polls
        {
            *polls += 1;
            if *polls >= ASK_AGAIN_POLLS {
                return self.ask_again();
            }
        }
        Ok(())
    }

    #[inline]
    fn status(&self, slot: u16) -> u8 {
        self.ring.slots().status(slot)
    }

    fn data(&self, slot: u16) -> Segment {
        self.ring.slots().data(slot)
    }

    fn place(&self) -> &str {
        &self.place
    }

    fn indices(&self) -> (u16, u16) {
        self.ring.indices()
    }
}
