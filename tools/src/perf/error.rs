//! What can go wrong with a load, in words that name the socket, the queue and the number.

use std::io;

use thiserror::Error;

/// Why a load could not be set up or could not go on.
#[derive(Debug, Error)]
pub enum PerfError {
    /// No memory to share.
    #[error("cannot get {len_bytes} bytes of shared memory: {source}")]
    Memory {
        /// How much.
        len_bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// No server.
    #[error("cannot connect to {socket}: {source}; is a vhost-user-blk server listening there?")]
    Connect {
        /// The socket.
        socket: String,
        /// Why not.
        source: io::Error,
    },
    /// The connection broke during the set-up, or the answer did not come.
    #[error("{socket}: {request}: {source}")]
    Exchange {
        /// The socket.
        socket: String,
        /// The message that was to be sent or answered.
        request: String,
        /// Why not.
        source: io::Error,
    },
    /// The server cannot or will not do what the load needs.
    #[error("{socket}: {reason}")]
    Refused {
        /// The socket.
        socket: String,
        /// What, and what to do.
        reason: String,
    },
    /// The options contradict each other or the disk.
    #[error("{0}")]
    Options(String),
    /// The device broke the rules of the ring.
    #[error("{place}: {what} at used index {index}")]
    Ring {
        /// Socket and queue.
        place: String,
        /// What it did.
        what: String,
        /// Where in the ring.
        index: u16,
    },
    /// Nothing came back for too long.
    #[error(
        "{place}: no answer for {seconds} s: {inflight} requests in flight, available index {avail_index}, used index \
         {used_index}; the oldest is a {op} at byte {offset}"
    )]
    Hang {
        /// Socket and queue.
        place: String,
        /// How long.
        seconds: u64,
        /// How many requests wait.
        inflight: usize,
        /// Entries that the driver has made available.
        avail_index: u16,
        /// Entries that the device has returned.
        used_index: u16,
        /// The oldest request's operation.
        op: &'static str,
        /// Its place on the disk.
        offset: u64,
    },
    /// The server is gone.
    #[error("{socket}: the server closed the connection during the load")]
    Closed {
        /// The socket.
        socket: String,
    },
    /// A kick could not be sent.
    #[error("{place}: cannot kick the queue: {source}")]
    Kick {
        /// Socket and queue.
        place: String,
        /// Why not.
        source: io::Error,
    },
    /// A bdev driven directly.
    #[error("{0}")]
    Bdev(String),
}
