//! The difference between what the device should be and what it is, peer by peer.

mod plans;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use shroud_model::{Mark, Prefix, PresharedKey, PublicKey};

use crate::{Backend, Desired, Device, Observed, ObservedPeer, Peer};

pub use self::plans::diff_plans;

/// How long a handshake proves that a peer's endpoint is right: WireGuard refuses to use a session longer than this (whitepaper §6.1,
/// Reject-After-Time), so until then it has sent or heard something from there.
pub const FRESH: Duration = Duration::from_secs(180);

/// One step from what is to what should be. It holds no secret; its text is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Ends a device of the other backend.
    RemoveDevice {
        /// Its backend.
        backend: Backend,
    },
    /// Makes the device, and starts its process where it has one.
    CreateDevice {
        /// Its backend.
        backend: Backend,
    },
    /// Sets the mark of the device's own packets.
    SetMark {
        /// Now.
        old: u32,
        /// To be.
        new: Mark,
    },
    /// Sets the UDP port.
    SetListenPort {
        /// Now.
        old: u16,
        /// To be.
        new: u16,
    },
    /// Sets the private key.
    SetPrivateKey {
        /// The public key now.
        old: Option<PublicKey>,
        /// The public key to be.
        new: PublicKey,
    },
    /// Adds a peer with all that belongs to it. Ranges of other peers move to it.
    AddPeer {
        /// The peer.
        peer: PublicKey,
        /// Where it is.
        endpoint: Option<SocketAddr>,
        /// Its ranges.
        allowed_ips: BTreeSet<Prefix>,
    },
    /// Gives ranges to a peer. Those of other peers move to it, at once and without a gap.
    AddAllowedIps {
        /// The peer.
        peer: PublicKey,
        /// The ranges.
        allowed_ips: BTreeSet<Prefix>,
    },
    /// Sets where a peer is.
    SetEndpoint {
        /// The peer.
        peer: PublicKey,
        /// Now.
        old: Option<SocketAddr>,
        /// To be.
        new: SocketAddr,
    },
    /// Sets or clears the secret shared with a peer.
    SetPresharedKey {
        /// The peer.
        peer: PublicKey,
        /// Whether there is one now.
        old: bool,
        /// Whether there is one to be.
        new: bool,
    },
    /// Sets how often something is sent to a peer at least.
    SetKeepalive {
        /// The peer.
        peer: PublicKey,
        /// Now.
        old: Option<Duration>,
        /// To be.
        new: Option<Duration>,
    },
    /// Takes ranges from a peer that nobody has any more, and leaves its others alone.
    RemoveAllowedIps {
        /// The peer.
        peer: PublicKey,
        /// The ranges.
        allowed_ips: BTreeSet<Prefix>,
    },
    /// Removes a peer.
    RemovePeer {
        /// The peer.
        peer: PublicKey,
    },
}

