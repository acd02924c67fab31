//! What a reactor lends to its pollers and channels for the length of one call.
//!
//! Owner: one reactor (or the simulator, or a test that plays reactor). **Invariant:** time, chance, wake-ups and
//! bounce memory are reached only through here.

use crate::io::{Batch, Completions};
use crate::mem::{Bounce, BouncePool, MappingError, SegmentLists};

use super::{Clock, DeviceQueues, DeviceSlot, Entropy, Fair, Ring, RingError};

/// The part that channels use.
#[derive(Debug)]
pub struct IoCx {
    /// Time.
    pub clock: Clock,
    /// Chance.
    pub entropy: Entropy,
    /// The reactor's io_uring; `None` in the simulator.
    pub ring: Option<Ring>,
    /// The ring for block devices that are polled, once there is one.
    pub polled: Option<Ring>,
    /// Queues of devices that this reactor drives itself.
    pub devices: DeviceQueues,
    /// Aligned memory for what a device without buffers of its own cannot take as it is.
    pub bounce: BouncePool,
    /// Buffers taken since start, for the "zero copies" proofs and the operator.
    bounces_count: u64,
    /// Memory for the segment lists of requests in flight.
    pub lists: SegmentLists,
    /// How much the queue being polled may move.
    pub fair: Fair,
}

impl IoCx {
    fn bounces_of(&mut self, device: Option<DeviceSlot>) -> &mut BouncePool {
        let IoCx { devices, bounce, .. } = self;
        device.and_then(|slot| devices.bounces(slot)).unwrap_or(bounce)
    }

    /// Takes a bounce buffer for a channel to that device that holds `held` already; see [`BouncePool::take`].
    pub fn take_bounce(&mut self, device: Option<DeviceSlot>, held: usize) -> Option<Bounce> {
        let bounce = self.bounces_of(device).take(held)?;
        self.bounces_count += 1;
        Some(bounce)
    }

    /// Returns it.
    pub fn give_back(&mut self, device: Option<DeviceSlot>, bounce: Bounce) {
        self.bounces_of(device).give_back(bounce);
    }

    /// Buffers taken since start.
    #[must_use]
    pub fn bounces_count(&self) -> u64 {
        self.bounces_count
    }

    /// Buffers of all pools that are in use.
    #[cold]
    pub fn bounces_out_count(&mut self) -> usize {
        self.bounce.out_count() + self.devices.bounces_out_count()
    }

    /// Uses `spare` as the polled ring if there is none yet; gives it back otherwise, to be dropped by a control thread.
    ///
    /// # Errors
    /// When the kernel does not enable it.
    #[cold]
    pub fn use_polled(&mut self, mut spare: Ring) -> Result<Option<Ring>, RingError> {
        if self.polled.is_some() {
            return Ok(Some(spare));
        }
        spare.enable()?;
        self.polled = Some(spare);
        Ok(None)
    }
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
                polled: None,
                devices: DeviceQueues::default(),
                bounce: BouncePool::new()?,
                bounces_count: 0,
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
        let mut count = 0;
        for ring in [&mut self.io.ring, &mut self.io.polled].into_iter().flatten() {
            ring.commit();
            count += ring.reap();
        }
        self.io.devices.commit(self.io.clock.now_ns());
        count
    }
}
