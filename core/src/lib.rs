//! ringmill-core: everything a storage reactor needs that is neither a guest protocol nor a device.
//!
//! The way of a request through this crate: a [`reactor`] polls its queue workers; a worker fills an [`io::Batch`] whose
//! segments were translated by [`mem`]; a [`bdev::Channel`] takes it and later hands back [`io::Completion`]s; stage
//! times go into [`stats`]. The wire layouts shared by drivers and device models live in [`spec`].
//!
//! **Invariant:** nothing here knows vhost-user, virtqueues or a particular device.

pub mod bdev;
pub mod cross;
pub mod io;
pub mod limits;
pub mod mem;
pub mod reactor;
pub mod spec;
pub mod stats;
pub mod status;
pub mod units;

pub use status::IoStatus;
