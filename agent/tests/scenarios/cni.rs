//! Pods that a container runtime attaches by the configuration list that the agent wrote, with the plugins that distributions ship. The
//! test is the runtime: it runs each plugin of the list in order and hands each the result of the one before (CNI specification 1.0.0,
//! section 3).

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shroud_lab::{Agent, AgentOptions, Family, Host, Netns, Node, Protocol, Topology};

use crate::backend::skipped;
use crate::mesh::{Mesh, SHROUD, nothing_leaked};

/// Where Debian and Ubuntu (containernetworking-plugins) and upstream's archives put the plugins.
const FOLDERS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

fn plugins() -> Option<&'static str> {
    FOLDERS.into_iter().find(|folder| {
        ["ptp", "bridge", "host-local"]
            .iter()
            .all(|plugin| Path::new(folder).join(plugin).is_file())
    })
}

fn conf_dir(node: &Node) -> PathBuf {
    node.folder.join("net.d")
}

fn conflist(node: &Node) -> Result<Value> {
    let path = conf_dir(node).join("10-shroud.conflist");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
}

/// Runs one plugin in the node's namespace, as a runtime does.
fn run(node: &Node, name: &str, command: &str, pod: &str, input: &Value) -> Result<Value> {
    let folder = plugins().context("the CNI plugins")?;
    let mut program = Command::new(Path::new(folder).join(name));
    program
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", pod)
        .env("CNI_NETNS", format!("/run/netns/{pod}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = node.host.netns.spawn(&mut program)?;
    child
        .stdin
        .take()
        .context("the plugin's input")?
        .write_all(input.to_string().as_bytes())?;
    let output = child.wait_with_output().with_context(|| format!("wait for {name}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{name} {command}: {said}{}", String::from_utf8_lossy(&output.stderr));
    }
    if said.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&said).with_context(|| format!("{name} {command} answered {said}"))
}

/// Runs the plugins of a list: for ADD in order, for DEL in the opposite one. `result` is that of the ADD, or null before it.
fn run_list(node: &Node, list: &Value, command: &str, pod: &str, mut result: Value) -> Result<Value> {
    let mut plugins = list["plugins"].as_array().context("plugins")?.clone();
    if command == "DEL" {
        plugins.reverse();
    }
    for mut plugin in plugins {
        plugin["cniVersion"] = list["cniVersion"].clone();
        plugin["name"] = list["name"].clone();
        if !result.is_null() {
            plugin["prevResult"] = result.clone();
        }
        let name = plugin["type"].as_str().context("a plugin's type")?.to_owned();
        let answer = run(node, &name, command, pod, &plugin)?;
        if command == "ADD" {
            result = answer;
        }
    }
    Ok(result)
}

/// The addresses in a result.
fn addresses(result: &Value) -> Result<(Ipv4Addr, Ipv6Addr)> {
    let (mut v4, mut v6) = (None, None);
    for ip in result["ips"].as_array().context("ips")? {
        let text = ip["address"].as_str().context("an address")?;
        match text.split('/').next().unwrap_or_default().parse()? {
            IpAddr::V4(address) => v4 = Some(address),
            IpAddr::V6(address) => v6 = Some(address),
        }
    }
    Ok((v4.context("an IPv4 address")?, v6.context("an IPv6 address")?))
}

/// A pod that was attached by the list.
struct Pod {
    host: Host,
    result: Value,
}

fn attach(node: &Node, list: &Value, number: usize) -> Result<Pod> {
    let netns = Netns::new(&format!("{}-c{number}", node.host.netns.name()))?;
    netns.ip("link set lo up")?;
    let result = run_list(node, list, "ADD", netns.name(), Value::Null)?;
    let (v4, v6) = addresses(&result)?;
    Ok(Pod {
        host: Host {
            name: format!("{}{number}", node.host.name),
            netns,
            v4,
            v6,
        },
        result,
    })
}

/// What a node has of pods: its devices but for those named, and the addresses given away.
fn remains(node: &Node, but: &[&str]) -> Result<BTreeSet<String>> {
    let links = node.host.netns.ip("-brief link show")?;
    let mut remains: BTreeSet<String> = links
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|name| name.split('@').next().unwrap_or(name).to_owned())
        .filter(|name| !but.contains(&name.as_str()))
        .collect();
    let given = node.folder.join("ipam").join("shroud");
    if given.is_dir() {
        for entry in std::fs::read_dir(&given)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.parse::<IpAddr>().is_ok() {
                remains.insert(name);
            }
        }
    }
    Ok(remains)
}

fn started(name: &str, plugin: &str) -> Result<Mesh> {
    let lab = Topology::new(name).nodes(2).pods(0).build()?;
    let mut agents = Vec::new();
    for node in &lab.nodes {
        std::fs::create_dir_all(conf_dir(node))?;
        let extra = format!(
            "cni: {{ install: true, confDir: {}, dataDir: {}, plugin: {plugin} }}\n",
            conf_dir(node).display(),
            node.folder.join("ipam").display()
        );
        let options = AgentOptions {
            extra,
            ..AgentOptions::new(SHROUD)
        };
        agents.push(Agent::start(node, &options)?);
    }
    Ok(Mesh { agents, lab })
}

