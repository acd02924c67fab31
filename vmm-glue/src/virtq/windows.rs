//! The three parts of a ring, as windows onto guest memory.
//!
//! In: addresses from a front-end. Out: windows whose bounds and alignment were proved once. Owner: made and dropped by
//! a control thread, used by one queue on its reactor. A queue must be given windows of its own format and size: every
//! access is checked against its window.

use ringmill_core::mem::{MemTable, SharedSlice};
use ringmill_core::spec::virtio_ring::{
    AVAIL_ALIGN, DESC_ALIGN, EVENT_ALIGN, EVENT_BYTES, USED_ALIGN, avail_bytes, desc_table_bytes,
    used_bytes,
};
use ringmill_core::units::usize_of;

/// Windows onto a ring.
#[derive(Debug)]
pub struct RingWindows {
    /// Descriptor table, or descriptor ring.
    pub(super) desc: SharedSlice,
    /// Available ring, or driver event suppression.
    pub(super) avail: SharedSlice,
    /// Used ring, or device event suppression.
    pub(super) used: SharedSlice,
}

impl RingWindows {
    /// A split ring of `size` entries at the front-end's user addresses; `None` when a part does not lie inside one
    /// region or is not aligned as virtio 1.2 §2.7 demands.
    #[must_use]
    pub fn split(
        mem: &MemTable,
        size: u16,
        desc: u64,
        avail: u64,
        used: u64,
    ) -> Option<RingWindows> {
        Some(RingWindows {
            desc: mem.window_at_user_addr(desc, desc_table_bytes(size), usize_of(DESC_ALIGN))?,
            avail: mem.window_at_user_addr(avail, avail_bytes(size), usize_of(AVAIL_ALIGN))?,
            used: mem.window_at_user_addr(used, used_bytes(size), usize_of(USED_ALIGN))?,
        })
    }

    /// A packed ring of `size` entries and its driver and device event suppression, likewise (§2.8.10.1).
    #[must_use]
    pub fn packed(
        mem: &MemTable,
        size: u16,
        desc: u64,
        driver: u64,
        device: u64,
    ) -> Option<RingWindows> {
        let event = |addr| mem.window_at_user_addr(addr, EVENT_BYTES, usize_of(EVENT_ALIGN));
        Some(RingWindows {
            desc: mem.window_at_user_addr(desc, desc_table_bytes(size), usize_of(DESC_ALIGN))?,
            avail: event(driver)?,
            used: event(device)?,
        })
    }

    /// True once the memory's owner took any of it away.
    pub(super) fn failed(&self) -> bool {
        self.desc.failed() || self.avail.failed() || self.used.failed()
    }
}
