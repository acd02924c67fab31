//! Guest memory that the kernel keeps pinned, and its slots in the reactors' tables of registered buffers.
//!
//! Flow: a region reserves slots → a thread of its own registers it, in pieces of at most 1 GiB, in a donor ring (seconds
//! for a large guest) → each reactor clones the pieces into its own ring, at the same slots (microseconds).
//! Owner: control threads; whoever uses a pin's slots holds its `Arc`. **Invariant:** a slot belongs to one pin of the
//! process, from `reserve` until the last `Arc` is gone, and a pin holds its mapping: while a reactor's slot is filled, no
//! other memory can appear at that pin's addresses, and no other pin can be given that slot.
//!
//! Slots are numbered for the whole process, not per ring: a segment's region is its slot, on every reactor.
#![expect(unsafe_code)] // UNSAFETY: the kernel is told addresses of memory that it pins.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use io_uring::IoUring;
use thiserror::Error;

use super::Mapping;
use crate::limits::{PIN_PIECE_SHIFT, RING_BUFFERS_MAX};
use crate::units::{HostAddr, index, len_u32};

const PIECE_BYTES: usize = 1 << PIN_PIECE_SHIFT;

/// The kernel gives an ended ring's share of RLIMIT_MEMLOCK back a little later: how often and when to ask again.
const MEMLOCK_TRIES: u32 = 20;
const MEMLOCK_PAUSE: Duration = Duration::from_millis(100);

/// Why memory stays unpinned.
#[derive(Debug, Error)]
pub enum PinError {
    /// The limit, or memory itself, does not suffice.
    #[error(
        "{need_bytes} bytes of guest memory cannot be locked, RLIMIT_MEMLOCK is {limit}; raise it (LimitMEMLOCK= in the \
         unit, or the capability CAP_IPC_LOCK), or use pin = off"
    )]
    Memlock {
        /// Bytes of the memory to be pinned.
        need_bytes: u64,
        /// The limit in words.
        limit: String,
    },
    /// No slots.
    #[error("the reactors' tables of registered buffers are full; use pin = off for some disks")]
    Full,
    /// The kernel refuses otherwise.
    #[error("the kernel does not register guest memory: {0}")]
    Kernel(#[source] io::Error),
}

/// Where a pin stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PinState {
    /// Slots are reserved, nothing is registered.
    Reserved,
    /// The kernel has it; reactors may clone it.
    On,
    /// The kernel refused.
    Refused(String),
}

/// One bit per slot of every reactor's table.
struct SlotMap([u64; index(RING_BUFFERS_MAX) / 64]);

static SLOTS: Mutex<SlotMap> = Mutex::new(SlotMap([0; index(RING_BUFFERS_MAX) / 64]));

impl SlotMap {
    fn is_taken(&self, slot: usize) -> bool {
        self.0[slot / 64] & (1 << (slot % 64)) != 0
    }

    fn free_count(&self) -> usize {
        index(self.0.iter().map(|word| word.count_zeros()).sum())
    }

    /// The lowest range of `count` free slots.
    fn take(&mut self, count: usize) -> Option<usize> {
        let mut run = 0;
        for slot in 0..index(RING_BUFFERS_MAX) {
            run = if self.is_taken(slot) { 0 } else { run + 1 };
            if run == count {
                let first = slot + 1 - count;
                (first..=slot).for_each(|slot| self.0[slot / 64] |= 1 << (slot % 64));
                return Some(first);
            }
        }
        None
    }

    fn give_back(&mut self, first: usize, count: usize) {
        (first..first + count).for_each(|slot| self.0[slot / 64] &= !(1 << (slot % 64)));
    }
}

/// A range of slots of its own.
#[derive(Debug)]
struct SlotRange {
    first: usize,
    count: usize,
}

impl SlotRange {
    /// As with all shared pools: whoever has `held` gets more only while as many are left for the others.
    fn reserve(count: usize, held: usize) -> Option<SlotRange> {
        let mut slots = SLOTS.lock().unwrap_or_else(PoisonError::into_inner);
        if count == 0 || held + count > slots.free_count().saturating_sub(count) {
            return None;
        }
        slots.take(count).map(|first| SlotRange { first, count })
    }
}

impl Drop for SlotRange {
    fn drop(&mut self) {
        let mut slots = SLOTS.lock().unwrap_or_else(PoisonError::into_inner);
        slots.give_back(self.first, self.count);
    }
}

/// The ring that a region's pieces are registered in; it carries out no operation.
#[derive(Debug)]
struct Donor(RawDonor);

struct RawDonor(IoUring);

impl std::fmt::Debug for RawDonor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IoUring").field(&self.0.as_raw_fd()).finish()
    }
}

/// One region's slots, and its donor once it is registered.
#[derive(Debug)]
pub struct Pin {
    /// Dropped first: closed before the memory goes.
    donor: OnceLock<Donor>,
    refusal: OnceLock<String>,
    begun: AtomicBool,
    host: HostAddr,
    len_bytes: usize,
    slots: SlotRange,
    mapping: Arc<Mapping>,
}

