//! Wake-ups: the kernel says that something changed, never what. Whoever is woken looks for himself.

use std::io;

use rtnetlink::MulticastGroup;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};

use crate::Error;

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// How many waiting notices one wake-up swallows at most, so that a flood of them cannot keep the caller from its turn.
const SWALLOWED: usize = 4096;

/// Why the monitor wakes somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// A link, address, route or rule changed.
    Changed,
    /// So much changed that the kernel could not keep all notices for us.
    Overrun,
}

/// Listens to the kernel's notices about links, addresses, routes and rules of one network namespace.
pub struct Monitor {
    socket: TokioSocket,
}

impl Monitor {
    /// Begins to listen in the calling thread's network namespace. To be called inside a tokio runtime with I/O.
    ///
    /// # Errors
    /// [`Error::Open`] when there is no such socket to be had.
    pub fn open() -> Result<Self, Error> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE).map_err(Error::Open)?;
        let groups = GROUPS
            .into_iter()
            .fold(0, |groups, group| groups | 1 << (group as u32 - 1));
        socket
            .socket_mut()
            .bind(&SocketAddr::new(0, groups))
            .map_err(Error::Open)?;
        Ok(Self { socket })
    }

    /// Waits until something changes, and swallows the notices that are already waiting with it. Cancelling it loses nothing.
    ///
    /// # Errors
    /// [`Error::Request`] when the socket is broken; open a new monitor, and take it for a change.
    pub async fn changed(&mut self) -> Result<Wake, Error> {
        // Nobody reads the notices: a short buffer is enough, and the kernel drops what does not fit.
        let mut notice = [0u8; 16];
        let first = self.socket.recv(&mut &mut notice[..]).await;
        let mut wake = weigh(first)?;
        for _ in 0..SWALLOWED {
            match self.socket.socket_ref().recv(&mut &mut notice[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                next => {
                    if weigh(next.map(drop))? == Wake::Overrun {
                        wake = Wake::Overrun;
                    }
                }
            }
        }
        Ok(wake)
    }
}

fn weigh(received: io::Result<()>) -> Result<Wake, Error> {
    match received {
        Ok(()) => Ok(Wake::Changed),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => Ok(Wake::Overrun),
        Err(source) => Err(Error::request("listen to route notices", source)),
    }
}
