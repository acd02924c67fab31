//! The stretch of address space in which all memory lies that segments can name.
//!
//! Flow: reserved at first use, inaccessible → a [`Mapping`](super::Mapping) is made wherever the kernel likes and then moved
//! into a range of it → once dropped, the range is inaccessible again and free. Owner: control threads, under a lock;
//! process-wide. **Invariant:** the stretch is never unmapped, not even for a moment, so no stranger's mapping can appear in
//! it; a range that could not be made inaccessible again is never given out again.
//!
//! Why: a device's addresses differ from this process's by one constant then, so drivers need no table on the way of a
//! request. Ranges are given out lowest address first, as an IOMMU with 39 address bits reaches only the first 512 GiB.
#![expect(unsafe_code)] // UNSAFETY: reserves address space, and moves mappings over parts of it that nobody uses.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, OnceLock, PoisonError};

use memmap2::MmapRaw;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

use super::MappingError;
use crate::limits::{ARENA_BYTES_MIN, ARENA_BYTES_WANTED};
use crate::units::{HostAddr, bytes_u64};

/// The arena begins at a multiple of this, so that devices can be given pages of any size in it.
const ARENA_ALIGN_BYTES: usize = 1 << 30;

/// Between neighbours: who reads on beyond his range meets nothing, and the kernel does not merge two into one huge page.
const GAP_BYTES: usize = 4096;

/// Free ranges, first address to end.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<usize, usize>);

impl Ranges {
    /// The lowest free range of `len_bytes` whose address leaves `phase` when divided by `align` (a power of two).
    fn take(&mut self, len_bytes: usize, align: usize, phase: usize) -> Option<usize> {
        let fit = |(&start, &end): (&usize, &usize)| {
            let first = start.checked_add(phase.wrapping_sub(start) & (align - 1))?;
            (first.checked_add(len_bytes)? <= end).then_some((start, first, end))
        };
        let (start, first, end) = self.0.iter().find_map(fit)?;
        self.0.remove(&start);
        if start < first {
            self.0.insert(start, first);
        }
        if first + len_bytes < end {
            self.0.insert(first + len_bytes, end);
        }
        Some(first)
    }

    /// Gives a range back; it grows together with its neighbours.
    fn give_back(&mut self, mut start: usize, len_bytes: usize) {
        let mut end = start + len_bytes;
        if let Some(end_after) = self.0.remove(&end) {
            end = end_after;
        }
        if let Some((&before, &end_before)) = self.0.range(..start).next_back() {
            debug_assert!(end_before <= start);
            if end_before == start {
                start = before;
            }
        }
        self.0.insert(start, end);
    }
}

struct Arena {
    start: usize,
    len_bytes: usize,
    free: Mutex<Ranges>,
}

/// `None`: the kernel gives no address space.
static ARENA: OnceLock<Option<Arena>> = OnceLock::new();

