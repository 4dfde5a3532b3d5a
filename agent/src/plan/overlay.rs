//! Who is reached through an overlay, and what that needs. Pure.
//!
//! A mesh changes its mode node by node and loses no packet, because the two directions are apart. A node *receives* in each overlay that
//! any node of the mesh sends in, and says so once its device is there. It *sends* in its own mode to those peers that said so, and
//! natively to all others. Whoever goes back to native sends so before it says so, and keeps the device until nobody sends in it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use shroud_keyd::announcement::Mode;
use shroud_keyd::{Peer, Snapshot};
use shroud_model::{Family, Mtu, NodeName, OverlayFormat, OverlayKind, Prefix};
use shroud_overlay::{Desired, Device, Mac, Vtep};
use shroud_routing::Hop;

use super::{PlannedPeer, outgoing};
use crate::config::{Config, Routing, RoutingMode};

/// A peer's other end of an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) kind: OverlayKind,
    /// The device of ours that leads there.
    pub(crate) device: &'static str,
    /// This node's underlay address.
    pub(crate) local: IpAddr,
    /// The peer's.
    pub(crate) remote: IpAddr,
}

/// How this node sends pod packets where it can.
pub(crate) fn mode(routing: &Routing, snapshot: &Snapshot, hops: &BTreeMap<IpAddr, Hop>) -> Mode {
    let on_link = |peer: &Peer| {
        let mut hops = peer.addresses.iter().filter_map(|address| hops.get(address));
        hops.any(|hop| outgoing(hop).is_some() && hop.via.is_none())
    };
    let near = |peer: &Peer| on_link(peer) || (routing.routable && peer.routable);
    match routing.mode {
        RoutingMode::Native => Mode::Native,
        RoutingMode::Vxlan => Mode::Vxlan,
        RoutingMode::Geneve => Mode::Geneve,
        RoutingMode::Auto if snapshot.peers.values().all(|peer| near(peer)) => Mode::Native,
        RoutingMode::Auto => Mode::Vxlan,
    }
}

/// The overlays somebody sends in.
pub(crate) fn kinds(mode: Mode, snapshot: &Snapshot) -> BTreeSet<OverlayKind> {
    let of_peers = snapshot.peers.values().filter_map(|peer| peer.mode.overlay());
    of_peers.chain(mode.overlay()).collect()
}

/// The devices that an overlay needs, each with this node's underlay address: VXLAN has sockets of one family.
pub(crate) fn devices(kind: OverlayKind, own_addresses: &BTreeSet<IpAddr>) -> Vec<(&'static str, IpAddr)> {
    let first = |family| {
        own_addresses
            .iter()
            .copied()
            .find(|address| Family::of(*address) == family)
    };
    match kind {
        OverlayKind::Vxlan => [("shroud.vxlan", Family::V4), ("shroud.vxlan6", Family::V6)]
            .into_iter()
            .filter_map(|(device, family)| Some((device, first(family)?)))
            .collect(),
        OverlayKind::Geneve => first(Family::V4)
            .or_else(|| first(Family::V6))
            .map(|local| ("shroud.geneve", local))
            .into_iter()
            .collect(),
    }
}

/// The overlay formats that can be received: those whose devices are all there.
pub(crate) fn received(
    routing: &Routing,
    kinds: &BTreeSet<OverlayKind>,
    own_addresses: &BTreeSet<IpAddr>,
    present: &BTreeSet<String>,
) -> Vec<OverlayFormat> {
    let is_there = |kind: &OverlayKind| {
        let needed = devices(*kind, own_addresses);
        !needed.is_empty() && needed.iter().all(|(device, _)| present.contains(*device))
    };
    kinds
        .iter()
        .copied()
        .filter(is_there)
        .map(|kind| routing.format(kind))
        .collect()
}

