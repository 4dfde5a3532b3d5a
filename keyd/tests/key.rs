//! The node key on a real disk: made once, refused when it cannot be trusted, never replaced in silence.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use shroud_keyd::key::{Flaw, load_or_create, prepare, promote};
use shroud_keyd::{Error, NodeKey};
use shroud_model::PublicKey;
use tempfile::TempDir;

/// RFC 7748 §6.1: Alice's key pair.
const PRIVATE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\n";
const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n";
/// RFC 7748 §6.1: Bob's key pair.
const OTHER_PRIVATE: &str = "XasIfmJKikt54X+Lg4AO5m87sSkmGLb9HC+LJ/+I4Os=\n";
const OTHER_PUBLIC: &str = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n";

/// A state directory in a folder of its own, removed with everything in it.
struct State {
    _above: TempDir,
    path: PathBuf,
}

impl State {
    fn missing() -> Self {
        let above = TempDir::new().unwrap();
        let path = above.path().join("state");
        Self { _above: above, path }
    }

    fn with(files: &[(&str, &str)]) -> Self {
        let state = Self::missing();
        fs::create_dir(&state.path).unwrap();
        chmod(&state.path, 0o700);
        for (name, text) in files {
            fs::write(state.path.join(name), text).unwrap();
            chmod(
                &state.path.join(name),
                if name.ends_with(".pub") { 0o644 } else { 0o600 },
            );
        }
        state
    }

    fn load(&self) -> Result<NodeKey, Error> {
        load_or_create(&self.path).map(|keys| keys.current)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path.join(name)).ok()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The flaw that makes the key refused, and the file it is about; everything on disk must stay as it was.
    fn refusal(&self) -> (String, Flaw) {
        let before = self.tree();
        let error = self.load().expect_err("the key must be refused");
        assert_eq!(self.tree(), before, "a refusal must change nothing");
        let Error::Key { path, flaw } = error else {
            panic!("{error}")
        };
        (
            path.strip_prefix(&self.path).unwrap().to_str().unwrap().to_owned(),
            flaw,
        )
    }

    fn tree(&self) -> Vec<(String, u32, Option<String>)> {
        self.names()
            .into_iter()
            .map(|name| (mode(&self.path.join(&name)), name))
            .map(|(mode, name)| {
                let regular = fs::symlink_metadata(self.path.join(&name)).unwrap().is_file();
                let text = regular.then(|| self.read(&name)).flatten();
                (name, mode, text)
            })
            .collect()
    }
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn public(text: &str) -> PublicKey {
    text.trim().parse().unwrap()
}

#[test]
fn the_first_start_makes_a_key_that_later_starts_find() {
    let state = State::missing();

    let first = state.load().unwrap();
    let second = state.load().unwrap();

    assert_eq!(first.public, second.public);
    assert_eq!(first.private.expose(), second.private.expose());
    assert_eq!(state.names(), ["key", "key.pub"]);
    assert_eq!(
        state.read("key.pub"),
        Some(format!("{} {}\n", first.public, first.epoch))
    );
    assert_eq!(state.read("key").unwrap().len(), 45);
    assert_eq!(
        [
            mode(&state.path),
            mode(&state.path.join("key")),
            mode(&state.path.join("key.pub"))
        ],
        [0o700, 0o600, 0o644]
    );
}

#[test]
fn a_key_knows_since_when_it_is_there() {
    let before = SystemTime::now();
    let state = State::missing();
    let made = state.load().unwrap().since;
    let a_year_ago = before - Duration::from_secs(365 * 86_400);

    let file = File::options().write(true).open(state.path.join("key")).unwrap();
    file.set_modified(a_year_ago).unwrap();

    assert!(before <= made && made <= SystemTime::now(), "{made:?}");
    assert_eq!(state.load().unwrap().since, a_year_ago);
}

#[test]
fn two_nodes_have_different_keys() {
    assert_ne!(
        State::missing().load().unwrap().public,
        State::missing().load().unwrap().public
    );
}

#[test]
fn a_key_made_by_wg_is_taken_and_its_public_half_is_the_published_one() {
    let state = State::with(&[("key", PRIVATE)]);

    let key = state.load().unwrap();

    assert_eq!(key.public, public(PUBLIC));
    assert_eq!(
        state.read("key.pub"),
        Some(format!("{} {}\n", PUBLIC.trim(), key.epoch))
    );
}

#[test]
fn a_first_key_has_the_time_as_its_epoch_and_a_public_key_without_one_the_first() {
    let now = || {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let before = now();

    let made = State::missing().load().unwrap().epoch;
    let written_by_wg = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC)])
        .load()
        .unwrap()
        .epoch;

    assert!(made % 2 == 1 && before <= made && made <= now() + 1, "{made}");
    assert_eq!(written_by_wg, 1);
}

