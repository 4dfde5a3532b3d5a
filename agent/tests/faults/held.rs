//! What a node holds: in the kernel as iproute2 and `wg` see it, pinned, and in our processes. What is there after a fault must be what was
//! there before it, not less and not more.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Result;
use shroud_lab::Node;
use shroud_lab::agent::wire;

/// What belongs to one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Links, addresses, routes, rules, peers and pins, a line each.
    pub(crate) kernel: BTreeSet<String>,
    /// What our processes have open.
    pub(crate) open: Open,
}

/// What the agent and `shroud wire` of a node have open, together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Open {
    descriptors: usize,
    threads: usize,
    processes: usize,
}

impl Held {
    /// Looks at a node.
    pub(crate) fn by(node: &Node) -> Result<Held> {
        let mut kernel = BTreeSet::new();
        let netns = &node.host.netns;
        let routing = ["route show table all", "rule show"];
        let shown = netns.ask(&["-o"], &[&["link show", "address show"], &routing[..]].concat())?;
        let shown6 = netns.ask(&["-6", "-o"], &routing)?;
        kernel.extend(shown.lines().filter_map(lasting));
        kernel.extend(shown6.lines().filter_map(|line| Some(format!("-6 {}", lasting(line)?))));
        // A device that is away holds nothing.
        let shown = netns.exec("wg", &["show", &node.device])?.stdout;
        let mut peer = "";
        for line in shown.lines().map(str::trim) {
            match line.split_once(": ") {
                Some(("peer", key)) => peer = key,
                // These follow the traffic.
                Some(("endpoint" | "latest handshake" | "transfer", _)) | None => {}
                Some((what, value)) => {
                    kernel.insert(format!("wg {peer} {what}: {}", sorted(value)));
                }
            }
        }
        names_below(&node.pins, &node.pins, &mut kernel);
        Ok(Held {
            kernel,
            open: Open::by(node),
        })
    }

    /// What this lacks of `before`, and what it has beyond it; empty when there is no difference.
    pub(crate) fn difference(&self, before: &Held) -> String {
        let mut text = String::new();
        for line in before.kernel.difference(&self.kernel) {
            text.push_str(&format!("- {line}\n"));
        }
        for line in self.kernel.difference(&before.kernel) {
            text.push_str(&format!("+ {line}\n"));
        }
        text
    }
}

impl Open {
    fn by(node: &Node) -> Open {
        let mut open = Open::default();
        for pid in agents(node).into_iter().chain(wire(node)) {
            let count = |folder: &str| fs::read_dir(format!("/proc/{pid}/{folder}")).map_or(0, Iterator::count);
            open.descriptors += count("fd");
            open.threads += count("task");
            open.processes += 1;
        }
        open
    }

    /// Whether nothing has grown.
    pub(crate) fn is_within(self, before: Open) -> bool {
        self.descriptors <= before.descriptors && self.threads <= before.threads && self.processes <= before.processes
    }
}

/// The agents that run on a node.
pub(crate) fn agents(node: &Node) -> Vec<u32> {
    let config = shroud_lab::agent::config_file(node).display().to_string();
    let is_agent = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        // The program itself, and not one that runs it.
        words.get(1).is_some_and(|word| *word == b"agent") && words.contains(&config.as_bytes())
    };
    node.host.netns.processes().into_iter().filter(is_agent).collect()
}

/// A line of iproute2 without what changes by itself: numbers of devices, states that follow traffic, ages.
fn lasting(line: &str) -> Option<String> {
    let line = line.replace('\\', " ");
    let mut words: Vec<&str> = line.split_whitespace().collect();
    // "7: eth0@if6: <BROADCAST,UP> mtu 1500 ..." and "7: eth0 inet ..."; the number is another after a device was made anew. That of a rule, as
    // in "83: from all ...", is its priority.
    let is_numbered = words.first()?.ends_with(':');
    if is_numbered && !["from", "not"].contains(words.get(1)?) {
        words.remove(0);
    }
    let ages = ["expires", "age", "valid_lft", "preferred_lft"];
    while let Some(at) = words.iter().position(|word| ages.contains(word)) {
        words.drain(at..(at + 2).min(words.len()));
    }
    // Ways that the kernel has learned, and link-layer addresses, which a new device has anew.
    if words.contains(&"cache") || words.iter().any(|word| word.starts_with("fe80:")) {
        return None;
    }
    if words.get(1).is_some_and(|flags| flags.starts_with('<')) {
        let mtu = words.iter().position(|word| *word == "mtu")?;
        words.truncate(mtu + 2);
    }
    Some(words.join(" "))
}

/// The words of a line in an order that does not depend on who asked.
fn sorted(line: &str) -> String {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    words.sort_unstable();
    words.join(" ")
}

/// The names below a folder of pins. A link is pinned under its device's number, which is another after a device was made anew.
fn names_below(root: &Path, folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        if name.contains("/links/") {
            let hooks = names.iter().filter(|name| name.starts_with("pin link ")).count();
            names.insert(format!("pin link {}", hooks + 1));
        } else {
            names.insert(format!("pin {name}"));
        }
        if path.is_dir() {
            names_below(root, &path, names);
        }
    }
}
