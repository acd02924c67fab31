//! Whether a device can be taken: its IOMMU group, who holds it and its neighbours, and what a user can do about it.
//!
//! In: sysfs (or a tree like it). Out: the group's number, or a refusal in words. Nothing is changed here.
//! **Invariant:** what is said here is advice; the kernel decides when the group is opened.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::pci::{PciAddress, PciError};

/// Functions of one group that a message names; the rest is counted.
const NAMED_MAX: usize = 4;

/// Functions of one group that are looked at: a bus has 256.
const GROUP_DEVICES_MAX: usize = 4096;

/// A device's place in the kernel's eyes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// The group's number, and the name of its file in `/dev/vfio`.
    pub(super) number: u32,
}

fn refused(address: PciAddress, reason: impl Into<String>) -> PciError {
    PciError::Refused { device: address.to_string(), reason: reason.into() }
}

/// The driver that holds a function; `None`: nobody.
fn driver(sysfs: &Path, address: &str) -> Option<String> {
    let link = fs::read_link(device_dir(sysfs, address).join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn device_dir(sysfs: &Path, address: &str) -> PathBuf {
    sysfs.join("bus/pci/devices").join(address)
}

/// Whether a driver is vfio-pci, or one of its kind made for a certain device.
pub fn is_vfio(driver: &str) -> bool {
    let driver = driver.replace('_', "-");
    driver == "vfio-pci" || driver.ends_with("-vfio-pci")
}

/// Drivers beside which the kernel lets a group be used: they let no device of theirs reach memory by itself.
fn is_harmless(driver: &str) -> bool {
    is_vfio(driver) || ["pci-stub", "pcieport"].contains(&driver)
}

/// Finds the group of a device that can be taken.
///
/// # Errors
/// [`PciError::Refused`] with what to do.
pub(super) fn inspect(sysfs: &Path, address: PciAddress) -> Result<Group, PciError> {
    let name = address.to_string();
    let dir = device_dir(sysfs, &name);
    if !dir.exists() {
        return Err(refused(
            address,
            "there is no such PCI device; `ringmillctl pci list` shows those that there are",
        ));
    }
    let number = group_number(&dir).ok_or_else(|| {
        refused(
            address,
            "it is in no IOMMU group: the IOMMU is off, and without one a device could write anywhere; enable VT-d or \
             AMD-Vi in the firmware, and boot Linux with intel_iommu=on (Intel) or without amd_iommu=off (AMD)",
        )
    })?;
    match driver(sysfs, &name) {
        Some(driver) if is_vfio(&driver) => {}
        Some(driver) => {
            return Err(refused(
                address,
                format!(
                    "the kernel's driver {driver} has it; give it to vfio-pci with `ringmillctl pci bind {name}` \
                     (the host then no longer sees its disks)"
                ),
            ));
        }
        None => {
            return Err(refused(
                address,
                format!("no driver has it; give it to vfio-pci with `ringmillctl pci bind {name}`"),
            ));
        }
    }
    let others = holders(sysfs, number, &name);
    if !others.is_empty() {
        return Err(refused(address, shared_words(number, &others)));
    }
    Ok(Group { number })
}

fn group_number(device_dir: &Path) -> Option<u32> {
    fs::read_link(device_dir.join("iommu_group")).ok()?.file_name()?.to_str()?.parse().ok()
}

/// Other functions of the group that other drivers hold, with those.
fn holders(sysfs: &Path, group: u32, but: &str) -> Vec<(String, String)> {
    let dir = sysfs.join("kernel/iommu_groups").join(group.to_string()).join("devices");
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut others: Vec<_> = entries
        .take(GROUP_DEVICES_MAX)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name != but)
        .filter_map(|name| {
            let driver = driver(sysfs, &name)?;
            (!is_harmless(&driver)).then_some((name, driver))
        })
        .collect();
    others.sort();
    others
}

fn shared_words(group: u32, others: &[(String, String)]) -> String {
    let mut named: Vec<String> = others
        .iter()
        .take(NAMED_MAX)
        .map(|(name, driver)| format!("{name} (driver {driver})"))
        .collect();
    if others.len() > NAMED_MAX {
        named.push(format!("{} more", others.len() - NAMED_MAX));
    }
    // Only NVMe controllers are ours to bind; for a group it is enough that no driver of the kernel has the others.
    let (first, driver) = &others[0];
    let how = match driver.as_str() {
        "nvme" => format!("ringmillctl pci bind {first}"),
        _ => format!("echo {first} > /sys/bus/pci/devices/{first}/driver/unbind"),
    };
    format!(
        "it shares IOMMU group {group} with {}, and a group is given away as a whole; take those from their drivers, \
         too (`{how}`, if nothing needs them), or put the device into another slot",
        named.join(", ")
    )
}

/// Opens the group's file.
///
/// # Errors
/// With what to do where the file is not there, not ours or in use.
pub(super) fn open(dev: &Path, group: &Group, address: PciAddress) -> Result<fs::File, PciError> {
    let path = dev.join("vfio").join(group.number.to_string());
    fs::OpenOptions::new().read(true).write(true).open(&path).map_err(|source| {
        let path = path.display();
        match source.kind() {
            io::ErrorKind::NotFound => refused(
                address,
                format!("there is no {path}; load the module: `modprobe vfio-pci`"),
            ),
            io::ErrorKind::PermissionDenied => refused(
                address,
                format!(
                    "{path} may not be opened; run as root, or give the file to the daemon's user"
                ),
            ),
            io::ErrorKind::ResourceBusy => refused(
                address,
                format!("another process has it (`fuser -v {path}` shows which); end that first"),
            ),
            _ => PciError::Io {
                device: address.to_string(),
                what: format!("opening {path}"),
                source,
            },
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Tree {
            Tree(tempfile::tempdir().unwrap())
        }

        fn device(&self, name: &str, group: Option<u32>, driver: Option<&str>) -> &Tree {
            let dir = device_dir(self.0.path(), name);
            fs::create_dir_all(&dir).unwrap();
            if let Some(group) = group {
                symlink(
                    format!("../../../../kernel/iommu_groups/{group}"),
                    dir.join("iommu_group"),
                )
                .unwrap();
                let devices = self.0.path().join(format!("kernel/iommu_groups/{group}/devices"));
                fs::create_dir_all(&devices).unwrap();
                symlink(&dir, devices.join(name)).unwrap();
            }
            if let Some(driver) = driver {
                symlink(format!("../../../../bus/pci/drivers/{driver}"), dir.join("driver"))
                    .unwrap();
            }
            self
        }

        fn inspect(&self) -> Result<u32, String> {
            let address = "01:00.0".parse().unwrap();
            inspect(self.0.path(), address)
                .map(|group| group.number)
                .map_err(|error| error.to_string())
        }
    }

    const OURS: &str = "0000:01:00.0";

    #[test]
    fn a_device_of_its_own_group_is_taken() {
        let tree = Tree::new();
        tree.device(OURS, Some(17), Some("vfio-pci"));
        assert_eq!(tree.inspect(), Ok(17));
        // A bridge, an unused function and another one for VFIO do no harm.
        tree.device("0000:00:01.0", Some(17), Some("pcieport"))
            .device("0000:01:00.1", Some(17), None)
            .device("0000:01:00.2", Some(17), Some("mlx5_vfio_pci"))
            .device("0000:02:00.0", Some(18), Some("nvme"));
        assert_eq!(tree.inspect(), Ok(17));
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        let cases: [(Option<u32>, Option<&str>, &[&str]); 3] = [
            (None, Some("vfio-pci"), &["IOMMU is off", "intel_iommu=on"]),
            (Some(1), Some("nvme"), &["driver nvme has it", "ringmillctl pci bind 0000:01:00.0"]),
            (Some(1), None, &["no driver has it", "ringmillctl pci bind 0000:01:00.0"]),
        ];
        for (group, driver, words) in cases {
            let tree = Tree::new();
            let message = tree.device(OURS, group, driver).inspect().unwrap_err();
            assert!(message.starts_with(OURS), "{message}");
            for word in words {
                assert!(message.contains(word), "{message}");
            }
        }
        let message = Tree::new().inspect().unwrap_err();
        assert!(message.contains("no such PCI device"), "{message}");
    }

    #[test]
    fn neighbours_in_the_group_are_named_with_their_drivers() {
        let tree = Tree::new();
        tree.device(OURS, Some(5), Some("vfio-pci")).device("0000:01:00.1", Some(5), Some("ahci"));
        let message = tree.inspect().unwrap_err();
        let unbind = "echo 0000:01:00.1 > /sys/bus/pci/devices/0000:01:00.1/driver/unbind";
        for word in ["IOMMU group 5", "0000:01:00.1 (driver ahci)", unbind] {
            assert!(message.contains(word), "{message}");
        }
        for function in 2..8 {
            tree.device(&format!("0000:01:00.{function}"), Some(5), Some("e1000e"));
        }
        let message = tree.inspect().unwrap_err();
        assert!(message.contains("3 more") && !message.contains("00.5"), "{message}");
    }

    #[test]
    fn a_missing_group_file_is_a_missing_module() {
        let dev = tempfile::tempdir().unwrap();
        let address = OURS.parse().unwrap();
        let message = open(dev.path(), &Group { number: 3 }, address).unwrap_err().to_string();
        assert!(message.contains("vfio/3") && message.contains("modprobe vfio-pci"), "{message}");
    }
}
