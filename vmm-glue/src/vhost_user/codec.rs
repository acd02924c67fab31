//! Framing: whole messages out of, and whole messages into, a Unix stream socket that never blocks.
//!
//! In: chunks of bytes and descriptors as the kernel hands them out. Out: one [`Message`] at a time, and queued replies.
//! Owner: the control thread, which polls the socket (level-triggered).
//!
//! **Invariants:** no receive reaches beyond the current message, so a descriptor always belongs to the message whose
//! bytes it came with (the kernel ends a receive at a chunk that carries some). At most one message of at most
//! [`PAYLOAD_BYTES_MAX`] bytes and [`FDS_MAX`] descriptors is held, and at most [`OUTGOING_MESSAGES_MAX`] replies.
//!
//! Spec: vhost-user protocol, "Message Specification", "Communication"; unix(7), "Ancillary messages".

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use arrayvec::ArrayVec;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::error::Error;
use super::message::{FDS_MAX, HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};

/// Replies that may wait for a front-end that does not read. The session asks one question at a time, so a second one
/// is already unusual.
pub const OUTGOING_MESSAGES_MAX: usize = 8;

/// A whole message.
#[derive(Debug)]
pub struct Message {
    /// Its header; `payload_bytes` is the payload's length.
    pub header: Header,
    /// Its payload.
    pub payload: Vec<u8>,
    /// The descriptors that came with any of its bytes, in order. Dropping closes them.
    pub fds: Vec<OwnedFd>,
}

/// What a receive found.
#[derive(Debug)]
pub enum Receive {
    /// A whole message.
    Message(Message),
    /// Nothing more for now.
    Blocked,
    /// The front-end has closed the connection between two messages.
    Closed,
}

/// A message on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// How many of them the kernel has taken.
    pub sent_bytes: usize,
    /// Descriptors that go with the first byte; empty once that is sent.
    pub fds: Vec<OwnedFd>,
}

/// A connection as plain data, for a hand-over to another process. Nothing of the conversation is anywhere else but in
/// the socket.
#[derive(Debug)]
pub struct ConnectionState {
    /// The connected socket.
    pub socket: OwnedFd,
    /// The part of the next message that has arrived.
    pub received: Vec<u8>,
    /// The descriptors that have arrived with it.
    pub fds: Vec<OwnedFd>,
    /// Replies that the socket had no room for.
    pub outgoing: VecDeque<Outgoing>,
}

/// One connected front-end's socket.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    received: Vec<u8>,
    expected_bytes: usize,
    fds: Vec<OwnedFd>,
    outgoing: VecDeque<Outgoing>,
}

