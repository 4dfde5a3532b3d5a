//! Nodes as namespaces around a bridge, the WireGuard programs that run in them, and ways to see whether packets arrive.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::TempDir;

static COUNTER: AtomicU32 = AtomicU32::new(0);

fn unique() -> String {
    format!("{:x}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Runs a program and returns what it printed; panics with its complaint when it fails.
pub(crate) fn run(command: &str) -> String {
    try_run(command).unwrap_or_else(|complaint| panic!("{command}: {complaint}"))
}

pub(crate) fn try_run(command: &str) -> Result<String, String> {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8(output.stdout).unwrap())
}

/// Tries until it works; panics with the last failure when it does not in time.
pub(crate) fn eventually<T>(what: &str, within: Duration, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + within;
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= end => panic!("{what}: not within {within:?}, last: {last}"),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A network namespace. It goes when it is dropped.
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    fn new() -> Self {
        let name = format!("wire-{}", unique());
        run(&format!("ip netns add {name}"));
        let namespace = Self { name };
        namespace.ip("link set lo up");
        namespace
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.name))
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Does something in a thread that is in the namespace: the sockets it makes belong there.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = fs::File::open(format!("/run/netns/{}", self.name)).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        try_run(&format!("ip netns del {}", self.name)).ok();
    }
}

/// Nodes on one bridge.
pub(crate) struct Lab {
    pub(crate) nodes: Vec<Namespace>,
    _bridge: Namespace,
}

impl Lab {
    pub(crate) fn new(nodes: usize) -> Self {
        let bridge = Namespace::new();
        bridge.ip("link add bridge type bridge");
        bridge.ip("link set bridge up");
        let nodes: Vec<Namespace> = (1..=nodes)
            .map(|number| {
                let node = Namespace::new();
                bridge.ip(&format!(
                    "link add port{number} type veth peer name eth0 netns {}",
                    node.name
                ));
                bridge.ip(&format!("link set port{number} master bridge up"));
                node.ip(&format!("address add 192.0.2.{number}/24 dev eth0"));
                node.ip(&format!("address add 2001:db8::{number}/64 dev eth0 nodad"));
                node.ip("link set eth0 up");
                node
            })
            .collect();
        Self { nodes, _bridge: bridge }
    }
}

/// Which program carries the traffic of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Shroud,
    WireguardGo,
    Boringtun,
}

impl Program {
    /// The program's file, or `None`, loudly, when it is not installed. Under CI it must be.
    pub(crate) fn find(self) -> Option<PathBuf> {
        let name = match self {
            Self::Shroud => return Some(env!("CARGO_BIN_EXE_shroud-wire").into()),
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun-cli",
        };
        let tools = std::env::var_os("SHROUD_TOOLS").map(|tools| PathBuf::from(tools).join("bin"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path)
            .chain(tools)
            .map(|folder| folder.join(name))
            .find(|file| file.exists());
        if found.is_none() {
            assert!(
                std::env::var_os("CI").is_none_or(|ci| ci != "true"),
                "{name} is not installed"
            );
            // Not `eprintln!`, which the test runner keeps to itself when the test passes.
            let notice = format!("SKIPPED: {name} is not in PATH nor in $SHROUD_TOOLS/bin\n");
            std::io::stderr().write_all(notice.as_bytes()).unwrap();
        }
        found
    }
}

/// A running WireGuard program, on the node of the same number.
pub(crate) struct Wire<'a> {
    pub(crate) node: &'a Namespace,
    pub(crate) number: usize,
    pub(crate) device: String,
    pub(crate) public_key: String,
    pub(crate) port: u16,
    program: Program,
    secrets: TempDir,
    process: Option<Child>,
}

impl<'a> Wire<'a> {
    /// Starts the program on node `number` (from 1), with a new key, its inner addresses and routes.
    pub(crate) fn start(lab: &'a Lab, number: usize, program: Program) -> Self {
        let secrets = TempDir::new().unwrap();
        fs::write(secrets.path().join("private"), run("wg genkey")).unwrap();
        let mut wire = Self {
            node: &lab.nodes[number - 1],
            number,
            device: format!("w{}", unique()),
            public_key: String::new(),
            port: 51820,
            program,
            secrets,
            process: None,
        };
        wire.spawn();
        wire.configure_device();
        wire.configure_link();
        wire
    }

