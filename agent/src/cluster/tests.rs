use serde_json::json;
use shroud_model::PublicKey;

use super::*;
use crate::status::tests::{peer, status};
use crate::status::{OptOutStatus, RefusedStatus};

/// What is heard from the nodes of a mesh in which all is well, until it is changed.
pub(crate) struct Mesh(BTreeMap<NodeName, Heard>);

impl Mesh {
    pub(crate) fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<&str> = names.into_iter().collect();
        let key = |name: &str| {
            let mut bytes = [7; 32];
            bytes[..name.len()].copy_from_slice(name.as_bytes());
            PublicKey::from_bytes(bytes).unwrap()
        };
        let heard = |name: &str| {
            let others = names.iter().filter(|other| **other != name);
            let mut status = status(others.map(|other| PeerStatus {
                public_key: key(other),
                fingerprint: key(other).fingerprint(),
                ..peer(other)
            }));
            status.node = name.parse().unwrap();
            status.public_key = key(name);
            status.fingerprint = key(name).fingerprint();
            Heard::Status {
                pod: format!("{name}-pod"),
                status: Box::new(status),
            }
        };
        Self(names.iter().map(|name| (name.parse().unwrap(), heard(name))).collect())
    }

    /// Lets a node's agent say something else.
    pub(crate) fn change(&mut self, name: &str, change: impl FnOnce(&mut Status)) {
        let Some(Heard::Status { status, .. }) = self.0.get_mut(&name.parse().unwrap()) else {
            panic!("{name} says nothing");
        };
        change(status);
    }

    /// Lets a node's agent say nothing.
    pub(crate) fn silence(&mut self, name: &str, why: &str) {
        let nothing = Heard::Nothing {
            pod: format!("{name}-pod"),
            why: why.to_owned(),
        };
        self.0.insert(name.parse().unwrap(), nothing);
    }

    /// Takes a node's agent away. It announces nothing, so that all others refuse it.
    pub(crate) fn remove(&mut self, name: &str) {
        for heard in self.0.values_mut() {
            if let Heard::Status { status, .. } = heard
                && status.node.as_str() != name
            {
                refuse(status, name, "it announces no key");
            }
        }
        self.0.insert(name.parse().unwrap(), Heard::NoAgent);
    }

    /// Lets the configuration leave what two nodes send to each other in the clear.
    pub(crate) fn leave_in_the_clear(&mut self, one: &str, other: &str) {
        for (name, peer) in [(one, other), (other, one)] {
            self.change(name, |status| {
                peer_of(status, peer).in_the_clear = Some("both nodes are in zone z1".to_owned());
            });
        }
    }

    /// Lets every agent know that a pod of a node has opted out.
    pub(crate) fn opt_out(&mut self, node: &str, pod: &str) {
        let claim = OptOutStatus {
            pod: pod.to_owned(),
            node: node.parse().unwrap(),
            address: [10, 244, 1, 7].into(),
            by: "pod".to_owned(),
        };
        for heard in self.0.values_mut() {
            if let Heard::Status { status, .. } = heard {
                status.opted_out = Some(vec![claim.clone()]);
            }
        }
    }

    pub(crate) fn judged(&self) -> ClusterStatus {
        judge(&self.0)
    }

    /// What becomes of what one node sends to another, and why.
    fn pair(&self, from: &str, to: &str) -> (PairState, Option<Problem>) {
        let mut pairs = self.judged().pairs.into_iter();
        let pair = pairs.find(|pair| pair.from.as_str() == from && pair.to.as_str() == to);
        pair.map(|pair| (pair.state, pair.why)).unwrap()
    }
}

/// Lets an agent refuse a node.
pub(crate) fn refuse(status: &mut Status, name: &str, reason: &str) {
    status.peers.retain(|peer| peer.node.as_str() != name);
    status.refused.push(RefusedStatus {
        node: name.to_owned(),
        reasons: vec![reason.to_owned()],
        fenced: Vec::new(),
    });
}

/// One of an agent's peers.
fn peer_of<'a>(status: &'a mut Status, name: &str) -> &'a mut PeerStatus {
    let mut peers = status.peers.iter_mut();
    peers.find(|peer| peer.node.as_str() == name).unwrap()
}

#[test]
fn a_mesh_in_which_all_have_met_is_healthy() {
    let judged = Mesh::of(["a", "b", "c"]).judged();

    assert_eq!(judged.verdict, Verdict::Healthy);
    assert_eq!(judged.summary, "each of 6 pairs of 3 nodes is encrypted");
    let counts = Counts {
        all: 6,
        encrypted: 6,
        ..Counts::default()
    };
    assert_eq!(judged.counts, counts);
    let ways: Vec<String> = judged
        .pairs
        .iter()
        .map(|pair| format!("{}{}", pair.from, pair.to))
        .collect();
    assert_eq!(ways, ["ab", "ac", "ba", "bc", "ca", "cb"]);
}

