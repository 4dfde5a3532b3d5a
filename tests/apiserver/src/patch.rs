//! What the kinds of patches make of an object: merge patch (RFC 7386), JSON patch (RFC 6902), strategic merge patch. Pure; apply is in
//! [`crate::fields`].

use serde_json::Value;

use crate::schema::{self, ListKind};

/// RFC 7386.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Some(target) = target.as_object_mut() else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            merge(target.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

/// A merge patch that also merges lists by their keys; `$patch: delete` removes an item.
pub(crate) fn strategic(target: &mut Value, patch: &Value) {
    strategic_at(target, patch, &mut Vec::new());
}

fn strategic_at<'a>(target: &mut Value, patch: &'a Value, path: &mut Vec<&'a str>) {
    match patch {
        Value::Object(fields) => {
            if !target.is_object() {
                *target = Value::Object(serde_json::Map::new());
            }
            let Some(target) = target.as_object_mut() else { return };
            // `$setElementOrder/…` only orders; the order of our keyed lists means nothing.
            for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with('$')) {
                if value.is_null() {
                    target.remove(name);
                    continue;
                }
                path.push(name);
                strategic_at(target.entry(name.clone()).or_insert(Value::Null), value, path);
                path.pop();
            }
        }
        Value::Array(items) => match (schema::strategic_list(path), &mut *target) {
            (ListKind::Map(keys), Value::Array(list)) => {
                for item in items {
                    let position = list
                        .iter()
                        .position(|one| keys.iter().all(|key| one[*key] == item[*key]));
                    match (position, item["$patch"] == "delete") {
                        (Some(index), true) => {
                            list.remove(index);
                        }
                        (None, true) => {}
                        (Some(index), false) => strategic_at(&mut list[index], item, &mut vec!["", ""]),
                        (None, false) => list.push(item.clone()),
                    }
                }
            }
            (ListKind::Set, Value::Array(list)) => {
                for item in items {
                    if !list.contains(item) {
                        list.push(item.clone());
                    }
                }
            }
            _ => *target = patch.clone(),
        },
        Value::String(_) | Value::Number(_) | Value::Bool(_) | Value::Null => *target = patch.clone(),
    }
}

/// RFC 6902.
///
/// # Errors
///
/// When an operation cannot be carried out; the server does not say which.
pub(crate) fn json(target: &mut Value, operations: &[Value]) -> Result<(), ()> {
    for operation in operations {
        let path = operation["path"].as_str().ok_or(())?;
        let value = operation.get("value");
        match operation["op"].as_str().ok_or(())? {
            "add" => add(target, path, value.ok_or(())?.clone())?,
            "remove" => {
                remove(target, path)?;
            }
            "replace" => *target.pointer_mut(path).ok_or(())? = value.ok_or(())?.clone(),
            "test" => {
                if target.pointer(path).unwrap_or(&Value::Null) != value.ok_or(())? {
                    return Err(());
                }
            }
            "copy" => {
                let copied = target.pointer(operation["from"].as_str().ok_or(())?).ok_or(())?.clone();
                add(target, path, copied)?;
            }
            "move" => {
                let moved = remove(target, operation["from"].as_str().ok_or(())?)?;
                add(target, path, moved)?;
            }
            _ => return Err(()),
        }
    }
    Ok(())
}

fn add(target: &mut Value, path: &str, value: Value) -> Result<(), ()> {
    let Some((parent, last)) = path.rsplit_once('/') else {
        *target = value;
        return Ok(());
    };
    match target.pointer_mut(parent).ok_or(())? {
        Value::Object(fields) => {
            fields.insert(unescaped(last), value);
        }
        Value::Array(items) if last == "-" => items.push(value),
        Value::Array(items) => {
            let index: usize = last.parse().map_err(|_| ())?;
            if index > items.len() {
                return Err(());
            }
            items.insert(index, value);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => return Err(()),
    }
    Ok(())
}

fn remove(target: &mut Value, path: &str) -> Result<Value, ()> {
    let (parent, last) = path.rsplit_once('/').ok_or(())?;
    match target.pointer_mut(parent).ok_or(())? {
        Value::Object(fields) => fields.remove(&unescaped(last)).ok_or(()),
        Value::Array(items) => {
            let index: usize = last.parse().map_err(|_| ())?;
            if index < items.len() {
                Ok(items.remove(index))
            } else {
                Err(())
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Err(()),
    }
}

fn unescaped(step: &str) -> String {
    step.replace("~1", "/").replace("~0", "~")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn merge_patches_replace_lists_and_strategic_ones_merge_them() {
        let node = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        let patch = json!({"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}});
        let (mut merged, mut strategically) = (node.clone(), node.clone());

        merge(&mut merged, &patch);
        strategic(&mut strategically, &patch);

        assert_eq!(merged, patch);
        assert_eq!(strategically["status"]["conditions"].as_array().map(Vec::len), Some(2));
    }

    #[test]
    fn json_patches_stop_at_the_first_operation_that_fails() {
        let mut node = json!({"metadata": {"annotations": {"a/b": "1"}}});

        let moved = json(
            &mut node,
            &[json!({"op": "move", "from": "/metadata/annotations/a~1b", "path": "/metadata/annotations/c"})],
        );
        let failed = json(
            &mut node,
            &[json!({"op": "remove", "path": "/metadata/annotations/a~1b"})],
        );

        assert_eq!(
            (moved, failed, node),
            (Ok(()), Err(()), json!({"metadata": {"annotations": {"c": "1"}}}))
        );
    }
}
