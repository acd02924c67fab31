//! Shadow doorbells (Base 2.0 §5.8, doorbell buffer config): tails and heads in memory, doorbells only when asked for.
//!
//! Flow: while a queue is busy its tail is polled in the shadow page; once it has been quiet, the event index says that the
//! doorbell is wanted, and only the doorbell wakes it. So a driver that rings too seldom stands still, as with a real
//! device. Owner: the model's thread.

use std::sync::atomic::{Ordering, fence};

use ringmill_core::mem::SharedSlice;

use super::counters::Count;
use super::dma::Reach;
use super::link::Link;
use super::machine::Machine;
use super::queue::Sq;

/// What no driver writes: so a doorbell is seen even when it is the old value.
const NOT_RUNG: u32 = u32::MAX;

/// The two pages.
#[derive(Debug)]
pub(super) struct Shadow {
    iovas: (u64, u64),
    page_bytes: usize,
    shift: u32,
    doorbells: Option<SharedSlice>,
    events: Option<SharedSlice>,
}

impl Shadow {
    pub(super) fn new(
        doorbells: u64,
        events: u64,
        page_bytes: usize,
        shift: u32,
        reach: &Reach,
    ) -> Option<Shadow> {
        let mut shadow =
            Shadow { iovas: (doorbells, events), page_bytes, shift, doorbells: None, events: None };
        shadow.attach(reach);
        (shadow.doorbells.is_some() && shadow.events.is_some()).then_some(shadow)
    }

    /// Looks the pages up in a new table; true when one was there, and is not any more.
    pub(super) fn attach(&mut self, reach: &Reach) -> bool {
        let were = (self.doorbells.is_some(), self.events.is_some());
        self.doorbells = reach.window(self.iovas.0, self.page_bytes);
        self.events = reach.window(self.iovas.1, self.page_bytes);
        were.0 && self.doorbells.is_none() || were.1 && self.events.is_none()
    }

    /// Says something else than the truth about a queue's event indices.
    pub(super) fn lie(&self, queue: u16, is_completion: bool, value: u32) {
        if let (Some(events), Some(at)) = (&self.events, self.at(queue, is_completion)) {
            events.store_u32(at, value, Ordering::Release);
        }
    }

    fn at(&self, queue: u16, is_completion: bool) -> Option<usize> {
        let at = (2 * usize::from(queue) + usize::from(is_completion)) << self.shift;
        (at < self.page_bytes).then_some(at)
    }

    pub(super) fn load(&self, queue: u16, is_completion: bool) -> Option<u32> {
        let at = self.at(queue, is_completion)?;
        Some(self.doorbells.as_ref()?.load_u32(at, Ordering::Acquire))
    }

    /// The tail of a submission queue: of the shadow while awake, and when the doorbell rang.
    #[inline]
    pub(super) fn tail(&self, sq: &mut Sq, queue: u16, link: &Link) -> u32 {
        if !sq.shadow_awake {
            let rung = link.bar.load_u32(sq.doorbell, Ordering::Acquire);
            if rung == NOT_RUNG {
                return sq.tail;
            }
            sq.shadow_awake = true;
            link.counters.add(Count::Doorbells, 1);
        }
        self.load(queue, false).unwrap_or(sq.tail)
    }

    /// The head of a completion queue.
    #[inline]
    pub(super) fn head(&self, queue: u16, link: &Link) -> u32 {
        let rung = || link.bar.load_u32(link.doorbell(queue, true), Ordering::Acquire);
        self.load(queue, true).unwrap_or_else(rung)
    }

    /// Asks for the doorbell of a quiet queue.
    fn sleep(&self, sq: &mut Sq, queue: u16, link: &Link) {
        let (Some(events), Some(at)) = (&self.events, self.at(queue, false)) else { return };
        link.bar.store_u32(sq.doorbell, NOT_RUNG, Ordering::Release);
        events.store_u32(at, sq.tail, Ordering::Release);
        // Pairs with the driver's fence between the shadow's tail and the event index: one of us sees the other.
        fence(Ordering::SeqCst);
        sq.shadow_awake = self.load(queue, false).is_some_and(|tail| tail != sq.tail);
    }
}

impl Machine {
    /// Lets the queues of a quiet controller wait for their doorbells.
    pub(super) fn sleep_shadows(&mut self) {
        let Some(shadow) = &self.admin.shadow else { return };
        for &id in &self.active {
            if let Some(sq) =
                self.sqs[usize::from(id)].as_mut().filter(|sq| id > 0 && sq.shadow_awake)
            {
                shadow.sleep(sq, id, &self.link);
            }
        }
    }
}
