//! What the kernel holds of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use shroud_model::Prefix;

use crate::{Route, Rule, Sysctl, Table};

/// What the kernel holds now, as far as it is ours or asked for in [`Desired`](crate::Desired).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The devices that are asked for and exist.
    pub links: BTreeMap<String, LinkState>,
    /// Every route in our tables that carries our protocol number.
    pub routes: Vec<InstalledRoute>,
    /// Every rule that carries our protocol number.
    pub rules: Vec<InstalledRule>,
    /// The settings that are asked for. `None`: this kernel, or this device, has no such setting.
    pub sysctls: BTreeMap<Sysctl, Option<String>>,
    /// Devices that hold routes learned from IPv6 router advertisements and have `accept_ra` = 1, which means "unless forwarding":
    /// they would lose those routes when forwarding is switched on.
    pub advertised: BTreeSet<String>,
}

/// One of our devices as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkState {
    /// The interface index.
    pub index: u32,
    /// The MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its addresses and their prefix lengths, link-local IPv6 addresses left out.
    pub addresses: BTreeSet<(IpAddr, u8)>,
}

/// A route with our protocol number, as the kernel holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct InstalledRoute {
    /// The addresses it carries.
    pub destination: Prefix,
    /// The table it is in.
    pub table: Table,
    /// Whether it sits where a route of ours for this destination goes, so that the new one replaces it.
    pub(crate) in_our_slot: bool,
    pub(crate) shape: Shape,
}

/// What an installed route is like.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    /// As we write them.
    Ours(Route),
    /// Any other: blackhole, multipath, a metric, a type of service.
    Other(Box<Other>),
}

/// A route of a shape we do not write.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Other {
    /// It in words.
    pub(crate) words: String,
    /// What names this route, and no other, when it is deleted.
    pub(crate) message: RouteMessage,
}

impl InstalledRoute {
    /// A route as the kernel holds it once it was added.
    pub(crate) fn of(route: Route) -> Self {
        Self {
            destination: route.destination,
            table: route.table,
            in_our_slot: true,
            shape: Shape::Ours(route),
        }
    }

    /// The route, when it has a shape we write.
    pub fn route(&self) -> Option<&Route> {
        match &self.shape {
            Shape::Ours(route) => Some(route),
            Shape::Other(_) => None,
        }
    }
}

impl fmt::Display for InstalledRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.shape {
            Shape::Ours(route) => fmt::Display::fmt(route, f),
            Shape::Other(other) => f.write_str(&other.words),
        }
    }
}

impl fmt::Debug for InstalledRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A rule with our protocol number, as the kernel holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct InstalledRule {
    /// The rule, when it has the shape we write.
    pub rule: Option<Rule>,
    /// What names this rule when it is deleted.
    pub(crate) message: RuleMessage,
}

impl fmt::Display for InstalledRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rule {
            Some(rule) => fmt::Display::fmt(rule, f),
            None => write!(f, "of another shape, {:?}", self.message),
        }
    }
}

impl fmt::Debug for InstalledRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
