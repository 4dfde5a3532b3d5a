//! Routing against the real kernel, in network namespaces. What our code does is looked at with iproute2, and the reverse.
#![allow(
    clippy::unwrap_used,
    clippy::let_underscore_must_use,
    reason = "a test may panic, and cleans up as well as it can"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "tests look at the kernel through iproute2 on purpose"
)]

#[path = "kernel/encapsulation.rs"]
mod encapsulation;
#[path = "kernel/netns.rs"]
mod netns;
#[path = "kernel/path_mtu.rs"]
mod path_mtu;
#[path = "kernel/tables.rs"]
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netns::Netns;
use shroud_model::{Family, Mtu, Prefix};
use shroud_routing::{
    Address, Change, Desired, Error, HopKind, Kernel, Link, Monitor, Route, Scope, Sysctl, Table, Wake, diff,
};

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn route(destination: &str, via: &str, source: &str, mtu: u32) -> Route {
    Route {
        destination: prefix(destination),
        device: "eth0".to_owned(),
        via: Some(ip(via)),
        source: Some(ip(source)),
        mtu: Some(Mtu::new(mtu).unwrap()),
        onlink: false,
        encapsulation: None,
        table: Table::Main,
    }
}

/// A node with two peers, dual stack.
fn node() -> Desired {
    let link = Link {
        mtu: Mtu::new(1440).unwrap(),
        addresses: BTreeSet::from([ip("10.244.1.0"), ip("fd00:10:244:1::")]),
    };
    Desired {
        links: BTreeMap::from([("shroud0".to_owned(), link)]),
        rules: BTreeSet::new(),
        routes: BTreeSet::from([
            route("10.244.2.0/24", "172.18.0.2", "10.244.1.0", 1440),
            route("10.244.3.0/24", "172.18.0.3", "10.244.1.0", 1440),
            route("fd00:10:244:2::/64", "fd18::2", "fd00:10:244:1::", 1420),
            route("fd00:10:244:3::/64", "fd18::3", "fd00:10:244:1::", 1420),
        ]),
        sysctls: BTreeMap::from([
            (Sysctl::Forwarding(Family::V4), "1".to_owned()),
            (Sysctl::Forwarding(Family::V6), "1".to_owned()),
            (Sysctl::RpFilter("shroud0".to_owned()), "2".to_owned()),
        ]),
    }
}

/// How [`node`] looks in `ip route show proto 83`.
const NODE_ROUTES: [&str; 4] = [
    "10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440",
    "10.244.3.0/24 via 172.18.0.3 dev eth0 src 10.244.1.0 mtu 1440",
    "fd00:10:244:2::/64 via fd18::2 dev eth0 src fd00:10:244:1:: metric 1024 mtu 1420",
    "fd00:10:244:3::/64 via fd18::3 dev eth0 src fd00:10:244:1:: metric 1024 mtu 1420",
];

/// One pass: what was changed, as text, and what went wrong.
fn pass(kernel: &mut Kernel, desired: &Desired) -> (Vec<String>, Vec<Error>) {
    let observed = kernel.observe(desired).unwrap();
    let changes = diff(desired, &observed);
    let errors = changes.iter().filter_map(|change| kernel.apply(change).err()).collect();
    (changes.iter().map(Change::to_string).collect(), errors)
}

/// A pass that must succeed, and after which nothing is left to do.
fn converge(kernel: &mut Kernel, desired: &Desired) -> Vec<String> {
    let (changes, errors) = pass(kernel, desired);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(pass(kernel, desired).0, [] as [String; 0], "the second pass");
    changes
}

