//! Who uses a PCI function: mounts, swap, RAID, LVM and the like, and processes that have it open.
//!
//! In: the kernel's tables, read once per command. Out: [`Use`]s, each with what to do about it. Owner: one command.
//! **Invariant:** a table that cannot be read counts as empty here; the exclusive open in [`claim`] is the guard behind
//! all of this, which only has the better words, and what it opened is held until the kernel's driver is gone.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::tree::{Function, Tree, names_in, text_of};

/// Holders above holders above a disk are followed so far: LVM over crypt over RAID is three.
const HOLDERS_DEPTH_MAX: usize = 16;

/// Major and minor number.
type DeviceNumber = (u32, u32);

/// One reason to leave a function alone. In the order in which they matter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// The root file system is on it.
    Root { disk: String },
    /// A file system of it is mounted, perhaps through a holder.
    Mounted { on: String, at: String },
    /// Swap space is on it.
    Swap { node: String, on: String },
    /// A device mapper target, RAID or cache is made of it.
    Held { disk: String, holder: String, kind: Holder },
    /// A file system over several disks is mounted, of which this is one.
    Btrfs { disk: String, uuid: String },
    /// Processes drive it through VFIO.
    Driven { process: String },
    /// A process has it open.
    Open { disk: String, process: String },
    /// Somebody has it exclusively; nothing says who.
    Exclusive { disk: String, is_zfs_there: bool },
    /// Virtual functions would go with it.
    VirtualFunctions { count: u32 },
}

/// What a holder is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// A logical volume, by its device mapper name.
    Lvm(String),
    /// An opened encrypted volume.
    Crypt(String),
    /// A multipath map.
    Multipath(String),
    /// Another device mapper target.
    Mapper(String),
    /// Linux software RAID.
    Raid,
    /// Something else.
    Other,
}

impl Use {
    /// A few words for a table.
    pub(super) fn short(&self) -> String {
        match self {
            Use::Root { .. } => "the root disk".to_owned(),
            Use::Mounted { at, .. } => format!("mounted at {at}"),
            Use::Swap { node, .. } => format!("swap on {node}"),
            Use::Held { holder, kind, .. } => match kind {
                Holder::Lvm(name) => format!("LVM {name}"),
                Holder::Crypt(name) => format!("encrypted {name}"),
                Holder::Multipath(name) => format!("multipath {name}"),
                Holder::Mapper(name) => format!("dm {name}"),
                Holder::Raid => format!("RAID {holder}"),
                Holder::Other => format!("held by {holder}"),
            },
            Use::Btrfs { .. } => "part of a mounted btrfs".to_owned(),
            Use::Driven { process } | Use::Open { process, .. } => process.clone(),
            Use::Exclusive { is_zfs_there: true, .. } => "in use, probably by ZFS".to_owned(),
            Use::Exclusive { is_zfs_there: false, .. } => "in use".to_owned(),
            Use::VirtualFunctions { count } => format!("{count} virtual functions"),
        }
    }

