//! The difference between what should be and what is.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use shroud_model::{Family, Mtu, Prefix};

use crate::{Desired, InstalledRoute, InstalledRule, Link, LinkState, Observed, Route, Rule, Sysctl};

/// One step from what is to what should be. Its text is for people: `route 10.244.2.0/24 via 172.18.0.2 dev eth0: added`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Gives a device its MTU.
    SetMtu {
        /// The device.
        device: String,
        /// Its MTU now, in bytes.
        old: u32,
        /// Its MTU to be.
        new: Mtu,
    },
    /// Takes a device up.
    LinkUp {
        /// The device.
        device: String,
    },
    /// Adds an address to a device, alone (`/32`, `/128`), without duplicate address detection and without a prefix route.
    AddAddress {
        /// The device.
        device: String,
        /// The address.
        address: IpAddr,
    },
    /// Removes an address from our device.
    RemoveAddress {
        /// The device.
        device: String,
        /// The address.
        address: IpAddr,
        /// Its prefix length.
        length: u8,
    },
    /// Writes a kernel setting.
    WriteSysctl {
        /// The setting.
        sysctl: Sysctl,
        /// Its value now, or `None` where there is no such setting.
        old: Option<String>,
        /// Its value to be.
        new: String,
    },
    /// Adds a route where none of ours is.
    AddRoute(Route),
    /// Puts a route in the place of one of ours, in one step, so that the destination is never without one.
    ReplaceRoute {
        /// Ours now.
        old: InstalledRoute,
        /// Ours to be.
        new: Route,
    },
    /// Removes a route of ours.
    RemoveRoute(InstalledRoute),
    /// Adds a rule.
    AddRule(Rule),
    /// Removes a rule of ours.
    RemoveRule(InstalledRule),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetMtu { device, old, new } => write!(f, "device {device}: mtu {old} -> {new}"),
            Self::LinkUp { device } => write!(f, "device {device}: down -> up"),
            Self::AddAddress { device, address } => write!(f, "address {} dev {device}: added", Prefix::host(*address)),
            Self::RemoveAddress {
                device,
                address,
                length,
            } => {
                write!(f, "address {address}/{length} dev {device}: removed")
            }
            Self::WriteSysctl { sysctl, old, new } => {
                write!(f, "sysctl {sysctl}: {} -> {new}", old.as_deref().unwrap_or("missing"))
            }
            Self::AddRoute(route) => write!(f, "route {route}: added"),
            Self::ReplaceRoute { old, new } => write!(f, "route {old} -> {new}"),
            Self::RemoveRoute(route) => write!(f, "route {route}: removed"),
            Self::AddRule(rule) => write!(f, "rule {rule}: added"),
            Self::RemoveRule(rule) => write!(f, "rule {rule}: removed"),
        }
    }
}

/// The steps from `observed` to `desired`, in the order in which they must happen: devices, settings, routes to add, the routes that go, and
/// the rules, which change nothing where there is no route to be seen.
/// Empty when nothing is to be done.
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Change> {
    let mut changes = Vec::new();
    for (device, link) in &desired.links {
        diff_link(device, link, observed.links.get(device), &mut changes);
    }
    diff_sysctls(desired, observed, &mut changes);
    diff_routes(desired, observed, &mut changes);
    diff_rules(desired, observed, &mut changes);
    changes
}

fn diff_link(device: &str, link: &Link, state: Option<&LinkState>, changes: &mut Vec<Change>) {
    let device = device.to_owned();
    // A missing device is somebody else's task; this one step fails and says so.
    let Some(state) = state else {
        return changes.push(Change::LinkUp { device });
    };
    if state.mtu != link.mtu.bytes() {
        changes.push(Change::SetMtu {
            device: device.clone(),
            old: state.mtu,
            new: link.mtu,
        });
    }
    if !state.up {
        changes.push(Change::LinkUp { device: device.clone() });
    }
    let desired: BTreeSet<(IpAddr, u8)> = link
        .addresses
        .iter()
        .map(|&address| (address, Prefix::host(address).length()))
        .collect();
    let (blocking, surplus): (Vec<_>, Vec<_>) =
        state
            .addresses
            .difference(&desired)
            .copied()
            .partition(|&(address, _)| {
                // IPv6 refuses an address twice, whatever its length; IPv4 takes both, and so is never without.
                Family::of(address) == Family::V6 && link.addresses.contains(&address)
            });
    let remove = |(address, length)| Change::RemoveAddress {
        device: device.clone(),
        address,
        length,
    };
    changes.extend(blocking.into_iter().map(remove));
    changes.extend(
        desired
            .difference(&state.addresses)
            .map(|&(address, _)| Change::AddAddress {
                device: device.clone(),
                address,
            }),
    );
    changes.extend(surplus.into_iter().map(remove));
}

fn diff_sysctls(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let forwards = desired
        .sysctls
        .get(&Sysctl::Forwarding(Family::V6))
        .is_some_and(|value| value != "0");
    if forwards {
        for device in &observed.advertised {
            let sysctl = Sysctl::AcceptRa(device.clone());
            if !desired.sysctls.contains_key(&sysctl) {
                changes.push(Change::WriteSysctl {
                    sysctl,
                    old: Some("1".to_owned()),
                    new: "2".to_owned(),
                });
            }
        }
    }
    // `Sysctl` is ordered so that `AcceptRa` comes before `Forwarding`.
    for (sysctl, new) in &desired.sysctls {
        let old = observed.sysctls.get(sysctl).cloned().flatten();
        if old.as_ref() != Some(new) {
            changes.push(Change::WriteSysctl {
                sysctl: sysctl.clone(),
                old,
                new: new.clone(),
            });
        }
    }
}

fn diff_routes(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let (kept, mut surplus): (Vec<_>, Vec<_>) = observed.routes.iter().partition(|installed| {
        installed
            .route
            .as_ref()
            .is_some_and(|route| desired.routes.contains(route))
    });
    let kept: BTreeSet<&Route> = kept
        .into_iter()
        .filter_map(|installed| installed.route.as_ref())
        .collect();
    for route in desired.routes.iter().filter(|route| !kept.contains(route)) {
        let slot = surplus
            .iter()
            .position(|old| old.destination == route.destination && old.table == route.table && old.in_our_slot);
        changes.push(match slot {
            Some(index) => Change::ReplaceRoute {
                old: surplus.swap_remove(index).clone(),
                new: route.clone(),
            },
            None => Change::AddRoute(route.clone()),
        });
    }
    changes.extend(surplus.into_iter().cloned().map(Change::RemoveRoute));
}

fn diff_rules(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let mut missing = desired.rules.clone();
    let mut surplus = Vec::new();
    for installed in &observed.rules {
        // The second of two equal ones is surplus too.
        if !installed.rule.is_some_and(|rule| missing.remove(&rule)) {
            surplus.push(Change::RemoveRule(installed.clone()));
        }
    }
    changes.extend(missing.into_iter().map(Change::AddRule));
    changes.extend(surplus);
}
