//! `ringmilld` as a process: signals, exit codes, sockets, start-up, idling, limits, configurations.
//!
//! In: a real daemon with real clients. Out: what an operator and the kernel see of it.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use daemon::{Daemon, RINGMILLD, Rpc, WAIT_MAX, wait_for};
use media::{LoopDevice, MIB, is_root, run, set_len, skip};
use model::{Exercise, Op, connect, seed};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

const SLOT_BYTES: usize = 64 << 10;

/// An ordinary user.
const NOBODY: &str = "65534";

/// CPU time of a process in seconds, from its `stat`: fields 14 and 15 (proc(5)).
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the daemon runs");
    // The name may contain spaces; it ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u32 = fields[11].parse::<u32>().unwrap() + fields[12].parse::<u32>().unwrap();
    // USER_HZ is 100 on every architecture that this runs on.
    f64::from(ticks) / 100.0
}

/// Keeps a load on a disk until told to stop; what the daemon does not answer any more is not waited for.
fn load_until(socket: &Path, stop: &AtomicBool) -> u64 {
    let mut exercise = Exercise::new(connect(socket, 1, 16, SLOT_BYTES), 16, seed(0xda3));
    exercise.tolerates_errors = true;
    let span = exercise.sectors_count();
    exercise.random_for(WAIT_MAX, span, 64, |_| stop.load(Ordering::Relaxed));
    exercise.completed_count
}

#[test]
fn sigterm_with_clients_under_load_ends_it_in_time() {
    let mut daemon = Daemon::with(["-m", "3"]);
    let image = daemon.dir().join("disk.img");
    set_len(&image, 8 * MIB);
    let sockets =
        [daemon.add_malloc("ram", 8 * MIB, 512), daemon.add_uring("file", &image, &json!({}))];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads = sockets.each_ref().map(|socket| scope.spawn(|| load_until(socket, &stop)));
        std::thread::sleep(Duration::from_millis(500));
        let asked = Instant::now();
        daemon.signal(Signal::TERM);
        let status = daemon.wait_exit(Duration::from_secs(10));
        let took = asked.elapsed();
        stop.store(true, Ordering::Relaxed);
        eprintln!("SIGTERM under load: {} ms", took.as_millis());
        assert!(status.is_some_and(|s| s.success()), "{status:?}");
        assert!(took < Duration::from_secs(5), "took {took:?}");
        for load in loads {
            assert!(load.join().expect("a load") > 0);
        }
    });
    for path in sockets.iter().chain([&daemon.rpc_socket]) {
        assert!(!path.exists(), "{} is left behind", path.display());
    }
}

#[test]
fn spdk_kill_instance_ends_it_like_a_signal() {
    let mut daemon = Daemon::start();
    assert_eq!(daemon.call("spdk_kill_instance", &json!({"sig_name": "SIGTERM"})), json!(true));
    let status = daemon.wait_exit(Duration::from_secs(10));
    assert!(status.is_some_and(|s| s.success()), "{status:?}");
    assert!(!daemon.rpc_socket.exists());
}

/// An ext4 in a file, mounted through a loop device, so that it can be frozen; thawed and unmounted when dropped.
struct FrozenMount {
    dir: TempDir,
    thawed: bool,
}

impl FrozenMount {
    fn new() -> Result<FrozenMount, String> {
        if !is_root() {
            return Err("needs root to mount and freeze a file system".to_owned());
        }
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).map_err(|e| e.to_string())?;
        let (image, point) = (dir.path().join("ext4.img"), dir.path().join("mnt"));
        set_len(&image, 48 * MIB);
        fs::create_dir(&point).map_err(|e| e.to_string())?;
        let image = image.to_str().expect("UTF-8");
        run("/usr/sbin/mkfs.ext4", &["-q", "-F", image])?;
        run("/usr/bin/mount", &["-o", "loop", image, point.to_str().expect("UTF-8")])?;
        Ok(FrozenMount { dir, thawed: true })
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn freeze(&mut self) -> Result<(), String> {
        run("/usr/sbin/fsfreeze", &["-f", self.point().to_str().expect("UTF-8")])?;
        self.thawed = false;
        Ok(())
    }

    fn thaw(&mut self) {
        if !std::mem::replace(&mut self.thawed, true) {
            let _ = run("/usr/sbin/fsfreeze", &["-u", self.point().to_str().expect("UTF-8")]);
        }
    }
}

