use std::path::Path;

use proptest::prelude::*;
use shroud_ebpf::{Owner, Path as Way};
use shroud_keyd::directory::{Origin, Refused};
use shroud_keyd::{Peer, Reason};
use shroud_model::PrivateKey;
use shroud_routing::{Address, LinkFacts};

use super::*;

#[test]
fn a_peer_on_the_same_link_is_routed_to_directly_and_encrypted_to() {
    let world = World::new().peer(
        "b",
        2,
        &["172.18.0.2", "fd18::2"],
        &["10.244.2.0/24", "fd00:10:244:2::/64"],
    );

    let plan = world.plan();

    assert_eq!(
        shown(&plan),
        [
            "10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440",
            "fd00:10:244:2::/64 via fd18::2 dev eth0 src fd00:10:244:1:: mtu 1440",
        ]
    );
    let peer = &plan.tunnel.peers[&key(2)];
    assert_eq!(peer.endpoint, Some("172.18.0.2:51820".parse().unwrap()));
    assert_eq!(peer.allowed_ips, prefixes(&["10.244.2.0/24", "fd00:10:244:2::/64"]));
    assert_eq!(
        plan.gate.table.owners[&prefix("10.244.2.0/24")],
        Owner {
            node: name("b").id(),
            path: Way::Encrypted
        }
    );
    assert_eq!(
        plan.gate.table.owners[&prefix("10.244.1.0/24")],
        Owner {
            node: name("a").id(),
            path: Way::Local
        }
    );
    assert_eq!(plan.problems, []);
}

#[test]
fn a_peer_behind_a_gateway_is_routed_to_the_gateway() {
    let mut world = World::new().peer("b", 2, &["172.19.0.2"], &["10.244.2.0/24"]);
    world
        .surroundings
        .hops
        .insert(ip("172.19.0.2"), hop("eth0", Some("172.18.0.254"), None));

    assert_eq!(
        shown(&world.plan()),
        ["10.244.2.0/24 via 172.18.0.254 dev eth0 src 10.244.1.0 mtu 1440"]
    );
}

#[test]
fn a_prefix_without_a_next_hop_of_its_family_goes_into_the_encryption_device() {
    let world = World::new().peer("b", 2, &["172.18.0.2"], &["fd00:10:244:2::/64"]);

    assert_eq!(
        shown(&world.plan()),
        ["fd00:10:244:2::/64 dev shroud0 src fd00:10:244:1:: mtu 1440"]
    );
}

#[test]
fn an_ipv4_prefix_goes_over_an_ipv6_next_hop_where_there_is_no_other() {
    let world = World::new().peer("b", 2, &["fd18::2"], &["10.244.2.0/24"]);

    assert_eq!(
        shown(&world.plan()),
        ["10.244.2.0/24 via fd18::2 dev eth0 src 10.244.1.0 mtu 1420"]
    );
}

#[test]
fn the_route_has_the_mtu_of_the_path_to_its_peer() {
    let mut world = World::new().peer("b", 2, &["172.18.0.2"], &["10.244.2.0/24"]).peer(
        "c",
        3,
        &["fd18::3"],
        &["fd00:10:244:3::/64"],
    );
    world
        .surroundings
        .hops
        .insert(ip("172.18.0.2"), hop("eth0", None, Some(1400)));

    let plan = world.plan();

    assert_eq!(
        shown(&plan),
        [
            "10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1340",
            "fd00:10:244:3::/64 via fd18::3 dev eth0 src fd00:10:244:1:: mtu 1420",
        ]
    );
    assert_eq!(plan.routing.links["shroud0"].mtu.bytes(), 1420);
}

#[test]
fn a_refused_node_is_fenced_and_gets_no_route_and_no_peer() {
    let world = World::new().refused("b", &["10.244.2.0/24"]);

    let plan = world.plan();

    assert_eq!(shown(&plan), Vec::<String>::new());
    assert!(plan.tunnel.peers.is_empty());
    assert_eq!(
        plan.gate.table.owners[&prefix("10.244.2.0/24")],
        Owner {
            node: name("b").id(),
            path: Way::Fenced
        }
    );
}

#[test]
fn an_unreachable_peer_stays_a_peer_and_is_reported() {
    let mut world = World::new().peer("b", 2, &["172.18.0.2"], &["10.244.2.0/24"]);
    world.surroundings.hops.clear();

    let plan = world.plan();

    assert_eq!(plan.peers[&name("b")].endpoint, None);
    assert_eq!(
        plan.peers[&name("b")].problems,
        [Check::PeerUnreachable
            .says("no route to any of its endpoints (172.18.0.2:51820): check the underlay's routes")]
    );
    assert_eq!(shown(&plan), ["10.244.2.0/24 dev shroud0 src 10.244.1.0 mtu 1420"]);
}

#[test]
fn a_device_that_does_not_encrypt_with_our_key_is_never_the_gates_way_out() {
    let mut world = World::new().peer("b", 2, &["172.18.0.2"], &["10.244.2.0/24"]);
    world.surroundings.encryption_device = None;

    assert_eq!(world.plan().gate.table.encryption_device, None);
}

