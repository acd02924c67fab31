//! The controller's thread: it watches, answers, and mends.
//!
//! In: requests, nudges of queue pairs, events and status of the device, news of its backing. Out: orders to the pairs, the
//! status, events to whoever attached it. Owner: one thread per controller, which owns the controller.
//! **Invariant:** it waits for nothing without bound, and nothing that comes from the device makes it turn without a pause.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use ringmill_core::reactor::ReactorHandle;
use ringmill_core::spec::nvme::csts;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::controller::Controller;
use super::events::Unread;
use super::identify::warning_words;
use super::joint::{Joint, Request};
use super::pairs::Pair;
use super::report::ControllerState;
use super::{NvmeError, NvmeEvent, NvmeEvents};
use crate::pci::{DeviceNews, PciBacking, take_signal};

/// Looks at a controller with commands out, and at one without.
const LOOK_BUSY: Duration = Duration::from_millis(100);
const LOOK_IDLE: Duration = Duration::from_secs(1);

/// While something is under way that a pair or the device has to end.
const LOOK_SOON: Duration = Duration::from_millis(5);

/// The least pause between two turns: a device that raises interrupts and events without end gets a small part of a core.
const PAUSE: Duration = Duration::from_micros(500);

/// How old a health report may be.
const HEALTH_AGE_MAX: Duration = Duration::from_secs(5);

/// What the thread owns.
pub(super) struct Keeper<B: PciBacking> {
    pub(super) controller: Controller<B>,
    pub(super) common: Arc<Joint<B>>,
    pub(super) pairs: Vec<Pair>,
    /// The highest queue id that the controller granted.
    pub(super) pairs_max: u16,
    pub(super) interrupts: super::pairs::InterruptPlan,
    pub(super) events: NvmeEvents,
    pub(super) requests: Receiver<Request<B>>,
    pub(super) nudge: Arc<OwnedFd>,
    /// Where vector 0 goes.
    pub(super) interrupt: Arc<OwnedFd>,
    /// It was given up: nothing more is asked of it.
    pub(super) lost: bool,
    pub(super) resets: VecDeque<Instant>,
    pub(super) commands_seen: u64,
    pub(super) stale_seen: u64,
    pub(super) warnings_seen: u8,
    pub(super) unread: Unread,
    pub(super) last_look: Instant,
    /// When somebody last slept beside the shared vector.
    pub(super) last_wanted: Instant,
    /// The shared vector is bound to `interrupt`.
    pub(super) bound: bool,
    /// When the log last heard of late commands.
    pub(super) last_told: Option<Instant>,
}

/// Whether the thread goes on.
enum Turn {
    Again,
    Over,
}

impl<B: PciBacking> Keeper<B> {
    /// The thread.
    pub(super) fn run(mut self) {
        let mut soon = false;
        loop {
            let had_interrupt = self.wait(soon);
            if let Turn::Over = self.answer() {
                return;
            }
            if self.lost {
                soon = false;
                continue;
            }
            self.read_news();
            if had_interrupt {
                self.pass_interrupt_on();
            }
            self.watch_status();
            self.read_events();
            self.heed_events();
            soon = self.watch_pairs();
            self.bind_interrupt();
            std::thread::sleep(PAUSE);
        }
    }

    /// Until something happens, or it is time to look. True when the interrupt came.
    fn wait(&mut self, soon: bool) -> bool {
        let commands = self.common.pair_counters().commands;
        let is_busy = std::mem::replace(&mut self.commands_seen, commands) != commands;
        let pause = match (soon, is_busy) {
            (true, _) => LOOK_SOON,
            (_, true) => LOOK_BUSY,
            _ => LOOK_IDLE,
        };
        let unread = self.unread.due_in().filter(|_| !self.lost);
        let pause = unread.map_or(pause, |due| due.min(pause));
        let timeout = Timespec {
            tv_sec: i64::try_from(pause.as_secs()).unwrap_or(1),
            tv_nsec: i64::from(pause.subsec_nanos()),
        };
        let backing = Arc::clone(&self.common.backing);
        let mut fds = vec![
            PollFd::new(&self.nudge, PollFlags::IN),
            PollFd::new(&self.interrupt, PollFlags::IN),
        ];
        if !self.lost
            && let Some(news) = backing.news_fd()
        {
            fds.push(PollFd::from_borrowed_fd(news, PollFlags::IN));
        }
        // A signal, or a descriptor that was closed meanwhile, only means to look now.
        let _ = poll(&mut fds, Some(&timeout));
        take_signal(&self.nudge);
        take_signal(&self.interrupt)
    }

