//! The kernel's routing, over rtnetlink: read, changed one step at a time, and asked.
//!
//! Everything here is synchronous. A private runtime drives the netlink connection while a call lasts, and only then.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink grows with each kernel: what we do not know is passed over"
)]

mod connection;
mod message;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::rule::RuleMessage;
use rustix::io::Errno;
use shroud_model::{Family, Mark, Prefix};

use crate::observed::Shape;
use crate::{
    Address, Change, Desired, Error, Facts, Hop, HopKind, InstalledRoute, InstalledRule, LinkFacts, LinkState,
    Observed, PROTOCOL, Route, Scope, Sysctl, Table,
};
use connection::Connection;

/// The kernel's number for the table of local addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;

/// Where routes of ours can be.
const OUR_TABLES: [(Family, Table); 4] = [
    (Family::V4, Table::Main),
    (Family::V4, Table::Node),
    (Family::V6, Table::Main),
    (Family::V6, Table::Node),
];

const OURS: &str = "a tun, wireguard, vxlan or geneve device";

/// What a removal removed, and what it could not.
#[derive(Debug, Default)]
#[must_use]
pub struct Removal {
    /// What is gone, one line each.
    pub removed: Vec<String>,
    /// What is still there, and why.
    pub errors: Vec<Error>,
}

/// The routing of one network namespace: that of the thread that calls [`Kernel::open`].
///
/// All calls belong on that same thread: the netlink socket stays in its namespace, but `/proc/sys/net` shows the namespace of whoever
/// reads it.
pub struct Kernel {
    connection: Connection,
    /// Foreign routes by destination, read when a replacement needs to know whether it is alone; forgotten at the next observation.
    foreign: BTreeMap<(Family, Table), BTreeMap<Prefix, Vec<String>>>,
}

