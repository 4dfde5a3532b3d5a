//! The reconcile loop: one plain thread that owns every handle on the kernel.
//!
//! Each pass looks at the machine, plans, and brings each driver from what it observes to what is planned: the gate first, so that
//! existing secured traffic keeps flowing and what cannot be secured yet is dropped; if we crash on any line, both stay true. A wake-up
//! only says "look again"; there is no second path for start, change, drift or restart.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use shroud_ebpf::{Gate, Hook, Reason};
use shroud_keyd::directory::Origin;
use shroud_keyd::{NodeKey, Snapshot};
use shroud_routing::{Hop, Kernel};
use shroud_tunnel::{Backend, Choice, Tunnel, Wanted};
use tokio::sync::{oneshot, watch};
use tracing::{debug, error, info, warn};

use crate::cli::Source;
use crate::config::{Config, EncryptionBackend, GateAttach, GateMode};
use crate::explain::{self, Knowledge, place};
use crate::plan::{Plan, Surroundings, View, addresses_of_interest, plan, uplinks};
use crate::rates::{Rates, direction, verdict};
use crate::serve::Request;
use crate::status::{
    DirectoryStatus, EncryptionStatus, GateCounters, GateStatus, PassStatus, PeerStatus, RefusedStatus, Status,
    VERSION, Verdict,
};

/// Changes come in bursts; a burst is one reason to look.
const SETTLE: Duration = Duration::from_millis(50);
/// How many of the latest changes and drops are kept for the status.
const REMEMBERED: usize = 20;
/// A peer that has not shaken hands for this long has no session (REJECT_AFTER_TIME, WireGuard whitepaper §6.1).
const SESSION: Duration = Duration::from_secs(180);

/// What the loop is told.
pub(crate) enum Wake {
    /// Something may have changed.
    Dirty,
    /// Somebody wants to know something.
    Question {
        request: Request,
        answer: oneshot::Sender<Result<serde_json::Value, String>>,
    },
    /// The agent is ending; the kernel stays as it is.
    Stop,
}

/// What is known of the mesh, as the directory's owner last said.
#[derive(Clone)]
pub(crate) struct Mesh {
    /// Who is in it; `None` until the first complete list.
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    pub(crate) directory: DirectoryStatus,
}

/// Every handle on the kernel, and what the last pass found.
pub(crate) struct Reconciler {
    config: Config,
    key: NodeKey,
    /// The backend, or why there is none; asked again on each pass until there is one.
    choice: Result<Choice, String>,
    gate: Gate,
    tunnel: Tunnel,
    kernel: Kernel,
    mesh: watch::Receiver<Mesh>,
    /// This node's addresses, for whoever publishes the announcement.
    addresses: watch::Sender<BTreeSet<IpAddr>>,
    last: Option<Pass>,
    latest_changes: VecDeque<String>,
    drops: VecDeque<String>,
    rates: Rates,
}

/// One comparison of the kernel with the plan.
struct Pass {
    number: u64,
    plan: Plan,
    surroundings: Surroundings,
    snapshot: Arc<Snapshot>,
    changes: usize,
    failures: Vec<String>,
    took: Duration,
}

/// What a pass did so far.
#[derive(Default)]
struct Report {
    changes: Vec<String>,
    failures: Vec<String>,
}

impl Report {
    /// Takes note of one change and how it went.
    fn note(&mut self, driver: &str, change: &impl Display, result: Result<(), anyhow::Error>) {
        match result {
            Ok(()) => {
                info!(driver, %change, "changed");
                self.changes.push(format!("{driver}: {change}"));
            }
            Err(error) => self.fail(driver, &error.context(change.to_string())),
        }
    }

    fn fail(&mut self, driver: &str, error: &anyhow::Error) {
        warn!(driver, error = format!("{error:#}"), "failed");
        self.failures.push(format!("{driver}: {error:#}"));
    }
}

