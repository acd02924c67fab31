//! One ring as the front-end configures it, piece by piece and in any order, until it can start.
//!
//! In: size, base, addresses, descriptors, the enabled flag. Out: a [`RingStart`] once all of it is there. Owner: the
//! control thread; the running ring belongs to a reactor and is not this.
//!
//! **Invariant:** a [`RingStart`] has a size that fits its kind of ring, aligned areas that do not wrap, and each of
//! them lies in one memory region.
//!
//! Spec: vhost-user protocol, "Ring states", "Starting and stopping rings"; virtio 1.2 §2.7 (split: 16, 2 and 4 bytes
//! alignment), §2.8 (packed: 16, 4 and 4).

use crate::virtq::PackedQueue;

use super::descriptor::SharedFd;
use super::error::Error;
use super::memory::{MemoryTable, UserAddr};
use super::message::VringAddr;

/// The largest ring (virtio 1.2 §2.7, §2.8).
pub const RING_SIZE_MAX: u16 = 32768;

/// The kind of a ring, which decides its areas' sizes and alignments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Descriptor table, available ring, used ring.
    Split,
    /// Descriptor ring, driver and device event suppression.
    Packed,
}

impl Layout {
    /// Where a ring begins that has never run: a packed one in its first lap, which counts as 1 (virtio 1.2 §2.8.1).
    pub(super) fn first_base(self) -> u32 {
        match self {
            Layout::Split => 0,
            Layout::Packed => 0x8000_8000,
        }
    }
}

/// Where a ring's areas are, in the front-end's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table (split), descriptor ring (packed).
    pub desc: UserAddr,
    /// Available ring (split), driver event suppression (packed).
    pub avail: UserAddr,
    /// Used ring (split), device event suppression (packed).
    pub used: UserAddr,
}

impl RingAddresses {
    /// The addresses of a message.
    pub(super) fn new(addr: &VringAddr) -> Self {
        Self {
            desc: UserAddr(addr.desc_addr),
            avail: UserAddr(addr.avail_addr),
            used: UserAddr(addr.used_addr),
        }
    }
}

/// A ring that can run.
#[derive(Clone, Debug)]
pub struct RingStart {
    /// Its kind.
    pub layout: Layout,
    /// Entries; for a split ring a power of two.
    pub size: u16,
    /// Its areas.
    pub addresses: RingAddresses,
    /// Where to continue. Split: the next index in the available ring (16 bits). Packed: bits 0–14 next available
    /// descriptor, bit 15 its wrap counter, bits 16–30 next used descriptor, bit 31 its wrap counter.
    pub base: u32,
    /// Whether it may take requests at once.
    pub enabled: bool,
    /// Readable when the guest has added requests; `None`: poll.
    pub kick: Option<SharedFd>,
    /// To be written for an interrupt; `None`: the front-end polls.
    pub call: Option<SharedFd>,
    /// To be written when the ring is broken.
    pub err: Option<SharedFd>,
}

/// The kick descriptor, whose arrival is what starts a ring.
#[derive(Clone, Debug)]
pub enum Kick {
    /// SET_VRING_KICK has not come since the ring was stopped.
    Unset,
    /// It came without a descriptor: the ring is polled.
    Polled,
    /// It came with one.
    Fd(SharedFd),
}

/// A ring's configuration, plain data.
#[derive(Clone, Debug)]
pub struct Ring {
    /// SET_VRING_NUM.
    pub size: Option<u16>,
    /// SET_VRING_ADDR.
    pub addresses: Option<RingAddresses>,
    /// SET_VRING_BASE, or where the ring stopped; `None`: at the beginning.
    pub base: Option<u32>,
    /// SET_VRING_KICK.
    pub kick: Kick,
    /// SET_VRING_CALL. It outlives a stop: QEMU sends it once at start-up and expects it to hold.
    pub call: Option<SharedFd>,
    /// SET_VRING_ERR.
    pub err: Option<SharedFd>,
    /// SET_VRING_ENABLE; `None` while that message has not come, when the negotiated features decide.
    pub enabled: Option<bool>,
    /// Whether the backend has it.
    pub started: bool,
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            size: None,
            addresses: None,
            base: None,
            kick: Kick::Unset,
            call: None,
            err: None,
            enabled: None,
            started: false,
        }
    }
}

impl Ring {
    /// Everything a running ring needs, or `None` while something is missing.
    pub(super) fn start(
        &self,
        index: u16,
        layout: Layout,
        memory: &MemoryTable,
        enabled: bool,
    ) -> Result<Option<RingStart>, Error> {
        let kick = match &self.kick {
            Kick::Unset => return Ok(None),
            Kick::Polled => None,
            Kick::Fd(fd) => Some(fd.clone()),
        };
        let (Some(size), Some(addresses)) = (self.size, self.addresses) else { return Ok(None) };
        // Each was checked when it came, but perhaps before the features that decide about the layout.
        check_size(index, layout, size.into())?;
        check_addresses(index, layout, &addresses)?;
        let base = self.base(layout);
        check_base(index, layout, size, base)?;
        if !is_covered(layout, size, &addresses, memory) {
            return Ok(None);
        }
        let (call, err) = (self.call.clone(), self.err.clone());
        Ok(Some(RingStart { layout, size, addresses, base, enabled, kick, call, err }))
    }

