//! One real agent in a cluster of thousands: what the first sync takes, what nodes that come and go cost, and how long a change needs from the API
//! server to the kernel.
//!
//! The API server for tests stands on the underlay of a lab with one node; all other nodes are Node objects with announcements of which nobody
//! answers. Time is taken by an independent eye: when `ip monitor` sees the route. `make bench-directory` runs it; docs/bench/directory.md keeps
//! results.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark may panic, runs the product, and its output is its result"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shroud_apiserver::{ApiServer, Options, Verb};
use shroud_lab::cluster::Cluster;
use shroud_lab::{Node, Topology, agent};

/// Nodes in the cluster besides ours; `SHROUD_BENCH_NODES` says otherwise.
const NODES: u32 = 5000;
/// Nodes that are replaced per second, one run each.
const CHURN: [u32; 3] = [1, 10, 50];
/// How long each run lasts.
const RUN: Duration = Duration::from_secs(20);
/// How long nothing happens, to count what is asked all the same.
const REST: Duration = Duration::from_secs(60);
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let nodes = std::env::var("SHROUD_BENCH_NODES").map_or(NODES, |count| count.parse().unwrap());
    let lab = Topology::new("bench").nodes(1).pods(0).build().unwrap();
    let node = lab.node("a");
    let cluster = Cluster::start(&lab, Options::default()).unwrap();
    for number in 0..nodes {
        cluster.server.put(node_object(number)).unwrap();
    }
    cluster.server.forget_requests();
    let routes = Routes::watch(node);
    let begun = Instant::now();
    let mut running = start(node, &cluster);

    // Each node has one prefix of each family.
    let last = routes.all_of((0..nodes).map(prefix), begun);
    let listed = cluster.server.requests();
    let asked = listed
        .iter()
        .find(|request| request.verb == Verb::List && request.resource == "nodes")
        .unwrap();
    let sync = last.duration_since(asked.start);
    println!(
        "{nodes} nodes: first sync {}, {} after the agent was started",
        ms(sync),
        ms(last.duration_since(begun))
    );
    let (bytes, resident_after) = (received(&cluster.server), resident(running.id()));
    println!(
        "  {} requests, {} received, {} resident",
        listed.len(),
        mib(bytes >> 10),
        mib(resident_after)
    );

    let before = cpu(running.id());
    thread::sleep(REST);
    let at_rest = cluster.server.requests().split_off(listed.len());
    let asked = at_rest.iter().filter(|request| request.verb != Verb::Watch).count();
    let share = (cpu(running.id()) - before) / REST.as_secs_f64();
    println!(
        "at rest: {asked} requests and {} watches in {} s, {:.1} % of a core",
        at_rest.len() - asked,
        REST.as_secs(),
        share * 100.0
    );
    let rest = json!({ "requests": asked, "watches": at_rest.len() - asked, "cpu": share });

    println!(
        "{:>12} {:>9} {:>9} {:>9} {:>9} {:>11} {:>9}",
        "replaced", "p50", "p99", "most", "CPU", "received", "resident"
    );
    let mut runs = Vec::new();
    let mut next = nodes;
    for per_second in CHURN {
        let run = churn(&cluster.server, &routes, running.id(), &mut next, nodes, per_second);
        println!("{}", run.line());
        runs.push(run.json());
    }
    running.kill().unwrap();
    running.wait().unwrap();
    if let Some(pid) = agent::wire(node) {
        println!("shroud wire: {} resident", mib(resident(pid)));
    }
    let aim = sync <= Duration::from_secs(2) && asked == 0 && resident_after <= 30 << 10;
    println!(
        "{}",
        json!({ "bench": "directory", "nodes": nodes, "firstSyncMs": sync.as_secs_f64() * 1e3, "residentKib": resident_after, "rest": rest, "churn": runs, "aimMet": aim })
    );
}

/// What one rate of change took.
struct Run {
    per_second: u32,
    latencies: Vec<Duration>,
    cpu: f64,
    bytes_per_second: u64,
    resident: u64,
}

impl Run {
    fn quantile(&self, share: f64) -> Duration {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index into a short list"
        )]
        let index = ((self.latencies.len() - 1) as f64 * share).round() as usize;
        self.latencies[index]
    }

    fn line(&self) -> String {
        format!(
            "{:>10}/s {:>9} {:>9} {:>9} {:>7.1} % {:>9}/s {:>9}",
            self.per_second,
            ms(self.quantile(0.5)),
            ms(self.quantile(0.99)),
            ms(self.quantile(1.0)),
            self.cpu * 100.0,
            mib(self.bytes_per_second >> 10),
            mib(self.resident)
        )
    }

    fn json(&self) -> Value {
        let millis = |share| self.quantile(share).as_secs_f64() * 1e3;
        json!({
            "perSecond": self.per_second,
            "p50Ms": millis(0.5),
            "p99Ms": millis(0.99),
            "cpu": self.cpu,
            "bytesPerSecond": self.bytes_per_second,
            "residentKib": self.resident,
        })
    }
}

/// Replaces so many nodes a second by new ones, and waits until the kernel has a route to each.
fn churn(server: &ApiServer, routes: &Routes, pid: u32, next: &mut u32, nodes: u32, per_second: u32) -> Run {
    let (before, received) = (cpu(pid), received(server));
    let (begun, pause) = (Instant::now(), Duration::from_secs(1) / per_second);
    let mut put = BTreeMap::new();
    while begun.elapsed() < RUN {
        let due = begun + pause * u32::try_from(put.len()).unwrap();
        thread::sleep(due.saturating_duration_since(Instant::now()));
        server.delete("nodes", "", &name(*next - nodes)).unwrap();
        let object = node_object(*next);
        put.insert(prefix(*next), Instant::now());
        server.put(object).unwrap();
        *next += 1;
    }
    let latest = routes.all_of(put.keys().cloned(), begun);
    let took = latest.duration_since(begun).as_secs_f64();
    let seen = routes.seen.lock().unwrap();
    let mut latencies: Vec<Duration> = put
        .iter()
        .map(|(prefix, put)| seen[prefix].duration_since(*put))
        .collect();
    latencies.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes per second"
    )]
    let bytes_per_second = ((self::received(server) - received) as f64 / took) as u64;
    Run {
        per_second,
        latencies,
        cpu: (cpu(pid) - before) / took,
        bytes_per_second,
        resident: resident(pid),
    }
}

