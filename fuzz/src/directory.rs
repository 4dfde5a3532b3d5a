//! What sources say of nodes, in any order, for as long as they like.
//!
//! The bytes are read as a history: lists, changes, deletions, deny lists and restarts over so few names, keys, prefixes and addresses that
//! claims collide all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use shroud_keyd::announcement::{AnnouncedKey, Backend, EncryptScope, Mode};
use shroud_keyd::{Announcement, Directory, Local, Memory, PublicKeys, Reason, Record, Snapshot, Unreadable};
use shroud_model::{NodeName, Prefix, PublicKey};

use super::printable;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "me"];
const OWN_KEY: u8 = 1;
const KEYS: std::ops::RangeInclusive<u8> = OWN_KEY..=6;
const PREFIXES: [&str; 12] = [
    "10.244.0.0/24",
    "10.244.0.0/25",
    "10.244.1.0/24",
    "10.244.1.128/25",
    "10.244.0.0/22",
    "10.244.2.0/24",
    "10.244.3.0/24",
    "fd00:10:244:1::/64",
    "fd00:10:244::/62",
    "10.9.0.0/24",
    "0.0.0.0/0",
    "fd00::/16",
];
const ADDRESSES: [&str; 9] = [
    "172.18.0.2",
    "172.18.0.3",
    "172.18.0.4",
    "fd18::2",
    "::ffff:172.18.0.2",
    "10.244.1.1",
    "127.0.0.1",
    "fe80::1",
    "0.0.0.0",
];
/// In steps. Names and prefixes are so few that a longer history has been everywhere before.
const LONGEST_HISTORY: usize = 48;
const PROTECTED: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// Checks that whatever the history, nobody is given what is another's, and a restart or another order of equal facts changes nothing.
pub fn check(bytes: &[u8]) {
    let mut history = Unstructured::new(bytes);
    // Bytes that end in the middle of a step end the history before it.
    let Ok(given) = history.arbitrary() else { return };
    let mut world = World::new(given);
    for _ in 0..LONGEST_HISTORY {
        if history.is_empty() {
            return;
        }
        let Ok(step) = step(&mut history) else { return };
        world.take(step);
    }
}

type Entry = std::result::Result<Record, Unreadable>;

enum Step {
    Apply(Entry),
    Delete(NodeName),
    Reset(Vec<Entry>),
    Deny(BTreeMap<String, String>),
    Restart,
    /// As a restart, but who held what is not what it was: whatever stands in the cache must do no harm.
    Misremember(Holders),
}

struct Holders {
    keys: BTreeMap<NodeName, PublicKey>,
    prefixes: BTreeMap<Prefix, NodeName>,
    addresses: BTreeMap<IpAddr, NodeName>,
}

/// Two directories that hear the same. One hears each list backwards.
struct World {
    given: bool,
    directory: Directory,
    backwards: Directory,
    denied: BTreeMap<String, String>,
}

impl World {
    /// The directory is the authority for this node's own prefixes if they are `given`.
    fn new(given: bool) -> Self {
        Self {
            given,
            directory: empty(given),
            backwards: empty(given),
            denied: BTreeMap::new(),
        }
    }

    fn take(&mut self, step: Step) {
        let before = self.directory.memory();
        let mut honest = true;
        match step {
            Step::Apply(entry) => {
                self.directory.apply(entry.clone());
                self.backwards.apply(entry);
            }
            Step::Delete(node) => {
                self.directory.delete(&node);
                self.backwards.delete(&node);
            }
            Step::Reset(list) => {
                self.backwards.reset(list.iter().rev().cloned().collect());
                self.directory.reset(list);
            }
            Step::Deny(denied) => {
                self.denied.clone_from(&denied);
                self.directory.deny(denied.clone());
                self.backwards.deny(denied);
            }
            Step::Restart => self.restart(),
            Step::Misremember(holders) => {
                honest = false;
                self.misremember(holders);
            }
        }

        assert_eq!(self.directory.snapshot(), self.backwards.snapshot());
        let after = self.directory.memory();
        assert_eq!(after, self.backwards.memory());
        let Some(snapshot) = self.directory.snapshot() else {
            return;
        };
        nobody_shares(&snapshot);
        everybody_is_judged(&snapshot, &after);
        peers_are_as_recorded(&snapshot, &after);
        denied_are_out(&snapshot, &self.denied);
        messages_are_safe(&snapshot);
        if honest {
            holders_stay(&before, &after, &snapshot);
        }
        self.hearing_the_same_again_changes_nothing(&after);
    }

