//! Addresses, routes, rules and sysctls of a node, and what its kernel says about packets.
//!
//! The crate owns the routes and rules that carry our protocol number ([`PROTOCOL`]), the addresses on our own device, and the few sysctls
//! native routing needs. It never makes a device, and never touches a route, rule, address or device of somebody else.
//!
//! ```text
//! Desired ──┐
//!           ├─> diff() ─> [Change] ─> Kernel::apply()      Kernel::facts(), lookup(): questions, no effect
//! Kernel::observe() ─> Observed                            Monitor: "look again"      path_mtu::Prober: how large a packet gets there
//! ```

mod change;
mod desired;
mod error;
mod facts;
mod kernel;
mod monitor;
mod observed;
pub mod path_mtu;
mod sysctl;

pub use change::{Change, diff, diff_plans};
pub use desired::{Desired, Encapsulation, Link, Route, Rule, Table};
pub use error::Error;
pub use facts::{Address, Facts, Hop, HopKind, LinkFacts, Scope};
pub use kernel::{Kernel, Removal};
pub use monitor::{Monitor, Wake};
pub use observed::{InstalledRoute, InstalledRule, LinkState, Observed};
pub use sysctl::Sysctl;

/// The routing protocol number (`rtm_protocol` and `FRA_PROTOCOL`, rtnetlink(7)) that marks a route or rule as ours. Numbers above 4 are free for programs; 83 is
/// in no list of well-known ones (`/etc/iproute2/rt_protos`).
pub const PROTOCOL: u8 = 83;
