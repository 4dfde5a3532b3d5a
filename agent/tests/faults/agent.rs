//! A: the agent dies, ends, is there twice, or breaks inside. The data plane must not notice.

use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use shroud_lab::{Agent, eventually};

use crate::field::{Field, ends, is_healthy};
use crate::held::agents;
use crate::row::{self, Row};
use crate::strace::{self, Failing, Step, signal};

/// How many times an agent is killed at a step before it may come up once.
const KILLS_IN_A_ROW: usize = 5;

/// How many steps the core row tries.
const SOME: usize = 6;

pub(crate) const ROWS: &[Row] = &[
    Row::new("A1/any-moment", "kill -9 of one agent, and of all", killed).core(),
    Row::new("A1/some", "kill -9 at some steps of a restart", killed_at_some_steps)
        .needs(row::strace)
        .core(),
    Row::new("A1/restart", "kill -9 at each step of a restart", killed_at_each_step).needs(row::strace),
    Row::new(
        "A1/rebuild",
        "kill -9 at each step of making all anew",
        killed_at_each_step_of_making_all_anew,
    )
    .needs(row::strace)
    .cuts_the_path(),
    Row::new("A2", "SIGTERM to one agent, and to all", asked_to_end).core(),
    Row::new("A4", "two agents on one node", there_twice),
    Row::new("A5", "a panic in each thread", panicking).needs(row::strace),
];

fn killed(field: &mut Field) -> Result<()> {
    for names in [&["a"][..], &["a", "b", "c"]] {
        field.at_any_moment();
        field.changes_nothing(|field| {
            for name in names {
                field.agent(name).kill()?;
            }
            field.lasts(3);
            come_back(field, names)
        })?;
    }
    Ok(())
}

/// Starts these agents, which has to be enough to heal.
fn come_back(field: &mut Field, names: &[&str]) -> Result<()> {
    field.fault();
    for name in names {
        field.agent(name).restart()?;
    }
    field.heals()
}

fn killed_at_some_steps(field: &mut Field) -> Result<()> {
    let mut steps = steps_of(field, &|_| Ok(()))?;
    while steps.len() > SOME {
        let index = field.chance.below(steps.len() as u64);
        steps.remove(usize::try_from(index)?);
    }
    field.changes_nothing(|field| killed_at(field, &steps, &|_| Ok(())))
}

fn killed_at_each_step(field: &mut Field) -> Result<()> {
    let steps = steps_of(field, &|_| Ok(()))?;
    field.changes_nothing(|field| killed_at(field, &steps, &|_| Ok(())))
}

fn killed_at_each_step_of_making_all_anew(field: &mut Field) -> Result<()> {
    let steps = steps_of(field, &undone)?;
    killed_at(field, &steps, &undone)
}

/// Takes away all that an agent has made and that is not what keeps packets from leaving in the clear: the device with its peers and
/// addresses, the routes.
fn undone(field: &Field) -> Result<()> {
    let node = field.node("a");
    let netns = &node.host.netns;
    // What is away already is away.
    netns.exec("ip", &["link", "delete", &node.device])?;
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} route flush proto 83"))?;
    }
    Ok(())
}

/// The steps of an agent from its start until it is well.
fn steps_of(field: &mut Field, before: &dyn Fn(&Field) -> Result<()>) -> Result<Vec<Step>> {
    let node = field.node("a");
    let log = node.folder.join("steps");
    field.agent("a").kill()?;
    before(field)?;
    let options = field.options_of(&node);
    *field.agent("a") = start_by(field, &strace::noting(&log))?;
    field.says("a", "it is well", is_healthy)?;
    end(field)?;
    field.fault();
    *field.agent("a") = Agent::start(&node, &options)?;
    field.heals()?;
    let steps = strace::steps(&log)?;
    println!("    {} steps: {}", steps.len(), strace::summary(&steps));
    Ok(steps)
}

/// Starts a's agent by `strace`.
fn start_by(field: &Field, words: &[String]) -> Result<Agent> {
    let node = field.node("a");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Agent::start_by(&node, &field.options_of(&node), &words)
}

