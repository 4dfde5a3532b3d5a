//! What the binary answers to people and scripts that have no agent.

use std::process::{Command, Output};

use anyhow::{Result, ensure};

use crate::mesh::SHROUD;

fn shroud(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(SHROUD).args(arguments).output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn an_agent_that_does_not_answer_is_exit_code_3() -> Result<()> {
    for subcommand in ["status", "peers", "gate"] {
        let output = shroud(&[subcommand, "--socket", "/nonexistent/shroud.sock"])?;

        ensure!(output.status.code() == Some(3), "{subcommand}: {output:?}");
        ensure!(
            text(&output.stderr).contains("no agent answers on /nonexistent/shroud.sock"),
            "{output:?}"
        );
    }
    Ok(())
}

#[test]
fn a_command_line_or_configuration_that_cannot_be_used_is_exit_code_2() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(
        file.path(),
        "podPrefixes: [10.1.0.0/24]\nprotected: [10.1.0.0/16]\ndirectory: { file: { path: /x } }\ngate: { mode: on }\n",
    )?;
    let path = file.path().display().to_string();

    ensure!(
        shroud(&["status", "--output", "html"])?.status.code() == Some(2),
        "an unknown format"
    );
    ensure!(
        shroud(&["explain", "here", "10.0.0.1"])?.status.code() == Some(2),
        "a source that is none"
    );
    for arguments in [
        vec!["agent", "--config", &path],
        vec!["config", "check", &path],
        vec!["cleanup", "--config", &path],
    ] {
        let output = shroud(&arguments)?;

        ensure!(output.status.code() == Some(2), "{arguments:?}: {output:?}");
        let said = text(&output.stderr);
        for part in [
            path.as_str(),
            "`gate.mode`",
            "\"on\"",
            "expected one of `enforce`, `audit`, `off`",
        ] {
            ensure!(said.contains(part), "{arguments:?} does not name {part}: {said}");
        }
    }
    Ok(())
}

#[test]
fn the_effective_configuration_is_printed_and_reads_back() -> Result<()> {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/shroud.example.yaml");
    let shown = shroud(&["config", "show", example])?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), &shown.stdout)?;
    let path = file.path().display().to_string();

    let again = shroud(&["config", "show", &path])?;

    ensure!(
        shown.status.success() && text(&shown.stdout).contains("listenPort: 51820"),
        "{shown:?}"
    );
    ensure!(again.stdout == shown.stdout, "{}", text(&again.stdout));
    ensure!(
        shroud(&["config", "check", &path])?.status.success(),
        "check refuses what show printed"
    );
    Ok(())
}

#[test]
fn completions_exist_for_every_shell_people_use() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let output = shroud(&["completions", shell])?;

        ensure!(
            output.status.success() && text(&output.stdout).contains("explain"),
            "{shell}: {output:?}"
        );
    }
    Ok(())
}
