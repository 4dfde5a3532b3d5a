//! `shroud explain` tells the truth: each answer is held against what a real packet does.

use std::time::Duration;

use anyhow::{Result, ensure};
use shroud_lab::{AgentOptions, Family, Protocol};

use crate::mesh::{Mesh, SHROUD};

fn outcome(mesh: &Mesh, source: &str, destination: &str) -> Result<(String, String)> {
    let answer = mesh.json("a", &["explain", source, destination])?;
    Ok((
        answer["outcome"].as_str().unwrap_or_default().to_owned(),
        format!("{answer:#}"),
    ))
}

#[test]
fn explain_gives_the_true_answer_for_every_kind_of_packet() -> Result<()> {
    let mesh = Mesh::healthy("explain", 2)?;
    let lab = &mesh.lab;
    let (a0, a1, b0) = (lab.pod("a0"), lab.pod("a1"), lab.pod("b0"));
    let node_a = &lab.node("a").host;

    for family in Family::BOTH {
        let address = |host: &shroud_lab::Host| host.address(family).to_string();
        let capture = mesh.capture()?;

        let (remote, why) = outcome(&mesh, &address(a0), &address(b0))?;
        ensure!(
            remote == "encrypted" && mesh.send(Protocol::Icmp, family, a0, b0).ok(),
            "pod to remote pod: {why}"
        );

        let (local, why) = outcome(&mesh, &address(a0), &address(a1))?;
        ensure!(
            local == "local" && mesh.send(Protocol::Icmp, family, a0, a1).ok(),
            "pod to local pod: {why}"
        );

        let (from_node, why) = outcome(&mesh, "node", &address(b0))?;
        ensure!(
            from_node == "encrypted" && mesh.send(Protocol::Icmp, family, node_a, b0).ok(),
            "node to remote pod: {why}"
        );

        let unknown = match family {
            Family::V4 => "10.244.77.7",
            Family::V6 => "fd00:10:244:77::7",
        };
        let (nobody, why) = outcome(&mesh, &address(a0), unknown)?;
        ensure!(
            nobody == "dropped" && why.contains("no node of the mesh owns"),
            "an unknown peer: {why}"
        );
        a0.netns.exec("ping", &["-c", "1", "-W", "1", unknown])?;

        let evidence = capture.stop()?;
        ensure!(
            evidence.plaintext_frames() == 0,
            "something said to be encrypted was not: {evidence:?}"
        );
        ensure!(
            evidence.clean().is_ok(),
            "something said to be dropped was not: {:?}",
            evidence.clean()
        );
    }
    Ok(())
}

#[test]
fn explain_says_that_a_pods_packet_to_the_internet_leaves_in_the_clear() -> Result<()> {
    let mesh = Mesh::healthy("internet", 2)?;
    let a0 = mesh.lab.pod("a0");

    for (family, internet) in [(Family::V4, "192.0.2.1"), (Family::V6, "2001:db8::1")] {
        let capture = mesh.capture()?;
        let (left, why) = outcome(&mesh, &a0.address(family).to_string(), internet)?;
        let outcome = mesh.send_in_vain(Protocol::Icmp, family, a0, &mesh.lab.internet);
        let evidence = capture.stop()?;

        ensure!(left == "plain", "pod to the internet: {why}");
        ensure!(
            evidence.plaintext_frames() > 0,
            "it did not leave in the clear ({outcome:?}): {why}"
        );
    }
    Ok(())
}

#[test]
fn explain_says_so_when_the_gate_is_off() -> Result<()> {
    let mesh = Mesh::started("off", 2, &AgentOptions::new(SHROUD).gate("off"))?;
    mesh.eventually("b is a peer", Duration::from_secs(30), mesh.agent("a"), |status| {
        status.peers.len() == 1
    })?;

    let (left, why) = outcome(&mesh, "10.244.1.10", "10.244.2.10")?;

    ensure!(left == "plain" && why.contains("the gate is off"), "{why}");
    Ok(())
}
