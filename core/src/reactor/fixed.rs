//! HOT PATH
//! The buffers that a reactor's ring knows: pinned guest memory, named in ring entries by its slot.
//!
//! Flow: a worker takes hold of its guest's pins → their pieces are cloned into the ring's table → `slot_of` finds a
//! segment's slot → the last worker of that guest lets go → slots are emptied. Owner: one reactor.
//!
//! No slot ever names another guest's memory. A pin's slot and its mapping are its own for as long as its `Arc` lives, and
//! the table here holds that `Arc` from before the kernel's slot is filled until after it is emptied. So while a piece is
//! listed, its addresses belong to that mapping; `slot_of` gives a slot only to an address inside the listed piece, whatever
//! region the segment claims; and a kernel that refuses to empty a slot keeps the pin, its memory and its slots for good.
//! Operations in flight hold the pages themselves; slots are emptied after the worker was quiesced all the same.

use std::sync::Arc;

use io_uring::types::CloneBuffersFlags;
use io_uring::{IoUring, Probe, opcode};

use crate::limits::{PIN_PIECE_SHIFT, RING_BUFFERS_MAX};
use crate::mem::{Pin, Segment};
use crate::units::{HostAddr, index, len_u32};

use super::{IoCx, Ring, RingError};

/// One slot's memory; length 0: the slot is empty.
#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    host: HostAddr,
    len_bytes: u32,
}

const _: () = assert!(size_of::<Piece>() == 16);

#[derive(Debug)]
struct Held {
    pin: Arc<Pin>,
    /// Workers that took hold of it; 0: the kernel would not let go of it.
    users: u32,
}

/// A ring's table.
#[derive(Debug)]
pub(super) struct FixedBuffers {
    pieces: Box<[Piece]>,
    held: Vec<Held>,
    /// The kernel reads and writes many segments of one buffer (Linux 6.15).
    vectored: bool,
    /// Entries that named a slot.
    uses_count: u64,
}

impl FixedBuffers {
    /// An empty table, for a ring that is still disabled.
    #[cold]
    pub(super) fn new(uring: &IoUring) -> Result<FixedBuffers, RingError> {
        let submitter = uring.submitter();
        let mut probe = Probe::new();
        let vectored = submitter.register_probe(&mut probe).is_ok()
            && [opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE]
                .iter()
                .all(|&op| probe.is_supported(op));
        submitter
            .register_buffers_sparse(RING_BUFFERS_MAX)
            .map_err(|source| RingError::Register { what: "buffer table", source })?;
        let pieces = std::iter::repeat_n(Piece::default(), index(RING_BUFFERS_MAX)).collect();
        Ok(FixedBuffers { pieces, held: Vec::with_capacity(64), vectored, uses_count: 0 })
    }

    #[cold]
    pub(super) fn is_vectored(&self) -> bool {
        self.vectored
    }

    /// The slot whose memory has all of the segment in it. A region's pieces follow each other, so its first slot and the
    /// distance from there lead to the one that is asked for; whether it is the right one is then seen by address.
    #[inline]
    fn slot_of(&self, segment: &Segment) -> Option<u16> {
        let first = index(segment.region().0);
        let distance = segment.host().0.wrapping_sub(self.pieces.get(first)?.host.0);
        let at = first + (distance >> PIN_PIECE_SHIFT);
        let piece = self.pieces.get(at)?;
        let start = segment.host().0.wrapping_sub(piece.host.0);
        let inside = start < index(piece.len_bytes)
            && index(segment.len_bytes()) <= index(piece.len_bytes) - start;
        if inside { u16::try_from(at).ok() } else { None }
    }

    #[cold]
    fn list(&mut self, pin: &Pin) {
        for (slot, (host, len_bytes)) in (index(pin.first_slot())..).zip(pin.pieces()) {
            self.pieces[slot] = Piece { host, len_bytes };
        }
    }