    /// What is the case and what to do, to follow the function's address.
    pub(super) fn sentence(&self) -> String {
        match self {
            Use::Root { disk } => format!(
                "the running system is on {disk}; a disk that holds the root file system cannot be given away"
            ),
            Use::Mounted { on, at } => format!("{on} is mounted at {at}; `umount {at}` first"),
            Use::Swap { node, on } => format!("{on} is swap space; `swapoff /dev/{node}` first"),

            Use::Held { disk, holder, kind } => match kind {
                Holder::Lvm(name) => format!(
                    "{disk} carries the logical volume {name}; deactivate its volume group (`vgchange -an`) first"
                ),
                Holder::Crypt(name) => format!(
                    "{disk} carries the opened encrypted volume {name}; `cryptsetup close {name}` first"
                ),
                Holder::Multipath(name) => format!(
                    "{disk} is a path of the multipath map {name}; `multipath -f {name}` first"
                ),
                Holder::Mapper(name) => format!(
                    "{disk} is used by the device mapper target {name}; `dmsetup remove {name}` first"
                ),
                Holder::Raid => format!(
                    "{disk} belongs to the RAID {holder}; `mdadm --stop /dev/{holder}` first"
                ),
                Holder::Other => format!("{disk} is used by {holder}; release it there first"),
            },
            Use::Btrfs { disk, uuid } => format!(
                "{disk} belongs to the mounted btrfs {uuid}; unmount it, or `btrfs device remove` it first"
            ),
            Use::Driven { process } => format!(
                "{process} drives it; detach it there first (`ringmillctl nvme detach NAME` for ringmilld)"
            ),
            Use::Open { disk, process } => format!("{process} has {disk} open; stop it first"),
            Use::Exclusive { disk, is_zfs_there: true } => format!(
                "somebody uses {disk} exclusively, probably a ZFS pool: `zpool status` shows it, `zpool export` releases it"
            ),
            Use::Exclusive { disk, is_zfs_there: false } => format!(
                "somebody uses {disk} exclusively: a mount in a container, a RAID or a cache; `lsblk /dev/{disk}` and `lsof /dev/{disk}` may say who"
            ),
            Use::VirtualFunctions { count } => {
                format!("{count} virtual functions hang on it; write 0 to its sriov_numvfs first")
            }
        }
    }
}

/// The kernel's tables.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Device number, if it means one; source; where.
    mounts: Vec<(Option<DeviceNumber>, String, String)>,
    swaps: Vec<String>,
    /// Paths below /dev that processes have open.
    open: Vec<(String, String)>,
    btrfs: Vec<(String, String)>,
}

impl Tables {
    pub(super) fn read(tree: &Tree) -> Tables {
        let text = |path: &str| fs::read_to_string(tree.proc(path)).unwrap_or_default();
        let swaps = text("swaps");
        let btrfs = names_in(&tree.sys("fs/btrfs")).into_iter().flat_map(|uuid| {
            let disks = names_in(&tree.sys("fs/btrfs").join(&uuid).join("devices"));
            disks.into_iter().map(move |disk| (disk, uuid.clone()))
        });
        Tables {
            mounts: text("self/mountinfo").lines().filter_map(mount).collect(),
            swaps: swaps
                .lines()
                .skip(1)
                .filter_map(|line| line.split_whitespace().next())
                .map(unescape)
                .collect(),
            open: open_files(tree),
            btrfs: btrfs.collect(),
        }
    }

    /// All reasons to leave `function` alone that can be had by looking.
    pub(super) fn uses(&self, tree: &Tree, function: &Function) -> Vec<Use> {
        let mut uses = BTreeSet::new();
        if function.virtual_functions_count > 0 {
            let count = function.virtual_functions_count;
            uses.insert(Use::VirtualFunctions { count });
        }
        if function.driver.as_deref() == Some(super::VFIO) {
            for process in self.vfio_processes(tree, function) {
                uses.insert(Use::Driven { process });
            }
        }
        for disk in tree.disks(function.address) {
            let mut nodes = tree.partitions(&disk);
            nodes.push(disk.clone());
            for node in &nodes {
                self.node_uses(tree, &disk, node, 0, &mut uses);
            }
        }
        uses.into_iter().collect()
    }

