//! HOT PATH
//! One virtio-blk request out of one descriptor chain (virtio 1.2 §5.2.6).
//!
//! Flow: chain (already translated) → header by byte position → an operation with a checked range and its data
//! segments, or an answer that needs no device. Owner: the queue's reactor.
//! **Invariant:** header, data and status are found by byte position, never by descriptor count; the header is read
//! once; nothing that the guest wrote is used before it was checked.
//!
//! header(16) → type → range check against the disk now → data segments trimmed in place

use ringmill_core::io::{Batch, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::mem::Segment;
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::status::IoStatus;
use ringmill_core::units::{bytes_u64, index, len_u32};

use crate::virtq::{Chain, QueueError};

use super::BlkDevice;

/// What a chain asks for.
#[derive(Debug)]
pub enum Parsed {
    /// The device has to do it. The tag is still to be filled in.
    Io(IoRequest),
    /// The disk's serial, to be written to the data segments (a range of the batch's list).
    GetId {
        /// Index of the first data segment.
        segments_at: usize,
        /// How many there are.
        segments_count: usize,
    },
    /// Answered without the device.
    Answer(Refusal),
}

/// An answer that needs no device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it is counted as.
    pub op: IoOp,
    /// The status for the guest.
    pub status: IoStatus,
}

fn refuse(op: IoOp, status: IoStatus) -> Parsed {
    Parsed::Answer(Refusal { op, status })
}

/// Copies the first bytes of a list of segments; returns how many there were.
#[inline]
fn read_front(segments: &[Segment], out: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        done += segment.read_into(&mut out[done..]);
        if done == out.len() {
            break;
        }
    }
    done
}

/// Takes `count` bytes off the front of a list; returns the index of the first segment that is left.
#[inline]
fn trim_front(segments: &mut [Segment], mut count: u32) -> usize {
    let mut at = 0;
    while count > 0 && at < segments.len() {
        let len = segments[at].len_bytes();
        if len > count {
            segments[at] = segments[at].sub(count, u32::MAX);
            return at;
        }
        count -= len;
        at += 1;
    }
    at
}

/// Parses a chain whose segments lie in `batch` from `chain.segments_at` on.
///
/// # Errors
/// [`QueueError::NoStatus`] never comes from here (the chain has one); the type is that of the queue's other errors.
#[inline]
pub fn parse(
    chain: &Chain,
    batch: &mut Batch,
    device: &BlkDevice,
    size_bytes: u64,
) -> Result<Parsed, QueueError> {
    if chain.fault.is_some() {
        return Ok(refuse(IoOp::Read, IoStatus::Invalid));
    }
    let at = chain.segments_at;
    let segments = batch.segments_from(at);
    let mut header = [0u8; index(spec::HEADER_BYTES)];
    let (readable, writable) = segments.split_at_mut(chain.readable_count);
    if read_front(readable, &mut header) < header.len() {
        return Ok(refuse(IoOp::Read, IoStatus::Invalid));
    }
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let request_type = word(0);
    let sector = u64::from(word(8)) | (u64::from(word(12)) << 32);

    match request_type {
        spec::T_IN => {
            let len_bytes = chain.writable_bytes - 1;
            let segments_count = writable.len() - drop_status(writable);
            let request = data_request(
                IoOp::Read,
                sector,
                len_bytes,
                at + chain.readable_count,
                segments_count,
            );
            Ok(check_range(request, size_bytes))
        }
        spec::T_OUT => {
            if device.read_only() {
                return Ok(refuse(IoOp::Write, IoStatus::ReadOnly));
            }
            let len_bytes = chain.readable_bytes - u64::from(spec::HEADER_BYTES);
            let skipped = trim_front(readable, spec::HEADER_BYTES);
            let segments_count = readable.len() - skipped;
            let mut request =
                data_request(IoOp::Write, sector, len_bytes, at + skipped, segments_count);
            request.flags = device.write_flags();
            Ok(check_range(request, size_bytes))
        }
        _ => Ok(parse_other(chain, batch, device, size_bytes, request_type)),
    }
}

/// Shortens the last writable segment by the status byte; returns the number of segments that vanish.
#[inline]
fn drop_status(writable: &mut [Segment]) -> usize {
    match writable.last_mut() {
        Some(last) if last.len_bytes() > 1 => {
            *last = last.sub(0, last.len_bytes() - 1);
            0
        }
        Some(_) => 1,
        None => 0,
    }
}

