//! The reconcile loop: one plain thread that owns every handle on the kernel.
//!
//! Each pass looks at the machine, plans, and brings each driver from what it observes to what is planned: the gate first, so that
//! existing secured traffic keeps flowing and what cannot be secured yet is dropped; if we crash on any line, both stay true. A wake-up
//! only says "look again"; there is no second path for start, change, drift or restart. A pass may save itself the look at what nobody else
//! has touched, see `look`.

mod answers;
mod look;
mod memory;
mod rotation;
mod tally;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use shroud_ebpf::{Gate, Hook, Table};
use shroud_keyd::announcement::Mode;
use shroud_keyd::directory::{Origin, Own};
use shroud_keyd::{NodeKeys, PublicKeys, Snapshot, Telemetry, key};
use shroud_model::{OverlayFormat, Prefix, PublicKey};
use shroud_overlay::Overlay;
use shroud_routing::path_mtu::Prober;
use shroud_routing::{Facts, Hop, InstalledRoute, Kernel};
use shroud_tunnel::{Backend, Choice, FRESH, Observed, Tunnel, Wanted};
use tokio::sync::{oneshot, watch};
use tracing::{debug, info, warn};

use crate::check::{Check, Driver, Problem};
use crate::cni;
use crate::config::{Config, EncryptionBackend, GateAttach};
use crate::convergence::Convergence;
use crate::explain::attached_at;
use crate::plan::lane::Lane;
use crate::plan::{LaneDevice, Plan, Surroundings, View, addresses_of_interest, opted_out, plan, uplinks};
use crate::rates::{Rates, direction};
use crate::serve::Request;
use crate::status::DirectoryStatus;

use self::look::{Look, TURNS, Ways};
use self::rotation::Rotation;

pub(crate) use self::tally::Tally;

/// Changes come in bursts; a burst is one reason to look. This long at least is between a pass and one that somebody else's change makes necessary,
/// and between the beginnings of two for the mesh.
const SETTLE: Duration = Duration::from_millis(50);
/// How long the first change is kept waiting for those that come with it.
const BURST: Duration = Duration::from_millis(10);
/// How many of the latest changes and drops are kept for the status.
const REMEMBERED: usize = 20;

/// What the loop is told.
pub(crate) enum Wake {
    /// The mesh has changed.
    Mesh,
    /// Somebody else changed something in the kernel.
    Kernel,
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

/// How other nodes find this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Presence {
    /// By which keys it is known.
    pub(crate) keys: PublicKeys,
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) backend: Backend,
    pub(crate) mode: Mode,
    /// The overlay packets that can be received.
    pub(crate) overlays: Vec<OverlayFormat>,
    /// Whether this node's pods are attached by us, and can be.
    pub(crate) attaches_pods: bool,
}

/// How the loop hears of the other parts, and they of it.
pub(crate) struct Wiring {
    /// Who is in the mesh.
    pub(crate) mesh: watch::Receiver<Mesh>,
    /// How the directory's source fares, for the metrics.
    pub(crate) source: watch::Receiver<Telemetry>,
    /// For whoever publishes the announcement.
    pub(crate) presence: watch::Sender<Option<Presence>>,
    /// Why nobody answers probes.
    pub(crate) http: watch::Receiver<Option<Problem>>,
    /// When the last pass ended, for whoever answers probes.
    pub(crate) pulse: watch::Sender<Instant>,
    /// For whoever listens to the kernel: by which netlink port it knows us.
    pub(crate) own_port: Arc<AtomicU32>,
}

/// Says why to look again; when the queue is full, there will be a look anyway.
///
/// # Errors
/// When nobody looks any more.
pub(crate) fn wake(wakes: &SyncSender<Wake>, why: Wake) -> anyhow::Result<()> {
    match wakes.try_send(why) {
        Ok(()) | Err(TrySendError::Full(_)) => Ok(()),
        Err(TrySendError::Disconnected(_)) => Err(anyhow!("the reconcile thread is gone")),
    }
}

/// Every handle on the kernel, and what the last pass found.
pub(crate) struct Reconciler {
    config: Config,
    keys: NodeKeys,
    rotation: Rotation,
    /// The backend, or why there is none; asked again on each pass until there is one.
    choice: Result<Choice, String>,
    gate: Gate,
    tunnel: Tunnel,
    overlay: Overlay,
    kernel: Kernel,
    prober: Prober,
    wiring: Wiring,
    /// The gate as the last pass left it, where that is known without a look.
    gate_as_left: Option<shroud_ebpf::Observed>,
    ways: Ways,
    /// When the first change of the mesh was heard of that no pass has seen yet.
    heard: Option<Instant>,
    /// Whether the directory is only a memory of an earlier run.
    from_memory: bool,
    /// Whether pods may opt out, and nobody can say which have.
    opt_outs_unknown: bool,
    last: Option<Pass>,
    latest_changes: VecDeque<String>,
    drops: VecDeque<String>,
    rates: Rates,
    tally: Tally,
    convergence: Convergence,
}

