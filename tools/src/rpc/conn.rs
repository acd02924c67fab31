//! One RPC client: its input buffer, its output queue, what it still waits for.
//!
//! Bytes flow socket → `input` → scanner → requests, and replies → `output` → socket. Back-pressure: while output,
//! unanswered requests or unread input reach their limit, nothing more is read. A connection that ends is flushed,
//! shut down for writing and *lingers* reading and discarding, because closing with unread input would make the
//! kernel reset the connection under the client's last reply. Owner: the server, on the control thread.

use std::{
    collections::HashMap,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use rustix::{
    event::PollFlags,
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown},
};
use serde_json::Value;

use super::{
    error::RpcError,
    scan::Scanner,
    server::{
        INFLIGHT_MAX, LINGER, NESTING_MAX, OUTPUT_BYTES_HARD, OUTPUT_BYTES_SOFT, REQUEST_BYTES_MAX,
        STALL_MAX,
    },
    wire::{self, RequestId},
};

const READ_BYTES: usize = 64 * 1024;

/// Where a reply belongs: the id, and the place in a batch if it is part of one.
#[derive(Debug)]
pub(super) struct ReplySlot {
    pub(super) id: RequestId,
    pub(super) batch: Option<(u64, usize)>,
}

#[derive(Debug)]
struct Batch {
    replies: Vec<Option<Value>>,
    open_count: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Takes no requests any more; ends when everything owed is written.
    Finishing,
    Lingering(Instant),
    Dead,
}

#[derive(Debug)]
pub(super) struct Conn {
    stream: UnixStream,
    phase: Phase,
    pub(super) input: Vec<u8>,
    pub(super) scanner: Scanner,
    pub(super) input_ended: bool,
    hung_up: bool,
    output: Vec<u8>,
    sent: usize,
    stalled_since: Option<Instant>,
    deferred_count: usize,
    batches: HashMap<u64, Batch>,
    batch_next: u64,
    /// Complete requests may be waiting in `input`.
    pub(super) has_backlog: bool,
}

impl Conn {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            phase: Phase::Open,
            input: Vec::new(),
            scanner: Scanner::new(NESTING_MAX, REQUEST_BYTES_MAX),
            input_ended: false,
            hung_up: false,
            output: Vec::new(),
            sent: 0,
            stalled_since: None,
            deferred_count: 0,
            batches: HashMap::new(),
            batch_next: 0,
            has_backlog: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What to poll for; `None` once the peer is gone (poll would only spin on POLLHUP).
    pub(super) fn interest(&self) -> Option<PollFlags> {
        if self.hung_up {
            return None;
        }
        let mut events = PollFlags::empty();
        if self.wants_input() || matches!(self.phase, Phase::Lingering(_)) {
            events |= PollFlags::IN;
        }
        if self.output_len() > 0 {
            events |= PollFlags::OUT;
        }
        Some(events)
    }

