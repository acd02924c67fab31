//! What disks are made of in tests: sparse files, loop devices, zram devices; and how a test says that it was skipped.
//!
//! **Invariant:** a device goes away with its owner, also when a test fails.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::daemon::wait_for;

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;

/// Says by name that a test does less than it should, on stderr and where `cargo xtask test` collects such names.
pub fn skip(name: &str, why: &str) {
    let line = format!("{name}: {why}");
    eprintln!("SKIPPED {line}");
    if let Some(path) = std::env::var_os("RINGMILL_SKIPPED_FILE") {
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| writeln!(file, "{line}"))
            .expect("RINGMILL_SKIPPED_FILE is writable");
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes a sparse file of this size, or gives a file this size.
pub fn set_len(path: &Path, size_bytes: u64) {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    file.and_then(|file| file.set_len(size_bytes))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Runs a program of the system.
pub fn run(program: &str, args: &[&str]) -> Result<String, String> {
    output(Command::new(program).args(args).env("LC_ALL", "C"))
}

/// A loop device on an image; detached when dropped.
pub struct LoopDevice {
    pub path: PathBuf,
}

impl LoopDevice {
    /// Why not, where this user or machine cannot.
    pub fn on(image: &Path) -> Result<LoopDevice, String> {
        if !is_root() {
            return Err("needs root for a loop device".to_owned());
        }
        let image = image.to_str().expect("a path in UTF-8");
        let path = run("/usr/sbin/losetup", &["--find", "--show", image])?;
        Ok(LoopDevice { path: PathBuf::from(path) })
    }

    /// Flush requests that the device has completed: the 16th field of its `stat`
    /// (the kernel's `Documentation/block/stat.rst`).
    pub fn flushes_count(&self) -> u64 {
        let name = self.path.file_name().expect("/dev/loopN").to_string_lossy();
        let path = format!("/sys/block/{name}/stat");
        let stat = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let field = stat.split_whitespace().nth(15);
        field.and_then(|f| f.parse().ok()).unwrap_or_else(|| panic!("{path} is odd: {stat}"))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("/usr/sbin/losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A compressed RAM device with blocks of 4096 bytes; removed when dropped.
pub struct Zram {
    pub path: PathBuf,
    number: String,
}

impl Zram {
    /// Why not, where this user or machine cannot.
    pub fn new(size_bytes: u64) -> Result<Zram, String> {
        if !is_root() {
            return Err("needs root for a zram device".to_owned());
        }
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")
            .map_err(|error| format!("this kernel has no zram: {error}"))?
            .trim()
            .to_owned();
        let zram = Zram { path: PathBuf::from(format!("/dev/zram{number}")), number };
        fs::write(format!("/sys/block/zram{}/disksize", zram.number), size_bytes.to_string())
            .map_err(|error| format!("zram{}: {error}", zram.number))?;
        if !wait_for(Duration::from_secs(5), || zram.path.exists()) {
            return Err(format!("{} does not appear", zram.path.display()));
        }
        Ok(zram)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // Busy for a moment while udev or a dying daemon looks at it.
        let removed = wait_for(Duration::from_secs(5), || {
            let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
            fs::write("/sys/class/zram-control/hot_remove", &self.number).is_ok()
        });
        if !removed {
            eprintln!("zram{} is still in use and stays", self.number);
        }
    }
}
