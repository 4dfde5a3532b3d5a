//! Who is in the mesh, verified: a pure index over what the sources say.
//!
//! It owns the memory of who held a key or prefix first and which epochs were seen. It does no I/O and knows no time. Every change ends
//! in `Directory::settle`, which derives holders from records and memory alone, never from the order in which equal facts came, and looks
//! only at those whom the change concerns.
//!
//! - A key or prefix belongs to its first verified holder. A second claimer is refused. Two that claim it at once, with no memory of
//!   who was first, are both refused; a prefix nobody holds has no owner, so that its traffic is dropped.
//! - An underlay address belongs to its first holder too; whoever else claims it stays a peer without that address.
//! - A key to come has a holder like one in force. A node that announces one it does not hold stays a peer without it.
//! - This node always holds its own keys and prefixes.
//! - A key stays with its holder until the node is gone or verifiably holds another key, so that withdrawing or spoiling an
//!   announcement for a moment gives nobody else a chance. A prefix stays until the authority no longer lists it.
//! - A [`reset`](Directory::reset) is a complete list. When it would remove more than one and more than a fifth of the known peers,
//!   nobody goes until a second list names the same nodes. A [`delete`](Directory::delete) is the authority's explicit word about one
//!   node and takes effect at once, however many come in a row; a source that only notices absence must use `reset`.
//! - A node that is gone is forgotten, its epoch too: what comes back under its name is a new node.
//! - A pod opts out by addresses that its node holds, and only while its node is believed.
//! - Above [`MAX_NODES`] nodes, those already known stay, and new ones are left out in the order of their names and counted in a
//!   [`Problem`]; their traffic is dropped.

mod claimants;
mod ranges;
mod settle;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use shroud_model::{NodeName, OverlayFormat, Prefix, PublicKey};
use thiserror::Error;

use self::settle::{Claimed, Unsettled};
use self::verify::Claims;
use crate::announcement::{AnnouncedKey, Backend, EncryptScope, Mode};
use crate::record::shared;
use crate::words::words;
use crate::{Announcement, Event, Excerpt, OptOuts, PublicKeys, Record, Refusal, Unreadable, Zone};

/// The most nodes a directory keeps, this one not counted.
pub const MAX_NODES: usize = 10_000;
/// The most pod prefixes one node may have.
pub const MAX_POD_PREFIXES: usize = 16;
/// The most addresses of pods that opt out; the traffic of those beyond is encrypted.
pub const MAX_OPT_OUTS: usize = 4096;

/// This node's own claims, which nobody can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// This node's name.
    pub node: NodeName,
    /// This node's keys.
    pub keys: PublicKeys,
    /// This node's pod prefixes; `None` where the directory is their authority and gives this node its own.
    pub pod_prefixes: Option<BTreeSet<Prefix>>,
}

/// A node whose claims were verified and can be sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its key.
    pub public_key: PublicKey,
    /// The good endpoints it announces, best first; at least one.
    pub endpoints: Vec<SocketAddr>,
    /// The pod prefixes it holds; may be empty when it has none yet.
    pub pod_prefixes: BTreeSet<Prefix>,
    /// Its addresses on the underlay, as the authority has them; no other node has any of them.
    pub addresses: Vec<IpAddr>,
    /// The epoch of its announcement.
    pub epoch: u64,
    /// The key to come, which it answers to as well.
    pub next_key: Option<AnnouncedKey>,
    /// How it says it encrypts.
    pub backend: Backend,
    /// How it sends pod packets.
    pub mode: Mode,
    /// The overlay packets it can receive.
    pub overlays: Vec<OverlayFormat>,
    /// Whether its underlay delivers packets for its pods by itself.
    pub routable: bool,
    /// Whether it encrypts its own traffic with nodes that do so too.
    pub encrypts_nodes: bool,
    /// Which traffic between pods it wants encrypted.
    pub scope: EncryptScope,
    /// The zone it is in, as the authority has it.
    pub zone: Option<Zone>,
}

impl Peer {
    /// The keys it answers to: the one in force, and the one to come.
    pub fn keys(&self) -> impl Iterator<Item = PublicKey> + use<> {
        [Some(self.public_key), self.next_key.map(|next| next.public_key)]
            .into_iter()
            .flatten()
    }
}

