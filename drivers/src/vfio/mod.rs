//! PCI functions by Linux VFIO (type 1 version 2): the kernel keeps the IOMMU, this process drives the device.
//!
//! Flow: address → group → container → device; registers by mmap, configuration by pread and pwrite, interrupts by eventfd.
//! Owner: control threads; registers and `bind_vector` may be used on reactors. **Invariant:** the device is no bus master
//! until its driver says so, and never after [`VfioDevice`] is closed, dropped, or its process has ended: then the last
//! descriptor goes, and the kernel switches bus mastering off before it lets the group out of the container, which is when
//! pages are unpinned (`vfio_pci_core_disable`, `vfio_group_detach_container`).
//!
//! The three descriptors stay open together and are this file's own, so that they can be given to another process some day.

mod capability;
mod descriptors;
mod domain;
mod group;
mod interrupts;
mod memlock;
mod registers;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use ringmill_core::mem::DmaDomain;
use ringmill_core::units::{bytes_u64, usize_of};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};
use vfio_ioctls::{VfioContainer, VfioError};

use capability::Region;
pub(crate) use descriptors::DeviceFile;
use descriptors::Events;
use domain::{Aperture, VfioDomain};
pub use group::is_vfio;
use interrupts::Interrupts;
pub use registers::VfioRegisters;

use crate::pci::{DeviceNews, PciAddress, PciBacking, PciError};

/// Configuration space (PCI Local Bus 3.0 §6.1): the command register, its bits, and class with revision.
const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const CLASS_REVISION: u64 = 0x08;

/// BARs of a function.
const BARS_COUNT: u8 = 6;

/// Another process may hold the device's lock for a moment (a reset by sysfs, a rescan).
const RESET_TRIES: u32 = 20;
const RESET_PAUSE: Duration = Duration::from_millis(50);

/// A PCI function that VFIO has given to this process.
#[derive(Debug)]
pub struct VfioDevice {
    name: String,
    file: Arc<DeviceFile>,
    /// `None` once closed.
    group: Mutex<Option<OwnedFd>>,
    domain: Arc<VfioDomain>,
    config: Region,
    bars: Vec<Option<Region>>,
    can_reset: bool,
    interrupts: Interrupts,
    events: Events,
    /// Held for writing during a reset: the kernel would keep whoever binds a vector waiting for its end.
    resetting: RwLock<()>,
    windows: Mutex<Vec<Weak<VfioRegisters>>>,
}

