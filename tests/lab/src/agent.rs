//! Runs the daemon under test on a node, kills it, restarts it, and reads its status.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde::Deserialize;
use serde_json::Value;

use crate::remains;
use crate::topology::{Lab, Node};

/// The mesh's WireGuard port.
pub const LISTEN_PORT: u16 = 51820;

/// How an agent is to be run.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// The `shroud` program.
    pub shroud: PathBuf,
    /// `enforce`, `audit` or `off`.
    pub gate: String,
    /// How the gate attaches: `auto`, `tcx` or `clsact`.
    pub attach: String,
    /// Pods whose traffic may stay in the clear, as a prefix; empty for none.
    pub exempt: String,
    /// `userspace`, `kernel` or `auto`.
    pub backend: String,
    /// `native`, `vxlan`, `geneve` or `auto`.
    pub mode: String,
    /// Which traffic between pods is encrypted: `all` or `cross-zone`.
    pub scope: String,
    /// Whether pods may opt out.
    pub opt_out: bool,
    /// Whether traffic of nodes is encrypted too.
    pub nodes: bool,
    /// How often an idle tunnel speaks, e.g. `25s`.
    pub keepalive: String,
    /// The `directory` of the configuration, as YAML; empty for the lab's folder of announcements.
    pub directory: String,
    /// YAML lines added at the top level of the configuration.
    pub extra: String,
    /// Filter of the agent's log, as in `RUST_LOG`.
    pub log: String,
}

/// An agent on a node. Dropping it kills the agent and leaves the data plane, as a crash does; the lab removes that.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    options: AgentOptions,
    child: Child,
}

/// What an agent says of itself; unknown fields stay in `raw`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// Version of the format.
    pub version: u32,
    /// `healthy` or `degraded`.
    pub verdict: String,
    /// One line for people.
    pub summary: String,
    /// The node that speaks.
    pub node: String,
    /// Its peers.
    pub peers: Vec<PeerStatus>,
    /// Nodes it refuses.
    pub refused: Vec<RefusedStatus>,
    /// The latest reconcile pass.
    pub pass: PassStatus,
    /// What needs a look.
    pub problems: Vec<Problem>,
    /// All of it.
    #[serde(skip)]
    pub raw: Value,
}

/// A peer, as an agent sees it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerStatus {
    /// Its name.
    pub node: String,
    /// Its WireGuard key.
    pub public_key: String,
    /// Where it is reached.
    pub endpoint: Option<String>,
    /// Seconds since the latest handshake, if there was one.
    pub handshake_age_seconds: Option<f64>,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// Size of the largest inner packet in bytes.
    pub mtu: u32,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// A node that an agent refuses.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RefusedStatus {
    /// Its name.
    pub node: String,
    /// Why.
    pub reasons: Vec<String>,
}

/// Something that needs a look.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Problem {
    /// The id that stays.
    pub check: String,
    /// The sentence for people.
    pub says: String,
}

/// A reconcile pass.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PassStatus {
    /// Passes since the start.
    pub number: u64,
    /// Changes it made.
    pub changes: u64,
    /// What it could not do.
    pub failures: Vec<Problem>,
}

impl AgentOptions {
    /// The gate enforces, pods are reached natively; WireGuard runs in user space, or where `$SHROUD_TEST_BACKEND` says.
    pub fn new(shroud: impl Into<PathBuf>) -> AgentOptions {
        AgentOptions {
            shroud: shroud.into(),
            gate: "enforce".into(),
            attach: "auto".into(),
            exempt: String::new(),
            backend: env::var("SHROUD_TEST_BACKEND").unwrap_or_else(|_| "userspace".into()),
            mode: "native".into(),
            scope: "all".into(),
            opt_out: false,
            nodes: false,
            keepalive: "25s".into(),
            directory: String::new(),
            extra: String::new(),
            log: "info".into(),
        }
    }

    /// The same with another gate mode: `enforce`, `audit` or `off`.
    pub fn gate(self, mode: &str) -> AgentOptions {
        AgentOptions {
            gate: mode.to_owned(),
            ..self
        }
    }