impl Connection {
    /// Takes over a connected Unix stream socket. It may be a blocking one: every call asks not to block.
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self {
            socket: socket.into(),
            received: Vec::new(),
            expected_bytes: HEADER_BYTES,
            fds: Vec::new(),
            outgoing: VecDeque::new(),
        }
    }

    /// Continues where [`Self::into_state`] stopped. Fails when the state holds what would not have been accepted.
    pub fn from_state(state: ConnectionState) -> Result<Self, Error> {
        let mut connection = Self::new(state.socket);
        if state.fds.len() > FDS_MAX {
            return Err(Error::TooManyFds);
        }
        if state.outgoing.len() > OUTGOING_MESSAGES_MAX {
            return Err(Error::OutgoingFull { messages_max: OUTGOING_MESSAGES_MAX });
        }
        connection.received = state.received;
        connection.fds = state.fds;
        connection.outgoing = state.outgoing;
        connection.expect_payload()?;
        if connection.received.len() > connection.expected_bytes {
            return Err(Error::Truncated {
                received_bytes: connection.received.len(),
                expected_bytes: connection.expected_bytes,
            });
        }
        Ok(connection)
    }

    /// Gives up the socket and everything that has been received or queued.
    pub fn into_state(self) -> ConnectionState {
        ConnectionState {
            socket: self.socket,
            received: self.received,
            fds: self.fds,
            outgoing: self.outgoing,
        }
    }

    /// Whether replies wait for room in the socket.
    pub fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Receives until one message is whole or the socket is empty. Never blocks.
    pub fn receive(&mut self) -> Result<Receive, Error> {
        loop {
            if let Some(header) = self.expect_payload()?
                && self.received.len() == self.expected_bytes
            {
                return Ok(Receive::Message(self.take_message(header)));
            }
            match self.receive_chunk()? {
                Some(0) if self.received.is_empty() => return Ok(Receive::Closed),
                Some(0) => {
                    return Err(Error::Truncated {
                        received_bytes: self.received.len(),
                        expected_bytes: self.expected_bytes,
                    });
                }
                Some(_) => {}
                None => return Ok(Receive::Blocked),
            }
        }
    }

    /// Queues a message and sends as much as the socket takes. Descriptors travel with the first byte.
    pub fn send(&mut self, header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(), Error> {
        if self.outgoing.len() >= OUTGOING_MESSAGES_MAX {
            return Err(Error::OutgoingFull { messages_max: OUTGOING_MESSAGES_MAX });
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        header.encode_into(&mut bytes);
        bytes.extend_from_slice(payload);
        self.outgoing.push_back(Outgoing { bytes, sent_bytes: 0, fds });
        self.flush()
    }

    /// Sends what is queued until all is gone or the socket is full. Never blocks.
    pub fn flush(&mut self) -> Result<(), Error> {
        while let Some(message) = self.outgoing.front_mut() {
            let Some(sent_bytes) = send_chunk(&self.socket, message)? else { return Ok(()) };
            message.sent_bytes += sent_bytes;
            message.fds.clear();
            if message.sent_bytes >= message.bytes.len() {
                self.outgoing.pop_front();
            }
        }
        Ok(())
    }

    /// Once the header is whole, checks it and sets how many bytes the message has.
    fn expect_payload(&mut self) -> Result<Option<Header>, Error> {
        let Some(bytes) = self.received.first_chunk() else {
            self.expected_bytes = HEADER_BYTES;
            return Ok(None);
        };
        let header = Header::decode(bytes);
        let request = header.request;
        if !header.version_is_known() {
            return Err(Error::Version { request, version: header.version() });
        }
        if header.is_reply() {
            return Err(Error::UnexpectedReply { request });
        }
        let too_large = Error::PayloadTooLarge { request, payload_bytes: header.payload_bytes };
        match usize::try_from(header.payload_bytes) {
            Ok(payload_bytes) if payload_bytes <= PAYLOAD_BYTES_MAX => {
                self.expected_bytes = HEADER_BYTES + payload_bytes;
                Ok(Some(header))
            }
            _ => Err(too_large),
        }
    }

    fn take_message(&mut self, header: Header) -> Message {
        let mut payload = std::mem::take(&mut self.received);
        payload.drain(..HEADER_BYTES);
        self.expected_bytes = HEADER_BYTES;
        Message { header, payload, fds: std::mem::take(&mut self.fds) }
    }

    /// Receives at most up to the end of the current header or message. `None` when the socket is empty.
    fn receive_chunk(&mut self) -> Result<Option<usize>, Error> {
        let start = self.received.len();
        self.received.resize(self.expected_bytes, 0);
        let result = receive_once(&self.socket, &mut self.received[start..], &mut self.fds);
        let chunk_bytes = if let Ok(Some(chunk_bytes)) = result { chunk_bytes } else { 0 };
        self.received.truncate(start + chunk_bytes);
        result
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One recvmsg. Descriptors beyond the bound are closed and reported; whatever happens, none is left open unowned.
fn receive_once(
    socket: &OwnedFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, Error> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // MSG_CMSG_CLOEXEC: a child that is being started elsewhere must not inherit guest memory.
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(Error::Receive(errno.into())),
        }
    };
    let mut surplus = false;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            for fd in rights {
                if fds.len() < FDS_MAX {
                    fds.push(fd);
                } else {
                    surplus = true;
                }
            }
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Error::FdsLost);
    }
    if surplus {
        return Err(Error::TooManyFds);
    }
    Ok(Some(received.bytes))
}

