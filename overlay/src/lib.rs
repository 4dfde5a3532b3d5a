//! VXLAN and Geneve devices of a node, and where they send what.
//!
//! The crate owns the overlay's devices whole: how they are made, their MTU, their forwarding entries and their neighbour entries. It
//! never sets a route or an address, and never encrypts: encryption goes around what leaves these devices.
//!
//! ```text
//! Desired ──┐                                         pod packet ─ route ─> next hop 10.244.2.0 ─ neighbour ─> MAC of node b
//!           ├─> diff() ─> [Change] ─> Overlay::apply()                       MAC of node b ─ forwarding ─> 172.18.0.2
//! Overlay::observe() ─> Observed                      UDP to 172.18.0.2 ─> uplink (and the gate, which encrypts)
//! ```

mod change;
mod desired;
mod error;
mod mac;
mod observed;
mod overlay;
mod setting;

pub use change::{Change, diff};
pub use desired::{Conflict, Desired, Device, Vtep};
pub use error::Error;
pub use mac::{InvalidMac, Mac};
pub use observed::{DeviceState, Forwarding, Neighbour, Observed};
pub use overlay::{Overlay, Removal};
pub use setting::{Difference, Setting, differences};
pub use shroud_model::{OverlayKind as Kind, Vni};

/// The alias (`IFLA_IFALIAS`, shown by `ip link`) that marks a device as ours, also when the VNI was another one.
pub const LABEL: &str = "shroud overlay";
