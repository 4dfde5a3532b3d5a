//! Creates, replaces, patches and deletes objects the way the real server does: defaults, guards, ownership, validation, admission, and no
//! write where nothing changes. It works on the store and knows no HTTP.

use serde_json::{Value, json};

use crate::clock;
use crate::encode;
use crate::fields::{self, Manager, Operation};
use crate::identity::{User, uid};
use crate::patch;
use crate::policy::Policy;
use crate::resource::{Resource, node_status};
use crate::status::{self, Cause, Refusal};
use crate::store::{Key, State};
use crate::validate;

/// Who writes, and how.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    pub(crate) resource: &'static Resource,
    /// `status`, or empty for the object itself.
    pub(crate) subresource: &'a str,
    pub(crate) user: &'a User,
    /// The field manager.
    pub(crate) manager: String,
    /// Nothing is stored.
    pub(crate) dry_run: bool,
    /// Unknown fields are refused instead of warned about.
    pub(crate) strict: bool,
    pub(crate) now: i64,
    pub(crate) policy: Option<&'a Policy>,
}

/// What came of a write.
#[derive(Debug, PartialEq)]
pub(crate) struct Written {
    /// The object, or a `Status` when it is gone.
    pub(crate) answer: Value,
    /// Whether the object is new.
    pub(crate) created: bool,
    /// Texts for `Warning` headers.
    pub(crate) warnings: Vec<String>,
}

/// The ways to change a part of an object.
#[derive(Debug)]
pub(crate) enum Patch {
    Merge(Value),
    Json(Vec<Value>),
    Strategic(Value),
    Apply {
        wanted: Value,
        force: bool,
        may_create: Result<(), Refusal>,
    },
}

/// Under which conditions an object may be deleted.
#[derive(Debug, Default)]
pub(crate) struct Preconditions {
    pub(crate) uid: Option<String>,
    pub(crate) revision: Option<String>,
}

