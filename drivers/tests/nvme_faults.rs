//! NVMe controllers that break: every request ends once and rightly, the rest goes on.

mod nvme;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nvme::{
    PAGE, Rig, SIZE_BYTES, all_ok, fill, hurried, is_written, namespace, options, patient, quick,
    sleepy, until, writes_during,
};
use ringmill_core::IoStatus;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::spec::nvme::{Status, admin, nvm};
use ringmill_drivers::model::{
    Aborts, Action, Count, LyingBacking, MapFailure, Match, Medium, ModelNamespace, ModelOptions,
};
use ringmill_drivers::nvme::{ActionOnTimeout, ControllerState, NvmeEvent, NvmeOptions, attach};
use ringmill_drivers::pci::DeviceNews;

#[test]
fn a_late_command_is_aborted_and_done_again() {
    let rig = Rig::new(quick(), hurried());
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.rule(Match::io(nvm::WRITE).once(), Action::Swallow);
    all_ok(&writes_during(&mut bed, 16, || {}));
    is_written(&mut bed, 16);
    until("the thread hears of its end", || rig.counters().aborts_done == 1);
    let counters = rig.counters();
    assert_eq!((counters.timeouts, counters.aborts), (1, 1));
    assert_eq!((counters.resets, counters.stale), (0, 0));
    bed.finish();
    rig.finish();
}

#[test]
fn an_abort_that_does_not_help_ends_in_a_reset_and_the_data_is_right() {
    for aborts in [Aborts::Refuse, Aborts::Silent, Aborts::Lie] {
        let rig = Rig::new(quick(), hurried());
        let mut bed = TestBed::new(&*rig.bdev(1));
        rig.model.set_aborts(aborts);
        rig.model.rule(Match::io(nvm::WRITE).once(), Action::Swallow);
        all_ok(&writes_during(&mut bed, 16, || {}));
        is_written(&mut bed, 16);
        let counters = rig.counters();
        assert_eq!((counters.timeouts, counters.aborts, counters.resets), (1, 1, 1), "{aborts:?}");
        until("the end of the reset", || rig.state() == ControllerState::Enabled);
        bed.finish();
        rig.finish();
    }
}

#[test]
fn an_answer_after_an_abort_that_was_answered_is_stale_and_harms_nobody() {
    let rig = Rig::new(quick(), hurried());
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.set_aborts(Aborts::AnswerAndGoOn);
    let late = Duration::from_millis(500);
    rig.model.rule(Match::io(nvm::WRITE).once(), Action::Delay(late));
    all_ok(&writes_during(&mut bed, 16, || {}));
    // The second answer comes for a command that is no more.
    until("a reset for the stale answer", || {
        bed.turn(|_, _| {});
        rig.counters().resets == 1 && rig.state() == ControllerState::Enabled
    });
    assert_eq!(rig.counters().stale, 1);
    is_written(&mut bed, 16);
    bed.finish();
    rig.finish();
}

#[test]
fn the_user_chooses_what_happens_to_late_commands() {
    let action_on_timeout = ActionOnTimeout::Reset;
    let rig = Rig::new(quick(), NvmeOptions { action_on_timeout, ..hurried() });
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.rule(Match::io(nvm::WRITE).once(), Action::Swallow);
    all_ok(&writes_during(&mut bed, 4, || {}));
    assert_eq!((rig.counters().aborts, rig.counters().resets), (0, 1));
    bed.finish();
    rig.finish();

    let action_on_timeout = ActionOnTimeout::None;
    let rig = Rig::new(quick(), NvmeOptions { action_on_timeout, ..hurried() });
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.rule(Match::io(nvm::WRITE).once(), Action::Swallow);
    let segment = bed.segment(0, 0, 4096);
    bed.turn(|_, _| {});
    bed.offer(IoOp::Write, IoFlags::NONE, 0, PAGE, &[segment]).unwrap();
    until("three reports", || {
        bed.turn(|_, _| panic!("nobody answered"));
        rig.counters().timeouts >= 3
    });
    assert_eq!((rig.counters().aborts, rig.counters().resets), (0, 0));
    rig.model.release_held();
    bed.drain();
    assert_eq!(rig.model.counters().admin(admin::ABORT), 0);
    bed.finish();
    rig.finish();
}

