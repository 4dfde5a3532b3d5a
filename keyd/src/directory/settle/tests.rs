//! Settling by difference against settling from scratch, over histories in which claims collide all the time.

use std::num::NonZeroU16;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::announcement::{AnnouncedKey, Backend, EncryptScope, Mode};
use crate::{Announcement, Event, Local, Memory, PublicKeys, Record};

/// Who holds what, and who is what, by one look at all records and at what was held before.
#[derive(Debug, PartialEq)]
struct Outcome {
    keys: BTreeMap<NodeName, PublicKey>,
    next_keys: BTreeMap<NodeName, PublicKey>,
    prefixes: BTreeMap<Prefix, NodeName>,
    addresses: BTreeMap<IpAddr, NodeName>,
    peers: BTreeMap<NodeName, Arc<Peer>>,
    refused: BTreeMap<NodeName, Refused>,
    problems: Vec<Problem>,
}

impl Outcome {
    /// What settling by difference made of it.
    fn of(directory: &Directory) -> Self {
        let snapshot = directory.snapshot().expect("there was a list");
        Self {
            keys: directory.keys.clone(),
            next_keys: directory.next_keys.clone(),
            prefixes: directory.prefixes.clone(),
            addresses: directory.addresses.clone(),
            peers: snapshot.peers.clone(),
            refused: snapshot.refused.clone(),
            problems: snapshot.problems.clone(),
        }
    }

    /// What it should have made of it. `before` is what was held until then.
    fn from_scratch(directory: &Directory, before: Memory) -> Self {
        let entries = directory.entries.iter();
        let claims: BTreeMap<&NodeName, Claims> = entries
            .map(|(node, entry)| (node, entry.claims(&directory.protected)))
            .collect();
        let mut reasons: BTreeMap<NodeName, Vec<Reason>> = BTreeMap::new();
        for (node, claims) in &claims {
            let denied = directory
                .denial(node, claimed_keys(claims))
                .map(|(what, remark)| Reason::Denied {
                    what,
                    remark: Excerpt::of(remark),
                });
            let against = reasons.entry((*node).clone()).or_default();
            against.extend(denied);
            against.extend(claims.reasons.iter().cloned());
            against.extend(claims.announcement.as_ref().err().cloned());
        }
        let Held {
            keys,
            next_keys,
            lost: lost_keys,
            unused,
        } = keys(directory, &claims, before.keys, before.next_keys);
        let (prefixes, lost_prefixes) = prefixes(directory, &claims, before.prefixes);
        let (addresses, contested) = addresses(&claims, before.addresses);
        for (node, reason) in lost_keys.into_iter().chain(lost_prefixes) {
            reasons.entry(node).or_default().push(reason);
        }

        let (mut peers, mut refused) = (BTreeMap::new(), BTreeMap::new());
        let mut problems: BTreeSet<Problem> = contested.into_iter().chain(unused).collect();
        for (node, claims) in claims {
            problems.extend(claims.problems);
            let of_node = prefixes.iter().filter(|(_, holder)| *holder == node);
            let pod_prefixes: BTreeSet<Prefix> = of_node.map(|(prefix, _)| *prefix).collect();
            let mut held_addresses = claims.addresses;
            held_addresses.retain(|address| addresses.get(address) == Some(node));
            let reasons = reasons.remove(node).unwrap_or_default();
            match claims.announcement {
                Ok(mut announcement) if reasons.is_empty() => {
                    announcement
                        .next_key
                        .take_if(|next| next_keys.get(node) != Some(&next.public_key));
                    let peer = peer(announcement, pod_prefixes, held_addresses, None);
                    peers.insert(node.clone(), Arc::new(peer));
                }
                Ok(_) | Err(_) => {
                    let had_a_key = keys.contains_key(node) || reasons != [Reason::NoAnnouncement];
                    let refusal = Refused {
                        reasons,
                        pod_prefixes,
                        addresses: if had_a_key { held_addresses } else { Vec::new() },
                    };
                    refused.insert(node.clone(), refusal);
                }
            }
        }
        for bad in &directory.unreadable {
            let Some(node) = &bad.node else { continue };
            problems.insert(Problem::Unreadable {
                node: Some(node.clone()),
                reason: bad.reason.clone(),
            });
            if *node != directory.local.node && !directory.entries.contains_key(node) {
                let refusal = Refused {
                    reasons: vec![Reason::Unreadable(bad.reason.clone())],
                    pod_prefixes: BTreeSet::new(),
                    addresses: Vec::new(),
                };
                refused.insert(node.clone(), refusal);
            }
        }
        Self {
            keys,
            next_keys,
            prefixes,
            addresses,
            peers,
            refused,
            problems: problems.into_iter().collect(),
        }
    }
}

