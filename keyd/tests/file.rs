//! The file source on a real folder: whole files only, every change seen, silence when the folder is gone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shroud_keyd::Event;
use shroud_keyd::file::{MAX_FILES, Published, Source, publish};
use shroud_keyd::{Record, Unreadable};
use tempfile::TempDir;

/// Longer than a loaded machine needs, shorter than the timer that would hide a missed change.
const SOON: Duration = Duration::from_secs(5);
/// How long nothing must be heard for silence.
const A_WHILE: Duration = Duration::from_millis(1500);

fn record(node: &str) -> Record {
    Record {
        node: node.parse().unwrap(),
        addresses: vec!["172.18.0.2".parse().unwrap()],
        pod_prefixes: vec!["10.244.1.0/24".parse().unwrap()],
        zone: None,
        announcement: Some(r#"{"version":1}"#.to_owned()),
    }
}

fn listed(nodes: &[&str]) -> Option<Event> {
    Some(Event::Listed(nodes.iter().map(|node| Ok(record(node))).collect()))
}

/// A folder with the records of some nodes, and a source that has listed it once.
fn followed(nodes: &[&str]) -> (TempDir, PathBuf, Source) {
    let above = TempDir::new().unwrap();
    let folder = above.path().join("nodes");
    fs::create_dir(&folder).unwrap();
    for node in nodes {
        publish(&folder, &record(node)).unwrap();
    }
    let mut source = Source::new(&folder).unwrap();
    assert_eq!(source.wait(SOON), listed(nodes));
    (above, folder, source)
}

/// What the source says of the only file in a folder.
fn refusal(name: &str, place: impl FnOnce(&Path)) -> Unreadable {
    let folder = TempDir::new().unwrap();
    place(&folder.path().join(name));
    let Some(Event::Listed(list)) = Source::new(folder.path()).unwrap().wait(SOON) else {
        panic!("no list")
    };
    let [Err(unreadable)] = list.as_slice() else {
        panic!("{list:?}")
    };
    unreadable.clone()
}

#[test]
fn a_published_record_is_listed_and_nothing_else_is_left_behind() {
    let folder = TempDir::new().unwrap();

    assert_eq!(publish(folder.path(), &record("a")).unwrap(), Published::Written);

    let names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["a.json"]);
    assert_eq!(Source::new(folder.path()).unwrap().wait(SOON), listed(&["a"]));
}

#[test]
fn a_record_that_says_nothing_new_is_not_written() {
    let folder = TempDir::new().unwrap();
    let inode = || fs::metadata(folder.path().join("a.json")).unwrap().ino();
    publish(folder.path(), &record("a")).unwrap();
    let before = inode();

    assert_eq!(publish(folder.path(), &record("a")).unwrap(), Published::Unchanged);
    assert_eq!(inode(), before);

    let changed = Record {
        announcement: None,
        ..record("a")
    };
    assert_eq!(publish(folder.path(), &changed).unwrap(), Published::Written);
    assert_ne!(inode(), before);
}

#[test]
fn a_link_in_the_place_of_our_file_is_replaced_not_followed() {
    let above = TempDir::new().unwrap();
    let victim = above.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let folder = above.path().join("nodes");
    fs::create_dir(&folder).unwrap();
    symlink(&victim, folder.join("a.json")).unwrap();
    symlink(&victim, folder.join(".a.json.new")).unwrap();

    publish(&folder, &record("a")).unwrap();

    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(Source::new(&folder).unwrap().wait(SOON), listed(&["a"]));
}

#[test]
fn comings_changes_and_goings_are_seen() {
    let (_above, folder, mut source) = followed(&["a"]);

    publish(&folder, &record("b")).unwrap();
    assert_eq!(source.wait(SOON), listed(&["a", "b"]));

    fs::write(folder.join("b.json"), "{").unwrap();
    let Some(Event::Listed(list)) = source.wait(SOON) else {
        panic!()
    };
    assert_eq!(
        list,
        [
            Ok(record("a")),
            Err(Unreadable {
                node: Some("b".parse().unwrap()),
                reason: "file b.json: it is not JSON, at line 1, column 1".to_owned()
            })
        ]
    );

    fs::remove_file(folder.join("b.json")).unwrap();
    assert_eq!(source.wait(SOON), listed(&["a"]));
}

#[test]
fn a_burst_of_changes_becomes_few_lists_of_which_the_last_is_complete() {
    let (_above, folder, mut source) = followed(&[]);
    let nodes: Vec<String> = (100..400).map(|number| format!("n{number}")).collect();

    let wanted = listed(&nodes.iter().map(String::as_str).collect::<Vec<_>>());
    let mut lists = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nodes
                .iter()
                .for_each(|node| assert_eq!(publish(&folder, &record(node)).unwrap(), Published::Written))
        });
        let started = Instant::now();
        loop {
            let event = source.wait(SOON);
            lists += 1;
            if event == wanted {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "last seen: {event:?}");
        }
    });

    assert!(lists <= 20, "{lists} lists");
}

#[test]
fn an_equal_list_comes_only_from_the_timer() {
    let (_above, folder, mut source) = followed(&["a"]);

    // A change that changes nothing.
    fs::write(folder.join(".hidden"), "x").unwrap();
    fs::write(folder.join("a.json"), fs::read(folder.join("a.json")).unwrap()).unwrap();
    assert_eq!(source.wait(A_WHILE), None);

    let started = Instant::now();
    assert_eq!(source.wait(Duration::from_secs(20)), listed(&["a"]));
    assert!(started.elapsed() > SOON, "{:?}", started.elapsed());
}

