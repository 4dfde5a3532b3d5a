//! The overlay against the real kernel, in network namespaces. What our code does is looked at with iproute2, and the reverse.
#![allow(
    clippy::unwrap_used,
    clippy::let_underscore_must_use,
    reason = "a test may panic, and cleans up as well as it can"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "tests look at the kernel through iproute2 on purpose"
)]

#[path = "kernel/netns.rs"]
mod netns;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use netns::{Capture, Lab, Netns};
use serde_json::Value;
use shroud_model::{Family, Mtu};
use shroud_overlay::{Change, Desired, Device, Error, Kind, Mac, Overlay, Vni, Vtep, diff};

const PORT: u16 = 8472;

fn vni() -> Vni {
    Vni::new(83).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The link-layer address of node `number`.
fn mac(number: u8) -> Mac {
    Mac::from([2, 0, 0, 0, 0, number])
}

/// The underlay address of node `number`.
fn underlay(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => ip(&format!("172.18.0.{number}")),
        Family::V6 => ip(&format!("fd18::{number}")),
    }
}

/// Node `number` as its peers know it.
fn vtep(family: Family, number: u8) -> Vtep {
    Vtep {
        mac: mac(number),
        underlay: underlay(family, number),
        addresses: BTreeSet::from([
            ip(&format!("10.244.{number}.0")),
            ip(&format!("fd00:10:244:{number}::")),
        ]),
    }
}

/// The device of node `number` with these peers.
fn device(family: Family, number: u8, peers: &[u8]) -> Device {
    Device {
        kind: Kind::Vxlan,
        vni: vni(),
        port: PORT,
        local: underlay(family, number),
        mac: mac(number),
        mtu: Mtu::new(1390).unwrap(),
        vteps: peers.iter().map(|peer| vtep(family, *peer)).collect(),
    }
}

fn only(name: &str, device: Device) -> Desired {
    Desired {
        devices: BTreeMap::from([(name.to_owned(), device)]),
    }
}

/// The first node: peers 2 and 3 over IPv4.
fn node() -> Desired {
    only("shroud.vxlan", device(Family::V4, 1, &[2, 3]))
}

/// A namespace in which the calling thread now is, and its overlay.
fn enter(netns: &Netns) -> Overlay {
    netns.enter();
    Overlay::open(vni()).unwrap()
}

/// One pass: what was changed, as text, and what went wrong.
fn pass(overlay: &mut Overlay, desired: &Desired) -> (Vec<String>, Vec<Error>) {
    let changes = diff(desired, &overlay.observe().unwrap());
    let errors = changes
        .iter()
        .filter_map(|change| overlay.apply(change).err())
        .collect();
    (changes.iter().map(Change::to_string).collect(), errors)
}

/// A pass that must succeed, and after which nothing is left to do.
fn converge(overlay: &mut Overlay, desired: &Desired) -> Vec<String> {
    let (changes, errors) = pass(overlay, desired);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(pass(overlay, desired).0, [] as [String; 0], "the second pass");
    changes
}

/// The first error of a pass, as text.
fn refusal(overlay: &mut Overlay, desired: &Desired) -> (Error, String) {
    let (_, errors) = pass(overlay, desired);
    let error = errors.into_iter().next().expect("a refusal");
    let text = error.to_string();
    (error, text)
}

#[test]
fn pods_reach_each_other_over_either_underlay() {
    for family in [Family::V4, Family::V6] {
        let lab = Lab::new();
        for (node, number, peer) in [(&lab.nodes[0], 1, 2), (&lab.nodes[1], 2, 1)] {
            converge(&mut enter(node), &only("shroud.vxlan", device(family, number, &[peer])));
        }
        lab.route("shroud.vxlan", 1390);

        lab.pods_talk();
    }
}

