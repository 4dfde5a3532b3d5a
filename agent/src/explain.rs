//! What happens to a packet, step by step, and why: pure, from what was just read back from the kernel.
//!
//! The route is the kernel's own answer, the gate's verdict comes from the very code that runs in the kernel over the table that lies in
//! its maps, and the tunnel's peer is the one whose allowed IPs really contain the destination. Only to whom an overlay device sends a packet
//! is taken from the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::SystemTime;

use shroud_ebpf::{Action, Direction, Facts, Hook, Observed, Reason, Wrapping};
use shroud_keyd::{Snapshot, Zone};
use shroud_model::{NodeName, PublicKey};
use shroud_routing::{Hop, HopKind};
use shroud_tunnel::{Device, ObservedPeer};

use crate::config::Config;
use crate::plan::lane::Lane;
use crate::plan::overlay::End;
use crate::plan::{PlannedPeer, Surroundings, opted_out, outgoing};
use crate::status::{Explanation, Outcome, Step, VERSION};

/// TCP, by which the kernel's questions are asked (IANA protocol numbers). The gate decides by addresses alone.
const TCP: u8 = 6;

/// What is known when a packet is explained.
pub(crate) struct Knowledge<'a> {
    pub(crate) config: &'a Config,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) surroundings: &'a Surroundings,
    /// How peers are reached, as the last pass left it.
    pub(crate) peers: &'a BTreeMap<NodeName, PlannedPeer>,
    /// The gate as it is in the kernel.
    pub(crate) gate: &'a Observed,
    /// The encryption devices as they are.
    pub(crate) tunnels: &'a BTreeMap<Lane, Device>,
    /// Where the kernel sends such a packet.
    pub(crate) hop: &'a Hop,
    pub(crate) now: SystemTime,
}

/// Whose an address is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    OwnPod,
    OwnAddress,
    PeerPod(NodeName),
    RefusedPod(NodeName, String),
    UnknownPod,
    Peer(NodeName),
    Outside,
}

impl Place {
    /// Whether packets of this address start, and for this address end, on this node.
    pub(crate) fn is_here(&self) -> bool {
        matches!(self, Self::OwnPod | Self::OwnAddress)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnPod => f.write_str("a pod of this node"),
            Self::OwnAddress => f.write_str("this node itself"),
            Self::PeerPod(node) => write!(f, "a pod of peer {node}"),
            Self::RefusedPod(node, reasons) => write!(f, "a pod of node {node}, which is refused ({reasons})"),
            Self::UnknownPod => f.write_str("inside the protected ranges, but no node of the mesh owns it"),
            Self::Peer(node) => write!(f, "peer {node} itself"),
            Self::Outside => f.write_str("outside the mesh, not protected"),
        }
    }
}

/// Says whose an address is.
pub(crate) fn place(config: &Config, snapshot: &Snapshot, surroundings: &Surroundings, address: IpAddr) -> Place {
    let mut links = surroundings.facts.links.values();
    if links.any(|link| link.addresses.iter().any(|own| own.address == address)) {
        return Place::OwnAddress;
    }
    if snapshot.own.pod_prefixes.iter().any(|prefix| prefix.contains(address)) {
        return Place::OwnPod;
    }
    for (name, peer) in &snapshot.peers {
        if peer.pod_prefixes.iter().any(|prefix| prefix.contains(address)) {
            return Place::PeerPod(name.clone());
        }
    }
    for (name, refused) in &snapshot.refused {
        if refused.pod_prefixes.iter().any(|prefix| prefix.contains(address)) {
            let reasons: Vec<String> = refused.reasons.iter().map(ToString::to_string).collect();
            return Place::RefusedPod(name.clone(), reasons.join("; "));
        }
    }
    if config.protected.iter().any(|range| range.contains(address)) {
        return Place::UnknownPod;
    }
    match snapshot
        .peers
        .iter()
        .find(|(_, peer)| peer.addresses.contains(&address))
    {
        Some((name, _)) => Place::Peer(name.clone()),
        None => Place::Outside,
    }
}