#[test]
fn an_answer_that_was_only_late_needs_nothing() {
    let rig = Rig::new(quick(), NvmeOptions { timeout: Duration::from_millis(60), ..hurried() });
    let mut bed = TestBed::new(&*rig.bdev(1));
    let segment = bed.segment(0, 0, 4096);
    bed.turn(|_, _| {});
    bed.offer(IoOp::Write, IoFlags::NONE, 0, PAGE, &[segment]).unwrap();
    bed.cx.turn_ring();
    // This "reactor" is off its core for longer than the deadline; the answer has been there all the time.
    std::thread::sleep(Duration::from_millis(300));
    bed.drain();
    let counters = rig.counters();
    assert_eq!((counters.aborts, counters.resets), (0, 0), "{counters:?}");
    bed.finish();
    rig.finish();
}

#[test]
fn a_controller_that_fails_comes_back_with_every_request() {
    let rig = Rig::new(quick(), options());
    let mut bed = TestBed::new(&*rig.bdev(1));
    for round in 1..=3 {
        rig.model.rule(Match::io(nvm::WRITE).after(5).once(), Action::Fatal);
        all_ok(&writes_during(&mut bed, 32, || {}));
        is_written(&mut bed, 32);
        assert_eq!(rig.counters().resets, round);
    }
    assert!(rig.control.info().last_error.unwrap().contains("CFS"));
    assert!(rig.heard.all().contains(&NvmeEvent::State));
    bed.finish();
    rig.finish();
}

#[test]
fn wrong_completions_end_in_a_reset_and_the_data_is_right() {
    for action in [
        Action::StrayCid(0x3ff),
        Action::StrayCid(0),
        Action::CompleteTwice,
        Action::OtherCid(0xffff),
        Action::OtherCid(0x0400),
        Action::SqHead(0xffff),
        Action::SqId(7),
        Action::GarbageRing,
    ] {
        let rig = Rig::new(quick(), options());
        let mut bed = TestBed::new(&*rig.bdev(1));
        rig.model.rule(Match::io(nvm::WRITE).after(3).once(), action);
        all_ok(&writes_during(&mut bed, 32, || {}));
        is_written(&mut bed, 32);
        // A stray entry may lie behind the last completion that anybody waits for.
        until("a reset", || {
            bed.turn(|_, _| {});
            rig.counters().resets >= 1 && rig.state() == ControllerState::Enabled
        });
        let counters = rig.counters();
        assert!(counters.stale >= 1, "{action:?}: {counters:?}");
        is_written(&mut bed, 32);
        bed.finish();
        rig.finish();
    }
}

#[test]
fn a_controller_that_does_not_stop_is_reset_by_its_function() {
    let rig = Rig::new(quick(), hurried());
    let mut bed = TestBed::new(&*rig.bdev(1));
    let all = Match::any_io().after(3);
    rig.model.rule(all, Action::ScribbleAfter(Duration::from_secs(1)));
    rig.model.set_aborts(Aborts::Refuse);
    let model = rig.model.clone();
    // RDY is stuck until somebody resets the function: then the registers live again.
    let ends = writes_during(&mut bed, 16, || {
        model.set_ready_stuck(true);
        let model = model.clone();
        std::thread::spawn(move || {
            until("a function reset", || model.count(Count::Resets) > 0);
            model.set_ready_stuck(false);
            model.clear_rules();
        });
    });
    all_ok(&ends);
    is_written(&mut bed, 16);
    assert!(rig.model.count(Count::Resets) >= 1);
    assert_eq!(rig.model.count(Count::Scribbles), 0, "memory was written after its request");
    bed.finish();
    rig.finish();
}

#[test]
fn a_controller_that_nothing_stops_is_cut_off_before_its_requests_fail() {
    let rig = Rig::new(quick(), hurried());
    let mut bed = TestBed::new(&*rig.bdev(1));
    let late = Duration::from_millis(900);
    rig.model.rule(Match::any_io().after(3), Action::ScribbleAfter(late));
    rig.model.set_aborts(Aborts::Refuse);
    rig.model.set_ready_stuck(true);
    rig.model.set_reset_fails(true);
    let ends = writes_during(&mut bed, 16, || {});
    assert!(ends[..3].iter().all(|end| end.is_ok()), "{ends:?}");
    assert!(ends[3..].iter().all(|end| *end == IoStatus::Reset), "{ends:?}");
    // Their memory is the guest's again.
    for arena in 0..16 {
        bed.segment(arena, 0, 4096).fill_zero();
    }
    std::thread::sleep(late + Duration::from_millis(200));
    for arena in 0..16 {
        let mut bytes = [1; 4096];
        bed.segment(arena, 0, 4096).read_into(&mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 0), "written after its request had ended");
    }
    assert_eq!(rig.model.count(Count::Scribbles), 0);
    assert_eq!(rig.state(), ControllerState::Failed);
    assert!(rig.heard.removed().is_some());
    assert_eq!(rig.counters().resets_failed, 1);
    // Further requests end at once.
    let segment = bed.segment(0, 0, 4096);
    assert_eq!(bed.run(IoOp::Read, IoFlags::NONE, 0, PAGE, &[segment]), IoStatus::Reset);
    assert!(rig.control.reset().is_err() && rig.control.health().is_err());
    bed.finish();
    rig.finish();
}