impl Pin {
    /// Slots for the first `len_bytes` of `mapping`, for a guest that `held` has so many already; `None` when there are
    /// not enough.
    pub(super) fn reserve(
        mapping: &Arc<Mapping>,
        len_bytes: usize,
        held: usize,
    ) -> Option<Arc<Pin>> {
        let len_bytes = len_bytes.min(mapping.len_bytes());
        let slots = SlotRange::reserve(len_bytes.div_ceil(PIECE_BYTES), held)?;
        Some(Arc::new(Pin {
            donor: OnceLock::new(),
            refusal: OnceLock::new(),
            begun: AtomicBool::new(false),
            host: HostAddr(mapping.base().as_ptr() as usize),
            len_bytes,
            slots,
            mapping: Arc::clone(mapping),
        }))
    }

    /// The first of its slots, which follow each other.
    #[must_use]
    pub fn first_slot(&self) -> u32 {
        len_u32(self.slots.first)
    }

    /// How many they are.
    #[must_use]
    pub fn slots_count(&self) -> usize {
        self.slots.count
    }

    /// The pieces in the order of their slots: address and bytes.
    pub fn pieces(&self) -> impl Iterator<Item = (HostAddr, u32)> {
        (0..self.slots.count).map(|at| {
            let from = at * PIECE_BYTES;
            (self.host.advanced(from), len_u32((self.len_bytes - from).min(PIECE_BYTES)))
        })
    }

    /// Bytes of the region.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// True when reactors may clone it.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.donor.get().is_some()
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> PinState {
        match (self.refusal.get(), self.donor.get()) {
            (Some(reason), _) => PinState::Refused(reason.clone()),
            (None, Some(_)) => PinState::On,
            (None, None) => PinState::Reserved,
        }
    }

    /// True once: whoever hears that registers it.
    #[must_use]
    pub fn begin(&self) -> bool {
        !self.begun.swap(true, Ordering::Relaxed)
    }

    /// Says why it is not used after all.
    pub fn refuse(&self, reason: String) {
        let _ = self.refusal.set(reason);
    }

    /// The ring to clone from.
    #[must_use]
    pub fn donor_fd(&self) -> Option<RawFd> {
        self.donor.get().map(|donor| donor.0.0.as_raw_fd())
    }

    /// Registers one piece. Blocks while the kernel pins it.
    fn register_piece(&self, donor: &Donor, at: usize) -> io::Result<()> {
        let Some((host, len)) = self.pieces().nth(at) else { return Ok(()) };
        let iovec = libc::iovec { iov_base: host.0 as *mut libc::c_void, iov_len: index(len) };
        debug_assert!(
            host.0 - self.mapping.base().as_ptr() as usize + index(len) <= self.mapping.len_bytes()
        );
        // SAFETY: the piece lies inside `mapping` (`reserve` clamps the length), which this pin keeps mapped; the donor
        // carries out no operation, and reactors do so only for segments of live translations.
        unsafe { donor.0.0.submitter().register_buffers_update(len_u32(at), &[iovec], None) }
    }
}

fn limit_words() -> (u64, String) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match limit {
        Some(bytes) => (bytes, format!("{bytes} bytes")),
        None => (u64::MAX, "unlimited".to_owned()),
    }
}

/// Registers one region. `Ok(None)` when nobody wants it any more.
fn register(pin: &Weak<Pin>, need_bytes: u64) -> Result<Option<Donor>, PinError> {
    let Some(count) = pin.upgrade().map(|pin| pin.slots_count()) else { return Ok(None) };
    let donor = Donor(RawDonor(IoUring::new(1).map_err(PinError::Kernel)?));
    donor.0.0.submitter().register_buffers_sparse(len_u32(count)).map_err(PinError::Kernel)?;
    let (limit_bytes, limit) = limit_words();
    for at in 0..count {
        let mut tries = 0;
        loop {
            // Held for one piece at a time: a session that ends meanwhile is let go of.
            let Some(pin) = pin.upgrade() else { return Ok(None) };
            let error = match pin.register_piece(&donor, at) {
                Ok(()) => break,
                Err(error) => error,
            };
            let no_memory = error.raw_os_error() == Some(libc::ENOMEM);
            tries += 1;
            if no_memory && need_bytes <= limit_bytes && tries < MEMLOCK_TRIES {
                drop(pin);
                std::thread::sleep(MEMLOCK_PAUSE);
                continue;
            }
            return Err(match no_memory {
                true => PinError::Memlock { need_bytes, limit },
                false => PinError::Kernel(error),
            });
        }
    }
    Ok(Some(donor))
}