    /// The same with another way to attach the gate: `auto`, `tcx` or `clsact`.
    pub fn attach(self, attach: &str) -> AgentOptions {
        AgentOptions {
            attach: attach.to_owned(),
            ..self
        }
    }

    /// The same with pods, as a prefix, whose traffic may stay in the clear.
    pub fn exempt(self, prefix: &str) -> AgentOptions {
        AgentOptions {
            exempt: prefix.to_owned(),
            ..self
        }
    }
}

impl Agent {
    /// Writes the configuration and starts the agent in the node's network namespace.
    pub fn start(node: &Node, options: &AgentOptions) -> Result<Agent> {
        Agent::start_by(node, options, &[])
    }

    /// The same, by another program that runs the one it is told: `["strace", "-f"]`. What it is killed and waited by is that program.
    pub fn start_by(node: &Node, options: &AgentOptions, by: &[&str]) -> Result<Agent> {
        let file = config_file(node);
        fs::write(&file, config(node, options)).with_context(|| format!("write {}", file.display()))?;
        let child = spawn(node, options, by)?;
        Ok(Agent {
            node: node.clone(),
            options: options.clone(),
            child,
        })
    }

    /// Starts an agent on every node of a lab.
    pub fn start_all(lab: &Lab, options: &AgentOptions) -> Result<Vec<Agent>> {
        lab.nodes.iter().map(|node| Agent::start(node, options)).collect()
    }

    /// The node it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("ask for the agent's end")
    }

    /// Kills it with SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().context("kill the agent")?;
        self.child.wait().context("wait for the agent")
    }

    /// Asks it to end with SIGTERM, and fails when it has not within that time.
    pub fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.exited()? {
            return Ok(status);
        }
        remains::kill(self.pid(), Signal::TERM).context("send SIGTERM to the agent")?;
        let give_up = Instant::now() + within;
        while Instant::now() < give_up {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!(
            "the agent of {} still runs {within:?} after SIGTERM",
            self.node.host.name
        )
    }

    /// Starts it again with the configuration file as it is; kills it first if it runs.
    pub fn restart(&mut self) -> Result<()> {
        if self.exited()?.is_none() {
            self.kill()?;
        }
        self.child = spawn(&self.node, &self.options, &[])?;
        Ok(())
    }

    /// Runs `shroud` on the node with its status socket, e.g. `["explain", "10.244.1.10", "10.244.2.10"]`.
    pub fn ask(&self, arguments: &[&str]) -> Result<crate::netns::Output> {
        let socket = socket(&self.node);
        let program = self.options.shroud.to_str().context("the program's path is text")?;
        let socket = socket.to_str().context("the socket's path is text")?;
        self.node
            .host
            .netns
            .exec(program, &[arguments, &["--socket", socket]].concat())
    }

    /// What it says of itself; a degraded agent is no error, a silent one is.
    pub fn status(&self) -> Result<Status> {
        let output = self.ask(&["status", "-o", "json"])?;
        let raw: Value = serde_json::from_str(&output.stdout).with_context(|| {
            format!(
                "`shroud status` on {} ({}) is not JSON: {}{}",
                self.node.host.name, output.status, output.stdout, output.stderr
            )
        })?;
        let status = Status::deserialize(&raw).context("`shroud status` has other fields than expected")?;
        Ok(Status { raw, ..status })
    }

    /// Process id of the `shroud wire` that serves this node's encryption device.
    pub fn wire(&self) -> Option<u32> {
        wire(&self.node)
    }

    /// Kills that process with SIGKILL and returns its id.
    pub fn kill_wire(&self) -> Result<u32> {
        let pid = self
            .wire()
            .with_context(|| format!("no `shroud wire` serves {}", self.node.device))?;
        remains::kill(pid, Signal::KILL).with_context(|| format!("kill `shroud wire` {pid}"))?;
        Ok(pid)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // One that has ended already is what we want.
        drop(self.kill());
    }
}