/// Address space without memory, wherever the kernel likes.
fn reserve_anywhere(len_bytes: usize) -> rustix::io::Result<NonNull<c_void>> {
    // SAFETY: a new private mapping at an address of the kernel's choice touches nobody's memory.
    let got = unsafe {
        rustix::mm::mmap_anonymous(
            null_mut(),
            len_bytes,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    NonNull::new(got).ok_or(rustix::io::Errno::NOMEM)
}

/// Keeps a range out of core dumps: it is huge, or other people's.
fn keep_out_of_dumps(start: usize, len_bytes: usize) {
    // SAFETY: changes no contents; the range is ours. A kernel that refuses writes larger dumps, which harms nobody.
    let _ = unsafe { rustix::mm::madvise(start as *mut c_void, len_bytes, Advice::LinuxDontDump) };
}

impl Arena {
    /// The largest stretch that the kernel gives: RLIMIT_AS and valgrind leave less than there is.
    fn reserve() -> Option<Arena> {
        let mut len_bytes = ARENA_BYTES_WANTED;
        let (got, len_bytes) = loop {
            match reserve_anywhere(len_bytes + ARENA_ALIGN_BYTES) {
                Ok(got) => break (got.as_ptr() as usize, len_bytes),
                Err(_) if len_bytes / 2 >= ARENA_BYTES_MIN => len_bytes /= 2,
                Err(error) => {
                    tracing::error!("no address space for memory (RLIMIT_AS, ulimit -v): {error}");
                    return None;
                }
            }
        };
        keep_out_of_dumps(got, len_bytes + ARENA_ALIGN_BYTES);
        // What the rounding leaves before and after stays reserved, and unused.
        let start = got.next_multiple_of(ARENA_ALIGN_BYTES);
        let mut free = Ranges::default();
        free.give_back(start, len_bytes);
        tracing::debug!(start, len_bytes, "address space for memory");
        Some(Arena { start, len_bytes, free: Mutex::new(free) })
    }

    fn get() -> Result<&'static Arena, MappingError> {
        ARENA.get_or_init(Arena::reserve).as_ref().ok_or(MappingError::NoArena)
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Ranges> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where all mappings are, and its bytes: a device's IOVAs are host addresses moved by a constant that its domain chooses
/// for this stretch. The address is a multiple of 1 GiB and the same for the life of the process.
///
/// # Errors
/// [`MappingError::NoArena`].
pub fn arena() -> Result<(HostAddr, usize), MappingError> {
    Arena::get().map(|arena| (HostAddr(arena.start), arena.len_bytes))
}

/// A range of the arena with a mapping in it. Dropping it ends the mapping.
#[derive(Debug)]
pub(super) struct Place {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: a range of addresses; whoever accesses it answers for that (see `Mapping`).
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// Moves a mapping of `len_bytes` (whole pages of its kind) that nobody has used yet into the arena, to an address that
    /// leaves `phase` when divided by `align`.
    ///
    /// Made elsewhere and moved, not made in place: a mapping that the kernel refuses half-way (no huge pages left, a sealed
    /// file) may leave a hole behind, into which another thread's memory could fall.
    pub(super) fn adopt(
        map: MmapRaw,
        len_bytes: usize,
        align: usize,
        phase: usize,
    ) -> Result<Place, MappingError> {
        let arena = Arena::get()?;
        let need = len_bytes.saturating_add(GAP_BYTES);
        let start = arena.free().take(need, align, phase);
        let Some(start) = start else {
            let arena_bytes = bytes_u64(arena.len_bytes);
            return Err(MappingError::ArenaFull { len_bytes: bytes_u64(len_bytes), arena_bytes });
        };
        // SAFETY: the source is one whole mapping that `map` owns, and nobody has a pointer into it. The target was free, so
        // nobody uses it, and it is the caller's alone from `take` until `give_back`.
        let moved = unsafe {
            rustix::mm::mremap_fixed(
                map.as_mut_ptr().cast(),
                len_bytes,
                len_bytes,
                MremapFlags::MAYMOVE,
                start as *mut c_void,
            )
        };
        match moved {
            Ok(at) => {
                // What it would unmap is no longer there.
                std::mem::forget(map);
                let start = NonNull::new(at.cast()).ok_or(MappingError::NoArena)?;
                Ok(Place { start, len_bytes })
            }
            // Almost impossible (no memory for the kernel's own lists). Whether the range is still reserved is unknown, so it
            // is nobody's from now on.
            Err(source) => {
                Err(MappingError::Mmap { len_bytes: bytes_u64(len_bytes), source: source.into() })
            }
        }
    }

    /// The first byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes, whole pages.
    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Keeps the contents out of core dumps.
    pub(super) fn keep_out_of_dumps(&self) {
        keep_out_of_dumps(self.start.as_ptr() as usize, self.len_bytes);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let start = self.start.as_ptr();
        // SAFETY: the range is this mapping's alone, and its owner has ended all use of it.
        let over = unsafe {
            rustix::mm::mmap_anonymous(
                start.cast(),
                self.len_bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )
        };
        if let Err(error) = over {
            tracing::error!("{} bytes of address space are lost: {error}", self.len_bytes);
            return;
        }
        let start = start as usize;
        // With the same attributes as its neighbours it is one entry of the kernel's list with them.
        keep_out_of_dumps(start, self.len_bytes);
        if let Ok(arena) = Arena::get() {
            arena.free().give_back(start, self.len_bytes + GAP_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, read_to_string};
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::sync::Arc;

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, SealFlags, memfd_create};

    use super::super::{Mapping, MemTable};
    use super::*;
    use crate::units::GuestAddr;

    const MIB: usize = 1 << 20;

    fn memfd(flags: MemfdFlags, len_bytes: usize) -> OwnedFd {
        let fd = memfd_create("arena", flags | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, bytes_u64(len_bytes)).unwrap();
        fd
    }

    fn address(mapping: &Mapping) -> usize {
        mapping.base().as_ptr() as usize
    }

    /// The kernel's entries that lie in the arena: addresses and permissions.
    fn entries() -> Vec<(usize, usize, String)> {
        let (HostAddr(start), len_bytes) = arena().unwrap();
        let number = |text: &str| usize::from_str_radix(text, 16).unwrap();
        let maps = read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter_map(|line| {
                let (range, rest) = line.split_once(' ')?;
                let (from, to) = range.split_once('-')?;
                let (from, to) = (number(from), number(to));
                (to > start && from < start + len_bytes).then(|| (from, to, rest[..4].to_owned()))
            })
            .collect()
    }

    fn is_accessible(addr: usize) -> bool {
        let (_keep, pipe) = rustix::pipe::pipe().unwrap();
        // SAFETY: the kernel checks the address and answers EFAULT.
        unsafe { libc::write(pipe.as_raw_fd(), addr as *const c_void, 1) == 1 }
    }

    fn is_free(start: usize, len_bytes: usize) -> bool {
        let free = Arena::get().unwrap().free();
        free.0.iter().any(|(&from, &to)| from <= start && start + len_bytes <= to)
    }

    #[test]
    fn everything_is_in_the_arena_at_addresses_that_suit_it() {
        let (HostAddr(start), len_bytes) = arena().unwrap();
        assert!(start.is_multiple_of(1 << 30) && len_bytes >= ARENA_BYTES_MIN);
        let fd = memfd(MemfdFlags::empty(), 8 * MIB);
        let all = [
            Mapping::anonymous(10).unwrap(),
            Mapping::anonymous(5 * MIB).unwrap(),
            Mapping::pool(100_000).unwrap(),
            Mapping::foreign(&fd, 12345, 4567).unwrap(),
            Mapping::foreign(&fd, 12288, 5 * bytes_u64(MIB)).unwrap(),
            Mapping::own_file(&File::from(memfd(MemfdFlags::empty(), 3 * MIB)), 3 * MIB).unwrap(),
        ];
        for mapping in &all {
            let at = address(mapping);
            assert!(start <= at && at + mapping.len_bytes() <= start + len_bytes);
        }
        assert_eq!(address(&all[1]) % (2 * MIB), 0);
        assert_eq!(address(&all[3]) % 4096, 12345 % 4096);
        assert_eq!(address(&all[4]) % (2 * MIB), 12288, "huge pages of the file fit");
        let mut table = MemTable::anonymous(GuestAddr(0), MIB).unwrap();
        assert!(start <= table.translate(GuestAddr(5), 1, &mut 0).unwrap().host().0);
        table.remove(GuestAddr(0), bytes_u64(MIB));
    }

    #[test]
    fn a_dropped_range_is_inaccessible_whole_and_used_again() {
        let before = entries();
        let first = Mapping::anonymous(3 * MIB).unwrap();
        let at = address(&first);
        assert!(is_accessible(at) && is_accessible(at + 3 * MIB - 1));
        assert!(!is_accessible(at + 3 * MIB), "nothing behind it");
        let second = Mapping::pool(MIB).unwrap();
        let next = address(&second);
        drop(first);
        assert!(!is_accessible(at) && !is_accessible(at + 3 * MIB - 1) && is_accessible(next));
        assert!(is_free(at, 3 * MIB) && !is_free(next, MIB));
        let third = Mapping::foreign(&memfd(MemfdFlags::empty(), 3 * MIB), 0, 3 * bytes_u64(MIB));
        assert_eq!(third.as_ref().map(address).ok(), Some(at), "the lowest range that fits");
        drop((second, third));
        assert_eq!(entries(), before, "and the kernel's list is as short as it was");
        let (HostAddr(start), len_bytes) = arena().unwrap();
        assert!(is_free(start, len_bytes), "all in one piece");
    }

    #[test]
    fn what_the_kernel_refuses_costs_no_address_space() {
        let fd = memfd(MemfdFlags::ALLOW_SEALING, MIB);
        rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).unwrap();
        let before = entries();
        for _ in 0..3 {
            assert!(matches!(Mapping::foreign(&fd, 0, 4096), Err(MappingError::Mmap { .. })));
        }
        let (HostAddr(start), len_bytes) = arena().unwrap();
        let fd = memfd(MemfdFlags::empty(), 2 * len_bytes);
        let too_long = Mapping::foreign(&fd, 0, bytes_u64(len_bytes) + 1).unwrap_err();
        assert!(matches!(too_long, MappingError::ArenaFull { .. }), "{too_long}");
        assert!(too_long.to_string().contains(&(len_bytes + 4096).to_string()), "{too_long}");
        assert_eq!(entries(), before);
        assert!(is_free(start, len_bytes));
    }

    #[test]
    fn memory_in_huge_pages_begins_at_one() {
        let small = Mapping::anonymous(1).unwrap();
        let fd = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 4 * MIB);
        match Mapping::foreign(&fd, 0, 5000) {
            Ok(mapping) => {
                assert!(address(&mapping).is_multiple_of(2 * MIB));
                let at = address(&mapping);
                drop(mapping);
                assert!(!is_accessible(at) && is_free(at, 2 * MIB));
            }
            // No huge pages on this machine.
            Err(MappingError::Mmap { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        drop(small);
    }

    /// Threads that map, fill, look and unmap at the same time: nobody ever finds another one's bytes.
    #[test]
    fn threads_never_share_a_range() {
        let work = |seed: usize| {
            for round in 0..200 {
                let len = 4096 * (1 + (seed + round * 7) % 40);
                let mapping = Arc::new(Mapping::anonymous(len).unwrap());
                let window = super::super::SharedSlice::new(&mapping, 0, len, 8).unwrap();
                let mark = bytes_u64(seed << 32 | round);
                let all = (0..len).step_by(512);
                all.clone().for_each(|at| assert_eq!(window.load_u64(at), 0));
                let order = std::sync::atomic::Ordering::Relaxed;
                all.clone().for_each(|at| window.store_u64(at, mark, order));
                std::thread::yield_now();
                all.for_each(|at| assert_eq!(window.load_u64(at), mark));
            }
        };
        std::thread::scope(|scope| (1..5).for_each(|seed| drop(scope.spawn(move || work(seed)))));
        let (HostAddr(start), len_bytes) = arena().unwrap();
        assert!(is_free(start, len_bytes));
    }

    const PAGES: usize = 64;

    #[derive(Clone, Debug)]
    enum Step {
        Take { len: usize, align: u32, phase: usize },
        GiveBack(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        let take = (1usize..12, 0u32..5, 0usize..16).prop_map(|(len, align, phase)| Step::Take {
            len,
            align,
            phase,
        });
        prop_oneof![3 => take, 2 => any::<prop::sample::Index>().prop_map(Step::GiveBack)]
    }

    proptest! {
        /// The naive twin: one bool per page, and every address is tried in turn.
        #[test]
        fn ranges_agree_with_their_naive_twin(
            base in 0usize..40, steps in prop::collection::vec(step(), 1..80)
        ) {
            let mut ranges = Ranges::default();
            ranges.give_back(base, PAGES);
            let mut taken = [false; PAGES];
            let mut held: Vec<(usize, usize)> = Vec::new();
            for step in steps {
                match step {
                    Step::Take { len, align, phase } => {
                        let align = 1 << align;
                        let phase = phase & (align - 1);
                        let twin = (base..base + PAGES).find(|&at| {
                            at % align == phase
                                && (at..at + len).all(|page| taken.get(page - base) == Some(&false))
                        });
                        prop_assert_eq!(ranges.take(len, align, phase), twin);
                        if let Some(at) = twin {
                            taken[at - base..at - base + len].fill(true);
                            held.push((at, len));
                        }
                    }
                    Step::GiveBack(which) if !held.is_empty() => {
                        let (at, len) = held.swap_remove(which.index(held.len()));
                        ranges.give_back(at, len);
                        taken[at - base..at - base + len].fill(false);
                    }
                    Step::GiveBack(_) => {}
                }
                // As few ranges as there are runs of free pages, in the same places.
                let pages = |at: usize| taken.get(at).is_some_and(|taken| !taken);
                let starts: Vec<usize> = (0..PAGES)
                    .filter(|&at| pages(at) && (at == 0 || !pages(at - 1)))
                    .map(|at| at + base)
                    .collect();
                prop_assert_eq!(ranges.0.keys().copied().collect::<Vec<_>>(), starts);
                let free: usize = ranges.0.iter().map(|(start, end)| end - start).sum();
                prop_assert_eq!(free, taken.iter().filter(|taken| !**taken).count());
            }
        }
    }
}
