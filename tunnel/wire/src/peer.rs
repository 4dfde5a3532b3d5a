//! One peer: its noise state, where it is, and what passed between us.
//!
//! boringtun's `Tunn` does the cryptography and the timers of handshake and rekeying. This module keeps what `Tunn` does not: the endpoint,
//! persistent keepalive (`Tunn` stops keeping alive once a handshake has gone unanswered for 90 s), counters that outlive a session, and
//! the change of a pre-shared key without a gap.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use shroud_model::{PresharedKey, PublicKey};

use crate::device::{Now, Outbound};
use crate::socket::Endpoint;

/// A session is not used after this age (REJECT_AFTER_TIME, whitepaper §6.1).
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// How often a peer may make us begin a handshake by sending what we cannot read.
const REVIVE_EVERY: Duration = Duration::from_secs(5);
/// More packets than boringtun keeps for a peer without a session (256).
const MOST_QUEUED: usize = 300;

/// A handshake response: its type, and where the sender's index stands in it (whitepaper §5.4.3).
const HANDSHAKE_RESPONSE: &[u8] = &[2, 0, 0, 0];

/// One noise state and the number by which the peer's packets find it.
pub(crate) struct Tunnel {
    noise: Box<Tunn>,
    /// Random, 24 bits; boringtun counts its sessions in the 8 bits below it.
    index: u32,
    /// The session with which we answered a handshake, until the peer uses it: only then is the handshake complete.
    unconfirmed: Option<u32>,
}

impl Tunnel {
    /// `unlimited` is a limiter that only checks: [`crate::handshake_limit`] has decided before a message comes here.
    pub(crate) fn new(
        secret: &x25519::StaticSecret,
        peer: &PublicKey,
        preshared_key: Option<&PresharedKey>,
        index: u32,
        unlimited: Arc<RateLimiter>,
    ) -> Self {
        let peer = x25519::PublicKey::from(*peer.as_bytes());
        let preshared_key = preshared_key.map(|key| *key.expose());
        let noise = Tunn::new(secret.clone(), peer, preshared_key, None, index, Some(unlimited));
        Self {
            noise: Box::new(noise),
            index,
            unconfirmed: None,
        }
    }

    /// The age of the session packets are sent with, if there is one.
    fn age(&self) -> Option<Duration> {
        self.noise.time_since_last_handshake()
    }
}

/// The tunnel of a pre-shared key that was replaced: it goes on carrying packets until the new key has a session.
struct Retiring {
    tunnel: Tunnel,
    until: Instant,
}

/// A peer. Without a tunnel (the device has no private key) it is configuration only.
pub(crate) struct Peer {
    pub(crate) public_key: PublicKey,
    pub(crate) preshared_key: Option<PresharedKey>,
    pub(crate) endpoint: Option<Endpoint>,
    /// Seconds; 0 is never.
    pub(crate) keepalive: u16,
    pub(crate) last_handshake: Option<SystemTime>,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_bytes: u64,
    tunnel: Option<Tunnel>,
    retiring: Option<Retiring>,
    last_traversal: Option<Instant>,
    last_revival: Option<Instant>,
}

/// What a datagram from a peer turned out to be.
pub(crate) enum Received<'a> {
    /// An inner packet and the source address it claims.
    Packet(&'a [u8], IpAddr),
    /// A message that is dealt with.
    Handled,
    /// A packet of a session we do not have: one of us has restarted.
    UnknownSession,
    /// The peer's own handshake initiation, but not younger than one we have taken: a replay, or the peer's clock went back.
    Stale,
    /// Forged, replayed or broken.
    Refused(WireGuardError),
}

