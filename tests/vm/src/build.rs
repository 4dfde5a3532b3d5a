//! Builds the workspace's tests and benchmarks, and knows which came from which source file.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// The folder of the workspace.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// What cargo built.
#[derive(Clone, Debug, Default)]
pub struct Built {
    /// Test binaries by the path of their source file in the workspace, e.g. `agent/tests/scenarios/main.rs`.
    pub tests: BTreeMap<String, Artifact>,
    /// Ordinary programs; tests know them by their path, so they must lie at the same path in the guest.
    pub programs: Vec<PathBuf>,
}

/// A test binary.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// The executable.
    pub path: PathBuf,
    /// The folder in which cargo would run it.
    pub folder: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    src_path: PathBuf,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds the tests of these packages as `cargo test` would.
///
/// # Errors
/// When cargo fails; it has said why on standard error.
pub fn tests(packages: &[&str]) -> Result<Built> {
    let packages = packages.iter().flat_map(|package| ["--package", package]);
    build(["test", "--no-run"].into_iter().chain(packages))
}

/// Builds a benchmark as `cargo bench` would, and the programs of another package that it starts.
///
/// # Errors
/// When cargo fails; it has said why on standard error.
pub fn bench(package: &str, bench: &str, starts: &str) -> Result<Built> {
    let mut built = build(["bench", "--no-run", "--package", package, "--bench", bench].into_iter())?;
    let programs = build(["build", "--release", "--package", starts].into_iter())?;
    built.programs.extend(programs.programs);
    Ok(built)
}

fn build<'a>(what: impl Iterator<Item = &'a str>) -> Result<Built> {
    let workspace = workspace();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&workspace).args(what);
    cargo.args(["--quiet", "--locked", "--message-format=json-render-diagnostics"]);
    let output = cargo.stderr(Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "{cargo:?}: {}", output.status);

    let mut built = Built::default();
    for line in output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let message: Message = serde_json::from_slice(line).context("read what cargo says")?;
        let (Some(path), Some(manifest), Some(target), Some(profile)) = (
            message.executable,
            message.manifest_path,
            message.target,
            message.profile,
        ) else {
            continue;
        };
        if profile.test {
            let source = target.src_path.strip_prefix(&workspace).unwrap_or(&target.src_path);
            let folder = manifest.parent().unwrap_or(&workspace).to_owned();
            built
                .tests
                .insert(source.display().to_string(), Artifact { path, folder });
        } else {
            built.programs.push(path);
        }
    }
    Ok(built)
}