impl Kernel {
    /// Connects to the kernel.
    ///
    /// # Errors
    /// [`Error::Open`] when the process may not open netlink sockets.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            connection: Connection::open()?,
            foreign: BTreeMap::new(),
        })
    }

    /// The netlink port by which the kernel names us as the cause of a notice, for [`Monitor::ignore`](crate::Monitor::ignore). It is another
    /// after a connection has ended.
    pub fn port(&self) -> u32 {
        self.connection.port()
    }

    /// Reads what is ours, and what `desired` asks for.
    ///
    /// # Errors
    /// [`Error::NotOurs`] when `desired` names a device that is neither TUN nor WireGuard; otherwise what the kernel answers.
    pub fn observe(&mut self, desired: &Desired) -> Result<Observed, Error> {
        let mut routes = Vec::new();
        for (family, table) in OUR_TABLES {
            let messages = self.routes(family, table, Some(PROTOCOL))?;
            routes.extend(self.all_installed(messages));
        }
        self.observe_beside(routes, desired)
    }

    /// Reads what [`Kernel::observe`] reads besides the routes, which were listed just now.
    ///
    /// # Errors
    /// As with [`Kernel::observe`].
    pub fn observe_beside(&mut self, routes: Vec<InstalledRoute>, desired: &Desired) -> Result<Observed, Error> {
        self.foreign.clear();
        let mut observed = Observed {
            routes,
            ..Observed::default()
        };
        for device in desired.links.keys() {
            if let Some(state) = self.link_state(device)? {
                observed.links.insert(device.clone(), state);
            }
        }
        for family in [Family::V4, Family::V6] {
            observed.rules.extend(self.rules(family)?);
        }
        for sysctl in desired.sysctls.keys() {
            observed.sysctls.insert(sysctl.clone(), sysctl.read()?);
        }
        if desired.sysctls.contains_key(&Sysctl::Forwarding(Family::V6)) {
            observed.advertised = self.advertised()?;
        }
        Ok(observed)
    }

    /// Does one step.
    ///
    /// # Errors
    /// What the kernel answers; [`Error::Occupied`] when a foreign route is in the way, which then stays as it is. A removal of what is
    /// gone already is no error.
    pub fn apply(&mut self, change: &Change) -> Result<(), Error> {
        let operation = change.to_string();
        match change {
            Change::SetMtu { device, new, .. } => self.set_link(&operation, device, |link| {
                link.attributes.push(LinkAttribute::Mtu(new.bytes()))
            }),
            Change::LinkUp { device } => self.set_link(&operation, device, |link| {
                link.header.flags = LinkFlags::Up;
                link.header.change_mask = LinkFlags::Up;
            }),
            Change::AddAddress { device, address } => self.add_address(&operation, device, *address),
            Change::RemoveAddress {
                device,
                address,
                length,
            } => self.remove_address(&operation, device, *address, *length),
            Change::WriteSysctl { sysctl, new, .. } => sysctl.write(new),
            Change::AddRoute(route) => self.add_route(&operation, route),
            Change::ReplaceRoute { old, new } => self.replace_route(&operation, old, new),
            Change::RemoveRoute(route) => self.remove_route(&operation, route).map(drop),
            Change::AddRule(rule) => {
                let request = RouteNetlinkMessage::NewRule(message::rule(rule));
                self.connection.change(&operation, request, NLM_F_ACK | NLM_F_CREATE)
            }
            Change::RemoveRule(rule) => self.remove_rule(&operation, rule).map(drop),
        }
    }

    /// Removes all our rules and routes. Addresses go with their device, and settings stay as they are: others may rely on them by now.
    pub fn remove(&mut self) -> Removal {
        let mut removal = Removal::default();
        for family in [Family::V4, Family::V6] {
            let rules = self.rules(family).unwrap_or_else(|error| {
                removal.errors.push(error);
                Vec::new()
            });
            for rule in rules {
                let change = Change::RemoveRule(rule.clone()).to_string();
                match self.remove_rule(&change, &rule) {
                    Ok(true) => removal.removed.push(format!("rule {rule}")),
                    Ok(false) => {}
                    Err(error) => removal.errors.push(error),
                }
            }
        }
        for (family, table) in OUR_TABLES {
            let messages = match self.routes(family, table, Some(PROTOCOL)) {
                Ok(messages) => messages,
                Err(error) => {
                    removal.errors.push(error);
                    continue;
                }
            };
            for route in self.all_installed(messages) {
                let change = Change::RemoveRoute(route.clone()).to_string();
                match self.remove_route(&change, &route) {
                    Ok(true) => removal.removed.push(format!("route {route}")),
                    Ok(false) => {}
                    Err(error) => removal.errors.push(error),
                }
            }
        }
        removal
    }

    /// Deletes our device. Answers whether there was one.
    ///
    /// # Errors
    /// [`Error::NotOurs`] unless its name begins with `shroud` and it is a TUN or WireGuard device; otherwise what the kernel answers.
    pub fn delete_link(&mut self, device: &str) -> Result<bool, Error> {
        let operation = format!("delete device {device}");
        let Some(link) = self.link(&operation, device)? else {
            return Ok(false);
        };
        let kind = kind(&link);
        if !device.starts_with("shroud") || !can_encrypt(kind.as_deref()) {
            return Err(Error::NotOurs {
                operation,
                device: device.to_owned(),
                kind: kind.unwrap_or_else(|| "a physical device".to_owned()),
                wanted: "a tun or wireguard device whose name begins with \"shroud\"",
            });
        }
        let mut message = LinkMessage::default();
        message.header.index = link.header.index;
        match self
            .connection
            .change(&operation, RouteNetlinkMessage::DelLink(message), NLM_F_ACK)
        {
            Ok(()) => Ok(true),
            Err(error) if error.code() == Some(Errno::NODEV.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads the node's devices, its default routes, and which devices lead to a part of `pods`.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn facts(&mut self, pods: &BTreeSet<Prefix>) -> Result<Facts, Error> {
        Ok(self.survey(pods)?.0)
    }

    /// Reads what [`Kernel::facts`] reads, and our routes with it: they are in the same listing.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn survey(&mut self, pods: &BTreeSet<Prefix>) -> Result<(Facts, Vec<InstalledRoute>), Error> {
        let (mut facts, mut ours) = (Facts::default(), Vec::new());
        let mut names = BTreeMap::new();
        // Where pods cannot be.
        let mut not_pods = BTreeSet::new();
        for link in self.links()? {
            let Some(name) = name(&link) else { continue };
            names.insert(link.header.index, name.clone());
            if is_ours(kind(&link).as_deref()) || link.header.flags.contains(LinkFlags::Loopback) {
                not_pods.insert(link.header.index);
            }
            facts.links.insert(
                name,
                LinkFacts {
                    index: link.header.index,
                    mtu: mtu(&link),
                    up: link.header.flags.contains(LinkFlags::Up),
                    kind: kind(&link),
                    addresses: BTreeSet::new(),
                },
            );
        }
        for message in self.addresses(None)? {
            let Some(link) = names
                .get(&message.header.index)
                .and_then(|name| facts.links.get_mut(name))
            else {
                continue;
            };
            let Some(address) = address(&message) else { continue };
            link.addresses.insert(Address {
                address,
                length: message.header.prefix_len,
                scope: match message.header.scope {
                    AddressScope::Universe => Scope::Global,
                    AddressScope::Link => Scope::Link,
                    AddressScope::Host => Scope::Host,
                    other => Scope::Other(u8::from(other)),
                },
            });
        }
        for family in [Family::V4, Family::V6] {
            for message in self.all_tables(family)? {
                let destination = message::destination(&message);
                let is_ours = message.header.protocol == RouteProtocol::Other(PROTOCOL);
                let is_unicast = message.header.kind == RouteType::Unicast;
                let is_default = message.header.destination_prefix_length == 0;
                if is_unicast && is_default && message::table(&message) == u32::from(Table::Main.number()) {
                    let devices = message::devices(&message);
                    let names = devices.iter().filter_map(|index| names.get(index).cloned());
                    facts.default_route_devices.extend(names);
                }
                let is_pods = destination.is_some_and(|known| pods.iter().any(|range| range.covers(known)));
                if is_unicast && is_pods && !is_ours {
                    let devices = message::devices(&message);
                    let names = devices
                        .difference(&not_pods)
                        .filter_map(|index| names.get(index).cloned());
                    facts.pod_route_devices.extend(names);
                }
                if is_ours {
                    ours.extend(message::installed(message, |index| names.get(&index).cloned()));
                }
            }
        }
        Ok((facts, ours))
    }

    /// Asks what the kernel would do with packets of this node's own to each of `destinations`, as [`Kernel::lookup`] does for one.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn lookup_all(
        &mut self,
        destinations: &BTreeSet<IpAddr>,
        mark: Option<Mark>,
    ) -> Result<BTreeMap<IpAddr, Hop>, Error> {
        let questions: Vec<_> = destinations
            .iter()
            .map(|destination| question(*destination, None, None, mark))
            .collect();
        let operations: Vec<String> = questions.iter().map(|(operation, _)| operation.clone()).collect();
        let answers = self.connection.ask_all(questions)?;
        let answered = destinations.iter().zip(operations).zip(answers);
        answered
            .map(|((destination, operation), answers)| Ok((*destination, self.understood(operation, answers)?)))
            .collect()
    }

    /// Asks what the kernel would do with a packet to `destination`.
    ///
    /// With a `source` that is not this node's own, the question is about a packet that arrives from the device behind which the kernel
    /// itself sees that source, as a pod's packet does.
    ///
    /// With a `mark` the question is about a packet that carries it. That of the tunnel does not see [`Table::Node`].
    ///
    /// # Errors
    /// What the kernel answers, apart from its ways to say "not with me", which are a [`HopKind`].
    pub fn lookup(&mut self, destination: IpAddr, source: Option<IpAddr>, mark: Option<Mark>) -> Result<Hop, Error> {
        let Some(source) = source else {
            return self.ask(destination, None, None, mark);
        };
        let back = self.ask(source, None, None, None)?;
        if back.kind == HopKind::Local {
            return self.ask(destination, Some(source), None, mark);
        }
        let Some(input) = &back.device else {
            return Ok(nowhere(HopKind::Refused));
        };
        let Some(index) = self.connection.index(input) else {
            return Ok(nowhere(HopKind::Refused));
        };
        self.ask(destination, Some(source), Some(index), mark)
    }
}