    /// Starts the process and waits until it answers.
    pub(crate) fn spawn(&mut self) {
        self.spawn_with_log(Stdio::inherit());
    }

    /// Starts the process with its log going somewhere; a pipe is broken at once.
    pub(crate) fn spawn_with_log(&mut self, log: Stdio) {
        let mut command = self.node.command(self.program.find().unwrap().to_str().unwrap());
        match self.program {
            Program::Shroud => command.env(
                "RUST_LOG",
                std::env::var("RUST_LOG").unwrap_or("warn,boringtun=off".to_owned()),
            ),
            Program::WireguardGo => command
                .arg("-f")
                .env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1"),
            Program::Boringtun => command.args(["-f", "--disable-drop-privileges"]),
        };
        command.arg(&self.device).stdin(Stdio::null());
        if self.program == Program::Shroud {
            command.stderr(log);
        } else {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
        let mut process = command.spawn().unwrap();
        drop(process.stderr.take());
        self.process = Some(process);
        eventually("the program answers", Duration::from_secs(10), || {
            try_run(&format!("wg show {}", self.device))
        });
    }

    /// Sets key and port, as an agent would after each start of the process.
    pub(crate) fn configure_device(&mut self) {
        let private = self.secrets.path().join("private");
        self.set(&format!("private-key {} listen-port {}", private.display(), self.port));
        // Not from `wg show`, to which boringtun does not tell its key.
        let mut derive = Command::new("wg");
        let output = derive
            .arg("pubkey")
            .stdin(fs::File::open(private).unwrap())
            .output()
            .unwrap();
        self.public_key = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    }

    fn configure_link(&self) {
        let (device, number) = (&self.device, self.number);
        self.node.ip(&format!("address add 10.{number}.0.1/32 dev {device}"));
        self.node
            .ip(&format!("address add fd00:{number}::1/128 dev {device} nodad"));
        self.node.ip(&format!("link set {device} mtu 1420 up"));
        self.node.ip(&format!("route add 10.0.0.0/8 dev {device}"));
        self.node.ip(&format!("route add fd00::/16 dev {device}"));
    }

    pub(crate) fn set(&self, arguments: &str) -> String {
        run(&format!("wg set {} {arguments}", self.device))
    }

    pub(crate) fn try_set(&self, arguments: &str) -> Result<String, String> {
        try_run(&format!("wg set {} {arguments}", self.device))
    }

    pub(crate) fn show(&self, what: &str) -> String {
        run(&format!("wg show {} {what}", self.device))
    }

    /// Makes another node a peer: who it is and what it owns, without saying where it is.
    pub(crate) fn add_peer(&self, peer: &Wire<'_>) {
        self.add_peer_with(peer, "");
    }

    /// Makes another node a peer in one step, as boringtun needs it, which dies of a second one.
    pub(crate) fn add_peer_with(&self, peer: &Wire<'_>, more: &str) {
        let (key, number) = (&peer.public_key, peer.number);
        self.set(&format!(
            "peer {key} allowed-ips 10.{number}.0.0/16,fd00:{number}::/32 {more}"
        ));
    }

    /// Says where a peer is.
    pub(crate) fn set_endpoint(&self, peer: &Wire<'_>, family: Outer) {
        self.set(&format!("peer {} endpoint {}", peer.public_key, peer.outer(family)));
    }

    /// A secret file for `wg set`.
    pub(crate) fn secret(&self, name: &str, content: &str) -> String {
        let file = self.secrets.path().join(name);
        fs::write(&file, content).unwrap();
        file.display().to_string()
    }

    pub(crate) fn outer(&self, family: Outer) -> SocketAddr {
        let address: IpAddr = match family {
            Outer::V4 => Ipv4Addr::new(192, 0, 2, self.number as u8).into(),
            Outer::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, self.number as u16).into(),
        };
        SocketAddr::new(address, self.port)
    }