impl Drop for FrozenMount {
    fn drop(&mut self) {
        self.thaw();
        let point = self.point();
        wait_for(Duration::from_secs(5), || {
            run("/usr/bin/umount", &[point.to_str().expect("UTF-8")]).is_ok()
        });
    }
}

#[test]
fn a_device_that_keeps_its_requests_is_named_and_the_exit_code_is_3() {
    const NAME: &str = "exit code 3 with a stuck device";
    let mut mount = match FrozenMount::new() {
        Ok(mount) => mount,
        Err(why) => return skip(NAME, &why),
    };
    let image = mount.point().join("disk.img");
    // Written, not sparse: an overwrite needs no journal, but it does wait for a frozen file system.
    fs::write(&image, vec![7; usize::try_from(8 * MIB).unwrap()]).expect("a mounted file system");
    let mut daemon = Daemon::start();
    let healthy = daemon.add_malloc("healthy", 8 * MIB, 512);
    let stuck = daemon.add_uring("stuckdisk", &image, &json!({}));
    let mut exercise = Exercise::new(connect(&stuck, 1, 4, 4096), 4, 1);
    if let Err(why) = mount.freeze() {
        return skip(NAME, &why);
    }
    assert!(exercise.begin(Op::Write, 0, 0, 8));
    exercise.kick();
    let answered = wait_for(Duration::from_secs(1), || exercise.poll() > 0);
    if answered {
        return skip(NAME, "writes go through to this frozen file system");
    }
    // Others are served, and the RPC shows what is stuck.
    Exercise::new(connect(&healthy, 1, 4, 4096), 4, 1).random_rounds(200, 1024, 8);
    let shown = daemon.call("vhost_get_controllers", &json!({"name": "stuckdisk"}));
    assert_eq!(shown[0]["sessions"][0]["inflight_task_cnt"], json!(1), "{shown}");

    let asked = Instant::now();
    daemon.signal(Signal::TERM);
    // The kernel lets a process go only when its writes have ended, so the words come first.
    let named = wait_for(Duration::from_secs(10), || daemon.stderr().contains("did not come back"));
    let took = asked.elapsed();
    let said = daemon.stderr();
    eprintln!("{NAME}: said so after {} ms", took.as_millis());
    mount.thaw();
    let status = daemon.wait_exit(WAIT_MAX);
    assert!(named && said.contains("stuckdisk"), "{said}");
    assert!(!said.contains("devices of healthy"), "{said}");
    assert_eq!(status.and_then(|s| s.code()), Some(3), "{said}");
    assert!(took < Duration::from_secs(8), "took {took:?}");
    drop(exercise);
}

#[test]
fn a_controller_of_a_stuck_device_is_answered_in_time_and_goes_when_it_can() {
    const NAME: &str = "deleting a controller with a stuck device";
    let mut mount = match FrozenMount::new() {
        Ok(mount) => mount,
        Err(why) => return skip(NAME, &why),
    };
    let image = mount.point().join("disk.img");
    fs::write(&image, vec![7; usize::try_from(MIB).unwrap()]).expect("a mounted file system");
    let daemon = Daemon::start();
    let socket = daemon.add_uring("stuck", &image, &json!({}));
    let mut exercise = Exercise::new(connect(&socket, 1, 4, 4096), 4, 1);
    if let Err(why) = mount.freeze() {
        return skip(NAME, &why);
    }
    assert!(exercise.begin(Op::Write, 0, 0, 8));
    exercise.kick();
    if wait_for(Duration::from_secs(1), || exercise.poll() > 0) {
        return skip(NAME, "writes go through to this frozen file system");
    }
    let asked = Instant::now();
    assert_eq!(daemon.call("vhost_delete_controller", &json!({"ctrlr": "stuck"})), json!(true));
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    let shown = daemon.call("vhost_get_controllers", &json!({"name": "stuck"}));
    assert_eq!(shown[0]["state"], json!("draining"), "{shown}");
    // Until then the disk is claimed, and everything else is as usual.
    let twice = json!({"ctrlr": "again", "dev_name": "stuck"});
    daemon.rpc().try_call("vhost_create_blk_controller", &twice).expect_err("still claimed");
    let other = daemon.add_malloc("other", MIB, 512);
    Exercise::new(connect(&other, 1, 4, 4096), 4, 1).random_rounds(100, 1024, 8);
    mount.thaw();
    assert!(wait_for(WAIT_MAX, || {
        daemon.rpc().try_call("vhost_create_blk_controller", &twice).is_ok()
    }));
    exercise.poll();
    drop(exercise);
    daemon.stop();
}

