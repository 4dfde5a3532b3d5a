//! What a device is like, one fact at a time: the same list for what should be and for what is.

use std::collections::BTreeSet;
use std::fmt;
use std::mem::discriminant;
use std::net::IpAddr;

use shroud_model::Family;

use crate::{Device, Kind, Mac};

/// One property of an overlay device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting {
    /// How it wraps packets.
    Kind(Kind),
    /// The overlay's number.
    Vni(u32),
    /// The UDP port.
    Port(u16),
    /// The family of underlay addresses it can send to. VXLAN has a socket and forwarding entries of one family only.
    Underlay(Family),
    /// Whatever else changes what the device does, in iproute2's words: `remote 172.18.0.7`, `proxy`, `external`. `external` (addresses come
    /// with the packet, from its route) is what makes one Geneve device serve all peers; nothing else is ever wanted.
    Features(BTreeSet<String>),
    /// The source address of what it sends.
    Local(IpAddr),
    /// Whether it believes the senders of frames about where a link-layer address is. Never: the directory says it.
    Learning(bool),
    /// Whether the outer IPv4 packet forbids fragments. Always: a later fragment has no UDP header, so the gate could not tell what it is;
    /// the kernel turns "too big" into a smaller path MTU for the inner packet. (IPv6 never fragments on the way.)
    DontFragment(bool),
    /// The outer hop limit; 0 is the host's own default, which is what we want.
    Ttl(u8),
    /// The outer type of service; 0, so that an observer of the underlay learns nothing from it. (The congestion bits are the kernel's.)
    Tos(u8),
    /// Its own link-layer address.
    Mac(Mac),
    /// The largest inner packet, in bytes.
    Mtu(u32),
    /// Whether it asks and answers "who has" (ARP; `IFF_NOARP` is the contrary). Never: all neighbours are known.
    Resolution(bool),
    /// Whether it makes itself an IPv6 link-local address, and with it talks to multicast groups. Never.
    AutomaticAddress(bool),
    /// Whether it carries our [`LABEL`](crate::LABEL).
    Labelled(bool),
    /// Whether it is up.
    Up(bool),
}

impl Setting {
    /// Whether the kernel fixes it when the device is made, so that another value needs another device (`vxlan_nl2conf` with `changelink`,
    /// `geneve_changelink`; tried on 6.18 one by one).
    pub const fn needs_another_device(&self) -> bool {
        match self {
            Self::Kind(_) | Self::Vni(_) | Self::Port(_) | Self::Underlay(_) | Self::Features(_) => true,
            Self::Local(_)
            | Self::Learning(_)
            | Self::DontFragment(_)
            | Self::Ttl(_)
            | Self::Tos(_)
            | Self::Mac(_)
            | Self::Mtu(_)
            | Self::Resolution(_)
            | Self::AutomaticAddress(_)
            | Self::Labelled(_)
            | Self::Up(_) => false,
        }
    }

    /// Whether the kernel forgets the device's neighbours, permanent ones too, when it changes (`neigh_changeaddr`, net/core/neighbour.c).
    pub const fn forgets_neighbours(&self) -> bool {
        matches!(self, Self::Mac(_) | Self::Resolution(_))
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "{kind}"),
            Self::Vni(number) => write!(f, "vni {number}"),
            Self::Port(port) => write!(f, "port {port}"),
            Self::Underlay(family) => write!(f, "underlay {family}"),
            Self::Features(features) if features.is_empty() => f.write_str("no extras"),
            Self::Features(features) => {
                let features: Vec<&str> = features.iter().map(String::as_str).collect();
                f.write_str(&features.join(", "))
            }
            Self::Local(address) => write!(f, "local {address}"),
            Self::Learning(on) => f.write_str(if *on { "learning" } else { "nolearning" }),
            Self::DontFragment(on) => f.write_str(if *on { "df set" } else { "df unset" }),
            Self::Ttl(0) => f.write_str("ttl auto"),
            Self::Ttl(ttl) => write!(f, "ttl {ttl}"),
            Self::Tos(tos) => write!(f, "tos {tos:#x}"),
            Self::Mac(mac) => write!(f, "mac {mac}"),
            Self::Mtu(bytes) => write!(f, "mtu {bytes}"),
            Self::Resolution(on) => f.write_str(if *on { "arp on" } else { "arp off" }),
            Self::AutomaticAddress(on) => write!(f, "link-local address {}", if *on { "automatic" } else { "none" }),
            Self::Labelled(on) => f.write_str(if *on { "labelled" } else { "not labelled" }),
            Self::Up(on) => f.write_str(if *on { "up" } else { "down" }),
        }
    }
}

/// A setting that is not what it should be: `mtu 1500 -> mtu 1390`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What it is, or `None` where the device has no such setting.
    pub old: Option<Setting>,
    /// What it should be.
    pub new: Setting,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.old {
            Some(old) => write!(f, "{old} -> {}", self.new),
            None => write!(f, "none -> {}", self.new),
        }
    }
}

/// Where `observed` is not as `device` should be.
pub fn differences(device: &Device, observed: &[Setting]) -> Vec<Difference> {
    let differs = |new: Setting| {
        let old = observed.iter().find(|old| discriminant(*old) == discriminant(&new));
        match (old, &new) {
            (Some(old), new) if old == new => None,
            // A kernel without IPv6 makes no such address.
            (None, Setting::AutomaticAddress(false)) => None,
            (old, _) => Some(Difference { old: old.cloned(), new }),
        }
    };
    device.settings().into_iter().filter_map(differs).collect()
}

impl Device {
    /// What the device should be like.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut settings = vec![Setting::Kind(self.kind)];
        settings.extend(match self.kind {
            Kind::Vxlan => vec![
                Setting::Vni(self.vni.number()),
                Setting::Port(self.port),
                Setting::Underlay(Family::of(self.local)),
                Setting::Features(BTreeSet::new()),
                Setting::Local(self.local),
                Setting::Learning(false),
                Setting::DontFragment(true),
                Setting::Ttl(0),
                Setting::Tos(0),
            ],
            Kind::Geneve => vec![
                Setting::Port(self.port),
                Setting::Features(BTreeSet::from(["external".to_owned()])),
            ],
        });
        settings.extend([
            Setting::Mac(self.mac),
            Setting::Mtu(self.mtu.bytes()),
            Setting::Resolution(false),
            Setting::AutomaticAddress(false),
            Setting::Labelled(true),
            Setting::Up(true),
        ]);
        settings
    }
}