#[test]
fn what_is_desired_is_what_iproute2_shows() {
    let netns = Netns::new();

    let changes = converge(&mut enter(&netns), &node());

    assert_eq!(
        changes,
        [
            "device shroud.vxlan: none -> vxlan port 8472 vni 83 local 172.18.0.1 mac 02:00:00:00:00:01 mtu 1390",
            "forwarding 02:00:00:00:00:02 dev shroud.vxlan: none -> 172.18.0.2",
            "forwarding 02:00:00:00:00:03 dev shroud.vxlan: none -> 172.18.0.3",
            "neighbour 10.244.2.0 dev shroud.vxlan: none -> 02:00:00:00:00:02",
            "neighbour 10.244.3.0 dev shroud.vxlan: none -> 02:00:00:00:00:03",
            "neighbour fd00:10:244:2:: dev shroud.vxlan: none -> 02:00:00:00:00:02",
            "neighbour fd00:10:244:3:: dev shroud.vxlan: none -> 02:00:00:00:00:03",
        ]
    );
    let link = &netns.look("-d link show dev shroud.vxlan")[0];
    let info = &link["linkinfo"]["info_data"];
    assert_eq!(link["address"], "02:00:00:00:00:01");
    assert_eq!(link["mtu"], 1390);
    assert_eq!(link["ifalias"], "shroud overlay");
    assert_eq!(link["inet6_addr_gen_mode"], "none");
    for flag in ["UP", "NOARP"] {
        assert!(link["flags"].as_array().unwrap().contains(&flag.into()), "{flag}");
    }
    assert_eq!(info["id"], 83);
    assert_eq!(info["port"], 8472);
    assert_eq!(info["local"], "172.18.0.1");
    assert_eq!(info["learning"], false);
    assert_eq!(info["df"], "set");
    assert_eq!(info["udp_csum"], true);
    assert!(info["group"].is_null() && info["remote"].is_null(), "{info}");
    assert_eq!(
        netns.lines("bridge", "fdb show dev shroud.vxlan"),
        [
            "02:00:00:00:00:02 dst 172.18.0.2 self permanent",
            "02:00:00:00:00:03 dst 172.18.0.3 self permanent",
        ]
    );
    assert_eq!(
        netns.lines("ip", "neigh show dev shroud.vxlan"),
        [
            "10.244.2.0 lladdr 02:00:00:00:00:02 PERMANENT",
            "10.244.3.0 lladdr 02:00:00:00:00:03 PERMANENT",
            "fd00:10:244:2:: lladdr 02:00:00:00:00:02 PERMANENT",
            "fd00:10:244:3:: lladdr 02:00:00:00:00:03 PERMANENT",
        ]
    );
    assert_eq!(
        netns.look("addr show dev shroud.vxlan")[0]["addr_info"],
        Value::Array(Vec::new())
    );
    assert_eq!(netns.lines("ip", "-6 route show dev shroud.vxlan"), [] as [String; 0]);
}

#[test]
fn what_iproute2_makes_is_read_as_it_is() {
    let netns = Netns::new();
    netns.ip("link add shroud.vxlan address 02:00:00:00:00:01 mtu 1390 type vxlan id 83 dstport 8472 local 172.18.0.1 nolearning df set");
    netns.ip("link set shroud.vxlan addrgenmode none arp off");
    netns.ip("link set shroud.vxlan up");
    for peer in [2, 3] {
        netns.bridge(&format!(
            "fdb add {} dev shroud.vxlan dst 172.18.0.{peer} self permanent",
            mac(peer)
        ));
        netns.ip(&format!(
            "neigh add 10.244.{peer}.0 lladdr {} dev shroud.vxlan nud permanent",
            mac(peer)
        ));
        netns.ip(&format!(
            "neigh add fd00:10:244:{peer}:: lladdr {} dev shroud.vxlan nud permanent",
            mac(peer)
        ));
    }

    // The label has a space, at which the words of a command are split here.
    assert_eq!(
        pass(&mut enter(&netns), &node()).0,
        ["device shroud.vxlan: not labelled -> labelled"]
    );
}