impl Change {
    /// Whether this is about a peer, and not about the device.
    pub(crate) fn is_of_a_peer(&self) -> bool {
        match self {
            Self::RemoveDevice { .. }
            | Self::CreateDevice { .. }
            | Self::SetMark { .. }
            | Self::SetListenPort { .. }
            | Self::SetPrivateKey { .. } => false,
            Self::AddPeer { .. }
            | Self::AddAllowedIps { .. }
            | Self::SetEndpoint { .. }
            | Self::SetPresharedKey { .. }
            | Self::SetKeepalive { .. }
            | Self::RemoveAllowedIps { .. }
            | Self::RemovePeer { .. } => true,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
        let yes = |has: bool| if has { "set" } else { "none" };
        match self {
            Self::RemoveDevice { backend } => write!(f, "{backend} device: removed"),
            Self::CreateDevice { backend } => write!(f, "{backend} device: created"),
            Self::SetMark { old, new } => write!(f, "mark {old:#x} -> {:#x}", new.value()),
            Self::SetListenPort { old, new } => write!(f, "listen port {old} -> {new}"),
            Self::SetPrivateKey { old, new } => {
                write!(
                    f,
                    "key {} -> {}",
                    or_none(old.map(|key| key.fingerprint())),
                    new.fingerprint()
                )
            }
            Self::AddPeer {
                peer,
                endpoint,
                allowed_ips,
            } => {
                let endpoint = or_none(endpoint.map(|endpoint| endpoint.to_string()));
                write!(
                    f,
                    "peer {}: added, endpoint {endpoint}, allowed IPs {}",
                    peer.fingerprint(),
                    list(allowed_ips)
                )
            }
            Self::AddAllowedIps { peer, allowed_ips } => {
                write!(
                    f,
                    "peer {}: allowed IPs {} added",
                    peer.fingerprint(),
                    list(allowed_ips)
                )
            }
            Self::SetEndpoint { peer, old, new } => {
                let old = or_none(old.map(|endpoint| endpoint.to_string()));
                write!(f, "peer {}: endpoint {old} -> {new}", peer.fingerprint())
            }
            Self::SetPresharedKey { peer, old, new } => {
                write!(
                    f,
                    "peer {}: preshared key {} -> {}",
                    peer.fingerprint(),
                    yes(*old),
                    yes(*new)
                )
            }
            Self::SetKeepalive { peer, old, new } => {
                let text =
                    |keepalive: &Option<Duration>| or_none(keepalive.map(|every| format!("{} s", every.as_secs())));
                write!(
                    f,
                    "peer {}: keepalive {} -> {}",
                    peer.fingerprint(),
                    text(old),
                    text(new)
                )
            }
            Self::RemoveAllowedIps { peer, allowed_ips } => {
                write!(
                    f,
                    "peer {}: allowed IPs {} removed",
                    peer.fingerprint(),
                    list(allowed_ips)
                )
            }
            Self::RemovePeer { peer } => write!(f, "peer {}: removed", peer.fingerprint()),
        }
    }
}

fn list(prefixes: &BTreeSet<Prefix>) -> String {
    let texts: Vec<String> = prefixes.iter().map(Prefix::to_string).collect();
    if texts.is_empty() {
        "none".to_owned()
    } else {
        texts.join(" ")
    }
}

/// The steps from `observed` to `desired`, in the order in which they must happen. Empty when nothing is to be done.
///
/// Ranges are given before any are taken, so that one that has an owner before and after has one all the time. A peer's endpoint is left
/// alone while its last handshake is younger than [`FRESH`]: WireGuard then knows better where the peer is (it roams) than the directory.
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Change> {
    let mut changes = Vec::new();
    let blank = Device {
        backend: desired.backend,
        public_key: None,
        listen_port: 0,
        mark: 0,
        peers: BTreeMap::new(),
    };
    let device = match &observed.device {
        Some(device) if device.backend == desired.backend => device,
        other => {
            changes.extend(other.as_ref().map(|device| Change::RemoveDevice {
                backend: device.backend,
            }));
            changes.push(Change::CreateDevice {
                backend: desired.backend,
            });
            &blank
        }
    };
    // The mark goes first: without it the gate takes the device's own packets for strangers'.
    if device.mark != desired.mark.value() {
        changes.push(Change::SetMark {
            old: device.mark,
            new: desired.mark,
        });
    }
    if device.listen_port != desired.listen_port {
        changes.push(Change::SetListenPort {
            old: device.listen_port,
            new: desired.listen_port,
        });
    }
    if device.public_key != Some(desired.public_key) {
        changes.push(Change::SetPrivateKey {
            old: device.public_key,
            new: desired.public_key,
        });
    }
    diff_peers(desired, device, observed.at, &mut changes);
    changes
}

fn diff_peers(desired: &Desired, device: &Device, now: SystemTime, changes: &mut Vec<Change>) {
    let peers = || desired.peers.iter().filter(|(key, _)| **key != desired.public_key);
    let owners = Owners::new(peers());

    // Both sides are sorted by key: one walk over them, since thousands of look-ups are what a pass without a change would consist of.
    let mut observed = device.peers.iter().peekable();
    let mut known = Vec::with_capacity(desired.peers.len());
    let mut surplus = Vec::new();
    for (key, peer) in peers() {
        while let Some((found, _)) = observed.next_if(|(found, _)| *found < key) {
            surplus.push(*found);
        }
        match observed.next_if(|(found, _)| *found == key) {
            None => changes.push(Change::AddPeer {
                peer: *key,
                endpoint: peer.endpoint,
                allowed_ips: owners.ranges(key, peer).collect(),
            }),
            Some((_, found)) => {
                diff_peer(*key, peer, &owners, found, now, changes);
                known.push((key, peer, found));
            }
        }
    }
    surplus.extend(observed.map(|(found, _)| *found));

    for (key, peer, found) in known {
        let orphaned: BTreeSet<Prefix> = found
            .allowed_ips
            .iter()
            .filter(|prefix| !peer.allowed_ips.contains(prefix) && !owners.contains(prefix))
            .copied()
            .collect();
        if !orphaned.is_empty() {
            changes.push(Change::RemoveAllowedIps {
                peer: *key,
                allowed_ips: orphaned,
            });
        }
    }
    changes.extend(surplus.into_iter().map(|peer| Change::RemovePeer { peer }));
}

/// Which peer has a range. Of several that are to have the same one, the first by key has it.
struct Owners<'a> {
    /// Sorted by prefix.
    all: Vec<Prefix>,
    /// What a peer is to have, but another one has; hardly ever anything.
    lost: BTreeSet<(&'a PublicKey, Prefix)>,
}

impl<'a> Owners<'a> {
    fn new(peers: impl Iterator<Item = (&'a PublicKey, &'a Peer)> + Clone) -> Self {
        let mut all: Vec<Prefix> = peers.clone().flat_map(|(_, peer)| &peer.allowed_ips).copied().collect();
        all.sort_unstable();
        let contested: BTreeSet<Prefix> = all
            .windows(2)
            .filter(|pair| pair[0] == pair[1])
            .map(|pair| pair[0])
            .collect();
        let mut lost = BTreeSet::new();
        let mut taken = BTreeSet::new();
        if !contested.is_empty() {
            for (key, peer) in peers {
                let claims = peer.allowed_ips.intersection(&contested);
                lost.extend(
                    claims
                        .filter(|prefix| !taken.insert(**prefix))
                        .map(|prefix| (key, *prefix)),
                );
            }
        }
        Self { all, lost }
    }

