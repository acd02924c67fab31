//! What a verified sector contains: where it belongs, how often it was written, and a checksum over all of it.
//!
//! A sector is a function of seed, place and generation, so the expected bytes can always be made again. When other
//! bytes came, the stamp in them tells what they are: an older version, another place's data, or no stamp at all.

use std::fmt;

use ringmill_core::reactor::Entropy;

/// Bytes of a stamped sector.
pub(crate) const STAMP_BYTES: usize = 512;
const WORDS: usize = STAMP_BYTES / 8;
const MAGIC: u64 = 0x7266_7065_726d_6c67;
const MAGIC_AT: usize = 0;
const OFFSET_AT: usize = 1;
const GENERATION_AT: usize = 2;
const SEED_AT: usize = 3;
const CHECKSUM_AT: usize = WORDS - 1;

/// What one sector is stamped with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) seed: u64,
    pub(crate) offset_bytes: u64,
    pub(crate) generation: u32,
}

/// What is wrong with a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// A whole sector of this place, but another version.
    Stale { generation: u32 },
    /// A whole sector that belongs elsewhere.
    Misplaced { offset_bytes: u64, generation: u32 },
    /// A whole sector of a load with another seed.
    Foreign { seed: u64 },
    /// No whole sector; the first wrong byte, and how many are wrong.
    Corrupt { first_byte: usize, count: usize },
}

/// A sector that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) expected: Stamp,
    pub(crate) damage: Damage,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { offset_bytes, generation, .. } = self.expected;
        write!(f, "byte {offset_bytes}: ")?;
        match self.damage {
            Damage::Stale { generation: got } if got < generation => {
                write!(f, "stale data, generation {got} instead of {generation}")
            }
            Damage::Stale { generation: got } => {
                write!(f, "generation {got}, but {generation} was expected")
            }
            Damage::Misplaced { offset_bytes: from, generation: got } => {
                write!(f, "misplaced data of byte {from}, generation {got}")
            }
            Damage::Foreign { seed } => write!(f, "data of a load with seed {seed}"),
            Damage::Corrupt { first_byte, count } => {
                write!(
                    f,
                    "corrupt, {count} of {STAMP_BYTES} bytes differ, the first at +{first_byte}"
                )
            }
        }
    }
}

fn checksum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(MAGIC, |sum, word| (sum ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25).rotate_left(29))
}

fn word(sector: &[u8], at: usize) -> u64 {
    sector[8 * at..8 * at + 8].try_into().map_or(0, u64::from_le_bytes)
}

impl Stamp {
    /// Fills a sector.
    pub(crate) fn write(self, sector: &mut [u8]) {
        let Stamp { seed, offset_bytes, generation } = self;
        let key = seed ^ offset_bytes.rotate_left(17) ^ (u64::from(generation) << 40);
        let mut entropy = Entropy::seeded(key);
        let mut words = [0u64; WORDS];
        words.fill_with(|| entropy.next_u64());
        words[MAGIC_AT] = MAGIC;
        words[OFFSET_AT] = offset_bytes;
        words[GENERATION_AT] = u64::from(generation);
        words[SEED_AT] = seed;
        words[CHECKSUM_AT] = checksum(words[..CHECKSUM_AT].iter().copied());
        for (bytes, word) in sector.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// What is wrong with `got`, which differs from `expected`, this stamp's own sector.
    #[cold]
    pub(crate) fn diagnose(self, expected: &[u8], got: &[u8]) -> Fault {
        let whole = word(got, MAGIC_AT) == MAGIC
            && word(got, CHECKSUM_AT) == checksum((0..CHECKSUM_AT).map(|at| word(got, at)));
        let generation = u32::try_from(word(got, GENERATION_AT)).unwrap_or(u32::MAX);
        let (offset_bytes, seed) = (word(got, OFFSET_AT), word(got, SEED_AT));
        let damage = if whole && seed != self.seed {
            Damage::Foreign { seed }
        } else if whole && offset_bytes != self.offset_bytes {
            Damage::Misplaced { offset_bytes, generation }
        } else if whole && generation != self.generation {
            Damage::Stale { generation }
        } else {
            let differs = |at: &usize| expected[*at] != got[*at];
            let wrong = || (0..STAMP_BYTES).filter(differs);
            Damage::Corrupt { first_byte: wrong().next().unwrap_or(0), count: wrong().count() }
        };
        Fault { expected: self, damage }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { seed: 7, offset_bytes: 8192, generation: 3 };

    fn sector(stamp: Stamp) -> Vec<u8> {
        let mut bytes = vec![0; STAMP_BYTES];
        stamp.write(&mut bytes);
        bytes
    }

    fn diagnosis(got: &[u8]) -> String {
        STAMP.diagnose(&sector(STAMP), got).to_string()
    }

    #[test]
    fn each_kind_of_damage_is_told_apart() {
        let other = |stamp| diagnosis(&sector(stamp));
        assert_eq!(
            other(Stamp { generation: 2, ..STAMP }),
            "byte 8192: stale data, generation 2 instead of 3"
        );
        assert_eq!(
            other(Stamp { offset_bytes: 512, generation: 9, ..STAMP }),
            "byte 8192: misplaced data of byte 512, generation 9"
        );
        assert_eq!(other(Stamp { seed: 8, ..STAMP }), "byte 8192: data of a load with seed 8");
        let mut broken = sector(STAMP);
        broken[100] ^= 1;
        broken[511] ^= 1;
        assert_eq!(
            diagnosis(&broken),
            "byte 8192: corrupt, 2 of 512 bytes differ, the first at +100"
        );
        assert!(diagnosis(&[0; STAMP_BYTES]).contains("bytes differ, the first at +0"));
    }

    #[test]
    fn a_torn_sector_is_corrupt_not_stale() {
        let mut torn = sector(STAMP);
        torn[..256].copy_from_slice(&sector(Stamp { generation: 2, ..STAMP })[..256]);
        assert!(diagnosis(&torn).contains("corrupt"));
    }
}