#[test]
fn what_is_desired_is_what_iproute2_shows() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();

    let changes = converge(&mut kernel, &node());

    assert_eq!(
        changes,
        [
            "device shroud0: mtu 1500 -> 1440",
            "device shroud0: down -> up",
            "address 10.244.1.0/32 dev shroud0: added",
            "address fd00:10:244:1::/128 dev shroud0: added",
            "sysctl net.ipv4.ip_forward: 0 -> 1",
            "sysctl net.ipv6.conf.all.forwarding: 0 -> 1",
            "sysctl net.ipv4.conf.shroud0.rp_filter: 0 -> 2",
            "route 10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440: added",
            "route 10.244.3.0/24 via 172.18.0.3 dev eth0 src 10.244.1.0 mtu 1440: added",
            "route fd00:10:244:2::/64 via fd18::2 dev eth0 src fd00:10:244:1:: mtu 1420: added",
            "route fd00:10:244:3::/64 via fd18::3 dev eth0 src fd00:10:244:1:: mtu 1420: added",
        ]
    );
    assert_eq!(netns.routes("proto 83"), NODE_ROUTES);
    let device = &netns.look("addr show dev shroud0")[0];
    assert_eq!(device["mtu"], 1440);
    assert!(device["flags"].as_array().unwrap().contains(&"UP".into()));
    let addresses: Vec<String> = device["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|address| address["scope"] == "global")
        .map(|address| {
            format!(
                "{}/{} {:?}",
                address["local"].as_str().unwrap(),
                address["prefixlen"],
                address["noprefixroute"]
            )
        })
        .collect();
    assert_eq!(
        addresses,
        ["10.244.1.0/32 Bool(true)", "fd00:10:244:1::/128 Bool(true)"]
    );
    assert_eq!(
        netns.routes("dev shroud0"),
        [] as [String; 0],
        "no route appeared that is not ours"
    );
}

#[test]
fn what_iproute2_makes_is_read_as_it_is() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    for command in [
        "link set shroud0 mtu 1440 up",
        "addr add 10.244.1.0/32 dev shroud0",
        "addr add fd00:10:244:1::/128 dev shroud0 nodad",
        "route add 10.244.2.0/24 via 172.18.0.2 dev eth0 proto 83 mtu 1440 src 10.244.1.0",
        "route add 10.244.3.0/24 via 172.18.0.3 dev eth0 proto 83 mtu 1440 src 10.244.1.0",
        "route add fd00:10:244:2::/64 via fd18::2 dev eth0 proto 83 mtu 1420 src fd00:10:244:1::",
        "route add fd00:10:244:3::/64 via fd18::3 dev eth0 proto 83 mtu 1420 src fd00:10:244:1::",
    ] {
        netns.ip(command);
    }

    let desired = Desired {
        sysctls: BTreeMap::new(),
        ..node()
    };

    assert_eq!(pass(&mut kernel, &desired).0, [] as [String; 0]);
}

#[test]
fn drift_is_repaired() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    let addresses = netns.look("addr show dev shroud0")[0]["addr_info"].clone();
    let drifts: [(&str, &str); 12] = [
        ("route del 10.244.2.0/24", "added"),
        ("route del fd00:10:244:2::/64", "added"),
        (
            "route change 10.244.2.0/24 via 172.18.0.2 dev eth0 proto 83 mtu 1400 src 10.244.1.0",
            "mtu 1400 -> ",
        ),
        (
            "route change 10.244.2.0/24 via 172.18.0.9 dev eth0 proto 83 mtu 1440",
            "via 172.18.0.9 dev eth0 mtu 1440 -> ",
        ),
        (
            "route change fd00:10:244:3::/64 via fd18::9 dev eth0 proto 83",
            "via fd18::9 dev eth0 -> ",
        ),
        ("route add 10.244.9.0/24 via 172.18.0.2 dev eth0 proto 83", "removed"),
        (
            "route add blackhole 10.244.9.0/24 proto 83",
            "route blackhole 10.244.9.0/24: removed",
        ),
        (
            "route add fd00:9::/64 proto 83 nexthop via fd18::2 nexthop via fd18::3",
            "removed",
        ),
        (
            "route add 10.244.2.0/24 via 172.18.0.9 dev eth0 proto 83 metric 5",
            "metric 5: removed",
        ),
        ("addr del fd00:10:244:1::/128 dev shroud0", "added"),
        (
            "addr add 10.99.0.1/24 dev shroud0",
            "address 10.99.0.1/24 dev shroud0: removed",
        ),
        ("link set shroud0 mtu 1300", "mtu 1300 -> 1440"),
    ];

    for (drift, repair) in drifts {
        netns.ip(drift);
        let changes = converge(&mut kernel, &node());
        assert!(
            changes.iter().any(|change| change.contains(repair)),
            "{drift}: {changes:?}"
        );
        assert_eq!(netns.routes("proto 83"), NODE_ROUTES, "{drift}");
    }
    // The kernel takes more away than was said: IPv4 routes lose their life with their source address, and a link its IPv6 addresses.
    for drift in ["addr del 10.244.1.0/32 dev shroud0", "link set shroud0 down"] {
        netns.ip(drift);
        converge(&mut kernel, &node());
        assert_eq!(netns.routes("proto 83"), NODE_ROUTES, "{drift}");
    }
    let global = |addresses: &serde_json::Value| -> Vec<String> {
        let list = addresses
            .as_array()
            .unwrap()
            .iter()
            .filter(|address| address["scope"] == "global");
        list.map(|address| format!("{}/{}", address["local"], address["prefixlen"]))
            .collect()
    };
    assert_eq!(
        global(&netns.look("addr show dev shroud0")[0]["addr_info"]),
        global(&addresses)
    );
}

