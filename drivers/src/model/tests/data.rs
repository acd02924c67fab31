//! Data pointers and I/O commands: every rule of PRPs and SGLs, and what is refused.

use ringmill_core::spec::nvme::{NSID_ALL, PSDT_SGL, Sqe, nvm, sgl, status};
use ringmill_core::units::len_u32;

use super::super::*;
use super::rig::{DATA, LISTS, MEMORY, Pair, Rig, io};

const PAGE: usize = 4096;

fn rig() -> (Rig, Pair) {
    rig_with(ModelOptions { sgls: Sgls::Bytes, bit_bucket: true, ..ModelOptions::default() })
}

fn rig_with(options: ModelOptions) -> (Rig, Pair) {
    let mut rig = Rig::new(options);
    rig.enable();
    let pair = rig.pair(1, 16);
    (rig, pair)
}

fn pattern(len_bytes: usize, seed: usize) -> Vec<u8> {
    (0..len_bytes).map(|at| (at / 3 + at * 5 + seed).to_le_bytes()[0]).collect()
}

fn kind(rig: &mut Rig, pair: &mut Pair, sqe: Sqe) -> u16 {
    rig.run(pair, sqe).status().kind()
}

#[test]
fn lists_go_on_in_further_pages() {
    let (mut rig, mut pair) = rig();
    // 40 pages of data, in reverse order in memory; lists of 3 places (2 entries) twice, then the rest.
    let pages = 40;
    let data = pattern(pages * PAGE, 1);
    rig.medium.poke(0, &data);
    let page = |rig: &Rig, n: usize| rig.iova(DATA + (pages - 1 - n) * PAGE);
    let entries: Vec<u64> = (1..pages).map(|n| page(&rig, n)).collect();
    let (first, second, third) = (LISTS + PAGE - 24, LISTS + PAGE, LISTS + 2 * PAGE);
    rig.list(first - LISTS, &[entries[0], entries[1], rig.iova(second)]);
    // A whole page of a list: 39 − 2 entries fit, so nothing is chained there.
    rig.list(second - LISTS, &entries[2..]);
    let mut sqe = io(nvm::READ, 1, 0, len_u32(pages) * 8);
    sqe.set_prps(page(&rig, 0), rig.iova(first));
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    let get = |rig: &Rig, n: usize| rig.bytes((pages - 1 - n) * PAGE, PAGE);
    for n in 0..pages {
        assert_eq!(get(&rig, n), data[n * PAGE..][..PAGE], "page {n}");
    }
    // Exactly as many entries as places: the last one is data.
    rig.list(first - LISTS, &[entries[0], entries[1], entries[2]]);
    let mut sqe = io(nvm::READ, 1, 8, 4 * 8);
    sqe.set_prps(page(&rig, 0), rig.iova(first));
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    assert_eq!(get(&rig, 3), data[4 * PAGE..][..PAGE]);
    rig.expect_peace();
    // The pointer to the next list has an offset.
    rig.list(first - LISTS, &[entries[0], entries[1], rig.iova(third) + 8]);
    let mut sqe = io(nvm::READ, 1, 0, len_u32(pages) * 8);
    sqe.set_prps(page(&rig, 0), rig.iova(first));
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_PRP_OFFSET);
    rig.expect_errors(1);
}

#[test]
fn prps_have_offsets_only_where_they_may() {
    let (mut rig, mut pair) = rig();
    let at = |rig: &Rig, offset: usize| rig.iova(DATA + offset);
    let try_prps = |rig: &mut Rig, pair: &mut Pair, blocks: u32, first: u64, second: u64| {
        let mut sqe = io(nvm::READ, 1, 0, blocks);
        sqe.set_prps(first, second);
        kind(rig, pair, sqe)
    };
    let (base, next) = (at(&rig, 0), at(&rig, PAGE));
    assert_eq!(try_prps(&mut rig, &mut pair, 8, base + 4, next), 0);
    assert_eq!(try_prps(&mut rig, &mut pair, 8, base + 2048, next), 0);
    assert_eq!(try_prps(&mut rig, &mut pair, 4, base + 2048, 0), 0);
    rig.expect_peace();
    let bad = status::INVALID_PRP_OFFSET;
    assert_eq!(try_prps(&mut rig, &mut pair, 1, base + 2, 0), bad);
    assert_eq!(try_prps(&mut rig, &mut pair, 9, base, next + 512), bad);
    let list = rig.iova(LISTS);
    assert_eq!(try_prps(&mut rig, &mut pair, 17, base, list + 4), bad);
    rig.list(0, &[next, next + 4]);
    assert_eq!(try_prps(&mut rig, &mut pair, 17, base, list), bad);
    rig.expect_errors(4);
    assert_eq!(rig.control.count(Count::DmaFaults), 0);
    // Outside of what is mapped: data, second page, list, an entry of a list, the wrap of 64 bits.
    let end = rig.iova(MEMORY);
    rig.list(0, &[next, end]);
    let faults = [
        (1, end, 0),
        (9, base, end),
        (17, base, end),
        (17, base, list),
        (8, end - 2048, base),
        (1, u64::MAX - 511, 0),
    ];
    for (count, (blocks, first, second)) in (1..).zip(faults) {
        let status = try_prps(&mut rig, &mut pair, blocks, first, second);
        let wanted = if count == 5 { 0 } else { status::DATA_TRANSFER_ERROR };
        assert_eq!(status, wanted, "{count}");
    }
    assert_eq!(rig.control.count(Count::DmaFaults), 5);
    rig.expect_errors(4);
}

