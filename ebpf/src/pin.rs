//! Where on the BPF file system the gate lives, so that it outlives the process.
//!
//! ```text
//!   <pin directory>/v3/maps/PREFIXES …                     layout version 3; survives upgrades of the program
//!                     /programs/<build>/shroud_egress …    the build that is in force
//!                              /reads-<maps>          which maps these programs read, by their numbers
//!                     /links/<interface index>-egress …    what holds a program to a device (tcx only)
//! ```
//!
//! A name on a BPF file system must not contain a dot, and device names do (`eth0.100`); hence the index.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::mount::MountFlags;
use shroud_gate::LAYOUT_VERSION;

use crate::{Error, Hook};

/// Where BPF file systems are mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// `f_type` of a BPF file system; `include/uapi/linux/magic.h`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// How the folder begins that says which maps programs read; their numbers follow.
const READS: &str = "reads-";

/// The paths under one pin directory.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    root: PathBuf,
}

impl Pins {
    pub(crate) fn new(directory: &Path) -> Self {
        Self {
            root: directory.join(format!("v{LAYOUT_VERSION}")),
        }
    }

    /// What lies beside this layout under the pin directory.
    pub(crate) fn other_layouts(&self) -> Result<Vec<PathBuf>, Error> {
        let mut layouts = list(self.root.parent().unwrap_or(&self.root))?;
        layouts.retain(|layout| *layout != self.root);
        Ok(layouts)
    }

    /// Of whatever layout version lies at this path.
    pub(crate) fn of_layout(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    pub(crate) fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    pub(crate) fn program(&self, build: &str, name: &str) -> PathBuf {
        self.programs().join(build).join(name)
    }

    /// A folder that says, by being there, which maps the pinned programs of a build read. The kernel would say it as well, but only to
    /// whoever has CAP_SYS_ADMIN, which the agent does without.
    pub(crate) fn reads(&self, build: &str, maps: &[u32]) -> PathBuf {
        let maps: Vec<String> = maps.iter().map(u32::to_string).collect();
        self.programs().join(build).join(format!("{READS}{}", maps.join("-")))
    }

    /// Takes back what was said of the programs of a build, before others take their place.
    pub(crate) fn forget_reads(&self, build: &str) -> Result<(), Error> {
        for path in list(&self.programs().join(build))? {
            if path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(READS))
            {
                fs::remove_dir(&path).map_err(|source| Error::Path {
                    operation: "remove",
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Says, once all programs of a build are pinned, which maps they read.
    pub(crate) fn note_reads(&self, build: &str, maps: &[u32]) -> Result<(), Error> {
        let path = self.reads(build, maps);
        fs::create_dir_all(&path).map_err(|source| Error::Path {
            operation: "make directory",
            path,
            source,
        })
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(crate) fn link(&self, index: u32, hook: Hook) -> PathBuf {
        self.links().join(format!("{index}-{hook}"))
    }

    /// Makes the directories, and mounts a BPF file system in the usual place if there is none.
    pub(crate) fn prepare(&self, build: &str) -> Result<(), Error> {
        if !is_bpffs(&self.root)? && self.root.starts_with(BPFFS) {
            mount_once(Path::new(BPFFS))?;
        }
        if !is_bpffs(&self.root)? {
            return Err(Error::NotBpffs {
                path: self.root.clone(),
            });
        }
        for directory in [self.root.join("maps"), self.programs().join(build), self.links()] {
            fs::create_dir_all(&directory).map_err(|source| Error::Path {
                operation: "make directory",
                path: directory.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// Whether a path, or the nearest directory above it that exists, is on a BPF file system.
fn is_bpffs(path: &Path) -> Result<bool, Error> {
    for directory in path.ancestors() {
        match rustix::fs::statfs(directory) {
            Ok(found) => return Ok(found.f_type == BPF_FS_MAGIC),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                return Err(Error::Path {
                    operation: "look at",
                    path: directory.into(),
                    source: error.into(),
                });
            }
        }
    }
    Ok(false)
}

/// Two that find nothing mounted at the same moment would mount one over the other, and hide what the first has pinned: whoever comes
/// second waits and looks again.
fn mount_once(path: &Path) -> Result<(), Error> {
    let failed = |source: io::Error| Error::Path {
        operation: "lock",
        path: path.into(),
        source,
    };
    let folder = File::open(path).map_err(failed)?;
    rustix::fs::flock(&folder, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    if is_bpffs(path)? { Ok(()) } else { mount(path) }
}

fn mount(path: &Path) -> Result<(), Error> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("bpf", path, "bpf", flags, c"mode=0700").map_err(|error| Error::Path {
        operation: "mount a BPF file system on",
        path: path.into(),
        source: error.into(),
    })?;
    tracing::info!(path = %path.display(), "mounted a BPF file system");
    Ok(())
}

/// The names in a directory; none if it is not there.
pub(crate) fn list(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Path {
        operation: "list",
        path: directory.into(),
        source,
    };
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(failed)?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// Removes one pin; what is not there is removed.
pub(crate) fn remove(path: &Path) -> Result<bool, Error> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Path {
            operation: "remove",
            path: path.into(),
            source,
        }),
    }
}
