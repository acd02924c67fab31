//! What `ringmilld` and `ringmillctl` share, and what their guest tests need.

pub mod config;
pub mod ctl;
pub mod daemon;
pub mod demo;
pub mod guest_lab;
pub mod hist;
pub mod load;
pub mod perf;
pub mod rpc;