/// A node that is known but not believed. Its traffic is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why; at least one reason.
    pub reasons: Vec<Reason>,
    /// The pod prefixes that are nevertheless its own, to be fenced in its name.
    pub pod_prefixes: BTreeSet<Prefix>,
    /// Its addresses on the underlay, where traffic of nodes is encrypted to be fenced too. None for a node that never had a key: it has
    /// yet to start, and must be able to.
    pub addresses: Vec<IpAddr>,
}

/// Where a snapshot's facts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Memory of an earlier run; no source has spoken yet.
    Cache,
    /// A source's complete list.
    Source,
}

/// What is known of this node itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// Its pod prefixes: those of [`Local`], or else the sound ones of its record; none while it has no record.
    pub pod_prefixes: BTreeSet<Prefix>,
    /// Its addresses on the underlay, as its record has them; none while it has no record.
    pub addresses: Vec<IpAddr>,
    /// The zone it is in, as its record has it.
    pub zone: Option<Zone>,
}

/// The directory at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Where the facts come from.
    pub origin: Origin,
    /// This node itself.
    pub own: Own,
    /// Verified nodes, this one not among them. Of a peer that has not changed, two snapshots in a row hold the same.
    pub peers: BTreeMap<NodeName, Arc<Peer>>,
    /// Refused nodes. No node is in both maps.
    pub refused: BTreeMap<NodeName, Refused>,
    /// The pods that have opted out, each address a believed node's; `None` while nobody can say.
    pub opted_out: Option<OptOuts>,
    /// What wants a look without changing who is a peer.
    pub problems: Vec<Problem>,
}

/// Why a node is refused. Safe to print.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Reason {
    /// The operator keeps it out.
    #[error("the deny list has its {what}{}", in_brackets(.remark))]
    Denied {
        /// `name` or `key`.
        what: &'static str,
        /// What the operator wrote beside it.
        remark: Excerpt,
    },
    /// It has announced nothing yet, or withdrawn it.
    #[error("it announces no key")]
    NoAnnouncement,
    /// Its announcement is no announcement.
    #[error("its announcement is refused: {0}")]
    Announcement(Refusal),
    /// Its announcement is older than one seen before.
    #[error(
        "its announcement has epoch {epoch}, but epoch {seen} was seen before: an old one is played again; if the node was set up anew, delete its record once"
    )]
    Replay {
        /// What it announces.
        epoch: u64,
        /// The highest seen.
        seen: u64,
    },
    /// Nothing can be sent to it.
    #[error("it announces no endpoint that can be used{}", list(.0))]
    NoEndpoint(Vec<(SocketAddr, EndpointFlaw)>),
    /// It announces this node's key.
    #[error("it announces this node's own key")]
    OwnKey,
    /// Another node was first.
    #[error("it announces the key {}.. that node {holder} holds", key.fingerprint())]
    KeyHeld {
        /// The key.
        key: PublicKey,
        /// Who holds it.
        holder: NodeName,
    },
    /// Two came at once.
    #[error("it announces the key {}.. and so does node {rival}; nobody knows who was first", key.fingerprint())]
    KeyContested {
        /// The key.
        key: PublicKey,
        /// Another claimer.
        rival: NodeName,
    },
    /// Another node was first.
    #[error("its pod prefix {prefix} overlaps with one that node {holder} holds")]
    PrefixHeld {
        /// The prefix.
        prefix: Prefix,
        /// Who holds a part of it.
        holder: NodeName,
    },
    /// Two came at once.
    #[error("its pod prefix {prefix} overlaps with one of node {rival}; nobody knows who was first")]
    PrefixContested {
        /// The prefix.
        prefix: Prefix,
        /// Another claimer.
        rival: NodeName,
    },
    /// The prefix is not among the protected ranges.
    #[error("its pod prefix {0} lies outside the protected ranges of this node's configuration")]
    PrefixNotProtected(Prefix),
    /// The prefix is absurdly wide.
    #[error("its pod prefix {0} is wider than a node's can be (at least /8 for IPv4, /32 for IPv6)")]
    PrefixTooWide(Prefix),
    /// There are too many.
    #[error("it has {0} pod prefixes, more than the {MAX_POD_PREFIXES} allowed")]
    TooManyPrefixes(usize),
    /// The source has something in its place that cannot be read, and nothing older is known.
    #[error("its record cannot be read: {0}")]
    Unreadable(String),
}

