//! Whether this node may be relied upon: what `/readyz` answers, a pure function of what is known.
//!
//! Ready means that pods can be sent here: the mesh is known, the gate guards every uplink, and the tunnel is up. A peer that does not
//! answer makes no node unready for good: it is waited for at first, and afterwards reported in `shroud status`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::status::{PeerStatus, Status};

/// How many names a line has room for.
const NAMED: usize = 5;

/// All conditions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Readiness {
    pub(crate) conditions: Vec<Condition>,
}

/// One thing that must be so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Condition {
    /// What it is about: `directory`, `gate`, `tunnel`, `peers` or `agent`.
    pub(crate) about: String,
    pub(crate) holds: bool,
    pub(crate) says: String,
}

/// What the status alone does not say.
#[derive(Clone, Copy)]
pub(crate) struct Expected<'a> {
    /// The devices that the gate should be on.
    pub(crate) uplinks: &'a [&'a str],
    /// Whether the encryption device is there, with this node's key.
    pub(crate) encrypts: bool,
    /// Whether a first handshake with this peer is still to be waited for.
    pub(crate) awaited: &'a dyn Fn(&PeerStatus) -> bool,
}

impl Readiness {
    /// When nothing can be said of the rest.
    pub(crate) fn unknown(why: impl Into<String>) -> Self {
        Self {
            conditions: vec![Condition::new("agent", false, why)],
        }
    }

    /// Judges a status.
    pub(crate) fn of(status: &Status, expected: Expected<'_>) -> Self {
        Self {
            conditions: vec![
                directory(status),
                gate(status, expected.uplinks),
                tunnel(status, expected.encrypts),
                peers(status, expected.awaited),
            ],
        }
    }

    /// Whether all conditions hold.
    pub(crate) fn is_ready(&self) -> bool {
        self.conditions.iter().all(|condition| condition.holds)
    }

    /// A line for each condition, as Kubernetes' own servers write them, and one for all.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for Condition { about, holds, says } in &self.conditions {
            let sign = if *holds { '+' } else { '-' };
            writeln!(text, "[{sign}]{about}: {says}").expect("a string takes all there is");
        }
        text.push_str(if self.is_ready() { "ready\n" } else { "not ready\n" });
        text
    }
}

impl Condition {
    fn new(about: &str, holds: bool, says: impl Into<String>) -> Self {
        Self {
            about: about.to_owned(),
            holds,
            says: says.into(),
        }
    }
}

fn directory(status: &Status) -> Condition {
    let directory = &status.directory;
    match directory.state.as_str() {
        "waiting" => Condition::new(
            "directory",
            false,
            format!("no complete list yet from {}", directory.source),
        ),
        state => Condition::new(
            "directory",
            true,
            format!("complete, {state} from {}", directory.source),
        ),
    }
}

fn gate(status: &Status, uplinks: &[&str]) -> Condition {
    let attached: BTreeSet<&str> = status.gate.uplinks.iter().map(String::as_str).collect();
    let (with, without): (Vec<&str>, Vec<&str>) = uplinks.iter().partition(|uplink| attached.contains(*uplink));
    if uplinks.is_empty() {
        return Condition::new("gate", false, "no uplink to guard");
    }
    if !without.is_empty() {
        return Condition::new("gate", false, format!("none on {}", without.join(", ")));
    }
    let says = match status.gate.mode.as_str() {
        "enforce" => "enforces on",
        "audit" => "only counts, by configuration, on",
        _ => "is off, by configuration, on",
    };
    Condition::new("gate", true, format!("{says} {}", with.join(", ")))
}

fn tunnel(status: &Status, encrypts: bool) -> Condition {
    let encryption = &status.encryption;
    if encrypts {
        let says = format!("{} encrypts, {}", encryption.device, encryption.backend);
        return Condition::new("tunnel", true, says);
    }
    let failure = status.pass.failures.first();
    let says = failure.map_or_else(
        || "it is not there yet".to_owned(),
        |failure| format!("last pass failed: {failure}"),
    );
    Condition::new("tunnel", false, format!("{}: {says}", encryption.device))
}

fn peers(status: &Status, awaited: &dyn Fn(&PeerStatus) -> bool) -> Condition {
    let awaited: Vec<&PeerStatus> = status.peers.iter().filter(|peer| awaited(peer)).collect();
    if !awaited.is_empty() {
        return Condition::new(
            "peers",
            false,
            format!("waiting for the first handshake with {}", names(&awaited)),
        );
    }
    let reported: Vec<&PeerStatus> = status.peers.iter().filter(|peer| !peer.problems.is_empty()).collect();
    let (total, well) = (status.peers.len(), status.peers.len() - reported.len());
    let mut says = format!("{well} of {total} are well");
    if !reported.is_empty() {
        says.push_str(&format!("; reported in status: {}", names(&reported)));
    }
    Condition::new("peers", true, says)
}

