//! What happens to a disk while a client uses it: resize, removal, a client that dies, a second one, odd features.
//!
//! The client is the `virtio-driver` crate on the real daemon. Every wait is bounded.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{Daemon, WAIT_MAX, wait_for};
use media::{LoopDevice, MIB, Zram, set_len, skip};
use model::{Exercise, Op, SECTOR_BYTES, connect, seed};
use ringmill_core::spec::{virtio_blk, virtio_ring};
use ringmill_tools::load::{Client, ClientOptions, Transfer};
use serde_json::json;

const RING_PACKED: u64 = 1 << 34;
const SLOT_BYTES: usize = 64 << 10;

fn file_disk(daemon: &Daemon, name: &str, size_bytes: u64) -> std::path::PathBuf {
    let image = daemon.dir().join(format!("{name}.img"));
    set_len(&image, size_bytes);
    daemon.add_uring(name, &image, &json!({}))
}

/// Sessions of a controller that the daemon knows of.
fn sessions_count(daemon: &Daemon, controller: &str) -> usize {
    let shown = daemon.call("vhost_get_controllers", &json!({"name": controller}));
    shown[0]["sessions"].as_array().expect("sessions").len()
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let daemon = Daemon::start();
    let image = daemon.dir().join("ro.img");
    std::fs::write(&image, vec![0x5a; 1 << 20]).expect("the directory is ours");
    let by_bdev = daemon.add_uring("ro", &image, &json!({"readonly": true}));
    daemon
        .call("bdev_malloc_create", &json!({"name": "ram", "block_size": 512, "num_blocks": 2048}));
    let by_controller = daemon.add_controller("roctl", "ram", &json!({"readonly": true}));
    for (socket, word) in [(by_bdev, 0x5a5a_5a5a_5a5a_5a5a), (by_controller, 0)] {
        let options = ClientOptions {
            queues_count: 1,
            queue_size: 64,
            slots_count: 8,
            slot_bytes: 4096,
            features_more: virtio_blk::F_RO,
            features_less: 0,
        };
        let mut client = Client::connect_with(&socket, &options).expect("a client");
        assert_ne!(client.features() & virtio_blk::F_RO, 0, "RO is offered");
        assert_eq!(
            client.features() & (virtio_blk::F_DISCARD | virtio_blk::F_WRITE_ZEROES),
            0,
            "nothing that writes is offered"
        );
        client.submit(0, Transfer::Read, 0, 0, 4096).expect("room");
        client.submit(0, Transfer::Write, 0, 1, 512).expect("room");
        client.submit_range(0, 0, 512, None, 2).expect("room");
        client.submit_range(0, 0, 512, Some(false), 3).expect("room");
        client.kick(0).expect("a kick");
        let mut done = Vec::new();
        assert!(wait_for(WAIT_MAX, || {
            client.completions(0, &mut done);
            done.len() == 4
        }));
        done.sort_unstable();
        assert_eq!(done[0], (0, 0), "a read works");
        assert!(done[1..].iter().all(|(_, ret)| *ret != 0), "{done:?}");
        assert!(client.read_slot(0, 4096).all(|w| w == word));
    }
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 0x5a));
    daemon.stop();
}

