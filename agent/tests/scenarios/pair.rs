//! Two machines with different kernels, one node on each: `make test-vm` boots them, joins their network cards, and tells each by
//! `$SHROUD_LAB_PAIR` which of the two it is. Everywhere else these tests are skipped.
//!
//! ```text
//!   machine 1 (Linux 6.1)                          machine 2 (Linux 6.12)
//!   pod a0 -- node a -- port-a -- br0 -- eth0 ==== eth0 -- br0 -- port-b -- node b -- pod b0
//! ```
//!
//! Both run the same test and keep step over a connection between their bridges. Each judges what it sent itself, on its own port.

use std::env;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use shroud_lab::marker::payload;
use shroud_lab::{Agent, Family, Host, Lab, Node, Protocol, Topology};

use crate::mesh::{Mesh, nothing_leaked};
use crate::overlay::{has, reached_by, with};

/// How long a node may take to be well. The lab stretches it on emulated machines.
const WITHIN: Duration = Duration::from_secs(30);
/// How long one machine waits for the other at each step.
const STEP: Duration = Duration::from_secs(240);
/// Bytes of a stream, in each direction.
const STREAM: usize = 100_000;
/// Where pods answer, and where the machines keep step.
const PORT: u16 = 7000;

/// The connection over which the two machines keep step.
struct Step(TcpStream);

impl Step {
    /// Joins this machine's card to the lab's bridge, and finds the other machine.
    fn join(lab: &Lab, number: u8) -> Result<Self> {
        let address = |number| Ipv4Addr::new(192, 168, 77, number);
        let underlay = &lab.underlay;
        // A card goes back to where it came from when the namespace of an earlier lab ends, which takes the kernel a moment.
        lab.eventually("this machine has a network card", WITHIN, || {
            underlay.take("eth0").map_err(|error| format!("{error:#}"))
        })?;
        underlay.batch(&format!(
            "link set eth0 master br0\nlink set eth0 up\naddress add {}/24 dev br0\n",
            address(number)
        ))?;
        let begun = Instant::now();
        let stream = underlay.run(|| match number {
            1 => {
                let listener = TcpListener::bind((address(1), PORT)).context("listen for the other machine")?;
                listener.set_nonblocking(true)?;
                loop {
                    match listener.accept() {
                        Ok((stream, _)) => break Ok(stream),
                        Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < STEP => {
                            std::thread::sleep(Duration::from_millis(100));
                        }
                        Err(error) => break Err(error).context("wait for the other machine"),
                    }
                }
            }
            _ => loop {
                match TcpStream::connect_timeout(&SocketAddr::from((address(1), PORT)), Duration::from_secs(2)) {
                    Ok(stream) => break Ok(stream),
                    Err(_) if begun.elapsed() < STEP => std::thread::sleep(Duration::from_millis(200)),
                    Err(error) => break Err(error).context("find the other machine"),
                }
            },
        })?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STEP))?;
        Ok(Self(stream))
    }

    /// Gives the other machine some bytes, and takes what it gives.
    fn exchange(&mut self, what: &str, ours: &[u8]) -> Result<Vec<u8>> {
        let length = u32::try_from(ours.len()).context("few bytes")?;
        self.0
            .write_all(&length.to_be_bytes())
            .with_context(|| format!("give {what}"))?;
        self.0.write_all(ours).with_context(|| format!("give {what}"))?;
        let mut length = [0; 4];
        self.0.read_exact(&mut length).with_context(|| format!("take {what}"))?;
        let mut theirs = vec![0; usize::try_from(u32::from_be_bytes(length))?];
        self.0.read_exact(&mut theirs).with_context(|| format!("take {what}"))?;
        Ok(theirs)
    }

    /// Waits until the other machine has come to the same point.
    fn meet(&mut self, point: &str) -> Result<()> {
        let theirs = self.exchange(point, point.as_bytes())?;
        ensure!(
            theirs == point.as_bytes(),
            "we are at {point:?}, they at {:?}",
            String::from_utf8_lossy(&theirs)
        );
        Ok(())
    }
}

/// Sends back whatever comes by each connection to a pod, until the lab ends.
fn answer(pod: &Host, family: Family) -> Result<()> {
    let address: (IpAddr, u16) = (pod.address(family), PORT);
    let listener = pod
        .netns
        .run(move || TcpListener::bind(address).with_context(|| format!("listen on {address:?}")))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut from, mut to) = (&stream, &stream);
                // An end of either side ends the echo.
                std::io::copy(&mut from, &mut to).ok();
            });
        }
    });
    Ok(())
}

