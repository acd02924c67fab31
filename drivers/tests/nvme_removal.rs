//! The end of an NVMe controller that is wanted back: in time, whatever hangs, and with nothing left behind.

mod nvme;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nvme::{Heard, PAGE, Rig, all_ok, namespace, patient, quick, sleepy, until, writes_during};
use ringmill_core::IoStatus;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::mem::DmaDomain;
use ringmill_core::reactor::ReactorHandle;
use ringmill_core::spec::nvme::{Status, admin};
use ringmill_drivers::model::{
    Aborts, Action, Match, ModelBacking, ModelControl, ModelOptions, ModelRegisters, start,
};
use ringmill_drivers::nvme::{ControllerState, NvmeControl, NvmeOptions, attach};
use ringmill_drivers::pci::{DeviceNews, PciBacking, PciError};

/// What closing may take, as `PciBacking` has it at worst.
const CLOSE: Duration = Duration::from_secs(2);

/// What all of it may take: 5 s, and what a busy machine adds.
const BOUND: Duration = Duration::from_secs(7);

/// The same where nothing but closing and a reactor at the very end is waited for: 3 s and what a busy machine adds.
const BOUND_SOON: Duration = Duration::from_secs(6);

/// A model whose function reset does not come back and whose close takes as long as it may.
#[derive(Debug)]
struct Slow {
    inner: ModelBacking,
    hangs: Arc<AtomicBool>,
    in_reset: Arc<AtomicBool>,
    is_closing: AtomicBool,
    is_closed: Arc<AtomicBool>,
    can_be_silenced: Arc<AtomicBool>,
    is_silenced: Arc<AtomicBool>,
}

impl PciBacking for Slow {
    type Registers = ModelRegisters;

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn dma(&self) -> Arc<dyn DmaDomain> {
        self.inner.dma()
    }

    fn registers(&self, bar: u8, len_bytes_min: usize) -> Result<Arc<ModelRegisters>, PciError> {
        self.inner.registers(bar, len_bytes_min)
    }

    fn config_read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), PciError> {
        self.inner.config_read(offset_bytes, into)
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        self.inner.set_bus_master(on)
    }

    fn reset(&self) -> Result<(), PciError> {
        self.in_reset.store(true, Ordering::Release);
        while self.hangs.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inner.reset()
    }

    fn vectors_count(&self) -> u16 {
        self.inner.vectors_count()
    }

    fn bind_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        self.inner.bind_vector(vector, eventfd)
    }

    fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.news_fd()
    }

    fn news(&self) -> Option<DeviceNews> {
        self.inner.news()
    }

    fn silence(&self) -> bool {
        let can = self.can_be_silenced.load(Ordering::Acquire);
        let is_silenced = can && self.inner.set_bus_master(false).is_ok();
        self.is_silenced.store(is_silenced, Ordering::Release);
        is_silenced
    }

    fn close(&self) {
        if !self.is_closing.swap(true, Ordering::AcqRel) {
            std::thread::sleep(CLOSE);
            self.inner.close();
            self.is_closed.store(true, Ordering::Release);
        }
    }
}

/// Lets go of what hangs, also when a test fails.
struct Hangs(Arc<AtomicBool>);

impl Drop for Hangs {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A controller that answers nothing any more, with requests out on a reactor that does nothing either.
struct Hung {
    /// First, to be dropped first.
    hangs: Hangs,
    model: ModelControl,
    control: Arc<dyn NvmeControl>,
    heard: Heard,
    reactor: ReactorHandle,
    disk: CrossBdev,
    bed: TestBed,
    in_reset: Arc<AtomicBool>,
    is_closed: Arc<AtomicBool>,
    can_be_silenced: Arc<AtomicBool>,
    is_silenced: Arc<AtomicBool>,
}

const OUT: usize = 4;

#[derive(Clone, Copy)]
enum Removal {
    /// Somebody wants it back.
    Asked,
    /// It is not there any more, and nobody says so.
    Silent,
}

impl Hung {
    fn new(namespaces: u32) -> Hung {
        // Its own word for how long it may take is far more than anybody waits.
        let options = ModelOptions { ready_timeout_500ms: 100, ..ModelOptions::default() };
        let all = (1..=namespaces).map(|nsid| namespace(nsid, 9)).collect();
        let (inner, model) = start(options, all).unwrap();
        let flag = || Arc::new(AtomicBool::new(false));
        let (hangs, in_reset, is_closed) = (flag(), flag(), flag());
        let (can_be_silenced, is_silenced) = (flag(), flag());
        let backing = Slow {
            inner,
            hangs: Arc::clone(&hangs),
            in_reset: Arc::clone(&in_reset),
            is_closing: AtomicBool::new(false),
            is_closed: Arc::clone(&is_closed),
            can_be_silenced: Arc::clone(&can_be_silenced),
            is_silenced: Arc::clone(&is_silenced),
        };
        let (heard, reactor) = (Heard::default(), sleepy());
        let patient = NvmeOptions {
            timeout_admin: Duration::from_secs(60),
            ready_timeout_max: Duration::from_secs(60),
            ..patient()
        };
        let reactors = [reactor.clone()];
        let control = attach(backing, patient, &reactors, heard.listener()).unwrap();
        let bdev = control.namespaces().remove(0).bdev.expect("a disk");
        let disk = CrossBdev::new(bdev, reactors.to_vec()).unwrap();
        let mut bed = TestBed::new(&disk);
        all_ok(&writes_during(&mut bed, 4, || {}));
        model.rule(Match::any_io(), Action::Swallow);
        for at in 0..OUT {
            let segment = bed.segment(at, 0, 4096);
            bed.offer(IoOp::Write, IoFlags::NONE, at as u64 * PAGE, PAGE, &[segment]).unwrap();
        }
        until("requests that are out", || {
            bed.turn(|_, _| panic!("nobody answers"));
            model.held() == OUT
        });
        hangs.store(true, Ordering::Release);
        let hangs = Hangs(hangs);
        Hung {
            hangs,
            model,
            control,
            heard,
            reactor,
            disk,
            bed,
            in_reset,
            is_closed,
            can_be_silenced,
            is_silenced,
        }
    }

