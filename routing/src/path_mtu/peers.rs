//! All peers' searches: who is probed when. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use shroud_model::{Family, Mtu};

use super::search::{CONFIRM, Search};
use super::{PathMtu, PathState};

/// How long an answer is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The least time between two probes, to whomever.
const SPACING: Duration = Duration::from_millis(10);

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Send(Probe),
    /// Nothing before this time.
    Wait(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) peer: IpAddr,
    /// The whole packet with its IP header, in bytes.
    pub(super) size: u32,
    pub(super) sequence: u16,
}

#[derive(Debug, Default)]
pub(super) struct Peers {
    peers: BTreeMap<IpAddr, Peer>,
    /// Each peer once, by the time at which it is its turn: to be probed, or to have its probe given up.
    turns: BTreeSet<(Duration, IpAddr)>,
    /// When the next probe may go out.
    free_at: Duration,
    sequence: u16,
}

#[derive(Debug)]
struct Peer {
    search: Search,
    turn: Duration,
    /// The probe under way: its number, and when it went out.
    probe: Option<(u16, Duration)>,
    rtt: Option<Duration>,
    sent: u64,
    lost: u64,
}

impl Peers {
    pub(super) fn set_targets(&mut self, targets: &BTreeMap<IpAddr, Mtu>, now: Duration) {
        self.peers.retain(|address, _| targets.contains_key(address));
        self.turns.retain(|(_, address)| targets.contains_key(address));
        for (&address, &planned) in targets {
            let floor = match Family::of(address) {
                Family::V4 => Mtu::MINIMUM,
                Family::V6 => Mtu::MINIMUM_IPV6,
            };
            let turns = &mut self.turns;
            let peer = self.peers.entry(address).or_insert_with(|| {
                turns.insert((now, address));
                Peer {
                    search: Search::new(planned, floor),
                    turn: now,
                    probe: None,
                    rtt: None,
                    sent: 0,
                    lost: 0,
                }
            });
            if peer.search.plan(planned, floor) {
                // A probe under way is of the old plan's size.
                peer.probe = None;
                self.turns.remove(&(peer.turn, address));
                peer.turn = now;
                self.turns.insert((now, address));
            }
        }
    }

    pub(super) fn snapshot(&self) -> BTreeMap<IpAddr, PathMtu> {
        let known = |peer: &Peer| PathMtu {
            mtu: peer.search.mtu(),
            state: peer.search.state(),
            rtt: peer.rtt,
            sent: peer.sent,
            lost: peer.lost,
        };
        self.peers
            .iter()
            .map(|(address, peer)| (*address, known(peer)))
            .collect()
    }

    pub(super) fn next(&mut self, now: Duration) -> Next {
        while let Some(&(turn, address)) = self.turns.first() {
            if turn > now {
                return Next::Wait(turn);
            }
            let Some(peer) = self.peers.get_mut(&address) else {
                self.turns.pop_first();
                continue;
            };
            if peer.probe.is_some() {
                self.lost(address, now);
                continue;
            }
            if self.free_at > now {
                return Next::Wait(self.free_at);
            }
            self.free_at = now + SPACING;
            self.sequence = self.sequence.wrapping_add(1);
            peer.probe = Some((self.sequence, now));
            peer.sent += 1;
            let probe = Probe {
                peer: address,
                size: peer.search.size(),
                sequence: self.sequence,
            };
            self.schedule(address, now + TIMEOUT);
            return Next::Send(probe);
        }
        Next::Wait(Duration::MAX)
    }

    /// An answer came. One that comes too late, or is not to our question, is passed over.
    pub(super) fn answered(&mut self, address: IpAddr, sequence: u16, now: Duration) {
        let Some(peer) = self.peers.get_mut(&address) else {
            return;
        };
        let Some((_, sent)) = peer.probe.take_if(|(number, _)| *number == sequence) else {
            return;
        };
        peer.rtt = Some(now.saturating_sub(sent));
        let before = peer.search.state();
        let wait = peer.search.answered(now);
        self.proceed(address, before, wait, now);
    }

    /// The probe could not even be sent.
    pub(super) fn failed(&mut self, probe: &Probe, now: Duration) {
        let under_way = self.peers.get(&probe.peer).and_then(|peer| peer.probe);
        if under_way.is_some_and(|(number, _)| number == probe.sequence) {
            self.lost(probe.peer, now);
        }
    }

    fn lost(&mut self, address: IpAddr, now: Duration) {
        let Some(peer) = self.peers.get_mut(&address) else {
            return;
        };
        peer.probe = None;
        peer.lost += 1;
        let before = peer.search.state();
        let wait = peer.search.lost();
        self.proceed(address, before, wait, now);
    }

