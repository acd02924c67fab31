//! What the controller's thread does when things break: late commands, resets, the end.
//!
//! Flow: late command → look → Abort → reset; trouble, fatal status → reset: Hold, stop the device, Disabled, start it, queues,
//! Run; no way back, or gone → close the backing, Fail. Owner: the controller's thread. **Invariant:** Disabled is ordered only
//! after the device has provably stopped (RDY = 0 after CC.EN = 0 or FLR), Fail only after that or after
//! `PciBacking::close`; so nothing is requeued or failed whose memory the device may still touch.

use std::time::{Duration, Instant};

use ringmill_core::reactor::{DeviceKey, DeviceQueue, IoCx, Message, Reactor, ReactorHandle};

use super::channel::take_out;
use super::joint::{REMOVAL_WITHIN, Tally};
use super::pairs::{Late, Pair};
use super::qpair::QueuePair;
use super::report::ControllerState;
use super::shared::Overdue;
use super::thread::{Keeper, nudge};
use super::{ActionOnTimeout, FailReason, NvmeError, NvmeEvent, Order};
use crate::pci::{PciBacking, Registers};

/// Between the report of a late command and the decision that its answer is not there.
const LOOK_FOR: Duration = Duration::from_millis(20);

/// Between an Abort that found nothing to abort and the decision that the command has not ended either.
const REFUSED_LOOK_FOR: Duration = Duration::from_millis(200);

/// For the completion of a command that the device says it has aborted.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// For reactors to obey. One that takes longer is told again when it comes back.
const OBEY_WITHIN: Duration = Duration::from_secs(2);

/// When the device is wanted back or gone, everything must be over within 5 s: what was under way is cut off after 1 s, or
/// these two, then closing takes [`CLOSE_WITHIN`] at most, and reactors have the rest, at least [`OBEY_LEAST`], to say that
/// they have ended everything.
const OBEY_SOON: Duration = Duration::from_millis(500);
const STOP_SOON: Duration = Duration::from_secs(1);
const CLOSE_WITHIN: Duration = Duration::from_secs(2);
const OBEY_LEAST: Duration = Duration::from_millis(500);
const OBEY_LAST: Duration = Duration::from_secs(1);
const _: () = assert!(
    OBEY_SOON.as_millis()
        + STOP_SOON.as_millis()
        + CLOSE_WITHIN.as_millis()
        + OBEY_LEAST.as_millis()
        <= REMOVAL_WITHIN.as_millis()
);

/// The orderly end: for deleting queues, and for that, the shutdown and the stop together. With the waits for reactors before
/// and after it, 5 s.
const DELETE_WITHIN: Duration = Duration::from_secs(1);
const STOP_WITHIN: Duration = Duration::from_secs(4);

/// Resets in a row: so many within the window, and it is given up.
const RESETS_MAX: usize = 8;
const RESETS_WINDOW: Duration = Duration::from_secs(60);

/// Tries to start it again within one reset; the second one after a reset of the function.
const STARTS_MAX: usize = 2;

impl<B: PciBacking> Keeper<B> {
    /// Looks at every pair. True when something is to be looked at again soon.
    pub(super) fn watch_pairs(&mut self) -> bool {
        if self.lost {
            return false;
        }
        for at in 0..self.pairs.len() {
            if let Some(trouble) = self.pairs[at].shared.trouble()
                && self.pairs[at].exists
            {
                let queue_id = self.pairs[at].queue_id;
                let _ =
                    self.reset(&format!("queue {queue_id} had a wrong completion ({trouble:?})"));
                return true;
            }
            if let Some(overdue) = self.pairs[at].shared.overdue()
                && self.pairs[at].exists
                && self.is_reset_after(at, overdue)
            {
                return true;
            }
        }
        if let Err(error) = self.collect_dropped() {
            tracing::warn!("{}: {error}", self.name());
            self.after_failure(&error);
        } else if let Err(error) = self.restart_pairs() {
            if error.is_gone() {
                self.lose(&error.to_string());
            } else {
                // Without its queues that reactor's requests would wait for ever; resets in a row are counted.
                let _ = self.reset(&error.to_string());
            }
        }
        // Pairs that have not obeyed say so when they do; those that nobody has fetched never may.
        let lacks_queues = |pair: &Pair| !pair.exists && pair.shared.is_obeyed();
        self.pairs.iter().any(|pair| pair.late.is_some() || lacks_queues(pair))
    }

