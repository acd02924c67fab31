//! Rings between reactors: both ends by hand on one thread, then reactors that sleep as often as they can.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::bdev::{LinkMemory, connect};
use super::channel::CrossChannel;
use super::port::Port;
use super::*;
use crate::IoStatus;
use crate::bdev::{
    Bdev, BdevError, BdevInfo, Channel, ChannelSeed, Geometry, InstantChannel, Room,
};
use crate::io::{BatchView, Completion, Completions, IoFlags, IoOp, IoRequest, Tag};
use crate::limits::{CROSS_LINKS_MAX, CROSS_ROOM_MIN, CROSS_SLOTS, QUEUE_INFLIGHT_MAX};
use crate::mem::{MemTable, Segment};
use crate::reactor::{
    Entropy, IdlePolicy, IoCx, Poller, PollerId, ReactorConfig, ReactorCx, ReactorHandle, spawn,
};
use crate::units::{GuestAddr, bytes_u64, index, len_u32, usize_of};

/// A request as a device saw it.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    tag: Tag,
    offset_bytes: u64,
    lens: Vec<u32>,
}

/// What a test sees of and does to its device.
#[derive(Default)]
struct Script {
    /// Taken and not ended.
    held: Vec<Seen>,
    /// Requests that fit.
    capacity: usize,
    /// To be ended by the next poll, as positions in `held`.
    end: Vec<usize>,
    /// Tags that are to be ended by the next poll.
    closed: bool,
    takes_max: usize,
}

#[derive(Clone, Default)]
struct Device(Arc<Mutex<Script>>);

impl Device {
    fn new(capacity: usize) -> Device {
        let script = Script { capacity, takes_max: usize::MAX, ..Script::default() };
        Device(Arc::new(Mutex::new(script)))
    }

    fn held(&self) -> Vec<Seen> {
        self.0.lock().unwrap().held.clone()
    }

    fn end(&self, which: impl IntoIterator<Item = usize>) {
        self.0.lock().unwrap().end.extend(which);
    }

    fn end_all(&self) {
        let count = self.held().len();
        self.end(0..count);
    }
}

impl Channel for Device {
    fn room(&self, _io: &IoCx) -> Room {
        let script = self.0.lock().unwrap();
        let requests = script.capacity - script.held.len();
        Room { requests, bytes: u64::MAX, not_before_ns: 0 }
    }

    fn submit(&mut self, _io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let mut script = self.0.lock().unwrap();
        let room = script.capacity - script.held.len();
        let taken = batch.requests().len().min(room).min(script.takes_max);
        for request in &batch.requests()[..taken] {
            let lens = batch.segments(request).iter().map(Segment::len_bytes).collect();
            let Seen { tag, offset_bytes, .. } =
                Seen { tag: request.tag, offset_bytes: request.offset_bytes, lens: Vec::new() };
            script.held.push(Seen { tag, offset_bytes, lens });
        }
        taken
    }

    fn poll(&mut self, _io: &mut IoCx, done: &mut Completions) {
        let mut script = self.0.lock().unwrap();
        let mut end = std::mem::take(&mut script.end);
        end.sort_unstable();
        end.dedup();
        while let Some(at) = end.pop() {
            if done.is_full() {
                script.end.push(at);
            } else if at < script.held.len() {
                let seen = script.held.remove(at);
                done.push(Completion { tag: seen.tag, status: IoStatus::Ok });
            }
        }
    }

    fn inflight(&self) -> usize {
        self.0.lock().unwrap().held.len()
    }

    fn must_poll(&self) -> bool {
        false
    }

    fn close(&mut self, _io: &mut IoCx) {
        self.0.lock().unwrap().closed = true;
    }
}

/// A port and its requesters on one thread, each with a context of its own.
struct Bench {
    port: Port,
    owner: ReactorCx,
    device: Device,
    sides: Vec<Side>,
}

struct Side {
    cx: ReactorCx,
    channel: CrossChannel,
    memory: LinkMemory,
    table: MemTable,
    out: HashMap<Tag, u64>,
    next: u32,
    ended: u64,
}

impl Bench {
    fn new(sides: usize, capacity: usize) -> Bench {
        let device = Device::new(capacity);
        let planted = device.clone();
        let gone = Box::new(InstantChannel::new(IoStatus::Gone));
        let counters = Arc::new(PortCounters::default());
        let seed: ChannelSeed = Box::new(move |_| Ok(Box::new(planted)));
        let mut port = Port::new(seed, gone, CROSS_LINKS_MAX, counters);
        let mut owner = ReactorCx::simulated(1).unwrap();
        port.attach(&mut owner);
        let mut bench = Bench { port, owner, device, sides: Vec::new() };
        (0..sides).for_each(|_| bench.add_side());
        bench
    }

