//! The guest's root file system: an initramfs with busybox, e2fsprogs, optionally fio, the virtio modules and our init.
//!
//! In: programs of this machine with their libraries (`ldd`), modules of a [`Kernel`]. Out: an uncompressed newc
//! archive in the cache (uncompressed: under software emulation unpacking costs more than loading). The archive's name
//! carries a hash of everything in it, so a stale one is never used. Written here rather than by `cpio`, because a
//! device node can then be put in without root.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::kernel::{Kernel, Module};
use super::process::{command, run_text};
use super::{LabError, packages};

/// The first program of the guest.
const INIT: &str = include_str!("init.sh");

/// Modules of the guest, by name; what they need comes along.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_blk", "ext4", "vfio_iommu_type1", "vfio_pci"];

const MODE_DIR: u32 = 0o040_755;
const MODE_FILE: u32 = 0o100_755;
const MODE_SYMLINK: u32 = 0o120_777;
const MODE_CHAR_DEVICE: u32 = 0o020_600;

/// How much the guest has on board; libraries make fio a 80 MB matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Payload {
    /// busybox, mke2fs, e2fsck, fstrim, setpriv.
    Base,
    /// The same and fio.
    Fio,
}

impl Payload {
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Base => &["mke2fs", "e2fsck", "fstrim", "setpriv"],
            Self::Fio => &["mke2fs", "e2fsck", "fstrim", "setpriv", "fio"],
        }
    }
}

/// An archive in the cache.
#[derive(Debug, Clone)]
pub struct Initramfs {
    path: PathBuf,
}

impl Initramfs {
    /// Builds the archive for `kernel`, or takes it from `cache`.
    ///
    /// # Errors
    /// A program that is not there, a library that `ldd` does not find, a cache that cannot be written.
    pub fn obtain(cache: &Path, kernel: &Kernel, payload: Payload) -> Result<Self, LabError> {
        let files = program_files(payload)?;
        let path = cache.join(format!("initramfs-{:016x}.cpio", fingerprint(kernel, &files)?));
        if path.is_file() {
            return Ok(Self { path });
        }
        let modules = kernel.modules(&MODULES)?;
        let half_made = path.with_extension("tmp");
        let what = format!("writing {}", half_made.display());
        write(&half_made, &files, &modules).map_err(LabError::io(what))?;
        fs::rename(&half_made, &path)
            .map_err(LabError::io(format!("creating {}", path.display())))?;
        Ok(Self { path })
    }

