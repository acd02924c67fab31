//! From options to a report: connects, lays out memory, starts rings, runs the load, stops.
//!
//! Owner: the load's thread. **Invariant:** when this returns, well or not, no server holds a ring of ours that it could
//! still write to memory that is used for something else.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringmill_core::bdev::Bdev;
use ringmill_core::units::bytes_u64;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::{UringBdev, UringOptions};
use ringmill_vmm_glue::vhost_user::message::MemoryRegion;
use rustix::event::{EventfdFlags, eventfd};

use super::PerfError;
use super::args::{BdevChoice, Cli, PassChoice, Work, ns};
use super::bar::Bar;
use super::bdev::BdevPort;
use super::engine::{Io, Lane, Plan, Progress, Workload, run};
use super::floor::{BareDevice, Floor};
use super::frontend::{Frontend, RingPlace};
use super::layout::QueueLayout;
use super::memory::LoadMemory;
use super::packed::PackedRing;
use super::pattern::{Order, Pattern, Stream, read_threshold};
use super::port::Port;
use super::report::{DiskReport, Part, Report, VerifyReport};
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
}

impl Disk {
    /// Checks that the load fits.
    fn new(
        cli: &Cli,
        name: String,
        size_bytes: u64,
        block_bytes: u32,
        flush: bool,
    ) -> Result<Disk, PerfError> {
        let wrong = |text: String| Err(PerfError::Options(format!("{name}: {text}")));
        let io_bytes = u64::from(cli.io_size);
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
        let inflight = u64::from(cli.depth) * u64::from(cli.queues);
        if cli.workload == Work::Verify && span_bytes / io_bytes < inflight {
            let blocks = span_bytes / io_bytes;
            return wrong(format!(
                "verify with {inflight} requests in flight needs more than {blocks} blocks"
            ));
        }
        Ok(Disk { name, size_bytes, span_bytes, flush })
    }

    fn blocks_count(&self, cli: &Cli) -> u64 {
        self.span_bytes / u64::from(cli.io_size)
    }
}

/// Runs what the options say.
pub(super) fn drive(cli: &Cli, stop: &Arc<AtomicBool>) -> Result<Report, PerfError> {
    match (&cli.bdev, cli.floor) {
        (Some(choice), _) => drive_bdev(cli, choice, stop),
        (None, Some(core)) if cli.packed => drive_floor(cli, core, PackedRing::new, stop),
        (None, Some(core)) => drive_floor(cli, core, SplitRing::new, stop),
        (None, None) if cli.packed => drive_sockets(cli, PackedRing::new, stop),
        (None, None) => drive_sockets(cli, SplitRing::new, stop),
    }
}

/// Makes a ring in memory at an offset.
type MakeRing<R> = fn(&LoadMemory, &QueueLayout, usize) -> R;

fn layout_of(cli: &Cli) -> Result<QueueLayout, PerfError> {
    QueueLayout::new(cli.form(), cli.depth, cli.io_size).ok_or_else(|| {
        PerfError::Options(format!(
            "depth {} needs more descriptors than a ring has (32768); use --indirect or more queues",
            cli.depth
        ))
    })
}

fn new_eventfd() -> Result<std::os::fd::OwnedFd, PerfError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| PerfError::Options(format!("cannot make an eventfd: {errno}")))
}

fn memory_text(memory: &LoadMemory) -> String {
    format!("buffers in {} pages", crate::config::size::format(memory.page_bytes()))
}

fn drive_sockets<R: DriverRing>(
    cli: &Cli,
    make: MakeRing<R>,
    stop: &Arc<AtomicBool>,
) -> Result<Report, PerfError> {
    let layout = layout_of(cli)?;
    let mut frontends = Vec::new();
    let mut disks = Vec::new();
    for socket in &cli.sockets {
        let frontend = Frontend::connect(socket, cli.form())?;
        let facts = frontend.facts();
        let name = frontend.path().to_owned();
        let refused = |reason: String| PerfError::Refused { socket: name.clone(), reason };
        if facts.read_only && cli.workload.writes() && cli.pass != PassChoice::Check {
            return Err(refused("the disk is read-only; use read or randread".into()));
        }
        if cli.queues > facts.queues_count {
            let offered = facts.queues_count;
            return Err(refused(format!("the disk has {offered} queues, not {}", cli.queues)));
        }
        disks.push(Disk::new(
            cli,
            name.clone(),
            facts.capacity_bytes,
            facts.block_bytes,
            facts.flush,
        )?);
        frontends.push(frontend);
    }
    // A disk sees its own part of the memory file only; parts are whole pages of the kind that the file has.
    let page = |bytes: usize| bytes.next_multiple_of(2 << 20);
    let queues = usize::from(cli.queues);
    let area_bytes = page(layout.len_bytes * queues);
    let memory = LoadMemory::new(bytes_u64(area_bytes * frontends.len()))?;
    let mut lanes = Vec::new();
    for (number, frontend) in frontends.iter_mut().enumerate() {
        let area = number * area_bytes;
        let region = MemoryRegion {
            guest_addr: memory.guest_addr(bytes_u64(area)),
            len_bytes: bytes_u64(area_bytes),
            user_addr: memory.user_addr(bytes_u64(area)),
            mmap_offset: bytes_u64(area),
        };
        frontend.share(memory.file().as_fd(), &region)?;
        for queue in 0..queues {
            let base = area + queue * layout.len_bytes;
            let ring = make(&memory, &layout, base);
            let user = |at: usize| memory.user_addr(bytes_u64(base + at));
            let place = RingPlace {
                size: layout.size,
                packed: cli.packed,
                desc: user(layout.desc_at),
                driver: user(layout.driver_at),
                device: user(layout.device_at),
            };
            let (kick, call) = (new_eventfd()?, new_eventfd()?);
            frontend.start_ring(&place, kick.as_fd(), call.as_fd())?;
            let name = format!("{} queue {queue}", frontend.path());
            lanes.push(Lane::new(VhostPort::new(ring, cli.depth, kick, name), lanes.len()));
        }
    }
    let disk_of_lane: Vec<usize> = (0..lanes.len()).map(|lane| lane / queues).collect();
    let is_closed = || frontends.iter().find(|f| f.is_closed()).map(|f| f.path().to_owned());
    let mut report = load(cli, &mut lanes, &disks, &disk_of_lane, stop, &is_closed)?;
    report.memory = memory_text(&memory);
    for frontend in &mut frontends {
        frontend.stop_rings()?;
    }
    Ok(report)
}

