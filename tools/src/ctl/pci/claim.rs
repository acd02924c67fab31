//! Opening disks exclusively: the kernel's own answer to whether somebody uses one, and a lock against new users.
//!
//! In: a function. Out: open files, or who is in the way. **Invariant:** what cannot be opened counts as in use, unless
//! there is nothing to use.

use std::fs::File;
use std::io;

use super::nodes::Node;
use super::tree::{Function, Tree, text_of};
use super::usage::Use;

/// Disks that nobody else can begin to use exclusively.
#[derive(Debug)]
pub(super) struct Claimed {
    /// Their names.
    pub(super) disks: Vec<String>,
    /// Held until the kernel's driver is gone.
    _files: Vec<File>,
}

/// Opens all disks of a function exclusively, so that nobody else begins to use them, and writes out what the page cache has
/// of them.
///
/// # Errors
/// Who is in the way, or why that is not known.
pub(super) fn claim(tree: &Tree, function: &Function) -> Result<Claimed, String> {
    let address = function.address;
    let disks = tree.disks(address);
    let mut files = Vec::new();
    for disk in &disks {
        match open_checked(tree, disk) {
            Ok(file) => {
                // A medium that cannot be written fails here; unbinding does not make that worse.
                let _ = tree.nodes().sync(&file);
                files.push(file);
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let one = exclusive(tree, disk);
                return Err(format!("{address} is in use: {}", one.sentence()));
            }
            Err(error) if has_no_medium(tree, disk, &error) => {}
            Err(error) => {
                return Err(format!(
                    "cannot open /dev/{disk} to see whether it is in use ({error}); run it on the host, as root"
                ));
            }
        }
    }
    Ok(Claimed { disks, _files: files })
}

/// Whether somebody has a disk exclusively, as a question only, for tables. Asked only where nothing else would tell of a ZFS
/// pool, because for an instant it keeps others from using the disk.
pub(super) fn zfs_use(tree: &Tree, function: &Function) -> Option<Use> {
    if !is_zfs_there(tree) {
        return None;
    }
    let is_busy = |disk: &String| {
        // Closed at once.
        let opened = open_checked(tree, disk).map(drop);
        opened.is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
    };
    tree.disks(function.address).into_iter().find(is_busy).map(|disk| exclusive(tree, &disk))
}

/// Whether somebody drives a function through VFIO whose descriptors do not tell: a device's descriptor names no device, and
/// may be all that is left open. A group is open once, for as long as any of its devices is.
pub(super) fn is_driven(tree: &Tree, function: &Function) -> bool {
    tree.vfio_files(function).iter().any(|(path, _)| {
        let is_group = !path.starts_with("/dev/vfio/devices/");
        let opened = || tree.nodes().open_exclusively(&tree.absolute(path));
        is_group && opened().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
    })
}

/// The node of this name in /dev may be another device, in a container for instance.
fn open_checked(tree: &Tree, disk: &str) -> io::Result<File> {
    let file = tree.nodes().open_exclusively(&tree.absolute("dev").join(disk))?;
    let (found, wanted) = (tree.nodes().of(&file)?, tree.block_node(disk));
    if found.is_some() && found == wanted {
        return Ok(file);
    }
    let number = |node: Option<Node>| match node {
        Some(Node::Block((major, minor))) => format!("block device {major}:{minor}"),
        Some(Node::Character(_)) => "a character device".to_owned(),
        None => "no device".to_owned(),
    };
    Err(io::Error::other(format!("it is {}, the disk is {}", number(found), number(wanted))))
}

/// A disk without anything on it, which nobody can use.
fn has_no_medium(tree: &Tree, disk: &str, error: &io::Error) -> bool {
    let is_said = [libc::ENXIO, libc::ENOMEDIUM].map(Some).contains(&error.raw_os_error());
    is_said || text_of(&tree.sys("class/block").join(disk).join("size")).as_deref() == Some("0")
}

fn exclusive(tree: &Tree, disk: &str) -> Use {
    Use::Exclusive { disk: disk.to_owned(), is_zfs_there: is_zfs_there(tree) }
}

fn is_zfs_there(tree: &Tree) -> bool {
    tree.proc("spl").exists()
}
