//! From options to a report: connects, lays out memory, starts rings, runs the load, stops.
//!
//! Owner: the load's thread. **Invariant:** when this returns, well or not, no server holds a ring of ours that it could
//! still write to memory that is used for something else.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringmill_core::bdev::Bdev;
use ringmill_core::limits::{NVME_QUEUE_ENTRIES_MAX, SECTOR_BYTES};
use ringmill_core::units::bytes_u64;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::nvme::{self, NvmeControl, NvmeOptions};
use ringmill_drivers::uring::{UringBdev, UringOptions};
use ringmill_drivers::vfio::VfioDevice;
use ringmill_drivers::vfio_user::VfioUserBacking;
use ringmill_vmm_glue::vhost_user::message::MemoryRegion;
use rustix::event::{EventfdFlags, eventfd};

use super::PerfError;
use super::args::{BdevChoice, Cli, PassChoice, Work, ns};
use super::bar::Bar;
use super::bdev::{BdevPort, Owner};
use super::engine::{Io, Lane, Plan, Progress, Workload, run};
use super::floor::{BareDevice, Floor};
use super::frontend::{Frontend, RingPlace};
use super::job::{Job, Target};
use super::layout::QueueLayout;
use super::memory::LoadMemory;
use super::packed::PackedRing;
use super::pattern::{LanePattern, Order, Pattern, Stream, read_threshold};
use super::port::Port;
use super::report::{DiskReport, Group, Part, Report, VerifyReport};
use super::ring::DriverRing;
use super::slots::Op;
use super::split::SplitRing;
use super::verify::{FlushAll, Pass, Verify, VerifyOptions};
use super::vhost::VhostPort;

/// Of verify without `--span`: its table of generations takes 4 bytes per block.
const VERIFY_SPAN_MAX: u64 = 1 << 30;
/// A null bdev or bare loop: any size would do.
const NULL_BYTES: u64 = 1 << 30;
const BDEV_BLOCK_BYTES: u32 = 512;
/// How long an image may be locked by a predecessor that is about to end.
const OPEN_PATIENCE: Duration = Duration::from_secs(2);

/// What is loaded.
struct Disk {
    name: String,
    size_bytes: u64,
    span_bytes: u64,
    flush: bool,
    job: Job,
}

impl Disk {
    /// Checks that the load fits.
    fn new(
        cli: &Cli,
        job: Job,
        name: String,
        size_bytes: u64,
        block_bytes: u32,
        flush: bool,
    ) -> Result<Disk, PerfError> {
        let wrong = |text: String| Err(PerfError::Options(format!("{name}: {text}")));
        let io_bytes = u64::from(job.io_size);
        let size_bytes = if size_bytes == 0 { cli.span.unwrap_or(0) } else { size_bytes };
        if size_bytes == 0 {
            return wrong("the server does not say how large the disk is; give --span".into());
        }
        if cli.span.is_some_and(|span| span > size_bytes) {
            return wrong(format!("--span is larger than the disk, which has {size_bytes} bytes"));
        }
        let mut span_bytes = cli.span.unwrap_or(size_bytes);
        if cli.workload == Work::Verify && cli.span.is_none() {
            span_bytes = span_bytes.min(VERIFY_SPAN_MAX);
        }
        span_bytes -= span_bytes % io_bytes;
        if span_bytes == 0 {
            return wrong(format!(
                "the part to use is smaller than one request of {io_bytes} bytes"
            ));
        }
        if !io_bytes.is_multiple_of(u64::from(block_bytes)) && cli.workload != Work::Verify {
            eprintln!(
                "{name}: its blocks have {block_bytes} bytes; requests of {io_bytes} may cost it a read-modify-write"
            );
        }
        let inflight = u64::from(job.depth) * u64::from(job.queues);
        if cli.workload == Work::Verify && span_bytes / io_bytes < inflight {
            let blocks = span_bytes / io_bytes;
            return wrong(format!(
                "verify with {inflight} requests in flight needs more than {blocks} blocks"
            ));
        }
        Ok(Disk { name, size_bytes, span_bytes, flush, job })
    }

    fn blocks_count(&self) -> u64 {
        self.span_bytes / u64::from(self.job.io_size)
    }
}

