//! Where a row happens: three nodes with pods and real agents, connections between the pods, and a capture of every underlay port.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use shroud_apiserver::Options;
use shroud_lab::agent::LISTEN_PORT;
use shroud_lab::cluster::Cluster;
use shroud_lab::eventually::patience;
use shroud_lab::frame::Allowed;
use shroud_lab::traffic::{Load, Mix};
use shroud_lab::{Agent, AgentOptions, Capture, Family, Flow, Lab, Node, Protocol, Status, Topology, eventually};

use crate::chance::Chance;
use crate::held::Held;
use crate::row::{Leaves, Meeting, Oracle, Row};
use crate::table::{Figures, Outcome};

/// The binary under test.
pub(crate) const SHROUD: &str = env!("CARGO_BIN_EXE_shroud");

/// How long a mesh may take to come up.
const START: Duration = Duration::from_secs(30);

/// How long a mesh may take to be well again before the row gives up waiting; how long it should, the row says.
const PATIENCE: Duration = Duration::from_secs(45);

/// How long a connection may need at least to speak again once its path is back: TCP waits as long again as the outage was, and a bit.
const SPEAKS: Duration = Duration::from_secs(20);

/// The pods between which the connections are. Each node talks to both others, and each pod to somebody.
const PAIRS: [(&str, &str); 6] = [
    ("a0", "b0"),
    ("b0", "c0"),
    ("c0", "a0"),
    ("a1", "c1"),
    ("b1", "a1"),
    ("c1", "b1"),
];

/// How many connections, and how lively.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// 200.
    Full,
    /// 20, for emulated machines.
    Small,
}

/// Three nodes at work.
pub(crate) struct Field {
    load: Load,
    capture: Capture,
    pub(crate) agents: Vec<Agent>,
    pub(crate) cluster: Option<Cluster>,
    pub(crate) lab: Lab,
    pub(crate) options: AgentOptions,
    pub(crate) chance: Chance,
    /// What an agent says when it is well.
    well: fn(&Status) -> bool,
    leaves: Leaves,
    /// What each node held before the fault.
    before: BTreeMap<String, Held>,
    /// When the fault ended, or began where it is over at once.
    since: Instant,
    /// The longest that healing took.
    heal: Duration,
}

impl Size {
    fn mix(self) -> Mix {
        match self {
            Size::Full => Mix {
                bulk: 20,
                echo: 40,
                idle: 140,
            },
            Size::Small => Mix {
                bulk: 2,
                echo: 4,
                idle: 14,
            },
        }
    }
}

impl Field {
    /// Builds the nodes, waits until their agents are well, and opens the connections.
    pub(crate) fn build(row: &Row, size: Size, seed: u64) -> Result<Field> {
        let lab = Topology::new("faults").build()?;
        let options = (row.options)(AgentOptions::new(SHROUD));
        let cluster = match row.meets {
            Meeting::Folder => None,
            Meeting::Cluster => Some(Cluster::start(&lab, Options::default())?),
        };
        let agents = lab
            .nodes
            .iter()
            .map(|node| Agent::start(node, &of_node(cluster.as_ref(), node, &options)))
            .collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            wait_for(agent, "it is well", START, row.well)?;
        }

