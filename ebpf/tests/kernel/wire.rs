//! What leaves a device, seen from the other end of the wire.
//!
//! ```text
//!   namespace "node"                                   namespace "wire"
//!   10.244.1.1 (lo), routes 10.244.2.0/24 ──> eth0 ════ peer     <── raw socket
//!                                       gate │
//!                                            └──> shroud0 (TUN) <── read by the test
//! ```

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{Mode as FileMode, OFlags};
use rustix::ioctl;
use rustix::net::sockopt::Ipv4PathMtuDiscovery;
use shroud_ebpf::{Attach, Desired, Gate, Mode, Node, NodePath, Path, Reason};
use shroud_model::NodeId;
use socket2::{Domain, Protocol, Socket, Type};

use crate::namespace::{Namespace, PinDirectory, enter, eventually, reconcile, run};
use crate::packet::{VNI, ethernet, udp, vxlan_of};
use crate::tables::{prefix, table_with};

const MARKER: &[u8] = b"cleartext-marker-7f3a";

#[test]
fn a_protected_packet_arrives_in_the_encryption_device_and_not_on_the_wire() {
    for attach in crate::every_means() {
        for pod in ["10.244.2.2", "fd00:10:244:2::2"] {
            let mut world = World::new(attach);
            world.reconcile(Mode::Enforce);

            world.send(pod);

            let packet = eventually("the packet in the TUN", || world.tun.next());
            assert!(contains(&packet), "{attach:?} {pod}: {packet:x?}");
            assert_eq!(
                packet[0] >> 4,
                if pod.contains(':') { 6 } else { 4 },
                "the Ethernet header is stripped"
            );
            world.send_unprotected();
            let seen = world.capture_until_unprotected();
            assert!(
                !seen.iter().any(|frame| contains(frame)),
                "{attach:?} {pod}: in the clear on the wire"
            );
            assert_eq!(world.counted(Reason::Encrypted), 1);
        }
    }
}

/// As when a peer takes a new key: its traffic moves to another encryption device, and that of others stays.
#[test]
fn a_peer_moves_from_one_encryption_device_to_another_and_nobody_else_does() {
    for attach in crate::every_means() {
        let mut world = World::new(attach);
        let mut second = Tun::open("shroud0-1");
        run(&["ip", "link", "set", "shroud0-1", "up"]);
        world.reconcile(Mode::Enforce);
        world.send("10.244.2.2");
        eventually("the packet in the first TUN", || world.tun.next());

        let owners = &mut world.desired.table.owners;
        owners.get_mut(&prefix("10.244.2.0/24")).unwrap().path = Path::Encrypted(Some(index("shroud0-1")));
        world.reconcile(Mode::Enforce);
        world.send("10.244.2.2");
        world.send("fd00:10:244:2::2");

        let packet = eventually("the packet in the second TUN", || second.next());
        assert_eq!(packet[0] >> 4, 4, "{attach:?}");
        let packet = eventually("the packet in the first TUN", || world.tun.next());
        assert_eq!(packet[0] >> 4, 6, "{attach:?}");
        assert!(second.next().is_err() && world.tun.next().is_err(), "{attach:?}");
        world.send_unprotected();
        let seen = world.capture_until_unprotected();
        assert!(!seen.iter().any(|frame| contains(frame)), "{attach:?}: in the clear");
    }
}

/// The twin: the same capture sees the same packet when the gate is off.
#[test]
fn with_the_gate_off_the_same_capture_sees_it() {
    for attach in crate::every_means() {
        for pod in ["10.244.2.2", "fd00:10:244:2::2"] {
            let mut world = World::new(attach);
            world.reconcile(Mode::Off);

            world.send(pod);

            world.send_unprotected();
            let seen = world.capture_until_unprotected();
            assert!(
                seen.iter().any(|frame| contains(frame)),
                "{attach:?} {pod}: not on the wire"
            );
            assert_eq!(world.counted(Reason::Off), 1);
        }
    }
}

#[test]
fn a_fenced_peer_gets_nothing_and_the_kernel_is_not_told_a_lie() {
    let mut world = World::new(Attach::Auto);
    world.reconcile(Mode::Enforce);

    world.send("10.244.3.2");

    world.send_unprotected();
    let seen = world.capture_until_unprotected();
    assert!(!seen.iter().any(|frame| contains(frame)));
    assert!(world.tun.next().is_err(), "nothing for the fenced in the TUN either");
    assert_eq!(world.counted(Reason::Fenced), 1);
}

