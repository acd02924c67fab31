//! The driver's side of a packed virtqueue (virtio 1.2 §2.8), written from the specification and nothing else.
//!
//! Flow: buffers → descriptors at the next places (a list, or one that names a table) → kick?; used descriptors → ids.
//! Owner: the guest model or a test. **Invariant:** the first descriptor of everything that was added since the last
//! `publish` gets its flags in `publish`; places are counted without end, and only memory knows about laps.

use std::sync::atomic::{Ordering, fence};

use ringmill_core::spec::virtio_ring::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE,
    EVENT_FLAGS_ENABLE, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED, desc_table_bytes,
};
use ringmill_core::units::{bytes_u64, len_u32};

use crate::virtq::RingWindows;

use super::ring::{Buffer, GuestRing};
use super::{Dice, GuestMemory};

/// A driver's packed ring.
#[derive(Debug)]
pub struct PackedDriverRing {
    size: u16,
    event_idx: bool,
    desc: u64,
    driver: u64,
    device: u64,
    free_ids: Vec<u16>,
    /// Ring descriptors of each buffer in flight, by id.
    lens: Vec<u16>,
    /// Descriptors written.
    added: u64,
    /// Descriptors that the device may see.
    published: u64,
    /// `published` when the driver last looked whether to kick.
    looked: u64,
    /// Descriptors that came back.
    last_used: u64,
    /// Where the flags of the first unpublished descriptor belong, and what they are.
    held: Option<(u64, u16)>,
}

impl PackedDriverRing {
    /// Bytes of guest memory that a ring needs.
    #[must_use]
    pub fn bytes(size: u16) -> usize {
        desc_table_bytes(size) + 8
    }

    /// A ring in memory from `addr` (a multiple of 16) on, whose first descriptor is number `start` of an endless count:
    /// an even lap has wrap counter 1.
    #[must_use]
    pub fn new(
        memory: &GuestMemory,
        addr: u64,
        size: u16,
        event_idx: bool,
        start: u64,
    ) -> PackedDriverRing {
        let driver = addr + bytes_u64(desc_table_bytes(size));
        let ring = PackedDriverRing {
            size,
            event_idx,
            desc: addr,
            driver,
            device: driver + 4,
            free_ids: (0..size).collect(),
            lens: vec![0; usize::from(size)],
            added: start,
            published: start,
            looked: start,
            last_used: start,
            held: None,
        };
        memory.write(driver, &[0; 8]);
        // What a lap of requests has left behind: places from `start` on are still used from the lap before.
        for count in start..start + u64::from(size) {
            let before =
                if ring.wrap(count) { 0 } else { PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED };
            ring.write_desc(memory, count, 0, 0, 0, before);
        }
        ring
    }

    /// Guest addresses of descriptor ring, driver and device event suppression.
    #[must_use]
    pub fn addrs(&self) -> (u64, u64, u64) {
        (self.desc, self.driver, self.device)
    }

    /// The number of the next descriptor that the driver will write.
    #[must_use]
    pub fn next_place(&self) -> u64 {
        self.added
    }

    fn at(&self, count: u64) -> u64 {
        self.desc + 16 * (count % u64::from(self.size))
    }

    /// The wrap counter in the lap of this descriptor.
    fn wrap(&self, count: u64) -> bool {
        (count / u64::from(self.size)).is_multiple_of(2)
    }

    /// Offset and wrap counter as both sides write them.
    fn bits(&self, count: u64) -> u16 {
        let at = u16::try_from(count % u64::from(self.size)).unwrap_or(0);
        at | if self.wrap(count) { 1 << 15 } else { 0 }
    }

    /// The base of a device that has taken and returned everything up to this descriptor.
    #[must_use]
    pub fn base_at(&self, count: u64) -> u32 {
        u32::from(self.bits(count)) * 0x1_0001
    }

    /// The flags that make a descriptor available in its lap.
    #[must_use]
    pub fn avail_flags(&self, count: u64) -> u16 {
        if self.wrap(count) { PACKED_DESC_F_AVAIL } else { PACKED_DESC_F_USED }
    }

    /// Writes one descriptor of the ring, without any check: for hostile drivers, too.
    pub fn write_desc(
        &self,
        memory: &GuestMemory,
        count: u64,
        addr: u64,
        len_bytes: u32,
        id: u16,
        flags: u16,
    ) {
        Self::write_table_entry(memory, self.at(count), addr, len_bytes, id, flags);
    }

    /// Writes one descriptor at any address: for tables.
    pub fn write_table_entry(
        memory: &GuestMemory,
        at: u64,
        addr: u64,
        len_bytes: u32,
        id: u16,
        flags: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&id.to_le_bytes());
        bytes[14..].copy_from_slice(&flags.to_le_bytes());
        memory.write(at, &bytes);
    }

    /// Adds one descriptor. The first one since `publish` keeps the flags that say nothing until then.
    pub fn put(&mut self, memory: &GuestMemory, addr: u64, len_bytes: u32, id: u16, flags: u16) {
        let flags = flags | self.avail_flags(self.added);
        let shown = if self.held.is_none() {
            self.held = Some((self.at(self.added) + 14, flags));
            memory.read_u16(self.at(self.added) + 14)
        } else {
            flags
        };
        self.write_desc(memory, self.added, addr, len_bytes, id, shown);
        self.added += 1;
    }

    /// Every place after `last_used` that a used descriptor waits at, as counts of the descriptors behind it.
    fn used_end(&self, memory: &GuestMemory) -> u64 {
        let mut count = self.last_used;
        while count < self.published && self.is_used(memory, count) {
            let id = memory.read_u16(self.at(count) + 12);
            count += self.lens.get(usize::from(id)).map_or(1, |len| u64::from(*len).max(1));
        }
        count
    }

    fn is_used(&self, memory: &GuestMemory, count: u64) -> bool {
        let flags = memory.read_u16(self.at(count) + 14);
        let (avail, used) = (flags & PACKED_DESC_F_AVAIL != 0, flags & PACKED_DESC_F_USED != 0);
        avail == used && used == self.wrap(count)
    }

    fn write_driver_event(&self, memory: &GuestMemory, desc: u16, flags: u16) {
        memory.write(self.driver, &(u32::from(desc) | u32::from(flags) << 16).to_le_bytes());
    }
}

