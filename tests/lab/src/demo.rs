//! The main job on one machine, shown and proven: three nodes, every pod byte encrypted, and a twin in which it is not.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use shroud_apiserver::Options as ClusterOptions;

use crate::agent::{self, Agent, AgentOptions, LISTEN_PORT};
use crate::capture::{Capture, Evidence};
use crate::cluster::{ANNOTATION, Cluster};
use crate::eventually::eventually;
use crate::frame::Allowed;
use crate::topology::{Family, Host, Lab, Node, Topology};
use crate::traffic::{Flow, Outcome, Protocol, run_all};

/// How long the agents may take until every pair of nodes has had a handshake.
const MEETING: Duration = Duration::from_secs(25);

/// Flows that run at the same time.
const AT_ONCE: usize = 8;

/// What the demo is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `shroud` program.
    pub shroud: PathBuf,
    /// Where the result goes, besides standard output.
    pub result: PathBuf,
    /// Repeats the flows for at least this long.
    pub soak: Duration,
    /// Whether the nodes meet in a Kubernetes cluster, and not in a folder.
    pub kubernetes: bool,
}

/// A lab with an agent on every node. Its parts go in this order: agents, cluster, lab.
pub struct Mesh {
    /// The agents, in the order of the nodes.
    pub agents: Vec<Agent>,
    /// The cluster, where the nodes meet in one.
    pub cluster: Option<Cluster>,
    /// The lab.
    pub lab: Lab,
}

/// What the demo found, in the form in which it is printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// In one word.
    pub verdict: Verdict,
    /// Nodes in the lab.
    pub nodes: usize,
    /// Pods in the lab.
    pub pods: usize,
    /// Flows whose payload arrived intact in both directions.
    pub flows_ok: usize,
    /// Flows that were tried.
    pub flows_total: usize,
    /// Bytes of captured frames in which a marker was found.
    pub plaintext_bytes: u64,
    /// Frames captured on all underlay ports.
    pub captured_frames: u64,
    /// The same as `plaintext_bytes`, with encryption off: proof that the search finds what is there.
    pub twin_plaintext_bytes: u64,
}

/// The outcome in one word; the first that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The demo could not be carried out.
    Failed,
    /// A marker, or a frame that nobody can explain, was on the wire.
    Plaintext,
    /// Frames were lost by the capture, or the twin's markers were not found: silence proves nothing.
    Blind,
    /// Nothing leaked, but some flows did not work.
    Broken,
    /// All flows worked, nothing leaked, and the search has been seen to work.
    Encrypted,
}

/// Where progress is shown.
pub struct Screen {
    out: Mutex<Box<dyn Write + Send>>,
    colour: bool,
    start: Instant,
}

/// What a run of all flows showed.
struct Proof {
    outcomes: Vec<Outcome>,
    evidence: Evidence,
}

impl Summary {
    /// What is printed when the demo could not be carried out.
    pub fn failed() -> Summary {
        Summary {
            verdict: Verdict::Failed,
            nodes: 0,
            pods: 0,
            flows_ok: 0,
            flows_total: 0,
            plaintext_bytes: 0,
            captured_frames: 0,
            twin_plaintext_bytes: 0,
        }
    }

    fn new(lab: &Lab, proof: &Proof, twin: &Evidence) -> Summary {
        let flows_ok = proof.outcomes.iter().filter(|outcome| outcome.ok()).count();
        let evidence = &proof.evidence;
        let verdict = if evidence.plaintext_frames() > 0 || evidence.stranger_frames() > 0 {
            Verdict::Plaintext
        } else if evidence.complete().and(twin.complete()).is_err() || twin.plaintext_bytes() == 0 {
            Verdict::Blind
        } else if flows_ok < proof.outcomes.len() || proof.outcomes.is_empty() {
            Verdict::Broken
        } else {
            Verdict::Encrypted
        };
        Summary {
            verdict,
            nodes: lab.nodes.len(),
            pods: lab.pods().count(),
            flows_ok,
            flows_total: proof.outcomes.len(),
            plaintext_bytes: evidence.plaintext_bytes(),
            captured_frames: evidence.frames(),
            twin_plaintext_bytes: twin.plaintext_bytes(),
        }
    }

    /// One line of JSON.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).context("write the result as JSON")
    }
}

impl Verdict {
    /// The outcome in a sentence.
    pub fn meaning(self) -> &'static str {
        match self {
            Verdict::Failed => "the demo could not be carried out",
            Verdict::Plaintext => "plaintext, or a frame that nobody can explain, was on the wire",
            Verdict::Blind => "silence proves nothing: frames were lost, or the twin's plaintext was not found",
            Verdict::Broken => "nothing leaked, but not all flows worked",
            Verdict::Encrypted => "encrypted: all flows worked, and no byte of a pod was on the wire in the clear",
        }
    }
}