#[test]
fn what_comes_in_from_a_protected_address_in_the_clear_reaches_nobody() {
    for (mode, arrives) in [(Mode::Enforce, false), (Mode::Off, true)] {
        let mut world = World::new(Attach::Auto);
        world.reconcile(mode);
        let listener = UdpSocket::bind("10.244.1.1:7777").unwrap();
        listener.set_nonblocking(true).unwrap();

        world.wire.enter();
        run(&["ip", "addr", "add", "10.244.2.2/32", "dev", "lo"]);
        run(&["ip", "route", "add", "10.244.1.0/24", "via", "192.0.2.1", "dev", "peer"]);
        UdpSocket::bind("10.244.2.2:0")
            .unwrap()
            .send_to(MARKER, "10.244.1.1:7777")
            .unwrap();
        world.node.enter();

        let counted = if arrives { Reason::Off } else { Reason::ClearText };
        eventually("the packet counted", || match world.counted(counted) {
            1 => Ok(()),
            other => Err(format!("{other} packets")),
        });
        let mut buffer = [0; 100];
        let received = listener.recv(&mut buffer).map_err(|error| error.kind());
        assert_eq!(
            received,
            if arrives {
                Ok(MARKER.len())
            } else {
                Err(ErrorKind::WouldBlock)
            }
        );
    }
}

/// While the table is replaced all the time, a packet finds the old or the new one, never a mixture or none: both of these encrypt.
#[test]
fn a_packet_never_sees_half_a_table() {
    let mut world = World::new(Attach::Auto);
    world.reconcile(Mode::Enforce);
    let node = world.node.name().to_owned();
    let stop = Arc::new(AtomicBool::new(false));
    let enough = Arc::clone(&stop);
    let sender = thread::spawn(move || {
        enter(&node);
        let socket = UdpSocket::bind("10.244.1.1:0").unwrap();
        let mut sent = 0;
        while !enough.load(Ordering::Relaxed) {
            sent += u64::from(socket.send_to(MARKER, "10.244.2.2:9").is_ok());
        }
        sent
    });

    for round in 0..40 {
        let owner = world.desired.table.owners[&prefix("10.244.2.0/24")];
        world.desired.table.owners.retain(|prefix, _| prefix.length() != 32);
        for last in (0..200).filter(|last| last % 2 == round % 2) {
            world
                .desired
                .table
                .owners
                .insert(prefix(&format!("10.244.2.{last}/32")), owner);
        }
        let changes = reconcile(&mut world.gate, &world.desired.clone());
        assert_eq!(changes.len(), 1, "{changes:?}");
        while world.tun.next().is_ok() {}
    }

    stop.store(true, Ordering::Relaxed);
    let sent = sender.join().unwrap();
    assert!(sent > 40, "{sent} packets while the tables went");
    assert_eq!(world.counted(Reason::Encrypted), sent);
    world.send_unprotected();
    assert!(!world.capture_until_unprotected().iter().any(|frame| contains(frame)));
}

/// The packets of the tunnel itself must not go round and round.
#[test]
fn the_tunnels_own_packets_leave() {
    let mut world = World::new(Attach::Auto);
    world.reconcile(Mode::Enforce);
    let tunnel = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    tunnel
        .bind(&"192.0.2.1:51820".parse::<std::net::SocketAddr>().unwrap().into())
        .unwrap();
    tunnel.set_mark(0x10).unwrap();

    tunnel
        .send_to(
            MARKER,
            &"192.0.2.2:51820".parse::<std::net::SocketAddr>().unwrap().into(),
        )
        .unwrap();

    world.send_unprotected();
    assert!(world.capture_until_unprotected().iter().any(|frame| contains(frame)));
    assert_eq!(world.counted(Reason::Tunnel), 1);
}

/// The overlay of the mesh goes into the tunnel; one with the same traffic and another VNI goes nowhere.
#[test]
fn an_overlay_packet_of_ours_arrives_in_the_encryption_device_and_not_on_the_wire() {
    for attach in crate::every_means() {
        for (vni, arrives) in [(VNI, true), (VNI + 1, false)] {
            let mut world = World::new(attach);
            world.reconcile(Mode::Enforce);
            let inside = ethernet(&udp("10.244.1.2", "10.244.2.2", (1, 2), MARKER));
            let vtep = UdpSocket::bind("192.0.2.1:0").unwrap();

            drop(vtep.send_to(&vxlan_of(vni, &inside), "192.0.2.2:4789"));

            world.send_unprotected();
            let seen = world.capture_until_unprotected();
            assert!(
                !seen.iter().any(|frame| contains(frame)),
                "{attach:?} {vni}: in the clear"
            );
            assert_eq!(world.tun.next().is_ok(), arrives, "{attach:?} {vni}");
            let reason = if arrives { Reason::Encrypted } else { Reason::Overlay };
            assert_eq!(world.counted(reason), 1, "{attach:?} {vni}");
        }
    }
}