/// One comparison of the kernel with the plan.
struct Pass {
    number: u64,
    plan: Arc<Plan>,
    /// The keys of this node for which it was made.
    keys: PublicKeys,
    /// Whether all that is ours is as planned since then.
    as_planned: bool,
    surroundings: Surroundings,
    snapshot: Arc<Snapshot>,
    changes: usize,
    failures: Vec<Problem>,
    took: Duration,
}

/// What a pass looks at, and what it has seen of ours while looking at what is around us.
struct Seen {
    look: Look,
    tunnels: BTreeMap<Lane, Observed>,
    routes: Option<Vec<InstalledRoute>>,
}

/// What a pass did so far.
#[derive(Default)]
struct Report {
    changes: Vec<(Driver, String)>,
    failures: Vec<(Driver, Problem)>,
}

/// How a round over the overlay's devices went.
#[derive(Default)]
struct OverlayRound {
    /// Whether a change of a device was tried.
    tried: bool,
    /// Whether anything is left to do.
    left: bool,
}

impl Report {
    /// Takes note of one change and how it went.
    fn note(&mut self, driver: Driver, change: &impl Display, result: Result<(), anyhow::Error>) {
        match result {
            Ok(()) => {
                info!(driver = driver.name(), %change, "changed");
                self.changes.push((driver, change.to_string()));
            }
            Err(error) => self.fail(driver, &error.context(change.to_string())),
        }
    }

    fn fail(&mut self, driver: Driver, error: &anyhow::Error) {
        let check = driver.check(error);
        warn!(driver = driver.name(), %check, error = format!("{error:#}"), "failed");
        let problem = check.says(format!("{error:#}")).about(driver.name());
        self.failures.push((driver, problem));
    }

    fn changed(&self, driver: Driver) -> bool {
        self.changes.iter().any(|(changed, _)| *changed == driver)
    }

    fn failed(&self, driver: Driver) -> bool {
        self.failures.iter().any(|(failed, _)| *failed == driver)
    }
}

