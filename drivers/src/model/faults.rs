//! What goes wrong on demand: rules for commands, and the controller's bad habits.
//!
//! Flow: a rule of `ModelControl` → each fetched command is compared with the rules in order; the first that matches and
//! has not been used up acts. Owner: the model's thread. Without rules a fetched command costs one comparison here.

use std::ops::Range;
use std::time::Duration;

use ringmill_core::spec::nvme::{Cqe, Sqe, Status, nvm};

use super::counters::Count;
use super::held::{HeldCommand, Plan};
use super::machine::{Answer, Machine};

/// Which commands a rule is for.
#[derive(Clone, Debug)]
pub struct Match {
    /// Admin commands instead of those of I/O queues.
    pub is_admin: bool,
    /// With that opcode; `None`: with any.
    pub opcode: Option<u8>,
    /// For that namespace.
    pub nsid: Option<u32>,
    /// That touch one of these blocks (reads, writes, write zeroes).
    pub lbas: Option<Range<u64>>,
    /// That many are let through before.
    pub skip: u64,
    /// It acts that often; `u64::MAX`: always.
    pub times: u64,
}

impl Match {
    /// I/O commands with that opcode, always.
    #[must_use]
    pub fn io(opcode: u8) -> Match {
        let opcode = Some(opcode);
        Match { is_admin: false, opcode, nsid: None, lbas: None, skip: 0, times: u64::MAX }
    }

    /// Admin commands with that opcode, always.
    #[must_use]
    pub fn admin(opcode: u8) -> Match {
        Match { is_admin: true, ..Match::io(opcode) }
    }

    /// Any I/O command, always.
    #[must_use]
    pub fn any_io() -> Match {
        Match { opcode: None, ..Match::io(0) }
    }

    /// Only that often.
    #[must_use]
    pub fn times(self, times: u64) -> Match {
        Match { times, ..self }
    }

    /// Once.
    #[must_use]
    pub fn once(self) -> Match {
        self.times(1)
    }

    /// Only after that many were let through.
    #[must_use]
    pub fn after(self, skip: u64) -> Match {
        Match { skip, ..self }
    }

    /// Only for blocks of that range.
    #[must_use]
    pub fn on(self, lbas: Range<u64>) -> Match {
        Match { lbas: Some(lbas), ..self }
    }

    /// Only for that namespace.
    #[must_use]
    pub fn of(self, nsid: u32) -> Match {
        Match { nsid: Some(nsid), ..self }
    }

    fn is_for(&self, is_admin: bool, sqe: &Sqe) -> bool {
        let opcode = sqe.0[0].to_le_bytes()[0];
        if self.is_admin != is_admin
            || self.opcode.is_some_and(|it| it != opcode)
            || self.nsid.is_some_and(|it| it != sqe.0[1])
        {
            return false;
        }
        let Some(lbas) = &self.lbas else { return true };
        let first = sqe.u64_at(10);
        let end = first.saturating_add(u64::from(sqe.0[12] & 0xffff) + 1);
        matches!(opcode, nvm::READ | nvm::WRITE | nvm::WRITE_ZEROES)
            && first < lbas.end
            && lbas.start < end
    }
}

/// What a rule does with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It ends with that status and is not executed.
    Status(Status),
    /// It is executed, and ends with that status all the same.
    ExecuteThenStatus(Status),
    /// It is never answered, unless by an abort.
    Swallow,
    /// It is executed and answered that much later.
    Delay(Duration),
    /// It is never answered, and later garbage is written into its data buffer, unless it was aborted, or the controller
    /// disabled or no bus master before.
    ScribbleAfter(Duration),
    /// It is executed and its completion is posted twice.
    CompleteTwice,
    /// It is executed and answered under its id XOR this one, so that it is itself never answered.
    OtherCid(u16),
    /// It is executed and answered, and a completion with this id follows.
    StrayCid(u16),
    /// Its completion says that the submission queue's head is there.
    SqHead(u16),
    /// Its completion says that it is of that submission queue.
    SqId(u16),
    /// It is executed and answered; then all free places of the completion queue are filled with garbage whose phase bits
    /// are random.
    GarbageRing,
    /// The controller fails (CSTS.CFS) before it is executed.
    Fatal,
    /// The controller vanishes: all registers read as ones.
    Gone,
}

/// How aborts end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aborts {
    /// The command is aborted, if it is still there.
    #[default]
    Work,
    /// Nothing is aborted, and the answer says so.
    Refuse,
    /// The abort itself is never answered.
    Silent,
    /// The answer says that it was aborted, but it goes on and is answered in its time or never.
    Lie,
    /// The command is answered as aborted, and a second time when it is done.
    AnswerAndGoOn,
}

#[derive(Clone, Debug)]
struct Rule {
    what: Match,
    action: Action,
}

/// Everything that is wrong with the controller.
#[derive(Debug)]
pub(super) struct Faults {
    rules: Vec<Rule>,
    pub(super) aborts: Aborts,
    /// CSTS.RDY does not change.
    pub(super) ready_is_stuck: bool,
    /// A shutdown never says that it is complete.
    pub(super) shutdown_is_stuck: bool,
    /// Function resets fail.
    pub(super) reset_fails: bool,
    /// I/O queues granted at most.
    pub(super) queues_max: u16,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            rules: Vec::new(),
            aborts: Aborts::Work,
            ready_is_stuck: false,
            shutdown_is_stuck: false,
            reset_fails: false,
            queues_max: u16::MAX,
        }
    }
}

