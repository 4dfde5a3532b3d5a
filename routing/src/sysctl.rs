//! Kernel settings under `/proc/sys/net`, by name.
//!
//! `/proc/sys/net` shows the network namespace of the thread that opens a file there, so reading and writing belong on the thread that
//! also holds the [`Kernel`](crate::Kernel).
//!
//! A container's `/proc/sys` can only be read. Where the host's folder is shown to it once more, below [`HOST`], writing goes there.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use shroud_model::Family;

use crate::Error;

/// Where a container is shown files of its host, under their own names.
const HOST: &str = "/host";

/// A kernel setting. Source: Documentation/networking/ip-sysctl.rst.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sysctl {
    /// Whether a device learns from IPv6 router advertisements: 0 no, 1 unless it forwards, 2 also when it forwards. Written before
    /// [`Sysctl::Forwarding`], because switching that on deletes what was learned with 1.
    AcceptRa(String),
    /// Whether packets for others are passed on, on all devices: `net.ipv4.ip_forward`, `net.ipv6.conf.all.forwarding`.
    Forwarding(Family),
    /// Source check on a device: 0 none, 1 strict, 2 loose. The kernel takes the larger of this and the value for `all`.
    RpFilter(String),
    /// Whether a device has no IPv6 at all.
    DisableIpv6(String),
}

impl Sysctl {
    fn path(&self) -> Result<PathBuf, Error> {
        let device = match self {
            Self::AcceptRa(device) | Self::RpFilter(device) | Self::DisableIpv6(device) => Some(device),
            Self::Forwarding(_) => None,
        };
        let harmless =
            |name: &String| !name.is_empty() && name.len() < 16 && !name.contains('/') && name != "." && name != "..";
        if !device.is_none_or(harmless) {
            return Err(Error::InvalidDevice { sysctl: self.clone() });
        }
        Ok(PathBuf::from(self.path_text()))
    }

    pub(crate) fn path_text(&self) -> String {
        match self {
            Self::AcceptRa(device) => format!("/proc/sys/net/ipv6/conf/{device}/accept_ra"),
            Self::Forwarding(Family::V4) => "/proc/sys/net/ipv4/ip_forward".to_owned(),
            Self::Forwarding(Family::V6) => "/proc/sys/net/ipv6/conf/all/forwarding".to_owned(),
            Self::RpFilter(device) => format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"),
            Self::DisableIpv6(device) => format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"),
        }
    }

    /// The value now, or `None` where there is no such setting.
    pub(crate) fn read(&self) -> Result<Option<String>, Error> {
        match fs::read_to_string(self.path()?) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::ReadSysctl {
                sysctl: self.clone(),
                source,
            }),
        }
    }

    /// Writes the value, unless it is there already.
    pub(crate) fn write(&self, value: &str) -> Result<(), Error> {
        if self.read()?.as_deref() == Some(value) {
            return Ok(());
        }
        let Err(source) = write(&self.path()?, value) else {
            return Ok(());
        };
        let (sysctl, value) = (self.clone(), value.to_owned());
        // What a kernel answers to writing a file that does not exist in /proc differs; whether it exists does not.
        Err(match fs::exists(self.path_text()) {
            Ok(false) => Error::NoSysctl { sysctl, value },
            Ok(true) | Err(_) => Error::WriteSysctl { sysctl, value, source },
        })
    }
}

/// Writes a file, or the host's one of that name where ours can only be read.
fn write(path: &Path, value: &str) -> io::Result<()> {
    let Err(error) = fs::write(path, value) else {
        return Ok(());
    };
    let hosts = Path::new(HOST).join(path.strip_prefix("/").unwrap_or(path));
    if error.kind() == io::ErrorKind::ReadOnlyFilesystem && fs::exists(&hosts)? {
        return fs::write(hosts, value);
    }
    Err(error)
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AcceptRa(device) => write!(f, "net.ipv6.conf.{device}.accept_ra"),
            Self::Forwarding(Family::V4) => f.write_str("net.ipv4.ip_forward"),
            Self::Forwarding(Family::V6) => f.write_str("net.ipv6.conf.all.forwarding"),
            Self::RpFilter(device) => write!(f, "net.ipv4.conf.{device}.rp_filter"),
            Self::DisableIpv6(device) => write!(f, "net.ipv6.conf.{device}.disable_ipv6"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_never_leaves_its_folder() {
        for name in ["", ".", "..", "../all", "a/b", "sixteen-letters-"] {
            assert!(
                matches!(
                    Sysctl::RpFilter(name.to_owned()).read(),
                    Err(Error::InvalidDevice { .. })
                ),
                "{name}"
            );
        }
        assert_eq!(Sysctl::RpFilter("no.such.dev".to_owned()).read().unwrap(), None);
        assert!(Sysctl::RpFilter("lo".to_owned()).read().unwrap().is_some());
    }
}