/// Devices and addresses.
impl Kernel {
    fn link_state(&mut self, device: &str) -> Result<Option<LinkState>, Error> {
        let operation = format!("read device {device}");
        let Some(link) = self.link(&operation, device)? else {
            return Ok(None);
        };
        let kind = kind(&link);
        if !is_ours(kind.as_deref()) {
            return Err(not_ours(operation, device, kind));
        }
        let link_local = |address: &IpAddr| matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        let addresses = self
            .addresses(Some(link.header.index))?
            .iter()
            .filter(|message| message.header.index == link.header.index)
            .filter_map(|message| Some((address(message)?, message.header.prefix_len)))
            .filter(|(address, _)| !link_local(address))
            .collect();
        Ok(Some(LinkState {
            index: link.header.index,
            mtu: mtu(&link),
            up: link.header.flags.contains(LinkFlags::Up),
            addresses,
        }))
    }

    fn link(&mut self, operation: &str, device: &str) -> Result<Option<LinkMessage>, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(device.to_owned()));
        match self.connection.ask(operation, RouteNetlinkMessage::GetLink(message)) {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            })),
            Err(error) if error.code() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn set_link(&mut self, operation: &str, device: &str, set: impl FnOnce(&mut LinkMessage)) -> Result<(), Error> {
        let index = self.our_index(operation, device)?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        set(&mut message);
        self.connection
            .change(operation, RouteNetlinkMessage::SetLink(message), NLM_F_ACK)
    }

    fn add_address(&mut self, operation: &str, device: &str, address: IpAddr) -> Result<(), Error> {
        let index = self.our_index(operation, device)?;
        let message = message::address(index, address, Prefix::host(address).length());
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self
            .connection
            .change(operation, RouteNetlinkMessage::NewAddress(message), flags)
        {
            Err(error) if error.code() == Some(Errno::EXIST.raw_os_error()) => Ok(()),
            answer => answer,
        }
    }

    fn remove_address(&mut self, operation: &str, device: &str, address: IpAddr, length: u8) -> Result<(), Error> {
        let index = self.our_index(operation, device)?;
        let message = message::address(index, address, length);
        match self
            .connection
            .change(operation, RouteNetlinkMessage::DelAddress(message), NLM_F_ACK)
        {
            Err(error) if error.code() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => Ok(()),
            answer => answer,
        }
    }

    /// The index of a device, if it is one of ours.
    fn our_index(&mut self, operation: &str, device: &str) -> Result<u32, Error> {
        let Some(link) = self.link(operation, device)? else {
            return Err(Error::NoDevice {
                operation: operation.to_owned(),
                device: device.to_owned(),
            });
        };
        match kind(&link) {
            kind if is_ours(kind.as_deref()) => Ok(link.header.index),
            kind => Err(not_ours(operation.to_owned(), device, kind)),
        }
    }

    fn links(&mut self) -> Result<Vec<LinkMessage>, Error> {
        let answers = self
            .connection
            .list("list devices", &RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    fn addresses(&mut self, index: Option<u32>) -> Result<Vec<AddressMessage>, Error> {
        let mut message = AddressMessage::default();
        message.header.index = index.unwrap_or(0);
        let answers = self
            .connection
            .list("list addresses", &RouteNetlinkMessage::GetAddress(message));
        let answers = match answers {
            // The device went away between two questions.
            Err(error) if error.code() == Some(Errno::NODEV.raw_os_error()) => Vec::new(),
            answers => answers?,
        };
        let addresses = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        });
        Ok(addresses.collect())
    }
}

