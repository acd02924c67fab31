//! Part of ringmill.

pub mod vhost_user;
