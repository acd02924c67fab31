//! What the disk may contain: the guest's own book-keeping, sector by sector.
//!
//! Flow: the guest notes each write when it issues and when it sees the answer, each flush likewise; reads and the
//! state after a power cut are compared. Owner: the guest model. **Invariant:** the guest never has two requests in
//! flight of which one changes a sector of the other, so every sector's versions have an order.

use std::collections::BTreeSet;
use std::ops::Range;

use ringmill_core::units::{bytes_u64, usize_of};

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;

/// The content of a write: 0 is zeroes, every other number its own pattern.
pub(super) type Stamp = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not answered.
    Pending,
    /// Answered with an error (or only advice): the sector has it or has not.
    Maybe,
    /// Answered as done, and the guest knew it at this moment.
    Done { at: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Version {
    stamp: Stamp,
    state: State,
}

/// The twin of one disk.
#[derive(Debug)]
pub(super) struct Twin {
    /// From the oldest version that a power cut may bring back to the newest.
    sectors: Vec<Vec<Version>>,
    /// Sectors with more than one version.
    unsettled: BTreeSet<u64>,
    readers: Vec<u16>,
    writers: Vec<bool>,
}

/// The bytes of one sector under a stamp.
pub(super) fn pattern(stamp: Stamp, sector: u64, out: &mut [u8]) {
    if stamp == 0 {
        return out.fill(0);
    }
    let mut word = stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector.rotate_left(32);
    for part in out.chunks_exact_mut(8) {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        part.copy_from_slice(&word.to_le_bytes());
    }
}

fn matches(version: &Version, sector: u64, data: &[u8]) -> bool {
    let mut want = [0u8; SECTOR];
    pattern(version.stamp, sector, &mut want);
    want == *data
}

impl Twin {
    pub(super) fn new(sectors_count: u64) -> Twin {
        let zeroes = Version { stamp: 0, state: State::Done { at: 0 } };
        let count = usize_of(sectors_count);
        Twin {
            sectors: vec![vec![zeroes]; count],
            unsettled: BTreeSet::new(),
            readers: vec![0; count],
            writers: vec![false; count],
        }
    }

    /// True when a request on these sectors conflicts with none in flight.
    pub(super) fn is_free(&self, range: &Range<u64>, changes: bool) -> bool {
        range.clone().all(|s| {
            let at = usize_of(s);
            !self.writers[at] && (!changes || self.readers[at] == 0)
        })
    }

    pub(super) fn begin_read(&mut self, range: &Range<u64>) {
        for sector in range.clone() {
            self.readers[usize_of(sector)] += 1;
        }
    }

    /// Ends a read; `data` is what came, or `None` when the read failed.
    pub(super) fn end_read(
        &mut self,
        range: &Range<u64>,
        data: Option<&[u8]>,
        now: u64,
    ) -> Result<(), String> {
        for sector in range.clone() {
            self.readers[usize_of(sector)] -= 1;
        }
        match data {
            Some(data) => self.check_live(range.start, data, now),
            None => Ok(()),
        }
    }

    pub(super) fn begin_write(&mut self, range: &Range<u64>, stamp: Stamp) {
        for sector in range.clone() {
            self.writers[usize_of(sector)] = true;
            self.sectors[usize_of(sector)].push(Version { stamp, state: State::Pending });
            self.unsettled.insert(sector);
        }
    }

    /// Ends a write. `sure`: the whole range has the new content; otherwise each sector has it or has not.
    pub(super) fn end_write(&mut self, range: &Range<u64>, sure: bool, stable: bool, now: u64) {
        for sector in range.clone() {
            self.writers[usize_of(sector)] = false;
            let versions = &mut self.sectors[usize_of(sector)];
            let last = versions.len() - 1;
            versions[last].state = if sure { State::Done { at: now } } else { State::Maybe };
            if sure && stable {
                versions.drain(..last);
                self.unsettled.remove(&sector);
            }
        }
    }

    /// A flush that was issued at `issued_at` succeeded: what was known to be done before is stable.
    pub(super) fn flushed(&mut self, issued_at: u64) {
        let sectors = &mut self.sectors;
        self.unsettled.retain(|&sector| {
            let versions = &mut sectors[usize_of(sector)];
            let stable = versions
                .iter()
                .rposition(|v| matches!(v.state, State::Done { at } if at < issued_at));
            if let Some(at) = stable {
                versions.drain(..at);
            }
            versions.len() > 1
        });
    }

    /// Compares what a guest reads now. A sector that may have several contents is settled by what was read.
    pub(super) fn check_live(&mut self, first: u64, data: &[u8], now: u64) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(data.chunks_exact(SECTOR)) {
            let versions = &mut self.sectors[usize_of(sector)];
            let done = versions.iter().rposition(|v| matches!(v.state, State::Done { .. }));
            let from = done.unwrap_or(0);
            let found =
                (from..versions.len()).rev().find(|&i| matches(&versions[i], sector, bytes));
            let Some(found) = found else {
                return Err(format!(
                    "sector {sector} reads {:02x?}…, expected one of {:?}",
                    &bytes[..16],
                    &versions[from..]
                ));
            };
            if versions[found].state != State::Pending {
                let pending = versions.iter().position(|v| v.state == State::Pending);
                let end = pending.unwrap_or(versions.len());
                versions.drain(found + 1..end);
            }
            if versions[found].state == State::Maybe {
                versions[found].state = State::Done { at: now };
            }
        }
        Ok(())
    }

    /// Compares what is on the medium after a power cut.
    pub(super) fn check_after_power_cut(&self, content: &[u8]) -> Result<(), String> {
        for (sector, bytes) in content.chunks_exact(SECTOR).enumerate() {
            let (versions, number) = (&self.sectors[sector], bytes_u64(sector));
            if !versions.iter().any(|v| matches(v, number, bytes)) {
                return Err(format!(
                    "after the power cut sector {sector} has {:02x?}…, expected one of {versions:?}",
                    &bytes[..16]
                ));
            }
        }
        Ok(())
    }
}
