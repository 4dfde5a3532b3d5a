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
#[path = "../../fuzz/replay.rs"]
pub mod replay;

use std::fs;
use std::path::{Path, PathBuf};

use shroud_keyd::{Announcement, Record, kubernetes};

use self::replay::{files, replay};

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
    replay(&folder("announcement"), announcement::check);
}

#[test]
fn what_must_be_true_of_every_record_is() {
    replay(&folder("record"), record::check);
}

#[test]
fn what_must_be_true_of_every_node_object_is() {
    replay(&folder("node_object"), node_object::check);
}

#[test]
fn what_must_be_true_of_every_history_is() {
    replay(&folder("directory"), directory::check);
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

fn folder(corpus: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(corpus)
}
