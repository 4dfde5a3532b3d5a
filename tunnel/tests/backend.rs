//! Both backends against real data planes: our own, Debian's `wireguard-go` as the second opinion, and the kernel's where it has one.
//! `wg` is the other eye.
#![allow(
    clippy::unwrap_used,
    clippy::let_underscore_must_use,
    reason = "a test may panic, and cleans up as well as it can"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "tests look at the device through wg and ip on purpose"
)]

#[path = "backend/netns.rs"]
mod netns;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use netns::{Netns, run};
use rustix::process::{Pid, Signal, kill_process};
use shroud_model::{Mark, Prefix, PresharedKey, PrivateKey, PublicKey};
use shroud_tunnel::{Backend, Change, Desired, Error, Launcher, Observed, Options, Peer, Tunnel, Wanted, choose, diff};
use x25519_dalek::StaticSecret;

#[derive(Clone, Copy, PartialEq)]
enum DataPlane {
    Ours,
    WireguardGo,
    Kernel,
}

/// A namespace with one device that nobody serves yet.
struct Bench {
    data_plane: DataPlane,
    device: String,
    folder: tempfile::TempDir,
    options: Options,
    netns: Netns,
}

impl Bench {
    fn new(data_plane: DataPlane) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let netns = Netns::enter();
        let device = format!("st{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::tempdir().unwrap();
        let launcher = match data_plane {
            // The kernel needs no program; who starts one all the same sees it fail.
            DataPlane::Kernel => Launcher {
                program: "/bin/false".into(),
                arguments: Vec::new(),
            },
            DataPlane::Ours => Launcher {
                program: our_wire().to_owned(),
                arguments: vec!["{device}".into(), "{socket_dir}".into()],
            },
            DataPlane::WireguardGo => Launcher {
                program: "wireguard-go".into(),
                arguments: vec!["-f".into(), "{device}".into()],
            },
        };
        // `wg` and wireguard-go know no other folder for sockets.
        let options = Options {
            socket_dir: "/run/wireguard".into(),
            runtime_dir: folder.path().join("run"),
            launcher,
        };
        Self {
            data_plane,
            device,
            folder,
            options,
            netns,
        }
    }

    fn tunnel(&self) -> Tunnel {
        Tunnel::new(self.options.clone())
    }

    fn wg(&self, arguments: &str) -> String {
        let arguments = arguments.replace("{}", &self.device);
        run("wg", &arguments.split(' ').collect::<Vec<_>>())
    }

    /// The process that serves the device: the one whose command line names it.
    fn pid(&self) -> Option<Pid> {
        let mut found = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            line.split(|&byte| byte == 0)
                .skip(1)
                .any(|word| word == self.device.as_bytes())
                .then_some(pid)
        });
        found.next().and_then(Pid::from_raw)
    }

    fn desired(&self, peers: BTreeMap<PublicKey, Peer>) -> Desired {
        let (private_key, public_key) = key_pair(PRIVATE);
        Desired {
            device: self.device.clone(),
            backend: match self.data_plane {
                DataPlane::Ours | DataPlane::WireguardGo => Backend::Userspace,
                DataPlane::Kernel => Backend::Kernel,
            },
            private_key: Arc::new(private_key),
            public_key,
            listen_port: 51820,
            mark: Mark::new(0x10, 0x30).unwrap(),
            peers,
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = fs::remove_file(format!("/run/wireguard/{}.sock", self.device));
    }
}

/// This node's private key, and a secret shared with a peer: recognisable wherever they might turn up.
const PRIVATE: [u8; 32] = [0xa5; 32];
const SECRET: [u8; 32] = [0xb6; 32];

fn key_pair(private: [u8; 32]) -> (PrivateKey, PublicKey) {
    let public = x25519_dalek::PublicKey::from(&StaticSecret::from(private));
    (
        PrivateKey::from_bytes(private),
        PublicKey::from_bytes(public.to_bytes()).unwrap(),
    )
}

fn key(number: u8) -> PublicKey {
    key_pair([number; 32]).1
}

