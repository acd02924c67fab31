//! Chance for simulations and property tests: core's seeded generator with the questions that a model asks.
//!
//! **Invariant:** the answers depend on the seed and the order of questions alone.

use ringmill_core::reactor::Entropy;
use ringmill_core::units::{bytes_u64, usize_of};

/// A seeded source of decisions.
#[derive(Clone, Debug)]
pub struct Dice {
    entropy: Entropy,
}

impl Dice {
    /// The same seed and stream answer the same.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Dice {
        let mut mix = Entropy::seeded(seed ^ stream.wrapping_mul(0xa24b_aed4_963e_e407));
        Dice { entropy: Entropy::seeded(mix.next_u64()) }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.entropy.next_u64()
    }

    /// A number below `bound`; 0 for bound 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.entropy.below(bound)
    }

    /// An index below `len`; 0 for length 0.
    pub fn index(&mut self, len: usize) -> usize {
        usize_of(self.below(bytes_u64(len)))
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.index(high - low + 1)
    }

    /// True with a probability of `per_mille` in 1,000.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// One of the choices; they must not be empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// Fills memory with random bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        for part in out.chunks_mut(8) {
            part.copy_from_slice(&self.bits().to_le_bytes()[..part.len()]);
        }
    }
}