#[test]
fn drift_is_repaired() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    converge(&mut overlay, &node());
    let drifts = [
        (
            "bridge",
            "fdb del 02:00:00:00:00:02 dev shroud.vxlan self",
            "none -> 172.18.0.2",
        ),
        (
            "bridge",
            "fdb replace 02:00:00:00:00:02 dev shroud.vxlan dst 172.18.0.9 self permanent",
            "172.18.0.9 -> 172.18.0.2",
        ),
        (
            "bridge",
            "fdb replace 02:00:00:00:00:02 dev shroud.vxlan dst 172.18.0.2 port 9 self permanent",
            "172.18.0.2 port 9 -> none",
        ),
        (
            "bridge",
            "fdb replace 02:00:00:00:00:02 dev shroud.vxlan dst 172.18.0.2 vni 9 self permanent",
            "172.18.0.2 vni 9 -> none",
        ),
        (
            "bridge",
            "fdb replace 02:00:00:00:00:02 dev shroud.vxlan dst 172.18.0.2 self dynamic",
            "172.18.0.2 reachable -> none",
        ),
        (
            "bridge",
            "fdb add 02:00:00:00:00:99 dev shroud.vxlan dst 172.18.0.9 self permanent",
            "172.18.0.9 -> none",
        ),
        (
            "bridge",
            "fdb append 00:00:00:00:00:00 dev shroud.vxlan dst 172.18.0.9 self permanent",
            "forwarding 00:00:00:00:00:00",
        ),
        (
            "ip",
            "neigh del 10.244.2.0 dev shroud.vxlan",
            "neighbour 10.244.2.0 dev shroud.vxlan: none -> ",
        ),
        (
            "ip",
            "neigh del fd00:10:244:2:: dev shroud.vxlan",
            "neighbour fd00:10:244:2:: dev shroud.vxlan: none -> ",
        ),
        (
            "ip",
            "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:77 dev shroud.vxlan nud permanent",
            "02:00:00:00:00:77 -> ",
        ),
        (
            "ip",
            "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev shroud.vxlan nud stale",
            "(not permanent) -> ",
        ),
        (
            "ip",
            "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev shroud.vxlan nud noarp",
            "neighbour 10.244.2.0 dev shroud.vxlan: none -> ",
        ),
        (
            "ip",
            "neigh add 10.244.9.0 lladdr 02:00:00:00:00:09 dev shroud.vxlan nud permanent",
            "02:00:00:00:00:09 -> none",
        ),
        ("ip", "link del shroud.vxlan", "none -> vxlan"),
        ("ip", "link set shroud.vxlan down", "down -> up"),
        ("ip", "link set shroud.vxlan mtu 1300", "mtu 1300 -> mtu 1390"),
        (
            "ip",
            "link set shroud.vxlan address 02:00:00:00:00:77",
            "mac 02:00:00:00:00:77 -> mac 02:00:00:00:00:01",
        ),
        // Our own repair makes the kernel forget what is right by chance.
        (
            "ip",
            "link set shroud.vxlan address 02:00:00:00:00:77; neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev shroud.vxlan nud permanent",
            "neighbour 10.244.2.0 dev shroud.vxlan: none -> ",
        ),
        (
            "ip",
            "link set shroud.vxlan arp on; neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev shroud.vxlan nud permanent",
            "neighbour 10.244.2.0 dev shroud.vxlan: none -> ",
        ),
        ("ip", "link set shroud.vxlan arp on", "arp on -> arp off"),
        (
            "ip",
            "link set shroud.vxlan addrgenmode eui64",
            "link-local address automatic -> link-local address none",
        ),
        ("ip", "link set shroud.vxlan alias mine", "not labelled -> labelled"),
        (
            "ip",
            "link set shroud.vxlan type vxlan learning",
            "learning -> nolearning",
        ),
        (
            "ip",
            "link set shroud.vxlan type vxlan local 172.18.0.9",
            "local 172.18.0.9 -> local 172.18.0.1",
        ),
        ("ip", "link set shroud.vxlan type vxlan df unset", "df unset -> df set"),
        ("ip", "link set shroud.vxlan type vxlan ttl 9", "ttl 9 -> ttl auto"),
        ("ip", "link set shroud.vxlan type vxlan tos 4", "tos 0x4 -> tos 0x0"),
        (
            "ip",
            "link set shroud.vxlan type vxlan remote 172.18.0.9",
            "removed, to be made anew (remote 172.18.0.9 -> no extras)",
        ),
        (
            "ip",
            "link set shroud.vxlan down; link set shroud.vxlan name shroud.other",
            "device shroud.other: removed",
        ),
        (
            "ip",
            "link add shroud.more type vxlan id 83 dstport 9999 local 172.18.0.1",
            "device shroud.more: removed",
        ),
    ];
    let picture = |netns: &Netns| {
        let mut link = netns.look("-d link show dev shroud.vxlan")[0].clone();
        link["ifindex"] = 0.into();
        (
            link,
            netns.lines("bridge", "fdb show dev shroud.vxlan"),
            netns.lines("ip", "neigh show dev shroud.vxlan"),
            netns.look("link show").as_array().unwrap().len(),
        )
    };
    let before = picture(&netns);
    for (program, drift, expected) in drifts {
        for command in drift.split("; ") {
            match program {
                "ip" => netns.ip(command),
                _ => netns.bridge(command),
            };
        }

        let changes = converge(&mut overlay, &node());

        let text = changes.join("\n");
        assert!(text.contains(expected), "after `{program} {drift}`:\n{text}");
        assert_eq!(picture(&netns), before, "after `{program} {drift}`");
    }
}