fn peer(endpoint: &str, allowed_ips: &[&str]) -> Peer {
    Peer {
        endpoint: Some(endpoint.parse().unwrap()),
        allowed_ips: ranges(allowed_ips),
        preshared_key: None,
        keepalive: Some(Duration::from_secs(25)),
    }
}

fn ranges(texts: &[&str]) -> BTreeSet<Prefix> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn two_peers() -> BTreeMap<PublicKey, Peer> {
    let secret = Some(Arc::new(PresharedKey::from_bytes(SECRET)));
    BTreeMap::from([
        (
            key(2),
            peer(
                "127.0.0.1:4002",
                &["10.244.2.0/24", "10.244.20.0/24", "fd00:10:244:2::/64"],
            ),
        ),
        (
            key(3),
            Peer {
                preshared_key: secret,
                ..peer("[::1]:4003", &["10.244.3.0/24"])
            },
        ),
    ])
}

/// Our data plane's program, built if need be. Where there is no cargo, as in a guest of `tests/vm`, it came along.
fn our_wire() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if Path::new(env!("CARGO")).exists() {
            run(
                env!("CARGO"),
                &["build", "--quiet", "--package", "shroud-wire", "--bin", "shroud-wire"],
            );
        }
        let here = std::env::current_exe().unwrap();
        here.parent().unwrap().parent().unwrap().join("shroud-wire")
    })
}

fn pass(tunnel: &mut Tunnel, desired: &Desired) -> Vec<String> {
    let observed = tunnel.observe(&desired.device).unwrap();
    let changes = diff(desired, &observed);
    for (change, result) in changes.iter().zip(tunnel.apply_all(desired, &changes)) {
        result.unwrap_or_else(|error| panic!("{change}: {error}"));
    }
    changes.iter().map(Change::to_string).collect()
}

/// A pass after which nothing is left to do.
fn converge(tunnel: &mut Tunnel, desired: &Desired) -> Vec<String> {
    let changes = pass(tunnel, desired);
    assert_eq!(
        pass(tunnel, desired),
        [] as [String; 0],
        "the second pass, after {changes:?}"
    );
    changes
}

