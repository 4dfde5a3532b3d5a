//! Tells the cluster of nodes that are refused, as Events on their Node objects, where operators look.
//!
//! Every agent refuses the same nodes for the same reasons. So that thousands of them do not say the same thing at once, each refused node has a
//! few reporters among those who know it, and they write the same Event: the second finds it there.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use shroud_model::NodeName;
use tokio::sync::watch;

use super::api::{Api, Failure, post};
use super::follow::chance;
use super::pace::Pace;
use super::publish::FIELD_MANAGER;
use super::{Wanted, news};
use crate::{FailureKind, Reason, Snapshot};

/// How many nodes report each refused one.
const REPORTERS: usize = 3;
/// The longest note of an Event, in bytes (events.k8s.io/v1).
const LONGEST_NOTE: usize = 1024;

/// Why a node is refused, as the cluster is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Complaint {
    /// The sentences.
    pub(super) note: String,
}

/// The refused nodes that `own` is to report. A node that has merely announced nothing is only late.
pub fn complaints(snapshot: &Snapshot, own: &NodeName) -> BTreeMap<NodeName, Complaint> {
    let mut complaints = BTreeMap::new();
    for (node, refused) in &snapshot.refused {
        let told = refused
            .reasons
            .iter()
            .filter(|reason| **reason != Reason::NoAnnouncement);
        let sentences: Vec<String> = told.map(ToString::to_string).collect();
        if !sentences.is_empty() && reports(snapshot, own, node) {
            let mut note = sentences.join("; ");
            // The sentences are ASCII.
            note.truncate(LONGEST_NOTE);
            complaints.insert(node.clone(), Complaint { note });
        }
    }
    complaints
}

/// Whether a node is among the reporters of another: those whose names, mixed with its name, weigh most (rendezvous hashing), so that all agree
/// on them without asking, and few change when a node joins.
fn reports(snapshot: &Snapshot, own: &NodeName, refused: &NodeName) -> bool {
    let weight = |node: &NodeName| mix(node.id().0 ^ refused.id().0.rotate_left(32));
    let mine = weight(own);
    let heavier = snapshot.peers.keys().filter(|peer| weight(peer) > mine);
    heavier.take(REPORTERS).count() < REPORTERS
}

/// Spreads the bits of a number (the finalizer of MurmurHash3).
fn mix(mut number: u64) -> u64 {
    number ^= number >> 33;
    number = number.wrapping_mul(0xff51_afd7_ed55_8ccd);
    number ^= number >> 33;
    number = number.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    number ^ (number >> 33)
}

/// Writes an Event for each complaint that is new, for ever. Best effort: what the server does not want is not tried again.
pub(super) async fn complain(
    api: &Api,
    own: &NodeName,
    mut wanted: watch::Receiver<Wanted>,
    tell: impl Fn(&Failure),
) -> Infallible {
    let mut told: BTreeSet<(NodeName, Complaint)> = BTreeSet::new();
    let mut pace = Pace::new(Instant::now());
    loop {
        let complaints = wanted.borrow_and_update().complaints.clone();
        told.retain(|(node, complaint)| complaints.get(node) == Some(complaint));
        let untold = complaints.into_iter().find(|complaint| !told.contains(complaint));
        let Some((node, complaint)) = untold else {
            news(&mut wanted).await;
            continue;
        };
        tokio::time::sleep_until(pace.next().into()).await;
        match write(api, own, &node, &complaint).await {
            Ok(()) => pace.succeeded(),
            // Another reporter was first.
            Err(failure) if failure.kind == FailureKind::Conflict => pace.succeeded(),
            Err(failure) => {
                tell(&failure);
                pace.failed(Instant::now(), failure.retry_after, chance());
                if is_passing(failure.kind) {
                    continue;
                }
            }
        }
        told.insert((node, complaint));
    }
}

/// Whether the same request may succeed a while later.
fn is_passing(kind: FailureKind) -> bool {
    match kind {
        FailureKind::Folder
        | FailureKind::Credentials
        | FailureKind::Unreachable
        | FailureKind::Silent
        | FailureKind::Unauthorized
        | FailureKind::Busy
        | FailureKind::Server => true,
        FailureKind::Forbidden
        | FailureKind::NotFound
        | FailureKind::Conflict
        | FailureKind::Expired
        | FailureKind::Invalid
        | FailureKind::BadRequest
        | FailureKind::Malformed => false,
    }
}

