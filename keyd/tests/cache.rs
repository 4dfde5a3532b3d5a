//! The cached directory on a real disk: what was saved comes back, what is broken is put aside.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use shroud_keyd::cache::{Flaw, load, save};
use shroud_keyd::{Error, Memory, Record};
use shroud_model::PublicKey;
use tempfile::TempDir;

fn memory() -> Memory {
    let node: shroud_model::NodeName = "a".parse().unwrap();
    Memory {
        records: vec![Arc::new(Record {
            node: node.clone(),
            addresses: vec!["fd18::2".parse().unwrap()],
            pod_prefixes: vec!["10.244.1.0/24".parse().unwrap()],
            zone: None,
            announcement: Some("any \u{1b} text \"at\" all".to_owned()),
        })],
        keys: BTreeMap::from([(node.clone(), PublicKey::from_bytes([7; 32]).unwrap())]),
        next_keys: BTreeMap::from([("a".parse().unwrap(), PublicKey::from_bytes([9; 32]).unwrap())]),
        prefixes: BTreeMap::from([("10.244.1.0/24".parse().unwrap(), node.clone())]),
        epochs: BTreeMap::from([(node.clone(), u64::MAX)]),
        addresses: BTreeMap::from([("fd18::2".parse().unwrap(), node)]),
        denied: BTreeMap::from([("node-x".to_owned(), "stolen".to_owned())]),
    }
}

#[test]
fn what_was_saved_comes_back() {
    let state = TempDir::new().unwrap();
    assert_eq!(load(state.path()).unwrap(), None);

    save(state.path(), &Memory::default()).unwrap();
    save(state.path(), &memory()).unwrap();

    assert_eq!(load(state.path()).unwrap(), Some(memory()));
    assert_eq!(
        fs::metadata(state.path().join("directory.json"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o600
    );
}

#[test]
fn a_cache_cut_off_or_changed_anywhere_is_put_aside() {
    let state = TempDir::new().unwrap();
    save(state.path(), &memory()).unwrap();
    let path = state.path().join("directory.json");
    let good = fs::read(&path).unwrap();
    let cut = (0..good.len() - 1).step_by(7).map(|length| good[..length].to_vec());
    let changed = (0..good.len() - 1).map(|position| {
        let mut bytes = good.clone();
        bytes[position] ^= 0x01;
        bytes
    });

    for broken in cut.chain(changed) {
        fs::write(&path, &broken).unwrap();

        let error = load(state.path()).expect_err(&String::from_utf8_lossy(&broken));

        assert!(matches!(error, Error::Cache { .. }), "{error}");
        assert!(!path.exists());
        assert_eq!(fs::read(state.path().join("directory.json.broken")).unwrap(), broken);
        assert_eq!(load(state.path()).unwrap(), None);
    }
}

#[test]
fn each_flaw_has_its_name() {
    let state = TempDir::new().unwrap();
    let path = state.path().join("directory.json");
    let flaw = || match load(state.path()) {
        Err(Error::Cache { flaw, .. }) => flaw,
        other => panic!("{other:?}"),
    };

    fs::write(&path, r#"{"version":2,"anything":[]}"#).unwrap();
    assert_eq!(flaw(), Flaw::Version(2));

    fs::write(&path, "").unwrap();
    assert_eq!(flaw(), Flaw::Syntax);

    save(state.path(), &memory()).unwrap();
    let text = fs::read_to_string(&path).unwrap().replace("10.244.1.0", "10.244.2.0");
    fs::write(&path, text).unwrap();
    assert_eq!(flaw(), Flaw::Checksum);

    fs::File::create(&path).unwrap().set_len(257 << 20).unwrap();
    assert_eq!(flaw(), Flaw::TooLong);

    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert_eq!(flaw(), Flaw::NotAFile);
}
