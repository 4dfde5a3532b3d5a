//! `demo`: three nodes on one machine, every pod byte encrypted, proven on the wire. `--help` tells the rest.

use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, fs, process, thread};

use anyhow::{Context, Result};
use clap::Parser;
use shroud_lab::demo::{self, Mesh, Options, Screen, Summary, Verdict};
use shroud_lab::{agent, remains};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Whether a signal ends the waiting of `--keep` instead of the process.
static KEEPING: AtomicBool = AtomicBool::new(false);

/// Builds three nodes with two pods each, runs the real agents, and proves on the wire that nothing leaves in the clear.
///
/// Needs root. Progress goes to standard error; the last line of standard output is the result as JSON. Exit code 0 means:
/// all flows worked, nothing leaked, and the same search found the markers when encryption was off.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// The `shroud` program [default: the one beside this program].
    #[arg(long, value_name = "FILE")]
    shroud: Option<PathBuf>,
    /// Let the nodes meet in a Kubernetes cluster (an API server for tests), and not in a folder.
    #[arg(long)]
    kubernetes: bool,
    /// Leave the lab running until Ctrl-C, and say how to look around.
    #[arg(long)]
    keep: bool,
    /// Where the result is written as well.
    #[arg(long, value_name = "FILE", default_value = "target/demo/result.json")]
    result: PathBuf,
    /// Repeat the flows for at least this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    seconds: u64,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let signals = watch_signals()?;
    let options = Options {
        shroud: arguments.shroud.map_or_else(agent::program, Ok)?,
        result: arguments.result,
        soak: Duration::from_secs(arguments.seconds),
        kubernetes: arguments.kubernetes,
    };
    let folder = options.result.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let colour = stderr().is_terminal() && env::var_os("NO_COLOR").is_none();
    let screen = Screen::new(Box::new(stderr()), colour);

    let (summary, mesh) = match demo::run(&options, &screen) {
        Ok((summary, mesh)) => (summary, Some(mesh)),
        Err(error) => {
            screen.line(&format!("\nThe demo failed: {error:#}"));
            (Summary::failed(), None)
        }
    };
    let json = summary.json()?;
    fs::write(&options.result, format!("{json}\n")).with_context(|| format!("write {}", options.result.display()))?;

    if let Some(mesh) = mesh {
        if arguments.keep {
            KEEPING.store(true, Ordering::Release);
            screen.line(&demo::tour(&mesh, &options));
            if signals.recv().is_err() {
                screen.line("Signals are not watched any more.");
            }
        }
        let Mesh { agents, cluster, lab } = mesh;
        drop((agents, cluster));
        for error in lab.remove() {
            screen.line(&format!("could not clean up: {error}"));
        }
    }
    println!("{json}");
    Ok(if summary.verdict == Verdict::Encrypted {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Removes everything and exits on a signal; while the lab is kept, passes the signal on.
fn watch_signals() -> Result<mpsc::Receiver<i32>> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).context("watch for signals")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for signal in signals.forever() {
            if KEEPING.swap(false, Ordering::AcqRel) && sender.send(signal).is_ok() {
                continue;
            }
            eprintln!("\nEnding: removing the lab.");
            for error in remains::remove_everything() {
                eprintln!("could not clean up: {error}");
            }
            process::exit(128 + signal);
        }
    });
    Ok(receiver)
}