    fn restart(&mut self) {
        let before = self.directory.snapshot();
        let memory = self.directory.memory();
        for directory in [&mut self.directory, &mut self.backwards] {
            *directory = empty(self.given);
            directory.restore(memory.clone());
        }

        // Before the first list nobody holds anything yet.
        if let (Some(before), Some(after)) = (before, self.directory.snapshot()) {
            assert_eq!(self.directory.memory(), memory);
            assert_eq!((&before.own, &before.peers), (&after.own, &after.peers));
            // What a source could not say is not remembered.
            let known = |reasons: &[Reason]| !reasons.iter().any(|reason| matches!(reason, Reason::Unreadable(_)));
            let mut refused = before.refused.clone();
            refused.retain(|_, refused| known(&refused.reasons));
            assert_eq!(refused, after.refused);
        }
    }

    fn misremember(&mut self, holders: Holders) {
        let memory = self.directory.memory();
        for directory in [&mut self.directory, &mut self.backwards] {
            *directory = empty(self.given);
            directory.restore(Memory {
                keys: holders.keys.clone(),
                prefixes: holders.prefixes.clone(),
                addresses: holders.addresses.clone(),
                ..memory.clone()
            });
        }
    }

    /// A cluster repeats itself all day.
    fn hearing_the_same_again_changes_nothing(&mut self, memory: &Memory) {
        let before = self.directory.snapshot();
        let Some(record) = memory.records.iter().find(|record| record.node.as_str() != "me") else {
            return;
        };
        let unreadable = before.iter().any(|snapshot| !snapshot.problems.is_empty());
        if unreadable {
            return;
        }
        self.directory.apply(Ok(Record::clone(record)));
        let after = self.directory.snapshot();
        assert!(
            before
                .zip(after)
                .is_some_and(|(before, after)| Arc::ptr_eq(&before, &after))
        );
    }
}

fn empty(given: bool) -> Directory {
    let local = Local {
        node: name("me"),
        keys: PublicKeys::only(key(OWN_KEY), 1),
        pod_prefixes: (!given).then(|| BTreeSet::from([prefix("10.244.0.0/24")])),
    };
    Directory::new(local, PROTECTED.map(prefix).into())
}

/// No key, prefix or address has two nodes, and none of ours is another's.
fn nobody_shares(snapshot: &Snapshot) {
    let mut keys = BTreeSet::from([key(OWN_KEY)]);
    for peer in snapshot.peers.values() {
        for key in [Some(peer.public_key), peer.next_key.map(|next| next.public_key)]
            .into_iter()
            .flatten()
        {
            assert!(keys.insert(key), "a key has two nodes: {snapshot:?}");
        }
    }

    let nodes = || {
        let peers = snapshot
            .peers
            .values()
            .map(|peer| (&peer.pod_prefixes, &peer.addresses));
        let refused = snapshot
            .refused
            .values()
            .map(|refused| (&refused.pod_prefixes, &refused.addresses));
        peers.chain(refused)
    };
    let mut held: Vec<Prefix> = snapshot.own.pod_prefixes.iter().copied().collect();
    let mut addresses: BTreeSet<IpAddr> = BTreeSet::new();
    for (prefixes, of_node) in nodes() {
        for prefix in prefixes {
            assert!(
                !held.iter().any(|other| other.overlaps(*prefix)),
                "{prefix} has two nodes: {snapshot:?}"
            );
        }
        held.extend(prefixes);
        for address in of_node {
            assert!(addresses.insert(*address), "{address} has two nodes: {snapshot:?}");
        }
    }
}

/// Every node that is known is a peer, or is refused for a reason; never both, and never this one.
fn everybody_is_judged(snapshot: &Snapshot, memory: &Memory) {
    let me = name("me");
    assert!(!snapshot.peers.contains_key(&me) && !snapshot.refused.contains_key(&me));
    let nodes = memory.records.iter().map(|record| &record.node);
    for node in nodes.filter(|node| **node != me) {
        let (peer, refused) = (snapshot.peers.contains_key(node), snapshot.refused.contains_key(node));
        assert!(peer != refused, "{node} is both or neither: {snapshot:?}");
    }
    assert!(snapshot.refused.values().all(|refused| !refused.reasons.is_empty()));
}