    fn add_side(&mut self) {
        let (channel, link, memory) = connect(None, None);
        assert!(self.port.add_link(link).is_none());
        let table = MemTable::anonymous(GuestAddr(0), 1 << 20).unwrap();
        let cx = ReactorCx::simulated(1).unwrap();
        let side = Side { cx, channel, memory, table, out: HashMap::new(), next: 0, ended: 0 };
        self.sides.push(side);
    }

    fn owner_polls(&mut self) -> bool {
        self.port.poll(&mut self.owner)
    }
}

impl Side {
    /// Offers requests of so many segments each in one batch; returns how many were taken. A request's offset says how
    /// many segments it has and which side's it is.
    fn offer(&mut self, who: u64, segments_counts: &[usize]) -> usize {
        self.cx.batch.clear();
        for &count in segments_counts {
            let mark = self.cx.batch.segments_mark();
            for at in 0..count {
                let segment = self.table.translate(GuestAddr(0), len_u32(at + 1), &mut 0).unwrap();
                assert!(self.cx.batch.push_segment(segment));
            }
            let tag = Tag(self.next);
            self.next += 1;
            let offset_bytes = (who << 48) | (bytes_u64(count) << 32) | u64::from(tag.0);
            self.cx.batch.push(IoRequest {
                offset_bytes,
                len_bytes: 512,
                tag,
                segments_at: len_u32(mark),
                segments_count: len_u32(count),
                op: IoOp::Write,
                flags: IoFlags::NONE,
            });
        }
        let taken = self.channel.submit(&mut self.cx.io, self.cx.batch.view());
        for request in &self.cx.batch.view().requests()[..taken] {
            assert!(self.out.insert(request.tag, request.offset_bytes).is_none());
        }
        self.next -= len_u32(segments_counts.len() - taken);
        taken
    }

    fn polls(&mut self) -> Vec<Completion> {
        let mut done = Completions::new();
        self.channel.poll(&mut self.cx.io, &mut done);
        for completion in &done {
            assert!(self.out.remove(&completion.tag).is_some(), "twice, or never asked for");
            self.ended += 1;
        }
        assert_eq!(self.channel.inflight(), self.out.len());
        done.to_vec()
    }

    fn all_lists_are_back(&mut self) -> bool {
        // With nothing held, a user gets half of the medium lists and half of the large ones.
        let mut lists = crate::mem::SegmentLists::default();
        let (mut held, mut fresh_held) = Default::default();
        let segment = self.table.translate(GuestAddr(0), 1, &mut 0).unwrap();
        [vec![segment; 5], vec![segment; 500]].iter().all(|segments| {
            let (mut kept, mut wanted) = (Vec::new(), 0);
            while lists.keep(segments, &mut fresh_held).is_some() {
                wanted += 1;
            }
            while let Some(list) = self.cx.io.lists.keep(segments, &mut held) {
                kept.push(list);
            }
            let same = kept.len() == wanted;
            kept.into_iter().for_each(|list| self.cx.io.lists.give_back(list, &mut held));
            same
        })
    }
}

