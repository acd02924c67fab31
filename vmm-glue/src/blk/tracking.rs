//! What a queue notes about its requests for those who come after it.
//!
//! The place of the in-flight log (a crash's successor) and of the dirty log (a migration's destination).

/// What must be noted about requests for a successor or a migration. Nothing, an in-flight log or a dirty log:
/// monomorphized, so nothing costs nothing.
pub trait Tracking: Send + 'static {
    /// A head was taken from the ring.
    fn taken(&mut self, head: u16);
    /// A head that was taken last goes back to the ring: it was not handed to the device.
    fn put_back(&mut self, _head: u16) {}
    /// A head is about to be visible in the used ring.
    fn answered(&mut self, head: u16);
}

/// Notes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTracking;

impl Tracking for NoTracking {
    #[inline]
    fn taken(&mut self, _head: u16) {}
    #[inline]
    fn answered(&mut self, _head: u16) {}
}