#[test]
fn sighup_changes_nothing() {
    let mut daemon = Daemon::start();
    let socket = daemon.add_malloc("ram", 8 * MIB, 512);
    let mut exercise = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1);
    for _ in 0..5 {
        daemon.signal(Signal::HUP);
        exercise.random_rounds(200, 1024, 64);
    }
    exercise.verify();
    assert!(daemon.is_alive());
    daemon.stop();
}

#[test]
fn a_second_daemon_on_the_same_sockets_says_so_and_ends() {
    let mut daemon = Daemon::start();
    let socket = daemon.add_malloc("ram", 8 * MIB, 512);
    let mut exercise = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1);
    let second = Command::new(RINGMILLD)
        .arg("-S")
        .arg(&daemon.sockets)
        .arg("-r")
        .arg(&daemon.rpc_socket)
        .output()
        .expect("a second daemon");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{said}");
    let path = daemon.rpc_socket.to_str().expect("UTF-8");
    assert!(said.contains(path) && said.lines().count() == 1, "{said}");

    // Another RPC socket, but the same name in the same directory: the controller's socket is taken.
    let config = daemon.dir().join("second.toml");
    let text = "[[disk]]\nname = \"ram\"\nbackend = \"malloc\"\nsize = \"1MiB\"\n";
    fs::write(&config, text).expect("the directory is ours");
    let third = Command::new(RINGMILLD)
        .arg("-S")
        .arg(&daemon.sockets)
        .arg("-r")
        .arg(daemon.dir().join("rpc3"))
        .arg("-c")
        .arg(&config)
        .stdin(Stdio::null())
        .output()
        .expect("a third daemon");
    let said = String::from_utf8_lossy(&third.stderr).into_owned();
    assert_eq!(third.status.code(), Some(1), "{said}");
    assert!(said.contains(socket.to_str().expect("UTF-8")), "{said}");
    assert!(daemon.is_alive());
    exercise.random_rounds(200, 1024, 64);
    let left = daemon.dir().join("rpc3");
    assert!(!left.exists(), "the refused daemon left its socket behind");
    drop(Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1));
    drop(exercise);
    daemon.stop();
}

#[test]
fn a_daemon_that_was_killed_leaves_sockets_that_the_next_one_replaces() {
    let dir = TempDir::new().expect("a temporary directory");
    let root = dir.path().to_owned();
    let image = root.join("disk.img");
    set_len(&image, 8 * MIB);
    let config = root.join("disks.toml");
    fs::write(&config, format!("[[disk]]\nname = \"vm\"\npath = {image:?}\n")).expect("ours");
    // The directory outlives the first daemon.
    let outer = dir;
    let start = || {
        let mut child = Command::new(RINGMILLD)
            .args(["-m", "1", "-c"])
            .arg(&config)
            .arg("-S")
            .arg(root.join("s"))
            .stderr(Stdio::null())
            .spawn()
            .expect("ringmilld starts");
        let is_up = wait_for(WAIT_MAX, || UnixStream::connect(root.join("s/vm")).is_ok());
        if !is_up {
            let _ = child.kill();
        }
        assert!(is_up, "it did not come up");
        child
    };
    let mut first = start();
    let mut exercise = Exercise::new(connect(&root.join("s/vm"), 1, 8, SLOT_BYTES), 8, 1);
    exercise.random_rounds(200, 1024, 64);
    first.kill().expect("our child");
    first.wait().expect("our child");
    assert!(root.join("s/vm").exists(), "SIGKILL leaves the sockets");
    let stamps = exercise.into_stamps();
    let mut second = start();
    Exercise::with_stamps(connect(&root.join("s/vm"), 1, 8, SLOT_BYTES), 8, 1, stamps).verify();
    second.kill().expect("our child");
    second.wait().expect("our child");
    drop(outer);
}