#[inline]
fn data_request(
    op: IoOp,
    sector: u64,
    len_bytes: u64,
    segments_at: usize,
    segments_count: usize,
) -> IoRequest {
    IoRequest {
        // A sector beyond 2^55 saturates to an offset that no disk has, and the range check refuses it.
        offset_bytes: sector.saturating_mul(u64::from(SECTOR_BYTES)),
        len_bytes,
        tag: Tag::default(),
        segments_at: len_u32(segments_at),
        segments_count: len_u32(segments_count),
        op,
        flags: IoFlags::NONE,
    }
}

#[inline]
fn check_range(request: IoRequest, size_bytes: u64) -> Parsed {
    let IoRequest { offset_bytes, len_bytes, op, .. } = request;
    if len_bytes % u64::from(SECTOR_BYTES) != 0 {
        return refuse(op, IoStatus::Invalid);
    }
    match offset_bytes.checked_add(len_bytes) {
        Some(end) if end <= size_bytes => {}
        _ => return refuse(op, IoStatus::Range),
    }
    if len_bytes == 0 { refuse(op, IoStatus::Ok) } else { Parsed::Io(request) }
}

#[cold]
#[inline(never)]
fn parse_other(
    chain: &Chain,
    batch: &mut Batch,
    device: &BlkDevice,
    size_bytes: u64,
    request_type: u32,
) -> Parsed {
    match request_type {
        spec::T_FLUSH => {
            let mut request = data_request(IoOp::Flush, 0, 0, chain.segments_at, 0);
            request.flags = IoFlags::NONE;
            Parsed::Io(request)
        }
        spec::T_GET_ID => {
            let segments_at = chain.segments_at + chain.readable_count;
            let gone = drop_status(batch.segments_from(segments_at));
            Parsed::GetId {
                segments_at,
                segments_count: chain.segments_count - chain.readable_count - gone,
            }
        }
        spec::T_DISCARD => parse_range(chain, batch, device, size_bytes, IoOp::Discard),
        spec::T_WRITE_ZEROES => parse_range(chain, batch, device, size_bytes, IoOp::WriteZeroes),
        _ => refuse(IoOp::Read, IoStatus::Unsupported),
    }
}

/// DISCARD and WRITE_ZEROES carry one range of 16 bytes: sector, number of sectors, flags (`max_*_seg` is 1).
fn parse_range(
    chain: &Chain,
    batch: &mut Batch,
    device: &BlkDevice,
    size_bytes: u64,
    op: IoOp,
) -> Parsed {
    if device.read_only() {
        return refuse(op, IoStatus::ReadOnly);
    }
    if !device.supports(op) {
        return refuse(op, IoStatus::Unsupported);
    }
    let data_bytes = chain.readable_bytes - u64::from(spec::HEADER_BYTES);
    if data_bytes != bytes_u64(spec::RANGE_BYTES) {
        return refuse(op, IoStatus::Invalid);
    }
    let readable = &mut batch.segments_from(chain.segments_at)[..chain.readable_count];
    let skipped = trim_front(readable, spec::HEADER_BYTES);
    let mut range = [0u8; spec::RANGE_BYTES];
    if read_front(&readable[skipped..], &mut range) < range.len() {
        return refuse(op, IoStatus::Invalid);
    }
    let word =
        |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
    let sector = u64::from(word(0)) | (u64::from(word(4)) << 32);
    let (sectors_count, flags) = (word(8), word(12));
    // §5.2.6.2: reserved flags, and UNMAP on a discard, are unsupported.
    let allowed = if op == IoOp::WriteZeroes { spec::RANGE_F_UNMAP } else { 0 };
    if flags & !allowed != 0 {
        return refuse(op, IoStatus::Unsupported);
    }
    if sectors_count > device.range_sectors_max() {
        return refuse(op, IoStatus::Invalid);
    }
    let len_bytes = u64::from(sectors_count) * u64::from(SECTOR_BYTES);
    let mut request = data_request(op, sector, len_bytes, chain.segments_at, 0);
    if op == IoOp::WriteZeroes {
        request.flags = device.write_flags();
        if flags & spec::RANGE_F_UNMAP != 0 {
            request.flags = request.flags.with(IoFlags::MAY_UNMAP);
        }
    }
    check_range(request, size_bytes)
}
