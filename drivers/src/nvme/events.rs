//! What the controller's events ask for: log pages read, namespaces looked at, the next event asked for.
//!
//! Flow: completion of an event request → [`Unread`] → questions; a refused one is asked again, later and later. Owner: the
//! controller's thread. **Invariant:** an event is heeded until its questions were answered or it was given up, which takes
//! [`TRIES_MAX`] tries; meanwhile other events are heard.

use std::time::{Duration, Instant};

use ringmill_core::spec::nvme::event;

use super::NvmeError;
use super::admin::{EVENTS_KEPT_MAX, Event, refused_with};
use super::joint::Tally;
use super::thread::Keeper;
use crate::pci::PciBacking;

/// How often an event's questions are asked, and the pause after the first time; each one after it is twice as long.
const TRIES_MAX: u32 = 7;
const PAUSE: Duration = Duration::from_millis(50);

/// Events whose questions were not answered.
#[derive(Debug, Default)]
pub(super) struct Unread {
    events: Vec<Event>,
    tries: u32,
    /// When they are asked; `None`: given up, until something makes it likely that they are answered.
    due: Option<Instant>,
}

impl Unread {
    /// One that is waiting already changes nothing: a device that sends it again and again is asked no more often.
    fn add(&mut self, event: Event) {
        if self.events.contains(&event) && self.due.is_some() {
            return;
        }
        if !self.events.contains(&event) && self.events.len() < EVENTS_KEPT_MAX {
            self.events.push(event);
        }
        self.ask_now();
    }

    /// The device has just said something sensible.
    pub(super) fn ask_now(&mut self) {
        (self.tries, self.due) = (0, Some(Instant::now()));
    }

    /// How soon there is something to ask.
    pub(super) fn due_in(&self) -> Option<Duration> {
        let due = self.due.filter(|_| !self.events.is_empty())?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// What is to be asked now.
    fn take_due(&mut self) -> Vec<Event> {
        let is_due = self.due_in().is_some_and(|due| due.is_zero());
        if is_due { std::mem::take(&mut self.events) } else { Vec::new() }
    }

    /// They were refused. False when they are given up.
    fn put_back(&mut self, events: Vec<Event>) -> bool {
        self.events = events;
        let pause = PAUSE * (1 << self.tries.min(TRIES_MAX));
        self.tries += 1;
        self.due = (self.tries < TRIES_MAX).then(|| Instant::now() + pause);
        self.due.is_some()
    }
}

impl<B: PciBacking> Keeper<B> {
    pub(super) fn read_events(&mut self) {
        if self.lost {
            return;
        }
        let came = self.controller.admin.take_events(&self.controller.bar);
        let stale = self.controller.admin.stale_count();
        let strange = stale.saturating_sub(std::mem::replace(&mut self.stale_seen, stale));
        if strange > 0 {
            for _ in 0..strange {
                Tally::note(&self.common.tally.stale);
            }
            let _ = self.reset("it answered an admin command that was not sent");
            return;
        }
        for came in came {
            Tally::note(&self.common.tally.events);
            if came.kind == event::ERROR {
                let (name, information) = (self.name(), came.information);
                tracing::warn!("{name} reports an error (event information {information:#x})");
            }
            self.unread.add(came);
        }
    }

    /// Does what events ask for, and asks for the next ones.
    pub(super) fn heed_events(&mut self) {
        let events = self.unread.take_due();
        if self.lost || events.is_empty() {
            return;
        }
        let mut refused = Vec::new();
        for event in events {
            let Err(error) = self.heed(event) else { continue };
            // The first time is enough for the log.
            if self.unread.tries == 0 || refused_with(&error).is_none() {
                tracing::warn!("{}: {error}", self.name());
            }
            if refused_with(&error).is_none() {
                // The reset that this ends in asks for all that matters.
                self.after_failure(&error);
                break;
            }
            refused.push(event);
        }
        if self.lost {
            return;
        }
        if !refused.is_empty() && !self.unread.put_back(refused) {
            let name = self.name();
            tracing::error!(
                "{name}: its events cannot be read; they are asked for again after a reset or the next event"
            );
        }
        // Also after a refusal: events of other kinds come.
        self.controller.admin.rearm(&self.controller.bar);
    }

    fn heed(&mut self, came: Event) -> Result<(), NvmeError> {
        if came.kind == event::HEALTH {
            return self.read_health().map(|_| ());
        }
        let cleared = self.controller.clear_event(came);
        if !came.is_namespace_notice()
            || cleared.as_ref().is_err_and(|error| refused_with(error).is_none())
        {
            return cleared;
        }
        self.refresh_namespaces()?;
        cleared
    }
}
