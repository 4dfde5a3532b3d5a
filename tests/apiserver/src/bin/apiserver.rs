//! Runs the test API server until it is ended, so that people and `kubectl` can look at it.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;
use shroud_apiserver::{ApiServer, Identity, Options};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// A Kubernetes API server for tests.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where it listens; port 0 is any free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where it writes kubeconfigs: admin.yaml, and one for the agent of each node.
    #[arg(long)]
    dir: PathBuf,
    /// The nodes that exist at first.
    #[arg(long = "node", default_values = ["node-a", "node-b", "node-c"])]
    nodes: Vec<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let socket = TcpListener::bind(arguments.listen).with_context(|| format!("listen on {}", arguments.listen))?;
    let server = ApiServer::start(vec![socket], Options::default())?;

    fs::create_dir_all(&arguments.dir).with_context(|| format!("make the folder {}", arguments.dir.display()))?;
    for (index, name) in (1..).zip(&arguments.nodes) {
        let ranges = [format!("10.244.{index}.0/24"), format!("fd00:10:244:{index}::/64")];
        server.put(
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": ranges}}),
        )?;
    }
    let agents = arguments.nodes.iter().map(|node| Identity::agent(node));
    for identity in [Identity::Admin].into_iter().chain(agents) {
        let path = arguments.dir.join(format!("{}.yaml", identity.name()));
        fs::write(&path, server.kubeconfig(&identity)).with_context(|| format!("write {}", path.display()))?;
        println!("{}", path.display());
    }
    println!("serving on https://{}", server.addresses()[0]);

    let mut signals = Signals::new([SIGINT, SIGTERM]).context("wait for signals")?;
    signals.forever().next();
    Ok(())
}
