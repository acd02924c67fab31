//! What the queues of one disk share, and what each queue shows of itself.
//!
//! Owner: built by a control thread; read by reactors; the write-cache mode is the only thing that changes, by a
//! guest's SET_CONFIG or by negotiation. **Invariant:** no field here is written by two reactors.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use ringmill_core::bdev::{Bdev, BdevError, BdevInfo};
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::limits::SERIAL_BYTES;
use ringmill_core::reactor::RingError;
use ringmill_core::stats::QueueStats;

use crate::virtq::QueueError;

use super::CoalesceSettings;

/// A disk as its queues see it.
pub struct BlkDevice {
    /// Not the bdev itself: a removed one must close although its controller lives on.
    info: Arc<BdevInfo>,
    serial: [u8; SERIAL_BYTES],
    read_only: bool,
    discard: bool,
    write_zeroes: bool,
    /// False: every write is stable before it completes (design of virtio 1.2 §5.2.5: no FLUSH and no CONFIG_WCE
    /// negotiated, or writeback = 0).
    write_back: AtomicBool,
    /// The `writeback` field of the configuration space: what guests are told, and the last of them chose.
    config_writeback: AtomicBool,
    coalesce: CoalesceSettings,
    /// Whether queues record what their requests took.
    recording: AtomicBool,
}

impl std::fmt::Debug for BlkDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlkDevice").field("bdev", &self.info.name()).finish_non_exhaustive()
    }
}

impl BlkDevice {
    /// A disk over `bdev`. `serial` longer than 20 bytes is cut.
    #[must_use]
    pub fn new(bdev: &Arc<dyn Bdev>, serial: &str, read_only: bool) -> BlkDevice {
        let mut bytes = [0u8; SERIAL_BYTES];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let geometry = bdev.info().geometry();
        BlkDevice {
            read_only: read_only || geometry.read_only,
            discard: geometry.discard,
            write_zeroes: geometry.write_zeroes,
            serial: bytes,
            write_back: AtomicBool::new(geometry.write_cache),
            config_writeback: AtomicBool::new(geometry.write_cache),
            coalesce: CoalesceSettings::default(),
            recording: AtomicBool::new(true),
            info: Arc::clone(bdev.info()),
        }
    }

    /// The properties of the bdev below, its size now among them.
    #[inline]
    #[must_use]
    pub fn info(&self) -> &BdevInfo {
        &self.info
    }

    /// The 20 bytes of GET_ID, zero padded.
    #[must_use]
    pub fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.serial
    }

    /// True when writes, discards and write-zeroes are refused.
    #[inline]
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// True when the operation is offered to guests.
    #[must_use]
    pub fn supports(&self, op: IoOp) -> bool {
        match op {
            IoOp::Discard => self.discard && !self.read_only,
            IoOp::WriteZeroes => self.write_zeroes && !self.read_only,
            _ => true,
        }
    }

    /// True when counters and latencies are recorded.
    #[inline]
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// Records from now on, or no more.
    pub fn set_recording(&self, recording: bool) {
        self.recording.store(recording, Ordering::Relaxed);
    }

    /// Interrupt coalescing.
    #[inline]
    #[must_use]
    pub fn coalesce(&self) -> &CoalesceSettings {
        &self.coalesce
    }

    /// Sectors of one discard or write-zeroes: 1 GiB, so that one request does not occupy a device for minutes.
    #[must_use]
    pub const fn range_sectors_max(&self) -> u32 {
        2 << 20
    }

    /// The `writeback` field of the configuration space.
    #[must_use]
    pub fn config_writeback(&self) -> bool {
        self.config_writeback.load(Ordering::Relaxed)
    }

    /// A guest sets the field (or a reset sets it back to true). A device without a volatile cache keeps it at 0.
    ///
    /// The field outlives connections: a VMM that reconnects does not repeat what its guest chose, and that guest relies on
    /// it. What a driver negotiates never changes it: the next guest would be told of a choice that nobody made.
    pub fn set_config_writeback(&self, writeback: bool) {
        self.config_writeback
            .store(writeback && self.info.geometry().write_cache, Ordering::Relaxed);
    }

    /// Whether writes may stay in a volatile cache until a flush.
    #[must_use]
    pub fn write_back(&self) -> bool {
        self.write_back.load(Ordering::Relaxed)
    }

    /// Changes the cache mode for requests taken from now on.
    pub fn set_write_back(&self, write_back: bool) {
        self.write_back.store(write_back, Ordering::Relaxed);
    }

    /// The flags of a write.
    #[inline]
    #[must_use]
    pub fn write_flags(&self) -> IoFlags {
        if self.write_back.load(Ordering::Relaxed) { IoFlags::NONE } else { IoFlags::FUA }
    }
}

