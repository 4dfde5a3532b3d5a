//! Between our routes and the kernel's messages.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteIp6Tunnel, RouteIp6TunnelFlags, RouteIpTunnel, RouteIpTunnelFlags,
    RouteLwEnCapType, RouteLwTunnelEncap, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use shroud_model::{Family, Mark, Mtu, Prefix};

use crate::observed::{Other, Shape};
use crate::{Encapsulation, Hop, HopKind, InstalledRoute, InstalledRule, PROTOCOL, Route, Rule, Table};

/// The metric the kernel gives an IPv6 route for which none is asked (`IP6_RT_PRIO_USER`, include/net/ip6_route.h). IPv4's is 0.
const METRIC_V6: u32 = 1024;

/// How far an encapsulated packet may travel; the usual number (`ip_default_ttl`).
const HOPS: u8 = 64;
/// `TUNNEL_CSUM` (include/uapi/linux/if_tunnel.h): the outer UDP header has a checksum.
const CHECKSUM: u16 = 0x0001;
/// `TUNNEL_DONT_FRAGMENT`: the outer IPv4 header says "do not fragment".
const DONT_FRAGMENT: u16 = 0x0100;

pub(super) const fn family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The message that makes `route`, or `None` when its families do not fit each other.
pub(super) fn of(route: &Route, index: u32) -> Option<RouteMessage> {
    let inside = route.destination.family();
    let mut message = RouteMessage::default();
    message.header.address_family = family(inside);
    message.header.destination_prefix_length = route.destination.length();
    message.header.table = route.table.number();
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.kind = RouteType::Unicast;
    message.header.scope = scope(inside, route.via);
    message
        .attributes
        .push(RouteAttribute::Destination(route.destination.address().into()));
    message.attributes.push(RouteAttribute::Oif(index));
    match (inside, route.via) {
        (_, None) => {}
        (Family::V4, Some(via @ IpAddr::V4(_))) | (Family::V6, Some(via @ IpAddr::V6(_))) => {
            message.attributes.push(RouteAttribute::Gateway(via.into()));
        }
        // RFC 8950; the kernel can since 5.2.
        (Family::V4, Some(IpAddr::V6(via))) => message.attributes.push(RouteAttribute::Via(RouteVia::Inet6(via))),
        (Family::V6, Some(IpAddr::V4(_))) => return None,
    }
    if let Some(source) = route.source {
        if Family::of(source) != inside {
            return None;
        }
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if let Some(mtu) = route.mtu {
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu.bytes())]));
    }
    if route.onlink {
        message.header.flags |= RouteFlags::Onlink;
    }
    if let Some(outer) = &route.encapsulation {
        message.attributes.extend(encapsulate(outer)?);
    }
    Some(message)
}

/// How far away the destination of a route of ours is, in the kernel's words.
const fn scope(inside: Family, via: Option<IpAddr>) -> RouteScope {
    match (inside, via) {
        (Family::V4, None) => RouteScope::Link,
        (Family::V4, Some(_)) | (Family::V6, _) => RouteScope::Universe,
    }
}

/// The message that names a route of ours, and no other, in a deletion: the kernel compares all of it, the protocol too. An encapsulation is
/// not needed to tell ours from others.
pub(super) fn naming(route: &Route, index: u32) -> Option<RouteMessage> {
    let bare = Route {
        onlink: false,
        encapsulation: None,
        ..route.clone()
    };
    let mut message = of(&bare, index)?;
    if route.destination.family() == Family::V6 {
        message.attributes.push(RouteAttribute::Priority(METRIC_V6));
    }
    Some(message)
}