/// A descriptor as two words.
fn descriptor(kind: u8, iova: u64, len_bytes: usize) -> [u64; 2] {
    [iova, u64::from(len_u32(len_bytes)) | u64::from(kind) << 56]
}

fn with_sgl(mut sqe: Sqe, [low, high]: [u64; 2]) -> Sqe {
    sqe.0[0] |= PSDT_SGL;
    sqe.set_prps(low, high);
    sqe
}

#[test]
fn sgls_are_blocks_segments_and_buckets() {
    let (mut rig, mut pair) = rig();
    let data = pattern(16 * 512, 9);
    rig.medium.poke(0, &data);
    // One block, at an odd address.
    let sqe =
        with_sgl(io(nvm::READ, 1, 0, 2), descriptor(sgl::DATA_BLOCK, rig.iova(DATA + 7), 1024));
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    assert_eq!(rig.bytes(7, 1024), data[..1024]);
    // A segment of two blocks and a bucket, then the last segment.
    let (first, last) = (rig.iova(LISTS), rig.iova(LISTS + PAGE));
    let blocks = [
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA + 9000), 1),
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA + 5000), 3000),
        descriptor(sgl::BIT_BUCKET, 0, 95),
        descriptor(sgl::LAST_SEGMENT, last, 32),
    ];
    rig.list(0, &blocks.concat());
    let rest = 8192 - 3096;
    let blocks = [
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA + 20_001), rest - 6),
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA + 50_000), 6),
    ];
    rig.list(PAGE, &blocks.concat());
    let sqe = with_sgl(io(nvm::READ, 1, 0, 16), descriptor(sgl::SEGMENT, first, 64));
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    assert_eq!(rig.bytes(9000, 1), data[..1]);
    assert_eq!(rig.bytes(5000, 3000), data[1..3001]);
    assert_eq!(rig.bytes(20_001, rest - 6), data[3096..8186]);
    assert_eq!(rig.bytes(50_000, 6), data[8186..]);
    // And out of memory.
    let more = pattern(8192, 77);
    rig.fill(0, &more);
    let blocks = [
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA), 8000),
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA + 8000), 192),
    ];
    rig.list(0, &blocks.concat());
    let sqe = with_sgl(io(nvm::WRITE, 1, 100, 16), descriptor(sgl::LAST_SEGMENT, first, 32));
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    let mut there = vec![0; 8192];
    rig.medium.peek(100 * 512, &mut there);
    assert_eq!(there, more);
    assert_eq!(rig.control.count(Count::Sgl), 3);
    rig.expect_peace();
}

#[test]
fn sgls_are_checked_descriptor_by_descriptor() {
    let (mut rig, mut pair) = rig();
    let (list, data) = (rig.iova(LISTS), rig.iova(DATA));
    let block = |len_bytes| descriptor(sgl::DATA_BLOCK, data, len_bytes);
    let last = |len_bytes| descriptor(sgl::LAST_SEGMENT, list, len_bytes);
    let cases = [
        (nvm::READ, block(511), vec![], status::INVALID_SGL_LENGTH),
        (nvm::READ, block(513), vec![], status::INVALID_SGL_LENGTH),
        (nvm::READ, descriptor(0x40, data, 512), vec![], status::INVALID_SGL_TYPE),
        (nvm::READ, descriptor(0x01, data, 512), vec![], status::INVALID_SGL_TYPE),
        (nvm::WRITE, descriptor(sgl::BIT_BUCKET, 0, 512), vec![], status::INVALID_SGL_TYPE),
        (nvm::READ, last(0), vec![], status::INVALID_SGL_SEGMENT),
        (nvm::READ, last(24), vec![], status::INVALID_SGL_SEGMENT),
        (nvm::READ, last(16), vec![last(16)], status::INVALID_SGL_SEGMENT),
        (nvm::READ, last(16), vec![block(256)], status::INVALID_SGL_LENGTH),
        (
            nvm::READ,
            descriptor(sgl::SEGMENT, list, 16),
            vec![block(512)],
            status::INVALID_SGL_SEGMENT,
        ),
        // A segment that names itself for ever.
        (
            nvm::READ,
            descriptor(sgl::SEGMENT, list, 16),
            vec![descriptor(sgl::SEGMENT, list, 16)],
            status::INVALID_SGL_COUNT,
        ),
        (
            nvm::READ,
            descriptor(sgl::LAST_SEGMENT, list + 4, 16),
            vec![],
            status::INVALID_SGL_SEGMENT,
        ),
    ];
    let count = cases.len();
    for (at, (opcode, first, segment, wanted)) in cases.into_iter().enumerate() {
        rig.list(0, &segment.concat());
        let sqe = with_sgl(io(opcode, 1, 0, 1), first);
        assert_eq!(kind(&mut rig, &mut pair, sqe), wanted, "case {at}");
    }
    rig.expect_errors(count as u64);
    assert_eq!(rig.control.count(Count::DmaFaults), 0);
    let far = descriptor(sgl::LAST_SEGMENT, rig.iova(MEMORY), 16);
    let sqe = with_sgl(io(nvm::READ, 1, 0, 1), far);
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::DATA_TRANSFER_ERROR);
    assert_eq!(rig.control.count(Count::DmaFaults), 1);
}

