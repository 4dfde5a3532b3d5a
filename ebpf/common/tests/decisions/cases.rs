//! The packets on which the gate is judged, and what must happen to each.
//!
//! Node 1 is this node. Node 2 has a key, node 3 has none, node 5 is one to which nothing is to be encrypted. Pod 10.244.1.7 of this node is
//! exempt. Pod 10.244.1.8 of this node and pod 10.244.2.8 of node 2 have opted out.
//!
//! ```text
//!   node 1 (here)  10.244.1.0/24  fd00:10:244:1::/64   local
//!   node 2         10.244.2.0/24  fd00:10:244:2::/64   encrypted
//!   node 3         10.244.3.0/24  fd00:10:244:3::/64   fenced
//!   node 5         10.244.5.0/24  fd00:10:244:5::/64   plain
//!   nobody         10.244.9.0/24  fd00:10:244:9::/64
//! ```
//!
//! Each node has addresses of its own twice: 192.0.2.N and 2001:db8::N are known and not protected, 203.0.113.N and 2001:db8:1::N are
//! protected. Node 2's pods are encrypted, so are its protected addresses but for 203.0.113.22; that one and
//! node 3's are fenced. Port 6443 of TCP and 53 of UDP stay open.

use shroud_gate::Direction::{self, Decrypted as Out, Egress, Ingress};
use shroud_gate::Reason;

use crate::packet::{
    VNI, echo, ethernet, frame, geneve, geneve_of, icmpv6, ip, udp, udp_datagram, vlan, vxlan, vxlan_of,
};

/// The tunnel's port in every case.
pub(crate) const LISTEN_PORT: u16 = 51820;
/// The port of the tunnel's second encryption device in every case.
pub(crate) const OTHER_LISTEN_PORT: u16 = 51822;
/// The encryption device's index in every case.
pub(crate) const DEVICE: u32 = 7;
/// The tunnel mark's bits in mask [`MASK`].
pub(crate) const TUNNEL: u32 = 0x10;
/// The plain mark's bits in mask [`MASK`].
pub(crate) const PLAIN: u32 = 0x20;
/// The bits of both marks.
pub(crate) const MASK: u32 = 0x30;

/// What must happen in enforce mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It goes on.
    Pass(Reason),
    /// It goes into the encryption device.
    Redirect,
    /// It ends.
    Drop(Reason),
}