async fn write(api: &Api, own: &NodeName, node: &NodeName, complaint: &Complaint) -> Result<(), Failure> {
    let attempt = format!("write an Event on Node {node}");
    // Events on objects without a namespace are in this one.
    let target = format!("/apis/events.k8s.io/v1/namespaces/default/events?fieldManager={FIELD_MANAGER}");
    let request = post(&attempt, &target, &event(own, node, complaint, &Timestamp::now()))?;
    api.ask(&attempt, request).await.map(drop)
}

fn event(own: &NodeName, node: &NodeName, complaint: &Complaint, now: &Timestamp) -> Value {
    let content = complaint
        .note
        .bytes()
        .fold(node.id().0, |hash, byte| mix(hash ^ u64::from(byte)));
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": { "name": format!("{node}.{content:016x}"), "namespace": "default" },
        // A fraction of a second must be there.
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string(),
        "reportingController": "shroud.dev/agent",
        "reportingInstance": own,
        "action": "Refuse",
        "reason": "ShroudRefused",
        // `kubectl describe node` looks for Events by this: the uid of a Node is its name there.
        "regarding": { "apiVersion": "v1", "kind": "Node", "name": node, "uid": node },
        "type": "Warning",
        "note": complaint.note,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shroud_model::PublicKey;

    use super::*;
    use crate::{Announcement, Directory, Local, PublicKeys, Record};

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// What `own` knows where `count` nodes are well, one announces nonsense and one nothing.
    fn snapshot(own: usize, count: usize) -> Arc<Snapshot> {
        let record = |node: String, announcement: Option<String>| {
            Ok(Record {
                node: name(&node),
                addresses: vec![
                    format!(
                        "172.18.{}.{}",
                        node.len(),
                        node.bytes().map(u32::from).sum::<u32>() % 250
                    )
                    .parse()
                    .unwrap(),
                ],
                pod_prefixes: Vec::new(),
                zone: None,
                announcement,
            })
        };
        let good = |number: usize| {
            let node = format!("n{number}");
            let mut key = [7; 32];
            key[..8].copy_from_slice(&(number as u64 + 9).to_le_bytes());
            let address = format!("10.0.{}.{}", number / 250, number % 250 + 1);
            let announcement = format!(
                r#"{{"version":1,"publicKey":"{}","port":51820,"endpoints":["{address}:51820"],"epoch":1,"backend":"kernel","mode":"native"}}"#,
                PublicKey::from_bytes(key).unwrap()
            );
            assert!(Announcement::parse(&announcement).is_ok());
            Ok(Record {
                node: name(&node),
                addresses: vec![address.parse().unwrap()],
                pod_prefixes: Vec::new(),
                zone: None,
                announcement: Some(announcement),
            })
        };
        let local = Local {
            node: name(&format!("n{own}")),
            keys: PublicKeys::only(PublicKey::from_bytes([3; 32]).unwrap(), 1),
            pod_prefixes: Some(BTreeSet::new()),
        };
        let mut directory = Directory::new(local, BTreeSet::new());
        let others = (0..count).filter(|number| *number != own).map(good);
        let bad = [
            record("bad".to_owned(), Some("nonsense".to_owned())),
            record("late".to_owned(), None),
        ];
        directory.reset(others.chain(bad).collect());
        let snapshot = directory.snapshot().unwrap();
        assert_eq!((snapshot.peers.len(), snapshot.refused.len()), (count - 1, 2));
        snapshot
    }

    #[test]
    fn a_refused_node_has_three_reporters_among_hundreds_and_a_late_one_none() {
        let mut reporters = 0;
        for own in 0..200 {
            let complaints = complaints(&snapshot(own, 200), &name(&format!("n{own}")));
            assert!(complaints.keys().all(|node| *node == name("bad")));
            reporters += complaints.len();
        }

        assert_eq!(reporters, REPORTERS);
    }

    #[test]
    fn two_nodes_report_each_other_to_the_cluster_even_when_alone() {
        let complaints = complaints(&snapshot(0, 1), &name("n0"));

        let note = "its announcement is refused: it is not JSON, at line 1, column 2".to_owned();
        assert_eq!(complaints, BTreeMap::from([(name("bad"), Complaint { note })]));
    }

    #[test]
    fn an_event_has_the_form_that_kubernetes_takes_and_all_reporters_write_the_same_one() {
        let complaint = Complaint {
            note: "its announcement is refused: it is not JSON, at line 1, column 2".to_owned(),
        };
        let time = Timestamp::from_second(1_700_000_000).unwrap();

        let [first, second] = ["a", "b"].map(|own| event(&name(own), &name("bad"), &complaint, &time));

        assert_eq!(first["metadata"], second["metadata"]);
        assert_eq!(first["eventTime"], "2023-11-14T22:13:20.000000Z");
    }
}
