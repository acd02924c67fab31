//! Drivers that break the rules of packed rings: each attack ends in an error status or in a broken queue, touches no
//! memory but what it named itself, and leaves the neighbour alone.

mod bench;

use bench::{BenchOf, MEMORY_BYTES, Packed, RING_AT, SECTORS_COUNT, Setup};
use ringmill_core::limits::CHAIN_DESCRIPTORS_MAX;
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::spec::virtio_ring::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_BYTES, PACKED_DESC_F_AVAIL,
    PACKED_DESC_F_USED, desc_table_bytes,
};
use ringmill_vmm_glue::blk::WorkerControl;
use ringmill_vmm_glue::sim::{Buffer, Dice, GuestMemory, GuestRing, PackedDriverRing};
use ringmill_vmm_glue::virtq::QueueError;

const MEMORY_END: u64 = RING_AT + 2 * MEMORY_BYTES as u64;
const N: u16 = DESC_F_NEXT;
const W: u16 = DESC_F_WRITE;
const I: u16 = DESC_F_INDIRECT;
/// Entries of the rings under attack; no power of two.
const SIZE: u16 = 50;

type Bench = BenchOf<Packed>;

fn setup() -> Setup {
    Setup { size: SIZE, ..Setup::default() }
}

/// How an attack must end.
#[derive(Clone, Debug)]
enum End {
    /// This status at this address.
    Status(u8, u64),
    /// The queue stops for a reason of this kind, and in words that contain this.
    Broken(fn(&QueueError) -> bool, &'static str),
}

/// A raw descriptor: address, length, id, flags.
type Raw = (u64, u32, u16, u16);

type Named = Vec<(u64, u64)>;

/// Offers descriptors as they are.
fn offer_raw(bench: &mut Bench, descs: &[Raw]) {
    for &(addr, len, id, flags) in descs {
        bench.ring.put(&bench.memory, addr, len, id, flags);
    }
    bench.ring.publish(&bench.memory);
}

fn write_table(bench: &Bench, at: u64, entries: &[Raw]) {
    for (i, &(addr, len, id, flags)) in (0u64..).zip(entries) {
        PackedDriverRing::write_table_entry(&bench.memory, at + 16 * i, addr, len, id, flags);
    }
}

/// Builds an attack; returns how it must end and the device-writable ranges that it names.
type Attack = fn(&mut Bench) -> (End, Named);

fn snapshot(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; 2 * MEMORY_BYTES];
    memory.read(RING_AT, &mut bytes);
    bytes
}

fn run(name: &str, setup: Setup, attack: Attack) {
    let mut bench = Bench::new(setup);
    let mut neighbour = Bench::new(Setup::default());
    let healthy = !setup.indirect || (bench.still_serves() && neighbour.still_serves());
    assert!(healthy, "{name}: healthy before");
    for at in (RING_AT + 0x8_0000..MEMORY_END).step_by(4096) {
        bench.memory.fill(at, 4096, 0x77);
    }
    let (end, mut named) = attack(&mut bench);
    let (ring, _, device) = bench.ring.addrs();
    named.push((device, EVENT_BYTES as u64));
    if matches!(end, End::Status(..)) {
        named.push((ring, desc_table_bytes(SIZE) as u64));
    }
    let before = snapshot(&bench.memory);
    let used_before = bench.ring.used_waiting(&bench.memory);
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
            assert!(bench.ring.used_waiting(&bench.memory) > used_before, "{name}");
        }
        End::Broken(kind, words) => {
            assert_eq!(events.len(), 1, "{name}: one event, not {events:?}");
            assert!(kind(&events[0]), "{name}: not for {:?}", events[0]);
            assert!(events[0].to_string().contains(words), "{name}: {}", events[0]);
            assert!(bench.is_broken(), "{name}");
        }
    }
    // The neighbour on the same reactor does not notice.
    std::mem::swap(&mut bench.cx, &mut neighbour.cx);
    assert!(neighbour.still_serves(), "{name}: the neighbour");
}