/// Routes.
impl Kernel {
    fn add_route(&mut self, operation: &str, route: &Route) -> Result<(), Error> {
        let message = self.message(operation, route)?;
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self
            .connection
            .change(operation, RouteNetlinkMessage::NewRoute(message), flags)
        {
            Err(error) if error.code() == Some(Errno::EXIST.raw_os_error()) => {
                let by = self.in_the_way(route.destination, route.table)?;
                Err(Error::Occupied {
                    route: route.to_string(),
                    by: by.unwrap_or_else(|| "a route".to_owned()),
                })
            }
            answer => answer,
        }
    }

    /// Replaces a route of ours in one step.
    ///
    /// `NLM_F_REPLACE` goes by destination, type of service and metric alone, not by protocol: IPv4 replaces the first such route
    /// (`fib_table_insert`, net/ipv4/fib_trie.c), IPv6 all next hops of it (`fib6_add_rt2node`, net/ipv6/ip6_fib.c). So it is only used where
    /// no foreign route shares the place.
    fn replace_route(&mut self, operation: &str, old: &InstalledRoute, new: &Route) -> Result<(), Error> {
        if let Shape::Other(other) = &old.shape
            && message::is_multipath(&other.message)
        {
            // IPv6 shows next hops of several owners as one route with the protocol of the first. Only a deletion tells them apart.
            self.remove_route(operation, old)?;
            return self.add_route(operation, new);
        }
        if let Some(by) = self.in_the_way(new.destination, new.table)? {
            return Err(Error::Occupied {
                route: new.to_string(),
                by,
            });
        }
        let message = self.message(operation, new)?;
        let request = RouteNetlinkMessage::NewRoute(message);
        match self.connection.change(operation, request, NLM_F_ACK | NLM_F_REPLACE) {
            // Ours went away in between: there is nothing to replace, and nothing to break.
            Err(error) if error.code() == Some(Errno::NOENT.raw_os_error()) => {
                tracing::debug!(route = %old, "route to replace is gone, adding the new one");
                self.add_route(operation, new)
            }
            answer => answer,
        }
    }

