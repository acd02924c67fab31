//! Drivers that break the rules: each attack ends in an error status or in a broken queue, touches no memory but what
//! it named itself, and leaves the neighbour alone.

mod bench;

use bench::{Bench, MEMORY_BYTES, RING_AT, SECTORS_COUNT, Setup};
use ringmill_core::limits::CHAIN_DESCRIPTORS_MAX;
use ringmill_core::reactor::{Poller, ReactorCx};
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::spec::virtio_ring::{
    AVAIL_ALIGN, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, used_bytes,
};
use ringmill_vmm_glue::blk::WorkerControl;
use ringmill_vmm_glue::sim::{Buffer, Dice, DriverRing, GuestMemory, GuestRing};
use ringmill_vmm_glue::virtq::QueueError;

const MEMORY_END: u64 = RING_AT + 2 * MEMORY_BYTES as u64;
const N: u16 = DESC_F_NEXT;
const W: u16 = DESC_F_WRITE;
const I: u16 = DESC_F_INDIRECT;

/// How an attack must end.
#[derive(Clone, Debug)]
enum End {
    /// This status at this address.
    Status(u8, u64),
    /// The queue stops for a reason of this kind.
    Broken(fn(&QueueError) -> bool),
}

/// A raw descriptor: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

fn write_descs(bench: &Bench, at: u64, descs: &[Raw]) {
    for (i, &(addr, len, flags, next)) in (0u64..).zip(descs) {
        DriverRing::write_desc(&bench.memory, at + 16 * i, addr, len, flags, next);
    }
}

fn offer_raw(bench: &mut Bench, descs: &[Raw], head: u16) {
    write_descs(bench, bench.ring.addrs().0, descs);
    bench.ring.offer(&bench.memory, head);
    bench.ring.publish(&bench.memory);
}

/// Builds an attack; returns how it must end and the device-writable ranges that it names.
type Attack = fn(&mut Bench) -> (End, Vec<(u64, u64)>);

fn snapshot(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; 2 * MEMORY_BYTES];
    memory.read(RING_AT, &mut bytes);
    bytes
}

fn run(name: &str, setup: Setup, attack: Attack) {
    let mut bench = Bench::new(setup);
    let mut neighbour = Bench::new(Setup::default());
    assert!(bench.still_serves() && neighbour.still_serves(), "{name}: healthy before");
    // Everything that the attack does not fill itself holds a pattern.
    for at in (RING_AT + 0x8_0000..MEMORY_END).step_by(4096) {
        bench.memory.fill(at, 4096, 0x77);
    }
    let (end, mut named) = attack(&mut bench);
    let used = bench.ring.addrs().2;
    named.push((used, used_bytes(bench.ring.size()) as u64));
    let before = snapshot(&bench.memory);
    let used_before = bench.ring.used_index(&bench.memory);
    for _ in 0..4 {
        bench.pass();
    }
    let after = snapshot(&bench.memory);
    for (at, (old, new)) in (RING_AT..).zip(before.iter().zip(&after)) {
        let is_named = || named.iter().any(|&(from, len)| at >= from && at - from < len);
        assert!(old == new || is_named(), "{name}: byte {at:#x} went from {old:#x} to {new:#x}");
    }
    let events = bench.events.lock().expect("not poisoned").clone();
    match end {
        End::Status(status, at) => {
            assert_eq!(events, [], "{name}: the queue must go on");
            let mut byte = [0];
            bench.memory.read(at, &mut byte);
            assert_eq!(byte[0], status, "{name}: status");
            assert_eq!(bench.ring.used_index(&bench.memory), used_before.wrapping_add(1), "{name}");
            while bench.ring.take_used(&bench.memory).is_some() {}
        }
        End::Broken(kind) => {
            assert_eq!(events.len(), 1, "{name}: one event, not {events:?}");
            assert!(kind(&events[0]), "{name}: not for {:?}", events[0]);
            assert!(bench.is_broken(), "{name}");
            assert_eq!(bench.ring.used_index(&bench.memory), used_before, "{name}: used index");
        }
    }
    // The neighbour on the same reactor does not notice.
    std::mem::swap(&mut bench.cx, &mut neighbour.cx);
    assert!(neighbour.still_serves(), "{name}: the neighbour");
}

