//! HOT PATH
//! A place in a packed ring and the lap that it is in (virtio 1.2 §2.8.1).
//!
//! Owner: a packed queue. **Invariant:** `at` is below the size of the ring it belongs to; all wrap arithmetic is here.
//!
//! forward, back: at ± by, and at the end of the ring the other lap

use ringmill_core::spec::virtio_ring::{DESC_BYTES, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED};

/// The wrap counter beside an offset.
pub(super) const WRAP_BIT: u16 = 1 << 15;

/// A descriptor's place and wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    at: u16,
    wrap: bool,
}

impl Position {
    /// From offset and wrap counter as they are written everywhere (§2.8.14); `None` when there is no such place.
    #[inline]
    pub(super) fn from_bits(bits: u16, size: u16) -> Option<Position> {
        let position = Position { at: bits & !WRAP_BIT, wrap: bits & WRAP_BIT != 0 };
        (position.at < size).then_some(position)
    }

    /// The reverse.
    #[inline]
    pub(super) fn bits(self) -> u16 {
        if self.wrap { self.at | WRAP_BIT } else { self.at }
    }

    /// The descriptor's number.
    #[inline]
    pub(super) fn at(self) -> u16 {
        self.at
    }

    /// The descriptor's first byte in the ring.
    #[inline]
    pub(super) fn offset_bytes(self) -> usize {
        usize::from(self.at) * DESC_BYTES
    }

    /// `by` descriptors on, at most a lap.
    #[inline]
    pub(super) fn forward(&mut self, by: u16, size: u16) {
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// `by` descriptors back, at most a lap.
    #[inline]
    pub(super) fn back(&mut self, by: u16, size: u16) {
        if self.at < by {
            self.at += size;
            self.wrap = !self.wrap;
        }
        self.at -= by;
    }

    /// Descriptors from here on to `to`; both lie within two laps.
    #[inline]
    pub(super) fn distance(self, to: Position, size: u16) -> u32 {
        let lap = u32::from(size);
        let linear = |p: Position| u32::from(p.at) + if p.wrap { 0 } else { lap };
        let (from, to) = (linear(self), linear(to));
        if to >= from { to - from } else { to + 2 * lap - from }
    }

    /// Whether a descriptor with these flags is available at this place in this lap.
    #[inline]
    pub(super) fn is_available(self, flags: u16) -> bool {
        let expected = if self.wrap { PACKED_DESC_F_AVAIL } else { PACKED_DESC_F_USED };
        flags & (PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED) == expected
    }

    /// The flags that mark a descriptor as used at this place in this lap.
    #[inline]
    pub(super) fn used_flags(self) -> u16 {
        if self.wrap { PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The naive twin: a number that counts descriptors for ever.
        #[test]
        fn agrees_with_a_counter_that_never_wraps(
            size in prop_oneof![1u16..20, 32_760u16..=32_768], start in 0u64..200_000,
            steps in prop::collection::vec((any::<bool>(), any::<u16>()), 0..40),
        ) {
            let of = |count: u64| {
                let lap = u64::from(size);
                Position { at: u16::try_from(count % lap).unwrap(), wrap: (count / lap).is_multiple_of(2) }
            };
            // So many laps that no step goes below 0.
            let mut twin = start + 4_000_000 / u64::from(size) * u64::from(size) * 2;
            let mut position = of(twin);
            for (forward, by) in steps {
                let (before, by) = (position, by % (size + 1));
                if forward {
                    twin += u64::from(by);
                    position.forward(by, size);
                    prop_assert_eq!(before.distance(position, size), u32::from(by));
                } else {
                    twin -= u64::from(by);
                    position.back(by, size);
                    prop_assert_eq!(position.distance(before, size), u32::from(by));
                }
                prop_assert_eq!(position, of(twin));
                prop_assert_eq!(Position::from_bits(position.bits(), size), Some(position));
            }
        }
    }

    #[test]
    fn flags_mean_available_or_used_in_one_lap_only() {
        let (first, second) = (Position { at: 3, wrap: true }, Position { at: 3, wrap: false });
        for (flags, laps) in [(0, [false, false]), (0x80, [true, false]), (0x8000, [false, true])] {
            assert_eq!([first.is_available(flags), second.is_available(flags)], laps);
            assert_eq!([first.is_available(flags | 7), second.is_available(flags | 7)], laps);
        }
        assert_eq!((first.used_flags(), second.used_flags()), (0x8080, 0));
        assert!(!first.is_available(0x8080) && !second.is_available(0x8080));
        assert_eq!(Position::from_bits(4, 4), None);
        assert_eq!(Position::from_bits(0x8003, 4), Some(first));
    }
}