impl Screen {
    /// Shows progress on this writer.
    pub fn new(out: Box<dyn Write + Send>, colour: bool) -> Screen {
        Screen {
            out: Mutex::new(out),
            colour,
            start: Instant::now(),
        }
    }

    /// Shows a line as it is.
    pub fn line(&self, text: &str) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Progress that nobody can read any more is no reason to stop.
        drop(writeln!(out, "{text}"));
    }

    fn step(&self, text: &str) {
        let seconds = self.start.elapsed().as_secs_f32();
        self.line(&format!(
            "{} {}",
            self.paint("2", &format!("[{seconds:5.1} s]")),
            self.paint("1", text)
        ));
    }

    fn verdict(&self, good: bool, text: &str) {
        let word = if good {
            self.paint("32", "   ok  ")
        } else {
            self.paint("31", " FAILED ")
        };
        self.line(&format!("{word} {text}"));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Runs the whole demo; the lab comes back alive with its agents, to be looked at or dropped.
pub fn run(options: &Options, screen: &Screen) -> Result<(Summary, Mesh)> {
    if !options.shroud.exists() {
        bail!(
            "{} does not exist; build it with `cargo build -p shroud`",
            options.shroud.display()
        );
    }
    let (proof, mesh) = encrypted(options, screen)?;
    let twin = twin(options, screen)?;
    let summary = Summary::new(&mesh.lab, &proof, &twin);
    screen.step("Verdict");
    screen.verdict(summary.verdict == Verdict::Encrypted, summary.verdict.meaning());
    Ok((summary, mesh))
}

/// Captures every port of a lab, and starts its agents, in a cluster if so wished.
fn raise(lab: Lab, options: &Options, agent: &AgentOptions) -> Result<(Capture, Mesh)> {
    let cluster = options
        .kubernetes
        .then(|| Cluster::start(&lab, ClusterOptions::default()));
    let cluster = cluster.transpose()?;
    if let Some(cluster) = &cluster {
        cluster.add_agent_pods(&lab, &options.shroud)?;
    }
    let allowed = match &cluster {
        Some(cluster) => cluster.allowed(&lab),
        None => Allowed::wireguard(LISTEN_PORT, lab.protected()),
    };
    let capture = Capture::start(&lab, allowed)?;
    let start = |node: &Node| match &cluster {
        Some(cluster) => Agent::start(node, &cluster.agent(node, agent)),
        None => Agent::start(node, agent),
    };
    let agents = lab.nodes.iter().map(start).collect::<Result<_>>()?;
    Ok((capture, Mesh { agents, cluster, lab }))
}

/// The real thing.
fn encrypted(options: &Options, screen: &Screen) -> Result<(Proof, Mesh)> {
    screen.step("Building three nodes with two pods each, as network namespaces");
    let lab = Topology::new("demo").build()?;
    screen.line(&picture(&lab));

    screen.step(if options.kubernetes {
        "Capturing every port of the underlay, and starting an API server and the agents"
    } else {
        "Capturing every port of the underlay, and starting the agents"
    });
    let (capture, mut mesh) = raise(lab, options, &AgentOptions::new(&options.shroud))?;
    let outcomes = meet(&mesh.lab, &mut mesh.agents)
        .inspect(|()| screen.verdict(true, "every pair of nodes has had a handshake"))
        .map(|()| send(&mesh.lab, options.soak, screen));
    let outcomes = match outcomes {
        Ok(outcomes) => outcomes,
        Err(error) => {
            let seen = capture.stop()?;
            return Err(error
                .context(keep_dump(&mesh.lab, options))
                .context(format!("on the wire: {seen}")));
        }
    };
    let evidence = capture.stop()?;

    if let Some(cluster) = &mesh.cluster {
        screen.step("What the cluster knows of each node");
        let mut text = String::new();
        for node in &mesh.lab.nodes {
            let name = &node.host.name;
            let announced = cluster.announcement(name)?.unwrap_or_default();
            text.push_str(&format!("{name}  {ANNOTATION}: {announced}\n"));
        }
        screen.line(&indent(&text));
    }
    screen.step("What each node says");
    for agent in &mesh.agents {
        let output = agent.ask(&["status"])?;
        screen.line(&indent(&format!("{}{}", output.stdout, output.stderr)));
    }
    screen.step("What was on the wire");
    screen.line(&indent(&evidence.to_string()));
    let clean = evidence.clean();
    screen.verdict(
        clean.is_ok(),
        &format!(
            "{} frames captured, {} bytes in the clear",
            evidence.frames(),
            evidence.plaintext_bytes()
        ),
    );
    if clean.is_err() || outcomes.iter().any(|outcome| !outcome.ok()) {
        screen.line(&keep_dump(&mesh.lab, options));
    }
    Ok((Proof { outcomes, evidence }, mesh))
}

/// The same with encryption off: the search must find what is in the clear.
fn twin(options: &Options, screen: &Screen) -> Result<Evidence> {
    screen.step("The sanity twin: the same with encryption off");
    let lab = Topology::new("twin").build()?;
    let agent = AgentOptions::new(&options.shroud).gate("off");
    let (capture, mut mesh) = raise(lab, options, &agent)?;
    let Mesh { agents, lab, .. } = &mut mesh;
    eventually("traffic in the clear between all nodes", MEETING, || {
        alive(agents)?;
        let outcomes = run_all(&greetings(lab), &lab.markers, AT_ONCE, &|_| ());
        match outcomes.into_iter().find(|outcome| !outcome.ok()) {
            None => Ok(()),
            Some(outcome) => Err(format!("{}: {}", outcome.flow, outcome.error.unwrap_or_default())),
        }
    })
    .map_err(|error| error.context(keep_dump(lab, options)))?;
    send(lab, Duration::ZERO, screen);
    let evidence = capture.stop()?;
    screen.verdict(
        evidence.plaintext_bytes() > 0,
        &format!(
            "the same search finds {} bytes in the clear here",
            evidence.plaintext_bytes()
        ),
    );
    if let Some(offender) = evidence.ports.values().flat_map(|port| &port.offenders).next() {
        screen.line(&format!(
            "         e.g. {}: {}",
            offender.flow.as_deref().unwrap_or("?"),
            offender.summary
        ));
    }
    Ok(evidence)
}

/// Waits for a handshake of every pair, while pods talk from the first moment on: nothing may leak at start either.
fn meet(lab: &Lab, agents: &mut [Agent]) -> Result<()> {
    let nodes = lab.nodes.len();
    let met = eventually("a handshake of every pair of nodes", MEETING, || {
        if let Err(dead) = alive(agents) {
            return Ok(Err(dead));
        }
        let outcomes = run_all(&greetings(lab), &lab.markers, AT_ONCE, &|_| ());
        if let Some(failed) = outcomes.into_iter().find(|outcome| !outcome.ok()) {
            return Err(format!("{}: {}", failed.flow, failed.error.unwrap_or_default()));
        }
        for agent in agents.iter() {
            agent.status().map_err(|error| format!("{error:#}"))?.met_all(nodes)?;
        }
        Ok(Ok(()))
    })?;
    met.map_err(anyhow::Error::msg)
}

/// One short ping between the first pods of each pair of nodes.
fn greetings(lab: &Lab) -> Vec<Flow> {
    let firsts: Vec<&Host> = lab.nodes.iter().filter_map(|node| node.pods.first()).collect();
    let pairs = firsts.iter().flat_map(|from| firsts.iter().map(move |to| (*from, *to)));
    pairs
        .filter(|(from, to)| from.name != to.name)
        .map(|(from, to)| {
            Flow::new(Protocol::Icmp, Family::V4, from, to)
                .sizes(&[64])
                .patience(Duration::from_millis(250))
        })
        .collect()
}

fn alive(agents: &mut [Agent]) -> Result<(), String> {
    for agent in agents {
        if let Ok(Some(status)) = agent.exited() {
            let node = agent.node();
            return Err(format!(
                "the agent of {} ended ({status}):\n{}",
                node.host.name,
                node.log_tail(20)
            ));
        }
    }
    Ok(())
}

/// Sends every flow there is, for at least this long.
fn send(lab: &Lab, soak: Duration, screen: &Screen) -> Vec<Outcome> {
    screen.step("Sending ICMP, UDP and TCP over IPv4 and IPv6, a random marker in every payload");
    let groups = [
        ("pod to pod, across nodes", flows(lab, |from, to| from != to)),
        ("pod to pod, on one node", flows(lab, |from, to| from == to)),
        ("node to pod", node_flows(lab)),
    ];
    let start = Instant::now();
    let mut all = Vec::new();
    loop {
        for (name, flows) in &groups {
            let begin = Instant::now();
            let outcomes = run_all(flows, &lab.markers, AT_ONCE, &|outcome| {
                if let Some(error) = &outcome.error {
                    screen.line(&format!("         {}: {error}", outcome.flow));
                }
            });
            let ok = outcomes.iter().filter(|outcome| outcome.ok()).count();
            let bytes: u64 = outcomes.iter().map(|outcome| outcome.bytes).sum();
            screen.verdict(
                ok == flows.len(),
                &format!(
                    "{name:<25} {ok:>3} of {:>3} flows, {:>6.1} MB, {:.1} s",
                    flows.len(),
                    bytes as f64 / 1e6,
                    begin.elapsed().as_secs_f32()
                ),
            );
            all.extend(outcomes);
        }
        if start.elapsed() >= soak {
            return all;
        }
    }
}

/// Every protocol and family between all pods whose nodes fit.
fn flows(lab: &Lab, fit: impl Fn(&str, &str) -> bool) -> Vec<Flow> {
    let mut flows = Vec::new();
    for (from_node, from) in pods(lab) {
        for (to_node, to) in pods(lab) {
            if from.name != to.name && fit(&from_node.host.name, &to_node.host.name) {
                flows.extend(every_kind(from, to));
            }
        }
    }
    flows
}

/// Every protocol and family from each node to all pods, its own included.
fn node_flows(lab: &Lab) -> Vec<Flow> {
    lab.nodes
        .iter()
        .flat_map(|node| lab.pods().flat_map(|pod| every_kind(&node.host, pod)))
        .collect()
}

fn pods(lab: &Lab) -> impl Iterator<Item = (&Node, &Host)> {
    lab.nodes
        .iter()
        .flat_map(|node| node.pods.iter().map(move |pod| (node, pod)))
}

fn every_kind(from: &Host, to: &Host) -> Vec<Flow> {
    let kinds = Protocol::ALL
        .into_iter()
        .flat_map(|protocol| Family::BOTH.map(|family| (protocol, family)));
    kinds
        .map(|(protocol, family)| Flow::new(protocol, family, from, to))
        .collect()
}

/// Writes what there is to see beside the result, and says where.
fn keep_dump(lab: &Lab, options: &Options) -> String {
    let path = options.result.with_file_name(format!("{}-dump.txt", lab.name));
    match fs::write(&path, lab.dump()) {
        Ok(()) => format!("the state of all nodes is in {}", path.display()),
        Err(error) => format!(
            "the state of all nodes could not be written to {}: {error}",
            path.display()
        ),
    }
}

/// The lab as a drawing.
fn picture(lab: &Lab) -> String {
    let mut rows = vec![String::new(); 7];
    for node in &lab.nodes {
        let pods: Vec<_> = node.pods.iter().map(|pod| format!("({})", pod.name)).collect();
        let cells = [
            pods.join("  "),
            r"\    /".to_owned(),
            format!("[ node {} ]", node.host.name),
            node.prefix4.to_string(),
            node.prefix6.to_string(),
            node.host.v4.to_string(),
            "|".to_owned(),
        ];
        for (row, cell) in rows.iter_mut().zip(cells) {
            row.push_str(&format!("{cell:^25}"));
        }
    }
    rows.push(format!(
        "{:=^width$}",
        " underlay, captured on every port ",
        width = 25 * lab.nodes.len()
    ));
    indent(&rows.join("\n"))
}

/// How to look around in a lab that is left running.
pub fn tour(mesh: &Mesh, options: &Options) -> String {
    let Mesh { lab, cluster, .. } = mesh;
    let mut text = String::from("\nThe lab is left running. Look around, as root, from another terminal:\n");
    let shroud = options.shroud.display();
    for node in &lab.nodes {
        let netns = node.host.netns.name();
        let socket = agent::socket(node);
        text.push_str(&format!(
            "\n  node {}\n    {shroud} status --socket {}\n    ip netns exec {netns} wg show {}\n    ip netns exec {netns} ip route\n    tail {}\n",
            node.host.name,
            socket.display(),
            node.device,
            node.log().display()
        ));
    }
    if let Some(cluster) = cluster {
        text.push_str(&format!(
            "\n  the cluster (kubectl is Debian's kubernetes-client)\n    \
             ip netns exec {netns} kubectl --kubeconfig {admin} get nodes -o yaml\n    \
             ip netns exec {netns} {} status --kubeconfig {admin}\n",
            cluster.plugin().display(),
            netns = lab.underlay.name(),
            admin = cluster.admin().display(),
        ));
    }
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    let explain = format!(
        "{shroud} explain {} {} --socket {}",
        a.pods[0].v4,
        b.pods[0].v4,
        agent::socket(a).display()
    );
    text.push_str(&format!(
        "\n  talk from pod {} to pod {}, watch the wire, and ask why it looks so\n    \
         ip netns exec {} ping {}\n    \
         ip netns exec {} tcpdump -ni {}\n    \
         {explain}\n\n\
         Press Ctrl-C here to end and remove it.\n",
        a.pods[0].name,
        b.pods[0].name,
        a.pods[0].netns.name(),
        b.pods[0].v4,
        lab.underlay.name(),
        a.port,
    ));
    text
}

fn indent(text: &str) -> String {
    text.trim_end().lines().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_has_exactly_the_promised_keys() {
        let summary = Summary {
            verdict: Verdict::Encrypted,
            ..Summary::failed()
        };

        assert_eq!(
            summary.json().unwrap(),
            r#"{"verdict":"encrypted","nodes":0,"pods":0,"flows_ok":0,"flows_total":0,"plaintext_bytes":0,"captured_frames":0,"twin_plaintext_bytes":0}"#
        );
    }
}
