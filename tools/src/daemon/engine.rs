//! The daemon behind the RPC: bdevs, controllers and reactors by name.
//!
//! In: typed calls of the RPC, events from reactors, results of jobs. Out: finished operations ([`DaemonEngine::finished`]).
//! Owner: the control thread. **Invariant:** a name is reserved while its job runs; a bdev's file is closed before its
//! deletion is answered.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ringmill_core::bdev::{Bdev, Registry, RegistryError};
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::IoOp;
use ringmill_core::reactor::{self, ReactorHandle, tick_rate, ticks_now};
use ringmill_core::stats::{LatencySnapshot, Stage};
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::{UringBdev, UringOptions};
use ringmill_vmm_glue::blk::{
    Controller, ControllerSpec as GlueSpec, ControllerState, Event, EventSender,
};

use super::errors::{bdev_error, controller_error, failed, io_errno, open_error, registry_error};
use super::figures::{DiskFigures, IoBaselines};
use super::jobs::{Applied, Jobs};
use super::log::Log;
use super::nvme::{NvmeControllers, NvmeDisk};
use super::views;
use crate::rpc::Token;
use crate::rpc::engine::{
    BackendSpec, BdevInfo, BdevKind, BdevSpec, ControllerInfo, ControllerSpec, Engine, EngineError,
    IdlePolicy, ImageInfo, IoStats, LatencyFilter, LatencyRow, LogLevel, Outcome, PinMode,
    Progress, ReactorInfo, ResetMode, Resize, Started,
};

/// How long a start waits for the lock of an image that a dying predecessor still holds.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// A deletion is answered after this long even if requests are still in flight.
const DELETE_ANSWER_MAX: Duration = Duration::from_secs(5);
/// A move is answered after this long even if requests are still in flight.
const MOVE_ANSWER_MAX: Duration = Duration::from_secs(10);
/// Queues on offer when the configuration does not say.
const QUEUES_DEFAULT: u16 = 64;

/// Where sockets go and who may use them.
#[derive(Clone, Debug)]
pub struct SocketSettings {
    /// Directory of the controllers' sockets.
    pub dir: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Group, if not the process's own.
    pub group: Option<u32>,
}

/// A bdev with what only its kind knows.
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) bdev: Arc<dyn Bdev>,
    pub(super) kind: BdevKind,
    pub(super) null: Option<Arc<NullBdev>>,
    pub(super) image: Option<ImageInfo>,
    pub(super) nvme: Option<NvmeDisk>,
}

/// Queues on their way to other cores.
struct Move {
    controller: String,
    token: Token,
    deadline: Instant,
}

struct Deletion {
    token: Token,
    deadline: Instant,
}

/// Values that a reset put behind us, per controller: queue, operation, stage.
type LatencyBase = HashMap<(u16, IoOp, u8), LatencySnapshot>;

/// The daemon's state.
pub struct DaemonEngine {
    pub(super) registry: Arc<Registry>,
    pub(super) reactors: Vec<ReactorHandle>,
    pub(super) disks: Vec<Disk>,
    pub(super) controllers: Vec<Controller>,
    events: EventSender,
    /// What may block runs here.
    pub jobs: Jobs<DaemonEngine>,
    sockets: SocketSettings,
    next_controller: u64,
    /// The reactor that owns the next device queue, where a disk has fewer than there are reactors.
    next_owner: usize,
    opening: Vec<String>,
    deletions: HashMap<String, Deletion>,
    bdev_deletions: Vec<(String, Token)>,
    moves: HashMap<u64, Move>,
    next_move: u64,
    former: HashMap<String, DiskFigures>,
    io_baselines: IoBaselines,
    histograms: HashMap<String, (Option<IoOp>, DiskFigures)>,
    latency_bases: HashMap<String, LatencyBase>,
    idle: (IdlePolicy, u32),
    log: Log,
    pub(super) finished: Vec<(Token, Result<Outcome, EngineError>)>,
    pub(super) nvme: NvmeControllers,
    stop_signal: Option<i32>,
    pub(super) started: Instant,
}

