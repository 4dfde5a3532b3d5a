//! `kubectl shroud status`: the shipped binary under its other name, run by an operator who may list nodes and pods and run commands in
//! the agents' pods, and nothing else.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shroud_apiserver::{ApiServer, Executed, Grant, Identity, Options};
use shroud_lab::agent::config_file;
use shroud_lab::cluster::{NAMESPACE, agent_pod, agent_pod_name};
use shroud_lab::{AgentOptions, Netns, Output};
use tempfile::TempDir;

use crate::kubernetes::Nodes;
use crate::mesh::SHROUD;

const OPERATOR: &str = "operator";

/// The plugin, installed for an operator.
struct Plugin {
    folder: TempDir,
}

impl Plugin {
    fn installed(server: &ApiServer) -> Result<Self> {
        let plugin = Self {
            folder: tempfile::tempdir()?,
        };
        std::os::unix::fs::symlink(SHROUD, plugin.program())?;
        let kubeconfig = server.kubeconfig(&Identity::User(OPERATOR.to_owned()));
        fs::write(plugin.kubeconfig(), kubeconfig)?;
        Ok(plugin)
    }

    fn program(&self) -> PathBuf {
        self.folder.path().join("kubectl-shroud")
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("config")
    }

    /// Runs it in a namespace from which the API server is reached; without one, here.
    fn run(&self, netns: Option<&Netns>, arguments: &[&str]) -> Result<Output> {
        let kubeconfig = format!("KUBECONFIG={}", self.kubeconfig().display());
        let program = self.program().display().to_string();
        let arguments = [&[kubeconfig.as_str(), &program], arguments].concat();
        if let Some(netns) = netns {
            return netns.exec("env", &arguments);
        }
        let output = std::process::Command::new("env").args(arguments).output()?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The exit code, and what it says as JSON.
    fn status(&self, netns: Option<&Netns>) -> Result<(i32, Value)> {
        let output = self.run(netns, &["status", "--output", "json"])?;
        let said = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        Ok((output.status.code().context("killed")?, said))
    }
}

/// What an operator needs, and no more; and what the agents need.
fn grants() -> Options {
    let options = Options::default();
    let operator = [
        Grant::new(OPERATOR, "list", "", "nodes"),
        Grant::new(OPERATOR, "list", "", "pods").within(NAMESPACE),
        Grant::new(OPERATOR, "get create", "", "pods/exec").within(NAMESPACE),
    ];
    Options {
        grants: [options.grants.clone(), operator.into()].concat(),
        ..options
    }
}

/// Pairs that are not encrypted, as `from->to state check`.
fn not_encrypted(said: &Value) -> Vec<String> {
    let pairs = said["pairs"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    pairs
        .filter(|pair| pair["state"] != "encrypted")
        .map(|pair| {
            let [from, to, state] = ["from", "to", "state"].map(|field| text(&pair[field]));
            format!("{from}->{to} {state} {}", text(&pair["why"]["check"]))
        })
        .collect()
}

/// Why one pair is not encrypted.
fn why(said: &Value, from: &str, to: &str) -> String {
    let mut pairs = said["pairs"].as_array().into_iter().flatten();
    let pair = pairs.find(|pair| pair["from"] == from && pair["to"] == to);
    pair.and_then(|pair| pair["why"]["says"].as_str())
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn three_nodes_are_one_cluster_and_what_is_wrong_with_it_is_told() -> Result<()> {
    let Nodes { mut mesh, cluster } = Nodes::started("plugin", 3, grants(), &AgentOptions::new(SHROUD))?;
    mesh.all_healthy()?;
    cluster.add_agent_pods(&mesh.lab, SHROUD.as_ref())?;
    let plugin = Plugin::installed(&cluster.server)?;
    let underlay = mesh.lab.underlay.clone();
    let ask = || plugin.status(Some(&underlay));

    // All is well.
    let (code, said) = ask()?;
    ensure!(code == 0 && said["verdict"] == "healthy", "{said:#}");
    let counts = json!({ "all": 6, "encrypted": 6, "plain": 0, "dropped": 0, "clear": 0, "unknown": 0 });
    ensure!(
        said["counts"] == counts && said["pairs"].as_array().map(Vec::len) == Some(6),
        "{said:#}"
    );
    for node in said["nodes"].as_array().into_iter().flatten() {
        let own = mesh.agent(node["node"].as_str().context("a name")?).status()?;
        ensure!(
            node["fingerprint"] == own.raw["fingerprint"] && node["agent"] == "answers",
            "{said:#}"
        );
    }
    let table = plugin.run(Some(&underlay), &["status"])?;
    ensure!(
        table
            .stdout
            .starts_with("healthy: each of 6 pairs of 3 nodes is encrypted\n"),
        "{table:?}"
    );
    ensure!(!table.stdout.contains('\u{1b}'), "colours in a pipe: {table:?}");
    let requests = cluster.server.requests();
    let by_us = requests.iter().filter(|request| request.username == OPERATOR);
    ensure!(
        by_us
            .clone()
            .all(|request| request.agent.starts_with("kubectl-shroud/")),
        "{requests:?}"
    );
    ensure!(
        by_us.count() == 2 * 5,
        "two lists and three commands, twice: {requests:?}"
    );

    // A node is denied: what it sends is not taken either.
    cluster.deny("c # stolen")?;
    for name in ["a", "b"] {
        mesh.eventually("c is refused", Duration::from_secs(10), mesh.agent(name), |status| {
            status.refused.iter().any(|refused| refused.node == "c")
        })?;
    }
    let (code, said) = ask()?;
    ensure!(code == 1, "exit code {code}: {said:#}");
    let expected = ["a->c", "b->c", "c->a", "c->b"].map(|pair| format!("{pair} dropped node-refused"));
    ensure!(not_encrypted(&said) == expected, "{said:#}");
    ensure!(
        why(&said, "a", "c").starts_with("c is refused by the sender") && why(&said, "a", "c").contains("stolen"),
        "{said:#}"
    );
    ensure!(
        why(&said, "c", "b").starts_with("c is refused by the receiver"),
        "{said:#}"
    );
    cluster.deny("")?;
    mesh.all_healthy()?;

    // A gate is off.
    let file = config_file(mesh.lab.node("b"));
    let config = fs::read_to_string(&file)?;
    ensure!(config.contains("mode: \"enforce\""), "{config}");
    fs::write(&file, config.replace("mode: \"enforce\"", "mode: \"off\""))?;
    mesh.agent_mut("b").restart()?;
    mesh.eventually(
        "b has met the others",
        Duration::from_secs(30),
        mesh.agent("b"),
        |status| status.says("gate-off").is_some() && status.met_all(3).is_ok(),
    )?;
    let (code, said) = ask()?;
    ensure!(code == 1, "exit code {code}: {said:#}");
    ensure!(
        not_encrypted(&said) == ["b->a clear gate-off", "b->c clear gate-off"],
        "{said:#}"
    );

    // An agent is gone, and its pod stays. Its peers have shaken hands with its data plane, which is still there.
    mesh.agent_mut("c").kill()?;
    let (code, said) = ask()?;
    ensure!(code == 1, "exit code {code}: {said:#}");
    let expected = [
        "b->a clear gate-off",
        "b->c clear gate-off",
        "c->a unknown agent-silent",
        "c->b unknown agent-silent",
    ];
    ensure!(not_encrypted(&said) == expected, "{said:#}");
    ensure!(
        why(&said, "c", "a").contains("ends with code 3: no agent answers on"),
        "{said:#}"
    );
    ensure!(
        said["summary"]
            .as_str()
            .is_some_and(|summary| summary.ends_with("; no answer: c")),
        "{said:#}"
    );

    // Neither is there a pod.
    cluster.server.delete("pods", NAMESPACE, &agent_pod_name("c"))?;
    let (code, said) = ask()?;
    ensure!(code == 1, "exit code {code}: {said:#}");
    let expected = [
        "b->a clear gate-off",
        "b->c clear gate-off",
        "c->a clear agent-missing",
        "c->b clear agent-missing",
    ];
    ensure!(not_encrypted(&said) == expected, "{said:#}");
    let table = plugin.run(Some(&underlay), &["status"])?;
    for line in [
        "degraded: 2 of 6 pairs of 3 nodes are encrypted, 4 may be in the clear; no agent: c",
        "  2 b         C  \u{b7}  C",
        "  may be in the clear c -> a, b",
    ] {
        ensure!(
            table.stdout.lines().any(|shown| shown == line),
            "no {line:?} in\n{}",
            table.stdout
        );
    }
    Ok(())
}

/// A cluster of Node objects and pods alone, on this machine's loopback.
fn pods_of(nodes: &[&str], options: Options) -> Result<(ApiServer, Plugin)> {
    let server = ApiServer::local(options)?;
    for node in nodes {
        server.put(json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node } }))?;
        server.put(agent_pod(node))?;
    }
    let plugin = Plugin::installed(&server)?;
    Ok((server, plugin))
}

