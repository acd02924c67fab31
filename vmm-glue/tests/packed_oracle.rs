//! The packed ring against a naive twin: a driver that counts descriptors without end, keeps its own picture of the ring
//! byte by byte and decides about notifications by stepping through every descriptor (virtio 1.2 §2.8).

use std::collections::VecDeque;

use ringmill_core::io::Batch;
use ringmill_core::limits::PACKED_LOOK_DESCRIPTORS_MAX;
use ringmill_core::units::{bytes_u64, len_u32, usize_of};
use ringmill_vmm_glue::sim::{Dice, GuestMemory};
use ringmill_vmm_glue::virtq::{Chain, PackedQueue, QueueError, RingWindows, Virtqueue};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const DRIVER_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x1004;
const RING_AT: u64 = 0x2000;
const TABLES_AT: u64 = 0x1_0000;
const TABLE_BYTES: u64 = 512;
const BUFFERS_AT: u64 = TABLES_AT + 512 * TABLE_BYTES;
const BORDER: u64 = BUFFERS_AT + 0x1_2340;
const MEMORY_END: u64 = BUFFERS_AT + (4 << 20);

/// A byte range of a chain, merged with its neighbours of the same direction.
type Run = (u64, u64, bool);

fn push_run(runs: &mut Vec<Run>, addr: u64, len: u64, writable: bool) {
    match runs.last_mut() {
        Some(last) if last.0 + last.1 == addr && last.2 == writable => last.1 += len,
        _ => runs.push((addr, len, writable)),
    }
}

#[derive(Clone, Debug)]
struct Request {
    id: u16,
    /// Descriptors in the ring.
    len: u64,
    runs: Vec<Run>,
}

struct Pair {
    dice: Dice,
    memory: GuestMemory,
    ours: PackedQueue,
    size: u64,
    event_idx: bool,
    /// The ring as it must look.
    ring: Vec<u8>,
    /// Descriptors that the driver has written, shown, and seen coming back; that the device has taken, and used.
    added: u64,
    shown: u64,
    reaped: u64,
    taken: u64,
    used: u64,
    published: u64,
    /// Flags of the first descriptor that was not shown yet.
    held: Option<(u64, u16)>,
    hidden: Vec<Request>,
    waiting: VecDeque<Request>,
    flights: Vec<Request>,
    free_ids: Vec<u16>,
    /// Used descriptors in ring order: id and descriptors.
    returned: VecDeque<(u16, u64)>,
    tables_count: u64,
    batch: Batch,
}

fn wrap(count: u64, size: u64) -> bool {
    (count / size).is_multiple_of(2)
}

fn bits(count: u64, size: u64) -> u16 {
    u16::try_from(count % size).unwrap() | if wrap(count, size) { USED } else { 0 }
}

fn base(taken: u64, used: u64, size: u64) -> u32 {
    u32::from(bits(taken, size)) | u32::from(bits(used, size)) << 16
}

fn windows(memory: &GuestMemory, size: u16) -> RingWindows {
    let [ring, driver, device] = [RING_AT, DRIVER_AT, DEVICE_AT].map(GuestMemory::user_addr);
    RingWindows::packed(&memory.table(), size, ring, driver, device).expect("the windows fit")
}