impl Writer<'_> {
    /// POST.
    pub(crate) fn create(&self, state: &mut State, namespace: &str, mut object: Value) -> Result<Written, Refusal> {
        let warnings = self.checked(&mut object)?;
        if let Some(prefix) = object["metadata"]["generateName"].as_str().map(str::to_owned)
            && object["metadata"]["name"].as_str().unwrap_or_default().is_empty()
        {
            object["metadata"]["name"] = format!("{prefix}{}", &uid()[..5]).into();
        }
        self.place(state, namespace, &mut object)?;
        let key = Key::of(&object);
        if state.object(self.resource, &key).is_some() {
            return Err(Refusal::already_exists(self.resource, &key.name));
        }
        // Owned is what the decoder made of the object, not the body as it came.
        let mut object = fields::without_empty_maps(object);
        if self.resource.plural == "nodes" {
            default(&mut object, "spec", json!({}));
            pod_ranges(&mut object["spec"]);
        }
        let skeleton = json!({"metadata": {}, "spec": {}, "status": node_status()});
        fields::track_update(&skeleton, &mut object, self.writer(Operation::Update));
        self.stored_new(state, object, warnings)
    }

    /// PUT.
    pub(crate) fn update(&self, state: &mut State, key: &Key, mut object: Value) -> Result<Written, Refusal> {
        let warnings = self.checked(&mut object)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        if name != key.name {
            return Err(Refusal::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                key.name
            )));
        }
        let old = self.existing(state, key)?;
        if let Some(uid) = object["metadata"]["uid"].as_str()
            && old["metadata"]["uid"] != uid
        {
            let why = format!(
                "StorageError: invalid object, Code: 4, Key: /registry/{}{}, ResourceVersion: 0, AdditionalErrorMsg: \
                 Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                self.resource.registry(),
                key.path(),
                old["metadata"]["uid"].as_str().unwrap_or_default()
            );
            return Err(Refusal::conflict(self.resource, &key.name, &why));
        }
        let revision = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if revision.is_empty() && !self.resource.unconditional_update {
            let cause = Cause::invalid("metadata.resourceVersion", &0.into(), "must be specified for an update");
            return Err(Refusal::invalid(
                self.resource.plural,
                self.resource.group,
                &key.name,
                &[cause],
            ));
        }
        keep(&old, &mut object, "namespace");
        self.changed(state, &old, object, warnings)
    }

    /// PATCH.
    pub(crate) fn patch(&self, state: &mut State, key: &Key, patch: Patch) -> Result<Written, Refusal> {
        let old = match (&patch, state.object(self.resource, key)) {
            (_, Some(object)) => object.value.clone(),
            (Patch::Apply { .. }, None) => {
                let Patch::Apply { wanted, may_create, .. } = patch else {
                    return Err(self.missing(key));
                };
                return self.applied_new(state, key, &wanted, may_create);
            }
            (_, None) => return Err(self.missing(key)),
        };
        let mut new = old.clone();
        let mut touched = Value::Null;
        match patch {
            Patch::Merge(patch) => {
                patch::merge(&mut new, &patch);
                touched = patch;
            }
            Patch::Strategic(patch) => patch::strategic(&mut new, &patch),
            Patch::Json(operations) => patch::json(&mut new, &operations).map_err(|()| {
                let message = "the server rejected our request due to an error in our request";
                Refusal::new(422, "Invalid", message).with_details(json!({}))
            })?,
            Patch::Apply { wanted, force, .. } => return self.applied(state, key, &old, &wanted, force),
        }
        if let Some(wrong) = validate::wrong_type(&new) {
            let cause = Cause::invalid("patch", &encode::patched(&new, &touched).into(), &wrong);
            return Err(Refusal::invalid("", "", "", &[cause]));
        }
        let unknown = self.unknown(&new)?;
        validate::prune(self.resource, &mut new);
        self.changed(state, &old, new, unknown)
    }

    /// DELETE.
    pub(crate) fn delete(&self, state: &mut State, key: &Key, only: &Preconditions) -> Result<Written, Refusal> {
        let mut object = self.existing(state, key)?;
        let metadata = &object["metadata"];
        let (uid, revision) = (
            metadata["uid"].as_str().unwrap_or_default(),
            metadata["resourceVersion"].as_str().unwrap_or_default(),
        );
        let refused = |why: String| {
            let (kind, name) = (self.resource.kind, &key.name);
            let message = format!("Operation cannot be fulfilled on {kind} {name:?}: {why}");
            Err(Refusal::new(409, "Conflict", message).with_details(status::details(name, self.resource.group, kind)))
        };
        if let Some(wanted) = only.uid.as_deref().filter(|wanted| *wanted != uid) {
            return refused(format!(
                "the UID in the precondition ({wanted}) does not match the UID in record ({uid}). The object might have been \
                 deleted and then recreated"
            ));
        }
        if let Some(wanted) = only.revision.as_deref().filter(|wanted| *wanted != revision) {
            return refused(format!(
                "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record ({revision}). \
                 The object might have been modified"
            ));
        }
        if metadata["finalizers"].as_array().is_some_and(|list| !list.is_empty()) {
            if metadata["deletionTimestamp"].is_null() && !self.dry_run {
                object["metadata"]["deletionTimestamp"] = clock::rfc3339(self.now).into();
                object["metadata"]["deletionGracePeriodSeconds"] = 0.into();
                object = state.put(self.resource, object).value.clone();
            }
            return Ok(Written {
                answer: object,
                created: false,
                warnings: Vec::new(),
            });
        }
        let answer = status::deleted(self.resource, &key.name, &object["metadata"]["uid"]);
        if !self.dry_run {
            state.remove(self.resource, object);
        }
        Ok(Written {
            answer,
            created: false,
            warnings: Vec::new(),
        })
    }

    /// Refuses what a decoder would; the warnings are about unknown fields, which are gone afterwards.
    fn checked(&self, object: &mut Value) -> Result<Vec<String>, Refusal> {
        let resource = self.resource;
        let refused = |why: String| Err(Refusal::bad_request(why));
        let handled = |version: &Value, kind: &str, why: &str| {
            let version = version.as_str().unwrap_or("v1");
            format!(
                "{kind} in version {version:?} cannot be handled as a {}: {why}",
                resource.kind
            )
        };
        if let Some(kind) = object["kind"].as_str()
            && (kind != resource.kind || object["apiVersion"] != resource.api_version().as_str())
        {
            let group = if resource.group.is_empty() {
                "core"
            } else {
                resource.group.split('.').next().unwrap_or_default()
            };
            let version = object["apiVersion"].as_str().unwrap_or_default().replace('/', ".");
            let why = format!(
                "converting ({version}.{kind}) to ({group}.{}): unknown conversion",
                resource.kind
            );
            return refused(handled(&object["apiVersion"], kind, &why));
        }
        if !object.is_object() {
            return refused("the object provided is no JSON object".into());
        }
        if let Some(wrong) = validate::wrong_type(object) {
            return refused(handled(&object["apiVersion"], resource.kind, &wrong));
        }
        let warnings = self.unknown(object)?;
        validate::prune(resource, object);
        object["kind"] = resource.kind.into();
        object["apiVersion"] = resource.api_version().into();
        if !object["metadata"].is_object() {
            object["metadata"] = json!({});
        }
        Ok(warnings)
    }

    fn unknown(&self, object: &Value) -> Result<Vec<String>, Refusal> {
        let unknown = validate::unknown_fields(self.resource, object);
        let sentences: Vec<_> = unknown.iter().map(|field| format!("unknown field {field:?}")).collect();
        if self.strict && !sentences.is_empty() {
            let (kind, version) = (self.resource.kind, self.resource.api_version());
            return Err(Refusal::bad_request(format!(
                "{kind} in version {version:?} cannot be handled as a {kind}: strict decoding error: {}",
                sentences.join(", ")
            )));
        }
        Ok(sentences)
    }

    /// Puts a new object into its namespace.
    fn place(&self, state: &State, namespace: &str, object: &mut Value) -> Result<(), Refusal> {
        if !self.resource.namespaced {
            return Ok(());
        }
        let said = object["metadata"]["namespace"].as_str().unwrap_or(namespace).to_owned();
        if said != namespace {
            return Err(Refusal::bad_request(format!(
                "the namespace of the provided object does not match the namespace sent on the request ({said} is not {namespace})"
            )));
        }
        object["metadata"]["namespace"] = namespace.into();
        let namespaces = Resource::find("", "v1", "namespaces").expect("namespaces are a resource");
        let key = Key {
            namespace: String::new(),
            name: namespace.into(),
        };
        if state.object(namespaces, &key).is_none() {
            return Err(Refusal::not_found(namespaces, namespace));
        }
        Ok(())
    }

    /// Stores an object that was not there, its ownership settled.
    fn stored_new(&self, state: &mut State, mut object: Value, warnings: Vec<String>) -> Result<Written, Refusal> {
        let metadata = &mut object["metadata"];
        metadata["uid"] = uid().into();
        metadata["creationTimestamp"] = clock::rfc3339(self.now).into();
        if let Some(metadata) = metadata.as_object_mut() {
            metadata.remove("resourceVersion");
        }
        self.fill_defaults(&mut object);
        if self.resource.plural == "nodes" {
            taint(&mut object);
        }
        let object = fields::without_empty_maps(object);
        validate::object(self.resource, &object, None)?;
        let answer = if self.dry_run {
            object
        } else {
            state.put(self.resource, object).value.clone()
        };
        Ok(Written {
            answer,
            created: true,
            warnings,
        })
    }

    /// Stores a changed object, unless nothing changed.
    fn changed(
        &self,
        state: &mut State,
        old: &Value,
        mut new: Value,
        warnings: Vec<String>,
    ) -> Result<Written, Refusal> {
        self.guard(old, &new)?;
        self.keep_what_is_not_ours(old, &mut new);
        let mut new = fields::without_empty_maps(new);
        self.fill_defaults(&mut new);
        if fields::managers(old).is_empty() {
            // Who owns nothing is not asked: an object without owners stays so until somebody applies.
            fields::set_managers(&mut new, Vec::new());
        } else {
            fields::track_update(old, &mut new, self.writer(Operation::Update));
        }
        self.settled(state, old, new, warnings)
    }

    /// What an update, patch or apply comes to, once ownership is settled.
    fn settled(
        &self,
        state: &mut State,
        old: &Value,
        new: Value,
        mut warnings: Vec<String>,
    ) -> Result<Written, Refusal> {
        validate::object(self.resource, &new, Some(old))?;
        if let Some(policy) = self.policy {
            warnings.extend(policy.judge(self.user, self.resource, self.subresource, old, &new)?);
        }
        let written = |answer| Written {
            answer,
            created: false,
            warnings,
        };
        if without_times(&new) == without_times(old) {
            return Ok(written(old.clone()));
        }
        if self.dry_run {
            return Ok(written(new));
        }
        let finalized = !new["metadata"]["deletionTimestamp"].is_null()
            && new["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty);
        if finalized {
            state.remove(self.resource, new.clone());
            return Ok(written(new));
        }
        Ok(written(state.put(self.resource, new).value.clone()))
    }

    fn applied(
        &self,
        state: &mut State,
        key: &Key,
        old: &Value,
        wanted: &Value,
        force: bool,
    ) -> Result<Written, Refusal> {
        self.applicable(key, wanted)?;
        let mut live = old.clone();
        if fields::managers(&live).is_empty() {
            // Whatever was there belongs to somebody from now on.
            let before = Manager {
                name: "before-first-apply".into(),
                ..self.writer(Operation::Update)
            };
            fields::track_update(&json!({"metadata": {}, "spec": {}, "status": {}}), &mut live, before);
        }
        let mut part = wanted.clone();
        if let Some(fields) = part.as_object_mut() {
            fields.remove(if self.subresource == "status" { "spec" } else { "status" });
        }
        let applied = fields::apply(&live, &part, self.writer(Operation::Apply));
        if !force && !applied.conflicts.is_empty() {
            return Err(conflict(&applied.conflicts));
        }
        let mut new = applied.object;
        self.guard(old, &new)?;
        self.keep_what_is_not_ours(old, &mut new);
        let mut new = fields::without_empty_maps(new);
        self.fill_defaults(&mut new);
        self.settled(state, old, new, Vec::new())
    }

    fn applied_new(
        &self,
        state: &mut State,
        key: &Key,
        wanted: &Value,
        may_create: Result<(), Refusal>,
    ) -> Result<Written, Refusal> {
        self.applicable(key, wanted)?;
        if self.subresource == "status" {
            return Err(self.missing(key));
        }
        may_create?;
        if let Some(uid) = wanted["metadata"]["uid"].as_str() {
            let why =
                format!("uid mismatch: the provided object specified uid {uid}, and no existing object was found");
            return Err(Refusal::conflict(self.resource, &key.name, &why));
        }
        let skeleton = json!({"metadata": {}, "spec": {}, "status": {}});
        let mut object = fields::apply(&skeleton, wanted, self.writer(Operation::Apply)).object;
        object["metadata"]["name"] = key.name.as_str().into();
        for part in ["spec", "status"] {
            if wanted[part].is_null()
                && let Some(fields) = object.as_object_mut()
            {
                fields.remove(part);
            }
        }
        self.place(state, &key.namespace, &mut object)?;
        self.stored_new(state, object, Vec::new())
    }

    /// Whether the body of an apply is one for this object.
    fn applicable(&self, key: &Key, wanted: &Value) -> Result<(), Refusal> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (version, kind) = (text(&wanted["apiVersion"]), text(&wanted["kind"]));
        if (version.as_str(), kind.as_str()) != (self.resource.api_version().as_str(), self.resource.kind) {
            let (group, version) = version.split_once('/').unwrap_or(("", &version));
            return Err(Refusal::bad_request(format!(
                "invalid object type: {group}/{version}, Kind={kind}"
            )));
        }
        if !wanted["metadata"]["managedFields"].is_null() {
            return Err(Refusal::bad_request("metadata.managedFields must be nil"));
        }
        let name = text(&wanted["metadata"]["name"]);
        if name != key.name {
            return Err(Refusal::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                key.name
            )));
        }
        let (group, version) = (self.resource.group, self.resource.version);
        let typed = |why: String| {
            let message =
                format!("failed to create typed patch object (/{name}; {group}/{version}, Kind={kind}): {why}");
            Err(Refusal::new(500, "", message))
        };
        if let Some(field) = validate::unknown_fields(self.resource, wanted).first() {
            return typed(format!(".{field}: field not declared in schema"));
        }
        for map in ["annotations", "labels"] {
            for (key, value) in wanted["metadata"][map].as_object().into_iter().flatten() {
                if !value.is_string() {
                    let value = format!("&value.valueUnstructured{{Value:{value}}}");
                    return typed(format!(".metadata.{map}.{key}: expected string, got {value}"));
                }
            }
        }
        Ok(())
    }

    /// Refuses to overwrite what the client has not seen.
    fn guard(&self, old: &Value, new: &Value) -> Result<(), Refusal> {
        let revision = new["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if !revision.is_empty() && old["metadata"]["resourceVersion"] != revision {
            return Err(Refusal::modified(
                self.resource,
                new["metadata"]["name"].as_str().unwrap_or_default(),
            ));
        }
        Ok(())
    }

    /// A write of the object leaves its status alone, and one of its status the rest; nobody sets what the server sets.
    fn keep_what_is_not_ours(&self, old: &Value, new: &mut Value) {
        let kept = if self.subresource == "status" { "spec" } else { "status" };
        if self.resource.has_status
            && let Some(fields) = new.as_object_mut()
        {
            match old.get(kept) {
                Some(value) => fields.insert(kept.into(), value.clone()),
                None => fields.remove(kept),
            };
        }
        for name in [
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "resourceVersion",
        ] {
            keep(old, new, name);
        }
        if new["metadata"]["uid"].as_str().unwrap_or_default().is_empty() {
            keep(old, new, "uid");
        }
    }

    fn fill_defaults(&self, object: &mut Value) {
        match self.resource.plural {
            "nodes" => {
                default(object, "spec", json!({}));
                pod_ranges(&mut object["spec"]);
                default(object, "status", json!({}));
                if let Some(defaults) = node_status().as_object() {
                    for (name, value) in defaults {
                        default(&mut object["status"], name, value.clone());
                    }
                }
            }
            "namespaces" => {
                default(object, "spec", json!({"finalizers": ["kubernetes"]}));
                default(object, "status", json!({"phase": "Active"}));
                let name = object["metadata"]["name"].clone();
                default(&mut object["metadata"], "labels", json!({}));
                object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
            }
            "pods" => default(object, "status", json!({"phase": "Pending"})),
            _ => {}
        }
    }

    fn writer(&self, operation: Operation) -> Manager {
        Manager {
            name: self.manager.clone(),
            operation,
            subresource: self.subresource.into(),
            api_version: self.resource.api_version(),
            time: Some(clock::rfc3339(self.now)),
            fields: fields::Fields::default(),
        }
    }

    fn existing(&self, state: &State, key: &Key) -> Result<Value, Refusal> {
        state
            .object(self.resource, key)
            .map(|object| object.value.clone())
            .ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &Key) -> Refusal {
        Refusal::not_found(self.resource, &key.name)
    }
}

