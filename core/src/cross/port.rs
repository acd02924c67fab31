//! HOT PATH
//! The owner's end of crossed channels: one device queue and the requesters that share it.
//!
//! Flow: request rings → the one real channel → answer rings. Owner: the reactor that owns the device queue.
//! **Invariant:** what the channel does not take stays in its ring; an answer goes to the ring that its request came
//! from, once; no requester can keep more of the channel than leaves every other its guaranteed minimum; a device that
//! takes anything serves every ring in turn.
//!
//! poll:
//!   each ring, another first every time: entries within its share → batch → submit a prefix → release once
//!   channel.poll → answers → publish once per ring → wake its requester if it sleeps

use std::sync::Arc;

use crate::bdev::{Channel, ChannelSeed};
use crate::io::{Completion, Slots, Tag};
use crate::limits::{BATCH_REQUESTS_MAX, CROSS_ROOM_MIN, QUEUE_INFLIGHT_MAX};
use crate::mem::Segment;
use crate::reactor::{Done, IoCx, Poller, ReactorCx, ReactorHandle, Share};
use crate::units::{index, len_u32};

use super::PortCounters;
use super::channel::{Answer, Crossing};
use super::spsc::{Consumer, Producer};

/// One requester as the owner sees it. The request ring is left before the answer ring is closed.
#[repr(align(128))]
pub(super) struct Link {
    pub(super) requests: Consumer<Crossing>,
    pub(super) answers: Producer<Answer>,
    /// Whom to wake; `None`: a requester that never sleeps.
    pub(super) home: Option<ReactorHandle>,
    /// Its requests in the channel.
    pub(super) held: usize,
    /// Answers were filled in and not published.
    pub(super) unpublished: bool,
}

/// Where a request in the channel came from.
struct Origin {
    link: usize,
    tag: Tag,
    data_bytes: u64,
    list: Option<Vec<Segment>>,
}

/// One device queue on its owner.
#[repr(align(128))]
pub(super) struct Port {
    channel: Box<dyn Channel>,
    seed: Option<ChannelSeed>,
    links: Vec<Option<Link>>,
    /// The ring that is served first.
    first: usize,
    origins: Slots<Origin>,
    /// Its part of the owner's core, as one queue among the others there.
    share: Share,
    draining: bool,
    waiting: Vec<Done>,
    counters: Arc<PortCounters>,
}

impl Port {
    /// A port that plants `seed` on the reactor which takes it in; until then, and if that fails, `channel` serves.
    #[cold]
    pub(super) fn new(
        seed: ChannelSeed,
        channel: Box<dyn Channel>,
        links_max: usize,
        counters: Arc<PortCounters>,
    ) -> Port {
        Port {
            channel,
            seed: Some(seed),
            links: Vec::with_capacity(links_max),
            first: 0,
            origins: Slots::new(QUEUE_INFLIGHT_MAX),
            share: Share::default(),
            draining: false,
            waiting: Vec::with_capacity(4),
            counters,
        }
    }

    /// Takes a requester in. Without a place for it the link is given back; dropping it tells the requester.
    #[cold]
    pub(super) fn add_link(&mut self, link: Link) -> Option<Link> {
        if let Some(place) = self.links.iter_mut().find(|place| place.is_none()) {
            *place = Some(link);
        } else if self.links.len() < self.links.capacity() {
            self.links.push(Some(link));
        } else {
            return Some(link);
        }
        None
    }

    /// What the channel would take; a channel with nothing in flight takes one whatever it says.
    #[inline]
    fn room(&self, io: &IoCx) -> usize {
        let least = usize::from(self.origins.live_count() == 0);
        self.channel.room(io).requests.max(least).min(self.origins.room())
    }

