//! Durations, counted in buckets.

use std::time::Duration;

/// How many durations were at most as long as each bound.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    /// One for each bound, and one for what is longer than all of them; each counts only what fits into no smaller one.
    counts: Vec<u64>,
    sum: Duration,
}

impl Histogram {
    /// An empty one. The bounds are in seconds, rising.
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: Duration::ZERO,
        }
    }

    /// Counts one duration.
    pub(crate) fn observe(&mut self, duration: Duration) {
        let bucket = self.bounds.partition_point(|bound| *bound < duration.as_secs_f64());
        self.counts[bucket] += 1;
        self.sum = self.sum.saturating_add(duration);
    }

    /// Each bound in seconds, the last one infinite, with how many durations were at most that long.
    pub(crate) fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |total, count| {
            *total += count;
            Some(*total)
        }))
    }

    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How long they were together.
    pub(crate) fn sum(&self) -> Duration {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_from_its_bound_upwards() {
        let mut histogram = Histogram::new(&[0.1, 1.0]);

        for milliseconds in [50, 100, 101, 1000, 5000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }

        assert_eq!(
            histogram.buckets().collect::<Vec<_>>(),
            [(0.1, 2), (1.0, 4), (f64::INFINITY, 5)]
        );
        assert_eq!((histogram.count(), histogram.sum()), (5, Duration::from_millis(6251)));
    }
}
