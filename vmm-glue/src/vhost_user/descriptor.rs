//! Checks on the file descriptors that a front-end hands over.
//!
//! In: a descriptor of any kind, from a hostile sender. Out: one that is safe to use on a thread that must not block.
//! Owner: the control thread.
//!
//! **Invariant:** no check here can itself block: a descriptor may belong to a file system that its sender implements.
//!
//! Spec: vhost-user protocol, "Communication" (ancillary data), "VHOST_USER_SET_VRING_KICK".

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
use rustix::net::{AddressFamily, SocketType};

use super::error::Error;
use super::message::Request;

/// A descriptor that both the session (for a later hand-over) and the device hold.
pub type SharedFd = Arc<OwnedFd>;

/// Accepts an eventfd as a kick, call or error descriptor and makes it non-blocking.
///
/// A reactor writes to it and reads from it. A regular file could block it for ever: its file system may be one that
/// the front-end implements, where O_NONBLOCK means nothing. O_NONBLOCK is shared with the front-end, which could
/// clear it again and fill the counter: whoever writes must do so through an interface that cannot block.
pub(super) fn accept_eventfd(request: Request, fd: OwnedFd) -> Result<SharedFd, Error> {
    let state_unknown =
        |errno: rustix::io::Errno| Error::FdState { request, source: io::Error::from(errno) };
    // STATX_DONT_SYNC: the answer comes from the kernel's cache, never from a file server.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat =
        rustix::fs::statx(fd.as_fd(), c"", flags, StatxFlags::TYPE).map_err(state_unknown)?;
    // Eventfds live on the kernel's anonymous inode, which alone has no file type at all.
    if FileType::from_raw_mode(u32::from(stat.stx_mode)) != FileType::Unknown {
        return Err(Error::NotAnEventFd { request });
    }
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(state_unknown)?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(state_unknown)?;
    }
    Ok(Arc::new(fd))
}

/// Accepts a Unix stream socket as the way for requests to the front-end.
pub(super) fn accept_stream_socket(request: Request, fd: OwnedFd) -> Result<OwnedFd, Error> {
    let is_stream = || -> rustix::io::Result<bool> {
        Ok(rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::UNIX
            && rustix::net::sockopt::socket_type(&fd)? == SocketType::STREAM)
    };
    match is_stream() {
        Ok(true) => Ok(fd),
        Ok(false) | Err(_) => Err(Error::NotAStreamSocket { request }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn an_eventfd_is_accepted_and_made_non_blocking() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let fd = accept_eventfd(Request::SetVringKick, fd).unwrap();
        assert!(rustix::fs::fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn other_kinds_of_files_are_not_eventfds() {
        let (pipe, _write_end) = rustix::pipe::pipe().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        for fd in [pipe, socket.into(), file.into()] {
            let error = accept_eventfd(Request::SetVringCall, fd).unwrap_err();
            assert!(matches!(error, Error::NotAnEventFd { request: Request::SetVringCall }));
        }
    }

    #[test]
    fn only_a_unix_stream_socket_carries_requests_to_the_front_end() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        accept_stream_socket(Request::SetBackendReqFd, socket.into()).unwrap();
        let (datagram, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for fd in [datagram.into(), udp.into(), tempfile::tempfile().unwrap().into()] {
            accept_stream_socket(Request::SetBackendReqFd, fd).unwrap_err();
        }
    }
}
