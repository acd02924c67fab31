//! The outside of a reactor: how control threads start it, send it messages and read its figures.
//!
//! Flow: control thread → mailbox (lock-free) → reactor; wake-up by eventfd only when the reactor sleeps.
//! **Invariant:** a message that cannot be delivered comes back to its sender.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::limits::MAILBOX_MESSAGES_MAX;
use crate::mem::MappingError;
use crate::units::CoreId;

use super::sleep::SleepFlag;
use super::{PollerId, PollerInfo, Reactor, ReactorCx, Ring, RingError};

/// What a control thread asks a reactor to do between two polls. Short, non-blocking.
pub type Message = Box<dyn FnOnce(&mut Reactor) + Send>;

/// What a reactor without work does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Polls on: lowest latency, a whole core.
    Poll,
    /// Sleeps after this long without work, nanoseconds; the first kick wakes it.
    Adaptive {
        /// Polling time before a sleep.
        spin_ns: u64,
    },
}

impl IdlePolicy {
    /// As one number for the shared state: `u64::MAX` means poll.
    fn to_bits(self) -> u64 {
        match self {
            IdlePolicy::Poll => u64::MAX,
            IdlePolicy::Adaptive { spin_ns } => spin_ns.min(u64::MAX - 1),
        }
    }

    fn from_bits(bits: u64) -> IdlePolicy {
        if bits == u64::MAX { IdlePolicy::Poll } else { IdlePolicy::Adaptive { spin_ns: bits } }
    }
}

/// How to start a reactor.
#[derive(Clone, Debug)]
pub struct ReactorConfig {
    /// The core to pin to; `None` leaves the thread where the scheduler puts it (tests).
    pub core: Option<CoreId>,
    /// What to do without work.
    pub idle: IdlePolicy,
    /// Where io_uring's kernel workers may run; empty: anywhere.
    pub io_wq_cpus: Vec<usize>,
}

/// Why a reactor did not start or a message did not arrive.
#[derive(Debug, Error)]
pub enum ReactorError {
    /// No io_uring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MappingError),
    /// No thread or no eventfd.
    #[error("cannot start the reactor thread: {0}")]
    Spawn(#[source] io::Error),
    /// The processor does not exist or is not ours to use.
    #[error(
        "core {core} does not exist or is not available to this process; available cores: {available}"
    )]
    NoSuchCore {
        /// The core asked for.
        core: CoreId,
        /// The ones there are.
        available: String,
    },
}

/// A reactor's accounting, in ticks of the time-stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReactorStats {
    /// Time of passes in which work was found.
    pub busy_ticks: u64,
    /// All other time, sleep included.
    pub idle_ticks: u64,
    /// Passes made.
    pub passes_count: u64,
    /// Times slept.
    pub sleeps_count: u64,
    /// Kernel entries of its ring.
    pub ring_enters_count: u64,
    /// Bounce buffers used so far.
    pub bounces_count: u64,
}

#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct SharedStats {
    pub(super) busy_ticks: AtomicU64,
    pub(super) idle_ticks: AtomicU64,
    pub(super) passes_count: AtomicU64,
    pub(super) sleeps_count: AtomicU64,
    pub(super) ring_enters_count: AtomicU64,
    pub(super) bounces_count: AtomicU64,
}

/// What both sides see.
pub(super) struct Shared {
    pub(super) mailbox: ArrayQueue<Message>,
    pub(super) sleep: SleepFlag,
    pub(super) wake_fd: OwnedFd,
    pub(super) idle_bits: AtomicU64,
    pub(super) stop: AtomicBool,
    pub(super) stats: SharedStats,
    pub(super) pollers: Mutex<Vec<PollerInfo>>,
    core: Option<CoreId>,
    tid: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    #[inline]
    pub(super) fn idle(&self) -> IdlePolicy {
        IdlePolicy::from_bits(self.idle_bits.load(Ordering::Relaxed))
    }
}

/// A reactor as control threads know it. Cheap to clone.
#[derive(Clone)]
pub struct ReactorHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for ReactorHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReactorHandle").field("core", &self.shared.core).finish_non_exhaustive()
    }
}

