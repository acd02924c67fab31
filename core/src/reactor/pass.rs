//! HOT PATH
//! The reactor's loop.
//!
//! Owner: the reactor thread. **Invariant:** a pass makes no system call unless the ring has something to submit or
//! to run, and no poller is skipped but those that are parked: they have asked to be notified.
//!
//! loop:
//!   messages (bounded) → reap ring → unpark → poll every poller, park the idle ones → timers → commit ring → account
//!   without work for the spin time: announce sleep → prepare every poller → wait on the ring

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::limits::MAILBOX_MESSAGES_PER_PASS;

use super::clock::ticks_now;
use super::handle::Shared;
use super::parking::{Parking, Patience};
use super::{ClientId, IdlePolicy, Poller, PollerCounters, PollerId, ReactorCx, Ring, RingError};

/// The longest sleep: a safety net, not a mechanism.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// How often rare checks are made.
const LOOK_EVERY_NS: u64 = 1_000_000_000;
const WAKE_TOKEN: u64 = 1;

pub(super) struct Entry {
    pub(super) id: PollerId,
    pub(super) poller: Box<dyn Poller>,
    pub(super) counters: Arc<PollerCounters>,
    pub(super) patience: Patience,
}

pub(super) struct Timed {
    pub(super) entry: Entry,
    pub(super) period_ns: u64,
    pub(super) due_ns: u64,
}

/// A reactor, as its own thread and the messages that run on it see it.
pub struct Reactor {
    /// What pollers and channels use.
    pub cx: ReactorCx,
    pub(super) pollers: Vec<Entry>,
    pub(super) parking: Parking,
    pub(super) timed: Vec<Timed>,
    shared: Arc<Shared>,
    wake_client: ClientId,
    pub(super) last_work_ns: u64,
    last_ticks: u64,
    next_look_ns: u64,
    /// The wake-up descriptor is to be watched (again).
    wake_unwatched: bool,
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").field("pollers", &self.pollers.len()).finish_non_exhaustive()
    }
}

