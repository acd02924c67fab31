//! HOT PATH
//! Which queue may move how much in one pass: deficit round robin in bytes between the queues of one reactor.
//!
//! Flow: a worker's poll begins → credit → the worker takes that much, the channel that moves data itself spends it →
//! the poll ends; what was moved beyond the credit is owed in the next. Owner: one reactor. **Invariant:** nobody saves
//! credit; a queue with nothing in flight may always start one request; who drives a channel without a worker has no
//! bound here.
//!
//! A *light* queue has asked for next to nothing and got all of it: its guest waits for this one answer. Only while
//! there was one lately do the others go in small pieces; among equals large ones are as fair and cost less.
//!
//! begin: credit = quantum - debt → intake_bytes, spend… → end: debt += what was spent beyond the credit

use crate::limits::{
    FAIR_ALONE_BYTES, FAIR_HOLD_NS, FAIR_INFLIGHT_ALONE_BYTES, FAIR_INFLIGHT_BYTES,
    FAIR_LIGHT_BYTES, FAIR_PASS_BYTES, FAIR_PIECE_BYTES, FAIR_QUANTUM_BYTES, PASS_BYTES_MAX,
};

/// One queue's side of it.
#[derive(Debug, Default)]
pub struct Share {
    id: u32,
    /// Moved beyond the credit of earlier polls.
    debt_bytes: u64,
    /// Data of requests that the channel has.
    inflight_bytes: u64,
}

/// The reactor's side of it.
#[derive(Debug)]
pub struct Fair {
    /// What may still be moved in the poll under way.
    credit_bytes: u64,
    /// What was moved beyond that.
    over_bytes: u64,
    /// Another queue than the one being polled was light lately.
    shared: bool,
    /// The queue that was light last, until when that counts, and until when it counts for any other one.
    light_id: u32,
    light_until_ns: u64,
    other_until_ns: u64,
    /// Data of requests that channels have, over all queues.
    inflight_bytes: u64,
    last_id: u32,
}

impl Default for Fair {
    fn default() -> Fair {
        Fair {
            credit_bytes: u64::MAX,
            over_bytes: 0,
            shared: false,
            light_id: 0,
            light_until_ns: 0,
            other_until_ns: 0,
            inflight_bytes: 0,
            last_id: 0,
        }
    }
}

impl Fair {
    /// A queue comes to this reactor; it brings neither debts nor requests in flight.
    #[must_use]
    #[cold]
    pub fn join(&mut self) -> Share {
        // After 2^32 queues two could have one number: each would then not count as another one for the other.
        self.last_id = self.last_id.wrapping_add(1).max(1);
        Share { id: self.last_id, debt_bytes: 0, inflight_bytes: 0 }
    }

    /// A queue leaves.
    #[cold]
    pub fn leave(&mut self, share: &mut Share) {
        self.ended(share, share.inflight_bytes);
        *share = Share::default();
    }

    /// A queue's poll begins.
    #[inline]
    pub fn begin(&mut self, share: &mut Share, now_ns: u64) {
        self.shared = self.is_shared(share, now_ns);
        let quantum_bytes = match self.shared {
            false => FAIR_ALONE_BYTES,
            // Who has little in flight may move all of that at once.
            true if share.inflight_bytes <= FAIR_LIGHT_BYTES => FAIR_LIGHT_BYTES,
            true => FAIR_QUANTUM_BYTES,
        };
        self.credit_bytes = quantum_bytes.saturating_sub(share.debt_bytes);
        share.debt_bytes = share.debt_bytes.saturating_sub(quantum_bytes);
    }

    /// … and ends: what is left of its credit is gone, what it moved beyond is owed.
    #[inline]
    pub fn end(&mut self, share: &mut Share) {
        share.debt_bytes += std::mem::take(&mut self.over_bytes);
        self.credit_bytes = u64::MAX;
        self.shared = false;
    }

    #[inline]
    fn is_shared(&self, share: &Share, now_ns: u64) -> bool {
        let is_last = self.light_id == share.id;
        now_ns < if is_last { self.other_until_ns } else { self.light_until_ns }
    }

    /// What this queue may add to its data in flight: as with every shared pool, one that holds data gets
    /// more only while it holds less than is left.
    #[inline]
    fn headroom_bytes(&self, share: &Share, shared: bool) -> u64 {
        let all_bytes = if shared { FAIR_INFLIGHT_BYTES } else { FAIR_INFLIGHT_ALONE_BYTES };
        let left_bytes = all_bytes.saturating_sub(self.inflight_bytes);
        let more_bytes = left_bytes.saturating_sub(share.inflight_bytes);
        if share.inflight_bytes == 0 { more_bytes.max(1) } else { more_bytes }
    }

    /// Data of the requests that this queue may start in this poll; the last one may go beyond. `room_bytes`: what its
    /// channel would move.
    #[inline]
    #[must_use]
    pub fn intake_bytes(&self, share: &Share, room_bytes: u64) -> u64 {
        let pass_bytes = if self.shared { FAIR_PASS_BYTES } else { PASS_BYTES_MAX };
        pass_bytes.min(room_bytes).min(self.headroom_bytes(share, self.shared))
    }

