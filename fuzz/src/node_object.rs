//! A Node object, as an API server sends it.

use serde_json::Value;
use shroud_keyd::{ANNOTATION, Record, kubernetes};

use super::printable;

/// Checks that an object is refused in safe words, or is a record within its limits that says what a plain reader of the object reads.
pub fn check(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let read = kubernetes::read_node(text);
    if let Ok(record) = &read {
        assert!(record.addresses.len() <= Record::MAX_ADDRESSES);
        assert!(record.pod_prefixes.len() <= Record::MAX_POD_PREFIXES);
        let remembered = serde_json::to_string(record).expect("a record has a JSON form");
        assert_eq!(serde_json::from_str::<Record>(&remembered).ok().as_ref(), Some(record));
    }

    // A reader that minds depth and the size of numbers may refuse it; one that takes it must see the same.
    let object: Value = serde_json::from_str(text).unwrap_or_default();
    let name = object["metadata"]["name"].as_str();
    match read {
        Ok(record) if !object.is_null() => {
            assert_eq!(Some(record.node.as_str()), name);
            assert_eq!(
                record.announcement.as_deref(),
                object["metadata"]["annotations"][ANNOTATION].as_str()
            );
            assert_eq!(record.addresses.len(), addresses(&object));
            let prefixes: Vec<&str> = pod_cidrs(&object);
            assert_eq!(
                record.pod_prefixes,
                prefixes.iter().flat_map(|text| text.parse()).collect::<Vec<_>>()
            );
        }
        Ok(_) => {}
        Err(unreadable) => {
            printable::check(&unreadable.reason);
            assert!(
                unreadable
                    .node
                    .is_none_or(|node| object.is_null() || Some(node.as_str()) == name)
            );
        }
    }
}

/// How many of the object's addresses other nodes can reach it by.
fn addresses(object: &Value) -> usize {
    let listed = object["status"]["addresses"].as_array().into_iter().flatten();
    listed
        .filter(|listed| listed["type"] == "InternalIP" || listed["type"] == "ExternalIP")
        .count()
}

fn pod_cidrs(object: &Value) -> Vec<&str> {
    let spec = &object["spec"];
    let texts: Vec<&Value> = match spec["podCIDRs"].as_array() {
        Some(texts) => texts.iter().collect(),
        None => vec![&spec["podCIDR"]],
    };
    texts
        .into_iter()
        .filter_map(Value::as_str)
        .filter(|text| !text.is_empty())
        .collect()
}