/// Makes one test for each data plane out of a function; those that are about a process are not for the kernel.
macro_rules! with_each {
    (device { $($name:ident),* $(,)? } process { $($of_process:ident),* $(,)? }) => {
        mod ours { $(#[test] fn $name() { super::$name(super::DataPlane::Ours) })* $(#[test] fn $of_process() { super::$of_process(super::DataPlane::Ours) })* }
        mod wireguard_go { $(#[test] fn $name() { super::$name(super::DataPlane::WireguardGo) })* $(#[test] fn $of_process() { super::$of_process(super::DataPlane::WireguardGo) })* }
        mod kernel { $(#[test] fn $name() { if super::kernel_has_wireguard() { super::$name(super::DataPlane::Kernel) } })* }
    };
}

with_each! {
    device {
        what_is_desired_is_what_wg_shows,
        drift_is_repaired,
        one_range_can_be_taken_and_the_others_stay,
        a_range_that_moves_always_has_an_owner,
        one_bad_peer_costs_nobody_else_anything,
        what_is_removed_is_gone,
        no_secret_is_ever_printed,
    }
    process {
        the_data_plane_outlives_us_and_is_found_again,
        a_killed_data_plane_is_started_again,
        a_data_plane_whose_device_was_deleted_is_started_again,
        a_data_plane_that_hangs_is_ended_and_started_again,
    }
}

/// Whether this kernel has WireGuard; says so if not. Those that have it run these tests through `make test-vm`.
fn kernel_has_wireguard() -> bool {
    match choose(Wanted::Kernel) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            false
        }
    }
}

fn what_is_desired_is_what_wg_shows(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let mut tunnel = bench.tunnel();
    let desired = bench.desired(two_peers());

    let changes = converge(&mut tunnel, &desired);

    assert_eq!(changes.len(), 6, "{changes:?}");
    assert_eq!(bench.wg("show {} fwmark"), "0x10\n");
    assert_eq!(bench.wg("show {} listen-port"), "51820\n");
    assert_eq!(bench.wg("show {} public-key"), format!("{}\n", desired.public_key));
    let lines = |what: &str| -> BTreeSet<String> {
        let sorted = |line: &str| {
            let mut words: Vec<&str> = line.split_whitespace().collect();
            words[1..].sort_unstable();
            words.join(" ")
        };
        bench.wg(&format!("show {{}} {what}")).lines().map(sorted).collect()
    };
    let (two, three) = (key(2), key(3));
    assert_eq!(
        lines("allowed-ips"),
        BTreeSet::from([
            format!("{two} 10.244.2.0/24 10.244.20.0/24 fd00:10:244:2::/64"),
            format!("{three} 10.244.3.0/24")
        ])
    );
    assert_eq!(
        lines("endpoints"),
        BTreeSet::from([format!("{two} 127.0.0.1:4002"), format!("{three} [::1]:4003")])
    );
    assert_eq!(
        lines("persistent-keepalive"),
        BTreeSet::from([format!("{two} 25"), format!("{three} 25")])
    );
    // base64 of 32 bytes 0xb6.
    let secret = "tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2trY=";
    assert_eq!(
        lines("preshared-keys"),
        BTreeSet::from([format!("{two} (none)"), format!("{three} {secret}")])
    );
}

fn drift_is_repaired(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let mut tunnel = bench.tunnel();
    let desired = bench.desired(two_peers());
    converge(&mut tunnel, &desired);
    let shown = || {
        let mut lines: Vec<String> = bench.wg("show {} dump").lines().map(str::to_owned).collect();
        for line in &mut lines[1..] {
            // Bytes and handshakes are no configuration; the order of ranges is nobody's.
            let mut words: Vec<&str> = line.split('\t').collect();
            let mut ranges: Vec<&str> = words[3].split(',').collect();
            ranges.sort_unstable();
            let ranges = ranges.join(",");
            words[3] = &ranges;
            *line = [words[0], words[1], words[2], words[3], words[7]].join(" ");
        }
        lines.sort_unstable();
        lines
    };
    let before = shown();
    let other = bench.folder.path().join("other.key");
    fs::write(&other, "tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2trY=\n").unwrap();
    let (two, three, nine) = (key(2), key(3), key(9));

    for (drift, repair) in [
        (format!("set {{}} peer {two} remove"), "added, endpoint"),
        (format!("set {{}} peer {nine} allowed-ips 10.9.0.0/16"), "removed"),
        (
            format!("set {{}} peer {nine} allowed-ips 10.244.2.0/24"),
            "allowed IPs 10.244.2.0/24 added",
        ),
        (
            format!("set {{}} peer {two} allowed-ips 10.244.2.0/24,10.99.0.0/16"),
            "allowed IPs 10.99.0.0/16 removed",
        ),
        (
            format!("set {{}} peer {three} allowed-ips 10.244.2.0/24"),
            "allowed IPs 10.244.3.0/24 added",
        ),
        (
            format!("set {{}} peer {two} persistent-keepalive off"),
            "keepalive none -> 25 s",
        ),
        (
            format!("set {{}} peer {two} endpoint 127.0.0.1:9"),
            "endpoint 127.0.0.1:9 -> 127.0.0.1:4002",
        ),
        (
            format!("set {{}} peer {two} preshared-key {}", other.display()),
            "preshared key set -> none",
        ),
        (
            format!("set {{}} peer {three} preshared-key /dev/null"),
            "preshared key none -> set",
        ),
        ("set {} fwmark 0x77".to_owned(), "mark 0x77 -> 0x10"),
        ("set {} listen-port 51999".to_owned(), "listen port 51999 -> 51820"),
        (format!("set {{}} private-key {}", other.display()), "key "),
    ] {
        bench.wg(&drift);
        assert_ne!(shown(), before, "{drift}: this drift is none");
        let changes = converge(&mut tunnel, &desired);
        assert!(
            changes.iter().any(|change| change.contains(repair)),
            "{drift}: {changes:?}"
        );
        assert_eq!(shown(), before, "{drift}");
    }
}

fn one_range_can_be_taken_and_the_others_stay(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let mut tunnel = bench.tunnel();
    converge(&mut tunnel, &bench.desired(two_peers()));
    let mut peers = two_peers();
    peers
        .get_mut(&key(2))
        .unwrap()
        .allowed_ips
        .remove(&"10.244.20.0/24".parse().unwrap());

    let changes = converge(&mut tunnel, &bench.desired(peers));

    assert_eq!(
        changes,
        [format!(
            "peer {}: allowed IPs 10.244.20.0/24 removed",
            key(2).fingerprint()
        )]
    );
    let shown = bench.wg("show {} allowed-ips");
    assert!(
        shown.contains("10.244.2.0/24") && !shown.contains("10.244.20.0/24"),
        "{shown}"
    );
    assert_eq!(bench.wg("show {} peers").lines().count(), 2, "nobody stayed behind");
}

fn a_range_that_moves_always_has_an_owner(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let mut tunnel = bench.tunnel();
    let range: Prefix = "10.244.2.0/24".parse().unwrap();
    let at = |owner: u8| {
        let holds = |number| if number == owner { vec!["10.244.2.0/24"] } else { vec![] };
        let peer_of = |number: u8| (key(number), peer(&format!("127.0.0.1:400{number}"), &holds(number)));
        bench.desired(BTreeMap::from([peer_of(2), peer_of(3)]))
    };
    converge(&mut tunnel, &at(2));
    let (stop, moves) = (AtomicBool::new(false), 40);

    let owners = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            bench.netns.join();
            let mut tunnel = bench.tunnel();
            let mut owners: Vec<Vec<PublicKey>> = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let device = tunnel.observe(&bench.device).unwrap().device.unwrap();
                owners.push(
                    device
                        .peers
                        .iter()
                        .filter(|(_, peer)| peer.allowed_ips.contains(&range))
                        .map(|(key, _)| *key)
                        .collect(),
                );
            }
            owners
        });
        for number in 0..moves {
            assert_eq!(converge(&mut tunnel, &at(3 - number % 2)).len(), 1);
        }
        stop.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });

    assert!(owners.iter().all(|owners| owners.len() == 1), "{owners:?}");
    assert_eq!(
        owners.iter().flatten().collect::<BTreeSet<_>>().len(),
        2,
        "the watcher saw both in {} looks",
        owners.len()
    );
}