#[test]
fn a_next_key_is_made_once_and_put_in_force() {
    let state = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC)]);

    let prepared = prepare(&state.path).unwrap();
    let next = prepared.next.unwrap();
    assert_eq!(prepared.current.public, public(PUBLIC));
    assert!(next.epoch > 1 && next.epoch.is_multiple_of(2), "{}", next.epoch);
    assert_eq!(state.names(), ["key", "key.next", "key.next.pub", "key.pub"]);
    assert_eq!(mode(&state.path.join("key.next")), 0o600);
    for found in [prepare(&state.path), load_or_create(&state.path)] {
        let found = found.unwrap().next.unwrap();
        assert_eq!((found.public, found.epoch), (next.public, next.epoch));
    }

    let promoted = promote(&state.path).unwrap();
    assert!(promoted.next.is_none());
    let loaded = load_or_create(&state.path).unwrap().current;
    for key in [promoted.current, loaded] {
        assert_eq!((key.public, key.epoch), (next.public, next.epoch));
    }
    assert_eq!(state.names(), ["key", "key.pub"]);
    assert!(!state.read("key").unwrap().contains(PRIVATE.trim()));

    // And back to the other lowest bit.
    let third = prepare(&state.path).unwrap().next.unwrap().epoch;
    assert!(third > next.epoch && third % 2 == 1, "{third}");
    assert!(
        promote(&state.path).is_ok() && promote(&state.path).is_ok(),
        "without a next key nothing is done"
    );
}

#[test]
fn a_change_of_key_that_was_cut_off_at_any_point_is_resumed() {
    let prepared = || {
        let state = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC)]);
        let next = prepare(&state.path).unwrap().next.unwrap();
        (state, next.public)
    };

    // While the next key was being written, and between its two files.
    let state = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC), (".key.next.new", &PRIVATE[..20])]);
    assert!(load_or_create(&state.path).unwrap().next.is_none());
    assert!(prepare(&state.path).unwrap().next.is_some());
    let (state, next) = prepared();
    fs::remove_file(state.path.join("key.next.pub")).unwrap();
    assert_eq!(load_or_create(&state.path).unwrap().next.unwrap().public, next);
    assert_eq!(state.names(), ["key", "key.next", "key.next.pub", "key.pub"]);

    // While it was put in force.
    let (state, next) = prepared();
    fs::rename(state.path.join("key.next.pub"), state.path.join("key.pub")).unwrap();
    let keys = load_or_create(&state.path).unwrap();
    assert_eq!((keys.current.public, keys.next.is_none()), (next, true));
    assert_eq!(state.names(), ["key", "key.pub"]);
}

#[test]
fn a_next_key_that_cannot_be_is_refused_and_the_one_in_force_is_not_replaced() {
    let with_next = |public: &str| {
        State::with(&[
            ("key", PRIVATE),
            ("key.pub", PUBLIC),
            ("key.next", OTHER_PRIVATE),
            ("key.next.pub", public),
        ])
    };
    let public = |epoch: u64| format!("{} {epoch}\n", OTHER_PUBLIC.trim());

    assert!(with_next(&public(2)).load().is_ok());
    for epoch in [0, 1, 3] {
        let flaw = Flaw::Epoch {
            current: 1,
            next: epoch,
        };
        assert_eq!(with_next(&public(epoch)).refusal(), ("key.next.pub".to_owned(), flaw));
    }
    assert_eq!(with_next(PUBLIC).refusal(), ("key.next".to_owned(), Flaw::NotAPair));

    let lost = with_next(&public(2));
    fs::remove_file(lost.path.join("key.next")).unwrap();
    let flaw = Flaw::Missing { beside: "key.next.pub" };
    assert_eq!(lost.refusal(), ("key.next".to_owned(), flaw));

    let lost = with_next(&public(2));
    fs::remove_file(lost.path.join("key")).unwrap();
    fs::remove_file(lost.path.join("key.pub")).unwrap();
    assert_eq!(lost.refusal(), ("key".to_owned(), Flaw::Missing { beside: "key.next" }));
}

