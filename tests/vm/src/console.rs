//! What the lines on a guest's serial lines mean.

use crate::program::{FAILURE, SUCCESS};

/// Which serial line a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The kernel's messages.
    Kernel,
    /// Pid 1 and the programs.
    Programs,
}

/// A line with a meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A program begins.
    Begin(String),
    /// A program ended well; its name and how long it took, in words.
    Ok(String),
    /// A program failed; its name and why.
    Failed(String),
    /// A test of a program and what became of it: `ok`, `FAILED` or `ignored`.
    Test {
        /// Its name.
        name: String,
        /// What became of it.
        result: String,
    },
    /// What a benchmark found, as JSON.
    Figures,
    /// The kernel is not well.
    Alarm,
    /// The guest came to its end; whether all was well.
    End(bool),
}

/// Beginnings of what a sound kernel never says. A stall that the emulator's slowness can cause is not among them: if it is real, the
/// guest falls silent.
const ALARMS: [&str; 10] = [
    "Kernel panic",
    "BUG:",
    "WARNING:",
    "Oops:",
    "general protection fault",
    "kernel BUG at",
    "soft lockup",
    "Out of memory:",
    "blocked for more than",
    "unregister_netdevice: waiting for",
];

/// The meaning of a line, if it has one.
pub fn event(source: Source, line: &str) -> Option<Event> {
    match source {
        Source::Kernel => ALARMS.iter().any(|alarm| line.contains(alarm)).then_some(Event::Alarm),
        Source::Programs => match line {
            SUCCESS => Some(Event::End(true)),
            FAILURE => Some(Event::End(false)),
            _ => of_program(line),
        },
    }
}

fn of_program(line: &str) -> Option<Event> {
    let after = |beginning: &str| line.strip_prefix(beginning).map(str::to_owned);
    if let Some(event) = after("vm: begin ").map(Event::Begin) {
        return Some(event);
    }
    if let Some(event) = after("vm: ok ").map(Event::Ok) {
        return Some(event);
    }
    if let Some(event) = after("vm: failed ").map(Event::Failed) {
        return Some(event);
    }
    if line.starts_with("{\"bench\":") {
        return Some(Event::Figures);
    }
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    // With one thread the harness begins the line before the test; what the test prints comes in between.
    let result = result.split([',', ' ']).next().unwrap_or(result);
    ["ok", "FAILED", "ignored"].contains(&result).then(|| Event::Test {
        name: name.trim_end_matches(" - should panic").to_owned(),
        result: result.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sick_kernel_is_recognised_and_a_well_one_is_not() {
        for line in [
            "[   12.3] Kernel panic - not syncing: Attempted to kill init!",
            "[   12.3] BUG: unable to handle page fault for address: 0000",
            "[   12.3] WARNING: CPU: 1 PID: 77 at net/core/dev.c:1 unregister_netdevice+0x1/0x2",
            "[   12.3] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "[   12.3] INFO: task ip:99 blocked for more than 120 seconds.",
            "[   12.3] unregister_netdevice: waiting for lo to become free. Usage count = 2",
        ] {
            assert_eq!(event(Source::Kernel, line), Some(Event::Alarm), "{line}");
        }
        assert_eq!(
            event(Source::Kernel, "[    1.0] wireguard: WireGuard 1.0.0 loaded."),
            None
        );
    }

    #[test]
    fn what_a_test_prints_is_no_alarm() {
        assert_eq!(
            event(Source::Programs, "WARNING: this is about the test's own words"),
            None
        );
    }

    #[test]
    fn programs_and_tests_are_followed() {
        let test = |name: &str, result: &str| {
            Some(Event::Test {
                name: name.into(),
                result: result.into(),
            })
        };
        for (line, meaning) in [
            ("vm: begin gate", Some(Event::Begin("gate".into()))),
            ("vm: ok gate 12.3 s", Some(Event::Ok("gate 12.3 s".into()))),
            (
                "vm: failed gate: exit status 101",
                Some(Event::Failed("gate: exit status 101".into())),
            ),
            ("vm: success", Some(Event::End(true))),
            ("vm: failure", Some(Event::End(false))),
            ("test faults::a_killed_wire ... ok", test("faults::a_killed_wire", "ok")),
            ("test a ... ignored, needs a whole night", test("a", "ignored")),
            ("test a ... FAILED", test("a", "FAILED")),
            ("test result: ok. 3 passed; 0 failed", None),
            ("vm: successful", None),
        ] {
            assert_eq!(event(Source::Programs, line), meaning, "{line}");
        }
    }
}
