//! F7: somebody in the underlay forges pod sources and overlay packets, floods with handshakes, and sends the tunnel's own packets again,
//! or changed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use shroud_lab::agent::LISTEN_PORT;
use shroud_lab::capture::Direction;
use shroud_lab::capture::tap::Tap;
use shroud_lab::frame::Allowed;
use shroud_lab::topology::GATEWAY;
use shroud_lab::{AgentOptions, Lab, Netns};
use socket2::{Domain, Protocol, Socket, Type};

use crate::attack::Listener;
use crate::field::Field;
use crate::row::Row;

pub(crate) const ROWS: &[Row] = &[
    Row::new(
        "F7/pods",
        "pods' sources are forged in the underlay",
        pod_sources_forged,
    )
    .allows(forged_flows)
    .core(),
    Row::new("F7/vxlan", "overlay packets are forged in the underlay", overlay_forged)
        .allows(forged_overlay)
        .with(|options| AgentOptions {
            mode: "vxlan".to_owned(),
            ..options
        }),
    Row::new("F7/flood", "a flood of handshakes", handshakes_flood),
    Row::new(
        "F7/replay",
        "the tunnel's packets come again, and changed",
        packets_replayed,
    ),
];

/// What a router would forward, as pods talk to the world; and what it would not dare to claim.
const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const STOLEN: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 99);
const VICTIM: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 10);

/// The overlay's number and port, by default.
const OVERLAY: (u32, u16) = (21320, 4789);

/// UDP's number as an IP protocol.
const UDP: u8 = 17;

/// What the forger sends on purpose.
fn forged_flows(_: &Lab, allowed: Allowed) -> Allowed {
    let host = |address: Ipv4Addr| IpNet::from(IpAddr::from(address));
    allowed
        .and("forged", (host(STOLEN), host(VICTIM)), None)
        .and("world", (host(WORLD), host(VICTIM)), None)
}

/// Overlay packets from a node and from the router to another node.
fn forged_overlay(lab: &Lab, allowed: Allowed) -> Allowed {
    let host = |address: Ipv4Addr| IpNet::from(IpAddr::from(address));
    let (a, b) = (lab.node("a").host.v4, lab.node("b").host.v4);
    allowed
        .and("forged", (host(b), host(a)), Some(UDP))
        .and("forged", (host(GATEWAY.0), host(a)), Some(UDP))
}

/// Sends whole IPv4 packets from the underlay's router, whoever they say they are from.
struct Forger(Socket);

impl Forger {
    fn new(netns: &Netns) -> Result<Forger> {
        // The protocol of raw(7) by which the header is ours to write.
        let raw = Protocol::from(255);
        let socket = netns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)).context("open a raw socket"))?;
        Ok(Forger(socket))
    }

    fn send(&self, packet: &[u8], to: Ipv4Addr) -> Result<()> {
        let to = SocketAddr::new(to.into(), 0);
        self.0
            .send_to(packet, &to.into())
            .with_context(|| format!("send {} bytes to {to}", packet.len()))?;
        Ok(())
    }
}

