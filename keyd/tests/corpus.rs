//! Replays the fuzzer's corpora: a handwritten file's name says whether its content is believed, and what must be true of every input is true
//! of these.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../../fuzz/src/announcement.rs"]
pub mod announcement;
#[path = "../../fuzz/src/directory.rs"]
pub mod directory;
#[path = "../../fuzz/src/node_object.rs"]
pub mod node_object;
#[path = "../../fuzz/src/printable.rs"]
pub mod printable;
#[path = "../../fuzz/src/record.rs"]
pub mod record;

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use shroud_keyd::{Announcement, Record, kubernetes};

#[test]
fn announcements_are_believed_as_their_file_names_say() {
    believed_as_named("announcement", |bytes| Announcement::parse(bytes).is_ok());
}

#[test]
fn records_are_believed_as_their_file_names_say() {
    believed_as_named("record", |bytes| Record::parse(bytes).is_ok());
}

#[test]
fn node_objects_are_believed_as_their_file_names_say() {
    believed_as_named("node_object", |bytes| {
        kubernetes::read_node(str::from_utf8(bytes).unwrap()).is_ok()
    });
}

#[test]
fn what_must_be_true_of_every_announcement_is() {
    replay("announcement", announcement::check);
}

#[test]
fn what_must_be_true_of_every_record_is() {
    replay("record", record::check);
}

#[test]
fn what_must_be_true_of_every_node_object_is() {
    replay("node_object", node_object::check);
}

#[test]
fn what_must_be_true_of_every_history_is() {
    replay("directory", directory::check);
}

fn believed_as_named(corpus: &str, believed: impl Fn(&[u8]) -> bool) {
    let mut kinds = [0, 0];
    for path in files(&folder(corpus)) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let ok = name.starts_with("ok-");
        assert!(
            ok || name.starts_with("bad-"),
            "{} must begin with ok- or bad-",
            path.display()
        );
        kinds[usize::from(ok)] += 1;

        assert_eq!(believed(&fs::read(&path).unwrap()), ok, "{}", path.display());
    }
    assert!(
        kinds.iter().all(|&count| count > 0),
        "{corpus} has both kinds: {kinds:?}"
    );
}

/// Checks every file of a corpus: handwritten ones and those the fuzzer found.
fn replay(corpus: &str, check: fn(&[u8])) {
    let found = folder(corpus).join("found");
    let found = if found.is_dir() { files(&found) } else { Vec::new() };
    let files = files(&folder(corpus)).into_iter().chain(found);
    let mut count = 0;
    for path in files {
        count += 1;
        let bytes = fs::read(&path).unwrap();
        assert!(catch_unwind(|| check(&bytes)).is_ok(), "{}", path.display());
    }
    assert!(count > 0, "there is nothing to replay for {corpus}");
}

fn folder(corpus: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(corpus)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}
