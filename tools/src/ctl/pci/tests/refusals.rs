//! What is in use, or may be, is refused and not touched.

use std::os::unix::fs::MetadataExt;

use super::*;

/// Every use that can be seen, each made by one change of an otherwise free disk.
#[test]
fn whatever_is_in_use_is_refused_and_not_touched() {
    type Setup = fn(&Machine);
    let cases: [(Setup, &str); 26] = [
        // By a name of another mount namespace, or one that is gone: the number counts.
        (
            |m| {
                m.block("sys/devices/virtual/block", "loop8", "7:8", false);
                m.write("dev/loop8", "b 7:8\nmade of b 259:1\n");
                m.write("sys/block/loop8/loop/backing_file", "/vol/disk (deleted)\n");
            },
            "/dev/loop8 is made of nvme0n1p1;",
        ),
        (|m| m.mapper_process(6, "mapped", "b 259:0\n"), "mapped (process 6) has nvme0n1 open"),
        (|m| m.mapper_process(6, "mapped", "c 240:0\n"), "mapped (process 6) has nvme0 open"),
        (
            |m| m.append("proc/self/mountinfo", "9 1 259:1 / /data rw - xfs /dev/x rw\n"),
            "`umount /data`",
        ),
        (
            |m| m.append("proc/self/mountinfo", "9 1 0:50 / /d rw - btrfs /dev/nvme0n1 rw\n"),
            "nvme0n1 is mounted at /d;",
        ),
        (
            |m| m.append("proc/self/mountinfo", "9 1 259:0 / / rw - xfs /dev/root rw\n"),
            "the running system is on nvme0n1",
        ),
        (
            |m| m.append("proc/swaps", "/dev/nvme0n1p1 partition 1 0 -2\n"),
            "`swapoff /dev/nvme0n1p1`",
        ),
        (
            |m| {
                m.mapper("dm-5", "253:5", "vg-a", "LVM-1");
                m.hold("nvme0n1p1", "dm-5");
            },
            "logical volume vg-a",
        ),
        (
            |m| {
                m.mapper("dm-5", "253:5", "vault", "CRYPT-LUKS2-1");
                m.hold("nvme0n1", "dm-5");
            },
            "cryptsetup close vault",
        ),
        (
            |m| {
                m.mapper("dm-5", "253:5", "mpa", "mpath-1");
                m.hold("nvme0n1", "dm-5");
            },
            "multipath -f mpa",
        ),
        (
            |m| {
                m.block("sys/devices/virtual/block", "md7", "9:7", false);
                m.write("sys/class/block/md7/md/level", "raid1\n");
                m.hold("nvme0n1", "md7");
            },
            "mdadm --stop /dev/md7",
        ),
        (|m| m.hold("nvme0n1p1", "bcache0"), "used by bcache0"),
        (|m| m.write("sys/fs/btrfs/1-2-3/devices/nvme0n1p1", ""), "mounted btrfs 1-2-3"),
        (
            |m| m.process(5, "qemu-system-x86", "/dev/nvme0n1"),
            "qemu-system-x86 (process 5) has nvme0n1 open",
        ),
        // Whatever the descriptor's link is called, and whichever of the nodes it is.
        (|m| m.contained(5, "fio", "b 259:0\n"), "fio (process 5) has nvme0n1 open"),
        (|m| m.contained(5, "fio", "b 259:1\n"), "fio (process 5) has nvme0n1p1 open"),
        (|m| m.contained(5, "nvme", "c 240:0\n"), "nvme (process 5) has nvme0 open"),
        (|m| m.contained(5, "qemu", "c 241:0\n"), "qemu (process 5) has ng0n1 open"),
        (
            |m| {
                m.block("sys/devices/virtual/block", "loop7", "7:7", false);
                fs::remove_file(m.path("dev/loop7")).unwrap();
                m.write("sys/block/loop7/loop/backing_file", "/dev/nvme0n1p1\n");
            },
            "`losetup -d /dev/loop7`",
        ),
        (
            |m| {
                m.block("sys/devices/virtual/block", "loop7", "7:7", false);
                m.link("dev/disk/by-id/nvme-x", &m.path("dev/nvme0n1"));
                fs::remove_file(m.path("dev/loop7")).unwrap();
                m.write("sys/block/loop7/loop/backing_file", "/dev/disk/by-id/nvme-x (deleted)\n");
            },
            "`losetup -d /dev/loop7`",
        ),
        (
            |m| {
                let dir = "sys/kernel/config/nvmet/subsystems/nqn.x/namespaces/4";
                m.write(&format!("{dir}/device_path"), "/dev/nvme0n1\n");
                m.write(&format!("{dir}/enable"), "1\n");
            },
            "exports nvme0n1 as namespace 4 of nqn.x",
        ),
        (
            |m| {
                let dir = "sys/kernel/config/nvmet/subsystems/nqn.y/passthru";
                m.write(&format!("{dir}/device_path"), "/dev/nvme0\n");
            },
            "passes nvme0 through as nqn.y",
        ),
        (
            |m| {
                let dir = "sys/kernel/config/target/core/fileio_0/lun";
                m.write(&format!("{dir}/udev_path"), "/dev/nvme0n1p1\n");
            },
            "SCSI target exports nvme0n1p1 as fileio_0/lun",
        ),
        // Nothing of it is there at the first look: only the one after the disks were opened sees it.
        (
            |m| m.write("dev/nvme0n1", "b 259:0\nthen open /dev/nvme0n1\n"),
            "(process 99) has nvme0n1",
        ),
        (
            |m| m.write("sys/bus/pci/devices/0000:01:00.0/sriov_numvfs", "2\n"),
            "2 virtual functions",
        ),
        // What is made of what is made of it counts as well.
        (
            |m| {
                m.mapper("dm-5", "253:5", "vault", "CRYPT-1");
                m.mapper("dm-6", "253:6", "vg-deep", "LVM-2");
                m.hold("nvme0n1p1", "dm-5");
                m.hold("dm-5", "dm-6");
                m.append(
                    "proc/self/mountinfo",
                    "9 1 253:6 / /deep rw - xfs /dev/mapper/vg-deep rw\n",
                );
            },
            "vg-deep on nvme0n1 is mounted at /deep",
        ),
    ];
    for (setup, words) in cases {
        let machine = Machine::furnished();
        setup(&machine);
        let kernel = FakeKernel::of(&machine);
        // The other one is not touched either, except where it came first and all was well then.
        let late = words.contains("process 99");
        let all: &[&str] = if late { &[FREE, BARE] } else { &[BARE, FREE] };
        let reason = bind(&kernel, all).unwrap_err();
        assert!(reason.contains(words), "{words}: {reason}");
        assert!(reason.starts_with("0000:01:00.0 is in use: "), "{reason}");
        assert_eq!(kernel.log(), [""; 0], "{words}");
    }
}