    /// Serves every ring; true when there was anything in one.
    #[inline]
    fn take(&mut self, cx: &mut ReactorCx) -> bool {
        let (mut count, mut waiting) = (0, false);
        for link in self.links.iter_mut().flatten() {
            count += 1;
            // A closed link counts: it is to be cleared away.
            waiting |= link.requests.waiting() > 0 || link.requests.is_closed();
        }
        if !waiting {
            return false;
        }
        let room_bytes = self.channel.room(&cx.io).bytes;
        if cx.io.fair.intake_bytes(&self.share, room_bytes) == 0 {
            // Debts are paid by polling on; room in flight comes with a completion.
            return room_bytes == 0;
        }
        let mut room = self.room(&cx.io);
        let minimum = CROSS_ROOM_MIN.min((room + self.origins.live_count()) / (2 * count));
        let lacking = |link: &Link| minimum.saturating_sub(link.held);
        // What is kept for those that hold less than their minimum.
        let mut kept: usize = self.links.iter().flatten().map(lacking).sum();
        let mut work = false;
        for turn in 0..self.links.len() {
            let at = (self.first + turn) % self.links.len();
            let Some(link) = &mut self.links[at] else { continue };
            let waiting = index(link.requests.waiting());
            if waiting == 0 || link.requests.is_closed() {
                work |= self.clear_away(at);
                continue;
            }
            let own = lacking(link);
            let share =
                room.saturating_sub(kept - own).max(usize::from(room > 0 && link.held == 0));
            let taken = self.feed(cx, at, waiting.min(share).min(BATCH_REQUESTS_MAX));
            if taken > 0 {
                work = true;
                room = self.room(&cx.io);
                kept = kept - own + self.links[at].as_ref().map_or(0, lacking);
            }
        }
        self.first = (self.first + 1) % self.links.len();
        if self.links.iter_mut().flatten().all(|link| link.requests.waiting() == 0) {
            cx.io.fair.served_all(&self.share, cx.pass_ns);
        }
        work
    }

    /// Hands up to `count` entries of one ring to the channel; returns how many it took.
    #[inline]
    fn feed(&mut self, cx: &mut ReactorCx, at: usize, count: usize) -> usize {
        let bytes_max = cx.io.fair.intake_bytes(&self.share, self.channel.room(&cx.io).bytes);
        let Some(link) = self.links[at].as_mut().filter(|_| bytes_max > 0) else { return 0 };
        let (batch, mut bytes) = (&mut cx.batch, 0);
        batch.clear();
        for number in 0..len_u32(count) {
            let room = batch.segments_room();
            let mark = batch.segments_mark();
            let copied = link.requests.read(number, |slot| {
                let segments = slot.segments();
                let fits = segments.len() <= room;
                fits.then(|| {
                    segments.iter().for_each(|segment| {
                        batch.push_segment(*segment);
                    });
                    slot.request
                })
            });
            let Some(mut request) = copied.flatten() else { break };
            let data_bytes = request.op.data_bytes(request.len_bytes);
            let origin = Origin { link: at, tag: request.tag, data_bytes, list: None };
            let Ok(tag) = self.origins.insert(origin) else { break };
            request.tag = tag;
            request.segments_at = len_u32(mark);
            bytes += request.len_bytes;
            batch.push(request);
            if bytes >= bytes_max {
                break;
            }
        }
        if batch.is_empty() {
            return 0;
        }
        let taken = self.channel.submit(&mut cx.io, cx.batch.view());
        let requests = cx.batch.view().requests();
        let mut data_bytes = 0;
        for (number, request) in (0..).zip(&requests[..taken]) {
            data_bytes += request.op.data_bytes(request.len_bytes);
            let list = link.requests.read(number, Crossing::take_list).flatten();
            if list.is_some()
                && let Some(origin) = self.origins.get_mut(request.tag)
            {
                origin.list = list;
            }
        }
        for request in &requests[taken..] {
            self.origins.remove(request.tag);
        }
        cx.io.fair.started(&mut self.share, data_bytes);
        if taken > 0 {
            link.requests.release(len_u32(taken));
            link.held += taken;
            self.counters.note_batch(taken);
        }
        cx.batch.clear();
        taken
    }

    /// Forgets a requester that is gone, once nothing of it is in the channel. What it left in its ring is not done: nobody
    /// vouches for that memory any more.
    #[cold]
    #[inline(never)]
    fn clear_away(&mut self, at: usize) -> bool {
        let over = |link: &Link| link.requests.is_closed() && link.held == 0;
        if self.links[at].as_ref().is_some_and(over) {
            // Its rings' memory is kept by the control side, so this frees nothing.
            self.links[at] = None;
            return true;
        }
        false
    }