/// Runs what the options say.
pub(super) fn drive(
    cli: &Cli,
    owner: Option<Owner>,
    stop: &Arc<AtomicBool>,
) -> Result<Report, PerfError> {
    match (&cli.bdev, cli.floor) {
        (Some(choice), _) => drive_bdev(cli, choice, owner, stop),
        (None, Some(core)) if cli.packed => drive_floor(cli, core, PackedRing::new, stop),
        (None, Some(core)) => drive_floor(cli, core, SplitRing::new, stop),
        (None, None) if cli.packed => drive_sockets(cli, PackedRing::new, stop),
        (None, None) => drive_sockets(cli, SplitRing::new, stop),
    }
}

/// Makes a ring in memory at an offset.
type MakeRing<R> = fn(&LoadMemory, &QueueLayout, usize) -> R;

fn layout_of(cli: &Cli, job: Job) -> Result<QueueLayout, PerfError> {
    QueueLayout::new(cli.form(), job.depth, job.io_size).ok_or_else(|| {
        PerfError::Options(format!(
            "depth {} needs more descriptors than a ring has (32768); use --indirect or more queues",
            job.depth
        ))
    })
}

fn new_eventfd() -> Result<OwnedFd, PerfError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| PerfError::Options(format!("cannot make an eventfd: {errno}")))
}

fn memory_text(memory: &LoadMemory) -> String {
    format!("buffers in {} pages", crate::config::size::format(memory.page_bytes()))
}

/// Connects, and looks whether the disk can do what is asked.
fn connect(cli: &Cli, target: &Target) -> Result<(Frontend, Disk), PerfError> {
    let job = target.job(cli);
    let frontend = Frontend::connect(&target.path, cli.form())?;
    let facts = frontend.facts();
    let name = frontend.path().to_owned();
    let refused = |reason: String| PerfError::Refused { socket: name.clone(), reason };
    let writes = job.workload.writes() && !target.idle;
    if facts.read_only && writes && cli.pass != PassChoice::Check {
        return Err(refused("the disk is read-only; use read or randread".into()));
    }
    if job.queues > facts.queues_count {
        let offered = facts.queues_count;
        return Err(refused(format!("the disk has {offered} queues, not {}", job.queues)));
    }
    let disk =
        Disk::new(cli, job, name.clone(), facts.capacity_bytes, facts.block_bytes, facts.flush)?;
    Ok((frontend, disk))
}

/// Shows a disk its part of the memory and starts its rings there; the rings' kick descriptors.
fn start_rings(
    frontend: &mut Frontend,
    memory: &LoadMemory,
    layout: &QueueLayout,
    area: usize,
    queues: usize,
) -> Result<Vec<OwnedFd>, PerfError> {
    let len_bytes = layout.len_bytes * queues;
    let region = MemoryRegion {
        guest_addr: memory.guest_addr(bytes_u64(area)),
        len_bytes: bytes_u64(len_bytes).next_multiple_of(memory.page_bytes()),
        user_addr: memory.user_addr(bytes_u64(area)),
        mmap_offset: bytes_u64(area),
    };
    frontend.share(memory.file().as_fd(), &region)?;
    let mut kicks = Vec::new();
    for queue in 0..queues {
        let base = area + queue * layout.len_bytes;
        let user = |at: usize| memory.user_addr(bytes_u64(base + at));
        let place = RingPlace {
            size: layout.size,
            packed: layout.form.packed,
            desc: user(layout.desc_at),
            driver: user(layout.driver_at),
            device: user(layout.device_at),
        };
        let (kick, call) = (new_eventfd()?, new_eventfd()?);
        frontend.start_ring(&place, kick.as_fd(), call.as_fd())?;
        kicks.push(kick);
    }
    Ok(kicks)
}

/// Disks that are connected and have rings, and get no request.
struct IdleDisks {
    frontends: Vec<Frontend>,
    _memory: Option<LoadMemory>,
}