    #[cold]
    fn unlist(&mut self, pin: &Pin) {
        let first = index(pin.first_slot());
        self.pieces[first..first + pin.slots_count()].fill(Piece::default());
    }
}

impl Ring {
    /// The slot of a segment that lies wholly in one piece of pinned memory.
    ///
    /// One that crosses from one piece to the next is sent like unpinned memory: it happens once per GiB, and a second entry
    /// for its other half would be a second way for requests to end.
    #[inline]
    #[must_use]
    pub fn fixed_slot(&mut self, segment: &Segment) -> Option<u16> {
        let slot = self.fixed.slot_of(segment)?;
        self.fixed.uses_count += 1;
        Some(slot)
    }

    /// The slot that all segments of a list lie in, if the kernel takes lists of them.
    #[inline]
    #[must_use]
    pub fn fixed_slot_of_all(&mut self, segments: &[Segment]) -> Option<u16> {
        if !self.fixed.vectored {
            return None;
        }
        let slot = self.fixed.slot_of(segments.first()?)?;
        if segments[1..].iter().any(|s| self.fixed.slot_of(s) != Some(slot)) {
            return None;
        }
        self.fixed.uses_count += 1;
        Some(slot)
    }

    /// Times that a slot was found, so many entries named one.
    #[must_use]
    pub fn fixed_uses_count(&self) -> u64 {
        self.fixed.uses_count
    }

    /// Slots in use, for tests and the operator.
    #[must_use]
    #[cold]
    pub fn fixed_count(&self) -> usize {
        self.fixed.held.iter().map(|held| held.pin.slots_count()).sum()
    }

    /// Fills a pin's slots, or counts one more user of them.
    #[cold]
    fn hold(&mut self, pin: &Arc<Pin>) -> Result<(), RingError> {
        if let Some(held) = self.fixed.held.iter_mut().find(|held| Arc::ptr_eq(&held.pin, pin)) {
            held.users += 1;
            if held.users == 1 {
                self.fixed.list(pin);
            }
            return Ok(());
        }
        let refused = |source| RingError::Register { what: "cloned buffers, Linux 6.13", source };
        let missing = || refused(std::io::Error::from_raw_os_error(libc::EBADF));
        let donor = pin.donor_fd().ok_or_else(missing)?;
        let (first, count) = (pin.first_slot(), len_u32(pin.slots_count()));
        self.uring
            .submitter()
            .register_buffers_clone_offset(donor, 0, first, count, CloneBuffersFlags::DST_REPLACE)
            .map_err(refused)?;
        let pin = Arc::clone(pin);
        self.fixed.list(&pin);
        self.fixed.held.push(Held { pin, users: 1 });
        Ok(())
    }

    /// Takes one user off a pin; empties its slots after the last. The caller keeps its own `Arc` for the control thread:
    /// nothing is unmapped here.
    #[cold]
    fn let_go(&mut self, pin: &Arc<Pin>) {
        let Some(at) = self.fixed.held.iter().position(|held| Arc::ptr_eq(&held.pin, pin)) else {
            return;
        };
        let held = &mut self.fixed.held[at];
        held.users = held.users.saturating_sub(1);
        if held.users > 0 {
            return;
        }
        self.fixed.unlist(pin);
        if self.empty_slots(pin).is_ok() {
            self.fixed.held.swap_remove(at);
        }
    }
}

/// What one queue worker holds of its reactor's table: put together by the control thread, dropped there.
#[derive(Debug, Default)]
pub struct HeldPins {
    pins: Vec<Arc<Pin>>,
    /// As many of them, from the start, are held.
    held_count: usize,
}

impl HeldPins {
    /// Pins to be held once there is a reactor.
    #[must_use]
    #[cold]
    pub fn new(pins: Vec<Arc<Pin>>) -> HeldPins {
        HeldPins { pins, held_count: 0 }
    }