fn one_bad_peer_costs_nobody_else_anything(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let mut tunnel = bench.tunnel();
    let mut peers: BTreeMap<_, _> = (2..152)
        .map(|number| (key(number), peer("127.0.0.1:4002", &[&format!("10.244.{number}.0/24")])))
        .collect();
    peers.get_mut(&key(77)).unwrap().preshared_key = Some(Arc::new(PresharedKey::from_bytes([0; 32])));
    let desired = bench.desired(peers);
    let changes = diff(&desired, &tunnel.observe(&bench.device).unwrap());

    let results = tunnel.apply_all(&desired, &changes);

    let failed: Vec<String> = results
        .iter()
        .zip(&changes)
        .filter_map(|(result, change)| result.as_ref().err().map(|error| format!("{change}: {error}")))
        .collect();
    assert_eq!((results.len(), failed.len()), (changes.len(), 1), "{failed:?}");
    assert!(failed[0].contains(&key(77).fingerprint()), "{failed:?}");
    assert_eq!(bench.wg("show {} peers").lines().count(), 149);
}

fn the_data_plane_outlives_us_and_is_found_again(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let desired = bench.desired(two_peers());
    let mut tunnel = bench.tunnel();
    converge(&mut tunnel, &desired);
    let pid = bench.pid().unwrap();
    drop(tunnel);

    let mut again = bench.tunnel();

    assert_eq!(pass(&mut again, &desired), [] as [String; 0]);
    assert_eq!(bench.pid(), Some(pid));
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap();
    let group = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(2)
        .unwrap()
        .to_owned();
    assert_eq!(group, pid.as_raw_pid().to_string(), "a process group of its own");
    assert_eq!(
        fs::read_link(format!("/proc/{}/cwd", pid.as_raw_pid())).unwrap(),
        Path::new("/")
    );
    assert_eq!(
        fs::read_link(format!("/proc/{}/fd/0", pid.as_raw_pid())).unwrap(),
        Path::new("/dev/null")
    );
}

