//! Virtqueues: the rings that a guest and a reactor share.
//!
//! [`Virtqueue`] is the narrow seam between ring formats and the worker; the worker is monomorphized over it.
//! [`split`] implements virtio 1.2 §2.7, [`packed`] §2.8; chains are walked and translated by [`chain`].

mod chain;
mod notify;
mod packed;
mod position;
mod split;
mod windows;

pub use chain::{Chain, ChainFault};
pub use notify::needs_event;
pub use packed::PackedQueue;
pub use split::SplitQueue;
pub use windows::RingWindows;

use ringmill_core::io::Batch;
use ringmill_core::mem::MemTable;
use thiserror::Error;

/// What ends a queue: the guest's driver broke the ring protocol, or its memory went away.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// More new entries than the ring has.
    #[error(
        "the available index jumped from {seen} to {index}, more than the queue's {size} entries"
    )]
    IndexJump {
        /// The index up to which entries were taken.
        seen: u16,
        /// The index found.
        index: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A head outside the descriptor table.
    #[error("the available ring names descriptor {head}, the table has {size}")]
    Head {
        /// The head.
        head: u16,
        /// Entries in the table.
        size: u16,
    },
    /// A head (packed: buffer id) that has not been returned yet.
    #[error("head or buffer id {head} was made available again while it is in flight")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A buffer id outside the range that the queue can tell apart.
    #[error("a chain's buffer id is {id}, the packed ring has {size} entries")]
    BufferId {
        /// The id.
        id: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// More descriptors than the packed ring has free.
    #[error(
        "a chain at descriptor {at} of the packed ring runs into descriptors that are in flight: of {size} entries {free} were free"
    )]
    Overrun {
        /// Where the chain begins.
        at: u16,
        /// Entries that were free.
        free: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A list whose later descriptors were not made available with its first (virtio 1.2 §2.8.6).
    #[error("a chain goes on at entry {at} of the packed ring, which is not marked as available")]
    Torn {
        /// Where it goes on.
        at: u16,
    },
    /// Descriptors that changed after they had been made available.
    #[error(
        "the driver changed descriptors of the packed ring after it had made them available, at or before entry {at}"
    )]
    Changed {
        /// Where it was noticed.
        at: u16,
    },
    /// `next` outside its table.
    #[error("a descriptor's next field is {next}, its table has {size} entries")]
    Next {
        /// The field.
        next: u16,
        /// Entries in the table.
        size: u32,
    },
    /// A loop, or a chain longer than any queue.
    #[error("a descriptor chain is longer than {limit} descriptors or loops")]
    Loop {
        /// The bound.
        limit: u32,
    },
    /// An indirect descriptor where there must be none, or a bad table.
    #[error("indirect descriptor: {0}")]
    Indirect(&'static str),
    /// Device-readable after device-writable (virtio 1.2 §2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    /// No byte for the status.
    #[error(
        "a request has no writable byte for its status, or its address {addr:#x} is not guest memory"
    )]
    NoStatus {
        /// Where the status byte would be; 0 when the chain has no writable part or its end wraps.
        addr: u64,
    },
    /// The memory behind the rings is gone.
    #[error("the guest's memory was truncated under the queue")]
    MemoryGone,
}

/// A ring as the worker uses it.
pub trait Virtqueue: Send + 'static {
    /// Goes on in other windows onto the same ring (the front-end has laid its memory out anew); returns the old ones.
    fn relocate(&mut self, windows: RingWindows) -> RingWindows;

    /// Looks at the guest's side once: entries that can be taken now. A split ring reads its index; a packed one has none
    /// and looks ahead over the descriptors, each once, a bounded number per call: what is not counted now is later.
    ///
    /// # Errors
    /// [`QueueError::IndexJump`], [`QueueError::Overrun`], [`QueueError::Torn`].
    fn available(&mut self) -> Result<u16, QueueError>;

    /// Asks the processor to fetch what the next `count` calls of `pop` will read of the ring. A hint.
    fn prefetch(&self, count: usize);

    /// Takes the next chain (`available` said that there is one), translated into the batch's segment list; `Ok(None)`
    /// when the list has no room for it beside other requests (nothing was taken then).
    ///
    /// # Errors
    /// Protocol violations; the queue is broken then.
    fn pop(
        &mut self,
        mem: &MemTable,
        hint: &mut usize,
        batch: &mut Batch,
    ) -> Result<Option<Chain>, QueueError>;

    /// Puts back the chain that was taken last, `head`; it will be popped again. Called in reverse order for several.
    fn unpop(&mut self, head: u16);

    /// Writes a used element; the guest sees it after `publish`.
    fn put_used(&mut self, head: u16, written_bytes: u32);

    /// Makes all used elements visible. With `ask`: true when the guest wants an interrupt for them; a queue without a
    /// call fd saves itself the fence.
    fn publish(&mut self, ask: bool) -> bool;

    /// Tells the guest that it need not kick.
    fn suppress_kicks(&mut self);

    /// Asks for a kick at the next entry, then looks again: true when entries are there already.
    fn request_kick(&mut self) -> bool;

    /// The front-end goes without having asked for `base`: leaves in guest memory what a successor needs to find the place.
    /// Nothing is taken or used after this.
    fn leave(&self);

    /// Where the queue would go on, in the format of GET_VRING_BASE.
    fn base(&self) -> u32;

    /// Entries in the ring.
    fn size(&self) -> u16;

    /// The next available and the next used index, for status output; those of a packed ring have the wrap counter in
    /// bit 15.
    fn indices(&self) -> (u16, u16);

    /// True once the guest's memory went away.
    fn memory_gone(&self) -> bool;
}
