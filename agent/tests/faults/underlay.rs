//! G: addresses change, the network is cut, and it loses, changes, narrows or filters packets.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use shroud_lab::frame::Allowed;
use shroud_lab::topology::GATEWAY;
use shroud_lab::{Lab, Netns, Status};

use crate::field::Field;
use crate::row::{self, Row};

/// How long a mesh may take after a partition.
const AFTER_A_PARTITION: u64 = 20;

/// Where a node is after its address has changed.
const MOVED: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 101);

/// ICMP's number as an IP protocol.
const ICMP: u8 = 1;

/// How long until a path that swallows large packets is found and measured.
const NARROW: u64 = 90;

pub(crate) const ROWS: &[Row] = &[
    Row::new("G1", "a node gets another address", address_changed)
        .allows(redirects)
        .cuts_the_path()
        .leaves_changes(),
    Row::new("G2/node", "a node is cut off for 10 s", cut_off)
        .cuts_the_path()
        .heals_within(AFTER_A_PARTITION)
        .core(),
    Row::new("G2/one-way", "a node is not heard for 10 s", not_heard)
        .cuts_the_path()
        .heals_within(AFTER_A_PARTITION),
    Row::new(
        "G2/partial",
        "two of three cannot reach each other for 10 s",
        cut_in_part,
    )
    .cuts_the_path()
    .heals_within(AFTER_A_PARTITION),
    Row::new(
        "G3",
        "packets are lost, late, out of order, twice, and changed",
        disturbed,
    )
    .needs(row::netem)
    .cuts_the_path()
    .heals_within(AFTER_A_PARTITION),
    Row::new("G4", "large packets vanish without a word", narrow)
        .cuts_the_path()
        .leaves_changes()
        .heals_within(NARROW),
    Row::new("G5", "a node's port and address are translated", translated)
        .cuts_the_path()
        .heals_within(AFTER_A_PARTITION),
    Row::new("G6", "a firewall stops the tunnel one way for 15 s", filtered)
        .cuts_the_path()
        .heals_within(AFTER_A_PARTITION),
];

/// Until the others have learned the new address, the node's kernel gets what is for the old one, and tells that it is not here (RFC 792).
fn redirects(lab: &Lab, allowed: Allowed) -> Allowed {
    let nodes: Vec<IpNet> = lab
        .nodes
        .iter()
        .map(|node| IpNet::from(IpAddr::from(node.host.v4)))
        .collect();
    let moved = IpNet::from(IpAddr::from(MOVED));
    nodes.into_iter().fold(allowed, |allowed, node| {
        allowed.and("ICMP of the moved", (moved, node), Some(ICMP))
    })
}

fn address_changed(field: &mut Field) -> Result<()> {
    let netns = field.lab.node("a").host.netns.clone();
    let (v4, v6) = (field.lab.node("a").host.v4, field.lab.node("a").host.v6);
    netns.batch(&format!(
        "address delete {v4}/24 dev eth0\n\
         address add {MOVED}/24 dev eth0\n\
         route replace default via {} dev eth0\n\
         address add fd00:172:18::101/64 dev eth0 nodad\n\
         address delete {v6}/64 dev eth0\n\
         route replace ::/0 via {} dev eth0\n",
        GATEWAY.0, GATEWAY.1
    ))?;
    field.fault();
    field.heals()
}

/// Lets `ip` do something to the underlay's port of a node.
fn port(field: &Field, node: &str, what: &str) -> Result<()> {
    let port = field.node(node).port;
    field.lab.underlay.ip(&format!("link set {port} {what}")).map(drop)
}

fn cut_off(field: &mut Field) -> Result<()> {
    port(field, "b", "down")?;
    field.lasts(10);
    port(field, "b", "up")?;
    field.fault();
    field.heals()
}

/// Loads a table of rules, for as long as this lives.
struct Rules<'a>(&'a Netns, &'static str);

impl<'a> Rules<'a> {
    fn load(netns: &'a Netns, table: &'static str, chains: &str) -> Result<Rules<'a>> {
        netns.check("nft", &[&format!("table {table} {{ {chains}; }}")])?;
        Ok(Rules(netns, table))
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.check("nft", &[&format!("delete table {}", self.1)]) {
            eprintln!("{error:#}");
        }
    }
}