/// A UDP datagram over IPv4 (RFC 791, RFC 768). The kernel fills in the header's checksum; UDP's own, 0, says that there is none.
fn datagram(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Result<Vec<u8>> {
    let length = u16::try_from(payload.len() + 8).context("a datagram's length")?;
    let mut packet = vec![0x45, 0];
    packet.extend((length + 20).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(from.0.octets());
    packet.extend(to.0.octets());
    packet.extend(from.1.to_be_bytes());
    packet.extend(to.1.to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    Ok(packet)
}

fn pod_sources_forged(field: &mut Field) -> Result<()> {
    let victim = field.lab.pod("a0").clone();
    let listener = Listener::bind(&victim.netns, victim.v4.into())?;
    let port = listener.address()?.port();
    let forger = Forger::new(&field.lab.underlay)?;
    for (source, arrives) in [(WORLD, true), (STOLEN, false)] {
        let payload = format!("from {source}");
        for _ in 0..20 {
            forger.send(
                &datagram((source, 7777), (victim.v4, port), payload.as_bytes())?,
                victim.v4,
            )?;
        }
        let heard = listener.heard(payload.as_bytes());
        ensure!((heard > 0) == arrives, "{heard} of 20 datagrams {payload} arrived");
    }
    field.fault();
    field.heals()
}

/// Packets that the gate of a node has dropped as they came in.
fn dropped(field: &mut Field, name: &str) -> Result<u64> {
    let output = field.agent(name).ask(&["gate", "-o", "json"])?;
    let gate: serde_json::Value = serde_json::from_str(&output.stdout).context("read the gate's counters")?;
    let counters = gate["counters"].as_array().into_iter().flatten();
    let dropped = counters.filter(|counter| counter["verdict"] == "drop" && counter["direction"] == "ingress");
    Ok(dropped.filter_map(|counter| counter["packets"].as_u64()).sum())
}

/// An overlay packet as b would send it, with an inner source that is b's; only that it comes in the clear.
fn overlay_forged(field: &mut Field) -> Result<()> {
    let a = field.node("a");
    let victim = field.lab.pod("a0").clone();
    let listener = Listener::bind(&victim.netns, victim.v4.into())?;
    let link = a.host.netns.ip("-o link show type vxlan")?;
    let mac = link
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .context("a VXLAN device")?;
    let mac: Vec<u8> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let forger = Forger::new(&field.lab.underlay)?;
    let before = dropped(field, "a")?;
    let payload = b"from the underlay";
    let inner = datagram((STOLEN, 7777), (victim.v4, listener.address()?.port()), payload)?;
    let mut wrapped = vec![0x08, 0, 0, 0];
    wrapped.extend((OVERLAY.0 << 8).to_be_bytes());
    wrapped.extend(&mac);
    wrapped.extend([2, 0, 0, 0, 0, 7, 0x08, 0]);
    wrapped.extend(checksummed(inner));
    for source in [field.node("b").host.v4, GATEWAY.0] {
        for _ in 0..20 {
            forger.send(
                &datagram((source, 50_000), (a.host.v4, OVERLAY.1), &wrapped)?,
                a.host.v4,
            )?;
        }
    }

    let heard = listener.heard(payload);
    ensure!(heard == 0, "{heard} of 40 forged datagrams arrived");
    field.lasts(1);
    let after = dropped(field, "a")?;
    ensure!(
        after >= before + 40,
        "the gate dropped {} of 40 overlay packets",
        after - before
    );
    field.fault();
    field.heals()
}

/// The packet with its IPv4 header's checksum, which no kernel fills in inside another packet.
fn checksummed(mut packet: Vec<u8>) -> Vec<u8> {
    let words = packet[..20]
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [_, _, high, low] = (!sum).to_be_bytes();
    packet[10..12].copy_from_slice(&[high, low]);
    packet
}

/// Initiations from ever other addresses, some 10,000 a second for four seconds: none has a good MAC, so none costs a curve's product.
fn handshakes_flood(field: &mut Field) -> Result<()> {
    let a = field.node("a").host;
    let forger = Forger::new(&field.lab.underlay)?;
    let begun = Instant::now();
    let mut sent = 0_u32;
    while begun.elapsed() < Duration::from_secs(4) {
        for _ in 0..100 {
            let mut initiation = [0_u8; 148];
            initiation[0] = 1;
            for bytes in initiation[4..].chunks_mut(8) {
                let noise = field.chance.below(u64::MAX).to_be_bytes();
                bytes.copy_from_slice(&noise[..bytes.len()]);
            }
            let [_, _, high, low] = sent.to_be_bytes();
            let from = (Ipv4Addr::new(198, 18, high, low), LISTEN_PORT);
            forger.send(&datagram(from, (a.v4, LISTEN_PORT), &initiation)?, a.v4)?;
            sent += 1;
        }
        let due = begun + Duration::from_micros(100) * sent;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    ensure!(sent > 10_000, "only {sent} initiations were sent");
    field.fault();
    field.heals()
}

/// Whether a frame is a data message of the tunnel over IPv4 that goes into one frame of ours.
fn is_data(frame: &[u8]) -> bool {
    frame.len() <= 1514
        && frame.len() > 90
        && frame[12..14] == [8, 0]
        && frame[14] == 0x45
        && frame[23] == 17
        && frame[42] == 4
}

/// All that b has sent to a lately, again and again, and with one bit changed each. A data message is taken once, and as it was sent:
/// the connections compare every byte.
fn packets_replayed(field: &mut Field) -> Result<()> {
    let a = field.node("a").host;
    let tap = Tap::open(&field.lab, "a")?;
    let frames = tap.frames(300, Direction::ToNode, is_data, Duration::from_secs(20))?;
    let forger = Forger::new(&field.lab.underlay)?;
    for _ in 0..10 {
        for frame in &frames {
            let mut packet = frame[14..].to_vec();
            forger.send(&packet, a.v4)?;
            // Behind the tunnel's own header, so that it still looks like what it is.
            let bit = field.chance.below((packet.len() as u64 - 44) * 8);
            let (byte, bit) = (44 + usize::try_from(bit / 8)?, bit % 8);
            packet[byte] ^= 1 << bit;
            // Without UDP's checksum nobody before WireGuard can tell.
            packet[26..28].copy_from_slice(&[0, 0]);
            forger.send(&packet, a.v4)?;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    field.fault();
    field.heals()
}
