//! An initial RAM file system in the "newc" cpio format, as the kernel unpacks it
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// Files of the guest by their absolute path.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Folder,
    File { executable: bool, content: Vec<u8> },
    Link(PathBuf),
    CharacterDevice { major: u32, minor: u32 },
}

impl Archive {
    /// Whether something is at that path.
    pub fn contains(&self, path: &Path) -> bool {
        self.entries.contains_key(path)
    }

    /// Adds a folder.
    pub fn folder(&mut self, path: impl Into<PathBuf>) {
        self.add(path.into(), Entry::Folder);
    }

    /// Adds a file that is only read.
    pub fn file(&mut self, path: impl Into<PathBuf>, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.add(
            path.into(),
            Entry::File {
                executable: false,
                content,
            },
        );
    }

    /// Adds a program or a library.
    pub fn executable(&mut self, path: impl Into<PathBuf>, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.add(
            path.into(),
            Entry::File {
                executable: true,
                content,
            },
        );
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: impl Into<PathBuf>, target: impl Into<PathBuf>) {
        self.add(path.into(), Entry::Link(target.into()));
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: impl Into<PathBuf>, major: u32, minor: u32) {
        self.add(path.into(), Entry::CharacterDevice { major, minor });
    }

    /// The folders above come by themselves; a path sorts after the folders it lies in, which is the order the kernel needs.
    fn add(&mut self, path: PathBuf, entry: Entry) {
        let path: PathBuf = Path::new("/").join(path).components().collect();
        debug_assert!(path.components().all(|part| part != Component::ParentDir), "{path:?}");
        for folder in path.ancestors().skip(1).filter(|folder| folder.parent().is_some()) {
            self.entries.entry(folder.to_owned()).or_insert(Entry::Folder);
        }
        self.entries.insert(path, entry);
    }

    /// Writes it out.
    ///
    /// # Errors
    /// Those of the writer; a file of 4 GiB or more does not fit the format.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            let name = path.strip_prefix("/").unwrap_or(path).as_os_str().as_encoded_bytes();
            entry.write(out, number, name)?;
        }
        let end = Entry::File {
            executable: false,
            content: Vec::new(),
        };
        end.write(out, 0, b"TRAILER!!!")
    }
}

impl Entry {
    fn write(&self, out: &mut impl Write, number: u32, name: &[u8]) -> io::Result<()> {
        let (mode, content, device) = match self {
            Self::Folder => (0o040_755, &[][..], (0, 0)),
            Self::File { executable, content } => {
                (if *executable { 0o100_755 } else { 0o100_644 }, &content[..], (0, 0))
            }
            Self::Link(target) => (0o120_777, target.as_os_str().as_encoded_bytes(), (0, 0)),
            Self::CharacterDevice { major, minor } => (0o020_600, &[][..], (*major, *minor)),
        };
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let links = 1;
        // Inode, mode, owner, group, links, time, size, device, device of the node itself, length of the name, checksum.
        let fields = [
            number, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        out.write_all(b"070701")?;
        for field in fields {
            write!(out, "{field:08x}")?;
        }
        out.write_all(name)?;
        // The header has 110 bytes; name and content are padded to multiples of four.
        let padding = |length: usize| &[0; 4][..(4 - length % 4) % 4];
        out.write_all(b"\0")?;
        out.write_all(padding(110 + name.len() + 1))?;
        out.write_all(content)?;
        out.write_all(padding(content.len()))
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// The independent eye: busybox's or GNU's `cpio`.
    #[test]
    fn cpio_lists_what_was_added_and_the_folders_above() {
        let mut archive = Archive::default();
        archive.executable("/usr/bin/program", "seven b");
        archive.file("etc/note", "");
        archive.link("/bin/sh", "busybox");
        archive.folder("/proc");
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();

        let (program, first) = if Path::new("/bin/busybox").exists() {
            ("busybox", "cpio")
        } else {
            ("cpio", "--quiet")
        };
        let mut cpio = Command::new(program);
        cpio.args([first, "-tv"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut cpio = cpio.spawn().unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listed = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();

        let brief: Vec<String> = listed
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let name = line
                    .rsplit_once(":00 ")
                    .map_or(*words.last().unwrap(), |(_, name)| name);
                format!("{} {name}", words[0])
            })
            .collect();
        assert_eq!(
            brief,
            [
                "drwxr-xr-x bin",
                "lrwxrwxrwx bin/sh -> busybox",
                "drwxr-xr-x etc",
                "-rw-r--r-- etc/note",
                "drwxr-xr-x proc",
                "drwxr-xr-x usr",
                "drwxr-xr-x usr/bin",
                "-rwxr-xr-x usr/bin/program",
            ],
            "{listed}"
        );
    }
}
