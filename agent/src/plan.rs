//! What the kernel should look like: a pure function of the configuration, the directory and the facts of this machine.
//!
//! ```text
//!   Config ─┐
//!   Snapshot├─> plan() ─> Plan { tunnels, overlay, routing, gate }     no I/O, no clock, no memory
//!   Facts  ─┘
//! ```
//!
//! Every peer that cannot be encrypted to is fenced: the gate knows its prefixes and drops what goes there. There is no plan in which
//! a protected prefix is simply left out.

pub(crate) mod lane;
pub(crate) mod nodes;
pub(crate) mod overlay;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use shroud_ebpf::Table;
use shroud_keyd::announcement::{EncryptScope, Mode};
use shroud_keyd::{NodeKey, NodeKeys, OptOuts, Peer, Snapshot, Zone};
use shroud_model::{Family, Mtu, NodeName, OverlayFormat, OverlayKind, Prefix, PublicKey};
use shroud_routing::{Encapsulation, Facts, Hop, HopKind, Link, Route, Scope, Sysctl};
use shroud_tunnel::Backend;

use self::lane::{Lane, Pair};
use self::overlay::{End, mesh_address};
use crate::check::{Check, Problem};
use crate::config::{Config, Detect, GateMode};

/// How often a new tunnel is knocked at where idle ones are to be silent.
const KNOCKING: Duration = Duration::from_secs(25);

/// Everything a plan depends on.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) config: &'a Config,
    pub(crate) keys: &'a NodeKeys,
    pub(crate) backend: Backend,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) surroundings: &'a Surroundings,
}

/// What this machine looks like, apart from what is ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// Links and default routes.
    pub(crate) facts: Facts,
    /// How the kernel would reach each address that peers are said to have; absent when it cannot.
    pub(crate) hops: BTreeMap<IpAddr, Hop>,
    /// The devices behind which this node's pods are.
    pub(crate) pod_devices: BTreeSet<String>,
    /// The encryption devices there are.
    pub(crate) lanes: BTreeMap<Lane, LaneDevice>,
    /// The keys of peers that have more than one tunnel, and the lanes in which they have shaken hands not long ago.
    pub(crate) met: BTreeSet<(Lane, PublicKey)>,
    /// The overlay devices of ours that exist.
    pub(crate) overlay_devices: BTreeSet<String>,
    /// The largest packets that get to peers as far as probing knows, by mesh address.
    pub(crate) paths: BTreeMap<IpAddr, Mtu>,
}

/// An encryption device: WireGuard, and it works. One that only has the name would be a way out in the clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneDevice {
    /// Its number.
    pub(crate) index: u32,
    /// Whether it encrypts with the key of this node that belongs to its lane.
    pub(crate) has_our_key: bool,
}

impl Surroundings {
    /// The number of the encryption device of a lane, once it encrypts with this node's key.
    pub(crate) fn encryption_device(&self, lane: Lane) -> Option<u32> {
        let device = self.lanes.get(&lane).filter(|device| device.has_our_key)?;
        Some(device.index)
    }
}

/// What the kernel should look like, in each driver's own words.
pub(crate) struct Plan {
    /// The encryption devices by lane. One that is not in here is to go.
    pub(crate) tunnels: BTreeMap<Lane, shroud_tunnel::Desired>,
    pub(crate) overlay: shroud_overlay::Desired,
    pub(crate) routing: shroud_routing::Desired,
    pub(crate) gate: shroud_ebpf::Desired,
    /// The peers, as far as a reader of the status wants to know.
    pub(crate) peers: BTreeMap<NodeName, PlannedPeer>,
    /// This node's own addresses, as other nodes are told.
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// How this node sends pod packets where it can.
    pub(crate) mode: Mode,
    /// The overlay packets that this node can receive.
    pub(crate) received: Vec<OverlayFormat>,
    /// What keeps the plan from being as good as the operator wished.
    pub(crate) problems: Vec<Problem>,
}

impl Plan {
    /// Whether each encryption device that is to be there is, and encrypts.
    pub(crate) fn has_its_devices(&self, surroundings: &Surroundings) -> bool {
        let is_there = |lane: &Lane| surroundings.encryption_device(*lane).is_some();
        self.tunnels.keys().all(is_there)
    }
}