#[test]
fn a_controller_that_is_pulled_out_ends_its_requests_within_seconds() {
    for tells in [true, false] {
        let rig = Rig::new(quick(), patient());
        let mut bed = TestBed::new(&*rig.bdev(1));
        rig.model.rule(Match::any_io().after(3), Action::Swallow);
        let start = Instant::now();
        let model = rig.model.clone();
        let ends = writes_during(&mut bed, 16, || {
            std::thread::sleep(Duration::from_millis(50));
            model.vanish(tells);
        });
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(ends[3..].iter().all(|end| *end == IoStatus::Gone), "{ends:?}");
        until("the event", || rig.heard.removed().is_some());
        assert_eq!(rig.state(), ControllerState::Removed);
        bed.finish();
        rig.finish();
    }
}

#[test]
fn a_controller_that_is_asked_for_is_let_go_in_mid_load_and_works_again_later() {
    let medium = Medium::ram(SIZE_BYTES).unwrap();
    let one =
        |medium: &Arc<Medium>| vec![ModelNamespace::new(1, 9, SIZE_BYTES >> 9, Arc::clone(medium))];
    let rig = Rig::with(quick(), one(&medium), patient(), &[]);
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.rule(Match::any_io().after(8), Action::Swallow);
    let model = rig.model.clone();
    let ends = writes_during(&mut bed, 16, || {
        until("the first eight are done, the others out", || model.held() == 8);
        model.tell(DeviceNews::Requested);
    });
    all_ok(&ends[..8]);
    assert!(ends[8..].iter().all(|end| *end == IoStatus::Gone), "{ends:?}");
    until("the event", || rig.heard.removed().is_some());
    assert_eq!(rig.model.mapped_count(), 0, "unmapped");
    bed.finish();
    rig.finish();
    let rig = Rig::with(quick(), one(&medium), patient(), &[]);
    let mut bed = TestBed::new(&*rig.bdev(1));
    is_written(&mut bed, 8);
    all_ok(&writes_during(&mut bed, 16, || {}));
    bed.finish();
    rig.finish();
}

#[test]
fn a_bus_error_and_a_user_reset_it_under_load() {
    let rig = Rig::new(quick(), patient());
    let mut bed = TestBed::new(&*rig.bdev(1));
    let model = rig.model.clone();
    all_ok(&writes_during(&mut bed, 32, || model.tell(DeviceNews::Error)));
    until("a reset", || {
        bed.turn(|_, _| {});
        rig.counters().resets == 1 && rig.state() == ControllerState::Enabled
    });
    let control = Arc::clone(&rig.control);
    let asked = std::thread::spawn(move || control.reset());
    all_ok(&writes_during(&mut bed, 32, || {}));
    while !asked.is_finished() {
        bed.turn(|_, _| {});
    }
    asked.join().unwrap().expect("a reset");
    is_written(&mut bed, 32);
    assert_eq!((rig.counters().resets, rig.model.count(Count::Enables)), (2, 3));
    bed.finish();
    rig.finish();
}

#[test]
fn a_controller_that_is_wanted_back_in_the_middle_of_a_reset_is_let_go_of_soon() {
    let options = NvmeOptions { ready_timeout_max: Duration::from_secs(60), ..patient() };
    // Its own word for how long it may take is far more than anybody waits.
    let model = ModelOptions { ready_timeout_500ms: 100, ..ModelOptions::default() };
    let rig = Rig::new(model, options);
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 4, || {}));
    rig.model.set_ready_stuck(true);
    rig.model.tell(DeviceNews::Error);
    until("the reset", || {
        bed.turn(|_, _| {});
        rig.state() == ControllerState::Resetting
    });
    let start = Instant::now();
    rig.model.tell(DeviceNews::Requested);
    until("its end", || {
        bed.turn(|_, _| {});
        rig.heard.removed().is_some()
    });
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    bed.finish();
    rig.finish();
}