impl Peer {
    pub(crate) fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            keepalive: 0,
            last_handshake: None,
            tx_bytes: 0,
            rx_bytes: 0,
            tunnel: None,
            retiring: None,
            last_traversal: None,
            last_revival: None,
        }
    }

    pub(crate) fn remote(&self) -> Option<SocketAddr> {
        self.endpoint.as_ref().map(|endpoint| endpoint.remote)
    }

    /// The numbers under which packets for this peer's tunnels arrive.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> {
        let retiring = self.retiring.as_ref().map(|retiring| &retiring.tunnel);
        self.tunnel.iter().chain(retiring).map(|tunnel| tunnel.index)
    }

    /// Forgets all sessions and begins anew; `None` when the device has no identity any more.
    pub(crate) fn restart(&mut self, tunnel: Option<Tunnel>) {
        self.tunnel = tunnel;
        self.retiring = None;
        self.last_traversal = None;
    }

    /// Begins anew with another pre-shared key, while a session of the old one goes on until there is a new one. Returns the indices
    /// that lead nowhere now.
    pub(crate) fn succeed(&mut self, tunnel: Tunnel, now: Now) -> Vec<u32> {
        let mut gone: Vec<u32> = self.indices().collect();
        let old = self.tunnel.replace(tunnel);
        self.retiring = old.and_then(|tunnel| {
            let until = now.instant + REJECT_AFTER.checked_sub(tunnel.age()?)?;
            Some(Retiring { tunnel, until })
        });
        gone.retain(|&index| self.indices().all(|kept| kept != index));
        gone
    }

    /// Encrypts and sends an inner packet, or keeps it until the handshake that it starts is complete.
    pub(crate) fn send(&mut self, packet: &[u8], scratch: &mut [u8], now: Now, out: &mut impl Outbound) {
        if self.endpoint.is_none() {
            return;
        }
        let Some(tunnel) = &mut self.tunnel else { return };
        if let Some(retiring) = &mut self.retiring
            && tunnel.age().is_none()
        {
            let result = retiring.tunnel.noise.encapsulate(packet, scratch);
            self.transmit(result, now, out);
            self.initiate(scratch, now, out);
            return;
        }
        let result = tunnel.noise.encapsulate(packet, scratch);
        self.transmit(result, now, out);
    }

    /// Begins a handshake unless one is under way.
    pub(crate) fn initiate(&mut self, scratch: &mut [u8], now: Now, out: &mut impl Outbound) {
        if self.endpoint.is_none() {
            return;
        }
        let Some(tunnel) = &mut self.tunnel else { return };
        let result = tunnel.noise.format_handshake_initiation(scratch, false);
        self.transmit(result, now, out);
    }

    /// Begins a handshake if keepalive asks for a session and there is none.
    pub(crate) fn wake(&mut self, scratch: &mut [u8], now: Now, out: &mut impl Outbound) {
        if self.keepalive > 0 && self.tunnel.as_ref().is_some_and(|tunnel| tunnel.age().is_none()) {
            self.initiate(scratch, now, out);
        }
    }

    /// Begins a handshake because the peer cannot, or uses a session that we do not have; seldom, since anybody can send such a packet.
    pub(crate) fn revive(&mut self, scratch: &mut [u8], now: Now, out: &mut impl Outbound) {
        if self
            .last_revival
            .is_some_and(|last| now.instant.saturating_duration_since(last) < REVIVE_EVERY)
        {
            return;
        }
        self.last_revival = Some(now.instant);
        self.initiate(scratch, now, out);
    }

    /// Takes a datagram that names this peer: by its key for a handshake initiation (`index` is `None`), else by one of its indices.
    ///
    /// The inner packet, if there is one, is decrypted into `inner`.
    pub(crate) fn receive<'a>(
        &mut self,
        datagram: &[u8],
        index: Option<u32>,
        from: &Endpoint,
        buffers: (&'a mut [u8], &mut [u8]),
        now: Now,
        out: &mut impl Outbound,
    ) -> Received<'a> {
        let (inner, scratch) = buffers;
        let retiring = self.retiring.as_mut().map(|retiring| &mut retiring.tunnel);
        let tunnel = self
            .tunnel
            .iter_mut()
            .chain(retiring)
            .find(|tunnel| index.is_none_or(|index| index >> 8 == tunnel.index));
        let Some(tunnel) = tunnel else {
            return Received::UnknownSession;
        };
        let confirms = index.is_some() && index == tunnel.unconfirmed;

        let received = match tunnel.noise.decapsulate(None, datagram, inner) {
            TunnResult::WriteToNetwork(answer) => {
                // An answer to an initiation is the response, which still has to be used; the answer to a response is the first packet.
                let responded = answer.starts_with(HANDSHAKE_RESPONSE);
                tunnel.unconfirmed = responded.then(|| sender_index(answer)).flatten();
                self.authenticated(datagram, from, now);
                self.transmit(TunnResult::WriteToNetwork(answer), now, out);
                if !responded {
                    self.complete(scratch, now, out);
                }
                return Received::Handled;
            }
            TunnResult::WriteToTunnelV4(packet, source) => Received::Packet(packet, source.into()),
            TunnResult::WriteToTunnelV6(packet, source) => Received::Packet(packet, source.into()),
            // A cookie reply authenticates nothing but our own message; it moves no endpoint and completes no handshake.
            TunnResult::Done if is_cookie_reply(datagram) => return Received::Handled,
            TunnResult::Done => Received::Handled,
            TunnResult::Err(WireGuardError::NoCurrentSession | WireGuardError::WrongIndex) => {
                return Received::UnknownSession;
            }
            TunnResult::Err(WireGuardError::WrongTai64nTimestamp) => return Received::Stale,
            TunnResult::Err(error) => return Received::Refused(error),
        };
        if confirms {
            tunnel.unconfirmed = None;
        }
        self.authenticated(datagram, from, now);
        if confirms {
            self.complete(scratch, now, out);
        }
        received
    }

    /// Runs the timers: retries, rekeying, keepalives.
    pub(crate) fn tick(&mut self, scratch: &mut [u8], now: Now, out: &mut impl Outbound) {
        let Some(tunnel) = &mut self.tunnel else { return };
        let result = tunnel.noise.update_timers(scratch);
        let has_session = tunnel.age().is_some();
        self.transmit(result, now, out);
        if self.keepalive > 0
            && self.endpoint.is_some()
            && self.silence(now) >= Duration::from_secs(self.keepalive.into())
        {
            if has_session {
                self.send(&[], scratch, now, out);
            } else {
                self.initiate(scratch, now, out);
            }
        }
    }

    /// The index of a retired tunnel that has just come to its end.
    pub(crate) fn retire(&mut self, now: Now) -> Option<u32> {
        let over = |retiring: &mut Retiring| {
            now.instant >= retiring.until || self.tunnel.as_ref().is_none_or(|tunnel| tunnel.age() > Some(SETTLED))
        };
        self.retiring.take_if(over).map(|retiring| retiring.tunnel.index)
    }

    fn silence(&self, now: Now) -> Duration {
        self.last_traversal
            .map_or(Duration::MAX, |last| now.instant.saturating_duration_since(last))
    }

    /// Notes a datagram that only the peer can have made: it is where the datagram came from.
    fn authenticated(&mut self, datagram: &[u8], from: &Endpoint, now: Now) {
        self.rx_bytes += datagram.len() as u64;
        self.last_traversal = Some(now.instant);
        self.endpoint = Some(from.clone());
    }

    /// Notes that both sides have a session now, and sends what has been waiting for it.
    fn complete(&mut self, scratch: &mut [u8], now: Now, out: &mut impl Outbound) {
        self.last_handshake = Some(now.wall);
        for _ in 0..MOST_QUEUED {
            let Some(tunnel) = &mut self.tunnel else { return };
            match tunnel.noise.decapsulate(None, &[], scratch) {
                result @ TunnResult::WriteToNetwork(_) => self.transmit(result, now, out),
                TunnResult::Done
                | TunnResult::Err(_)
                | TunnResult::WriteToTunnelV4(..)
                | TunnResult::WriteToTunnelV6(..) => return,
            }
        }
    }

    fn transmit(&mut self, result: TunnResult<'_>, now: Now, out: &mut impl Outbound) {
        if let TunnResult::WriteToNetwork(datagram) = result
            && let Some(endpoint) = &mut self.endpoint
        {
            out.send(datagram, endpoint);
            self.tx_bytes += datagram.len() as u64;
            self.last_traversal = Some(now.instant);
        }
    }
}

/// A new session this old has proven itself: packets of the old one that were under way have arrived.
const SETTLED: Duration = Duration::from_secs(5);

fn sender_index(response: &[u8]) -> Option<u32> {
    response.get(4..8)?.try_into().ok().map(u32::from_le_bytes)
}

fn is_cookie_reply(datagram: &[u8]) -> bool {
    datagram.first() == Some(&3)
}
