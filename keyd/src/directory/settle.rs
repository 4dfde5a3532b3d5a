//! Decides who holds what, and who is a peer, after something was said.
//!
//! What is said of a node concerns the nodes that claim its key, its addresses or a part of its prefixes, before or after, and whoever else these
//! share a claim with. So that thousands of nodes cost nothing while one of them changes, only those are looked at. Each decision is nevertheless a
//! function of the records and the memory of who was first alone: `tests` compares it with one that looks at everything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use shroud_model::{NodeName, Prefix, PublicKey};

use super::claimants::Claimants;
use super::ranges::Ranges;
use super::verify::Claims;
use super::{Brake, Directory, MAX_OPT_OUTS, Origin, Own, Peer, Problem, Reason, Refused, Snapshot, peer};
use crate::{Excerpt, OptOuts, Unreadable};

/// Who claims what; this node's own claims are not among them.
#[derive(Default)]
pub(super) struct Claimed {
    keys: Claimants<PublicKey>,
    next_keys: Claimants<PublicKey>,
    prefixes: Ranges,
    addresses: Claimants<IpAddr>,
}

/// What may have another holder since the last decision.
#[derive(Default)]
pub(super) struct Unsettled {
    pub(super) keys: BTreeSet<PublicKey>,
    pub(super) prefixes: BTreeSet<Prefix>,
    pub(super) addresses: BTreeSet<IpAddr>,
}

/// What a node is.
enum Standing {
    Peer(Peer),
    Refused(Refused),
    Unknown,
}

/// Claims come and go.
impl Directory {
    /// A node claims all this from now on.
    pub(super) fn claim(&mut self, node: &NodeName, claims: Claims) {
        if let Ok(announcement) = &claims.announcement {
            self.claimed.keys.insert(announcement.public_key, node);
            if let Some(next) = announcement.next_key {
                self.claimed.next_keys.insert(next.public_key, node);
            }
        }
        for prefix in &claims.prefixes {
            self.claimed.prefixes.insert(*prefix, node);
        }
        for address in &claims.addresses {
            self.claimed.addresses.insert(*address, node);
        }
        self.unsettle(node, &claims);
        if !claims.problems.is_empty() {
            self.doubts.insert(node.clone(), claims.problems);
        }
    }

    /// A node claims nothing of this any more.
    pub(super) fn unclaim(&mut self, node: &NodeName, claims: &Claims) {
        if let Ok(announcement) = &claims.announcement {
            self.claimed.keys.remove(announcement.public_key, node);
            if let Some(next) = announcement.next_key {
                self.claimed.next_keys.remove(next.public_key, node);
            }
        }
        for prefix in &claims.prefixes {
            self.claimed.prefixes.remove(*prefix, node);
        }
        for address in &claims.addresses {
            self.claimed.addresses.remove(*address, node);
        }
        self.unsettle(node, claims);
        self.doubts.remove(node);
        self.lost.remove(node);
    }

    fn unsettle(&mut self, node: &NodeName, claims: &Claims) {
        if let Ok(announcement) = &claims.announcement {
            self.unsettled.keys.insert(announcement.public_key);
            self.unsettled
                .keys
                .extend(announcement.next_key.map(|next| next.public_key));
        }
        self.unsettled.keys.extend(self.next_keys.get(node));
        self.unsettled.prefixes.extend(&claims.prefixes);
        self.unsettled.addresses.extend(&claims.addresses);
        self.concerned.insert(node.clone());
    }
}

/// Who holds what.
impl Directory {
    /// Decides who holds what was claimed or set free, and takes note of all whom that concerns.
    pub(super) fn settle(&mut self) {
        // Before the first complete list nobody can be the first.
        if self.origin.is_some() {
            let Unsettled {
                keys,
                prefixes,
                addresses,
            } = std::mem::take(&mut self.unsettled);
            self.settle_keys(keys);
            self.settle_prefixes(&prefixes);
            self.settle_addresses(addresses);
        }
    }

