//! What the agent answers when it is asked: the last pass, and the kernel as it is at this moment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use shroud_ebpf::{Hook, Reason};
use shroud_model::NodeName;
use shroud_tunnel::{Backend, ObservedPeer};
use tracing::error;

use super::{Pass, Reconciler, drop_line, remember};
use crate::check::Check;
use crate::cli::Source;
use crate::config::GateMode;
use crate::explain::{self, Knowledge, attached_at, place};
use crate::plan::{Plan, PlannedPeer};
use crate::rates::verdict;
use crate::serve::Request;
use crate::status::{
    EncryptionStatus, Explanation, GateCounters, GateStatus, PassStatus, PathStatus, PeerStatus, RefusedStatus,
    RoutingStatus, Status, VERSION, Verdict,
};

/// A peer that has not shaken hands for this long has no session (REJECT_AFTER_TIME, WireGuard whitepaper §6.1).
const SESSION: Duration = Duration::from_secs(180);

impl Reconciler {
    /// Answers a question of the status socket.
    pub(super) fn answer(&mut self, request: &Request) -> Result<serde_json::Value, String> {
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
            pod_prefixes: last.snapshot.own.pod_prefixes.iter().copied().collect(),
            routing: RoutingStatus {
                mode: last.plan.mode.to_string(),
                receives: last.plan.received.iter().map(ToString::to_string).collect(),
            },
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

    fn explain(&mut self, last: &Pass, source: Source, destination: IpAddr) -> anyhow::Result<Explanation> {
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
                        self.kernel.lookup(destination, Some(address), None)?
                    } else {
                        self.kernel.lookup(destination, None, None)?
                    },
                )
            }
            Source::Node => {
                let hop = self.kernel.lookup(destination, None, None)?;
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
            peers: &last.plan.peers,
            gate: &observed,
            tunnel: tunnel.device.as_ref(),
            hop: &hop,
            now: SystemTime::now(),
        };
        Ok(explain::explain(&knowledge, source, destination))
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
        let says = format!("the gate is not attached to {uplink}");
        status.problems.push(Check::GateNotAttached.says(says));
    }
    match status.gate.mode.as_str() {
        "audit" => {
            let says = "gate.mode is audit: what cannot be encrypted leaves in the clear";
            status.problems.push(Check::GateAudits.says(says));
        }
        "off" => {
            let says = "gate.mode is off: everything leaves in the clear";
            status.problems.push(Check::GateOff.says(says));
        }
        _ => {}
    }
    for peer in &status.peers {
        let whom = format!("peer {}", peer.node);
        status
            .problems
            .extend(peer.problems.iter().map(|problem| problem.about(&whom)));
    }
    for refused in &status.refused {
        status.problems.push(Check::NodeRefused.says(format!(
            "node {} is refused: {}",
            refused.node,
            refused.reasons.join("; ")
        )));
    }
    let directory = &status.directory.problems;
    status
        .problems
        .extend(directory.iter().map(|problem| problem.about("directory")));
    let failures = &status.pass.failures;
    status
        .problems
        .extend(failures.iter().map(|failure| failure.about("last pass")));

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
    name: &NodeName,
    planned: &PlannedPeer,
    seen: Option<&ObservedPeer>,
    backend: &Backend,
    keepalive: bool,
) -> PeerStatus {
    let age = seen
        .and_then(|peer| peer.last_handshake)
        .map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
    let mut problems = planned.problems.clone();
    match (seen, age) {
        (None, _) => problems.push(Check::PeerNotConfigured.says("not on the encryption device yet")),
        (Some(_), None) if keepalive => {
            let says = "no handshake yet: is its UDP port reachable, and is its agent running?";
            problems.push(Check::PeerNoHandshake.says(says));
        }
        (Some(_), Some(age)) if keepalive && age > SESSION => {
            let says = format!("no handshake for {} s: is its UDP port reachable?", age.as_secs());
            problems.push(Check::PeerNoHandshake.says(says));
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
        mode: planned
            .overlay
            .as_ref()
            .map_or("native", |end| end.kind.name())
            .to_owned(),
        mtu: planned.mtu,
        path: planned.path.map(|path| PathStatus {
            state: path.state.to_string(),
            expected_mtu: planned.expected_mtu,
            rtt_milliseconds: path.rtt.map(|rtt| rtt.as_secs_f64() * 1000.0),
            probes_sent: path.sent,
            probes_lost: path.lost,
        }),
        pod_prefixes: planned.pod_prefixes.iter().copied().collect(),
        encrypts_nodes: planned.encrypts_nodes,
        problems,
    }
}

/// The mode as the configuration spells it.
fn mode_name(mode: GateMode) -> &'static str {
    match mode {
        GateMode::Enforce => "enforce",
        GateMode::Audit => "audit",
        GateMode::Off => "off",
    }
}
