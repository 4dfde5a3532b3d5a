//! `vm`: boots kernels side by side, runs the suites inside each, and ends with 0 only if every guest said that all was well.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use shroud_vm::archive::Archive;
use shroud_vm::build::{self, Built, workspace};
use shroud_vm::guest::{self, Patience, Report, Wire};
use shroud_vm::image::Image;
use shroud_vm::kernel::Kernel;
use shroud_vm::program::Program;
use shroud_vm::suite::{self, MODULES, PACKAGES, PAIR, Run, SUITES, Suite};
use shroud_vm::support;

/// Runs the kernel tests and scenarios on other kernels.
#[derive(Debug, Parser)]
struct Options {
    /// Folder with an unpacked kernel package per name.
    #[arg(long)]
    kernels: PathBuf,
    /// A kernel to boot, e.g. 6.12; may be given more than once.
    #[arg(long = "kernel", default_values_t = [String::from("6.1"), String::from("6.12")])]
    names: Vec<String>,
    /// Every suite, not only the short run's.
    #[arg(long)]
    full: bool,
    /// Only the suite of this name, or else those whose name contains it, whichever run they belong to.
    #[arg(long)]
    only: Option<String>,
    /// Only tests whose name contains this.
    #[arg(long)]
    test: Option<String>,
    /// How often each suite runs, to find what fails now and then.
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// Runs this command line in the guest, and no suite.
    #[arg(long)]
    command: Option<String>,
    /// Runs the benchmark of thousands of peers, and no suite.
    #[arg(long)]
    bench: bool,
    /// Boots nothing, and writes docs/support.md from the latest reports.
    #[arg(long)]
    support: bool,
    /// How many seconds a guest may take.
    #[arg(long, default_value_t = 12_000)]
    within: u64,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if options.support {
        return write_support(&options.names);
    }
    let (built, programs) = what_to_run(&options)?;

    let logs = workspace().join("target/vm");
    fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
    let mut prepared = Vec::new();
    // Short, for a Unix socket's path has 107 bytes; gone with all in it at the end.
    let wires = tempfile::tempdir().context("make a folder for the guests' wires")?;
    for (number, name) in (1..).zip(&options.names) {
        let mut programs = programs.clone();
        for program in &mut programs {
            program.environment.insert("SHROUD_LAB_PAIR".into(), number.to_string());
        }
        let end = |number: u8| wires.path().join(number.to_string());
        let wire = Wire {
            number,
            here: end(number),
            // 1 and 2 are joined, 3 and 4, and so on.
            there: end(if number % 2 == 1 { number + 1 } else { number - 1 }),
        };
        prepared.push((name, wire, prepare(&options, name, &built, &programs)?));
    }
    let (logs, within, prefix) = (
        logs.as_path(),
        options.within,
        if options.bench { "bench-" } else { "" },
    );
    // One virtual processor each: see `guest`. The guests share the machine's.
    let reports = thread::scope(|scope| {
        let guests: Vec<_> = prepared
            .into_iter()
            .map(|(name, wire, guest)| {
                scope.spawn(move || follow(name, guest, &wire, &logs.join(format!("{prefix}{name}.log")), within))
            })
            .collect();
        let joined = guests
            .into_iter()
            .map(|guest| guest.join().expect("a guest's thread does not panic"));
        joined.collect::<Result<Vec<Report>>>()
    })?;

    println!();
    for report in &reports {
        print!("{}", report.table());
    }
    Ok(if reports.iter().all(Report::ok) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The programs that each guest runs, and what cargo built for them.
fn what_to_run(options: &Options) -> Result<(Built, Vec<Program>)> {
    if options.bench {
        let (built, program) = suite::bench()?;
        return Ok((built, vec![program]));
    }
    let built = build::tests(&PACKAGES)?;
    let mut programs = Vec::new();
    let unwanted = if options.full { Run::Short } else { Run::Full };
    let wanted = |suite: &&Suite| match &options.only {
        Some(only) if SUITES.iter().any(|suite| suite.name == only) => suite.name == only,
        Some(only) => suite.name.contains(only.as_str()),
        None => suite.run != unwanted,
    };
    match &options.command {
        Some(line) => programs.push(suite::command(line)),
        None => {
            for suite in SUITES.iter().filter(wanted) {
                if suite.name == PAIR && options.names.len() != 2 {
                    println!("left out: {PAIR}, which takes two guests");
                    continue;
                }
                programs.push(suite.program(&built)?);
            }
            ensure!(!programs.is_empty(), "no suite has such a name: {:?}", options.only);
        }
    }
    if let Some(test) = &options.test {
        for program in &mut programs {
            // The harness runs what matches any of its filters; a suite's own ones would add to this.
            program.arguments.retain(|argument| argument.starts_with("--"));
            program.arguments.push(test.clone());
        }
    }
    Ok((built, vec![programs; options.repeat].concat()))
}

/// Writes the table of what runs where.
fn write_support(names: &[String]) -> Result<ExitCode> {
    let mut reports = Vec::new();
    for name in names {
        let path = workspace().join("target/vm").join(format!("{name}.json"));
        let json =
            fs::read(&path).with_context(|| format!("read {}; make test-vm FULL=1 writes it", path.display()))?;
        reports.push(serde_json::from_slice(&json).with_context(|| format!("understand {}", path.display()))?);
    }
    let page = workspace().join("docs/support.md");
    fs::write(&page, support::page(&reports)).with_context(|| format!("write {}", page.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Finds a kernel, and packs what its guest needs.
fn prepare(options: &Options, name: &str, built: &Built, programs: &[Program]) -> Result<(Kernel, Archive)> {
    let kernel = Kernel::find(&options.kernels.join(name), name)?;
    let mut image = Image::new()?;
    for path in &built.programs {
        image.program(path)?;
    }
    for program in programs.iter().filter(|_| options.command.is_none()) {
        image.program(&program.path)?;
    }
    image.file(&workspace().join("docs/shroud.example.yaml"))?;
    let archive = image.finish(&kernel, &MODULES, programs)?;
    Ok((kernel, archive))
}

/// Boots a guest, follows it to its end, and keeps what it said.
fn follow(name: &str, (kernel, archive): (Kernel, Archive), wire: &Wire, log: &Path, within: u64) -> Result<Report> {
    println!(
        "{name}: booting Linux {}, all it says goes to {}",
        kernel.release,
        log.display()
    );
    let patience = Patience {
        total: Duration::from_secs(within),
        // A test says nothing until it has ended, and the longest take minutes.
        silence: Duration::from_secs(600),
    };
    let report = guest::run(&kernel, &archive, wire, log, patience)?;
    let result = log.with_extension("json");
    let json = serde_json::to_vec_pretty(&report).context("write the report")?;
    fs::write(&result, json).with_context(|| format!("write {}", result.display()))?;
    for failure in &report.failures {
        println!("{name}: {failure}");
    }
    Ok(report)
}
