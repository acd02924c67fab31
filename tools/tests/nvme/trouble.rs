//! Controllers that hang, lose answers, die or are taken away, and what guests and their neighbours see of it.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use ringmill_core::spec::nvme::{admin, nvm};
use ringmill_drivers::model::{Action, Match, ModelOptions};
use serde_json::json;
use tempfile::TempDir;

use super::daemon::{Daemon, WAIT_MAX, wait_for};
use super::model::{Exercise, Op, UNKNOWN};
use super::{
    DISK_BYTES, Device, attach, controllers_count, end, exercise, exercise_again, fails_soon,
    has_bdev, serving, serving_on, shown, two_reactors,
};

#[test]
fn a_reset_in_mid_load_loses_nothing() {
    let device = Device::new();
    let (daemon, mut exercise) = serving(&device, &json!({}));
    let span = exercise.sectors_count();
    for round in 1..=4 {
        let mut rpc = daemon.rpc();
        exercise.random_for(Duration::from_millis(150), span, 64, |_| false);
        rpc.send("bdev_nvme_reset_controller", &json!({"name": "Nvme0"}));
        exercise.random_for(Duration::from_millis(300), span, 64, |_| false);
        exercise.drain();
        assert_eq!(rpc.answer(), Ok(json!(true)));
        let counters = shown(&daemon, "Nvme0")["counters"].clone();
        assert_eq!(counters["resets"], round, "{counters}");
    }
    exercise.verify();
    assert_eq!(shown(&daemon, "Nvme0")["state"], "enabled");
    end(&device, daemon);
}

#[test]
fn a_command_without_an_answer_is_aborted_and_the_guest_goes_on() {
    let device = Device::new();
    let (daemon, mut exercise) = serving(&device, &json!({"timeout_us": 300_000}));
    let span = exercise.sectors_count();
    device.control.rule(Match::io(nvm::READ).times(3), Action::Swallow);
    exercise.random_for(Duration::from_secs(1), span, 64, |_| false);
    exercise.drain();
    exercise.verify();
    let counters = shown(&daemon, "Nvme0")["counters"].clone();
    assert!(counters["timeouts"].as_u64() >= Some(3), "{counters}");
    assert!(counters["aborts"].as_u64() >= Some(1), "{counters}");
    end(&device, daemon);
}

/// Requests of the guest that a controller with the right rule keeps.
const STUCK: usize = 8;

fn get_stuck(device: &Device, exercise: &mut Exercise) {
    for lba in 0..STUCK as u64 {
        let queue = exercise.client.queues_count() - 1;
        assert!(exercise.begin(Op::Read, queue, lba, 1));
    }
    exercise.kick();
    assert!(wait_for(WAIT_MAX, || device.control.held() == STUCK), "the commands arrive");
}

#[test]
fn a_device_that_dies_in_mid_load_fails_its_own_guests_and_keeps_what_was_flushed() {
    let device = Device::new();
    let (daemon, mut exercise) = serving(&device, &json!({"timeout_us": 500_000}));
    let mut neighbour = self::exercise(&daemon.add_malloc("ram", DISK_BYTES, 512), 2);
    // All of the disk is flushed; then only its first half changes.
    let span = exercise.sectors_count();
    exercise.random_for(Duration::from_millis(600), span, 64, |_| false);
    exercise.drain();
    exercise.one(Op::Flush, 0, 0);
    exercise.random_for(Duration::from_millis(300), span / 2, 64, |_| false);
    exercise.tolerates_errors = true;
    let (dir, media) = device.kill();
    let died = Instant::now();
    // Everything that is out comes back, with or without an error, while the neighbour works as ever.
    while exercise.inflight_count() > 0 || !fails_soon(&mut exercise) {
        exercise.kick();
        exercise.poll();
        neighbour.random_rounds(8, 4096, 16);
        assert!(died.elapsed() < WAIT_MAX, "{exercise}");
    }
    assert!(wait_for(WAIT_MAX, || controllers_count(&daemon) == 0), "it is still listed");
    assert!(died.elapsed() < Duration::from_secs(15), "it took {:?}", died.elapsed());
    assert!(!has_bdev(&daemon, "Nvme0n1"));
    neighbour.drain();
    neighbour.verify();
    let saved = daemon.call("framework_get_config", &json!({"name": "bdev"}));
    assert_eq!(saved.as_array().expect("calls").len(), 1, "only the RAM disk: {saved}");
    let mut stamps = exercise.into_stamps();
    daemon.call("vhost_delete_controller", &json!({"ctrlr": "v"}));

    // The process comes back without what was in its write cache: the same name again, and what was flushed is there.
    media.iter().for_each(|medium| medium.power_cut());
    let middle = stamps.len() / 2;
    stamps[..middle].fill(UNKNOWN);
    let written = stamps[middle..].iter().filter(|stamp| **stamp != UNKNOWN && **stamp != 0);
    assert!(written.count() > 16, "the load left nothing to look for");
    let device = Device::over(dir, ModelOptions::default(), &[9], media);
    assert_eq!(attach(&daemon, "Nvme0", &device, &json!({})), ["Nvme0n1"]);
    let socket = daemon.add_controller("v", "Nvme0n1", &json!({}));
    let mut exercise = exercise_again(&socket, 2, Some(stamps));
    exercise.verify();
    exercise.random_for(Duration::from_millis(300), span, 64, |_| false);
    exercise.drain();
    exercise.verify();
    end(&device, daemon);
}