    /// Answers whether it was still there.
    fn remove_route(&mut self, operation: &str, route: &InstalledRoute) -> Result<bool, Error> {
        let message = match &route.shape {
            Shape::Other(other) => Some(other.message.clone()),
            // With a device go its routes.
            Shape::Ours(route) => {
                let index = self.connection.index(&route.device);
                index.and_then(|index| message::naming(route, index))
            }
        };
        let Some(message) = message else { return Ok(false) };
        match self
            .connection
            .change(operation, RouteNetlinkMessage::DelRoute(message), NLM_F_ACK)
        {
            Ok(()) => Ok(true),
            Err(error) if error.code() == Some(Errno::SRCH.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn message(&mut self, operation: &str, route: &Route) -> Result<RouteMessage, Error> {
        let Some(index) = self.connection.index(&route.device) else {
            return Err(Error::NoDevice {
                operation: operation.to_owned(),
                device: route.device.clone(),
            });
        };
        message::of(route, index).ok_or_else(|| Error::Families {
            route: route.to_string(),
        })
    }

    fn installed(&self, message: RouteMessage) -> Option<InstalledRoute> {
        message::installed(message, |index| self.connection.name(index))
    }

    /// The routes of a listing. Thousands lead to a few devices, whose names are asked for once.
    fn all_installed(&self, messages: Vec<RouteMessage>) -> Vec<InstalledRoute> {
        let mut names: BTreeMap<u32, Option<String>> = BTreeMap::new();
        let mut name = |index| {
            let known = names.entry(index).or_insert_with(|| self.connection.name(index));
            known.clone()
        };
        let routes = messages.into_iter();
        routes
            .filter_map(|message| message::installed(message, &mut name))
            .collect()
    }

    /// The foreign routes where a route of ours for this destination would be, as text.
    fn in_the_way(&mut self, destination: Prefix, table: Table) -> Result<Option<String>, Error> {
        let key = (destination.family(), table);
        if !self.foreign.contains_key(&key) {
            let mut foreign: BTreeMap<Prefix, Vec<String>> = BTreeMap::new();
            for message in self.routes(key.0, table, None)? {
                let protocol = message.header.protocol;
                if protocol == RouteProtocol::Other(PROTOCOL) || !message::in_our_slot(&message) {
                    continue;
                }
                let Some(installed) = self.installed(message) else {
                    continue;
                };
                foreign
                    .entry(installed.destination)
                    .or_default()
                    .push(format!("{installed} proto {protocol}"));
            }
            self.foreign.insert(key, foreign);
        }
        let found = self.foreign.get(&key).and_then(|foreign| foreign.get(&destination));
        Ok(found.map(|routes| routes.join(", ")))
    }

    /// A table's routes of one family, all or those of one protocol.
    fn routes(&mut self, family: Family, table: Table, protocol: Option<u8>) -> Result<Vec<RouteMessage>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = message::family(family);
        message.header.table = table.number();
        message.header.protocol = protocol.map_or(RouteProtocol::Unspec, RouteProtocol::from);
        let routes = self.list_routes(message)?;
        // Filtering is the kernel's duty since 4.20; an older one sends everything.
        let inside = |route: &RouteMessage| message::table(route) == u32::from(table.number());
        let wanted = |route: &RouteMessage| protocol.is_none_or(|number| u8::from(route.header.protocol) == number);
        Ok(routes
            .into_iter()
            .filter(|route| inside(route) && wanted(route))
            .collect())
    }

    fn all_tables(&mut self, family: Family) -> Result<Vec<RouteMessage>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = message::family(family);
        let routes = self.list_routes(message)?;
        Ok(routes
            .into_iter()
            .filter(|route| message::table(route) != TABLE_LOCAL)
            .collect())
    }

    fn list_routes(&mut self, message: RouteMessage) -> Result<Vec<RouteMessage>, Error> {
        let family = message.header.address_family;
        let operation = format!("list {family:?} routes");
        let answers = match self
            .connection
            .list(&operation, &RouteNetlinkMessage::GetRoute(message))
        {
            // This kernel has no such table yet, or no such family at all: no routes.
            Err(error) if is_one_of(&error, [Errno::NOENT, Errno::AFNOSUPPORT, Errno::OPNOTSUPP]) => Vec::new(),
            answers => answers?,
        };
        let routes = answers.into_iter().filter_map(|answer| match answer {
            // Cached copies are no routes of a table.
            RouteNetlinkMessage::NewRoute(route) if !route.header.flags.contains(RouteFlags::Cloned) => Some(route),
            _ => None,
        });
        Ok(routes.collect())
    }

    /// Devices with routes from router advertisements, which they would lose when IPv6 forwarding is switched on.
    fn advertised(&mut self) -> Result<BTreeSet<String>, Error> {
        let learned = self.routes(Family::V6, Table::Main, Some(u8::from(RouteProtocol::Ra)))?;
        let indices: BTreeSet<u32> = learned.iter().flat_map(message::devices).collect();
        let mut devices = BTreeSet::new();
        for device in indices.into_iter().filter_map(|index| self.connection.name(index)) {
            if Sysctl::AcceptRa(device.clone()).read()?.as_deref() == Some("1") {
                devices.insert(device);
            }
        }
        Ok(devices)
    }

    fn ask(
        &mut self,
        destination: IpAddr,
        source: Option<IpAddr>,
        input: Option<u32>,
        mark: Option<Mark>,
    ) -> Result<Hop, Error> {
        let (operation, question) = question(destination, source, input, mark);
        let answers = self.connection.ask(&operation, question);
        match self.understood(operation, answers) {
            // A blackhole says the same as a source that cannot be; without a source it can only be the blackhole.
            Ok(hop) if hop.kind == HopKind::Blackhole && source.is_some() => {
                let hop = self.ask(destination, None, None, mark)?;
                Ok(if hop.kind == HopKind::Blackhole {
                    hop
                } else {
                    nowhere(HopKind::Refused)
                })
            }
            understood => understood,
        }
    }

    /// What the answer to a [`question`] means.
    fn understood(&self, operation: String, answers: Result<Vec<RouteNetlinkMessage>, Error>) -> Result<Hop, Error> {
        let answers = match answers {
            Ok(answers) => answers,
            Err(error) => {
                return match error.code().map(Errno::from_raw_os_error) {
                    // The error numbers of route types: `fib_props`, net/ipv4/fib_semantics.c; `ip6_rt_type_to_error`, net/ipv6/route.c.
                    Some(Errno::NETUNREACH) => Ok(nowhere(HopKind::NoRoute)),
                    Some(Errno::HOSTUNREACH) => Ok(nowhere(HopKind::Unreachable)),
                    Some(Errno::ACCESS) => Ok(nowhere(HopKind::Prohibit)),
                    Some(Errno::XDEV) => Ok(nowhere(HopKind::Refused)),
                    Some(Errno::INVAL) => Ok(nowhere(HopKind::Blackhole)),
                    _ => Err(error),
                };
            }
        };
        let answer = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        let Some(answer) = answer else {
            return Err(Error::request(operation, io::ErrorKind::InvalidData.into()));
        };
        Ok(message::hop(&answer, |index| self.connection.name(index)))
    }
}

/// Rules.
impl Kernel {
    /// Our rules of one family.
    fn rules(&mut self, family: Family) -> Result<Vec<InstalledRule>, Error> {
        let mut message = RuleMessage::default();
        message.header.family = message::family(family);
        let operation = format!("list {family} rules");
        let answers = match self.connection.list(&operation, &RouteNetlinkMessage::GetRule(message)) {
            // This kernel has no such family, or no policy routing: no rules.
            Err(error) if is_one_of(&error, [Errno::AFNOSUPPORT, Errno::OPNOTSUPP]) => Vec::new(),
            answers => answers?,
        };
        let rules = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(rule) => message::installed_rule(rule),
            _ => None,
        });
        Ok(rules.collect())
    }

    /// Answers whether it was still there.
    fn remove_rule(&mut self, operation: &str, rule: &InstalledRule) -> Result<bool, Error> {
        let request = RouteNetlinkMessage::DelRule(rule.message.clone());
        match self.connection.change(operation, request, NLM_F_ACK) {
            Ok(()) => Ok(true),
            Err(error) if error.code() == Some(Errno::NOENT.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The question what becomes of a packet, and what it is called in errors.
fn question(
    destination: IpAddr,
    source: Option<IpAddr>,
    input: Option<u32>,
    mark: Option<Mark>,
) -> (String, RouteNetlinkMessage) {
    let operation = format!("look up the route to {destination}");
    let mut message = RouteMessage::default();
    message.header.address_family = message::family(Family::of(destination));
    message.header.destination_prefix_length = Prefix::host(destination).length();
    message.attributes.push(RouteAttribute::Destination(destination.into()));
    if let Some(source) = source {
        message.header.source_prefix_length = Prefix::host(source).length();
        message.attributes.push(RouteAttribute::Source(source.into()));
    }
    message.attributes.extend(input.map(RouteAttribute::Iif));
    message
        .attributes
        .extend(mark.map(|mark| RouteAttribute::Mark(mark.value())));
    (operation, RouteNetlinkMessage::GetRoute(message))
}

fn nowhere(kind: HopKind) -> Hop {
    Hop {
        device: None,
        via: None,
        source: None,
        kind,
        mtu: None,
    }
}

fn is_one_of<const N: usize>(error: &Error, numbers: [Errno; N]) -> bool {
    error
        .code()
        .is_some_and(|code| numbers.iter().any(|number| number.raw_os_error() == code))
}

fn not_ours(operation: String, device: &str, kind: Option<String>) -> Error {
    let kind = kind.unwrap_or_else(|| "a physical device".to_owned());
    Error::NotOurs {
        operation,
        device: device.to_owned(),
        kind,
        wanted: OURS,
    }
}

/// Whether it can be a device of ours that wants to be set up.
fn is_ours(kind: Option<&str>) -> bool {
    can_encrypt(kind) || matches!(kind, Some("vxlan" | "geneve"))
}

/// Whether it can be an encryption device.
fn can_encrypt(kind: Option<&str>) -> bool {
    matches!(kind, Some("tun" | "wireguard"))
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn mtu(link: &LinkMessage) -> u32 {
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or(0)
}

fn kind(link: &LinkMessage) -> Option<String> {
    let infos = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind.clone()),
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    })
}

/// The address itself: `IFA_LOCAL` where there is one, for `IFA_ADDRESS` is the other end on a point-to-point device.
fn address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}
