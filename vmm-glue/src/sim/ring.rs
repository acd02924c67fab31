//! The driver's side of a virtqueue, and of a split one (virtio 1.2 §2.7), written from the specification and nothing
//! else.
//!
//! Flow: buffers → descriptors (direct, indirect or both) → avail ring → kick?; used ring → heads. Owner: the guest
//! model or a test. **Invariant:** publishing an entry and looking whether the device wants a kick are two calls, and
//! so are asking for an interrupt and looking again, so that a simulator can put the device's work between them.

use std::fmt::Debug;

use ringmill_core::spec::virtio_ring::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY,
    avail_bytes, desc_table_bytes, used_bytes,
};
use ringmill_core::units::{bytes_u64, index, len_u32};

use crate::virtq::RingWindows;

use super::{Dice, GuestMemory};

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len_bytes: u32,
    /// The device writes it.
    pub writable: bool,
}

/// A driver's ring of any format.
pub trait GuestRing: Debug + Send {
    /// Entries.
    fn size(&self) -> u16;

    /// Descriptors not in use.
    fn free_count(&self) -> usize;

    /// The device's windows onto this ring.
    fn device_rings(&self, memory: &GuestMemory) -> Option<RingWindows>;

    /// Adds a chain: the first `direct_count` buffers as descriptors of the ring, the rest (if any) in an indirect table
    /// at `table`; a packed ring, which must not mix, puts all of them there then. Returns the head, or `None` without
    /// enough free descriptors. The device does not see it yet.
    fn add(
        &mut self,
        memory: &GuestMemory,
        dice: &mut Dice,
        buffers: &[Buffer],
        direct_count: usize,
        table: u64,
    ) -> Option<u16>;

    /// Shows the device everything that was added; true when there was anything.
    fn publish(&mut self, memory: &GuestMemory) -> bool;

    /// Looks whether the device wants a kick for what was published since the last look.
    fn wants_kick(&mut self, memory: &GuestMemory) -> bool;

    /// Takes the next used element: head and length. Its descriptors are free then.
    fn take_used(&mut self, memory: &GuestMemory) -> Option<(u32, u32)>;

    /// Asks for an interrupt when more than `after` are waiting, counted as `used_waiting` does (only EVENT_IDX can wait
    /// for more than one).
    fn ask_interrupt(&self, memory: &GuestMemory, after: u16);

    /// Wants no interrupts for now.
    fn suppress_interrupts(&self, memory: &GuestMemory);

    /// What was used and the driver has not taken: elements of a split ring, places of a packed one.
    fn used_waiting(&self, memory: &GuestMemory) -> u16;

    /// What `used_waiting` would be if the device returned everything that was added.
    fn waiting_max(&self) -> u16;

    /// Where a device goes on that has returned all that it took.
    fn drained_base(&self, memory: &GuestMemory) -> u32;

    /// In words, for the report of a hang.
    fn describe(&self, memory: &GuestMemory) -> String;
}

/// A driver's split ring.
#[derive(Debug)]
pub struct DriverRing {
    size: u16,
    event_idx: bool,
    desc: u64,
    avail: u64,
    used: u64,
    free: Vec<u16>,
    /// The descriptors of each chain, by head.
    chains: Vec<Vec<u16>>,
    /// Entries written to the avail ring.
    added: u16,
    /// Entries that the device may see.
    published: u16,
    /// `published` when the driver last looked whether to kick.
    looked: u16,
    last_used: u16,
}

impl DriverRing {
    /// Bytes of guest memory that a ring needs.
    #[must_use]
    pub fn bytes(size: u16) -> usize {
        let avail_at = desc_table_bytes(size);
        (avail_at + avail_bytes(size)).next_multiple_of(4) + used_bytes(size)
    }

    /// A ring in memory from `addr` (a multiple of 16) on, whose indices start at `start`.
    #[must_use]
    pub fn new(
        memory: &GuestMemory,
        addr: u64,
        size: u16,
        event_idx: bool,
        start: u16,
    ) -> DriverRing {
        let avail = addr + bytes_u64(desc_table_bytes(size));
        let used = (avail + bytes_u64(avail_bytes(size))).next_multiple_of(4);
        memory.write_u16(avail, 0);
        memory.write_u16(avail + 2, start);
        memory.write_u16(used, 0);
        memory.write_u16(used + 2, start);
        DriverRing {
            size,
            event_idx,
            desc: addr,
            avail,
            used,
            free: (0..size).collect(),
            chains: vec![Vec::new(); usize::from(size)],
            added: start,
            published: start,
            looked: start,
            last_used: start,
        }
    }

    /// Guest addresses of descriptor table, avail ring and used ring.
    #[must_use]
    pub fn addrs(&self) -> (u64, u64, u64) {
        (self.desc, self.avail, self.used)
    }

