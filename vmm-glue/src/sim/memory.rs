//! A guest's memory as the guest sees it: numbers at guest addresses, across region borders.
//!
//! Owner: the guest model. **Invariant:** every access lies inside the regions that the guest believes to have; an
//! access outside is a bug of the model and panics.

use std::sync::Arc;

use ringmill_core::mem::{DmaDomain, Mapping, MemTable, RegionSpec, Segment};
use ringmill_core::units::{GuestAddr, bytes_u64, index, len_u32};

/// Front-end addresses lie this far above guest addresses.
const USER_OFFSET: u64 = 0x7000_0000_0000;

/// Regions of the simulator's own memory.
#[derive(Debug)]
pub struct GuestMemory {
    table: Arc<MemTable>,
}

impl GuestMemory {
    /// Memory of these regions: guest address and length in bytes.
    ///
    /// # Panics
    /// When there is no memory or the regions overlap.
    #[must_use]
    pub fn new(regions: &[(u64, usize)]) -> GuestMemory {
        let mut memory = GuestMemory { table: Arc::new(MemTable::new()) };
        for &(guest_addr, len_bytes) in regions {
            memory.add(guest_addr, len_bytes);
        }
        memory
    }

    /// The table for workers.
    #[must_use]
    pub fn table(&self) -> Arc<MemTable> {
        Arc::clone(&self.table)
    }

    /// The front-end's address of a guest address.
    #[must_use]
    pub fn user_addr(guest_addr: u64) -> u64 {
        guest_addr + USER_OFFSET
    }

    /// Adds a region of zeroes.
    ///
    /// # Panics
    /// When there is no memory or the region overlaps another.
    pub fn add(&mut self, guest_addr: u64, len_bytes: usize) {
        let spec = RegionSpec {
            guest_addr: GuestAddr(guest_addr),
            len_bytes: bytes_u64(len_bytes),
            user_addr: Self::user_addr(guest_addr),
        };
        let mut table = MemTable::clone(&self.table);
        let added = Mapping::anonymous(len_bytes)
            .map_err(|e| e.to_string())
            .and_then(|mapping| table.add(spec, Arc::new(mapping)).map_err(|e| e.to_string()));
        if let Err(error) = added {
            panic!("the model's memory: {error}");
        }
        self.table = Arc::new(table);
    }

    /// Lets a device that moves data by itself reach it. Tables that were handed out before do not know of it.
    ///
    /// # Panics
    /// When the device cannot be given the memory.
    pub fn map_into(&mut self, domain: &Arc<dyn DmaDomain>) {
        let mut table = MemTable::clone(&self.table);
        if let Err(error) = table.map_into(domain, || true) {
            panic!("the model's memory: {error}");
        }
        self.table = Arc::new(table);
    }

    /// Removes the region; the old table, and so its memory, lives as long as somebody holds it.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn remove(&mut self, guest_addr: u64, len_bytes: usize) {
        let mut table = MemTable::clone(&self.table);
        assert!(table.remove(GuestAddr(guest_addr), bytes_u64(len_bytes)));
        self.table = Arc::new(table);
    }

    /// True when the range lies in one region.
    #[must_use]
    pub fn is_whole(&self, addr: u64, len_bytes: usize) -> bool {
        let len = len_u32(len_bytes);
        self.table.translate(GuestAddr(addr), len, &mut 0).is_some_and(|s| s.len_bytes() == len)
    }

    /// One byte as a segment; `None` outside the regions.
    #[must_use]
    pub fn byte(&self, addr: u64) -> Option<Segment> {
        self.table.translate(GuestAddr(addr), 1, &mut 0)
    }

    /// Copies guest memory out.
    ///
    /// # Panics
    /// Outside the regions.
    pub fn read(&self, mut addr: u64, mut out: &mut [u8]) {
        let mut hint = 0;
        while !out.is_empty() {
            let found = self.table.translate(GuestAddr(addr), len_u32(out.len()), &mut hint);
            let Some(segment) = found else { panic!("the model reads {addr:#x}") };
            let done = segment.read_into(out);
            out = &mut out[done..];
            addr += bytes_u64(done);
        }
    }

    /// Copies into guest memory.
    ///
    /// # Panics
    /// Outside the regions.
    pub fn write(&self, mut addr: u64, mut data: &[u8]) {
        let mut hint = 0;
        while !data.is_empty() {
            let found = self.table.translate(GuestAddr(addr), len_u32(data.len()), &mut hint);
            let Some(segment) = found else { panic!("the model writes {addr:#x}") };
            let done = segment.write_from(data);
            data = &data[done..];
            addr += bytes_u64(done);
        }
    }

    /// Fills guest memory with one byte.
    pub fn fill(&self, addr: u64, len_bytes: u32, byte: u8) {
        let block = [byte; 256];
        let mut done = 0;
        while done < index(len_bytes) {
            let take = (index(len_bytes) - done).min(block.len());
            self.write(addr + bytes_u64(done), &block[..take]);
            done += take;
        }
    }

    /// Reads a little-endian number.
    #[must_use]
    pub fn read_u16(&self, addr: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(addr, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Writes a little-endian number.
    pub fn write_u16(&self, addr: u64, value: u16) {
        self.write(addr, &value.to_le_bytes());
    }

    /// Reads a little-endian number.
    #[must_use]
    pub fn read_u32(&self, addr: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(addr, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}
