//! HOT PATH
//! A port onto a bdev's channel: drivers measured alone, without vhost and without a second thread.
//!
//! Owner: the load's thread, which plays reactor: context, io_uring and channel are its own. **Invariant:** what the
//! channel does not take stays in order and is offered again at the next poll.

use std::sync::{Arc, Weak};

use ringmill_core::bdev::{Bdev, Channel};
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{BatchView, Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::limits::BATCH_REQUESTS_MAX;
use ringmill_core::mem::Segment;
use ringmill_core::reactor::{
    IdlePolicy, ReactorConfig, ReactorCx, ReactorHandle, ReactorStats, Ring, spawn,
};
use ringmill_core::units::CoreId;

use super::PerfError;
use super::memory::LoadMemory;
use super::port::Port;
use super::slots::Op;

/// The reactor that owns the one device queue of a bdev; stopped when dropped, after the bdev.
#[derive(Debug)]
pub(crate) struct Owner {
    reactor: ReactorHandle,
    bdev: Weak<CrossBdev>,
    before: ReactorStats,
}

impl Owner {
    /// Starts one on `core` that never sleeps. Before this thread is pinned: a thread can only be pinned to a core that
    /// its parent may use.
    #[cold]
    pub(crate) fn start(core: u32) -> Result<Owner, PerfError> {
        let core = Some(CoreId(core));
        let config = ReactorConfig { core, idle: IdlePolicy::Poll, io_wq_cpus: Vec::default() };
        let reactor = spawn(&config).map_err(|error| PerfError::Bdev(error.to_string()))?;
        let before = reactor.stats();
        Ok(Owner { reactor, bdev: Weak::new(), before })
    }

    /// Gives it the device queue of `bdev`.
    #[cold]
    pub(crate) fn own(&mut self, bdev: Arc<dyn Bdev>) -> Result<Arc<dyn Bdev>, PerfError> {
        let crossed = CrossBdev::new(bdev, Vec::from([self.reactor.clone()]));
        let crossed = Arc::new(crossed.map_err(|error| PerfError::Bdev(error.to_string()))?);
        self.bdev = Arc::downgrade(&crossed);
        self.before = self.reactor.stats();
        Ok(crossed)
    }

    /// For the report: what a request has cost on the owner's core.
    #[cold]
    pub(crate) fn text(&self) -> String {
        let facts = self.bdev.upgrade().map(|bdev| bdev.driver_facts()).unwrap_or_default();
        let number = |wanted: &str| {
            let found = facts.iter().find(|(name, _)| *name == wanted);
            found.and_then(|(_, value)| value.parse::<u64>().ok()).unwrap_or(0)
        };
        let (requests, batches) = (number("crossed_requests"), number("crossed_batches"));
        let busy_ticks = self.reactor.stats().busy_ticks.saturating_sub(self.before.busy_ticks);
        let core = self.reactor.core().map_or(0, |core| core.0);
        format!(
            "device queue on core {core}: {requests} requests in {batches} batches, {} busy ticks of it each",
            busy_ticks / requests.max(1)
        )
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.reactor.stop();
    }
}

/// A channel and what it needs.
pub(crate) struct BdevPort {
    cx: ReactorCx,
    channel: Box<dyn Channel>,
    name: String,
    io_bytes: u32,
    /// One segment per slot.
    segments: Box<[Segment]>,
    statuses: Box<[u8]>,
    /// Requests that were pushed; those before `first` were taken.
    pending: Vec<IoRequest>,
    first: usize,
    completions: Completions,
    given_count: u16,
    returned_count: u16,
    _bdev: Arc<dyn Bdev>,
    /// Always there; an option so that it can be left behind.
    memory: Option<LoadMemory>,
}

impl std::fmt::Debug for BdevPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BdevPort").field("name", &self.name).finish_non_exhaustive()
    }
}