        let allowed = match &cluster {
            Some(cluster) => cluster.allowed(&lab),
            None => Allowed::wireguard(LISTEN_PORT, lab.protected()),
        };
        let capture = Capture::start(&lab, (row.allows)(&lab, allowed))?;
        let pairs = PAIRS.map(|(from, to)| (lab.pod(from), lab.pod(to)));
        let load = Load::start(&pairs, size.mix(), &lab.markers)?;
        let mut field = Field {
            load,
            capture,
            agents,
            cluster,
            options,
            chance: Chance::new(seed, row.id),
            well: row.well,
            leaves: row.leaves,
            before: BTreeMap::new(),
            since: Instant::now(),
            heal: Duration::ZERO,
            lab,
        };
        field.all_speak(Instant::now())?;
        field.before = field.held()?;
        field.load.forget();
        Ok(field)
    }

    /// The agent of a node.
    pub(crate) fn agent(&mut self, name: &str) -> &mut Agent {
        self.agents
            .iter_mut()
            .find(|agent| agent.node().host.name == name)
            .expect("a node of the lab")
    }

    /// A node, as something to keep beside the agents.
    pub(crate) fn node(&self, name: &str) -> Node {
        self.lab.node(name).clone()
    }

    /// The options with which the agent of a node runs.
    pub(crate) fn options_of(&self, node: &Node) -> AgentOptions {
        of_node(self.cluster.as_ref(), node, &self.options)
    }

    /// The cluster in which the nodes meet.
    pub(crate) fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().context("the nodes of this row meet in a cluster")
    }

    /// What the agent of a node says.
    pub(crate) fn status(&mut self, name: &str) -> Result<Status> {
        self.agent(name).status()
    }

    /// Waits until the agent of a node says this.
    pub(crate) fn says(&mut self, name: &str, what: &str, wished: impl Fn(&Status) -> bool) -> Result<Status> {
        wait_for(self.agent(name), what, PATIENCE, wished)
    }

    /// From here on the mesh can heal: the fault was a moment's, or has ended.
    pub(crate) fn fault(&mut self) {
        self.since = Instant::now();
    }

    /// Lets a moment pass, so that what comes next meets an agent at any place of its passes.
    pub(crate) fn at_any_moment(&mut self) {
        let moment = self.chance.up_to(Duration::from_secs(3));
        std::thread::sleep(moment);
    }

    /// Lets a fault last.
    pub(crate) fn lasts(&self, seconds: u64) {
        std::thread::sleep(Duration::from_secs(seconds));
    }

    /// Does something, and insists that no agent changed anything in its kernel because of it.
    pub(crate) fn changes_nothing(&mut self, work: impl FnOnce(&mut Field) -> Result<()>) -> Result<()> {
        let before = self.changes()?;
        work(self)?;
        let after = self.changes()?;
        ensure!(
            after == before,
            "something was changed:\n{}",
            after.difference(&before).cloned().collect::<Vec<_>>().join("\n")
        );
        Ok(())
    }

    /// What all agents say that they changed.
    fn changes(&self) -> Result<BTreeSet<String>> {
        let mut lines = BTreeSet::new();
        for node in &self.lab.nodes {
            let log = fs::read_to_string(node.log()).context("read an agent's log")?;
            let changes = log.lines().filter(|line| line.contains(" changed driver="));
            lines.extend(changes.map(|line| format!("{}: {line}", node.host.name)));
        }
        Ok(lines)
    }

    /// Waits until all agents are well, each node holds what it held before, and fresh datagrams pass between all of them; then until
    /// every connection speaks again.
    pub(crate) fn heals(&mut self) -> Result<()> {
        eventually("all is well again", PATIENCE, || {
            self.is_well().map_err(|error| format!("{error:#}"))
        })?;
        self.heal = self.heal.max(self.since.elapsed());
        self.all_speak(Instant::now())
    }

    /// Why not all is well yet, if so.
    fn is_well(&self) -> Result<()> {
        for agent in &self.agents {
            let status = agent.status()?;
            ensure!((self.well)(&status), "{} says {}", status.node, told(&status));
        }
        if self.leaves == Leaves::AllAsBefore {
            self.holds_what_it_held()?;
        }
        self.datagrams_pass()
    }

    /// Insists that each node's kernel holds what it held before the fault.
    pub(crate) fn holds_what_it_held(&self) -> Result<()> {
        for (name, difference) in self.differences()? {
            ensure!(difference.is_empty(), "{name} holds something else:\n{difference}");
        }
        Ok(())
    }

    /// What each node's kernel lacks of what it held before the fault, and what it has beyond it.
    pub(crate) fn differences(&self) -> Result<Vec<(String, String)>> {
        let held = self.held()?.into_iter();
        Ok(held
            .map(|(name, held)| {
                let difference = held.difference(&self.before[&name]);
                (name, difference)
            })
            .collect())
    }

    /// Sends a datagram and its answer between the nodes of each pair, in both families.
    pub(crate) fn datagrams_pass(&self) -> Result<()> {
        for (from, to) in PAIRS {
            for family in Family::BOTH {
                let outcome = Flow::new(Protocol::Udp, family, self.lab.pod(from), self.lab.pod(to))
                    .sizes(&[100])
                    .patience(Duration::from_millis(300) * patience()?)
                    .run(&self.lab.markers);
                ensure!(outcome.ok(), "{}: {}", outcome.flow, outcome.error.unwrap_or_default());
            }
        }
        Ok(())
    }

    fn all_speak(&self, since: Instant) -> Result<()> {
        eventually("every connection speaks", SPEAKS.max(2 * self.heal), || {
            match self.load.silent_since(since).as_slice() {
                [] => Ok(()),
                [first, more @ ..] => Err(format!("{first} and {} more are silent", more.len())),
            }
        })
    }

    /// What each node holds now.
    fn held(&self) -> Result<BTreeMap<String, Held>> {
        self.lab
            .nodes
            .iter()
            .map(|node| Ok((node.host.name.clone(), Held::by(node)?)))
            .collect()
    }

    /// Ends the row, and says what came of it.
    pub(crate) fn judge(self, row: &Row, ran: Result<()>) -> Outcome {
        let mut against = Vec::new();
        if let Err(error) = ran.and_then(|()| self.nothing_grew()) {
            against.push(format!("{error:#}"));
        }
        let end = Instant::now();
        let silent = match self.all_speak(end) {
            Ok(()) => Vec::new(),
            Err(_) => self.load.silent_since(end),
        };
        if !against.is_empty() || !silent.is_empty() {
            against.push(self.keep_dump(row.id));
        }
        let fare = self.load.stop();
        let evidence = match self.capture.stop() {
            Ok(evidence) => evidence,
            Err(error) => return Outcome::Failed(None, vec![format!("end the capture: {error:#}")]),
        };

        let figures = Figures {
            plaintext_bytes: evidence.plaintext_bytes(),
            lost: fare.lost.len() + silent.len(),
            stall: fare.longest_stall,
            heal: self.heal,
        };
        if let Oracle::Sees(what) = row.oracle {
            // What a twin shows is no figure of the product's.
            if what(&figures) && against.is_empty() {
                return Outcome::Passed(Figures::default());
            }
            against.push(format!("the oracle is blind: {figures}\n{evidence}"));
            return Outcome::Failed(None, against);
        }
        against.extend(evidence.clean().err());
        against.extend(fare.lost.iter().take(5).map(|lost| format!("lost: {lost}")));
        against.extend(silent.iter().take(5).map(|silent| format!("silent: {silent}")));
        let slowness = patience().unwrap_or(1);
        if let Some(limit) = row.stall.filter(|limit| figures.stall > *limit * slowness) {
            against.push(format!("stalled {:?}, which may be {limit:?}", figures.stall));
        }
        if figures.heal > row.heal * slowness {
            against.push(format!("healed within {:?}, which may be {:?}", figures.heal, row.heal));
        }
        if against.is_empty() {
            Outcome::Passed(figures)
        } else {
            Outcome::Failed(Some(figures), against)
        }
    }

    /// Insists that our processes have no more open than before the fault.
    fn nothing_grew(&self) -> Result<()> {
        // The connection of a question is open for a moment; whatever is open at every look has grown.
        eventually("nothing has grown", Duration::from_secs(10), || {
            for (name, held) in self.held().map_err(|error| format!("{error:#}"))? {
                let before = self.before[&name].open;
                if !held.open.is_within(before) {
                    return Err(format!("{name} had open {before:?}, and has {:?}", held.open));
                }
            }
            Ok(())
        })
    }

    /// Writes what there is to see, and says where.
    fn keep_dump(&self, row: &str) -> String {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{}.txt", row.replace('/', "-")));
        match fs::write(&path, self.lab.dump()) {
            Ok(()) => format!("the nodes are described in {}", path.display()),
            Err(error) => format!("the nodes cannot be described in {}: {error}", path.display()),
        }
    }
}

