//! What a queue pair does when it is not simply running: orders, retries, deadlines, distrust.
//!
//! Flow: order of the thread → state; error of a command → sent again after a pause, or ended; late command → report. Owner:
//! one reactor. **Invariant:** a command that is given up was either answered or cannot reach memory any more; every command
//! is sent a bounded number of times.
//!
//! Everything may be sent again after the device has stopped: reads and flushes change nothing, and a write, discard or write
//! zeroes that is done twice leaves what it leaves when it is done once. Between the two the guest has had no answer, so
//! whatever it sent to the same blocks meanwhile was in no order with it.

use std::sync::atomic::Ordering;

use ringmill_core::IoStatus;
use ringmill_core::limits::{
    NVME_LOOK_COMMANDS, NVME_LOOKS_PER_DEADLINE, NVME_RETRIES_MAX, NVME_RETRY_PAUSE_NS,
};
use ringmill_core::spec::nvme::Status;

use super::qpair::{QueuePair, State};
use super::shared::{Order, Overdue, Trouble};
use super::slots::{Ended, NO_CID, Owner};
use super::status::{Verdict, verdict};
use crate::pci::Registers;

/// Looks without a deadline, for the figures.
const PUBLISH_PERIOD_NS: u64 = 100_000_000;

/// No look is sooner after another than this.
const LOOK_PERIOD_LEAST_NS: u64 = 100_000;

impl<R: Registers> QueuePair<R> {
    /// Nothing of this device is believed from now on.
    #[cold]
    #[inline(never)]
    pub(super) fn distrust(&mut self, trouble: Trouble) -> Option<(Owner, IoStatus)> {
        self.trouble = true;
        self.tally.strange += 1;
        self.publish();
        self.shared.set_trouble(Some(trouble));
        None
    }

    /// What an error means: the status when the command has ended, `None` when it is sent again.
    #[cold]
    #[inline(never)]
    pub(super) fn judge(&mut self, number: u16, answer: Status) -> Option<IoStatus> {
        self.tally.errors += 1;
        let status = match verdict(answer) {
            Verdict::Ended(status) => return Some(status),
            Verdict::Again(status) => status,
        };
        let slot = self.slots.get(number)?;
        if slot.retries >= NVME_RETRIES_MAX {
            return Some(status);
        }
        let pause_ns = NVME_RETRY_PAUSE_NS << (2 * u32::from(slot.retries));
        slot.retries += 1;
        self.tally.retried += 1;
        self.resend.push_back((number, self.now_ns.saturating_add(pause_ns)));
        if self.slots.reported == Some(number) {
            self.report_end();
        }
        None
    }

    /// Sends what has waited long enough.
    #[cold]
    #[inline(never)]
    pub(super) fn resend_due(&mut self) {
        for _ in 0..self.resend.len() {
            let Some((number, not_before_ns)) = self.resend.pop_front() else { return };
            if not_before_ns > self.now_ns {
                self.resend.push_back((number, not_before_ns));
            } else if self.slots.is_fenced(number) {
                // It was meant for what had this number before.
                self.end(number, IoStatus::Gone);
            } else {
                self.send_again(number);
            }
        }
    }

    /// Does what the thread wants, and says so.
    #[cold]
    #[inline(never)]
    pub(super) fn obey(&mut self, word: u64) {
        match Order::of_word(word) {
            Order::Run => {
                if self.shared.is_shadow_lost() {
                    self.rings.lose_shadow();
                }
                self.state = State::Running;
            }
            Order::Hold => self.state = State::Held,
            Order::Disabled => {
                self.last_look();
                self.requeue();
                self.forget();
                self.state = State::Stopped;
            }
            Order::Fail(reason) => {
                self.last_look();
                self.state = State::Failed(reason.status());
                self.end_all(reason.status());
                self.forget();
            }
        }
        self.publish();
        self.obeyed = word;
        self.shared.obey(word);
    }

    /// The device has stopped: what it has answered until then still counts.
    #[cold]
    fn last_look(&mut self) {
        while !self.trouble
            && let Some(entry) = self.rings.peek()
        {
            if let Some((owner, status)) = self.accept(entry) {
                let ended = Ended { tag: owner.tag, status, part: owner.part };
                self.slots.post(owner.member, ended);
            }
        }
    }

    /// What was out is to be sent again, or ends when that has happened too often.
    #[cold]
    fn requeue(&mut self) {
        let late = self.slots.reported;
        for number in 0..u16::try_from(self.slots.count()).unwrap_or(u16::MAX) {
            let Some(slot) = self.slots.get(number).filter(|slot| slot.is_out()) else { continue };
            slot.cid = NO_CID;
            if slot.retries < NVME_RETRIES_MAX {
                slot.retries += 1;
                self.tally.requeued += 1;
                self.resend.push_back((number, 0));
            } else {
                let status = if late == Some(number) { IoStatus::Timeout } else { IoStatus::Reset };
                self.end(number, status);
            }
        }
    }

