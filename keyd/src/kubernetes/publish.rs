//! Keeps this node's announcement on its own Node object.
//!
//! It is written by server-side apply under a field manager of our own, only when what is there differs, and only once the Node was seen: the
//! Node's uid goes with it, so that a Node that is gone meanwhile is never made by us.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use serde_json::json;
use shroud_model::NodeName;
use tokio::sync::watch;

use super::api::{Api, Failure, FailureKind};
use super::follow::chance;
use super::pace::Pace;
use crate::{ANNOTATION, Record};

/// The name under which the API server remembers that the annotation is ours.
pub const FIELD_MANAGER: &str = "shroud-agent";
/// The least time between two writes, also when somebody else keeps writing something different there.
const BETWEEN_WRITES: Duration = Duration::from_secs(2);

/// This node's Node object, as it was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OwnNode {
    pub(super) uid: String,
    /// The announcement that it has, if any.
    pub(super) announcement: Option<String>,
}

/// Writes whenever `wanted` is not what the Node has. `tell` hears of each failure and of each success.
pub(super) async fn publish(
    api: &Api,
    node: &NodeName,
    mut wanted: watch::Receiver<Option<String>>,
    own: &watch::Sender<Option<OwnNode>>,
    tell: impl Fn(Result<(), Failure>),
) -> Infallible {
    let mut seen = own.subscribe();
    let mut pace = Pace::new(Instant::now());
    loop {
        let (want, have) = (wanted.borrow_and_update().clone(), seen.borrow_and_update().clone());
        if let (Some(announcement), Some(have)) = (want, have)
            && have.announcement.as_ref() != Some(&announcement)
        {
            tokio::time::sleep_until(pace.next().into()).await;
            match apply(api, node, &have.uid, &announcement).await {
                Ok(()) => {
                    pace.succeeded();
                    tell(Ok(()));
                    own.send_modify(|own| {
                        if let Some(own) = own.as_mut().filter(|own| own.uid == have.uid) {
                            own.announcement = Some(announcement);
                        }
                    });
                    tokio::time::sleep(BETWEEN_WRITES).await;
                }
                Err(failure) => {
                    pace.failed(Instant::now(), failure.retry_after, chance());
                    tell(Err(failure));
                }
            }
            continue;
        }
        let changed = tokio::select! {
            changed = wanted.changed() => changed,
            changed = seen.changed() => changed,
        };
        if changed.is_err() {
            // Nobody will ever want anything else.
            std::future::pending::<()>().await;
        }
    }
}

async fn apply(api: &Api, node: &NodeName, uid: &str, announcement: &str) -> Result<(), Failure> {
    let attempt = format!("write {ANNOTATION} on Node {node}");
    let object = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node, "uid": uid, "annotations": { ANNOTATION: announcement } },
    });
    let request = http::Request::patch(format!("/api/v1/nodes/{node}?fieldManager={FIELD_MANAGER}&force=true"))
        .header(http::header::CONTENT_TYPE, "application/apply-patch+yaml")
        // The whole Node is not worth its bytes.
        .header(
            http::header::ACCEPT,
            "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
        )
        .body(object.to_string().into_bytes())
        .map_err(|error| Failure::new(FailureKind::Malformed, &attempt, error))?;
    api.ask(&attempt, request).await.map(drop)
}

impl OwnNode {
    /// This node, if a record is about it.
    pub(super) fn of(uid: &str, record: &Record) -> Self {
        Self {
            uid: uid.to_owned(),
            announcement: record.announcement.clone(),
        }
    }
}