fn drive_floor<R: DriverRing>(
    cli: &Cli,
    core: u32,
    make: MakeRing<R>,
    stop: &Arc<AtomicBool>,
) -> Result<Report, PerfError> {
    let layout = layout_of(cli)?;
    let queues = usize::from(cli.queues);
    let memory = LoadMemory::new(bytes_u64(layout.len_bytes * queues))?;
    let disk = Disk::new(cli, "bare loop".into(), NULL_BYTES, BDEV_BLOCK_BYTES, false)?;
    let (mut lanes, mut devices) = (Vec::new(), Vec::new());
    for queue in 0..queues {
        let base = queue * layout.len_bytes;
        let ring = make(&memory, &layout, base);
        devices.push(BareDevice::new(&memory, &layout, base));
        let port = VhostPort::new(ring, cli.depth, new_eventfd()?, format!("bare queue {queue}"));
        lanes.push(Lane::new(port, queue));
    }
    let _floor = Floor::start(devices, core)
        .map_err(|error| PerfError::Options(format!("cannot start a thread: {error}")))?;
    let disk_of_lane = vec![0; queues];
    let mut report = load(cli, &mut lanes, &[disk], &disk_of_lane, stop, &|| None)?;
    report.memory = memory_text(&memory);
    Ok(report)
}

fn open_bdev(choice: &BdevChoice) -> Result<Arc<dyn Bdev>, PerfError> {
    let failed = |error: &dyn std::fmt::Display| PerfError::Bdev(error.to_string());
    let (block_bytes, uuid) = (BDEV_BLOCK_BYTES, None);
    let blocks = |bytes: u64| bytes / u64::from(block_bytes);
    Ok(match choice {
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
    })
}

fn drive_bdev(cli: &Cli, choice: &BdevChoice, stop: &Arc<AtomicBool>) -> Result<Report, PerfError> {
    let bdev = open_bdev(choice)?;
    let info = Arc::clone(bdev.info());
    let geometry = info.geometry();
    let name = match choice {
        BdevChoice::Null | BdevChoice::Malloc(_) => info.product_name().to_owned(),
        BdevChoice::File(path) => path.display().to_string(),
    };
    let disk = Disk::new(cli, name, info.size_bytes(), geometry.block_bytes, true)?;
    let port = BdevPort::open(bdev, cli.depth, cli.io_size)?;
    let memory = port.memory_text();
    let mut lanes = [Lane::new(port, 0)];
    let disks = [disk];
    if matches!(choice, BdevChoice::Malloc(_)) && cli.workload != Work::Verify {
        // A RAM disk's memory comes into being when it is touched first: that is not what is measured.
        let blocks_count = disks[0].blocks_count(cli);
        touch(cli, &mut lanes, blocks_count)?;
    }
    let mut report = load(cli, &mut lanes, &disks, &[0], stop, &|| None)?;
    report.memory = memory;
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
    let disks = disks.iter().enumerate().map(|(number, disk)| DiskReport {
        name: disk.name.clone(),
        size_bytes: disk.size_bytes,
        span_bytes: disk.span_bytes,
        queues: lanes
            .iter()
            .zip(disk_of_lane)
            .filter(|(_, of)| **of == number)
            .map(|(lane, _)| lane.measured_count)
            .collect(),
    });
    Ok(Report { disks: disks.collect(), parts, main, verify, memory: String::new() })
}

fn pattern_load<P: Port>(
    cli: &Cli,
    lanes: &mut [Lane<P>],
    disks: &[Disk],
    disk_of_lane: &[usize],
    watcher: &Watcher<'_>,
) -> Result<Part, PerfError> {
    let (order, read_percent) = match cli.workload {
        Work::Read => (Order::Sequential, 100),
        Work::Write => (Order::Sequential, 0),
        Work::Randread => (Order::Random, 100),
        Work::Randwrite => (Order::Random, 0),
        Work::Randrw | Work::Verify => (Order::Random, cli.read_percent),
    };
    let queues = u64::from(cli.queues);
    let streams = (0u64..).zip(disk_of_lane).map(|(lane, &disk)| {
        let blocks_count = disks[disk].blocks_count(cli);
        Stream::new(cli.seed, lane, blocks_count, blocks_count / queues * (lane % queues))
    });
    let mut work = Pattern {
        order,
        io_bytes: u64::from(cli.io_size),
        read_threshold: read_threshold(read_percent),
        streams: streams.collect(),
    };
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
        blocks_counts: disks.iter().map(|disk| disk.blocks_count(cli)).collect(),
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
                    disks.iter().map(|d| d.blocks_count(cli)).sum(),
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