fn a_killed_data_plane_is_started_again(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let desired = bench.desired(two_peers());
    let mut tunnel = bench.tunnel();
    converge(&mut tunnel, &desired);
    let pid = bench.pid().unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    wait("nobody answers, and no zombie stays", || {
        let device = tunnel.observe(&bench.device).unwrap().device;
        device.is_none() && !Path::new(&format!("/proc/{}", pid.as_raw_pid())).exists()
    });

    let changes = converge(&mut tunnel, &desired);

    assert_eq!(changes[0], "userspace device: created");
    assert_ne!(bench.pid().unwrap(), pid);
}

fn a_data_plane_whose_device_was_deleted_is_started_again(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let desired = bench.desired(two_peers());
    let mut tunnel = bench.tunnel();
    converge(&mut tunnel, &desired);
    bench.netns.ip(&format!("link del {}", bench.device));

    let changes = converge(&mut tunnel, &desired);

    assert_eq!(changes[0], "userspace device: created");
    bench.netns.ip(&format!("link show {}", bench.device));
}

fn a_data_plane_that_hangs_is_ended_and_started_again(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let desired = bench.desired(two_peers());
    let mut tunnel = bench.tunnel();
    converge(&mut tunnel, &desired);
    let pid = bench.pid().unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    wait("every thread has stopped", || {
        let threads = fs::read_dir(format!("/proc/{}/task", pid.as_raw_pid())).unwrap();
        let stat = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("stat")).unwrap();
        threads
            .map(|thread| stat(thread.unwrap()))
            .all(|stat| stat.rsplit(')').next().unwrap().starts_with(" T"))
    });

    for _ in 0..2 {
        let error = tunnel.observe(&bench.device).unwrap_err();
        assert!(matches!(error, Error::NotAnswering { .. }), "{error}");
    }
    let changes = converge(&mut tunnel, &desired);

    assert_eq!(changes[0], "userspace device: created");
    assert_ne!(bench.pid().unwrap(), pid);
}

fn what_is_removed_is_gone(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let mut tunnel = bench.tunnel();
    converge(&mut tunnel, &bench.desired(two_peers()));

    let removal = tunnel.remove(&bench.device);

    assert!(removal.errors.is_empty(), "{:?}", removal.errors);
    let what = match data_plane {
        DataPlane::Ours | DataPlane::WireguardGo => "data plane of",
        DataPlane::Kernel => "kernel device",
    };
    assert_eq!(removal.removed, [format!("{what} {}", bench.device)]);
    assert_eq!(bench.pid(), None);
    assert!(!Path::new(&format!("/run/wireguard/{}.sock", bench.device)).exists());
    assert_eq!(tunnel.remove(&bench.device).removed, [] as [String; 0]);
}

fn no_secret_is_ever_printed(data_plane: DataPlane) {
    let bench = Bench::new(data_plane);
    let desired = bench.desired(two_peers());
    let mut tunnel = bench.tunnel();
    let mut said = format!("{desired:?}");
    let mut say = |text: String| said.push_str(&text);
    let observed = tunnel.observe(&bench.device).unwrap();
    for change in diff(&desired, &observed) {
        say(format!("{change} {change:?}"));
        tunnel.apply(&desired, &change).unwrap();
    }
    let observed: Observed = tunnel.observe(&bench.device).unwrap();
    say(format!("{observed:?}"));
    // Every change once more, to a device that is gone: errors from the middle of each.
    let changes = diff(
        &desired,
        &Observed {
            at: observed.at,
            device: None,
        },
    );
    let _ = tunnel.remove(&bench.device);
    for change in changes.iter().skip(1) {
        let error = tunnel.apply(&desired, change).unwrap_err();
        say(format!("{error} {error:?}"));
    }
    let wrong = Desired {
        public_key: key(9),
        ..desired.clone()
    };
    let error = tunnel
        .apply(&wrong, &Change::SetPrivateKey { old: None, new: key(9) })
        .unwrap_err();
    assert!(matches!(error, Error::KeyMismatch { .. }), "{error}");
    say(format!("{error} {error:?}"));
    if data_plane != DataPlane::Kernel {
        say(fs::read_to_string(bench.options.runtime_dir.join(format!("{}.wire.log", bench.device))).unwrap());
    }

    for secret in [PRIVATE, SECRET] {
        for text in [hex(&secret), base64(&secret), format!("{secret:?}")] {
            let middle = &text[8..text.len() - 8];
            assert!(!said.contains(middle), "{middle} in {said}");
        }
    }
    // The same eye sees what is printed.
    assert!(said.contains(&key(3).to_string()));
}

