//! NVMe controllers as operators and guests of a daemon see them: over vfio-user, with the device model in this process.
//!
//! Everything is real but the controller: daemon, driver, vhost-user client, sockets. What is shown is correctness.
//! Here: set-ups, ordinary use, configuration. `trouble`: what breaks. `namespaces`: what comes, goes and changes its size.
//! `memory`: what is copied.

#[path = "../support/daemon.rs"]
mod daemon;
#[path = "../support/frontend.rs"]
mod frontend;
#[path = "../support/media.rs"]
mod media;
mod memory;
#[path = "../support/model.rs"]
mod model;
mod namespaces;
mod trouble;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use daemon::{Daemon, WAIT_MAX, wait_for};
use media::{MIB, set_len};
use model::{Exercise, Op, connect, seed};
use ringmill_core::spec::nvme::nvm;
use ringmill_drivers::model::{
    Count, Medium, ModelControl, ModelNamespace, ModelOptions, VfioUserServer, start,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const SLOT_BYTES: usize = 64 << 10;
const DISK_BYTES: u64 = 8 * MIB;

/// A controller in this process, as another process would serve it.
struct Device {
    dir: TempDir,
    server: VfioUserServer,
    control: ModelControl,
    media: Vec<Arc<Medium>>,
}

impl Device {
    /// Namespaces of these block shifts, of `DISK_BYTES` each.
    fn with(options: ModelOptions, shifts: &[u8]) -> Device {
        let ram = || Medium::ram(DISK_BYTES).expect("memory");
        let media: Vec<Arc<Medium>> = shifts.iter().map(|_| ram()).collect();
        let dir = TempDir::new().expect("a directory");
        Self::over(dir, options, shifts, media)
    }

    fn over(dir: TempDir, options: ModelOptions, shifts: &[u8], media: Vec<Arc<Medium>>) -> Device {
        let namespaces = (1..)
            .zip(shifts)
            .zip(&media)
            .map(|((nsid, &shift), medium)| {
                ModelNamespace::new(nsid, shift, DISK_BYTES >> shift, Arc::clone(medium))
            })
            .collect();
        let (backing, control) = start(options, namespaces).expect("a model");
        let server = VfioUserServer::start(&dir.path().join("cntrl"), backing).expect("a server");
        Device { dir, server, control, media }
    }

    fn new() -> Device {
        Self::with(ModelOptions::default(), &[9])
    }

    fn traddr(&self) -> &str {
        self.dir.path().to_str().expect("UTF-8")
    }

    /// The process ends; the media and the place of the socket stay.
    fn kill(self) -> (TempDir, Vec<Arc<Medium>>) {
        let Device { dir, mut server, media, .. } = self;
        server.stop();
        drop(server);
        let _ = fs::remove_file(dir.path().join("cntrl"));
        (dir, media)
    }

    /// The driver kept to the specification.
    fn assert_content(&self) {
        assert_eq!(self.control.complaint(), None);
    }
}

fn attach(daemon: &Daemon, name: &str, device: &Device, more: &Value) -> Vec<String> {
    let mut params = json!({"name": name, "trtype": "vfiouser", "traddr": device.traddr()});
    let (Some(into), Some(more)) = (params.as_object_mut(), more.as_object()) else {
        panic!("parameters are objects")
    };
    into.extend(more.clone());
    let names = daemon.call("bdev_nvme_attach_controller", &params);
    names
        .as_array()
        .expect("names")
        .iter()
        .map(|n| n.as_str().expect("a name").to_owned())
        .collect()
}

/// What `bdev_nvme_get_controllers` says of one.
fn shown(daemon: &Daemon, name: &str) -> Value {
    daemon.call("bdev_nvme_get_controllers", &json!({"name": name}))[0]["ctrlrs"][0].clone()
}

fn controllers_count(daemon: &Daemon) -> usize {
    daemon.call("bdev_nvme_get_controllers", &json!({})).as_array().expect("an array").len()
}

fn has_bdev(daemon: &Daemon, name: &str) -> bool {
    let all = daemon.call("bdev_get_bdevs", &json!({}));
    all.as_array().expect("an array").iter().any(|bdev| bdev["name"] == name)
}

/// What clients' `save_config` makes of the RPC.
fn saved(daemon: &Daemon) -> Value {
    let subsystems = daemon.call("framework_get_subsystems", &json!({}));
    let list = subsystems.as_array().expect("a list").iter().map(|entry| {
        let name = &entry["subsystem"];
        json!({"subsystem": name, "config": daemon.call("framework_get_config", &json!({"name": name}))})
    });
    json!({"subsystems": list.collect::<Vec<_>>()})
}

/// On the cores of this mask; reactors sleep soon, so that both ways are gone.
fn daemon_on(mask: &str) -> Daemon {
    Daemon::with(["-m", mask, "--idle", "adaptive", "--spin-us", "50"])
}

fn two_reactors() -> Daemon {
    daemon_on("3")
}

/// A daemon on these cores to which the device is attached as `Nvme0`, with its first namespace as disk `v`.
fn serving_on(mask: &str, device: &Device, more: &Value) -> (Daemon, PathBuf) {
    let daemon = daemon_on(mask);
    attach(&daemon, "Nvme0", device, more);
    let socket = daemon.add_controller("v", "Nvme0n1", &json!({}));
    (daemon, socket)
}

/// The same on two cores, with a guest of two queues.
fn serving(device: &Device, more: &Value) -> (Daemon, Exercise) {
    let (daemon, socket) = serving_on("3", device, more);
    let exercise = exercise(&socket, 2);
    (daemon, exercise)
}

fn exercise(socket: &Path, queues: usize) -> Exercise {
    exercise_again(socket, queues, None)
}

/// On a disk that another guest has left like this.
fn exercise_again(socket: &Path, queues: usize, stamps: Option<Vec<u64>>) -> Exercise {
    let (client, seed) = (connect(socket, queues, 32, SLOT_BYTES), seed(0x00a7_7ac4));
    match stamps {
        None => Exercise::new(client, 32, seed),
        Some(stamps) => Exercise::with_stamps(client, 32, seed, stamps),
    }
}

/// The end of every test: the driver kept to the specification, and the daemon ends well.
fn end(device: &Device, daemon: Daemon) {
    device.assert_content();
    daemon.stop();
}

#[test]
fn a_guest_reads_what_it_wrote_to_an_nvme_disk() {
    let device = Device::with(ModelOptions::default(), &[9, 12]);
    let daemon = two_reactors();
    let names = attach(&daemon, "Nvme0", &device, &json!({}));
    assert_eq!(names, ["Nvme0n1", "Nvme0n2"]);
    for (name, block) in names.iter().zip([512, 4096]) {
        let bdev = daemon.call("bdev_get_bdevs", &json!({"name": name}))[0].clone();
        assert_eq!(bdev["block_size"], block);
        assert_eq!(bdev["num_blocks"].as_u64(), Some(DISK_BYTES / block));
        let specific = &bdev["driver_specific"]["nvme"][0];
        assert_eq!(specific["ctrlr_data"]["model_number"], "ringmill model controller");
        assert_eq!(bdev["supported_io_types"]["unmap"], true);
        let socket = daemon.add_controller(name, name, &json!({}));
        let mut exercise = exercise(&socket, 2);
        let span = exercise.sectors_count();
        assert_eq!(span * 512, DISK_BYTES);
        exercise.random_for(Duration::from_millis(1200), span, 128, |_| false);
        exercise.drain();
        exercise.verify();
    }
    // What guests asked for arrived as what it is.
    let counters = device.control.counters();
    for (opcode, what) in [
        (nvm::READ, "reads"),
        (nvm::WRITE, "writes"),
        (nvm::FLUSH, "flushes"),
        (nvm::DSM, "discards"),
        (nvm::WRITE_ZEROES, "zeroes"),
    ] {
        assert!(counters.io(opcode) > 0, "no {what} arrived");
    }
    device.assert_content();
    daemon.stop();
    assert!(
        device.control.count(Count::Shutdowns) > 0,
        "the controller was shut down in good order"
    );
    assert_eq!(device.control.mapped_count(), 0, "no memory is left to the device");
    device.assert_content();
}

#[test]
fn one_queue_for_two_reactors_is_crossed_to() {
    let device = Device::with(ModelOptions { io_queues_max: 1, ..ModelOptions::default() }, &[9]);
    let (daemon, mut exercise) = serving(&device, &json!({}));
    assert_eq!(shown(&daemon, "Nvme0")["io_queues"], 1);
    let span = exercise.sectors_count();
    exercise.random_for(Duration::from_millis(1000), span, 64, |_| false);
    exercise.drain();
    exercise.verify();
    let facts =
        &daemon.call("bdev_get_bdevs", &json!({"name": "Nvme0n1"}))[0]["driver_specific"]["facts"];
    assert!(facts["crossed_requests"].as_u64().is_some_and(|count| count > 0), "{facts}");
    end(&device, daemon);
}

/// Reads sector 0 until it fails.
fn fails_soon(exercise: &mut Exercise) -> bool {
    let end = Instant::now() + WAIT_MAX;
    while Instant::now() < end {
        if !exercise.succeeds(Op::Read, 0, 1) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn the_daemons_answers_tell_what_cannot_be_attached() {
    let device = Device::new();
    let daemon = two_reactors();
    let fail = |params: &Value| {
        daemon.rpc().try_call("bdev_nvme_attach_controller", params).expect_err("refused")
    };
    let nowhere = daemon.dir().join("nowhere");
    let (code, message) = fail(&json!({"name": "N", "trtype": "vfiouser", "traddr": nowhere}));
    assert!((-200..0).contains(&code) && message.contains("nowhere"), "{code} {message}");
    let (code, message) = fail(&json!({"name": "N", "trtype": "PCIe", "traddr": "0000:ff:1f.7"}));
    assert!((-200..0).contains(&code) && message.contains("0000:ff:1f.7"), "{code} {message}");
    let (code, message) =
        fail(&json!({"name": "a b", "trtype": "vfiouser", "traddr": device.traddr()}));
    assert!(code == -32602 && message.contains("a b"), "{code} {message}");
    attach(&daemon, "Nvme0", &device, &json!({}));
    let (code, _) = fail(&json!({"name": "Nvme0", "trtype": "vfiouser", "traddr": "/x"}));
    assert_eq!(code, -17);
    let (code, message) =
        fail(&json!({"name": "Nvme1", "trtype": "vfiouser", "traddr": device.traddr()}));
    assert!(code == -16 && message.contains("Nvme0"), "{code} {message}");
    let (code, _) = daemon
        .rpc()
        .try_call("bdev_nvme_set_options", &json!({"timeout_us": 0}))
        .expect_err("too late");
    assert_eq!(code, -1);
    assert_eq!(controllers_count(&daemon), 1);

    // Somebody else's bdev has the name that a namespace needs.
    let other = Device::new();
    daemon.call("bdev_null_create", &json!({"name": "Tn1", "block_size": 512, "num_blocks": 8}));
    let (code, message) =
        fail(&json!({"name": "T", "trtype": "vfiouser", "traddr": other.traddr()}));
    assert!(code == -17 && message.contains("Tn1"), "{code} {message}");
    assert!(wait_for(WAIT_MAX, || controllers_count(&daemon) == 1), "the half-attached one goes");
    assert!(has_bdev(&daemon, "Tn1"));

    let health = daemon.call("bdev_nvme_get_controller_health_info", &json!({"name": "Nvme0"}));
    assert_eq!(health["model_number"], "ringmill model controller");
    device.control.set_health(0, 320);
    let is_hot = || {
        let health = daemon.call("bdev_nvme_get_controller_health_info", &json!({"name": "Nvme0"}));
        health["temperature_celsius"] == 47
    };
    assert!(wait_for(WAIT_MAX, is_hot), "{health}");
    daemon.stop();
}

#[test]
fn a_configuration_file_attaches_and_shows_a_namespace() {
    let device = Device::new();
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("ringmill.toml");
    let text = format!(
        "[[disk]]\nname = \"vm1\"\nbdev = \"Nvme0n1\"\n\n[[nvme]]\nname = \"Nvme0\"\nsocket = {:?}\nqueues = 1\n",
        device.traddr()
    );
    fs::write(&file, text).expect("a file");
    let daemon = Daemon::with(["-m", "3", "--config", file.to_str().expect("UTF-8")]);
    // Answered when the configuration has been loaded.
    assert_eq!(shown(&daemon, "Nvme0")["io_queues"], 1);
    let mut exercise = exercise(&daemon.socket("vm1"), 2);
    let span = exercise.sectors_count();
    exercise.random_rounds(400, span, 64);
    exercise.verify();
    device.assert_content();
    let stamps = exercise.into_stamps();
    let saved = saved(&daemon);
    daemon.stop();

    // What was saved loads as the same, with the same data.
    let saved_file = dir.path().join("saved.json");
    fs::write(&saved_file, saved.to_string()).expect("a file");
    let daemon = Daemon::with(["-m", "3", "--config", saved_file.to_str().expect("UTF-8")]);
    assert_eq!(shown(&daemon, "Nvme0")["io_queues"], 1);
    assert_eq!(self::saved(&daemon), saved);
    exercise_again(&daemon.socket("vm1"), 2, Some(stamps)).verify();
    end(&device, daemon);

    // A device that is not there is one line, and nothing is served.
    let (gone, _) = device.kill();
    let output = std::process::Command::new(daemon::RINGMILLD)
        .args(["-m", "1", "-S"])
        .arg(dir.path().join("s"))
        .arg("-r")
        .arg(dir.path().join("rpc"))
        .arg("--config")
        .arg(&file)
        .output()
        .expect("ringmilld starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("bdev_nvme_attach_controller"), "{said}");
    drop(gone);
}

#[test]
fn a_guest_of_an_image_beside_an_nvme_disk_is_not_confused_with_it() {
    let device = Device::new();
    let daemon = two_reactors();
    attach(&daemon, "Nvme0", &device, &json!({}));
    let image: PathBuf = daemon.dir().join("image");
    set_len(&image, DISK_BYTES);
    let sockets = [
        daemon.add_controller("n", "Nvme0n1", &json!({})),
        daemon.add_uring("file", &image, &json!({})),
    ];
    let mut both: Vec<Exercise> = sockets.iter().map(|socket| exercise(socket, 1)).collect();
    for _ in 0..20 {
        for one in &mut both {
            one.random_rounds(32, 2048, 32);
        }
    }
    for one in &mut both {
        one.verify();
    }
    end(&device, daemon);
}
