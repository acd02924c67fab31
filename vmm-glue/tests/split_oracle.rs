//! The split ring against rust-vmm's `virtio-queue` on the same bytes: heads, buffers, used ring, notifications.

use ringmill_core::io::Batch;
use ringmill_core::mem::Segment;
use ringmill_core::spec::virtio_ring::used_bytes;
use ringmill_core::units::{bytes_u64, len_u32, usize_of};
use ringmill_vmm_glue::sim::{Buffer, Dice, DriverRing, GuestMemory, GuestRing};
use ringmill_vmm_glue::virtq::{Chain, SplitQueue, Virtqueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The ring and the indirect tables, then the buffers (which nobody touches).
const RING_AT: u64 = 0x4000;
const TABLES_AT: u64 = RING_AT + (32 << 10);
const TABLE_BYTES: u64 = 2048;
const BUFFERS_AT: u64 = TABLES_AT + 256 * TABLE_BYTES;
const BUFFERS_BYTES: usize = 4 << 20;
const BORDER: u64 = BUFFERS_AT + 0x1_2340;

/// A byte range of a chain, merged with its neighbours of the same direction.
type Run = (u64, u64, bool);

fn push_run(runs: &mut Vec<Run>, addr: u64, len: u64, writable: bool) {
    match runs.last_mut() {
        Some(last) if last.0 + last.1 == addr && last.2 == writable => last.1 += len,
        _ => runs.push((addr, len, writable)),
    }
}

struct Pair {
    dice: Dice,
    memory: GuestMemory,
    driver: DriverRing,
    ours: SplitQueue,
    oracle: Queue,
    oracle_memory: GuestMemoryMmap<()>,
    event_idx: bool,
    /// Chains that the device has taken and not returned.
    taken: Vec<u16>,
    tables_count: u64,
    batch: Batch,
}

impl Pair {
    fn new(seed: u64) -> Pair {
        let mut dice = Dice::new(seed, 40);
        let event_idx = dice.chance(600);
        let size = dice.pick(&[2u16, 8, 32, 128]);
        let start = dice.pick(&[0u16, 65_500, 65_535, 1234]);
        let total = usize_of(BUFFERS_AT - RING_AT) + BUFFERS_BYTES;
        let first = usize_of(BORDER - RING_AT);
        let memory = GuestMemory::new(&[(RING_AT, first), (BORDER, total - first)]);
        let driver = DriverRing::new(&memory, RING_AT, size, event_idx, start);
        let rings = driver.device_rings(&memory).expect("the windows fit");
        let ours = SplitQueue::new(rings, size, start, event_idx, true);
        let oracle_memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(RING_AT), total)]).expect("memory");
        let mut oracle = Queue::new(size).expect("a queue");
        let (desc, avail, used) = driver.addrs();
        let low = |addr: u64| u32::try_from(addr).ok();
        oracle.set_desc_table_address(low(desc), Some(0));
        oracle.set_avail_ring_address(low(avail), Some(0));
        oracle.set_used_ring_address(low(used), Some(0));
        oracle.set_event_idx(event_idx);
        oracle.set_next_avail(start);
        oracle.set_next_used(start);
        oracle.set_ready(true);
        let (used, used_len) = (driver.addrs().2, used_bytes(size));
        let mut bytes = vec![0; used_len];
        memory.read(used, &mut bytes);
        oracle_memory.write_slice(&bytes, GuestAddress(used)).expect("in range");
        let mut pair = Pair {
            dice,
            memory,
            driver,
            ours,
            oracle,
            oracle_memory,
            event_idx,
            taken: Vec::new(),
            tables_count: 0,
            batch: Batch::new(),
        };
        pair.copy_driver_memory();
        assert!(pair.oracle.is_valid(&pair.oracle_memory));
        pair
    }

    fn used_ring(&self) -> (u64, usize) {
        (self.driver.addrs().2, used_bytes(self.driver.size()))
    }

    /// Gives the oracle what the driver has written: everything but the used ring.
    fn copy_driver_memory(&mut self) {
        let (used, used_len) = self.used_ring();
        let mut kept = vec![0; used_len];
        self.oracle_memory.read_slice(&mut kept, GuestAddress(used)).expect("in range");
        let mut bytes = vec![0; usize_of(BUFFERS_AT - RING_AT)];
        self.memory.read(RING_AT, &mut bytes);
        self.oracle_memory.write_slice(&bytes, GuestAddress(RING_AT)).expect("in range");
        self.oracle_memory.write_slice(&kept, GuestAddress(used)).expect("in range");
    }

    fn add_chain(&mut self) -> bool {
        let dice = &mut self.dice;
        let (readable, writable) = (dice.index(6), dice.between(1, 6));
        let buffers: Vec<Buffer> = (0..readable + writable)
            .map(|i| {
                let near = if dice.chance(300) { BORDER - 3000 } else { BUFFERS_AT };
                let len_bytes = len_u32(dice.between(1, 5000));
                Buffer { addr: near + dice.below(60_000), len_bytes, writable: i >= readable }
            })
            .collect();
        let direct = match dice.below(3) {
            0 => buffers.len(),
            1 => 0,
            _ => dice.index(buffers.len()),
        };
        self.tables_count += 1;
        let table = TABLES_AT + (self.tables_count % 256) * TABLE_BYTES;
        self.driver.add(&self.memory, dice, &buffers, direct, table).is_some()
    }

    fn our_runs(&mut self, chain: &Chain) -> Vec<Run> {
        let table = self.memory.table();
        let to_guest = |segment: &Segment| {
            let host = bytes_u64(segment.host().0);
            let found = table.regions().iter().find_map(|r| {
                let base = r.mapping().base().as_ptr() as u64;
                let offset = host.checked_sub(base).filter(|&o| o < r.spec().len_bytes)?;
                Some(r.spec().guest_addr.0 + offset)
            });
            found.expect("a segment lies in a region")
        };
        let mut runs = Vec::new();
        let segments = self.batch.segments_mut(chain.segments_at, chain.segments_count);
        for (at, segment) in segments.iter().enumerate() {
            let len = u64::from(segment.len_bytes());
            push_run(&mut runs, to_guest(segment), len, at >= chain.readable_count);
        }
        let (last, status) = (runs.last().expect("a writable run"), to_guest(&chain.status));
        assert_eq!(status, last.0 + last.1 - 1, "the status is the last writable byte");
        let sum = |writable| runs.iter().filter(|r| r.2 == writable).map(|r| r.1).sum::<u64>();
        assert_eq!((chain.readable_bytes, chain.writable_bytes), (sum(false), sum(true)));
        runs
    }

    fn take(&mut self) {
        let available = self.ours.available().expect("a valid ring");
        let table = self.memory.table();
        self.batch.clear();
        let take = self.dice.index(usize::from(available) + 1);
        for _ in 0..take {
            let chain = self.ours.pop(&table, &mut 0, &mut self.batch).expect("a valid chain");
            let chain = chain.expect("an empty batch has room");
            assert_eq!(chain.fault, None);
            let ours = self.our_runs(&chain);
            let theirs = self.oracle.pop_descriptor_chain(&self.oracle_memory);
            let theirs = theirs.expect("the oracle has the chain too");
            assert_eq!(chain.head, theirs.head_index());
            let mut runs = Vec::new();
            for d in theirs {
                push_run(&mut runs, d.addr().0, u64::from(d.len()), d.is_write_only());
            }
            assert_eq!(ours, runs);
            self.taken.push(chain.head);
        }
        // Putting back and taking again changes nothing.
        if take > 0 && self.dice.chance(200) {
            let last = *self.taken.last().expect("just taken");
            self.ours.unpop(last);
            let again = self.ours.pop(&table, &mut 0, &mut self.batch).expect("valid as before");
            assert_eq!(again.map(|c| c.head), Some(last));
        }
        assert_eq!(self.ours.base(), u32::from(self.oracle.next_avail()));
    }

    fn complete(&mut self) {
        for _ in 0..self.dice.index(self.taken.len() + 1) {
            let head = self.taken.swap_remove(self.dice.index(self.taken.len()));
            let len = len_u32(self.dice.index(1 << 20));
            self.ours.put_used(head, len);
            self.oracle.add_used(&self.oracle_memory, head, len).expect("a used element");
        }
        let news = self.ours.indices().1 != self.oracle.next_used();
        let ours = self.ours.publish(true);
        let theirs = self.oracle.needs_notification(&self.oracle_memory).expect("an answer");
        // The oracle does not know NO_INTERRUPT and has an opinion when nothing is new.
        let flags = self.memory.read_u16(self.driver.addrs().1);
        assert_eq!(ours, news && theirs && (self.event_idx || flags & 1 == 0));
    }

    fn notifications(&mut self) {
        if self.dice.chance(500) {
            let theirs = self.oracle.enable_notification(&self.oracle_memory).expect("an answer");
            assert_eq!(self.ours.request_kick(), theirs);
        } else if !self.event_idx {
            self.ours.suppress_kicks();
            self.oracle.disable_notification(&self.oracle_memory).expect("an answer");
        }
    }

    fn driver_step(&mut self) {
        for _ in 0..self.dice.index(4) {
            self.add_chain();
        }
        if self.dice.chance(800) {
            self.driver.publish(&self.memory);
        }
        while self.dice.chance(700) && self.driver.take_used(&self.memory).is_some() {}
        match self.dice.below(3) {
            0 => self.driver.suppress_interrupts(&self.memory),
            1 => {
                let after = u16::try_from(self.dice.index(4)).unwrap_or(0);
                self.driver.ask_interrupt(&self.memory, after);
            }
            _ => {}
        }
        self.copy_driver_memory();
    }

    fn compare_used_rings(&self) {
        let (used, len) = self.used_ring();
        let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
        self.memory.read(used, &mut ours);
        self.oracle_memory.read_slice(&mut theirs, GuestAddress(used)).expect("in range");
        assert_eq!(ours, theirs, "the used rings differ");
    }
}

#[test]
fn agrees_with_virtio_queue_on_valid_rings() {
    for seed in 0..300 {
        let outcome = std::thread::Builder::new().name(format!("seed {seed}")).spawn(move || {
            let mut pair = Pair::new(seed);
            for _ in 0..120 {
                pair.driver_step();
                pair.take();
                pair.complete();
                pair.notifications();
                pair.compare_used_rings();
            }
        });
        outcome.expect("a thread").join().expect("the thread's name says the seed");
    }
}
