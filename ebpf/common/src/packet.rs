//! Reads the few header fields that the gate decides by.
//!
//! Each header is copied out at a computed offset, so that neither the verifier nor a reader has to follow pointers. What is not IP is
//! not our business; what says it is IP and cannot be read is [`Shape::Unreadable`].

use core::num::NonZeroUsize;
use core::ops::RangeInclusive;

use crate::layout::Settings;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// An Ethernet frame inside Geneve (RFC 8926 §3.4).
const ETHERTYPE_BRIDGED: u16 = 0x6558;
/// 802.1Q, 802.1ad, and what came before 802.1ad.
const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const TCP: u8 = 6;
const SCTP: u8 = 132;
/// Router and neighbour solicitation and advertisement, and redirect (RFC 4861 §4).
const NEIGHBOUR_DISCOVERY: RangeInclusive<u8> = 133..=137;
const UDP_HEADER: usize = 8;

// The IPv6 extension headers (IANA "Protocol Numbers") that can stand before the upper-layer protocol of a readable packet.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// More VLAN tags in the payload than any switch sends.
const VLAN_TAGS: usize = 2;
/// More IPv6 extension headers than any honest packet carries.
const EXTENSION_HEADERS: usize = 4;

/// The longest header part that is read at once, in bytes.
pub const LONGEST_READ: usize = 20;

/// A packet's bytes. The BPF program copies what is asked for into one small buffer, since its stack holds 512 bytes in all.
pub trait Bytes {
    /// `N` bytes (at most [`LONGEST_READ`]) that begin at `offset`; `None` if the packet ends before.
    fn read<const N: usize>(&mut self, offset: usize) -> Option<&[u8; N]>;

    /// Reads an IP header into `flow` and says where what follows begins; `None` if it is not a whole header.
    ///
    /// A method, so that the BPF program can put one function of its own in the place of a copy for each use.
    #[inline(always)]
    fn read_ip(&mut self, family: Family, offset: usize, flow: &mut Flow) -> Option<NonZeroUsize>
    where
        Self: Sized,
    {
        ip(self, family, offset, flow)
    }
}

impl Bytes for &[u8] {
    fn read<const N: usize>(&mut self, offset: usize) -> Option<&[u8; N]> {
        self.get(offset..)?.first_chunk()
    }
}

/// What a device puts before the IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// An Ethernet header, perhaps with VLAN tags.
    Ethernet,
    /// Nothing (TUN, PPP, IP tunnels).
    Ip,
}

/// Which way a packet passes the gate. The numbers are those in the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Direction {
    /// From this node to the underlay.
    Egress = 1,
    /// From the underlay to this node.
    Ingress = 2,
    /// Out of the encryption device to this node: what the tunnel has decrypted.
    Decrypted = 3,
}

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Family {
    // Zero, so that `Packet::NOT_IP` is nothing but zeroes: anything else becomes a read-only map of its own, copied byte by byte.
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

/// An address of either family. Aligned, so that it is copied as two words and not as sixteen bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Address {
    /// The address; an IPv4 one in the first four bytes, then zeroes.
    pub bytes: [u8; 16],
    /// Which family the bytes are of.
    pub family: Family,
}

impl Address {
    const ZERO: Self = Self {
        family: Family::V4,
        bytes: [0; 16],
    };

    /// An IPv4 address.
    #[inline(always)]
    pub fn v4(bytes: [u8; 4]) -> Self {
        // Widening the number keeps its bytes first and fills up with zeroes, in two stores.
        Self {
            family: Family::V4,
            bytes: u128::from(u32::from_le_bytes(bytes)).to_le_bytes(),
        }
    }

    /// An IPv6 address.
    #[inline(always)]
    pub fn v6(bytes: [u8; 16]) -> Self {
        Self {
            family: Family::V6,
            bytes,
        }
    }
}

/// What follows the IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Upper {
    /// A protocol without ports.
    Other = 0,
    /// UDP, TCP or SCTP, whose ports are known.
    Ports,
    /// A later fragment: whatever it carries was named in the first one.
    Fragment,
    /// The header is cut off, or hides behind too many extension headers.
    Unreadable,
}