#[test]
fn a_process_that_is_not_provably_ours_is_never_ended() {
    let bench = Bench::new(DataPlane::WireguardGo);
    let other = Command::new("wireguard-go")
        .args(["--foreground", &bench.device])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut other = Running(other.unwrap());
    let mut tunnel = bench.tunnel();
    wait("it answers", || tunnel.observe(&bench.device).unwrap().device.is_some());

    let removal = tunnel.remove(&bench.device);

    assert_eq!(
        removal.errors.iter().map(Error::to_string).collect::<Vec<_>>(),
        [format!(
            "end the data plane of {}: process {} holds its socket, but its command line is not the one we start it with; end it yourself",
            bench.device,
            other.0.id()
        )]
    );
    assert!(other.0.try_wait().unwrap().is_none());
    assert!(tunnel.observe(&bench.device).unwrap().device.is_some());
}

#[test]
fn a_data_plane_without_its_device_is_no_device() {
    let mut bench = Bench::new(DataPlane::Ours);
    bench.options.socket_dir = bench.folder.path().to_owned();
    let listener = UnixListener::bind(bench.folder.path().join(format!("{}.sock", bench.device))).unwrap();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(stream.read(&mut [0; 64]).unwrap(), "get=1\n\n".len());
            stream.write_all(b"listen_port=7\nerrno=0\n\n").unwrap();
        }
    });
    let mut tunnel = bench.tunnel();

    assert!(tunnel.observe(&bench.device).unwrap().device.is_none());
    bench.netns.ip(&format!("tuntap add {} mode tun", bench.device));
    assert_eq!(tunnel.observe(&bench.device).unwrap().device.unwrap().listen_port, 7);
    server.join().unwrap();
}

#[test]
fn a_program_that_cannot_serve_is_an_error_that_names_its_log() {
    let mut bench = Bench::new(DataPlane::Ours);
    let error = |bench: &Bench| {
        let change = Change::CreateDevice {
            backend: Backend::Userspace,
        };
        bench
            .tunnel()
            .apply(&bench.desired(BTreeMap::new()), &change)
            .unwrap_err()
            .to_string()
    };
    let log = bench
        .options
        .runtime_dir
        .join(format!("{}.wire.log", bench.device))
        .display()
        .to_string();

    bench.options.launcher = Launcher {
        program: "/nowhere/wire".into(),
        arguments: vec![],
    };
    assert_eq!(
        error(&bench),
        "start /nowhere/wire: No such file or directory (os error 2)"
    );
    bench.options.launcher = Launcher {
        program: "sh".into(),
        arguments: vec!["-c".into(), "echo no luck; exit 3".into()],
    };
    assert_eq!(
        error(&bench),
        format!("start sh: it ended at once (exit status: 3); its log {log} says why")
    );
    assert_eq!(fs::read_to_string(&log).unwrap(), "no luck\n");
    fs::write(&log, vec![b'x'; (1 << 20) + 1]).unwrap();
    error(&bench);
    assert_eq!(
        fs::read_to_string(&log).unwrap(),
        "no luck\n",
        "a large log is put aside"
    );
    assert_eq!(fs::metadata(format!("{log}.old")).unwrap().len(), (1 << 20) + 1);
}

#[test]
fn a_name_that_is_none_is_refused() {
    let bench = Bench::new(DataPlane::Ours);
    for name in ["", ".", "..", "../x", "a b", "sixteen-letters-", "wg\n0"] {
        let error = bench.tunnel().observe(name).unwrap_err();
        assert!(matches!(error, Error::InvalidName(_)), "{name:?}: {error}");
    }
}

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A key as `wg` prints it.
fn base64(bytes: &[u8; 32]) -> String {
    PublicKey::from_bytes(*bytes).unwrap().to_string()
}

/// Waits until something is so.
fn wait(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < Duration::from_secs(5), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
