//! The programs that are measured, each pinned to the server core: ringmilld, qemu-storage-daemon, fio.
//!
//! **Invariant:** a child is ended by its handle when the value is dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringmill_tools::ctl::client::Client as Rpc;
use serde_json::{Value, json};

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

fn pinned(core: u32, program: &Path) -> Command {
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

/// A running ringmilld with one reactor.
pub(crate) struct Ringmilld {
    dir: PathBuf,
    child: Running,
}

/// What the daemon has counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) busy_ticks: u64,
    pub(crate) idle_ticks: u64,
    pub(crate) ops_count: u64,
}

impl Ringmilld {
    /// Starts it with the reactor on `core`, polling all the time, as its peers are measured at their best.
    pub(crate) fn start(program: &Path, dir: &Path, core: u32) -> anyhow::Result<Ringmilld> {
        let dir = dir.join("ringmilld");
        let child = Command::new(program)
            .args([
                "--cores",
                &format!("[{core}]"),
                "--idle",
                "poll",
                "--log-level",
                "error",
                "--socket-dir",
            ])
            .arg(&dir)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start ringmilld")?;
        let mut child = Running(child);
        wait_for(&dir.join("rpc.sock"), &mut child)?;
        Ok(Ringmilld { dir, child })
    }

    fn call(&self, method: &str, params: Value) -> anyhow::Result<Value> {
        Ok(Rpc::connect(&self.dir.join("rpc.sock"), REPLY_MAX)?.call(method, params)?)
    }

    /// A disk's socket.
    pub(crate) fn socket(&self, disk: &str) -> PathBuf {
        self.dir.join(disk)
    }

    /// Adds a null disk.
    pub(crate) fn add_null(&self, name: &str, size_bytes: u64) -> anyhow::Result<()> {
        self.call(
            "bdev_null_create",
            json!({"name": name, "num_blocks": size_bytes / 512, "block_size": 512}),
        )?;
        self.call("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": name}))?;
        Ok(())
    }

    /// Adds a disk on a file or block device.
    pub(crate) fn add_file(&self, name: &str, path: &Path) -> anyhow::Result<()> {
        self.call("bdev_uring_create", json!({"name": name, "filename": path}))?;
        self.call("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": name}))?;
        Ok(())
    }

    /// Removes a disk.
    pub(crate) fn remove(&self, name: &str) -> anyhow::Result<()> {
        self.call("vhost_delete_controller", json!({"ctrlr": name}))?;
        self.call("bdev_uring_delete", json!({"name": name}))?;
        Ok(())
    }

    /// The counters of the reactor and of one disk.
    pub(crate) fn counters(&self, disk: &str) -> anyhow::Result<Counters> {
        let reactors = self.call("framework_get_reactors", Value::Null)?;
        let stats = self.call("bdev_get_iostat", json!({"name": disk}))?;
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        Ok(Counters {
            busy_ticks: number(&reactors["reactors"][0]["busy"]),
            idle_ticks: number(&reactors["reactors"][0]["idle"]),
            ops_count: number(&stats["bdevs"][0]["num_read_ops"]),
        })
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

/// A running qemu-storage-daemon with a null device.
pub(crate) struct StorageDaemon {
    socket: PathBuf,
    _child: Running,
}

impl StorageDaemon {
    /// Starts it on `core` with its fastest null device.
    pub(crate) fn start_null(dir: &Path, core: u32) -> anyhow::Result<StorageDaemon> {
        let socket = dir.join("storage-daemon.sock");
        let child = pinned(core, Path::new("qemu-storage-daemon"))
            .arg("--object")
            .arg("iothread,id=io0")
            .arg("--blockdev")
            .arg("null-co,node-name=disk,size=1073741824,read-zeroes=off")
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io0,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .spawn()
            .context("cannot start qemu-storage-daemon; install the package qemu-utils")?;
        let mut child = Running(child);
        wait_for(&socket, &mut child)?;
        Ok(StorageDaemon { socket, _child: child })
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }
}

/// IOPS of fio on the bare medium, on the same core as the servers.
pub(crate) fn fio(path: &Path, core: u32, seconds: u64) -> anyhow::Result<f64> {
    let output = pinned(core, Path::new("fio"))
        .args([
            "--name=mark",
            "--ioengine=io_uring",
            "--direct=1",
            "--rw=randread",
            "--bs=4k",
            "--iodepth=32",
        ])
        .args(["--time_based", "--output-format=json", "--norandommap", "--size=256m"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--filename={}", path.display()))
        .output()
        .context("cannot start fio; install the package fio")?;
    if !output.status.success() {
        bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let result: Value =
        serde_json::from_slice(&output.stdout).context("fio's output is not JSON")?;
    result["jobs"][0]["read"]["iops"].as_f64().context("fio's output has no IOPS")
}