    /// Everything ends.
    #[cold]
    fn end_all(&mut self, status: IoStatus) {
        while let Some((number, _)) = self.resend.pop_front() {
            self.end(number, status);
        }
        for number in 0..u16::try_from(self.slots.count()).unwrap_or(u16::MAX) {
            if self.slots.get(number).is_some_and(|slot| slot.is_out()) {
                self.end(number, status);
            }
        }
    }

    #[cold]
    fn end(&mut self, number: u16, status: IoStatus) {
        let Some(slot) = self.slots.get(number) else { return };
        slot.cid = NO_CID;
        let owner = slot.owner;
        self.slots.give_back(owner.member, number);
        self.slots.post(owner.member, Ended { tag: owner.tag, status, part: owner.part });
    }

    /// The device knows nothing any more, and nothing that it said counts: not even that an Abort is under way.
    #[cold]
    fn forget(&mut self) {
        if self.slots.reported.is_some() {
            self.report_end();
            self.slots.end_report();
        }
        self.out = 0;
        self.rings.reset();
        if self.trouble {
            self.trouble = false;
            self.shared.set_trouble(None);
        }
    }

    /// The thread may stop caring about the command that it was told about.
    #[cold]
    #[inline(never)]
    pub(super) fn report_end(&mut self) {
        if !self.report_ended {
            self.report_ended = true;
            self.shared.report(Overdue {
                cid: self.report_cid,
                sequence: self.report,
                ended: true,
            });
        }
    }

    /// Now and then: figures, and commands that are late.
    #[cold]
    #[inline(never)]
    pub(super) fn look(&mut self) {
        self.publish();
        if self.timeout_ns == 0 {
            self.look_due_ns = self.now_ns.saturating_add(PUBLISH_PERIOD_NS);
            return;
        }
        // So that all commands are looked at that often.
        let steps = self.slots.count().div_ceil(NVME_LOOK_COMMANDS);
        let steps = u64::try_from(steps).unwrap_or(1).max(1);
        let period_ns = self.timeout_ns / NVME_LOOKS_PER_DEADLINE / steps;
        let period_ns = period_ns.clamp(LOOK_PERIOD_LEAST_NS, PUBLISH_PERIOD_NS);
        self.look_due_ns = self.now_ns.saturating_add(period_ns);
        if self.slots.reported.is_some() && self.shared.settled() != self.report {
            return;
        }
        if let Some(number) = self.slots.end_report() {
            // Settled and still out: another deadline begins.
            let now_ns = self.now_ns;
            if let Some(slot) = self.slots.get(number) {
                slot.sent_ns = now_ns;
            }
        }
        if self.out > 0 && self.state == State::Running && !self.trouble {
            self.look_for_late();
        }
    }

    #[cold]
    fn look_for_late(&mut self) {
        let count = u16::try_from(self.slots.count()).unwrap_or(u16::MAX);
        for _ in 0..NVME_LOOK_COMMANDS.min(self.slots.count()) {
            let number = self.look_at;
            self.look_at = if number + 1 >= count { 0 } else { number + 1 };
            let (now_ns, timeout_ns) = (self.now_ns, self.timeout_ns);
            let late = |slot: &&mut super::slots::Slot| {
                slot.is_out() && now_ns.saturating_sub(slot.sent_ns) >= timeout_ns
            };
            let Some(cid) = self.slots.get(number).filter(late).map(|slot| slot.cid) else {
                continue;
            };
            self.slots.reported = Some(number);
            // 0 is "none", also after 2^32 reports.
            self.report = self.report.wrapping_add(1).max(1);
            (self.report_cid, self.report_ended) = (cid, false);
            self.tally.overdue += 1;
            self.publish();
            self.shared.report(Overdue { cid, sequence: self.report, ended: false });
            return;
        }
    }

    /// Shows the figures to others.
    #[cold]
    pub(super) fn publish(&self) {
        let (to, from) = (&self.shared.counters, &self.tally);
        let all = [
            (&to.commands, from.commands),
            (&to.doorbells, from.doorbells),
            (&to.splits, from.splits),
            (&to.errors, from.errors),
            (&to.retried, from.retried),
            (&to.requeued, from.requeued),
            (&to.overdue, from.overdue),
            (&to.strange, from.strange),
        ];
        for (cell, value) in all {
            cell.store(value, Ordering::Relaxed);
        }
    }
}
