//! The prober against a path that carries less than planned and says nothing about it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use shroud_model::Mtu;
use shroud_routing::path_mtu::{PathState, Prober};

use super::ip;
use super::netns::Netns;

/// Another namespace, gone when dropped.
struct Other(String);

impl Other {
    fn add(netns: &Netns, name: &str) -> Self {
        let name = format!("{}-{name}", netns.name());
        succeed(&format!("ip netns add {name}"));
        Self(name)
    }

    fn run(&self, command: &str) {
        succeed(&format!("ip netns exec {} {command}", self.0));
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn succeed(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// ```text
/// here up0 ── 1500 ── r0 router r1 ── narrow ── p0 peer
/// 10.244.1.0            drops its ICMP errors    10.244.2.0, fd00:10:244:2::
/// ```
fn path(netns: &Netns, narrow: u32) -> [Other; 2] {
    let (router, peer) = (Other::add(netns, "router"), Other::add(netns, "peer"));
    let (r, p) = (&router.0, &peer.0);
    for command in [
        format!("link add up0 type veth peer name r0 netns {r}"),
        "addr add 172.19.0.1/24 dev up0".to_owned(),
        "addr add fd19::1/64 dev up0 nodad".to_owned(),
        "addr add 10.244.1.0/32 dev lo".to_owned(),
        "addr add fd00:10:244:1::/128 dev lo nodad".to_owned(),
        "link set up0 up".to_owned(),
    ] {
        netns.ip(&command);
    }
    for command in [
        &format!("ip link add r1 type veth peer name p0 netns {p}"),
        "ip addr add 172.19.0.2/24 dev r0",
        "ip addr add fd19::2/64 dev r0 nodad",
        "ip addr add 172.20.0.2/24 dev r1",
        "ip addr add fd20::2/64 dev r1 nodad",
        "ip link set r0 up",
        &format!("ip link set r1 mtu {narrow} up"),
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
        "nft add table inet quiet",
        "nft 'add chain inet quiet output { type filter hook output priority 0; }'",
        "nft add rule inet quiet output icmp type destination-unreachable drop",
        "nft add rule inet quiet output icmpv6 type packet-too-big drop",
    ] {
        router.run(command);
    }
    for command in [
        "ip link set lo up",
        &format!("ip link set p0 mtu {narrow} up"),
        "ip addr add 172.20.0.1/24 dev p0",
        "ip addr add fd20::1/64 dev p0 nodad",
        "ip addr add 10.244.2.0/32 dev lo",
        "ip addr add fd00:10:244:2::/128 dev lo nodad",
        "ip route add default via 172.20.0.2",
        "ip route add default via fd20::2",
    ] {
        peer.run(command);
    }
    for command in [
        "ip route add 10.244.2.0/24 via 172.20.0.1",
        "ip route add fd00:10:244:2::/64 via fd20::1",
        "ip route add 10.244.1.0/24 via 172.19.0.1",
        "ip route add fd00:10:244:1::/64 via fd19::1",
        "ip route add blackhole 10.244.3.0/24",
    ] {
        router.run(command);
    }
    for route in [
        "10.244.2.0/24 via 172.19.0.2 src 10.244.1.0 mtu 1400",
        "fd00:10:244:2::/64 via fd19::2 src fd00:10:244:1:: mtu 1400",
        "10.244.3.0/24 via 172.19.0.2 src 10.244.1.0",
    ] {
        netns.ip(&format!("route add {route}"));
    }
    [router, peer]
}

#[test]
fn a_path_that_silently_carries_less_is_found_to_the_byte() {
    let netns = Netns::enter();
    let _path = path(&netns, 1436);
    let (v4, v6, dead) = (ip("10.244.2.0"), ip("fd00:10:244:2::"), ip("10.244.3.0"));
    let prober = Prober::start().unwrap();

    // More than their routes say, too: the question is what the path carries.
    let planned = Mtu::new(1440).unwrap();
    prober.set_targets(&BTreeMap::from([(v4, planned), (v6, planned), (dead, planned)]));
    let found = |peer: IpAddr| {
        let path = prober.snapshot()[&peer];
        (path.mtu.bytes(), path.state)
    };
    until(
        "both are found, the dead one is silent",
        || {
            [found(v4), found(v6), found(dead)]
                == [
                    (1436, PathState::Reduced),
                    (1436, PathState::Reduced),
                    (1440, PathState::Silent),
                ]
        },
        || format!("{:?}", prober.snapshot()),
    );

    let snapshot = prober.snapshot();
    assert!(
        snapshot[&v4].rtt.is_some_and(|rtt| rtt < Duration::from_secs(1)),
        "{snapshot:?}"
    );
    assert_eq!(snapshot[&dead].rtt, None);
    assert_eq!(snapshot[&dead].sent, snapshot[&dead].lost);
    assert!(
        snapshot[&v4].lost >= 6 && snapshot[&v4].sent > snapshot[&v4].lost,
        "{snapshot:?}"
    );
}

#[test]
fn a_path_that_carries_what_is_planned_is_confirmed_at_once() {
    let netns = Netns::enter();
    let _path = path(&netns, 1440);
    let (v4, v6) = (ip("10.244.2.0"), ip("fd00:10:244:2::"));
    let prober = Prober::start().unwrap();

    prober.set_targets(&[v4, v6].map(|peer| (peer, Mtu::new(1440).unwrap())).into());

    until(
        "both are confirmed",
        || {
            prober
                .snapshot()
                .values()
                .all(|path| path.state == PathState::Confirmed)
        },
        || format!("{:?}", prober.snapshot()),
    );
    // A plan that the device itself cannot carry is not sent at all, which is an answer too.
    prober.set_targets(&BTreeMap::from([(v4, Mtu::new(9000).unwrap())]));
    assert_eq!(prober.snapshot().len(), 1, "who is no target is forgotten");
    until(
        "the path is found",
        || prober.snapshot()[&v4].state == PathState::Reduced,
        || format!("{:?}", prober.snapshot()),
    );
    assert_eq!(prober.snapshot()[&v4].mtu.bytes(), 1440);
}

fn until(what: &str, mut condition: impl FnMut() -> bool, now: impl Fn() -> String) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: {}", now());
        std::thread::sleep(Duration::from_millis(100));
    }
}
