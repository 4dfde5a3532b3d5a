//! How fast a server is asked: pure arithmetic over instants, so that its promises can be tested without waiting for them.
//!
//! Failures back off from half a second to half a minute, with jitter, and never sooner than the server's `Retry-After`. A complete list is
//! what costs an API server most, so after one was answered the next is not asked for within half a minute, whatever happened.

use std::time::{Duration, Instant};

/// The first wait after a failure.
const SHORTEST: Duration = Duration::from_millis(500);
/// The longest wait after a failure, if the server does not ask for more.
const LONGEST: Duration = Duration::from_secs(30);
/// The least time between two complete lists.
const BETWEEN_LISTS: Duration = Duration::from_secs(30);
/// What a server may ask us to wait at most; beyond that it is more likely a slip than a wish.
const MOST_PATIENCE: Duration = Duration::from_secs(300);

/// When to ask next.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// Failures in a row.
    failures: u32,
    /// No request before this.
    not_before: Instant,
    /// No complete list before this.
    no_list_before: Instant,
}

impl Pace {
    /// The first request may be made at `start`.
    pub(super) fn new(start: Instant) -> Self {
        Self {
            failures: 0,
            not_before: start,
            no_list_before: start,
        }
    }

    /// When the next request may be made.
    pub(super) fn next(&self) -> Instant {
        self.not_before
    }

    /// When the next complete list may be asked for.
    pub(super) fn next_list(&self) -> Instant {
        self.not_before.max(self.no_list_before)
    }

    /// A request was answered as hoped.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// A complete list was answered.
    pub(super) fn listed(&mut self, now: Instant) {
        self.succeeded();
        self.no_list_before = now + BETWEEN_LISTS;
    }

    /// A request failed. `retry_after` is what the server asked for; `chance`, from 0 to 1, spreads those who fail together.
    pub(super) fn failed(&mut self, now: Instant, retry_after: Option<Duration>, chance: f64) {
        let doubled = SHORTEST.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        let whole = doubled.min(LONGEST);
        let backoff = whole / 2 + (whole / 2).mul_f64(chance);
        let asked = retry_after.map_or(Duration::ZERO, |asked| {
            asked.min(MOST_PATIENCE) + SHORTEST.mul_f64(chance)
        });
        self.not_before = now + backoff.max(asked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn failures_back_off_to_half_a_minute_and_a_success_forgives_them() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let mut waits = Vec::new();

        for _ in 0..10 {
            pace.failed(now, None, 1.0);
            waits.push((pace.next() - now).as_millis());
        }
        pace.succeeded();
        pace.failed(now, None, 1.0);

        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000, 30000]);
        assert_eq!(pace.next() - now, SHORTEST);
    }

    #[test]
    fn jitter_takes_away_up_to_half() {
        let now = Instant::now();
        let mut pace = Pace::new(now);

        pace.failed(now, None, 0.0);

        assert_eq!(pace.next() - now, SHORTEST / 2);
    }

    #[test]
    fn a_thousand_failures_wait_no_longer_than_ten() {
        let now = Instant::now();
        let mut pace = Pace::new(now);

        for _ in 0..1000 {
            pace.failed(now, None, 1.0);
        }

        assert_eq!(pace.next() - now, LONGEST);
    }

    #[test]
    fn nobody_comes_back_before_the_server_wants_to_see_them() {
        let now = Instant::now();
        for chance in [0.0, 0.5, 1.0] {
            let mut pace = Pace::new(now);

            pace.failed(now, Some(7 * SECOND), chance);

            let wait = pace.next() - now;
            assert!(wait >= 7 * SECOND && wait <= 8 * SECOND, "{wait:?}");
        }
    }

    #[test]
    fn a_server_cannot_send_us_away_for_good() {
        let now = Instant::now();
        let mut pace = Pace::new(now);

        pace.failed(now, Some(Duration::MAX), 0.0);

        assert_eq!(pace.next() - now, MOST_PATIENCE);
    }

    #[test]
    fn no_second_list_within_half_a_minute_but_a_watch_at_once() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert_eq!(pace.next_list(), now);

        pace.listed(now);

        assert_eq!(pace.next(), now);
        assert_eq!(pace.next_list(), now + BETWEEN_LISTS);
    }
}
