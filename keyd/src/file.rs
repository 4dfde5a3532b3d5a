//! The file source: a folder with one `NODE.json` per node, on a disk that the nodes share.
//!
//! Whoever may write into the folder is the authority: it is believed for names, addresses and pod prefixes. Each node puts its own
//! file there with [`publish`] and follows all of them with [`Source`]. Every change makes the whole folder be read again, and so does
//! a slow timer, because a network file system tells nothing of what other machines write. A folder that is gone, unmounted or
//! unreadable is silence: it is reported, and removes nobody.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Dir, Mode, Stat};
use rustix::io::Errno;
use shroud_model::NodeName;
use tokio::sync::mpsc;

use crate::folder::{Entry, Existing, Folder, failed, io_error};
use crate::{Error, Event, Excerpt, Record, Refusal, Unreadable};

/// The most files a folder may hold; one that holds more is silence, because its list would not be complete.
pub const MAX_FILES: usize = 20_000;
/// How long a folder must be quiet before it is read.
const QUIET: Duration = Duration::from_millis(50);
/// How long a folder that is never quiet stays unread.
const NEVER_QUIET: Duration = Duration::from_millis(500);
/// How often the folder is read although nothing seems to have changed. Also the least time between two equal lists, so that the
/// directory's brake is not lifted by two looks at the same accident.
const RELIST: Duration = Duration::from_secs(10);
/// How soon a folder that could not be read is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How soon a thread notices that nobody listens any more.
const LISTENER: Duration = Duration::from_millis(500);

const SUFFIX: &str = ".json";

/// Whether [`publish`] had anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The file was written.
    Written,
    /// The file said the same already.
    Unchanged,
}

/// Writes this node's record into the folder, atomically, and only when it says something new. The folder must exist.
///
/// To be called at start and when the record changes, not in a loop: where a folder is unmounted, it would write into the empty place
/// below.
///
/// # Errors
/// [`Error::Io`] names the file; an earlier file is then still whole.
pub fn publish(folder: &Path, record: &Record) -> Result<Published, Error> {
    let name = format!("{}{SUFFIX}", record.node);
    let mut text = record.to_json();
    text.push('\n');

    let folder = Folder::open(folder)?;
    if let Entry::File { file, .. } = folder.entry(&name)? {
        let mut there = Vec::new();
        let path = folder.path().join(&name);
        file.take(text.len() as u64 + 1)
            .read_to_end(&mut there)
            .map_err(failed("read", &path))?;
        if there == text.as_bytes() {
            return Ok(Published::Unchanged);
        }
    }
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    folder.write(&name, text.as_bytes(), mode, Existing::Replace)?;
    Ok(Published::Written)
}

/// Follows a folder. The folder may come and go.
pub struct Source {
    path: PathBuf,
    inotify: OwnedFd,
    watch: Option<Watch>,
    /// The folder that the last list is from.
    listed: Option<Identity>,
    last: Option<Vec<Result<Record, Unreadable>>>,
    problem: Option<String>,
    due: Instant,
}

/// Which folder a path led to. A mount or a new folder of the same name is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

struct Watch {
    descriptor: i32,
    identity: Identity,
}

