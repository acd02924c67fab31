//! What a controller's thread, its bdevs and whoever attached it share.
//!
//! Flow: bdevs and the handle send requests and look at the status → the thread answers and writes the status. Owner: all of
//! them, by `Arc`. **Invariant:** no lock in here is held while somebody waits for a device or a reactor.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use ringmill_core::mem::DmaDomain;
use ringmill_core::reactor::{DeviceKey, ReactorHandle};

use super::bdev::NvmeBdev;
use super::qpair::QueuePair;
use super::registers::Wanted;
use super::report::{ControllerInfo, ControllerState, Counters, Health, NamespaceInfo};
use super::{NvmeError, NvmeOptions, QueueCounters, QueueShared};
use crate::pci::{DeviceNews, PciBacking};

/// News that are kept while the thread waits for something else; as many as it reads in a turn.
const NEWS_KEPT_MAX: usize = 8;

/// How long what is under way is waited for when the device is wanted back, commands and all else; and when it is to be
/// detached.
const REMOVAL_PATIENCE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(300));
const DETACH_PATIENCE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(2));

/// All waits after such news together; what is left of 5 s is for hearing of it, and for what is no wait.
pub(super) const REMOVAL_WITHIN: Duration = Duration::from_millis(4500);

/// What the thread is asked for.
pub(super) enum Request<B: PciBacking> {
    Reset(SyncSender<Result<(), NvmeError>>),
    Health(SyncSender<Result<Health, NvmeError>>),
    /// Looks at the namespaces again.
    Rescan(SyncSender<Result<(), NvmeError>>),
    /// A queue pair for a channel without a reactor.
    Pair(SyncSender<Result<QueuePair<B::Registers>, NvmeError>>),
    Detach(SyncSender<()>),
}

/// A queue pair until a channel takes it along to its reactor.
pub(super) type Waiting<B> = Arc<Mutex<Option<QueuePair<<B as PciBacking>::Registers>>>>;

/// The queue pair of a reactor.
pub(super) struct HomePair<B: PciBacking> {
    pub(super) reactor: ReactorHandle,
    pub(super) waiting: Waiting<B>,
}

/// A namespace and its disk.
pub(super) struct Namespaced<B: PciBacking> {
    pub(super) info: NamespaceInfo,
    pub(super) bdev: Option<Arc<NvmeBdev<B>>>,
}

impl<B: PciBacking> Clone for Namespaced<B> {
    fn clone(&self) -> Namespaced<B> {
        Namespaced { info: self.info.clone(), bdev: self.bdev.clone() }
    }
}

/// What changes.
pub(super) struct Status<B: PciBacking> {
    pub(super) state: ControllerState,
    pub(super) last_error: Option<String>,
    pub(super) namespaces: BTreeMap<u32, Namespaced<B>>,
    pub(super) health: Option<(Health, Instant)>,
}

/// Rare events, written by the thread.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) timeouts: AtomicU64,
    pub(super) late_answers: AtomicU64,
    pub(super) aborts: AtomicU64,
    pub(super) aborts_done: AtomicU64,
    pub(super) resets: AtomicU64,
    pub(super) resets_failed: AtomicU64,
    pub(super) events: AtomicU64,
    /// Completions on the admin queue that belonged to nothing.
    pub(super) stale: AtomicU64,
}

