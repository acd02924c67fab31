//! A bdev with fewer device queues than reactors.
//!
//! In: channels asked for by control threads, for a reactor each. Out: the inner bdev's own channel where that reactor
//! owns a device queue, otherwise a crossed one. Owner: control threads. **Invariant:** a reactor's way into the device
//! is chosen once and stays; the owners' ports are taken off their reactors before the inner bdev goes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::IoStatus;
use crate::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed, InstantChannel};
use crate::limits::{CORES_MAX, CROSS_LINKS_MAX, CROSS_SLOTS};
use crate::mem::{DmaDomain, ListsHeld};
use crate::reactor::{PollerId, ReactorHandle};

use super::PortCounters;
use super::channel::{Answer, CrossChannel, Crossing};
use super::port::{Link, Port};
use super::spsc::{self, Keeper};

/// The memory of a requester's rings, which no reactor frees.
pub(super) struct LinkMemory {
    requests: Keeper<Crossing>,
    answers: Keeper<Answer>,
}

impl LinkMemory {
    pub(super) fn is_unused(&self) -> bool {
        self.requests.is_last() && self.answers.is_last()
    }
}

/// Both ends of a way from `home` to `owner`; either wakes the other where it is a reactor.
pub(super) fn connect(
    owner: Option<ReactorHandle>,
    home: Option<ReactorHandle>,
) -> (CrossChannel, Link, LinkMemory) {
    let (to_owner, requests, requests_kept) = spsc::ring(CROSS_SLOTS, Crossing::empty);
    let (to_home, answers, answers_kept) = spsc::ring(CROSS_SLOTS, Answer::empty);
    let lists_held = ListsHeld::default();
    let channel = CrossChannel { requests: to_owner, answers, owner, inflight: 0, lists_held };
    let link = Link { requests, answers: to_home, home, held: 0, unpublished: false };
    (channel, link, LinkMemory { requests: requests_kept, answers: answers_kept })
}

/// A port on its reactor.
struct OpenPort {
    id: PollerId,
    counters: Arc<PortCounters>,
    links: Vec<LinkMemory>,
}

/// One device queue.
struct Queue {
    owner: ReactorHandle,
    port: Mutex<Option<OpenPort>>,
}

/// A bdev whose channels share a few device queues, each owned by one reactor.
pub struct CrossBdev {
    inner: Arc<dyn Bdev>,
    queues: Vec<Queue>,
    /// Which queue serves which reactor that owns none, in the order in which they came.
    homes: Mutex<Vec<(ReactorHandle, usize)>>,
}

