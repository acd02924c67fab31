//! HOT PATH
//! A lockless ring from one thread to one other: fixed slots, filled and emptied in place, published in batches.
//!
//! Owner: the [`Producer`] and the [`Consumer`] belong to one thread each. **Invariant:** the slots from head to tail
//! are the consumer's, all others the producer's; an index moves only by a release store of its own side, and a side
//! touches a slot only after it has acquired the other side's index. What either side writes lies on lines of its own,
//! and so do the slots.
//!
//! producer: fill, fill, … → publish (one store)      consumer: waiting → read, read, … → release (one store)
//! the consumer is gone → the producer takes back what was never taken
#![expect(unsafe_code)] // UNSAFETY: slots are reached by the side whose they are, which only the indices say.

#[cfg(loom)]
use loom::cell::UnsafeCell;
#[cfg(loom)]
use loom::sync::Arc;
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
#[cfg(not(loom))]
use std::sync::Arc;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::units::index;

#[cfg(not(loom))]
use cell::UnsafeCell;

/// Two lines: processors fetch them in pairs.
const LINE_BYTES: usize = 128;

/// loom's interface over the standard cell.
#[cfg(not(loom))]
mod cell {
    pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(super) fn new(value: T) -> UnsafeCell<T> {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        #[inline]
        pub(super) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}

/// A place in the endless row of entries; the only arithmetic on it that there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Index(u32);

impl Index {
    #[inline]
    fn plus(self, count: u32) -> Index {
        Index(self.0.wrapping_add(count))
    }

    /// Entries from `earlier` to here.
    #[inline]
    fn since(self, earlier: Index) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }
}

/// What the producer writes.
#[repr(align(128))]
struct ProducerLine {
    tail: AtomicU32,
    closed: AtomicBool,
}

/// What the consumer writes.
#[repr(align(128))]
struct ConsumerLine {
    head: AtomicU32,
    left: AtomicBool,
}

/// What both sides read and neither writes.
#[repr(align(128))]
struct Slots<T> {
    /// With guards at both ends, so that no slot shares a line with anything else.
    cells: Box<[UnsafeCell<T>]>,
    guard_count: usize,
    capacity: u32,
}

struct Shared<T> {
    producer: ProducerLine,
    consumer: ConsumerLine,
    slots: Slots<T>,
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    let (producer, consumer) =
        (offset_of!(Shared<u64>, producer), offset_of!(Shared<u64>, consumer));
    assert!(producer.abs_diff(consumer) >= LINE_BYTES);
    assert!(offset_of!(Shared<u64>, slots).abs_diff(producer) >= LINE_BYTES);
    assert!(offset_of!(Shared<u64>, slots).abs_diff(consumer) >= LINE_BYTES);
    assert!(align_of::<Shared<u64>>() == LINE_BYTES);
};

// SAFETY: a slot is reached by one side at a time (see `with_slot`), so values only move between the two threads.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Lends the slot of `at` to `f`.
    ///
    /// # Safety
    /// The slot is the caller's: for the consumer `at` lies from head to tail, for the producer outside of that or, when
    /// the consumer has left, anywhere; and the caller has acquired the index that says so.
    #[inline]
    unsafe fn with_slot<R>(&self, at: Index, f: impl FnOnce(&mut T) -> R) -> R {
        let Slots { cells, guard_count, capacity } = &self.slots;
        let cell = &cells[guard_count + index(at.0 & (capacity - 1))];
        // SAFETY: the slot is the caller's, and the caller is one thread with one call at a time (`&mut` of its side).
        cell.with_mut(|slot| f(unsafe { &mut *slot }))
    }
}

/// The side that fills.
pub(super) struct Producer<T> {
    shared: Arc<Shared<T>>,
    /// The next slot to fill; ahead of the published tail within a batch.
    tail: Index,
    /// As of the last look; the real one is here or further.
    head_seen: Index,
}

/// The side that empties.
pub(super) struct Consumer<T> {
    shared: Arc<Shared<T>>,
    head: Index,
    /// As of the last look; the real one is here or further.
    tail_seen: Index,
}

