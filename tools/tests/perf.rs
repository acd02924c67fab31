//! `ringmill-perf` on real servers: what it counts, what it finds, what it says.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use daemon::{Daemon, WAIT_MAX, wait_for};
use media::{MIB, set_len, skip};
use serde_json::{Value, json};
use tempfile::TempDir;

const PERF: &str = env!("CARGO_BIN_EXE_ringmill-perf");

fn perf(args: &[&str], sockets: &[&Path]) -> Output {
    Command::new(PERF).args(args).args(sockets).output().expect("ringmill-perf starts")
}

/// A run that must succeed, as JSON.
fn measured(args: &[&str], sockets: &[&Path]) -> Value {
    let output = perf(&[&["--json"], args].concat(), sockets);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{args:?}: {stderr}{}",
        String::from_utf8_lossy(&output.stdout)
    );
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// A run that must fail; what it said on both channels.
fn failed(args: &[&str], sockets: &[&Path]) -> String {
    let output = perf(args, sockets);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a count"))
}

/// A child that does not outlive its test.
struct Ended(Child);

impl Ended {
    /// A load in the background.
    fn start(args: &[&str], socket: &Path) -> Ended {
        let mut command = Command::new(PERF);
        command.args(args).arg(socket).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ended(command.spawn().expect("ringmill-perf starts"))
    }

