//! vhost-user as a front-end written by hand speaks it: memory that comes and goes, rings that stop and start, resets,
//! and front-ends that harm only themselves.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/frontend.rs"]
mod frontend;
#[path = "support/media.rs"]
mod media;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use daemon::{Daemon, WAIT_MAX, wait_for};
use frontend::*;
use media::{MIB, set_len};
use serde_json::json;

const RINGS_GUEST: u64 = 0;
const DATA_GUEST: u64 = 0x4000_0000;
const DATA2_GUEST: u64 = 0x8000_0000;
const SLOTS: u16 = 64;
const ALL: u64 = P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS | P_RESET_DEVICE | P_BACKEND_REQ;

fn file_disk(daemon: &Daemon, name: &str) -> PathBuf {
    let image = daemon.dir().join(format!("{name}.img"));
    set_len(&image, 8 * MIB);
    daemon.add_uring(name, &image, &json!({}))
}

fn rings() -> Memory {
    Memory::new(RINGS_GUEST, 4 * RING_BYTES)
}

fn data(guest: u64) -> Memory {
    Memory::new(guest, u64::from(SLOTS) * DATA_BYTES)
}

/// A front-end with one running ring.
fn running(daemon: &Daemon, disk: &str) -> (FrontEnd, Load, Memory) {
    frontend::running(&daemon.socket(disk), ALL, SLOTS, DATA_GUEST)
}