impl GuestRing for PackedDriverRing {
    fn size(&self) -> u16 {
        self.size
    }

    fn free_count(&self) -> usize {
        usize::from(self.size) - usize::from(self.waiting_max())
    }

    fn device_rings(&self, memory: &GuestMemory) -> Option<RingWindows> {
        let user = GuestMemory::user_addr;
        let (desc, driver, device) = self.addrs();
        RingWindows::packed(&memory.table(), self.size, user(desc), user(driver), user(device))
    }

    fn add(
        &mut self,
        memory: &GuestMemory,
        dice: &mut Dice,
        buffers: &[Buffer],
        direct_count: usize,
        table: u64,
    ) -> Option<u16> {
        let is_list = direct_count >= buffers.len();
        let needed = if is_list { buffers.len() } else { 1 };
        if needed == 0 || needed > self.free_count() || self.free_ids.is_empty() {
            return None;
        }
        let id = self.free_ids.swap_remove(dice.index(self.free_ids.len()));
        self.lens[usize::from(id)] = u16::try_from(needed).unwrap_or(u16::MAX);
        // Ids of descriptors that are not the last of their list, and flags and ids in tables mean nothing.
        let mut junk = || if dice.chance(500) { 0xffff } else { 0 };
        if is_list {
            for (at, buffer) in buffers.iter().enumerate() {
                let is_last = at + 1 == buffers.len();
                let flags = if buffer.writable { DESC_F_WRITE } else { 0 };
                let flags = flags | if is_last { 0 } else { DESC_F_NEXT };
                let id = if is_last { id } else { junk() };
                self.put(memory, buffer.addr, buffer.len_bytes, id, flags);
            }
            return Some(id);
        }
        for (at, buffer) in (0u64..).zip(buffers) {
            let flags = junk() & !DESC_F_WRITE | if buffer.writable { DESC_F_WRITE } else { 0 };
            let (addr, len, place) = (buffer.addr, buffer.len_bytes, table + 16 * at);
            Self::write_table_entry(memory, place, addr, len, junk(), flags);
        }
        let flags = DESC_F_INDIRECT | junk() & DESC_F_WRITE;
        self.put(memory, table, len_u32(16 * buffers.len()), id, flags);
        Some(id)
    }

    fn publish(&mut self, memory: &GuestMemory) -> bool {
        let news = self.published != self.added;
        self.published = self.added;
        if let Some((at, flags)) = self.held.take() {
            memory.write_u16(at, flags);
        }
        news
    }

    fn wants_kick(&mut self, memory: &GuestMemory) -> bool {
        let old = std::mem::replace(&mut self.looked, self.published);
        if old == self.published {
            return false;
        }
        let event = memory.read_u32(self.device).to_le_bytes();
        let (desc, flags) =
            (u16::from_le_bytes([event[0], event[1]]), u16::from_le_bytes([event[2], event[3]]));
        match flags {
            EVENT_FLAGS_DISABLE => false,
            EVENT_FLAGS_DESC => (old..self.published).any(|count| self.bits(count) == desc),
            _ => true,
        }
    }

    fn take_used(&mut self, memory: &GuestMemory) -> Option<(u32, u32)> {
        if self.last_used == self.published || !self.is_used(memory, self.last_used) {
            return None;
        }
        // The rest of a used descriptor is there when its flags are (§2.8.22).
        fence(Ordering::Acquire);
        let at = self.at(self.last_used);
        let (len, id) = (memory.read_u32(at + 8), memory.read_u16(at + 12));
        match self.lens.get_mut(usize::from(id)).map(std::mem::take) {
            Some(len) if len > 0 => {
                self.last_used += u64::from(len);
                self.free_ids.push(id);
            }
            // Not in flight: the model reports it.
            _ => self.last_used += 1,
        }
        Some((u32::from(id), len))
    }

    fn ask_interrupt(&self, memory: &GuestMemory, after: u16) {
        if self.event_idx {
            let desc = self.bits(self.last_used + u64::from(after));
            self.write_driver_event(memory, desc, EVENT_FLAGS_DESC);
        } else {
            self.write_driver_event(memory, 0, EVENT_FLAGS_ENABLE);
        }
    }

    fn suppress_interrupts(&self, memory: &GuestMemory) {
        self.write_driver_event(memory, 0xffff, EVENT_FLAGS_DISABLE);
    }

    fn used_waiting(&self, memory: &GuestMemory) -> u16 {
        u16::try_from(self.used_end(memory) - self.last_used).unwrap_or(u16::MAX)
    }

    fn waiting_max(&self) -> u16 {
        u16::try_from(self.added - self.last_used).unwrap_or(u16::MAX)
    }

    fn drained_base(&self, memory: &GuestMemory) -> u32 {
        self.base_at(self.used_end(memory))
    }

    fn describe(&self, memory: &GuestMemory) -> String {
        let used = self.used_end(memory);
        format!("packed, published {}, used {} of {used}", self.published, self.last_used)
    }
}
