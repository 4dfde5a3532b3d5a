//! The node table and the rules that lead to it.

use std::collections::BTreeSet;

use shroud_model::{Family, Mark, Mtu};
use shroud_routing::{Desired, Error, Hop, HopKind, Kernel, Route, Rule, Table};

use super::netns::Netns;
use super::{converge, ip, node, pass, route};

/// The tunnel's.
fn mark() -> Mark {
    Mark::new(0x10, 0x30).unwrap()
}

/// [`node`] with smaller packets to one peer's own addresses, but for the tunnel's own.
fn encrypting_nodes() -> Desired {
    let mut desired = node();
    for (destination, via, mtu) in [("172.18.0.2/32", None, 1440), ("fd77::2/128", Some("fd18::9"), 1420)] {
        desired.routes.insert(Route {
            via: via.map(ip),
            source: None,
            table: Table::Node,
            ..route(destination, "fd18::9", "fd18::1", mtu)
        });
    }
    desired.rules = [Family::V4, Family::V6]
        .map(|family| Rule { family, unless: mark() })
        .into();
    desired
}

/// How [`encrypting_nodes`] looks in `ip route show table 83`.
const NODE_TABLE: [&str; 2] = [
    "172.18.0.2 dev eth0 proto 83 scope link mtu 1440",
    "fd77::2 via fd18::9 dev eth0 proto 83 metric 1024 mtu 1420",
];

const RULE: &str = "83: not from all fwmark 0x10/0x30 lookup 83 proto 83";

fn rules(netns: &Netns, family: &str) -> Vec<String> {
    let text = netns.ip(&format!("{family} rule show"));
    let ours = text.lines().filter(|line| line.starts_with("83:"));
    ours.map(|line| line.replace('\t', " ").trim().to_owned()).collect()
}

#[test]
fn all_but_the_tunnels_own_packets_see_the_node_table() {
    let netns = Netns::enter();
    netns.ip("route add fd77::2/128 via fd18::9 dev eth0");
    let mut kernel = Kernel::open().unwrap();

    let changes = converge(&mut kernel, &encrypting_nodes());

    assert_eq!(
        changes[7..],
        [
            "route 10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440: added",
            "route 10.244.3.0/24 via 172.18.0.3 dev eth0 src 10.244.1.0 mtu 1440: added",
            "route 172.18.0.2/32 dev eth0 table 83 mtu 1440: added",
            "route fd00:10:244:2::/64 via fd18::2 dev eth0 src fd00:10:244:1:: mtu 1420: added",
            "route fd00:10:244:3::/64 via fd18::3 dev eth0 src fd00:10:244:1:: mtu 1420: added",
            "route fd77::2/128 via fd18::9 dev eth0 table 83 mtu 1420: added",
            "rule ipv4 not fwmark 0x10/0x30 lookup 83: added",
            "rule ipv6 not fwmark 0x10/0x30 lookup 83: added",
        ]
    );
    assert_eq!(netns.routes("table 83"), NODE_TABLE);
    assert_eq!(
        (rules(&netns, "-4"), rules(&netns, "-6")),
        (vec![RULE.to_owned()], vec![RULE.to_owned()])
    );
    let mut mtu = |destination: &str, mark: Option<Mark>| {
        let Hop { kind, mtu, .. } = kernel.lookup(ip(destination), None, mark).unwrap();
        assert_eq!(kind, HopKind::Unicast, "{destination}");
        mtu
    };
    let other = Mark::new(0x20, 0x30).unwrap();
    assert_eq!(
        (mtu("172.18.0.2", None), mtu("fd77::2", None)),
        (Some(1440), Some(1420))
    );
    assert_eq!(
        (mtu("172.18.0.2", Some(mark())), mtu("fd77::2", Some(mark()))),
        (None, None)
    );
    assert_eq!(
        (mtu("172.18.0.2", Some(other)), mtu("fd77::2", Some(other))),
        (Some(1440), Some(1420))
    );
    assert_eq!(
        mtu("172.18.0.3", None),
        None,
        "who is not in the table is found further on"
    );
}

