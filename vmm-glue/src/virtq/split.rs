//! HOT PATH
//! The device's side of a split virtqueue (virtio 1.2 §2.7).
//!
//! Flow: avail ring → chains → worker → used ring. Owner: one reactor; built by a control thread from windows whose
//! bounds were proved once. **Invariant:** indices, heads and descriptors are read once and checked before use; used
//! elements become visible in one store of `used.idx` per batch.
//!
//! available: avail.idx (acquire) − next_avail, at most size
//! pop: avail.ring[next] → head → walk(table | indirect table)
//! publish: used.idx (release) → fence → used_event | flags → interrupt?

use std::sync::atomic::{Ordering, fence};

use ringmill_core::io::Batch;
use ringmill_core::mem::{MemTable, Segment};
use ringmill_core::spec::virtio_ring::{
    AVAIL_F_NO_INTERRUPT, DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, RING_HEADER_BYTES,
    USED_ELEM_BYTES, USED_F_NO_NOTIFY,
};
use ringmill_core::units::index;

use super::chain::ChainWalk;
use super::{Chain, QueueError, RingWindows, Virtqueue, needs_event};

/// A split virtqueue.
#[derive(Debug)]
pub struct SplitQueue {
    rings: RingWindows,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    next_used: u16,
    published_used: u16,
    kicks_suppressed: bool,
}

