//! The command line: what can be asked, and what the exit code means.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use shroud_model::NodeName;

/// What the process tells its caller. `docs/reference.md` lists the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All is well, or what was asked is done.
    Healthy,
    /// Something is wrong, and has been said.
    Degraded,
    /// The command line or the configuration cannot be used. (clap exits with the same number.)
    Usage,
    /// The agent does not answer.
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

/// Encrypts and carries pod traffic between nodes.
#[derive(Debug, Parser)]
#[command(
    name = "shroud",
    version,
    after_help = "Exit codes: 0 healthy or done, 1 degraded or failed, 2 usage or configuration refused, 3 agent unreachable, \
                  4 (wire) device taken."
)]
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

    /// Removes everything of ours from the kernel: routes, encryption device, gate. Keys stay.
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
    }
}
