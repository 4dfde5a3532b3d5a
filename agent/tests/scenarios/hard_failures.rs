//! What this machine cannot do, or somebody else got first: a check says so, nothing leaves in the clear, what is in the way is not
//! touched, and when it goes the mesh comes up by itself.

use std::net::{Ipv6Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use shroud_lab::agent::LISTEN_PORT;
use shroud_lab::{Agent, AgentOptions, Family, Lab, Netns, Protocol, Status, Topology, eventually};

use crate::backend::{kernel_has_wireguard, with};
use crate::mesh::{Mesh, SHROUD, nothing_leaked};

/// How long until a status says what is wrong, and how long until an obstacle's end is noticed.
const NOTICED: Duration = Duration::from_secs(20);

fn lab(name: &str) -> Result<Lab> {
    Topology::new(name).nodes(2).pods(2).build()
}

/// Agents that look again every second, so that the end of an obstacle is noticed soon.
fn start(lab: Lab, options: &AgentOptions) -> Result<Mesh> {
    let options = AgentOptions {
        extra: "resync: 1s\n".to_owned(),
        ..options.clone()
    };
    let agents = Agent::start_all(&lab, &options)?;
    Ok(Mesh { agents, lab })
}

/// Waits until node a says that it is degraded because of this, and insists that the sentence names what is in the way.
fn says(mesh: &Mesh, check: &str, name: &str) -> Result<Status> {
    let status = mesh.eventually(&format!("a says {check}"), NOTICED, mesh.agent("a"), |status| {
        status.says(check).is_some()
    })?;
    ensure!(status.verdict == "degraded", "a says {}", status.verdict);
    let sentence = status.says(check).unwrap_or_default();
    ensure!(sentence.contains(name), "{sentence:?} does not name {name}");

    let text = mesh.agent("a").ask(&["status"])?.stdout;
    ensure!(text.contains(&format!("{check}: ")), "no {check} in:\n{text}");
    Ok(status)
}

/// Sends from a's pods with another network plugin's routes and settings in place, by which the packets would leave in the clear if
/// nobody stopped them. Answers whether any arrived.
fn leaks_nothing(mesh: &Mesh) -> Result<bool> {
    let a = &mesh.lab.node("a").host.netns;
    let b = &mesh.lab.node("b").host;
    let plain = [
        format!(
            "-4 route %DO% 10.244.2.0/24 via {} dev eth0 proto static metric 4000",
            b.v4
        ),
        format!(
            "-6 route %DO% fd00:10:244:2::/64 via {} dev eth0 proto static metric 4000",
            b.v6
        ),
    ];
    for route in &plain {
        a.ip(&route.replace("%DO%", "add"))?;
    }
    for setting in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        a.set_sysctl(setting, "1")?;
    }
    let capture = mesh.capture()?;

    let mut arrived = false;
    for family in Family::BOTH {
        for protocol in Protocol::ALL {
            let outcome = mesh.send_in_vain(protocol, family, mesh.lab.pod("a0"), mesh.lab.pod("b0"));
            arrived |= outcome.ok();
        }
    }

    nothing_leaked(capture)?;
    for route in &plain {
        a.ip(&route.replace("%DO%", "delete"))?;
    }
    Ok(arrived)
}

/// The mesh is healthy and carries everything.
fn is_well(mesh: &Mesh) -> Result<()> {
    mesh.all_healthy()?;
    mesh.all_flows_work("a1", "b1")
}

#[test]
fn a_kernel_without_wireguard_is_said_and_nothing_leaks() -> Result<()> {
    let lab = lab("nomodule")?;
    if kernel_has_wireguard(&lab) {
        return crate::backend::skipped("a kernel without WireGuard; this one has it");
    }
    let mut mesh = start(lab, &with("userspace"))?;
    is_well(&mesh)?;
    let node = mesh.lab.node("a").clone();
    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    node.host.netns.ip(&format!("link delete {}", node.device))?;

    *mesh.agent_mut("a") = Agent::start(&node, &with("kernel"))?;

    says(&mesh, "wireguard-missing", "wireguard module")?;
    let arrived = leaks_nothing(&mesh)?;
    ensure!(!arrived, "without WireGuard something arrived");

    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    *mesh.agent_mut("a") = Agent::start(&node, &with("userspace"))?;
    is_well(&mesh)
}

#[test]
fn a_taken_port_is_said_and_nothing_leaks_until_it_is_free() -> Result<()> {
    let lab = lab("port")?;
    let netns = lab.node("a").host.netns.clone();
    let other = netns.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, LISTEN_PORT)).context("take the port"))?;

    let mesh = start(lab, &AgentOptions::new(SHROUD))?;

    says(&mesh, "tunnel-port-taken", &LISTEN_PORT.to_string())?;
    leaks_nothing(&mesh)?;
    other.set_nonblocking(true)?;
    let port = other.local_addr()?.port();
    ensure!(port == LISTEN_PORT, "the other program's socket is at {port}");

    drop(other);
    is_well(&mesh)
}

/// The device as iproute2 sees it, without what changes by itself.
fn device_is(netns: &Netns, device: &str) -> Result<String> {
    netns.ip(&format!("-details link show {device}")).and_then(|link| {
        let addresses = netns.ip(&format!("-brief address show {device}"))?;
        Ok(format!("{link}{addresses}"))
    })
}

#[test]
fn a_foreign_device_of_our_name_is_said_and_left_alone() -> Result<()> {
    let lab = lab("foreign")?;
    let node = lab.node("a").clone();
    let netns = &node.host.netns;
    // A bridge, since every kernel has that.
    netns.ip(&format!("link add {} type bridge", node.device))?;
    let before = device_is(netns, &node.device)?;

    let mesh = start(lab, &AgentOptions::new(SHROUD))?;

    says(&mesh, "tunnel-device-foreign", &node.device)?;
    let arrived = leaks_nothing(&mesh)?;
    ensure!(!arrived, "through a bridge something arrived");
    let after = device_is(netns, &node.device)?;
    ensure!(before == after, "the foreign device was changed:\n{before}\n{after}");

    netns.ip(&format!("link delete {}", node.device))?;
    is_well(&mesh)
}

#[test]
fn an_agent_that_may_not_open_raw_sockets_ends_and_names_the_capability() -> Result<()> {
    let lab = lab("noraw")?;
    let node = lab.node("a");

    // What a thread has given up, those that it starts do not have.
    let mut agent = node.host.netns.run(|| {
        remove_capability_from_bounding_set(CapabilitySet::NET_RAW).context("give up CAP_NET_RAW")?;
        Agent::start(node, &AgentOptions::new(SHROUD))
    })?;
    let exit = eventually("the agent ends", NOTICED, || match agent.exited() {
        Ok(Some(exit)) => Ok(exit),
        other => Err(format!("{other:?}")),
    })?;

    let log = std::fs::read_to_string(node.log()).context("read the agent's log")?;
    ensure!(exit.code() == Some(1), "{exit}\n{log}");
    ensure!(log.contains("CAP_NET_RAW") && !log.contains("panicked"), "{log}");
    Ok(())
}
