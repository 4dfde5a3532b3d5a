//! A network namespace, and how to run code and programs inside it.
//!
//! Owns the only `setns` of the lab. Only the network namespace changes: files stay those of the machine. A thread that
//! enters never comes back, so whatever runs inside runs on a thread made for it; a child process inherits the namespace
//! of the thread that spawned it, which is why no `pre_exec` is needed.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::{fmt, panic, thread};

use anyhow::{Context, Result, bail, ensure};

use crate::remains;

/// Where iproute2 keeps named namespaces.
pub const NAMED: &str = "/run/netns";

/// A named network namespace; the last handle to go removes it, with every process inside.
#[derive(Clone)]
pub struct Netns(Arc<Namespace>);

struct Namespace {
    name: String,
    handle: File,
    inode: u64,
}

/// What a program left behind.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, as text.
    pub stdout: String,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Netns {
    /// Makes the namespace `name` (loopback up, duplicate address detection off, so that IPv6 works at once).
    pub fn new(name: &str) -> Result<Netns> {
        remains::register_namespace(name);
        ip(&["netns", "add", name])?;
        let path = PathBuf::from(NAMED).join(name);
        let handle = File::open(&path).with_context(|| format!("open namespace {}", path.display()))?;
        let inode = handle
            .metadata()
            .with_context(|| format!("stat namespace {}", path.display()))?
            .ino();
        let netns = Netns(Arc::new(Namespace {
            name: name.to_owned(),
            handle,
            inode,
        }));
        netns.batch("link set lo up\n")?;
        for (key, value) in [
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.all.accept_ra", "0"),
            ("net.ipv6.conf.default.accept_ra", "0"),
            // The machine's own settings would be inherited otherwise, and hide what a daemon forgets to set.
            ("net.ipv4.ip_forward", "0"),
            ("net.ipv6.conf.all.forwarding", "0"),
            // Lets the traffic module send echo requests through datagram sockets.
            ("net.ipv4.ping_group_range", "0 2147483647"),
        ] {
            netns.set_sysctl(key, value)?;
        }
        Ok(netns)
    }

    /// The name, as in `ip netns exec NAME`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The inode that `/proc/PID/ns/net` of a process inside shows.
    pub fn inode(&self) -> u64 {
        self.0.inode
    }

    /// Runs `work` on a fresh thread inside the namespace and returns what it returned; a panic inside is passed on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter()?;
                work()
            });
            inside.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }

    /// Starts a thread inside the namespace that may outlive the caller.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> thread::JoinHandle<Result<T>> {
        let netns = self.clone();
        thread::spawn(move || {
            netns.enter()?;
            work()
        })
    }

    fn enter(&self) -> Result<()> {
        rustix::thread::move_into_link_name_space(
            self.0.handle.as_fd(),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )
        .with_context(|| format!("enter namespace {}", self.0.name))
    }

    /// Starts a program inside; the caller owns the child.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.run(|| {
            command
                .spawn()
                .with_context(|| format!("start {command:?} in {}", self.0.name))
        })
    }

    /// Runs a program inside to its end, however it ends.
    pub fn exec(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        let output = self.run(|| {
            command
                .output()
                .with_context(|| format!("start {command:?} in {}", self.0.name))
        })?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a program inside; anything but exit code 0 is an error with all it said. Returns its standard output.
    pub fn check(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.exec(program, arguments)?;
        ensure!(
            output.status.success(),
            "`{program} {}` in {}: {}\n{}{}",
            arguments.join(" "),
            self.0.name,
            output.status,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    /// Moves a network device of this thread's namespace into this one.
    pub fn take(&self, device: &str) -> Result<()> {
        ip(&["link", "set", device, "netns", self.name()]).map(drop)
    }

    /// Runs `ip` inside with the words of `line`, e.g. `"route add 10.244.2.0/24 via 172.18.0.2"`.
    pub fn ip(&self, line: &str) -> Result<String> {
        self.check("ip", &line.split_whitespace().collect::<Vec<_>>())
    }

    /// Feeds many lines to one `ip -batch`, which stops at the first that fails.
    pub fn batch(&self, lines: &str) -> Result<()> {
        self.feed(&[], lines).map(drop)
    }

    /// Asks one `ip` many questions, a line each, and returns all answers; `options` are its own, e.g. `["-6", "-o"]`.
    pub fn ask(&self, options: &[&str], lines: &[&str]) -> Result<String> {
        self.feed(options, &format!("{}\n", lines.join("\n")))
    }

    fn feed(&self, options: &[&str], lines: &str) -> Result<String> {
        let mut command = Command::new("ip");
        command
            .args(options)
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.spawn(&mut command)?;
        let mut stdin = child.stdin.take().context("ip -batch has a stdin")?;
        stdin.write_all(lines.as_bytes()).context("write to ip -batch")?;
        drop(stdin);
        let output = child.wait_with_output().context("wait for ip -batch")?;
        ensure!(
            output.status.success(),
            "ip -batch in {}: {}\n{}of\n{lines}",
            self.0.name,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a network sysctl inside, by its dotted name.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        // procfs resolves /proc/sys/net against the namespace of the opening thread.
        let path = sysctl_path(key);
        self.run(|| std::fs::write(&path, value).with_context(|| format!("write {value} to {path} in {}", self.0.name)))
    }

    /// Reads a network sysctl inside, by its dotted name.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        self.run(|| {
            let text = std::fs::read_to_string(&path).with_context(|| format!("read {path} in {}", self.0.name))?;
            Ok(text.trim().to_owned())
        })
    }

    /// The processes whose main thread lives in this namespace, this one excepted.
    pub fn processes(&self) -> Vec<u32> {
        remains::processes_in(&[self.0.inode])
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({})", self.0.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for error in remains::remove_namespaces(std::slice::from_ref(&self.name)) {
            remains::complain(&error);
        }
    }
}

/// Runs `ip` outside of any lab namespace.
pub(crate) fn ip(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("start `ip`; the lab needs iproute2 (apt-get install iproute2)")?;
    if !output.status.success() {
        bail!(
            "`ip {}`: {}; the lab needs root",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `net.ipv4.conf.eth0.rp_filter` -> `/proc/sys/net/ipv4/conf/eth0/rp_filter`.
fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/{}", key.replace('.', "/"))
}
