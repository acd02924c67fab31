//! virtio-blk: from descriptor chains to block requests and back.
//!
//! [`request`] parses one chain, [`worker`] drives one virtqueue, [`device`] is what the queues of one disk share,
//! [`controller`] is a disk as its front-ends see it: one socket, its sessions, its queues on the reactors.

mod arrivals;
mod coalesce;
mod config;
mod controller;
mod device;
mod event;
mod format;
mod frontend;
mod notifier;
mod places;
mod request;
mod tracking;
mod worker;

pub use coalesce::CoalesceSettings;
pub use config::{device_features, encode_config};
pub use controller::{
    Controller, ControllerError, ControllerSpec, ControllerState, QueueView, SessionView, Source,
    SourceToken,
};
pub use device::{BlkDevice, QueueState, QueueStatus, WorkerEvent};
pub use event::{Event, EventQueue, EventSender, event_queue};
pub use format::{packed_worker, split_worker};
pub use frontend::PinView;
pub use request::{Parsed, Refusal, parse};
pub use tracking::{NoTracking, Tracking};
pub use worker::{PlaceError, QueueWorker, WorkerControl, WorkerParts};
