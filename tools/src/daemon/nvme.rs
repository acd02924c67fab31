//! NVMe controllers of the daemon: attached, watched, reset and let go of; their namespaces are disks of the engine.
//!
//! In: calls of the RPC, results of jobs, events of controllers' threads (as jobs' results). Out: disks that come, change
//! their size and go; finished operations. Owner: the control thread; whatever waits for a device runs on a job's thread.
//! **Invariant:** a controller is let go of after its bdevs have left the registry, or when they have had their time; its
//! name is free when both have ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringmill_core::bdev::Bdev;
use ringmill_core::cross::CrossBdev;
use ringmill_core::reactor::ReactorHandle;
use ringmill_drivers::nvme::{
    Namespace, NvmeControl, NvmeError, NvmeEvent, NvmeEvents, NvmeOptions,
};
use ringmill_drivers::pci::CancelToken;

use super::engine::{DaemonEngine, Disk};
use super::errors::{bdev_error, failed, io_errno, nvme_error, registry_error};
use super::jobs::Applied;
use crate::rpc::Token;
use crate::rpc::engine::{BdevKind, EngineError, Outcome, Progress, Started};
use crate::rpc::nvme::{
    NvmeBdevInfo, NvmeDefaults, NvmeEngine, NvmeHealth, NvmeSpec, NvmeView, missing,
};

/// How long guests get to finish what they have in flight before the controller is let go of under them.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// The same at the end of the daemon, whose whole shut-down stays below 5 s.
const SHUTDOWN_LEAVE_MAX: Duration = Duration::from_secs(2);

/// Brings a controller up. A seam: tests have controllers without devices.
pub(super) type Opener = Arc<
    dyn Fn(
            &NvmeSpec,
            NvmeOptions,
            &[ReactorHandle],
            NvmeEvents,
            &CancelToken,
        ) -> Result<Arc<dyn NvmeControl>, NvmeError>
        + Send
        + Sync,
>;

/// What a disk knows of its namespace.
pub(super) struct NvmeDisk {
    /// The controller's number.
    controller: u64,
    nsid: u32,
    /// The driver's own bdev, below what leads requests to the reactors that have queues.
    inner: Arc<dyn Bdev>,
}

enum Stage {
    Attaching(Token, CancelToken),
    Attached(Arc<dyn NvmeControl>),
    /// Its bdevs are on their way out.
    Leaving {
        control: Arc<dyn NvmeControl>,
        deadline: Instant,
    },
    /// A job lets go of it.
    Closing(Arc<dyn NvmeControl>),
    /// It is let go of; a bdev may still be claimed.
    Closed,
}

struct Entry {
    number: u64,
    spec: NvmeSpec,
    stage: Stage,
    /// Bdevs that were removed and may still be in the registry.
    leaving: Vec<(String, Arc<dyn Bdev>)>,
    /// Who waits for its end.
    detaches: Vec<Token>,
    /// It went away before it was there.
    lost: Option<String>,
    /// A namespace's bdev waits for its predecessor's name.
    sync_again: bool,
}

impl Entry {
    fn control(&self) -> Option<&Arc<dyn NvmeControl>> {
        match &self.stage {
            Stage::Attached(control) | Stage::Leaving { control, .. } | Stage::Closing(control) => {
                Some(control)
            }
            Stage::Attaching(..) | Stage::Closed => None,
        }
    }

    fn is_leaving(&self) -> bool {
        // Also while it is being attached.
        !self.detaches.is_empty()
            || matches!(self.stage, Stage::Leaving { .. } | Stage::Closing(_) | Stage::Closed)
    }
}

/// What went away by itself, for the record of the configuration.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Vanished {
    /// Bdevs of controllers that stay.
    pub bdevs: Vec<String>,
    /// Controllers, each with its bdevs.
    pub controllers: Vec<(String, Vec<String>)>,
}

