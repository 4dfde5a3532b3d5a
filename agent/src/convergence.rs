//! How long a peer takes from its announcement to its first handshake.
//!
//! ```text
//!   key first seen in the directory ── announced ──> on the encryption device ── configured ──> first handshake
//! ```
//!
//! A key is measured once. One that has shaken hands before this agent saw it, as after a restart, is not measured at all. Time is an
//! argument.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use shroud_model::PublicKey;

use crate::metrics::Histogram;

/// How long a peer may be without a handshake before that is worth a complaint and no more worth waiting for. WireGuard tries again
/// after 5 s, in vain where the peer does not know our key yet.
const PATIENCE: Duration = Duration::from_secs(20);

/// From the 50 ms for which bursts are collected, to a peer that answers only when it speaks by itself.
const BOUNDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// Where each peer is on its way, and how long those before it took.
#[derive(Debug)]
pub(crate) struct Convergence {
    peers: BTreeMap<PublicKey, Progress>,
    configured: Histogram,
    handshake: Histogram,
}

#[derive(Debug)]
struct Progress {
    announced: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Announced,
    Configured { at: Instant },
    Met,
}

impl Convergence {
    pub(crate) fn new() -> Self {
        Self {
            peers: BTreeMap::new(),
            configured: Histogram::new(BOUNDS),
            handshake: Histogram::new(BOUNDS),
        }
    }

    /// The directory has these keys at this moment.
    pub(crate) fn announced(&mut self, keys: &BTreeSet<PublicKey>, now: Instant) {
        self.peers.retain(|key, _| keys.contains(key));
        for key in keys {
            self.peers.entry(*key).or_insert(Progress {
                announced: now,
                stage: Stage::Announced,
            });
        }
    }

    /// The encryption device has these keys from this moment on, if it has not had them before.
    pub(crate) fn configured<'a>(&mut self, keys: impl Iterator<Item = &'a PublicKey>, now: Instant) {
        for key in keys {
            if let Some(progress) = self.peers.get_mut(key)
                && let Stage::Announced = progress.stage
            {
                self.configured
                    .observe(now.saturating_duration_since(progress.announced));
                progress.stage = Stage::Configured { at: now };
            }
        }
    }

    /// These keys have shaken hands, last at these moments.
    pub(crate) fn met(&mut self, handshakes: impl Iterator<Item = (PublicKey, Instant)>) {
        for (key, shaken) in handshakes {
            let Some(progress) = self.peers.get_mut(&key) else {
                continue;
            };
            // Without `Configured` the device has had it before us.
            if let Stage::Configured { at } = progress.stage {
                self.handshake.observe(shaken.saturating_duration_since(at));
            }
            progress.stage = Stage::Met;
        }
    }

    /// Whether a first handshake with this key is still to be waited for.
    pub(crate) fn is_awaited(&self, key: &PublicKey, now: Instant) -> bool {
        self.peers.get(key).is_some_and(|progress| {
            !matches!(progress.stage, Stage::Met) && now.saturating_duration_since(progress.announced) < PATIENCE
        })
    }

    /// The steps by name, with how long each took.
    pub(crate) fn steps(&self) -> [(&'static str, &Histogram); 2] {
        [("configured", &self.configured), ("handshake", &self.handshake)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts and sums of both steps, in milliseconds.
    fn measured(convergence: &Convergence) -> [(u64, u128); 2] {
        convergence
            .steps()
            .map(|(_, histogram)| (histogram.count(), histogram.sum().as_millis()))
    }

    fn key(number: u8) -> PublicKey {
        PublicKey::from_bytes([number; 32]).unwrap()
    }

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn each_step_is_measured_once() {
        let (mut convergence, start) = (Convergence::new(), Instant::now());
        let known = [key(1)].into();
        convergence.announced(&known, start);
        convergence.configured(known.iter(), start + ms(80));
        convergence.met([(key(1), start + ms(100))].into_iter());

        convergence.announced(&known, start + ms(3000));
        convergence.configured(known.iter(), start + ms(3000));
        convergence.met([(key(1), start + ms(120_000))].into_iter());

        assert_eq!(measured(&convergence), [(1, 80), (1, 20)]);
    }

    #[test]
    fn a_key_that_was_met_before_is_not_measured() {
        let (mut convergence, start) = (Convergence::new(), Instant::now());
        let known = [key(1)].into();
        convergence.announced(&known, start);

        convergence.met([(key(1), start.checked_sub(ms(10_000)).unwrap())].into_iter());
        convergence.configured(known.iter(), start + ms(5));

        assert_eq!(measured(&convergence), [(0, 0), (0, 0)]);
        assert!(!convergence.is_awaited(&key(1), start));
    }

    #[test]
    fn a_new_key_is_a_new_peer_and_one_that_went_is_forgotten() {
        let (mut convergence, start) = (Convergence::new(), Instant::now());
        convergence.announced(&[key(1)].into(), start);
        convergence.configured([key(1)].iter(), start + ms(80));

        convergence.announced(&[key(2)].into(), start + ms(1000));
        convergence.configured([key(1), key(2)].iter(), start + ms(1060));
        convergence.met([(key(1), start + ms(1100)), (key(2), start + ms(1100))].into_iter());

        assert_eq!(measured(&convergence), [(2, 140), (1, 40)]);
    }

    #[test]
    fn a_handshake_is_awaited_for_a_while() {
        let (mut convergence, start) = (Convergence::new(), Instant::now());
        convergence.announced(&[key(1), key(2)].into(), start);
        convergence.configured([key(1), key(2)].iter(), start + ms(80));
        convergence.met([(key(2), start + ms(90))].into_iter());

        let awaited = |after: Duration| [1, 2, 3].map(|number| convergence.is_awaited(&key(number), start + after));
        assert_eq!(awaited(ms(100)), [true, false, false]);
        assert_eq!(awaited(PATIENCE), [false; 3]);
    }
}
