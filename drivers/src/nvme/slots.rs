//! HOT PATH
//! A pair's commands, by CID, and how many of them each channel may have.
//!
//! Flow: take → a free slot → send: out, under its CID → its completion: free again, with another generation. Owner: one
//! reactor. **Invariant:** a CID names at most one command that is out; every member gets its guaranteed slots, whatever the
//! others do.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::BdevInfo;
use ringmill_core::io::Tag;
use ringmill_core::limits::{NVME_QUEUE_ENTRIES_MAX, NVME_ROOM_MIN};
use ringmill_core::spec::nvme::{PSDT_SGL, Sqe};

use super::list::DataPointer;

/// Bits of the slot in a CID; the rest is its generation.
const SLOT_BITS: u32 = 10;
const SLOT_MASK: u16 = (1 << SLOT_BITS) - 1;
const GENERATION_MASK: u8 = 63;

/// Not out. A slot of this number does not exist, so it is nobody's CID (and NVMe 2.0 advises against its use).
pub(super) const NO_CID: u16 = u16::MAX;
const _: () = assert!(NVME_QUEUE_ENTRIES_MAX - 1 < SLOT_MASK + 1);

/// A channel on a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemberId(u16);

/// What is sent; enough to send it again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Command {
    /// Dwords 6 to 9.
    first: u64,
    second: u64,
    dw10_11: u64,
    dw12: u32,
    /// Dword 0 without the CID.
    head: u32,
    nsid: u32,
}

impl Command {
    #[inline]
    pub(super) fn new(
        (opcode, nsid): (u8, u32),
        data: DataPointer,
        dw10_11: u64,
        dw12: u32,
    ) -> Command {
        let head = u32::from(opcode) | if data.is_sgl { PSDT_SGL } else { 0 };
        Command { first: data.first, second: data.second, dw10_11, dw12, head, nsid }
    }

    /// As the device reads it.
    #[inline]
    pub(super) fn entry(&self, cid: u16) -> Sqe {
        let mut entry = Sqe([0; 16]);
        entry.0[0] = self.head | u32::from(cid) << 16;
        entry.0[1] = self.nsid;
        entry.set_prps(self.first, self.second);
        entry.set_u64(10, self.dw10_11);
        entry.0[12] = self.dw12;
        entry
    }
}

/// Whose command it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) member: MemberId,
    /// The request's tag, or the channel's own for a part of one.
    pub(super) tag: Tag,
    pub(super) part: bool,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) tag: Tag,
    pub(super) status: IoStatus,
    pub(super) part: bool,
}

/// One command: all of it on one line.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Slot {
    pub(super) command: Command,
    pub(super) owner: Owner,
    /// The CID while it is out, [`NO_CID`] otherwise.
    pub(super) cid: u16,
    generation: u8,
    /// Times that it was sent again.
    pub(super) retries: u8,
    /// When it was sent.
    pub(super) sent_ns: u64,
}

const _: () = assert!(size_of::<Slot>() == 64);

impl Slot {
    #[inline]
    pub(super) fn is_out(&self) -> bool {
        self.cid != NO_CID
    }
}

/// One channel's side.
#[derive(Debug)]
struct Member {
    /// Its slots.
    held: usize,
    /// Commands that ended while another channel looked, or had no room for more.
    inbox: VecDeque<Ended>,
    /// Its capacity.
    inbox_max: usize,
    open: bool,
    /// Its bdev, for whether it is fenced.
    info: Arc<BdevInfo>,
}

/// The slots and their users.
#[derive(Debug)]
pub(super) struct CommandSlots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    members: Vec<Member>,
    members_open: usize,
    /// What each member is guaranteed, and what of the free slots is kept for those who hold less.
    minimum: usize,
    kept: usize,
    /// Where there are fewer slots than channels: who found none, and is next. Forgotten after a pass.
    hungry: Cell<Option<MemberId>>,
    was_hungry: Cell<bool>,
    /// Commands in inboxes.
    waiting: usize,
    /// Its CID is not to be used again: an Abort for it may be under way. It stays taken when its command ends.
    pub(super) reported: Option<u16>,
    /// That has happened.
    reserved: bool,
}