#[test]
fn every_request_arrives_whole_and_is_answered_once() {
    for seed in 0..40 {
        let mut dice = Entropy::seeded(seed);
        let sides_count = 1 + usize_of(dice.below(5));
        let mut bench = Bench::new(sides_count, 1 + usize_of(dice.below(300)));
        let mut seen = HashSet::new();
        for _ in 0..3000 {
            let who = usize_of(dice.below(bytes_u64(sides_count)));
            match dice.below(8) {
                0..=2 => {
                    let counts: Vec<usize> = (0..1 + dice.below(60))
                        .map(|_| [0, 1, 1, 1, 2, 4, 5, 60, 300][usize_of(dice.below(9))])
                        .collect();
                    bench.sides[who].offer(bytes_u64(who), &counts);
                }
                3 => bench.device.0.lock().unwrap().takes_max = usize_of(dice.below(70)),
                4 | 5 => {
                    bench.owner_polls();
                    for request in bench.device.held() {
                        let fresh = seen.insert(request.offset_bytes);
                        let (who, count) =
                            (request.offset_bytes >> 48, request.offset_bytes >> 32 & 0xffff);
                        if fresh {
                            let lens: Vec<u32> = (1..=u32::try_from(count).unwrap()).collect();
                            assert_eq!(request.lens, lens, "seed {seed}");
                            assert!(usize_of(who) < sides_count);
                        }
                    }
                }
                6 => {
                    let count = bench.device.held().len();
                    let some = dice.below(bytes_u64(count) + 1);
                    let some: Vec<_> =
                        (0..some).map(|_| usize_of(dice.below(bytes_u64(count.max(1))))).collect();
                    bench.device.end(some);
                }
                _ => {
                    bench.sides[who].polls();
                }
            }
        }
        bench.device.0.lock().unwrap().takes_max = usize::MAX;
        for _ in 0..4000 {
            bench.device.end_all();
            bench.owner_polls();
            bench.sides.iter_mut().for_each(|side| drop(side.polls()));
        }
        for (at, side) in bench.sides.iter_mut().enumerate() {
            assert!(side.out.is_empty(), "seed {seed}: side {at} waits for {}", side.out.len());
            assert!(side.all_lists_are_back(), "seed {seed}: side {at}");
        }
        assert!(!bench.owner_polls() && !bench.port.prepare_sleep(&mut bench.owner));
    }
}

#[test]
fn no_more_is_out_than_the_rings_hold() {
    let mut bench = Bench::new(1, QUEUE_INFLIGHT_MAX);
    let room = |bench: &Bench| bench.sides[0].channel.room(&bench.sides[0].cx.io).requests;
    while room(&bench) > 0 {
        let before = room(&bench);
        let taken = bench.sides[0].offer(0, &[1; 60]);
        assert_eq!(taken, before.min(60));
    }
    assert_eq!(bench.sides[0].offer(0, &[1]), 0);
    // Taken by the owner is not yet room: the answers need their places.
    while bench.device.held().len() < index(CROSS_SLOTS) {
        assert!(bench.owner_polls());
    }
    assert_eq!(room(&bench), 0);
    bench.device.end_all();
    bench.owner_polls();
    assert_eq!(room(&bench), 0);
    bench.sides[0].polls();
    assert_eq!(room(&bench), 64, "one batch of answers");
}

#[test]
fn a_small_requester_is_not_kept_waiting_by_a_greedy_one() {
    // 64 places: the minimum of each of two requesters is 16, so the greedy one gets no more than 48.
    let mut bench = Bench::new(2, 64);
    assert_eq!(CROSS_ROOM_MIN, 16);
    for _ in 0..4 {
        bench.sides[0].offer(0, &[1; 60]);
    }
    for _ in 0..8 {
        bench.owner_polls();
    }
    assert_eq!(bench.device.held().len(), 48);
    for round in 0..100 {
        // Nothing has ended since, and still the small one is taken at once.
        assert_eq!(bench.sides[1].offer(1, &[1]), 1);
        bench.owner_polls();
        let small = bench.device.held().iter().position(|s| s.offset_bytes >> 48 == 1);
        let small = small.unwrap_or_else(|| panic!("round {round}: the small request waits"));
        bench.device.end([small]);
        bench.owner_polls();
        assert_eq!(bench.sides[1].polls().len(), 1);
    }
    // A device of one place: everybody's turn comes.
    let mut bench = Bench::new(3, 1);
    for who in 0..3 {
        bench.sides[usize_of(who)].offer(who, &[1; 50]);
    }
    for _ in 0..60 {
        bench.owner_polls();
        bench.device.end_all();
        bench.owner_polls();
        bench.sides.iter_mut().for_each(|side| drop(side.polls()));
    }
    let ended: Vec<u64> = bench.sides.iter().map(|side| side.ended).collect();
    assert!(ended.iter().all(|&n| (15..=25).contains(&n)), "{ended:?}");
}

#[test]
fn what_an_owner_that_goes_did_not_take_ends_and_what_it_took_does_not() {
    let mut bench = Bench::new(1, 10);
    bench.sides[0].offer(0, &[1, 5, 500, 1, 1, 1, 1, 1, 1, 1, 1, 5, 500, 1]);
    bench.owner_polls();
    assert_eq!(bench.device.held().len(), 10);
    bench.sides[0].polls();
    assert!(!bench.sides[0].channel.must_poll(), "nothing to look for yet");
    bench.port.detach(&mut bench.owner);
    assert!(!bench.device.0.lock().unwrap().closed, "the device still has requests");
    assert!(bench.sides[0].channel.must_poll());
    let ended = bench.sides[0].polls();
    let tags: Vec<u32> = ended.iter().map(|c| c.tag.0).collect();
    assert_eq!(tags, [10, 11, 12, 13]);
    assert!(ended.iter().all(|c| c.status == IoStatus::Gone));
    assert!(bench.sides[0].polls().is_empty());
    // Later requests of one who has not heard of it.
    assert_eq!(bench.sides[0].offer(0, &[1, 300]), 2);
    assert_eq!(bench.sides[0].polls().len(), 2);
    assert_eq!(bench.sides[0].channel.inflight(), 10, "the device has them, so nobody ends them");
}

