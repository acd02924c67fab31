//! News from reactors (and from the bdev registry) to the control thread.
//!
//! Flow: a reactor or the registry sends → eventfd wakes the control thread's poll → it hands each event to its
//! controller. **Invariant:** rare by nature (configuration, errors, removal), so a channel that allocates is fine; the
//! eventfd is our own, so its write cannot block.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak, mpsc};

use ringmill_core::bdev::BdevEvent;
use ringmill_core::mem::{DmaDomain, MemTable, PinError};
use ringmill_core::reactor::Poller;
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use super::{PlaceError, WorkerEvent};

/// Something for the control thread to drop, because dropping unmaps memory or closes files.
pub(super) type Leftover = Box<dyn Send>;

/// Why a device does not reach a guest's memory.
#[derive(Debug, Error)]
pub(super) enum NotMapped {
    /// The device whose domain this was is gone.
    #[error("the device is gone")]
    Gone(Weak<dyn DmaDomain>),
    /// Anything else.
    #[error("{0}")]
    Refused(String),
}

/// What happened.
pub(super) enum EventKind {
    /// One ring has done its part of a front-end's operation.
    Step {
        /// The session.
        vid: u64,
        /// The operation.
        operation: u64,
        /// The ring.
        index: u16,
        /// Where a removed ring would go on.
        base: Option<u32>,
        /// To be dropped here.
        leftover: Option<Leftover>,
    },
    /// A worker is off its reactor, on its way to another one.
    Taken {
        /// The session.
        vid: u64,
        /// The operation.
        operation: u64,
        /// The ring.
        index: u16,
        /// `None`: it was not there.
        poller: Option<Box<dyn Poller>>,
    },
    /// A worker is on its new reactor, or that one cannot serve it.
    Placed {
        /// The session.
        vid: u64,
        /// The operation.
        operation: u64,
        /// The ring.
        index: u16,
        /// The worker, given back, and why.
        refused: Option<(Option<Box<dyn Poller>>, PlaceError)>,
    },
    /// A queue worker has something to say.
    Worker {
        /// The session.
        vid: u64,
        /// The ring.
        index: u16,
        /// What.
        event: WorkerEvent,
    },
    /// Only to be dropped here.
    Leftover(Leftover),
    /// How long the oldest request of a ring has been with the device.
    Age {
        /// The session.
        vid: u64,
        /// The ring.
        index: u16,
        /// Nanoseconds; `None`: nothing in flight.
        age_ns: Option<u64>,
    },
    /// The kernel has a session's memory, or refused it.
    Pinned {
        /// The session.
        vid: u64,
        /// The refusal.
        result: Result<(), PinError>,
    },
    /// A device reaches all of a table's memory, or cannot.
    Mapped {
        /// The session.
        vid: u64,
        /// The operation.
        operation: u64,
        /// The table, or why it cannot.
        result: Result<MemTable, NotMapped>,
    },
    /// What a session's device no longer has to reach is unmapped.
    Unmapped {
        /// The session.
        vid: u64,
        /// The operation.
        operation: u64,
    },
    /// The bdev below changed.
    Bdev(BdevEvent),
}

/// One piece of news for one controller.
pub struct Event {
    /// The controller's number.
    pub controller: u64,
    pub(super) kind: EventKind,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").field("controller", &self.controller).finish_non_exhaustive()
    }
}

/// The sending end; cheap to clone.
#[derive(Clone, Debug)]
pub struct EventSender {
    sender: mpsc::Sender<Event>,
    wake: Arc<OwnedFd>,
}

impl EventSender {
    pub(super) fn send(&self, controller: u64, kind: EventKind) {
        // The receiver outlives every reactor; at shut-down an event without a reader is of no use to anybody.
        if self.sender.send(Event { controller, kind }).is_ok() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The receiving end, owned by the control thread.
#[derive(Debug)]
pub struct EventQueue {
    receiver: mpsc::Receiver<Event>,
    wake: Arc<OwnedFd>,
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl EventQueue {
    /// The next event; call until `None` whenever the descriptor is readable.
    pub fn next(&self) -> Option<Event> {
        if let Ok(event) = self.receiver.try_recv() {
            return Some(event);
        }
        // Clear the wake-up, then look again: an event sent in between is found now or wakes again.
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        self.receiver.try_recv().ok()
    }
}

/// Both ends.
///
/// # Errors
/// When the process has no descriptors left.
pub fn event_queue() -> io::Result<(EventSender, EventQueue)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((EventSender { sender, wake: Arc::clone(&wake) }, EventQueue { receiver, wake }))
}
