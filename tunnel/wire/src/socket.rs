//! The UDP door: one IPv4 and one IPv6 socket on one port.
//!
//! Each datagram comes with the address it was sent to, and answers leave from that address, as with the kernel's WireGuard: a node with
//! several addresses stays reachable behind a stateful firewall. Owns nothing but the two sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use shroud_model::Family;
use socket2::{Domain, Protocol, Socket, Type};

/// Room for bursts on each socket: about 20 ms of a 2.5 Gbit/s link.
const BUFFER: usize = 7 << 20;
/// How often another port is tried when the kernel's choice for IPv4 is taken for IPv6.
const ATTEMPTS: usize = 100;
/// How long a datagram waits for room in a full send buffer before it is dropped, in milliseconds.
const PATIENCE: u8 = 5;

/// Where a peer is, and which of our addresses it speaks to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// The peer's address, never an IPv4 address in IPv6 form.
    pub(crate) remote: SocketAddr,
    /// Our address on the peer's last packet; `None` leaves the choice to the routes.
    pub(crate) local: Option<IpAddr>,
}

/// Both sockets. A host without one of the families has one.
pub(crate) struct Sockets {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    port: u16,
    /// Whether the kernel chose the port.
    chosen: bool,
    mark: u32,
    /// Room for the one control message we ask for.
    control: Vec<u8>,
}

impl Sockets {
    /// Binds both families to one port; 0 lets the kernel choose it.
    ///
    /// # Errors
    /// What the kernel says: `EADDRINUSE` when either family's port is taken.
    pub(crate) fn bind(port: u16, mark: u32) -> io::Result<Self> {
        let attempts = if port == 0 { ATTEMPTS } else { 1 };
        let mut result = Self::bind_once(port, mark);
        for _ in 1..attempts {
            match &result {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => result = Self::bind_once(port, mark),
                Ok(_) | Err(_) => break,
            }
        }
        result
    }

    fn bind_once(port: u16, mark: u32) -> io::Result<Self> {
        let chosen = port == 0;
        let v4 = bind(Family::V4, port, mark)?;
        let port = v4
            .as_ref()
            .map_or(Ok(port), |socket| socket.local_addr().map(|address| address.port()))?;
        let v6 = bind(Family::V6, port, mark)?;
        let Some(any) = v4.as_ref().or(v6.as_ref()) else {
            return Err(Errno::EAFNOSUPPORT.into());
        };
        let port = any.local_addr()?.port();
        let control = nix::cmsg_space!(libc::in6_pktinfo);
        Ok(Self {
            v4,
            v6,
            port,
            chosen,
            mark,
            control,
        })
    }

    /// The port both sockets listen on.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Whether being asked for this port, of which 0 is any, calls for no change.
    pub(crate) fn serves(&self, port: u16) -> bool {
        port == self.port || (port == 0 && self.chosen)
    }

    /// The mark on what is sent.
    pub(crate) fn mark(&self) -> u32 {
        self.mark
    }

