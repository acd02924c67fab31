//! The ring formats, in one place: a ring's windows, its worker, and the way back to that worker on its reactor.
//!
//! In: a ring as the session starts it. Out: a poller whose code was compiled for the ring's format, and later that
//! poller behind [`WorkerControl`]. Owner: the control thread; `with_worker` runs on reactors.

use std::any::Any;

use ringmill_core::bdev::ChannelSeed;
use ringmill_core::mem::MemTable;
use ringmill_core::reactor::{Poller, PollerId, Reactor, ReactorCx};
use ringmill_core::spec::virtio_ring::{F_EVENT_IDX, F_INDIRECT_DESC};

use crate::vhost_user::{Layout, RingStart};
use crate::virtq::{PackedQueue, RingWindows, SplitQueue, Virtqueue};

use super::{NoTracking, QueueWorker, WorkerControl, WorkerParts};

type Worker<V> = QueueWorker<V, NoTracking>;

/// Windows onto the ring; `None` when it does not lie in `mem` as its format demands.
pub(super) fn windows(mem: &MemTable, start: &RingStart) -> Option<RingWindows> {
    let (size, at) = (start.size, start.addresses);
    match start.layout {
        Layout::Split => RingWindows::split(mem, size, at.desc.0, at.avail.0, at.used.0),
        Layout::Packed => RingWindows::packed(mem, size, at.desc.0, at.avail.0, at.used.0),
    }
}

/// The worker that serves the ring; `None` when the ring has no place that its base names.
pub(super) fn worker(
    start: &RingStart,
    windows: RingWindows,
    features: u64,
    parts: WorkerParts<(), NoTracking>,
    seed: Option<ChannelSeed>,
) -> Option<Box<dyn Poller>> {
    let (size, base) = (start.size, start.base);
    let event_idx = features & F_EVENT_IDX != 0;
    let indirect = features & F_INDIRECT_DESC != 0;
    Some(match start.layout {
        Layout::Split => {
            let base = u16::try_from(base).ok()?;
            serve(SplitQueue::new(windows, size, base, event_idx, indirect), parts, seed)
        }
        Layout::Packed => {
            serve(PackedQueue::new(windows, size, base, event_idx, indirect)?, parts, seed)
        }
    })
}

fn serve<V: Virtqueue>(
    queue: V,
    parts: WorkerParts<(), NoTracking>,
    seed: Option<ChannelSeed>,
) -> Box<dyn Poller> {
    let worker = Worker::new(parts.with_queue(queue));
    match seed {
        Some(seed) => Box::new(worker.with_seed(seed)),
        None => Box::new(worker),
    }
}

/// The worker of a split ring that is there already: for benchmarks, which must run the very code that serves guests and not
/// a copy that was compiled for them.
#[must_use]
pub fn split_worker(queue: SplitQueue, parts: WorkerParts<(), NoTracking>) -> Box<dyn Poller> {
    serve(queue, parts, None)
}

/// The same of a packed ring.
#[must_use]
pub fn packed_worker(queue: PackedQueue, parts: WorkerParts<(), NoTracking>) -> Box<dyn Poller> {
    serve(queue, parts, None)
}

/// Runs `f` on the worker of this id, whatever its format; `None` when it is not on the reactor (any more).
pub(super) fn with_worker<T>(
    reactor: &mut Reactor,
    id: PollerId,
    f: impl FnOnce(&mut dyn WorkerControl, &mut ReactorCx) -> T,
) -> Option<T> {
    reactor.with_dyn_poller(id, |poller, cx| control(poller).map(|worker| f(worker, cx))).flatten()
}

/// The worker behind a poller.
pub(super) fn control(poller: &mut dyn Poller) -> Option<&mut dyn WorkerControl> {
    let poller: &mut dyn Any = poller;
    if poller.is::<Worker<SplitQueue>>() {
        poller.downcast_mut::<Worker<SplitQueue>>().map(|worker| worker as _)
    } else {
        poller.downcast_mut::<Worker<PackedQueue>>().map(|worker| worker as _)
    }
}