#[test]
fn sgls_that_are_not_offered_are_refused() {
    let (mut rig, mut pair) = rig_with(ModelOptions::default());
    let block = descriptor(sgl::DATA_BLOCK, rig.iova(DATA), 512);
    let sqe = with_sgl(io(nvm::READ, 1, 0, 1), block);
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_FIELD);
    rig.expect_errors(1);
    let options = ModelOptions { sgls: Sgls::Dwords, ..ModelOptions::default() };
    let (mut rig, mut pair) = rig_with(options);
    let sqe =
        with_sgl(io(nvm::READ, 1, 0, 1), descriptor(sgl::DATA_BLOCK, rig.iova(DATA) + 2, 512));
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_FIELD);
    let sqe = with_sgl(io(nvm::READ, 1, 0, 1), descriptor(sgl::BIT_BUCKET, 0, 512));
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_SGL_TYPE);
    rig.expect_errors(2);
    // And in no admin command.
    let sqe = with_sgl(
        Sqe::new(ringmill_core::spec::nvme::admin::IDENTIFY, 0, 0),
        descriptor(sgl::DATA_BLOCK, rig.iova(DATA), 4096),
    );
    assert_eq!(rig.admin(sqe).status().kind(), status::INVALID_NAMESPACE);
    rig.expect_errors(3);
}

#[test]
fn ranges_sizes_and_fields_of_commands_are_checked() {
    let options = ModelOptions { mdts: 1, write_zeroes_max: 2, ..ModelOptions::default() };
    let (mut rig, mut pair) = rig_with(options);
    let edge = rig.prps(io(nvm::READ, 1, 8191, 1), 0, 512);
    assert_eq!(kind(&mut rig, &mut pair, edge), 0);
    let beyond = rig.prps(io(nvm::READ, 1, 8191, 2), 0, 1024);
    assert_eq!(kind(&mut rig, &mut pair, beyond), status::LBA_OUT_OF_RANGE);
    let wraps = rig.prps(io(nvm::READ, 1, u64::MAX, 2), 0, 1024);
    assert_eq!(kind(&mut rig, &mut pair, wraps), status::LBA_OUT_OF_RANGE);
    let nobody = rig.prps(io(nvm::READ, 9, 0, 1), 0, 512);
    assert_eq!(kind(&mut rig, &mut pair, nobody), status::INVALID_NAMESPACE);
    let compare = rig.prps(io(0x05, 1, 0, 1), 0, 512);
    assert_eq!(kind(&mut rig, &mut pair, compare), status::INVALID_OPCODE);
    rig.expect_peace();
    let long = rig.prps(io(nvm::READ, 1, 0, 17), 0, 17 * 512);
    assert_eq!(kind(&mut rig, &mut pair, long), status::INVALID_FIELD);
    let mut fused = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
    fused.0[0] |= 1 << 8;
    assert_eq!(kind(&mut rig, &mut pair, fused), status::INVALID_FIELD);
    let mut protected = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
    protected.0[12] |= 1 << 29;
    assert_eq!(kind(&mut rig, &mut pair, protected), status::INVALID_FIELD);
    assert_eq!(kind(&mut rig, &mut pair, io(nvm::WRITE_ZEROES, 1, 0, 33)), status::INVALID_FIELD);
    rig.expect_errors(4);
    assert_eq!(kind(&mut rig, &mut pair, io(nvm::WRITE_ZEROES, 1, 0, 32)), 0);
}