fn is_loop(e: &QueueError) -> bool {
    matches!(e, QueueError::Loop { .. })
}

fn is_indirect(e: &QueueError) -> bool {
    matches!(e, QueueError::Indirect(_))
}

fn is_no_status(e: &QueueError) -> bool {
    matches!(e, QueueError::NoStatus { .. })
}

/// A read whose data lies at a given place.
fn read_at(bench: &mut Bench, addr: u64, len: u32) -> (End, Vec<(u64, u64)>) {
    let (header, status) = (bench.header(spec::T_IN, 0), bench.status_byte());
    let descs = [(header.addr, 16, N, 1), (addr, len, N | W, 2), (status.addr, 1, W, 0)];
    offer_raw(bench, &descs, 0);
    (End::Status(spec::S_IOERR, status.addr), vec![(status.addr, 1)])
}

/// A request of these buffers.
fn request(bench: &mut Bench, status: u8, mut buffers: Vec<Buffer>) -> (End, Vec<(u64, u64)>) {
    let byte = bench.status_byte();
    buffers.push(byte);
    bench.offer(&buffers);
    let writable = buffers.iter().filter(|b| b.writable);
    (End::Status(status, byte.addr), writable.map(|b| (b.addr, u64::from(b.len_bytes))).collect())
}

#[test]
fn addresses_and_lengths_outside_memory() {
    let attacks: [(&str, Attack); 8] = [
        ("unmapped", |b| read_at(b, 0x7777_0000_0000, 512)),
        ("address 0", |b| read_at(b, 0, 512)),
        ("the last address", |b| read_at(b, u64::MAX, 512)),
        ("wraps around", |b| read_at(b, u64::MAX - 255, 512)),
        ("ends behind the last region", |b| read_at(b, MEMORY_END - 511, 512)),
        ("starts before the first region", |b| read_at(b, RING_AT - 1, 512)),
        ("longest length", |b| read_at(b, RING_AT + 0x1_0000, u32::MAX)),
        ("longest length at the end", |b| read_at(b, MEMORY_END - 1, u32::MAX)),
    ];
    for (name, attack) in attacks {
        run(name, Setup::default(), attack);
    }
}

#[test]
fn a_buffer_across_two_regions_is_used_whole() {
    run("across regions", Setup::default(), |b| {
        let data = RING_AT + MEMORY_BYTES as u64 - 100;
        let (_, mut named) = read_at(b, data, 512);
        named.push((data, 512));
        (End::Status(spec::S_OK, named[0].0), named)
    });
}

#[test]
fn a_status_that_cannot_be_written() {
    let attacks: [(&str, Attack); 7] = [
        ("no writable descriptor", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, 0, 0)], 0);
            (End::Broken(is_no_status), vec![])
        }),
        ("an empty writable descriptor", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, N, 1), (header.addr, 0, W, 0)], 0);
            (End::Broken(is_no_status), vec![])
        }),
        ("an unmapped status", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, N, 1), (MEMORY_END, 1, W, 0)], 0);
            (End::Broken(is_no_status), vec![])
        }),
        ("a status behind the end", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, N, 1), (MEMORY_END - 1, 2, W, 0)], 0);
            (End::Broken(is_no_status), vec![])
        }),
        ("a status that wraps to mapped memory", |b| {
            // The last byte of this buffer, counted modulo 2^64, lies in the first region.
            let header = b.header(spec::T_FLUSH, 0);
            let start = 0u64.wrapping_sub(0x1000);
            let len = u32::try_from(0x1000 + RING_AT + 0x9_0000).expect("fits");
            offer_raw(b, &[(header.addr, 16, N, 1), (start, len, W, 0)], 0);
            (End::Broken(is_no_status), vec![])
        }),
        ("nothing at all", |b| {
            offer_raw(b, &[(0, 0, 0, 0)], 0);
            (End::Broken(is_no_status), vec![])
        }),
        ("only a status", |b| {
            let status = b.status_byte();
            offer_raw(b, &[(status.addr, 1, W, 0)], 0);
            (End::Status(spec::S_IOERR, status.addr), vec![(status.addr, 1)])
        }),
    ];
    for (name, attack) in attacks {
        run(name, Setup::default(), attack);
    }
}