#[test]
fn answers_that_are_on_their_way_when_the_owner_goes_are_delivered() {
    let mut bench = Bench::new(1, 4);
    bench.sides[0].offer(0, &[1; 6]);
    bench.owner_polls();
    bench.device.end_all();
    bench.owner_polls();
    assert_eq!(bench.device.held().len(), 0, "all four ended before the next were taken");
    bench.port.detach(&mut bench.owner);
    assert!(bench.device.0.lock().unwrap().closed);
    let mut all = bench.sides[0].polls();
    all.extend(bench.sides[0].polls());
    let ok = all.iter().filter(|c| c.status.is_ok()).count();
    assert_eq!((all.len(), ok), (6, 4));
}

#[test]
fn a_requester_that_goes_leaves_nothing_to_be_done() {
    // Of five places one is kept for the other.
    let mut bench = Bench::new(2, 5);
    bench.sides[0].offer(0, &[1; 9]);
    bench.owner_polls();
    assert_eq!(bench.device.held().len(), 4);
    let Side { channel, memory, .. } = bench.sides.remove(0);
    drop(channel);
    bench.device.end([0]);
    bench.owner_polls();
    bench.owner_polls();
    assert_eq!(bench.device.held().len(), 3, "nothing more of it is begun");
    assert!(!memory.is_unused(), "its answers still have a place to go");
    bench.device.end_all();
    bench.owner_polls();
    assert!(bench.owner_polls(), "it is cleared away");
    assert!(memory.is_unused());
    assert!(!bench.owner_polls());
    // Its place is free for the next, which gets its own answers.
    bench.add_side();
    assert_eq!(bench.sides[1].offer(7, &[1, 1]), 2);
    bench.owner_polls();
    bench.device.end_all();
    bench.owner_polls();
    assert_eq!((bench.sides[0].polls().len(), bench.sides[1].polls().len()), (0, 2));
}

#[test]
fn a_quiesced_port_drains_takes_nothing_and_goes_on_with_another_channel() {
    let mut bench = Bench::new(1, 4);
    bench.sides[0].offer(0, &[1; 9]);
    bench.owner_polls();
    let count = Arc::new(AtomicUsize::new(0));
    let done = |count: &Arc<AtomicUsize>| {
        let count = Arc::clone(count);
        Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })
    };
    bench.port.quiesce(&mut bench.owner, done(&count));
    bench.port.quiesce(&mut bench.owner, done(&count));
    bench.device.end([0, 1, 2]);
    bench.owner_polls();
    assert_eq!((bench.device.held().len(), count.load(Ordering::Relaxed)), (1, 0));
    assert!(!bench.port.prepare_sleep(&mut bench.owner), "what waits is not work now");
    bench.device.end_all();
    bench.owner_polls();
    bench.owner_polls();
    assert_eq!((bench.device.held().len(), count.load(Ordering::Relaxed)), (0, 2));
    bench.port.quiesce(&mut bench.owner, done(&count));
    assert_eq!(count.load(Ordering::Relaxed), 3);
    let other = Device::new(64);
    let old = bench.port.resume(&mut bench.owner, Some(Box::new(other.clone())));
    assert!(old.is_some() && bench.device.0.lock().unwrap().closed);
    assert!(bench.port.prepare_sleep(&mut bench.owner), "now it is work");
    bench.owner_polls();
    assert_eq!(other.held().len(), 5);
    other.end_all();
    bench.owner_polls();
    assert_eq!(bench.sides[0].polls().len(), 9);
}

/// A device that ends everything at once, and counts its channels.
struct InstantBdev {
    info: Arc<BdevInfo>,
    channels: Arc<AtomicUsize>,
    fails: bool,
}

