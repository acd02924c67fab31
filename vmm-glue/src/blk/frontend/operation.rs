//! What a front-end does to its rings and its memory, one after the other.
//!
//! Owner: the control thread. **Invariant:** an operation goes through its phases in order and ends; the one that cannot be
//! done ends before anything was changed.

use std::sync::Arc;

use ringmill_core::mem::MemTable;
use ringmill_core::reactor::PollerId;

use super::moving::Move;

/// What an operation does with its rings.
pub(super) enum Kind {
    /// SET_MEM_TABLE, REM_MEM_REG: nothing may be in flight while regions go.
    ReplaceMemory(Arc<MemTable>),
    /// ADD_MEM_REG.
    AddMemory(Arc<MemTable>),
    /// Rings may run, and the device has to reach the guest's memory before they start.
    MapMemory,
    /// Another front-end's rings may run: the device need not reach this one's memory.
    UnmapMemory,
    /// SET_VRING_ENABLE.
    Enable(u16, bool),
    /// GET_VRING_BASE.
    Stop(u16),
    /// RESET_DEVICE.
    Reset,
    /// The front-end is gone, or is sent away.
    Close,
    /// The bdev is being removed.
    LoseBdev,
    /// Queues go to other reactors.
    Move(Move),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A thread makes memory reachable for the device.
    Map,
    Quiesce,
    Apply,
    /// Only of a move: what was taken goes to its new reactor.
    Place,
    /// A thread ends that the device reaches memory.
    Unmap,
}

impl Kind {
    /// What is done, one after the other.
    const fn phases(&self) -> &'static [Phase] {
        use Phase::{Apply, Map, Place, Quiesce, Unmap};
        match self {
            Kind::ReplaceMemory(_) => &[Map, Quiesce, Apply, Unmap],
            Kind::AddMemory(_) => &[Map, Apply],
            Kind::MapMemory => &[Map],
            Kind::UnmapMemory => &[Unmap],
            Kind::Enable(..) => &[Apply],
            Kind::Stop(_) | Kind::Reset => &[Quiesce, Apply],
            Kind::LoseBdev | Kind::Close => &[Quiesce, Apply, Unmap],
            Kind::Move(_) => &[Quiesce, Apply, Place],
        }
    }
}

pub(super) struct Operation {
    pub(super) number: u64,
    pub(super) kind: Kind,
    pub(super) phase: Phase,
    /// Phases that were begun.
    phases_count: usize,
    /// Rings (or the thread) that have not answered yet.
    pub(super) waiting: usize,
    pub(super) base: u32,
    /// The rings that the operation has quiesced; only they take part in what follows.
    pub(super) quiesced: Vec<PollerId>,
    /// Why it cannot be done: what is left of it is left out.
    pub(super) problem: Option<String>,
}

impl Operation {
    pub(super) fn new(number: u64, kind: Kind) -> Operation {
        Operation {
            number,
            phase: kind.phases()[0],
            kind,
            phases_count: 0,
            waiting: 0,
            base: 0,
            quiesced: Vec::new(),
            problem: None,
        }
    }

    /// Enters the next phase; `None` when there is no more to do.
    pub(super) fn next_phase(&mut self) -> Option<Phase> {
        let next = self.kind.phases().get(self.phases_count).copied();
        let next = next.filter(|_| self.problem.is_none())?;
        self.phases_count += 1;
        self.phase = next;
        Some(next)
    }
}
