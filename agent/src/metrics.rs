//! What the agent counts, as text for Prometheus: a pure function of one moment.
//!
//! Series are made from what is there at this moment, so those of a peer go when it goes; nothing has to remember to remove them.
//! Counters are the kernel's own, or sums of the agent; none falls while what it counts lives. Keys are never in here.
//! `docs/reference.md` lists each metric; a test holds the two together.

mod histogram;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use shroud_ebpf::Counter;
use shroud_keyd::Telemetry;
use shroud_keyd::directory::Refused;
use shroud_keyd::opt_out::OptOutBy;
use shroud_model::NodeName;

use self::text::Text;
use crate::convergence::Convergence;
use crate::rates::{self, direction, verdict};
use crate::reconcile::Tally;
use crate::status::{DirectoryStatus, PeerStatus, Status, Verdict};

pub(crate) use self::histogram::Histogram;
pub(crate) use self::text::{CONTENT_TYPE, Family, Kind};

/// Declares the metrics once, in the order in which they are written.
macro_rules! families {
    ($($name:ident: $kind:ident $text:literal $(in $unit:literal)? [$($label:literal)*] $help:literal;)+) => {
        $(const $name: Family = Family {
            name: $text,
            kind: Kind::$kind,
            unit: families!(@unit $($unit)?),
            labels: &[$($label),*],
            help: $help,
        };)+

        /// Every metric there is.
        #[cfg(test)]
        pub(crate) const ALL: &[Family] = &[$($name),+];
    };
    (@unit) => { None };
    (@unit $unit:literal) => { Some($unit) };
}

families! {
    BUILD: Info "shroud_build" ["version"] "The agent's version.";
    HEALTHY: Gauge "shroud_healthy" [] "1 when `shroud status` says healthy.";
    PROBLEMS: Gauge "shroud_problems" ["check"] "Problems that `shroud status` reports, by check.";
    KEY_AGE: Gauge "shroud_key_age_seconds" in "seconds" [] "Age of this node's private key.";

    ROTATION: Gauge "shroud_key_rotation_peers" ["state"]
        "Peers by how they follow a change of this node's key; absent while there is none.";

    PEERS: Gauge "shroud_peers" ["state"] "Other nodes that are known, by how it stands with them.";
    PEER_RECEIVE: Counter "shroud_peer_receive_bytes" in "bytes" ["peer"] "Bytes that WireGuard received from a peer, with its own.";
    PEER_TRANSMIT: Counter "shroud_peer_transmit_bytes" in "bytes" ["peer"] "Bytes that WireGuard sent to a peer, with its own.";
    PEER_HANDSHAKE: Gauge "shroud_peer_last_handshake_timestamp_seconds" in "seconds" ["peer"]
        "When a peer last shook hands, since 1970; absent before the first time.";
    PEER_RTT: Gauge "shroud_peer_rtt_seconds" in "seconds" ["peer"] "Round trip inside the tunnel to a peer; absent where no probe came back.";
    PEER_PROBLEMS: Gauge "shroud_peer_problems" ["peer" "check"] "Problems with a peer, by check.";

    GATE_PACKETS: Counter "shroud_gate_packets" ["peer" "direction" "family" "verdict" "reason"]
        "Packets that the gate saw, by what became of them and why.";
    GATE_BYTES: Counter "shroud_gate_bytes" in "bytes" ["peer" "direction" "family" "verdict" "reason"]
        "Bytes of those packets, with link-layer headers.";
    GATE_PLAINTEXT: Counter "shroud_gate_plaintext_bytes" in "bytes" []
        "Bytes of protected traffic that passed in the clear: 0 unless the gate audits or is off, or did or was.";
    GATE_ATTACHED: Gauge "shroud_gate_attached" ["device"] "1 when the gate is on this uplink, both ways.";

    OPTED_OUT: Gauge "shroud_opted_out_pods" ["by"]
        "Pods of the whole mesh that have opted out of encryption, by whose label says so; absent while nobody can say.";

    DIRECTORY_STATE: Gauge "shroud_directory_state" ["source" "state"] "1 for the state in which the directory is.";
    DIRECTORY_REFUSED: Gauge "shroud_directory_refused" ["reason"] "Nodes that are known and kept out, by reason.";
    DIRECTORY_LISTS: Counter "shroud_directory_lists" [] "Complete lists that the directory's source gave.";
    DIRECTORY_WATCHES: Counter "shroud_directory_watches" [] "Watches that were begun at the directory's source.";
    DIRECTORY_ERRORS: Counter "shroud_directory_errors" ["kind"] "What the directory's source could not do.";

    RECONCILE_DURATION: Histogram "shroud_reconcile_duration_seconds" in "seconds" [] "How long a pass took.";
    RECONCILE_CHANGES: Counter "shroud_reconcile_changes" ["driver"] "Changes made to this machine.";
    RECONCILE_FAILURES: Counter "shroud_reconcile_failures" ["driver"] "Changes that failed, and looks in vain.";
    CONVERGENCE: Histogram "shroud_convergence_seconds" in "seconds" ["step"]
        "How long peers took to be on the encryption device after their announcement, and to shake hands after that.";
}

