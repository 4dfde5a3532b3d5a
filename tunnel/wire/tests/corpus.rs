//! Replays the fuzzer's corpus of requests: the handwritten ones are refused, and what must be true of every request is true of these.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../../../fuzz/replay.rs"]
pub mod replay;
#[path = "../../../fuzz/src/uapi.rs"]
pub mod uapi;

use std::fs;
use std::path::{Path, PathBuf};

use shroud_wire::uapi::Parser;

use self::replay::{files, replay};

/// Each file is one request, or several, of which the last must be refused.
#[test]
fn handwritten_requests_are_refused() {
    let files = files(&corpus());

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
    replay(&corpus(), uapi::check);
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/uapi")
}
