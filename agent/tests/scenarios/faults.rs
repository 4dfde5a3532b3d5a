//! Invariants I1, I2 and I6: whatever dies, nothing leaves in the clear, and established connections live on.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{AgentOptions, Family, Protocol};

use crate::mesh::{Mesh, SHROUD, none_was_lost, nothing_leaked};

/// Long-lived TCP connections in both families.
fn pulses(mesh: &Mesh) -> Result<Vec<Pulse>> {
    mesh.pulses(&[("a0", "b0")], 5)
}

/// Waits until every connection speaks again, and insists that none was lost and that it did not take longer than allowed.
fn recovered(mesh: &Mesh, pulses: &[Pulse], since: Instant, within: Duration) -> Result<()> {
    mesh.lab.eventually("traffic is back", within, || {
        for beat in pulses.iter().flat_map(Pulse::beats) {
            if let Some(why) = beat.lost {
                return Err(format!("{} was lost: {why}", beat.name));
            }
            if since.elapsed() < beat.silent_for || beat.silent_for > Duration::from_millis(500) {
                return Err(format!("{} is silent for {:?}", beat.name, beat.silent_for));
            }
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn with_the_gate_off_the_same_capture_finds_the_payloads() -> Result<()> {
    let mesh = Mesh::started("twin", 2, &AgentOptions::new(SHROUD).gate("off"))?;
    mesh.all_have_routes()?;
    mesh.is_seen_in_the_clear()
}

#[test]
fn an_agent_that_is_killed_loses_no_connection_and_leaks_nothing() -> Result<()> {
    let mut mesh = Mesh::healthy("kill", 2)?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;

    mesh.agent_mut("a").kill()?;
    mesh.all_flows_work("a1", "b1")?;
    mesh.agent_mut("a").restart()?;
    mesh.eventually(
        "a is healthy again",
        Duration::from_secs(5),
        mesh.agent("a"),
        |status| mesh.is_healthy(status),
    )?;

    mesh.all_flows_work("a1", "b1")?;
    let longest = none_was_lost(pulses)?;
    ensure!(longest < Duration::from_secs(1), "the longest stall was {longest:?}");
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn sigterm_leaves_the_data_plane() -> Result<()> {
    let mut mesh = Mesh::healthy("term", 2)?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;
    let wire = mesh.agent("a").wire();

    let exit = mesh.agent_mut("a").terminate(Duration::from_secs(5))?;

    ensure!(exit.success(), "the agent ended with {exit}");
    // Kernel WireGuard needs no process.
    ensure!(
        wire.is_some() == Mesh::in_userspace() && mesh.agent("a").wire() == wire,
        "`shroud wire` did not outlive the agent"
    );
    mesh.all_flows_work("a1", "b1")?;
    mesh.all_flows_work("b1", "a1")?;
    none_was_lost(pulses)?;
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn a_restarted_agent_changes_nothing() -> Result<()> {
    let mut mesh = Mesh::healthy("again", 2)?;

    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").restart()?;

    let status = mesh.eventually(
        "a is healthy again",
        Duration::from_secs(5),
        mesh.agent("a"),
        |status| mesh.is_healthy(status),
    )?;
    let changes = &status.raw["pass"]["latestChanges"];
    ensure!(changes == &serde_json::json!([]), "a restart changed {changes}");
    Ok(())
}

#[test]
fn a_memory_that_lacks_a_peer_takes_nothing_from_it() -> Result<()> {
    let mut mesh = Mesh::healthy("old", 3)?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;
    let folder = mesh.lab.directory();
    let [memory, away] = [
        mesh.agent("a").node().state().join("directory.json"),
        folder.with_extension("away"),
    ];

    // As it was before b joined; a source that says nothing.
    mesh.agent_mut("a").kill()?;
    forget(&memory, "b")?;
    std::fs::rename(&folder, &away)?;
    mesh.agent_mut("a").restart()?;
    let remembering = mesh.eventually(
        "a lives from memory",
        Duration::from_secs(5),
        mesh.agent("a"),
        |status| status.raw["directory"]["state"] == "cached" && status.pass.number > 1,
    )?;
    ensure!(remembering.peers.len() == 1, "a remembers {:?}", remembering.peers);
    let changes = &remembering.raw["pass"]["latestChanges"];
    ensure!(changes == &serde_json::json!([]), "the memory changed {changes}");
    mesh.all_flows_work("a1", "b1")?;
    mesh.all_flows_work("b1", "a1")?;
    std::fs::rename(&away, &folder)?;
    mesh.eventually("a knows b again", Duration::from_secs(15), mesh.agent("a"), |status| {
        mesh.is_healthy(status)
    })?;

    let longest = none_was_lost(pulses)?;
    ensure!(longest < Duration::from_secs(1), "the longest stall was {longest:?}");
    nothing_leaked(capture)?;
    Ok(())
}

/// Takes all that is about a node out of an agent's memory.
fn forget(memory: &Path, node: &str) -> Result<()> {
    let file: Value = serde_json::from_slice(&std::fs::read(memory)?)?;
    let mut kept = file["memory"].clone();
    if let Some(records) = kept["records"].as_array_mut() {
        records.retain(|record| record["node"] != node);
    }
    for index in ["prefixes", "addresses"] {
        if let Some(index) = kept[index].as_object_mut() {
            index.retain(|_, holder| holder != node);
        }
    }
    for index in ["keys", "epochs"] {
        if let Some(index) = kept[index].as_object_mut() {
            index.remove(node);
        }
    }
    let text = serde_json::to_string(&kept)?;
    let sha256: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(
        memory,
        format!(r#"{{"version":1,"sha256":"{sha256}","memory":{text}}}"#),
    )?;
    Ok(())
}

#[test]
fn a_killed_wire_is_back_within_10_s_and_leaks_nothing() -> Result<()> {
    let mesh = Mesh::healthy("wire", 2)?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;
    let before = mesh.agent("a").wire();

    let killed = Instant::now();
    mesh.agent("a").kill_wire()?;

    mesh.lab
        .eventually("another wire serves", Duration::from_secs(10), || {
            let now = mesh.agent("a").wire();
            if now.is_some() && now != before {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            }
        })?;
    recovered(
        &mesh,
        &pulses,
        killed,
        Duration::from_secs(10).saturating_sub(killed.elapsed()),
    )?;
    none_was_lost(pulses)?;
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn a_deleted_tunnel_device_is_back_within_5_s_and_leaks_nothing() -> Result<()> {
    let mesh = Mesh::healthy("device", 2)?;
    let capture = mesh.capture()?;
    let pulses = pulses(&mesh)?;
    let node = mesh.lab.node("a");

    let deleted = Instant::now();
    node.host.netns.ip(&format!("link delete {}", node.device))?;

    mesh.lab.eventually("the device is back", Duration::from_secs(5), || {
        node.host
            .netns
            .ip(&format!("link show {}", node.device))
            .map_err(|error| format!("{error:#}"))
    })?;
    recovered(
        &mesh,
        &pulses,
        deleted,
        Duration::from_secs(5).saturating_sub(deleted.elapsed()),
    )?;
    none_was_lost(pulses)?;
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn before_the_directory_is_known_protected_traffic_is_dropped() -> Result<()> {
    let mesh = {
        let lab = shroud_lab::Topology::new("early").nodes(2).pods(1).build()?;
        // Plain routes, as another network plugin would have left them: without a gate they would carry the traffic in the clear.
        lab.route_plainly()?;
        std::fs::remove_dir_all(lab.directory())?;
        let agents = shroud_lab::Agent::start_all(&lab, &AgentOptions::new(SHROUD))?;
        Mesh { agents, lab }
    };
    for agent in &mesh.agents {
        mesh.eventually("the gate is there", Duration::from_secs(20), agent, |status| {
            status.raw["gate"]["uplinks"] == serde_json::json!(["eth0"])
                && status.raw["directory"]["state"] == "waiting"
        })?;
    }
    let capture = mesh.capture()?;

    let outcome = mesh.send_in_vain(Protocol::Icmp, Family::V4, mesh.lab.pod("a0"), mesh.lab.pod("b0"));

    ensure!(!outcome.ok(), "it arrived: {outcome:?}");
    let evidence = capture.stop()?;
    ensure!(evidence.plaintext_frames() == 0, "it leaked: {evidence:?}");
    Ok(())
}
