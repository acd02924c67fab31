//! NVMe controllers, driven from this process over any [`PciBacking`].
//!
//! Flow: [`attach`] (on a job thread) brings a controller up and starts its thread; the namespaces are bdevs whose channels
//! put entries straight into queue pairs of their reactor. Owner: the controller's thread owns admin queue, registers and
//! everything that breaks; a reactor owns its queue pair. **Invariant:** a request ends only when the device provably cannot
//! touch its memory any more, and nothing that a device answers panics or makes anybody wait without bound.

mod admin;
mod attach;
mod bdev;
mod channel;
mod controller;
mod error;
mod events;
mod identify;
mod inquiry;
mod job;
mod joint;
mod list;
mod namespaces;
mod options;
mod orders;
mod pairs;
mod parts;
mod prp;
mod qpair;
mod queues;
mod quirks;
mod recovery;
mod registers;
mod report;
mod rings;
mod sgl;
mod shared;
mod sleep;
mod slots;
mod split;
mod status;
mod target;
#[cfg(test)]
mod tests;
mod thread;

use std::fmt;
use std::sync::Arc;

use ringmill_core::bdev::Bdev;
use ringmill_core::reactor::ReactorHandle;

use crate::pci::{CancelToken, PciBacking};

pub use channel::NvmeChannel;
pub use error::NvmeError;
pub use options::{ActionOnTimeout, NvmeOptions};
pub use parts::{
    BindVector, DiscardLimits, Interrupts, NamespaceShape, QueueMemory, QueueMemoryError,
    QueuePairParts, ShadowDoorbells, WriteZeroesLimits,
};
pub use qpair::QueuePair;
pub use report::{ControllerInfo, ControllerState, Counters, Health, NamespaceInfo};
pub use shared::{FailReason, Order, Overdue, QueueCounters, QueueShared, Trouble};

/// What happened to a controller. Told on its own thread: pass it on and return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NvmeEvent {
    /// Namespaces came, went or have another size: ask [`NvmeControl::namespaces`] again. Sizes are published by whoever
    /// hears this (`Registry::resize` with [`NamespaceInfo::blocks_count`]).
    Namespaces,
    /// The controller is lost; every request has ended or will at once. Remove its bdevs, then [`NvmeControl::detach`].
    Removed {
        /// Why, for people.
        reason: String,
    },
    /// [`ControllerInfo::state`] changed.
    State,
}

/// Hears of events.
pub type NvmeEvents = Arc<dyn Fn(NvmeEvent) + Send + Sync>;

/// A namespace and its bdev, `<name>n<nsid>`.
#[derive(Clone)]
pub struct Namespace {
    /// What it is.
    pub info: NamespaceInfo,
    /// The disk; `None` where [`NamespaceInfo::refused`] says why there is none. The same object for as long as the
    /// namespace stays; another one under the same name means that another namespace took its place.
    pub bdev: Option<Arc<dyn Bdev>>,
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace").field("info", &self.info).finish_non_exhaustive()
    }
}

/// An attached controller, whatever it is attached over. All calls are for control threads.
pub trait NvmeControl: Send + Sync + fmt::Debug {
    /// What it is and how it does. Never waits.
    fn info(&self) -> ControllerInfo;

    /// Its namespaces, by number. Never waits.
    fn namespaces(&self) -> Vec<Namespace>;

    /// The reactors that have a queue pair, where these are fewer than there are reactors: every namespace's bdev then
    /// belongs into a `CrossBdev` with these owners.
    fn owners(&self) -> Option<Vec<ReactorHandle>>;

    /// Resets the controller; requests in flight are done again. Blocks, bounded by the controller's own time-outs.
    ///
    /// # Errors
    /// When it does not come back, or is lost.
    fn reset(&self) -> Result<(), NvmeError>;

    /// What the controller says about its health, at most some seconds old. Blocks, bounded.
    ///
    /// # Errors
    /// When it does not answer.
    fn health(&self) -> Result<Health, NvmeError>;

    /// Lets go of the controller: queues deleted, shut down, disabled, bus master off, closed. Blocks, bounded. Channels are
    /// to be closed before; requests of those that are not end with `IoStatus::Gone`. A second call does nothing.
    fn detach(&self);
}

/// Brings a controller up for these reactors. Blocks for as long as the controller says that it may take; for job threads.
///
/// # Errors
/// One sentence that says what is wrong and what to do; the device is disabled then, and no bus master.
pub fn attach<B: PciBacking>(
    backing: B,
    options: NvmeOptions,
    reactors: &[ReactorHandle],
    events: NvmeEvents,
) -> Result<Arc<dyn NvmeControl>, NvmeError> {
    attach_until(backing, options, reactors, events, &CancelToken::default())
}

/// The same as an attempt that may end early; it is finished when this returns a controller.
///
/// # Errors
/// As for [`attach`].
pub fn attach_until<B: PciBacking>(
    backing: B,
    options: NvmeOptions,
    reactors: &[ReactorHandle],
    events: NvmeEvents,
    token: &CancelToken,
) -> Result<Arc<dyn NvmeControl>, NvmeError> {
    attach::attach(backing, options, reactors, events, token)
}
