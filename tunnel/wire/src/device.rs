//! The device without its doors: who the peers are, what goes to whom, and what may come in. No I/O and no clock in here; packets,
//! datagrams and the time are arguments, and what is to be sent goes to an [`Outbound`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn};
use boringtun::x25519;
use nix::errno::Errno;
use shroud_model::{PresharedKey, PrivateKey, PublicKey};
use zeroize::Zeroizing;

use crate::allowed_ips::AllowedIps;
use crate::handshake_limit::{Admission, COOKIE_REPLY, HandshakeLimit};
use crate::peer::{Peer, Received, Tunnel};
use crate::socket::Endpoint;
use crate::uapi::{AllowedIp, Answer, PeerStatus, Secret, Set, SetPeer};

/// The largest IP packet, and so the largest datagram.
pub(crate) const LARGEST_PACKET: usize = 65535;
/// What encryption adds (whitepaper §5.4.6), rounded up generously.
const ROOM: usize = 64;
/// Inner packets are padded to a multiple of this, so that their length says less (whitepaper §5.4.6).
const PADDING: usize = 16;
/// Peers of one device. The kernel's limit.
const MOST_PEERS: usize = 1 << 20;
/// How often quiet sources are forgotten.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// One moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    /// For measuring.
    pub(crate) instant: Instant,
    /// For telling people.
    pub(crate) wall: SystemTime,
}

impl Now {
    pub(crate) fn read() -> Self {
        Self {
            instant: Instant::now(),
            wall: SystemTime::now(),
        }
    }
}

/// The two doors, as seen from inside. Both may lose what they are given, as networks do.
pub(crate) trait Outbound {
    /// Sends a datagram to a peer. Forgets the endpoint's own address if it is no longer ours.
    fn send(&mut self, datagram: &[u8], to: &mut Endpoint);
    /// Hands an inner packet to the kernel.
    fn deliver(&mut self, packet: &[u8]);
}

/// How many peers' timers run in one go. A handshake is begun in some 0.1 ms.
const PEERS_PER_TICK: usize = 16;

/// A slot in the list of peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct PeerId(usize);

/// The device's own key and what is derived from it.
struct Identity {
    private_key: PrivateKey,
    secret: x25519::StaticSecret,
    public: x25519::PublicKey,
    limit: HandshakeLimit,
    unlimited: Arc<RateLimiter>,
}

impl Identity {
    fn new(private_key: PrivateKey, now: Now) -> Self {
        let secret = x25519::StaticSecret::from(*private_key.expose());
        let public = x25519::PublicKey::from(&secret);
        let limit = HandshakeLimit::new(&public, now.instant);
        Self {
            private_key,
            secret,
            public,
            limit,
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
        }
    }

    fn tunnel(&self, peer: &PublicKey, preshared_key: Option<&PresharedKey>, index: u32) -> Tunnel {
        Tunnel::new(&self.secret, peer, preshared_key, index, Arc::clone(&self.unlimited))
    }
}

/// The peers and everything that finds them.
pub(crate) struct Device {
    identity: Option<Identity>,
    mtu: usize,
    most_peers: usize,
    peers: Vec<Option<Peer>>,
    free: Vec<PeerId>,
    by_key: BTreeMap<PublicKey, PeerId>,
    by_index: BTreeMap<u32, PeerId>,
    by_endpoint: BTreeMap<SocketAddr, PeerId>,
    allowed_ips: AllowedIps<PeerId>,
    next_sweep: Instant,
    /// Whose timers run next, as a slot.
    next_tick: usize,
    /// Decrypted packets.
    inner: Vec<u8>,
    /// Datagrams about to be sent.
    outer: Vec<u8>,
}

impl Device {
    pub(crate) fn new(now: Now) -> Self {
        Self {
            identity: None,
            mtu: 0,
            most_peers: MOST_PEERS,
            peers: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            by_index: BTreeMap::new(),
            by_endpoint: BTreeMap::new(),
            allowed_ips: AllowedIps::new(),
            next_sweep: now.instant,
            next_tick: 0,
            inner: vec![0; LARGEST_PACKET + ROOM],
            outer: vec![0; LARGEST_PACKET + ROOM],
        }
    }

