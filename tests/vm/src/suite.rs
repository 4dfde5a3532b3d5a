//! Which test binaries run in a guest, and how.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build::{self, Built};
use crate::program::Program;

/// Packages whose tests are built.
pub const PACKAGES: [&str; 6] = [
    "shroud",
    "shroud-ebpf",
    "shroud-overlay",
    "shroud-routing",
    "shroud-tunnel",
    "shroud-wire",
];

/// Modules that the tests' devices, filters and tunnels need; those they depend on come by themselves.
pub const MODULES: [&str; 24] = [
    "virtio_pci",
    "virtio_net",
    "bridge",
    "veth",
    "tun",
    "wireguard",
    "vxlan",
    "geneve",
    "sch_ingress",
    "cls_bpf",
    "cls_u32",
    "act_gact",
    "esp4",
    "esp6",
    "xfrm_interface",
    "8021q",
    "inet_diag",
    "tcp_diag",
    // libcrc32c, which nf_tables needs, asks for it as a soft dependency.
    "crc32c_generic",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_chain_nat",
    "sch_netem",
];

/// A run of suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// The short run alone: a part of what the full one does.
    Short,
    /// The full run alone.
    Full,
    /// Either.
    Both,
}

/// A test binary and how it is run.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// What reports call it.
    pub name: &'static str,
    /// Its source file in the workspace.
    source: &'static str,
    /// Arguments of the test harness.
    arguments: &'static [&'static str],
    /// Environment variables.
    environment: &'static [(&'static str, &'static str)],
    /// Which runs it belongs to.
    pub run: Run,
    /// How long it may take before it counts as hung: several times what it needs, as the guests share the machine with whatever runs there.
    seconds: u64,
}

/// One emulated processor carries all nodes: loading the gate takes each agent 4 s instead of 0.2. Stretches the lab's bounds.
const SLOW: (&str, &str) = ("SHROUD_LAB_PATIENCE", "4");

/// Scenarios that encrypt in the kernel.
const KERNEL: &[(&str, &str)] = &[("SHROUD_TEST_BACKEND", "kernel"), SLOW];

/// Scenarios that encrypt in `shroud wire`.
const USERSPACE: &[(&str, &str)] = &[("SHROUD_TEST_BACKEND", "userspace"), SLOW];

/// The suite that takes two guests; each is told which it is by `SHROUD_LAB_PAIR`.
pub const PAIR: &str = "pair, kernel WireGuard";

/// A cell per mode, together with both families of pods and of underlays.
const CORE_MATRIX: &[&str] = &[
    "--test-threads=1",
    "matrix::native_v4_over_v4",
    "matrix::vxlan_v6_over_v4",
    "matrix::geneve_v4_over_v6",
];

