//! Captures every frame of every underlay port, in both directions, and judges each one on the spot.
//!
//! Two oracles: a marker of the lab's traffic at any offset is plaintext; a frame that no rule of [`crate::frame`] allows
//! is a stranger. A capture that lost a frame proves nothing, so drops and link counters are part of the evidence.

mod packet_socket;
pub mod tap;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use anyhow::{Context, Result};
use memchr::memmem;
use serde_json::Value;

use crate::frame::{self, Allowed, Class};
use crate::marker::{self, Markers};
use crate::netns::Netns;
use crate::topology::Lab;
use packet_socket::PacketSocket;

/// How many offenders and how many kinds of strangers are kept per port.
const EXAMPLES: usize = 20;

/// How long a finished capture waits for frames that the links have counted but the sockets have not shown yet.
const SETTLE: Duration = Duration::from_secs(5);

/// How long a capture that has been told to stop goes on reading frames that no link had counted then.
const STRAGGLERS: Duration = Duration::from_millis(100);

/// The way of a frame through a bridge port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// The node sent it.
    FromNode,
    /// It was sent to the node.
    ToNode,
}

/// A frame in which a marker was found.
#[derive(Clone, Debug)]
pub struct Offender {
    /// The bridge port.
    pub port: String,
    /// Which way it went.
    pub direction: Direction,
    /// The flow whose marker it carries, if the marker was whole.
    pub flow: Option<String>,
    /// Offset of the marker in the frame, in bytes.
    pub offset: usize,
    /// Addresses, protocol, ports, length.
    pub summary: String,
    /// The first bytes in hexadecimal.
    pub hex: String,
}

/// What one port saw.
#[derive(Clone, Debug, Default)]
pub struct PortEvidence {
    /// Frames the node sent.
    pub from_node: u64,
    /// Frames that went to the node.
    pub to_node: u64,
    /// Bytes of all frames.
    pub bytes: u64,
    /// Frames the socket dropped for want of room.
    pub drops: u64,
    /// Frames the link counted while the capture was surely on; more than the captured ones means a loss.
    pub counted: u64,
    /// Frames with a marker.
    pub plaintext_frames: u64,
    /// Bytes of the frames with a marker.
    pub plaintext_bytes: u64,
    /// The first frames with a marker.
    pub offenders: Vec<Offender>,
    /// Frames that no rule allows.
    pub stranger_frames: u64,
    /// What they are, and how many of each.
    pub strangers: BTreeMap<String, u64>,
    /// How many frames each rule allowed.
    pub allowed: BTreeMap<String, u64>,
    /// Why reading ended early, if it did.
    pub error: Option<String>,
}

/// What a capture saw, by port.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// By bridge port.
    pub ports: BTreeMap<String, PortEvidence>,
}

/// A running capture of every port of an underlay.
pub struct Capture {
    underlay: Netns,
    stop: Arc<AtomicBool>,
    ports: BTreeMap<String, Port>,
}

struct Port {
    evidence: Arc<Mutex<PortEvidence>>,
    at_start: u64,
    thread: JoinHandle<()>,
}

impl Capture {
    /// Starts to capture all ports of a lab's nodes, judging by `allowed`.
    pub fn start(lab: &Lab, allowed: Allowed) -> Result<Capture> {
        let stop = Arc::new(AtomicBool::new(false));
        let indices: BTreeMap<String, u32> = links(&lab.underlay)?
            .into_iter()
            .map(|(name, link)| (name, link.index))
            .collect();
        let mut sockets = Vec::new();
        for node in &lab.nodes {
            let index = *indices
                .get(&node.port)
                .with_context(|| format!("no bridge port {}", node.port))?;
            let socket = lab.underlay.run(|| {
                PacketSocket::open(index, packet_socket::ROOM)
                    .with_context(|| format!("open a packet socket on {}", node.port))
            })?;
            sockets.push((node.port.clone(), socket));
        }
        // Counted after the sockets are open: each frame counted from now on must be captured.
        let start = links(&lab.underlay)?;
        let mut ports = BTreeMap::new();
        for (name, socket) in sockets {
            let evidence = Arc::new(Mutex::new(PortEvidence::default()));
            let judge = Judge {
                port: name.clone(),
                markers: lab.markers.clone(),
                tag: memmem::Finder::new(&lab.markers.tag()).into_owned(),
                allowed: allowed.clone(),
            };
            let thread = thread::Builder::new().name(format!("capture {name}")).spawn({
                let (evidence, stop) = (Arc::clone(&evidence), Arc::clone(&stop));
                move || read(&socket, &judge, &evidence, &stop)
            })?;
            let at_start = start.get(&name).map_or(0, |link| link.frames);
            ports.insert(
                name,
                Port {
                    evidence,
                    at_start,
                    thread,
                },
            );
        }
        Ok(Capture {
            underlay: lab.underlay.clone(),
            stop,
            ports,
        })
    }

