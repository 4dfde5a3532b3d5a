//! The kernel's overlay devices, over rtnetlink: read, and changed one step at a time.
//!
//! Everything here is synchronous. A private runtime drives the netlink connection while a call lasts, and only then.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink grows with each kernel: what we do not know is passed over"
)]

mod connection;
mod message;

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::NeighbourMessage;
use rustix::io::Errno;
use shroud_model::Family;

use crate::{Change, Device, DeviceState, Difference, Error, Kind, Mac, Observed, Setting, Vni, differences};
use connection::Connection;
use message::Link;

/// What a removal removed, and what it could not.
#[derive(Debug, Default)]
#[must_use]
pub struct Removal {
    /// What is gone, one line each.
    pub removed: Vec<String>,
    /// What is still there, and why.
    pub errors: Vec<Error>,
}

/// The overlay of one network namespace: that of the thread that calls [`Overlay::open`].
pub struct Overlay {
    connection: Connection,
    vni: Vni,
    /// The devices of this pass. An index, unlike a name, never comes to mean another device while we work.
    devices: BTreeMap<String, Known>,
}

/// What entries need to know of their device.
#[derive(Debug, Clone, Copy)]
struct Known {
    index: u32,
    underlay: Option<Family>,
}

impl Overlay {
    /// Connects to the kernel. `vni` is the overlay's number, by which our devices are known, wanted or left over.
    ///
    /// # Errors
    /// [`Error::Open`] when the process may not open netlink sockets.
    pub fn open(vni: Vni) -> Result<Self, Error> {
        Ok(Self {
            connection: Connection::open()?,
            vni,
            devices: BTreeMap::new(),
        })
    }

    /// Reads our devices and their entries.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn observe(&mut self) -> Result<Observed, Error> {
        self.devices.clear();
        let mut observed = Observed::default();
        let vni = self.vni;
        for link in self.links()?.into_iter().filter(|link| link.is_ours(vni)) {
            self.remember(&link);
            let mut neighbours = BTreeMap::new();
            for family in [Family::V4, Family::V6] {
                let messages = self.entries("list neighbours", message::all_neighbours(link.index, family))?;
                neighbours.extend(message::read_neighbours(link.index, &messages));
            }
            // Other kinds have no such table, but the kernel answers with the groups the device listens to (`ndo_dflt_fdb_dump`).
            let forwarding = if link.settings.contains(&Setting::Kind(Kind::Vxlan)) {
                let messages = self.entries("list forwarding", message::all_forwarding(link.index))?;
                message::read_forwarding(link.index, &messages)
            } else {
                BTreeMap::new()
            };
            let state = DeviceState {
                index: link.index,
                forwarding,
                neighbours,
                settings: link.settings,
            };
            observed.devices.insert(link.name, state);
        }
        Ok(observed)
    }

    /// Does one step. After an error the steps of the same device that follow may fail too; the next pass sees what is left.
    ///
    /// # Errors
    /// What the kernel answers; [`Error::NotOurs`], [`Error::Occupied`] and [`Error::PortTaken`] when something foreign is in the way, which
    /// then stays as it is; [`Error::NoSuchKind`] when the kernel has no such devices. A removal of what is gone already is no error.
    pub fn apply(&mut self, change: &Change) -> Result<(), Error> {
        let operation = change.to_string();
        match change {
            Change::CreateDevice { name, device } => self.create(&operation, name, device),
            Change::SetDevice { name, differences } => {
                let known = self.known(&operation, name)?;
                self.adjust(&operation, known.index, differences)
            }
            Change::RemoveDevice { name, index, .. } => {
                self.devices.remove(name);
                self.delete(&operation, *index).map(drop)
            }
            Change::SetForwarding { device, mac, new, .. } => self.set_forwarding(&operation, device, *mac, *new),
            Change::RemoveForwarding { device, mac, .. } => {
                let index = self.known(&operation, device)?.index;
                let request = RouteNetlinkMessage::DelNeighbour(message::forwarding(index, *mac, None));
                self.entry_gone(&operation, request)
            }
            Change::SetNeighbour {
                device, address, new, ..
            } => {
                let index = self.known(&operation, device)?.index;
                let request = RouteNetlinkMessage::NewNeighbour(message::neighbour(index, *address, Some(*new)));
                self.connection
                    .change(&operation, request, NLM_F_CREATE | NLM_F_REPLACE)
            }
            Change::RemoveNeighbour { device, address, .. } => {
                let index = self.known(&operation, device)?.index;
                let request = RouteNetlinkMessage::DelNeighbour(message::neighbour(index, *address, None));
                self.entry_gone(&operation, request)
            }
        }
    }

    /// Removes all our devices, and with them all our entries.
    pub fn remove(&mut self) -> Removal {
        let mut removal = Removal::default();
        self.devices.clear();
        let links = match self.links() {
            Ok(links) => links,
            Err(error) => {
                removal.errors.push(error);
                return removal;
            }
        };
        let vni = self.vni;
        for link in links.into_iter().filter(|link| link.is_ours(vni)) {
            match self.delete(&format!("delete device {}", link.name), link.index) {
                Ok(true) => removal.removed.push(format!("device {} ({})", link.name, link.what)),
                Ok(false) => {}
                Err(error) => removal.errors.push(error),
            }
        }
        removal
    }
}