    /// Takes note of the largest inner packet, beyond which nothing is padded.
    pub(crate) fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    /// Encrypts the packet in the first `length` bytes of `buffer` for the peer that owns its destination.
    ///
    /// The bytes behind it are used for padding.
    pub(crate) fn outbound(&mut self, buffer: &mut [u8], length: usize, now: Now, out: &mut impl Outbound) {
        let Some(destination) = Tunn::dst_address(&buffer[..length]) else {
            tracing::trace!(length, "not an IP packet");
            return;
        };
        let Some(peer) = self
            .allowed_ips
            .owner(destination)
            .and_then(|id| slot(&mut self.peers, id))
        else {
            tracing::trace!(%destination, "no peer owns this destination");
            return;
        };
        let padded = length
            .next_multiple_of(PADDING)
            .min(self.mtu.max(length))
            .min(buffer.len());
        buffer[length..padded].fill(0);
        peer.send(&buffer[..padded], &mut self.outer, now, out);
    }

    /// Takes a datagram from the network.
    pub(crate) fn inbound(&mut self, datagram: &[u8], from: &Endpoint, now: Now, out: &mut impl Outbound) {
        let Some(identity) = &mut self.identity else { return };
        // Longer than any packet: nothing of ours, and boringtun would panic rather than refuse it.
        if datagram.len() > LARGEST_PACKET {
            return;
        }
        let Ok(message) = Tunn::parse_incoming_packet(datagram) else {
            tracing::trace!(from = %from.remote, length = datagram.len(), "not a WireGuard message");
            return;
        };
        if matches!(message, Packet::HandshakeInit(_) | Packet::HandshakeResponse(_)) {
            let mut reply = [0; COOKIE_REPLY];
            match identity
                .limit
                .admit(datagram, from.remote.ip(), now.instant, &mut reply)
            {
                Admission::Accept => {}
                Admission::Challenge => return out.send(&reply, &mut from.clone()),
                Admission::Drop => return,
            }
        }
        let is_data = matches!(message, Packet::PacketData(_));
        let (id, index) = match message {
            Packet::HandshakeInit(initiation) => {
                let Ok(half) = parse_handshake_anon(&identity.secret, &identity.public, &initiation) else {
                    return;
                };
                let key = PublicKey::from_bytes(half.peer_static_public).ok();
                (key.and_then(|key| self.by_key.get(&key)), None)
            }
            Packet::HandshakeResponse(response) => (
                self.by_index.get(&(response.receiver_idx >> 8)),
                Some(response.receiver_idx),
            ),
            Packet::PacketCookieReply(reply) => {
                (self.by_index.get(&(reply.receiver_idx >> 8)), Some(reply.receiver_idx))
            }
            Packet::PacketData(data) => {
                let id = self.by_index.get(&(data.receiver_idx >> 8));
                if id.is_none() {
                    self.revive(from, now, out);
                    return;
                }
                (id, Some(data.receiver_idx))
            }
        };
        let Some(&id) = id else { return };
        let Some(peer) = slot(&mut self.peers, id) else { return };

        let before = peer.remote();
        let received = peer.receive(datagram, index, from, (&mut self.inner, &mut self.outer), now, out);
        let after = peer.remote();

        match received {
            Received::Packet(packet, source) if self.allowed_ips.owner(source) == Some(id) => out.deliver(packet),
            Received::Packet(_, source) => {
                tracing::debug!(peer = %peer.public_key, %source, "dropped: this peer does not own the source address");
            }
            Received::Handled => {}
            Received::UnknownSession if is_data => self.revive(from, now, out),
            // boringtun counts 37 leap seconds, the kernel 10: a node that changes from this program to the kernel's WireGuard would not
            // be heard for 27 s. It takes our initiation, though.
            Received::Stale => self.revive(from, now, out),
            // A late answer to a handshake that has been begun again.
            Received::UnknownSession => {}
            Received::Refused(error) => tracing::trace!(peer = %peer.public_key, ?error, "refused"),
        }
        if before != after {
            tracing::debug!(peer = ?self.peers[id.0].as_ref().map(|peer| peer.public_key), ?before, ?after, "endpoint moved");
            self.index_endpoint(id, before, after);
        }
    }

