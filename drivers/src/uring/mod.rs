//! Files and block devices of the kernel, through the reactor's io_uring.
//!
//! Flow: `open` looks at the image on a control thread, locks it and finds out what it can do; each reactor's channel
//! puts entries on its shared ring. Owner: the bdev owns the one open file description that all I/O and the lock use.
//! **Invariant:** nothing but `open` and `rescan` makes a system call that may block, and both run on control threads.

mod ability;
mod channel;
mod discard_thread;
mod error;
mod format;
#[cfg(test)]
mod live_tests;
mod lock;
mod mounts;
mod open;
mod probe;
mod ranges;
mod work;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use ringmill_core::bdev::{
    AlignChannel, Alignment, Bdev, BdevError, BdevInfo, BlockLocks, Channel, ChannelSeed,
};
use ringmill_core::io::Slots;
use ringmill_core::reactor::{Clock, ReactorHandle, Ring};

use crate::GateChannel;
use ability::Abilities;
use channel::UringChannel;

pub use error::{OpenProblem, UringOpenError};
pub use open::{CacheMode, UringOptions};

/// Requests of one channel in the kernel at a time; more wait on their virtqueues.
const REQUESTS_MAX: usize = 256;

/// Pause between two tries for an image's lock, and how long nobody needs to hear of them.
const RETRY_PERIOD: Duration = Duration::from_millis(10);
const TELL_AFTER: Duration = Duration::from_millis(500);

/// What all channels of one disk share.
#[derive(Debug)]
struct Shared {
    file: File,
    abilities: Abilities,
    /// Every write is stable before it completes.
    write_through: bool,
    /// RWF_ flags of every write.
    write_flags: i32,
    /// Through the host's page cache.
    buffered: bool,
    /// Ends of transfers are asked for (IOPOLL), not announced by interrupts.
    polled: bool,
    /// The medium is memory: transfers are done at once, by the reactor itself.
    in_place: bool,
    /// Bytes that lengths of transfers come in; a read that ends elsewhere met the end of the file.
    transfer_unit_bytes: u32,
    counters: Counters,
    /// The errno of a sync that failed through the page cache; 0: none. Linux reports such a failure once and then calls the
    /// lost pages clean, so no later sync may claim success.
    sync_failed: AtomicI32,
}

/// Rare events, over all channels.
#[derive(Debug, Default)]
struct Counters {
    /// Transfers that the kernel did in more than one piece.
    continued: AtomicU64,
    /// Operations tried again (EINTR, EAGAIN).
    retried: AtomicU64,
    /// Results that belonged to nothing.
    stale: AtomicU64,
}

