//! Virtqueue layouts, split (virtio 1.2 §2.7) and packed (§2.8), and the feature bits that concern rings (§6).

/// This descriptor continues with the one that `next` names.
pub const DESC_F_NEXT: u16 = 1;
/// The device writes this buffer (otherwise it reads it).
pub const DESC_F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;

/// The driver asks for no interrupts (only without EVENT_IDX).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// The device asks for no kicks (only without EVENT_IDX).
pub const USED_F_NO_NOTIFY: u16 = 1;

/// One descriptor is 16 bytes: address, length, flags, next.
pub const DESC_BYTES: usize = 16;
/// One used element is 8 bytes: id, length.
pub const USED_ELEM_BYTES: usize = 8;
/// `flags` and `idx` precede both rings.
pub const RING_HEADER_BYTES: usize = 4;

/// Alignment of the descriptor table (§2.7).
pub const DESC_ALIGN: u64 = 16;
/// Alignment of the available ring.
pub const AVAIL_ALIGN: u64 = 2;
/// Alignment of the used ring.
pub const USED_ALIGN: u64 = 4;

/// Packed: equals the driver's wrap counter in an available descriptor, the device's in a used one (§2.8.1).
pub const PACKED_DESC_F_AVAIL: u16 = 1 << 7;
/// Packed: differs from [`PACKED_DESC_F_AVAIL`] in an available descriptor, equals it in a used one (§2.8.1).
pub const PACKED_DESC_F_USED: u16 = 1 << 15;

/// Packed: tell about everything (§2.8.10).
pub const EVENT_FLAGS_ENABLE: u16 = 0;
/// Packed: tell about nothing.
pub const EVENT_FLAGS_DISABLE: u16 = 1;
/// Packed: tell when the descriptor that the structure names is passed (only with EVENT_IDX).
pub const EVENT_FLAGS_DESC: u16 = 2;

/// An event suppression structure is 4 bytes: offset and wrap counter (15 and 1 bits), flags (§2.8.14).
pub const EVENT_BYTES: usize = 4;
/// Where the flags lie in it.
pub const EVENT_FLAGS_AT: usize = 2;
/// Alignment of both event suppression structures (§2.8.10.1).
pub const EVENT_ALIGN: u64 = 4;

/// Indirect descriptors are understood.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `used_event` and `avail_event` are understood.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// The device follows virtio 1.0 or later.
pub const F_VERSION_1: u64 = 1 << 32;
/// Packed virtqueues.
pub const F_RING_PACKED: u64 = 1 << 34;

/// Bytes of a split ring's available part, with `used_event`.
#[must_use]
pub const fn avail_bytes(size: u16) -> usize {
    RING_HEADER_BYTES + 2 * size as usize + 2
}

/// Bytes of a split ring's used part, with `avail_event`.
#[must_use]
pub const fn used_bytes(size: u16) -> usize {
    RING_HEADER_BYTES + USED_ELEM_BYTES * size as usize + 2
}

/// Bytes of the descriptor table, or of a packed ring.
#[must_use]
pub const fn desc_table_bytes(size: u16) -> usize {
    DESC_BYTES * size as usize
}
