//! Framing: whole messages out of, and into, a Unix stream socket.
//!
//! Flow: the reader's thread polls and calls [`Reader::receive`]; any thread sends through the [`Outbox`], whose lock is
//! held for one system call at a time, never while somebody waits for room. Owner: a connection, on either side.
//! **Invariant:** no receive reaches beyond the current message, so a descriptor belongs to the message whose bytes it came
//! with; descriptors of messages that nobody takes are closed by being dropped.
//!
//! Spec: vfio-user 0.9, "Header"; unix(7), "Ancillary messages".

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ringmill_core::limits::{VFIO_USER_FDS_MAX, VFIO_USER_PAYLOAD_BYTES_MAX};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::protocol::{HEADER_BYTES, Header, ProtocolError};

/// Bytes received at once: memory for a long payload is taken only as it arrives.
const CHUNK_BYTES: usize = 64 << 10;

/// Why a connection is of no more use.
#[derive(Debug, Error)]
pub enum WireError {
    /// The other side closed it.
    #[error("the connection was closed")]
    Closed,
    /// The other side closed it within a message.
    #[error("the connection was closed within a message")]
    Truncated,
    /// It sent what it may not.
    #[error("it sent {0}")]
    Protocol(#[from] ProtocolError),
    /// The kernel reports otherwise.
    #[error("{0}")]
    Io(#[from] Errno),
}

/// A whole message.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows it.
    pub payload: Vec<u8>,
    /// The descriptors that came with it, in order.
    pub fds: Vec<OwnedFd>,
}

/// The receiving end of a connection.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reader {
    /// The next whole message; `None` when its end has not arrived. Does not block.
    ///
    /// # Errors
    /// [`WireError`]: nothing can be received any more.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Option<Message>, WireError> {
        loop {
            let (header, expected) = match self.bytes.first_chunk() {
                None => (None, HEADER_BYTES),
                Some(bytes) => {
                    let header = Header::decode(bytes, VFIO_USER_PAYLOAD_BYTES_MAX)?;
                    (Some(header), HEADER_BYTES + header.payload_bytes)
                }
            };
            if let Some(header) = header
                && self.bytes.len() == expected
            {
                let payload = self.bytes.split_off(HEADER_BYTES);
                self.bytes.clear();
                return Ok(Some(Message { header, payload, fds: std::mem::take(&mut self.fds) }));
            }
            if !self.receive_chunk(&socket, expected)? {
                return Ok(None);
            }
        }
    }

    /// False when the socket is empty.
    fn receive_chunk(&mut self, socket: impl AsFd, expected: usize) -> Result<bool, WireError> {
        let have = self.bytes.len();
        self.bytes.resize(expected.min(have + CHUNK_BYTES), 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(VFIO_USER_FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut self.bytes[have..])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(socket, &mut parts, &mut control, flags);
        self.bytes.truncate(have + got.as_ref().map_or(0, |got| got.bytes));
        // More descriptors than there is room for were closed by the kernel; what a message lacks is its handler's matter.
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
                self.fds.truncate(VFIO_USER_FDS_MAX);
            }
        }
        match got {
            Ok(got) if got.bytes > 0 => Ok(true),
            Ok(_) if self.bytes.is_empty() => Err(WireError::Closed),
            Ok(_) => Err(WireError::Truncated),
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::INTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The sending end of a connection, for several threads.
#[derive(Debug, Default)]
pub struct Outbox {
    /// The end of a message whose start the kernel has taken.
    rest: Mutex<Vec<u8>>,
}

/// Why a message was not sent.
#[derive(Debug, PartialEq, Eq)]
pub enum SendError {
    /// There was no room until the deadline, and nothing of it was sent.
    Late,
    /// There was no room until the deadline for all of it.
    Partly,
    /// The connection is of no more use.
    Broken(Errno),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outbox {
    /// Sends a whole message, waiting for room until `deadline`.
    ///
    /// # Errors
    /// [`SendError`]. After `Partly` the rest goes out before the next message.
    pub fn send(
        &self,
        socket: BorrowedFd<'_>,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), SendError> {
        let mut taken = false;
        loop {
            let mut rest = lock(&self.rest);
            let sent = send_some(socket, &rest, &[])?;
            rest.drain(..sent);
            if rest.is_empty() && !taken {
                let sent = send_some(socket, message, fds)?;
                taken = sent > 0;
                if taken {
                    rest.extend_from_slice(&message[sent..]);
                }
            }
            if taken && rest.is_empty() {
                return Ok(());
            }
            drop(rest);
            if !ready(socket, PollFlags::OUT, Some(deadline)).map_err(SendError::Broken)? {
                return Err(if taken { SendError::Partly } else { SendError::Late });
            }
        }
    }
}

/// Hands bytes to the kernel, as many as it takes now.
fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, SendError> {
    if bytes.is_empty() {
        return Ok(0);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(VFIO_USER_FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(SendError::Broken(Errno::INVAL));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
        Ok(sent) => Ok(sent),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(errno) => Err(SendError::Broken(errno)),
    }
}

/// Waits until `fd` is ready, or has hung up; false at the deadline. Without one, until then.
///
/// # Errors
/// The kernel's.
pub fn ready(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    deadline: Option<Instant>,
) -> Result<bool, Errno> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

impl From<SendError> for io::Error {
    fn from(error: SendError) -> io::Error {
        match error {
            SendError::Late | SendError::Partly => io::ErrorKind::TimedOut.into(),
            SendError::Broken(errno) => errno.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    proptest! {
        /// However the bytes are cut, the same messages come out, and then the end.
        #[test]
        fn messages_are_whole_however_they_are_cut(
            lens in proptest::collection::vec(0usize..300, 1..6),
            cuts in proptest::collection::vec(1usize..64, 1..40)
        ) {
            let (mut a, b) = UnixStream::pair().unwrap();
            let mut bytes = Vec::new();
            for (id, len) in (0u16..).zip(&lens) {
                let header = Header { id, command: 9, payload_bytes: 0, flags: 1, errno: 0 };
                bytes.extend(header.message(&vec![id.to_le_bytes()[0]; *len]));
            }
            let mut reader = Reader::default();
            let mut got = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                a.write_all(now).unwrap();
                rest = later;
                while let Some(message) = reader.receive(&b).unwrap() {
                    got.push((message.header.id, message.payload));
                }
                if rest.is_empty() {
                    break;
                }
            }
            let expect: Vec<_> = (0u16..).zip(&lens).map(|(id, len)| (id, vec![id.to_le_bytes()[0]; *len])).collect();
            prop_assert_eq!(got, expect);
            drop(a);
            prop_assert!(matches!(reader.receive(&b), Err(WireError::Closed)));
        }

        /// Arbitrary bytes are messages or an error; never a panic, never a payload beyond the bound.
        #[test]
        fn garbage_is_messages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&bytes).unwrap();
            drop(a);
            let mut reader = Reader::default();
            let mut seen = 0;
            let end = loop {
                match reader.receive(&b) {
                    Ok(Some(message)) => seen += HEADER_BYTES + message.payload.len(),
                    Ok(None) => prop_assert!(false, "a closed socket never blocks"),
                    Err(error) => break error,
                }
            };
            prop_assert!(seen <= bytes.len());
            if matches!(end, WireError::Closed) {
                prop_assert_eq!(seen, bytes.len());
            }
        }
    }

    #[test]
    fn a_message_longer_than_the_socket_arrives_whole_beside_others() {
        let (a, b) = UnixStream::pair().unwrap();
        let outbox = Outbox::default();
        let header = |id| Header { id, command: 11, payload_bytes: 0, flags: 1, errno: 0 };
        std::thread::scope(|scope| {
            for id in 0..4u16 {
                let (outbox, a) = (&outbox, &a);
                scope.spawn(move || {
                    let payload = vec![id.to_le_bytes()[0]; VFIO_USER_PAYLOAD_BYTES_MAX];
                    let message = header(id).message(&payload);
                    outbox.send(a.as_fd(), &message, &[], soon()).unwrap();
                });
            }
            let mut reader = Reader::default();
            let mut got = Vec::new();
            while got.len() < 4 {
                ready(b.as_fd(), PollFlags::IN, Some(soon())).unwrap();
                while let Some(message) = reader.receive(&b).unwrap() {
                    let byte = message.header.id.to_le_bytes()[0];
                    assert!(message.payload.iter().all(|b| *b == byte));
                    assert_eq!(message.payload.len(), VFIO_USER_PAYLOAD_BYTES_MAX);
                    got.push(byte);
                }
            }
            got.sort_unstable();
            assert_eq!(got, [0, 1, 2, 3]);
        });
    }

    #[test]
    fn a_peer_that_reads_nothing_costs_the_deadline_and_no_more() {
        let (a, b) = UnixStream::pair().unwrap();
        let outbox = Outbox::default();
        let message = vec![0; VFIO_USER_PAYLOAD_BYTES_MAX];
        let until = || Instant::now() + Duration::from_millis(20);
        assert_eq!(outbox.send(a.as_fd(), &message, &[], until()), Err(SendError::Partly));
        assert_eq!(outbox.send(a.as_fd(), &message, &[], until()), Err(SendError::Late));
        drop(b);
        let sent = outbox.send(a.as_fd(), &message, &[], until());
        assert!(matches!(sent, Err(SendError::Broken(_))), "{sent:?}");
    }

    #[test]
    fn descriptors_beyond_the_bound_are_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let before = open_fds();
        let header = Header { id: 1, command: 5, payload_bytes: 0, flags: 1, errno: 0 };
        let message = header.message(&[0; 32]);
        let many = vec![a.as_fd(); VFIO_USER_FDS_MAX];
        // Twice the bound: with the header, and with the payload.
        assert_eq!(send_some(a.as_fd(), &message[..16], &many), Ok(16));
        assert_eq!(send_some(a.as_fd(), &message[16..], &many), Ok(32));
        let mut reader = Reader::default();
        let got = reader.receive(&b).unwrap().unwrap();
        assert_eq!(got.fds.len(), VFIO_USER_FDS_MAX);
        drop(got);
        // Other tests of this process open and close files, too; only what these messages brought would stay.
        let deadline = soon();
        while open_fds() > before && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(open_fds() <= before);
    }
}
