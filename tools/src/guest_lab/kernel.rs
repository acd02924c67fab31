//! The guest's kernel: a stock Debian one, unpacked into the lab's cache without root, and its modules in load order.
//!
//! In: the cache directory, `/boot`, apt. Out: a bzImage and lists of `.ko` bytes. The package is downloaded once; the
//! lists of packages are fetched into the cache as well if the system's own are absent or stale, so that neither root
//! nor a change of the system is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::{command, run, run_text};
use super::{LabError, ScratchDir};

/// The meta package that depends on the newest kernel for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel and its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    version: String,
    image: PathBuf,
    modules: PathBuf,
}

/// A kernel module, ready for `insmod`.
#[derive(Debug)]
pub struct Module {
    /// `virtio_blk.ko`
    pub file_name: String,
    /// The uncompressed ELF file.
    pub bytes: Vec<u8>,
}

impl Kernel {
    /// Takes the kernel in `cache`, else downloads one, else takes the one this machine runs on.
    ///
    /// # Errors
    /// [`LabError::Kernel`] with what each way failed on.
    pub fn obtain(cache: &Path) -> Result<Self, LabError> {
        let root = cache.join("kernel");
        if let Some(kernel) = Self::in_root(&root) {
            return Ok(kernel);
        }
        let download = match download(cache, &root) {
            Ok(()) => match Self::in_root(&root) {
                Some(kernel) => return Ok(kernel),
                None => format!("the package {META_PACKAGE} leads to has no boot/vmlinuz-*"),
            },
            Err(error) => error.to_string(),
        };
        Self::in_root(Path::new("/")).ok_or_else(|| LabError::Kernel {
            why: format!(
                "{META_PACKAGE} could not be downloaded ({download}) and /boot has none with its modules; \
                 give apt a network, or install {META_PACKAGE}"
            ),
        })
    }

    /// The newest kernel under `root` whose modules are there and which this user may read.
    fn in_root(root: &Path) -> Option<Self> {
        let mut versions: Vec<String> = fs::read_dir(root.join("boot"))
            .ok()?
            .filter_map(|entry| {
                Some(entry.ok()?.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned())
            })
            .collect();
        versions.sort_by_key(|version| version_key(version));
        versions.into_iter().rev().find_map(|version| {
            let image = root.join("boot").join(format!("vmlinuz-{version}"));
            let modules = root.join("lib/modules").join(&version);
            let usable = fs::File::open(&image).is_ok() && modules.join("modules.dep").is_file();
            usable.then_some(Self { version, image, modules })
        })
    }

    /// As `uname -r` prints it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The bzImage.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The modules `names` and all that they need, in the order in which they must be loaded. What is built into the
    /// kernel is left out.
    ///
    /// # Errors
    /// A name that is neither a module nor built in.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>, LabError> {
        let read = |name: &str| {
            let path = self.modules.join(name);
            fs::read_to_string(&path).map_err(LabError::io(format!("reading {}", path.display())))
        };
        let paths = load_order(names, &read("modules.dep")?, &read("modules.builtin")?).map_err(
            |name| LabError::Kernel { why: format!("{} has no module {name}", self.version) },
        )?;
        paths.iter().map(|path| self.load(path)).collect()
    }

    fn load(&self, path: &str) -> Result<Module, LabError> {
        let full = self.modules.join(path);
        let file_name = full.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (file_name, bytes) = if let Some(stem) = file_name.strip_suffix(".xz") {
            (stem.to_owned(), run(command("xz").arg("-dc").arg(&full))?)
        } else if file_name.ends_with(".ko") {
            let bytes =
                fs::read(&full).map_err(LabError::io(format!("reading {}", full.display())))?;
            (file_name, bytes)
        } else {
            return Err(LabError::Kernel {
                why: format!("{} is packed in a way the lab cannot read", full.display()),
            });
        };
        Ok(Module { file_name, bytes })
    }
}