/// What a queue tells its control thread.
#[derive(Debug)]
pub enum WorkerEvent {
    /// The guest's driver broke the protocol; the queue has stopped.
    Broken(QueueError),
    /// The reactor could not open its way into the bdev; every request fails.
    NoChannel(BdevError),
    /// The reactor's ring has no place for its notifications; the queue has stopped.
    NoNotifications(RingError),
    /// The reactor's ring does not take the guest's pinned memory; requests go on without.
    Unpinned(RingError),
}

/// Where a queue stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum QueueState {
    /// Not on a reactor.
    Stopped = 0,
    /// Takes requests.
    Running,
    /// Takes none, waits for those in flight.
    Draining,
    /// Takes none, none in flight.
    Quiesced,
    /// Ended by the guest's mistake.
    Broken,
}

impl QueueState {
    /// For status output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            QueueState::Stopped => "stopped",
            QueueState::Running => "running",
            QueueState::Draining => "draining",
            QueueState::Quiesced => "quiesced",
            QueueState::Broken => "broken",
        }
    }
}

/// A queue's figures, written by its reactor and read by control threads.
///
/// On lines of its own: its neighbour in memory may be another reactor's queue.
#[derive(Debug)]
#[repr(align(128))]
pub struct QueueStatus {
    /// Counters and stage times.
    pub stats: Arc<QueueStats>,
    state: AtomicU8,
    inflight_count: AtomicU32,
    next_avail: AtomicU32,
    next_used: AtomicU32,
    interrupts_count: AtomicU64,
    kicks_count: AtomicU64,
}

impl QueueStatus {
    /// A stopped queue with the figures that it had (they outlive sessions).
    #[must_use]
    pub fn new(stats: Arc<QueueStats>) -> QueueStatus {
        QueueStatus {
            stats,
            state: AtomicU8::new(QueueState::Stopped as u8),
            inflight_count: AtomicU32::new(0),
            next_avail: AtomicU32::new(0),
            next_used: AtomicU32::new(0),
            interrupts_count: AtomicU64::new(0),
            kicks_count: AtomicU64::new(0),
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> QueueState {
        match self.state.load(Ordering::Relaxed) {
            1 => QueueState::Running,
            2 => QueueState::Draining,
            3 => QueueState::Quiesced,
            4 => QueueState::Broken,
            _ => QueueState::Stopped,
        }
    }

    /// Requests in flight.
    #[must_use]
    pub fn inflight_count(&self) -> u32 {
        self.inflight_count.load(Ordering::Relaxed)
    }

    /// The available and used indices.
    #[must_use]
    pub fn indices(&self) -> (u32, u32) {
        (self.next_avail.load(Ordering::Relaxed), self.next_used.load(Ordering::Relaxed))
    }

    /// Interrupts sent and kicks received.
    #[must_use]
    pub fn notifications(&self) -> (u64, u64) {
        (self.interrupts_count.load(Ordering::Relaxed), self.kicks_count.load(Ordering::Relaxed))
    }

    pub(super) fn set_state(&self, state: QueueState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn show(&self, inflight: u32, avail: u32, used: u32) {
        self.inflight_count.store(inflight, Ordering::Relaxed);
        self.next_avail.store(avail, Ordering::Relaxed);
        self.next_used.store(used, Ordering::Relaxed);
    }

    pub(super) fn note_interrupt(&self) {
        self.interrupts_count
            .store(self.interrupts_count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(super) fn note_kicks(&self, count: u64) {
        self.kicks_count.store(self.kicks_count.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }
}
