//! What the agent answers when it is asked: the last pass, and the kernel as it is at this moment.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use shroud_ebpf::{Hook, Reason};
use shroud_model::NodeName;
use shroud_routing::path_mtu::PathMtu;
use shroud_tunnel::{Device, FRESH, ObservedPeer};
use tracing::{error, info, warn};

use super::{Pass, Reconciler, drop_line, remember, rotation};
use crate::check::{Check, Driver};
use crate::cli::Source;
use crate::config::GateMode;
use crate::explain::{self, Knowledge, attached_at, place};
use crate::metrics::{self, Sample, Seen};
use crate::plan::lane::{Lane, Pair};
use crate::plan::{Plan, PlannedPeer, opted_out};
use crate::rates::verdict;
use crate::readiness::{Expected, Readiness};
use crate::serve::Request;
use crate::status::{
    DeviceStatus, EncryptionStatus, Explanation, GateCounters, GateStatus, OptOutStatus, PassStatus, PathStatus,
    PeerStatus, RefusedStatus, RotationStatus, RoutingStatus, Status, VERSION, Verdict,
};

/// A change of key that takes longer than this needs a look.
const ROTATION: Duration = Duration::from_secs(300);

impl Reconciler {
    /// Answers a question of the status socket.
    pub(super) fn answer(&mut self, request: &Request) -> Result<serde_json::Value, String> {
        let Some(last) = self.last.take() else {
            return match request {
                // What is counted of the attempts is all there is to tell.
                Request::Metrics => Ok(self.metrics(None).into()),
                Request::Status | Request::Gate | Request::Readiness | Request::Rotate | Request::Explain { .. } => {
                    Err("the agent cannot look at this machine's network; its log says why".to_owned())
                }
            };
        };
        let answer = match request {
            Request::Status => self.status(&last).map(serde_json::to_value),
            Request::Gate => self.gate_counters(&last).map(serde_json::to_value),
            Request::Metrics => Ok(Ok(self.metrics(Some(&last)).into())),
            Request::Readiness => self.readiness(&last).map(serde_json::to_value),
            Request::Rotate => self.rotate_now(&last).map(serde_json::to_value),
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
        let tunnels = self.observe_tunnels(last)?;
        self.status_with(last, &tunnels)
    }

    fn observe_tunnels(&mut self, last: &Pass) -> anyhow::Result<Tunnels> {
        let mut tunnels = Tunnels::new();
        for (lane, desired) in &last.plan.tunnels {
            let observed = self.tunnel.observe(&desired.device).context("read the tunnel")?;
            tunnels.extend(observed.device.map(|device| (*lane, device)));
        }
        Ok(tunnels)
    }

    /// Begins a change of key, if there is none yet, and says how it goes.
    fn rotate_now(&mut self, last: &Pass) -> anyhow::Result<RotationStatus> {
        let now = Instant::now();
        if self.keys.next.is_none() {
            if self.from_memory {
                anyhow::bail!(
                    "no new key is taken while the directory's source is silent: the peers would not hear of it"
                );
            }
            if !rotation::may_begin(&self.keys, &last.plan, &last.surroundings) {
                anyhow::bail!("the last change of key is not over yet; ask again in some seconds");
            }
            let change = self.begin_rotation(now)?;
            info!(driver = Driver::Keys.name(), %change, "changed, as asked for");
        }
        self.rotation_status(last, now).context("there is no next key")
    }

    fn rotation_status(&self, last: &Pass, now: Instant) -> Option<RotationStatus> {
        let next = self.keys.next.as_ref()?;
        let progress = self
            .rotation
            .progress(&self.config, &self.keys, &last.plan, &last.surroundings, now);
        Some(RotationStatus {
            public_key: next.public,
            fingerprint: next.public.fingerprint(),
            seconds: progress.took.as_secs_f64(),
            followed: progress.followed,
            away: progress.away,
            waiting: progress.waiting,
        })
    }

    fn status_with(&mut self, last: &Pass, tunnels: &Tunnels) -> anyhow::Result<Status> {
        let attached = self.gate.observe().context("read the gate")?;
        self.rates.sample(
            Instant::now(),
            self.gate.counters().context("read the gate's counters")?,
        );
        let directory = self.wiring.mesh.borrow().directory.clone();
        let paths = self.prober.snapshot();
        let backend = self.backend().to_string();
        let keepalive = !self.config.encryption.keepalive.is_zero();
        let peers: Vec<PeerStatus> = last
            .plan
            .peers
            .iter()
            .map(|(name, planned)| {
                let device = planned.pair().lane.device(&self.config.encryption);
                let path = planned.probe.and_then(|address| paths.get(&address));
                peer_status(name, planned, tunnels, path, device, backend.clone(), keepalive)
            })
            .collect();
        let refused = last.snapshot.refused.iter().map(|(name, refused)| RefusedStatus {
            node: name.to_string(),
            reasons: refused.reasons.iter().map(ToString::to_string).collect(),
            fenced: refused.pod_prefixes.iter().copied().collect(),
        });
        let opted_out = opted_out(&self.config, &last.snapshot).map(|claims| {
            let claims = claims.iter().map(|(address, claim)| OptOutStatus {
                pod: claim.pod.clone(),
                node: claim.node.clone(),
                address: *address,
                by: claim.by.to_string(),
            });
            claims.collect()
        });
        let mut status = Status {
            version: VERSION,
            verdict: Verdict::Healthy,
            summary: String::new(),
            node: self.config.node.clone(),
            public_key: self.keys.current.public,
            fingerprint: self.keys.current.public.fingerprint(),
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
                devices: device_statuses(&last.plan),
            },
            rotation: self.rotation_status(last, Instant::now()),
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
            directory,
            peers,
            refused: refused.collect(),
            opted_out,
            pass: PassStatus {
                number: last.number,
                changes: last.changes,
                failures: last.failures.clone(),
                seconds: last.took.as_secs_f64(),
                latest_changes: self.latest_changes.iter().cloned().collect(),
            },
            problems: last.plan.problems.clone(),
        };
        status.problems.extend(self.wiring.http.borrow().clone());
        judge(&mut status, &last.plan);
        Ok(status)
    }

