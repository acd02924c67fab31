//! How NVMe controllers come back after a reset, and what is asked again after a refusal.

mod nvme;

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nvme::{
    PAGE, Rig, all_ok, is_written, namespace, patient, quick, sleepy, until, writes_during,
};
use ringmill_core::IoStatus;
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::spec::nvme::{Status, admin, status};
use ringmill_drivers::model::{
    Action, Count, MapFailure, Match, ModelControl, ModelOptions, Vectors,
};
use ringmill_drivers::nvme::{ControllerState, NvmeOptions};
use ringmill_drivers::pci::DeviceNews;

const BUSY: Status = Status(0x06);

/// A controller whose pair is on a sleeping reactor, and its disk for threads that are none.
fn on_reactor(
    model: ModelOptions,
    options: NvmeOptions,
) -> (Rig, CrossBdev, ringmill_core::reactor::ReactorHandle) {
    let reactor = sleepy();
    let rig = Rig::with(model, vec![namespace(1, 9)], options, std::slice::from_ref(&reactor));
    let disk = CrossBdev::new(rig.bdev(1), vec![reactor.clone()]).unwrap();
    (rig, disk, reactor)
}

#[test]
fn queues_that_are_refused_after_a_reset_are_made_after_another_one() {
    for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
        // Its pair obeys only after the reset is over, so that its queues are made later than all others.
        let rig = Rig::new(quick(), patient());
        let mut bed = TestBed::new(&*rig.bdev(1));
        all_ok(&writes_during(&mut bed, 9, || {}));
        rig.control.reset().expect("a reset that waits for nobody");
        rig.model.rule(Match::admin(opcode).once(), Action::Status(BUSY));
        all_ok(&writes_during(&mut bed, 16, || {}));
        is_written(&mut bed, 16);
        assert_eq!(rig.counters().resets, 2, "one for the refusal");
        bed.finish();
        rig.finish();
        // Within the reset: the function is reset as well.
        let (rig, disk, reactor) = on_reactor(quick(), patient());
        let mut bed = TestBed::new(&disk);
        all_ok(&writes_during(&mut bed, 9, || {}));
        rig.model.rule(Match::admin(opcode).once(), Action::Status(BUSY));
        let control = Arc::clone(&rig.control);
        all_ok(&writes_during(&mut bed, 16, || control.reset().expect("a second try")));
        is_written(&mut bed, 16);
        assert_eq!((rig.counters().resets, rig.model.count(Count::Resets)), (1, 1));
        bed.finish();
        drop(disk);
        rig.finish();
        reactor.stop();
    }
}

#[test]
fn queues_that_are_refused_for_ever_end_every_request() {
    let gone_for = |ends: &[IoStatus]| {
        assert!(ends.iter().all(|end| *end == IoStatus::Reset), "{ends:?}");
    };
    let rig = Rig::new(quick(), patient());
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 9, || {}));
    rig.control.reset().expect("a reset that waits for nobody");
    rig.model.rule(Match::admin(admin::CREATE_SQ), Action::Status(BUSY));
    gone_for(&writes_during(&mut bed, 16, || {}));
    until("the end", || rig.heard.removed().is_some());
    assert_eq!(rig.state(), ControllerState::Failed);
    bed.finish();
    rig.finish();

    let (rig, disk, reactor) = on_reactor(quick(), patient());
    let mut bed = TestBed::new(&disk);
    rig.model.rule(Match::any_io(), Action::Swallow);
    rig.model.rule(Match::admin(admin::CREATE_SQ), Action::Status(BUSY));
    let control = Arc::clone(&rig.control);
    gone_for(&writes_during(&mut bed, 16, || assert!(control.reset().is_err())));
    let words = rig.heard.removed().expect("told");
    assert!(words.contains("create I/O submission queue"), "{words}");
    bed.finish();
    drop(disk);
    rig.finish();
    reactor.stop();
}

#[test]
fn no_level_is_lost_and_none_stays_up() {
    let model = ModelOptions { vectors: Vectors::Intx, ..quick() };
    let (rig, disk, reactor) = on_reactor(model, patient());
    let mut bed = TestBed::new(&disk);
    for round in 0..40 {
        // Longer than its reactor stays awake, so that each one is ended by an interrupt.
        rig.model.set_latency(Duration::from_millis(2));
        all_ok(&writes_during(&mut bed, 1 + round % 3, || {}));
    }
    assert!(rig.model.count(Count::Interrupts) > 10, "they were what ended its sleep");
    // Nothing is out: a level that is still up would come again each time that it is unmasked.
    let before = rig.model.count(Count::Interrupts);
    std::thread::sleep(Duration::from_millis(500));
    let idle = rig.model.count(Count::Interrupts) - before;
    assert!(idle < 20, "{idle} interrupts with nothing out");
    assert_eq!((rig.counters().timeouts, rig.counters().resets), (0, 0));
    bed.finish();
    drop(disk);
    rig.finish();
    reactor.stop();
}

