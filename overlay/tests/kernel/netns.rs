//! Nodes, pods and a switch as network namespaces, looked into through iproute2.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// A namespace of this test alone; gone when dropped, also by a panic.
pub(crate) struct Netns {
    name: String,
}

impl Netns {
    pub(crate) fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "shr-ov-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        run("ip", &["netns", "add", &name]);
        let netns = Self { name };
        netns.ip("link set lo up");
        netns
    }

    /// Moves the calling thread, which must be one of the test's own, in here.
    pub(crate) fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Runs `ip` in here, which must succeed.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.iproute2("ip", arguments)
    }

    /// Runs `bridge` in here, which must succeed.
    pub(crate) fn bridge(&self, arguments: &str) -> String {
        self.iproute2("bridge", arguments)
    }

    /// The lines `ip` or `bridge` shows, trimmed and sorted.
    pub(crate) fn lines(&self, program: &str, arguments: &str) -> Vec<String> {
        let text = self.iproute2(program, arguments);
        let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
        lines.sort();
        lines
    }

    /// Runs `ip -j` in here and reads its answer.
    pub(crate) fn look(&self, arguments: &str) -> Value {
        let text = self.ip(&format!("-j {arguments}"));
        if text.trim().is_empty() {
            Value::Array(Vec::new())
        } else {
            serde_json::from_str(&text).unwrap()
        }
    }

    /// Whether this command succeeds in here.
    pub(crate) fn succeeds(&self, command: &str) -> bool {
        let mut words = vec!["netns", "exec", &self.name];
        words.extend(command.split(' '));
        Command::new("ip").args(words).output().unwrap().status.success()
    }

    fn iproute2(&self, program: &str, arguments: &str) -> String {
        let mut words = vec!["-n", &self.name];
        words.extend(arguments.split(' '));
        run(program, &words)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Two nodes on one switch, each with a pod.
///
/// ```text
/// pod 10.244.N.5, fd00:10:244:N::5 ── p0 ── node N: eth0 172.18.0.N, fd18::N ── switch
/// ```
pub(crate) struct Lab {
    pub(crate) nodes: [Netns; 2],
    pub(crate) pods: [Netns; 2],
    pub(crate) switch: Netns,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let switch = Netns::new();
        switch.ip("link add switch type bridge mcast_snooping 0");
        switch.ip("link set switch up");
        let make = |number| node(&switch, number);
        let [(first, first_pod), (second, second_pod)] = [make(1), make(2)];
        Self {
            nodes: [first, second],
            pods: [first_pod, second_pod],
            switch,
        }
    }

    /// The routes that `routing` will write, by hand.
    pub(crate) fn route(&self, device: &str, mtu: u32) {
        for (node, own, peer) in [(&self.nodes[0], 1, 2), (&self.nodes[1], 2, 1)] {
            node.ip(&format!(
                "route add 10.244.{peer}.0/24 via 10.244.{peer}.0 dev {device} onlink src 10.244.{own}.0 mtu {mtu}"
            ));
            node.ip(&format!(
                "route add fd00:10:244:{peer}::/64 via fd00:10:244:{peer}:: dev {device} onlink src fd00:10:244:{own}:: mtu {mtu}"
            ));
        }
    }

    /// Whether the first pod reaches the second, in both families and with more than a packet.
    pub(crate) fn pods_talk(&self) {
        for address in ["10.244.2.5", "fd00:10:244:2::5"] {
            assert!(self.pods[0].succeeds(&format!("ping -c 1 -W 2 {address}")), "{address}");
            self.transfer(address.parse().unwrap());
        }
    }

    fn transfer(&self, address: IpAddr) {
        const BYTES: usize = 1 << 20;
        let [client, server] = &self.pods;
        thread::scope(|scope| {
            let listener = scope
                .spawn(|| {
                    server.enter();
                    TcpListener::bind(SocketAddr::new(address, 7000)).unwrap()
                })
                .join()
                .unwrap();
            scope.spawn(move || {
                client.enter();
                let mut stream = TcpStream::connect(SocketAddr::new(address, 7000)).unwrap();
                stream.write_all(&vec![0x5a; BYTES]).unwrap();
            });
            let mut received = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
            assert_eq!(received.len(), BYTES);
        });
    }
}

fn node(switch: &Netns, number: u32) -> (Netns, Netns) {
    let (node, pod) = (Netns::new(), Netns::new());
    node.ip(&format!(
        "link add eth0 type veth peer name port{number} netns {}",
        switch.name
    ));
    switch.ip(&format!("link set port{number} master switch up"));
    node.ip(&format!("link add p0 type veth peer name eth0 netns {}", pod.name));
    for command in [
        "link set eth0 up".to_owned(),
        "link set p0 up".to_owned(),
        format!("addr add 172.18.0.{number}/24 dev eth0"),
        format!("addr add fd18::{number}/64 dev eth0 nodad"),
        // In the product the mesh addresses sit on the encryption device.
        format!("addr add 10.244.{number}.0/32 dev lo"),
        format!("addr add fd00:10:244:{number}::/128 dev lo nodad"),
        format!("route add 10.244.{number}.5/32 dev p0"),
        format!("route add fd00:10:244:{number}::5/128 dev p0"),
        "addr add fe80::1/64 dev p0 nodad".to_owned(),
    ] {
        node.ip(&command);
    }
    for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
        assert!(node.succeeds(&format!("sysctl -qw {setting}")), "{setting}");
    }
    for command in [
        "link set eth0 up".to_owned(),
        format!("addr add 10.244.{number}.5/32 dev eth0"),
        format!("addr add fd00:10:244:{number}::5/128 dev eth0 nodad"),
        format!("route add 10.244.{number}.0/32 dev eth0"),
        format!("route add default via 10.244.{number}.0 dev eth0"),
        "route add default via fe80::1 dev eth0".to_owned(),
    ] {
        pod.ip(&command);
    }
    (node, pod)
}

/// Every frame that crosses the switch, on any port.
pub(crate) struct Capture {
    socket: OwnedFd,
}

impl Capture {
    pub(crate) fn start(switch: &Netns) -> Self {
        let socket = thread::scope(|scope| {
            let open = scope.spawn(|| {
                switch.enter();
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(eth::ALL)).unwrap()
            });
            open.join().unwrap()
        });
        Self { socket }
    }

    /// What was captured since the last call.
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        while let Ok((length, _)) = recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
            frames.push(buffer[..length].to_vec());
        }
        frames
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {error}", arguments.join(" "));
    String::from_utf8(output.stdout).unwrap()
}
