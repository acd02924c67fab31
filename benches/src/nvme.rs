//! The NVMe driver on the device model: a controller attached, and one channel of it without anything above.
//!
//! Owner: the thread that plays reactor; the model works on a thread of its own, so its instructions are not counted here.
//! **Invariant:** between `submit` and `reap` the model gets the time to finish all, so both do the same work in every run.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringmill_core::bdev::{Bdev, Channel};
use ringmill_core::io::{Batch, Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::limits::{BATCH_REQUESTS_MAX, NVME_QUEUE_ENTRIES_MAX};
use ringmill_core::mem::{Mapping, MemTable, RegionSpec};
use ringmill_core::reactor::ReactorCx;
use ringmill_core::units::GuestAddr;
use ringmill_drivers::model::{Count, Medium, ModelControl, ModelNamespace, ModelOptions, start};
use ringmill_drivers::nvme::{NvmeControl, NvmeOptions, attach};

use crate::rig::MEDIUM_BYTES;

/// Under callgrind everything takes fifty times as long.
const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK_SHIFT: u8 = 12;
const SETTLE: Duration = Duration::from_millis(2);

/// A modelled controller with a null medium, and its namespace as a bdev.
pub struct NvmeDisk {
    /// The namespace.
    pub bdev: Arc<dyn Bdev>,
    control: Arc<dyn NvmeControl>,
    model: ModelControl,
}

impl Drop for NvmeDisk {
    fn drop(&mut self) {
        self.control.detach();
    }
}

impl NvmeDisk {
    /// Starts and attaches it.
    ///
    /// # Errors
    /// When there is no memory or thread for it.
    pub fn new() -> anyhow::Result<NvmeDisk> {
        let namespace =
            ModelNamespace::new(1, BLOCK_SHIFT, MEDIUM_BYTES >> BLOCK_SHIFT, Medium::null());
        // A model that spins while it is idle makes valgrind wait for it.
        let model = ModelOptions { spin: Duration::ZERO, ..ModelOptions::default() };
        let started = start(model, vec![namespace]);
        let (backing, model) = started.map_err(|error| anyhow::anyhow!("no model: {error}"))?;
        let options = NvmeOptions {
            name: "Nvme0".to_owned(),
            num_io_queues: 1,
            io_queue_size: NVME_QUEUE_ENTRIES_MAX,
            timeout: PATIENCE,
            ..NvmeOptions::default()
        };
        let control = attach(backing, options, &[], Arc::new(|_| ()))?;
        let bdev = control.namespaces().into_iter().find_map(|one| one.bdev);
        Ok(NvmeDisk { bdev: bdev.context("the model has no namespace")?, control, model })
    }
}

/// A channel of it with requests of 4 KiB.
pub struct NvmeRig {
    channel: Box<dyn Channel>,
    cx: ReactorCx,
    batch: Batch,
    done: Completions,
    disk: NvmeDisk,
    _table: MemTable,
}

impl Drop for NvmeRig {
    fn drop(&mut self) {
        self.channel.close(&mut self.cx.io);
    }
}

impl NvmeRig {
    /// A channel, and a batch of `requests_count` (at most 64) reads of pages all over the disk.
    ///
    /// # Errors
    /// As for [`NvmeDisk::new`].
    pub fn new(requests_count: usize) -> anyhow::Result<NvmeRig> {
        if requests_count > BATCH_REQUESTS_MAX {
            bail!("a batch has at most {BATCH_REQUESTS_MAX} requests");
        }
        let disk = NvmeDisk::new()?;
        let len_bytes = requests_count << BLOCK_SHIFT;
        let mapping = Arc::new(Mapping::pool(len_bytes)?);
        let mut table = MemTable::new();
        let (guest_addr, len) = (GuestAddr(0), len_bytes as u64);
        table.add(RegionSpec { guest_addr, len_bytes: len, user_addr: 0 }, mapping)?;
        if let Some(domain) = disk.bdev.dma() {
            table.map_into(&domain, || true)?;
        }
        let mut cx = ReactorCx::new(None)?;
        let channel = disk.bdev.open_channel(None)?(&mut cx.io)?;
        let mut batch = Batch::new();
        for number in 0..u16::try_from(requests_count)? {
            let page = u64::from(number) << BLOCK_SHIFT;
            let segments_at = u32::try_from(batch.segments_mark())?;
            let segment = table.translate(GuestAddr(page), 1 << BLOCK_SHIFT, &mut 0);
            batch.push_segment(segment.context("a page of our own")?);
            batch.push(IoRequest {
                offset_bytes: page * 7919 % MEDIUM_BYTES,
                len_bytes: 1 << BLOCK_SHIFT,
                tag: Tag::new(number, 0),
                segments_at,
                segments_count: 1,
                op: IoOp::Read,
                flags: IoFlags::NONE,
            });
        }
        let mut rig = NvmeRig { channel, cx, batch, done: Completions::new(), disk, _table: table };
        // A new pair begins to work when it has heard that it may.
        while rig.channel.room(&rig.cx.io).requests == 0 {
            rig.commit();
        }
        Ok(rig)
    }

    fn commit(&mut self) {
        let now_ns = self.cx.io.clock.now_ns();
        self.cx.io.devices.commit(now_ns);
    }

    /// Puts the batch into the device's queue and rings; the number of requests.
    pub fn submit(&mut self) -> usize {
        let taken = self.channel.submit(&mut self.cx.io, black_box(self.batch.view()));
        self.commit();
        taken
    }

    /// Waits until the model has done everything, without looking at the driver.
    ///
    /// # Errors
    /// When it does not.
    pub fn settle(&self, requests_count: u64) -> anyhow::Result<()> {
        let start = Instant::now();
        while self.disk.model.count(Count::Prp) < requests_count {
            if start.elapsed() > PATIENCE {
                let done = self.disk.model.count(Count::Prp);
                bail!("the model has done {done} of {requests_count}");
            }
            std::thread::yield_now();
        }
        // The last of them are counted; their completions follow at once.
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Takes the completions; how many were good.
    pub fn reap(&mut self) -> usize {
        self.done.clear();
        self.channel.poll(&mut self.cx.io, &mut self.done);
        self.commit();
        self.done.iter().filter(|completion| completion.status.is_ok()).count()
    }
}
