//! Devices that processes have open, or mapped: a mapping keeps a file open after its descriptor was closed.
//!
//! In: /proc/PID/fd, /proc/PID/maps and map_files. Out: [`OpenDevices`]. **Invariant:** a device is told by what the
//! descriptor *is*; the name that its link has counts only where that cannot be asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use super::nodes::Node;
use super::tree::{Tree, names_in, text_of};

/// How a descriptor's device is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Known {
    Node(Node),
    /// It could not be asked: the path of its link.
    Path(String),
}

/// Which devices which processes have open, without this one.
#[derive(Debug, Default)]
pub(super) struct OpenDevices {
    /// With who has it: name and process id.
    entries: BTreeSet<(Known, String)>,
    /// A process of which that could not be found out, with the reason. Without privileges there are many.
    pub(super) unseen: Option<String>,
}

impl OpenDevices {
    pub(super) fn read(tree: &Tree) -> OpenDevices {
        let mut open = OpenDevices::default();
        let all = tree.proc("");
        if let Err(error) = fs::read_dir(&all) {
            open.unseen = Some(format!("processes there are ({error})"));
        }
        // As this procfs numbers it, which may be another namespace's.
        let own = fs::read_link(tree.proc("self"))
            .ok()
            .and_then(|link| Some(link.file_name()?.to_str()?.to_owned()))
            .unwrap_or_else(|| std::process::id().to_string());
        let is_process = |name: &String| name.bytes().all(|b| b.is_ascii_digit()) && *name != own;
        let mut files = BTreeMap::new();
        for pid in names_in(&all).into_iter().filter(is_process) {
            let read = open.read_process(tree, &pid);
            if let Err(error) = read.and_then(|()| open.read_mappings(tree, &pid, &mut files))
                && !is_gone(&error)
            {
                let process = called(tree, &pid);
                open.unseen.get_or_insert_with(|| format!("{process} has open ({error})"));
            }
        }
        open
    }

    fn read_process(&mut self, tree: &Tree, pid: &str) -> io::Result<()> {
        for fd in fs::read_dir(tree.proc(pid).join("fd"))? {
            let Some(known) = known(tree, &fd?.path())? else { continue };
            self.entries.insert((known, called(tree, pid)));
        }
        Ok(())
    }

    /// `files` has what was found before: most mappings are of the same few libraries.
    pub(super) fn read_mappings(
        &mut self,
        tree: &Tree,
        pid: &str,
        files: &mut BTreeMap<String, Option<Known>>,
    ) -> io::Result<()> {
        let dir = tree.proc(pid);
        let maps = fs::read(dir.join("maps"))?;
        for (range, file) in String::from_utf8_lossy(&maps).lines().filter_map(mapping) {
            let found = match files.get(file) {
                Some(found) => found.clone(),
                None => {
                    let entry = dir.join("map_files").join(range);
                    let found = known(tree, &entry)?;
                    // Not of a mapping that is gone by now.
                    if found.is_some() || fs::read_link(&entry).is_ok() {
                        files.insert(file.to_owned(), found.clone());
                    }
                    found
                }
            };
            if let Some(found) = found {
                self.entries.insert((found, called(tree, pid)));
            }
        }
        Ok(())
    }

    /// Who has the device open that is `node`, or is called `path`.
    pub(super) fn users<'a>(
        &'a self,
        path: &'a str,
        node: Option<Node>,
    ) -> impl Iterator<Item = &'a str> {
        let is_it = move |known: &Known| match known {
            Known::Node(found) => Some(*found) == node,
            Known::Path(found) => found == path,
        };
        self.entries.iter().filter(move |(known, _)| is_it(known)).map(|(_, who)| who.as_str())
    }
}

/// A line of maps that is of a file: the name of its entry in map_files, and what tells the file from others (device and
/// inode of its node, and its path).
fn mapping(line: &str) -> Option<(String, &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    // Behind access and offset.
    let (_, rest) = rest.split_once(' ')?;
    let (_, file) = rest.split_once(' ')?;
    let is_file = file.split(' ').nth(1)? != "0";
    is_file.then_some((format!("{:x}-{:x}", number(start)?, number(end)?), file))
}

/// What a descriptor is; `None`: no device, or it has been closed.
fn known(tree: &Tree, fd: &Path) -> io::Result<Option<Known>> {
    match tree.nodes().at(fd) {
        Ok(node) => Ok(node.map(Known::Node)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        // A file system that does not answer, or a node that was removed and is open all the same.
        Err(_) => {
            let Ok(target) = fs::read_link(fd) else { return Ok(None) };
            let path = target.to_str().filter(|path| path.starts_with("/dev/"));
            Ok(path.map(|path| Known::Path(path.to_owned())))
        }
    }
}

/// The process ended while it was looked at.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn called(tree: &Tree, pid: &str) -> String {
    let comm = text_of(&tree.proc(pid).join("comm")).unwrap_or_else(|| "a process".to_owned());
    format!("{comm} (process {pid})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_files_are_told_from_others() {
        let file = "00400000-0040b000 rw-s 00000000 00:05 123                        /dev/a b";
        assert_eq!(
            mapping(file),
            Some(("400000-40b000".to_owned(), "00:05 123                        /dev/a b"))
        );
        for line in [
            "7ffc1000-7ffc2000 rw-p 00000000 00:00 0                          [stack]",
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ",
            "",
            "x-y r--p 0 00:05 1 /dev/a",
            "1-2 r--p 0",
        ] {
            assert_eq!(mapping(line), None, "{line}");
        }
    }
}
