//! Routes into an overlay device that take the outer header from the route.

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use shroud_routing::{Desired, Encapsulation, Error, Kernel, Route};

use super::netns::Netns;
use super::{converge, ip, node, pass, route, wait};

/// Routes into an overlay device in external mode, one for each pair of inner and outer family, and how `ip route` shows them.
const ENCAPSULATED: [(&str, &str, &str, &str, &str); 4] = [
    (
        "10.244.2.0/24",
        "10.244.2.0",
        "172.18.0.1",
        "172.18.0.2",
        "10.244.2.0/24 encap ip id 83 src 172.18.0.1 dst 172.18.0.2 ttl 64 tos 0 csum \
         via 10.244.2.0 dev vxlan0 src 10.244.1.0 onlink mtu 1390",
    ),
    (
        "10.244.3.0/24",
        "10.244.3.0",
        "fd18::1",
        "fd18::3",
        "10.244.3.0/24 encap ip6 id 83 src fd18::1 dst fd18::3 hoplimit 64 tc 0 csum \
         via 10.244.3.0 dev vxlan0 src 10.244.1.0 onlink mtu 1390",
    ),
    (
        "fd00:10:244:2::/64",
        "fd00:10:244:2::",
        "172.18.0.1",
        "172.18.0.2",
        "fd00:10:244:2::/64 encap ip id 83 src 172.18.0.1 dst 172.18.0.2 ttl 64 tos 0 csum \
         via fd00:10:244:2:: dev vxlan0 src fd00:10:244:1:: metric 1024 onlink mtu 1390",
    ),
    (
        "fd00:10:244:3::/64",
        "fd00:10:244:3::",
        "fd18::1",
        "fd18::3",
        "fd00:10:244:3::/64 encap ip6 id 83 src fd18::1 dst fd18::3 hoplimit 64 tc 0 csum \
         via fd00:10:244:3:: dev vxlan0 src fd00:10:244:1:: metric 1024 onlink mtu 1390",
    ),
];

/// [`node`] with [`ENCAPSULATED`] in the place of its routes.
fn overlaid() -> Desired {
    let encapsulated = ENCAPSULATED.map(|(destination, via, outer_source, outer_destination, _)| {
        let own = if via.contains(':') {
            "fd00:10:244:1::"
        } else {
            "10.244.1.0"
        };
        Route {
            device: "vxlan0".to_owned(),
            onlink: true,
            encapsulation: Some(Encapsulation {
                id: 83,
                source: ip(outer_source),
                destination: ip(outer_destination),
            }),
            ..route(destination, via, own, 1390)
        }
    });
    Desired {
        routes: BTreeSet::from(encapsulated),
        ..node()
    }
}

/// The usual namespace with an overlay device.
fn netns() -> Netns {
    let netns = Netns::enter();
    netns.ip("link add vxlan0 type vxlan external dstport 4789");
    netns.ip("link set vxlan0 address 02:00:00:00:00:01 up");
    netns
}

#[test]
fn routes_into_an_overlay_device_name_the_outer_header() {
    let netns = netns();
    let mut kernel = Kernel::open().unwrap();

    let changes = converge(&mut kernel, &overlaid());

    assert_eq!(
        changes[7],
        "route 10.244.2.0/24 encap ip id 83 src 172.18.0.1 dst 172.18.0.2 ttl 64 csum via 10.244.2.0 dev vxlan0 src 10.244.1.0 \
         onlink mtu 1390: added"
    );
    assert_eq!(netns.routes("proto 83"), ENCAPSULATED.map(|(.., shown)| shown));
}

#[test]
fn an_outer_header_that_drifts_is_set_right() {
    let netns = netns();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &overlaid());
    let ipv4 = "via 10.244.2.0 dev vxlan0 onlink proto 83 mtu 1390 src 10.244.1.0";
    let ipv6 = "via fd00:10:244:3:: dev vxlan0 onlink proto 83 mtu 1390 src fd00:10:244:1::";
    let drifts = [
        // Another destination, identifier, hop limit; a fragmentable one (iproute2 cannot ask for "do not fragment"); none at all.
        format!("route change 10.244.2.0/24 encap ip id 83 src 172.18.0.1 dst 172.18.0.9 ttl 64 csum {ipv4}"),
        format!("route change 10.244.2.0/24 encap ip id 84 src 172.18.0.1 dst 172.18.0.2 ttl 64 csum {ipv4}"),
        format!("route change 10.244.2.0/24 encap ip id 83 src 172.18.0.1 dst 172.18.0.2 ttl 63 csum {ipv4}"),
        format!("route change 10.244.2.0/24 encap ip id 83 src 172.18.0.1 dst 172.18.0.2 ttl 64 csum {ipv4}"),
        format!("route change 10.244.2.0/24 encap ip6 id 83 src fd18::1 dst fd18::2 hoplimit 64 csum {ipv4}"),
        format!("route change 10.244.2.0/24 {ipv4}"),
        format!("route change fd00:10:244:3::/64 encap ip6 id 83 src fd18::1 dst fd18::9 hoplimit 64 csum {ipv6}"),
        format!("route change fd00:10:244:3::/64 encap ip6 id 83 src fd18::1 dst fd18::3 hoplimit 64 {ipv6}"),
        format!("route change fd00:10:244:3::/64 encap ip6 id 83 src fd18::1 dst fd18::3 hoplimit 64 tc 4 csum {ipv6}"),
        "route del 10.244.2.0/24".to_owned(),
    ];

    for drift in drifts {
        netns.ip(&drift);
        let changes = converge(&mut kernel, &overlaid());
        assert_eq!(changes.len(), 1, "{drift}: {changes:?}");
        assert_eq!(
            netns.routes("proto 83"),
            ENCAPSULATED.map(|(.., shown)| shown),
            "{drift}"
        );
    }
}