/// One sendmsg. `None` when the socket is full.
fn send_chunk(socket: &OwnedFd, message: &Outgoing) -> Result<Option<usize>, Error> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: ArrayVec<BorrowedFd<'_>, FDS_MAX> =
        message.fds.iter().take(FDS_MAX).map(AsFd::as_fd).collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Error::TooManyFds);
    }
    let bytes = message.bytes.get(message.sent_bytes..).unwrap_or_default();
    // MSG_NOSIGNAL: a front-end that closed its end must not raise SIGPIPE here.
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(sent_bytes) => return Ok(Some(sent_bytes)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(Error::Send(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::message::Request;
    use super::super::testing::{FrontEnd, Outbound, event, identity, memory_file, open_count};
    use super::*;

    fn connect() -> (FrontEnd, Connection) {
        let (front, socket) = FrontEnd::connect();
        (front, Connection::new(socket))
    }

    fn receive(connection: &mut Connection) -> Message {
        match connection.receive().unwrap() {
            Receive::Message(message) => message,
            other => panic!("no message but {other:?}"),
        }
    }

    fn is_blocked(connection: &mut Connection) -> bool {
        matches!(connection.receive().unwrap(), Receive::Blocked)
    }

    fn header_bytes(request: u32, flags: u32, payload_bytes: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        Header { request, flags, payload_bytes }.encode_into(&mut bytes);
        bytes
    }

    #[test]
    fn a_message_arrives_byte_by_byte() {
        let (front, mut connection) = connect();
        let sent = Outbound::vring(Request::SetVringNum, 1, 256);
        let bytes = sent.bytes();
        let (last, first) = bytes.split_last().unwrap();
        for byte in first {
            front.send_chunk(&[*byte], &[]);
            assert!(is_blocked(&mut connection));
        }
        front.send_chunk(&[*last], &[]);
        let message = receive(&mut connection);
        assert_eq!((message.header, message.payload), (sent.header, sent.payload));
        assert!(is_blocked(&mut connection));
    }

    #[test]
    fn descriptors_may_come_with_any_byte_and_stay_in_order() {
        let (front, mut connection) = connect();
        let sent = Outbound::u64(Request::SetVringKick, 0);
        let bytes = sent.bytes();
        for at in 0..bytes.len() {
            let files = [memory_file(), event(), memory_file()];
            let identities: Vec<_> = files.iter().map(identity).collect();
            front.send_chunk(&bytes[..at], &[]);
            assert!(is_blocked(&mut connection));
            front.send_chunk(&bytes[at..=at], &files);
            if at + 1 < bytes.len() {
                assert!(is_blocked(&mut connection));
                front.send_chunk(&bytes[at + 1..], &[]);
            }
            let message = receive(&mut connection);
            assert_eq!(message.fds.iter().map(identity).collect::<Vec<_>>(), identities);
        }
    }

    #[test]
    fn descriptors_belong_to_the_message_they_came_with() {
        let (front, mut connection) = connect();
        let plain = Outbound::new(Request::GetFeatures, Vec::new());
        let kick = Outbound::vring_fd(Request::SetVringKick, 0, Some(event()));
        for message in [&plain, &plain, &kick, &plain, &kick, &kick, &plain] {
            front.send(message);
        }
        let counts: Vec<_> = (0..7).map(|_| receive(&mut connection).fds.len()).collect();
        assert_eq!(counts, [0, 0, 1, 0, 1, 1, 0]);
    }

    #[test]
    fn descriptors_are_close_on_exec() {
        let (front, mut connection) = connect();
        front.send(&Outbound::vring_fd(Request::SetVringKick, 0, Some(event())));
        let message = receive(&mut connection);
        let flags = rustix::io::fcntl_getfd(&message.fds[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn surplus_descriptors_end_the_session_and_are_closed() {
        for counts in [vec![33], vec![253], vec![32, 1], vec![20, 20]] {
            let (front, mut connection) = connect();
            let bytes = Outbound::u64(Request::SetVringKick, 0).bytes();
            let file = memory_file();
            let identities = [identity(&file)];
            for (byte, count) in bytes.iter().zip(counts) {
                let fds: Vec<_> = (0..count).map(|_| file.try_clone().unwrap()).collect();
                front.send_chunk(&[*byte], &fds);
            }
            let error = connection.receive().unwrap_err();
            assert!(matches!(error, Error::TooManyFds | Error::FdsLost), "{error}");
            drop(connection);
            assert_eq!(open_count(&identities), 1);
        }
    }

    #[test]
    fn thirty_two_descriptors_are_fine() {
        let (front, mut connection) = connect();
        let fds = (0..FDS_MAX).map(|_| event()).collect();
        front.send(&Outbound::u64(Request::SetMemTable, 0).with_fds(fds));
        assert_eq!(receive(&mut connection).fds.len(), FDS_MAX);
    }

    #[test]
    fn half_a_message_keeps_its_descriptors_open_until_the_connection_goes() {
        let (front, mut connection) = connect();
        let file = memory_file();
        let identities = [identity(&file)];
        front.send_chunk(&header_bytes(5, 1, 8)[..5], &[file]);
        assert!(is_blocked(&mut connection));
        assert_eq!(open_count(&identities), 1);
        drop(connection);
        assert_eq!(open_count(&identities), 0);
    }

    #[test]
    fn bad_headers_end_the_session_before_any_payload_is_awaited() {
        let too_large = u32::try_from(PAYLOAD_BYTES_MAX + 1).unwrap();
        for (bytes, expected) in [
            (header_bytes(1, 0, 0), "version 0"),
            (header_bytes(1, 2, 0), "version 2"),
            (header_bytes(1, 3, 0), "version 3"),
            (header_bytes(1, 5, 0), "marked as a reply"),
            (header_bytes(5, 1, too_large), "4097"),
            (header_bytes(5, 1, u32::MAX), "4294967295"),
        ] {
            let (front, mut connection) = connect();
            front.send_chunk(&bytes, &[]);
            let error = connection.receive().unwrap_err();
            assert!(!error.is_refusal());
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn the_largest_payload_is_received() {
        let (front, mut connection) = connect();
        front.send(&Outbound::new(Request::SetLogBase, vec![7; PAYLOAD_BYTES_MAX]));
        assert_eq!(receive(&mut connection).payload, [7; PAYLOAD_BYTES_MAX]);
    }

    #[test]
    fn hanging_up_between_messages_is_no_error_and_within_one_is() {
        let (front, mut connection) = connect();
        drop(front);
        assert!(matches!(connection.receive(), Ok(Receive::Closed)));
        for sent in [5, 14] {
            let (front, mut connection) = connect();
            front.send_chunk(&Outbound::u64(Request::SetFeatures, 0).bytes()[..sent], &[]);
            drop(front);
            let error = connection.receive().unwrap_err();
            assert!(
                matches!(error, Error::Truncated { received_bytes, .. } if received_bytes == sent)
            );
        }
    }

    #[test]
    fn replies_wait_for_room_up_to_a_bound() {
        let (mut front, mut connection) = connect();
        let payload = [9; PAYLOAD_BYTES_MAX];
        let mut sent = 0;
        let error = loop {
            match connection.send(Header::reply(24, 4096), &payload, Vec::new()) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            assert!(sent < 100_000, "the socket never fills");
        };
        assert!(matches!(error, Error::OutgoingFull { messages_max: OUTGOING_MESSAGES_MAX }));
        assert!(connection.has_outgoing());
        let mut received = 0;
        while connection.has_outgoing() {
            received += front.replies().len();
            connection.flush().unwrap();
        }
        received += front.replies().len();
        assert_eq!(received, sent);
    }

    #[test]
    fn a_reply_carries_its_descriptors_once() {
        let (front, mut connection) = connect();
        let file = memory_file();
        let identities = [identity(&file)];
        connection.send(Header::reply(31, 0), &[], vec![file]).unwrap();
        // In flight: owned by the socket alone.
        assert_eq!(open_count(&identities), 0);
        let mut received = Connection::new(front.socket);
        assert!(matches!(received.receive(), Err(Error::UnexpectedReply { request: 31 })));
        assert_eq!(open_count(&identities), 1);
    }

    #[test]
    fn a_reader_that_is_gone_is_an_error_and_no_signal() {
        let (front, mut connection) = connect();
        drop(front);
        let error = connection.send(Header::reply(1, 8), &[0; 8], Vec::new()).unwrap_err();
        assert!(matches!(error, Error::Send(_)));
    }

    #[test]
    fn half_a_message_and_half_a_reply_survive_a_hand_over() {
        let (mut front, mut connection) = connect();
        let kick = Outbound::vring_fd(Request::SetVringKick, 3, Some(event()));
        let (payload, mut sent) = ([9; PAYLOAD_BYTES_MAX], 0);
        while !connection.has_outgoing() {
            connection.send(Header::reply(24, 4096), &payload, Vec::new()).unwrap();
            sent += 1;
        }
        let bytes = kick.bytes();
        for at in 0..bytes.len() {
            front.send_chunk(&bytes[at..=at], if at == 3 { &kick.fds } else { &[] });
            connection = Connection::from_state(connection.into_state()).unwrap();
            if at + 1 < bytes.len() {
                assert!(is_blocked(&mut connection));
            }
        }
        let message = receive(&mut connection);
        assert_eq!((message.header, message.payload), (kick.header, kick.payload));
        assert_eq!(message.fds.len(), 1);
        let mut received = front.replies().len();
        connection.flush().unwrap();
        received += front.replies().len();
        assert_eq!(received, sent);
    }

    #[test]
    fn a_state_that_could_not_have_been_received_is_refused() {
        let state = |received: Vec<u8>, fds_count: usize| ConnectionState {
            socket: UnixStream::pair().unwrap().0.into(),
            received,
            fds: (0..fds_count).map(|_| event()).collect(),
            outgoing: VecDeque::new(),
        };
        assert!(Connection::from_state(state(header_bytes(1, 1, 0), 32)).is_ok());
        assert!(Connection::from_state(state(header_bytes(1, 1, 0), 33)).is_err());
        assert!(Connection::from_state(state(header_bytes(1, 0, 0), 0)).is_err());
        assert!(Connection::from_state(state(vec![1; 100], 0)).is_err());
    }
}
