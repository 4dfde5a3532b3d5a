//! The server's clock, which a test may set wrong, and the two ways a time is written. It never sleeps.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The wall clock, plus what a test added to it.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    skew: AtomicI64,
}

impl Clock {
    /// Makes the clock wrong by so many seconds.
    pub(crate) fn skew(&self, seconds: i64) {
        self.skew.store(seconds, Ordering::Relaxed);
    }

    /// Seconds since the epoch, as the server believes.
    pub(crate) fn now(&self) -> i64 {
        let true_time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        i64::try_from(true_time)
            .unwrap_or(i64::MAX)
            .saturating_add(self.skew.load(Ordering::Relaxed))
    }
}

/// As objects carry it: `2026-11-23T04:18:46Z`.
pub(crate) fn rfc3339(seconds: i64) -> String {
    let (year, month, day) = date(seconds.div_euclid(86400));
    let (hour, minute, second) = time_of_day(seconds);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// As the `Date` header carries it: `Mon, 23 Nov 2026 04:18:46 GMT`.
pub(crate) fn http_date(seconds: i64) -> String {
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let days = seconds.div_euclid(86400);
    let weekday = WEEKDAYS[usize::try_from(days.rem_euclid(7)).unwrap_or(0)];
    let (year, month, day) = date(days);
    let month = MONTHS[usize::try_from(month - 1).unwrap_or(0)];
    let (hour, minute, second) = time_of_day(seconds);
    format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

fn time_of_day(seconds: i64) -> (i64, i64, i64) {
    let second = seconds.rem_euclid(86400);
    (second / 3600, second / 60 % 60, second % 60)
}

/// Year, month and day of a count of days since the epoch, in the Gregorian calendar.
fn date(days: i64) -> (i64, i64, i64) {
    // Years that begin in March put the leap day last; 719468 days lie between 0000-03-01 and the epoch, 146097 in 400 years.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_are_written_as_the_recordings_write_them() {
        let recorded = 1_795_407_526;
        assert_eq!(
            (rfc3339(recorded), http_date(recorded)),
            ("2026-11-23T04:18:46Z".into(), "Mon, 23 Nov 2026 04:18:46 GMT".into())
        );
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }
}