impl DaemonEngine {
    /// A daemon without disks.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(
        reactors: Vec<ReactorHandle>,
        sockets: SocketSettings,
        events: EventSender,
        log: Log,
    ) -> std::io::Result<DaemonEngine> {
        let idle = match reactors.first().map(ReactorHandle::idle) {
            Some(reactor::IdlePolicy::Adaptive { spin_ns }) => {
                (IdlePolicy::Adaptive, u32::try_from(spin_ns / 1000).unwrap_or(u32::MAX))
            }
            _ => (IdlePolicy::Poll, super::control::SPIN_US_DEFAULT),
        };
        Ok(DaemonEngine {
            registry: Arc::new(Registry::new()),
            reactors,
            disks: Vec::new(),
            controllers: Vec::new(),
            events,
            jobs: Jobs::new()?,
            sockets,
            next_controller: 1,
            next_owner: 0,
            opening: Vec::new(),
            deletions: HashMap::new(),
            bdev_deletions: Vec::new(),
            moves: HashMap::new(),
            next_move: 1,
            former: HashMap::new(),
            io_baselines: IoBaselines::default(),
            histograms: HashMap::new(),
            latency_bases: HashMap::new(),
            idle,
            log,
            finished: Vec::new(),
            nvme: NvmeControllers::default(),
            stop_signal: None,
            started: Instant::now(),
        })
    }

    /// Operations that have ended since the last call.
    pub fn finished(&mut self) -> Vec<(Token, Result<Outcome, EngineError>)> {
        std::mem::take(&mut self.finished)
    }

    /// The signal that `kill` or the operator sent, once.
    pub fn take_stop_signal(&mut self) -> Option<i32> {
        self.stop_signal.take()
    }

    /// All controllers, for the control loop's poll.
    pub fn serving(&self) -> &[Controller] {
        &self.controllers
    }

    /// All controllers, for the control loop's news.
    pub fn controllers_mut(&mut self) -> &mut Vec<Controller> {
        &mut self.controllers
    }

    /// News for a controller.
    pub fn on_event(&mut self, event: Event) {
        if let Some(controller) =
            self.controllers.iter_mut().find(|c| c.number() == event.controller)
        {
            controller.on_event(event);
        }
    }

    /// Notices moves that are over, controllers and bdevs that are gone, and what has waited long enough.
    pub fn settle(&mut self, now: Instant) {
        self.settle_moves(now);
        self.settle_nvme(now);
        let mut at = 0;
        while at < self.controllers.len() {
            if self.controllers[at].state() != ControllerState::Deleted {
                at += 1;
                continue;
            }
            let controller = self.controllers.remove(at);
            let name = controller.spec().name.clone();
            let figures =
                DiskFigures::of(controller.queue_statuses().map(|(_, s)| s.stats.as_ref()));
            self.former.entry(controller.spec().bdev.clone()).or_default().add(&figures);
            self.latency_bases.remove(&name);
            if let Some(deletion) = self.deletions.remove(&name) {
                self.finished.push((deletion.token, Ok(Outcome::Done)));
            }
        }
        let late: Vec<String> = self
            .deletions
            .iter()
            .filter(|(_, d)| d.deadline <= now)
            .map(|(name, _)| name.clone())
            .collect();
        for name in late {
            if let Some(deletion) = self.deletions.remove(&name) {
                tracing::warn!(controller = %name, "still draining; the deletion goes on");
                self.finished.push((deletion.token, Ok(Outcome::Done)));
            }
        }
        let registry = &self.registry;
        let finished = &mut self.finished;
        self.bdev_deletions.retain(|(name, token)| {
            let gone = registry.get(name).is_err();
            if gone {
                finished.push((*token, Ok(Outcome::Done)));
            }
            !gone
        });
    }

    fn settle_moves(&mut self, now: Instant) {
        for (ticket, result) in self.controllers.iter_mut().flat_map(Controller::take_moved) {
            if let Some(one) = self.moves.remove(&ticket) {
                let result =
                    result.map(|()| Outcome::Done).map_err(|problem| failed(libc::EBUSY, problem));
                self.finished.push((one.token, result));
            }
        }
        let finished = &mut self.finished;
        self.moves.retain(|_, one| {
            if now < one.deadline {
                return true;
            }
            let text = format!(
                "controller {:?}: requests in flight have not come back yet; the move goes on",
                one.controller
            );
            tracing::warn!("{text}");
            finished.push((one.token, Err(failed(libc::ETIMEDOUT, text))));
            false
        });
    }

    /// When `settle` has something to notice by itself.
    #[must_use]
    pub fn timeout(&self, now: Instant) -> Option<Duration> {
        let deletions = self.deletions.values().map(|d| d.deadline);
        let moves = self.moves.values().map(|m| m.deadline);
        let nvme = self.nvme_deadline();
        deletions
            .chain(moves)
            .chain(nvme)
            .map(|deadline| deadline.saturating_duration_since(now))
            .min()
    }

    /// Begins to shut down: every controller lets its guests go.
    pub fn begin_shutdown(&mut self) {
        self.controllers.iter_mut().for_each(Controller::begin_delete);
        self.nvme_shut_down(Instant::now());
    }

    /// The disks whose requests have not come back.
    #[must_use]
    pub fn draining(&self) -> Vec<String> {
        self.controllers.iter().map(|c| c.spec().name.clone()).collect()
    }

    pub(super) fn controller(&self, name: &str) -> Result<&Controller, EngineError> {
        let found = self.controllers.iter().find(|c| c.spec().name == name);
        found.ok_or_else(|| EngineError::NoController(name.to_owned()))
    }

    fn disk(&self, name: &str) -> Result<&Disk, EngineError> {
        self.disks
            .iter()
            .find(|d| d.name == name)
            .ok_or_else(|| EngineError::NoBdev(name.to_owned()))
    }

    pub(super) fn add_disk(&mut self, disk: Disk) -> Result<(), EngineError> {
        self.registry.add(Arc::clone(&disk.bdev)).map_err(registry_error)?;
        self.former.remove(&disk.name);
        self.io_baselines.forget(&disk.name);
        self.disks.push(disk);
        Ok(())
    }

    pub(super) fn forget_figures(&mut self, name: &str) {
        self.histograms.remove(name);
    }

    /// A disk with so many device queues: with fewer than reactors each gets an owner, the next reactor in turn.
    fn with_queues(
        &mut self,
        bdev: Arc<dyn Bdev>,
        queues: u16,
    ) -> Result<Arc<dyn Bdev>, EngineError> {
        let (queues, reactors) = (usize::from(queues), self.reactors.len());
        if queues == 0 || queues >= reactors {
            return Ok(bdev);
        }
        let first = self.next_owner;
        let owners = (0..queues).map(|at| self.reactors[(first + at) % reactors].clone());
        let crossed = CrossBdev::new(bdev, owners.collect()).map_err(|e| bdev_error(&e))?;
        self.next_owner = (first + queues) % reactors;
        Ok(Arc::new(crossed))
    }

    /// Opens an image on a thread of its own.
    fn open_image(&mut self, spec: &BdevSpec, options: UringOptions, token: Token) -> Started {
        let name = spec.name.clone();
        let (cache, queues) = (options.cache, spec.device_queues);
        let job_name = name.clone();
        let job = move || -> Applied<DaemonEngine> {
            let opened = UringBdev::open_patiently(&name, &options, LOCK_PATIENCE);
            Box::new(move |engine: &mut DaemonEngine| {
                engine.opening.retain(|n| *n != name);
                let result = opened.map_err(|e| open_error(&e)).and_then(|bdev| {
                    let geometry = bdev.info().geometry().clone();
                    let image = ImageInfo {
                        path: options.filename.clone(),
                        cache: views::cache_mode(cache),
                        readonly: geometry.read_only,
                        lock: if geometry.read_only { "shared" } else { "exclusive" },
                        align_bytes: geometry.block_bytes,
                    };
                    let bdev = engine.with_queues(Arc::new(bdev), queues)?;
                    engine.add_disk(Disk {
                        name,
                        bdev,
                        kind: BdevKind::Uring,
                        null: None,
                        image: Some(image),
                        nvme: None,
                    })
                });
                engine.finished.push((token, result.map(|()| Outcome::Done)));
            })
        };
        self.jobs
            .start("open-image", job)
            .map_err(|e| failed(io_errno(&e), format!("cannot start a thread: {e}")))?;
        self.opening.push(job_name);
        Ok(Progress::Later)
    }

    /// The figures of a bdev over its present and former controllers.
    fn disk_figures(&self, bdev: &str) -> DiskFigures {
        let mut sum = self.former.get(bdev).cloned().unwrap_or_default();
        for controller in self.controllers.iter().filter(|c| c.spec().bdev == bdev) {
            sum.add(&DiskFigures::of(controller.queue_statuses().map(|(_, s)| s.stats.as_ref())));
        }
        sum
    }

    /// The stage tables of a controller since the last reset, as (queue, operation, stage, figures).
    fn stage_rows(&self, controller: &Controller) -> Vec<(u16, IoOp, Stage, LatencySnapshot)> {
        let base = self.latency_bases.get(&controller.spec().name);
        let mut rows = Vec::new();
        for (queue, status) in controller.queue_statuses() {
            for op in IoOp::ALL {
                let stats = status.stats.op(op);
                if stats.ops_count() == 0 {
                    continue;
                }
                for stage in Stage::ALL {
                    let mut snapshot = stats.stage(stage).snapshot();
                    if let Some(base) = base.and_then(|b| b.get(&(queue, op, stage as u8))) {
                        snapshot = snapshot.since(base);
                    }
                    if snapshot.count() > 0 {
                        rows.push((queue, op, stage, snapshot));
                    }
                }
            }
        }
        rows
    }

    fn filtered<'a>(
        &'a self,
        filter: &LatencyFilter<'_>,
    ) -> Result<Vec<&'a Controller>, EngineError> {
        if let Some(name) = filter.controller {
            self.controller(name)?;
        }
        if let Some(name) = filter.bdev {
            self.disk(name)?;
        }
        let wanted = |c: &&Controller| {
            filter.controller.is_none_or(|name| c.spec().name == name)
                && filter.bdev.is_none_or(|name| c.spec().bdev == name)
        };
        Ok(self.controllers.iter().filter(wanted).collect())
    }
}