    fn output_len(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Whether another request may be started.
    pub(super) fn may_start(&self) -> bool {
        self.phase == Phase::Open
            && self.output_len() < OUTPUT_BYTES_SOFT
            && self.deferred_count < INFLIGHT_MAX
    }

    fn wants_input(&self) -> bool {
        self.may_start() && !self.input_ended && self.input.len() <= REQUEST_BYTES_MAX
    }

    /// Takes what the socket has, at most one piece; true if there was something.
    pub(super) fn on_readable(&mut self) -> bool {
        let discards = self.phase != Phase::Open;
        if !discards && !self.wants_input() {
            return false;
        }
        let mut piece = [0_u8; READ_BYTES];
        match rustix::net::recv(&self.stream, &mut piece[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                self.input_ended = true;
                self.has_backlog = !discards;
                if matches!(self.phase, Phase::Lingering(_)) {
                    self.phase = Phase::Dead;
                }
            }
            Ok(_) if discards => return true,
            Ok((count, _)) => {
                self.input.extend_from_slice(&piece[..count]);
                self.has_backlog = true;
                return true;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.phase = Phase::Dead,
        }
        false
    }

    /// The peer closed both directions: replies have nobody to go to, requests already sent still count.
    pub(super) fn on_hang_up(&mut self) {
        // Bounded: the input buffer fills up or the socket runs dry.
        while self.wants_input() && self.on_readable() {}
        self.hung_up = true;
        if self.phase != Phase::Open {
            self.phase = Phase::Dead;
        }
    }

    /// Forgets the input that the scanner is done with.
    pub(super) fn drop_used_input(&mut self) {
        let used = self.scanner.needed_from();
        self.input.drain(..used);
        self.scanner.removed(used);
        if self.input.is_empty() && self.input.capacity() > READ_BYTES {
            self.input = Vec::new();
        }
    }

    /// No more requests from here; what is owed is still answered.
    pub(super) fn finish(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Finishing;
            self.has_backlog = false;
            self.input = Vec::new();
        }
    }

    /// Opens a batch whose elements are answered one by one; the array goes out with the last.
    pub(super) fn open_batch(&mut self, count: usize) -> u64 {
        let batch = self.batch_next;
        self.batch_next += 1;
        self.batches.insert(batch, Batch { replies: vec![None; count], open_count: count });
        batch
    }

    pub(super) fn defer(&mut self) {
        self.deferred_count += 1;
    }

    /// A deferred request is done.
    pub(super) fn undefer(&mut self) {
        self.deferred_count -= 1;
    }

    /// Queues the answer to one request (nothing for a notification).
    pub(super) fn answer(&mut self, slot: ReplySlot, result: Result<Value, RpcError>) {
        let reply = slot.id.map(|id| wire::reply(id, result));
        let Some((number, index)) = slot.batch else {
            if let Some(reply) = reply {
                self.queue(&reply);
            }
            return;
        };
        let Some(batch) = self.batches.get_mut(&number) else { return };
        batch.replies[index] = reply;
        batch.open_count -= 1;
        if batch.open_count == 0 {
            let replies: Vec<Value> = self
                .batches
                .remove(&number)
                .map_or_else(Vec::new, |b| b.replies.into_iter().flatten().collect());
            if !replies.is_empty() {
                self.queue(&Value::Array(replies));
            }
        }
    }

    fn queue(&mut self, value: &Value) {
        if self.hung_up || self.phase == Phase::Dead {
            return;
        }
        self.output.extend_from_slice(value.to_string().as_bytes());
        self.output.push(b'\n');
        if self.output_len() > OUTPUT_BYTES_HARD {
            tracing::warn!(
                "dropping an RPC client that does not read its replies ({} bytes)",
                self.output_len()
            );
            self.phase = Phase::Dead;
        }
    }

    /// Writes what the socket takes and moves the connection on towards its end.
    pub(super) fn flush(&mut self, now: Instant) {
        while self.output_len() > 0 && !matches!(self.phase, Phase::Dead) {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.stream, &self.output[self.sent..], flags) {
                Ok(count) => {
                    self.sent += count;
                    self.stalled_since = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.stalled_since.get_or_insert(now);
                    break;
                }
                Err(_) => self.phase = Phase::Dead,
            }
        }
        if self.output_len() == 0 {
            self.output.clear();
            self.output.shrink_to(READ_BYTES);
            self.sent = 0;
            self.stalled_since = None;
        } else if self.sent > READ_BYTES {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        let owes_nothing = self.output_len() == 0 && self.deferred_count == 0;
        if self.phase == Phase::Finishing && owes_nothing {
            if self.input_ended || rustix::net::shutdown(&self.stream, Shutdown::Write).is_err() {
                self.phase = Phase::Dead;
            } else {
                self.phase = Phase::Lingering(now + LINGER);
            }
        }
    }

    /// Everything was asked and answered, or nothing can be any more.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        match self.phase {
            Phase::Dead => true,
            Phase::Lingering(until) => now >= until,
            Phase::Open | Phase::Finishing => {
                (self.hung_up && !self.has_backlog)
                    || self
                        .stalled_since
                        .is_some_and(|since| now.duration_since(since) >= STALL_MAX)
            }
        }
    }

    /// How long the connection may be left alone.
    pub(super) fn timeout(&self, now: Instant) -> Option<Duration> {
        if self.has_backlog && self.may_start() {
            return Some(Duration::ZERO);
        }
        match self.phase {
            Phase::Lingering(until) => Some(until.saturating_duration_since(now)),
            _ => self.stalled_since.map(|since| (since + STALL_MAX).saturating_duration_since(now)),
        }
    }

    pub(super) fn has_output(&self) -> bool {
        self.output_len() > 0
    }
}