impl Reason {
    words! {
        Self::Denied { .. } => "denied",
        Self::NoAnnouncement => "no-announcement",
        Self::Announcement(_) => "announcement-refused",
        Self::Replay { .. } => "replay",
        Self::NoEndpoint(_) => "no-endpoint",
        Self::OwnKey => "own-key",
        Self::KeyHeld { .. } => "key-held",
        Self::KeyContested { .. } => "key-contested",
        Self::PrefixHeld { .. } => "prefix-held",
        Self::PrefixContested { .. } => "prefix-contested",
        Self::PrefixNotProtected(_) => "prefix-not-protected",
        Self::PrefixTooWide(_) => "prefix-too-wide",
        Self::TooManyPrefixes(_) => "too-many-prefixes",
        Self::Unreadable(_) => "unreadable",
    }
}

/// Why nothing is sent to an announced endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Error)]
pub enum EndpointFlaw {
    /// Port 0.
    #[error("it has port 0")]
    NoPort,
    /// Loopback, unspecified, link-local, multicast or broadcast.
    #[error("no other machine can have this address")]
    NotUnderlay,
    /// Inside a protected range: the tunnel would have to pass through itself.
    #[error("it lies in a protected range")]
    Pod,
    /// The authority does not list the address for this node.
    #[error("the directory does not list this address for the node")]
    NotItsAddress,
}

/// Something that wants a look, without changing who is a peer. Safe to print.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Error)]
pub enum Problem {
    /// A list shrank too much at once.
    #[error(
        "the last list lacks {} of {known} known peers ({}); they stay until a second list agrees or they are deleted one by one",
        missing.len(), names(missing)
    )]
    Brake {
        /// Who is missing.
        missing: BTreeSet<NodeName>,
        /// How many were known.
        known: usize,
    },
    /// A record cannot be read; when its node is known, the last good one counts.
    #[error("{}{reason}", of(node.as_ref()))]
    Unreadable {
        /// The node it would be about, as far as that is known.
        node: Option<NodeName>,
        /// The place and what is wrong.
        reason: String,
    },
    /// There are more nodes than the directory keeps.
    #[error("{0} nodes are left out: a directory keeps at most {MAX_NODES}; their traffic is dropped")]
    TooManyNodes(usize),
    /// A peer announces an endpoint that is not used; it has a better one.
    #[error("node {node}: endpoint {endpoint} is not used: {flaw}")]
    Endpoint {
        /// Whose.
        node: NodeName,
        /// Which.
        endpoint: SocketAddr,
        /// Why.
        flaw: EndpointFlaw,
    },
    /// A peer announces a key to come that is not its to announce; it stays a peer with the one in force.
    #[error("node {node}: its next key {}.. is not used: {}", key.fingerprint(), holder.as_ref().map_or("others announce it too, or it is this node's".to_owned(), |holder| format!("node {holder} holds it")))]
    NextKey {
        /// Whose.
        node: NodeName,
        /// Which.
        key: PublicKey,
        /// Who has it, if that is known.
        holder: Option<NodeName>,
    },
    /// Several nodes have one address. Neither overlay nor encrypted node traffic uses it for those that came later.
    #[error("the address {address} is not used for {}: {}", names(unused), holder.as_ref().map_or("nobody knows who had it first".to_owned(), |holder| format!("node {holder} had it first")))]
    Address {
        /// Which.
        address: IpAddr,
        /// Who had it first, if that is known.
        holder: Option<NodeName>,
        /// Who else has it.
        unused: BTreeSet<NodeName>,
    },
    /// The directory has another key under this node's name.
    #[error("the directory has the key {}.. under this node's own name: another machine uses the name, or this node has yet to announce its key", .0.fingerprint())]
    LocalKey(PublicKey),
    /// The directory gives this node a prefix it does not know of.
    #[error("the directory gives this node the pod prefix {0}, which its configuration does not name")]
    LocalPrefix(Prefix),
    /// The directory is to give this node its prefixes, and has no record of it.
    #[error("the directory has no record of this node; what it last had counts")]
    LocalAbsent,
    /// The directory gives this node something that cannot be used.
    #[error("this node's own record: {0}")]
    LocalFlaw(String),
    /// A pod would opt out with an address that is not its node's to give.
    #[error(
        "pod {pod} on node {node} has opted out, but its address {address} is not in a pod prefix of that node; it stays encrypted"
    )]
    OptOut {
        /// Which, as `namespace/name`.
        pod: String,
        /// Its node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// More pods opt out than the directory keeps.
    #[error(
        "{0} addresses of pods that have opted out are left out: at most {MAX_OPT_OUTS} are kept; their traffic is encrypted"
    )]
    TooManyOptOuts(usize),
    /// The operator keeps this node out.
    #[error("the deny list has this node's {0}: no other node sends to it or believes it")]
    LocalDenied(&'static str),
}

