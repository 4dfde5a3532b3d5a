//! Wake-ups: the kernel says that something changed, never what. Whoever is woken looks for himself.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// The length of a netlink message's header, in bytes.
const HEADER: usize = 16;

/// How many waiting notices one wake-up swallows at most, so that a flood of them cannot keep the caller from its turn.
const SWALLOWED: usize = 4096;

/// Why the monitor wakes somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// A link, address, route or rule changed.
    Changed,
    /// So much changed that the kernel could not keep all notices for us.
    Overrun,
}

/// Listens to the kernel's notices about links, addresses, routes and rules of one network namespace.
pub struct Monitor {
    socket: TokioSocket,
    /// The netlink port of whoever need not be told what he did himself; 0 for nobody.
    ignored: Arc<AtomicU32>,
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
        Ok(Self {
            socket,
            ignored: Arc::default(),
        })
    }

    /// From the moment on that a [`Kernel::port`](crate::Kernel::port) is put here, what that one changes wakes nobody. (Not all notices
    /// name their cause: older kernels do not with links.)
    pub fn ignore(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.ignored)
    }

    /// Waits until something changes, and swallows the notices that are already waiting with it. Cancelling it loses nothing.
    ///
    /// # Errors
    /// [`Error::Request`] when the socket is broken; open a new monitor, and take it for a change.
    pub async fn changed(&mut self) -> Result<Wake, Error> {
        // Only the header is read: a short buffer is enough, and the kernel drops what does not fit.
        let mut notice = [0u8; HEADER];
        let mut wake = None;
        while wake.is_none() {
            let first = self.socket.recv(&mut &mut notice[..]).await;
            wake = self.weigh(first, &notice)?;
        }
        for _ in 0..SWALLOWED {
            match self.socket.socket_ref().recv(&mut &mut notice[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                next => wake = wake.max(self.weigh(next.map(drop), &notice)?),
            }
        }
        Ok(wake.unwrap_or(Wake::Changed))
    }

    /// Whether a notice is a reason to wake somebody.
    fn weigh(&self, received: io::Result<()>, notice: &[u8; HEADER]) -> Result<Option<Wake>, Error> {
        match received {
            Ok(()) => {
                let ignored = self.ignored.load(Ordering::Relaxed);
                let is_ignored = ignored != 0 && cause(notice) == ignored;
                Ok((!is_ignored).then_some(Wake::Changed))
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {
                Ok(Some(Wake::Overrun))
            }
            Err(source) => Err(Error::request("listen to route notices", source)),
        }
    }
}

/// The netlink port of whoever caused a notice, 0 where the kernel does not say (`nlmsg_pid`, the last field of netlink(7)'s header).
fn cause(notice: &[u8; HEADER]) -> u32 {
    let [.., a, b, c, d] = *notice;
    u32::from_ne_bytes([a, b, c, d])
}
