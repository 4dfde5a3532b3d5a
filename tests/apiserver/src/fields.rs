//! Who owns which field: sets of fields as `managedFields` writes them, and how they move when an object is written or applied. Pure.
//!
//! A set is a tree; its steps are those of FieldsV1: `f:name` into a map, `k:{"type":"Ready"}` to an item of a keyed list,
//! `v:"10.244.1.0/24"` to an item of a set. `.` says that the place itself belongs to the set, not only what is below.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::schema::{self, ListKind};

/// A set of fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields {
    here: bool,
    below: BTreeMap<String, Self>,
}

/// How a manager came to own its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    Apply,
    Update,
}

/// One owner of fields: an entry of `managedFields`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manager {
    pub(crate) name: String,
    pub(crate) operation: Operation,
    pub(crate) subresource: String,
    pub(crate) api_version: String,
    /// Missing when the manager has only ever confirmed what others had written.
    pub(crate) time: Option<String>,
    pub(crate) fields: Fields,
}

/// A field that an apply may not take without force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) manager: Manager,
    pub(crate) paths: Vec<String>,
}

impl Fields {
    pub(crate) fn is_empty(&self) -> bool {
        !self.here && self.below.is_empty()
    }

    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut below = self.below.clone();
        for (step, theirs) in &other.below {
            let ours = below.entry(step.clone()).or_default();
            *ours = ours.union(theirs);
        }
        Self {
            here: self.here || other.here,
            below,
        }
    }

    pub(crate) fn minus(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && !theirs, |ours| ours.clone())
    }

    pub(crate) fn and(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && theirs, |_| Self::default())
    }

    fn combine(&self, other: &Self, here: fn(bool, bool) -> bool, alone: fn(&Self) -> Self) -> Self {
        let below = self.below.iter().filter_map(|(step, ours)| {
            let rest = other
                .below
                .get(step)
                .map_or_else(|| alone(ours), |theirs| ours.combine(theirs, here, alone));
            (!rest.is_empty()).then(|| (step.clone(), rest))
        });
        Self {
            here: here(self.here, other.here),
            below: below.collect(),
        }
    }

    /// As FieldsV1.
    pub(crate) fn json(&self) -> Value {
        let mut json = Map::new();
        if self.here && !self.below.is_empty() {
            json.insert(".".into(), json!({}));
        }
        for (step, below) in &self.below {
            json.insert(step.clone(), below.json());
        }
        Value::Object(json)
    }

    fn parse(json: &Value) -> Self {
        let Some(steps) = json.as_object() else {
            return Self::default();
        };
        let below: BTreeMap<_, _> = steps
            .iter()
            .filter(|(step, _)| *step != ".")
            .map(|(step, below)| (step.clone(), Self::parse(below)))
            .collect();
        Self {
            here: below.is_empty() || steps.contains_key("."),
            below,
        }
    }

    /// The paths of all members, as conflicts print them: `.metadata.annotations.e.example/port`.
    fn paths(&self, prefix: &str) -> Vec<String> {
        let mut paths = Vec::new();
        if self.here {
            paths.push(prefix.to_owned());
        }
        for (step, below) in &self.below {
            let next = match step.split_at(2) {
                ("f:", name) => format!("{prefix}.{name}"),
                ("k:", key) => {
                    let key: Map<String, Value> = serde_json::from_str(key).unwrap_or_default();
                    let pairs: Vec<_> = key.iter().map(|(name, value)| format!("{name}={value}")).collect();
                    format!("{prefix}[{}]", pairs.join(","))
                }
                (_, value) => format!("{prefix}[={value}]"),
            };
            paths.extend(below.paths(&next));
        }
        paths
    }
}

/// All fields that a value of an apply names.
pub(crate) fn named(value: &Value) -> Fields {
    named_at(&owned_part(value), &mut Vec::new())
}