#[test]
fn who_says_nothing_holds_up_nobody() -> Result<()> {
    let (server, plugin) = pods_of(&["a", "b", "c", "d", "e"], grants())?;
    server.patch(
        "pods",
        NAMESPACE,
        &agent_pod_name("d"),
        &json!({ "status": { "phase": "Pending" } }),
    )?;
    server.on_exec(|exec| match exec.node.as_str() {
        "a" | "e" => {
            std::thread::sleep(Duration::from_secs(30));
            Executed::no_container("agent")
        }
        "b" => Executed::no_container("agent"),
        _ => Executed::Ended {
            stdout: b"{\"version\":7}".to_vec(),
            stderr: Vec::new(),
            code: 0,
        },
    });

    let asked = Instant::now();
    let (code, said) = plugin.status(None)?;

    ensure!(code == 1 && said["counts"]["unknown"] == 20, "{said:#}");
    ensure!(
        asked.elapsed() < Duration::from_secs(25),
        "it took {:?}",
        asked.elapsed()
    );
    for (node, expected) in [
        ("a", "ask the agent in pod shroud-a: no answer within 15 s"),
        (
            "b",
            "ask the agent in pod shroud-b: Internal error occurred: container not found (\"agent\")",
        ),
        (
            "c",
            "its status is of version 7, this program reads version 2: use the one of the agents' release",
        ),
        ("d", "pod shroud-d is pending"),
    ] {
        let says = why(&said, node, "e");
        ensure!(says == expected, "{node}: {says:?}");
    }
    Ok(())
}