    /// True while the queue may start nothing before something of it ends.
    #[inline]
    #[must_use]
    pub fn holds_back(&self, share: &Share, now_ns: u64) -> bool {
        self.headroom_bytes(share, self.is_shared(share, now_ns)) == 0
    }

    /// The channel has taken requests with this much data.
    #[inline]
    pub fn started(&mut self, share: &mut Share, bytes: u64) {
        share.inflight_bytes += bytes;
        self.inflight_bytes += bytes;
    }

    /// The channel has handed them back.
    #[inline]
    pub fn ended(&mut self, share: &mut Share, bytes: u64) {
        share.inflight_bytes -= bytes;
        self.inflight_bytes -= bytes;
    }

    /// The queue has got all that it asked for: notes it if that was little.
    #[inline]
    pub fn served_all(&mut self, share: &Share, now_ns: u64) {
        if share.inflight_bytes > FAIR_LIGHT_BYTES {
            return;
        }
        if self.light_id != share.id {
            self.other_until_ns = self.light_until_ns;
            self.light_id = share.id;
        }
        self.light_until_ns = now_ns + FAIR_HOLD_NS;
    }

    /// What a channel that moves data on this core may move in this call; 0: nothing before the next poll.
    #[inline]
    #[must_use]
    pub fn credit_bytes(&self) -> u64 {
        self.credit_bytes
    }

    /// The longest piece of one request, a multiple of every block; it may be longer than the credit that is left.
    #[inline]
    #[must_use]
    pub fn piece_bytes(&self) -> u64 {
        if self.shared { FAIR_PIECE_BYTES } else { FAIR_ALONE_BYTES }
    }