/// Between nodes whose traffic is protected, only what heals them is on the wire.
#[test]
fn a_protected_node_is_reached_through_the_tunnel_but_for_its_open_ports() {
    for attach in crate::every_means() {
        let mut world = World::new(attach);
        let nodes = &mut world.desired.table.nodes;
        nodes.insert("192.0.2.1".parse().unwrap(), node(1, NodePath::LocalProtected));
        nodes.insert(
            "192.0.2.2".parse().unwrap(),
            node(2, NodePath::Encrypted(Some(world.device))),
        );
        world.reconcile(Mode::Enforce);
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();

        socket.send_to(&[MARKER, b"-closed"].concat(), "192.0.2.2:9").unwrap();
        socket.send_to(&[MARKER, b"-open"].concat(), "192.0.2.2:53").unwrap();

        let packet = eventually("the packet in the TUN", || world.tun.next());
        assert!(packet.ends_with(b"-closed"), "{attach:?}");
        assert!(world.tun.next().is_err(), "{attach:?}");
        socket.send_to(b"last-of-all", "192.0.2.2:53").unwrap();
        let seen = world.capture_until_unprotected();
        // The other end answers by ICMP that nobody listens, and quotes what it got.
        let is_udp = |frame: &Vec<u8>| frame[23] == 17;
        let marked: Vec<_> = seen.iter().filter(|frame| contains(frame) && is_udp(frame)).collect();
        assert!(
            marked.len() == 1 && marked[0].ends_with(b"-open"),
            "{attach:?}: {marked:x?}"
        );
        assert_eq!(
            (world.counted(Reason::Encrypted), world.counted(Reason::OpenPort)),
            (1, 2)
        );
    }
}

/// A peer may carry its own pods' packets, and nobody else's.
#[test]
fn out_of_the_tunnel_comes_no_overlay_packet_with_anothers_source() {
    for attach in crate::every_means() {
        for (mode, inner, arrives) in [
            (Mode::Enforce, "10.244.2.2", true),
            (Mode::Enforce, "10.244.3.2", false),
            (Mode::Enforce, "198.51.100.1", false),
            (Mode::Audit, "10.244.3.2", true),
        ] {
            let mut world = World::new(attach);
            world.desired.encryption = ["shroud0".to_owned()].into();
            world.reconcile(mode);
            for device in ["all", "shroud0"] {
                run(&["sysctl", "-qw", &format!("net.ipv4.conf.{device}.rp_filter=0")]);
            }
            let vtep = UdpSocket::bind("192.0.2.1:4789").unwrap();
            vtep.set_nonblocking(true).unwrap();
            let inside = ethernet(&udp(inner, "10.244.1.1", (1, 2), MARKER));
            let mut packet = udp("192.0.2.2", "192.0.2.1", (9, 4789), &vxlan_of(VNI, &inside));
            let checksum = !sum(&packet[..20]);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());

            world.tun.file.write_all(&packet).unwrap();

            let refused = inner != "10.244.2.2";
            let reason = if refused {
                Reason::SpoofedSource
            } else {
                Reason::Decrypted
            };
            eventually("the packet counted", || match world.counted(reason) {
                1 => Ok(()),
                other => Err(format!("{other} packets")),
            });
            let mut buffer = [0; 200];
            let received = vtep.recv(&mut buffer).map_err(|error| error.kind());
            let expected = if arrives {
                Ok(packet.len() - 28)
            } else {
                Err(ErrorKind::WouldBlock)
            };
            assert_eq!(received, expected, "{attach:?} {mode:?} {inner}");
        }
    }
}

fn node(number: u64, path: NodePath) -> Node {
    Node {
        node: NodeId(number),
        path,
    }
}

