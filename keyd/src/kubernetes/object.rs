//! What is read of the objects of an API server: the few fields that are used, whatever else is in them.
//!
//! Each object is parsed by itself, so that one that makes no sense costs nobody else anything.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use shroud_model::NodeName;

use crate::refusal::Excerpt;
use crate::{ANNOTATION, Record, Unreadable, opt_out};

/// A kind of object, as far as it is read.
pub(super) trait Object: Sized {
    /// Reads one object. What cannot be read is part of the answer, because it has a place in a list too.
    fn read(raw: &RawValue) -> Self;
}

/// What every object has.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    pub(super) name: String,
    /// Empty for what lives in none.
    namespace: String,
    pub(super) resource_version: String,
}

impl Metadata {
    /// What tells the object from all others of its kind: its name, and before it, with a slash, its namespace if it lives in one.
    pub(super) fn key(&self) -> String {
        if self.namespace.is_empty() {
            self.name.clone()
        } else {
            format!("{}/{}", self.namespace, self.name)
        }
    }
}

#[derive(Default, Deserialize)]
struct HasMetadata {
    #[serde(default)]
    metadata: Fields<Metadata>,
}

/// The name and version of an object.
pub(super) fn metadata(raw: &RawValue) -> Metadata {
    let Fields(object): Fields<HasMetadata> = serde_json::from_str(raw.get()).unwrap_or_default();
    object.metadata.0
}

impl Object for Metadata {
    fn read(raw: &RawValue) -> Self {
        metadata(raw)
    }
}

/// A Node object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    /// What tells a Node from an earlier one of the same name.
    pub(super) uid: String,
    /// What the directory is told.
    pub(super) record: Result<Record, Unreadable>,
    /// The condition `NetworkUnavailable`: `True`, `False` or `Unknown`, if it is there.
    pub(super) network_unavailable: Option<String>,
}

impl Object for Node {
    fn read(raw: &RawValue) -> Self {
        match serde_json::from_str::<Fields<NodeObject>>(raw.get()) {
            Ok(Fields(object)) => object.into(),
            Err(error) => {
                let Metadata { name, .. } = metadata(raw);
                let reason = format!(
                    "Node {}: it is no Node object: {}",
                    Excerpt::of(&name),
                    Excerpt::of(&error.to_string())
                );
                Self {
                    uid: String::new(),
                    record: Err(Unreadable {
                        node: name.parse().ok(),
                        reason,
                    }),
                    network_unavailable: None,
                }
            }
        }
    }
}

/// What is read from an object with named fields, and never from the list of their values that serde would take as well.
#[derive(Default)]
struct Fields<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Fields<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Named<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Named<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(Named(PhantomData)).map(Self)
    }
}

#[derive(Deserialize)]
struct NodeObject {
    metadata: Fields<NodeMetadata>,
    #[serde(default)]
    spec: Fields<NodeSpec>,
    #[serde(default)]
    status: Fields<NodeStatus>,
}

#[derive(Deserialize)]
struct NodeMetadata {
    name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    annotations: One<Announced>,
    #[serde(default)]
    labels: One<InZone>,
}

/// One annotation or label, out of all those an object has.
struct One<K> {
    value: Option<String>,
    key: PhantomData<K>,
}

/// The name of an annotation or label.
trait Key {
    const NAME: &'static str;
}

/// Our annotation.
struct Announced;

impl Key for Announced {
    const NAME: &'static str = ANNOTATION;
}

/// The label with the zone of a node (Kubernetes, "Well-Known Labels, Annotations and Taints").
struct InZone;

impl Key for InZone {
    const NAME: &'static str = "topology.kubernetes.io/zone";
}

/// The label by which a pod or namespace opts out.
struct Encrypts;

impl Key for Encrypts {
    const NAME: &'static str = opt_out::LABEL;
}

impl<K> Default for One<K> {
    fn default() -> Self {
        Self {
            value: None,
            key: PhantomData,
        }
    }
}