#[test]
fn what_the_kernel_fixes_needs_another_device() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    converge(&mut overlay, &node());
    let with = |change: fn(&mut Device)| {
        let mut device = device(Family::V4, 1, &[2, 3]);
        change(&mut device);
        only("shroud.vxlan", device)
    };
    let mut steps = vec![
        (with(|device| device.vni = Vni::new(84).unwrap()), "vni 83 -> vni 84"),
        (with(|device| device.port = 4789), "port 8472 -> port 4789"),
        (
            only("shroud.vxlan", device(Family::V6, 1, &[2, 3])),
            "underlay ipv4 -> underlay ipv6",
        ),
    ];
    for (desired, expected) in steps.drain(..) {
        let changes = converge(&mut overlay, &desired).join("\n");

        assert!(
            changes.contains("removed, to be made anew") && changes.contains(expected),
            "{changes}"
        );
        converge(&mut overlay, &node());
    }
}

#[test]
fn the_order_is_new_entries_first() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    converge(&mut overlay, &only("shroud.vxlan", device(Family::V4, 1, &[2])));

    let changes = converge(&mut overlay, &only("shroud.vxlan", device(Family::V4, 1, &[3])));

    assert_eq!(
        changes,
        [
            "forwarding 02:00:00:00:00:03 dev shroud.vxlan: none -> 172.18.0.3",
            "neighbour 10.244.3.0 dev shroud.vxlan: none -> 02:00:00:00:00:03",
            "neighbour fd00:10:244:3:: dev shroud.vxlan: none -> 02:00:00:00:00:03",
            "neighbour 10.244.2.0 dev shroud.vxlan: 02:00:00:00:00:02 -> none",
            "neighbour fd00:10:244:2:: dev shroud.vxlan: 02:00:00:00:00:02 -> none",
            "forwarding 02:00:00:00:00:02 dev shroud.vxlan: 172.18.0.2 -> none",
        ]
    );
}

