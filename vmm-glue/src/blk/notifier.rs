//! The two eventfds between a guest and its queue: kicks in, interrupts out, both through the reactor's ring.
//!
//! Owner: one queue's worker. **Invariant:** no interrupt is lost: one that is delayed (coalescing), that found the ring
//! full, or that was wanted while another was under way is sent later, and until then the reactor does not sleep; a
//! queue whose kicks cannot be watched keeps the reactor awake, too. A signal goes through the ring because a hostile
//! front-end could make a plain write block.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use ringmill_core::reactor::{ClientId, ReactorCx, RingError};

use super::QueueStatus;
use super::coalesce::Coalescer;

/// Watches are numbered from the next number on: an event of an earlier watch must not be taken for the present one's.
const CALL_TOKEN: u64 = 1;
/// Events of one queue that can wait in its inbox; more kicks than that say nothing new.
const EVENTS_MAX: usize = 16;

/// One queue's notifications.
#[derive(Debug)]
pub(super) struct Notifier {
    /// Guest → us. `None`: the guest never kicks.
    kick: Option<Arc<OwnedFd>>,
    /// Us → guest. `None`: the guest polls.
    call: Option<Arc<OwnedFd>>,
    client: Option<ClientId>,
    /// The number of the present watch.
    watch_token: u64,
    /// A signal is under way.
    call_pending: bool,
    /// Another one is to follow.
    call_owed: bool,
    /// The kick fd should be watched and is not: the ring had no room.
    kick_unwatched: bool,
    /// For contexts without a ring.
    wanted: bool,
    /// Delays on purpose.
    pub(super) coalescer: Coalescer,
}

impl Notifier {
    #[cold]
    pub(super) fn new(kick: Option<Arc<OwnedFd>>, call: Option<Arc<OwnedFd>>) -> Notifier {
        Notifier {
            kick,
            call,
            client: None,
            watch_token: CALL_TOKEN,
            call_pending: false,
            call_owed: false,
            kick_unwatched: false,
            wanted: false,
            coalescer: Coalescer::default(),
        }
    }

    /// Joins the reactor's ring and watches for kicks. Signals of an earlier ring have been seen off by `detach`: whoever
    /// attaches sends one to be sure.
    ///
    /// # Errors
    /// The ring has no place.
    #[cold]
    pub(super) fn attach(&mut self, cx: &mut ReactorCx) -> Result<(), RingError> {
        if let Some(ring) = &mut cx.io.ring {
            self.client = Some(ring.add_client(EVENTS_MAX)?);
        }
        (self.call_pending, self.call_owed) = (false, false);
        self.watch(cx, true);
        Ok(())
    }

    /// Sends what is due and leaves the ring.
    #[cold]
    pub(super) fn detach(&mut self, cx: &mut ReactorCx, status: &QueueStatus) {
        if self.coalescer.is_due() || self.call_owed {
            // The one under way may be stuck, and it may have come too early.
            self.call_pending = false;
            self.signal(cx, status);
        }
        self.watch(cx, false);
        if let (Some(ring), Some(client)) = (&mut cx.io.ring, self.client.take()) {
            if self.call_pending {
                // Deliver it if it can be delivered; a descriptor that blocks must not keep a kernel worker for ever.
                ring.commit();
                ring.cancel(client, CALL_TOKEN);
            }
            ring.commit();
            ring.remove_client(client);
        }
    }

    /// True when the guest can be interrupted at all, so that asking whether it wants to be makes sense.
    #[inline]
    pub(super) fn can_signal(&self, cx: &ReactorCx) -> bool {
        self.call.is_some() || cx.io.ring.is_none()
    }

    /// Its place on the ring, where kicks arrive.
    pub(super) fn client(&self) -> Option<ClientId> {
        self.client
    }

    /// True once (and resets): an interrupt was wanted. For contexts without a ring.
    pub(super) fn take_wanted(&mut self) -> bool {
        std::mem::take(&mut self.wanted)
    }

