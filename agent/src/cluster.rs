//! What all agents of a cluster say together: whether what each node sends to each other one is encrypted. Pure.
//!
//! ```text
//!  what a says ──┐
//!  what b says ──┼──> judge() ──> for each ordered pair: encrypted, dropped, clear or unknown, and why
//!  c is silent ──┘
//! ```
//!
//! The sender's word counts, for its gate decides what leaves it, and the receiver's, for it decides what it takes. Where nobody's word is to
//! be had, nothing is assumed: a node without an agent may send in the clear.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use shroud_keyd::kubernetes::{Asked, Output};
use shroud_model::NodeName;

use crate::check::{Check, Problem};
use crate::status::{self, PeerStatus, Status, Verdict};

/// The version of the JSON form.
pub(crate) const VERSION: u32 = 1;
/// How much is repeated of why an agent says nothing of use, in characters: it stands with each of its pairs.
const LONGEST_COMPLAINT: usize = 300;

/// What was heard from a node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Heard {
    /// The status of its agent.
    Status { pod: String, status: Box<Status> },
    /// Nothing that can be used, though there is a pod; and why.
    Nothing { pod: String, why: String },
    /// It has no agent's pod.
    NoAgent,
}

/// The whole of it. `docs/status.md` explains each field.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClusterStatus {
    pub(crate) version: u32,
    pub(crate) verdict: Verdict,
    /// One line that says what the verdict rests on.
    pub(crate) summary: String,
    pub(crate) counts: Counts,
    /// How many pods have opted out of encryption, as far as the agents know.
    pub(crate) opted_out_pods: usize,
    pub(crate) nodes: Vec<ClusterNode>,
    /// Each ordered pair of two nodes, once.
    pub(crate) pairs: Vec<Pair>,
}

/// How many pairs there are of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Counts {
    pub(crate) all: usize,
    pub(crate) encrypted: usize,
    pub(crate) plain: usize,
    pub(crate) dropped: usize,
    pub(crate) clear: usize,
    pub(crate) unknown: usize,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClusterNode {
    pub(crate) node: NodeName,
    /// The pod of its agent.
    pub(crate) pod: Option<String>,
    pub(crate) agent: AgentState,
    /// What its agent's own verdict is.
    pub(crate) verdict: Option<Verdict>,
    /// `enforce`, `audit` or `off`.
    pub(crate) gate: Option<String>,
    pub(crate) backend: Option<String>,
    pub(crate) fingerprint: Option<String>,
    /// What needs a look, as its agent says, or because it says nothing.
    pub(crate) problems: Vec<Problem>,
}

/// Whether an agent can be heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum AgentState {
    Answers,
    Silent,
    Missing,
}

/// What one node sends to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pair {
    pub(crate) from: NodeName,
    pub(crate) to: NodeName,
    pub(crate) state: PairState,
    /// Why it is not encrypted.
    pub(crate) why: Option<Problem>,
}

/// What becomes of protected traffic from one node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum PairState {
    /// It may leave in the clear.
    Clear,
    /// Nobody says.
    Unknown,
    /// Nothing leaves in the clear, and nothing arrives.
    Dropped,
    /// It is in the clear, as the configuration has it.
    Plain,
    /// It is encrypted, and arrives.
    Encrypted,
}

/// Takes what was said in the pod on a node for the status of its agent, if it can be.
pub(crate) fn heard(node: &NodeName, asked: Option<Asked>) -> Heard {
    let Some(Asked { pod, said }) = asked else {
        return Heard::NoAgent;
    };
    match said.and_then(|output| read(node, &output)) {
        Ok(status) => Heard::Status {
            pod,
            status: Box::new(status),
        },
        Err(why) => Heard::Nothing {
            pod,
            why: why.chars().take(LONGEST_COMPLAINT).collect(),
        },
    }
}

fn read(node: &NodeName, output: &Output) -> Result<Status, String> {
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|_| {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let complaint = complaint.trim().trim_start_matches("shroud: ");
        format!("`shroud status` there ends with code {}: {complaint}", output.code)
    })?;
    let version = &said["version"];
    if *version != status::VERSION {
        let known = status::VERSION;
        return Err(format!(
            "its status is of version {version}, this program reads version {known}: use the one of the agents' release"
        ));
    }
    let status: Status = serde_json::from_value(said).map_err(|error| format!("its status cannot be read: {error}"))?;
    if status.node != *node {
        return Err(format!("its status is of node {}", status.node));
    }
    Ok(status)
}