/// Nothing in sysfs tells of it, but the kernel does not open it exclusively for a second time.
#[test]
fn an_exclusive_user_that_no_table_shows_is_noticed() {
    let root = fs::metadata("/").unwrap().dev();
    let (major, minor) = (libc::major(root), libc::minor(root));
    let name = fs::read_link(format!("/sys/dev/block/{major}:{minor}"))
        .ok()
        .and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let node = name.map(|name| Path::new("/dev").join(name)).filter(|node| node.exists());
    let Some(node) = node.filter(|node| File::open(node).is_ok()) else {
        eprintln!("skipped: the root file system is on no block device that may be opened");
        return;
    };
    for (has_zfs, words) in [(false, "lsblk /dev/nvme0n1"), (true, "zpool export")] {
        let machine = Machine::furnished();
        machine.link("dev/nvme0n1", &node);
        if has_zfs {
            machine.write("proc/spl/kstat/zfs/arcstats", "");
        }
        let kernel = FakeKernel::of(&machine);
        let reason = bind(&kernel, &[FREE]).unwrap_err();
        assert!(reason.contains(words), "{reason}");
        assert_eq!(kernel.log(), [""; 0]);
        let mut out = Vec::new();
        list(&machine.tree(), false, &mut out, false).unwrap();
        assert_eq!(String::from_utf8(out).unwrap().contains("probably by ZFS"), has_zfs);
    }
}