/// Says what happens to a packet.
pub(crate) fn explain(knowledge: &Knowledge<'_>, source: IpAddr, destination: IpAddr) -> Explanation {
    let Knowledge {
        config,
        snapshot,
        surroundings,
        ..
    } = *knowledge;
    let from = place(config, snapshot, surroundings, source);
    let to = place(config, snapshot, surroundings, destination);
    let mut story = Story::default();
    story.tell("source", format!("{source} is {from}"));
    if let Some(claim) = opted_out(config, snapshot).and_then(|claims| claims.get(&source)) {
        story.tell(
            "source",
            format!(
                "it is pod {}, which has opted out by the label of its {}: what it sends is not encrypted",
                claim.pod, claim.by
            ),
        );
    }
    story.tell("destination", format!("{destination} is {to}"));
    if let Some(zone) = zone_between(knowledge, &from, &to) {
        story.tell(
            "destination",
            format!("both are in zone {zone}, inside which nothing is encrypted (`encrypt.scope`)"),
        );
    }
    let (outcome, because) = match (from.is_here(), to.is_here()) {
        (true, _) => leaving(knowledge, &from, source, destination, &mut story),
        (false, true) => arriving(knowledge, &from, source, destination, &mut story),
        (false, false) => (
            Outcome::Elsewhere,
            "neither end is on this node; ask the node that has the source".to_owned(),
        ),
    };
    Explanation {
        version: VERSION,
        source,
        destination,
        outcome,
        because,
        steps: story.0,
    }
}

/// The zone inside which a packet stays, where that keeps it from being encrypted.
fn zone_between<'a>(knowledge: &Knowledge<'a>, from: &Place, to: &Place) -> Option<&'a Zone> {
    let node = match (from, to) {
        (Place::PeerPod(node) | Place::Peer(node), here) | (here, Place::PeerPod(node) | Place::Peer(node))
            if here.is_here() =>
        {
            node
        }
        _ => return None,
    };
    knowledge.peers.get(node)?.in_zone.as_ref()
}

/// A packet that starts on this node.
fn leaving(
    knowledge: &Knowledge<'_>,
    from: &Place,
    source: IpAddr,
    destination: IpAddr,
    story: &mut Story,
) -> (Outcome, String) {
    let config = knowledge.config;
    let hop = knowledge.hop;
    story.tell("route", describe(hop));
    if matches!(hop.kind, HopKind::Local | HopKind::Anycast | HopKind::Broadcast) {
        return (Outcome::Local, "it is for this node and meets no wire".to_owned());
    }
    let Some(device) = outgoing(hop) else {
        return (Outcome::Dropped, format!("the kernel does not send it: {}", hop.kind));
    };
    if let Some(lane) = Lane::of_device(device, &config.encryption) {
        return through_the_tunnel(knowledge, lane, destination, story);
    }
    let end = wrapped(knowledge, device, destination);
    // From here on what counts is where the packet goes outside.
    let (device, outer_destination) = match end {
        None => (device, destination),
        Some(end) => {
            let (kind, vni, through) = (end.kind, config.routing.vni, end.device);
            story.tell(
                "overlay",
                format!(
                    "{through} wraps it in {kind} {vni}, from {} to {}",
                    end.local, end.remote
                ),
            );
            let hop = knowledge.surroundings.hops.get(&end.remote);
            let Some(uplink) = hop.and_then(outgoing) else {
                return (Outcome::Dropped, format!("the kernel has no route to {}", end.remote));
            };
            (uplink, end.remote)
        }
    };
    if knowledge.surroundings.pod_devices.contains(device) {
        return (Outcome::Local, format!("it stays on this node, behind {device}"));
    }
    if !attached_at(knowledge.gate, Hook::Egress).contains(device) {
        story.tell(
            "gate",
            format!("{device} has no gate: it is neither an uplink nor a pod's device"),
        );
        return (
            Outcome::Plain,
            format!("it leaves by {device}, which is not an uplink; name it in `uplinks` if it leads to the underlay"),
        );
    }
    let exempt = config
        .exempt
        .iter()
        .any(|range| range.contains(source) || range.contains(destination));
    let has_opted_out = opted_out(config, knowledge.snapshot).is_some_and(|claims| claims.contains_key(&source));
    let exempt = exempt || has_opted_out;
    let mark = if exempt && *from == Place::OwnPod {
        config.gate.plain_mark.value()
    } else {
        0
    };
    let facts = Facts {
        direction: Direction::Egress,
        source,
        destination,
        protocol: TCP,
        ports: None,
        mark,
        overlay: end.map(|end| Wrapping {
            vni: config.routing.vni.number(),
            source: end.local,
            destination: end.remote,
        }),
    };
    match verdict(knowledge, &facts) {
        Err(reason) => (Outcome::Dropped, reason),
        Ok((Action::Redirect(index), reason, _)) => {
            let mut lanes = knowledge.surroundings.lanes.iter();
            let Some((lane, _)) = lanes.find(|(_, device)| device.index == index) else {
                return (
                    Outcome::Dropped,
                    format!("the gate turns it into device {index}, which is gone"),
                );
            };
            let into = lane.device(&config.encryption);
            story.tell(
                "gate",
                format!("{device} egress: {}; turned into {into}", reason.as_str()),
            );
            through_the_tunnel(knowledge, *lane, outer_destination, story)
        }
        Ok((Action::Drop, reason, _)) => {
            story.tell("gate", format!("{device} egress: {}; dropped", reason.as_str()));
            (Outcome::Dropped, why(reason).to_owned())
        }
        Ok((Action::Pass, reason, audited)) => {
            let audit = if audited { ", which enforce would drop" } else { "" };
            story.tell("gate", format!("{device} egress: {}; passes{audit}", reason.as_str()));
            (
                Outcome::Plain,
                format!("it leaves {device} in the clear: {}", why(reason)),
            )
        }
    }
}