impl CommandSlots {
    #[cold]
    pub(super) fn new(count: u16) -> CommandSlots {
        let owner = Owner { member: MemberId(0), tag: Tag(0), part: false };
        let empty = || Slot {
            command: Command::default(),
            owner,
            cid: NO_CID,
            generation: 0,
            retries: 0,
            sent_ns: 0,
        };
        CommandSlots {
            slots: (0..count).map(|_| empty()).collect(),
            free: (0..count).rev().collect(),
            members: Vec::with_capacity(64),
            members_open: 0,
            minimum: 0,
            kept: 0,
            hungry: Cell::new(None),
            was_hungry: Cell::new(false),
            waiting: 0,
            reported: None,
            reserved: false,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    /// Slots whose command has not ended, or whose CID is reserved.
    pub(super) fn taken_count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// True when a channel is here, or one that has left has commands out.
    #[cold]
    pub(super) fn has_members(&self) -> bool {
        self.members.iter().any(|member| member.open)
    }

    /// True when a channel has something to fetch.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        self.waiting > 0
    }

    /// True when the namespace of this command's channel is another one now, or gone.
    #[cold]
    pub(super) fn is_fenced(&self, slot: u16) -> bool {
        let owner = self.slots.get(usize::from(slot)).map(|slot| slot.owner.member);
        let member = owner.and_then(|id| self.members.get(usize::from(id.0)));
        member.is_none_or(|member| member.info.is_fenced())
    }

    /// Takes a channel in; `inbox` keeps what it cannot take at once.
    #[cold]
    pub(super) fn join(&mut self, inbox: VecDeque<Ended>, info: Arc<BdevInfo>) -> Option<MemberId> {
        let inbox_max = inbox.capacity();
        let member = Member { held: 0, inbox, inbox_max, open: true, info };
        let at = self.members.iter().position(|member| !member.open).unwrap_or(self.members.len());
        let id = MemberId(u16::try_from(at).ok()?);
        if at == self.members.len() {
            self.members.push(member);
        } else {
            self.members[at] = member;
        }
        self.share_out();
        Some(id)
    }

    /// Lets one go that has nothing out; gives its inbox back, to be dropped elsewhere.
    #[cold]
    pub(super) fn leave(&mut self, id: MemberId) -> VecDeque<Ended> {
        let Some(member) = self.members.get_mut(usize::from(id.0)) else { return VecDeque::new() };
        // With commands out, which a closing channel has not, its place is nobody else's.
        member.open = member.held > 0;
        member.inbox_max = 0;
        self.waiting -= member.inbox.len();
        let inbox = std::mem::take(&mut member.inbox);
        self.share_out();
        inbox
    }

    #[cold]
    fn share_out(&mut self) {
        let open = self.members.iter().filter(|member| member.open);
        self.members_open = open.clone().count();
        self.minimum = NVME_ROOM_MIN.min(self.slots.len() / (2 * self.members_open.max(1)));
        self.kept = open.map(|member| self.minimum.saturating_sub(member.held)).sum();
    }

    /// Slots that this channel may take now.
    #[inline]
    pub(super) fn room(&self, id: MemberId) -> usize {
        let Some(member) = self.members.get(usize::from(id.0)) else { return 0 };
        let lacking = self.minimum.saturating_sub(member.held);
        let mut room = self.free.len().saturating_sub(self.kept - lacking);
        if self.minimum == 0 {
            room = self.room_of_few(id, member.held, room);
        }
        room.min(member.inbox_max.saturating_sub(member.held + member.inbox.len()))
    }

    /// With fewer slots than twice the channels, one that holds none and finds none gets the next.
    #[cold]
    #[inline(never)]
    fn room_of_few(&self, id: MemberId, held: usize, room: usize) -> usize {
        match self.hungry.get() {
            // Until it has come, the others go one by one.
            Some(next) if next != id => room.saturating_sub(1).min(usize::from(held == 0)),
            None if held == 0 && room == 0 => {
                self.hungry.set(Some(id));
                0
            }
            _ => room,
        }
    }

    /// Once per pass: who was next and did not come is not waited for.
    #[inline]
    pub(super) fn turn(&mut self) {
        if self.minimum == 0 && !self.free.is_empty() {
            let waited = self.was_hungry.replace(self.hungry.get().is_some());
            if waited {
                self.hungry.set(None);
                self.was_hungry.set(false);
            }
        }
    }

    /// Takes a slot; callers have asked for room.
    #[inline]
    pub(super) fn take(&mut self, id: MemberId) -> Option<u16> {
        let member = self.members.get_mut(usize::from(id.0))?;
        let slot = self.free.pop()?;
        self.kept -= usize::from(member.held < self.minimum);
        member.held += 1;
        if self.minimum == 0 && self.hungry.get() == Some(id) {
            self.hungry.set(None);
            self.was_hungry.set(false);
        }
        Some(slot)
    }

    /// Gives a slot back that was not sent, or whose command has ended.
    #[inline]
    pub(super) fn give_back(&mut self, id: MemberId, slot: u16) {
        if let Some(member) = self.members.get_mut(usize::from(id.0)) {
            member.held -= 1;
            self.kept += usize::from(member.held < self.minimum);
        }
        if self.reported == Some(slot) {
            self.reserved = true;
        } else {
            self.free.push(slot);
        }
    }

    /// The reported CID may be used again: a slot whose command has ended meanwhile is free; the slot of one that has not.
    #[cold]
    pub(super) fn end_report(&mut self) -> Option<u16> {
        let number = self.reported.take()?;
        if std::mem::take(&mut self.reserved) {
            self.free.push(number);
            return None;
        }
        Some(number)
    }

    /// The slot.
    #[inline]
    pub(super) fn get(&mut self, slot: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(slot))
    }

    /// The command that is out under this CID, with its slot.
    #[inline]
    pub(super) fn find(&mut self, cid: u16) -> Option<(u16, &mut Slot)> {
        let at = cid & SLOT_MASK;
        let slot = self.slots.get_mut(usize::from(at))?;
        (slot.cid == cid).then_some((at, slot))
    }

    /// Marks it as out and returns it with its new CID.
    #[inline]
    pub(super) fn mark_out(&mut self, slot: u16) -> Option<&mut Slot> {
        let entry = self.slots.get_mut(usize::from(slot))?;
        entry.generation = entry.generation.wrapping_add(1) & GENERATION_MASK;
        entry.cid = u16::from(entry.generation) << SLOT_BITS | slot;
        Some(entry)
    }

    /// Puts the end of a command into its channel's inbox.
    #[inline]
    pub(super) fn post(&mut self, id: MemberId, ended: Ended) {
        let Some(member) = self.members.get_mut(usize::from(id.0)) else { return };
        debug_assert!(member.inbox.len() < member.inbox_max);
        if member.open && member.inbox.len() < member.inbox_max {
            member.inbox.push_back(ended);
            self.waiting += 1;
        }
    }

    /// The next from the channel's inbox.
    #[inline]
    pub(super) fn fetch(&mut self, id: MemberId) -> Option<Ended> {
        if self.waiting == 0 {
            return None;
        }
        let ended = self.members.get_mut(usize::from(id.0))?.inbox.pop_front()?;
        self.waiting -= 1;
        Some(ended)
    }
}
