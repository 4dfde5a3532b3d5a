//! Shroud: the node daemon that encrypts and carries pod traffic between nodes, and its command line.
//!
//! `main` parses, dispatches and turns errors into exit codes; each command lives in a module of its own. [`daemon`] is the one place
//! that knows every other crate. Under the name `kubectl-shroud` this is a plugin of `kubectl` and has another command line.

mod check;
mod cleanup;
mod cli;
mod cluster;
mod cni;
mod config;
mod convergence;
mod daemon;
mod directory;
mod explain;
mod http;
mod metrics;
mod places;
mod plan;
mod rates;
mod readiness;
mod reconcile;
#[cfg(test)]
mod reference;
mod render;
mod serve;
mod status;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use shroud_keyd::FailureKind;
use shroud_keyd::kubernetes::Cluster;
use shroud_model::NodeName;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, ClusterView, Command, ConfigCommand, Exit, LogFormat, Output, Plugin, PluginCommand, View};
use crate::config::Config;
use crate::serve::{NoAnswer, Request};
use crate::status::{Explanation, GateCounters, RotationStatus, Status, Verdict};

fn main() -> ExitCode {
    let exit = if cli::is_plugin(std::env::args_os().next().as_deref()) {
        let PluginCommand::Status(view) = Plugin::parse().command;
        cluster_status(&view)
    } else {
        run(Cli::parse().command)
    };
    exit.into()
}

fn run(command: Command) -> Exit {
    match command {
        Command::Agent {
            config,
            node,
            log_format,
        } => agent(&config, node, log_format),
        Command::Wire { device, socket_dir } => wire(device, socket_dir),
        Command::Status(view) => status(&view),
        Command::Peers(view) => peers(&view),
        Command::Gate(view) => gate(&view),
        Command::Explain {
            source,
            destination,
            view,
        } => explain(&view, Request::Explain { source, destination }),
        Command::Rotate(view) => rotate(&view),
        Command::Cleanup { config, output } => clean_up(&config, output),
        Command::Config(ConfigCommand::Check { file }) => check(&file),
        Command::Config(ConfigCommand::Show { file, output }) => show(&file, output),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "shroud", &mut std::io::stdout());
            Exit::Healthy
        }
    }
}

fn agent(file: &Path, node: Option<NodeName>, format: LogFormat) -> Exit {
    let mut config = match Config::load(file) {
        Ok(config) => config,
        Err(refused) => return complain(&refused, Exit::Usage),
    };
    if let Some(node) = node {
        config.node = node;
    }
    log_to_stderr(format, "info");
    match daemon::run(config) {
        Ok(()) => Exit::Healthy,
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                "the agent ends; the data plane stays as it is"
            );
            Exit::Degraded
        }
    }
}

fn wire(device: String, socket_dir: std::path::PathBuf) -> Exit {
    log_to_stderr(LogFormat::Text, shroud_wire::LOG_FILTER);
    match shroud_wire::run(shroud_wire::Options { device, socket_dir }) {
        Ok(()) => Exit::Healthy,
        Err(error) => {
            let exit = match error {
                shroud_wire::Error::DeviceBusy(_) | shroud_wire::Error::DeviceForeign(_) => Exit::DeviceTaken,
                shroud_wire::Error::DeviceName(_)
                | shroud_wire::Error::AlreadyRunning { .. }
                | shroud_wire::Error::DeviceGone(_)
                | shroud_wire::Error::System { .. } => Exit::Degraded,
            };
            tracing::error!(error = format!("{:#}", anyhow::Error::new(error)), "wire ends");
            exit
        }
    }
}

fn status(view: &View) -> Exit {
    ask(view, &Request::Status, |status: &Status| {
        print(&render::render(status, view.output, render::status));
        exit_for(status.verdict)
    })
}

fn peers(view: &View) -> Exit {
    ask(view, &Request::Status, |status: &Status| {
        match view.output {
            Output::Table => print(&render::peers(status, false)),
            Output::Wide => print(&render::peers(status, true)),
            Output::Json | Output::Yaml => print(&render::render(&status.peers, view.output, |_, _| String::new())),
        }
        exit_for(status.verdict)
    })
}

