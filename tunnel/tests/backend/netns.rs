//! A network namespace to work in and, through iproute2, to look into.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A namespace of this test alone; gone when dropped, also by a panic.
pub(crate) struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace and moves the calling thread, which must be one of the test's own, into it.
    pub(crate) fn enter() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "shr-tn-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let netns = Self { name };
        run("ip", &["netns", "add", &netns.name]);
        netns.join();
        netns.ip("link set lo up");
        netns
    }

    /// Runs `ip` in here, which must succeed.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        let mut words = vec!["-n", &self.name];
        words.extend(arguments.split(' '));
        run("ip", &words)
    }

    /// Moves another thread in as well.
    pub(crate) fn join(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network)).unwrap();
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {error}", arguments.join(" "));
    String::from_utf8(output.stdout).unwrap()
}