impl Reconciler {
    /// Opens every handle; nothing is changed yet, but that the gate's maps and programs are loaded.
    ///
    /// # Errors
    /// When the kernel refuses one of them.
    pub(crate) fn open(config: Config, keys: NodeKeys, wiring: Wiring) -> anyhow::Result<Self> {
        let gate = Gate::open(&gate_options(&config)).context("load the gate")?;
        let tunnel = Tunnel::new(tunnel_options(&config));
        let overlay = Overlay::open(config.routing.vni).context("open overlay netlink")?;
        let kernel = Kernel::open().context("open routing netlink")?;
        let prober = Prober::start()?;
        Ok(Self {
            config,
            keys,
            rotation: Rotation::new(Instant::now()),
            choice: Err("not asked yet".to_owned()),
            gate,
            tunnel,
            overlay,
            kernel,
            prober,
            wiring,
            gate_as_left: None,
            ways: Ways::default(),
            heard: None,
            from_memory: false,
            opt_outs_unknown: false,
            last: None,
            latest_changes: VecDeque::new(),
            drops: VecDeque::new(),
            rates: Rates::default(),
            tally: Tally::new(),
            convergence: Convergence::new(),
        })
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self, wakes: &Receiver<Wake>) {
        let (mut next_look, mut next) = (Instant::now(), Look::Everything);
        let mut turns = TURNS.into_iter().cycle();
        let share = *self.config.resync / u32::try_from(TURNS.len()).expect("a handful");
        let mut failed: u32 = 0;
        loop {
            let begun = Instant::now();
            let due = begun >= next_look;
            let report = self.pass(begun, if due { next } else { Look::Nothing });
            self.tally.add(&report, begun.elapsed());
            let ended = Instant::now();
            self.wiring.pulse.send_replace(ended);
            if due {
                next = turns.next().map_or(Look::Everything, Look::At);
                next_look = ended + share;
            }
            failed = match report.failures.is_empty() {
                true => 0,
                false => failed.saturating_add(1),
            };
            if failed > 0 || report.changed(Driver::Keys) {
                // What we take for granted may be wrong; what fails again and again is tried less and less often.
                next = Look::Everything;
                let pause = SETTLE * 2_u32.saturating_pow(failed.saturating_sub(1));
                next_look = next_look.min(ended + pause.min(*self.config.resync));
            }
            let mut deadline = next_look;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    // However many questions there are, a pass comes first.
                    break;
                }
                let has_changed = match wakes.recv_timeout(left) {
                    Ok(Wake::Mesh) => {
                        let heard = *self.heard.get_or_insert(Instant::now());
                        deadline = deadline.min((heard + BURST).max(begun + SETTLE));
                        false
                    }
                    Ok(Wake::Kernel) => true,
                    Ok(Wake::Question { request, answer }) => {
                        // Whoever asked may have gone; then nobody misses the answer.
                        drop(answer.send(self.answer(&request)));
                        request == Request::Rotate
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                };
                if has_changed {
                    next = Look::Everything;
                    next_look = next_look.min(Instant::now().max(ended + SETTLE));
                    deadline = deadline.min(next_look);
                }
            }
        }
    }

    /// Compares the kernel with the plan once, and mends what differs. What it does not look at is taken to be as the last pass left it.
    fn pass(&mut self, begun: Instant, look: Look) -> Report {
        let mut report = Report::default();
        self.wiring.own_port.store(self.kernel.port(), Ordering::Relaxed);
        let heard = self.heard.take().unwrap_or(begun);
        let known = self.wiring.mesh.borrow_and_update().snapshot.clone();
        let last = self.last.as_ref();
        let news = known
            .as_ref()
            .filter(|known| last.is_none_or(|last| !Arc::ptr_eq(&last.snapshot, known)));
        if let Some(snapshot) = news {
            let keys = snapshot.peers.values().flat_map(|peer| peer.keys());
            self.convergence.announced(&keys.collect(), heard);
        }
        self.from_memory = known.as_ref().is_some_and(|snapshot| snapshot.origin == Origin::Cache);
        self.opt_outs_unknown = match &known {
            Some(snapshot) => opted_out(&self.config, snapshot).is_none(),
            None => self.config.encrypt.opt_out,
        };
        let mut attaches_pods = false;
        // Also while nobody is known yet: the announcement says what encrypts, and every change of it is a write that all others read.
        self.choose(&mut report);
        let converged = match known {
            Some(snapshot) => {
                let converged = self.converge(&snapshot, look, &mut report);
                if let Ok((plan, _)) = &converged {
                    attaches_pods = self.ensure_cni(plan, &snapshot.own.pod_prefixes, &mut report);
                }
                converged.map(|(plan, surroundings)| (plan, surroundings, snapshot))
            }
            None => self.fence_until_known(&mut report),
        };
        // Thousands of peers have thousands of counters; whoever asks for them reads them anew.
        if look.is_at(Driver::Gate) {
            match self.gate.counters() {
                Ok(counters) => self.rates.sample(Instant::now(), counters),
                Err(error) => report.fail(Driver::Gate, &anyhow::Error::new(error).context("read the counters")),
            }
        }
        remember(&mut self.drops, self.gate.events().iter().map(drop_line));
        let (plan, surroundings, snapshot) = match converged {
            Ok(converged) => converged,
            Err(error) => {
                report.fail(Driver::Look, &error);
                if let Some(last) = &mut self.last {
                    last.failures = problems(&report);
                    last.as_planned = false;
                }
                return report;
            }
        };
        // Only where the way is as planned: elsewhere a probe could leave in the clear, and would tell nothing of the tunnel.
        let way_is_there = plan.has_its_devices(&surroundings) && report.failures.is_empty();
        let as_planned = snapshot.origin == Origin::Source && self.choice.is_ok() && report.failures.is_empty();
        let last = self.last.as_ref();
        let is_news = last.is_none_or(|last| !(as_planned && last.as_planned && Arc::ptr_eq(&last.plan, &plan)));
        if is_news {
            let probed = plan.peers.values().filter(|_| way_is_there);
            let probed = probed.filter_map(|peer| Some((peer.probe?, peer.expected_mtu)));
            self.prober.set_targets(&probed.collect());
        }
        let keys = self.keys.public();
        self.rotate(&plan, &surroundings, &mut report);
        let presence = Presence {
            keys: self.keys.public(),
            addresses: plan.addresses.clone(),
            backend: self.backend(),
            mode: plan.mode,
            overlays: plan.received.clone(),
            attaches_pods,
        };
        self.wiring.presence.send_if_modified(|published| {
            let differs = published.as_ref() != Some(&presence);
            *published = Some(presence);
            differs
        });
        let number = self.last.as_ref().map_or(0, |pass| pass.number) + 1;
        let took = begun.elapsed();
        debug!(
            number,
            changes = report.changes.len(),
            failures = report.failures.len(),
            ?took,
            "pass"
        );
        let changes = report.changes.iter();
        let lines = changes.map(|(driver, change)| format!("{}: {change}", driver.name()));
        remember(&mut self.latest_changes, lines);
        self.last = Some(Pass {
            number,
            plan,
            keys,
            as_planned,
            surroundings,
            snapshot,
            changes: report.changes.len(),
            failures: problems(&report),
            took,
        });
        report
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
                report.fail(Driver::Tunnel, &error);
                Err(format!("{error:#}"))
            }
        };
    }

    /// Goes on with a change of this node's key: begins one that is due, and ends one that all peers have followed. Not while only a memory of
    /// the mesh is known, which may lack a peer.
    fn rotate(&mut self, plan: &Plan, surroundings: &Surroundings, report: &mut Report) {
        if self.from_memory {
            return;
        }
        let now = Instant::now();
        let result = match &self.keys.next {
            None if !rotation::is_due(&self.config, &self.keys.current, SystemTime::now()) => return,
            None if !rotation::may_begin(&self.keys, plan, surroundings) => return,
            None => self.begin_rotation(now),
            Some(_) => {
                let progress = self
                    .rotation
                    .progress(&self.config, &self.keys, plan, surroundings, now);
                if !progress.is_done() {
                    return;
                }
                self.end_rotation()
            }
        };
        match result {
            Ok(change) => report.note(Driver::Keys, &change, Ok(())),
            Err(error) => report.fail(Driver::Keys, &error),
        }
    }

    /// Makes the key to come, unless there is one.
    fn begin_rotation(&mut self, now: Instant) -> anyhow::Result<String> {
        self.keys = key::prepare(&self.config.state_dir).context("make this node's next key")?;
        self.rotation.begin(now);
        let next = self
            .keys
            .next
            .as_ref()
            .map_or_else(String::new, |next| next.public.fingerprint());
        Ok(format!(
            "key {}: in force -> with {next} to follow",
            self.keys.current.public.fingerprint()
        ))
    }

    /// Puts the key to come in force.
    fn end_rotation(&mut self) -> anyhow::Result<String> {
        let old = self.keys.current.public.fingerprint();
        self.keys = key::promote(&self.config.state_dir).context("put this node's next key in force")?;
        self.rotation.end();
        Ok(format!(
            "key {old}: in force -> replaced by {}",
            self.keys.current.public.fingerprint()
        ))
    }

    /// Gate, tunnel, overlay, routing, in this order; overlay devices go only when no route leads to them any more. Where that changed a
    /// device, gate and routes are planned again: its number and its presence are part of both.
    fn converge(
        &mut self,
        snapshot: &Arc<Snapshot>,
        look: Look,
        report: &mut Report,
    ) -> anyhow::Result<(Arc<Plan>, Surroundings)> {
        let (surroundings, mut seen) = self.look(snapshot, look)?;
        let plan = self.plan_for(snapshot, &surroundings);
        self.ensure_gate(&plan.gate, seen.look, report);
        let device_changed = self.choice.is_ok() && self.ensure_tunnels(&plan, &surroundings, &mut seen, report);
        if self.choice.is_ok() && !report.failed(Driver::Tunnel) {
            let keys = plan.peers.values().map(|peer| &peer.pair().peer);
            self.convergence.configured(keys, Instant::now());
        }
        let overlay = self.ensure_overlay(&plan.overlay, &is_no_removal, report);
        if !device_changed && !overlay.tried {
            self.ensure_routing(&plan.routing, &mut seen, report);
            self.finish_overlay(&plan.overlay, &overlay, report);
            return Ok((plan, surroundings));
        }
        let (surroundings, mut seen) = self.look(snapshot, Look::Everything)?;
        let plan = Arc::new(self.plan(snapshot, &surroundings));
        // The gate first: nothing that a new device decrypts goes on unseen.
        self.ensure_gate(&plan.gate, seen.look, report);
        let overlay = self.ensure_overlay(&plan.overlay, &is_no_removal, report);
        self.ensure_routing(&plan.routing, &mut seen, report);
        self.finish_overlay(&plan.overlay, &overlay, report);
        Ok((plan, surroundings))
    }

    /// The plan; the last one where nothing differs of all that it depends on.
    fn plan_for(&self, snapshot: &Arc<Snapshot>, surroundings: &Surroundings) -> Arc<Plan> {
        let is_the_same = |last: &&Pass| {
            let same_mesh = Arc::ptr_eq(&last.snapshot, snapshot) && last.keys == self.keys.public();
            same_mesh && last.as_planned && last.surroundings == *surroundings
        };
        match self.last.as_ref().filter(is_the_same) {
            Some(last) => Arc::clone(&last.plan),
            None => Arc::new(self.plan(snapshot, surroundings)),
        }
    }

    fn plan(&self, snapshot: &Snapshot, surroundings: &Surroundings) -> Plan {
        plan(&View {
            config: &self.config,
            keys: &self.keys,
            backend: self.backend(),
            snapshot,
            surroundings,
        })
    }

    fn backend(&self) -> Backend {
        self.choice.as_ref().map_or(Backend::Userspace, |choice| choice.backend)
    }

    /// Before the first complete list nobody is a peer. Where a gate of an earlier agent works on, it knows more than we do and is left
    /// alone; where there is none, an empty one goes in, which drops everything protected.
    fn fence_until_known(&mut self, report: &mut Report) -> anyhow::Result<(Arc<Plan>, Surroundings, Arc<Snapshot>)> {
        let nobody = Snapshot {
            origin: Origin::Cache,
            own: Own {
                pod_prefixes: self.config.pod_prefixes.clone(),
                addresses: Vec::new(),
                zone: None,
            },
            peers: BTreeMap::new(),
            refused: BTreeMap::new(),
            opted_out: None,
            problems: Vec::new(),
        };
        let (surroundings, _) = self.look(&nobody, Look::Everything)?;
        let mut plan = self.plan(&nobody, &surroundings);
        plan.problems.push(
            Check::DirectoryWaiting
                .says("waiting for the directory's first complete list; until then no new tunnel is opened"),
        );
        if let Some(table) = self.gate.observe().context("read the gate")?.table {
            plan.gate.table = Table {
                opted_out: memory::opted_out_elsewhere(&table),
                ..table
            };
        }
        self.ensure_gate(&plan.gate, Look::Everything, report);
        Ok((Arc::new(plan), surroundings, Arc::new(nobody)))
    }

    /// What this machine looks like around us, and what was seen of ours on the way. What it is not the time to look at is as the last pass has it.
    fn look(&mut self, snapshot: &Snapshot, look: Look) -> anyhow::Result<(Surroundings, Seen)> {
        // Where our pods are depends on which addresses they have.
        let last = self.last.as_ref();
        let known = last.filter(|last| look != Look::Everything && last.snapshot.own == snapshot.own);
        let (known, look) = match known {
            Some(last) => (last.surroundings.clone(), look),
            None => (Surroundings::default(), Look::Everything),
        };
        let mut seen = Seen {
            look,
            tunnels: BTreeMap::new(),
            routes: None,
        };
        let (facts, overlay_devices) = if look.is_at(Driver::Routing) {
            let (facts, routes) = self
                .kernel
                .survey(&snapshot.own.pod_prefixes)
                .context("look at links, addresses and routes")?;
            let overlay = self.overlay.observe().context("look at overlay devices")?;
            seen.routes = Some(routes);
            (facts, overlay.devices.into_keys().collect())
        } else {
            (known.facts, known.overlay_devices)
        };
        let hops = self.look_at_ways(snapshot, known.hops, look)?;
        let devices: BTreeMap<Lane, u32> = Lane::ALL
            .into_iter()
            .filter_map(|lane| Some((lane, facts.links.get(&lane.device(&self.config.encryption))?.index)))
            .collect();
        let known_devices = known.lanes.iter().filter(|(_, device)| device.has_our_key);
        let same_devices = known_devices
            .map(|(lane, device)| (*lane, device.index))
            .eq(devices.clone());
        let (lanes, met) = if look.is_at(Driver::Tunnel) || !same_devices {
            for lane in devices.keys() {
                let observed = self.tunnel.observe(&lane.device(&self.config.encryption));
                seen.tunnels.extend(observed.ok().map(|observed| (*lane, observed)));
            }
            self.look_at_tunnels(&devices, &seen.tunnels, snapshot)
        } else {
            (known.lanes, known.met)
        };
        let surroundings = Surroundings {
            pod_devices: pod_devices(&self.config, &facts, &hops),
            facts,
            hops,
            lanes,
            met,
            overlay_devices,
            paths: self.prober.sizes(),
        };
        Ok((surroundings, seen))
    }

    /// The ways to peers: those that are known, and what the kernel says of the others and of those whose turn it is.
    fn look_at_ways(
        &mut self,
        snapshot: &Snapshot,
        mut hops: BTreeMap<IpAddr, Hop>,
        look: Look,
    ) -> anyhow::Result<BTreeMap<IpAddr, Hop>> {
        let wanted = addresses_of_interest(snapshot);
        hops.retain(|address, _| wanted.contains(address));
        let ask = self.ways.due(&wanted, &hops, look);
        let found = self
            .kernel
            .lookup_all(&ask, Some(self.config.gate.tunnel_mark))
            .context("look up the routes to peers")?;
        hops.extend(found);
        Ok(hops)
    }

    /// Which of the devices are encryption devices that work, and in which of them peers with more than one tunnel have shaken hands not long
    /// ago. Takes note of all who have, and of what came in.
    fn look_at_tunnels(
        &mut self,
        devices: &BTreeMap<Lane, u32>,
        tunnels: &BTreeMap<Lane, Observed>,
        snapshot: &Snapshot,
    ) -> (BTreeMap<Lane, LaneDevice>, BTreeSet<(Lane, PublicKey)>) {
        let (mut lanes, mut met) = (BTreeMap::new(), BTreeSet::new());
        let own_next = self.keys.next.is_some();
        let next_keys = snapshot
            .peers
            .values()
            .filter(|peer| own_next || peer.next_key.is_some());
        let choosing: BTreeSet<PublicKey> = next_keys.flat_map(|peer| peer.keys()).collect();
        let (now, mut shaken, mut heard) = (Instant::now(), Vec::new(), BTreeMap::new());
        for (lane, observed) in tunnels {
            let Some(device) = &observed.device else { continue };
            let own = self.keys.iter().find(|key| device.public_key == Some(key.public));
            lanes.insert(
                *lane,
                LaneDevice {
                    index: devices[lane],
                    has_our_key: own.is_some_and(|key| lane.is_of(key.epoch)),
                },
            );
            for (key, peer) in &device.peers {
                let age = peer.last_handshake.and_then(|at| observed.at.duration_since(at).ok());
                shaken.extend(age.and_then(|age| Some((*key, now.checked_sub(age)?))));
                if choosing.contains(key) {
                    if age.is_some_and(|age| age < FRESH) {
                        met.insert((*lane, *key));
                    }
                    heard.insert((*lane, *key), peer.rx_bytes);
                }
            }
        }
        self.convergence.met(shaken.into_iter());
        self.rotation.heard(heard, now);
        (lanes, met)
    }

    /// Unless it is the time to look, the gate is taken to be as the last pass left it: reading the table of thousands of peers takes longer than
    /// changing it.
    fn ensure_gate(&mut self, desired: &shroud_ebpf::Desired, look: Look, report: &mut Report) {
        let observed = match self.gate_as_left.take().filter(|_| !look.is_at(Driver::Gate)) {
            Some(left) => left,
            None => match self.gate.observe() {
                Ok(observed) => observed,
                Err(error) => return report.fail(Driver::Gate, &error.into()),
            },
        };
        let mut desired = Cow::Borrowed(desired);
        if let Some(table) = &observed.table {
            if self.from_memory {
                memory::keep_owners(&mut desired.to_mut().table, table);
            }
            if self.opt_outs_unknown {
                let elsewhere = memory::opted_out_elsewhere(table);
                desired.to_mut().table.opted_out.extend(elsewhere);
            }
        }
        let changes = self.allowed(shroud_ebpf::diff(&desired, &observed));
        let mut left = Some(observed);
        for change in changes {
            let result = self.gate.apply(&change).map_err(Into::into);
            let done = result.is_ok();
            report.note(Driver::Gate, &change, result);
            left = if let shroud_ebpf::Change::ReplaceTable { new, .. } = change
                && done
            {
                left.map(|left| shroud_ebpf::Observed {
                    table: Some(*new),
                    ..left
                })
            } else {
                None
            };
        }
        self.gate_as_left = left;
    }

    /// The steps that may be taken now.
    fn allowed<T: memory::Step>(&self, steps: Vec<T>) -> Vec<T> {
        let from_memory = self.from_memory;
        steps
            .into_iter()
            .filter(|step| !(from_memory && step.takes_away()))
            .collect()
    }

    /// The plan as which all that is ours is, where the last pass left it so.
    fn as_planned(&self) -> Option<&Plan> {
        let last = self.last.as_ref().filter(|last| last.as_planned);
        last.map(|last| last.plan.as_ref())
    }

    /// Makes the encryption devices what they should be, and ends those that belong to no key any more. Answers whether a change of a device
    /// itself was tried, which the rest of the plan depends on. Peers are nobody else's business.
    fn ensure_tunnels(
        &mut self,
        plan: &Plan,
        surroundings: &Surroundings,
        seen: &mut Seen,
        report: &mut Report,
    ) -> bool {
        let mut device_changed = false;
        for (lane, desired) in &plan.tunnels {
            device_changed |= self.ensure_tunnel(*lane, desired, seen, report);
        }
        let surplus = surroundings
            .lanes
            .keys()
            .filter(|lane| !plan.tunnels.contains_key(lane));
        for lane in surplus.filter(|_| !self.from_memory) {
            device_changed = true;
            let device = lane.device(&self.config.encryption);
            let mut removal = self.tunnel.remove(&device);
            let result = match removal.errors.pop() {
                Some(error) => Err(error.into()),
                None => self.kernel.delete_link(&device).map(drop).map_err(anyhow::Error::from),
            };
            let change = format!("device {device}: of a key that is gone -> none");
            report.note(Driver::Tunnel, &change, result);
        }
        device_changed
    }

    fn ensure_tunnel(
        &mut self,
        lane: Lane,
        desired: &shroud_tunnel::Desired,
        seen: &mut Seen,
        report: &mut Report,
    ) -> bool {
        let found = seen.tunnels.remove(&lane);
        let looks = seen.look.is_at(Driver::Tunnel) || found.is_some();
        let before = self.as_planned().filter(|_| !looks);
        let before = before.and_then(|before| before.tunnels.get(&lane));
        let changes = match before.and_then(|before| shroud_tunnel::diff_plans(desired, before)) {
            Some(changes) => changes,
            None => match found.map_or_else(|| self.tunnel.observe(&desired.device), Ok) {
                Ok(observed) => shroud_tunnel::diff(desired, &observed),
                Err(error) => {
                    report.fail(Driver::Tunnel, &error.into());
                    return false;
                }
            },
        };
        let changes = self.allowed(changes);
        let is_removal = |change: &&shroud_tunnel::Change| matches!(change, shroud_tunnel::Change::RemoveDevice { .. });
        let (removals, rest) = changes.split_at(changes.iter().take_while(is_removal).count());
        for change in removals {
            // A TUN device outlives its process on purpose; a change of backend is the one time when it must make room.
            let result = self.tunnel.apply(desired, change).map_err(anyhow::Error::from);
            let result = result.and_then(|()| Ok(self.kernel.delete_link(&desired.device).map(drop)?));
            report.note(Driver::Tunnel, change, result);
        }
        for (change, result) in rest.iter().zip(self.tunnel.apply_all(desired, rest)) {
            report.note(Driver::Tunnel, change, result.map_err(anyhow::Error::from));
        }
        changes.iter().any(|change| {
            use shroud_tunnel::Change;

            matches!(
                change,
                Change::RemoveDevice { .. } | Change::CreateDevice { .. } | Change::SetPrivateKey { .. }
            )
        })
    }

    /// Does those changes that are `wanted` now.
    fn ensure_overlay(
        &mut self,
        desired: &shroud_overlay::Desired,
        wanted: &dyn Fn(&shroud_overlay::Change) -> bool,
        report: &mut Report,
    ) -> OverlayRound {
        let mut round = OverlayRound::default();
        let observed = match self.overlay.observe() {
            Ok(observed) => observed,
            Err(error) => {
                report.fail(Driver::Overlay, &error.into());
                round.left = true;
                return round;
            }
        };
        for change in self.allowed(shroud_overlay::diff(desired, &observed)) {
            if !wanted(&change) {
                round.left = true;
                continue;
            }
            round.tried |= is_of_a_device(&change);
            let result = self.overlay.apply(&change).map_err(Into::into);
            round.left |= result.is_err();
            report.note(Driver::Overlay, &change, result);
        }
        round
    }

    /// Does what an earlier round left; most passes leave nothing, and need not read the overlay again.
    fn finish_overlay(&mut self, desired: &shroud_overlay::Desired, earlier: &OverlayRound, report: &mut Report) {
        if earlier.left {
            self.ensure_overlay(desired, &|_| true, report);
        }
    }

    /// Tells the container runtime how to attach pods, once what they send is guarded: a runtime starts pods as soon as the file is there.
    /// Answers whether it is.
    fn ensure_cni(&mut self, plan: &Plan, pod_prefixes: &BTreeSet<Prefix>, report: &mut Report) -> bool {
        if !self.config.cni.install || pod_prefixes.is_empty() {
            return false;
        }
        let uplinks = &plan.gate.uplinks;
        let guards = |observed: &shroud_ebpf::Observed| {
            !uplinks.is_empty()
                && observed.table.is_some()
                && uplinks.is_subset(&attached_at(observed, Hook::Egress))
                && uplinks.is_subset(&attached_at(observed, Hook::Ingress))
        };
        let guarded = match &self.gate_as_left {
            Some(observed) => guards(observed),
            None => self.gate.observe().is_ok_and(|observed| guards(&observed)),
        };
        if !guarded {
            return false;
        }
        match self
            .config
            .cni
            .ensure(&cni::conflist(&self.config.cni, pod_prefixes, plan))
        {
            Ok(written) => {
                if written {
                    report.note(Driver::Cni, &"configuration list written", Ok(()));
                }
                true
            }
            Err(error) => {
                report.fail(Driver::Cni, &error.into());
                false
            }
        }
    }

    fn ensure_routing(&mut self, desired: &shroud_routing::Desired, seen: &mut Seen, report: &mut Report) {
        let before = self.as_planned().filter(|_| !seen.look.is_at(Driver::Routing));
        let changes = match before.and_then(|before| shroud_routing::diff_plans(desired, &before.routing)) {
            Some(changes) => changes,
            None => {
                let observed = match seen.routes.take() {
                    Some(routes) => self.kernel.observe_beside(routes, desired),
                    None => self.kernel.observe(desired),
                };
                match observed {
                    Ok(observed) => shroud_routing::diff(desired, &observed),
                    Err(error) => return report.fail(Driver::Routing, &error.into()),
                }
            }
        };
        for change in self.allowed(changes) {
            let result = self
                .kernel
                .apply(&change)
                .map_err(|error| self.in_words_of_the_tunnel(&change, error));
            report.note(Driver::Routing, &change, result);
        }
    }

    /// A device of the kernel's WireGuard takes its port when it goes up, which is routing's to do, and routing does not know the port.
    fn in_words_of_the_tunnel(&self, change: &shroud_routing::Change, error: shroud_routing::Error) -> anyhow::Error {
        let error = anyhow::Error::new(error);
        let encryption = &self.config.encryption;
        if let shroud_routing::Change::LinkUp { device } = change
            && let Some(lane) = Lane::of_device(device, encryption)
            && Driver::Routing.check(&error) == Check::TunnelPortTaken
        {
            let taken = shroud_tunnel::Error::PortTaken {
                device: device.clone(),
                port: lane.listen_port(encryption),
            };
            return taken.into();
        }
        error
    }
}

