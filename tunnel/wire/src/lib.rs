//! The userspace WireGuard data plane: one process, one TUN device, one UDP port, and a control socket that speaks WireGuard's
//! userspace configuration protocol.
//!
//! ```text
//!   kernel ──TUN──> allowed IPs ──> peer: pad, encrypt ──UDP──> network
//!   kernel <──TUN── owner of the source? <── peer: decrypt <── index, key <── handshake limit <──UDP── network
//! ```
//!
//! The pure half (`device`, `peer`, `allowed_ips`, `handshake_limit`, `uapi`) takes packets and the time as arguments. The other half
//! (`tun`, `socket`, `control`, and `event_loop` around them) moves bytes. Knows nothing of nodes, routes or directories.

mod allowed_ips;
mod control;
mod device;
mod event_loop;
mod handshake_limit;
mod peer;
mod socket;
mod tun;
pub mod uapi;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub use event_loop::run;

/// The log filter this crate is made for: boringtun reports each retry of a handshake as a warning, which is no news.
pub const LOG_FILTER: &str = "info,boringtun=off";

/// How to run the data plane.
#[derive(Debug, Clone)]
pub struct Options {
    /// The TUN device's name. It is made if it does not exist, and stays when the process ends.
    pub device: String,
    /// The folder of the control socket, `DEVICE.sock`. `wg` looks in `/var/run/wireguard`.
    pub socket_dir: PathBuf,
}

impl Options {
    /// The usual options for a device.
    pub fn new(device: impl Into<String>) -> Self {
        Self {
            device: device.into(),
            socket_dir: PathBuf::from("/run/wireguard"),
        }
    }
}

/// Why the data plane did not start, or ended.
#[derive(Debug, Error)]
pub enum Error {
    /// Another process serves this device.
    #[error("start {device}: already running, a process answers on {}; stop it first", socket.display())]
    AlreadyRunning {
        /// The device.
        device: String,
        /// Its control socket.
        socket: PathBuf,
    },
    /// The device's name cannot be an interface's name.
    #[error("attach {0:?}: not an interface name; use 1 to 15 bytes without '/', ':', '%' and spaces")]
    DeviceName(String),
    /// Another process holds the device.
    #[error("attach {0}: another process holds this device; stop it first")]
    DeviceBusy(String),
    /// A device of another kind has the name.
    #[error(
        "attach {0}: a device of this name exists and is not a TUN device of ours; rename or delete it, or use another name"
    )]
    DeviceForeign(String),
    /// The device went away under us.
    #[error("{0} was deleted, renamed or moved by somebody else; start again to make it anew")]
    DeviceGone(String),
    /// The kernel refused something else.
    #[error("{operation} {object}: {source}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    fn system(operation: &'static str, object: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let object = object.into();
        move |source| Self::System {
            operation,
            object,
            source,
        }
    }
}
