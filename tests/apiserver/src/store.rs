//! The objects, their revisions, and the log of changes from which watches and lists of older revisions are answered. It knows no HTTP
//! and judges no object.
//!
//! One counter numbers all writes, as in etcd. Each object is encoded once per representation, however many clients read it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::encode;
use crate::resource::{RESOURCES, Resource};

/// How many changes of a resource are kept; a watch that is further behind has expired.
const LOG_LENGTH: usize = 20_000;

/// What a watch may ask to see of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// All of it.
    Full,
    /// `PartialObjectMetadata`.
    Metadata,
}

/// Where an object is: its namespace (empty without one) and its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn of(object: &Value) -> Self {
        let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
        Self {
            namespace: part("namespace"),
            name: part("name"),
        }
    }

    /// As continue tokens write it: `/name`, or `/namespace/name`.
    pub(crate) fn path(&self) -> String {
        if self.namespace.is_empty() {
            format!("/{}", self.name)
        } else {
            format!("/{}/{}", self.namespace, self.name)
        }
    }
}

/// An object as it was at one revision.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) value: Value,
    full: OnceLock<Bytes>,
    metadata: OnceLock<Bytes>,
}

impl Object {
    pub(crate) fn new(value: Value) -> Self {
        Self {
            value,
            full: OnceLock::new(),
            metadata: OnceLock::new(),
        }
    }

    /// Its JSON, on one line.
    pub(crate) fn encoded(&self, shape: Shape) -> &Bytes {
        match shape {
            Shape::Full => self.full.get_or_init(|| encode::compact(&self.value).into()),
            Shape::Metadata => self
                .metadata
                .get_or_init(|| encode::compact(&metadata_only(&self.value)).into()),
        }
    }
}

/// The object as `PartialObjectMetadata`.
pub(crate) fn metadata_only(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    Added,
    Modified,
    Deleted,
}

impl ChangeKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// One write.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) kind: ChangeKind,
    /// The object after the write; of a deleted one, its last state with the revision of the deletion.
    pub(crate) object: Arc<Object>,
    /// The object before the write.
    pub(crate) before: Option<Arc<Object>>,
    lines: [OnceLock<Bytes>; 2],
}

impl Change {
    /// The event, as a watch without a selector says it.
    pub(crate) fn line(&self, shape: Shape) -> &Bytes {
        let slot = match shape {
            Shape::Full => 0,
            Shape::Metadata => 1,
        };
        self.lines[slot].get_or_init(|| event_line(self.kind, self.object.encoded(shape)))
    }
}

/// `{"type":…,"object":…}` and a newline.
pub(crate) fn event_line(kind: ChangeKind, object: &[u8]) -> Bytes {
    [
        b"{\"type\":\"",
        kind.name().as_bytes(),
        b"\",\"object\":",
        object,
        b"}\n",
    ]
    .concat()
    .into()
}

/// All objects of a resource.
#[derive(Debug, Default)]
struct Collection {
    objects: BTreeMap<Key, Arc<Object>>,
    log: VecDeque<Arc<Change>>,
    /// The oldest revision at which a watch may start.
    horizon: u64,
    /// The newest revision whose change is no longer in the log.
    forgotten: u64,
}

/// What the server keeps.
#[derive(Debug)]
pub(crate) struct Store {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

/// The store, while one request reads or writes it.
#[derive(Debug)]
pub(crate) struct State {
    revision: u64,
    collections: BTreeMap<(&'static str, &'static str), Collection>,
}

impl Store {
    pub(crate) fn new() -> Self {
        let collections = RESOURCES
            .iter()
            .map(|one| ((one.group, one.plural), Collection::default()))
            .collect();
        Self {
            state: Mutex::new(State {
                revision: 1,
                collections,
            }),
            changed: watch::Sender::new(1),
        }
    }

    /// Reads.
    pub(crate) fn read(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes, and wakes the watches.
    pub(crate) fn write<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.read();
        let before = state.revision;
        let result = work(&mut state);
        if state.revision != before {
            self.changed.send_replace(state.revision);
        }
        result
    }

    /// Tells of each new revision.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

impl State {
    /// The revision of the latest write.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Moves the counter, as writes to what nobody here looks at do.
    pub(crate) fn advance_to(&mut self, revision: u64) {
        self.revision = self.revision.max(revision);
    }

    pub(crate) fn object(&self, resource: &Resource, key: &Key) -> Option<&Arc<Object>> {
        self.collection(resource).objects.get(key)
    }