    /// Where the ring would start.
    pub(super) fn base(&self, layout: Layout) -> u32 {
        self.base.unwrap_or(layout.first_base())
    }

    /// What keeps the ring from running; `None` when it runs.
    pub(super) fn waits_for(&self, layout: Layout, memory: &MemoryTable) -> Option<&'static str> {
        if self.started {
            None
        } else if self.size.is_none() {
            Some("its size (SET_VRING_NUM)")
        } else if self.addresses.is_none() {
            Some("its addresses (SET_VRING_ADDR)")
        } else if matches!(self.kick, Kick::Unset) {
            Some("its start (SET_VRING_KICK)")
        } else if !self.is_covered(layout, memory) {
            Some("its memory: no region holds its addresses")
        } else {
            Some("features that fit its configuration")
        }
    }

    /// Whether `memory` holds all of this ring's areas. A ring without addresses needs none.
    pub(super) fn is_covered(&self, layout: Layout, memory: &MemoryTable) -> bool {
        match (self.size, &self.addresses) {
            (Some(size), Some(addresses)) => is_covered(layout, size, addresses, memory),
            _ => true,
        }
    }
}

/// Checks a ring size and narrows it.
pub(super) fn check_size(index: u16, layout: Layout, size: u32) -> Result<u16, Error> {
    match u16::try_from(size) {
        Ok(entries @ 1..=RING_SIZE_MAX)
            if layout == Layout::Packed || entries.is_power_of_two() =>
        {
            Ok(entries)
        }
        _ => Err(Error::RingSize { index, size }),
    }
}

/// Checks that a ring of this size has the places that its base names.
fn check_base(index: u16, layout: Layout, size: u16, base: u32) -> Result<(), Error> {
    let reason = match layout {
        Layout::Split if base > u32::from(u16::MAX) => "a split ring's index has 16 bits",
        Layout::Packed if !PackedQueue::is_base(size, base) => {
            "both places (bits 0-14 and 16-30, wrap counters in bits 15 and 31) must lie in the packed ring, and the one \
             for available descriptors less than a lap ahead of the other"
        }
        _ => return Ok(()),
    };
    Err(Error::RingBase { index, base, reason })
}

/// Checks the alignment of a ring's areas, and that the largest ring at these addresses does not wrap.
pub(super) fn check_addresses(
    index: u16,
    layout: Layout,
    addresses: &RingAddresses,
) -> Result<(), Error> {
    for (area, addr, align_bytes, len_bytes) in areas(layout, RING_SIZE_MAX, addresses) {
        if !addr.0.is_multiple_of(align_bytes) {
            return Err(Error::RingAlignment { index, area, addr, align_bytes });
        }
        if addr.0.checked_add(len_bytes).is_none() {
            return Err(Error::RingAddress { index, area, addr });
        }
    }
    Ok(())
}

fn is_covered(layout: Layout, size: u16, addresses: &RingAddresses, memory: &MemoryTable) -> bool {
    areas(layout, size, addresses)
        .iter()
        .all(|(_, addr, _, len_bytes)| memory.covers(*addr, *len_bytes))
}