#[test]
fn zeroes_and_deallocation_reach_the_medium() {
    let options =
        ModelOptions { dsm_ranges_max: 3, dsm_range_blocks_max: 10, ..Default::default() };
    let (mut rig, mut pair) = rig_with(options);
    rig.medium.poke(0, &[1; 100 * 512]);
    let mut sqe = io(nvm::WRITE_ZEROES, 1, 2, 3);
    sqe.0[12] |= nvm::DW12_DEAC | nvm::DW12_FUA;
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    assert_eq!(rig.control.count(Count::Deac), 1);
    assert_eq!(rig.medium.volatile_bytes(), 0);
    let range = |lba: u64, blocks: u64| [blocks << 32, lba];
    let deallocate = |rig: &mut Rig, ranges: &[[u64; 2]]| {
        let bytes: Vec<u8> = ranges.concat().iter().flat_map(|word| word.to_le_bytes()).collect();
        rig.fill(0, &bytes);
        let mut sqe = rig.prps(Sqe::new(nvm::DSM, 0, 1), 0, bytes.len());
        sqe.0[10] = len_u32(ranges.len()) - 1;
        sqe.0[11] = nvm::DSM_DEALLOCATE;
        sqe
    };
    let sqe = deallocate(&mut rig, &[range(10, 1), range(20, 10), range(8191, 1)]);
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    assert_eq!(rig.control.count(Count::Ranges), 3);
    let mut there = vec![0; 100 * 512];
    rig.medium.peek(0, &mut there);
    let zeroed: Vec<usize> = (0..100).filter(|at| there[at * 512] == 0).collect();
    let wanted: Vec<usize> = (2..5).chain([10]).chain(20..30).collect();
    assert_eq!(zeroed, wanted);
    rig.expect_peace();
    // One bad range and none is done.
    let sqe = deallocate(&mut rig, &[range(50, 1), range(8191, 2)]);
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::LBA_OUT_OF_RANGE);
    rig.medium.peek(50 * 512, &mut there[..512]);
    assert_eq!(there[0], 1);
    let sqe = deallocate(&mut rig, &[range(50, 11)]);
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_FIELD);
    let sqe = deallocate(&mut rig, &[range(50, 1); 4]);
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_FIELD);
    rig.expect_errors(2);
}

#[test]
fn flush_of_all_namespaces_and_boundaries_are_counted() {
    let medium = Medium::ram(1 << 20).unwrap();
    let mut first = ModelNamespace::new(1, 9, 2048, std::sync::Arc::clone(&medium));
    first.noiob = 8;
    let mut metadata = ModelNamespace::new(2, 9, 2048, Medium::null());
    metadata.metadata_bytes = 8;
    let mut rig = Rig::with(ModelOptions::default(), vec![first, metadata], medium);
    rig.enable();
    let mut pair = rig.pair(1, 8);
    for (lba, blocks, crossings) in [(0, 8, 0), (7, 1, 0), (7, 2, 1), (16, 9, 2)] {
        let sqe = rig.prps(io(nvm::WRITE, 1, lba, blocks), 0, blocks as usize * 512);
        assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
        assert_eq!(rig.control.count(Count::BoundaryCrossings), crossings);
    }
    assert!(rig.medium.volatile_bytes() > 0);
    assert_eq!(kind(&mut rig, &mut pair, Sqe::new(nvm::FLUSH, 0, NSID_ALL)), 0);
    assert_eq!(rig.medium.volatile_bytes(), 0);
    rig.expect_peace();
    let sqe = rig.prps(io(nvm::READ, 2, 0, 1), 0, 512);
    assert_eq!(kind(&mut rig, &mut pair, sqe), status::INVALID_FIELD);
    rig.expect_errors(1);
}

#[test]
fn a_page_larger_than_four_kibibytes_counts() {
    use crate::pci::Registers;
    use ringmill_core::spec::nvme::{cc, csts, reg};
    let mut rig = Rig::new(ModelOptions::default());
    rig.prepare_admin();
    let sizes = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT | 2 << cc::MPS_SHIFT;
    rig.regs.write_u32(reg::CC, cc::EN | sizes);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) != 0);
    assert_eq!(rig.regs.read_u32(reg::CSTS), csts::RDY);
    // 16 KiB from one PRP.
    let at = DATA + rig.lead();
    let data = pattern(16384, 3);
    rig.medium.poke(0, &data);
    let mut pair = rig.pair(1, 8);
    let mut sqe = io(nvm::READ, 1, 0, 32);
    sqe.set_prps(rig.iova(at), 0);
    assert_eq!(kind(&mut rig, &mut pair, sqe), 0);
    assert_eq!(rig.bytes(at - DATA, 16384), data);
}
