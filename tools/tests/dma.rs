//! Guests' memory and a device that moves data by itself: what it reaches, since when, and until when.
//!
//! The device is a RAM disk whose channels look, for every request, whether its memory is mapped in a domain of the test's
//! own, and whether a request is still out when memory is unmapped. The front-end speaks vhost-user to a controller in this
//! process.

#[path = "support/frontend.rs"]
mod frontend;
#[path = "support/host.rs"]
mod host;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use frontend::*;
use host::Host;
use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, Channel, ChannelSeed, Room};
use ringmill_core::io::{BatchView, Completions, Tag};
use ringmill_core::mem::{DmaDomain, DmaError, IovaOffset, Mapping, install_sigbus_handler};
use ringmill_core::reactor::{IoCx, ReactorHandle};
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_vmm_glue::blk::PinView;

const WAIT_MAX: Duration = Duration::from_secs(20);
/// Long enough that something which must not happen would have.
const MOMENT: Duration = Duration::from_millis(150);
const ALL: u64 = P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS | P_RESET_DEVICE;
const RINGS_BYTES: u64 = 2 * RING_BYTES;
const DATA_GUEST: u64 = 0x4000_0000;
const MORE_GUEST: u64 = 0x8000_0000;
const SLOTS: u16 = 8;
const DATA_LEN: u64 = SLOTS as u64 * DATA_BYTES;

/// What the domain does with the next wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Takes,
    /// Waits until the mood is another one.
    Waits,
    Refuses,
    /// Is closed: the device is being lost, and nobody has said so yet.
    Gone,
}

#[derive(Debug)]
struct Book {
    mood: Mood,
    unmaps_wait: bool,
    /// First address and end.
    mapped: Vec<(usize, usize)>,
    maps_count: usize,
    unmaps_count: usize,
    /// Wishes that have come, granted or not.
    asked_count: usize,
    /// Threads that asked.
    threads: Vec<Option<String>>,
    /// Requests in the device: tag, first address, end.
    out: Vec<(u32, usize, usize)>,
    /// What must never be.
    wrongs: Vec<String>,
}

/// A domain that keeps a book.
#[derive(Debug)]
struct Watch {
    book: Mutex<Book>,
    changed: Condvar,
    /// The device gives nothing back.
    holds: AtomicBool,
}

impl Watch {
    fn set(&self, mood: Mood) {
        self.book.lock().unwrap().mood = mood;
        self.changed.notify_all();
    }

    fn let_unmaps_wait(&self, wait: bool) {
        self.book.lock().unwrap().unmaps_wait = wait;
        self.changed.notify_all();
    }

    fn counts(&self) -> (usize, usize) {
        let book = self.book.lock().unwrap();
        assert!(book.wrongs.is_empty(), "{:?}", book.wrongs);
        (book.maps_count, book.unmaps_count)
    }

    #[track_caller]
    fn expect(&self, maps: usize, unmaps: usize) {
        let reached = wait_for(|| self.counts() == (maps, unmaps));
        assert!(reached, "{:?} instead of {:?}", self.counts(), (maps, unmaps));
    }

    fn asked(&self, times: usize) {
        assert!(wait_for(|| self.book.lock().unwrap().asked_count >= times), "{self:?}");
    }

    fn out_count(&self) -> usize {
        self.book.lock().unwrap().out.len()
    }
}

fn range(mapping: &Mapping) -> (usize, usize) {
    let (host, len_bytes) = mapping.pages();
    (host.0, host.0 + len_bytes)
}

