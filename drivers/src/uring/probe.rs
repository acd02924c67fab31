//! Questions to the kernel about an image: its size, its alignment rules for direct I/O, what it can discard.
//!
//! Owner: control threads. **Invariant:** no question changes data.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::units::bytes_u64;
use rustix::fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, statx};

use super::mounts::{DeviceNumber, sysfs_dir};

const PAGE_BYTES: u32 = 4096;
/// What statfs says of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Alignment of memory and of file offsets for direct I/O, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectRules {
    pub(super) memory_bytes: u32,
    pub(super) offset_bytes: u32,
}

impl DirectRules {
    /// The rules as they are safe to follow.
    ///
    /// QUIRK: zram (Linux 6.18, `drivers/block/zram`, `is_partial_io`) states 512 bytes for memory but takes whole pages
    /// where its block is a page: data at other addresses is exchanged with what lies beside it, in both directions.
    /// Devices of such blocks therefore only get memory aligned like a block, also below a filesystem.
    fn safe(self) -> DirectRules {
        let page = if self.offset_bytes >= PAGE_BYTES { PAGE_BYTES } else { 1 };
        DirectRules { memory_bytes: self.memory_bytes.max(page), offset_bytes: self.offset_bytes }
    }
}

/// Memory that satisfies every device.
#[repr(align(65536))]
struct Aligned([u8; 4096]);

/// Bytes in a file or block device now.
pub(super) fn size_bytes(mut file: &File) -> io::Result<u64> {
    // Works for both, unlike stat; nobody uses the descriptor's position.
    file.seek(SeekFrom::End(0))
}

/// What statx says; `Ok(None)` when it does not know, offset 0 when direct I/O is impossible.
fn stated_rules(file: &File) -> io::Result<Option<DirectRules>> {
    let answer = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let known = answer.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    Ok(known.then_some(DirectRules {
        memory_bytes: answer.stx_dio_mem_align,
        offset_bytes: answer.stx_dio_offset_align,
    }))
}

/// The smallest transfer that works, by trying; the file has O_DIRECT set.
fn tried_rules(file: &File) -> Option<DirectRules> {
    let mut page = Box::new(Aligned([0; 4096]));
    [SECTOR_BYTES, 4096].into_iter().find_map(|bytes| {
        let part = page.0.get_mut(..ringmill_core::units::index(bytes))?;
        // Also the end of the file answers: what counts is that the kernel does not refuse.
        let accepted = file.read_at(part, 0).is_ok_and(|n| n > 0);
        accepted.then_some(DirectRules { memory_bytes: bytes, offset_bytes: bytes })
    })
}

/// The rules of a regular file with O_DIRECT set; `None` when direct I/O does not work.
pub(super) fn file_rules(file: &File) -> Option<DirectRules> {
    match stated_rules(file) {
        Ok(Some(rules)) if rules.offset_bytes == 0 => None,
        Ok(Some(rules)) => {
            let memory_bytes = rules.memory_bytes.max(1);
            let offset_bytes = rules.offset_bytes.max(SECTOR_BYTES);
            Some(DirectRules { memory_bytes, offset_bytes }.safe())
        }
        Ok(None) | Err(_) => tried_rules(file),
    }
}

/// The rules of a block device.
pub(super) fn device_rules(file: &File, device: DeviceNumber) -> io::Result<DirectRules> {
    let logical_bytes = rustix::fs::ioctl_blksszget(file)?.max(SECTOR_BYTES);
    // The queue states a mask; kernels that do not state it want whole blocks.
    let memory_bytes = match queue_number(device, "dma_alignment") {
        Some(mask) => u32::try_from(mask + 1).unwrap_or(logical_bytes),
        None => logical_bytes,
    };
    let memory_bytes = memory_bytes.checked_next_power_of_two().unwrap_or(logical_bytes);
    Ok(DirectRules { memory_bytes, offset_bytes: logical_bytes }.safe())
}

/// A number from the request queue of a device or of the disk that a partition is on.
pub(super) fn queue_number(device: DeviceNumber, name: &str) -> Option<u64> {
    let dir = sysfs_dir(device);
    let read = |place: &str| fs::read_to_string(format!("{dir}/{place}/{name}")).ok();
    read("queue").or_else(|| read("../queue"))?.trim().parse().ok()
}

/// True for media that are memory, a file on tmpfs or a zram device that writes nothing back: their transfers are copying
/// (and compressing), and io_uring cannot start them without a worker thread, as neither has FMODE_NOWAIT.
pub(super) fn is_memory(file: &File, device: Option<DeviceNumber>) -> bool {
    let Some(device) = device else {
        return rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC);
    };
    let dir = sysfs_dir(device);
    let name = fs::canonicalize(&dir).ok().and_then(|dir| dir.file_name().map(OsString::from));
    let is_zram = name.is_some_and(|name| name.as_encoded_bytes().starts_with(b"zram"));
    // Without CONFIG_ZRAM_WRITEBACK there is no such file.
    is_zram
        && match fs::read_to_string(format!("{dir}/backing_dev")) {
            Ok(backing) => backing.trim() == "none",
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
}

/// True when the filesystem can punch holes: asked beyond the end of the file, where there is nothing to lose.
pub(super) fn punches_holes(file: &File, size_bytes: u64) -> bool {
    let beyond = size_bytes.next_multiple_of(bytes_u64(1 << 20));
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, beyond, 4096).is_ok()
}