/// Who talks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Where the packet says it comes from.
    pub source: Address,
    /// Where it goes.
    pub destination: Address,
    /// IP protocol number.
    pub protocol: u8,
    /// What follows the IP header.
    pub upper: Upper,
    /// Source port, network order; zero unless there are ports. Not inside [`Upper::Ports`], because the verifier refuses to see the
    /// undefined bytes of the other variants copied.
    pub source_port: [u8; 2],
    /// Destination port, likewise.
    pub destination_port: [u8; 2],
    /// ICMPv6 type of an outer packet; 0, which no message has, if it is not ICMPv6.
    pub icmpv6: u8,
}

impl Flow {
    const UNKNOWN: Self = Self {
        source: Address::ZERO,
        destination: Address::ZERO,
        protocol: 0,
        upper: Upper::Other,
        source_port: [0; 2],
        destination_port: [0; 2],
        icmpv6: 0,
    };

    /// Whether this is UDP whose ports are known.
    #[inline(always)]
    pub fn is_udp(&self) -> bool {
        self.protocol == UDP && self.upper == Upper::Ports
    }

    /// Whether this is how IPv6 finds its neighbours.
    #[inline(always)]
    pub fn is_neighbour_discovery(&self) -> bool {
        NEIGHBOUR_DISCOVERY.contains(&self.icmpv6)
    }

    /// Reads the ports, behind IPv6 extension headers (RFC 8200 §4) if need be; says where the upper-layer header begins.
    #[inline(always)]
    fn read_upper<B: Bytes>(&mut self, bytes: &mut B, start: usize) -> usize {
        let mut offset = start;
        if self.source.family == Family::V6 {
            for _ in 0..EXTENSION_HEADERS {
                if !is_extension(self.protocol) {
                    break;
                }
                let Some(&[following, length, high, low]) = bytes.read::<4>(offset) else {
                    self.upper = Upper::Unreadable;
                    return offset;
                };
                offset += match self.protocol {
                    FRAGMENT => 8,
                    AUTHENTICATION => (usize::from(length) + 2) * 4,
                    _ => (usize::from(length) + 1) * 8,
                };
                let later_fragment = self.protocol == FRAGMENT && u16::from_be_bytes([high, low]) & 0xfff8 != 0;
                self.protocol = following;
                if later_fragment {
                    self.upper = Upper::Fragment;
                    return offset;
                }
            }
            if is_extension(self.protocol) {
                self.upper = Upper::Unreadable;
                return offset;
            }
        }
        self.read_ports(bytes, offset);
        if self.protocol == ICMPV6 && self.upper == Upper::Other {
            self.icmpv6 = bytes.read::<1>(offset).map_or(0, |[kind]| *kind);
        }
        offset
    }

    /// Reads the ports, if the protocol has any and this is not a later fragment.
    #[inline(always)]
    fn read_ports<B: Bytes>(&mut self, bytes: &mut B, offset: usize) {
        if self.upper == Upper::Fragment {
            return;
        }
        if self.protocol != UDP && self.protocol != TCP && self.protocol != SCTP {
            self.upper = Upper::Other;
            return;
        }
        let Some(&[a, b, c, d]) = bytes.read::<4>(offset) else {
            self.upper = Upper::Unreadable;
            return;
        };
        self.source_port = [a, b];
        self.destination_port = [c, d];
        self.upper = Upper::Ports;
    }
}

/// What a packet is, and so which of its flows are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Shape {
    /// Not IP: neither flow is known.
    NotIp = 0,
    /// Says it is IP, but is cut off or contradicts itself: neither flow is known.
    Unreadable,
    /// IP, and nobody's overlay: the outer flow is known.
    Ip,
    /// VXLAN or Geneve with something that is not IP inside, such as ARP: the outer flow is known.
    OverlayOfNotIp,
    /// VXLAN or Geneve whose inside cannot be read: the outer flow is known.
    OverlayOfUnreadable,
    /// VXLAN or Geneve with IP inside: both flows are known.
    OverlayOfIp,
}