/// All that is told at one moment.
pub(crate) struct Sample<'a> {
    pub(crate) now: SystemTime,
    /// Since when there is this node's key.
    pub(crate) key_since: SystemTime,
    pub(crate) directory: &'a DirectoryStatus,
    /// How the directory's source fares.
    pub(crate) source: &'a Telemetry,
    pub(crate) refused: &'a BTreeMap<NodeName, Refused>,
    pub(crate) tally: &'a Tally,
    pub(crate) convergence: &'a Convergence,
    /// `None` when this machine could not be looked at, which is not healthy.
    pub(crate) seen: Option<Seen<'a>>,
}

/// What a look at the kernel found.
pub(crate) struct Seen<'a> {
    pub(crate) status: &'a Status,
    pub(crate) handshakes: BTreeMap<&'a NodeName, SystemTime>,
    /// The devices that the gate should be on.
    pub(crate) uplinks: &'a BTreeSet<String>,
    pub(crate) counters: &'a [Counter],
    /// The nodes that have a name, this one among them.
    pub(crate) names: BTreeMap<u64, String>,
}

/// Writes all metrics.
pub(crate) fn render(sample: &Sample<'_>) -> String {
    let mut text = Text::new();
    let seen = sample.seen.as_ref();
    let status = seen.map(|seen| seen.status);
    let peers: &[PeerStatus] = status.map_or(&[], |status| &status.peers);

    text.family(&BUILD).add(&[env!("CARGO_PKG_VERSION")], true);
    let is_healthy = status.is_some_and(|status| status.verdict == Verdict::Healthy);
    text.family(&HEALTHY).add(&[], is_healthy);
    let mut problems = text.family(&PROBLEMS);
    let found = status.iter().flat_map(|status| &status.problems);
    for (check, count) in count(found.map(|problem| problem.check)) {
        problems.add(&[check.id()], count);
    }
    text.family(&KEY_AGE).add(&[], seconds(sample.now, sample.key_since));

    let mut followers = text.family(&ROTATION);
    if let Some(rotation) = status.and_then(|status| status.rotation.as_ref()) {
        let states = [
            ("followed", rotation.followed),
            ("away", rotation.away),
            ("waiting", rotation.waiting.len()),
        ];
        for (state, number) in states {
            followers.add(&[state], number as u64);
        }
    }

    write_peers(&mut text, peers, sample);
    write_gate(&mut text, seen);
    let mut opted_out = text.family(&OPTED_OUT);
    if let Some(claims) = status.and_then(|status| status.opted_out.as_ref()) {
        let pods: BTreeSet<(&str, &str)> = claims
            .iter()
            .map(|claim| (claim.by.as_str(), claim.pod.as_str()))
            .collect();
        for by in [OptOutBy::Namespace, OptOutBy::Pod].map(|by| by.to_string()) {
            let number = pods.iter().filter(|(whose, _)| *whose == by).count();
            opted_out.add(&[&by], number as u64);
        }
    }
    write_directory(&mut text, sample);

    text.family(&RECONCILE_DURATION).histogram(&[], &sample.tally.durations);
    for (family, counts) in [
        (&RECONCILE_CHANGES, &sample.tally.changes),
        (&RECONCILE_FAILURES, &sample.tally.failures),
    ] {
        let mut samples = text.family(family);
        for (driver, count) in counts {
            samples.add(&[driver.name()], *count);
        }
    }
    let mut convergence = text.family(&CONVERGENCE);
    for (step, histogram) in sample.convergence.steps() {
        convergence.histogram(&[step], histogram);
    }
    text.end()
}

