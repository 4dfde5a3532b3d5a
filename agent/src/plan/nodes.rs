//! Traffic of the nodes themselves: whose each underlay address is, and which traffic to it is encrypted. Pure.
//!
//! Two nodes encrypt their own traffic once both ask for it, so that nobody is cut off by a neighbour that cannot. From then on a neighbour
//! whose key is gone or refused is fenced, but for the open ports by which it comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use shroud_ebpf::{Node, NodePath};
use shroud_keyd::{Peer, Snapshot};
use shroud_model::{Family, NodeName, Prefix};
use shroud_routing::{Hop, Route, Rule, Table};

use super::{PlannedPeer, outgoing, shared_zone};
use crate::config::Config;

/// Whether traffic between this node and a peer is encrypted.
pub(crate) fn are_encrypted(config: &Config, snapshot: &Snapshot, peer: &Peer) -> bool {
    config.encrypt.nodes && peer.encrypts_nodes && shared_zone(config, snapshot, peer).is_none()
}

/// The gate's view of all underlay addresses. This node's own come last: nobody else can have them.
pub(crate) fn table(
    config: &Config,
    snapshot: &Snapshot,
    own_addresses: &BTreeSet<IpAddr>,
    device: impl Fn(&NodeName) -> Option<u32>,
) -> BTreeMap<IpAddr, Node> {
    let mut nodes = BTreeMap::new();
    for (name, refused) in snapshot.refused.iter().filter(|_| config.encrypt.nodes) {
        let fenced = Node {
            node: name.id(),
            path: NodePath::Fenced,
        };
        nodes.extend(refused.addresses.iter().map(|address| (*address, fenced)));
    }
    for (name, peer) in &snapshot.peers {
        let known = Node {
            node: name.id(),
            path: if are_encrypted(config, snapshot, peer) {
                NodePath::Encrypted(device(name))
            } else {
                NodePath::Open
            },
        };
        nodes.extend(peer.addresses.iter().map(|address| (*address, known)));
    }
    let own = Node {
        node: config.node.id(),
        path: if config.encrypt.nodes {
            NodePath::LocalProtected
        } else {
            NodePath::LocalOpen
        },
    };
    nodes.extend(own_addresses.iter().map(|address| (*address, own)));
    nodes
}

/// Routes to the nodes whose traffic is encrypted, the kernel's own but for the smaller size, and the rule that leads all but the tunnel's
/// own packets to them.
pub(crate) fn routes(
    config: &Config,
    peer: &Peer,
    planned: &PlannedPeer,
    own_addresses: &BTreeSet<IpAddr>,
    hops: &BTreeMap<IpAddr, Hop>,
) -> (BTreeSet<Route>, BTreeSet<Rule>) {
    let (mut routes, mut rules) = (BTreeSet::new(), BTreeSet::new());
    if !planned.encrypts_nodes {
        return (routes, rules);
    }
    for address in peer
        .addresses
        .iter()
        .filter(|address| !own_addresses.contains(*address))
    {
        let Some(hop) = hops.get(address) else { continue };
        let Some(device) = outgoing(hop) else { continue };
        routes.insert(Route {
            destination: Prefix::host(*address),
            device: device.to_owned(),
            via: hop.via,
            source: hop.source,
            mtu: Some(planned.node_mtu()),
            onlink: false,
            encapsulation: None,
            table: Table::Node,
        });
        rules.insert(Rule {
            family: Family::of(*address),
            unless: config.gate.tunnel_mark,
        });
    }
    (routes, rules)
}