/// Attaches two pods to each of two nodes, lets them talk, and detaches them.
fn pods_attached_by_the_list_are_encrypted(name: &str, plugin: &str) -> Result<()> {
    if plugins().is_none() {
        return skipped("CNI plugins; install containernetworking-plugins");
    }
    let mesh = started(name, plugin)?;
    mesh.all_healthy()?;
    let before = mesh
        .lab
        .nodes
        .iter()
        .map(|node| remains(node, &[]))
        .collect::<Result<Vec<_>>>()?;

    let mut pods = Vec::new();
    let mut lists = Vec::new();
    for node in &mesh.lab.nodes {
        let status = mesh.agent(&node.host.name).status()?;
        let mtu = status.peers.first().context("a peer")?.mtu;
        let list = mesh
            .lab
            .eventually("the list has the planned MTU", Duration::from_secs(10), || {
                let list = conflist(node).map_err(|error| format!("{error:#}"))?;
                if list["plugins"][0]["mtu"] == json!(mtu) {
                    Ok(list)
                } else {
                    Err(format!("{list:#}, and not {mtu}"))
                }
            })?;
        for number in 0..2 {
            let pod = attach(node, &list, number)?;
            let link = pod.host.netns.ip("link show eth0")?;
            ensure!(link.contains(&format!("mtu {mtu} ")), "not {mtu}: {link}");
            pods.push(pod);
        }
        let devices = remains(node, &[])?;
        mesh.eventually(
            "the gate is on the pods' devices",
            Duration::from_secs(10),
            mesh.agent(&node.host.name),
            |status| {
                let found = status.raw["gate"]["podDevices"].as_array().cloned().unwrap_or_default();
                let expected = if plugin == "bridge" { 1 } else { 2 };
                found.len() == expected
                    && found
                        .iter()
                        .all(|device| devices.contains(device.as_str().unwrap_or_default()))
            },
        )?;
        lists.push(list);
    }
    let [a0, a1, b0, b1] = pods.as_slice() else {
        bail!("{} pods", pods.len());
    };
    let capture = mesh.capture()?;
    for (from, to) in [(a0, b0), (b1, a1), (a0, a1)] {
        for protocol in Protocol::ALL {
            for family in Family::BOTH {
                let outcome = mesh.send(protocol, family, &from.host, &to.host);
                mesh.arrived(&outcome)?;
            }
        }
    }
    nothing_leaked(capture)?;

    for (index, node) in mesh.lab.nodes.iter().enumerate() {
        for pod in &pods[2 * index..2 * index + 2] {
            run_list(node, &lists[index], "DEL", pod.host.netns.name(), pod.result.clone())?;
        }
        // The bridge stays for the next pod; that is the plugin's way.
        let after = remains(node, &["cni-shroud"])?;
        ensure!(
            after == before[index],
            "left behind: {after:?}, before: {:?}",
            before[index]
        );
    }
    Ok(())
}

#[test]
fn pods_attached_by_ptp_are_encrypted_and_leave_nothing() -> Result<()> {
    pods_attached_by_the_list_are_encrypted("cniptp", "ptp")
}

#[test]
fn pods_attached_by_bridge_are_encrypted_and_leave_nothing() -> Result<()> {
    pods_attached_by_the_list_are_encrypted("cnibridge", "bridge")
}

#[test]
fn no_pod_gets_the_nodes_own_address_in_the_mesh() -> Result<()> {
    if plugins().is_none() {
        return skipped("CNI plugins; install containernetworking-plugins");
    }
    let mesh = started("cniipam", "ptp")?;
    mesh.all_healthy()?;
    let node = mesh.lab.node("a");
    let list = conflist(node)?;
    let input = json!({
        "cniVersion": list["cniVersion"], "name": list["name"], "type": "ptp", "ipam": list["plugins"][0]["ipam"],
    });

    let mut given = BTreeSet::new();
    let end = loop {
        match run(node, "host-local", "ADD", &format!("pod{}", given.len()), &input) {
            Ok(result) => given.insert(addresses(&result)?),
            Err(error) => break format!("{error:#}"),
        };
        ensure!(given.len() < 256, "more addresses than the prefix has");
    };

    ensure!(end.contains("no IP addresses available"), "{end}");
    ensure!(given.len() == 253, "{} addresses of a /24", given.len());
    let own: (Ipv4Addr, Ipv6Addr) = (node.prefix4.addr(), node.prefix6.addr());
    let clash = given.iter().find(|(v4, v6)| *v4 == own.0 || *v6 == own.1);
    ensure!(clash.is_none(), "a pod got the node's own address: {clash:?}");
    Ok(())
}

#[test]
fn the_list_follows_the_mtu_and_goes_with_a_cleanup() -> Result<()> {
    let mut mesh = started("cnifile", "ptp")?;
    mesh.all_healthy()?;
    let node = mesh.lab.node("a").clone();
    let foreign = conf_dir(&node).join("20-other.conflist");
    std::fs::write(&foreign, r#"{ "name": "other" }"#)?;

    node.host.netns.ip("link set eth0 mtu 1400")?;

    mesh.lab
        .eventually("the list follows the MTU", Duration::from_secs(10), || {
            let list = conflist(&node).map_err(|error| format!("{error:#}"))?;
            match list["plugins"][0]["mtu"].as_u64() {
                Some(1340) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })?;
    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    ensure!(conflist(&node).is_ok(), "the list went with the agent");
    let config = shroud_lab::agent::config_file(&node);
    let config = config.to_str().context("a path in UTF-8")?;
    let said = node.host.netns.check(SHROUD, &["cleanup", "--config", config])?;

    ensure!(said.contains("10-shroud.conflist"), "cleanup said: {said}");
    let left: Vec<_> = std::fs::read_dir(conf_dir(&node))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    ensure!(left == [foreign], "{left:?}");
    Ok(())
}