/// All controllers.
pub(super) struct NvmeControllers {
    entries: Vec<Entry>,
    next_number: u64,
    defaults: NvmeDefaults,
    pub(super) opener: Opener,
    vanished: Vanished,
    shutdown_since: Option<Instant>,
}

impl Default for NvmeControllers {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            next_number: 1,
            defaults: NvmeDefaults::default(),
            opener: Arc::new(super::nvme_open::open),
            vanished: Vanished::default(),
            shutdown_since: None,
        }
    }
}

/// The same object, whatever its vtable's address is.
fn is_same(a: &Arc<dyn Bdev>, b: &Arc<dyn Bdev>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

impl DaemonEngine {
    fn nvme_entry(&mut self, number: u64) -> Option<&mut Entry> {
        self.nvme.entries.iter_mut().find(|entry| entry.number == number)
    }

    fn nvme_named(&self, name: &str) -> Result<&Entry, EngineError> {
        self.nvme.entries.iter().find(|entry| entry.spec.name == name).ok_or_else(|| missing(name))
    }

    /// The controller of this name, if it serves.
    fn nvme_attached(&self, name: &str) -> Result<Arc<dyn NvmeControl>, EngineError> {
        let entry = self.nvme_named(name)?;
        let busy = |what: &str| {
            failed(libc::EBUSY, format!("NVMe controller \"{name}\" is {what}; try again later"))
        };
        match &entry.stage {
            Stage::Attaching(..) => Err(busy("being attached")),
            Stage::Attached(control) => Ok(Arc::clone(control)),
            _ => Err(busy("being detached")),
        }
    }

    /// Runs `work` on a thread of its own and applies what it returns.
    fn nvme_job<T: Send + 'static>(
        &self,
        thread: &str,
        work: impl FnOnce() -> T + Send + 'static,
        apply: impl FnOnce(&mut DaemonEngine, T) + Send + 'static,
    ) -> Result<(), EngineError> {
        let job = move || -> Applied<DaemonEngine> {
            let result = work();
            Box::new(move |engine: &mut DaemonEngine| apply(engine, result))
        };
        self.jobs
            .start(thread, job)
            .map_err(|e| failed(io_errno(&e), format!("cannot start a thread: {e}")))
    }

    fn nvme_on_attached(&mut self, number: u64, result: Result<Arc<dyn NvmeControl>, NvmeError>) {
        let is_ending = self.nvme.shutdown_since.is_some();
        let Some(entry) = self.nvme_entry(number) else { return };
        let Stage::Attaching(token, _) = entry.stage else { return };
        let name = entry.spec.name.clone();
        let is_unwanted = !entry.detaches.is_empty();
        let control = match result {
            Ok(control) => control,
            Err(error) => {
                let detaches = std::mem::take(&mut entry.detaches);
                self.nvme.entries.retain(|entry| entry.number != number);
                self.finished.push((token, Err(nvme_error(&error))));
                self.finished.extend(detaches.into_iter().map(|token| (token, Ok(Outcome::Done))));
                return;
            }
        };
        let lost = entry.lost.take();
        entry.stage = Stage::Attached(control);
        let added = match lost {
            Some(reason) => {
                let text = format!("NVMe controller {name:?} went away at once: {reason}");
                Err(failed(libc::ENODEV, text))
            }
            None if is_ending => {
                Err(failed(libc::ESHUTDOWN, "the daemon is being stopped".to_owned()))
            }
            None if is_unwanted => {
                Err(failed(libc::ECANCELED, format!("attaching {name:?} was cancelled")))
            }
            None => self.nvme_sync(number),
        };
        let answer = match added {
            Ok(()) => {
                let names = self.nvme_bdev_names(number);
                tracing::info!(controller = %name, bdevs = ?names, "attached");
                Ok(Outcome::Bdevs(names))
            }
            Err(error) => {
                self.nvme_leave(number, LEAVE_MAX);
                Err(error)
            }
        };
        self.finished.push((token, answer));
    }

    fn nvme_bdev_names(&self, number: u64) -> Vec<String> {
        let is_its = |disk: &&Disk| disk.nvme.as_ref().is_some_and(|n| n.controller == number);
        self.disks.iter().filter(is_its).map(|disk| disk.name.clone()).collect()
    }

    /// Makes the disks what the controller's namespaces are now.
    ///
    /// # Errors
    /// The first bdev that could not be added; the others were.
    fn nvme_sync(&mut self, number: u64) -> Result<(), EngineError> {
        let Some(entry) = self.nvme_entry(number) else { return Ok(()) };
        entry.sync_again = false;
        let Stage::Attached(control) = &entry.stage else { return Ok(()) };
        let (namespaces, owners) = (control.namespaces(), control.owners());
        let present = |nsid: u32| {
            let found = namespaces.iter().find(|one| one.info.nsid == nsid);
            found.and_then(|one| one.bdev.as_ref())
        };
        let gone: Vec<String> = self
            .disks
            .iter()
            .filter(|disk| {
                disk.nvme.as_ref().is_some_and(|n| {
                    n.controller == number && !present(n.nsid).is_some_and(|b| is_same(b, &n.inner))
                })
            })
            .map(|disk| disk.name.clone())
            .collect();
        for name in gone {
            tracing::warn!(bdev = %name, "its namespace is gone; guests that use it get I/O errors");
            self.nvme_remove_bdev(number, &name);
            self.nvme.vanished.bdevs.push(name);
        }
        let mut result = Ok(());
        for namespace in &namespaces {
            let added = self.nvme_show(number, namespace, owners.as_deref());
            if result.is_ok() {
                result = added;
            }
        }
        result
    }

    /// One namespace: a new disk, or a disk's size.
    fn nvme_show(
        &mut self,
        number: u64,
        namespace: &Namespace,
        owners: Option<&[ReactorHandle]>,
    ) -> Result<(), EngineError> {
        let info = &namespace.info;
        let Some(bdev) = &namespace.bdev else {
            if let Some(reason) = &info.refused {
                tracing::warn!(bdev = %info.bdev_name, "is not there: {reason}");
            }
            return Ok(());
        };
        let is_it = |disk: &Disk| {
            disk.nvme.as_ref().is_some_and(|n| n.controller == number && n.nsid == info.nsid)
        };
        if self.disks.iter().any(is_it) {
            if self.registry.resize(&info.bdev_name, info.blocks_count).is_ok_and(|changed| changed)
            {
                tracing::info!(bdev = %info.bdev_name, blocks = info.blocks_count, "resized");
            }
            return Ok(());
        }
        // Its predecessor of the same name has not gone yet.
        if let Some(entry) = self.nvme_entry(number)
            && entry.leaving.iter().any(|(name, _)| *name == info.bdev_name)
        {
            entry.sync_again = true;
            return Ok(());
        }
        let nvme = NvmeDisk { controller: number, nsid: info.nsid, inner: Arc::clone(bdev) };
        let outer: Arc<dyn Bdev> = match owners {
            None => Arc::clone(bdev),
            Some(owners) => Arc::new(
                CrossBdev::new(Arc::clone(bdev), owners.to_vec()).map_err(|e| bdev_error(&e))?,
            ),
        };
        self.add_disk(Disk {
            name: info.bdev_name.clone(),
            bdev: outer,
            kind: BdevKind::Nvme,
            null: None,
            image: None,
            nvme: Some(nvme),
        })
    }

    /// Takes a bdev away from whoever uses it.
    fn nvme_remove_bdev(&mut self, number: u64, name: &str) {
        let Some(at) = self.disks.iter().position(|disk| disk.name == name) else { return };
        let disk = self.disks.remove(at);
        self.forget_figures(name);
        match self.registry.remove(name) {
            Ok(Some(_)) => {}
            // Claimed: it goes when its claim does. A second removal is the same.
            Ok(None) | Err(_) => {
                if let Some(entry) = self.nvme_entry(number) {
                    entry.leaving.push((disk.name, disk.bdev));
                }
            }
        }
    }

    /// Begins to let go of an attached controller: its bdevs go first.
    fn nvme_leave(&mut self, number: u64, patience: Duration) {
        let Some(entry) = self.nvme_entry(number) else { return };
        let Stage::Attached(control) = &entry.stage else { return };
        let deadline = Instant::now() + patience;
        entry.stage = Stage::Leaving { control: Arc::clone(control), deadline };
        for name in self.nvme_bdev_names(number) {
            self.nvme_remove_bdev(number, &name);
        }
    }

    /// News from a controller's thread.
    fn on_nvme_event(&mut self, number: u64, event: &NvmeEvent) {
        let Some(entry) = self.nvme_entry(number) else { return };
        let name = entry.spec.name.clone();
        match (event, &entry.stage) {
            (NvmeEvent::Removed { reason }, Stage::Attaching(..)) => {
                entry.lost = Some(reason.clone());
            }
            (NvmeEvent::Removed { reason }, Stage::Attached(_)) => {
                tracing::error!(controller = %name, "lost: {reason}; guests that use its disks get I/O errors");
                let bdevs = self.nvme_bdev_names(number);
                self.nvme.vanished.controllers.push((name, bdevs));
                self.nvme_leave(number, LEAVE_MAX);
            }
            (NvmeEvent::Namespaces, Stage::Attached(_)) => {
                if let Err(error) = self.nvme_sync(number) {
                    tracing::error!(controller = %name, "a namespace cannot be shown: {error}");
                }
            }
            (NvmeEvent::State, Stage::Attached(control)) => {
                tracing::info!(controller = %name, state = control.info().state.as_str(), "changed");
            }
            // On its way in or out: what matters is looked at then.
            _ => {}
        }
    }

    /// Notices bdevs that have gone and controllers that can be let go of.
    pub(super) fn settle_nvme(&mut self, now: Instant) {
        let numbers: Vec<u64> = self.nvme.entries.iter().map(|entry| entry.number).collect();
        for number in numbers {
            let registry = Arc::clone(&self.registry);
            let Some(entry) = self.nvme_entry(number) else { continue };
            entry
                .leaving
                .retain(|(name, bdev)| registry.get(name).is_ok_and(|b| is_same(&b, bdev)));
            let are_gone = entry.leaving.is_empty();
            match &entry.stage {
                Stage::Attached(_) if entry.sync_again && are_gone => {
                    if let Err(error) = self.nvme_sync(number) {
                        tracing::error!("a namespace cannot be shown: {error}");
                    }
                }
                Stage::Leaving { deadline, .. } if are_gone || now >= *deadline => {
                    self.nvme_close(number);
                }
                Stage::Closed if are_gone => {
                    self.nvme.entries.retain(|entry| entry.number != number);
                }
                _ => {}
            }
        }
    }

    /// Lets go of a controller, on a thread of its own.
    fn nvme_close(&mut self, number: u64) {
        let Some(entry) = self.nvme_entry(number) else { return };
        let Stage::Leaving { control, .. } = &entry.stage else { return };
        let control = Arc::clone(control);
        if !entry.leaving.is_empty() {
            tracing::warn!(
                controller = %entry.spec.name,
                "requests in flight have not come back; they end with the controller"
            );
        }
        entry.stage = Stage::Closing(Arc::clone(&control));
        let done = move |engine: &mut DaemonEngine, ()| engine.nvme_on_closed(number);
        let closing = Arc::clone(&control);
        if let Err(error) = self.nvme_job("nvme-detach", move || closing.detach(), done) {
            // Without a thread: the control thread waits for the device, which is bounded, rather than leak it.
            tracing::warn!("{error}");
            control.detach();
            self.nvme_on_closed(number);
        }
    }

    fn nvme_on_closed(&mut self, number: u64) {
        let Some(entry) = self.nvme_entry(number) else { return };
        entry.stage = Stage::Closed;
        tracing::info!(controller = %entry.spec.name, "detached");
        let tokens = std::mem::take(&mut entry.detaches);
        self.finished.extend(tokens.into_iter().map(|token| (token, Ok(Outcome::Done))));
    }

    /// When a controller has waited long enough for its guests.
    pub(super) fn nvme_deadline(&self) -> Option<Instant> {
        let deadlines = self.nvme.entries.iter().filter_map(|entry| match &entry.stage {
            Stage::Leaving { deadline, .. } => Some(*deadline),
            _ => None,
        });
        let is_attached = |entry: &Entry| matches!(entry.stage, Stage::Attached(_));
        let shutdown =
            self.nvme.shutdown_since.filter(|_| self.nvme.entries.iter().any(is_attached));
        deadlines.chain(shutdown.map(|since| since + SHUTDOWN_LEAVE_MAX)).min()
    }

    /// At the end of the daemon: controllers go once no guest is there, or when guests have had their time.
    pub(super) fn nvme_shut_down(&mut self, now: Instant) {
        let since = *self.nvme.shutdown_since.get_or_insert(now);
        for entry in &self.nvme.entries {
            if let Stage::Attaching(_, attempt) = &entry.stage {
                attempt.cancel();
            }
        }
        let left = SHUTDOWN_LEAVE_MAX.saturating_sub(now.saturating_duration_since(since));
        if !self.controllers.is_empty() && !left.is_zero() {
            return;
        }
        let numbers: Vec<u64> = self.nvme.entries.iter().map(|entry| entry.number).collect();
        for number in numbers {
            self.nvme_leave(number, left);
        }
    }

    /// Controllers that have not been let go of.
    #[must_use]
    pub fn nvme_names(&self) -> Vec<String> {
        let left = self.nvme.entries.iter().filter(|entry| !matches!(entry.stage, Stage::Closed));
        left.map(|entry| entry.spec.name.clone()).collect()
    }

    /// What went away by itself since the last call.
    pub fn take_vanished(&mut self) -> Vanished {
        std::mem::take(&mut self.nvme.vanished)
    }

    /// The controller and namespace of a disk.
    pub(super) fn nvme_bdev_info(&self, disk: &Disk) -> Option<NvmeBdevInfo> {
        let nvme = disk.nvme.as_ref()?;
        let entry = self.nvme.entries.iter().find(|entry| entry.number == nvme.controller)?;
        Some(NvmeBdevInfo {
            transport: entry.spec.transport,
            address: entry.spec.address.clone(),
            controller: entry.control()?.info(),
            nsid: nvme.nsid,
        })
    }
}

