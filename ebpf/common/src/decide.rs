//! The decisions. One look-up for each address, one story from top to bottom.

use crate::layout::{
    Entry, MODE_AUDIT, MODE_OFF, PATH_ENCRYPTED, PATH_LOCAL, PATH_NONE, PATH_PLAIN, Settings, open_port,
};
use crate::packet::{Address, Flow, Packet, Shape, Upper};

/// One generation of the gate's maps.
pub trait Lookup {
    /// The settings.
    fn settings(&self) -> &Settings;
    /// What is known of an address: the longest prefix that contains it, or [`Entry::default`].
    fn entry(&self, address: &Address) -> Entry;
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It goes on as if we were not there.
    Pass,
    /// It goes into the encryption device with this interface index.
    Redirect(u32),
    /// It ends here.
    Drop,
}

/// Why. The numbers are those in the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// Not IP.
    NotIp = 1,
    /// Source or destination is not protected.
    Unprotected = 2,
    /// The tunnel's own encrypted packet.
    Tunnel = 3,
    /// Exempt by cluster configuration.
    Plain = 4,
    /// Protected, and encryption is switched off.
    Off = 5,
    /// Protected, and has an encrypted path.
    Encrypted = 6,
    /// Protected, but no node owns the destination.
    UnknownNode = 7,
    /// For a pod of this node, which must not leave the node to look for it.
    Local = 8,
    /// The owner is known, but has no usable key, was refused, or is shut out.
    Fenced = 9,
    /// There is no encryption device.
    NoDevice = 10,
    /// Protected traffic in an overlay packet that is not ours, or not for the node that owns the destination.
    Overlay = 11,
    /// Came in from the underlay in the clear, from a protected source of another node, or in an overlay packet for a pod of this one.
    ClearText = 12,
    /// Came in with an address of this node, or out of the tunnel from a node that does not own the source.
    SpoofedSource = 13,
    /// Says it is IP, but cannot be read.
    Malformed = 14,
    /// Between protected nodes, and stays in the clear so that they can be healed: an open port, or how IPv6 finds its neighbours.
    OpenPort = 15,
    /// Came out of the tunnel, and from whom it says.
    Decrypted = 16,
}

impl Reason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::NotIp,
        Self::Unprotected,
        Self::Tunnel,
        Self::Plain,
        Self::Off,
        Self::Encrypted,
        Self::UnknownNode,
        Self::Local,
        Self::Fenced,
        Self::NoDevice,
        Self::Overlay,
        Self::ClearText,
        Self::SpoofedSource,
        Self::Malformed,
        Self::OpenPort,
        Self::Decrypted,
    ];

    /// The reason with this number in a map.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The reason as metrics and tables name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotIp => "not-ip",
            Self::Unprotected => "unprotected",
            Self::Tunnel => "tunnel",
            Self::Plain => "plain",
            Self::Off => "off",
            Self::Encrypted => "encrypted",
            Self::UnknownNode => "unknown-node",
            Self::Local => "local",
            Self::Fenced => "fenced",
            Self::NoDevice => "no-device",
            Self::Overlay => "overlay",
            Self::ClearText => "clear-text",
            Self::SpoofedSource => "spoofed-source",
            Self::Malformed => "malformed",
            Self::OpenPort => "open-port",
            Self::Decrypted => "decrypted",
        }
    }
}

/// What happens to a packet, why, and under which node it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// What happens.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The other node's number: the destination's owner on egress, the source's on ingress; 0 for none.
    pub node: u64,
    /// The packet would have been dropped, but audit mode lets it pass.
    pub audited: bool,
}

impl Verdict {
    #[inline(always)]
    fn pass(reason: Reason, node: u64) -> Self {
        Self {
            action: Action::Pass,
            reason,
            node,
            audited: false,
        }
    }

    /// A drop, as far as the mode allows it.
    #[inline(always)]
    fn refuse(settings: &Settings, reason: Reason, node: u64) -> Self {
        if settings.mode == MODE_OFF {
            return Self::pass(Reason::Off, node);
        }
        if settings.mode == MODE_AUDIT {
            return Self {
                action: Action::Pass,
                reason,
                node,
                audited: true,
            };
        }
        Self {
            action: Action::Drop,
            reason,
            node,
            audited: false,
        }
    }
}

