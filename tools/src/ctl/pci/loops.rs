//! What a loop device is made of, as the kernel knows it.
//!
//! The path in sysfs is that of whoever set it up: in another mount namespace it may name something else or nothing, and the
//! node may have been removed since. The number does not depend on any of that.
#![expect(unsafe_code)] // UNSAFETY: one ioctl, which fills a buffer of ours.

use std::fs::File;
use std::io;

use rustix::ioctl::{Getter, Opcode, ioctl};

use super::nodes::{DeviceNumber, Node};

/// `LOOP_GET_STATUS64` (loop(4)).
const GET_STATUS64: Opcode = 0x4c05;

/// `struct loop_info64`: device, inode and (for a device) number of the backing file, then what does not matter here.
type LoopInfo = [u64; 29];

/// The device behind a loop device; `None`: it is made of a file.
pub(super) fn backing(device: &File) -> io::Result<Option<Node>> {
    // SAFETY: the command fills a loop_info64, which has 232 bytes as `LoopInfo` has; any bytes are valid in it.
    let info: LoopInfo = unsafe { ioctl(device, Getter::<GET_STATUS64, LoopInfo>::new())? };
    let number: DeviceNumber = (libc::major(info[2]), libc::minor(info[2]));
    Ok((info[2] != 0).then_some(Node::Block(number)))
}

const _: () = assert!(size_of::<LoopInfo>() == 232);
