//! Data pointers, splits, and bytes that arrive where they belong.

use proptest::prelude::*;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::mem::{Segment, SharedSlice, total_bytes};
use ringmill_core::units::{bytes_u64, usize_of};

use super::super::parts::{DiscardLimits, WriteZeroesLimits};
use super::rig::{DISK_BYTES, MEMORY_BYTES, OFFSET, Options, Rig, shape};

/// Segments of random lengths at random places, as the doors above let them through.
fn segments(
    window: &SharedSlice,
    unit_bytes: u64,
    pieces: &[(u64, u64, u8)],
    most_bytes: u64,
) -> Vec<Segment> {
    let mut list = Vec::new();
    let (mut at, mut left) = (0, most_bytes);
    for (units, gap, kind) in pieces {
        // Next to the last one, at a page, or anywhere.
        at = match kind % 3 {
            0 => at,
            1 => (at + gap * 4).next_multiple_of(4096),
            _ => at + gap * 4,
        };
        let pages = 4096u64.div_ceil(unit_bytes).max(1);
        let units = if kind / 3 % 2 == 0 { units.next_multiple_of(pages) } else { *units };
        let len = (units * unit_bytes).min(left);
        if len == 0 || at + len > bytes_u64(MEMORY_BYTES) {
            break;
        }
        list.push(window.segment(usize_of(at), usize_of(len)).unwrap());
        at += len;
        left -= len;
    }
    list
}

/// The bytes of a list, one by one: address in memory.
fn addresses(pieces: impl Iterator<Item = (u64, u64)>) -> impl Iterator<Item = u64> {
    pieces.flat_map(|(at, len_bytes)| (at..at + len_bytes).step_by(4))
}

fn options() -> impl Strategy<Value = Options> {
    let boundary = prop_oneof![Just(0u32), Just(8), Just(256), Just(24), Just(1000)];
    let transfer = prop_oneof![Just(1u32), Just(2), Just(32), Just(300), Just(u32::MAX >> 12)];
    (9u32..=13, transfer, boundary, any::<bool>(), 2u16..40).prop_map(
        |(block_shift, pages, boundary_blocks, sgl, entries)| Options {
            block_shift,
            transfer_bytes_max: (pages << 12).max(1 << block_shift),
            boundary_bytes: boundary_blocks << block_shift,
            sgl,
            entries,
            ..Options::default()
        },
    )
}

