//! A guest from start to end: starts the emulator, follows its two serial lines, and judges.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::archive::Archive;
use crate::console::{Event, Source, event};
use crate::kernel::Kernel;

/// The emulator's program.
const QEMU: &str = "qemu-system-x86_64";

/// Memory of a guest, in MiB; its files live in it too.
const MEMORY: u32 = 3072;

/// A guest's network card: its end of a wire to one other guest.
#[derive(Clone, Debug)]
pub struct Wire {
    /// Which guest this is, from 1.
    pub number: u8,
    /// This end, a Unix socket.
    pub here: PathBuf,
    /// The other end; frames are lost while nobody is there.
    pub there: PathBuf,
}

/// How long a guest may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From start to end.
    pub total: Duration,
    /// Between two lines.
    pub silence: Duration,
}

/// What became of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The kernel's own name of its version.
    pub release: String,
    /// The day it was started, as in 2026-11-24 (UTC).
    pub date: String,
    /// What ran, in order.
    pub programs: Vec<Ran>,
    /// Why the guest as a whole failed; empty when it did not.
    pub failures: Vec<String>,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// What became of a program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ran {
    /// Its name.
    pub name: String,
    /// `ok`, or why it failed; `running` when the guest ended before it.
    pub outcome: String,
    /// Seconds from its begin to its end.
    pub seconds: f64,
    /// Its tests and what became of each: `ok`, `FAILED` or `ignored`.
    pub tests: Vec<(String, String)>,
}

impl Report {
    /// Whether all is well.
    pub fn ok(&self) -> bool {
        self.failures.is_empty()
    }

    /// A line per program.
    pub fn table(&self) -> String {
        let mut table = format!(
            "{:28} {:>6} {:>6} {:>7} {:>8}  outcome\n",
            self.release, "ok", "failed", "ignored", "seconds"
        );
        for ran in &self.programs {
            let count = |wanted: &str| ran.tests.iter().filter(|(_, result)| result == wanted).count();
            table.push_str(&format!(
                "  {:26} {:>6} {:>6} {:>7} {:>8.1}  {}\n",
                ran.name,
                count("ok"),
                count("FAILED"),
                count("ignored"),
                ran.seconds,
                ran.outcome
            ));
        }
        table
    }
}

/// A running emulator; it never outlives this value.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // One that has ended already is what we want.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Boots a kernel with an archive, follows it to its end, and keeps all it says in `log`.
///
/// # Errors
/// When the emulator cannot be started or the log not be written; what goes wrong inside is in the report.
pub fn run(kernel: &Kernel, archive: &Archive, wire: &Wire, log: &Path, patience: Patience) -> Result<Report> {
    let initramfs = log.with_extension("cpio");
    let file = File::create(&initramfs).with_context(|| format!("create {}", initramfs.display()))?;
    let mut out = BufWriter::new(file);
    archive
        .write(&mut out)
        .and_then(|()| out.flush())
        .with_context(|| format!("write {}", initramfs.display()))?;
    let mut emulator = start(kernel, &initramfs, wire)?;
    let (sender, lines) = mpsc::channel();
    let kernel_messages = emulator.0.stdout.take().context("the emulator has a standard output")?;
    let programs = emulator.0.stderr.take().context("the emulator has a standard error")?;
    follow(Source::Kernel, kernel_messages, sender.clone());
    follow(Source::Programs, programs, sender);

    let log_file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let mut watch = Watch::new(kernel, today()?, BufWriter::new(log_file), patience);
    loop {
        match lines.recv_timeout(watch.wait()) {
            Ok((source, line)) => watch
                .line(source, &line)
                .with_context(|| format!("write {}", log.display()))?,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                watch.give_up();
                break;
            }
        }
    }
    drop(emulator);
    // Large, and made anew each time.
    fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    watch.end().with_context(|| format!("write {}", log.display()))
}