fn keep(old: &Value, new: &mut Value, name: &str) {
    let Some(metadata) = new["metadata"].as_object_mut() else {
        return;
    };
    match old["metadata"].get(name) {
        Some(value) => metadata.insert(name.into(), value.clone()),
        None => metadata.remove(name),
    };
}

fn default(object: &mut Value, name: &str, value: Value) {
    if let Some(fields) = object.as_object_mut() {
        let field = fields.entry(name).or_insert(Value::Null);
        if field.is_null() {
            *field = value;
        }
    }
}

/// The singular field wins over the plural one, as the conversion between the two versions of the type has it.
fn pod_ranges(spec: &mut Value) {
    let single = spec["podCIDR"].as_str().unwrap_or_default().to_owned();
    let first = spec["podCIDRs"][0].as_str().unwrap_or_default().to_owned();
    if !single.is_empty() && first != single {
        spec["podCIDRs"] = json!([single]);
    } else if single.is_empty() && !first.is_empty() {
        spec["podCIDR"] = first.into();
    }
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
}

/// A new node is not ready, and an admission plugin says so.
fn taint(node: &mut Value) {
    let taint = json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"});
    default(&mut node["spec"], "taints", json!([]));
    if let Some(taints) = node["spec"]["taints"].as_array_mut()
        && !taints.contains(&taint)
    {
        taints.push(taint);
    }
}