    /// The uses of one block device and of what is made of it.
    fn node_uses(
        &self,
        tree: &Tree,
        disk: &str,
        node: &str,
        depth: usize,
        uses: &mut BTreeSet<Use>,
    ) {
        let dir = tree.sys("class/block").join(node);
        let number = text_of(&dir.join("dev")).as_deref().and_then(parse_number);
        let is_it = |source: &str| number.is_some() && number_behind(tree, source) == number;
        let called = match text_of(&dir.join("dm/name")) {
            Some(name) => format!("{name} on {disk}"),
            None if depth > 0 => format!("{node} on {disk}"),
            None => node.to_owned(),
        };
        for (mounted, source, at) in &self.mounts {
            if (number.is_some() && *mounted == number) || is_it(source) {
                uses.insert(match at.as_str() {
                    "/" => Use::Root { disk: disk.to_owned() },
                    _ => Use::Mounted { on: called.clone(), at: at.clone() },
                });
            }
        }
        if self.swaps.iter().any(|path| is_it(path)) {
            uses.insert(Use::Swap { node: node.to_owned(), on: called.clone() });
        }
        if let Some((_, uuid)) = self.btrfs.iter().find(|(member, _)| member == node) {
            uses.insert(Use::Btrfs { disk: called, uuid: uuid.clone() });
        }
        for (path, process) in &self.open {
            if path.strip_prefix("/dev/") == Some(node) {
                let (disk, process) = (node.to_owned(), process.clone());
                uses.insert(Use::Open { disk, process });
            }
        }
        if depth == HOLDERS_DEPTH_MAX {
            return;
        }
        for holder in names_in(&dir.join("holders")) {
            let kind = holder_kind(&tree.sys("class/block").join(&holder));
            uses.insert(Use::Held { disk: node.to_owned(), holder: holder.clone(), kind });
            self.node_uses(tree, disk, &holder, depth + 1, uses);
        }
    }

    /// Who has the function's VFIO group or device open.
    fn vfio_processes(&self, tree: &Tree, function: &Function) -> Vec<String> {
        let mut paths: Vec<String> =
            names_in(&tree.function_dir(function.address).join("vfio-dev"))
                .into_iter()
                .map(|name| format!("/dev/vfio/devices/{name}"))
                .collect();
        if let Some(group) = function.group {
            paths.extend([format!("/dev/vfio/{group}"), format!("/dev/vfio/noiommu-{group}")]);
        }
        let has = |(path, _): &&(String, String)| paths.contains(path);
        self.open.iter().filter(has).map(|(_, process)| process.clone()).collect()
    }
}

fn holder_kind(dir: &Path) -> Holder {
    if dir.join("md").exists() {
        return Holder::Raid;
    }
    let Some(name) = text_of(&dir.join("dm/name")) else { return Holder::Other };
    let uuid = text_of(&dir.join("dm/uuid")).unwrap_or_default();
    match uuid.split('-').next() {
        Some("LVM") => Holder::Lvm(name),
        Some("CRYPT") => Holder::Crypt(name),
        Some("mpath") => Holder::Multipath(name),
        _ => Holder::Mapper(name),
    }
}

