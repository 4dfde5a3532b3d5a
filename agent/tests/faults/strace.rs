//! Ends a process at one of its system calls, or makes calls of one thread fail: the failpoints of a program that has none. The kernel's
//! own answers are real; only those that are ordered otherwise are not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use shroud_lab::eventually;

/// The calls by which an agent changes anything outside of itself: BPF, netlink, the control socket, files.
const STEPS: [&str; 13] = [
    "bpf",
    "sendto",
    "sendmsg",
    "write",
    "connect",
    "mkdir",
    "linkat",
    "renameat",
    "renameat2",
    "unlinkat",
    "fsync",
    "fchmod",
    "ioctl",
];

/// What such calls say in `strace` when they only ask. Wake-ups of our own threads, a number written to an eventfd, change nothing either.
const ASKING: [&str; 6] = [
    "RTM_GET",
    "BPF_MAP_LOOKUP_ELEM",
    "BPF_MAP_GET_NEXT_KEY",
    "BPF_OBJ_GET",
    "BPF_PROG_QUERY",
    r#""\1\0\0\0\0\0\0\0""#,
];

/// A call of a run: the so-manieth of this name that any one thread makes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Step {
    call: String,
    number: usize,
}

/// `strace` and arguments that note each step of a run in a file. What the program starts is let go: it is no part of the run.
pub(crate) fn noting(log: &Path) -> Vec<String> {
    let mut words = words(&["-o"]);
    words.push(log.display().to_string());
    words.push("-e".to_owned());
    words.push(format!("trace={}", STEPS.join(",")));
    words
}

/// `strace` and arguments that kill the program as it enters this step, which then is not done; the step before it is.
pub(crate) fn killing(step: &Step) -> Vec<String> {
    let mut words = words(&["-o", "/dev/null", "-e"]);
    words.push(format!("trace={}", step.call));
    words.push("-e".to_owned());
    words.push(format!("inject={}:signal=SIGKILL:when={}", step.call, step.number));
    words
}

fn words(more: &[&str]) -> Vec<String> {
    let all = ["strace", "-f", "-b", "execve", "-qq"].iter().chain(more);
    all.map(|word| (*word).to_owned()).collect()
}

/// The steps of a run that was noted.
pub(crate) fn steps(log: &Path) -> Result<Vec<Step>> {
    let text = fs::read(log).with_context(|| format!("read {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut steps = BTreeSet::new();
    for line in text.lines() {
        // "1234  sendto(5, ...": the rest of a call that was interrupted is no call.
        let Some((thread, rest)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        let call = rest.trim_start().split('(').next().unwrap_or_default();
        if !STEPS.contains(&call) {
            continue;
        }
        let number = counts.entry((thread, call)).or_default();
        *number += 1;
        if !ASKING.iter().any(|words| rest.contains(words)) {
            steps.insert(Step {
                call: call.to_owned(),
                number: *number,
            });
        }
    }
    ensure!(!steps.is_empty(), "no step in {}", log.display());
    Ok(steps.into_iter().collect())
}

/// How many steps there are of each call.
pub(crate) fn summary(steps: &[Step]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for step in steps {
        *counts.entry(&step.call).or_default() += 1;
    }
    let counts = counts.into_iter().map(|(call, count)| format!("{count} {call}"));
    counts.collect::<Vec<_>>().join(", ")
}

/// Calls of a thread that fail for as long as this lives.
pub(crate) struct Failing(Child);

impl Failing {
    /// Makes these calls of a process's thread fail as told: `error=EBUSY:when=1+3` is the first and each third after it.
    pub(crate) fn start(process: u32, thread: &str, calls: &str, how: &str) -> Result<Failing> {
        let thread = thread_called(process, thread)?;
        let mut strace = Command::new("strace");
        strace
            .args(["-p", &thread.to_string(), "-qq", "-o", "/dev/null"])
            .args(["-e", &format!("trace={calls}"), "-e", &format!("inject={calls}:{how}")])
            .stdin(Stdio::null());
        let mut failing = Failing(strace.spawn().context("start strace")?);
        eventually("strace has the thread", Duration::from_secs(5), || {
            if let Ok(Some(status)) = failing.0.try_wait() {
                return Err(format!("strace ended: {status}"));
            }
            let status = fs::read_to_string(format!("/proc/{process}/task/{thread}/status"));
            let status = status.map_err(|error| error.to_string())?;
            match status.lines().find_map(|line| line.strip_prefix("TracerPid:")) {
                Some(tracer) if tracer.trim() != "0" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })?;
        Ok(failing)
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        // Asked to end, it lets the thread go; one that has ended with its thread is as good.
        drop(signal(self.0.id(), Signal::TERM));
        drop(self.0.wait());
    }
}

/// The id of a process's thread of this name.
fn thread_called(process: u32, name: &str) -> Result<u32> {
    let folder = format!("/proc/{process}/task");
    for task in fs::read_dir(&folder).with_context(|| format!("list {folder}"))? {
        let path = task?.path();
        if fs::read_to_string(path.join("comm")).unwrap_or_default().trim_end() == name {
            let number = path.file_name().unwrap_or_default().to_string_lossy().parse();
            return number.context("a task's name is its number");
        }
    }
    anyhow::bail!("process {process} has no thread {name}")
}

/// Sends a signal to a process.
pub(crate) fn signal(process: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
    let pid = pid.with_context(|| format!("{process} is no process id"))?;
    kill_process(pid, signal).with_context(|| format!("send {signal:?} to {process}"))
}