impl Counters {
    #[cold]
    fn note(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

/// When a channel's oldest request started, nanoseconds of the reactor's clock; 0: nothing is in flight.
type OldestStart = AtomicU64;

/// A file or block device of the kernel.
#[derive(Debug)]
pub struct UringBdev {
    info: Arc<BdevInfo>,
    shared: Arc<Shared>,
    rules: Alignment,
    locks: Option<Arc<BlockLocks>>,
    channels: Mutex<Vec<Weak<OldestStart>>>,
    facts: Vec<(&'static str, String)>,
}

impl UringBdev {
    /// Opens an image for guests. Blocks; for control threads. Asks for the image's lock once: where
    /// [`UringOpenError::may_pass`] says so, the caller tries again for a while.
    ///
    /// # Errors
    /// One sentence that says what is wrong and what to do.
    pub fn open(name: &str, options: &UringOptions) -> Result<UringBdev, UringOpenError> {
        open::open(name, options)
    }

    /// As [`UringBdev::open`], but tries again for up to `patience` while somebody else has the image. The kernel holds a
    /// dead or ended process's lock until its last request is back and its ring is torn down: some tens of milliseconds
    /// after even an orderly end.
    ///
    /// # Errors
    /// As for `open`.
    pub fn open_patiently(
        name: &str,
        options: &UringOptions,
        patience: Duration,
    ) -> Result<UringBdev, UringOpenError> {
        let start = Instant::now();
        let mut told = false;
        loop {
            match open::open(name, options) {
                Err(error) if error.may_pass() && start.elapsed() < patience => {
                    if !told && start.elapsed() > TELL_AFTER {
                        tracing::warn!("{error}; trying again for {} s", patience.as_secs());
                        told = true;
                    }
                    std::thread::sleep(RETRY_PERIOD);
                }
                end => return end,
            }
        }
    }

    /// Age of the oldest request that the kernel has not answered, nanoseconds; 0 when nothing is in flight. Exact to
    /// some tenths of a second.
    #[must_use]
    pub fn oldest_inflight_ns(&self) -> u64 {
        let now_ns = Clock::real().now_ns();
        let channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let starts = channels.iter().filter_map(Weak::upgrade);
        let oldest = starts.map(|s| s.load(Ordering::Relaxed)).filter(|&ns| ns > 0).min();
        oldest.map_or(0, |start_ns| now_ns.saturating_sub(start_ns))
    }
}

impl Bdev for UringBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let oldest = Arc::new(OldestStart::new(0));
        {
            let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
            channels.retain(|c| c.strong_count() > 0);
            channels.push(Arc::downgrade(&oldest));
        }
        let (info, shared) = (Arc::clone(&self.info), Arc::clone(&self.shared));
        let (rules, locks) = (self.rules, self.locks.clone());
        let (slots, answers) = (Slots::new(REQUESTS_MAX), discard_thread::answers());
        // Built here for a reactor that has none yet.
        let polled = shared.polled.then(Ring::new_polled).transpose()?;
        Ok(Box::new(move |io| {
            let Some(ring) = &mut io.ring else {
                let reason = "a uring disk needs a reactor with an io_uring".to_owned();
                return Err(BdevError::Refused { name: info.name().to_owned(), reason });
            };
            let mut channel = UringChannel::open(shared, slots, answers, oldest, ring)?;
            if let Some(polled) = polled
                && let Err(error) = channel.poll_device(io, polled)
            {
                channel.close(io);
                return Err(error.into());
            }
            Ok(Box::new(GateChannel::new(AlignChannel::new(channel, rules, locks), info)))
        }))
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        let bytes = probe::size_bytes(&self.shared.file).map_err(|source| BdevError::Io {
            name: self.info.name().to_owned(),
            what: "cannot ask for the size".to_owned(),
            source,
        })?;
        Ok(bytes / u64::from(self.info.geometry().block_bytes))
    }

    fn driver_facts(&self) -> Vec<(&'static str, String)> {
        let counters = &self.shared.counters;
        let mut facts = self.facts.clone();
        facts.extend([
            ("memory_alignment_bytes", self.rules.address_bytes.to_string()),
            ("transfer_block_bytes", self.rules.block_bytes.to_string()),
            ("iopoll", self.shared.polled.to_string()),
            ("missing", self.shared.abilities.missing()),
            ("continued", counters.continued.load(Ordering::Relaxed).to_string()),
            ("retried", counters.retried.load(Ordering::Relaxed).to_string()),
            ("stale", counters.stale.load(Ordering::Relaxed).to_string()),
            ("oldest_inflight_ns", self.oldest_inflight_ns().to_string()),
        ]);
        facts
    }
}

impl Shared {
    /// A result as the guest may hear it: after one failed sync through the page cache every sync has failed. A stable
    /// write is a sync, too, and the failure that it is told of may be another write's.
    #[inline]
    fn sync_result(&self, stage: work::Stage, stable: bool, result: i32) -> i32 {
        if !self.buffered {
            return result;
        }
        match stage {
            work::Stage::Sync => self.buffered_sync_result(result),
            work::Stage::Transfer if stable && result == -libc::EIO => {
                self.buffered_sync_result(result)
            }
            _ => result,
        }
    }

    #[cold]
    #[inline(never)]
    fn buffered_sync_result(&self, result: i32) -> i32 {
        if result < 0 && ![-libc::EINTR, -libc::EAGAIN].contains(&result) {
            self.sync_failed.store(result, Ordering::Relaxed);
            return result;
        }
        match self.sync_failed.load(Ordering::Relaxed) {
            0 => result,
            failed => failed,
        }
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}
