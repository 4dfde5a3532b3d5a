//! The difference between two plans, for whoever knows that the device is as the earlier one wanted it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shroud_model::{Prefix, PublicKey};

use super::{Change, diff, seconds};
use crate::{Desired, Device, Observed, ObservedPeer, Peer};

/// The steps from what `before` wanted to `desired`: what [`diff`] finds on a device that is as `before` wanted it, without a look at the peers that
/// are wanted as before. `None` where only the device can tell: it is to be another one, a peer's endpoint moves (WireGuard may know better), or a
/// range that is wanted by several is concerned.
pub fn diff_plans(desired: &Desired, before: &Desired) -> Option<Vec<Change>> {
    let device = |plan: &Desired| (plan.backend, plan.public_key, plan.listen_port, plan.mark);
    if device(desired) != device(before) || desired.device != before.device {
        return None;
    }
    let not_our_own = |(key, _): &(&PublicKey, &Peer)| **key != desired.public_key;
    let mut earlier = before.peers.iter().filter(not_our_own).peekable();
    let (mut wanted, mut had, mut kept) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for (key, peer) in desired.peers.iter().filter(not_our_own) {
        while let Some((gone, old)) = earlier.next_if(|(old, _)| *old < key) {
            had.insert(*gone, old);
        }
        match earlier.next_if(|(old, _)| *old == key) {
            Some((_, old)) if old.endpoint != peer.endpoint => return None,
            Some((_, old)) if is_same(peer, old) => kept.push(peer),
            Some((_, old)) => {
                had.insert(*key, old);
                wanted.insert(*key, peer.clone());
            }
            None => {
                wanted.insert(*key, peer.clone());
            }
        }
    }
    had.extend(earlier.map(|(gone, old)| (*gone, old)));

    let held: Vec<Prefix> = had.values().flat_map(|peer| &peer.allowed_ips).copied().collect();
    let mut concerned: BTreeSet<Prefix> = held.iter().copied().collect();
    if concerned.len() < held.len() {
        return None;
    }
    concerned.extend(wanted.values().flat_map(|peer| &peer.allowed_ips));
    let mut others = kept.into_iter().flat_map(|peer| &peer.allowed_ips);
    if others.any(|range| concerned.contains(range)) {
        return None;
    }
    Some(diff(&with_peers(desired, wanted), &as_wanted(before, had)))
}

fn is_same(peer: &Peer, old: &Peer) -> bool {
    let same_secret = match (&peer.preshared_key, &old.preshared_key) {
        (None, None) => true,
        (Some(secret), Some(old)) => Arc::ptr_eq(secret, old),
        (None, Some(_)) | (Some(_), None) => false,
    };
    same_secret && peer.keepalive == old.keepalive && peer.allowed_ips == old.allowed_ips
}

fn with_peers(plan: &Desired, peers: BTreeMap<PublicKey, Peer>) -> Desired {
    Desired {
        device: plan.device.clone(),
        backend: plan.backend,
        private_key: Arc::clone(&plan.private_key),
        public_key: plan.public_key,
        listen_port: plan.listen_port,
        mark: plan.mark,
        peers,
    }
}

/// The device with these peers, as the plan wanted it. The moment does not matter: no endpoint is compared.
fn as_wanted(plan: &Desired, peers: BTreeMap<PublicKey, &Peer>) -> Observed {
    let found = |peer: &Peer| ObservedPeer {
        endpoint: peer.endpoint,
        allowed_ips: peer.allowed_ips.clone(),
        keepalive: seconds(peer.keepalive).map(|seconds| Duration::from_secs(u64::from(seconds))),
        preshared_key: peer.preshared_key.clone(),
        ..ObservedPeer::default()
    };
    let device = Device {
        backend: plan.backend,
        public_key: Some(plan.public_key),
        listen_port: plan.listen_port,
        mark: plan.mark.value(),
        peers: peers.into_iter().map(|(key, peer)| (key, found(peer))).collect(),
    };
    Observed {
        at: SystemTime::UNIX_EPOCH,
        device: Some(device),
    }
}