impl Source {
    /// Prepares to follow a folder; the first [`wait`](Self::wait) lists it.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel gives no inotify instance (`fs.inotify.max_user_instances`).
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(io_error(
            "make an inotify instance (see fs.inotify.max_user_instances) for",
            &path,
        ))?;
        Ok(Self {
            path,
            inotify,
            watch: None,
            listed: None,
            last: None,
            problem: None,
            due: Instant::now(),
        })
    }

    /// Follows the folder on a thread of its own, because a network file system may block for as long as it likes. The thread ends
    /// soon after the receiver is dropped or closed; receiving is cancel-safe.
    ///
    /// # Errors
    /// [`Error::Io`] when the system gives no thread.
    pub fn spawn(mut self) -> Result<(mpsc::Receiver<Event>, JoinHandle<()>), Error> {
        let (sender, receiver) = mpsc::channel(1);
        let path = self.path.clone();
        let thread = std::thread::Builder::new()
            .name("shroud-files".to_owned())
            .spawn(move || {
                while !sender.is_closed() {
                    let Some(event) = self.wait(LISTENER) else { continue };
                    if sender.blocking_send(event).is_err() {
                        return;
                    }
                }
            })
            .map_err(failed("start a thread to follow", &path))?;
        Ok((receiver, thread))
    }

    /// Waits for something to tell, at most `timeout`; blocks the thread.
    pub fn wait(&mut self, timeout: Duration) -> Option<Event> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = Instant::now();
            if now >= self.due {
                if let Some(event) = self.look(Look::Timer) {
                    return Some(event);
                }
                continue;
            }
            if self.readable(deadline.min(self.due).saturating_duration_since(now)) {
                self.settle_down();
                if let Some(event) = self.look(Look::Change) {
                    return Some(event);
                }
            }
            if Instant::now() >= deadline {
                return None;
            }
        }
    }

    /// Reads the folder and decides whether there is anything to tell.
    fn look(&mut self, why: Look) -> Option<Event> {
        match self.list() {
            Ok(list) => {
                let recovered = self.problem.take().is_some();
                if why == Look::Change && !recovered && self.last.as_ref() == Some(&list) {
                    return None;
                }
                self.due = Instant::now() + RELIST;
                self.last = Some(list.clone());
                Some(Event::Listed(list))
            }
            Err(problem) => {
                self.due = Instant::now() + RETRY;
                if self.problem.as_ref() == Some(&problem) {
                    return None;
                }
                self.problem = Some(problem.clone());
                Some(Event::Silent(problem))
            }
        }
    }

    /// The complete list, or why there is none.
    fn list(&mut self) -> Result<Vec<Result<Record, Unreadable>>, String> {
        let unwatched = self.watch().err();
        let folder = Folder::open(&self.path).map_err(|error| error.to_string())?;
        let identity = Identity::of(&folder.stat().map_err(|error| error.to_string())?);
        let names = names(&folder)?;
        if names.is_empty() && self.listed.is_some_and(|before| before != identity) {
            return Err(format!(
                "{} is another folder than before, and empty (not mounted?); what was known stays",
                self.path.display()
            ));
        }
        self.listed = Some(identity);

        let mut list: Vec<Result<Record, Unreadable>> = names
            .iter()
            .filter_map(|(name, node)| read(&folder, name, node.as_ref()).transpose())
            .collect();
        // Without a watch the timer still sees all changes, only later.
        list.extend(unwatched.map(|error| {
            Err(Unreadable {
                node: None,
                reason: error.to_string(),
            })
        }));
        Ok(list)
    }

    /// Watches the folder that the path leads to now.
    fn watch(&mut self) -> Result<(), Error> {
        let identity = Identity::of(&rustix::fs::stat(&self.path).map_err(io_error("stat", &self.path))?);
        if self.watch.as_ref().is_some_and(|watch| watch.identity == identity) {
            return Ok(());
        }
        if let Some(old) = self.watch.take() {
            match inotify::remove_watch(&self.inotify, old.descriptor) {
                // A folder that is gone took its watch with it.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(io_error("stop watching what was at", &self.path)(error)),
            }
        }
        let what = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let descriptor = inotify::add_watch(&self.inotify, &self.path, what).map_err(io_error(
            "watch (changes are seen every 10 s only; see fs.inotify.max_user_watches)",
            &self.path,
        ))?;
        self.watch = Some(Watch { descriptor, identity });
        Ok(())
    }

    /// Whether the kernel has something to tell within `timeout`.
    fn readable(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).expect("a wait of less than a lifetime fits");
        let mut descriptors = [PollFd::new(&self.inotify, PollFlags::IN)];
        // An interrupted wait is a short one; the caller looks at the clock.
        rustix::event::poll(&mut descriptors, Some(&timeout)).is_ok_and(|ready| ready > 0)
    }

    /// Takes in changes until there is a pause. What they say does not matter, only that they are; also when the queue ran over.
    fn settle_down(&mut self) {
        let latest = Instant::now() + NEVER_QUIET;
        loop {
            self.drain();
            if Instant::now() >= latest || !self.readable(QUIET) {
                return;
            }
        }
    }

    fn drain(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let gone = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT | ReadFlags::IGNORED;
                    let ours = self.watch.as_ref().is_some_and(|watch| watch.descriptor == event.wd());
                    if ours && event.events().intersects(gone) {
                        self.watch = None;
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// What made us look.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Change,
    Timer,
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// The folder's files but for hidden ones, each with the node it should be about.
fn names(folder: &Folder) -> Result<BTreeMap<String, Option<NodeName>>, String> {
    let fault = |error: Errno| format!("list {}: {error}", folder.path().display());
    let mut names = BTreeMap::new();
    for entry in Dir::read_from(folder.fd()).map_err(fault)? {
        let name = entry.map_err(fault)?.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let node = name.strip_suffix(SUFFIX).and_then(|node| node.parse().ok());
        names.insert(name, node);
        if names.len() > MAX_FILES {
            return Err(format!(
                "{} holds more than {MAX_FILES} files; what was known stays until some are removed",
                folder.path().display()
            ));
        }
    }
    Ok(names)
}

/// The record in a file; `None` when the file has gone meanwhile.
fn read(folder: &Folder, name: &str, node: Option<&NodeName>) -> Result<Option<Record>, Unreadable> {
    let unreadable = |why: &dyn std::fmt::Display| Unreadable {
        node: node.cloned(),
        reason: format!("file {}: {why}", Excerpt::of(name)),
    };
    let node = node.ok_or_else(|| unreadable(&"it is not named NODE.json after a node"))?;
    let file = match folder.entry(name).map_err(|error| unreadable(&error))? {
        Entry::Absent => return Ok(None),
        Entry::Symlink => return Err(unreadable(&"it is a symbolic link; put the file itself there")),
        Entry::Special => return Err(unreadable(&"it is not a regular file")),
        Entry::File { file, .. } => file,
    };
    let mut text = Vec::new();
    file.take(Record::MAX_BYTES as u64 + 1)
        .read_to_end(&mut text)
        .map_err(|error| unreadable(&error))?;

    let record = Record::parse(&text).map_err(|refusal| unreadable(&refusal))?;
    if record.node != *node {
        let [found, place] = [record.node.as_str(), node.as_str()].map(Excerpt::of);
        return Err(unreadable(&Refusal::WrongNode { found, place }));
    }
    Ok(Some(record))
}
