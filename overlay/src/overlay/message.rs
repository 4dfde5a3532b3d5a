//! Between our devices and entries and the kernel's messages.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoGeneve, InfoKind, InfoVxlan, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage, VxlanDf,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use shroud_model::Family;

use crate::{Device, Forwarding, Kind, LABEL, Mac, Neighbour, Setting, Vni};

/// The message that makes a device, down and without peers.
///
/// What is not said is the kernel's default, and meant: no default destination (frames to unknown addresses go nowhere), source ports by
/// flow, offloads on, and UDP checksums in both families, which cost next to nothing with local checksum offload, whereas IPv6 receivers
/// drop a zero one unless told otherwise (`udp6zerocsumrx`), and devices with different such flags cannot share a port.
pub(super) fn creation(name: &str, device: &Device) -> LinkMessage {
    let (kind, data) = match device.kind {
        Kind::Vxlan => {
            let local = match device.local {
                IpAddr::V4(address) => InfoVxlan::Local(address),
                IpAddr::V6(address) => InfoVxlan::Local6(address),
            };
            let data = vec![
                InfoVxlan::Id(device.vni.number()),
                InfoVxlan::Port(device.port),
                local,
                InfoVxlan::Learning(false),
                InfoVxlan::Df(VxlanDf::Set),
            ];
            (InfoKind::Vxlan, InfoData::Vxlan(data))
        }
        // Where packets go comes with them, from the route's encapsulation. The kernel refuses a VNI or an address beside it.
        Kind::Geneve => {
            let data = vec![InfoGeneve::CollectMetadata, InfoGeneve::Port(device.port)];
            (InfoKind::Geneve, InfoData::Geneve(data))
        }
    };
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(device.mac.bytes().to_vec()),
        LinkAttribute::Mtu(device.mtu.bytes()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]),
    ];
    message
}

/// The message that gives a living device these settings, all but "up".
pub(super) fn adjustment<'a>(index: u32, settings: impl Iterator<Item = &'a Setting>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let mut vxlan = Vec::new();
    for setting in settings {
        match setting {
            Setting::Local(IpAddr::V4(address)) => vxlan.push(InfoVxlan::Local(*address)),
            Setting::Local(IpAddr::V6(address)) => vxlan.push(InfoVxlan::Local6(*address)),
            Setting::Learning(on) => vxlan.push(InfoVxlan::Learning(*on)),
            Setting::DontFragment(on) => {
                let df = if *on { VxlanDf::Set } else { VxlanDf::Unset };
                vxlan.push(InfoVxlan::Df(df));
            }
            Setting::Ttl(ttl) => vxlan.push(InfoVxlan::Ttl(*ttl)),
            Setting::Tos(tos) => vxlan.push(InfoVxlan::Tos(*tos)),
            Setting::Mac(mac) => message.attributes.push(LinkAttribute::Address(mac.bytes().to_vec())),
            Setting::Mtu(bytes) => message.attributes.push(LinkAttribute::Mtu(*bytes)),
            Setting::Resolution(on) => {
                message.header.change_mask |= LinkFlags::Noarp;
                if !*on {
                    message.header.flags |= LinkFlags::Noarp;
                }
            }
            Setting::AutomaticAddress(on) => {
                let mode = if *on {
                    In6AddrGenMode::Eui64
                } else {
                    In6AddrGenMode::None
                };
                message
                    .attributes
                    .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
                        AfSpecInet6::AddrGenMode(mode),
                    ])]));
            }
            Setting::Labelled(on) => {
                let label = if *on { LABEL } else { "" };
                message.attributes.push(LinkAttribute::IfAlias(label.to_owned()));
            }
            Setting::Kind(_)
            | Setting::Vni(_)
            | Setting::Port(_)
            | Setting::Underlay(_)
            | Setting::Features(_)
            | Setting::Up(_) => {}
        }
    }
    if !vxlan.is_empty() {
        let info = vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(vxlan))];
        message.attributes.push(LinkAttribute::LinkInfo(info));
    }
    message
}

