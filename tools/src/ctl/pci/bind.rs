//! Gives functions from the kernel's driver to vfio-pci and back.
//!
//! In: addresses that were checked. Out: writes to sysfs through [`Kernel`], in an order in which a crash between two of
//! them leaves the function with one driver or none, never with a wrong one. Owner: one command. **Invariant:** a function
//! that somebody uses, or of which that cannot be told, is not touched; a change that fails is taken back.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ringmill_drivers::pci::PciAddress;
use ringmill_drivers::vfio::is_vfio;

use super::VFIO;
use super::claim::{claim, is_driven};
use super::tables::Tables;
use super::tree::{Function, Tree, text_of};
use super::usage::Use;

/// How long a driver may take to show up at a function after the probe was asked for: drivers that probe
/// asynchronously, nvme among them, do so after the write has returned.
pub(super) const PROBE_MAX: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Class and subclass of functions.
const NVME: u32 = 0x0108;
const AHCI: u32 = 0x0106;

/// What sysfs does when it is written to. A seam: a test's kernel is a directory.
pub(super) trait Kernel {
    /// Writes `text` to the attribute at `path`.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;
}

/// The kernel of this machine.
#[derive(Debug)]
pub(super) struct Sysfs;

impl Kernel for Sysfs {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        // Never creates: an attribute that is not there is an error, not a file.
        let mut file = fs::OpenOptions::new().write(true).open(path)?;
        io::Write::write_all(&mut file, text.as_bytes())
    }
}

/// What became of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) address: PciAddress,
    /// The driver before; `None`: it had none.
    pub(super) from: Option<String>,
    /// The driver now.
    pub(super) to: String,
    /// Processes that drive it already.
    pub(super) driven_by: Vec<String>,
}

impl Change {
    /// It had that driver already.
    pub(super) fn is_none(&self) -> bool {
        self.from.as_ref() == Some(&self.to)
    }
}

/// Changes drivers.
pub(super) struct Binder<'a> {
    pub(super) tree: &'a Tree,
    pub(super) kernel: &'a dyn Kernel,
    /// How long a driver may take to show up.
    pub(super) patience: Duration,
}