#[test]
fn resets_that_were_asked_for_do_not_count_against_it() {
    let rig = Rig::new(quick(), patient());
    for round in 1..=12 {
        rig.control.reset().unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    assert_eq!((rig.counters().resets, rig.state()), (12, ControllerState::Enabled));
    rig.finish();
}

#[test]
fn an_abort_that_comes_too_late_is_no_reason_for_a_reset() {
    let rig = Rig::new(quick(), hurried());
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.set_aborts(Aborts::Refuse);
    // The deadline is 150 ms, a look at the queue takes 20 more.
    let late = Duration::from_millis(280);
    rig.model.rule(Match::io(nvm::WRITE).once(), Action::Delay(late));
    all_ok(&writes_during(&mut bed, 4, || {}));
    until("its end is known", || {
        bed.turn(|_, _| {});
        rig.counters().late_answers == 1
    });
    assert_eq!((rig.counters().aborts, rig.counters().resets), (1, 0));
    bed.finish();
    rig.finish();
}

#[test]
fn questions_that_are_refused_for_a_moment_cost_no_disk() {
    let rig = Rig::new(quick(), patient());
    let bdev = rig.bdev(1);
    let busy = Status::new(0, 0x06);
    for (skip, times) in [(0, 2), (0, 50), (1, 2), (1, 50)] {
        let what = Match::admin(admin::IDENTIFY).of(1).after(skip).times(times);
        rig.model.rule(what, Action::Status(busy));
        assert_eq!(bdev.rescan().is_ok(), times == 2, "{skip} {times}");
        rig.model.clear_rules();
        assert!(Arc::ptr_eq(&bdev, &rig.bdev(1)) && bdev.info().blocks_count() > 0);
    }
    // Who it is is said no more.
    let unknown = Status::new(0, 0x02);
    rig.model.rule(Match::admin(admin::IDENTIFY).of(1).after(1).once(), Action::Status(unknown));
    bdev.rescan().expect("the same");
    assert!(Arc::ptr_eq(&bdev, &rig.bdev(1)) && bdev.info().blocks_count() > 0);
    // It is gone only where the device says so.
    rig.model
        .rule(Match::admin(admin::IDENTIFY).of(1).once(), Action::Status(Status::new(0, 0x0b)));
    assert!(bdev.rescan().is_err());
    assert_eq!(bdev.info().blocks_count(), 0);
    rig.finish();
}

#[test]
fn queues_that_it_does_not_delete_keep_nobody_from_shutting_it_down() {
    for action in [Action::Status(Status::new(1, 0x01)), Action::Swallow] {
        let reactor = sleepy();
        let rig =
            Rig::with(quick(), vec![namespace(1, 9)], options(), std::slice::from_ref(&reactor));
        rig.model.rule(Match::admin(admin::DELETE_SQ), action);
        let (model, start) = (rig.model.clone(), Instant::now());
        rig.finish();
        assert!(start.elapsed() < Duration::from_secs(5), "{action:?}: {:?}", start.elapsed());
        assert_eq!(model.count(Count::Shutdowns), 1, "{action:?}");
        reactor.stop();
    }
}

/// A thread that plays reactor and does something else while the controller is reset.
#[test]
fn a_pair_that_nobody_polls_gets_its_queues_when_it_has_obeyed() {
    let rig = Rig::new(quick(), patient());
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 9, || {}));
    let start = Instant::now();
    rig.control.reset().expect("a reset that waits for nobody");
    assert!(start.elapsed() < Duration::from_secs(10));
    let made = rig.model.counters().admin(admin::CREATE_SQ);
    assert_eq!(made, 1, "its rings still hold entries of another life");
    all_ok(&writes_during(&mut bed, 32, || {}));
    is_written(&mut bed, 32);
    assert_eq!(rig.model.counters().admin(admin::CREATE_SQ), 2);
    bed.finish();
    rig.finish();
}