fn is_loop(e: &QueueError) -> bool {
    matches!(e, QueueError::Loop { .. })
}

fn is_overrun(e: &QueueError) -> bool {
    matches!(e, QueueError::Overrun { .. })
}

fn is_torn(e: &QueueError) -> bool {
    matches!(e, QueueError::Torn { .. })
}

fn is_changed(e: &QueueError) -> bool {
    matches!(e, QueueError::Changed { .. })
}

fn is_indirect(e: &QueueError) -> bool {
    matches!(e, QueueError::Indirect(_))
}

fn is_id(e: &QueueError) -> bool {
    matches!(e, QueueError::BufferId { .. })
}

fn is_in_flight(e: &QueueError) -> bool {
    matches!(e, QueueError::HeadInFlight { .. })
}

fn is_no_status(e: &QueueError) -> bool {
    matches!(e, QueueError::NoStatus { .. })
}

/// A read whose data lies at a given place.
fn read_at(bench: &mut Bench, addr: u64, len: u32) -> (End, Named) {
    let (header, status) = (bench.header(spec::T_IN, 0), bench.status_byte());
    offer_raw(bench, &[(header.addr, 16, 9, N), (addr, len, 9, N | W), (status.addr, 1, 9, W)]);
    (End::Status(spec::S_IOERR, status.addr), vec![(status.addr, 1)])
}

/// A flush of these ids and flags, correct otherwise.
fn flush_with(bench: &mut Bench, ids: [u16; 2], more: [u16; 2]) -> u64 {
    let (header, status) = (bench.header(spec::T_FLUSH, 0), bench.status_byte());
    let descs = [(header.addr, 16, ids[0], N | more[0]), (status.addr, 1, ids[1], W | more[1])];
    offer_raw(bench, &descs);
    status.addr
}

/// A request of these buffers.
fn request(bench: &mut Bench, status: u8, mut buffers: Vec<Buffer>) -> (End, Named) {
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
        run(name, setup(), attack);
    }
}

#[test]
fn a_status_that_cannot_be_written() {
    let attacks: [(&str, Attack); 6] = [
        ("no writable descriptor", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, 0, 0)]);
            (End::Broken(is_no_status, "no writable byte"), vec![])
        }),
        ("an empty writable descriptor", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, 0, N), (header.addr, 0, 0, W)]);
            (End::Broken(is_no_status, ""), vec![])
        }),
        ("an unmapped status", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            offer_raw(b, &[(header.addr, 16, 0, N), (MEMORY_END, 1, 0, W)]);
            (End::Broken(is_no_status, "is not guest memory"), vec![])
        }),
        ("a status that wraps to mapped memory", |b| {
            let header = b.header(spec::T_FLUSH, 0);
            let start = 0u64.wrapping_sub(0x1000);
            let len = u32::try_from(0x1000 + RING_AT + 0x9_0000).expect("fits");
            offer_raw(b, &[(header.addr, 16, 0, N), (start, len, 0, W)]);
            (End::Broken(is_no_status, ""), vec![])
        }),
        ("readable after writable", |b| {
            let (header, status) = (b.header(spec::T_FLUSH, 0), b.status_byte());
            offer_raw(b, &[(status.addr, 1, 0, N | W), (header.addr, 16, 0, 0)]);
            (End::Broken(|e| *e == QueueError::Order, "follows a device-writable"), vec![])
        }),
        ("only a status", |b| {
            let status = b.status_byte();
            offer_raw(b, &[(status.addr, 1, 0, W)]);
            (End::Status(spec::S_IOERR, status.addr), vec![(status.addr, 1)])
        }),
    ];
    for (name, attack) in attacks {
        run(name, setup(), attack);
    }
}

