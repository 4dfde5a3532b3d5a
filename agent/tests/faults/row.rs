//! A row of the fault matrix: what goes wrong, what that may cost, and what the row needs.

use std::time::Duration;

use anyhow::Result;
use shroud_lab::frame::Allowed;
use shroud_lab::{AgentOptions, Lab, Netns, Status};

use crate::field::{Field, is_healthy};
use crate::table::Figures;

/// How long a node may need to be as before, from the end of a fault on.
const HEAL: Duration = Duration::from_secs(5);

/// How long any connection may wait for an answer while only those who steer are hit.
const STALL: Duration = Duration::from_secs(1);

/// One row.
pub(crate) struct Row {
    /// Its place in the matrix, e.g. `C3`; where a place has several rows, `C3/renamed`.
    pub(crate) id: &'static str,
    /// The fault, in a few words.
    pub(crate) title: &'static str,
    /// Makes it go wrong, and waits until all is well.
    pub(crate) run: fn(&mut Field) -> Result<()>,
    /// Whether it is part of `make test`.
    pub(crate) core: bool,
    /// Why this machine cannot run it, if so.
    pub(crate) needs: fn() -> Result<(), String>,
    /// Where the nodes meet.
    pub(crate) meets: Meeting,
    /// How the agents are configured.
    pub(crate) options: fn(AgentOptions) -> AgentOptions,
    /// Whether an agent that says this is well.
    pub(crate) well: fn(&Status) -> bool,
    /// What else the underlay may carry.
    pub(crate) allows: fn(&Lab, Allowed) -> Allowed,
    /// How long until all is as before, once the fault ends.
    pub(crate) heal: Duration,
    /// How long an answer may be waited for; `None` where the fault takes the path itself away.
    pub(crate) stall: Option<Duration>,
    /// Whether what the nodes hold in the end is what they held before.
    pub(crate) leaves: Leaves,
    /// What is expected of those who watch.
    pub(crate) oracle: Oracle,
}

/// What is expected of those who watch for plaintext, losses and stalls.
#[derive(Clone, Copy)]
pub(crate) enum Oracle {
    /// That they see nothing they should not.
    IsSilent,
    /// That they see this: the twin of all other rows.
    Sees(fn(&Figures) -> bool),
}

/// Where nodes find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// In a folder of announcements.
    Folder,
    /// In a Kubernetes cluster: the API server for tests.
    Cluster,
}

/// What nodes hold in the end: devices, addresses, routes, rules, peers and pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaves {
    /// What they held before the fault.
    AllAsBefore,
    /// Something else, by the row's nature. Descriptors and threads may not have grown all the same.
    Changes,
}

impl Row {
    /// A row in which connections may stall a second, all is as before within five, and the nodes meet in a folder.
    pub(crate) const fn new(id: &'static str, title: &'static str, run: fn(&mut Field) -> Result<()>) -> Row {
        Row {
            id,
            title,
            run,
            core: false,
            needs: || Ok(()),
            meets: Meeting::Folder,
            options: |options| options,
            well: is_healthy,
            allows: |_, allowed| allowed,
            heal: HEAL,
            stall: Some(STALL),
            leaves: Leaves::AllAsBefore,
            oracle: Oracle::IsSilent,
        }
    }

    /// It is part of `make test`.
    pub(crate) const fn core(self) -> Row {
        Row { core: true, ..self }
    }

    /// It runs only where this finds nothing missing.
    pub(crate) const fn needs(self, needs: fn() -> Result<(), String>) -> Row {
        Row { needs, ..self }
    }

    /// The nodes meet in a cluster.
    pub(crate) const fn in_a_cluster(self) -> Row {
        Row {
            meets: Meeting::Cluster,
            ..self
        }
    }

    /// The agents are configured differently.
    pub(crate) const fn with(self, options: fn(AgentOptions) -> AgentOptions) -> Row {
        Row { options, ..self }
    }

    /// Agents that say this are well.
    pub(crate) const fn well(self, well: fn(&Status) -> bool) -> Row {
        Row { well, ..self }
    }

    /// It is a twin: the oracles must see this.
    pub(crate) const fn sees(self, what: fn(&Figures) -> bool) -> Row {
        Row {
            oracle: Oracle::Sees(what),
            ..self
        }
    }

    /// The underlay may carry this too.
    pub(crate) const fn allows(self, allows: fn(&Lab, Allowed) -> Allowed) -> Row {
        Row { allows, ..self }
    }

    /// All is as before within so many seconds.
    pub(crate) const fn heals_within(self, seconds: u64) -> Row {
        Row {
            heal: Duration::from_secs(seconds),
            ..self
        }
    }

    /// The fault takes the path away for a while, so that stalls are its own.
    pub(crate) const fn cuts_the_path(self) -> Row {
        Row { stall: None, ..self }
    }

    /// Connections may stall so many milliseconds.
    pub(crate) const fn stalls_at_most(self, milliseconds: u64) -> Row {
        Row {
            stall: Some(Duration::from_millis(milliseconds)),
            ..self
        }
    }

    /// The nodes hold something else in the end.
    pub(crate) const fn leaves_changes(self) -> Row {
        Row {
            leaves: Leaves::Changes,
            ..self
        }
    }

    /// Whether it is meant by a name: its id, the place of its id, or the letter of that.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        let place = self.id.split('/').next().unwrap_or(self.id);
        [self.id, place, &place[..1]]
            .iter()
            .any(|known| known.eq_ignore_ascii_case(name))
    }
}

/// A machine whose clock may be changed.
pub(crate) fn a_machine_of_its_own() -> Result<(), String> {
    // Set in the guests of tests/vm alone.
    if std::env::var_os("SHROUD_LAB_PAIR").is_some() {
        Ok(())
    } else {
        Err("needs a machine whose clock it may change (make test-vm)".to_owned())
    }
}

/// Queueing disciplines that lose, delay and change packets.
pub(crate) fn netem() -> Result<(), String> {
    try_in_a_namespace("netem", |netns| {
        let words = ["qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"];
        netns.check("tc", &words).map(drop)
    })
}

/// WireGuard in the kernel.
pub(crate) fn kernel_wireguard() -> Result<(), String> {
    try_in_a_namespace("the kernel's WireGuard", |netns| {
        netns.ip("link add probe type wireguard").map(drop)
    })
}

/// Meshes whose data plane is a process.
pub(crate) fn userspace() -> Result<(), String> {
    match AgentOptions::new("").backend.as_str() {
        "userspace" => Ok(()),
        other => Err(format!("needs `shroud wire`, and this run encrypts by {other}")),
    }
}

/// A build as it is shipped: thousands of handshakes and records take another many times as long.
pub(crate) fn optimised() -> Result<(), String> {
    if cfg!(debug_assertions) {
        Err("needs an optimised build (make test-faults)".to_owned())
    } else {
        Ok(())
    }
}

/// A program that stops others at their system calls.
pub(crate) fn strace() -> Result<(), String> {
    let found = std::process::Command::new("strace").arg("--version").output();
    found.map(drop).map_err(|error| format!("needs strace: {error}"))
}

fn try_in_a_namespace(what: &str, work: impl FnOnce(&Netns) -> Result<()>) -> Result<(), String> {
    let name = format!("shroud-{}-probe", std::process::id());
    let netns = Netns::new(&name).map_err(|error| format!("{error:#}"))?;
    work(&netns).map_err(|_| format!("needs {what}, which this kernel does not have (make test-vm)"))
}