/// A device as the kernel describes it.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// What it is, in words.
    pub(super) what: String,
    /// The overlay's number, where the device has one.
    pub(super) vni: Option<u32>,
    /// What an overlay device is like; empty for any other.
    pub(super) settings: Vec<Setting>,
}

impl Link {
    pub(super) fn is_overlay(&self) -> bool {
        !self.settings.is_empty()
    }

    pub(super) fn is_labelled(&self) -> bool {
        self.settings.contains(&Setting::Labelled(true))
    }

    pub(super) fn port(&self) -> Option<u16> {
        self.settings.iter().find_map(|setting| match setting {
            Setting::Port(port) => Some(*port),
            _ => None,
        })
    }

    /// Whether it is ours: a name of ours, a kind of ours, and our number or our label.
    pub(super) fn is_ours(&self, vni: Vni) -> bool {
        self.name.starts_with("shroud") && self.is_overlay() && (self.vni == Some(vni.number()) || self.is_labelled())
    }
}

/// Reads a device. `None` for one without a name.
pub(super) fn link(message: &LinkMessage) -> Option<Link> {
    let (mut name, mut mtu, mut mac, mut labelled, mut automatic) = (None, None, None, false, None);
    let infos: &[LinkInfo] = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
            _ => None,
        })
        .unwrap_or_default();
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Mtu(bytes) => mtu = Some(Setting::Mtu(*bytes)),
            LinkAttribute::Address(bytes) => mac = self::mac(bytes).map(Setting::Mac),
            LinkAttribute::IfAlias(text) => labelled = text == LABEL,
            LinkAttribute::AfSpecUnspec(families) => automatic = generation(families),
            _ => {}
        }
    }
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind.clone()),
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    });
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(data) => Some(data),
        _ => None,
    });
    let (vni, mut settings) = match data {
        Some(InfoData::Vxlan(data)) => vxlan(data),
        Some(InfoData::Geneve(data)) => geneve(data),
        _ => (None, Vec::new()),
    };
    let mut what = kind.unwrap_or_else(|| "a physical device".to_owned());
    if let Some(vni) = vni {
        what.push_str(&format!(" vni {vni}"));
    }
    if !settings.is_empty() {
        let flags = message.header.flags;
        settings.extend(mac);
        settings.extend(mtu);
        settings.push(Setting::Resolution(!flags.contains(LinkFlags::Noarp)));
        settings.extend(automatic.map(Setting::AutomaticAddress));
        settings.push(Setting::Labelled(labelled));
        settings.push(Setting::Up(flags.contains(LinkFlags::Up)));
    }
    Some(Link {
        index: message.header.index,
        name: name?,
        what,
        vni,
        settings,
    })
}

/// Whether a link-local address is made, or `None` without IPv6.
fn generation(families: &[AfSpecUnspec]) -> Option<bool> {
    let inet6 = families.iter().find_map(|family| match family {
        AfSpecUnspec::Inet6(inet6) => Some(inet6),
        _ => None,
    })?;
    inet6.iter().find_map(|attribute| match attribute {
        AfSpecInet6::AddrGenMode(mode) => Some(*mode != In6AddrGenMode::None),
        _ => None,
    })
}

