//! A node changes from one WireGuard to the other while its pods talk. Needs a kernel that has both.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{Agent, AgentOptions, Family, Lab, Protocol};

use crate::mesh::{Mesh, SHROUD, nothing_leaked};

pub(crate) fn with(backend: &str) -> AgentOptions {
    AgentOptions {
        backend: backend.to_owned(),
        ..AgentOptions::new(SHROUD)
    }
}

/// Whether this kernel has WireGuard, asked through iproute2.
pub(crate) fn kernel_has_wireguard(lab: &Lab) -> bool {
    let netns = &lab.internet.netns;
    netns.ip("link add probe type wireguard").is_ok() && netns.ip("link delete probe").is_ok()
}

/// Ends a test that this machine cannot run.
pub(crate) fn skipped(why: &str) -> Result<()> {
    // Not `eprintln!`, which the test runner keeps to itself when the test passes.
    std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes())?;
    Ok(())
}

#[test]
fn a_change_of_backend_keeps_key_and_port_and_leaks_nothing() -> Result<()> {
    let mut mesh = Mesh::started("backend", 2, &with("userspace"))?;
    if !kernel_has_wireguard(&mesh.lab) {
        return skipped("a change of backend; this kernel has no WireGuard, `make test-vm` boots some that have");
    }
    mesh.all_healthy()?;
    let before = mesh.agent("a").status()?;
    let capture = mesh.capture()?;
    let (from, to) = (mesh.lab.pod("a0"), mesh.lab.pod("b0"));
    let pulse = Pulse::start(Protocol::Tcp, Family::V4, from, to, 3, &mesh.lab.markers)?;

    for backend in ["kernel", "userspace"] {
        mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
        let node = mesh.lab.node("a").clone();
        *mesh.agent_mut("a") = Agent::start(&node, &with(backend))?;

        let what = format!("a is healthy with {backend} WireGuard");
        let after = mesh.eventually(&what, Duration::from_secs(20), mesh.agent("a"), |status| {
            mesh.is_healthy(status) && status.raw["encryption"]["backend"] == backend
        })?;
        for field in ["/publicKey", "/encryption/listenPort", "/encryption/device"] {
            ensure!(
                before.raw.pointer(field) == after.raw.pointer(field),
                "{field} changed with the backend"
            );
        }
        mesh.all_flows_work("a1", "b1")?;
    }

    for beat in pulse.stop() {
        ensure!(beat.lost.is_none(), "{}: {:?}", beat.name, beat.lost);
    }
    nothing_leaked(capture)?;
    Ok(())
}