/// Keeps a ring's memory so that neither side frees it; dropped by the thread that made it.
pub(super) struct Keeper<T>(Arc<Shared<T>>);

impl<T> Keeper<T> {
    /// True when both sides are gone.
    #[cold]
    pub(super) fn is_last(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

/// A ring of `capacity` slots, a power of two.
///
/// # Panics
/// For another capacity, or one above 2^31: a bug of the caller.
#[cold]
pub(super) fn ring<T>(
    capacity: u32,
    mut make: impl FnMut() -> T,
) -> (Producer<T>, Consumer<T>, Keeper<T>) {
    assert!(capacity.is_power_of_two(), "{capacity} slots are not a power of two");
    let guard_count = LINE_BYTES.div_ceil(size_of::<T>().max(1));
    let cells =
        (0..index(capacity) + 2 * guard_count).map(|_| UnsafeCell::new(make())).collect::<Vec<_>>();
    let shared = Arc::new(Shared {
        producer: ProducerLine { tail: AtomicU32::new(0), closed: AtomicBool::new(false) },
        consumer: ConsumerLine { head: AtomicU32::new(0), left: AtomicBool::new(false) },
        slots: Slots { cells: cells.into_boxed_slice(), guard_count, capacity },
    });
    let start = Index::default();
    let producer = Producer { shared: Arc::clone(&shared), tail: start, head_seen: start };
    let consumer = Consumer { shared: Arc::clone(&shared), head: start, tail_seen: start };
    (producer, consumer, Keeper(shared))
}

impl<T> Producer<T> {
    /// Slots that can be filled now.
    #[inline]
    pub(super) fn room(&mut self) -> u32 {
        let capacity = self.shared.slots.capacity;
        if self.tail.since(self.head_seen) == capacity {
            // Pairs with the store in `release`: what the consumer did with the slots is over.
            self.head_seen = Index(self.shared.consumer.head.load(Ordering::Acquire));
        }
        capacity - self.tail.since(self.head_seen)
    }

    /// Fills the next slot, which the other side sees after `publish`; false when there is none.
    #[inline]
    pub(super) fn fill(&mut self, f: impl FnOnce(&mut T)) -> bool {
        if self.room() == 0 {
            return false;
        }
        // SAFETY: `tail` is less than a whole ring behind the acquired `head_seen`, so outside of head to tail.
        unsafe { self.shared.with_slot(self.tail, f) };
        self.tail = self.tail.plus(1);
        true
    }

    /// Shows everything filled to the other side.
    #[inline]
    pub(super) fn publish(&self) {
        // Pairs with the loads in `waiting` and `is_empty`.
        self.shared.producer.tail.store(self.tail.0, Ordering::Release);
    }

    /// After the consumer has left: shows `f` the oldest slot that it did not take; false when there is none.
    #[cold]
    pub(super) fn take_back(&mut self, f: impl FnOnce(&mut T)) -> bool {
        // Pairs with the store in the consumer's drop: it touches nothing any more and its head is final.
        if !self.shared.consumer.left.load(Ordering::Acquire) {
            return false;
        }
        let head = Index(self.shared.consumer.head.load(Ordering::Acquire));
        if head == self.tail {
            return false;
        }
        // SAFETY: the consumer has left.
        unsafe { self.shared.with_slot(head, f) };
        self.head_seen = head.plus(1);
        self.shared.consumer.head.store(self.head_seen.0, Ordering::Relaxed);
        true
    }
}

impl<T> Drop for Producer<T> {
    fn drop(&mut self) {
        // Pairs with the load in `is_closed`: after it the tail is final.
        self.shared.producer.closed.store(true, Ordering::Release);
    }
}

impl<T> Consumer<T> {
    /// Entries that can be read now; looks at the other side only when it knows of none.
    #[inline]
    pub(super) fn waiting(&mut self) -> u32 {
        if self.tail_seen == self.head {
            // Pairs with the store in `publish`.
            self.tail_seen = Index(self.shared.producer.tail.load(Ordering::Acquire));
        }
        self.tail_seen.since(self.head)
    }

    /// Looks at the other side: true when nothing was published that was not released. For the last look before sleep.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        // Pairs with the store in `publish`.
        self.shared.producer.tail.load(Ordering::Acquire) == self.head.0
    }

    /// True when the producer is gone: what is published now is all there will be.
    #[inline]
    pub(super) fn is_closed(&self) -> bool {
        // Pairs with the store in the producer's drop.
        self.shared.producer.closed.load(Ordering::Acquire)
    }

    /// Shows `f` the entry `at` behind the oldest one; `None` beyond what [`Consumer::waiting`] has counted.
    #[inline]
    pub(super) fn read<R>(&mut self, at: u32, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        if at >= self.tail_seen.since(self.head) {
            return None;
        }
        // SAFETY: from head to the acquired `tail_seen`.
        Some(unsafe { self.shared.with_slot(self.head.plus(at), f) })
    }

    /// Gives the oldest `count` entries' slots back.
    #[inline]
    pub(super) fn release(&mut self, count: u32) {
        let count = count.min(self.tail_seen.since(self.head));
        self.head = self.head.plus(count);
        // Pairs with the load in `room`.
        self.shared.consumer.head.store(self.head.0, Ordering::Release);
    }
}

impl<T> Drop for Consumer<T> {
    fn drop(&mut self) {
        // Pairs with the load in `take_back`.
        self.shared.consumer.left.store(true, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// A ring whose indices are about to wrap.
    fn old_ring(capacity: u32) -> (Producer<u64>, Consumer<u64>) {
        let (mut producer, mut consumer, _) = ring(capacity, || 0);
        let start = Index(u32::MAX - 2);
        producer.shared.producer.tail.store(start.0, Ordering::Relaxed);
        producer.shared.consumer.head.store(start.0, Ordering::Relaxed);
        (producer.tail, producer.head_seen) = (start, start);
        (consumer.head, consumer.tail_seen) = (start, start);
        (producer, consumer)
    }

    proptest! {
        #[test]
        fn behaves_like_a_queue(ops in prop::collection::vec((0..4u8, 0..6u32), 1..400)) {
            let (mut producer, mut consumer) = old_ring(4);
            let (mut hidden, mut shown) = (VecDeque::new(), VecDeque::new());
            let mut next = 0u64;
            for (op, count) in ops {
                match op {
                    0 => for _ in 0..count {
                        let full = hidden.len() + shown.len() == 4;
                        prop_assert_eq!(producer.fill(|slot| *slot = next), !full);
                        if !full {
                            hidden.push_back(next);
                            next += 1;
                        }
                    },
                    1 => {
                        producer.publish();
                        shown.append(&mut hidden);
                    }
                    2 => {
                        prop_assert_eq!(consumer.is_empty(), shown.is_empty());
                        let waiting = consumer.waiting();
                        prop_assert!(waiting as usize <= shown.len());
                        prop_assert!(waiting > 0 || shown.is_empty());
                        for at in 0..waiting {
                            prop_assert_eq!(consumer.read(at, |slot| *slot), Some(shown[at as usize]));
                        }
                        prop_assert_eq!(consumer.read(waiting, |slot| *slot), None);
                    }
                    _ => {
                        let count = count.min(consumer.waiting());
                        consumer.release(count);
                        shown.drain(..count as usize);
                    }
                }
            }
            // What the consumer leaves behind, the producer finds: in order and nothing else.
            let too_early = producer.take_back(|_| ());
            prop_assert!(!too_early);
            drop(consumer);
            let mut rest = Vec::new();
            while producer.take_back(|slot| rest.push(*slot)) {}
            shown.append(&mut hidden);
            prop_assert_eq!(rest, Vec::from(shown));
        }
    }

    #[test]
    fn two_threads_lose_nothing_and_invent_nothing() {
        const COUNT: u64 = 400_000;
        let (mut producer, mut consumer, keeper) = ring(64, || [0u64; 4]);
        let writer = std::thread::spawn(move || {
            let mut next = 0;
            while next < COUNT {
                let batch = 1 + next % 37;
                let before = next;
                while next < (before + batch).min(COUNT)
                    && producer.fill(|slot| *slot = [next, !next, next ^ 0x5555, next << 3])
                {
                    next += 1;
                }
                producer.publish();
                if next == before {
                    std::thread::yield_now();
                }
            }
        });
        let mut next = 0;
        while next < COUNT {
            let waiting = consumer.waiting().min(1 + u32::try_from(next % 29).unwrap());
            for at in 0..waiting {
                let got = consumer.read(at, |slot| std::mem::replace(slot, [7; 4])).unwrap();
                assert_eq!(got, [next, !next, next ^ 0x5555, next << 3]);
                next += 1;
            }
            consumer.release(waiting);
            if waiting == 0 {
                std::thread::yield_now();
            }
        }
        writer.join().unwrap();
        assert!(consumer.is_closed() && consumer.is_empty() && !keeper.is_last());
        drop(consumer);
        assert!(keeper.is_last());
    }

    #[test]
    fn slots_share_no_line_with_anything_else() {
        let (producer, ..) = ring(8, || 0u64);
        let slots = &producer.shared.slots;
        let (first, last) = (&raw const slots.cells[0], slots.cells.last().unwrap() as *const _);
        let own = &raw const slots.cells[slots.guard_count];
        let end = &raw const slots.cells[slots.guard_count + 8];
        assert!(own as usize - first as usize >= LINE_BYTES);
        assert!(last as usize + 8 - end as usize >= LINE_BYTES);
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p ringmill-core --lib --release --target-dir target/loom loom`
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;
    use crate::reactor::SleepFlag;

    #[test]
    fn batches_arrive_whole_in_order_and_once() {
        loom::model(|| {
            let (mut producer, mut consumer, _keeper) = ring(2, || 0u32);
            let writer = thread::spawn(move || {
                // Two batches over a ring of two: the second has to wait for a slot, and wraps.
                let mut next = 1;
                while next <= 3 && producer.fill(|slot| *slot = next) {
                    next += 1;
                }
                producer.publish();
                while next <= 3 {
                    if producer.fill(|slot| *slot = next) {
                        next += 1;
                        producer.publish();
                    } else {
                        thread::yield_now();
                    }
                }
            });
            let mut next = 1;
            while next <= 3 {
                let waiting = consumer.waiting();
                for at in 0..waiting {
                    assert_eq!(consumer.read(at, |slot| std::mem::take(slot)), Some(next));
                    next += 1;
                }
                if waiting == 0 {
                    thread::yield_now();
                } else {
                    consumer.release(waiting);
                }
            }
            writer.join().unwrap();
            assert!(consumer.is_empty() && consumer.is_closed());
        });
    }

    #[test]
    fn no_entry_is_slept_through() {
        loom::model(|| {
            let (mut producer, consumer, _keeper) = ring(2, || 0u32);
            let flag = Arc::new(SleepFlag::new());
            let event = Arc::new(AtomicBool::new(false));
            let writer = {
                let (flag, event) = (flag.clone(), event.clone());
                thread::spawn(move || {
                    assert!(producer.fill(|slot| *slot = 1));
                    producer.publish();
                    if flag.must_wake() {
                        event.store(true, Ordering::Relaxed);
                    }
                })
            };
            flag.announce();
            let saw = !consumer.is_empty();
            writer.join().unwrap();
            // Had the sleeper not seen the entry, it would be waiting for the event: which must then have come.
            assert!(saw || event.load(Ordering::Relaxed));
        });
    }

    #[test]
    fn what_a_leaving_consumer_did_not_take_comes_back_once() {
        loom::model(|| {
            let (mut producer, mut consumer, _keeper) = ring(2, || 0u32);
            let reader = thread::spawn(move || {
                let taken = consumer.waiting().min(1);
                let got = consumer.read(0, |slot| std::mem::take(slot));
                consumer.release(taken);
                got.unwrap_or(0)
            });
            assert!(producer.fill(|slot| *slot = 1));
            assert!(producer.fill(|slot| *slot = 2));
            producer.publish();
            let mut back = 0;
            // Whether the reader has left or not, it and we never meet in a slot.
            while producer.take_back(|slot| back += std::mem::take(slot)) {}
            let taken = reader.join().unwrap();
            while producer.take_back(|slot| back += std::mem::take(slot)) {}
            assert_eq!(taken + back, 3);
        });
    }
}
