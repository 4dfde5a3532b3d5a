//! What a node's routing should look like.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use shroud_model::{Mtu, Prefix};

use crate::Sysctl;

/// Everything this crate is asked to bring about. What is ours and not in here is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Our own devices (TUN or WireGuard), by name. They exist already; we set them up.
    pub links: BTreeMap<String, Link>,
    /// Our routes, at most one for each destination.
    pub routes: BTreeSet<Route>,
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

/// A unicast route of ours in the main table, with the kernel's default metric.
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
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.destination)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        write!(f, " dev {}", self.device)?;
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        Ok(())
    }
}
