//! Network namespaces and pin directories of a test, gone when the test is.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fd::AsFd as _;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use shroud_ebpf::{Attach, Change, Desired, Gate, Options, diff};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A network namespace. The thread that makes it moves into it; so do the programs it runs.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let name = format!("gate-{}-{}", process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        run(&["ip", "netns", "add", &name]);
        let namespace = Self { name };
        namespace.enter();
        run(&["ip", "link", "set", "lo", "up"]);
        namespace
    }

    pub(crate) fn enter(&self) {
        enter(&self.name);
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let status = Command::new("ip").args(["netns", "del", &self.name]).status();
        assert!(
            status.is_ok_and(|status| status.success()) || thread::panicking(),
            "ip netns del {}",
            self.name
        );
    }
}

/// Moves this thread into a namespace.
pub(crate) fn enter(name: &str) {
    let file = File::open(format!("/run/netns/{name}")).unwrap();
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

/// A pin directory of a test's own.
pub(crate) struct PinDirectory(pub(crate) PathBuf);

impl PinDirectory {
    pub(crate) fn new() -> Self {
        let name = format!(
            "shroud-test-{}-{}",
            process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        Self(PathBuf::from("/sys/fs/bpf").join(name))
    }

    pub(crate) fn options(&self, attach: Attach) -> Options {
        Options {
            pin_directory: self.0.clone(),
            attach,
        }
    }
}

impl Drop for PinDirectory {
    fn drop(&mut self) {
        let gone = fs::remove_dir_all(&self.0);
        assert!(
            gone.is_ok() || !self.0.exists() || thread::panicking(),
            "remove {}: {gone:?}",
            self.0.display()
        );
    }
}

/// Brings the gate to what is desired; says what it changed.
pub(crate) fn reconcile(gate: &mut Gate, desired: &Desired) -> Vec<String> {
    let changes: Vec<Change> = diff(desired, &gate.observe().unwrap());
    for change in &changes {
        gate.apply(change).unwrap_or_else(|error| panic!("{change}: {error}"));
    }
    changes.iter().map(Change::to_string).collect()
}

/// Runs a program and returns what it printed.
pub(crate) fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", words.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

/// Asks until the answer is yes, for five seconds at most.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(last) if Instant::now() > until => panic!("{what}: not within 5 s; last seen: {last}"),
            Err(_) => thread::yield_now(),
        }
    }
}
