//! Thousands of peers: how long a cold start and one change take, and what memory they hold, with each WireGuard this machine has.
//!
//! A pass is what the agent does: read the device back, compare, apply. `make bench-peers` runs it; docs/bench/peers.md keeps results.
#![allow(
    clippy::unwrap_used,
    clippy::let_underscore_must_use,
    reason = "a benchmark may panic, and cleans up as well as it can"
)]
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a benchmark builds the data plane, and its output is its result"
)]

#[path = "../tests/backend/netns.rs"]
mod netns;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netns::{Netns, run};
use shroud_model::{Mark, Prefix, PrivateKey, PublicKey};
use shroud_tunnel::{Backend, Desired, Launcher, Options, Peer, Tunnel, Wanted, choose, diff};
use x25519_dalek::StaticSecret;

const PEERS: u32 = 5000;
/// How often each small thing is measured; the middle one counts.
const ROUNDS: u32 = 21;
/// What is aimed at.
const COLD: Duration = Duration::from_secs(1);
const CHANGE: Duration = Duration::from_millis(10);

fn main() {
    let wire = our_wire();
    println!(
        "{:<10} {:>9} {:>11} {:>11} {:>11} {:>9} {:>9}",
        "backend", "cold", "no change", "endpoint", "allowed IP", "agent", "wire"
    );
    for backend in [Backend::Userspace, Backend::Kernel] {
        if backend == Backend::Kernel
            && let Err(error) = choose(Wanted::Kernel)
        {
            println!("{:<10} not here: {error}", backend.to_string());
            continue;
        }
        let found = measure(backend, wire.clone());
        println!("{}", found.line(backend));
        println!("{}", found.json(backend));
    }
}

/// What one backend takes.
struct Found {
    cold: Duration,
    nothing: Duration,
    endpoint: Duration,
    allowed_ip: Duration,
    agent_kib: u64,
    wire_kib: Option<u64>,
}

impl Found {
    fn line(&self, backend: Backend) -> String {
        let wire = self.wire_kib.map_or_else(|| "-".to_owned(), mib);
        format!(
            "{:<10} {:>9} {:>11} {:>11} {:>11} {:>9} {:>9}",
            backend.to_string(),
            ms(self.cold),
            ms(self.nothing),
            ms(self.endpoint),
            ms(self.allowed_ip),
            mib(self.agent_kib),
            wire
        )
    }

