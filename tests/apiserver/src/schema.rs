//! What the types of Kubernetes say about lists and maps, for the objects the server keeps: which lists are merged item by item, and by
//! which key. It holds no values.

/// How a list is owned and merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListKind {
    /// As one value.
    Atomic,
    /// As a set of scalars.
    Set,
    /// As a map, by these keys.
    Map(&'static [&'static str]),
}

/// How server-side apply treats the list at a path of field names.
pub(crate) fn list(path: &[&str]) -> ListKind {
    match path {
        ["metadata", "finalizers"] | ["spec", "podCIDRs"] => ListKind::Set,
        ["metadata", "ownerReferences"] => ListKind::Map(&["uid"]),
        ["status", "conditions" | "addresses"] => ListKind::Map(&["type"]),
        ["spec", "containers" | "initContainers" | "volumes"] => ListKind::Map(&["name"]),
        ["status", "podIPs" | "hostIPs"] => ListKind::Map(&["ip"]),
        _ => ListKind::Atomic,
    }
}

/// How a strategic merge patch treats it: taints, too, are merged.
pub(crate) fn strategic_list(path: &[&str]) -> ListKind {
    match path {
        ["spec", "taints"] => ListKind::Map(&["key"]),
        other => list(other),
    }
}

/// Whether the map at a path is one value to server-side apply.
pub(crate) fn is_atomic_map(path: &[&str]) -> bool {
    matches!(
        path,
        ["spec", "selector" | "nodeSelector"] | ["regarding" | "related" | "series"]
    )
}

/// Metadata that the server writes itself, and nobody owns.
pub(crate) const UNOWNED_METADATA: [&str; 8] = [
    "name",
    "namespace",
    "creationTimestamp",
    "selfLink",
    "uid",
    "generation",
    "managedFields",
    "resourceVersion",
];

/// The fields of a node's spec; others are unknown.
pub(crate) const NODE_SPEC: [&str; 7] = [
    "podCIDR",
    "podCIDRs",
    "providerID",
    "unschedulable",
    "taints",
    "configSource",
    "externalID",
];