#[test]
fn an_address_of_the_wrong_length_is_set_right() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    netns.ip("link set shroud0 up");
    netns.ip("addr add 10.244.1.0/24 dev shroud0");
    netns.ip("addr add fd00:10:244:1::/64 dev shroud0 nodad");

    converge(&mut kernel, &node());

    assert_eq!(netns.routes("proto 83"), NODE_ROUTES);
}

#[test]
fn a_setting_that_drifts_is_set_again() {
    let _netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    std::fs::write("/proc/sys/net/ipv4/conf/shroud0/rp_filter", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();

    let changes = converge(&mut kernel, &node());

    assert_eq!(
        changes,
        [
            "sysctl net.ipv4.ip_forward: 0 -> 1",
            "sysctl net.ipv4.conf.shroud0.rp_filter: 1 -> 2"
        ]
    );
}

#[test]
fn a_setting_that_does_not_exist_is_an_error_that_says_so() {
    let _netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    let desired = Desired {
        sysctls: BTreeMap::from([(Sysctl::RpFilter("shroud9".to_owned()), "2".to_owned())]),
        ..Desired::default()
    };

    let (_, errors) = pass(&mut kernel, &desired);

    let texts: Vec<String> = errors.iter().map(Error::to_string).collect();
    assert_eq!(
        texts,
        [
            "set net.ipv4.conf.shroud9.rp_filter to 2: no /proc/sys/net/ipv4/conf/shroud9/rp_filter; \
          the device is gone, or this kernel has no such setting"
        ]
    );
}

#[test]
fn routes_from_router_advertisements_survive_forwarding() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    netns.ip("route add 2001:db8::/64 via fe80::1 dev eth0 proto ra");
    let accept_ra =
        |device: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{device}/accept_ra")).unwrap();
    assert_eq!(
        accept_ra("eth0").trim(),
        "1",
        "the kernel's default, on which this test builds"
    );

    let changes = converge(&mut kernel, &node());

    let position = |text: &str| changes.iter().position(|change| change == text).unwrap();
    assert!(
        position("sysctl net.ipv6.conf.eth0.accept_ra: 1 -> 2")
            < position("sysctl net.ipv6.conf.all.forwarding: 0 -> 1"),
        "{changes:?}"
    );
    assert_eq!(accept_ra("eth0").trim(), "2");
    assert_eq!(
        accept_ra("peer0").trim(),
        "1",
        "a device without such routes keeps its setting"
    );
}

#[test]
fn what_is_foreign_stays_untouched() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    for command in [
        "route add 10.244.7.0/24 via 172.18.0.7 dev eth0 proto static",
        "route add 10.244.2.0/24 via 172.18.0.7 dev eth0 proto static metric 100",
        "route add 10.244.2.0/25 via 172.18.0.7 dev eth0",
        "route add 10.244.2.0/24 via 172.18.0.7 dev eth0 proto 83 table 77",
        "route add fd00:7::/64 via fd18::7 dev eth0 proto bird",
        "route add fd00:7::/64 via fd18::7 dev eth0 proto 83 table 77",
        "route add fd00:10:244:2::/64 via fd18::7 dev eth0 metric 2000",
        "route add default via 172.18.0.254 dev eth0",
        "addr add 192.0.2.1/24 dev eth0",
        "addr add fe80::9/64 dev shroud0",
    ] {
        netns.ip(command);
    }
    let foreign = |netns: &Netns| {
        let mut routes = netns.routes("table main");
        routes.retain(|line| !line.contains("proto 83") && !line.contains("fe80"));
        routes.extend(netns.routes("table 77"));
        (
            routes,
            netns.ip("addr show dev eth0").replace(" tentative", ""),
            netns.ip("rule show"),
        )
    };
    let before = foreign(&netns);

    converge(&mut kernel, &node());
    assert_eq!(foreign(&netns), before);
    netns.ip("route change 10.244.2.0/24 via 172.18.0.9 dev eth0 proto 83 mtu 1440");
    converge(&mut kernel, &node());
    assert_eq!(foreign(&netns), before);
    let removal = kernel.remove();

    assert_eq!((removal.removed.len(), removal.errors.len()), (4, 0), "{removal:?}");
    assert_eq!(netns.routes("proto 83"), [] as [String; 0]);
    assert_eq!(foreign(&netns), before);
    assert!(netns.ip("addr show dev shroud0").contains("fe80::9/64"));
}