fn write_peers(text: &mut Text, peers: &[PeerStatus], sample: &Sample<'_>) {
    let (troubled, sound): (Vec<_>, Vec<_>) = peers.iter().partition(|peer| !peer.problems.is_empty());
    let plain = sound.iter().filter(|peer| peer.in_the_clear.is_some()).count();
    let mut states = text.family(&PEERS);
    for (state, number) in [
        ("well", sound.len() - plain),
        ("plain", plain),
        ("problem", troubled.len()),
        ("refused", sample.refused.len()),
    ] {
        states.add(&[state], number as u64);
    }

    let mut received = text.family(&PEER_RECEIVE);
    for peer in peers {
        received.add(&[peer.node.as_str()], peer.rx_bytes);
    }
    let mut sent = text.family(&PEER_TRANSMIT);
    for peer in peers {
        sent.add(&[peer.node.as_str()], peer.tx_bytes);
    }
    let mut handshakes = text.family(&PEER_HANDSHAKE);
    for (peer, at) in sample.seen.iter().flat_map(|seen| &seen.handshakes) {
        handshakes.add(&[peer.as_str()], seconds(*at, SystemTime::UNIX_EPOCH));
    }
    let mut trips = text.family(&PEER_RTT);
    for peer in peers {
        if let Some(milliseconds) = peer.path.as_ref().and_then(|path| path.rtt_milliseconds) {
            trips.add(&[peer.node.as_str()], milliseconds / 1000.0);
        }
    }
    let mut problems = text.family(&PEER_PROBLEMS);
    for peer in peers {
        for (check, count) in count(peer.problems.iter().map(|problem| problem.check)) {
            problems.add(&[peer.node.as_str(), check.id()], count);
        }
    }
}

fn write_gate(text: &mut Text, seen: Option<&Seen<'_>>) {
    let rows = seen.map(gate_rows).unwrap_or_default();
    let mut packets = text.family(&GATE_PACKETS);
    for (labels, (count, _)) in &rows {
        packets.add(labels, *count);
    }
    let mut bytes = text.family(&GATE_BYTES);
    for (labels, (_, count)) in &rows {
        bytes.add(labels, *count);
    }
    let mut plaintext = text.family(&GATE_PLAINTEXT);
    if let Some(seen) = seen {
        plaintext.add(&[], seen.status.gate.plaintext_bytes);
    }
    let mut attached = text.family(&GATE_ATTACHED);
    for uplink in seen.iter().flat_map(|seen| seen.uplinks) {
        attached.add(
            &[uplink],
            seen.is_some_and(|seen| seen.status.gate.uplinks.contains(uplink)),
        );
    }
}

/// Packets and bytes by label. What was counted under a node that has no name any more is left out, not added to what was counted under
/// nobody: that sum would fall when the node comes back.
fn gate_rows<'a>(seen: &'a Seen<'_>) -> BTreeMap<[&'a str; 5], (u64, u64)> {
    let mut rows: BTreeMap<_, (u64, u64)> = BTreeMap::new();
    for counter in seen.counters {
        let peer = match counter.node.0 {
            0 => "",
            number => match seen.names.get(&number) {
                Some(name) => name,
                None => continue,
            },
        };
        let labels = [
            peer,
            direction(counter.direction),
            rates::family(counter),
            verdict(counter),
            counter.reason.as_str(),
        ];
        let (packets, bytes) = rows.entry(labels).or_default();
        *packets += counter.packets;
        *bytes += counter.bytes;
    }
    rows
}

fn write_directory(text: &mut Text, sample: &Sample<'_>) {
    let DirectoryStatus { source, state, .. } = sample.directory;
    let mut states = text.family(&DIRECTORY_STATE);
    for possible in DirectoryStatus::STATES {
        states.add(&[source, possible], state == possible);
    }
    let mut refused = text.family(&DIRECTORY_REFUSED);
    let reasons = sample.refused.values().flat_map(|refused| {
        let ids: BTreeSet<&str> = refused.reasons.iter().map(|reason| reason.id()).collect();
        ids
    });
    for (reason, nodes) in count(reasons) {
        refused.add(&[reason], nodes);
    }
    text.family(&DIRECTORY_LISTS).add(&[], sample.source.lists);
    text.family(&DIRECTORY_WATCHES).add(&[], sample.source.watches);
    let mut errors = text.family(&DIRECTORY_ERRORS);
    for (kind, count) in &sample.source.failures {
        errors.add(&[kind.id()], *count);
    }
}

/// How many there are of each.
fn count<T: Ord>(things: impl Iterator<Item = T>) -> BTreeMap<T, u64> {
    let mut counts = BTreeMap::new();
    for thing in things {
        *counts.entry(thing).or_default() += 1;
    }
    counts
}

/// From one moment to a later one, in seconds; 0 where the clock was set back.
fn seconds(later: SystemTime, earlier: SystemTime) -> f64 {
    later.duration_since(earlier).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests;