/// How one peer is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedPeer {
    /// All tunnels to it, those with the newest keys first; at least one.
    pub(crate) pairs: Vec<Pair>,
    /// Which of them is sent through.
    pub(crate) chosen: usize,
    /// The endpoint it has announced that we would contact, or `None` when none can be reached from here. Each lane has a port of its own.
    pub(crate) announced: Option<SocketAddr>,
    /// The largest packet that goes through the tunnel to it.
    pub(crate) tunnel_mtu: Mtu,
    /// The largest pod packet that gets to it, if the uplink's word is right: less than the above where an overlay wraps it.
    pub(crate) expected_mtu: Mtu,
    /// The largest pod packet that really gets to it: less than the above where probing found a narrow place.
    pub(crate) mtu: Mtu,
    /// The mesh address at which the path is probed.
    pub(crate) probe: Option<IpAddr>,
    /// The overlay that leads to it, or `None` where it is sent to natively.
    pub(crate) overlay: Option<End>,
    /// What the directory has verified of it.
    pub(crate) verified: Arc<Peer>,
    /// Whether the traffic of the two nodes themselves is encrypted too.
    pub(crate) encrypts_nodes: bool,
    /// The zone that both are in, where nothing inside a zone is to be encrypted.
    pub(crate) in_zone: Option<Zone>,
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
            devices.retain(|device| Lane::of_device(device, &config.encryption).is_none());
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
pub(crate) fn mesh_addresses(snapshot: &Snapshot) -> BTreeMap<Family, IpAddr> {
    let of_family = |family| Some((family, mesh_address(&snapshot.own.pod_prefixes, family)?));
    [Family::V4, Family::V6].into_iter().filter_map(of_family).collect()
}

/// Computes what the kernel should look like.
pub(crate) fn plan(view: &View<'_>) -> Plan {
    let View {
        config,
        keys,
        snapshot,
        surroundings,
        ..
    } = *view;
    let Surroundings {
        facts,
        hops,
        pod_devices,
        lanes,
        met,
        overlay_devices,
        paths,
    } = surroundings;
    let uplinks = uplinks(config, facts, hops);
    let addresses = node_addresses(config, facts, &uplinks);
    let mut problems = surrounding_problems(config, facts, &uplinks, &addresses);
    if snapshot.own.pod_prefixes.is_empty() {
        problems.push(Check::NoPodPrefix.says(
            "this node has no pod prefix yet: give its Node one in `spec.podCIDRs`, or name it in `podPrefixes`",
        ));
    }
    if config.encrypt.scope == EncryptScope::CrossZone && snapshot.own.zone.is_none() {
        problems.push(Check::NoZone.says(
            "`encrypt.scope` is cross-zone, and this node's Node has no label `topology.kubernetes.io/zone`: all is encrypted",
        ));
    }
    let mode = overlay::mode(&config.routing, snapshot, hops);
    let kinds = overlay::kinds(mode, snapshot);

    let mut peers = BTreeMap::new();
    for (name, peer) in &snapshot.peers {
        let pairs = lane::pairs(keys, peer);
        let has_met = |pair: &Pair| met.contains(&(pair.lane, pair.peer));
        let works = |pair: &Pair| has_met(pair) && surroundings.encryption_device(pair.lane).is_some();
        let chosen = lane::chosen(&pairs, works);
        let way = way(peer, &addresses, facts, hops, &uplinks);
        let mut planned = plan_peer(config, snapshot, peer, way, (pairs, chosen));
        match overlay::end(config, mode, peer, &addresses, hops, overlay_devices) {
            Ok(end) => planned.take(end),
            Err(problem) => planned.problems.push(Check::PeerOverlayDiffers.says(problem)),
        }
        planned.narrow(paths);
        peers.insert(name.clone(), planned);
    }
    let smallest_tunnel = smallest_tunnel_mtu(facts, &uplinks);
    let overlay = overlay::desired(config, &kinds, &addresses, &peers, smallest_tunnel);
    for device in overlay.devices.values() {
        problems.extend(
            device
                .conflicts()
                .iter()
                .map(|conflict| Check::OverlayConflict.says(conflict.to_string())),
        );
    }
    problems.extend(taken_over(snapshot, &peers));
    // What overlays and encrypted nodes send through the tunnel has node addresses outside.
    let nodes_in_the_tunnel = !kinds.is_empty() || config.encrypt.nodes;
    let allowed_ips = |planned: &PlannedPeer| {
        let mut allowed = planned.verified.pod_prefixes.clone();
        let others = planned
            .verified
            .addresses
            .iter()
            .filter(|address| !addresses.contains(*address));
        allowed.extend(
            others
                .filter(|_| nodes_in_the_tunnel)
                .map(|address| Prefix::host(*address)),
        );
        allowed
    };

    let tunnels = tunnels(view, &peers, allowed_ips);
    Plan {
        routing: routing(view, &tunnels, &peers, &addresses, &uplinks, &overlay, smallest_tunnel),
        gate: shroud_ebpf::Desired {
            uplinks,
            pod_devices: pod_devices.clone(),
            encryption: lanes.keys().map(|lane| lane.device(&config.encryption)).collect(),
            table: gate_table(view, &tunnels, &peers, &addresses, &kinds),
        },
        tunnels,
        overlay,
        received: overlay::received(&config.routing, &kinds, &addresses, overlay_devices),
        mode,
        peers,
        addresses,
        problems,
    }
}

