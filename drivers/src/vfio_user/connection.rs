//! One connection to a vfio-user server: questions with bounded waits, and a thread that reads what comes back.
//!
//! Flow: any thread calls [`Connection::call`]; the connection's own thread receives, gives replies to who asked (by
//! message id) and answers the server's own commands from the memory that it was given. Owner: shared by the backing, its
//! registers and its domain. **Invariants:** every call ends by its deadline. A server that breaks the protocol, or does not
//! answer in time, is cut off once and for all: the socket is shut down and everybody is told [`CallError::Gone`]. An id is
//! not used again before its answer has come. Commands for memory may take long, and whoever asks meanwhile waits behind
//! them, because a server answers one after the other.
//!
//! Spec: vfio-user 0.9, "Command Concurrency", "Header", `VFIO_USER_VERSION`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringmill_core::limits::VFIO_USER_CALLS_MAX;
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::net::Shutdown;
use thiserror::Error;

use super::Patience;
use super::memory::DeviceMemory;
use super::protocol::{Fields, Header, ProtocolError, command, flags};
use super::wire::{Message, Outbox, Reader, SendError, WireError, ready};
use crate::pci::{CancelToken, Ended, PciError};

/// Why a command has no answer.
#[derive(Debug, Error)]
pub(super) enum CallError {
    /// The server is gone, or was cut off.
    #[error("the server is gone")]
    Gone,
    /// No answer yet; one that comes later is dropped.
    #[error("no answer in time")]
    Late,
    /// The server says no.
    #[error("{0}")]
    Refused(io::Error),
}

impl CallError {
    /// In the words of the seam.
    pub(super) fn at(self, device: &str, what: &str) -> PciError {
        let device = device.to_owned();
        match self {
            CallError::Gone => PciError::Gone { device },
            CallError::Late => PciError::Io {
                device,
                what: what.to_owned(),
                source: io::ErrorKind::TimedOut.into(),
            },
            CallError::Refused(source) => PciError::Io { device, what: what.to_owned(), source },
        }
    }
}

/// Where the answer to an id is.
#[derive(Debug)]
enum Slot {
    Asked {
        command: u16,
    },
    Answered(Message),
    /// Nobody waits; `late`: any more.
    Abandoned {
        command: u16,
        late: bool,
    },
}

impl Slot {
    fn waits_for(&self, answered: u16) -> bool {
        matches!(self, Slot::Asked { command } if *command == answered)
    }
}

#[derive(Debug, Default)]
struct Calls {
    next_id: u16,
    slots: BTreeMap<u16, Slot>,
    /// Commands for memory without an answer, and when the last of them was answered, or has to be.
    long_count: usize,
    long_end: Option<Instant>,
    /// Since when somebody waits for the end of the connection: nobody waits long any more.
    hurried: Option<Instant>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    name: String,
    socket: OwnedFd,
    outbox: Outbox,
    calls: Mutex<Calls>,
    answered: Condvar,
    gone: AtomicBool,
    /// Readable once it is gone.
    gone_fd: OwnedFd,
    memory: DeviceMemory,
    /// What a server may take for an answer, and what for one about memory.
    patience: Duration,
    long_patience: Duration,
    /// Of the attempt to bring the device up.
    token: CancelToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Takes over a connected socket and starts its thread.
    ///
    /// # Errors
    /// No descriptor, or no thread.
    pub(super) fn start(
        name: &str,
        socket: OwnedFd,
        patience: Patience,
        token: &CancelToken,
    ) -> io::Result<Arc<Connection>> {
        let connection = Arc::new(Connection {
            name: name.to_owned(),
            socket,
            outbox: Outbox::default(),
            calls: Mutex::default(),
            answered: Condvar::new(),
            gone: AtomicBool::new(false),
            gone_fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            memory: DeviceMemory::default(),
            patience: patience.answer,
            long_patience: patience.memory,
            token: token.clone(),
        });
        let reader = Arc::clone(&connection);
        std::thread::Builder::new()
            .name("vfio-user".to_owned())
            .spawn(move || reader.receive_all())?;
        Ok(connection)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The memory that the server was given.
    pub(super) fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Readable once the connection is gone.
    pub(super) fn gone_fd(&self) -> BorrowedFd<'_> {
        self.gone_fd.as_fd()
    }