    /// Marks what is sent from now on.
    pub(crate) fn set_mark(&mut self, mark: u32) -> io::Result<()> {
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            setsockopt(socket, sockopt::Mark, &mark)?;
        }
        self.mark = mark;
        Ok(())
    }

    /// The descriptor to wait on.
    pub(crate) fn descriptor(&self, family: Family) -> Option<BorrowedFd<'_>> {
        self.of(family).map(AsFd::as_fd)
    }

    /// Takes the next datagram: its length in `buffer`, and where it came from. `None` when there is none.
    ///
    /// A datagram that does not fit comes back as an error of kind [`io::ErrorKind::InvalidData`], and is gone.
    pub(crate) fn receive(&mut self, family: Family, buffer: &mut [u8]) -> io::Result<Option<(usize, Endpoint)>> {
        let socket = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        let Some(socket) = socket else { return Ok(None) };
        let mut slices = [IoSliceMut::new(buffer)];
        let received = recvmsg::<SockaddrStorage>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut self.control),
            MsgFlags::MSG_DONTWAIT,
        );
        let message = match received {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if message.flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(remote) = message.address.as_ref().and_then(socket_address) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let local = message.cmsgs()?.find_map(|control| local_address(&control));
        Ok(Some((message.bytes, Endpoint { remote, local })))
    }

    /// Sends a datagram from the address the peer spoke to, or, once that is no longer ours, from whichever the routes say.
    pub(crate) fn send(&self, datagram: &[u8], to: &mut Endpoint) -> io::Result<()> {
        let Some(socket) = self.of(Family::of(to.remote.ip())) else {
            return Err(Errno::EAFNOSUPPORT.into());
        };
        match send(socket, datagram, to) {
            // The kernel refuses a source address that the host has lost (EINVAL), or that no route allows.
            Err(Errno::EINVAL | Errno::EADDRNOTAVAIL | Errno::ENETUNREACH | Errno::EHOSTUNREACH)
                if to.local.is_some() =>
            {
                to.local = None;
                Ok(send(socket, datagram, to)?)
            }
            Err(Errno::EAGAIN) => {
                let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                poll(&mut wanted, PollTimeout::from(PATIENCE))?;
                Ok(send(socket, datagram, to)?)
            }
            outcome => Ok(outcome?),
        }
    }

    fn of(&self, family: Family) -> Option<&UdpSocket> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }
}

/// Makes one socket, or none if the host does not have the family.
fn bind(family: Family, port: u16, mark: u32) -> io::Result<Option<UdpSocket>> {
    let (domain, address) = match family {
        Family::V4 => (Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))),
        Family::V6 => (Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))),
    };
    let socket = match Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP)) {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        Err(error) => return Err(error),
    };
    match family {
        Family::V4 => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
        Family::V6 => {
            socket.set_only_v6(true)?;
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
    }
    enlarge(&socket)?;
    setsockopt(&socket, sockopt::Mark, &mark)?;
    match socket.bind(&address.into()) {
        Ok(()) => Ok(Some(socket.into())),
        // With IPv6 switched off by sysctl (disable_ipv6) there is nothing to bind to.
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) && family == Family::V6 => Ok(None),
        Err(error) => Err(error),
    }
}

/// Asks for large buffers; without CAP_NET_ADMIN in the first user namespace only up to the sysctl's limit.
fn enlarge(socket: &Socket) -> io::Result<()> {
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER).is_err() {
        socket.set_send_buffer_size(BUFFER)?;
    }
    Ok(())
}

fn send(socket: &UdpSocket, datagram: &[u8], to: &Endpoint) -> Result<(), Errno> {
    let slices = [IoSlice::new(datagram)];
    let remote = SockaddrStorage::from(to.remote);
    let v4;
    let v6;
    let control = match to.local {
        None => None,
        Some(IpAddr::V4(local)) => {
            let local = libc::in_addr {
                s_addr: u32::from_ne_bytes(local.octets()),
            };
            v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: local,
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            Some(ControlMessage::Ipv4PacketInfo(&v4))
        }
        Some(IpAddr::V6(local)) => {
            v6 = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: local.octets(),
                },
                ipi6_ifindex: 0,
            };
            Some(ControlMessage::Ipv6PacketInfo(&v6))
        }
    };
    sendmsg(
        socket.as_raw_fd(),
        &slices,
        control.as_slice(),
        MsgFlags::MSG_DONTWAIT,
        Some(&remote),
    )
    .map(|_| ())
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|&address| SocketAddr::V4(SocketAddrV4::from(address)));
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|&address| SocketAddr::V6(SocketAddrV6::from(address)))
    })
}

/// The address of ours that the datagram was sent to.
fn local_address(control: &ControlMessageOwned) -> Option<IpAddr> {
    if let ControlMessageOwned::Ipv4PacketInfo(info) = control {
        return Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
    }
    if let ControlMessageOwned::Ipv6PacketInfo(info) = control {
        return Some(IpAddr::from(info.ipi6_addr.s6_addr));
    }
    None
}