    /// Takes hold of all.
    ///
    /// # Errors
    /// The kernel's refusal; the worker then goes on without those that are missing.
    #[cold]
    pub fn hold(&mut self, io: &mut IoCx) -> Result<(), RingError> {
        while let Some(pin) = self.pins.get(self.held_count).filter(|_| io.ring.is_some()) {
            if let Some(ring) = &mut io.ring {
                ring.hold(pin)?;
            }
            if let Some(Err(error)) = io.polled.as_mut().map(|polled| polled.hold(pin)) {
                // In both or in none: only those that are counted are let go of.
                if let Some(ring) = &mut io.ring {
                    ring.let_go(pin);
                }
                return Err(error);
            }
            self.held_count += 1;
        }
        Ok(())
    }

    /// Takes hold of `next` instead and returns what was held before, to be dropped by the control thread. Nothing that
    /// uses memory which goes may be in flight.
    ///
    /// # Errors
    /// As for [`HeldPins::hold`], beside the old pins.
    #[cold]
    pub fn exchange(
        &mut self,
        io: &mut IoCx,
        next: Vec<Arc<Pin>>,
    ) -> (HeldPins, Result<(), RingError>) {
        let mut next = HeldPins::new(next);
        // In this order: what stays is not cloned again.
        let result = next.hold(io);
        self.let_go(io);
        (std::mem::replace(self, next), result)
    }

    /// Lets go of all; they stay here until dropped.
    #[cold]
    pub fn let_go(&mut self, io: &mut IoCx) {
        for ring in [&mut io.ring, &mut io.polled].into_iter().flatten() {
            for pin in &self.pins[..self.held_count] {
                ring.let_go(pin);
            }
        }
        self.held_count = 0;
    }
}

#[cfg(test)]
#[expect(unsafe_code)] // UNSAFETY: entries that name memory of these tests, which outlives them.
mod tests {
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    use io_uring::{squeue, types};
    use proptest::prelude::*;

    use super::*;
    use crate::mem::{Mapping, MemTable, RegionSpec, register_pins};
    use crate::reactor::{ClientId, ReactorCx};
    use crate::units::GuestAddr;

    const MIB: usize = 1 << 20;

    /// A guest with one pinned region at guest address 0.
    fn guest(len_bytes: usize) -> MemTable {
        let mapping = Arc::new(Mapping::anonymous(len_bytes).unwrap());
        let mut table = MemTable::new();
        let spec =
            RegionSpec { guest_addr: GuestAddr(0), len_bytes: len_bytes as u64, user_addr: 0 };
        table.add_to_pin(spec, mapping).unwrap();
        let pins: Vec<_> = table.pins().map(Arc::downgrade).collect();
        register_pins(&pins).unwrap();
        table
    }

    fn at(table: &MemTable, at: usize, len: u32) -> Segment {
        table.translate(GuestAddr(at as u64), len, &mut 0).unwrap()
    }

    fn context() -> (ReactorCx, ClientId) {
        let mut ring = Ring::new(&[]).unwrap();
        ring.enable().unwrap();
        let client = ring.add_client(8).unwrap();
        (ReactorCx::new(Some(ring)).unwrap(), client)
    }

    fn ring(cx: &mut ReactorCx) -> &mut Ring {
        cx.io.ring.as_mut().unwrap()
    }