    /// Stores an object under the next revision, and returns it as it is stored.
    pub(crate) fn put(&mut self, resource: &Resource, mut value: Value) -> Arc<Object> {
        self.revision += 1;
        value["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let object = Arc::new(Object::new(value));
        let revision = self.revision;
        let collection = self.collection_mut(resource);
        let before = collection.objects.insert(Key::of(&object.value), object.clone());
        let kind = if before.is_some() {
            ChangeKind::Modified
        } else {
            ChangeKind::Added
        };
        collection.record(Change {
            revision,
            kind,
            object: object.clone(),
            before,
            lines: Default::default(),
        });
        object
    }

    /// Removes an object under the next revision. `last` is its state when it went.
    pub(crate) fn remove(&mut self, resource: &Resource, mut last: Value) {
        self.revision += 1;
        let revision = self.revision;
        last["metadata"]["resourceVersion"] = revision.to_string().into();
        let object = Arc::new(Object::new(last));
        let collection = self.collection_mut(resource);
        if let Some(before) = collection.objects.remove(&Key::of(&object.value)) {
            let kind = ChangeKind::Deleted;
            collection.record(Change {
                revision,
                kind,
                object,
                before: Some(before),
                lines: Default::default(),
            });
        }
    }

    /// All objects, in the order of their keys.
    pub(crate) fn objects(&self, resource: &Resource) -> Vec<Arc<Object>> {
        self.collection(resource).objects.values().cloned().collect()
    }

    /// All objects as they were at a revision; none if that is too long ago.
    pub(crate) fn objects_at(&self, resource: &Resource, revision: u64) -> Option<Vec<Arc<Object>>> {
        let collection = self.collection(resource);
        if revision < collection.horizon {
            return None;
        }
        let mut objects = collection.objects.clone();
        for change in collection
            .log
            .iter()
            .rev()
            .take_while(|change| change.revision > revision)
        {
            let key = Key::of(&change.object.value);
            match &change.before {
                Some(before) => objects.insert(key, before.clone()),
                None => objects.remove(&key),
            };
        }
        Some(objects.into_values().collect())
    }

    /// The changes after a revision; none if some of them are forgotten.
    pub(crate) fn changes_after(&self, resource: &Resource, revision: u64) -> Option<Vec<Arc<Change>>> {
        let collection = self.collection(resource);
        if revision < collection.forgotten {
            return None;
        }
        let start = collection.log.partition_point(|change| change.revision <= revision);
        Some(collection.log.iter().skip(start).cloned().collect())
    }

    /// The oldest revision at which a watch may start.
    pub(crate) fn horizon(&self, resource: &Resource) -> u64 {
        self.collection(resource).horizon
    }

    /// Lets all older revisions expire, for new watches and lists; those that are open have seen them.
    pub(crate) fn compact(&mut self) {
        let revision = self.revision;
        for collection in self.collections.values_mut() {
            collection.horizon = revision;
        }
    }

    fn collection(&self, resource: &Resource) -> &Collection {
        self.collections
            .get(&(resource.group, resource.plural))
            .expect("every resource has its collection")
    }

    fn collection_mut(&mut self, resource: &Resource) -> &mut Collection {
        self.collections
            .get_mut(&(resource.group, resource.plural))
            .expect("every resource has its collection")
    }
}

impl Collection {
    fn record(&mut self, change: Change) {
        self.log.push_back(Arc::new(change));
        if self.log.len() > LOG_LENGTH
            && let Some(oldest) = self.log.pop_front()
        {
            self.forgotten = oldest.revision;
            self.horizon = self.horizon.max(oldest.revision);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: &Resource = &RESOURCES[0];

    #[test]
    fn older_revisions_can_be_listed_until_they_expire() {
        let store = Store::new();
        let names = |state: &State, revision| {
            let objects = state.objects_at(NODES, revision)?;
            Some(
                objects
                    .iter()
                    .map(|one| (one.value["metadata"]["name"].clone(), one.value["x"].clone()))
                    .collect::<Vec<_>>(),
            )
        };
        store.write(|state| {
            state.put(NODES, json!({"metadata": {"name": "a"}, "x": 1}));
            state.put(NODES, json!({"metadata": {"name": "b"}, "x": 1}));
            state.put(NODES, json!({"metadata": {"name": "a"}, "x": 2}));
            state.remove(NODES, json!({"metadata": {"name": "b"}, "x": 1}));
        });

        let state = store.read();

        assert_eq!(names(&state, 1), Some(vec![]));
        assert_eq!(
            names(&state, 3),
            Some(vec![("a".into(), 1.into()), ("b".into(), 1.into())])
        );
        assert_eq!(
            names(&state, 4),
            Some(vec![("a".into(), 2.into()), ("b".into(), 1.into())])
        );
        assert_eq!(names(&state, 5), Some(vec![("a".into(), 2.into())]));
        drop(state);
        store.write(State::compact);
        let state = store.read();
        assert_eq!(
            (names(&state, 4), names(&state, 5)),
            (None, Some(vec![("a".into(), 2.into())]))
        );
    }
}
