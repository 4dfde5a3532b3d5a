//! The size of packets: nothing is fragmented on the wire, nothing stalls, and a narrow place is found.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{Family, Flow, Protocol, Status};

use crate::mesh::{Mesh, nothing_leaked};
use crate::overlay::{all_healthy_in, with};

/// The headers before an echo request's or a datagram's payload: IPv4 20 or IPv6 40, and 8.
const fn headers(family: Family) -> usize {
    match family {
        Family::V4 => 28,
        Family::V6 => 48,
    }
}

fn started(name: &str, nodes: u8, mode: &str) -> Result<Mesh> {
    let mesh = Mesh::started(name, nodes, &with(mode))?;
    all_healthy_in(&mesh, mode)?;
    Ok(mesh)
}

/// Sends packets of every size from 32 bytes below the largest to 32 above, and streams, and insists that no fragment is seen.
fn sweep(mesh: &Mesh, mtu: u32) -> Result<()> {
    let mtu = usize::try_from(mtu).context("an MTU")?;
    let capture = mesh.capture()?;
    let (from, to) = (mesh.lab.pod("a0"), mesh.lab.pod("b0"));
    for family in Family::BOTH {
        let sizes: Vec<usize> = (mtu - 32..=mtu + 32).map(|size| size - headers(family)).collect();
        for protocol in [Protocol::Icmp, Protocol::Udp] {
            let flow = Flow::new(protocol, family, from, to)
                .sizes(&sizes)
                .patience(Duration::from_secs(20));
            let outcome = flow.run(&mesh.lab.markers);
            mesh.arrived(&outcome)?;
        }
        for size in (mtu - 32..=mtu + 32).step_by(16) {
            let outcome = Flow::new(Protocol::Tcp, family, from, to)
                .sizes(&[size, 40 * size])
                .run(&mesh.lab.markers);
            ensure!(outcome.ok(), "{} of {size}: {:?}", outcome.flow, outcome.error);
            ensure!(
                outcome.longest_gap < Duration::from_secs(2),
                "{} stalled: {outcome:?}",
                outcome.flow
            );
        }
    }
    nothing_leaked(capture)?;
    Ok(())
}

fn mtu_to(status: &Status, node: &str) -> u32 {
    status
        .peers
        .iter()
        .find(|peer| peer.node == node)
        .map_or(0, |peer| peer.mtu)
}

#[test]
fn no_size_is_fragmented_or_stalls() -> Result<()> {
    let mesh = started("mtu", 2, "native")?;
    sweep(&mesh, mtu_to(&mesh.agent("a").status()?, "b"))
}

#[test]
fn no_size_is_fragmented_or_stalls_around_vxlan() -> Result<()> {
    let mesh = started("mtuvxlan", 2, "vxlan")?;
    sweep(&mesh, mtu_to(&mesh.agent("a").status()?, "b"))
}

#[test]
fn a_change_of_the_uplinks_size_is_followed_and_loses_no_connection() -> Result<()> {
    let mesh = started("mtulive", 2, "native")?;
    let (from, to) = (mesh.lab.pod("a1"), mesh.lab.pod("b1"));
    let pulse = Pulse::start(Protocol::Tcp, Family::V4, from, to, 3, &mesh.lab.markers)?;
    let before = mtu_to(&mesh.agent("a").status()?, "b");

    for (uplink, expected) in [(1400, before - 100), (1500, before)] {
        for node in &mesh.lab.nodes {
            node.host.netns.ip(&format!("link set eth0 mtu {uplink}"))?;
        }
        for (agent, peer) in [("a", "b"), ("b", "a")] {
            let what = format!("{agent} follows the uplink to {uplink}");
            mesh.eventually(&what, Duration::from_secs(5), mesh.agent(agent), |status| {
                mtu_to(status, peer) == expected
            })?;
        }
        sweep(&mesh, expected)?;
    }

    for beat in pulse.stop() {
        ensure!(beat.lost.is_none(), "{}: {:?}", beat.name, beat.lost);
    }
    Ok(())
}

/// The switch port of node b takes frames of 1400 bytes only, and tells nobody.
#[test]
fn a_narrow_path_is_found_shown_and_set_for_that_peer_alone() -> Result<()> {
    let mesh = started("narrow", 3, "native")?;
    let before = mtu_to(&mesh.agent("a").status()?, "b");
    mesh.lab
        .underlay
        .ip(&format!("link set {} mtu 1400", mesh.lab.node("b").port))?;

    // What is left of 1400 bytes (and the four of a VLAN tag, which a bridge lets through), less up to two of WireGuard's blocks of 16.
    let narrow = |mtu: u32| (before - 128..=before - 96).contains(&mtu);
    let within = Duration::from_secs(90);
    let found = mesh.eventually("a finds the narrow path to b", within, mesh.agent("a"), |status| {
        narrow(mtu_to(status, "b"))
    })?;
    mesh.eventually("b finds the narrow path to a", within, mesh.agent("b"), |status| {
        narrow(mtu_to(status, "a"))
    })?;

    let peers = found.raw["peers"].as_array().into_iter().flatten();
    let path = |node: &str| {
        peers
            .clone()
            .find(|peer| peer["node"] == node)
            .map(|peer| peer["path"].clone())
    };
    let b = path("b").context("no peer b")?;
    ensure!(b["state"] == "reduced" && b["expectedMtu"] == before, "{b:#}");
    ensure!(
        mtu_to(&found, "c") == before,
        "the path to c is as wide as ever: {:#}",
        found.raw
    );
    sweep(&mesh, mtu_to(&mesh.agent("a").status()?, "b"))
}
