//! HOT PATH
//! The device's side of a packed virtqueue (virtio 1.2 §2.8): one ring that driver and device both write.
//!
//! Flow: available descriptors → chains → worker → used descriptors over them. Owner: one reactor; built by a control
//! thread. **Invariant:** `used` ≤ `next` ≤ `seen` in ring order, at most a lap apart; a chain keeps its place in the
//! ring until it is used, so `used` advances by the lengths that ids had when they were taken. The first used descriptor
//! of a batch is stored last, so the driver sees all of a batch or nothing.
//!
//! Cache lines that change cores for a request: those of its descriptors, there and back (four descriptors each), and
//! that of header and status. A split ring moves two more, for the available and the used ring. Event suppression is
//! read once per batch and stays in both caches until somebody goes to sleep.
//!
//! available: from `seen` on while heads are available, over whole chains
//! pop: head (acquire) → walk(NEXT | indirect table) → id of the last descriptor
//! publish: held first used descriptor (release) → fence → driver's event → interrupt?

use std::sync::atomic::{Ordering, fence};

use ringmill_core::io::Batch;
use ringmill_core::limits::PACKED_LOOK_DESCRIPTORS_MAX;
use ringmill_core::mem::MemTable;
use ringmill_core::spec::virtio_ring::{
    DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE,
    EVENT_FLAGS_ENABLE,
};
use ringmill_core::units::index;

use super::chain::ChainWalk;
use super::position::Position;
use super::{Chain, QueueError, RingWindows, Virtqueue};

mod start;

/// The only valid flags of an event suppression structure.
const EVENT_FLAGS_MASK: u16 = 3;
/// Length, id and flags follow the address.
const WORD_AT: usize = 8;

/// A packed virtqueue.
#[derive(Debug)]
pub struct PackedQueue {
    rings: RingWindows,
    size: u16,
    event_idx: bool,
    indirect: bool,
    kicks_suppressed: bool,
    /// The next descriptor to take.
    next: Position,
    /// The next descriptor to look at.
    seen: Position,
    /// Chains between `next` and `seen`.
    seen_count: u16,
    /// Where the next used descriptor goes.
    used: Position,
    /// What the driver knows to be used.
    published: Position,
    /// The first used descriptor of the batch, by its second half: offset and content.
    held: Option<(usize, u64)>,
    /// Ring descriptors of each chain in flight, by id.
    lens: Box<[u16]>,
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len_bytes: u32,
    id: u16,
    flags: u16,
}

impl Descriptor {
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the fields are cut out of 64 bits on purpose"
    )]
    fn from_words(addr: u64, word: u64) -> Descriptor {
        Descriptor {
            addr,
            len_bytes: word as u32,
            id: (word >> 32) as u16,
            flags: (word >> 48) as u16,
        }
    }
}

impl PackedQueue {
    /// Length, id and flags of a descriptor, in one access.
    #[inline]
    fn word(&self, at: Position) -> u64 {
        self.rings.desc.load_u64(at.offset_bytes() + WORD_AT)
    }

    #[inline]
    fn flags(&self, at: Position) -> u16 {
        Descriptor::from_words(0, self.word(at)).flags
    }

    /// Entries from `to` on that are not in flight and not waiting before it.
    #[inline]
    fn free_from(&self, to: Position) -> u32 {
        u32::from(self.size).saturating_sub(self.used.distance(to, self.size))
    }

    #[cold]
    #[inline(never)]
    fn overrun(&self, at: Position) -> QueueError {
        let free = u16::try_from(self.free_from(at)).unwrap_or(self.size);
        QueueError::Overrun { at: at.at(), free, size: self.size }
    }

    /// Makes the chain of `len` descriptors up to `to` the last one taken.
    #[inline]
    fn take(&mut self, id: u16, len: u16, to: Position) -> Result<(), QueueError> {
        self.lens[usize::from(id)] = len;
        self.next = to;
        self.seen_count = self.seen_count.saturating_sub(1);
        if self.seen_count == 0 && self.seen != to {
            return Err(QueueError::Changed { at: to.at() });
        }
        Ok(())
    }