/// A router that finds it too large must say so, and not cut it up.
#[test]
fn the_tunnels_own_packets_leave_whole() {
    for attach in crate::every_means() {
        let mut world = World::new(attach);
        world.reconcile(Mode::Enforce);
        // IP_PMTUDISC_DONT: the kernel leaves the bit clear, as it does for a tunnel of its own.
        let target: std::net::SocketAddr = "192.0.2.2:51820".parse().unwrap();
        let send = |mark, payload: &[u8]| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket
                .bind(&"192.0.2.1:51820".parse::<std::net::SocketAddr>().unwrap().into())
                .unwrap();
            rustix::net::sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT).unwrap();
            socket.set_mark(mark).unwrap();
            socket.send_to(payload, &target.into()).unwrap();
        };

        send(0x10, MARKER);
        send(0, MARKER);
        send(0x10, &[MARKER, &[0; 3000]].concat());
        world.send_unprotected();

        let seen = world.capture_until_unprotected();
        let headers: Vec<(u16, u16)> = seen
            .iter()
            .filter(|frame| frame[12..14] == [8, 0] && frame[23] == 17 && frame[30..34] == [192, 0, 2, 2])
            .map(|frame| (u16::from_be_bytes([frame[20], frame[21]]), sum(&frame[14..34])))
            .collect();
        // The tunnel's; the same without its mark; one that the kernel cut in three; the last of all.
        let fields: Vec<u16> = headers.iter().map(|(field, _)| *field).collect();
        assert_eq!(fields[..2], [0x4000, 0], "{attach:?}");
        assert_eq!(fields[2..5], [0x2000, 0x2000 | 185, 370], "{attach:?}");
        assert!(
            headers.iter().all(|(_, sum)| *sum == 0xffff),
            "{attach:?}: {headers:x?}"
        );
    }
}

/// The ones' complement sum over an IPv4 header: all ones if its checksum is right (RFC 1071).
fn sum(header: &[u8]) -> u16 {
    let words = header.as_chunks::<2>().0.iter();
    let total: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (total & 0xffff) + (total >> 16);
    (folded & 0xffff) as u16 + (folded >> 16) as u16
}

struct World {
    gate: Gate,
    desired: Desired,
    tun: Tun,
    device: u32,
    capture: Socket,
    node: Namespace,
    wire: Namespace,
    _pins: PinDirectory,
}

impl World {
    fn new(attach: Attach) -> Self {
        let wire = Namespace::new();
        run(&["sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0"]);
        let node = Namespace::new();
        run(&["sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0"]);
        run(&[
            "ip",
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "peer",
            "netns",
            wire.name(),
        ]);
        for address in ["192.0.2.1/24", "2001:db8::1/64"] {
            run(&["ip", "addr", "add", address, "dev", "eth0"]);
        }
        run(&["ip", "link", "set", "eth0", "up"]);
        for address in ["10.244.1.1/32", "fd00:10:244:1::1/128"] {
            run(&["ip", "addr", "add", address, "dev", "lo"]);
        }
        // The other end exists for the capture only: nobody has to answer for a neighbour.
        run(&[
            "ip",
            "neigh",
            "add",
            "192.0.2.2",
            "lladdr",
            "02:00:00:00:00:02",
            "dev",
            "eth0",
            "nud",
            "permanent",
        ]);
        run(&[
            "ip",
            "neigh",
            "add",
            "2001:db8::2",
            "lladdr",
            "02:00:00:00:00:02",
            "dev",
            "eth0",
            "nud",
            "permanent",
        ]);
        wire.enter();
        run(&["ip", "addr", "add", "192.0.2.2/24", "dev", "peer"]);
        run(&["ip", "link", "set", "peer", "address", "02:00:00:00:00:02", "up"]);
        let every_protocol = Protocol::from(i32::from(0x0003_u16.to_be()));
        let capture = Socket::new(Domain::PACKET, Type::RAW, Some(every_protocol)).unwrap();
        capture.set_recv_buffer_size(16 << 20).unwrap();
        capture.set_nonblocking(true).unwrap();
        node.enter();
        eventually("the carrier of eth0", || {
            match run(&["ip", "-o", "link", "show", "eth0"]) {
                up if up.contains("state UP") => Ok(()),
                other => Err(other),
            }
        });
        for prefix in ["10.244.2.0/24", "10.244.3.0/24"] {
            run(&[
                "ip",
                "route",
                "add",
                prefix,
                "via",
                "192.0.2.2",
                "dev",
                "eth0",
                "src",
                "10.244.1.1",
            ]);
        }
        run(&[
            "ip",
            "route",
            "add",
            "fd00:10:244:2::/64",
            "via",
            "2001:db8::2",
            "dev",
            "eth0",
            "src",
            "fd00:10:244:1::1",
        ]);
        let tun = Tun::open("shroud0");
        run(&["ip", "link", "set", "shroud0", "up"]);

        let pins = PinDirectory::new();
        let gate = Gate::open(&pins.options(attach)).unwrap();
        let device = index("shroud0");
        let desired = Desired {
            uplinks: ["eth0".to_owned()].into(),
            pod_devices: [].into(),
            encryption: [].into(),
            table: table_with(Mode::Enforce, Some(device)),
        };
        Self {
            gate,
            desired,
            tun,
            device,
            capture,
            node,
            wire,
            _pins: pins,
        }
    }

