//! Fast media that any Linux machine has: a file on tmpfs, a zram device.
//!
//! **Invariant:** what was made here is gone when the value is dropped.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// A medium to measure on.
pub(crate) enum Medium {
    /// A file in /dev/shm.
    Tmpfs(PathBuf),
    /// A zram device of our own.
    Zram { number: u32, path: PathBuf },
}

impl Medium {
    fn tmpfs(size_bytes: u64) -> anyhow::Result<Medium> {
        let path = PathBuf::from(format!("/dev/shm/ringmill-marks-{}.img", std::process::id()));
        let file = fs::File::create_new(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        let medium = Medium::Tmpfs(path);
        file.set_len(size_bytes).context("cannot size the file")?;
        Ok(medium)
    }

    fn zram(size_bytes: u64) -> anyhow::Result<Medium> {
        if !rustix::process::geteuid().is_root() {
            bail!("zram needs root");
        }
        let number =
            fs::read_to_string("/sys/class/zram-control/hot_add").context("no zram here")?;
        let number: u32 = number.trim().parse().context("zram gave no number")?;
        let medium = Medium::Zram { number, path: PathBuf::from(format!("/dev/zram{number}")) };
        fs::write(format!("/sys/block/zram{number}/disksize"), size_bytes.to_string())
            .context("cannot size zram")?;
        if !medium.path().exists() {
            bail!("{} does not appear", medium.path().display());
        }
        Ok(medium)
    }

    /// Its name as a disk.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Medium::Tmpfs(_) => "tmpfs",
            Medium::Zram { .. } => "zram",
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Medium::Tmpfs(path) | Medium::Zram { path, .. } => path,
        }
    }

    /// For people.
    pub(crate) fn what(&self) -> String {
        match self {
            Medium::Tmpfs(_) => "a file on tmpfs, written before".to_owned(),
            Medium::Zram { path, .. } => format!("{}, written before", path.display()),
        }
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        // Left-overs cost memory and nothing else; there is nobody to tell at this point.
        let _ = match self {
            Medium::Tmpfs(path) => fs::remove_file(path),
            Medium::Zram { number, .. } => fs::write(format!("/sys/block/zram{number}/reset"), "1")
                .and_then(|()| fs::write("/sys/class/zram-control/hot_remove", number.to_string())),
        };
    }
}

/// All media, or why one cannot be had.
pub(crate) fn all(size_bytes: u64) -> [anyhow::Result<Medium>; 2] {
    [Medium::tmpfs(size_bytes), Medium::zram(size_bytes)]
}