/// How long a controller says nothing, and the longest that a neighbour may then wait for its next answer, on a machine
/// that is busy with other things.
const SILENCE: Duration = Duration::from_secs(12);
const GAP_MAX: Duration = Duration::from_secs(4);

/// Keeps the neighbour busy while `act` runs on another thread: it must never wait long, and read what it wrote.
fn never_stalls(what: &str, neighbour: &mut Exercise, act: impl FnOnce() + Send) {
    let span = neighbour.sectors_count();
    let before = neighbour.completed_count;
    neighbour.longest_gap = Duration::ZERO;
    std::thread::scope(|scope| {
        let acting = scope.spawn(act);
        let limit = SILENCE + 2 * WAIT_MAX;
        neighbour.random_for(limit, span, 16, |neighbour| {
            acting.is_finished() && neighbour.completed_count > before + 1000
        });
        acting.join().unwrap_or_else(|_| panic!("{what}"));
    });
    neighbour.drain();
    neighbour.verify();
    let gap = neighbour.longest_gap;
    eprintln!("{what}: the neighbour's longest gap was {gap:?}");
    assert!(gap < GAP_MAX, "{what}: the neighbour had no answer for {gap:?}");
    assert!(neighbour.completed_count > before + 1000, "{what}: {neighbour}");
}

/// One reactor, so that everything that any of the two disks makes it wait for, the other one waits for, too.
fn with_neighbour(device: &Device) -> (Daemon, Exercise, Exercise) {
    let (daemon, socket) = serving_on("1", device, &json!({"timeout_us": 0}));
    let victim = exercise(&socket, 1);
    let mut neighbour = exercise(&daemon.add_malloc("ram", DISK_BYTES, 512), 1);
    // All of its memory is there from now on: to find some may take the kernel seconds while compilers write.
    neighbour.verify();
    (daemon, victim, neighbour)
}

#[test]
fn a_controller_that_hangs_and_dies_stalls_no_neighbour_on_its_reactor() {
    let device = Device::new();
    let (daemon, mut victim, mut neighbour) = with_neighbour(&device);
    victim.one(Op::Write, 0, 64);
    never_stalls("silence", &mut neighbour, || {
        device.control.rule(Match::any_io(), Action::Swallow);
        get_stuck(&device, &mut victim);
        std::thread::sleep(SILENCE);
        assert_eq!(victim.poll(), 0, "nothing was answered");
        device.control.clear_rules();
        device.control.release_held();
        victim.drain();
    });
    victim.random_rounds(400, 4096, 64);
    never_stalls("death", &mut neighbour, || {
        device.control.rule(Match::any_io(), Action::Swallow);
        get_stuck(&device, &mut victim);
        victim.tolerates_errors = true;
        let before = victim.errors_count;
        device.assert_content();
        drop(device.kill());
        victim.drain();
        assert_eq!(victim.errors_count - before, STUCK as u64, "each ends with an error");
        assert!(wait_for(WAIT_MAX, || controllers_count(&daemon) == 0), "it is still listed");
    });
    daemon.stop();
}

#[test]
fn a_reset_that_takes_long_stalls_no_neighbour_on_its_reactor() {
    // CAP.TO is longer than the silence, so that the driver waits for it.
    let ready_timeout_500ms = 40;
    let device =
        Device::with(ModelOptions { ready_timeout_500ms, ..ModelOptions::default() }, &[9]);
    let (daemon, mut victim, mut neighbour) = with_neighbour(&device);
    victim.one(Op::Write, 0, 64);
    never_stalls("reset", &mut neighbour, || {
        device.control.rule(Match::any_io(), Action::Swallow);
        get_stuck(&device, &mut victim);
        device.control.set_ready_stuck(true);
        let mut rpc = daemon.rpc();
        rpc.send("bdev_nvme_reset_controller", &json!({"name": "Nvme0"}));
        std::thread::sleep(SILENCE);
        assert_eq!(victim.poll(), 0, "nothing was answered");
        assert_eq!(shown(&daemon, "Nvme0")["state"], "resetting");
        device.control.clear_rules();
        device.control.set_ready_stuck(false);
        assert_eq!(rpc.answer(), Ok(json!(true)));
        victim.drain();
    });
    victim.random_rounds(400, 4096, 64);
    victim.verify();
    end(&device, daemon);
}

