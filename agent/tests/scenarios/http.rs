//! Metrics and probes, asked over HTTP from the node itself, against what `shroud status` and the machine say.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use shroud_apiserver::{Options, Verb};
use shroud_lab::cluster::Cluster;
use shroud_lab::http::{self, Answer, PORT};
use shroud_lab::{Agent, AgentOptions, Node, Status, Topology, stopped};

use crate::mesh::{Mesh, SHROUD};

/// How long until a probe tells of a change.
const NOTICED: Duration = Duration::from_secs(20);

fn metrics(node: &Node) -> Result<BTreeMap<String, f64>> {
    let Answer { code, body } = http::get(&node.host.netns, "/metrics")?;
    ensure!(code == 200 && body.ends_with("# EOF\n"), "{code}: {body}");
    http::samples(&body)
}

/// Waits until `/readyz` of a node answers so, with that line.
fn readyz(mesh: &Mesh, node: &str, code: u16, line: &str) -> Result<Answer> {
    let netns = &mesh.lab.node(node).host.netns;
    mesh.lab
        .eventually(&format!("{node}'s /readyz says {line}"), NOTICED * 2, || {
            let answer = http::get(netns, "/readyz").map_err(|error| format!("{error:#}"))?;
            if answer.code == code && answer.body.lines().any(|said| said.starts_with(line)) {
                Ok(answer)
            } else {
                Err(format!("{answer:?}"))
            }
        })
}

fn livez(mesh: &Mesh, node: &str) -> Result<u16> {
    Ok(http::get(&mesh.lab.node(node).host.netns, "/livez")?.code)
}