/// A peer has what its own announcement and the authority both say, and nothing else.
fn peers_are_as_recorded(snapshot: &Snapshot, memory: &Memory) {
    let protected = PROTECTED.map(prefix);
    for (node, peer) in &snapshot.peers {
        let record = memory
            .records
            .iter()
            .find(|record| record.node == *node)
            .expect("a peer has a record");
        let announcement = record.announcement.as_ref().expect("a peer has announced something");
        let announcement = Announcement::parse(announcement).expect("a peer's announcement is one");

        assert_eq!(
            (peer.public_key, peer.epoch, peer.next_key),
            (
                announcement.public_key,
                announcement.epoch,
                announcement.next_key.filter(|_| peer.next_key.is_some())
            )
        );
        assert_eq!(
            memory.epochs.get(node),
            Some(&peer.epoch),
            "an old announcement is believed: {snapshot:?}"
        );
        assert_eq!(
            memory.keys.get(node),
            Some(&peer.public_key),
            "a key without a holder: {snapshot:?}"
        );
        if let Some(next) = peer.next_key {
            let holds = memory.next_keys.get(node) == Some(&next.public_key);
            assert!(holds, "a next key without a holder: {snapshot:?}");
        }
        assert!(!peer.endpoints.is_empty());
        for endpoint in &peer.endpoints {
            let address = endpoint.ip();
            assert!(announcement.endpoints.contains(endpoint));
            assert!(
                record.addresses.iter().any(|known| known.to_canonical() == address),
                "{endpoint}"
            );
            assert!(!protected.iter().any(|range| range.contains(address)), "{endpoint}");
        }
        for given in &peer.pod_prefixes {
            assert!(
                record.pod_prefixes.contains(given) && protected.iter().any(|range| range.covers(*given)),
                "{given}"
            );
        }
    }
}

fn denied_are_out(snapshot: &Snapshot, denied: &BTreeMap<String, String>) {
    for (node, peer) in &snapshot.peers {
        let keys = [Some(peer.public_key), peer.next_key.map(|next| next.public_key)];
        let texts = keys
            .into_iter()
            .flatten()
            .flat_map(|key| [key.to_string(), key.fingerprint()]);
        for text in texts.chain([node.to_string()]) {
            assert!(!denied.contains_key(&text), "{text} is denied: {snapshot:?}");
        }
    }
}

fn messages_are_safe(snapshot: &Snapshot) {
    for reason in snapshot.refused.values().flat_map(|refused| &refused.reasons) {
        printable::check(&reason.to_string());
    }
    for problem in &snapshot.problems {
        printable::check(&problem.to_string());
    }
}

/// A node that is still known keeps what it held and did not give up, whatever others claim.
fn holders_stay(before: &Memory, after: &Memory, snapshot: &Snapshot) {
    let records = after.records.iter().map(|record| (&record.node, record.as_ref()));
    let records: BTreeMap<&NodeName, &Record> = records.collect();
    for (held, node) in &before.prefixes {
        let ours = snapshot.own.pod_prefixes.iter().any(|own| own.overlaps(*held));
        if !ours
            && records
                .get(node)
                .is_some_and(|record| record.pod_prefixes.contains(held))
        {
            assert_eq!(
                after.prefixes.get(held),
                Some(node),
                "{held} was taken from {node}: {snapshot:?}"
            );
        }
    }
    for (address, node) in &before.addresses {
        let has = |record: &&Record| record.addresses.iter().any(|known| known.to_canonical() == *address);
        if records.get(node).is_some_and(has) {
            assert_eq!(
                after.addresses.get(address),
                Some(node),
                "{address} was taken from {node}: {snapshot:?}"
            );
        }
    }
    for (node, held) in &before.keys {
        let Some(record) = records.get(node) else { continue };
        let announced = record
            .announcement
            .as_ref()
            .and_then(|raw| Announcement::parse(raw).ok());
        if announced.is_none_or(|announcement| announcement.public_key == *held) {
            assert_eq!(
                after.keys.get(node),
                Some(held),
                "{held} was taken from {node}: {snapshot:?}"
            );
        }
    }
    for (node, seen) in &before.epochs {
        assert!(
            !records.contains_key(node) || after.epochs.get(node) >= Some(seen),
            "{node} forgot epoch {seen}"
        );
    }
}

