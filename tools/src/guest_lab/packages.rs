//! The Debian packages of the guest lab: which program comes from which package, and which are not there.
//!
//! Plain `std`, because `cargo xtask` compiles this file too (it installs what is missing) and must not drag the whole
//! tools crate in. The guest's kernel is not listed: it is downloaded and unpacked, never installed.

use std::path::{Path, PathBuf};

/// Where Debian keeps administrators' programs; ordinary users do not have it in their `PATH`.
const SYSTEM_DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// One thing that must be on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// A program's name, or a file by its absolute path.
    pub file: &'static str,
    /// The package that has it.
    pub package: &'static str,
}

/// Everything that a guest run uses. Debian 12 (QEMU 7.2) and newer.
pub const NEEDS: &[Need] = &[
    Need { file: "qemu-system-x86_64", package: "qemu-system-x86" },
    Need { file: "qemu-storage-daemon", package: "qemu-utils" },
    Need { file: "/usr/share/seabios/bios-256k.bin", package: "seabios" },
    Need { file: "busybox", package: "busybox-static" },
    Need { file: "fio", package: "fio" },
    Need { file: "mke2fs", package: "e2fsprogs" },
    Need { file: "e2fsck", package: "e2fsprogs" },
    Need { file: "fstrim", package: "util-linux" },
    Need { file: "setpriv", package: "util-linux" },
    Need { file: "losetup", package: "mount" },
    Need { file: "depmod", package: "kmod" },
    Need { file: "xz", package: "xz-utils" },
    Need { file: "ldd", package: "libc-bin" },
    Need { file: "dpkg-deb", package: "dpkg" },
    Need { file: "apt-get", package: "apt" },
];

/// What other developers' commands use: counting instructions.
pub const TOOLS: &[Need] = &[Need { file: "valgrind", package: "valgrind" }];

/// The needs that this machine does not meet.
#[must_use]
pub fn missing() -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| find(need.file).is_none()).collect()
}

/// The same with the developers' tools.
#[must_use]
pub fn missing_anywhere() -> Vec<&'static Need> {
    NEEDS.iter().chain(TOOLS).filter(|need| find(need.file).is_none()).collect()
}

/// The packages of `needs`, each once, in the order of the list.
#[must_use]
pub fn package_names(needs: &[&'static Need]) -> Vec<&'static str> {
    let mut names: Vec<&'static str> = Vec::new();
    for need in needs {
        if !names.contains(&need.package) {
            names.push(need.package);
        }
    }
    names
}

/// One line for a person: what is missing and what installs it.
#[must_use]
pub fn describe(needs: &[&'static Need]) -> String {
    let files: Vec<String> =
        needs.iter().map(|need| format!("{} (for {})", need.package, need.file)).collect();
    let names = package_names(needs).join(" ");
    format!("{}; install with `apt-get install --no-install-recommends {names}`", files.join(", "))
}

/// Looks for a program in `PATH` and the system's own directories; an absolute path is looked for as it is.
#[must_use]
pub fn find(file: &str) -> Option<PathBuf> {
    if file.starts_with('/') {
        return Some(PathBuf::from(file)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRS.iter().map(|dir| Path::new(dir).to_path_buf()))
        .map(|dir| dir.join(file))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_package_is_named_once() {
        let needs: Vec<&'static Need> = NEEDS.iter().collect();
        let names = package_names(&needs);
        assert_eq!(names.iter().filter(|name| **name == "e2fsprogs").count(), 1);
        assert_eq!(names.iter().filter(|name| **name == "util-linux").count(), 1);
    }

    #[test]
    fn the_description_names_package_and_file() {
        let line = describe(&[&NEEDS[0]]);
        assert!(line.contains("qemu-system-x86 (for qemu-system-x86_64)"), "{line}");
        assert!(
            line.ends_with("apt-get install --no-install-recommends qemu-system-x86`"),
            "{line}"
        );
    }

    #[test]
    fn programs_are_found_outside_the_users_path() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
        assert!(find("/no/such/file").is_none());
    }
}
