//! Watches: how they start, what each event says under a selector, bookmarks, timeouts, and the faults that meet them on the way. It reads
//! the store and writes nothing but its stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::body::{Piece, said};
use crate::context::{Context, StreamingLists};
use crate::encode;
use crate::fault::{Facts, WatchEffect};
use crate::link::Line;
use crate::list::{number, parse_revision};
use crate::request::Parameters;
use crate::resource::Resource;
use crate::selector::Selector;
use crate::status::{Cause, Refusal};
use crate::store::{Change, ChangeKind, Object, Shape, State, event_line, metadata_only};

/// How long a streaming list waits for a revision that is yet to come, in the server's seconds.
pub(crate) const FUTURE_SECONDS: u64 = 3;

/// A piece of a stream is not much larger than this.
const PIECE: usize = 64 * 1024;

/// A watch request, its parameters checked.
#[derive(Debug)]
pub(crate) struct Watch {
    resource: &'static Resource,
    namespace: String,
    selector: Selector,
    shape: Shape,
    start: Start,
    bookmarks: bool,
    /// After so many of the server's seconds it ends.
    timeout: u64,
}

/// What a watch says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// Changes from now on.
    Now,
    /// Changes after a revision.
    After(u64),
    /// All objects, as they are at this revision or later; then changes.
    Objects(u64),
    /// Nothing but an error, for the storage cannot do it.
    Broken,
}

impl Watch {
    pub(crate) fn parse(
        resource: &'static Resource,
        namespace: &str,
        shape: Shape,
        parameters: &Parameters,
        lists: StreamingLists,
    ) -> Result<Self, Refusal> {
        check_options(parameters, lists)?;
        let timeout = match number(parameters, "timeoutSeconds")? {
            None | Some(0) => server_timeout(),
            Some(seconds) => seconds,
        };
        let selector = Selector::parse(
            resource,
            parameters.text("labelSelector"),
            parameters.text("fieldSelector"),
        )?;
        let revision = parse_revision(parameters.text("resourceVersion")).map_err(|why| Refusal::new(500, "", why))?;
        let bookmarks = parameters.is_true("allowWatchBookmarks");
        let streaming = parameters
            .find("sendInitialEvents")
            .map(|text| text == "true" || text == "1");
        // Without a revision a watch that allows bookmarks is as good as a streaming list.
        let implied = bookmarks && streaming.is_none() && revision.unwrap_or(0) == 0;
        let start = match (streaming, revision) {
            (Some(true), _) if lists == StreamingLists::Broken => Start::Broken,
            _ if implied && lists == StreamingLists::Broken => Start::Broken,
            (Some(true), revision) => Start::Objects(revision.unwrap_or(0)),
            (None, None | Some(0)) => Start::Objects(0),
            (Some(false), None | Some(0)) => Start::Now,
            (_, Some(revision)) => Start::After(revision),
        };
        Ok(Self {
            resource,
            namespace: namespace.into(),
            selector,
            shape,
            start,
            bookmarks,
            timeout,
        })
    }