    /// The used index up to which the driver has looked.
    #[must_use]
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// The used index in memory.
    #[must_use]
    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        memory.read_u16(self.used + 2)
    }

    /// Writes one descriptor at any address.
    pub fn write_desc(
        memory: &GuestMemory,
        at: u64,
        addr: u64,
        len_bytes: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory.write(at, &bytes);
    }

    fn put(
        &self,
        memory: &GuestMemory,
        place: u16,
        buffer: Buffer,
        next: Option<u16>,
        dice: &mut Dice,
    ) {
        let flags =
            if buffer.writable { DESC_F_WRITE } else { 0 } | next.map_or(0, |_| DESC_F_NEXT);
        // Without NEXT the field has no meaning: leave something nasty in it.
        let next = next.unwrap_or_else(|| u16::from(dice.chance(500)) * 0xfff0);
        let at = self.desc + 16 * u64::from(place);
        Self::write_desc(memory, at, buffer.addr, buffer.len_bytes, flags, next);
    }

    /// An indirect table whose entries are in random order behind the first one.
    fn write_table(memory: &GuestMemory, dice: &mut Dice, table: u64, buffers: &[Buffer]) {
        let count = u16::try_from(buffers.len()).unwrap_or(u16::MAX);
        let mut order: Vec<u16> = (0..count).collect();
        if dice.chance(300) {
            for at in (2..order.len()).rev() {
                order.swap(at, 1 + dice.index(at));
            }
        }
        for (at, buffer) in buffers.iter().enumerate() {
            let next = order.get(at + 1).copied();
            let flags =
                if buffer.writable { DESC_F_WRITE } else { 0 } | next.map_or(0, |_| DESC_F_NEXT);
            let place = table + 16 * u64::from(order[at]);
            Self::write_desc(
                memory,
                place,
                buffer.addr,
                buffer.len_bytes,
                flags,
                next.unwrap_or(0xfff0),
            );
        }
    }

    /// Writes a head to the avail ring without any check: for hostile drivers.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.added & (self.size - 1));
        memory.write_u16(self.avail + 4 + 2 * slot, head);
        self.added = self.added.wrapping_add(1);
    }

    /// Entries that the device has been shown: the index in the avail ring.
    #[must_use]
    pub fn published(&self) -> u16 {
        self.published
    }
}

impl GuestRing for DriverRing {
    fn size(&self) -> u16 {
        self.size
    }

    fn free_count(&self) -> usize {
        self.free.len()
    }

    fn device_rings(&self, memory: &GuestMemory) -> Option<RingWindows> {
        RingWindows::split(
            &memory.table(),
            self.size,
            GuestMemory::user_addr(self.desc),
            GuestMemory::user_addr(self.avail),
            GuestMemory::user_addr(self.used),
        )
    }

    fn add(
        &mut self,
        memory: &GuestMemory,
        dice: &mut Dice,
        buffers: &[Buffer],
        direct_count: usize,
        table: u64,
    ) -> Option<u16> {
        let direct_count = direct_count.min(buffers.len());
        let (direct, rest) = buffers.split_at(direct_count);
        let needed = direct_count + usize::from(!rest.is_empty());
        if needed == 0 || needed > self.free.len() {
            return None;
        }
        let chain: Vec<u16> =
            (0..needed).map(|_| self.free.swap_remove(dice.index(self.free.len()))).collect();
        for (at, buffer) in direct.iter().enumerate() {
            let next = chain.get(at + 1).copied();
            self.put(memory, chain[at], *buffer, next, dice);
        }
        if !rest.is_empty() {
            let len = len_u32(rest.len() * 16);
            let at = self.desc + 16 * u64::from(chain[direct_count]);
            Self::write_desc(memory, at, table, len, DESC_F_INDIRECT, 0xffff);
            Self::write_table(memory, dice, table, rest);
        }
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.offer(memory, head);
        Some(head)
    }

    fn publish(&mut self, memory: &GuestMemory) -> bool {
        let news = self.published != self.added;
        self.published = self.added;
        memory.write_u16(self.avail + 2, self.published);
        news
    }

    fn wants_kick(&mut self, memory: &GuestMemory) -> bool {
        let old = std::mem::replace(&mut self.looked, self.published);
        let news = self.published.wrapping_sub(old);
        if self.event_idx {
            let event = memory.read_u16(self.used + 4 + 8 * u64::from(self.size));
            (0..news).any(|i| old.wrapping_add(i) == event)
        } else {
            news > 0 && memory.read_u16(self.used) & USED_F_NO_NOTIFY == 0
        }
    }

    fn take_used(&mut self, memory: &GuestMemory) -> Option<(u32, u32)> {
        if self.used_index(memory) == self.last_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.last_used & (self.size - 1));
        self.last_used = self.last_used.wrapping_add(1);
        let id = memory.read_u32(at);
        if let Some(chain) = self.chains.get_mut(index(id)) {
            self.free.append(chain);
        }
        Some((id, memory.read_u32(at + 4)))
    }

    fn ask_interrupt(&self, memory: &GuestMemory, after: u16) {
        if self.event_idx {
            let event = self.last_used.wrapping_add(after);
            memory.write_u16(self.avail + 4 + 2 * u64::from(self.size), event);
        } else {
            memory.write_u16(self.avail, 0);
        }
    }

    fn suppress_interrupts(&self, memory: &GuestMemory) {
        if self.event_idx {
            let event = self.last_used.wrapping_sub(1);
            memory.write_u16(self.avail + 4 + 2 * u64::from(self.size), event);
        } else {
            memory.write_u16(self.avail, AVAIL_F_NO_INTERRUPT);
        }
    }

    fn used_waiting(&self, memory: &GuestMemory) -> u16 {
        self.used_index(memory).wrapping_sub(self.last_used)
    }

    fn waiting_max(&self) -> u16 {
        self.added.wrapping_sub(self.last_used)
    }

    fn drained_base(&self, memory: &GuestMemory) -> u32 {
        u32::from(self.used_index(memory))
    }

    fn describe(&self, memory: &GuestMemory) -> String {
        format!(
            "split, published {}, used {} of {}",
            self.published,
            self.last_used,
            self.used_index(memory)
        )
    }
}
