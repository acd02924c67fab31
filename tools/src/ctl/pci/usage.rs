//! Why a PCI function is to be left alone, and what to do about it, in words.

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
    /// A part of the kernel uses it without having claimed it.
    Backing { disk: String, by: Backer },
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

/// A part of the kernel that opens disks without claiming them, so that an exclusive open does not meet it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Backer {
    /// A loop device.
    Loop(String),
    /// A namespace of an NVMe target.
    NvmetNamespace { subsystem: String, namespace: String },
    /// A subsystem of an NVMe target that passes commands through.
    NvmetPassthru(String),
    /// A backstore of the SCSI target.
    ScsiTarget(String),
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
            Use::Backing { by: Backer::Loop(name), .. } => name.clone(),
            Use::Backing { by: Backer::ScsiTarget(name), .. } => format!("SCSI target {name}"),
            Use::Backing {
                by: Backer::NvmetNamespace { subsystem, .. } | Backer::NvmetPassthru(subsystem),
                ..
            } => format!("NVMe target {subsystem}"),
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
            Use::Backing { disk, by } => match by {
                Backer::Loop(name) => {
                    format!("/dev/{name} is made of {disk}; `losetup -d /dev/{name}` first")
                }
                Backer::NvmetNamespace { subsystem, namespace } => format!(
                    "the kernel's NVMe target exports {disk} as namespace {namespace} of {subsystem}; disable that first"
                ),
                Backer::NvmetPassthru(subsystem) => format!(
                    "the kernel's NVMe target passes {disk} through as {subsystem}; disable that first"
                ),
                Backer::ScsiTarget(name) => format!(
                    "the kernel's SCSI target exports {disk} as {name}; `targetcli` removes it"
                ),
            },
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

#[cfg(test)]
mod tests {
    use super::*;

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
            Use::Backing { disk: disk(), by: Backer::Loop("loop3".to_owned()) },
            Use::Backing {
                disk: disk(),
                by: Backer::NvmetNamespace {
                    subsystem: "nqn.a".to_owned(),
                    namespace: "1".to_owned(),
                },
            },
            Use::Backing {
                disk: "nvme0".to_owned(),
                by: Backer::NvmetPassthru("nqn.b".to_owned()),
            },
            Use::Backing { disk: disk(), by: Backer::ScsiTarget("iblock_0/a".to_owned()) },
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
