//! The seam between ring formats and the load: a driver's side of a virtqueue with fixed slots.

use super::slots::{Op, SlotLines};

/// A device that broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingFault {
    /// What it did.
    pub(crate) what: &'static str,
    /// Where.
    pub(crate) index: u16,
}

/// A driver's ring. A slot is pushed, published with others, and comes back from `poll` once.
pub(crate) trait DriverRing {
    /// Writes a request into the ring; the device sees it after `publish`.
    fn push(&mut self, slot: u16, op: Op, offset_bytes: u64);

    /// Shows all pushed requests to the device at once. True when the device is seen to ask for a kick; as there is no
    /// fence before that look, `kick_wanted` must be asked once more before waiting for long.
    fn publish(&mut self) -> bool;

    /// Appends the slots that the device has returned.
    ///
    /// # Errors
    /// A returned request that was not in flight.
    fn poll(&mut self, done: &mut Vec<u16>) -> Result<(), RingFault>;

    /// Whether the device asks for a kick for what is published, after a full fence.
    fn kick_wanted(&self) -> bool;

    /// The slots' memory.
    fn slots(&self) -> &SlotLines;

    /// Entries made available and entries taken back, as ring indices.
    fn indices(&self) -> (u16, u16);
}
