//! The two promises as a fault suite: whatever goes wrong, no byte of a pod leaves in the clear, and no connection is lost.
//!
//! ```text
//!   pod a0   pod a1      pod b0   pod b1      pod c0   pod c1     200 connections between them: 20 carry much, 40 ask every 10 ms,
//!      \      /             \      /             \      /         140 are all but idle; every byte is compared at the other end
//!       node a               node b               node c          the real agents; then a fault, and its end
//!          |                    |                    |
//!     =================== underlay ====================           every port captured, every frame searched for the payloads' markers
//! ```
//!
//! Each row of the fault matrix is a function that makes something go wrong; `row` says what a row is, `field` is where it happens, and
//! `verdict` judges it. The rows are in files by their letter. `README.md` tells how to run them, and what is not here yet.

#![expect(
    clippy::disallowed_methods,
    reason = "tests run the product, and break the kernel's state through iproute2 on purpose"
)]

mod agent;
mod attack;
mod backend;
mod chance;
mod directory;
mod field;
mod forge;
mod hand;
mod held;
mod kernel;
mod many;
mod oracle;
mod peers;
mod row;
mod state;
mod strace;
mod table;
mod underlay;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::field::{Field, Size};
use crate::row::Row;
use crate::table::{Outcome, Table};

/// Makes things go wrong around three real agents, and counts what leaks and what breaks.
#[derive(Debug, Parser)]
#[command(name = "faults")]
struct Arguments {
    /// All rows, and not only the core ones.
    #[arg(long)]
    all: bool,
    /// Only these rows: an id (`C3`, all of that id; `C3/renamed`, that one), or a letter. More than one with commas.
    #[arg(long, value_delimiter = ',')]
    row: Vec<String>,
    /// What is chosen by chance is chosen the same way with the same seed [default: by the clock].
    #[arg(long)]
    seed: Option<u64>,
    /// Few and slow connections, for emulated machines.
    #[arg(long)]
    small: bool,
    /// Names the rows and runs none.
    #[arg(long)]
    list: bool,
    /// Only core rows whose id contains one of these, for `cargo test NAME`, which hands the name to every test.
    #[arg(hide = true)]
    filter: Vec<String>,
    /// For `cargo test`, too; rows run one by one.
    #[arg(long, hide = true)]
    test_threads: Option<u32>,
    /// As before; what rows say is always shown.
    #[arg(long, hide = true)]
    nocapture: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let rows = chosen(&arguments)?;
    if arguments.list {
        for row in rows {
            println!("{:14} {}", row.id, row.title);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let seed = arguments.seed.unwrap_or_else(chance::by_the_clock);
    let size = if arguments.small { Size::Small } else { Size::Full };
    println!("running {} rows with seed {seed}", rows.len());

    let mut table = Table::default();
    for row in rows {
        let begun = Instant::now();
        let outcome = match (row.needs)() {
            Err(why) => Outcome::Skipped(why),
            Ok(()) => run(row, size, seed),
        };
        table.add(row, outcome, begun.elapsed());
    }
    print!("{table}");
    println!("{}", table.json());
    Ok(if table.failed() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The rows that are asked for, in the order of the matrix.
fn chosen(arguments: &Arguments) -> Result<Vec<&'static Row>> {
    let all = [
        oracle::ROWS,
        agent::ROWS,
        directory::ROWS,
        kernel::ROWS,
        hand::ROWS,
        state::ROWS,
        attack::ROWS,
        forge::ROWS,
        underlay::ROWS,
        peers::ROWS,
        many::ROWS,
        backend::ROWS,
    ];
    let rows = all.into_iter().flatten();
    if arguments.row.is_empty() {
        let filter = &arguments.filter;
        let wanted = |row: &&Row| filter.is_empty() || filter.iter().any(|part| row.id.contains(part.as_str()));
        return Ok(rows.filter(wanted).filter(|row| arguments.all || row.core).collect());
    }
    let asked: Vec<&Row> = rows
        .filter(|row| arguments.row.iter().any(|name| row.is_called(name)))
        .collect();
    ensure!(
        !asked.is_empty(),
        "no row is called {:?}; --list names them",
        arguments.row
    );
    Ok(asked)
}

/// Builds what the row needs, lets it go wrong, and judges.
fn run(row: &Row, size: Size, seed: u64) -> Outcome {
    let mut field = match Field::build(row, size, seed) {
        Ok(field) => field,
        Err(error) => return Outcome::Failed(None, vec![format!("before the fault: {error:#}")]),
    };
    let ran = (row.run)(&mut field);
    field.judge(row, ran)
}
