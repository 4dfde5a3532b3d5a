//! Reads Ethernet frames as far as a verdict needs: which kind it is, and whether the underlay may carry it.
//!
//! The rules are an allow-list. What they do not know is a stranger, however harmless it may be.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// From here on, Linux gives a port to whoever asks for any (`ip_local_port_range`); two flows differ in it and are alike.
const EPHEMERAL: u16 = 32768;

/// What the underlay may carry besides ARP, neighbour discovery and multicast listener reports.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// UDP ports on which nodes speak WireGuard; the payload must look like it, too.
    pub listen_ports: BTreeSet<u16>,
    /// Ranges that never appear as an outer address, whatever the port.
    pub protected: Vec<IpNet>,
    /// Flows that a test declares.
    pub declared: Vec<Declared>,
}

/// A flow that is expected on the wire in the clear.
#[derive(Clone, Debug)]
pub struct Declared {
    /// Its name in the evidence.
    pub name: &'static str,
    /// One end and the other; both directions match.
    pub between: (IpNet, IpNet),
    /// The IP protocol, or any.
    pub protocol: Option<u8>,
}

/// The verdict on a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class<'a> {
    /// Allowed by the rule of this name.
    Allowed(&'a str),
    /// Allowed by none.
    Stranger,
}

/// How much a summary tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Enough to group frames of a kind: no ports, no lengths.
    Kind,
    /// Everything that was read.
    Full,
}

impl Allowed {
    /// Only WireGuard on this port and the three behind it, which are in use while keys change, with nothing of `protected` as outer address.
    pub fn wireguard(listen_port: u16, protected: Vec<IpNet>) -> Allowed {
        Allowed {
            listen_ports: (listen_port..=listen_port + 3).collect(),
            protected,
            declared: Vec::new(),
        }
    }

    /// As before, and this flow.
    pub fn and(mut self, name: &'static str, between: (IpNet, IpNet), protocol: Option<u8>) -> Allowed {
        self.declared.push(Declared {
            name,
            between,
            protocol,
        });
        self
    }
}

/// An IP packet, as far as it could be read.
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// A fragment other than the first has no transport header.
    later_fragment: bool,
    payload: &'a [u8],
}

/// Judges a frame.
pub fn classify<'a>(frame: &[u8], allowed: &'a Allowed) -> Class<'a> {
    let Some((kind, rest)) = ethernet(frame) else {
        return Class::Stranger;
    };
    if kind == ARP {
        return Class::Allowed("ARP");
    }
    let Some(packet) = packet(kind, rest) else {
        return Class::Stranger;
    };

    for declared in &allowed.declared {
        let (one, other) = &declared.between;
        let ends = (one.contains(&packet.source) && other.contains(&packet.destination))
            || (other.contains(&packet.source) && one.contains(&packet.destination));
        if ends && declared.protocol.is_none_or(|protocol| protocol == packet.protocol) {
            return Class::Allowed(declared.name);
        }
    }
    let is_protected = |address: &IpAddr| allowed.protected.iter().any(|range| range.contains(address));
    if packet.later_fragment || is_protected(&packet.source) || is_protected(&packet.destination) {
        return Class::Stranger;
    }
    match (packet.protocol, packet.payload.first()) {
        // RFC 4861 133..=136 (redirects, 137, are not expected), RFC 2710 and RFC 3810 130..=132 and 143.
        (ICMPV6, Some(133..=136)) => Class::Allowed("ND"),
        (ICMPV6, Some(130..=132 | 143)) => Class::Allowed("MLD"),
        (UDP, _) if is_wireguard(packet.payload, allowed) => Class::Allowed("WireGuard"),
        // RFC 792 and RFC 4443: unreachable, time exceeded, parameter problem, packet too big.
        (ICMP, Some(3 | 11 | 12)) if quotes_wireguard(IPV4, packet.payload, allowed) => {
            Class::Allowed("ICMP about WireGuard")
        }
        (ICMPV6, Some(1..=4)) if quotes_wireguard(IPV6, packet.payload, allowed) => {
            Class::Allowed("ICMP about WireGuard")
        }
        _ => Class::Stranger,
    }
}