/// The overlay end through which a packet goes that the kernel sends by `device`.
fn wrapped<'a>(knowledge: &Knowledge<'a>, device: &str, destination: IpAddr) -> Option<&'a End> {
    let has_it = |peer: &&PlannedPeer| {
        peer.verified
            .pod_prefixes
            .iter()
            .any(|prefix| prefix.contains(destination))
    };
    let peer = knowledge.peers.values().find(has_it)?;
    peer.overlay.as_ref().filter(|end| end.device == device)
}

/// A packet that is for this node and starts elsewhere.
fn arriving(
    knowledge: &Knowledge<'_>,
    from: &Place,
    source: IpAddr,
    destination: IpAddr,
    story: &mut Story,
) -> (Outcome, String) {
    let facts = Facts {
        direction: Direction::Ingress,
        source,
        destination,
        protocol: TCP,
        ports: None,
        mark: 0,
        overlay: None,
    };
    let in_the_clear = match verdict(knowledge, &facts) {
        Err(reason) => return (Outcome::Dropped, reason),
        Ok(verdict) => verdict,
    };
    if let Place::PeerPod(node) | Place::Peer(node) = from
        && in_the_clear.0 == Action::Drop
    {
        let owners = knowledge.tunnels.values().filter_map(|device| owner(device, source));
        return match owners.map(|(key, _)| key).next() {
            Some(key) => {
                story.tell(
                    "tunnel",
                    format!(
                        "accepted only when decrypted from peer {node} (key {})",
                        key.fingerprint()
                    ),
                );
                story.tell(
                    "gate",
                    format!(
                        "in the clear on an uplink it would be dropped: {}",
                        in_the_clear.1.as_str()
                    ),
                );
                (
                    Outcome::Encrypted,
                    format!("it arrives encrypted from {node}, or not at all"),
                )
            }
            None => (
                Outcome::Dropped,
                format!("the tunnel has no peer that may send from {source}"),
            ),
        };
    }
    let (action, reason, audited) = in_the_clear;
    let audit = if audited { ", which enforce would drop" } else { "" };
    story.tell("gate", format!("uplink ingress: {}{audit}", reason.as_str()));
    match action {
        Action::Drop => (Outcome::Dropped, why(reason).to_owned()),
        Action::Pass | Action::Redirect(_) => (Outcome::Plain, format!("it arrives in the clear: {}", why(reason))),
    }
}