/// The encryption devices: one for each pair of keys with which somebody can be reached, and at least the one in which nobody has a key to
/// come.
fn tunnels(
    view: &View<'_>,
    peers: &BTreeMap<NodeName, PlannedPeer>,
    allowed_ips: impl Fn(&PlannedPeer) -> BTreeSet<Prefix>,
) -> BTreeMap<Lane, shroud_tunnel::Desired> {
    let View { config, keys, .. } = *view;
    let device = |lane: Lane, key: &NodeKey| shroud_tunnel::Desired {
        device: lane.device(&config.encryption),
        backend: view.backend,
        private_key: Arc::clone(&key.private),
        public_key: key.public,
        listen_port: lane.listen_port(&config.encryption),
        mark: config.gate.tunnel_mark,
        peers: BTreeMap::new(),
    };
    let home = Lane::between(keys.current.epoch, keys.current.epoch);
    let mut tunnels = BTreeMap::from([(home, device(home, &keys.current))]);
    for planned in peers.values() {
        let allowed_ips = allowed_ips(planned);
        for (place, pair) in planned.pairs.iter().enumerate() {
            let key = keys.iter().find(|key| key.public == pair.own);
            let key = key.expect("a pair is made of a key that there is");
            let tunnel = tunnels.entry(pair.lane).or_insert_with(|| device(pair.lane, key));
            tunnel
                .peers
                .insert(pair.peer, tunnel_peer(planned, place, allowed_ips.clone(), config));
        }
    }
    tunnels
}

/// Addresses of our devices, the routes, and the kernel settings they need.
fn routing(
    view: &View<'_>,
    tunnels: &BTreeMap<Lane, shroud_tunnel::Desired>,
    peers: &BTreeMap<NodeName, PlannedPeer>,
    addresses: &BTreeSet<IpAddr>,
    uplinks: &BTreeSet<String>,
    overlay: &shroud_overlay::Desired,
    smallest_tunnel: Mtu,
) -> shroud_routing::Desired {
    let View {
        config,
        snapshot,
        surroundings,
        ..
    } = *view;
    let hops = &surroundings.hops;
    let mesh = mesh_addresses(snapshot);
    let (mut routes, mut rules) = (BTreeSet::new(), BTreeSet::new());
    for (name, planned) in peers {
        let peer = &planned.verified;
        for prefix in &peer.pod_prefixes {
            let route = route_to(*prefix, name, planned, &peer.addresses, config, hops, uplinks);
            routes.insert(Route {
                source: mesh.get(&prefix.family()).copied(),
                ..route
            });
        }
        let (to_node, by) = nodes::routes(config, peer, planned, addresses, hops);
        routes.extend(to_node);
        rules.extend(by);
    }
    let mut inside = mesh.clone();
    if !overlay.devices.is_empty() || config.encrypt.nodes {
        // Packets between node addresses come out of the tunnel; without IPv4 pods its device would have no IPv4 address either, see below.
        let own = addresses.iter().find(|address| Family::of(**address) == Family::V4);
        if let Some(own) = own {
            inside.entry(Family::V4).or_insert(*own);
        }
    }
    let encryption = Link {
        mtu: peers
            .values()
            .map(|peer| peer.tunnel_mtu)
            .max()
            .unwrap_or(smallest_tunnel),
        addresses: inside.into_values().collect(),
    };
    let devices = tunnels.values().map(|tunnel| tunnel.device.clone());
    let mut links: BTreeMap<String, Link> = devices.map(|device| (device, encryption.clone())).collect();
    for (name, device) in &overlay.devices {
        if surroundings.overlay_devices.contains(name) {
            // On a device without any IPv4 address even the loose reverse-path check drops all that does not answer on that very device
            // (`__fib_validate_source`), as during a change of mode, or from an address of a node.
            let link = Link {
                mtu: device.mtu,
                addresses: mesh.get(&Family::V4).copied().into_iter().collect(),
            };
            links.insert(name.clone(), link);
        }
    }
    // Return routes point at the uplink, so a strict reverse-path check would drop every decrypted packet; and during a change of mode a
    // peer answers by another way than it is asked. The kernel uses the larger of the device's value and `all`, so only 2 (loose) says
    // the same thing on every system.
    let mut sysctls: BTreeMap<Sysctl, String> = links
        .keys()
        .map(|device| (Sysctl::RpFilter(device.clone()), "2".to_owned()))
        .collect();
    sysctls.extend([Family::V4, Family::V6].map(|family| (Sysctl::Forwarding(family), "1".to_owned())));
    shroud_routing::Desired {
        links,
        routes,
        rules,
        sysctls,
    }
}