fn vxlan(data: &[InfoVxlan]) -> (Option<u32>, Vec<Setting>) {
    let (mut vni, mut port, mut local) = (None, 0, None);
    let (mut learning, mut df, mut ttl, mut tos) = (false, false, 0, 0);
    let mut features = BTreeSet::new();
    let mut feature = |on: bool, text: &str| {
        if on {
            features.insert(text.to_owned());
        }
    };
    for attribute in data {
        match attribute {
            InfoVxlan::Id(number) => vni = Some(*number),
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Local(address) => local = Some(IpAddr::V4(*address)),
            InfoVxlan::Local6(address) => local = Some(IpAddr::V6(*address)),
            InfoVxlan::Learning(on) => learning = *on,
            InfoVxlan::Df(value) => df = *value == VxlanDf::Set,
            InfoVxlan::Ttl(number) => ttl = *number,
            InfoVxlan::Tos(number) => tos = *number,
            InfoVxlan::Group(address) => feature(!address.is_unspecified(), &format!("remote {address}")),
            InfoVxlan::Group6(address) => feature(!address.is_unspecified(), &format!("remote {address}")),
            InfoVxlan::Link(index) => feature(*index != 0, &format!("bound to device {index}")),
            InfoVxlan::Label(label) => feature(*label != 0, "flowlabel"),
            InfoVxlan::Limit(limit) => feature(*limit != 0, "maxaddress"),
            InfoVxlan::PortRange(range) => feature(*range != (0, 0), "srcport"),
            InfoVxlan::Proxy(on) => feature(*on, "proxy"),
            InfoVxlan::Rsc(on) => feature(*on, "rsc"),
            InfoVxlan::L2Miss(on) => feature(*on, "l2miss"),
            InfoVxlan::L3Miss(on) => feature(*on, "l3miss"),
            InfoVxlan::CollectMetadata(on) => feature(*on, "external"),
            InfoVxlan::UDPCsum(on) => feature(!*on, "noudpcsum"),
            InfoVxlan::UDPZeroCsumTX(on) => feature(*on, "udp6zerocsumtx"),
            InfoVxlan::UDPZeroCsumRX(on) => feature(*on, "udp6zerocsumrx"),
            InfoVxlan::RemCsumTX(on) => feature(*on, "remcsumtx"),
            InfoVxlan::RemCsumRX(on) => feature(*on, "remcsumrx"),
            InfoVxlan::Gbp => feature(true, "gbp"),
            InfoVxlan::Gpe => feature(true, "gpe"),
            InfoVxlan::RemCsumNoPartial => feature(true, "remcsum without partial"),
            InfoVxlan::TtlInherit(on) => feature(*on != 0, "ttl inherit"),
            InfoVxlan::TtlInheritFlag => feature(true, "ttl inherit"),
            InfoVxlan::Vnifilter(on) => feature(*on, "vnifilter"),
            InfoVxlan::Localbypass(on) => feature(!*on, "nolocalbypass"),
            // Without learning nothing ages; what a newer kernel adds, we leave alone.
            _ => {}
        }
    }
    let mut settings = vec![Setting::Kind(Kind::Vxlan)];
    settings.extend(vni.map(Setting::Vni));
    settings.push(Setting::Port(port));
    settings.extend(local.map(|local| Setting::Underlay(Family::of(local))));
    settings.push(Setting::Features(features));
    settings.extend(local.map(Setting::Local));
    settings.extend([
        Setting::Learning(learning),
        Setting::DontFragment(df),
        Setting::Ttl(ttl),
        Setting::Tos(tos),
    ]);
    (vni, settings)
}

fn geneve(data: &[InfoGeneve]) -> (Option<u32>, Vec<Setting>) {
    let (mut vni, mut port) = (None, 0);
    let mut features = BTreeSet::new();
    for attribute in data {
        match attribute {
            // Zero is what the kernel says when the device has none.
            InfoGeneve::Id(number) => vni = Some(*number).filter(|number| *number != 0),
            InfoGeneve::Port(number) => port = *number,
            InfoGeneve::CollectMetadata => {
                features.insert("external".to_owned());
            }
            InfoGeneve::Remote(address) => {
                features.insert(format!("remote {address}"));
            }
            InfoGeneve::Remote6(address) => {
                features.insert(format!("remote {address}"));
            }
            InfoGeneve::InnerProtoInherit => {
                features.insert("innerprotoinherit".to_owned());
            }
            // The rest has no effect where the addresses come with the packet.
            _ => {}
        }
    }
    let settings = vec![
        Setting::Kind(Kind::Geneve),
        Setting::Port(port),
        Setting::Features(features),
    ];
    (vni, settings)
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    <[u8; 6]>::try_from(bytes).ok().map(Mac::from)
}

/// The message about the forwarding entry of a link-layer address; without a node, about all the entry says.
pub(super) fn forwarding(index: u32, mac: Mac, underlay: Option<IpAddr>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    // The device's own table, not that of a bridge it might be in.
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    message
        .attributes
        .extend(underlay.map(|address| NeighbourAttribute::Destination(address.into())));
    message
}

