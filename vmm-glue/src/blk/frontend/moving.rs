//! Moving queues to other reactors while their guest goes on.
//!
//! Flow: quiesce on the old reactor → take the worker off it → give it a new channel, here → put it on the new one, where
//! it resumes by being attached. In: a change of the controller's places. Out: [`Turn::Moved`]. Owner: the control thread.
//! **Invariant:** a worker between two reactors is in `Transit` or in its `HandOver`, nowhere else, so it can always be
//! put back; a reactor that refuses it or does not answer in time loses it to the one that it came from.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ringmill_core::bdev::{BdevError, ChannelSeed};
use ringmill_core::reactor::{
    HandOver, Message, Poller, PollerId, Reactor, ReactorCx, ReactorHandle,
};

use super::super::event::EventKind;
use super::super::format::{control, with_worker};
use super::super::{PlaceError, WorkerControl};
use super::FrontEnd;
use super::operation::{Kind, Phase};

/// How long a reactor may take to take a queue in.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a control thread wants done to a worker.
type OnWorker = Box<dyn FnOnce(&mut dyn WorkerControl, &mut ReactorCx) + Send>;

/// One move of some queues, as an operation.
pub(super) struct Move {
    /// Its name for whoever asked for it.
    pub(super) ticket: u64,
    /// Only this queue.
    only: Option<u16>,
    /// The queues that move, with their ways into the bdev on the new reactor (`None`: the bdev is gone).
    seeds: BTreeMap<u16, (ReactorHandle, Option<ChannelSeed>)>,
    /// When the workers were sent to their new reactors.
    sent: Option<Instant>,
    /// What went wrong first.
    problem: Option<String>,
}

/// A ring whose worker is between two reactors.
pub(in crate::blk) struct Transit {
    id: PollerId,
    from: ReactorHandle,
    /// Where it is being sent.
    to: ReactorHandle,
    hand_over: Option<HandOver>,
    /// What is to be done to it when it has arrived.
    late: Vec<OnWorker>,
}

impl std::fmt::Debug for Transit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transit")
            .field("id", &self.id)
            .field("to", &self.to)
            .finish_non_exhaustive()
    }
}

impl Transit {
    pub(super) fn do_late(
        &mut self,
        f: impl FnOnce(&mut dyn WorkerControl, &mut ReactorCx) + Send + 'static,
    ) {
        self.late.push(Box::new(f));
    }
}

impl Move {
    pub(super) fn concerns(&self, index: u16) -> bool {
        self.seeds.contains_key(&index)
    }

    pub(super) fn end(self) -> (u64, Option<String>) {
        (self.ticket, self.problem)
    }
}

impl FrontEnd {
    /// Moves queues (or only one) to where they belong by now; [`Turn::Moved`](super::Turn::Moved) follows.
    pub(in crate::blk) fn relocate(&mut self, ticket: u64, only: Option<u16>) {
        let seeds = BTreeMap::new();
        self.begin(Kind::Move(Move { ticket, only, seeds, sent: None, problem: None }));
    }

    /// The moves that will never end because the front-end has.
    pub(in crate::blk) fn unfinished_moves(&self) -> Vec<u64> {
        let current = self.current.iter().map(|operation| &operation.kind);
        current
            .chain(&self.queued)
            .filter_map(|kind| match kind {
                Kind::Move(a_move) => Some(a_move.ticket),
                _ => None,
            })
            .collect()
    }

    fn open_channel(&self, home: &ReactorHandle) -> Result<Option<ChannelSeed>, BdevError> {
        self.bdev.as_ref().map(|bdev| bdev.open_channel(Some(home))).transpose()
    }

    /// Finds the queues that are not where they belong. One without a way into the bdev there stays.
    pub(super) fn prepare_move(&self, a_move: &mut Move) {
        for index in (0..self.shared.queues_max).filter(|&i| a_move.only.is_none_or(|o| o == i)) {
            let ring = self.rings[usize::from(index)].as_ref();
            let Some((_, reactor)) = ring.and_then(|r| r.poller.as_ref()) else { continue };
            let home = self.shared.reactor_of(index);
            if reactor.same(&home) {
                continue;
            }
            match self.open_channel(&home) {
                Ok(seed) => drop(a_move.seeds.insert(index, (home, seed))),
                Err(error) => {
                    self.shared.stay(index, reactor);
                    a_move.problem.get_or_insert(format!("queue {index} stays: {error}"));
                }
            }
        }
    }