#[test]
fn two_disks_of_a_configuration_answer_their_first_request_at_once() {
    let dir = TempDir::new().expect("a temporary directory");
    let image = dir.path().join("disk.img");
    set_len(&image, 64 * MIB);
    let config = dir.path().join("disks.toml");
    fs::write(
        &config,
        format!(
            "[[disk]]\nname = \"ram\"\nbackend = \"malloc\"\nsize = \"64MiB\"\n\
             [[disk]]\nname = \"file\"\npath = {image:?}\n"
        ),
    )
    .expect("the directory is ours");
    let sockets = dir.path().join("s");
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let started = Instant::now();
        let mut child = Command::new(RINGMILLD)
            .args(["-m", "1", "-c"])
            .arg(&config)
            .arg("-S")
            .arg(&sockets)
            .stderr(Stdio::null())
            .spawn()
            .expect("ringmilld starts");
        for name in ["ram", "file"] {
            let socket = sockets.join(name);
            while UnixStream::connect(&socket).is_err() {
                assert!(started.elapsed() < WAIT_MAX, "{name} does not come up");
                std::thread::sleep(Duration::from_micros(200));
            }
            let mut exercise = Exercise::new(connect(&socket, 1, 1, 4096), 1, 1);
            exercise.one(Op::Read, 0, 8);
        }
        best = best.min(started.elapsed());
        child.kill().expect("our child");
        child.wait().expect("our child");
    }
    eprintln!("from start to the first request of both disks: {:.1} ms", best.as_secs_f64() * 1e3);
    assert!(best < Duration::from_secs(1), "{best:?}");
}

#[test]
fn an_ordinary_user_serves_files_without_hugepages() {
    let dir = TempDir::new().expect("a temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("ours");
    let image = dir.path().join("disk.img");
    set_len(&image, 8 * MIB);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o666)).expect("ours");
    // The program where that user can reach it.
    let program = dir.path().join("ringmilld");
    fs::copy(RINGMILLD, &program).expect("a copy");
    let through: &[&str] = if is_root() {
        &[
            "/usr/bin/setpriv",
            "--reuid",
            NOBODY,
            "--regid",
            NOBODY,
            "--clear-groups",
            "--inh-caps=-all",
            "--",
        ]
    } else {
        &[]
    };
    let daemon = Daemon::in_dir(dir, &program, through, ["-m", "1"]);
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    if is_root() {
        assert!(status.contains(&format!("Uid:\t{NOBODY}")), "{status}");
    }
    let disks =
        [daemon.add_uring("file", &image, &json!({})), daemon.add_malloc("ram", 8 * MIB, 512)];
    for socket in disks {
        let mut exercise = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, seed(5));
        exercise.random_rounds(500, 1024, 64);
        exercise.verify();
    }
    daemon.stop();
}

#[test]
fn sixteen_idle_disks_cost_next_to_nothing_and_answer_at_once() {
    let daemon = Daemon::with(["-m", "1", "--idle", "adaptive"]);
    let mut clients: Vec<Exercise> = (0..16)
        .map(|index| {
            let socket = daemon.add_malloc(&format!("disk{index}"), MIB, 512);
            Exercise::new(connect(&socket, 1, 4, 4096), 4, 1)
        })
        .collect();
    for client in &mut clients {
        client.one(Op::Write, 0, 8);
    }
    let before = cpu_seconds(daemon.pid());
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(10));
    let share = (cpu_seconds(daemon.pid()) - before) / started.elapsed().as_secs_f64();
    eprintln!("16 idle disks, adaptive: {:.2} % of a core", share * 100.0);
    assert!(share < 0.01, "{:.2} % of a core", share * 100.0);
    for (index, client) in clients.iter_mut().enumerate() {
        let asked = Instant::now();
        client.one(Op::Read, 0, 8);
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(1), "disk{index}: {took:?} after sleeping");
        eprint!("{} ", took.as_micros());
    }
    eprintln!("µs to the first answer of each");
    drop(clients);
    daemon.stop();
}

#[test]
fn a_polling_daemon_uses_its_whole_core() {
    let daemon = Daemon::with(["-m", "2", "--idle", "poll"]);
    let before = cpu_seconds(daemon.pid());
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let share = (cpu_seconds(daemon.pid()) - before) / started.elapsed().as_secs_f64();
    eprintln!("polling: {:.0} % of a core", share * 100.0);
    // Other tests want the core, too.
    assert!(share > 0.2, "{:.0} % of a core", share * 100.0);
    assert!(share < 1.2, "{:.0} % of a core", share * 100.0);
    // Set to adaptive, it sleeps at once.
    daemon.call("reactor_set_idle", &json!({"policy": "adaptive"}));
    let before = cpu_seconds(daemon.pid());
    std::thread::sleep(Duration::from_secs(1));
    assert!(cpu_seconds(daemon.pid()) - before < 0.1, "still polling");
    daemon.stop();
}