/// With one event request, so that one that is not sent again is the last.
fn one_event() -> ModelOptions {
    ModelOptions { events_max: 1, ..quick() }
}

fn nsids(rig: &Rig) -> Vec<u32> {
    rig.control.namespaces().iter().map(|n| n.info.nsid).collect()
}

#[test]
fn events_are_asked_for_again_after_a_refusal() {
    let rig = Rig::with(one_event(), vec![namespace(1, 9)], patient(), &[]);
    // Log pages are not to be had at all; who is there can be asked.
    rig.model.rule(Match::admin(admin::GET_LOG_PAGE), Action::Status(BUSY));
    rig.model.set_health(2, 400);
    until("the event", || rig.counters().events == 1);
    rig.model.attach_namespace(namespace(3, 9));
    until("the next event", || nsids(&rig) == [1, 3]);
    assert_eq!(rig.counters().resets, 0);
    rig.finish();
}

#[test]
fn events_are_asked_for_again_after_a_reset() {
    let rig = Rig::with(one_event(), vec![namespace(1, 9)], patient(), &[]);
    rig.control.reset().expect("a reset");
    rig.model.attach_namespace(namespace(4, 9));
    until("an event", || nsids(&rig) == [1, 4]);
    assert_eq!((rig.counters().events, rig.counters().resets), (1, 1));
    rig.finish();
}

#[test]
fn what_an_event_asks_for_is_asked_again_until_it_is_answered() {
    let refused = |what: Match, times: u64| {
        let rig = Rig::with(one_event(), vec![namespace(1, 9)], patient(), &[]);
        // More often than one look at the namespaces asks.
        rig.model.rule(what.times(times), Action::Status(BUSY));
        rig.model.resize_namespace(1, 4096);
        until("the new size", || rig.control.namespaces()[0].info.blocks_count == 4096);
        assert_eq!((rig.counters().events, rig.counters().resets), (1, 0));
        // And the next one is heard: the log page was read.
        rig.model.attach_namespace(namespace(2, 9));
        until("the next event", || nsids(&rig) == [1, 2]);
        rig.finish();
    };
    refused(Match::admin(admin::IDENTIFY).of(1), 9);
    refused(Match::admin(admin::GET_LOG_PAGE), 2);
}

#[test]
fn a_bit_of_the_events_that_is_refused_costs_no_other() {
    let start = |model: &ModelControl| {
        // The first set features is for the number of queues, the second one has the health events.
        let health = Match::admin(admin::SET_FEATURES).after(1).once();
        model.rule(health, Action::Status(Status(status::INVALID_FIELD)));
    };
    let (control, model, heard) =
        Rig::try_new(one_event(), vec![namespace(1, 9)], patient(), &[], start);
    let rig = Rig { model, control: control.expect("an attached controller"), heard };
    assert_eq!(rig.model.counters().admin(admin::SET_FEATURES), 3);
    rig.model.attach_namespace(namespace(2, 9));
    until("the event", || nsids(&rig) == [1, 2]);
    rig.finish();
}

#[test]
fn an_event_whose_questions_are_never_answered_is_given_up() {
    let rig = Rig::with(one_event(), vec![namespace(1, 9)], patient(), &[]);
    let asked = || rig.model.counters().admin(admin::GET_LOG_PAGE);
    rig.model.rule(Match::admin(admin::GET_LOG_PAGE), Action::Status(BUSY));
    rig.model.resize_namespace(1, 4096);
    until("the new size", || rig.control.namespaces()[0].info.blocks_count == 4096);
    let mut last = (asked(), Instant::now());
    until("an end of the questions", || {
        if asked() != last.0 {
            last = (asked(), Instant::now());
        }
        // The longest pause between two of them is less.
        last.1.elapsed() > Duration::from_secs(4)
    });
    assert!((2..10).contains(&last.0), "{} times", last.0);
    assert_eq!((rig.state(), rig.counters().resets), (ControllerState::Enabled, 0));
    // Whoever asks for its namespaces finds it in a better mood: then the log page is read as well, and events come again.
    rig.model.clear_rules();
    rig.bdev(1).rescan().expect("asked for");
    until("the log page", || asked() > last.0);
    rig.model.attach_namespace(namespace(2, 9));
    until("the next event", || nsids(&rig) == [1, 2]);
    rig.finish();
}