    /// An archive that is there already.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Writes the same with more programs on board, each at the place that it has here. Not for the cache: programs under
    /// test change all the time.
    ///
    /// # Errors
    /// As for [`Initramfs::obtain`].
    pub fn with_programs(&self, path: &Path, programs: &[PathBuf]) -> Result<Self, LabError> {
        let mut files = BTreeSet::new();
        for program in programs {
            add_program(&mut files, program)?;
        }
        let append = || {
            let mut out = fs::File::create(path)?;
            io::copy(&mut fs::File::open(&self.path)?, &mut out)?;
            // The kernel unpacks one archive after the other.
            let mut archive = Archive::new(BufWriter::new(out));
            for file in &files {
                archive.file(&merged_usr(file), &fs::read(file)?)?;
            }
            archive.finish()
        };
        append().map_err(LabError::io(format!("writing {}", path.display())))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Programs and their libraries: where each is here, which is also where it goes.
fn program_files(payload: Payload) -> Result<BTreeSet<PathBuf>, LabError> {
    let found = |program: &str| {
        packages::find(program).ok_or_else(|| LabError::Packages {
            list: format!("the program {program} is not in PATH"),
        })
    };
    let mut files = BTreeSet::from([found("busybox")?]);
    for program in payload.programs() {
        add_program(&mut files, &found(program)?)?;
    }
    Ok(files)
}

fn add_program(files: &mut BTreeSet<PathBuf>, path: &Path) -> Result<(), LabError> {
    let listing = run_text(command("ldd").arg(path))?;
    files.extend(libraries(&listing).map_err(|library| {
        LabError::protocol("ldd", format!("{} needs {library}, which is not there", path.display()))
    })?);
    files.insert(path.to_owned());
    Ok(())
}

/// Reads what `ldd` prints: `name => /path (address)`, or the loader as a bare path. The error is a missing library.
fn libraries(listing: &str) -> Result<Vec<PathBuf>, String> {
    let mut paths = Vec::new();
    for line in listing.lines().map(str::trim) {
        if let Some((name, target)) = line.split_once(" => ") {
            if !target.starts_with('/') {
                return Err(name.to_owned());
            }
            paths.push(PathBuf::from(target.split(" (").next().unwrap_or(target)));
        } else if line.starts_with('/') {
            paths.push(PathBuf::from(line.split(" (").next().unwrap_or(line)));
        }
    }
    Ok(paths)
}

fn fingerprint(kernel: &Kernel, files: &BTreeSet<PathBuf>) -> Result<u64, LabError> {
    let mut hasher = DefaultHasher::new();
    INIT.hash(&mut hasher);
    MODULES.hash(&mut hasher);
    kernel.version().hash(&mut hasher);
    for path in files {
        let about =
            fs::metadata(path).map_err(LabError::io(format!("reading {}", path.display())))?;
        let modified = about.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        (path, about.len(), modified).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn write(path: &Path, files: &BTreeSet<PathBuf>, modules: &[Module]) -> io::Result<()> {
    let mut archive = Archive::new(BufWriter::new(fs::File::create(path)?));
    for dir in
        ["dev", "proc", "sys", "tmp", "run", "mnt", "etc", "root", "modules", "usr/local/bin"]
    {
        archive.dir(dir)?;
    }
    // Merged /usr, as in Debian: a path works with and without the prefix.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        archive.dir(&format!("usr/{dir}"))?;
        archive.symlink(dir, &format!("usr/{dir}"))?;
    }
    archive.console()?;
    archive.file("init", INIT.as_bytes())?;
    for file in files {
        archive.file(&merged_usr(file), &fs::read(file)?)?;
    }
    for (alias, program) in [("mkfs.ext4", "mke2fs"), ("fsck.ext4", "e2fsck")] {
        if let Some(path) = packages::find(program) {
            archive.symlink(&format!("usr/sbin/{alias}"), &format!("/{}", merged_usr(&path)))?;
        }
    }
    if let Ok(settings) = fs::read("/etc/mke2fs.conf") {
        archive.file("etc/mke2fs.conf", &settings)?;
    }
    archive.symlink("etc/mtab", "/proc/mounts")?;
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("modules/{}", module.file_name), &module.bytes)?;
        order.push_str(&module.file_name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes())?;
    archive.finish()
}

/// `/lib/x/libc.so.6` → `usr/lib/x/libc.so.6`.
fn merged_usr(path: &Path) -> String {
    let path = path.to_string_lossy();
    let relative = path.trim_start_matches('/');
    if ["bin/", "sbin/", "lib/", "lib64/"].iter().any(|top| relative.starts_with(top)) {
        format!("usr/{relative}")
    } else {
        relative.to_owned()
    }
}

/// A newc archive (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`).
struct Archive<W> {
    out: W,
    inode: u32,
    written_bytes: u64,
    dirs: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self { out, inode: 0, written_bytes: 0, dirs: BTreeSet::new() }
    }

    /// A directory and those above it, each once: the kernel does not create them by itself.
    fn dir(&mut self, name: &str) -> io::Result<()> {
        let mut ends: Vec<usize> = name.match_indices('/').map(|(at, _)| at).collect();
        ends.push(name.len());
        for end in ends {
            let dir = &name[..end];
            if self.dirs.insert(dir.to_owned()) {
                self.entry(dir, MODE_DIR, 0, 0, b"")?;
            }
        }
        Ok(())
    }

    fn parent(&mut self, name: &str) -> io::Result<()> {
        match name.rsplit_once('/') {
            Some((dir, _)) => self.dir(dir),
            None => Ok(()),
        }
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.parent(name)?;
        self.entry(name, MODE_FILE, 0, 0, bytes)
    }

    fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.parent(name)?;
        self.entry(name, MODE_SYMLINK, 0, 0, target.as_bytes())
    }

    /// `/dev/console` (5:1): the kernel opens it for init before devtmpfs is mounted.
    fn console(&mut self) -> io::Result<()> {
        self.entry("dev/console", MODE_CHAR_DEVICE, 5, 1, b"")
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        major: u32,
        minor: u32,
        bytes: &[u8],
    ) -> io::Result<()> {
        self.inode += 1;
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let name_len = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, check.
        let fields = [self.inode, mode, 0, 0, 1, 0, len, 0, 0, major, minor, name_len, 0];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(name.as_bytes())?;
        self.put(b"\0")?;
        self.pad()?;
        self.put(bytes)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written_bytes += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        while !self.written_bytes.is_multiple_of(4) {
            self.put(b"\0")?;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, 0, 0, b"")?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_is_read_and_missing_libraries_are_named() {
        let listing = "\tlinux-vdso.so.1 (0x7fff)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\t/lib64/ld.so.2 (0x7f)\n";
        let paths = libraries(listing).expect("nothing missing");
        assert_eq!(paths, [PathBuf::from("/lib/x/libc.so.6"), PathBuf::from("/lib64/ld.so.2")]);
        assert_eq!(libraries("\tlibgone.so => not found\n"), Err("libgone.so".to_owned()));
    }

    #[test]
    fn paths_move_under_usr() {
        assert_eq!(merged_usr(Path::new("/lib64/ld.so")), "usr/lib64/ld.so");
        assert_eq!(merged_usr(Path::new("/usr/bin/fio")), "usr/bin/fio");
        assert_eq!(merged_usr(Path::new("/opt/x")), "opt/x");
    }

    #[test]
    fn entries_are_aligned_and_parents_come_first() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.file("a/b/c", b"12345").expect("memory");
        archive.finish().expect("memory");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(name).expect("present");
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0"));
        assert_eq!(text.matches("070701").count(), 4);
    }
}