/// Decides on a packet that is about to leave by an uplink. `mark` is the packet's mark.
///
/// Packets between nodes may carry those of pods, so what is inside an overlay packet is judged first, and what is outside afterwards: the
/// outer addresses may ask for encryption of what the inner ones let pass, never the other way round.
#[inline(always)]
pub fn egress<L: Lookup>(packet: &Packet, mark: u32, lookup: &L) -> Verdict {
    let settings = lookup.settings();
    match packet.shape {
        Shape::NotIp => return Verdict::pass(Reason::NotIp, 0),
        Shape::Unreadable => return Verdict::refuse(settings, Reason::Malformed, 0),
        Shape::Ip | Shape::OverlayOfNotIp | Shape::OverlayOfUnreadable | Shape::OverlayOfIp => {}
    }
    let outer = &packet.outer;
    let destination = lookup.entry(&outer.destination);
    // A mark is only a claim: whoever holds CAP_NET_ADMIN can set it. It excuses nothing that is for a pod, nor what carries a pod's packet
    // and has the tunnel's port by chance.
    if settings.is_tunnel_mark(mark)
        && packet.shape == Shape::Ip
        && leaves_the_tunnel(outer, settings)
        && (!destination.is_protected() || destination.is_node())
    {
        return Verdict::pass(Reason::Tunnel, 0);
    }
    let source = lookup.entry(&outer.source);
    let verdict = egress_flow(settings, mark, outer, &source, &destination);
    if involves_a_pod(&source, &destination) || verdict.reason == Reason::Plain {
        return verdict;
    }
    if packet.shape == Shape::OverlayOfIp {
        let inside = egress_inside(packet, mark, &destination, lookup);
        if inside.reason != Reason::Unprotected && (inside.reason != Reason::Plain || asks_for_nothing(&verdict)) {
            return inside;
        }
    } else if is_hidden(packet, settings) && asks_for_nothing(&verdict) {
        return Verdict::refuse(settings, Reason::Malformed, 0);
    }
    verdict
}

/// Decides by a packet's own addresses.
#[inline(always)]
fn egress_flow(settings: &Settings, mark: u32, flow: &Flow, source: &Entry, destination: &Entry) -> Verdict {
    let node = destination.node;
    if settings.is_plain_mark(mark) && leaves_in_the_clear(source, destination) {
        return Verdict::pass(Reason::Plain, node);
    }
    if !source.is_protected() || !destination.is_protected() {
        return Verdict::pass(Reason::Unprotected, 0);
    }
    if source.is_node() && destination.is_node() && stays_open(flow, settings) {
        return Verdict::pass(Reason::OpenPort, node);
    }
    protect(settings, destination, true)
}

/// Decides by the addresses inside an overlay packet to `outer`.
#[inline(always)]
fn egress_inside<L: Lookup>(packet: &Packet, mark: u32, outer: &Entry, lookup: &L) -> Verdict {
    let settings = lookup.settings();
    let destination = lookup.entry(&packet.inner.destination);
    let source = lookup.entry(&packet.inner.source);
    if settings.is_plain_mark(mark) && leaves_in_the_clear(&source, &destination) {
        return Verdict::pass(Reason::Plain, destination.node);
    }
    if !source.is_protected() || !destination.is_protected() {
        return Verdict::pass(Reason::Unprotected, 0);
    }
    // The encryption device sends by the outer addresses. They must lead to the peer to which the inner ones belong.
    let leads_to_the_owner = settings.is_our_overlay(packet.vni)
        && outer.is_node()
        && outer.node == destination.node
        && matches!(outer.path, PATH_NONE | PATH_ENCRYPTED);
    protect(settings, &destination, leads_to_the_owner)
}

/// What happens to a protected packet. `arrives` says whether the encryption device would send it to the destination's owner.
#[inline(always)]
fn protect(settings: &Settings, destination: &Entry, arrives: bool) -> Verdict {
    let node = destination.node;
    if destination.path == PATH_PLAIN {
        return Verdict::pass(Reason::Plain, node);
    }
    if settings.mode == MODE_OFF {
        return Verdict::pass(Reason::Off, node);
    }
    match destination.path {
        PATH_NONE => Verdict::refuse(settings, Reason::UnknownNode, node),
        PATH_LOCAL => Verdict::refuse(settings, Reason::Local, node),
        PATH_ENCRYPTED if !arrives => Verdict::refuse(settings, Reason::Overlay, node),
        PATH_ENCRYPTED if destination.device == 0 => Verdict::refuse(settings, Reason::NoDevice, node),
        PATH_ENCRYPTED => Verdict {
            action: Action::Redirect(destination.device),
            reason: Reason::Encrypted,
            node,
            audited: false,
        },
        // PATH_FENCED, and whatever a newer writer may mean by another number.
        _ => Verdict::refuse(settings, Reason::Fenced, node),
    }
}

