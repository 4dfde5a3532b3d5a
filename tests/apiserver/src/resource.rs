//! Which kinds of objects the server keeps, and what differs between them. It holds no objects.

use serde_json::{Value, json};

/// A kind of objects.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resource {
    /// The API group; empty for the core.
    pub(crate) group: &'static str,
    /// The version in the path.
    pub(crate) version: &'static str,
    /// The name in the path: `nodes`.
    pub(crate) plural: &'static str,
    /// The kind: `Node`.
    pub(crate) kind: &'static str,
    /// Whether objects live in a namespace.
    pub(crate) namespaced: bool,
    /// Whether `/status` exists.
    pub(crate) has_status: bool,
    /// Whether a PUT may leave the resourceVersion out.
    pub(crate) unconditional_update: bool,
    /// Whether watches are served from a cache; without it an expired one is told so in other words.
    pub(crate) cached: bool,
    /// Fields beside `metadata.name` and `metadata.namespace` that a field selector may name.
    pub(crate) selectable: &'static [&'static str],
    /// Names for people, as discovery tells `kubectl`.
    pub(crate) short_names: &'static [&'static str],
}

/// All of them.
pub(crate) const RESOURCES: [Resource; 6] = [
    Resource {
        plural: "nodes",
        kind: "Node",
        namespaced: false,
        has_status: true,
        selectable: &["spec.unschedulable"],
        short_names: &["no"],
        ..CORE
    },
    Resource {
        plural: "namespaces",
        kind: "Namespace",
        namespaced: false,
        has_status: true,
        short_names: &["ns"],
        ..CORE
    },
    Resource {
        plural: "configmaps",
        kind: "ConfigMap",
        short_names: &["cm"],
        ..CORE
    },
    Resource {
        plural: "pods",
        kind: "Pod",
        has_status: true,
        selectable: &["spec.nodeName", "status.phase"],
        short_names: &["po"],
        ..CORE
    },
    Resource {
        group: "events.k8s.io",
        plural: "events",
        kind: "Event",
        cached: false,
        selectable: &["reason", "type", "regarding.name", "regarding.kind"],
        short_names: &["ev"],
        ..CORE
    },
    Resource {
        group: "coordination.k8s.io",
        plural: "leases",
        kind: "Lease",
        unconditional_update: false,
        ..CORE
    },
];

const CORE: Resource = Resource {
    group: "",
    version: "v1",
    plural: "",
    kind: "",
    namespaced: true,
    has_status: false,
    unconditional_update: true,
    cached: true,
    selectable: &[],
    short_names: &[],
};

impl Resource {
    /// The resource at a path, if the server has it.
    pub(crate) fn find(group: &str, version: &str, plural: &str) -> Option<&'static Self> {
        RESOURCES
            .iter()
            .find(|one| (one.group, one.version, one.plural) == (group, version, plural))
    }

    /// The resource of an object, by its `apiVersion` and `kind`.
    pub(crate) fn of(object: &Value) -> Option<&'static Self> {
        RESOURCES
            .iter()
            .find(|one| object["apiVersion"] == one.api_version().as_str() && object["kind"] == one.kind)
    }

    /// `v1`, or `coordination.k8s.io/v1`.
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `nodes`, or `leases.coordination.k8s.io`: what errors call it.
    pub(crate) fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    /// Its name in the store of the real server, which some errors quote.
    pub(crate) fn registry(&self) -> &'static str {
        if self.plural == "nodes" { "minions" } else { self.plural }
    }

    /// An object of this kind that says nothing: what a bookmark carries beside its version.
    pub(crate) fn empty(&self) -> Value {
        let mut object = json!({"kind": self.kind, "apiVersion": self.api_version(), "metadata": {}});
        match self.plural {
            "nodes" => {
                object["spec"] = json!({});
                object["status"] = node_status();
            }
            "namespaces" => {
                object["spec"] = json!({});
                object["status"] = json!({});
            }
            "pods" => {
                object["spec"] = json!({"containers": null});
                object["status"] = json!({});
            }
            "leases" => object["spec"] = json!({}),
            "events" => object["eventTime"] = Value::Null,
            _ => {}
        }
        object
    }
}

/// The status of a node whose kubelet has not spoken yet.
pub(crate) fn node_status() -> Value {
    json!({"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}, "nodeInfo": {"machineID": "", "systemUUID": "", "bootID": "",
        "kernelVersion": "", "osImage": "", "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
        "operatingSystem": "", "architecture": ""}})
}
