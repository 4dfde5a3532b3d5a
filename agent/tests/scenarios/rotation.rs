//! A node takes a new key while its pods talk: no packet is lost, nothing leaves in the clear, and the old key is gone afterwards.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{AgentOptions, Status};

use crate::mesh::{Mesh, SHROUD, none_was_lost, nothing_leaked};

/// How long a change of key may take: peers look every 3 s, and 6 s of silence show that nobody sends with the old key any more.
const CHANGED: Duration = Duration::from_secs(60);
/// The longest time in which an established connection may hear nothing: what a busy machine does to it by itself. A lost packet of an echo
/// that waits for it costs TCP's shortest timeout, and a key that only one side has would cost seconds.
const STALL: Duration = Duration::from_secs(1);

/// Three nodes whose idle tunnels speak every second.
fn mesh(name: &str) -> Result<Mesh> {
    let options = AgentOptions {
        keepalive: "1s".into(),
        ..AgentOptions::new(SHROUD)
    };
    let mesh = Mesh::started(name, 3, &options)?;
    mesh.all_healthy()?;
    Ok(mesh)
}

/// Connections between all three nodes.
fn pulses(mesh: &Mesh) -> Result<Vec<Pulse>> {
    mesh.pulses(&[("a0", "b0"), ("c0", "a0"), ("b1", "c1")], 3)
}

fn key(status: &Status) -> String {
    status.raw["publicKey"].as_str().unwrap_or_default().to_owned()
}

fn rotate(mesh: &Mesh, node: &str) -> Result<String> {
    let answer = mesh.json(node, &["rotate"])?;
    let key = answer["publicKey"].as_str();
    Ok(key.with_context(|| format!("{answer}"))?.to_owned())
}

/// Waits until a node has this key and no other, and each other one sends to it with that.
fn has_changed_to(mesh: &Mesh, node: &str, key: &str) -> Result<Status> {
    let status = mesh.eventually(
        &format!("{node} has its new key"),
        CHANGED,
        mesh.agent(node),
        |status| {
            let devices = status.raw["encryption"]["devices"].as_array();
            let of_others = |device: &Value| device["fingerprint"] != status.raw["fingerprint"];
            status.raw["publicKey"] == key
                && status.raw["rotation"] == Value::Null
                && devices.is_some_and(|devices| !devices.iter().any(of_others))
        },
    )?;
    for other in mesh.agents.iter().filter(|agent| agent.node().host.name != node) {
        mesh.eventually("the others know it by that key", CHANGED, other, |status| {
            let mut peers = status.peers.iter();
            mesh.is_healthy(status) && peers.any(|peer| peer.node == node && peer.public_key == key)
        })?;
    }
    Ok(status)
}

#[test]
fn a_node_takes_a_new_key_and_no_packet_is_lost() -> Result<()> {
    let mesh = mesh("rotate")?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;
    let old = key(&mesh.agent("a").status()?);

    let new = rotate(&mesh, "a")?;
    ensure!(new != old, "the new key is the old one");
    ensure!(rotate(&mesh, "a")? == new, "asking twice makes two keys");
    let status = has_changed_to(&mesh, "a", &new)?;

    let longest = none_was_lost(pulses)?;
    ensure!(longest < STALL, "the longest stall was {longest:?}");
    nothing_leaked(capture)?;
    mesh.all_flows_work("a1", "b1")?;
    mesh.all_flows_work("c1", "a1")?;
    let devices = status.raw["encryption"]["devices"].as_array().map_or(0, Vec::len);
    let links = mesh.lab.node("a").host.netns.ip("-o link show")?;
    let device = &mesh.lab.node("a").device;
    ensure!(links.matches(device.as_str()).count() >= devices, "{links}");
    ensure!(
        !links.contains(&format!(" {device}:")),
        "the device of the old key is still there:\n{links}"
    );
    Ok(())
}

#[test]
fn all_change_their_keys_at_once_and_again() -> Result<()> {
    let mesh = mesh("rotateall")?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;

    for _ in 0..2 {
        let keys = ["a", "b", "c"].map(|node| Ok((node, rotate(&mesh, node)?)));
        let keys: Vec<(&str, String)> = keys.into_iter().collect::<Result<_>>()?;
        for (node, key) in keys {
            has_changed_to(&mesh, node, &key)?;
        }
    }

    let longest = none_was_lost(pulses)?;
    ensure!(longest < STALL, "the longest stall was {longest:?}");
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn an_agent_that_is_killed_in_the_middle_goes_on_with_the_change() -> Result<()> {
    let mut mesh = mesh("rotatekill")?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;

    let new = rotate(&mesh, "a")?;
    for _ in 0..3 {
        mesh.agent_mut("a").kill()?;
        mesh.agent_mut("a").restart()?;
        let within = Duration::from_secs(10);
        mesh.eventually("a goes on", within, mesh.agent("a"), |status| status.pass.number > 1)?;
    }
    has_changed_to(&mesh, "a", &new)?;

    let longest = none_was_lost(pulses)?;
    ensure!(longest < STALL, "the longest stall was {longest:?}");
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn a_peer_whose_agent_is_away_keeps_its_connections_and_is_waited_for() -> Result<()> {
    let mut mesh = mesh("rotateaway")?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;
    mesh.agent_mut("b").terminate(Duration::from_secs(5))?;

    let new = rotate(&mesh, "a")?;
    mesh.eventually("a waits for b alone", CHANGED, mesh.agent("a"), |status| {
        status.raw["rotation"]["waiting"] == serde_json::json!(["b"]) && status.raw["rotation"]["followed"] == 1
    })?;
    mesh.agent_mut("b").restart()?;
    has_changed_to(&mesh, "a", &new)?;

    let longest = none_was_lost(pulses)?;
    ensure!(longest < STALL, "the longest stall was {longest:?}");
    nothing_leaked(capture)?;
    Ok(())
}
