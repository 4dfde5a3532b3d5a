#![allow(
    unsafe_code,
    reason = "the TUN device is made with ioctls, for which there is no safe wrapper"
)]
//! The TUN door: inner packets, to and from the kernel.
//!
//! The device is persistent: it, its routes and its index outlive this process, so that packets routed or redirected to it while nobody
//! reads them die there, instead of finding another way. Addresses, MTU and routes are somebody else's; so is the end of the device.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Uid;

const CONTROL: &str = "/dev/net/tun";

/// The bytes of an interface name with the zero behind it.
type Name = [libc::c_char; libc::IFNAMSIZ];

/// An attached TUN device.
pub(crate) struct Tun {
    file: File,
    name: Name,
    /// Any socket will do to ask for the MTU.
    inquiry: UdpSocket,
}

/// Why a device could not be attached.
#[derive(Debug)]
pub(crate) enum AttachError {
    /// The name is empty, too long or has bytes no interface name may have.
    Name,
    /// Another process holds the device.
    Busy,
    /// A device of that name exists and is not a TUN device of our kind.
    Foreign,
    /// Something else.
    Other(io::Error),
}

impl From<io::Error> for AttachError {
    fn from(error: io::Error) -> Self {
        Self::Other(error)
    }
}

impl Tun {
    /// Makes the device `name`, or takes hold of it again if it outlived the process that made it.
    pub(crate) fn attach(name: &str) -> Result<Self, AttachError> {
        let name = interface_name(name).ok_or(AttachError::Name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(CONTROL)?;
        let flags = libc::IFF_TUN | libc::IFF_NO_PI;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        match set_interface(&file, &mut request) {
            Ok(()) => {}
            Err(Errno::EBUSY) => return Err(AttachError::Busy),
            Err(Errno::EINVAL) => return Err(AttachError::Foreign),
            Err(errno) => return Err(AttachError::Other(errno.into())),
        }
        // First, since a device of nobody's that nobody serves is open to every local user, who may open /dev/net/tun on most hosts.
        own(&file).map_err(io::Error::from)?;
        persist(&file).map_err(io::Error::from)?;
        clear_offload(&file).map_err(io::Error::from)?;
        let inquiry = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        Ok(Self { file, name, inquiry })
    }

    /// The descriptor to wait on.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Takes the next packet: its length in `buffer`, or `None` when there is none.
    ///
    /// # Errors
    /// `EBADFD` once the device is deleted.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Hands a packet to the kernel.
    pub(crate) fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(|_| ())
    }

    /// The device's MTU in bytes, as set by whoever configures it.
    ///
    /// # Errors
    /// `ENODEV` once the device is deleted, renamed or moved to another namespace.
    pub(crate) fn mtu(&self) -> io::Result<usize> {
        let mut request = request(self.name);
        let mtu = query_mtu(&self.inquiry, &mut request)?;
        Ok(usize::try_from(mtu).unwrap_or(0))
    }
}

/// Checks a name as the kernel does (`dev_valid_name`).
fn interface_name(name: &str) -> Option<Name> {
    let forbidden = |byte: u8| byte == b'/' || byte == b':' || byte == b'%' || byte == 0 || byte.is_ascii_whitespace();
    if name.is_empty() || name == "." || name == ".." || name.len() >= libc::IFNAMSIZ || name.bytes().any(forbidden) {
        return None;
    }
    let mut bytes = [0; libc::IFNAMSIZ];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Some(bytes)
}

fn request(name: Name) -> libc::ifreq {
    libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_mtu: 0 },
    }
}

/// Binds the open file to the device named in the request (TUNSETIFF).
fn set_interface(file: &File, request: &mut libc::ifreq) -> Result<(), Errno> {
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` borrows mutably for the call; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, std::ptr::from_mut(request)) };
    Errno::result(result).map(|_| ())
}

/// Makes the device ours (TUNSETOWNER): others need CAP_NET_ADMIN to attach it (`tun_not_capable`, drivers/net/tun.c).
fn own(file: &File) -> Result<(), Errno> {
    let user = libc::c_ulong::from(Uid::effective().as_raw());
    // SAFETY: TUNSETOWNER takes its argument by value and touches no memory of ours; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOWNER, user) };
    Errno::result(result).map(|_| ())
}

/// Makes the device outlive the process (TUNSETPERSIST).
fn persist(file: &File) -> Result<(), Errno> {
    // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory of ours; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) };
    Errno::result(result).map(|_| ())
}

/// Asks for plain packets (TUNSETOFFLOAD), whatever the process before us had asked for.
fn clear_offload(file: &File) -> Result<(), Errno> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0 as libc::c_ulong) };
    Errno::result(result).map(|_| ())
}

/// Reads the MTU of the device named in the request (SIOCGIFMTU).
fn query_mtu(socket: &UdpSocket, request: &mut libc::ifreq) -> Result<libc::c_int, Errno> {
    // SAFETY: SIOCGIFMTU reads and writes one `ifreq`, which `request` borrows mutably for the call; the descriptor is open.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFMTU as libc::Ioctl,
            std::ptr::from_mut(request),
        )
    };
    Errno::result(result)?;
    // SAFETY: `request` was built with all bytes of the first four set, and after success the kernel has written `ifru_mtu`.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_refuse_are_refused_before_it_is_asked() {
        for name in ["", ".", "..", "a/b", "a:b", "a b", "shroud%d", "sixteen-letters!"] {
            assert!(interface_name(name).is_none(), "{name:?}");
        }
        assert!(interface_name("fifteen-letters").is_some());
    }
}