/// Says of each pair what becomes of it, and of the whole whether all is well.
pub(crate) fn judge(heard: &BTreeMap<NodeName, Heard>) -> ClusterStatus {
    let agents: BTreeMap<&NodeName, Agent<'_>> = heard
        .iter()
        .filter_map(|(name, heard)| Some((name, Agent::of(heard)?)))
        .collect();
    let mut pairs = Vec::new();
    let mut counts = Counts::default();
    for (from, sender) in heard {
        for to in heard.keys().filter(|to| *to != from) {
            let (state, why) = match (agents.get(from), sender) {
                (Some(agent), _) => agent.sends(from, to, agents.get(to)),
                (None, Heard::Nothing { why, .. }) => (PairState::Unknown, Some(silent(why))),
                (None, Heard::NoAgent | Heard::Status { .. }) => (PairState::Clear, Some(missing())),
            };
            counts.all += 1;
            *match state {
                PairState::Clear => &mut counts.clear,
                PairState::Unknown => &mut counts.unknown,
                PairState::Dropped => &mut counts.dropped,
                PairState::Plain => &mut counts.plain,
                PairState::Encrypted => &mut counts.encrypted,
            } += 1;
            pairs.push(Pair {
                from: from.clone(),
                to: to.clone(),
                state,
                why,
            });
        }
    }
    let nodes: Vec<ClusterNode> = heard.iter().map(|(name, heard)| node(name, heard)).collect();
    let is_well = |node: &ClusterNode| node.verdict == Some(Verdict::Healthy);
    let verdict = if counts.are_as_wished() && nodes.iter().all(is_well) {
        Verdict::Healthy
    } else {
        Verdict::Degraded
    };
    let opted_out = agents
        .values()
        .flat_map(|agent| agent.status.opted_out.iter().flatten());
    let opted_out: BTreeSet<&str> = opted_out.map(|claim| claim.pod.as_str()).collect();
    ClusterStatus {
        version: VERSION,
        verdict,
        summary: summary(counts, opted_out.len(), &nodes),
        counts,
        opted_out_pods: opted_out.len(),
        nodes,
        pairs,
    }
}

impl Counts {
    /// Whether each pair is encrypted, unless the configuration has it otherwise.
    fn are_as_wished(self) -> bool {
        self.encrypted + self.plain == self.all
    }
}

/// An agent that answered, with what is looked up for every other one.
struct Agent<'a> {
    status: &'a Status,
    peers: BTreeMap<&'a NodeName, &'a PeerStatus>,
    /// Why protected traffic may leave its node in the clear.
    leak: Option<Problem>,
}

impl<'a> Agent<'a> {
    fn of(heard: &'a Heard) -> Option<Self> {
        match heard {
            Heard::Status { status, .. } => Some(Self {
                status,
                peers: status.peers.iter().map(|peer| (&peer.node, peer)).collect(),
                leak: leak(status),
            }),
            Heard::Nothing { .. } | Heard::NoAgent => None,
        }
    }

    /// What becomes of what its node, `from`, sends to another.
    fn sends(&self, from: &NodeName, to: &NodeName, receiver: Option<&Agent<'_>>) -> (PairState, Option<Problem>) {
        if let Some(leak) = &self.leak {
            return (PairState::Clear, Some(leak.clone()));
        }
        let Some(peer) = self.peers.get(to) else {
            return (PairState::Dropped, Some(stranger(self.status, to, "sender")));
        };
        let mut problems = peer.problems.iter();
        if let Some(leak) = problems.find(|problem| problem.check == Check::PeerNotOverUplink) {
            return (PairState::Clear, Some(leak.clone()));
        }
        // Only where both have the same configuration, as the agents have found out.
        if let Some(why) = &peer.in_the_clear {
            return (PairState::Plain, Some(Check::PairPlain.says(why)));
        }
        let refusal = receiver.and_then(|receiver| {
            let Some(known) = receiver.peers.get(from) else {
                return Some(stranger(receiver.status, from, "receiver"));
            };
            differs(self.status, known, to).or_else(|| differs(receiver.status, peer, from))
        });
        match refusal.or_else(|| obstacle(peer)) {
            Some(why) => (PairState::Dropped, Some(why)),
            None => (PairState::Encrypted, None),
        }
    }
}

/// That an agent has another key than it has as somebody's peer, if so.
fn differs(agent: &Status, as_peer: &PeerStatus, whose: &NodeName) -> Option<Problem> {
    let says = || {
        let (node, key, other) = (&agent.node, &agent.fingerprint, &as_peer.fingerprint);
        Check::KeyDiffers.says(format!(
            "{node} has the key {key}, and {whose} takes {other} for its key"
        ))
    };
    let next = agent.rotation.as_ref().map(|rotation| rotation.public_key);
    let known = [Some(agent.public_key), next];
    (!known.contains(&Some(as_peer.public_key))).then(says)
}

/// Why protected traffic may leave a node in the clear, if so.
fn leak(status: &Status) -> Option<Problem> {
    let leaks = [
        Check::GateOff,
        Check::GateAudits,
        Check::GateNotAttached,
        Check::GateFailed,
    ];
    let mut problems = status.problems.iter();
    if let Some(problem) = problems.find(|problem| leaks.contains(&problem.check)) {
        return Some(problem.clone());
    }
    if status.gate.mode != "enforce" {
        return Some(Check::GateOff.says(format!("gate.mode is {}", status.gate.mode)));
    }
    if status.gate.uplinks.is_empty() {
        return Some(Check::GateNotAttached.says("the gate is on no uplink"));
    }
    None
}