#[test]
fn resets_without_end_are_given_up() {
    let rig = Rig::new(quick(), options());
    let mut bed = TestBed::new(&*rig.bdev(1));
    rig.model.rule(Match::admin(admin::CREATE_SQ), Action::Fatal);
    let ends = writes_during(&mut bed, 8, || rig.model.fail());
    assert!(ends.iter().all(|end| end.is_ok() || *end == IoStatus::Reset), "{ends:?}");
    until("the end", || {
        bed.turn(|_, _| {});
        rig.heard.removed().is_some()
    });
    assert_eq!(rig.state(), ControllerState::Failed);
    bed.finish();
    rig.finish();
    // A device that comes back each time, and fails each time.
    let rig = Rig::new(quick(), options());
    rig.model.rule(Match::admin(admin::SET_FEATURES), Action::StrayCid(0x7));
    let bed = TestBed::new(&*rig.bdev(1));
    rig.model.fail();
    let mut bed = bed;
    until("the end", || {
        bed.turn(|_, _| {});
        rig.heard.removed().is_some()
    });
    let counters = rig.counters();
    assert!((2..=12).contains(&counters.resets), "{counters:?}");
    bed.finish();
    rig.finish();
}

#[test]
fn attaching_fails_clearly_and_leaves_nothing_behind() {
    let refused = |model: ModelOptions, word: &str| {
        let all = vec![namespace(1, 9)];
        let (end, model, _) = Rig::try_new(model, all, hurried(), &[], |_| {});
        let words = end.expect_err("an error").to_string();
        assert!(words.contains(word), "{words}");
        assert_eq!((model.mapped_count(), model.complaint()), (0, None));
    };
    refused(ModelOptions { page_min: 1, ..quick() }, "8192 bytes");
    refused(ModelOptions { command_sets: 0x80, ..quick() }, "NVM command set");
    let failing = |before: &dyn Fn(&ringmill_drivers::model::ModelControl)| {
        let start = Instant::now();
        let (end, model, _) =
            Rig::try_new(quick(), vec![namespace(1, 9)], hurried(), &[], |model| before(model));
        let words = end.expect_err("an error").to_string();
        assert!(start.elapsed() < Duration::from_secs(5), "{words}");
        assert_eq!(model.mapped_count(), 0, "{words}");
        words
    };
    assert!(failing(&|model| model.set_ready_stuck(true)).contains("did not become ready"));
    assert!(failing(&|model| model.vanish(false)).contains("gone"));
    for opcode in [admin::IDENTIFY, admin::SET_FEATURES] {
        let words = failing(&|model| model.rule(Match::admin(opcode), Action::Swallow));
        assert!(words.contains("within 300 ms"), "{words}");
        let words = failing(&|model| model.rule(Match::admin(opcode), Action::Fatal));
        assert!(words.contains("CFS"), "{words}");
    }
    for maps in 0..3 {
        for (failure, word) in
            [(MapFailure::Memlock, "RLIMIT_MEMLOCK"), (MapFailure::Range, "cannot reach")]
        {
            let (end, model, _) = Rig::try_new(
                ModelOptions { doorbell_buffer: true, ..quick() },
                vec![namespace(1, 9)],
                hurried(),
                &[],
                |model| model.fail_dma_maps(Some((maps, failure))),
            );
            let words = end.expect_err("an error").to_string();
            assert!(words.contains(word), "{words}");
            assert_eq!(model.mapped_count(), 0);
        }
    }
}

#[test]
fn the_memory_of_queues_stays_until_the_device_is_cut_off_or_has_stopped() {
    // Up and running, and then attaching fails.
    for (opcode, skip) in [(admin::IDENTIFY, 2), (admin::SET_FEATURES, 0), (admin::SET_FEATURES, 1)]
    {
        for action in [Action::Swallow, Action::Fatal] {
            let rule = Match::admin(opcode).after(skip);
            let all = vec![namespace(1, 9)];
            let (end, model, _) = Rig::try_new(quick(), all, hurried(), &[], |model| {
                model.rule(rule, action);
            });
            end.expect_err("an error");
            assert_eq!((model.mapped_count(), model.complaint()), (0, None));
        }
    }
    // Half a pair that cannot be deleted goes with a reset.
    let rig = Rig::new(quick(), hurried());
    let internal = Action::Status(Status(6));
    for opcode in [admin::CREATE_SQ, admin::DELETE_CQ] {
        rig.model.rule(Match::admin(opcode).once(), internal);
    }
    let words = rig.bdev(1).open_channel(None).err().expect("refused").to_string();
    assert!(words.contains("; then: "), "{words}");
    assert_eq!(rig.counters().resets, 1);
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 16, || {}));
    bed.finish();
    rig.finish();
    // A queue that was made, and nobody heard of it.
    for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
        let rig = Rig::new(quick(), hurried());
        rig.model.rule(Match::admin(opcode).once(), Action::OtherCid(1));
        let bdev = rig.bdev(1);
        let words = bdev.open_channel(None).err().expect("refused").to_string();
        assert!(words.contains("within 300 ms"), "{words}");
        let mut bed = TestBed::new(&*bdev);
        all_ok(&writes_during(&mut bed, 16, || {}));
        bed.finish();
        rig.finish();
    }
}

