//! The reverse direction: what the back-end tells the front-end unasked (SET_BACKEND_REQ_FD).
//!
//! In: "the configuration has changed". Out: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG on the socket that the front-end gave.
//! Owner: the control thread, which polls the socket for room while [`BackendChannel::wants_write`].
//!
//! **Invariants:** never asks for a reply: QEMU calls GET_CONFIG before it would answer, and both would wait for ever.
//! Therefore nothing is ever read here. At most one message is on its way and one more is owed: changes that a slow
//! front-end has not been told yet merge, since it reads the newest configuration anyway.
//!
//! Spec: vhost-user protocol, "Back-end communication", "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG".

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::message::{BACKEND_CONFIG_CHANGE, HEADER_BYTES, Header};

/// The socket for requests to the front-end, and what is owed on it. Plain data, so that it can be handed over.
#[derive(Debug)]
pub struct BackendChannel {
    /// A connected Unix stream socket.
    pub socket: OwnedFd,
    /// Bytes of the current message that were sent; `None` when no message is under way.
    pub sent_bytes: Option<usize>,
    /// Whether the configuration changed again after the current message had begun to be sent.
    pub again: bool,
}

impl BackendChannel {
    /// A channel on a connected Unix stream socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, sent_bytes: None, again: false }
    }

    /// Tells the front-end that the configuration space has changed, now or as soon as its socket has room.
    ///
    /// An error means that the front-end has closed this channel; the session itself may go on.
    pub fn config_changed(&mut self) -> io::Result<()> {
        match self.sent_bytes {
            // Not a byte is out: the waiting message will announce this change as well.
            Some(0) => {}
            Some(_) => self.again = true,
            None => self.sent_bytes = Some(0),
        }
        self.flush()
    }

    /// Whether a message waits for room in the socket.
    pub fn wants_write(&self) -> bool {
        self.sent_bytes.is_some()
    }

    /// Sends what is owed until all is gone or the socket is full. Never blocks.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        Header::request(BACKEND_CONFIG_CHANGE, false, 0).encode_into(&mut bytes);
        while let Some(sent_bytes) = self.sent_bytes {
            let rest = bytes.get(sent_bytes..).unwrap_or_default();
            match send(&self.socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(chunk_bytes) if chunk_bytes < rest.len() => {
                    self.sent_bytes = Some(sent_bytes + chunk_bytes);
                }
                Ok(_) => self.sent_bytes = std::mem::take(&mut self.again).then_some(0),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for BackendChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (BackendChannel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (BackendChannel::new(ours.into()), theirs)
    }

    fn drain(socket: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = socket.read_to_end(&mut bytes);
        bytes
    }

    #[test]
    fn a_change_is_one_header_that_asks_for_no_reply() {
        let (mut channel, mut peer) = pair();
        channel.config_changed().unwrap();
        assert!(!channel.wants_write());
        let bytes = drain(&mut peer);
        let header = Header::decode(bytes.as_slice().try_into().unwrap());
        assert_eq!(header, Header { request: 2, flags: 1, payload_bytes: 0 });
    }

    #[test]
    fn changes_merge_while_the_socket_is_full() {
        let (mut channel, mut peer) = pair();
        let mut before = 0;
        while !channel.wants_write() {
            channel.config_changed().unwrap();
            before += 1;
            assert!(before < 1_000_000, "the socket never fills");
        }
        for _ in 0..100 {
            channel.config_changed().unwrap();
        }
        assert_eq!(drain(&mut peer).len(), (before - 1) * HEADER_BYTES);
        channel.flush().unwrap();
        assert!(!channel.wants_write());
        assert_eq!(drain(&mut peer).len(), HEADER_BYTES);
    }

    #[test]
    fn a_change_after_half_a_message_is_sent_once_more() {
        let (mut channel, mut peer) = pair();
        channel.sent_bytes = Some(5);
        channel.config_changed().unwrap();
        assert_eq!(drain(&mut peer).len(), HEADER_BYTES - 5 + HEADER_BYTES);
    }

    #[test]
    fn a_closed_channel_is_an_error_and_no_signal() {
        let (mut channel, peer) = pair();
        drop(peer);
        assert_eq!(channel.config_changed().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
