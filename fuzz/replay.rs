//! Reads and replays a corpus; included by path by the tests of the crates concerned.

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

/// The files of a folder, in the order of their names.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// Checks every file of a corpus: handwritten ones and those the fuzzer found.
pub fn replay(corpus: &Path, check: fn(&[u8])) {
    let found = files(&corpus.join("found"));
    assert!(
        !found.is_empty(),
        "the fuzzer has found something for {}",
        corpus.display()
    );
    for path in files(corpus).into_iter().chain(found) {
        let bytes = fs::read(&path).unwrap();
        assert!(catch_unwind(|| check(&bytes)).is_ok(), "{}", path.display());
    }
}