    /// Runs the timers of some peers, and of others the next time: thousands that begin a handshake at once would keep everything else
    /// waiting for a second. Answers whether it was the turn of the last.
    pub(crate) fn tick(&mut self, now: Now, out: &mut impl Outbound) -> bool {
        let first = self.next_tick.min(self.peers.len());
        let end = self.peers.len().min(first + PEERS_PER_TICK);
        for peer in self.peers[first..end].iter_mut().flatten() {
            peer.tick(&mut self.outer, now, out);
            if let Some(index) = peer.retire(now) {
                self.by_index.remove(&index);
            }
        }
        let all = end == self.peers.len();
        self.next_tick = if all { 0 } else { end };
        if now.instant >= self.next_sweep {
            self.next_sweep = now.instant + SWEEP_EVERY;
            if let Some(identity) = &mut self.identity {
                identity.limit.sweep(now.instant);
            }
        }
        all
    }

    /// Says why a change cannot be made, before anything of it is made.
    pub(crate) fn check(&self, set: &Set) -> Result<(), Errno> {
        let own = match &set.private_key {
            Some(Secret::Replace(key)) => Some(public_key(key)),
            Some(Secret::Clear) => None,
            None => self.identity.as_ref().map(|identity| *identity.public.as_bytes()),
        };
        if set
            .peers
            .iter()
            .any(|peer| !peer.remove && own.as_ref() == Some(peer.public_key.as_bytes()))
        {
            return Err(Errno::EINVAL);
        }
        let kept = if set.replace_peers { 0 } else { self.by_key.len() };
        let is_new = |peer: &&SetPeer| !peer.remove && !peer.update_only && !self.by_key.contains_key(&peer.public_key);
        let new: BTreeSet<PublicKey> = set.peers.iter().filter(is_new).map(|peer| peer.public_key).collect();
        if kept + new.len() > self.most_peers {
            return Err(Errno::ENOSPC);
        }
        Ok(())
    }

    /// Makes a change that [`Device::check`] has accepted.
    pub(crate) fn commit(&mut self, set: Set, now: Now, out: &mut impl Outbound) {
        if set.replace_peers {
            for id in self.by_key.values().copied().collect::<Vec<_>>() {
                self.remove(id);
            }
        }
        match set.private_key {
            Some(Secret::Replace(key)) => self.set_identity(Some(key), now),
            Some(Secret::Clear) => self.set_identity(None, now),
            None => {}
        }
        for peer in set.peers {
            self.commit_peer(peer, now, out);
        }
    }

    /// Writes the answer to a `get` request.
    pub(crate) fn describe(&self, listen_port: u16, fwmark: u32) -> Zeroizing<Vec<u8>> {
        let mut answer = Answer::with_peers(self.by_key.len());
        answer.device(
            self.identity.as_ref().map(|identity| &identity.private_key),
            listen_port,
            fwmark,
        );
        for &id in self.by_key.values() {
            let Some(peer) = &self.peers[id.0] else { continue };
            answer.peer(&PeerStatus {
                public_key: peer.public_key,
                preshared_key: peer.preshared_key.as_ref(),
                endpoint: peer.remote(),
                last_handshake: peer.last_handshake,
                tx_bytes: peer.tx_bytes,
                rx_bytes: peer.rx_bytes,
                keepalive: peer.keepalive,
            });
            self.allowed_ips.of(id).for_each(|prefix| answer.allowed_ip(prefix));
        }
        answer.end(Ok(()))
    }

    /// Forgets from which of our addresses each peer was reached; the next packet takes what the routes say.
    pub(crate) fn forget_local_addresses(&mut self) {
        for peer in self.peers.iter_mut().flatten() {
            if let Some(endpoint) = &mut peer.endpoint {
                endpoint.local = None;
            }
        }
    }

    /// A packet of a session we do not know, or a late initiation, came from a peer's endpoint: the peer, or we, have restarted.
    fn revive(&mut self, from: &Endpoint, now: Now, out: &mut impl Outbound) {
        if let Some(&id) = self.by_endpoint.get(&from.remote)
            && let Some(peer) = slot(&mut self.peers, id)
        {
            peer.revive(&mut self.outer, now, out);
        }
    }

