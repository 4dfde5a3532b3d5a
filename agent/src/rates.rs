//! The gate's counters over time: totals as the kernel keeps them, and how fast they rise.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shroud_ebpf::{Counter, Direction, Reason};
use shroud_model::Family;

use crate::status::CounterStatus;

/// Two samples closer than this say little about speed.
const SHORTEST: Duration = Duration::from_secs(1);

/// The last sample, and the one before it from which speed is told.
#[derive(Default)]
pub(crate) struct Rates {
    older: Option<(Instant, Vec<Counter>)>,
    newer: Option<(Instant, Vec<Counter>)>,
}

impl Rates {
    /// Takes in what the kernel has counted at this moment.
    pub(crate) fn sample(&mut self, at: Instant, counters: Vec<Counter>) {
        if let Some((since, _)) = &self.newer
            && at.duration_since(*since) >= SHORTEST
        {
            self.older = self.newer.take();
        }
        self.newer = Some((at, counters));
    }

    /// What the kernel had counted at the last sample.
    pub(crate) fn counters(&self) -> &[Counter] {
        self.newer.as_ref().map_or(&[], |(_, counters)| counters)
    }

    /// Packets and bytes of the counters that match.
    pub(crate) fn total(&self, matches: impl Fn(&Counter) -> bool) -> (u64, u64) {
        self.counters()
            .iter()
            .filter(|counter| matches(counter))
            .fold((0, 0), |(packets, bytes), counter| {
                (packets + counter.packets, bytes + counter.bytes)
            })
    }

    /// Each counter with its speed, under the names of the nodes.
    pub(crate) fn rows(&self, names: &BTreeMap<u64, String>) -> Vec<CounterStatus> {
        let Some((now, newer)) = &self.newer else {
            return Vec::new();
        };
        newer
            .iter()
            .map(|counter| {
                let (packets_per_second, bytes_per_second) = self.speed(*now, counter);
                CounterStatus {
                    node: names.get(&counter.node.0).cloned().unwrap_or_default(),
                    direction: direction(counter.direction).to_owned(),
                    family: family(counter).to_owned(),
                    verdict: verdict(counter).to_owned(),
                    reason: counter.reason.as_str().to_owned(),
                    packets: counter.packets,
                    bytes: counter.bytes,
                    packets_per_second,
                    bytes_per_second,
                }
            })
            .collect()
    }

    fn speed(&self, now: Instant, counter: &Counter) -> (f64, f64) {
        let Some((then, older)) = &self.older else {
            return (0.0, 0.0);
        };
        let before = older.iter().find(|before| same(before, counter));
        let (packets, bytes) = before.map_or((0, 0), |before| (before.packets, before.bytes));
        let seconds = now.duration_since(*then).as_secs_f64().max(f64::MIN_POSITIVE);
        (
            counter.packets.saturating_sub(packets) as f64 / seconds,
            counter.bytes.saturating_sub(bytes) as f64 / seconds,
        )
    }
}

/// Which way past the uplink.
pub(crate) fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "egress",
        Direction::Ingress => "ingress",
        Direction::Decrypted => "decrypted",
    }
}

/// The family of the packets under a counter.
pub(crate) fn family(counter: &Counter) -> &'static str {
    match counter.family {
        Some(Family::V4) => "ipv4",
        Some(Family::V6) => "ipv6",
        None => "-",
    }
}

/// What became of the packets under a counter.
pub(crate) fn verdict(counter: &Counter) -> &'static str {
    if counter.audited {
        return "audit";
    }
    match counter.reason {
        Reason::Encrypted => "encrypt",
        Reason::NotIp
        | Reason::Unprotected
        | Reason::Tunnel
        | Reason::Plain
        | Reason::Off
        | Reason::OpenPort
        | Reason::Decrypted => "pass",
        Reason::UnknownNode
        | Reason::Local
        | Reason::Fenced
        | Reason::NoDevice
        | Reason::Overlay
        | Reason::ClearText
        | Reason::SpoofedSource
        | Reason::Malformed => "drop",
    }
}

/// Whether two samples are of one counter.
fn same(one: &Counter, other: &Counter) -> bool {
    Counter {
        packets: 0,
        bytes: 0,
        ..*one
    } == Counter {
        packets: 0,
        bytes: 0,
        ..*other
    }
}
