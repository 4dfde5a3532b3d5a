//! Agents whose directory is a cluster: they meet through Node objects, and an API server that goes wrong costs them nothing.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shroud_apiserver::{Answer, Effect, Fault, Identity, Options, Requests, Verb, WatchEffect};
use shroud_lab::cluster::Cluster;
use shroud_lab::traffic::pulse::Pulse;
use shroud_lab::{Agent, AgentOptions, Capture, Family, Protocol, Status, Topology};

use crate::mesh::{Mesh, SHROUD, none_was_lost, nothing_leaked};

/// How long a connection may say nothing: the agents have nothing to do with it, but the machine is busy with all of them.
const STALL: Duration = Duration::from_secs(4);

/// Nodes in a cluster.
pub(crate) struct Nodes {
    pub(crate) mesh: Mesh,
    pub(crate) cluster: Cluster,
}

impl Nodes {
    /// Nodes whose agents were just started.
    pub(crate) fn started(name: &str, nodes: u8, server: Options, options: &AgentOptions) -> Result<Self> {
        let lab = Topology::new(name).nodes(nodes).pods(2).build()?;
        let cluster = Cluster::start(&lab, server)?;
        let agents = lab
            .nodes
            .iter()
            .map(|node| Agent::start(node, &cluster.agent(node, options)))
            .collect::<Result<_>>()?;
        Ok(Self {
            mesh: Mesh { agents, lab },
            cluster,
        })
    }

    fn healthy(name: &str, nodes: u8) -> Result<Self> {
        let nodes = Self::started(name, nodes, Options::default(), &AgentOptions::new(SHROUD))?;
        nodes.mesh.all_healthy()?;
        Ok(nodes)
    }

    /// Makes a Node object that announces nothing, and waits until every agent knows it, so that a change gets through.
    fn all_see_a_new_node(&self, name: &str, within: Duration) -> Result<()> {
        self.cluster
            .server
            .put(json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } }))?;
        for agent in &self.mesh.agents {
            let what = format!("{} sees {name}", agent.node().host.name);
            self.mesh
                .eventually(&what, within, agent, |status| is_refused(status, name))?;
        }
        Ok(())
    }

    /// Captures every underlay port from now on.
    pub(crate) fn capture(&self) -> Result<Capture> {
        Capture::start(&self.mesh.lab, self.cluster.allowed(&self.mesh.lab))
    }
}

fn is_refused(status: &Status, node: &str) -> bool {
    status.refused.iter().any(|refused| refused.node == node)
}

pub(crate) fn has_problem(status: &Status, check: &str) -> bool {
    status.directory_says(check) || status.problems.iter().any(|problem| problem.check == check)
}

/// Long-lived TCP connections in both families between three nodes.
fn pulses(mesh: &Mesh) -> Result<Vec<Pulse>> {
    mesh.pulses(&[("a0", "b0"), ("b1", "c1"), ("c0", "a1")], 2)
}

/// Insists that no connection was lost, and that none was silent for long.
pub(crate) fn none_was_lost_or_stalled(pulses: Vec<Pulse>) -> Result<()> {
    let longest = none_was_lost(pulses)?;
    ensure!(longest < STALL, "a connection stalled {longest:?}");
    Ok(())
}

#[test]
fn three_agents_meet_through_the_api_server() -> Result<()> {
    let nodes = Nodes::healthy("k8s", 3)?;
    let Nodes { mesh, cluster } = &nodes;
    let capture = nodes.capture()?;

    mesh.all_flows_work("a0", "b0")?;
    mesh.all_flows_work("b0", "c0")?;
    mesh.all_flows_work("c0", "a0")?;

    nothing_leaked(capture)?;
    for agent in &mesh.agents {
        let (name, status) = (&agent.node().host.name, agent.status()?);
        let announced = cluster
            .announcement(name)?
            .with_context(|| format!("{name} announced nothing"))?;
        let announced: Value = serde_json::from_str(&announced)?;
        ensure!(
            announced["publicKey"] == status.raw["publicKey"],
            "{name} announced {announced}"
        );
        ensure!(
            status.raw["directory"]["state"] == "live",
            "{name}: {}",
            status.raw["directory"]
        );
    }
    // Joining costs an agent one list and one write; and what was written stays as it is.
    let server = &cluster.server;
    ensure!(server.count(Verb::List, "nodes") == 3, "lists: {:?}", server.requests());
    let written = server
        .requests()
        .into_iter()
        .filter(|request| request.verb == Verb::Patch && !request.query.contains("dryRun"));
    let written: Vec<String> = written.map(|request| request.path).collect();
    ensure!(written.len() == 3, "written: {written:?}");
    Ok(())
}

