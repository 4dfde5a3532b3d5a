//! The admission rule for agents, as data: what a `ValidatingAdmissionPolicy` would check before an object is changed. Pure.

use serde_json::{Value, json};

use crate::identity::User;
use crate::resource::Resource;
use crate::status::{Refusal, details};

/// The claim of a token that names the node its pod runs on.
pub(crate) const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";

/// A policy and its binding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The name of the policy, which answers quote.
    pub name: String,
    /// The name of its binding.
    pub binding: String,
    /// Whom it judges; all others pass.
    pub username: String,
    /// What must hold for a change of a Node, in order; the first that does not is answered.
    pub validations: Vec<Validation>,
    /// What happens then.
    pub action: Action,
}

/// One rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validation {
    /// What must hold.
    pub check: Check,
    /// What the answer says otherwise. `{node}` is the node of the token, `{object}` the one that was to be changed.
    pub message: String,
    /// Whether the answer is 403 Forbidden or, without a reason in the policy, 422 Invalid.
    pub forbidden: bool,
}

/// What a rule asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// The token is bound to a node.
    BoundToNode,
    /// The object is that node.
    OwnNode,
    /// `spec` stays as it is.
    SpecUnchanged,
    /// Of the main resource only this annotation changes.
    OnlyAnnotation(String),
    /// Of `/status` only the condition of this type changes.
    OnlyCondition(String),
}

/// What happens to a change that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is refused.
    Deny,
    /// It is done, and the answer carries a warning.
    Warn,
}

impl Policy {
    /// The policy that Shroud ships: an agent changes only its own Node, and there only its annotation and its condition.
    pub fn agent(username: &str) -> Self {
        let rule = |check, message: &str| Validation {
            check,
            message: message.into(),
            forbidden: true,
        };
        Self {
            name: "shroud-agent".into(),
            binding: "shroud-agent".into(),
            username: username.into(),
            validations: vec![
                rule(Check::BoundToNode, "the token is not bound to a node"),
                rule(
                    Check::OwnNode,
                    "the agent on node '{node}' may not change node '{object}'",
                ),
                rule(
                    Check::OnlyAnnotation("shroud.dev/node".into()),
                    "an agent may change only the annotation shroud.dev/node",
                ),
                rule(
                    Check::OnlyCondition("NetworkUnavailable".into()),
                    "an agent may change only the condition NetworkUnavailable",
                ),
            ],
            action: Action::Deny,
        }
    }

    /// Judges a change of a Node. A warning is text for a header.
    pub(crate) fn judge(
        &self,
        user: &User,
        resource: &Resource,
        subresource: &str,
        old: &Value,
        new: &Value,
    ) -> Result<Option<String>, Refusal> {
        if user.username != self.username || resource.plural != "nodes" {
            return Ok(None);
        }
        let node = user
            .extra
            .get(NODE_CLAIM)
            .and_then(|values| values.first())
            .map_or("", String::as_str);
        let name = new["metadata"]["name"].as_str().unwrap_or_default();
        let Some(broken) = self
            .validations
            .iter()
            .find(|one| !one.check.holds(node, subresource, old, new))
        else {
            return Ok(None);
        };
        let message = broken.message.replace("{node}", node).replace("{object}", name);
        let who = format!(
            "ValidatingAdmissionPolicy '{}' with binding '{}'",
            self.name, self.binding
        );
        if self.action == Action::Warn {
            return Ok(Some(format!("Validation failed for {who}: {message}")));
        }
        let sentence = format!("{who} denied request: {message}");
        let (code, reason) = if broken.forbidden {
            (403, "Forbidden")
        } else {
            (422, "Invalid")
        };
        let mut details = details(name, resource.group, resource.plural);
        details["causes"] = json!([{"message": sentence}]);
        let message = format!("{} {name:?} is forbidden: {sentence}", resource.qualified());
        Err(Refusal::new(code, reason, message).with_details(details))
    }
}

impl Check {
    fn holds(&self, node: &str, subresource: &str, old: &Value, new: &Value) -> bool {
        match self {
            Self::BoundToNode => !node.is_empty(),
            Self::OwnNode => new["metadata"]["name"] == node,
            Self::SpecUnchanged => new["spec"] == old["spec"],
            Self::OnlyAnnotation(key) => {
                !subresource.is_empty() || without_annotation(old, key) == without_annotation(new, key)
            }
            Self::OnlyCondition(kind) => {
                subresource != "status" || without_condition(old, kind) == without_condition(new, kind)
            }
        }
    }
}

fn without_annotation(object: &Value, key: &str) -> Value {
    let mut object = without_versions(object);
    if let Some(annotations) = object["metadata"]["annotations"].as_object_mut() {
        annotations.remove(key);
    }
    crate::fields::without_empty_maps(object)
}

fn without_condition(object: &Value, kind: &str) -> Value {
    let mut object = without_versions(object);
    if let Some(status) = object["status"].as_object_mut() {
        let conditions = status.remove("conditions").unwrap_or_default();
        let others: Vec<_> = conditions
            .as_array()
            .into_iter()
            .flatten()
            .filter(|one| one["type"] != kind)
            .cloned()
            .collect();
        status.insert("conditions".into(), others.into());
    }
    object
}

fn without_versions(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
        metadata.remove("resourceVersion");
    }
    object
}
