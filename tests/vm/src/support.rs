//! `docs/support.md`: what the matrix scenarios found out on each kernel, as a table.

use std::fmt::Write as _;

use crate::guest::Report;

/// The columns: what follows the mode in a scenario's name, and what the table calls it.
const COLUMNS: [(&str, &str); 5] = [
    ("v4_over_v4", "v4 over v4"),
    ("v4_over_v6", "v4 over v6"),
    ("v6_over_v4", "v6 over v4"),
    ("v6_over_v6", "v6 over v6"),
    ("dual_over_dual", "both over both"),
];

/// The suites of the whole matrix, and what the table calls them.
const SUITES: [(&str, &str); 2] = [
    ("matrix, kernel WireGuard", "kernel"),
    ("matrix, userspace WireGuard", "userspace"),
];

/// The page, of the latest report of each kernel.
pub fn page(reports: &[Report]) -> String {
    let mut page = String::from(
        "# What runs where\n\n\
         Made by `make support` from the latest run of the matrix (part of `make test-vm FULL=1`); not written by hand.\n\n\
         Each cell is a scenario in `agent/tests/scenarios/matrix.rs`: nodes with agents, every kind of flow between their pods, every underlay\n\
         port captured. **yes** is: all arrived, nothing was seen in the clear, and with the gate off the same capture saw it. (Pods of a family\n\
         that the underlay lacks have no native way in the clear, so that those cells have no such twin.) Columns are pods over underlay.\n\n\
         | kernel | run on | WireGuard | mode |",
    );
    for (_, title) in COLUMNS {
        let _infallible = write!(page, " {title} |");
    }
    page.push_str("\n|---|---|---|---|");
    page.push_str(&"---|".repeat(COLUMNS.len()));
    page.push('\n');
    for report in reports {
        for (suite, backend) in SUITES {
            for mode in ["native", "vxlan", "geneve"] {
                let _infallible = write!(page, "| {} | {} | {backend} | {mode} |", report.release, report.date);
                for (cell, _) in COLUMNS {
                    let _infallible = write!(page, " {} |", outcome(report, suite, mode, cell));
                }
                page.push('\n');
            }
        }
    }
    page
}

/// A cell that was run more than once is only as good as its worst run.
fn outcome(report: &Report, suite: &str, mode: &str, cell: &str) -> &'static str {
    let name = format!("matrix::{mode}_{cell}");
    let ran = report.programs.iter().filter(|ran| ran.name == suite);
    let results: Vec<&str> = ran
        .flat_map(|ran| &ran.tests)
        .filter(|(test, result)| *test == name && result != "ignored")
        .map(|(_, result)| result.as_str())
        .collect();
    match results.as_slice() {
        [] => "not run",
        all if all.iter().all(|result| *result == "ok") => "yes",
        _ => "**no**",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Ran;

    #[test]
    fn what_failed_and_what_was_not_run_is_no_yes() {
        let test = |name: &str, result: &str| (format!("matrix::{name}"), result.to_owned());
        let report = Report {
            release: "6.12.1".into(),
            date: "2026-11-24".into(),
            programs: vec![Ran {
                name: "matrix, kernel WireGuard".into(),
                outcome: "exit code 101".into(),
                seconds: 1.0,
                tests: vec![
                    test("vxlan_v4_over_v4", "ok"),
                    test("vxlan_v4_over_v6", "FAILED"),
                    test("vxlan_v6_over_v4", "FAILED"),
                    test("vxlan_v6_over_v4", "ok"),
                    test("vxlan_v6_over_v6", "ignored"),
                ],
            }],
            failures: Vec::new(),
            seconds: 1.0,
        };

        let page = page(&[report]);

        let rows: Vec<&str> = page.lines().filter(|line| line.contains("6.12.1")).collect();
        assert_eq!(rows.len(), 6);
        assert_eq!(
            rows[1],
            "| 6.12.1 | 2026-11-24 | kernel | vxlan | yes | **no** | **no** | not run | not run |"
        );
        assert!(rows[0].ends_with("| native | not run | not run | not run | not run | not run |"));
    }
}
