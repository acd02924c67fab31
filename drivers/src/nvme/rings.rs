//! HOT PATH
//! The two rings of a pair and their doorbells (Base 2.0 §3.3).
//!
//! Flow: entry → tail → (once per pass) doorbell; phase of the next completion → head → (now and then) doorbell. Owner: one
//! reactor. **Invariant:** no more entries are in the submission ring than the pair has commands out, one less than it has
//! places; a completion is read once, after its phase.
//!
//! doorbell: in memory, if there is one: store, full fence, does the device look by itself? | register

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use ringmill_core::mem::{Mapping, SharedSlice};
use ringmill_core::spec::nvme::{CQE_BYTES, Cqe, SQE_BYTES, Sqe};

use crate::pci::Registers;

/// One doorbell.
#[derive(Debug)]
pub(super) struct Doorbell {
    register_bytes: usize,
    shadow: Option<Shadow>,
    /// The value that the device knows.
    rung: u16,
}

#[derive(Debug)]
struct Shadow {
    value: SharedSlice,
    event_index: SharedSlice,
}

impl Doorbell {
    /// `shadow`: the pages of values and event indices, and the word's place in both. `None` when it lies outside.
    #[cold]
    pub(super) fn new(
        register_bytes: usize,
        shadow: Option<(&Arc<Mapping>, &Arc<Mapping>, usize)>,
    ) -> Option<Doorbell> {
        let shadow = match shadow {
            None => None,
            Some((values, indices, at_bytes)) => Some(Shadow {
                value: SharedSlice::new(values, at_bytes, 4, 4)?,
                event_index: SharedSlice::new(indices, at_bytes, 4, 4)?,
            }),
        };
        Some(Doorbell { register_bytes, shadow, rung: 0 })
    }

    /// Tells the device; true when that took a register write.
    #[inline]
    pub(super) fn ring(&mut self, registers: &impl Registers, value: u16) -> bool {
        let old = std::mem::replace(&mut self.rung, value);
        if let Some(shadow) = &self.shadow {
            shadow.value.store_u32(0, u32::from(value), Ordering::Release);
            // Either the device, which sets its index and then looks at the value again, sees the value, or we see the index.
            fence(Ordering::SeqCst);
            let index = shadow.event_index.load_u32(0, Ordering::Relaxed);
            if !must_ring(index, value, old) {
                return false;
            }
        }
        registers.write_u32(self.register_bytes, u32::from(value));
        true
    }

    /// The device has forgotten everything.
    #[cold]
    fn reset(&mut self) {
        self.rung = 0;
        if let Some(shadow) = &self.shadow {
            shadow.value.store_u32(0, 0, Ordering::Release);
            shadow.event_index.store_u32(0, 0, Ordering::Release);
        }
    }
}

/// True when going from `old` to `value` passes the index up to which the device looks by itself (Base 2.0 §B.5).
#[inline]
fn must_ring(event_index: u32, value: u16, old: u16) -> bool {
    let bytes = event_index.to_le_bytes();
    let event_index = u16::from_le_bytes([bytes[0], bytes[1]]);
    value.wrapping_sub(event_index).wrapping_sub(1) < value.wrapping_sub(old)
}

/// Both rings.
#[derive(Debug)]
pub(super) struct Rings {
    sq: SharedSlice,
    cq: SharedSlice,
    entries: u16,
    sq_tail: u16,
    cq_head: u16,
    /// What the phase of a new completion is.
    phase: bool,
    /// Completions read and not acknowledged.
    pub(super) unrung: u16,
    pub(super) sq_doorbell: Doorbell,
    pub(super) cq_doorbell: Doorbell,
}

impl Rings {
    #[cold]
    pub(super) fn new(
        (sq, cq): (SharedSlice, SharedSlice),
        entries: u16,
        (sq_doorbell, cq_doorbell): (Doorbell, Doorbell),
    ) -> Rings {
        Rings {
            sq,
            cq,
            entries,
            sq_tail: 0,
            cq_head: 0,
            phase: true,
            unrung: 0,
            sq_doorbell,
            cq_doorbell,
        }
    }

    /// Writes an entry behind the others. There is a place: fewer are out than there are.
    #[inline]
    pub(super) fn push(&mut self, entry: &Sqe) {
        self.sq.store_entry(usize::from(self.sq_tail) * SQE_BYTES, &entry.0);
        self.sq_tail = self.next(self.sq_tail);
    }

    #[inline]
    fn next(&self, at: u16) -> u16 {
        if at + 1 == self.entries { 0 } else { at + 1 }
    }

    /// The next completion; it stays until [`Rings::pass`].
    #[inline]
    pub(super) fn peek(&self) -> Option<Cqe> {
        let half = self.cq.load_u64(usize::from(self.cq_head) * CQE_BYTES + CQE_BYTES / 2);
        let entry = Cqe::from_upper(half);
        if entry.phase() != self.phase {
            return None;
        }
        // What the device wrote before its completion is visible from here on.
        fence(Ordering::Acquire);
        Some(entry)
    }

    /// The completion was read.
    #[inline]
    pub(super) fn pass(&mut self) {
        self.cq_head = self.next(self.cq_head);
        self.phase ^= self.cq_head == 0;
        self.unrung += 1;
    }

    /// Whether the device may say so. Not whether it lags: completions may be written in another order than they were made.
    #[inline]
    pub(super) fn is_head(&self, head: u16) -> bool {
        head < self.entries
    }

    /// Entries that the device was not told about.
    #[inline]
    pub(super) fn has_unsent(&self) -> bool {
        self.sq_tail != self.sq_doorbell.rung
    }

    #[inline]
    pub(super) fn ring_sq(&mut self, registers: &impl Registers) -> bool {
        self.sq_doorbell.ring(registers, self.sq_tail)
    }

    #[inline]
    pub(super) fn ring_cq(&mut self, registers: &impl Registers) -> bool {
        self.unrung = 0;
        self.cq_doorbell.ring(registers, self.cq_head)
    }

    /// Registers from now on: the device does not look at the words in memory. Whoever made the pages holds them still.
    #[cold]
    pub(super) fn lose_shadow(&mut self) {
        (self.sq_doorbell.shadow, self.cq_doorbell.shadow) = (None, None);
    }

    /// As they were in the beginning: the device has forgotten its queues.
    #[cold]
    pub(super) fn reset(&mut self) {
        self.cq.fill_zero();
        (self.sq_tail, self.cq_head, self.unrung, self.phase) = (0, 0, 0, true);
        self.sq_doorbell.reset();
        self.cq_doorbell.reset();
    }
}