    /// An indirect table (§2.8.7): read in sequence, and only WRITE means anything in it.
    #[inline]
    fn walk_indirect(
        &self,
        walk: &mut ChainWalk<'_>,
        desc: Descriptor,
        is_first: bool,
    ) -> Result<(), QueueError> {
        if !self.indirect {
            return Err(QueueError::Indirect("the feature was not negotiated"));
        }
        if desc.flags & DESC_F_NEXT != 0 || !is_first {
            return Err(QueueError::Indirect("a table is part of a list linked by NEXT"));
        }
        if desc.len_bytes == 0 || !index(desc.len_bytes).is_multiple_of(DESC_BYTES) {
            return Err(QueueError::Indirect(
                "the table's length is not a positive multiple of 16",
            ));
        }
        let table = walk
            .table(desc.addr, desc.len_bytes)
            .ok_or(QueueError::Indirect("the table does not lie inside one memory region"))?;
        for at in 0..desc.len_bytes / 16 {
            let bytes: [u8; DESC_BYTES] = table.sub(at * 16, 16).front_16().unwrap_or_default();
            let (addr, rest) = bytes.split_at(8);
            let word = |half: &[u8]| half.try_into().map_or(0, u64::from_le_bytes);
            let entry = Descriptor::from_words(word(addr), word(rest));
            walk.add(entry.addr, entry.len_bytes, entry.flags)?;
        }
        Ok(())
    }

    /// Whether the driver wants to hear of the used descriptors from `old` up to `used`.
    #[inline]
    fn wants_event(&self, old: Position) -> bool {
        let [a, b, c, d] = self.rings.avail.load_u32(0, Ordering::Relaxed).to_le_bytes();
        match u16::from_le_bytes([c, d]) & EVENT_FLAGS_MASK {
            EVENT_FLAGS_DISABLE => false,
            EVENT_FLAGS_DESC if self.event_idx => {
                // A place that does not exist is the driver's mistake: one interrupt too many does no harm.
                let event = Position::from_bits(u16::from_le_bytes([a, b]), self.size);
                event.is_none_or(|event| {
                    old.distance(event, self.size) < old.distance(self.used, self.size)
                })
            }
            _ => true,
        }
    }

    /// What the driver finds before it kicks. One store, because it reads both halves at once.
    #[cold]
    fn set_device_event(&self, desc: u16, flags: u16) {
        self.rings.used.store_u32(0, u32::from(desc) | u32::from(flags) << 16, Ordering::Relaxed);
    }
}

impl Virtqueue for PackedQueue {
    fn relocate(&mut self, windows: RingWindows) -> RingWindows {
        std::mem::replace(&mut self.rings, windows)
    }

    #[inline]
    fn available(&mut self) -> Result<u16, QueueError> {
        let mut free = self.free_from(self.seen);
        let mut looked_count = 0;
        while free > 0 && looked_count < PACKED_LOOK_DESCRIPTORS_MAX {
            let head = self.seen;
            let mut flags = self.flags(head);
            if !head.is_available(flags) {
                break;
            }
            // The rest of a chain is there when its head is (§2.8.6): pairs with the driver's barrier before the head's flags.
            fence(Ordering::Acquire);
            loop {
                self.seen.forward(1, self.size);
                looked_count += 1;
                free -= 1;
                if flags & DESC_F_NEXT == 0 {
                    break;
                }
                if free == 0 {
                    return Err(self.overrun(head));
                }
                flags = self.flags(self.seen);
                if !self.seen.is_available(flags) {
                    return Err(QueueError::Torn { at: self.seen.at() });
                }
            }
            self.seen_count += 1;
        }
        Ok(self.seen_count)
    }

    /// Nothing: the descriptors lie one after the other, which the processor notices on its own.
    #[inline]
    fn prefetch(&self, _count: usize) {}