impl std::fmt::Debug for CrossBdev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, queues) = (self.inner.info().name(), self.queues.len());
        f.debug_struct("CrossBdev").field("name", &name).field("queues", &queues).finish()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CrossBdev {
    /// `inner` with one device queue on each of `owners`.
    ///
    /// # Errors
    /// No owners, too many, or one twice.
    pub fn new(inner: Arc<dyn Bdev>, owners: Vec<ReactorHandle>) -> Result<CrossBdev, BdevError> {
        let twice = owners.iter().enumerate().any(|(at, o)| owners[..at].iter().any(|p| p.same(o)));
        if owners.is_empty() || owners.len() > CORES_MAX || twice {
            let name = inner.info().name().to_owned();
            let reason = format!("{} device queues; each needs a reactor of its own", owners.len());
            return Err(BdevError::Refused { name, reason });
        }
        let queues = owners.into_iter().map(|owner| Queue { owner, port: Mutex::default() });
        Ok(CrossBdev { inner, queues: queues.collect(), homes: Mutex::default() })
    }

    /// The bdev below.
    #[must_use]
    pub fn inner(&self) -> &Arc<dyn Bdev> {
        &self.inner
    }

    /// The queue that serves a reactor: its own, or the next in turn for the first time and the same ever after. A thread
    /// that is no reactor gets the first.
    fn queue_for(&self, home: Option<&ReactorHandle>) -> usize {
        let Some(home) = home else { return 0 };
        if let Some(own) = self.queues.iter().position(|queue| queue.owner.same(home)) {
            return own;
        }
        let mut homes = locked(&self.homes);
        if let Some((_, queue)) = homes.iter().find(|(known, _)| known.same(home)) {
            return *queue;
        }
        let next = homes.len() % self.queues.len();
        homes.push((home.clone(), next));
        next
    }

    fn refused(&self, reason: String) -> BdevError {
        BdevError::Refused { name: self.inner.info().name().to_owned(), reason }
    }

    /// Puts the queue's port on its reactor.
    fn open_port(&self, at: usize) -> Result<OpenPort, BdevError> {
        let owner = &self.queues[at].owner;
        let seed = self.inner.open_channel(Some(owner))?;
        let counters = Arc::new(PortCounters::default());
        let gone = Box::new(InstantChannel::new(IoStatus::Gone));
        let port = Port::new(seed, gone, CROSS_LINKS_MAX, Arc::clone(&counters));
        let id = PollerId::next();
        let name = format!("{}:queue{at}", self.inner.info().name());
        if !owner.add_poller(id, &name, 0, Box::new(port)) {
            return Err(
                self.refused(format!("the reactor that owns device queue {at} does not answer"))
            );
        }
        Ok(OpenPort { id, counters, links: Vec::new() })
    }

    /// A pair of rings to a queue's port.
    fn open_link(
        &self,
        at: usize,
        home: Option<&ReactorHandle>,
    ) -> Result<CrossChannel, BdevError> {
        let queue = &self.queues[at];
        let mut slot = locked(&queue.port);
        let port = match &mut *slot {
            Some(port) => port,
            None => slot.insert(self.open_port(at)?),
        };
        if let Some(failure) = port.counters.failure.get() {
            return Err(self.refused(format!("device queue {at} does not work: {failure}")));
        }
        port.links.retain(|link| !link.is_unused());
        if port.links.len() >= CROSS_LINKS_MAX {
            let reason = format!("{CROSS_LINKS_MAX} queues share device queue {at} already");
            return Err(self.refused(reason));
        }
        let (channel, link, memory) = connect(Some(queue.owner.clone()), home.cloned());
        port.links.push(memory);
        let id = port.id;
        // A link that finds no port is dropped, and the channel answers that the device is gone.
        let sent = queue.owner.send(Box::new(move |reactor| {
            reactor.with_poller(id, |port: &mut Port, _| port.add_link(link));
        }));
        if sent.is_err() {
            return Err(
                self.refused(format!("the reactor that owns device queue {at} does not answer"))
            );
        }
        Ok(channel)
    }
}

impl Bdev for CrossBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        self.inner.info()
    }

    fn open_channel(&self, home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let at = self.queue_for(home);
        if home.is_some_and(|home| self.queues[at].owner.same(home)) {
            return self.inner.open_channel(home);
        }
        let channel = Box::new(self.open_link(at, home)?);
        Ok(Box::new(move |_io| Ok(channel)))
    }

    fn owner(&self, home: &ReactorHandle) -> ReactorHandle {
        self.queues[self.queue_for(Some(home))].owner.clone()
    }

    fn dma(&self) -> Option<Arc<dyn DmaDomain>> {
        self.inner.dma()
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        self.inner.rescan()
    }

    fn driver_facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = self.inner.driver_facts();
        let (mut requests, mut batches, mut owners) = (0, 0, Vec::new());
        for queue in &self.queues {
            owners.push(queue.owner.core().map_or_else(|| "-".to_owned(), |c| c.to_string()));
            if let Some(port) = &*locked(&queue.port) {
                requests += port.counters.requests.load(Ordering::Relaxed);
                batches += port.counters.batches.load(Ordering::Relaxed);
                if let Some(failure) = port.counters.failure.get() {
                    facts.push(("queue_failure", failure.clone()));
                }
            }
        }
        facts.extend([
            ("queues", self.queues.len().to_string()),
            // Never a bare number: a list of one core is still a list.
            ("queue_owners", format!("[{}]", owners.join(","))),
            ("crossed_requests", requests.to_string()),
            ("crossed_batches", batches.to_string()),
        ]);
        facts
    }
}

impl Drop for CrossBdev {
    fn drop(&mut self) {
        for (at, queue) in self.queues.iter().enumerate() {
            let Some(port) = locked(&queue.port).take() else { continue };
            // Its channels were closed before: nothing is in flight.
            if !queue.owner.remove_poller(port.id) && !queue.owner.is_stopped() {
                tracing::warn!(
                    bdev = self.inner.info().name(),
                    "the reactor that owns device queue {at} did not give it back"
                );
            }
        }
    }
}
