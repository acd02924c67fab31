//! HOT PATH
//! The operations that one channel has on the reactor's ring, with the memory that the kernel reaches meanwhile.
//!
//! Flow: `insert` a request's segments → `transfer` or `start` an entry → `landed` brings its result → again, or `remove`.
//! Owner: one reactor. **Invariant:** while an operation is out, its slot (and so the iovec array inside) neither moves
//! nor goes away: `remove` refuses, and dropping leaks the slots. A result without an operation is counted.
#![expect(unsafe_code)] // UNSAFETY: ring entries that name memory which the kernel reaches later.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};

use ringmill_core::io::{Slots, Tag};
use ringmill_core::mem::{SegmentList, as_iovecs};
use ringmill_core::reactor::{ClientId, FixedFile, Ring, RingError};
use ringmill_core::units::{len_u32, usize_of};

mod entry;
mod in_place;

use entry::{Cut, ENTRY_BYTES_MAX, cut, entry_of_many, entry_of_one, plain_entry};

pub(crate) use entry::{BLOCK_URING_CMD_DISCARD, Direction, Plain, discard_command};

/// One request on its way.
#[derive(Debug)]
pub(crate) struct Flight<T> {
    segments: SegmentList,
    /// The first segment that is not done.
    first: usize,
    /// The kernel (or a helper) has it.
    out: bool,
    state: T,
}

/// Slots, allocated on a control thread before there is a ring to use them with.
pub(crate) type FlightSlots<T> = Slots<Flight<T>>;

/// All requests of one channel on the ring.
#[derive(Debug)]
pub(crate) struct Flights<T> {
    slots: ManuallyDrop<FlightSlots<T>>,
    place: Place,
    /// The place on the ring of polled devices, and what is out there.
    polled: Option<Place>,
    polled_count: usize,
    out_count: usize,
    stale_count: u64,
}

/// Where a channel is on a ring.
#[derive(Clone, Copy, Debug)]
struct Place {
    client: ClientId,
    file: FixedFile,
}

impl Place {
    #[cold]
    fn open(ring: &mut Ring, fd: BorrowedFd<'_>, events_max: usize) -> Result<Place, RingError> {
        let client = ring.add_client(events_max)?;
        match ring.add_file(fd.as_raw_fd()) {
            Ok(file) => Ok(Place { client, file }),
            Err(error) => {
                ring.remove_client(client);
                Err(error)
            }
        }
    }

    #[cold]
    fn close(self, ring: &mut Ring) {
        ring.remove_file(self.file);
        ring.remove_client(self.client);
    }
}

impl<T> Flights<T> {
    /// Becomes a client of the ring, with `fd` in its file table.
    ///
    /// # Errors
    /// The ring is full or the kernel refuses.
    #[cold]
    pub(crate) fn open(
        slots: FlightSlots<T>,
        ring: &mut Ring,
        fd: BorrowedFd<'_>,
    ) -> Result<Flights<T>, RingError> {
        let place = Place::open(ring, fd, slots.room())?;
        let slots = ManuallyDrop::new(slots);
        Ok(Flights { slots, place, polled: None, polled_count: 0, out_count: 0, stale_count: 0 })
    }

    /// Also becomes a client of the ring of polled devices.
    ///
    /// # Errors
    /// As for `open`; the ordinary place is kept.
    #[cold]
    pub(crate) fn open_polled(
        &mut self,
        ring: &mut Ring,
        fd: BorrowedFd<'_>,
    ) -> Result<(), RingError> {
        self.polled = Some(Place::open(ring, fd, self.slots.room())?);
        Ok(())
    }

    /// Leaves that ring.
    #[cold]
    pub(crate) fn close_polled(&mut self, ring: &mut Ring) {
        if let Some(place) = self.polled.take() {
            place.close(ring);
        }
    }

    /// Operations on the ring of polled devices: somebody must ask for their ends.
    #[inline]
    pub(crate) fn polled_count(&self) -> usize {
        self.polled_count
    }

    /// Leaves the ring.
    #[cold]
    pub(crate) fn close(&mut self, ring: &mut Ring) {
        self.place.close(ring);
    }

    /// Requests that still fit.
    #[inline]
    pub(crate) fn room(&self) -> usize {
        self.slots.room()
    }

    /// Entries that the ring has for this channel.
    #[inline]
    pub(crate) fn entries_room(&self, ring: &Ring) -> u32 {
        ring.room_for(self.place.client)
    }

