//! Commands that are answered later, or never: those that a medium works on, and those on which a rule acts.
//!
//! Owner: the model's thread. A held command is executed when it is due, so it uses the driver's memory then.

use std::collections::VecDeque;

use ringmill_core::spec::nvme::Sqe;

/// What happens when the time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// It is executed and answered.
    Execute,
    /// Its data buffer is filled with garbage; no answer.
    Scribble,
}

/// A held command.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldCommand {
    pub(super) queue: u16,
    pub(super) sqe: Sqe,
    /// `u64::MAX`: never.
    pub(super) due_ns: u64,
    pub(super) plan: Plan,
    /// It has been answered, by an abort that did not stop it: nobody waits for it.
    pub(super) is_answered: bool,
}

impl HeldCommand {
    pub(super) fn is(&self, queue: u16, cid: u32) -> bool {
        !self.is_answered && self.queue == queue && self.sqe.0[0] >> 16 == cid
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// With the medium's latency, so mostly in the order of time.
    pub(super) steady: VecDeque<HeldCommand>,
    /// All others.
    pub(super) odd: Vec<HeldCommand>,
    odd_due_ns: u64,
}

impl Held {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.steady.is_empty() && self.odd.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.steady.len() + self.odd.len()
    }

    pub(super) fn clear(&mut self) {
        self.steady.clear();
        self.odd.clear();
    }

    pub(super) fn add_odd(&mut self, command: HeldCommand) {
        if self.odd.is_empty() {
            self.odd_due_ns = u64::MAX;
        }
        self.odd_due_ns = self.odd_due_ns.min(command.due_ns);
        self.odd.push(command);
    }

    /// The earliest time at which something is due.
    pub(super) fn next_due_ns(&self) -> Option<u64> {
        let steady = self.steady.front().map(|command| command.due_ns);
        let odd = (!self.odd.is_empty()).then_some(self.odd_due_ns);
        steady.into_iter().chain(odd).min().filter(|at| *at != u64::MAX)
    }

    /// Takes a command that is due.
    pub(super) fn take_due(&mut self, now_ns: u64) -> Option<HeldCommand> {
        if self.steady.front().is_some_and(|command| command.due_ns <= now_ns) {
            return self.steady.pop_front();
        }
        if self.odd.is_empty() || self.odd_due_ns > now_ns {
            return None;
        }
        let found = self.odd.iter().position(|command| command.due_ns <= now_ns);
        let command = found.map(|at| self.odd.remove(at));
        self.odd_due_ns = self.odd.iter().map(|command| command.due_ns).min().unwrap_or(u64::MAX);
        command
    }

    /// The command that the driver knows by this name.
    pub(super) fn find(&mut self, queue: u16, cid: u32) -> Option<&mut HeldCommand> {
        self.steady.iter_mut().chain(&mut self.odd).find(|command| command.is(queue, cid))
    }

    /// Removes a command for which the driver waits.
    pub(super) fn remove(&mut self, queue: u16, cid: u32) -> Option<HeldCommand> {
        let found = self.find(queue, cid).copied()?;
        self.steady.retain(|command| !command.is(queue, cid));
        self.odd.retain(|command| !command.is(queue, cid));
        Some(found)
    }

    /// Removes all of a queue.
    pub(super) fn remove_queue(&mut self, queue: u16) -> Vec<HeldCommand> {
        let all = self.steady.iter().chain(&self.odd);
        let removed = all.filter(|command| command.queue == queue).copied().collect();
        self.steady.retain(|command| command.queue != queue);
        self.odd.retain(|command| command.queue != queue);
        removed
    }

    pub(super) fn forget_scribbles(&mut self) {
        self.odd.retain(|command| command.plan != Plan::Scribble);
    }
}