#[test]
fn a_start_that_was_cut_off_at_any_point_is_resumed() {
    // While writing the key: nothing was in use yet.
    let state = State::with(&[(".key.new", &PRIVATE[..20])]);
    assert!(state.load().is_ok());
    assert_eq!(state.names(), ["key", "key.pub"]);

    // Between naming the key and removing its first name.
    let state = State::with(&[("key", PRIVATE)]);
    fs::hard_link(state.path.join("key"), state.path.join(".key.new")).unwrap();
    assert_eq!(state.load().unwrap().public, public(PUBLIC));

    // Between the two files, and while writing the second.
    let state = State::with(&[("key", PRIVATE), (".key.pub.new", "hSDw")]);
    assert_eq!(state.load().unwrap().public, public(PUBLIC));
    assert_eq!(state.names(), ["key", "key.pub"]);
    assert_eq!(state.read("key"), Some(PRIVATE.to_owned()));
}

#[test]
fn processes_that_start_at_once_agree() {
    for _ in 0..20 {
        let state = State::missing();
        let keys: Vec<PublicKey> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| state.load().unwrap().public)).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });

        assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
        assert_eq!(state.names(), ["key", "key.pub"]);
    }
}

#[test]
fn a_lost_key_is_not_replaced() {
    let state = State::with(&[("key.pub", PUBLIC)]);

    assert_eq!(state.refusal(), ("key".to_owned(), Flaw::Missing { beside: "key.pub" }));
}

#[test]
fn a_key_that_is_not_the_public_keys_is_refused() {
    let state = State::with(&[("key", PRIVATE), ("key.pub", OTHER_PUBLIC)]);

    assert_eq!(state.refusal(), ("key".to_owned(), Flaw::NotAPair));
}

#[test]
fn a_damaged_key_is_refused_also_when_there_is_no_public_key() {
    let zero = format!("{}=\n", "A".repeat(43));
    let cases = [
        (String::new(), Flaw::Length { bytes: 0 }),
        (PRIVATE[..44].to_owned(), Flaw::Length { bytes: 44 }),
        (PRIVATE[..20].to_owned(), Flaw::Length { bytes: 20 }),
        (format!("{PRIVATE}{PRIVATE}"), Flaw::Length { bytes: 90 }),
        (PRIVATE.replace('w', "!"), Flaw::Encoding),
        (PRIVATE.replace('\n', "="), Flaw::Encoding),
        (format!("{}\n", "A".repeat(44)), Flaw::Encoding),
        (zero, Flaw::Zero),
    ];
    for (text, flaw) in cases {
        assert_eq!(
            State::with(&[("key", &text)]).refusal(),
            ("key".to_owned(), flaw.clone()),
            "{text:?}"
        );
        assert_eq!(
            State::with(&[("key", &text), ("key.pub", PUBLIC)]).refusal(),
            ("key".to_owned(), flaw),
            "{text:?}"
        );
    }
}

#[test]
fn a_damaged_public_key_is_refused() {
    let trimmed = PUBLIC.trim();
    let texts = [
        String::new(),
        "hSDw".to_owned(),
        trimmed.to_owned(),
        format!("{}=\n", "A".repeat(43)),
        PUBLIC.replace('h', "!"),
        format!("{trimmed} \n"),
        format!("{trimmed} -1\n"),
        format!("{trimmed} 18446744073709551616\n"),
        format!("{trimmed} 1 \n"),
        format!("{trimmed} 1\n\n"),
    ];
    for text in &texts {
        let state = State::with(&[("key", PRIVATE), ("key.pub", text)]);

        assert_eq!(state.refusal(), ("key.pub".to_owned(), Flaw::Public), "{text:?}");
    }
}

#[test]
fn a_key_that_others_can_touch_is_refused_at_each_permission_bit() {
    for bit in [0o040, 0o020, 0o010, 0o004, 0o002, 0o001] {
        let state = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC)]);
        chmod(&state.path.join("key"), 0o600 | bit);

        assert_eq!(state.refusal(), ("key".to_owned(), Flaw::Mode { mode: 0o600 | bit }));
    }
    for bit in [0o020, 0o002] {
        let state = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC)]);
        chmod(&state.path.join("key.pub"), 0o644 | bit);

        assert_eq!(
            state.refusal(),
            ("key.pub".to_owned(), Flaw::PublicMode { mode: 0o644 | bit })
        );
    }
}