    pub(crate) fn inner_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, self.number as u8, 0, 1).into()
    }

    pub(crate) fn inner_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd00, self.number as u16, 0, 0, 0, 0, 0, 1).into()
    }

    /// Ends the process at once.
    pub(crate) fn kill(&mut self, signal: Signal) -> std::process::ExitStatus {
        let mut process = self.process.take().unwrap();
        kill(Pid::from_raw(process.id() as i32), signal).unwrap();
        process.wait().unwrap()
    }

    /// Waits for the process to end by itself.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let mut process = self.process.take().unwrap();
        eventually("the process ends", Duration::from_secs(5), || {
            process.try_wait().unwrap().ok_or_else(|| "still running".to_owned())
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        format!("/var/run/wireguard/{}.sock", self.device).into()
    }

    /// Writes requests to the control socket as they are, and reads until the answers end so.
    pub(crate) fn converse(&self, request: &[u8], until: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        while !answer.ends_with(until) {
            let mut bytes = [0; 4096];
            let length = stream
                .read(&mut bytes)
                .unwrap_or_else(|error| panic!("{error} after {answer:?}"));
            assert!(length > 0, "closed after {answer:?}");
            answer.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
        }
        answer
    }

    /// When the last handshake of the only peer was completed, to the nanosecond.
    pub(crate) fn last_handshake(&self) -> String {
        let answer = self.converse(b"get=1\n\n", "\n\n");
        answer
            .lines()
            .filter(|line| line.starts_with("last_handshake"))
            .collect()
    }

    /// Sends one echo request to an inner address of another node, and waits a little for the answer.
    pub(crate) fn ping(&self, to: IpAddr) -> Result<(), String> {
        self.node.enter(|| ping(to))
    }

    /// Pings until an answer comes.
    pub(crate) fn reaches(&self, to: IpAddr) {
        self.reaches_within(to, Duration::from_secs(10));
    }

    pub(crate) fn reaches_within(&self, to: IpAddr, within: Duration) {
        eventually(&format!("node {} reaches {to}", self.number), within, || self.ping(to));
    }
}

impl Drop for Wire<'_> {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().ok();
            process.wait().ok();
        }
        fs::remove_file(self.socket()).ok();
    }
}

/// The family between the nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Outer {
    V4,
    V6,
}

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// One ICMP echo, answered by the other node's kernel.
fn ping(to: IpAddr) -> Result<(), String> {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed) as u16;
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, ECHO_REQUEST_V4, ECHO_REPLY_V4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, ECHO_REQUEST_V6, ECHO_REPLY_V6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut message = vec![request, 0, 0, 0];
    message.extend(number.to_be_bytes());
    message.extend(number.to_be_bytes());
    message.extend([0x5a; 91]);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    socket
        .send_to(&message, &SocketAddr::new(to, 0).into())
        .map_err(|error| error.to_string())?;
    let end = Instant::now() + Duration::from_millis(200);
    while Instant::now() < end {
        let mut bytes = [0; 2048];
        let length = (&socket).read(&mut bytes).map_err(|error| error.to_string())?;
        let bytes = &bytes[..length];
        let answer = if to.is_ipv4() { &bytes[20..] } else { bytes };
        if answer[0] == reply && answer[4..] == message[4..] {
            return Ok(());
        }
    }
    Err("no answer".to_owned())
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let sum: u32 = words.sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Carries `amount` bytes over TCP from one node to another and compares what arrived with what was sent.
pub(crate) fn transfer(from: &Wire<'_>, to: &Wire<'_>, address: IpAddr, amount: usize) {
    let listener = to.node.enter(|| TcpListener::bind((address, 0)).unwrap());
    let target = listener.local_addr().unwrap();
    let sent: Vec<u8> = (0..amount as u32)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            received
        });
        let mut stream = from
            .node
            .enter(|| TcpStream::connect_timeout(&target, Duration::from_secs(10)).unwrap());
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&sent).unwrap();
        drop(stream);
        assert!(receiver.join().unwrap() == sent, "what arrived is not what was sent");
    });
}
