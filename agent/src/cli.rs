//! The command line: what can be asked, and what the exit code means.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use shroud_model::NodeName;

/// The name under which this program is a plugin of `kubectl`.
const PLUGIN: &str = "kubectl-shroud";

/// Whether this program was started, by this name, as a plugin of `kubectl`.
pub(crate) fn is_plugin(name: Option<&OsStr>) -> bool {
    name.and_then(|name| Path::new(name).file_name()) == Some(OsStr::new(PLUGIN))
}

/// What the process tells its caller. `docs/reference.md` lists the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All is well, or what was asked is done.
    Healthy,
    /// Something is wrong, and has been said.
    Degraded,
    /// The command line or the configuration cannot be used. (clap exits with the same number.)
    Usage,
    /// The agent, or the cluster, does not answer.
    Unreachable,
    /// `shroud wire` cannot have its device: it is another process's, or no TUN device of ours. (The tunnel crate reads this number.)
    DeviceTaken,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Healthy => 0,
            Exit::Degraded => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 3,
            Exit::DeviceTaken => 4,
        })
    }
}

/// The codes a caller meets, for the end of the help.
const CODES: &str = "Exit codes: 0 healthy or done, 1 degraded or failed, 2 usage or configuration refused, 3 agent unreachable, 4 (wire) device taken.";

/// Encrypts and carries pod traffic between nodes.
#[derive(Debug, Parser)]
#[command(name = "shroud", version, after_help = CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the daemon of this node in the foreground.
    Agent {
        /// The configuration file (YAML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// This node's name, instead of the configuration's.
        #[arg(long, value_name = "NAME", env = "NODE_NAME")]
        node: Option<NodeName>,
        /// How log lines are written.
        #[arg(long, value_name = "FORMAT", default_value = "text")]
        log_format: LogFormat,
    },

    /// Runs the userspace WireGuard data plane; the agent starts it by itself where it is needed.
    Wire {
        /// The TUN device to serve.
        #[arg(long, value_name = "NAME")]
        device: String,
        /// Where its control socket `NAME.sock` is made.
        #[arg(long, value_name = "DIR", default_value = "/run/wireguard")]
        socket_dir: PathBuf,
    },

    /// Shows the verdict, then each peer.
    Status(View),

    /// Shows each peer.
    Peers(View),

    /// Shows what the gate let through, encrypted and dropped, by reason.
    Gate(View),

    /// Says what happens to a packet, step by step, and why.
    Explain {
        /// The source address, or `node` for this node with the source the kernel chooses.
        source: Source,
        /// The destination address.
        destination: IpAddr,
        #[command(flatten)]
        view: View,
    },

    /// Has this node take a new key, and says how far that is. No packet is lost; the old key goes when all peers use the new one.
    Rotate(View),

    /// Removes everything of ours from the kernel: routes, encryption devices, gate. Keys stay.
    Cleanup {
        /// The configuration file of the agent to clean up after.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// How to print what was removed.
        #[arg(short, long, value_name = "FORMAT", default_value = "table")]
        output: Output,
    },

    /// Checks or prints a configuration.
    #[command(subcommand)]
    Config(ConfigCommand),

    /// Prints a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Says whether a configuration file is right, and if not, where and what would be.
    Check {
        /// The configuration file.
        file: PathBuf,
    },
    /// Prints the configuration in effect, defaults included.
    Show {
        /// The configuration file.
        file: PathBuf,
        /// How to print it.
        #[arg(short, long, value_name = "FORMAT", default_value = "yaml")]
        output: Output,
    },
}

/// Asks all agents of a cluster.
#[derive(Debug, Parser)]
#[command(name = "kubectl shroud", bin_name = "kubectl shroud", version, after_help = CODES)]
pub(crate) struct Plugin {
    #[command(subcommand)]
    pub(crate) command: PluginCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Says whether every node's traffic to every other one is encrypted, and if not, which is not and why.
    Status(ClusterView),
}

/// Which cluster to ask, and how to print the answer.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClusterView {
    /// The file with address and credentials, instead of those that `kubectl` would use.
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The context in there, instead of the current one.
    #[arg(long, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// The namespace of the agents' pods.
    #[arg(short, long, value_name = "NAME", default_value = "shroud-system")]
    pub(crate) namespace: String,
    /// The labels of the agents' pods.
    #[arg(
        short = 'l',
        long,
        value_name = "LABELS",
        default_value = "app.kubernetes.io/name=shroud,app.kubernetes.io/component=agent"
    )]
    pub(crate) selector: String,
    /// How to print the answer.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Output,
}

/// Whom to ask, and how to print the answer.
#[derive(Debug, Clone, Args)]
pub(crate) struct View {
    /// The agent's status socket.
    #[arg(
        long,
        value_name = "PATH",
        env = "SHROUD_SOCKET",
        default_value = "/run/shroud/shroud.sock"
    )]
    pub(crate) socket: PathBuf,
    /// How to print the answer.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Output,
}

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Columns for people.
    Table,
    /// More columns.
    Wide,
    /// The versioned JSON that docs/status.md explains.
    Json,
    /// The same as YAML.
    Yaml,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Where a packet to be explained comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Source {
    /// This node, with the source address that the kernel chooses.
    Node,
    /// This address.
    Address(IpAddr),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "node" => Ok(Self::Node),
            address => address
                .parse()
                .map(Self::Address)
                .map_err(|_| "give an IP address, or `node`".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        Plugin::command().debug_assert();
    }

    #[test]
    fn the_name_decides_whether_it_is_a_plugin() {
        for (name, expected) in [
            ("/usr/local/bin/kubectl-shroud", true),
            ("kubectl-shroud", true),
            ("/usr/bin/shroud", false),
            ("/opt/kubectl-shroud/shroud", false),
            ("", false),
        ] {
            assert_eq!(is_plugin(Some(OsStr::new(name))), expected, "{name}");
        }
        assert!(!is_plugin(None));
    }
}