/// Walks `modules.dep` ("path: needed needed …", the deepest need last) for each name. The error is the unknown name.
fn load_order(names: &[&str], dep: &str, builtin: &str) -> Result<Vec<String>, String> {
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let line = dep.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            (module_name(path) == *name).then_some((path, needs))
        });
        let Some((path, needs)) = line else {
            if builtin.lines().any(|path| module_name(path) == *name) {
                continue;
            }
            return Err((*name).to_owned());
        };
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/drivers/block/virtio_blk.ko.xz` → `virtio_blk`; the kernel treats `-` and `_` alike.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Sorts `6.1.0-9` before `6.1.0-56` before `6.12.0`.
fn version_key(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Downloads the kernel package and unpacks it into `root`, first with the system's package lists, then with own ones.
fn download(cache: &Path, root: &Path) -> Result<(), LabError> {
    let scratch = ScratchDir::new_in(cache)?;
    let own = Apt::own(cache)?;
    let deb = match fetch(&Apt::system(), scratch.path()) {
        Ok(deb) => deb,
        Err(_) => {
            run(&mut own.command("apt-get", &["-q", "update"]))?;
            fetch(&own, scratch.path())?
        }
    };
    let unpacked = scratch.path().join("unpacked");
    run(command("dpkg-deb").arg("-x").arg(&deb).arg(&unpacked))?;
    let kernel_dirs = fs::read_dir(unpacked.join("lib/modules"))
        .map_err(LabError::io(format!("listing the modules in {}", deb.display())))?;
    for entry in kernel_dirs {
        let version = entry.map_err(LabError::io("listing the kernel's modules"))?.file_name();
        run(command("depmod").arg("-b").arg(&unpacked).arg(version))?;
    }
    // A rename is the last step: a half-made cache is never seen.
    let _ = fs::remove_dir_all(root);
    fs::rename(&unpacked, root)
        .map_err(LabError::io(format!("moving the kernel to {}", root.display())))
}

fn fetch(apt: &Apt, into: &Path) -> Result<PathBuf, LabError> {
    let depends = run_text(&mut apt.command("apt-cache", &["depends", META_PACKAGE]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| LabError::Kernel {
            why: format!("apt knows no kernel that {META_PACKAGE} depends on"),
        })?;
    run(apt.command("apt-get", &["-q", "download", package]).current_dir(into))?;
    let files = fs::read_dir(into).map_err(LabError::io(format!("listing {}", into.display())))?;
    files
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| LabError::Kernel {
            why: format!("apt-get download {package} left no .deb file"),
        })
}

/// How apt is called: with the system's lists and caches, or with own ones that an ordinary user may write.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn system() -> Self {
        Self { options: Vec::new() }
    }

    fn own(cache: &Path) -> Result<Self, LabError> {
        let lists = cache.join("apt/lists");
        let archives = cache.join("apt/cache");
        for dir in [lists.join("partial"), archives.join("archives/partial")] {
            fs::create_dir_all(&dir)
                .map_err(LabError::io(format!("creating {}", dir.display())))?;
        }
        // APT::Sandbox::User: as root, apt would else fetch as _apt, who cannot write here.
        let options = vec![
            "-o".to_owned(),
            format!("Dir::State::Lists={}", lists.display()),
            "-o".to_owned(),
            format!("Dir::Cache={}", archives.display()),
            "-o".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Self { options })
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = command(program);
        command.args(&self.options).args(args);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/drivers/virtio/virtio.ko:\n\
        kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko\n\
        kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko\n\
        kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko\n";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let order = load_order(&["virtio_pci", "virtio_blk"], DEP, "").expect("all known");
        let names: Vec<String> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "virtio_blk"]);
    }

    #[test]
    fn built_in_modules_are_left_out_and_unknown_ones_named() {
        assert_eq!(load_order(&["ext4"], DEP, "kernel/fs/ext4/ext4.ko\n"), Ok(Vec::new()));
        assert_eq!(load_order(&["nonsense"], DEP, ""), Err("nonsense".to_owned()));
    }

    #[test]
    fn newer_versions_sort_last() {
        let mut versions = ["6.12.1-cloud", "6.1.0-9-cloud", "6.1.0-56-cloud"];
        versions.sort_by_key(|version| version_key(version));
        assert_eq!(versions, ["6.1.0-9-cloud", "6.1.0-56-cloud", "6.12.1-cloud"]);
    }
}