    fn output(&mut self) -> Output {
        let status = self.0.wait().expect("our child");
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        if let Some(mut pipe) = self.0.stdout.take() {
            pipe.read_to_end(&mut stdout).expect("a pipe");
        }
        if let Some(mut pipe) = self.0.stderr.take() {
            pipe.read_to_end(&mut stderr).expect("a pipe");
        }
        Output { status, stdout, stderr }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// (reads, writes) as the daemon counts them.
fn counted(daemon: &Daemon, bdev: &str) -> (u64, u64) {
    let stats = daemon.call("bdev_get_iostat", &json!({"name": bdev}));
    let bdev = &stats["bdevs"][0];
    (count(&bdev["num_read_ops"]), count(&bdev["num_write_ops"]))
}

fn add_null(daemon: &Daemon, name: &str) -> std::path::PathBuf {
    daemon.call(
        "bdev_null_create",
        &json!({"name": name, "block_size": 512, "num_blocks": 64 * MIB / 512}),
    );
    daemon.add_controller(name, name, &json!({}))
}

#[test]
fn counts_agree_with_the_daemons() {
    let daemon = Daemon::with(["-m", "3"]);
    let null = add_null(&daemon, "null");
    let ram = daemon.add_malloc("ram", 64 * MIB, 512);
    for (name, socket) in [("null", &null), ("ram", &ram)] {
        for (args, reads, writes) in [
            (&["-w", "randread", "-q", "1"][..], true, false),
            (&["-w", "randrw", "-M", "70", "-n", "3", "-q", "17", "--indirect"], true, true),
            (&["-w", "write", "-o", "64k", "-q", "8", "--ramp", "0.1"], false, true),
        ] {
            let before = counted(&daemon, name);
            let result = measured(&[&["-t", "0.3"], args].concat(), &[socket]);
            let after = counted(&daemon, name);
            let job = &result["jobs"][0];
            assert_eq!(count(&job["read"]["all_ios"]), after.0 - before.0, "{name} {args:?}");
            assert_eq!(count(&job["write"]["all_ios"]), after.1 - before.1, "{name} {args:?}");
            assert_eq!((after.0 > before.0, after.1 > before.1), (reads, writes));
            for op in ["read", "write"] {
                let op = &job[op];
                assert!(count(&op["total_ios"]) <= count(&op["all_ios"]));
                assert_eq!(op["lat_ns"]["N"], op["total_ios"]);
            }
        }
    }
    daemon.stop();
}

#[test]
fn the_json_has_the_shape_of_fios() {
    let daemon = Daemon::with(["-m", "1"]);
    let (one, two) = (add_null(&daemon, "one"), add_null(&daemon, "two"));
    let hlog = daemon.dir().join("lat.hlog");
    let args = ["-t", "0.3", "-n", "2", "-q", "4", "--seed", "9", "--hlog"];
    let args = [&args[..], &[hlog.to_str().unwrap()]].concat();
    let result = measured(&args, &[&one, &two]);
    let read = &result["jobs"][0]["read"];
    let iops = read["iops"].as_f64().unwrap();
    assert!(iops > 0.0 && (read["bw_bytes"].as_f64().unwrap() / iops - 4096.0).abs() < 1e-6);
    let latency = &read["lat_ns"];
    let percentile = |name: &str| count(&latency["percentile"][name]);
    assert!(count(&latency["min"]) <= percentile("1.000000"));
    assert!(percentile("50.000000") <= percentile("99.000000"));
    assert!(percentile("99.990000") <= count(&latency["max"]));
    assert!(latency["mean"].as_f64().unwrap() > 0.0);
    assert_eq!(result["global options"]["seed"], 9);
    assert_eq!(result["verify"], Value::Null);
    assert_eq!(result["disks"].as_array().unwrap().len(), 2);
    for disk in result["disks"].as_array().unwrap() {
        let queues: u64 = disk["queues"].as_array().unwrap().iter().map(count).sum();
        assert_eq!(queues, count(&disk["total_ios"]));
        assert_eq!(count(&disk["size_bytes"]), 64 * MIB);
    }
    let log = fs::read_to_string(hlog).unwrap();
    // The V2 cookie and the upper half of the payload's length; the lower half is how long the histogram is.
    assert!(log.contains("Tag=all/all/read/client") && log.contains("HISTFAA"), "{log}");
    daemon.stop();
}

#[test]
fn verify_passes_on_good_disks() {
    let daemon = Daemon::with(["-m", "3"]);
    let ram = daemon.add_malloc("ram", 16 * MIB, 512);
    let image = daemon.dir().join("image");
    set_len(&image, 16 * MIB);
    let file = daemon.add_uring("file", &image, &json!({"cache": "writeback"}));
    let args = ["-w", "verify", "-t", "0.5", "-q", "16", "-n", "2"];
    for more in [&["-o", "4k"][..], &["-o", "512", "--indirect"], &["-o", "24k", "-M", "20"]] {
        let result = measured(&[&args, more].concat(), &[&ram, &file]);
        let verify = &result["verify"];
        assert_eq!(verify["faults"], 0);
        assert!(count(&verify["sectors_checked"]) >= 2 * 15 * MIB / 512);
        assert!(count(&result["jobs"][0]["flush"]["all_ios"]) >= 2);
    }
    daemon.stop();
}

#[test]
fn packed_rings_carry_every_load() {
    let daemon = Daemon::with(["-m", "3"]);
    let ram = daemon.add_malloc("ram", 16 * MIB, 512);
    let image = daemon.dir().join("image");
    set_len(&image, 16 * MIB);
    let file = daemon.add_uring("file", &image, &json!({"cache": "writeback"}));
    for form in [&["--packed"][..], &["--packed", "--indirect"]] {
        for args in [
            &["-w", "randread", "-q", "1"][..],
            &["-w", "randrw", "-M", "30", "-n", "3", "-q", "128"],
            &["-w", "write", "-o", "64k", "-q", "7"],
        ] {
            let before = counted(&daemon, "ram");
            let result = measured(&[&["-t", "0.3"], args, form].concat(), &[&ram]);
            let (after, job) = (counted(&daemon, "ram"), &result["jobs"][0]);
            assert_eq!(count(&job["read"]["all_ios"]), after.0 - before.0, "{form:?} {args:?}");
            assert_eq!(count(&job["write"]["all_ios"]), after.1 - before.1, "{form:?} {args:?}");
            assert!(after.0 + after.1 > before.0 + before.1);
        }
        for args in [&["-o", "4k", "-q", "40"][..], &["-o", "512", "-q", "64"], &["-o", "24k"]] {
            let verify = ["-w", "verify", "-t", "0.5", "-n", "2"];
            let result = measured(&[&verify, args, form].concat(), &[&ram, &file]);
            assert_eq!(result["verify"]["faults"], 0);
            assert!(count(&result["verify"]["sectors_checked"]) >= 2 * 15 * MIB / 512);
        }
    }
    // Which kind of ring it was, and that the device is back where the driver stopped.
    let mut perf = Ended::start(&["--packed", "-t", "1", "-q", "4"], &ram);
    let session =
        || daemon.call("vhost_get_controllers", &json!({"name": "ram"}))[0]["sessions"][0].clone();
    assert!(wait_for(WAIT_MAX, || session()["started"] == true));
    let features = session()["features"].to_string();
    assert!(features.contains("VIRTIO_F_RING_PACKED"), "{features}");
    assert!(perf.output().status.success());
    daemon.stop();
}

#[test]
fn verify_finds_what_was_changed_between_its_passes() {
    let daemon = Daemon::with(["-m", "1"]);
    let image = daemon.dir().join("image");
    set_len(&image, 4 * MIB);
    let socket = daemon.add_uring("file", &image, &json!({"cache": "writeback"}));
    let pass = |pass: &'static str| ["-w", "verify", "--pass", pass, "-q", "8"];
    measured(&pass("fill"), &[&socket]);
    let checked = measured(&pass("check"), &[&socket]);
    assert_eq!(count(&checked["verify"]["sectors_checked"]), 4 * MIB / 512);

    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let mut sector = [0u8; 512];
    file.read_exact_at(&mut sector, 1536).unwrap();
    let original = sector;
    sector[77] ^= 0x10;
    file.write_all_at(&sector, 1536).unwrap();
    file.write_all_at(&original, MIB + 512).unwrap();
    let said = failed(&pass("check"), &[&socket]);
    assert!(said.contains("WRONG DATA: 2 of 8192 sectors"), "{said}");
    assert!(said.contains("byte 1536: corrupt, 1 of 512 bytes differ, the first at +77"), "{said}");
    assert!(said.contains(&format!("byte {}: misplaced data of byte 1536", MIB + 512)), "{said}");

    // Whole sectors of this place, but of another load.
    measured(&pass("fill"), &[&socket]);
    let said = failed(&[&pass("check")[..], &["--seed", "2"]].concat(), &[&socket]);
    assert!(said.contains("data of a load with seed 1"), "{said}");
    daemon.stop();
}

#[test]
fn a_disk_that_stores_nothing_does_not_verify() {
    let daemon = Daemon::with(["-m", "1"]);
    let null = add_null(&daemon, "null");
    let said = failed(&["-w", "verify", "-t", "0.2", "--span", "1m"], &[&null]);
    assert!(said.contains("WRONG DATA"), "{said}");
    daemon.stop();
}

#[test]
fn bdevs_are_driven_without_a_daemon() {
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image");
    set_len(&image, 8 * MIB);
    let file = format!("file:{}", image.display());
    for bdev in ["null", "malloc:8m", &file] {
        let result = measured(&["--bdev", bdev, "-t", "0.2", "-w", "randrw", "-q", "300"], &[]);
        let job = &result["jobs"][0];
        assert!(count(&job["read"]["total_ios"]) > 0 && count(&job["write"]["total_ios"]) > 0);
        assert_eq!(job["total_err"], 0);
        if bdev != "null" {
            let args = ["--bdev", bdev, "-t", "0.2", "-w", "verify", "-o", "4k"];
            assert_eq!(measured(&args, &[])["verify"]["faults"], 0);
            // And through the rings to a reactor that owns the disk's one queue.
            let crossed = [&args[..], &["--owner", "0"]].concat();
            assert_eq!(measured(&crossed, &[])["verify"]["faults"], 0);
        }
    }
    let output = perf(&["--bdev", "null", "--owner", "0", "-t", "0.2"], &[]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("device queue on core 0"), "{said}");
}

#[test]
fn the_bare_loop_serves_every_form_of_ring() {
    // The bare loop needs a core of its own; beside other tests it is slow, but right.
    for form in [&[][..], &["--indirect"], &["--packed"], &["--packed", "--indirect"]] {
        let result =
            measured(&[&["--floor", "0", "-t", "0.1", "-q", "40", "-n", "2"], form].concat(), &[]);
        assert!(count(&result["jobs"][0]["read"]["all_ios"]) > 0);
    }
}

#[test]
fn a_rate_is_kept() {
    let result = measured(&["--bdev", "null", "--rate", "20000", "-t", "1"], &[]);
    let iops = result["jobs"][0]["read"]["iops"].as_f64().unwrap();
    assert!((19_000.0..=21_000.0).contains(&iops), "{iops}");
}

#[test]
fn failed_requests_are_counted_and_reported() {
    let daemon = Daemon::with(["-m", "1"]);
    let null = add_null(&daemon, "null");
    let mut perf = Ended::start(&["-t", "2", "-q", "4"], &null);
    assert!(wait_for(WAIT_MAX, || counted(&daemon, "null").0 > 0));
    // Half of the span, of 64 MiB, lies behind the end of the disk from now on.
    daemon.call("bdev_null_resize", &json!({"name": "null", "new_size": 32}));
    let output = perf.output();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("FAILED:") && said.contains("status 1"), "{said}");
    daemon.stop();
}

#[test]
fn a_server_that_dies_ends_the_load_with_its_name() {
    let mut daemon = Daemon::with(["-m", "1"]);
    let socket = add_null(&daemon, "null");
    let mut perf = Ended::start(&["-t", "20", "-q", "4"], &socket);
    assert!(wait_for(WAIT_MAX, || counted(&daemon, "null").0 > 0));
    daemon.signal(rustix::process::Signal::KILL);
    assert!(daemon.wait_exit(WAIT_MAX).is_some());
    let start = Instant::now();
    let output = perf.output();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(socket.to_str().unwrap()) && said.contains("closed"), "{said}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_stopped_server_is_a_hang_with_queue_and_indices() {
    let daemon = Daemon::with(["-m", "1"]);
    let socket = add_null(&daemon, "null");
    let mut perf = Ended::start(&["-t", "20", "-q", "4", "--timeout", "1"], &socket);
    assert!(wait_for(WAIT_MAX, || counted(&daemon, "null").0 > 0));
    daemon.signal(rustix::process::Signal::STOP);
    let output = perf.output();
    daemon.signal(rustix::process::Signal::CONT);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("queue 0: no answer for 1 s: 4 requests in flight"), "{said}");
    assert!(said.contains("available index") && said.contains("a read at byte"), "{said}");
    daemon.stop();
}