    fn readiness(&mut self, last: &Pass) -> anyhow::Result<Readiness> {
        let status = self.status(last)?;
        let uplinks: Vec<&str> = last.plan.gate.uplinks.iter().map(String::as_str).collect();
        let now = Instant::now();
        let keepalive = !self.config.encryption.keepalive.is_zero();
        let awaited = |peer: &PeerStatus| {
            let reachable = last
                .plan
                .peers
                .get(&peer.node)
                .is_some_and(|planned| planned.endpoint().is_some());
            // Without keepalive nobody shakes hands before there is something to say.
            keepalive
                && reachable
                && peer.handshake_age_seconds.is_none()
                && self.convergence.is_awaited(&peer.public_key, now)
        };
        let expected = Expected {
            uplinks: &uplinks,
            encrypts: last.plan.has_its_devices(&last.surroundings),
            awaited: &awaited,
        };
        Ok(Readiness::of(&status, expected))
    }

    /// The text for Prometheus; where this machine cannot be looked at, with what is known without.
    fn metrics(&mut self, last: Option<&Pass>) -> String {
        let look = last.map(|last| {
            let tunnels = self.observe_tunnels(last)?;
            let status = self.status_with(last, &tunnels)?;
            anyhow::Ok((last, tunnels, status))
        });
        let look = look.and_then(|look| {
            look.inspect_err(|error| {
                let error = format!("{error:#}");
                warn!(error, "metrics are told without a look at this machine");
            })
            .ok()
        });
        let seen = look.as_ref().map(|(last, tunnels, status)| Seen {
            status,
            handshakes: handshakes(last, tunnels),
            uplinks: &last.plan.gate.uplinks,
            counters: self.rates.counters(),
            names: self.names(last),
        });
        let nobody = BTreeMap::new();
        let (mesh, source) = (self.wiring.mesh.borrow(), self.wiring.source.borrow());
        metrics::render(&Sample {
            now: SystemTime::now(),
            key_since: self.keys.current.since,
            directory: &mesh.directory,
            source: &source,
            refused: mesh.snapshot.as_ref().map_or(&nobody, |snapshot| &snapshot.refused),
            tally: &self.tally,
            convergence: &self.convergence,
            seen,
        })
    }

    /// The nodes that have a name, by the number under which the gate counts them.
    fn names(&self, last: &Pass) -> BTreeMap<u64, String> {
        let others = last.snapshot.peers.keys().chain(last.snapshot.refused.keys());
        others
            .chain([&self.config.node])
            .map(|name| (name.id().0, name.to_string()))
            .collect()
    }

    fn gate_counters(&mut self, last: &Pass) -> anyhow::Result<GateCounters> {
        self.rates.sample(
            Instant::now(),
            self.gate.counters().context("read the gate's counters")?,
        );
        remember(&mut self.drops, self.gate.events().iter().map(drop_line));
        Ok(GateCounters {
            version: VERSION,
            mode: mode_name(self.config.gate.mode).to_owned(),
            counters: self.rates.rows(&self.names(last)),
            events: self.drops.iter().cloned().collect(),
        })
    }