impl Tally {
    pub(super) fn note(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The figures of all pairs, those that are gone included.
#[derive(Default)]
struct PairFigures {
    live: Vec<Weak<QueueShared>>,
    gone: QueueCounters,
}

fn add(sum: &mut QueueCounters, of: QueueCounters) {
    sum.commands += of.commands;
    sum.doorbells += of.doorbells;
    sum.splits += of.splits;
    sum.errors += of.errors;
    sum.retried += of.retried;
    sum.requeued += of.requeued;
    sum.overdue += of.overdue;
    sum.strange += of.strange;
}

/// Who waits for the end.
#[derive(Debug, Default)]
struct Ends {
    /// News that were read while the thread waited for something else.
    early: VecDeque<DeviceNews>,
    /// When it was heard that the device is wanted back, or gone.
    removal: Option<Instant>,
    /// When it was asked to be detached.
    detach: Option<Instant>,
    /// The thread is at it: nobody has to be told.
    is_detaching: bool,
}

impl Ends {
    fn note(&mut self, news: DeviceNews) {
        if matches!(news, DeviceNews::Requested | DeviceNews::Gone) && self.removal.is_none() {
            self.removal = Some(Instant::now());
        }
    }
}

/// See the module.
pub(super) struct Joint<B: PciBacking> {
    pub(super) key: DeviceKey,
    pub(super) options: NvmeOptions,
    pub(super) backing: Arc<B>,
    pub(super) domain: Arc<dyn DmaDomain>,
    /// What stays as it was at attach; state, counters and the last error are filled in when asked.
    pub(super) fixed: ControllerInfo,
    pub(super) homes: Vec<HomePair<B>>,
    /// The reactors with a pair, if there are others.
    pub(super) owners: Option<Vec<ReactorHandle>>,
    pub(super) tally: Tally,
    requests: Sender<Request<B>>,
    nudge: Arc<OwnedFd>,
    status: Mutex<Status<B>>,
    figures: Mutex<PairFigures>,
    shadow_lost: AtomicBool,
    ends: Mutex<Ends>,
}

impl<B: PciBacking> std::fmt::Debug for Joint<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Joint").field("name", &self.options.name).finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What attach has made.
pub(super) struct Parts<B: PciBacking> {
    pub(super) key: DeviceKey,
    pub(super) options: NvmeOptions,
    pub(super) backing: Arc<B>,
    pub(super) fixed: ControllerInfo,
    pub(super) homes: Vec<HomePair<B>>,
    pub(super) owners: Option<Vec<ReactorHandle>>,
    pub(super) requests: Sender<Request<B>>,
    pub(super) nudge: Arc<OwnedFd>,
}

impl<B: PciBacking> Joint<B> {
    pub(super) fn new(parts: Parts<B>) -> Joint<B> {
        Joint {
            key: parts.key,
            options: parts.options,
            domain: parts.backing.dma(),
            backing: parts.backing,
            fixed: parts.fixed,
            homes: parts.homes,
            owners: parts.owners,
            tally: Tally::default(),
            requests: parts.requests,
            nudge: parts.nudge,
            status: Mutex::new(Status {
                state: ControllerState::Enabled,
                last_error: None,
                namespaces: BTreeMap::new(),
                health: None,
            }),
            figures: Mutex::default(),
            shadow_lost: AtomicBool::new(false),
            ends: Mutex::default(),
        }
    }

    pub(super) fn status(&self) -> MutexGuard<'_, Status<B>> {
        locked(&self.status)
    }

    /// Doorbells are registers from now on.
    pub(super) fn lose_shadow(&self) {
        self.shadow_lost.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_shadow(&self) -> bool {
        self.fixed.shadow_doorbells && !self.shadow_lost.load(Ordering::Relaxed)
    }

    /// True for the first who asks.
    pub(super) fn begin_detach(&self) -> bool {
        let mut ends = locked(&self.ends);
        let is_first = ends.detach.is_none();
        ends.detach.get_or_insert_with(Instant::now);
        is_first
    }

    /// The thread does what it was asked for; only a removal is news from now on.
    pub(super) fn note_detaching(&self) {
        locked(&self.ends).is_detaching = true;
    }

    /// Whether somebody waits for the end: it is to be detached, or there is such news. The news are kept for
    /// [`Joint::next_news`].
    pub(super) fn wanted(&self) -> Option<Wanted> {
        let mut ends = locked(&self.ends);
        while ends.early.len() < NEWS_KEPT_MAX
            && let Some(news) = self.backing.news()
        {
            ends.note(news);
            ends.early.push_back(news);
        }
        let wanted =
            |(for_command, for_others)| move |since| Wanted { since, for_command, for_others };
        let detach = ends.detach.filter(|_| !ends.is_detaching);
        let removal = ends.removal.map(wanted(REMOVAL_PATIENCE));
        removal.or_else(|| detach.map(wanted(DETACH_PATIENCE)))
    }

    /// When a removal must be over that is known of.
    pub(super) fn removal_by(&self) -> Option<Instant> {
        locked(&self.ends).removal.map(|since| since + REMOVAL_WITHIN)
    }

    pub(super) fn next_news(&self) -> Option<DeviceNews> {
        let mut ends = locked(&self.ends);
        let news = ends.early.pop_front().or_else(|| self.backing.news())?;
        ends.note(news);
        Some(news)
    }

    pub(super) fn down(&self) -> NvmeError {
        let state = self.status().state.as_str();
        NvmeError::Down { name: self.options.name.clone(), state }
    }

    /// Sends a request and waits for the answer. The thread's every step is bounded, and it drops what it cannot answer.
    pub(super) fn ask<T>(
        &self,
        request: impl FnOnce(SyncSender<T>) -> Request<B>,
    ) -> Result<T, NvmeError> {
        let (sender, answer) = sync_channel(1);
        self.requests.send(request(sender)).map_err(|_| self.down())?;
        // An eventfd that is full says enough.
        let _ = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
        answer.recv().map_err(|_| self.down())
    }

    /// The end, after the device was closed: its namespaces, which hold this, are not held here.
    pub(super) fn forget(&self) {
        let namespaces = std::mem::take(&mut self.status().namespaces);
        // Outside of the lock: this may be the last that holds a bdev.
        drop(namespaces);
    }

    pub(super) fn count_pair(&self, shared: &Arc<QueueShared>) {
        locked(&self.figures).live.push(Arc::downgrade(shared));
    }

    /// A pair whose figures are final.
    pub(super) fn retire_pair(&self, shared: &Arc<QueueShared>) {
        let mut figures = locked(&self.figures);
        figures.live.retain(|live| !std::ptr::eq(live.as_ptr(), Arc::as_ptr(shared)));
        add(&mut figures.gone, shared.counters());
    }

    /// All pairs together.
    pub(super) fn pair_counters(&self) -> QueueCounters {
        let figures = locked(&self.figures);
        let mut sum = figures.gone;
        for shared in figures.live.iter().filter_map(Weak::upgrade) {
            add(&mut sum, shared.counters());
        }
        sum
    }

    pub(super) fn counters(&self) -> Counters {
        let (pairs, tally) = (self.pair_counters(), &self.tally);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            timeouts: get(&tally.timeouts),
            late_answers: get(&tally.late_answers),
            aborts: get(&tally.aborts),
            aborts_done: get(&tally.aborts_done),
            resets: get(&tally.resets),
            resets_failed: get(&tally.resets_failed),
            stale: pairs.strange + get(&tally.stale),
            retries: pairs.retried + pairs.requeued,
            events: get(&tally.events),
        }
    }
}
