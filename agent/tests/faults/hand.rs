//! C4 and C5: somebody's hand on routes, rules, pins, peers and settings, or on what we need.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv6Addr, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use shroud_lab::agent::LISTEN_PORT;
use shroud_lab::{Node, Status};

use crate::field::Field;
use crate::row::{self, Row};
use crate::strace::signal;

pub(crate) const ROWS: &[Row] = &[
    Row::new("C4/routes", "our routes are flushed", routes_flushed)
        .cuts_the_path()
        .core(),
    Row::new("C4/rules", "our rules are deleted", rules_deleted)
        .with(|options| shroud_lab::AgentOptions { nodes: true, ..options })
        .well(nodes_are_encrypted)
        .cuts_the_path(),
    Row::new("C4/settings", "forwarding is switched off", forwarding_off).cuts_the_path(),
    Row::new("C4/pins", "all our pins are removed", pins_removed).core(),
    Row::new(
        "C4/wg",
        "peers, ranges, key, port and mark are changed by `wg set`",
        changed_by_wg,
    )
    .cuts_the_path(),
    Row::new("C5", "another program has our port", port_taken)
        .cuts_the_path()
        .needs(row::userspace),
];

/// How our rules begin in a listing: by their priority.
const OUR_RULES: &str = "83:";

fn routes_flushed(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let netns = field.lab.node("a").host.netns.clone();
    netns.ip("-4 route flush proto 83")?;
    netns.ip("-6 route flush proto 83")?;
    field.fault();
    field.heals()
}

/// Whether an agent is well, and encrypts the traffic of the nodes themselves with both others.
pub(crate) fn nodes_are_encrypted(status: &Status) -> bool {
    let peers = status.raw["peers"].as_array().into_iter().flatten();
    status.verdict == "healthy" && peers.filter(|peer| peer["encryptsNodes"] == true).count() == 2
}

fn rules_deleted(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let netns = field.lab.node("a").host.netns.clone();
    for family in ["-4", "-6"] {
        let rules = netns.ip(&format!("{family} rule show"))?;
        let ours = rules.lines().filter(|line| line.starts_with(OUR_RULES)).count();
        ensure!(ours > 0, "no rule of ours:\n{rules}");
        for _ in 0..ours {
            netns.ip(&format!("{family} rule delete priority 83"))?;
        }
    }
    field.fault();
    field.heals()
}

fn forwarding_off(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let netns = field.lab.node("a").host.netns.clone();
    netns.set_sysctl("net.ipv4.ip_forward", "0")?;
    netns.set_sysctl("net.ipv6.conf.all.forwarding", "0")?;
    field.fault();
    field.heals()
}

/// What holds the gate to its devices goes by its pin; the agent that lives must not let go.
fn pins_removed(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let node = field.node("a");
    fs::remove_dir_all(&node.pins).with_context(|| format!("remove {}", node.pins.display()))?;
    field.fault();
    field.heals()
}

fn changed_by_wg(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    let status = field.status("a")?;
    let [first, second] = &status.peers[..] else {
        anyhow::bail!("{} peers", status.peers.len());
    };
    let foreign = node.folder.join("foreign-key");
    let mut file = fs::File::create(&foreign).context("make a key")?;
    file.write_all(b"WGFwYXJ0bWVudGtleWtleWtleWtleWtleWtleWtlWE4=\n")?;
    let changes = [
        vec!["peer", first.public_key.as_str(), "remove"],
        vec!["peer", first.public_key.as_str(), "allowed-ips", "10.9.0.0/16"],
        // All that the second peer has, to the first.
        vec![
            "peer",
            first.public_key.as_str(),
            "allowed-ips",
            "10.244.0.0/16,fd00:10:244::/48",
        ],
        vec!["peer", second.public_key.as_str(), "endpoint", "192.0.2.1:9"],
        vec!["fwmark", "0x7"],
        vec!["listen-port", "51999"],
        vec!["private-key", foreign.to_str().context("a path in UTF-8")?],
    ];
    for change in changes {
        field.at_any_moment();
        let words = [&["set", node.device.as_str()], &change[..]].concat();
        node.host.netns.check("wg", &words)?;
        field.fault();
        field
            .heals()
            .with_context(|| format!("after `wg {}`", words.join(" ")))?;
    }
    Ok(())
}

/// While the data plane is being started anew, another program is quicker. Traffic waits, and nothing leaves in the clear.
fn port_taken(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    let pid = field.agent("a").pid();
    signal(pid, Signal::STOP)?;
    field.agent("a").kill_wire()?;
    let other = take_port(&node)?;
    signal(pid, Signal::CONT)?;
    let status = field.says("a", "it names the port", |status| {
        status.says("tunnel-port-taken").is_some()
    })?;
    ensure!(status.verdict == "degraded", "a says {}", status.verdict);
    field.lasts(3);
    drop(other);
    field.fault();
    field.heals()
}

fn take_port(node: &Node) -> Result<UdpSocket> {
    shroud_lab::eventually(
        "the port is free for a moment",
        std::time::Duration::from_secs(5),
        || {
            node.host
                .netns
                .run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, LISTEN_PORT)).context("take the port"))
                .map_err(|error| format!("{error:#}"))
        },
    )
}