/// Name, address, alignment and length of each area.
fn areas(
    layout: Layout,
    size: u16,
    addresses: &RingAddresses,
) -> [(&'static str, UserAddr, u64, u64); 3] {
    let RingAddresses { desc, avail, used } = *addresses;
    let entries = u64::from(size);
    match layout {
        // The rings end in the event index of the other side, whether or not that is negotiated (virtio 1.2 §2.7).
        Layout::Split => [
            ("descriptor table", desc, 16, 16 * entries),
            ("available ring", avail, 2, 6 + 2 * entries),
            ("used ring", used, 4, 6 + 8 * entries),
        ],
        Layout::Packed => [
            ("descriptor ring", desc, 16, 16 * entries),
            ("driver event suppression", avail, 4, 4),
            ("device event suppression", used, 4, 4),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{GuestAddr, Region};
    use super::*;

    fn memory(user_addr: u64, len_bytes: u64) -> MemoryTable {
        let guest_addr = GuestAddr(0);
        MemoryTable::new(&[Region { guest_addr, len_bytes, user_addr: UserAddr(user_addr) }])
            .unwrap()
    }

    fn addresses(desc: u64, avail: u64, used: u64) -> RingAddresses {
        RingAddresses { desc: UserAddr(desc), avail: UserAddr(avail), used: UserAddr(used) }
    }

    fn ready() -> Ring {
        Ring {
            size: Some(256),
            addresses: Some(addresses(0x1000, 0x2000, 0x3000)),
            kick: Kick::Polled,
            ..Ring::default()
        }
    }

    fn start(ring: &Ring, memory: &MemoryTable) -> Result<Option<RingStart>, Error> {
        ring.start(0, Layout::Split, memory, true)
    }

    #[test]
    fn a_ring_starts_only_when_everything_is_there() {
        let memory = memory(0x1000, 0x10000);
        assert!(start(&ready(), &memory).unwrap().is_some());
        for missing in [
            Ring { size: None, ..ready() },
            Ring { addresses: None, ..ready() },
            Ring { kick: Kick::Unset, ..ready() },
        ] {
            assert!(start(&missing, &memory).unwrap().is_none());
        }
        assert!(start(&ready(), &MemoryTable::default()).unwrap().is_none());
    }

    #[test]
    fn every_byte_of_every_area_must_be_in_memory() {
        // The used ring of 256 entries ends at 0x3000 + 6 + 8 * 256.
        let end = 0x3000 + 6 + 8 * 256;
        assert!(start(&ready(), &memory(0x1000, end - 0x1000)).unwrap().is_some());
        assert!(start(&ready(), &memory(0x1000, end - 0x1001)).unwrap().is_none());
        assert!(start(&ready(), &memory(0x1001, 0x10000)).unwrap().is_none());
    }

    #[test]
    fn sizes_of_split_rings_are_powers_of_two_and_of_packed_ones_any() {
        for size in [1u32, 2, 128, 256, 1024, 32768] {
            assert!(check_size(0, Layout::Split, size).is_ok());
        }
        for size in [0, 3, 255, 32767, 32769, 65536, 65537, u32::MAX] {
            assert!(matches!(
                check_size(0, Layout::Split, size),
                Err(Error::RingSize { index: 0, size: refused }) if refused == size
            ));
        }
        for (size, fits) in [(0, false), (3, true), (32768, true), (32769, false), (65537, false)] {
            assert_eq!(check_size(0, Layout::Packed, size).is_ok(), fits);
        }
    }

    #[test]
    fn each_area_has_its_own_alignment() {
        let split =
            |desc, avail, used| check_addresses(0, Layout::Split, &addresses(desc, avail, used));
        assert!(split(16, 2, 4).is_ok());
        for (addresses, name) in [
            ((8, 2, 4), "descriptor table"),
            ((16, 1, 4), "available ring"),
            ((16, 2, 2), "used ring"),
        ] {
            let (desc, avail, used) = addresses;
            let Err(Error::RingAlignment { area, .. }) = split(desc, avail, used) else { panic!() };
            assert_eq!(area, name);
        }
        assert!(check_addresses(0, Layout::Packed, &addresses(16, 2, 4)).is_err());
    }

    #[test]
    fn areas_that_wrap_are_refused() {
        for wrapping in [
            addresses(u64::MAX - 15, 0, 0),
            addresses(0, u64::MAX - 1, 0),
            addresses(0, 0, u64::MAX - 3),
        ] {
            let result = check_addresses(0, Layout::Split, &wrapping);
            assert!(matches!(result, Err(Error::RingAddress { .. })));
        }
    }

    #[test]
    fn a_split_ring_cannot_start_beyond_16_bits_and_a_packed_one_can() {
        let memory = memory(0x1000, 0x10000);
        let ring = Ring { base: Some(0x1_0000), ..ready() };
        assert!(matches!(start(&ring, &memory), Err(Error::RingBase { .. })));
        let ring = Ring { base: Some(0x8007_8009), ..ready() };
        let started = ring.start(0, Layout::Packed, &memory, false).unwrap().unwrap();
        assert_eq!((started.base, started.enabled), (0x8007_8009, false));
        assert_eq!(started.layout, Layout::Packed);
    }

    #[test]
    fn a_ring_without_a_base_starts_at_the_beginning_of_its_kind() {
        let memory = memory(0x1000, 0x10000);
        for (layout, base) in [(Layout::Split, 0), (Layout::Packed, 0x8000_8000)] {
            let started = ready().start(0, layout, &memory, true).unwrap().unwrap();
            assert_eq!(started.base, base);
        }
    }

    #[test]
    fn a_packed_base_names_places_of_the_ring_less_than_a_lap_apart() {
        // 3 entries. Used and available: same place, ahead by 1, 2, and 2 over the border between laps.
        for base in [0x8000_8000, 0x0001_0001, 0x8000_8001, 0x8000_8002, 0x8002_0001] {
            assert!(check_base(0, Layout::Packed, 3, base).is_ok(), "{base:#x}");
        }
        // Places outside; available behind used; a whole lap ahead; only the half for available descriptors.
        for base in [0x8000_8003, 0x8003_8000, 0xffff_ffff, 0x8001_8000, 0x8000_0000, 0x0000_8000] {
            let checked = check_base(0, Layout::Packed, 3, base);
            assert!(matches!(checked, Err(Error::RingBase { .. })), "{base:#x}");
        }
    }
}
