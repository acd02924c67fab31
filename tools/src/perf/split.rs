//! HOT PATH
//! The driver's side of a split ring (virtio 1.2 §2.7) with a fixed descriptor chain per slot.
//!
//! Owner: the load's thread. **Invariant:** descriptors are written at set-up and when a slot changes its kind of
//! request; a request costs its header line and one available entry, a batch one store of `avail.idx`.
//!
//! push: header line → avail.ring[next]
//! publish: avail.idx (release) → used.flags
//! poll: used.idx (acquire) → used.ring[..] → slots

use std::sync::atomic::{Ordering, fence};

use ringmill_core::spec::virtio_ring::{
    AVAIL_F_NO_INTERRUPT, DESC_BYTES, DESC_F_INDIRECT, RING_HEADER_BYTES, USED_ELEM_BYTES,
    USED_F_NO_NOTIFY, desc_table_bytes,
};
use ringmill_core::units::index;

use super::layout::{CHAIN_DESCRIPTORS, QueueLayout};
use super::memory::{LoadMemory, Window};
use super::ring::{DriverRing, RingFault};
use super::slots::{Op, SlotLines, Words};

const IDX_AT: usize = 2;
const NO_SLOT: u16 = u16::MAX;

/// A split ring.
#[derive(Debug)]
pub(crate) struct SplitRing {
    desc: Window,
    avail: Window,
    used: Window,
    slots: SlotLines,
    /// What each slot's chain was last formatted for; `None`: never.
    shapes: Box<[Option<Op>]>,
    busy: Box<[bool]>,
    /// The slot of each head.
    slot_of_head: Box<[u16]>,
    /// Descriptors from one slot's head to the next one's.
    stride: u16,
    indirect: bool,
    mask: u16,
    avail_idx: u16,
    published: u16,
    used_idx: u16,
}

impl SplitRing {
    /// An empty ring in zeroed memory from `base` on.
    #[cold]
    pub(crate) fn new(memory: &LoadMemory, layout: &QueueLayout, base: usize) -> SplitRing {
        let (avail_bytes, used_bytes) = layout.part_bytes();
        let avail = memory.window(base + layout.driver_at, avail_bytes);
        avail.store_u16(0, AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
        let stride = if layout.form.indirect { 1 } else { CHAIN_DESCRIPTORS };
        let mut slot_of_head: Box<[u16]> =
            std::iter::repeat_n(NO_SLOT, usize::from(layout.size)).collect();
        for (slot, head) in (0..layout.depth).zip((0..).step_by(usize::from(stride))) {
            slot_of_head[usize::from(slot_head(slot, stride))] = slot;
            debug_assert_eq!(head, usize::from(slot_head(slot, stride)));
        }
        SplitRing {
            desc: memory.window(base + layout.desc_at, desc_table_bytes(layout.size)),
            avail,
            used: memory.window(base + layout.device_at, used_bytes),
            slots: SlotLines::new(memory, layout, base),
            shapes: std::iter::repeat_n(None, usize::from(layout.depth)).collect(),
            busy: std::iter::repeat_n(false, usize::from(layout.depth)).collect(),
            slot_of_head,
            stride,
            indirect: layout.form.indirect,
            mask: layout.size - 1,
            avail_idx: 0,
            published: 0,
            used_idx: 0,
        }
    }

    fn store_desc(&self, at: u16, words: Words) {
        let offset = usize::from(at) * DESC_BYTES;
        self.desc.store_u64(offset, words[0], Ordering::Relaxed);
        self.desc.store_u64(offset + 8, words[1], Ordering::Relaxed);
    }

    /// Formats a slot's chain for another kind of request.
    #[cold]
    #[inline(never)]
    fn reshape(&mut self, slot: u16, op: Op) {
        self.shapes[usize::from(slot)] = Some(op);
        let head = slot_head(slot, self.stride);
        if self.indirect {
            let (table, len_bytes) = self.slots.write_table(slot, op, false);
            let flags = u64::from(DESC_F_INDIRECT) << 32;
            return self.store_desc(head, [table, u64::from(len_bytes) | flags]);
        }
        let chain = self.slots.chain(slot, op);
        for (at, buffer) in (head..).zip(&chain) {
            let more = buffer != &chain[chain.len() - 1];
            self.store_desc(at, buffer.split_words(more, if more { at + 1 } else { 0 }));
        }
    }
}

#[inline]
fn slot_head(slot: u16, stride: u16) -> u16 {
    slot * stride
}

impl DriverRing for SplitRing {
    #[inline]
    fn push(&mut self, slot: u16, op: Op, offset_bytes: u64) {
        let at = usize::from(slot);
        if self.shapes[at] != Some(op) {
            self.reshape(slot, op);
        }
        self.slots.prepare(slot, op, offset_bytes);
        self.busy[at] = true;
        let entry = RING_HEADER_BYTES + 2 * usize::from(self.avail_idx & self.mask);
        self.avail.store_u16(entry, slot_head(slot, self.stride), Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self) -> bool {
        if self.avail_idx == self.published {
            return false;
        }
        self.avail.store_u16(IDX_AT, self.avail_idx, Ordering::Release);
        self.published = self.avail_idx;
        self.used.load_u16(0, Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<u16>) -> Result<(), RingFault> {
        let idx = self.used.load_u16(IDX_AT, Ordering::Acquire);
        if idx == self.used_idx {
            return Ok(());
        }
        if idx.wrapping_sub(self.used_idx) > self.published.wrapping_sub(self.used_idx) {
            let what = "the device returned more requests than it was given";
            return Err(RingFault { what, index: idx });
        }
        while self.used_idx != idx {
            let entry =
                RING_HEADER_BYTES + USED_ELEM_BYTES * usize::from(self.used_idx & self.mask);
            let head = self.used.load_u32(entry);
            let slot = self.slot_of_head.get(index(head)).copied().unwrap_or(NO_SLOT);
            match self.busy.get_mut(usize::from(slot)) {
                Some(busy) if *busy => *busy = false,
                _ => {
                    let what = "the device returned a request that is not in flight";
                    return Err(RingFault { what, index: self.used_idx });
                }
            }
            self.slots.prefetch(slot);
            done.push(slot);
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        Ok(())
    }

    #[cold]
    fn kick_wanted(&self) -> bool {
        // The published index must be visible before the wish is read: pairs with the device's barrier between
        // publishing its wish and looking at the index again (§2.7.13.4.1).
        fence(Ordering::SeqCst);
        self.used.load_u16(0, Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
    }

    #[inline]
    fn slots(&self) -> &SlotLines {
        &self.slots
    }

    fn indices(&self) -> (u16, u16) {
        (self.published, self.used_idx)
    }
}
