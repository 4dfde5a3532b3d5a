//! The bytes in the gate's maps: fixed sizes, no padding, ports and addresses in network order.
//!
//! Two builds of Shroud meet here during an upgrade. A change that an older program would misread needs a new [`LAYOUT_VERSION`], which
//! is part of the pin path, so that both generations of maps exist side by side until the new program is attached.

use crate::packet::{Address, Direction, Family};

/// The version of everything in this file; part of the pin path.
pub const LAYOUT_VERSION: u32 = 3;

/// Mode: protected traffic without an encrypted path is dropped. Any number that is not listed here means the same.
pub const MODE_ENFORCE: u32 = 1;
/// Mode: what can be encrypted is; what would be dropped passes and is counted.
pub const MODE_AUDIT: u32 = 2;
/// Mode: everything passes; protected traffic is counted.
pub const MODE_OFF: u32 = 3;

/// Path: no owner; of a node, that it is known and traffic to the node itself is not protected.
pub const PATH_NONE: u8 = 0;
/// Path: pods of this node.
pub const PATH_LOCAL: u8 = 1;
/// Path: through the encryption device of the entry.
pub const PATH_ENCRYPTED: u8 = 2;
/// Path: known, but not to be reached. Any number that is not listed here means the same.
pub const PATH_FENCED: u8 = 3;
/// Path: in the clear both ways, because cluster configuration does not want it encrypted.
pub const PATH_PLAIN: u8 = 4;

/// How many UDP ports of the tunnel the settings hold.
pub const LISTEN_PORTS: usize = 4;

/// How many overlay ports of each kind the settings hold.
pub const PORTS: usize = 4;

/// How many open ports the settings hold.
pub const OPEN_PORTS: usize = 16;

/// The overlay of the settings when no overlay is ours: a VNI has 24 bits.
pub const NO_OVERLAY: u32 = u32::MAX;

/// The bits of a [`PrefixKey`] before the address: generation, family, and the reserved bytes.
pub const PREFIX_KEY_BITS: u32 = 32;

/// What an [`Entry`] says of the addresses it covers.
pub mod flag {
    /// The addresses are in a protected range.
    pub const PROTECTED: u8 = 1;
    /// Cluster configuration exempts the addresses.
    pub const EXEMPT: u8 = 2;
    /// This very prefix was declared protected (it did not inherit it from a shorter one).
    pub const DECLARED_PROTECTED: u8 = 4;
    /// This very prefix was declared exempt.
    pub const DECLARED_EXEMPT: u8 = 8;
    /// This very prefix was declared to have the owner.
    pub const DECLARED_OWNER: u8 = 16;
    /// This is one address, and it is a node's own.
    pub const NODE: u8 = 32;
    /// The node was declared to have its own traffic protected (and did not inherit it from a protected range).
    pub const DECLARED_PROTECTED_NODE: u8 = 64;
    /// This is one address, and its pod has opted out: what it sends may be in the clear.
    pub const OPTED_OUT: u8 = 128;
}

/// An open port as the settings hold it: the protocol's number, then the port's; 0 is none.
#[inline(always)]
pub fn open_port(protocol: u8, number: [u8; 2]) -> u32 {
    u32::from_be_bytes([0, protocol, number[0], number[1]])
}

/// One generation of settings.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`LAYOUT_VERSION`], or 0 while nothing was ever written.
    pub version: u32,
    /// One of the `MODE_` numbers.
    pub mode: u32,
    /// The bits of the tunnel mark.
    pub tunnel_mark: u32,
    /// Which bits the tunnel mark may use; 0 for no mark.
    pub tunnel_mask: u32,
    /// The bits of the plain mark.
    pub plain_mark: u32,
    /// Which bits the plain mark may use; 0 for no mark.
    pub plain_mask: u32,
    /// The VNI of the overlay that is ours, or [`NO_OVERLAY`].
    pub overlay: u32,
    /// Ports of traffic between nodes that stays in the clear, as [`open_port`] makes them; 0 for none.
    pub open_ports: [u32; OPEN_PORTS],
    /// The tunnel's UDP ports on this node, network order, zero for none.
    pub listen_ports: [[u8; 2]; LISTEN_PORTS],
    /// UDP destination ports that carry VXLAN, network order, zero for none.
    pub vxlan_ports: [[u8; 2]; PORTS],
    /// UDP destination ports that carry Geneve, network order, zero for none.
    pub geneve_ports: [[u8; 2]; PORTS],
}

