//! Disks with fewer device queues than the daemon has reactors, as their guests and operators see them.
//!
//! Two reactors and a client on a small machine: what is shown here is correctness.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use daemon::{Daemon, WAIT_MAX};
use media::{LoopDevice, MIB, set_len, skip};
use model::{Exercise, Op, connect, seed};
use serde_json::{Value, json};

const SLOT_BYTES: usize = 64 << 10;

/// Two reactors that sleep after so many microseconds without work.
fn daemon(spin_us: u32) -> Daemon {
    Daemon::with(["-m", "3", "--idle", "adaptive", "--spin-us", &spin_us.to_string()])
}

fn file_disk(daemon: &Daemon, name: &str) -> PathBuf {
    let image = daemon.dir().join(format!("{name}.img"));
    set_len(&image, 8 * MIB);
    daemon.add_uring(name, &image, &json!({"queues": 1}))
}

fn ram_disk(daemon: &Daemon, name: &str) -> PathBuf {
    daemon.call(
        "bdev_malloc_create",
        &json!({"name": name, "block_size": 512, "num_blocks": 8 * MIB / 512, "queues": 1}),
    );
    daemon.add_controller(name, name, &json!({}))
}

fn facts(daemon: &Daemon, bdev: &str) -> Value {
    daemon.call("bdev_get_bdevs", &json!({"name": bdev}))[0]["driver_specific"]["facts"].clone()
}

/// The queue whose requests cross to the other reactor.
fn crossing_queue(daemon: &Daemon, controller: &str) -> usize {
    let shown = daemon.call("vhost_get_controllers", &json!({"name": controller}));
    let queues = shown[0]["sessions"][0]["queues"].as_array().expect("queues").clone();
    assert_eq!(queues.len(), 2, "{shown}");
    assert_ne!(queues[0]["lcore"], queues[1]["lcore"], "one queue on each reactor: {shown}");
    assert_eq!(queues[0]["device_lcore"], queues[1]["device_lcore"], "one owner: {shown}");
    queues.iter().position(|q| q["lcore"] != q["device_lcore"]).expect("the other one crosses")
}

#[test]
fn two_queues_over_one_device_queue_keep_their_data() {
    let daemon = daemon(50);
    let disks = [("ram", ram_disk(&daemon, "ram")), ("file", file_disk(&daemon, "file"))];
    for (name, socket) in &disks {
        let client = connect(socket, 2, 32, SLOT_BYTES);
        let mut exercise = Exercise::new(client, 32, seed(0xc055));
        let span = exercise.sectors_count();
        crossing_queue(&daemon, name);
        exercise.random_for(Duration::from_millis(1500), span, 64, |_| false);
        exercise.drain();
        exercise.verify();
        let facts = facts(&daemon, name);
        assert_eq!(facts["queues"], 1, "{facts}");
        let crossed = facts["crossed_requests"].as_u64().expect("a number");
        let share = exercise.completed_count / 4..exercise.completed_count * 3 / 4;
        assert!(share.contains(&crossed), "{crossed} of {} crossed", exercise.completed_count);
    }
    // Two disks, two owners.
    let owners = disks.map(|(name, _)| facts(&daemon, name)["queue_owners"].clone());
    assert_eq!(owners, [json!("[0]"), json!("[1]")]);
    let saved = daemon.call("framework_get_config", &json!({"name": "bdev"}));
    let queues: Vec<_> =
        saved.as_array().expect("calls").iter().map(|c| &c["params"]["queues"]).collect();
    assert_eq!(queues, [1, 1], "{saved}");
    daemon.stop();
}

#[test]
fn as_many_device_queues_as_reactors_need_no_crossing() {
    let daemon = daemon(50);
    for queues in [0, 2, 1024] {
        let name = format!("null{queues}");
        let params = json!({"name": name, "block_size": 512, "num_blocks": 2048, "queues": queues});
        daemon.call("bdev_null_create", &params);
        assert_eq!(facts(&daemon, &name), Value::Null);
    }
    let (code, message) = daemon
        .rpc()
        .try_call(
            "bdev_null_create",
            &json!({"name": "x", "block_size": 512, "num_blocks": 8, "queues": 1025}),
        )
        .expect_err("too many");
    assert!(code == -32602 && message.contains("1024"), "{code} {message}");
    daemon.stop();
}

