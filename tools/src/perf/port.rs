//! Where a load sends its requests: a virtqueue of a disk behind a socket, or the channel of a bdev.

use ringmill_core::mem::Segment;

use super::PerfError;
use super::slots::Op;

/// A queue with fixed slots, each with a data buffer. Polled by one thread.
pub(crate) trait Port {
    /// Requests that may be in flight.
    fn depth(&self) -> u16;

    /// Prepares a request; it starts at the next `publish`.
    fn push(&mut self, slot: u16, op: Op, offset_bytes: u64);

    /// Starts what was pushed.
    ///
    /// # Errors
    /// When the other end cannot be told.
    fn publish(&mut self) -> Result<(), PerfError>;

    /// Appends the slots of finished requests.
    ///
    /// # Errors
    /// When the other end broke the rules.
    fn poll(&mut self, done: &mut Vec<u16>) -> Result<(), PerfError>;

    /// The status of a finished request; 0 is success.
    fn status(&self, slot: u16) -> u8;

    /// A slot's data; the request's from `publish` until `poll` returns it.
    fn data(&self, slot: u16) -> Segment;

    /// Socket and queue, or bdev, for messages.
    fn place(&self) -> &str;

    /// Indices of requests given and returned, for messages.
    fn indices(&self) -> (u16, u16);
}
