//! Gathers what a guest needs into an archive: programs with their libraries, tools, kernel modules, and pid 1.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result, ensure};

use crate::archive::Archive;
use crate::kernel::Kernel;
use crate::program::{MODULES, PROGRAMS, Program};

/// What the lab and the tests look through. The rest of what a shell script may want comes from busybox.
const TOOLS: [&str; 12] = [
    "bpftool", "bridge", "ip", "nft", "nsenter", "nstat", "ping", "ss", "strace", "sysctl", "tc", "wg",
];

/// Applets of busybox that the guest gets under their own name.
const APPLETS: [&str; 18] = [
    "cat", "cp", "date", "dmesg", "env", "false", "free", "grep", "head", "ls", "lsmod", "mount", "ps", "sleep",
    "tail", "true", "umount", "uname",
];

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Image {
    archive: Archive,
    /// Programs whose libraries are in already.
    resolved: BTreeSet<PathBuf>,
}

impl Image {
    /// Folders, devices, tools and pid 1, without kernel modules and programs.
    ///
    /// # Errors
    /// When a tool is not installed on this machine.
    pub fn new() -> Result<Self> {
        let mut image = Self::default();
        for folder in ["/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp", "/var/lib"] {
            image.archive.folder(folder);
        }
        // Pid 1 speaks before it has mounted anything.
        image.archive.character_device("/dev/console", 5, 1);
        image.archive.link("/var/run", "/run");
        image.archive.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n");
        image.archive.file("/etc/group", "root:x:0:\n");
        image.archive.file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n");

        let init = env::current_exe().context("find this program")?.with_file_name("init");
        image.program_as(&init, Path::new("/init"))?;
        // Not busybox's: that shell prefers its own `ip` to the one in PATH.
        image.program_as(&tool("dash")?, Path::new("/bin/sh"))?;
        let busybox = tool("busybox")?;
        image.program_as(&busybox, Path::new("/bin/busybox"))?;
        for applet in APPLETS {
            image.archive.link(format!("/bin/{applet}"), "busybox");
        }
        for name in TOOLS {
            image.program_as(&tool(name)?, &Path::new("/usr/bin").join(name))?;
        }
        Ok(image)
    }

    /// Adds a program at the path it has here.
    ///
    /// # Errors
    /// When it or a library of its cannot be read.
    pub fn program(&mut self, path: &Path) -> Result<()> {
        self.program_as(path, path)
    }

    /// Adds a program under another path.
    ///
    /// # Errors
    /// When it or a library of its cannot be read.
    pub fn program_as(&mut self, path: &Path, there: &Path) -> Result<()> {
        if self.archive.contains(there) {
            return Ok(());
        }
        self.archive.executable(there, stripped(path)?);
        if self.resolved.insert(path.to_owned()) {
            for library in libraries(path)? {
                if !self.archive.contains(&library) {
                    let content = fs::read(&library).with_context(|| format!("read {}", library.display()))?;
                    self.archive.executable(library, content);
                }
            }
        }
        Ok(())
    }

    /// Adds a file at the path it has here.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        self.archive.file(path, content);
        Ok(())
    }

    /// Adds what the guest is to run, and the modules it is to load first; returns the finished archive.
    ///
    /// # Errors
    /// When a module cannot be read.
    pub fn finish(mut self, kernel: &Kernel, modules: &[&str], programs: &[Program]) -> Result<Archive> {
        let mut list = String::new();
        for module in kernel.modules(modules)? {
            let path = format!("/lib/modules/{}.ko", module.name);
            list.push_str(&format!("{path}\n"));
            self.archive.file(path, module.content);
        }
        self.archive.file(MODULES, list);
        for program in programs {
            self.archive.folder(&program.folder);
        }
        self.archive.file(
            PROGRAMS,
            serde_json::to_vec_pretty(programs).context("write the list of programs")?,
        );
        Ok(self.archive)
    }
}

/// Where a tool is installed; system folders count even when `PATH` lacks them.
fn tool(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed; scripts/test-vm.sh does that"))
}

/// An executable without its debugging sections: a guest has little memory, and an emulator copies slowly.
fn stripped(path: &Path) -> Result<Vec<u8>> {
    let scratch = env::temp_dir().join(format!("shroud-vm-{}", process::id()));
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(&scratch).arg(path);
    let output = strip.output().context("start strip (apt-get install binutils)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{strip:?}: {} {complaint}", output.status);
    let content = fs::read(&scratch).with_context(|| format!("read {}", scratch.display()));
    fs::remove_file(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    content
}

/// The shared libraries of a program and its loader, as `ldd` finds them; none when it is static.
fn libraries(path: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    let output = ldd.arg(path).output().context("start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if complaint.contains("not a dynamic executable") || text.contains("statically linked") {
        return Ok(Vec::new());
    }
    ensure!(output.status.success(), "{ldd:?}: {} {complaint}", output.status);
    ensure!(!text.contains("not found"), "{ldd:?}: a library is missing\n{text}");
    Ok(parse_libraries(&text))
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f…)` or `/lib64/ld-linux-x86-64.so.2 (0x7f…)`; the vDSO has no file.
fn parse_libraries(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_in_what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";

        assert_eq!(
            parse_libraries(text),
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from)
        );
    }
}
