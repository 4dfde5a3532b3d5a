//! Waiting for a fact with a bound, and telling the last thing seen when it does not come.

use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};

/// How often a probe is repeated.
const INTERVAL: Duration = Duration::from_millis(20);

/// Repeats `probe` until it succeeds; after `within` fails with `what` and the last value seen.
pub fn eventually<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Result<T, String>) -> Result<T> {
    let slowness = patience()?;
    let within = within * slowness;
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() >= within => bail!("{what}: not within {within:?}; last seen: {last}"),
            // Rarer on a slow machine: a probe may start a program, and takes its time from what it waits for.
            Err(_) => thread::sleep(INTERVAL * slowness),
        }
    }
}

/// How many times slower than the machines the bounds are meant for this one is: `$SHROUD_LAB_PATIENCE`, set for emulated machines only.
pub fn patience() -> Result<u32> {
    match env::var("SHROUD_LAB_PATIENCE") {
        Err(env::VarError::NotPresent) => Ok(1),
        Ok(text) => parse(&text).with_context(|| format!("SHROUD_LAB_PATIENCE={text}: want a number from 1 to 100")),
        Err(error) => Err(error).context("SHROUD_LAB_PATIENCE"),
    }
}

fn parse(text: &str) -> Option<u32> {
    text.parse().ok().filter(|factor| (1..=100).contains(factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_a_small_whole_number() {
        assert_eq!(["1", "4", "100"].map(parse), [Some(1), Some(4), Some(100)]);
        assert_eq!(["0", "101", "-1", "4.5", ""].map(parse), [None; 5]);
    }
}