/// The overlay end through which a peer is sent to, or why it is not one: nothing where this node sends natively anyway.
pub(crate) fn end(
    config: &Config,
    mode: Mode,
    peer: &Peer,
    own_addresses: &BTreeSet<IpAddr>,
    hops: &BTreeMap<IpAddr, Hop>,
    present: &BTreeSet<String>,
) -> Result<Option<End>, String> {
    let Some(kind) = mode.overlay() else { return Ok(None) };
    let format = config.routing.format(kind);
    if !peer.overlays.contains(&format) {
        let others: Vec<String> = peer
            .overlays
            .iter()
            .filter(|other| other.kind == kind)
            .map(ToString::to_string)
            .collect();
        return match others.is_empty() {
            // It has yet to hear of us, or to make its device; that is how a change of mode begins.
            true => Ok(None),
            false => Err(format!(
                "it receives {}, this node sends {format}, so it is sent to natively: give both the same `routing.vni` and port",
                others.join(", ")
            )),
        };
    }
    let reachable = |address: &IpAddr| hops.get(address).and_then(outgoing).is_some();
    let pair = [Family::V4, Family::V6].into_iter().find_map(|family| {
        let of_family = |address: &&IpAddr| Family::of(**address) == family;
        let local = own_addresses.iter().find(of_family)?;
        let remote = peer
            .addresses
            .iter()
            .filter(of_family)
            .find(|address| reachable(address))?;
        Some((family, *local, *remote))
    });
    let Some((family, local, remote)) = pair else {
        return Err(format!(
            "it has no underlay address that {kind} could be sent to, so it is sent to natively"
        ));
    };
    let device = match (kind, family) {
        (OverlayKind::Vxlan, Family::V4) => "shroud.vxlan",
        (OverlayKind::Vxlan, Family::V6) => "shroud.vxlan6",
        (OverlayKind::Geneve, _) => "shroud.geneve",
    };
    if !present.contains(device) {
        return Ok(None);
    }
    Ok(Some(End {
        kind,
        device,
        local,
        remote,
    }))
}

/// The mesh address of a node: the network address of its first pod prefix of a family.
pub(crate) fn mesh_address(pod_prefixes: &BTreeSet<Prefix>, family: Family) -> Option<IpAddr> {
    let mut of_family = pod_prefixes.iter().filter(|prefix| prefix.family() == family);
    of_family.next().map(|prefix| prefix.address())
}

/// The devices and what they know of the peers that are sent to through them.
pub(crate) fn desired(
    config: &Config,
    kinds: &BTreeSet<OverlayKind>,
    own_addresses: &BTreeSet<IpAddr>,
    peers: &BTreeMap<NodeName, PlannedPeer>,
    smallest_tunnel: Mtu,
) -> Desired {
    let mut desired = Desired::default();
    for kind in kinds {
        for (name, local) in devices(*kind, own_addresses) {
            let through = |peer: &&PlannedPeer| peer.overlay.as_ref().is_some_and(|end| end.device == name);
            let mtu = peers.values().filter(through).map(|peer| peer.expected_mtu).max();
            let vteps = peers.iter().filter_map(|(node, peer)| vtep(name, node, peer)).collect();
            let device = Device {
                kind: *kind,
                vni: config.routing.vni,
                port: config.routing.format(*kind).port.get(),
                local,
                mac: Mac::of(config.node.id()),
                mtu: mtu.unwrap_or_else(|| smallest_tunnel.inside_overlay(Family::of(local))),
                vteps,
            };
            desired.devices.insert(name.to_owned(), device);
        }
    }
    desired
}

/// The next hop of routes to a peer's pods of a family, as its overlay device answers to it.
pub(crate) fn next_hop(node: &NodeName, pod_prefixes: &BTreeSet<Prefix>, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => mesh_address(pod_prefixes, family),
        Family::V6 => Some(Mac::of(node.id()).link_local().into()),
    }
}

fn vtep(device: &str, node: &NodeName, peer: &PlannedPeer) -> Option<Vtep> {
    let end = peer.overlay.as_ref().filter(|end| end.device == device)?;
    let pod_prefixes = &peer.verified.pod_prefixes;
    let families = pod_prefixes.iter().map(|prefix| prefix.family());
    Some(Vtep {
        mac: Mac::of(node.id()),
        underlay: end.remote,
        addresses: families
            .filter_map(|family| next_hop(node, pod_prefixes, family))
            .collect(),
    })
}
