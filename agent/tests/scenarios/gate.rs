//! The gate's modes and exemptions, as they show on the wire and in `shroud gate`.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use shroud_lab::{AgentOptions, Family, Protocol};

use crate::mesh::{Mesh, SHROUD};

/// Packets under the counters that match all of these fields.
pub(crate) fn packets(gate: &Value, fields: &[(&str, &str)]) -> u64 {
    let counters = gate["counters"].as_array().into_iter().flatten();
    let matching = counters.filter(|counter| fields.iter().all(|(field, value)| counter[*field] == *value));
    matching.filter_map(|counter| counter["packets"].as_u64()).sum()
}

#[test]
fn an_exempt_pod_is_in_the_clear_and_its_neighbour_is_not() -> Result<()> {
    let options = AgentOptions::new(SHROUD).exempt("10.244.1.11/32");
    let mesh = Mesh::started("exempt", 2, &options)?;
    mesh.all_healthy()?;
    let (encrypted, exempt, other) = (mesh.lab.pod("a0"), mesh.lab.pod("a1"), mesh.lab.pod("b0"));

    let capture = mesh.capture()?;
    let neighbour = mesh.send(Protocol::Tcp, Family::V4, encrypted, other);
    let without_exemption = capture.stop()?;
    let capture = mesh.capture()?;
    let there = mesh.send(Protocol::Tcp, Family::V4, exempt, other);
    let back = mesh.send(Protocol::Udp, Family::V4, other, exempt);
    let with_exemption = capture.stop()?;

    ensure!(
        neighbour.ok() && there.ok() && back.ok(),
        "{neighbour:?} {there:?} {back:?}"
    );
    ensure!(
        without_exemption.plaintext_frames() == 0,
        "the neighbour is in the clear: {without_exemption:?}"
    );
    ensure!(
        with_exemption.plaintext_frames() > 0,
        "the exempt pod is not in the clear: {with_exemption:?}"
    );
    let gate = mesh.json("a", &["gate"])?;
    ensure!(
        packets(&gate, &[("reason", "plain"), ("direction", "egress")]) > 0,
        "nothing counted as plain: {gate:#}"
    );
    let explained = mesh.json("a", &["explain", "10.244.1.11", "10.244.2.10"])?;
    ensure!(
        explained["outcome"] == "plain" && explained["because"].to_string().contains("does not want it encrypted"),
        "{explained:#}"
    );
    Ok(())
}

#[test]
fn audit_lets_pass_and_counts_what_enforce_drops() -> Result<()> {
    let mesh = Mesh::started("audit", 2, &AgentOptions::new(SHROUD).gate("audit"))?;
    mesh.eventually("b is met", Duration::from_secs(30), mesh.agent("a"), |status| {
        status.met_all(2).is_ok()
    })?;
    let nobody = "10.244.77.7";

    let capture = mesh.capture()?;
    mesh.all_flows_work("a0", "b0")?;
    let encrypted = capture.stop()?;
    mesh.lab.pod("a0").netns.exec("ping", &["-c", "1", "-W", "1", nobody])?;

    ensure!(
        encrypted.plaintext_frames() == 0,
        "audit must still encrypt what it can: {encrypted:?}"
    );
    let gate = mesh.json("a", &["gate"])?;
    ensure!(
        packets(&gate, &[("verdict", "audit"), ("reason", "unknown-node")]) > 0,
        "not counted: {gate:#}"
    );
    ensure!(
        packets(&gate, &[("verdict", "drop")]) == 0,
        "audit dropped something: {gate:#}"
    );
    ensure!(
        gate["events"].to_string().contains(&format!("-> {nobody}")),
        "the pair is not named: {gate:#}"
    );
    let status = mesh.agent("a").status()?;
    ensure!(
        status.verdict == "degraded" && status.summary.contains("audit"),
        "{}",
        status.summary
    );
    ensure!(
        status.raw["gate"]["plaintextBytes"].as_u64() > Some(0),
        "{:#}",
        status.raw["gate"]
    );
    Ok(())
}

#[test]
fn a_pods_packet_that_arrives_in_the_clear_is_dropped() -> Result<()> {
    let mesh = Mesh::healthy("spoof", 3)?;
    // Node c forgets its gate and its tunnel, and goes on as if there were no Shroud: what it sends in the clear must not be believed.
    let c = mesh.lab.node("c").clone();
    let mut mesh = mesh;
    mesh.agent_mut("c").terminate(Duration::from_secs(5))?;
    let config = shroud_lab::agent::config_file(&c).display().to_string();
    c.host.netns.check(SHROUD, &["cleanup", "--config", &config])?;
    c.host.netns.ip("route add 10.244.1.0/24 via 172.18.0.1 dev eth0")?;

    let capture = mesh.capture()?;
    let outcome = mesh.send_in_vain(Protocol::Udp, Family::V4, mesh.lab.pod("c0"), mesh.lab.pod("a0"));
    let evidence = capture.stop()?;

    ensure!(!outcome.ok(), "it was believed: {outcome:?}");
    ensure!(evidence.plaintext_frames() > 0, "it was never sent: {evidence:?}");
    let gate = mesh.json("a", &["gate"])?;
    let counted = [
        ("verdict", "drop"),
        ("reason", "clear-text"),
        ("direction", "ingress"),
        ("node", "c"),
    ];
    ensure!(packets(&gate, &counted) > 0, "not counted: {gate:#}");
    Ok(())
}
