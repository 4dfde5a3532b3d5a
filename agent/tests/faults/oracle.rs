//! The twins: the very oracles that are silent in all other rows see what they watch for.

use std::time::Duration;

use anyhow::Result;
use shroud_lab::Status;

use crate::field::Field;
use crate::row::Row;

pub(crate) const ROWS: &[Row] = &[
    Row::new(
        "0/plaintext",
        "with the gate off, payloads are found on the wire",
        left_alone,
    )
    .with(|options| options.gate("off"))
    .well(has_routes)
    .sees(|figures| figures.plaintext_bytes > 0 && figures.lost == 0)
    .core(),
    Row::new(
        "0/loss",
        "connections that are killed count as lost",
        connections_killed,
    )
    .sees(|figures| figures.lost > 0 && figures.plaintext_bytes == 0)
    .core(),
    Row::new("0/stall", "a path that is cut for 1.5 s shows as a stall", path_cut)
        .sees(|figures| figures.stall > Duration::from_secs(1) && figures.lost == 0)
        .core(),
];

/// All there is to wait for where the gate is off: nobody is healthy then.
fn has_routes(status: &Status) -> bool {
    status.pass.number > 0 && status.peers.len() == 2 && status.pass.failures.is_empty()
}

fn left_alone(field: &mut Field) -> Result<()> {
    field.lasts(1);
    Ok(())
}

fn connections_killed(field: &mut Field) -> Result<()> {
    let netns = field.lab.pod("a0").netns.clone();
    netns.check("ss", &["--kill", "--tcp", "dst", "10.244.2.10"])?;
    field.lasts(1);
    Ok(())
}

fn path_cut(field: &mut Field) -> Result<()> {
    let port = field.node("b").port;
    field.lab.underlay.ip(&format!("link set {port} down"))?;
    std::thread::sleep(Duration::from_millis(1500));
    field.lab.underlay.ip(&format!("link set {port} up"))?;
    field.fault();
    field.heals()
}
