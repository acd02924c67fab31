//! Fast media that any Linux machine has: a file on tmpfs, a zram device; and a file on a disk.
//!
//! **Invariant:** what was made here is gone when the value is dropped.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Size of each.
pub(crate) const SIZE_BYTES: u64 = 256 << 20;

/// A medium to measure on.
pub(crate) enum Medium {
    /// A file in /dev/shm.
    Tmpfs(PathBuf),
    /// A zram device of our own.
    Zram { number: u32, path: PathBuf },
    /// A file in the build directory.
    Disk(PathBuf),
}

fn file(path: &Path) -> anyhow::Result<()> {
    let file = fs::File::create_new(path);
    let file = file.with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(SIZE_BYTES).context("cannot size the file")
}

impl Medium {
    fn tmpfs() -> anyhow::Result<Medium> {
        let path = PathBuf::from(format!("/dev/shm/ringmill-marks-{}.img", std::process::id()));
        file(&path)?;
        Ok(Medium::Tmpfs(path))
    }

    fn zram() -> anyhow::Result<Medium> {
        if !rustix::process::geteuid().is_root() {
            bail!("zram needs root");
        }
        let number =
            fs::read_to_string("/sys/class/zram-control/hot_add").context("no zram here")?;
        let number: u32 = number.trim().parse().context("zram gave no number")?;
        let medium = Medium::Zram { number, path: PathBuf::from(format!("/dev/zram{number}")) };
        fs::write(format!("/sys/block/zram{number}/disksize"), SIZE_BYTES.to_string())
            .context("cannot size zram")?;
        if !medium.path().exists() {
            bail!("{} does not appear", medium.path().display());
        }
        Ok(medium)
    }

    fn disk(dir: &Path) -> anyhow::Result<Medium> {
        let path = dir.join(format!("ringmill-marks-{}.img", std::process::id()));
        file(&path)?;
        Ok(Medium::Disk(path))
    }

    /// Its name as a disk.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Medium::Tmpfs(_) => "tmpfs",
            Medium::Zram { .. } => "zram",
            Medium::Disk(_) => "disk",
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Medium::Tmpfs(path) | Medium::Zram { path, .. } | Medium::Disk(path) => path,
        }
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        // Left-overs cost memory and nothing else; there is nobody to tell at this point.
        let _ = match self {
            Medium::Tmpfs(path) | Medium::Disk(path) => fs::remove_file(path),
            Medium::Zram { number, .. } => fs::write(format!("/sys/block/zram{number}/reset"), "1")
                .and_then(|()| fs::write("/sys/class/zram-control/hot_remove", number.to_string())),
        };
    }
}

/// All media, or why one cannot be had. `dir` is on a disk.
pub(crate) fn all(dir: &Path) -> [anyhow::Result<Medium>; 3] {
    [Medium::tmpfs(), Medium::zram(), Medium::disk(dir)]
}
