//! Builds packets byte by byte. Checksums are left zero: the gate does not read them, and the tests that send packets use sockets.

use std::net::IpAddr;

/// The VNI of our overlay in every case; each of its bytes is another.
pub(crate) const VNI: u32 = 0x01_0203;

/// An IP packet with this protocol and payload; addresses as text decide the family.
pub(crate) fn ip(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u16;
    match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = vec![0x45, 0];
            packet.extend((20 + length).to_be_bytes());
            packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(payload);
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(payload);
            packet
        }
        _ => panic!("{source} and {destination} are not of one family"),
    }
}

/// An ICMP or ICMPv6 echo request.
pub(crate) fn echo(source: &str, destination: &str) -> Vec<u8> {
    let (protocol, kind) = if source.contains(':') { (58, 128) } else { (1, 8) };
    ip(source, destination, protocol, &[kind, 0, 0, 0, 0, 1, 0, 1])
}

/// A UDP packet.
pub(crate) fn udp(source: &str, destination: &str, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    ip(source, destination, 17, &udp_datagram(ports, payload))
}

/// A UDP header and payload.
pub(crate) fn udp_datagram(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(ports.0.to_be_bytes());
    datagram.extend(ports.1.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// An Ethernet frame around an IP packet.
pub(crate) fn ethernet(packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
    frame(ethertype, packet)
}

/// An Ethernet frame of any type.
pub(crate) fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The frame with one more VLAN tag in its payload.
pub(crate) fn vlan(ethertype: u16, frame: &[u8]) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend(ethertype.to_be_bytes());
    tagged.extend([0, 100]);
    tagged.extend(&frame[12..]);
    tagged
}

/// An ICMPv6 message of this type, such as neighbour discovery's.
pub(crate) fn icmpv6(source: &str, destination: &str, kind: u8) -> Vec<u8> {
    ip(source, destination, 58, &[&[kind][..], &[0; 23]].concat())
}

/// A VXLAN header, of our overlay, around a frame.
pub(crate) fn vxlan(frame: &[u8]) -> Vec<u8> {
    vxlan_of(VNI, frame)
}

/// A VXLAN header around a frame.
pub(crate) fn vxlan_of(vni: u32, frame: &[u8]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(frame);
    payload
}

/// A Geneve header, of our overlay, with eight bytes of options around whatever has this type.
pub(crate) fn geneve(protocol: u16, inner: &[u8]) -> Vec<u8> {
    geneve_of(VNI, protocol, inner)
}

/// A Geneve header with eight bytes of options around whatever has this type.
pub(crate) fn geneve_of(vni: u32, protocol: u16, inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![2, 0];
    payload.extend(protocol.to_be_bytes());
    payload.extend((vni << 8).to_be_bytes());
    payload.extend([1, 2, 3, 1, 9, 9, 9, 9]);
    payload.extend(inner);
    payload
}
