//! The data path against a device that is played by hand.

mod data;
mod on_model;
mod orders;
mod queue;
mod rig;
mod share;
mod sleep;
