//! A namespace as the controller holds it, and what identify says of it (NVM Command Set 1.0 §4.1.5.1).

use ringmill_core::spec::nvme::{IDENTIFY_BYTES, id_ns};
use ringmill_core::units::usize_of;

use super::options::ModelNamespace;

/// Puts bytes into a structure.
pub(super) fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = data.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Puts text padded with spaces.
pub(super) fn put_text(data: &mut [u8], at: usize, len_bytes: usize, text: &str) {
    if let Some(place) = data.get_mut(at..at + len_bytes) {
        place.fill(b' ');
        for (place, byte) in place.iter_mut().zip(text.bytes()) {
            *place = byte;
        }
    }
}

/// A namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) what: ModelNamespace,
    /// Detached ones are known, but not active.
    pub(super) is_attached: bool,
}

impl Namespace {
    pub(super) fn new(what: ModelNamespace) -> Namespace {
        Namespace { what, is_attached: true }
    }

    /// Bytes from block `lba` on; `None` outside.
    #[inline]
    pub(super) fn range(&self, lba: u64, blocks: u64) -> Option<(u64, u64)> {
        let end = lba.checked_add(blocks)?;
        (end <= self.what.blocks_count)
            .then(|| (lba << self.what.block_shift, blocks << self.what.block_shift))
    }

    /// True when a command crosses the optimal boundary.
    #[inline]
    pub(super) fn crosses(&self, lba: u64, blocks: u64) -> bool {
        let boundary = u64::from(self.what.noiob);
        boundary > 0 && blocks > 0 && lba / boundary != (lba + blocks - 1) / boundary
    }

    /// The data of identify with CNS 0.
    pub(super) fn identify(&self, write_zeroes: bool) -> [u8; IDENTIFY_BYTES] {
        let mut data = [0; IDENTIFY_BYTES];
        let what = &self.what;
        for at in [id_ns::NSZE, id_ns::NCAP, id_ns::NCAP + 8] {
            put(&mut data, at, &what.blocks_count.to_le_bytes());
        }
        // Two formats: the one in force, and the other block size, so that the index matters.
        data[id_ns::NLBAF_Z] = 1;
        data[id_ns::FLBAS] = 1;
        let other_shift = if what.block_shift == 9 { 12u32 } else { 9 };
        put(&mut data, id_ns::LBAF, &(other_shift << 16).to_le_bytes());
        let format = u32::from(what.block_shift) << 16 | u32::from(what.metadata_bytes);
        put(&mut data, id_ns::LBAF + 4, &format.to_le_bytes());
        data[id_ns::DPS] = what.protection;
        // Deallocated blocks read as zeroes.
        data[id_ns::DLFEAT] = 1 | u8::from(write_zeroes) << 3;
        put(&mut data, id_ns::NOIOB, &what.noiob.to_le_bytes());
        data[id_ns::NSATTR] = u8::from(what.read_only);
        put(&mut data, id_ns::NGUID, &what.nguid);
        put(&mut data, id_ns::EUI64, &what.eui64);
        data
    }

    /// The data of identify with CNS 3.
    pub(super) fn descriptors(&self) -> [u8; IDENTIFY_BYTES] {
        let mut data = [0; IDENTIFY_BYTES];
        let mut at = 0;
        let mut add = |kind: u8, id: &[u8]| {
            if id.iter().all(|byte| *byte == 0) {
                return;
            }
            let len_bytes = u8::try_from(id.len()).unwrap_or(0);
            put(&mut data, at, &[kind, len_bytes, 0, 0]);
            put(&mut data, at + 4, id);
            at += 4 + usize_of(u64::from(len_bytes));
        };
        add(1, &self.what.eui64);
        add(2, &self.what.nguid);
        add(3, &self.what.uuid);
        data
    }
}