impl Status {
    /// Whether there has been a handshake with every other node of a mesh of `nodes`.
    pub fn met_all(&self, nodes: usize) -> Result<(), String> {
        let met = self
            .peers
            .iter()
            .filter(|peer| peer.handshake_age_seconds.is_some())
            .count();
        if met + 1 == nodes {
            Ok(())
        } else {
            Err(format!("{}: {met} of {} handshakes", self.node, nodes - 1))
        }
    }

    /// The sentence of the first problem with this id.
    pub fn says(&self, check: &str) -> Option<&str> {
        self.problems
            .iter()
            .find(|problem| problem.check == check)
            .map(|problem| problem.says.as_str())
    }

    /// Whether the directory has a problem with this id.
    pub fn directory_says(&self, check: &str) -> bool {
        let problems = self.raw["directory"]["problems"].as_array();
        problems.into_iter().flatten().any(|problem| problem["check"] == check)
    }
}

/// The `shroud` program: `$SHROUD`, or the one that the same build has left beside this program or its tests.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = env::var_os("SHROUD") {
        return Ok(path.into());
    }
    let this = env::current_exe().context("find this program")?;
    this.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("shroud"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no `shroud` near {}; build it with `cargo build -p shroud`",
                this.display()
            )
        })
}

/// Where the agent of a node answers.
pub fn socket(node: &Node) -> PathBuf {
    node.runtime().join("shroud.sock")
}

/// Where the agent's configuration lies.
pub fn config_file(node: &Node) -> PathBuf {
    node.folder.join("config.yaml")
}

/// The agent's configuration.
pub fn config(node: &Node, options: &AgentOptions) -> String {
    let prefixes = node.pod_prefixes();
    let prefixes: Vec<String> = prefixes.iter().map(|prefix| format!("\"{prefix}\"")).collect();
    // A cluster gives each node its prefixes.
    let (prefixes, directory) = if options.directory.is_empty() {
        let folder = format!("{{ file: {{ path: {} }} }}", node.directory.display());
        (format!("podPrefixes: [{}]", prefixes.join(", ")), folder)
    } else {
        (String::new(), options.directory.clone())
    };
    format!(
        "node: {name}\n\
         stateDir: {state}\n\
         runtimeDir: {runtime}\n\
         addresses: auto\n\
         uplinks: [eth0]\n\
         {prefixes}\n\
         protected: [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\n\
         exempt: [{exempt}]\n\
         routing: {{ mode: {mode} }}\n\
         encrypt: {{ nodes: {nodes}, scope: {scope}, optOut: {opt_out} }}\n\
         encryption: {{ backend: {backend}, device: {device}, listenPort: {LISTEN_PORT}, keepalive: {keepalive} }}\n\
         gate: {{ mode: \"{gate}\", pinDir: {pins}, attach: {attach} }}\n\
         directory: {directory}\n\
         {extra}",
        name = node.host.name,
        state = node.state().display(),
        runtime = node.runtime().display(),
        mode = options.mode,
        nodes = options.nodes,
        scope = options.scope,
        opt_out = options.opt_out,
        backend = options.backend,
        device = node.device,
        keepalive = options.keepalive,
        gate = options.gate,
        attach = options.attach,
        exempt = options.exempt,
        pins = node.pins.display(),
        extra = options.extra,
    )
}

fn spawn(node: &Node, options: &AgentOptions, by: &[&str]) -> Result<Child> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(node.log())
        .with_context(|| format!("open {}", node.log().display()))?;
    let errors: File = log.try_clone().context("share the log file")?;
    let mut command = match by {
        [] => Command::new(&options.shroud),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(&options.shroud);
            command
        }
    };
    command
        .arg("agent")
        .arg("--config")
        .arg(config_file(node))
        .env("RUST_LOG", &options.log)
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    node.host.netns.spawn(&mut command)
}

/// Process id of the `shroud wire` that serves a node's encryption device.
pub fn wire(node: &Node) -> Option<u32> {
    node.host.netns.processes().into_iter().find(|pid| {
        let arguments = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
        let mut words = arguments.split(|byte| *byte == 0);
        words.any(|word| word == b"wire") && words.any(|word| word == node.device.as_bytes())
    })
}