/// This node's own pod prefixes that a peer claims a part of.
fn taken_over(snapshot: &Snapshot, peers: &BTreeMap<NodeName, PlannedPeer>) -> Vec<Problem> {
    let is_taken = |own: &&Prefix| {
        let mut others = peers.values().flat_map(|peer| &peer.verified.pod_prefixes);
        others.any(|prefix| prefix.overlaps(**own))
    };
    let overlaps =
        |own: &Prefix| Check::PrefixOverlaps.says(format!("a peer's pod prefix overlaps this node's own {own}"));
    snapshot
        .own
        .pod_prefixes
        .iter()
        .filter(is_taken)
        .map(overlaps)
        .collect()
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

/// The zone that a peer shares with this node, where both want nothing encrypted inside a zone. A node without a zone shares none.
fn shared_zone<'a>(config: &Config, snapshot: &'a Snapshot, peer: &Peer) -> Option<&'a Zone> {
    let both = config.encrypt.scope == EncryptScope::CrossZone && peer.scope == EncryptScope::CrossZone;
    let own = snapshot.own.zone.as_ref().filter(|_| both);
    own.filter(|own| peer.zone.as_ref() == Some(*own))
}

/// How a peer's underlay address is reached.
struct Way {
    /// The first endpoint of those announced that can be reached.
    endpoint: Option<SocketAddr>,
    /// The largest packet that goes through the tunnel.
    mtu: Mtu,
    problems: Vec<Problem>,
}

fn way(
    peer: &Peer,
    own_addresses: &BTreeSet<IpAddr>,
    facts: &Facts,
    hops: &BTreeMap<IpAddr, Hop>,
    uplinks: &BTreeSet<String>,
) -> Way {
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
    Way {
        endpoint: way.map(|(endpoint, ..)| endpoint),
        mtu,
        problems,
    }
}

fn plan_peer(
    config: &Config,
    snapshot: &Snapshot,
    peer: &Arc<Peer>,
    way: Way,
    (pairs, chosen): (Vec<Pair>, usize),
) -> PlannedPeer {
    PlannedPeer {
        pairs,
        chosen,
        announced: way.endpoint,
        tunnel_mtu: way.mtu,
        expected_mtu: way.mtu,
        mtu: way.mtu,
        probe: mesh_address(&peer.pod_prefixes, Family::V4).or_else(|| mesh_address(&peer.pod_prefixes, Family::V6)),
        overlay: None,
        verified: Arc::clone(peer),
        encrypts_nodes: nodes::are_encrypted(config, snapshot, peer),
        in_zone: shared_zone(config, snapshot, peer).cloned(),
        problems: way.problems,
    }
}

impl PlannedPeer {
    /// The tunnel that is sent through.
    pub(crate) fn pair(&self) -> &Pair {
        &self.pairs[self.chosen]
    }

    /// Where that tunnel leads.
    pub(crate) fn endpoint(&self) -> Option<SocketAddr> {
        self.pair().lane.endpoint(self.announced?)
    }

    /// Sends to the peer through an overlay, if there is one.
    fn take(&mut self, end: Option<End>) {
        if let Some(end) = &end {
            self.expected_mtu = self.tunnel_mtu.inside_overlay(Family::of(end.remote));
            self.mtu = self.expected_mtu;
        }
        self.overlay = end;
    }

    /// Makes packets smaller where probing found that the path carries less than the uplink promises.
    fn narrow(&mut self, paths: &BTreeMap<IpAddr, Mtu>) {
        if let Some(found) = self.probe.and_then(|address| paths.get(&address)) {
            self.mtu = self.expected_mtu.min(*found);
        }
    }