#[test]
fn the_node_table_and_its_rules_are_repaired() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &encrypting_nodes());
    let drifts = [
        ("rule del prio 83", "rule ipv4 not fwmark 0x10/0x30 lookup 83: added"),
        ("-6 rule del prio 83", "rule ipv6 not fwmark 0x10/0x30 lookup 83: added"),
        (
            "rule add prio 83 not fwmark 0x20/0x30 lookup 83 proto 83",
            "rule ipv4 not fwmark 0x20/0x30 lookup 83: removed",
        ),
        ("rule add prio 84 fwmark 0x10/0x30 lookup 83 proto 83", ": removed"),
        (
            "rule add prio 83 from 10.0.0.0/8 not fwmark 0x10/0x30 lookup 83 proto 83",
            ": removed",
        ),
        // Listed before ours.
        ("rule add prio 70 not fwmark 0x10/0x30 lookup 83 proto 83", ": removed"),
        ("-6 rule add prio 70 blackhole to fd00::/8 proto 83", ": removed"),
        (
            "rule add prio 83 not fwmark 0x10/0x30 lookup main suppress_prefixlength 0 proto 83",
            ": removed",
        ),
        (
            "rule add prio 83 not fwmark 0x10/0x30 iif lo lookup 83 proto 83",
            ": removed",
        ),
        (
            "route del 172.18.0.2/32 table 83",
            "route 172.18.0.2/32 dev eth0 table 83 mtu 1440: added",
        ),
        (
            "route change 172.18.0.2/32 dev eth0 proto 83 table 83",
            "route 172.18.0.2/32 dev eth0 table 83 -> ",
        ),
        (
            "route add 172.18.0.8/32 dev eth0 proto 83 table 83",
            "route 172.18.0.8/32 dev eth0 table 83: removed",
        ),
        // The same destination in the other table is another route.
        (
            "route add 172.18.0.2/32 dev eth0 proto 83",
            "route 172.18.0.2/32 dev eth0: removed",
        ),
    ];

    for (drift, repair) in drifts {
        netns.ip(drift);
        let changes = converge(&mut kernel, &encrypting_nodes());
        assert!(
            changes.len() == 1 && changes[0].contains(repair),
            "{drift}: {changes:?}"
        );
        assert_eq!(netns.routes("table 83"), NODE_TABLE, "{drift}");
        for family in ["-4", "-6"] {
            assert_eq!(rules(&netns, family), [RULE], "{drift}");
        }
    }
}

#[test]
fn foreign_rules_and_routes_stay_where_ours_come_and_go() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    // The first is equal to ours in all but the owner.
    for command in [
        "rule add prio 83 not fwmark 0x10/0x30 lookup 83 proto static",
        "-6 rule add prio 83 not fwmark 0x10/0x30 lookup 83 proto static",
        "rule add prio 83 from 10.0.0.0/8 lookup 83",
        "route add 172.18.0.9/32 dev eth0 table 83 proto static",
        "route add fd77::9/128 via fd18::9 dev eth0 table 83 proto static",
    ] {
        netns.ip(command);
    }
    let look = || {
        [
            "-4 rule show",
            "-6 rule show",
            "-4 route show table 83",
            "-6 route show table 83",
        ]
        .map(|words| netns.ip(words))
    };
    let before = look();

    converge(&mut kernel, &encrypting_nodes());
    assert!(rules(&netns, "-4").contains(&RULE.to_owned()));
    converge(&mut kernel, &node());
    assert_eq!(look(), before, "after they are no longer desired");

    converge(&mut kernel, &encrypting_nodes());
    let removal = kernel.remove();
    assert!(removal.errors.is_empty(), "{:?}", removal.errors);
    assert_eq!(removal.removed.len(), 8, "{:?}", removal.removed);
    assert_eq!(look(), before, "after the cleanup");
}

#[test]
fn a_foreign_route_in_the_node_table_is_named_and_not_overwritten() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    netns.ip("route add 172.18.0.2/32 dev eth0 table 83 proto static");

    let (_, errors) = pass(&mut kernel, &encrypting_nodes());

    let texts: Vec<String> = errors.iter().map(Error::to_string).collect();
    assert_eq!(
        texts,
        [
            "add route 172.18.0.2/32 dev eth0 table 83 mtu 1440: there is 172.18.0.2/32 dev eth0 table 83 proto static already, \
             which is not ours; remove that route (or what makes it); a range of pods can also be taken out of the pod ranges"
        ]
    );
    assert_eq!(
        netns.routes("table 83 proto static"),
        ["172.18.0.2 dev eth0 scope link"]
    );

    // Without the intruder, a change of size replaces the route in one step.
    netns.ip("route del 172.18.0.2/32 table 83");
    converge(&mut kernel, &encrypting_nodes());
    let smaller: BTreeSet<Route> = encrypting_nodes()
        .routes
        .into_iter()
        .map(|route| Route {
            mtu: Some(Mtu::new(1300).unwrap()),
            ..route
        })
        .collect();
    let changes = converge(
        &mut kernel,
        &Desired {
            routes: smaller,
            ..encrypting_nodes()
        },
    );
    assert!(
        changes.contains(
            &"route 172.18.0.2/32 dev eth0 table 83 mtu 1440 -> 172.18.0.2/32 dev eth0 table 83 mtu 1300".to_owned()
        ),
        "{changes:?}"
    );
}