#[test]
fn a_folder_that_goes_is_silence_and_one_that_comes_back_is_read() {
    let (_above, folder, mut source) = followed(&["a", "b"]);

    fs::remove_dir_all(&folder).unwrap();
    // The files may be seen going one by one before the folder does.
    let problem = std::iter::repeat_with(|| source.wait(SOON).expect("the loss is told"))
        .find(|event| matches!(event, Event::Silent(_)));
    assert_eq!(
        problem,
        Some(Event::Silent(
            format!("stat {}: No such file or directory (os error 2)", folder.display()).replace("stat", "open folder")
        ))
    );
    assert_eq!(source.wait(A_WHILE), None, "a problem is told once");

    fs::create_dir(&folder).unwrap();
    let Some(Event::Silent(problem)) = source.wait(SOON) else {
        panic!("an empty new folder is not a list")
    };
    assert!(problem.contains("another folder than before, and empty"), "{problem}");

    publish(&folder, &record("b")).unwrap();
    assert_eq!(source.wait(SOON), listed(&["b"]));
    publish(&folder, &record("c")).unwrap();
    assert_eq!(source.wait(SOON), listed(&["b", "c"]), "the new folder is watched");
}

#[test]
fn an_unmounted_folder_is_silence() {
    let above = TempDir::new().unwrap();
    let folder = above.path().join("nodes");
    fs::create_dir(&folder).unwrap();
    let mounted = Mounted::on(&folder);
    publish(&folder, &record("a")).unwrap();
    let mut source = Source::new(&folder).unwrap();
    assert_eq!(source.wait(SOON), listed(&["a"]));

    drop(mounted);

    // A lazily unmounted file system tells nothing; the timer finds out.
    let Some(Event::Silent(problem)) = source.wait(Duration::from_secs(20)) else {
        panic!("no problem")
    };
    assert!(problem.contains("another folder than before, and empty"), "{problem}");
}

#[test]
fn a_folder_swapped_in_one_step_is_followed() {
    let (above, folder, mut source) = followed(&["a"]);
    let next = above.path().join("next");
    fs::create_dir(&next).unwrap();
    publish(&next, &record("b")).unwrap();

    fs::rename(&folder, above.path().join("old")).unwrap();
    fs::rename(&next, &folder).unwrap();

    let last = std::iter::repeat_with(|| source.wait(SOON).expect("the swap is told"))
        .find(|event| matches!(event, Event::Listed(_)));
    assert_eq!(last, listed(&["b"]));
    publish(&folder, &record("c")).unwrap();
    assert_eq!(source.wait(SOON), listed(&["b", "c"]));
}

#[test]
fn what_is_not_a_record_is_refused_by_file_with_a_reason() {
    let node = |name: &str| Some(name.parse().unwrap());
    let reason = |text: &str| text.to_owned();

    assert_eq!(
        refusal("a.json", |path| fs::write(path, record("b").to_json()).unwrap()),
        Unreadable {
            node: node("a"),
            reason: reason("file a.json: it is about the node b, in the place of a")
        }
    );
    assert_eq!(
        refusal("README", |path| fs::write(path, "").unwrap()),
        Unreadable {
            node: None,
            reason: reason("file README: it is not named NODE.json after a node")
        }
    );
    assert_eq!(
        refusal("\u{1b}[31m.json", |path| fs::write(path, "").unwrap()),
        Unreadable {
            node: None,
            reason: reason("file \\u{1b}[31m.json: it is not named NODE.json after a node")
        }
    );
    assert_eq!(
        refusal("a.json", |path| symlink("/dev/zero", path).unwrap()),
        Unreadable {
            node: node("a"),
            reason: reason("file a.json: it is a symbolic link; put the file itself there")
        }
    );
    assert_eq!(
        refusal("a.json", |path| fs::create_dir(path).unwrap()),
        Unreadable {
            node: node("a"),
            reason: reason("file a.json: it is not a regular file")
        }
    );
    assert_eq!(
        refusal("a.json", |path| {
            let mode = rustix::fs::Mode::RUSR;
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        }),
        Unreadable {
            node: node("a"),
            reason: reason("file a.json: it is not a regular file")
        }
    );
    assert_eq!(
        refusal("a.json", |path| fs::File::create(path)
            .unwrap()
            .set_len(1 << 40)
            .unwrap()),
        Unreadable {
            node: node("a"),
            reason: reason("file a.json: it is 65537 bytes long, more than the 65536 allowed")
        }
    );
    assert_eq!(
        refusal("a.json", |path| fs::write(path, [0xff]).unwrap()),
        Unreadable {
            node: node("a"),
            reason: reason("file a.json: it is not UTF-8 text")
        }
    );
}

#[test]
fn a_folder_with_too_many_files_is_silence() {
    let (_above, folder, mut source) = followed(&["a"]);

    for number in 0..=MAX_FILES {
        fs::File::create(folder.join(format!("n{number}.json"))).unwrap();
    }

    let last = std::iter::repeat_with(|| source.wait(SOON).expect("the flood is told"))
        .find(|event| matches!(event, Event::Silent(_)));
    let told = format!(
        "{} holds more than 20000 files; what was known stays until some are removed",
        folder.display()
    );
    assert_eq!(last, Some(Event::Silent(told)));
}

#[test]
fn a_thread_follows_until_nobody_listens() {
    let (_above, folder, source) = followed(&["a"]);

    let (mut events, thread) = source.spawn().unwrap();
    publish(&folder, &record("b")).unwrap();
    assert_eq!(events.blocking_recv(), listed(&["a", "b"]));
    drop(events);

    let started = Instant::now();
    thread.join().unwrap();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
}

/// A file system of its own on a folder, until dropped.
struct Mounted {
    path: PathBuf,
}

impl Mounted {
    fn on(path: &Path) -> Self {
        use rustix::mount::{MountFlags, mount};
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(c"size=64k")).unwrap();
        Self { path: path.to_owned() }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