/// One packet.
pub(crate) struct Case {
    /// What it is about.
    pub(crate) name: &'static str,
    /// Which way it passes the uplink.
    pub(crate) direction: Direction,
    /// Its mark.
    pub(crate) mark: u32,
    /// Its bytes, from the Ethernet header on.
    pub(crate) frame: Vec<u8>,
    /// What must happen in enforce mode.
    pub(crate) fate: Fate,
    /// Under which node it is counted.
    pub(crate) node: u64,
}

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    use Fate::{Drop, Pass, Redirect};
    use Reason::{
        ClearText, Decrypted, Fenced, Local, Malformed, NotIp, OpenPort, Overlay, Plain, SpoofedSource, Tunnel,
        UnknownNode, Unprotected,
    };

    let case = |name, direction, mark, frame, fate, node| Case {
        name,
        direction,
        mark,
        frame,
        fate,
        node,
    };
    let out = |name, packet: Vec<u8>, fate, node| case(name, Egress, 0, ethernet(&packet), fate, node);
    let into = |name, packet: Vec<u8>, fate, node| case(name, Ingress, 0, ethernet(&packet), fate, node);
    let marked = |name, mark, packet: Vec<u8>, fate, node| case(name, Egress, mark, ethernet(&packet), fate, node);

    let to_peer = || echo("10.244.1.2", "10.244.2.2");
    let to_peer6 = || echo("fd00:10:244:1::2", "fd00:10:244:2::2");
    let overlay = |ports: (u16, u16), payload: Vec<u8>| udp("192.0.2.1", "192.0.2.2", ports, &payload);
    let cut = |mut packet: Vec<u8>, by: usize| {
        packet.truncate(packet.len() - by);
        packet
    };
    let with_options = |packet: Vec<u8>| {
        let mut longer = packet[..20].to_vec();
        longer[0] = 0x47;
        longer.extend([1; 8]);
        longer.extend(&packet[20..]);
        longer
    };
    let fragment = |mut packet: Vec<u8>, offset: u16| {
        packet[6..8].copy_from_slice(&(0x2000 | offset).to_be_bytes());
        packet
    };
    let extensions = |count: usize, payload: &[u8]| {
        let mut chain = Vec::new();
        for left in (0..count).rev() {
            chain.extend([if left == 0 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        chain.extend(payload);
        ip("2001:db8::1", "2001:db8::2", 60, &chain)
    };
    let decrypted = |name, packet: Vec<u8>, fate, node| case(name, Out, 0, ethernet(&packet), fate, node);
    let peer_to = || echo("10.244.2.2", "10.244.1.2");
    let from_peer = |payload: Vec<u8>| udp("192.0.2.2", "192.0.2.1", (1, 4789), &payload);
    let between_protected = |ports: (u16, u16), payload: Vec<u8>| udp("203.0.113.1", "203.0.113.2", ports, &payload);
    let tcp = |source, destination, (from, to): (u16, u16)| {
        let ports = [from.to_be_bytes(), to.to_be_bytes()].concat();
        ip(source, destination, 6, &[&ports[..], &[0; 16]].concat())
    };
    // The addresses of an IPv6 packet, the other way round.
    let swapped = |mut packet: Vec<u8>| {
        packet[8..40].rotate_left(16);
        packet
    };
    let vxlan_to_peer = || udp_datagram((40000, 4789), &vxlan(&ethernet(&to_peer())));

    vec![
        out("pod to pod of a peer", to_peer(), Redirect, 2),
        out("pod to pod of a peer, IPv6", to_peer6(), Redirect, 2),
        out("with IPv4 options", with_options(to_peer()), Redirect, 2),
        out("a later fragment", fragment(to_peer(), 100), Redirect, 2),
        case(
            "one VLAN tag",
            Egress,
            0,
            vlan(0x8100, &ethernet(&to_peer())),
            Redirect,
            2,
        ),
        case(
            "two VLAN tags",
            Egress,
            0,
            vlan(0x88a8, &vlan(0x8100, &ethernet(&to_peer6()))),
            Redirect,
            2,
        ),
        out(
            "to a node without a key",
            echo("10.244.1.2", "10.244.3.2"),
            Drop(Fenced),
            3,
        ),
        out(
            "to a node without a key, IPv6",
            echo("fd00:10:244:1::2", "fd00:10:244:3::2"),
            Drop(Fenced),
            3,
        ),
        out(
            "to a range nobody owns",
            echo("10.244.1.2", "10.244.9.2"),
            Drop(UnknownNode),
            0,
        ),
        out(
            "to a range nobody owns, IPv6",
            echo("fd00:10:244:1::2", "fd00:10:244:9::2"),
            Drop(UnknownNode),
            0,
        ),
        out(
            "to an own pod that is gone",
            echo("10.244.2.2", "10.244.1.99"),
            Drop(Local),
            1,
        ),
        out(
            "to an own pod that is gone, IPv6",
            echo("fd00:10:244:2::2", "fd00:10:244:1::99"),
            Drop(Local),
            1,
        ),
        out(
            "pod to the internet",
            echo("10.244.1.2", "198.51.100.1"),
            Pass(Unprotected),
            0,
        ),
        out(
            "pod to the internet, IPv6",
            echo("fd00:10:244:1::2", "2001:db8::1"),
            Pass(Unprotected),
            0,
        ),
        out(
            "node to node",
            udp("192.0.2.1", "192.0.2.2", (1, 2), b"x"),
            Pass(Unprotected),
            0,
        ),
        case("ARP", Egress, 0, frame(0x0806, &[0; 28]), Pass(NotIp), 0),
        case(
            "three VLAN tags",
            Egress,
            0,
            vlan(0x8100, &vlan(0x8100, &vlan(0x8100, &ethernet(&to_peer())))),
            Pass(NotIp),
            0,
        ),
        // The tunnel's own packets.
        marked(
            "tunnel",
            TUNNEL,
            udp("192.0.2.1", "192.0.2.2", (LISTEN_PORT, 51820), b"x"),
            Pass(Tunnel),
            0,
        ),
        marked(
            "tunnel, IPv6",
            TUNNEL,
            udp("2001:db8::1", "2001:db8::2", (LISTEN_PORT, 9), b"x"),
            Pass(Tunnel),
            0,
        ),
        marked(
            "tunnel mark with foreign bits",
            0x4000 | TUNNEL,
            udp("192.0.2.1", "192.0.2.2", (LISTEN_PORT, 9), b"x"),
            Pass(Tunnel),
            0,
        ),
        marked(
            "the tunnel's second device",
            TUNNEL,
            udp("192.0.2.1", "192.0.2.2", (OTHER_LISTEN_PORT, 9), b"x"),
            Pass(Tunnel),
            0,
        ),
        marked(
            "tunnel mark, no port",
            TUNNEL,
            udp("203.0.113.1", "203.0.113.2", (0, LISTEN_PORT), b"x"),
            Redirect,
            2,
        ),
        marked(
            "tunnel mark, other port",
            TUNNEL,
            udp("192.0.2.1", "192.0.2.2", (9, LISTEN_PORT), b"x"),
            Pass(Unprotected),
            0,
        ),
        marked("tunnel mark on a pod's packet", TUNNEL, to_peer(), Redirect, 2),
        marked(
            "tunnel mark and port to a pod",
            TUNNEL,
            udp("10.244.1.2", "10.244.3.2", (LISTEN_PORT, 9), b"x"),
            Drop(Fenced),
            3,
        ),
        // Exempt by configuration: the mark alone is not enough, nor the address alone.
        marked(
            "plain mark, source exempt",
            PLAIN,
            echo("10.244.1.7", "10.244.2.2"),
            Pass(Plain),
            2,
        ),
        marked(
            "plain mark, destination exempt",
            PLAIN,
            echo("10.244.2.2", "10.244.1.7"),
            Pass(Plain),
            1,
        ),
        marked("plain mark, nobody exempt", PLAIN, to_peer(), Redirect, 2),
        marked(
            "exempt without the mark",
            0,
            echo("10.244.1.7", "10.244.2.2"),
            Redirect,
            2,
        ),
        marked(
            "both marks are neither",
            MASK,
            echo("10.244.1.7", "10.244.2.2"),
            Redirect,
            2,
        ),
        // Opted out: what the pod sends, and nothing that is sent to it.
        marked(
            "plain mark, source opted out",
            PLAIN,
            echo("10.244.1.8", "10.244.2.2"),
            Pass(Plain),
            2,
        ),
        marked(
            "plain mark, destination opted out",
            PLAIN,
            echo("10.244.1.2", "10.244.2.8"),
            Redirect,
            2,
        ),
        marked(
            "source opted out without the mark",
            0,
            echo("10.244.1.8", "10.244.2.2"),
            Redirect,
            2,
        ),
        // Not to be encrypted: no mark is needed, and none hinders.
        out(
            "to a plain node's pod",
            echo("10.244.1.2", "10.244.5.2"),
            Pass(Plain),
            5,
        ),
        out(
            "to a plain node's pod, IPv6",
            echo("fd00:10:244:1::2", "fd00:10:244:5::2"),
            Pass(Plain),
            5,
        ),
        marked(
            "tunnel mark to a plain node's pod",
            TUNNEL,
            echo("10.244.1.2", "10.244.5.2"),
            Pass(Plain),
            5,
        ),
        // Overlays.
        out(
            "VXLAN around pod traffic",
            overlay((40000, 4789), vxlan(&ethernet(&to_peer()))),
            Redirect,
            2,
        ),
        out(
            "VXLAN around pod traffic, IPv6",
            overlay((40000, 4789), vxlan(&ethernet(&to_peer6()))),
            Redirect,
            2,
        ),
        out(
            "VXLAN around a tagged frame",
            overlay((40000, 4789), vxlan(&vlan(0x8100, &ethernet(&to_peer())))),
            Redirect,
            2,
        ),
        out(
            "VXLAN over IPv6",
            udp("2001:db8::1", "2001:db8::2", (1, 4789), &vxlan(&ethernet(&to_peer()))),
            Redirect,
            2,
        ),
        out(
            "VXLAN around traffic to the fenced",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.2", "10.244.3.2")))),
            Drop(Fenced),
            3,
        ),
        out(
            "VXLAN behind IPv4 options",
            with_options(overlay((1, 4789), vxlan(&ethernet(&to_peer())))),
            Redirect,
            2,
        ),
        out(
            "a later fragment is not read as UDP",
            fragment(overlay((1, 4789), vxlan(&ethernet(&to_peer()))), 100),
            Pass(Unprotected),
            0,
        ),
        out(
            "VXLAN around ARP",
            overlay((1, 4789), vxlan(&frame(0x0806, &[0; 28]))),
            Pass(Unprotected),
            0,
        ),
        out(
            "VXLAN around others' traffic",
            overlay((1, 4789), vxlan(&ethernet(&echo("172.16.0.1", "172.16.0.2")))),
            Pass(Unprotected),
            0,
        ),
        out(
            "VXLAN on a port nobody configured",
            overlay((1, 4790), vxlan(&ethernet(&to_peer()))),
            Pass(Unprotected),
            0,
        ),
        out(
            "VXLAN cut in the inner header",
            overlay((1, 4789), cut(vxlan(&ethernet(&to_peer())), 10)),
            Drop(Malformed),
            0,
        ),
        out(
            "VXLAN cut before the inner frame",
            overlay((1, 4789), vxlan(&[])),
            Drop(Malformed),
            0,
        ),
        out(
            "Geneve around pod traffic",
            overlay((1, 6081), geneve(0x6558, &ethernet(&to_peer()))),
            Redirect,
            2,
        ),
        out(
            "Geneve around a bare IPv6 packet",
            overlay((1, 6081), geneve(0x86dd, &to_peer6())),
            Redirect,
            2,
        ),
        out(
            "Geneve around something else",
            overlay((1, 6081), geneve(0x8847, &[0; 20])),
            Pass(Unprotected),
            0,
        ),
        out(
            "VXLAN behind two IPv6 extension headers",
            extensions(2, &vxlan_to_peer()),
            Redirect,
            2,
        ),
        out(
            "a port hidden behind five extension headers",
            extensions(5, &vxlan_to_peer()),
            Drop(Malformed),
            0,
        ),
        // Overlays that do not lead to the owner.
        out(
            "VXLAN of a foreign VNI around pod traffic",
            overlay((40000, 4789), vxlan_of(VNI + 1, &ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN whose VNI differs in its first byte",
            overlay((40000, 4789), vxlan_of(VNI ^ 0x10_0000, &ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "Geneve of a foreign VNI around pod traffic",
            overlay((1, 6081), geneve_of(VNI + 0x100, 0x6558, &ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN to another node than the owner",
            udp("192.0.2.1", "192.0.2.3", (1, 4789), &vxlan(&ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN to an address that is no node's",
            udp("192.0.2.1", "192.0.2.9", (1, 4789), &vxlan(&ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN around traffic to a range nobody owns",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.2", "10.244.9.2")))),
            Drop(UnknownNode),
            0,
        ),
        out(
            "VXLAN around traffic from an exempt pod without the mark",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.7", "10.244.2.2")))),
            Redirect,
            2,
        ),
        marked(
            "VXLAN around traffic from an exempt pod",
            PLAIN,
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.7", "10.244.2.2")))),
            Pass(Plain),
            2,
        ),
        marked(
            "VXLAN around traffic from an opted-out pod",
            PLAIN,
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.8", "10.244.2.2")))),
            Pass(Plain),
            2,
        ),
        out(
            "VXLAN around traffic from an opted-out pod without the mark",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.8", "10.244.2.2")))),
            Redirect,
            2,
        ),
        marked(
            "VXLAN around traffic from an opted-out pod, between protected nodes",
            PLAIN,
            between_protected((1, 4789), vxlan(&ethernet(&echo("10.244.1.8", "10.244.2.2")))),
            Redirect,
            2,
        ),
        out(
            "VXLAN around traffic to a plain node's pod",
            udp(
                "192.0.2.1",
                "192.0.2.5",
                (1, 4789),
                &vxlan(&ethernet(&echo("10.244.1.2", "10.244.5.2"))),
            ),
            Pass(Plain),
            5,
        ),
        marked(
            "VXLAN with the tunnel's mark",
            TUNNEL,
            overlay((1, 4789), vxlan(&ethernet(&to_peer()))),
            Redirect,
            2,
        ),
        marked(
            "VXLAN with the tunnel's mark and, by chance, its port",
            TUNNEL,
            overlay((LISTEN_PORT, 4789), vxlan_of(VNI + 1, &ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        // Nodes whose own traffic is protected.
        out(
            "node to node, protected",
            echo("203.0.113.1", "203.0.113.2"),
            Redirect,
            2,
        ),
        out(
            "node to node, protected, IPv6",
            echo("2001:db8:1::1", "2001:db8:1::2"),
            Redirect,
            2,
        ),
        out(
            "node to a fenced node",
            echo("203.0.113.1", "203.0.113.3"),
            Drop(Fenced),
            3,
        ),
        out(
            "protected node to one that is not",
            echo("203.0.113.1", "192.0.2.2"),
            Pass(Unprotected),
            0,
        ),
        out(
            "node that is not protected to one that is",
            echo("192.0.2.1", "203.0.113.2"),
            Pass(Unprotected),
            0,
        ),
        out(
            "protected node to a router",
            echo("203.0.113.1", "203.0.113.99"),
            Pass(Unprotected),
            0,
        ),
        out(
            "pod to a protected node",
            echo("10.244.1.2", "203.0.113.2"),
            Redirect,
            2,
        ),
        out(
            "protected node to a pod",
            echo("203.0.113.1", "10.244.2.2"),
            Redirect,
            2,
        ),
        out(
            "protected node to a fenced pod",
            echo("203.0.113.1", "10.244.3.2"),
            Drop(Fenced),
            3,
        ),
        out(
            "pod to a node that is not protected",
            echo("10.244.1.2", "192.0.2.2"),
            Pass(Unprotected),
            0,
        ),
        out(
            "to an open TCP port",
            tcp("203.0.113.1", "203.0.113.2", (40000, 6443)),
            Pass(OpenPort),
            2,
        ),
        out(
            "from an open TCP port",
            tcp("203.0.113.1", "203.0.113.2", (6443, 40000)),
            Pass(OpenPort),
            2,
        ),
        out(
            "to an open UDP port",
            udp("203.0.113.1", "203.0.113.2", (40000, 53), b"x"),
            Pass(OpenPort),
            2,
        ),
        out(
            "to an open port, IPv6",
            tcp("2001:db8:1::1", "2001:db8:1::2", (40000, 6443)),
            Pass(OpenPort),
            2,
        ),
        out(
            "to an open port of a fenced node",
            tcp("203.0.113.1", "203.0.113.3", (40000, 6443)),
            Pass(OpenPort),
            3,
        ),
        out(
            "the open number of the other protocol",
            udp("203.0.113.1", "203.0.113.2", (40000, 6443), b"x"),
            Redirect,
            2,
        ),
        out(
            "the number next to an open one",
            tcp("203.0.113.1", "203.0.113.2", (6442, 6444)),
            Redirect,
            2,
        ),
        out(
            "a later fragment of an open port",
            fragment(tcp("203.0.113.1", "203.0.113.2", (1, 6443)), 100),
            Redirect,
            2,
        ),
        out(
            "pod to a node's open port",
            tcp("10.244.1.2", "203.0.113.2", (40000, 6443)),
            Redirect,
            2,
        ),
        out(
            "protected node to a pod's open port",
            tcp("203.0.113.1", "10.244.2.2", (6443, 6443)),
            Redirect,
            2,
        ),
        out(
            "router solicitation",
            icmpv6("2001:db8:1::1", "2001:db8:1::2", 133),
            Pass(OpenPort),
            2,
        ),
        out(
            "VXLAN to an address of the owner that is shut",
            udp("192.0.2.1", "203.0.113.22", (1, 4789), &vxlan(&ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "neighbour solicitation",
            icmpv6("2001:db8:1::1", "2001:db8:1::2", 135),
            Pass(OpenPort),
            2,
        ),
        out(
            "redirect",
            icmpv6("2001:db8:1::1", "2001:db8:1::2", 137),
            Pass(OpenPort),
            2,
        ),
        out(
            "the ICMPv6 types next to neighbour discovery",
            icmpv6("2001:db8:1::1", "2001:db8:1::2", 132),
            Redirect,
            2,
        ),
        out(
            "and on the other side",
            icmpv6("2001:db8:1::1", "2001:db8:1::2", 138),
            Redirect,
            2,
        ),
        out(
            "a pod's neighbour solicitation",
            icmpv6("fd00:10:244:1::2", "2001:db8:1::2", 135),
            Redirect,
            2,
        ),
        marked(
            "tunnel to a protected node",
            TUNNEL,
            udp("203.0.113.1", "203.0.113.2", (LISTEN_PORT, LISTEN_PORT), b"x"),
            Pass(Tunnel),
            0,
        ),
        marked(
            "tunnel to a fenced node",
            TUNNEL,
            udp("203.0.113.1", "203.0.113.3", (LISTEN_PORT, LISTEN_PORT), b"x"),
            Pass(Tunnel),
            0,
        ),
        out(
            "the tunnel's port without its mark",
            udp("203.0.113.1", "203.0.113.2", (LISTEN_PORT, LISTEN_PORT), b"x"),
            Redirect,
            2,
        ),
        out(
            "overlay between protected nodes",
            between_protected((1, 4789), vxlan(&ethernet(&to_peer()))),
            Redirect,
            2,
        ),
        out(
            "overlay of a foreign VNI between protected nodes",
            between_protected((1, 4789), vxlan_of(VNI + 1, &ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "overlay between protected nodes to the fenced",
            between_protected((1, 4789), vxlan(&ethernet(&echo("10.244.1.2", "10.244.3.2")))),
            Drop(Fenced),
            3,
        ),
        marked(
            "an exempt pod's overlay between protected nodes",
            PLAIN,
            between_protected((1, 4789), vxlan(&ethernet(&echo("10.244.1.7", "10.244.2.2")))),
            Redirect,
            2,
        ),
        out(
            "others' overlay between protected nodes",
            between_protected(
                (1, 4789),
                vxlan_of(VNI + 1, &ethernet(&echo("172.16.0.1", "172.16.0.2"))),
            ),
            Redirect,
            2,
        ),
        out(
            "overlay of ARP between protected nodes",
            between_protected((1, 4789), vxlan(&frame(0x0806, &[0; 28]))),
            Redirect,
            2,
        ),
        out(
            "overlay from an open port",
            between_protected((53, 4789), vxlan(&ethernet(&to_peer()))),
            Redirect,
            2,
        ),
        out(
            "overlay from an open port to the fenced",
            between_protected((53, 4789), vxlan(&ethernet(&echo("10.244.1.2", "10.244.3.2")))),
            Drop(Fenced),
            3,
        ),
        out(
            "overlay that cannot be read, from an open port",
            between_protected((53, 4789), cut(vxlan(&ethernet(&to_peer())), 10)),
            Drop(Malformed),
            0,
        ),
        out(
            "a pod's own VXLAN",
            udp(
                "10.244.1.2",
                "10.244.2.2",
                (1, 4789),
                &vxlan(&ethernet(&echo("10.244.1.2", "10.244.3.2"))),
            ),
            Redirect,
            2,
        ),
        // Broken.
        out(
            "IPv4 cut short",
            cut(echo("10.244.1.2", "10.244.2.2"), 9),
            Drop(Malformed),
            0,
        ),
        out("IPv6 cut short", cut(to_peer6(), 9), Drop(Malformed), 0),
        case(
            "IPv4 that says it is IPv6",
            Egress,
            0,
            frame(0x0800, &to_peer6()),
            Drop(Malformed),
            0,
        ),
        case(
            "a header of four words",
            Egress,
            0,
            frame(0x0800, &[&[0x44], &to_peer()[1..]].concat()),
            Drop(Malformed),
            0,
        ),
        // Coming in.
        into(
            "in the clear from a peer's pod",
            echo("10.244.2.2", "10.244.1.2"),
            Drop(ClearText),
            2,
        ),
        into(
            "in the clear from a peer's pod, IPv6",
            echo("fd00:10:244:2::2", "fd00:10:244:1::2"),
            Drop(ClearText),
            2,
        ),
        into(
            "from a pod range nobody owns",
            echo("10.244.9.2", "10.244.1.2"),
            Drop(ClearText),
            0,
        ),
        into(
            "from a peer's pod to the node",
            echo("10.244.2.2", "192.0.2.1"),
            Drop(ClearText),
            2,
        ),
        into(
            "with an own pod's address",
            echo("10.244.1.2", "10.244.1.3"),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "with an own pod's address, IPv6",
            echo("fd00:10:244:1::2", "fd00:10:244:1::3"),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "from outside to a pod",
            echo("198.51.100.1", "10.244.1.2"),
            Pass(Unprotected),
            0,
        ),
        into("to an exempt pod", echo("10.244.2.2", "10.244.1.7"), Pass(Plain), 2),
        into(
            "from an opted-out pod",
            echo("10.244.2.8", "10.244.1.2"),
            Pass(Plain),
            2,
        ),
        into(
            "to an opted-out pod",
            echo("10.244.2.2", "10.244.1.8"),
            Drop(ClearText),
            2,
        ),
        into(
            "with an opted-out own pod's address",
            echo("10.244.1.8", "10.244.1.2"),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "from a plain node's pod",
            echo("10.244.5.2", "10.244.1.2"),
            Pass(Plain),
            5,
        ),
        into(
            "a VXLAN packet with an opted-out pod inside",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.2.8", "10.244.1.2")))),
            Pass(Plain),
            2,
        ),
        into(
            "a VXLAN packet with an opted-out own pod inside",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.8", "10.244.1.2")))),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "a VXLAN packet with a plain node's pod inside",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.5.2", "10.244.1.2")))),
            Pass(Plain),
            5,
        ),
        into(
            "the tunnel",
            udp("192.0.2.2", "192.0.2.1", (9, LISTEN_PORT), b"x"),
            Pass(Tunnel),
            0,
        ),
        into(
            "the tunnel's second device",
            udp("203.0.113.2", "203.0.113.1", (9, OTHER_LISTEN_PORT), b"x"),
            Pass(Tunnel),
            0,
        ),
        into(
            "to no port, with a tunnel that has less devices than it may",
            udp("203.0.113.2", "203.0.113.1", (9, 0), b"x"),
            Drop(ClearText),
            2,
        ),
        into(
            "to the tunnel's port from a pod",
            udp("10.244.2.2", "192.0.2.1", (9, LISTEN_PORT), b"x"),
            Drop(ClearText),
            2,
        ),
        into(
            "a VXLAN packet with a pod inside",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.2.2", "10.244.1.2")))),
            Drop(ClearText),
            2,
        ),
        into(
            "a Geneve packet with a pod inside",
            overlay((1, 6081), geneve(0x0800, &echo("10.244.2.2", "10.244.1.2"))),
            Drop(ClearText),
            2,
        ),
        into(
            "VXLAN cut short",
            overlay((1, 4789), cut(vxlan(&ethernet(&to_peer())), 10)),
            Drop(Malformed),
            0,
        ),
        into("IPv4 cut short", cut(to_peer(), 9), Drop(Malformed), 0),
        case("ARP in", Ingress, 0, frame(0x0806, &[0; 28]), Pass(NotIp), 0),
        // Coming in from nodes whose own traffic is protected.
        into(
            "in the clear from a protected node",
            echo("203.0.113.2", "203.0.113.1"),
            Drop(ClearText),
            2,
        ),
        into(
            "in the clear from a protected node, IPv6",
            echo("2001:db8:1::2", "2001:db8:1::1"),
            Drop(ClearText),
            2,
        ),
        into(
            "in the clear from a fenced node",
            echo("203.0.113.3", "203.0.113.1"),
            Drop(ClearText),
            3,
        ),
        into(
            "in the clear from a protected node to a pod",
            echo("203.0.113.2", "10.244.1.2"),
            Drop(ClearText),
            2,
        ),
        into(
            "with this node's protected address",
            echo("203.0.113.1", "203.0.113.1"),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "from a protected node to everybody",
            echo("203.0.113.2", "224.0.0.18"),
            Pass(Unprotected),
            0,
        ),
        into(
            "from a protected node to an open address",
            echo("203.0.113.2", "192.0.2.1"),
            Pass(Unprotected),
            0,
        ),
        into(
            "from an open node to a pod",
            echo("192.0.2.2", "10.244.1.2"),
            Pass(Unprotected),
            0,
        ),
        into(
            "a solicitation to everybody",
            icmpv6("2001:db8:1::2", "ff02::1:ff00:1", 135),
            Pass(Unprotected),
            0,
        ),
        into(
            "a neighbour's solicitation",
            icmpv6("2001:db8:1::2", "2001:db8:1::1", 135),
            Pass(OpenPort),
            2,
        ),
        into(
            "a neighbour's echo",
            icmpv6("2001:db8:1::2", "2001:db8:1::1", 128),
            Drop(ClearText),
            2,
        ),
        into(
            "from an open port",
            tcp("203.0.113.2", "203.0.113.1", (6443, 40000)),
            Pass(OpenPort),
            2,
        ),
        into(
            "to an open port",
            tcp("203.0.113.3", "203.0.113.1", (40000, 6443)),
            Pass(OpenPort),
            3,
        ),
        into(
            "to an open port with this node's address",
            tcp("203.0.113.1", "203.0.113.1", (40000, 6443)),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "to a pod's open port",
            tcp("203.0.113.2", "10.244.1.2", (6443, 6443)),
            Drop(ClearText),
            2,
        ),
        into(
            "to an open port from a pod",
            tcp("10.244.2.2", "203.0.113.1", (40000, 6443)),
            Drop(ClearText),
            2,
        ),
        into(
            "the tunnel of a protected node",
            udp("203.0.113.2", "203.0.113.1", (LISTEN_PORT, LISTEN_PORT), b"x"),
            Pass(Tunnel),
            0,
        ),
        into(
            "from the tunnel's port of a protected node to another",
            udp("203.0.113.2", "203.0.113.1", (LISTEN_PORT, 9), b"x"),
            Drop(ClearText),
            2,
        ),
        // Overlay packets that somebody in the underlay made.
        into(
            "VXLAN in the clear from the internet to a pod",
            udp(
                "198.51.100.9",
                "192.0.2.1",
                (1, 4789),
                &vxlan(&ethernet(&echo("198.51.100.1", "10.244.1.2"))),
            ),
            Drop(ClearText),
            0,
        ),
        into(
            "VXLAN of a foreign VNI from the internet to a pod",
            udp(
                "198.51.100.9",
                "192.0.2.1",
                (1, 4789),
                &vxlan_of(7, &ethernet(&echo("198.51.100.1", "10.244.1.2"))),
            ),
            Drop(ClearText),
            0,
        ),
        into(
            "Geneve in the clear from a node to a pod",
            overlay((1, 6081), geneve(0x0800, &echo("192.0.2.2", "10.244.1.2"))),
            Drop(ClearText),
            2,
        ),
        into(
            "VXLAN in the clear from the internet to an exempt pod",
            overlay((1, 4789), vxlan(&ethernet(&echo("198.51.100.1", "10.244.1.7")))),
            Pass(Plain),
            0,
        ),
        into(
            "VXLAN in the clear around others' traffic",
            overlay((1, 4789), vxlan(&ethernet(&echo("172.16.0.1", "172.16.0.2")))),
            Pass(Unprotected),
            0,
        ),
        into(
            "VXLAN with an own pod inside as the source",
            overlay((1, 4789), vxlan(&ethernet(&echo("10.244.1.2", "10.244.1.3")))),
            Drop(SpoofedSource),
            1,
        ),
        into(
            "VXLAN from an open port with a pod inside",
            udp(
                "203.0.113.2",
                "203.0.113.1",
                (53, 4789),
                &vxlan(&ethernet(&echo("10.244.2.2", "10.244.1.2"))),
            ),
            Drop(ClearText),
            2,
        ),
        // What the tunnel has decrypted.
        decrypted(
            "from a peer's pod",
            echo("10.244.2.2", "10.244.1.2"),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "from a peer's pod, IPv6",
            echo("fd00:10:244:2::2", "fd00:10:244:1::2"),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "from a plain node's pod",
            echo("10.244.5.2", "10.244.1.2"),
            Pass(Decrypted),
            5,
        ),
        decrypted("from a peer", echo("203.0.113.2", "203.0.113.1"), Pass(Decrypted), 2),
        decrypted(
            "with an own pod's address",
            echo("10.244.1.2", "10.244.1.3"),
            Drop(SpoofedSource),
            1,
        ),
        decrypted(
            "with this node's protected address",
            echo("203.0.113.1", "10.244.1.3"),
            Drop(SpoofedSource),
            1,
        ),
        decrypted(
            "with this node's open address",
            echo("192.0.2.1", "10.244.1.3"),
            Drop(SpoofedSource),
            1,
        ),
        decrypted(
            "with an exempt own pod's address",
            echo("10.244.1.7", "10.244.1.3"),
            Drop(SpoofedSource),
            1,
        ),
        decrypted(
            "overlay from a peer's pod",
            from_peer(vxlan(&ethernet(&peer_to()))),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "overlay from a peer's pod, IPv6",
            udp(
                "2001:db8::2",
                "2001:db8::1",
                (1, 6081),
                &geneve(0x86dd, &echo("fd00:10:244:2::2", "fd00:10:244:1::2")),
            ),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "overlay from the peer itself",
            from_peer(vxlan(&ethernet(&echo("203.0.113.2", "10.244.1.2")))),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "overlay with another node's pod inside",
            from_peer(vxlan(&ethernet(&echo("10.244.3.2", "10.244.1.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay with another node inside",
            from_peer(vxlan(&ethernet(&echo("192.0.2.3", "10.244.1.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay with an own pod inside as the source",
            from_peer(vxlan(&ethernet(&echo("10.244.1.3", "10.244.1.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay with an exempt own pod inside as the source",
            from_peer(vxlan(&ethernet(&echo("10.244.1.7", "10.244.1.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay from the internet",
            from_peer(vxlan(&ethernet(&echo("198.51.100.1", "10.244.1.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay of a foreign VNI from the internet",
            from_peer(vxlan_of(7, &ethernet(&echo("198.51.100.1", "10.244.1.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay of a foreign VNI with another node's pod inside",
            from_peer(vxlan_of(7, &ethernet(&echo("10.244.3.2", "172.16.0.1")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "others' overlay",
            from_peer(vxlan_of(7, &ethernet(&echo("172.16.0.1", "172.16.0.2")))),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "our overlay around others' traffic",
            from_peer(vxlan(&ethernet(&echo("172.16.0.1", "172.16.0.2")))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "overlay that a pod made",
            udp("10.244.2.2", "10.244.1.2", (1, 4789), &vxlan(&ethernet(&peer_to()))),
            Drop(SpoofedSource),
            2,
        ),
        decrypted(
            "ARP in our overlay",
            from_peer(vxlan(&frame(0x0806, &[0; 28]))),
            Drop(Malformed),
            2,
        ),
        decrypted(
            "ARP in others' overlay",
            from_peer(vxlan_of(7, &frame(0x0806, &[0; 28]))),
            Pass(Decrypted),
            2,
        ),
        decrypted(
            "overlay cut short",
            from_peer(cut(vxlan(&ethernet(&peer_to())), 10)),
            Drop(Malformed),
            2,
        ),
        decrypted(
            "overlay cut in its header",
            from_peer(cut(vxlan(&[]), 1)),
            Drop(Malformed),
            2,
        ),
        decrypted(
            "the first fragment of an overlay packet, too short for what is inside",
            fragment(from_peer(vxlan(&[])), 0),
            Drop(Malformed),
            2,
        ),
        decrypted(
            "a port hidden behind extension headers",
            extensions(5, &vxlan_to_peer()),
            Drop(SpoofedSource),
            1,
        ),
        decrypted(
            "a peer's port hidden behind extension headers",
            swapped(extensions(5, &vxlan_to_peer())),
            Drop(Malformed),
            2,
        ),
        decrypted("a later fragment", fragment(peer_to(), 100), Pass(Decrypted), 2),
        decrypted("IPv4 cut short, decrypted", cut(peer_to(), 9), Drop(Malformed), 0),
        case("not IP, decrypted", Out, 0, frame(0x0806, &[0; 28]), Pass(NotIp), 0),
    ]
}