#[inline]
fn bump(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Reactor {
    #[cold]
    pub(super) fn new(mut cx: ReactorCx, shared: Arc<Shared>) -> Result<Reactor, RingError> {
        let mut wake_client = None;
        if let Some(ring) = &mut cx.io.ring {
            ring.enable()?;
            let client = ring.add_client(4)?;
            ring.watch(client, WAKE_TOKEN, shared.wake_fd.as_raw_fd());
            wake_client = Some(client);
        }
        let wake_client = wake_client.ok_or(RingError::Clients)?;
        let last_work_ns = cx.io.clock.now_ns();
        Ok(Reactor {
            cx,
            pollers: Vec::with_capacity(64),
            parking: Parking::default(),
            timed: Vec::with_capacity(16),
            shared,
            wake_client,
            last_work_ns,
            last_ticks: ticks_now(),
            next_look_ns: 0,
            wake_unwatched: false,
        })
    }

    pub(super) fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let work = self.pass();
            self.account(work);
            if self.cx.pass_ns >= self.next_look_ns {
                self.look_after();
            }
            if work {
                self.last_work_ns = self.cx.pass_ns;
                continue;
            }
            // Leaves the guest alone with the ring's lines for a moment: looking without a pause takes them away between the
            // stores that make up one request. Measured at depth 1: 670 instead of 700 ns.
            std::hint::spin_loop();
            if let IdlePolicy::Adaptive { spin_ns } = self.shared.idle()
                && self.cx.pass_ns.saturating_sub(self.last_work_ns) >= spin_ns
            {
                self.sleep();
                self.charge_idle();
            }
        }
        self.detach_all();
    }

    /// One pass over everything; true when work was found.
    pub fn pass(&mut self) -> bool {
        self.cx.pass_ns = self.cx.io.clock.now_ns();
        let mut work = false;
        if !self.shared.mailbox.is_empty() {
            work |= self.read_mailbox();
        }
        if let Some(ring) = &mut self.cx.io.ring {
            work |= ring.reap() > 0;
            let woken = ring.has_woken();
            if self.wake_unwatched || ring.has_events(self.wake_client) {
                self.rearm_wake();
            }
            if woken {
                self.unpark_woken();
            }
        }
        if let Some(ring) = &mut self.cx.io.polled {
            work |= ring.reap() > 0;
        }
        work |= self.poll_all();
        if !self.timed.is_empty() {
            work |= self.run_timers();
        }
        for ring in [&mut self.cx.io.ring, &mut self.cx.io.polled].into_iter().flatten() {
            ring.commit();
        }
        self.cx.io.devices.commit(self.cx.pass_ns);
        work
    }

    #[inline]
    fn poll_all(&mut self) -> bool {
        let now_ns = self.cx.pass_ns;
        let mut work = false;
        let mut at = 0;
        while let Some(entry) = self.pollers.get_mut(at) {
            let busy = entry.poller.poll(&mut self.cx);
            entry.counters.note(busy);
            work |= busy;
            if busy {
                entry.patience.restart(now_ns);
            } else if entry.patience.is_over(now_ns) && self.park(at) {
                // The last poller has taken its place.
                continue;
            }
            at += 1;
        }
        work
    }

    /// Leaves a poller out of the passes if it agrees.
    #[cold]
    #[inline(never)]
    fn park(&mut self, at: usize) -> bool {
        let entry = &mut self.pollers[at];
        let client = entry.poller.park(&mut self.cx);
        entry.patience.restart(self.cx.pass_ns);
        let (Some(client), Some(ring)) = (client, &mut self.cx.io.ring) else { return false };
        let entry = self.pollers.swap_remove(at);
        match self.parking.park(entry, client, ring, self.cx.pass_ns) {
            Ok(()) => true,
            Err(entry) => {
                self.pollers.push(entry);
                false
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn unpark_woken(&mut self) {
        while let Some(key) = self.cx.io.ring.as_mut().and_then(Ring::next_woken) {
            self.unpark(key);
        }
    }

    #[cold]
    pub(super) fn unpark(&mut self, key: u32) {
        let ring = self.cx.io.ring.as_mut();
        if let Some(entry) = self.parking.take(key, ring, self.cx.pass_ns) {
            self.pollers.push(entry);
        }
    }

    #[inline]
    fn account(&mut self, work: bool) {
        let now = ticks_now();
        let spent = now.wrapping_sub(self.last_ticks);
        self.last_ticks = now;
        let stats = &self.shared.stats;
        bump(if work { &stats.busy_ticks } else { &stats.idle_ticks }, spent);
        bump(&stats.passes_count, 1);
        if work {
            let rings = [&self.cx.io.ring, &self.cx.io.polled];
            let enters = rings.into_iter().flatten().map(Ring::enters_count).sum();
            stats.ring_enters_count.store(enters, Ordering::Relaxed);
            stats.bounces_count.store(self.cx.io.bounces_count(), Ordering::Relaxed);
        }
    }

    /// Books the time of a sleep, whatever the wake-up brings.
    #[cold]
    fn charge_idle(&mut self) {
        let now = ticks_now();
        bump(&self.shared.stats.idle_ticks, now.wrapping_sub(self.last_ticks));
        self.last_ticks = now;
    }

    #[cold]
    #[inline(never)]
    fn read_mailbox(&mut self) -> bool {
        let mut work = false;
        for _ in 0..MAILBOX_MESSAGES_PER_PASS {
            let Some(message) = self.shared.mailbox.pop() else { break };
            message(self);
            work = true;
        }
        work
    }

    #[cold]
    #[inline(never)]
    fn rearm_wake(&mut self) {
        let Some(ring) = &mut self.cx.io.ring else { return };
        while let Some(event) = ring.next_event(self.wake_client) {
            self.wake_unwatched |= !event.more;
        }
        if self.wake_unwatched {
            let fd = self.shared.wake_fd.as_raw_fd();
            self.wake_unwatched = !ring.watch(self.wake_client, WAKE_TOKEN, fd);
        }
        // The counter is never read: a multishot poll reports each write, and 2^64 writes do not happen.
    }

    #[inline(never)]
    fn run_timers(&mut self) -> bool {
        let mut work = false;
        for timed in &mut self.timed {
            if timed.due_ns <= self.cx.pass_ns {
                timed.due_ns = self.cx.pass_ns + timed.period_ns;
                let busy = timed.entry.poller.poll(&mut self.cx);
                timed.entry.counters.note(busy);
                work |= busy;
            }
        }
        work
    }

    #[cold]
    #[inline(never)]
    fn sleep(&mut self) {
        self.shared.sleep.announce();
        let mut awake = self.wake_unwatched
            || !self.shared.mailbox.is_empty()
            || self.shared.stop.load(Ordering::Acquire);
        // Those that are parked have published it already.
        for entry in &mut self.pollers {
            // Every poller is asked even after one has said no: each must publish its wish to be notified or keep
            // polling, and asking is idempotent.
            awake |= entry.poller.prepare_sleep(&mut self.cx);
        }
        if let Some(ring) = &mut self.cx.io.ring {
            awake |= self.cx.io.devices.prepare_sleep(ring);
            ring.commit();
            awake |= ring.reap() > 0;
            if !awake {
                let next_due = self.timed.iter().map(|t| t.due_ns).min();
                let now = self.cx.io.clock.now_ns();
                let timeout =
                    next_due.map_or(SLEEP_MAX, |due| Duration::from_nanos(due.saturating_sub(now)));
                ring.wait(timeout.min(SLEEP_MAX));
                bump(&self.shared.stats.sleeps_count, 1);
            }
            self.cx.io.devices.wake(ring, self.cx.io.clock.now_ns());
        }
        self.shared.sleep.clear();
    }

    /// The checks that are made about once a second.
    #[cold]
    #[inline(never)]
    fn look_after(&mut self) {
        self.next_look_ns = self.cx.pass_ns + LOOK_EVERY_NS;
        for entry in self.pollers.iter_mut().chain(self.parking.iter_mut()) {
            entry.poller.look_after(&mut self.cx);
        }
        for ring in [&mut self.cx.io.ring, &mut self.cx.io.polled].into_iter().flatten() {
            if let Some(error) = ring.take_error() {
                tracing::error!("the reactor's io_uring reports: {error}");
            }
        }
    }
}
