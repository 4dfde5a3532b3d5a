//! The status socket: who may ask, and how the answer looks.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use shroud_lab::agent::socket;

use crate::mesh::{Mesh, SHROUD};

/// Somebody who is neither root nor the agent's user.
const NOBODY: u32 = 65_534;

#[test]
fn only_root_and_the_agents_user_are_answered() -> Result<()> {
    let mesh = Mesh::healthy("socket", 2)?;
    let path = socket(mesh.lab.node("a"));
    let mode = |path: &std::path::Path| Ok::<_, std::io::Error>(std::fs::metadata(path)?.permissions().mode() & 0o777);
    let folder = path.parent().expect("the socket is in a folder");
    // The program itself must be one that anybody may run.
    let program = tempfile::Builder::new().prefix("shroud-").tempdir_in("/run")?;
    std::fs::set_permissions(program.path(), PermissionsExt::from_mode(0o755))?;
    let copy = program.path().join("shroud");
    // Not copied by this process: a test beside this one that starts a program meanwhile would hold the copy open for writing.
    let copied = Command::new("cp").arg(SHROUD).arg(&copy).status()?;
    ensure!(copied.success(), "cannot copy {SHROUD}");
    std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755))?;
    let ask = |user: u32| {
        Command::new(&copy)
            .args(["status", "--socket"])
            .arg(&path)
            .uid(user)
            .gid(user)
            .output()
    };

    let closed = (mode(folder)?, mode(&path)?);
    let outside = ask(NOBODY)?;
    // Somebody opens what was closed: the agent still looks at who asks.
    for above in folder.ancestors().take(2) {
        std::fs::set_permissions(above, PermissionsExt::from_mode(0o755))?;
    }
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666))?;
    let inside = ask(NOBODY)?;
    let root = ask(0)?;

    ensure!(
        closed == (0o700, 0o600),
        "the folder and the socket are {:o} and {:o}",
        closed.0,
        closed.1
    );
    ensure!(outside.status.code() == Some(3), "nobody came through: {outside:?}");
    ensure!(inside.status.code() == Some(1), "nobody was answered: {inside:?}");
    let said = String::from_utf8_lossy(&inside.stderr).into_owned();
    ensure!(said.contains("only root and the agent's own user may ask"), "{said}");
    ensure!(root.status.success(), "root was not answered: {root:?}");
    Ok(())
}

#[test]
fn colours_are_only_for_those_who_want_them() -> Result<()> {
    let mesh = Mesh::healthy("colour", 2)?;
    let path = socket(mesh.lab.node("a"));
    let status = |variables: &[(&str, &str)]| -> Result<Output> {
        let mut command = Command::new(SHROUD);
        command.args(["status", "--socket"]).arg(&path);
        command
            .env_remove("NO_COLOR")
            .env_remove("CLICOLOR_FORCE")
            .envs(variables.iter().copied());
        Ok(command.output()?)
    };
    let coloured = |output: &Output| output.stdout.contains(&0x1b);

    ensure!(
        coloured(&status(&[("CLICOLOR_FORCE", "1")])?),
        "no colour at all: this test would see nothing"
    );
    ensure!(
        !coloured(&status(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")])?),
        "NO_COLOR is not honoured"
    );
    ensure!(!coloured(&status(&[])?), "a pipe gets colours");
    Ok(())
}
