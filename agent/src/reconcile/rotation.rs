//! How a change of this node's key goes: who has the new key, and when the old one may go. No I/O, and the clock is given.
//!
//! The new key is announced and has devices of its own; each peer that has heard of it shakes hands there, and from then on sends there.
//! Then nothing comes through the old key's devices any more, not even a sign of life, and that is how we know. The old key goes when this is
//! so of all peers. A peer that does not answer at all is not waited for; one that answers with the old key only is, up to a day.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use shroud_keyd::{NodeKey, NodeKeys};
use shroud_model::{NodeName, PublicKey};

use crate::config::Config;
use crate::plan::lane::{Lane, Pair};
use crate::plan::{Plan, PlannedPeer, Surroundings};

/// A peer that has not shaken hands for so long after a change began is away.
const AWAY: Duration = Duration::from_secs(60);
/// How much later than it should a sign of life may come.
const LATE: Duration = Duration::from_secs(5);
/// How long nothing must have come from a peer where nobody sends signs of life.
const IDLE: Duration = Duration::from_secs(30);

/// What is remembered from pass to pass.
pub(super) struct Rotation {
    /// Since when the change of key goes, as far as this agent has seen; or since when the agent runs.
    begun: Instant,
    /// What has come in from peers, by tunnel.
    heard: BTreeMap<(Lane, PublicKey), Heard>,
}

/// The bytes that have come through a tunnel.
struct Heard {
    bytes: u64,
    /// When that number last changed.
    at: Instant,
}

/// How far a change of key is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// How many peers use the new key, and the old one no more.
    pub(super) followed: usize,
    /// How many do not answer at all.
    pub(super) away: usize,
    /// Those that are waited for.
    pub(super) waiting: Vec<NodeName>,
    /// How long it has taken so far.
    pub(super) took: Duration,
    /// Whether nobody is waited for any longer.
    over: bool,
}

impl Progress {
    /// Whether the old key may go.
    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty() || self.over
    }
}

impl Rotation {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            begun: now,
            heard: BTreeMap::new(),
        }
    }

    /// A change of key has begun.
    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// It has ended.
    pub(super) fn end(&mut self) {
        self.heard.clear();
    }

    /// Takes note of what has come through each tunnel until now.
    pub(super) fn heard(&mut self, bytes: BTreeMap<(Lane, PublicKey), u64>, now: Instant) {
        let news = bytes.into_iter().map(|(tunnel, bytes)| {
            let before = self.heard.get(&tunnel).filter(|before| before.bytes == bytes);
            let at = before.map_or(now, |before| before.at);
            (tunnel, Heard { bytes, at })
        });
        self.heard = news.collect();
    }

    /// Who has followed, and who is waited for.
    pub(super) fn progress(
        &self,
        config: &Config,
        keys: &NodeKeys,
        plan: &Plan,
        surroundings: &Surroundings,
        now: Instant,
    ) -> Progress {
        let took = now.saturating_duration_since(self.begun);
        let mut progress = Progress {
            followed: 0,
            away: 0,
            waiting: Vec::new(),
            took,
            over: took >= *config.keys.rotate_within,
        };
        let quiet = match *config.encryption.keepalive {
            Duration::ZERO => IDLE,
            keepalive => keepalive + LATE,
        };
        let has_met = |pair: &&Pair| surroundings.met.contains(&(pair.lane, pair.peer));
        let is_silent = |pair: &Pair| {
            let heard = self.heard.get(&(pair.lane, pair.peer));
            heard.is_none_or(|heard| now.saturating_duration_since(heard.at) >= quiet)
        };
        let follows = |peer: &PlannedPeer| {
            let (old, new): (Vec<_>, Vec<_>) = peer.pairs.iter().partition(|pair| pair.own == keys.current.public);
            new.iter().any(has_met) && old.into_iter().all(is_silent)
        };
        for (name, peer) in &plan.peers {
            if follows(peer) {
                progress.followed += 1;
            } else if took >= AWAY && !peer.pairs.iter().any(|pair| has_met(&pair)) {
                progress.away += 1;
            } else {
                progress.waiting.push(name.clone());
            }
        }
        progress
    }
}

/// Whether nothing is left of the last change. A device whose key went, and that would get the key to come, would still tell of handshakes with
/// the one that went.
pub(super) fn may_begin(keys: &NodeKeys, plan: &Plan, surroundings: &Surroundings) -> bool {
    let in_force = |tunnel: &shroud_tunnel::Desired| tunnel.public_key == keys.current.public;
    plan.tunnels.values().all(in_force) && surroundings.lanes.keys().all(|lane| plan.tunnels.contains_key(lane))
}

/// Whether a key is as old as the configuration lets it become: up to a tenth sooner or later, so that not all nodes change at once.
pub(super) fn is_due(config: &Config, key: &NodeKey, now: SystemTime) -> bool {
    let every = *config.keys.rotate_every;
    if every.is_zero() {
        return false;
    }
    let spread = (config.node.id().0 ^ key.epoch) % 2001;
    let due = every * 9 / 10 + every / 10_000 * u32::try_from(spread).unwrap_or(0);
    now.duration_since(key.since).is_ok_and(|age| age >= due)
}

#[cfg(test)]
mod tests;
