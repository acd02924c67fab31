//! Finds out whether the system itself uses a block device: mounted, or swap.
//!
//! Flow: device number → its partitions (sysfs) → the mount table and the swap table. Control threads only.
//! **Invariant:** what cannot be read is taken for "not used": O_EXCL is the guard behind this one, which only has the
//! better words.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Major and minor number.
pub(super) type DeviceNumber = (u32, u32);

/// Splits a `dev_t`.
pub(super) fn device_number(dev: u64) -> DeviceNumber {
    (libc::major(dev), libc::minor(dev))
}

/// The sysfs directory of a block device.
pub(super) fn sysfs_dir(device: DeviceNumber) -> String {
    format!("/sys/dev/block/{}:{}", device.0, device.1)
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The device and its partitions.
pub(super) fn with_partitions(device: DeviceNumber) -> Vec<DeviceNumber> {
    let mut all = vec![device];
    for entry in fs::read_dir(sysfs_dir(device)).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists()
            && let Ok(text) = fs::read_to_string(entry.path().join("dev"))
        {
            all.extend(parse_number(&text));
        }
    }
    all
}

/// The device number behind a path, if it is a block device.
fn number_of(path: &str) -> Option<DeviceNumber> {
    let meta = fs::metadata(Path::new(path)).ok()?;
    meta.file_type().is_block_device().then(|| device_number(meta.rdev()))
}

/// Undoes the octal escapes of the kernel's tables.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match code.and_then(|d| u8::from_str_radix(d, 8).ok()).filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Where one of `devices` is mounted, by `/proc/self/mountinfo` (proc(5)). Filesystems with numbers of their own (btrfs)
/// are found by their source, which `resolve` turns into a device.
fn mount_point(
    mountinfo: &str,
    devices: &[DeviceNumber],
    resolve: impl Fn(&str) -> Option<DeviceNumber>,
) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let number = fields.nth(2).and_then(parse_number)?;
        let point = fields.nth(1)?;
        let source = line.split_once(" - ").and_then(|(_, tail)| tail.split(' ').nth(1));
        let by_source = source.filter(|s| s.starts_with('/')).and_then(|s| resolve(&unescape(s)));
        let used = devices.contains(&number) || by_source.is_some_and(|d| devices.contains(&d));
        used.then(|| unescape(point))
    })
}

/// Where the device or one of its partitions is mounted.
pub(super) fn mounted_at(devices: &[DeviceNumber]) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_point(&table, devices, number_of)
}

/// True when the device or one of its partitions is swap space.
pub(super) fn is_swap(devices: &[DeviceNumber]) -> bool {
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let paths = table.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    paths.filter_map(|path| number_of(&unescape(path))).any(|d| devices.contains(&d))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
        22 27 0:21 / /proc rw,relatime - proc proc rw\n\
        27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
        40 27 0:44 /sub /data\\040disk rw - btrfs /dev/vdb rw\n";

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let resolve = |path: &str| (path == "/dev/vdb").then_some((254, 16));
        let at = |devices: &[DeviceNumber]| mount_point(TABLE, devices, resolve);
        assert_eq!(at(&[(254, 0), (254, 1)]).as_deref(), Some("/"));
        assert_eq!(at(&[(254, 16)]).as_deref(), Some("/data disk"));
        assert_eq!(at(&[(254, 2)]), None);
    }

    #[test]
    fn odd_tables_are_survived() {
        assert_eq!(mount_point("", &[(1, 1)], |_| None), None);
        assert_eq!(mount_point("a b\n\n - \n1 2 x:y /", &[(1, 1)], |_| None), None);
        assert_eq!(unescape("\\04"), "\\04");
        assert_eq!(unescape("a\\134b\\999"), "a\\b\\999");
    }
}
