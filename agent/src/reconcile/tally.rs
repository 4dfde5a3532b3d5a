//! What all passes together did and took.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Report;
use crate::check::Driver;
use crate::metrics::Histogram;

/// From a pass that finds nothing to do, to one that waits for a device that does not answer.
const BOUNDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// The sums since the agent started.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) durations: Histogram,
    pub(crate) changes: BTreeMap<Driver, u64>,
    pub(crate) failures: BTreeMap<Driver, u64>,
}

impl Tally {
    /// Nothing yet, of each driver.
    pub(crate) fn new() -> Self {
        let nothing = BTreeMap::from(Driver::ALL.map(|driver| (driver, 0)));
        Self {
            durations: Histogram::new(BOUNDS),
            changes: nothing.clone(),
            failures: nothing,
        }
    }

    /// Adds what one pass did.
    pub(super) fn add(&mut self, report: &Report, took: Duration) {
        self.durations.observe(took);
        for (driver, _) in &report.changes {
            *self.changes.entry(*driver).or_default() += 1;
        }
        for (driver, _) in &report.failures {
            *self.failures.entry(*driver).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn passes_add_up_by_driver() {
        let mut tally = Tally::new();
        let mut report = Report::default();
        report.note(Driver::Gate, &"attach", Ok(()));
        report.note(Driver::Routing, &"route", Ok(()));
        report.note(Driver::Routing, &"rule", Err(anyhow!("dark")));
        report.fail(Driver::Look, &anyhow!("dark"));

        tally.add(&report, Duration::from_millis(7));
        tally.add(&report, Duration::from_millis(8));

        let counted = |counts: &BTreeMap<Driver, u64>| -> Vec<(&str, u64)> {
            counts.iter().map(|(driver, count)| (driver.name(), *count)).collect()
        };
        assert_eq!(
            counted(&tally.changes),
            [
                ("look", 0),
                ("gate", 2),
                ("tunnel", 0),
                ("overlay", 0),
                ("routing", 2),
                ("cni", 0),
                ("keys", 0)
            ]
        );
        assert_eq!(
            counted(&tally.failures),
            [
                ("look", 2),
                ("gate", 0),
                ("tunnel", 0),
                ("overlay", 0),
                ("routing", 2),
                ("cni", 0),
                ("keys", 0)
            ]
        );
        assert_eq!(
            (tally.durations.count(), tally.durations.sum()),
            (2, Duration::from_millis(15))
        );
    }
}