impl NvmeEngine for DaemonEngine {
    fn set_nvme_defaults(&mut self, defaults: NvmeDefaults) -> Result<(), EngineError> {
        if let Some(entry) = self.nvme.entries.first() {
            let text = format!(
                "NVMe controller {:?} is there already; set options before the first is attached, or give them to bdev_nvme_attach_controller",
                entry.spec.name
            );
            return Err(failed(libc::EPERM, text));
        }
        self.nvme.defaults = defaults;
        Ok(())
    }

    fn nvme_defaults(&self) -> NvmeDefaults {
        self.nvme.defaults.clone()
    }

    fn attach_nvme(&mut self, spec: NvmeSpec, token: Token) -> Started {
        ringmill_core::bdev::Registry::check_name(&spec.name).map_err(registry_error)?;
        if let Ok(entry) = self.nvme_named(&spec.name) {
            return Err(if entry.is_leaving() {
                let text = format!(
                    "NVMe controller {:?} is still going away; try again in a moment",
                    spec.name
                );
                failed(libc::EBUSY, text)
            } else {
                let text = format!(
                    "NVMe controller {:?} exists already; choose another name or detach it first",
                    spec.name
                );
                failed(libc::EEXIST, text)
            });
        }
        let is_there = |entry: &&Entry| {
            entry.spec.transport == spec.transport
                && entry.spec.address == spec.address
                && !matches!(entry.stage, Stage::Closed)
        };
        if let Some(entry) = self.nvme.entries.iter().find(is_there) {
            let text =
                format!("{} is in use as {:?}; detach that first", spec.address, entry.spec.name);
            return Err(failed(libc::EBUSY, text));
        }
        let number = self.nvme.next_number;
        let poster = self.jobs.poster();
        let events: NvmeEvents = Arc::new(move |event| {
            poster.post(Box::new(move |engine: &mut DaemonEngine| {
                engine.on_nvme_event(number, &event);
            }));
        });
        let options = spec.options(&self.nvme.defaults);
        let (opener, reactors) = (Arc::clone(&self.nvme.opener), self.reactors.clone());
        let (wanted, attempt) = (spec.clone(), super::nvme_open::attempt(spec.transport));
        let given = attempt.clone();
        self.nvme_job(
            "nvme-attach",
            move || opener(&wanted, options, &reactors, events, &given),
            move |engine, result| engine.nvme_on_attached(number, result),
        )?;
        self.nvme.next_number += 1;
        self.nvme.entries.push(Entry {
            number,
            spec,
            stage: Stage::Attaching(token, attempt),
            leaving: Vec::new(),
            detaches: Vec::new(),
            lost: None,
            sync_again: false,
        });
        Ok(Progress::Later)
    }

