//! What the kernel should look like: a pure function of the configuration, the directory and the facts of this machine.
//!
//! ```text
//!   Config ─┐
//!   Snapshot├─> plan() ─> Plan { tunnel, routing, gate }     no I/O, no clock, no memory
//!   Facts  ─┘
//! ```
//!
//! Every peer that cannot be encrypted to is fenced: the gate knows its prefixes and drops what goes there. There is no plan in which
//! a protected prefix is simply left out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use shroud_keyd::{NodeKey, Snapshot};
use shroud_model::{Family, Mtu, NodeName, Prefix, PublicKey};
use shroud_routing::{Facts, Hop, HopKind, Link, Route, Scope, Sysctl};
use shroud_tunnel::Backend;

use crate::check::{Check, Problem};
use crate::config::{Config, Detect, GateMode};

/// Everything a plan depends on.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) config: &'a Config,
    pub(crate) key: &'a NodeKey,
    pub(crate) backend: Backend,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) surroundings: &'a Surroundings,
}

/// What this machine looks like, apart from what is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// Links and default routes.
    pub(crate) facts: Facts,
    /// How the kernel would reach each address that peers are said to have; absent when it cannot.
    pub(crate) hops: BTreeMap<IpAddr, Hop>,
    /// The devices behind which this node's pods are.
    pub(crate) pod_devices: BTreeSet<String>,
    /// The encryption device's number, once it really is one that encrypts with this node's key. A device that only has the name would be
    /// a way out in the clear.
    pub(crate) encryption_device: Option<u32>,
}

/// What the kernel should look like, in each driver's own words.
pub(crate) struct Plan {
    pub(crate) tunnel: shroud_tunnel::Desired,
    pub(crate) routing: shroud_routing::Desired,
    pub(crate) gate: shroud_ebpf::Desired,
    /// The peers, as far as a reader of the status wants to know.
    pub(crate) peers: BTreeMap<NodeName, PlannedPeer>,
    /// This node's own addresses, as other nodes are told.
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// What keeps the plan from being as good as the operator wished.
    pub(crate) problems: Vec<Problem>,
}

/// How one peer is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedPeer {
    pub(crate) public_key: PublicKey,
    /// The endpoint we would contact, or `None` when none of its endpoints can be reached from here.
    pub(crate) endpoint: Option<SocketAddr>,
    /// The largest pod packet that goes through the tunnel to it.
    pub(crate) mtu: Mtu,
    pub(crate) pod_prefixes: BTreeSet<Prefix>,
    pub(crate) problems: Vec<Problem>,
}

/// The addresses whose next hop a plan wants to know.
pub(crate) fn addresses_of_interest(snapshot: &Snapshot) -> BTreeSet<IpAddr> {
    snapshot
        .peers
        .values()
        .flat_map(|peer| {
            peer.endpoints
                .iter()
                .map(SocketAddr::ip)
                .chain(peer.addresses.iter().copied())
        })
        .collect()
}

/// The device by which a packet leaves this node, or `None` when it does not leave.
pub(crate) fn outgoing(hop: &Hop) -> Option<&str> {
    if hop.kind == HopKind::Unicast {
        hop.device.as_deref()
    } else {
        None
    }
}

/// The devices that lead to the underlay.
pub(crate) fn uplinks(config: &Config, facts: &Facts, hops: &BTreeMap<IpAddr, Hop>) -> BTreeSet<String> {
    match &config.uplinks {
        Detect::Given(devices) => devices.clone(),
        Detect::Auto => {
            let reaching_a_peer = hops.values().filter_map(outgoing).map(str::to_owned);
            let mut devices: BTreeSet<String> = facts
                .default_route_devices
                .iter()
                .cloned()
                .chain(reaching_a_peer)
                .collect();
            devices.remove(&config.encryption.device);
            devices
        }
    }
}

/// The addresses at which other nodes reach this one.
pub(crate) fn node_addresses(config: &Config, facts: &Facts, uplinks: &BTreeSet<String>) -> BTreeSet<IpAddr> {
    match &config.addresses {
        Detect::Given(addresses) => addresses.clone(),
        Detect::Auto => uplinks
            .iter()
            .filter_map(|device| facts.links.get(device))
            .flat_map(|link| link.addresses.iter())
            .filter(|address| address.scope == Scope::Global)
            .map(|address| address.address)
            .filter(|address| !config.protected.iter().any(|range| range.contains(*address)))
            .collect(),
    }
}

/// The address of this node inside the mesh, one per family: the network address of its first pod prefix.
///
/// It sits on the encryption device and is the source of what the node itself sends to remote pods, so that this traffic is protected
/// too. CNI plugins hand out neither the network address nor the one behind it (host-local IPAM), so it is nobody else's.
pub(crate) fn mesh_addresses(config: &Config) -> BTreeMap<Family, IpAddr> {
    let mut addresses = BTreeMap::new();
    for prefix in &config.pod_prefixes {
        addresses.entry(prefix.family()).or_insert(prefix.address());
    }
    addresses
}

