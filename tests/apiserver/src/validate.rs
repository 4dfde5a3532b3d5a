//! What the server refuses in an object: names, labels, annotations, pod ranges, and what an Event must say. Pure. Only what a client of
//! ours could get wrong is here; the real server checks far more.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::resource::Resource;
use crate::schema;
use crate::status::{Cause, Refusal};

/// All annotations of an object together, in bytes.
const ANNOTATIONS_LIMIT: usize = 262_144;

/// What is wrong with an object; `old` is what it replaces.
pub(crate) fn object(resource: &Resource, new: &Value, old: Option<&Value>) -> Result<(), Refusal> {
    let mut causes = Vec::new();
    match old {
        None => name(new, &mut causes),
        Some(old) => immutable(new, old, &mut causes),
    }
    // An update of a Node runs through the same checks four times, and the real answer shows each.
    let times = if old.is_some() && resource.plural == "nodes" {
        4
    } else {
        1
    };
    let metadata = metadata(new);
    causes.extend(metadata.iter().cycle().take(metadata.len() * times).cloned());
    match resource.plural {
        "nodes" => pod_ranges(new, old, &mut causes),
        "events" => event(new, &mut causes),
        "leases" if old.is_some() => {}
        _ => {}
    }
    if causes.is_empty() {
        return Ok(());
    }
    Err(Refusal::invalid(
        resource.kind,
        resource.group,
        new["metadata"]["name"].as_str().unwrap_or_default(),
        &causes,
    ))
}

/// A field of the object that has the wrong JSON type, as a Go decoder says it.
pub(crate) fn wrong_type(object: &Value) -> Option<String> {
    for map in ["annotations", "labels"] {
        let fields = object["metadata"][map].as_object();
        for value in fields.into_iter().flat_map(serde_json::Map::values) {
            let found = match value {
                Value::String(_) | Value::Null => continue,
                Value::Bool(_) => "bool",
                Value::Number(_) => "number",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            };
            return Some(format!(
                "json: cannot unmarshal {found} into Go struct field ObjectMeta.metadata.{map} of type string"
            ));
        }
    }
    None
}

/// Fields that the type does not have.
pub(crate) fn unknown_fields(resource: &Resource, object: &Value) -> Vec<String> {
    if resource.plural != "nodes" {
        return Vec::new();
    }
    let spec = object["spec"].as_object();
    let names = spec.into_iter().flat_map(serde_json::Map::keys);
    names
        .filter(|name| !schema::NODE_SPEC.contains(&name.as_str()))
        .map(|name| format!("spec.{name}"))
        .collect()
}

/// Takes out what [`unknown_fields`] found.
pub(crate) fn prune(resource: &Resource, object: &mut Value) {
    if resource.plural == "nodes"
        && let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut)
    {
        spec.retain(|name, _| schema::NODE_SPEC.contains(&name.as_str()));
    }
}

fn name(new: &Value, causes: &mut Vec<Cause>) {
    const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must \
        start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
        '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
        return;
    }
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let ends = bytes.first().zip(bytes.last());
        ends.is_some_and(|(first, last)| plain(*first) && plain(*last))
            && bytes.iter().all(|byte| plain(*byte) || *byte == b'-')
    };
    if !name.split('.').all(label) || name.len() > 253 {
        causes.push(Cause::invalid("metadata.name", &name.into(), SUBDOMAIN));
    }
}

fn immutable(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let uid = &new["metadata"]["uid"];
    if *uid != old["metadata"]["uid"] {
        let cause = Cause::invalid("metadata.uid", uid, "field is immutable");
        causes.extend([cause.clone(), cause]);
    }
}

fn metadata(new: &Value) -> Vec<Cause> {
    const NAME_PART: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
        alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
        '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
    const LABEL: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start \
        and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is \
        '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
    let mut causes = Vec::new();
    let map = |name: &str| new["metadata"][name].as_object().cloned().unwrap_or_default();
    for (key, value) in map("labels") {
        if !word(key.rsplit('/').next().unwrap_or_default()) {
            causes.push(Cause::invalid("metadata.labels", &key.into(), NAME_PART));
        }
        let text = value.as_str().unwrap_or_default();
        if !text.is_empty() && (!word(text) || text.len() > 63) {
            causes.push(Cause::invalid("metadata.labels", &value, LABEL));
        }
    }
    let annotations = map("annotations");
    for key in annotations.keys() {
        if !word(key.rsplit('/').next().unwrap_or_default()) {
            causes.push(Cause::invalid("metadata.annotations", &key.as_str().into(), NAME_PART));
        }
    }
    let size: usize = annotations
        .iter()
        .map(|(key, value)| key.len() + value.as_str().unwrap_or_default().len())
        .sum();
    if size > ANNOTATIONS_LIMIT {
        let message = format!("Too long: may not be more than {ANNOTATIONS_LIMIT} bytes");
        causes.push(Cause {
            reason: "FieldValueTooLong",
            message,
            field: "metadata.annotations".into(),
        });
    }
    causes
}

