//! Stands between worker and ring and looks at the guest's memory at the very moment when the guest may.
//!
//! Flow: the guest notes where a head's status byte is; the worker's calls pass through; `publish` looks. Owner: the
//! worker; the notes are shared with the guest model. **Invariant:** it changes nothing that the worker can see.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringmill_core::io::Batch;
use ringmill_core::mem::{MemTable, Segment};

use crate::blk::Tracking;
use crate::virtq::{Chain, QueueError, RingWindows, Virtqueue};

/// What a status byte holds before the device writes it.
pub(super) const STATUS_UNSET: u8 = 0xaa;

#[derive(Debug, Default)]
struct Notes {
    /// The status byte of each head in flight.
    status: Vec<Option<Segment>>,
    /// The worker has noted the head as taken.
    taken: Vec<bool>,
    complaint: Option<String>,
}

/// What guest model and watcher know together.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    notes: Arc<Mutex<Notes>>,
}

impl Watch {
    pub(super) fn new(size: u16) -> Watch {
        let count = usize::from(size);
        let notes = Notes { status: vec![None; count], taken: vec![false; count], complaint: None };
        Watch { notes: Arc::new(Mutex::new(notes)) }
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest makes a head available.
    pub(super) fn expect(&self, head: u16, status: Option<Segment>) {
        self.lock().status[usize::from(head)] = status;
    }

    pub(super) fn complaint(&self) -> Option<String> {
        self.lock().complaint.clone()
    }
}

/// A queue under observation.
pub(super) struct WatchedQueue {
    inner: Box<dyn Virtqueue>,
    watch: Watch,
    unpublished: Vec<u16>,
}

impl WatchedQueue {
    pub(super) fn new(inner: Box<dyn Virtqueue>, watch: Watch) -> WatchedQueue {
        WatchedQueue { inner, watch, unpublished: Vec::new() }
    }
}

impl Virtqueue for WatchedQueue {
    fn relocate(&mut self, windows: RingWindows) -> RingWindows {
        self.inner.relocate(windows)
    }

    fn available(&mut self) -> Result<u16, QueueError> {
        self.inner.available()
    }

    fn prefetch(&self, count: usize) {
        self.inner.prefetch(count);
    }

    fn pop(
        &mut self,
        mem: &MemTable,
        hint: &mut usize,
        batch: &mut Batch,
    ) -> Result<Option<Chain>, QueueError> {
        self.inner.pop(mem, hint, batch)
    }

    fn unpop(&mut self, head: u16) {
        self.inner.unpop(head);
    }

    fn put_used(&mut self, head: u16, written_bytes: u32) {
        self.inner.put_used(head, written_bytes);
        self.unpublished.push(head);
    }

    fn publish(&mut self, ask: bool) -> bool {
        let wanted = self.inner.publish(ask);
        let mut notes = self.watch.lock();
        for head in self.unpublished.drain(..) {
            let at = usize::from(head);
            let mut byte = [STATUS_UNSET];
            if let Some(status) = notes.status[at].take() {
                status.read_into(&mut byte);
            }
            if byte[0] == STATUS_UNSET {
                let what = format!("head {head} was published before its status was written");
                notes.complaint.get_or_insert(what);
            }
            if notes.taken[at] {
                let what = format!("head {head} was published while it is tracked as taken");
                notes.complaint.get_or_insert(what);
            }
        }
        wanted
    }

    fn suppress_kicks(&mut self) {
        self.inner.suppress_kicks();
    }

    fn request_kick(&mut self) -> bool {
        self.inner.request_kick()
    }

    fn leave(&self) {
        self.inner.leave();
    }

    fn base(&self) -> u32 {
        self.inner.base()
    }

    fn size(&self) -> u16 {
        self.inner.size()
    }

    fn indices(&self) -> (u16, u16) {
        self.inner.indices()
    }

    fn memory_gone(&self) -> bool {
        self.inner.memory_gone()
    }
}

/// Checks that heads are noted as taken and answered in turn.
impl Tracking for Watch {
    fn taken(&mut self, head: u16) {
        let mut notes = self.lock();
        if std::mem::replace(&mut notes.taken[usize::from(head)], true) {
            let what = format!("head {head} was tracked as taken twice");
            notes.complaint.get_or_insert(what);
        }
    }

    fn put_back(&mut self, head: u16) {
        let mut notes = self.lock();
        if !std::mem::replace(&mut notes.taken[usize::from(head)], false) {
            let what = format!("head {head} was tracked as put back but not as taken");
            notes.complaint.get_or_insert(what);
        }
    }

    fn answered(&mut self, head: u16) {
        let mut notes = self.lock();
        if !std::mem::replace(&mut notes.taken[usize::from(head)], false) {
            let what = format!("head {head} was tracked as answered but not as taken");
            notes.complaint.get_or_insert(what);
        }
    }
}