/// Computes what the kernel should look like.
pub(crate) fn plan(view: &View<'_>) -> Plan {
    let View {
        config,
        key,
        backend,
        snapshot,
        surroundings,
    } = *view;
    let Surroundings {
        facts,
        hops,
        pod_devices,
        encryption_device,
    } = surroundings;
    let device = &config.encryption.device;
    let uplinks = uplinks(config, facts, hops);
    let addresses = node_addresses(config, facts, &uplinks);
    let mut problems = surrounding_problems(config, facts, &uplinks, &addresses);

    let peers: BTreeMap<NodeName, PlannedPeer> = snapshot
        .peers
        .iter()
        .map(|(name, peer)| (name.clone(), plan_peer(peer, &addresses, facts, hops, &uplinks)))
        .collect();
    let device_mtu = peers
        .values()
        .map(|peer| peer.mtu)
        .max()
        .unwrap_or_else(|| smallest_tunnel_mtu(facts, &uplinks));

    let mut routes = BTreeSet::new();
    for (name, planned) in &peers {
        let node_addresses = &snapshot.peers[name].addresses;
        for prefix in &planned.pod_prefixes {
            routes.insert(route_to(*prefix, planned, node_addresses, config, hops, &uplinks));
        }
    }
    for prefix in &config.pod_prefixes {
        let taken_over = routes.iter().any(|route| route.destination.overlaps(*prefix));
        if taken_over {
            problems.push(Check::PrefixOverlaps.says(format!("a peer's pod prefix overlaps this node's own {prefix}")));
        }
    }

    Plan {
        tunnel: shroud_tunnel::Desired {
            device: device.clone(),
            backend,
            private_key: Arc::clone(&key.private),
            public_key: key.public,
            listen_port: config.encryption.listen_port,
            mark: config.gate.tunnel_mark,
            peers: peers
                .values()
                .map(|peer| (peer.public_key, tunnel_peer(peer, config)))
                .collect(),
        },
        routing: shroud_routing::Desired {
            links: BTreeMap::from([(
                device.clone(),
                Link {
                    mtu: device_mtu,
                    addresses: mesh_addresses(config).into_values().collect(),
                },
            )]),
            routes,
            sysctls: BTreeMap::from([
                (Sysctl::Forwarding(Family::V4), "1".to_owned()),
                (Sysctl::Forwarding(Family::V6), "1".to_owned()),
                // Return routes point at the uplink, so a strict reverse-path check would drop every decrypted packet. The kernel uses
                // the larger of the device's value and `all`, so only 2 (loose) says the same thing on every system.
                (Sysctl::RpFilter(device.clone()), "2".to_owned()),
            ]),
        },
        gate: shroud_ebpf::Desired {
            uplinks,
            pod_devices: pod_devices.clone(),
            table: gate_table(config, snapshot, *encryption_device),
        },
        peers,
        addresses,
        problems,
    }
}

fn surrounding_problems(
    config: &Config,
    facts: &Facts,
    uplinks: &BTreeSet<String>,
    addresses: &BTreeSet<IpAddr>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    if uplinks.is_empty() {
        problems.push(
            Check::NoUplink.says("no uplink: no device has a default route or reaches a peer; name them in `uplinks`"),
        );
    }
    for device in uplinks.iter().filter(|device| !facts.links.contains_key(*device)) {
        problems.push(Check::UplinkMissing.says(format!(
            "uplink {device} does not exist; correct `uplinks`, or bring the device up"
        )));
    }
    if addresses.is_empty() {
        problems.push(Check::NoAddress.says(
            "no address at which a peer could reach this node; give the uplink one, or name them in `addresses`",
        ));
    }
    for address in addresses
        .iter()
        .filter(|address| config.protected.iter().any(|range| range.contains(**address)))
    {
        problems.push(Check::AddressProtected.says(format!(
            "this node's address {address} lies in `protected`: its own tunnel would need a tunnel"
        )));
    }
    problems
}

fn plan_peer(
    peer: &shroud_keyd::Peer,
    own_addresses: &BTreeSet<IpAddr>,
    facts: &Facts,
    hops: &BTreeMap<IpAddr, Hop>,
    uplinks: &BTreeSet<String>,
) -> PlannedPeer {
    let mut problems = Vec::new();
    let reachable = own_addresses
        .iter()
        .map(|address| Family::of(*address))
        .collect::<BTreeSet<_>>();
    let way = peer
        .endpoints
        .iter()
        .filter(|endpoint| reachable.contains(&Family::of(endpoint.ip())))
        .find_map(|endpoint| {
            let hop = hops.get(&endpoint.ip())?;
            Some((*endpoint, outgoing(hop)?, hop.mtu))
        });
    let mtu = match way {
        Some((endpoint, device, path_mtu)) => {
            if !uplinks.contains(device) {
                problems.push(Check::PeerNotOverUplink.says(format!(
                    "{} is reached over {device}, which is no uplink: name it in `uplinks`",
                    endpoint.ip()
                )));
            }
            link_mtu(facts, device, path_mtu).inside_wireguard(Family::of(endpoint.ip()))
        }
        None => {
            let tried: Vec<String> = peer.endpoints.iter().map(ToString::to_string).collect();
            problems.push(Check::PeerUnreachable.says(format!(
                "no route to any of its endpoints ({}): check the underlay's routes",
                tried.join(", ")
            )));
            smallest_tunnel_mtu(facts, uplinks)
        }
    };
    let endpoint = way.map(|(endpoint, ..)| endpoint);
    PlannedPeer {
        public_key: peer.public_key,
        endpoint,
        mtu,
        pod_prefixes: peer.pod_prefixes.clone(),
        problems,
    }
}