#[test]
fn ids_that_the_queue_cannot_use() {
    let attacks: [(&str, Attack); 8] = [
        ("the first id outside", |b| {
            flush_with(b, [0, SIZE], [0, 0]);
            (End::Broken(is_id, "buffer id is 50"), vec![])
        }),
        ("the highest id", |b| {
            flush_with(b, [0, u16::MAX], [0, 0]);
            (End::Broken(is_id, "65535"), vec![])
        }),
        ("an id with the wrap counter's bit", |b| {
            flush_with(b, [3, 0x8003], [0, 0]);
            (End::Broken(is_id, "32771"), vec![])
        }),
        ("an id outside on a table", |b| {
            let table = b.buffer(16, false);
            let status = b.status_byte();
            write_table(b, table.addr, &[(status.addr, 1, 0, W)]);
            offer_raw(b, &[(table.addr, 16, SIZE, I)]);
            (End::Broken(is_id, "buffer id is 50"), vec![])
        }),
        ("any id on what is not the last descriptor", |b| {
            let status = flush_with(b, [u16::MAX, 7], [0, 0]);
            (End::Status(spec::S_OK, status), vec![(status, 1)])
        }),
        ("the highest id that there is", |b| {
            let status = flush_with(b, [0, SIZE - 1], [0, 0]);
            (End::Status(spec::S_OK, status), vec![(status, 1)])
        }),
        ("the same id twice in a batch", |b| {
            let first = flush_with(b, [5, 5], [0, 0]);
            flush_with(b, [5, 5], [0, 0]);
            (End::Broken(is_in_flight, "buffer id 5"), vec![(first, 1)])
        }),
        ("the same id behind others", |b| {
            let first = flush_with(b, [0, 0], [0, 0]);
            let second = flush_with(b, [1, 1], [0, 0]);
            flush_with(b, [1, 0], [0, 0]);
            (End::Broken(is_in_flight, "buffer id 0"), vec![(first, 1), (second, 1)])
        }),
    ];
    for (name, attack) in attacks {
        run(name, setup(), attack);
    }
}

/// Marks the descriptors from the next one on with NEXT and the flags of their laps, `count` of them.
fn endless(bench: &mut Bench, count: u64, flags: u16) {
    let data = bench.buffer(512, true);
    let from = bench.ring.next_place();
    for place in (from..from + count).rev() {
        let flags = flags | bench.ring.avail_flags(place);
        bench.ring.write_desc(&bench.memory, place, data.addr, 8, 1, flags);
    }
}

#[test]
fn chains_that_never_end() {
    let attacks: [(&str, Attack); 7] = [
        ("next on every descriptor", |b| {
            endless(b, u64::from(SIZE), N | W);
            (End::Broken(is_overrun, "runs into descriptors that are in flight: of 50"), vec![])
        }),
        ("next on every descriptor, of both laps", |b| {
            endless(b, 2 * u64::from(SIZE), N | W);
            (End::Broken(is_overrun, ""), vec![])
        }),
        ("empty descriptors without end", |b| {
            let from = b.ring.next_place();
            for place in (from..from + u64::from(SIZE)).rev() {
                let flags = N | b.ring.avail_flags(place);
                b.ring.write_desc(&b.memory, place, 0, 0, 1, flags);
            }
            (End::Broken(is_overrun, ""), vec![])
        }),
        ("next on the last one, before descriptors that were never available", |b| {
            flush_with(b, [1, 1], [0, N]);
            (End::Broken(is_torn, "entry 5"), vec![])
        }),
        ("a list whose second descriptor has the marks of the other lap", |b| {
            let place = b.ring.next_place() + 1;
            let status = flush_with(b, [1, 1], [0, 0]);
            let flags = W | PACKED_DESC_F_USED;
            b.ring.write_desc(&b.memory, place, status, 1, 1, flags);
            (End::Broken(is_torn, "not marked as available"), vec![])
        }),
        ("a chain that takes the whole ring", |b| {
            let (header, data) = (b.header(spec::T_IN, 0), b.buffer(512, true));
            let status = b.status_byte();
            let mut descs = vec![(header.addr, 16, 0, N), (data.addr, 512, 0, N | W)];
            descs.resize(usize::from(SIZE) - 1, (data.addr, 0, 0, N | W));
            descs.push((status.addr, 1, 0, W));
            offer_raw(b, &descs);
            (End::Status(spec::S_OK, status.addr), vec![(data.addr, 512), (status.addr, 1)])
        }),
        ("one descriptor more than the ring has", |b| {
            let (header, status) = (b.header(spec::T_FLUSH, 0), b.status_byte());
            let mut descs = vec![(header.addr, 16, 0, N)];
            descs.resize(usize::from(SIZE), (header.addr, 0, 0, N));
            descs.push((status.addr, 1, 0, W));
            offer_raw(b, &descs);
            // The last descriptor overwrote the first one, in the next lap: nothing is available.
            b.ring.write_desc(&b.memory, 3, header.addr, 16, 0, N | PACKED_DESC_F_AVAIL);
            (End::Broken(is_overrun, ""), vec![])
        }),
    ];
    for (name, attack) in attacks {
        run(name, setup(), attack);
    }
}