impl Engine for DaemonEngine {
    fn tick_rate(&self) -> u64 {
        tick_rate()
    }

    fn ticks_now(&self) -> u64 {
        ticks_now()
    }

    fn bdevs(&self) -> Vec<BdevInfo> {
        let claimed: Vec<String> = self
            .registry
            .list()
            .into_iter()
            .filter(|(_, owner)| owner.is_some())
            .map(|(bdev, _)| bdev.info().name().to_owned())
            .collect();
        self.disks
            .iter()
            .map(|disk| {
                let nvme = self.nvme_bdev_info(disk);
                views::bdev_info(disk, claimed.contains(&disk.name), nvme)
            })
            .collect()
    }

    fn create_bdev(&mut self, spec: BdevSpec, token: Token) -> Started {
        self.registry.check_free(&spec.name).map_err(registry_error)?;
        if self.opening.contains(&spec.name) {
            return Err(registry_error(RegistryError::Exists(spec.name)));
        }
        let (name, uuid) = (spec.name.clone(), Some(spec.uuid));
        match &spec.backend {
            &BackendSpec::Null { block_size, blocks_count } => {
                let options = NullOptions { blocks_count, block_bytes: block_size, uuid };
                let null = Arc::new(NullBdev::new(&name, &options).map_err(|e| bdev_error(&e))?);
                let bdev = self.with_queues(Arc::<NullBdev>::clone(&null), spec.device_queues)?;
                self.add_disk(Disk {
                    name,
                    bdev,
                    kind: BdevKind::Null,
                    null: Some(null),
                    image: None,
                    nvme: None,
                })?;
            }
            &BackendSpec::Malloc { block_size, blocks_count } => {
                let options = MallocOptions { blocks_count, block_bytes: block_size, uuid };
                let bdev = MallocBdev::new(&name, &options).map_err(|e| bdev_error(&e))?;
                let bdev = self.with_queues(Arc::new(bdev), spec.device_queues)?;
                self.add_disk(Disk {
                    name,
                    bdev,
                    kind: BdevKind::Malloc,
                    null: None,
                    image: None,
                    nvme: None,
                })?;
            }
            BackendSpec::Uring { .. } => {
                let Some(options) = views::image_options(&spec) else { return Ok(Progress::Done) };
                return self.open_image(&spec, options, token);
            }
        }
        Ok(Progress::Done)
    }