/// The size of packets that fit a path: the route's, else the device's.
fn link_mtu(facts: &Facts, device: &str, path_mtu: Option<u32>) -> Mtu {
    let bytes = path_mtu.or_else(|| facts.links.get(device).map(|link| link.mtu));
    bytes.and_then(|bytes| Mtu::new(bytes).ok()).unwrap_or(Mtu::ETHERNET)
}

/// The tunnel size that fits through every uplink whatever the underlay's family.
fn smallest_tunnel_mtu(facts: &Facts, uplinks: &BTreeSet<String>) -> Mtu {
    let smallest = uplinks.iter().map(|device| link_mtu(facts, device, None)).min();
    smallest.unwrap_or(Mtu::ETHERNET).inside_wireguard(Family::V6)
}

/// The route to a peer's pods: the way the kernel reaches the node itself, so that the uplink's gate sees the packet and turns it into the
/// encryption device. The next hop is the node's own or the gateway before it, of the prefix's family; an IPv4 prefix may also go over an
/// IPv6 next hop (RFC 5549). Where none is to be had, the encryption device itself is the way.
fn route_to(
    prefix: Prefix,
    peer: &PlannedPeer,
    node_addresses: &[IpAddr],
    config: &Config,
    hops: &BTreeMap<IpAddr, Hop>,
    uplinks: &BTreeSet<String>,
) -> Route {
    let next_hop = |family: Family| {
        node_addresses
            .iter()
            .filter(|address| Family::of(**address) == family)
            .find_map(|address| {
                let hop = hops.get(address)?;
                let device = outgoing(hop).filter(|device| uplinks.contains(*device))?;
                Some((device.to_owned(), hop.via.unwrap_or(*address)))
            })
    };
    let over_the_uplink = match prefix.family() {
        Family::V4 => next_hop(Family::V4).or_else(|| next_hop(Family::V6)),
        Family::V6 => next_hop(Family::V6),
    };
    let (device, via) = match over_the_uplink {
        Some((device, via)) => (device, Some(via)),
        None => (config.encryption.device.clone(), None),
    };
    let source = mesh_addresses(config).get(&prefix.family()).copied();
    Route {
        destination: prefix,
        device,
        via,
        source,
        mtu: Some(peer.mtu),
    }
}

fn tunnel_peer(peer: &PlannedPeer, config: &Config) -> shroud_tunnel::Peer {
    let keepalive = *config.encryption.keepalive;
    shroud_tunnel::Peer {
        endpoint: peer.endpoint,
        allowed_ips: peer.pod_prefixes.clone(),
        preshared_key: None,
        keepalive: (!keepalive.is_zero()).then_some(keepalive),
    }
}

/// The gate's table: what is protected, who owns it, and whether there is an encrypted path to the owner.
fn gate_table(config: &Config, snapshot: &Snapshot, encryption_device: Option<u32>) -> shroud_ebpf::Table {
    use shroud_ebpf::{Owner, Path, Table};

    let mut owners = BTreeMap::new();
    for (name, refused) in &snapshot.refused {
        owners.extend(refused.pod_prefixes.iter().map(|prefix| {
            (
                *prefix,
                Owner {
                    node: name.id(),
                    path: Path::Fenced,
                },
            )
        }));
    }
    for (name, peer) in &snapshot.peers {
        owners.extend(peer.pod_prefixes.iter().map(|prefix| {
            (
                *prefix,
                Owner {
                    node: name.id(),
                    path: Path::Encrypted,
                },
            )
        }));
    }
    owners.extend(config.pod_prefixes.iter().map(|prefix| {
        (
            *prefix,
            Owner {
                node: config.node.id(),
                path: Path::Local,
            },
        )
    }));
    Table {
        mode: match config.gate.mode {
            GateMode::Enforce => shroud_ebpf::Mode::Enforce,
            GateMode::Audit => shroud_ebpf::Mode::Audit,
            GateMode::Off => shroud_ebpf::Mode::Off,
        },
        encryption_device,
        listen_port: config.encryption.listen_port,
        tunnel_mark: config.gate.tunnel_mark,
        plain_mark: config.gate.plain_mark,
        protected: config.protected.clone(),
        owners,
        exempt: config.exempt.clone(),
        vxlan_ports: BTreeSet::from([4789, 8472]),
        geneve_ports: BTreeSet::from([6081]),
    }
}

#[cfg(test)]
mod tests;