#[test]
fn chains_that_loop_or_leave_their_table() {
    let attacks: [(&str, Attack); 9] = [
        ("a descriptor that follows itself", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, N, 0)], 0);
            (End::Broken(is_loop), vec![])
        }),
        ("a loop of two writable ones", |b| {
            let data = b.buffer(512, true);
            offer_raw(b, &[(data.addr, 512, N | W, 1), (data.addr, 512, N | W, 0)], 0);
            (End::Broken(is_loop), vec![])
        }),
        ("next outside the table", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, N, 64)], 0);
            (End::Broken(|e| matches!(e, QueueError::Next { .. })), vec![])
        }),
        ("a head outside the table", |b| {
            offer_raw(b, &[], 64);
            (End::Broken(|e| matches!(e, QueueError::Head { head: 64, .. })), vec![])
        }),
        ("the highest head", |b| {
            offer_raw(b, &[], u16::MAX);
            (End::Broken(|e| matches!(e, QueueError::Head { .. })), vec![])
        }),
        ("readable after writable", |b| {
            let (header, status) = (b.header(spec::T_FLUSH, 0), b.status_byte());
            offer_raw(b, &[(status.addr, 1, N | W, 1), (header.addr, 16, 0, 0)], 0);
            (End::Broken(|e| *e == QueueError::Order), vec![])
        }),
        ("an index that jumps", |b| {
            b.memory.write_u16(b.ring.addrs().1 + AVAIL_ALIGN, 500);
            (End::Broken(|e| matches!(e, QueueError::IndexJump { .. })), vec![])
        }),
        ("an index that goes back", |b| {
            b.memory.write_u16(b.ring.addrs().1 + AVAIL_ALIGN, 0);
            (End::Broken(|e| matches!(e, QueueError::IndexJump { .. })), vec![])
        }),
        ("the same head twice", |b| {
            let (header, status) = (b.header(spec::T_FLUSH, 0), b.status_byte());
            b.ring.offer(&b.memory, 0);
            offer_raw(b, &[(header.addr, 16, N, 1), (status.addr, 1, W, 0)], 0);
            (End::Broken(|e| *e == QueueError::HeadInFlight { head: 0 }), vec![(status.addr, 1)])
        }),
    ];
    for (name, attack) in attacks {
        run(name, Setup::default(), attack);
    }
}

/// An indirect table of these entries.
fn indirect(bench: &mut Bench, entries: &[Raw], len: u32) {
    let table = bench.buffer(u32::try_from(16 * entries.len()).expect("small").max(16), false);
    write_descs(bench, table.addr, entries);
    offer_raw(bench, &[(table.addr, len, I, 0)], 0);
}

#[test]
fn indirect_tables_of_the_wrong_kind() {
    let attacks: [(&str, Attack); 10] = [
        ("a table in a table", |b| {
            indirect(b, &[(RING_AT, 16, I, 0)], 16);
            (End::Broken(is_indirect), vec![])
        }),
        ("no length", |b| {
            indirect(b, &[], 0);
            (End::Broken(is_indirect), vec![])
        }),
        ("a length that is not a multiple", |b| {
            indirect(b, &[(0, 0, 0, 0), (0, 0, 0, 0)], 24);
            (End::Broken(is_indirect), vec![])
        }),
        ("the longest length", |b| {
            indirect(b, &[(0, 0, 0, 0)], u32::MAX - 15);
            (End::Broken(is_indirect), vec![])
        }),
        ("an unmapped table", |b| {
            offer_raw(b, &[(MEMORY_END, 16, I, 0)], 0);
            (End::Broken(is_indirect), vec![])
        }),
        ("a table at the end of 64 bits", |b| {
            offer_raw(b, &[(u64::MAX - 7, 16, I, 0)], 0);
            (End::Broken(is_indirect), vec![])
        }),
        ("next and indirect", |b| {
            offer_raw(b, &[(RING_AT, 16, I | N, 1)], 0);
            (End::Broken(is_indirect), vec![])
        }),
        ("a loop in the table", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            indirect(b, &[(header.addr, 16, N, 1), (header.addr, 16, N, 0)], 32);
            (End::Broken(is_loop), vec![])
        }),
        ("next outside the indirect table", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            indirect(b, &[(header.addr, 16, N, 2), (header.addr, 16, N, 0)], 32);
            (End::Broken(|e| matches!(e, QueueError::Next { .. })), vec![])
        }),
        ("65,536 entries", |b| {
            let (header, table) = (b.header(spec::T_IN, 0), RING_AT + 0x8_0000);
            let entry = |i: u32| (RING_AT + 0x1_0000, 1, N | W, u16::try_from(i + 1).unwrap_or(0));
            let mut entries: Vec<Raw> = (0..65_536u32).map(entry).collect();
            entries[0] = (header.addr, 16, N, 1);
            entries[65_535].2 = W;
            write_descs(b, table, &entries);
            offer_raw(b, &[(table, 16 << 16, I, 0)], 0);
            (End::Broken(is_loop), vec![])
        }),
    ];
    for (name, attack) in attacks {
        run(name, Setup::default(), attack);
    }
}