/// What must outlive the process: the records, who was first, and which epochs were seen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Memory {
    /// Every record, refused ones too.
    #[serde(with = "shared")]
    pub records: Vec<Arc<Record>>,
    /// Who holds which key.
    pub keys: BTreeMap<NodeName, PublicKey>,
    /// Who holds which key to come.
    #[serde(default)]
    pub next_keys: BTreeMap<NodeName, PublicKey>,
    /// Who holds which prefix.
    pub prefixes: BTreeMap<Prefix, NodeName>,
    /// The highest epoch each node has announced.
    pub epochs: BTreeMap<NodeName, u64>,
    /// Who holds which underlay address.
    #[serde(default)]
    pub addresses: BTreeMap<IpAddr, NodeName>,
    /// Who is kept out: names, keys and fingerprints, each with a remark.
    #[serde(default)]
    pub denied: BTreeMap<String, String>,
}

/// The index. Feed it with what sources say and take [`Snapshot`]s.
pub struct Directory {
    local: Local,
    protected: BTreeSet<Prefix>,
    entries: BTreeMap<NodeName, Entry>,
    /// What the source says of this node itself, or last said.
    own: Option<OwnEntry>,
    claimed: Claimed,
    /// Who holds which key, in force or to come, both ways.
    keys: BTreeMap<NodeName, PublicKey>,
    next_keys: BTreeMap<NodeName, PublicKey>,
    holders: BTreeMap<PublicKey, NodeName>,
    prefixes: BTreeMap<Prefix, NodeName>,
    addresses: BTreeMap<IpAddr, NodeName>,
    /// Why nodes do not hold the prefixes that they claim; of hardly any node.
    lost: BTreeMap<NodeName, BTreeMap<Prefix, Reason>>,
    /// What is wrong with records, but not enough to refuse their nodes.
    doubts: BTreeMap<NodeName, Vec<Problem>>,
    unsettled: Unsettled,
    /// What may be another than the snapshot says.
    concerned: BTreeSet<NodeName>,
    denied: BTreeMap<String, String>,
    opted_out: Option<OptOuts>,
    unreadable: BTreeSet<Unreadable>,
    brake: Option<Brake>,
    left_out: usize,
    origin: Option<Origin>,
    snapshot: Option<Arc<Snapshot>>,
}

/// One node's record. What can be said of it alone is read from it again when that is asked for, which is less than keeping it.
struct Entry {
    record: Arc<Record>,
    /// The highest epoch seen.
    epoch: Option<u64>,
    /// Why its announcement is refused, where that was too long to be kept.
    too_long: Option<Box<Reason>>,
}

impl Entry {
    fn claims(&self, protected: &BTreeSet<Prefix>) -> Claims {
        let mut claims = Claims::of(&self.record, self.epoch, protected);
        if let Some(reason) = &self.too_long {
            claims.announcement = Err(Reason::clone(reason));
        }
        claims
    }
}

/// The same of this node itself.
struct OwnEntry {
    record: Arc<Record>,
    claims: Claims,
    /// Whether the source's latest word has this node in it.
    listed: bool,
}