    fn proceed(&mut self, address: IpAddr, before: PathState, wait: Duration, now: Duration) {
        let Some(peer) = self.peers.get(&address) else { return };
        let (mtu, after) = (peer.search.mtu(), peer.search.state());
        if before != after {
            match after {
                PathState::Reduced => tracing::warn!(peer = %address, %mtu, "the path carries less than planned"),
                PathState::Unknown | PathState::Confirmed | PathState::Searching | PathState::Silent => {
                    tracing::debug!(peer = %address, %mtu, state = %after, "path MTU");
                }
            }
        }
        self.schedule(address, now + jittered(wait, address, peer.sent));
    }

    fn schedule(&mut self, address: IpAddr, turn: Duration) {
        let Some(peer) = self.peers.get_mut(&address) else {
            return;
        };
        self.turns.remove(&(peer.turn, address));
        peer.turn = turn;
        self.turns.insert((turn, address));
    }
}

/// A wait that differs by up to a quarter from peer to peer and time to time, so that nodes that started together do not stay in step.
fn jittered(wait: Duration, address: IpAddr, count: u64) -> Duration {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};

    if wait < CONFIRM {
        return wait;
    }
    let mut hasher = DefaultHasher::new();
    (address, count).hash(&mut hasher);
    let thousandths = u32::try_from(hasher.finish() % 500).unwrap_or(0);
    wait * (750 + thousandths) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_thousand_peers_share_a_hundred_probes_a_second() {
        let targets: BTreeMap<IpAddr, Mtu> = (0..5000_u32)
            .map(|n| (IpAddr::from((0x0a00_0000 + n).to_be_bytes()), Mtu::ETHERNET))
            .collect();
        let mut peers = Peers::default();
        peers.set_targets(&targets, Duration::ZERO);
        let (mut now, mut sent) = (Duration::ZERO, 0_u32);
        let end = Duration::from_secs(200);

        while now < end {
            match peers.next(now) {
                Next::Send(probe) => {
                    sent += 1;
                    peers.answered(probe.peer, probe.sequence, now);
                }
                Next::Wait(until) => now = until,
            }
        }

        assert!((19_900..=20_001).contains(&sent), "{sent} in 200 s");
        let least = peers.snapshot().values().map(|path| path.sent).min();
        assert!(least >= Some(3), "everybody has a turn: {least:?}");
    }

    #[test]
    fn a_few_peers_are_confirmed_every_ten_seconds_and_not_in_step() {
        let first = IpAddr::from([10, 244, 2, 0]);
        let targets = BTreeMap::from([(first, Mtu::ETHERNET), (IpAddr::from([10, 244, 3, 0]), Mtu::ETHERNET)]);
        let mut peers = Peers::default();
        peers.set_targets(&targets, Duration::ZERO);
        let mut now = Duration::ZERO;
        let mut turns = Vec::new();

        while now < Duration::from_secs(1000) {
            match peers.next(now) {
                Next::Send(probe) => {
                    peers.answered(probe.peer, probe.sequence, now);
                    if probe.peer == first {
                        turns.push(now);
                    }
                }
                Next::Wait(until) => now = until,
            }
        }

        assert!((95..=106).contains(&turns.len()), "{}", turns.len());
        let pauses: BTreeSet<Duration> = turns.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.first() >= Some(&Duration::from_millis(7500)), "{pauses:?}");
        assert!(pauses.last() <= Some(&Duration::from_millis(12_510)), "{pauses:?}");
        assert!(pauses.len() > 50, "{pauses:?}");
    }

    #[test]
    fn an_answer_to_another_question_is_passed_over() {
        let peer = IpAddr::from([10, 244, 2, 0]);
        let mut peers = Peers::default();
        peers.set_targets(&BTreeMap::from([(peer, Mtu::ETHERNET)]), Duration::ZERO);
        let Next::Send(probe) = peers.next(Duration::ZERO) else {
            panic!("a first probe")
        };

        peers.answered(peer, probe.sequence.wrapping_add(1), Duration::ZERO);
        assert_eq!(peers.snapshot()[&peer].state, PathState::Unknown);
        peers.answered(peer, probe.sequence, Duration::from_millis(7));
        peers.answered(peer, probe.sequence, Duration::from_millis(9));

        let expected = PathMtu {
            mtu: Mtu::ETHERNET,
            state: PathState::Confirmed,
            rtt: Some(Duration::from_millis(7)),
            sent: 1,
            lost: 0,
        };
        assert_eq!(peers.snapshot()[&peer], expected);
    }
}
