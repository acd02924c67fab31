//! Where a packed queue begins: the place that the front-end names, if the ring agrees.
//!
//! Owner: the control thread that builds the queue, before any reactor has it. **Invariant:** a queue does not begin at a
//! place that the marks in the ring disprove: it would take requests that were answered laps ago.
//!
//! A split ring's driver and device both find their place in the used ring. A packed ring holds no place, and a front-end
//! learns it from GET_VRING_BASE alone: when the back-end goes away first (a restart of the daemon), QEMU names an old
//! place to the next one. So a queue that takes its leave with nothing in flight notes its place where the guest lets it
//! write and does not read: the descriptor of its event suppression, which means nothing while events are enabled.

use std::sync::atomic::Ordering;

use ringmill_core::limits::QUEUE_SIZE_MAX;
use ringmill_core::spec::virtio_ring::{
    EVENT_FLAGS_ENABLE, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED,
};

use super::super::RingWindows;
use super::super::position::{Position, WRAP_BIT};
use super::PackedQueue;

/// Place 0 in the first lap, for both sides.
const FIRST_BASE: u32 = 0x8000_8000;

impl PackedQueue {
    /// A queue of `size` entries (1 to 32,768, any number) that goes on at `base`: next available descriptor and its wrap
    /// counter in the low half, next used descriptor and its wrap counter in the high half.
    ///
    /// `None` when there are no such places, when a lap or more lies between them (a ring full of requests that nobody
    /// has in flight), or when the ring is somewhere else and does not say where.
    #[must_use]
    pub fn new(
        rings: RingWindows,
        size: u16,
        base: u32,
        event_idx: bool,
        indirect: bool,
    ) -> Option<PackedQueue> {
        let (next, used) = positions(size, base)?;
        let mut queue = PackedQueue {
            rings,
            size,
            event_idx,
            indirect,
            kicks_suppressed: false,
            next,
            seen: next,
            seen_count: 0,
            used,
            published: used,
            held: None,
            lens: std::iter::repeat_n(0, usize::from(size)).collect(),
        };
        // A note is newer than what a front-end knows: it lives from a farewell to the next start.
        if let Some(noted) = queue.noted_place().filter(|place| queue.could_be_at(*place)) {
            queue.go_to(noted);
        } else if !queue.could_be_at(used) {
            // QUIRK: the virtio-driver crate (0.6) begins at 0, as if the ring were split. That is the second lap.
            let (first, _) = positions(size, FIRST_BASE).filter(|_| base == 0)?;
            if !queue.could_be_at(first) {
                return None;
            }
            queue.go_to(first);
        }
        Some(queue)
    }

    fn go_to(&mut self, place: Position) {
        (self.next, self.seen) = (place, place);
        (self.used, self.published) = (place, place);
    }

    /// Whether a ring of `size` entries can go on at `base`, as far as numbers tell.
    #[must_use]
    pub fn is_base(size: u16, base: u32) -> bool {
        positions(size, base).is_some()
    }

    /// Whether the marks in the ring allow the next used descriptor to go to `place`. Everything before it in its lap was
    /// available or used in this lap (or is available in the next one); nothing from it on was used in this lap, and
    /// behind a first lap everything was available once.
    fn could_be_at(&self, place: Position) -> bool {
        const MARKS: u16 = PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED;
        let wrap = place.used_flags() != 0;
        let mut at = place;
        at.back(place.at(), self.size);
        for number in 0..self.size {
            let marks = self.flags(at) & MARKS;
            let (used_now, used_before) = if wrap { (MARKS, 0) } else { (0, MARKS) };
            let is_wrong =
                if number < place.at() { marks == used_before } else { marks == used_now };
            if is_wrong {
                return false;
            }
            at.forward(1, self.size);
        }
        true
    }

    /// Notes where the ring is for a successor whom nobody tells. Only with nothing in flight.
    pub(super) fn note_place(&self) {
        if self.used == self.next && self.held.is_none() {
            let bits = self.next.bits();
            // 0 is what a queue leaves that notes nothing: the start of a second lap is the end of a first one. (The
            // largest ring has no number for that: its front-end has to know.)
            let bits = if bits == 0 { self.size | WRAP_BIT } else { bits };
            self.set_device_event(bits, EVENT_FLAGS_ENABLE);
        }
    }

    /// What a predecessor noted. One that runs, or died, leaves other flags or no descriptor.
    fn noted_place(&self) -> Option<Position> {
        let [a, b, c, d] = self.rings.used.load_u32(0, Ordering::Relaxed).to_le_bytes();
        let is_noted = u16::from_le_bytes([c, d]) == EVENT_FLAGS_ENABLE;
        let bits = u16::from_le_bytes([a, b]);
        let is_end = self.size < QUEUE_SIZE_MAX && bits == self.size | WRAP_BIT;
        let place = Position::from_bits(if is_end { 0 } else { bits }, self.size);
        place.filter(|_| is_noted && bits != 0)
    }
}

fn positions(size: u16, base: u32) -> Option<(Position, Position)> {
    let [a, b, c, d] = base.to_le_bytes();
    let next = Position::from_bits(u16::from_le_bytes([a, b]), size)?;
    let used = Position::from_bits(u16::from_le_bytes([c, d]), size)?;
    let is_possible = size <= QUEUE_SIZE_MAX && used.distance(next, size) < u32::from(size);
    is_possible.then_some((next, used))
}
