//! The VFIO driver on PCI devices behind an IOMMU, both emulated: QEMU's NVMe behind VT-d in a guest of the lab.
//!
//! A test here boots a guest with this very program on board, gives devices to vfio-pci, and has the program run those of
//! its tests that are in `device`: they are ignored on an ordinary machine and find their device in
//! `RINGMILL_VFIO_DEVICE`. With a spare disk on real hardware they run there, too:
//! `RINGMILL_VFIO_DEVICE=0000:01:00.0 cargo test -p ringmill-tools --test guest_vfio -- --ignored device::`.
//! Without the lab's packages a test says so and is skipped.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ringmill_tools::guest_lab::guest::Guest;
use ringmill_tools::guest_lab::initramfs::Payload;
use ringmill_tools::guest_lab::qemu::{Boot, MachineConfig, NamespaceConfig, NvmeConfig};
use ringmill_tools::guest_lab::{Lab, LabError, ScratchDir};

mod device;
mod inside;
#[path = "../support/lab.rs"]
mod lab;
mod stack;

use lab::{MIB, Outcome, image, stripped, with_lab};

/// A test in the guest, under software emulation on a busy machine.
const TEST_WAIT_MAX: Duration = Duration::from_secs(240);

/// A namespace of these.
const BLOCKS_4096: &str = ",logical_block_size=4096,physical_block_size=4096";

/// Where QEMU puts the first controller.
const FIRST: &str = "0000:00:10.0";

/// A checksum of data that is the same on both sides.
#[derive(Default)]
struct Digest(u64);

impl Digest {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// A guest that has this program and ringmillctl on board.
struct Lent {
    guest: Guest,
    program: PathBuf,
    ctl: PathBuf,
}

impl Lent {
    fn boot(lab: &mut Lab, scratch: &ScratchDir, machine: MachineConfig) -> Result<Self, LabError> {
        Self::boot_with(lab, scratch, machine, Payload::Base, &[])
    }

    /// The same with more programs.
    fn boot_with(
        lab: &mut Lab,
        scratch: &ScratchDir,
        machine: MachineConfig,
        payload: Payload,
        more: &[&Path],
    ) -> Result<Self, LabError> {
        let here = std::env::current_exe().expect("a program");
        let [program, ctl] = [here.as_path(), Path::new(env!("CARGO_BIN_EXE_ringmillctl"))]
            .map(|program| stripped(scratch, program));
        let mut programs = vec![program.clone(), ctl.clone()];
        programs.extend(more.iter().map(|program| stripped(scratch, program)));
        let image = lab.linux_with_programs(payload, scratch, &programs)?;
        // Linux counts ticks for a moment to see whether they come through the IOMMU, and panics if a busy host lets none come.
        let kernel_words = format!("no_timer_check {}", machine.kernel_words);
        let boot = Boot::Linux(image);
        let guest =
            Guest::start(&MachineConfig { boot, has_iommu: true, kernel_words, ..machine })?;
        Ok(Self { guest, program, ctl })
    }

    /// Gives a device to vfio-pci.
    fn bind(&mut self, address: &str) -> Outcome {
        let ctl = self.ctl.display();
        let driver = format!("/sys/bus/pci/devices/{address}/driver");
        self.guest
            .sh(&format!(
                "{ctl} pci bind {address}\n[ $(basename $(readlink {driver})) = vfio-pci ]"
            ))
            .map(drop)
    }

    /// Runs one of `device`'s tests on a device; what it printed.
    fn test(&mut self, name: &str, address: &str) -> Result<String, LabError> {
        self.test_under(name, address, "")
    }

    /// The same with words before the program's name.
    fn test_under(&mut self, name: &str, address: &str, words: &str) -> Result<String, LabError> {
        let program = self.program.display();
        self.guest.sh_within(
            &format!(
                "RUST_BACKTRACE=0 RINGMILL_VFIO_DEVICE={address} {words} {program} --ignored --exact device::{name} \
                 --nocapture --test-threads=1 >/run/said 2>&1 || {{ cat /run/said; dmesg | tail -20; exit 1; }}\n\
                 grep -q '1 passed' /run/said\ncat /run/said"
            ),
            TEST_WAIT_MAX,
        )
    }

    /// Kills the process that has the device as a bus master, and looks at the command register.
    fn a_killed_owner_leaves_no_bus_master(&mut self, address: &str) -> Outcome {
        let program = self.program.display();
        let config = format!("/sys/bus/pci/devices/{address}/config");
        let command = format!("$(dd if={config} bs=1 skip=4 count=1 | od -An -tu1)");
        self.guest
            .sh(&format!(
                "RINGMILL_VFIO_DEVICE={address} {program} --ignored --exact device::hold --nocapture >/run/held 2>&1 &\n\
                 for i in $(seq 300); do grep -q held /run/held && break; sleep 0.1; done\n\
                 cat /run/held; [ $(({command} & 4)) = 4 ]\n\
                 kill -9 $!; wait $! || true\n\
                 [ $(({command} & 4)) = 0 ]"
            ))
            .map(drop)
    }

