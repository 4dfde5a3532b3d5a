//! An `AF_PACKET` socket bound to one link (packet(7)): the only unsafe code of the lab.

#![allow(unsafe_code, reason = "no crate offers a safe sockaddr_ll or PACKET_STATISTICS")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use super::Direction;

/// Room for bursts; the kernel doubles it for its own accounting. Untouched room costs nothing.
pub(crate) const ROOM: usize = 256 << 20;

/// Larger than any frame a veth carries with segmentation offload (64 KiB and headers; BIG TCP is off by default).
const LARGEST_FRAME: usize = 256 << 10;

/// How long a read waits for a frame before it says `WouldBlock`.
const PATIENCE: Duration = Duration::from_millis(50);

/// Captures one link.
pub(crate) struct PacketSocket(Socket);

/// Room for one frame.
pub(crate) fn buffer() -> Box<[MaybeUninit<u8>]> {
    vec![MaybeUninit::uninit(); LARGEST_FRAME].into_boxed_slice()
}

impl PacketSocket {
    /// Opens a socket in the calling thread's namespace that sees all frames of the link with this index, with so many bytes of
    /// room for those not read yet.
    pub(crate) fn open(index: u32, room: usize) -> io::Result<PacketSocket> {
        // Without a protocol it receives nothing until bind names the link: no frame of another link slips in.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, room)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.bind(&link_address(index)?)?;
        Ok(PacketSocket(socket))
    }

    /// Reads one frame; `WouldBlock` when none came for a while.
    pub(crate) fn read<'a>(&self, buffer: &'a mut [MaybeUninit<u8>]) -> io::Result<(&'a [u8], Direction)> {
        let room = buffer.len();
        // MSG_TRUNC makes the kernel return the true length, so that a cut frame cannot pass for a whole one.
        let (length, address) = self.0.recv_from_with_flags(buffer, libc::MSG_TRUNC)?;
        if length > room {
            return Err(io::Error::other(format!(
                "a frame of {length} bytes is larger than the buffer"
            )));
        }
        // SAFETY: recvfrom has written `length` bytes to the front of `buffer`, and `length` is within it.
        let frame = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        Ok((frame, direction(&address)))
    }

    /// Frames dropped for want of room since the last call; reading resets the kernel's counter.
    pub(crate) fn drops(&self) -> io::Result<u64> {
        let mut statistics = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the descriptor is open as long as `self`, and the kernel writes at most `length` bytes into a live
        // struct of that size, whose every bit pattern is valid.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if result == 0 {
            Ok(statistics.tp_drops.into())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn link_address(index: u32) -> io::Result<SockAddr> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_storage is large and aligned enough for every socket address, sockaddr_ll included (socket(7)).
    *unsafe { storage.view_as::<libc::sockaddr_ll>() } = address;
    // SAFETY: the storage holds a sockaddr_ll, and the length is that of a sockaddr_ll.
    Ok(unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) })
}

/// The link transmits towards the node what the bridge sends out of the port.
fn direction(address: &SockAddr) -> Direction {
    // SAFETY: a packet socket fills in a sockaddr_ll; the storage behind the pointer is larger, aligned for it and was
    // zeroed before, so the field is initialised in any case.
    let kind = unsafe { (*address.as_ptr().cast::<libc::sockaddr_ll>()).sll_pkttype };
    if kind == libc::PACKET_OUTGOING {
        Direction::ToNode
    } else {
        Direction::FromNode
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::netns::Netns;

    #[test]
    fn a_socket_without_room_counts_what_it_drops() {
        let netns = Netns::new(&format!("shroud-{}-drops", std::process::id())).unwrap();
        let (roomy, tight) = netns
            .run(|| {
                // Loopback is always link 1.
                let sockets = (PacketSocket::open(1, ROOM)?, PacketSocket::open(1, 4096)?);
                let sender = UdpSocket::bind("127.0.0.1:0")?;
                for _ in 0..100 {
                    sender.send_to(&[7; 1000], sender.local_addr()?)?;
                }
                Ok(sockets)
            })
            .unwrap();

        let (read, dropped) = drain(&tight);

        // A frame on loopback is seen twice, on its way out and on its way in.
        assert_eq!(drain(&roomy), (200, 0));
        assert!(dropped > 0);
        assert_eq!(read + dropped, 200);
    }

    fn drain(socket: &PacketSocket) -> (u64, u64) {
        let mut buffer = buffer();
        let mut read = 0;
        while let Ok((frame, direction)) = socket.read(&mut buffer) {
            assert_eq!(frame.len(), 14 + 20 + 8 + 1000, "{direction:?}");
            read += 1;
        }
        (read, socket.drops().unwrap())
    }
}
