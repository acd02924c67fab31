//! What the front-ends of one controller have in common: its disk, its places on the reactors, its queues' figures.
//!
//! Owner: the control thread.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ringmill_core::mem::MappingError;
use ringmill_core::reactor::ReactorHandle;
use ringmill_core::stats::QueueStats;

use crate::blk::event::EventSender;
use crate::blk::places::Places;
use crate::blk::{BlkDevice, QueueStatus};

/// What a controller lends to its front-ends.
#[derive(Debug)]
pub(in crate::blk) struct Shared {
    pub(in crate::blk) number: u64,
    pub(in crate::blk) name: String,
    pub(in crate::blk) device: Arc<BlkDevice>,
    pub(in crate::blk) queues_max: u16,
    pub(in crate::blk) places: Mutex<Places>,
    /// Of the queues that were ever started.
    pub(in crate::blk) statuses: Vec<OnceLock<Arc<QueueStatus>>>,
    /// Guests' memory is pinned.
    pub(in crate::blk) pin: bool,
    pub(in crate::blk) events: EventSender,
}

impl Shared {
    /// The figures of a queue that was ever started.
    pub(in crate::blk) fn status(&self, index: u16) -> Option<Arc<QueueStatus>> {
        self.statuses.get(usize::from(index))?.get().cloned()
    }

    /// Makes the figures of a queue, or finds those that it has: they outlive sessions.
    pub(super) fn make_status(&self, index: u16) -> Result<(), MappingError> {
        let place = &self.statuses[usize::from(index)];
        if place.get().is_none() {
            let _ = place.set(Arc::new(QueueStatus::new(QueueStats::new_shared()?)));
        }
        Ok(())
    }

    /// Only the control thread locks it, for moments.
    pub(in crate::blk) fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reactor_of(&self, index: u16) -> ReactorHandle {
        self.places().of(index).clone()
    }

    /// A queue stays where it is, whatever the mask says.
    pub(super) fn stay(&self, index: u16, reactor: &ReactorHandle) {
        self.places().set_own(index, vec![reactor.clone()]);
    }
}