#[test]
fn mistakes_are_said_in_one_line() {
    let dir = TempDir::new().unwrap();
    let daemon = Daemon::with(["-m", "1"]);
    let null = add_null(&daemon, "null");
    let missing = dir.path().join("missing");
    let silent = dir.path().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    for (args, socket, want) in [
        (&[][..], &missing, "cannot connect to"),
        (&["--core", "900"], &null, "core 900 does not exist"),
        (&["-n", "64", "--span", "1t"], &null, "--span is larger than the disk"),
        (&["-w", "verify", "--span", "64k"], &null, "needs more than 16 blocks"),
        (&["--span", "1k"], &null, "smaller than one request"),
        (&["-q", "20000"], &null, "use --indirect"),
        (&["--hlog", "/nonexistent/x", "-t", "0.1"], &null, "cannot write /nonexistent/x"),
    ] {
        let said = failed(args, &[socket]);
        assert!(said.contains(want) && said.starts_with("ringmill-perf: "), "{args:?}: {said}");
    }
    let image = dir.path().join("image");
    set_len(&image, MIB);
    let params = json!({"cache": "writeback", "readonly": true});
    let read_only = daemon.add_uring("ro", &image, &params);
    let said = failed(&["-w", "randwrite"], &[&read_only]);
    assert!(said.contains("read-only"), "{said}");
    let usage = perf(&["-o", "1000"], &[&null]);
    assert_eq!(usage.status.code(), Some(2));
    daemon.stop();
}