/// An indirect table of these entries.
fn indirect(bench: &mut Bench, entries: &[Raw], len: u32) {
    let table = bench.buffer(u32::try_from(16 * entries.len()).expect("small").max(16), false);
    write_table(bench, table.addr, entries);
    offer_raw(bench, &[(table.addr, len, 0, I)]);
}

#[test]
fn indirect_tables_of_the_wrong_kind() {
    let attacks: [(&str, Attack); 10] = [
        ("no length", |b| {
            indirect(b, &[], 0);
            (End::Broken(is_indirect, "multiple of 16"), vec![])
        }),
        ("a length that is not a multiple", |b| {
            indirect(b, &[(0, 0, 0, 0), (0, 0, 0, 0)], 24);
            (End::Broken(is_indirect, "multiple of 16"), vec![])
        }),
        ("the longest length", |b| {
            indirect(b, &[(0, 0, 0, 0)], u32::MAX - 15);
            (End::Broken(is_indirect, "one memory region"), vec![])
        }),
        ("an unmapped table", |b| {
            offer_raw(b, &[(MEMORY_END, 16, 0, I)]);
            (End::Broken(is_indirect, "one memory region"), vec![])
        }),
        ("a table at the end of 64 bits", |b| {
            offer_raw(b, &[(u64::MAX - 7, 16, 0, I)]);
            (End::Broken(is_indirect, ""), vec![])
        }),
        ("a table across two regions", |b| {
            offer_raw(b, &[(RING_AT + MEMORY_BYTES as u64 - 8, 16, 0, I)]);
            (End::Broken(is_indirect, ""), vec![])
        }),
        ("next and indirect", |b| {
            offer_raw(b, &[(RING_AT, 16, 0, I | N), (RING_AT, 16, 0, I)]);
            (End::Broken(is_indirect, "linked by NEXT"), vec![])
        }),
        ("a table at the end of a list", |b| {
            let (header, table) = (b.header(spec::T_FLUSH, 0), b.buffer(16, false));
            let status = b.status_byte();
            write_table(b, table.addr, &[(status.addr, 1, 0, W)]);
            offer_raw(b, &[(header.addr, 16, 0, N), (table.addr, 16, 0, I)]);
            (End::Broken(is_indirect, "linked by NEXT"), vec![])
        }),
        ("every reserved flag in a table", |b| {
            let (header, status) = (b.header(spec::T_FLUSH, 0), b.status_byte());
            indirect(b, &[(header.addr, 16, 0xffff, !W), (status.addr, 1, 0xffff, 0xffff)], 32);
            (End::Status(spec::S_OK, status.addr), vec![(status.addr, 1)])
        }),
        ("one entry more than a chain may have", |b| {
            let (header, table) = (b.header(spec::T_IN, 0), RING_AT + 0x8_0000);
            let mut entries = vec![(RING_AT + 0x1_0000, 1, 0, W); CHAIN_DESCRIPTORS_MAX + 1];
            entries[0] = (header.addr, 16, 0, 0);
            write_table(b, table, &entries);
            offer_raw(b, &[(table, u32::try_from(16 * entries.len()).expect("fits"), 0, I)]);
            (End::Broken(is_loop, "longer than 32768"), vec![])
        }),
    ];
    for (name, attack) in attacks {
        run(name, setup(), attack);
    }
    run("a table without the feature", Setup { indirect: false, ..setup() }, |b| {
        let status = b.status_byte();
        indirect(b, &[(status.addr, 1, 0, W)], 16);
        (End::Broken(is_indirect, "not negotiated"), vec![])
    });
}