impl Settings {
    /// Whether any overlay port is configured, so that an unreadable UDP header cannot be waved through.
    #[inline(always)]
    pub fn has_overlay(&self) -> bool {
        self.vxlan_ports[0] != [0, 0] || self.geneve_ports[0] != [0, 0]
    }

    /// Whether a UDP port of this node is the tunnel's.
    #[inline(always)]
    pub fn is_listen_port(&self, port: [u8; 2]) -> bool {
        port != [0, 0] && self.listen_ports.contains(&port)
    }

    /// Whether an overlay packet with this VNI is of the overlay that is ours.
    #[inline(always)]
    pub fn is_our_overlay(&self, vni: u32) -> bool {
        self.overlay == vni
    }

    /// Whether a packet's mark is the tunnel's.
    #[inline(always)]
    pub fn is_tunnel_mark(&self, mark: u32) -> bool {
        self.tunnel_mask != 0 && mark & self.tunnel_mask == self.tunnel_mark
    }

    /// Whether a packet's mark is the plain one.
    #[inline(always)]
    pub fn is_plain_mark(&self, mark: u32) -> bool {
        self.plain_mask != 0 && mark & self.plain_mask == self.plain_mark
    }
}

/// The data of a longest-prefix key; its prefix length is [`PREFIX_KEY_BITS`] plus the length of the prefix.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixKey {
    /// Which generation of the table the entry belongs to.
    pub generation: u8,
    /// The number of the [`Family`].
    pub family: u8,
    /// Not used, zero.
    pub reserved: [u8; 2],
    /// The address; an IPv4 one in the first four bytes, then zeroes.
    pub address: [u8; 16],
}

impl PrefixKey {
    /// The key under which an address is looked up.
    #[inline(always)]
    pub fn new(generation: u8, address: &Address) -> Self {
        Self {
            generation,
            family: address.family.number(),
            reserved: [0; 2],
            address: address.bytes,
        }
    }
}

/// All that the gate knows of a prefix. Shorter prefixes are already folded in, so that one look-up is enough.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// The owner's number, 0 for none.
    pub node: u64,
    /// One of the `PATH_` numbers.
    pub path: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Not used, zero.
    pub reserved: [u8; 2],
    /// With [`PATH_ENCRYPTED`], the encryption device's interface index, 0 while there is none.
    pub device: u32,
}

impl Entry {
    /// Whether the addresses are protected.
    #[inline(always)]
    pub fn is_protected(&self) -> bool {
        self.flags & flag::PROTECTED != 0
    }

    /// Whether this is a node's own address.
    #[inline(always)]
    pub fn is_node(&self) -> bool {
        self.flags & flag::NODE != 0
    }

    /// Whether the addresses are exempt.
    #[inline(always)]
    pub fn is_exempt(&self) -> bool {
        self.flags & flag::EXEMPT != 0
    }

    /// Whether this is the address of a pod that has opted out.
    #[inline(always)]
    pub fn has_opted_out(&self) -> bool {
        self.flags & flag::OPTED_OUT != 0
    }
}

/// What a counter counts.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CounterKey {
    /// The other node's number: the destination's owner on egress, the source's on ingress; 0 for none.
    pub node: u64,
    /// [`crate::Reason`] as a number.
    pub reason: u8,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// The number of the [`Family`], 0 when the packet could not be read.
    pub family: u8,
    /// 1 when the packet would have been dropped, but audit mode let it pass.
    pub audited: u8,
    /// Not used, zero.
    pub reserved: [u8; 4],
}

/// What was counted on one CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets as they would be on the wire: segments of a large one count each.
    pub packets: u64,
    /// Bytes, with the link-layer header.
    pub bytes: u64,
}

/// A packet that was dropped, or would have been.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DropEvent {
    /// Source address, as in [`Address`]. Of the inner packet, when there is one.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// As in [`CounterKey`].
    pub node: u64,
    /// The device the program runs on.
    pub device: u32,
    /// Source port, network order, 0 when there is none.
    pub source_port: [u8; 2],
    /// Destination port, network order, 0 when there is none.
    pub destination_port: [u8; 2],
    /// The number of the [`Family`], 0 when the packet could not be read.
    pub family: u8,
    /// IP protocol number, 0 when it could not be read.
    pub protocol: u8,
    /// [`crate::Reason`] as a number.
    pub reason: u8,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// As in [`CounterKey`].
    pub audited: u8,
    /// Not used, zero.
    pub reserved: [u8; 3],
}

// The kernel hands values over as bytes. These conversions are the one place that says which byte is what on the user-space side; the
// program side is `repr(C)`, and the test at the end compares the two.

impl Settings {
    /// How many numbers of four bytes stand before the ports.
    const WORDS: usize = 7 + OPEN_PORTS;

