//! Where a namespace's data is: nowhere, or in memory, behind a write cache that loses its contents at a power cut.
//!
//! Flow: byte ranges and the pieces of the driver's memory in, copies done. Owner: shared by the threads of all models
//! that use it. **Invariant:** after a power cut a block holds what was last written to it and flushed (or written with
//! FUA), never something else.

use std::sync::{Arc, Mutex};

use ringmill_core::mem::{Mapping, MemTable, RegionSpec, Segment};
use ringmill_core::units::{GuestAddr, len_u32, usize_of};

use super::data::Piece;
use super::link::lock;

/// What the cache keeps account of: the smallest block.
const GRAIN_BYTES: u64 = 512;

/// A medium.
#[derive(Debug)]
pub enum Medium {
    /// Reads leave the driver's memory alone, writes go nowhere.
    Null,
    /// Memory.
    Ram(Mutex<Ram>),
}

/// Two copies of the data: as it reads now, and as it will read after a power cut.
#[derive(Debug)]
pub struct Ram {
    len_bytes: u64,
    live: MemTable,
    stable: MemTable,
    /// A bit per grain in which they differ.
    dirty: Vec<u64>,
    dirty_grains: Vec<u64>,
}

fn sparse(len_bytes: u64) -> Result<MemTable, Box<dyn std::error::Error>> {
    let mapping = Arc::new(Mapping::pool(usize_of(len_bytes))?);
    let mut table = MemTable::new();
    table.add(RegionSpec { guest_addr: GuestAddr(0), len_bytes, user_addr: 0 }, mapping)?;
    Ok(table)
}

impl Medium {
    /// Nowhere.
    #[must_use]
    pub fn null() -> Arc<Medium> {
        Arc::new(Medium::Null)
    }

    /// Zeroes, allocated as they are touched.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn ram(len_bytes: u64) -> Result<Arc<Medium>, Box<dyn std::error::Error>> {
        let len_bytes = len_bytes.next_multiple_of(4096);
        let words = usize_of((len_bytes / GRAIN_BYTES).div_ceil(64));
        Ok(Arc::new(Medium::Ram(Mutex::new(Ram {
            len_bytes,
            live: sparse(len_bytes)?,
            stable: sparse(len_bytes)?,
            dirty: vec![0; words],
            dirty_grains: Vec::new(),
        }))))
    }

    /// Forgets what was not flushed.
    pub fn power_cut(&self) {
        if let Medium::Ram(ram) = self {
            let ram = &mut *lock(ram);
            ram.settle(false);
        }
    }

    /// Bytes that a power cut would lose.
    #[must_use]
    pub fn volatile_bytes(&self) -> u64 {
        match self {
            Medium::Null => 0,
            Medium::Ram(ram) => lock(ram).dirty_grains.len() as u64 * GRAIN_BYTES,
        }
    }

    /// Copies out what a read would find; zeroes beyond the end and for null.
    pub fn peek(&self, offset_bytes: u64, out: &mut [u8]) {
        out.fill(0);
        if let Medium::Ram(ram) = self {
            let ram = lock(ram);
            let mut done = 0;
            while let Some(segment) =
                at(&ram.live, offset_bytes + done as u64, len_u32(out.len() - done))
            {
                done += segment.read_into(&mut out[done..]);
            }
        }
    }

    /// Puts bytes there, stably.
    pub fn poke(&self, offset_bytes: u64, data: &[u8]) {
        if let Medium::Ram(ram) = self {
            let ram = lock(ram);
            for table in [&ram.live, &ram.stable] {
                let mut done = 0;
                while let Some(segment) =
                    at(table, offset_bytes + done as u64, len_u32(data.len() - done))
                {
                    done += segment.write_from(&data[done..]);
                }
            }
        }
    }

    /// The medium's part of a read; false when it ends before.
    #[inline]
    pub(super) fn read(&self, offset_bytes: u64, pieces: &[Piece]) -> bool {
        match self {
            Medium::Null => true,
            Medium::Ram(ram) => lock(ram).read(offset_bytes, pieces),
        }
    }

    /// Of a write.
    #[inline]
    pub(super) fn write(&self, offset_bytes: u64, pieces: &[Piece], is_stable: bool) -> bool {
        match self {
            Medium::Null => true,
            Medium::Ram(ram) => lock(ram).write(offset_bytes, pieces, is_stable),
        }
    }

    /// Fills with zeroes.
    pub(super) fn zero(&self, offset_bytes: u64, len_bytes: u64, is_stable: bool) -> bool {
        match self {
            Medium::Null => true,
            Medium::Ram(ram) => lock(ram).zero(offset_bytes, len_bytes, is_stable),
        }
    }

    pub(super) fn flush(&self) {
        if let Medium::Ram(ram) = self {
            lock(ram).settle(true);
        }
    }
}