/// One line of mountinfo (proc(5)).
fn mount(line: &str) -> Option<(Option<DeviceNumber>, String, String)> {
    let mut fields = line.split(' ');
    let number = parse_number(fields.nth(2)?);
    let point = unescape(fields.nth(1)?);
    let source = line.split_once(" - ").and_then(|(_, tail)| tail.split(' ').nth(1));
    Some((number, unescape(source.unwrap_or_default()), point))
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The number of the block device that a path of one of the tables means.
fn number_behind(tree: &Tree, source: &str) -> Option<DeviceNumber> {
    if !source.starts_with('/') {
        return None;
    }
    let path = tree.absolute(source);
    if let Ok(meta) = fs::metadata(&path)
        && meta.file_type().is_block_device()
    {
        return Some((libc::major(meta.rdev()), libc::minor(meta.rdev())));
    }
    // The node may be gone, or be of a tree that has none: links of udev lead to the kernel's name.
    let path = fs::canonicalize(&path).unwrap_or(path);
    let name = path.file_name()?.to_str()?;
    parse_number(&text_of(&tree.sys("class/block").join(name).join("dev"))?)
}

/// Undoes the octal escapes of the kernel's tables.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Everything below /dev that processes have open, with who it is. Without privileges only the user's own.
fn open_files(tree: &Tree) -> Vec<(String, String)> {
    let own = std::process::id().to_string();
    let is_process = |name: &String| name.bytes().all(|b| b.is_ascii_digit()) && *name != own;
    let mut open = Vec::new();
    for pid in names_in(&tree.proc("")).into_iter().filter(is_process) {
        let dir = tree.proc(&pid);
        for fd in fs::read_dir(dir.join("fd")).into_iter().flatten().flatten() {
            let Ok(target) = fs::read_link(fd.path()) else { continue };
            let Some(path) = target.to_str().filter(|path| path.starts_with("/dev/")) else {
                continue;
            };
            let comm = text_of(&dir.join("comm")).unwrap_or_else(|| "a process".to_owned());
            let process = format!("{comm} (process {pid})");
            let entry = (path.to_owned(), process);
            if !open.contains(&entry) && !path.starts_with("/dev/pts/") && path != "/dev/null" {
                open.push(entry);
            }
        }
    }
    open
}

/// Opens all disks of a function exclusively, so that nobody else begins to use them, and writes out what the page cache has
/// of them. The files are to be held until the kernel's driver is gone.
///
/// # Errors
/// Who is in the way.
pub(super) fn claim(tree: &Tree, function: &Function) -> Result<Vec<File>, Use> {
    let mut held = Vec::new();
    for disk in tree.disks(function.address) {
        match open_exclusively(&tree.absolute("dev").join(&disk)) {
            Ok(file) => {
                // A medium that cannot be written fails here; unbinding does not make that worse.
                let _ = file.sync_all();
                held.push(file);
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Err(Use::Exclusive { disk, is_zfs_there: is_zfs_there(tree) });
            }
            // No node, no medium: nobody can have it open through this node.
            Err(_) => {}
        }
    }
    Ok(held)
}

/// The same as a question only, for tables. Asked only where nothing else would tell of a ZFS pool, because for an instant
/// it keeps others from using the disk.
pub(super) fn zfs_use(tree: &Tree, function: &Function) -> Option<Use> {
    is_zfs_there(tree).then(|| claim(tree, function).err()).flatten()
}

fn is_zfs_there(tree: &Tree) -> bool {
    tree.proc("spl").exists()
}

fn open_exclusively(path: &Path) -> io::Result<File> {
    // Without O_CREAT, O_EXCL means for block devices: fail where somebody else has claimed it.
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_tables_are_survived() {
        assert_eq!(mount(""), None);
        assert_eq!(mount("1 2 x:y /"), None);
        let odd = mount("1 2 x:y / /a\\040b");
        assert_eq!(odd, Some((None, String::new(), "/a b".to_owned())));
        assert_eq!(unescape("\\04"), "\\04");
        assert_eq!(unescape("a\\134b\\999"), "a\\b\\999");
    }

    #[test]
    fn every_use_says_what_to_do() {
        let disk = || "nvme0n1".to_owned();
        let held = |kind| Use::Held { disk: disk(), holder: "dm-0".to_owned(), kind };
        let name = || "vg-a".to_owned();
        let uses = [
            Use::Root { disk: disk() },
            Use::Mounted { on: disk(), at: "/data".to_owned() },
            Use::Swap { node: disk(), on: disk() },
            held(Holder::Lvm(name())),
            held(Holder::Crypt(name())),
            held(Holder::Multipath(name())),
            held(Holder::Mapper(name())),
            held(Holder::Raid),
            held(Holder::Other),
            Use::Btrfs { disk: disk(), uuid: "1-2".to_owned() },
            Use::Driven { process: "ringmilld (process 7)".to_owned() },
            Use::Open { disk: disk(), process: "fio (process 7)".to_owned() },
            Use::Exclusive { disk: disk(), is_zfs_there: true },
            Use::Exclusive { disk: disk(), is_zfs_there: false },
            Use::VirtualFunctions { count: 4 },
        ];
        let lines: Vec<String> =
            uses.iter().map(|one| format!("{}: {}", one.short(), one.sentence())).collect();
        insta::assert_snapshot!(lines.join("\n"));
    }
}
