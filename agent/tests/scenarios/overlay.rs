//! Pods reached through VXLAN or Geneve, encrypted around the wrapping, and the way from one mode to another.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{Agent, AgentOptions, Lab, Status};

use crate::gate::packets;
use crate::mesh::{Mesh, SHROUD, nothing_leaked};

const WITHIN: Duration = Duration::from_secs(20);

pub(crate) fn with(mode: &str) -> AgentOptions {
    AgentOptions {
        mode: mode.to_owned(),
        ..AgentOptions::new(SHROUD)
    }
}

/// Whether this kernel can make such a device, asked through iproute2; says so where it cannot.
pub(crate) fn has(lab: &Lab, kind: &str) -> Result<bool> {
    let netns = &lab.internet.netns;
    if netns
        .ip(&format!("link add probe type {kind} external dstport 9999"))
        .is_ok()
    {
        netns.ip("link delete probe")?;
        return Ok(true);
    }
    // Not `eprintln!`, which the test runner keeps to itself when the test passes.
    writeln!(
        std::io::stderr(),
        "SKIPPED: {kind}; this kernel has no such devices, `make test-vm` boots some that have"
    )?;
    Ok(false)
}

/// Whether all peers are reached in this way.
pub(crate) fn reached_by(status: &Status, mode: &str) -> bool {
    let peers = status.raw["peers"].as_array().into_iter().flatten();
    peers.clone().count() > 0 && peers.into_iter().all(|peer| peer["mode"] == mode)
}

/// A mesh of three whose nodes all send in this mode.
fn mesh(mode: &str) -> Result<Option<Mesh>> {
    let mesh = Mesh::started(mode, 3, &with(mode))?;
    if mode != "native" && !has(&mesh.lab, mode)? {
        return Ok(None);
    }
    all_healthy_in(&mesh, mode)?;
    Ok(Some(mesh))
}

/// Waits until each agent says that everything is well, and sends to all peers in this mode.
pub(crate) fn all_healthy_in(mesh: &Mesh, mode: &str) -> Result<()> {
    mesh.all_healthy()?;
    for agent in &mesh.agents {
        let what = format!("{} sends in {mode}", agent.node().host.name);
        mesh.eventually(&what, WITHIN, agent, |status| {
            mesh.is_healthy(status) && reached_by(status, mode)
        })?;
    }
    Ok(())
}

fn carries_everything_encrypted(mode: &str) -> Result<()> {
    let Some(mesh) = mesh(mode)? else { return Ok(()) };
    let capture = mesh.capture()?;

    for (from, to) in [("a0", "b0"), ("b1", "c0"), ("c1", "a1")] {
        mesh.all_flows_work(from, to)?;
    }

    nothing_leaked(capture)?;
    let (from, to) = (mesh.lab.pod("a0").v4.to_string(), mesh.lab.pod("b0").v4.to_string());
    let explained = mesh.json("a", &["explain", &from, &to])?;
    let steps = explained["steps"].to_string();
    ensure!(
        explained["outcome"] == "encrypted"
            && steps.contains(&format!("wraps it in {mode} 21320"))
            && steps.contains("for b"),
        "{explained:#}"
    );
    let device = if mode == "vxlan" {
        "shroud.vxlan"
    } else {
        "shroud.geneve"
    };
    let statistics = mesh
        .lab
        .node("a")
        .host
        .netns
        .ip(&format!("-s -j link show dev {device}"))?;
    ensure!(
        !statistics.contains("\"packets\":0"),
        "nothing went through {device}: {statistics}"
    );
    Ok(())
}

#[test]
fn vxlan_carries_everything_encrypted() -> Result<()> {
    carries_everything_encrypted("vxlan")
}

#[test]
fn geneve_carries_everything_encrypted() -> Result<()> {
    carries_everything_encrypted("geneve")
}

/// The twin of the two above: with the gate off the same capture sees the pods' payloads inside the overlay's packets.
#[test]
fn an_overlay_with_the_gate_off_is_seen_on_the_wire() -> Result<()> {
    let mesh = Mesh::started("overlayoff", 2, &with("vxlan").gate("off"))?;
    mesh.eventually("a sends in VXLAN", WITHIN, mesh.agent("a"), |status| {
        reached_by(status, "vxlan")
    })?;
    mesh.eventually("b sends in VXLAN", WITHIN, mesh.agent("b"), |status| {
        reached_by(status, "vxlan")
    })?;

    mesh.is_seen_in_the_clear()
}

