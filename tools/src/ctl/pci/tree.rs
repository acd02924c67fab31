//! The kernel's view of PCI functions and their disks: sysfs, procfs and /dev, below a root that tests replace.
//!
//! In: files of the kernel, read once per command. Out: [`Function`]s and block devices by name. Owner: one command.
//! **Invariant:** a [`PciAddress`] is the only way from a user's words to a path.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ringmill_drivers::pci::PciAddress;
use ringmill_drivers::vfio::is_vfio;

use super::nodes::{Node, Nodes, RealNodes, parse_number};

/// A PCI function.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) address: PciAddress,
    pub(super) vendor: u16,
    pub(super) device: u16,
    /// 24 bits: class, subclass, interface.
    pub(super) class: u32,
    /// The driver that has it.
    pub(super) driver: Option<String>,
    pub(super) group: Option<u32>,
    /// The others of its IOMMU group.
    pub(super) group_others: Vec<PciAddress>,
    pub(super) numa_node: Option<u32>,
    /// As the kernel's driver tells it, while it has the function.
    pub(super) model: Option<String>,
    /// Virtual functions that hang on it.
    pub(super) virtual_functions_count: u32,
}

impl Function {
    /// vfio-pci or one of its kind has it.
    pub(super) fn is_with_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }

    /// A controller of the kinds that are worth a look.
    pub(super) fn is_storage(&self) -> bool {
        matches!(self.class >> 8, 0x0108 | 0x0106)
    }
}

/// Where sysfs, procfs and /dev are.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    root: PathBuf,
    nodes: &'static dyn Nodes,
}

/// The trimmed text of a small file.
pub(super) fn text_of(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn hex_of(path: &Path) -> Option<u32> {
    let text = text_of(path)?;
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(&text), 16).ok()
}