#[test]
fn what_is_gone_already_is_removed() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    let entries = "neigh flush dev shroud.vxlan nud permanent";
    let device_itself = "link del shroud.vxlan";
    let alone = only("shroud.vxlan", device(Family::V4, 1, &[]));
    for (desired, gone) in [
        (alone.clone(), entries),
        (alone, device_itself),
        (Desired::default(), device_itself),
    ] {
        converge(&mut overlay, &node());
        let changes = diff(&desired, &overlay.observe().unwrap());
        assert!(!changes.is_empty());

        netns.ip(gone);
        if gone == entries {
            netns.bridge("fdb del 02:00:00:00:00:02 dev shroud.vxlan self");
        }

        for change in changes {
            overlay.apply(&change).unwrap();
        }
    }
}

#[test]
fn one_device_for_each_family_of_the_underlay() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    let both = Desired {
        devices: BTreeMap::from([
            ("shroud.vxlan".to_owned(), device(Family::V4, 1, &[2])),
            ("shroud.vxlan6".to_owned(), device(Family::V6, 1, &[3])),
        ]),
    };

    converge(&mut overlay, &both);

    assert_eq!(
        netns.lines("bridge", "fdb show dev shroud.vxlan6"),
        ["02:00:00:00:00:03 dst fd18::3 self permanent"]
    );

    let mut mixed = node();
    mixed
        .devices
        .get_mut("shroud.vxlan")
        .unwrap()
        .vteps
        .insert(vtep(Family::V6, 4));

    let (error, text) = refusal(&mut overlay, &mixed);

    assert!(matches!(error, Error::Family { .. }), "{text}");
    assert!(text.contains("fd18::4"), "{text}");
}

#[test]
fn foreign_devices_are_untouched() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    for command in [
        // Not our name, number, kind, in turn.
        "link add vxlan9 up type vxlan id 83 dstport 9999 local 172.18.0.1",
        "link add shroud.other up type vxlan id 99 dstport 9998 local 172.18.0.1",
        "link add shroud.veth up type veth peer name veth9",
    ] {
        netns.ip(command);
    }
    netns.bridge("fdb add 02:00:00:00:00:99 dev vxlan9 dst 172.18.0.9 self permanent");
    netns.ip("neigh add 10.244.9.0 lladdr 02:00:00:00:00:09 dev vxlan9 nud permanent");
    let picture = || {
        (
            ["vxlan9", "shroud.other", "shroud.veth", "veth9"]
                .map(|name| netns.look(&format!("-d link show dev {name}"))),
            netns.lines("bridge", "fdb show dev vxlan9"),
            netns.lines("ip", "neigh show dev vxlan9"),
        )
    };
    let before = picture();

    converge(&mut overlay, &node());
    let removal = overlay.remove();

    assert_eq!(removal.removed, ["device shroud.vxlan (vxlan vni 83)"]);
    assert!(removal.errors.is_empty(), "{:?}", removal.errors);
    assert_eq!(picture(), before);
}

#[test]
fn a_foreign_device_in_the_way_is_named() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    let cases = [
        (
            "vxlan9 up type vxlan id 83 dstport 8472 local 172.18.0.1",
            "device vxlan9 (vxlan vni 83) uses the same VNI and port",
        ),
        (
            "vxlan9 up type vxlan id 99 dstport 8472 local 172.18.0.1 gbp",
            "UDP port 8472 is taken by device vxlan9 (vxlan vni 99)",
        ),
        (
            "shroud.vxlan type vxlan id 99 dstport 8472 local 172.18.0.1",
            "there is a device shroud.vxlan already, vxlan vni 99, which is not ours",
        ),
        (
            "shroud.vxlan type veth peer name veth9",
            "there is a device shroud.vxlan already, veth, which is not ours",
        ),
    ];
    for (foreign, expected) in cases {
        netns.ip(&format!("link add {foreign}"));
        let name = foreign.split(' ').next().unwrap();
        let look = || netns.look("-d link show");
        let before = look();

        let (_, text) = refusal(&mut overlay, &node());

        assert!(text.contains(expected), "{text}");
        assert_eq!(look(), before, "nothing was changed, nothing half-made is left");
        netns.ip(&format!("link del {name}"));
        converge(&mut overlay, &node());
        converge(&mut overlay, &Desired::default());
    }
}