/// What neither claims the disk nor has it open is no reason to refuse.
#[test]
fn who_does_not_use_the_disk_is_not_in_the_way() {
    let machine = Machine::furnished();
    // The command itself; the same number as another kind of device; another disk's name for this one's path.
    machine.contained(std::process::id(), "ringmillctl", "b 259:0\n");
    machine.contained(5, "login", "c 259:0\n");
    machine.contained(6, "fio", "b 259:4\n");
    // An export that is switched off, and those of other disks.
    let subsystem = "sys/kernel/config/nvmet/subsystems/nqn.x";
    machine.write(&format!("{subsystem}/namespaces/1/device_path"), "/dev/nvme0n1\n");
    machine.write(&format!("{subsystem}/namespaces/1/enable"), "0\n");
    machine.write(&format!("{subsystem}/namespaces/2/device_path"), "/dev/nvme1n1\n");
    machine.write(&format!("{subsystem}/passthru/device_path"), "(null)\n");
    machine.write("sys/module/nvmet/refcnt", "1\n");
    machine.block("sys/devices/virtual/block", "loop7", "7:7", false);
    machine.write("sys/block/loop7/loop/backing_file", "/var/images/nvme0n1.img\n");
    // As procfs has it.
    fs::remove_dir_all(machine.path("proc/self")).unwrap();
    machine.link("proc/self", Path::new(&std::process::id().to_string()));
    let kernel = FakeKernel::of(&machine);
    bind(&kernel, &[FREE]).unwrap();
}

/// Users that claim nothing show up in these places only.
#[test]
fn what_cannot_be_seen_counts_as_in_use() {
    type Setup = fn(&Machine);
    let cases: [(Setup, &str); 7] = [
        (
            |m| {
                m.mapper_process(6, "mapped", "errno 13\n");
            },
            "cannot see what mapped (process 6) has open",
        ),
        (
            |m| {
                m.block("sys/devices/virtual/block", "loop8", "7:8", false);
                m.write("sys/block/loop8/loop/backing_file", "/vol/disk\n");
                fs::remove_file(m.path("dev/loop8")).unwrap();
            },
            "cannot see what loop8 is made of",
        ),
        (
            |m| {
                m.block("sys/devices/virtual/block", "loop8", "7:8", false);
                m.write("sys/block/loop8/loop/backing_file", "/vol/disk\n");
                m.write("dev/loop8", "b 7:9\nmade of b 8:1\n");
            },
            "cannot see what loop8 is made of",
        ),
        (|m| m.write("proc/6/fd", ""), "cannot see what a process (process 6) has open"),
        (|m| m.contained(6, "fio", "errno 13\n"), "cannot see what fio (process 6) has open"),
        (|m| fs::remove_dir_all(m.path("proc")).unwrap(), "cannot see what processes there are"),
        (|m| m.write("sys/module/nvmet/refcnt", "0\n"), "mount -t configfs"),
    ];
    for (setup, words) in cases {
        let machine = Machine::furnished();
        setup(&machine);
        let kernel = FakeKernel::of(&machine);
        let reason = bind(&kernel, &[FREE]).unwrap_err();
        assert!(reason.contains(words), "{words}: {reason}");
        assert!(reason.contains("on the host, as root"), "{reason}");
        assert_eq!(kernel.log(), [""; 0], "{words}");
    }
    // A process that ended in between, or a file whose server does not answer, is no blindness.
    let machine = Machine::furnished();
    machine.contained(6, "fio", "errno 3\n");
    machine.contained(7, "cat", "errno 107\n");
    machine.write("proc/8/comm", "gone\n");
    bind(&FakeKernel::of(&machine), &[FREE]).unwrap();
}

#[test]
fn a_disk_that_cannot_be_opened_counts_as_in_use() {
    let on_host = "run it on the host, as root";
    for (node, words) in [
        (
            "b 259:0\nerrno 13\n",
            "cannot open /dev/nvme0n1 to see whether it is in use (Permission denied",
        ),
        ("b 259:0\nerrno 1\n", on_host),
        ("b 259:0\nerrno 5\n", on_host),
        ("b 259:0\nerrno 16\n", "somebody uses nvme0n1 exclusively"),
        ("b 259:7\n", "it is block device 259:7, the disk is block device 259:0"),
        ("c 259:0\n", "it is a character device"),
        ("nothing\n", "it is no device"),
    ] {
        let machine = Machine::furnished();
        machine.write("dev/nvme0n1", node);
        let kernel = FakeKernel::of(&machine);
        let reason = bind(&kernel, &[FREE]).unwrap_err();
        assert!(reason.contains(words), "{words}: {reason}");
        assert_eq!(kernel.log(), [""; 0], "{node}");
    }
    let machine = Machine::furnished();
    fs::remove_file(machine.path("dev/nvme0n1")).unwrap();
    assert!(bind(&FakeKernel::of(&machine), &[FREE]).unwrap_err().contains(on_host));
    // Without a medium, or without any blocks, there is nothing to use.
    for errno in [libc::ENXIO, libc::ENOMEDIUM] {
        let machine = Machine::furnished();
        machine.write("dev/nvme0n1", &format!("b 259:0\nerrno {errno}\n"));
        bind(&FakeKernel::of(&machine), &[FREE]).unwrap();
    }
    for (size, errno, is_bound) in [("0\n", 5, true), ("0\n", 16, false), ("", 5, false)] {
        let machine = Machine::furnished();
        machine.write("dev/nvme0n1", &format!("b 259:0\nerrno {errno}\n"));
        machine.write("sys/class/block/nvme0n1/size", size);
        assert_eq!(bind(&FakeKernel::of(&machine), &[FREE]).is_ok(), is_bound, "{size:?} {errno}");
    }
}