/// A packet, as far as the gate looks into it.
///
/// One flat piece of memory, filled in place: with nested `Option`s and `Result`s the compiler keeps several copies, more than a BPF
/// program's stack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// What it is; says which of the flows below mean something.
    pub shape: Shape,
    /// The overlay's VNI, if the shape is one of an overlay.
    pub vni: u32,
    /// The packet's own flow.
    pub outer: Flow,
    /// The flow of the packet it carries.
    pub inner: Flow,
}

impl Packet {
    /// A packet that is not IP.
    pub const NOT_IP: Self = Self {
        shape: Shape::NotIp,
        vni: 0,
        outer: Flow::UNKNOWN,
        inner: Flow::UNKNOWN,
    };

    /// Reads a packet.
    #[inline(always)]
    pub fn parse<B: Bytes>(bytes: &mut B, link: Link, settings: &Settings) -> Self {
        let mut packet = Self::NOT_IP;
        packet.read(bytes, link, settings);
        packet
    }

    /// Reads a packet into this one.
    #[inline(always)]
    pub fn read<B: Bytes>(&mut self, bytes: &mut B, link: Link, settings: &Settings) {
        self.shape = self.read_flows(bytes, link, settings);
    }

    /// The flow that matters to whoever uses the network, if the packet is IP: the inner one, if there is one.
    #[inline(always)]
    pub fn flow(&self) -> Option<&Flow> {
        match self.shape {
            Shape::NotIp | Shape::Unreadable => None,
            Shape::Ip | Shape::OverlayOfNotIp | Shape::OverlayOfUnreadable => Some(&self.outer),
            Shape::OverlayOfIp => Some(&self.inner),
        }
    }

    #[inline(always)]
    fn read_flows<B: Bytes>(&mut self, bytes: &mut B, link: Link, settings: &Settings) -> Shape {
        let network = match link {
            Link::Ethernet => ethernet(bytes, 0),
            Link::Ip => bare(bytes),
        };
        let (family, offset) = match network {
            Network::Ip(family, offset) => (family, offset),
            Network::NotIp => return Shape::NotIp,
            Network::Unreadable => return Shape::Unreadable,
        };
        let Some(payload) = bytes.read_ip(family, offset, &mut self.outer) else {
            return Shape::Unreadable;
        };
        let payload = self.outer.read_upper(bytes, payload.get());
        if !self.outer.is_udp() {
            return Shape::Ip;
        }
        let port = self.outer.destination_port;
        let inside = if is_among(port, &settings.vxlan_ports) {
            vxlan(bytes, payload + UDP_HEADER, &mut self.vni)
        } else if is_among(port, &settings.geneve_ports) {
            geneve(bytes, payload + UDP_HEADER, &mut self.vni)
        } else {
            return Shape::Ip;
        };
        let (family, offset) = match inside {
            Network::Ip(family, offset) => (family, offset),
            Network::NotIp => return Shape::OverlayOfNotIp,
            Network::Unreadable => return Shape::OverlayOfUnreadable,
        };
        match bytes.read_ip(family, offset, &mut self.inner) {
            // No decision asks for the inner ports. Those that are not behind extension headers are there for people.
            Some(payload) => self.inner.read_ports(bytes, payload.get()),
            None => return Shape::OverlayOfUnreadable,
        }
        Shape::OverlayOfIp
    }
}

/// Where an IP header begins.
#[derive(Clone, Copy)]
enum Network {
    Ip(Family, usize),
    NotIp,
    /// The packet ends before it says what it is.
    Unreadable,
}

/// Finds the IP header behind an Ethernet header.
#[inline(always)]
fn ethernet<B: Bytes>(bytes: &mut B, start: usize) -> Network {
    let mut offset = start + 12;
    for _ in 0..=VLAN_TAGS {
        let Some(&ethertype) = bytes.read::<2>(offset) else {
            return Network::Unreadable;
        };
        let ethertype = u16::from_be_bytes(ethertype);
        if ethertype == ETHERTYPE_IPV4 {
            return Network::Ip(Family::V4, offset + 2);
        }
        if ethertype == ETHERTYPE_IPV6 {
            return Network::Ip(Family::V6, offset + 2);
        }
        if !ETHERTYPES_VLAN.contains(&ethertype) {
            return Network::NotIp;
        }
        offset += 4;
    }
    Network::NotIp
}

