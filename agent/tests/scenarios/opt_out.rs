//! What a cluster lets leave in the clear: pods that have opted out, and traffic inside a zone. Nothing else does, and going back to encryption
//! costs no connection.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use shroud_apiserver::Options;
use shroud_lab::{AgentOptions, Evidence, Family, Host, Protocol, Status};

use crate::kubernetes::{Nodes, has_problem, none_was_lost_or_stalled};
use crate::mesh::{SHROUD, nothing_leaked};

/// How soon a label has its effect.
const SOON: Duration = Duration::from_secs(10);

fn opting_out() -> AgentOptions {
    AgentOptions {
        opt_out: true,
        ..AgentOptions::new(SHROUD)
    }
}

fn out() -> Value {
    json!({ "shroud.dev/encrypt": "false", "app": "x" })
}

/// Two nodes whose pods have objects, and a namespace, without labels.
fn two_nodes(name: &str, options: &AgentOptions) -> Result<Nodes> {
    let nodes = Nodes::started(name, 2, Options::default(), options)?;
    nodes.cluster.label_namespace(&json!({}))?;
    for node in &nodes.mesh.lab.nodes {
        for pod in &node.pods {
            nodes.cluster.run_pod(node, pod, &json!({}))?;
        }
    }
    nodes.mesh.all_healthy()?;
    Ok(nodes)
}

/// The pods that an agent says have opted out; `None` where it cannot say.
fn opted_out(status: &Status) -> Option<Vec<String>> {
    let claims = status.raw["optedOut"].as_array()?;
    let pods: BTreeSet<String> = claims
        .iter()
        .map(|claim| {
            format!(
                "{} by {}",
                claim["pod"].as_str().unwrap_or_default(),
                claim["by"].as_str().unwrap_or_default()
            )
        })
        .collect();
    Some(pods.into_iter().collect())
}

impl Nodes {
    /// Waits until every agent has the same pods opted out.
    fn all_know(&self, pods: &[&str]) -> Result<()> {
        for agent in &self.mesh.agents {
            let what = format!("{} has {pods:?} opted out", agent.node().host.name);
            self.mesh.eventually(&what, SOON, agent, |status| {
                opted_out(status).is_some_and(|known| known == pods)
            })?;
        }
        Ok(())
    }

    /// What the wire shows of TCP and UDP between two pods, in both families.
    fn seen(&self, from: &str, to: &str) -> Result<Evidence> {
        let capture = self.capture()?;
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for family in Family::BOTH {
                let (from, to) = (self.mesh.lab.pod(from), self.mesh.lab.pod(to));
                self.mesh.arrived(&self.mesh.send(protocol, family, from, to))?;
            }
        }
        capture.stop()
    }

    fn is_encrypted(&self, from: &str, to: &str) -> Result<()> {
        let seen = self.seen(from, to)?;
        ensure!(seen.plaintext_frames() == 0, "{from} -> {to} is in the clear: {seen:?}");
        Ok(())
    }

    /// Insists that what this pod sends is in the clear, and that what it gets is not.
    fn sends_in_the_clear(&self, from: &str, to: &str) -> Result<()> {
        let seen = self.seen(from, to)?;
        let offenders: Vec<_> = seen.ports.values().flat_map(|port| &port.offenders).collect();
        ensure!(!offenders.is_empty(), "{from} -> {to} is encrypted: {seen:?}");
        let sender = self.mesh.lab.pod(from);
        for offender in offenders {
            ensure!(
                is_from(&offender.summary, sender),
                "not from {from} alone: {}",
                offender.summary
            );
        }
        Ok(())
    }
}

/// Whether a frame is from a pod, by its summary.
fn is_from(summary: &str, pod: &Host) -> bool {
    Family::BOTH
        .into_iter()
        .any(|family| summary.starts_with(&format!("{} > ", pod.address(family))))
}

