//! The cases whose instructions are counted, and the window in which they are.
//!
//! A case prepares outside the window and works inside [`Count::window`]; callgrind counts while the program is in
//! [`counted_window`], by its name. **Invariant:** a case does the same work in every run: seeds and rounds are fixed.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use crossbeam_queue::ArrayQueue;
use ringmill_core::bdev::Bdev;
use ringmill_core::io::{Batch, IoOp};
use ringmill_core::mem::{Mapping, MemTable, RegionSpec};
use ringmill_core::reactor::Ring;
use ringmill_core::stats::{LatencyTable, QueueStats, Stage};
use ringmill_core::units::GuestAddr;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::{CacheMode, UringBdev, UringOptions};
use ringmill_vmm_glue::virtq::Virtqueue;

use crate::nvme::{NvmeDisk, NvmeRig};
use crate::rig::{Format, Guest, MEDIUM_BYTES, Packed, Split, WorkerRig, pattern};

/// Rounds whose instructions are not counted.
const WARM_ROUNDS: u64 = 8;
const ROUNDS: u64 = 64;
/// Calls of a small function inside one window.
const CALLS: u64 = 4096;
/// How long a medium gets to finish what is in the kernel.
const SETTLE: Duration = Duration::from_millis(2);

/// What one case has done inside its windows.
#[derive(Debug, Default)]
pub struct Count {
    /// Requests, or calls.
    pub units_count: u64,
}

/// Work whose instructions are counted. The name is what callgrind is told to look for.
#[inline(never)]
fn counted_window(work: &mut dyn FnMut()) -> u64 {
    work();
    // Something after the call, so that this is a frame and not a jump.
    black_box(1)
}

impl Count {
    /// Runs `work`, which does `units_count` of what the case counts.
    pub fn window(&mut self, units_count: u64, mut work: impl FnMut()) {
        counted_window(&mut work);
        self.units_count += units_count;
    }
}

/// A case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name in the table.
    pub name: &'static str,
    /// Copying is left out: it depends on the processor that the C library finds.
    pub without_libc: bool,
    /// Does the work.
    pub run: fn(&mut Count) -> anyhow::Result<()>,
}

const fn case(name: &'static str, run: fn(&mut Count) -> anyhow::Result<()>) -> Case {
    Case { name, without_libc: false, run }
}

/// All cases, in the order of the table.
pub const CASES: &[Case] = &[
    case("null, split, batch 1", |c| null::<Split>(c, 1, false)),
    case("null, split, batch 32", |c| null::<Split>(c, 32, false)),
    case("null, split, batch 128", |c| null::<Split>(c, 128, false)),
    case("null, split, batch 1, nothing recorded", |c| unrecorded(c, 1)),
    case("null, split, batch 32, nothing recorded", |c| unrecorded(c, 32)),
    case("null, split, batch 128, nothing recorded", |c| unrecorded(c, 128)),
    case("null, split, indirect, batch 32", |c| null::<Split>(c, 32, true)),
    case("null, packed, batch 1", |c| null::<Packed>(c, 1, false)),
    case("null, packed, batch 32", |c| null::<Packed>(c, 32, false)),
    case("null, packed, batch 128", |c| null::<Packed>(c, 128, false)),
    case("null, packed, indirect, batch 32", |c| null::<Packed>(c, 32, true)),
    Case { name: "malloc, split, batch 32, without copying", without_libc: true, run: malloc },
    case("uring, split, batch 32, outside the kernel", uring),
    case("nvme, the driver alone, batch 1", |c| nvme_alone(c, 1)),
    case("nvme, the driver alone, batch 32", |c| nvme_alone(c, 32)),
    case("nvme, split, batch 32", nvme),
    case("idle queue, split, one look", idle::<Split>),
    case("idle queue, packed, one look", idle::<Packed>),
    case("chain walk, split", |c| chains::<Split>(c, false)),
    case("chain walk, split, indirect", |c| chains::<Split>(c, true)),
    case("chain walk, packed", |c| chains::<Packed>(c, false)),
    case("chain walk, packed, indirect", |c| chains::<Packed>(c, true)),
    case("translate, the same region", |c| translate(c, &[0])),
    case("translate, another region", |c| translate(c, &[0, 3, 1, 2])),
    case("counters and histograms of a request", record),
    case("histogram record", histogram),
    case("mailbox push and pop", mailbox),
];

