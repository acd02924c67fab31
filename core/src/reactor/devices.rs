//! The queues of devices that this reactor drives itself: NVMe queue pairs and their like.
//!
//! Flow: a channel's seed puts its queue here, or finds it; all channels of that device on this reactor share it. Owner:
//! one reactor. **Invariant:** a queue's place does not change while it is there; at most one doorbell per queue and pass.
//!
//! channel.submit: write entries — end of the pass: commit (doorbell) — channel.poll: reap

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Ring;
use crate::mem::BouncePool;

/// A device queue as its reactor sees it. What channels do with it is between them and its type.
pub trait DeviceQueue: Any + Send {
    /// Shows the device what was queued, with at most one doorbell, and looks whether its control thread wants something.
    /// Called at the end of every pass.
    fn commit(&mut self, now_ns: u64);

    /// Called before the reactor sleeps, after `sleeping` was announced: asks the device for interrupts, then looks again.
    /// True when work is there, or when it has requests out and cannot interrupt: the reactor stays awake.
    fn prepare_sleep(&mut self, ring: &mut Ring) -> bool;

    /// Called after every [`DeviceQueue::prepare_sleep`], slept or not: interrupts are no longer wanted. `now_ns` is for what
    /// the next pass starts, before its own commit.
    fn wake(&mut self, ring: &mut Ring, now_ns: u64);

    /// Bounce buffers that the device reaches, if it moves data by itself.
    fn bounces(&mut self) -> Option<&mut BouncePool> {
        None
    }
}

/// Names a device over the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceKey(pub u64);

impl DeviceKey {
    /// One that no other device has.
    #[must_use]
    #[cold]
    pub fn next() -> DeviceKey {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        DeviceKey(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Where a queue is among its reactor's, and whose it is: a place whose queue was removed may have another device's by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSlot {
    at: usize,
    key: DeviceKey,
}

struct Entry {
    key: DeviceKey,
    queue: Box<dyn DeviceQueue>,
}

/// A reactor's device queues.
#[derive(Default)]
pub struct DeviceQueues {
    entries: Vec<Option<Entry>>,
}

impl std::fmt::Debug for DeviceQueues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.entries.iter().flatten().map(|entry| entry.key)).finish()
    }
}

impl DeviceQueues {
    /// The queue of that device, if it has one here.
    #[must_use]
    pub fn find(&self, key: DeviceKey) -> Option<DeviceSlot> {
        let is_it = |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.key == key);
        self.entries.iter().position(is_it).map(|at| DeviceSlot { at, key })
    }

    /// Puts a queue in. One per device: callers `find` first.
    #[cold]
    pub fn insert(&mut self, key: DeviceKey, queue: Box<dyn DeviceQueue>) -> DeviceSlot {
        debug_assert!(self.find(key).is_none());
        let at = self.entries.iter().position(Option::is_none).unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[at] = Some(Entry { key, queue });
        DeviceSlot { at, key }
    }

    /// Takes a queue out, to be dropped by a control thread.
    #[cold]
    pub fn remove(&mut self, key: DeviceKey) -> Option<Box<dyn DeviceQueue>> {
        let slot = self.find(key)?;
        self.entries[slot.at].take().map(|entry| entry.queue)
    }

    /// The queue of `slot`; `None` when it was removed, whatever is in its place now, or is of another type.
    #[inline]
    #[must_use]
    pub fn get<Q: DeviceQueue>(&self, slot: DeviceSlot) -> Option<&Q> {
        let entry = self.entries.get(slot.at)?.as_ref().filter(|entry| entry.key == slot.key)?;
        let queue: &dyn Any = entry.queue.as_ref();
        queue.downcast_ref()
    }

    /// The same, to work with.
    #[inline]
    #[must_use]
    pub fn get_mut<Q: DeviceQueue>(&mut self, slot: DeviceSlot) -> Option<&mut Q> {
        let entry =
            self.entries.get_mut(slot.at)?.as_mut().filter(|entry| entry.key == slot.key)?;
        let queue: &mut dyn Any = entry.queue.as_mut();
        queue.downcast_mut()
    }

    /// [`DeviceQueue::bounces`] of the queue of `slot`, if it is still there.
    pub(super) fn bounces(&mut self, slot: DeviceSlot) -> Option<&mut BouncePool> {
        let entry =
            self.entries.get_mut(slot.at)?.as_mut().filter(|entry| entry.key == slot.key)?;
        entry.queue.bounces()
    }

    /// Bounce buffers of all queues that are in use.
    pub(super) fn bounces_out_count(&mut self) -> usize {
        self.all().filter_map(|queue| queue.bounces()).map(|pool| pool.out_count()).sum()
    }

    #[inline]
    fn all(&mut self) -> impl Iterator<Item = &mut Box<dyn DeviceQueue>> {
        self.entries.iter_mut().flatten().map(|entry| &mut entry.queue)
    }

    /// [`DeviceQueue::commit`] of all.
    #[inline]
    pub fn commit(&mut self, now_ns: u64) {
        for queue in self.all() {
            queue.commit(now_ns);
        }
    }

    /// [`DeviceQueue::prepare_sleep`] of all: each is asked, whatever the others say.
    #[cold]
    pub fn prepare_sleep(&mut self, ring: &mut Ring) -> bool {
        self.all().fold(false, |awake, queue| queue.prepare_sleep(ring) | awake)
    }

    /// [`DeviceQueue::wake`] of all.
    #[cold]
    pub fn wake(&mut self, ring: &mut Ring, now_ns: u64) {
        for queue in self.all() {
            queue.wake(ring, now_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Queue;

    impl DeviceQueue for Queue {
        fn commit(&mut self, _now_ns: u64) {}

        fn prepare_sleep(&mut self, _ring: &mut Ring) -> bool {
            false
        }

        fn wake(&mut self, _ring: &mut Ring, _now_ns: u64) {}
    }

    #[test]
    fn a_place_that_is_used_again_is_not_the_one_that_was_removed() {
        let mut queues = DeviceQueues::default();
        let (one, other) = (DeviceKey::next(), DeviceKey::next());
        let was = queues.insert(one, Box::new(Queue));
        assert!(queues.get::<Queue>(was).is_some() && queues.find(one) == Some(was));
        assert!(queues.remove(one).is_some());
        assert!(queues.get::<Queue>(was).is_none());
        let is = queues.insert(other, Box::new(Queue));
        assert_eq!((is.at, is == was), (was.at, false));
        assert!(queues.get::<Queue>(was).is_none() && queues.get_mut::<Queue>(was).is_none());
        assert!(queues.get_mut::<Queue>(is).is_some());
    }
}
