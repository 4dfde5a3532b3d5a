//! The request log: what was asked, by whom, when, and what it was answered with. It never judges.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::request::Verb;

/// A request, as far as it has come.
#[derive(Clone, Debug)]
pub struct Record {
    /// `GET`, `PATCH`, …
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// The query, without the question mark.
    pub query: String,
    /// What it does; [`Verb::Other`] outside the API.
    pub verb: Verb,
    /// `nodes`, or `nodes/status`; empty outside the API.
    pub resource: String,
    /// The user, or empty when the credentials were no good.
    pub username: String,
    /// The `User-Agent`.
    pub agent: String,
    /// The HTTP status; none while it is not answered.
    pub status: Option<u16>,
    /// Bytes of the body so far, before TLS.
    pub bytes: u64,
    /// When it came.
    pub start: Instant,
    /// When the last byte was handed over, or the client went; none while it goes on.
    pub end: Option<Instant>,
}

/// All requests, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    entries: Mutex<Vec<Arc<Entry>>>,
}

/// A request in the journal.
#[derive(Debug)]
pub(crate) struct Entry {
    record: Mutex<Record>,
    bytes: AtomicU64,
}

impl Journal {
    pub(crate) fn open(&self, record: Record) -> Arc<Entry> {
        let entry = Arc::new(Entry {
            record: Mutex::new(record),
            bytes: AtomicU64::new(0),
        });
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(entry.clone());
        entry
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .iter()
            .map(|entry| Record {
                bytes: entry.bytes.load(Ordering::Relaxed),
                ..entry.read()
            })
            .collect()
    }

    pub(crate) fn clear(&self) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Entry {
    pub(crate) fn answered(&self, status: u16) {
        self.change(|record| record.status = Some(status));
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn ended(&self) {
        self.change(|record| {
            record.end.get_or_insert_with(Instant::now);
        });
    }

    pub(crate) fn read(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, work: impl FnOnce(&mut Record)) {
        work(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