/// A null device.
///
/// # Errors
/// Never for this size.
pub fn null_bdev() -> anyhow::Result<Arc<dyn Bdev>> {
    let options = NullOptions { blocks_count: MEDIUM_BYTES / 512, block_bytes: 512, uuid: None };
    Ok(Arc::new(NullBdev::new("bench", &options)?))
}

fn null<F: Format>(count: &mut Count, batch: u64, indirect: bool) -> anyhow::Result<()> {
    worker(count, WorkerRig::<F>::new(null_bdev()?, indirect, None)?, batch)
}

fn unrecorded(count: &mut Count, batch: u64) -> anyhow::Result<()> {
    let rig = WorkerRig::<Split>::new(null_bdev()?, false, None)?;
    rig.device.set_recording(false);
    worker(count, rig, batch)
}

/// A RAM disk.
///
/// # Errors
/// When there is no memory.
pub fn malloc_bdev() -> anyhow::Result<Arc<dyn Bdev>> {
    let options = MallocOptions { blocks_count: MEDIUM_BYTES / 512, block_bytes: 512, uuid: None };
    Ok(Arc::new(MallocBdev::new("bench", &options)?))
}

fn malloc(count: &mut Count) -> anyhow::Result<()> {
    worker(count, WorkerRig::<Split>::new(malloc_bdev()?, false, None)?, 32)
}

fn worker<F: Format>(count: &mut Count, mut rig: WorkerRig<F>, batch: u64) -> anyhow::Result<()> {
    for round in 0..WARM_ROUNDS + ROUNDS {
        // A pass takes a bounded number of requests: a large batch needs several.
        let mut fresh = batch;
        rig.round(batch, |rig| {
            if round < WARM_ROUNDS {
                rig.pass();
            } else {
                count.window(std::mem::take(&mut fresh), || {
                    rig.pass();
                });
            }
        })?;
    }
    Ok(())
}

fn uring(count: &mut Count) -> anyhow::Result<()> {
    let image = tempfile::NamedTempFile::new().context("cannot make a file")?;
    std::fs::write(image.path(), pattern(MEDIUM_BYTES)).context("cannot fill the file")?;
    let options = UringOptions {
        filename: image.path().to_owned(),
        // The page cache answers at once and everywhere alike.
        cache: CacheMode::WriteBack,
        ring_only: true,
        ..UringOptions::default()
    };
    let bdev = Arc::new(UringBdev::open("bench", &options)?);
    let mut ring = Ring::new(&[])?;
    ring.enable()?;
    two_passes(count, WorkerRig::<Split>::new(bdev, false, Some(ring))?)
}

/// For media that answer by themselves: batches of 32.
fn two_passes(count: &mut Count, mut rig: WorkerRig<Split>) -> anyhow::Result<()> {
    for round in 0..WARM_ROUNDS + ROUNDS {
        let mut fresh = 32;
        rig.round(32, |rig| {
            // Two passes, however long the medium takes: one submits, one finds everything finished.
            let mut pass = || {
                rig.pass();
                rig.turn_ring();
            };
            if round < WARM_ROUNDS {
                pass();
            } else {
                count.window(std::mem::take(&mut fresh), pass);
            }
            std::thread::sleep(SETTLE);
        })?;
    }
    Ok(())
}

/// The driver on the device model: entries written, one doorbell, completions taken. No worker above it.
fn nvme_alone(count: &mut Count, batch: usize) -> anyhow::Result<()> {
    let mut rig = NvmeRig::new(batch)?;
    let mut submitted = 0;
    for round in 0..WARM_ROUNDS + ROUNDS {
        let (mut taken, mut good) = (0, 0);
        let mut submit = || taken = rig.submit();
        if round < WARM_ROUNDS {
            submit()
        } else {
            count.window(batch as u64, submit)
        }
        submitted += taken as u64;
        rig.settle(submitted)?;
        let mut reap = || good = rig.reap();
        if round < WARM_ROUNDS {
            reap()
        } else {
            count.window(0, reap)
        }
        if (taken, good) != (batch, batch) {
            bail!("{taken} of {batch} requests were taken, and {good} were done");
        }
    }
    Ok(())
}

