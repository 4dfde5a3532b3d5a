//! Everything a lab leaves on the machine, so that it can be taken away: on drop, on a signal, or by the next lab.
//!
//! Names carry the process id of their maker. What belongs to a living process is never touched; what belongs to a dead
//! one is swept when the next lab is built. Nothing that does not match the lab's own name pattern is ever touched.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use rustix::process::{Pid, Signal};

use crate::netns::{NAMED, ip};

/// Namespaces are called `shroud-PID-N-…`.
pub(crate) const NAMESPACE_PREFIX: &str = "shroud-";

/// Folders are called `/run/shroud-lab-PID-N`.
pub(crate) const FOLDER_PREFIX: &str = "/run/shroud-lab-";

/// Where userspace WireGuard keeps its control sockets.
pub(crate) const WIREGUARD_SOCKETS: &str = "/run/wireguard";

#[derive(Default)]
struct Remains {
    namespaces: BTreeSet<String>,
    folders: BTreeSet<PathBuf>,
    devices: BTreeSet<String>,
    /// Set once everything is being removed for good: nothing may be added any more.
    closed: bool,
}

static REMAINS: Mutex<Remains> = Mutex::new(Remains {
    namespaces: BTreeSet::new(),
    folders: BTreeSet::new(),
    devices: BTreeSet::new(),
    closed: false,
});

fn remains() -> MutexGuard<'static, Remains> {
    REMAINS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes what is about to be made; never returns once [`remove_everything`] has begun.
fn register(note: impl FnOnce(&mut Remains)) {
    let mut remains = remains();
    while remains.closed {
        drop(remains);
        thread::park();
        remains = self::remains();
    }
    note(&mut remains);
}

pub(crate) fn register_namespace(name: &str) {
    register(|remains| {
        remains.namespaces.insert(name.to_owned());
    });
}

pub(crate) fn register_folder(path: &Path) {
    register(|remains| {
        remains.folders.insert(path.to_owned());
    });
}

pub(crate) fn register_device(name: &str) {
    register(|remains| {
        remains.devices.insert(name.to_owned());
    });
}

/// Removes whatever labs of this process made, before it exits on a signal; threads that build a lab stop for good.
/// Returns what could not be removed.
pub fn remove_everything() -> Vec<String> {
    remains().closed = true;
    // Lets what was noted a moment ago come into being, so that it can be removed.
    thread::sleep(Duration::from_millis(50));
    let (namespaces, folders, devices) = {
        let remains = remains();
        (
            remains.namespaces.clone(),
            remains.folders.clone(),
            remains.devices.clone(),
        )
    };
    let mut errors = remove_namespaces(&Vec::from_iter(namespaces));
    for device in devices {
        errors.extend(remove_sockets(&device));
    }
    for folder in folders {
        errors.extend(remove_folder(&folder));
    }
    errors
}

/// Removes what labs of dead processes left; returns what could not be removed.
pub fn sweep() -> Vec<String> {
    let dead = |rest: &str| {
        let pid = rest.split('-').next().and_then(|pid| pid.parse::<u32>().ok());
        pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    };
    let namespaces: Vec<String> = names_in(Path::new(NAMED))
        .into_iter()
        .filter(|name| name.strip_prefix(NAMESPACE_PREFIX).is_some_and(dead))
        .collect();
    let mut errors = remove_namespaces(&namespaces);
    for name in names_in(Path::new("/run")) {
        let path = Path::new("/run").join(&name);
        let Some(rest) = path.to_str().and_then(|path| path.strip_prefix(FOLDER_PREFIX)) else {
            continue;
        };
        if dead(rest) {
            for device in fs::read_to_string(path.join("devices")).unwrap_or_default().lines() {
                errors.extend(remove_sockets(device));
            }
            errors.extend(remove_folder(&path));
        }
    }
    errors
}

/// Kills whatever runs inside, then removes the namespaces.
pub(crate) fn remove_namespaces(names: &[String]) -> Vec<String> {
    let inodes: Vec<u64> = names
        .iter()
        .filter_map(|name| fs::metadata(Path::new(NAMED).join(name)).ok())
        .map(|m| m.ino())
        .collect();
    let mut errors = kill_inside(&inodes);
    for name in names {
        if Path::new(NAMED).join(name).exists()
            && let Err(error) = ip(&["netns", "del", name])
        {
            errors.push(format!("{error:#}"));
            continue;
        }
        remains().namespaces.remove(name);
    }
    errors
}

/// Kills until nobody is left: an agent that dies last may have started a child in between.
fn kill_inside(inodes: &[u64]) -> Vec<String> {
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        let alive = processes_in(inodes);
        if alive.is_empty() {
            return Vec::new();
        }
        if Instant::now() > give_up {
            return vec![format!("processes {alive:?} survive SIGKILL")];
        }
        for pid in alive {
            // A process that is gone already is what we want.
            drop(kill(pid, Signal::KILL));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal to one process, by id.
pub(crate) fn kill(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other(format!("{pid} is not a process id")))?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// The processes whose main thread lives in one of these network namespaces, this one excepted.
pub(crate) fn processes_in(inodes: &[u64]) -> Vec<u32> {
    names_in(Path::new("/proc"))
        .into_iter()
        .filter_map(|name| name.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| inodes.contains(&ns.ino())))
        .collect()
}

/// Removes the control sockets of a userspace WireGuard device and of those beside it.
pub(crate) fn remove_sockets(device: &str) -> Vec<String> {
    remains().devices.remove(device);
    let names = ["", "-1", "-2", "-3"].map(|lane| format!("{device}{lane}.sock"));
    let remove = |name: String| {
        let path = Path::new(WIREGUARD_SOCKETS).join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Some(format!("remove {}: {error}", path.display()))
            }
            _ => None,
        }
    };
    names.into_iter().filter_map(remove).collect()
}

/// Unmounts the BPF file system of a lab folder, then removes the folder.
pub(crate) fn remove_folder(path: &Path) -> Vec<String> {
    let mut errors = Vec::new();
    let bpf = path.join("bpf");
    if is_mount_point(&bpf)
        && let Err(error) = rustix::mount::unmount(&bpf, rustix::mount::UnmountFlags::DETACH)
    {
        errors.push(format!("unmount {}: {error}", bpf.display()));
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            errors.push(format!("remove {}: {error}", path.display()));
        }
        _ => {
            remains().folders.remove(path);
        }
    }
    errors
}

fn is_mount_point(path: &Path) -> bool {
    let (Ok(here), Some(parent)) = (fs::metadata(path), path.parent()) else {
        return false;
    };
    fs::metadata(parent).is_ok_and(|parent| parent.dev() != here.dev())
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Says on standard error what a destructor has nobody to return to.
pub(crate) fn complain(error: &str) {
    eprintln!("lab: could not clean up: {error}");
}