type Lost = Vec<(NodeName, Reason)>;

/// Who holds which key, who lost one in force, and whose key to come is not used.
struct Held {
    keys: BTreeMap<NodeName, PublicKey>,
    next_keys: BTreeMap<NodeName, PublicKey>,
    lost: Lost,
    unused: Vec<Problem>,
}

fn in_force(claims: &Claims) -> Option<PublicKey> {
    Some(claims.announcement.as_ref().ok()?.public_key)
}

fn to_come(claims: &Claims) -> Option<PublicKey> {
    Some(claims.announcement.as_ref().ok()?.next_key?.public_key)
}

fn claimed_keys(claims: &Claims) -> impl Iterator<Item = PublicKey> {
    in_force(claims).into_iter().chain(to_come(claims))
}

fn keys(
    directory: &Directory,
    claims: &BTreeMap<&NodeName, Claims>,
    mut keys: BTreeMap<NodeName, PublicKey>,
    mut next_keys: BTreeMap<NodeName, PublicKey>,
) -> Held {
    let is_own = |key| directory.local.keys.contains(key);
    let mut holders: BTreeMap<PublicKey, NodeName> = BTreeMap::new();
    for held in [&mut keys, &mut next_keys] {
        held.retain(|node, key| {
            let kept = claims.contains_key(node) && !is_own(*key) && !holders.contains_key(key);
            if kept {
                holders.insert(*key, node.clone());
            }
            kept
        });
    }
    let in_force_of = |wanted| {
        claims
            .values()
            .filter(move |claims| in_force(claims) == Some(wanted))
            .count()
    };
    let to_come_of = |wanted| {
        claims
            .values()
            .filter(move |claims| to_come(claims) == Some(wanted))
            .count()
    };
    // Each round serves somebody for good, or sets something free for good.
    loop {
        let before = (keys.clone(), next_keys.clone());
        for (node, claims) in claims {
            let Some(key) = in_force(claims) else { continue };
            let is_sole = in_force_of(key) == 1;
            let held_to_come = next_keys.get(*node) == Some(&key);
            if held_to_come || (is_sole && !is_own(key) && !holders.contains_key(&key)) {
                if held_to_come {
                    next_keys.remove(*node);
                }
                if let Some(old) = keys.insert((*node).clone(), key) {
                    holders.remove(&old);
                }
                holders.insert(key, (*node).clone());
            }
            let next = to_come(claims);
            if let Some(old) = next_keys.get(*node).copied().filter(|old| next != Some(*old)) {
                next_keys.remove(*node);
                holders.remove(&old);
            }
            if let Some(next) = next
                && (in_force_of(next), to_come_of(next)) == (0, 1)
                && !is_own(next)
                && !holders.contains_key(&next)
            {
                next_keys.insert((*node).clone(), next);
                holders.insert(next, (*node).clone());
            }
        }
        if before == (keys.clone(), next_keys.clone()) {
            break;
        }
    }
    let rival = |key: PublicKey, node: &NodeName| {
        let mut others = claims.iter().filter(|(other, _)| **other != node);
        let other = others.find(|(_, claims)| in_force(claims) == Some(key));
        other.map_or(node, |(other, _)| other).clone()
    };
    let (mut lost, mut unused) = (Lost::new(), Vec::new());
    for (node, claims) in claims {
        let node = *node;
        let held_by = |key| holders.get(&key).filter(|holder| *holder != node);
        if let Some(key) = in_force(claims).filter(|key| holders.get(key) != Some(node)) {
            let reason = match held_by(key) {
                Some(holder) => Reason::KeyHeld {
                    key,
                    holder: holder.clone(),
                },
                None if is_own(key) => Reason::OwnKey,
                None => Reason::KeyContested {
                    key,
                    rival: rival(key, node),
                },
            };
            lost.push((node.clone(), reason));
        }
        if let Some(key) = to_come(claims).filter(|key| holders.get(key) != Some(node)) {
            unused.push(Problem::NextKey {
                node: node.clone(),
                key,
                holder: holders.get(&key).cloned(),
            });
        }
    }
    Held {
        keys,
        next_keys,
        lost,
        unused,
    }
}