/// Devices.
impl Overlay {
    fn create(&mut self, operation: &str, name: &str, device: &Device) -> Result<(), Error> {
        let well_formed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':' && byte != b'%';
        if !name.starts_with("shroud") || name.len() > 15 || !name.bytes().all(well_formed) {
            return Err(Error::Name {
                operation: operation.to_owned(),
                device: name.to_owned(),
            });
        }
        let request = RouteNetlinkMessage::NewLink(message::creation(name, device));
        if let Err(error) = self.connection.change(operation, request, NLM_F_CREATE | NLM_F_EXCL) {
            return Err(self.why_not(operation, name, device, error));
        }
        let made = self.link(operation, name)?;
        self.remember(&made);
        // The rest cannot be said while a device is being made. It goes up last: until then it sends nothing.
        let different = differences(device, &made.settings);
        match self.adjust(operation, made.index, &different) {
            Err(error) if error.code() == Some(Errno::ADDRINUSE) => {
                // A device that cannot listen is of no use, and would look like one.
                self.devices.remove(name);
                self.delete(operation, made.index)?;
                Err(self.port_taken(operation, name, device.port, error))
            }
            answer => answer,
        }
    }

    fn adjust(&mut self, operation: &str, index: u32, differences: &[Difference]) -> Result<(), Error> {
        let settings = || differences.iter().map(|difference| &difference.new);
        if settings().any(|setting| !matches!(setting, Setting::Up(_))) {
            let message = message::adjustment(index, settings());
            // `RTM_NEWLINK`, for `RTM_SETLINK` passes over what is VXLAN's own.
            self.connection
                .change(operation, RouteNetlinkMessage::NewLink(message), 0)?;
        }
        if settings().any(|setting| *setting == Setting::Up(true)) {
            let mut message = LinkMessage::default();
            message.header.index = index;
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
            self.connection
                .change(operation, RouteNetlinkMessage::SetLink(message), 0)?;
        }
        Ok(())
    }