#[test]
fn the_limit_of_open_files_is_raised() {
    let dir = TempDir::new().expect("a temporary directory");
    let through = ["/bin/sh", "-c", "ulimit -S -n 100; exec \"$0\" \"$@\""];
    let daemon = Daemon::in_dir(dir, Path::new(RINGMILLD), &through, ["-m", "1"]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).expect("it runs");
    let line = limits.lines().find(|l| l.starts_with("Max open files")).expect("a limit");
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[3], words[4], "{line}");
    daemon.stop();
}

#[test]
fn mode_and_group_apply_to_every_socket() {
    let group = if is_root() { 12_345 } else { rustix::process::getgid().as_raw() };
    let number = group.to_string();
    let daemon = Daemon::with(["-m", "1", "--socket-mode", "0660", "--socket-group", &number]);
    let socket = daemon.add_malloc("ram", MIB, 512);
    for path in [&socket, &daemon.rpc_socket] {
        let about = fs::metadata(path).expect("a socket");
        assert_eq!(about.mode() & 0o777, 0o660, "{}", path.display());
        assert_eq!(about.gid(), group, "{}", path.display());
    }
    daemon.stop();
    let daemon = Daemon::start();
    let socket = daemon.add_malloc("ram", MIB, 512);
    for path in [&socket, &daemon.rpc_socket] {
        assert_eq!(fs::metadata(path).expect("a socket").mode() & 0o777, 0o600);
    }
    daemon.stop();
}

/// What `save_config` of clients makes of the RPC.
fn saved(rpc: &mut Rpc) -> Value {
    let subsystems = rpc.call("framework_get_subsystems", &json!({}));
    let list = subsystems.as_array().expect("a list").iter().map(|entry| {
        let name = &entry["subsystem"];
        json!({"subsystem": name, "config": rpc.call("framework_get_config", &json!({"name": name}))})
    });
    json!({"subsystems": list.collect::<Vec<_>>()})
}

#[test]
fn a_configuration_in_toml_saved_as_json_loads_as_the_same() {
    let dir = TempDir::new().expect("a temporary directory");
    let path = dir.path().to_owned();
    let image = path.join("disk.img");
    set_len(&image, 8 * MIB);
    let toml = path.join("disks.toml");
    fs::write(
        &toml,
        format!(
            "[daemon]\nidle = \"adaptive\"\nspin_us = 77\nlog_level = \"info\"\n\
             [[disk]]\nname = \"file\"\npath = {image:?}\ncache = \"writeback\"\nserial = \"S-1\"\nnum_queues = 3\n\
             [[disk]]\nname = \"ram\"\nbackend = \"malloc\"\nsize = \"8MiB\"\nblock_size = 4096\nreadonly = true\n\
             [[disk]]\nname = \"void\"\nbackend = \"null\"\nsize = \"1GiB\"\ncontroller = false\n\
             [[disk]]\nname = \"other\"\nbackend = \"malloc\"\nsize = \"1MiB\"\ncontroller = \"vm9\"\ncpumask = \"[0]\"\n"
        ),
    )
    .expect("ours");
    let (first_dir, second_dir) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let start = |dir: TempDir, config: &Path| {
        let args = ["-m".as_ref(), "1".as_ref(), "-c".as_ref(), config.as_os_str()];
        Daemon::in_dir(dir, Path::new(RINGMILLD), &[], args)
    };
    let first = start(first_dir, &toml);
    let config = saved(&mut first.rpc());
    let bdevs = first.call("bdev_get_bdevs", &json!({}));
    assert_eq!(bdevs.as_array().expect("a list").len(), 4);
    let mut exercise = Exercise::new(connect(&first.socket("file"), 3, 8, SLOT_BYTES), 8, 1);
    exercise.random_rounds(100, 1024, 64);
    exercise.one(Op::Flush, 0, 0);
    let stamps = exercise.into_stamps();
    first.stop();

    let saved_path = path.join("saved.json");
    fs::write(&saved_path, config.to_string()).expect("ours");
    let second = start(second_dir, &saved_path);
    assert_eq!(saved(&mut second.rpc()), config);
    assert_eq!(second.call("bdev_get_bdevs", &json!({})), bdevs, "uuids and all");
    Exercise::with_stamps(connect(&second.socket("file"), 3, 8, SLOT_BYTES), 8, 1, stamps).verify();
    assert!(!second.socket("void").exists());
    let mut read_only = Exercise::new(connect(&second.socket("ram"), 1, 1, 4096), 1, 1);
    assert!(!read_only.succeeds(Op::Write, 0, 8));
    drop(read_only);
    second.stop();
}