/// What the doors above let through is expressible, and nothing is copied that would be.
#[test]
fn alignment_follows_from_how_data_is_named() {
    for (block_shift, sgl, segment_bytes) in [
        (9, false, 512),
        (12, false, 4096),
        // A page has 256 descriptors: with finer pieces some block could not be named by one command.
        (9, true, 4),
        (10, true, 4),
        (12, true, 16),
        (13, true, 32),
    ] {
        let options = Options { block_shift, sgl, ..Options::default() };
        let rules = shape(&options).alignment();
        assert_eq!((rules.block_bytes, rules.address_bytes), (1 << block_shift, 4));
        assert_eq!(rules.segment_bytes, segment_bytes, "2^{block_shift}, SGLs: {sgl}");
        // The worst that they allow: a block in pieces that touch nowhere.
        let mut rig = Rig::new(&options);
        let (block, piece) = (1u64 << block_shift, u64::from(segment_bytes));
        let places = (0..block / piece).map(|at| usize_of(4 + at * (piece + 4)));
        let list: Vec<_> =
            places.map(|at| rig.memory.segment(at, usize_of(piece)).unwrap()).collect();
        let write = (IoOp::Write, IoFlags::NONE);
        assert!(rig.offer(0, 1, write, (0, block), &list));
        rig.commit();
        rig.device.fetch();
        let entry = rig.device.fetched.pop_front().expect("one command");
        let walked = rig.device.domain.walk(&entry, block);
        let wanted = list.iter().map(|s| (OFFSET.iova(s.host()).0, u64::from(s.len_bytes())));
        assert!(addresses(walked.into_iter()).eq(addresses(wanted)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// The commands of a request cover it once, in order, each of them legal, and the memory that they name, walked as a
    /// device does, is the request's, byte for byte.
    #[test]
    fn commands_are_the_request(
        options in options(),
        pieces in prop::collection::vec((1u64..64, 0u64..3000, any::<u8>()), 1..400),
        first_block in 0u64..200,
    ) {
        let mut rig = Rig::new(&options);
        let rules = shape(&options).alignment();
        let block = 1u64 << options.block_shift;
        let mut list = segments(&rig.memory, u64::from(rules.segment_bytes), &pieces, 6 << 20);
        let total = total_bytes(&list) / block * block;
        let mut left = total;
        list.retain_mut(|segment| {
            *segment = segment.sub(0, u32::try_from(left).unwrap_or(u32::MAX));
            left -= u64::from(segment.len_bytes());
            segment.len_bytes() > 0
        });
        prop_assume!(total > 0);
        let offset = first_block * block;
        let write = (IoOp::Write, IoFlags::NONE);
        prop_assert!(rig.offer(0, 1, write, (offset, total), &list));
        let mut commands = Vec::new();
        let mut done = Vec::new();
        for _ in 0..100_000 {
            rig.commit();
            rig.device.fetch();
            while let Some(entry) = rig.device.fetched.pop_front() {
                commands.push(entry);
                rig.device.post(super::rig::cid(&entry), 0, rig.device.sq_head);
                // Lists live in their slot's page only until the command ends: walk them now.
                let blocks = u64::from(entry.0[12] & 0xffff) + 1;
                let walked = rig.device.domain.walk(&entry, blocks * block);
                done.extend(walked);
            }
            if !rig.poll(0).is_empty() {
                break;
            }
        }
        let mut at = offset;
        for entry in &commands {
            let len = (u64::from(entry.0[12] & 0xffff) + 1) * block;
            prop_assert_eq!(entry.u64_at(10) * block, at, "no gap and no overlap");
            prop_assert!(len <= u64::from(options.transfer_bytes_max));
            if options.boundary_bytes > 0 {
                let boundary = u64::from(options.boundary_bytes);
                prop_assert_eq!(at / boundary, (at + len - 1) / boundary, "crosses a boundary");
            }
            at += len;
        }
        prop_assert_eq!(at, offset + total);
        let wanted = list.iter().map(|s| (OFFSET.iova(s.host()).0, u64::from(s.len_bytes())));
        prop_assert!(addresses(done.into_iter()).eq(addresses(wanted)));
        prop_assert!(rig.pair().is_idle());
    }

    /// Ranges cover a discard exactly, within the device's bounds.
    #[test]
    fn ranges_are_the_discard(
        ranges_max in prop_oneof![Just(1u16), 1u16..=256],
        range_blocks_max in prop_oneof![1u32..50, Just(u32::MAX)],
        blocks_max in prop_oneof![1u64..2000, Just(u64::MAX)],
        blocks_zeroes in prop_oneof![1u32..100, Just(1 << 16)],
        first in 0u64..100,
        blocks in 1u64..9000,
        entries in 2u16..20,
    ) {
        let limits = DiscardLimits { ranges_max, range_blocks_max, blocks_max };
        let mut rig = Rig::new(&Options {
            discard: Some(limits),
            write_zeroes: Some(WriteZeroesLimits { blocks_max: blocks_zeroes, deallocate: false }),
            entries,
            ..Options::default()
        });
        for (tag, op) in [(1, IoOp::Discard), (2, IoOp::WriteZeroes)] {
            let range = (first * 512, blocks * 512);
            prop_assert!(rig.offer(0, tag, (op, IoFlags::NONE), range, &[]));
            let mut polls = 0;
            loop {
                rig.commit();
                rig.device.serve();
                let tags = rig.tags(0);
                if !tags.is_empty() {
                    prop_assert_eq!(tags, [tag]);
                    break;
                }
                polls += 1;
                prop_assert!(polls < 20_000);
            }
            let mut at = first;
            let log = std::mem::take(&mut rig.device.log);
            for (_, lba, count, word) in log {
                prop_assert_eq!(lba, at);
                at += count;
                if op == IoOp::Discard {
                    prop_assert!(count <= u64::from(range_blocks_max) && word < u32::from(ranges_max));
                } else {
                    prop_assert!(count <= u64::from(blocks_zeroes));
                }
            }
            prop_assert_eq!(at, first + blocks);
        }
    }
}

/// Writes and reads of all sizes and shapes in flight at a time, several channels, data compared with a twin.
#[test]
fn bytes_arrive_where_they_belong() {
    for (sgl, entries) in [(false, 8), (true, 8), (false, 64), (true, 64)] {
        let transfer_bytes_max = 64 << 10;
        let boundary_bytes = 96 << 10;
        let options = Options {
            sgl,
            entries,
            channels: 2,
            transfer_bytes_max,
            boundary_bytes,
            ..Options::default()
        };
        let mut rig = Rig::new(&options);
        let mut twin = rig.device.disk.clone();
        let mut chance = ringmill_core::reactor::Entropy::seeded(7);
        let unit = if sgl { 4 } else { 512 };
        for round in 0..600u32 {
            // Two requests that do not overlap: each channel has half of the disk and of the memory.
            let mut out = Vec::new();
            for channel in 0..2u32 {
                let half = u64::from(channel) * (DISK_BYTES / 2);
                let len = (1 + chance.below(512)) * 512;
                let offset = half + chance.below((DISK_BYTES / 2 - len) / 512) * 512;
                let mut list = Vec::new();
                let mut at = usize::try_from(channel).unwrap() * (MEMORY_BYTES / 2);
                let mut left = len;
                while left > 0 {
                    let cut =
                        (1 + chance.below(40)) * unit * if chance.below(4) == 0 { 64 } else { 1 };
                    let cut = usize_of(cut.min(left));
                    at += usize_of(chance.below(3) * 4);
                    list.push(rig.segment(at, cut));
                    at += cut;
                    left -= bytes_u64(cut);
                }
                let is_write = chance.below(2) == 0;
                if is_write {
                    for segment in &list {
                        let data: Vec<u8> = (0..segment.len_bytes())
                            .map(|_| chance.next_u64().to_le_bytes()[0])
                            .collect();
                        segment.write_from(&data);
                    }
                }
                let op = if is_write { IoOp::Write } else { IoOp::Read };
                let tag = round * 2 + channel;
                assert!(rig.offer(
                    channel as usize,
                    tag,
                    (op, IoFlags::NONE),
                    (offset, len),
                    &list
                ));
                out.push((tag, is_write, offset, len, list));
            }
            let mut ended = Vec::new();
            for _ in 0..10_000 {
                rig.commit();
                rig.device.fetch();
                while !rig.device.fetched.is_empty() {
                    let at = usize_of(chance.below(bytes_u64(rig.device.fetched.len())));
                    let entry = rig.device.fetched.remove(at).unwrap();
                    rig.device.answer(entry);
                }
                ended.extend(rig.tags(0));
                ended.extend(rig.tags(1));
                if ended.len() == 2 {
                    break;
                }
            }
            for (tag, is_write, offset, len, list) in out {
                assert!(ended.contains(&tag));
                let mut bytes = vec![0; usize_of(len)];
                let mut at = 0;
                for segment in &list {
                    at += segment.read_into(&mut bytes[at..]);
                }
                let place = usize_of(offset)..usize_of(offset + len);
                if is_write {
                    twin[place].copy_from_slice(&bytes);
                } else {
                    assert!(bytes == twin[place], "read {tag}");
                }
            }
        }
        assert!(rig.device.disk == twin);
        assert!(rig.pair().is_idle());
    }
}

#[test]
fn the_first_error_of_a_part_is_the_request_s() {
    let mut rig = Rig::new(&Options { transfer_bytes_max: 4096, ..Options::default() });
    let list = [rig.segment(0, 64 << 10)];
    assert!(rig.offer(0, 1, (IoOp::Read, IoFlags::NONE), (0, 64 << 10), &list));
    let (mut seen, mut ended) = (0, Vec::new());
    for _ in 0..50 {
        rig.commit();
        rig.device.fetch();
        while let Some(entry) = rig.device.fetched.pop_front() {
            seen += 1;
            let status = match seen {
                3 => 0x281,
                4 => 0x182,
                _ => 0,
            };
            rig.device.post(super::rig::cid(&entry), status, rig.device.sq_head);
        }
        ended.extend(rig.poll(0));
    }
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0].status, ringmill_core::IoStatus::Medium);
    assert!(rig.pair().is_idle());
}

#[test]
fn an_aligned_page_needs_no_list_and_a_long_piece_one_descriptor() {
    for sgl in [false, true] {
        let mut rig = Rig::new(&Options { sgl, ..Options::default() });
        let page = [rig.segment(8192, 4096)];
        let long = [rig.segment(4, 64 << 10)];
        let read = (IoOp::Read, IoFlags::NONE);
        assert!(rig.offer(0, 1, read, (0, 4096), &page));
        assert!(rig.offer(0, 2, read, (0, 64 << 10), &long));
        rig.commit();
        rig.device.fetch();
        let entry = rig.device.fetched[0];
        assert_eq!((entry.u64_at(6), entry.u64_at(8)), (OFFSET.iova(page[0].host()).0, 0));
        assert_eq!(entry.0[0] & 0xc0ff, 2);
        let entry = rig.device.fetched[1];
        assert_eq!(entry.0[0] & 0xc000 != 0, sgl);
        assert_eq!(entry.u64_at(6), OFFSET.iova(long[0].host()).0);
        if sgl {
            assert_eq!(entry.u64_at(8), 64 << 10);
        }
        rig.device.serve();
        assert_eq!(rig.tags(0), [1, 2]);
    }
}

#[test]
fn commands_made_for_one_shape_are_checked_against_what_it_became() {
    let was = Options { sgl: true, write_cache: false, ..Options::default() };
    let holds = |now: Options| shape(&was).still_holds(&shape(&now));
    assert!(holds(was) && holds(Options { transfer_bytes_max: 256 << 10, ..was }));
    assert!(holds(Options { boundary_bytes: 8192, ..was }), "a hint");
    assert!(!holds(Options { transfer_bytes_max: 64 << 10, ..was }));
    assert!(!holds(Options { sgl: false, ..was }));
    assert!(!holds(Options { write_cache: true, ..was }));
    assert!(!holds(Options { block_shift: 12, ..was }));
    assert!(
        !holds(Options { discard: None, ..was }) && !holds(Options { write_zeroes: None, ..was })
    );
    let fewer = was.discard.map(|limits| DiscardLimits { ranges_max: 1, ..limits });
    assert!(!holds(Options { discard: fewer, ..was }));
    let kept = was.write_zeroes.map(|limits| WriteZeroesLimits { deallocate: false, ..limits });
    assert!(!holds(Options { write_zeroes: kept, ..was }));
    let lesser = Options { discard: None, write_zeroes: None, write_cache: true, ..was };
    assert!(shape(&lesser).still_holds(&shape(&was)));
}
