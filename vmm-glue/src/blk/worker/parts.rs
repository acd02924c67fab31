//! What a control thread puts a worker together from.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringmill_core::bdev::Channel;
use ringmill_core::mem::MemTable;

use crate::blk::{BlkDevice, QueueStatus, WorkerEvent};

/// What a worker is made of.
pub struct WorkerParts<V, T> {
    /// The ring.
    pub queue: V,
    /// What to note about requests.
    pub tracking: T,
    /// The guest's memory.
    pub mem: Arc<MemTable>,
    /// The disk.
    pub device: Arc<BlkDevice>,
    /// The way to the medium; planted by the reactor that takes the worker in.
    pub channel: Box<dyn Channel>,
    /// Where the worker shows itself.
    pub status: Arc<QueueStatus>,
    /// Guest → us. `None`: the guest never kicks, the queue is always polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// Us → guest. `None`: the guest polls.
    pub call: Option<Arc<OwnedFd>>,
    /// False: takes no requests until enabled.
    pub enabled: bool,
    /// Tells the control thread.
    pub events: Box<dyn Fn(WorkerEvent) + Send>,
}

impl<T> WorkerParts<(), T> {
    /// The same for a ring.
    pub(in crate::blk) fn with_queue<V>(self, queue: V) -> WorkerParts<V, T> {
        let WorkerParts { queue: (), tracking, mem, device, channel, status, kick, call, .. } =
            self;
        let (enabled, events) = (self.enabled, self.events);
        WorkerParts { queue, tracking, mem, device, channel, status, kick, call, enabled, events }
    }
}