/// The outer header as the kernel takes it, or `None` when its families do not fit each other.
fn encapsulate(outer: &Encapsulation) -> Option<[RouteAttribute; 2]> {
    let id = u64::from(outer.id);
    let (kind, header) = match (outer.source, outer.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => (
            RouteLwEnCapType::Ip,
            [
                RouteIpTunnel::Id(id),
                RouteIpTunnel::Source(source),
                RouteIpTunnel::Destination(destination),
                RouteIpTunnel::Ttl(HOPS),
                RouteIpTunnel::Flags(RouteIpTunnelFlags::from_bits_retain(CHECKSUM | DONT_FRAGMENT)),
            ]
            .map(RouteLwTunnelEncap::Ip)
            .to_vec(),
        ),
        (IpAddr::V6(source), IpAddr::V6(destination)) => (
            RouteLwEnCapType::Ip6,
            [
                RouteIp6Tunnel::Id(id),
                RouteIp6Tunnel::Source(source),
                RouteIp6Tunnel::Destination(destination),
                RouteIp6Tunnel::Hoplimit(HOPS),
                RouteIp6Tunnel::Flags(RouteIp6TunnelFlags::from_bits_retain(CHECKSUM)),
            ]
            .map(RouteLwTunnelEncap::Ip6)
            .to_vec(),
        ),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    Some([RouteAttribute::EncapType(kind), RouteAttribute::Encap(header)])
}

/// The outer header of a route, if it has exactly the shape in which we write it.
fn decapsulate(header: &[RouteLwTunnelEncap]) -> Option<Encapsulation> {
    let (mut id, mut source, mut destination, mut hops, mut flags) = (None, None, None, None, 0);
    for attribute in header {
        match attribute {
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Id(number)) | RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Id(number)) => {
                id = Some(u32::try_from(*number).ok()?);
            }
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Source(address)) => source = Some(IpAddr::V4(*address)),
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Destination(address)) => destination = Some(IpAddr::V4(*address)),
            RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Source(address)) => source = Some(IpAddr::V6(*address)),
            RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Destination(address)) => destination = Some(IpAddr::V6(*address)),
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Ttl(number))
            | RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Hoplimit(number)) => hops = Some(*number),
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Flags(bits)) => flags = bits.bits(),
            RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Flags(bits)) => flags = bits.bits(),
            // The kernel shows a type of service of 0 that nobody asked for.
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Tos(0)) | RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Tc(0)) => {}
            _ => return None,
        }
    }
    let outer = Encapsulation {
        id: id?,
        source: source?,
        destination: destination?,
    };
    let wanted = match Family::of(outer.destination) {
        Family::V4 => CHECKSUM | DONT_FRAGMENT,
        Family::V6 => CHECKSUM,
    };
    (hops == Some(HOPS) && flags == wanted).then_some(outer)
}

/// The message that makes `rule`, and the one that names it in a deletion.
pub(super) fn rule(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.family);
    message.header.table = Table::Node.number();
    message.header.action = RuleAction::ToTable;
    message.header.flags = RuleFlags::Invert;
    message.attributes.extend([
        RuleAttribute::Priority(Rule::PRIORITY),
        RuleAttribute::FwMark(rule.unless.value()),
        RuleAttribute::FwMask(rule.unless.mask()),
        RuleAttribute::Table(u32::from(Table::Node.number())),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ]);
    message
}

/// Reads a rule, if it is ours.
pub(super) fn installed_rule(message: RuleMessage) -> Option<InstalledRule> {
    let ours = RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL));
    message.attributes.contains(&ours).then(|| InstalledRule {
        rule: plain_rule(&message),
        message,
    })
}

/// The rule, if it has the shape in which we write them.
fn plain_rule(message: &RuleMessage) -> Option<Rule> {
    let family = match message.header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    let (mut value, mut mask, mut table, mut priority) = (0, 0, u32::from(message.header.table), 0);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::FwMark(bits) => value = *bits,
            RuleAttribute::FwMask(bits) => mask = *bits,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Protocol(_) => {}
            // "None" in the kernel's words.
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            _ => return None,
        }
    }
    let header = &message.header;
    let plain = header.action == RuleAction::ToTable
        && header.flags == RuleFlags::Invert
        && (header.src_len, header.dst_len, header.tos) == (0, 0, 0)
        && table == u32::from(Table::Node.number())
        && priority == Rule::PRIORITY;
    let unless = Mark::new(value, mask).ok()?;
    plain.then_some(Rule { family, unless })
}

/// The message that names one address of a device.
///
/// IPv6 without duplicate address detection (nobody else is on this link, and a tentative address cannot be a route's source), and both
/// families without a prefix route, which would be the kernel's and not ours.
pub(super) fn address(index: u32, address: IpAddr, length: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(Family::of(address));
    message.header.prefix_len = length;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    message
        .attributes
        .push(AddressAttribute::Flags(match Family::of(address) {
            Family::V4 => AddressFlags::Noprefixroute,
            Family::V6 => AddressFlags::Noprefixroute | AddressFlags::Nodad,
        }));
    message
}

/// Reads a route of a table. `None` for one of no family we know.
pub(super) fn installed(message: RouteMessage, name: impl FnMut(u32) -> Option<String>) -> Option<InstalledRoute> {
    let destination = destination(&message)?;
    Some(InstalledRoute {
        destination,
        table: Table::of(table(&message))?,
        in_our_slot: in_our_slot(&message),
        shape: match plain(&message, destination, name) {
            Some(route) => Shape::Ours(route),
            None => Shape::Other(Box::new(Other {
                words: words(&message, destination),
                message: naming_as_it_is(message),
            })),
        },
    })
}

