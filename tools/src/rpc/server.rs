//! The RPC server: connections in and out of somebody else's poll loop.
//!
//! The control thread polls [`RpcServer::fds`] together with its other files, hands readiness to
//! [`RpcServer::ready`] and calls [`RpcServer::turn`] once per round. Requests go to a [`Methods`]; a method that
//! must wait answers [`Reply::Deferred`] and its result comes later through [`RpcServer::complete`].
//!
//! Invariants: no call blocks; no client can take more than its limits below or hold up another; nothing a client
//! sends ends the daemon.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rustix::event::PollFlags;
use serde_json::{Map, Value};

use super::{
    conn::{Conn, ReplySlot},
    error::RpcError,
    scan::Scan,
    socket::{LockedSocket, SocketAccess, SocketError},
    wire::{self, Message, Parsed},
};

/// Clients at the same time.
pub const CONNECTIONS_MAX: usize = 64;
/// Refused clients that are being told so, at the same time; more are closed without a word.
const REFUSALS_MAX: usize = 16;
/// Longest request, in bytes.
pub const REQUEST_BYTES_MAX: usize = 256 * 1024;
/// Deepest nesting of a request.
pub const NESTING_MAX: usize = 32;
/// Output at which a client's requests are no longer read.
pub const OUTPUT_BYTES_SOFT: usize = 256 * 1024;
/// Output at which a client is dropped: only many large deferred replies get here.
pub const OUTPUT_BYTES_HARD: usize = 64 * 1024 * 1024;
/// Deferred requests of one client at which no more are read.
pub const INFLIGHT_MAX: usize = 64;
/// A client that takes none of its replies for this long is dropped.
pub const STALL_MAX: Duration = Duration::from_secs(60);
/// How long a closing connection waits for the client to read and close.
pub const LINGER: Duration = Duration::from_secs(2);
/// Requests of one client per turn, so that others get theirs.
const REQUESTS_PER_TURN: usize = 64;
/// Pause after accept(2) ran out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

const LISTENER_KEY: u64 = 0;

/// Names one request whose answer comes later. Unique within the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(u64);

impl Token {
    /// A token that was never used before.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What a method that did not fail answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The result.
    Now(Value),
    /// The result comes through [`RpcServer::complete`] with the request's token.
    Deferred,
}

/// Executes requests.
pub trait Methods {
    /// Executes one request. `token` matters only if the answer is [`Reply::Deferred`].
    fn call(
        &mut self,
        method: &str,
        params: Map<String, Value>,
        token: Token,
    ) -> Result<Reply, RpcError>;
}

#[derive(Debug)]
struct Waiting {
    conn: u64,
    slot: ReplySlot,
}

/// See the module's head.
#[derive(Debug)]
pub struct RpcServer {
    socket: LockedSocket,
    conns: BTreeMap<u64, Conn>,
    refused: BTreeMap<u64, Conn>,
    key_next: u64,
    waiting: HashMap<Token, Waiting>,
    accept_after: Option<Instant>,
}

impl RpcServer {
    /// Binds the socket at `path`; fails in words if somebody else serves it or the path cannot be used.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Self, SocketError> {
        Ok(Self {
            socket: LockedSocket::bind(path, access)?,
            conns: BTreeMap::new(),
            refused: BTreeMap::new(),
            key_next: LISTENER_KEY + 1,
            waiting: HashMap::new(),
            accept_after: None,
        })
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// The files to poll: a key for [`Self::ready`], the file, the events. Valid for one round.
    pub fn fds(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, PollFlags)> {
        let listener = self
            .accept_after
            .is_none()
            .then(|| (LISTENER_KEY, self.socket.listener.as_fd(), PollFlags::IN));
        let all = self.conns.iter().chain(&self.refused);
        let conns =
            all.filter_map(|(key, conn)| Some((*key, conn.stream().as_fd(), conn.interest()?)));
        listener.into_iter().chain(conns)
    }

    /// How long poll may sleep for the server's sake; `None`: for ever.
    pub fn timeout(&self, now: Instant) -> Option<Duration> {
        let conns =
            self.conns.values().chain(self.refused.values()).filter_map(|conn| conn.timeout(now));
        let accept = self.accept_after.map(|after| after.saturating_duration_since(now));
        conns.chain(accept).min()
    }

