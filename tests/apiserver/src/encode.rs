//! JSON as the real server writes it: fields in the order of its Go structs, `<`, `>` and `&` escaped, compact with a newline at the
//! end or indented without one. It never changes a value.

use serde_json::{Map, Value};

/// One line, without the newline.
pub(crate) fn compact(value: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    write(&mut out, value, "", Layout::Compact);
    out
}

/// Indented by two spaces.
pub(crate) fn pretty(value: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    write(&mut out, value, "", Layout::Indented(0));
    out
}

/// Compact; what a patch touched is in the order of the alphabet. So error messages quote an object that is no object any more.
pub(crate) fn patched(value: &Value, patch: &Value) -> String {
    let mut out = Vec::with_capacity(1024);
    write(&mut out, value, "", Layout::Patched(patch));
    String::from_utf8_lossy(&out).into_owned()
}

#[derive(Clone, Copy)]
enum Layout<'a> {
    Compact,
    Indented(usize),
    Patched(&'a Value),
}

impl Layout<'_> {
    fn deeper(self) -> Self {
        match self {
            Self::Indented(depth) => Self::Indented(depth + 1),
            Self::Compact | Self::Patched(_) => self,
        }
    }

    fn newline(self, out: &mut Vec<u8>) {
        if let Self::Indented(depth) = self {
            out.push(b'\n');
            out.extend(std::iter::repeat_n(b' ', 2 * depth));
        }
    }
}

fn write(out: &mut Vec<u8>, value: &Value, parent: &str, layout: Layout<'_>) {
    match value {
        Value::Null => out.extend(b"null"),
        Value::Bool(yes) => out.extend(if *yes { b"true".as_slice() } else { b"false" }),
        Value::Number(number) => out.extend(number.to_string().bytes()),
        Value::String(text) => string(out, text),
        Value::Array(items) => {
            let inner = layout.deeper();
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                inner.newline(out);
                write(out, item, parent, inner);
            }
            if !items.is_empty() {
                layout.newline(out);
            }
            out.push(b']');
        }
        Value::Object(fields) => {
            let inner = layout.deeper();
            out.push(b'{');
            for (index, (name, field)) in ordered(fields, parent, layout).into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                inner.newline(out);
                string(out, name);
                out.push(b':');
                if matches!(inner, Layout::Indented(_)) {
                    out.push(b' ');
                }
                let below = match layout {
                    Layout::Patched(patch) if patch[name].is_object() => Layout::Patched(&patch[name]),
                    Layout::Patched(_) => Layout::Compact,
                    Layout::Compact | Layout::Indented(_) => inner,
                };
                write(out, field, name, below);
            }
            if !fields.is_empty() {
                layout.newline(out);
            }
            out.push(b'}');
        }
    }
}

fn ordered<'a>(fields: &'a Map<String, Value>, parent: &str, layout: Layout<'_>) -> Vec<(&'a String, &'a Value)> {
    let mut fields: Vec<_> = fields.iter().collect();
    let order = if matches!(layout, Layout::Patched(_)) {
        &[]
    } else {
        order(parent)
    };
    fields.sort_by_key(|(name, _)| {
        (
            order.iter().position(|known| known == name).unwrap_or(order.len()),
            name.as_str(),
        )
    });
    fields
}

/// The order of a struct's fields, by the name of the field that holds the struct. Fields not named here follow by the alphabet, as
/// the keys of a Go map do.
fn order(parent: &str) -> &'static [&'static str] {
    match parent {
        // (The last three are a list's metadata, which is encoded alone.)
        "" | "items" | "object" => &[
            "kind",
            "apiVersion",
            "metadata",
            "spec",
            "status",
            "message",
            "reason",
            "details",
            "code",
            "items",
            "resourceVersion",
            "continue",
            "remainingItemCount",
        ],
        "metadata" => &[
            "name",
            "generateName",
            "namespace",
            "selfLink",
            "uid",
            "resourceVersion",
            "continue",
            "remainingItemCount",
            "generation",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "labels",
            "annotations",
            "ownerReferences",
            "finalizers",
            "managedFields",
        ],
        "managedFields" => &[
            "manager",
            "operation",
            "apiVersion",
            "time",
            "fieldsType",
            "fieldsV1",
            "subresource",
        ],
        "details" => &["name", "group", "kind", "uid", "causes", "retryAfterSeconds"],
        "causes" => &["reason", "message", "field"],
        "spec" => &[
            "holderIdentity",
            "leaseDurationSeconds",
            "acquireTime",
            "renewTime",
            "leaseTransitions",
            "podCIDR",
            "podCIDRs",
            "providerID",
            "unschedulable",
            "taints",
        ],
        "status" => &[
            "capacity",
            "allocatable",
            "phase",
            "conditions",
            "addresses",
            "daemonEndpoints",
            "nodeInfo",
            "allowed",
            "denied",
        ],
        "conditions" => &[
            "type",
            "status",
            "lastHeartbeatTime",
            "lastTransitionTime",
            "reason",
            "message",
        ],
        "addresses" => &["type", "address"],
        "taints" => &["key", "value", "effect", "timeAdded"],
        "nodeInfo" => &[
            "machineID",
            "systemUUID",
            "bootID",
            "kernelVersion",
            "osImage",
            "containerRuntimeVersion",
            "kubeletVersion",
            "kubeProxyVersion",
            "operatingSystem",
            "architecture",
        ],
        "resourceAttributes" => &[
            "namespace",
            "verb",
            "group",
            "version",
            "resource",
            "subresource",
            "name",
        ],
        "userInfo" => &["username", "uid", "groups", "extra"],
        _ => &[],
    }
}

/// A JSON string the way Go writes it.
fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    for character in text.chars() {
        match character {
            '"' => out.extend(b"\\\""),
            '\\' => out.extend(b"\\\\"),
            '\n' => out.extend(b"\\n"),
            '\r' => out.extend(b"\\r"),
            '\t' => out.extend(b"\\t"),
            '\u{8}' => out.extend(b"\\b"),
            '\u{c}' => out.extend(b"\\f"),
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => out.extend(format!("\\u{:04x}", u32::from(character)).bytes()),
            control if control < ' ' => out.extend(format!("\\u{:04x}", u32::from(control)).bytes()),
            other => out.extend(other.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn structs_keep_their_order_and_maps_the_alphabet() {
        let node = json!({"apiVersion": "v1", "spec": {"taints": [{"effect": "E", "key": "k"}], "podCIDR": "c"}, "kind": "Node",
            "metadata": {"uid": "u", "name": "n", "labels": {"b": "<", "a": ""}}});

        let line = String::from_utf8(compact(&node)).unwrap();

        let metadata = r#""metadata":{"name":"n","uid":"u","labels":{"a":"","b":"\u003c"}}"#;
        let spec = r#""spec":{"podCIDR":"c","taints":[{"key":"k","effect":"E"}]}"#;
        assert_eq!(
            line,
            format!(r#"{{"kind":"Node","apiVersion":"v1",{metadata},{spec}}}"#)
        );
    }

    #[test]
    fn empty_things_stay_on_their_line_when_indented() {
        let text = String::from_utf8(pretty(&json!({"kind": "Status", "metadata": {}, "items": [1]}))).unwrap();

        assert_eq!(
            text,
            "{\n  \"kind\": \"Status\",\n  \"metadata\": {},\n  \"items\": [\n    1\n  ]\n}"
        );
    }
}