/// Without a link-layer header the first four bits tell the family.
#[inline(always)]
fn bare<B: Bytes>(bytes: &mut B) -> Network {
    match bytes.read::<1>(0) {
        Some([first]) if first >> 4 == 4 => Network::Ip(Family::V4, 0),
        Some([first]) if first >> 4 == 6 => Network::Ip(Family::V6, 0),
        Some(_) => Network::NotIp,
        None => Network::Unreadable,
    }
}

/// VXLAN: eight bytes with the VNI in the fifth to seventh, then an Ethernet frame (RFC 7348 §5).
#[inline(always)]
fn vxlan<B: Bytes>(bytes: &mut B, offset: usize, vni: &mut u32) -> Network {
    let Some(&[_, _, _, _, high, middle, low, _]) = bytes.read::<8>(offset) else {
        return Network::Unreadable;
    };
    *vni = u32::from_be_bytes([0, high, middle, low]);
    ethernet(bytes, offset + 8)
}

/// Geneve: eight bytes with the VNI in the fifth to seventh, options, then what the protocol type says (RFC 8926 §3.4).
#[inline(always)]
fn geneve<B: Bytes>(bytes: &mut B, offset: usize, vni: &mut u32) -> Network {
    let Some(&[options, _, kind_high, kind_low, high, middle, low, _]) = bytes.read::<8>(offset) else {
        return Network::Unreadable;
    };
    *vni = u32::from_be_bytes([0, high, middle, low]);
    let start = offset + 8 + usize::from(options & 0x3f) * 4;
    match u16::from_be_bytes([kind_high, kind_low]) {
        ETHERTYPE_BRIDGED => ethernet(bytes, start),
        ETHERTYPE_IPV4 => Network::Ip(Family::V4, start),
        ETHERTYPE_IPV6 => Network::Ip(Family::V6, start),
        _ => Network::NotIp,
    }
}

/// Reads an IP header into `flow` and says where what follows begins; `None` if it is not a whole header.
#[inline(always)]
pub fn ip<B: Bytes>(bytes: &mut B, family: Family, offset: usize, flow: &mut Flow) -> Option<NonZeroUsize> {
    match family {
        Family::V4 => ipv4(bytes, offset, flow),
        Family::V6 => ipv6(bytes, offset, flow),
    }
}

#[inline(always)]
fn ipv4<B: Bytes>(bytes: &mut B, offset: usize, flow: &mut Flow) -> Option<NonZeroUsize> {
    let header = bytes.read::<20>(offset)?;
    let words = header[0] & 0x0f;
    if header[0] >> 4 != 4 || words < 5 {
        return None;
    }
    flow.source = Address::v4([header[12], header[13], header[14], header[15]]);
    flow.destination = Address::v4([header[16], header[17], header[18], header[19]]);
    flow.protocol = header[9];
    if u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0 {
        flow.upper = Upper::Fragment;
    }
    NonZeroUsize::new(offset + usize::from(words) * 4)
}

#[inline(always)]
fn ipv6<B: Bytes>(bytes: &mut B, offset: usize, flow: &mut Flow) -> Option<NonZeroUsize> {
    let &[version, _, _, _, _, _, next, _] = bytes.read::<8>(offset)?;
    if version >> 4 != 6 {
        return None;
    }
    flow.source = Address::v6(*bytes.read::<16>(offset + 8)?);
    flow.destination = Address::v6(*bytes.read::<16>(offset + 24)?);
    flow.protocol = next;
    NonZeroUsize::new(offset + 40)
}

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
    )
}

#[inline(always)]
fn is_among(port: [u8; 2], ports: &[[u8; 2]]) -> bool {
    port != [0, 0] && ports.contains(&port)
}
