//! The kernel's own answers about devices, on a loop device: needs root.

use std::path::Path;
use std::process::Command;

use memmap2::MmapOptions;

use super::super::processes::OpenDevices;
use super::*;

struct Loop(PathBuf);

impl Loop {
    fn on(file: &Path) -> Option<Loop> {
        let losetup =
            Command::new("/usr/sbin/losetup").args(["--find", "--show"]).arg(file).output();
        let path = losetup.ok().filter(|said| said.status.success())?.stdout;
        Some(Loop(PathBuf::from(String::from_utf8(path).ok()?.trim())))
    }

    fn name(&self) -> &str {
        self.0.file_name().unwrap().to_str().unwrap()
    }

    fn node(&self) -> Node {
        Tree::new(Path::new("/")).block_node(self.name()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("/usr/sbin/losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A loop device on a file of 1 MiB; `None` and a word where there are none.
fn disk(dir: &Path) -> Option<Loop> {
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = rustix::process::geteuid().is_root().then(|| Loop::on(&image)).flatten();
    if disk.is_none() {
        eprintln!("skipped: loop devices need root and losetup");
    }
    disk
}

#[test]
fn a_loop_device_is_known_by_the_number_of_what_it_is_made_of() {
    let dir = TempDir::new().unwrap();
    let Some(disk) = disk(dir.path()) else { return };
    assert_eq!(RealNodes.behind_loop(&disk.0, disk.node()).unwrap(), None, "it is made of a file");
    // Through a name that is nobody's afterwards, as in a container that has ended.
    let Node::Block((major, minor)) = disk.node() else { panic!("a block device") };
    let name = dir.path().join("disk");
    let numbers = [major, minor].map(|number| number.to_string());
    let made = Command::new("mknod").arg(&name).arg("b").args(numbers).status().unwrap();
    assert!(made.success());
    let above = Loop::on(&name).expect("a second loop device");
    fs::remove_file(&name).unwrap();
    assert_eq!(RealNodes.behind_loop(&above.0, above.node()).unwrap(), Some(disk.node()));
    assert!(RealNodes.behind_loop(&above.0, disk.node()).is_err(), "another device");
    assert!(RealNodes.behind_loop(Path::new("/dev/null"), Node::Character((1, 3))).is_err());
}

#[test]
fn a_device_that_is_mapped_and_no_longer_open_is_seen() {
    let dir = TempDir::new().unwrap();
    let Some(disk) = disk(dir.path()) else { return };
    let tree = Tree::new(Path::new("/"));
    let look = || {
        let mut open = OpenDevices::default();
        let own = std::process::id().to_string();
        open.read_mappings(&tree, &own, &mut std::collections::BTreeMap::new()).unwrap();
        open.users("/nowhere", Some(disk.node())).count()
    };
    assert_eq!(look(), 0);
    let file = File::open(&disk.0).unwrap();
    let map = MmapOptions::new().len(4096).map_raw_read_only(&file).unwrap();
    drop(file);
    assert_eq!(look(), 1);
    drop(map);
    assert_eq!(look(), 0);
}