/// Says in words what a frame is.
pub fn summary(frame: &[u8], detail: Detail) -> String {
    let Some((kind, rest)) = ethernet(frame) else {
        return format!("{} bytes, no Ethernet header", frame.len());
    };
    let Some(packet) = packet(kind, rest) else {
        return format!("ethertype {kind:#06x}");
    };
    let mut text = format!("{} > {} ", packet.source, packet.destination);
    match packet.protocol {
        ICMP => text.push_str("ICMP"),
        ICMPV6 => text.push_str("ICMPv6"),
        TCP => text.push_str("TCP"),
        UDP => text.push_str("UDP"),
        other => text.push_str(&format!("protocol {other}")),
    }
    if packet.later_fragment {
        text.push_str(" fragment");
    } else if matches!(packet.protocol, ICMP | ICMPV6) {
        if let Some([kind, code]) = packet.payload.first_chunk() {
            text.push_str(&format!(" type {kind} code {code}"));
        }
    } else if detail == Detail::Full {
        if let Some((from, to)) = ports(packet.payload) {
            text.push_str(&format!(" {from} > {to}"));
        }
    } else if packet.protocol == UDP
        && let Some((_, to)) = ports(packet.payload)
        && to < EPHEMERAL
    {
        // Tells a tunnel on a wrong port from a message in the clear on the right one.
        text.push_str(&format!(" to port {to}"));
    }
    if detail == Detail::Full {
        text.push_str(&format!(", {} bytes", frame.len()));
    }
    text
}

fn ethernet(frame: &[u8]) -> Option<(u16, &[u8])> {
    let (header, rest) = frame.split_first_chunk::<14>()?;
    Some((u16::from_be_bytes([header[12], header[13]]), rest))
}

fn packet(kind: u16, bytes: &[u8]) -> Option<Packet<'_>> {
    match kind {
        IPV4 => ipv4(bytes),
        IPV6 => ipv6(bytes),
        _ => None,
    }
}

/// RFC 791.
fn ipv4(bytes: &[u8]) -> Option<Packet<'_>> {
    let header = bytes.first_chunk::<20>()?;
    if header[0] >> 4 != 4 {
        return None;
    }
    let payload = bytes.get(usize::from(header[0] & 0x0f).max(5) * 4..)?;
    Some(Packet {
        source: Ipv4Addr::from([header[12], header[13], header[14], header[15]]).into(),
        destination: Ipv4Addr::from([header[16], header[17], header[18], header[19]]).into(),
        protocol: header[9],
        later_fragment: u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0,
        payload,
    })
}

/// RFC 8200, with the extension headers a receiver walks through.
fn ipv6(bytes: &[u8]) -> Option<Packet<'_>> {
    let (header, mut rest) = bytes.split_first_chunk::<40>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let source = Ipv6Addr::from(*header[8..].first_chunk::<16>()?);
    let destination = Ipv6Addr::from(*header[24..].first_chunk::<16>()?);
    let mut protocol = header[6];
    let mut later_fragment = false;
    loop {
        match protocol {
            // Hop-by-hop, routing, destination options: length in units of 8 bytes beyond the first 8.
            0 | 43 | 60 => {
                let [next, length] = *rest.first_chunk()?;
                protocol = next;
                rest = rest.get((usize::from(length) + 1) * 8..)?;
            }
            44 => {
                let (fragment, after) = rest.split_first_chunk::<8>()?;
                protocol = fragment[0];
                later_fragment = u16::from_be_bytes([fragment[2], fragment[3]]) & 0xfff8 != 0;
                rest = after;
                if later_fragment {
                    break;
                }
            }
            _ => break,
        }
    }
    Some(Packet {
        source: source.into(),
        destination: destination.into(),
        protocol,
        later_fragment,
        payload: rest,
    })
}