fn prefixes(
    directory: &Directory,
    claims: &BTreeMap<&NodeName, Claims>,
    mut prefixes: BTreeMap<Prefix, NodeName>,
) -> (BTreeMap<Prefix, NodeName>, Lost) {
    let mut held = Ranges::default();
    for prefix in directory.own().pod_prefixes {
        held.insert(prefix, &directory.local.node);
    }
    prefixes.retain(|&prefix, node| {
        let claims = claims.get(node).is_some_and(|claims| claims.prefixes.contains(&prefix));
        let kept = claims && held.other(prefix, node).is_none();
        if kept {
            held.insert(prefix, node);
        }
        kept
    });
    let (mut open, mut late) = (Vec::new(), Vec::new());
    let mut rivals = Ranges::default();
    for (node, claims) in claims {
        for &prefix in &claims.prefixes {
            if prefixes.get(&prefix) == Some(node) {
                continue;
            }
            if held.other(prefix, node).is_some() {
                late.push((prefix, *node));
            } else {
                rivals.insert(prefix, node);
                open.push((prefix, *node));
            }
        }
    }
    let mut contested = Vec::new();
    for (prefix, node) in open {
        if let Some(rival) = rivals.other(prefix, node).cloned() {
            contested.push((node.clone(), Reason::PrefixContested { prefix, rival }));
        } else {
            prefixes.insert(prefix, node.clone());
            held.insert(prefix, node);
        }
    }
    let late = late.into_iter().map(|(prefix, node)| {
        let holder = held.other(prefix, node).expect("it was lost to somebody").clone();
        (node.clone(), Reason::PrefixHeld { prefix, holder })
    });
    let lost = late.chain(contested).collect();
    (prefixes, lost)
}

fn addresses(
    claims: &BTreeMap<&NodeName, Claims>,
    mut addresses: BTreeMap<IpAddr, NodeName>,
) -> (BTreeMap<IpAddr, NodeName>, Vec<Problem>) {
    let mut claimants: BTreeMap<IpAddr, BTreeSet<NodeName>> = BTreeMap::new();
    for (node, claims) in claims {
        for &address in &claims.addresses {
            claimants.entry(address).or_default().insert((*node).clone());
        }
    }
    addresses.retain(|address, node| claimants.get(address).is_some_and(|nodes| nodes.contains(node)));
    let mut problems = Vec::new();
    for (address, mut nodes) in claimants {
        if nodes.len() == 1 {
            addresses.extend(nodes.into_iter().map(|node| (address, node)));
            continue;
        }
        let holder = addresses.get(&address).cloned();
        if let Some(holder) = &holder {
            nodes.remove(holder);
        }
        problems.push(Problem::Address {
            address,
            holder,
            unused: nodes,
        });
    }
    (addresses, problems)
}

#[derive(Debug, Clone)]
enum Step {
    Event(Event),
    /// A restart, and who held what is not what it was.
    Restart {
        keys: BTreeMap<NodeName, PublicKey>,
        next_keys: BTreeMap<NodeName, PublicKey>,
        prefixes: BTreeMap<Prefix, NodeName>,
        addresses: BTreeMap<IpAddr, NodeName>,
    },
}

fn name() -> impl Strategy<Value = NodeName> {
    prop::sample::select(vec!["a", "b", "c", "d", "me"]).prop_map(|text| text.parse().unwrap())
}

fn key() -> impl Strategy<Value = PublicKey> {
    (1u8..6).prop_map(|seed| PublicKey::from_bytes([seed; 32]).unwrap())
}