    /// The same of the ring of polled devices, if the channel is on it.
    #[inline]
    pub(crate) fn polled_room(&self, ring: &Ring) -> Option<u32> {
        self.polled.map(|place| ring.room_for(place.client))
    }

    /// Requests here.
    #[inline]
    pub(crate) fn live_count(&self) -> usize {
        self.slots.live_count()
    }

    /// Results that belonged to nothing, since the last call.
    pub(crate) fn take_stale(&mut self) -> u64 {
        std::mem::take(&mut self.stale_count)
    }

    /// All states.
    pub(crate) fn states(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().map(|(_, flight)| &flight.state)
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// Returns the segments when there is no slot.
    #[inline]
    pub(crate) fn insert(&mut self, segments: SegmentList, state: T) -> Result<Tag, SegmentList> {
        self.slots
            .insert(Flight { segments, first: 0, out: false, state })
            .map_err(|flight| flight.segments)
    }

    /// What the channel keeps with the request.
    #[inline]
    pub(crate) fn state(&mut self, tag: Tag) -> Option<&mut T> {
        self.slots.get_mut(tag).map(|flight| &mut flight.state)
    }

    /// Gives a request's segments and state back; `None` while it is out.
    #[inline]
    pub(crate) fn remove(&mut self, tag: Tag) -> Option<(SegmentList, T)> {
        if self.slots.get_mut(tag)?.out {
            return None;
        }
        self.slots.remove(tag).map(|flight| (flight.segments, flight.state))
    }

    /// Sends the next piece of at most `left_bytes` to or from `offset_bytes`; returns its length, or `None` when the
    /// ring takes nothing now.
    #[inline]
    pub(crate) fn transfer(
        &mut self,
        ring: &mut Ring,
        tag: Tag,
        direction: Direction,
        offset_bytes: u64,
        left_bytes: u64,
    ) -> Option<u64> {
        self.send(ring, self.place, tag, direction, offset_bytes, left_bytes)
    }

    /// As `transfer`, on the ring of polled devices.
    #[inline]
    pub(crate) fn transfer_polled(
        &mut self,
        ring: &mut Ring,
        tag: Tag,
        direction: Direction,
        offset_bytes: u64,
        left_bytes: u64,
    ) -> Option<u64> {
        let piece = self.send(ring, self.polled?, tag, direction, offset_bytes, left_bytes);
        self.polled_count += usize::from(piece.is_some());
        piece
    }

    #[inline]
    fn send(
        &mut self,
        ring: &mut Ring,
        place: Place,
        tag: Tag,
        direction: Direction,
        offset_bytes: u64,
        left_bytes: u64,
    ) -> Option<u64> {
        let flight = self.slots.get_mut(tag).filter(|flight| !flight.out)?;
        let segments = flight.segments.as_mut_slice().get_mut(flight.first..).unwrap_or(&mut []);
        let limit = left_bytes.min(ENTRY_BYTES_MAX);
        let file = place.file.as_fixed();
        let (entry, piece_bytes) = match cut(segments, limit) {
            // Also the way of a list that ran out: nothing is moved, which the channel takes for an error.
            Cut::One(host, len) => {
                let slot = segments.first().and_then(|first| ring.fixed_slot(&first.sub(0, len)));
                let entry = entry_of_one(file, direction, (host, len), offset_bytes, slot);
                (entry, u64::from(len))
            }
            Cut::Many(count, bytes) => {
                let slot = ring.fixed_slot_of_all(&segments[..count]);
                let list = (as_iovecs(&mut segments[..count]), len_u32(count));
                (entry_of_many(file, direction, list, offset_bytes, slot), bytes)
            }
        };
        // SAFETY: the data lies in live mappings until the request is completed (invariant of `Segment`), which happens
        // only after `landed`; the iovecs lie in this slot or in a list that it owns, which stay where they are while
        // `out` (invariant of this module; `Slots` never moves a value).
        if !unsafe { ring.push(place.client, u64::from(tag.0), entry) } {
            return None;
        }
        flight.out = true;
        self.out_count += 1;
        Some(piece_bytes)
    }

    /// Sends an operation without guest memory; false when the ring takes nothing now.
    #[cold]
    #[inline(never)]
    pub(crate) fn start(&mut self, ring: &mut Ring, tag: Tag, plain: Plain) -> bool {
        let Some(flight) = self.slots.get_mut(tag).filter(|flight| !flight.out) else {
            return false;
        };
        let entry = plain_entry(self.place.file, plain);
        // SAFETY: the entry names no memory (`plain_entry` builds only such).
        let pushed = unsafe { ring.push(self.place.client, u64::from(tag.0), entry) };
        flight.out |= pushed;
        self.out_count += usize::from(pushed);
        pushed
    }

    /// Marks a request as handed to a helper outside the ring.
    pub(crate) fn depart(&mut self, tag: Tag) {
        if let Some(flight) = self.slots.get_mut(tag).filter(|flight| !flight.out) {
            flight.out = true;
            self.out_count += 1;
        }
    }

    /// The helper has ended it; false for a request that was not out.
    pub(crate) fn arrive(&mut self, tag: Tag) -> bool {
        match self.slots.get_mut(tag) {
            Some(flight) if flight.out => {
                flight.out = false;
                self.out_count -= 1;
                true
            }
            _ => {
                self.stale_count += 1;
                false
            }
        }
    }

    /// The next result: the request and what the kernel says.
    #[inline]
    pub(crate) fn landed(&mut self, ring: &mut Ring) -> Option<(Tag, i32)> {
        while let Some(event) = ring.next_event(self.place.client) {
            let tag = Tag(len_u32(usize_of(event.token)));
            if self.arrive(tag) {
                return Some((tag, event.result));
            }
        }
        None
    }

    /// The next result of the ring of polled devices.
    #[inline]
    pub(crate) fn landed_polled(&mut self, ring: &mut Ring) -> Option<(Tag, i32)> {
        let place = self.polled?;
        while let Some(event) = ring.next_event(place.client) {
            self.polled_count = self.polled_count.saturating_sub(1);
            let tag = Tag(len_u32(usize_of(event.token)));
            if self.arrive(tag) {
                return Some((tag, event.result));
            }
        }
        None
    }

    /// Moves a request's start on by `done_bytes`, after a piece that was not the whole.
    #[cold]
    #[inline(never)]
    pub(crate) fn advance(&mut self, tag: Tag, mut done_bytes: u64) {
        let Some(flight) = self.slots.get_mut(tag).filter(|flight| !flight.out) else { return };
        while let Some(segment) = flight.segments.as_mut_slice().get_mut(flight.first) {
            let len = u64::from(segment.len_bytes());
            if done_bytes < len {
                *segment = segment.sub(len_u32(usize_of(done_bytes)), u32::MAX);
                return;
            }
            done_bytes -= len;
            flight.first += 1;
        }
    }

    /// Exchanges the segments of a request that is not out: zeroes to be written instead of none.
    #[cold]
    pub(crate) fn exchange(&mut self, tag: Tag, segments: SegmentList) -> SegmentList {
        match self.slots.get_mut(tag).filter(|flight| !flight.out) {
            Some(flight) => {
                flight.first = 0;
                std::mem::replace(&mut flight.segments, segments)
            }
            None => segments,
        }
    }
}

impl<T> Drop for Flights<T> {
    fn drop(&mut self) {
        if self.out_count == 0 {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.slots) };
        }
        // Otherwise the kernel still reaches the slots: leaking them is the only answer.
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::sync::{Arc, OnceLock};
    use std::time::{Duration, Instant};