/// A vfio-user server that begins to answer the first question and never comes to an end.
fn dribble(listener: UnixListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        // Header: id 0, command 1 (version), size, flags (a reply), no error.
        let mut bytes = [0u16, 1].map(u16::to_le_bytes).concat();
        bytes.extend([1u32 << 20, 1, 0].map(u32::to_le_bytes).concat());
        bytes.resize(1 << 20, b' ');
        for byte in bytes {
            std::thread::sleep(Duration::from_millis(5));
            if stream.write_all(&[byte]).is_err() {
                break;
            }
        }
    }
}

#[test]
fn attaching_to_a_server_that_plays_for_time_is_cancelled_by_detaching_and_by_the_end() {
    let dir = TempDir::new().expect("a directory");
    let listener = UnixListener::bind(dir.path().join("cntrl")).expect("a socket");
    std::thread::spawn(move || dribble(listener));
    let daemon = two_reactors();
    let params = json!({"name": "Nvme0", "trtype": "vfiouser", "traddr": dir.path()});
    let attach = || {
        let mut rpc = daemon.rpc();
        rpc.send("bdev_nvme_attach_controller", &params);
        assert!(wait_for(WAIT_MAX, || controllers_count(&daemon) == 1));
        assert_eq!(shown(&daemon, "Nvme0")["state"], "attaching");
        rpc
    };
    let mut attaching = attach();
    assert_eq!(daemon.call("bdev_nvme_detach_controller", &json!({"name": "Nvme0"})), true);
    let (code, message) = attaching.answer().expect_err("cancelled");
    assert!(code == -125 && message.contains("was cancelled"), "{code} {message}");
    assert_eq!(controllers_count(&daemon), 0);
    let _attaching = attach();
    daemon.stop();
}

/// What detaching may take: 5 s for guests, 5 s for the controller, and a busy machine.
const DETACH_MAX: Duration = Duration::from_secs(15);

/// Detaches with requests stuck in the controller.
fn detach_stuck(device: &Device) {
    let (daemon, mut exercise) = serving(device, &json!({"timeout_us": 0}));
    exercise.one(Op::Write, 0, 64);
    device.control.rule(Match::any_io(), Action::Swallow);
    get_stuck(device, &mut exercise);
    exercise.tolerates_errors = true;
    let mut rpc = daemon.rpc();
    let began = Instant::now();
    rpc.send("bdev_nvme_detach_controller", &json!({"name": "Nvme0"}));
    // An answer twice, or one that was not asked for, is a panic in the twin.
    exercise.drain();
    assert_eq!(rpc.answer(), Ok(json!(true)));
    assert!(began.elapsed() < DETACH_MAX, "{:?}", began.elapsed());
    let ended = (exercise.errors_count, exercise.completed_count);
    assert_eq!(ended, (STUCK as u64, STUCK as u64 + 1), "each ends with an error, once");
    assert_eq!(device.control.mapped_count(), 0, "no memory is left to the device");
    // The controller remembers them too late.
    device.control.clear_rules();
    device.control.release_held();
    assert!(fails_soon(&mut exercise));
    assert!(wait_for(WAIT_MAX, || controllers_count(&daemon) == 0));
    daemon.stop();
}

#[test]
fn detaching_ends_requests_that_are_stuck_each_once() {
    let device = Device::new();
    detach_stuck(&device);
    device.assert_content();
}

#[test]
fn a_controller_that_answers_nothing_at_all_is_detached_in_time() {
    let device = Device::new();
    // All that it is asked on the way out.
    for opcode in [admin::DELETE_SQ, admin::DELETE_CQ, admin::ABORT] {
        device.control.rule(Match::admin(opcode), Action::Swallow);
    }
    device.control.set_shutdown_stuck(true);
    detach_stuck(&device);
}

#[test]
fn detaching_under_a_guest_gives_it_errors_and_frees_the_name() {
    let device = Device::new();
    let (daemon, mut exercise) = serving(&device, &json!({}));
    let span = exercise.sectors_count();
    exercise.random_for(Duration::from_millis(200), span, 64, |_| false);
    exercise.tolerates_errors = true;
    let mut rpc = daemon.rpc();
    rpc.send("bdev_nvme_detach_controller", &json!({"name": "Nvme0"}));
    exercise.random_for(Duration::from_millis(500), span, 64, |_| false);
    exercise.drain();
    assert_eq!(rpc.answer(), Ok(json!(true)));
    assert!(fails_soon(&mut exercise));
    assert!(!has_bdev(&daemon, "Nvme0n1"));
    assert!(wait_for(WAIT_MAX, || controllers_count(&daemon) == 0));
    assert_eq!(device.control.mapped_count(), 0, "no memory is left to the device");
    assert_eq!(attach(&daemon, "Nvme0", &device, &json!({})), ["Nvme0n1"]);
    end(&device, daemon);
}

#[test]
fn a_device_that_answers_nothing_does_not_keep_the_daemon() {
    let device = Device::new();
    let (daemon, mut exercise) = serving(&device, &json!({"timeout_us": 0}));
    device.control.rule(Match::any_io(), Action::Swallow);
    exercise.tolerates_errors = true;
    get_stuck(&device, &mut exercise);
    let began = Instant::now();
    daemon.stop();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!(device.control.mapped_count(), 0);
}