fn ports(payload: &[u8]) -> Option<(u16, u16)> {
    let [a, b, c, d] = *payload.first_chunk()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// A WireGuard port, and behind it a type, three zeros and a fitting length (WireGuard paper, section 5.4).
fn is_wireguard(udp: &[u8], allowed: &Allowed) -> bool {
    let Some((_, message)) = udp.split_at_checked(8) else {
        return false;
    };
    let right_shape = match message.first_chunk() {
        Some([1, 0, 0, 0]) => message.len() == 148,
        Some([2, 0, 0, 0]) => message.len() == 92,
        Some([3, 0, 0, 0]) => message.len() == 64,
        // With segmentation offload several messages lie behind one header.
        Some([4, 0, 0, 0]) => message.len() >= 32,
        _ => false,
    };
    right_shape && has_listen_port(udp, allowed)
}

fn has_listen_port(udp: &[u8], allowed: &Allowed) -> bool {
    ports(udp).is_some_and(|(from, to)| allowed.listen_ports.contains(&from) || allowed.listen_ports.contains(&to))
}

/// Whether an ICMP error quotes a packet from or to a WireGuard port.
fn quotes_wireguard(kind: u16, icmp: &[u8], allowed: &Allowed) -> bool {
    let quoted = icmp.get(8..).and_then(|quoted| packet(kind, quoted));
    quoted.is_some_and(|quoted| quoted.protocol == UDP && has_listen_port(quoted.payload, allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wireguard_between_nodes_is_allowed() {
        let data = udp(
            "172.18.0.1",
            "172.18.0.2",
            51820,
            &[&[4, 0, 0, 0][..], &[7; 28]].concat(),
        );

        assert_eq!(classify(&data, &rules()), Class::Allowed("WireGuard"));
    }

    #[test]
    fn text_on_the_wireguard_port_is_a_stranger() {
        let text = udp(
            "172.18.0.1",
            "172.18.0.2",
            51820,
            b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        );

        assert_eq!(classify(&text, &rules()), Class::Stranger);
        assert_eq!(
            summary(&text, Detail::Full),
            "172.18.0.1 > 172.18.0.2 UDP 40000 > 51820, 79 bytes"
        );
    }

    #[test]
    fn a_pod_that_speaks_wireguard_itself_is_a_stranger() {
        let data = udp(
            "10.244.1.10",
            "172.18.0.2",
            51820,
            &[&[4, 0, 0, 0][..], &[7; 28]].concat(),
        );

        assert_eq!(classify(&data, &rules()), Class::Stranger);
    }

    #[test]
    fn wireguard_on_another_port_is_a_stranger() {
        let data = udp(
            "172.18.0.1",
            "172.18.0.2",
            51824,
            &[&[4, 0, 0, 0][..], &[7; 28]].concat(),
        );

        assert_eq!(classify(&data, &rules()), Class::Stranger);
    }

    #[test]
    fn a_declared_flow_is_allowed_in_both_directions() {
        let rules = rules().and(
            "web",
            ("10.244.0.0/16".parse().unwrap(), "192.0.2.0/24".parse().unwrap()),
            Some(UDP),
        );

        assert_eq!(
            classify(&udp("10.244.1.10", "192.0.2.1", 80, b"x"), &rules),
            Class::Allowed("web")
        );
        assert_eq!(
            classify(&udp("192.0.2.1", "10.244.1.10", 80, b"x"), &rules),
            Class::Allowed("web")
        );
        assert_eq!(
            classify(&udp("192.0.2.1", "172.18.0.1", 80, b"x"), &rules),
            Class::Stranger
        );
    }

    #[test]
    fn an_icmp_error_is_allowed_only_about_wireguard() {
        let about = |port| {
            let quoted = &udp("172.18.0.1", "172.18.0.2", port, &[0; 8])[14..];
            ip(
                ICMP,
                "172.18.0.2",
                "172.18.0.1",
                &[&[3, 3, 0, 0, 0, 0, 0, 0][..], quoted].concat(),
            )
        };

        assert_eq!(
            classify(&about(51820), &rules()),
            Class::Allowed("ICMP about WireGuard")
        );
        assert_eq!(classify(&about(53), &rules()), Class::Stranger);
    }

    #[test]
    fn every_cut_of_a_frame_is_judged_without_a_panic() {
        let frame = udp("172.18.0.1", "172.18.0.2", 51820, &[4; 40]);
        let mut six = [
            &[0; 12][..],
            &IPV6.to_be_bytes(),
            &[0x60, 0, 0, 0, 0, 0, 0, 64],
            &[0; 32],
        ]
        .concat();
        six.extend([
            43, 0, 0, 0, 0, 0, 0, 0, 44, 0, 0, 0, 0, 0, 0, 0, UDP, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4,
        ]);

        for frame in [frame, six] {
            for length in 0..frame.len() {
                classify(&frame[..length], &rules());
                summary(&frame[..length], Detail::Full);
            }
        }
    }

    fn rules() -> Allowed {
        Allowed::wireguard(51820, vec!["10.244.0.0/16".parse().unwrap()])
    }

    fn udp(source: &str, destination: &str, port: u16, payload: &[u8]) -> Vec<u8> {
        let ports = [40000u16.to_be_bytes(), port.to_be_bytes(), [0; 2], [0; 2]].concat();
        ip(UDP, source, destination, &[&ports, payload].concat())
    }

    fn ip(protocol: u8, source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
        let mut header = [0; 20];
        header[0] = 0x45;
        header[9] = protocol;
        header[12..16].copy_from_slice(&source.parse::<Ipv4Addr>().unwrap().octets());
        header[16..].copy_from_slice(&destination.parse::<Ipv4Addr>().unwrap().octets());
        [&[0; 12][..], &IPV4.to_be_bytes(), &header, payload].concat()
    }
}