/// Whether a record said anything new. A cluster repeats itself all day.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Some,
}

/// A list that nobody believes until it is repeated.
struct Brake {
    names: BTreeSet<NodeName>,
    missing: BTreeSet<NodeName>,
    known: usize,
}

impl Directory {
    /// An empty directory. `protected` are the pod ranges of the mesh: every pod prefix must lie inside, no endpoint may.
    pub fn new(local: Local, protected: BTreeSet<Prefix>) -> Self {
        Self {
            local,
            protected,
            entries: BTreeMap::new(),
            own: None,
            claimed: Claimed::default(),
            keys: BTreeMap::new(),
            next_keys: BTreeMap::new(),
            holders: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            addresses: BTreeMap::new(),
            lost: BTreeMap::new(),
            doubts: BTreeMap::new(),
            unsettled: Unsettled::default(),
            concerned: BTreeSet::new(),
            denied: BTreeMap::new(),
            opted_out: None,
            unreadable: BTreeSet::new(),
            brake: None,
            left_out: 0,
            origin: None,
            snapshot: None,
        }
    }

    /// Takes up what an earlier run remembered; to be called before any source speaks. Records are verified anew.
    pub fn restore(&mut self, memory: Memory) {
        for record in memory.records {
            let seen = memory.epochs.get(&record.node).copied();
            self.enter(record, seen);
        }
        for (remembered, held) in [(memory.keys, &mut self.keys), (memory.next_keys, &mut self.next_keys)] {
            for (node, key) in remembered {
                let free = !self.local.keys.contains(key) && !self.holders.contains_key(&key);
                if free && self.entries.contains_key(&node) {
                    self.holders.insert(key, node.clone());
                    self.unsettled.keys.insert(key);
                    held.insert(node, key);
                }
            }
        }
        self.unsettled.prefixes.extend(memory.prefixes.keys());
        self.unsettled.addresses.extend(memory.addresses.keys());
        self.prefixes = memory.prefixes;
        self.addresses = memory.addresses;
        self.denied = memory.denied;
        self.origin = self.origin.or(Some(Origin::Cache));
        self.settle();
        self.conclude();
    }

    /// What the next run should remember.
    pub fn memory(&self) -> Memory {
        let epochs = self
            .entries
            .iter()
            .filter_map(|(node, entry)| Some((node.clone(), entry.epoch?)));
        Memory {
            records: self
                .entries
                .values()
                .map(|entry| &entry.record)
                .chain(self.own.as_ref().map(|own| &own.record))
                .map(Arc::clone)
                .collect(),
            keys: self.keys.clone(),
            next_keys: self.next_keys.clone(),
            prefixes: self.prefixes.clone(),
            epochs: epochs.collect(),
            addresses: self.addresses.clone(),
            denied: self.denied.clone(),
        }
    }

    /// Takes what a source said in a row, one after the other as [`reset`](Self::reset) and the others take each, and makes one snapshot of it.
    /// Answers whether anything was new.
    pub fn take(&mut self, events: impl IntoIterator<Item = Event>) -> bool {
        let mut changed = false;
        for event in events {
            let change = match event {
                Event::Listed(list) => self.replace(list),
                Event::Applied(record) => self.enter_one(record),
                Event::Deleted(node) => self.remove(&node),
                Event::Denied(denied) => {
                    self.denied = denied;
                    self.concerned.extend(self.entries.keys().cloned());
                    Change::Some
                }
                Event::OptedOut(opted_out) => {
                    self.opted_out = opted_out;
                    Change::Some
                }
                Event::Silent(_) | Event::Answers => Change::None,
            };
            if change == Change::Some {
                self.settle();
                changed = true;
            }
        }
        if changed {
            self.conclude();
        }
        changed
    }

    /// Takes a source's complete list, in any order. A node that is listed twice with different words counts as unreadable.
    pub fn reset(&mut self, list: Vec<Result<Record, Unreadable>>) {
        self.take([Event::Listed(list)]);
    }