impl Pair {
    fn new(seed: u64) -> Pair {
        let mut dice = Dice::new(seed, 41);
        let event_idx = dice.chance(600);
        let size = dice.pick(&[1u16, 2, 3, 5, 17, 64, 100, 255]);
        let lap = u64::from(size);
        let start = dice.below(4 * lap);
        let first = usize_of(BORDER - 0x1000);
        let memory = GuestMemory::new(&[(0x1000, first), (BORDER, usize_of(MEMORY_END - BORDER))]);
        let mut ring = vec![0; 16 * usize::from(size)];
        // The lap before `start` left used descriptors and, behind them, available ones that lists skipped.
        for count in start..start + lap {
            let (at, before) = (usize_of(count % lap), !wrap(count, lap));
            let skipped = if before { AVAIL } else { USED };
            let used = if before { AVAIL | USED } else { 0 };
            let flags: u16 = if dice.chance(300) { skipped } else { used };
            ring[16 * at + 14..16 * at + 16].copy_from_slice(&flags.to_le_bytes());
        }
        memory.write(RING_AT, &ring);
        let windows = windows(&memory, size);
        let ours = PackedQueue::new(windows, size, base(start, start, lap), event_idx, true);
        Pair {
            ours: ours.expect("a place of the ring"),
            dice,
            memory,
            size: lap,
            event_idx,
            ring,
            added: start,
            shown: start,
            reaped: start,
            taken: start,
            used: start,
            published: start,
            held: None,
            hidden: Vec::new(),
            waiting: VecDeque::new(),
            flights: Vec::new(),
            free_ids: (0..size).collect(),
            returned: VecDeque::new(),
            tables_count: 0,
            batch: Batch::new(),
        }
    }

