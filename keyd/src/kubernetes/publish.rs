//! Keeps what this node says of itself on its own Node object: the announcement, and that the node has a network.
//!
//! Both are written by server-side apply under a field manager of our own, only when what is there differs, and only once the Node was seen:
//! its uid goes with each write, so that a Node that is gone meanwhile is never made by us.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use shroud_model::NodeName;
use tokio::sync::watch;

use super::api::{self, Api, Failure};
use super::follow::chance;
use super::object::Node;
use super::pace::Pace;
use super::{Wanted, news};
use crate::ANNOTATION;

/// The name under which the API server remembers that the annotation is ours.
pub const FIELD_MANAGER: &str = "shroud-agent";
/// The least time between two writes, also when somebody else keeps writing something different there.
const BETWEEN_WRITES: Duration = Duration::from_secs(2);

/// This node's Node object, as it was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OwnNode {
    uid: String,
    announcement: Option<String>,
    network_unavailable: Option<String>,
}

/// Something that is to be on the Node and is not.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Write {
    /// The annotation.
    Announcement(String),
    /// The condition `NetworkUnavailable`: false. Cloud providers set it to true, and only a network provider takes it back; as long as it is
    /// true, no pod is scheduled there (node.kubernetes.io/network-unavailable).
    NetworkAvailable,
}

impl OwnNode {
    /// What is kept of a Node, if it is this node's.
    pub(super) fn of(node: &Node, own: &NodeName) -> Option<Self> {
        let record = node.record.as_ref().ok().filter(|record| record.node == *own)?;
        Some(Self {
            uid: node.uid.clone(),
            announcement: record.announcement.clone(),
            network_unavailable: node.network_unavailable.clone(),
        })
    }

    /// The next write that brings the Node closer to what is wanted.
    fn lacks(&self, wanted: &Wanted) -> Option<Write> {
        let announcement = wanted.announcement.as_ref();
        if let Some(announcement) = announcement.filter(|wanted| self.announcement.as_ref() != Some(wanted)) {
            return Some(Write::Announcement(announcement.clone()));
        }
        let is_available = self.network_unavailable.as_deref() == Some("False");
        (wanted.network_available && !is_available).then_some(Write::NetworkAvailable)
    }

    /// The Node after a write.
    fn take(&mut self, write: Write) {
        match write {
            Write::Announcement(announcement) => self.announcement = Some(announcement),
            Write::NetworkAvailable => self.network_unavailable = Some("False".to_owned()),
        }
    }
}

/// Writes whenever something wanted is not on the Node, for ever. `tell` hears of each failure and each success.
pub(super) async fn publish(
    api: &Api,
    node: &NodeName,
    mut wanted: watch::Receiver<Wanted>,
    own: &watch::Sender<Option<OwnNode>>,
    tell: impl Fn(Result<(), Failure>),
) -> Infallible {
    let mut seen = own.subscribe();
    let mut pace = Pace::new(Instant::now());
    loop {
        let have = seen.borrow_and_update().clone();
        let due = have.and_then(|have| Some((have.lacks(&wanted.borrow_and_update())?, have.uid)));
        if let Some((write, uid)) = due {
            tokio::time::sleep_until(pace.next().into()).await;
            match apply(api, node, &uid, &write).await {
                Ok(()) => {
                    pace.succeeded();
                    tell(Ok(()));
                    // What the watch has told meanwhile is younger than what we know: another hand may have been there since.
                    if !seen.has_changed().unwrap_or(false) {
                        own.send_modify(|own| {
                            if let Some(own) = own.as_mut().filter(|own| own.uid == uid) {
                                own.take(write);
                            }
                        });
                    }
                    tokio::time::sleep(BETWEEN_WRITES).await;
                }
                Err(failure) => {
                    pace.failed(Instant::now(), failure.retry_after, chance());
                    tell(Err(failure));
                }
            }
            continue;
        }
        tokio::select! {
            () = news(&mut wanted) => {}
            () = news(&mut seen) => {}
        }
    }
}

async fn apply(api: &Api, node: &NodeName, uid: &str, write: &Write) -> Result<(), Failure> {
    let (attempt, path, body) = match write {
        Write::Announcement(announcement) => {
            let attempt = format!("write {ANNOTATION} on Node {node}");
            (attempt, "", announced(node, uid, announcement))
        }
        Write::NetworkAvailable => {
            let attempt = format!("write the condition NetworkUnavailable on Node {node}");
            (attempt, "/status", available(node, uid, &Timestamp::now()))
        }
    };
    let target = format!("/api/v1/nodes/{node}{path}?fieldManager={FIELD_MANAGER}&force=true");
    let request = api::apply(&attempt, &target, &body)?;
    api.ask(&attempt, request).await.map(drop)
}

/// A Node with our annotation and nothing else, to be applied.
pub(super) fn announced(node: &NodeName, uid: &str, announcement: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node, "uid": uid, "annotations": { ANNOTATION: announcement } },
    })
}

/// A Node's status with the one condition, to be applied.
fn available(node: &NodeName, uid: &str, now: &Timestamp) -> Value {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node, "uid": uid },
        "status": { "conditions": [{
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "ShroudIsUp",
            "message": "shroud attaches pods on this node, and the gate is on every uplink",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(announcement: Option<&str>, network_unavailable: Option<&str>) -> OwnNode {
        OwnNode {
            uid: "7".to_owned(),
            announcement: announcement.map(str::to_owned),
            network_unavailable: network_unavailable.map(str::to_owned),
        }
    }

    fn wanted(announcement: Option<&str>, network_available: bool) -> Wanted {
        Wanted {
            announcement: announcement.map(str::to_owned),
            network_available,
            ..Wanted::default()
        }
    }

    #[test]
    fn only_what_differs_is_written_the_announcement_first() {
        let announce = || Some(Write::Announcement("a".to_owned()));
        let cases = [
            (own(None, None), wanted(None, false), None),
            (own(None, None), wanted(Some("a"), true), announce()),
            (own(Some("b"), Some("False")), wanted(Some("a"), true), announce()),
            (
                own(Some("a"), None),
                wanted(Some("a"), true),
                Some(Write::NetworkAvailable),
            ),
            (
                own(Some("a"), Some("True")),
                wanted(Some("a"), true),
                Some(Write::NetworkAvailable),
            ),
            (own(Some("a"), Some("False")), wanted(Some("a"), true), None),
            (own(Some("a"), Some("True")), wanted(Some("a"), false), None),
            (own(Some("a"), Some("True")), wanted(None, false), None),
        ];
        for (have, want, write) in cases {
            assert_eq!(have.lacks(&want), write, "{have:?} {want:?}");
        }
    }

    #[test]
    fn after_all_writes_nothing_is_lacking() {
        let (mut have, want) = (own(None, Some("True")), wanted(Some("a"), true));
        let mut writes = 0;

        while let Some(write) = have.lacks(&want) {
            have.take(write);
            writes += 1;
        }

        assert_eq!(writes, 2);
    }

    #[test]
    fn a_time_has_the_form_that_kubernetes_reads() {
        let object = available(
            &"a".parse().unwrap(),
            "7",
            &Timestamp::from_second(1_700_000_000).unwrap(),
        );

        assert_eq!(
            object["status"]["conditions"][0]["lastTransitionTime"],
            "2023-11-14T22:13:20Z"
        );
    }
}
