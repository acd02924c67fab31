//! What a server says of a region: its length, and which parts of it can be mapped.
//!
//! Flow: the answers to GET_REGION_INFO, checked, → [`Region`] → mapped areas for `registers`. Owner: control threads.
//! **Invariant:** every area lies inside the region and begins and ends on a page; a chain of capabilities only goes
//! forward, so reading it ends.
//!
//! Spec: vfio-user 0.9, `VFIO_USER_DEVICE_GET_REGION_INFO`.

use std::os::fd::OwnedFd;

use ringmill_core::limits::{VFIO_USER_AREAS_MAX, VFIO_USER_PAYLOAD_BYTES_MAX};

use super::connection::{CallError, Connection};
use super::protocol::{Fields, ProtocolError, command, region, words};

/// Room for capabilities in the first question; more is asked for when a server needs it.
const INFO_ROOM_BYTES: u32 = 4096;

/// A part of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    /// From the start of the region.
    pub(super) start: u64,
    /// One past its last byte.
    pub(super) end: u64,
}

/// One region.
#[derive(Debug)]
pub(super) struct Region {
    /// Its length; 0 when the device has no such region.
    pub(super) len_bytes: u64,
    /// What can be mapped, and the file's descriptor and offset of the region's start in it.
    pub(super) areas: Vec<Area>,
    /// Where it lies in the file.
    pub(super) file_offset: u64,
    /// The file; `None` when nothing can be mapped.
    pub(super) file: Option<OwnedFd>,
}

/// Why there is no region.
pub(super) enum RegionError {
    Call(CallError),
    Protocol(ProtocolError),
}

impl From<ProtocolError> for RegionError {
    fn from(error: ProtocolError) -> Self {
        RegionError::Protocol(error)
    }
}

/// Asks for one region.
pub(super) fn ask(connection: &Connection, index: u32) -> Result<Region, RegionError> {
    let mut room = INFO_ROOM_BYTES;
    loop {
        let question = words(&[room, 0, index, 0, 0, 0, 0, 0]);
        let answer = connection
            .call(command::DEVICE_GET_REGION_INFO, &question, &[])
            .map_err(RegionError::Call)?;
        match parse(&answer.payload, index, room)? {
            Ok((len_bytes, file_offset, areas)) => {
                let file = answer.fds.into_iter().next();
                return Ok(Region { len_bytes, areas, file_offset, file });
            }
            Err(more) => room = more,
        }
    }
}

type Parsed = Result<(u64, u64, Vec<Area>), u32>;

/// Length, file offset and areas; or how much room the server needs to tell.
fn parse(payload: &[u8], index: u32, room: u32) -> Result<Parsed, ProtocolError> {
    let command = command::DEVICE_GET_REGION_INFO;
    let fields = Fields::new(command, payload);
    let wrong = |field, value| ProtocolError::Field { command, field, value };
    let (needed, bits, got) = (fields.u32(0)?, fields.u32(4)?, fields.u32(8)?);
    let (cap_offset, len_bytes, file_offset) = (fields.u32(12)?, fields.u64(16)?, fields.u64(24)?);
    if got != index {
        return Err(wrong("region", got.into()));
    }
    if bits & region::MMAP == 0 {
        return Ok(Ok((len_bytes, file_offset, Vec::new())));
    }
    let has_caps = bits & region::CAPS != 0;
    if has_caps && needed > room {
        // More than any message can have, or the same again: no.
        if needed as usize > VFIO_USER_PAYLOAD_BYTES_MAX || room > INFO_ROOM_BYTES {
            return Err(wrong("argsz", needed.into()));
        }
        return Ok(Err(needed));
    }
    let sparse = if has_caps { sparse_areas(fields, cap_offset, len_bytes)? } else { None };
    let whole = || vec![Area { start: 0, end: len_bytes & !4095 }];
    Ok(Ok((len_bytes, file_offset, sparse.unwrap_or_else(whole))))
}