    fn json(&self, backend: Backend) -> String {
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let met = self.cold <= COLD && self.endpoint <= CHANGE && self.allowed_ip <= CHANGE;
        let wire = self.wire_kib.map_or_else(|| "null".to_owned(), |kib| kib.to_string());
        format!(
            r#"{{"bench":"peers","backend":"{backend}","peers":{PEERS},"coldMs":{:.1},"noChangeMs":{:.2},"endpointMs":{:.2},"allowedIpMs":{:.2},"agentKib":{},"wireKib":{wire},"aimMet":{met}}}"#,
            millis(self.cold),
            millis(self.nothing),
            millis(self.endpoint),
            millis(self.allowed_ip),
            self.agent_kib,
        )
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}

fn measure(backend: Backend, wire: PathBuf) -> Found {
    let _netns = Netns::enter();
    let folder = tempfile::tempdir().unwrap();
    let device = format!("sb{}", std::process::id());
    let mut tunnel = Tunnel::new(Options {
        socket_dir: folder.path().to_owned(),
        runtime_dir: folder.path().join("run"),
        launcher: Launcher {
            program: wire,
            arguments: vec!["{device}".into(), "{socket_dir}".into()],
        },
    });
    let mut desired = desired(backend, &device);
    let before = resident("self");

    let cold = pass(&mut tunnel, &desired, PEERS as usize);
    let agent_kib = resident("self").saturating_sub(before);
    let wire_kib = wire_process(&device).map(|pid| resident(&pid));
    let nothing = middle(|_| pass(&mut tunnel, &desired, 0));
    let endpoint = middle(|round| {
        let peer = desired.peers.values_mut().nth(PEERS as usize / 2).unwrap();
        peer.endpoint = Some(SocketAddr::from(([127, 0, 0, 1], 3000 + round as u16)));
        pass(&mut tunnel, &desired, 1)
    });
    let moving: Prefix = "10.200.0.0/24".parse().unwrap();
    let allowed_ip = middle(|round| {
        for (number, peer) in desired.peers.values_mut().enumerate() {
            peer.allowed_ips.remove(&moving);
            if number == PEERS as usize / 3 + round as usize {
                peer.allowed_ips.insert(moving);
            }
        }
        pass(&mut tunnel, &desired, 1)
    });

    let removal = tunnel.remove(&device);
    assert!(removal.errors.is_empty(), "{:?}", removal.errors);
    Found {
        cold,
        nothing,
        endpoint,
        allowed_ip,
        agent_kib,
        wire_kib,
    }
}

/// One pass: how long it took. It must make at least as many changes as there are, and leave none.
fn pass(tunnel: &mut Tunnel, desired: &Desired, changes: usize) -> Duration {
    let began = Instant::now();
    let mut observed = tunnel.observe(&desired.device).unwrap();
    let mut wanted = diff(desired, &observed);
    for result in tunnel.apply_all(desired, &wanted) {
        result.unwrap();
    }
    let took = began.elapsed();

    match changes {
        0 => assert!(wanted.is_empty(), "{} changes", wanted.len()),
        _ => assert!(wanted.len() >= changes, "{} changes", wanted.len()),
    }
    observed = tunnel.observe(&desired.device).unwrap();
    wanted = diff(desired, &observed);
    assert!(wanted.is_empty(), "{} changes are left", wanted.len());
    took
}

fn middle(mut once: impl FnMut(u32) -> Duration) -> Duration {
    let mut times: Vec<Duration> = (0..ROUNDS).map(&mut once).collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn desired(backend: Backend, device: &str) -> Desired {
    let private = [0xa5; 32];
    let public = x25519_dalek::PublicKey::from(&StaticSecret::from(private));
    Desired {
        device: device.to_owned(),
        backend,
        private_key: Arc::new(PrivateKey::from_bytes(private)),
        public_key: PublicKey::from_bytes(public.to_bytes()).unwrap(),
        listen_port: 51820,
        mark: Mark::new(0x1000, 0x1000).unwrap(),
        peers: (0..PEERS).map(peer).collect::<BTreeMap<_, _>>(),
    }
}

/// A peer as the agent plans it: one prefix of each family, and a keepalive. Nobody answers at its endpoint.
fn peer(number: u32) -> (PublicKey, Peer) {
    let mut key = [0x5a; 32];
    // A multiplicative hash, so that keys sort in another order than they are made.
    key[..4].copy_from_slice(&number.wrapping_mul(2_654_435_761).to_be_bytes());
    let v4 = Ipv4Addr::from(0x0a00_0000 + (number << 8));
    let v6 = Ipv6Addr::from((0xfd00_0010_0244_0000_u128 + u128::from(number)) << 64);
    let allowed_ips = [format!("{v4}/24"), format!("{v6}/64")];
    let peer = Peer {
        endpoint: Some(SocketAddr::from(([127, 0, 0, 1], 10_000 + number as u16))),
        allowed_ips: allowed_ips
            .iter()
            .map(|range| range.parse().unwrap())
            .collect::<BTreeSet<_>>(),
        preshared_key: None,
        keepalive: Some(Duration::from_secs(25)),
    };
    (PublicKey::from_bytes(key).unwrap(), peer)
}

/// The data plane's program, built as the product is.
fn our_wire() -> PathBuf {
    if std::path::Path::new(env!("CARGO")).exists() {
        let words = [
            "build",
            "--release",
            "--quiet",
            "--package",
            "shroud-wire",
            "--bin",
            "shroud-wire",
        ];
        run(env!("CARGO"), &words);
    }
    let here = std::env::current_exe().unwrap();
    here.parent().unwrap().parent().unwrap().join("shroud-wire")
}

/// The process that serves the device: the one whose command line names it.
fn wire_process(device: &str) -> Option<String> {
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let pid = entry.ok()?.file_name().into_string().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let named = line
            .split(|&byte| byte == 0)
            .skip(1)
            .any(|word| word == device.as_bytes());
        named.then_some(pid)
    })
}

/// The memory that a process holds, in KiB.
fn resident(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
