//! A network namespace to work in and, through iproute2, to look into.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// A namespace of this test alone; gone when dropped, also by a panic.
///
/// ```text
/// eth0 172.18.0.1/24 fd18::1/64 ── veth ── peer0        shroud0 (TUN, down)        cni0 (veth, pods)
/// ```
pub(crate) struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace and moves the calling thread, which must be one of the test's own, into it.
    pub(crate) fn enter() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "shr-rt-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let netns = Self { name };
        run("ip", &["netns", "add", &netns.name]);
        let file = File::open(format!("/run/netns/{}", netns.name)).unwrap();
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network)).unwrap();
        for command in [
            "link set lo up",
            "link add eth0 type veth peer name peer0",
            "link set eth0 up",
            "link set peer0 up",
            "addr add 172.18.0.1/24 dev eth0",
            "addr add fd18::1/64 dev eth0 nodad",
            "tuntap add shroud0 mode tun",
        ] {
            netns.ip(command);
        }
        netns
    }

    /// Runs `ip` in here, which must succeed.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        let mut words = vec!["-n", &self.name];
        words.extend(arguments.split(' '));
        run("ip", &words)
    }

    /// Runs `ip -j` in here and reads its answer.
    pub(crate) fn look(&self, arguments: &str) -> Value {
        let text = self.ip(&format!("-j {arguments}"));
        if text.trim().is_empty() {
            Value::Array(Vec::new())
        } else {
            serde_json::from_str(&text).unwrap()
        }
    }

    /// The routes that `ip route` shows for these words, one line each, without the flags that come and go with the carrier.
    pub(crate) fn routes(&self, words: &str) -> Vec<String> {
        let shown = |family: &str| self.ip(&format!("{family} route show {words}"));
        let lines = format!("{}{}", shown("-4"), shown("-6"));
        let clean = |line: &str| {
            line.replace("  ", " ")
                .replace(" linkdown", "")
                .replace(" dead", "")
                .replace(" pref medium", "")
                .trim()
                .to_owned()
        };
        lines.lines().map(clean).collect()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {error}", arguments.join(" "));
    String::from_utf8(output.stdout).unwrap()
}