/// Shows a good request to a device that can take nothing, then spoils it and lets it go on.
fn spoil(spoil: fn(&mut Bench, u64), kind: fn(&QueueError) -> bool, words: &str) {
    let mut bench = Bench::new(Setup { size: SIZE, takes_max: 0, record: false, ..setup() });
    let (header, data) = (bench.header(spec::T_IN, 1), bench.buffer(512, true));
    let status = bench.status_byte();
    let place = bench.ring.next_place();
    for _ in 0..3 {
        bench.offer(&[header, data, status]);
    }
    bench.pass();
    assert!(!bench.is_broken());
    assert_eq!(bench.status.indices().0 & 0x7fff, 0, "the channel takes nothing");
    spoil(&mut bench, place);
    let before = snapshot(&bench.memory);
    bench.pass();
    bench.pass();
    let events = bench.events.lock().expect("not poisoned").clone();
    assert_eq!(events.len(), 1, "{words}: {events:?}");
    assert!(kind(&events[0]) && events[0].to_string().contains(words), "{}", events[0]);
    let (device, after) = (bench.ring.addrs().2, snapshot(&bench.memory));
    for (at, (old, new)) in (RING_AT..).zip(before.iter().zip(&after)) {
        assert!(old == new || (device..device + 4).contains(&at), "{words}: byte {at:#x}");
    }
}

#[test]
fn descriptors_that_change_after_they_were_shown() {
    // Withdrawn: the head is not available any more.
    spoil(|b, place| b.ring.write_desc(&b.memory, place, 0, 0, 0, 0), is_changed, "entry 0");
    let taken_back = |b: &mut Bench, place| {
        b.ring.write_desc(&b.memory, place, 0, 0, 0, PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED);
    };
    spoil(taken_back, is_changed, "changed descriptors");
    // Flags of another lap.
    let other_lap = |b: &mut Bench, place| {
        b.ring.write_desc(&b.memory, place, 0, 0, 0, N | PACKED_DESC_F_USED);
    };
    spoil(other_lap, is_changed, "changed descriptors");
    // The third chain's head: the two before it are good, and are not answered either.
    let third = |b: &mut Bench, place| b.ring.write_desc(&b.memory, place + 6, 0, 0, 0, 0);
    spoil(third, is_changed, "entry 6");
    // A last chain that ends earlier than it was seen to end: its status is where the data was.
    let shorter = |b: &mut Bench, place: u64| {
        let data = RING_AT + 0x9_0000;
        let flags = W | b.ring.avail_flags(place + 7);
        b.ring.write_desc(&b.memory, place + 7, data, 512, 40, flags);
    };
    spoil(shorter, is_changed, "entry 8");
    // One that is longer now.
    let longer = |b: &mut Bench, place: u64| {
        let flags = W | N | b.ring.avail_flags(place + 8);
        b.ring.write_desc(&b.memory, place + 8, RING_AT + 0x9_0000, 0, 40, flags);
        let flags = W | b.ring.avail_flags(place + 9);
        b.ring.write_desc(&b.memory, place + 9, RING_AT + 0x9_0000, 1, 40, flags);
    };
    spoil(longer, is_changed, "entry 10");
    // One that never ends now.
    let endless = |b: &mut Bench, place: u64| {
        for at in place..place + u64::from(SIZE) {
            let flags = W | N | b.ring.avail_flags(at);
            b.ring.write_desc(&b.memory, at, RING_AT + 0x9_0000, 1, 40, flags);
        }
    };
    spoil(endless, is_overrun, "of 50");
    // Another id.
    let id = |b: &mut Bench, place: u64| {
        let flags = W | b.ring.avail_flags(place + 2);
        b.ring.write_desc(&b.memory, place + 2, RING_AT + 0x9_0000, 1, 77, flags);
    };
    spoil(id, is_id, "77");
}