impl Faults {
    pub(super) fn add(&mut self, what: Match, action: Action) {
        self.rules.push(Rule { what, action });
    }

    pub(super) fn clear_rules(&mut self) {
        self.rules.clear();
    }

    #[inline]
    pub(super) fn has_rules(&self) -> bool {
        !self.rules.is_empty()
    }

    /// The action of the first rule for this command.
    #[cold]
    fn action(&mut self, is_admin: bool, sqe: &Sqe) -> Option<Action> {
        let mut found = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.what.is_for(is_admin, sqe)) {
            if rule.what.skip > 0 {
                rule.what.skip -= 1;
                continue;
            }
            if rule.what.times != u64::MAX {
                rule.what.times -= 1;
            }
            found = Some(rule.action);
            break;
        }
        self.rules.retain(|rule| rule.what.times > 0);
        found
    }
}

impl Machine {
    /// Lets the rules act on a command; `None`: none does.
    #[cold]
    pub(super) fn misbehave(&mut self, queue: u16, sqe: &Sqe) -> Option<Answer> {
        let action = self.faults.action(queue == 0, sqe)?;
        self.link.counters.add(Count::Faults, 1);
        let cq = self.sqs[usize::from(queue)].as_ref().map_or(0, |sq| sq.cq);
        let head = self.sqs[usize::from(queue)].as_ref().map_or(0, |sq| sq.head);
        let now_ns = self.now_ns();
        let after = |delay: Duration| {
            now_ns.saturating_add(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX))
        };
        Some(match action {
            Action::Status(status) => Machine::answer_status(status),
            Action::ExecuteThenStatus(status) => match self.execute(queue, sqe) {
                Answer::Now(..) => Machine::answer_status(status),
                Answer::Later => Answer::Later,
            },
            Action::Swallow => self.hold(queue, sqe, u64::MAX, Plan::Execute),
            Action::Delay(delay) => self.hold(queue, sqe, after(delay), Plan::Execute),
            Action::ScribbleAfter(delay) => self.hold(queue, sqe, after(delay), Plan::Scribble),
            Action::Fatal => {
                self.fail();
                Answer::Later
            }
            Action::Gone => {
                self.vanish();
                Answer::Later
            }
            Action::CompleteTwice
            | Action::OtherCid(_)
            | Action::StrayCid(_)
            | Action::SqHead(_)
            | Action::SqId(_)
            | Action::GarbageRing => {
                let Answer::Now(status, result) = self.execute(queue, sqe) else {
                    return Some(Answer::Later);
                };
                let cid = sqe.0[0] >> 16;
                let entry =
                    [result, 0, head | u32::from(queue) << 16, cid | u32::from(status) << 17];
                self.post_wrongly(cq, entry, action);
                Answer::Later
            }
        })
    }

    fn post_wrongly(&mut self, cq: u16, entry: [u32; 4], action: Action) {
        let [result, high, place, cid] = entry;
        match action {
            Action::OtherCid(bits) => self.post(cq, [result, high, place, cid ^ u32::from(bits)]),
            Action::SqHead(head) => {
                self.post(cq, [result, high, place & !0xffff | u32::from(head), cid]);
            }
            Action::SqId(id) => {
                self.post(cq, [result, high, place & 0xffff | u32::from(id) << 16, cid]);
            }
            Action::StrayCid(stray) => {
                self.post(cq, entry);
                self.post(cq, [result, high, place, u32::from(stray)]);
            }
            Action::CompleteTwice => {
                self.post(cq, entry);
                self.post(cq, entry);
            }
            _ => {
                self.post(cq, entry);
                self.fill_with_garbage(cq, u64::from(cid));
            }
        }
    }

    /// Overwrites the free places of a completion queue without moving on.
    fn fill_with_garbage(&mut self, cq: u16, seed: u64) {
        let Some(cq) = self.cqs[usize::from(cq)].as_mut() else { return };
        let mut chance = ringmill_core::reactor::Entropy::seeded(seed);
        for ahead in 0..cq.room() {
            let (low, high) = (chance.next_u64().to_le_bytes(), chance.next_u64().to_le_bytes());
            let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |it| u32::from_le_bytes(*it));
            let entry = Cqe([word(&low), word(&low[4..]), word(&high), word(&high[4..])]);
            cq.write_at((cq.tail + ahead) % cq.size, &entry);
        }
        cq.owes_interrupt = true;
    }

    /// Keeps a command until it is due.
    pub(super) fn hold(&mut self, queue: u16, sqe: &Sqe, due_ns: u64, plan: Plan) -> Answer {
        if let Some(sq) = self.sqs[usize::from(queue)].as_mut() {
            sq.held += 1;
        }
        let command = HeldCommand { queue, sqe: *sqe, due_ns, plan, is_answered: false };
        self.held.add_odd(command);
        Answer::Later
    }

    /// As if it had been pulled out.
    pub(super) fn vanish(&mut self) {
        self.link.gone.store(true, std::sync::atomic::Ordering::Release);
        self.forget();
        self.state = super::machine::State::Failed;
    }
}
