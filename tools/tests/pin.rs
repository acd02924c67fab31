//! `pin = on` at the daemon: guests' memory is pinned when their rings run, in every reactor's table of buffers while it is
//! theirs, and nowhere afterwards; where it cannot be, the disk works without.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/frontend.rs"]
mod frontend;
#[path = "support/media.rs"]
mod media;

use std::fs;
use std::path::{Path, PathBuf};

use daemon::{Daemon, WAIT_MAX, wait_for};
use frontend::*;
use media::{MIB, is_root, set_len, skip};
use serde_json::json;
use tempfile::TempDir;

const DATA_GUEST: u64 = 0x4000_0000;
const DATA2_GUEST: u64 = 0x8000_0000;
const SLOTS: u16 = 64;
const ALL: u64 = P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS | P_RESET_DEVICE;
const RINGS_BYTES: u64 = 4 * RING_BYTES;
const DATA_LEN: u64 = SLOTS as u64 * DATA_BYTES;

fn disk(daemon: &Daemon, name: &str, pin: &str) -> PathBuf {
    let image = daemon.dir().join(format!("{name}.img"));
    set_len(&image, 8 * MIB);
    daemon.call("bdev_uring_create", &json!({"name": name, "filename": image}));
    daemon.add_controller(name, name, &json!({"pin": pin}))
}

fn data(guest: u64) -> Memory {
    Memory::new(guest, DATA_LEN)
}

/// A front-end with one ring that runs, and its data's memory.
fn running(daemon: &Daemon, name: &str) -> (FrontEnd, Load, Memory) {
    running_with(daemon, name, data(DATA_GUEST))
}

fn running_with(daemon: &Daemon, name: &str, data: Memory) -> (FrontEnd, Load, Memory) {
    let (front, load) = running_in(&daemon.socket(name), ALL, SLOTS, &data);
    (front, load, data)
}

fn pin_state(daemon: &Daemon, name: &str) -> String {
    let shown = daemon.call("vhost_get_controllers", &json!({"name": name}));
    shown[0]["pin"].as_str().expect("a word").to_owned()
}

#[track_caller]
fn wait_for_state(daemon: &Daemon, name: &str, wanted: &str) {
    let reached = wait_for(WAIT_MAX, || pin_state(daemon, name).starts_with(wanted));
    assert!(
        reached,
        "{name}: {} instead of {wanted}\n{}",
        pin_state(daemon, name),
        daemon.stderr()
    );
}

/// Bytes that the kernel has pinned for the daemon (`VmPin`).
fn pinned_bytes(daemon: &Daemon) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().map_or(u64::MAX, |kib| kib * 1024)
}

/// The filled slots in the tables of the daemon's reactors: the rings whose table is a whole one.
fn reactor_slots(daemon: &Daemon) -> usize {
    let dir = format!("/proc/{}/fd", daemon.pid());
    let mut count = 0;
    for entry in fs::read_dir(&dir).expect("our child").flatten() {
        let is_ring = fs::read_link(entry.path())
            .is_ok_and(|target| target == Path::new("anon_inode:[io_uring]"));
        if !is_ring {
            continue;
        }
        let info = format!("/proc/{}/fdinfo/{}", daemon.pid(), entry.file_name().to_string_lossy());
        let text = fs::read_to_string(info).unwrap_or_default();
        let mut lines = text.lines().skip_while(|line| !line.starts_with("UserBufs:"));
        let size = lines.next().and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        if size == Some(16384) {
            count += lines.take(16384).filter(|line| line.contains(": 0x")).count();
        }
    }
    count
}

#[track_caller]
fn wait_for_slots(daemon: &Daemon, wanted: usize) {
    let reached = wait_for(WAIT_MAX, || reactor_slots(daemon) == wanted);
    assert!(reached, "{} slots instead of {wanted}\n{}", reactor_slots(daemon), daemon.stderr());
}