impl DmaDomain for Watch {
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        let mut book = self.book.lock().unwrap();
        book.asked_count += 1;
        book.threads.push(std::thread::current().name().map(str::to_owned));
        while book.mood == Mood::Waits {
            book = self.changed.wait(book).unwrap();
        }
        let device = "watch".to_owned();
        if book.mood == Mood::Gone {
            return Err(DmaError::Gone { device });
        }
        if book.mood == Mood::Refuses {
            let (need_bytes, limit) = (4_567_000, "8192 bytes".to_owned());
            return Err(DmaError::Memlock { device, need_bytes, limit });
        }
        let new = range(mapping);
        if book.mapped.iter().any(|old| old.0 < new.1 && new.0 < old.1) {
            book.wrongs.push(format!("{new:x?} is mapped twice"));
        }
        book.mapped.push(new);
        book.maps_count += 1;
        Ok(())
    }

    fn unmap(&self, mapping: &Arc<Mapping>) {
        let mut book = self.book.lock().unwrap();
        book.threads.push(std::thread::current().name().map(str::to_owned));
        while book.unmaps_wait {
            book = self.changed.wait(book).unwrap();
        }
        let gone = range(mapping);
        let before = book.mapped.len();
        book.mapped.retain(|old| *old != gone);
        if book.mapped.len() + 1 != before {
            book.wrongs.push(format!("{gone:x?} is unmapped, but was not mapped"));
        }
        if book.out.iter().any(|out| out.1 < gone.1 && gone.0 < out.2) {
            book.wrongs.push(format!("{gone:x?} is unmapped under a request"));
        }
        book.unmaps_count += 1;
    }

    fn offset(&self) -> IovaOffset {
        IovaOffset(0)
    }
}

/// A RAM disk that claims to move data by itself.
#[derive(Debug)]
struct Watched {
    ram: MallocBdev,
    watch: Arc<Watch>,
}

impl Bdev for Watched {
    fn info(&self) -> &Arc<BdevInfo> {
        self.ram.info()
    }

    fn open_channel(&self, home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let (seed, watch) = (self.ram.open_channel(home)?, Arc::clone(&self.watch));
        Ok(Box::new(move |io| {
            let inner = seed(io)?;
            Ok(Box::new(WatchedChannel { inner, watch }))
        }))
    }

    fn dma(&self) -> Option<Arc<dyn DmaDomain>> {
        Some(Arc::clone(&self.watch) as _)
    }
}

struct WatchedChannel {
    inner: Box<dyn Channel>,
    watch: Arc<Watch>,
}

impl Channel for WatchedChannel {
    fn room(&self, io: &IoCx) -> Room {
        self.inner.room(io)
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let taken = self.inner.submit(io, batch);
        let mut book = self.watch.book.lock().unwrap();
        for request in &batch.requests()[..taken] {
            for segment in batch.segments(request) {
                let (from, len) = (segment.host().0, usize::try_from(segment.len_bytes()).unwrap());
                let is_in = |map: &(usize, usize)| map.0 <= from && from + len <= map.1;
                if !book.mapped.iter().any(is_in) {
                    book.wrongs.push(format!("a request at {from:#x}+{len:#x}, out of reach"));
                }
                let Tag(tag) = request.tag;
                book.out.push((tag, from, from + len));
            }
        }
        taken
    }

    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        if self.watch.holds.load(Ordering::Relaxed) {
            return;
        }
        self.inner.poll(io, done);
        let mut book = self.watch.book.lock().unwrap();
        for completion in done.iter() {
            let Tag(tag) = completion.tag;
            if let Some(at) = book.out.iter().position(|out| out.0 == tag) {
                book.out.swap_remove(at);
            }
        }
    }

    fn inflight(&self) -> usize {
        self.inner.inflight()
    }

    fn must_poll(&self) -> bool {
        true
    }

    fn close(&mut self, io: &mut IoCx) {
        self.inner.close(io);
    }
}

