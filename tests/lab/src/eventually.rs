//! Waiting for a fact with a bound, and telling the last thing seen when it does not come.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a probe is repeated.
const INTERVAL: Duration = Duration::from_millis(20);

/// Repeats `probe` until it succeeds; after `within` fails with `what` and the last value seen.
pub fn eventually<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Result<T, String>) -> Result<T> {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() >= within => bail!("{what}: not within {within:?}; last seen: {last}"),
            Err(_) => thread::sleep(INTERVAL),
        }
    }
}
