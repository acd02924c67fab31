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

/// The header, read once; a driver may spread it over several buffers.
#[inline]
fn read_header(readable: &[Segment]) -> Option<[u8; index(spec::HEADER_BYTES)]> {
    let whole = readable.first().and_then(Segment::front_16);
    if whole.is_some() { whole } else { read_header_pieces(readable) }
}

#[cold]
#[inline(never)]
fn read_header_pieces(readable: &[Segment]) -> Option<[u8; index(spec::HEADER_BYTES)]> {
    let mut header = [0; index(spec::HEADER_BYTES)];
    (read_front(readable, &mut header) == header.len()).then_some(header)
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
#[inline(always)]
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
    let segments = batch.segments_mut(at, chain.segments_count);
    let (readable, writable) = segments.split_at_mut(chain.readable_count);
    let Some(header) = read_header(readable) else {
        return Ok(refuse(IoOp::Read, IoStatus::Invalid));
    };
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
            let count = chain.segments_count - chain.readable_count;
            let gone = drop_status(batch.segments_mut(segments_at, count));
            Parsed::GetId { segments_at, segments_count: count - gone }
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
    let readable = batch.segments_mut(chain.segments_at, chain.readable_count);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed, Geometry};
    use ringmill_core::mem::total_bytes;
    use ringmill_core::reactor::ReactorHandle;

    use super::*;
    use crate::sim::{Buffer, Dice, GuestMemory};

    const SIZE_BYTES: u64 = 1 << 20;
    const AT: u64 = 0x1000;

    struct Disk(Arc<BdevInfo>);

    impl Bdev for Disk {
        fn info(&self) -> &Arc<BdevInfo> {
            &self.0
        }

        fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
            Err(BdevError::Refused { name: String::new(), reason: String::new() })
        }
    }

    fn disk(discard: bool, read_only: bool) -> BlkDevice {
        let geometry = Geometry {
            block_bytes: 512,
            physical_block_bytes: 512,
            optimal_io_bytes: 0,
            blocks_count: SIZE_BYTES / 512,
            read_only: false,
            write_cache: true,
            discard,
            discard_granularity_bytes: 0,
            write_zeroes: discard,
        };
        let info = BdevInfo::new("t", None, "test", geometry).unwrap();
        let bdev: Arc<dyn Bdev> = Arc::new(Disk(Arc::new(info)));
        BlkDevice::new(&bdev, "t", read_only)
    }

    /// A chain of these buffers, as a ring would deliver it.
    fn chain(memory: &GuestMemory, batch: &mut Batch, buffers: &[Buffer]) -> Chain {
        let segments_at = batch.segments_mark();
        let mut readable_count = 0;
        for buffer in buffers {
            for at in 0..buffer.len_bytes {
                // Regions in this test are tiny, so that a buffer falls apart: byte by byte is one extreme.
                let byte = memory.byte(buffer.addr + u64::from(at)).unwrap();
                assert!(batch.push_segment(byte));
                readable_count += usize::from(!buffer.writable);
            }
        }
        finish(batch, segments_at, readable_count)
    }

    fn finish(batch: &mut Batch, segments_at: usize, readable_count: usize) -> Chain {
        let count = batch.segments_mark() - segments_at;
        let segments = batch.segments_mut(segments_at, count);
        let (readable, writable) = segments.split_at(readable_count);
        let last = writable.last().unwrap();
        Chain {
            head: 0,
            segments_at,
            readable_count,
            segments_count: segments.len(),
            readable_bytes: total_bytes(readable),
            writable_bytes: total_bytes(writable),
            status: last.sub(last.len_bytes() - 1, 1),
            fault: None,
        }
    }

    fn io(parsed: Parsed) -> IoRequest {
        match parsed {
            Parsed::Io(request) => request,
            other => panic!("{other:?}"),
        }
    }

    /// Header, data and status are found however the bytes are cut into segments.
    #[test]
    fn requests_are_found_by_byte_position() {
        let memory = GuestMemory::new(&[(AT, 64 << 10)]);
        let whole = memory.table();
        let device = disk(true, false);
        for seed in 0..500 {
            let mut dice = Dice::new(seed, 1);
            let mut batch = Batch::new();
            // Something of an earlier request lies before ours.
            for _ in 0..dice.index(3) {
                batch.push_segment(memory.byte(AT).unwrap());
            }
            let (write, sectors) = (dice.chance(500), dice.between(1, 9));
            let data = len_u32(512 * sectors);
            let (readable, writable) =
                if write { (16 + data, 1 + u32::from(dice.chance(100))) } else { (16, data + 1) };
            let segments_at = batch.segments_mark();
            let mut readable_count = 0;
            let mut hosts = Vec::new();
            for (start, total, reads) in [(AT, readable, true), (AT + 0x8000, writable, false)] {
                let mut at = 0;
                while at < total {
                    let most = usize::try_from(total - at).unwrap();
                    let most = if dice.chance(500) { most } else { most.min(20) };
                    let len = len_u32(dice.between(1, most));
                    let addr = ringmill_core::units::GuestAddr(start + u64::from(at));
                    let segment = whole.translate(addr, len, &mut 0).unwrap();
                    hosts.extend((0..index(len)).map(|i| segment.host().0 + i));
                    batch.push_segment(segment);
                    readable_count += usize::from(reads);
                    at += len;
                }
            }
            let kind = if write { spec::T_OUT } else { spec::T_IN };
            memory.write(AT, &kind.to_le_bytes());
            memory.write(AT + 8, &7u64.to_le_bytes());
            let chain = finish(&mut batch, segments_at, readable_count);
            let request = io(parse(&chain, &mut batch, &device, SIZE_BYTES).unwrap());
            assert_eq!((request.offset_bytes, request.len_bytes), (7 * 512, u64::from(data)));
            let (at, count) = (index(request.segments_at), index(request.segments_count));
            let found: Vec<usize> = batch
                .segments_mut(at, count)
                .iter()
                .flat_map(|s| (0..index(s.len_bytes())).map(|i| s.host().0 + i))
                .collect();
            let wanted = &hosts[16..16 + index(data)];
            if write || writable == data + 1 {
                assert_eq!(found, wanted, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_header_of_single_bytes_works() {
        let memory = GuestMemory::new(&[(AT, 8192)]);
        let mut batch = Batch::new();
        memory.write(AT, &spec::T_IN.to_le_bytes());
        memory.write(AT + 8, &1u64.to_le_bytes());
        let header = Buffer { addr: AT, len_bytes: 16, writable: false };
        let data = Buffer { addr: AT + 4096, len_bytes: 513, writable: true };
        let chain = chain(&memory, &mut batch, &[header, data]);
        let request = io(parse(&chain, &mut batch, &disk(true, false), SIZE_BYTES).unwrap());
        assert_eq!((request.offset_bytes, request.len_bytes), (512, 512));
        assert_eq!((request.segments_at, request.segments_count), (16, 512));
    }

    #[test]
    fn the_size_now_bounds_a_request() {
        let memory = GuestMemory::new(&[(AT, 8192)]);
        let header = Buffer { addr: AT, len_bytes: 16, writable: false };
        let data = Buffer { addr: AT + 4096, len_bytes: 1025, writable: true };
        memory.write(AT + 8, &2046u64.to_le_bytes());
        for (size_bytes, status) in [(SIZE_BYTES, None), (SIZE_BYTES - 512, Some(IoStatus::Range))]
        {
            let mut batch = Batch::new();
            let chain = chain(&memory, &mut batch, &[header, data]);
            match (parse(&chain, &mut batch, &disk(true, false), size_bytes).unwrap(), status) {
                (Parsed::Io(_), None) => {}
                (Parsed::Answer(refusal), Some(status)) => assert_eq!(refusal.status, status),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_the_disk_does_not_offer_is_unsupported_and_read_only_comes_first() {
        let memory = GuestMemory::new(&[(AT, 8192)]);
        let header = Buffer { addr: AT, len_bytes: 16, writable: false };
        let range = Buffer { addr: AT + 16, len_bytes: 16, writable: false };
        let status = Buffer { addr: AT + 4096, len_bytes: 1, writable: true };
        memory.write(AT + 24, &8u32.to_le_bytes());
        for kind in [spec::T_DISCARD, spec::T_WRITE_ZEROES] {
            memory.write(AT, &kind.to_le_bytes());
            for (device, expected) in [
                (disk(true, false), None),
                (disk(false, false), Some(IoStatus::Unsupported)),
                (disk(true, true), Some(IoStatus::ReadOnly)),
                (disk(false, true), Some(IoStatus::ReadOnly)),
            ] {
                let mut batch = Batch::new();
                let chain = chain(&memory, &mut batch, &[header, range, status]);
                match (parse(&chain, &mut batch, &device, SIZE_BYTES).unwrap(), expected) {
                    (Parsed::Io(request), None) => assert_eq!(request.len_bytes, 4096),
                    (Parsed::Answer(refusal), Some(status)) => assert_eq!(refusal.status, status),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