#[test]
fn memory_is_pinned_while_rings_run_and_only_where_asked() {
    let daemon = Daemon::start();
    for (name, pin) in [("on", "on"), ("off", "off"), ("auto", "auto")] {
        disk(&daemon, name, pin);
        assert_eq!(pin_state(&daemon, name), if pin == "on" { "pinning" } else { "off" });
    }
    let (_off, mut load_off, data_off) = running(&daemon, "off");
    let (_auto, mut load_auto, data_auto) = running(&daemon, "auto");
    load_off.run(&data_off, 500);
    load_auto.run(&data_auto, 500);
    assert_eq!((pinned_bytes(&daemon), reactor_slots(&daemon)), (0, 0));
    let (mut front, mut load, home) = running(&daemon, "on");
    load.run(&home, 500);
    wait_for_state(&daemon, "on", "on");
    wait_for_slots(&daemon, 2);
    assert_eq!(pinned_bytes(&daemon), RINGS_BYTES + DATA_LEN);
    load.run(&home, 2000);
    // A ring that stops lets go of its reactor's slots; the memory stays pinned for the next.
    load.drain(&[&home]);
    let base = front.stop(&load.ring);
    wait_for_slots(&daemon, 0);
    front.start(&load.ring, base);
    wait_for_slots(&daemon, 2);
    load.run(&home, 500);
    load.drain(&[&home]);
    drop(front);
    wait_for_slots(&daemon, 0);
    assert!(wait_for(WAIT_MAX, || pinned_bytes(&daemon) == 0), "{}", pinned_bytes(&daemon));
    assert_eq!(pin_state(&daemon, "on"), "pinning");
    assert!(!daemon.stderr().contains("not pinned"), "{}", daemon.stderr());
    daemon.stop();
}

#[test]
fn pinned_memory_is_added_and_removed_under_load() {
    let daemon = Daemon::with(["-m", "3"]);
    disk(&daemon, "disk", "on");
    let (mut front, mut load, home) = running(&daemon, "disk");
    for round in 0..40 {
        let extra = data(DATA2_GUEST);
        load.submit(&home);
        front.add_memory(&extra);
        load.run_with(&extra, &[&home, &extra], 150);
        if round % 2 == 0 {
            // Every other region goes while it is being registered.
            wait_for_state(&daemon, "disk", "on");
            wait_for_slots(&daemon, 3);
            load.run_with(&extra, &[&home, &extra], 150);
        }
        load.submit(&extra);
        load.tolerates_errors = true;
        front.remove_memory(&extra);
        let left = extra.contents();
        load.run_with(&home, &[&home, &extra], 50);
        while load.uses(DATA2_GUEST) > 0 {
            load.poll(&[&home, &extra]);
        }
        assert!(left == extra.contents(), "memory changed after its removal");
        load.tolerates_errors = false;
        wait_for_state(&daemon, "disk", "on");
    }
    wait_for_slots(&daemon, 2);
    let settled = wait_for(WAIT_MAX, || pinned_bytes(&daemon) == RINGS_BYTES + DATA_LEN);
    assert!(settled, "{} bytes pinned", pinned_bytes(&daemon));
    // Whole tables, too.
    for round in 0..20_u64 {
        let next = data(if round % 2 == 0 { DATA2_GUEST } else { DATA_GUEST });
        load.drain(&[&home]);
        front.set_memory(&[&load.memory, &next]);
        load.data_guest = next.guest;
        load.run(&next, 100);
        wait_for_state(&daemon, "disk", "on");
        wait_for_slots(&daemon, 2);
        load.run(&next, 200);
        load.drain(&[&next]);
        front.set_memory(&[&load.memory, &home]);
        load.data_guest = home.guest;
        load.run(&home, 100);
    }
    load.drain(&[&home]);
    daemon.stop();
}