/// With the gate off, the same oracle sees what it must not see otherwise.
#[test]
fn with_the_gate_off_the_pods_of_a_cluster_are_seen_in_the_clear() -> Result<()> {
    let options = AgentOptions::new(SHROUD).gate("off");
    let Nodes {
        mesh,
        cluster: _cluster,
    } = Nodes::started("k8stwin", 2, Options::default(), &options)?;
    mesh.all_have_routes()?;
    mesh.is_seen_in_the_clear()
}

#[test]
fn whatever_the_api_server_answers_no_connection_is_lost_and_no_peer_removed() -> Result<()> {
    let nodes = Nodes::healthy("k8swrong", 3)?;
    let Nodes { mesh, cluster } = &nodes;
    let server = &cluster.server;
    let capture = nodes.capture()?;
    let pulses = pulses(mesh)?;
    // A watch that is silent is opened anew after 5 s, and may meet the fault once more.
    let soon = Duration::from_secs(25);

    // Inside watches that are open. What was missed meanwhile is seen afterwards, without another list.
    let in_watches = [
        ("end", WatchEffect::End),
        ("cut", WatchEffect::Cut),
        ("reset", WatchEffect::Reset),
        ("garbage", WatchEffect::Line(b"\x00\xff{\"type\":".to_vec())),
        (
            "no-event",
            WatchEffect::Line(b"{\"kind\":\"Status\",\"code\":200}".to_vec()),
        ),
        ("error500", WatchEffect::error(500, "InternalError", "no")),
        (
            "error504",
            WatchEffect::error(504, "Timeout", "Too large resource version"),
        ),
    ];
    for (what, effect) in in_watches {
        server.fault(Fault::watch(effect).on(Requests::watches("nodes")).times(3));
        nodes.all_see_a_new_node(&format!("x-{what}"), soon).context(what)?;
        server.clear_faults();
    }

    // Watches that are not to be had for a while.
    let answers = [
        ("busy", Answer::too_many_requests(1)),
        ("initializing", Answer::initializing()),
        ("stopping", Answer::shutting_down()),
        ("unauthorized", Answer::unauthorized()),
        (
            "forbidden",
            Answer::forbidden("system:serviceaccount:shroud-system:shroud", Verb::Watch, "nodes"),
        ),
        ("internal", Answer::internal_error()),
        ("unavailable", Answer::unavailable()),
        ("etcd", Answer::etcd_timeout()),
    ];
    for (what, answer) in answers {
        server.fault(Fault::answer(answer).on(Requests::watches("nodes")).times(6));
        server.fault(Fault::watch(WatchEffect::End).on(Requests::watches("nodes")).times(3));
        nodes
            .all_see_a_new_node(&format!("x-{what}"), Duration::from_secs(25))
            .context(what)?;
        server.clear_faults();
    }
    for (what, effect) in [
        ("hang", Effect::Delay(Duration::from_secs(2))),
        ("no-answer", Effect::Reset),
        ("cut-body", Effect::CutBody),
        ("truncated", Effect::TruncateBody),
    ] {
        server.fault(Fault::new(effect).on(Requests::watches("nodes")).times(3));
        server.fault(Fault::watch(WatchEffect::End).on(Requests::watches("nodes")).times(3));
        nodes
            .all_see_a_new_node(&format!("x-{what}"), Duration::from_secs(25))
            .context(what)?;
        server.clear_faults();
    }

    // A server that is gone, and one that is only silent.
    server.refuse()?;
    server.cut_connections();
    std::thread::sleep(Duration::from_secs(4));
    for agent in &mesh.agents {
        mesh.eventually("the silence is told", Duration::from_secs(15), agent, |status| {
            status.peers.len() == 2 && has_problem(status, "directory-silent")
        })?;
    }
    server.accept()?;
    nodes.all_see_a_new_node("x-gone", Duration::from_secs(45))?;
    server.silence();
    std::thread::sleep(Duration::from_secs(8));
    server.clear_faults();
    nodes.all_see_a_new_node("x-silent", Duration::from_secs(45))?;

    // New tokens, and a new authority.
    for node in &mesh.lab.nodes {
        server.revoke_tokens(&Identity::agent(&node.host.name));
        cluster.renew_credentials(node)?;
    }
    server.cut_connections();
    nodes.all_see_a_new_node("x-token", Duration::from_secs(30))?;
    server.rotate_authority()?;
    for node in &mesh.lab.nodes {
        cluster.renew_credentials(node)?;
    }
    server.cut_connections();
    nodes.all_see_a_new_node("x-authority", Duration::from_secs(30))?;

    ensure!(
        server.count(Verb::List, "nodes") == 3,
        "something made an agent list anew"
    );
    for agent in &mesh.agents {
        let status = agent.status()?;
        ensure!(status.peers.len() == 2, "{}: {:#}", agent.node().host.name, status.raw);
    }
    mesh.all_flows_work("a0", "b0")?;
    none_was_lost_or_stalled(pulses)?;
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn an_expired_watch_lists_anew_and_at_most_every_30_s() -> Result<()> {
    let nodes = Nodes::healthy("k8sgone", 3)?;
    let Nodes { mesh, cluster } = &nodes;
    let server = &cluster.server;
    let capture = nodes.capture()?;
    let pulses = pulses(mesh)?;

    // Thrice in a row each watch is told that its version is gone.
    for _ in 0..3 {
        server.fault(
            Fault::watch(WatchEffect::expired(460, 471))
                .on(Requests::watches("nodes"))
                .times(3),
        );
        std::thread::sleep(Duration::from_secs(3));
    }
    server.clear_faults();
    nodes.all_see_a_new_node("x-expired", Duration::from_secs(70))?;

    let lists: Vec<Instant> = server
        .requests()
        .into_iter()
        .filter(|request| request.verb == Verb::List && request.resource == "nodes")
        .map(|request| request.start)
        .collect();
    // On a slow machine the first list is so long ago that two more are due.
    ensure!(
        (6..=9).contains(&lists.len()),
        "each of three agents lists two or three times, not {} times in all",
        lists.len()
    );
    for four in lists.windows(4) {
        let between = four[3].duration_since(four[0]);
        ensure!(
            between > Duration::from_secs(25),
            "three agents listed four times within {between:?}"
        );
    }
    for agent in &mesh.agents {
        mesh.eventually("nobody was removed", Duration::from_secs(5), agent, |status| {
            status.peers.len() == 2
        })?;
    }
    none_was_lost_or_stalled(pulses)?;
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn a_mass_deletion_nobody_saw_needs_a_second_list() -> Result<()> {
    let Nodes { mesh, cluster } = Nodes::healthy("k8smass", 4)?;
    let server = &cluster.server;
    let pulses = pulses(&mesh)?;

    // As after a restore of an old backup: most Nodes are gone, and no watch tells of it.
    server.refuse()?;
    server.cut_connections();
    mesh.lab.eventually("nobody watches", Duration::from_secs(5), || {
        match server.connections() {
            0 => Ok(()),
            open => Err(format!("{open} connections")),
        }
    })?;
    let objects = server.list("nodes")?;
    for name in ["b", "c", "d"] {
        server.delete("nodes", "", name)?;
    }
    server.compact();
    server.accept()?;
    for agent in &mesh.agents {
        let status = mesh.eventually("the brake is told", Duration::from_secs(70), agent, |status| {
            let problems = status.raw["directory"]["problems"].to_string();
            problems.contains("they stay until a second list agrees")
        })?;
        ensure!(
            status.peers.len() == 3,
            "peers went on one list: {:#}",
            status.raw["peers"]
        );
    }

    for object in objects {
        let metadata = json!({ "name": object["metadata"]["name"], "annotations": object["metadata"]["annotations"] });
        let (spec, status) = (&object["spec"], &object["status"]);
        server
            .put(json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec, "status": status }))?;
    }
    mesh.all_healthy()?;
    none_was_lost_or_stalled(pulses)
}