#[test]
fn a_key_of_another_user_is_refused() {
    for name in ["key", "key.pub"] {
        let state = State::with(&[("key", PRIVATE), ("key.pub", PUBLIC)]);
        std::os::unix::fs::chown(state.path.join(name), Some(65534), None).unwrap();

        assert_eq!(state.refusal(), (name.to_owned(), Flaw::Owner { owner: 65534, us: 0 }));
    }
}

#[test]
fn what_is_not_a_plain_file_is_refused_without_being_opened() {
    for name in ["key", "key.pub"] {
        let target = TempDir::new().unwrap().path().join("nowhere");
        let state = State::with(&[]);
        symlink(&target, state.path.join(name)).unwrap();
        assert_eq!(state.refusal(), (name.to_owned(), Flaw::Symlink));

        let state = State::with(&[]);
        fs::create_dir(state.path.join(name)).unwrap();
        assert_eq!(state.refusal(), (name.to_owned(), Flaw::NotAFile));

        // Opening a pipe for reading would wait for a writer for ever.
        let state = State::with(&[]);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(
            rustix::fs::CWD,
            state.path.join(name),
            rustix::fs::FileType::Fifo,
            mode,
            0,
        )
        .unwrap();
        assert_eq!(state.refusal(), (name.to_owned(), Flaw::NotAFile));
    }
}

#[test]
fn a_state_directory_that_others_can_write_is_refused() {
    for bits in [0o020, 0o002, 0o1022] {
        let state = State::with(&[("key", PRIVATE)]);
        chmod(&state.path, 0o700 | bits);

        assert_eq!(state.refusal(), (String::new(), Flaw::Folder { mode: 0o700 | bits }));
    }
}

#[test]
fn a_state_directory_that_others_can_swap_is_refused() {
    let state = State::with(&[("key", PRIVATE)]);
    let above = state.path.parent().unwrap();

    chmod(above, 0o770);
    let error = state.load().unwrap_err();
    assert!(
        matches!(
            error,
            Error::Key {
                flaw: Flaw::Folder { mode: 0o770 },
                ..
            }
        ),
        "{error}"
    );

    // As /tmp is: only the owner can rename what is in it.
    chmod(above, 0o1777);
    assert!(state.load().is_ok());
}

#[test]
fn a_state_directory_that_others_can_look_into_is_closed() {
    let state = State::with(&[("key", PRIVATE)]);
    chmod(&state.path, 0o755);

    state.load().unwrap();

    assert_eq!(mode(&state.path), 0o700);
}

#[test]
fn a_full_disk_is_an_error_and_leaves_no_half_key() {
    let state = State::with(&[]);
    let full = Tmpfs::full(&state.path);

    let error = state.load().unwrap_err();

    let Error::Io { operation, source, .. } = error else {
        panic!("{error}")
    };
    assert_eq!((operation, source.kind()), ("write", io::ErrorKind::StorageFull));
    assert!(!state.path.join("key").exists());
    full.make_room();
    assert!(state.load().is_ok());
}

#[test]
fn refusals_name_the_file_and_the_remedy() {
    let state = State::with(&[("key.pub", PUBLIC)]);
    let key = state.path.join("key");
    assert_eq!(
        state.load().unwrap_err().to_string(),
        format!(
            "refuse the node key: {} is gone, while key.pub beside it shows that this node had an identity; restore it \
             from a backup, or remove key.pub to get a new identity that all peers must learn",
            key.display()
        )
    );

    let state = State::with(&[("key", PRIVATE)]);
    chmod(&state.path.join("key"), 0o644);
    let text = state.load().unwrap_err().to_string();
    assert!(
        text.contains("key has mode 0644") && text.contains("run chmod 0600 on it"),
        "{text}"
    );
}

/// A small file system with no room left, mounted on a folder until dropped.
struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    fn full(path: &Path) -> Self {
        use rustix::mount::{MountFlags, mount};
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(c"size=16k,mode=0700")).unwrap();
        let tmpfs = Self { path: path.to_owned() };
        let stuffed = fs::write(path.join("filler"), vec![0; 64 << 10]);
        assert!(stuffed.is_err(), "the file system must be full");
        tmpfs
    }

    fn make_room(&self) {
        fs::remove_file(self.path.join("filler")).unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
