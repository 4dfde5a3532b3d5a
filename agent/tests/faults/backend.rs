//! K: the data plane itself breaks, or is not to be had.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use shroud_lab::{Agent, AgentOptions, Status};

use crate::field::Field;
use crate::row::{self, Row};
use crate::strace::signal;

pub(crate) const ROWS: &[Row] = &[
    Row::new("K1/auto", "`auto` where the kernel has no WireGuard", by_itself)
        .needs(no_kernel_wireguard)
        .with(|options| AgentOptions {
            backend: "auto".to_owned(),
            ..options
        }),
    Row::new("K1/kernel", "`kernel` where the kernel has no WireGuard", kernel_only)
        .needs(no_kernel_wireguard)
        .cuts_the_path(),
    Row::new("K2/killed", "`shroud wire` is killed", wire_killed)
        .needs(row::userspace)
        .cuts_the_path()
        .core(),
    Row::new(
        "K2/all",
        "`shroud wire` is killed on all nodes at once",
        all_wires_killed,
    )
    .needs(row::userspace)
    .cuts_the_path(),
    Row::new("K2/stuck", "`shroud wire` stands still", wire_stuck)
        .needs(row::userspace)
        .cuts_the_path()
        .heals_within(THREE_SILENCES),
    Row::new("K2/stop", "`shroud wire` is asked to end", wire_asked_to_end)
        .needs(row::userspace)
        .cuts_the_path(),
];

/// How long the agent may take to believe that a data plane which says nothing will say nothing more, and to start another.
const THREE_SILENCES: u64 = 15;

fn no_kernel_wireguard() -> Result<(), String> {
    match row::kernel_wireguard() {
        Ok(()) => Err("needs a kernel without WireGuard, and this one has it".to_owned()),
        Err(_) => Ok(()),
    }
}

/// The whole row is its setting: without the kernel's WireGuard all is as with it.
fn by_itself(field: &mut Field) -> Result<()> {
    let status = field.status("a")?;
    ensure!(
        status.raw["encryption"]["backend"] == "userspace",
        "a encrypts by {}",
        status.raw["encryption"]
    );
    field.fault();
    field.heals()
}

/// An agent that may only use what is not there says so, and what its node has goes on as it is, or is dropped: never in the clear.
fn kernel_only(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    field.agent("a").terminate(Duration::from_secs(5))?;
    let options = AgentOptions {
        backend: "kernel".to_owned(),
        ..field.options_of(&node)
    };
    *field.agent("a") = Agent::start(&node, &options)?;
    field.says("a", "it misses WireGuard", |status| says(status, "wireguard-missing"))?;
    field.lasts(5);
    field.agent("a").terminate(Duration::from_secs(5))?;
    let options = field.options_of(&node);
    field.fault();
    *field.agent("a") = Agent::start(&node, &options)?;
    field.heals()
}

fn says(status: &Status, check: &str) -> bool {
    status.says(check).is_some()
}

fn wire_killed(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    field.agent("a").kill_wire()?;
    field.fault();
    field.heals()
}

fn all_wires_killed(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    for name in ["a", "b", "c"] {
        field.agent(name).kill_wire()?;
    }
    field.fault();
    field.heals()
}

/// It neither answers nor ends: after three silences the agent ends it, and starts another.
fn wire_stuck(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let wire = field.agent("a").wire().context("a's `shroud wire`")?;
    signal(wire, Signal::STOP)?;
    field.fault();
    field.heals()?;
    ensure!(field.agent("a").wire() != Some(wire), "the stuck one still serves");
    Ok(())
}

fn wire_asked_to_end(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let wire = field.agent("a").wire().context("a's `shroud wire`")?;
    signal(wire, Signal::TERM)?;
    field.fault();
    field.heals()
}