    /// Asks and waits as long as a server may take; who takes longer is cut off.
    ///
    /// # Errors
    /// [`CallError`], never `Late`.
    pub(super) fn call(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, CallError> {
        let asked = Instant::now();
        let deadline = |calls: &Calls| {
            let behind = calls.long_end.unwrap_or(asked).clamp(asked, asked + self.long_patience);
            self.hurry(calls, asked, behind + self.patience)
        };
        self.call_while(command, payload, fds, deadline)
    }

    /// The same for a command after which a server may have to pin gigabytes, or to wait for its own requests.
    ///
    /// # Errors
    /// As for [`Connection::call`].
    pub(super) fn call_for_memory(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, CallError> {
        let asked = Instant::now();
        let deadline = asked + self.long_patience;
        {
            let mut calls = lock(&self.calls);
            calls.long_count += 1;
            calls.long_end = calls.long_end.max(Some(deadline));
        }
        let deadline = |calls: &Calls| self.hurry(calls, asked, deadline);
        let answer = self.call_while(command, payload, fds, deadline);
        let mut calls = lock(&self.calls);
        calls.long_count -= 1;
        if calls.long_count == 0 {
            calls.long_end = Some(Instant::now());
            // Whoever waited behind it waits for less now.
            self.answered.notify_all();
        }
        answer
    }

    /// The deadline, or an earlier one where somebody waits for the end.
    fn hurry(&self, calls: &Calls, asked: Instant, deadline: Instant) -> Instant {
        calls.hurried.map_or(deadline, |since| deadline.min(since.max(asked) + self.patience))
    }

    /// From now on every answer has the time of an ordinary one.
    pub(super) fn hurry_up(&self) {
        lock(&self.calls).hurried.get_or_insert_with(Instant::now);
        self.answered.notify_all();
    }

    /// The same with a deadline of the caller's.
    ///
    /// # Errors
    /// As for [`Connection::call`].
    pub(super) fn call_until(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<Message, CallError> {
        self.call_while(command, payload, fds, |_| deadline)
    }

    fn call_while(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: impl Fn(&Calls) -> Instant,
    ) -> Result<Message, CallError> {
        let answer = self.try_call_while(command, payload, fds, deadline);
        if matches!(answer, Err(CallError::Late)) {
            self.cut_off(&format!("it did not answer command {command} in time"));
            return Err(CallError::Gone);
        }
        answer
    }

    /// Asks and waits until `deadline`; who takes longer is asked no more, but may answer later.
    ///
    /// # Errors
    /// [`CallError`].
    pub(super) fn try_call(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<Message, CallError> {
        self.try_call_while(command, payload, fds, |_| deadline)
    }

    /// `deadline` is asked again whenever it has come.
    fn try_call_while(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: impl Fn(&Calls) -> Instant,
    ) -> Result<Message, CallError> {
        self.check_token()?;
        let at_first = deadline(&lock(&self.calls));
        let id = self.ask(command, payload, fds, at_first)?;
        let mut calls = lock(&self.calls);
        loop {
            let deadline = deadline(&calls);
            match calls.slots.get_mut(&id) {
                Some(Slot::Answered(_)) => break,
                _ if self.is_gone() => {
                    calls.slots.remove(&id);
                    return Err(CallError::Gone);
                }
                Some(slot) if Instant::now() >= deadline => {
                    *slot = Slot::Abandoned { command, late: true };
                    return Err(CallError::Late);
                }
                Some(slot) if self.token.ended().is_some() => {
                    *slot = Slot::Abandoned { command, late: true };
                    drop(calls);
                    self.check_token()?;
                    return Err(CallError::Gone);
                }
                _ => {}
            }
            let left = self.token.slice(deadline.saturating_duration_since(Instant::now()));
            calls =
                self.answered.wait_timeout(calls, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let Some(Slot::Answered(message)) = calls.slots.remove(&id) else {
            return Err(CallError::Gone);
        };
        drop(calls);
        if message.header.flags & flags::ERROR == 0 {
            return Ok(message);
        }
        let errno = i32::try_from(message.header.errno).unwrap_or(0);
        Err(CallError::Refused(if errno == 0 {
            io::Error::other("the server refuses and does not say why")
        } else {
            io::Error::from_raw_os_error(errno)
        }))
    }

    /// Cuts the server off when nobody waits for the device any more.
    fn check_token(&self) -> Result<(), CallError> {
        match self.token.ended() {
            None => return Ok(()),
            Some(Ended::Late) => self.cut_off("attaching its device took too long"),
            Some(Ended::Cancelled) => self.cut_off("attaching its device was cancelled"),
        }
        Err(CallError::Gone)
    }

    /// Asks; the answer is dropped when it comes.
    ///
    /// # Errors
    /// As for [`Connection::try_call`].
    pub(super) fn tell(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), CallError> {
        let id = self.ask(command, payload, fds, deadline)?;
        let mut calls = lock(&self.calls);
        match calls.slots.get_mut(&id) {
            Some(Slot::Answered(_)) => drop(calls.slots.remove(&id)),
            Some(slot) => *slot = Slot::Abandoned { command, late: false },
            None => {}
        }
        Ok(())
    }

    /// True while an answer is missing that somebody gave up waiting for.
    pub(super) fn lags(&self) -> bool {
        lock(&self.calls)
            .slots
            .values()
            .any(|slot| matches!(slot, Slot::Abandoned { late: true, .. }))
    }

    /// Takes an id and sends.
    fn ask(
        &self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<u16, CallError> {
        let id = {
            let mut calls = lock(&self.calls);
            if self.is_gone() {
                return Err(CallError::Gone);
            }
            if calls.slots.len() >= VFIO_USER_CALLS_MAX {
                return Err(CallError::Late);
            }
            while calls.slots.contains_key(&calls.next_id) {
                calls.next_id = calls.next_id.wrapping_add(1);
            }
            let id = calls.next_id;
            calls.next_id = id.wrapping_add(1);
            calls.slots.insert(id, Slot::Asked { command });
            id
        };
        let header = Header { id, command, payload_bytes: payload.len(), flags: 0, errno: 0 };
        match self.outbox.send(self.socket.as_fd(), &header.message(payload), fds, deadline) {
            Ok(()) | Err(SendError::Partly) => Ok(id),
            Err(SendError::Late) => {
                lock(&self.calls).slots.remove(&id);
                Err(CallError::Late)
            }
            Err(SendError::Broken(errno)) => {
                lock(&self.calls).slots.remove(&id);
                self.cut_off(&format!("sending fails: {errno}"));
                Err(CallError::Gone)
            }
        }
    }

    /// Ends the connection because of what the server did.
    pub(super) fn cut_off(&self, why: &str) {
        if self.end() {
            tracing::warn!("{}: the vfio-user server is cut off: {why}", self.name);
        }
    }

    /// Ends the connection; true for the first who does.
    pub(super) fn end(&self) -> bool {
        let first = {
            let _calls = lock(&self.calls);
            !self.gone.swap(true, Ordering::AcqRel)
        };
        if first {
            // Neither can fail in a way that matters: the socket may be gone already, the counter is at most 1.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
            let _ = rustix::io::write(&self.gone_fd, &1u64.to_ne_bytes());
            self.answered.notify_all();
            self.memory.clear();
        }
        first
    }

    /// The thread.
    fn receive_all(&self) {
        let mut reader = Reader::default();
        loop {
            match reader.receive(&self.socket) {
                Ok(Some(message)) => {
                    if let Err(error) = self.received(message) {
                        return self.cut_off(&format!("it sent {error}"));
                    }
                }
                Ok(None) if self.is_gone() => return,
                Ok(None) => {
                    if let Err(errno) = ready(self.socket.as_fd(), PollFlags::IN, None) {
                        return self.cut_off(&errno.to_string());
                    }
                }
                Err(WireError::Closed) => return self.cut_off("it has closed the connection"),
                Err(error) => return self.cut_off(&error.to_string()),
            }
        }
    }

    fn received(&self, message: Message) -> Result<(), ProtocolError> {
        let Header { id, command, .. } = message.header;
        if !message.header.is_reply() {
            self.serve(&message);
            return Ok(());
        }
        let mut calls = lock(&self.calls);
        match calls.slots.get_mut(&id) {
            Some(slot) if slot.waits_for(command) => {
                *slot = Slot::Answered(message);
                self.answered.notify_all();
            }
            Some(Slot::Abandoned { command: asked, .. }) if *asked == command => {
                calls.slots.remove(&id);
            }
            _ => return Err(ProtocolError::Unasked { id, command }),
        }
        Ok(())
    }

    /// Answers a command of the server's.
    fn serve(&self, message: &Message) {
        let Header { id, command, flags: bits, .. } = message.header;
        let answer = match command {
            command::DMA_READ => self.memory.read(Fields::new(command, &message.payload)),
            command::DMA_WRITE => self.memory.write(Fields::new(command, &message.payload)),
            _ => Err(rustix::io::Errno::OPNOTSUPP),
        };
        if bits & flags::NO_REPLY != 0 {
            return;
        }
        let (payload, bits, errno) = match answer {
            Ok(payload) => (payload, flags::REPLY, 0),
            Err(errno) => (Vec::new(), flags::REPLY | flags::ERROR, errno.raw_os_error()),
        };
        let errno = u32::try_from(errno).unwrap_or(0);
        let reply = Header { id, command, payload_bytes: payload.len(), flags: bits, errno };
        let deadline = Instant::now() + self.patience;
        let sent = self.outbox.send(self.socket.as_fd(), &reply.message(&payload), &[], deadline);
        if let Err(error) = sent {
            self.cut_off(&format!("it does not take answers: {}", io::Error::from(error)));
        }
    }
}