    /// Gives each key that exactly one node claims to that node, unless somebody holds it. A claim on a key to come counts for nothing beside one
    /// on a key in force, or it would cost others more than whoever makes it.
    fn settle_keys(&mut self, mut open: BTreeSet<PublicKey>) {
        while let Some(key) = open.pop_first() {
            let in_force = self.claimed.keys.of(key).to_vec();
            let to_come = self.claimed.next_keys.of(key).to_vec();
            self.concerned.extend(in_force.iter().chain(&to_come).cloned());
            if let Some(holder) = self.holders.get(&key).cloned() {
                if self.next_keys.get(&holder) != Some(&key) || to_come.contains(&holder) {
                    continue;
                }
                if in_force.contains(&holder) {
                    self.next_keys.remove(&holder);
                    open.extend(self.put_in_force(&holder, key));
                    continue;
                }
                if !self.announces(&holder) {
                    continue;
                }
                // It has thought better of it.
                self.next_keys.remove(&holder);
                self.holders.remove(&key);
            }
            if self.local.keys.contains(key) {
                continue;
            }
            match (in_force.as_slice(), to_come.as_slice()) {
                ([sole], _) => {
                    self.holders.insert(key, sole.clone());
                    open.extend(self.put_in_force(sole, key));
                }
                ([], [sole]) => {
                    self.holders.insert(key, sole.clone());
                    let free = match self.next_keys.insert(sole.clone(), key) {
                        Some(old) if self.claimed.keys.of(old).contains(sole) => self.put_in_force(sole, old),
                        old => old.filter(|old| self.holders.remove(old).is_some()),
                    };
                    open.extend(free);
                }
                _ => {}
            }
        }
    }

    /// A node that takes a new key sets its old one free, which may serve another claimer.
    fn put_in_force(&mut self, node: &NodeName, key: PublicKey) -> Option<PublicKey> {
        let old = self.keys.insert(node.clone(), key)?;
        self.holders.remove(&old).map(|_| old)
    }

    /// Whether a node's announcement is believed as far as it stands by itself.
    fn announces(&self, node: &NodeName) -> bool {
        let entry = self.entries.get(node);
        entry.is_some_and(|entry| entry.claims(&self.protected).announcement.is_ok())
    }

    /// Gives each prefix that no other node claims a part of to its node.
    fn settle_prefixes(&mut self, unsettled: &BTreeSet<Prefix>) {
        let mut settled: Option<Prefix> = None;
        for prefix in unsettled {
            if settled.is_none_or(|settled| !settled.covers(*prefix)) {
                let ground = self.claimed.prefixes.widest(*prefix);
                self.settle_ground(ground);
                settled = Some(ground);
            }
        }
    }

    /// The same for all claims that `ground` covers. Nobody may claim a part of it from outside.
    fn settle_ground(&mut self, ground: Prefix) {
        let mut held = Ranges::default();
        for prefix in self.own_prefixes() {
            held.insert(*prefix, &self.local.node);
        }
        let holders = self.prefixes.range(ground..);
        let holders: Vec<(Prefix, NodeName)> = holders
            .take_while(|(prefix, _)| ground.covers(**prefix))
            .map(|(prefix, node)| (*prefix, node.clone()))
            .collect();
        for (prefix, node) in holders {
            if self.claimed.prefixes.has(prefix, &node) && held.other(prefix, &node).is_none() {
                held.insert(prefix, &node);
            } else {
                self.prefixes.remove(&prefix);
            }
        }

        let (mut open, mut lost) = (Vec::new(), Vec::new());
        let mut rivals = Ranges::default();
        for (prefix, node) in self.claimed.prefixes.inside(ground) {
            self.concerned.insert(node.clone());
            if self.prefixes.get(&prefix) == Some(node) {
                continue;
            }
            if held.other(prefix, node).is_some() {
                lost.push((prefix, node.clone()));
            } else {
                rivals.insert(prefix, node);
                open.push((prefix, node.clone()));
            }
        }
        let mut reasons: BTreeMap<(NodeName, Prefix), Reason> = BTreeMap::new();
        for (prefix, node) in open {
            if let Some(rival) = rivals.other(prefix, &node).cloned() {
                reasons.insert((node, prefix), Reason::PrefixContested { prefix, rival });
            } else {
                held.insert(prefix, &node);
                self.prefixes.insert(prefix, node);
            }
        }
        // Who has just been given a prefix holds it too, and may be the one to name.
        for (prefix, node) in lost {
            if let Some(holder) = held.other(prefix, &node).cloned() {
                reasons.insert((node, prefix), Reason::PrefixHeld { prefix, holder });
            }
        }
        self.take_note_of_lost(ground, reasons);
    }

