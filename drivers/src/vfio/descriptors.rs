//! The descriptors of a device that is open: its file, which can be closed under its users, and the events that it sends.
//!
//! Owner: shared by the device and its registers. **Invariant:** a call that has begun ends with the file open; one that
//! begins after [`DeviceFile::close`] finds it gone. Closing waits for those that have begun.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{PoisonError, RwLock};

use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::pci::{DeviceNews, take_signal};

/// The device was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// A device's descriptor.
#[derive(Debug)]
pub(crate) struct DeviceFile(RwLock<Option<File>>);

impl DeviceFile {
    pub(crate) fn new(fd: OwnedFd) -> DeviceFile {
        DeviceFile(RwLock::new(Some(fd.into())))
    }

    /// Calls `with` with the descriptor.
    pub(crate) fn with<T>(&self, with: impl FnOnce(BorrowedFd<'_>) -> T) -> Result<T, Closed> {
        self.with_file(|file| with(file.as_fd()))
    }

    /// The same with the file.
    pub(crate) fn with_file<T>(&self, with: impl FnOnce(&File) -> T) -> Result<T, Closed> {
        let file = self.0.read().unwrap_or_else(PoisonError::into_inner);
        file.as_ref().map(with).ok_or(Closed)
    }

    pub(crate) fn close(&self) {
        drop(self.0.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Two eventfds behind one descriptor to wait on.
#[derive(Debug)]
pub(super) struct Events {
    both: OwnedFd,
    request: OwnedFd,
    error: OwnedFd,
}

impl Events {
    pub(super) fn new() -> io::Result<Events> {
        let make = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (request, error) = (make()?, make()?);
        let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [&request, &error] {
            epoll::add(&both, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Events { both, request, error })
    }

    pub(super) fn request(&self) -> BorrowedFd<'_> {
        self.request.as_fd()
    }

    pub(super) fn error(&self) -> BorrowedFd<'_> {
        self.error.as_fd()
    }

    /// What was signalled, each once however often.
    pub(super) fn next(&self) -> Option<DeviceNews> {
        if take_signal(&self.error) {
            Some(DeviceNews::Error)
        } else if take_signal(&self.request) {
            Some(DeviceNews::Requested)
        } else {
            None
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.both.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_readable(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn each_event_is_told_once() {
        let events = Events::new().unwrap();
        assert_eq!((events.next(), is_readable(events.as_fd())), (None, false));
        let signal = |fd: BorrowedFd<'_>| rustix::io::write(fd, &1_u64.to_ne_bytes()).unwrap();
        signal(events.request());
        signal(events.request());
        signal(events.error());
        assert!(is_readable(events.as_fd()));
        assert_eq!(events.next(), Some(DeviceNews::Error));
        assert_eq!(events.next(), Some(DeviceNews::Requested));
        assert_eq!((events.next(), is_readable(events.as_fd())), (None, false));
    }

    #[test]
    fn a_closed_file_is_gone_for_everybody() {
        let file = DeviceFile::new(File::open("/dev/null").unwrap().into());
        assert!(file.with(|_| ()).is_ok());
        file.close();
        file.close();
        assert_eq!(file.with(|_| ()), Err(Closed));
    }
}
