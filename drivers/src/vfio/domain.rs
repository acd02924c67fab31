//! What a device reaches: one container with an IOMMU, and the memory in it.
//!
//! Flow: the largest range of IOVAs that the kernel offers is chosen once; memory lies in it as it does in the arena.
//! Owner: control threads. **Invariant:** IOVA 0 and its page are never mapped, so a device that follows a null pointer is
//! stopped; after [`VfioDomain::close`] nothing is reachable.
//!
//! One container per device: what one device may reach, a broken other one does not, and closing one ends its mappings
//! whatever happens elsewhere. The price is that memory for two devices counts twice against RLIMIT_MEMLOCK.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ringmill_core::mem::{DmaDomain, DmaError, IovaOffset, Mapping};
use ringmill_core::units::{HostAddr, bytes_u64};
use vfio_ioctls::VfioContainer;

use super::capability::IovaRange;
use super::{memlock, sys};

/// The first IOVA is a multiple of this, as the arena's address is, so that the IOMMU can use its largest pages.
const ALIGN_BYTES: u64 = 1 << 30;

/// The IOVAs in use, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Aperture {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Aperture {
    /// The largest of the ranges, cut to whole gigabytes at its start and never from 0.
    pub(super) fn choose(ranges: &[IovaRange]) -> Option<Aperture> {
        ranges
            .iter()
            .filter_map(|range| {
                let first = range.first.max(1).checked_next_multiple_of(ALIGN_BYTES)?;
                (first < range.last).then_some(Aperture { first, last: range.last })
            })
            .max_by_key(|aperture| aperture.last - aperture.first)
    }

    /// The IOVA of memory at `host` under `offset`.
    fn place(self, offset: IovaOffset, host: HostAddr, len_bytes: u64) -> Result<u64, u64> {
        let iova = offset.iova(host).0;
        let last = iova.checked_add(len_bytes.saturating_sub(1)).ok_or(iova)?;
        if iova >= self.first && last <= self.last { Ok(iova) } else { Err(iova) }
    }
}

/// A device's container as a domain.
pub(super) struct VfioDomain {
    device: String,
    aperture: Aperture,
    offset: IovaOffset,
    /// `None` once closed. Held for reading during calls that may last.
    container: RwLock<Option<VfioContainer>>,
    /// IOVA and length of what is mapped.
    mapped: Mutex<BTreeMap<u64, usize>>,
}

impl std::fmt::Debug for VfioDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioDomain")
            .field("device", &self.device)
            .field("aperture", &self.aperture)
            .finish_non_exhaustive()
    }
}

impl VfioDomain {
    /// `arena` is the first address of all memory that can be mapped.
    pub(super) fn new(
        device: &str,
        container: VfioContainer,
        aperture: Aperture,
        arena: HostAddr,
    ) -> VfioDomain {
        VfioDomain {
            device: device.to_owned(),
            aperture,
            offset: IovaOffset(aperture.first.wrapping_sub(bytes_u64(arena.0))),
            container: RwLock::new(Some(container)),
            mapped: Mutex::new(BTreeMap::new()),
        }
    }

    /// Calls `with` with the container while there is one.
    pub(super) fn with_container<T>(&self, with: impl FnOnce(&VfioContainer) -> T) -> Option<T> {
        let container = self.container.read().unwrap_or_else(PoisonError::into_inner);
        container.as_ref().map(with)
    }

    /// Unmaps everything and gives the container back, after the call that is under way.
    pub(super) fn close(&self) -> Option<VfioContainer> {
        let container = self.container.write().unwrap_or_else(PoisonError::into_inner).take()?;
        let mapped =
            std::mem::take(&mut *self.mapped.lock().unwrap_or_else(PoisonError::into_inner));
        for (iova, len_bytes) in mapped {
            if let Err(error) = sys::unmap_dma(&container, iova, len_bytes) {
                // Closing the container unmaps it, too.
                tracing::warn!("{}: unmapping {len_bytes} bytes: {error}", self.device);
            }
        }
        Some(container)
    }

    fn gone(&self) -> DmaError {
        DmaError::Gone { device: self.device.clone() }
    }

    fn failure(&self, len_bytes: usize, source: io::Error) -> DmaError {
        let device = self.device.clone();
        if source.raw_os_error() == Some(libc::ENOMEM)
            && let Some((need_bytes, limit)) = memlock::exceeded(bytes_u64(len_bytes))
        {
            return DmaError::Memlock { device, need_bytes, limit };
        }
        DmaError::Refused { device, len_bytes, source }
    }
}

impl DmaDomain for VfioDomain {
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        let (host, len_bytes) = mapping.pages();
        self.with_container(|container| {
            let iova =
                self.aperture.place(self.offset, host, bytes_u64(len_bytes)).map_err(|iova| {
                    DmaError::Range { device: self.device.clone(), iova, last: self.aperture.last }
                })?;
            sys::map_dma(container, iova, mapping)
                .map_err(|source| self.failure(len_bytes, source))?;
            self.mapped.lock().unwrap_or_else(PoisonError::into_inner).insert(iova, len_bytes);
            Ok(())
        })
        .unwrap_or_else(|| Err(self.gone()))
    }

    fn unmap(&self, mapping: &Arc<Mapping>) {
        let (host, _) = mapping.pages();
        let iova = self.offset.iova(host).0;
        self.with_container(|container| {
            let found = self.mapped.lock().unwrap_or_else(PoisonError::into_inner).remove(&iova);
            let Some(len_bytes) = found else { return };
            if let Err(error) = sys::unmap_dma(container, iova, len_bytes) {
                tracing::error!("{}: unmapping {len_bytes} bytes: {error}", self.device);
            }
        });
    }

    fn offset(&self) -> IovaOffset {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn choose(ranges: &[(u64, u64)]) -> Option<(u64, u64)> {
        let ranges: Vec<_> =
            ranges.iter().map(|&(first, last)| IovaRange { first, last }).collect();
        Aperture::choose(&ranges).map(|aperture| (aperture.first, aperture.last))
    }

    #[test]
    fn the_largest_range_is_chosen_and_never_from_zero() {
        // VT-d with 39 bits: interrupts lie in between.
        let vtd = [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)];
        assert_eq!(choose(&vtd), Some((4 * GIB, (1 << 39) - 1)));
        assert_eq!(choose(&[(0, u64::MAX)]), Some((GIB, u64::MAX)));
        assert_eq!(choose(&[(0, 0xfedf_ffff)]), Some((GIB, 0xfedf_ffff)));
        for small in [&[][..], &[(0, GIB)], &[(0, 4095)], &[(u64::MAX - 5, u64::MAX)]] {
            assert_eq!(choose(small), None);
        }
    }

    #[test]
    fn memory_outside_the_aperture_has_no_place() {
        let aperture = Aperture { first: GIB, last: 2 * GIB - 1 };
        let arena = 0x10_0000_0000_u64;
        let offset = IovaOffset(GIB.wrapping_sub(arena));
        let place =
            |host: u64, len| aperture.place(offset, HostAddr(usize::try_from(host).unwrap()), len);
        assert_eq!(place(arena, GIB), Ok(GIB));
        assert_eq!(place(arena + 4096, GIB - 4096), Ok(GIB + 4096));
        assert_eq!(place(arena + 4096, GIB), Err(GIB + 4096));
        assert_eq!(place(arena + GIB, 4096), Err(2 * GIB));
        assert_eq!(place(arena - 4096, 4096), Err(GIB - 4096));
        assert!(place(arena, u64::MAX).is_err());
    }
}