#[test]
fn guests_on_one_reactor_keep_their_data_apart() {
    let daemon = Daemon::start();
    for name in ["stays", "comes"] {
        disk(&daemon, name, "on");
    }
    // Every request is checked against what was written: a slot that named the other's memory would show at once.
    let (_front, mut stays, home) = running(&daemon, "stays");
    wait_for_state(&daemon, "stays", "on");
    for _ in 0..30 {
        let (front, mut comes, other) = running(&daemon, "comes");
        stays.submit(&home);
        wait_for_state(&daemon, "comes", "on");
        wait_for_slots(&daemon, 4);
        for _ in 0..5 {
            comes.run(&other, 60);
            stays.run(&home, 60);
        }
        // Gone in the middle of its load: what is in flight ends in its own memory.
        comes.submit(&other);
        drop(front);
        wait_for_slots(&daemon, 2);
        stays.run(&home, 100);
    }
    stays.drain(&[&home]);
    daemon.stop();
}

#[test]
fn without_enough_lockable_memory_the_disk_works_unpinned() {
    const NAME: &str = "without_enough_lockable_memory_the_disk_works_unpinned";
    // Enough for the reactor's ring, which counts, too, and not for this guest.
    const LIMIT_BYTES: u64 = 4 * MIB;
    const GUEST_BYTES: u64 = 16 * MIB;
    let limit = format!("--memlock={LIMIT_BYTES}");
    let mut through = vec!["prlimit", limit.as_str()];
    if is_root() {
        // A root without this capability is held to the limit as everybody else is.
        through.extend(["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]);
    }
    if std::process::Command::new(through[0]).args(&through[1..]).arg("true").status().is_err() {
        return skip(NAME, "no prlimit or setpriv");
    }
    let dir = TempDir::new().expect("a directory");
    let daemon = Daemon::in_dir(dir, Path::new(daemon::RINGMILLD), &through, ["-m", "1"]);
    disk(&daemon, "disk", "on");
    for _ in 0..2 {
        let (front, mut load, home) =
            running_with(&daemon, "disk", Memory::new(DATA_GUEST, GUEST_BYTES));
        load.run(&home, 500);
        wait_for_state(&daemon, "disk", "refused: ");
        let (need, limit) = ((RINGS_BYTES + GUEST_BYTES).to_string(), LIMIT_BYTES.to_string());
        let state = pin_state(&daemon, "disk");
        assert!(state.contains(&need) && state.contains(&limit), "{state}");
        load.run(&home, 2000);
        load.drain(&[&home]);
        assert_eq!(reactor_slots(&daemon), 0);
        drop(front);
        wait_for_state(&daemon, "disk", "pinning");
    }
    let lines = daemon.stderr().lines().filter(|line| line.contains("is not pinned")).count();
    assert_eq!(lines, 2, "one line per front-end: {}", daemon.stderr());
    assert!(wait_for(WAIT_MAX, || pinned_bytes(&daemon) == 0), "{}", pinned_bytes(&daemon));
    daemon.stop();
}

#[test]
fn memory_that_was_cut_is_refused_and_harms_nobody() {
    let daemon = Daemon::start();
    for name in ["cut", "whole"] {
        disk(&daemon, name, "on");
    }
    let mut front = FrontEnd::connect(&daemon.socket("cut"), F_FLUSH, ALL);
    let (rings, data) = (Memory::new(0, RINGS_BYTES), Memory::new(DATA_GUEST, 4 * DATA_LEN));
    front.add_memory(&rings);
    front.add_memory(&data);
    // The kernel finds the end of the file in the middle of the region.
    data.file.set_len(2 * DATA_LEN).expect("our own file");
    let mut load = Load::new(rings, 0, SLOTS, DATA_GUEST);
    front.start(&load.ring, 0);
    wait_for_state(&daemon, "cut", "refused: ");
    load.run(&data, 500);
    let (_other, mut other_load, home) = running(&daemon, "whole");
    wait_for_state(&daemon, "whole", "on");
    wait_for_slots(&daemon, 2);
    other_load.run(&home, 500);
    // With better memory it is pinned after all.
    let better = Memory::new(DATA_GUEST, DATA_LEN);
    load.drain(&[&data]);
    front.set_memory(&[&load.memory, &better]);
    wait_for_state(&daemon, "cut", "on");
    load.run(&better, 500);
    load.drain(&[&better]);
    other_load.drain(&[&home]);
    daemon.stop();
}