#[test]
fn a_port_taken_by_a_program_is_told() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();

    let (error, text) = refusal(&mut overlay, &node());

    assert!(matches!(error, Error::PortTaken { port: PORT, .. }), "{text}");
    assert!(text.contains("another program"), "{text}");
    drop(socket);
    converge(&mut overlay, &node());
}

#[test]
fn a_name_that_is_not_ours_to_give_is_refused() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    for name in ["vxlan0", "shroud.far-too-long", "shroud/x", "shroud x"] {
        let (error, text) = refusal(&mut overlay, &only(name, device(Family::V4, 1, &[])));

        assert!(matches!(error, Error::Name { .. }), "{text}");
    }
}

#[test]
fn nothing_floods() {
    let lab = Lab::new();
    for (node, number, peer) in [(&lab.nodes[0], 1, 2), (&lab.nodes[1], 2, 1)] {
        let desired = only("shroud.vxlan", device(Family::V4, number, &[peer, 3]));
        converge(&mut enter(node), &desired);
    }
    lab.route("shroud.vxlan", 1390);
    let capture = Capture::start(&lab.switch);
    let node = &lab.nodes[0];
    // A next hop nobody announced, and one whose link-layer address is known but forwarded nowhere.
    node.ip("route add 10.244.8.0/24 via 10.244.8.0 dev shroud.vxlan onlink");
    node.ip("route add fd00:10:244:8::/64 via fd00:10:244:8:: dev shroud.vxlan onlink");
    let provoke = || {
        for target in [
            "10.244.8.5",
            "fd00:10:244:8::5",
            "-b -I shroud.vxlan 255.255.255.255",
            "-I shroud.vxlan ff02::1",
            "-I shroud.vxlan 224.0.0.1",
        ] {
            node.succeeds(&format!("ping -c 1 -W 0.2 {target}"));
        }
        // Whatever those sent has crossed the switch before this reply does.
        assert!(lab.pods[0].succeeds("ping -c 1 -W 2 10.244.2.5"));
    };

    provoke();

    assert_eq!(
        overlay_frames(&capture),
        BTreeSet::from([
            "172.18.0.1 -> 172.18.0.2: 02:00:00:00:00:02".to_owned(),
            "172.18.0.2 -> 172.18.0.1: 02:00:00:00:00:01".to_owned(),
        ])
    );

    node.bridge("fdb append 00:00:00:00:00:00 dev shroud.vxlan dst 172.18.0.2 self permanent");
    provoke();

    // The same eye does see floods where there are some: a group, a link-layer address that is forwarded nowhere (a device that does not
    // resolve addresses takes its own), and, once it does, the question who has one.
    let mut seen = overlay_frames(&capture);
    for flood in ["01:00:5e:00:00:01", "02:00:00:00:00:01"] {
        let frame = format!("172.18.0.1 -> 172.18.0.2: {flood}");
        assert!(seen.contains(&frame), "{frame} in {seen:?}");
    }
    node.ip("link set shroud.vxlan arp on");
    node.succeeds("ping -c 1 -W 0.2 10.244.8.5");
    let question = "172.18.0.1 -> 172.18.0.2: ff:ff:ff:ff:ff:ff".to_owned();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !seen.contains(&question) {
        assert!(Instant::now() < deadline, "{question} in {seen:?}");
        seen.extend(overlay_frames(&capture));
        std::thread::yield_now();
    }
}

fn overlay_frames(capture: &Capture) -> BTreeSet<String> {
    capture
        .frames()
        .iter()
        .filter_map(|frame| overlay_frame(frame))
        .collect()
}

