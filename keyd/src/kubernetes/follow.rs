//! Follows a collection of objects: a complete list in pages, then a watch from there on, for ever.
//!
//! ```text
//!  list ──(resource version)──> watch ──(its end, a silence, any failure)──> watch from the last version seen
//!   ^                             │
//!   └────── that version is too old (410) ──┘
//! ```
//!
//! Whatever breaks, the watch goes on from the last version that was seen, so that nothing is missed and nothing is listed again. Only a
//! version the server no longer has makes it list anew, and then `Pace` says how soon.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use http_body_util::BodyExt as _;
use kube::api::{Request, WatchParams};
use kube::client::Body;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::api::{Api, Failure, Status, chain};
use super::object::{Object, metadata};
use super::pace::Pace;
use super::page::{asked, page};
use crate::FailureKind;

/// How long a watch is asked to last; the server ends it then, and it goes on from there. Spread, so that those who begin together do not
/// come back together.
const WATCH: std::ops::Range<u32> = 230..290;
/// A watch that ends sooner than this, though well, is not opened again at once.
const BRIEF: Duration = Duration::from_secs(1);
/// The longest event that is read, in bytes. An object has at most 1.5 MiB (etcd's limit).
const LONGEST_EVENT: usize = 4 << 20;

/// A collection of objects.
#[derive(Debug, Clone)]
pub(super) struct Collection {
    /// What it is called in messages, such as `nodes`.
    pub(super) name: &'static str,
    /// Its path, such as `/api/v1/nodes`.
    pub(super) path: String,
    /// Restricts it by fields, such as `metadata.name=a`.
    pub(super) fields: Option<String>,
    /// Restricts it by labels, such as `app=a`.
    pub(super) labels: Option<String>,
    /// How long a watch may say nothing, from the request on and not even a bookmark (they come every minute), before it is opened anew.
    pub(super) idle: Duration,
}

/// What becomes known of a collection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Update<T> {
    /// All of it.
    Listed(Vec<T>),
    /// One object is new or has changed.
    Applied(T),
    /// One object is gone, or no longer belongs here; this is its key, see `object::Metadata::key`.
    Deleted(String),
    /// A list was asked for.
    Lists,
    /// A watch was opened.
    Watches,
    /// The server does not answer as it should.
    Failed(Failure),
}

/// Follows a collection for ever.
pub(super) async fn follow<T: Object>(
    api: &Api,
    collection: &Collection,
    mut pace: Pace,
    tell: &mut impl AsyncFnMut(Update<T>),
) -> Infallible {
    let mut seen: Option<String> = None;
    loop {
        let result = match seen.take() {
            None => {
                tokio::time::sleep_until(pace.next_list().into()).await;
                let listed = list(api, collection, &mut pace, tell).await;
                listed.map(|version| seen = Some(version))
            }
            Some(mut version) => {
                tokio::time::sleep_until(pace.next().into()).await;
                let opened = Instant::now();
                let watched = watch(api, collection, &mut version, &mut pace, tell).await;
                if watched.is_ok() && opened.elapsed() < BRIEF {
                    pace.failed(Instant::now(), None, chance());
                }
                if !watched
                    .as_ref()
                    .is_err_and(|failure| failure.kind == FailureKind::Expired)
                {
                    seen = Some(version);
                }
                watched
            }
        };
        if let Err(failure) = result {
            pace.failed(Instant::now(), failure.retry_after, chance());
            tell(Update::Failed(failure)).await;
        }
    }
}

/// Reads all pages, and returns the version of the whole.
async fn list<T: Object>(
    api: &Api,
    collection: &Collection,
    pace: &mut Pace,
    tell: &mut impl AsyncFnMut(Update<T>),
) -> Result<String, Failure> {
    let attempt = format!("list {}", collection.name);
    tell(Update::Lists).await;
    let mut objects = Vec::new();
    let mut next = None;
    loop {
        let params = asked(collection.fields.as_deref(), collection.labels.as_deref(), next);
        let page = page(api, &attempt, Request::new(&collection.path).list(&params)).await?;
        // From the first page on it has cost the server what we must not ask for often.
        pace.listed(Instant::now());
        objects.extend(page.objects);
        next = page.next;
        if next.is_none() {
            tell(Update::Listed(objects)).await;
            return Ok(page.version);
        }
    }
}