    /// What was seen so far; the link counters are not in it yet.
    pub fn so_far(&self) -> Evidence {
        let ports = self
            .ports
            .iter()
            .map(|(name, port)| (name.clone(), lock(&port.evidence).clone()))
            .collect();
        Evidence { ports }
    }

    /// Ends the capture after every frame that the links have counted has been read, and returns the evidence.
    pub fn stop(mut self) -> Result<Evidence> {
        let counted = links(&self.underlay)?;
        for (name, port) in &self.ports {
            let counted = counted
                .get(name)
                .map_or(0, |link| link.frames)
                .saturating_sub(port.at_start);
            lock(&port.evidence).counted = counted;
        }
        let give_up = Instant::now() + SETTLE;
        while self.ports.values().any(|port| lock(&port.evidence).missed() > 0) && Instant::now() < give_up {
            thread::sleep(Duration::from_millis(2));
        }
        self.stop.store(true, Ordering::Release);
        let mut evidence = Evidence::default();
        for (name, port) in std::mem::take(&mut self.ports) {
            if port.thread.join().is_err() {
                lock(&port.evidence).error = Some("the capture thread panicked".into());
            }
            evidence.ports.insert(name, lock(&port.evidence).clone());
        }
        Ok(evidence)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("underlay", &self.underlay)
            .finish_non_exhaustive()
    }
}

impl Evidence {
    /// Frames captured on all ports; one that crosses the bridge is seen on two.
    pub fn frames(&self) -> u64 {
        self.ports.values().map(|port| port.from_node + port.to_node).sum()
    }

    /// Bytes captured on all ports.
    pub fn bytes(&self) -> u64 {
        self.ports.values().map(|port| port.bytes).sum()
    }

    /// Frames in which a marker was found.
    pub fn plaintext_frames(&self) -> u64 {
        self.ports.values().map(|port| port.plaintext_frames).sum()
    }

    /// Bytes of the frames in which a marker was found.
    pub fn plaintext_bytes(&self) -> u64 {
        self.ports.values().map(|port| port.plaintext_bytes).sum()
    }

    /// Frames that no rule allows.
    pub fn stranger_frames(&self) -> u64 {
        self.ports.values().map(|port| port.stranger_frames).sum()
    }

    /// Fails when a frame was lost, for then silence proves nothing.
    pub fn complete(&self) -> Result<(), String> {
        let mut losses = Vec::new();
        for (name, port) in &self.ports {
            if port.drops > 0 || port.missed() > 0 || port.error.is_some() {
                losses.push(format!(
                    "{name}: {} frames captured, {} dropped by the socket, {} counted by the link, error {:?}",
                    port.from_node + port.to_node,
                    port.drops,
                    port.counted,
                    port.error
                ));
            }
        }
        if losses.is_empty() {
            Ok(())
        } else {
            Err(format!("the capture is blind: {}", losses.join("; ")))
        }
    }

    /// Fails when a marker or a stranger was seen, or when a frame was lost.
    pub fn clean(&self) -> Result<(), String> {
        self.complete()?;
        if self.plaintext_frames() == 0 && self.stranger_frames() == 0 {
            Ok(())
        } else {
            Err(self.to_string())
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} frames, {} bytes; {} frames with a marker ({} bytes); {} strangers",
            self.frames(),
            self.bytes(),
            self.plaintext_frames(),
            self.plaintext_bytes(),
            self.stranger_frames()
        )?;
        for (name, port) in &self.ports {
            let allowed: Vec<_> = port
                .allowed
                .iter()
                .map(|(rule, count)| format!("{count} {rule}"))
                .collect();
            writeln!(
                f,
                "  {name}: {} from the node, {} to it: {}",
                port.from_node,
                port.to_node,
                allowed.join(", ")
            )?;
            for (summary, count) in &port.strangers {
                writeln!(f, "    stranger x{count}: {summary}")?;
            }
            for offender in port.offenders.iter().take(5) {
                writeln!(
                    f,
                    "    plaintext {:?}: {} carries {} at offset {}: {}",
                    offender.direction,
                    offender.summary,
                    offender.flow.as_deref().unwrap_or("a piece of a marker"),
                    offender.offset,
                    offender.hex
                )?;
            }
        }
        Ok(())
    }
}

