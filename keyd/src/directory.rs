//! Who is in the mesh, verified: a pure index over what the sources say.
//!
//! It owns the memory of who held a key or prefix first and which epochs were seen. It does no I/O and knows no time. Every change ends
//! in `Directory::settle`, which derives holders, peers and refusals from records and memory alone, never from the order in which
//! equal facts came.
//!
//! - A key or prefix belongs to its first verified holder. A second claimer is refused. Two that claim it at once, with no memory of
//!   who was first, are both refused; a prefix nobody holds has no owner, so that its traffic is dropped.
//! - An underlay address belongs to its first holder too; whoever else claims it stays a peer without that address.
//! - This node always holds its own key and prefixes.
//! - A key stays with its holder until the node is gone or verifiably holds another key, so that withdrawing or spoiling an
//!   announcement for a moment gives nobody else a chance. A prefix stays until the authority no longer lists it.
//! - A [`reset`](Directory::reset) is a complete list. When it would remove more than one and more than a fifth of the known peers,
//!   nobody goes until a second list names the same nodes. A [`delete`](Directory::delete) is the authority's explicit word about one
//!   node and takes effect at once, however many come in a row; a source that only notices absence must use `reset`.
//! - A node that is gone is forgotten, its epoch too: what comes back under its name is a new node.
//! - A pod opts out by addresses that its node holds, and only while its node is believed.
//! - Above [`MAX_NODES`] nodes, those already known stay, and new ones are left out in the order of their names and counted in a
//!   [`Problem`]; their traffic is dropped.

mod ranges;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use shroud_model::{NodeName, OverlayFormat, Prefix, PublicKey};
use thiserror::Error;

use self::ranges::Ranges;
use self::verify::{Claims, first_other};
use crate::announcement::{Backend, EncryptScope, Mode};
use crate::words::words;
use crate::{Announcement, Event, Excerpt, OptOuts, Record, Refusal, Unreadable, Zone};

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
    /// This node's key.
    pub public_key: PublicKey,
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
    /// Verified nodes, this one not among them.
    pub peers: BTreeMap<NodeName, Peer>,
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
    pub records: Vec<Record>,
    /// Who holds which key.
    pub keys: BTreeMap<NodeName, PublicKey>,
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
    keys: BTreeMap<NodeName, PublicKey>,
    prefixes: BTreeMap<Prefix, NodeName>,
    addresses: BTreeMap<IpAddr, NodeName>,
    denied: BTreeMap<String, String>,
    opted_out: Option<OptOuts>,
    unreadable: BTreeSet<Unreadable>,
    brake: Option<Brake>,
    left_out: usize,
    /// Whether anybody claims what he does not hold.
    disputed: bool,
    origin: Option<Origin>,
    snapshot: Option<Arc<Snapshot>>,
}

/// One node's record and what can be said of it alone.
struct Entry {
    record: Record,
    claims: Claims,
    epoch: Option<u64>,
}