#[test]
fn without_api_server_a_restarted_agent_goes_on_from_memory() -> Result<()> {
    let mut nodes = Nodes::healthy("k8sdark", 3)?;
    let capture = nodes.capture()?;
    let pulses = pulses(&nodes.mesh)?;

    nodes.cluster.server.refuse()?;
    nodes.cluster.server.cut_connections();
    nodes.mesh.agent_mut("a").kill()?;
    nodes.mesh.agent_mut("a").restart()?;
    let Nodes { mesh, cluster } = &nodes;
    let status = mesh.eventually(
        "a lives from memory",
        Duration::from_secs(15),
        mesh.agent("a"),
        |status| {
            status.raw["directory"]["state"] == "cached"
                && status.peers.len() == 2
                && has_problem(status, "directory-silent")
        },
    )?;

    ensure!(
        status.raw["podPrefixes"].as_array().is_some_and(|own| own.len() == 2),
        "a forgot its own prefixes: {:#}",
        status.raw
    );
    mesh.all_flows_work("a0", "b0")?;
    mesh.all_flows_work("c0", "a0")?;
    cluster.server.accept()?;
    mesh.eventually(
        "a is healthy again",
        Duration::from_secs(60),
        mesh.agent("a"),
        |status| mesh.is_healthy(status),
    )?;
    none_was_lost_or_stalled(pulses)?;
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn a_foreign_hand_on_the_annotation_is_undone_within_5_s() -> Result<()> {
    let Nodes { mesh, cluster } = Nodes::healthy("k8sheal", 2)?;
    let good = cluster.announcement("a")?;
    let elsewhere = cluster.announcement("b")?.context("b announced nothing")?;

    for foreign in [Value::Null, json!("nonsense"), json!(elsewhere)] {
        let patch = json!({ "metadata": { "annotations": { "shroud.dev/node": foreign } } });
        cluster.server.patch("nodes", "", "a", &patch)?;
        mesh.lab
            .eventually("a announces itself again", Duration::from_secs(5), || {
                let now = cluster.announcement("a").map_err(|error| error.to_string())?;
                if now == good { Ok(()) } else { Err(format!("{now:?}")) }
            })?;
    }
    mesh.all_healthy()
}

#[test]
fn who_is_on_the_deny_list_is_shut_out_within_5_s() -> Result<()> {
    let nodes = Nodes::healthy("k8sdeny", 3)?;
    let Nodes { mesh, cluster } = &nodes;
    let fingerprint = mesh.agent("c").status()?.raw["fingerprint"]
        .as_str()
        .context("no fingerprint")?
        .to_owned();
    let capture = nodes.capture()?;

    for entry in ["c", &fingerprint] {
        let asked = Instant::now();
        cluster.deny(&format!("{entry} # stolen"))?;
        for name in ["a", "b"] {
            let within = Duration::from_secs(5).saturating_sub(asked.elapsed());
            let status = mesh.eventually("c is refused", within, mesh.agent(name), |status| {
                is_refused(status, "c")
            })?;
            let reasons = &status.refused[0].reasons;
            ensure!(
                reasons[0].contains("deny list") && reasons[0].contains("stolen"),
                "{reasons:?}"
            );
        }
        let outcome = mesh.send_in_vain(Protocol::Udp, Family::V4, mesh.lab.pod("a0"), mesh.lab.pod("c0"));
        ensure!(!outcome.ok(), "a denied node was sent to: {outcome:?}");
        mesh.eventually("c is told", Duration::from_secs(5), mesh.agent("c"), |status| {
            has_problem(status, "directory-doubtful")
        })?;
        mesh.all_flows_work("a0", "b0")?;

        cluster.deny("")?;
        mesh.all_healthy()?;
        mesh.all_flows_work("a0", "c0")?;
    }
    nothing_leaked(capture)?;
    Ok(())
}

#[test]
fn a_deleted_node_goes_and_comes_back_with_a_new_key() -> Result<()> {
    let mut nodes = Nodes::healthy("k8snew", 3)?;
    let before = nodes.mesh.agent("a").status()?;

    nodes.mesh.agent_mut("c").kill()?;
    nodes.cluster.server.delete("nodes", "", "c")?;
    nodes
        .mesh
        .eventually("c is gone", Duration::from_secs(5), nodes.mesh.agent("a"), |status| {
            status.peers.len() == 1
        })?;
    // Set up anew: another key under the same name.
    let state = nodes.mesh.agent("c").node().state();
    std::fs::remove_dir_all(&state)?;
    nodes.cluster.join(nodes.mesh.lab.node("c"))?;
    nodes.mesh.agent_mut("c").restart()?;
    nodes.mesh.all_healthy()?;

    let key = |status: &Status| {
        status
            .peers
            .iter()
            .find(|peer| peer.node == "c")
            .map(|peer| peer.public_key.clone())
    };
    let after = nodes.mesh.agent("a").status()?;
    ensure!(
        key(&after).is_some() && key(&after) != key(&before),
        "c has its old key"
    );
    nodes.mesh.all_flows_work("a0", "c0")
}

#[test]
fn a_node_follows_its_own_pod_cidr() -> Result<()> {
    let Nodes { mesh, cluster } = Nodes::healthy("k8scidr", 2)?;

    // Not before it has one is a node anybody.
    let name = "b";
    let object = cluster.server.get("nodes", "", name)?.context("no Node b")?;
    cluster.server.delete("nodes", "", name)?;
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name },
        "spec": { "podCIDR": "10.244.77.0/24", "podCIDRs": ["10.244.77.0/24"] },
        "status": { "addresses": object["status"]["addresses"] },
    }))?;

    mesh.eventually(
        "b has its new prefix",
        Duration::from_secs(10),
        mesh.agent("b"),
        |status| status.raw["podPrefixes"] == json!(["10.244.77.0/24"]),
    )?;
    mesh.eventually("a sends there", Duration::from_secs(10), mesh.agent("a"), |status| {
        status.raw["peers"][0]["podPrefixes"] == json!(["10.244.77.0/24"])
    })?;
    Ok(())
}