#[test]
fn the_first_answer_comes_after_the_whole_configuration() {
    const COUNT: usize = 60;
    let dir = TempDir::new().expect("a temporary directory");
    let mut text = String::new();
    for index in 0..COUNT {
        let image = dir.path().join(format!("{index}.img"));
        set_len(&image, MIB);
        text += &format!("[[disk]]\nname = \"disk{index}\"\npath = {image:?}\n");
    }
    let config = dir.path().join("disks.toml");
    fs::write(&config, text).expect("the directory is ours");
    let config = config.to_str().expect("UTF-8").to_owned();
    // Connects as soon as the socket is there.
    let daemon = Daemon::in_dir(dir, Path::new(RINGMILLD), &[], ["-m", "1", "-c", &config]);
    let mut rpc = daemon.rpc();
    assert_eq!(rpc.call("framework_wait_init", &json!({})), json!(true));
    let bdevs = rpc.call("bdev_get_bdevs", &json!({}));
    assert_eq!(bdevs.as_array().map(Vec::len), Some(COUNT));
    daemon.stop();
}

#[test]
fn disks_and_clients_that_are_gone_leave_nothing_open() {
    let daemon = Daemon::with(["-m", "3"]);
    let image = daemon.dir().join("disk.img");
    set_len(&image, MIB);
    let open = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("it runs").count();
    // Guest memory and images; the allocator's own mappings may come and go.
    let shared = || {
        let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.pid())).expect("it runs");
        maps.lines().filter(|line| line.contains("memfd:")).count()
    };
    let mut before = None;
    for round in 0..25 {
        for (name, delete) in [("file", "bdev_uring_delete"), ("ram", "bdev_malloc_delete")] {
            let socket = match name {
                "file" => daemon.add_uring(name, &image, &json!({})),
                _ => daemon.add_malloc(name, MIB, 512),
            };
            let mut exercise = Exercise::new(connect(&socket, 3, 8, SLOT_BYTES), 8, round);
            let sectors = exercise.sectors_count();
            exercise.one(Op::WriteZeroes(false), 0, sectors);
            exercise.tolerates_errors = true;
            exercise.random_rounds(50, 1024, 64);
            match round % 3 {
                0 => drop(exercise),
                1 => {
                    daemon.call("vhost_delete_controller", &json!({"ctrlr": name}));
                }
                _ => {
                    daemon.call(delete, &json!({"name": name}));
                    exercise.random_rounds(50, 1024, 64);
                    daemon.call("vhost_delete_controller", &json!({"ctrlr": name}));
                    continue;
                }
            }
            let _ = daemon.rpc().try_call("vhost_delete_controller", &json!({"ctrlr": name}));
            daemon.call(delete, &json!({"name": name}));
        }
        let now = (open(), shared());
        // The first rounds make what is kept: histograms, rings.
        if round == 2 {
            before = Some(now);
        }
    }
    let before = before.expect("25 rounds");
    let is_clean = wait_for(Duration::from_secs(5), || open() <= before.0 && shared() <= before.1);
    assert!(is_clean, "descriptors and memory files: {before:?} then {:?}", (open(), shared()));
    daemon.stop();
}

