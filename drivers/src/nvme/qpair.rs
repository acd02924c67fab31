//! HOT PATH
//! A queue pair of one controller on one reactor, shared by all channels to its namespaces there.
//!
//! Flow: a channel's command → slot and ring entry → doorbell at the end of the pass → completion → the channel that looks,
//! or another one's inbox. Owner: one reactor. **Invariant:** a command ends once: by the completion of its CID, or by an
//! order that says that the device has stopped; what the device answers is checked before it is used, and a device that
//! answers nonsense is believed no more.
//!
//! send: slot, entry — commit: order? resend? doorbells, deadlines — reap: phase → CID and head → status → its channel

use std::collections::VecDeque;
use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::limits::NVME_CQ_LAZY_ENTRIES;
use ringmill_core::mem::{BouncePool, IovaOffset, SharedSlice};
use ringmill_core::reactor::{ClientId, DeviceKey, DeviceQueue, Ring};
use ringmill_core::spec::nvme::Cqe;
use ringmill_core::units::{Iova, bytes_u64};

use super::list::ListPage;
use super::parts::{Interrupts, PAGE_BYTES, QueueMemory, QueueMemoryError, QueuePairParts};
use super::rings::{Doorbell, Rings};
use super::shared::{QueueShared, Trouble};
use super::slots::{Command, CommandSlots, Ended, MemberId, Owner};
use crate::pci::Registers;

/// What a pair does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Everything.
    Running,
    /// Nothing new; completions are still read.
    Held,
    /// Nothing: the device has stopped.
    Stopped,
    /// Everything ends at once like this.
    Failed(IoStatus),
}

/// Figures that are published now and then.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) commands: u64,
    pub(super) doorbells: u64,
    pub(super) splits: u64,
    pub(super) errors: u64,
    pub(super) retried: u64,
    pub(super) requeued: u64,
    pub(super) overdue: u64,
    pub(super) strange: u64,
}

/// See the module.
#[derive(Debug)]
pub struct QueuePair<R> {
    pub(super) state: State,
    /// The device answered nonsense: nothing of it is believed until it was disabled.
    pub(super) trouble: bool,
    pub(super) key: DeviceKey,
    queue_id: u16,
    /// Commands in the rings.
    pub(super) out: u16,
    commands_max: u16,
    cq_lazy: u16,
    pub(super) rings: Rings,
    pub(super) slots: CommandSlots,
    registers: Arc<R>,
    pub(super) shared: Arc<QueueShared>,
    /// The order that was obeyed.
    pub(super) obeyed: u64,
    pub(super) now_ns: u64,
    pub(super) tally: Tally,
    lists: SharedSlice,
    lists_iova: Iova,
    offset: IovaOffset,
    /// To be sent again: the slot, and when.
    pub(super) resend: VecDeque<(u16, u64)>,
    pub(super) timeout_ns: u64,
    pub(super) look_due_ns: u64,
    pub(super) look_at: u16,
    /// The number of the last report, and whether the thread was told how it ended.
    pub(super) report: u32,
    pub(super) report_ended: bool,
    pub(super) report_cid: u16,
    pub(super) interrupts: Interrupts,
    pub(super) client: Option<ClientId>,
    pub(super) bound: bool,
    pub(super) watched: bool,
    bounces: BouncePool,
    /// Kept until the device knows these addresses no longer.
    _memory: Arc<QueueMemory>,
}

impl<R: Registers> QueuePair<R> {
    /// Puts a pair together. It submits nothing before its first Run.
    ///
    /// # Errors
    /// Doorbells in memory that lie outside of their pages.
    #[cold]
    pub fn new(parts: QueuePairParts<R>) -> Result<QueuePair<R>, QueueMemoryError> {
        let memory = parts.memory;
        let (sq, cq, lists) = memory.windows().ok_or(QueueMemoryError::Window)?;
        let offset = memory.offset();
        let entries = memory.entries();
        let shadow = parts.shadow.as_ref();
        let doorbell = |register_bytes, at: fn(&super::ShadowDoorbells) -> usize| {
            let shadow = shadow.map(|s| (&s.doorbells, &s.event_indices, at(s)));
            Doorbell::new(register_bytes, shadow).ok_or(QueueMemoryError::Window)
        };
        let doorbells = (
            doorbell(parts.sq_doorbell_bytes, |shadow| shadow.sq_at_bytes)?,
            doorbell(parts.cq_doorbell_bytes, |shadow| shadow.cq_at_bytes)?,
        );
        let commands = entries - 1;
        // A level (INTx) stays up until they are acknowledged.
        let is_shared = matches!(parts.interrupts, Interrupts::Thread);
        let cq_lazy = if is_shared { 1 } else { NVME_CQ_LAZY_ENTRIES.min(entries / 4).max(1) };
        Ok(QueuePair {
            state: State::Held,
            trouble: false,
            key: parts.key,
            queue_id: parts.queue_id,
            out: 0,
            commands_max: commands,
            cq_lazy,
            rings: Rings::new((sq, cq), entries, doorbells),
            slots: CommandSlots::new(commands),
            registers: parts.registers,
            shared: parts.shared,
            obeyed: 0,
            now_ns: 0,
            tally: Tally::default(),
            lists_iova: lists.iova(offset),
            lists,
            offset,
            resend: VecDeque::with_capacity(usize::from(commands)),
            timeout_ns: parts.timeout_ns,
            look_due_ns: 0,
            look_at: 0,
            report: 0,
            report_ended: true,
            report_cid: 0,
            interrupts: parts.interrupts,
            client: None,
            bound: false,
            watched: false,
            bounces: memory.bounces(),
            _memory: memory,
        })
    }

