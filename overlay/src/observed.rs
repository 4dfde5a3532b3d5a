//! What the kernel holds of ours.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use crate::{Mac, Setting};

/// Our overlay devices as they are: those whose name begins with `shroud`, that are VXLAN or Geneve, and that carry our VNI or our label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The devices, by name.
    pub devices: BTreeMap<String, DeviceState>,
}

/// One of our devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// The interface index.
    pub index: u32,
    /// What it is like.
    pub settings: Vec<Setting>,
    /// Where frames to each link-layer address go.
    pub forwarding: BTreeMap<Mac, Forwarding>,
    /// The link-layer addresses of next hops, as far as any is known.
    pub neighbours: BTreeMap<IpAddr, Neighbour>,
}

/// Where a device sends frames for one link-layer address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forwarding {
    /// To one node, for good: the only shape we write.
    To(IpAddr),
    /// Any other shape (several nodes, another port, learned, a next hop object), in words.
    Other(String),
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(underlay) => write!(f, "{underlay}"),
            Self::Other(shape) => f.write_str(shape),
        }
    }
}

/// What a device believes about a next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbour {
    /// It has this link-layer address, for good: the only kind we write.
    Permanent(Mac),
    /// It has this link-layer address until something else is heard.
    Passing(Mac),
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Permanent(mac) => write!(f, "{mac}"),
            Self::Passing(mac) => write!(f, "{mac} (not permanent)"),
        }
    }
}