fn step(history: &mut Unstructured<'_>) -> Result<Step> {
    Ok(match history.int_in_range(0..=9)? {
        0..=3 => Step::Apply(entry(history)?),
        4 => Step::Delete(any_name(history)?),
        5 | 6 => Step::Reset(few(history, 8, entry)?),
        7 => Step::Deny(few(history, 3, denial)?.into_iter().collect()),
        8 => Step::Restart,
        _ => Step::Misremember(Holders {
            keys: few(history, 5, |history| Ok((any_name(history)?, any_key(history)?)))?
                .into_iter()
                .collect(),
            prefixes: few(history, 5, |history| Ok((any_prefix(history)?, any_name(history)?)))?
                .into_iter()
                .collect(),
            addresses: few(history, 5, |history| Ok((any_address(history)?, any_name(history)?)))?
                .into_iter()
                .collect(),
        }),
    })
}

fn entry(history: &mut Unstructured<'_>) -> Result<Entry> {
    let node = any_name(history)?;
    if history.ratio(1, 8)? {
        return Ok(Err(Unreadable {
            node: history.arbitrary::<bool>()?.then_some(node),
            reason: "cut off".to_owned(),
        }));
    }
    let addresses = few(history, 3, any_address)?;
    let pod_prefixes = few(history, 3, any_prefix)?;
    let announcement = match history.int_in_range(0..=7)? {
        0 => None,
        1 => Some(history.arbitrary::<&str>()?.to_owned()),
        2 => {
            let others = few(history, 3, any_address)?;
            Some(announcement(history, others)?.to_json())
        }
        _ => Some(announcement(history, addresses.clone())?.to_json()),
    };
    Ok(Ok(Record {
        node,
        addresses,
        pod_prefixes,
        zone: None,
        announcement,
    }))
}

fn announcement(history: &mut Unstructured<'_>, addresses: Vec<IpAddr>) -> Result<Announcement> {
    let port = if history.ratio(1, 16)? { 0 } else { 51820 };
    let (public_key, epoch) = (any_key(history)?, history.int_in_range(0..=3)?);
    let next = history.ratio(1, 3)?.then(|| any_key(history)).transpose()?;
    let next_key = next.filter(|next| *next != public_key).map(|public_key| AnnouncedKey {
        public_key,
        epoch: epoch + 1,
    });
    Ok(Announcement {
        public_key,
        listen_port: NonZeroU16::MAX,
        endpoints: addresses.into_iter().map(|address| (address, port).into()).collect(),
        epoch,
        next_key,
        backend: Backend::Userspace,
        mode: Mode::Native,
        overlays: Vec::new(),
        routable: history.arbitrary()?,
        encrypts_nodes: history.arbitrary()?,
        scope: EncryptScope::All,
    })
}

fn denial(history: &mut Unstructured<'_>) -> Result<(String, String)> {
    let whom = match history.int_in_range(0..=3)? {
        0 => any_name(history)?.to_string(),
        1 => any_key(history)?.to_string(),
        2 => any_key(history)?.fingerprint(),
        _ => history.arbitrary::<&str>()?.to_owned(),
    };
    Ok((whom, history.arbitrary::<&str>()?.to_owned()))
}

fn few<T>(
    history: &mut Unstructured<'_>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = history.int_in_range(0..=most)?;
    (0..count).map(|_| one(history)).collect()
}

fn any_name(history: &mut Unstructured<'_>) -> Result<NodeName> {
    history.choose(&NAMES).map(|text| name(text))
}

fn any_key(history: &mut Unstructured<'_>) -> Result<PublicKey> {
    history.int_in_range(KEYS).map(key)
}

fn any_prefix(history: &mut Unstructured<'_>) -> Result<Prefix> {
    history.choose(&PREFIXES).map(|text| prefix(text))
}

fn any_address(history: &mut Unstructured<'_>) -> Result<IpAddr> {
    history
        .choose(&ADDRESSES)
        .map(|text| text.parse().expect("these are addresses"))
}

fn name(text: &str) -> NodeName {
    text.parse().expect("these are names")
}

fn prefix(text: &str) -> Prefix {
    text.parse().expect("these are prefixes")
}

fn key(seed: u8) -> PublicKey {
    PublicKey::from_bytes([seed; 32]).expect("32 equal bytes, not zero, are a key")
}
