//! The controller's own state: off, on, stopped for good.
//!
//! Flow: open (checks, disable, admin queue, bus master, enable, identify) → halt and enable again for every reset → shut
//! down. Owner: the thread that attaches, then the controller's thread. **Invariant:** every wait ends within what CAP.TO says
//! (and the option above it); the device is a bus master only between the set-up of the admin queue and the proof that it
//! has stopped.
//!
//! NVMe Base 2.0 §3.5 (initialization), §3.6 (shutdown), §3.7 (reset).

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use ringmill_core::spec::nvme::{cc, csts};

use super::admin::AdminQueue;
use super::identify::{ControllerData, SetLimits};
use super::parts::QueueMemory;
use super::queues::Shadow;
use super::quirks::{INIT_DELAY, Quirks, READY_DELAY};
use super::registers::{
    Bar, Capabilities, Wanted, WantedBack, doorbell_offset, enabled_configuration,
};
use super::{NvmeError, NvmeOptions};
use crate::pci::{CancelToken, PciBacking, Registers};

/// What of the time for a shutdown is kept for the stop after it.
const STOP_LEAST: Duration = Duration::from_millis(500);

/// How often a wait for a reset of the function looks whether it is to go on.
const RESET_LOOK: Duration = Duration::from_millis(50);

/// How long a controller that could not be used is waited for, before it is closed in whatever state it is.
const STOP_AFTER_FAILURE: Duration = Duration::from_secs(2);

/// Class and revision in configuration space, and the class of NVMe I/O controllers (PCI Code and ID 1.11 §1.2).
const CLASS_REVISION: u64 = 0x08;
const NVME_CLASS: (u8, u8, u8) = (0x01, 0x08, 0x02);

/// What CAP.CSS offers and CC.CSS chooses.
const SETS_NVM: u8 = 1;
const SETS_ALL: u8 = 1 << 6;
const CHOOSE_NVM: u32 = 0;
const CHOOSE_ALL: u32 = 6;

/// See the module.
#[derive(Debug)]
pub(super) struct Controller<B: PciBacking> {
    pub(super) backing: Arc<B>,
    pub(super) bar: Bar<B::Registers>,
    pub(super) cap: Capabilities,
    /// Major, minor, tertiary.
    pub(super) version: (u16, u8, u8),
    /// PCI vendor and device.
    pub(super) ids: (u16, u16),
    pub(super) quirks: Quirks,
    pub(super) admin: AdminQueue,
    pub(super) data: ControllerData,
    pub(super) limits: SetLimits,
    pub(super) shadow: Shadow,
    /// Memory of queues whose creation failed: the device may have made them. Held until it has stopped.
    pub(super) orphans: Vec<Arc<QueueMemory>>,
    pub(super) timeout_admin: Duration,
    /// As it said, whatever was asked for.
    pub(super) pairs_granted: u16,
    ready_most: Duration,
    command_set: u32,
}

impl<B: PciBacking> Controller<B> {
    /// Brings it up and asks who it is. Whoever gets an error closes the backing.
    pub(super) fn open(
        backing: Arc<B>,
        options: &NvmeOptions,
        pairs_wanted: u16,
        token: &CancelToken,
    ) -> Result<Controller<B>, NvmeError> {
        let mut ids = [0; 4];
        backing.config_read(0, &mut ids)?;
        let [v0, v1, d0, d1] = ids;
        let ids = (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([d0, d1]));
        check_class(&*backing)?;
        let quirks = Quirks::of(ids.0, ids.1);
        if quirks.has(Quirks::DELAY_BEFORE_INIT) {
            std::thread::sleep(INIT_DELAY);
        }
        // Nothing that firmware or an earlier driver set up may write into memory that is ours now.
        backing.set_bus_master(false)?;
        let (mut bar, cap) = map_registers(&*backing, pairs_wanted)?;
        let waits = token.clone();
        // There is nothing yet that would need an orderly end.
        let (for_command, for_others) = (Duration::ZERO, Duration::ZERO);
        bar.wanted_back = Some(WantedBack(Arc::new(move || {
            let since = Instant::now();
            waits.ended().map(|_| Wanted { since, for_command, for_others })
        })));
        let version = bar.version()?;
        let command_set = check(&bar, cap, version)?;
        let admin = AdminQueue::new(&backing.dma(), cap)?;
        let mut controller = Controller {
            bar,
            cap,
            version,
            ids,
            quirks,
            admin,
            data: ControllerData::parse(&[], quirks),
            limits: SetLimits::default(),
            shadow: Shadow::Undecided,
            orphans: Vec::new(),
            timeout_admin: options.timeout_admin,
            pairs_granted: 0,
            ready_most: options.ready_timeout_max,
            command_set,
            backing,
        };
        match controller.start() {
            Ok(()) => Ok(controller),
            Err(error) => {
                controller.bar.wanted_back = None;
                // The better error is the first.
                let _ = controller.disable(STOP_AFTER_FAILURE);
                Err(error)
            }
        }
    }