#[test]
fn metrics_agree_with_status_and_gate() -> Result<()> {
    let begun = SystemTime::now();
    let mesh = Mesh::healthy("metrics", 2)?;
    mesh.all_flows_work("a0", "b0")?;
    let counted = |answer: &serde_json::Value, row: [&str; 5]| -> f64 {
        let counters = answer["counters"].as_array().into_iter().flatten();
        let is_it = |counter: &&serde_json::Value| {
            ["node", "direction", "family", "verdict", "reason"].map(|label| counter[label].as_str()) == row.map(Some)
        };
        counters
            .filter(is_it)
            .filter_map(|counter| counter["packets"].as_f64())
            .sum()
    };

    for (node, peer) in [("a", "b"), ("b", "a")] {
        let agent = mesh.agent(node);
        // Status tells of a handshake at once, the sums only with the next look.
        mesh.lab
            .eventually("the handshake is counted", Duration::from_secs(10), || {
                let seen = metrics(mesh.lab.node(node)).map_err(|error| format!("{error:#}"))?;
                match seen.get("shroud_convergence_seconds_count{step=\"handshake\"}") {
                    Some(count) if *count > 0.0 => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            })?;
        let (before, gate_before) = (agent.status()?, mesh.json(node, &["gate"])?);
        let seen = metrics(mesh.lab.node(node))?;
        let (after, gate_after) = (agent.status()?, mesh.json(node, &["gate"])?);
        let value = |series: &str| seen.get(series).copied().unwrap_or(f64::NAN);
        let between = |what: &str, low: f64, high: f64| {
            let found = value(what);
            ensure!(
                (low..=high).contains(&found),
                "{node}: {what} is {found}, not {low} to {high}"
            );
            Ok(())
        };

        let bytes = |status: &Status| (status.peers[0].rx_bytes as f64, status.peers[0].tx_bytes as f64);
        let ((rx_before, tx_before), (rx_after, tx_after)) = (bytes(&before), bytes(&after));
        ensure!(rx_before > 100_000.0, "the flows are missing: {rx_before} bytes");
        between(
            &format!("shroud_peer_receive_bytes_total{{peer=\"{peer}\"}}"),
            rx_before,
            rx_after,
        )?;
        between(
            &format!("shroud_peer_transmit_bytes_total{{peer=\"{peer}\"}}"),
            tx_before,
            tx_after,
        )?;
        for family in ["ipv4", "ipv6"] {
            let row = [peer, "egress", family, "encrypt", "encrypted"];
            let (low, high) = (counted(&gate_before, row), counted(&gate_after, row));
            ensure!(low > 0.0, "the gate counted no {family}: {gate_before:#}");
            let labels = "direction=\"egress\",family=\"FAMILY\",verdict=\"encrypt\",reason=\"encrypted\"";
            let labels = labels.replace("FAMILY", family);
            between(
                &format!("shroud_gate_packets_total{{peer=\"{peer}\",{labels}}}"),
                low,
                high,
            )?;
        }

        let since_1970 = |at: SystemTime| {
            at.duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs_f64()
        };
        let handshake = format!("shroud_peer_last_handshake_timestamp_seconds{{peer=\"{peer}\"}}");
        between(&handshake, since_1970(begun), since_1970(SystemTime::now()))?;
        between("shroud_key_age_seconds", 0.0, begun.elapsed()?.as_secs_f64())?;
        for (series, expected) in [
            ("shroud_healthy", 1.0),
            ("shroud_peers{state=\"well\"}", 1.0),
            ("shroud_gate_attached{device=\"eth0\"}", 1.0),
            ("shroud_gate_plaintext_bytes_total", 0.0),
            ("shroud_convergence_seconds_count{step=\"configured\"}", 1.0),
            ("shroud_convergence_seconds_count{step=\"handshake\"}", 1.0),
            ("shroud_reconcile_failures_total{driver=\"routing\"}", 0.0),
        ] {
            between(series, expected, expected)?;
        }
        between("shroud_convergence_seconds_sum{step=\"configured\"}", 0.001, 10.0)?;
        between("shroud_convergence_seconds_sum{step=\"handshake\"}", 0.0, 30.0)?;
        between("shroud_reconcile_changes_total{driver=\"routing\"}", 2.0, 100.0)?;
        between("shroud_directory_lists_total", 1.0, 100.0)?;
        let passes = (before.pass.number as f64, after.pass.number as f64);
        between("shroud_reconcile_duration_seconds_count", passes.0, passes.1)?;
        let live = format!(
            "shroud_directory_state{{source=\"file {}\",state=\"live\"}}",
            mesh.lab.directory().display()
        );
        between(&live, 1.0, 1.0)?;
        let version = after.raw["version"].as_u64();
        ensure!(version == Some(2), "the status is of another version: {version:?}");
        between(
            concat!("shroud_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"),
            1.0,
            1.0,
        )?;
    }

    // Each is an eye on the other: what b received by then, a had sent.
    let received = metrics(mesh.lab.node("b"))?["shroud_peer_receive_bytes_total{peer=\"a\"}"];
    let sent = metrics(mesh.lab.node("a"))?["shroud_peer_transmit_bytes_total{peer=\"b\"}"];
    ensure!(
        0.0 < received && received <= sent,
        "b received {received}, a sent {sent}"
    );
    Ok(())
}

#[test]
fn the_series_of_a_peer_go_when_it_goes() -> Result<()> {
    let mut mesh = Mesh::healthy("series", 3)?;
    mesh.all_flows_work("a0", "c0")?;
    let a = mesh.lab.node("a").clone();
    let of_c = |seen: &BTreeMap<String, f64>| seen.keys().filter(|series| series.contains("peer=\"c\"")).count();
    let before = metrics(&a)?;

    mesh.agent_mut("c").terminate(Duration::from_secs(5))?;
    std::fs::remove_file(mesh.lab.directory().join("c.json"))?;
    let after = mesh.lab.eventually("c's series are gone", NOTICED, || {
        let seen = metrics(&a).map_err(|error| format!("{error:#}"))?;
        if of_c(&seen) == 0 {
            Ok(seen)
        } else {
            Err(format!("{seen:#?}"))
        }
    })?;

    ensure!(of_c(&before) >= 6, "c had no series: {before:#?}");
    let total = "shroud_gate_plaintext_bytes_total";
    ensure!(after[total] >= before[total], "{total} fell");
    for (series, value) in before.iter().filter(|(series, _)| series.contains("_total{peer=\"b\"")) {
        ensure!(after.get(series) >= Some(value), "{series} fell or went");
    }
    ensure!(
        !after
            .keys()
            .any(|series| series.contains("peer=\"\"") && !before.contains_key(series)),
        "what was counted under c is nobody's now: {after:#?}"
    );
    Ok(())
}

#[test]
fn a_node_without_a_directory_lives_and_is_not_ready() -> Result<()> {
    let lab = Topology::new("nodir").nodes(2).pods(1).build()?;
    std::fs::remove_dir(lab.directory())?;
    let agents = Agent::start_all(&lab, &AgentOptions::new(SHROUD))?;
    let mesh = Mesh { agents, lab };
    let directory = mesh.lab.directory();

    let answer = readyz(&mesh, "a", 503, "[-]directory: no complete list yet from file ")?;
    let alive = livez(&mesh, "a")?;
    let seen = metrics(mesh.lab.node("a"))?;
    std::fs::create_dir(&directory)?;
    readyz(&mesh, "a", 200, "[+]directory: complete, live from file ")?;
    let again = metrics(mesh.lab.node("a"))?;

    ensure!(answer.body.ends_with("not ready\n"), "{}", answer.body);
    ensure!(alive == 200, "/livez says {alive}");
    let state = |state: &str| {
        format!(
            "shroud_directory_state{{source=\"file {}\",state=\"{state}\"}}",
            directory.display()
        )
    };
    ensure!(
        seen[&state("waiting")] == 1.0 && seen[&state("live")] == 0.0,
        "{seen:#?}"
    );
    ensure!(
        again[&state("waiting")] == 0.0 && again[&state("live")] == 1.0,
        "{again:#?}"
    );
    ensure!(seen["shroud_problems{check=\"directory-waiting\"}"] == 1.0, "{seen:#?}");
    ensure!(
        seen["shroud_directory_errors_total{kind=\"folder\"}"] == 1.0,
        "{seen:#?}"
    );
    ensure!(seen["shroud_healthy"] == 0.0, "{seen:#?}");
    Ok(())
}

#[test]
fn without_api_server_a_node_lives_and_stays_ready() -> Result<()> {
    let lab = Topology::new("httpk8s").nodes(2).pods(1).build()?;
    let cluster = Cluster::start(&lab, Options::default())?;
    let agents = lab
        .nodes
        .iter()
        .map(|node| Agent::start(node, &cluster.agent(node, &AgentOptions::new(SHROUD))))
        .collect::<Result<_>>()?;
    let mut mesh = Mesh { agents, lab };
    mesh.all_healthy()?;
    let source = format!("kubernetes {}", cluster.kubeconfig(mesh.lab.node("a")).display());
    let state = |state: &str| format!("shroud_directory_state{{source=\"{source}\",state=\"{state}\"}}");
    let well = metrics(mesh.lab.node("a"))?;
    let (of_a, of_b) = (&well, metrics(mesh.lab.node("b"))?);
    let lists = of_a["shroud_directory_lists_total"] + of_b["shroud_directory_lists_total"];
    let asked = cluster.server.count(Verb::List, "nodes");

    cluster.server.refuse()?;
    cluster.server.cut_connections();
    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").restart()?;
    readyz(&mesh, "a", 200, "[+]directory: complete, cached from kubernetes ")?;
    let alive = livez(&mesh, "a")?;
    let unreachable = "shroud_directory_errors_total{kind=\"unreachable\"}";
    let dark = mesh.lab.eventually("a counts what it cannot reach", NOTICED, || {
        let seen = metrics(mesh.lab.node("a")).map_err(|error| format!("{error:#}"))?;
        let told = seen.contains_key(unreachable) && seen.contains_key("shroud_problems{check=\"directory-silent\"}");
        if told { Ok(seen) } else { Err(format!("{seen:#?}")) }
    })?;

    ensure!(
        well[&state("live")] == 1.0 && well[&state("cached")] == 0.0,
        "{well:#?}"
    );
    ensure!(well["shroud_directory_watches_total"] >= 1.0, "{well:#?}");
    ensure!(
        lists == asked as f64,
        "{lists} lists are counted, {asked} were asked for"
    );
    ensure!(alive == 200, "/livez says {alive}");
    ensure!(
        dark[&state("live")] == 0.0 && dark[&state("cached")] == 1.0,
        "{dark:#?}"
    );
    Ok(())
}

#[test]
fn a_peer_that_does_not_answer_is_waited_for_and_then_reported() -> Result<()> {
    let mut mesh = Mesh::healthy("await", 2)?;
    let config = shroud_lab::agent::config_file(mesh.lab.node("a")).display().to_string();
    let met = readyz(&mesh, "a", 200, "[+]peers: 1 of 1 are well")?;
    mesh.lab.node("b").host.netns.ip("link set eth0 down")?;
    mesh.agent_mut("a").kill()?;
    // A device that has never met b.
    let cleaned = mesh
        .lab
        .node("a")
        .host
        .netns
        .exec(SHROUD, &["cleanup", "--config", &config])?;
    ensure!(cleaned.status.success(), "{cleaned:?}");

    mesh.agent_mut("a").restart()?;
    let begun = Instant::now();
    readyz(&mesh, "a", 503, "[-]peers: waiting for the first handshake with b")?;
    let reported = readyz(&mesh, "a", 200, "[+]peers: 0 of 1 are well; reported in status: b")?;

    ensure!(met.body.ends_with("\nready\n"), "{}", met.body);
    ensure!(
        begun.elapsed() > Duration::from_secs(15),
        "only {:?} were waited",
        begun.elapsed()
    );
    ensure!(reported.body.ends_with("\nready\n"), "{}", reported.body);
    let status = mesh.agent("a").status()?;
    ensure!(status.says("peer-no-handshake").is_some(), "{:#}", status.raw);
    Ok(())
}

#[test]
fn every_uplink_needs_a_gate_before_the_node_is_ready() -> Result<()> {
    let mut mesh = Mesh::healthy("uplinks", 2)?;
    let node = mesh.lab.node("a").clone();
    let file = shroud_lab::agent::config_file(&node);
    let config = std::fs::read_to_string(&file)?;
    std::fs::write(&file, config.replace("uplinks: [eth0]", "uplinks: [eth0, eth9]"))?;

    mesh.agent_mut("a").restart()?;
    readyz(&mesh, "a", 503, "[-]gate: none on eth9")?;
    let without = metrics(&node)?;
    node.host
        .netns
        .batch("link add eth9 type veth peer name other9\nlink set eth9 up\n")?;
    readyz(&mesh, "a", 200, "[+]gate: enforces on eth0, eth9")?;
    let with = metrics(&node)?;

    let attached = |seen: &BTreeMap<String, f64>| {
        ["eth0", "eth9"].map(|device| {
            seen.get(&format!("shroud_gate_attached{{device=\"{device}\"}}"))
                .copied()
        })
    };
    ensure!(attached(&without) == [Some(1.0), Some(0.0)], "{without:#?}");
    ensure!(attached(&with) == [Some(1.0), Some(1.0)], "{with:#?}");
    Ok(())
}

#[test]
fn a_gate_that_only_counts_is_ready_and_says_so() -> Result<()> {
    let mesh = Mesh::started("auditready", 2, &AgentOptions::new(SHROUD).gate("audit"))?;

    let answer = readyz(&mesh, "a", 200, "[+]gate: only counts, by configuration, on eth0")?;
    let seen = metrics(mesh.lab.node("a"))?;

    ensure!(answer.body.ends_with("\nready\n"), "{}", answer.body);
    ensure!(seen["shroud_healthy"] == 0.0, "{seen:#?}");
    ensure!(seen["shroud_problems{check=\"gate-audits\"}"] == 1.0, "{seen:#?}");
    Ok(())
}

#[test]
fn a_stuck_thread_ends_liveness_and_readiness_and_recovers() -> Result<()> {
    let mesh = Mesh::healthy("stuck", 2)?;
    let pid = mesh.agent("a").pid();
    let netns = &mesh.lab.node("a").host.netns;
    let before = livez(&mesh, "a")?;

    let thread = stopped::stop(pid, "reconcile")?;
    let unready = http::get(netns, "/readyz")?;
    let begun = Instant::now();
    // It may be busy for a minute on top of three passes of 3 s.
    let dead = shroud_lab::eventually("/livez notices", Duration::from_secs(90), || match livez(&mesh, "a") {
        Ok(200) => Err("it still says 200".to_owned()),
        Ok(code) => Ok(code),
        Err(error) => Err(format!("{error:#}")),
    })?;
    let noticed = begun.elapsed();
    drop(thread);
    let alive = mesh
        .lab
        .eventually("/livez recovers", NOTICED, || match livez(&mesh, "a") {
            Ok(200) => Ok(200),
            other => Err(format!("{other:?}")),
        })?;
    readyz(&mesh, "a", 200, "[+]peers: 1 of 1 are well")?;

    ensure!((before, dead, alive) == (200, 503, 200), "{before}, {dead}, {alive}");
    ensure!(noticed > Duration::from_secs(30), "it is impatient: {noticed:?}");
    ensure!(
        unready.code == 503
            && unready
                .body
                .starts_with("[-]agent: the reconcile thread did not answer"),
        "{unready:?}"
    );
    Ok(())
}

#[test]
fn a_directory_that_hangs_the_main_thread_does_not_keep_probes_from_answering() -> Result<()> {
    let mesh = Mesh::healthy("hung", 2)?;
    let pid = mesh.agent("a").pid();

    let thread = stopped::stop(pid, "shroud")?;
    let answers = (livez(&mesh, "a")?, metrics(mesh.lab.node("a"))?);
    drop(thread);

    ensure!(answers.0 == 200, "/livez says {}", answers.0);
    ensure!(answers.1["shroud_healthy"] == 1.0, "{:#?}", answers.1);
    mesh.all_healthy()
}

#[test]
fn a_taken_port_is_reported_until_it_is_free_and_ends_nothing() -> Result<()> {
    let lab = Topology::new("httpport").nodes(2).pods(1).build()?;
    let netns = lab.node("a").host.netns.clone();
    let other = netns.run(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, PORT))?))?;
    let agents = Agent::start_all(&lab, &AgentOptions::new(SHROUD))?;
    let mesh = Mesh { agents, lab };

    let taken = mesh.eventually(
        "a has met b and says what is wrong",
        NOTICED,
        mesh.agent("a"),
        |status| status.met_all(2).is_ok() && status.says("http-port-taken").is_some() && status.problems.len() == 1,
    )?;
    drop(other);
    mesh.all_healthy()?;

    ensure!(taken.verdict == "degraded", "{}", taken.summary);
    let says = taken.says("http-port-taken").unwrap_or_default();
    ensure!(
        says.contains("TCP port 21320") && says.contains("http.listen"),
        "{says}"
    );
    ensure!(livez(&mesh, "a")? == 200, "/livez does not answer");
    Ok(())
}

#[test]
fn an_agent_that_should_not_listen_does_not() -> Result<()> {
    let options = AgentOptions {
        extra: "http: { listen: null }\n".to_owned(),
        ..AgentOptions::new(SHROUD)
    };
    let mesh = Mesh::started("nohttp", 2, &options)?;
    mesh.all_healthy()?;
    let netns = &mesh.lab.node("a").host.netns;

    let refused = http::get(netns, "/livez");

    ensure!(refused.is_err(), "{refused:?}");
    let listening = netns.check("ss", &["-Hltn"])?;
    ensure!(listening.is_empty(), "something listens: {listening}");
    Ok(())
}
