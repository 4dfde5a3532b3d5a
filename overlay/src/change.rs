//! The difference between what should be and what is.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use crate::setting::{Difference, Setting, differences};
use crate::{Desired, Device, DeviceState, Forwarding, Kind, Mac, Neighbour, Observed};

/// One step from what is to what should be. Its text is for people: `device shroud.vxlan: mtu 1500 -> mtu 1390`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Makes a device, sets it up and takes it up. Its peers follow in steps of their own.
    CreateDevice {
        /// Its name.
        name: String,
        /// What it is to be.
        device: Device,
    },
    /// Changes what can be changed on a living device.
    SetDevice {
        /// Its name.
        name: String,
        /// What is different.
        differences: Vec<Difference>,
    },
    /// Removes a device of ours, and all its entries with it.
    RemoveDevice {
        /// Its name.
        name: String,
        /// Its interface index.
        index: u32,
        /// What is different that the kernel cannot change; empty when the device is just not wanted.
        because: Vec<Difference>,
    },
    /// Sends frames to a link-layer address to a node. One step, also when they went elsewhere before.
    SetForwarding {
        /// The device.
        device: String,
        /// The link-layer address.
        mac: Mac,
        /// Where they go now, if anywhere.
        old: Option<Forwarding>,
        /// The node's underlay address.
        new: IpAddr,
    },
    /// Sends frames to a link-layer address nowhere.
    RemoveForwarding {
        /// The device.
        device: String,
        /// The link-layer address.
        mac: Mac,
        /// Where they go now.
        old: Forwarding,
    },
    /// Gives a next hop its link-layer address. One step, also when it had another before.
    SetNeighbour {
        /// The device.
        device: String,
        /// The next hop.
        address: IpAddr,
        /// What is believed now, if anything.
        old: Option<Neighbour>,
        /// Its link-layer address.
        new: Mac,
    },
    /// Forgets a next hop.
    RemoveNeighbour {
        /// The device.
        device: String,
        /// The next hop.
        address: IpAddr,
        /// What is believed now.
        old: Neighbour,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateDevice { name, device } => {
                write!(f, "device {name}: none -> {} port {}", device.kind, device.port)?;
                match device.kind {
                    Kind::Vxlan => write!(f, " vni {} local {}", device.vni, device.local)?,
                    Kind::Geneve => write!(f, " external")?,
                }
                write!(f, " mac {} mtu {}", device.mac, device.mtu)
            }
            Self::SetDevice { name, differences } => write!(f, "device {name}: {}", list(differences)),
            Self::RemoveDevice { name, because, .. } if because.is_empty() => write!(f, "device {name}: removed"),
            Self::RemoveDevice { name, because, .. } => {
                write!(f, "device {name}: removed, to be made anew ({})", list(because))
            }
            Self::SetForwarding { device, mac, old, new } => {
                write!(f, "forwarding {mac} dev {device}: {} -> {new}", or_none(old.as_ref()))
            }
            Self::RemoveForwarding { device, mac, old } => write!(f, "forwarding {mac} dev {device}: {old} -> none"),
            Self::SetNeighbour {
                device,
                address,
                old,
                new,
            } => write!(
                f,
                "neighbour {address} dev {device}: {} -> {new}",
                or_none(old.as_ref())
            ),
            Self::RemoveNeighbour { device, address, old } => {
                write!(f, "neighbour {address} dev {device}: {old} -> none")
            }
        }
    }
}

fn list(differences: &[Difference]) -> String {
    let texts: Vec<String> = differences.iter().map(Difference::to_string).collect();
    texts.join(", ")
}

fn or_none<T: fmt::Display>(value: Option<&T>) -> String {
    value.map_or_else(|| "none".to_owned(), T::to_string)
}