impl Reconciler {
    /// Opens every handle; nothing is changed yet, but that the gate's maps and programs are loaded.
    ///
    /// # Errors
    /// When the kernel refuses one of them.
    pub(crate) fn open(
        config: Config,
        key: NodeKey,
        mesh: watch::Receiver<Mesh>,
        addresses: watch::Sender<BTreeSet<IpAddr>>,
    ) -> anyhow::Result<Self> {
        let gate = Gate::open(&gate_options(&config)).context("load the gate")?;
        let tunnel = Tunnel::new(tunnel_options(&config));
        let kernel = Kernel::open().context("open routing netlink")?;
        Ok(Self {
            config,
            key,
            choice: Err("not asked yet".to_owned()),
            gate,
            tunnel,
            kernel,
            mesh,
            addresses,
            last: None,
            latest_changes: VecDeque::new(),
            drops: VecDeque::new(),
            rates: Rates::default(),
        })
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self, wakes: &Receiver<Wake>) {
        loop {
            self.pass();
            let mut deadline = Instant::now() + *self.config.resync;
            loop {
                match wakes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(Wake::Dirty) => deadline = deadline.min(Instant::now() + SETTLE),
                    Ok(Wake::Question { request, answer }) => {
                        // Whoever asked may have gone; then nobody misses the answer.
                        drop(answer.send(self.answer(&request)));
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    /// Compares the kernel with the plan once, and mends what differs.
    fn pass(&mut self) {
        let begun = Instant::now();
        let mut report = Report::default();
        let known = self.mesh.borrow_and_update().snapshot.clone();
        let converged = match known {
            Some(snapshot) => {
                self.choose(&mut report);
                self.converge(&snapshot, &mut report)
                    .map(|(plan, surroundings)| (plan, surroundings, snapshot))
            }
            None => self.fence_until_known(&mut report),
        };
        match self.gate.counters() {
            Ok(counters) => self.rates.sample(Instant::now(), counters),
            Err(error) => report.fail("gate", &anyhow::Error::new(error).context("read the counters")),
        }
        remember(&mut self.drops, self.gate.events().iter().map(drop_line));
        let (plan, surroundings, snapshot) = match converged {
            Ok(converged) => converged,
            Err(error) => {
                report.fail("look", &error);
                if let Some(last) = &mut self.last {
                    last.failures = report.failures;
                }
                return;
            }
        };
        self.addresses.send_if_modified(|addresses| {
            let differ = *addresses != plan.addresses;
            addresses.clone_from(&plan.addresses);
            differ
        });
        let number = self.last.as_ref().map_or(0, |pass| pass.number) + 1;
        let took = begun.elapsed();
        let Report { changes, failures } = report;
        debug!(
            number,
            changes = changes.len(),
            failures = failures.len(),
            ?took,
            "pass"
        );
        let count = changes.len();
        remember(&mut self.latest_changes, changes.into_iter());
        self.last = Some(Pass {
            number,
            plan,
            surroundings,
            snapshot,
            changes: count,
            failures,
            took,
        });
    }

    /// Settles on a WireGuard backend, once.
    fn choose(&mut self, report: &mut Report) {
        if self.choice.is_ok() {
            return;
        }
        self.choice = match shroud_tunnel::choose(wanted(self.config.encryption.backend)) {
            Ok(choice) => {
                info!(backend = %choice.backend, because = choice.because, "encryption");
                Ok(choice)
            }
            Err(error) => {
                let error = anyhow::Error::new(error);
                report.fail("tunnel", &error);
                Err(format!("{error:#}"))
            }
        };
    }

    /// Gate, tunnel, routing, in this order. Where that changed the tunnel, gate and routes are planned again: the number of a new
    /// encryption device is part of both.
    fn converge(&mut self, snapshot: &Snapshot, report: &mut Report) -> anyhow::Result<(Plan, Surroundings)> {
        let surroundings = self.look(snapshot)?;
        let plan = self.plan(snapshot, &surroundings);
        self.ensure_gate(&plan.gate, report);
        let tunnel_changed = self.choice.is_ok() && self.ensure_tunnel(&plan.tunnel, report);
        if !tunnel_changed {
            self.ensure_routing(&plan.routing, report);
            return Ok((plan, surroundings));
        }
        let surroundings = self.look(snapshot)?;
        let plan = self.plan(snapshot, &surroundings);
        self.ensure_routing(&plan.routing, report);
        self.ensure_gate(&plan.gate, report);
        Ok((plan, surroundings))
    }

    fn plan(&self, snapshot: &Snapshot, surroundings: &Surroundings) -> Plan {
        let backend = self.choice.as_ref().map_or(Backend::Userspace, |choice| choice.backend);
        plan(&View {
            config: &self.config,
            key: &self.key,
            backend,
            snapshot,
            surroundings,
        })
    }

    /// Before the first complete list nobody is a peer. Where a gate of an earlier agent works on, it knows more than we do and is left
    /// alone; where there is none, an empty one goes in, which drops everything protected.
    fn fence_until_known(&mut self, report: &mut Report) -> anyhow::Result<(Plan, Surroundings, Arc<Snapshot>)> {
        let nobody = Snapshot {
            origin: Origin::Cache,
            peers: BTreeMap::new(),
            refused: BTreeMap::new(),
            problems: Vec::new(),
        };
        let surroundings = self.look(&nobody)?;
        let mut plan = self.plan(&nobody, &surroundings);
        plan.problems
            .push("waiting for the directory's first complete list; until then no new tunnel is opened".to_owned());
        if let Some(table) = self.gate.observe().context("read the gate")?.table {
            plan.gate.table = table;
        }
        self.ensure_gate(&plan.gate, report);
        Ok((plan, surroundings, Arc::new(nobody)))
    }

    /// What this machine looks like around us.
    fn look(&mut self, snapshot: &Snapshot) -> anyhow::Result<Surroundings> {
        let facts = self.kernel.facts().context("look at links and addresses")?;
        let mut hops: BTreeMap<IpAddr, Hop> = BTreeMap::new();
        for address in addresses_of_interest(snapshot) {
            let hop = self
                .kernel
                .lookup(address, None)
                .with_context(|| format!("look up the route to {address}"))?;
            hops.insert(address, hop);
        }
        let mut not_pods = uplinks(&self.config, &facts, &hops);
        not_pods.insert(self.config.encryption.device.clone());
        let pod_devices = self
            .kernel
            .devices_for(&self.config.pod_prefixes, &not_pods)
            .context("look for pods' devices")?;
        let encryption_device = facts.links.get(&self.config.encryption.device).map(|link| link.index);
        let encryption_device = encryption_device.filter(|_| self.encrypts_with_our_key());
        Ok(Surroundings {
            facts,
            hops,
            pod_devices,
            encryption_device,
        })
    }

    /// Whether the encryption device is WireGuard, works, and has this node's key.
    fn encrypts_with_our_key(&mut self) -> bool {
        let observed = self.tunnel.observe(&self.config.encryption.device);
        observed.is_ok_and(|observed| {
            observed
                .device
                .is_some_and(|device| device.public_key == Some(self.key.public))
        })
    }

    fn ensure_gate(&mut self, desired: &shroud_ebpf::Desired, report: &mut Report) {
        let observed = match self.gate.observe() {
            Ok(observed) => observed,
            Err(error) => return report.fail("gate", &error.into()),
        };
        for change in shroud_ebpf::diff(desired, &observed) {
            let result = self.gate.apply(&change).map_err(Into::into);
            report.note("gate", &change, result);
        }
    }

    /// Answers whether anything was tried.
    fn ensure_tunnel(&mut self, desired: &shroud_tunnel::Desired, report: &mut Report) -> bool {
        let observed = match self.tunnel.observe(&desired.device) {
            Ok(observed) => observed,
            Err(error) => {
                report.fail("tunnel", &error.into());
                return false;
            }
        };
        let changes = shroud_tunnel::diff(desired, &observed);
        for change in &changes {
            let result = self.tunnel.apply(desired, change).map_err(Into::into);
            report.note("tunnel", change, result);
        }
        !changes.is_empty()
    }

    fn ensure_routing(&mut self, desired: &shroud_routing::Desired, report: &mut Report) {
        let observed = match self.kernel.observe(desired) {
            Ok(observed) => observed,
            Err(error) => return report.fail("routing", &error.into()),
        };
        for change in shroud_routing::diff(desired, &observed) {
            let result = self.kernel.apply(&change).map_err(Into::into);
            report.note("routing", &change, result);
        }
    }

    fn answer(&mut self, request: &Request) -> Result<serde_json::Value, String> {
        let Some(last) = self.last.take() else {
            return Err("the agent cannot look at this machine's network; its log says why".to_owned());
        };
        let answer = match request {
            Request::Status => self.status(&last).map(serde_json::to_value),
            Request::Gate => self.gate_counters(&last).map(serde_json::to_value),
            Request::Explain { source, destination } => {
                self.explain(&last, *source, *destination).map(serde_json::to_value)
            }
        };
        self.last = Some(last);
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => {
                error!(error = format!("{error:#}"), ?request, "cannot answer");
                Err(format!("{error:#}"))
            }
        }
    }

    fn status(&mut self, last: &Pass) -> anyhow::Result<Status> {
        let observed = self
            .tunnel
            .observe(&self.config.encryption.device)
            .context("read the tunnel")?;
        let attached = self.gate.observe().context("read the gate")?;
        self.rates.sample(
            Instant::now(),
            self.gate.counters().context("read the gate's counters")?,
        );
        let mesh = self.mesh.borrow().clone();
        let peers: Vec<PeerStatus> = last
            .plan
            .peers
            .iter()
            .map(|(name, planned)| {
                let seen = observed
                    .device
                    .as_ref()
                    .and_then(|device| device.peers.get(&planned.public_key));
                peer_status(
                    name,
                    planned,
                    seen,
                    &last.plan.tunnel.backend,
                    !self.config.encryption.keepalive.is_zero(),
                )
            })
            .collect();
        let refused = last.snapshot.refused.iter().map(|(name, refused)| RefusedStatus {
            node: name.to_string(),
            reasons: refused.reasons.iter().map(ToString::to_string).collect(),
            fenced: refused.pod_prefixes.iter().copied().collect(),
        });
        let mut status = Status {
            version: VERSION,
            verdict: Verdict::Healthy,
            summary: String::new(),
            node: self.config.node.clone(),
            public_key: self.key.public,
            fingerprint: self.key.public.fingerprint(),
            addresses: last.plan.addresses.iter().copied().collect(),
            pod_prefixes: self.config.pod_prefixes.iter().copied().collect(),
            encryption: EncryptionStatus {
                backend: self
                    .choice
                    .as_ref()
                    .map_or_else(|_| "none".to_owned(), |choice| choice.backend.to_string()),
                because: self
                    .choice
                    .as_ref()
                    .map_or_else(Clone::clone, |choice| choice.because.clone()),
                device: self.config.encryption.device.clone(),
                listen_port: self.config.encryption.listen_port,
            },
            gate: GateStatus {
                mode: mode_name(self.config.gate.mode).to_owned(),
                uplinks: attached_at(&attached, Hook::Egress)
                    .intersection(&attached_at(&attached, Hook::Ingress))
                    .cloned()
                    .collect(),
                pod_devices: attached_at(&attached, Hook::Pod).into_iter().collect(),
                encrypted_packets: self.rates.total(|counter| verdict(counter) == "encrypt").0,
                dropped_packets: self.rates.total(|counter| verdict(counter) == "drop").0,
                plaintext_bytes: self
                    .rates
                    .total(|counter| counter.audited || counter.reason == Reason::Off)
                    .1,
            },
            directory: mesh.directory,
            peers,
            refused: refused.collect(),
            pass: PassStatus {
                number: last.number,
                changes: last.changes,
                failures: last.failures.clone(),
                seconds: last.took.as_secs_f64(),
                latest_changes: self.latest_changes.iter().cloned().collect(),
            },
            problems: last.plan.problems.clone(),
        };
        judge(&mut status, &last.plan);
        Ok(status)
    }

    fn gate_counters(&mut self, last: &Pass) -> anyhow::Result<GateCounters> {
        self.rates.sample(
            Instant::now(),
            self.gate.counters().context("read the gate's counters")?,
        );
        remember(&mut self.drops, self.gate.events().iter().map(drop_line));
        let names: BTreeMap<u64, String> = last
            .snapshot
            .peers
            .keys()
            .chain(last.snapshot.refused.keys())
            .chain([&self.config.node])
            .map(|name| (name.id().0, name.to_string()))
            .collect();
        Ok(GateCounters {
            version: VERSION,
            mode: mode_name(self.config.gate.mode).to_owned(),
            counters: self.rates.rows(&names),
            events: self.drops.iter().cloned().collect(),
        })
    }

    fn explain(
        &mut self,
        last: &Pass,
        source: Source,
        destination: IpAddr,
    ) -> anyhow::Result<crate::status::Explanation> {
        let observed = self.gate.observe().context("read the gate")?;
        let tunnel = self
            .tunnel
            .observe(&self.config.encryption.device)
            .context("read the tunnel")?;
        let (source, hop) = match source {
            Source::Address(address) => {
                let own = place(&self.config, &last.snapshot, &last.surroundings, address).is_here();
                (
                    address,
                    if own {
                        self.kernel.lookup(destination, Some(address))?
                    } else {
                        self.kernel.lookup(destination, None)?
                    },
                )
            }
            Source::Node => {
                let hop = self.kernel.lookup(destination, None)?;
                let source = hop
                    .source
                    .with_context(|| format!("the kernel has no source address for {destination}: {}", hop.kind))?;
                (source, hop)
            }
        };
        let knowledge = Knowledge {
            config: &self.config,
            snapshot: &last.snapshot,
            surroundings: &last.surroundings,
            gate: &observed,
            tunnel: tunnel.device.as_ref(),
            hop: &hop,
            now: SystemTime::now(),
        };
        Ok(explain::explain(&knowledge, source, destination))
    }
}

/// The devices on which a program of ours hangs at this place.
pub(crate) fn attached_at(gate: &shroud_ebpf::Observed, hook: Hook) -> BTreeSet<String> {
    gate.attachments
        .keys()
        .filter(|attachment| attachment.hook == hook)
        .map(|attachment| attachment.device.clone())
        .collect()
}

/// The gate's own words for what the configuration says.
pub(crate) fn gate_options(config: &Config) -> shroud_ebpf::Options {
    shroud_ebpf::Options {
        pin_directory: config.gate.pin_dir.clone(),
        attach: match config.gate.attach {
            GateAttach::Auto => shroud_ebpf::Attach::Auto,
            GateAttach::Tcx => shroud_ebpf::Attach::Tcx,
            GateAttach::Clsact => shroud_ebpf::Attach::Clsact,
        },
    }
}

/// Where the tunnel finds and keeps things.
pub(crate) fn tunnel_options(config: &Config) -> shroud_tunnel::Options {
    shroud_tunnel::Options {
        runtime_dir: config.runtime_dir.clone(),
        ..shroud_tunnel::Options::default()
    }
}

fn wanted(backend: EncryptionBackend) -> Wanted {
    match backend {
        EncryptionBackend::Auto => Wanted::Auto,
        EncryptionBackend::Kernel => Wanted::Kernel,
        EncryptionBackend::Userspace => Wanted::Userspace,
    }
}

/// Says what the verdict is and rests on.
fn judge(status: &mut Status, plan: &Plan) {
    let missing: Vec<&String> = plan
        .gate
        .uplinks
        .iter()
        .filter(|uplink| !status.gate.uplinks.contains(uplink))
        .collect();
    for uplink in missing {
        status.problems.push(format!("the gate is not attached to {uplink}"));
    }
    match status.gate.mode.as_str() {
        "audit" => status
            .problems
            .push("gate.mode is audit: what cannot be encrypted leaves in the clear".to_owned()),
        "off" => status
            .problems
            .push("gate.mode is off: everything leaves in the clear".to_owned()),
        _ => {}
    }
    for peer in &status.peers {
        status.problems.extend(
            peer.problems
                .iter()
                .map(|problem| format!("peer {}: {problem}", peer.node)),
        );
    }
    for refused in &status.refused {
        status.problems.push(format!(
            "node {} is refused: {}",
            refused.node,
            refused.reasons.join("; ")
        ));
    }
    status.problems.extend(
        status
            .directory
            .problems
            .iter()
            .map(|problem| format!("directory: {problem}")),
    );
    status.problems.extend(
        status
            .pass
            .failures
            .iter()
            .map(|failure| format!("last pass: {failure}")),
    );

    let connected = status.peers.iter().filter(|peer| peer.problems.is_empty()).count();
    let total = status.peers.len() + status.refused.len();
    if status.problems.is_empty() {
        status.verdict = Verdict::Healthy;
        status.summary = format!(
            "every byte to {total} of {total} nodes is encrypted, the gate enforces on {}, {} bytes in the clear",
            status.gate.uplinks.join(", "),
            status.gate.plaintext_bytes
        );
    } else {
        status.verdict = Verdict::Degraded;
        let more = match status.problems.len() {
            1 => String::new(),
            count => format!(" (and {} more)", count - 1),
        };
        status.summary = format!(
            "{connected} of {total} nodes are reachable encrypted; {}{more}",
            status.problems[0]
        );
    }
}

fn peer_status(
    name: &shroud_model::NodeName,
    planned: &crate::plan::PlannedPeer,
    seen: Option<&shroud_tunnel::ObservedPeer>,
    backend: &Backend,
    keepalive: bool,
) -> PeerStatus {
    let age = seen
        .and_then(|peer| peer.last_handshake)
        .map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
    let mut problems = planned.problems.clone();
    match (seen, age) {
        (None, _) => problems.push("not on the encryption device yet".to_owned()),
        (Some(_), None) if keepalive => {
            problems.push("no handshake yet: is its UDP port reachable, and is its agent running?".to_owned())
        }
        (Some(_), Some(age)) if keepalive && age > SESSION => {
            problems.push(format!(
                "no handshake for {} s: is its UDP port reachable?",
                age.as_secs()
            ));
        }
        (Some(_), _) => {}
    }
    PeerStatus {
        node: name.clone(),
        public_key: planned.public_key,
        fingerprint: planned.public_key.fingerprint(),
        backend: backend.to_string(),
        endpoint: seen.and_then(|peer| peer.endpoint).or(planned.endpoint),
        handshake_age_seconds: age.map(|age| age.as_secs_f64()),
        rx_bytes: seen.map_or(0, |peer| peer.rx_bytes),
        tx_bytes: seen.map_or(0, |peer| peer.tx_bytes),
        mtu: planned.mtu,
        pod_prefixes: planned.pod_prefixes.iter().copied().collect(),
        problems,
    }
}

/// A dropped packet in a line.
fn drop_line(event: &shroud_ebpf::Event) -> String {
    let verdict = if event.audited { "would drop" } else { "dropped" };
    let flow = match event.addresses {
        Some((source, destination)) => {
            let (from, to) = event.ports;
            let port = |address: IpAddr, port| {
                if port == 0 {
                    address.to_string()
                } else {
                    std::net::SocketAddr::new(address, port).to_string()
                }
            };
            format!(
                "{} -> {} protocol {}",
                port(source, from),
                port(destination, to),
                event.protocol
            )
        }
        None => "an unreadable packet".to_owned(),
    };
    format!(
        "{verdict} {} {flow}: {}",
        direction(event.direction),
        event.reason.as_str()
    )
}

/// Keeps the latest of a stream of lines.
fn remember(kept: &mut VecDeque<String>, lines: impl Iterator<Item = String>) {
    kept.extend(lines);
    while kept.len() > REMEMBERED {
        kept.pop_front();
    }
}

pub(crate) fn mode_name(mode: GateMode) -> &'static str {
    match mode {
        GateMode::Enforce => "enforce",
        GateMode::Audit => "audit",
        GateMode::Off => "off",
    }
}