impl InstantBdev {
    fn new(fails: bool) -> Arc<InstantBdev> {
        let geometry = Geometry {
            block_bytes: 512,
            physical_block_bytes: 512,
            optimal_io_bytes: 0,
            blocks_count: 1 << 20,
            read_only: false,
            write_cache: false,
            discard: false,
            discard_granularity_bytes: 0,
            write_zeroes: true,
        };
        let info = Arc::new(BdevInfo::new("instant", None, "test", geometry).unwrap());
        Arc::new(InstantBdev { info, channels: Arc::default(), fails })
    }
}

impl Bdev for InstantBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        self.channels.fetch_add(1, Ordering::Relaxed);
        let fails = self.fails;
        Ok(Box::new(move |_| {
            if fails {
                let (name, reason) = ("instant".to_owned(), "no".to_owned());
                return Err(BdevError::Refused { name, reason });
            }
            Ok(Box::new(InstantChannel::new(IoStatus::Ok)))
        }))
    }
}

fn reactor(idle: IdlePolicy) -> ReactorHandle {
    spawn(&ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() }).expect("a reactor")
}

/// What a [`Pacer`] has seen.
#[derive(Default)]
struct Pace {
    ended: AtomicU64,
    failed: AtomicU64,
    longest_ns: AtomicU64,
}

/// Has one request out at a time, and lets its reactor sleep meanwhile.
struct Pacer {
    seed: Option<ChannelSeed>,
    channel: Option<Box<dyn Channel>>,
    pace: Arc<Pace>,
    started_ns: u64,
    left: u64,
}

impl Poller for Pacer {
    fn attach(&mut self, cx: &mut ReactorCx) {
        self.channel = self.seed.take().map(|seed| seed(&mut cx.io).expect("a channel"));
    }

    fn poll(&mut self, cx: &mut ReactorCx) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        if channel.inflight() > 0 {
            cx.completions.clear();
            channel.poll(&mut cx.io, &mut cx.completions);
            for completion in &cx.completions {
                let took_ns = cx.io.clock.now_ns() - self.started_ns;
                self.pace.longest_ns.fetch_max(took_ns, Ordering::Relaxed);
                self.pace
                    .failed
                    .fetch_add(u64::from(!completion.status.is_ok()), Ordering::Relaxed);
                self.pace.ended.fetch_add(1, Ordering::Relaxed);
            }
            return !cx.completions.is_empty();
        }
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        let (op, flags, tag) = (IoOp::Flush, IoFlags::NONE, Tag(0));
        let (offset_bytes, len_bytes, segments_at, segments_count) = (0, 0, 0, 0);
        let request =
            IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags };
        self.started_ns = cx.io.clock.now_ns();
        assert_eq!(channel.submit(&mut cx.io, BatchView::new(&[request], &[])), 1);
        true
    }

    fn prepare_sleep(&mut self, _cx: &mut ReactorCx) -> bool {
        let Some(channel) = &self.channel else { return false };
        if channel.inflight() > 0 { channel.must_poll() } else { self.left > 0 }
    }

    fn detach(&mut self, cx: &mut ReactorCx) {
        if let Some(channel) = &mut self.channel {
            channel.close(&mut cx.io);
        }
    }
}