impl Binder<'_> {
    /// Whether vfio-pci can have this function; the reason if not. Changes nothing.
    pub(super) fn check_bind(
        &self,
        address: PciAddress,
        tables: &Tables,
    ) -> Result<Function, String> {
        let function = self.found(address)?;
        if function.class >> 8 == AHCI {
            return Err(format!(
                "{address} is {}, and ringmill has no driver for these yet; leave it to the kernel, and show guests \
                 its disks with `ringmillctl disk add NAME --file /dev/…`",
                with_article(super::names::class_name(function.class))
            ));
        }
        if function.class >> 8 != NVME {
            return Err(format!(
                "{address} is {}, which ringmill cannot drive; `ringmillctl pci list` shows NVMe controllers",
                with_article(super::names::class_name(function.class))
            ));
        }
        if function.is_with_vfio() {
            return Ok(function);
        }
        // Of another driver's users nothing here would know: uio's or Xen's are in no table.
        if let Some(driver) = function.driver.as_deref().filter(|driver| *driver != "nvme") {
            return Err(format!("{address}: driver {driver} has it; release it there"));
        }
        if !self.tree.driver_dir(VFIO).exists() {
            return Err("the driver vfio-pci is not loaded; `modprobe vfio-pci`".to_owned());
        }
        if function.group.is_none() {
            return Err(format!("{address} has no IOMMU group: {}", self.iommu_advice()));
        }
        self.check_use(&function, tables)?;
        Ok(function)
    }

    /// Whether the function can be given back to the kernel; the reason if not. Changes nothing.
    pub(super) fn check_unbind(
        &self,
        address: PciAddress,
        tables: &Tables,
    ) -> Result<Function, String> {
        let function = self.found(address)?;
        // With another driver there is nothing to do; whoever uses the disk does so through that one.
        if function.is_with_vfio() {
            self.check_use(&function, tables)?;
            // The kernel would wait for them inside the write that takes it from vfio-pci.
            if is_driven(self.tree, &function) {
                let process = "a process that does not show it".to_owned();
                return Err(format!("{address} is in use: {}", Use::Driven { process }.sentence()));
            }
        }
        Ok(function)
    }

    fn found(&self, address: PciAddress) -> Result<Function, String> {
        self.tree.function(address).ok_or_else(|| {
            format!(
                "there is no PCI function {address}; `ringmillctl pci list` shows those there are"
            )
        })
    }

    fn check_use(&self, function: &Function, tables: &Tables) -> Result<(), String> {
        let address = function.address;
        if let Some(first) = tables.uses(self.tree, function).first() {
            return Err(format!("{address} is in use: {}", first.sentence()));
        }
        match tables.blind_spot(self.tree) {
            None => Ok(()),
            Some(reason) => Err(format!("nobody knows whether {address} is in use: {reason}")),
        }
    }

    /// What to do where the IOMMU is off, for this machine's processor.
    fn iommu_advice(&self) -> String {
        let cpuinfo = fs::read_to_string(self.tree.proc("cpuinfo")).unwrap_or_default();
        let how = if cpuinfo.contains("GenuineIntel") {
            "switch VT-d on in the firmware's setup and boot with the kernel parameters `intel_iommu=on iommu=pt`"
        } else if cpuinfo.contains("AuthenticAMD") {
            "switch the IOMMU (AMD-Vi) on in the firmware's setup; the kernel then uses it by itself, `iommu=pt` makes it cheaper"
        } else {
            "switch the IOMMU on in the firmware's setup and the kernel's parameters (`intel_iommu=on iommu=pt` on Intel)"
        };
        format!(
            "the IOMMU is off or absent; {how}. In a virtual machine its hypervisor must offer one"
        )
    }

    /// Gives a checked function to vfio-pci.
    pub(super) fn bind(&self, function: &Function) -> Result<Change, String> {
        let address = function.address;
        if let Some(driver) = function.driver.clone().filter(|driver| is_vfio(driver)) {
            let driven_by = Tables::read(self.tree).vfio_processes(self.tree, function);
            return Ok(Change { address, from: Some(driver.clone()), to: driver, driven_by });
        }
        // Held until the kernel's driver has let go: nobody can mount it in between.
        let held = claim(self.tree, function)?;
        // Users that claim nothing may have come since the first look, which for the last of many addresses, or after
        // much was written out, is long ago.
        let again = self.check_bind(address, &Tables::read(self.tree))?;
        if again.driver != function.driver || self.tree.disks(address) != held.disks {
            return Err(format!(
                "{address} has another driver or other disks than a moment ago; try again"
            ));
        }
        let from = again.driver;
        let done = self.hand_over(address, from.as_deref());
        drop(held);
        match done {
            Ok(()) => Ok(Change { address, from, to: VFIO.to_owned(), driven_by: Vec::new() }),
            Err(reason) => Err(self.roll_back(address, from.as_deref(), reason)),
        }
    }

    /// The override comes first: without a driver in between, nobody but vfio-pci may take the function.
    fn hand_over(&self, address: PciAddress, from: Option<&str>) -> Result<(), String> {
        self.set_override(address, VFIO)?;
        if from.is_some() {
            self.release(address)?;
        }
        self.probe(address)?;
        self.wait_for(address, |driver| driver == Some(VFIO)).map_err(|driver| match driver {
            None => format!("vfio-pci did not take {address}; the kernel's log (`dmesg`) says why"),
            Some(other) => format!("{address} went to {other} instead of vfio-pci"),
        })
    }

    /// Puts back what was before; the message says whether that worked.
    fn roll_back(&self, address: PciAddress, from: Option<&str>, reason: String) -> String {
        let undo = || -> Result<(), String> {
            self.set_override(address, "")?;
            let now = self.tree.driver(address);
            if now.as_deref() == from {
                return Ok(());
            }
            if now.is_some() {
                self.release(address)?;
            }
            let Some(from) = from else { return Ok(()) };
            let file = self.tree.driver_dir(from).join("bind");
            self.write(&file, &address.to_string(), &format!("cannot give {address} to {from}"))?;
            self.wait_for(address, |driver| driver == Some(from))
                .map_err(|_| format!("{from} does not take {address} back"))
        };
        match (undo(), from) {
            (Ok(()), Some(from)) => format!("{reason}; it is with {from} again"),
            (Ok(()), None) => format!("{reason}; it has no driver, as before"),
            (Err(undo), _) => format!(
                "{reason}; and taking that back failed: {undo}. `ringmillctl pci unbind {address}` tries again"
            ),
        }
    }

    /// Gives a checked function back to the kernel.
    pub(super) fn unbind(&self, function: &Function) -> Result<Change, String> {
        let address = function.address;
        // Anew for every address, as in `bind`.
        let from = self.check_unbind(address, &Tables::read(self.tree))?.driver;
        let driven_by = Vec::new();
        if let Some(to) = from.clone().filter(|driver| !is_vfio(driver)) {
            return Ok(Change { address, from, to, driven_by });
        }
        // Cleared first, so that vfio-pci does not get it back from the probe.
        self.set_override(address, "")?;
        if from.is_some() {
            self.release(address)?;
        }
        self.probe(address)?;
        match self.wait_for(address, |driver| driver.is_some()) {
            Ok(()) => {}
            Err(_) => {
                let module = if function.class >> 8 == NVME { "nvme" } else { "ahci" };
                return Err(format!(
                    "{address} is free, but no driver of the kernel took it; `modprobe {module}`, or look at `dmesg`"
                ));
            }
        }
        let to = self.tree.driver(address).unwrap_or_default();
        if is_vfio(&to) {
            return Err(format!(
                "{address} went back to {to}, which has its id in new_id or is told so by its options; remove it there"
            ));
        }
        Ok(Change { address, from, to, driven_by })
    }

    fn write(&self, path: &Path, text: &str, what: &str) -> Result<(), String> {
        self.kernel.write(path, text).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("{what}: {}: only root may; use sudo", path.display())
            }
            io::ErrorKind::ReadOnlyFilesystem => {
                format!(
                    "{what}: {} is read-only here, as in most containers; run it on the host",
                    path.display()
                )
            }
            _ => format!("{what}: {}: {error}", path.display()),
        })
    }

    fn set_override(&self, address: PciAddress, driver: &str) -> Result<(), String> {
        let file = self.tree.function_dir(address).join("driver_override");
        // The kernel takes an empty line for "none".
        self.write(
            &file,
            &format!("{driver}\n"),
            &format!("cannot choose a driver for {address}"),
        )?;
        let now = text_of(&file).unwrap_or_default();
        let none = driver.is_empty() && now == "(null)";
        if now == driver || none {
            return Ok(());
        }
        Err(format!("the kernel keeps {now:?} as the driver chosen for {address}, not {driver:?}"))
    }

    fn release(&self, address: PciAddress) -> Result<(), String> {
        let file = self.tree.function_dir(address).join("driver/unbind");
        self.write(&file, &address.to_string(), &format!("cannot take {address} from its driver"))
    }

    fn probe(&self, address: PciAddress) -> Result<(), String> {
        let file = self.tree.sys("bus/pci/drivers_probe");
        self.write(&file, &address.to_string(), &format!("cannot have a driver look at {address}"))
    }

    /// Waits until the function's driver is as wanted; the present one if it never is.
    fn wait_for(
        &self,
        address: PciAddress,
        is_wanted: impl Fn(Option<&str>) -> bool,
    ) -> Result<(), Option<String>> {
        let end = Instant::now() + self.patience;
        loop {
            let driver = self.tree.driver(address);
            if is_wanted(driver.as_deref()) {
                return Ok(());
            }
            // Another driver will not go away by itself.
            if driver.is_some() || Instant::now() >= end {
                return Err(driver);
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}

fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['A', 'E', 'I', 'a', 'e', 'i', 'o']) { "an" } else { "a" };
    format!("{article} {noun}")
}
