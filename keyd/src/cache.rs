//! The last good directory on disk, so that a node that starts alone still knows its peers.
//!
//! `directory.json` in the state directory: one JSON object with a version, the SHA-256 of the memory's text, and the memory. The sum
//! is against broken disks, not against enemies: who can write here can also take the key.

use std::io::Read as _;
use std::path::Path;

use rustix::fs::Mode;
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use thiserror::Error as ThisError;

use crate::Error;
use crate::directory::Memory;
use crate::folder::{Entry, Existing, Folder, failed};

const NAME: &str = "directory.json";
const KEPT: &str = "directory.json.broken";
const VERSION: u64 = 1;
/// Far above 10,000 records of ordinary size; bounds what is read into memory.
const MAX_BYTES: u64 = 256 << 20;

/// What is wrong with a cached directory.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum Flaw {
    /// A link, folder, device or pipe.
    #[error("is not a regular file")]
    NotAFile,
    /// Larger than any directory.
    #[error("is larger than 256 MiB")]
    TooLong,
    /// Not the JSON we write, for example cut off.
    #[error("is not the JSON this program writes")]
    Syntax,
    /// Another program's version.
    #[error("has version {0}, this program knows version 1")]
    Version(u64),
    /// The text was changed after it was written.
    #[error("does not match its checksum")]
    Checksum,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[expect(dead_code, reason = "known by then")]
    version: u64,
    sha256: String,
    memory: Box<RawValue>,
}

/// Writes the memory of a directory, atomically and with mode 0600.
///
/// # Errors
/// [`Error::Io`]; the previous cache is then still whole.
pub fn save(state_dir: &Path, memory: &Memory) -> Result<(), Error> {
    Folder::open(state_dir)?.write(NAME, &text(memory), Mode::RUSR | Mode::WUSR, Existing::Replace)?;
    Ok(())
}

/// What [`File`] reads. The sum stands before what it is about, so its place is filled last: a second copy would be megabytes.
fn text(memory: &Memory) -> Vec<u8> {
    let mut text = format!(r#"{{"version":{VERSION},"sha256":""#).into_bytes();
    let sum = text.len()..text.len() + 2 * Sha256::output_size();
    text.resize(sum.end, b'0');
    text.extend(br#"","memory":"#);
    let begin = text.len();
    serde_json::to_writer(&mut text, memory).expect("names, texts and numbers have a JSON form");
    let known = checksum(&text[begin..]);
    text[sum].copy_from_slice(known.as_bytes());
    text.extend(b"}\n");
    text
}

/// Reads the memory of a directory; `None` when there is none yet.
///
/// # Errors
/// [`Error::Cache`] when the file is broken; it is put aside, and the caller reports that and starts without it. [`Error::Io`] when the
/// disk does not answer; the file stays.
pub fn load(state_dir: &Path) -> Result<Option<Memory>, Error> {
    let folder = Folder::open(state_dir)?;
    let path = state_dir.join(NAME);
    let parsed = match folder.entry(NAME)? {
        Entry::Absent => return Ok(None),
        Entry::Symlink | Entry::Special => Err(Flaw::NotAFile),
        Entry::File { file, .. } => {
            let mut text = Vec::new();
            file.take(MAX_BYTES + 1)
                .read_to_end(&mut text)
                .map_err(failed("read", &path))?;
            parse(&text)
        }
    };
    match parsed {
        Ok(memory) => Ok(Some(memory)),
        Err(flaw) => {
            folder.rename(NAME, KEPT)?;
            Err(Error::Cache {
                path,
                flaw,
                kept: state_dir.join(KEPT),
            })
        }
    }
}

fn parse(text: &[u8]) -> Result<Memory, Flaw> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u64,
    }
    if text.len() as u64 > MAX_BYTES {
        return Err(Flaw::TooLong);
    }
    let Versioned { version } = serde_json::from_slice(text).map_err(|_| Flaw::Syntax)?;
    if version != VERSION {
        return Err(Flaw::Version(version));
    }
    let file: File = serde_json::from_slice(text).map_err(|_| Flaw::Syntax)?;
    if checksum(file.memory.get().as_bytes()) != file.sha256 {
        return Err(Flaw::Checksum);
    }
    serde_json::from_str(file.memory.get()).map_err(|_| Flaw::Syntax)
}

/// The SHA-256 of a text, in hex.
fn checksum(text: &[u8]) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