    fn nvme_controllers(&self) -> Vec<NvmeView> {
        let view = |entry: &Entry| {
            let control = entry.control();
            NvmeView {
                name: entry.spec.name.clone(),
                transport: entry.spec.transport,
                address: entry.spec.address.clone(),
                is_detaching: entry.is_leaving(),
                info: control.map(|control| control.info()),
                namespaces: control
                    .map(|control| control.namespaces().into_iter().map(|one| one.info).collect())
                    .unwrap_or_default(),
            }
        };
        self.nvme.entries.iter().map(view).collect()
    }

    fn detach_nvme(&mut self, name: &str, token: Token) -> Started {
        let number = self.nvme_named(name)?.number;
        let Some(entry) = self.nvme_entry(number) else { return Err(missing(name)) };
        match &entry.stage {
            // Answered when the attempt has ended.
            Stage::Attaching(_, attempt) => {
                attempt.cancel();
            }
            // It has been let go of; only its name waits for a guest.
            Stage::Closed => return Ok(Progress::Done),
            Stage::Attached(_) | Stage::Leaving { .. } | Stage::Closing(_) => {}
        }
        entry.detaches.push(token);
        self.nvme_leave(number, LEAVE_MAX);
        Ok(Progress::Later)
    }

    fn reset_nvme(&mut self, name: &str, token: Token) -> Started {
        let control = self.nvme_attached(name)?;
        self.nvme_job(
            "nvme-reset",
            move || control.reset(),
            move |engine, result| {
                let result = result.map(|()| Outcome::Done).map_err(|error| nvme_error(&error));
                engine.finished.push((token, result));
            },
        )?;
        Ok(Progress::Later)
    }

    fn nvme_health(&mut self, name: &str, token: Token) -> Started {
        let control = self.nvme_attached(name)?;
        let address = self.nvme_named(name)?.spec.address.clone();
        self.nvme_job(
            "nvme-health",
            move || control.health().map(|health| (control.info(), health)),
            move |engine, result| {
                let result = result.map_err(|error| nvme_error(&error));
                let outcome = result.map(|(controller, health)| {
                    Outcome::Health(Box::new(NvmeHealth { address, controller, health }))
                });
                engine.finished.push((token, outcome));
            },
        )?;
        Ok(Progress::Later)
    }
}
