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
#[path = "../support/lab.rs"]
mod lab;

use lab::{MIB, Outcome, image, stripped, with_lab};

/// A test in the guest, under software emulation on a busy machine.
const TEST_WAIT_MAX: Duration = Duration::from_secs(120);

/// Where QEMU puts the first controller.
const FIRST: &str = "0000:00:10.0";

/// This program without its symbols, and a guest that has it.
struct Lent {
    guest: Guest,
    program: PathBuf,
}

impl Lent {
    fn boot(lab: &mut Lab, scratch: &ScratchDir, machine: MachineConfig) -> Result<Self, LabError> {
        let here = std::env::current_exe().map_err(|error| panic!("{error}")).expect("a program");
        let program = stripped(scratch, &here);
        let programs = [program.clone()];
        let image = lab.linux_with_programs(Payload::Base, scratch, &programs)?;
        let mut guest =
            Guest::start(&MachineConfig { boot: Boot::Linux(image), has_iommu: true, ..machine })?;
        // Told once, so that scripts stay readable.
        guest.sh("cat >/run/bind <<'END'\n\
             d=/sys/bus/pci/devices/$1\n\
             [ ! -e $d/driver ] || echo $1 >$d/driver/unbind\n\
             echo $2 >$d/driver_override; echo $1 >/sys/bus/pci/drivers_probe\n\
             [ $(basename $(readlink $d/driver)) = $2 ]\n\
             END")?;
        Ok(Self { guest, program })
    }

    fn bind(&mut self, address: &str, driver: &str) -> Outcome {
        self.guest.sh(&format!("sh -e /run/bind {address} {driver}")).map(drop)
    }

    /// Runs one of `device`'s tests on a device; what it printed.
    fn test(&mut self, name: &str, address: &str, prefix: &str) -> Result<String, LabError> {
        let program = self.program.display();
        self.guest.sh_within(
            &format!(
                "RUST_BACKTRACE=0 RINGMILL_VFIO_DEVICE={address} {prefix} {program} --ignored --exact device::{name} \
                 --nocapture --test-threads=1 >/run/said 2>&1 || {{ cat /run/said; dmesg | tail -20; exit 1; }}\n\
                 grep -q '1 passed' /run/said\ncat /run/said"
            ),
            TEST_WAIT_MAX,
        )
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
        lent.bind(FIRST, "vfio-pci")?;
        eprintln!("{}", lent.test("by_hand", FIRST, "")?);
        lent.guest.quit()
    })
}
