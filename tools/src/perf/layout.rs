//! Where the parts of one queue lie in the shared memory: rings, request lines, data.
//!
//! What the driver writes and what the device writes lie on different pairs of cache lines (processors fetch pairs).
//! A request's header and status share one line, as in Linux' driver.

use ringmill_core::limits::{QUEUE_SIZE_MAX, SECTOR_BYTES};
use ringmill_core::spec::virtio_ring::{DESC_BYTES, avail_bytes, desc_table_bytes, used_bytes};
use ringmill_core::units::index;

/// A request's header and status.
pub(super) const LINE_BYTES: usize = 64;
/// The status byte in it.
pub(super) const STATUS_AT: usize = 16;
/// The indirect table, in a line of its own.
pub(super) const TABLE_AT: usize = LINE_BYTES;

/// Descriptors of a request: header, data, status.
pub(super) const CHAIN_DESCRIPTORS: u16 = 3;

/// What separates parts with different writers.
const PART_ALIGN: usize = 128;
const PAGE_BYTES: usize = 4096;

/// Device and driver event suppression of a packed ring (virtio 1.2 §2.8.14).
const EVENT_BYTES: usize = 4;

/// The form of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingForm {
    /// Packed instead of split.
    pub(crate) packed: bool,
    /// One descriptor per request that names a table.
    pub(crate) indirect: bool,
}

/// Offsets from the start of a queue's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueLayout {
    pub(crate) form: RingForm,
    /// Requests in flight at most.
    pub(crate) depth: u16,
    /// Entries of the ring.
    pub(crate) size: u16,
    /// Bytes of a request's data.
    pub(crate) io_bytes: u32,
    /// Descriptor table, or packed ring.
    pub(crate) desc_at: usize,
    /// Available ring, or driver event suppression.
    pub(crate) driver_at: usize,
    /// Used ring, or device event suppression.
    pub(crate) device_at: usize,
    pub(crate) lines_at: usize,
    pub(crate) data_at: usize,
    /// Of all, whole pages.
    pub(crate) len_bytes: usize,
}

impl QueueLayout {
    /// The smallest ring (of at least 128 entries) that holds `depth` requests; `None` when no ring is large enough.
    pub(crate) fn new(form: RingForm, depth: u16, io_bytes: u32) -> Option<QueueLayout> {
        let each = if form.indirect { 1 } else { CHAIN_DESCRIPTORS };
        let entries = depth.checked_mul(each).filter(|entries| *entries <= QUEUE_SIZE_MAX)?;
        let size = entries.next_power_of_two().max(128);
        let (driver_bytes, device_bytes) = if form.packed {
            (EVENT_BYTES, EVENT_BYTES)
        } else {
            (avail_bytes(size), used_bytes(size))
        };
        let driver_at = desc_table_bytes(size).next_multiple_of(PART_ALIGN);
        let device_at = (driver_at + driver_bytes).next_multiple_of(PART_ALIGN);
        let lines_at = (device_at + device_bytes).next_multiple_of(PART_ALIGN);
        let mut layout = QueueLayout {
            form,
            depth,
            size,
            io_bytes,
            desc_at: 0,
            driver_at,
            device_at,
            lines_at,
            data_at: 0,
            len_bytes: 0,
        };
        let lines_end = lines_at + usize::from(depth) * layout.line_bytes();
        layout.data_at = lines_end.next_multiple_of(PAGE_BYTES);
        let data_bytes = usize::from(depth).checked_mul(index(layout.data_stride_u32()))?;
        layout.len_bytes = (layout.data_at + data_bytes).next_multiple_of(PAGE_BYTES);
        Some(layout)
    }

    fn data_stride_u32(&self) -> u32 {
        self.io_bytes.max(1).next_multiple_of(SECTOR_BYTES)
    }

    /// Bytes from one request's data to the next one's.
    pub(crate) fn data_stride(&self) -> u64 {
        u64::from(self.data_stride_u32())
    }

    /// Bytes from one request's line to the next one's.
    pub(crate) fn line_bytes(&self) -> usize {
        if self.form.indirect { 2 * LINE_BYTES } else { LINE_BYTES }
    }

    /// Bytes of the driver's and the device's part.
    pub(crate) fn part_bytes(&self) -> (usize, usize) {
        if self.form.packed {
            (EVENT_BYTES, EVENT_BYTES)
        } else {
            (avail_bytes(self.size), used_bytes(self.size))
        }
    }
}

const _: () = assert!(TABLE_AT + CHAIN_DESCRIPTORS as usize * DESC_BYTES <= 2 * LINE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_share_no_line() {
        for (packed, indirect) in [(false, false), (false, true), (true, false), (true, true)] {
            for (depth, io_bytes) in [(1, 512), (128, 4096), (1000, 1 << 20)] {
                let l = QueueLayout::new(RingForm { packed, indirect }, depth, io_bytes).unwrap();
                let (driver, device) = l.part_bytes();
                assert!(desc_table_bytes(l.size) <= l.driver_at);
                assert!(
                    l.driver_at + driver <= l.device_at && l.device_at.is_multiple_of(PART_ALIGN)
                );
                assert!(l.device_at + device <= l.lines_at);
                assert!(l.lines_at + usize::from(depth) * l.line_bytes() <= l.data_at);
                assert_eq!(l.data_at % PAGE_BYTES, 0);
                assert!(l.size >= depth * if indirect { 1 } else { 3 });
            }
        }
    }

    #[test]
    fn a_depth_that_no_ring_holds_is_refused() {
        let form = RingForm { packed: false, indirect: false };
        assert!(QueueLayout::new(form, 10_922, 512).is_some_and(|l| l.size == 32_768));
        assert_eq!(QueueLayout::new(form, 10_923, 512), None);
        let form = RingForm { packed: false, indirect: true };
        assert!(QueueLayout::new(form, 32_768, 512).is_some());
    }
}
