//! Replays the handwritten fuzz corpora: nothing panics, and a file's name says whether its content is believed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};

use shroud_keyd::{Announcement, Record};

/// Every file of a corpus, with what its name promises.
fn corpus(name: &str) -> Vec<(PathBuf, bool, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let ok = name.starts_with("ok-");
            assert!(
                ok || name.starts_with("bad-"),
                "{} must begin with ok- or bad-",
                path.display()
            );
            let bytes = fs::read(&path).unwrap();
            (path, ok, bytes)
        })
        .collect();
    files.sort();
    assert!(
        files.iter().any(|(_, ok, _)| *ok) && files.iter().any(|(_, ok, _)| !ok),
        "{} has both kinds",
        folder.display()
    );
    files
}

#[test]
fn announcements_are_believed_as_their_file_names_say() {
    for (path, ok, bytes) in corpus("announcement") {
        let parsed = Announcement::parse(&bytes);

        assert_eq!(parsed.is_ok(), ok, "{}: {parsed:?}", path.display());
        match parsed {
            Ok(announcement) => assert_eq!(Announcement::parse(announcement.to_json()), Ok(announcement)),
            Err(refusal) => assert_printable(&refusal.to_string()),
        }
    }
}

#[test]
fn records_are_believed_as_their_file_names_say() {
    for (path, ok, bytes) in corpus("record") {
        let parsed = Record::parse(&bytes);

        assert_eq!(parsed.is_ok(), ok, "{}: {parsed:?}", path.display());
        match parsed {
            Ok(record) => assert_eq!(Record::parse(record.to_json()), Ok(record)),
            Err(refusal) => assert_printable(&refusal.to_string()),
        }
    }
}

fn assert_printable(text: &str) {
    assert!(
        text.len() < 1024 && text.chars().all(|c| c.is_ascii_graphic() || c == ' '),
        "{text:?}"
    );
}
