//! What a session asks of the device behind it.
//!
//! In: validated requests of one front-end. Out: done, refused, or "later". Owner: the control thread; an implementation
//! hands finished objects to the reactors by message and must not block on them: it answers [`Progress::Pending`]
//! and its owner calls [`Session::complete`](super::Session::complete) when the last reactor has answered.
//!
//! **Invariants that the session keeps:** at most one operation is pending; ring indices are below
//! [`Backend::queues_max`]; a ring is started before anything else is said about it, and started again only after it was
//! stopped or the device was reset; a refused operation leaves the session as it was, so the backend must do the same.
//!
//! Spec: vhost-user protocol, "Ring states", "Front-end message types".

use super::descriptor::SharedFd;
use super::memory::{GuestAddr, RegionDesc, UserAddr};
use super::ring::RingStart;

/// Why a backend refuses; it becomes the source of [`Error::Backend`](super::Error::Backend).
pub type Refusal = Box<dyn std::error::Error + Send + Sync>;

/// How far an operation has come.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has taken effect on every reactor.
    Done,
    /// It has begun. The front-end waits until [`Session::complete`](super::Session::complete) is called.
    Pending,
}

/// How far the stopping of a ring has come.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopProgress {
    /// No request is in flight any more, and none will be taken.
    Done {
        /// Where the ring continues, as [`RingStart::base`] has it.
        base: u32,
    },
    /// Requests are still in flight. The front-end waits until they are done.
    Pending,
}

/// How a pending operation ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Any operation but the stopping of a ring.
    Done,
    /// [`Backend::stop_ring`].
    Stopped {
        /// Where the ring continues, as [`RingStart::base`] has it.
        base: u32,
    },
}

/// The device behind one session.
pub trait Backend {
    /// The virtio feature bits on offer. The session adds VHOST_USER_F_PROTOCOL_FEATURES.
    fn device_features(&self) -> u64;

    /// Rings of the device: 1 to [`RINGS_MAX`](super::message::RINGS_MAX), and the same during the whole session.
    fn queues_max(&self) -> u16;

    /// Memory regions that can exist at once; at least [`TABLE_REGIONS_MAX`](super::message::TABLE_REGIONS_MAX).
    fn mem_slots_max(&self) -> u64;

    /// The front-end has acknowledged exactly these bits (VHOST_USER_F_PROTOCOL_FEATURES taken out): a subset of
    /// [`Self::device_features`]. Comes any number of times. While a ring runs, only VHOST_F_LOG_ALL changes; it is
    /// done when every reactor logs, or none does.
    fn set_features(&mut self, acked: u64) -> Result<Progress, Refusal>;

    /// Fills `out` with the device's configuration space from `offset` on; bytes beyond its fields are 0.
    /// `offset + out.len()` ≤ 256.
    fn get_config(&mut self, offset: u32, out: &mut [u8]) -> Result<(), Refusal>;

    /// Writes to the configuration space; `offset + data.len()` ≤ 256. `migration`: the protocol means "what the
    /// migration source had", but rust-vmm's front-ends (Cloud Hypervisor, crosvm) set it for the guest's own writes,
    /// so a field that the guest may write must be taken either way.
    fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Result<(), Refusal>;

    /// Replaces all of the guest's memory; running rings go on in it, and it holds the memory of all of them. Done when
    /// no reactor uses the old table and every request that touches it is back. Refused: the old table stands.
    fn set_mem_table(&mut self, regions: Vec<RegionDesc>) -> Result<Progress, Refusal>;

    /// Adds a region that overlaps none of the others. Done when every reactor knows it.
    fn add_mem_region(&mut self, region: RegionDesc) -> Result<Progress, Refusal>;

    /// Removes a region that was set or added with exactly these values; no running ring lies in it. Done when every
    /// request that touches it is back and it is unmapped.
    fn remove_mem_region(
        &mut self,
        guest_addr: GuestAddr,
        user_addr: UserAddr,
        len_bytes: u64,
    ) -> Result<Progress, Refusal>;

    /// Accepts a ring: its size fits its kind, its areas are aligned and each lies in one region of the current table.
    ///
    /// Being accepted is enough to return; polling may begin later (after another session's last request is back).
    /// While `ring.enabled` is false the ring takes no requests.
    fn start_ring(&mut self, index: u16, ring: RingStart) -> Result<(), Refusal>;

    /// Replaces the kick descriptor of a running ring; `None`: the ring must be polled. A kick may have been lost in
    /// between, so the ring has to be looked at once.
    fn set_ring_kick(&mut self, index: u16, kick: Option<SharedFd>) -> Result<(), Refusal>;

    /// Replaces the call descriptor of a running ring; `None`: the front-end polls. QEMU does so whenever the guest
    /// masks or unmasks the interrupt. An interrupt that was due goes to the new one.
    fn set_ring_call(&mut self, index: u16, call: Option<SharedFd>) -> Result<(), Refusal>;

    /// Replaces the error descriptor of a running ring.
    fn set_ring_err(&mut self, index: u16, err: Option<SharedFd>) -> Result<(), Refusal>;

    /// Lets a running ring take requests, or stops it from taking new ones. Disabling is done when every reactor has
    /// stopped; requests in flight may still complete.
    fn enable_ring(&mut self, index: u16, enabled: bool) -> Result<Progress, Refusal>;

    /// Stops a running ring for good: done when its last request in flight is back and its used ring is up to date.
    /// Must not fail for a reason that the front-end cannot see: a refusal ends the session.
    fn stop_ring(&mut self, index: u16) -> Result<StopProgress, Refusal>;

    /// Stops every running ring and brings the device into the state of a new session; features and memory stay. Done
    /// when the last request in flight is back.
    fn reset_device(&mut self) -> Result<Progress, Refusal>;
}