fn not_heard(field: &mut Field) -> Result<()> {
    let port = field.node("b").port;
    let chain = format!("chain from-b {{ type filter hook ingress device {port} priority 0; drop; }}");
    let underlay = field.lab.underlay.clone();
    let rules = Rules::load(&underlay, "netdev cut", &chain)?;
    field.lasts(10);
    drop(rules);
    field.fault();
    field.heals()
}

fn cut_in_part(field: &mut Field) -> Result<()> {
    let underlay = field.lab.underlay.clone();
    let ports = ["a", "b"].map(|name| field.node(name).port);
    // Isolated ports of a bridge speak to all others, and not to each other.
    let isolate = |how: &str| -> Result<()> {
        for port in &ports {
            underlay.check("bridge", &["link", "set", "dev", port, "isolated", how])?;
        }
        Ok(())
    };
    isolate("on")?;
    field.lasts(10);
    isolate("off")?;
    field.fault();
    field.heals()
}

fn disturbed(field: &mut Field) -> Result<()> {
    let port = field.node("b").port;
    let underlay = field.lab.underlay.clone();
    for how in [
        "loss 1%",
        "loss 5%",
        "loss 20%",
        "delay 20ms reorder 25% 50%",
        "duplicate 10%",
        "corrupt 1%",
        "delay 100ms 50ms",
    ] {
        let words = format!("qdisc add dev {port} root netem {how}");
        underlay.check("tc", &words.split(' ').collect::<Vec<_>>())?;
        field.lasts(6);
        underlay.check("tc", &["qdisc", "delete", "dev", &port, "root"])?;
        field.fault();
        field.heals().with_context(|| how.to_owned())?;
    }
    Ok(())
}

/// Whether the path to a node was measured, and is narrower than the uplink promises.
fn is_reduced(status: &Status, node: &str) -> bool {
    let mut peers = status.raw["peers"].as_array().into_iter().flatten();
    peers.any(|peer| peer["node"] == node && peer["path"]["state"] == "reduced")
}

fn narrow(field: &mut Field) -> Result<()> {
    port(field, "b", "mtu 1400")?;
    field.fault();
    eventually_reduced(field, "a", "b")?;
    eventually_reduced(field, "b", "a")?;
    field.heals()
}

fn eventually_reduced(field: &mut Field, at: &str, to: &str) -> Result<()> {
    let agent = field.agent(at);
    shroud_lab::eventually("the narrow path is found", Duration::from_secs(NARROW), || {
        let status = agent.status().map_err(|error| format!("{error:#}"))?;
        if is_reduced(&status, to) {
            Ok(())
        } else {
            Err(status.raw["peers"].to_string())
        }
    })
}

/// As behind a router that gives each flow a port of its own, and lets nobody in who was not asked: the others must answer to where packets
/// come from.
fn translated(field: &mut Field) -> Result<()> {
    let b = field.node("b").host;
    let chain = format!(
        "chain in {{ type filter hook input priority 0; udp dport 51820 ct state new drop; }}; \
         chain out {{ type nat hook postrouting priority 100; udp sport 51820 snat to {}:45000-46000; }}",
        b.v4
    );
    let rules = Rules::load(&b.netns, "ip nat", &chain)?;
    let a = field.node("a");
    shroud_lab::eventually("a answers to the translated port", Duration::from_secs(20), || {
        let endpoints = a.host.netns.check("wg", &["show", &a.device, "endpoints"]);
        let endpoints = endpoints.map_err(|error| format!("{error:#}"))?;
        if endpoints.contains(&format!("{}:45", b.v4)) {
            Ok(())
        } else {
            Err(endpoints)
        }
    })?;
    field.lasts(5);
    field.datagrams_pass()?;
    drop(rules);
    field.fault();
    field.heals()
}

fn filtered(field: &mut Field) -> Result<()> {
    let b = field.node("b").host;
    let chain = "chain in { type filter hook input priority 0; udp dport 51820 drop; }";
    let rules = Rules::load(&b.netns, "inet firewall", chain)?;
    field.lasts(15);
    drop(rules);
    field.fault();
    field.heals()
}