/// The devices behind which this node's pods are.
fn pod_devices(config: &Config, facts: &Facts, hops: &BTreeMap<IpAddr, Hop>) -> BTreeSet<String> {
    let uplinks = uplinks(config, facts, hops);
    let routed = facts.pod_route_devices.iter();
    routed
        .filter(|device| !uplinks.contains(*device) && Lane::of_device(device, &config.encryption).is_none())
        .cloned()
        .collect()
}

/// Whether a step of the overlay takes nothing away that a route may still lead to.
fn is_no_removal(change: &shroud_overlay::Change) -> bool {
    use shroud_overlay::Change;

    match change {
        Change::CreateDevice { .. }
        | Change::SetDevice { .. }
        | Change::SetForwarding { .. }
        | Change::SetNeighbour { .. } => true,
        // To be made anew in the same pass.
        Change::RemoveDevice { because, .. } => !because.is_empty(),
        Change::RemoveForwarding { .. } | Change::RemoveNeighbour { .. } => false,
    }
}

/// Whether a step of the overlay is about a device, and not about who is behind it.
fn is_of_a_device(change: &shroud_overlay::Change) -> bool {
    use shroud_overlay::Change;

    match change {
        Change::CreateDevice { .. } | Change::SetDevice { .. } | Change::RemoveDevice { .. } => true,
        Change::SetForwarding { .. }
        | Change::SetNeighbour { .. }
        | Change::RemoveForwarding { .. }
        | Change::RemoveNeighbour { .. } => false,
    }
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

/// What a pass could not do.
fn problems(report: &Report) -> Vec<Problem> {
    report.failures.iter().map(|(_, problem)| problem.clone()).collect()
}

/// Keeps the latest of a stream of lines.
fn remember(kept: &mut VecDeque<String>, lines: impl Iterator<Item = String>) {
    kept.extend(lines);
    while kept.len() > REMEMBERED {
        kept.pop_front();
    }
}
