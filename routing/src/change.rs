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

/// The steps from what `before` wanted to `desired`: what [`diff`] finds where all is as `before` wanted it, without a look at what is wanted as
/// before. `None` where more than routes differs, or one is to be replaced: whether it is alone in its place only the kernel can tell.
pub fn diff_plans(desired: &Desired, before: &Desired) -> Option<Vec<Change>> {
    if (&desired.links, &desired.rules, &desired.sysctls) != (&before.links, &before.rules, &before.sysctls) {
        return None;
    }
    let gone = before.routes.difference(&desired.routes).cloned();
    let observed = Observed {
        routes: gone.map(InstalledRoute::of).collect(),
        ..Observed::default()
    };
    let desired = Desired {
        routes: desired.routes.difference(&before.routes).cloned().collect(),
        ..Desired::default()
    };
    let mut changes = Vec::new();
    diff_routes(&desired, &observed, &mut changes);
    let replaces = |change: &Change| matches!(change, Change::ReplaceRoute { .. });
    (!changes.iter().any(replaces)).then_some(changes)
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
    let wanted: BTreeSet<&Route> = desired.routes.iter().collect();
    let found: BTreeSet<&Route> = observed.routes.iter().filter_map(InstalledRoute::route).collect();
    let unwanted: BTreeSet<&Route> = found.difference(&wanted).copied().collect();
    let is_surplus = |installed: &&InstalledRoute| installed.route().is_none_or(|route| unwanted.contains(route));
    let mut surplus: Vec<&InstalledRoute> = observed.routes.iter().filter(is_surplus).collect();
    for route in wanted.difference(&found).copied() {
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

#[cfg(test)]
mod tests {
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    use super::*;
    use crate::Table;

    /// A way to 10.244.`third`.0/24.
    fn route(third: u8, via: Option<u8>) -> Route {
        Route {
            destination: Prefix::containing([10, 244, third, 0].into(), 24).unwrap(),
            device: "eth0".to_owned(),
            via: via.map(|last| [172, 18, 0, last].into()),
            source: None,
            mtu: None,
            onlink: false,
            encapsulation: None,
            table: Table::Main,
        }
    }

    fn desired() -> impl Strategy<Value = Desired> {
        let ways = btree_map(0u8..6, proptest::option::of(1u8..3), 0..6);
        ways.prop_map(|ways| Desired {
            routes: ways.into_iter().map(|(third, via)| route(third, via)).collect(),
            ..Desired::default()
        })
    }

    proptest! {
        #[test]
        fn two_plans_differ_as_the_kernel_between_them_does(before in desired(), after in desired()) {
            let kernel = Observed {
                routes: before.routes.iter().cloned().map(InstalledRoute::of).collect(),
                ..Observed::default()
            };

            let changes = diff(&after, &kernel);

            let replaces = changes.iter().any(|change| matches!(change, Change::ReplaceRoute { .. }));
            prop_assert_eq!(diff_plans(&after, &before), (!replaces).then_some(changes));
        }
    }

    #[test]
    fn where_more_than_routes_differs_only_the_kernel_can_tell() {
        let before = Desired::default();
        let mut after = before.clone();
        after.sysctls.insert(Sysctl::Forwarding(Family::V4), "1".to_owned());

        assert_eq!(diff_plans(&after, &before), None);
    }
}