#[test]
fn the_longest_chain_that_is_allowed_works() {
    run("32,768 entries", Setup::default(), |b| {
        let (header, table) = (b.header(spec::T_IN, 0), RING_AT + 0x8_0000);
        let count = CHAIN_DESCRIPTORS_MAX;
        // 512 bytes of data, then empty buffers, then the status.
        let data = RING_AT + 0x18_0000;
        let mut entries: Vec<Raw> = (0..count)
            .map(|i| {
                let next = u16::try_from(i + 1).unwrap_or(0);
                let len = u32::from((1..=512).contains(&i));
                (data + 7 * i as u64, len, N | W, next)
            })
            .collect();
        entries[0] = (header.addr, 16, N, 1);
        let status = b.status_byte().addr;
        entries[count - 1] = (status, 1, W, 0);
        write_descs(b, table, &entries);
        offer_raw(b, &[(table, u32::try_from(16 * count).expect("fits"), I, 0)], 0);
        (End::Status(spec::S_OK, status), vec![(data, 7 * 513), (status, 1)])
    });
}

/// A read of `count - 2` single bytes, in a table at `table`, and its status byte.
fn long_read(bench: &mut Bench, table: u64, head: u16, count: u16) -> u64 {
    let (header, status) = (bench.header(spec::T_IN, 0), bench.status_byte().addr);
    let mut entries = vec![(header.addr, 16, N, 1)];
    entries.extend((1..count - 1).map(|i| (RING_AT + 0x6_0000 + u64::from(i), 1, N | W, i + 1)));
    entries.push((status, 1, W, 0));
    write_descs(bench, table, &entries);
    let at = bench.ring.addrs().0 + 16 * u64::from(head);
    DriverRing::write_desc(&bench.memory, at, table, 16 * u32::from(count), I, 0);
    bench.ring.offer(&bench.memory, head);
    status
}

#[test]
fn long_chains_that_do_not_fit_one_batch_wait_for_the_next() {
    let mut bench = Bench::new(Setup::default());
    // 20,482 descriptors each: 40 sectors. One batch holds the segments of one such chain and not of two.
    let count = 512 * 40 + 2;
    let statuses: Vec<u64> = (0..4u16)
        .map(|i| long_read(&mut bench, RING_AT + 0x8_0000 + 0x5_1000 * u64::from(i), i, count))
        .collect();
    bench.ring.publish(&bench.memory);
    for _ in 0..8 {
        bench.pass();
    }
    assert_eq!(bench.events.lock().unwrap().clone(), []);
    for status in statuses {
        let mut byte = [0xff];
        bench.memory.read(status, &mut byte);
        assert_eq!(byte, [spec::S_OK]);
    }
    assert_eq!(bench.ring.used_waiting(&bench.memory), 4);
}

