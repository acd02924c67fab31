//! The ways in which a range can be discarded or zeroed, and which of them this disk turned out to refuse.
//!
//! Flow: `open` probes what can be probed without changing data; a way that the kernel refuses later is struck off for
//! all channels. Owner: shared; one relaxed byte. **Invariant:** a struck way never comes back, so a ladder always ends.

use std::sync::atomic::{AtomicU8, Ordering};

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Way {
    /// fallocate PUNCH_HOLE: zeroes and frees.
    Punch = 1,
    /// fallocate ZERO_RANGE: zeroes and keeps.
    ZeroRange = 2,
    /// The discard command of Linux 6.12 on the ring.
    RingDiscard = 4,
    /// The BLKDISCARD ioctl, by the discard thread.
    HelperDiscard = 8,
}

const ALL: [(Way, &str); 4] = [
    (Way::Punch, "punch-hole"),
    (Way::ZeroRange, "zero-range"),
    (Way::RingDiscard, "ring-discard"),
    (Way::HelperDiscard, "ioctl-discard"),
];

#[derive(Debug)]
pub(super) struct Abilities {
    pub(super) is_block_device: bool,
    missing: AtomicU8,
}

impl Abilities {
    pub(super) fn new(is_block_device: bool) -> Abilities {
        Abilities { is_block_device, missing: AtomicU8::new(0) }
    }

    pub(super) fn has(&self, way: Way) -> bool {
        self.missing.load(Ordering::Relaxed) & way as u8 == 0
    }

    pub(super) fn strike(&self, way: Way) {
        self.missing.fetch_or(way as u8, Ordering::Relaxed);
    }

    /// The struck ways' names.
    pub(super) fn missing(&self) -> String {
        let names: Vec<&str> = ALL.iter().filter(|(w, _)| !self.has(*w)).map(|(_, n)| *n).collect();
        names.join(" ")
    }

    /// The first way to discard a range.
    pub(super) fn discard_way(&self) -> Option<Way> {
        let ways: &[Way] = match self.is_block_device {
            true => &[Way::RingDiscard, Way::HelperDiscard],
            false => &[Way::Punch],
        };
        ways.iter().copied().find(|&way| self.has(way))
    }

    /// The first way to zero a range, other than writing zeroes.
    pub(super) fn zero_way(&self, may_unmap: bool) -> Option<Way> {
        let ways: &[Way] =
            if may_unmap { &[Way::Punch, Way::ZeroRange] } else { &[Way::ZeroRange] };
        ways.iter().copied().find(|&way| self.has(way))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ladders_end_and_never_free_what_must_stay() {
        let file = Abilities::new(false);
        assert_eq!(file.zero_way(true), Some(Way::Punch));
        assert_eq!(file.zero_way(false), Some(Way::ZeroRange));
        file.strike(Way::ZeroRange);
        assert_eq!(file.zero_way(false), None, "a hole would free what the guest wants kept");
        assert_eq!(file.discard_way(), Some(Way::Punch));
        file.strike(Way::Punch);
        assert_eq!((file.zero_way(true), file.discard_way()), (None, None));
        assert_eq!(file.missing(), "punch-hole zero-range");
    }
}