fn word(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = bytes.first().zip(bytes.last());
    ends.is_some_and(|(first, last)| first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

fn pod_ranges(new: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let ranges = &new["spec"]["podCIDRs"];
    let mut families = Vec::new();
    for (index, range) in ranges.as_array().into_iter().flatten().enumerate() {
        let field = format!("spec.podCIDRs[{index}]");
        match cidr(range.as_str().unwrap_or_default()) {
            None => causes.push(Cause::invalid(
                field,
                range,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            )),
            Some((_, false)) => causes.push(Cause::invalid(
                field,
                range,
                "must not have bits set beyond the prefix length",
            )),
            Some((family, true)) => families.push(family),
        }
    }
    let (four, six) = (
        families.iter().filter(|six| !**six).count(),
        families.iter().filter(|six| **six).count(),
    );
    if four > 1 || six > 1 {
        causes.push(Cause::invalid(
            "spec.podCIDRs",
            ranges,
            "may specify no more than one CIDR for each IP family",
        ));
    }
    if let Some(old) = old {
        let before = &old["spec"]["podCIDRs"];
        if before.as_array().is_some_and(|before| !before.is_empty()) && before != ranges {
            causes.push(Cause::forbidden(
                "spec.podCIDRs",
                "node updates may not change podCIDR except from \"\" to valid",
            ));
        }
    }
}

/// Whether it is of IPv6, and whether its host bits are clear.
fn cidr(text: &str) -> Option<(bool, bool)> {
    let (address, length) = text.split_once('/')?;
    let length: u32 = length.parse().ok()?;
    match address.parse().ok()? {
        IpAddr::V4(address) if length <= 32 => Some((false, u32::from(address).checked_shl(length).unwrap_or(0) == 0)),
        IpAddr::V6(address) if length <= 128 => Some((true, u128::from(address).checked_shl(length).unwrap_or(0) == 0)),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

/// What the type `events.k8s.io/v1` asks for; not recorded, but in its documentation.
fn event(new: &Value, causes: &mut Vec<Cause>) {
    for field in [
        "eventTime",
        "reportingController",
        "reportingInstance",
        "action",
        "reason",
    ] {
        if new[field].as_str().unwrap_or_default().is_empty() {
            causes.push(Cause::required(field, ""));
        }
    }
    if !["Normal", "Warning"].iter().any(|kind| new["type"] == *kind) {
        causes.push(Cause::invalid("type", &new["type"], "must be one of Normal, Warning"));
    }
    let note = new["note"].as_str().unwrap_or_default();
    if note.len() > 1024 {
        causes.push(Cause::invalid("note", &json!(""), "can have at most 1024 characters"));
    }
    if !is_micro_time(new["eventTime"].as_str().unwrap_or("2026-01-01T00:00:00.000000Z")) {
        causes.push(Cause::invalid(
            "eventTime",
            &new["eventTime"],
            "must be a time with microseconds",
        ));
    }
    let regarding = new["regarding"]["namespace"].as_str().unwrap_or_default();
    let namespace = new["metadata"]["namespace"].as_str().unwrap_or_default();
    let right = if regarding.is_empty() {
        ["default", "kube-system"].contains(&namespace)
    } else {
        regarding == namespace
    };
    if !right {
        causes.push(Cause::invalid(
            "involvedObject.namespace",
            &regarding.into(),
            "does not match event.namespace",
        ));
    }
}

/// `2026-01-01T00:00:07.000000Z`: a Go `MicroTime` takes no other.
fn is_micro_time(text: &str) -> bool {
    let shape = "dddd-dd-ddTdd:dd:dd.ddddddZ";
    text.len() == shape.len()
        && text.bytes().zip(shape.bytes()).all(|(found, wanted)| {
            if wanted == b'd' {
                found.is_ascii_digit()
            } else {
                found == wanted
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_parsed_as_the_server_does() {
        assert_eq!(cidr("10.244.1.0/24"), Some((false, true)));
        assert_eq!(cidr("10.244.6.9/24"), Some((false, false)));
        assert_eq!(cidr("fd00:244:1::/64"), Some((true, true)));
        assert_eq!(cidr("0.0.0.0/0"), Some((false, true)));
        assert_eq!(
            (cidr("10.244.300.0/24"), cidr("10.0.0.0/33"), cidr("10.0.0.0")),
            (None, None, None)
        );
    }

    #[test]
    fn an_event_about_a_node_belongs_into_the_namespace_default() {
        let events = Resource::find("events.k8s.io", "v1", "events").unwrap();
        let event = |namespace: &str| {
            json!({"metadata": {"name": "e", "namespace": namespace}, "eventTime": "2026-01-01T00:00:07.000000Z", "type": "Warning",
                "reportingController": "c", "reportingInstance": "i", "action": "a", "reason": "r", "regarding": {"kind": "Node"}})
        };

        assert_eq!(object(events, &event("default"), None), Ok(()));
        assert_eq!(object(events, &event("mesh"), None).unwrap_err().code, 422);
    }
}