#[test]
fn a_controller_that_changes_while_it_is_looked_at_is_left_alone() {
    for (then, words) in [
        ("disk", "other disks than a moment ago"),
        ("driver e1000e", "driver e1000e has it"),
        ("driver vfio-pci", "another driver"),
    ] {
        let machine = Machine::furnished();
        machine.write("dev/nvme0n1", &format!("b 259:0\nthen {then}\n"));
        let kernel = FakeKernel::of(&machine);
        let reason = bind(&kernel, &[FREE]).unwrap_err();
        assert!(reason.contains(words), "{words}: {reason}");
        assert_eq!(kernel.log(), [""; 0], "{then}");
    }
}

#[test]
fn the_table_of_a_machine_with_zfs_holds_and_writes_out_no_disk() {
    let machine = Machine::furnished();
    machine.write("proc/spl/kstat/zfs/arcstats", "");
    let dir = format!("sys/devices/pci0000:00/0000:00:01.0/{FREE}/nvme/nvme0");
    machine.block(&dir, "nvme0n2", "259:20", false);
    let mut out = Vec::new();
    list(&machine.tree(), false, &mut out, false).unwrap();
    assert_eq!((OPENED.get(), HELD_MAX.get(), SYNCED.get()), (2, 1, 0));
    bind(&FakeKernel::of(&machine), &[FREE]).unwrap();
    assert_eq!((OPENED.get(), HELD_MAX.get(), SYNCED.get()), (4, 2, 2));
}

/// Their users are in no table, and vfio's kin need no binding.
#[test]
fn a_function_is_taken_from_the_kernels_nvme_driver_only() {
    for driver in ["uio_pci_generic", "igb_uio", "xen-pciback", "pci-stub", "vfio-platform"] {
        let machine = Machine::furnished();
        machine.set_driver(FREE, Some(driver));
        let kernel = FakeKernel::of(&machine);
        let reason = bind(&kernel, &[FREE]).unwrap_err();
        assert_eq!(reason, format!("0000:01:00.0: driver {driver} has it; release it there"));
        assert_eq!(kernel.log(), [""; 0]);
    }
    for driver in [VFIO, "nvidia-vfio-pci", "acme_vfio_pci"] {
        let machine = Machine::furnished();
        machine.set_driver(GIVEN, Some(driver));
        let kernel = FakeKernel::of(&machine);
        let said = bind(&kernel, &[GIVEN]).unwrap();
        assert_eq!(
            said,
            format!(
                "0000:04:00.0 is with {driver} already, and driven by ringmilld (process 77)\n"
            )
        );
        let reason = unbind(&kernel, &[GIVEN]).unwrap_err();
        assert!(reason.contains("ringmilld (process 77) drives it"), "{reason}");
        assert_eq!(kernel.log(), [""; 0]);
        // By the group's number, from a container.
        fs::remove_dir_all(machine.path("proc/77")).unwrap();
        machine.write("sys/class/vfio/9/dev", "236:4\n");
        machine.contained(78, "qemu", "c 236:4\n");
        assert!(unbind(&kernel, &[GIVEN]).unwrap_err().contains("qemu (process 78)"));
        fs::remove_dir_all(machine.path("proc/78")).unwrap();
        assert_eq!(
            bind(&kernel, &[GIVEN]).unwrap(),
            format!("0000:04:00.0 is with {driver} already\n")
        );
        assert_eq!(unbind(&kernel, &[GIVEN]).unwrap(), format!("0000:04:00.0: {driver} -> nvme\n"));
    }
}

