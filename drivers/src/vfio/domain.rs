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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use ringmill_core::mem::{DmaDomain, DmaError, IovaOffset, Mapping};
use ringmill_core::units::{HostAddr, bytes_u64};
use vfio_ioctls::VfioContainer;

use super::capability::IovaRange;
use super::{memlock, sys};

/// The first IOVA is a multiple of this, as the arena's address is, so that the IOMMU can use its largest pages.
const ALIGN_BYTES: u64 = 1 << 30;
/// Memory is mapped and unmapped in pieces of this length, and who closes the device waits for one of them: with ordinary pages
/// that is about half a second.
const PIECE_BYTES: u64 = 256 << 20;
/// The same for memory of 1 GiB pages, of which the IOMMU makes large pages of its own only if it gets them whole.
const HUGE_PIECE_BYTES: u64 = 1 << 30;

/// The kernel's side of a container.
pub(super) trait Iommu: Send + Sync {
    /// Makes `len_bytes` of the memory's pages, from `at` on, reachable at `iova`.
    fn map(&self, iova: u64, memory: &Mapping, at: usize, len_bytes: usize) -> io::Result<()>;
    /// Ends that, for exactly what one call mapped.
    fn unmap(&self, iova: u64, len_bytes: usize) -> io::Result<()>;
}

impl Iommu for VfioContainer {
    fn map(&self, iova: u64, memory: &Mapping, at: usize, len_bytes: usize) -> io::Result<()> {
        sys::map_dma(self, iova, memory, at, len_bytes)
    }

    fn unmap(&self, iova: u64, len_bytes: usize) -> io::Result<()> {
        sys::unmap_dma(self, iova, len_bytes)
    }
}

/// How long the pieces of this memory are; a power of two.
fn piece_bytes(memory: &Mapping) -> u64 {
    let block = memory.file().and_then(|(file, _)| rustix::fs::fstat(file).ok());
    let is_huge = block.is_some_and(|stat| u64::try_from(stat.st_blksize) == Ok(HUGE_PIECE_BYTES));
    if is_huge { HUGE_PIECE_BYTES } else { PIECE_BYTES }
}

/// Bytes from `iova` to the end of its piece.
fn piece_at(iova: u64, piece_bytes: u64, left: usize) -> usize {
    usize::try_from(piece_bytes - iova % piece_bytes).map_or(left, |len| len.min(left))
}

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
pub(super) struct VfioDomain<C: Iommu = VfioContainer> {
    device: String,
    aperture: Aperture,
    offset: IovaOffset,
    /// `None` once closed. Held for reading during calls that may last, a piece at most.
    container: RwLock<Option<C>>,
    /// Who holds this maps or unmaps a piece. The kernel does one at a time anyway, and who closes waits for one only.
    turn: Mutex<()>,
    /// Set before the container is taken: no more pieces.
    is_closing: AtomicBool,
    /// IOVA and length of each piece that is mapped.
    mapped: Mutex<BTreeMap<u64, usize>>,
}

impl<C: Iommu> std::fmt::Debug for VfioDomain<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioDomain")
            .field("device", &self.device)
            .field("aperture", &self.aperture)
            .finish_non_exhaustive()
    }
}

impl<C: Iommu> VfioDomain<C> {
    /// `arena` is the first address of all memory that can be mapped.
    pub(super) fn new(
        device: &str,
        container: C,
        aperture: Aperture,
        arena: HostAddr,
    ) -> VfioDomain<C> {
        VfioDomain {
            device: device.to_owned(),
            aperture,
            offset: IovaOffset(aperture.first.wrapping_sub(bytes_u64(arena.0))),
            container: RwLock::new(Some(container)),
            turn: Mutex::new(()),
            is_closing: AtomicBool::new(false),
            mapped: Mutex::new(BTreeMap::new()),
        }
    }