    fn start(&mut self) -> Result<(), NvmeError> {
        self.disable(Duration::MAX)?;
        self.enable()?;
        self.identify()
    }

    fn ready_within(&self) -> Duration {
        self.bar.ready_within(self.cap, self.ready_most)
    }

    /// CC.EN = 0, and the proof that it was obeyed: RDY = 0. Then it reaches no memory. Bus master goes off as well. All of it
    /// within `at_most`; and each step within what the controller says.
    pub(super) fn disable(&mut self, at_most: Duration) -> Result<(), NvmeError> {
        let start = Instant::now();
        let ready_within = self.ready_within();
        let left = || ready_within.min(at_most.saturating_sub(start.elapsed()));
        let configuration = self.bar.configuration()?;
        if configuration & cc::EN != 0 {
            let status = self.bar.status()?;
            if status & (csts::RDY | csts::CFS | csts::SHST_MASK) == 0 {
                // On its way up; it must arrive before it may be stopped (Base 2.0 §3.5.1). One that does not is stopped
                // all the same.
                let words = ("become ready", "power it off and on");
                // Half of the time is for the stop.
                let within = left().min(at_most / 2);
                match self.bar.wait_status(csts::RDY, csts::RDY, within, true, words) {
                    Err(error) if error.is_gone() => return Err(error),
                    _ => {}
                }
            }
            self.bar.set_configuration(configuration & !(cc::EN | cc::SHN_MASK));
            if self.quirks.has(Quirks::DELAY_BEFORE_READY) {
                if at_most.saturating_sub(start.elapsed()) < READY_DELAY {
                    // Its status must not be read yet, so that there is no proof in time.
                    return Err(self.bar.refused("it takes longer to stop than there is time"));
                }
                self.bar.pause(READY_DELAY)?;
            }
        }
        let words = ("stop after CC.EN was cleared", "power it off and on");
        self.bar.wait_status(csts::RDY, 0, left(), true, words)?;
        self.backing.set_bus_master(false)?;
        self.orphans.clear();
        Ok(())
    }

    /// A disabled controller gets its admin queue and starts.
    pub(super) fn enable(&mut self) -> Result<(), NvmeError> {
        self.admin.set_up(&self.bar);
        self.backing.set_bus_master(true)?;
        self.bar.set_configuration(enabled_configuration(self.command_set));
        let words = ("become ready after CC.EN was set", "power it off and on");
        self.bar.wait_status(csts::RDY, csts::RDY, self.ready_within(), false, words)
    }

    /// Stops it by whatever means work: the register, then a reset of the function. After `Ok` it provably reaches no memory
    /// and has forgotten its queues; after an error only `PciBacking::close` is left.
    pub(super) fn halt(&mut self, at_most: Duration) -> Result<(), NvmeError> {
        let refused = match self.disable(at_most) {
            Ok(()) => return Ok(()),
            Err(error) if error.is_gone() => return Err(error),
            Err(error) => error,
        };
        tracing::warn!("{refused}; resetting its PCI function");
        self.reset_function()
    }

    /// FLR, and a look whether it worked.
    pub(super) fn reset_function(&mut self) -> Result<(), NvmeError> {
        self.reset_backing()?;
        self.disable(Duration::MAX)
    }

    /// What the kernel or a server does in a reset cannot be cut short, but waiting for it can: it has a thread of its own. One
    /// that is left alone ends by itself; `close` is allowed meanwhile.
    fn reset_backing(&self) -> Result<(), NvmeError> {
        let (answer, end) = sync_channel(1);
        let backing = Arc::clone(&self.backing);
        let thread = std::thread::Builder::new().name("nvme-reset".to_owned());
        let thread = thread.spawn(move || {
            // Nobody may wait any more.
            let _ = answer.send(backing.reset());
        });
        thread.map_err(|source| crate::pci::PciError::Io {
            device: self.backing.name().to_owned(),
            what: "cannot start a thread to reset it".to_owned(),
            source,
        })?;
        loop {
            match end.recv_timeout(RESET_LOOK) {
                Ok(end) => return Ok(end?),
                Err(RecvTimeoutError::Timeout) => self.bar.check_wanted()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.bar.refused("its reset ended without an answer"));
                }
            }
        }
    }

    /// Tells it to make everything stable, then disables it. For a controller without commands.
    /// All within `at_most`, and the time to stop.
    pub(super) fn shut_down(&mut self, at_most: Duration) -> Result<(), NvmeError> {
        let start = Instant::now();
        let configuration = self.bar.configuration()?;
        if configuration & cc::EN != 0 && self.bar.status()? & csts::CFS == 0 {
            self.bar.set_configuration(configuration & !cc::SHN_MASK | cc::SHN_NORMAL);
            if !self.quirks.has(Quirks::SHUTDOWN_SILENT) {
                let within = at_most.saturating_sub(STOP_LEAST);
                let words = ("finish its shutdown", "nothing is to be done; it is disabled now");
                let done = csts::SHST_COMPLETE;
                match self.bar.wait_status(csts::SHST_MASK, done, within, false, words) {
                    Err(error) if error.is_gone() => return Err(error),
                    Err(error) => tracing::warn!("{error}"),
                    Ok(()) => {}
                }
            }
        }
        self.disable(at_most.saturating_sub(start.elapsed()).max(STOP_LEAST))
    }
}