    fn delete_bdev(&mut self, name: &str, token: Token) -> Started {
        let removed = self.registry.remove(name).map_err(registry_error)?;
        self.disks.retain(|d| d.name != name);
        self.forget_figures(name);
        if removed.is_some() {
            return Ok(Progress::Done);
        }
        self.bdev_deletions.push((name.to_owned(), token));
        Ok(Progress::Later)
    }

    fn resize_bdev(&mut self, name: &str, size: Resize, token: Token) -> Started {
        let disk = self.disk(name)?;
        match (size, &disk.null) {
            (Resize::ToBytes(bytes), Some(null)) => {
                let blocks = bytes / u64::from(disk.bdev.info().geometry().block_bytes);
                null.set_size(blocks).map_err(|e| bdev_error(&e))?;
            }
            (Resize::ToBytes(_), None) => {
                return Err(EngineError::Refused(format!(
                    "bdev {name:?} is not a null bdev; resize its file instead"
                )));
            }
            (Resize::Rescan, _) => {}
        }
        let (bdev, name) = (Arc::clone(&disk.bdev), name.to_owned());
        let job = move || -> Applied<DaemonEngine> {
            let blocks = bdev.rescan();
            Box::new(move |engine: &mut DaemonEngine| {
                let result = blocks.map_err(|e| bdev_error(&e)).and_then(|blocks| {
                    if blocks == 0 {
                        return Err(failed(
                            libc::EINVAL,
                            format!("bdev {name:?}: the file is empty now; size unchanged"),
                        ));
                    }
                    // Deleted meanwhile, perhaps with a successor of the same name: not that one's size.
                    let now = engine.registry.get(&name).map_err(registry_error)?;
                    if !Arc::ptr_eq(&now, &bdev) {
                        return Err(EngineError::NoBdev(name.clone()));
                    }
                    engine.registry.resize(&name, blocks).map(drop).map_err(registry_error)
                });
                engine.finished.push((token, result.map(|()| Outcome::Done)));
            })
        };
        self.jobs
            .start("rescan", job)
            .map_err(|e| failed(io_errno(&e), format!("cannot start a thread: {e}")))?;
        Ok(Progress::Later)
    }