impl VfioDevice {
    /// Takes the device at `address` (`0000:01:00.0`, `01:00.0`) from vfio-pci. It is reset by the kernel when it is opened,
    /// and cannot reach memory yet.
    ///
    /// # Errors
    /// [`PciError::Refused`] with what to do, for everything that a user can mend.
    pub fn open(address: &str) -> Result<VfioDevice, PciError> {
        let address: PciAddress = address.parse().map_err(|error| PciError::Refused {
            device: "PCI".to_owned(),
            reason: format!("{error}"),
        })?;
        let name = address.to_string();
        let io = |what: &str| {
            let (device, what) = (name.clone(), what.to_owned());
            move |source| PciError::Io { device, what, source }
        };
        let refused =
            |reason: &str| PciError::Refused { device: name.clone(), reason: reason.to_owned() };

        // Elsewhere memory and a device's registers need stronger barriers than those between processors.
        if cfg!(not(target_arch = "x86_64")) {
            return Err(refused("VFIO is supported on x86-64 only, for now; use io_uring disks"));
        }
        let group = group::inspect(Path::new("/sys"), address)?;
        let container = VfioContainer::new(None).map_err(|error| match error {
            VfioError::OpenContainer(error) if error.kind() == io::ErrorKind::NotFound => {
                refused("there is no /dev/vfio/vfio; load the module: `modprobe vfio-pci`")
            }
            VfioError::OpenContainer(error) => io("opening /dev/vfio/vfio")(error),
            other => refused(&format!(
                "the kernel's VFIO has no type 1 IOMMU ({other}); load its module: `modprobe vfio_iommu_type1`"
            )),
        })?;
        let group_fd: OwnedFd = group::open(Path::new("/dev"), &group, address)?.into();
        let flags = sys::group_status(group_fd.as_fd()).map_err(io("asking for its group"))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(refused(
                "its IOMMU group has a device that another driver holds; give all of the group to vfio-pci",
            ));
        }
        sys::group_set_container(group_fd.as_fd(), &container)
            .map_err(io("putting its group into a container"))?;
        sys::set_iommu(&container).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => refused(
                "the machine cannot keep its interrupts apart (no interrupt remapping); enable that in the firmware, or, if \
                 the device can be trusted, load vfio_iommu_type1 with allow_unsafe_interrupts=1",
            ),
            _ => io("choosing its IOMMU")(source),
        })?;
        let info = sys::iommu_info(&container).map_err(io("asking for its IOMMU"))?;
        let aperture = Aperture::choose(&capability::iova_ranges(&info)).ok_or_else(|| {
            refused("its IOMMU has no gigabyte of addresses, or the kernel is older than 5.4")
        })?;
        let file = sys::group_device(group_fd.as_fd(), &name).map_err(io("opening it"))?;
        let device = Self::with_file(&name, file, group_fd, container, aperture)?;
        device.set_bus_master(false)?;
        tracing::debug!(
            "{name}: {:?}, {} vectors, IOVAs from {:#x} to {:#x}",
            device.interrupts.kind,
            device.interrupts.vectors_count,
            aperture.first,
            aperture.last
        );
        Ok(device)
    }

    fn with_file(
        name: &str,
        file: OwnedFd,
        group: OwnedFd,
        container: VfioContainer,
        aperture: Aperture,
    ) -> Result<VfioDevice, PciError> {
        let io = |what: &str| {
            let (device, what) = (name.to_owned(), what.to_owned());
            move |source| PciError::Io { device, what, source }
        };
        let (arena, _) = ringmill_core::mem::arena()
            .map_err(|error| io("reserving address space")(io::Error::other(error)))?;
        let info = sys::device_info(file.as_fd()).map_err(io("asking what it is"))?;
        let region = |index: u32| {
            // Each by its own index: one that fails moves no other.
            let bytes = sys::region_info(file.as_fd(), index).ok()?;
            capability::region(&bytes).filter(|region| region.len_bytes > 0)
        };
        let is_pci = info.flags & VFIO_DEVICE_FLAGS_PCI != 0;
        let config = region(VFIO_PCI_CONFIG_REGION_INDEX).filter(|_| is_pci).ok_or_else(|| {
            PciError::Refused {
                device: name.to_owned(),
                reason: "it has no PCI configuration space".to_owned(),
            }
        })?;
        let bars = (0..u32::from(BARS_COUNT)).map(region).collect();
        // One per reactor and one for its control thread; reactors are at most one per processor.
        let vectors_max = u16::try_from(sys::processors_count() + 1).unwrap_or(u16::MAX);
        let interrupts = Interrupts::set_up(file.as_fd(), name, vectors_max);
        let events = Events::new().map_err(io("making eventfds"))?;
        for (index, eventfd) in
            [(VFIO_PCI_REQ_IRQ_INDEX, events.request()), (VFIO_PCI_ERR_IRQ_INDEX, events.error())]
        {
            // Devices outside PCI Express report no errors.
            if let Err(error) = interrupts::bind_event(file.as_fd(), index, Some(eventfd)) {
                tracing::debug!("{name}: no news by interrupt {index}: {error}");
            }
        }
        Ok(VfioDevice {
            name: name.to_owned(),
            file: Arc::new(DeviceFile::new(file)),
            group: Mutex::new(Some(group)),
            domain: Arc::new(VfioDomain::new(name, container, aperture, arena)),
            config,
            bars,
            can_reset: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            interrupts,
            events,
            resetting: RwLock::new(()),
            windows: Mutex::new(Vec::new()),
        })
    }

    /// Container, group and device, for as long as the call lasts; `None` once closed. A process that is given duplicates
    /// of all three has the device, with its mappings, even after this one has ended; all are close-on-exec here.
    pub fn with_descriptors<T>(&self, with: impl FnOnce([BorrowedFd<'_>; 3]) -> T) -> Option<T> {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        let group = group.as_ref()?;
        self.domain
            .with_container(|container| {
                let container = sys::borrow(container);
                self.file.with(|file| with([container, group.as_fd(), file])).ok()
            })
            .flatten()
    }

    fn gone(&self) -> PciError {
        PciError::Gone { device: self.name.clone() }
    }

    /// An error, or that the device is gone if it is.
    fn failure(&self, what: &str, source: io::Error) -> PciError {
        if self.is_present() {
            return PciError::Io { device: self.name.clone(), what: what.to_owned(), source };
        }
        self.gone()
    }

    fn config_at(&self, offset_bytes: u64, len_bytes: usize) -> Option<u64> {
        let end = offset_bytes.checked_add(bytes_u64(len_bytes))?;
        (end <= self.config.len_bytes).then_some(self.config.offset_bytes + offset_bytes)
    }

    /// Whether the device answers. VFIO keeps copies of vendor and device number; the class is read from the device.
    fn is_present(&self) -> bool {
        let mut bytes = [0xff; 4];
        let at = self.config.offset_bytes + CLASS_REVISION;
        let read = self.file.with_file(|file| file.read_exact_at(&mut bytes, at));
        matches!(read, Ok(Ok(()))) && bytes != [0xff; 4]
    }

    fn command(&self) -> Result<u16, PciError> {
        let mut bytes = [0; 2];
        self.config_read(COMMAND, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn try_reset(&self) -> Result<(), PciError> {
        if !self.can_reset {
            return Err(PciError::Refused {
                device: self.name.clone(),
                reason: "the kernel knows no way to reset it alone (no FLR, PM or slot reset)"
                    .to_owned(),
            });
        }
        if !self.is_present() {
            // The kernel would wait a minute for it to come back.
            return Err(self.gone());
        }
        let _resetting = self.resetting.write().unwrap_or_else(PoisonError::into_inner);
        let mut tries = 0;
        loop {
            match self.file.with(sys::device_reset).map_err(|_| self.gone())? {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries < RESET_TRIES => {
                    tries += 1;
                    std::thread::sleep(RESET_PAUSE);
                }
                Err(error) => return Err(self.failure("resetting it", error)),
            }
        }
        if self.is_present() { Ok(()) } else { Err(self.gone()) }
    }
}

impl PciBacking for VfioDevice {
    type Registers = VfioRegisters;

    fn name(&self) -> &str {
        &self.name
    }

    fn dma(&self) -> Arc<dyn DmaDomain> {
        Arc::clone(&self.domain) as Arc<dyn DmaDomain>
    }

    fn registers(&self, bar: u8, len_bytes_min: usize) -> Result<Arc<VfioRegisters>, PciError> {
        let refused = |reason: String| PciError::Refused { device: self.name.clone(), reason };
        let region = self
            .bars
            .get(usize::from(bar))
            .and_then(Option::as_ref)
            .ok_or_else(|| refused(format!("it has no registers at BAR {bar}")))?;
        if region.len_bytes < bytes_u64(len_bytes_min) {
            let has = region.len_bytes;
            return Err(refused(format!("BAR {bar} has {has} bytes, {len_bytes_min} are needed")));
        }
        if !self.is_present() {
            return Err(self.gone());
        }
        // Whole pages cost no more than the first byte of them.
        let len_bytes = bytes_u64(len_bytes_min).next_multiple_of(4096).min(region.len_bytes);
        let len_bytes = usize_of(len_bytes);
        let registers = Arc::new(VfioRegisters::new(&self.file, region, len_bytes));
        if registers.mapped_bytes() < len_bytes {
            let mapped = registers.mapped_bytes();
            tracing::info!(
                "{}: {mapped} of {len_bytes} bytes of BAR {bar} can be mapped; the others cost a system call each",
                self.name
            );
        }
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.retain(|window| window.strong_count() > 0);
        windows.push(Arc::downgrade(&registers));
        Ok(registers)
    }

    fn config_read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), PciError> {
        let at = self.config_at(offset_bytes, into.len()).ok_or_else(|| PciError::Refused {
            device: self.name.clone(),
            reason: format!("configuration space ends before {offset_bytes:#x}"),
        })?;
        let read = self.file.with_file(|file| file.read_exact_at(into, at));
        read.map_err(|_| self.gone())?
            .map_err(|error| self.failure("reading its configuration", error))?;
        let is_ones = !into.is_empty() && into.iter().all(|byte| *byte == 0xff);
        if is_ones && !self.is_present() { Err(self.gone()) } else { Ok(()) }
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        let before = self.command()?;
        let master = if on { COMMAND_BUS_MASTER } else { 0 };
        let wanted = before & !COMMAND_BUS_MASTER | COMMAND_MEMORY | master;
        let at = self.config.offset_bytes + COMMAND;
        let written = self.file.with_file(|file| file.write_all_at(&wanted.to_le_bytes(), at));
        written
            .map_err(|_| self.gone())?
            .map_err(|error| self.failure("writing its command register", error))?;
        if self.command()? & COMMAND_BUS_MASTER == master {
            return Ok(());
        }
        let source = io::Error::other("the bit does not change");
        Err(self.failure("switching its bus mastering", source))
    }

    /// What the configuration was before, bus mastering too, the kernel restores.
    fn reset(&self) -> Result<(), PciError> {
        self.try_reset()
    }

    fn vectors_count(&self) -> u16 {
        self.interrupts.vectors_count
    }

    /// During a reset this is an error at once.
    fn bind_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        let what = "binding an interrupt";
        let Ok(_no_reset) = self.resetting.try_read() else {
            let source = io::ErrorKind::WouldBlock.into();
            return Err(PciError::Io { device: self.name.clone(), what: what.to_owned(), source });
        };
        let bound = self.file.with(|file| self.interrupts.bind(file, vector, eventfd));
        bound.map_err(|_| self.gone())?.map_err(|error| self.failure(what, error))
    }

    fn unmask(&self, _vector: u16) -> Result<(), PciError> {
        let unmasked = self.file.with(|file| self.interrupts.unmask(file));
        unmasked
            .map_err(|_| self.gone())?
            .map_err(|error| self.failure("unmasking its interrupt", error))
    }

    fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.as_fd())
    }

    fn news(&self) -> Option<DeviceNews> {
        let news = self.events.next()?;
        // While its function is reset the kernel lets nobody look, for as long as that takes.
        let Ok(_no_reset) = self.resetting.try_read() else { return Some(news) };
        Some(if self.is_present() { news } else { DeviceNews::Gone })
    }

    /// The command register is read back, and what the device wrote before that answer has arrived before it.
    fn silence(&self) -> bool {
        let Ok(_no_reset) = self.resetting.try_read() else { return false };
        self.set_bus_master(false).is_ok()
    }

    fn close(&self) {
        let Some(group) = self.group.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        // A device that is gone refuses these; nothing of it can reach memory then.
        let quiet = self.set_bus_master(false);
        if let Err(error) = quiet.and_then(|()| self.try_reset()) {
            tracing::info!("closing without a reset: {error}");
        }
        let _ = self.file.with(|file| {
            for index in [VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX] {
                // Not all devices have both.
                let _ = interrupts::bind_event(file, index, None);
            }
            if let Err(error) = self.interrupts.tear_down(file) {
                tracing::debug!("{}: switching interrupts off: {error}", self.name);
            }
        });
        let container = self.domain.close();
        for window in self.windows.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if let Some(window) = window.upgrade() {
                window.retire();
            }
        }
        self.file.close();
        if let Err(error) = sys::group_unset_container(group.as_fd()) {
            // The group's descriptor does the same when it goes.
            tracing::debug!("{}: taking its group out of its container: {error}", self.name);
        }
        drop(group);
        drop(container);
    }
}

impl Drop for VfioDevice {
    fn drop(&mut self) {
        self.close();
    }
}