/// The same of this node itself.
struct OwnEntry {
    record: Record,
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

/// What a row of events that is settled together is about.
#[derive(Default)]
struct Row {
    nodes: BTreeSet<NodeName>,
    keys: BTreeSet<PublicKey>,
    prefixes: BTreeSet<Prefix>,
    addresses: BTreeSet<IpAddr>,
}

impl Row {
    /// Takes an event in, and answers whether it meets one that was there before: it is about the same node, or another that claims the
    /// same, or about all of them.
    fn meets(&mut self, event: &Event) -> bool {
        match event {
            Event::Listed(_) => true,
            Event::Deleted(node) => !self.nodes.insert(node.clone()),
            Event::Applied(Err(bad)) => match &bad.node {
                Some(node) => !self.nodes.insert(node.clone()),
                None => false,
            },
            Event::Applied(Ok(record)) => {
                let raw = record.announcement.as_deref();
                let announced = raw.and_then(|raw| Announcement::parse(raw).ok());
                let mut met = !self.nodes.insert(record.node.clone());
                met |= announced.is_some_and(|known| !self.keys.insert(known.public_key));
                // All of them are taken in, whatever the answer is by now.
                for prefix in record.pod_prefixes.iter().copied() {
                    met |= !self.prefixes.insert(prefix);
                }
                for address in record.addresses.iter().copied() {
                    met |= !self.addresses.insert(address);
                }
                met
            }
            Event::Denied(_) | Event::OptedOut(_) | Event::Silent(_) | Event::Answers => false,
        }
    }
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
            keys: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            addresses: BTreeMap::new(),
            denied: BTreeMap::new(),
            opted_out: None,
            unreadable: BTreeSet::new(),
            brake: None,
            left_out: 0,
            disputed: false,
            origin: None,
            snapshot: None,
        }
    }

    /// Takes up what an earlier run remembered; to be called before any source speaks. Records are verified anew.
    pub fn restore(&mut self, memory: Memory) {
        self.keys = memory.keys;
        self.prefixes = memory.prefixes;
        self.addresses = memory.addresses;
        self.denied = memory.denied;
        for record in memory.records {
            let seen = memory.epochs.get(&record.node).copied();
            self.enter(record, seen);
        }
        self.origin = self.origin.or(Some(Origin::Cache));
        self.settle();
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
                .cloned()
                .collect(),
            keys: self.keys.clone(),
            prefixes: self.prefixes.clone(),
            epochs: epochs.collect(),
            addresses: self.addresses.clone(),
            denied: self.denied.clone(),
        }
    }

    /// Takes what a source said in a row, as [`reset`](Self::reset) and the others take each, and decides once at the end: with thousands of
    /// nodes that is most of the work. Where the order matters, what came earlier is settled first: before a list, before a second word about a
    /// node or its claims, and while anybody claims what another holds.
    pub fn take(&mut self, events: impl IntoIterator<Item = Event>) {
        let (mut row, mut unsettled) = (Row::default(), Change::None);
        for event in events {
            if (row.meets(&event) || self.disputed) && unsettled == Change::Some {
                self.settle();
                (row, unsettled) = (Row::default(), Change::None);
                row.meets(&event);
            }
            let change = match event {
                Event::Listed(list) => {
                    self.reset(list);
                    (row, unsettled) = (Row::default(), Change::None);
                    continue;
                }
                Event::Applied(record) => self.enter_one(record),
                Event::Deleted(node) => self.remove(&node),
                Event::Denied(denied) => {
                    self.denied = denied;
                    Change::Some
                }
                Event::OptedOut(opted_out) => {
                    self.opted_out = opted_out;
                    Change::Some
                }
                Event::Silent(_) | Event::Answers => Change::None,
            };
            if change == Change::Some {
                unsettled = Change::Some;
            }
        }
        if unsettled == Change::Some {
            self.settle();
        }
    }

    /// Takes a source's complete list, in any order. A node that is listed twice with different words counts as unreadable.
    pub fn reset(&mut self, list: Vec<Result<Record, Unreadable>>) {
        let (records, unreadable) = sort(list);
        let names: BTreeSet<NodeName> = records
            .keys()
            .chain(unreadable.iter().filter_map(|bad| bad.node.as_ref()))
            .cloned()
            .collect();

        self.remove_absent(names);
        self.unreadable = unreadable;
        self.left_out = 0;
        self.unlist_own();
        for record in records.into_values() {
            self.enter(record, None);
        }
        self.origin = Some(Origin::Source);
        self.settle();
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
                self.unreadable.insert(bad);
                return Change::Some;
            }
        };
        let settled = self.unreadable.is_empty() && self.brake.is_none();
        self.unreadable.retain(|bad| bad.node.as_ref() != Some(&record.node));
        self.release_brake(&record.node);
        if self.enter(record, None) == Change::None && settled {
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
        self.entries.remove(node);
        self.keys.remove(node);
    }

    /// The source's latest word does not have this node in it; what it last said of it counts.
    fn unlist_own(&mut self) {
        if let Some(own) = &mut self.own {
            own.listed = false;
        }
    }

    /// Takes in what the source says of this node itself.
    fn enter_own(&mut self, record: Record) -> Change {
        if self.own.as_ref().is_some_and(|own| own.listed && own.record == record) {
            return Change::None;
        }
        self.own = Some(OwnEntry {
            claims: Claims::of(&record, None, &self.protected),
            record,
            listed: true,
        });
        Change::Some
    }

    /// Takes a record in. `remembered` is an epoch from an earlier run.
    fn enter(&mut self, record: Record, remembered: Option<u64>) -> Change {
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

        let seen = known.and_then(|entry| entry.epoch).max(remembered);
        let claims = Claims::of(&record, seen, &self.protected);
        let epoch = claims
            .announcement
            .as_ref()
            .map_or(seen, |announcement| Some(announcement.epoch).max(seen));
        let record = bounded(record);
        self.entries
            .insert(record.node.clone(), Entry { record, claims, epoch });
        Change::Some
    }

    /// Decides who holds what, and who is a peer.
    fn settle(&mut self) {
        let Some(origin) = self.origin else { return };
        // Only of those against whom there is something.
        let mut reasons: BTreeMap<NodeName, Vec<Reason>> = BTreeMap::new();
        for (node, entry) in &self.entries {
            let own = entry
                .claims
                .reasons
                .iter()
                .chain(entry.claims.announcement.as_ref().err())
                .cloned();
            let key = entry
                .claims
                .announcement
                .as_ref()
                .ok()
                .map(|announced| announced.public_key);
            let denied = self.denial(node, key).map(|(what, remark)| Reason::Denied {
                what,
                remark: Excerpt::of(remark),
            });
            let against: Vec<Reason> = denied.into_iter().chain(own).collect();
            if !against.is_empty() {
                reasons.insert(node.clone(), against);
            }
        }
        let mut lost = self.settle_keys();
        lost.extend(self.settle_prefixes());
        let contested = self.settle_addresses();
        self.disputed = !lost.is_empty() || !contested.is_empty();
        for (node, reason) in lost {
            reasons.entry(node).or_default().push(reason);
        }

        let mut held: BTreeMap<&NodeName, BTreeSet<Prefix>> = BTreeMap::new();
        for (&prefix, node) in &self.prefixes {
            held.entry(node).or_default().insert(prefix);
        }
        let mut peers = BTreeMap::new();
        let mut refused = BTreeMap::new();
        for (node, entry) in &self.entries {
            let pod_prefixes = held.remove(node).unwrap_or_default();
            let reasons = reasons.remove(node).unwrap_or_default();
            let is_held = |address: &IpAddr| self.addresses.get(address) == Some(node);
            let mut addresses = entry.claims.addresses.clone();
            addresses.retain(is_held);
            match &entry.claims.announcement {
                Ok(announcement) if reasons.is_empty() => {
                    let peer = peer(announcement, pod_prefixes, addresses, entry.record.zone.clone());
                    peers.insert(node.clone(), peer);
                }
                Ok(_) | Err(_) => {
                    let had_a_key = self.keys.contains_key(node) || reasons != [Reason::NoAnnouncement];
                    let refusal = Refused {
                        reasons,
                        pod_prefixes,
                        addresses: if had_a_key { addresses } else { Vec::new() },
                    };
                    refused.insert(node.clone(), refusal);
                }
            }
        }
        for bad in &self.unreadable {
            let Some(node) = &bad.node else { continue };
            if *node != self.local.node && !self.entries.contains_key(node) {
                let reasons = vec![Reason::Unreadable(bad.reason.clone())];
                refused.insert(
                    node.clone(),
                    Refused {
                        reasons,
                        pod_prefixes: BTreeSet::new(),
                        addresses: Vec::new(),
                    },
                );
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
            problems: self.problems(contested.into_iter().chain(doubtful)),
        };
        if self.snapshot.as_deref() != Some(&snapshot) {
            self.snapshot = Some(Arc::new(snapshot));
        }
    }

    /// Gives each key that exactly one node claims to that node, unless somebody holds it. Returns who is refused.
    fn settle_keys(&mut self) -> Vec<(NodeName, Reason)> {
        let mut holders: BTreeMap<PublicKey, NodeName> = BTreeMap::new();
        self.keys.retain(|node, key| {
            let kept = self.entries.contains_key(node) && *key != self.local.public_key && !holders.contains_key(key);
            if kept {
                holders.insert(*key, node.clone());
            }
            kept
        });
        let claimed: Vec<(&NodeName, PublicKey)> = self
            .entries
            .iter()
            .filter_map(|(node, entry)| Some((node, entry.claims.announcement.as_ref().ok()?.public_key)))
            .collect();

        // A node that takes a new key sets its old one free, which may serve another claimer. Each round serves somebody for good.
        let contested = loop {
            let mut open: BTreeMap<PublicKey, BTreeSet<NodeName>> = BTreeMap::new();
            for &(node, key) in &claimed {
                if key != self.local.public_key && !holders.contains_key(&key) {
                    open.entry(key).or_default().insert(node.clone());
                }
            }
            let sole = |nodes: &BTreeSet<NodeName>| nodes.first().filter(|_| nodes.len() == 1).cloned();
            let served: Vec<(PublicKey, NodeName)> = open
                .iter()
                .filter_map(|(&key, nodes)| Some((key, sole(nodes)?)))
                .collect();
            if served.is_empty() {
                break open;
            }
            for (key, node) in served {
                if let Some(old) = self.keys.insert(node.clone(), key) {
                    holders.remove(&old);
                }
                holders.insert(key, node);
            }
        };

        let reason = |node: &NodeName, key: PublicKey| match holders.get(&key) {
            Some(holder) if holder == node => None,
            Some(holder) => Some(Reason::KeyHeld {
                key,
                holder: holder.clone(),
            }),
            None if key == self.local.public_key => Some(Reason::OwnKey),
            None => {
                let rival = contested
                    .get(&key)
                    .and_then(|nodes| first_other(nodes, node))
                    .unwrap_or(node)
                    .clone();
                Some(Reason::KeyContested { key, rival })
            }
        };
        claimed
            .into_iter()
            .filter_map(|(node, key)| Some((node.clone(), reason(node, key)?)))
            .collect()
    }

    /// Gives each prefix that no other node claims a part of to its node. Returns who is refused.
    fn settle_prefixes(&mut self) -> Vec<(NodeName, Reason)> {
        let mut held = Ranges::default();
        for prefix in self.own().pod_prefixes {
            held.insert(prefix, self.local.node.clone());
        }
        self.prefixes.retain(|&prefix, node| {
            let claims = self
                .entries
                .get(node)
                .is_some_and(|entry| entry.claims.prefixes.contains(&prefix));
            let kept = claims && held.other(prefix, node).is_none();
            if kept {
                held.insert(prefix, node.clone());
            }
            kept
        });

        let (mut open, mut lost) = (Vec::new(), Vec::new());
        let mut rivals = Ranges::default();
        for (node, entry) in &self.entries {
            for &prefix in &entry.claims.prefixes {
                if self.prefixes.get(&prefix) == Some(node) {
                    continue;
                }
                if held.other(prefix, node).is_some() {
                    lost.push((prefix, node));
                } else {
                    rivals.insert(prefix, node.clone());
                    open.push((prefix, node));
                }
            }
        }
        let mut contested = Vec::new();
        for (prefix, node) in open {
            if let Some(rival) = rivals.other(prefix, node).cloned() {
                contested.push((node.clone(), Reason::PrefixContested { prefix, rival }));
            } else {
                self.prefixes.insert(prefix, node.clone());
                held.insert(prefix, node.clone());
            }
        }
        // Who has just been given a prefix holds it too, and may be the one to name.
        let held = lost.into_iter().filter_map(|(prefix, node)| {
            let holder = held.other(prefix, node)?.clone();
            Some((node.clone(), Reason::PrefixHeld { prefix, holder }))
        });
        held.chain(contested).collect()
    }

    /// Gives each underlay address that exactly one node has to that node, unless somebody holds it. Returns what is left unused.
    fn settle_addresses(&mut self) -> Vec<Problem> {
        let mut claimers: BTreeMap<IpAddr, BTreeSet<NodeName>> = BTreeMap::new();
        for (node, entry) in &self.entries {
            for &address in &entry.claims.addresses {
                claimers.entry(address).or_default().insert(node.clone());
            }
        }
        self.addresses
            .retain(|address, node| claimers.get(address).is_some_and(|nodes| nodes.contains(node)));
        let mut problems = Vec::new();
        for (address, mut nodes) in claimers {
            if nodes.len() == 1 {
                self.addresses.extend(nodes.into_iter().map(|node| (address, node)));
                continue;
            }
            let holder = self.addresses.get(&address).cloned();
            if let Some(holder) = &holder {
                nodes.remove(holder);
            }
            problems.push(Problem::Address {
                address,
                holder,
                unused: nodes,
            });
        }
        problems
    }

    /// Who of those that opt out may, and what is wrong with the others. The pods of a node that is refused are nobody's.
    fn settle_opt_outs(&self, own: &Own, peers: &BTreeMap<NodeName, Peer>) -> (Option<OptOuts>, Vec<Problem>) {
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
    fn problems(&self, contested: impl IntoIterator<Item = Problem>) -> Vec<Problem> {
        let of_records = self
            .entries
            .values()
            .flat_map(|entry| entry.claims.problems.iter().cloned());
        let mut problems: BTreeSet<Problem> = of_records.chain(contested).collect();
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
        let denied = self.denial(&self.local.node, Some(self.local.public_key));
        problems.extend(denied.map(|(what, _)| Problem::LocalDenied(what)));
        problems.into_iter().collect()
    }

    /// What is known of this node itself.
    fn own(&self) -> Own {
        let claims = self.own.as_ref().map(|own| &own.claims);
        Own {
            pod_prefixes: match (&self.local.pod_prefixes, claims) {
                (Some(configured), _) => configured.clone(),
                (None, Some(claims)) => claims.prefixes.clone(),
                (None, None) => BTreeSet::new(),
            },
            addresses: claims.map(|claims| claims.addresses.clone()).unwrap_or_default(),
            zone: self.own.as_ref().and_then(|own| own.record.zone.clone()),
        }
    }

    /// By what a node is on the deny list, and the remark beside it.
    fn denial(&self, node: &NodeName, key: Option<PublicKey>) -> Option<(&'static str, &str)> {
        if self.denied.is_empty() {
            return None;
        }
        let listed = |text: &str| self.denied.get(text).map(String::as_str);
        let by_name = listed(node.as_str()).map(|remark| ("name", remark));
        by_name.or_else(|| {
            let key = key?;
            let remark = listed(&key.fingerprint()).or_else(|| listed(&key.to_string()));
            remark.map(|remark| ("key", remark))
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
        if let Some(other) = announced.filter(|announced| announced.public_key != self.local.public_key) {
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
fn bounded(mut record: Record) -> Record {
    if let Some(raw) = record
        .announcement
        .as_mut()
        .filter(|raw| raw.len() > Announcement::MAX_BYTES)
    {
        raw.clear();
    }
    record
}

fn peer(
    announcement: &Announcement,
    pod_prefixes: BTreeSet<Prefix>,
    addresses: Vec<IpAddr>,
    zone: Option<Zone>,
) -> Peer {
    Peer {
        public_key: announcement.public_key,
        endpoints: announcement.endpoints.clone(),
        pod_prefixes,
        addresses,
        epoch: announcement.epoch,
        backend: announcement.backend,
        mode: announcement.mode,
        overlays: announcement.overlays.clone(),
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