    fn answer(&mut self) -> Turn {
        loop {
            let request = match self.requests.try_recv() {
                Ok(request) => request,
                // It cannot be cut off: the other end is held here, too.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Turn::Again,
            };
            // Whoever asked may have gone; then nobody hears the answer.
            match request {
                Request::Detach(answer) => {
                    self.detach();
                    let _ = answer.send(());
                    return Turn::Over;
                }
                Request::Reset(answer) => {
                    let end = self.unless_lost(|me| me.reset_uncounted("it was asked for"));
                    let _ = answer.send(end);
                }
                Request::Rescan(answer) => {
                    let end = self.unless_lost(|me| me.refresh_namespaces().map(|_| ()));
                    self.unread.ask_now();
                    let _ = answer.send(end);
                }
                Request::Health(answer) => {
                    let end = self.unless_lost(Keeper::health);
                    let _ = answer.send(end);
                }
                Request::Pair(answer) => {
                    let end = self.unless_lost(Keeper::make_loose_pair);
                    let _ = answer.send(end);
                }
            }
        }
    }

    fn unless_lost<T>(
        &mut self,
        f: impl FnOnce(&mut Self) -> Result<T, NvmeError>,
    ) -> Result<T, NvmeError> {
        if self.lost {
            return Err(self.common.down());
        }
        let end = f(self);
        if let Err(error) = &end {
            self.after_failure(error);
        }
        end
    }

    /// What an error of an admin command means for the controller.
    pub(super) fn after_failure(&mut self, error: &NvmeError) {
        if self.lost {
            return;
        }
        if error.is_gone() {
            self.lose(&error.to_string());
        } else if self.controller.admin.is_broken() {
            // What the reset ends with is in the status and the log.
            let _ = self.reset(&error.to_string());
        }
    }

    pub(super) fn set_state(&self, state: ControllerState) {
        {
            let mut status = self.common.status();
            if status.state == state {
                return;
            }
            status.state = state;
        }
        (self.events)(NvmeEvent::State);
    }

    pub(super) fn name(&self) -> &str {
        &self.common.options.name
    }

    fn read_news(&mut self) {
        // A bound: whatever a backing says, the rest of the turn comes, too.
        for _ in 0..8 {
            if self.lost {
                return;
            }
            match self.common.next_news() {
                None => return,
                Some(DeviceNews::Gone) => self.lose("it was pulled out"),
                Some(DeviceNews::Requested) => self.let_go("somebody else asked for it"),
                Some(DeviceNews::Error) => {
                    let _ = self.reset("its bus reported an error");
                }
            }
        }
    }

    /// CSTS, at each look: fatal, gone, or no longer ready.
    fn watch_status(&mut self) {
        if self.lost || self.last_look.elapsed() < LOOK_BUSY / 2 {
            return;
        }
        self.last_look = Instant::now();
        match self.controller.bar.status() {
            Err(error) => self.lose(&error.to_string()),
            Ok(status) if status & csts::CFS != 0 => {
                let _ = self.reset("it reports a fatal error (CSTS.CFS)");
            }
            Ok(status) if status & csts::RDY == 0 => {
                let _ = self.reset("it is not ready any more");
            }
            Ok(_) => {}
        }
    }

    /// SMART, from the device if what is known is too old.
    fn health(&mut self) -> Result<super::Health, NvmeError> {
        let known = self.common.status().health.clone();
        match known.filter(|(_, at)| at.elapsed() < HEALTH_AGE_MAX) {
            Some((health, at)) => Ok(super::Health { age: at.elapsed(), ..health }),
            None => self.read_health(),
        }
    }

    /// SMART from the device, which also allows the next event about it.
    pub(super) fn read_health(&mut self) -> Result<super::Health, NvmeError> {
        let health = self.controller.health()?;
        let news = health.critical_warning & !self.warnings_seen;
        self.warnings_seen = health.critical_warning;
        if news != 0 {
            tracing::warn!("{} warns: {}", self.name(), warning_words(news).join(", "));
        }
        self.common.status().health = Some((health.clone(), Instant::now()));
        Ok(health)
    }
}

/// Makes a reactor look at its queue pairs, also if it sleeps. A full mailbox will be read anyway.
pub(super) fn nudge(reactor: Option<&ReactorHandle>) {
    if let Some(reactor) = reactor {
        let _ = reactor.try_send(Box::new(|_| {}));
    }
}
