//! A node whose announcement cannot be believed is refused with a reason, and its traffic is dropped, never sent in the clear.
//!
//! Node c runs no agent; its record is written by hand, and plain routes to its pods stand on node b, so that without the gate the
//! traffic would reach it in the clear.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use shroud_lab::{Agent, AgentOptions, Family, Protocol, Topology};

use crate::mesh::{Mesh, SHROUD};

const ZERO_KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// What node c says of itself, and what node a must say about it.
fn refused(name: &str, record: impl Fn(&Mesh) -> serde_json::Value, reason: &str) -> Result<()> {
    let lab = Topology::new(name).nodes(3).pods(1).build()?;
    let agents = lab
        .nodes
        .iter()
        .take(2)
        .map(|node| Agent::start(node, &AgentOptions::new(SHROUD)))
        .collect::<Result<_>>()?;
    let mesh = Mesh { agents, lab };
    mesh.all_healthy()?;
    let a = &mesh.lab.node("a").host.netns;
    // Another network plugin's routes to c's pods: without the gate they carry the traffic in the clear.
    a.ip("route add 10.244.3.0/24 via 172.18.0.3 dev eth0 proto static")?;
    a.ip("-6 route add fd00:10:244:3::/64 via fd00:172:18::3 dev eth0 proto static")?;

    std::fs::write(mesh.lab.directory().join("c.json"), record(&mesh).to_string())?;
    let status = mesh.eventually("c is refused", Duration::from_secs(10), mesh.agent("a"), |status| {
        status.refused.iter().any(|refused| refused.node == "c")
    })?;
    let capture = mesh.capture()?;
    let outcomes: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| mesh.send_in_vain(Protocol::Udp, family, mesh.lab.pod("a0"), mesh.lab.pod("c0")))
        .collect();
    mesh.all_flows_work("a0", "b0")?;

    let evidence = capture.stop()?;
    let reasons = status
        .refused
        .iter()
        .find(|refused| refused.node == "c")
        .map(|refused| refused.reasons.join("; "));
    ensure!(
        reasons.as_ref().is_some_and(|reasons| reasons.contains(reason)),
        "the reason is {reasons:?}, not {reason:?}"
    );
    ensure!(
        status.verdict == "degraded",
        "a refused node is no reason to be healthy: {}",
        status.summary
    );
    ensure!(
        outcomes.iter().all(|outcome| !outcome.ok()),
        "traffic to c arrived: {outcomes:?}"
    );
    ensure!(
        evidence.plaintext_frames() == 0,
        "traffic to c left in the clear: {evidence:?}"
    );
    let gate = mesh.json("a", &["gate"])?;
    let dropped = gate["counters"].as_array().into_iter().flatten().any(|counter| {
        counter["verdict"] == "drop" && counter["direction"] == "egress" && counter["packets"].as_u64() > Some(0)
    });
    ensure!(dropped, "the gate counted no drop: {gate:#}");
    Ok(())
}

/// A record of node c as it should be, but for its announcement and prefixes.
fn record(prefixes: &[&str], announcement: &serde_json::Value) -> serde_json::Value {
    json!({
        "version": 1,
        "node": "c",
        "addresses": ["172.18.0.3", "fd00:172:18::3"],
        "podPrefixes": prefixes,
        "announcement": announcement,
    })
}

fn announcement(key: &str) -> serde_json::Value {
    json!({"version": 1, "publicKey": key, "port": 51820, "endpoints": ["172.18.0.3:51820"], "epoch": 1, "backend": "userspace"})
}

const OWN: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];

#[test]
fn a_node_without_a_key_is_refused_and_fenced() -> Result<()> {
    refused("nokey", |_| record(&OWN, &serde_json::Value::Null), "announces no key")
}

#[test]
fn a_node_with_a_zero_key_is_refused_and_fenced() -> Result<()> {
    refused(
        "zerokey",
        |_| record(&OWN, &announcement(ZERO_KEY)),
        "all zeroes or of low order",
    )
}

#[test]
fn a_node_with_another_nodes_key_is_refused_and_fenced() -> Result<()> {
    let key_of_b = |mesh: &Mesh| {
        let status = mesh.agent("a").status().expect("a answers");
        status.peers.first().expect("b is a peer").public_key.clone()
    };
    refused(
        "stolenkey",
        |mesh| record(&OWN, &announcement(&key_of_b(mesh))),
        "that node b holds",
    )
}

#[test]
fn a_node_with_another_nodes_prefix_is_refused_and_the_owner_unaffected() -> Result<()> {
    // A key that nobody else has: the base point of Curve25519 is not of low order.
    let key = "CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    refused(
        "stolenprefix",
        |_| record(&["10.244.2.0/25", OWN[0]], &announcement(key)),
        "overlaps with one that node b holds",
    )
}