/// What decides whether there is something to write: all but the versions, and the times of the owners.
fn without_times(object: &Value) -> Value {
    let mut object = object.clone();
    object["metadata"]["resourceVersion"] = Value::Null;
    for entry in object["metadata"]["managedFields"].as_array_mut().into_iter().flatten() {
        entry["time"] = Value::Null;
    }
    object
}

fn conflict(conflicts: &[fields::Conflict]) -> Refusal {
    let count: usize = conflicts.iter().map(|one| one.paths.len()).sum();
    let message = match conflicts {
        [only] if only.paths.len() == 1 => {
            format!(
                "Apply failed with 1 conflict: conflict with {}: {}",
                only.manager.described(),
                only.paths[0]
            )
        }
        several => {
            let paragraphs: Vec<_> = several
                .iter()
                .map(|one| {
                    format!(
                        "conflicts with {}:\n- {}",
                        one.manager.described(),
                        one.paths.join("\n- ")
                    )
                })
                .collect();
            format!("Apply failed with {count} conflicts: {}", paragraphs.join("\n"))
        }
    };
    let causes: Vec<_> = conflicts
        .iter()
        .flat_map(|one| {
            let message = format!("conflict with {}", one.manager.described());
            one.paths
                .iter()
                .map(move |path| json!({"reason": "FieldManagerConflict", "message": message, "field": path}))
        })
        .collect();
    Refusal::new(409, "Conflict", message).with_details(json!({"causes": causes}))
}