impl IdleDisks {
    fn start<R: DriverRing>(cli: &Cli, make: MakeRing<R>) -> Result<IdleDisks, PerfError> {
        let targets: Vec<&Target> = cli.sockets.iter().filter(|target| target.idle).collect();
        if targets.is_empty() {
            return Ok(IdleDisks { frontends: Vec::new(), _memory: None });
        }
        // Nothing is read: a buffer of the least size will do.
        let layout_of = |target: &Target| {
            layout_of(cli, Job { depth: 1, io_size: SECTOR_BYTES, ..target.job(cli) })
        };
        let mut len_bytes = 0;
        for target in &targets {
            len_bytes += layout_of(target)?.len_bytes * usize::from(target.job(cli).queues);
        }
        let memory = LoadMemory::small(bytes_u64(len_bytes))?;
        let (mut frontends, mut area) = (Vec::new(), 0);
        for target in targets {
            let (mut frontend, disk) = connect(cli, target)?;
            let layout = layout_of(target)?;
            let queues = usize::from(disk.job.queues);
            for queue in 0..queues {
                // Writes what a driver writes into a fresh ring: that it wants no interrupts.
                make(&memory, &layout, area + queue * layout.len_bytes);
            }
            start_rings(&mut frontend, &memory, &layout, area, queues)?;
            area += layout.len_bytes * queues;
            frontends.push(frontend);
        }
        Ok(IdleDisks { frontends, _memory: Some(memory) })
    }
}

fn drive_sockets<R: DriverRing>(
    cli: &Cli,
    make: MakeRing<R>,
    stop: &Arc<AtomicBool>,
) -> Result<Report, PerfError> {
    let mut idle = IdleDisks::start(cli, make)?;
    let (mut frontends, mut disks, mut areas) = (Vec::new(), Vec::new(), Vec::new());
    // A disk sees its own part of the memory file only; parts are whole pages of the kind that the file has.
    let page = |bytes: usize| bytes.next_multiple_of(2 << 20);
    let mut len_bytes = 0;
    for target in cli.sockets.iter().filter(|target| !target.idle) {
        let (frontend, disk) = connect(cli, target)?;
        let layout = layout_of(cli, disk.job)?;
        areas.push((len_bytes, layout));
        len_bytes += page(layout.len_bytes * usize::from(disk.job.queues));
        frontends.push(frontend);
        disks.push(disk);
    }
    let memory = LoadMemory::new(bytes_u64(len_bytes))?;
    let groups = groups_of(&disks);
    let (mut lanes, mut disk_of_lane) = (Vec::new(), Vec::new());
    for (number, (frontend, disk)) in frontends.iter_mut().zip(&disks).enumerate() {
        let (area, layout) = areas[number];
        let queues = usize::from(disk.job.queues);
        let rings: Vec<R> =
            (0..queues).map(|q| make(&memory, &layout, area + q * layout.len_bytes)).collect();
        let kicks = start_rings(frontend, &memory, &layout, area, queues)?;
        for (queue, (ring, kick)) in rings.into_iter().zip(kicks).enumerate() {
            let name = format!("{} queue {queue}", frontend.path());
            let port = VhostPort::new(ring, disk.job.depth, kick, name);
            lanes.push(Lane::new(port, lanes.len(), group_of(&groups, disk)));
            disk_of_lane.push(number);
        }
    }
    let closed = |f: &&Frontend| f.is_closed();
    let is_closed = || {
        let gone = frontends.iter().chain(&idle.frontends).find(closed);
        gone.map(|f| f.path().to_owned())
    };
    let mut report = load(cli, &mut lanes, &disks, &disk_of_lane, stop, &is_closed)?;
    report.memory = memory_text(&memory);
    report.idle_count = idle.frontends.len();
    for frontend in frontends.iter_mut().chain(&mut idle.frontends) {
        frontend.stop_rings()?;
    }
    Ok(report)
}

/// The different loads among the disks, each with its first disk's name.
fn groups_of(disks: &[Disk]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for disk in disks {
        match groups.iter_mut().find(|group| group.job == disk.job) {
            Some(group) => group.disks_count += 1,
            None => {
                groups.push(Group { name: disk.name.clone(), job: disk.job, disks_count: 1 });
            }
        }
    }
    groups
}

fn group_of(groups: &[Group], disk: &Disk) -> usize {
    groups.iter().position(|group| group.job == disk.job).unwrap_or(0)
}

