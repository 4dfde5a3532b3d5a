//! Invariants I3 and I4: a second pass changes nothing, drift is repaired, and what is not ours is not touched.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shroud_lab::{AgentOptions, Family, Netns, Protocol};

use crate::mesh::{Mesh, SHROUD};

/// How long drift may live.
const REPAIR: Duration = Duration::from_secs(5);

#[test]
fn a_second_pass_changes_nothing() -> Result<()> {
    let mesh = Mesh::healthy("second", 2)?;
    let first = mesh.agent("a").status()?.pass.number;

    let settled = mesh.eventually(
        "some passes later",
        Duration::from_secs(20),
        mesh.agent("a"),
        |status| status.pass.number >= first + 3,
    )?;

    ensure!(
        settled.pass.changes == 0,
        "a pass changed something: {:#}",
        settled.raw["pass"]
    );
    Ok(())
}

#[test]
fn drift_is_repaired_within_5_s() -> Result<()> {
    let mesh = Mesh::healthy("drift", 2)?;
    let node = mesh.lab.node("a");
    let netns = &node.host.netns;
    let device = &node.device;
    let key_of_b = mesh
        .agent("a")
        .status()?
        .peers
        .first()
        .context("a peer")?
        .public_key
        .clone();

    type Look<'a> = Box<dyn Fn() -> Result<String> + 'a>;
    let routes =
        |family: &'static str| -> Look<'_> { Box::new(move || netns.ip(&format!("{family} route show proto 83"))) };
    let address = || -> Look<'_> { Box::new(|| netns.ip(&format!("-brief address show {device}"))) };
    let peers = || -> Look<'_> { Box::new(|| netns.check("wg", &["show", device, "allowed-ips"])) };
    let mark = || -> Look<'_> { Box::new(|| netns.check("wg", &["show", device, "fwmark"])) };
    let forwarding = || -> Look<'_> { Box::new(|| netns.sysctl("net/ipv4/ip_forward")) };
    let pins = || -> Look<'_> { Box::new(|| names_below(&node.pins)) };
    let breakages: Vec<(&str, Look<'_>, Look<'_>)> = vec![
        (
            "an IPv4 route deleted",
            routes("-4"),
            Box::new(|| netns.ip("route delete 10.244.2.0/24")),
        ),
        (
            "an IPv6 route deleted",
            routes("-6"),
            Box::new(|| netns.ip("-6 route delete fd00:10:244:2::/64")),
        ),
        (
            "all our routes flushed",
            routes("-4"),
            Box::new(|| netns.ip("route flush proto 83")),
        ),
        (
            "the device taken down",
            address(),
            Box::new(|| netns.ip(&format!("link set {device} down"))),
        ),
        (
            "an address removed",
            address(),
            Box::new(|| netns.ip(&format!("address flush dev {device} scope global"))),
        ),
        (
            "the MTU changed",
            Box::new(|| netns.ip(&format!("link show {device}"))),
            Box::new(|| netns.ip(&format!("link set {device} mtu 1300"))),
        ),
        (
            "a peer removed",
            peers(),
            Box::new(|| netns.check("wg", &["set", device, "peer", &key_of_b, "remove"])),
        ),
        (
            "allowed IPs changed",
            peers(),
            Box::new(|| netns.check("wg", &["set", device, "peer", &key_of_b, "allowed-ips", "10.9.0.0/16"])),
        ),
        (
            "the mark changed",
            mark(),
            Box::new(|| netns.check("wg", &["set", device, "fwmark", "0x7"])),
        ),
        (
            "forwarding switched off",
            forwarding(),
            Box::new(|| netns.set_sysctl("net/ipv4/ip_forward", "0").map(|()| String::new())),
        ),
        ("the gate's pins removed", pins(), Box::new(|| remove_pins(&node.pins))),
    ];
    for (what, look, break_it) in breakages {
        let before = look().context(what)?;
        break_it().context(what)?;
        mesh.lab.eventually(&format!("repaired: {what}"), REPAIR, || {
            let now = look().map_err(|error| format!("{error:#}"))?;
            if now == before {
                Ok(())
            } else {
                Err(format!("before:\n{before}\nnow:\n{now}"))
            }
        })?;
    }
    mesh.all_flows_work("a0", "b0")?;
    Ok(())
}

/// Every file below a directory, one a line.
fn names_below(directory: &std::path::Path) -> Result<String> {
    let mut names = String::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        names.push_str(&format!("{}\n", path.display()));
        if path.is_dir() {
            names.push_str(&names_below(&path)?);
        }
    }
    let mut lines: Vec<&str> = names.lines().collect();
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

fn remove_pins(directory: &std::path::Path) -> Result<String> {
    std::fs::remove_dir_all(directory).with_context(|| format!("remove {}", directory.display()))?;
    Ok(String::new())
}