    /// Data was moved, or is about to be before the pass ends.
    #[inline]
    pub fn spend(&mut self, bytes: u64) {
        let paid_bytes = bytes.min(self.credit_bytes);
        self.credit_bytes -= paid_bytes;
        self.over_bytes += bytes - paid_bytes;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A queue with more in flight than a light one.
    fn busy(fair: &mut Fair) -> Share {
        let mut share = fair.join();
        fair.started(&mut share, FAIR_LIGHT_BYTES + 1);
        share
    }

    /// Polls once as a queue that moves pieces of `piece_bytes` while it may; what it moved.
    fn poll(fair: &mut Fair, share: &mut Share, now_ns: u64, piece_bytes: u64) -> u64 {
        fair.begin(share, now_ns);
        let mut moved = 0;
        while fair.credit_bytes() > 0 && moved < 8 * FAIR_ALONE_BYTES {
            fair.spend(piece_bytes);
            moved += piece_bytes;
        }
        fair.end(share);
        moved
    }

    #[test]
    fn a_hog_goes_in_small_pieces_only_beside_a_light_queue() {
        let mut fair = Fair::default();
        let (mut hog, mut small) = (busy(&mut fair), fair.join());
        assert_eq!(poll(&mut fair, &mut hog, 1, 4096), FAIR_ALONE_BYTES);
        // Its own light moments do not count against it.
        fair.served_all(&hog, 1);
        assert_eq!(poll(&mut fair, &mut hog, 2, 4096), FAIR_ALONE_BYTES);
        fair.served_all(&small, 10);
        assert_eq!(poll(&mut fair, &mut hog, 10, 4096), FAIR_QUANTUM_BYTES);
        assert_eq!(poll(&mut fair, &mut hog, 9 + FAIR_HOLD_NS, 4096), FAIR_QUANTUM_BYTES);
        assert_eq!(poll(&mut fair, &mut hog, 10 + FAIR_HOLD_NS, 4096), FAIR_ALONE_BYTES);
        // Who wants much is not light, however often it gets all of it.
        fair.started(&mut small, FAIR_LIGHT_BYTES + 1);
        fair.served_all(&small, 1 << 40);
        assert_eq!(poll(&mut fair, &mut hog, 1 << 40, 4096), FAIR_ALONE_BYTES);
    }

    #[test]
    fn the_last_light_queue_minds_the_one_before_it() {
        let mut fair = Fair::default();
        let (mut a, mut b) = (fair.join(), fair.join());
        fair.served_all(&a, 5);
        fair.served_all(&b, 6);
        fair.served_all(&b, 7);
        assert_eq!(poll(&mut fair, &mut b, 4 + FAIR_HOLD_NS, 4096), FAIR_LIGHT_BYTES);
        assert_eq!(poll(&mut fair, &mut b, 5 + FAIR_HOLD_NS, 4096), FAIR_ALONE_BYTES);
        assert_eq!(poll(&mut fair, &mut a, 6 + FAIR_HOLD_NS, 4096), FAIR_LIGHT_BYTES);
        assert_eq!(poll(&mut fair, &mut a, 7 + FAIR_HOLD_NS, 4096), FAIR_ALONE_BYTES);
    }

    #[test]
    fn what_was_moved_beyond_the_credit_is_owed_and_nothing_is_saved() {
        let mut fair = Fair::default();
        let (mut hog, small) = (busy(&mut fair), fair.join());
        fair.served_all(&small, 0);
        // Polls without anything to do save nothing.
        for _ in 0..100 {
            poll(&mut fair, &mut hog, 1, FAIR_ALONE_BYTES * 8);
            fair.begin(&mut hog, 1);
            fair.end(&mut hog);
        }
        let mut hog = busy(&mut fair);
        for _ in 0..100 {
            fair.begin(&mut hog, 1);
            fair.end(&mut hog);
        }
        assert_eq!(poll(&mut fair, &mut hog, 1, FAIR_PIECE_BYTES), FAIR_PIECE_BYTES);
        for _ in 1..FAIR_PIECE_BYTES / FAIR_QUANTUM_BYTES {
            assert_eq!(poll(&mut fair, &mut hog, 1, FAIR_PIECE_BYTES), 0, "it owes some quanta");
        }
        assert_eq!(poll(&mut fair, &mut hog, 1, FAIR_PIECE_BYTES), FAIR_PIECE_BYTES);
        // A debt is not forgotten by going on with smaller pieces.
        for _ in 1..FAIR_PIECE_BYTES / FAIR_QUANTUM_BYTES {
            assert_eq!(poll(&mut fair, &mut hog, 1, 512), 0);
        }
        assert_eq!(poll(&mut fair, &mut hog, 1, 512), FAIR_QUANTUM_BYTES);
    }

    #[test]
    fn data_in_flight_is_shared_and_everybody_gets_one_request() {
        let mut fair = Fair::default();
        let (mut hog, mut other, mut small) = (fair.join(), fair.join(), fair.join());
        let (first, second) = (fair.join(), fair.join());
        fair.served_all(&first, 0);
        fair.served_all(&second, 0);
        let fill = |fair: &mut Fair, share: &mut Share| {
            let mut taken = 0;
            loop {
                fair.begin(share, 1);
                let bytes = fair.intake_bytes(share, u64::MAX);
                assert_eq!(bytes == 0, fair.holds_back(share, 1));
                if bytes == 0 {
                    fair.end(share);
                    return taken;
                }
                assert!(bytes <= FAIR_PASS_BYTES);
                fair.started(share, 1 << 16);
                fair.end(share);
                taken += 1u64 << 16;
            }
        };
        assert_eq!(fill(&mut fair, &mut hog), FAIR_INFLIGHT_BYTES / 2);
        assert_eq!(fill(&mut fair, &mut other), FAIR_INFLIGHT_BYTES / 4);
        fair.started(&mut hog, FAIR_INFLIGHT_BYTES);
        fair.begin(&mut small, 1);
        assert_eq!(fair.intake_bytes(&small, u64::MAX), 1, "one request always may start");
        fair.end(&mut small);
        fair.leave(&mut hog);
        fair.leave(&mut other);
        assert_eq!(fair.inflight_bytes, 0);
        // Alone, only the channel and the bound of a pass count.
        fair.begin(&mut hog, u64::MAX);
        assert_eq!(fair.intake_bytes(&hog, u64::MAX), PASS_BYTES_MAX);
        assert_eq!(fair.intake_bytes(&hog, 5), 5);
        fair.end(&mut hog);
        // But not without end: who wakes up later has to wait behind it.
        fair.started(&mut hog, FAIR_INFLIGHT_ALONE_BYTES / 2);
        assert!(fair.holds_back(&hog, u64::MAX) && !fair.holds_back(&other, u64::MAX));
        fair.begin(&mut hog, u64::MAX);
        assert_eq!(fair.intake_bytes(&hog, u64::MAX), 0);
    }

    #[test]
    fn without_a_worker_there_is_no_bound() {
        let mut fair = Fair::default();
        for _ in 0..100 {
            fair.spend(1 << 30);
        }
        assert!(fair.credit_bytes() > 1 << 40 && fair.piece_bytes() == FAIR_ALONE_BYTES);
    }

    proptest! {
        /// Whatever the sizes of their pieces, two busy queues move the same number of bytes, give or take one piece,
        /// and no poll moves more than a quantum and a piece.
        #[test]
        fn busy_queues_get_the_same(
            sizes in (1u64..200_000, 1u64..200_000),
            polls in 50u64..400,
        ) {
            let mut fair = Fair::default();
            let light = fair.join();
            fair.served_all(&light, 0);
            let (one, other) = (busy(&mut fair), busy(&mut fair));
            let mut queues = [(one, sizes.0, 0), (other, sizes.1, 0)];
            for _ in 0..polls {
                for (share, piece_bytes, sum) in &mut queues {
                    let moved = poll(&mut fair, share, 1, *piece_bytes);
                    prop_assert!(moved < FAIR_QUANTUM_BYTES + *piece_bytes);
                    *sum += moved;
                }
            }
            for (_, piece_bytes, sum) in &queues {
                let fair_bytes = polls * FAIR_QUANTUM_BYTES;
                prop_assert!(*sum >= fair_bytes && *sum < fair_bytes + piece_bytes, "{sum} {fair_bytes}");
            }
        }
    }
}
