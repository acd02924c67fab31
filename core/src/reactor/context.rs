//! What a reactor lends to its pollers and channels for the length of one call.
//!
//! Owner: one reactor (or the simulator, or a test that plays reactor). **Invariant:** time, chance, wake-ups and
//! bounce memory are reached only through here.

use crate::io::{Batch, Completions};
use crate::mem::{BouncePool, MappingError, SegmentLists};

use super::{Clock, Entropy, Fair, Ring};

/// The part that channels use.
#[derive(Debug)]
pub struct IoCx {
    /// Time.
    pub clock: Clock,
    /// Chance.
    pub entropy: Entropy,
    /// The reactor's io_uring; `None` in the simulator.
    pub ring: Option<Ring>,
    /// Aligned memory for what a device cannot take as it is.
    pub bounce: BouncePool,
    /// Memory for the segment lists of requests in flight.
    pub lists: SegmentLists,
    /// How much the queue being polled may move.
    pub fair: Fair,
}

/// The whole context.
#[derive(Debug)]
pub struct ReactorCx {
    /// What channels may use.
    pub io: IoCx,
    /// The clock at the start of this pass, nanoseconds.
    pub pass_ns: u64,
    /// Scratch for requests on their way to a channel.
    pub batch: Batch,
    /// Scratch for completions on their way back.
    pub completions: Completions,
}

impl ReactorCx {
    /// A context with the machine's clock.
    ///
    /// # Errors
    /// When the kernel gives no memory for bounce buffers.
    pub fn new(ring: Option<Ring>) -> Result<ReactorCx, MappingError> {
        Self::with_clock(ring, Clock::real(), 0)
    }

    /// A context for simulations: virtual time, seeded chance, no ring.
    ///
    /// # Errors
    /// As for [`ReactorCx::new`].
    pub fn simulated(seed: u64) -> Result<ReactorCx, MappingError> {
        Self::with_clock(None, Clock::simulated(), seed)
    }

    fn with_clock(ring: Option<Ring>, clock: Clock, seed: u64) -> Result<ReactorCx, MappingError> {
        let pass_ns = clock.now_ns();
        Ok(ReactorCx {
            io: IoCx {
                clock,
                entropy: Entropy::seeded(seed),
                ring,
                bounce: BouncePool::new()?,
                lists: SegmentLists::default(),
                fair: Fair::default(),
            },
            pass_ns,
            batch: Batch::new(),
            completions: Completions::new(),
        })
    }

    /// Commits what was queued and sorts what was completed: the device part of a pass.
    pub fn turn_ring(&mut self) -> usize {
        match &mut self.io.ring {
            Some(ring) => {
                ring.commit();
                ring.reap()
            }
            None => 0,
        }
    }
}