/// The options of one node's agent.
fn of_node(cluster: Option<&Cluster>, node: &Node, options: &AgentOptions) -> AgentOptions {
    match cluster {
        Some(cluster) => cluster.agent(node, options),
        None => options.clone(),
    }
}

/// Whether an agent knows both others, and says that everything is well.
pub(crate) fn is_healthy(status: &Status) -> bool {
    status.verdict == "healthy" && status.peers.len() == 2
}

/// What an agent says, in short.
fn told(status: &Status) -> String {
    let checks = |problems: &[shroud_lab::agent::Problem]| -> Vec<String> {
        problems
            .iter()
            .map(|problem| format!("{}: {}", problem.check, problem.says))
            .collect()
    };
    let of_peers = status.peers.iter().flat_map(|peer| checks(&peer.problems));
    let problems: Vec<String> = checks(&status.problems).into_iter().chain(of_peers).collect();
    format!(
        "{} ({} peers): {}",
        status.verdict,
        status.peers.len(),
        problems.join("; ")
    )
}

/// Waits until an agent's status is as wished, and returns it.
fn wait_for(agent: &Agent, what: &str, within: Duration, wished: impl Fn(&Status) -> bool) -> Result<Status> {
    let name = &agent.node().host.name;
    eventually(&format!("{name}: {what}"), within, || {
        let status = agent.status().map_err(|error| format!("{error:#}"))?;
        if wished(&status) {
            Ok(status)
        } else {
            Err(told(&status))
        }
    })
}

/// Waits until an agent has ended by itself, and returns its exit code.
pub(crate) fn ends(agent: &mut Agent) -> Result<i32> {
    let exit = eventually("the agent ends", Duration::from_secs(15), || match agent.exited() {
        Ok(Some(exit)) => Ok(exit),
        other => Err(format!("{other:?}")),
    })?;
    match exit.code() {
        Some(code) => Ok(code),
        None => bail!("it was ended: {exit}"),
    }
}

/// A file beside the lab's, to be put back.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".beside");
    path.with_file_name(name)
}