#[test]
fn a_channel_without_memory_for_the_device_is_refused_and_the_next_one_works() {
    let rig = Rig::new(quick(), options());
    let bdev = rig.bdev(1);
    let bed = TestBed::new(&*bdev);
    for failure in [MapFailure::NoMemory, MapFailure::Memlock] {
        rig.model.fail_dma_maps(Some((0, failure)));
        let words = bdev.open_channel(None).err().expect("refused").to_string();
        assert!(words.contains("memory"), "{words}");
    }
    rig.model.fail_dma_maps(None);
    bed.finish();
    let mut bed = TestBed::new(&*bdev);
    all_ok(&writes_during(&mut bed, 16, || {}));
    bed.finish();
    rig.finish();
}

#[test]
fn queue_pairs_come_back_when_their_threads_are_through_with_them() {
    let options = NvmeOptions { num_io_queues: 2, ..patient() };
    let rig = Rig::with(quick(), vec![namespace(1, 9)], options, &[]);
    let bdev = rig.bdev(1);
    for _ in 0..5 {
        let (mut one, two) = (TestBed::new(&*bdev), TestBed::new(&*bdev));
        let words = bdev.open_channel(None).err().expect("all in use").to_string();
        assert!(words.contains("num_io_queues"), "{words}");
        all_ok(&writes_during(&mut one, 8, || {}));
        one.finish();
        two.finish();
    }
    let deleted = rig.model.counters().admin(admin::DELETE_SQ);
    assert!((8..=10).contains(&deleted), "{deleted}");
    rig.finish();
}

#[test]
fn namespaces_come_go_and_change_size() {
    let model = ModelOptions { events_max: 2, ..quick() };
    let rig = Rig::with(model, vec![namespace(1, 9)], patient(), &[]);
    let bdev = rig.bdev(1);
    let nsids = || -> Vec<u32> { rig.control.namespaces().iter().map(|n| n.info.nsid).collect() };
    rig.model.attach_namespace(namespace(5, 12));
    until("namespace 5", || nsids() == [1, 5]);
    assert_eq!(rig.heard.namespaces(), 1);
    let mut bed = TestBed::new(&*rig.bdev(5));
    all_ok(&writes_during(&mut bed, 8, || {}));

    rig.model.resize_namespace(1, 4096);
    until("the size", || rig.control.namespaces()[0].info.blocks_count == 4096);
    assert!(Arc::ptr_eq(&bdev, &rig.bdev(1)), "the same disk");
    assert_eq!(bdev.rescan().unwrap(), 4096);
    assert_eq!(bdev.info().blocks_count(), SIZE_BYTES >> 9, "whoever hears it publishes it");

    let old = rig.bdev(5);
    rig.model.detach_namespace(5);
    until("its end", || nsids() == [1]);
    let segment = bed.segment(0, 0, 4096);
    assert_eq!(bed.run(IoOp::Read, IoFlags::NONE, 0, PAGE, &[segment]), IoStatus::Range);
    assert!(old.rescan().is_err());
    // Another one takes its number.
    let mut other = namespace(5, 12);
    other.uuid = [7; 16];
    rig.model.attach_namespace(other);
    until("another one", || nsids() == [1, 5]);
    assert!(!Arc::ptr_eq(&old, &rig.bdev(5)), "another disk");
    assert_eq!(old.info().blocks_count(), 0, "the old one reaches nothing");
    assert_eq!(rig.heard.namespaces(), 4);
    assert_eq!(rig.counters().resets, 0);
    bed.finish();
    rig.finish();
}

#[test]
fn namespaces_that_cannot_be_disks_leave_the_others_alone() {
    let (mut metadata, mut protected, mut empty) =
        (namespace(2, 9), namespace(3, 12), namespace(4, 9));
    metadata.metadata_bytes = 8;
    protected.protection = 1;
    empty.blocks_count = 0;
    let odd = namespace(5, 11);
    let all = vec![namespace(1, 9), metadata, protected, empty, odd];
    let rig = Rig::with(quick(), all, patient(), &[]);
    let refused: Vec<_> =
        rig.control.namespaces().into_iter().filter_map(|n| n.info.refused).collect();
    assert!(refused[0].contains("metadata") && refused[1].contains("protection"), "{refused:?}");
    assert!(refused.last().unwrap().contains("512 or 4096"), "{refused:?}");
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 8, || {}));
    bed.finish();
    rig.finish();
}