impl PortEvidence {
    /// Frames the link counted and the capture did not see.
    pub fn missed(&self) -> u64 {
        self.counted.saturating_sub(self.from_node + self.to_node)
    }
}

/// Reads until told to stop; then what is still on its way, but not for ever: traffic may go on.
fn read(socket: &PacketSocket, judge: &Judge, evidence: &Mutex<PortEvidence>, stop: &AtomicBool) {
    let mut buffer = packet_socket::buffer();
    let mut give_up = None;
    loop {
        // Asked before the read: a frame that came before the stop is still read.
        let stopping = stop.load(Ordering::Acquire);
        if stopping && Instant::now() > *give_up.get_or_insert_with(|| Instant::now() + STRAGGLERS) {
            break;
        }
        match socket.read(&mut buffer) {
            Ok((frame, direction)) => judge.consider(frame, direction, &mut lock(evidence)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && stopping => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The link was taken down; once it is up again, so is the socket (packet(7)).
            Err(error) if error.kind() == io::ErrorKind::NetworkDown => {}
            Err(error) => {
                lock(evidence).error = Some(format!("read: {error}"));
                break;
            }
        }
    }
    match socket.drops() {
        Ok(drops) => lock(evidence).drops = drops,
        Err(error) => lock(evidence).error = Some(format!("read the drop counter: {error}")),
    }
}

struct Judge {
    port: String,
    markers: Markers,
    tag: memmem::Finder<'static>,
    allowed: Allowed,
}

impl Judge {
    fn consider(&self, frame: &[u8], direction: Direction, evidence: &mut PortEvidence) {
        match direction {
            Direction::FromNode => evidence.from_node += 1,
            Direction::ToNode => evidence.to_node += 1,
        }
        evidence.bytes += frame.len() as u64;

        match frame::classify(frame, &self.allowed) {
            Class::Allowed(rule) => match evidence.allowed.get_mut(rule) {
                Some(count) => *count += 1,
                None => {
                    evidence.allowed.insert(rule.to_owned(), 1);
                }
            },
            Class::Stranger => {
                evidence.stranger_frames += 1;
                let summary = frame::summary(frame, frame::Detail::Kind);
                if evidence.strangers.contains_key(&summary) || evidence.strangers.len() < EXAMPLES {
                    *evidence.strangers.entry(summary).or_default() += 1;
                }
            }
        }

        let Some(offset) = self.tag.find(frame) else { return };
        evidence.plaintext_frames += 1;
        evidence.plaintext_bytes += frame.len() as u64;
        if evidence.offenders.len() < EXAMPLES {
            evidence.offenders.push(Offender {
                port: self.port.clone(),
                direction,
                // An earlier tag may belong to a marker that was cut; any whole one tells the flow.
                flow: self.tag.find_iter(frame).find_map(|at| self.markers.flow(&frame[at..])),
                offset,
                summary: frame::summary(frame, frame::Detail::Full),
                hex: frame
                    .iter()
                    .take(offset + marker::LENGTH)
                    .take(160)
                    .map(|byte| format!("{byte:02x}"))
                    .collect(),
            });
        }
    }
}

struct Link {
    index: u32,
    frames: u64,
}

/// The links of a namespace with the sum of their packet counters.
fn links(netns: &Netns) -> Result<BTreeMap<String, Link>> {
    let text = netns.check("ip", &["-s", "-j", "link", "show"])?;
    let links: Vec<Value> = serde_json::from_str(&text).context("read the JSON of `ip -s link`")?;
    let mut found = BTreeMap::new();
    for link in links {
        let name = link["ifname"].as_str().context("a link without a name")?;
        let index = link["ifindex"]
            .as_u64()
            .and_then(|index| u32::try_from(index).ok())
            .context("no ifindex")?;
        let packets = |way: &str| link["stats64"][way]["packets"].as_u64().context("no packet counter");
        found.insert(
            name.to_owned(),
            Link {
                index,
                frames: packets("rx")? + packets("tx")?,
            },
        );
    }
    Ok(found)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