#[inline]
fn at(table: &MemTable, offset_bytes: u64, len_bytes: u32) -> Option<Segment> {
    table.translate(GuestAddr(offset_bytes), len_bytes, &mut 0)
}

impl Ram {
    fn has(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes)
    }

    fn read(&self, mut offset_bytes: u64, pieces: &[Piece]) -> bool {
        if !self.has(offset_bytes, pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum()) {
            return false;
        }
        for piece in pieces {
            if let Piece::Memory(segment) = piece
                && let Some(disk) = at(&self.live, offset_bytes, segment.len_bytes())
            {
                segment.copy_from(&disk);
            }
            offset_bytes += u64::from(piece.len_bytes());
        }
        true
    }

    fn write(&mut self, offset_bytes: u64, pieces: &[Piece], is_stable: bool) -> bool {
        let len_bytes = pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum();
        if !self.has(offset_bytes, len_bytes) {
            return false;
        }
        let mut to = offset_bytes;
        for piece in pieces {
            if let Piece::Memory(segment) = piece
                && let Some(disk) = at(&self.live, to, segment.len_bytes())
            {
                disk.copy_from(segment);
            }
            to += u64::from(piece.len_bytes());
        }
        self.changed(offset_bytes, len_bytes, is_stable);
        true
    }

    fn zero(&mut self, offset_bytes: u64, len_bytes: u64, is_stable: bool) -> bool {
        if !self.has(offset_bytes, len_bytes) {
            return false;
        }
        let mut done = 0;
        while let Some(disk) =
            at(&self.live, offset_bytes + done, len_u32(usize_of(len_bytes - done)))
        {
            disk.fill_zero();
            done += u64::from(disk.len_bytes());
        }
        self.changed(offset_bytes, len_bytes, is_stable);
        true
    }

    /// Accounts for a change of the live copy.
    fn changed(&mut self, offset_bytes: u64, len_bytes: u64, is_stable: bool) {
        let grains = offset_bytes / GRAIN_BYTES..(offset_bytes + len_bytes).div_ceil(GRAIN_BYTES);
        for grain in grains {
            let (word, bit) = (usize_of(grain / 64), 1u64 << (grain % 64));
            if is_stable {
                // A grain that stays in the list is copied once more; that changes nothing.
                self.settle_grain(grain, true);
            } else if self.dirty[word] & bit == 0 {
                self.dirty[word] |= bit;
                self.dirty_grains.push(grain);
            }
        }
    }

    fn settle_grain(&self, grain: u64, keep: bool) {
        let part = |table| at(table, grain * GRAIN_BYTES, len_u32(usize_of(GRAIN_BYTES)));
        if let (Some(live), Some(stable)) = (part(&self.live), part(&self.stable)) {
            if keep {
                stable.copy_from(&live)
            } else {
                live.copy_from(&stable)
            };
        }
    }

    /// Ends all differences, in favour of the live copy or of the stable one.
    fn settle(&mut self, keep: bool) {
        for grain in std::mem::take(&mut self.dirty_grains) {
            self.settle_grain(grain, keep);
            self.dirty[usize_of(grain / 64)] &= !(1 << (grain % 64));
        }
    }
}