#[test]
fn qemus_storage_daemon_is_driven_too() {
    let dir = TempDir::new().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("socket"));
    set_len(&image, 16 * MIB);
    let child = Command::new("qemu-storage-daemon")
        .args(["--object", "iothread,id=io0", "--blockdev"])
        .arg(format!("file,node-name=disk,filename={}", image.display()))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,iothread=io0,addr.type=unix,addr.path={}",
            socket.display()
        ))
        .stdout(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        return skip("ringmill-perf on qemu-storage-daemon", "it is not installed");
    };
    let mut server = Ended(child);
    let up =
        wait_for(WAIT_MAX, || socket.exists() || server.0.try_wait().expect("our child").is_some());
    assert!(up && socket.exists(), "qemu-storage-daemon did not start");
    for more in [&["-q", "1"][..], &["-q", "32", "-n", "2"], &["-q", "16", "--indirect"]] {
        let result = measured(&[&["-w", "verify", "-t", "0.5"], more].concat(), &[&socket]);
        assert_eq!(result["verify"]["faults"], 0);
    }
}

#[test]
fn sockets_have_options_of_their_own_and_idle_ones_get_nothing() {
    let daemon = Daemon::with(["-m", "3"]);
    let (big, small, idle) =
        (add_null(&daemon, "big"), add_null(&daemon, "small"), add_null(&daemon, "idle"));
    let with = |socket: &Path, words: &str| format!("{}{words}", socket.display());
    let (big_words, small_words) = (with(&big, ",o=64k,q=64,n=2"), with(&small, ",w=randwrite"));
    let idle_words = with(&idle, ",idle,n=3");
    let args = ["-t", "0.3", "-q", "1", &idle_words, &big_words, &small_words];
    let result = measured(&args, &[]);
    let jobs = result["jobs"].as_array().expect("jobs");
    assert_eq!(jobs.len(), 2, "{result:#}");
    let asked = |job: &Value| {
        let options = &job["job options"];
        (count(&options["bs"]), count(&options["iodepth"]), count(&options["queues"]))
    };
    assert_eq!((asked(&jobs[0]), asked(&jobs[1])), ((65536, 64, 2), (4096, 1, 1)));
    assert_eq!(count(&jobs[0]["read"]["all_ios"]), counted(&daemon, "big").0);
    assert_eq!(count(&jobs[1]["write"]["all_ios"]), counted(&daemon, "small").1);
    let bytes =
        count(&daemon.call("bdev_get_iostat", &json!({"name": "big"}))["bdevs"][0]["bytes_read"]);
    assert_eq!(bytes, 65536 * counted(&daemon, "big").0);
    assert_eq!(counted(&daemon, "idle"), (0, 0));
    assert_eq!(count(&result["client"]["idle_disks"]), 1);
    // Each job's latencies are its own disk's.
    for (job, op, disk) in [(0, "read", 0), (1, "write", 1)] {
        let disk = &result["disks"][disk];
        assert_eq!(jobs[job][op]["lat_ns"]["N"], disk["total_ios"], "{result:#}");
        assert_eq!(count(&disk["job"]), u64::try_from(job).expect("small"));
    }
    let text = perf(&args, &[]);
    let text = String::from_utf8_lossy(&text.stdout);
    for want in
        ["randread: 64 kib requests, depth 64, 2 split queues", "randwrite: 4 kib", "1 idle disk"]
    {
        assert!(text.to_lowercase().contains(&want.to_lowercase()), "{want}: {text}");
    }
}

#[test]
fn an_idle_disk_has_running_rings() {
    let daemon = Daemon::with(["-m", "3"]);
    let (busy, idle) = (add_null(&daemon, "busy"), add_null(&daemon, "idle"));
    let idle_words = format!("{},idle,n=2", idle.display());
    let mut load = Ended::start(&["-t", "30", "-q", "1", &idle_words], &busy);
    let state = || {
        let answer = daemon.call("vhost_get_controllers", &json!({"name": "idle"}));
        let session = &answer[0]["sessions"][0];
        (answer[0]["state"].clone(), session["queues"].as_array().map_or(0, Vec::len))
    };
    assert!(wait_for(WAIT_MAX, || state() == (json!("running"), 2)), "{:?}", state());
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&load.0),
        rustix::process::Signal::TERM,
    )
    .expect("our child");
    assert!(load.output().status.success());
}