    fn reconcile(&mut self, mode: Mode) {
        self.desired.table.mode = mode;
        reconcile(&mut self.gate, &self.desired.clone());
        assert_eq!(reconcile(&mut self.gate, &self.desired.clone()), Vec::<String>::new());
    }

    /// Sends the marker from this node's pod address to a pod.
    fn send(&self, pod: &str) {
        let source = if pod.contains(':') {
            "[fd00:10:244:1::1]:0"
        } else {
            "10.244.1.1:0"
        };
        let target = if pod.contains(':') {
            format!("[{pod}]:9")
        } else {
            format!("{pod}:9")
        };
        // A dropped packet shows as an error here, or not at all; what counts is what is seen elsewhere.
        drop(UdpSocket::bind(source).unwrap().send_to(MARKER, target));
    }

    /// Sends something that passes in any mode; whatever was sent before it is on the wire before it.
    fn send_unprotected(&self) {
        UdpSocket::bind("192.0.2.1:0")
            .unwrap()
            .send_to(b"last-of-all", "192.0.2.2:9")
            .unwrap();
    }

    fn capture_until_unprotected(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        eventually("the unprotected packet on the wire", || {
            let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
            let Ok(length) = self.capture.recv(&mut buffer) else {
                return Err(format!("{} frames", frames.len()));
            };
            let frame: Vec<u8> = buffer[..length].iter().map(|byte| initialized(*byte)).collect();
            let last = frame.windows(11).any(|window| window == b"last-of-all");
            frames.push(frame);
            if last {
                Ok(())
            } else {
                Err(format!("{} frames", frames.len()))
            }
        });
        frames
    }

    fn counted(&self, reason: Reason) -> u64 {
        let counters = self.gate.counters().unwrap();
        counters
            .iter()
            .filter(|counter| counter.reason == reason)
            .map(|counter| counter.packets)
            .sum()
    }
}

fn contains(bytes: &[u8]) -> bool {
    bytes.windows(MARKER.len()).any(|window| window == MARKER)
}

#[expect(unsafe_code, reason = "socket2 receives into uninitialised memory")]
fn initialized(byte: MaybeUninit<u8>) -> u8 {
    // SAFETY: `recv` said that it wrote this byte.
    unsafe { byte.assume_init() }
}

/// A TUN device without packet information; gone when dropped.
/// The number of a device in this thread's network namespace.
fn index(device: &str) -> u32 {
    // The question is answered for the namespace in which the socket was made.
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    rustix::net::netdevice::name_to_index(&socket, device).unwrap()
}

struct Tun {
    file: File,
}

impl Tun {
    fn open(name: &str) -> Self {
        const TUNSETIFF: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 202);
        const IFF_TUN: u16 = 1;
        const IFF_NO_PI: u16 = 0x1000;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open("/dev/net/tun", flags, FileMode::empty()).unwrap());
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
        #[expect(unsafe_code, reason = "there is no other way to make a TUN device")]
        // SAFETY: TUNSETIFF reads a `struct ifreq` of 40 bytes, which this is.
        unsafe {
            ioctl::ioctl(&file, ioctl::Setter::<TUNSETIFF, [u8; 40]>::new(request)).unwrap();
        }
        Self { file }
    }

    /// The next packet that is for a pod (the kernel sends multicast of its own).
    fn next(&mut self) -> Result<Vec<u8>, String> {
        loop {
            let mut buffer = [0; 2048];
            let length = self.file.read(&mut buffer).map_err(|error| error.to_string())?;
            if contains(&buffer[..length]) {
                return Ok(buffer[..length].to_vec());
            }
        }
    }
}