fn named_at<'a>(value: &'a Value, path: &mut Vec<&'a str>) -> Fields {
    let mut fields = Fields::default();
    match value {
        Value::Object(map) if !map.is_empty() && !schema::is_atomic_map(path) => {
            for (name, value) in map {
                path.push(name);
                fields.below.insert(format!("f:{name}"), named_at(value, path));
                path.pop();
            }
        }
        Value::Array(items) if !items.is_empty() && schema::list(path) != ListKind::Atomic => {
            for item in items {
                let mut below = if item.is_object() {
                    named_at(item, &mut vec!["", ""])
                } else {
                    Fields::default()
                };
                below.here = true;
                fields.below.insert(step(schema::list(path), item), below);
            }
        }
        Value::Object(_) | Value::Array(_) | Value::String(_) | Value::Number(_) | Value::Bool(_) | Value::Null => {
            fields.here = !path.is_empty();
        }
    }
    fields
}

/// The fields of `new` that are not in `old`, or differ there.
fn changed(old: &Value, new: &Value) -> Fields {
    changed_at(Some(&owned_part(old)), &owned_part(new), &mut Vec::new())
}

fn changed_at<'a>(old: Option<&Value>, new: &'a Value, path: &mut Vec<&'a str>) -> Fields {
    let mut fields = Fields::default();
    match new {
        Value::Object(map) if !schema::is_atomic_map(path) => {
            let old = old.and_then(Value::as_object);
            fields.here = old.is_none();
            for (name, value) in map {
                path.push(name);
                let below = changed_at(old.and_then(|old| old.get(name)), value, path);
                path.pop();
                if !below.is_empty() {
                    fields.below.insert(format!("f:{name}"), below);
                }
            }
        }
        Value::Array(items) if schema::list(path) != ListKind::Atomic => {
            let kind = schema::list(path);
            let old = old.and_then(Value::as_array);
            fields.here = old.is_none();
            for item in items {
                let step = step(kind, item);
                let before = old.and_then(|old| old.iter().find(|before| self::step(kind, before) == step));
                let mut below = if item.is_object() {
                    changed_at(before, item, &mut vec!["", ""])
                } else {
                    Fields::default()
                };
                below.here = before.is_none();
                if !below.is_empty() {
                    fields.below.insert(step, below);
                }
            }
        }
        Value::Object(_) | Value::Array(_) | Value::String(_) | Value::Number(_) | Value::Bool(_) | Value::Null => {
            fields.here = old != Some(new);
        }
    }
    fields
}

fn step(kind: ListKind, item: &Value) -> String {
    match kind {
        ListKind::Map(keys) => {
            let key: Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), item[*key].clone())).collect();
            format!("k:{}", Value::Object(key))
        }
        ListKind::Set | ListKind::Atomic => format!("v:{item}"),
    }
}

/// The object without what nobody owns.
fn owned_part(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.remove("apiVersion");
        fields.remove("kind");
        if let Some(metadata) = fields.get_mut("metadata").and_then(Value::as_object_mut) {
            for name in schema::UNOWNED_METADATA {
                metadata.remove(name);
            }
        }
    }
    object
}

/// The managers of an object.
pub(crate) fn managers(object: &Value) -> Vec<Manager> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let entries = object["metadata"]["managedFields"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    entries
        .iter()
        .map(|entry| Manager {
            name: text(&entry["manager"]),
            operation: if entry["operation"] == "Apply" {
                Operation::Apply
            } else {
                Operation::Update
            },
            subresource: text(&entry["subresource"]),
            api_version: text(&entry["apiVersion"]),
            time: entry["time"].as_str().map(str::to_owned),
            fields: Fields::parse(&entry["fieldsV1"]),
        })
        .collect()
}

/// Writes the managers into an object, those that own nothing left out.
pub(crate) fn set_managers(object: &mut Value, mut managers: Vec<Manager>) {
    managers.retain(|manager| !manager.fields.is_empty());
    let key = |one: &Manager| {
        (
            one.operation,
            one.time.clone(),
            one.name.clone(),
            one.subresource.clone(),
        )
    };
    managers.sort_by_key(key);
    let Some(metadata) = object["metadata"].as_object_mut() else {
        return;
    };
    metadata.remove("managedFields");
    if !managers.is_empty() {
        metadata.insert("managedFields".into(), managers.iter().map(Manager::json).collect());
    }
}