    fn replace(&mut self, list: Vec<Result<Record, Unreadable>>) -> Change {
        let (records, unreadable) = sort(list);
        let names: BTreeSet<NodeName> = records
            .keys()
            .chain(unreadable.iter().filter_map(|bad| bad.node.as_ref()))
            .cloned()
            .collect();

        self.remove_absent(names);
        self.concern_unreadable();
        self.unreadable = unreadable;
        self.concern_unreadable();
        self.left_out = 0;
        self.unlist_own();
        for record in records.into_values() {
            self.enter(Arc::new(record), None);
        }
        self.origin = Some(Origin::Source);
        Change::Some
    }

    /// Takes one node's record, or that it cannot be read; then what was known of the node stays. Before the first complete list it is only
    /// kept.
    pub fn apply(&mut self, record: Result<Record, Unreadable>) {
        self.take([Event::Applied(record)]);
    }

    fn enter_one(&mut self, record: Result<Record, Unreadable>) -> Change {
        let record = match record {
            Ok(record) => record,
            Err(bad) => {
                self.unreadable.retain(|known| known.node != bad.node);
                self.concerned.extend(bad.node.clone());
                self.unreadable.insert(bad);
                return Change::Some;
            }
        };
        let settled = self.unreadable.is_empty() && self.brake.is_none();
        if !settled {
            self.concerned.insert(record.node.clone());
        }
        self.unreadable.retain(|bad| bad.node.as_ref() != Some(&record.node));
        self.release_brake(&record.node);
        if self.enter(Arc::new(record), None) == Change::None && settled {
            return Change::None;
        }
        Change::Some
    }

    /// Removes one node at once, because the authority says that it is gone.
    pub fn delete(&mut self, node: &NodeName) {
        self.take([Event::Deleted(node.clone())]);
    }

    fn remove(&mut self, node: &NodeName) -> Change {
        self.unreadable.retain(|bad| bad.node.as_ref() != Some(node));
        self.release_brake(node);
        self.forget(node);
        Change::Some
    }

    /// Takes the operator's complete deny list: names of nodes, their keys or the keys' fingerprints, each with a remark. Who is on it is
    /// refused at once, whatever its claims.
    pub fn deny(&mut self, denied: BTreeMap<String, String>) {
        self.take([Event::Denied(denied)]);
    }

    /// Takes all pods that have opted out, or that nobody can say who has. It is never remembered for a later run: an address may be another
    /// pod's by then.
    pub fn opt_out(&mut self, opted_out: Option<OptOuts>) {
        self.take([Event::OptedOut(opted_out)]);
    }

    /// This node has other keys by now.
    pub fn set_own_keys(&mut self, keys: PublicKeys) {
        if self.local.keys == keys {
            return;
        }
        let before = std::mem::replace(&mut self.local.keys, keys);
        self.unsettled.keys.extend(before.iter());
        for key in keys.iter() {
            self.unsettled.keys.insert(key);
            // Nobody else can have a key of ours.
            if let Some(node) = self.holders.remove(&key) {
                self.keys.retain(|holder, held| *holder != node || *held != key);
                self.next_keys.retain(|holder, held| *holder != node || *held != key);
            }
        }
        self.settle();
        self.conclude();
    }