/// The message about the link-layer address of a next hop.
pub(super) fn neighbour(index: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(Family::of(address));
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message
        .attributes
        .extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec())));
    message
}

/// The question for all forwarding entries of a device.
pub(super) fn all_forwarding(index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message
}

/// The question for all neighbours of a device.
pub(super) fn all_neighbours(index: u32, family: Family) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = self::family(family);
    message.attributes.push(NeighbourAttribute::IfIndex(index));
    message
}

const fn family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Reads forwarding entries. A link-layer address with several nodes comes in as many messages.
pub(super) fn read_forwarding(index: u32, messages: &[NeighbourMessage]) -> BTreeMap<Mac, Forwarding> {
    let mut entries: BTreeMap<Mac, Forwarding> = BTreeMap::new();
    for message in messages.iter().filter(|message| message.header.ifindex == index) {
        let Some(mac) = link_layer_address(message) else {
            continue;
        };
        let entry = forwarding_entry(message);
        let entry = match entries.remove(&mac) {
            Some(first) => Forwarding::Other(format!("{first} and {entry}")),
            None => entry,
        };
        entries.insert(mac, entry);
    }
    entries
}

fn forwarding_entry(message: &NeighbourMessage) -> Forwarding {
    let mut underlay = None;
    let mut extras = String::new();
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(address) => underlay = ip(address),
            NeighbourAttribute::Port(port) => extras.push_str(&format!(" port {port}")),
            NeighbourAttribute::Vni(vni) => extras.push_str(&format!(" vni {vni}")),
            NeighbourAttribute::SourceVni(vni) => extras.push_str(&format!(" src_vni {vni}")),
            NeighbourAttribute::IfIndex(index) => extras.push_str(&format!(" via device {index}")),
            NeighbourAttribute::LinkLayerAddress(_)
            | NeighbourAttribute::CacheInfo(_)
            | NeighbourAttribute::LinkNetNsId(_) => {}
            other => extras.push_str(&format!(" {other:?}")),
        }
    }
    if !is_permanent(message.header.state) {
        extras.push_str(&format!(" {:?}", message.header.state).to_lowercase());
    }
    if message.header.flags != NeighbourFlags::Own {
        extras.push_str(&format!(" flags {:#x}", message.header.flags.bits()));
    }
    match underlay {
        Some(address) if extras.is_empty() => Forwarding::To(address),
        Some(address) => Forwarding::Other(format!("{address}{extras}")),
        None => Forwarding::Other(format!("no address{extras}")),
    }
}

/// Reads neighbours. Left out is what nobody set and nobody answered: attempts, and the kernel's own entries for groups.
pub(super) fn read_neighbours(index: u32, messages: &[NeighbourMessage]) -> BTreeMap<IpAddr, Neighbour> {
    let of_device = messages.iter().filter(|message| message.header.ifindex == index);
    of_device
        .filter_map(|message| {
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(address) => ip(address),
                _ => None,
            })?;
            let mac = link_layer_address(message)?;
            let neighbour = match message.header.state {
                NeighbourState::Permanent => Neighbour::Permanent(mac),
                NeighbourState::None | NeighbourState::Noarp | NeighbourState::Incomplete | NeighbourState::Failed => {
                    return None;
                }
                _ => Neighbour::Passing(mac),
            };
            Some((address, neighbour))
        })
        .collect()
}

/// Whether an entry stays until somebody removes it. `bridge` sets a second bit beside (`NUD_NOARP`), which VXLAN does not look at.
fn is_permanent(state: NeighbourState) -> bool {
    u16::from(state) & u16::from(NeighbourState::Permanent) != 0
}

fn link_layer_address(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => mac(bytes),
        _ => None,
    })
}

fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some(IpAddr::V4(*address)),
        NeighbourAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        // Forwarding entries are of the family "bridge": only the length tells.
        NeighbourAddress::Other(bytes) => {
            let four = <[u8; 4]>::try_from(bytes.as_slice()).map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
            let sixteen = <[u8; 16]>::try_from(bytes.as_slice()).map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes)));
            four.or(sixteen).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