#[test]
fn what_is_not_ours_survives_untouched() -> Result<()> {
    let mut mesh = Mesh::healthy("foreign", 2)?;
    let netns = mesh.lab.node("a").host.netns.clone();
    netns.batch(
        "link add veth-other type veth peer name veth-peer\n\
         link set veth-other up\n\
         address add 198.51.100.1/24 dev eth0\n\
         route add 198.51.100.128/25 via 172.18.0.254 dev eth0 proto static\n\
         route add 10.99.0.0/16 via 172.18.0.254 dev eth0 proto 84\n\
         rule add priority 1000 from 198.51.100.1 lookup 100\n\
         neighbour add 172.18.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent\n",
    )?;
    for device in ["veth-other", "eth0"] {
        // Where the gate is attached through clsact, the qdisc is there already.
        netns.exec("tc", &["qdisc", "add", "dev", device, "clsact"])?;
        let filter = "protocol ip prio 7 u32 match u32 0 0 flowid 1:1";
        let add = format!("filter add dev {device} egress {filter}");
        netns.check("tc", &add.split(' ').collect::<Vec<_>>())?;
    }
    let before = foreign(&netns)?;
    let number = mesh.agent("a").status()?.pass.number;

    mesh.eventually(
        "some passes later",
        Duration::from_secs(20),
        mesh.agent("a"),
        |status| status.pass.number > number + 2,
    )?;
    let after_passes = foreign(&netns)?;
    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    let cleaned = netns.exec(
        SHROUD,
        &[
            "cleanup",
            "--config",
            &shroud_lab::agent::config_file(mesh.lab.node("a")).display().to_string(),
        ],
    )?;
    let after_cleanup = foreign(&netns)?;

    ensure!(cleaned.status.success(), "cleanup failed: {cleaned:?}");
    similar(&before, &after_passes)?;
    similar(&before, &after_cleanup)?;
    Ok(())
}

/// Everything in a namespace that is not ours, as iproute2 sees it.
fn foreign(netns: &Netns) -> Result<String> {
    let mut seen = String::new();
    for line in [
        "-4 route show table all",
        "-6 route show table main",
        "rule show",
        "neighbour show nud permanent",
        "-brief link show",
    ] {
        let shown = netns.ip(line)?;
        let lines = shown
            .lines()
            .filter(|line| !line.contains("proto 83") && !line.contains("shroud"));
        let mut lines: Vec<&str> = lines
            .filter(|line| !line.contains("10.244.1.0 ") && !line.contains("fd00:10:244:1::"))
            .collect();
        lines.sort_unstable();
        seen.push_str(&format!("# ip {line}\n{}\n", lines.join("\n")));
    }
    for device in ["veth-other", "eth0"] {
        for direction in ["egress", "ingress"] {
            // Ours are among them where the gate is attached through clsact; a foreign filter of the test is none of BPF.
            let shown = netns.check("tc", &["filter", "show", "dev", device, direction])?;
            let lines = shown.lines().filter(|line| !line.contains(" bpf "));
            seen.push_str(&lines.map(|line| format!("{line}\n")).collect::<String>());
        }
        seen.push_str(&netns.check("tc", &["qdisc", "show", "dev", device])?);
    }
    Ok(seen)
}

fn similar(before: &str, after: &str) -> Result<()> {
    ensure!(
        before == after,
        "something foreign was touched\nbefore:\n{before}\nafter:\n{after}"
    );
    Ok(())
}

#[test]
fn cleanup_removes_all_that_is_ours_and_says_what() -> Result<()> {
    let mut mesh = Mesh::healthy("cleanup", 2)?;
    let node = mesh.lab.node("a").clone();
    let config = shroud_lab::agent::config_file(&node).display().to_string();

    let refused = node.host.netns.exec(SHROUD, &["cleanup", "--config", &config])?;
    mesh.agent_mut("a").terminate(Duration::from_secs(5))?;
    let cleaned = node
        .host
        .netns
        .exec(SHROUD, &["cleanup", "--config", &config, "-o", "json"])?;
    let again = node.host.netns.exec(SHROUD, &["cleanup", "--config", &config])?;

    ensure!(
        refused.status.code() == Some(1) && refused.stderr.contains("an agent is running"),
        "{refused:?}"
    );
    ensure!(cleaned.status.success(), "{cleaned:?}");
    let said: serde_json::Value = serde_json::from_str(&cleaned.stdout)?;
    let removed = said["removed"].to_string();
    for part in ["10.244.2.0/24", "fd00:10:244:2::/64", &node.device, "eth0"] {
        ensure!(removed.contains(part), "cleanup does not name {part}: {removed}");
    }
    ensure!(node.host.netns.ip("route show proto 83")?.is_empty(), "routes are left");
    ensure!(
        node.host.netns.ip(&format!("link show {}", node.device)).is_err(),
        "the device is left"
    );
    ensure!(!node.pins.exists(), "pins are left");
    node.host.netns.ip("route add 10.244.2.0/24 via 172.18.0.2 dev eth0")?;
    let capture = mesh.capture()?;
    mesh.send_in_vain(Protocol::Icmp, Family::V4, mesh.lab.pod("a0"), mesh.lab.pod("b0"));
    ensure!(
        capture.stop()?.plaintext_frames() > 0,
        "a gate is left: a pod's packet was held back"
    );
    ensure!(shroud_lab::agent::wire(&node).is_none(), "`shroud wire` is left");
    ensure!(node.state().join("key").exists(), "the key is gone");
    ensure!(
        again.status.success() && again.stdout.contains("nothing of ours was there"),
        "{again:?}"
    );
    Ok(())
}

#[test]
fn the_gate_works_the_same_through_clsact() -> Result<()> {
    let mesh = Mesh::started("clsact", 2, &AgentOptions::new(SHROUD).attach("clsact"))?;
    mesh.all_healthy()?;
    let shown = mesh
        .lab
        .node("a")
        .host
        .netns
        .check("tc", &["filter", "show", "dev", "eth0", "egress"])?;
    ensure!(
        shown.contains("shroud"),
        "no filter of ours: {shown}\n{}",
        mesh.lab.dump()
    );
    let capture = mesh.capture()?;

    mesh.all_flows_work("a0", "b0")?;

    crate::mesh::nothing_leaked(capture)?;
    Ok(())
}