#[test]
fn two_hundred_disks_are_served_by_one_daemon() {
    const COUNT: usize = 200;
    let dir = TempDir::new().expect("a temporary directory");
    // Each disk needs several descriptors; the soft limit of a login shell is 1024.
    let through = ["/bin/sh", "-c", "ulimit -S -n 512; exec \"$0\" \"$@\""];
    let daemon = Daemon::in_dir(dir, Path::new(RINGMILLD), &through, ["-m", "3"]);
    let started = Instant::now();
    let mut rpc = daemon.rpc();
    for index in 0..COUNT {
        let name = format!("disk{index}");
        if index % 2 == 0 {
            rpc.call(
                "bdev_malloc_create",
                &json!({"name": name, "block_size": 512, "num_blocks": 2048}),
            );
        } else {
            let image = daemon.dir().join(&name);
            set_len(&image, MIB);
            rpc.call("bdev_uring_create", &json!({"name": name, "filename": image}));
        }
        rpc.call("vhost_create_blk_controller", &json!({"ctrlr": name, "dev_name": name}));
    }
    let made = started.elapsed();
    let mut clients: Vec<Exercise> = (0..COUNT)
        .map(|index| {
            let socket = daemon.socket(&format!("disk{index}"));
            Exercise::new(connect(&socket, 1, 2, 4096), 2, index as u64)
        })
        .collect();
    for _ in 0..3 {
        for client in &mut clients {
            let lba = client.entropy.below(client.sectors_count() - 8);
            assert!(client.begin(Op::Write, 0, lba, 8));
            client.kick();
        }
        for client in &mut clients {
            client.drain();
        }
    }
    for client in clients.iter_mut().step_by(17) {
        client.verify();
    }
    assert_eq!(rpc.call("vhost_get_controllers", &json!({})).as_array().map(Vec::len), Some(COUNT));
    eprintln!(
        "{COUNT} disks: made in {} ms, all in {} ms",
        made.as_millis(),
        started.elapsed().as_millis()
    );
    drop(rpc);
    drop(clients);
    daemon.stop();
}

/// Bytes of memory that only this process has, from its own page tables to its threads' stacks.
fn private_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("our child");
    let field = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    text.lines().filter(|l| l.starts_with("Private_")).filter_map(field).sum::<u64>() * 1024
}

#[test]
fn a_thousand_idle_disks_are_parked_and_small() {
    const COUNT: u64 = 1000;
    let daemon = Daemon::with(["-m", "1", "--idle", "poll"]);
    let mut rpc = daemon.rpc();
    let mut add = |index: u64| {
        let name = format!("disk{index}");
        let bdev = json!({"name": name, "block_size": 512, "num_blocks": 2048});
        rpc.call("bdev_malloc_create", &bdev);
        rpc.call("vhost_create_blk_controller", &json!({"ctrlr": name, "dev_name": name}));
        connect(&daemon.socket(&name), 1, 128, 4096)
    };
    // What only the first disk costs is not an idle disk's share.
    let mut busy = Exercise::new(add(0), 2, 1);
    busy.random_rounds(100, 8, 2);
    let before = private_bytes(daemon.pid());
    let idle: Vec<_> = (1..=COUNT).map(add).collect();
    let paused = || {
        daemon.call("thread_get_stats", &json!({}))["threads"][0]["paused_pollers_count"]
            .as_u64()
            .expect("a number")
    };
    assert!(wait_for(WAIT_MAX, || paused() >= COUNT), "{} queues are parked", paused());
    let each = private_bytes(daemon.pid()).saturating_sub(before) / COUNT;
    eprintln!("private memory of an idle disk: {each} bytes");
    assert!(each <= 64 << 10, "an idle disk costs {each} bytes of private memory");
    // Any of them answers its first request, and is parked again afterwards.
    for client in idle.into_iter().step_by(97) {
        Exercise::new(client, 2, 2).random_rounds(10, 8, 2);
    }
    busy.random_rounds(100, 8, 2);
}

#[test]
fn a_daemon_on_a_loop_device_gives_it_back() {
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory");
    let image = dir.path().join("loop.img");
    set_len(&image, 8 * MIB);
    let device = match LoopDevice::on(&image) {
        Ok(device) => device,
        Err(why) => return skip("releasing a loop device", &why),
    };
    let daemon = Daemon::start();
    let socket = daemon.add_uring("disk", &device.path, &json!({}));
    let mut exercise = Exercise::new(connect(&socket, 1, 8, SLOT_BYTES), 8, 1);
    exercise.random_rounds(100, 1024, 64);
    let taken = daemon
        .rpc()
        .try_call("bdev_uring_create", &json!({"name": "twice", "filename": device.path}))
        .expect_err("one owner per device");
    assert!(taken.1.contains(device.path.to_str().expect("UTF-8")), "{taken:?}");
    drop(exercise);
    daemon.stop();
    // Detaching fails while somebody has it open; a lazy detach would hide that.
    fs::OpenOptions::new().read(true).write(true).open(&device.path).expect("free again");
}
