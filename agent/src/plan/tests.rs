use std::path::Path;

use proptest::prelude::*;
use shroud_ebpf::{Owner, Path as Way};
use shroud_keyd::announcement::AnnouncedKey;
use shroud_keyd::directory::{Origin, Own, Refused};
use shroud_keyd::{Peer, Reason};
use shroud_model::PrivateKey;
use shroud_routing::{Address, LinkFacts};

use super::*;
use crate::config::{Interval, RoutingMode};

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
    let peer = &tunnel(&plan).peers[&key(2)];
    assert_eq!(peer.endpoint, Some("172.18.0.2:51820".parse().unwrap()));
    assert_eq!(peer.allowed_ips, prefixes(&["10.244.2.0/24", "fd00:10:244:2::/64"]));
    assert_eq!(
        plan.gate.table.owners[&prefix("10.244.2.0/24")],
        Owner {
            node: name("b").id(),
            path: ENCRYPTED
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

/// Node a in zone z1, with a peer in each zone there is, all of which encrypt across zones only.
fn zones(own: Option<&str>) -> World {
    let zone = |text: &str| Some(text.parse().unwrap());
    let mut world = World::new()
        .configured(|config| config.encrypt.scope = EncryptScope::CrossZone)
        .peer("near", 2, &["172.18.0.2"], &["10.244.2.0/24"])
        .peer("far", 3, &["172.18.0.3"], &["10.244.3.0/24"])
        .peer("nowhere", 4, &["172.18.0.4"], &["10.244.4.0/24"])
        .announcing("near", |peer| peer.zone = zone("z1"))
        .announcing("far", |peer| peer.zone = zone("z2"));
    for peer in world.snapshot.peers.values_mut() {
        Arc::make_mut(peer).scope = EncryptScope::CrossZone;
    }
    world.snapshot.own.zone = own.and_then(zone);
    world
}

fn ways(plan: &Plan) -> [Way; 3] {
    ["10.244.2.0/24", "10.244.3.0/24", "10.244.4.0/24"].map(|pods| plan.gate.table.owners[&prefix(pods)].path)
}

#[test]
fn inside_a_zone_nothing_is_encrypted_where_both_want_it_so() {
    let plan = zones(Some("z1")).plan();

    assert_eq!(ways(&plan), [Way::Plain, ENCRYPTED, ENCRYPTED]);
    assert_eq!(plan.peers[&name("near")].in_zone, Some("z1".parse().unwrap()));
    assert_eq!(plan.peers[&name("far")].in_zone, None);
    // The tunnel stays: a change of mind costs no handshake.
    assert_eq!(tunnel(&plan).peers.len(), 3);
    assert_eq!(plan.problems, []);
}

#[test]
fn a_peer_that_wants_all_encrypted_is_encrypted_to() {
    let world = zones(Some("z1")).announcing("near", |peer| peer.scope = EncryptScope::All);
    assert_eq!(ways(&world.plan()), [ENCRYPTED; 3]);

    let world = zones(Some("z1")).configured(|config| config.encrypt.scope = EncryptScope::All);
    assert_eq!(ways(&world.plan()), [ENCRYPTED; 3]);
}

#[test]
fn a_node_without_a_zone_encrypts_to_all_and_says_so() {
    let plan = zones(None).plan();

    assert_eq!(ways(&plan), [ENCRYPTED; 3]);
    assert_eq!(plan.problems.len(), 1);
    assert_eq!(plan.problems[0].check, Check::NoZone);
}

#[test]
fn inside_a_zone_the_nodes_own_traffic_is_not_encrypted_either() {
    let mut world = zones(Some("z1")).configured(|config| config.encrypt.nodes = true);
    for peer in world.snapshot.peers.values_mut() {
        Arc::make_mut(peer).encrypts_nodes = true;
    }

    let plan = world.plan();

    let path = |address| plan.gate.table.nodes[&ip(address)].path;
    assert_eq!(path("172.18.0.2"), shroud_ebpf::NodePath::Open);
    assert_eq!(path("172.18.0.3"), shroud_ebpf::NodePath::Encrypted(Some(7)));
}

#[test]
fn pods_opt_out_where_the_configuration_lets_them() {
    let claim = shroud_keyd::OptOut {
        pod: "shop/cart".to_owned(),
        node: name("a"),
        by: shroud_keyd::opt_out::OptOutBy::Pod,
    };
    let mut world = World::new();
    world.snapshot.opted_out = Some([(ip("10.244.1.7"), claim)].into());

    assert_eq!(world.plan().gate.table.opted_out, [].into());

    let world = world.configured(|config| config.encrypt.opt_out = true);
    assert_eq!(world.plan().gate.table.opted_out, [ip("10.244.1.7")].into());
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
    assert!(tunnel(&plan).peers.is_empty());
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

    assert_eq!(plan.peers[&name("b")].endpoint(), None);
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
    let path = |world: &World| world.plan().gate.table.owners[&prefix("10.244.2.0/24")].path;
    let stolen = LaneDevice {
        has_our_key: false,
        ..OURS
    };
    world.surroundings.lanes = [(Lane::ALL[0], stolen)].into();
    assert_eq!(path(&world), Way::Encrypted(None));
    // What it decrypts is looked at all the same.
    assert_eq!(world.plan().gate.encryption, ["shroud0".to_owned()].into());

    world.surroundings.lanes.clear();
    assert_eq!(path(&world), Way::Encrypted(None));
}

/// Node b with a key to come, and its devices there.
fn with_next_key() -> World {
    let next = AnnouncedKey {
        public_key: key(22),
        epoch: 2,
    };
    let mut world = World::new()
        .peer("b", 2, &["172.18.0.2"], &["10.244.2.0/24"])
        .peer("c", 3, &["172.18.0.3"], &["10.244.3.0/24"])
        .announcing("b", |peer| peer.next_key = Some(next));
    let second = LaneDevice { index: 8, ..OURS };
    world.surroundings.lanes.insert(Lane::ALL[1], second);
    world
}

#[test]
fn a_peer_with_a_key_to_come_has_a_tunnel_for_each_key() {
    let plan = with_next_key().plan();

    let devices: Vec<(&str, u16)> = plan
        .tunnels
        .values()
        .map(|tunnel| (tunnel.device.as_str(), tunnel.listen_port))
        .collect();
    assert_eq!(devices, [("shroud0", 51820), ("shroud0-1", 51821)]);
    let (old, new) = (&plan.tunnels[&Lane::ALL[0]], &plan.tunnels[&Lane::ALL[1]]);
    assert_eq!(old.peers.keys().copied().collect::<Vec<_>>(), [key(2), key(3)]);
    assert_eq!(new.peers.keys().copied().collect::<Vec<_>>(), [key(22)]);
    assert_eq!(new.public_key, old.public_key);
    assert_eq!(new.peers[&key(22)].allowed_ips, old.peers[&key(2)].allowed_ips);
    // In which the peer's device for its even and our odd key listens.
    assert_eq!(new.peers[&key(22)].endpoint, Some("172.18.0.2:51822".parse().unwrap()));
    assert_eq!(plan.gate.table.listen_ports, [51820, 51821].into());
    assert_eq!(plan.gate.encryption, ["shroud0", "shroud0-1"].map(str::to_owned).into());
    assert_eq!(plan.routing.links.len(), 2);
}

#[test]
fn a_peer_is_sent_to_with_its_new_key_once_that_has_shaken_hands() {
    let mut world = with_next_key();
    let paths = |plan: &Plan| ["10.244.2.0/24", "10.244.3.0/24"].map(|pods| plan.gate.table.owners[&prefix(pods)].path);
    let keepalive = |plan: &Plan, lane: usize, key| plan.tunnels[&Lane::ALL[lane]].peers[&key].keepalive;
    let some = Some(Duration::from_secs(25));

    let plan = world.plan();
    assert_eq!(paths(&plan), [ENCRYPTED, ENCRYPTED]);
    assert_eq!(
        (keepalive(&plan, 0, key(2)), keepalive(&plan, 1, key(22))),
        (some, some)
    );

    world.surroundings.met.insert((Lane::ALL[1], key(22)));
    let plan = world.plan();
    assert_eq!(paths(&plan), [Way::Encrypted(Some(8)), ENCRYPTED]);
    assert_eq!(plan.peers[&name("b")].pair().peer, key(22));
    // Nothing more is sent with the old one, not even a sign of life.
    assert_eq!(
        (keepalive(&plan, 0, key(2)), keepalive(&plan, 1, key(22))),
        (None, some)
    );
    assert_eq!(keepalive(&plan, 0, key(3)), some);

    // Its device is gone, or somebody has given it another key.
    world.surroundings.lanes.remove(&Lane::ALL[1]);
    assert_eq!(paths(&world.plan()), [ENCRYPTED, ENCRYPTED]);
}

#[test]
fn where_idle_tunnels_are_silent_a_new_one_is_knocked_at_until_it_is_used() {
    let mut world = with_next_key().configured(|config| config.encryption.keepalive = Interval::from_secs(0));
    let keepalive = |world: &World| world.plan().tunnels[&Lane::ALL[1]].peers[&key(22)].keepalive;

    assert_eq!(keepalive(&world), Some(KNOCKING));
    world.surroundings.met.insert((Lane::ALL[1], key(22)));
    assert_eq!(keepalive(&world), None);
}

#[test]
fn two_that_change_at_once_have_a_tunnel_for_each_pair_of_keys() {
    let mut world = with_next_key();
    world.keys.next = Some(own_key(21, 2));

    let plan = world.plan();

    let tunnels: Vec<(&str, PublicKey, Vec<PublicKey>)> = plan
        .tunnels
        .values()
        .map(|tunnel| {
            (
                tunnel.device.as_str(),
                tunnel.public_key,
                tunnel.peers.keys().copied().collect(),
            )
        })
        .collect();
    let (old, new) = (key(1), key(21));
    assert_eq!(
        tunnels,
        [
            ("shroud0", old, vec![key(2), key(3)]),
            ("shroud0-1", old, vec![key(22)]),
            ("shroud0-2", new, vec![key(2), key(3)]),
            ("shroud0-3", new, vec![key(22)]),
        ]
    );
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

/// Node b on the link, which can receive VXLAN and Geneve.
fn with_overlay(mode: RoutingMode) -> World {
    let devices = ["shroud.vxlan", "shroud.vxlan6", "shroud.geneve"];
    World::new()
        .configured(|config| config.routing.mode = mode)
        .devices(&devices)
        .peer(
            "b",
            2,
            &["172.18.0.2", "fd18::2"],
            &["10.244.2.0/24", "fd00:10:244:2::/64"],
        )
        .announcing("b", |b| {
            b.overlays = ["vxlan:21320:4789", "geneve:21320:6081"]
                .map(|format| format.parse().unwrap())
                .into();
        })
}

#[test]
fn vxlan_wraps_what_goes_to_a_peer_that_receives_it() {
    let plan = with_overlay(RoutingMode::Vxlan).plan();

    assert_eq!(
        shown(&plan),
        [
            "10.244.2.0/24 via 10.244.2.0 dev shroud.vxlan src 10.244.1.0 onlink mtu 1390",
            "fd00:10:244:2::/64 via fe80::5cc6:dfff:fe4c:8601 dev shroud.vxlan src fd00:10:244:1:: mtu 1390",
        ]
    );
    let device = &plan.overlay.devices["shroud.vxlan"];
    assert_eq!((device.local, device.mtu.bytes()), (ip("172.18.0.1"), 1390));
    let vtep = device.vteps.first().unwrap();
    assert_eq!(vtep.underlay, ip("172.18.0.2"));
    assert_eq!(
        vtep.addresses,
        [ip("10.244.2.0"), ip("fe80::5cc6:dfff:fe4c:8601")].into()
    );
    assert!(plan.overlay.devices["shroud.vxlan6"].vteps.is_empty());
    assert_eq!(plan.routing.links["shroud0"].mtu.bytes(), 1440);
    assert_eq!(plan.routing.links["shroud.vxlan"].addresses, [ip("10.244.1.0")].into());
    assert_eq!(
        tunnel(&plan).peers[&key(2)].allowed_ips,
        prefixes(&["10.244.2.0/24", "172.18.0.2/32", "fd00:10:244:2::/64", "fd18::2/128"])
    );
    assert_eq!(plan.gate.table.overlay, Some(21320));
}

#[test]
fn geneve_routes_carry_the_way_to_the_peer() {
    let plan = with_overlay(RoutingMode::Geneve).plan();

    let route = plan.routing.routes.first().unwrap();
    assert_eq!((route.device.as_str(), route.onlink), ("shroud.geneve", true));
    let encapsulation = route.encapsulation.as_ref().unwrap();
    assert_eq!(
        (encapsulation.id, encapsulation.source, encapsulation.destination),
        (21320, ip("172.18.0.1"), ip("172.18.0.2"))
    );
}

#[test]
fn an_ipv6_underlay_has_a_vxlan_device_of_its_own() {
    let world = with_overlay(RoutingMode::Vxlan).announcing("b", |b| {
        b.addresses = vec![ip("fd18::2")];
        b.endpoints = vec!["[fd18::2]:51820".parse().unwrap()];
    });

    assert_eq!(
        shown(&world.plan())[0],
        "10.244.2.0/24 via 10.244.2.0 dev shroud.vxlan6 src 10.244.1.0 onlink mtu 1338"
    );
}

#[test]
fn whoever_has_not_announced_an_overlay_is_sent_to_natively() {
    let silent = with_overlay(RoutingMode::Vxlan).announcing("b", |b| b.overlays.clear());
    let elsewhere =
        with_overlay(RoutingMode::Vxlan).announcing("b", |b| b.overlays = vec!["vxlan:7:4789".parse().unwrap()]);
    let missing = with_overlay(RoutingMode::Vxlan).devices(&[]);

    for world in [&silent, &elsewhere, &missing] {
        assert_eq!(
            shown(&world.plan())[0],
            "10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440"
        );
    }
    assert_eq!(silent.plan().peers[&name("b")].problems, []);
    assert_eq!(
        elsewhere.plan().peers[&name("b")].problems,
        [
            Check::PeerOverlayDiffers.says("it receives vxlan:7:4789, this node sends vxlan:21320:4789, so it is sent to natively: give both the same `routing.vni` and port")
        ]
    );
}

#[test]
fn a_node_receives_what_its_peers_send_and_says_so_once_its_device_is_there() {
    let world = |devices: &[&str]| {
        with_overlay(RoutingMode::Native)
            .announcing("b", |b| b.mode = Mode::Vxlan)
            .devices(devices)
    };

    let before = world(&[]).plan();
    let after = world(&["shroud.vxlan", "shroud.vxlan6"]).plan();

    assert_eq!(
        before.overlay.devices.keys().collect::<Vec<_>>(),
        ["shroud.vxlan", "shroud.vxlan6"]
    );
    assert_eq!((before.received.len(), before.mode), (0, Mode::Native));
    assert_eq!(after.received, ["vxlan:21320:4789".parse().unwrap()]);
    assert_eq!(shown(&after), shown(&before));
    assert!(with_overlay(RoutingMode::Native).plan().overlay.devices.is_empty());
}

#[test]
fn auto_stays_native_where_the_underlay_needs_to_know_nothing() {
    let near = with_overlay(RoutingMode::Auto);
    let mut far = with_overlay(RoutingMode::Auto);
    for hop in far.surroundings.hops.values_mut() {
        hop.via = Some(ip("172.18.0.254"));
    }
    let routable = |world: World| {
        world
            .configured(|config| config.routing.routable = true)
            .announcing("b", |b| b.routable = true)
    };

    assert_eq!(near.plan().mode, Mode::Native);
    assert_eq!(far.plan().mode, Mode::Vxlan);
    assert_eq!(routable(far).plan().mode, Mode::Native);
}

#[test]
fn a_narrow_place_makes_packets_to_that_peer_smaller_and_no_device() {
    let mut world = with_overlay(RoutingMode::Vxlan)
        .configured(|config| config.encrypt.nodes = true)
        .announcing("b", |b| b.encrypts_nodes = true)
        .peer("c", 3, &["172.18.0.3"], &["10.244.3.0/24"]);
    world
        .surroundings
        .paths
        .insert(ip("10.244.2.0"), Mtu::new(1300).unwrap());

    let plan = world.plan();

    let mtus: Vec<(String, u32)> = plan
        .routing
        .routes
        .iter()
        .map(|route| (route.destination.to_string(), route.mtu.unwrap().bytes()))
        .collect();
    let mtu = |prefix: &str| mtus.iter().find(|(found, _)| found == prefix).unwrap().1;
    assert_eq!(
        (mtu("10.244.2.0/24"), mtu("fd00:10:244:2::/64"), mtu("172.18.0.2/32")),
        (1300, 1300, 1350)
    );
    assert_eq!(mtu("10.244.3.0/24"), 1440);
    assert_eq!(plan.routing.links["shroud0"].mtu.bytes(), 1440);
    assert_eq!(plan.overlay.devices["shroud.vxlan"].mtu.bytes(), 1390);
    assert_eq!(
        (
            plan.peers[&name("b")].probe,
            plan.peers[&name("b")].expected_mtu.bytes()
        ),
        (Some(ip("10.244.2.0")), 1390)
    );
}

/// Node b, which encrypts the traffic of nodes as this one does.
fn with_nodes() -> World {
    World::new()
        .configured(|config| config.encrypt.nodes = true)
        .peer("b", 2, &["172.18.0.2"], &["10.244.2.0/24"])
        .announcing("b", |b| b.encrypts_nodes = true)
}

#[test]
fn traffic_of_nodes_is_encrypted_once_both_ask_for_it() {
    use shroud_ebpf::NodePath;

    let path = |world: &World, address: &str| world.plan().gate.table.nodes[&ip(address)].path;
    let both = with_nodes();
    let only_us = with_nodes().announcing("b", |b| b.encrypts_nodes = false);
    let only_them = with_nodes().configured(|config| config.encrypt.nodes = false);

    assert_eq!(
        (path(&both, "172.18.0.2"), path(&both, "172.18.0.1")),
        (NodePath::Encrypted(Some(7)), NodePath::LocalProtected)
    );
    assert_eq!(
        (path(&only_us, "172.18.0.2"), path(&only_us, "172.18.0.1")),
        (NodePath::Open, NodePath::LocalProtected)
    );
    assert_eq!(
        (path(&only_them, "172.18.0.2"), path(&only_them, "172.18.0.1")),
        (NodePath::Open, NodePath::LocalOpen)
    );
    assert_eq!(
        shown(&both.plan()),
        [
            "10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440",
            "172.18.0.2/32 dev eth0 table 83 mtu 1440",
        ]
    );
    assert_eq!(both.plan().routing.rules.len(), 1);
    assert_eq!(
        tunnel(&both.plan()).peers[&key(2)].allowed_ips,
        prefixes(&["10.244.2.0/24", "172.18.0.2/32"])
    );
    assert!(only_them.plan().routing.rules.is_empty());
}

#[test]
fn a_refused_node_is_fenced_where_nodes_are_encrypted_and_only_there() {
    use shroud_ebpf::NodePath;

    let fenced = with_nodes().refused("c", &[]).plan().gate.table.nodes;
    let open = World::new().refused("c", &[]).plan().gate.table.nodes;

    assert_eq!(fenced[&ip("172.18.0.66")].path, NodePath::Fenced);
    assert!(!open.contains_key(&ip("172.18.0.66")));
}

#[test]
fn nobody_is_believed_to_have_this_nodes_own_address() {
    let world = with_nodes().announcing("b", |b| b.addresses.push(ip("172.18.0.1")));

    let plan = world.plan();

    assert_eq!(plan.gate.table.nodes[&ip("172.18.0.1")].node, name("a").id());
    assert!(
        !tunnel(&plan).peers[&key(2)]
            .allowed_ips
            .contains(&prefix("172.18.0.1/32"))
    );
}

/// Node a with one uplink of both families, and who else is known.
pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) keys: NodeKeys,
    pub(crate) snapshot: Snapshot,
    pub(crate) surroundings: Surroundings,
}

impl World {
    pub(crate) fn new() -> Self {
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
            keys: NodeKeys {
                current: own_key(1, 1),
                next: None,
            },
            snapshot: Snapshot {
                origin: Origin::Source,
                own: Own {
                    pod_prefixes: prefixes(&["10.244.1.0/24", "fd00:10:244:1::/64"]),
                    addresses: Vec::new(),
                    zone: None,
                },
                peers: BTreeMap::new(),
                refused: BTreeMap::new(),
                opted_out: None,
                problems: Vec::new(),
            },
            surroundings: Surroundings {
                facts: Facts {
                    links: BTreeMap::from([("eth0".to_owned(), eth0)]),
                    default_route_devices: ["eth0".to_owned()].into(),
                    pod_route_devices: BTreeSet::new(),
                },
                hops: BTreeMap::new(),
                pod_devices: BTreeSet::new(),
                lanes: [(Lane::ALL[0], OURS)].into(),
                met: BTreeSet::new(),
                overlay_devices: BTreeSet::new(),
                paths: BTreeMap::new(),
            },
        }
    }

    /// What the configuration says besides.
    fn configured(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// The overlay devices of ours that exist.
    fn devices(mut self, names: &[&str]) -> Self {
        self.surroundings.overlay_devices = names.iter().map(|&name| name.to_owned()).collect();
        self
    }

    /// What a peer announces besides.
    fn announcing(mut self, node: &str, change: impl FnOnce(&mut Peer)) -> Self {
        change(Arc::make_mut(self.snapshot.peers.get_mut(&name(node)).unwrap()));
        self
    }

    /// A peer on the link of eth0.
    pub(crate) fn peer(mut self, node: &str, number: u8, addresses: &[&str], pods: &[&str]) -> Self {
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
            next_key: None,
            backend: shroud_keyd::announcement::Backend::Userspace,
            mode: Mode::Native,
            overlays: Vec::new(),
            routable: false,
            encrypts_nodes: false,
            scope: EncryptScope::All,
            zone: None,
        };
        self.snapshot.peers.insert(name(node), Arc::new(peer));
        self
    }

    fn refused(mut self, node: &str, pods: &[&str]) -> Self {
        let refused = Refused {
            reasons: vec![Reason::NoAnnouncement],
            pod_prefixes: prefixes(pods),
            addresses: vec![ip("172.18.0.66")],
        };
        self.snapshot.refused.insert(name(node), refused);
        self
    }

    pub(crate) fn plan(&self) -> Plan {
        plan(&View {
            config: &self.config,
            keys: &self.keys,
            backend: Backend::Userspace,
            snapshot: &self.snapshot,
            surroundings: &self.surroundings,
        })
    }
}

/// The device of the first lane in [`World`].
const OURS: LaneDevice = LaneDevice {
    index: 7,
    has_our_key: true,
};
const ENCRYPTED: Way = Way::Encrypted(Some(OURS.index));

fn own_key(number: u8, epoch: u64) -> NodeKey {
    NodeKey {
        private: Arc::new(PrivateKey::from_bytes([9; 32])),
        public: key(number),
        epoch,
        since: std::time::SystemTime::UNIX_EPOCH,
    }
}

/// The first lane.
fn tunnel(plan: &Plan) -> &shroud_tunnel::Desired {
    &plan.tunnels[&Lane::ALL[0]]
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