#[test]
fn a_disk_grows_and_shrinks_under_its_client() {
    let daemon = Daemon::start();
    let socket = file_disk(&daemon, "disk", 8 * MIB);
    let image = daemon.dir().join("disk.img");
    let mut exercise = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1);
    let old_end = exercise.sectors_count();
    exercise.one(Op::Write, old_end - 8, 8);
    assert!(!exercise.succeeds(Op::Write, old_end, 8));

    set_len(&image, 12 * MIB);
    // Nothing changes until somebody says so.
    assert_eq!(exercise.client.capacity_now().expect("a config"), 8 * MIB);
    daemon.call("bdev_uring_rescan", &json!({"name": "disk"}));
    assert_eq!(exercise.client.capacity_now().expect("a config"), 12 * MIB);
    exercise.stamps.resize(usize::try_from(12 * MIB / SECTOR_BYTES).unwrap(), 0);
    exercise.one(Op::Write, old_end - 4, 16);
    exercise.one(Op::Write, exercise.sectors_count() - 1, 1);
    exercise.verify();
    let shown = daemon.call("bdev_get_bdevs", &json!({"name": "disk"}));
    let block = shown[0]["block_size"].as_u64().unwrap();
    assert_eq!(shown[0]["num_blocks"].as_u64().unwrap() * block, 12 * MIB);

    // The file is cut before anybody says so: errors, and the daemon lives.
    set_len(&image, 4 * MIB);
    let new_end = 4 * MIB / SECTOR_BYTES;
    assert!(!exercise.succeeds(Op::Read, new_end, 8), "a read behind the file's end");
    daemon.call("bdev_uring_rescan", &json!({"name": "disk"}));
    assert_eq!(exercise.client.capacity_now().expect("a config"), 4 * MIB);
    for op in [Op::Read, Op::Write] {
        assert!(!exercise.succeeds(op, new_end, 8), "{op:?} beyond the new end");
        assert!(!exercise.succeeds(op, new_end - 1, 2), "{op:?} across the new end");
    }
    exercise.one(Op::Write, new_end - 1, 1);
    exercise.one(Op::Read, new_end - 1, 1);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 4 * MIB, "a write made the file longer");
    daemon.stop();
}

/// Runs a load on `socket` while `act` happens in another thread; returns how many requests failed.
fn load_while(socket: &Path, time: Duration, act: impl FnOnce() + Send) -> (u64, u64, Exercise) {
    let mut exercise = Exercise::new(connect(socket, 2, 32, SLOT_BYTES), 32, seed(0x10ad));
    exercise.tolerates_errors = true;
    let span = exercise.sectors_count();
    std::thread::scope(|scope| {
        let acting = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            act();
        });
        let end = Instant::now() + time;
        exercise.random_for(WAIT_MAX, span, 64, |e| {
            acting.is_finished() && (e.errors_count > 100 || Instant::now() > end)
        });
        acting.join().expect("the action succeeds");
    });
    // Every request is answered, whatever happened to the disk.
    exercise.drain();
    (exercise.completed_count, exercise.errors_count, exercise)
}

#[test]
fn a_bdev_removed_under_load_fails_its_requests_and_nothing_else() {
    let daemon = Daemon::with(["-m", "3"]);
    let other = daemon.add_malloc("other", 8 * MIB, 512);
    let mut neighbour = Exercise::new(connect(&other, 1, 8, SLOT_BYTES), 8, 2);
    for (name, delete) in [("gone", "bdev_uring_delete"), ("gone2", "bdev_malloc_delete")] {
        let socket = match delete {
            "bdev_uring_delete" => file_disk(&daemon, name, 8 * MIB),
            _ => daemon.add_malloc(name, 8 * MIB, 512),
        };
        let (completed, errors, mut exercise) = load_while(&socket, Duration::from_secs(1), || {
            daemon.call(delete, &json!({"name": name}));
        });
        assert!(completed > errors && errors > 100, "{name}: {errors} of {completed} failed");
        // The connection lives on: requests are still answered, and the configuration, too.
        assert!(!exercise.succeeds(Op::Read, 0, 1), "{name} still reads");
        assert!(!exercise.succeeds(Op::Write, 0, 1), "{name} still writes");
        exercise.client.capacity_now().expect("the connection lives on");
        let (code, _) = daemon
            .rpc()
            .try_call("bdev_get_bdevs", &json!({"name": name}))
            .expect_err("the bdev is gone");
        assert_eq!(code, -19);
        neighbour.random_rounds(500, 1024, 64);
        neighbour.verify();
        // The image is free again: another bdev can have it while the old client is still there.
        if delete == "bdev_uring_delete" {
            let image = daemon.dir().join(format!("{name}.img"));
            daemon.call("bdev_uring_create", &json!({"name": "again", "filename": image}));
            daemon.call("bdev_uring_delete", &json!({"name": "again"}));
        }
    }
    daemon.stop();
}

