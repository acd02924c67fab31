//! `ringmilld`: the process around the reactors.
//!
//! [`args`] says how to start, [`engine`] owns bdevs, controllers and reactors behind the RPC's seam, [`figures`] turns
//! their counters into statistics, `nvme` has the controllers that ringmill drives itself, [`jobs`] does what may block
//! elsewhere, [`control`] is the one loop that owns them all, [`log`] the log's level.
//!
//! **Invariant:** everything here runs on the control thread (or a job's); nothing on a reactor.

pub mod args;
pub mod control;
pub mod engine;
mod errors;
pub mod figures;
pub mod jobs;
pub mod log;
mod nvme;
mod nvme_open;
#[cfg(test)]
mod nvme_tests;
mod views;
