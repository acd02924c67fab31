//! The rings against devices: split rings against the daemon's own queue, both formats against the bare loop, each over
//! many laps, with changing batches and kinds of requests.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ringmill_core::io::Batch;
use ringmill_core::mem::{Mapping, MemTable, RegionSpec};
use ringmill_core::units::{GuestAddr, bytes_u64};
use ringmill_vmm_glue::virtq::{RingWindows, SplitQueue, Virtqueue};

use super::floor::BareDevice;
use super::layout::{QueueLayout, RingForm};
use super::memory::LoadMemory;
use super::packed::PackedRing;
use super::ring::DriverRing;
use super::slots::{Op, STATUS_UNWRITTEN};
use super::split::SplitRing;

const DEPTH: u16 = 50;
const IO_BYTES: u32 = 1024;

fn queue(packed: bool, indirect: bool) -> (LoadMemory, QueueLayout) {
    let layout = QueueLayout::new(RingForm { packed, indirect }, DEPTH, IO_BYTES).unwrap();
    (LoadMemory::new(bytes_u64(layout.len_bytes)).unwrap(), layout)
}

fn op_of(number: u32) -> Op {
    [Op::Read, Op::Write, Op::Read, Op::Flush, Op::Write][number as usize % 5]
}

/// The memory as a device behind a socket would map it.
fn table_of(memory: &LoadMemory, layout: &QueueLayout) -> MemTable {
    let mapping = Arc::new(Mapping::own_file(memory.file(), layout.len_bytes).unwrap());
    let mut table = MemTable::new();
    let spec = RegionSpec {
        guest_addr: GuestAddr(memory.guest_addr(0)),
        len_bytes: bytes_u64(layout.len_bytes),
        user_addr: memory.user_addr(0),
    };
    table.add(spec, mapping).unwrap();
    table
}

/// Keeps a ring full for many laps; `serve` answers everything that is published. In batches of changing size.
fn exercise<R: DriverRing>(ring: &mut R, mut serve: impl FnMut(&[(u16, Op, u64)])) {
    let mut free: Vec<u16> = (0..DEPTH).collect();
    let (mut number, mut done) = (0u32, Vec::new());
    for round in 0..2_000usize {
        let mut batch = Vec::new();
        for _ in 0..=round % usize::from(DEPTH) {
            let Some(slot) = free.pop() else { break };
            let (op, offset) = (op_of(number), u64::from(number) * 512);
            ring.push(slot, op, offset);
            batch.push((slot, op, offset));
            number += 1;
        }
        done.clear();
        ring.poll(&mut done).unwrap();
        assert!(done.is_empty(), "nothing was published yet");
        ring.publish();
        for (slot, ..) in &batch {
            assert_eq!(ring.slots().status(*slot), STATUS_UNWRITTEN);
        }
        serve(&batch);
        ring.poll(&mut done).unwrap();
        let sent: Vec<u16> = batch.iter().map(|(slot, ..)| *slot).collect();
        assert_eq!(done, sent, "round {round}");
        assert!(done.iter().all(|slot| ring.slots().status(*slot) == 0));
        free.extend(done.iter());
    }
    assert!(number > 20_000);
}

#[test]
fn the_daemons_queue_understands_split_rings() {
    for indirect in [false, true] {
        let (memory, layout) = queue(false, indirect);
        let mut ring = SplitRing::new(&memory, &layout, 0);
        let table = table_of(&memory, &layout);
        let user = |at: usize| memory.user_addr(bytes_u64(at));
        let (desc, avail, used) =
            (user(layout.desc_at), user(layout.driver_at), user(layout.device_at));
        let rings = RingWindows::split(&table, layout.size, desc, avail, used).unwrap();
        let mut device = SplitQueue::new(rings, layout.size, 0, false, indirect);
        let (mut batch, mut hint) = (Batch::new(), 0);
        exercise(&mut ring, |sent| {
            assert_eq!(usize::from(device.available().unwrap()), sent.len());
            for (slot, op, offset) in sent {
                batch.clear();
                let chain = device.pop(&table, &mut hint, &mut batch).unwrap().unwrap();
                assert_eq!(chain.head, slot * if indirect { 1 } else { 3 });
                let (readable, writable) = match op {
                    Op::Read => (16, u64::from(IO_BYTES) + 1),
                    Op::Write => (16 + u64::from(IO_BYTES), 1),
                    Op::Flush => (16, 1),
                };
                assert_eq!((chain.readable_bytes, chain.writable_bytes), (readable, writable));
                let mut header = [0u8; 16];
                batch.segments_mut(0, 1)[0].read_into(&mut header);
                let kind = [0, 1, 4][*op as usize];
                assert_eq!(u32::from_le_bytes(header[..4].try_into().unwrap()), kind);
                let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
                assert_eq!(sector, offset / 512);
                chain.status.write_u8(0);
                device.put_used(chain.head, 1);
            }
            assert!(!device.publish(true), "the driver wants no interrupts");
        });
    }
}

#[test]
fn the_bare_loop_understands_every_form() {
    for (packed, indirect) in [(false, false), (false, true), (true, false), (true, true)] {
        let (memory, layout) = queue(packed, indirect);
        let mut device = BareDevice::new(&memory, &layout, 0);
        let serve = |sent: &[_]| {
            // A bare loop takes a packed ring's batch in one go as well.
            assert_eq!(device.serve(), sent.len());
        };
        if packed {
            exercise(&mut PackedRing::new(&memory, &layout, 0), serve);
        } else {
            exercise(&mut SplitRing::new(&memory, &layout, 0), serve);
        }
    }
}

#[test]
fn a_request_that_was_not_sent_is_a_fault() {
    let (memory, layout) = queue(false, false);
    let mut ring = SplitRing::new(&memory, &layout, 0);
    let used = memory.window(layout.device_at, layout.part_bytes().1);
    let mut done = Vec::new();
    ring.push(0, Op::Read, 0);
    ring.push(1, Op::Read, 0);
    ring.publish();
    used.store_u16(2, 3, Ordering::Release);
    assert!(ring.poll(&mut done).unwrap_err().what.contains("more requests"));
    for (head, is_fault) in [(1, true), (6, true), (40_000, true), (3, false), (3, true)] {
        used.store_u16(2, ring.indices().1.wrapping_add(1), Ordering::Release);
        used.store_u32(4 + 8 * usize::from(ring.indices().1), head);
        assert_eq!(ring.poll(&mut done).is_err(), is_fault, "head {head}");
    }
    assert_eq!(done, [1]);
}

/// What the device sees of kicks for one request after another: at `publish`, and asked later.
fn kicks<R: DriverRing>(mut ring: R, memory: &LoadMemory, layout: &QueueLayout, flags_at: usize) {
    let device = memory.window(layout.device_at, layout.part_bytes().1);
    for (slot, flags, wanted) in [(0, 0, true), (1, 1, false), (2, 0, true)] {
        device.store_u16(flags_at, flags, Ordering::Relaxed);
        ring.push(slot, Op::Read, 0);
        assert_eq!((ring.publish(), ring.kick_wanted()), (wanted, wanted));
    }
}

#[test]
fn kicks_are_sent_as_the_device_says() {
    let (memory, layout) = queue(false, false);
    kicks(SplitRing::new(&memory, &layout, 0), &memory, &layout, 0);
    let (memory, layout) = queue(true, false);
    kicks(PackedRing::new(&memory, &layout, 0), &memory, &layout, 2);
}