#[test]
fn what_was_flushed_survives_a_power_cut_and_the_driver_finds_its_way_back() {
    let rig = Rig::new(quick(), options());
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 32, || {}));
    assert_eq!(bed.run(IoOp::Flush, IoFlags::NONE, 0, 0, &[]), IoStatus::Ok);
    let segment = bed.segment(40, 0, 4096);
    segment.write_from(&fill(99));
    let at = 1 << 20;
    assert_eq!(bed.run(IoOp::Write, IoFlags::FUA, at, PAGE, &[segment]), IoStatus::Ok);
    assert_eq!(bed.write(2 << 20, &fill(77)), IoStatus::Ok);
    rig.model.power_cut();
    until("a reset", || {
        bed.turn(|_, _| {});
        rig.counters().resets >= 1 && rig.state() == ControllerState::Enabled
    });
    is_written(&mut bed, 32);
    assert!(bed.read(at, 4096).unwrap() == fill(99));
    assert!(bed.read(2 << 20, 4096).unwrap() != fill(77), "the model's cache is none");
    bed.finish();
    rig.finish();
}

#[test]
fn health_is_told_and_kept() {
    let rig = Rig::new(quick(), patient());
    let health = rig.control.health().unwrap();
    assert_eq!(health.critical_warning, 0);
    let start = Instant::now();
    rig.model.set_health(2, 400);
    until("the event", || rig.counters().events == 1);
    until("the warning", || rig.control.health().is_ok_and(|h| h.critical_warning == 2));
    assert_eq!(rig.control.health().unwrap().temperature_kelvin, 400);
    assert!(start.elapsed() < Duration::from_secs(4), "told by the event, not by age");
    assert!(rig.control.health().unwrap().age > Duration::ZERO, "kept");
    // Armed again.
    rig.model.set_health(6, 401);
    until("the next", || rig.counters().events == 2);
    assert_eq!(rig.counters().resets, 0);
    rig.finish();
}

#[test]
fn neighbours_on_the_same_reactor_keep_going() {
    let owner = sleepy();
    let reactors = [owner.clone()];
    let broken = Rig::with(quick(), vec![namespace(1, 9)], hurried(), &reactors);
    let sound = Rig::with(quick(), vec![namespace(1, 9)], patient(), &reactors);
    let cross = |rig: &Rig| CrossBdev::new(rig.bdev(1), reactors.to_vec()).unwrap();
    let (broken_disk, sound_disk) = (cross(&broken), cross(&sound));
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ended = Arc::clone(&stop);
        let sound_disk = &sound_disk;
        let neighbour = scope.spawn(move || {
            let mut bed = TestBed::new(sound_disk);
            let (mut rounds, mut longest) = (0, Duration::ZERO);
            while !ended.load(Ordering::Relaxed) {
                let start = Instant::now();
                all_ok(&writes_during(&mut bed, 8, || {}));
                longest = longest.max(start.elapsed());
                rounds += 1;
            }
            bed.finish();
            (rounds, longest)
        });
        let mut bed = TestBed::new(&broken_disk);
        broken.model.set_aborts(Aborts::Refuse);
        for _ in 0..3 {
            broken.model.rule(Match::io(nvm::WRITE).after(2).once(), Action::Swallow);
            all_ok(&writes_during(&mut bed, 16, || {}));
        }
        broken.model.rule(Match::any_io(), Action::Swallow);
        let model = broken.model.clone();
        let ends = writes_during(&mut bed, 16, || model.vanish(true));
        assert!(ends.iter().all(|end| *end == IoStatus::Gone), "{ends:?}");
        bed.finish();
        stop.store(true, Ordering::Relaxed);
        let (rounds, longest) = neighbour.join().unwrap();
        assert!(rounds > 20, "{rounds} rounds");
        assert!(longest < Duration::from_secs(2), "{longest:?}");
    });
    assert_eq!(broken.counters().resets, 3);
    assert_eq!((sound.counters().resets, sound.counters().timeouts), (0, 0));
    drop((broken_disk, sound_disk));
    broken.finish();
    sound.finish();
    let left = owner.ask(|reactor| format!("{:?}", reactor.cx.io.devices)).unwrap();
    assert_eq!(left, "[]", "no pair is left on the reactor");
    owner.stop();
}