/// Walks the capabilities; `None` when none of them says that only parts can be mapped.
fn sparse_areas(
    fields: Fields<'_>,
    cap_offset: u32,
    len_bytes: u64,
) -> Result<Option<Vec<Area>>, ProtocolError> {
    let command = command::DEVICE_GET_REGION_INFO;
    let wrong = |field, value| ProtocolError::Field { command, field, value };
    let mut at = cap_offset as usize;
    let mut after = region::INFO_BYTES;
    while at != 0 {
        if at < after {
            return Err(wrong("capability's offset", at as u64));
        }
        let (id, next) = (fields.u16(at)?, fields.u32(at + 4)?);
        if id == region::CAP_SPARSE_MMAP {
            let count = fields.u32(at + 8)?;
            if count as usize > VFIO_USER_AREAS_MAX {
                return Err(wrong("count of areas", count.into()));
            }
            let mut areas = Vec::new();
            for k in 0..count as usize {
                let start = fields.u64(at + 16 + 16 * k)?;
                let size = fields.u64(at + 24 + 16 * k)?;
                let end = start.checked_add(size).filter(|end| *end <= len_bytes);
                let end = end.ok_or_else(|| wrong("area's end", start))?;
                if (start | end) & 4095 != 0 {
                    return Err(wrong("area's border", start));
                }
                areas.push(Area { start, end });
            }
            return Ok(Some(areas));
        }
        after = at + 8;
        at = next as usize;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BITS: u32 = region::READ | region::WRITE | region::MMAP | region::CAPS;

    fn info(bits: u32, cap_offset: u32, len_bytes: u64, caps: &[u32]) -> Vec<u8> {
        let argsz = u32::try_from(region::INFO_BYTES + 4 * caps.len()).unwrap();
        let mut payload = words(&[argsz, bits, 0, cap_offset]);
        payload.extend(len_bytes.to_le_bytes());
        payload.extend(7u64.to_le_bytes());
        payload.extend(words(caps));
        payload
    }

    fn areas(payload: &[u8]) -> Result<Vec<Area>, ProtocolError> {
        Ok(parse(payload, 0, INFO_ROOM_BYTES)?.expect("enough room").2)
    }

    fn sparse(next: u32, ranges: &[(u32, u32)]) -> Vec<u32> {
        let mut caps = vec![1 << 16 | 1, next, u32::try_from(ranges.len()).unwrap(), 0];
        for (start, size) in ranges {
            caps.extend([*start, 0, *size, 0]);
        }
        caps
    }

    #[test]
    fn areas_are_read_behind_other_capabilities() {
        let mut caps = vec![1 << 16 | 2, 48, 3, 1];
        caps.extend(sparse(0, &[(0x1000, 0x1000), (0x3000, 0x1000)]));
        let want = [Area { start: 0x1000, end: 0x2000 }, Area { start: 0x3000, end: 0x4000 }];
        assert_eq!(areas(&info(BITS, 32, 0x4000, &caps)).unwrap(), want);
    }

    #[test]
    fn without_the_capability_all_of_a_mappable_region_is_one_area() {
        let whole = [Area { start: 0, end: 0x4000 }];
        assert_eq!(areas(&info(BITS & !region::CAPS, 0, 0x4abc, &[])).unwrap(), whole);
        assert_eq!(areas(&info(BITS, 0, 0x4000, &[])).unwrap(), whole);
        assert_eq!(areas(&info(BITS & !region::MMAP, 32, 0x4000, &[])).unwrap(), []);
        // Said to be sparse, with nothing in it.
        assert_eq!(areas(&info(BITS, 32, 0x4000, &sparse(0, &[]))).unwrap(), []);
    }

    #[test]
    fn chains_that_go_back_and_areas_outside_are_refused() {
        let refused = |payload: &[u8]| areas(payload).is_err();
        for at in [1, 16, 28, 31, 33, 4096, u32::MAX] {
            assert!(refused(&info(BITS, at, 0x4000, &[1 << 16 | 2, 32])), "{at}");
        }
        for next in [32, 39, 16, 40] {
            assert!(refused(&info(BITS, 32, 0x4000, &[1 << 16 | 2, next])), "next {next}");
        }
        for range in [(0x1000, 0x4000), (0x4000, 0x1000), (0x1800, 0x800), (0x1000, 0x801)] {
            assert!(refused(&info(BITS, 32, 0x4000, &sparse(0, &[range]))), "{range:?}");
        }
        let mut many = sparse(0, &[(0, 0x1000)]);
        for count in [2, 17, u32::MAX] {
            many[2] = count;
            assert!(refused(&info(BITS, 32, 0x4000, &many)), "{count}");
        }
        let mut wraps = sparse(0, &[(0x1000, 0xffff_f000)]);
        wraps[5] = u32::MAX;
        wraps[7] = u32::MAX;
        assert!(refused(&info(BITS, 32, u64::MAX, &wraps)));
        assert!(parse(&info(BITS, 0, 0x4000, &[]), 1, INFO_ROOM_BYTES).is_err(), "another region");
    }

    #[test]
    fn more_room_is_given_once_and_not_without_end() {
        let mut payload = info(BITS, 32, 0x4000, &[]);
        payload[..4].copy_from_slice(&8192u32.to_le_bytes());
        assert_eq!(parse(&payload, 0, INFO_ROOM_BYTES), Ok(Err(8192)));
        assert!(parse(&payload, 0, 8191).is_err());
        payload[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(parse(&payload, 0, INFO_ROOM_BYTES).is_err());
    }

    proptest! {
        #[test]
        fn garbage_is_a_region_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 32..160), cap in 0u8..160, ids in any::<bool>()
        ) {
            bytes[4] |= 12;
            bytes[8..16].fill(0);
            bytes[12] = cap;
            if ids && let Some(at) = bytes.get_mut(usize::from(cap)..usize::from(cap) + 2) {
                at.copy_from_slice(&[1, 0]);
            }
            if let Ok(Ok((len_bytes, _, areas))) = parse(&bytes, 0, u32::MAX) {
                prop_assert!(areas.len() <= VFIO_USER_AREAS_MAX);
                prop_assert!(areas.iter().all(|area| area.start <= area.end && area.end <= len_bytes));
            }
        }
    }
}
