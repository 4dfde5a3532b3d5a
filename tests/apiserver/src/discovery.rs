//! What there is, for clients that ask before they act (`kubectl` does). The bodies hold what is needed, not all that the real ones hold.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::resource::{RESOURCES, Resource};

/// `/version`, as recorded.
pub(crate) const VERSION: &str = include_str!("../golden/version.json");

/// The groups of reviews, which are no stored resources.
const REVIEWS: [(&str, &str); 2] = [("authentication.k8s.io", "v1"), ("authorization.k8s.io", "v1")];

/// Whether there is anything of a group.
pub(crate) fn has_group(group: &str, version: &str) -> bool {
    groups().contains(&(group, version))
}

/// The answer to a discovery path, if it exists.
pub(crate) fn answer(path: &str) -> Option<Value> {
    let steps: Vec<&str> = path.split('/').filter(|step| !step.is_empty()).collect();
    match steps.as_slice() {
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})),
        ["apis"] => {
            let groups = groups().into_iter().filter(|(group, _)| !group.is_empty());
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups.map(group).collect::<Value>()}))
        }
        ["api", "v1"] => Some(resources("", "v1")),
        ["apis", name] => groups().into_iter().find(|(group, _)| group == name).map(group),
        ["apis", name, version] if has_group(name, version) => Some(resources(name, version)),
        _ => None,
    }
}

fn groups() -> BTreeSet<(&'static str, &'static str)> {
    RESOURCES
        .iter()
        .map(|one| (one.group, one.version))
        .chain(REVIEWS)
        .collect()
}

fn group((name, version): (&str, &str)) -> Value {
    let version = json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": [version], "preferredVersion": version})
}

fn resources(group: &str, version: &str) -> Value {
    let here = RESOURCES
        .iter()
        .filter(|one| (one.group, one.version) == (group, version));
    let mut list: Vec<Value> = here
        .flat_map(|one| [Some(main(one)), one.has_status.then(|| status(one))])
        .flatten()
        .collect();
    let review = |name: &str, kind: &str| json!({"name": name, "singularName": "", "namespaced": false, "kind": kind, "verbs": ["create"]});
    match group {
        "authentication.k8s.io" => list.push(review("selfsubjectreviews", "SelfSubjectReview")),
        "authorization.k8s.io" => list.push(review("selfsubjectaccessreviews", "SelfSubjectAccessReview")),
        _ => {}
    }
    let name = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": list})
}

fn main(one: &Resource) -> Value {
    json!({"name": one.plural, "singularName": one.kind.to_lowercase(), "namespaced": one.namespaced, "kind": one.kind,
        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"], "shortNames": one.short_names})
}

fn status(one: &Resource) -> Value {
    json!({"name": format!("{}/status", one.plural), "singularName": "", "namespaced": one.namespaced, "kind": one.kind,
        "verbs": ["get", "patch", "update"]})
}