/// Pins regions: all or none of them. Blocks for as long as the kernel takes, so for threads of their own; holds no
/// region for longer than one piece, and gives up on those that are dropped meanwhile.
///
/// # Errors
/// The reason, which the pins tell from then on, too.
pub fn register_pins(pins: &[Weak<Pin>]) -> Result<(), PinError> {
    let alive = || pins.iter().filter_map(Weak::upgrade);
    let need_bytes = alive().map(|pin| pin.len_bytes as u64).sum();
    let mut donors = Vec::new();
    for pin in pins {
        match register(pin, need_bytes) {
            Ok(donor) => donors.push(donor),
            Err(error) => {
                alive().for_each(|pin| pin.refuse(error.to_string()));
                return Err(error);
            }
        }
    }
    for (pin, donor) in pins.iter().zip(donors) {
        if let (Some(pin), Some(donor)) = (pin.upgrade(), donor) {
            let _ = pin.donor.set(donor);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_belongs_to_one_pin_until_it_is_gone() {
        let mapping = Arc::new(Mapping::anonymous(1 << 20).unwrap());
        let first = Pin::reserve(&mapping, 1 << 20, 0).unwrap();
        let second = Pin::reserve(&mapping, 1 << 20, 0).unwrap();
        assert_ne!(first.first_slot(), second.first_slot());
        let slot = first.first_slot();
        let also_first = Arc::clone(&first);
        drop(first);
        let third = Pin::reserve(&mapping, 1 << 20, 0).unwrap();
        assert_ne!(third.first_slot(), slot, "somebody still holds it");
        drop(also_first);
        assert!(!SLOTS.lock().unwrap().is_taken(index(slot)));
    }

    #[test]
    fn ranges_are_whole_pieces_and_do_not_overlap() {
        let mut map = SlotMap([0; index(RING_BUFFERS_MAX) / 64]);
        let all = index(RING_BUFFERS_MAX);
        let ranges: Vec<(usize, usize)> = (1..100).map(|n| (map.take(n).unwrap(), n)).collect();
        for (i, &(first, count)) in ranges.iter().enumerate() {
            for &(other, len) in &ranges[..i] {
                assert!(other + len <= first || first + count <= other);
            }
        }
        assert_eq!(map.free_count(), all - 99 * 50);
        map.give_back(ranges[41].0, ranges[41].1);
        assert_eq!(map.take(42), Some(ranges[41].0));
        assert_eq!(map.take(all), None);
    }

    #[test]
    fn one_guest_leaves_slots_for_the_others() {
        let all = index(RING_BUFFERS_MAX);
        assert!(SlotRange::reserve(all / 2 + 1, 0).is_none());
        assert!(SlotRange::reserve(1, all).is_none());
        assert!(SlotRange::reserve(0, 0).is_none());
    }

    #[test]
    fn pieces_cover_a_region_in_order() {
        // Only address space: nothing is touched.
        let len = 2 * PIECE_BYTES + 12288;
        let mapping = Arc::new(Mapping::anonymous(len).unwrap());
        let pin = Pin::reserve(&mapping, len, 0).unwrap();
        let pieces: Vec<_> = pin.pieces().collect();
        assert_eq!(pieces.iter().map(|p| index(p.1)).sum::<usize>(), len);
        assert_eq!(pieces.last().map(|p| p.1), Some(12288));
        for pair in pieces.windows(2) {
            assert_eq!(pair[0].0.advanced(PIECE_BYTES), pair[1].0);
        }
    }

    #[test]
    fn pins_that_nobody_wants_are_not_registered() {
        let mapping = Arc::new(Mapping::anonymous(1 << 20).unwrap());
        let gone = Arc::downgrade(&Pin::reserve(&mapping, 1 << 20, 0).unwrap());
        let kept = Pin::reserve(&mapping, 1 << 20, 0).unwrap();
        register_pins(&[gone, Arc::downgrade(&kept)]).unwrap();
        assert_eq!(kept.state(), PinState::On);
        kept.refuse("a reactor".to_owned());
        assert_eq!(kept.state(), PinState::Refused("a reactor".to_owned()));
    }

    #[test]
    fn a_registration_that_fails_midway_pins_nothing() {
        let whole = Arc::new(Mapping::anonymous(1 << 20).unwrap());
        let good = Pin::reserve(&whole, 1 << 20, 0).unwrap();
        // A hole in the middle of the second region: the kernel cannot pin what it cannot read.
        let fd = rustix::fs::memfd_create("hole", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
        let holed = Arc::new(Mapping::foreign(&fd, 0, 1 << 20).unwrap());
        rustix::fs::ftruncate(&fd, 1 << 19).unwrap();
        let bad = Pin::reserve(&holed, 1 << 20, 0).unwrap();
        let pins = [Arc::downgrade(&good), Arc::downgrade(&bad)];
        assert!(matches!(register_pins(&pins), Err(PinError::Kernel(_))));
        for pin in [good, bad] {
            assert!(!pin.is_on() && matches!(pin.state(), PinState::Refused(_)));
        }
    }
}