    /// Poll reported `events` for the file with this key. Unknown keys are ignored.
    pub fn ready(&mut self, key: u64, events: PollFlags) {
        if events.is_empty() {
            return;
        }
        if key == LISTENER_KEY {
            self.accept();
            return;
        }
        let Some(conn) = self.conns.get_mut(&key).or_else(|| self.refused.get_mut(&key)) else {
            return;
        };
        if events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            conn.on_hang_up();
        } else if events.contains(PollFlags::IN) {
            let _ = conn.on_readable();
        }
    }

    /// Executes what has arrived, writes what is owed, lets go of who is done. Once per round of the poll loop.
    pub fn turn(&mut self, now: Instant, methods: &mut dyn Methods) {
        if self.accept_after.is_some_and(|after| now >= after) {
            self.accept_after = None;
        }
        for (&key, conn) in &mut self.conns {
            if conn.has_backlog {
                execute(key, conn, &mut self.waiting, methods);
            }
            conn.flush(now);
        }
        for conn in self.refused.values_mut() {
            conn.flush(now);
        }
        self.conns.retain(|_, conn| !conn.is_over(now));
        self.refused.retain(|_, conn| !conn.is_over(now));
    }

    /// Answers a deferred request. False: its client is gone (which changes nothing for the operation itself).
    pub fn complete(&mut self, token: Token, result: Result<Value, RpcError>) -> bool {
        let Some(waiting) = self.waiting.remove(&token) else { return false };
        let Some(conn) = self.conns.get_mut(&waiting.conn) else { return false };
        conn.undefer();
        conn.answer(waiting.slot, result);
        conn.flush(Instant::now());
        true
    }

    /// Whether replies are still being written: a daemon that ends gives them a moment.
    pub fn has_output(&self) -> bool {
        self.conns.values().any(Conn::has_output)
    }

    /// Clients connected now.
    pub fn connections_count(&self) -> usize {
        self.conns.len()
    }

    fn accept(&mut self) {
        // Bounded: at most one backlog per round.
        for _ in 0..CONNECTIONS_MAX {
            let stream = match self.socket.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(
                        "cannot accept an RPC client: {error}; trying again in a second"
                    );
                    self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = self.key_next;
            self.key_next += 1;
            let mut conn = Conn::new(stream);
            if self.conns.len() < CONNECTIONS_MAX {
                self.conns.insert(key, conn);
            } else if self.refused.len() < REFUSALS_MAX {
                let message = format!(
                    "{CONNECTIONS_MAX} RPC clients are connected already; close one and try again"
                );
                conn.answer(
                    ReplySlot { id: Some(Value::Null), batch: None },
                    Err(RpcError::errno(libc::EBUSY, message)),
                );
                conn.finish();
                self.refused.insert(key, conn);
            }
        }
    }
}

/// Executes the requests waiting in one connection's input, as many as one turn allows.
fn execute(
    key: u64,
    conn: &mut Conn,
    waiting: &mut HashMap<Token, Waiting>,
    methods: &mut dyn Methods,
) {
    let fatal = |conn: &mut Conn, error: RpcError| {
        conn.answer(ReplySlot { id: Some(Value::Null), batch: None }, Err(error));
        conn.finish();
    };
    conn.has_backlog = false;
    for _ in 0..REQUESTS_PER_TURN {
        if !conn.may_start() {
            // Room (in `flush`) or a completion (`undefer`) takes it up again.
            conn.has_backlog = true;
            break;
        }
        match conn.scanner.next(&conn.input, conn.input_ended) {
            Scan::Value(range) => match wire::parse(&conn.input[range]) {
                Ok(Message::Single(parsed)) => start(key, conn, None, parsed, waiting, methods),
                Ok(Message::Batch(items)) => {
                    let batch = conn.open_batch(items.len());
                    for (index, parsed) in items.into_iter().enumerate() {
                        start(key, conn, Some((batch, index)), parsed, waiting, methods);
                    }
                }
                Err(error) => return fatal(conn, error),
            },
            Scan::TooDeep(_) => {
                let message = format!("request nested deeper than {NESTING_MAX} levels");
                conn.answer(
                    ReplySlot { id: Some(Value::Null), batch: None },
                    Err(RpcError::request(message)),
                );
            }
            Scan::TooLong => {
                let message = format!("request longer than {REQUEST_BYTES_MAX} bytes; split it");
                return fatal(conn, RpcError::request(message));
            }
            Scan::Garbage(byte) => {
                let message = format!(
                    "not JSON: a request cannot begin with '{}'; this is ringmill's JSON-RPC socket",
                    byte.escape_ascii()
                );
                return fatal(conn, RpcError::parse(message));
            }
            Scan::Incomplete if conn.input_ended => {
                if conn.scanner.is_inside() {
                    return fatal(
                        conn,
                        RpcError::parse("the connection ended in the middle of a request"),
                    );
                }
                return conn.finish();
            }
            Scan::Incomplete => return conn.drop_used_input(),
        }
    }
    conn.has_backlog = true;
    conn.drop_used_input();
}

fn start(
    key: u64,
    conn: &mut Conn,
    batch: Option<(u64, usize)>,
    parsed: Parsed,
    waiting: &mut HashMap<Token, Waiting>,
    methods: &mut dyn Methods,
) {
    let request = match parsed {
        Ok(request) => request,
        Err((id, error)) => return conn.answer(ReplySlot { id, batch }, Err(error)),
    };
    let slot = ReplySlot { id: request.id, batch };
    let token = Token::fresh();
    match methods.call(&request.method, request.params, token) {
        Ok(Reply::Now(result)) => conn.answer(slot, Ok(result)),
        Ok(Reply::Deferred) => {
            conn.defer();
            waiting.insert(token, Waiting { conn: key, slot });
        }
        Err(error) => conn.answer(slot, Err(error)),
    }
}