fn nvme(count: &mut Count) -> anyhow::Result<()> {
    let disk = NvmeDisk::new()?;
    two_passes(count, WorkerRig::<Split>::new(Arc::clone(&disk.bdev), false, None)?)
}

/// A pass over a queue in which there is nothing.
fn idle<F: Format>(count: &mut Count) -> anyhow::Result<()> {
    let mut rig = WorkerRig::<F>::new(null_bdev()?, false, None)?;
    rig.round(1, |rig| {
        rig.pass();
    })?;
    count.window(CALLS, || {
        for _ in 0..CALLS {
            black_box(rig.pass());
        }
    });
    Ok(())
}

fn chains<F: Format>(count: &mut Count, indirect: bool) -> anyhow::Result<()> {
    let mut guest = Guest::<F>::new(indirect);
    let mut queue = guest.queue()?;
    let table = guest.memory.table();
    let mut batch = Batch::new();
    let (mut hint, requests) = (0, 32);
    guest.offer(requests)?;
    let mut failed = None;
    let mut heads = Vec::with_capacity(32);
    for round in 0..WARM_ROUNDS + ROUNDS {
        let mut walk = || {
            batch.clear();
            let found = queue.available().map(|count| {
                for _ in 0..count {
                    match queue.pop(&table, &mut hint, &mut batch) {
                        Ok(chain) => heads.extend(black_box(chain).map(|chain| chain.head)),
                        Err(error) => failed = Some(error),
                    }
                }
                while let Some(head) = heads.pop() {
                    queue.unpop(head);
                }
            });
            failed = failed.or(found.err());
        };
        if round < WARM_ROUNDS {
            walk();
        } else {
            count.window(requests, walk);
        }
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// A table of four regions.
///
/// # Errors
/// When there is no memory.
pub fn four_regions() -> anyhow::Result<MemTable> {
    let mut table = MemTable::new();
    for region in 0..4 {
        let mapping = Arc::new(Mapping::anonymous(1 << 20)?);
        let spec = RegionSpec {
            guest_addr: GuestAddr(region << 30),
            len_bytes: 1 << 20,
            user_addr: region << 30,
        };
        table.add(spec, mapping)?;
    }
    Ok(table)
}

fn translate(count: &mut Count, regions: &[u64]) -> anyhow::Result<()> {
    let table = four_regions()?;
    let addrs: Vec<GuestAddr> =
        regions.iter().map(|region| GuestAddr((region << 30) + 0x4_0000)).collect();
    let mut hint = 0;
    count.window(CALLS, || {
        for _ in 0..CALLS / addrs.len() as u64 {
            for addr in &addrs {
                black_box(table.translate(black_box(*addr), 4096, &mut hint));
            }
        }
    });
    Ok(())
}

fn record(count: &mut Count) -> anyhow::Result<()> {
    let stats = QueueStats::new_shared()?;
    count.window(CALLS, || {
        for value in 0..CALLS {
            let op = stats.op(black_box(IoOp::Read));
            op.count(1, black_box(4096), true);
            for stage in Stage::ALL {
                op.stage(stage).record(black_box(1000 + value % 64));
            }
        }
    });
    Ok(())
}

fn histogram(count: &mut Count) -> anyhow::Result<()> {
    let table = Box::<LatencyTable>::default();
    count.window(CALLS, || {
        for value in 0..CALLS {
            table.record(black_box(1000 + value % 64));
        }
    });
    Ok(())
}

fn mailbox(count: &mut Count) -> anyhow::Result<()> {
    let mailbox = ArrayQueue::new(64);
    count.window(CALLS, || {
        for value in 0..CALLS {
            // There is room: it is emptied at once.
            let _ = mailbox.push(black_box(value));
            black_box(mailbox.pop());
        }
    });
    Ok(())
}