#[test]
fn a_gate_that_does_not_enforce_lets_all_of_its_node_out() {
    let audits = Check::GateAudits.says("gate.mode is audit");
    let loose = Check::GateNotAttached.says("the gate is not attached to eth1");
    let failed = Check::GateFailed.says("last pass: load the gate: no");
    for problem in [audits, loose, failed] {
        let mut mesh = Mesh::of(["a", "b"]);
        mesh.change("a", |status| status.problems.push(problem.clone()));

        assert_eq!(mesh.pair("a", "b"), (PairState::Clear, Some(problem)));
        assert_eq!(mesh.pair("b", "a"), (PairState::Encrypted, None));
    }
    // What an agent does not call a problem is one here all the same.
    let mut mesh = Mesh::of(["a", "b"]);
    mesh.change("a", |status| status.gate.mode = "off".to_owned());
    mesh.change("b", |status| status.gate.uplinks.clear());

    let off = Check::GateOff.says("gate.mode is off");
    let nowhere = Check::GateNotAttached.says("the gate is on no uplink");
    assert_eq!(mesh.pair("a", "b"), (PairState::Clear, Some(off)));
    assert_eq!(mesh.pair("b", "a"), (PairState::Clear, Some(nowhere)));
}

#[test]
fn a_node_without_an_agent_may_send_in_the_clear_and_gets_nothing() {
    let mut mesh = Mesh::of(["a", "b", "c"]);
    mesh.remove("c");

    let judged = mesh.judged();

    assert_eq!(mesh.pair("c", "a"), (PairState::Clear, Some(missing())));
    let refused = Check::NodeRefused.says("c is refused by the sender: it announces no key");
    assert_eq!(mesh.pair("a", "c"), (PairState::Dropped, Some(refused)));
    assert_eq!(judged.verdict, Verdict::Degraded);
    assert_eq!(
        judged.summary,
        "2 of 6 pairs of 3 nodes are encrypted, 2 may be in the clear, 2 dropped; no agent: c"
    );
}

#[test]
fn of_an_agent_that_does_not_answer_nothing_is_assumed() {
    let mut mesh = Mesh::of(["a", "b"]);
    mesh.silence("a", "no answer within 15 s");

    let judged = mesh.judged();

    assert_eq!(
        mesh.pair("a", "b"),
        (PairState::Unknown, Some(silent("no answer within 15 s")))
    );
    // b's gate enforces, and a was there when they shook hands.
    assert_eq!(mesh.pair("b", "a"), (PairState::Encrypted, None));
    assert_eq!(
        judged.summary,
        "1 of 2 pairs of 2 nodes are encrypted, 1 unknown; no answer: a"
    );
    assert_eq!(
        (judged.nodes[0].agent, &judged.nodes[0].problems[..]),
        (AgentState::Silent, &[silent("no answer within 15 s")][..])
    );
}

#[test]
fn both_ends_have_a_say() {
    let mut mesh = Mesh::of(["a", "b"]);
    mesh.change("a", |status| refuse(status, "b", "it is on the deny list"));

    let by = |whom: &str| Check::NodeRefused.says(format!("b is refused by the {whom}: it is on the deny list"));
    assert_eq!(mesh.pair("a", "b"), (PairState::Dropped, Some(by("sender"))));
    assert_eq!(mesh.pair("b", "a"), (PairState::Dropped, Some(by("receiver"))));

    let mut mesh = Mesh::of(["a", "b"]);
    mesh.change("a", |status| status.peers.clear());

    let unknown = |whom: &str| Check::PeerUnknown.says(format!("the {whom} does not know b"));
    assert_eq!(mesh.pair("a", "b"), (PairState::Dropped, Some(unknown("sender"))));
    assert_eq!(mesh.pair("b", "a"), (PairState::Dropped, Some(unknown("receiver"))));
}

#[test]
fn a_peer_with_a_problem_gets_nothing() {
    let mut mesh = Mesh::of(["a", "b", "c", "d", "e"]);
    let stale = Check::PeerNoHandshake.says("no handshake for 200 s");
    let differs = Check::PeerOverlayDiffers.says("it receives another");
    let astray = Check::PeerNotOverUplink.says("172.18.0.2 is reached over wlan0");
    mesh.change("a", |status| {
        peer_of(status, "b").problems = vec![differs.clone(), stale.clone()];
        peer_of(status, "c").problems = vec![differs];
        peer_of(status, "d").problems = vec![stale.clone(), astray.clone()];
        peer_of(status, "e").handshake_age_seconds = None;
    });

    assert_eq!(mesh.pair("a", "b"), (PairState::Dropped, Some(stale)));
    // Sent to in another way than was wished, and encrypted.
    assert_eq!(mesh.pair("a", "c"), (PairState::Encrypted, None));
    // Pod packets to it leave over a device without a gate.
    assert_eq!(mesh.pair("a", "d"), (PairState::Clear, Some(astray)));
    let never = Check::PeerNoHandshake.says("no handshake yet");
    assert_eq!(mesh.pair("a", "e"), (PairState::Dropped, Some(never)));
}