fn drive_floor<R: DriverRing>(
    cli: &Cli,
    core: u32,
    make: MakeRing<R>,
    stop: &Arc<AtomicBool>,
) -> Result<Report, PerfError> {
    let job = Job::of(cli);
    let layout = layout_of(cli, job)?;
    let queues = usize::from(cli.queues);
    let memory = LoadMemory::new(bytes_u64(layout.len_bytes * queues))?;
    let disk = Disk::new(cli, job, "bare loop".into(), NULL_BYTES, BDEV_BLOCK_BYTES, false)?;
    let (mut lanes, mut devices) = (Vec::new(), Vec::new());
    for queue in 0..queues {
        let base = queue * layout.len_bytes;
        let ring = make(&memory, &layout, base);
        devices.push(BareDevice::new(&memory, &layout, base));
        let port = VhostPort::new(ring, cli.depth, new_eventfd()?, format!("bare queue {queue}"));
        lanes.push(Lane::new(port, queue, 0));
    }
    let _floor = Floor::start(devices, core)
        .map_err(|error| PerfError::Options(format!("cannot start a thread: {error}")))?;
    let disk_of_lane = vec![0; queues];
    let mut report = load(cli, &mut lanes, &[disk], &disk_of_lane, stop, &|| None)?;
    report.memory = memory_text(&memory);
    Ok(report)
}

/// A bdev, and the controller that it lives on, which is let go of last.
type Opened = (Arc<dyn Bdev>, Option<Controller>);

/// Detached when dropped.
struct Controller(Arc<dyn NvmeControl>);

impl Drop for Controller {
    fn drop(&mut self) {
        self.0.detach();
    }
}

/// Attaches a controller for this thread alone and finds the namespace.
fn open_nvme(device: &str, nsid: u32, cli: &Cli) -> Result<Opened, PerfError> {
    let failed = |error: &dyn std::fmt::Display| PerfError::Bdev(error.to_string());
    let options = NvmeOptions {
        name: "nvme".to_owned(),
        num_io_queues: 1,
        io_queue_size: cli.depth.saturating_add(1).clamp(128, NVME_QUEUE_ENTRIES_MAX),
        ..NvmeOptions::default()
    };
    // What happens to the controller shows in the requests.
    let events = Arc::new(|_| ());
    let control = if device.contains('/') {
        let backing = VfioUserBacking::connect(Path::new(device)).map_err(|e| failed(&e))?;
        nvme::attach(backing, options, &[], events)
    } else {
        let backing = VfioDevice::open(device).map_err(|e| failed(&e))?;
        nvme::attach(backing, options, &[], events)
    };
    let control = Controller(control.map_err(|e| failed(&e))?);
    let namespaces = control.0.namespaces();
    let found = namespaces.iter().find(|one| nsid == 0 || one.info.nsid == nsid);
    let found = found.ok_or_else(|| {
        failed(&match nsid {
            0 => format!("{device} has no namespace"),
            _ => format!("{device} has no namespace {nsid}"),
        })
    })?;
    match (&found.bdev, &found.info.refused) {
        (Some(bdev), _) => Ok((Arc::clone(bdev), Some(control))),
        (None, reason) => Err(failed(&reason.clone().unwrap_or_default())),
    }
}

fn open_bdev(choice: &BdevChoice, cli: &Cli) -> Result<Opened, PerfError> {
    let failed = |error: &dyn std::fmt::Display| PerfError::Bdev(error.to_string());
    let (block_bytes, uuid) = (BDEV_BLOCK_BYTES, None);
    let blocks = |bytes: u64| bytes / u64::from(block_bytes);
    let bdev: Arc<dyn Bdev> = match choice {
        BdevChoice::Nvme(device, nsid) => return open_nvme(device, *nsid, cli),
        BdevChoice::Null => {
            let options = NullOptions { blocks_count: blocks(NULL_BYTES), block_bytes, uuid };
            Arc::new(NullBdev::new("null", &options).map_err(|e| failed(&e))?)
        }
        BdevChoice::Malloc(bytes) => {
            let options = MallocOptions { blocks_count: blocks(*bytes), block_bytes, uuid };
            Arc::new(MallocBdev::new("malloc", &options).map_err(|e| failed(&e))?)
        }
        BdevChoice::File(path) => {
            let options = UringOptions { filename: path.clone(), ..UringOptions::default() };
            let bdev = UringBdev::open_patiently("file", &options, OPEN_PATIENCE);
            Arc::new(bdev.map_err(|e| failed(&e))?)
        }
    };
    Ok((bdev, None))
}