    /// Answers whether it was still there.
    fn delete(&mut self, operation: &str, index: u32) -> Result<bool, Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match self
            .connection
            .change(operation, RouteNetlinkMessage::DelLink(message), 0)
        {
            Ok(()) => Ok(true),
            Err(error) if error.code() == Some(Errno::NODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What a refusal to make a device means.
    fn why_not(&mut self, operation: &str, name: &str, device: &Device, error: Error) -> Error {
        match error.code() {
            Some(Errno::OPNOTSUPP) => Error::NoSuchKind {
                operation: operation.to_owned(),
                kind: device.kind,
            },
            // VXLAN says "exists", Geneve "busy" or, where only one of two takes addresses with packets, "not permitted" (but that may
            // also mean us).
            Some(Errno::EXIST | Errno::BUSY | Errno::PERM) => self.in_the_way(operation, name, device).unwrap_or(error),
            _ => error,
        }
    }

    /// The device because of which another could not be made.
    fn in_the_way(&mut self, operation: &str, name: &str, device: &Device) -> Option<Error> {
        let links = self.links().ok()?;
        if let Some(link) = links.iter().find(|link| link.name == name) {
            return Some(Error::NotOurs {
                operation: operation.to_owned(),
                device: name.to_owned(),
                what: link.what.clone(),
            });
        }
        let same = |link: &&Link| {
            let number = device.kind == Kind::Geneve || link.vni == Some(device.vni.number());
            link.settings.contains(&Setting::Kind(device.kind)) && link.port() == Some(device.port) && number
        };
        let link = links.iter().find(same)?;
        Some(Error::Occupied {
            operation: operation.to_owned(),
            by: format!("device {} ({})", link.name, link.what),
        })
    }

    fn port_taken(&mut self, operation: &str, name: &str, port: u16, error: Error) -> Error {
        let links = match self.links() {
            Ok(links) => links,
            Err(_) => return error,
        };
        let holder = links.iter().find(|link| link.name != name && link.port() == Some(port));
        Error::PortTaken {
            operation: operation.to_owned(),
            port,
            by: holder.map_or_else(
                || "another program (ss -ulpn shows it)".to_owned(),
                |link| format!("device {} ({})", link.name, link.what),
            ),
        }
    }

    fn remember(&mut self, link: &Link) {
        let underlay = link.settings.iter().find_map(|setting| match setting {
            Setting::Underlay(family) => Some(*family),
            _ => None,
        });
        let known = Known {
            index: link.index,
            underlay,
        };
        self.devices.insert(link.name.clone(), known);
    }

    fn known(&self, operation: &str, device: &str) -> Result<Known, Error> {
        self.devices.get(device).copied().ok_or_else(|| Error::NoDevice {
            operation: operation.to_owned(),
            device: device.to_owned(),
        })
    }

    fn link(&mut self, operation: &str, name: &str) -> Result<Link, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = self.connection.ask(operation, RouteNetlinkMessage::GetLink(message))?;
        let link = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => message::link(link),
            _ => None,
        });
        link.ok_or_else(|| Error::NoDevice {
            operation: operation.to_owned(),
            device: name.to_owned(),
        })
    }

    fn links(&mut self) -> Result<Vec<Link>, Error> {
        let answers = self
            .connection
            .list("list devices", &RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let links = answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => message::link(link),
            _ => None,
        });
        Ok(links.collect())
    }
}

/// Entries.
impl Overlay {
    fn set_forwarding(&mut self, operation: &str, device: &str, mac: Mac, underlay: IpAddr) -> Result<(), Error> {
        let known = self.known(operation, device)?;
        if known.underlay.is_some_and(|family| family != Family::of(underlay)) {
            return Err(Error::Family {
                operation: operation.to_owned(),
                underlay,
            });
        }
        let request = RouteNetlinkMessage::NewNeighbour(message::forwarding(known.index, mac, Some(underlay)));
        self.connection.change(operation, request, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn entry_gone(&mut self, operation: &str, request: RouteNetlinkMessage) -> Result<(), Error> {
        match self.connection.change(operation, request, 0) {
            // With its device it is gone too.
            Err(error) if matches!(error.code(), Some(Errno::NOENT | Errno::NODEV)) => Ok(()),
            answer => answer,
        }
    }

    fn entries(&mut self, operation: &str, question: NeighbourMessage) -> Result<Vec<NeighbourMessage>, Error> {
        let answers = match self
            .connection
            .list(operation, &RouteNetlinkMessage::GetNeighbour(question))
        {
            // The device went away between two questions, or this kernel has no such family.
            Err(error) if matches!(error.code(), Some(Errno::NODEV | Errno::AFNOSUPPORT | Errno::OPNOTSUPP)) => {
                Vec::new()
            }
            answers => answers?,
        };
        let entries = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(entry) => Some(entry),
            _ => None,
        });
        Ok(entries.collect())
    }
}
