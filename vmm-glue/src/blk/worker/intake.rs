//! HOT PATH
//! From the ring to the channel: what one poll takes in.
//!
//! Owner: one worker, within one poll. **Invariant:** entries that were popped are handed over, answered or put back to
//! the ring, in ring order: all up to the first one that the channel did not take, none after it.
//!
//! intake:
//!   prefetch the descriptors of all → pop each (fetches its header and status) → parse each → submit → put back the rest
//!
//! Two loops instead of one: while one chain is walked, the header and status lines of those before it are on their way
//! from the guest's processor, which takes longer than all the work on one request.

use arrayvec::ArrayVec;
use ringmill_core::limits::BATCH_REQUESTS_MAX;
use ringmill_core::reactor::ReactorCx;

use crate::blk::request::{Parsed, parse};
use crate::virtq::{Chain, QueueError, Virtqueue};

use super::answer::Answer;
use super::{InFlight, QueueWorker, Tracking, written};

/// A chain on its way to the channel.
struct Popped {
    chain: Chain,
    seen_ns: u64,
    /// For one that needs no device.
    answer: Option<Answer>,
}

type PoppedList = ArrayVec<Popped, BATCH_REQUESTS_MAX>;

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    /// Takes what there is room for; true when there was anything to take.
    pub(super) fn intake(&mut self, cx: &mut ReactorCx) -> Result<bool, QueueError> {
        let available = self.parts.queue.available()?;
        if available == 0 {
            return Ok(false);
        }
        self.parts.queue.suppress_kicks();
        self.arrivals.note(available, cx.pass_ns);
        let room = self.parts.channel.room(&cx.io);
        let bytes_max = cx.io.fair.intake_bytes(&self.share, room.bytes);
        if bytes_max == 0 {
            // Debts are paid by polling on; room in flight comes with a completion.
            return Ok(room.bytes == 0);
        }
        let room = room.requests.min(self.slots.room()).min(BATCH_REQUESTS_MAX);
        let mut list = PoppedList::new();
        cx.batch.clear();
        self.pop_chains(cx, room.min(usize::from(available)), bytes_max, &mut list)?;
        let needs_answers = self.parse_chains(cx, &mut list)?;
        let all = self.submit(cx, &list, needs_answers);
        if all && list.len() == usize::from(available) {
            cx.io.fair.served_all(&self.share, cx.pass_ns);
        }
        Ok(room > 0)
    }

    #[inline]
    fn pop_chains(
        &mut self,
        cx: &mut ReactorCx,
        count: usize,
        bytes_max: u64,
        list: &mut PoppedList,
    ) -> Result<(), QueueError> {
        self.parts.queue.prefetch(count);
        let mut bytes = 0;
        for _ in 0..count {
            let popped =
                self.parts.queue.pop(&self.parts.mem, &mut self.mem_hint, &mut cx.batch)?;
            let Some(chain) = popped else { break };
            if let Some(header) = cx.batch.segment(chain.segments_at) {
                header.prefetch();
            }
            chain.status.prefetch_for_write();
            self.mark_taken(chain.head)?;
            let seen_ns = self.arrivals.take(cx.pass_ns);
            bytes += chain.data_bytes();
            list.push(Popped { chain, seen_ns, answer: None });
            if bytes >= bytes_max {
                break;
            }
        }
        Ok(())
    }

    /// Fills the batch; true when there are chains that need no device.
    #[inline]
    fn parse_chains(
        &mut self,
        cx: &mut ReactorCx,
        list: &mut PoppedList,
    ) -> Result<bool, QueueError> {
        let size_bytes = self.parts.device.info().size_bytes();
        let mut needs_answers = false;
        for Popped { chain, seen_ns, answer } in list.iter_mut() {
            match parse(chain, &mut cx.batch, &self.parts.device, size_bytes)? {
                Parsed::Io(mut request) => {
                    let slot = InFlight {
                        head: chain.head,
                        op: request.op,
                        written_bytes: written(chain),
                        status: chain.status,
                        bytes: request.len_bytes,
                        seen_ns: *seen_ns,
                        submitted_ns: cx.pass_ns,
                    };
                    let Ok(tag) = self.slots.insert(slot) else {
                        // Never: no more were popped than slots were free.
                        needs_answers = true;
                        *answer = Some(self.prepare_answer(cx, &Parsed::Io(request)));
                        continue;
                    };
                    request.tag = tag;
                    cx.batch.push(request);
                }
                other => {
                    needs_answers = true;
                    *answer = Some(self.prepare_answer(cx, &other));
                }
            }
        }
        Ok(needs_answers)
    }

    /// Hands the batch to the channel in one call; true when all of it was taken.
    #[inline]
    fn submit(&mut self, cx: &mut ReactorCx, list: &PoppedList, needs_answers: bool) -> bool {
        let mut taken = 0;
        if !cx.batch.is_empty() {
            taken = self.parts.channel.submit(&mut cx.io, cx.batch.view());
            // One clock read for the whole batch: it was handed over in one call.
            let now_ns = cx.io.clock.now_ns();
            let mut data_bytes = 0;
            for request in &cx.batch.view().requests()[..taken] {
                data_bytes += request.op.data_bytes(request.len_bytes);
                if let Some(slot) = self.slots.get_mut(request.tag) {
                    slot.submitted_ns = now_ns;
                }
            }
            cx.io.fair.started(&mut self.share, data_bytes);
        }
        let all = taken == cx.batch.len();
        if needs_answers || !all {
            self.settle(cx, list, taken);
        }
        cx.batch.clear();
        all
    }

    /// Answers the chains that need no device, up to the first request that the channel did not take; that one and all
    /// after it go back to the ring and keep the time at which they were seen.
    #[cold]
    #[inline(never)]
    fn settle(&mut self, cx: &mut ReactorCx, list: &PoppedList, taken: usize) {
        let mut requests_count = 0;
        let mut handed_count = 0;
        for popped in list {
            match &popped.answer {
                Some(answer) => self.answer(cx, &popped.chain, popped.seen_ns, answer),
                None if requests_count == taken => break,
                None => requests_count += 1,
            }
            handed_count += 1;
        }
        for request in &cx.batch.view().requests()[taken..] {
            self.slots.remove(request.tag);
        }
        for popped in list[handed_count..].iter().rev() {
            self.unmark(popped.chain.head);
            self.parts.tracking.put_back(popped.chain.head);
            self.parts.queue.unpop(popped.chain.head);
            self.arrivals.put_back(popped.seen_ns);
        }
    }
}
