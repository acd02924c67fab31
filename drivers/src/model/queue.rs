//! Submission and completion queues as the controller sees them.
//!
//! Flow: a doorbell → entries fetched; a completion → an entry with the phase of this lap. Owner: the model's thread.
//! **Invariant:** a completion entry that the driver has not taken is not overwritten; what does not fit waits. A ring
//! whose memory was unmapped is never touched again.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use ringmill_core::mem::SharedSlice;
use ringmill_core::spec::nvme::{CQE_BYTES, Cqe, SQE_BYTES, Sqe};
use ringmill_core::units::index;

use super::dma::Reach;

/// A submission queue.
#[derive(Debug)]
pub(super) struct Sq {
    pub(super) iova: u64,
    pub(super) size: u32,
    /// The next entry to fetch.
    pub(super) head: u32,
    /// Where the driver's entries end, as far as is known.
    pub(super) tail: u32,
    pub(super) cq: u16,
    /// Commands fetched and not answered.
    pub(super) held: u32,
    /// Doorbell in BAR 0.
    pub(super) doorbell: usize,
    /// It is polled by the shadow now, otherwise its doorbell is awaited.
    pub(super) shadow_awake: bool,
    ring: Option<SharedSlice>,
}

impl Sq {
    pub(super) fn new(iova: u64, size: u32, cq: u16, doorbell: usize, reach: &Reach) -> Sq {
        let mut queue = Sq {
            iova,
            size,
            head: 0,
            tail: 0,
            cq,
            held: 0,
            doorbell,
            shadow_awake: true,
            ring: None,
        };
        queue.attach(reach);
        queue
    }

    /// Looks its memory up in a new table; true when it was there, and is not any more.
    pub(super) fn attach(&mut self, reach: &Reach) -> bool {
        let ring = reach.window(self.iova, index(self.size) * SQE_BYTES);
        let is_there = ring.is_some();
        std::mem::replace(&mut self.ring, ring).is_some() && !is_there
    }

    /// Asks for the entries that will be fetched next.
    #[inline]
    pub(super) fn prefetch(&self, count: u32) {
        if let Some(ring) = &self.ring {
            for ahead in 0..count {
                ring.prefetch(index((self.head + ahead) % self.size) * SQE_BYTES);
            }
        }
    }

    /// Fetches an entry; `None` when its memory is not mapped.
    #[inline]
    pub(super) fn fetch(&mut self) -> Option<Sqe> {
        let entry = self.ring.as_ref()?.load_entry(index(self.head) * SQE_BYTES);
        self.head += 1;
        if self.head == self.size {
            self.head = 0;
        }
        Some(Sqe(entry))
    }

    /// Entries that were shown and not fetched.
    #[inline]
    pub(super) fn waiting(&self) -> u32 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.tail + self.size - self.head
        }
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Cq {
    pub(super) iova: u64,
    pub(super) size: u32,
    /// The first entry that the driver has not taken, as far as is known.
    pub(super) head: u32,
    /// The next entry to fill.
    pub(super) tail: u32,
    pub(super) phase: bool,
    /// The vector, where interrupts are enabled.
    pub(super) vector: Option<u16>,
    pub(super) doorbell: usize,
    /// Submission queues that use it.
    pub(super) users: u32,
    /// Something was posted since the last interrupt.
    pub(super) owes_interrupt: bool,
    waiting: VecDeque<[u32; 4]>,
    ring: Option<SharedSlice>,
}

impl Cq {
    pub(super) fn new(
        iova: u64,
        size: u32,
        vector: Option<u16>,
        doorbell: usize,
        reach: &Reach,
    ) -> Cq {
        let mut queue = Cq {
            iova,
            size,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            doorbell,
            users: 0,
            owes_interrupt: false,
            waiting: VecDeque::with_capacity(16),
            ring: None,
        };
        queue.attach(reach);
        queue
    }

    /// As for [`Sq::attach`].
    pub(super) fn attach(&mut self, reach: &Reach) -> bool {
        let ring = reach.window(self.iova, index(self.size) * CQE_BYTES);
        let is_there = ring.is_some();
        std::mem::replace(&mut self.ring, ring).is_some() && !is_there
    }

    /// Entries that can be posted now.
    #[inline]
    pub(super) fn room(&self) -> u32 {
        let posted = self.posted();
        self.size - 1 - posted
    }

    /// Entries that the driver has not taken.
    #[inline]
    pub(super) fn posted(&self) -> u32 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.tail + self.size - self.head
        }
    }

    #[inline]
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Posts an entry (whose phase is set here), or keeps it for later; false: its memory is not mapped.
    #[inline]
    pub(super) fn post(&mut self, entry: [u32; 4]) -> bool {
        if self.room() == 0 || self.has_waiting() {
            self.waiting.push_back(entry);
            return true;
        }
        self.write(entry)
    }

    /// Posts what waited.
    #[cold]
    pub(super) fn post_waiting(&mut self) -> bool {
        while self.room() > 0
            && let Some(entry) = self.waiting.pop_front()
        {
            if !self.write(entry) {
                return false;
            }
        }
        true
    }

    #[inline]
    fn write(&mut self, mut entry: [u32; 4]) -> bool {
        entry[3] = entry[3] & !(1 << 16) | u32::from(self.phase) << 16;
        if !self.write_at(self.tail, &Cqe(entry)) {
            return false;
        }
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        self.owes_interrupt = true;
        true
    }

    /// Fills an entry as it is, whatever the driver thinks of it.
    #[inline]
    pub(super) fn write_at(&self, at: u32, entry: &Cqe) -> bool {
        let Some(ring) = &self.ring else { return false };
        let [a, b, c, d] = entry.0.map(u64::from);
        let offset_bytes = index(at) * CQE_BYTES;
        ring.store_u64(offset_bytes, a | b << 32, Ordering::Relaxed);
        // The half with the phase last: it shows the rest, and the data before it.
        ring.store_u64(offset_bytes + 8, c | d << 32, Ordering::Release);
        true
    }
}