#[test]
fn an_outer_header_of_two_families_is_refused() {
    let _netns = netns();
    let mut kernel = Kernel::open().unwrap();
    let mut route = overlaid().routes.first().unwrap().clone();
    route.encapsulation = Some(Encapsulation {
        id: 83,
        source: ip("172.18.0.1"),
        destination: ip("fd18::2"),
    });

    let (_, errors) = pass(
        &mut kernel,
        &Desired {
            routes: BTreeSet::from([route]),
            ..Desired::default()
        },
    );

    assert!(matches!(errors.as_slice(), [Error::Families { .. }]), "{errors:?}");
}

/// The packets themselves, as they leave by the uplink.
#[test]
fn packets_leave_with_the_outer_header_and_in_one_piece() {
    let netns = netns();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &overlaid());
    // Nobody answers for anybody here: the addresses are told.
    for (address, device) in [
        ("10.244.2.0", "vxlan0"),
        ("fd00:10:244:3::", "vxlan0"),
        ("172.18.0.2", "eth0"),
        ("fd18::3", "eth0"),
    ] {
        netns.ip(&format!(
            "neigh replace {address} lladdr 02:00:00:00:00:02 nud permanent dev {device}"
        ));
    }
    let wire = socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(eth::ALL),
    )
    .unwrap();

    for (inside, destination, source) in [
        ("0.0.0.0:0", "10.244.2.7:9", "172.18.0.1"),
        ("[::]:0", "[fd00:10:244:3::7]:9", "fd18::1"),
    ] {
        let socket = UdpSocket::bind(inside).unwrap();
        socket.send_to(b"from a pod", destination).unwrap();
        let mut outer = None;
        wait("the packet leaves", || {
            outer = std::iter::from_fn(|| frame(&wire))
                .filter_map(|frame| Outer::read(&frame))
                .find(|outer| outer.source == ip(source));
            outer.is_some()
        });

        let peer = if source == "fd18::1" { "fd18::3" } else { "172.18.0.2" };
        let expected = Outer {
            source: ip(source),
            destination: ip(peer),
            hops: 64,
            whole: true,
            checksum: true,
            vni: 83,
        };
        assert_eq!(outer, Some(expected), "{destination}");
    }
}

fn frame(wire: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 2048];
    let (length, _) = recv(wire, &mut buffer[..], RecvFlags::empty()).ok()?;
    buffer.truncate(length);
    Some(buffer)
}

/// What a VXLAN packet says outside.
#[derive(Debug, PartialEq, Eq)]
struct Outer {
    source: IpAddr,
    destination: IpAddr,
    hops: u8,
    /// IPv4's "do not fragment"; IPv6 routers never do.
    whole: bool,
    /// Whether there is a UDP checksum.
    checksum: bool,
    vni: u32,
}

impl Outer {
    fn read(frame: &[u8]) -> Option<Self> {
        let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
        let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
        let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
        let (protocol, source, destination, hops, whole, udp) = match kind {
            [0x08, 0x00] => (
                packet[9],
                v4(12)?,
                v4(16)?,
                packet[8],
                packet[6] == 0x40,
                packet.get(20..)?,
            ),
            [0x86, 0xdd] => (packet[6], v6(8)?, v6(24)?, packet[7], true, packet.get(40..)?),
            _ => return None,
        };
        if protocol != 17 || udp.get(2..4)? != 4789_u16.to_be_bytes() {
            return None;
        }
        Some(Self {
            source,
            destination,
            hops,
            whole,
            checksum: udp.get(6..8)? != [0, 0],
            vni: u32::from_be_bytes([0, *udp.get(12)?, *udp.get(13)?, *udp.get(14)?]),
        })
    }
}
