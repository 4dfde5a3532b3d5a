//! A planted private key is found in nothing that is printed, announced or cached.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroU16;
use std::os::unix::fs::PermissionsExt as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use shroud_keyd::announcement::{Backend, Mode};
use shroud_keyd::{Announcement, Directory, Local, cache, file, key};
use tempfile::TempDir;

/// A private key that looks like nothing else.
const CANARY: [u8; 32] = *b"\x58anary-canary-canary-canary-can\x79";

/// Whether any spelling of the canary is in the bytes: raw, base64, hex, or a list of numbers as `Debug` prints it.
fn sings(bytes: &[u8]) -> bool {
    let hex: String = CANARY.iter().map(|byte| format!("{byte:02x}")).collect();
    let base64 = STANDARD.encode(CANARY);
    let numbers = format!("{CANARY:?}");
    let spellings: Vec<Vec<u8>> = vec![
        CANARY[1..31].to_vec(),
        base64[..40].into(),
        STANDARD_NO_PAD.encode(CANARY).into(),
        URL_SAFE.encode(CANARY).into(),
        hex.to_uppercase().into(),
        hex.into(),
        numbers[1..numbers.len() - 1].into(),
    ];
    spellings.iter().any(|spelling| {
        bytes
            .windows(spelling.len())
            .any(|window| window == spelling.as_slice())
    })
}

fn planted() -> TempDir {
    let state = TempDir::new().unwrap();
    let path = state.path().join("key");
    fs::write(&path, format!("{}\n", STANDARD.encode(CANARY))).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    state
}

#[test]
fn the_oracle_finds_the_key_where_it_is() {
    let state = planted();
    let key = key::load_or_create(state.path()).unwrap().current;

    assert!(sings(&fs::read(state.path().join("key")).unwrap()));
    assert!(sings(format!("{:?}", key.private.expose()).as_bytes()));
    assert!(sings(key.private.expose()));
}

#[test]
fn the_key_is_in_nothing_that_leaves() {
    let state = planted();
    let keys = key::load_or_create(state.path()).unwrap();
    let announcement = Announcement {
        public_key: keys.current.public,
        listen_port: NonZeroU16::new(51820).unwrap(),
        endpoints: vec!["172.18.0.2:51820".parse().unwrap()],
        epoch: 1,
        next_key: None,
        backend: Backend::Userspace,
        mode: Mode::Native,
        overlays: Vec::new(),
        routable: false,
        encrypts_nodes: false,
        scope: shroud_keyd::announcement::EncryptScope::All,
    };
    let record = shroud_keyd::Record {
        node: "a".parse().unwrap(),
        addresses: vec!["172.18.0.2".parse().unwrap()],
        pod_prefixes: Vec::new(),
        zone: None,
        announcement: Some(announcement.to_json()),
    };
    let folder = TempDir::new().unwrap();
    file::publish(folder.path(), &record).unwrap();
    let local = Local {
        node: "me".parse().unwrap(),
        keys: keys.public(),
        pod_prefixes: Some(BTreeSet::new()),
    };
    let mut directory = Directory::new(local, BTreeSet::new());
    directory.reset(vec![Ok(record.clone())]);
    cache::save(state.path(), &directory.memory()).unwrap();

    let leaving = [
        format!("{keys:?} {keys:#?} {:?}", keys.public()),
        format!("{announcement:?} {record:?} {:?}", directory.snapshot()),
        fs::read_to_string(folder.path().join("a.json")).unwrap(),
        fs::read_to_string(state.path().join("directory.json")).unwrap(),
        fs::read_to_string(state.path().join("key.pub")).unwrap(),
    ];

    for text in leaving {
        assert!(!sings(text.as_bytes()), "{text}");
    }
}

#[test]
fn the_key_is_in_no_error() {
    let damage: [fn(&TempDir); 6] = [
        |state| fs::set_permissions(state.path().join("key"), fs::Permissions::from_mode(0o644)).unwrap(),
        |state| fs::write(state.path().join("key"), STANDARD.encode(CANARY)).unwrap(),
        |state| fs::write(state.path().join("key"), format!("{}!", STANDARD.encode(CANARY))).unwrap(),
        |state| {
            fs::write(
                state.path().join("key"),
                format!("{}!=\n", &STANDARD.encode(CANARY)[..42]),
            )
            .unwrap()
        },
        |state| {
            fs::write(
                state.path().join("key"),
                format!("{}\n", STANDARD.encode(CANARY).repeat(2)),
            )
            .unwrap()
        },
        |state| {
            fs::write(
                state.path().join("key.pub"),
                "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n",
            )
            .unwrap()
        },
    ];
    for harm in damage {
        let state = planted();
        harm(&state);

        let error = key::load_or_create(state.path()).expect_err("damaged");

        let text = format!("{error} {error:?} {error:#?}");
        assert!(!sings(text.as_bytes()), "{text}");
    }
}
