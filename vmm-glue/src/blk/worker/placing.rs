//! How a worker comes to a reactor and leaves it: for the first time, for the last, or on its way to another one.
//!
//! **Invariant:** what the queue is takes no part in it: ring position, memory, descriptors and arrival times stay; the
//! channel and the places in the ring belong to the reactor and are given back. A broken queue stays broken.

use ringmill_core::bdev::BdevError;
use ringmill_core::reactor::{ReactorCx, RingError};
use thiserror::Error;

use crate::blk::WorkerEvent;

use super::{QueueState, QueueWorker, Tracking, Virtqueue};

/// Why a reactor cannot serve a queue.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// No way into the bdev.
    #[error(transparent)]
    Channel(BdevError),
    /// No place for kicks and interrupts.
    #[error(transparent)]
    Notifications(RingError),
}

/// A worker that can go back where it came from reports a reactor that cannot serve it, instead of making do.
#[derive(Debug, Default)]
pub(super) struct Trial {
    on: bool,
    problem: Option<PlaceError>,
}

impl Trial {
    pub(super) fn new(on: bool) -> Trial {
        Trial { on, problem: None }
    }

    /// What came of it; from now on the worker makes do.
    pub(super) fn end(&mut self) -> Option<PlaceError> {
        self.on = false;
        self.problem.take()
    }
}

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    #[cold]
    pub(super) fn arrive(&mut self, cx: &mut ReactorCx) {
        self.share = cx.io.fair.join();
        if let Some(seed) = self.seed.take() {
            match seed(&mut cx.io) {
                Ok(channel) => self.parts.channel = channel,
                Err(error) if self.trial.on => {
                    self.trial.problem = Some(PlaceError::Channel(error));
                    return;
                }
                Err(error) => (self.parts.events)(WorkerEvent::NoChannel(error)),
            }
        }
        // After the channel, which may have brought a second ring.
        self.hold_pins(cx);
        let was_broken = self.state == QueueState::Broken;
        if let Err(error) = self.notifier.attach(cx) {
            if self.trial.on {
                self.trial.problem = Some(PlaceError::Notifications(error));
                return;
            }
            // A queue that can neither hear nor call its guest would only hang it later.
            self.set_state(QueueState::Broken);
            return (self.parts.events)(WorkerEvent::NoNotifications(error));
        }
        if was_broken {
            self.set_state(QueueState::Broken);
            return self.show();
        }
        self.set_state(QueueState::Running);
        // A predecessor that died may have left kicks suppressed or an interrupt unsent: say what holds now, and send
        // one interrupt to be sure. Entries that are there already are found by the first poll.
        self.parts.queue.request_kick();
        self.notifier.signal(cx, &self.parts.status);
        self.show();
    }

    #[cold]
    pub(super) fn depart(&mut self, cx: &mut ReactorCx) {
        if self.parts.channel.inflight() == 0 {
            self.parts.channel.close(&mut cx.io);
        }
        self.pins.let_go(&mut cx.io);
        cx.io.fair.leave(&mut self.share);
        self.notifier.detach(cx, &self.parts.status);
        self.show();
        self.parts.status.set_state(QueueState::Stopped);
    }
}
