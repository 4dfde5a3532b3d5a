//! Every way to reach a pod, over every underlay: {native, VXLAN, Geneve} x pods {IPv4, IPv6, both} x underlay {IPv4, IPv6, both}.
//!
//! A cell sends every kind of flow and insists that nothing leaked. Then its twin: the agents of the same nodes start again with the
//! gate off, and the same capture must find the payloads. `$SHROUD_TEST_BACKEND` says which WireGuard; `docs/support.md` is made of these.

use std::time::Duration;

use anyhow::{Result, ensure};
use shroud_lab::{Agent, Families, Protocol, Topology};

use crate::mesh::{Mesh, nothing_leaked};
use crate::overlay::{has, reached_by, with};

const WITHIN: Duration = Duration::from_secs(20);

/// Waits until all nodes send to all others in this mode.
fn all_send_in(mesh: &Mesh, mode: &str) -> Result<()> {
    for agent in &mesh.agents {
        let what = format!("{} sends in {mode}", agent.node().host.name);
        mesh.eventually(&what, WITHIN, agent, |status| {
            status.peers.len() + 1 == mesh.agents.len() && reached_by(status, mode)
        })?;
    }
    Ok(())
}

/// Every kind of flow between the first pods of each two nodes, in the families the pods have.
fn every_flow(mesh: &Mesh, pods: Families) -> Result<()> {
    let first: Vec<_> = mesh.lab.nodes.iter().filter_map(|node| node.pods.first()).collect();
    for (index, from) in first.iter().enumerate() {
        for to in first.iter().skip(index + 1) {
            for family in pods.each() {
                for protocol in Protocol::ALL {
                    let outcome = mesh.send(protocol, family, from, to);
                    mesh.arrived(&outcome)?;
                }
            }
        }
    }
    Ok(())
}

fn cell(mode: &str, nodes: u8, pods: Families, underlay: Families) -> Result<()> {
    let topology = Topology::new("matrix").nodes(nodes).pods(1);
    let lab = topology.underlay(underlay).pod_families(pods).build()?;
    if mode != "native" && !has(&lab, mode)? {
        return Ok(());
    }
    let agents = Agent::start_all(&lab, &with(mode))?;
    let mut mesh = Mesh { agents, lab };
    mesh.all_healthy()?;
    all_send_in(&mesh, mode)?;

    let capture = mesh.capture()?;
    every_flow(&mesh, pods)?;
    nothing_leaked(capture).map_err(|error| error.context(mesh.lab.dump()))?;

    // Without a path of the pods' family there is no way in the clear that an open gate could let pass: the route leads into the tunnel.
    if mode == "native" && pods != underlay {
        return Ok(());
    }
    let plain = with(mode).gate("off");
    for agent in &mut mesh.agents {
        agent.terminate(Duration::from_secs(5))?;
        let node = agent.node().clone();
        *agent = Agent::start(&node, &plain)?;
    }
    for agent in &mesh.agents {
        let what = format!("the gate of {} is off", agent.node().host.name);
        mesh.eventually(&what, WITHIN, agent, |status| status.raw["gate"]["mode"] == "off")?;
    }
    all_send_in(&mesh, mode)?;
    let capture = mesh.capture()?;
    every_flow(&mesh, pods)?;
    let evidence = capture.stop()?;
    ensure!(evidence.plaintext_frames() > 0, "the oracle is blind: {evidence:?}");
    Ok(())
}

macro_rules! cells {
    ($($name:ident: $mode:literal, $nodes:literal nodes, pods $pods:ident, underlay $underlay:ident;)*) => {
        $(
            #[test]
            fn $name() -> Result<()> {
                cell($mode, $nodes, Families::$pods, Families::$underlay)
            }
        )*
    };
}

cells! {
    native_dual_over_dual: "native", 3 nodes, pods Both, underlay Both;
    native_v4_over_v4: "native", 2 nodes, pods V4, underlay V4;
    native_v4_over_v6: "native", 2 nodes, pods V4, underlay V6;
    native_v6_over_v4: "native", 2 nodes, pods V6, underlay V4;
    native_v6_over_v6: "native", 2 nodes, pods V6, underlay V6;
    vxlan_dual_over_dual: "vxlan", 3 nodes, pods Both, underlay Both;
    vxlan_v4_over_v4: "vxlan", 2 nodes, pods V4, underlay V4;
    vxlan_v4_over_v6: "vxlan", 2 nodes, pods V4, underlay V6;
    vxlan_v6_over_v4: "vxlan", 2 nodes, pods V6, underlay V4;
    vxlan_v6_over_v6: "vxlan", 2 nodes, pods V6, underlay V6;
    geneve_dual_over_dual: "geneve", 3 nodes, pods Both, underlay Both;
    geneve_v4_over_v4: "geneve", 2 nodes, pods V4, underlay V4;
    geneve_v4_over_v6: "geneve", 2 nodes, pods V4, underlay V6;
    geneve_v6_over_v4: "geneve", 2 nodes, pods V6, underlay V4;
    geneve_v6_over_v6: "geneve", 2 nodes, pods V6, underlay V6;
}