    /// The message that takes a worker off its reactor.
    pub(super) fn take_message(&self, index: u16, id: PollerId, operation: u64) -> Message {
        let (vid, controller, events) = (self.vid, self.shared.number, self.shared.events.clone());
        Box::new(move |reactor: &mut Reactor| {
            let poller = reactor.remove_poller(id);
            events.send(controller, EventKind::Taken { vid, operation, index, poller });
        })
    }

    /// The messages that take workers off their reactors are on their way: what comes later waits for their arrival.
    pub(super) fn mark_in_transit(&mut self) {
        for index in 0..self.shared.queues_max {
            // Where its channel was made for: a later move may have changed its place meanwhile, and is still to come.
            let target = self.current_move().and_then(|a_move| a_move.seeds.get(&index));
            let Some(to) = target.map(|(home, _)| home.clone()) else { continue };
            let Some(ring) = &mut self.rings[usize::from(index)] else { continue };
            if let Some((id, from)) = ring.poller.take() {
                ring.transit = Some(Transit { id, from, to, hand_over: None, late: Vec::new() });
            }
        }
    }

    /// A worker is off its old reactor.
    pub(in crate::blk) fn taken(
        &mut self,
        operation: u64,
        index: u16,
        poller: Option<Box<dyn Poller>>,
    ) {
        let Some(current) = self.current.as_mut().filter(|c| c.number == operation) else { return };
        current.waiting = current.waiting.saturating_sub(1);
        let Some(ring) = &mut self.rings[usize::from(index)] else { return };
        if let Some(transit) = &mut ring.transit {
            transit.from.forget_poller(transit.id);
            transit.hand_over = poller.map(HandOver::new);
        }
    }

    /// Sends every worker in transit to its new reactor.
    pub(super) fn place_all(&mut self) {
        let in_transit = (0..)
            .zip(&self.rings)
            .filter(|(_, ring)| ring.as_ref().is_some_and(|r| r.transit.is_some()));
        let moving: Vec<u16> = in_transit.map(|(index, _)| index).collect();
        if let Some(operation) = &mut self.current {
            operation.waiting = moving.len();
        }
        for index in moving {
            let seed = match self.current_move() {
                Some(a_move) => {
                    a_move.sent = Some(Instant::now());
                    a_move.seeds.remove(&index).and_then(|(_, seed)| seed)
                }
                None => None,
            };
            self.place(index, seed, true);
        }
    }

    fn current_move(&mut self) -> Option<&mut Move> {
        match &mut self.current.as_mut()?.kind {
            Kind::Move(a_move) => Some(a_move),
            _ => None,
        }
    }

    /// Sends one worker to its new reactor. With `trial` that one gives it back if it cannot serve it.
    fn place(&mut self, index: u16, seed: Option<ChannelSeed>, trial: bool) {
        let Some(operation) = self.current.as_ref().map(|c| c.number) else { return };
        let ring = self.rings[usize::from(index)].as_mut();
        let Some(transit) = ring.and_then(|r| r.transit.as_mut()) else { return };
        let poller = transit.hand_over.take().and_then(|h| h.take());
        let Some(mut poller) = poller else { return self.lost(index) };
        if let Some(worker) = control(poller.as_mut()) {
            // The channel of the former reactor ends here, where memory is given back.
            drop(worker.replant(seed, trial));
        }
        let hand_over = HandOver::new(poller);
        transit.hand_over = Some(hand_over.clone());
        let (id, to) = (transit.id, transit.to.clone());
        let counters = to.expect_poller(id, &format!("{}:{index}", self.shared.name));
        let (vid, controller, events) = (self.vid, self.shared.number, self.shared.events.clone());
        let message: Message = Box::new(move |reactor: &mut Reactor| {
            // The control thread may have lost its patience meanwhile.
            let Some(poller) = hand_over.take() else { return };
            reactor.adopt(id, poller, counters);
            let problem = with_worker(reactor, id, |worker, _| worker.take_problem()).flatten();
            let refused = problem.map(|problem| (reactor.remove_poller(id), problem));
            events.send(controller, EventKind::Placed { vid, operation, index, refused });
        });
        self.unsent.push((to, message));
        self.send_unsent();
    }