#[test]
fn a_foreign_route_in_the_way_is_named_and_not_overwritten() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    netns.ip("route add 10.244.2.0/24 via 172.18.0.7 dev eth0 proto static");
    netns.ip("route add fd00:10:244:2::/64 via fd18::7 dev eth0 proto bird");

    let (_, errors) = pass(&mut kernel, &node());

    let texts: Vec<String> = errors.iter().map(Error::to_string).collect();
    assert_eq!(
        texts,
        [
            "add route 10.244.2.0/24 via 172.18.0.2 dev eth0 src 10.244.1.0 mtu 1440: there is 10.244.2.0/24 via 172.18.0.7 dev eth0 \
             proto static already, which is not ours; remove that route (or what makes it); a range of pods can also be taken out of the pod ranges",
            "add route fd00:10:244:2::/64 via fd18::2 dev eth0 src fd00:10:244:1:: mtu 1420: there is fd00:10:244:2::/64 via fd18::7 dev eth0 \
             proto bird already, which is not ours; remove that route (or what makes it); a range of pods can also be taken out of the pod ranges",
        ]
    );
    assert_eq!(netns.routes("proto static"), ["10.244.2.0/24 via 172.18.0.7 dev eth0"]);
    assert_eq!(
        netns.routes("proto bird"),
        ["fd00:10:244:2::/64 via fd18::7 dev eth0 metric 1024"]
    );
    assert_eq!(netns.routes("proto 83").len(), 2, "the others are there");
}

#[test]
fn a_replacement_never_hits_a_foreign_route_that_shares_the_place() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    // In front of ours (IPv4), and as another next hop of it (IPv6).
    netns.ip("route prepend 10.244.2.0/24 via 172.18.0.7 dev eth0 proto static");
    netns.ip("route append fd00:10:244:2::/64 via fd18::7 dev eth0 proto static");
    let changed = |route: Route| Route {
        mtu: Some(Mtu::new(1300).unwrap()),
        ..route
    };
    let desired = Desired {
        routes: node().routes.into_iter().map(changed).collect(),
        ..node()
    };

    let (_, errors) = pass(&mut kernel, &desired);

    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(
        errors.iter().all(|error| matches!(error, Error::Occupied { .. })),
        "{errors:?}"
    );
    assert_eq!(
        netns.routes("proto static"),
        [
            "10.244.2.0/24 via 172.18.0.7 dev eth0",
            "fd00:10:244:2::/64 via fd18::7 dev eth0 metric 1024"
        ]
    );
}