fn prefix() -> impl Strategy<Value = Prefix> {
    (0u8..4, prop::sample::select(vec![0u8, 64, 128]), 21u8..=26)
        .prop_map(|(third, last, length)| Prefix::containing([10, 244, third, last].into(), length).unwrap())
}

fn address() -> impl Strategy<Value = IpAddr> {
    (2u8..6).prop_map(|last| [172, 18, 0, last].into())
}

prop_compose! {
    fn record()(
        node in name(), addresses in vec(address(), 0..3), pod_prefixes in vec(prefix(), 0..3), key in option::weighted(0.9, key()), next in option::weighted(0.4, key()),
        epoch in 0u64..3, unusable in prop::bool::weighted(0.2),
    ) -> Record {
        let endpoints = addresses.iter().map(|address| (*address, if unusable { 0 } else { 51820 }).into());
        let announcement = key.map(|public_key| Announcement {
            public_key,
            listen_port: NonZeroU16::MAX,
            endpoints: endpoints.collect(),
            epoch,
            next_key: next.filter(|next| *next != public_key).map(|public_key| AnnouncedKey { public_key, epoch: epoch + 1 }),
            backend: Backend::Userspace,
            mode: Mode::Native,
            overlays: Vec::new(),
            routable: false,
            encrypts_nodes: false,
            scope: EncryptScope::All,
        });
        Record { node, addresses, pod_prefixes, zone: None, announcement: announcement.map(|announced| announced.to_json()) }
    }
}

fn entry() -> impl Strategy<Value = Result<Record, Unreadable>> {
    let torn = |node| Unreadable {
        node: Some(node),
        reason: "torn".to_owned(),
    };
    prop_oneof![9 => record().prop_map(Ok), 1 => name().prop_map(move |node| Err(torn(node)))]
}

fn step() -> impl Strategy<Value = Step> {
    let denied = btree_map(name().prop_map(|node| node.to_string()), Just(String::new()), 0..2);
    let event = prop_oneof![
        6 => entry().prop_map(Event::Applied),
        2 => name().prop_map(Event::Deleted),
        2 => vec(entry(), 0..6).prop_map(Event::Listed),
        1 => denied.prop_map(Event::Denied),
    ];
    let held = (
        btree_map(name(), key(), 0..4),
        btree_map(name(), key(), 0..3),
        btree_map(prefix(), name(), 0..4),
        btree_map(address(), name(), 0..4),
    );
    let restart = held.prop_map(|(keys, next_keys, prefixes, addresses)| Step::Restart {
        keys,
        next_keys,
        prefixes,
        addresses,
    });
    prop_oneof![12 => event.prop_map(Step::Event), 1 => restart]
}

/// Only what is compared: the rest does not depend on claims.
fn is_compared(problem: &Problem) -> bool {
    matches!(
        problem,
        Problem::Address { .. } | Problem::Endpoint { .. } | Problem::NextKey { .. } | Problem::Unreadable { .. }
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn who_is_concerned_is_enough(configured: bool, steps in vec(step(), 1..24)) {
        let local = Local {
            node: "me".parse().unwrap(),
            keys: PublicKeys::only(PublicKey::from_bytes([1; 32]).unwrap(), 1),
            pod_prefixes: configured.then(|| BTreeSet::from(["10.244.0.0/24".parse().unwrap()])),
        };
        let empty = || Directory::new(local.clone(), BTreeSet::from(["10.244.0.0/16".parse().unwrap()]));
        let mut directory = empty();
        directory.reset(Vec::new());

        for step in steps {
            let mut before = directory.memory();
            match step.clone() {
                Step::Event(event) => drop(directory.take([event])),
                Step::Restart { keys, next_keys, prefixes, addresses } => {
                    before = Memory { keys, next_keys, prefixes, addresses, ..before };
                    directory = empty();
                    directory.restore(before.clone());
                }
            }

            let mut outcome = Outcome::of(&directory);
            outcome.problems.retain(is_compared);
            prop_assert_eq!(outcome, Outcome::from_scratch(&directory, before), "after {:?}", step);
        }
    }
}
