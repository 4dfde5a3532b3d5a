//! Replays the fuzzer's corpus of requests: the handwritten ones are refused, and what must be true of every request is true of these.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../../../fuzz/src/uapi.rs"]
pub mod uapi;

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use shroud_wire::uapi::Parser;

/// Each file is one request, or several, of which the last must be refused.
#[test]
fn handwritten_requests_are_refused() {
    let files = files("uapi");

    for path in &files {
        let mut parser = Parser::default();
        let bytes = fs::read(path).unwrap();
        let outcomes = bytes.split(|&byte| byte == b'\n').filter_map(|line| parser.line(line));
        assert!(outcomes.last().is_some_and(|last| last.is_err()), "{}", path.display());
    }
    assert!(files.len() >= 20, "{} files", files.len());
}

#[test]
fn what_must_be_true_of_every_request_is() {
    let found = files("uapi/found");

    assert!(!found.is_empty(), "the fuzzer has found something");
    for path in files("uapi").into_iter().chain(found) {
        let bytes = fs::read(&path).unwrap();
        assert!(catch_unwind(|| uapi::check(&bytes)).is_ok(), "{}", path.display());
    }
}

fn files(corpus: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(corpus);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}