/// The last part of what a symbolic link points to.
fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// The names in a directory, sorted; none if there is no such directory.
pub(super) fn names_in(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

impl Tree {
    pub(super) fn new(root: &Path) -> Tree {
        Tree { root: root.to_owned(), nodes: &RealNodes }
    }

    /// A tree whose device nodes are not the kernel's.
    #[cfg(test)]
    pub(super) fn with_nodes(root: &Path, nodes: &'static dyn Nodes) -> Tree {
        Tree { root: root.to_owned(), nodes }
    }

    pub(super) fn nodes(&self) -> &'static dyn Nodes {
        self.nodes
    }

    /// The machine's own, not a test's.
    pub(super) fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    pub(super) fn sys(&self, path: &str) -> PathBuf {
        self.root.join("sys").join(path)
    }

    pub(super) fn proc(&self, path: &str) -> PathBuf {
        self.root.join("proc").join(path)
    }

    /// A path as the kernel's tables have it, below the root.
    pub(super) fn absolute(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn function_dir(&self, address: PciAddress) -> PathBuf {
        self.sys(&format!("bus/pci/devices/{address}"))
    }

    pub(super) fn driver_dir(&self, driver: &str) -> PathBuf {
        self.sys(&format!("bus/pci/drivers/{driver}"))
    }

    /// The driver that has this function now.
    pub(super) fn driver(&self, address: PciAddress) -> Option<String> {
        link_name(&self.function_dir(address).join("driver"))
    }

    /// All functions, by address.
    pub(super) fn functions(&self) -> io::Result<Vec<Function>> {
        let dir = self.sys("bus/pci/devices");
        // A machine without PCI has no such directory; that it cannot be read is another matter.
        if let Err(error) = fs::read_dir(&dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let addresses = names_in(&dir).into_iter().filter_map(|name| name.parse().ok());
        let mut functions: Vec<Function> =
            addresses.filter_map(|address| self.function(address)).collect();
        functions.sort_by_key(|function| function.address);
        Ok(functions)
    }

    /// One function; `None` if there is none at this address.
    pub(super) fn function(&self, address: PciAddress) -> Option<Function> {
        let dir = self.function_dir(address);
        let id = |name: &str| hex_of(&dir.join(name)).and_then(|id| u16::try_from(id).ok());
        let group = link_name(&dir.join("iommu_group")).and_then(|name| name.parse().ok());
        let others = names_in(&dir.join("iommu_group/devices"))
            .into_iter()
            .filter_map(|name| name.parse().ok())
            .filter(|other| *other != address);
        let nvme = names_in(&dir.join("nvme")).into_iter().next();
        Some(Function {
            address,
            vendor: id("vendor")?,
            device: id("device")?,
            class: hex_of(&dir.join("class"))?,
            driver: self.driver(address),
            group,
            group_others: others.collect(),
            // Minus one: the machine has no nodes, or does not say.
            numa_node: text_of(&dir.join("numa_node")).and_then(|text| text.parse().ok()),
            model: nvme.and_then(|name| text_of(&dir.join("nvme").join(name).join("model"))),
            virtual_functions_count: text_of(&dir.join("sriov_numvfs"))
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
        })
    }

    /// The disks (not partitions) that hang on a function.
    pub(super) fn disks(&self, address: PciAddress) -> Vec<String> {
        let mut disks = Vec::new();
        for name in names_in(&self.sys("block")) {
            let Ok(path) = fs::canonicalize(self.sys("block").join(&name)) else { continue };
            // The last address on the way is the function; the others are bridges above it.
            let mut parts = path.iter().filter_map(|part| part.to_str()?.parse().ok());
            if parts.next_back() != Some(address) {
                continue;
            }
            // One path of several of an NVMe namespace is hidden; what is mounted is the head above it.
            match multipath_head(&name).filter(|head| self.sys("block").join(head).exists()) {
                Some(head) => disks.push(head),
                None => disks.push(name),
            }
        }
        disks.dedup();
        disks
    }

    /// The block device of this name.
    pub(super) fn block_node(&self, name: &str) -> Option<Node> {
        let number = text_of(&self.sys("class/block").join(name).join("dev"))?;
        Some(Node::Block(parse_number(&number)?))
    }

    /// The character devices through which a function is spoken to beside its disks: the controller itself, and each
    /// namespace for passed-through commands.
    pub(super) fn characters(&self, address: PciAddress) -> Vec<(String, Node)> {
        let controllers = self.function_dir(address).join("nvme");
        let mut dirs = Vec::new();
        for controller in names_in(&controllers) {
            let dir = controllers.join(&controller);
            let generic = names_in(&dir).into_iter().filter(|name| name.starts_with("ng"));
            dirs.extend(generic.map(|name| (dir.join(&name), name)));
            dirs.push((dir, controller));
        }
        // With native multipath they hang on the subsystem, as the disks do.
        for disk in self.disks(address) {
            if let Some(name) = disk.strip_prefix("nvme").map(|rest| format!("ng{rest}")) {
                dirs.push((self.sys("class/nvme-generic").join(&name), name));
            }
        }
        dirs.into_iter().filter_map(|(dir, name)| Some((name, character_in(&dir)?))).collect()
    }

    /// The files in /dev/vfio that mean this function or its group, with their nodes as far as sysfs tells them.
    pub(super) fn vfio_files(&self, function: &Function) -> Vec<(String, Option<Node>)> {
        let devices = self.function_dir(function.address).join("vfio-dev");
        let mut files: Vec<_> = names_in(&devices)
            .into_iter()
            .map(|name| (format!("/dev/vfio/devices/{name}"), character_in(&devices.join(name))))
            .collect();
        if let Some(group) = function.group {
            for name in [group.to_string(), format!("noiommu-{group}")] {
                let node = character_in(&self.sys("class/vfio").join(&name));
                files.push((format!("/dev/vfio/{name}"), node));
            }
        }
        files
    }

    /// The device that a path of one of the kernel's tables means.
    pub(super) fn node_behind(&self, source: &str) -> Option<Node> {
        if !source.starts_with('/') {
            return None;
        }
        let path = self.absolute(source);
        if let Ok(Some(node)) = self.nodes.at(&path) {
            return Some(node);
        }
        // The node may be gone: links of udev lead to the kernel's name.
        let path = fs::canonicalize(&path).unwrap_or(path);
        let name = path.file_name()?.to_str()?;
        self.block_node(name)
            .or_else(|| character_in(&self.sys("class/nvme").join(name)))
            .or_else(|| character_in(&self.sys("class/nvme-generic").join(name)))
    }

    /// A disk's partitions.
    pub(super) fn partitions(&self, disk: &str) -> Vec<String> {
        let dir = self.sys("block").join(disk);
        let is_partition = |name: &String| dir.join(name).join("partition").exists();
        names_in(&dir).into_iter().filter(is_partition).collect()
    }

    /// Bytes of a disk; 0 if it does not say.
    pub(super) fn size_bytes(&self, disk: &str) -> u64 {
        let sectors = text_of(&self.sys("block").join(disk).join("size"));
        sectors.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0).saturating_mul(512)
    }
}

/// The character device whose directory in sysfs this is.
fn character_in(dir: &Path) -> Option<Node> {
    Some(Node::Character(parse_number(&text_of(&dir.join("dev"))?)?))
}

/// `nvme0n1` for `nvme0c1n1`: the disk of all paths for that of one.
fn multipath_head(name: &str) -> Option<String> {
    let (subsystem, rest) = name.strip_prefix("nvme")?.split_once('c')?;
    let (controller, namespace) = rest.split_once('n')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (is_number(subsystem) && is_number(controller) && is_number(namespace))
        .then(|| format!("nvme{subsystem}n{namespace}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_path_of_a_namespace_is_known_by_its_head() {
        assert_eq!(multipath_head("nvme3c12n1").as_deref(), Some("nvme3n1"));
        for name in ["nvme0n1", "sda", "nvmecn", "nvme0c0n1p1", "mmcblk0"] {
            assert_eq!(multipath_head(name), None, "{name}");
        }
    }
}