/// Of a route of any shape, what names it in a deletion. The kernel takes a next hop object or its next hops, not both.
fn naming_as_it_is(mut message: RouteMessage) -> RouteMessage {
    let by_object = message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, RouteAttribute::NhId(_)));
    message.attributes.retain(|attribute| match attribute {
        RouteAttribute::Destination(_)
        | RouteAttribute::Priority(_)
        | RouteAttribute::Table(_)
        | RouteAttribute::PrefSource(_)
        | RouteAttribute::Metrics(_)
        | RouteAttribute::NhId(_) => true,
        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::Oif(_) | RouteAttribute::MultiPath(_) => {
            !by_object
        }
        _ => false,
    });
    message.header.flags = Default::default();
    message
}

/// Whether a route sits where ours go: default metric, no type of service, no source prefix.
pub(super) fn in_our_slot(message: &RouteMessage) -> bool {
    let metric = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let default = match message.header.address_family {
        AddressFamily::Inet6 => METRIC_V6,
        _ => 0,
    };
    message.header.tos == 0 && message.header.source_prefix_length == 0 && metric.unwrap_or(0) == default
}

/// The route, if it has the shape in which we write them.
fn plain(message: &RouteMessage, destination: Prefix, mut name: impl FnMut(u32) -> Option<String>) -> Option<Route> {
    if message.header.kind != RouteType::Unicast || !in_our_slot(message) {
        return None;
    }
    let (mut device, mut via, mut source, mut mtu, mut encapsulation) = (None, None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => device = Some(name(*index)?),
            RouteAttribute::Gateway(address) => via = Some(ip(address)?),
            RouteAttribute::Via(RouteVia::Inet6(address)) => via = Some(IpAddr::V6(*address)),
            RouteAttribute::PrefSource(address) => source = Some(ip(address)?),
            RouteAttribute::Metrics(metrics) => match metrics.as_slice() {
                [] => {}
                [RouteMetric::Mtu(bytes)] => mtu = Some(Mtu::new(*bytes).ok()?),
                _ => return None,
            },
            RouteAttribute::Encap(header) => encapsulation = Some(decapsulate(header)?),
            RouteAttribute::MultiPath(_) | RouteAttribute::NhId(_) | RouteAttribute::Via(_) => return None,
            _ => {}
        }
    }
    if message.header.scope != scope(destination.family(), via) {
        return None;
    }
    Some(Route {
        destination,
        device: device?,
        via,
        source,
        mtu,
        onlink: message.header.flags.contains(RouteFlags::Onlink),
        encapsulation,
        table: Table::of(table(message))?,
    })
}

/// A route of any shape, in words.
fn words(message: &RouteMessage, destination: Prefix) -> String {
    let mut text = match message.header.kind {
        RouteType::Unicast => destination.to_string(),
        kind => format!("{kind:?} {destination}").to_lowercase(),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(metric) => text.push_str(&format!(" metric {metric}")),
            RouteAttribute::MultiPath(hops) => text.push_str(&format!(" over {} next hops", hops.len())),
            RouteAttribute::NhId(object) => text.push_str(&format!(" nhid {object}")),
            RouteAttribute::Encap(_) => text.push_str(" encap of another shape"),
            _ => {}
        }
    }
    if message.header.tos != 0 {
        text.push_str(&format!(" tos {:#x}", message.header.tos));
    }
    text
}

/// Where a route leads.
pub(super) fn destination(message: &RouteMessage) -> Option<Prefix> {
    let all = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    Prefix::containing(address.unwrap_or(all), message.header.destination_prefix_length)
}

/// The number of a route's table.
pub(super) fn table(message: &RouteMessage) -> u32 {
    let long = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    long.unwrap_or(u32::from(message.header.table))
}

/// Whether a route has several next hops.
pub(super) fn is_multipath(message: &RouteMessage) -> bool {
    message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, RouteAttribute::MultiPath(_)))
}

/// The indices of the devices a route leads to.
pub(super) fn devices(message: &RouteMessage) -> BTreeSet<u32> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    message.attributes.iter().flat_map(of).collect()
}

/// Reads the answer to a route question.
pub(super) fn hop(message: &RouteMessage, name: impl Fn(u32) -> Option<String>) -> Hop {
    let kind = match message.header.kind {
        RouteType::Unicast => HopKind::Unicast,
        RouteType::Local => HopKind::Local,
        RouteType::Broadcast => HopKind::Broadcast,
        RouteType::Multicast => HopKind::Multicast,
        RouteType::Anycast => HopKind::Anycast,
        RouteType::BlackHole => HopKind::Blackhole,
        RouteType::Unreachable => HopKind::Unreachable,
        RouteType::Prohibit => HopKind::Prohibit,
        other => HopKind::Other(u8::from(other)),
    };
    let mut hop = Hop {
        device: None,
        via: None,
        source: None,
        kind,
        mtu: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.device = name(*index),
            RouteAttribute::Gateway(address) => hop.via = ip(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => hop.via = Some(IpAddr::V6(*address)),
            RouteAttribute::PrefSource(address) => hop.source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                hop.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(bytes) => Some(*bytes),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    hop
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