/// The steps from `observed` to `desired`, in the order in which they must happen. Empty when nothing is to be done.
///
/// What a new device could collide with goes first (the kernel allows one device for a VNI and port); then come devices and what they must
/// know; what goes, goes last.
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut made = BTreeMap::new();
    for (name, device) in &desired.devices {
        let state = observed.devices.get(name);
        let different = state.map_or_else(Vec::new, |state| differences(device, &state.settings));
        let (because, adjustable): (Vec<_>, Vec<_>) = different
            .into_iter()
            .partition(|difference| difference.new.needs_another_device());
        if let Some(state) = state.filter(|_| !because.is_empty()) {
            changes.push(Change::RemoveDevice {
                name: name.clone(),
                index: state.index,
                because,
            });
            made.insert(name, (None, Vec::new()));
        } else {
            made.insert(name, (state, adjustable));
        }
    }
    let mut last = Vec::new();
    for (name, state) in &observed.devices {
        if desired.devices.contains_key(name) {
            continue;
        }
        let in_the_way = desired.devices.iter().any(|(name, device)| {
            made.get(name).is_some_and(|(state, _)| state.is_none()) && may_collide(device, state)
        });
        let remove = Change::RemoveDevice {
            name: name.clone(),
            index: state.index,
            because: Vec::new(),
        };
        if in_the_way {
            changes.push(remove)
        } else {
            last.push(remove)
        }
    }
    for (name, device) in &desired.devices {
        let Some((state, adjustable)) = made.remove(name) else {
            continue;
        };
        diff_device(name, device, state, adjustable, &mut changes);
    }
    changes.extend(last);
    changes
}

/// Whether the kernel might refuse `device` because of a device like `state`: both listen at one UDP port in one way.
fn may_collide(device: &Device, state: &DeviceState) -> bool {
    state.settings.contains(&Setting::Kind(device.kind)) && state.settings.contains(&Setting::Port(device.port))
}

fn diff_device(
    name: &str,
    device: &Device,
    state: Option<&DeviceState>,
    adjustable: Vec<Difference>,
    changes: &mut Vec<Change>,
) {
    let (none, nobody) = (BTreeMap::new(), BTreeMap::new());
    let (forwarding, mut neighbours) = state.map_or((&none, &nobody), |state| (&state.forwarding, &state.neighbours));
    match state {
        None => changes.push(Change::CreateDevice {
            name: name.to_owned(),
            device: device.clone(),
        }),
        Some(_) if adjustable.is_empty() => {}
        Some(_) => {
            if adjustable.iter().any(|difference| difference.new.forgets_neighbours()) {
                neighbours = &nobody;
            }
            changes.push(Change::SetDevice {
                name: name.to_owned(),
                differences: adjustable,
            });
        }
    }
    diff_entries(name, device, forwarding, neighbours, changes);
}

fn diff_entries(
    name: &str,
    device: &Device,
    forwarding: &BTreeMap<Mac, Forwarding>,
    neighbours: &BTreeMap<IpAddr, Neighbour>,
    changes: &mut Vec<Change>,
) {
    let remove_forwarding = |mac: &Mac, old: &Forwarding| Change::RemoveForwarding {
        device: name.to_owned(),
        mac: *mac,
        old: old.clone(),
    };
    let wanted = device.forwarding();
    for (mac, new) in &wanted {
        let old = forwarding.get(mac);
        if old == Some(&Forwarding::To(*new)) {
            continue;
        }
        // The kernel replaces one node by another in one step, but not other shapes: a next hop object refuses.
        if let Some(old @ Forwarding::Other(_)) = old {
            changes.push(remove_forwarding(mac, old));
        }
        changes.push(Change::SetForwarding {
            device: name.to_owned(),
            mac: *mac,
            old: old.filter(|old| matches!(old, Forwarding::To(_))).cloned(),
            new: *new,
        });
    }
    let known = device.neighbours();
    for (address, new) in &known {
        let old = neighbours.get(address).copied();
        if old != Some(Neighbour::Permanent(*new)) {
            changes.push(Change::SetNeighbour {
                device: name.to_owned(),
                address: *address,
                old,
                new: *new,
            });
        }
    }
    let surplus = neighbours.iter().filter(|(address, _)| !known.contains_key(address));
    changes.extend(surplus.map(|(address, old)| Change::RemoveNeighbour {
        device: name.to_owned(),
        address: *address,
        old: *old,
    }));
    let surplus = forwarding.iter().filter(|(mac, _)| !wanted.contains_key(mac));
    changes.extend(surplus.map(|(mac, old)| remove_forwarding(mac, old)));
}