#[test]
fn a_replacement_leaves_no_moment_without_a_route() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    let arguments = ["-n", netns.name(), "monitor", "route"];
    let mut monitor = Running(
        Command::new("ip")
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(monitor.0.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    // What was said up to a route that only marks the place.
    let mut sentinel = 0;
    let mut until = |lines: &mut dyn Iterator<Item = String>, netns: &Netns| -> Vec<String> {
        sentinel += 1;
        let destination = format!("198.51.100.{sentinel}");
        netns.ip(&format!("route add {destination}/32 dev peer0"));
        lines.take_while(|line| !line.starts_with(&destination)).collect()
    };
    let listener = format!(" {} ", monitor.0.id());
    wait("ip monitor listens", || {
        std::fs::read_to_string("/proc/thread-self/net/netlink")
            .unwrap()
            .contains(&listener)
    });
    until(&mut lines, &netns);
    let changed = |route: Route| Route {
        mtu: Some(Mtu::new(1300).unwrap()),
        ..route
    };
    let desired = Desired {
        routes: node().routes.into_iter().map(changed).collect(),
        ..node()
    };

    converge(&mut kernel, &desired);
    let seen = until(&mut lines, &netns);
    let deleted = |seen: &[String]| seen.iter().filter(|line| line.starts_with("Deleted")).count();
    assert_eq!(
        (
            seen.iter().filter(|line| line.contains("mtu 1300")).count(),
            deleted(&seen)
        ),
        (4, 0),
        "{seen:#?}"
    );

    // The same eye does see a gap when there is one.
    let _ = kernel.remove();
    let seen = until(&mut lines, &netns);
    assert_eq!(deleted(&seen), 4, "{seen:#?}");
}

#[test]
fn an_ipv4_range_can_go_by_an_ipv6_next_hop() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    let route = Route {
        destination: prefix("10.244.2.0/24"),
        device: "eth0".to_owned(),
        via: Some(ip("fd18::2")),
        source: None,
        mtu: None,
        onlink: false,
        encapsulation: None,
        table: Table::Main,
    };
    let desired = Desired {
        routes: BTreeSet::from([route.clone()]),
        ..Desired::default()
    };

    converge(&mut kernel, &desired);
    assert_eq!(netns.routes("proto 83"), ["10.244.2.0/24 via inet6 fd18::2 dev eth0"]);

    let reversed = Route {
        destination: prefix("fd00:2::/64"),
        via: Some(ip("172.18.0.2")),
        ..route
    };
    let error = kernel.apply(&Change::AddRoute(reversed)).unwrap_err();
    assert!(matches!(error, Error::Families { .. }), "{error}");
}

#[test]
fn a_thousand_routes_take_little_time() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    let routes = |mtu: u32| -> BTreeSet<Route> {
        (0..1000u32)
            .map(|n| match n % 2 {
                0 => route(
                    &format!("10.{}.{}.0/24", 100 + n / 256, n % 256),
                    "172.18.0.2",
                    "10.244.1.0",
                    mtu,
                ),
                _ => route(&format!("fd00:{n:x}::/64"), "fd18::2", "fd00:10:244:1::", mtu),
            })
            .collect()
    };
    let began = Instant::now();

    converge(
        &mut kernel,
        &Desired {
            routes: routes(1440),
            ..node()
        },
    );
    converge(
        &mut kernel,
        &Desired {
            routes: routes(1400),
            ..node()
        },
    );
    let taken = began.elapsed();

    assert_eq!(
        netns
            .routes("proto 83")
            .iter()
            .filter(|line| line.contains("mtu 1400"))
            .count(),
        1000
    );
    assert!(taken < Duration::from_secs(10), "{taken:?}");
    eprintln!("1000 routes added and replaced, four passes: {taken:?}");
    assert_eq!(kernel.remove().removed.len(), 1000);
}

#[test]
fn a_device_that_vanishes_midway_is_an_error_and_then_made_good() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    let observed = kernel.observe(&node()).unwrap();
    let changes = diff(&node(), &observed);
    netns.ip("link del shroud0");

    let errors: Vec<Error> = changes.iter().filter_map(|change| kernel.apply(change).err()).collect();

    assert_eq!(
        errors[0].to_string(),
        "device shroud0: mtu 1500 -> 1440: no device shroud0"
    );
    let (changes, errors) = pass(&mut kernel, &node());
    assert_eq!(
        (changes[0].as_str(), errors[0].to_string()),
        (
            "device shroud0: down -> up",
            "device shroud0: down -> up: no device shroud0".to_owned()
        )
    );
    netns.ip("tuntap add shroud0 mode tun");
    converge(&mut kernel, &node());
    assert_eq!(netns.routes("proto 83"), NODE_ROUTES);
}

#[test]
fn a_device_that_is_not_ours_is_never_set_up() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    let before = netns.ip("addr show dev eth0");
    let link = Link {
        mtu: Mtu::new(1440).unwrap(),
        addresses: BTreeSet::new(),
    };
    let desired = Desired {
        links: BTreeMap::from([("eth0".to_owned(), link)]),
        ..Desired::default()
    };

    let error = kernel.observe(&desired).unwrap_err();
    let change = Change::RemoveAddress {
        device: "eth0".to_owned(),
        address: ip("172.18.0.1"),
        length: 24,
    };
    let other = kernel.apply(&change).unwrap_err();

    assert_eq!(
        error.to_string(),
        "read device eth0: device eth0 is veth, not one of ours (a tun, wireguard, vxlan or geneve device); nothing was changed, name another device"
    );
    assert!(matches!(other, Error::NotOurs { .. }), "{other}");
    assert_eq!(netns.ip("addr show dev eth0"), before);
}