    fn set_identity(&mut self, private_key: Option<PrivateKey>, now: Now) {
        let is = self.identity.as_ref().map(|identity| identity.private_key.expose());
        if is == private_key.as_ref().map(PrivateKey::expose) {
            return;
        }
        self.identity = private_key.map(|key| Identity::new(key, now));
        if let Some(identity) = &self.identity
            && let Ok(own) = PublicKey::from_bytes(*identity.public.as_bytes())
            && let Some(&id) = self.by_key.get(&own)
        {
            self.remove(id);
        }
        self.by_index.clear();
        for &id in self.by_key.values() {
            let Some(peer) = slot(&mut self.peers, id) else {
                continue;
            };
            peer.restart(self.identity.as_ref().map(|identity| {
                let index = claim_index(&mut self.by_index, id);
                identity.tunnel(&peer.public_key, peer.preshared_key.as_ref(), index)
            }));
        }
    }

    fn commit_peer(&mut self, set: SetPeer, now: Now, out: &mut impl Outbound) {
        let known = self.by_key.get(&set.public_key).copied();
        if set.remove {
            known.into_iter().for_each(|id| self.remove(id));
            return;
        }
        let id = match known {
            Some(id) => id,
            None if set.update_only => return,
            None => self.add(set.public_key),
        };
        if set.replace_allowed_ips {
            self.allowed_ips.clear(id);
        }
        for change in set.allowed_ips {
            match change {
                AllowedIp::Add(prefix) => self.allowed_ips.insert(prefix, id),
                AllowedIp::Remove(prefix) => self.allowed_ips.remove(prefix, id),
            }
        }
        let Some(peer) = slot(&mut self.peers, id) else { return };
        if let Some(change) = set.preshared_key {
            let new = match change {
                Secret::Replace(key) => Some(key),
                Secret::Clear => None,
            };
            if peer.preshared_key.as_ref().map(PresharedKey::expose) != new.as_ref().map(PresharedKey::expose) {
                peer.preshared_key = new;
                if let Some(identity) = &self.identity {
                    let index = claim_index(&mut self.by_index, id);
                    for old in peer.succeed(
                        identity.tunnel(&peer.public_key, peer.preshared_key.as_ref(), index),
                        now,
                    ) {
                        self.by_index.remove(&old);
                    }
                }
            }
        }
        if let Some(keepalive) = set.keepalive {
            peer.keepalive = keepalive;
        }
        let before = peer.remote();
        if let Some(remote) = set.endpoint
            && before != Some(remote)
        {
            peer.endpoint = Some(Endpoint { remote, local: None });
        }
        let after = peer.remote();
        peer.wake(&mut self.outer, now, out);
        self.index_endpoint(id, before, after);
    }

    fn add(&mut self, public_key: PublicKey) -> PeerId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.peers.push(None);
            PeerId(self.peers.len() - 1)
        });
        let mut peer = Peer::new(public_key);
        if let Some(identity) = &self.identity {
            let index = claim_index(&mut self.by_index, id);
            peer.restart(Some(identity.tunnel(&public_key, None, index)));
        }
        self.peers[id.0] = Some(peer);
        self.by_key.insert(public_key, id);
        id
    }

    fn remove(&mut self, id: PeerId) {
        let Some(peer) = self.peers[id.0].take() else { return };
        self.allowed_ips.clear(id);
        self.by_key.remove(&peer.public_key);
        for index in peer.indices() {
            self.by_index.remove(&index);
        }
        self.index_endpoint(id, peer.remote(), None);
        self.free.push(id);
    }

    fn index_endpoint(&mut self, id: PeerId, before: Option<SocketAddr>, after: Option<SocketAddr>) {
        if let Some(before) = before
            && self.by_endpoint.get(&before) == Some(&id)
        {
            self.by_endpoint.remove(&before);
        }
        if let Some(after) = after {
            self.by_endpoint.insert(after, id);
        }
    }
}

fn slot(peers: &mut [Option<Peer>], id: PeerId) -> Option<&mut Peer> {
    peers.get_mut(id.0)?.as_mut()
}

fn public_key(private_key: &PrivateKey) -> [u8; 32] {
    x25519::PublicKey::from(&x25519::StaticSecret::from(*private_key.expose())).to_bytes()
}

/// Finds a free number at random: in sequence it would tell everybody how many peers there are, and what the next number is.
fn claim_index(by_index: &mut BTreeMap<u32, PeerId>, id: PeerId) -> u32 {
    loop {
        let index = getrandom::u32().expect("the kernel has random numbers once it has booted") >> 8;
        if let std::collections::btree_map::Entry::Vacant(entry) = by_index.entry(index) {
            entry.insert(id);
            return index;
        }
    }
}

#[cfg(test)]
mod tests;
