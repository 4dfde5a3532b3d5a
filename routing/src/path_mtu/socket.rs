//! Echo requests and replies (RFC 792, RFC 4443 §4) over raw sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto, socket_with,
};

use super::peers::Probe;

const HEADER_V4: usize = 20;
const HEADER_V6: usize = 40;
/// Type, code, checksum, identifier, sequence number.
const ECHO_HEADER: usize = 8;
/// By which we know our own replies among those of others.
const COOKIE: usize = 8;

const REQUEST_V4: u8 = 8;
const REPLY_V4: u8 = 0;
const REQUEST_V6: u8 = 128;
const REPLY_V6: u8 = 129;

/// How many packets are read before somebody else has a turn. A raw socket sees everybody's ICMP.
const READ_AT_ONCE: usize = 256;

/// One raw socket for each family the kernel has, in the network namespace in which they were opened.
pub(super) struct Sockets {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
    cookie: [u8; COOKIE],
}

impl Sockets {
    pub(super) fn open() -> io::Result<Self> {
        use std::hash::{BuildHasher as _, RandomState};

        let v4 = raw(AddressFamily::INET, ipproto::ICMP)?;
        // "Probe": "do not fragment", and no belief in what the route or an ICMP message says about sizes, which is what we want to find out.
        set_ip_mtu_discover(&v4, Ipv4PathMtuDiscovery::PROBE)?;
        let v6 = match raw(AddressFamily::INET6, ipproto::ICMPV6) {
            Ok(v6) => {
                set_ipv6_mtu_discover(&v6, Ipv6PathMtuDiscovery::PROBE)?;
                Some(v6)
            }
            // Switched off.
            Err(Errno::AFNOSUPPORT) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            v4,
            v6,
            cookie: RandomState::new().hash_one(std::process::id()).to_be_bytes(),
        })
    }

    pub(super) fn send(&self, probe: &Probe) -> io::Result<()> {
        let packet = request(probe, self.cookie);
        let socket = match probe.peer {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => self.v6.as_ref().ok_or(Errno::AFNOSUPPORT)?,
        };
        // No flag lets the kernel wait for room: a probe that finds none is lost.
        sendto(socket, &packet, SendFlags::DONTWAIT, &SocketAddr::new(probe.peer, 0))?;
        Ok(())
    }

    /// Sleeps until something can be read, or the time is over.
    pub(super) fn wait(&self, time: Duration) {
        let mut polled = vec![PollFd::new(&self.v4, PollFlags::IN)];
        polled.extend(self.v6.as_ref().map(|v6| PollFd::new(v6, PollFlags::IN)));
        // Rounded up, so that whoever waits for a time has reached it.
        let time = Timespec::try_from(time + Duration::from_millis(1)).ok();
        if let Err(error) = poll(&mut polled, time.as_ref())
            && error != Errno::INTR
        {
            tracing::debug!(%error, "wait for echo replies");
        }
    }

    /// Reads what is there and tells of each reply to us: by whom, and the sequence number.
    pub(super) fn receive(&self, mut reply: impl FnMut(IpAddr, u16)) {
        let mut packet = vec![0; 65536];
        for (socket, header, kind) in [(Some(&self.v4), HEADER_V4, REPLY_V4), (self.v6.as_ref(), 0, REPLY_V6)] {
            let Some(socket) = socket else { continue };
            for _ in 0..READ_AT_ONCE {
                let Ok((length, _, from)) = recvfrom(socket, &mut packet[..], RecvFlags::DONTWAIT) else {
                    break;
                };
                let from = from.and_then(|from| SocketAddr::try_from(from).ok());
                // An IPv4 raw socket shows the IP header, whose length is in it; an IPv6 one does not.
                let header = match packet.first() {
                    Some(first) if header > 0 => usize::from(first & 0x0f) * 4,
                    _ => 0,
                };
                let sequence = packet
                    .get(header..length)
                    .and_then(|echo| sequence(echo, kind, self.cookie));
                if let (Some(from), Some(sequence)) = (from, sequence) {
                    reply(from.ip(), sequence);
                }
            }
        }
    }
}

fn raw(family: AddressFamily, protocol: Protocol) -> Result<OwnedFd, Errno> {
    socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol))
}

/// An echo request that makes a packet of the probe's size together with its IP header.
fn request(probe: &Probe, cookie: [u8; COOKIE]) -> Vec<u8> {
    let (kind, header) = match probe.peer {
        IpAddr::V4(_) => (REQUEST_V4, HEADER_V4),
        IpAddr::V6(_) => (REQUEST_V6, HEADER_V6),
    };
    let size = usize::try_from(probe.size).unwrap_or(usize::MAX).min(65535);
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend([cookie[0], cookie[1]]);
    packet.extend(probe.sequence.to_be_bytes());
    packet.extend(cookie);
    packet.resize(size.saturating_sub(header).max(ECHO_HEADER + COOKIE), 0);
    if kind == REQUEST_V4 {
        // The kernel does this for ICMPv6, whose checksum covers addresses.
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

/// The sequence number of a reply to a request of ours.
fn sequence(echo: &[u8], kind: u8, cookie: [u8; COOKIE]) -> Option<u16> {
    let ours = echo.first()? == &kind
        && echo.get(4..6)? == &cookie[..2]
        && echo.get(ECHO_HEADER..ECHO_HEADER + COOKIE)? == cookie;
    ours.then(|| u16::from_be_bytes([echo[6], echo[7]]))
}

/// The internet checksum (RFC 1071) over bytes in which its own place is zero.
fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(0_u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn probe(peer: IpAddr, size: u32) -> Probe {
        Probe {
            peer,
            size,
            sequence: 0x0102,
        }
    }

    #[test]
    fn a_request_makes_a_packet_of_the_size_asked_for() {
        let v4 = request(&probe(Ipv4Addr::LOCALHOST.into(), 576), [7; 8]);
        let v6 = request(&probe(Ipv6Addr::LOCALHOST.into(), 1280), [7; 8]);

        assert_eq!((v4.len(), v6.len()), (576 - 20, 1280 - 40));
        assert_eq!((v4[0], v6[0]), (8, 128));
    }

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        // The example of §3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        // A packet with its checksum in place sums up to nothing.
        let packet = request(&probe(Ipv4Addr::LOCALHOST.into(), 9001), [0xff; 8]);
        assert_eq!(checksum(&packet), 0);
    }

    #[test]
    fn only_a_reply_to_us_counts() {
        let mut reply = request(&probe(Ipv4Addr::LOCALHOST.into(), 576), [7; 8]);
        reply[0] = REPLY_V4;

        assert_eq!(sequence(&reply, REPLY_V4, [7; 8]), Some(0x0102));
        assert_eq!(sequence(&reply, REPLY_V4, [8; 8]), None, "somebody else's");
        let same_identifier = [7, 7, 8, 8, 8, 8, 8, 8];
        assert_eq!(sequence(&reply, REPLY_V4, same_identifier), None, "somebody else's");
        assert_eq!(sequence(&reply[..12], REPLY_V4, [7; 8]), None, "too short");
        reply[0] = REQUEST_V4;
        assert_eq!(sequence(&reply, REPLY_V4, [7; 8]), None, "a request");
    }
}