    /// The largest packet between the two nodes themselves, which no overlay wraps.
    pub(crate) fn node_mtu(&self) -> Mtu {
        let overhead = self.tunnel_mtu.bytes() - self.expected_mtu.bytes();
        Mtu::new(self.mtu.bytes() + overhead).unwrap_or(self.tunnel_mtu)
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

/// The route to a peer's pods: through the overlay where one leads there, else the way the kernel reaches the node itself, so that the
/// uplink's gate sees the packet and turns it into the encryption device. The next hop is the node's own or the gateway before it, of the
/// prefix's family; an IPv4 prefix may also go over an IPv6 next hop (RFC 5549). Where none is to be had, the encryption device itself is
/// the way.
fn route_to(
    prefix: Prefix,
    node: &NodeName,
    peer: &PlannedPeer,
    node_addresses: &[IpAddr],
    config: &Config,
    hops: &BTreeMap<IpAddr, Hop>,
    uplinks: &BTreeSet<String>,
) -> Route {
    let route = Route {
        destination: prefix,
        device: peer.pair().lane.device(&config.encryption),
        via: None,
        source: None,
        mtu: Some(peer.mtu),
        onlink: false,
        encapsulation: None,
        table: shroud_routing::Table::Main,
    };
    if let Some(end) = &peer.overlay {
        return Route {
            device: end.device.to_owned(),
            via: overlay::next_hop(node, &peer.verified.pod_prefixes, prefix.family()),
            onlink: prefix.family() == Family::V4,
            encapsulation: (end.kind == OverlayKind::Geneve).then(|| Encapsulation {
                id: config.routing.vni.number(),
                source: end.local,
                destination: end.remote,
            }),
            ..route
        };
    }
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
    match over_the_uplink {
        Some((device, via)) => Route {
            device,
            via: Some(via),
            ..route
        },
        None => route,
    }
}

/// A peer in one of its tunnels. Until a newer tunnel has shaken hands somebody must knock; an older one falls silent, which tells the other
/// end that nothing comes through it any more.
fn tunnel_peer(
    peer: &PlannedPeer,
    place: usize,
    allowed_ips: BTreeSet<Prefix>,
    config: &Config,
) -> shroud_tunnel::Peer {
    let keepalive = Some(*config.encryption.keepalive).filter(|keepalive| !keepalive.is_zero());
    shroud_tunnel::Peer {
        endpoint: peer
            .announced
            .and_then(|announced| peer.pairs[place].lane.endpoint(announced)),
        allowed_ips,
        preshared_key: None,
        keepalive: match place.cmp(&peer.chosen) {
            Ordering::Less => keepalive.or(Some(KNOCKING)),
            Ordering::Equal => keepalive,
            Ordering::Greater => None,
        },
    }
}

/// The pods that have opted out: nobody where the configuration does not let them, `None` while nobody can say.
pub(crate) fn opted_out<'a>(config: &Config, snapshot: &'a Snapshot) -> Option<&'a OptOuts> {
    static NOBODY: OptOuts = OptOuts::new();

    if config.encrypt.opt_out {
        snapshot.opted_out.as_ref()
    } else {
        Some(&NOBODY)
    }
}

/// The gate's table: what is protected, who owns it, and whether there is an encrypted path to the owner.
fn gate_table(
    view: &View<'_>,
    tunnels: &BTreeMap<Lane, shroud_tunnel::Desired>,
    peers: &BTreeMap<NodeName, PlannedPeer>,
    own_addresses: &BTreeSet<IpAddr>,
    kinds: &BTreeSet<OverlayKind>,
) -> Table {
    use shroud_ebpf::{Owner, Path};

    let View {
        config,
        snapshot,
        surroundings,
        ..
    } = *view;
    let device = |name: &NodeName| surroundings.encryption_device(peers.get(name)?.pair().lane);
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
        let path = match shared_zone(config, snapshot, peer) {
            Some(_) => Path::Plain,
            None => Path::Encrypted(device(name)),
        };
        let node = name.id();
        owners.extend(peer.pod_prefixes.iter().map(|prefix| (*prefix, Owner { node, path })));
    }
    owners.extend(snapshot.own.pod_prefixes.iter().map(|prefix| {
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
        listen_ports: tunnels.values().map(|tunnel| tunnel.listen_port).collect(),
        tunnel_mark: config.gate.tunnel_mark,
        plain_mark: config.gate.plain_mark,
        protected: config.protected.clone(),
        owners,
        exempt: config.exempt.clone(),
        opted_out: opted_out(config, snapshot)
            .into_iter()
            .flat_map(OptOuts::keys)
            .copied()
            .collect(),
        nodes: nodes::table(config, snapshot, own_addresses, device),
        open_ports: config.encrypt.open_ports.clone(),
        overlay: (!kinds.is_empty()).then(|| config.routing.vni.number()),
        // The usual ports too: somebody else's overlay hides our pods' packets just as well.
        vxlan_ports: BTreeSet::from([4789, 8472, config.routing.vxlan_port.get()]),
        geneve_ports: BTreeSet::from([6081, config.routing.geneve_port.get()]),
    }
}

#[cfg(test)]
pub(crate) mod tests;
