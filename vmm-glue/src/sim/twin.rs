//! What the disk may contain: the guest's own book-keeping, sector by sector.
//!
//! Flow: the guest notes each write when it issues and when it sees the answer, each flush likewise; reads and the
//! state after a power cut are compared. Owner: the guest model. **Invariant:** reads never race with changes; writes
//! that race with each other are a group, of which any member may win in each sector; groups have an order.

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
    /// Versions that were in flight at the same time have the same number.
    group: u64,
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
    /// Writes in flight that may race; [`ALONE`] for another change.
    writers: Vec<u8>,
    next_group: u64,
}

const ALONE: u8 = u8::MAX;
/// Writes of one sector that may be in flight at a time.
const RACERS_MAX: u8 = 2;

/// How a request gets along with others on the same sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// With other reads.
    Reads,
    /// With nothing.
    Alone,
    /// With other writes.
    Races,
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

/// The index of the first member of the group of the version at `at`.
fn group_start(versions: &[Version], at: usize) -> usize {
    versions.iter().position(|v| v.group == versions[at].group).unwrap_or(at)
}

/// The version at `at` or another of its group is stable: older groups cannot come back.
fn forget_before(versions: &mut Vec<Version>, at: usize) {
    versions.drain(..group_start(versions, at));
}

impl Twin {
    pub(super) fn new(sectors_count: u64) -> Twin {
        let zeroes = Version { stamp: 0, group: 0, state: State::Done { at: 0 } };
        let count = usize_of(sectors_count);
        Twin {
            sectors: vec![vec![zeroes]; count],
            unsettled: BTreeSet::new(),
            readers: vec![0; count],
            writers: vec![0; count],
            next_group: 1,
        }
    }

    /// True when a request on these sectors gets along with all in flight.
    pub(super) fn is_free(&self, range: &Range<u64>, claim: Claim) -> bool {
        range.clone().all(|s| {
            let (readers, writers) = (self.readers[usize_of(s)], self.writers[usize_of(s)]);
            match claim {
                Claim::Reads => writers == 0,
                Claim::Alone => writers == 0 && readers == 0,
                Claim::Races => writers < RACERS_MAX && readers == 0,
            }
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
            let (writers, versions) =
                (&mut self.writers[usize_of(sector)], &mut self.sectors[usize_of(sector)]);
            let racing = *writers > 0 && *writers != ALONE;
            *writers = if stamp == 0 { ALONE } else { *writers + 1 };
            let joined = versions.last().filter(|_| racing).map(|v| v.group);
            let group = joined.unwrap_or(self.next_group);
            versions.push(Version { stamp, group, state: State::Pending });
            self.unsettled.insert(sector);
        }
        self.next_group += 1;
    }

    /// Ends a write. `sure`: the whole range has the new content; otherwise each sector has it or has not.
    pub(super) fn end_write(
        &mut self,
        range: &Range<u64>,
        stamp: Stamp,
        sure: bool,
        stable: bool,
        now: u64,
    ) {
        for sector in range.clone() {
            let writers = &mut self.writers[usize_of(sector)];
            *writers = if *writers == ALONE { 0 } else { *writers - 1 };
            let versions = &mut self.sectors[usize_of(sector)];
            let pending = |v: &Version| v.stamp == stamp && v.state == State::Pending;
            let Some(at) = versions.iter().rposition(pending) else { continue };
            versions[at].state = if sure { State::Done { at: now } } else { State::Maybe };
            if sure && stable {
                forget_before(versions, at);
            }
        }
    }

    /// A flush that was issued at `issued_at` succeeded: what was known to be done before is stable.
    pub(super) fn flushed(&mut self, issued_at: u64) {
        let sectors = &mut self.sectors;
        self.unsettled.retain(|&sector| {
            let versions = &mut sectors[usize_of(sector)];
            let is_stable = |v: &Version| matches!(v.state, State::Done { at } if at < issued_at);
            if let Some(at) = versions.iter().rposition(is_stable) {
                forget_before(versions, at);
            }
            versions.len() > 1
        });
    }

    /// Compares what a guest reads now. A sector that may have several contents is settled by what was read.
    pub(super) fn check_live(&mut self, first: u64, data: &[u8], now: u64) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(data.chunks_exact(SECTOR)) {
            let versions = &mut self.sectors[usize_of(sector)];
            let done = versions.iter().rposition(|v| matches!(v.state, State::Done { .. }));
            let from = done.map_or(0, |at| group_start(versions, at));
            let found =
                (from..versions.len()).rev().find(|&i| matches(&versions[i], sector, bytes));
            let Some(found) = found else {
                return Err(format!(
                    "sector {sector} reads {:02x?}…, expected one of {:?}",
                    &bytes[..16],
                    &versions[from..]
                ));
            };
            if found + 1 == versions.len() && found == from && done == Some(found) {
                continue;
            }
            // Later groups have left no trace. Losers of the race may still come back in a power cut.
            let mut winner = versions[found];
            versions.retain(|v| v.group <= winner.group);
            versions.remove(found);
            winner.group = self.next_group;
            winner.state = State::Done { at: now };
            versions.push(winner);
            self.next_group += 1;
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