fn pace(bdev: &CrossBdev, home: &ReactorHandle, count: u64) -> (PollerId, Arc<Pace>) {
    let pace = Arc::new(Pace::default());
    let seed = Some(bdev.open_channel(Some(home)).expect("a seed"));
    let pacer = Pacer { seed, channel: None, pace: Arc::clone(&pace), started_ns: 0, left: count };
    let id = PollerId::next();
    assert!(home.add_poller(id, "pacer", 0, Box::new(pacer)));
    (id, pace)
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn reactors_that_sleep_whenever_they_can_miss_no_wake_up() {
    const COUNT: u64 = 5000;
    let idle = IdlePolicy::Adaptive { spin_ns: 0 };
    let (owner, homes) = (reactor(idle), [reactor(idle), reactor(idle)]);
    let inner = InstantBdev::new(false);
    let bdev = CrossBdev::new(Arc::<InstantBdev>::clone(&inner), vec![owner.clone()]).unwrap();
    let paces = homes.each_ref().map(|home| pace(&bdev, home, COUNT));
    wait_for("requests are lost", || {
        paces.iter().all(|(_, pace)| pace.ended.load(Ordering::Relaxed) == COUNT)
    });
    for (home, (id, pace)) in homes.iter().zip(paces) {
        let longest_ms = pace.longest_ns.load(Ordering::Relaxed) / 1_000_000;
        // A reactor's longest sleep is a second: what somebody forgot to wake it for takes about that long.
        assert!(longest_ms < 800, "a request took {longest_ms} ms: its wake-up was lost");
        assert_eq!(pace.failed.load(Ordering::Relaxed), 0);
        assert!(home.stats().sleeps_count > COUNT / 20, "{:?}", home.stats());
        assert!(home.remove_poller(id));
    }
    assert!(owner.stats().sleeps_count > COUNT / 20, "{:?}", owner.stats());
    assert_eq!(inner.channels.load(Ordering::Relaxed), 1, "one channel for both");
    let facts = bdev.driver_facts();
    let fact = |name| facts.iter().find(|(n, _)| *n == name).map(|(_, v)| v.clone());
    assert_eq!(fact("queues").as_deref(), Some("1"));
    assert_eq!(fact("crossed_requests"), Some((2 * COUNT).to_string()));
    // The port goes with the bdev.
    assert_eq!(owner.pollers().len(), 1);
    drop(bdev);
    assert!(owner.pollers().is_empty());
    homes.iter().chain([&owner]).for_each(ReactorHandle::stop);
}

#[test]
fn queues_spread_over_owners_and_owners_use_their_own() {
    let reactors: Vec<_> = (0..5).map(|_| reactor(IdlePolicy::Adaptive { spin_ns: 0 })).collect();
    let inner = InstantBdev::new(false);
    let bdev = CrossBdev::new(Arc::<InstantBdev>::clone(&inner), reactors[1..3].to_vec()).unwrap();
    let owner_of = |at: usize| {
        let owner = bdev.owner(&reactors[at]);
        reactors.iter().position(|r| r.same(&owner)).unwrap()
    };
    assert_eq!([4, 1, 3, 2, 0, 4, 3, 0].map(owner_of), [1, 1, 2, 2, 1, 1, 2, 1]);
    let (id, own) = pace(&bdev, &reactors[2], 10);
    wait_for("its own queue", || own.ended.load(Ordering::Relaxed) == 10);
    assert!(
        reactors[1..3].iter().all(|r| r.pollers().iter().all(|p| p.name == "pacer")),
        "no port"
    );
    assert!(reactors[2].remove_poller(id));
    let twice = vec![reactors[0].clone(), reactors[0].clone()];
    assert!(CrossBdev::new(Arc::<InstantBdev>::clone(&inner), twice).is_err());
    assert!(CrossBdev::new(inner, Vec::new()).is_err());
    reactors.iter().for_each(ReactorHandle::stop);
}

#[test]
fn an_owner_without_its_channel_answers_that_the_device_is_gone() {
    let idle = IdlePolicy::Adaptive { spin_ns: 0 };
    let (owner, home) = (reactor(idle), reactor(idle));
    let bdev = CrossBdev::new(InstantBdev::new(true), vec![owner.clone()]).unwrap();
    // It finds out only after the first channel was handed out.
    let (go, wait) = std::sync::mpsc::channel::<()>();
    assert!(
        owner
            .send(Box::new(move |_| {
                let _ = wait.recv();
            }))
            .is_ok()
    );
    let (id, pace) = pace(&bdev, &home, 10);
    drop(go);
    wait_for("answers", || pace.failed.load(Ordering::Relaxed) == 10);
    // And the next one is told why.
    let error = bdev.open_channel(Some(&home)).map(drop).unwrap_err().to_string();
    assert!(error.contains("device queue 0 does not work"), "{error}");
    assert!(home.remove_poller(id));
    [owner, home].iter().for_each(ReactorHandle::stop);
}

#[test]
fn an_owner_that_ends_first_keeps_nobody_waiting() {
    let idle = IdlePolicy::Adaptive { spin_ns: 0 };
    let (owner, home) = (reactor(idle), reactor(idle));
    let bdev = CrossBdev::new(InstantBdev::new(false), vec![owner.clone()]).unwrap();
    let (id, pace) = pace(&bdev, &home, u64::MAX);
    wait_for("a start", || pace.ended.load(Ordering::Relaxed) > 100);
    owner.stop();
    wait_for("errors", || pace.failed.load(Ordering::Relaxed) > 100);
    assert!(pace.longest_ns.load(Ordering::Relaxed) < 800_000_000, "it slept through the end");
    assert!(home.remove_poller(id));
    let start = Instant::now();
    drop(bdev);
    assert!(start.elapsed() < Duration::from_secs(2), "nobody waits for a reactor that has ended");
    home.stop();
}
