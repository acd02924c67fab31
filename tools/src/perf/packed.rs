//! HOT PATH
//! The driver's side of a packed ring (virtio 1.2 §2.8) with a prepared descriptor chain per slot.
//!
//! Owner: the load's thread. **Invariant:** the first descriptor of a batch gets its flags last, so that the device sees
//! the whole batch or nothing of it.
//!
//! push: header line → descriptors at the next places, the first of the batch held back
//! publish: the held word (release) → device event flags
//! poll: while the descriptor at the used place is marked used: id → slot, step over its chain

use std::sync::atomic::{Ordering, fence};

use arrayvec::ArrayVec;
use ringmill_core::spec::virtio_ring::{
    DESC_BYTES, DESC_F_INDIRECT, EVENT_FLAGS_AT, EVENT_FLAGS_DISABLE, PACKED_DESC_F_AVAIL,
    PACKED_DESC_F_USED, desc_table_bytes,
};

use super::layout::QueueLayout;
use super::memory::{LoadMemory, Window};
use super::ring::{DriverRing, RingFault};
use super::slots::{Op, SlotLines, Words};

/// A place in the ring and its wrap counter.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: u16,
    wrap: bool,
}

impl Place {
    #[inline]
    fn step(&mut self, by: u16, size: u16) {
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    #[inline]
    fn offset(self) -> usize {
        usize::from(self.at) * DESC_BYTES
    }

    /// The flags that make a descriptor available in this lap (§2.8.1).
    #[inline]
    fn avail_flags(self) -> u64 {
        u64::from(if self.wrap { PACKED_DESC_F_AVAIL } else { PACKED_DESC_F_USED }) << 48
    }
}

/// A slot's descriptors without the lap's flags.
type Template = ArrayVec<Words, 3>;

/// A packed ring.
#[derive(Debug)]
pub(crate) struct PackedRing {
    desc: Window,
    device: Window,
    slots: SlotLines,
    templates: Box<[(Option<Op>, Template)]>,
    busy: Box<[bool]>,
    indirect: bool,
    size: u16,
    next: Place,
    used: Place,
    /// Where the batch begins, and the word that shows it to the device.
    held: Option<(usize, u64)>,
    published_count: u16,
    returned_count: u16,
    pushed_count: u16,
    _driver: Window,
}

impl PackedRing {
    /// An empty ring in zeroed memory from `base` on.
    #[cold]
    pub(crate) fn new(memory: &LoadMemory, layout: &QueueLayout, base: usize) -> PackedRing {
        let (driver_bytes, device_bytes) = layout.part_bytes();
        let driver = memory.window(base + layout.driver_at, driver_bytes);
        driver.store_u16(EVENT_FLAGS_AT, EVENT_FLAGS_DISABLE, Ordering::Relaxed);
        let start = Place { at: 0, wrap: true };
        PackedRing {
            desc: memory.window(base + layout.desc_at, desc_table_bytes(layout.size)),
            device: memory.window(base + layout.device_at, device_bytes),
            slots: SlotLines::new(memory, layout, base),
            templates: std::iter::repeat_n((None, Template::new()), usize::from(layout.depth))
                .collect(),
            busy: std::iter::repeat_n(false, usize::from(layout.depth)).collect(),
            indirect: layout.form.indirect,
            size: layout.size,
            next: start,
            used: start,
            held: None,
            published_count: 0,
            returned_count: 0,
            pushed_count: 0,
            _driver: driver,
        }
    }

    /// Prepares a slot for another kind of request.
    #[cold]
    #[inline(never)]
    fn reshape(&mut self, slot: u16, op: Op) {
        let mut template = Template::new();
        if self.indirect {
            let id = u64::from(slot) << 32;
            let (table, len_bytes) = self.slots.write_table(slot, op, true);
            let flags = u64::from(DESC_F_INDIRECT) << 48;
            template.push([table, u64::from(len_bytes) | id | flags]);
        } else {
            let chain = self.slots.chain(slot, op);
            for (number, buffer) in chain.iter().enumerate() {
                template.push(buffer.packed_words(number + 1 < chain.len(), slot));
            }
        }
        self.templates[usize::from(slot)] = (Some(op), template);
    }
}

impl DriverRing for PackedRing {
    #[inline]
    fn push(&mut self, slot: u16, op: Op, offset_bytes: u64) {
        let at = usize::from(slot);
        if self.templates[at].0 != Some(op) {
            self.reshape(slot, op);
        }
        self.slots.prepare(slot, op, offset_bytes);
        self.busy[at] = true;
        for words in &self.templates[at].1 {
            let offset = self.next.offset();
            let last = words[1] | self.next.avail_flags();
            self.desc.store_u64(offset, words[0], Ordering::Relaxed);
            if self.held.is_none() {
                self.held = Some((offset, last));
            } else {
                self.desc.store_u64(offset + 8, last, Ordering::Relaxed);
            }
            self.next.step(1, self.size);
        }
        self.pushed_count = self.pushed_count.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let Some((offset, word)) = self.held.take() else { return false };
        self.desc.store_u64(offset + 8, word, Ordering::Release);
        self.published_count = self.pushed_count;
        self.device.load_u16(EVENT_FLAGS_AT, Ordering::Relaxed) != EVENT_FLAGS_DISABLE
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<u16>) -> Result<(), RingFault> {
        while self.returned_count != self.published_count {
            let word = self.desc.load_u64(self.used.offset() + 8, Ordering::Acquire);
            let used_flags = u64::from(PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED) << 48;
            let expected = if self.used.wrap { used_flags } else { 0 };
            if word & used_flags != expected {
                break;
            }
            #[expect(clippy::cast_possible_truncation, reason = "the id is cut out of 64 bits")]
            let slot = (word >> 32) as u16;
            match self.busy.get_mut(usize::from(slot)) {
                Some(busy) if *busy => *busy = false,
                _ => {
                    let what = "the device returned a request that is not in flight";
                    return Err(RingFault { what, index: self.used.at });
                }
            }
            self.slots.prefetch(slot);
            done.push(slot);
            let len = u16::try_from(self.templates[usize::from(slot)].1.len()).unwrap_or(1);
            self.used.step(len, self.size);
            self.returned_count = self.returned_count.wrapping_add(1);
        }
        Ok(())
    }

    #[cold]
    fn kick_wanted(&self) -> bool {
        // As for split rings: pairs with the device's barrier between its wish and its second look (§2.8.21.3.1).
        fence(Ordering::SeqCst);
        self.device.load_u16(EVENT_FLAGS_AT, Ordering::Relaxed) != EVENT_FLAGS_DISABLE
    }

    #[inline]
    fn slots(&self) -> &SlotLines {
        &self.slots
    }

    fn indices(&self) -> (u16, u16) {
        (self.next.at, self.used.at)
    }
}