/// What of the overlay a frame on the switch shows: outer addresses and the inner frame's receiver. Only the underlay's own address
/// resolution and group membership is passed over; anything else is shown as it is.
fn overlay_frame(frame: &[u8]) -> Option<String> {
    const UDP: u8 = 17;
    const ICMPV6: u8 = 58;
    let (kind, packet) = (u16::from_be_bytes([frame[12], frame[13]]), &frame[14..]);
    match kind {
        0x0806 if packet[14..16] == [172, 18] => None,
        0x86dd if packet[6] == ICMPV6 || (packet[6] == 0 && packet[40] == ICMPV6) => None,
        0x0800 if packet[0] == 0x45 && packet[9] == UDP && packet[22..24] == PORT.to_be_bytes() => {
            let address = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
            let inner: [u8; 6] = packet[36..42].try_into().unwrap();
            Some(format!("{} -> {}: {}", address(12), address(16), Mac::from(inner)))
        }
        _ => Some(format!("stray frame {frame:02x?}")),
    }
}

/// Traffic while the neighbour is missing must not leave behind what a pass cannot repair.
#[test]
fn a_neighbour_lost_under_traffic_comes_back() {
    let lab = Lab::new();
    let mut overlays = Vec::new();
    for (node, number, peer) in [(&lab.nodes[0], 1, 2), (&lab.nodes[1], 2, 1)] {
        let desired = only("shroud.vxlan", device(Family::V4, number, &[peer]));
        let mut overlay = enter(node);
        converge(&mut overlay, &desired);
        overlays.push((overlay, desired));
    }
    lab.route("shroud.vxlan", 1390);
    for address in ["10.244.2.0", "fd00:10:244:2::"] {
        lab.nodes[0].ip(&format!("neigh del {address} dev shroud.vxlan"));
    }
    assert!(!lab.pods[0].succeeds("ping -c 1 -W 0.2 10.244.2.5"));
    assert!(!lab.pods[0].succeeds("ping -c 1 -W 0.2 fd00:10:244:2::5"));

    let (overlay, desired) = &mut overlays[0];
    converge(overlay, desired);

    lab.pods_talk();
}

#[test]
fn a_thousand_peers() {
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    let vteps = (0..1000_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        Vtep {
            mac: Mac::from([2, 0, 0, 1, high, low]),
            underlay: IpAddr::V4(Ipv4Addr::new(172, 19, high, low)),
            addresses: BTreeSet::from([
                IpAddr::V4(Ipv4Addr::new(10, 100 + high, low, 0)),
                ip(&format!("fd00:10:244:{number:x}::")),
            ]),
        }
    });
    let mut many = only(
        "shroud.vxlan",
        Device {
            vteps: vteps.collect(),
            ..device(Family::V4, 1, &[])
        },
    );

    let began = Instant::now();
    let (changes, errors) = pass(&mut overlay, &many);
    let took = began.elapsed();

    assert!(errors.is_empty(), "{:?}", errors.first());
    assert_eq!(changes.len(), 1 + 3 * 1000);
    let began = Instant::now();
    assert_eq!(pass(&mut overlay, &many).0, [] as [String; 0]);
    let second = began.elapsed();
    assert_eq!(netns.lines("bridge", "fdb show dev shroud.vxlan").len(), 1000);
    many.devices.get_mut("shroud.vxlan").unwrap().vteps.pop_first();
    let began = Instant::now();
    assert_eq!(pass(&mut overlay, &many).0.len(), 3);
    let one = began.elapsed();
    println!("1,000 peers: {took:?}; nothing to do: {second:?}; one peer less: {one:?}");
    // A guard against what grows with the square, with room for an emulated machine.
    assert!(took < Duration::from_secs(30), "{took:?}");
}

fn geneve(number: u8, peers: &[u8]) -> Device {
    Device {
        kind: Kind::Geneve,
        port: 6081,
        ..device(Family::V4, number, peers)
    }
}

