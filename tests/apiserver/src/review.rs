//! The two reviews with which a client asks about itself: who it is, and what it may do.

use std::sync::PoisonError;

use serde_json::{Value, json};

use crate::access::{self, Asked};
use crate::clock;
use crate::context::Context;
use crate::fields::{self, Fields, Manager, Operation};
use crate::identity::User;
use crate::request::{Target, Verb};
use crate::status::Refusal;

/// Answers a review.
pub(crate) fn answer(
    context: &Context,
    target: &Target,
    user: &User,
    mut review: Value,
    manager: &str,
) -> Result<Value, Refusal> {
    let now = clock::rfc3339(context.clock.now());
    let api_version = format!("{}/{}", target.group, target.version);
    match (api_version.as_str(), target.plural.as_str(), target.verb) {
        ("authentication.k8s.io/v1", "selfsubjectreviews", Verb::Create) => {
            let mut info = json!({"username": user.username, "groups": user.groups});
            if !user.uid.is_empty() {
                info["uid"] = user.uid.as_str().into();
            }
            if !user.extra.is_empty() {
                info["extra"] = json!(user.extra);
            }
            let metadata = json!({"creationTimestamp": now});
            Ok(
                json!({"kind": "SelfSubjectReview", "apiVersion": api_version, "metadata": metadata, "status": {"userInfo": info}}),
            )
        }
        ("authorization.k8s.io/v1", "selfsubjectaccessreviews", Verb::Create) => {
            let attributes = review["spec"]["resourceAttributes"].clone();
            let grants = context.grants.lock().unwrap_or_else(PoisonError::into_inner);
            let allowed = access::is_allowed(&grants, user, &Asked::reviewed(&attributes));
            review["kind"] = "SelfSubjectAccessReview".into();
            review["apiVersion"] = api_version.as_str().into();
            review["metadata"] = json!({});
            let writer = Manager {
                name: manager.into(),
                operation: Operation::Update,
                subresource: String::new(),
                api_version,
                time: Some(now),
                fields: Fields::default(),
            };
            fields::track_update(&json!({"metadata": {}, "spec": {}}), &mut review, writer);
            review["status"] = json!({"allowed": allowed});
            Ok(review)
        }
        _ => Err(Refusal::no_such_resource()),
    }
}