#[test]
fn many_agents_are_asked_at_once_and_not_all() -> Result<()> {
    let names: Vec<String> = (0..40).map(|number| format!("n{number}")).collect();
    let nodes: Vec<&str> = names.iter().map(String::as_str).collect();
    let (server, plugin) = pods_of(&nodes, grants())?;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (now, highest) = (running, most.clone());
    server.on_exec(move |_| {
        highest.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_secs(1));
        now.fetch_sub(1, Ordering::SeqCst);
        Executed::no_container("agent")
    });

    let (_, said) = plugin.status(None)?;

    ensure!(said["counts"]["unknown"] == 40 * 39, "{}", said["summary"]);
    let most = most.load(Ordering::SeqCst);
    ensure!((2..=16).contains(&most), "{most} at once");
    Ok(())
}

#[test]
fn a_cluster_that_cannot_be_asked_is_no_verdict() -> Result<()> {
    let refused = |options: Options, arguments: &[&str], code: i32, says: &str| -> Result<()> {
        let (_server, plugin) = pods_of(&["a", "b"], options)?;
        let output = plugin.run(None, &[&["status"], arguments].concat())?;
        ensure!(
            output.status.code() == Some(code) && output.stderr.contains(says) && output.stdout.is_empty(),
            "{arguments:?}: {output:?}"
        );
        Ok(())
    };
    let without = |grant: &str| Options {
        grants: grants()
            .grants
            .into_iter()
            .filter(|one| one.subject != OPERATOR || !one.resources.contains(&grant.to_owned()))
            .collect(),
        ..grants()
    };

    refused(
        grants(),
        &["--kubeconfig", "/nonexistent"],
        2,
        "No such file or directory",
    )?;
    refused(grants(), &["--context", "mars"], 2, "it has no context mars")?;
    refused(grants(), &["--output", "html"], 2, "invalid value 'html'")?;
    refused(
        grants(),
        &["--selector", "app=else"],
        3,
        "no pod in the namespace shroud-system has the labels app=else",
    )?;
    refused(without("nodes"), &[], 3, "list nodes: 403")?;
    refused(
        without("pods/exec"),
        &[],
        3,
        "deploy/README.md lists the rights that are needed",
    )?;

    // The server is gone.
    let (server, plugin) = pods_of(&["a"], grants())?;
    drop(server);
    let output = plugin.run(None, &["status"])?;
    ensure!(
        output.status.code() == Some(3) && output.stderr.contains("Connection refused"),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn the_context_that_is_asked_for_is_the_one_that_is_used() -> Result<()> {
    let (server, plugin) = pods_of(&["a", "b"], grants())?;
    let elsewhere = fs::read_to_string(plugin.kubeconfig())?;
    // The current context leads nowhere.
    let nowhere = elsewhere
        .replace(
            "contexts:\n",
            "contexts:\n- name: nowhere\n  context: {cluster: none, user: test}\n",
        )
        .replace("current-context: test", "current-context: nowhere");
    fs::write(plugin.kubeconfig(), nowhere)?;

    let without = plugin.run(None, &["status"])?;
    let with = plugin.run(None, &["status", "--context", "test"])?;

    ensure!(without.status.code() == Some(2), "{without:?}");
    ensure!(with.status.code() == Some(1), "{with:?}");
    ensure!(
        server.requests().iter().any(|request| request.resource == "pods/exec"),
        "nobody was asked"
    );
    Ok(())
}