fn sessions_count(daemon: &Daemon, disk: &str) -> usize {
    let shown = daemon.call("vhost_get_controllers", &json!({"name": disk}));
    shown[0]["sessions"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_front_end_that_knows_only_memory_tables_is_served() {
    let daemon = Daemon::start();
    let socket = file_disk(&daemon, "disk");
    // With several queues as SPDK's initiator has them, and with as little as Firecracker asks for.
    for protocol in [P_MQ | P_CONFIG, P_CONFIG] {
        let mut front = FrontEnd::connect(&socket, F_FLUSH, protocol);
        assert_eq!(front.capacity_sectors(), 8 * MIB / 512);
        let (first, second) = (data(DATA_GUEST), data(DATA2_GUEST));
        let memory = rings();
        front.set_memory(&[&memory, &first]);
        let mut load = Load::new(memory, 0, SLOTS, DATA_GUEST);
        front.start(&load.ring, 0);
        load.run(&first, 500);
        // A new table under load: the rings stay, the data moves.
        for round in 0..20 {
            let (old, new) = if round % 2 == 0 { (&first, &second) } else { (&second, &first) };
            load.submit(old);
            front.set_memory(&[&load.memory, old, new]);
            load.submit(new);
            load.run_with(new, &[old, new], 200);
            load.drain(&[old, new]);
            front.set_memory(&[&load.memory, new]);
        }
        load.drain(&[&first, &second]);
        assert_eq!(front.stop(&load.ring), load.ring.avail_index);
    }
    daemon.stop();
}

#[test]
fn memory_is_added_and_removed_under_load() {
    for disk in ["file", "ram"] {
        let daemon = Daemon::with(["-m", "3"]);
        if disk == "file" {
            file_disk(&daemon, disk);
        } else {
            daemon.add_malloc(disk, 8 * MIB, 512);
        }
        let (mut front, mut load, home) = running(&daemon, disk);
        for _ in 0..60 {
            let extra = data(DATA2_GUEST);
            load.submit(&home);
            front.add_memory(&extra);
            load.run_with(&extra, &[&home, &extra], 150);
            // Requests that use the region are in flight when it goes. Those that were taken end first; those that were
            // not are refused, because their memory is not there any more.
            load.submit(&extra);
            load.tolerates_errors = true;
            front.remove_memory(&extra);
            // From the answer on nobody touches it.
            let left = extra.contents();
            load.run_with(&home, &[&home, &extra], 50);
            while load.uses(DATA2_GUEST) > 0 {
                load.poll(&[&home, &extra]);
            }
            assert!(left == extra.contents(), "{disk}: memory changed after its removal");
            load.tolerates_errors = false;
        }
        assert!(load.failed_count < load.completed_count / 4, "{disk}: {}", load.failed_count);
        load.drain(&[&home]);
        daemon.stop();
    }
}

#[test]
fn a_ring_stops_under_load_and_goes_on_where_it_was() {
    for disk in ["file", "ram"] {
        let daemon = Daemon::start();
        if disk == "file" {
            file_disk(&daemon, disk);
        } else {
            daemon.add_malloc(disk, 8 * MIB, 512);
        }
        let (mut front, mut load, data) = running(&daemon, disk);
        for round in 0..100 {
            load.run(&data, 40 + round);
            load.submit(&data);
            let base = front.stop(&load.ring);
            // All that was taken is done, and nothing else: the ring stands still at its base.
            load.poll(&[&data]);
            assert_eq!(load.ring.used_index, base, "{disk}, round {round}");
            let before = load.completed_count;
            load.ring.kick_always();
            std::thread::sleep(Duration::from_millis(1));
            load.poll(&[&data]);
            assert_eq!(load.completed_count, before, "{disk}: a stopped ring works");
            front.start(&load.ring, base);
        }
        load.drain(&[&data]);
        daemon.stop();
    }
}

#[test]
fn a_device_is_reset_under_load_and_starts_afresh() {
    let daemon = Daemon::start();
    file_disk(&daemon, "disk");
    let (mut front, mut load, data) = running(&daemon, "disk");
    for _ in 0..50 {
        load.run(&data, 100);
        load.submit(&data);
        front.tell(RESET_DEVICE, &[], &[]);
        // Nothing moves any more, so the memory is the driver's to begin again with.
        load.poll(&[&data]);
        let used = load.ring.used_index;
        std::thread::sleep(Duration::from_millis(1));
        load.poll(&[&data]);
        assert_eq!(load.ring.used_index, used, "a reset device works");
        load = Load::new(load.memory, 0, SLOTS, DATA_GUEST);
        front.start(&load.ring, 0);
    }
    load.run(&data, 100);
    load.drain(&[&data]);
    daemon.stop();
}

#[test]
fn a_front_end_that_comes_back_finds_its_requests_done() {
    let daemon = Daemon::start();
    file_disk(&daemon, "disk");
    let (mut front, mut load, data) = running(&daemon, "disk");
    for _ in 0..30 {
        load.run(&data, 100);
        load.submit(&data);
        // Gone without a word; the guest's memory and rings stay.
        drop(front);
        front = FrontEnd::connect(&daemon.socket("disk"), F_FLUSH, ALL);
        front.add_memory(&load.memory);
        front.add_memory(&data);
        assert!(wait_for(WAIT_MAX, || sessions_count(&daemon, "disk") == 1));
        load.poll(&[&data]);
        // What was taken has been completed, so the ring goes on at the used index.
        front.start(&load.ring, load.ring.used_index);
    }
    load.drain(&[&data]);
    daemon.stop();
}

#[test]
fn a_resize_is_announced_and_asks_for_no_reply() {
    let daemon = Daemon::start();
    file_disk(&daemon, "disk");
    let (mut front, mut load, data) = running(&daemon, "disk");
    let mut channel = front.backend_channel();
    for mib in [16, 24, 8] {
        load.run(&data, 50);
        set_len(&daemon.dir().join("disk.img"), mib * MIB);
        daemon.call("bdev_uring_rescan", &json!({"name": "disk"}));
        let mut header = [0; 12];
        channel.read_exact(&mut header).expect("an announcement");
        // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1 and no need_reply, no payload.
        assert_eq!(header, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(front.capacity_sectors(), mib * MIB / 512);
    }
    load.drain(&[&data]);
    daemon.stop();
}

#[test]
fn a_disabled_ring_waits_and_loses_nothing() {
    let daemon = Daemon::with(["-m", "3"]);
    file_disk(&daemon, "disk");
    let (mut front, mut load, data) = running(&daemon, "disk");
    for round in 0..100 {
        load.run(&data, 50);
        load.submit(&data);
        front.enable(&load.ring, false);
        if round % 10 == 0 {
            // What was taken may still come back; after that the ring stands still.
            std::thread::sleep(Duration::from_millis(50));
            load.poll(&[&data]);
            load.submit(&data);
            load.ring.kick_always();
            let before = load.completed_count;
            std::thread::sleep(Duration::from_millis(20));
            load.poll(&[&data]);
            assert_eq!(load.completed_count, before, "a disabled ring takes requests");
        }
        front.enable(&load.ring, true);
    }
    load.drain(&[&data]);
    daemon.stop();
}

#[test]
fn a_front_end_that_cuts_its_memory_ends_only_its_own_session() {
    let mut daemon = Daemon::start();
    daemon.add_malloc("ram", 8 * MIB, 512);
    file_disk(&daemon, "file");
    daemon.add_malloc("other", 8 * MIB, 512);
    let (_other_front, mut other, other_data) = running(&daemon, "other");
    for disk in ["ram", "file"] {
        for cut_rings in [false, true] {
            let (mut front, mut load, data) = running(&daemon, disk);
            load.run(&data, 200);
            if cut_rings {
                load.submit(&data);
                load.memory.file.set_len(0).expect("our memfd");
            } else {
                load.drain(&[&data]);
                data.file.set_len(0).expect("our memfd");
                for slot in 0..SLOTS {
                    load.ring.submit(&load.memory, slot, slot % 2 == 0, 0, DATA_GUEST);
                }
            }
            load.ring.kick_always();
            other.run(&other_data, 200);
            assert!(daemon.is_alive(), "{disk}: the daemon died of a front-end");
            if cut_rings || disk == "ram" {
                let gone = front.is_sent_away(Duration::from_secs(10));
                assert!(
                    gone,
                    "{disk}, rings {cut_rings}: the session goes on:\n{}",
                    daemon.stderr()
                );
            }
            drop(front);
            assert!(wait_for(WAIT_MAX, || sessions_count(&daemon, disk) == 0));
            // The disk is as good as ever for the next one.
            let (mut front, mut load, data) = running(&daemon, disk);
            load.run(&data, 200);
            load.drain(&[&data]);
            assert_eq!(front.stop(&load.ring), load.ring.avail_index);
        }
    }
    other.run(&other_data, 500);
    other.drain(&[&other_data]);
    daemon.stop();
}

#[test]
fn two_rings_of_one_front_end_stop_and_start_on_two_cores() {
    let daemon = Daemon::with(["-m", "3"]);
    file_disk(&daemon, "disk");
    let (mut front, mut first, data) = running(&daemon, "disk");
    let (memory, second_data) =
        (Memory::new(0xc000_0000, 4 * RING_BYTES), crate::data(DATA2_GUEST));
    front.add_memory(&memory);
    front.add_memory(&second_data);
    let mut second = Load::new(memory, 1, SLOTS, DATA2_GUEST);
    front.start(&second.ring, 0);
    for round in 0..50 {
        first.run(&data, 50);
        second.run(&second_data, 50);
        first.submit(&data);
        second.submit(&second_data);
        let (load, datas) =
            if round % 2 == 0 { (&mut first, &data) } else { (&mut second, &second_data) };
        let base = front.stop(&load.ring);
        load.poll(&[datas]);
        assert_eq!(load.ring.used_index, base);
        front.start(&load.ring, base);
    }
    first.drain(&[&data]);
    second.drain(&[&second_data]);
    daemon.stop();
}

/// CPU time of the daemon in seconds (proc(5): fields 14 and 15 of `stat`, in hundredths).
fn cpu_seconds(daemon: &Daemon) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("it runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    f64::from(fields[11].parse::<u32>().unwrap() + fields[12].parse::<u32>().unwrap()) / 100.0
}

#[test]
fn noise_crowds_and_silence_on_a_disks_socket_disturb_nobody() {
    let daemon = Daemon::start();
    let socket = file_disk(&daemon, "disk");
    daemon.add_malloc("other", 8 * MIB, 512);
    let (_other_front, mut other, other_data) = running(&daemon, "other");
    let (mut front, mut load, data) = running(&daemon, "disk");
    let header = |request: u32, flags: u32, len: u32| {
        [request, flags, len].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>()
    };
    for bytes in [
        vec![0xff; 4096],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        header(GET_FEATURES, 0, 0),
        header(GET_FEATURES, 1, u32::MAX),
        header(SET_FEATURES, 1, 3),
        header(9999, 1, 0),
        [header(SET_MEM_TABLE, 1, 8), vec![0xff; 8]].concat(),
        [header(SET_VRING_NUM, 1, 8), vec![0xff; 8]].concat(),
        [header(SET_VRING_KICK, 1, 8), vec![0; 8]].concat(),
        [header(GET_VRING_BASE, 1, 8), vec![0xff; 8]].concat(),
    ] {
        let mut noisy = UnixStream::connect(&socket).expect("the disk's socket");
        noisy.write_all(&bytes).expect("it listens");
        noisy.set_read_timeout(Some(Duration::from_millis(50))).expect("a socket");
        let _ = noisy.read(&mut [0; 64]);
        load.run(&data, 50);
    }
    // More connections than are served, none of which says a whole message.
    let crowd: Vec<UnixStream> = (0..40)
        .map(|_| {
            let mut silent = UnixStream::connect(&socket).expect("the disk's socket");
            silent.write_all(&header(GET_FEATURES, 1, 0)[..7]).expect("it listens");
            silent
        })
        .collect();
    load.run(&data, 500);
    other.run(&other_data, 500);
    load.drain(&[&data]);
    other.drain(&[&other_data]);
    let before = cpu_seconds(&daemon);
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_seconds(&daemon) - before;
    assert!(used < 0.5, "{used} s of CPU in 2 s with silent front-ends");
    drop(crowd);
    assert!(wait_for(WAIT_MAX, || sessions_count(&daemon, "disk") == 1));
    load.run(&data, 100);
    load.drain(&[&data]);
    assert_eq!(front.stop(&load.ring), load.ring.avail_index);
    // Half a message keeps nobody from stopping the daemon.
    let mut silent = UnixStream::connect(&socket).expect("the disk's socket");
    silent.write_all(&[1, 0, 0]).expect("it listens");
    daemon.stop();
}
