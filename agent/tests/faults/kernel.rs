//! C1 to C3: the kernel says too much, or no, and somebody else has a hand on our devices.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use shroud_lab::{Node, Topology};

use crate::field::Field;
use crate::row::{self, Row};
use crate::strace::{Failing, signal};

/// How many routes somebody else adds at once, and takes away.
const FLOOD: u16 = 10_000;

/// How long calls fail.
const FAILING: Duration = Duration::from_secs(3);

pub(crate) const ROWS: &[Row] = &[
    Row::new("C1", "more notices than the kernel can keep for the agent", flooded).cuts_the_path(),
    Row::new(
        "C2",
        "the kernel's answers are errors, while much is to be done",
        refused,
    )
    .needs(row::strace)
    .cuts_the_path(),
    Row::new("C3/deleted", "the encryption device is deleted", device_deleted)
        .cuts_the_path()
        .core(),
    Row::new("C3/renamed", "the encryption device gets another name", device_renamed)
        .cuts_the_path()
        .leaves_changes(),
    Row::new("C3/down", "the encryption device is taken down", device_down).cuts_the_path(),
    Row::new(
        "C3/moved",
        "the encryption device is moved to another namespace",
        device_moved,
    )
    .cuts_the_path(),
    Row::new("C3/mtu", "the encryption device gets another MTU", device_mtu),
    Row::new(
        "C3/address",
        "the encryption device loses its addresses",
        device_addresses,
    ),
    Row::new("C3/uplink", "the uplink is taken down, and comes up bare", uplink_down).cuts_the_path(),
];

/// The agent stands still while notices come, so that some are surely lost; and while our own routes go.
fn flooded(field: &mut Field) -> Result<()> {
    let netns = field.lab.node("b").host.netns.clone();
    let mut routes = String::new();
    for number in 0..FLOOD {
        let [high, low] = number.to_be_bytes();
        writeln!(routes, "route add blackhole 198.18.{high}.{low}/32 proto 99")?;
    }
    let pid = field.agent("b").pid();
    signal(pid, Signal::STOP)?;
    netns.batch(&routes)?;
    netns.ip("route flush proto 83")?;
    netns.ip("route flush proto 99")?;
    signal(pid, Signal::CONT)?;
    field.fault();
    field.heals()?;

    let dropped = netns.run(dropped_notices)?;
    ensure!(dropped > 0, "no notice was lost: this row shows nothing");
    Ok(())
}

/// Notices that the kernel could not deliver to anybody in this namespace (the column `Drops`, net/netlink/af_netlink.c).
fn dropped_notices() -> Result<u64> {
    let table = std::fs::read_to_string("/proc/thread-self/net/netlink").context("read the netlink sockets")?;
    let mut lines = table.lines();
    let head = lines.next().unwrap_or_default();
    let column = head
        .split_whitespace()
        .position(|name| name == "Drops")
        .context("a column of drops")?;
    let drops = lines.filter_map(|line| line.split_whitespace().nth(column)?.parse::<u64>().ok());
    Ok(drops.sum())
}

/// Every third call of the reconcile thread to netlink, BPF and the control socket fails, while somebody undoes what it does.
fn refused(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    // Not EAGAIN: a socket that says so will tell when it has room, and one that only seems to say so will not.
    for error in ["EINTR", "EBUSY", "ENOMEM", "ENOBUFS", "EEXIST", "ESRCH", "EIO"] {
        for calls in ["sendto,sendmsg", "recvfrom,recvmsg", "bpf"] {
            let how = format!("error={error}:when={}+3", 1 + field.chance.below(3));
            let failing = Failing::start(field.agent("a").pid(), "reconcile", calls, &how)?;
            somebody_undoes(&node)?;
            std::thread::sleep(FAILING);
            drop(failing);
            field.fault();
            field.heals().with_context(|| format!("after {error} of {calls}"))?;
        }
    }
    Ok(())
}

fn somebody_undoes(node: &Node) -> Result<()> {
    let netns = &node.host.netns;
    netns.ip("-4 route flush proto 83")?;
    netns.ip("-6 route flush proto 83")?;
    netns.set_sysctl("net.ipv4.ip_forward", "0")
}

/// Lets somebody run `ip` once on a node.
fn by_ip(field: &mut Field, command: impl FnOnce(&Node) -> String) -> Result<()> {
    field.at_any_moment();
    let node = field.node("a");
    node.host.netns.ip(&command(&node))?;
    field.fault();
    field.heals()
}

fn device_deleted(field: &mut Field) -> Result<()> {
    by_ip(field, |node| format!("link delete {}", node.device))
}

/// What was the device is a stray one now; the kernel's WireGuard keeps its port with it, so that somebody must remove it.
fn device_renamed(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let node = field.node("a");
    let netns = &node.host.netns;
    // Older kernels rename nothing that is up.
    netns.ip(&format!("link set {} down", node.device))?;
    netns.ip(&format!("link set {} name stray", node.device))?;
    if row::userspace().is_ok() {
        field.fault();
        field.heals()?;
        return netns.ip("link delete stray").map(drop);
    }
    field.says("a", "it names the port", |status| {
        status.says("tunnel-port-taken").is_some()
    })?;
    netns.ip("link delete stray")?;
    field.fault();
    field.heals()
}

fn device_down(field: &mut Field) -> Result<()> {
    by_ip(field, |node| format!("link set {} down", node.device))
}

fn device_moved(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let node = field.node("a");
    let elsewhere = Topology::new("elsewhere").nodes(1).pods(0).build()?;
    let name = elsewhere.node("a").host.netns.name();
    node.host.netns.ip(&format!("link set {} netns {name}", node.device))?;
    if row::userspace().is_err() {
        field.says("a", "it names the port", |status| {
            status.says("tunnel-port-taken").is_some()
        })?;
        drop(elsewhere);
    }
    field.fault();
    field.heals()
}

fn device_mtu(field: &mut Field) -> Result<()> {
    by_ip(field, |node| format!("link set {} mtu 1300", node.device))
}

fn device_addresses(field: &mut Field) -> Result<()> {
    by_ip(field, |node| format!("address flush dev {} scope global", node.device))
}

/// Whoever configures the network gives the uplink back what is his; what is ours we give back ourselves.
fn uplink_down(field: &mut Field) -> Result<()> {
    field.at_any_moment();
    let node = field.node("a");
    let netns = &node.host.netns;
    netns.ip("link set eth0 down")?;
    field.lasts(2);
    netns.ip("link set eth0 up")?;
    // IPv4 addresses stay on a device that is down, routes and IPv6 addresses go.
    netns.batch(&format!(
        "address replace {}/64 dev eth0 nodad\n\
         route replace default via {} dev eth0\n\
         route replace ::/0 via {} dev eth0\n",
        node.host.v6,
        shroud_lab::topology::GATEWAY.0,
        shroud_lab::topology::GATEWAY.1
    ))?;
    field.fault();
    field.heals()
}
