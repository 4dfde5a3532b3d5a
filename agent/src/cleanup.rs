//! The deliberate removal of everything of ours from the kernel, in the reverse of the order in which it came: routes, overlay,
//! encryption, gate.
//!
//! The gate goes last, so that until the very end nothing protected can leave in the clear. The key, the last good directory and the
//! announcement stay: they are the node's identity, not kernel state.

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use shroud_ebpf::Gate;
use shroud_overlay::Overlay;
use shroud_routing::Kernel;
use shroud_tunnel::Tunnel;

use crate::config::Config;
use crate::plan::lane::Lane;
use crate::reconcile::{gate_options, tunnel_options};
use crate::status::VERSION;

/// What was removed, and what could not be.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cleaned {
    pub(crate) version: u32,
    pub(crate) removed: Vec<String>,
    pub(crate) failures: Vec<String>,
    /// What stays on purpose.
    pub(crate) kept: Vec<String>,
}

/// Removes everything of ours and goes on past failures.
///
/// # Errors
/// When an agent is running, which would put all of it back, or the kernel cannot be asked at all.
pub(crate) fn run(config: &Config) -> anyhow::Result<Cleaned> {
    let lock = config.runtime_dir.join("agent.lock");
    if let Ok(file) = std::fs::File::open(&lock)
        && matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock))
    {
        bail!(
            "an agent is running with {} and would put everything back; end it first",
            config.runtime_dir.display()
        );
    }
    let mut cleaned = Cleaned {
        version: VERSION,
        ..Cleaned::default()
    };
    let devices = Lane::ALL.map(|lane| lane.device(&config.encryption));
    let mut kernel = Kernel::open().context("open routing netlink")?;

    // First, so that no pod starts that would soon have no way.
    match config.cni.remove() {
        Ok(None) => {}
        Ok(Some(file)) => cleaned.removed.push(format!("file {}", file.display())),
        Err(error) => cleaned.failures.push(error.to_string()),
    }

    let routes = kernel.remove();
    cleaned.removed.extend(routes.removed);
    cleaned.failures.extend(routes.errors.iter().map(ToString::to_string));

    let mut overlay = Overlay::open(config.routing.vni).context("open overlay netlink")?;
    let removed = overlay.remove();
    cleaned.removed.extend(removed.removed);
    cleaned.failures.extend(removed.errors.iter().map(ToString::to_string));

    let mut tunnel = Tunnel::new(tunnel_options(config));
    for device in &devices {
        let removal = tunnel.remove(device);
        cleaned.removed.extend(removal.removed);
        cleaned.failures.extend(removal.errors.iter().map(ToString::to_string));
        match kernel.delete_link(device) {
            Ok(true) => cleaned.removed.push(format!("device {device}")),
            Ok(false) => {}
            Err(error) => cleaned.failures.push(error.to_string()),
        }
    }

    let gate = Gate::remove(&gate_options(config));
    cleaned.removed.extend(gate.removed);
    cleaned.failures.extend(gate.errors.iter().map(ToString::to_string));

    let logs = devices.map(|device| config.runtime_dir.join(format!("{device}.wire.log")));
    for file in [config.socket(), lock].into_iter().chain(logs) {
        match std::fs::remove_file(&file) {
            Ok(()) => cleaned.removed.push(format!("file {}", file.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => cleaned.failures.push(format!("remove {}: {error}", file.display())),
        }
    }
    cleaned.kept.push(format!(
        "{} (this node's keys and what it last knew of the mesh)",
        config.state_dir.display()
    ));
    Ok(cleaned)
}
