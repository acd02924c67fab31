//! What `ringmilld` and `ringmillctl` share.

pub mod config;
pub mod hist;
pub mod rpc;
