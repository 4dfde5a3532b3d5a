//! What is read of the objects of an API server: the few fields that are used, whatever else is in them.
//!
//! Each object is parsed by itself, so that one that makes no sense costs nobody else anything.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use shroud_model::NodeName;

use crate::refusal::Excerpt;
use crate::{ANNOTATION, Record, Unreadable};

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
    pub(super) resource_version: String,
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
    annotations: Annotations,
}

/// Our annotation, out of all those an object has.
#[derive(Default)]
struct Annotations {
    ours: Option<String>,
}

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OursOnly;

        impl<'de> Visitor<'de> for OursOnly {
            type Value = Annotations;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }

            fn visit_unit<E>(self) -> Result<Annotations, E> {
                Ok(Annotations::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Annotations, A::Error> {
                let mut ours = None;
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    if key == ANNOTATION {
                        ours = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Annotations { ours })
            }
        }

        deserializer.deserialize_any(OursOnly)
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
        let record = record(&metadata.name, metadata.annotations.ours, spec, status);
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
        announcement,
        node,
    })
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
            "metadata":{"name":"node-a","uid":"b7","resourceVersion":"291","labels":{"x":"y"},"annotations":{"other":"1","shroud.dev/node":"{}"},"managedFields":[{"fieldsV1":{}}]},
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
            announcement: None,
        };
        assert_eq!(record, Ok(nothing));
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
}