/// Kills a's agent where it runs by `strace`, which then ends too.
fn end(field: &mut Field) -> Result<()> {
    for pid in agents(&field.node("a")) {
        signal(pid, Signal::KILL)?;
    }
    let agent = field.agent("a");
    eventually("strace ends with its program", Duration::from_secs(5), || {
        match agent.exited() {
            Ok(Some(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
}

/// Kills a's agent at each of these steps, a few times in a row, and lets it come up in between.
fn killed_at(field: &mut Field, steps: &[Step], before: &dyn Fn(&Field) -> Result<()>) -> Result<()> {
    let node = field.node("a");
    let mut missed = Vec::new();
    for row in steps.chunks(KILLS_IN_A_ROW) {
        field.agent("a").kill()?;
        for step in row {
            before(field)?;
            *field.agent("a") = start_by(field, &strace::killing(step))?;
            let agent = field.agent("a");
            let killed = eventually("it is killed", Duration::from_secs(6), || match agent.exited() {
                Ok(Some(_)) => Ok(()),
                other => Err(format!("{other:?}")),
            });
            if killed.is_err() {
                // A run may have fewer steps than the one that was counted.
                missed.push(step);
                end(field)?;
            }
        }
        field.fault();
        let options = field.options_of(&node);
        *field.agent("a") = Agent::start(&node, &options)?;
        field.heals()?;
    }
    ensure!(
        missed.len() * 4 <= steps.len(),
        "{} of {} steps were never reached: {missed:?}",
        missed.len(),
        steps.len()
    );
    Ok(())
}

fn asked_to_end(field: &mut Field) -> Result<()> {
    for names in [&["a"][..], &["a", "b", "c"]] {
        field.at_any_moment();
        for name in names {
            let exit = field.agent(name).terminate(Duration::from_secs(5))?;
            ensure!(exit.success(), "the agent of {name} ended with {exit}");
        }
        field.changes_nothing(|field| {
            field.lasts(5);
            field.datagrams_pass()?;
            come_back(field, names)
        })?;
    }
    Ok(())
}

/// As in a rolling update: the second waits until the first has ended, and meanwhile does nothing.
fn there_twice(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    let options = field.options_of(&node);
    let mut second = Agent::start(&node, &options)?;
    eventually("the second says that it waits", Duration::from_secs(10), || {
        let log = node.log_tail(20);
        if log.contains("another agent works on this node") {
            Ok(())
        } else {
            Err(log)
        }
    })?;
    let first = field.status("a")?;
    field.lasts(5);
    let later = field.status("a")?;
    ensure!(
        later.pass.number > first.pass.number && later.pass.changes == 0,
        "the first agent does not work on in peace: {:?}",
        later.pass
    );
    ensure!(
        second.exited()?.is_none(),
        "the second agent ended:\n{}",
        node.log_tail(20)
    );

    field.changes_nothing(|field| {
        field.agent("a").kill()?;
        field.fault();
        *field.agent("a") = second;
        field.heals()
    })
}

/// A broken epoll makes tokio panic in whichever thread waits for it. The agent ends as a whole: what is half alive nobody restarts.
fn panicking(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    for thread in ["shroud", "http", "reconcile"] {
        field.at_any_moment();
        let before = panics(&node.log())?;
        let failing = Failing::start(field.agent("a").pid(), thread, "epoll_wait", "error=EBADF:when=1")?;
        let code = ends(field.agent("a"))?;
        drop(failing);

        ensure!(code != 0, "after a panic in {thread} the agent ended with success");
        ensure!(
            panics(&node.log())? > before,
            "nothing panicked in {thread}:\n{}",
            node.log_tail(20)
        );
        field.changes_nothing(|field| {
            field.lasts(2);
            field.fault();
            field.agent("a").restart()?;
            field.heals()
        })?;
    }
    Ok(())
}

fn panics(log: &std::path::Path) -> Result<usize> {
    Ok(std::fs::read_to_string(log)?.matches("panicked at").count())
}
