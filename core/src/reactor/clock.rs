//! Time and chance as a reactor sees them: the processor's counter in the daemon, a virtual clock in the simulator.
//!
//! **Invariant:** nothing on a reactor reads time or randomness from anywhere else, so a simulation is repeatable.
#![expect(unsafe_code)] // UNSAFETY: the RDTSC intrinsic.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The processor's time-stamp counter, calibrated against the monotonic clock once per process.
#[derive(Clone, Copy, Debug)]
struct Calibration {
    ticks_per_sec: u64,
    /// Nanoseconds per tick, times 2^32.
    ns_per_tick_q32: u64,
    origin_ticks: u64,
}

fn raw_ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: RDTSC exists on every x86-64 processor and has no preconditions.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static ORIGIN: OnceLock<Instant> = OnceLock::new();
        u64::try_from(ORIGIN.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

fn calibration() -> Calibration {
    static CALIBRATION: OnceLock<Calibration> = OnceLock::new();
    *CALIBRATION.get_or_init(|| {
        // 5 ms give a rate that is exact to about 20 ppm, which is all that latencies and tick rates need.
        let (start, ticks) = (Instant::now(), raw_ticks());
        while start.elapsed() < Duration::from_millis(5) {
            std::hint::spin_loop();
        }
        let elapsed_ticks = raw_ticks().wrapping_sub(ticks);
        let elapsed_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        let ticks_per_sec = u128::from(elapsed_ticks) * 1_000_000_000 / u128::from(elapsed_ns);
        let ticks_per_sec = u64::try_from(ticks_per_sec).unwrap_or(1_000_000_000).max(1);
        let ns_per_tick = (u128::from(1_000_000_000u64) << 32) / u128::from(ticks_per_sec);
        Calibration {
            ticks_per_sec,
            ns_per_tick_q32: u64::try_from(ns_per_tick).unwrap_or(u64::MAX),
            origin_ticks: ticks,
        }
    })
}

/// Where time comes from.
#[derive(Clone, Debug)]
pub struct Clock {
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Tsc(Calibration),
    Virtual { now_ns: u64 },
}

impl Clock {
    /// The machine's clock. The first call of a process takes 5 ms to calibrate.
    #[must_use]
    pub fn real() -> Clock {
        Clock { source: Source::Tsc(calibration()) }
    }

    /// A clock that stands still until it is advanced.
    #[must_use]
    pub fn simulated() -> Clock {
        Clock { source: Source::Virtual { now_ns: 0 } }
    }

    /// Nanoseconds since some fixed moment; never goes back.
    #[inline]
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        match &self.source {
            Source::Tsc(c) => {
                let ticks = raw_ticks().wrapping_sub(c.origin_ticks);
                let ns = (u128::from(ticks) * u128::from(c.ns_per_tick_q32)) >> 32;
                #[expect(clippy::cast_possible_truncation, reason = "584 years of uptime fit")]
                let ns = ns as u64;
                ns
            }
            Source::Virtual { now_ns } => *now_ns,
        }
    }

    /// Moves a simulated clock; a real one cannot be moved and ignores it.
    pub fn advance_ns(&mut self, by_ns: u64) {
        if let Source::Virtual { now_ns } = &mut self.source {
            *now_ns = now_ns.saturating_add(by_ns);
        }
    }
}

/// Ticks per second of the machine's time-stamp counter.
#[must_use]
pub fn tick_rate() -> u64 {
    calibration().ticks_per_sec
}

/// The time-stamp counter now.
#[must_use]
pub fn ticks_now() -> u64 {
    raw_ticks()
}

/// Converts nanoseconds to ticks.
#[must_use]
pub fn ns_to_ticks(ns: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(calibration().ticks_per_sec) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// A small seeded generator (SplitMix64): for jitter and simulations, never for secrets.
#[derive(Clone, Debug)]
pub struct Entropy {
    state: u64,
}

impl Entropy {
    /// A generator that repeats for the same seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Entropy {
        Entropy { state: seed }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (0 for bound 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next_u64() % bound }
    }
}