    /// Replaces why claims on prefixes that `ground` covers are lost.
    fn take_note_of_lost(&mut self, ground: Prefix, reasons: BTreeMap<(NodeName, Prefix), Reason>) {
        for (_, node) in self.claimed.prefixes.inside(ground) {
            let Some(lost) = self.lost.get_mut(node) else { continue };
            lost.retain(|prefix, _| !ground.covers(*prefix));
            if lost.is_empty() {
                self.lost.remove(node);
            }
        }
        for ((node, prefix), reason) in reasons {
            self.lost.entry(node).or_default().insert(prefix, reason);
        }
    }

    /// Gives each underlay address that exactly one node has to that node, unless somebody holds it.
    fn settle_addresses(&mut self, unsettled: BTreeSet<IpAddr>) {
        for address in unsettled {
            let claimants = self.claimed.addresses.of(address);
            self.concerned.extend(claimants.iter().cloned());
            let holder = self.addresses.get(&address);
            if let [sole] = claimants {
                self.addresses.insert(address, sole.clone());
            } else if holder.is_some_and(|holder| !claimants.contains(holder)) {
                self.addresses.remove(&address);
            }
        }
    }
}

/// Who is a peer.
impl Directory {
    /// Makes the snapshot anew where somebody is concerned by what was settled.
    pub(super) fn conclude(&mut self) {
        let Some(origin) = self.origin else { return };
        let (mut peers, mut refused) = match &self.snapshot {
            Some(known) => (known.peers.clone(), known.refused.clone()),
            None => (BTreeMap::new(), BTreeMap::new()),
        };
        for node in std::mem::take(&mut self.concerned) {
            match self.standing(&node) {
                Standing::Peer(peer) => {
                    refused.remove(&node);
                    // Whoever has the earlier snapshot sees by the pointer who has not changed.
                    if peers.get(&node).is_none_or(|known| **known != peer) {
                        peers.insert(node, Arc::new(peer));
                    }
                }
                Standing::Refused(refusal) => {
                    peers.remove(&node);
                    refused.insert(node, refusal);
                }
                Standing::Unknown => {
                    peers.remove(&node);
                    refused.remove(&node);
                }
            }
        }
        let own = self.own();
        let (opted_out, doubtful) = self.settle_opt_outs(&own, &peers);
        let snapshot = Snapshot {
            origin,
            own,
            peers,
            refused,
            opted_out,
            problems: self.problems(doubtful),
        };
        if self.snapshot.as_deref() != Some(&snapshot) {
            self.snapshot = Some(Arc::new(snapshot));
        }
    }

    fn standing(&self, node: &NodeName) -> Standing {
        let Some(entry) = self.entries.get(node) else {
            return self.unread(node);
        };
        let Claims {
            announcement,
            prefixes,
            mut addresses,
            reasons,
            ..
        } = entry.claims(&self.protected);
        let key = announcement.as_ref().ok().map(|announced| announced.public_key);
        let next = announcement.as_ref().ok().and_then(|announced| announced.next_key);
        let keys = key.into_iter().chain(next.map(|next| next.public_key));
        let denied = self.denial(node, keys).map(|(what, remark)| Reason::Denied {
            what,
            remark: Excerpt::of(remark),
        });
        let mut against: Vec<Reason> = denied.into_iter().chain(reasons).collect();
        against.extend(announcement.as_ref().err().cloned());
        against.extend(key.and_then(|key| self.lost_key(node, key)));
        if let Some(lost) = self.lost.get(node) {
            let is_held = |reason: &&Reason| matches!(reason, Reason::PrefixHeld { .. });
            let (held, contested): (Vec<&Reason>, Vec<&Reason>) = lost.values().partition(is_held);
            against.extend(held.into_iter().chain(contested).cloned());
        }
        let is_held = |prefix: &Prefix| self.prefixes.get(prefix) == Some(node);
        let pod_prefixes = prefixes.into_iter().filter(is_held).collect();
        addresses.retain(|address| self.addresses.get(address) == Some(node));
        match announcement {
            Ok(mut announcement) if against.is_empty() => {
                let zone = entry.record.zone.clone();
                announcement
                    .next_key
                    .take_if(|next| self.next_keys.get(node) != Some(&next.public_key));
                Standing::Peer(peer(announcement, pod_prefixes, addresses, zone))
            }
            Ok(_) | Err(_) => {
                let had_a_key = self.keys.contains_key(node) || against != [Reason::NoAnnouncement];
                Standing::Refused(Refused {
                    reasons: against,
                    pod_prefixes,
                    addresses: if had_a_key { addresses } else { Vec::new() },
                })
            }
        }
    }