    /// The words with which a device is refused.
    fn refusal(&mut self, address: &str) -> Result<String, LabError> {
        let said = self.test("refused", address)?;
        Ok(said.lines().find_map(|line| line.split_once("refused: ")).expect("words").1.to_owned())
    }
}

fn machine(nvme: Vec<NvmeConfig>) -> MachineConfig {
    MachineConfig { nvme, ..MachineConfig::new(Boot::FirstDisk, Vec::new()) }
}

fn one_disk(path: &Path) -> NvmeConfig {
    NvmeConfig { namespaces: vec![NamespaceConfig::image(path)], ..NvmeConfig::default() }
}

#[test]
fn a_device_is_taken_driven_by_hand_and_given_back() -> Outcome {
    with_lab("VFIO device", |lab| {
        let scratch = ScratchDir::new()?;
        let disk = image(&scratch, "nvme.img", 64 * MIB)?;
        let mut lent = Lent::boot(lab, &scratch, machine(vec![one_disk(&disk)]))?;
        lent.bind(FIRST)?;
        let said = lent.test("by_hand", FIRST)?;
        assert!(said.contains(" 3 vectors"), "one per CPU and one more: {said}");

        lent.a_killed_owner_leaves_no_bus_master(FIRST)?;

        // Eight MiB may be locked, and root's right to lock more is taken away.
        let limit = "ulimit -l 8192\n";
        // By its path, because busybox prefers its own, which has no such option.
        let words = "/usr/bin/setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock";
        lent.guest.sh(&format!("echo '{limit}exec \"$@\"' >/run/limited"))?;
        let said = lent.test_under("memlock", FIRST, &format!("sh /run/limited {words}"))?;
        for word in ["10485760 bytes", "RLIMIT_MEMLOCK is 8 MiB", "LimitMEMLOCK"] {
            assert!(said.contains(word), "no {word:?} in {said}");
        }
        lent.guest.quit()
    })
}

#[test]
fn devices_that_cannot_be_had_are_refused_with_what_to_do() -> Outcome {
    with_lab("VFIO refusals", |lab| {
        let scratch = ScratchDir::new()?;
        let disks = [
            image(&scratch, "a.img", 64 * MIB)?,
            image(&scratch, "b.img", 64 * MIB)?,
            image(&scratch, "c.img", 64 * MIB)?,
        ];
        let [alone, first, second] = disks.each_ref().map(|path| one_disk(path));
        // Two functions of one device that promises no isolation: one group.
        let first =
            NvmeConfig { place: Some("addr=0x12.0x0,multifunction=on".to_owned()), ..first };
        let second = NvmeConfig { place: Some("addr=0x12.0x1".to_owned()), ..second };
        let machine = MachineConfig {
            kernel_words: "pci=nomsi".to_owned(),
            ..machine(vec![alone, first, second])
        };
        let mut lent = Lent::boot(lab, &scratch, machine)?;

        let words = lent.refusal("0000:00:1d.7")?;
        assert!(words.contains("no such PCI device"), "{words}");
        let words = lent.refusal(FIRST)?;
        assert!(words.contains("driver nvme has it") && words.contains("pci bind"), "{words}");

        let (ours, neighbour) = ("0000:00:12.0", "0000:00:12.1");
        lent.bind(ours)?;
        let words = lent.refusal(ours)?;
        assert!(words.contains("0000:00:12.1 (driver nvme)"), "{words}");
        lent.bind(neighbour)?;
        lent.test("by_hand", ours)?;

        // Without messages there is one interrupt line.
        lent.bind(FIRST)?;
        let said = lent.test("by_hand", FIRST)?;
        assert!(said.contains(" 1 vectors"), "{said}");
        lent.guest.quit()
    })
}

#[test]
fn the_driver_passes_the_suite_on_devices_of_many_kinds() -> Outcome {
    with_lab("NVMe over VFIO, conformance", |lab| {
        let scratch = ScratchDir::new()?;
        let kinds: [(&str, &str, &[&str], &str); 5] = [
            ("512-byte blocks", "", &[""], "conformance"),
            (
                "4096-byte blocks, 8 KiB per command, two queues",
                // The suite has two channels at a time, and without reactors each has a pair of its own.
                ",mdts=1,max_ioqpairs=2",
                &[BLOCKS_4096],
                "conformance",
            ),
            ("queues of 16 entries", ",mqes=15", &[""], "conformance"),
            (
                "two namespaces, a memory buffer",
                ",cmb_size_mb=2",
                &["", BLOCKS_4096],
                "conformance",
            ),
            ("one queue for two reactors", ",max_ioqpairs=1", &[""], "conformance_across"),
        ];
        let mut nvme = Vec::new();
        for (kind, (_, properties, namespaces, _)) in kinds.iter().enumerate() {
            let mut disks = Vec::new();
            for (number, properties) in namespaces.iter().enumerate() {
                let path = image(&scratch, &format!("{kind}-{number}.img"), 64 * MIB)?;
                let properties = (*properties).to_owned();
                disks.push(NamespaceConfig { properties, ..NamespaceConfig::image(&path) });
            }
            let properties = (*properties).to_owned();
            nvme.push(NvmeConfig { properties, namespaces: disks, place: None });
        }
        let mut lent = Lent::boot(lab, &scratch, machine(nvme))?;
        for (index, (kind, .., test)) in kinds.iter().enumerate() {
            let address = format!("0000:00:{:02x}.0", 0x10 + index);
            lent.bind(&address)?;
            let said = lent.test(test, &address)?;
            eprintln!("{kind}:\n{said}");
        }
        lent.guest.quit()
    })
}
