//! Who uses a PCI function, as far as the kernel's tables tell: mounts, swap, RAID, LVM, exports, and processes.
//!
//! In: sysfs, procfs and configfs, read once per [`Tables`]. Out: [`Use`]s. Owner: one command. **Invariant:** a table of
//! *exclusive* users (mounts, swap, holders, btrfs) that cannot be read counts as empty here: the open in `claim` is the
//! guard behind these, which only have the better words. For users that claim nothing there is no other guard, so what
//! cannot be seen of them is a [`Tables::blind_spot`].

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::nodes::{DeviceNumber, Node, parse_number};
use super::processes::OpenDevices;
use super::tree::{Function, Tree, names_in, text_of};
use super::usage::{Backer, Holder, Use};

/// Holders above holders above a disk are followed so far: LVM over crypt over RAID is three.
const HOLDERS_DEPTH_MAX: usize = 16;

/// The kernel's tables.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Device number, if it means one; source; where.
    mounts: Vec<(Option<DeviceNumber>, String, String)>,
    swaps: Vec<String>,
    /// What processes have open.
    open: OpenDevices,
    /// What parts of the kernel use without a claim.
    backed: Vec<Backed>,
    /// A loop device of which it could not be found out what it is made of.
    unseen_loop: Option<String>,
    btrfs: Vec<(String, String)>,
}

/// What a part of the kernel uses: a device by its number where the kernel tells it, or the path that it was given.
#[derive(Debug)]
struct Backed {
    device: Result<Node, String>,
    by: Backer,
}

impl Backed {
    fn is_of(&self, tree: &Tree, node: Node) -> bool {
        match &self.device {
            Ok(device) => *device == node,
            Err(path) => tree.node_behind(path) == Some(node),
        }
    }
}

impl Tables {
    pub(super) fn read(tree: &Tree) -> Tables {
        let text = |path: &str| fs::read_to_string(tree.proc(path)).unwrap_or_default();
        let swaps = text("swaps");
        let btrfs = names_in(&tree.sys("fs/btrfs")).into_iter().flat_map(|uuid| {
            let disks = names_in(&tree.sys("fs/btrfs").join(&uuid).join("devices"));
            disks.into_iter().map(move |disk| (disk, uuid.clone()))
        });
        let (mut backed, unseen_loop) = loops(tree);
        backed.extend(exports(tree));
        Tables {
            mounts: text("self/mountinfo").lines().filter_map(mount).collect(),
            swaps: swaps
                .lines()
                .skip(1)
                .filter_map(|line| line.split_whitespace().next())
                .map(unescape)
                .collect(),
            open: OpenDevices::read(tree),
            backed,
            unseen_loop,
            btrfs: btrfs.collect(),
        }
    }

    /// Why these tables are no proof that nobody uses a disk; `None`: they show everything.
    pub(super) fn blind_spot(&self, tree: &Tree) -> Option<String> {
        // Its users show up in configfs only.
        if tree.sys("module/nvmet").exists() && !tree.sys("kernel/config/nvmet").exists() {
            return Some(
                "cannot see what the kernel's NVMe target exports; \
                 `mount -t configfs none /sys/kernel/config`, on the host, as root"
                    .to_owned(),
            );
        }
        let unseen = self.open.unseen.as_ref().or(self.unseen_loop.as_ref())?;
        Some(format!("cannot see what {unseen}; run it on the host, as root"))
    }

