//! J: thousands of nodes come and go beside those that talk.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::json;
use shroud_lab::Status;
use shroud_model::PublicKey;

use crate::field::Field;
use crate::row::{self, Row};

/// How many come at once.
const MANY: u32 = 5_000;

pub(crate) const ROWS: &[Row] = &[
    // Nobody answers at their addresses, and each is called every five seconds: that is part of the fault.
    Row::new("J3", "5,000 nodes come at once, and go", thousands)
        .needs(row::optimised)
        .stalls_at_most(4_000)
        .heals_within(60),
];

fn name(number: u32) -> String {
    format!("n{number:05}")
}

/// A node as it writes itself into the folder, somewhere behind the router, with pods of IPv6 alone: there are more prefixes of it.
fn record(number: u32) -> Result<String> {
    let mut key = [0x5a; 32];
    key[..4].copy_from_slice(&number.wrapping_mul(2_654_435_761).to_be_bytes());
    let key = PublicKey::from_bytes(key).map_err(|error| anyhow::anyhow!("{error}"))?;
    let [_, _, high, low] = number.to_be_bytes();
    let address = format!("172.20.{high}.{low}");
    let record = json!({
        "version": 1,
        "node": name(number),
        "addresses": [address],
        "podPrefixes": [format!("fd00:10:244:{:x}::/64", 0x1000 + number)],
        "announcement": {
            "version": 1, "publicKey": key.to_string(), "port": 51820, "endpoints": [format!("{address}:51820")],
            "epoch": 1, "backend": "userspace",
        },
    });
    Ok(record.to_string())
}

fn thousands(field: &mut Field) -> Result<()> {
    let folder = field.lab.directory();
    for number in 0..MANY {
        let path = folder.join(format!("{}.json", name(number)));
        fs::write(&path, record(number)?).with_context(|| format!("write {}", path.display()))?;
    }
    field.fault();
    let knows_all = |status: &Status| status.peers.len() == MANY as usize + 2 && status.pass.failures.is_empty();
    for name in ["a", "b", "c"] {
        field.says(name, "it has all as peers", knows_all)?;
    }
    field.datagrams_pass()?;
    field.lasts(5);
    for number in 0..MANY {
        fs::remove_file(folder.join(format!("{}.json", name(number)))).context("remove a record")?;
    }
    field.fault();
    field.heals()
}
