//! Who may do what: grants, as RBAC would hold them, and the 403 of everything else. Pure.

use serde_json::Value;

use crate::identity::{ServiceAccount, User};
use crate::request::{Target, Verb};
use crate::status::{Refusal, details};

/// Something a user or group may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// A user name or a group.
    pub subject: String,
    /// `get`, `list`, …, or `*`.
    pub verbs: Vec<String>,
    /// The API group, or `*`.
    pub group: String,
    /// `nodes`, `nodes/status`, or `*`.
    pub resources: Vec<String>,
    /// Only in this namespace; everywhere without it.
    pub namespace: Option<String>,
    /// Only objects of these names; all when empty.
    pub names: Vec<String>,
}

impl Grant {
    /// Everywhere, with space-separated verbs and resources: `Grant::new("alice", "get list", "", "nodes")`.
    pub fn new(subject: &str, verbs: &str, group: &str, resources: &str) -> Self {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        Self {
            subject: subject.into(),
            verbs: words(verbs),
            group: group.into(),
            resources: words(resources),
            namespace: None,
            names: Vec::new(),
        }
    }

    /// The same in one namespace only.
    pub fn within(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// What Shroud's chart grants its agents.
    pub fn agent(account: &ServiceAccount) -> Vec<Self> {
        let who = account.username();
        vec![
            Self::new(&who, "get list watch patch", "", "nodes"),
            Self::new(&who, "patch", "", "nodes/status"),
            Self::new(&who, "list watch", "", "pods namespaces"),
            Self::new(&who, "get list watch", "", "configmaps").within(&account.namespace),
            Self::new(&who, "create patch", "events.k8s.io", "events"),
        ]
    }

    fn covers(&self, user: &User, asked: &Asked) -> bool {
        let any = |list: &[String], word: &str| list.iter().any(|one| one == "*" || one == word);
        (self.subject == user.username || user.groups.contains(&self.subject))
            && any(&self.verbs, asked.verb)
            && (self.group == "*" || self.group == asked.group)
            && any(&self.resources, &asked.resource)
            && self
                .namespace
                .as_deref()
                .is_none_or(|namespace| namespace == asked.namespace)
            && (self.names.is_empty() || self.names.iter().any(|name| name == asked.name))
    }
}

/// What somebody wants to do, in RBAC's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked<'a> {
    pub(crate) verb: &'a str,
    pub(crate) group: &'a str,
    /// With the subresource: `nodes/status`.
    pub(crate) resource: String,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
}

impl<'a> Asked<'a> {
    pub(crate) fn of(target: &'a Target) -> Self {
        let resource = if target.subresource.is_empty() {
            target.plural.clone()
        } else {
            format!("{}/{}", target.plural, target.subresource)
        };
        Self {
            verb: target.verb.name(),
            group: &target.group,
            resource,
            namespace: &target.namespace,
            name: target.selected_name(),
        }
    }

    /// What a `SelfSubjectAccessReview` asks about.
    pub(crate) fn reviewed(attributes: &'a Value) -> Self {
        let text = |name: &str| attributes[name].as_str().unwrap_or_default();
        let resource = match text("subresource") {
            "" => text("resource").to_owned(),
            subresource => format!("{}/{subresource}", text("resource")),
        };
        Self {
            verb: text("verb"),
            group: text("group"),
            resource,
            namespace: text("namespace"),
            name: text("name"),
        }
    }
}

/// Whether the user may.
pub(crate) fn is_allowed(grants: &[Grant], user: &User, asked: &Asked) -> bool {
    // Who passes the authorizer altogether needs no grant.
    user.groups.iter().any(|group| group == "system:masters")
        || (asked.verb == "create"
            && asked.resource.starts_with("selfsubject")
            && user.groups.iter().any(|group| group == "system:authenticated"))
        || grants.iter().any(|grant| grant.covers(user, asked))
}

/// 403, naming who wanted what.
pub(crate) fn forbidden(user: &User, asked: &Asked) -> Refusal {
    let plural = asked.resource.split('/').next().unwrap_or_default();
    let qualified = if asked.group.is_empty() {
        plural.to_owned()
    } else {
        format!("{plural}.{}", asked.group)
    };
    let object = if asked.name.is_empty() {
        qualified
    } else {
        format!("{qualified} {:?}", asked.name)
    };
    let place = match asked.namespace {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    let message = format!(
        "{object} is forbidden: User {:?} cannot {} resource {:?} in API group {:?} {place}",
        user.username, asked.verb, asked.resource, asked.group
    );
    let refusal = Refusal::new(403, "Forbidden", message).with_details(details(asked.name, asked.group, plural));
    Refusal {
        by_authorizer: true,
        ..refusal
    }
}

/// 403 for a path outside the API.
pub(crate) fn forbidden_path(user: &User, verb: Verb, path: &str) -> Refusal {
    let message = format!(
        "forbidden: User {:?} cannot {} path {path:?}",
        user.username,
        verb.name()
    );
    Refusal {
        by_authorizer: true,
        ..Refusal::new(403, "Forbidden", message).with_details(serde_json::json!({}))
    }
}