fn drive_bdev(
    cli: &Cli,
    choice: &BdevChoice,
    mut owner: Option<Owner>,
    stop: &Arc<AtomicBool>,
) -> Result<Report, PerfError> {
    let (mut bdev, _controller) = open_bdev(choice, cli)?;
    if let Some(owner) = &mut owner {
        bdev = owner.own(bdev)?;
    }
    let info = Arc::clone(bdev.info());
    let geometry = info.geometry();
    let name = match choice {
        BdevChoice::Null | BdevChoice::Malloc(_) => info.product_name().to_owned(),
        BdevChoice::File(path) => path.display().to_string(),
        BdevChoice::Nvme(device, _) => device.clone(),
    };
    let job = Job::of(cli);
    let disk = Disk::new(cli, job, name, info.size_bytes(), geometry.block_bytes, true)?;
    let port = BdevPort::open(bdev, cli.depth, cli.io_size)?;
    let memory = port.memory_text();
    let mut lanes = [Lane::new(port, 0, 0)];
    let disks = [disk];
    if matches!(choice, BdevChoice::Malloc(_)) && cli.workload != Work::Verify {
        // A RAM disk's memory comes into being when it is touched first: that is not what is measured.
        let blocks_count = disks[0].blocks_count();
        touch(cli, &mut lanes, blocks_count)?;
    }
    let mut report = load(cli, &mut lanes, &disks, &[0], stop, &|| None)?;
    report.memory = memory;
    if let Some(owner) = &owner {
        report.memory = format!("{}; {}", report.memory, owner.text());
    }
    Ok(report)
}

/// Writes every block once.
fn touch<P: Port>(cli: &Cli, lanes: &mut [Lane<P>], blocks_count: u64) -> Result<(), PerfError> {
    struct Touch {
        next: u64,
        blocks_count: u64,
        io_bytes: u64,
    }
    impl Workload for Touch {
        const TOUCHES_DATA: bool = false;

        fn next(&mut self, _lane: usize) -> Option<Io> {
            let block = self.next;
            self.next = (block + 1).min(self.blocks_count);
            let io = Io { op: Op::Write, offset_bytes: block * self.io_bytes };
            (block < self.blocks_count).then_some(io)
        }

        fn is_over(&self) -> bool {
            self.next >= self.blocks_count
        }
    }
    let mut work = Touch { next: 0, blocks_count, io_bytes: u64::from(cli.io_size) };
    run(lanes, &mut work, &sweep(cli), &mut |_| Ok(true)).map(drop)
}

/// A plan without an end of its own.
fn sweep(cli: &Cli) -> Plan {
    Plan { ramp_ns: 0, duration_ns: 0, rate: None, hang_ns: ns(cli.timeout) }
}

/// Names a server that has hung up.
type IsClosed<'a> = dyn Fn() -> Option<String> + 'a;

/// What is to be asked during a load: whether to stop, whether a server is gone.
struct Watcher<'a> {
    stop: &'a AtomicBool,
    is_closed: &'a IsClosed<'a>,
}

impl Watcher<'_> {
    fn look(&self) -> Result<bool, PerfError> {
        match (self.is_closed)() {
            Some(socket) => Err(PerfError::Closed { socket }),
            None => Ok(!self.stop.load(Ordering::Relaxed)),
        }
    }
}

fn load<P: Port>(
    cli: &Cli,
    lanes: &mut [Lane<P>],
    disks: &[Disk],
    disk_of_lane: &[usize],
    stop: &AtomicBool,
    is_closed: &IsClosed<'_>,
) -> Result<Report, PerfError> {
    let watcher = Watcher { stop, is_closed };
    let (parts, main, verify) = if cli.workload == Work::Verify {
        verify_passes(cli, lanes, disks, disk_of_lane, &watcher)?
    } else {
        (vec![pattern_load(cli, lanes, disks, disk_of_lane, &watcher)?], 0, None)
    };
    let groups = groups_of(disks);
    let disks = disks.iter().enumerate().map(|(number, disk)| DiskReport {
        name: disk.name.clone(),
        size_bytes: disk.size_bytes,
        span_bytes: disk.span_bytes,
        job: group_of(&groups, disk),
        queues: lanes
            .iter()
            .zip(disk_of_lane)
            .filter(|(_, of)| **of == number)
            .map(|(lane, _)| lane.measured_count)
            .collect(),
    });
    let disks = disks.collect();
    let (memory, idle_count) = (String::new(), 0);
    Ok(Report { groups, disks, parts, main, verify, memory, idle_count })
}

