//! A mesh of nodes under test, and the questions that scenarios ask it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shroud_lab::agent::LISTEN_PORT;
use shroud_lab::frame::Allowed;
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{
    Agent, AgentOptions, Capture, Evidence, Family, Flow, Host, Lab, Outcome, Protocol, Status, Topology,
};

/// The binary under test.
pub(crate) const SHROUD: &str = env!("CARGO_BIN_EXE_shroud");

/// How long a mesh may take to come up on a busy machine.
const START: Duration = Duration::from_secs(30);

pub(crate) struct Mesh {
    pub(crate) agents: Vec<Agent>,
    pub(crate) lab: Lab,
}

impl Mesh {
    /// Nodes whose agents have all met, and say that everything is well.
    pub(crate) fn healthy(name: &str, nodes: u8) -> Result<Self> {
        let mesh = Self::started(name, nodes, &AgentOptions::new(SHROUD))?;
        mesh.all_healthy()?;
        Ok(mesh)
    }

    /// Waits until each agent has met all the others, and says that everything is well.
    pub(crate) fn all_healthy(&self) -> Result<()> {
        for agent in &self.agents {
            let what = format!("{} is healthy", agent.node().host.name);
            self.eventually(&what, START, agent, |status| self.is_healthy(status))?;
        }
        Ok(())
    }

    /// Whether an agent knows all the others, and says that everything is well. One that knows nobody yet is well, too.
    pub(crate) fn is_healthy(&self, status: &Status) -> bool {
        status.verdict == "healthy" && status.peers.len() + 1 == self.agents.len()
    }

    /// Whether the meshes under test encrypt in `shroud wire`, and not in the kernel.
    pub(crate) fn in_userspace() -> bool {
        AgentOptions::new(SHROUD).backend == "userspace"
    }

    /// Nodes whose agents were just started.
    pub(crate) fn started(name: &str, nodes: u8, options: &AgentOptions) -> Result<Self> {
        let lab = Topology::new(name).nodes(nodes).pods(2).build()?;
        let agents = Agent::start_all(&lab, options)?;
        Ok(Self { agents, lab })
    }

    /// Waits until an agent's status is as wished, and returns it.
    pub(crate) fn eventually(
        &self,
        what: &str,
        within: Duration,
        agent: &Agent,
        wished: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        self.lab.eventually(what, within, || {
            let status = agent.status().map_err(|error| format!("{error:#}"))?;
            if wished(&status) {
                Ok(status)
            } else {
                Err(format!("{:#}", status.raw))
            }
        })
    }

    /// Starts long-lived TCP connections with an echo every 10 ms: so many between each two pods, in both families.
    pub(crate) fn pulses(&self, ways: &[(&str, &str)], connections: usize) -> Result<Vec<Pulse>> {
        let each = ways.iter().flat_map(|way| Family::BOTH.map(|family| (way, family)));
        each.map(|((from, to), family)| {
            let (from, to) = (self.lab.pod(from), self.lab.pod(to));
            Pulse::start(Protocol::Tcp, family, from, to, connections, &self.lab.markers)
        })
        .collect()
    }

    /// Waits until each agent has routes to its peers. With the gate off that is all there is to wait for: nobody is healthy then.
    pub(crate) fn all_have_routes(&self) -> Result<()> {
        for agent in &self.agents {
            self.eventually("routes are there", START, agent, |status| {
                status.pass.number > 0 && !status.peers.is_empty() && status.pass.failures.is_empty()
            })?;
        }
        Ok(())
    }

    /// Insists that the same capture that finds nothing elsewhere finds the payloads here, where nothing is encrypted.
    pub(crate) fn is_seen_in_the_clear(&self) -> Result<()> {
        let capture = self.capture()?;
        self.all_flows_work("a0", "b0")?;
        let evidence = capture.stop()?;
        ensure!(evidence.plaintext_frames() > 0, "the oracle is blind: {evidence:?}");
        Ok(())
    }

    /// Captures every underlay port from now on.
    pub(crate) fn capture(&self) -> Result<Capture> {
        Capture::start(&self.lab, Allowed::wireguard(LISTEN_PORT, self.lab.protected()))
    }

    /// Sends one flow.
    pub(crate) fn send(&self, protocol: Protocol, family: Family, from: &Host, to: &Host) -> Outcome {
        Flow::new(protocol, family, from, to).run(&self.lab.markers)
    }

    /// Sends one small flow that is expected not to arrive.
    pub(crate) fn send_in_vain(&self, protocol: Protocol, family: Family, from: &Host, to: &Host) -> Outcome {
        Flow::new(protocol, family, from, to)
            .sizes(&[64])
            .patience(Duration::from_secs(2))
            .run(&self.lab.markers)
    }

    /// Insists that a flow arrived, and shows the whole lab where it did not.
    pub(crate) fn arrived(&self, outcome: &Outcome) -> Result<()> {
        ensure!(
            outcome.ok(),
            "{}: {:?}\n{}",
            outcome.flow,
            outcome.error,
            self.lab.dump()
        );
        Ok(())
    }

    /// Sends every kind of flow between the first pods of two nodes, and insists that they arrive.
    pub(crate) fn all_flows_work(&self, from: &str, to: &str) -> Result<()> {
        for protocol in Protocol::ALL {
            for family in Family::BOTH {
                let outcome = self.send(protocol, family, self.lab.pod(from), self.lab.pod(to));
                self.arrived(&outcome)?;
            }
        }
        Ok(())
    }

    /// The agent of a node.
    pub(crate) fn agent(&self, name: &str) -> &Agent {
        self.agents
            .iter()
            .find(|agent| agent.node().host.name == name)
            .expect("a node of the lab")
    }

    pub(crate) fn agent_mut(&mut self, name: &str) -> &mut Agent {
        self.agents
            .iter_mut()
            .find(|agent| agent.node().host.name == name)
            .expect("a node of the lab")
    }

    /// What a subcommand answers, as JSON.
    pub(crate) fn json(&self, node: &str, arguments: &[&str]) -> Result<Value> {
        let mut with_format = arguments.to_vec();
        with_format.extend(["-o", "json"]);
        let output = self.agent(node).ask(&with_format)?;
        serde_json::from_str(&output.stdout).with_context(|| format!("{arguments:?} answered {output:?}"))
    }
}

/// Ends connections, insists that none was lost and that each has spoken, and returns the longest gap between two echoes.
pub(crate) fn none_was_lost(pulses: Vec<Pulse>) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    for beat in pulses.into_iter().flat_map(Pulse::stop) {
        ensure!(beat.lost.is_none(), "{}: {:?}", beat.name, beat.lost);
        ensure!(beat.echoes > 0, "{} never spoke", beat.name);
        longest = longest.max(beat.longest_gap);
    }
    Ok(longest)
}

/// Ends a capture and insists that nothing leaked and nothing was missed.
pub(crate) fn nothing_leaked(capture: Capture) -> Result<Evidence> {
    let evidence = capture.stop()?;
    evidence.clean().map_err(anyhow::Error::msg)?;
    ensure!(evidence.frames() > 0, "the capture saw nothing at all");
    Ok(evidence)
}
