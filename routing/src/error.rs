//! What can go wrong, each told with what was tried, on what, and what helps.

use std::io;

use crate::Sysctl;

/// Why the kernel could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection to the kernel's routing.
    #[error(
        "open a route netlink socket: {0}; the process needs an address family AF_NETLINK (seccomp, RestrictAddressFamilies)"
    )]
    Open(#[source] io::Error),
    /// No sockets, or no thread, to ask peers how large a packet gets to them.
    #[error(
        "start to probe paths: {0}; the process needs CAP_NET_RAW (in Kubernetes NET_RAW among the pod's capabilities, for a service of systemd in CapabilityBoundingSet)"
    )]
    Probe(#[source] io::Error),
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
    /// Somebody else's route is where ours should go.
    #[error(
        "add route {route}: there is {by} already, which is not ours; remove that route (or what makes it); a range of pods can also be taken out of the pod ranges"
    )]
    Occupied {
        /// The route we wanted.
        route: String,
        /// The routes in the way.
        by: String,
    },
    /// The device does not exist.
    #[error("{operation}: no device {device}")]
    NoDevice {
        /// What was tried.
        operation: String,
        /// The missing device.
        device: String,
    },
    /// The device exists, but is not one of ours.
    #[error(
        "{operation}: device {device} is {kind}, not one of ours ({wanted}); nothing was changed, name another device"
    )]
    NotOurs {
        /// What was tried.
        operation: String,
        /// The device.
        device: String,
        /// What it is.
        kind: String,
        /// What ours would be.
        wanted: &'static str,
    },
    /// An IPv6 destination cannot have an IPv4 next hop or source, nor an IPv4 destination an IPv6 source.
    #[error("add route {route}: next hop or source of the wrong family")]
    Families {
        /// The route.
        route: String,
    },
    /// The setting does not exist here.
    #[error("set {sysctl} to {value}: no {}; the device is gone, or this kernel has no such setting", sysctl.path_text())]
    NoSysctl {
        /// The setting.
        sysctl: Sysctl,
        /// The value wanted.
        value: String,
    },
    /// The setting could not be written.
    #[error(
        "set {sysctl} to {value}: {source}; set it on the host (sysctl -w {sysctl}={value}) when /proc/sys is read-only here"
    )]
    WriteSysctl {
        /// The setting.
        sysctl: Sysctl,
        /// The value wanted.
        value: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The setting could not be read.
    #[error("read {sysctl}: {source}; /proc must be mounted in the node's own network namespace")]
    ReadSysctl {
        /// The setting.
        sysctl: Sysctl,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A device name that no kernel device can have.
    #[error("read {sysctl}: not a device name")]
    InvalidDevice {
        /// The setting, whose device part is wrong.
        sysctl: Sysctl,
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
    pub(crate) fn code(&self) -> Option<i32> {
        match self {
            Self::Request { source, .. } => source.raw_os_error(),
            Self::Open(_)
            | Self::Probe(_)
            | Self::Closed { .. }
            | Self::Restless { .. }
            | Self::Occupied { .. }
            | Self::NoDevice { .. }
            | Self::NotOurs { .. }
            | Self::Families { .. }
            | Self::NoSysctl { .. }
            | Self::WriteSysctl { .. }
            | Self::ReadSysctl { .. }
            | Self::InvalidDevice { .. } => None,
        }
    }
}

/// What usually helps against an error number.
fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::PERM) => "; CAP_NET_ADMIN is needed in the network namespace's user namespace",
        Some(rustix::io::Errno::NETUNREACH | rustix::io::Errno::HOSTUNREACH) => {
            "; the next hop must be on a network directly connected to the device"
        }
        Some(rustix::io::Errno::NETDOWN) => "; the device is down",
        Some(rustix::io::Errno::ACCESS) => "; IPv6 may be switched off on the device (net.ipv6.conf.*.disable_ipv6)",
        Some(rustix::io::Errno::INVAL) => {
            "; the source must be an address of this node, and the next hop reachable on the device"
        }
        _ => "",
    }
}