#[test]
fn a_pod_that_opts_out_sends_in_the_clear_and_nobody_else_does() -> Result<()> {
    let nodes = two_nodes("optpod", &opting_out())?;
    let Nodes { mesh, cluster } = &nodes;
    nodes.all_know(&[])?;
    nodes.is_encrypted("a1", "b0")?;
    let pulses = mesh.pulses(&[("a1", "b0"), ("b1", "a1")], 2)?;

    cluster.run_pod(mesh.lab.node("a"), mesh.lab.pod("a1"), &out())?;
    nodes.all_know(&["pods/a1 by pod"])?;
    none_was_lost_or_stalled(pulses)?;

    nodes.sends_in_the_clear("a1", "b0")?;
    nodes.is_encrypted("a0", "b0")?;
    let explained = mesh.json("a", &["explain", "10.244.1.11", "10.244.2.10"])?;
    ensure!(
        explained["outcome"] == "plain"
            && explained["steps"]
                .to_string()
                .contains("pod pods/a1, which has opted out"),
        "{explained:#}"
    );
    let explained = mesh.json("b", &["explain", "10.244.2.10", "10.244.1.11"])?;
    ensure!(explained["outcome"] == "encrypted", "{explained:#}");
    ensure!(mesh.agent("a").status()?.verdict == "healthy", "an opt-out is no fault");

    // A pod that goes encrypts again, before its address can be another's.
    let pulses = mesh.pulses(&[("b1", "a1")], 2)?;
    cluster.server.delete("pods", shroud_lab::cluster::PODS, "a1")?;
    nodes.all_know(&[])?;
    nodes.is_encrypted("a1", "b0")?;
    nodes.is_encrypted("b1", "a1")?;
    none_was_lost_or_stalled(pulses)
}

#[test]
fn a_namespace_opts_out_for_its_pods_but_for_those_that_do_not_want_to() -> Result<()> {
    let nodes = two_nodes("optns", &opting_out())?;
    let Nodes { mesh, cluster } = &nodes;
    let stay = json!({ "shroud.dev/encrypt": "true" });
    cluster.run_pod(mesh.lab.node("a"), mesh.lab.pod("a0"), &stay)?;

    cluster.label_namespace(&out())?;
    nodes.all_know(&["pods/a1 by namespace", "pods/b0 by namespace", "pods/b1 by namespace"])?;

    let both = nodes.seen("a1", "b0")?;
    ensure!(both.plaintext_frames() > 0, "{both:?}");
    let half = nodes.seen("a0", "b0")?;
    ensure!(half.plaintext_frames() > 0, "b0 answers encrypted: {half:?}");
    ensure!(
        !half
            .ports
            .values()
            .flat_map(|port| &port.offenders)
            .any(|offender| is_from(&offender.summary, mesh.lab.pod("a0"))),
        "a0 does not want to be in the clear: {half:?}"
    );

    cluster.label_namespace(&json!({}))?;
    nodes.all_know(&[])?;
    nodes.is_encrypted("a1", "b0")
}

#[test]
fn where_the_configuration_does_not_let_them_nobody_opts_out() -> Result<()> {
    let nodes = two_nodes("optoff", &AgentOptions::new(SHROUD))?;
    let Nodes { mesh, cluster } = &nodes;

    cluster.label_namespace(&out())?;
    cluster.run_pod(mesh.lab.node("a"), mesh.lab.pod("a1"), &out())?;
    // As long as it takes where they may.
    std::thread::sleep(Duration::from_secs(3));

    nodes.is_encrypted("a1", "b0")?;
    nodes.all_know(&[])?;
    let pods = cluster
        .server
        .requests()
        .into_iter()
        .filter(|request| request.resource == "pods");
    ensure!(pods.count() == 0, "the agents asked for pods without need");
    Ok(())
}