/// Bytes that the server has sent so far.
fn received(server: &ApiServer) -> u64 {
    server.requests().iter().map(|request| request.bytes).sum()
}

/// When the kernel had which route, as `ip monitor` tells.
struct Routes {
    seen: Arc<Mutex<BTreeMap<String, Instant>>>,
    monitor: Child,
}

impl Routes {
    fn watch(node: &Node) -> Self {
        let mut command = Command::new("ip");
        command.args(["-4", "-o", "monitor", "route"]).stdout(Stdio::piped());
        let mut monitor = node.host.netns.spawn(&mut command).unwrap();
        let lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
        let seen: Arc<Mutex<BTreeMap<String, Instant>>> = Arc::default();
        let told = Arc::clone(&seen);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| !line.starts_with("Deleted")) {
                let destination = line.split(' ').next().unwrap_or_default().to_owned();
                told.lock().unwrap().entry(destination).or_insert_with(Instant::now);
            }
        });
        Self { seen, monitor }
    }

    /// Waits for all of these, and returns when the last came.
    fn all_of(&self, prefixes: impl Iterator<Item = String>, since: Instant) -> Instant {
        let prefixes: Vec<String> = prefixes.collect();
        loop {
            let seen = self.seen.lock().unwrap();
            let times: Option<Vec<Instant>> = prefixes.iter().map(|prefix| seen.get(prefix).copied()).collect();
            if let Some(times) = times {
                return times.into_iter().max().unwrap_or(since);
            }
            let missing = prefixes.iter().filter(|prefix| !seen.contains_key(*prefix)).count();
            drop(seen);
            assert!(
                since.elapsed() < PATIENCE,
                "{missing} of {} routes are missing",
                prefixes.len()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        drop(self.monitor.kill());
        drop(self.monitor.wait());
    }
}

/// Starts the agent of a node in the cluster.
fn start(node: &Node, cluster: &Cluster) -> Child {
    let config = format!(
        "node: {name}\nstateDir: {state}\nruntimeDir: {runtime}\nuplinks: [eth0]\nprotected: [10.0.0.0/8, \"fd00:10:244::/48\"]\n\
         encryption: {{ backend: userspace, device: {device}, keepalive: 0s }}\ngate: {{ pinDir: {pins} }}\n\
         directory: {{ kubernetes: {{ kubeconfig: {kubeconfig} }} }}\n",
        name = node.host.name,
        state = node.state().display(),
        runtime = node.runtime().display(),
        device = node.device,
        pins = node.pins.display(),
        kubeconfig = cluster.kubeconfig(node).display(),
    );
    fs::write(agent::config_file(node), config).unwrap();
    let log = File::create(node.log()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shroud"));
    command
        .args(["agent", "--config"])
        .arg(agent::config_file(node))
        .env("RUST_LOG", "warn")
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    node.host.netns.spawn(&mut command).unwrap()
}

fn name(number: u32) -> String {
    format!("worker-{number:06}.example")
}

/// A node's IPv4 pod prefix: from 10.16.0.0 on, so that none is the lab's.
fn prefix(number: u32) -> String {
    let number = number + 16 * 256;
    format!("10.{}.{}.0/24", number / 256, number % 256)
}

/// A Node as clusters have them: some 9 KB, most of it of no use to us.
fn node_object(number: u32) -> Value {
    let address = format!(
        "172.{}.{}.{}",
        20 + number / 62500,
        number / 250 % 250,
        number % 250 + 1
    );
    let mut key = [0x5a; 32];
    key[..4].copy_from_slice(&number.wrapping_mul(2_654_435_761).to_be_bytes());
    let announcement = json!({
        "version": 1, "publicKey": base64(&key), "port": 51820, "endpoints": [format!("{address}:51820")],
        "epoch": 1, "backend": "kernel", "mode": "native",
    });
    let images: Vec<Value> = (0..50)
        .map(|image| {
            let digest = format!("{:064x}", u64::from(number) * 50 + image);
            json!({ "names": [format!("example/app-{image}@sha256:{digest}"), format!("example/app-{image}:v1")], "sizeBytes": 12_345_678 })
        })
        .collect();
    // From 1000 on, for the first are the lab's.
    let v6 = format!("fd00:10:244:{:x}::/64", 0x1000 + number % 0xe000);
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name(number),
            "labels": { "kubernetes.io/hostname": name(number), "topology.kubernetes.io/zone": format!("zone-{}", number % 3) },
            "annotations": { "shroud.dev/node": announcement.to_string(), "volumes.kubernetes.io/controller-managed-attach-detach": "true" },
        },
        "spec": { "podCIDR": prefix(number), "podCIDRs": [prefix(number), v6] },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": address }, { "type": "Hostname", "address": name(number) }],
            "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status" }],
            "images": images,
        },
    })
}

fn base64(bytes: &[u8]) -> String {
    shroud_model::PublicKey::from_bytes(bytes.try_into().unwrap())
        .unwrap()
        .to_string()
}

/// Processor time of a process so far, in seconds.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

/// The memory that a process holds, in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}