    use proptest::prelude::*;
    use ringmill_core::mem::{ListsHeld, MemTable, Segment, SegmentLists, total_bytes};
    use ringmill_core::units::GuestAddr;

    use super::*;

    fn segments(lens: &[u32]) -> Vec<Segment> {
        static TABLE: OnceLock<MemTable> = OnceLock::new();
        let table = TABLE.get_or_init(|| MemTable::anonymous(GuestAddr(0), 1 << 31).unwrap());
        lens.iter().filter_map(|&len| table.translate(GuestAddr(0), len, &mut 0)).collect()
    }

    fn landed<T>(flights: &mut Flights<T>, ring: &mut Ring) -> (Tag, i32) {
        let start = Instant::now();
        loop {
            ring.commit();
            ring.reap();
            if let Some(got) = flights.landed(ring) {
                return got;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no result");
        }
    }

    fn flights<T>(ring: &mut Ring, path: &str) -> (Flights<T>, File) {
        ring.enable().unwrap();
        let file = File::open(path).unwrap();
        (Flights::open(Slots::new(4), ring, file.as_fd()).unwrap(), file)
    }

    #[test]
    fn a_request_that_is_out_cannot_be_taken_away() {
        let mut ring = Ring::new(&[]).unwrap();
        let (mut flights, _file) = flights::<u8>(&mut ring, "/dev/zero");
        let list =
            SegmentLists::default().keep(&segments(&[4096]), &mut ListsHeld::default()).unwrap();
        let tag = flights.insert(list, 7).unwrap();
        assert_eq!(flights.transfer(&mut ring, tag, Direction::Read, 0, 4096), Some(4096));
        assert!(flights.remove(tag).is_none());
        assert_eq!(flights.transfer(&mut ring, tag, Direction::Read, 0, 4096), None);
        assert!(!flights.start(&mut ring, tag, Plain::DataSync));
        assert_eq!(landed(&mut flights, &mut ring), (tag, 4096));
        assert_eq!(flights.remove(tag).map(|(_, state)| state), Some(7));
        assert!(flights.remove(tag).is_none());
        flights.close(&mut ring);
        assert_eq!(ring.outstanding(), 0);
    }

    #[test]
    fn a_result_without_a_request_is_counted() {
        let mut ring = Ring::new(&[]).unwrap();
        let (mut flights, _file) = flights::<()>(&mut ring, "/dev/zero");
        assert!(!flights.arrive(Tag(3)));
        let tag = flights.insert(SegmentList::default(), ()).unwrap();
        assert!(!flights.arrive(tag), "it was never sent");
        flights.depart(tag);
        assert!(flights.arrive(tag) && !flights.arrive(tag));
        assert_eq!((flights.take_stale(), flights.take_stale()), (3, 0));
    }

    #[test]
    fn slots_that_the_kernel_still_reaches_are_never_freed() {
        let alive = Arc::new(());
        let mut ring = Ring::new(&[]).unwrap();
        let (mut flights, _file) = flights(&mut ring, "/dev/zero");
        let list = SegmentLists::default()
            .keep(&segments(&[512, 512]), &mut ListsHeld::default())
            .unwrap();
        let tag = flights.insert(list, Arc::clone(&alive)).unwrap();
        assert!(flights.transfer(&mut ring, tag, Direction::Read, 0, 1024).is_some());
        drop(flights);
        assert_eq!(Arc::strong_count(&alive), 2);
    }

    #[test]
    fn an_empty_list_moves_nothing() {
        let mut ring = Ring::new(&[]).unwrap();
        let (mut flights, _file) = flights::<()>(&mut ring, "/dev/zero");
        let tag = flights.insert(SegmentList::default(), ()).unwrap();
        assert_eq!(flights.transfer(&mut ring, tag, Direction::Read, 0, 4096), Some(0));
        assert_eq!(landed(&mut flights, &mut ring), (tag, 0));
    }

    #[test]
    fn long_segments_and_long_lists_are_cut() {
        let one = segments(&[3 << 29]);
        assert!(
            matches!(cut(&one, ENTRY_BYTES_MAX), Cut::One(_, len) if u64::from(len) == 1 << 20)
        );
        let many = segments(&[512; 2000]);
        assert!(matches!(cut(&many, 1 << 20), Cut::Many(1024, bytes) if bytes == 1024 * 512));
        let large = segments(&[1 << 19, 1 << 19, 1 << 19]);
        assert!(matches!(cut(&large, ENTRY_BYTES_MAX), Cut::Many(2, bytes) if bytes == 1 << 20));
    }

    proptest! {
        /// However the kernel cuts a transfer short, the pieces add up to the whole, in order, without overlap.
        #[test]
        fn pieces_add_up(lens in prop::collection::vec(1u32..5000, 1..40), cuts in any::<u64>()) {
            let whole = segments(&lens);
            let total = total_bytes(&whole);
            let mut list = SegmentLists::default().keep(&whole, &mut ListsHeld::default()).unwrap();
            let mut ring = Ring::new(&[]).unwrap();
            let (mut flights, _file) = flights::<()>(&mut ring, "/dev/null");
            let tag = flights.insert(std::mem::take(&mut list), ()).unwrap();
            let (mut done, mut chance) = (0, cuts);
            while done < total {
                let flight = flights.slots.get_mut(tag).unwrap();
                let rest = &flight.segments.as_slice()[flight.first..];
                prop_assert_eq!(total_bytes(rest), total - done);
                // The first byte to come lies where the twin, which counts from the start, says.
                let mut skip = done;
                let at = whole.iter().find_map(|s| {
                    let len = u64::from(s.len_bytes());
                    if skip < len { return Some(s.host().0 + usize_of(skip)); }
                    skip -= len;
                    None
                });
                prop_assert_eq!(rest.first().map(|s| s.host().0), at);
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let moved = 1 + (chance >> 33) % (total - done);
                flights.advance(tag, moved);
                done += moved;
            }
            prop_assert!(flights.remove(tag).is_some());
        }
    }
}