/// The first few names.
fn names(peers: &[&PeerStatus]) -> String {
    let mut names: Vec<&str> = peers.iter().take(NAMED).map(|peer| peer.node.as_str()).collect();
    if peers.len() > NAMED {
        names.push("...");
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Check;
    use crate::status::tests::{peer, status};

    fn judge(status: &Status, uplinks: &[&str], encrypts: bool, awaited: &[&str]) -> (bool, String) {
        let readiness = Readiness::of(
            status,
            Expected {
                uplinks,
                encrypts,
                awaited: &|peer| awaited.contains(&peer.node.as_str()),
            },
        );
        (readiness.is_ready(), readiness.text())
    }

    #[test]
    fn a_node_is_ready_when_mesh_gate_tunnel_and_peers_are() {
        let (ready, text) = judge(&status([peer("b"), peer("c")]), &["eth0"], true, &[]);

        let expected = "[+]directory: complete, live from file /nodes\n\
                        [+]gate: enforces on eth0\n\
                        [+]tunnel: shroud0 encrypts, userspace\n\
                        [+]peers: 2 of 2 are well\n\
                        ready\n";
        assert_eq!((ready, text.as_str()), (true, expected));
    }

    #[test]
    fn a_directory_must_be_complete_and_may_be_of_yesterday() {
        let with = |state: &str| {
            let mut status = status([]);
            status.directory.state = state.to_owned();
            judge(&status, &["eth0"], true, &[])
        };

        let (ready, text) = with("waiting");
        assert!(
            !ready && text.contains("[-]directory: no complete list yet from file /nodes\n"),
            "{text}"
        );
        let (ready, text) = with("cached");
        assert!(
            ready && text.contains("[+]directory: complete, cached from file /nodes\n"),
            "{text}"
        );
    }

    #[test]
    fn every_uplink_must_have_a_gate() {
        for (uplinks, line) in [
            (&["eth0", "eth1"][..], "[-]gate: none on eth1\n"),
            (&[], "[-]gate: no uplink to guard\n"),
        ] {
            let (ready, text) = judge(&status([]), uplinks, true, &[]);
            assert!(!ready && text.contains(line), "{text}");
        }
    }

    #[test]
    fn a_gate_that_lets_pass_by_configuration_is_ready_and_says_so() {
        for (mode, line) in [
            ("audit", "[+]gate: only counts, by configuration, on eth0\n"),
            ("off", "[+]gate: is off, by configuration, on eth0\n"),
        ] {
            let mut status = status([]);
            status.gate.mode = mode.to_owned();

            let (ready, text) = judge(&status, &["eth0"], true, &[]);

            assert!(ready && text.contains(line), "{text}");
        }
    }

    #[test]
    fn a_tunnel_must_be_there() {
        let mut status = status([]);
        let (ready, text) = judge(&status, &["eth0"], false, &[]);
        assert!(
            !ready && text.contains("[-]tunnel: shroud0: it is not there yet\n"),
            "{text}"
        );

        status.pass.failures = vec![Check::WireguardMissing.says("none here")];
        let (_, text) = judge(&status, &["eth0"], false, &[]);
        let line = "[-]tunnel: shroud0: last pass failed: wireguard-missing: none here\n";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn a_peer_is_waited_for_and_then_reported() {
        let mut status = status(["b", "c", "d", "e", "f", "g", "h"].map(peer));
        status.peers[1].problems = vec![Check::PeerNoHandshake.says("none")];

        let (ready, text) = judge(&status, &["eth0"], true, &["b", "c", "d", "e", "f", "g"]);
        assert!(
            !ready && text.contains("[-]peers: waiting for the first handshake with b, c, d, e, f, ...\n"),
            "{text}"
        );

        let (ready, text) = judge(&status, &["eth0"], true, &[]);
        assert!(
            ready && text.contains("[+]peers: 6 of 7 are well; reported in status: c\n"),
            "{text}"
        );
    }

    #[test]
    fn an_agent_of_which_nothing_is_known_is_not_ready() {
        let unknown = Readiness::unknown("it does not answer");

        assert!(!unknown.is_ready());
        assert_eq!(unknown.text(), "[-]agent: it does not answer\nnot ready\n");
    }
}