    /// True when no channel is on it and no command has not ended: it may be taken from its reactor.
    #[must_use]
    #[cold]
    pub fn is_unused(&self) -> bool {
        !self.slots.has_members() && self.is_idle()
    }

    /// True when no command has not ended and no channel has something to fetch.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.slots.taken_count() == 0 && !self.slots.has_news()
    }

    /// True when commands can be sent.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.state == State::Running && !self.trouble
    }

    /// Commands that this channel may send now.
    #[inline]
    pub(super) fn room(&self, member: MemberId) -> usize {
        if self.is_open() { self.slots.room(member) } else { 0 }
    }

    /// How host addresses become the device's.
    #[inline]
    pub(super) fn offset(&self) -> IovaOffset {
        self.offset
    }

    /// The page of a slot.
    #[inline]
    pub(super) fn page(&self, slot: u16) -> ListPage<'_> {
        let at_bytes = usize::from(slot) * PAGE_BYTES;
        let iova = Iova(self.lists_iova.0.wrapping_add(bytes_u64(at_bytes)));
        ListPage { window: &self.lists, at_bytes, iova }
    }

    /// Sends the command of a slot that its channel has taken.
    #[inline]
    pub(super) fn send(&mut self, number: u16, owner: Owner, command: Command) {
        let Some(slot) = self.slots.mark_out(number) else { return };
        slot.command = command;
        slot.owner = owner;
        slot.retries = 0;
        slot.sent_ns = self.now_ns;
        let entry = command.entry(slot.cid);
        self.rings.push(&entry);
        self.out += 1;
        self.tally.commands += 1;
    }

    /// Sends it once more, under another CID.
    pub(super) fn send_again(&mut self, number: u16) {
        let Some(slot) = self.slots.mark_out(number) else { return };
        slot.sent_ns = self.now_ns;
        let entry = slot.command.entry(slot.cid);
        self.rings.push(&entry);
        self.out += 1;
        self.tally.commands += 1;
    }

    /// Reads completions; those of `me` go to `mine`, which says no when it has no place for it.
    #[inline]
    pub(super) fn reap(&mut self, me: MemberId, mut mine: impl FnMut(Ended) -> bool) {
        if self.trouble {
            return;
        }
        while let Some(entry) = self.rings.peek() {
            let Some((owner, status)) = self.accept(entry) else {
                if self.trouble {
                    return;
                }
                continue;
            };
            let ended = Ended { tag: owner.tag, status, part: owner.part };
            if owner.member != me || !mine(ended) {
                self.slots.post(owner.member, ended);
            }
        }
    }

    /// Checks a completion and frees its slot; `None` when the command goes on, or is none.
    #[inline(always)]
    pub(super) fn accept(&mut self, entry: Cqe) -> Option<(Owner, IoStatus)> {
        if !self.rings.is_head(entry.sq_head()) || entry.sq_id() != self.queue_id {
            return self.distrust(Trouble::StrangeHead);
        }
        let Some((number, slot)) = self.slots.find(entry.cid()) else {
            return self.distrust(Trouble::StrangeCid);
        };
        slot.cid = super::slots::NO_CID;
        let owner = slot.owner;
        self.out -= 1;
        self.rings.pass();
        let mut status = IoStatus::Ok;
        if !entry.status().is_success() {
            status = self.judge(number, entry.status())?;
        }
        if self.slots.reported == Some(number) {
            self.report_end();
        }
        self.slots.give_back(owner.member, number);
        Some((owner, status))
    }

    #[inline]
    fn ring_doorbells(&mut self) {
        // Never so late that the device could find its ring full.
        let full = self.out + self.rings.unrung > self.commands_max;
        if self.rings.unrung >= self.cq_lazy || full {
            self.acknowledge();
        }
        if self.rings.has_unsent() {
            self.tally.doorbells += u64::from(self.rings.ring_sq(&*self.registers));
        }
    }

    /// Tells the device which completions were read.
    #[inline]
    pub(super) fn acknowledge(&mut self) {
        self.tally.doorbells += u64::from(self.rings.ring_cq(&*self.registers));
    }
}

impl<R: Registers> DeviceQueue for QueuePair<R> {
    #[inline]
    fn commit(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        let word = self.shared.order_word();
        if word != self.obeyed {
            self.obey(word);
        }
        if self.is_open() {
            if !self.resend.is_empty() {
                self.resend_due();
            }
            self.ring_doorbells();
        }
        self.slots.turn();
        if now_ns >= self.look_due_ns {
            self.look();
        }
    }

    fn bounces(&mut self) -> Option<&mut BouncePool> {
        Some(&mut self.bounces)
    }

    #[cold]
    fn prepare_sleep(&mut self, ring: &mut Ring) -> bool {
        self.publish();
        if self.slots.has_news()
            || (self.is_open() && !self.resend.is_empty())
            || self.shared.order_word() != self.obeyed
        {
            return true;
        }
        if matches!(self.interrupts, Interrupts::Thread) && self.is_open() && self.rings.unrung > 0
        {
            // A level stays up until every completion is acknowledged, also those after which nothing is out.
            self.acknowledge();
        }
        if self.out == 0 || self.trouble {
            return false;
        }
        self.listen(ring)
    }

    #[cold]
    fn wake(&mut self, ring: &mut Ring, now_ns: u64) {
        self.now_ns = now_ns;
        self.stop_listening(ring);
    }
}
