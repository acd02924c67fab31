//! The RPC: JSON-RPC 2.0 over a Unix stream socket, with the method names, parameters and results of SPDK.
//!
//! Bytes come in through [`server`] (connections, limits, back-pressure), [`scan`] cuts them into JSON values,
//! [`wire`] turns values into requests and results into replies. [`methods`] is the one table of all methods: it
//! checks parameters, answers `rpc_get_methods` and feeds `ringmillctl`'s help. What a method needs from the daemon
//! it asks of the [`engine::Engine`] trait.
//!
//! Owned by the control thread; nothing here runs on a reactor, blocks, or panics on what a client sends.

pub mod cpumask;
pub mod engine;
pub mod error;
pub mod methods;
pub mod nearest;
pub mod nvme;
pub mod params;
pub mod record;
pub mod scan;
pub mod server;
pub mod socket;
pub mod wire;

mod bdev;
mod conn;
mod framework;
mod iostat;
mod latency;
mod show;
mod table;
mod vhost;

pub use engine::Engine;
pub use error::RpcError;
pub use methods::Dispatcher;
pub use server::{Methods, Reply, RpcServer, Token};
