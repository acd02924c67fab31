//! The programs that are measured, each pinned to the server core: ringmilld, qemu-storage-daemon, fio.
//!
//! **Invariant:** a child is ended by its handle when the value is dropped.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringmill_tools::ctl::client::Client as Rpc;
use serde_json::{Value, json};

use crate::lab::{Lab, figure};
use crate::results::Figure;

const START_MAX: Duration = Duration::from_secs(10);
const REPLY_MAX: Duration = Duration::from_secs(20);

/// Ends the child.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pinned(core: u32, program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.arg("-c").arg(core.to_string()).arg(program).stdin(Stdio::null());
    command
}

fn wait_for(path: &Path, child: &mut Running) -> anyhow::Result<()> {
    let start = Instant::now();
    while !path.exists() {
        if let Some(status) = child.0.try_wait()? {
            bail!("the server ended at once: {status}");
        }
        if start.elapsed() > START_MAX {
            bail!("{} did not appear within {} s", path.display(), START_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// An NVMe controller in software on the server core, reached over vfio-user.
pub(crate) struct NvmeModel {
    socket: PathBuf,
    ceiling: PathBuf,
    _child: Running,
}

impl NvmeModel {
    /// What the model does at most, without the driver.
    pub(crate) const CEILING: &str = "model_speed DEPTH SECONDS CLIENT_CORE SERVER_CORE";

    /// Starts one with a null medium.
    pub(crate) fn start(lab: &Lab) -> anyhow::Result<NvmeModel> {
        let socket = tempfile::tempdir_in(&lab.dir)?.keep().join("nvme.sock");
        let program = lab.programs.join("nvme-model");
        let child = Command::new(&program)
            .args(["--medium", "null", "--block", "4096", "--size", "1g"])
            .args(["--core", &lab.server_core.to_string(), "--socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut child = Running(child);
        wait_for(&socket, &mut child)?;
        Ok(NvmeModel { socket, ceiling: lab.programs.join("examples/model_speed"), _child: child })
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> String {
        self.socket.display().to_string()
    }

    /// For the report.
    pub(crate) fn command(&self) -> String {
        "nvme-model --medium null --block 4096 --size 1g --core SERVER_CORE --socket SOCKET"
            .to_owned()
    }

    /// A bare loop, in a process of its own, on a model like this one.
    pub(crate) fn ceiling(&self, lab: &Lab, depth: u64) -> anyhow::Result<Figure> {
        let output = Command::new(&self.ceiling)
            .args([depth.to_string(), "1".to_owned()])
            .args([lab.client_core.to_string(), lab.server_core.to_string()])
            .stdin(Stdio::null())
            .output()
            .context("cannot start model_speed")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let rate = text.split(": ").nth(1).and_then(|rest| rest.split(' ').next());
        let iops = rate.and_then(|rate| rate.parse().ok());
        let iops = iops.with_context(|| format!("model_speed says {text:?}"))?;
        Ok(Figure { iops, ..Figure::default() })
    }
}

/// A running ringmilld with one reactor.
pub(crate) struct Ringmilld {
    dir: PathBuf,
    child: Running,
    rpc: RefCell<Rpc>,
    core: u32,
}

impl Ringmilld {
    /// Starts it with the reactor on the server core.
    pub(crate) fn start(lab: &Lab) -> anyhow::Result<Ringmilld> {
        let dir = tempfile::tempdir_in(&lab.dir)?.keep();
        let child = Command::new(&lab.ringmilld)
            .args(["--cores", &format!("[{}]", lab.server_core), "--log-level", "error"])
            .arg("--socket-dir")
            .arg(&dir)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start ringmilld")?;
        let mut child = Running(child);
        let socket = dir.join("rpc.sock");
        wait_for(&socket, &mut child)?;
        let rpc = RefCell::new(Rpc::connect(&socket, REPLY_MAX)?);
        Ok(Ringmilld { dir, child, rpc, core: lab.server_core })
    }

    /// Calls a method.
    pub(crate) fn call(&self, method: &str, params: Value) -> anyhow::Result<Value> {
        self.rpc.borrow_mut().call(method, params).with_context(|| method.to_owned())
    }

    /// Lets the reactor poll all the time, as it is measured at its best, or sleep and leave its core to others.
    pub(crate) fn poll(&self, poll: bool) -> anyhow::Result<()> {
        let policy = if poll { "poll" } else { "adaptive" };
        self.call("reactor_set_idle", json!({"policy": policy, "spin_us": 0}))?;
        let start = Instant::now();
        while !poll && self.reactor()?["in_interrupt"] != true {
            if start.elapsed() > START_MAX {
                bail!("the reactor does not fall asleep; a peer would have half a core");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What the daemon says of its reactor.
    pub(crate) fn reactor(&self) -> anyhow::Result<Value> {
        Ok(self.call("framework_get_reactors", Value::Null)?["reactors"][0].take())
    }

    /// Time that the reactor has worked, TSC ticks.
    pub(crate) fn busy_ticks(&self) -> anyhow::Result<u64> {
        self.reactor()?["busy"].as_u64().context("framework_get_reactors has no busy time")
    }

    /// A disk's socket.
    pub(crate) fn socket(&self, disk: &str) -> String {
        self.dir.join(disk).display().to_string()
    }

    /// Shows a bdev to guests.
    pub(crate) fn show(&self, name: &str, more: &Value) -> anyhow::Result<()> {
        let mut params = json!({"ctrlr": name, "dev_name": name});
        if let (Some(params), Some(more)) = (params.as_object_mut(), more.as_object()) {
            params.extend(more.clone());
        }
        self.call("vhost_create_blk_controller", params).map(drop)
    }

    /// Hides it.
    pub(crate) fn hide(&self, name: &str) -> anyhow::Result<()> {
        self.call("vhost_delete_controller", json!({"ctrlr": name})).map(drop)
    }

    /// Adds a null disk.
    pub(crate) fn add_null(&self, name: &str, more: &Value) -> anyhow::Result<String> {
        self.add_made("bdev_null_create", name, 1 << 30)?;
        self.show(name, more)?;
        Ok(self.socket(name))
    }

    /// Adds a RAM disk.
    pub(crate) fn add_malloc(&self, name: &str, size_bytes: u64) -> anyhow::Result<String> {
        self.add_made("bdev_malloc_create", name, size_bytes)?;
        self.show(name, &Value::Null)?;
        Ok(self.socket(name))
    }

    fn add_made(&self, method: &str, name: &str, size_bytes: u64) -> anyhow::Result<()> {
        let params = json!({"name": name, "num_blocks": size_bytes / 512, "block_size": 512});
        self.call(method, params).map(drop)
    }

    /// Adds a disk on a file or block device.
    pub(crate) fn add_file(&self, name: &str, path: &Path) -> anyhow::Result<String> {
        self.add_file_by(name, path, "auto")
    }

    /// A disk on a file whose transfers go this way.
    pub(crate) fn add_file_by(
        &self,
        name: &str,
        path: &Path,
        transfers: &str,
    ) -> anyhow::Result<String> {
        let params = json!({"name": name, "filename": path, "transfers": transfers});
        self.call("bdev_uring_create", params)?;
        self.show(name, &Value::Null)?;
        Ok(self.socket(name))
    }

    /// Removes a disk on a file.
    pub(crate) fn remove_file(&self, name: &str) -> anyhow::Result<()> {
        self.hide(name)?;
        self.call("bdev_uring_delete", json!({"name": name})).map(drop)
    }

    /// Private memory of the process, bytes.
    pub(crate) fn private_bytes(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.0.id()))
            .context("cannot read the daemon's smaps_rollup")?;
        let lines = text.lines().filter(|line| line.starts_with("Private_"));
        let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        Ok(kib.sum::<u64>() * 1024)
    }

    /// The core of its reactor.
    pub(crate) fn core(&self) -> u32 {
        self.core
    }

    /// Stops it as an operator would.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        self.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"}))?;
        let status = self.child.0.wait()?;
        if !status.success() {
            bail!("ringmilld ended with {status}");
        }
        Ok(())
    }
}

/// A running qemu-storage-daemon with one disk.
pub(crate) struct StorageDaemon {
    socket: PathBuf,
    command: String,
    _child: Running,
}

impl StorageDaemon {
    /// Starts it on the server core; `blockdev` is its disk, with the node name `disk`.
    pub(crate) fn start(lab: &Lab, blockdev: &str) -> anyhow::Result<StorageDaemon> {
        let socket = tempfile::tempdir_in(&lab.dir)?.keep().join("disk.sock");
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io0,addr.type=unix,addr.path={}",
            socket.display()
        );
        let args = ["--object", "iothread,id=io0", "--blockdev", blockdev, "--export", &export];
        let child = pinned(lab.server_core, "qemu-storage-daemon")
            .args(args)
            .spawn()
            .context("cannot start qemu-storage-daemon; install the package qemu-utils")?;
        let mut child = Running(child);
        wait_for(&socket, &mut child)?;
        let command = format!(
            "qemu-storage-daemon {}",
            args.join(" ").replace(&socket.display().to_string(), "SOCKET")
        );
        Ok(StorageDaemon { socket, command, _child: child })
    }

    /// Its fastest null device.
    pub(crate) fn null(lab: &Lab) -> anyhow::Result<StorageDaemon> {
        Self::start(lab, "null-co,node-name=disk,size=1073741824,read-zeroes=off")
    }

    /// A file as it is best at it.
    pub(crate) fn file(lab: &Lab, path: &Path) -> anyhow::Result<StorageDaemon> {
        let path = path.display();
        let file =
            format!("file,node-name=disk,filename={path},aio=io_uring,cache.direct=on,locking=off");
        Self::start(lab, &file)
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> String {
        self.socket.display().to_string()
    }

    /// For the report.
    pub(crate) fn command(&self) -> String {
        self.command.clone()
    }
}

/// fio's arguments for a bare medium; `seconds` are those that are measured.
pub(crate) fn fio_args(path: &str, depth: u64, seconds: f64) -> Vec<String> {
    let mut args: Vec<String> = [
        "--name=bare",
        "--ioengine=io_uring",
        "--direct=1",
        "--fixedbufs",
        "--registerfiles",
        "--rw=randread",
        "--bs=4k",
        "--norandommap",
        "--random_generator=tausworthe64",
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        "--time_based",
        "--output-format=json",
    ]
    .map(str::to_owned)
    .to_vec();
    args.push(format!("--iodepth={depth}"));
    args.push(format!("--size={}", crate::medium::SIZE_BYTES));
    // fio knows milliseconds, but no fractions of a second.
    args.push(format!("--ramp_time={}ms", 200));
    args.push(format!("--runtime={:.0}ms", seconds * 1000.0));
    args.push(format!("--filename={path}"));
    args
}

/// fio on the bare medium, on the same core as the servers.
pub(crate) fn fio(lab: &Lab, path: &Path, depth: u64) -> anyhow::Result<Figure> {
    let output = pinned(lab.server_core, "fio")
        .args(fio_args(&path.display().to_string(), depth, lab.seconds))
        .output()
        .context("cannot start fio; install the package fio")?;
    if !output.status.success() {
        bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let result: Value =
        serde_json::from_slice(&output.stdout).context("fio's output is not JSON")?;
    Ok(figure(&result, 0))
}

/// The first line of what a program says of its version.
pub(crate) fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map_or_else(|_| "not there".into(), |output| output.stdout);
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned()
}