const AVAIL_IDX: usize = 2;
const USED_IDX: usize = 2;

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the fields are cut out of 64 bits on purpose"
    )]
    fn from_words(addr: u64, rest: u64) -> Descriptor {
        Descriptor {
            addr,
            len_bytes: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

impl SplitQueue {
    /// A queue of `size` entries (a power of two) that goes on at `base`. Reads `used.idx` now, so call it when the ring
    /// starts and not before.
    #[must_use]
    #[cold]
    pub fn new(
        rings: RingWindows,
        size: u16,
        base: u16,
        event_idx: bool,
        indirect: bool,
    ) -> SplitQueue {
        debug_assert!(size.is_power_of_two());
        let next_used = rings.used.load_u16(USED_IDX, Ordering::Acquire);
        SplitQueue {
            rings,
            size,
            event_idx,
            indirect,
            next_avail: base,
            next_used,
            published_used: next_used,
            kicks_suppressed: false,
        }
    }

    #[inline]
    fn ring_slot(&self, at: u16) -> usize {
        usize::from(at & (self.size - 1))
    }

    #[inline]
    fn read_desc(&self, at: u16) -> Descriptor {
        let offset = usize::from(at) * DESC_BYTES;
        Descriptor::from_words(
            self.rings.desc.load_u64(offset),
            self.rings.desc.load_u64(offset + 8),
        )
    }

    /// An indirect table (§2.7.5.3): its descriptors are walked by `next` from entry 0.
    #[inline(never)]
    fn walk_indirect(&self, walk: &mut ChainWalk<'_>, desc: Descriptor) -> Result<(), QueueError> {
        if !self.indirect {
            return Err(QueueError::Indirect("the feature was not negotiated"));
        }
        if desc.flags & DESC_F_NEXT != 0 {
            return Err(QueueError::Indirect("NEXT is set beside INDIRECT"));
        }
        if desc.len_bytes == 0 || !index(desc.len_bytes).is_multiple_of(DESC_BYTES) {
            return Err(QueueError::Indirect(
                "the table's length is not a positive multiple of 16",
            ));
        }
        let table = walk
            .table(desc.addr, desc.len_bytes)
            .ok_or(QueueError::Indirect("the table does not lie inside one memory region"))?;
        let entries = desc.len_bytes / 16;
        let mut at = 0u32;
        // A table can be walked at most once through: more steps than entries is a loop.
        for _ in 0..entries {
            let entry = read_indirect(&table, at);
            if entry.flags & DESC_F_INDIRECT != 0 {
                return Err(QueueError::Indirect("a table inside a table"));
            }
            walk.add(entry.addr, entry.len_bytes, entry.flags)?;
            if entry.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            at = u32::from(entry.next);
            if at >= entries {
                return Err(QueueError::Next { next: entry.next, size: entries });
            }
        }
        Err(QueueError::Loop { limit: entries })
    }
}

#[inline]
fn read_indirect(table: &Segment, at: u32) -> Descriptor {
    // The caller has checked that the entry is in the table.
    let bytes: [u8; DESC_BYTES] = table.sub(at * 16, 16).front_16().unwrap_or_default();
    let (addr, rest) = bytes.split_at(8);
    let word = |half: &[u8]| half.try_into().map_or(0, u64::from_le_bytes);
    Descriptor::from_words(word(addr), word(rest))
}

impl Virtqueue for SplitQueue {
    fn relocate(&mut self, windows: RingWindows) -> RingWindows {
        std::mem::replace(&mut self.rings, windows)
    }

    #[inline]
    fn available(&mut self) -> Result<u16, QueueError> {
        let idx = self.rings.avail.load_u16(AVAIL_IDX, Ordering::Acquire);
        let count = idx.wrapping_sub(self.next_avail);
        if count > self.size {
            return Err(QueueError::IndexJump {
                seen: self.next_avail,
                index: idx,
                size: self.size,
            });
        }
        Ok(count)
    }

    /// A driver fills descriptors one after the other, so a chain's first and the end of its third are on the lines that
    /// it needs.
    #[inline]
    fn prefetch(&self, count: usize) {
        let mut next = self.next_avail;
        for _ in 0..count {
            let entry = RING_HEADER_BYTES + 2 * self.ring_slot(next);
            let at = usize::from(self.rings.avail.load_u16(entry, Ordering::Relaxed)) * DESC_BYTES;
            self.rings.desc.prefetch(at);
            self.rings.desc.prefetch(at + 3 * DESC_BYTES - 1);
            next = next.wrapping_add(1);
        }
    }

    #[inline(always)]
    fn pop(
        &mut self,
        mem: &MemTable,
        hint: &mut usize,
        batch: &mut Batch,
    ) -> Result<Option<Chain>, QueueError> {
        let entry = RING_HEADER_BYTES + 2 * self.ring_slot(self.next_avail);
        let head = self.rings.avail.load_u16(entry, Ordering::Relaxed);
        if head >= self.size {
            return Err(QueueError::Head { head, size: self.size });
        }
        let mut walk = ChainWalk::new(mem, hint, batch);
        let mut at = head;
        let mut steps = 0u16;
        loop {
            let desc = self.read_desc(at);
            if desc.flags & DESC_F_INDIRECT != 0 {
                self.walk_indirect(&mut walk, desc)?;
                break;
            }
            walk.add(desc.addr, desc.len_bytes, desc.flags)?;
            if desc.flags & DESC_F_NEXT == 0 {
                break;
            }
            if desc.next >= self.size {
                return Err(QueueError::Next { next: desc.next, size: u32::from(self.size) });
            }
            steps += 1;
            if steps >= self.size {
                return Err(QueueError::Loop { limit: u32::from(self.size) });
            }
            at = desc.next;
        }
        let chain = walk.finish(head)?;
        if chain.is_some() {
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        Ok(chain)
    }

    #[inline]
    fn unpop(&mut self, _head: u16) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    #[inline]
    fn put_used(&mut self, head: u16, written_bytes: u32) {
        let entry = RING_HEADER_BYTES + USED_ELEM_BYTES * self.ring_slot(self.next_used);
        self.rings.used.store_u32_pair(entry, u32::from(head), written_bytes);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self, ask: bool) -> bool {
        let old = self.published_used;
        if self.next_used == old {
            return false;
        }
        self.rings.used.store_u16(USED_IDX, self.next_used, Ordering::Release);
        self.published_used = self.next_used;
        if !ask {
            return false;
        }
        // The store of `used.idx` must be visible before the wish for an interrupt is read (§2.7.7.1): pairs with the
        // driver's barrier between publishing that wish and looking at `used.idx` again.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let used_event = RING_HEADER_BYTES + 2 * usize::from(self.size);
            needs_event(
                self.rings.avail.load_u16(used_event, Ordering::Relaxed),
                self.next_used,
                old,
            )
        } else {
            self.rings.avail.load_u16(0, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    fn suppress_kicks(&mut self) {
        if self.kicks_suppressed {
            return;
        }
        self.kicks_suppressed = true;
        if self.event_idx {
            // An event index that was just passed asks for a kick only after 65,535 more entries; the flags word is
            // ignored by the driver but must not keep what a dead predecessor left.
            self.rings.used.store_u16(0, 0, Ordering::Relaxed);
            let avail_event = RING_HEADER_BYTES + USED_ELEM_BYTES * usize::from(self.size);
            self.rings.used.store_u16(
                avail_event,
                self.next_avail.wrapping_sub(1),
                Ordering::Relaxed,
            );
        } else {
            self.rings.used.store_u16(0, USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    #[cold]
    fn request_kick(&mut self) -> bool {
        self.kicks_suppressed = false;
        if self.event_idx {
            let avail_event = RING_HEADER_BYTES + USED_ELEM_BYTES * usize::from(self.size);
            self.rings.used.store_u16(avail_event, self.next_avail, Ordering::Relaxed);
        } else {
            self.rings.used.store_u16(0, 0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read again: pairs with the driver's barrier between publishing
        // an entry and reading the wish (§2.7.13.4.1).
        fence(Ordering::SeqCst);
        self.rings.avail.load_u16(AVAIL_IDX, Ordering::Acquire) != self.next_avail
    }

    /// The used index is in the ring, and what was taken is used.
    fn leave(&self) {}

    fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn indices(&self) -> (u16, u16) {
        (self.next_avail, self.published_used)
    }

    fn memory_gone(&self) -> bool {
        self.rings.failed()
    }
}