    /// Brings answers back; true when there was one.
    #[inline]
    fn give(&mut self, cx: &mut ReactorCx) -> bool {
        let (mut work, mut data_bytes) = (false, 0);
        while self.origins.live_count() > 0 {
            cx.completions.clear();
            self.channel.poll(&mut cx.io, &mut cx.completions);
            let more = cx.completions.is_full();
            for Completion { tag, status } in cx.completions.drain(..) {
                let Some(origin) = self.origins.remove(tag) else { continue };
                data_bytes += origin.data_bytes;
                let Some(link) = &mut self.links[origin.link] else { continue };
                let completion = Completion { tag: origin.tag, status };
                let filled = link.answers.fill(|slot| {
                    slot.completion = completion;
                    if origin.list.is_some() {
                        slot.list = origin.list;
                    }
                });
                debug_assert!(filled, "a requester has no more out than the ring has slots");
                link.held -= 1;
                link.unpublished = true;
                work = true;
            }
            if !more {
                break;
            }
        }
        cx.io.fair.ended(&mut self.share, data_bytes);
        work
    }

    /// Shows the answers to the requesters.
    #[inline]
    fn publish(&mut self) {
        for link in self.links.iter_mut().flatten().filter(|link| link.unpublished) {
            link.unpublished = false;
            link.answers.publish();
            if let Some(home) = &link.home {
                home.wake();
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn drained(&mut self) {
        for done in self.waiting.drain(..) {
            done();
        }
    }
}

impl Poller for Port {
    fn poll(&mut self, cx: &mut ReactorCx) -> bool {
        cx.io.fair.begin(&mut self.share, cx.pass_ns);
        let mut work = !self.draining && self.take(cx);
        let answers = self.give(cx);
        cx.io.fair.end(&mut self.share);
        if answers {
            work = true;
            self.publish();
        }
        if !self.waiting.is_empty() && self.origins.live_count() == 0 {
            self.drained();
        }
        work
    }

    fn prepare_sleep(&mut self, cx: &mut ReactorCx) -> bool {
        let busy = self.origins.live_count() > 0;
        if busy && self.channel.must_poll() {
            return true;
        }
        let held_back = || self.room(&cx.io) == 0 || cx.io.fair.holds_back(&self.share, cx.pass_ns);
        if self.draining || (busy && held_back()) {
            // Nothing is taken before something ends, and that wakes the reactor.
            return false;
        }
        // The last look: a request that is published later wakes the owner.
        self.links.iter().flatten().any(|link| !link.requests.is_empty())
    }

    #[cold]
    fn attach(&mut self, cx: &mut ReactorCx) {
        self.share = cx.io.fair.join();
        if let Some(seed) = self.seed.take() {
            match seed(&mut cx.io) {
                Ok(channel) => self.channel = channel,
                Err(error) => self.counters.set_failure(&error),
            }
        }
    }

    #[cold]
    fn detach(&mut self, cx: &mut ReactorCx) {
        cx.io.fair.leave(&mut self.share);
        if self.channel.inflight() == 0 {
            self.channel.close(&mut cx.io);
        }
        for link in self.links.iter_mut().filter_map(Option::take) {
            let Link { requests, answers, home, .. } = link;
            drop(requests);
            drop(answers);
            if let Some(home) = home {
                home.wake();
            }
        }
    }

    fn quiesce(&mut self, _cx: &mut ReactorCx, done: Done) {
        self.draining = true;
        if self.origins.live_count() == 0 { done() } else { self.waiting.push(done) }
    }

    fn resume(
        &mut self,
        cx: &mut ReactorCx,
        channel: Option<Box<dyn Channel>>,
    ) -> Option<Box<dyn Channel>> {
        self.draining = false;
        channel.map(|new| {
            let mut old = std::mem::replace(&mut self.channel, new);
            old.close(&mut cx.io);
            old
        })
    }
}
