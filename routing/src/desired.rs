//! What a node's routing should look like.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use shroud_model::{Family, Mark, Mtu, Prefix};

use crate::{PROTOCOL, Sysctl};

/// Everything this crate is asked to bring about. What is ours and not in here is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Our own devices (TUN or WireGuard), by name. They exist already; we set them up.
    pub links: BTreeMap<String, Link>,
    /// Our routes, at most one for each destination of a table.
    pub routes: BTreeSet<Route>,
    /// Which packets look into [`Table::Node`].
    pub rules: BTreeSet<Rule>,
    /// Kernel settings and their values, without a line end.
    pub sysctls: BTreeMap<Sysctl, String>,
}

/// How one of our devices should be set up. It is also up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The device's MTU.
    pub mtu: Mtu,
    /// The device's addresses, each set alone (`/32` or `/128`). Any other address on the device goes, except link-local ones.
    pub addresses: BTreeSet<IpAddr>,
}

/// A unicast route of ours, with the kernel's default metric.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The addresses it carries.
    pub destination: Prefix,
    /// The device packets leave by.
    pub device: String,
    /// The next hop, or `None` when the destination is on the device's own link. An IPv4 destination may have an IPv6 next hop.
    pub via: Option<IpAddr>,
    /// The address this node's own packets get as their source.
    pub source: Option<IpAddr>,
    /// The largest packet to this destination, or `None` for what the device allows.
    pub mtu: Option<Mtu>,
    /// Whether the next hop counts as on the device's own link even where no address of this node says so (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// What the device, an overlay device in external mode, wraps each packet in.
    pub encapsulation: Option<Encapsulation>,
    /// The table it is in.
    pub table: Table,
}

/// The outer header for packets of a route: a lightweight tunnel (`RTA_ENCAP` with `LWTUNNEL_ENCAP_IP` or `LWTUNNEL_ENCAP_IP6`,
/// include/uapi/linux/lwtunnel.h).
///
/// The rest is fixed: 64 hops, UDP checksums, because IPv6 receivers drop datagrams without one (RFC 8200 §8.1), and over IPv4 "do not
/// fragment", because the later parts of a fragmented datagram have no UDP header by which a gate could know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Encapsulation {
    /// The virtual network identifier, 24 bits.
    pub id: u32,
    /// The outer source, an address of this node.
    pub source: IpAddr,
    /// The outer destination, an address of the peer; of the same family as the source.
    pub destination: IpAddr,
}

/// A routing table that may hold routes of ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// The main table, where everybody looks.
    #[default]
    Main,
    /// Our own, number 83: routes to peers' own addresses for packets that the tunnel wraps, and so with less room in them. Only who a
    /// [`Rule`] sends there sees them.
    Node,
}

/// A rule of ours: packets that do not carry a mark look into [`Table::Node`] before they look into the main table.
///
/// What is not found there is looked up further on, as if there were no rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// The packets' family.
    pub family: Family,
    /// The mark of those who shall not see the table: the tunnel's own packets.
    pub unless: Mark,
}

impl Table {
    /// The kernel's number for it.
    pub const fn number(self) -> u8 {
        match self {
            // RT_TABLE_MAIN, rtnetlink(7)
            Self::Main => 254,
            Self::Node => PROTOCOL,
        }
    }

    /// The table of that number, if routes of ours can be in it.
    pub(crate) fn of(number: u32) -> Option<Self> {
        [Self::Main, Self::Node]
            .into_iter()
            .find(|table| u32::from(table.number()) == number)
    }
}

impl Rule {
    /// Its place among the rules (`FRA_PRIORITY`): behind the table of local addresses (0), before the main table (32766).
    pub const PRIORITY: u32 = 83;
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Main => f.write_str("main"),
            Self::Node => fmt::Display::fmt(&self.number(), f),
        }
    }
}

impl fmt::Display for Encapsulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            id,
            source,
            destination,
        } = self;
        let (name, hops) = match Family::of(*destination) {
            Family::V4 => ("ip", "ttl"),
            Family::V6 => ("ip6", "hoplimit"),
        };
        write!(f, "encap {name} id {id} src {source} dst {destination} {hops} 64 csum")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, unless } = self;
        write!(f, "{family} not fwmark {unless} lookup {}", Table::Node)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.destination)?;
        if let Some(encapsulation) = self.encapsulation {
            write!(f, " {encapsulation}")?;
        }
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        write!(f, " dev {}", self.device)?;
        if self.table != Table::Main {
            write!(f, " table {}", self.table)?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if self.onlink {
            f.write_str(" onlink")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        Ok(())
    }
}
