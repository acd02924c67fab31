//! Everything that can go wrong between a front-end and this back-end, in words for the person who reads the log.
//!
//! Two kinds, told apart by [`Error::is_refusal`]: a *refusal* concerns one message, is answered with a nonzero
//! acknowledgement where the front-end asked for one, and the conversation goes on; everything else ends the session,
//! because the byte stream can no longer be trusted or is gone. Neither kind reaches beyond the session.
//!
//! Spec: vhost-user protocol, "VHOST_USER_PROTOCOL_F_REPLY_ACK".

use std::io;

use super::backend::Refusal;
use super::memory::{GuestAddr, UserAddr};
use super::message::{CONFIG_BYTES_MAX, FDS_MAX, PAYLOAD_BYTES_MAX, Request, TABLE_REGIONS_MAX};

/// Why a message was refused or a session ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each variant's message says what its fields are")]
pub enum Error {
    #[error("receiving from the front-end failed")]
    Receive(#[source] io::Error),
    #[error("sending to the front-end failed")]
    Send(#[source] io::Error),
    #[error(
        "the front-end closed the connection in the middle of a message, after {received_bytes} of {expected_bytes} bytes"
    )]
    Truncated { received_bytes: usize, expected_bytes: usize },
    #[error(
        "request {request} has protocol version {version}; only version 1 exists: is this a vhost-user front-end?"
    )]
    Version { request: u32, version: u32 },
    #[error("request {request} is marked as a reply, but nothing was asked of the front-end")]
    UnexpectedReply { request: u32 },
    #[error(
        "request {request} announces a payload of {payload_bytes} bytes; at most {PAYLOAD_BYTES_MAX} are accepted"
    )]
    PayloadTooLarge { request: u32, payload_bytes: u32 },
    #[error("more than {FDS_MAX} file descriptors came with one message")]
    TooManyFds,
    #[error(
        "file descriptors of a message were lost: more than {FDS_MAX} were sent at once, or this process is at its limit of open files (raise RLIMIT_NOFILE)"
    )]
    FdsLost,
    #[error("{messages_max} replies wait for the front-end to read them")]
    OutgoingFull { messages_max: usize },
    #[error("an operation of the back-end was completed, but the session waits for none")]
    NothingPending,
    #[error("{request} was completed with the outcome of another kind of operation")]
    WrongCompletion { request: Request },

    #[error("request {number} is not part of the vhost-user protocol as this back-end knows it")]
    UnknownRequest { number: u32 },
    #[error("{request} is not supported")]
    Unsupported { request: Request },
    #[error("{request} needs the protocol feature {feature}, which was not negotiated")]
    NotNegotiated { request: Request, feature: &'static str },
    #[error("{request} has a payload of {payload_bytes} bytes, which does not fit its layout")]
    PayloadSize { request: Request, payload_bytes: usize },
    #[error("{request} came with {received} file descriptors instead of {expected}")]
    FdCount { request: Request, expected: usize, received: usize },
    #[error("the state of a file descriptor that came with {request} cannot be read")]
    FdState {
        request: Request,
        #[source]
        source: io::Error,
    },
    #[error("the file descriptor that came with {request} is not an eventfd")]
    NotAnEventFd { request: Request },
    #[error("the file descriptor that came with {request} is not a Unix stream socket")]
    NotAStreamSocket { request: Request },

    #[error("{request} sets bits {unknown:#x} that were not offered")]
    FeaturesNotOffered { request: Request, unknown: u64 },
    #[error(
        "SET_FEATURES changes bits {changed:#x} while ring {index} runs; only logging may change then"
    )]
    FeaturesWhileRunning { changed: u64, index: u16 },

    #[error("{request} names ring {index}, but the device has {queues_max} (counted from 0)")]
    RingIndex { request: Request, index: u32, queues_max: u16 },
    #[error("{request} sets reserved bits")]
    ReservedBits { request: Request },
    #[error("{request} came for ring {index} while it runs; GET_VRING_BASE stops a ring")]
    RingRuns { request: Request, index: u16 },
    #[error(
        "ring {index} cannot have {size} entries: 1 to 32768, and a power of two for a split ring"
    )]
    RingSize { index: u16, size: u32 },
    #[error("the {area} of ring {index} is at {addr:#x}, which is not a multiple of {align_bytes}")]
    RingAlignment { index: u16, area: &'static str, addr: UserAddr, align_bytes: u64 },
    #[error("the {area} of ring {index} at {addr:#x} does not fit into 64-bit addresses")]
    RingAddress { index: u16, area: &'static str, addr: UserAddr },
    #[error("ring {index} cannot start at base {base:#x}: {reason}")]
    RingBase { index: u16, base: u32, reason: &'static str },
    #[error(
        "SET_VRING_ADDR for ring {index} has flags {flags:#x}; logging was not negotiated and no other flag exists"
    )]
    RingFlags { index: u16, flags: u32 },
    #[error("SET_VRING_ENABLE for ring {index} says {value}; only 0 and 1 mean something")]
    RingEnable { index: u16, value: u32 },

    #[error(
        "a memory table has {regions_count} regions; at most {TABLE_REGIONS_MAX} fit (more need CONFIGURE_MEM_SLOTS)"
    )]
    TableTooLong { regions_count: u32 },
    #[error("no memory slot is free: {slots_max} regions are in use")]
    SlotsFull { slots_max: u64 },
    #[error("the memory region at guest address {guest_addr:#x} is empty")]
    RegionEmpty { guest_addr: GuestAddr },
    #[error(
        "the memory region at guest address {guest_addr:#x} ({len_bytes} bytes) overflows its {field}"
    )]
    RegionOverflow { guest_addr: GuestAddr, len_bytes: u64, field: &'static str },
    #[error(
        "the memory region at guest address {guest_addr:#x} overlaps the one at {other:#x} in {space} addresses"
    )]
    RegionOverlap { guest_addr: GuestAddr, other: GuestAddr, space: &'static str },
    #[error(
        "there is no memory region at guest address {guest_addr:#x}, user address {user_addr:#x} with {len_bytes} bytes"
    )]
    RegionUnknown { guest_addr: GuestAddr, user_addr: UserAddr, len_bytes: u64 },
    #[error("{request} takes away the memory of ring {index}, which runs")]
    RegionInUse { request: Request, index: u16 },

    #[error(
        "{request} asks for {size_bytes} bytes at {offset:#x} of a configuration space of {CONFIG_BYTES_MAX}"
    )]
    ConfigRange { request: Request, offset: u32, size_bytes: u32 },
    #[error("SET_CONFIG has flags {flags:#x}; 0 (guest) and 1 (migration) exist")]
    ConfigFlags { flags: u32 },

    #[error("{request} was refused by the device")]
    Backend {
        request: Request,
        #[source]
        source: Refusal,
    },
}

impl Error {
    /// Whether only one message was refused, so that a front-end that asked for an acknowledgement may go on.
    pub fn is_refusal(&self) -> bool {
        !matches!(
            self,
            Self::Receive(_)
                | Self::Send(_)
                | Self::Truncated { .. }
                | Self::Version { .. }
                | Self::UnexpectedReply { .. }
                | Self::PayloadTooLarge { .. }
                | Self::TooManyFds
                | Self::FdsLost
                | Self::OutgoingFull { .. }
                | Self::NothingPending
                | Self::WrongCompletion { .. }
        )
    }
}
