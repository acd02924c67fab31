//! Newtypes for the quantities whose mix-up would lose data.
//!
//! Arithmetic on them is checked where the operands come from a guest; a bare integer never silently becomes an address.

use std::fmt;

/// An address in a guest's physical address space, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestAddr(pub u64);

impl GuestAddr {
    /// The address `len_bytes` further on, or `None` when it would wrap.
    #[inline]
    pub fn checked_add(self, len_bytes: u64) -> Option<GuestAddr> {
        self.0.checked_add(len_bytes).map(GuestAddr)
    }
}

impl fmt::LowerHex for GuestAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// An address in this process that the kernel, a device or a copy may reach. It is data, not a pointer: only the
/// shared-memory modules turn it into one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct HostAddr(pub usize);

impl HostAddr {
    /// The address `len_bytes` further on inside the same segment.
    #[inline]
    #[must_use]
    pub fn advanced(self, len_bytes: usize) -> HostAddr {
        HostAddr(self.0.wrapping_add(len_bytes))
    }
}

/// An address as a device behind an IOMMU sees it, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Iova(pub u64);

/// A processor as the operating system numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct CoreId(pub u32);

impl fmt::Display for CoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number of a virtqueue or device queue, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct QueueId(pub u16);

/// Widens an index for use with slices. Every supported target has pointers of at least 32 bits.
#[inline]
#[must_use]
pub const fn index(value: u32) -> usize {
    value as usize
}

/// Narrows a byte count that a bound has already kept below 4 GiB; a larger one saturates.
#[inline]
#[must_use]
pub fn len_u32(len_bytes: usize) -> u32 {
    u32::try_from(len_bytes).unwrap_or(u32::MAX)
}

/// Widens a length or index to the 64 bits in which disk offsets are counted.
#[inline]
#[must_use]
pub const fn bytes_u64(len_bytes: usize) -> u64 {
    len_bytes as u64
}

/// Converts a 64-bit count to `usize`; on the 64-bit targets that ringmill supports nothing is lost.
#[inline]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the assertion below keeps 32-bit targets out")]
pub const fn usize_of(value: u64) -> usize {
    value as usize
}

const _: () = assert!(usize::BITS == 64, "ringmill addresses guest memory of more than 4 GiB");