    fn io_stats(
        &mut self,
        names: &[String],
        per_channel: bool,
        reset: ResetMode,
    ) -> Result<Vec<IoStats>, EngineError> {
        let wanted: Vec<String> = if names.is_empty() {
            self.disks.iter().map(|d| d.name.clone()).collect()
        } else {
            names.iter().map(|n| self.disk(n).map(|d| d.name.clone())).collect::<Result<_, _>>()?
        };
        let mut rows = Vec::new();
        for name in wanted {
            let figures = self.disk_figures(&name);
            if per_channel {
                for (number, reactor) in (1u64..).zip(&self.reactors) {
                    let core = reactor.core().map(|c| c.0);
                    let queues =
                        self.controllers.iter().filter(|c| c.spec().bdev == name).flat_map(|c| {
                            c.sessions()
                                .into_iter()
                                .flat_map(|s| s.queues)
                                .filter(move |q| q.core == core)
                        });
                    let queues: Vec<_> = queues.map(|q| q.status).collect();
                    let figures = DiskFigures::of(queues.iter().map(|s| s.stats.as_ref()));
                    rows.push(figures.to_io_stats(&name, Some(number)));
                }
            } else {
                rows.push(self.io_baselines.apply(&name, &figures, None));
            }
            self.io_baselines.reset(&name, figures, reset);
        }
        Ok(rows)
    }