    /// Writes a descriptor of the ring into picture and memory.
    fn put(&mut self, count: u64, addr: Option<u64>, len: u32, id: u16, flags: u16) {
        let at = usize_of(16 * (count % self.size));
        if let Some(addr) = addr {
            self.ring[at..at + 8].copy_from_slice(&addr.to_le_bytes());
        }
        self.ring[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
        self.ring[at + 12..at + 14].copy_from_slice(&id.to_le_bytes());
        self.ring[at + 14..at + 16].copy_from_slice(&flags.to_le_bytes());
        self.memory.write(RING_AT + bytes_u64(at), &self.ring[at..at + 16]);
    }

    fn flags_at(&self, count: u64) -> u16 {
        let at = usize_of(16 * (count % self.size)) + 14;
        u16::from_le_bytes([self.ring[at], self.ring[at + 1]])
    }

    /// One available descriptor; the first one of a batch keeps its old flags.
    fn offer(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let mark = if wrap(self.added, self.size) { AVAIL } else { USED };
        let flags = if self.held.is_none() {
            self.held = Some((self.added, flags | mark));
            self.flags_at(self.added)
        } else {
            flags | mark
        };
        self.put(self.added, Some(addr), len, id, flags);
        self.added += 1;
    }

    fn add_chain(&mut self) {
        let dice = &mut self.dice;
        let (readable, writable) = (dice.index(4), dice.between(1, 4));
        let buffers: Vec<Run> = (0..readable + writable)
            .map(|i| {
                let near = if dice.chance(300) { BORDER - 3000 } else { BUFFERS_AT };
                (near + dice.below(60_000), bytes_u64(dice.between(1, 5000)), i >= readable)
            })
            .collect();
        let is_list = dice.chance(600);
        let needed = if is_list { bytes_u64(buffers.len()) } else { 1 };
        if self.added - self.reaped + needed > self.size || self.free_ids.is_empty() {
            return;
        }
        let id = self.free_ids.swap_remove(dice.index(self.free_ids.len()));
        let mut runs = Vec::new();
        for &(addr, len, writable) in &buffers {
            push_run(&mut runs, addr, len, writable);
        }
        if is_list {
            let last = buffers.len() - 1;
            for (i, &(addr, len, writable)) in buffers.iter().enumerate() {
                let flags = if writable { WRITE } else { 0 } | if i < last { NEXT } else { 0 };
                // Only the last one's id counts.
                let id = if i == last { id } else { 0x7fff };
                self.offer(addr, len_u32(usize_of(len)), id, flags);
            }
        } else {
            self.tables_count += 1;
            let table = TABLES_AT + (self.tables_count % 512) * TABLE_BYTES;
            for (at, &(addr, len, writable)) in (0u64..).zip(&buffers) {
                let mut entry = [0xff; 16];
                entry[..8].copy_from_slice(&addr.to_le_bytes());
                entry[8..12].copy_from_slice(&len_u32(usize_of(len)).to_le_bytes());
                // Everything but WRITE is reserved in a table and must be ignored.
                let junk = if self.dice.chance(500) { !WRITE } else { 0 };
                let flags = junk | if writable { WRITE } else { 0 };
                entry[14..].copy_from_slice(&flags.to_le_bytes());
                self.memory.write(table + 16 * at, &entry);
            }
            let write = if self.dice.chance(500) { WRITE } else { 0 };
            self.offer(table, len_u32(16 * buffers.len()), id, INDIRECT | write);
        }
        self.hidden.push(Request { id, len: needed, runs });
    }

    fn show(&mut self) {
        if let Some((count, flags)) = self.held.take() {
            let at = usize_of(16 * (count % self.size)) + 14;
            self.ring[at..at + 2].copy_from_slice(&flags.to_le_bytes());
            self.memory.write_u16(RING_AT + bytes_u64(at), flags);
        }
        self.waiting.extend(self.hidden.drain(..));
        self.shown = self.added;
    }

    fn reap(&mut self) {
        while self.reaped < self.published && self.dice.chance(700) {
            let (id, len) = self.returned.pop_front().expect("the device returned it");
            self.free_ids.push(id);
            self.reaped += len;
        }
    }

    fn our_runs(&mut self, chain: &Chain) -> Vec<Run> {
        let table = self.memory.table();
        let to_guest = |host: usize| {
            table.regions().iter().find_map(|r| {
                let base = r.mapping().base().as_ptr() as usize;
                let offset = bytes_u64(host.checked_sub(base)?);
                (offset < r.spec().len_bytes).then(|| r.spec().guest_addr.0 + offset)
            })
        };
        let mut runs = Vec::new();
        let segments = self.batch.segments_mut(chain.segments_at, chain.segments_count);
        for (at, segment) in segments.iter().enumerate() {
            let addr = to_guest(segment.host().0).expect("inside the memory");
            push_run(&mut runs, addr, segment.len_bytes().into(), at >= chain.readable_count);
        }
        let last = runs.last().expect("a writable run");
        assert_eq!(to_guest(chain.status.host().0), Some(last.0 + last.1 - 1));
        let sum = |writable| runs.iter().filter(|r| r.2 == writable).map(|r| r.1).sum::<u64>();
        assert_eq!((chain.readable_bytes, chain.writable_bytes), (sum(false), sum(true)));
        runs
    }

    fn pop(&mut self) {
        let table = self.memory.table();
        let chain = self.ours.pop(&table, &mut 0, &mut self.batch).expect("a valid chain");
        let chain = chain.expect("an empty batch has room");
        let expected = self.waiting.pop_front().expect("there was one");
        assert_eq!((chain.head, chain.fault), (expected.id, None));
        assert_eq!(self.our_runs(&chain), expected.runs);
        self.taken += expected.len;
        self.flights.push(expected);
    }

    fn take(&mut self) {
        let available = self.ours.available().expect("a valid ring");
        assert_eq!(usize::from(available), self.waiting.len(), "available");
        self.batch.clear();
        let before = self.flights.len();
        let count = self.dice.index(usize::from(available) + 1);
        (0..count).for_each(|_| self.pop());
        // Putting back and taking again changes nothing.
        if self.dice.chance(300) {
            let back = self.dice.index(count + 1);
            for _ in 0..back {
                let last = self.flights.pop().expect("just taken");
                self.ours.unpop(last.id);
                self.taken -= last.len;
                self.waiting.push_front(last);
            }
            assert_eq!(self.ours.base(), base(self.taken, self.used, self.size));
            let again = if self.dice.chance(500) { back } else { 0 };
            (0..again).for_each(|_| self.pop());
        }
        assert!(self.flights.len() >= before);
        assert_eq!(self.ours.base(), base(self.taken, self.used, self.size));
    }

    /// The twin's answer: was the descriptor passed that the driver named?
    fn wants_interrupt(&self) -> bool {
        let event = self.memory.read_u32(DRIVER_AT).to_le_bytes();
        let desc = u16::from_le_bytes([event[0], event[1]]);
        match event[2] & 3 {
            1 => false,
            2 if self.event_idx && u64::from(desc & !USED) < self.size => {
                (self.published..self.used).any(|count| bits(count, self.size) == desc)
            }
            _ => true,
        }
    }

    fn complete(&mut self) {
        let mut expected = Vec::new();
        for _ in 0..self.dice.index(self.flights.len() + 1) {
            let request = self.flights.swap_remove(self.dice.index(self.flights.len()));
            let len = if self.dice.chance(100) { 0 } else { len_u32(self.dice.index(1 << 20)) };
            self.ours.put_used(request.id, len);
            expected.push((self.used, request.id, len));
            self.returned.push_back((request.id, request.len));
            self.used += request.len;
        }
        // Whatever was written so far: the driver must see nothing before the batch is published.
        if let Some((count, ..)) = expected.first() {
            let at = RING_AT + 16 * (count % self.size) + 14;
            assert_eq!(self.memory.read_u16(at), self.flags_at(*count), "shown too early");
        }
        for (count, id, len) in expected {
            let mark = if wrap(count, self.size) { AVAIL | USED } else { 0 };
            let at = usize_of(16 * (count % self.size));
            self.ring[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
            self.ring[at + 12..at + 14].copy_from_slice(&id.to_le_bytes());
            let flags = mark | if len > 0 { WRITE } else { 0 };
            self.ring[at + 14..at + 16].copy_from_slice(&flags.to_le_bytes());
        }
        let ask = self.dice.chance(850);
        let wanted = self.used != self.published && self.wants_interrupt();
        assert_eq!(self.ours.publish(ask), ask && wanted, "interrupt");
        self.published = self.used;
        assert_eq!(
            self.ours.indices(),
            (bits(self.taken, self.size), bits(self.published, self.size))
        );
        let mut ring = vec![0; self.ring.len()];
        self.memory.read(RING_AT, &mut ring);
        assert_eq!(ring, self.ring, "the ring");
    }

    fn notifications(&mut self) {
        if self.dice.chance(500) {
            assert_eq!(self.ours.request_kick(), self.taken < self.shown, "look again");
            let desc =
                if self.event_idx { u32::from(bits(self.taken, self.size)) | 2 << 16 } else { 0 };
            assert_eq!(self.memory.read_u32(DEVICE_AT), desc);
        } else {
            self.ours.suppress_kicks();
            assert_eq!(self.memory.read_u32(DEVICE_AT) >> 16, 1);
        }
    }

    fn driver_step(&mut self) {
        for _ in 0..self.dice.index(5) {
            self.add_chain();
        }
        if self.dice.chance(800) {
            self.show();
        }
        self.reap();
        let near = (self.published + self.dice.below(6)).saturating_sub(self.dice.below(3));
        let desc = match self.dice.below(12) {
            0 => self.dice.bits().to_le_bytes()[0].into(),
            1 => 0x7fff,
            _ => bits(near, self.size),
        };
        let flags = self.dice.pick(&[0u32, 1, 2, 2, 2, 3]);
        self.memory.write(DRIVER_AT, &(u32::from(desc) | flags << 16).to_le_bytes());
    }

    /// A device that goes on where another one stopped.
    fn restart(&mut self) {
        let size = u16::try_from(self.size).unwrap();
        let (base, windows) = (self.ours.base(), windows(&self.memory, size));
        self.ours = PackedQueue::new(windows, size, base, self.event_idx, true).expect("valid");
    }
}

#[test]
fn agrees_with_its_naive_twin_on_valid_rings() {
    for seed in 0..600 {
        let outcome = std::thread::Builder::new().name(format!("seed {seed}")).spawn(move || {
            let mut pair = Pair::new(seed);
            for _ in 0..150 {
                pair.driver_step();
                pair.take();
                pair.complete();
                pair.notifications();
                if pair.flights.is_empty() && pair.dice.chance(100) {
                    pair.restart();
                }
            }
            assert!(pair.used > 3 * pair.size, "the ring never wrapped");
        });
        outcome.expect("a thread").join().expect("the thread's name says the seed");
    }
}

#[test]
fn the_largest_ring_is_looked_at_in_bounded_steps() {
    let size = 32_768u16;
    let memory = GuestMemory::new(&[(0x1000, 1 << 20)]);
    let mut queue =
        PackedQueue::new(windows(&memory, size), size, 0x8000_8000, true, true).unwrap();
    let mut descriptors = vec![0u8; 16 * usize::from(size)];
    for (id, entry) in (0u16..).zip(descriptors.chunks_exact_mut(16)) {
        entry[..8].copy_from_slice(&0x9_0000u64.to_le_bytes());
        entry[8] = 1;
        entry[12..14].copy_from_slice(&id.to_le_bytes());
        entry[14..].copy_from_slice(&(AVAIL | WRITE).to_le_bytes());
    }
    memory.write(RING_AT, &descriptors);
    let (table, mut batch) = (memory.table(), Batch::new());
    for calls in 1..=u32::from(size / PACKED_LOOK_DESCRIPTORS_MAX) {
        let seen = queue.available().unwrap();
        assert_eq!(u32::from(seen), calls * u32::from(PACKED_LOOK_DESCRIPTORS_MAX));
    }
    assert_eq!(queue.available(), Ok(size));
    for id in 0..size {
        batch.clear();
        assert_eq!(queue.pop(&table, &mut 0, &mut batch).unwrap().unwrap().head, id);
        queue.put_used(id, 1);
    }
    assert_eq!(queue.base(), 0, "the second lap");
    assert!(queue.publish(true));
    assert_eq!(queue.available(), Ok(0));
}

#[test]
fn a_queue_begins_where_the_ring_is_or_not_at_all() {
    const FIRST: u32 = 0x8000_8000;
    const BOTH: u16 = AVAIL | USED;
    let memory = GuestMemory::new(&[(0x1000, 1 << 20)]);
    let start = |marks: [u16; 3], base: u32, device_event: u32| {
        for (at, marks) in (0u64..).zip(marks) {
            memory.write_u16(RING_AT + 16 * at + 14, marks | WRITE);
        }
        memory.write(DEVICE_AT, &device_event.to_le_bytes());
        PackedQueue::new(windows(&memory, 3), 3, base, true, true).map(|queue| queue.base())
    };
    let at = |place: u32| Some(place * 0x1_0001);
    // A fresh ring, with and without entries; base 0 is that of a front-end that knows split rings only.
    for marks in [[0; 3], [AVAIL, AVAIL, 0], [AVAIL; 3]] {
        assert_eq!(start(marks, FIRST, 0), Some(FIRST), "{marks:x?}");
    }
    assert_eq!(start([0; 3], 0, 0), Some(FIRST));
    assert_eq!(start([AVAIL, 0, 0], 0, 0), Some(FIRST));
    // The second lap, behind a first one whose lists skipped entries or not, and with entries of its own.
    for marks in [[BOTH; 3], [BOTH, AVAIL, BOTH], [USED, BOTH, BOTH], [USED; 3]] {
        assert_eq!(start(marks, 0, 0), Some(0), "{marks:x?}");
    }
    assert_eq!(start([BOTH, BOTH, AVAIL], 0x8002_8002, 0), at(0x8002));
    assert_eq!(start([BOTH, AVAIL, 0], 0x8001_8001, 0), at(0x8001));
    assert_eq!(start([0, USED, BOTH], 0x0001_0001, 0), at(1));
    // Requests of a predecessor that died are still in flight: the place for used ones is the front-end's.
    assert_eq!(start([BOTH, AVAIL, AVAIL], 0x8001_0000, 0), Some(0x8001_0000));
    // A front-end that does not know the place, and a ring that does.
    assert_eq!(start([BOTH, BOTH, AVAIL], FIRST, 0), None);
    assert_eq!(start([BOTH, BOTH, AVAIL], FIRST, 0x8002), at(0x8002));
    assert_eq!(start([0, BOTH, BOTH], FIRST, 1), at(1));
    assert_eq!(start([0, BOTH, BOTH], 0x8001_8001, 1), at(1));
    assert_eq!(start([BOTH, BOTH, AVAIL], 0, 0x8002), at(0x8002));
    // A list across the end of the lap hides that the place is not the first one: the note knows.
    assert_eq!(start([AVAIL, AVAIL, 0], FIRST, 0x8002), at(0x8002));
    // Notes that are none: of a queue that runs, that sleeps, or of another ring.
    assert_eq!(start([BOTH, USED, BOTH], FIRST, 0x8003), at(0), "the end of the first lap");
    for event in [0x8002 | 1 << 16, 0x8002 | 2 << 16, 0x8001, 0x0002, 0x8004, 0xffff] {
        assert_eq!(start([BOTH, BOTH, AVAIL], FIRST, event), None, "{event:#x}");
        assert_eq!(start([AVAIL, 0, 0], FIRST, event & !0x8002), Some(FIRST), "{event:#x}");
    }
}

#[test]
fn a_queue_that_leaves_notes_its_place_unless_requests_are_in_flight() {
    for seed in 0..40 {
        let mut pair = Pair::new(seed);
        for round in 0..60 {
            pair.driver_step();
            pair.take();
            pair.complete();
            pair.notifications();
            let before = pair.memory.read_u32(DEVICE_AT);
            pair.ours.leave();
            let size = u16::try_from(pair.size).unwrap();
            if pair.flights.is_empty() {
                // Whatever the front-end believes, the ring goes on where it is.
                let base = pair.dice.pick(&[0, 0x8000_8000]);
                let windows = windows(&pair.memory, size);
                let next = PackedQueue::new(windows, size, base, pair.event_idx, true);
                let next = next.unwrap_or_else(|| panic!("seed {seed} round {round}"));
                assert_eq!(next.base(), pair.ours.base(), "seed {seed} round {round}");
                pair.ours = next;
            } else {
                assert_eq!(pair.memory.read_u32(DEVICE_AT), before, "seed {seed}");
            }
        }
    }
}

#[test]
fn a_chain_that_does_not_fit_the_batch_is_left_on_the_ring() {
    let memory = GuestMemory::new(&[(0x1000, 4 << 20)]);
    let size = 8u16;
    let mut queue =
        PackedQueue::new(windows(&memory, size), size, 0x8000_8000, false, true).unwrap();
    // Two tables of 20,000 one-byte buffers: a batch holds one.
    for (at, table) in [(0u64, 0x10_0000u64), (1, 0x20_0000)] {
        let mut entry = [0u8; 16];
        entry[..8].copy_from_slice(&0x9_0000u64.to_le_bytes());
        entry[8] = 1;
        entry[14] = 2;
        (0..20_000u64).for_each(|i| memory.write(table + 16 * i, &entry));
        entry[..8].copy_from_slice(&table.to_le_bytes());
        entry[8..12].copy_from_slice(&320_000u32.to_le_bytes());
        entry[12] = u8::try_from(at).unwrap();
        entry[14..].copy_from_slice(&(AVAIL | INDIRECT).to_le_bytes());
        memory.write(RING_AT + 16 * at, &entry);
    }
    let (table, mut batch) = (memory.table(), Batch::new());
    assert_eq!(queue.available(), Ok(2));
    assert_eq!(queue.pop(&table, &mut 0, &mut batch).unwrap().map(|c| c.head), Some(0));
    let base = queue.base();
    assert!(queue.pop(&table, &mut 0, &mut batch).unwrap().is_none());
    assert_eq!((queue.base(), queue.available()), (base, Ok(1)));
    batch.clear();
    assert_eq!(queue.pop(&table, &mut 0, &mut batch).unwrap().map(|c| c.head), Some(1));
    // Nothing is there any more: whoever pops all the same learns it.
    assert!(matches!(queue.pop(&table, &mut 0, &mut batch), Err(QueueError::Changed { at: 2 })));
}
