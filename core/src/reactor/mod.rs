//! Reactors: one busy-polling thread per core, its clock, ring, mailbox, pollers and sleep.

mod clock;
mod context;
mod devices;
mod fair;
mod fixed;
mod hand_over;
mod handle;
mod parking;
mod pass;
mod poller;
mod pollers;
mod ring;
mod sleep;

pub use clock::{Clock, Entropy, ns_to_ticks, tick_rate, ticks_now};
pub use context::{IoCx, ReactorCx};
pub use devices::{DeviceKey, DeviceQueue, DeviceQueues, DeviceSlot};
pub use fair::{Fair, Share};
pub use fixed::HeldPins;
pub use hand_over::HandOver;
pub use handle::{
    IdlePolicy, Message, ReactorConfig, ReactorError, ReactorHandle, ReactorStats, spawn,
};
pub use pass::Reactor;
pub use poller::{Done, Poller, PollerCounters, PollerId, PollerInfo};
pub use ring::{ClientId, FixedFile, Ring, RingError, RingEvent};
#[cfg(all(test, loom))]
pub(crate) use sleep::SleepFlag;