#[test]
fn a_controller_deleted_under_load_hangs_up_and_keeps_the_data() {
    let mut daemon = Daemon::with(["-m", "3"]);
    for round in 0..3 {
        let name = format!("disk{round}");
        let socket = file_disk(&daemon, &name, 8 * MIB);
        let mut exercise = Exercise::new(connect(&socket, 2, 32, SLOT_BYTES), 32, seed(3) + round);
        let span = exercise.sectors_count();
        let mut rpc = daemon.rpc();
        exercise.random_for(Duration::from_millis(200), span, 64, |_| false);
        rpc.send("vhost_delete_controller", &json!({"ctrlr": name}));
        // Goes on until nothing is answered any more; what is not answered is in doubt.
        for _ in 0..50 {
            for _ in 0..8 {
                exercise.random(span, 64);
            }
            let _ = exercise.client.kick(0);
            exercise.poll();
        }
        assert_eq!(rpc.answer(), Ok(json!(true)));
        assert!(!socket.exists(), "the socket is left behind");
        exercise.poll();
        let stamps = exercise.into_stamps();
        assert!(daemon.is_alive());
        let socket = daemon.add_controller(&name, &name, &json!({}));
        Exercise::with_stamps(connect(&socket, 1, 8, SLOT_BYTES), 8, 0, stamps).verify();
    }
    daemon.stop();
}

/// What the child writes to its journal, for each request twice: number, sector, state.
const STARTED: u64 = 1;
const FINISHED: u64 = 2;
const CHILD_SOCKET: &str = "RINGMILL_TEST_CHILD_SOCKET";
const CHILD_JOURNAL: &str = "RINGMILL_TEST_CHILD_JOURNAL";
const CHILD_SECTORS: u64 = 2048;