/// However it ends, the device is cut off before the memory of its queues is taken away; closing twice does nothing.
impl<B: PciBacking> Drop for Controller<B> {
    fn drop(&mut self) {
        self.backing.close();
    }
}

/// Before any register is touched: on another kind of device they mean something else.
fn check_class<B: PciBacking>(backing: &B) -> Result<(), NvmeError> {
    let mut class = [0; 4];
    backing.config_read(CLASS_REVISION, &mut class)?;
    let [_, interface, sub, base] = class;
    let device = backing.name().to_owned();
    if (base, sub, interface) == (0xff, 0xff, 0xff) {
        return Err(NvmeError::Gone { device });
    }
    match class_refusal(base, sub, interface) {
        Some(reason) => Err(NvmeError::Refused { device, reason }),
        None => Ok(()),
    }
}

fn class_refusal(base: u8, sub: u8, interface: u8) -> Option<String> {
    let words = class_words(base, sub);
    ((base, sub, interface) != NVME_CLASS).then(|| {
        format!(
            "it is a {words} (PCI class {base:02x}{sub:02x}{interface:02x}), not an NVMe controller; attach one of class 010802"
        )
    })
}

fn class_words(base: u8, sub: u8) -> &'static str {
    match (base, sub) {
        (0x01, 0x08) => "non-volatile memory controller of another kind",
        (0x01, _) => "storage controller of another kind",
        (0x02, _) => "network controller",
        (0x03, _) => "display controller",
        (0x04, _) => "multimedia device",
        (0x06, _) => "bridge",
        (0x0c, 0x03) => "USB controller",
        (0x12, _) => "processing accelerator",
        _ => "device of another kind",
    }
}

/// BAR 0 with as many doorbells as are wanted, or as there are.
fn map_registers<B: PciBacking>(
    backing: &B,
    pairs_wanted: u16,
) -> Result<(Bar<B::Registers>, Capabilities), NvmeError> {
    let least = doorbell_offset(0, true, 0) + 4;
    let first = Bar::new(backing.registers(0, least)?, backing.name());
    let cap = first.capabilities()?;
    let wanted = doorbell_offset(pairs_wanted, true, cap.doorbell_stride()) + 4;
    if first.registers().len_bytes() >= wanted {
        return Ok((first, cap));
    }
    // A BAR too short for all gives what it has.
    match backing.registers(0, wanted) {
        Ok(registers) => Ok((Bar::new(registers, backing.name()), cap)),
        Err(_) => Ok((first, cap)),
    }
}

/// What does not depend on identify. Returns the command set to choose.
fn check<R: Registers>(
    bar: &Bar<R>,
    cap: Capabilities,
    (major, minor, _): (u16, u8, u8),
) -> Result<u32, NvmeError> {
    if major == 0 {
        return Err(bar.nonsense(format!("version {major}.{minor}")));
    }
    if cap.page_min_shift() > 0 {
        let bytes = 4096u64 << cap.page_min_shift();
        return Err(bar.refused(format!(
            "its smallest memory page is {bytes} bytes (CAP.MPSMIN); only controllers that take pages of 4096 can be used"
        )));
    }
    // A queue of one entry is none (Base 2.0 §3.1.3.1).
    if cap.queue_entries_max() < 2 {
        return Err(bar.nonsense("CAP.MQES is 0"));
    }
    match cap.command_sets() {
        sets if sets & SETS_NVM != 0 => Ok(CHOOSE_NVM),
        sets if sets & SETS_ALL != 0 => Ok(CHOOSE_ALL),
        sets => Err(bar.refused(format!(
            "it has no NVM command set (CAP.CSS is {sets:#x}); attach a controller for I/O"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::class_refusal;

    #[test]
    fn only_controllers_for_nvme_io_pass() {
        assert_eq!(class_refusal(0x01, 0x08, 0x02), None);
        let words = class_refusal(0x02, 0x00, 0x00).unwrap();
        assert!(words.contains("network controller (PCI class 020000)"), "{words}");
        // AHCI; an NVMe administrative controller.
        for class in [(0x01, 0x06, 0x01), (0x01, 0x08, 0x03)] {
            assert!(class_refusal(class.0, class.1, class.2).is_some());
        }
    }
}
