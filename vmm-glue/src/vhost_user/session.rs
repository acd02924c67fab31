//! The protocol's state machine: one connected front-end, from its first question to its hang-up.
//!
//! In: readiness of the socket ([`Session::on_readable`], [`Session::on_writable`]) and ends of operations
//! ([`Session::complete`]). Out: calls of the [`Backend`], replies. Owner: the control thread.
//!
//! **Invariants:** never blocks; handles one message after the other, and none while an operation is pending or a reply
//! waits for room; a message has at most one answer; a refused message changes nothing, except that a ring that failed
//! to start waits for a new kick. An error ends this session only: its owner drops it, then stops and drains the rings
//! that the backend still runs.
//!
//! Spec: vhost-user protocol, "Communication", "Ring states", "Front-end message types", "REPLY_ACK".

use std::error::Error as _;
use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::backend::{Backend, Completion, Progress, Refusal};
use super::channel::BackendChannel;
use super::codec::{Connection, ConnectionState, Message, Receive};
use super::error::Error;
use super::memory::MemoryTable;
use super::message::{Header, RINGS_MAX, Request, decode_u64, protocol_feature, virtio_feature};
use super::ring::{Layout, Ring};

mod config;
mod memory;
mod rings;

/// The protocol features on offer.
pub const PROTOCOL_FEATURES: u64 = protocol_feature::MQ
    | protocol_feature::REPLY_ACK
    | protocol_feature::BACKEND_REQ
    | protocol_feature::CONFIG
    | protocol_feature::RESET_DEVICE
    | protocol_feature::CONFIGURE_MEM_SLOTS;

/// Messages that one call of [`Session::on_readable`] handles, so that a chatty front-end does not delay the others.
pub const MESSAGES_PER_TURN: usize = 32;

/// Refused messages of one session that are logged; a hostile front-end must not fill the disk with our log.
const REFUSALS_LOGGED_MAX: u32 = 8;

/// The acknowledgement of a refused message. The protocol only asks for "non-zero".
const NACK: u64 = 1;

/// What the session's socket is to be polled for, level-triggered.
///
/// When neither is set, an operation is pending; a hang-up that poll reports nevertheless means that nobody waits for
/// its result any more, and the owner should end the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Call [`Session::on_readable`] when there is something to read.
    pub readable: bool,
    /// Call [`Session::on_writable`] when there is room.
    pub writable: bool,
}

/// Whether the front-end is still there.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It is.
    Connected,
    /// It has closed the connection, between two messages.
    Closed,
}

/// An operation that changes the session when it is done.
#[derive(Clone, Debug)]
pub enum Operation {
    /// SET_FEATURES.
    Features(u64),
    /// SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG: the table that results.
    Memory(MemoryTable),
    /// SET_VRING_ENABLE.
    Enable {
        /// The ring.
        index: u16,
        /// Whether it may take requests.
        enabled: bool,
    },
    /// GET_VRING_BASE.
    Stop {
        /// The ring.
        index: u16,
    },
    /// RESET_DEVICE.
    Reset,
}

/// An operation that the backend has begun, and the message that it will answer.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The message's header.
    pub header: Header,
    /// What it asked.
    pub request: Request,
    /// What its success changes.
    pub operation: Operation,
}

/// A session as plain data, for a hand-over to another process.
#[derive(Debug)]
pub struct SessionState {
    /// The socket and what is half received or half sent.
    pub connection: ConnectionState,
    /// The way for requests to the front-end.
    pub channel: Option<BackendChannel>,
    /// The virtio features that the front-end acknowledged, VHOST_USER_F_PROTOCOL_FEATURES among them.
    pub features: u64,
    /// The protocol features that it acknowledged.
    pub protocol_features: u64,
    /// The memory regions.
    pub memory: MemoryTable,
    /// The rings; their number is the device's.
    pub rings: Vec<Ring>,
    /// What the backend has not completed yet.
    pub pending: Option<Pending>,
}

/// One connected front-end.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    channel: Option<BackendChannel>,
    features: u64,
    protocol_features: u64,
    memory: MemoryTable,
    rings: Vec<Ring>,
    pending: Option<Pending>,
    refusals_count: u32,
}

/// How a message is answered.
enum Outcome {
    /// Done; acknowledged where that is asked for.
    Ack,
    /// The message's own reply.
    Reply(Vec<u8>),
    /// The backend will say.
    Later(Operation),
}

impl Session {
    /// A session on a connected Unix stream socket, for a device with [`Backend::queues_max`] rings.
    pub fn new(socket: impl Into<OwnedFd>, backend: &dyn Backend) -> Self {
        let rings_count = usize::from(backend.queues_max().min(RINGS_MAX));
        Self {
            connection: Connection::new(socket),
            channel: None,
            features: 0,
            protocol_features: 0,
            memory: MemoryTable::default(),
            rings: vec![Ring::default(); rings_count],
            pending: None,
            refusals_count: 0,
        }
    }

