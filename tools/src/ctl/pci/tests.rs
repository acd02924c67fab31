//! `ringmillctl pci` over a machine made of files: what it shows, what it refuses, and the order of its writes.

mod real;
mod refusals;

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringmill_drivers::pci::PciAddress;
use serde_json::Value;
use tempfile::TempDir;

use super::bind::{Binder, Kernel};
use super::nodes::{Node, Nodes, RealNodes, parse_number};
use super::tree::Tree;
use super::{Direction, VFIO, change, list};
use crate::ctl::CtlError;

const FREE: &str = "0000:01:00.0";
const ROOT: &str = "0000:02:00.0";
const HEAD: &str = "0000:03:00.0";
const SATA: &str = "0000:00:17.0";
const GIVEN: &str = "0000:04:00.0";
const NIC: &str = "0000:01:00.1";
const BARE: &str = "0000:05:00.0";
const PATIENCE: Duration = Duration::from_millis(40);

thread_local! {
    /// Disks opened exclusively, how many of them at a time at most, and those that were written out, by this thread.
    static OPENED: Cell<u32> = const { Cell::new(0) };
    static HELD_MAX: Cell<usize> = const { Cell::new(0) };
    static SYNCED: Cell<u32> = const { Cell::new(0) };
}

/// Device nodes are files that say which device they are: `b 259:0`. A line `made of b 259:1` says what a loop device is made
/// of. More lines say what opening one does: `errno 13` fails,
/// `then open /dev/nvme0n1` lets a process with it appear, `then driver e1000e` takes the function away meanwhile, and
/// `then disk` lets another namespace appear.
#[derive(Debug)]
struct FileNodes;