    fn explain(&mut self, last: &Pass, source: Source, destination: IpAddr) -> anyhow::Result<Explanation> {
        let observed = self.gate.observe().context("read the gate")?;
        let tunnels = self.observe_tunnels(last)?;
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
            tunnels: &tunnels,
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
    if let Some(rotation) = &status.rotation
        && rotation.seconds > ROTATION.as_secs_f64()
        && let Some(first) = rotation.waiting.first()
    {
        let more = match rotation.waiting.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        status.problems.push(Check::KeyRotationWaits.says(format!(
            "the new key {} waits for {first}{more}: does its agent run, and hear of the directory?",
            rotation.fingerprint
        )));
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

    let (plain, tunnelled): (Vec<_>, Vec<_>) = status.peers.iter().partition(|peer| peer.in_the_clear.is_some());
    let connected = tunnelled.iter().filter(|peer| peer.problems.is_empty()).count();
    let total = status.peers.len() + status.refused.len();
    if status.problems.is_empty() {
        status.verdict = Verdict::Healthy;
        status.summary = format!(
            "every byte to {} of {total} nodes is encrypted, {}the gate enforces on {}, {} bytes in the clear",
            tunnelled.len(),
            by_configuration(plain.len(), status.opted_out.as_deref().unwrap_or_default()),
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

/// What the configuration leaves in the clear, to be told before the bytes that should not be.
fn by_configuration(plain_nodes: usize, opted_out: &[OptOutStatus]) -> String {
    let pods: BTreeSet<&str> = opted_out.iter().map(|opt_out| opt_out.pod.as_str()).collect();
    let mut text = String::new();
    if plain_nodes > 0 {
        text.push_str(&format!("{plain_nodes} in this zone are in the clear, "));
    }
    if !pods.is_empty() {
        text.push_str(&format!("but for {} pods that have opted out, ", pods.len()));
    }
    text
}

/// The encryption devices as they are.
pub(super) type Tunnels = BTreeMap<Lane, Device>;

/// A peer as it is on one of the encryption devices.
fn observed_peer<'a>(tunnels: &'a Tunnels, pair: &Pair) -> Option<&'a ObservedPeer> {
    tunnels.get(&pair.lane)?.peers.get(&pair.peer)
}

/// When each peer last shook hands; those that never did are not among them.
fn handshakes<'a>(last: &'a Pass, tunnels: &Tunnels) -> BTreeMap<&'a NodeName, SystemTime> {
    let peers = last.plan.peers.iter();
    peers
        .filter_map(|(name, planned)| Some((name, observed_peer(tunnels, planned.pair())?.last_handshake?)))
        .collect()
}

fn device_statuses(plan: &Plan) -> Vec<DeviceStatus> {
    let status = |(lane, tunnel): (&Lane, &shroud_tunnel::Desired)| DeviceStatus {
        name: tunnel.device.clone(),
        listen_port: tunnel.listen_port,
        fingerprint: tunnel.public_key.fingerprint(),
        peers: tunnel.peers.len(),
        used_for: plan.peers.values().filter(|peer| peer.pair().lane == *lane).count(),
    };
    plan.tunnels.iter().map(status).collect()
}

fn peer_status(
    name: &NodeName,
    planned: &PlannedPeer,
    tunnels: &Tunnels,
    path: Option<&PathMtu>,
    device: String,
    backend: String,
    keepalive: bool,
) -> PeerStatus {
    let seen = observed_peer(tunnels, planned.pair());
    let all = || planned.pairs.iter().filter_map(|pair| observed_peer(tunnels, pair));
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
        (Some(_), Some(age)) if keepalive && age > FRESH => {
            let says = format!("no handshake for {} s: is its UDP port reachable?", age.as_secs());
            problems.push(Check::PeerNoHandshake.says(says));
        }
        (Some(_), _) => {}
    }
    PeerStatus {
        node: name.clone(),
        public_key: planned.pair().peer,
        fingerprint: planned.pair().peer.fingerprint(),
        backend,
        device,
        endpoint: seen.and_then(|peer| peer.endpoint).or(planned.endpoint()),
        handshake_age_seconds: age.map(|age| age.as_secs_f64()),
        rx_bytes: all().map(|peer| peer.rx_bytes).sum(),
        tx_bytes: all().map(|peer| peer.tx_bytes).sum(),
        mode: planned
            .overlay
            .as_ref()
            .map_or("native", |end| end.kind.name())
            .to_owned(),
        mtu: planned.mtu,
        path: path.map(|path| PathStatus {
            state: path.state.to_string(),
            expected_mtu: planned.expected_mtu,
            rtt_milliseconds: path.rtt.map(|rtt| rtt.as_secs_f64() * 1000.0),
            probes_sent: path.sent,
            probes_lost: path.lost,
        }),
        pod_prefixes: planned.verified.pod_prefixes.iter().copied().collect(),
        encrypts_nodes: planned.encrypts_nodes,
        in_the_clear: planned
            .in_zone
            .as_ref()
            .map(|zone| format!("both nodes are in zone {zone}, and `encrypt.scope` is cross-zone")),
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