/// The same controller under the ids of one that is known for something.
fn known_as(vendor: u16, device: u16) -> Rig {
    let model = ModelOptions {
        pci_id: (vendor, device),
        sgls: ringmill_drivers::model::Sgls::Bytes,
        ..ModelOptions::default()
    };
    let rig = Rig::with(model, vec![namespace(1, 9)], patient(), &[]);
    let mut bed = TestBed::new(&*rig.bdev(1));
    all_ok(&writes_during(&mut bed, 8, || {}));
    bed.finish();
    rig
}

#[test]
fn what_is_known_of_a_controller_is_heeded() {
    let plain = known_as(0xfff0, 1);
    let uuid = plain.bdev(1).info().uuid();
    assert!(plain.control.info().quirks.is_empty() && plain.control.info().sgl);
    assert_eq!(uuid.as_bytes()[..12], *b"ringmill-uui");
    assert!(plain.bdev(1).info().geometry().write_zeroes);
    plain.finish();

    let rig = known_as(0x15b7, 0x2001);
    assert!(!rig.bdev(1).info().geometry().write_zeroes);
    rig.finish();
    let rig = known_as(0x19e5, 0x1822);
    assert!(!rig.control.info().sgl);
    rig.finish();
    for (vendor, device) in [(0x10ec, 0x5763), (0x8086, 0x5845), (0x1d1d, 0x1f1f), (0x126f, 0x2263)]
    {
        let rig = known_as(vendor, device);
        assert_ne!(rig.bdev(1).info().uuid(), uuid, "{vendor:#x}:{device:#x}");
        rig.finish();
    }
}

#[test]
fn a_shutdown_without_an_end_is_waited_for_but_not_for_ever_and_where_it_is_known_not_at_all() {
    let took = |vendor, device| {
        let rig = known_as(vendor, device);
        rig.model.set_shutdown_stuck(true);
        let start = Instant::now();
        rig.finish();
        start.elapsed()
    };
    let known = took(0x15ad, 0x07f0);
    assert!(known < Duration::from_secs(2), "{known:?}");
    let unknown = took(0xfff0, 1);
    assert!((Duration::from_secs(3)..Duration::from_secs(7)).contains(&unknown), "{unknown:?}");
}

#[test]
fn known_pauses_are_made() {
    let took = |vendor, device| {
        let start = Instant::now();
        let rig = known_as(vendor, device);
        let attached = start.elapsed();
        let start = Instant::now();
        rig.finish();
        (attached, start.elapsed())
    };
    let (attached, _) = took(0x8086, 0x0a53);
    assert!(attached >= Duration::from_secs(2), "before its set-up: {attached:?}");
    let (_, detached) = took(0x1c58, 0x0023);
    assert!(detached >= Duration::from_millis(2300), "before the ready bit: {detached:?}");
    let (attached, _) = took(0x80ee, 0x4e56);
    assert!(attached >= Duration::from_millis(100), "after its queues: {attached:?}");
}

#[test]
fn a_liar_is_survived() {
    for seed in 0u64..48 {
        let bytes: Vec<u8> = {
            let mut chance = ringmill_core::reactor::Entropy::seeded(seed);
            (0..256).flat_map(|_| chance.next_u64().to_le_bytes()).collect()
        };
        let all = vec![namespace(1, 9), namespace(2, 12)];
        let (backing, model) = LyingBacking::start(&bytes, quick(), all).unwrap();
        let heard = nvme::Heard::default();
        let options = NvmeOptions {
            ready_timeout_max: Duration::from_millis(20),
            timeout: Duration::from_millis(50),
            timeout_admin: Duration::from_millis(20),
            ..NvmeOptions::default()
        };
        let start = Instant::now();
        let Ok(control) = attach(backing, options, &[], heard.listener()) else {
            assert!(start.elapsed() < Duration::from_secs(5), "seed {seed}");
            continue;
        };
        for disk in control.namespaces().into_iter().filter_map(|n| n.bdev) {
            if disk.info().size_bytes() < 64 * PAGE || disk.info().geometry().read_only {
                continue;
            }
            // A queue pair may be refused.
            let Ok(mut bed) = TestBed::open(&*disk) else { continue };
            let _ = writes_during(&mut bed, 16, || {});
            bed.drain();
        }
        control.detach();
        assert!(start.elapsed() < Duration::from_secs(40), "seed {seed}: {:?}", start.elapsed());
        // Nothing is left of it, whatever it said about having stopped.
        assert_eq!(model.mapped_count(), 0, "seed {seed}");
    }
}