    /// The directory as it is, or `None` while neither a source's first list nor a memory has come.
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.snapshot.clone()
    }

    /// Removes who is not in a complete list, unless that is too much to believe at once.
    fn remove_absent(&mut self, names: BTreeSet<NodeName>) {
        let known = self.entries.len();
        let missing: BTreeSet<NodeName> = self
            .entries
            .keys()
            .filter(|&node| !names.contains(node))
            .cloned()
            .collect();
        let repeated = self.brake.take().is_some_and(|brake| brake.names == names);

        if missing.len() > 1 && missing.len() * 5 > known && !repeated {
            self.brake = Some(Brake { names, missing, known });
            return;
        }
        for node in &missing {
            self.forget(node);
        }
    }

    /// A node that was spoken of by name is no longer merely missing.
    fn release_brake(&mut self, node: &NodeName) {
        if let Some(brake) = &mut self.brake {
            brake.missing.remove(node);
        }
        self.brake.take_if(|brake| brake.missing.is_empty());
    }

    fn forget(&mut self, node: &NodeName) {
        if *node == self.local.node {
            self.unlist_own();
        }
        if let Some(entry) = self.entries.remove(node) {
            self.unclaim(node, &entry.claims(&self.protected));
        }
        for key in [self.keys.remove(node), self.next_keys.remove(node)]
            .into_iter()
            .flatten()
        {
            self.holders.remove(&key);
            self.unsettled.keys.insert(key);
        }
        self.concerned.insert(node.clone());
    }

    /// Whether their records can be read says what some nodes are.
    fn concern_unreadable(&mut self) {
        let nodes = self.unreadable.iter().filter_map(|bad| bad.node.clone());
        self.concerned.extend(nodes);
    }

    /// The source's latest word does not have this node in it; what it last said of it counts.
    fn unlist_own(&mut self) {
        if let Some(own) = &mut self.own {
            own.listed = false;
        }
    }

    /// Takes in what the source says of this node itself.
    fn enter_own(&mut self, record: Arc<Record>) -> Change {
        if self.own.as_ref().is_some_and(|own| own.listed && own.record == record) {
            return Change::None;
        }
        let before: Vec<Prefix> = self.own_prefixes().copied().collect();
        self.own = Some(OwnEntry {
            claims: Claims::of(&record, None, &self.protected),
            record,
            listed: true,
        });
        let after: Vec<Prefix> = self.own_prefixes().copied().collect();
        self.unsettled.prefixes.extend(before.into_iter().chain(after));
        Change::Some
    }

    /// Takes a record in. `remembered` is an epoch from an earlier run.
    fn enter(&mut self, record: Arc<Record>, remembered: Option<u64>) -> Change {
        if record.node == self.local.node {
            return self.enter_own(bounded(record));
        }
        let known = self.entries.get(&record.node);
        if known.is_some_and(|entry| entry.record == record) {
            return Change::None;
        }
        if known.is_none() && self.entries.len() >= MAX_NODES {
            self.left_out = self.left_out.saturating_add(1);
            return Change::Some;
        }

        let node = record.node.clone();
        let seen = known.and_then(|entry| entry.epoch).max(remembered);
        let before = known.map(|entry| entry.claims(&self.protected));
        let claims = Claims::of(&record, seen, &self.protected);
        let announced = claims.announcement.as_ref();
        let too_long = announced
            .err()
            .filter(|reason| matches!(reason, Reason::Announcement(Refusal::TooLong { .. })));
        let entry = Entry {
            epoch: announced.ok().map(|announcement| announcement.epoch).max(seen),
            too_long: too_long.cloned().map(Box::new),
            record: bounded(record),
        };
        if let Some(before) = before {
            self.unclaim(&node, &before);
        }
        self.claim(&node, claims);
        self.entries.insert(node, entry);
        Change::Some
    }

    /// What is known of this node itself.
    fn own(&self) -> Own {
        let claims = self.own.as_ref().map(|own| &own.claims);
        Own {
            pod_prefixes: self.own_prefixes().copied().collect(),
            addresses: claims.map(|claims| claims.addresses.clone()).unwrap_or_default(),
            zone: self.own.as_ref().and_then(|own| own.record.zone.clone()),
        }
    }

    /// This node's pod prefixes: those of the configuration, or else those that the source gives it.
    fn own_prefixes(&self) -> impl Iterator<Item = &Prefix> {
        let configured = self.local.pod_prefixes.as_ref();
        let given = || self.own.as_ref().map(|own| &own.claims.prefixes);
        configured.or_else(given).into_iter().flatten()
    }

    /// By what a node is on the deny list, and the remark beside it.
    fn denial(&self, node: &NodeName, keys: impl IntoIterator<Item = PublicKey>) -> Option<(&'static str, &str)> {
        if self.denied.is_empty() {
            return None;
        }
        let listed = |text: &str| self.denied.get(text).map(String::as_str);
        let by_name = listed(node.as_str()).map(|remark| ("name", remark));
        by_name.or_else(|| {
            let of_key = |key: PublicKey| listed(&key.fingerprint()).or_else(|| listed(&key.to_string()));
            keys.into_iter().find_map(of_key).map(|remark| ("key", remark))
        })
    }

    /// Where the directory and this node disagree on this node.
    fn own_problems(&self) -> Vec<Problem> {
        let Some(OwnEntry { record, claims, .. }) = self.own.as_ref().filter(|own| own.listed) else {
            return self
                .local
                .pod_prefixes
                .is_none()
                .then_some(Problem::LocalAbsent)
                .into_iter()
                .collect();
        };
        let mut problems = Vec::new();
        let announced = record
            .announcement
            .as_deref()
            .and_then(|raw| Announcement::parse(raw).ok());
        if let Some(other) = announced.filter(|announced| !self.local.keys.contains(announced.public_key)) {
            problems.push(Problem::LocalKey(other.public_key));
        }
        match &self.local.pod_prefixes {
            Some(configured) => {
                let unknown = record.pod_prefixes.iter().filter(|prefix| !configured.contains(prefix));
                problems.extend(unknown.map(|&prefix| Problem::LocalPrefix(prefix)));
            }
            None => {
                problems.extend(
                    claims
                        .reasons
                        .iter()
                        .map(|reason| Problem::LocalFlaw(reason.to_string())),
                );
            }
        }
        problems
    }
}

