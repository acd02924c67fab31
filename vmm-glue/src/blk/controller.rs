//! A disk as its front-ends see it: one socket, any number of connections, one of them running at a time.
//!
//! In: readiness of the socket and its connections, events from reactors and the registry. Out: messages to reactors.
//! Owner: the control thread. **Invariant:** a front-end's rings start only when no ring of another front-end is on a
//! reactor, so requests of a predecessor can never be overtaken by its successor's.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ringmill_core::bdev::{Bdev, BdevEvent, Claim, Registry, RegistryError};
use ringmill_core::limits::CONTROLLER_QUEUES_MAX;
use ringmill_core::reactor::ReactorHandle;
use thiserror::Error;

use crate::vhost_user::{Completion, Peer, Refusal, Session};

use super::event::{Event, EventKind, EventSender};
use super::frontend::{FrontEnd, Shared, Turn};
use super::places::Places;
use super::{BlkDevice, QueueStatus, WorkerEvent};

mod view;

pub use view::{ControllerState, QueueView, SessionView, Source, SourceToken};

/// Connections to one socket: the running one, a migration's destination, a few that are about to hang up.
const SESSIONS_MAX: usize = 8;
/// Bytes of a Unix socket's path, without its final zero.
const SOCKET_PATH_MAX: usize = 107;
/// A request that a device has not answered for this long is reported.
const STUCK_NS: u64 = 30_000_000_000;

/// Why a controller could not be made.
#[derive(Debug, Error)]
pub enum ControllerError {
    /// The bdev cannot be had.
    #[error(transparent)]
    Bdev(#[from] RegistryError),
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The path is too long for a Unix socket.
    #[error(
        "{path} has {len} bytes, a Unix socket path has at most 107; use a shorter socket directory or name"
    )]
    PathTooLong {
        /// Where.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// Another program listens there.
    #[error("{path} is in use by another program; stop it or choose another name")]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{path} exists and is not a socket; remove it or choose another name")]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// A bad number of queues.
    #[error("{0} queues; a controller has 1 to {CONTROLLER_QUEUES_MAX}")]
    Queues(u16),
    /// It is being deleted.
    #[error("controller {0:?} is being deleted")]
    Leaving(String),
    /// It has fewer queues.
    #[error("controller {name:?} has no queue {queue}; its queues are 0 to {last}")]
    NoQueue {
        /// The controller.
        name: String,
        /// The one asked for.
        queue: u16,
        /// The last one there is.
        last: u16,
    },
    /// No reactors to serve it.
    #[error("no reactor may serve this controller; give it a cpumask with cores of this daemon")]
    NoReactors,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct ControllerSpec {
    /// Its name.
    pub name: String,
    /// The bdev to claim.
    pub bdev: String,
    /// Where front-ends connect.
    pub socket: PathBuf,
    /// Permissions of the socket.
    pub socket_mode: u32,
    /// Group of the socket.
    pub socket_group: Option<u32>,
    /// Refuse writes even where the bdev takes them.
    pub read_only: bool,
    /// The serial number; `None`: the bdev's name.
    pub serial: Option<String>,
    /// Queues on offer.
    pub queues_max: u16,
    /// Pin guests' memory, so that the kernel does not do it for every request.
    pub pin: bool,
}

struct Connected {
    session: Option<Session>,
    front: FrontEnd,
}

/// A virtio-blk disk on a socket.
pub struct Controller {
    spec: ControllerSpec,
    shared: Arc<Shared>,
    registry: Arc<Registry>,
    claim: Option<Claim>,
    bdev: Option<Arc<dyn Bdev>>,
    listener: Option<UnixListener>,
    sessions: BTreeMap<u64, Connected>,
    next_vid: u64,
    state: ControllerState,
    losing_bdev: bool,
    accept_paused: bool,
    /// Moves under way: their tickets, front-ends to go, and what went wrong first.
    moves: Vec<(u64, usize, Option<String>)>,
    moved: Vec<(u64, Result<(), String>)>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("name", &self.spec.name)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// Binds the socket under another name, gives it its owner and mode, then moves it into place: nobody can connect before
/// the permissions are right, and a dead socket is replaced in one step. A live one is left alone.
fn listen(spec: &ControllerSpec) -> Result<UnixListener, ControllerError> {
    let path = spec.socket.as_path();
    let error = |source| ControllerError::Socket { path: path.to_owned(), source };
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(ControllerError::PathTooLong { path: path.to_owned(), len });
    }
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(ControllerError::NotASocket { path: path.to_owned() });
        }
        if !is_dead(path).map_err(error)? {
            return Err(ControllerError::InUse { path: path.to_owned() });
        }
    }
    // No controller's name has a tilde, and this one is as long as the real one.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unborn = path.with_file_name(format!("~{}", name.get(1..).unwrap_or_default()));
    let _ = std::fs::remove_file(&unborn);
    let listener = UnixListener::bind(&unborn).map_err(error)?;
    let ready = || {
        listener.set_nonblocking(true)?;
        std::fs::set_permissions(&unborn, std::fs::Permissions::from_mode(spec.socket_mode))?;
        if let Some(group) = spec.socket_group {
            std::os::unix::fs::chown(&unborn, None, Some(group))?;
        }
        std::fs::rename(&unborn, path)
    };
    match ready() {
        Ok(()) => Ok(listener),
        Err(source) => {
            let _ = std::fs::remove_file(&unborn);
            Err(error(source))
        }
    }
}