/// Watches from `version` on, and keeps it up to date. Ends well when the server ends the watch, or says nothing for too long.
async fn watch<T: Object>(
    api: &Api,
    collection: &Collection,
    version: &mut String,
    pace: &mut Pace,
    tell: &mut impl AsyncFnMut(Update<T>),
) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(rename = "type")]
        kind: &'a str,
        #[serde(borrow)]
        object: &'a RawValue,
    }

    let attempt = format!("watch {}", collection.name);
    let malformed = |why: String| Failure::new(FailureKind::Malformed, &attempt, why);
    let seconds = f64::from(WATCH.end - WATCH.start) * chance();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 60"
    )]
    let timeout = WATCH.start + seconds as u32;
    let params = WatchParams {
        field_selector: collection.fields.clone(),
        label_selector: collection.labels.clone(),
        timeout: Some(timeout),
        bookmarks: true,
        ..WatchParams::default()
    };
    let request = Request::new(&collection.path).watch(&params, version);
    let request = request.map_err(|error| malformed(error.to_string()))?;
    let mut lines = Lines::new(api.open(&attempt, request, collection.idle).await?);
    tell(Update::Watches).await;
    loop {
        let line = match tokio::time::timeout(collection.idle, lines.next()).await {
            Err(_silence) => return Ok(()),
            Ok(Err(broken)) => return Err(Failure::new(broken.kind, &attempt, broken.why)),
            Ok(Ok(None)) => return Ok(()),
            Ok(Ok(Some(line))) => line,
        };
        let event: Event<'_> =
            serde_json::from_slice(line).map_err(|error| malformed(format!("the server sent no event: {error}")))?;
        if event.kind == "ERROR" {
            let status: Status = serde_json::from_str(event.object.get()).unwrap_or_default();
            return Err(Failure::of_status(&attempt, &status));
        }
        let metadata = metadata(event.object);
        let update = match event.kind {
            // About nobody, so that nobody could ever put it right.
            "ADDED" | "MODIFIED" | "DELETED" if metadata.name.is_empty() => {
                return Err(malformed("the server sent an object without a name".to_owned()));
            }
            "ADDED" | "MODIFIED" => Some(Update::Applied(T::read(event.object))),
            "DELETED" => Some(Update::Deleted(metadata.key())),
            // A bookmark carries a version and nothing else; of what a later server may say, we can use no more.
            _ => None,
        };
        if let Some(update) = update {
            tell(update).await;
        }
        if !metadata.resource_version.is_empty() {
            *version = metadata.resource_version;
        }
        // Now the server has shown that it serves this watch, and not only that it accepted it.
        pace.succeeded();
    }
}

/// A number from 0 to 1 that nobody can foresee.
pub(super) fn chance() -> f64 {
    // Without randomness we are merely as punctual as everybody else.
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}

/// The lines of an answer that comes bit by bit.
struct Lines {
    body: Body,
    buffer: Vec<u8>,
    /// Where the next line begins.
    begin: usize,
    /// Up to where there is no line break.
    searched: usize,
}

/// Why there are no more lines.
struct Broken {
    kind: FailureKind,
    why: String,
}

impl Lines {
    fn new(body: Body) -> Self {
        Self {
            body,
            buffer: Vec::new(),
            begin: 0,
            searched: 0,
        }
    }

    /// The next line, without its end; `None` when the answer has ended. A last line without an end is no line: it was cut off.
    async fn next(&mut self) -> Result<Option<&[u8]>, Broken> {
        loop {
            if let Some(length) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.begin..self.searched + length;
                self.begin = line.end + 1;
                self.searched = self.begin;
                return Ok(Some(&self.buffer[line]));
            }
            self.buffer.drain(..self.begin);
            self.begin = 0;
            self.searched = self.buffer.len();
            if self.buffer.len() > LONGEST_EVENT {
                return Err(Broken {
                    kind: FailureKind::Malformed,
                    why: format!("an event is longer than {LONGEST_EVENT} bytes"),
                });
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => {
                    return Err(Broken {
                        kind: FailureKind::Unreachable,
                        why: chain(&error),
                    });
                }
            }
        }
    }
}
