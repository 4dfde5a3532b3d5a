//! Finds out whether this agent's token may change other nodes' objects, which it must not: whoever takes over one node could then take any node's
//! traffic (DESIGN: a token changes its own Node only).
//!
//! RBAC cannot tell one Node from another, an admission policy can, and only a request shows whether there is one. So an access review is followed
//! by a dry run on a foreign Node, which changes nothing.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use shroud_model::NodeName;
use tokio::sync::watch;

use super::api::{Api, Failure, apply, post};
use super::follow::chance;
use super::news;
use super::object::Node;
use super::pace::Pace;
use super::publish::{FIELD_MANAGER, announced};
use crate::FailureKind;

/// How often is asked; a policy can be taken away.
const EVERY: Duration = Duration::from_secs(3600);
/// How far the questions of nodes that start together are spread.
const SPREAD: Duration = Duration::from_secs(2);

/// A Node that is not this node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ForeignNode {
    name: NodeName,
    uid: String,
}

impl ForeignNode {
    /// The first Node of a list that is somebody else's.
    pub(super) fn among<'a>(mut nodes: impl Iterator<Item = &'a Node>, own: &NodeName) -> Option<Self> {
        nodes.find_map(|node| {
            let record = node.record.as_ref().ok().filter(|record| record.node != *own)?;
            Some(Self {
                name: record.node.clone(),
                uid: node.uid.clone(),
            })
        })
    }
}

/// Asks once a foreign Node is known, and every hour from then on. `tell` hears the answer: what is wrong, or nothing.
pub(super) async fn check(
    api: &Api,
    mut foreign: watch::Receiver<Option<ForeignNode>>,
    tell: impl Fn(Result<Option<String>, Failure>),
) -> Infallible {
    let mut pace = Pace::new(Instant::now() + SPREAD.mul_f64(chance()));
    loop {
        let Some(node) = foreign.borrow_and_update().clone() else {
            news(&mut foreign).await;
            continue;
        };
        tokio::time::sleep_until(pace.next().into()).await;
        match may_change(api, &node).await {
            Ok(true) => tell(Ok(Some(format!(
                "this agent's token may change the Node {}, so whoever takes over this node can take any node's traffic: install the ValidatingAdmissionPolicy of deploy/",
                node.name
            )))),
            Ok(false) => tell(Ok(None)),
            Err(failure) => {
                pace.failed(Instant::now(), failure.retry_after, chance());
                tell(Err(failure));
                continue;
            }
        }
        pace.succeeded();
        tokio::time::sleep(EVERY).await;
    }
}

async fn may_change(api: &Api, node: &ForeignNode) -> Result<bool, Failure> {
    #[derive(Deserialize)]
    struct Review {
        status: Access,
    }

    #[derive(Deserialize)]
    struct Access {
        allowed: bool,
    }

    let ForeignNode { name, uid } = node;
    let attempt = format!("ask whether we may change Node {name}");
    let question = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": { "resourceAttributes": { "verb": "patch", "resource": "nodes", "name": name } },
    });
    let target = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let request = post(&attempt, target, &question)?;
    let review: Review = serde_json::from_slice(&api.ask(&attempt, request).await?)
        .map_err(|error| Failure::new(FailureKind::Malformed, &attempt, error))?;
    if !review.status.allowed {
        return Ok(false);
    }

    let attempt = format!("try to change Node {name}, without doing it");
    let target = format!("/api/v1/nodes/{name}?fieldManager={FIELD_MANAGER}&force=true&dryRun=All");
    let request = apply(&attempt, &target, &announced(name, uid, "{}"))?;
    match api.ask(&attempt, request).await {
        Ok(_) => Ok(true),
        // A policy that does not say why it denies answers 422.
        Err(failure) if matches!(failure.kind, FailureKind::Forbidden | FailureKind::Invalid) => Ok(false),
        // The Node is not there any more; another will be.
        Err(failure) if matches!(failure.kind, FailureKind::NotFound | FailureKind::Conflict) => Ok(false),
        Err(failure) => Err(failure),
    }
}
