//! Gives functions from the kernel's driver to vfio-pci and back.
//!
//! In: addresses that were checked. Out: writes to sysfs through [`Kernel`], in an order in which a crash between two of
//! them leaves the function with one driver or none, never with a wrong one. Owner: one command. **Invariant:** a function
//! that somebody uses is not touched; a change that fails is taken back.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::VFIO;
use super::tree::{Address, Function, Tree, text_of};
use super::usage::{Tables, Use, claim};

/// How long a driver may take to show up at a function after the probe was asked for: drivers that probe
/// asynchronously, nvme among them, do so after the write has returned.
pub(super) const PROBE_MAX: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
    pub(super) address: Address,
    /// The driver before; `None`: it had none.
    pub(super) from: Option<String>,
    /// The driver now.
    pub(super) to: String,
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
    pub(super) fn check_bind(&self, address: Address, tables: &Tables) -> Result<Function, String> {
        let function = self.found(address)?;
        if !function.is_storage() {
            return Err(format!(
                "{address} is {}, which ringmill cannot drive; `ringmillctl pci list` shows NVMe and AHCI controllers",
                with_article(super::names::class_name(function.class))
            ));
        }
        if function.driver.as_deref() == Some(VFIO) {
            return Ok(function);
        }
        if !self.tree.driver_dir(VFIO).exists() {
            return Err("the driver vfio-pci is not loaded; `modprobe vfio-pci`".to_owned());
        }
        if function.group.is_none() {
            return Err(format!("{address} has no IOMMU group: {}", self.iommu_advice()));
        }
        self.check_use(&tables.uses(self.tree, &function), address)?;
        Ok(function)
    }

    /// Whether the function can be given back to the kernel; the reason if not. Changes nothing.
    pub(super) fn check_unbind(
        &self,
        address: Address,
        tables: &Tables,
    ) -> Result<Function, String> {
        let function = self.found(address)?;
        // With another driver there is nothing to do; whoever uses the disk does so through that one.
        if function.driver.as_deref() == Some(VFIO) {
            self.check_use(&tables.uses(self.tree, &function), address)?;
        }
        Ok(function)
    }

    fn found(&self, address: Address) -> Result<Function, String> {
        self.tree.function(address).ok_or_else(|| {
            format!(
                "there is no PCI function {address}; `ringmillctl pci list` shows those there are"
            )
        })
    }

    fn check_use(&self, uses: &[Use], address: Address) -> Result<(), String> {
        match uses.first() {
            None => Ok(()),
            Some(first) => Err(format!("{address} is in use: {}", first.sentence())),
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
        let from = function.driver.clone();
        let change = |to: String| Change { address, from: from.clone(), to };
        if from.as_deref() == Some(VFIO) {
            return Ok(change(VFIO.to_owned()));
        }
        // Held until the kernel's driver has let go: nobody can mount it in between.
        let held: Vec<File> = claim(self.tree, function)
            .map_err(|one| format!("{address} is in use: {}", one.sentence()))?;
        let done = self.hand_over(address, from.as_deref());
        drop(held);
        match done {
            Ok(()) => Ok(change(VFIO.to_owned())),
            Err(reason) => Err(self.roll_back(address, from.as_deref(), reason)),
        }
    }

    /// The override comes first: without a driver in between, nobody but vfio-pci may take the function.
    fn hand_over(&self, address: Address, from: Option<&str>) -> Result<(), String> {
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
    fn roll_back(&self, address: Address, from: Option<&str>, reason: String) -> String {
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
        let from = function.driver.clone();
        if let Some(to) = from.clone().filter(|driver| driver != VFIO) {
            return Ok(Change { address, from, to });
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
                let module = if function.class >> 8 == 0x0108 { "nvme" } else { "ahci" };
                return Err(format!(
                    "{address} is free, but no driver of the kernel took it; `modprobe {module}`, or look at `dmesg`"
                ));
            }
        }
        let to = self.tree.driver(address).unwrap_or_default();
        if to == VFIO {
            return Err(format!(
                "{address} went back to vfio-pci, which has its id in new_id or is told so by its options; remove it there"
            ));
        }
        Ok(Change { address, from, to })
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

    fn set_override(&self, address: Address, driver: &str) -> Result<(), String> {
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

    fn release(&self, address: Address) -> Result<(), String> {
        let file = self.tree.function_dir(address).join("driver/unbind");
        self.write(&file, &address.to_string(), &format!("cannot take {address} from its driver"))
    }

    fn probe(&self, address: Address) -> Result<(), String> {
        let file = self.tree.sys("bus/pci/drivers_probe");
        self.write(&file, &address.to_string(), &format!("cannot have a driver look at {address}"))
    }

    /// Waits until the function's driver is as wanted; the present one if it never is.
    fn wait_for(
        &self,
        address: Address,
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