    /// A command without an answer. True when it came to a reset.
    fn is_reset_after(&mut self, at: usize, overdue: Overdue) -> bool {
        let sequence = overdue.sequence;
        let late = match self.pairs[at].late {
            Some(late) if late.sequence() == sequence => late,
            _ => {
                // Its reactor may sleep through a lost interrupt.
                nudge(self.pairs[at].home.as_ref());
                self.note_timeout(self.pairs[at].queue_id, overdue.cid);
                let late = Late::Looking(sequence, Instant::now());
                self.pairs[at].late = Some(late);
                late
            }
        };
        if overdue.ended {
            let tally = &self.common.tally;
            let counter = match late {
                Late::Looking(..) | Late::Refused(..) => &tally.late_answers,
                Late::Aborting(..) => &tally.aborts_done,
            };
            Tally::note(counter);
            self.settle(at, sequence);
            return false;
        }
        match late {
            Late::Looking(_, since) if since.elapsed() < LOOK_FOR => false,
            Late::Looking(..) => match self.common.options.action_on_timeout {
                ActionOnTimeout::None => {
                    self.settle(at, sequence);
                    false
                }
                ActionOnTimeout::Abort => self.is_reset_after_abort(at, overdue),
                ActionOnTimeout::Reset => {
                    let _ = self.reset("a command had no answer in time");
                    true
                }
            },
            Late::Refused(_, since) if since.elapsed() < REFUSED_LOOK_FOR => false,
            Late::Refused(..) => {
                let _ = self.reset("it could not abort a command that had no answer in time");
                true
            }
            Late::Aborting(_, since) if since.elapsed() < ABORT_GRACE => false,
            Late::Aborting(..) => {
                let _ = self.reset("a command did not end after its abort");
                true
            }
        }
    }

    fn settle(&mut self, at: usize, sequence: u32) {
        self.pairs[at].late = None;
        self.pairs[at].shared.settle(sequence);
        nudge(self.pairs[at].home.as_ref());
    }

    fn is_reset_after_abort(&mut self, at: usize, overdue: Overdue) -> bool {
        Tally::note(&self.common.tally.aborts);
        let queue_id = self.pairs[at].queue_id;
        let within = self.common.options.timeout_admin;
        // One at a time, so the device's limit (ACL) is kept.
        match self.controller.abort(queue_id, overdue.cid, within) {
            Ok(is_done) => {
                let shared = &self.pairs[at].shared;
                let has_ended = shared.overdue().is_some_and(|now| now.ended);
                if is_done || has_ended {
                    self.pairs[at].late = Some(Late::Aborting(overdue.sequence, Instant::now()));
                    return false;
                }
                // It may just have ended: then there was nothing to abort.
                nudge(self.pairs[at].home.as_ref());
                self.pairs[at].late = Some(Late::Refused(overdue.sequence, Instant::now()));
                false
            }
            Err(error) if error.is_gone() => {
                self.lose(&error.to_string());
                true
            }
            Err(error) => {
                let _ = self.reset(&error.to_string());
                true
            }
        }
    }

    /// Stops the controller and starts it again; requests in flight are done once more.
    pub(super) fn reset(&mut self, why: &str) -> Result<(), NvmeError> {
        let now = Instant::now();
        self.resets.retain(|at| now.duration_since(*at) < RESETS_WINDOW);
        self.resets.push_back(now);
        self.reset_uncounted(why)
    }

    /// The same where somebody asked for it: no sign of a controller that should be given up.
    pub(super) fn reset_uncounted(&mut self, why: &str) -> Result<(), NvmeError> {
        tracing::warn!("{}: resetting it: {why}", self.name());
        Tally::note(&self.common.tally.resets);
        self.common.status().last_error = Some(why.to_owned());
        self.set_state(ControllerState::Resetting);
        self.order_all(Order::Hold);
        self.wait_obeyed_with_device(OBEY_WITHIN);
        match self.controller.halt(Duration::MAX) {
            Ok(()) => {}
            Err(error) if error.is_gone() => {
                self.lose(&error.to_string());
                return Err(error);
            }
            Err(error) => {
                self.give_up(&error);
                return Err(error);
            }
        }
        self.forget_queues();
        self.order_all(Order::Disabled);
        self.wait_obeyed_with_device(OBEY_WITHIN);
        let end = if self.resets.len() > RESETS_MAX {
            let name = self.common.options.name.clone();
            Err(NvmeError::Refused {
                device: name,
                reason: format!(
                    "{RESETS_MAX} resets within {} s; the last: {why}",
                    RESETS_WINDOW.as_secs()
                ),
            })
        } else {
            self.start_again()
        };
        match end {
            Ok(()) => {
                self.set_state(ControllerState::Enabled);
                tracing::info!("{}: it works again", self.name());
                Ok(())
            }
            Err(error) if error.is_gone() => {
                self.lose(&error.to_string());
                Err(error)
            }
            Err(error) => {
                self.give_up(&error);
                Err(error)
            }
        }
    }