    /// Continues where [`Self::into_state`] stopped. The backend must be in the state that goes with it.
    pub fn from_state(state: SessionState) -> Result<Self, Error> {
        let mut rings = state.rings;
        rings.truncate(RINGS_MAX.into());
        let session = Self {
            connection: Connection::from_state(state.connection)?,
            channel: state.channel,
            features: state.features,
            protocol_features: state.protocol_features,
            memory: state.memory,
            rings,
            pending: state.pending,
            refusals_count: 0,
        };
        if let Some(Pending { request, operation, .. }) = &session.pending
            && let Operation::Enable { index, .. } | Operation::Stop { index } = operation
        {
            session.ring_index(*request, u32::from(*index))?;
        }
        Ok(session)
    }

    /// Gives up everything that the session knows. The front-end notices nothing.
    pub fn into_state(self) -> SessionState {
        SessionState {
            connection: self.connection.into_state(),
            channel: self.channel,
            features: self.features,
            protocol_features: self.protocol_features,
            memory: self.memory,
            rings: self.rings,
            pending: self.pending,
        }
    }

    /// What to poll the session's socket for.
    pub fn interest(&self) -> Interest {
        let writable = self.connection.has_outgoing();
        Interest { readable: !writable && self.pending.is_none(), writable }
    }

    /// Handles what has arrived, up to [`MESSAGES_PER_TURN`] messages; the socket stays readable when there are more.
    ///
    /// An error ends the session.
    pub fn on_readable(&mut self, backend: &mut dyn Backend) -> Result<Peer, Error> {
        for _ in 0..MESSAGES_PER_TURN {
            if !self.interest().readable {
                break;
            }
            match self.connection.receive()? {
                Receive::Message(message) => self.handle(message, backend)?,
                Receive::Blocked => break,
                Receive::Closed => return Ok(Peer::Closed),
            }
        }
        Ok(Peer::Connected)
    }

    /// Sends replies that the socket had no room for. An error ends the session.
    pub fn on_writable(&mut self) -> Result<(), Error> {
        self.connection.flush()
    }

    /// Ends the pending operation and answers the front-end. The socket is then worth polling again.
    ///
    /// `Err` refuses the operation: the backend has left everything as it was. An error returned ends the session.
    pub fn complete(
        &mut self,
        backend: &mut dyn Backend,
        result: Result<Completion, Refusal>,
    ) -> Result<(), Error> {
        let Some(Pending { header, request, operation }) = self.pending.take() else {
            return Err(Error::NothingPending);
        };
        let outcome = match (operation, result) {
            (_, Err(source)) => Err(Error::Backend { request, source }),
            (Operation::Stop { index }, Ok(Completion::Stopped { base })) => {
                Ok(self.ring_stopped(index, base))
            }
            (Operation::Stop { .. }, Ok(Completion::Done))
            | (_, Ok(Completion::Stopped { .. })) => Err(Error::WrongCompletion { request }),
            (operation, Ok(Completion::Done)) => {
                self.settle(request, operation, backend).map(|()| Outcome::Ack)
            }
        };
        self.answer(header, outcome)
    }

    /// Whether the backend owes a completion.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Tells the front-end that the configuration space has changed (resize). Says whether it can be told: it cannot
    /// before it has set up its channel, after it has closed it, or without BACKEND_REQ.
    pub fn config_changed(&mut self) -> bool {
        self.with_channel(BackendChannel::config_changed)
    }

    /// The channel's socket while it has to be polled for room; then call [`Self::on_channel_writable`].
    pub fn channel_to_poll(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().filter(|channel| channel.wants_write()).map(AsFd::as_fd)
    }

    /// Sends the configuration changes that the channel had no room for. Also to be called when it reports a hang-up.
    pub fn on_channel_writable(&mut self) {
        self.with_channel(BackendChannel::flush);
    }