    /// The ranges that a peer really is to have.
    fn ranges(&self, key: &PublicKey, peer: &Peer) -> impl Iterator<Item = Prefix> {
        let kept = |prefix: &&Prefix| self.lost.is_empty() || !self.lost.contains(&(key, **prefix));
        peer.allowed_ips.iter().filter(kept).copied()
    }

    fn contains(&self, prefix: &Prefix) -> bool {
        self.all.binary_search(prefix).is_ok()
    }
}

fn diff_peer(
    key: PublicKey,
    peer: &Peer,
    owners: &Owners<'_>,
    found: &ObservedPeer,
    now: SystemTime,
    changes: &mut Vec<Change>,
) {
    let secret = |key: &Option<std::sync::Arc<PresharedKey>>| key.as_ref().map(|key| key.expose().to_owned());
    if secret(&peer.preshared_key).map(zeroize::Zeroizing::new)
        != secret(&found.preshared_key).map(zeroize::Zeroizing::new)
    {
        changes.push(Change::SetPresharedKey {
            peer: key,
            old: found.has_preshared_key(),
            new: peer.preshared_key.is_some(),
        });
    }
    if let Some(new) = peer.endpoint
        && found.endpoint != Some(new)
        && (found.endpoint.is_none() || !is_fresh(found.last_handshake, now))
    {
        changes.push(Change::SetEndpoint {
            peer: key,
            old: found.endpoint,
            new,
        });
    }
    let keepalive = seconds(peer.keepalive).map(|seconds| Duration::from_secs(u64::from(seconds)));
    if keepalive != found.keepalive {
        changes.push(Change::SetKeepalive {
            peer: key,
            old: found.keepalive,
            new: keepalive,
        });
    }
    let missing: BTreeSet<Prefix> = owners
        .ranges(&key, peer)
        .filter(|prefix| !found.allowed_ips.contains(prefix))
        .collect();
    if !missing.is_empty() {
        changes.push(Change::AddAllowedIps {
            peer: key,
            allowed_ips: missing,
        });
    }
}

/// A handshake from the future (the clock was set back) is no proof of anything.
fn is_fresh(last_handshake: Option<SystemTime>, now: SystemTime) -> bool {
    last_handshake
        .and_then(|at| now.duration_since(at).ok())
        .is_some_and(|age| age < FRESH)
}

/// A keepalive in WireGuard's unit; less than a second becomes one, more than 65535 becomes that.
pub(crate) fn seconds(keepalive: Option<Duration>) -> Option<u16> {
    keepalive.map(|every| u16::try_from(every.as_secs().max(1)).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests;
