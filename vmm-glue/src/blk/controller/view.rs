//! What a controller shows of itself: its state, its sessions, the descriptors to poll.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::super::{PinView, QueueStatus};

/// Where a controller stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerState {
    /// It takes connections.
    Active,
    /// It is being deleted and waits for requests in flight.
    Draining,
    /// It has let go of everything; drop it.
    Deleted,
}

/// What a descriptor of a controller belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceToken {
    /// The listening socket.
    Listener,
    /// A front-end's connection.
    Session(u64),
    /// The way for our own requests to a front-end, which was full.
    Channel(u64),
}

/// A descriptor to poll.
#[derive(Debug)]
pub struct Source<'a> {
    /// What to poll.
    pub fd: BorrowedFd<'a>,
    /// For input.
    pub readable: bool,
    /// For room.
    pub writable: bool,
    /// What it belongs to.
    pub token: SourceToken,
}

/// A session as status output shows it.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// Its number.
    pub vid: u64,
    /// True when its rings may run.
    pub active: bool,
    /// Negotiated virtio features.
    pub features: u64,
    /// Negotiated vhost-user protocol features.
    pub protocol_features: u64,
    /// Memory regions and their bytes.
    pub memory: (usize, u64),
    /// Whether its memory is pinned.
    pub pin: PinView,
    /// Its started rings.
    pub queues: Vec<QueueView>,
}

/// A ring as status output shows it.
#[derive(Clone, Debug)]
pub struct QueueView {
    /// Its number.
    pub index: u16,
    /// Its entries.
    pub size: u16,
    /// The core that serves it.
    pub core: Option<u32>,
    /// The core that works on the device for it: another one where the bdev has fewer queues than there are reactors.
    pub device_core: Option<u32>,
    /// Its figures.
    pub status: Arc<QueueStatus>,
    /// How long its oldest request has been with the device, nanoseconds, as of the last check.
    pub oldest_age_ns: Option<u64>,
    /// Times that its oldest request was found older than 30 s.
    pub stuck_count: u64,
}