#[test]
fn a_machine_without_uplink_or_address_says_so() {
    let mut world = World::new();
    world.surroundings.facts.links.clear();
    world.surroundings.facts.default_route_devices.clear();

    assert_eq!(
        world.plan().problems,
        [
            Check::NoUplink.says("no uplink: no device has a default route or reaches a peer; name them in `uplinks`"),
            Check::NoAddress.says(
                "no address at which a peer could reach this node; give the uplink one, or name them in `addresses`"
            ),
        ]
    );
}

proptest! {
    /// There is no plan in which a known pod range is left out of the gate's table, or goes anywhere but an uplink with a gate or the
    /// encryption device itself.
    #[test]
    fn no_plan_leaves_a_known_prefix_unguarded(nodes in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 0..6)) {
        let mut world = World::new();
        for (index, (refused, reachable, ipv6)) in nodes.iter().enumerate() {
            let number = u8::try_from(index).unwrap() + 2;
            let node = format!("n{number}");
            let pods = format!("10.244.{number}.0/24");
            if *refused {
                world = world.refused(&node, &[&pods]);
                continue;
            }
            let address = if *ipv6 { format!("fd18::{number}") } else { format!("172.18.0.{number}") };
            world = world.peer(&node, number, &[&address], &[&pods]);
            if !reachable {
                world.surroundings.hops.remove(&ip(&address));
            }
        }

        let plan = world.plan();

        let known = world.snapshot.peers.values().flat_map(|peer| &peer.pod_prefixes)
            .chain(world.snapshot.refused.values().flat_map(|refused| &refused.pod_prefixes));
        for prefix in known {
            let owner = plan.gate.table.owners.get(prefix);
            prop_assert!(owner.is_some_and(|owner| owner.path != Way::Local), "{} has no owner", prefix);
        }
        for route in &plan.routing.routes {
            prop_assert!(plan.gate.uplinks.contains(&route.device) || route.device == "shroud0", "{} is unguarded", route);
        }
        let again = world.plan();
        prop_assert_eq!(&plan.routing, &again.routing);
        prop_assert_eq!(&plan.gate, &again.gate);
    }
}

/// Node a with one uplink of both families, and who else is known.
struct World {
    config: Config,
    key: NodeKey,
    snapshot: Snapshot,
    surroundings: Surroundings,
}

impl World {
    fn new() -> Self {
        let config = "
node: a
podPrefixes: [10.244.1.0/24, 'fd00:10:244:1::/64']
protected: [10.244.0.0/16, 'fd00:10:244::/48']
directory: { file: { path: /nodes } }
";
        let eth0 = LinkFacts {
            index: 2,
            mtu: 1500,
            up: true,
            kind: None,
            addresses: [global("172.18.0.1", 24), global("fd18::1", 64)].into(),
        };
        Self {
            config: Config::parse(Path::new("test"), config).unwrap(),
            key: NodeKey {
                private: Arc::new(PrivateKey::from_bytes([9; 32])),
                public: key(1),
            },
            snapshot: Snapshot {
                origin: Origin::Source,
                peers: BTreeMap::new(),
                refused: BTreeMap::new(),
                problems: Vec::new(),
            },
            surroundings: Surroundings {
                facts: Facts {
                    links: BTreeMap::from([("eth0".to_owned(), eth0)]),
                    default_route_devices: ["eth0".to_owned()].into(),
                },
                hops: BTreeMap::new(),
                pod_devices: BTreeSet::new(),
                encryption_device: Some(7),
            },
        }
    }

    /// A peer on the link of eth0.
    fn peer(mut self, node: &str, number: u8, addresses: &[&str], pods: &[&str]) -> Self {
        let addresses: Vec<IpAddr> = addresses.iter().map(|text| ip(text)).collect();
        self.surroundings
            .hops
            .extend(addresses.iter().map(|address| (*address, hop("eth0", None, None))));
        let peer = Peer {
            public_key: key(number),
            endpoints: addresses
                .iter()
                .map(|address| SocketAddr::new(*address, 51820))
                .collect(),
            pod_prefixes: prefixes(pods),
            addresses,
            epoch: 1,
            backend: shroud_keyd::announcement::Backend::Userspace,
        };
        self.snapshot.peers.insert(name(node), peer);
        self
    }

    fn refused(mut self, node: &str, pods: &[&str]) -> Self {
        let refused = Refused {
            reasons: vec![Reason::NoAnnouncement],
            pod_prefixes: prefixes(pods),
        };
        self.snapshot.refused.insert(name(node), refused);
        self
    }

    fn plan(&self) -> Plan {
        plan(&View {
            config: &self.config,
            key: &self.key,
            backend: Backend::Userspace,
            snapshot: &self.snapshot,
            surroundings: &self.surroundings,
        })
    }
}

fn shown(plan: &Plan) -> Vec<String> {
    plan.routing.routes.iter().map(ToString::to_string).collect()
}

fn global(address: &str, length: u8) -> Address {
    Address {
        address: ip(address),
        length,
        scope: Scope::Global,
    }
}

fn hop(device: &str, via: Option<&str>, mtu: Option<u32>) -> Hop {
    Hop {
        device: Some(device.to_owned()),
        via: via.map(ip),
        source: None,
        kind: HopKind::Unicast,
        mtu,
    }
}

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number.max(2); 32]).unwrap()
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn prefixes(texts: &[&str]) -> BTreeSet<Prefix> {
    texts.iter().map(|text| prefix(text)).collect()
}