/// A stream to a pod of the other machine, whose every byte must come back.
fn stream(mesh: &Mesh, family: Family, from: &Host, to: &Host) -> Result<()> {
    let flow = format!("TCP {} -> {} ({family:?})", from.name, to.name);
    let sent = payload(&mesh.lab.markers.issue(&flow)?, STREAM);
    let target = SocketAddr::new(to.address(family), PORT);
    let stream = from
        .netns
        .run(move || TcpStream::connect_timeout(&target, WITHIN).context("connect"));
    let mut stream = stream.with_context(|| flow.clone())?;
    stream.set_read_timeout(Some(WITHIN))?;
    stream.set_write_timeout(Some(WITHIN))?;
    let mut back = vec![0; sent.len()];
    let mut reader = stream.try_clone()?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| stream.write_all(&sent));
        reader
            .read_exact(&mut back)
            .with_context(|| format!("{flow}: what comes back"))?;
        match writer.join() {
            Ok(written) => written.with_context(|| flow.clone()),
            Err(_) => bail!("{flow}: the writer panicked"),
        }
    })?;
    ensure!(back == sent, "{flow}: it came back changed");
    Ok(())
}

/// Every kind of flow to the other machine's pod.
fn every_flow(mesh: &Mesh, theirs: &Host) -> Result<()> {
    let ours = &mesh.lab.nodes[0].pods[0];
    for family in Family::BOTH {
        mesh.arrived(&mesh.send(Protocol::Icmp, family, ours, theirs))?;
        stream(mesh, family, ours, theirs).map_err(|error| error.context(mesh.lab.dump()))?;
    }
    Ok(())
}

/// Gives each machine the other's announcement, again and again, until both nodes are well: a node says more of itself once its devices
/// are there.
fn share_announcements(mesh: &Mesh, step: &mut Step, mode: &str) -> Result<()> {
    let node = &mesh.lab.nodes[0];
    let begun = Instant::now();
    loop {
        let (name, content) = announcement(node).unwrap_or_default();
        let their_name = String::from_utf8(step.exchange("the announcement's name", name.as_bytes())?)?;
        let content = step.exchange("the announcement", &content)?;
        ensure!(
            name.is_empty() || name != their_name,
            "both nodes call themselves {name}"
        );
        if !their_name.is_empty() {
            let scratch = node.folder.join("announcement");
            fs::write(&scratch, content)?;
            fs::rename(&scratch, node.directory.join(&their_name))?;
        }
        let status = mesh.agents[0].status();
        let well = status
            .as_ref()
            .is_ok_and(|status| status.verdict == "healthy" && status.peers.len() == 1 && reached_by(status, mode));
        let they_are = step.exchange("whether all is well", &[u8::from(well)])? == [1];
        if well && they_are {
            return Ok(());
        }
        if begun.elapsed() > STEP {
            bail!("not well in {mode} within {STEP:?}: {status:?}\n{}", mesh.lab.dump());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// The name and the content of the node's own announcement, once it has made one.
fn announcement(node: &Node) -> Option<(String, Vec<u8>)> {
    let name = format!("{}.json", node.host.name);
    let content = fs::read(node.directory.join(&name)).ok()?;
    Some((name, content))
}

fn carries_everything_encrypted(mode: &str) -> Result<()> {
    let Ok(number) = env::var("SHROUD_LAB_PAIR") else {
        writeln!(
            std::io::stderr(),
            "SKIPPED: this takes two machines, `make test-vm` boots them"
        )?;
        return Ok(());
    };
    let number: u8 = number.parse().context("SHROUD_LAB_PAIR is 1 or 2")?;
    let lab = Topology::new("pair").first(number).nodes(1).pods(1).build()?;
    let mut step = Step::join(&lab, number)?;
    if mode != "native" && !has(&lab, mode)? {
        bail!("this kernel has no {mode}");
    }
    let agents = Agent::start_all(&lab, &with(mode))?;
    let mut mesh = Mesh { agents, lab };
    let node = mesh.lab.nodes[0].clone();
    let other = 3 - number;
    let theirs = Host {
        name: if other == 1 { "a0".into() } else { "b0".into() },
        v4: Ipv4Addr::new(10, 244, other, 10),
        v6: format!("fd00:10:244:{other}::10").parse()?,
        ..node.pods[0].clone()
    };
    for family in Family::BOTH {
        answer(&node.pods[0], family)?;
    }

    share_announcements(&mesh, &mut step, mode)?;

    let capture = mesh.capture()?;
    every_flow(&mesh, &theirs)?;
    step.meet("all has arrived")?;
    nothing_leaked(capture).map_err(|error| error.context(mesh.lab.dump()))?;

    // The twin.
    step.meet("both have judged")?;
    mesh.agents[0].terminate(Duration::from_secs(20))?;
    mesh.agents[0] = Agent::start(&node, &with(mode).gate("off"))?;
    mesh.eventually("the gate is off", WITHIN, &mesh.agents[0], |status| {
        status.raw["gate"]["mode"] == "off" && reached_by(status, mode)
    })?;
    step.meet("both gates are off")?;
    let capture = mesh.capture()?;
    every_flow(&mesh, &theirs)?;
    step.meet("all has arrived again")?;
    let evidence = capture.stop()?;
    ensure!(evidence.plaintext_frames() > 0, "the oracle is blind: {evidence:?}");
    step.meet("both have seen it")
}

#[test]
fn geneve_between_two_kernels() -> Result<()> {
    carries_everything_encrypted("geneve")
}

#[test]
fn native_between_two_kernels() -> Result<()> {
    carries_everything_encrypted("native")
}