#[test]
fn keys_that_disagree_are_found_in_both_directions() {
    let other = PublicKey::from_bytes([99; 32]).unwrap();
    let mut mesh = Mesh::of(["a", "b"]);
    mesh.change("a", |status| {
        let peer = peer_of(status, "b");
        peer.public_key = other;
        peer.fingerprint = other.fingerprint();
    });

    let own = match &mesh.0[&"b".parse::<NodeName>().unwrap()] {
        Heard::Status { status, .. } => status.fingerprint.clone(),
        Heard::Nothing { .. } | Heard::NoAgent => panic!("b says nothing"),
    };
    let says = format!("b has the key {own}, and a takes {} for its key", other.fingerprint());
    let differs = (PairState::Dropped, Some(Check::KeyDiffers.says(says)));
    assert_eq!(mesh.pair("a", "b"), differs);
    assert_eq!(mesh.pair("b", "a"), differs);
}

#[test]
fn a_node_with_another_problem_spoils_the_verdict_and_no_pair() {
    let mut mesh = Mesh::of(["a", "b"]);
    let problem = Check::HttpPortTaken.says("port 21320");
    mesh.change("b", |status| {
        status.verdict = Verdict::Degraded;
        status.problems.push(problem.clone());
    });

    let judged = mesh.judged();

    assert_eq!(judged.verdict, Verdict::Degraded);
    assert_eq!(
        judged.summary,
        "each of 2 pairs of 2 nodes is encrypted; need a look: b"
    );
    assert_eq!(judged.other_problems(&judged.nodes[1]), [&problem]);
}

#[test]
fn the_summary_does_not_list_a_thousand_nodes() {
    let mut mesh = Mesh::of(["a", "b", "c", "d", "e", "f", "g", "h"]);
    for name in ["b", "c", "d", "e", "f", "g", "h"] {
        mesh.silence(name, "no");
    }

    let summary = mesh.judged().summary;

    assert!(summary.ends_with("; no answer: b, c, d, e, f and 2 more"), "{summary}");
}

#[test]
fn what_was_said_in_a_pod_is_read_if_it_can_be() {
    let a: NodeName = "a".parse().unwrap();
    let asked = |said: Result<Output, String>| {
        let pod = "shroud-x".to_owned();
        heard(&a, Some(Asked { pod, said }))
    };
    let output = |stdout: &str, stderr: &str, code: i32| {
        Ok(Output {
            stdout: stdout.into(),
            stderr: stderr.into(),
            code,
        })
    };
    let nothing = |why: &str| Heard::Nothing {
        pod: "shroud-x".to_owned(),
        why: why.to_owned(),
    };

    let well = status([peer("b")]);
    let text = serde_json::to_string(&well).unwrap();
    // A degraded agent ends with code 1, and says why.
    assert_eq!(
        asked(output(&text, "", 1)),
        Heard::Status {
            pod: "shroud-x".to_owned(),
            status: Box::new(well)
        }
    );
    assert_eq!(
        asked(output(
            "",
            "shroud: no agent answers on /run/shroud/shroud.sock: gone\n",
            3
        )),
        nothing("`shroud status` there ends with code 3: no agent answers on /run/shroud/shroud.sock: gone")
    );
    assert_eq!(
        asked(output(r#"{"version":3}"#, "", 0)),
        nothing("its status is of version 3, this program reads version 2: use the one of the agents' release")
    );
    assert_eq!(
        asked(output(r#"{"version":2}"#, "", 0)),
        nothing("its status cannot be read: missing field `verdict`")
    );
    assert_eq!(asked(Err("no answer".to_owned())), nothing("no answer"));
    assert_eq!(asked(Err("x".repeat(10_000))), nothing(&"x".repeat(300)));
    assert_eq!(heard(&a, None), Heard::NoAgent);
    // Nobody speaks for another node.
    let b = Status {
        node: "b".parse().unwrap(),
        ..status([])
    };
    let b = serde_json::to_string(&b).unwrap();
    assert_eq!(asked(output(&b, "", 0)), nothing("its status is of node b"));
}

/// The interface: names and order of the fields.
#[test]
fn the_json_keeps_its_form() {
    let mut mesh = Mesh::of(["a", "b"]);
    mesh.silence("b", "no answer");

    let judged = serde_json::to_value(mesh.judged()).unwrap();

    let fingerprint = judged["nodes"][0]["fingerprint"].clone();
    let silent = json!({ "check": "agent-silent", "says": "no answer" });
    let expected = json!({
        "version": 1,
        "verdict": "degraded",
        "summary": "1 of 2 pairs of 2 nodes are encrypted, 1 unknown; no answer: b",
        "counts": { "all": 2, "encrypted": 1, "plain": 0, "dropped": 0, "clear": 0, "unknown": 1 },
        "optedOutPods": 0,
        "nodes": [
            { "node": "a", "pod": "a-pod", "agent": "answers", "verdict": "healthy", "gate": "enforce", "backend": "userspace",
              "fingerprint": fingerprint, "problems": [] },
            { "node": "b", "pod": "b-pod", "agent": "silent", "verdict": null, "gate": null, "backend": null, "fingerprint": null,
              "problems": [silent] },
        ],
        "pairs": [
            { "from": "a", "to": "b", "state": "encrypted", "why": null },
            { "from": "b", "to": "a", "state": "unknown", "why": silent },
        ],
    });
    assert_eq!(judged, expected);
}
