//! The guest lab: real Linux guests under QEMU (software emulation, no KVM) on vhost-user disks.
//!
//! In: sockets of a [`server::DiskServer`]. Out: a [`guest::Guest`] that boots from them, runs shell scripts and is
//! rebooted, resized or killed. Used by `tools/tests/guest.rs` and by `ringmilld demo --guest`; control threads only.
//!
//! Invariants: every wait has a deadline; only processes that the lab started are ended, by their handle; everything
//! it writes is in its cache directory or in a scratch directory that goes away with its owner. It needs no root.

pub mod boot_sector;
mod error;
pub mod guest;
pub mod initramfs;
pub mod kernel;
mod lines;
pub mod packages;
mod process;
pub mod qemu;
pub mod qmp;
pub mod server;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

pub use error::LabError;
pub use process::ScratchDir;

use initramfs::{Initramfs, Payload};
use kernel::Kernel;

/// How long a lab waits for another one on this machine to finish: guests are slow enough one at a time.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(900);

/// One user of the lab. While it exists no other lab with the same cache directory runs a guest.
#[derive(Debug)]
pub struct Lab {
    cache: PathBuf,
    kernel: Option<Kernel>,
    /// Held, never read: closing it lets the next lab in.
    _lock: File,
}

impl Lab {
    /// Opens the lab in `cache` (created if absent), after any other lab that uses it has ended.
    ///
    /// # Errors
    /// [`LabError::Packages`] names the Debian packages that are missing; no other check is made before.
    pub fn open(cache: &Path) -> Result<Self, LabError> {
        let missing = packages::missing();
        if !missing.is_empty() {
            return Err(LabError::Packages { list: packages::describe(&missing) });
        }
        fs::create_dir_all(cache).map_err(LabError::io(format!("creating {}", cache.display())))?;
        let lock = lock_within(&cache.join("lab.lock"), LOCK_WAIT_MAX)?;
        Ok(Self { cache: cache.to_owned(), kernel: None, _lock: lock })
    }

    /// What a Linux guest boots: a kernel (downloaded once into the cache) and an initramfs with `payload`.
    ///
    /// # Errors
    /// [`LabError::Kernel`] where no kernel can be had: not in the cache, not in `/boot`, no download.
    pub fn linux(&mut self, payload: Payload) -> Result<LinuxImage, LabError> {
        let kernel = match self.kernel.take() {
            Some(kernel) => kernel,
            None => Kernel::obtain(&self.cache)?,
        };
        let initramfs = Initramfs::obtain(&self.cache, &kernel, payload)?;
        let image = LinuxImage {
            kernel: kernel.image().to_owned(),
            initramfs: initramfs.path().to_owned(),
        };
        self.kernel = Some(kernel);
        Ok(image)
    }

    /// The same with programs of ours on board, written to `scratch`.
    ///
    /// # Errors
    /// As for [`Lab::linux`].
    pub fn linux_with_programs(
        &mut self,
        payload: Payload,
        scratch: &ScratchDir,
        programs: &[PathBuf],
    ) -> Result<LinuxImage, LabError> {
        let kernel = self.linux(payload)?;
        let base = Initramfs::at(&kernel.initramfs);
        let with = base.with_programs(&scratch.path().join("initramfs.cpio"), programs)?;
        Ok(LinuxImage { initramfs: with.path().to_owned(), ..kernel })
    }
}

/// The two files that QEMU loads to boot Linux.
#[derive(Debug, Clone)]
pub struct LinuxImage {
    /// A bzImage.
    pub kernel: PathBuf,
    /// An uncompressed newc archive.
    pub initramfs: PathBuf,
}

/// Polls, because a blocking `flock` has no deadline.
fn lock_within(path: &Path, limit: Duration) -> Result<File, LabError> {
    let file = File::create(path).map_err(LabError::io(format!("creating {}", path.display())))?;
    let end = Instant::now() + limit;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => {
                return Err(LabError::Io {
                    what: format!(
                        "locking {} (another guest lab may hang: look for its QEMU)",
                        path.display()
                    ),
                    source: error.into(),
                });
            }
        }
    }
}