    /// As the kernel stores it.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let words = [
            self.version,
            self.mode,
            self.tunnel_mark,
            self.tunnel_mask,
            self.plain_mark,
            self.plain_mask,
            self.overlay,
        ];
        let words = words.into_iter().chain(self.open_ports);
        let mut bytes = [0; size_of::<Self>()];
        let (numbers, ports) = bytes.split_at_mut(Self::WORDS * 4);
        for (to, word) in numbers.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_ne_bytes();
        }
        let all = self
            .listen_ports
            .into_iter()
            .chain(self.vxlan_ports)
            .chain(self.geneve_ports);
        for (to, port) in ports.as_chunks_mut::<2>().0.iter_mut().zip(all) {
            *to = port;
        }
        bytes
    }

    /// From what the kernel stores.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        let word = |index: usize| u32::from_ne_bytes(part(bytes, index * 4));
        let port = |index: usize| part(bytes, Self::WORDS * 4 + index * 2);
        Self {
            version: word(0),
            mode: word(1),
            tunnel_mark: word(2),
            tunnel_mask: word(3),
            plain_mark: word(4),
            plain_mask: word(5),
            overlay: word(6),
            open_ports: core::array::from_fn(|index| word(7 + index)),
            listen_ports: core::array::from_fn(port),
            vxlan_ports: core::array::from_fn(|index| port(LISTEN_PORTS + index)),
            geneve_ports: core::array::from_fn(|index| port(LISTEN_PORTS + PORTS + index)),
        }
    }
}

impl PrefixKey {
    /// As the kernel stores it.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0] = self.generation;
        bytes[1] = self.family;
        bytes[4..].copy_from_slice(&self.address);
        bytes
    }

    /// From what the kernel stores.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            generation: bytes[0],
            family: bytes[1],
            reserved: part(bytes, 2),
            address: part(bytes, 4),
        }
    }
}

impl Entry {
    /// As the kernel stores it.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[..8].copy_from_slice(&self.node.to_ne_bytes());
        bytes[8] = self.path;
        bytes[9] = self.flags;
        bytes[12..].copy_from_slice(&self.device.to_ne_bytes());
        bytes
    }

    /// From what the kernel stores.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            node: u64::from_ne_bytes(part(bytes, 0)),
            path: bytes[8],
            flags: bytes[9],
            reserved: part(bytes, 10),
            device: u32::from_ne_bytes(part(bytes, 12)),
        }
    }
}

impl CounterKey {
    /// From what the kernel stores.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            node: u64::from_ne_bytes(part(bytes, 0)),
            reason: bytes[8],
            direction: bytes[9],
            family: bytes[10],
            audited: bytes[11],
            reserved: part(bytes, 12),
        }
    }
}

impl Count {
    /// From what the kernel stores.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            packets: u64::from_ne_bytes(part(bytes, 0)),
            bytes: u64::from_ne_bytes(part(bytes, 8)),
        }
    }
}

impl DropEvent {
    /// From what the kernel stores.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            source: part(bytes, 0),
            destination: part(bytes, 16),
            node: u64::from_ne_bytes(part(bytes, 32)),
            device: u32::from_ne_bytes(part(bytes, 40)),
            source_port: part(bytes, 44),
            destination_port: part(bytes, 46),
            family: bytes[48],
            protocol: bytes[49],
            reason: bytes[50],
            direction: bytes[51],
            audited: bytes[52],
            reserved: part(bytes, 53),
        }
    }
}

/// `N` bytes at a fixed place of a fixed size.
fn part<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    core::array::from_fn(|index| bytes[offset + index])
}

impl Family {
    /// The family's number in the maps.
    #[inline(always)]
    pub fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }

    /// The family with this number in a map.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            4 => Some(Self::V4),
            6 => Some(Self::V6),
            _ => None,
        }
    }
}

impl Direction {
    /// The direction with this number in a map.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Egress),
            2 => Some(Self::Ingress),
            3 => Some(Self::Decrypted),
            _ => None,
        }
    }
}

// A hole would be uninitialised memory in a map key, which the kernel's verifier refuses or, worse, compares.
const _: () = {
    assert!(size_of::<Settings>() == 4 * (7 + OPEN_PORTS) + 2 * (LISTEN_PORTS + 2 * PORTS));
    assert!(size_of::<PrefixKey>() == 20);
    assert!(size_of::<Entry>() == 16);
    assert!(size_of::<CounterKey>() == 16);
    assert!(size_of::<Count>() == 16);
    assert!(size_of::<DropEvent>() == 56);
};