impl Manager {
    fn json(&self) -> Value {
        let operation = match self.operation {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        };
        let mut json = json!({"manager": self.name, "operation": operation, "apiVersion": self.api_version,
            "fieldsType": "FieldsV1", "fieldsV1": self.fields.json()});
        if let Some(time) = &self.time {
            json["time"] = time.as_str().into();
        }
        if !self.subresource.is_empty() {
            json["subresource"] = self.subresource.as_str().into();
        }
        json
    }

    fn is(&self, other: &Self) -> bool {
        (&self.name, self.operation, &self.subresource) == (&other.name, other.operation, &other.subresource)
    }

    /// How conflicts name the manager.
    pub(crate) fn described(&self) -> String {
        match self.operation {
            Operation::Apply => format!("{:?}", self.name),
            Operation::Update if self.subresource.is_empty() => format!("{:?} using {}", self.name, self.api_version),
            Operation::Update => {
                format!(
                    "{:?} with subresource {:?} using {}",
                    self.name, self.subresource, self.api_version
                )
            }
        }
    }
}

/// Moves ownership after a create, update or patch by `writer`, whose `fields` are not looked at.
pub(crate) fn track_update(old: &Value, new: &mut Value, writer: Manager) {
    let taken = changed(old, new);
    let removed = changed(new, old).minus(&taken);
    let mut managers = managers(old);
    for manager in &mut managers {
        manager.fields = manager.fields.minus(&taken).minus(&removed);
    }
    if !taken.is_empty() {
        match managers.iter_mut().find(|one| one.is(&writer)) {
            Some(manager) => {
                manager.fields = manager.fields.union(&taken);
                manager.time = writer.time;
            }
            None => managers.push(Manager {
                fields: taken,
                ..writer
            }),
        }
    }
    set_managers(new, managers);
}

/// What an apply comes to.
#[derive(Debug)]
pub(crate) struct Applied {
    /// The object after it.
    pub(crate) object: Value,
    /// The fields that others own with other values; without force the apply fails.
    pub(crate) conflicts: Vec<Conflict>,
}

/// Applies `wanted` to `live` on behalf of `applier`, whose `fields` are not looked at.
pub(crate) fn apply(live: &Value, wanted: &Value, applier: Manager) -> Applied {
    let mut managers = managers(live);
    let fields = named(wanted);
    let previous = managers
        .iter()
        .position(|one| one.is(&applier))
        .map(|index| managers.remove(index));
    let mut object = live.clone();
    merge(&mut object, wanted, &mut Vec::new());

    let taken = changed(live, &object);
    let mut conflicts = Vec::new();
    for manager in &mut managers {
        let lost = manager.fields.and(&taken).and(&fields);
        if !lost.is_empty() {
            conflicts.push(Conflict {
                manager: manager.clone(),
                paths: lost.paths(""),
            });
            manager.fields = manager.fields.minus(&lost);
        }
    }
    conflicts.sort_by(|one, other| one.manager.name.cmp(&other.manager.name));

    if let Some(previous) = &previous {
        let others = managers
            .iter()
            .fold(fields.clone(), |all, manager| all.union(&manager.fields));
        prune(&mut object, &previous.fields.minus(&fields), &others, &mut Vec::new());
    }
    let unchanged = owned_part(live) == owned_part(&without_empty_maps(object.clone()));
    let time = if unchanged {
        previous.and_then(|previous| previous.time)
    } else {
        applier.time.clone()
    };
    managers.push(Manager {
        fields,
        time,
        ..applier
    });
    set_managers(&mut object, managers);
    Applied { object, conflicts }
}

