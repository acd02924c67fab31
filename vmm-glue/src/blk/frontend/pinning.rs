//! Pinning a guest's memory for `pin = on`: when, on which thread, and what is said about it.
//!
//! Flow: rings may run, or memory changed → a thread registers what is new → [`EventKind::Pinned`] → every ring's reactor
//! clones it. Requests run unpinned until then. Owner: the control thread. **Invariant:** what reactors are told to hold
//! are pins of the table that their workers have; a change under way tells them by itself.

use std::sync::{Arc, Weak};

use ringmill_core::mem::{Pin, PinError, PinState, register_pins};

use super::super::event::EventKind;
use super::FrontEnd;
use super::operation::Kind;

/// Whether a front-end's memory is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PinView {
    /// It is not meant to be.
    Off,
    /// Not yet, or there is none.
    Pinning,
    /// All of it.
    On,
    /// Not all of it can be, for this reason.
    Refused(String),
}

impl FrontEnd {
    /// Registered buffers are of use to the kernel only; memory that a device reaches is pinned anyway.
    pub(super) fn registers_memory(&self) -> bool {
        self.shared.pin && !self.has_domain
    }

    /// What status output shows.
    pub(in super::super) fn pin_view(&self) -> PinView {
        let regions = self.mem.regions();
        if self.has_domain && self.bdev.is_none() {
            return PinView::Off;
        }
        if self.has_domain {
            let all_on = !regions.is_empty() && !self.mem.lacks_dma();
            return if all_on { PinView::On } else { PinView::Pinning };
        }
        if !self.shared.pin {
            return PinView::Off;
        }
        if let Some(reason) = &self.unpinned {
            return PinView::Refused(reason.clone());
        }
        let all_on = regions.iter().all(|region| region.pin().is_some_and(|pin| pin.is_on()));
        if all_on && !regions.is_empty() { PinView::On } else { PinView::Pinning }
    }

    /// Registers what is new, on a thread of its own. A front-end whose rings may not run yet pins nothing: eight of them may
    /// be connected, and only one works.
    pub(super) fn pin_memory(&mut self) {
        if !self.registers_memory() || !self.active {
            return;
        }
        if self.mem.regions().iter().any(|region| region.pin().is_none()) {
            self.cannot_pin(PinError::Full.to_string());
        }
        let fresh: Vec<Weak<Pin>> =
            self.mem.pins().filter(|pin| pin.begin()).map(Arc::downgrade).collect();
        if fresh.is_empty() {
            return;
        }
        let (vid, controller, events) = (self.vid, self.shared.number, self.shared.events.clone());
        let job = move || {
            let result = register_pins(&fresh);
            events.send(controller, EventKind::Pinned { vid, result });
        };
        if let Err(error) = std::thread::Builder::new().name("pin-memory".to_owned()).spawn(job) {
            self.cannot_pin(format!("no thread to pin memory: {error}"));
        }
    }

    /// The table is another one: what it has that is new is to be pinned; what is pinned, the reactors know already.
    pub(super) fn memory_changed(&mut self) {
        let gone = |pin: &Arc<Pin>| matches!(pin.state(), PinState::Refused(_));
        // Memory that could not be pinned may be gone, and with it the reason.
        if !self.mem.pins().any(gone) {
            self.unpinned = None;
        }
        if std::mem::take(&mut self.pins_untold) {
            self.tell_pins();
        }
        self.pin_memory();
    }

    /// A registration has ended.
    pub(in super::super) fn on_pinned(&mut self, result: Result<(), PinError>) {
        if let Err(error) = result {
            return self.cannot_pin(error.to_string());
        }
        let changes_memory =
            |kind: &Kind| matches!(kind, Kind::ReplaceMemory(_) | Kind::AddMemory(_));
        if self.current.as_ref().is_some_and(|current| changes_memory(&current.kind)) {
            // A worker may have the new table already. `finish` tells the reactors what the news would have told them.
            self.pins_untold = true;
            return;
        }
        self.tell_pins();
    }

    /// Tells every ring's reactor what is pinned.
    pub(super) fn tell_pins(&mut self) {
        for index in 0..self.shared.queues_max {
            let (pins, controller) = (self.mem.pinned(), self.shared.number);
            let events = self.shared.events.clone();
            self.on_worker(index, move |worker, cx| {
                let old = worker.set_pins(cx, pins);
                events.send(controller, EventKind::Leftover(Box::new(old)));
            });
        }
    }

    /// Says once why memory stays unpinned.
    pub(in super::super) fn cannot_pin(&mut self, reason: String) {
        if self.unpinned.is_none() {
            tracing::warn!(
                controller = %self.shared.name, session = self.vid, "guest memory is not pinned: {reason}"
            );
            self.unpinned = Some(reason);
        }
    }
}
