//! Device nodes: which device one is, and opening one so that nobody else has it.
//!
//! In: paths of /dev and of /proc/PID/fd. Out: [`Node`]s, open files. **Invariant:** a device is known by its kind and
//! number, never by the name of its file: containers, chroots and udev have names of their own.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

/// Major and minor number.
pub(super) type DeviceNumber = (u32, u32);

/// A device as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    Block(DeviceNumber),
    Character(DeviceNumber),
}

/// `259:0`, as sysfs writes it.
pub(super) fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// What can be done with device nodes. A seam: a test cannot make any.
pub(super) trait Nodes: Debug + Sync {
    /// The device that a path leads to; `None`: it leads to something else.
    fn at(&self, path: &Path) -> io::Result<Option<Node>>;

    /// Opens a block device so that nobody else may open it so, or mount it, while the file lives.
    fn open_exclusively(&self, path: &Path) -> io::Result<File>;

    /// The device that an open file is.
    fn of(&self, file: &File) -> io::Result<Option<Node>>;

    /// The block device that the loop device at `path` is made of; `None`: a file. It must be the device `wanted`.
    fn behind_loop(&self, path: &Path, wanted: Node) -> io::Result<Option<Node>>;

    /// Writes out what the page cache has of it.
    fn sync(&self, file: &File) -> io::Result<()>;
}

/// The kernel's.
#[derive(Debug)]
pub(super) struct RealNodes;

impl Nodes for RealNodes {
    fn at(&self, path: &Path) -> io::Result<Option<Node>> {
        // Not asking servers: a file of a network that is down would hang the command.
        let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
        let number = (found.stx_rdev_major, found.stx_rdev_minor);
        Ok(match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::BlockDevice => Some(Node::Block(number)),
            FileType::CharacterDevice => Some(Node::Character(number)),
            _ => None,
        })
    }

    fn open_exclusively(&self, path: &Path) -> io::Result<File> {
        // Without O_CREAT, O_EXCL means for block devices: fail where somebody else has claimed it.
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path)
    }

    fn of(&self, file: &File) -> io::Result<Option<Node>> {
        let found: fs::Metadata = file.metadata()?;
        let number = (libc::major(found.rdev()), libc::minor(found.rdev()));
        Ok(match found.file_type() {
            kind if kind.is_block_device() => Some(Node::Block(number)),
            kind if kind.is_char_device() => Some(Node::Character(number)),
            _ => None,
        })
    }

    fn behind_loop(&self, path: &Path, wanted: Node) -> io::Result<Option<Node>> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if self.of(&file)? != Some(wanted) {
            return Err(io::Error::other(format!("{} is another device", path.display())));
        }
        super::loops::backing(&file)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_known_by_its_number_and_not_by_its_name() {
        let null = Some(Node::Character((1, 3)));
        assert_eq!(RealNodes.at(Path::new("/dev/null")).unwrap(), null);
        let file = File::open("/dev/null").unwrap();
        assert_eq!(RealNodes.of(&file).unwrap(), null);
        // As a process is looked at: through the link of its descriptor, whatever that is called.
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        assert_eq!(RealNodes.at(Path::new(&link)).unwrap(), null);
        assert_eq!(RealNodes.at(Path::new("/proc/self/stat")).unwrap(), None);
        assert!(RealNodes.at(Path::new("/dev/there/is/none")).is_err());
    }

    #[test]
    fn odd_numbers_are_none() {
        for text in ["", ":", "1", "1:", "a:1", "1:-1", "1:2:3"] {
            assert_eq!(parse_number(text), None, "{text}");
        }
        assert_eq!(parse_number("259:7\n"), Some((259, 7)));
    }
}