#[test]
fn only_our_own_device_is_deleted() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    netns.ip("tuntap add vpn0 mode tun");
    netns.ip("link add shroud-veth type veth peer name other");

    assert!(matches!(kernel.delete_link("vpn0"), Err(Error::NotOurs { .. })));
    assert!(matches!(kernel.delete_link("shroud-veth"), Err(Error::NotOurs { .. })));
    assert!(kernel.delete_link("shroud0").unwrap());
    assert!(!kernel.delete_link("shroud0").unwrap());

    let names: Vec<String> = netns
        .look("link show")
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["ifname"].to_string())
        .collect();
    assert!(
        names.contains(&"\"vpn0\"".to_owned()) && names.contains(&"\"shroud-veth\"".to_owned()),
        "{names:?}"
    );
    assert!(!names.contains(&"\"shroud0\"".to_owned()), "{names:?}");
}

#[test]
fn facts_are_what_iproute2_shows() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    netns.ip("link set eth0 mtu 1400");
    assert_eq!(
        kernel.facts(&BTreeSet::new()).unwrap().default_route_devices,
        BTreeSet::new()
    );
    netns.ip("route add default via fd18::ff dev eth0");

    let facts = kernel.facts(&BTreeSet::new()).unwrap();

    assert_eq!(facts.default_route_devices, BTreeSet::from(["eth0".to_owned()]));
    let shown: BTreeMap<String, (u64, u64, bool)> = netns
        .look("-d link show")
        .as_array()
        .unwrap()
        .iter()
        .map(|link| {
            let up = link["flags"].as_array().unwrap().contains(&"UP".into());
            (
                link["ifname"].as_str().unwrap().to_owned(),
                (link["ifindex"].as_u64().unwrap(), link["mtu"].as_u64().unwrap(), up),
            )
        })
        .collect();
    let read: BTreeMap<String, (u64, u64, bool)> = facts
        .links
        .iter()
        .map(|(name, link)| (name.clone(), (link.index.into(), link.mtu.into(), link.up)))
        .collect();
    assert_eq!(read, shown);
    assert_eq!(facts.links["eth0"].kind.as_deref(), Some("veth"));
    assert_eq!(facts.links["shroud0"].kind.as_deref(), Some("tun"));
    assert_eq!(facts.links["lo"].kind, None);
    let address = |text: &str, length, scope| Address {
        address: ip(text),
        length,
        scope,
    };
    assert!(
        facts.links["eth0"]
            .addresses
            .contains(&address("172.18.0.1", 24, Scope::Global))
    );
    assert!(
        facts.links["eth0"]
            .addresses
            .contains(&address("fd18::1", 64, Scope::Global))
    );
    assert!(
        facts.links["eth0"]
            .addresses
            .iter()
            .any(|address| address.scope == Scope::Link)
    );
    assert!(
        facts.links["lo"]
            .addresses
            .contains(&address("127.0.0.1", 8, Scope::Host))
    );
}

#[test]
fn pod_devices_are_those_to_which_pod_ranges_are_routed() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    for command in [
        "link add pod1 type veth peer name pod1p",
        "link set pod1 up",
        "route add 10.244.1.5/32 dev pod1",
        "link add pod2 type veth peer name pod2p",
        "link set pod2 up",
        "route add fd00:10:244:1::6/128 dev pod2 table 77",
        "link add cni0 type veth peer name cni0p",
        "link set cni0 up",
        "addr add 10.244.1.129/25 dev cni0",
        "route add 10.0.0.0/8 dev peer0",
        "route add default via 172.18.0.254 dev eth0",
        "route add blackhole 10.244.1.64/26",
    ] {
        netns.ip(command);
    }

    let ours = BTreeSet::from([prefix("10.244.1.0/24"), prefix("fd00:10:244:1::/64")]);

    let facts = kernel.facts(&ours).unwrap();
    assert_eq!(
        facts.pod_route_devices,
        ["cni0", "pod1", "pod2"].map(str::to_owned).into()
    );
    assert_eq!(facts.default_route_devices, ["eth0".to_owned()].into());
    assert_eq!(
        kernel.facts(&BTreeSet::new()).unwrap().pod_route_devices,
        BTreeSet::new()
    );
}

