//! The encrypted device and its peers: one interface over WireGuard in the kernel and WireGuard in userspace.
//!
//! The crate owns the device it is told of, every peer on it, and the process of the userspace data plane. It does not set the device
//! up, give it addresses or route to it, and it does not decide who is a peer.
//!
//! ```text
//! Desired ──┐                                         ┌─> kernel   (generic netlink)
//!           ├─> diff() ─> [Change] ─> Tunnel::apply() ┤
//! Tunnel::observe() ─> Observed                       └─> uapi     (unix socket of `shroud wire`, started by `process`)
//! ```

mod change;
mod choice;
mod desired;
mod error;
mod kernel;
mod observed;
mod process;
mod tunnel;
mod uapi;
mod update;

pub use change::{Change, FRESH, diff, diff_plans};
pub use choice::{Choice, Wanted, choose};
pub use desired::{Backend, Desired, Peer};
pub use error::Error;
pub use observed::{Device, Observed, ObservedPeer};
pub use process::Launcher;
pub use tunnel::{Options, Removal, Tunnel};
