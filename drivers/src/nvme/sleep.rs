//! How a queue pair lets its reactor sleep: interrupts are asked for only then.
//!
//! Owner: one reactor. **Invariant:** the ring of completions is looked at after interrupts were asked for; while the reactor
//! polls, the vector has nobody to signal.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use ringmill_core::reactor::Ring;

use super::parts::Interrupts;
use super::qpair::QueuePair;
use crate::pci::Registers;

/// The watch's number on the ring.
const VECTOR_TOKEN: u64 = 1;
/// Interrupts that can wait there; more say nothing new.
const EVENTS_MAX: usize = 4;

impl<R: Registers> QueuePair<R> {
    /// Asks for interrupts and looks again; true when the reactor has to stay awake.
    #[cold]
    pub(super) fn listen(&mut self, ring: &mut Ring) -> bool {
        if self.is_open() && self.rings.unrung > 0 {
            // A device may hold interrupts back while completions are not acknowledged.
            self.acknowledge();
        }
        match &self.interrupts {
            Interrupts::None => return true,
            Interrupts::Thread => self.shared.set_asleep(true),
            Interrupts::Own { bind, eventfd } => {
                let (bind, eventfd) = (Arc::clone(bind), Arc::clone(eventfd));
                if !self.watch(ring, eventfd.as_raw_fd()) {
                    return true;
                }
                self.bound = true;
                if bind(Some(eventfd.as_fd())).is_err() {
                    // A device that is gone will never say so here: its thread does, by an order.
                    return true;
                }
            }
        }
        self.rings.peek().is_some()
    }

    /// Has the ring watch the eventfd, once and for all; false without a place.
    #[cold]
    fn watch(&mut self, ring: &mut Ring, fd: i32) -> bool {
        if self.client.is_none() {
            let Ok(client) = ring.add_client(EVENTS_MAX) else { return false };
            self.client = Some(client);
            self.watched = false;
        }
        let Some(client) = self.client else { return false };
        if !self.watched {
            self.watched = ring.watch(client, VECTOR_TOKEN, fd);
        }
        self.watched
    }

    /// The reactor polls again.
    #[cold]
    pub(super) fn stop_listening(&mut self, ring: &mut Ring) {
        match &self.interrupts {
            Interrupts::None => {}
            Interrupts::Thread => self.shared.set_asleep(false),
            Interrupts::Own { bind, .. } => {
                if std::mem::take(&mut self.bound) {
                    // Refused only by a device that is gone.
                    let _ = bind(None);
                }
            }
        }
        if let Some(client) = self.client {
            // The counter is never read: a multishot poll reports each signal.
            while let Some(event) = ring.next_event(client) {
                self.watched &= event.more;
            }
        }
    }

    /// Before the pair is taken from its reactor: leaves the ring.
    #[cold]
    pub fn leave(&mut self, ring: &mut Ring) {
        self.stop_listening(ring);
        if let Some(client) = self.client.take() {
            ring.unwatch(client, VECTOR_TOKEN);
            ring.commit();
            ring.remove_client(client);
        }
    }
}