#[test]
fn many_lookups_at_once_say_the_same_as_one_by_one() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    for command in [
        "route add blackhole 10.7.0.0/16",
        "route add prohibit 10.8.0.0/16",
        "route add unreachable 10.9.0.0/16",
    ] {
        netns.ip(command);
    }
    // More than are asked at once, each kind in between the others.
    let destinations: BTreeSet<IpAddr> = (0..=255)
        .flat_map(|last| {
            [
                [10, 7, 0, last],
                [10, 8, 0, last],
                [10, 9, 0, last],
                [172, 18, 0, last],
                [198, 51, 100, last],
            ]
        })
        .map(IpAddr::from)
        .collect();

    let all = kernel.lookup_all(&destinations, None).unwrap();

    let each = destinations
        .iter()
        .map(|destination| (*destination, kernel.lookup(*destination, None, None).unwrap()));
    assert_eq!(all, each.collect());
    let kinds: BTreeSet<HopKind> = all.values().map(|hop| hop.kind).collect();
    assert!(kinds.len() >= 5, "{kinds:?}");
}

#[test]
fn a_lookup_says_what_becomes_of_a_packet() {
    let netns = Netns::enter();
    let mut kernel = Kernel::open().unwrap();
    converge(&mut kernel, &node());
    for command in [
        "link add pod1 type veth peer name pod1p",
        "link set pod1 up",
        "route add 10.244.1.5/32 dev pod1",
        "route add fd00:10:244:1::5/128 dev pod1",
        "route add blackhole 10.9.0.0/24",
        "route add unreachable 10.9.1.0/24",
        "route add prohibit 10.9.2.0/24",
        "route add blackhole fd09:0::/64",
        "route add unreachable fd09:1::/64",
        "route add prohibit fd09:2::/64",
    ] {
        netns.ip(command);
    }
    let mut kind =
        |destination: &str, source: Option<&str>| kernel.lookup(ip(destination), source.map(ip), None).unwrap().kind;

    for (destination, expected) in [
        ("10.244.1.0", HopKind::Local),
        ("fd00:10:244:1::", HopKind::Local),
        ("10.9.0.1", HopKind::Blackhole),
        ("10.9.1.1", HopKind::Unreachable),
        ("10.9.2.1", HopKind::Prohibit),
        ("fd09:0::1", HopKind::Blackhole),
        ("fd09:1::1", HopKind::Unreachable),
        ("fd09:2::1", HopKind::Prohibit),
        ("8.8.8.8", HopKind::NoRoute),
        ("2001:db8::1", HopKind::NoRoute),
        ("172.18.0.255", HopKind::Broadcast),
    ] {
        assert_eq!(kind(destination, None), expected, "{destination}");
    }
    // From a pod, whose packets come in by its device.
    assert_eq!(kind("10.9.0.1", Some("10.244.1.5")), HopKind::Blackhole);
    assert_eq!(kind("10.244.1.0", Some("10.244.1.5")), HopKind::Local);
    // Nobody knows a way back to that source.
    assert_eq!(kind("10.244.2.7", Some("203.0.113.1")), HopKind::Refused);

    for (source, own) in [
        (None, Some(ip("10.244.1.0"))),
        (Some(ip("10.244.1.5")), None),
        (Some(ip("172.18.0.1")), None),
    ] {
        let hop = kernel.lookup(ip("10.244.2.7"), source, None).unwrap();
        assert_eq!(
            (hop.kind, hop.device.as_deref(), hop.via, hop.mtu),
            (HopKind::Unicast, Some("eth0"), Some(ip("172.18.0.2")), Some(1440)),
            "{hop:?}"
        );
        if source.is_none() {
            assert_eq!(hop.source, own);
        }
    }
    let hop = kernel
        .lookup(ip("fd00:10:244:2::7"), Some(ip("fd00:10:244:1::5")), None)
        .unwrap();
    assert_eq!(
        (hop.kind, hop.device.as_deref(), hop.via, hop.mtu),
        (HopKind::Unicast, Some("eth0"), Some(ip("fd18::2")), Some(1420)),
        "{hop:?}"
    );
}

/// Waits for the next wake-up, but not for ever.
async fn wake(monitor: &mut Monitor, patience: Duration) -> Option<Wake> {
    tokio::time::timeout(patience, monitor.changed())
        .await
        .ok()
        .map(Result::unwrap)
}