    /// A worker was on no reactor when it should have been: its reactor has ended.
    fn lost(&mut self, index: u16) {
        tracing::error!(controller = %self.shared.name, "queue {index}: its reactor has ended, and the queue with it");
        if let Some(ring) = &mut self.rings[usize::from(index)] {
            ring.transit = None;
        }
        if let Some(a_move) = self.current_move() {
            a_move.problem.get_or_insert(format!("queue {index} was on a reactor that has ended"));
        }
        if let Some(operation) = &mut self.current {
            operation.waiting = operation.waiting.saturating_sub(1);
        }
    }

    /// A reactor has taken a worker in, or given it back.
    pub(in crate::blk) fn placed(
        &mut self,
        operation: u64,
        index: u16,
        refused: Option<(Option<Box<dyn Poller>>, PlaceError)>,
    ) {
        if self.current.as_ref().is_none_or(|c| c.number != operation || c.phase != Phase::Place) {
            return;
        }
        let Some(ring) = &mut self.rings[usize::from(index)] else { return };
        if let Some((poller, problem)) = refused {
            if let Some(transit) = &mut ring.transit {
                transit.hand_over = poller.map(HandOver::new);
            }
            return self.put_back(index, &problem.to_string());
        }
        let Some(transit) = ring.transit.take() else { return };
        ring.poller = Some((transit.id, transit.to));
        for late in transit.late {
            self.on_worker(index, late);
        }
        if let Some(operation) = &mut self.current {
            operation.waiting = operation.waiting.saturating_sub(1);
        }
    }

    /// Sends a worker back where it came from, and lets it stay there.
    fn put_back(&mut self, index: u16, why: &str) {
        let ring = self.rings[usize::from(index)].as_ref();
        let Some(from) = ring.and_then(|r| r.transit.as_ref()).map(|t| t.from.clone()) else {
            return;
        };
        let seed = self.open_channel(&from);
        let ring = self.rings[usize::from(index)].as_mut();
        let Some(transit) = ring.and_then(|r| r.transit.as_mut()) else { return };
        let to = transit.to.clone();
        transit.to = from.clone();
        to.forget_poller(transit.id);
        if self.shared.reactor_of(index).same(&to) {
            self.shared.stay(index, &from);
        }
        let core = |reactor: &ReactorHandle| reactor.core().map_or(0, |core| core.0);
        let text = format!("queue {index} stays on core {}, core {} {why}", core(&from), core(&to));
        tracing::warn!(controller = %self.shared.name, "{text}");
        if let Some(a_move) = self.current_move() {
            a_move.problem.get_or_insert(text);
        }
        let seed = seed.unwrap_or_else(|error| {
            tracing::error!(controller = %self.shared.name, "queue {index}: every request will fail: {error}");
            None
        });
        self.place(index, seed, false);
    }

    /// Takes workers back that a reactor has not taken in for a long time. Call about once a second.
    pub(in crate::blk) fn recall_late(&mut self) {
        let in_place = self.current.as_ref().is_some_and(|c| c.phase == Phase::Place);
        let sent = self.current_move().and_then(|a_move| a_move.sent);
        if !in_place || sent.is_none_or(|sent| sent.elapsed() < PATIENCE) {
            return;
        }
        for index in 0..self.shared.queues_max {
            let ring = self.rings[usize::from(index)].as_mut();
            let Some(transit) = ring.and_then(|r| r.transit.as_mut()) else { continue };
            if transit.to.same(&transit.from) {
                continue;
            }
            // Gone already: the reactor has it after all, and answers.
            if let Some(poller) = transit.hand_over.as_ref().and_then(HandOver::take) {
                transit.hand_over = Some(HandOver::new(poller));
                self.put_back(index, "does not answer");
            }
        }
    }
}