/// A command whose process is killed when the thread that started it is gone, however this program ends: a forgotten emulator would
/// keep a processor busy for as long as the machine runs.
fn mortal(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// Software emulation on purpose: it is the same on every machine, and nested hardware virtualization often is not.
fn start(kernel: &Kernel, initramfs: &Path, wire: &Wire) -> Result<Emulator> {
    let mut qemu = mortal(QEMU);
    qemu.args(["-accel", "tcg", "-machine", "q35", "-cpu", "max"]);
    // One processor: a kernel patches its own code while it runs (static keys), and an emulator that runs several processors at once
    // may still execute the old bytes of it, which ends in "Oops: int3".
    qemu.args(["-smp", "1", "-m", &MEMORY.to_string()]);
    qemu.args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
    // Kernel messages on our one pipe, programs on the other: neither tears the other's lines.
    qemu.args(["-serial", "stdio", "-serial", "file:/dev/stderr"]);
    // Datagrams between two files: no order in which the guests must start, and nothing that leaves this folder.
    for path in [&wire.here, &wire.there] {
        ensure!(
            !path.to_string_lossy().contains(','),
            "{} has a comma, at which {QEMU} ends a path",
            path.display()
        );
    }
    qemu.arg("-netdev").arg(format!(
        "dgram,id=wire,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        wire.here.display(),
        wire.there.display()
    ));
    qemu.args([
        "-device",
        &format!(
            "virtio-net-pci,netdev=wire,romfile=,mac=52:54:00:00:00:{:02x}",
            wire.number
        ),
    ]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    qemu.args([
        "-append",
        "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off random.trust_cpu=on",
    ]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = qemu
        .spawn()
        .with_context(|| format!("start {QEMU} (apt-get install qemu-system-x86)"))?;
    Ok(Emulator(child))
}

fn today() -> Result<String> {
    let output = Command::new("date")
        .args(["-u", "+%F"])
        .output()
        .context("start date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Reads lines until the emulator closes its end.
fn follow(source: Source, stream: impl Read + Send + 'static, lines: Sender<(Source, String)>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if lines.send((source, line)).is_err() {
                break;
            }
        }
    });
}

/// What has been seen so far.
struct Watch {
    name: String,
    log: BufWriter<File>,
    begun: Instant,
    heard: Instant,
    program_begun: Instant,
    patience: Patience,
    ended: Option<bool>,
    report: Report,
}

impl Watch {
    fn new(kernel: &Kernel, today: String, log: BufWriter<File>, patience: Patience) -> Self {
        let now = Instant::now();
        Self {
            name: kernel.name.clone(),
            log,
            begun: now,
            heard: now,
            program_begun: now,
            patience,
            ended: None,
            report: Report {
                release: kernel.release.clone(),
                date: today,
                programs: Vec::new(),
                failures: Vec::new(),
                seconds: 0.0,
            },
        }
    }

    /// How long the next line may take.
    fn wait(&self) -> Duration {
        let left = self.patience.total.saturating_sub(self.begun.elapsed());
        left.min(self.patience.silence.saturating_sub(self.heard.elapsed()))
    }

    fn line(&mut self, source: Source, line: &str) -> Result<()> {
        self.heard = Instant::now();
        let seconds = self.begun.elapsed().as_secs_f64();
        let who = if source == Source::Kernel { "kernel " } else { "" };
        writeln!(self.log, "{seconds:8.2} {who}{line}")?;
        self.log.flush()?;
        let Some(event) = event(source, line) else {
            return Ok(());
        };
        println!("{:5} {seconds:7.1} {line}", self.name);
        match event {
            Event::Begin(name) => {
                self.program_begun = Instant::now();
                self.report.programs.push(Ran {
                    name,
                    outcome: "running".into(),
                    seconds: 0.0,
                    tests: Vec::new(),
                });
            }
            Event::Ok(_) => self.program_ended("ok".into()),
            Event::Failed(why) => {
                self.program_ended(why.clone());
                self.report.failures.push(why);
            }
            Event::Test { name, result } => {
                if let Some(ran) = self.report.programs.last_mut() {
                    ran.tests.push((name, result));
                }
            }
            Event::Figures => {}
            Event::Alarm => self.report.failures.push(format!("the kernel said: {line}")),
            Event::End(well) => self.ended = Some(well),
        }
        Ok(())
    }

    fn program_ended(&mut self, outcome: String) {
        if let Some(ran) = self.report.programs.last_mut() {
            ran.outcome = outcome;
            ran.seconds = self.program_begun.elapsed().as_secs_f64();
        }
    }

    fn give_up(&mut self) {
        let why = if self.begun.elapsed() >= self.patience.total {
            format!("not done within {:?}", self.patience.total)
        } else {
            format!("silent for {:?}", self.patience.silence)
        };
        self.report.failures.push(why);
    }

    fn end(mut self) -> Result<Report> {
        match self.ended {
            Some(true) => {}
            Some(false) if !self.report.failures.is_empty() => {}
            Some(false) => self.report.failures.push("the guest says that it failed".into()),
            None => self
                .report
                .failures
                .push("the guest never said that it succeeded".into()),
        }
        self.report.seconds = self.begun.elapsed().as_secs_f64();
        for failure in &self.report.failures {
            writeln!(self.log, "failure: {failure}")?;
        }
        self.log.flush()?;
        Ok(self.report)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn an_emulator_dies_with_the_thread_that_started_it() {
        let (sender, started) = mpsc::channel();
        thread::spawn(move || {
            let mut child = mortal("sh")
                .args(["-c", "echo up; exec sleep 5"])
                .stdout(Stdio::piped())
                .spawn()
                .expect("setpriv starts");
            let mut first = [0];
            child
                .stdout
                .as_mut()
                .expect("a pipe")
                .read_exact(&mut first)
                .expect("it speaks");
            sender.send(child).expect("the test waits");
        });
        let mut child = started.recv().expect("it was started");

        let status = child.wait().expect("it ends");

        assert_eq!(status.signal(), Some(9), "{status}");
    }
}
