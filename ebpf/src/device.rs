//! Looks at network devices and the classic filters on them, through netlink. Changes nothing.
//!
//! aya attaches filters, but cannot say which ones are there.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink has hundreds of messages and attributes, and grows; we read a dozen"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use shroud_gate::Link;

use crate::Error;

/// A network device of this namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) index: u32,
    /// What stands before the IP header, or the name of what we cannot read.
    pub(crate) link: Result<Link, String>,
}

/// A BPF filter on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) priority: u16,
    pub(crate) handle: u32,
    pub(crate) name: String,
    pub(crate) program: u32,
}

/// Which side of a device a filter hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Ingress,
    Egress,
}

/// All devices of this network namespace, by name.
pub(crate) fn devices() -> Result<BTreeMap<String, Device>, Error> {
    let mut devices = BTreeMap::new();
    dump(
        "list devices",
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
        |message| {
            let RouteNetlinkMessage::NewLink(link) = message else {
                return;
            };
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            let Some(name) = name else { return };
            let kind = link.header.link_layer_type;
            let device = Device {
                name: name.clone(),
                index: link.header.index,
                link: before_ip(kind),
            };
            devices.insert(name, device);
        },
    )?;
    Ok(devices)
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel knows 70 link types; those named are the ones we can read"
)]
fn before_ip(kind: LinkLayerType) -> Result<Link, String> {
    match kind {
        LinkLayerType::Ether | LinkLayerType::Loopback => Ok(Link::Ethernet),
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre => Ok(Link::Ip),
        other => Err(other.to_string()),
    }
}

/// The indices of the devices that have a clsact qdisc.
pub(crate) fn with_clsact() -> Result<BTreeSet<u32>, Error> {
    let mut indices = BTreeSet::new();
    dump(
        "list qdiscs",
        RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()),
        |message| {
            let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = message else {
                return;
            };
            let is_clsact = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "clsact");
            if qdisc.attributes.iter().any(is_clsact) {
                indices.extend(u32::try_from(qdisc.header.index));
            }
        },
    )?;
    Ok(indices)
}

/// The BPF filters on one side of a device that has a clsact qdisc.
pub(crate) fn filters(index: u32, side: Side) -> Result<Vec<Filter>, Error> {
    let minor = match side {
        Side::Ingress => TcHandle::MIN_INGRESS,
        Side::Egress => TcHandle::MIN_EGRESS,
    };
    let mut request = TcMessage::default();
    request.header.index = index.cast_signed();
    request.header.parent = TcHandle { major: u16::MAX, minor };
    let mut filters = Vec::new();
    dump(
        "list filters",
        RouteNetlinkMessage::GetTrafficFilter(request),
        |message| {
            let RouteNetlinkMessage::NewTrafficFilter(filter) = message else {
                return;
            };
            filters.extend(bpf_filter(&filter));
        },
    )?;
    Ok(filters)
}

fn bpf_filter(message: &TcMessage) -> Option<Filter> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let mut name = None;
    let mut program = None;
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(given)) => name = Some(given.clone()),
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program = Some(*id),
            _ => {}
        }
    }
    let priority = (message.header.info >> 16) as u16;
    Some(Filter {
        priority,
        handle: u32::from(message.header.handle),
        name: name?,
        program: program?,
    })
}

/// Asks for a list and hands each item to `each`.
fn dump(
    operation: &'static str,
    request: RouteNetlinkMessage,
    mut each: impl FnMut(RouteNetlinkMessage),
) -> Result<(), Error> {
    let failed = |source| Error::Netlink { operation, source };
    let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
    socket.bind_auto().map_err(failed)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0).map_err(failed)?;
    loop {
        let (datagram, _) = socket.recv_from_full().map_err(failed)?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
            let length = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(failed(error.to_io())),
                NetlinkPayload::InnerMessage(inner) => each(inner),
                _ => {}
            }
            rest = rest.get(length.max(4)..).unwrap_or_default();
        }
    }
}