#[test]
fn marks_of_the_wrong_lap_are_not_looked_at() {
    for flags in [0, PACKED_DESC_F_USED, PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED] {
        let mut bench = Bench::new(setup());
        for place in 0..u64::from(SIZE) {
            bench.ring.write_desc(&bench.memory, place, RING_AT, 16, 0, flags | N);
        }
        for _ in 0..5 {
            assert!(!bench.pass());
        }
        assert!(!bench.is_broken());
    }
}

#[test]
fn a_full_ring_is_not_taken_twice() {
    // The driver overwrites descriptors that are in flight with such of the next lap.
    let setup = Setup { size: 4, takes_max: 0, record: false, ..setup() };
    let mut bench = Bench::new(setup);
    let (header, status) = (bench.header(spec::T_IN, 0), bench.status_byte());
    let data = bench.buffer(512, true);
    for place in 0..8u64 {
        let flags = bench.ring.avail_flags(place);
        let id = u16::try_from(place % 4).expect("small");
        let (addr, len, kind) = match place % 4 {
            0 => (header.addr, 16, N),
            1 => (data.addr, 512, N | W),
            2 => (status.addr, 1, W),
            _ => (status.addr, 1, W),
        };
        bench.ring.write_desc(&bench.memory, place, addr, len, id, kind | flags);
        bench.pass();
    }
    assert!(bench.is_broken() || bench.worker.inflight_count() <= 4);
}

