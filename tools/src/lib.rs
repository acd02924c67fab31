//! What `ringmilld` and `ringmillctl` share.

pub mod config;
pub mod ctl;
pub mod hist;
pub mod rpc;