    fn enable_histogram(
        &mut self,
        name: &str,
        enable: bool,
        op: Option<&str>,
    ) -> Result<(), EngineError> {
        self.disk(name)?;
        let only = match op {
            None => None,
            Some(text) => Some(views::io_op(text).ok_or_else(|| {
                EngineError::Refused(format!("opc {text:?} is not an operation; use read, write, flush, unmap or write_zeroes"))
            })?),
        };
        if enable {
            let figures = self.disk_figures(name);
            self.histograms.insert(name.to_owned(), (only, figures));
        } else {
            self.histograms.remove(name);
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str) -> Result<Histogram<u64>, EngineError> {
        self.disk(name)?;
        let (only, base) = self.histograms.get(name).ok_or_else(|| {
            failed(
                libc::EFAULT,
                format!("bdev {name:?} has no histogram; call bdev_enable_histogram first"),
            )
        })?;
        Ok(self.disk_figures(name).since(base).total_latency(*only).to_histogram())
    }

    fn controllers(&self) -> Vec<ControllerInfo> {
        self.controllers.iter().map(views::controller_info).collect()
    }

    fn create_controller(&mut self, spec: ControllerSpec, _token: Token) -> Started {
        if self.controllers.iter().any(|c| c.spec().name == spec.name) {
            let message = format!(
                "controller {:?} exists already; choose another name or delete it first",
                spec.name
            );
            return Err(EngineError::Refused(message));
        }
        let reactors = views::choose_reactors(&self.reactors, spec.cores.as_deref())?;
        let glue = GlueSpec {
            socket: self.sockets.dir.join(&spec.name),
            name: spec.name,
            bdev: spec.bdev,
            socket_mode: self.sockets.mode,
            socket_group: self.sockets.group,
            read_only: spec.readonly,
            serial: spec.serial,
            queues_max: spec.queues_max.unwrap_or(QUEUES_DEFAULT),
            // The kernel's devices work with unpinned memory, which stays right whatever the guest's balloon does.
            pin: match spec.pin {
                PinMode::On => true,
                PinMode::Auto | PinMode::Off => false,
            },
        };
        let number = self.next_controller;
        let controller = Controller::new(number, glue, &self.registry, reactors, &self.events)
            .map_err(controller_error)?;
        self.next_controller += 1;
        self.controllers.push(controller);
        Ok(Progress::Done)
    }

    fn delete_controller(&mut self, name: &str, token: Token) -> Started {
        let missing = || EngineError::NoController(name.to_owned());
        let found = self.controllers.iter_mut().find(|c| c.spec().name == name);
        let controller =
            found.filter(|c| c.state() == ControllerState::Active).ok_or_else(missing)?;
        controller.begin_delete();
        let deadline = Instant::now() + DELETE_ANSWER_MAX;
        self.deletions.insert(name.to_owned(), Deletion { token, deadline });
        Ok(Progress::Later)
    }

    fn place_controller(
        &mut self,
        name: &str,
        cores: &[u32],
        queue: Option<u16>,
        token: Token,
    ) -> Started {
        let reactors = views::choose_reactors(&self.reactors, Some(cores))?;
        let found = self.controllers.iter_mut().find(|c| c.spec().name == name);
        let controller = found.ok_or_else(|| EngineError::NoController(name.to_owned()))?;
        let ticket = self.next_move;
        controller.place(ticket, reactors, queue).map_err(controller_error)?;
        self.next_move += 1;
        let deadline = Instant::now() + MOVE_ANSWER_MAX;
        self.moves.insert(ticket, Move { controller: name.to_owned(), token, deadline });
        Ok(Progress::Later)
    }

    fn set_coalescing(
        &mut self,
        name: &str,
        delay_base_us: u32,
        iops_threshold: u32,
    ) -> Result<(), EngineError> {
        self.controller(name)?.device().coalesce().set(delay_base_us, iops_threshold);
        Ok(())
    }

    fn reactors(&self) -> Vec<ReactorInfo> {
        (1u64..)
            .zip(&self.reactors)
            .map(|(number, r)| views::reactor_info(number, r, self.started))
            .collect()
    }

    fn set_idle(&mut self, policy: IdlePolicy, spin_us: Option<u32>) -> Result<(), EngineError> {
        let spin_us = spin_us.unwrap_or(self.idle.1);
        self.idle = (policy, spin_us);
        for reactor in &self.reactors {
            reactor.set_idle(match policy {
                IdlePolicy::Poll => reactor::IdlePolicy::Poll,
                IdlePolicy::Adaptive => {
                    reactor::IdlePolicy::Adaptive { spin_ns: u64::from(spin_us) * 1000 }
                }
            });
        }
        Ok(())
    }

    fn idle(&self) -> (IdlePolicy, u32) {
        self.idle
    }

    fn latencies(&mut self, filter: LatencyFilter<'_>) -> Result<Vec<LatencyRow>, EngineError> {
        let mut rows = Vec::new();
        for controller in self.filtered(&filter)? {
            for (queue, op, stage, snapshot) in self.stage_rows(controller) {
                rows.push(LatencyRow {
                    controller: controller.spec().name.clone(),
                    bdev: controller.spec().bdev.clone(),
                    queue,
                    op: op.name(),
                    stage: stage.name(),
                    histogram: snapshot.to_histogram(),
                });
            }
        }
        Ok(rows)
    }

    fn set_recording(
        &mut self,
        filter: LatencyFilter<'_>,
        enable: bool,
    ) -> Result<(), EngineError> {
        for controller in self.filtered(&filter)? {
            controller.set_recording(enable);
        }
        Ok(())
    }

    fn reset_latencies(&mut self, filter: LatencyFilter<'_>) -> Result<(), EngineError> {
        let mut bases = Vec::new();
        for controller in self.filtered(&filter)? {
            let mut base = LatencyBase::new();
            for (queue, status) in controller.queue_statuses() {
                for op in IoOp::ALL {
                    let stats = status.stats.op(op);
                    if stats.ops_count() > 0 {
                        base.extend(
                            Stage::ALL.map(|s| ((queue, op, s as u8), stats.stage(s).snapshot())),
                        );
                    }
                }
            }
            bases.push((controller.spec().name.clone(), base));
        }
        self.latency_bases.extend(bases);
        Ok(())
    }

    fn kill(&mut self, signal: i32) -> Result<(), EngineError> {
        match signal {
            // As from the kernel: a lost terminal changes nothing.
            libc::SIGHUP => {}
            libc::SIGKILL => {
                use rustix::process::{Signal, getpid, kill_process};
                kill_process(getpid(), Signal::KILL)
                    .map_err(|e| failed(e.raw_os_error(), e.to_string()))?;
            }
            _ => self.stop_signal = Some(signal),
        }
        Ok(())
    }

    fn set_log_level(&mut self, level: LogLevel) -> Result<(), EngineError> {
        self.log.set_level(level);
        Ok(())
    }

    fn log_level(&self) -> LogLevel {
        self.log.level()
    }
}