/// Decides on a packet that came in by an uplink. What the tunnel decrypts comes in by another device, so all of this is in the clear.
#[inline(always)]
pub fn ingress<L: Lookup>(packet: &Packet, lookup: &L) -> Verdict {
    let settings = lookup.settings();
    match packet.shape {
        Shape::NotIp => return Verdict::pass(Reason::NotIp, 0),
        Shape::Unreadable => return Verdict::refuse(settings, Reason::Malformed, 0),
        Shape::Ip | Shape::OverlayOfNotIp | Shape::OverlayOfUnreadable | Shape::OverlayOfIp => {}
    }
    let outer = &packet.outer;
    let source = lookup.entry(&outer.source);
    if enters_the_tunnel(outer, settings) && (!source.is_protected() || source.is_node()) {
        return Verdict::pass(Reason::Tunnel, 0);
    }
    let verdict = ingress_flow(lookup, outer, &source);
    if !asks_for_nothing(&verdict) {
        return verdict;
    }
    if packet.shape == Shape::OverlayOfIp {
        let inside = ingress_inside(lookup, &packet.inner);
        if inside.reason != Reason::Unprotected {
            return inside;
        }
    } else if is_hidden(packet, settings) {
        return Verdict::refuse(settings, Reason::Malformed, 0);
    }
    verdict
}

/// Decides by a packet's own addresses.
#[inline(always)]
fn ingress_flow<L: Lookup>(lookup: &L, flow: &Flow, source: &Entry) -> Verdict {
    let settings = lookup.settings();
    if !source.is_protected() {
        return Verdict::pass(Reason::Unprotected, 0);
    }
    let destination = lookup.entry(&flow.destination);
    if source.is_exempt() || destination.is_exempt() {
        return Verdict::pass(Reason::Plain, source.node);
    }
    // A node also talks to those who cannot decrypt: routers, everybody (multicast), this node by an address that is not in the mesh.
    if source.is_node() && !destination.is_protected() {
        return Verdict::pass(Reason::Unprotected, 0);
    }
    if source.path == PATH_LOCAL {
        return Verdict::refuse(settings, Reason::SpoofedSource, source.node);
    }
    if source.is_node() && destination.is_node() && stays_open(flow, settings) {
        return Verdict::pass(Reason::OpenPort, source.node);
    }
    if arrives_in_the_clear(source) {
        return Verdict::pass(Reason::Plain, source.node);
    }
    Verdict::refuse(settings, Reason::ClearText, source.node)
}

/// Decides by the addresses inside an overlay packet.
#[inline(always)]
fn ingress_inside<L: Lookup>(lookup: &L, flow: &Flow) -> Verdict {
    let settings = lookup.settings();
    let source = lookup.entry(&flow.source);
    let destination = lookup.entry(&flow.destination);
    // Anyone in the underlay can make an overlay packet. One that would reach a pod of this node must come out of the tunnel, whatever
    // source it names.
    let is_for_us = destination.path == PATH_LOCAL && destination.is_protected();
    if !source.is_protected() && !is_for_us {
        return Verdict::pass(Reason::Unprotected, 0);
    }
    if source.is_exempt() || destination.is_exempt() {
        return Verdict::pass(Reason::Plain, source.node);
    }
    if source.path == PATH_LOCAL {
        return Verdict::refuse(settings, Reason::SpoofedSource, source.node);
    }
    if arrives_in_the_clear(&source) {
        return Verdict::pass(Reason::Plain, source.node);
    }
    Verdict::refuse(settings, Reason::ClearText, source.node)
}