/// The record without an announcement that is refused for its length anyway, and not worth its memory.
fn bounded(mut record: Arc<Record>) -> Arc<Record> {
    let length = record.announcement.as_ref().map_or(0, String::len);
    if length > Announcement::MAX_BYTES {
        Arc::make_mut(&mut record).announcement = Some(String::new());
    }
    record
}

fn peer(
    announcement: Announcement,
    pod_prefixes: BTreeSet<Prefix>,
    addresses: Vec<IpAddr>,
    zone: Option<Zone>,
) -> Peer {
    Peer {
        public_key: announcement.public_key,
        endpoints: announcement.endpoints,
        pod_prefixes,
        addresses,
        epoch: announcement.epoch,
        next_key: announcement.next_key,
        backend: announcement.backend,
        mode: announcement.mode,
        overlays: announcement.overlays,
        routable: announcement.routable,
        encrypts_nodes: announcement.encrypts_nodes,
        scope: announcement.scope,
        zone,
    }
}

/// One record per node, and everything that is none.
fn sort(list: Vec<Result<Record, Unreadable>>) -> (BTreeMap<NodeName, Record>, BTreeSet<Unreadable>) {
    let mut records: BTreeMap<NodeName, Record> = BTreeMap::new();
    let mut twice = BTreeSet::new();
    let mut unreadable = BTreeSet::new();
    for entry in list {
        match entry {
            Ok(record) => match records.get(&record.node) {
                Some(first) if *first == record => {}
                Some(_) => {
                    twice.insert(record.node);
                }
                None => {
                    records.insert(record.node.clone(), record);
                }
            },
            Err(bad) => {
                unreadable.insert(bad);
            }
        }
    }
    for node in twice {
        records.remove(&node);
        let reason = "the source lists it twice, with different words".to_owned();
        unreadable.insert(Unreadable {
            node: Some(node),
            reason,
        });
    }
    (records, unreadable)
}

/// `: a is b, c is d`, or nothing.
fn list(bad: &[(SocketAddr, EndpointFlaw)]) -> String {
    let each: Vec<String> = bad
        .iter()
        .map(|(endpoint, flaw)| format!("{endpoint}: {flaw}"))
        .collect();
    if each.is_empty() {
        String::new()
    } else {
        format!(": {}", each.join(", "))
    }
}

/// The first few names.
fn names(nodes: &BTreeSet<NodeName>) -> String {
    const SHOWN: usize = 5;
    let mut shown: Vec<&str> = nodes.iter().take(SHOWN).map(NodeName::as_str).collect();
    if nodes.len() > SHOWN {
        shown.push("...");
    }
    shown.join(", ")
}

/// ` (remark)`, or nothing.
fn in_brackets(remark: &Excerpt) -> String {
    let remark = remark.to_string();
    if remark.is_empty() {
        remark
    } else {
        format!(" ({remark})")
    }
}

/// `node a: `, or nothing.
fn of(node: Option<&NodeName>) -> String {
    node.map(|node| format!("node {node}: ")).unwrap_or_default()
}