/// Not a test by itself: the client that the next test kills. Writes its own request number all over a sector and notes
/// when that was started and when it was done.
#[test]
fn child_that_writes_until_it_is_killed() {
    let (Some(socket), Some(journal)) =
        (std::env::var_os(CHILD_SOCKET), std::env::var_os(CHILD_JOURNAL))
    else {
        return;
    };
    let mut journal = OpenOptions::new().append(true).open(journal).expect("the journal");
    let mut note = |number: u64, lba: u64, state: u64| {
        let words = [number, lba, state].map(u64::to_le_bytes).concat();
        journal.write_all(&words).expect("the journal is writable");
    };
    const DEPTH: u32 = 32;
    let mut client = connect(Path::new(&socket), 1, DEPTH as usize, 512);
    let mut entropy = ringmill_core::reactor::Entropy::seeded(u64::from(std::process::id()));
    let mut inflight: Vec<Option<(u64, u64)>> = vec![None; DEPTH as usize];
    let (mut number, mut done) = (0, Vec::new());
    let end = Instant::now() + WAIT_MAX;
    while Instant::now() < end {
        for slot in 0..DEPTH {
            let lba = entropy.below(CHILD_SECTORS);
            let taken = inflight.iter().flatten().any(|(_, other)| *other == lba);
            if inflight[slot as usize].is_some() || taken {
                continue;
            }
            number += 1;
            inflight[slot as usize] = Some((number, lba));
            client.fill_slot(slot, 512, |_| number);
            note(number, lba, STARTED);
            client.submit(0, Transfer::Write, lba * SECTOR_BYTES, slot, 512).expect("room");
        }
        client.kick(0).expect("a kick");
        client.completions(0, &mut done);
        for (slot, ret) in done.drain(..) {
            assert_eq!(ret, 0);
            let (number, lba) = inflight[slot as usize].take().expect("in flight");
            note(number, lba, FINISHED);
        }
    }
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_writes_that_a_killed_client_saw_completed_are_there_for_the_next_one() {
    let daemon = Daemon::start();
    let zram = Zram::new(8 * MIB);
    let mut disks = vec![
        ("file", file_disk(&daemon, "file", 8 * MIB)),
        ("ram", daemon.add_malloc("ram", 8 * MIB, 512)),
    ];
    match &zram {
        Ok(zram) => disks.push(("zram", daemon.add_uring("zram", &zram.path, &json!({})))),
        Err(why) => skip("a killed client of a zram disk", why),
    }
    for (name, socket) in disks {
        let journal = daemon.dir().join(format!("journal-{name}"));
        File::create(&journal).expect("the directory is ours");
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD_SOCKET, &socket)
            .env(CHILD_JOURNAL, &journal)
            .stdout(Stdio::null())
            .spawn()
            .expect("a child");
        let mut child = KillOnDrop(child);
        let words_count = || std::fs::metadata(&journal).map_or(0, |about| about.len() / 8);
        assert!(wait_for(WAIT_MAX, || words_count() > 3_000), "{name}: the child writes nothing");
        child.0.kill().expect("our child");
        child.0.wait().expect("our child");

        let bytes = std::fs::read(&journal).expect("the journal");
        let words: Vec<u64> =
            bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        // Per sector: the last write that was completed, and any that was started since.
        let mut may_be = vec![vec![0_u64]; usize::try_from(CHILD_SECTORS).unwrap()];
        for entry in words.as_chunks::<3>().0 {
            let [number, lba, state] = *entry;
            let sector = &mut may_be[usize::try_from(lba).unwrap()];
            match state {
                FINISHED => *sector = vec![number],
                STARTED => sector.push(number),
                _ => panic!("a broken journal: {entry:?}"),
            }
        }
        let mut client = connect(&socket, 1, 1, 512);
        let mut done = Vec::new();
        for (lba, allowed) in (0_u64..).zip(&may_be) {
            client.fill_slot(0, 512, |_| u64::MAX);
            client.submit(0, Transfer::Read, lba * SECTOR_BYTES, 0, 512).expect("room");
            client.kick(0).expect("a kick");
            let end = Instant::now() + WAIT_MAX;
            while done.is_empty() {
                client.completions(0, &mut done);
                assert!(Instant::now() < end, "{name}: no answer to a read of sector {lba}");
            }
            assert_eq!(std::mem::take(&mut done), [(0, 0)], "{name}: sector {lba}");
            let first = client.read_slot(0, 512).next().expect("a word");
            assert!(
                allowed.contains(&first) && client.read_slot(0, 512).all(|word| word == first),
                "{name}: sector {lba} holds write {first}, not one of {allowed:?}"
            );
        }
    }
    daemon.stop();
}

#[test]
fn a_second_session_waits_until_the_first_has_stopped() {
    let daemon = Daemon::start();
    let socket = file_disk(&daemon, "disk", 8 * MIB);
    let mut first = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1);
    first.random_rounds(200, 1024, 64);
    // The second one may connect, negotiate and set up its rings...
    let mut second = connect(&socket, 2, 8, SLOT_BYTES);
    assert_eq!(second.capacity_now().expect("a config"), 8 * MIB);
    assert_eq!(sessions_count(&daemon, "disk"), 2);
    second.submit(1, Transfer::Read, 0, 0, 512).expect("room");
    second.kick(1).expect("a kick");
    // ...but its requests wait while the first one's are served.
    first.random_rounds(200, 1024, 64);
    let mut done = Vec::new();
    assert!(!wait_for(Duration::from_millis(300), || {
        second.completions(1, &mut done);
        !done.is_empty()
    }));
    first.random_rounds(200, 1024, 64);
    let stamps = first.into_stamps();
    assert!(wait_for(WAIT_MAX, || {
        second.completions(1, &mut done);
        !done.is_empty()
    }));
    assert_eq!(done, [(0, 0)]);
    let mut second = Exercise::with_stamps(second, 8, 2, stamps);
    // The slot of the read above was not the twin's; it is free again.
    second.random_rounds(200, 1024, 64);
    second.verify();
    assert_eq!(sessions_count(&daemon, "disk"), 1);
    daemon.stop();
}