    /// All reasons to leave `function` alone that can be had by looking.
    pub(super) fn uses(&self, tree: &Tree, function: &Function) -> Vec<Use> {
        let mut uses = BTreeSet::new();
        if function.virtual_functions_count > 0 {
            let count = function.virtual_functions_count;
            uses.insert(Use::VirtualFunctions { count });
        }
        for process in self.vfio_processes(tree, function) {
            uses.insert(Use::Driven { process });
        }
        for (name, node) in tree.characters(function.address) {
            self.opened(tree, &name, Some(node), &mut uses);
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
        let number = tree.block_node(node);
        let is_it = |source: &str| number.is_some() && tree.node_behind(source) == number;
        let called = match text_of(&dir.join("dm/name")) {
            Some(name) => format!("{name} on {disk}"),
            None if depth > 0 => format!("{node} on {disk}"),
            None => node.to_owned(),
        };
        for (mounted, source, at) in &self.mounts {
            if (number.is_some() && mounted.map(Node::Block) == number) || is_it(source) {
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
        self.opened(tree, node, number, uses);
        if depth == HOLDERS_DEPTH_MAX {
            return;
        }
        for holder in names_in(&dir.join("holders")) {
            let kind = holder_kind(&tree.sys("class/block").join(&holder));
            uses.insert(Use::Held { disk: node.to_owned(), holder: holder.clone(), kind });
            self.node_uses(tree, disk, &holder, depth + 1, uses);
        }
    }

    /// Who has this device open, processes or parts of the kernel.
    fn opened(&self, tree: &Tree, name: &str, node: Option<Node>, uses: &mut BTreeSet<Use>) {
        for process in self.open.users(&format!("/dev/{name}"), node) {
            let (disk, process) = (name.to_owned(), process.to_owned());
            uses.insert(Use::Open { disk, process });
        }
        let is_it = |one: &&Backed| node.is_some_and(|node| one.is_of(tree, node));
        for Backed { by, .. } in self.backed.iter().filter(is_it) {
            uses.insert(Use::Backing { disk: name.to_owned(), by: by.clone() });
        }
    }

    /// Who has the function's VFIO group or device open.
    pub(super) fn vfio_processes(&self, tree: &Tree, function: &Function) -> Vec<String> {
        if !function.is_with_vfio() {
            return Vec::new();
        }
        let mut processes: Vec<String> = Vec::new();
        for (path, node) in tree.vfio_files(function) {
            processes.extend(self.open.users(&path, node).map(str::to_owned));
        }
        processes.sort();
        processes.dedup();
        processes
    }
}

/// What loop devices are made of, and one of which that is not known.
fn loops(tree: &Tree) -> (Vec<Backed>, Option<String>) {
    let (mut found, mut unseen) = (Vec::new(), None);
    for name in names_in(&tree.sys("block")) {
        let file = tree.sys("block").join(&name).join("loop/backing_file");
        let Some(path) = text_of(&file) else { continue };
        let Some(node) = tree.block_node(&name) else { continue };
        let device = match tree.nodes().behind_loop(&tree.absolute("dev").join(&name), node) {
            Ok(Some(device)) => Ok(device),
            Ok(None) => continue,
            // Its path, which means something only in the mount namespace where it was set up.
            Err(error) => {
                let path = path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned();
                if tree.node_behind(&path).is_none() {
                    unseen.get_or_insert_with(|| format!("{name} is made of ({error})"));
                }
                Err(path)
            }
        };
        found.push(Backed { device, by: Backer::Loop(name) });
    }
    (found, unseen)
}

/// What is exported by parts of the kernel that have it open without a claim.
fn exports(tree: &Tree) -> Vec<Backed> {
    let mut found = Vec::new();
    let mut push = |path: String, by: Backer| found.push(Backed { device: Err(path), by });
    // What is switched off has nothing open.
    let exported = |dir: &Path, attribute: &str| {
        let is_off = text_of(&dir.join("enable")).as_deref() == Some("0");
        text_of(&dir.join(attribute)).filter(|path| !is_off && path.starts_with('/'))
    };
    let subsystems = tree.sys("kernel/config/nvmet/subsystems");
    for subsystem in names_in(&subsystems) {
        let dir = subsystems.join(&subsystem);
        if let Some(path) = exported(&dir.join("passthru"), "device_path") {
            push(path, Backer::NvmetPassthru(subsystem.clone()));
        }
        for namespace in names_in(&dir.join("namespaces")) {
            if let Some(path) = exported(&dir.join("namespaces").join(&namespace), "device_path") {
                let subsystem = subsystem.clone();
                push(path, Backer::NvmetNamespace { subsystem, namespace });
            }
        }
    }
    let stores = tree.sys("kernel/config/target/core");
    for adapter in names_in(&stores) {
        for store in names_in(&stores.join(&adapter)) {
            if let Some(path) = exported(&stores.join(&adapter).join(&store), "udev_path") {
                push(path, Backer::ScsiTarget(format!("{adapter}/{store}")));
            }
        }
    }
    found
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
}