    /// Replaces the call fd and signals it once, in case the old one missed something.
    #[cold]
    pub(super) fn set_call(
        &mut self,
        cx: &mut ReactorCx,
        call: Option<Arc<OwnedFd>>,
        status: &QueueStatus,
    ) -> Option<Arc<OwnedFd>> {
        if let Some(ring) = &mut cx.io.ring {
            // A signal that is still in the submission queue names the old descriptor.
            ring.commit();
        }
        let old = std::mem::replace(&mut self.call, call);
        self.signal(cx, status);
        old
    }

    /// Replaces the kick fd.
    #[cold]
    pub(super) fn set_kick(
        &mut self,
        cx: &mut ReactorCx,
        kick: Option<Arc<OwnedFd>>,
    ) -> Option<Arc<OwnedFd>> {
        self.watch(cx, false);
        let old = std::mem::replace(&mut self.kick, kick);
        self.watch(cx, true);
        old
    }

    #[cold]
    fn watch(&mut self, cx: &mut ReactorCx, on: bool) {
        self.kick_unwatched = on && cx.io.ring.is_some() && self.kick.is_some();
        if let (Some(ring), Some(client), Some(kick)) = (&mut cx.io.ring, self.client, &self.kick) {
            if on {
                self.watch_token += 1;
                self.kick_unwatched = !ring.watch(client, self.watch_token, kick.as_raw_fd());
            } else {
                ring.unwatch(client, self.watch_token);
            }
            ring.commit();
        }
    }

    /// Interrupts the guest.
    #[inline(never)]
    pub(super) fn signal(&mut self, cx: &mut ReactorCx, status: &QueueStatus) {
        self.wanted = true;
        if self.call_pending {
            // The signal under way may have been delivered before our elements were visible.
            self.call_owed = true;
            return;
        }
        if let (Some(ring), Some(client), Some(call)) = (&mut cx.io.ring, self.client, &self.call) {
            self.call_pending = ring.signal(client, CALL_TOKEN, call.as_raw_fd());
            self.call_owed = !self.call_pending;
            if self.call_pending {
                status.note_interrupt();
            }
        } else {
            self.call_owed = false;
        }
    }

    /// Reads kicks and ends of signals; sends an interrupt whose time has come.
    #[inline]
    pub(super) fn poll(&mut self, cx: &mut ReactorCx, status: &QueueStatus) {
        if let (Some(ring), Some(client)) = (&cx.io.ring, self.client)
            && ring.has_events(client)
        {
            self.read_events(cx, status);
        }
        // Due: delayed on purpose. Owed: the ring had no room for the signal.
        if self.coalescer.take_due(cx.pass_ns) || (self.call_owed && !self.call_pending) {
            self.signal(cx, status);
        }
    }

    #[cold]
    #[inline(never)]
    fn read_events(&mut self, cx: &mut ReactorCx, status: &QueueStatus) {
        let Some(client) = self.client else { return };
        let mut kicks = 0;
        let mut rearm = false;
        let mut call_done = false;
        if let Some(ring) = &mut cx.io.ring {
            while let Some(event) = ring.next_event(client) {
                if event.token == CALL_TOKEN {
                    call_done = true;
                    continue;
                }
                kicks += 1;
                // A watch that the kernel ended on its own (a full completion queue) is set again.
                let ended = !event.more && event.result != -libc::ECANCELED;
                rearm |= ended && event.token == self.watch_token;
            }
        }
        status.note_kicks(kicks);
        if rearm {
            self.watch(cx, true);
        }
        if call_done {
            self.call_pending = false;
            if std::mem::take(&mut self.call_owed) {
                self.signal(cx, status);
            }
        }
    }

    /// Before a sleep: true when an interrupt is still to be sent.
    #[cold]
    pub(super) fn must_poll(&mut self, cx: &mut ReactorCx) -> bool {
        if self.coalescer.is_due() || (self.call_owed && !self.call_pending) {
            return true;
        }
        if self.kick_unwatched {
            self.watch(cx, true);
        }
        false
    }

    /// True when a kick would wake the reactor.
    pub(super) fn hears_kicks(&self) -> bool {
        self.kick.is_some() && !self.kick_unwatched
    }
}
