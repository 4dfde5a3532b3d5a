//! Traffic of the nodes themselves, encrypted when both ask for it, and never in the way of a node that has to come back.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use shroud_lab::{Agent, AgentOptions, Family, Flow, Host, Outcome, Protocol};

use crate::mesh::{Mesh, SHROUD, nothing_leaked};

const WITHIN: Duration = Duration::from_secs(20);

fn with(nodes: bool) -> AgentOptions {
    AgentOptions {
        nodes,
        ..AgentOptions::new(SHROUD)
    }
}

/// A mesh of three in which every pair of nodes encrypts its own traffic.
fn mesh(name: &str, options: &AgentOptions) -> Result<Mesh> {
    let mesh = Mesh::started(name, 3, options)?;
    mesh.all_healthy()?;
    for agent in &mesh.agents {
        let what = format!("{} encrypts node traffic", agent.node().host.name);
        mesh.eventually(&what, WITHIN, agent, |status| {
            let peers = status.raw["peers"].as_array().into_iter().flatten();
            mesh.is_healthy(status) && peers.filter(|peer| peer["encryptsNodes"] == true).count() == 2
        })?;
    }
    Ok(mesh)
}

fn node<'a>(mesh: &'a Mesh, name: &str) -> &'a Host {
    &mesh.lab.node(name).host
}

/// Every kind of flow, both families, in both directions between two hosts.
fn all_flows_work(mesh: &Mesh, one: &Host, other: &Host) -> Result<()> {
    for protocol in Protocol::ALL {
        for family in Family::BOTH {
            for (from, to) in [(one, other), (other, one)] {
                let outcome = mesh.send(protocol, family, from, to);
                mesh.arrived(&outcome)?;
            }
        }
    }
    Ok(())
}

fn everything_is_encrypted(name: &str, mode: &str) -> Result<()> {
    let options = AgentOptions {
        mode: mode.to_owned(),
        ..with(true)
    };
    let mesh = mesh(name, &options)?;
    let capture = mesh.capture()?;

    all_flows_work(&mesh, node(&mesh, "a"), node(&mesh, "b"))?;
    all_flows_work(&mesh, node(&mesh, "b"), mesh.lab.pod("c0"))?;
    all_flows_work(&mesh, mesh.lab.pod("a0"), mesh.lab.pod("c1"))?;

    nothing_leaked(capture)?;
    let addresses = ["a", "b"].map(|name| node(&mesh, name).v4.to_string());
    for (asked, says) in [
        ("a", "it leaves this node encrypted for b"),
        ("b", "it arrives encrypted from a, or not at all"),
    ] {
        let explained = mesh.json(asked, &["explain", &addresses[0], &addresses[1]])?;
        ensure!(
            explained["outcome"] == "encrypted" && explained["because"] == says,
            "{explained:#}"
        );
    }
    Ok(())
}

#[test]
fn traffic_of_nodes_is_encrypted() -> Result<()> {
    everything_is_encrypted("nodes", "native")
}

#[test]
fn traffic_of_nodes_is_encrypted_around_an_overlay() -> Result<()> {
    everything_is_encrypted("nodesvxlan", "vxlan")
}

/// The twin: the same flows are seen where nobody asked for it, and where only one of two did, which nothing may break.
#[test]
fn traffic_of_nodes_is_in_the_clear_until_both_ask() -> Result<()> {
    let mut mesh = Mesh::started("nodesoff", 2, &with(false))?;
    mesh.all_healthy()?;
    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    let a = mesh.lab.node("a").clone();
    *mesh.agent_mut("a") = Agent::start(&a, &with(true))?;
    mesh.all_healthy()?;

    let capture = mesh.capture()?;
    all_flows_work(&mesh, node(&mesh, "a"), node(&mesh, "b"))?;

    let evidence = capture.stop()?;
    ensure!(evidence.plaintext_frames() > 0, "the oracle is blind: {evidence:?}");
    Ok(())
}

/// A question to a port and its answer: the way a node's own programs would.
fn answers(mesh: &Mesh, protocol: Protocol, from: &Host, to: &Host, port: u16) -> Outcome {
    Flow::new(protocol, Family::V4, from, to)
        .sizes(&[1000])
        .port(port)
        .patience(Duration::from_secs(3))
        .run(&mesh.lab.markers)
}

/// Node a burns down: its key, its state, and all that the kernel had of it are gone, and its old announcement is still out. Until its
/// agent is up again, and while the others still hold the old key, it reaches their API server and DNS ports, and nothing else.
#[test]
fn a_node_that_lost_everything_reaches_the_api_server_and_comes_back() -> Result<()> {
    let mut mesh = mesh("burnt", &with(true))?;
    let a = mesh.lab.node("a").clone();
    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    let config = shroud_lab::agent::config_file(&a).display().to_string();
    a.host.netns.check(SHROUD, &["cleanup", "--config", &config])?;
    fs::remove_dir_all(a.state())?;

    for (protocol, port) in [
        (Protocol::Tcp, 6443),
        (Protocol::Udp, 53),
        (Protocol::Tcp, 53),
        (Protocol::Tcp, 22),
    ] {
        let outcome = answers(&mesh, protocol, &a.host, node(&mesh, "b"), port);
        ensure!(outcome.ok(), "a is cut off from port {port}: {outcome:?}");
        let outcome = answers(&mesh, protocol, node(&mesh, "b"), &a.host, port);
        ensure!(outcome.ok(), "a cannot be reached on port {port}: {outcome:?}");
    }
    let outcome = answers(&mesh, Protocol::Tcp, &a.host, node(&mesh, "b"), 8080);
    ensure!(!outcome.ok(), "b believed what came in the clear: {outcome:?}");

    *mesh.agent_mut("a") = Agent::start(&a, &with(true))?;
    mesh.all_healthy()?;
    let capture = mesh.capture()?;
    all_flows_work(&mesh, &a.host, node(&mesh, "b"))?;
    nothing_leaked(capture)?;
    Ok(())
}