#[test]
fn a_controller_that_ringmill_has_no_driver_for_stays_with_the_kernel() {
    let machine = Machine::furnished();
    machine.write("proc/swaps", "Filename Type Size Used Priority\n");
    fs::remove_file(machine.path("sys/class/block/sda1/holders/md0")).unwrap();
    let kernel = FakeKernel::of(&machine);
    let reason = bind(&kernel, &[SATA]).unwrap_err();
    assert!(
        reason.contains("an AHCI controller, and ringmill has no driver for these yet"),
        "{reason}"
    );
    assert_eq!(kernel.log(), [""; 0]);
    // Whoever gave it to vfio-pci by other means gets it back.
    machine.set_driver(SATA, Some(VFIO));
    assert_eq!(unbind(&kernel, &[SATA]).unwrap(), "0000:00:17.0: vfio-pci -> ahci\n");
}

/// With native multipath the devices hang on the subsystem.
#[test]
fn the_passed_through_namespace_of_a_multipath_disk_counts() {
    let machine = Machine::furnished();
    machine.write("proc/self/mountinfo", "");
    machine.contained(5, "qemu", "c 241:9\n");
    let reason = bind(&FakeKernel::of(&machine), &[HEAD]).unwrap_err();
    assert!(reason.contains("qemu (process 5) has ng2n1 open"), "{reason}");
}

/// A device's descriptor names no device. The group's node says that it is open, and the kernel would wait for its user.
#[test]
fn a_function_that_is_driven_by_who_does_not_show_it_is_not_taken_away() {
    let machine = Machine::furnished();
    fs::remove_dir_all(machine.path("proc/77")).unwrap();
    machine.contained(78, "qemu", "anon_inode\n");
    for (file, is_driven) in [("vfio/9", true), ("vfio/noiommu-9", true), ("vfio/8", false)] {
        machine.write(&format!("dev/{file}"), "c 236:4\nerrno 16\n");
        let kernel = FakeKernel::of(&machine);
        let result = unbind(&kernel, &[GIVEN]);
        assert_eq!(result.is_err(), is_driven, "{file}: {result:?}");
        if let Err(reason) = result {
            assert!(reason.contains("a process that does not show it drives it"), "{reason}");
            assert_eq!(kernel.log(), [""; 0]);
        }
        fs::remove_file(machine.path(&format!("dev/{file}"))).unwrap();
    }
}

/// The second of two addresses is looked at anew: what came while the first was given away is seen.
#[test]
fn every_address_is_looked_at_anew() {
    struct Busy<'a>(FakeKernel<'a>, &'static str);
    impl Kernel for Busy<'_> {
        fn write(&self, path: &Path, text: &str) -> io::Result<()> {
            self.0.machine.process(98, "late", self.1);
            self.0.write(path, text)
        }
    }
    let machine = Machine::furnished();
    let tree = machine.tree();
    let kernel = Busy(FakeKernel::of(&machine), "/dev/nvme0n1");
    let binder = Binder { tree: &tree, kernel: &kernel, patience: PATIENCE };
    let both = addresses(&[BARE, FREE]);
    let mut out = Vec::new();
    let reason = change(&binder, &both, Direction::Bind, &mut out, false).unwrap_err().to_string();
    assert!(reason.contains("late (process 98) has nvme0n1 open"), "{reason}");
    assert_eq!(driver(&machine, FREE).as_deref(), Some("nvme"));
    assert_eq!(driver(&machine, BARE).as_deref(), Some(VFIO));
    assert_eq!(String::from_utf8(out).unwrap(), "0000:05:00.0: no driver -> vfio-pci\n");

    let kernel = Busy(FakeKernel::of(&machine), "/dev/vfio/9");
    let binder = Binder { tree: &tree, kernel: &kernel, patience: PATIENCE };
    fs::remove_dir_all(machine.path("proc/77")).unwrap();
    fs::remove_dir_all(machine.path("proc/98")).unwrap();
    let both = addresses(&[BARE, GIVEN]);
    let reason =
        change(&binder, &both, Direction::Unbind, &mut Vec::new(), false).unwrap_err().to_string();
    assert!(reason.contains("late (process 98) drives it"), "{reason}");
    assert_eq!(driver(&machine, GIVEN).as_deref(), Some(VFIO));
}