fn pattern_load<P: Port>(
    cli: &Cli,
    lanes: &mut [Lane<P>],
    disks: &[Disk],
    disk_of_lane: &[usize],
    watcher: &Watcher<'_>,
) -> Result<Part, PerfError> {
    let mut queue_of_disk = vec![0u64; disks.len()];
    let patterns = (0u64..).zip(disk_of_lane).map(|(lane, &number)| {
        let disk = &disks[number];
        let job = disk.job;
        let (order, read_percent) = match job.workload {
            Work::Read => (Order::Sequential, 100),
            Work::Write => (Order::Sequential, 0),
            Work::Randread => (Order::Random, 100),
            Work::Randwrite => (Order::Random, 0),
            Work::Randrw | Work::Verify => (Order::Random, job.read_percent),
        };
        let first = disk.blocks_count() / u64::from(job.queues) * queue_of_disk[number];
        queue_of_disk[number] += 1;
        LanePattern {
            order,
            io_bytes: u64::from(job.io_size),
            read_threshold: read_threshold(read_percent),
            stream: Stream::new(cli.seed, lane, disk.blocks_count(), first),
        }
    });
    let mut work = Pattern { lanes: patterns.collect() };
    let plan = Plan {
        ramp_ns: ns(cli.ramp),
        duration_ns: ns(cli.time),
        rate: cli.rate,
        hang_ns: ns(cli.timeout),
    };
    let bar = Bar::new(cli, cli.workload.name());
    let mut watch = |progress: Progress| {
        bar.show_time(progress, plan.ramp_ns + plan.duration_ns);
        watcher.look()
    };
    let outcome = run(lanes, &mut work, &plan, &mut watch)?;
    Ok(Part { name: "load", outcome })
}

type Passes = (Vec<Part>, usize, Option<VerifyReport>);

fn verify_passes<P: Port>(
    cli: &Cli,
    lanes: &mut [Lane<P>],
    disks: &[Disk],
    disk_of_lane: &[usize],
    watcher: &Watcher<'_>,
) -> Result<Passes, PerfError> {
    let passes: &[Pass] = match cli.pass {
        PassChoice::All => &[Pass::Fill, Pass::Mix, Pass::Check],
        PassChoice::Fill => &[Pass::Fill],
        PassChoice::Check => &[Pass::Check],
    };
    let mut work = Verify::new(VerifyOptions {
        seed: cli.seed,
        io_bytes: cli.io_size,
        read_threshold: read_threshold(cli.read_percent),
        blocks_counts: disks.iter().map(|disk| disk.blocks_count()).collect(),
        disk_of_lane: disk_of_lane.to_vec(),
    });
    let (mut parts, mut main) = (Vec::new(), 0);
    for &pass in passes {
        work.start(pass);
        let mut plan = sweep(cli);
        if pass == Pass::Mix {
            plan.duration_ns = ns(cli.time);
            plan.rate = cli.rate;
            main = parts.len();
        }
        let bar = Bar::new(cli, pass.name());
        let mut watch = |progress: Progress| {
            if pass == Pass::Mix {
                bar.show_time(progress, plan.duration_ns);
            } else {
                bar.show_count(
                    progress.finished_count,
                    disks.iter().map(|d| d.blocks_count()).sum(),
                );
            }
            watcher.look()
        };
        let outcome = run(lanes, &mut work, &plan, &mut watch)?;
        parts.push(Part { name: pass.name(), outcome });
        if pass != Pass::Check && disks.iter().any(|disk| disk.flush) {
            let first = |lane: &usize| *lane == 0 || disk_of_lane[*lane - 1] != disk_of_lane[*lane];
            let owed = (0..lanes.len()).map(|l| first(&l) && disks[disk_of_lane[l]].flush);
            let mut flush = FlushAll { owed: owed.collect() };
            let outcome = run(lanes, &mut flush, &sweep(cli), &mut |_| watcher.look())?;
            parts.push(Part { name: "flush", outcome });
        }
        if watcher.stop.load(Ordering::Relaxed) {
            return Err(PerfError::Options("stopped before everything was verified".into()));
        }
    }
    let report = VerifyReport {
        sectors_checked: work.checked_count,
        faults_count: work.faults_count,
        faults: work.faults,
    };
    Ok((parts, main, Some(report)))
}