#[tokio::test(flavor = "current_thread")]
async fn the_monitor_wakes_for_each_kind_of_change_and_then_sleeps() {
    let netns = Netns::enter();
    let mut monitor = Monitor::open().unwrap();
    // What a change still echoes (link-local addresses, carriers) is not the next change's notice.
    let quiet = Duration::from_millis(300);

    for change in [
        "link set shroud0 up",
        "addr add 10.244.1.0/32 dev shroud0",
        "addr add fd00:10:244:1::/128 dev shroud0",
        "route add 10.244.2.0/24 via 172.18.0.2 dev eth0",
        "route del 10.244.2.0/24",
        "route add fd00:2::/64 via fd18::2 dev eth0",
        "rule add from 10.0.0.0/8 lookup 77",
        "-6 rule add from fd00::/8 lookup 77",
        "link del shroud0",
    ] {
        while wake(&mut monitor, quiet).await.is_some() {}
        netns.ip(change);
        assert_eq!(
            wake(&mut monitor, Duration::from_secs(5)).await,
            Some(Wake::Changed),
            "{change}"
        );
    }
}

/// The kernel of a network namespace, which the calling thread enters.
fn kernel_of(netns: &str) -> Kernel {
    let file = std::fs::File::open(format!("/run/netns/{netns}")).unwrap();
    let network = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), network).unwrap();
    Kernel::open().unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn what_we_change_ourselves_wakes_nobody_once_it_is_to_be_ignored() {
    let netns = Netns::enter();
    let mut monitor = Monitor::open().unwrap();
    let ignored = monitor.ignore();
    let quiet = Duration::from_millis(300);
    let (name, added) = (netns.name().to_owned(), Duration::from_secs(5));
    while wake(&mut monitor, quiet).await.is_some() {}

    let route = |third: u8| Route {
        destination: prefix(&format!("10.100.{third}.0/24")),
        device: "eth0".to_owned(),
        via: Some(ip("172.18.0.2")),
        source: None,
        mtu: None,
        onlink: false,
        encapsulation: None,
        table: Table::Main,
    };
    let mut kernel = tokio::task::spawn_blocking(move || {
        let mut kernel = kernel_of(&name);
        kernel.apply(&Change::AddRoute(route(1))).unwrap();
        kernel
    })
    .await
    .unwrap();
    assert_eq!(
        wake(&mut monitor, added).await,
        Some(Wake::Changed),
        "nobody is ignored yet"
    );

    ignored.store(kernel.port(), std::sync::atomic::Ordering::Relaxed);
    let changed = tokio::task::spawn_blocking(move || kernel.apply(&Change::AddRoute(route(2))));
    changed.await.unwrap().unwrap();
    assert_eq!(wake(&mut monitor, quiet).await, None);

    netns.ip("route add 10.100.3.0/24 via 172.18.0.2 dev eth0");
    assert_eq!(wake(&mut monitor, added).await, Some(Wake::Changed), "others are heard");
}

#[tokio::test(flavor = "current_thread")]
async fn a_flood_of_changes_is_a_change_too() {
    let netns = Netns::enter();
    let mut monitor = Monitor::open().unwrap();
    let mut kernel = tokio::task::spawn_blocking({
        let name = netns.name().to_owned();
        move || {
            let mut kernel = kernel_of(&name);
            let routes = (0..4000u32).map(|n| Route {
                destination: prefix(&format!("10.{}.{}.0/24", 100 + n / 256, n % 256)),
                device: "eth0".to_owned(),
                via: Some(ip("172.18.0.2")),
                source: None,
                mtu: None,
                onlink: false,
                encapsulation: None,
                table: Table::Main,
            });
            for route in routes {
                kernel.apply(&Change::AddRoute(route)).unwrap();
            }
            kernel
        }
    })
    .await
    .unwrap();

    assert_eq!(wake(&mut monitor, Duration::from_secs(5)).await, Some(Wake::Overrun));
    while wake(&mut monitor, Duration::from_millis(300)).await.is_some() {}
    drop(tokio::task::spawn_blocking(move || kernel.remove()).await.unwrap());
    assert!(
        wake(&mut monitor, Duration::from_secs(5)).await.is_some(),
        "it still listens"
    );
}

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until something is so.
fn wait(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < Duration::from_secs(5), "{what}");
        std::thread::yield_now();
    }
}