#[test]
fn a_client_that_asks_for_packed_rings_and_indirect_tables_is_served() {
    let daemon = Daemon::start();
    let socket = daemon.add_malloc("ram", 8 * MIB, 512);
    let indirect = virtio_ring::F_INDIRECT_DESC;
    for (more, less) in [
        (RING_PACKED, 0),
        (RING_PACKED | indirect, 0),
        (indirect, virtio_ring::F_EVENT_IDX),
        (0, virtio_ring::F_EVENT_IDX),
    ] {
        let options = ClientOptions {
            queues_count: 2,
            queue_size: 64,
            slots_count: 16,
            slot_bytes: SLOT_BYTES,
            features_more: more,
            features_less: less,
        };
        let client = Client::connect_with(&socket, &options).expect("a client");
        assert_eq!(client.features() & (more | less), more);
        let mut exercise = Exercise::new(client, 8, seed(4));
        let sectors = exercise.sectors_count();
        exercise.one(Op::WriteZeroes(false), 0, sectors);
        exercise.random_rounds(1_000, sectors, 64);
        exercise.verify();
    }
    daemon.stop();
}

#[test]
fn writes_of_a_client_without_flush_are_stable_when_they_complete() {
    let daemon = Daemon::start();
    let image = daemon.dir().join("loop.img");
    set_len(&image, 8 * MIB);
    let device = match LoopDevice::on(&image) {
        Ok(device) => device,
        Err(why) => return skip("write-through on a loop device", &why),
    };
    let socket = daemon.add_uring("disk", &device.path, &json!({}));
    let options = ClientOptions {
        queues_count: 1,
        queue_size: 64,
        slots_count: 8,
        slot_bytes: SLOT_BYTES,
        features_more: 0,
        features_less: virtio_blk::F_FLUSH | virtio_blk::F_CONFIG_WCE,
    };
    let client = Client::connect_with(&socket, &options).expect("a client");
    let mut exercise = Exercise::new(client, 8, 1);
    for round in 0..20 {
        let before = device.flushes_count();
        // Whole blocks, single sectors, and zeroes alike.
        match round % 3 {
            0 => exercise.one(Op::Write, round * 8, 8),
            1 => exercise.one(Op::Write, round * 8 + 3, 1),
            _ => exercise.one(Op::WriteZeroes(round % 2 == 0), round * 8, 8),
        }
        let after = device.flushes_count();
        assert!(after > before, "round {round}: {after} flushes before and after");
        // On the medium, not in the loop device's cache.
        let mut sector = [1; 512];
        File::open(&image).and_then(|f| f.read_exact_at(&mut sector, round * 4096)).unwrap();
    }
    exercise.verify();
    drop(exercise);

    // With FLUSH, writes are not flushed one by one, but each flush is.
    let mut exercise = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1);
    exercise.one(Op::Write, 0, 8);
    let before = device.flushes_count();
    for lba in 0..32 {
        exercise.one(Op::Write, lba * 8, 8);
    }
    assert!(device.flushes_count() - before < 32, "writes of a write-back client are flushed");
    for _ in 0..5 {
        exercise.one(Op::Write, 0, 8);
        let before = device.flushes_count();
        exercise.one(Op::Flush, 0, 0);
        assert!(device.flushes_count() > before, "a flush that was not passed on");
    }
    drop(exercise);
    daemon.stop();
}
