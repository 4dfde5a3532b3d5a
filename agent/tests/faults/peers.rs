//! H: a node is replaced, a pod's address is another's now, and nodes talk themselves.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shroud_lab::{AgentOptions, Family, Flow, Host, Outcome, Protocol};

use crate::field::Field;
use crate::hand::nodes_are_encrypted;
use crate::row::Row;

pub(crate) const ROWS: &[Row] = &[
    Row::new("H1", "a node is set up anew: the same name, another key", replaced)
        .cuts_the_path()
        .leaves_changes()
        .heals_within(20)
        .core(),
    Row::new(
        "H2",
        "a pod goes, and its address is used on another node",
        address_reused,
    ),
    Row::new("H3", "nodes and pods talk in all directions", all_directions)
        .with(|options| AgentOptions { nodes: true, ..options })
        .well(nodes_are_encrypted),
];

fn replaced(field: &mut Field) -> Result<()> {
    let before = field.status("c")?.raw["publicKey"].clone();
    let state = field.node("c").state();
    field.agent("c").kill()?;
    fs::remove_dir_all(&state).with_context(|| format!("remove {}", state.display()))?;
    field.agent("c").restart()?;
    field.fault();
    field.heals()?;
    let after = field.status("c")?.raw["publicKey"].clone();
    ensure!(before != after, "c has its old key");
    let known = field.status("a")?;
    ensure!(
        known.peers.iter().any(|peer| after == peer.public_key.as_str()),
        "a does not know c's new key: {:#}",
        known.raw["peers"]
    );
    Ok(())
}

fn try_to_send(field: &Field, protocol: Protocol, family: Family, from: &Host, to: &Host) -> Outcome {
    Flow::new(protocol, family, from, to)
        .sizes(&[100])
        .patience(Duration::from_millis(600))
        .run(&field.lab.markers)
}

/// Nobody gets what was for a pod that is gone; and whoever has its address elsewhere is neither believed nor heard in the clear.
fn address_reused(field: &mut Field) -> Result<()> {
    let (a, b) = (field.node("a"), field.node("b"));
    let gone = field.lab.add_pod(0)?;
    let other = field.lab.add_pod(1)?;
    let friend = field.lab.pod("c0").clone();
    let outcome = try_to_send(field, Protocol::Udp, Family::V4, &friend, &gone);
    ensure!(outcome.ok(), "the pod was never there: {outcome:?}");

    a.host.netns.ip("link delete pod2")?;
    for protocol in Protocol::ALL {
        for family in Family::BOTH {
            let outcome = try_to_send(field, protocol, family, &friend, &gone);
            ensure!(!outcome.ok(), "somebody answered for a pod that is gone: {outcome:?}");
        }
    }

    other.netns.ip("address flush dev eth0 scope global")?;
    other.netns.ip(&format!("address add {}/32 dev eth0", gone.v4))?;
    other.netns.ip(&format!("address add {}/128 dev eth0 nodad", gone.v6))?;
    // With its address went its routes.
    other.netns.exec(
        "ip",
        &["route", "replace", "169.254.1.1", "dev", "eth0", "scope", "link"],
    )?;
    other.netns.exec(
        "ip",
        &["route", "replace", "default", "via", "169.254.1.1", "dev", "eth0"],
    )?;
    b.host.netns.ip(&format!("route add {}/32 dev pod2", gone.v4))?;
    b.host.netns.ip(&format!("route add {}/128 dev pod2", gone.v6))?;
    let impostor = Host {
        netns: other.netns.clone(),
        name: "the impostor".to_owned(),
        ..gone.clone()
    };
    for protocol in Protocol::ALL {
        for family in Family::BOTH {
            for (from, to) in [(&impostor, &friend), (&friend, &impostor)] {
                let outcome = try_to_send(field, protocol, family, from, to);
                ensure!(!outcome.ok(), "an address of a's pods was believed at b: {outcome:?}");
            }
        }
    }

    b.host.netns.ip("link delete pod2")?;
    field.fault();
    field.heals()
}

/// Every kind of traffic between pods and nodes of two nodes, in both families; nothing of it is seen.
fn all_directions(field: &mut Field) -> Result<()> {
    for (one, other) in [("a", "b"), ("b", "c")] {
        let node = |name: &str| field.lab.node(name).host.clone();
        let pod = |name: &str| field.lab.pod(&format!("{name}0")).clone();
        for (from, to) in [
            (node(one), node(other)),
            (node(one), pod(other)),
            (pod(one), node(other)),
            (pod(one), pod(other)),
        ] {
            for (from, to) in [(&from, &to), (&to, &from)] {
                for protocol in Protocol::ALL {
                    for family in Family::BOTH {
                        let outcome = Flow::new(protocol, family, from, to).run(&field.lab.markers);
                        ensure!(outcome.ok(), "{}: {:?}", outcome.flow, outcome.error);
                    }
                }
            }
        }
    }
    field.fault();
    field.heals()
}
