//! The packets on which the gate is judged, and what must happen to each.
//!
//! Node 1 is this node. Node 2 has a key, node 3 has none. Pod 10.244.1.7 of this node is exempt.
//!
//! ```text
//!   node 1 (here)  10.244.1.0/24  fd00:10:244:1::/64   local
//!   node 2         10.244.2.0/24  fd00:10:244:2::/64   encrypted
//!   node 3         10.244.3.0/24  fd00:10:244:3::/64   fenced
//!   nobody         10.244.9.0/24  fd00:10:244:9::/64
//! ```

use shroud_gate::Direction::{self, Egress, Ingress};
use shroud_gate::Reason;

use crate::packet::{echo, ethernet, frame, geneve, ip, udp, udp_datagram, vlan, vxlan};

/// The tunnel's port in every case.
pub(crate) const LISTEN_PORT: u16 = 51820;
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
        ClearText, Fenced, Local, Malformed, NotIp, Overlay, Plain, SpoofedSource, Tunnel, UnknownNode, Unprotected,
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
        // Overlays.
        out(
            "VXLAN around pod traffic",
            overlay((40000, 4789), vxlan(&ethernet(&to_peer()))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN around pod traffic, IPv6",
            overlay((40000, 4789), vxlan(&ethernet(&to_peer6()))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN around a tagged frame",
            overlay((40000, 4789), vxlan(&vlan(0x8100, &ethernet(&to_peer())))),
            Drop(Overlay),
            2,
        ),
        out(
            "VXLAN over IPv6",
            udp("2001:db8::1", "2001:db8::2", (1, 4789), &vxlan(&ethernet(&to_peer()))),
            Drop(Overlay),
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
            Drop(Overlay),
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
            Drop(Overlay),
            2,
        ),
        out(
            "Geneve around a bare IPv6 packet",
            overlay((1, 6081), geneve(0x86dd, &to_peer6())),
            Drop(Overlay),
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
            Drop(Overlay),
            2,
        ),
        out(
            "a port hidden behind five extension headers",
            extensions(5, &vxlan_to_peer()),
            Drop(Malformed),
            0,
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
            "the tunnel",
            udp("192.0.2.2", "192.0.2.1", (9, LISTEN_PORT), b"x"),
            Pass(Tunnel),
            0,
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
    ]
}