fn through_the_tunnel(
    knowledge: &Knowledge<'_>,
    lane: Lane,
    destination: IpAddr,
    story: &mut Story,
) -> (Outcome, String) {
    let device = knowledge.tunnels.get(&lane);
    let Some((key, peer)) = device.and_then(|device| owner(device, destination)) else {
        story.tell("tunnel", format!("no peer's allowed IPs contain {destination}"));
        return (Outcome::Dropped, "no tunnel leads to it".to_owned());
    };
    let has_it = |planned: &PlannedPeer| planned.pairs.iter().any(|pair| pair.peer == key);
    let node = knowledge.peers.iter().find(|(_, planned)| has_it(planned));
    let node = node.map_or_else(|| "an unknown node".to_owned(), |(name, _)| name.to_string());
    let endpoint = peer
        .endpoint
        .map_or_else(|| "no known endpoint".to_owned(), |endpoint| endpoint.to_string());
    let handshake = match peer.last_handshake {
        None => "no handshake yet, so it waits for one".to_owned(),
        Some(at) => format!(
            "last handshake {} s ago",
            knowledge.now.duration_since(at).unwrap_or_default().as_secs()
        ),
    };
    story.tell(
        "tunnel",
        format!(
            "encrypted for {node} (key {}), sent to {endpoint}; {handshake}",
            key.fingerprint()
        ),
    );
    (Outcome::Encrypted, format!("it leaves this node encrypted for {node}"))
}

/// The peer to whom an address belongs, by the longest allowed IP that contains it.
fn owner(device: &Device, address: IpAddr) -> Option<(PublicKey, &ObservedPeer)> {
    let claims = device
        .peers
        .iter()
        .flat_map(|(key, peer)| peer.allowed_ips.iter().map(move |prefix| (prefix, key, peer)));
    let longest = claims
        .filter(|(prefix, ..)| prefix.contains(address))
        .max_by_key(|(prefix, ..)| prefix.length());
    longest.map(|(_, key, peer)| (*key, peer))
}

/// The gate's verdict over the table that lies in the kernel.
fn verdict(knowledge: &Knowledge<'_>, facts: &Facts) -> Result<(Action, Reason, bool), String> {
    let Some(table) = &knowledge.gate.table else {
        return Err("the gate has no table yet; nothing protected passes".to_owned());
    };
    let verdict = shroud_ebpf::decide(table, facts).map_err(|error| error.to_string())?;
    Ok((verdict.action, verdict.reason, verdict.audited))
}

fn describe(hop: &Hop) -> String {
    let mut text = hop.kind.to_string();
    if let Some(device) = &hop.device {
        text.push_str(&format!(", dev {device}"));
    }
    if let Some(via) = hop.via {
        text.push_str(&format!(", via {via}"));
    }
    if let Some(mtu) = hop.mtu {
        text.push_str(&format!(", mtu {mtu}"));
    }
    text
}

/// A reason of the gate in a sentence.
fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::NotIp => "it is not IP",
        Reason::Unprotected => "source or destination is not protected",
        Reason::Tunnel => "it is the tunnel's own packet",
        Reason::Plain => "the configuration does not want it encrypted",
        Reason::Off => "the gate is off",
        Reason::Encrypted => "it is protected and has an encrypted path",
        Reason::UnknownNode => "it is protected, and no node of the mesh owns the destination",
        Reason::Local => "no pod of this node has the destination's address, and it must not look for it outside",
        Reason::Fenced => "the destination's node has no usable key or is refused",
        Reason::NoDevice => "the encryption device is missing",
        Reason::Overlay => "it is protected traffic inside an overlay packet",
        Reason::ClearText => "it comes in the clear from another node's pod address",
        Reason::SpoofedSource => "it comes from the underlay with the address of a pod of this node",
        Reason::OpenPort => "it is between nodes, and its port stays open",
        Reason::Decrypted => "it came out of the tunnel, and from whom it says",
        Reason::Malformed => "it says it is IP and cannot be read",
    }
}

/// The devices on which a program of ours hangs at this place.
pub(crate) fn attached_at(gate: &shroud_ebpf::Observed, hook: Hook) -> BTreeSet<String> {
    gate.attachments
        .keys()
        .filter(|attachment| attachment.hook == hook)
        .map(|attachment| attachment.device.clone())
        .collect()
}

/// The steps, in the order in which a packet takes them.
#[derive(Default)]
struct Story(Vec<Step>);

impl Story {
    fn tell(&mut self, stage: &str, says: String) {
        self.0.push(Step {
            stage: stage.to_owned(),
            says,
        });
    }
}