    fn forget_queues(&mut self) {
        for pair in &mut self.pairs {
            (pair.exists, pair.late) = (false, None);
        }
        // Of another life.
        self.stale_seen = self.controller.admin.stale_count();
    }

    fn start_again(&mut self) -> Result<(), NvmeError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match self.start_once() {
                Ok(()) => return Ok(()),
                Err(error) if error.is_gone() || tries >= STARTS_MAX => return Err(error),
                Err(error) => error,
            };
            tracing::warn!("{}: {error}; resetting its PCI function", self.name());
            // What was made in the first try is stopped and forgotten; pairs that ran for a moment obey once more.
            self.order_all(Order::Hold);
            self.wait_obeyed_with_device(OBEY_WITHIN);
            self.controller.reset_function()?;
            self.forget_queues();
            self.order_all(Order::Disabled);
            self.wait_obeyed_with_device(OBEY_WITHIN);
        }
    }

    fn start_once(&mut self) -> Result<(), NvmeError> {
        let (serial, model) = {
            let data = &self.controller.data;
            (data.serial.clone(), data.model.clone())
        };
        self.controller.enable()?;
        self.controller.identify()?;
        let data = &self.controller.data;
        // Requests that were meant for one disk must not reach another one.
        if (data.serial.as_str(), data.model.as_str()) != (serial.as_str(), model.as_str()) {
            let found = format!("{} {}", data.model, data.serial);
            return Err(self.controller.bar.nonsense(format!(
                "it was {model} {serial} before its reset, and is {found} now"
            )));
        }
        let most = self.pairs.iter().map(|pair| pair.queue_id).max().unwrap_or(0);
        let granted = self.controller.ask_for_pairs(self.pairs_max)?;
        if granted < most {
            return Err(self.controller.bar.refused(format!(
                "it grants {granted} queue pairs after its reset, {most} are in use; detach it and attach it again"
            )));
        }
        self.controller.set_up_shadow(self.pairs_max)?;
        // Before anything is sent again: a namespace that is another one now must not get it.
        self.refresh_namespaces()?;
        self.restart_pairs()?;
        self.controller.watch_events()
    }

    /// Something wants the device back: what can be done cleanly is, the rest is cut off; all within 5 s of when that was heard.
    pub(super) fn let_go(&mut self, why: &str) {
        self.controller.bar.wanted_back = None;
        let start = Instant::now();
        self.order_all(Order::Hold);
        self.wait_obeyed(OBEY_SOON.min(self.left_for(start, CLOSE_WITHIN + OBEY_LEAST)));
        let left = self.left_for(start, CLOSE_WITHIN + OBEY_LEAST);
        if let Err(error) = self.controller.disable(STOP_SOON.min(left)) {
            tracing::warn!("{}: {error}", self.name());
        }
        self.lose(why);
    }

    /// How long a step of a removal may take that leaves so much to the next ones.
    fn left_for(&self, start: Instant, next_ones: Duration) -> Duration {
        let by = self.common.removal_by().unwrap_or(start + REMOVAL_WITHIN);
        by.saturating_duration_since(Instant::now()).saturating_sub(next_ones)
    }

    /// It is gone: whoever waits is told.
    pub(super) fn lose(&mut self, why: &str) {
        self.end(why, ControllerState::Removed, FailReason::Gone);
    }

    /// It is here, but no reset brings it back.
    fn give_up(&mut self, error: &NvmeError) {
        Tally::note(&self.common.tally.resets_failed);
        self.end(&error.to_string(), ControllerState::Failed, FailReason::Reset);
    }

    fn end(&mut self, why: &str, state: ControllerState, reason: FailReason) {
        if self.lost {
            return;
        }
        self.lost = true;
        tracing::error!("{}: it is lost: {why}", self.name());
        self.common.status().last_error = Some(why.to_owned());
        self.cut_off(reason, OBEY_LAST);
        self.set_state(state);
        (self.events)(NvmeEvent::Removed { reason: why.to_owned() });
    }

    /// Ends what is out, once the device provably reaches no memory any more, and closes it. Where bus mastering is proof
    /// enough nobody waits until all memory of large guests is unmapped, or a reset has come back.
    fn cut_off(&mut self, reason: FailReason, within: Duration) {
        if !self.controller.backing.silence() {
            self.controller.backing.close();
        }
        self.order_all(Order::Fail(reason));
        self.wait_obeyed(within.min(self.left_for(Instant::now(), Duration::ZERO)));
        self.controller.backing.close();
    }

    /// The orderly end.
    pub(super) fn detach(&mut self) {
        self.common.note_detaching();
        if !self.lost {
            self.order_all(Order::Hold);
            if !self.wait_obeyed_with_device(OBEY_SOON) {
                tracing::warn!("{}: a reactor does not let go of it", self.name());
            }
            if let Err(error) = self.stop_politely() {
                tracing::warn!("{}: {error}", self.name());
            }
            self.lost = true;
            self.cut_off(FailReason::Gone, OBEY_SOON);
        }
        self.take_pairs_back();
        self.common.forget();
        self.set_state(ControllerState::Detached);
    }

    /// Queues deleted, caches written, off. A step that fails does not keep the next ones from being tried.
    fn stop_politely(&mut self) -> Result<(), NvmeError> {
        let start = Instant::now();
        for at in 0..self.pairs.len() {
            let left = DELETE_WITHIN.saturating_sub(start.elapsed());
            if !self.pairs[at].exists || self.controller.admin.is_broken() || left.is_zero() {
                continue;
            }
            match self.controller.delete_pair(self.pairs[at].queue_id, left) {
                Ok(()) => self.pairs[at].exists = false,
                Err(error) if error.is_gone() => return Err(error),
                Err(error) => tracing::warn!("{}: {error}", self.name()),
            }
        }
        // An event request that it finds after the shutdown has begun would be a command that must not come any more.
        let left = DELETE_WITHIN.saturating_sub(start.elapsed());
        match self.controller.settle(left) {
            Err(error) if error.is_gone() => return Err(error),
            Err(error) => tracing::warn!("{}: {error}", self.name()),
            Ok(()) => {}
        }
        self.controller.shut_down(STOP_WITHIN.saturating_sub(start.elapsed()))
    }

    /// Out of the reactors, to be dropped here. One with channels is taken along by the last of them; until then it costs a
    /// look per pass, and its memory.
    fn take_pairs_back(&mut self) {
        let key = self.common.key;
        for pair in &self.pairs {
            pair.shared.abandon();
        }
        let start = Instant::now();
        for own in &self.common.homes {
            let waiting = own.waiting.lock().ok().and_then(|mut waiting| waiting.take());
            if waiting.is_some() {
                continue;
            }
            // Channels may be on their way out.
            let end = loop {
                let left = OBEY_SOON.saturating_sub(start.elapsed());
                let end = ask_soon(&own.reactor, left.max(LOOK_FOR), move |reactor| {
                    take_unused::<B::Registers>(&mut reactor.cx.io, key)
                });
                match end {
                    Some(Left::InUse) if !left.is_zero() => std::thread::sleep(LOOK_FOR),
                    end => break end,
                }
            };
            let name = &self.common.options.name;
            match end {
                Some(Left::Taken(_)) => {}
                Some(Left::InUse) => tracing::info!(
                    "{name}: a channel was not closed before it was detached; its queue goes with it"
                ),
                None if own.reactor.is_stopped() => {}
                None => tracing::warn!("{name}: a reactor does not give its queue back"),
            }
        }
        for pair in std::mem::take(&mut self.pairs) {
            self.common.retire_pair(&pair.shared);
        }
    }
}

