//! Stops one thread of a process, as a system call that never returns would, while the others go on.

use std::fs;
use std::marker::PhantomData;

use anyhow::{Context, Result};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// A stopped thread; it goes on when this is dropped.
#[derive(Debug)]
pub struct Stopped {
    thread: Pid,
    /// Only the thread that stopped it can let it go (ptrace(2)).
    _here: PhantomData<*const ()>,
}

/// Stops the thread of a process that has this name.
pub fn stop(process: u32, name: &str) -> Result<Stopped> {
    let thread = find(process, name)?;
    ptrace::seize(thread, ptrace::Options::empty()).with_context(|| format!("seize thread {name} of {process}"))?;
    ptrace::interrupt(thread).with_context(|| format!("stop thread {name} of {process}"))?;
    waitpid(thread, Some(WaitPidFlag::__WALL))
        .with_context(|| format!("wait until {name} of {process} has stopped"))?;
    Ok(Stopped {
        thread,
        _here: PhantomData,
    })
}

fn find(process: u32, name: &str) -> Result<Pid> {
    let folder = format!("/proc/{process}/task");
    for entry in fs::read_dir(&folder).with_context(|| format!("list {folder}"))? {
        let task = entry.with_context(|| format!("list {folder}"))?;
        let called = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if called.trim_end() == name {
            let number = task.file_name().to_string_lossy().parse();
            return Ok(Pid::from_raw(number.context("a task's name is its number")?));
        }
    }
    anyhow::bail!("process {process} has no thread {name}")
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // A thread that has ended meanwhile needs no help.
        ptrace::detach(self.thread, None).unwrap_or_default();
    }
}