/// Decides on a packet that came out of the encryption device.
///
/// The tunnel has proven which node sent it, and that the node may send from its source address. What it may carry inside an overlay
/// packet is checked here: the same node must own both sources.
#[inline(always)]
pub fn decrypted<L: Lookup>(packet: &Packet, lookup: &L) -> Verdict {
    let settings = lookup.settings();
    match packet.shape {
        Shape::NotIp => return Verdict::pass(Reason::NotIp, 0),
        Shape::Unreadable => return Verdict::refuse(settings, Reason::Malformed, 0),
        Shape::Ip | Shape::OverlayOfNotIp | Shape::OverlayOfUnreadable | Shape::OverlayOfIp => {}
    }
    let source = lookup.entry(&packet.outer.source);
    let node = source.node;
    if source.path == PATH_LOCAL {
        return Verdict::refuse(settings, Reason::SpoofedSource, node);
    }
    if is_hidden(packet, settings) {
        return Verdict::refuse(settings, Reason::Malformed, node);
    }
    if packet.shape == Shape::Ip || !concerns_us(packet, lookup) {
        return Verdict::pass(Reason::Decrypted, node);
    }
    if !source.is_node() {
        return Verdict::refuse(settings, Reason::SpoofedSource, node);
    }
    if packet.shape == Shape::OverlayOfNotIp {
        return Verdict::refuse(settings, Reason::Malformed, node);
    }
    if lookup.entry(&packet.inner.source).node != node {
        return Verdict::refuse(settings, Reason::SpoofedSource, node);
    }
    Verdict::pass(Reason::Decrypted, node)
}

/// Whether an overlay packet is of our overlay, or has to do with protected addresses all the same.
#[inline(always)]
fn concerns_us<L: Lookup>(packet: &Packet, lookup: &L) -> bool {
    if lookup.settings().is_our_overlay(packet.vni) {
        return true;
    }
    packet.shape == Shape::OverlayOfIp
        && (lookup.entry(&packet.inner.source).is_protected() || lookup.entry(&packet.inner.destination).is_protected())
}

/// The mark with which a packet goes on that came from a pod: without our bits, and plain if the cluster's configuration says so.
#[inline(always)]
pub fn pod_mark<L: Lookup>(packet: &Packet, mark: u32, lookup: &L) -> u32 {
    let settings = lookup.settings();
    let cleared = mark & !(settings.tunnel_mask | settings.plain_mask);
    if packet.flow().is_none() {
        return cleared;
    }
    if leaves_in_the_clear(
        &lookup.entry(&packet.outer.source),
        &lookup.entry(&packet.outer.destination),
    ) {
        return cleared | settings.plain_mark;
    }
    cleared
}

/// Whether cluster configuration lets a pod's packet leave in the clear, by its two ends. A pod that has opted out speaks for what it sends,
/// not for what others send to it: they may not know yet that its address is another pod's now.
#[inline(always)]
fn leaves_in_the_clear(source: &Entry, destination: &Entry) -> bool {
    source.is_exempt() || destination.is_exempt() || source.has_opted_out()
}

/// Whether what arrives from here without encryption may do so.
#[inline(always)]
fn arrives_in_the_clear(source: &Entry) -> bool {
    source.path == PATH_PLAIN || source.has_opted_out()
}

/// Whether both ends are protected, and one of them is no node.
#[inline(always)]
fn involves_a_pod(source: &Entry, destination: &Entry) -> bool {
    source.is_protected() && destination.is_protected() && !(source.is_node() && destination.is_node())
}

/// Whether a packet's own addresses ask for nothing, so that what is inside decides alone.
#[inline(always)]
fn asks_for_nothing(verdict: &Verdict) -> bool {
    matches!(verdict.reason, Reason::Unprotected | Reason::OpenPort)
}

/// Whether a packet between nodes must never need the tunnel.
#[inline(always)]
fn stays_open(flow: &Flow, settings: &Settings) -> bool {
    flow.is_neighbour_discovery() || has_open_port(flow, settings)
}

#[inline(always)]
fn has_open_port(flow: &Flow, settings: &Settings) -> bool {
    if flow.upper != Upper::Ports {
        return false;
    }
    let source = open_port(flow.protocol, flow.source_port);
    let destination = open_port(flow.protocol, flow.destination_port);
    settings.open_ports.contains(&source) || settings.open_ports.contains(&destination)
}

#[inline(always)]
fn leaves_the_tunnel(flow: &Flow, settings: &Settings) -> bool {
    flow.is_udp() && settings.is_listen_port(flow.source_port)
}

#[inline(always)]
fn enters_the_tunnel(flow: &Flow, settings: &Settings) -> bool {
    flow.is_udp() && settings.is_listen_port(flow.destination_port)
}

/// Whether this is, or could be, an overlay packet with something inside that we cannot read.
#[inline(always)]
fn is_hidden(packet: &Packet, settings: &Settings) -> bool {
    packet.shape == Shape::OverlayOfUnreadable
        || (settings.has_overlay() && matches!(packet.outer.upper, Upper::Unreadable))
}