impl<'de, K: Key> Deserialize<'de> for One<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOnly<K>(PhantomData<K>);

        impl<'de, K: Key> Visitor<'de> for OneOnly<K> {
            type Value = One<K>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations or labels")
            }

            fn visit_unit<E>(self) -> Result<One<K>, E> {
                Ok(One::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<One<K>, A::Error> {
                let mut one = One::default();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    if key == K::NAME {
                        one.value = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(one)
            }
        }

        deserializer.deserialize_any(OneOnly(PhantomData))
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeSpec {
    #[serde(rename = "podCIDR", default)]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", default)]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
struct NodeStatus {
    #[serde(default)]
    addresses: Option<Vec<Fields<NodeAddress>>>,
    #[serde(default)]
    conditions: Option<Vec<Fields<NodeCondition>>>,
}

#[derive(Deserialize)]
struct NodeCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

impl From<NodeObject> for Node {
    fn from(object: NodeObject) -> Self {
        let NodeObject {
            metadata: Fields(metadata),
            spec: Fields(spec),
            status: Fields(mut status),
        } = object;
        let mut conditions = status.conditions.take().unwrap_or_default().into_iter();
        let network_unavailable = conditions.find(|Fields(condition)| condition.kind == "NetworkUnavailable");
        // What is no label at all is no zone either.
        let zone = metadata.labels.value.and_then(|zone| zone.parse().ok());
        let record =
            record(&metadata.name, metadata.annotations.value, spec, status).map(|record| Record { zone, ..record });
        Self {
            uid: metadata.uid,
            record: record.map_err(|(node, reason)| Unreadable {
                node,
                reason: format!("Node {}: {reason}", Excerpt::of(&metadata.name)),
            }),
            network_unavailable: network_unavailable.map(|Fields(condition)| condition.status),
        }
    }
}

/// The addresses by which other nodes reach this one, internal ones first (core/v1 NodeAddressType). Names are not addresses.
const ADDRESS_TYPES: [&str; 2] = ["InternalIP", "ExternalIP"];

fn record(
    name: &str,
    announcement: Option<String>,
    spec: NodeSpec,
    status: NodeStatus,
) -> Result<Record, (Option<NodeName>, String)> {
    let node: NodeName = name.parse().map_err(|error| (None, format!("{error}")))?;
    let unreadable = |what: &str, text: &str| {
        let reason = format!("{what} {} cannot be read", Excerpt::of(text));
        (Some(node.clone()), reason)
    };
    let listed = status.addresses.unwrap_or_default();
    let mut addresses = Vec::new();
    for wanted in ADDRESS_TYPES {
        for Fields(NodeAddress { address, .. }) in listed.iter().filter(|Fields(listed)| listed.kind == wanted) {
            addresses.push(address.parse().map_err(|_| unreadable("its address", address))?);
        }
    }
    // Both are set in a cluster of today; the plural is the whole truth.
    let pod_cidrs = spec.pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
    let pod_prefixes = pod_cidrs
        .iter()
        .filter(|text| !text.is_empty())
        .map(|text| text.parse().map_err(|_| unreadable("its pod CIDR", text)))
        .collect::<Result<Vec<_>, _>>()?;
    for (what, count, limit) in [
        ("addresses", addresses.len(), Record::MAX_ADDRESSES),
        ("pod CIDRs", pod_prefixes.len(), Record::MAX_POD_PREFIXES),
    ] {
        if count > limit {
            let reason = format!("it has {count} {what}, more than the {limit} that are read");
            return Err((Some(node), reason));
        }
    }
    Ok(Record {
        addresses,
        pod_prefixes,
        zone: None,
        announcement,
        node,
    })
}

/// A Pod, as far as it matters who sends from its addresses. What makes no sense is a pod without addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pod {
    /// Its namespace and name, as [`Metadata::key`] puts them.
    pub(super) key: String,
    /// The node it runs on.
    pub(super) node: Option<NodeName>,
    /// The addresses that are its own, and are so for as long as it is there: none before it has some, when it is about to go, or when it uses
    /// its node's.
    pub(super) addresses: Vec<IpAddr>,
    /// What its own label says of encryption.
    pub(super) encrypt: Option<String>,
}

#[derive(Deserialize)]
struct PodObject {
    metadata: Fields<PodMetadata>,
    #[serde(default)]
    spec: Fields<PodSpec>,
    #[serde(default)]
    status: Fields<PodStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodMetadata {
    #[serde(default)]
    deletion_timestamp: Option<IgnoredAny>,
    #[serde(default)]
    labels: One<Encrypts>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<Fields<PodIp>>>,
}

#[derive(Default, Deserialize)]
struct PodIp {
    #[serde(default)]
    ip: String,
}

impl Object for Pod {
    fn read(raw: &RawValue) -> Self {
        let key = metadata(raw).key();
        let Ok(Fields(object)) = serde_json::from_str::<Fields<PodObject>>(raw.get()) else {
            return Self { key, ..Self::default() };
        };
        let PodObject {
            metadata: Fields(metadata),
            spec: Fields(spec),
            status: Fields(status),
        } = object;
        let is_there = metadata.deletion_timestamp.is_none()
            && spec.host_network != Some(true)
            && !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let listed = status
            .pod_ips
            .unwrap_or_default()
            .into_iter()
            .map(|Fields(PodIp { ip })| ip);
        let addresses: BTreeSet<IpAddr> = listed
            .chain(status.pod_ip)
            .filter_map(|address| address.parse().ok())
            .collect();
        Self {
            key,
            node: spec.node_name.and_then(|name| name.parse().ok()),
            addresses: addresses.into_iter().filter(|_| is_there).collect(),
            encrypt: metadata.labels.value,
        }
    }
}

/// A Namespace: its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Namespace(pub(super) String);

impl Object for Namespace {
    fn read(raw: &RawValue) -> Self {
        Self(metadata(raw).key())
    }
}

/// A ConfigMap: its `data`, or nothing where that makes no sense.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ConfigMap {
    pub(super) data: BTreeMap<String, String>,
}

impl Object for ConfigMap {
    fn read(raw: &RawValue) -> Self {
        #[derive(Default, Deserialize)]
        struct HasData {
            #[serde(default)]
            data: Option<BTreeMap<String, String>>,
        }
        let object: HasData = serde_json::from_str(raw.get()).unwrap_or_default();
        Self {
            data: object.data.unwrap_or_default(),
        }
    }
}

/// The pod of an agent, as far as it says where it runs and whether it can be asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct AgentPod {
    pub(super) name: String,
    /// The name of the node; empty while it has none.
    pub(super) node: String,
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    pub(super) phase: String,
    /// Whether it is being deleted.
    pub(super) ends: bool,
    /// When it was made, as text that sorts.
    pub(super) created: String,
}

impl Object for AgentPod {
    fn read(raw: &RawValue) -> Self {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Pod {
            metadata: Fields<Metadata>,
            spec: Fields<Spec>,
            status: Fields<Status>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        struct Metadata {
            name: String,
            creation_timestamp: Option<String>,
            deletion_timestamp: Option<String>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        struct Spec {
            node_name: Option<String>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Status {
            phase: Option<String>,
        }
        let Fields(Pod {
            metadata: Fields(metadata),
            spec: Fields(spec),
            status: Fields(status),
        }) = serde_json::from_str(raw.get()).unwrap_or_default();
        Self {
            name: metadata.name,
            node: spec.node_name.unwrap_or_default(),
            phase: status.phase.unwrap_or_default(),
            ends: metadata.deletion_timestamp.is_some(),
            created: metadata.creation_timestamp.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Node {
        Node::read(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn a_node_becomes_a_record() {
        let node = read(
            r#"{"kind":"Node","apiVersion":"v1",
            "metadata":{"name":"node-a","uid":"b7","resourceVersion":"291","labels":{"x":"y","topology.kubernetes.io/zone":"eu-1a"},"annotations":{"other":"1","shroud.dev/node":"{}"},"managedFields":[{"fieldsV1":{}}]},
            "spec":{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24","fd00:244:1::/64"],"taints":[]},
            "status":{"addresses":[{"type":"Hostname","address":"node-a"},{"type":"ExternalIP","address":"203.0.113.9"},{"type":"InternalIP","address":"172.18.0.2"},{"type":"InternalIP","address":"fd18::2"}],
            "conditions":[{"type":"Ready","status":"True"},{"type":"NetworkUnavailable","status":"Unknown","reason":"NoRouteCreated"}],"nodeInfo":{}}}"#,
        );

        let record = Record {
            node: "node-a".parse().unwrap(),
            addresses: ["172.18.0.2", "fd18::2", "203.0.113.9"]
                .map(|text| text.parse().unwrap())
                .to_vec(),
            pod_prefixes: ["10.244.1.0/24", "fd00:244:1::/64"]
                .map(|text| text.parse().unwrap())
                .to_vec(),
            zone: Some("eu-1a".parse().unwrap()),
            announcement: Some("{}".to_owned()),
        };
        assert_eq!(
            node,
            Node {
                uid: "b7".to_owned(),
                record: Ok(record),
                network_unavailable: Some("Unknown".to_owned()),
            }
        );
    }

    #[test]
    fn a_node_that_has_nothing_yet_is_a_record_of_nothing() {
        let record =
            read(r#"{"metadata":{"name":"node-b","annotations":null},"spec":{},"status":{"addresses":null}}"#).record;

        let nothing = Record {
            node: "node-b".parse().unwrap(),
            addresses: Vec::new(),
            pod_prefixes: Vec::new(),
            zone: None,
            announcement: None,
        };
        assert_eq!(record, Ok(nothing));
    }

    #[test]
    fn a_label_that_cannot_be_one_is_no_zone() {
        let record = read(r#"{"metadata":{"name":"a","labels":{"topology.kubernetes.io/zone":"\u001b[31m"}}}"#).record;

        assert_eq!(record.unwrap().zone, None);
    }

    #[test]
    fn a_pod_has_addresses_while_they_are_its_own() {
        let pod = |changed: &dyn Fn(&mut serde_json::Value)| {
            let mut object = serde_json::json!({
                "metadata": { "name": "cart", "namespace": "shop", "labels": { "shroud.dev/encrypt": "false", "app": "cart" } },
                "spec": { "nodeName": "node-a", "containers": [{ "name": "c" }] },
                "status": { "phase": "Running", "podIP": "10.244.1.7", "podIPs": [{ "ip": "10.244.1.7" }, { "ip": "fd00::7" }] },
            });
            changed(&mut object);
            Pod::read(serde_json::from_str(&object.to_string()).unwrap())
        };
        let running = Pod {
            key: "shop/cart".to_owned(),
            node: Some("node-a".parse().unwrap()),
            addresses: vec!["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            encrypt: Some("false".to_owned()),
        };
        let gone = Pod {
            addresses: Vec::new(),
            ..running.clone()
        };

        assert_eq!(pod(&|_| {}), running);
        let deleted = "2026-11-25T08:00:00Z";
        assert_eq!(pod(&|pod| pod["metadata"]["deletionTimestamp"] = deleted.into()), gone);
        assert_eq!(pod(&|pod| pod["spec"]["hostNetwork"] = true.into()), gone);
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(pod(&|pod| pod["status"]["phase"] = phase.into()), gone);
        }
        assert_eq!(pod(&|pod| pod["status"] = serde_json::json!({})), gone);
        let nonsense = Pod {
            key: "shop/cart".to_owned(),
            ..Pod::default()
        };
        assert_eq!(pod(&|pod| pod["status"]["podIPs"] = 7.into()), nonsense);
    }

    #[test]
    fn only_the_singular_pod_cidr_is_there_on_old_servers() {
        let record = read(r#"{"metadata":{"name":"a"},"spec":{"podCIDR":"10.244.1.0/24"}}"#).record;

        assert_eq!(record.unwrap().pod_prefixes, ["10.244.1.0/24".parse().unwrap()]);
    }

    #[test]
    fn what_makes_no_sense_is_said_of_that_node_alone() {
        let cases = [
            (
                r#"{"metadata":{"name":"a"},"spec":{"podCIDRs":["10.244.1.7/24"]}}"#,
                Some("a"),
                "Node a: its pod CIDR 10.244.1.7/24 cannot be read",
            ),
            (
                r#"{"metadata":{"name":"a"},"status":{"addresses":[{"type":"InternalIP","address":"a\u001b[31m"}]}}"#,
                Some("a"),
                "Node a: its address a\\u{1b}[31m cannot be read",
            ),
            (
                r#"{"metadata":{"name":"a"},"spec":{"podCIDRs":7}}"#,
                Some("a"),
                "Node a: it is no Node object: invalid type: integer `7`, expected a sequence a...",
            ),
            (
                r#"{"metadata":{"name":7}}"#,
                None,
                "Node : it is no Node object: invalid type: integer `7`, expected a string at ...",
            ),
        ];
        for (text, node, reason) in cases {
            let bad = Unreadable {
                node: node.map(|name| name.parse().unwrap()),
                reason: reason.to_owned(),
            };
            assert_eq!(read(text).record, Err(bad), "{text}");
        }
    }

    #[test]
    fn more_pod_cidrs_than_are_read_are_refused() {
        let cidrs = vec!["\"10.244.1.0/24\""; 1025].join(",");

        let record = read(&format!(
            r#"{{"metadata":{{"name":"a"}},"spec":{{"podCIDRs":[{cidrs}]}}}}"#
        ))
        .record;

        let bad = Unreadable {
            node: Some("a".parse().unwrap()),
            reason: "Node a: it has 1025 pod CIDRs, more than the 1024 that are read".to_owned(),
        };
        assert_eq!(record, Err(bad));
    }

    #[test]
    fn a_config_map_without_data_is_empty() {
        for text in [
            r#"{"metadata":{"name":"d"}}"#,
            r#"{"data":null}"#,
            r#"{"data":7}"#,
            r#"[]"#,
        ] {
            assert_eq!(
                ConfigMap::read(serde_json::from_str(text).unwrap()),
                ConfigMap::default()
            );
        }
        let map = ConfigMap::read(serde_json::from_str(r#"{"data":{"node-x":"stolen"}}"#).unwrap());
        assert_eq!(map.data, BTreeMap::from([("node-x".to_owned(), "stolen".to_owned())]));
    }

    #[test]
    fn an_agents_pod_says_where_it_runs_and_whether_it_does() {
        let read = |text: &str| AgentPod::read(serde_json::from_str(text).unwrap());

        let pod = read(
            r#"{"metadata":{"name":"shroud-x","creationTimestamp":"2026-11-25T10:00:00Z","deletionTimestamp":"2026-11-25T11:00:00Z"},
            "spec":{"nodeName":"node-a","containers":[]},"status":{"phase":"Running","podIP":"172.18.0.2"}}"#,
        );

        let expected = AgentPod {
            name: "shroud-x".to_owned(),
            node: "node-a".to_owned(),
            phase: "Running".to_owned(),
            ends: true,
            created: "2026-11-25T10:00:00Z".to_owned(),
        };
        assert_eq!(pod, expected);
        for nothing in ["7", r#"{"spec":7}"#, r#"{"metadata":{"creationTimestamp":null}}"#] {
            assert_eq!(read(nothing), AgentPod::default(), "{nothing}");
        }
    }
}