/// `annotations` and `labels` that hold nothing are not there.
pub(crate) fn without_empty_maps(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for name in ["annotations", "labels", "finalizers"] {
            let empty = metadata.get(name).is_some_and(|value| {
                value.is_null()
                    || value.as_object().is_some_and(Map::is_empty)
                    || value.as_array().is_some_and(Vec::is_empty)
            });
            if empty {
                metadata.remove(name);
            }
        }
    }
    object
}

fn merge<'a>(live: &mut Value, wanted: &'a Value, path: &mut Vec<&'a str>) {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) if !schema::is_atomic_map(path) => {
            for (name, value) in wanted {
                path.push(name);
                match live.get_mut(name) {
                    Some(live) => merge(live, value, path),
                    None => {
                        live.insert(name.clone(), value.clone());
                    }
                }
                path.pop();
            }
        }
        (Value::Array(live), Value::Array(wanted)) if schema::list(path) != ListKind::Atomic => {
            let kind = schema::list(path);
            for item in wanted {
                match live.iter_mut().find(|one| step(kind, one) == step(kind, item)) {
                    Some(one) => merge(one, item, &mut vec!["", ""]),
                    None => live.push(item.clone()),
                }
            }
        }
        (live, wanted) => *live = wanted.clone(),
    }
}

/// Removes from `value` what is in `gone` and below no owner's hand.
fn prune<'a>(value: &mut Value, gone: &'a Fields, owned: &Fields, path: &mut Vec<&'a str>) {
    let nobody = Fields::default();
    for (step, below) in &gone.below {
        let still = owned.below.get(step).unwrap_or(&nobody);
        let leaves = below.here && still.is_empty();
        match (step.split_at(2), &mut *value) {
            (("f:", name), Value::Object(map)) => {
                if leaves {
                    map.remove(name);
                } else if let Some(inner) = map.get_mut(name) {
                    path.push(name);
                    prune(inner, below, still, path);
                    path.pop();
                }
            }
            (_, Value::Array(items)) => {
                let kind = schema::list(path);
                if leaves {
                    items.retain(|item| self::step(kind, item) != *step);
                } else if let Some(item) = items.iter_mut().find(|item| self::step(kind, item) == *step) {
                    prune(item, below, still, &mut vec!["", ""]);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(name: &str, operation: Operation) -> Manager {
        Manager {
            name: name.into(),
            operation,
            subresource: String::new(),
            api_version: "v1".into(),
            time: Some("T".into()),
            fields: Fields::default(),
        }
    }

    #[test]
    fn an_applied_condition_is_merged_by_its_type_and_goes_with_its_owner() {
        let live = json!({"metadata": {"name": "a"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        let wanted = json!({"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}});

        let applied = apply(&live, &wanted, manager("m", Operation::Apply)).object;
        let removed = apply(&applied, &json!({}), manager("m", Operation::Apply)).object;

        let both = json!([{"type": "Ready", "status": "True"}, {"type": "NetworkUnavailable", "status": "False"}]);
        assert_eq!(applied["status"]["conditions"], both);
        assert_eq!(removed["status"], live["status"]);
        assert_eq!(managers(&removed), []);
    }

    #[test]
    fn an_update_takes_what_it_changes_and_frees_what_it_removes() {
        let mut first = json!({"metadata": {"annotations": {"k": "1", "l": "1"}}});
        track_update(&json!({"metadata": {}}), &mut first, manager("one", Operation::Update));
        let mut second = json!({"metadata": {"annotations": {"k": "2"}}});

        track_update(&first, &mut second, manager("two", Operation::Update));

        let fields: Vec<_> = managers(&second)
            .iter()
            .map(|one| (one.name.clone(), one.fields.json()))
            .collect();
        let expected = [
            ("one".into(), json!({"f:metadata": {"f:annotations": {}}})),
            ("two".into(), json!({"f:metadata": {"f:annotations": {"f:k": {}}}})),
        ];
        assert_eq!(fields, expected);
    }
}