#[test]
fn a_change_of_mode_node_by_node_loses_no_connection_and_leaks_nothing() -> Result<()> {
    let Some(mut mesh) = mesh("native")? else { return Ok(()) };
    let mut modes = vec!["vxlan", "native"];
    if has(&mesh.lab, "geneve")? {
        modes = vec!["vxlan", "geneve", "native"];
    }
    let capture = mesh.capture()?;
    let pulses = mesh.pulses(&[("a0", "b0"), ("b0", "c0"), ("c0", "a0")], 2)?;

    for mode in modes {
        for name in ["a", "b", "c"] {
            mesh.agent_mut(name).terminate(Duration::from_secs(5))?;
            let node = mesh.lab.node(name).clone();
            *mesh.agent_mut(name) = Agent::start(&node, &with(mode))?;
            mesh.eventually(
                &format!("{name} is healthy in {mode}"),
                WITHIN,
                mesh.agent(name),
                |status| mesh.is_healthy(status),
            )?;
            mesh.all_flows_work("a1", "b1")?;
            mesh.all_flows_work("c1", "b1")?;
        }
        for agent in &mesh.agents {
            let what = format!("{} sends in {mode}", agent.node().host.name);
            mesh.eventually(&what, WITHIN, agent, |status| reached_by(status, mode))?;
        }
    }

    let mut lost = String::new();
    for beat in pulses.into_iter().flat_map(Pulse::stop) {
        if let Some(why) = beat.lost {
            writeln!(lost, "{}: {why}", beat.name)?;
        }
    }
    ensure!(lost.is_empty(), "{lost}");
    nothing_leaked(capture)?;
    for node in &mesh.lab.nodes {
        let left = node.host.netns.ip("-o link show")?;
        ensure!(
            !left.contains("shroud."),
            "an overlay device outlived its mode on {}: {left}",
            node.host.name
        );
    }
    Ok(())
}

/// Node c is somebody else's now. It has a good key, and sends wrapped packets in the name of a pod of node b.
#[test]
fn a_peer_cannot_send_in_the_name_of_another_nodes_pod() -> Result<()> {
    let Some(mesh) = mesh("vxlan")? else { return Ok(()) };
    let c = &mesh.lab.node("c").host.netns;
    let own = mesh.lab.node("c").prefix4.hosts().nth(76);
    let Some(own) = own else {
        anyhow::bail!("c has no 77th address")
    };
    let stolen = mesh.lab.pod("b0").v4;
    for address in [own, stolen] {
        c.ip(&format!("address add {address}/32 dev lo"))?;
    }
    // The reply to the stolen address goes to b, so what a's pod receives is what counts.
    let pod = mesh.lab.pod("a0");
    let received = || -> Result<u64> {
        let counters = pod.netns.check("nstat", &["-az", "IcmpInEchos"])?;
        let line = counters.lines().find(|line| line.starts_with("IcmpInEchos"));
        let count = line
            .and_then(|line| line.split_whitespace().nth(1))
            .and_then(|count| count.parse().ok());
        count.ok_or_else(|| anyhow::anyhow!("no counter in {counters}"))
    };
    let send = |source: &str| {
        c.exec(
            "ping",
            &["-c", "3", "-i", "0.2", "-W", "1", "-I", source, &pod.v4.to_string()],
        )
    };

    let before = received()?;
    send(&own.to_string())?;
    let honest = received()?;
    send(&stolen.to_string())?;
    let after = received()?;

    ensure!(
        honest >= before + 3,
        "not even an honest packet arrives: {before}, {honest}"
    );
    ensure!(after == honest, "a believed that c has b's pod: {honest}, {after}");
    let gate = mesh.json("a", &["gate"])?;
    let counted = [("verdict", "drop"), ("reason", "spoofed-source")];
    ensure!(packets(&gate, &counted) >= 3, "not counted: {gate:#}");
    Ok(())
}

/// Somebody on the underlay who is no node knows VNI and port.
#[test]
fn a_wrapped_packet_from_the_underlay_is_dropped() -> Result<()> {
    let Some(mesh) = mesh("vxlan")? else { return Ok(()) };
    let (stranger, a) = (&mesh.lab.underlay, mesh.lab.node("a"));
    let device = a.host.netns.ip("-o -d link show dev shroud.vxlan")?;
    let mac = device
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .ok_or_else(|| anyhow::anyhow!("no address in {device}"))?;
    stranger.ip(&format!(
        "link add injector type vxlan id 21320 dstport 4789 remote {} local 172.18.0.254",
        a.host.v4
    ))?;
    stranger.ip("link set injector up")?;
    stranger.ip("address add 203.0.113.7/24 dev injector")?;
    stranger.ip(&format!("neighbour add 203.0.113.1 lladdr {mac} dev injector"))?;
    stranger.ip(&format!(
        "route add {}/32 via 203.0.113.1 dev injector",
        mesh.lab.pod("a0").v4
    ))?;

    let target = mesh.lab.pod("a0").v4.to_string();
    stranger.exec("ping", &["-c", "3", "-i", "0.2", "-W", "1", &target])?;

    let gate = mesh.json("a", &["gate"])?;
    let counted = [("verdict", "drop"), ("reason", "clear-text"), ("direction", "ingress")];
    ensure!(packets(&gate, &counted) >= 3, "not counted: {gate:#}");
    Ok(())
}