#[test]
fn requests_that_make_no_sense() {
    let attacks: [(&str, Attack); 6] = [
        ("a header that is too short", |b| {
            let header = b.buffer(15, false);
            request(b, spec::S_IOERR, vec![header])
        }),
        ("an unknown type", |b| {
            let header = b.header(99, 0);
            request(b, spec::S_UNSUPP, vec![header])
        }),
        ("a sector that overflows", |b| {
            let (header, data) = (b.header(spec::T_OUT, u64::MAX), b.buffer(512, false));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("one sector behind the end", |b| {
            let (header, data) = (b.header(spec::T_IN, SECTORS_COUNT - 1), b.buffer(1024, true));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("a write of a sector and a byte", |b| {
            let (header, data) = (b.header(spec::T_OUT, 0), b.buffer(513, false));
            request(b, spec::S_IOERR, vec![header, data])
        }),
        ("a discard of two ranges", |b| {
            let header = b.header(spec::T_DISCARD, 0);
            let ranges = vec![header, b.range(0, 1, 0), b.range(8, 1, 0)];
            request(b, spec::S_IOERR, ranges)
        }),
    ];
    for (name, attack) in attacks {
        run(name, setup(), attack);
    }
}

#[test]
fn a_broken_queue_stays_silent() {
    let mut bench = Bench::new(setup());
    assert!(bench.still_serves());
    let (header, data) = (bench.header(spec::T_IN, 0), bench.buffer(512, true));
    let status = bench.status_byte();
    // A good request, popped in the same pass as the bad one behind it.
    bench.offer(&[header, data, status]);
    flush_with(&mut bench, [0, 9999], [0, 0]);
    let (ring, before) = (bench.ring.addrs().0, snapshot(&bench.memory));
    for _ in 0..5 {
        bench.pass();
    }
    assert!(bench.is_broken());
    let mut now = vec![0; desc_table_bytes(SIZE)];
    bench.memory.read(ring, &mut now);
    assert_eq!(now, before[..now.len()], "the ring is not written any more");
    let mut byte = [0];
    bench.memory.read(status.addr, &mut byte);
    assert_eq!(byte[0], 0xaa, "no status is written any more");
    assert_eq!(bench.events.lock().unwrap().len(), 1);
}

/// Where the fuzzer's buffers are; behind a hole lies memory that no descriptor names.
const FUZZ_BYTES: usize = 256 << 10;
const FORBIDDEN_AT: u64 = 0x100_0000;

/// A descriptor that is likely to be something, at a place of the ring.
fn fuzz_desc(dice: &mut Dice, mark: u16) -> Raw {
    let addr = match dice.below(20) {
        0 => dice.bits() | 1 << 40,
        1 => RING_AT + FUZZ_BYTES as u64 - dice.below(40),
        2 => RING_AT + dice.below(4096),
        _ => RING_AT + 4096 + dice.below(FUZZ_BYTES as u64 - 4096),
    };
    let len = match dice.below(12) {
        0 => 0,
        1 => u32::try_from(dice.below(1 << 18)).expect("fits"),
        2 => u32::MAX,
        3..6 => 16,
        6..8 => 1,
        _ => 512 * u32::try_from(dice.below(5)).expect("fits"),
    };
    let kind = match dice.below(12) {
        0 => u16::try_from(dice.below(1 << 16)).expect("fits"),
        1 => I,
        2..4 => N,
        4..6 => N | W,
        _ => W,
    };
    let mark = if dice.chance(990) { mark } else { dice.pick(&[0, 0x80, 0x8000, 0x8080]) };
    let ids = if dice.chance(10) { 30 } else { 17 };
    let id = u16::try_from(dice.below(ids)).expect("small");
    (addr, len, id, kind & !0x8080 | mark)
}

#[test]
fn random_rings_end_in_answers_or_in_a_broken_queue() {
    let started = std::time::Instant::now();
    let (mut broken_count, mut answers_count) = (0, 0u64);
    for seed in 0..6000 {
        if started.elapsed().as_secs() >= 5 {
            break;
        }
        let mut dice = Dice::new(seed, 61);
        let memory = GuestMemory::new(&[(RING_AT, FUZZ_BYTES), (FORBIDDEN_AT, 4096)]);
        memory.fill(FORBIDDEN_AT, 4096, 0x77);
        let setup = Setup { size: 17, record: false, event_idx: dice.chance(500), ..setup() };
        let mut bench = Bench::with(setup, memory, |channel| Box::new(channel));
        for round in 0..40u64 {
            // Behind the place where the device is: a few descriptors, often with the marks of its lap.
            let at = u64::from(bench.status.indices().0);
            let (at, lap) = (at & 0x7fff, u64::from(at & 0x8000 == 0));
            let place = 17 * lap + at;
            let count = dice.below(if round == 0 { 17 } else { 4 });
            for more in 0..count {
                let mark = bench.ring.avail_flags(place + more);
                let (addr, len, id, mut flags) = fuzz_desc(&mut dice, mark);
                if more + 1 == count && dice.chance(950) {
                    // Otherwise nearly every batch would end in a torn list.
                    flags = flags & !(N | I) | W;
                }
                bench.ring.write_desc(&bench.memory, place + more, addr, len, id, flags);
            }
            if dice.chance(50) {
                let (ring, ..) = bench.ring.addrs();
                bench.memory.write(ring + dice.below(17 * 16 + 4), &dice.bits().to_le_bytes()[..4]);
            }
            // A header now and then, somewhere.
            let kind = u32::try_from(dice.below(14)).expect("small");
            let header = RING_AT + 4096 + dice.below(FUZZ_BYTES as u64 - 8192);
            bench.memory.write(header, &kind.to_le_bytes());
            let before = bench.status.indices().1;
            bench.pass();
            bench.pass();
            answers_count += u64::from(bench.status.indices().1 != before);
        }
        broken_count += u32::from(bench.is_broken());
        let (base, shown) = (bench.worker.base() & 0xffff, bench.status.indices().0);
        assert!(base == shown || bench.is_broken(), "seed {seed}");
        let mut forbidden = [0; 4096];
        bench.memory.read(FORBIDDEN_AT, &mut forbidden);
        assert!(forbidden.iter().all(|&b| b == 0x77), "seed {seed} wrote outside its buffers");
    }
    assert!(
        broken_count > 100 && answers_count > 1000,
        "{broken_count} broken, {answers_count} answers"
    );
}
