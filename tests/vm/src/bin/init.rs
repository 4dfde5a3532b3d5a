//! Pid 1 of a guest: mounts, loads modules, runs each program of its list in turn, says what became of it, and switches the machine off.
//!
//! Never linked against the code under test, and no library of the guest's file system knows it: it needs only what it finds in the
//! archive.
#![expect(
    clippy::disallowed_methods,
    reason = "pid 1 of a test machine: running programs is its task"
)]

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::system::RebootCommand;
use shroud_vm::program::{FAILURE, MODULES, PROGRAMS, Program, SUCCESS};

/// The second serial line; the kernel's messages have the first to themselves.
const OUTPUT: &str = "/dev/ttyS1";

fn main() {
    let well = prepare().and_then(|()| run_all()).unwrap_or_else(|error| {
        println!("vm: {error:#}");
        false
    });
    println!("{}", if well { SUCCESS } else { FAILURE });
    rustix::fs::sync();
    // The line is slow; what is left in its buffer would go with the power.
    rustix::termios::tcdrain(rustix::stdio::stdout()).ok();
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        println!("vm: power off: {error}");
    }
}

/// Makes a machine of it.
fn prepare() -> Result<()> {
    // Not /tmp: the programs lie where cargo built them, which may be a checkout below it. The root is memory anyway.
    let folders: [(&str, &str, &CStr); 5] = [
        ("devtmpfs", "/dev", c"mode=755"),
        ("proc", "/proc", c""),
        ("sysfs", "/sys", c""),
        ("tmpfs", "/run", c"mode=755"),
        ("cgroup2", "/sys/fs/cgroup", c""),
    ];
    for (kind, folder, options) in folders {
        mount(kind, folder, kind, MountFlags::empty(), options).with_context(|| format!("mount {kind} on {folder}"))?;
    }
    let output = OpenOptions::new()
        .read(true)
        .write(true)
        .open(OUTPUT)
        .with_context(|| format!("open {OUTPUT}"))?;
    rustix::stdio::dup2_stdout(&output).context("speak on the second line")?;
    rustix::stdio::dup2_stderr(&output).context("speak on the second line")?;

    let modules = fs::read_to_string(MODULES).with_context(|| format!("read {MODULES}"))?;
    for path in modules.lines() {
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        rustix::system::finit_module(&file, c"", 0).with_context(|| format!("load {path}"))?;
    }
    let up = Command::new("/usr/bin/ip").args(["link", "set", "lo", "up"]).status();
    ensure!(up.context("start ip")?.success(), "bring up lo");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    println!("vm: kernel {} with {} modules", release.trim(), modules.lines().count());
    Ok(())
}

/// Whether each program ended well.
fn run_all() -> Result<bool> {
    let list = fs::read(PROGRAMS).with_context(|| format!("read {PROGRAMS}"))?;
    let programs: Vec<Program> = serde_json::from_slice(&list).with_context(|| format!("understand {PROGRAMS}"))?;
    let mut well = true;
    for program in &programs {
        println!("vm: begin {}", program.name);
        let begun = Instant::now();
        let outcome = run(program);
        let seconds = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => println!("vm: ok {} {seconds:.1} s", program.name),
            Err(error) => {
                println!("vm: failed {}: {error:#}, {seconds:.1} s", program.name);
                well = false;
            }
        }
        end_what_is_left(&program.name);
    }
    Ok(well)
}

/// Runs a program to its end, or kills it when its time is over. Reaps every orphan on the way, as pid 1 must: tests look whether a
/// process is gone.
fn run(program: &Program) -> Result<()> {
    let child = Command::new(&program.path)
        .args(&program.arguments)
        .env_clear()
        .env("PATH", "/usr/bin:/usr/sbin:/bin:/sbin")
        .env("HOME", "/root")
        .envs(&program.environment)
        .current_dir(&program.folder)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", program.path.display()))?;
    let pid = Pid::from_child(&child);
    let (done, watched) = mpsc::channel::<()>();
    let within = program.within;
    let watchdog = thread::spawn(move || {
        let late = watched.recv_timeout(within) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            // One that ends at this very moment is as good.
            rustix::process::kill_process_group(pid, Signal::KILL).ok();
        }
        late
    });

    let status = loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended == pid => break status,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for a process"),
        }
    };
    drop(done);
    let late = watchdog.join().unwrap_or(false);
    ensure!(!late, "not done within {within:?}");
    ensure!(
        status.exit_status() == Some(0),
        "{}",
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "ended in an unknown way".to_owned(),
        }
    );
    Ok(())
}

/// Kills and reaps what a program left running, so that the next one finds an empty machine.
fn end_what_is_left(name: &str) {
    let mut left = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|text| text.parse::<i32>().ok()) else {
            continue;
        };
        // The kernel's own threads have no executable.
        let exe = Path::new("/proc").join(pid.to_string()).join("exe");
        let (Ok(exe), Some(id)) = (fs::read_link(exe), Pid::from_raw(pid)) else {
            continue;
        };
        if pid != 1 && rustix::process::kill_process(id, Signal::KILL).is_ok() {
            left.push(exe.display().to_string());
        }
    }
    while let Ok(Some(_)) | Err(rustix::io::Errno::INTR) = rustix::process::wait(WaitOptions::empty()) {}
    if !left.is_empty() {
        println!("vm: {name} left running: {}", left.join(", "));
    }
}