/// What became of a reactor's pair.
enum Left {
    /// It is here, or was none.
    Taken(#[expect(dead_code, reason = "to be dropped here")] Option<Box<dyn DeviceQueue>>),
    InUse,
}

fn take_unused<R: Registers>(io: &mut IoCx, key: DeviceKey) -> Left {
    let pair = io.devices.find(key).and_then(|slot| io.devices.get_mut::<QueuePair<R>>(slot));
    match pair {
        Some(pair) if !pair.is_unused() => Left::InUse,
        _ => Left::Taken(take_out::<R>(io, key)),
    }
}

/// Has a reactor do something, and waits for it only so long: then it is done whenever the reactor comes back, and what it
/// answers is dropped there. A mailbox that is full is tried again meanwhile.
fn ask_soon<T: Send + 'static>(
    reactor: &ReactorHandle,
    within: Duration,
    f: impl FnOnce(&mut Reactor) -> T + Send + 'static,
) -> Option<T> {
    let (sender, answer) = std::sync::mpsc::channel();
    let start = Instant::now();
    let mut message: Message = Box::new(move |reactor: &mut Reactor| {
        let _ = sender.send(f(reactor));
    });
    while let Err(unsent) = reactor.try_send(message) {
        if start.elapsed() >= within || reactor.is_stopped() {
            return None;
        }
        message = unsent;
        std::thread::sleep(super::pairs::LOOK);
    }
    answer.recv_timeout(within.saturating_sub(start.elapsed())).ok()
}