/// Whether this kernel makes Geneve devices, by iproute2's word.
fn has_geneve() -> bool {
    let netns = Netns::new();
    netns.succeeds("ip link add probe type geneve external")
}

#[test]
fn a_kernel_without_geneve_says_so() {
    if has_geneve() {
        eprintln!("SKIPPED: this kernel has Geneve");
        return;
    }
    let netns = Netns::new();
    let mut overlay = enter(&netns);

    let (error, text) = refusal(&mut overlay, &only("shroud.geneve", geneve(1, &[2])));

    assert!(matches!(error, Error::NoSuchKind { kind: Kind::Geneve, .. }), "{text}");
    assert!(text.contains("this kernel has no Geneve"), "{text}");
}

#[test]
fn geneve_carries_pods_over_either_underlay() {
    if !has_geneve() {
        eprintln!("SKIPPED: this kernel has no Geneve; run this test where `modprobe geneve` works");
        return;
    }
    for (encapsulation, address) in [("ip", "172.18.0."), ("ip6", "fd18::")] {
        let lab = Lab::new();
        for (node, own, peer) in [(&lab.nodes[0], 1, 2), (&lab.nodes[1], 2, 1)] {
            converge(&mut enter(node), &only("shroud.geneve", geneve(own, &[peer])));
            let hops = if encapsulation == "ip" { "ttl" } else { "hoplimit" };
            let encapsulation =
                format!("encap {encapsulation} id 83 src {address}{own} dst {address}{peer} {hops} 64 csum");
            for (prefix, via, source) in [
                (
                    format!("10.244.{peer}.0/24"),
                    format!("10.244.{peer}.0"),
                    format!("10.244.{own}.0"),
                ),
                (
                    format!("fd00:10:244:{peer}::/64"),
                    format!("fd00:10:244:{peer}::"),
                    format!("fd00:10:244:{own}::"),
                ),
            ] {
                node.ip(&format!(
                    "route add {prefix} {encapsulation} via {via} dev shroud.geneve onlink src {source} mtu 1390"
                ));
            }
        }

        lab.pods_talk();
    }
}

#[test]
fn geneve_drift_is_repaired() {
    if !has_geneve() {
        eprintln!("SKIPPED: this kernel has no Geneve; run this test where `modprobe geneve` works");
        return;
    }
    let netns = Netns::new();
    let mut overlay = enter(&netns);
    let desired = only("shroud.geneve", geneve(1, &[2]));
    converge(&mut overlay, &desired);
    let before = netns.lines("ip", "neigh show dev shroud.geneve");
    for (drift, expected) in [
        ("link del shroud.geneve", "none -> geneve"),
        ("link set shroud.geneve mtu 1300", "mtu 1300 -> mtu 1390"),
        (
            "link set shroud.geneve address 02:00:00:00:00:77",
            "mac 02:00:00:00:00:77 -> ",
        ),
        (
            "link set shroud.geneve down; link set shroud.geneve name shroud.other",
            "device shroud.other: removed",
        ),
        ("neigh del 10.244.2.0 dev shroud.geneve", "neighbour 10.244.2.0"),
    ] {
        for command in drift.split("; ") {
            netns.ip(command);
        }

        let changes = converge(&mut overlay, &desired).join("\n");

        assert!(changes.contains(expected), "after `ip {drift}`:\n{changes}");
        assert_eq!(netns.lines("ip", "neigh show dev shroud.geneve"), before);
    }
    // Only one device at a port takes addresses with the packets: a foreign one there is named.
    converge(&mut overlay, &Desired::default());
    netns.ip("link add geneve9 type geneve external dstport 6081");
    let (error, text) = refusal(&mut overlay, &desired);
    assert!(matches!(error, Error::Occupied { .. }), "{text}");
    assert!(text.contains("geneve9"), "{text}");
}
