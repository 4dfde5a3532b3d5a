//! The process of the userspace data plane: started so that it outlives us, found again by the socket it serves, ended only on proof that
//! it is ours.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

use crate::Error;
use crate::uapi::{Client, Owner};

/// How the data plane ends when it cannot have its device: that is another process's, or no TUN device.
const DEVICE_TAKEN: i32 = 4;
/// How long a new data plane may take until it answers.
const START: Duration = Duration::from_secs(3);
/// How long an old one may take to end when asked, before it is made to.
const END: Duration = Duration::from_secs(2);
/// How often we look whether a new one answers.
const LOOK: Duration = Duration::from_millis(10);
/// A log larger than this, in bytes, becomes the old log at the next start.
const LARGEST_LOG: u64 = 1 << 20;
/// The only variables of our environment that the data plane gets.
const ENVIRONMENT: [&str; 2] = ["RUST_LOG", "RUST_BACKTRACE"];

/// The program that runs, whatever its file is called by now, and even when that file is gone.
const OURSELVES: &str = "/proc/self/exe";

/// How the data plane is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments. In each, `{device}` and `{socket_dir}` stand for the device's name and the folder of its socket.
    pub arguments: Vec<String>,
}

impl Default for Launcher {
    /// This very program, as `wire --device NAME --socket-dir DIR`, also when its file was replaced by a newer one since it started.
    fn default() -> Self {
        let arguments = ["wire", "--device", "{device}", "--socket-dir", "{socket_dir}"];
        Self {
            program: OURSELVES.into(),
            arguments: arguments.map(str::to_owned).to_vec(),
        }
    }
}

/// The place of one device's data plane.
pub(crate) struct Place<'a> {
    pub(crate) launcher: &'a Launcher,
    pub(crate) device: &'a str,
    pub(crate) socket_dir: &'a Path,
    pub(crate) runtime_dir: &'a Path,
}

impl Place<'_> {
    pub(crate) fn client(&self) -> Client {
        Client::new(self.socket_dir, self.device)
    }

    /// Starts the data plane and waits until it answers.
    #[expect(
        clippy::disallowed_methods,
        reason = "the data plane is a process of its own, and this is where it begins"
    )]
    pub(crate) fn start(&self) -> Result<Child, Error> {
        for folder in [self.socket_dir, self.runtime_dir] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(|source| Error::system(format!("make folder {}", folder.display()), source))?;
        }
        let log = self.runtime_dir.join(format!("{}.wire.log", self.device));
        let output = open_log(&log).map_err(|source| Error::system(format!("open {}", log.display()), source))?;
        let program = &self.launcher.program;
        let failed = |source| Error::Start {
            program: program.clone(),
            source,
        };
        let mut command = Command::new(program);
        if program == Path::new(OURSELVES) {
            // For whoever looks with `ps`.
            command.arg0("shroud");
        }
        command
            .args(self.arguments())
            .env_clear()
            .envs(
                ENVIRONMENT
                    .into_iter()
                    .filter_map(|name| Some((name, std::env::var_os(name)?))),
            )
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output)
            // A process group of its own: what a terminal or a shell sends to ours (Ctrl-C) does not reach it.
            .process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        let began = Instant::now();
        let client = self.client();
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                if status.code() == Some(DEVICE_TAKEN) {
                    return Err(Error::DeviceTaken {
                        device: self.device.to_owned(),
                        log,
                    });
                }
                return Err(Error::Ended {
                    program: program.clone(),
                    status: status.to_string(),
                    log,
                });
            }
            // Until it serves the socket there may be nobody, or one that is just ending.
            if matches!(client.read(), Ok(Some(_))) {
                return Ok(child);
            }
            if began.elapsed() > START {
                // Left alone it would serve the socket late, beside the one that the next pass starts.
                end(&mut child);
                return Err(Error::Silent {
                    program: program.clone(),
                    path: client.path().to_owned(),
                    waited: START,
                    log,
                });
            }
            thread::sleep(LOOK);
        }
    }

    /// Ends the data plane, if one serves the socket and it is provably ours. Answers whether there was one.
    pub(crate) fn stop(&self) -> Result<bool, Error> {
        let Some(owner) = self.client().owner()? else {
            return Ok(false);
        };
        let failed = |operation: &str, error: rustix::io::Errno| {
            Error::system(
                format!(
                    "{operation} the data plane of {}, process {}",
                    self.device,
                    owner.pid.as_raw_pid()
                ),
                error,
            )
        };
        // The handle comes before the proof: from here on the number cannot come to mean another process.
        let process = match pidfd_open(owner.pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            opened => opened.map_err(|error| failed("look at", error))?,
        };
        self.prove(owner)?;
        for signal in [Signal::TERM, Signal::KILL] {
            match pidfd_send_signal(&process, signal) {
                Ok(()) => {}
                Err(rustix::io::Errno::SRCH) => return Ok(true),
                Err(error) => return Err(failed("end", error)),
            }
            if ended(&process, END).map_err(|error| failed("wait for", error))? {
                return Ok(true);
            }
        }
        Err(failed("end", rustix::io::Errno::TIMEDOUT))
    }

    /// Whether the owner of the socket is a data plane that we, or an earlier life of ours, started for this device.
    fn prove(&self, owner: Owner) -> Result<(), Error> {
        let refused = |because: String| Error::NotOurs {
            device: self.device.to_owned(),
            pid: owner.pid.as_raw_pid(),
            because,
        };
        if owner.user != geteuid().as_raw() {
            return Err(refused(format!("it belongs to user {}", owner.user)));
        }
        let file = format!("/proc/{}/cmdline", owner.pid.as_raw_pid());
        let line = fs::read(&file).map_err(|error| refused(format!("{file} cannot be read ({error})")))?;
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).skip(1).collect();
        let arguments = self.arguments();
        let expected = arguments.iter().map(|argument| argument.as_bytes());
        // What follows the last argument's end is empty.
        if words.iter().copied().eq(expected.chain([&b""[..]])) {
            Ok(())
        } else {
            Err(refused("its command line is not the one we start it with".to_owned()))
        }
    }

    fn arguments(&self) -> Vec<OsString> {
        let socket_dir = self.socket_dir.to_string_lossy();
        let fill = |text: &String| {
            text.replace("{device}", self.device)
                .replace("{socket_dir}", &socket_dir)
                .into()
        };
        self.launcher.arguments.iter().map(fill).collect()
    }
}

/// Ends a child that serves nothing, and waits for it, so that no zombie stays.
pub(crate) fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::debug!(pid = child.id(), %error, "could not end a child");
    }
}

/// Waits for the end of a process.
fn ended(process: &OwnedFd, patience: Duration) -> Result<bool, rustix::io::Errno> {
    let until = Instant::now() + patience;
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).unwrap_or_default();
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            answer => return Ok(answer? > 0),
        }
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|log| log.len() > LARGEST_LOG) {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        fs::rename(path, old)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}