    fn run(cx: &mut ReactorCx, client: ClientId, entry: squeue::Entry) -> i32 {
        let ring = ring(cx);
        // SAFETY: the tests' memory lives until the result is there.
        assert!(unsafe { ring.push(client, 1, entry) });
        let start = Instant::now();
        loop {
            ring.commit();
            ring.reap();
            if let Some(event) = ring.next_event(client) {
                return event.result;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no result");
        }
    }

    /// Reads zeroes into a segment through this slot.
    fn read_zero(cx: &mut ReactorCx, client: ClientId, segment: &Segment, slot: u16) -> i32 {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let (fd, pointer) = (types::Fd(zero.as_raw_fd()), segment.host().0 as *mut u8);
        run(cx, client, opcode::ReadFixed::new(fd, pointer, segment.len_bytes(), slot).build())
    }

    #[test]
    fn a_slot_is_filled_by_the_first_user_and_emptied_by_the_last() {
        let (mut cx, client) = context();
        let memory = guest(3 * MIB + 8192);
        let segment = at(&memory, 2 * MIB + 4096, 4096);
        assert_eq!(ring(&mut cx).fixed_slot(&segment), None, "nothing is held yet");
        let mut workers = [HeldPins::new(memory.pinned()), HeldPins::new(memory.pinned())];
        for worker in &mut workers {
            worker.hold(&mut cx.io).unwrap();
        }
        assert_eq!(ring(&mut cx).fixed_count(), 4);
        let slot = ring(&mut cx).fixed_slot(&segment).unwrap();
        segment.write_from(&[7; 4096]);
        assert_eq!(read_zero(&mut cx, client, &segment, slot), 4096);
        let mut data = [1; 4096];
        segment.read_into(&mut data);
        assert_eq!(data, [0; 4096]);
        workers[0].let_go(&mut cx.io);
        workers[0].let_go(&mut cx.io);
        assert_eq!(ring(&mut cx).fixed_slot(&segment), Some(slot), "the other worker holds it");
        workers[1].let_go(&mut cx.io);
        assert_eq!(ring(&mut cx).fixed_slot(&segment), None);
        assert_eq!(read_zero(&mut cx, client, &segment, slot), -libc::EFAULT, "the kernel's slot");
        assert_eq!(ring(&mut cx).fixed_count(), 0);
        // Nobody but the table and the workers keeps the memory.
        let pin = Arc::clone(&memory.pinned()[0]);
        drop((workers, memory));
        assert_eq!(Arc::strong_count(&pin), 1);
    }

    #[test]
    fn a_table_that_changes_keeps_what_stays_and_drops_what_goes() {
        let (mut cx, client) = context();
        let (stays, goes) = (guest(MIB), guest(MIB));
        let both = [stays.pinned(), goes.pinned()].concat();
        let mut worker = HeldPins::new(both);
        worker.hold(&mut cx.io).unwrap();
        let gone = at(&goes, 0, 4096);
        let slot = ring(&mut cx).fixed_slot(&gone).unwrap();
        let (old, result) = worker.exchange(&mut cx.io, stays.pinned());
        result.unwrap();
        assert!(ring(&mut cx).fixed_slot(&at(&stays, 0, 4096)).is_some());
        assert_eq!(ring(&mut cx).fixed_slot(&gone), None);
        assert_eq!(read_zero(&mut cx, client, &gone, slot), -libc::EFAULT);
        // The memory lives until the control thread has dropped what it got back.
        let weak = Arc::downgrade(&goes.pinned()[0]);
        drop(goes);
        assert!(weak.upgrade().is_some());
        drop(old);
        assert!(weak.upgrade().is_none());
        worker.let_go(&mut cx.io);
    }

    #[test]
    fn memory_whose_slots_are_filled_cannot_be_unmapped() {
        let (mut cx, _) = context();
        let memory = guest(MIB);
        let mut worker = HeldPins::new(memory.pinned());
        worker.hold(&mut cx.io).unwrap();
        let weak = Arc::downgrade(&memory.pinned()[0]);
        // A control thread that forgets to let go: the ring itself keeps mapping and slot together.
        drop((worker, memory));
        let pin = weak.upgrade().expect("the ring holds it");
        assert_eq!(ring(&mut cx).fixed_count(), 1);
        let other = guest(MIB);
        assert_ne!(other.pinned()[0].first_slot(), pin.first_slot());
    }

    #[test]
    fn two_guests_never_meet_in_a_slot() {
        let (mut cx, client) = context();
        let guests = [guest(2 * MIB), guest(2 * MIB)];
        let mut workers = guests.each_ref().map(|guest| HeldPins::new(guest.pinned()));
        for worker in &mut workers {
            worker.hold(&mut cx.io).unwrap();
        }
        let segments = guests.each_ref().map(|guest| at(guest, MIB, 4096));
        let slots = segments.map(|segment| ring(&mut cx).fixed_slot(&segment).unwrap());
        assert_ne!(slots[0], slots[1]);
        // Also the kernel compares: one guest's address through the other's slot is an error.
        assert_eq!(read_zero(&mut cx, client, &segments[0], slots[1]), -libc::EFAULT);
        // A list over both is not one buffer.
        assert_eq!(ring(&mut cx).fixed_slot_of_all(&segments), None);
        workers.iter_mut().for_each(|worker| worker.let_go(&mut cx.io));
    }

    #[test]
    fn lists_have_a_slot_only_as_a_whole() {
        let (mut cx, _) = context();
        let memory = guest(3 * MIB);
        let mut worker = HeldPins::new(memory.pinned());
        worker.hold(&mut cx.io).unwrap();
        let vectored = ring(&mut cx).fixed.vectored;
        let (a, b, c) = (at(&memory, 0, 512), at(&memory, 8192, 4096), at(&memory, MIB, 512));
        let crossing = at(&memory, MIB - 512, 1024);
        let all = |cx: &mut ReactorCx, list: &[Segment]| ring(cx).fixed_slot_of_all(list);
        assert_eq!(all(&mut cx, &[a, b]).is_some(), vectored);
        assert_eq!(all(&mut cx, &[a, c]), None);
        assert_eq!(all(&mut cx, &[a, crossing]), None);
        assert_eq!(all(&mut cx, &[]), None);
        let before = ring(&mut cx).fixed_uses_count();
        assert_eq!(ring(&mut cx).fixed_slot(&crossing), None);
        assert_eq!(ring(&mut cx).fixed_uses_count(), before);
        worker.let_go(&mut cx.io);
    }

    #[test]
    fn a_pin_without_a_donor_is_an_error_and_holds_nothing() {
        let (mut cx, _) = context();
        let mut table = MemTable::new();
        let mapping = Arc::new(Mapping::anonymous(MIB).unwrap());
        let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes: MIB as u64, user_addr: 0 };
        table.add_to_pin(spec, mapping).unwrap();
        assert!(table.pinned().is_empty());
        let mut worker = HeldPins::new(table.pins().cloned().collect());
        assert!(worker.hold(&mut cx.io).is_err());
        assert_eq!(ring(&mut cx).fixed_count(), 0);
        worker.let_go(&mut cx.io);
    }