#[test]
fn an_opt_out_that_nobody_confirms_has_lapsed() -> Result<()> {
    let mut nodes = two_nodes("optlapse", &opting_out())?;
    nodes
        .cluster
        .run_pod(nodes.mesh.lab.node("a"), nodes.mesh.lab.pod("a1"), &out())?;
    nodes.all_know(&["pods/a1 by pod"])?;
    nodes.sends_in_the_clear("a1", "b0")?;
    let pulses = nodes.mesh.pulses(&[("a1", "b0"), ("b1", "a1")], 2)?;

    nodes.cluster.server.refuse()?;
    nodes.cluster.server.cut_connections();
    for agent in &nodes.mesh.agents {
        nodes
            .mesh
            .eventually("nobody can say", Duration::from_secs(20), agent, |status| {
                opted_out(status).is_none() && has_problem(status, "opt-outs-unknown")
            })?;
    }
    nodes.is_encrypted("a1", "b0")?;

    // A new agent does not go by what an old one knew, either: the address may be another pod's by now.
    nodes.mesh.agent_mut("a").kill()?;
    nodes.mesh.agent_mut("a").restart()?;
    let agent = nodes.mesh.agent("a");
    nodes.mesh.eventually("a works again", SOON, agent, |status| {
        status.pass.number > 1 && status.peers.len() == 1
    })?;
    nodes.is_encrypted("a1", "b0")?;

    nodes.cluster.server.accept()?;
    for agent in &nodes.mesh.agents {
        nodes
            .mesh
            .eventually("all is known again", Duration::from_secs(60), agent, |status| {
                opted_out(status).is_some_and(|known| known == ["pods/a1 by pod"])
            })?;
    }
    nodes.sends_in_the_clear("a1", "b0")?;
    none_was_lost_or_stalled(pulses)
}

/// Three nodes, the first two in zone z1, the third in z2.
fn in_zones(name: &str, scope: &str) -> Result<Nodes> {
    let options = AgentOptions {
        scope: scope.to_owned(),
        ..AgentOptions::new(SHROUD)
    };
    let nodes = Nodes::started(name, 3, Options::default(), &options)?;
    for (node, zone) in nodes.mesh.lab.nodes.iter().zip(["z1", "z1", "z2"]) {
        nodes.cluster.place(node, zone)?;
    }
    Ok(nodes)
}

impl Nodes {
    /// Waits until a node's peers in its zone are these.
    fn shares_its_zone_with(&self, node: &str, peers: &[&str]) -> Result<()> {
        let what = format!("{node} shares its zone with {peers:?}");
        let within = Duration::from_secs(30);
        self.mesh
            .eventually(&what, within, self.mesh.agent(node), |status| {
                let all = status.raw["peers"].as_array().into_iter().flatten();
                let plain: Vec<&str> = all
                    .filter(|peer| peer["inTheClear"].is_string())
                    .filter_map(|peer| peer["node"].as_str())
                    .collect();
                status.verdict == "healthy" && plain == peers
            })
            .map(drop)
    }
}

#[test]
fn across_zones_all_is_encrypted_and_inside_one_nothing() -> Result<()> {
    let nodes = in_zones("zones", "cross-zone")?;
    let Nodes { mesh, cluster } = &nodes;
    for (node, peers) in [("a", &["b"] as &[&str]), ("b", &["a"]), ("c", &[])] {
        nodes.shares_its_zone_with(node, peers)?;
    }
    let inside = nodes.seen("a0", "b0")?;
    ensure!(inside.plaintext_frames() > 0, "encrypted inside a zone: {inside:?}");
    nodes.is_encrypted("a0", "c0")?;
    nodes.is_encrypted("c0", "b0")?;
    let explained = mesh.json("a", &["explain", "10.244.1.10", "10.244.2.10"])?;
    ensure!(
        explained["outcome"] == "plain" && explained["steps"].to_string().contains("both are in zone z1"),
        "{explained:#}"
    );
    let status = mesh.agent("a").status()?;
    ensure!(
        status.summary.contains("1 in this zone are in the clear"),
        "{}",
        status.summary
    );

    // A node that moves to another zone costs nobody a connection.
    let pulses = mesh.pulses(&[("a0", "b0"), ("b1", "a1"), ("c0", "a1")], 2)?;
    cluster.place(mesh.lab.node("b"), "z2")?;
    for (node, peers) in [("a", &[] as &[&str]), ("b", &["c"]), ("c", &["b"])] {
        nodes.shares_its_zone_with(node, peers)?;
    }
    nodes.is_encrypted("a0", "b0")?;
    cluster.place(mesh.lab.node("b"), "z1")?;
    nodes.shares_its_zone_with("a", &["b"])?;
    none_was_lost_or_stalled(pulses)
}

#[test]
fn without_the_wish_zones_mean_nothing() -> Result<()> {
    let nodes = in_zones("zonesall", "all")?;
    nodes.mesh.all_healthy()?;
    let capture = nodes.capture()?;

    nodes.mesh.all_flows_work("a0", "b0")?;

    nothing_leaked(capture)?;
    nodes.shares_its_zone_with("a", &[])
}
