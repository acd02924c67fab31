//! Part of ringmill.

pub mod guest_lab;
