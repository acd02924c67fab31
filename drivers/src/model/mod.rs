//! An NVMe controller in software, at native speed, for tests and benchmarks of the driver (feature `model`).
//!
//! [`start`] gives a [`ModelBacking`], which a driver takes for a PCI device, and a [`ModelControl`], with which a test
//! looks inside and breaks things. The story of a command: `link` has registers and doorbells, `machine` the thread that
//! looks at them, `queue` the rings, `admin` and `command` what commands do, `data` finds their memory through `dma`, `media`
//! keeps the data; `faults`, `held` and `lies` are how it goes wrong. A
//! [`VfioUserServer`] shows a model to other processes.
//!
//! **Invariant:** a driver that does not keep to the specification is told so by a counter, whatever else happens to it.

mod admin;
mod backing;
mod command;
mod config_space;
mod control;
mod counters;
mod data;
mod dma;
mod faults;
mod held;
mod identify;
mod lies;
mod link;
mod lying;
mod machine;
mod media;
mod namespace;
mod options;
mod queue;
mod shadow;
#[cfg(test)]
mod tests;
mod vfio_user_server;

pub use backing::{ModelBacking, start};
pub use control::ModelControl;
pub use counters::{Count, Counters};
pub use data::Piece;
pub use dma::MapFailure;
pub use faults::{Aborts, Action, Match};
pub use lies::Lie;
pub use link::ModelRegisters;
pub use lying::LyingBacking;
pub use media::{Medium, Ram};
pub use options::{ModelNamespace, ModelOptions, Sgls, Vectors};
pub use vfio_user_server::VfioUserServer;
