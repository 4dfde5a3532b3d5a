//! Between our routes and the kernel's messages.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    RouteVia,
};
use shroud_model::{Family, Mtu, Prefix};

use crate::{Hop, HopKind, InstalledRoute, PROTOCOL, Route};

/// The metric the kernel gives an IPv6 route for which none is asked (`IP6_RT_PRIO_USER`, include/net/ip6_route.h). IPv4's is 0.
const METRIC_V6: u32 = 1024;

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
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.kind = RouteType::Unicast;
    message.header.scope = match (inside, route.via) {
        (Family::V4, None) => RouteScope::Link,
        (Family::V4, Some(_)) | (Family::V6, _) => RouteScope::Universe,
    };
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
    Some(message)
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
pub(super) fn installed(mut message: RouteMessage, name: impl Fn(u32) -> Option<String>) -> Option<InstalledRoute> {
    let destination = destination(&message)?;
    let route = plain(&message, destination, name);
    let shape = shape(&message, destination);
    let in_our_slot = in_our_slot(&message);
    // What is left names the route in a deletion: the kernel compares all of it, the protocol too. It takes a next hop object or its
    // next hops, not both.
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
    Some(InstalledRoute {
        destination,
        route,
        in_our_slot,
        shape,
        message,
    })
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
fn plain(message: &RouteMessage, destination: Prefix, name: impl Fn(u32) -> Option<String>) -> Option<Route> {
    if message.header.kind != RouteType::Unicast || !in_our_slot(message) {
        return None;
    }
    let (mut device, mut via, mut source, mut mtu) = (None, None, None, None);
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
            RouteAttribute::MultiPath(_)
            | RouteAttribute::NhId(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::Via(_) => {
                return None;
            }
            _ => {}
        }
    }
    Some(Route {
        destination,
        device: device?,
        via,
        source,
        mtu,
    })
}

/// A route of any shape, in words.
fn shape(message: &RouteMessage, destination: Prefix) -> String {
    let mut text = match message.header.kind {
        RouteType::Unicast => destination.to_string(),
        kind => format!("{kind:?} {destination}").to_lowercase(),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(metric) => text.push_str(&format!(" metric {metric}")),
            RouteAttribute::MultiPath(hops) => text.push_str(&format!(" over {} next hops", hops.len())),
            RouteAttribute::NhId(object) => text.push_str(&format!(" nhid {object}")),
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
