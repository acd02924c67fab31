//! What `ringmilld` and `ringmillctl` share.

pub mod hist;
pub mod rpc;