    /// Runs the watch until it ends or the client goes. `begun` is dropped when it is settled where the watch begins, so that a client
    /// that has its answer misses nothing that happens from then on.
    pub(crate) async fn run(
        self,
        context: Arc<Context>,
        facts: Facts,
        line: Arc<Line>,
        begun: oneshot::Sender<()>,
        out: mpsc::Sender<Piece>,
    ) {
        let opened = Instant::now();
        let deadline = opened + context.seconds(self.timeout);
        // Read before the store is, so that no change falls between the two.
        let mut changes = context.store.changes();
        let mut faults = context.faults.changes();
        let mut latest_fault = 0;
        let Some(mut position) = self.begin(&context, begun, &out).await else {
            return;
        };
        let mut bookmark = self.next_bookmark(&context, opened, deadline);
        let mut is_first = true;
        loop {
            // A fault that meets an open watch comes before what happens after it; what the watch begins with comes before any fault.
            while !is_first && let Some((serial, effect)) = context.faults.on_watch(&facts, latest_fault) {
                latest_fault = serial;
                if !self.suffer(effect, &line, &out).await {
                    return;
                }
            }
            let batch = {
                let state = context.store.read();
                changes.mark_unchanged();
                self.batch(&state, &mut position)
            };
            let Some(batch) = batch else { return };
            if !send(&out, batch).await {
                return;
            }
            if std::mem::take(&mut is_first) {
                continue;
            }
            tokio::select! {
                () = out.closed() => return,
                () = tokio::time::sleep_until(deadline) => return,
                () = tokio::time::sleep_until(bookmark.unwrap_or(deadline + Duration::from_secs(3600))) => {
                    let batch = {
                        let state = context.store.read();
                        let events = self.batch(&state, &mut position);
                        events.map(|events| [events.as_ref(), &self.bookmark(state.revision(), false)].concat())
                    };
                    let Some(batch) = batch else { return };
                    if !send(&out, batch.into()).await {
                        return;
                    }
                    bookmark = self.next_bookmark(&context, Instant::now(), deadline);
                }
                changed = changes.changed() => if changed.is_err() { return },
                changed = faults.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Says what comes first. None: the watch is over.
    async fn begin(&self, context: &Context, begun: oneshot::Sender<()>, out: &mpsc::Sender<Piece>) -> Option<u64> {
        match self.start {
            Start::Now => Some(context.store.read().revision()),
            Start::Broken => {
                let message = "a watch stream was requested by the client but the required storage feature RequestWatchProgress \
                               is disabled";
                send(out, error_line(&Refusal::new(500, "InternalError", message).json())).await;
                None
            }
            Start::After(revision) => {
                let horizon = context.store.read().horizon(self.resource);
                if revision >= horizon {
                    return Some(revision);
                }
                let message = if self.resource.cached && context.options.watch_cache {
                    format!("too old resource version: {revision} ({horizon})")
                } else {
                    "The resourceVersion for the provided watch is too old.".into()
                };
                send(out, error_line(&Refusal::new(410, "Expired", message).json())).await;
                None
            }
            Start::Objects(not_before) => {
                // The wait for a revision that is yet to come is part of the stream.
                let begun = (context.store.read().revision() >= not_before).then_some(begun);
                if let Err(refusal) = await_revision(context, not_before).await {
                    send(out, error_line(&refusal.json())).await;
                    return None;
                }
                let (revision, objects) = {
                    let state = context.store.read();
                    (state.revision(), state.objects(self.resource))
                };
                drop(begun);
                let mut piece = Vec::new();
                for object in objects.iter().filter(|object| self.selects(&object.value)) {
                    piece.extend(event_line(ChangeKind::Added, object.encoded(self.shape)));
                    if piece.len() > PIECE && !send(out, std::mem::take(&mut piece).into()).await {
                        return None;
                    }
                }
                if self.bookmarks && context.options.streaming_lists == StreamingLists::Served {
                    piece.extend(self.bookmark(revision, true));
                }
                send(out, piece.into()).await.then_some(revision)
            }
        }
    }

    /// All events since a position, which moves on. None: some of them are forgotten.
    fn batch(&self, state: &State, position: &mut u64) -> Option<Bytes> {
        let changes = state.changes_after(self.resource, *position)?;
        let lines: Vec<Bytes> = changes.iter().filter_map(|change| self.line(change)).collect();
        *position = state.revision().max(*position);
        Some(match lines.as_slice() {
            [one] => one.clone(),
            several => several.concat().into(),
        })
    }

    /// The event that a change is to this watch.
    fn line(&self, change: &Change) -> Option<Bytes> {
        if self.selector.is_empty() && self.namespace.is_empty() {
            return Some(change.line(self.shape).clone());
        }
        let before = change.before.as_ref().filter(|before| self.selects(&before.value));
        let after =
            (change.kind != ChangeKind::Deleted && self.selects(&change.object.value)).then_some(&change.object);
        match (before, after) {
            (None, None) => None,
            (None, Some(object)) => Some(event_line(ChangeKind::Added, object.encoded(self.shape))),
            (Some(_), Some(object)) => Some(event_line(ChangeKind::Modified, object.encoded(self.shape))),
            (Some(before), None) => {
                // As it was before the change, with the revision of the change.
                let mut last = before.value.clone();
                last["metadata"]["resourceVersion"] = change.revision.to_string().into();
                Some(event_line(ChangeKind::Deleted, Object::new(last).encoded(self.shape)))
            }
        }
    }

    fn selects(&self, object: &Value) -> bool {
        (self.namespace.is_empty() || object["metadata"]["namespace"] == self.namespace.as_str())
            && self.selector.matches(object)
    }

    fn bookmark(&self, revision: u64, ends_initial_events: bool) -> Vec<u8> {
        let mut object = self.resource.empty();
        object["metadata"]["resourceVersion"] = revision.to_string().into();
        if ends_initial_events {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.shape {
            Shape::Full => object,
            Shape::Metadata => metadata_only(&object),
        };
        [
            b"{\"type\":\"BOOKMARK\",\"object\":",
            encode::compact(&object).as_slice(),
            b"}\n",
        ]
        .concat()
    }

    /// The time of the next bookmark: every so often, and two seconds before the end.
    fn next_bookmark(&self, context: &Context, now: Instant, deadline: Instant) -> Option<Instant> {
        if !self.bookmarks {
            return None;
        }
        let regular = now + context.seconds(context.options.bookmark_seconds.into());
        let last = deadline - context.seconds(2);
        // A watch of three seconds was never seen to get one.
        let before_end = (self.timeout > 3 && last > now).then_some(last);
        let next = before_end.map_or(regular, |last| regular.min(last));
        (next < deadline).then_some(next)
    }

    /// Carries out a fault. False: the watch is over.
    async fn suffer(&self, effect: WatchEffect, line: &Line, out: &mpsc::Sender<Piece>) -> bool {
        said(out).await;
        match effect {
            WatchEffect::End => false,
            WatchEffect::Error(status) => {
                send(out, error_line(&status)).await;
                false
            }
            WatchEffect::Line(bytes) => send(out, [bytes.as_slice(), b"\n"].concat().into()).await,
            WatchEffect::Cut => {
                // If nobody receives it, the client has gone, and there is nothing left to cut.
                let _taken = out.send(Piece::Cut).await;
                false
            }
            WatchEffect::Reset => {
                line.reset();
                out.closed().await;
                false
            }
            WatchEffect::Silence => {
                line.silence();
                out.closed().await;
                false
            }
        }
    }
}

/// Waits for a revision that is yet to come, for as long as the real server does.
pub(crate) async fn await_revision(context: &Context, revision: u64) -> Result<(), Refusal> {
    let mut changes = context.store.changes();
    let come = async { changes.wait_for(|current| *current >= revision).await.is_ok() };
    match tokio::time::timeout(context.seconds(FUTURE_SECONDS), come).await {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(Refusal::too_large_revision(revision, context.store.read().revision())),
    }
}

async fn send(out: &mpsc::Sender<Piece>, bytes: Bytes) -> bool {
    bytes.is_empty() || out.send(Piece::Bytes(bytes)).await.is_ok()
}

fn error_line(status: &Value) -> Bytes {
    [
        b"{\"type\":\"ERROR\",\"object\":",
        encode::compact(status).as_slice(),
        b"}\n",
    ]
    .concat()
    .into()
}

/// Between 30 and 60 minutes, as the real server chooses for who names no timeout.
fn server_timeout() -> u64 {
    1800 + u64::from(getrandom::u32().unwrap_or(0) % 1800)
}

fn check_options(parameters: &Parameters, lists: StreamingLists) -> Result<(), Refusal> {
    let streaming = parameters.find("sendInitialEvents").is_some();
    let matching = parameters.text("resourceVersionMatch");
    let cause = if streaming && lists == StreamingLists::Refused {
        let why = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        Cause::forbidden("sendInitialEvents", why)
    } else if streaming && matching != "NotOlderThan" {
        Cause::forbidden(
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        )
    } else if !streaming && !matching.is_empty() {
        let why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
        Cause::forbidden("resourceVersionMatch", why)
    } else {
        return Ok(());
    };
    Err(Refusal::invalid("ListOptions", "meta.k8s.io", "", &[cause]))
}
