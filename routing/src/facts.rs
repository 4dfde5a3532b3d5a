//! What is true of the node's network, for those who plan and explain.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// The devices of the node, and where its default routes lead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Every device, by name.
    pub links: BTreeMap<String, LinkFacts>,
    /// Devices that carry a default route of the main table, of either family.
    pub default_route_devices: BTreeSet<String>,
    /// Devices to which a route of somebody else's leads, in whatever table, for a part of this node's pod ranges: where its pods are. Ours,
    /// and the loopback device, are not among them.
    pub pod_route_devices: BTreeSet<String>,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFacts {
    /// The interface index.
    pub index: u32,
    /// The MTU in bytes. (The loopback device's 65536 is no [`Mtu`](shroud_model::Mtu).)
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// The kernel's word for what it is (`veth`, `tun`, `wireguard`); physical devices have none.
    pub kind: Option<String>,
    /// Its addresses.
    pub addresses: BTreeSet<Address>,
}

/// An address on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// How many leading bits name its network.
    pub length: u8,
    /// How far it is good for.
    pub scope: Scope,
}

/// How far an address is good for (`ifa_scope`, rtnetlink(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Everywhere.
    Global,
    /// On its link only.
    Link,
    /// On this node only.
    Host,
    /// Something else, by the kernel's number.
    Other(u8),
}

/// What the kernel would do with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The device it leaves by; `None` where it goes nowhere.
    pub device: Option<String>,
    /// The next hop, or `None` when the destination is on the device's own link.
    pub via: Option<IpAddr>,
    /// The source address a packet of this node's own would get.
    pub source: Option<IpAddr>,
    /// What happens.
    pub kind: HopKind,
    /// The route's MTU in bytes, where the route has one.
    pub mtu: Option<u32>,
}

/// What the kernel does with a packet, in its own words (rtnetlink(7), `rtm_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HopKind {
    /// Sends it on.
    Unicast,
    /// Takes it for this node.
    Local,
    /// Sends or takes it as a broadcast.
    Broadcast,
    /// Sends it to many.
    Multicast,
    /// Takes it for this node and others (IPv6).
    Anycast,
    /// Drops it silently, because a route says so.
    Blackhole,
    /// Drops it and says "unreachable": because a route says so, or because this node does not forward.
    Unreachable,
    /// Drops it and says "prohibited", because a route says so.
    Prohibit,
    /// Has no route for it.
    NoRoute,
    /// Does not believe that source on that device (reverse path filter, martian).
    Refused,
    /// Something else, by the kernel's number.
    Other(u8),
}

impl fmt::Display for HopKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unicast => f.write_str("unicast"),
            Self::Local => f.write_str("local"),
            Self::Broadcast => f.write_str("broadcast"),
            Self::Multicast => f.write_str("multicast"),
            Self::Anycast => f.write_str("anycast"),
            Self::Blackhole => f.write_str("blackhole"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Prohibit => f.write_str("prohibit"),
            Self::NoRoute => f.write_str("no route"),
            Self::Refused => f.write_str("source refused"),
            Self::Other(number) => write!(f, "type {number}"),
        }
    }
}