fn wait_for(mut reached: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !reached() {
        if start.elapsed() > WAIT_MAX {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// A controller over the watched disk.
struct Rig {
    host: Host,
    watch: Arc<Watch>,
}

impl Rig {
    fn start(pin: bool) -> Rig {
        install_sigbus_handler().expect("a handler");
        let book = Book {
            mood: Mood::Takes,
            unmaps_wait: false,
            mapped: Vec::new(),
            maps_count: 0,
            unmaps_count: 0,
            asked_count: 0,
            threads: Vec::new(),
            out: Vec::new(),
            wrongs: Vec::new(),
        };
        let (changed, holds) = (Condvar::new(), AtomicBool::new(false));
        let watch = Arc::new(Watch { book: Mutex::new(book), changed, holds });
        let options = MallocOptions { blocks_count: 16384, block_bytes: 512, uuid: None };
        let ram = MallocBdev::new("watched", &options).expect("memory");
        let watched = Arc::new(Watched { ram, watch: Arc::clone(&watch) });
        Rig { host: Host::start(watched, 1, (2, pin), |_, _| {}), watch }
    }

    fn remove_bdev(&self) {
        self.host.order(|_, registry| drop(registry.remove("watched")));
    }

    /// Waits until the control thread has heard that it goes.
    fn removal_is_heard(&self) {
        assert!(wait_for(|| self.host.ask(|controller| controller.bdev().is_none())));
    }

    /// Whether no ring can use it any more.
    fn has_lost_bdev(&self) -> bool {
        let (answer, answered) = mpsc::channel();
        self.host.order(move |_, registry| drop(answer.send(registry.get("watched").map(drop))));
        answered.recv_timeout(WAIT_MAX).expect("an answer").is_err()
    }

    /// Each session: whether its rings may run, and whether its memory is pinned.
    fn views(&self) -> Vec<(bool, PinView)> {
        self.host.ask(|controller| {
            controller.sessions().into_iter().map(|view| (view.active, view.pin)).collect()
        })
    }

    #[track_caller]
    fn expect_views(&self, wanted: &[(bool, PinView)]) {
        let reached = wait_for(|| self.views() == wanted);
        assert!(reached, "{:?} instead of {wanted:?}", self.views());
    }

    fn connect(&self) -> FrontEnd {
        FrontEnd::connect(&self.host.socket(), F_FLUSH, ALL)
    }

    /// A front-end that has described its memory, and a ring that it has not started.
    fn prepared(&self) -> (FrontEnd, Load, Memory) {
        self.prepared_at(0)
    }

    /// The same with another ring, which uses another part of the disk.
    fn prepared_at(&self, ring: u32) -> (FrontEnd, Load, Memory) {
        let mut front = self.connect();
        let (rings, data) = (Memory::new(0, RINGS_BYTES), Memory::new(DATA_GUEST, DATA_LEN));
        front.set_memory(&[&rings, &data]);
        (front, Load::new(rings, ring, SLOTS, DATA_GUEST), data)
    }

    fn running(&self) -> (FrontEnd, Load, Memory) {
        let (mut front, mut load, data) = self.prepared();
        front.start(&load.ring, 0);
        load.run(&data, 40);
        (front, load, data)
    }

    /// Ends the controller; everything must be unmapped then.
    fn end(mut self) {
        self.host.end();
        let (maps, unmaps) = self.watch.counts();
        assert_eq!(maps, unmaps, "what was mapped is unmapped");
        let longest = self.host.longest();
        assert!(longest < Duration::from_secs(2), "the control thread was away for {longest:?}");
        let book = self.watch.book.lock().unwrap();
        let own =
            |name: &Option<String>| matches!(name.as_deref(), Some("map-memory" | "unmap-memory"));
        assert!(book.threads.iter().all(own), "{:?}", book.threads);
    }
}

#[test]
fn memory_is_mapped_before_rings_start_and_not_for_those_who_only_connect() {
    let rig = Rig::start(true);
    let (mut front, mut load, data) = rig.prepared();
    rig.expect_views(&[(false, PinView::Pinning)]);
    assert_eq!(rig.watch.counts(), (0, 0), "a front-end without rings pins nothing");
    rig.watch.set(Mood::Waits);
    // All of the ring's messages are answered while its memory is being mapped.
    front.start(&load.ring, 0);
    rig.watch.asked(1);
    rig.expect_views(&[(true, PinView::Pinning)]);
    load.submit(&data);
    std::thread::sleep(MOMENT);
    assert_eq!(load.poll(&[&data]), 0, "the ring runs before its memory is mapped");
    rig.watch.set(Mood::Takes);
    load.run(&data, 100);
    rig.watch.expect(2, 0);
    rig.expect_views(&[(true, PinView::On)]);
    load.drain(&[&data]);
    drop(front);
    rig.watch.expect(2, 2);
    rig.end();
}

#[test]
fn only_new_memory_is_mapped_and_removed_memory_unmapped_after_its_requests() {
    let rig = Rig::start(false);
    let (mut front, mut load, data) = rig.running();
    rig.watch.expect(2, 0);
    let more = Memory::new(MORE_GUEST, DATA_LEN);
    for round in 0..5 {
        load.drain(&[&data]);
        front.add_memory(&more);
        assert_eq!(rig.watch.counts(), (3 + round, round), "round {round}: only the new region");
        load.data_guest = MORE_GUEST;
        load.run(&more, 50);
        load.drain(&[&more]);
        load.data_guest = DATA_GUEST;
        load.submit(&data);
        front.remove_memory(&more);
        assert_eq!(rig.watch.counts(), (3 + round, round + 1), "round {round}: before the answer");
        load.run(&data, 50);
    }
    load.drain(&[&data]);
    drop(front);
    rig.watch.expect(7, 7);
    rig.end();
}

#[test]
fn a_request_that_is_out_keeps_its_memory_mapped() {
    let rig = Rig::start(false);
    let (mut front, mut load, data) = rig.running();
    load.drain(&[&data]);
    rig.watch.holds.store(true, Ordering::Relaxed);
    load.submit(&data);
    assert!(wait_for(|| rig.watch.out_count() >= usize::from(SLOTS)));
    let watch = Arc::clone(&rig.watch);
    let late = std::thread::spawn(move || {
        std::thread::sleep(MOMENT);
        let before = watch.counts();
        watch.holds.store(false, Ordering::Relaxed);
        before
    });
    front.remove_memory(&data);
    assert_eq!(late.join().expect("a thread"), (2, 0), "unmapped under requests");
    rig.watch.expect(2, 1);
    drop(front);
    rig.watch.expect(2, 2);
    rig.end();
}

#[test]
fn memory_that_cannot_be_mapped_is_refused_and_the_old_table_stays() {
    let rig = Rig::start(false);
    let (mut front, mut load, data) = rig.running();
    let more = Memory::new(MORE_GUEST, DATA_LEN);
    for _ in 0..3 {
        load.submit(&data);
        rig.watch.set(Mood::Refuses);
        assert_ne!(front.add_memory_answer(&more), 0, "refused");
        assert_eq!(rig.watch.counts(), (2, 0));
        rig.expect_views(&[(true, PinView::On)]);
        load.run(&data, 50);
        // A whole table with something new in it.
        assert_ne!(front.set_memory_answer(&[&load.memory, &data, &more]), 0, "refused");
        assert_eq!(rig.watch.counts(), (2, 0), "nothing of it was left, nothing was taken");
        rig.watch.set(Mood::Takes);
        load.run(&data, 50);
    }
    front.add_memory(&more);
    rig.watch.expect(3, 0);
    load.drain(&[&data]);
    load.data_guest = MORE_GUEST;
    load.run(&more, 50);
    load.drain(&[&more]);
    drop(front);
    rig.watch.expect(3, 3);
    rig.end();
}

#[test]
fn a_table_that_is_described_again_is_not_mapped_again() {
    let rig = Rig::start(false);
    let (mut front, mut load, data) = rig.running();
    load.submit(&data);
    front.set_memory(&[&load.memory, &data]);
    assert_eq!(rig.watch.counts(), (2, 0));
    load.run(&data, 50);
    load.drain(&[&data]);
    // The same addresses in another file are another memory.
    let other = Memory::new(DATA_GUEST, DATA_LEN);
    front.set_memory(&[&load.memory, &other]);
    rig.watch.expect(3, 1);
    load.run(&other, 50);
    load.drain(&[&other]);
    // A guest that starts anew finds its memory mapped.
    let base = front.stop(&load.ring);
    front.set_memory(&[&load.memory, &other]);
    front.start(&load.ring, base);
    load.run(&other, 50);
    load.drain(&[&other]);
    rig.watch.expect(3, 1);
    drop(front);
    rig.watch.expect(3, 3);
    rig.end();
}

#[test]
fn a_front_end_whose_memory_cannot_be_mapped_is_sent_away() {
    let rig = Rig::start(false);
    rig.watch.set(Mood::Refuses);
    let (mut front, load, data) = rig.prepared();
    front.start_blindly(&load.ring, 0);
    assert!(front.is_sent_away(WAIT_MAX), "there is no message to refuse");
    rig.expect_views(&[]);
    assert_eq!(rig.watch.counts(), (0, 0));
    rig.watch.set(Mood::Takes);
    drop((front, load, data));
    let (front, mut load, data) = rig.running();
    load.drain(&[&data]);
    drop(front);
    rig.watch.expect(2, 2);
    rig.end();
}

#[test]
fn a_session_that_ends_while_its_memory_is_mapped_leaves_nothing_behind() {
    let rig = Rig::start(false);
    rig.watch.set(Mood::Waits);
    let (mut front, load, _data) = rig.prepared();
    front.start(&load.ring, 0);
    rig.watch.asked(1);
    drop(front);
    // The next one waits until that is over.
    let (mut second, mut load, data) = rig.prepared();
    second.start(&load.ring, 0);
    std::thread::sleep(MOMENT);
    assert_eq!(rig.watch.book.lock().unwrap().asked_count, 1);
    rig.watch.set(Mood::Takes);
    load.run(&data, 50);
    load.drain(&[&data]);
    // Of the first one's two regions the second was not begun any more.
    rig.watch.expect(3, 1);
    // The same in the middle of a message.
    let more = Memory::new(MORE_GUEST, DATA_LEN);
    rig.watch.set(Mood::Waits);
    second.send_add_memory(&more);
    rig.watch.asked(4);
    drop(second);
    std::thread::sleep(MOMENT);
    rig.watch.set(Mood::Takes);
    rig.watch.expect(4, 4);
    rig.expect_views(&[]);
    rig.end();
}

#[test]
fn one_front_end_at_a_time_has_its_memory_pinned() {
    let rig = Rig::start(false);
    let (mut first, mut load, data) = rig.running();
    let (mut second, mut load2, data2) = rig.prepared_at(1);
    second.start(&load2.ring, 0);
    load.run(&data, 50);
    rig.expect_views(&[(true, PinView::On), (false, PinView::Pinning)]);
    rig.watch.expect(2, 0);
    // The first one's guest stops its driver: its memory goes before the second one's comes.
    load.drain(&[&data]);
    rig.watch.let_unmaps_wait(true);
    let base = first.stop(&load.ring);
    std::thread::sleep(MOMENT);
    assert_eq!(rig.watch.counts(), (2, 0));
    rig.watch.let_unmaps_wait(false);
    load2.run(&data2, 50);
    rig.watch.expect(4, 2);
    rig.expect_views(&[(false, PinView::Pinning), (true, PinView::On)]);
    // And back, when the second one leaves.
    first.start(&load.ring, base);
    load2.drain(&[&data2]);
    drop(second);
    load.run(&data, 50);
    load.drain(&[&data]);
    rig.watch.expect(6, 4);
    drop(first);
    rig.watch.expect(6, 6);
    rig.end();
}

#[test]
fn a_ring_that_is_stopped_before_its_memory_is_mapped_never_runs() {
    let rig = Rig::start(false);
    rig.watch.set(Mood::Waits);
    let (mut front, mut load, data) = rig.prepared();
    front.start(&load.ring, 0);
    rig.watch.asked(1);
    load.submit(&data);
    assert_eq!(front.stop(&load.ring), 0, "answered at once, where it would have begun");
    rig.watch.set(Mood::Takes);
    rig.watch.expect(2, 0);
    std::thread::sleep(MOMENT);
    assert_eq!(load.poll(&[&data]), 0);
    front.start(&load.ring, 0);
    load.run(&data, 50);
    load.drain(&[&data]);
    drop(front);
    rig.watch.expect(2, 2);
    rig.end();
}

#[test]
fn memory_that_is_added_while_the_rest_is_mapped_is_mapped_after_it() {
    let rig = Rig::start(false);
    rig.watch.set(Mood::Waits);
    let (mut front, mut load, data) = rig.prepared();
    front.start(&load.ring, 0);
    rig.watch.asked(1);
    let (more, other) = (Memory::new(MORE_GUEST, DATA_LEN), Memory::new(0xc000_0000, DATA_LEN));
    front.send_add_memory(&more);
    std::thread::sleep(MOMENT);
    rig.watch.set(Mood::Takes);
    front.added();
    assert_eq!(rig.watch.counts(), (3, 0), "each once");
    front.add_memory(&other);
    load.run(&data, 50);
    load.drain(&[&data]);
    load.data_guest = MORE_GUEST;
    load.run(&more, 50);
    load.drain(&[&more]);
    drop(front);
    rig.watch.expect(4, 4);
    rig.end();
}

#[test]
fn a_bdev_that_goes_leaves_no_memory_mapped() {
    let rig = Rig::start(false);
    let (mut front, mut load, data) = rig.running();
    load.tolerates_errors = true;
    load.submit(&data);
    rig.remove_bdev();
    rig.watch.expect(2, 2);
    load.run(&data, 50);
    assert!(load.failed_count > 0);
    // Its memory may still change.
    let more = Memory::new(MORE_GUEST, DATA_LEN);
    front.add_memory(&more);
    load.run(&data, 50);
    assert_eq!(rig.watch.counts(), (2, 2));
    rig.expect_views(&[(true, PinView::Off)]);
    drop(front);
    rig.end();
}

#[test]
fn a_bdev_that_goes_while_memory_is_mapped_lets_rings_answer() {
    let rig = Rig::start(false);
    rig.watch.set(Mood::Waits);
    let (mut front, mut load, data) = rig.prepared();
    load.tolerates_errors = true;
    front.start(&load.ring, 0);
    rig.watch.asked(1);
    rig.remove_bdev();
    rig.removal_is_heard();
    rig.watch.set(Mood::Refuses);
    load.run(&data, 50);
    assert_eq!(load.failed_count, load.completed_count);
    load.drain(&[&data]);
    drop(front);
    rig.end();
}

#[test]
fn who_comes_while_the_device_is_being_lost_stays_and_gets_errors() {
    let rig = Rig::start(false);
    rig.watch.set(Mood::Gone);
    let (mut front, mut load, data) = rig.prepared();
    load.tolerates_errors = true;
    front.start(&load.ring, 0);
    rig.watch.asked(1);
    // More memory, which a front-end must be able to add to a running device.
    let more = Memory::new(MORE_GUEST, DATA_LEN);
    front.add_memory(&more);
    rig.remove_bdev();
    assert!(wait_for(|| rig.has_lost_bdev()));
    load.run(&data, 50);
    assert_eq!(load.failed_count, load.completed_count);
    load.drain(&[&data]);
    assert_eq!(rig.watch.counts(), (0, 0));
    drop(front);
    rig.end();
}

#[test]
fn what_a_front_end_says_while_the_bdev_goes_keeps_nothing_mapped() {
    let rig = Rig::start(false);
    let (mut front, mut load, data) = rig.running();
    load.tolerates_errors = true;
    load.drain(&[&data]);
    rig.watch.holds.store(true, Ordering::Relaxed);
    load.submit(&data);
    assert!(wait_for(|| rig.watch.out_count() > 0));
    rig.remove_bdev();
    std::thread::sleep(MOMENT);
    // Both come while rings are still letting go of the bdev: another ring, and more memory.
    let second = Load::new(Memory::new(0, RINGS_BYTES), 1, SLOTS, DATA_GUEST);
    front.send_start(&second.ring, 0);
    let more = Memory::new(MORE_GUEST, DATA_LEN);
    front.send_add_memory(&more);
    std::thread::sleep(MOMENT);
    assert_eq!(rig.watch.counts(), (2, 0), "requests are out");
    rig.watch.holds.store(false, Ordering::Relaxed);
    front.added();
    rig.watch.expect(2, 2);
    load.run(&data, 50);
    rig.expect_views(&[(true, PinView::Off)]);
    rig.watch.expect(2, 2);
    drop(front);
    rig.end();
}

#[test]
fn a_bdev_that_goes_while_memory_is_added_ends_that_without_a_refusal() {
    for mood in [Mood::Refuses, Mood::Takes] {
        let rig = Rig::start(false);
        let (mut front, mut load, data) = rig.running();
        load.tolerates_errors = true;
        load.submit(&data);
        rig.watch.set(Mood::Waits);
        let more = Memory::new(MORE_GUEST, DATA_LEN);
        front.send_add_memory(&more);
        rig.watch.asked(3);
        rig.remove_bdev();
        rig.removal_is_heard();
        rig.watch.set(mood);
        front.added();
        let maps = if mood == Mood::Takes { 3 } else { 2 };
        rig.watch.expect(maps, maps);
        load.run(&data, 50);
        rig.expect_views(&[(true, PinView::Off)]);
        drop(front);
        rig.end();
    }
}