/// All suites, the cheapest failures first.
pub const SUITES: [Suite; 15] = [
    // First: it waits for the other guest, which has just been started, too.
    Suite {
        name: PAIR,
        source: "agent/tests/scenarios/main.rs",
        arguments: &["--test-threads=1", "pair::"],
        environment: KERNEL,
        run: Run::Both,
        seconds: 900,
    },
    Suite {
        name: "core gate",
        source: "ebpf/tests/kernel/main.rs",
        // What it decides on each packet, and how it hangs on devices; loading the gate takes an emulator seconds for each test.
        arguments: &[
            "--test-threads=2",
            "verdicts",
            "attachments::it_outlives",
            "attachments::foreign_programs",
        ],
        environment: &[],
        run: Run::Short,
        seconds: 600,
    },
    Suite {
        name: "gate",
        source: "ebpf/tests/kernel/main.rs",
        arguments: &["--test-threads=2"],
        environment: &[],
        run: Run::Full,
        seconds: 1800,
    },
    Suite {
        name: "routing",
        source: "routing/tests/kernel.rs",
        arguments: &["--test-threads=2"],
        environment: &[],
        run: Run::Both,
        seconds: 300,
    },
    Suite {
        name: "tunnel",
        source: "tunnel/tests/backend.rs",
        // What needs Debian's wireguard-go runs on the host alone.
        arguments: &[
            "--test-threads=2",
            "--skip=wireguard_go",
            "--skip=a_process_that_is_not_provably_ours_is_never_ended",
        ],
        environment: &[],
        run: Run::Both,
        seconds: 300,
    },
    Suite {
        name: "overlay",
        source: "overlay/tests/kernel.rs",
        arguments: &["--test-threads=2"],
        environment: &[],
        run: Run::Full,
        seconds: 600,
    },
    Suite {
        name: "core matrix, kernel WireGuard",
        source: "agent/tests/scenarios/main.rs",
        arguments: CORE_MATRIX,
        environment: KERNEL,
        run: Run::Short,
        seconds: 900,
    },
    Suite {
        name: "core matrix, userspace WireGuard",
        source: "agent/tests/scenarios/main.rs",
        // The host's own kernel runs the other modes in user space.
        arguments: &["--test-threads=1", "matrix::geneve_v4_over_v6"],
        environment: USERSPACE,
        run: Run::Short,
        seconds: 600,
    },
    Suite {
        name: "core scenarios, kernel WireGuard",
        source: "agent/tests/scenarios/main.rs",
        arguments: &[
            "--test-threads=1",
            "a_pods_packet_that_arrives_in_the_clear",
            "a_second_pass_changes_nothing",
            "an_agent_that_is_killed",
            "explain_gives_the_true_answer",
            "with_another_nodes_key",
            "with_the_gate_off",
        ],
        environment: KERNEL,
        run: Run::Short,
        seconds: 900,
    },
    Suite {
        name: "scenarios, kernel WireGuard",
        source: "agent/tests/scenarios/main.rs",
        arguments: &["--test-threads=1", "--skip=wire", "--skip=matrix", "--skip=pair::"],
        environment: KERNEL,
        run: Run::Full,
        seconds: 4500,
    },
    Suite {
        name: "scenarios, userspace WireGuard",
        source: "agent/tests/scenarios/main.rs",
        // Where the directory comes from, and how the agent answers, has nothing to do with what encrypts.
        arguments: &[
            "--test-threads=1",
            "--skip=matrix",
            "--skip=pair::",
            "--skip=kubernetes::",
            "--skip=opt_out::",
            "--skip=http::",
            "--skip=command_line::",
            "--skip=refused::",
            "--skip=socket::",
        ],
        environment: USERSPACE,
        run: Run::Full,
        seconds: 3000,
    },
    Suite {
        name: "faults, kernel WireGuard",
        source: "agent/tests/faults/main.rs",
        arguments: &[
            "--small",
            // A row takes minutes here: what has to do with the kernel, and one of each kind of the rest.
            "--row=0,A1/some,A2,B1/folder,C3/deleted,C3/renamed,C3/moved,C3/uplink,C4/pins,C4/wg,D4,F5,F7/pods,F7/replay,G1,G2/node,G3,G5,H1",
        ],
        environment: KERNEL,
        run: Run::Full,
        seconds: 5400,
    },
    Suite {
        name: "faults, userspace WireGuard",
        source: "agent/tests/faults/main.rs",
        arguments: &["--small", "--row=A1/some,C3/deleted,C4/pins,D4,G3,K2/killed"],
        environment: USERSPACE,
        run: Run::Full,
        seconds: 3600,
    },
    Suite {
        name: "matrix, kernel WireGuard",
        source: "agent/tests/scenarios/main.rs",
        arguments: &["--test-threads=1", "matrix"],
        environment: KERNEL,
        run: Run::Full,
        seconds: 2400,
    },
    Suite {
        name: "matrix, userspace WireGuard",
        source: "agent/tests/scenarios/main.rs",
        arguments: &["--test-threads=1", "matrix"],
        environment: USERSPACE,
        run: Run::Full,
        seconds: 2400,
    },
];

impl Suite {
    /// The program that the guest runs.
    ///
    /// # Errors
    /// When the build did not make it.
    pub fn program(&self, built: &Built) -> Result<Program> {
        let artifact = built
            .tests
            .get(self.source)
            .with_context(|| format!("cargo built no test from {}", self.source))?;
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Ok(Program {
            name: self.name.to_owned(),
            path: artifact.path.clone(),
            arguments: self.arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            environment: self.environment.iter().map(owned).collect(),
            folder: artifact.folder.clone(),
            within: Duration::from_secs(self.seconds),
        })
    }
}

/// The source file of the benchmark of thousands of peers.
const PEERS: &str = "tunnel/benches/peers.rs";

/// The benchmark of thousands of peers, and what has to be in the guest for it.
///
/// # Errors
/// When it cannot be built.
pub fn bench() -> Result<(Built, Program)> {
    let built = build::bench("shroud-tunnel", "peers", "shroud-wire")?;
    let artifact = built.tests.get(PEERS).context("cargo built no benchmark of peers")?;
    let program = Program {
        name: "bench of peers".into(),
        path: artifact.path.clone(),
        arguments: vec!["--bench".into()],
        environment: BTreeMap::new(),
        folder: artifact.folder.clone(),
        within: Duration::from_secs(1800),
    };
    Ok((built, program))
}

/// A command line as a program, to look around in a guest.
pub fn command(line: &str) -> Program {
    Program {
        name: line.to_owned(),
        path: PathBuf::from("/bin/sh"),
        arguments: vec!["-c".into(), line.into()],
        environment: BTreeMap::new(),
        folder: Path::new("/root").to_owned(),
        within: Duration::from_secs(600),
    }
}