fn gate(view: &View) -> Exit {
    ask(view, &Request::Gate, |counters: &GateCounters| {
        print(&render::render(counters, view.output, render::gate));
        Exit::Healthy
    })
}

fn explain(view: &View, request: Request) -> Exit {
    ask(view, &request, |explanation: &Explanation| {
        print(&render::render(explanation, view.output, render::explanation));
        Exit::Healthy
    })
}

fn rotate(view: &View) -> Exit {
    ask(view, &Request::Rotate, |rotation: &RotationStatus| {
        print(&render::render(rotation, view.output, render::rotation));
        Exit::Healthy
    })
}

fn ask<T: serde::de::DeserializeOwned>(view: &View, request: &Request, show: impl FnOnce(&T) -> Exit) -> Exit {
    match serve::request(&view.socket, request) {
        Ok(answer) => show(&answer),
        Err(error @ NoAnswer::Unreachable { .. }) => complain(&error, Exit::Unreachable),
        Err(error @ NoAnswer::Refused(_)) => complain(&error, Exit::Degraded),
    }
}

fn cluster_status(view: &ClusterView) -> Exit {
    let asked = Cluster {
        kubeconfig: view.kubeconfig.clone(),
        context: view.context.clone(),
        namespace: view.namespace.clone(),
        selector: view.selector.clone(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&format_args!("start tokio: {error}"), Exit::Degraded),
    };
    // By its place in the image, which has no search path.
    let answers = match runtime.block_on(asked.ask(&["/usr/bin/shroud", "status", "--output", "json"])) {
        Ok(answers) => answers,
        Err(error) => {
            let unusable = matches!(
                error,
                shroud_keyd::Error::ApiServer {
                    kind: FailureKind::Credentials,
                    ..
                }
            );
            return complain(&error, if unusable { Exit::Usage } else { Exit::Unreachable });
        }
    };
    if answers.values().all(Option::is_none) {
        let why = format_args!(
            "no pod in the namespace {} has the labels {}: is Shroud installed there? (--namespace, --selector)",
            view.namespace, view.selector
        );
        return complain(&why, Exit::Unreachable);
    }
    let heard = answers.into_iter().map(|(node, asked)| {
        let heard = cluster::heard(&node, asked);
        (node, heard)
    });
    let status = cluster::judge(&heard.collect());
    print(&render::render(&status, view.output, render::cluster));
    exit_for(status.verdict)
}

fn clean_up(file: &Path, output: Output) -> Exit {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(refused) => return complain(&refused, Exit::Usage),
    };
    match cleanup::run(&config) {
        Ok(cleaned) => {
            print(&render::render(&cleaned, output, render::cleaned));
            if cleaned.failures.is_empty() {
                Exit::Healthy
            } else {
                Exit::Degraded
            }
        }
        Err(error) => complain(&format_args!("{error:#}"), Exit::Degraded),
    }
}

fn check(file: &Path) -> Exit {
    match Config::load(file) {
        Ok(_) => {
            print(&format!("{}: right\n", file.display()));
            Exit::Healthy
        }
        Err(refused) => complain(&refused, Exit::Usage),
    }
}

fn show(file: &Path, output: Output) -> Exit {
    match Config::load(file) {
        Ok(config) => {
            let yaml = |config: &Config, _wide: bool| render::render(config, Output::Yaml, |_, _| String::new());
            print(&render::render(&config, output, yaml));
            Exit::Healthy
        }
        Err(refused) => complain(&refused, Exit::Usage),
    }
}

fn exit_for(verdict: Verdict) -> Exit {
    match verdict {
        Verdict::Healthy => Exit::Healthy,
        Verdict::Degraded => Exit::Degraded,
    }
}

/// Prints an answer; colours are dropped where they are not wanted (NO_COLOR, a pipe). A reader that went away is no error.
fn print(text: &str) {
    use std::io::Write as _;

    drop(anstream::stdout().write_all(text.as_bytes()));
}

fn complain(what: &dyn std::fmt::Display, exit: Exit) -> Exit {
    anstream::eprintln!("shroud: {what}");
    exit
}

/// Logs to stderr, by this filter unless RUST_LOG has another.
fn log_to_stderr(format: LogFormat, filter: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // A log that nobody reads any more must not end the process: by default a failed write is reported to stderr, which panics.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