    #[inline]
    fn pop(
        &mut self,
        mem: &MemTable,
        hint: &mut usize,
        batch: &mut Batch,
    ) -> Result<Option<Chain>, QueueError> {
        let mut at = self.next;
        let mut word = self.word(at);
        if !at.is_available(Descriptor::from_words(0, word).flags) {
            return Err(QueueError::Changed { at: at.at() });
        }
        // The flags were read before everything else that the driver wrote: pairs with its barrier before them.
        fence(Ordering::Acquire);
        let free = self.free_from(at);
        let mut walk = ChainWalk::new(mem, hint, batch);
        let mut len = 1u16;
        let id = loop {
            let addr = self.rings.desc.load_u64(at.offset_bytes());
            let desc = Descriptor::from_words(addr, word);
            at.forward(1, self.size);
            if desc.flags & DESC_F_INDIRECT != 0 {
                self.walk_indirect(&mut walk, desc, len == 1)?;
                break desc.id;
            }
            walk.add(desc.addr, desc.len_bytes, desc.flags)?;
            if desc.flags & DESC_F_NEXT == 0 {
                break desc.id;
            }
            if u32::from(len) >= free {
                return Err(self.overrun(self.next));
            }
            len += 1;
            word = self.word(at);
            if !at.is_available(Descriptor::from_words(0, word).flags) {
                return Err(QueueError::Torn { at: at.at() });
            }
        };
        if id >= self.size {
            return Err(QueueError::BufferId { id, size: self.size });
        }
        let chain = walk.finish(id)?;
        if chain.is_some() {
            self.take(id, len, at)?;
        }
        Ok(chain)
    }

    #[inline]
    fn unpop(&mut self, head: u16) {
        self.next.back(self.lens[usize::from(head)], self.size);
        self.seen_count += 1;
    }

    #[inline]
    fn put_used(&mut self, head: u16, written_bytes: u32) {
        let write = if written_bytes == 0 { 0 } else { DESC_F_WRITE };
        let flags = self.used.used_flags() | write;
        let word = u64::from(written_bytes) | u64::from(head) << 32 | u64::from(flags) << 48;
        let offset = self.used.offset_bytes() + WORD_AT;
        if self.held.is_none() {
            self.held = Some((offset, word));
        } else {
            // Nobody looks here before the first one is stored, and that store releases this one, too.
            self.rings.desc.store_u64(offset, word, Ordering::Relaxed);
        }
        self.used.forward(self.lens[usize::from(head)], self.size);
    }

    #[inline]
    fn publish(&mut self, ask: bool) -> bool {
        let Some((offset, word)) = self.held.take() else { return false };
        self.rings.desc.store_u64(offset, word, Ordering::Release);
        let old = std::mem::replace(&mut self.published, self.used);
        if !ask {
            return false;
        }
        // The used descriptors must be visible before the wish for an interrupt is read: pairs with the driver's barrier
        // between publishing that wish and looking at the ring again (§2.8.22).
        fence(Ordering::SeqCst);
        self.wants_event(old)
    }

    #[inline]
    fn suppress_kicks(&mut self) {
        if !self.kicks_suppressed {
            self.kicks_suppressed = true;
            self.set_device_event(0, EVENT_FLAGS_DISABLE);
        }
    }

    #[cold]
    fn request_kick(&mut self) -> bool {
        self.kicks_suppressed = false;
        if self.event_idx {
            self.set_device_event(self.next.bits(), EVENT_FLAGS_DESC);
        } else {
            self.set_device_event(0, EVENT_FLAGS_ENABLE);
        }
        // The wish must be visible before the ring is looked at again: pairs with the driver's barrier between the head's
        // flags and reading the wish (§2.8.21.2).
        fence(Ordering::SeqCst);
        self.next.is_available(self.flags(self.next))
    }

    #[cold]
    fn leave(&self) {
        self.note_place();
    }

    fn base(&self) -> u32 {
        u32::from(self.next.bits()) | u32::from(self.used.bits()) << 16
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn indices(&self) -> (u16, u16) {
        (self.next.bits(), self.published.bits())
    }

    fn memory_gone(&self) -> bool {
        self.rings.failed()
    }
}
