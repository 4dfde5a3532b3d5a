//! What came of the rows: a line each as they end, a table of all, and one line for programs.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::row::Row;

/// What came of a row.
pub(crate) enum Outcome {
    /// It held.
    Passed(Figures),
    /// It did not, and why; without figures where it did not come to the fault.
    Failed(Option<Figures>, Vec<String>),
    /// This machine cannot run it, and why.
    Skipped(String),
}

/// What a row measured.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Bytes of captured frames in which a marker was found.
    pub(crate) plaintext_bytes: u64,
    /// Connections that broke, or did not speak again.
    pub(crate) lost: usize,
    /// The longest that an answer was waited for.
    pub(crate) stall: Duration,
    /// The longest from the end of a fault until all was well.
    pub(crate) heal: Duration,
}

/// All rows so far.
#[derive(Default)]
pub(crate) struct Table {
    lines: Vec<Line>,
}

struct Line {
    id: &'static str,
    title: &'static str,
    /// Whether stalls are the product's and not the fault's own.
    judges_stalls: bool,
    outcome: Outcome,
    took: Duration,
}

/// The line for programs.
#[derive(Serialize)]
struct Summary {
    rows: usize,
    passed: usize,
    failed: usize,
    skipped: usize,
    plaintext_bytes: u64,
    connections_lost: usize,
    longest_stall_ms: u128,
}

impl Table {
    /// Takes a row's outcome, and tells it.
    pub(crate) fn add(&mut self, row: &Row, outcome: Outcome, took: Duration) {
        // In the words of cargo's own tests, which tests/vm reads.
        match &outcome {
            Outcome::Passed(figures) => println!("test {} ... ok, {figures}", row.id),
            Outcome::Skipped(why) => println!("test {} ... ignored, {why}", row.id),
            Outcome::Failed(figures, why) => {
                let figures = figures.map_or_else(String::new, |figures| format!(", {figures}"));
                println!("test {} ... FAILED{figures}", row.id);
                for reason in why {
                    println!("    {}", reason.trim_end().replace('\n', "\n    "));
                }
            }
        }
        self.lines.push(Line {
            id: row.id,
            title: row.title,
            judges_stalls: row.stall.is_some(),
            outcome,
            took,
        });
    }

    fn count(&self, wanted: fn(&Outcome) -> bool) -> usize {
        self.lines.iter().filter(|line| wanted(&line.outcome)).count()
    }

    /// Rows that did not hold.
    pub(crate) fn failed(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Failed(..)))
    }

    /// The whole of it in one line. Stalls are those of rows whose fault leaves the path alone.
    pub(crate) fn json(&self) -> String {
        let figures = || {
            self.lines
                .iter()
                .filter_map(|line| Some((line, line.outcome.figures()?)))
        };
        let stall = figures()
            .filter(|(line, _)| line.judges_stalls)
            .map(|(_, figures)| figures.stall)
            .max();
        let summary = Summary {
            rows: self.lines.len(),
            passed: self.count(|outcome| matches!(outcome, Outcome::Passed(_))),
            failed: self.failed(),
            skipped: self.count(|outcome| matches!(outcome, Outcome::Skipped(_))),
            plaintext_bytes: figures().map(|(_, figures)| figures.plaintext_bytes).sum(),
            connections_lost: figures().map(|(_, figures)| figures.lost).sum(),
            longest_stall_ms: stall.unwrap_or_default().as_millis(),
        };
        serde_json::to_string(&summary).expect("numbers are JSON")
    }
}

impl Outcome {
    fn figures(&self) -> Option<Figures> {
        match self {
            Outcome::Passed(figures) => Some(*figures),
            Outcome::Failed(figures, _) => *figures,
            Outcome::Skipped(_) => None,
        }
    }

    fn word(&self) -> &str {
        match self {
            Outcome::Passed(_) => "ok",
            Outcome::Failed(..) => "FAILED",
            Outcome::Skipped(why) => why,
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} plaintext bytes, {} lost, longest stall {} ms, healed within {:.1} s",
            self.plaintext_bytes,
            self.lost,
            self.stall.as_millis(),
            self.heal.as_secs_f32()
        )
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:14} {:58} {:>9} {:>5} {:>9} {:>7} {:>6}  outcome",
            "row", "fault", "plaintext", "lost", "stall", "heal", "took"
        )?;
        for line in &self.lines {
            write!(f, "{:14} {:58} ", line.id, line.title)?;
            match line.outcome.figures() {
                Some(figures) => write!(
                    f,
                    "{:>9} {:>5} {:>6} ms {:>5.1} s ",
                    figures.plaintext_bytes,
                    figures.lost,
                    figures.stall.as_millis(),
                    figures.heal.as_secs_f32()
                )?,
                None => write!(f, "{:>9} {:>5} {:>9} {:>7} ", "-", "-", "-", "-")?,
            }
            writeln!(f, "{:>4.0} s  {}", line.took.as_secs_f32(), line.outcome.word())?;
        }
        Ok(())
    }
}
