//! vhost-user, back-end side: how a VM's front-end (QEMU, Firecracker, Cloud Hypervisor, …) configures a disk.
//!
//! In: bytes and file descriptors from one connected Unix socket. Out: calls of a [`Backend`], replies, and
//! configuration-change messages. Owner: the control thread; nothing here runs on a reactor and nothing here blocks.
//!
//! `codec` frames messages → `message` decodes them → `session` checks them against `ring` and `memory` and calls the
//! `backend`; `channel` is the reverse direction.
//!
//! **Invariant:** the front-end is hostile. No input panics, allocates without a bound, leaks a descriptor or ends more
//! than its own session.
//!
//! Spec: vhost-user protocol (QEMU, `docs/interop/vhost-user.rst`).

pub mod backend;
pub mod channel;
pub mod codec;
pub mod descriptor;
pub mod error;
pub mod memory;
pub mod message;
pub mod ring;
pub mod session;

#[cfg(test)]
mod testing;

pub use backend::{Backend, Completion, Progress, Refusal, StopProgress};
pub use channel::BackendChannel;
pub use codec::{Connection, ConnectionState, Receive};
pub use descriptor::SharedFd;
pub use error::Error;
pub use memory::{GuestAddr, RegionDesc, UserAddr};
pub use ring::{Layout, RingAddresses, RingStart};
pub use session::{Interest, Peer, Session, SessionState};
