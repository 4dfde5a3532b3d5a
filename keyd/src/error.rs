//! What can go wrong between this crate and the disk, or an API server.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::FailureKind;
use crate::{cache, key};

/// A failure of the state directory, the record folder, or an API server.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call failed.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The node's key, or the place it is kept in, cannot be trusted. Nothing was changed.
    #[error("refuse the node key: {} {flaw}", path.display())]
    Key {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and the remedy.
        flaw: key::Flaw,
    },
    /// The cached directory was broken; the file is kept beside it for a look, and the directory starts from its sources alone.
    #[error("ignore the cached directory {}: it {flaw}; it is kept as {} for a look and can be removed", path.display(), kept.display())]
    Cache {
        /// The cache file.
        path: PathBuf,
        /// What is wrong.
        flaw: cache::Flaw,
        /// Where it was put.
        kept: PathBuf,
    },
    /// An API server did not do what it was asked.
    #[error("{says}")]
    ApiServer {
        /// What kind of failure it is.
        kind: FailureKind,
        /// What was attempted, what was answered, and what helps; safe to print.
        says: String,
    },
}