impl BdevPort {
    /// Opens a channel of the bdev with `depth` buffers of `io_bytes`.
    #[cold]
    pub(crate) fn open(
        bdev: Arc<dyn Bdev>,
        depth: u16,
        io_bytes: u32,
    ) -> Result<BdevPort, PerfError> {
        let failed = |error: &dyn std::fmt::Display| PerfError::Bdev(error.to_string());
        let stride = u64::from(io_bytes).next_multiple_of(512);
        let mut memory = LoadMemory::new(u64::from(depth) * stride)?;
        if let Some(domain) = bdev.dma() {
            memory.map_into(&domain).map_err(|error| failed(&error))?;
        }
        let segments =
            (0..u64::from(depth)).map(|slot| memory.segment(slot * stride, io_bytes)).collect();
        let mut ring = Ring::new(&[]).map_err(|error| failed(&error))?;
        ring.enable().map_err(|error| failed(&error))?;
        let mut cx = ReactorCx::new(Some(ring)).map_err(|error| failed(&error))?;
        let seed = bdev.open_channel(None).map_err(|error| failed(&error))?;
        let channel = seed(&mut cx.io).map_err(|error| failed(&error))?;
        Ok(BdevPort {
            cx,
            channel,
            name: bdev.info().name().to_owned(),
            io_bytes,
            segments,
            statuses: std::iter::repeat_n(0, usize::from(depth)).collect(),
            pending: Vec::with_capacity(usize::from(depth)),
            first: 0,
            completions: Completions::new(),
            given_count: 0,
            returned_count: 0,
            _bdev: bdev,
            memory: Some(memory),
        })
    }

    /// For the report.
    #[cold]
    pub(crate) fn memory_text(&self) -> String {
        let page_bytes = self.memory.as_ref().map_or(0, LoadMemory::page_bytes);
        format!("buffers in {} pages", crate::config::size::format(page_bytes))
    }

    fn submit(&mut self) {
        while self.first < self.pending.len() {
            let batch = &self.pending[self.first..];
            let batch = &batch[..batch.len().min(BATCH_REQUESTS_MAX)];
            let view = BatchView::new(batch, &self.segments);
            let offered = batch.len();
            let taken = self.channel.submit(&mut self.cx.io, view);
            self.first += taken;
            if taken < offered {
                return;
            }
        }
        self.pending.clear();
        self.first = 0;
    }
}

impl Port for BdevPort {
    fn depth(&self) -> u16 {
        u16::try_from(self.segments.len()).unwrap_or(u16::MAX)
    }

    #[inline]
    fn push(&mut self, slot: u16, op: Op, offset_bytes: u64) {
        let (op, len_bytes, segments_count) = match op {
            Op::Read => (IoOp::Read, u64::from(self.io_bytes), 1),
            Op::Write => (IoOp::Write, u64::from(self.io_bytes), 1),
            Op::Flush => (IoOp::Flush, 0, 0),
        };
        self.given_count = self.given_count.wrapping_add(1);
        self.pending.push(IoRequest {
            offset_bytes,
            len_bytes,
            tag: Tag::new(slot, 0),
            segments_at: u32::from(slot),
            segments_count,
            op,
            flags: IoFlags::NONE,
        });
    }

    #[inline]
    fn publish(&mut self) -> Result<(), PerfError> {
        self.submit();
        Ok(())
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<u16>) -> Result<(), PerfError> {
        if self.first < self.pending.len() {
            // Room may have come with the last completions.
            if self.first > 0 {
                self.pending.drain(..self.first);
                self.first = 0;
            }
            self.submit();
        }
        self.cx.turn_ring();
        loop {
            self.completions.clear();
            self.channel.poll(&mut self.cx.io, &mut self.completions);
            for completion in &self.completions {
                let slot = completion.tag.slot();
                self.statuses[usize::from(slot)] = completion.status.to_virtio();
                done.push(slot);
            }
            self.returned_count = self
                .returned_count
                .wrapping_add(u16::try_from(self.completions.len()).unwrap_or(0));
            if !self.completions.is_full() {
                return Ok(());
            }
        }
    }

    #[inline]
    fn status(&self, slot: u16) -> u8 {
        self.statuses[usize::from(slot)]
    }

    fn data(&self, slot: u16) -> Segment {
        self.segments[usize::from(slot)]
    }

    fn place(&self) -> &str {
        &self.name
    }

    fn indices(&self) -> (u16, u16) {
        (self.given_count, self.returned_count)
    }
}

impl Drop for BdevPort {
    fn drop(&mut self) {
        if self.channel.inflight() == 0 {
            self.channel.close(&mut self.cx.io);
        } else {
            // The kernel or the device may still write into it: it stays mapped until the process ends, which is soon.
            std::mem::forget(self.memory.take());
        }
    }
}