    /// Calls `with` with the container while there is one.
    pub(super) fn with_container<T>(&self, with: impl FnOnce(&C) -> T) -> Option<T> {
        let container = self.container.read().unwrap_or_else(PoisonError::into_inner);
        container.as_ref().map(with)
    }

    /// Unmaps everything and gives the container back, after the piece that is under way.
    pub(super) fn close(&self) -> Option<C> {
        self.is_closing.store(true, Ordering::SeqCst);
        let container = self.container.write().unwrap_or_else(PoisonError::into_inner).take()?;
        let mapped = std::mem::take(&mut *self.mapped());
        for (iova, len_bytes) in mapped {
            if let Err(error) = container.unmap(iova, len_bytes) {
                // Closing the container unmaps it, too.
                tracing::warn!("{}: unmapping {len_bytes} bytes: {error}", self.device);
            }
        }
        Some(container)
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<u64, usize>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to one piece; `None` when the device is being closed.
    fn piece<T>(&self, with: impl FnOnce(&C) -> T) -> Option<T> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_closing.load(Ordering::SeqCst) {
            return None;
        }
        let done = self.with_container(with);
        drop(turn);
        done
    }

    /// Maps the pieces of `mapping` at `iova` while `wanted` says so; false when it said no. What was mapped stays.
    fn map_pieces(
        &self,
        mapping: &Mapping,
        iova: u64,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, DmaError> {
        let (_, len_bytes) = mapping.pages();
        let piece_bytes = piece_bytes(mapping);
        let mut at = 0;
        while at < len_bytes {
            if !wanted() {
                return Ok(false);
            }
            let from = iova + bytes_u64(at);
            let len = piece_at(from, piece_bytes, len_bytes - at);
            self.piece(|container| {
                container.map(from, mapping, at, len).map(|()| self.mapped().insert(from, len))
            })
            .ok_or_else(|| self.gone())?
            .map_err(|source| self.failure(len_bytes - at, source))?;
            at += len;
        }
        Ok(true)
    }

    /// Unmaps the pieces that lie in a range. The rest is left to [`VfioDomain::close`] once that has begun.
    fn unmap_pieces(&self, iova: u64, len_bytes: usize) {
        let end = iova.saturating_add(bytes_u64(len_bytes));
        loop {
            let more = self.piece(|container| {
                let found = self.mapped().range(iova..end).next().map(|(&at, &len)| (at, len));
                let Some((at, len)) = found else { return false };
                self.mapped().remove(&at);
                if let Err(error) = container.unmap(at, len) {
                    tracing::error!("{}: unmapping {len} bytes: {error}", self.device);
                }
                true
            });
            if more != Some(true) {
                return;
            }
        }
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

impl<C: Iommu> DmaDomain for VfioDomain<C> {
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        self.map_while(mapping, &|| true).map(|_| ())
    }

    fn map_while(
        &self,
        mapping: &Arc<Mapping>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, DmaError> {
        let (host, len_bytes) = mapping.pages();
        let iova =
            self.aperture.place(self.offset, host, bytes_u64(len_bytes)).map_err(|iova| {
                DmaError::Range { device: self.device.clone(), iova, last: self.aperture.last }
            })?;
        let result = self.map_pieces(mapping, iova, wanted);
        if !matches!(result, Ok(true)) {
            self.unmap_pieces(iova, len_bytes);
        }
        result
    }

    fn unmap(&self, mapping: &Arc<Mapping>) {
        let (host, len_bytes) = mapping.pages();
        self.unmap_pieces(self.offset.iova(host).0, len_bytes);
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

    /// Notes calls; each lasts as long as the test says.
    #[derive(Default)]
    struct Slow {
        live: Mutex<BTreeMap<u64, usize>>,
        maps: std::sync::atomic::AtomicUsize,
        last_ms: u64,
        refuses_from: usize,
    }

    impl Iommu for Arc<Slow> {
        fn map(&self, iova: u64, memory: &Mapping, at: usize, len: usize) -> io::Result<()> {
            assert!(at + len <= memory.pages().1);
            let number = self.maps.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(self.last_ms));
            if self.refuses_from > 0 && number >= self.refuses_from {
                return Err(io::Error::from_raw_os_error(libc::EFAULT));
            }
            assert_eq!(self.live.lock().unwrap().insert(iova, len), None);
            Ok(())
        }

        fn unmap(&self, iova: u64, len: usize) -> io::Result<()> {
            assert_eq!(self.live.lock().unwrap().remove(&iova), Some(len), "bisected");
            Ok(())
        }
    }

    const PIECES: usize = 12;

    fn slow(last_ms: u64, refuses_from: usize) -> (Arc<Slow>, VfioDomain<Arc<Slow>>, Arc<Mapping>) {
        let slow = Arc::new(Slow { last_ms, refuses_from, ..Slow::default() });
        let len = PIECES * usize::try_from(PIECE_BYTES).unwrap();
        let mapping = Arc::new(Mapping::anonymous(len).unwrap());
        let aperture = Aperture { first: GIB, last: u64::MAX };
        // An IOVA in the middle of a piece: the first and the last one are short.
        let arena = HostAddr(mapping.pages().0.0 - 8192);
        let domain = VfioDomain::new("slow", Arc::clone(&slow), aperture, arena);
        (slow, domain, mapping)
    }

    #[test]
    fn memory_is_mapped_in_aligned_pieces_and_unmapped_in_the_same() {
        let (slow, domain, mapping) = slow(0, 0);
        domain.map(&mapping).unwrap();
        let live = slow.live.lock().unwrap().clone();
        assert_eq!(live.len(), PIECES + 1);
        let mut next = GIB + 8192;
        for (iova, len) in live {
            assert_eq!(iova, next, "no gap");
            next += bytes_u64(len);
            assert!(
                next.is_multiple_of(PIECE_BYTES)
                    || next == GIB + 8192 + bytes_u64(mapping.pages().1)
            );
        }
        domain.unmap(&mapping);
        assert!(slow.live.lock().unwrap().is_empty());
        domain.unmap(&mapping);
    }

    #[test]
    fn a_refusal_and_a_change_of_mind_in_the_middle_leave_nothing() {
        let (dear, domain, mapping) = slow(0, 5);
        assert!(matches!(domain.map(&mapping), Err(DmaError::Refused { .. })));
        assert_eq!(dear.maps.load(Ordering::SeqCst), 6);
        assert!(dear.live.lock().unwrap().is_empty());
        let (fickle, domain, mapping) = slow(0, 0);
        let is_wanted = || fickle.maps.load(Ordering::SeqCst) < 4;
        assert!(!domain.map_while(&mapping, &is_wanted).unwrap());
        assert_eq!(fickle.maps.load(Ordering::SeqCst), 4);
        assert!(fickle.live.lock().unwrap().is_empty());
    }

    #[test]
    fn who_closes_waits_for_one_piece_however_many_map() {
        let (slow, domain, mapping) = slow(100, 0);
        let domain = Arc::new(domain);
        let other = Arc::new(Mapping::anonymous(mapping.len_bytes()).unwrap());
        let mappers: Vec<_> = [mapping, other]
            .into_iter()
            .map(|mapping| {
                let domain = Arc::clone(&domain);
                std::thread::spawn(move || domain.map(&mapping))
            })
            .collect();
        while slow.maps.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        let before = slow.maps.load(Ordering::SeqCst);
        assert!(domain.close().is_some());
        assert!(
            slow.maps.load(Ordering::SeqCst) <= before + 4,
            "little more than what was under way"
        );
        for mapper in mappers {
            assert!(matches!(
                mapper.join().unwrap(),
                Err(DmaError::Gone { .. } | DmaError::Range { .. })
            ));
        }
        assert!(slow.live.lock().unwrap().is_empty(), "nothing is reachable any more");
        assert!(domain.close().is_none());
    }
}