#[test]
fn requests_that_make_no_sense() {
    let attacks: [(&str, Attack); 12] = [
        ("a header that is too short", |b| {
            let header = b.buffer(15, false);
            request(b, spec::S_IOERR, vec![header])
        }),
        ("an unknown type", |b| {
            let header = b.header(99, 0);
            request(b, spec::S_UNSUPP, vec![header])
        }),
        ("the highest type", |b| {
            let header = b.header(u32::MAX, 0);
            request(b, spec::S_UNSUPP, vec![header])
        }),
        ("a sector that overflows", |b| {
            let (header, data) = (b.header(spec::T_OUT, u64::MAX), b.buffer(512, false));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("a sector that wraps to 0", |b| {
            let (header, data) = (b.header(spec::T_IN, 1 << 55), b.buffer(512, true));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("one sector behind the end", |b| {
            let (header, data) = (b.header(spec::T_IN, SECTORS_COUNT - 1), b.buffer(1024, true));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("a read of half a sector", |b| {
            let (header, data) = (b.header(spec::T_IN, 0), b.buffer(256, true));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("a write of a sector and a byte", |b| {
            let (header, data) = (b.header(spec::T_OUT, 0), b.buffer(513, false));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("a discard without a range", |b| {
            let header = b.header(spec::T_DISCARD, 0);
            request(b, spec::S_IOERR, vec![header])
        }),
        ("a discard of two ranges", |b| {
            let header = b.header(spec::T_DISCARD, 0);
            let ranges = vec![header, b.range(0, 1, 0), b.range(8, 1, 0)];
            request(b, spec::S_IOERR, ranges)
        }),
        ("too many sectors", |b| {
            let (header, range) = (b.header(spec::T_DISCARD, 0), b.range(0, u32::MAX, 0));
            request(b, spec::S_IOERR, vec![header, range])
        }),
        ("a range whose end overflows", |b| {
            let header = b.header(spec::T_WRITE_ZEROES, 0);
            let range = b.range(u64::MAX / 512, 8, 0);
            request(b, spec::S_IOERR, vec![header, range])
        }),
    ];
    for (name, attack) in attacks {
        run(name, Setup::default(), attack);
    }
}

#[test]
fn flags_that_are_reserved() {
    run("unmap on a discard", Setup::default(), |b| {
        let (header, range) = (b.header(spec::T_DISCARD, 0), b.range(0, 8, spec::RANGE_F_UNMAP));
        request(b, spec::S_UNSUPP, vec![header, range])
    });
    run("an unknown flag", Setup::default(), |b| {
        let (header, range) = (b.header(spec::T_WRITE_ZEROES, 0), b.range(0, 8, 1 << 31));
        request(b, spec::S_UNSUPP, vec![header, range])
    });
}

#[test]
fn a_read_only_disk_is_not_changed() {
    let setup = Setup { read_only: true, ..Setup::default() };
    let attacks: [(&str, Attack); 3] = [
        ("write", |b| {
            let (header, data) = (b.header(spec::T_OUT, 0), b.buffer(512, false));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("discard", |b| {
            let (header, range) = (b.header(spec::T_DISCARD, 0), b.range(0, 8, 0));
            request(b, spec::S_IOERR, vec![header, range])
        }),
        ("write zeroes", |b| {
            let (header, range) = (b.header(spec::T_WRITE_ZEROES, 0), b.range(0, 8, 0));
            request(b, spec::S_IOERR, vec![header, range])
        }),
    ];
    for (name, attack) in attacks {
        run(name, setup, attack);
    }
}

#[test]
fn a_broken_queue_stays_silent() {
    let mut bench = Bench::new(Setup::default());
    assert!(bench.still_serves());
    let (header, data) = (bench.header(spec::T_IN, 0), bench.buffer(512, true));
    let status = bench.status_byte();
    // A good request, popped in the same pass as the bad one behind it.
    bench.offer(&[header, data, status]);
    bench.ring.offer(&bench.memory, 9999);
    bench.ring.publish(&bench.memory);
    let before = bench.ring.used_index(&bench.memory);
    for _ in 0..5 {
        bench.pass();
        bench.offer(&[header, data, status]);
    }
    assert!(bench.is_broken());
    // Nor on another reactor.
    let mut other = ReactorCx::simulated(2).expect("memory");
    bench.worker.detach(&mut bench.cx);
    drop(bench.worker.replant(None, true));
    bench.worker.attach(&mut other);
    assert!(bench.worker.take_problem().is_none() && bench.is_broken());
    for _ in 0..3 {
        bench.worker.poll(&mut other);
        bench.offer(&[header, data, status]);
    }
    assert!(bench.is_broken());
    assert_eq!(bench.ring.used_index(&bench.memory), before);
    let mut byte = [0];
    bench.memory.read(status.addr, &mut byte);
    assert_eq!(byte[0], 0xaa, "no status is written any more");
    assert_eq!(bench.events.lock().unwrap().len(), 1);
}

/// Where the fuzzer's buffers are; behind a hole lies memory that no descriptor names.
const FUZZ_BYTES: usize = 256 << 10;
const FORBIDDEN_AT: u64 = 0x100_0000;

fn fuzz_desc(dice: &mut Dice, size: u16) -> Raw {
    let inside = RING_AT + dice.below(FUZZ_BYTES as u64);
    let addr = match dice.below(20) {
        0 => dice.bits() | 1 << 40,
        1 => RING_AT + FUZZ_BYTES as u64 - dice.below(40),
        _ => inside,
    };
    let len = match dice.below(12) {
        0 => 0,
        1 => u32::try_from(dice.below(1 << 18)).expect("fits"),
        2 => u32::MAX,
        3..6 => 16,
        6..8 => 1,
        _ => 512 * u32::try_from(dice.below(5)).expect("fits"),
    };
    let flags = match dice.below(10) {
        0 => u16::try_from(dice.below(1 << 16)).expect("fits"),
        1 => I,
        2..6 => N,
        6..8 => N | W,
        _ => W,
    };
    let next = if dice.chance(50) { dice.bits().to_le_bytes()[0].into() } else { 0 };
    let next =
        if next == 0 { u16::try_from(dice.index(usize::from(size))).expect("fits") } else { next };
    (addr, len, flags, next)
}

#[test]
fn random_rings_end_in_answers_or_in_a_broken_queue() {
    let started = std::time::Instant::now();
    let mut broken_count = 0;
    let mut answers_count = 0u64;
    for seed in 0..4000 {
        if started.elapsed().as_secs() >= 5 {
            break;
        }
        let mut dice = Dice::new(seed, 60);
        let memory = GuestMemory::new(&[(RING_AT, FUZZ_BYTES), (FORBIDDEN_AT, 4096)]);
        memory.fill(FORBIDDEN_AT, 4096, 0x77);
        let setup = Setup { size: 16, record: false, ..Setup::default() };
        let mut bench = Bench::with(setup, memory, |channel| Box::new(channel));
        for round in 0..30u16 {
            let (table, avail, _) = bench.ring.addrs();
            for at in 0..16 {
                if round == 0 || dice.chance(300) {
                    let (addr, len, flags, next) = fuzz_desc(&mut dice, 16);
                    let at = table + 16 * at;
                    DriverRing::write_desc(&bench.memory, at, addr, len, flags, next);
                }
            }
            for slot in 0..16 {
                let most = if dice.chance(3) { 20 } else { 16 };
                let head = dice.index(most);
                bench.memory.write_u16(avail + 4 + 2 * slot, u16::try_from(head).expect("small"));
            }
            // A header now and then, somewhere.
            let kind = u32::try_from(dice.below(14)).expect("small");
            let header = RING_AT + dice.below(FUZZ_BYTES as u64 - 16);
            bench.memory.write(header, &kind.to_le_bytes());
            let more = u16::try_from(dice.index(3)).expect("small");
            let base = u16::try_from(bench.worker.base() & 0xffff).expect("16 bits");
            bench.memory.write_u16(avail + 2, base.wrapping_add(more));
            bench.pass();
            bench.pass();
        }
        broken_count += u32::from(bench.is_broken());
        answers_count += u64::from(bench.status.indices().1);
        let mut forbidden = [0; 4096];
        bench.memory.read(FORBIDDEN_AT, &mut forbidden);
        assert!(forbidden.iter().all(|&b| b == 0x77), "seed {seed} wrote outside its buffers");
    }
    assert!(
        broken_count > 0 && answers_count > 0,
        "{broken_count} broken, {answers_count} answers"
    );
}