    /// The virtio features that the front-end has acknowledged, VHOST_USER_F_PROTOCOL_FEATURES among them.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features that the front-end has acknowledged.
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features
    }

    /// The memory regions that the front-end has described.
    pub fn memory(&self) -> &MemoryTable {
        &self.memory
    }

    /// The rings as the front-end has configured them.
    pub fn rings(&self) -> &[Ring] {
        &self.rings
    }

    /// What a ring that does not run is waiting for, in words for a status display; `None` when it runs or is unknown.
    pub fn ring_waits_for(&self, index: u16) -> Option<&'static str> {
        self.rings.get(usize::from(index))?.waits_for(self.layout(), &self.memory)
    }

    fn with_channel(&mut self, call: fn(&mut BackendChannel) -> std::io::Result<()>) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        match call(channel) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the front-end closed its channel for configuration changes");
                self.channel = None;
                false
            }
        }
    }

    fn handle(&mut self, message: Message, backend: &mut dyn Backend) -> Result<(), Error> {
        let header = message.header;
        let outcome = match Request::from_number(header.request) {
            Some(request) => match self.dispatch(request, message, backend) {
                Ok(Outcome::Later(operation)) => {
                    self.pending = Some(Pending { header, request, operation });
                    return Ok(());
                }
                outcome => outcome,
            },
            None => Err(Error::UnknownRequest { number: header.request }),
        };
        self.answer(header, outcome)
    }

    /// Sends the one answer that a message gets, or ends the session when it can have none.
    fn answer(&mut self, header: Header, outcome: Result<Outcome, Error>) -> Result<(), Error> {
        // Judged after the message took effect: front-ends expect SET_PROTOCOL_FEATURES itself to be acknowledged.
        let acknowledge =
            header.needs_reply() && self.protocol_features & protocol_feature::REPLY_ACK != 0;
        let request = Request::from_number(header.request);
        match outcome {
            Ok(Outcome::Reply(payload)) => self.reply(header, &payload),
            Ok(Outcome::Ack | Outcome::Later(_)) if acknowledge => {
                self.reply(header, &0u64.to_ne_bytes())
            }
            Ok(Outcome::Ack | Outcome::Later(_)) => Ok(()),
            Err(error) if !error.is_refusal() => Err(error),
            // "The back-end uses zero length of payload to indicate an error."
            Err(error) if request == Some(Request::GetConfig) => {
                self.log_refusal(&error);
                self.reply(header, &[])
            }
            Err(error) if acknowledge && !request.is_some_and(has_own_reply) => {
                self.log_refusal(&error);
                self.reply(header, &NACK.to_ne_bytes())
            }
            Err(error) => Err(error),
        }
    }

    fn reply(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        let payload_bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.connection.send(Header::reply(header.request, payload_bytes), payload, Vec::new())
    }

    fn log_refusal(&mut self, error: &Error) {
        self.refusals_count = self.refusals_count.saturating_add(1);
        if self.refusals_count > REFUSALS_LOGGED_MAX {
            return;
        }
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
        let last = self.refusals_count == REFUSALS_LOGGED_MAX;
        tracing::warn!(last, "refused a vhost-user message: {text}");
    }

    fn dispatch(
        &mut self,
        request: Request,
        message: Message,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let Message { payload, fds, .. } = message;
        // Descriptors that a message has no use for are closed when `fds` goes; QEMU once sent one with REM_MEM_REG.
        match request {
            Request::GetFeatures => {
                expect_empty(request, &payload)?;
                Ok(reply_u64(backend.device_features() | virtio_feature::PROTOCOL_FEATURES))
            }
            Request::SetFeatures => self.set_features(&payload, backend),
            Request::GetProtocolFeatures => {
                expect_empty(request, &payload)?;
                Ok(reply_u64(PROTOCOL_FEATURES))
            }
            Request::SetProtocolFeatures => self.set_protocol_features(&payload),
            // One session owns its controller from the start; the protocol recommends to ignore RESET_OWNER, which
            // some front-ends mean as "disable" and others as "forget everything".
            Request::SetOwner | Request::ResetOwner => {
                expect_empty(request, &payload)?;
                Ok(Outcome::Ack)
            }
            Request::GetQueueNum => {
                self.require(request, protocol_feature::MQ, "MQ")?;
                expect_empty(request, &payload)?;
                Ok(reply_u64(u64::try_from(self.rings.len()).unwrap_or(u64::MAX)))
            }
            Request::GetMaxMemSlots => {
                self.require_mem_slots(request)?;
                expect_empty(request, &payload)?;
                Ok(reply_u64(backend.mem_slots_max()))
            }
            Request::SetMemTable => self.set_mem_table(&payload, fds, backend),
            Request::AddMemReg => self.add_mem_region(&payload, fds, backend),
            Request::RemMemReg => self.remove_mem_region(&payload, backend),
            Request::SetVringNum => self.set_vring_num(&payload, backend),
            Request::SetVringAddr => self.set_vring_addr(&payload, backend),
            Request::SetVringBase => self.set_vring_base(&payload),
            Request::GetVringBase => self.get_vring_base(&payload, backend),
            Request::SetVringKick => self.set_vring_kick(&payload, fds, backend),
            Request::SetVringCall => self.set_vring_call(&payload, fds, backend),
            Request::SetVringErr => self.set_vring_err(&payload, fds, backend),
            Request::SetVringEnable => self.set_vring_enable(&payload, backend),
            Request::GetConfig => self.get_config(&payload, backend),
            Request::SetConfig => self.set_config(&payload, backend),
            Request::SetBackendReqFd => self.set_backend_req_fd(&payload, fds),
            Request::ResetDevice => {
                self.require(request, protocol_feature::RESET_DEVICE, "RESET_DEVICE")?;
                expect_empty(request, &payload)?;
                let progress = backend.reset_device();
                self.advance(request, progress, Operation::Reset, backend)
            }
            _ => Err(Error::Unsupported { request }),
        }
    }

    fn set_features(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetFeatures;
        let features = decode_u64(payload).ok_or_else(|| wrong_size(request, payload))?;
        let offered = backend.device_features() | virtio_feature::PROTOCOL_FEATURES;
        expect_offered(request, features, offered)?;
        let changed = (self.features ^ features) & !virtio_feature::LOG_ALL;
        if changed != 0
            && let Some(index) = self.running_rings().next()
        {
            return Err(Error::FeaturesWhileRunning { changed, index });
        }
        let progress = backend.set_features(features & !virtio_feature::PROTOCOL_FEATURES);
        self.advance(request, progress, Operation::Features(features), backend)
    }

    fn set_protocol_features(&mut self, payload: &[u8]) -> Result<Outcome, Error> {
        let request = Request::SetProtocolFeatures;
        let features = decode_u64(payload).ok_or_else(|| wrong_size(request, payload))?;
        expect_offered(request, features, PROTOCOL_FEATURES)?;
        self.protocol_features = features;
        Ok(Outcome::Ack)
    }

    fn require(&self, request: Request, bit: u64, feature: &'static str) -> Result<(), Error> {
        if self.protocol_features & bit == 0 {
            return Err(Error::NotNegotiated { request, feature });
        }
        Ok(())
    }

    fn require_mem_slots(&self, request: Request) -> Result<(), Error> {
        self.require(request, protocol_feature::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")
    }

    fn layout(&self) -> Layout {
        if self.features & virtio_feature::RING_PACKED != 0 {
            Layout::Packed
        } else {
            Layout::Split
        }
    }

    fn advance(
        &mut self,
        request: Request,
        progress: Result<Progress, Refusal>,
        operation: Operation,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        match progress.map_err(|source| Error::Backend { request, source })? {
            Progress::Done => {
                self.settle(request, operation, backend)?;
                Ok(Outcome::Ack)
            }
            Progress::Pending => Ok(Outcome::Later(operation)),
        }
    }

    /// Enters what an operation has changed, and starts the rings that waited for it.
    fn settle(
        &mut self,
        request: Request,
        operation: Operation,
        backend: &mut dyn Backend,
    ) -> Result<(), Error> {
        match operation {
            Operation::Features(features) => {
                self.features = features;
                self.start_all_ready(request, backend)
            }
            Operation::Memory(table) => {
                self.memory = table;
                self.start_all_ready(request, backend)
            }
            Operation::Enable { index, enabled } => {
                self.ring(index).enabled = Some(enabled);
                Ok(())
            }
            // A stopped ring is entered with its base, by `ring_stopped`.
            Operation::Stop { .. } => Ok(()),
            Operation::Reset => {
                for ring in &mut self.rings {
                    let (call, err) = (ring.call.take(), ring.err.take());
                    *ring = Ring { call, err, enabled: Some(false), ..Ring::default() };
                }
                Ok(())
            }
        }
    }

    fn start_all_ready(
        &mut self,
        request: Request,
        backend: &mut dyn Backend,
    ) -> Result<(), Error> {
        for (index, _) in (0..RINGS_MAX).zip(0..self.rings.len()) {
            self.start_when_ready(request, index, backend)?;
        }
        Ok(())
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// Whether the supported message has an answer of its own, so that an acknowledgement would be misread as that.
fn has_own_reply(request: Request) -> bool {
    matches!(
        request,
        Request::GetFeatures
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::GetMaxMemSlots
            | Request::GetVringBase
            | Request::GetConfig
    )
}

fn reply_u64(value: u64) -> Outcome {
    Outcome::Reply(value.to_ne_bytes().to_vec())
}

fn wrong_size(request: Request, payload: &[u8]) -> Error {
    Error::PayloadSize { request, payload_bytes: payload.len() }
}

fn expect_empty(request: Request, payload: &[u8]) -> Result<(), Error> {
    if payload.is_empty() { Ok(()) } else { Err(wrong_size(request, payload)) }
}

fn expect_offered(request: Request, acked: u64, offered: u64) -> Result<(), Error> {
    let unknown = acked & !offered;
    if unknown == 0 { Ok(()) } else { Err(Error::FeaturesNotOffered { request, unknown }) }
}

fn one_fd(request: Request, fds: Vec<OwnedFd>) -> Result<OwnedFd, Error> {
    let received = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| Error::FdCount {
        request,
        expected: 1,
        received,
    })?;
    Ok(fd)
}

#[cfg(test)]
mod tests;