/// Why nothing gets to a peer through the tunnel, if so.
fn obstacle(peer: &PeerStatus) -> Option<Problem> {
    // Sent to in another way than was wished, but encrypted.
    let hinders = |problem: &&Problem| problem.check != Check::PeerOverlayDiffers;
    let problem = peer.problems.iter().find(hinders).cloned();
    let never = || Check::PeerNoHandshake.says("no handshake yet");
    problem.or_else(|| peer.handshake_age_seconds.is_none().then(never))
}

/// Why an agent has no such peer.
fn stranger(status: &Status, node: &NodeName, by: &str) -> Problem {
    match status.refused.iter().find(|refused| refused.node == node.as_str()) {
        Some(refused) => {
            let reasons = refused.reasons.join("; ");
            Check::NodeRefused.says(format!("{node} is refused by the {by}: {reasons}"))
        }
        None => Check::PeerUnknown.says(format!("the {by} does not know {node}")),
    }
}

fn missing() -> Problem {
    Check::AgentMissing.says("no agent's pod runs there, so what its pods send may be in the clear")
}

fn silent(why: &str) -> Problem {
    Check::AgentSilent.says(why)
}

fn node(name: &NodeName, heard: &Heard) -> ClusterNode {
    let (pod, agent, status, problems) = match heard {
        Heard::Status { pod, status } => (Some(pod), AgentState::Answers, Some(status), status.problems.clone()),
        Heard::Nothing { pod, why } => (Some(pod), AgentState::Silent, None, vec![silent(why)]),
        Heard::NoAgent => (None, AgentState::Missing, None, vec![missing()]),
    };
    ClusterNode {
        node: name.clone(),
        pod: pod.cloned(),
        agent,
        verdict: status.map(|status| status.verdict),
        gate: status.map(|status| status.gate.mode.clone()),
        backend: status.map(|status| status.encryption.backend.clone()),
        fingerprint: status.map(|status| status.fingerprint.clone()),
        problems,
    }
}

fn summary(counts: Counts, opted_out: usize, nodes: &[ClusterNode]) -> String {
    let Counts { all, encrypted, .. } = counts;
    let names = |wanted: &dyn Fn(&ClusterNode) -> bool| -> Vec<&str> {
        let chosen = nodes.iter().filter(|node| wanted(node));
        chosen.map(|node| node.node.as_str()).collect()
    };
    let mut said = if encrypted == all {
        format!("each of {all} pairs of {} nodes is encrypted", nodes.len())
    } else {
        let others = [
            (counts.clear, "may be in the clear"),
            (counts.plain, "in the clear by configuration"),
            (counts.dropped, "dropped"),
            (counts.unknown, "unknown"),
        ];
        let others: Vec<String> = others
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        format!(
            "{encrypted} of {all} pairs of {} nodes are encrypted, {}",
            nodes.len(),
            others.join(", ")
        )
    };
    if opted_out > 0 {
        said = format!("{said}; pods that have opted out: {opted_out}");
    }
    let lists = [
        ("no agent", names(&|node| node.agent == AgentState::Missing)),
        ("no answer", names(&|node| node.agent == AgentState::Silent)),
        (
            "need a look",
            names(&|node| counts.are_as_wished() && node.verdict == Some(Verdict::Degraded)),
        ),
    ];
    for (what, names) in lists.into_iter().filter(|(_, names)| !names.is_empty()) {
        said = format!("{said}; {what}: {}", shortened(&names));
    }
    said
}

/// The first few names, and how many more there are.
fn shortened(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..SHOWN].join(", ")),
    }
}

impl ClusterStatus {
    /// The pairs that are not encrypted, those with the same reason together, worst first.
    pub(crate) fn by_reason(&self) -> Vec<(PairState, &Problem, Vec<&Pair>)> {
        let mut groups: BTreeMap<(PairState, Check, &str), (&Problem, Vec<&Pair>)> = BTreeMap::new();
        for pair in &self.pairs {
            if let Some(why) = &pair.why {
                let key = (pair.state, why.check, &*why.says);
                groups.entry(key).or_insert((why, Vec::new())).1.push(pair);
            }
        }
        let groups = groups.into_iter();
        groups.map(|((state, ..), (why, pairs))| (state, why, pairs)).collect()
    }

    /// What is wrong with a node, apart from what is said of its pairs.
    pub(crate) fn other_problems<'a>(&self, node: &'a ClusterNode) -> Vec<&'a Problem> {
        let of_pairs: BTreeSet<Check> = [
            Check::AgentMissing,
            Check::AgentSilent,
            Check::GateAudits,
            Check::GateFailed,
            Check::GateNotAttached,
            Check::GateOff,
            Check::NodeRefused,
            Check::PeerNoHandshake,
            Check::PeerNotConfigured,
            Check::PeerNotOverUplink,
            Check::PeerUnreachable,
        ]
        .into();
        // A cluster of one node has no pairs to tell it of.
        let is_told = |problem: &&Problem| !self.pairs.is_empty() && of_pairs.contains(&problem.check);
        node.problems.iter().filter(|problem| !is_told(problem)).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests;
