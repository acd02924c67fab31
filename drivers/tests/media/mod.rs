//! What the driver tests stand on: files, loop and zram devices that go away with the test, also when it fails.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ringmill_drivers::uring::{CacheMode, UringBdev, UringOptions};
use tempfile::TempDir;

/// Says that a test could not run here, and why; also to the file that collects such lines.
pub(crate) fn skipped(name: &str, reason: &str) {
    let line = format!("SKIPPED {name}: {reason}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("RINGMILL_SKIPPED_FILE") {
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        let written = file.and_then(|mut file| {
            std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes())
        });
        written.expect("RINGMILL_SKIPPED_FILE is writable");
    }
}

/// A directory on the disk's filesystem: beside the build's other results, never on a RAM disk.
pub(crate) fn disk_dir() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A directory on tmpfs.
pub(crate) fn shm_dir() -> TempDir {
    TempDir::new_in("/dev/shm").unwrap()
}

/// A sparse image.
pub(crate) fn image(dir: &TempDir, bytes: u64) -> PathBuf {
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

pub(crate) fn options(path: &Path, cache: CacheMode) -> UringOptions {
    UringOptions { filename: path.to_owned(), cache, ..UringOptions::default() }
}

pub(crate) fn open(options: &UringOptions) -> Arc<UringBdev> {
    // A test device may be looked at by udev for a moment.
    match UringBdev::open_patiently("disk", options, Duration::from_secs(5)) {
        Ok(bdev) => Arc::new(bdev),
        Err(error) => panic!("{error}"),
    }
}

/// A zram device of our own; reset and removed when dropped.
pub(crate) struct Zram {
    pub(crate) path: PathBuf,
    number: u32,
}

impl Zram {
    pub(crate) fn new(bytes: u64) -> Result<Zram, String> {
        let text = fs::read_to_string("/sys/class/zram-control/hot_add")
            .map_err(|e| format!("cannot add a zram device: {e}"))?;
        let number: u32 = text.trim().parse().map_err(|_| format!("hot_add said {text:?}"))?;
        let zram = Zram { path: format!("/dev/zram{number}").into(), number };
        fs::write(format!("/sys/block/zram{number}/disksize"), bytes.to_string())
            .map_err(|e| format!("cannot size zram{number}: {e}"))?;
        if !zram.path.exists() {
            return Err(format!("{} did not appear", zram.path.display()));
        }
        Ok(zram)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // The device may still be held by the last look of udev.
        for _ in 0..40 {
            let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
            let removed = fs::write("/sys/class/zram-control/hot_remove", self.number.to_string());
            if removed.is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        eprintln!("zram{} could not be removed", self.number);
    }
}

/// A loop device over a file; detached when dropped.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
}

impl Loop {
    pub(crate) fn new(backing: &Path, sector_bytes: u32) -> Result<Loop, String> {
        Loop::set_up(backing, &["--sector-size", &sector_bytes.to_string()])
    }

    pub(crate) fn with_partitions(backing: &Path) -> Result<Loop, String> {
        Loop::set_up(backing, &["--partscan"])
    }

    fn set_up(backing: &Path, options: &[&str]) -> Result<Loop, String> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(backing)
            .output()
            .map_err(|e| format!("cannot run losetup: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(Loop { path: path.into() })
    }

    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap().to_string_lossy().into_owned()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// Zeroes through a file's own descriptor, to see what is on the disk without ringmill.
pub(crate) fn peek(path: &Path, offset_bytes: u64, len_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset_bytes).unwrap();
    bytes
}

/// A mounted filesystem; unmounted when dropped.
pub(crate) struct Mount {
    pub(crate) path: PathBuf,
}

impl Mount {
    pub(crate) fn new(
        dir: &TempDir,
        kind: &str,
        source: &str,
        options: &str,
    ) -> Result<Mount, String> {
        let path = dir.path().join("mount");
        fs::create_dir(&path).unwrap();
        let output = Command::new("mount")
            .args(["-t", kind, "-o", options, source])
            .arg(&path)
            .output()
            .map_err(|e| format!("cannot run mount: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Mount { path })
    }

    pub(crate) fn remount_read_only(&mut self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.path).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).status();
    }
}