#[test]
fn bounce_memory_is_mapped_when_a_controller_is_attached() {
    let (rig, disk, reactor) = on_reactor(quick(), patient());
    // Queues and bounce memory are there: nothing that a channel needs is to be mapped.
    rig.model.fail_dma_maps(Some((0, MapFailure::NoMemory)));
    let seed = rig.bdev(1).open_channel(Some(&reactor));
    rig.model.fail_dma_maps(None);
    drop(seed.expect("a channel without a map"));
    let mut bed = TestBed::new(&disk);
    // What is not whole blocks in memory is copied.
    let pieces = [bed.segment(0, 1, 4095), bed.segment(0, 4097, 1)];
    assert_eq!(bed.run(IoOp::Write, IoFlags::NONE, 0, PAGE, &pieces), IoStatus::Ok);
    bed.finish();
    drop(disk);
    rig.finish();
    reactor.stop();
}

#[test]
fn a_detached_controller_leaves_nothing_behind() {
    for removed in [false, true] {
        let (rig, disk, reactor) = on_reactor(quick(), patient());
        let mut bed = TestBed::new(&disk);
        all_ok(&writes_during(&mut bed, 4, || {}));
        let bdev = rig.bdev(1);
        let last: Weak<dyn Bdev> = Arc::downgrade(&bdev);
        if removed {
            rig.model.tell(DeviceNews::Requested);
            until("the event", || rig.heard.removed().is_some());
        }
        bed.finish();
        drop(disk);
        let Rig { model, control, .. } = rig;
        control.detach();
        assert!(control.namespaces().is_empty() && bdev.rescan().is_err());
        assert_eq!((model.complaint(), model.mapped_count()), (None, 0));
        drop(control);
        assert!(last.upgrade().is_some(), "somebody has it");
        drop(bdev);
        assert!(last.upgrade().is_none(), "held by what it holds");
        reactor.stop();
    }
}

/// Writes and reads before and after a reset that changes what there is of doorbells in memory.
fn across_a_reset(rig: &Rig, bed: &mut TestBed, change: impl Fn(&ModelControl)) {
    all_ok(&writes_during(bed, 16, || {}));
    change(&rig.model);
    for _ in 0..2 {
        let control = Arc::clone(&rig.control);
        all_ok(&writes_during(bed, 16, || control.reset().expect("a reset")));
        is_written(bed, 16);
        // Also after it has been quiet: who waits for a doorbell in memory sleeps then.
        std::thread::sleep(Duration::from_millis(20));
        all_ok(&writes_during(bed, 16, || {}));
        is_written(bed, 16);
    }
    assert_eq!((rig.counters().resets, rig.counters().timeouts), (2, 0));
}

#[test]
fn a_controller_without_doorbells_in_memory_after_a_reset_gets_registers() {
    let model = ModelOptions { doorbell_buffer: true, ..quick() };
    type Change = fn(&ModelControl);
    let refuses: Change = |model| {
        model.rule(Match::admin(admin::DOORBELL_BUFFER), Action::Status(Status(0x4001)));
    };
    for change in [|model: &ModelControl| model.set_doorbell_buffer(false), refuses] {
        let (rig, disk, reactor) = on_reactor(model.clone(), patient());
        assert!(rig.control.info().shadow_doorbells);
        let mut bed = TestBed::new(&disk);
        across_a_reset(&rig, &mut bed, change);
        assert!(!rig.control.info().shadow_doorbells);
        bed.finish();
        drop(disk);
        rig.finish();
        reactor.stop();
    }
}

#[test]
fn doorbells_in_memory_that_come_with_a_reset_are_left_alone() {
    // Not offered before, or refused: its pairs ring registers, and a device with those pages would not look there.
    let offers: fn(&ModelControl) = |model| model.set_doorbell_buffer(true);
    let takes: fn(&ModelControl) = |model| model.clear_rules();
    for (offered, change) in [(false, offers), (true, takes)] {
        let model = ModelOptions { doorbell_buffer: offered, ..quick() };
        let reactor = sleepy();
        let all = vec![namespace(1, 9)];
        let reactors = [reactor.clone()];
        let (control, model, heard) = Rig::try_new(model, all, patient(), &reactors, |model| {
            let what = Match::admin(admin::DOORBELL_BUFFER);
            model.rule(what, Action::Status(Status(0x4001)));
        });
        let rig = Rig { model, control: control.expect("attached"), heard };
        assert!(!rig.control.info().shadow_doorbells);
        let disk = CrossBdev::new(rig.bdev(1), reactors.to_vec()).unwrap();
        let mut bed = TestBed::new(&disk);
        across_a_reset(&rig, &mut bed, change);
        bed.finish();
        drop(disk);
        rig.finish();
        reactor.stop();
    }
}