    /// What a node without a record is: refused, where the source has one that cannot be read.
    fn unread(&self, node: &NodeName) -> Standing {
        let first = Unreadable {
            node: Some(node.clone()),
            reason: String::new(),
        };
        let of_node = self.unreadable.range(first..);
        let last = of_node.take_while(|bad| bad.node.as_ref() == Some(node)).last();
        match last {
            Some(bad) if *node != self.local.node => Standing::Refused(Refused {
                reasons: vec![Reason::Unreadable(bad.reason.clone())],
                pod_prefixes: BTreeSet::new(),
                addresses: Vec::new(),
            }),
            Some(_) | None => Standing::Unknown,
        }
    }

    /// Why a node does not hold the key that it claims.
    fn lost_key(&self, node: &NodeName, key: PublicKey) -> Option<Reason> {
        match self.holders.get(&key) {
            Some(holder) if holder == node => None,
            Some(holder) => Some(Reason::KeyHeld {
                key,
                holder: holder.clone(),
            }),
            None if self.local.keys.contains(key) => Some(Reason::OwnKey),
            None => {
                let rival = self.claimed.keys.other(key, node).unwrap_or(node).clone();
                Some(Reason::KeyContested { key, rival })
            }
        }
    }

    /// Who of those that opt out may, and what is wrong with the others. The pods of a node that is refused are nobody's.
    fn settle_opt_outs(&self, own: &Own, peers: &BTreeMap<NodeName, Arc<Peer>>) -> (Option<OptOuts>, Vec<Problem>) {
        let Some(claimed) = &self.opted_out else {
            return (None, Vec::new());
        };
        let (mut opted_out, mut problems, mut left_out) = (OptOuts::new(), Vec::new(), 0);
        for (&address, claim) in claimed {
            let prefixes = if claim.node == self.local.node {
                &own.pod_prefixes
            } else if let Some(peer) = peers.get(&claim.node) {
                &peer.pod_prefixes
            } else {
                continue;
            };
            if prefixes.iter().any(|prefix| prefix.contains(address)) {
                if opted_out.len() < MAX_OPT_OUTS {
                    opted_out.insert(address, claim.clone());
                } else {
                    left_out += 1;
                }
            } else if self.protected.iter().any(|range| range.contains(address)) {
                problems.push(Problem::OptOut {
                    pod: claim.pod.clone(),
                    node: claim.node.clone(),
                    address,
                });
            }
        }
        if left_out > 0 {
            problems.push(Problem::TooManyOptOuts(left_out));
        }
        (Some(opted_out), problems)
    }

    /// What wants a look, in a fixed order.
    fn problems(&self, doubtful: Vec<Problem>) -> Vec<Problem> {
        let of_records = self.doubts.values().flatten().cloned();
        let contested = self.claimed.addresses.contested().map(|(address, nodes)| {
            let holder = self.addresses.get(&address).cloned();
            let unused = nodes.iter().filter(|node| Some(*node) != holder.as_ref());
            Problem::Address {
                address,
                unused: unused.cloned().collect(),
                holder,
            }
        });
        let lost_next = self.claimed.next_keys.all().filter_map(|(key, node)| {
            let holder = self.holders.get(&key);
            (holder != Some(node)).then(|| Problem::NextKey {
                node: node.clone(),
                key,
                holder: holder.cloned(),
            })
        });
        let mut problems: BTreeSet<Problem> = of_records.chain(contested).chain(lost_next).chain(doubtful).collect();
        for Unreadable { node, reason } in &self.unreadable {
            problems.insert(Problem::Unreadable {
                node: node.clone(),
                reason: reason.clone(),
            });
        }
        if let Some(Brake { missing, known, .. }) = &self.brake {
            problems.insert(Problem::Brake {
                missing: missing.clone(),
                known: *known,
            });
        }
        if self.left_out > 0 {
            problems.insert(Problem::TooManyNodes(self.left_out));
        }
        if self.origin == Some(Origin::Source) {
            problems.extend(self.own_problems());
        }
        let denied = self.denial(&self.local.node, self.local.keys.iter());
        problems.extend(denied.map(|(what, _)| Problem::LocalDenied(what)));
        problems.into_iter().collect()
    }
}

#[cfg(test)]
mod tests;
