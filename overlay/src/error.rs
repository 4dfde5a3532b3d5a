//! What can go wrong, each told with what was tried, on what, and what helps.

use std::io;
use std::net::IpAddr;

use crate::Kind;

/// Why the kernel could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection to the kernel.
    #[error(
        "open a route netlink socket: {0}; the process needs an address family AF_NETLINK (seccomp, RestrictAddressFamilies)"
    )]
    Open(#[source] io::Error),
    /// The kernel refused a request.
    #[error("{operation}: {source}{}", hint(source))]
    Request {
        /// What was tried, and on what.
        operation: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel closed the connection, or its answer could not be read.
    #[error("{operation}: the netlink connection ended; the next pass opens a new one")]
    Closed {
        /// What was tried.
        operation: String,
    },
    /// The tables changed under every one of several attempts to list them.
    #[error("{operation}: changed while it was being listed, {attempts} times in a row; the next pass tries again")]
    Restless {
        /// What was listed.
        operation: String,
        /// How often it was tried.
        attempts: u32,
    },
    /// The kernel cannot make such devices.
    #[error("{operation}: this kernel has no {}; load its module (modprobe {kind}), or choose another routing mode", title(*kind))]
    NoSuchKind {
        /// What was tried.
        operation: String,
        /// What it lacks.
        kind: Kind,
    },
    /// A device of the wanted name is somebody else's.
    #[error(
        "{operation}: there is a device {device} already, {what}, which is not ours; remove or rename it, nothing was changed"
    )]
    NotOurs {
        /// What was tried.
        operation: String,
        /// The device.
        device: String,
        /// What it is.
        what: String,
    },
    /// A foreign device already carries this overlay number at this port.
    #[error(
        "{operation}: {by} uses the same VNI and port and is not ours; remove it, or choose another VNI or port for all nodes"
    )]
    Occupied {
        /// What was tried.
        operation: String,
        /// The foreign device.
        by: String,
    },
    /// Somebody else listens at the UDP port.
    #[error("{operation}: UDP port {port} is taken by {by}; stop that, or choose another port for all nodes")]
    PortTaken {
        /// What was tried.
        operation: String,
        /// The port.
        port: u16,
        /// Who has it.
        by: String,
    },
    /// A VXLAN device reaches underlay addresses of its own family only.
    #[error(
        "{operation}: the device's own underlay address is of the other family; give {underlay} a device of its family"
    )]
    Family {
        /// What was tried.
        operation: String,
        /// The address it cannot send to.
        underlay: IpAddr,
    },
    /// The device does not exist.
    #[error("{operation}: no device {device}; the next pass makes it")]
    NoDevice {
        /// What was tried.
        operation: String,
        /// The missing device.
        device: String,
    },
    /// A name the kernel or our label forbids.
    #[error(
        "{operation}: {device:?} is no name for an overlay device; it begins with \"shroud\" and has at most 15 bytes, without '/' or spaces"
    )]
    Name {
        /// What was tried.
        operation: String,
        /// The name.
        device: String,
    },
}

impl Error {
    pub(crate) fn request(operation: impl Into<String>, source: io::Error) -> Self {
        Self::Request {
            operation: operation.into(),
            source,
        }
    }

    /// The kernel's error number, where there is one.
    pub(crate) fn code(&self) -> Option<rustix::io::Errno> {
        match self {
            Self::Request { source, .. } => rustix::io::Errno::from_io_error(source),
            Self::Open(_)
            | Self::Closed { .. }
            | Self::Restless { .. }
            | Self::NoSuchKind { .. }
            | Self::NotOurs { .. }
            | Self::Occupied { .. }
            | Self::PortTaken { .. }
            | Self::Family { .. }
            | Self::NoDevice { .. }
            | Self::Name { .. } => None,
        }
    }
}

const fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Vxlan => "VXLAN",
        Kind::Geneve => "Geneve",
    }
}

/// What usually helps against an error number.
fn hint(source: &io::Error) -> &'static str {
    match rustix::io::Errno::from_io_error(source) {
        Some(rustix::io::Errno::PERM) => "; CAP_NET_ADMIN is needed in the network namespace's user namespace",
        Some(rustix::io::Errno::NODEV) => "; the device is gone, the next pass makes it",
        Some(rustix::io::Errno::AFNOSUPPORT) => "; this kernel, or its command line, has IPv6 switched off",
        _ => "",
    }
}
