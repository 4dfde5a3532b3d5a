//! What can go wrong between this crate and the disk.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::{cache, key};

/// A failure of the state directory or the record folder.
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
}