/// True when nobody listens on a socket any more. Never blocks, however full the other side's queue is.
fn is_dead(path: &Path) -> io::Result<bool> {
    use rustix::io::Errno;
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(true),
        Ok(()) | Err(Errno::AGAIN) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

impl Controller {
    /// Claims the bdev, binds the socket and waits for front-ends. `number` names the controller in events.
    ///
    /// # Errors
    /// [`ControllerError`]; nothing is left behind.
    pub fn new(
        number: u64,
        spec: ControllerSpec,
        registry: &Arc<Registry>,
        reactors: Vec<ReactorHandle>,
        events: &EventSender,
    ) -> Result<Controller, ControllerError> {
        static SPREAD: AtomicUsize = AtomicUsize::new(0);
        Registry::check_name(&spec.name)?;
        if spec.queues_max == 0 || spec.queues_max > CONTROLLER_QUEUES_MAX {
            return Err(ControllerError::Queues(spec.queues_max));
        }
        let places = Places::new(reactors, SPREAD.fetch_add(1, Ordering::Relaxed))
            .ok_or(ControllerError::NoReactors)?;
        let sender = events.clone();
        let listener = Box::new(move |event| sender.send(number, EventKind::Bdev(event)));
        let (claim, bdev) = registry.claim(&spec.bdev, &spec.name, listener)?;
        let socket = match listen(&spec) {
            Ok(socket) => socket,
            Err(error) => {
                registry.release(claim);
                return Err(error);
            }
        };
        let serial = spec.serial.as_deref().unwrap_or(&spec.bdev);
        let statuses = (0..spec.queues_max).map(|_| OnceLock::new()).collect();
        let shared = Arc::new(Shared {
            number,
            name: spec.name.clone(),
            device: Arc::new(BlkDevice::new(&bdev, serial, spec.read_only)),
            queues_max: spec.queues_max,
            places: Mutex::new(places),
            statuses,
            pin: spec.pin,
            events: events.clone(),
        });
        Ok(Controller {
            spec,
            shared,
            registry: Arc::clone(registry),
            claim: Some(claim),
            bdev: Some(bdev),
            listener: Some(socket),
            sessions: BTreeMap::new(),
            next_vid: 0,
            state: ControllerState::Active,
            losing_bdev: false,
            accept_paused: false,
            moves: Vec::new(),
            moved: Vec::new(),
        })
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &ControllerSpec {
        &self.spec
    }

    /// Its number in events.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.shared.number
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> ControllerState {
        self.state
    }

    /// The disk.
    #[must_use]
    pub fn device(&self) -> &BlkDevice {
        &self.shared.device
    }

    /// The bdev below; `None` after it was removed.
    #[must_use]
    pub fn bdev(&self) -> Option<&Arc<dyn Bdev>> {
        self.bdev.as_ref()
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.spec.socket
    }

    /// The cores that serve it.
    #[must_use]
    pub fn cores(&self) -> Vec<u32> {
        self.shared.places().cores()
    }

    /// The figures of all queues that were ever started, with their numbers.
    pub fn queue_statuses(&self) -> impl Iterator<Item = (u16, &Arc<QueueStatus>)> {
        (0u16..)
            .zip(&self.shared.statuses)
            .filter_map(|(queue, status)| Some((queue, status.get()?)))
    }

    /// Records counters and latencies of requests from now on, or no more.
    pub fn set_recording(&self, recording: bool) {
        self.shared.device.set_recording(recording);
    }

    /// Connected front-ends.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionView> {
        self.sessions
            .iter()
            .map(|(&vid, connected)| {
                let session = connected.session.as_ref();
                let regions = session.map(|s| s.memory().regions()).unwrap_or_default();
                let queue = |(index, ring): (u16, &Option<Box<super::frontend::RunningRing>>)| {
                    let ring = ring.as_ref()?;
                    let reactor = ring.poller.as_ref().map(|(_, reactor)| reactor);
                    let owner = reactor.zip(self.bdev.as_ref()).map(|(r, bdev)| bdev.owner(r));
                    Some(QueueView {
                        index,
                        size: ring.size(),
                        core: reactor.and_then(ReactorHandle::core).map(|c| c.0),
                        device_core: owner.and_then(|o| o.core()).map(|c| c.0),
                        status: self.shared.status(index)?,
                        oldest_age_ns: ring.oldest_age_ns,
                        stuck_count: ring.stuck_count,
                    })
                };
                SessionView {
                    vid,
                    active: connected.front.is_active(),
                    features: connected.front.features(),
                    protocol_features: session.map_or(0, Session::protocol_features),
                    memory: (regions.len(), regions.iter().map(|r| r.len_bytes).sum()),
                    pin: connected.front.pin_view(),
                    queues: (0..).zip(&connected.front.rings).filter_map(queue).collect(),
                }
            })
            .collect()
    }

    /// The descriptors to poll now.
    pub fn sources(&self) -> impl Iterator<Item = Source<'_>> {
        let listener = self
            .listener
            .iter()
            .filter(|_| !self.accept_paused && self.sessions.len() < SESSIONS_MAX)
            .map(|l| Source {
                fd: l.as_fd(),
                readable: true,
                writable: false,
                token: SourceToken::Listener,
            });
        let sessions = self.sessions.iter().flat_map(|(&vid, connected)| {
            let session = connected.session.as_ref();
            let socket = session.map(|s| {
                let interest = s.interest();
                Source {
                    fd: s.as_fd(),
                    readable: interest.readable,
                    writable: interest.writable,
                    token: SourceToken::Session(vid),
                }
            });
            let channel = session.and_then(Session::channel_to_poll).map(|fd| Source {
                fd,
                readable: false,
                writable: true,
                token: SourceToken::Channel(vid),
            });
            socket.into_iter().chain(channel)
        });
        listener.chain(sessions)
    }

    /// A descriptor is ready.
    pub fn on_ready(&mut self, token: SourceToken, readable: bool, writable: bool, hung_up: bool) {
        match token {
            SourceToken::Listener => self.accept(),
            SourceToken::Channel(vid) => {
                if let Some(session) = self.sessions.get_mut(&vid).and_then(|c| c.session.as_mut())
                {
                    session.on_channel_writable();
                }
            }
            SourceToken::Session(vid) => self.on_session_ready(vid, readable, writable, hung_up),
        }
        self.settle();
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        while self.sessions.len() < SESSIONS_MAX {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // No descriptors left, most likely: the listener stays readable, so look away for a second.
                        tracing::warn!(controller = %self.spec.name, "cannot accept a front-end now: {error}");
                        self.accept_paused = true;
                    }
                    return;
                }
            };
            if let Err(error) = stream.set_nonblocking(true) {
                tracing::warn!(controller = %self.spec.name, "a front-end was refused: {error}");
                continue;
            }
            let vid = self.next_vid;
            self.next_vid += 1;
            let front = FrontEnd::new(vid, Arc::clone(&self.shared), self.bdev.clone());
            let session = Session::new(stream, &front);
            self.sessions.insert(vid, Connected { session: Some(session), front });
            tracing::info!(controller = %self.spec.name, session = vid, "front-end connected");
        }
    }

    fn on_session_ready(&mut self, vid: u64, readable: bool, writable: bool, hung_up: bool) {
        let Some(Connected { session: Some(session), front }) = self.sessions.get_mut(&vid) else {
            return;
        };
        let mut result = Ok(Peer::Connected);
        if writable {
            result = session.on_writable().map(|()| Peer::Connected);
        }
        if result.is_ok() && (readable || hung_up) {
            let interest = session.interest();
            result = if interest.readable {
                session.on_readable(front)
            } else if hung_up && !interest.writable {
                // It hung up while an operation is pending: nobody waits for the answer.
                Ok(Peer::Closed)
            } else {
                Ok(Peer::Connected)
            };
        }
        match result {
            Ok(Peer::Connected) => {}
            Ok(Peer::Closed) => {
                tracing::info!(controller = %self.spec.name, session = vid, "front-end disconnected");
                self.end_session(vid);
            }
            Err(error) => {
                tracing::warn!(controller = %self.spec.name, session = vid, "front-end sent away: {error}");
                self.end_session(vid);
            }
        }
    }

    /// Closes the connection and lets the front-end's rings drain.
    fn end_session(&mut self, vid: u64) {
        if let Some(connected) = self.sessions.get_mut(&vid) {
            connected.session = None;
            connected.front.close();
        }
    }

    /// News from a reactor or the registry.
    pub fn on_event(&mut self, event: Event) {
        match event.kind {
            EventKind::Step { vid, operation, index, base, leftover } => {
                drop(leftover);
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.step(operation, index, base);
                }
            }
            EventKind::Taken { vid, operation, index, poller } => {
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.taken(operation, index, poller);
                }
            }
            EventKind::Placed { vid, operation, index, refused } => {
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.placed(operation, index, refused);
                }
            }
            EventKind::Worker { vid, index, event: WorkerEvent::Broken(error) } => {
                tracing::warn!(
                    controller = %self.spec.name, session = vid, queue = index,
                    "the guest's driver broke the queue, which has stopped: {error}"
                );
                if let Some(connected) = self.sessions.get(&vid) {
                    connected.front.signal_error(index);
                }
            }
            EventKind::Worker { vid, index, event: WorkerEvent::NoNotifications(error) } => {
                tracing::error!(
                    controller = %self.spec.name, session = vid, queue = index, "the queue cannot run: {error}"
                );
            }
            EventKind::Worker { vid, index, event: WorkerEvent::NoChannel(error) } => {
                tracing::error!(
                    controller = %self.spec.name, session = vid, queue = index, "every request will fail: {error}"
                );
            }
            EventKind::Worker { vid, event: WorkerEvent::Unpinned(error), .. } => {
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.cannot_pin(error.to_string());
                }
            }
            EventKind::Pinned { vid, result } => {
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.on_pinned(result);
                }
            }
            EventKind::Mapped { vid, operation, result } => {
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.on_mapped(operation, result);
                }
            }
            EventKind::Unmapped { vid, operation } => {
                if let Some(connected) = self.sessions.get_mut(&vid) {
                    connected.front.on_unmapped(operation);
                }
            }
            EventKind::Leftover(leftover) => drop(leftover),
            EventKind::Age { vid, index, age_ns } => self.on_age(vid, index, age_ns),
            EventKind::Bdev(BdevEvent::Resized { blocks_count }) => {
                tracing::info!(controller = %self.spec.name, blocks_count, "resized");
                for connected in self.sessions.values_mut() {
                    if let Some(session) = &mut connected.session {
                        session.config_changed();
                    }
                }
            }
            EventKind::Bdev(BdevEvent::Removing) => {
                self.losing_bdev = true;
                self.bdev = None;
                for connected in self.sessions.values_mut() {
                    connected.front.lose_bdev();
                }
            }
        }
        self.settle();
    }

    fn on_age(&mut self, vid: u64, index: u16, age_ns: Option<u64>) {
        let Some(connected) = self.sessions.get_mut(&vid) else { return };
        let Some(Some(ring)) = connected.front.rings.get_mut(usize::from(index)) else { return };
        let was_stuck = ring.oldest_age_ns.is_some_and(|age| age > STUCK_NS);
        ring.oldest_age_ns = age_ns;
        if age_ns.is_some_and(|age| age > STUCK_NS) && !was_stuck {
            ring.stuck_count += 1;
            tracing::warn!(
                controller = %self.spec.name, queue = index,
                "a request has been with {} for more than 30 s; the guest waits", self.spec.bdev
            );
        }
    }

    /// Looks for requests that a device does not give back, and for front-ends that took their memory away; call
    /// about once a second.
    pub fn check_ages(&mut self) {
        let mut cut = Vec::new();
        self.accept_paused = false;
        for (&vid, connected) in &mut self.sessions {
            connected.front.ask_ages();
            connected.front.recall_late();
            if connected.session.is_some() && connected.front.has_lost_memory() {
                cut.push(vid);
            }
        }
        for &vid in &cut {
            tracing::warn!(
                controller = %self.spec.name, session = vid,
                "front-end sent away: it cut the file of memory that it shares, so its requests are void"
            );
            self.end_session(vid);
        }
        // Also delivers messages that a full mailbox did not take.
        self.settle();
    }

    /// Begins to delete the controller: nobody can connect any more, everybody connected is sent away.
    pub fn begin_delete(&mut self) {
        if self.state == ControllerState::Active {
            self.state = ControllerState::Draining;
            self.listener = None;
            if let Err(error) = std::fs::remove_file(&self.spec.socket) {
                tracing::warn!(controller = %self.spec.name, "cannot remove {}: {error}", self.spec.socket.display());
            }
            let vids: Vec<u64> = self.sessions.keys().copied().collect();
            vids.into_iter().for_each(|vid| self.end_session(vid));
            self.settle();
        }
    }

    /// Takes every front-end as far as it goes, then hands the right to run to the next one.
    fn settle(&mut self) {
        loop {
            let mut gone = Vec::new();
            let vids: Vec<u64> = self.sessions.keys().copied().collect();
            for &vid in &vids {
                self.settle_one(vid, &mut gone);
            }
            for vid in gone {
                self.sessions.remove(&vid);
            }
            if !self.hand_over() {
                break;
            }
        }
        let all_lost = self.losing_bdev && self.sessions.values().all(|c| c.front.has_lost_bdev());
        if self.state == ControllerState::Draining && self.sessions.is_empty() {
            self.bdev = None;
            self.release();
            self.state = ControllerState::Deleted;
        } else if all_lost {
            self.losing_bdev = false;
            self.release();
        }
    }

    fn release(&mut self) {
        if let Some(claim) = self.claim.take() {
            // Dropping a bdev that was waiting for its removal closes the device here, on the control thread.
            drop(self.registry.release(claim));
        }
    }

    fn settle_one(&mut self, vid: u64, gone: &mut Vec<u64>) {
        loop {
            let Some(connected) = self.sessions.get_mut(&vid) else { return };
            match connected.front.advance() {
                Turn::Nothing => return,
                Turn::BdevLost => {}
                Turn::Moved(ticket, problem) => self.note_moved(ticket, problem),
                Turn::Closed => {
                    for ticket in connected.front.unfinished_moves() {
                        self.note_moved(ticket, None);
                    }
                    gone.push(vid);
                    return;
                }
                Turn::Complete(completion) => self.complete(vid, Ok(completion)),
                Turn::Refuse(reason) => self.complete(vid, Err(reason.into())),
                Turn::SendAway(reason) => {
                    tracing::warn!(controller = %self.spec.name, session = vid, "front-end sent away: {reason}");
                    self.end_session(vid);
                }
            }
        }
    }

    /// Answers a front-end's message, if it is still there.
    fn complete(&mut self, vid: u64, result: Result<Completion, Refusal>) {
        let Some(connected) = self.sessions.get_mut(&vid) else { return };
        let Connected { session: Some(session), front } = connected else { return };
        if let Err(error) = session.complete(front, result) {
            tracing::warn!(controller = %self.spec.name, session = vid, "front-end sent away: {error}");
            self.end_session(vid);
        }
    }

    /// Lets one of `reactors` serve each queue, or only `queue`, from now on; queues that run move there without their
    /// guest's noticing. [`Controller::take_moved`] tells when, by `ticket`.
    ///
    /// # Errors
    /// No reactors, no such queue, or the controller is being deleted; nothing has changed then.
    pub fn place(
        &mut self,
        ticket: u64,
        reactors: Vec<ReactorHandle>,
        queue: Option<u16>,
    ) -> Result<(), ControllerError> {
        let name = || self.spec.name.clone();
        if self.state != ControllerState::Active {
            return Err(ControllerError::Leaving(name()));
        }
        if let Some(queue) = queue.filter(|&queue| queue >= self.shared.queues_max) {
            let last = self.shared.queues_max - 1;
            return Err(ControllerError::NoQueue { name: name(), queue, last });
        }
        if reactors.is_empty() {
            return Err(ControllerError::NoReactors);
        }
        match queue {
            None => self.shared.places().set_common(reactors),
            Some(queue) => self.shared.places().set_own(queue, reactors),
        }
        let mut waiting = 0;
        for connected in self.sessions.values_mut().filter(|c| c.front.has_rings()) {
            connected.front.relocate(ticket, queue);
            waiting += 1;
        }
        if waiting == 0 {
            self.moved.push((ticket, Ok(())));
        } else {
            self.moves.push((ticket, waiting, None));
        }
        self.settle();
        Ok(())
    }

    /// The moves that are over, and what went wrong with them.
    pub fn take_moved(&mut self) -> Vec<(u64, Result<(), String>)> {
        std::mem::take(&mut self.moved)
    }

    /// A front-end has moved its queues as far as they could be.
    fn note_moved(&mut self, ticket: u64, problem: Option<String>) {
        let Some(at) = self.moves.iter().position(|(t, ..)| *t == ticket) else { return };
        let (_, waiting, first) = &mut self.moves[at];
        *waiting -= 1;
        *first = first.take().or(problem);
        if *waiting == 0 {
            let (ticket, _, problem) = self.moves.remove(at);
            self.moved.push((ticket, problem.map_or(Ok(()), Err)));
        }
    }

    /// One front-end's rings run at a time; the oldest one that wants to is next. True when an operation is to be begun.
    fn hand_over(&mut self) -> bool {
        if let Some(running) = self.sessions.values_mut().find(|c| c.front.is_active()) {
            if running.front.is_busy() || running.front.has_rings() {
                return false;
            }
            running.front.deactivate();
        }
        let wants = |c: &Connected| c.session.is_some() && c.front.has_rings();
        let Some(next) = self.sessions.iter().find(|(_, c)| wants(c)).map(|(&vid, _)| vid) else {
            return false;
        };
        // A guest's memory that a device reaches is pinned: that of one at a time.
        let (mut waits, mut begins) = (false, false);
        for (_, other) in self.sessions.iter_mut().filter(|(vid, _)| **vid != next) {
            if other.front.holds_memory() {
                waits = true;
                begins |= other.front.let_go();
            }
        }
        match self.sessions.get_mut(&next) {
            Some(next) if !waits => next.front.activate(),
            _ => begins,
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if self.listener.take().is_some() {
            // The daemon ends: leave no dead socket behind. Failure would only leave a stale file.
            let _ = std::fs::remove_file(&self.spec.socket);
        }
    }
}