    proptest! {
        /// The twin looks through all pieces in 128 bits.
        #[test]
        fn slots_agree_with_their_naive_twin(
            offset in 0u64..(5 << 20), len in 1u32..(2 << 20), which in 0usize..3
        ) {
            let uring = IoUring::new(2).unwrap();
            let mut buffers = FixedBuffers::new(&uring).unwrap();
            let tables: Vec<MemTable> = [MIB + 100, 4 * MIB, 3 * MIB - 8].iter().map(|&len| {
                let mut table = MemTable::new();
                let mapping = Arc::new(Mapping::anonymous(len).unwrap());
                let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes: len as u64, user_addr: 0 };
                table.add_to_pin(spec, mapping).unwrap();
                table
            }).collect();
            // The last one's slots are reserved and not filled.
            for pin in tables[..2].iter().flat_map(MemTable::pins) {
                buffers.list(pin);
            }
            let Some(segment) = tables[which].translate(GuestAddr(offset), len, &mut 0) else {
                return Ok(());
            };
            let (start, end) =
                (segment.host().0 as u128, segment.host().0 as u128 + u128::from(segment.len_bytes()));
            let twin = tables[..2].iter().flat_map(MemTable::pins).find_map(|pin| {
                (pin.first_slot()..).zip(pin.pieces()).find_map(|(slot, (host, len))| {
                    let from = host.0 as u128;
                    (from <= start && end <= from + u128::from(len)).then_some(slot)
                })
            });
            prop_assert_eq!(buffers.slot_of(&segment).map(u32::from), twin);
        }
    }
}