    /// Its reactor does something else until this has become false.
    fn stop_reactor(&self) {
        let (hangs, (sender, began)) = (Arc::clone(&self.hangs.0), std::sync::mpsc::channel());
        let work = move |_: &mut ringmill_core::reactor::Reactor| {
            sender.send(()).unwrap();
            while hangs.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        assert!(self.reactor.try_send(Box::new(work)).is_ok());
        began.recv().unwrap();
    }

    /// Takes the device away, waits for the end, and looks at it.
    fn ends_in_time(self, removal: Removal, bound: Duration, is_over: impl Fn(&Hung) -> bool) {
        let start = Instant::now();
        match removal {
            Removal::Asked => self.model.tell(DeviceNews::Requested),
            Removal::Silent => self.model.vanish(false),
        }
        until("the end", || is_over(&self));
        let took = start.elapsed();
        assert!(took < bound, "{took:?}");
        assert!(self.is_closed.load(Ordering::Acquire), "it may still write to memory");
        assert_eq!(self.model.mapped_count(), 0, "unmapped");
        // Its reactor has done nothing yet, so that nothing has ended.
        assert_eq!(self.bed.out_count(), OUT);
        self.hangs.0.store(false, Ordering::Release);
        self.finish();
    }

    /// Its requests end, none before the device was cut off; then nothing is left.
    fn finish(mut self) {
        let mut ends = Vec::new();
        until("the end of all requests", || {
            self.bed.turn(|_, status| {
                let is_cut_off = [&self.is_closed, &self.is_silenced];
                let is_cut_off = is_cut_off.iter().any(|flag| flag.load(Ordering::Acquire));
                assert!(is_cut_off, "it may still write to memory");
                ends.push(status);
            });
            self.bed.out_count() == 0
        });
        assert_eq!(ends, [IoStatus::Gone; OUT]);
        self.bed.finish();
        drop(self.disk);
        self.control.detach();
        let left = || self.reactor.ask(|reactor| format!("{:?}", reactor.cx.io.devices)).unwrap();
        until("its pair is gone", || left() == "[]");
        self.reactor.stop();
    }

    fn ends_removed(self, bound: Duration) {
        self.ends_in_time(Removal::Asked, bound, |hung| hung.heard.removed().is_some());
    }
}

#[test]
fn a_removal_ends_in_time_when_nothing_answers() {
    let hung = Hung::new(1);
    hung.model.set_ready_stuck(true);
    hung.stop_reactor();
    hung.ends_removed(BOUND);
}

#[test]
fn a_removal_ends_in_time_in_a_reset_that_waits_for_reactors() {
    let hung = Hung::new(1);
    hung.model.set_ready_stuck(true);
    hung.stop_reactor();
    hung.model.tell(DeviceNews::Error);
    until("the reset", || hung.control.info().state == ControllerState::Resetting);
    hung.ends_removed(BOUND_SOON);
}

#[test]
fn a_device_that_is_not_there_ends_in_time_in_a_reset_that_waits_for_reactors() {
    let hung = Hung::new(1);
    hung.stop_reactor();
    hung.model.tell(DeviceNews::Error);
    until("the reset", || hung.control.info().state == ControllerState::Resetting);
    hung.ends_in_time(Removal::Silent, BOUND_SOON, |hung| hung.heard.removed().is_some());
}

#[test]
fn a_removal_ends_in_time_in_a_reset_that_waits_for_the_device() {
    let hung = Hung::new(1);
    hung.model.set_ready_stuck(true);
    hung.model.tell(DeviceNews::Error);
    until("the reset", || hung.control.info().state == ControllerState::Resetting);
    // Its reactor obeys Hold first.
    std::thread::sleep(Duration::from_millis(500));
    hung.stop_reactor();
    hung.ends_removed(BOUND);
}

#[test]
fn a_removal_ends_in_time_in_a_function_reset_that_never_comes_back() {
    let hung = Hung::new(1);
    // Its queues are refused after the first reset: the next one is of the function.
    hung.model.rule(Match::admin(admin::CREATE_CQ), Action::Status(Status(0x06)));
    hung.model.tell(DeviceNews::Error);
    until("the reset of the function", || hung.in_reset.load(Ordering::Acquire));
    hung.stop_reactor();
    hung.ends_removed(BOUND);
}

#[test]
fn a_removal_ends_in_time_in_a_command_without_an_answer() {
    let hung = Hung::new(1);
    hung.model.rule(Match::admin(admin::GET_LOG_PAGE), Action::Swallow);
    let (control, held) = (Arc::clone(&hung.control), hung.model.held());
    let asked = std::thread::spawn(move || control.health().is_err());
    until("the command", || hung.model.held() > held);
    hung.stop_reactor();
    hung.model.set_ready_stuck(true);
    hung.ends_removed(BOUND);
    assert!(asked.join().unwrap());
}

#[test]
fn a_removal_ends_in_time_among_many_commands_that_are_only_slow() {
    let hung = Hung::new(40);
    let slow = Action::Delay(Duration::from_millis(200));
    hung.model.rule(Match::admin(admin::IDENTIFY), slow);
    let (bdev, held) = (hung.control.namespaces().remove(0).bdev.unwrap(), hung.model.held());
    let asked = std::thread::spawn(move || bdev.rescan().is_err());
    until("the command", || hung.model.held() > held);
    hung.stop_reactor();
    hung.ends_removed(BOUND);
    assert!(asked.join().unwrap());
}

#[test]
fn a_removal_ends_in_time_in_a_detach() {
    for in_shutdown in [false, true] {
        let hung = Hung::new(1);
        if in_shutdown {
            hung.model.set_shutdown_stuck(true);
        } else {
            hung.model.rule(Match::admin(admin::DELETE_SQ), Action::Swallow);
        }
        hung.model.set_aborts(Aborts::Silent);
        hung.model.set_ready_stuck(true);
        hung.stop_reactor();
        let (control, deleted) = (Arc::clone(&hung.control), hung.model.clone());
        let detach = std::thread::spawn(move || control.detach());
        until("its queues are deleted", || deleted.counters().admin(admin::DELETE_SQ) > 0);
        hung.ends_in_time(Removal::Asked, BOUND, |hung| {
            hung.control.info().state == ControllerState::Detached
        });
        detach.join().unwrap();
    }
}

#[test]
fn nothing_ends_before_the_device_is_cut_off() {
    // Its reactor does all that it is told at once; closing takes 2 s.
    for in_reset in [false, true] {
        let hung = Hung::new(1);
        if in_reset {
            hung.model.rule(Match::admin(admin::CREATE_CQ), Action::Status(Status(0x06)));
            hung.model.tell(DeviceNews::Error);
            until("the reset of the function", || hung.in_reset.load(Ordering::Acquire));
        } else {
            hung.model.set_ready_stuck(true);
        }
        hung.model.tell(DeviceNews::Requested);
        hung.finish();
    }
}

#[test]
fn nobody_waits_for_the_close_of_a_device_that_was_silenced() {
    let mut hung = Hung::new(1);
    hung.can_be_silenced.store(true, Ordering::Release);
    hung.model.set_ready_stuck(true);
    hung.model.tell(DeviceNews::Requested);
    until("the first end", || {
        hung.bed.turn(|_, status| assert_eq!(status, IoStatus::Gone));
        hung.bed.out_count() == 0
    });
    assert!(hung.is_silenced.load(Ordering::Acquire));
    assert!(!hung.is_closed.load(Ordering::Acquire), "closing takes 2 s");
    until("the close", || hung.is_closed.load(Ordering::Acquire));
}

#[test]
fn a_pair_that_is_in_use_goes_with_the_last_of_its_channels() {
    let reactor = sleepy();
    let reactors = [reactor.clone()];
    let rig = Rig::with(quick(), vec![namespace(1, 9), namespace(2, 12)], patient(), &reactors);
    let disks = [1, 2].map(|nsid| CrossBdev::new(rig.bdev(nsid), reactors.to_vec()).unwrap());
    let mut beds = disks.each_ref().map(|disk| TestBed::new(disk));
    for bed in &mut beds {
        all_ok(&writes_during(bed, 8, || {}));
    }
    rig.control.detach();
    let left = || reactor.ask(|reactor| format!("{:?}", reactor.cx.io.devices)).unwrap();
    assert_ne!(left(), "[]", "it has channels");
    let [mut first, second] = beds;
    let segment = first.segment(0, 0, 4096);
    assert_eq!(first.run(IoOp::Read, IoFlags::NONE, 0, PAGE, &[segment]), IoStatus::Gone);
    let [one, two] = disks;
    first.finish();
    drop(one);
    assert_ne!(left(), "[]", "it has another one");
    second.finish();
    drop(two);
    until("the end of the pair", || left() == "[]");
    rig.finish();
    reactor.stop();
}

#[test]
fn nothing_that_was_sent_before_a_shutdown_is_found_after_it() {
    // The last that attaching and a reset send are event requests, for which nobody waits.
    for round in 0..60 {
        let rig = Rig::new(quick(), patient());
        if round % 2 == 1 {
            rig.control.reset().expect("a reset");
        }
        rig.finish();
    }
}