impl FileNodes {
    fn text(path: &Path) -> io::Result<String> {
        // A machine that runs tests may have devices of these names itself.
        match fs::metadata(path)?.is_file() {
            true => fs::read_to_string(path),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn parse(text: &str) -> Option<Node> {
        let (kind, number) = text.lines().next()?.split_once(' ')?;
        let number = parse_number(number)?;
        match kind {
            "b" => Some(Node::Block(number)),
            "c" => Some(Node::Character(number)),
            _ => None,
        }
    }

    fn held(dev: &Path) -> usize {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        links
            .filter_map(|fd| fs::read_link(fd.path()).ok())
            .filter(|at| at.starts_with(dev))
            .count()
    }
}

impl Nodes for FileNodes {
    fn at(&self, path: &Path) -> io::Result<Option<Node>> {
        let text = FileNodes::text(path)?;
        match text.strip_prefix("errno ") {
            Some(number) => Err(io::Error::from_raw_os_error(number.trim().parse().unwrap())),
            None => Ok(FileNodes::parse(&text)),
        }
    }

    fn open_exclusively(&self, path: &Path) -> io::Result<File> {
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return RealNodes.open_exclusively(path);
        }
        let dev = path.parent().unwrap();
        let root = dev.parent().unwrap();
        let file = File::open(path)?;
        for line in FileNodes::text(path)?.lines().skip(1) {
            match line.split_once(' ').unwrap() {
                ("errno", number) => {
                    return Err(io::Error::from_raw_os_error(number.parse().unwrap()));
                }
                ("then", "disk") => {
                    let disk = root.join("sys/devices/pci0000:00/0000:00:01.0").join(FREE);
                    let disk = disk.join("nvme/nvme0/nvme0n2");
                    fs::create_dir_all(&disk).unwrap();
                    symlink(disk, root.join("sys/block/nvme0n2")).unwrap();
                }
                ("then", what) => match what.split_once(' ').unwrap() {
                    ("open", opened) => {
                        fs::create_dir_all(root.join("proc/99/fd")).unwrap();
                        symlink(opened, root.join("proc/99/fd/3")).unwrap();
                    }
                    ("driver", driver) => {
                        let link = root.join("sys/bus/pci/devices").join(FREE).join("driver");
                        fs::remove_file(&link).unwrap();
                        symlink(root.join("sys/bus/pci/drivers").join(driver), link).unwrap();
                    }
                    _ => panic!("{what}"),
                },
                _ => panic!("{line}"),
            }
        }
        OPENED.set(OPENED.get() + 1);
        HELD_MAX.set(HELD_MAX.get().max(FileNodes::held(dev)));
        Ok(file)
    }

    fn of(&self, mut file: &File) -> io::Result<Option<Node>> {
        let mut text = String::new();
        io::Read::read_to_string(&mut file, &mut text)?;
        Ok(FileNodes::parse(&text))
    }

    fn behind_loop(&self, path: &Path, wanted: Node) -> io::Result<Option<Node>> {
        let text = FileNodes::text(path)?;
        if FileNodes::parse(&text) != Some(wanted) {
            return Err(io::Error::other("it is another device"));
        }
        Ok(text.lines().find_map(|line| FileNodes::parse(line.strip_prefix("made of ")?)))
    }

    fn sync(&self, _: &File) -> io::Result<()> {
        SYNCED.set(SYNCED.get() + 1);
        Ok(())
    }
}

/// A machine: sysfs, procfs and /dev in a directory.
struct Machine {
    dir: TempDir,
}

impl Machine {
    fn new() -> Machine {
        let machine = Machine { dir: TempDir::new().unwrap() };
        for driver in ["nvme", "ahci", "e1000e", VFIO] {
            fs::create_dir_all(machine.path(&format!("sys/bus/pci/drivers/{driver}"))).unwrap();
        }
        fs::create_dir_all(machine.path("proc/self")).unwrap();
        fs::create_dir_all(machine.path("sys/block")).unwrap();
        fs::create_dir_all(machine.path("sys/class/block")).unwrap();
        machine.write("proc/swaps", "Filename Type Size Used Priority\n");
        machine.write("proc/self/mountinfo", "");
        machine
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn tree(&self) -> Tree {
        Tree::with_nodes(self.dir.path(), &FileNodes)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn append(&self, path: &str, text: &str) {
        let before = fs::read_to_string(self.path(path)).unwrap();
        self.write(path, &(before + text));
    }

    fn link(&self, path: &str, target: &Path) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    /// A function behind the bridge 0000:00:01.0, with a driver and an IOMMU group.
    fn function(&self, address: &str, class: &str, id: (&str, &str), driver: &str, group: u32) {
        let dir = format!("sys/devices/pci0000:00/0000:00:01.0/{address}");
        for (name, text) in [
            ("class", class),
            ("vendor", id.0),
            ("device", id.1),
            ("numa_node", if group == 9 { "-1\n" } else { "1\n" }),
            ("driver_override", "(null)\n"),
        ] {
            self.write(&format!("{dir}/{name}"), text);
        }
        let entry = format!("sys/bus/pci/devices/{address}");
        self.link(&entry, &self.path(&dir));
        if !driver.is_empty() {
            self.set_driver(address, Some(driver));
        }
        let group = format!("sys/kernel/iommu_groups/{group}");
        self.link(&format!("{group}/devices/{address}"), &self.path(&dir));
        self.link(&format!("{entry}/iommu_group"), &self.path(&group));
    }

    fn set_driver(&self, address: &str, driver: Option<&str>) {
        let link = format!("sys/bus/pci/devices/{address}/driver");
        let _ = fs::remove_file(self.path(&link));
        if let Some(driver) = driver {
            self.link(&link, &self.path(&format!("sys/bus/pci/drivers/{driver}")));
        }
    }

    /// A block device in `dir` of sysfs.
    fn block(&self, dir: &str, name: &str, number: &str, is_partition: bool) {
        self.write(&format!("{dir}/{name}/dev"), &format!("{number}\n"));
        self.write(&format!("{dir}/{name}/size"), "2097152\n");
        self.write(&format!("dev/{name}"), &format!("b {number}\n"));
        fs::create_dir_all(self.path(&format!("{dir}/{name}/holders"))).unwrap();
        if is_partition {
            self.write(&format!("{dir}/{name}/partition"), "1\n");
        } else {
            self.link(&format!("sys/block/{name}"), &self.path(&format!("{dir}/{name}")));
        }
        self.link(&format!("sys/class/block/{name}"), &self.path(&format!("{dir}/{name}")));
    }

    fn hold(&self, node: &str, holder: &str) {
        self.write(&format!("sys/class/block/{node}/holders/{holder}"), "");
    }

    fn mapper(&self, name: &str, number: &str, dm_name: &str, uuid: &str) {
        self.block("sys/devices/virtual/block", name, number, false);
        self.write(&format!("sys/class/block/{name}/dm/name"), &format!("{dm_name}\n"));
        self.write(&format!("sys/class/block/{name}/dm/uuid"), &format!("{uuid}\n"));
        self.link(&format!("dev/mapper/{dm_name}"), &self.path(&format!("dev/{name}")));
    }

    fn process(&self, pid: u32, comm: &str, open: &str) {
        self.write(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        self.link(&format!("proc/{pid}/fd/3"), Path::new(open));
    }

    /// The same, but mapped, and no longer open.
    fn mapper_process(&self, pid: u32, comm: &str, device: &str) {
        let node = self.path(&format!("containers/{pid}/dev/disk"));
        self.write(node.to_str().unwrap(), device);
        self.write(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        fs::create_dir_all(self.path(&format!("proc/{pid}/fd"))).unwrap();
        let lines = "00400000-00401000 r-xp 00000000 fe:00 77      /usr/bin/x\n\
                     00500000-00501000 rw-p 00000000 00:00 0 \n\
                     7f0000000000-7f0000001000 r--s 00000000 00:05 88      /dev/disk\n";
        self.write(&format!("proc/{pid}/maps"), lines);
        let files = format!("proc/{pid}/map_files");
        self.write("usr/bin/x", "a program\n");
        self.link(&format!("{files}/400000-401000"), &self.path("usr/bin/x"));
        self.link(&format!("{files}/7f0000000000-7f0000001000"), &node);
    }

    /// A process that has the device open of which `dev` tells, under a name of its own, as in a container.
    fn contained(&self, pid: u32, comm: &str, device: &str) {
        let node = self.path(&format!("containers/{pid}/dev/disk"));
        self.write(node.to_str().unwrap(), device);
        self.write(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        self.link(&format!("proc/{pid}/fd/3"), &node);
    }

    /// One controller of every sort.
    fn furnished() -> Machine {
        let machine = Machine::new();
        let behind = |address: &str| format!("sys/devices/pci0000:00/0000:00:01.0/{address}");
        machine.function(FREE, "0x010802\n", ("0x144d\n", "0xa80a\n"), "nvme", 1);
        machine.function(NIC, "0x020000\n", ("0x8086\n", "0x10d3\n"), "e1000e", 1);
        let free = format!("{}/nvme/nvme0", behind(FREE));
        machine.write(&format!("{free}/model"), "Samsung SSD 980 PRO 1TB       \n");
        machine.write(&format!("{free}/dev"), "240:0\n");
        machine.write(&format!("{free}/ng0n1/dev"), "241:0\n");
        machine.write("dev/nvme0", "c 240:0\n");
        machine.block(&free, "nvme0n1", "259:0", false);
        machine.block(&format!("{free}/nvme0n1"), "nvme0n1p1", "259:1", true);

        machine.function(ROOT, "0x010802\n", ("0x1b36\n", "0x0010\n"), "nvme", 2);
        let root = format!("{}/nvme/nvme1", behind(ROOT));
        machine.block(&root, "nvme1n1", "259:4", false);
        for part in 1..4 {
            let (name, number) = (format!("nvme1n1p{part}"), format!("259:{}", 4 + part));
            machine.block(&format!("{root}/nvme1n1"), &name, &number, true);
        }
        machine.mapper("dm-0", "253:0", "vg-root", "LVM-abc");
        machine.hold("nvme1n1p2", "dm-0");
        machine.append("proc/self/mountinfo", "22 1 253:0 / / rw - ext4 /dev/mapper/vg-root rw\n");
        machine.append("proc/self/mountinfo", "23 22 259:5 / /boot rw - vfat /dev/nvme1n1p1 rw\n");

        // Native multipath: the namespace hangs on the subsystem, a hidden path on the controller.
        machine.function(HEAD, "0x010802\n", ("0x1234\n", "0x0001\n"), "nvme", 3);
        machine.block(&format!("{}/nvme/nvme2", behind(HEAD)), "nvme2c2n1", "0:0", false);
        let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys2";
        machine.block(subsystem, "nvme2n1", "259:9", false);
        machine.write("sys/class/nvme-generic/ng2n1/dev", "241:9\n");
        machine.append(
            "proc/self/mountinfo",
            "24 22 0:44 /sub /data\\040disk rw - btrfs /dev/nvme2n1 rw\n",
        );

        machine.function(SATA, "0x010601\n", ("0x8086\n", "0xa282\n"), "ahci", 4);
        let sata = format!("{}/ata1/host0/block", behind(SATA));
        machine.block(&sata, "sda", "8:0", false);
        machine.block(&format!("{sata}/sda"), "sda1", "8:1", true);
        machine.block("sys/devices/virtual/block", "md0", "9:0", false);
        machine.write("sys/class/block/md0/md/level", "raid1\n");
        machine.hold("sda1", "md0");
        machine.append("proc/swaps", "/dev/md0 partition 1 0 -2\n");

        machine.function(GIVEN, "0x010802\n", ("0x1e0f\n", "0x0007\n"), VFIO, 9);
        machine.process(77, "ringmilld", "/dev/vfio/9");
        machine.function(BARE, "0x010802\n", ("0x1344\n", "0x5405\n"), "", 5);
        machine
    }
}

/// Does what the kernel does when sysfs is written to, and keeps a log.
struct FakeKernel<'a> {
    machine: &'a Machine,
    log: RefCell<Vec<String>>,
    /// Writes to a file of this name fail so.
    fails: Option<(&'static str, io::ErrorKind)>,
    /// The driver that a probe finds instead.
    probes_as: Option<Option<&'static str>>,
}

impl FakeKernel<'_> {
    fn of(machine: &Machine) -> FakeKernel<'_> {
        FakeKernel { machine, log: RefCell::default(), fails: None, probes_as: None }
    }

    fn log(&self) -> Vec<String> {
        self.log.borrow().clone()
    }
}

impl Kernel for FakeKernel<'_> {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let name = path.file_name().unwrap().to_str().unwrap();
        self.log.borrow_mut().push(format!("{name} {}", text.trim()).trim().to_owned());
        if let Some((fails, kind)) = self.fails
            && fails == name
        {
            return Err(kind.into());
        }
        let given = |address: &str| {
            let path = self.machine.path(&format!("sys/bus/pci/devices/{address}/driver_override"));
            fs::read_to_string(path).unwrap().trim().to_owned()
        };
        match name {
            "driver_override" => {
                let shown = if text.trim().is_empty() { "(null)\n" } else { text };
                fs::write(path, shown)?;
            }
            "unbind" => self.machine.set_driver(text, None),
            "bind" => {
                let driver = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
                self.machine.set_driver(text, Some(driver));
            }
            "drivers_probe" => {
                let given = given(text);
                let native = if text == SATA { "ahci" } else { "nvme" };
                let driver = match self.probes_as {
                    Some(driver) => driver,
                    None if given == "(null)" => Some(native),
                    None => Some(given.as_str()),
                };
                self.machine.set_driver(text, driver);
            }
            _ => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }
}

fn addresses(texts: &[&str]) -> Vec<PciAddress> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// What was printed, or why it was refused.
fn bind(kernel: &FakeKernel<'_>, texts: &[&str]) -> Result<String, String> {
    changed(kernel, texts, Direction::Bind)
}

fn unbind(kernel: &FakeKernel<'_>, texts: &[&str]) -> Result<String, String> {
    changed(kernel, texts, Direction::Unbind)
}

fn changed(kernel: &FakeKernel<'_>, texts: &[&str], way: Direction) -> Result<String, String> {
    let mut out = Vec::new();
    let tree = kernel.machine.tree();
    let binder = Binder { tree: &tree, kernel, patience: PATIENCE };
    match change(&binder, &addresses(texts), way, &mut out, false) {
        Ok(()) => Ok(String::from_utf8(out).unwrap()),
        Err(CtlError::Refused(reason)) => Err(reason),
        Err(other) => panic!("{other}"),
    }
}

fn driver(machine: &Machine, address: &str) -> Option<String> {
    machine.tree().driver(address.parse().unwrap())
}

fn chosen(machine: &Machine, address: &str) -> String {
    let path = machine.path(&format!("sys/bus/pci/devices/{address}/driver_override"));
    fs::read_to_string(path).unwrap().trim().to_owned()
}

#[test]
fn the_table_shows_who_uses_what() {
    let machine = Machine::furnished();
    let mut out = Vec::new();
    list(&machine.tree(), false, &mut out, false).unwrap();
    insta::assert_snapshot!("list", String::from_utf8(out).unwrap());
    let mut out = Vec::new();
    list(&machine.tree(), true, &mut out, true).unwrap();
    let rows: Value = serde_json::from_slice(&out).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 7);
    let row = |address: &str| rows.iter().find(|row| row["address"] == address).unwrap();
    assert_eq!(row(NIC)["class_name"], "Ethernet controller");
    assert_eq!(row(FREE)["iommu_group_others"], serde_json::json!([NIC]));
    assert_eq!(row(FREE)["uses"], serde_json::json!([]));
    assert_eq!(row(FREE)["disks"][0]["size_bytes"], 1 << 30);
    assert_eq!(row(GIVEN)["numa_node"], Value::Null);
    let advice: Vec<&str> = row(SATA)["uses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|u| u["advice"].as_str().unwrap())
        .collect();
    assert_eq!(advice.len(), 2, "{advice:?}");
    assert!(advice[0].contains("swapoff /dev/md0"), "{advice:?}");
}

#[test]
fn a_machine_without_controllers_says_so() {
    let machine = Machine::new();
    let mut out = Vec::new();
    list(&machine.tree(), false, &mut out, false).unwrap();
    assert!(String::from_utf8(out).unwrap().contains("--all"));
}

#[test]
fn a_free_controller_goes_to_vfio_and_back() {
    let machine = Machine::furnished();
    let kernel = FakeKernel::of(&machine);
    let said = bind(&kernel, &[FREE]).unwrap();
    assert!(said.starts_with("0000:01:00.0: nvme -> vfio-pci\n"), "{said}");
    assert!(
        said.contains("group 1 also has 0000:01:00.1 (Ethernet controller, driver e1000e)"),
        "{said}"
    );
    assert_eq!(
        kernel.log(),
        ["driver_override vfio-pci", "unbind 0000:01:00.0", "drivers_probe 0000:01:00.0"]
    );
    assert_eq!(driver(&machine, FREE).as_deref(), Some(VFIO));
    let again = bind(&kernel, &[FREE]).unwrap();
    assert!(again.contains("is with vfio-pci already"), "{again}");
    assert_eq!(kernel.log().len(), 3, "nothing was written for nothing");

    let kernel = FakeKernel::of(&machine);
    assert_eq!(unbind(&kernel, &[FREE]).unwrap(), "0000:01:00.0: vfio-pci -> nvme\n");
    assert_eq!(
        kernel.log(),
        ["driver_override", "unbind 0000:01:00.0", "drivers_probe 0000:01:00.0"]
    );
    assert_eq!(chosen(&machine, FREE), "(null)");
    assert!(unbind(&kernel, &[FREE]).unwrap().contains("is with nvme already"));
    assert_eq!(kernel.log().len(), 3);
}

#[test]
fn a_function_without_a_driver_is_taken_too() {
    let machine = Machine::furnished();
    let kernel = FakeKernel::of(&machine);
    assert_eq!(bind(&kernel, &[BARE]).unwrap(), "0000:05:00.0: no driver -> vfio-pci\n");
    assert_eq!(kernel.log(), ["driver_override vfio-pci", "drivers_probe 0000:05:00.0"]);
}

#[test]
fn what_cannot_be_bound_is_refused_with_what_to_do() {
    let machine = Machine::furnished();
    let kernel = FakeKernel::of(&machine);
    let refused = |texts: &[&str], words: &str| {
        let reason = bind(&kernel, texts).unwrap_err();
        assert!(reason.contains(words), "{words}: {reason}");
        assert_eq!(kernel.log(), [""; 0], "{words}");
    };
    refused(&["0000:99:00.0"], "there is no PCI function 0000:99:00.0");
    refused(&[NIC], "is an Ethernet controller");
    refused(&[FREE, ROOT], "root file system");
    refused(&[HEAD], "mounted at /data disk");
    let group = machine.path(&format!("sys/bus/pci/devices/{FREE}/iommu_group"));
    fs::remove_file(group).unwrap();
    refused(&[FREE], "intel_iommu=on");
    machine.write("proc/cpuinfo", "vendor_id : AuthenticAMD\n");
    refused(&[FREE], "AMD-Vi");
    machine.write("proc/cpuinfo", "vendor_id : GenuineIntel\n");
    refused(&[FREE], "VT-d");
    fs::remove_dir(machine.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    refused(&[FREE], "modprobe vfio-pci");
}

#[test]
fn a_bind_that_fails_leaves_the_disk_with_its_old_driver() {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, ResourceBusy};
    type Probed = Option<Option<&'static str>>;
    type Fault = Option<(&'static str, io::ErrorKind)>;
    let cases: [(Fault, Probed, &str); 6] = [
        (Some(("driver_override", PermissionDenied)), None, "use sudo"),
        (Some(("driver_override", ReadOnlyFilesystem)), None, "run it on the host"),
        (Some(("unbind", ResourceBusy)), None, "cannot take 0000:01:00.0 from its driver"),
        (Some(("drivers_probe", ResourceBusy)), None, "cannot have a driver look"),
        (None, Some(Some("e1000e")), "went to e1000e instead"),
        (None, Some(None), "did not take 0000:01:00.0"),
    ];
    for (fails, probes_as, words) in cases {
        let machine = Machine::furnished();
        let kernel = FakeKernel { fails, probes_as, ..FakeKernel::of(&machine) };
        let reason = bind(&kernel, &[FREE]).unwrap_err();
        assert!(reason.contains(words), "{words}: {reason}");
        assert_eq!(driver(&machine, FREE).as_deref(), Some("nvme"), "{words}");
        assert_eq!(chosen(&machine, FREE), "(null)", "{words}");
        let is_undone = reason.contains("it is with nvme again");
        let could_not_write = matches!(fails, Some(("driver_override", _)));
        assert_eq!(is_undone, !could_not_write, "{reason}");
    }
    // Nothing to go back to.
    let machine = Machine::furnished();
    let kernel = FakeKernel { probes_as: Some(None), ..FakeKernel::of(&machine) };
    let reason = bind(&kernel, &[BARE]).unwrap_err();
    assert!(reason.contains("no driver, as before"), "{reason}");
    assert_eq!(chosen(&machine, BARE), "(null)");
}

#[test]
fn a_rollback_that_fails_says_where_the_function_is() {
    struct Stubborn<'a>(FakeKernel<'a>);
    impl Kernel for Stubborn<'_> {
        fn write(&self, path: &Path, text: &str) -> io::Result<()> {
            if path.ends_with("nvme/bind") {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.0.write(path, text)
        }
    }
    let machine = Machine::furnished();
    let kernel =
        Stubborn(FakeKernel { probes_as: Some(Some("e1000e")), ..FakeKernel::of(&machine) });
    let tree = machine.tree();
    let binder = Binder { tree: &tree, kernel: &kernel, patience: PATIENCE };
    let go = |text| change(&binder, &addresses(&[text]), Direction::Bind, &mut Vec::new(), false);
    assert!(go(BARE).unwrap_err().to_string().contains("went to e1000e"));
    let done = go(FREE);
    let reason = done.unwrap_err().to_string();
    assert!(
        reason.contains("taking that back failed: cannot give 0000:01:00.0 to nvme"),
        "{reason}"
    );
}

#[test]
fn what_a_daemon_drives_is_not_taken_from_it() {
    let machine = Machine::furnished();
    let kernel = FakeKernel::of(&machine);
    let reason = unbind(&kernel, &[GIVEN]).unwrap_err();
    assert!(reason.contains("ringmilld (process 77) drives it"), "{reason}");
    fs::remove_dir_all(machine.path("proc/77")).unwrap();
    machine.write(&format!("sys/bus/pci/devices/{GIVEN}/vfio-dev/vfio3/dev"), "511:3\n");
    machine.process(78, "ringmilld", "/dev/vfio/devices/vfio3");
    assert!(unbind(&kernel, &[GIVEN]).unwrap_err().contains("process 78"));
    assert_eq!(kernel.log(), [""; 0]);
    fs::remove_dir_all(machine.path("proc/78")).unwrap();
    assert_eq!(unbind(&kernel, &[GIVEN]).unwrap(), "0000:04:00.0: vfio-pci -> nvme\n");
}

#[test]
fn a_function_that_nobody_takes_back_is_told_of() {
    let machine = Machine::furnished();
    fs::remove_dir_all(machine.path("proc/77")).unwrap();
    let kernel = FakeKernel { probes_as: Some(None), ..FakeKernel::of(&machine) };
    let reason = unbind(&kernel, &[GIVEN]).unwrap_err();
    assert!(reason.contains("modprobe nvme"), "{reason}");
    let machine = Machine::furnished();
    fs::remove_dir_all(machine.path("proc/77")).unwrap();
    let kernel = FakeKernel { probes_as: Some(Some(VFIO)), ..FakeKernel::of(&machine) };
    let reason = unbind(&kernel, &[GIVEN]).unwrap_err();
    assert!(reason.contains("new_id"), "{reason}");
}