#[test]
fn a_token_that_may_change_other_nodes_is_told() -> Result<()> {
    let without_policy = Options {
        policy: None,
        ..Options::default()
    };
    let Nodes { mesh, cluster } = Nodes::started("k8stoken", 2, without_policy, &AgentOptions::new(SHROUD))?;

    let mighty = |status: &Status| has_problem(status, "token-too-mighty");
    for agent in &mesh.agents {
        mesh.eventually("the token is told", Duration::from_secs(20), agent, mighty)?;
    }

    ensure!(
        cluster.server.count(Verb::Create, "selfsubjectaccessreviews") >= 2,
        "nobody asked"
    );
    Ok(())
}

#[test]
fn a_refused_node_gets_an_event() -> Result<()> {
    let Nodes { mesh, cluster } = Nodes::healthy("k8sevent", 3)?;
    let stolen = cluster.announcement("a")?.context("a announced nothing")?;

    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": "thief", "annotations": { "shroud.dev/node": stolen } },
        "status": { "addresses": [{ "type": "InternalIP", "address": "172.18.0.77" }] },
    }))?;
    let event = mesh.lab.eventually("somebody complains", Duration::from_secs(10), || {
        let events = cluster.server.list("events").map_err(|error| error.to_string())?;
        let about = events.into_iter().find(|event| event["regarding"]["name"] == "thief");
        about.ok_or_else(|| "no Event".to_owned())
    })?;

    ensure!(
        event["type"] == "Warning" && event["reason"] == "ShroudRefused",
        "{event:#}"
    );
    ensure!(
        event["note"].as_str().is_some_and(|note| note.contains("endpoint")),
        "{event:#}"
    );
    std::thread::sleep(Duration::from_secs(2));
    let events = cluster.server.list("events")?;
    ensure!(
        events.len() <= 2,
        "one Event per reason, not one per agent: {events:#?}"
    );
    Ok(())
}

#[test]
fn where_we_attach_the_pods_the_network_becomes_available() -> Result<()> {
    let lab = Topology::new("k8snet").nodes(1).pods(0).build()?;
    let cluster = Cluster::start(&lab, Options::default())?;
    let unavailable = json!({ "status": { "conditions": [{ "type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated" }] } });
    cluster.server.patch("nodes", "", "a", &unavailable)?;
    let folder = lab.folder.join("net.d");
    std::fs::create_dir(&folder)?;
    let options = AgentOptions {
        extra: format!("cni: {{ install: true, confDir: {} }}\n", folder.display()),
        ..AgentOptions::new(SHROUD)
    };

    let node = lab.node("a");
    let _agent = Agent::start(node, &cluster.agent(node, &options))?;

    lab.eventually("the network is available", Duration::from_secs(20), || {
        let node = cluster
            .server
            .get("nodes", "", "a")
            .map_err(|error| error.to_string())?
            .unwrap_or_default();
        let condition = &node["status"]["conditions"][0];
        if condition["status"] == "False" {
            Ok(())
        } else {
            Err(condition.to_string())
        }
    })?;
    ensure!(
        folder.join("10-shroud.conflist").exists(),
        "pods may come before their network"
    );
    Ok(())
}
