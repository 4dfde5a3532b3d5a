//! What a row leaves to chance: the same again with the same seed.

use std::time::{Duration, SystemTime};

/// A row of numbers that follow from a seed (SplitMix64, by Steele, Lea and Flood).
#[derive(Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    /// The numbers of a seed that are a row's own: adding a row changes no other.
    pub(crate) fn new(seed: u64, row: &str) -> Self {
        let own = row
            .bytes()
            .fold(seed, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        Self(own)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    /// A number below this one, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A while up to this one, so that a fault meets the agent at any place of its passes.
    pub(crate) fn up_to(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.below(1000) as f64 / 1000.0)
    }
}

/// A seed that nobody chose.
pub(crate) fn by_the_clock() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
