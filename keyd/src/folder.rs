//! A folder on disk in which files appear whole or not at all.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::Error;

/// An open folder. Names are resolved inside it, so nobody can swap the folder between two steps.
pub(crate) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

/// What a name in a folder stands for.
pub(crate) enum Entry {
    /// Nothing.
    Absent,
    /// A symbolic link; it is not followed.
    Symlink,
    /// A folder, device, socket or pipe; it is not opened.
    Special,
    /// A regular file, open for reading.
    File { file: File, stat: Stat },
}

/// What becomes of a file that already has the name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    Replace,
    Keep,
}

/// Whether [`Folder::write`] gave the name to the new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    New,
    AlreadyThere,
}

impl Folder {
    /// Opens a folder.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(io_error("open folder", path))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The folder's own owner, mode and identity.
    pub(crate) fn stat(&self) -> Result<Stat, Error> {
        rustix::fs::fstat(&self.fd).map_err(io_error("stat", &self.path))
    }

    /// Opens a regular file for reading; tells links, devices and pipes apart without opening them.
    pub(crate) fn entry(&self, name: impl AsRef<Path>) -> Result<Entry, Error> {
        let name = name.as_ref();
        let path = self.path.join(name);
        let stat = match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Entry::Absent),
            Err(error) => return Err(io_error("stat", &path)(error)),
        };
        if let Some(other) = not_regular(&stat) {
            return Ok(other);
        }

        // The name may stand for something else by now: no link is followed, no pipe is waited for, and the kind is looked at again.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Entry::Absent),
            Err(Errno::LOOP) => return Ok(Entry::Symlink),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(io_error("stat", &path))?;
        Ok(not_regular(&stat).unwrap_or_else(|| Entry::File {
            file: File::from(fd),
            stat,
        }))
    }

    /// Puts a file in its place so that it survives a crash: written beside it, synced, named, and the folder synced.
    ///
    /// A crash leaves at worst `.NAME.new`, which the next write removes.
    pub(crate) fn write(&self, name: &str, contents: &[u8], mode: Mode, existing: Existing) -> Result<Written, Error> {
        let path = self.path.join(name);
        let unfinished = format!(".{name}.new");
        self.remove(&unfinished)?;

        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, &unfinished, flags, mode)
            .map_err(io_error("create", &self.path.join(&unfinished)))?;
        // The umask may have taken bits away.
        rustix::fs::fchmod(&fd, mode).map_err(io_error("set the mode of", &path))?;
        let mut file = File::from(fd);
        file.write_all(contents).map_err(failed("write", &path))?;
        file.sync_all().map_err(failed("sync", &path))?;

        let written = match existing {
            Existing::Replace => {
                rustix::fs::renameat(&self.fd, &unfinished, &self.fd, name).map_err(io_error("replace", &path))?;
                Written::New
            }
            Existing::Keep => {
                let linked = rustix::fs::linkat(&self.fd, &unfinished, &self.fd, name, AtFlags::empty());
                self.remove(&unfinished)?;
                match linked {
                    Ok(()) => Written::New,
                    Err(Errno::EXIST) => Written::AlreadyThere,
                    Err(error) => return Err(io_error("create", &path)(error)),
                }
            }
        };
        self.sync()?;
        Ok(written)
    }

    /// Makes sure that names which were given or taken survive a crash.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        rustix::fs::fsync(&self.fd).map_err(io_error("sync folder", &self.path))
    }

    /// Gives a file another name, replacing what had it.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        rustix::fs::renameat(&self.fd, from, &self.fd, to).map_err(io_error("rename", &self.path.join(from)))
    }

    /// Removes a file; one that is not there is removed already.
    fn remove(&self, name: &str) -> Result<(), Error> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(io_error("remove", &self.path.join(name))(error)),
        }
    }
}

/// What a thing is, when it is no regular file.
fn not_regular(stat: &Stat) -> Option<Entry> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => None,
        FileType::Symlink => Some(Entry::Symlink),
        FileType::Directory
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Some(Entry::Special),
    }
}

/// Names the operation and its object.
pub(crate) fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    move |error| failed(operation, path)(error.into())
}

/// Names the operation and its object.
pub(crate) fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}
