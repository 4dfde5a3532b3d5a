//! Which encrypted device leads to a peer. Pure.
//!
//! A tunnel runs between a key of ours and a key of the peer. A WireGuard device has one private key, and gives a range of addresses to one
//! peer only. So that nothing is lost while keys change, the old and the new key of either side must be of use at once: the tunnels of each
//! pair of keys have a device of their own, a *lane*. The lowest bits of the two epochs choose it, since two keys in a row differ there.
//!
//! ```text
//!               peer: odd epoch    even epoch
//!   own: odd    0  shroud0         1  shroud0-1          lane n listens on the port n above the configured one
//!        even   2  shroud0-2       3  shroud0-3
//! ```
//!
//! What comes out of any lane is taken. What is sent takes the newest pair of keys that has shaken hands: each side changes over by
//! itself, when it can see that the other end is there. First keys have odd epochs, so that a mesh in which nobody changes keys has one lane.

use std::net::SocketAddr;

use shroud_keyd::{NodeKeys, Peer};
use shroud_model::PublicKey;

use crate::config::Encryption;

/// One of the encrypted devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lane(u8);

/// A tunnel to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) lane: Lane,
    /// This node's key.
    pub(crate) own: PublicKey,
    /// The peer's.
    pub(crate) peer: PublicKey,
}

impl Lane {
    /// All there can be.
    pub(crate) const ALL: [Self; 4] = [Self(0), Self(1), Self(2), Self(3)];

    /// The lane of tunnels between two keys with these epochs.
    pub(crate) const fn between(own: u64, peer: u64) -> Self {
        Self(is_even(own) << 1 | is_even(peer))
    }

    /// Whether the lane is one of the key with this epoch.
    pub(crate) const fn is_of(self, own: u64) -> bool {
        self.0 >> 1 == is_even(own)
    }

    /// The lane as the peer at the other end calls it.
    pub(crate) const fn there(self) -> Self {
        Self((self.0 & 1) << 1 | self.0 >> 1)
    }

    /// The device's name.
    pub(crate) fn device(self, encryption: &Encryption) -> String {
        match self.0 {
            0 => encryption.device.clone(),
            number => format!("{}-{number}", encryption.device),
        }
    }

    /// The lane that has a device, if it is one of ours.
    pub(crate) fn of_device(device: &str, encryption: &Encryption) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.device(encryption) == device)
    }

    /// The UDP port on which this node listens.
    pub(crate) fn listen_port(self, encryption: &Encryption) -> u16 {
        encryption.listen_port + u16::from(self.0)
    }

    /// Where the peer at the other end listens, that has announced this endpoint; `None` where there is no such port.
    pub(crate) fn endpoint(self, announced: SocketAddr) -> Option<SocketAddr> {
        let port = announced.port().checked_add(u16::from(self.there().0))?;
        Some(SocketAddr::new(announced.ip(), port))
    }
}

const fn is_even(epoch: u64) -> u8 {
    (epoch & 1) as u8 ^ 1
}

/// All tunnels to a peer, those with the newest keys first.
pub(crate) fn pairs(keys: &NodeKeys, peer: &Peer) -> Vec<Pair> {
    let of_peer = || {
        let next = peer.next_key.map(|next| (next.public_key, next.epoch));
        next.into_iter().chain([(peer.public_key, peer.epoch)])
    };
    let newest_first = keys.next.iter().chain([&keys.current]);
    let pairs = newest_first.flat_map(|own| {
        of_peer().map(|(peer, epoch)| Pair {
            lane: Lane::between(own.epoch, epoch),
            own: own.public,
            peer,
        })
    });
    pairs.collect()
}

/// Which of the tunnels to a peer is sent through: the newest that works; otherwise the oldest, which everybody knows. Its place in the list.
pub(crate) fn chosen(pairs: &[Pair], works: impl Fn(&Pair) -> bool) -> usize {
    pairs.iter().position(works).unwrap_or(pairs.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_a_tunnel_agree_on_its_ports() {
        let encryption = Encryption::default();
        let announced: SocketAddr = "192.0.2.1:51820".parse().unwrap();
        for (own, peer) in [(1, 1), (1, 2), (2, 1), (2, 2), (7, 1_764_095_000)] {
            let (here, there) = (Lane::between(own, peer), Lane::between(peer, own));

            assert_eq!(here.there(), there);
            assert_eq!(here.endpoint(announced).unwrap().port(), there.listen_port(&encryption));
        }
        assert_eq!(Lane::between(1, 1), Lane::ALL[0]);
    }

    #[test]
    fn lanes_have_devices_and_ports_of_their_own() {
        let encryption = Encryption::default();
        let lanes = [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(own, peer)| Lane::between(own, peer));

        assert_eq!(lanes, Lane::ALL);
        let devices = lanes.map(|lane| lane.device(&encryption));
        assert_eq!(devices, ["shroud0", "shroud0-1", "shroud0-2", "shroud0-3"]);
        assert_eq!(
            lanes.map(|lane| lane.listen_port(&encryption)),
            [51820, 51821, 51822, 51823]
        );
        for lane in lanes {
            assert_eq!(Lane::of_device(&lane.device(&encryption), &encryption), Some(lane));
        }
        assert_eq!(Lane::of_device("shroud0-4", &encryption), None);
    }

    #[test]
    fn an_endpoint_without_room_above_its_port_has_no_further_lanes() {
        let announced: SocketAddr = "192.0.2.1:65535".parse().unwrap();

        assert_eq!(Lane::ALL[0].endpoint(announced), Some(announced));
        assert_eq!(Lane::ALL[1].endpoint(announced), None);
    }

    #[test]
    fn what_is_sent_takes_the_newest_tunnel_that_works() {
        let key = |seed: u8| PublicKey::from_bytes([seed; 32]).unwrap();
        let pair = |own: u64, peer: u64| Pair {
            lane: Lane::between(own, peer),
            own: key(own as u8),
            peer: key(10 + peer as u8),
        };
        let pairs = [pair(2, 2), pair(2, 1), pair(1, 2), pair(1, 1)];
        let chosen = |works: &[usize]| chosen(&pairs, |pair| works.iter().any(|&place| pairs[place] == *pair));

        assert_eq!(
            [chosen(&[]), chosen(&[3]), chosen(&[3, 1]), chosen(&[0, 1, 2, 3])],
            [3, 3, 1, 0]
        );
    }
}