/// Starts a reactor thread and waits until it polls.
///
/// # Errors
/// A core that does not exist, no io_uring, no memory or no thread.
pub fn spawn(config: &ReactorConfig) -> Result<ReactorHandle, ReactorError> {
    let pin = match config.core {
        None => None,
        Some(core) => {
            let known = core_affinity::get_core_ids().unwrap_or_default();
            let found = known.iter().find(|c| u32::try_from(c.id) == Ok(core.0)).copied();
            let list = || known.iter().map(|c| c.id.to_string()).collect::<Vec<_>>().join(", ");
            Some(found.ok_or_else(|| ReactorError::NoSuchCore { core, available: list() })?)
        }
    };
    let ring = Ring::new(&config.io_wq_cpus)?;
    let wake_fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| ReactorError::Spawn(io::Error::from(e)))?;
    let shared = Arc::new(Shared {
        mailbox: ArrayQueue::new(MAILBOX_MESSAGES_MAX),
        sleep: SleepFlag::new(),
        wake_fd,
        idle_bits: AtomicU64::new(config.idle.to_bits()),
        stop: AtomicBool::new(false),
        stats: SharedStats::default(),
        pollers: Mutex::new(Vec::new()),
        core: config.core,
        tid: AtomicU64::new(0),
        thread: Mutex::new(None),
    });
    let cx = ReactorCx::new(Some(ring))?;
    let (ready_sender, ready) = std::sync::mpsc::channel::<Result<(), RingError>>();
    let name = config.core.map_or_else(|| "reactor".to_owned(), |core| format!("reactor-{core}"));
    let for_thread = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name(name)
        .spawn(move || {
            if let Some(pin) = pin
                && !core_affinity::set_for_current(pin)
            {
                tracing::warn!(
                    "cannot pin the reactor to core {}; it runs where the scheduler puts it",
                    pin.id
                );
            }
            let tid = u64::from(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs());
            for_thread.tid.store(tid, Ordering::Relaxed);
            match Reactor::new(cx, for_thread) {
                Ok(mut reactor) => {
                    // The receiver waits below; if it is gone, there is nobody left to tell.
                    let _ = ready_sender.send(Ok(()));
                    reactor.run();
                }
                Err(error) => {
                    let _ = ready_sender.send(Err(error));
                }
            }
        })
        .map_err(ReactorError::Spawn)?;
    let started = ready.recv();
    if let Ok(mut slot) = shared.thread.lock() {
        *slot = Some(thread);
    }
    match started {
        Ok(Ok(())) => Ok(ReactorHandle { shared }),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => {
            Err(ReactorError::Spawn(io::Error::other("the reactor thread ended before it polled")))
        }
    }
}

impl ReactorHandle {
    /// Sends a message; it runs between two polls.
    ///
    /// # Errors
    /// Returns the message when the mailbox stays full for a second, which only a stuck reactor does.
    pub fn send(&self, message: Message) -> Result<(), Message> {
        let mut message = message;
        for attempt in 0..1000 {
            match self.shared.mailbox.push(message) {
                Ok(()) => {
                    self.wake();
                    return Ok(());
                }
                Err(back) => message = back,
            }
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Err(message)
    }

    /// Sends a message if the mailbox has room now.
    ///
    /// # Errors
    /// Returns the message.
    pub fn try_send(&self, message: Message) -> Result<(), Message> {
        self.shared.mailbox.push(message)?;
        self.wake();
        Ok(())
    }

    /// Runs `f` on the reactor and waits for its answer. For control threads only.
    ///
    /// # Errors
    /// `None` when the reactor has ended or does not answer within 5 s.
    pub fn ask<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Reactor) -> T + Send + 'static,
    ) -> Option<T> {
        if self.is_stopped() {
            return None;
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        self.send(Box::new(move |reactor| {
            let _ = sender.send(f(reactor));
        }))
        .ok()?;
        receiver.recv_timeout(Duration::from_secs(5)).ok()
    }

    /// After something was published for it: wakes it if it sleeps.
    #[inline]
    pub(crate) fn wake(&self) {
        if self.shared.sleep.must_wake() {
            // An eventfd write fails only at 2^64-1 pending wake-ups, and then the reactor is awake anyway.
            let _ = rustix::io::write(self.shared.wake_fd.as_fd(), &1u64.to_ne_bytes());
        }
    }

    /// Changes the idle policy.
    pub fn set_idle(&self, idle: IdlePolicy) {
        self.shared.idle_bits.store(idle.to_bits(), Ordering::Relaxed);
        self.wake();
    }

    /// The idle policy.
    #[must_use]
    pub fn idle(&self) -> IdlePolicy {
        self.shared.idle()
    }

    /// True while it sleeps (a moment's truth).
    #[must_use]
    pub fn is_sleeping(&self) -> bool {
        self.shared.sleep.is_set()
    }

    /// The core that it was started for.
    #[must_use]
    pub fn core(&self) -> Option<CoreId> {
        self.shared.core
    }

    /// The thread's id as the kernel numbers it.
    #[must_use]
    pub fn tid(&self) -> u64 {
        self.shared.tid.load(Ordering::Relaxed)
    }

    /// Its accounting so far.
    #[must_use]
    pub fn stats(&self) -> ReactorStats {
        let stats = &self.shared.stats;
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        ReactorStats {
            busy_ticks: get(&stats.busy_ticks),
            idle_ticks: get(&stats.idle_ticks),
            passes_count: get(&stats.passes_count),
            sleeps_count: get(&stats.sleeps_count),
            ring_enters_count: get(&stats.ring_enters_count),
            bounces_count: get(&stats.bounces_count),
        }
    }

    /// Its pollers.
    #[must_use]
    pub fn pollers(&self) -> Vec<PollerInfo> {
        self.shared.pollers.lock().map(|list| list.clone()).unwrap_or_default()
    }

    pub(crate) fn list_poller(&self, info: PollerInfo) {
        if let Ok(mut list) = self.shared.pollers.lock() {
            list.push(info);
        }
    }

    pub(crate) fn unlist_poller(&self, id: PollerId) {
        if let Ok(mut list) = self.shared.pollers.lock() {
            list.retain(|p| p.id != id);
        }
    }

    /// Asks the thread to end and waits for it. Pollers are dropped with it; quiesce them first.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        // Wake it whatever it does: a flag store is not a mailbox message, so do not rely on the handshake.
        let _ = rustix::io::write(self.shared.wake_fd.as_fd(), &1u64.to_ne_bytes());
        let thread = self.shared.thread.lock().ok().and_then(|mut slot| slot.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// True once it was told to end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// True when both name the same reactor.
    #[must_use]
    pub fn same(&self, other: &ReactorHandle) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}
