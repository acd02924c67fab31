//! A vhost-user-blk client and the loads that it runs: what the demo, the tests and the speed marks drive a disk with.
//!
//! The client is the `virtio-driver` crate, written by others against the specification: what it sees is what a guest
//! would see. [`client`] connects and owns the memory, [`run`] keeps a queue depth of random or verified requests.
//!
//! **Invariant:** nothing here knows the daemon; any vhost-user-blk server can be at the other end.

mod client;
mod run;

pub use client::{Client, ClientError, ClientOptions, Transfer};
pub use run::{LoadOptions, LoadReport, Mix, fill, random_load, verify_filled};