#[test]
fn no_wake_up_is_lost_between_reactors_that_sleep_at_once() {
    const COUNT: u64 = 3000;
    let daemon = daemon(0);
    let sockets = [ram_disk(&daemon, "ram"), file_disk(&daemon, "file")];
    for (name, socket) in ["ram", "file"].into_iter().zip(&sockets) {
        let mut exercise = Exercise::new(connect(socket, 2, 4, 4096), 4, seed(0x51ee));
        let queue = crossing_queue(&daemon, name);
        let (mut longest, mut late_count) = (Duration::ZERO, 0);
        for round in 0..COUNT {
            let op = if round % 2 == 0 { Op::Write } else { Op::Read };
            let started = Instant::now();
            assert!(exercise.begin(op, queue, round / 2 * 8 % 8192, 8));
            exercise.drain();
            let took = started.elapsed();
            longest = longest.max(took);
            // A reactor's longest sleep is a second: what nobody woke it for takes about that long.
            late_count += u32::from(took > Duration::from_millis(800));
            if round % 8 == 0 {
                // Long enough for both reactors to be asleep.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        eprintln!("{name}: the slowest of {COUNT} took {} ms", longest.as_millis());
        // A disk that others keep busy may take its time now and then; memory may not.
        let late_max = if name == "file" { 3 } else { 0 };
        assert!(late_count <= late_max, "{name}: {late_count} late ones, {longest:?}");
        assert_eq!(facts(&daemon, name)["crossed_requests"], COUNT);
    }
    daemon.stop();
}

/// Runs a load on `socket` while `act` happens in another thread; all its requests are answered.
fn load_while(socket: &Path, act: impl FnOnce() + Send) -> Exercise {
    let mut exercise = Exercise::new(connect(socket, 2, 32, SLOT_BYTES), 32, seed(0x10ad));
    exercise.tolerates_errors = true;
    let span = exercise.sectors_count();
    std::thread::scope(|scope| {
        let acting = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            act();
        });
        exercise.random_for(WAIT_MAX, span, 64, |e| acting.is_finished() && e.errors_count > 100);
        acting.join().expect("the action succeeds");
    });
    exercise.drain();
    exercise
}

#[test]
fn a_crossed_disk_removed_under_load_goes_at_once_and_leaves_nothing() {
    let daemon = daemon(50);
    for round in 0..3 {
        let (ram, file) = (format!("ram{round}"), format!("file{round}"));
        for (name, delete) in [(&ram, "bdev_malloc_delete"), (&file, "bdev_uring_delete")] {
            let socket =
                if *name == file { file_disk(&daemon, name) } else { ram_disk(&daemon, name) };
            let mut exercise = load_while(&socket, || {
                let asked = Instant::now();
                daemon.call(delete, &json!({"name": name}));
                // The owner gives its port back while requests of both reactors are on their way.
                assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
            });
            assert!(exercise.completed_count > exercise.errors_count);
            assert!(!exercise.succeeds(Op::Read, 0, 1), "{name} still reads");
            let pollers = daemon.call("thread_get_pollers", &json!({})).to_string();
            assert!(!pollers.contains(":queue"), "a port is left behind: {pollers}");
            daemon.call("vhost_delete_controller", &json!({"ctrlr": name}));
        }
    }
    daemon.stop();
}

#[test]
fn a_daemon_with_crossed_disks_under_load_ends_in_time() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut daemon = daemon(50);
    let sockets = [ram_disk(&daemon, "ram"), file_disk(&daemon, "file")];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for socket in &sockets {
            scope.spawn(|| {
                let mut exercise =
                    Exercise::new(connect(socket, 2, 16, SLOT_BYTES), 16, seed(0xda3));
                exercise.tolerates_errors = true;
                let span = exercise.sectors_count();
                exercise.random_for(WAIT_MAX, span, 64, |_| stop.load(Ordering::Relaxed));
            });
        }
        std::thread::sleep(Duration::from_millis(500));
        let asked = Instant::now();
        daemon.signal(rustix::process::Signal::TERM);
        let status = daemon.wait_exit(Duration::from_secs(10));
        let took = asked.elapsed();
        stop.store(true, Ordering::Relaxed);
        assert!(status.is_some_and(|s| s.success()), "{status:?}: {}", daemon.stderr());
        assert!(took < Duration::from_secs(5), "took {took:?}");
    });
}

#[test]
fn a_flush_that_crosses_reaches_the_medium() {
    let daemon = daemon(50);
    let image = daemon.dir().join("loop.img");
    set_len(&image, 8 * MIB);
    let device = match LoopDevice::on(&image) {
        Ok(device) => device,
        Err(why) => return skip("crossed flushes on a loop device", &why),
    };
    let socket = daemon.add_uring("disk", &device.path, &json!({"queues": 1}));
    let mut exercise = Exercise::new(connect(&socket, 2, 8, SLOT_BYTES), 8, 1);
    let queue = crossing_queue(&daemon, "disk");
    for round in 0..8 {
        assert!(exercise.begin(Op::Write, queue, round * 8, 8));
        exercise.drain();
        let before = device.flushes_count();
        assert!(exercise.begin(Op::Flush, queue, 0, 0));
        exercise.drain();
        assert!(device.flushes_count() > before, "a flush that was not passed on");
    }
    exercise.verify();
    drop(exercise);
    daemon.stop();
}
