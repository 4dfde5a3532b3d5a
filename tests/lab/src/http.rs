//! Asks an agent over HTTP, as a probe or a scraper on the node would.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;

/// Where an agent answers unless told otherwise.
pub const PORT: u16 = 21320;

/// Longer than an agent takes for any answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status, e.g. 200.
    pub code: u16,
    /// What follows its head.
    pub body: String,
}

/// Asks the loopback address of a namespace for a path, e.g. `/livez`. No answer is an error.
pub fn get(netns: &Netns, path: &str) -> Result<Answer> {
    let text = netns.run(|| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).context("connect to the agent's port")?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .context("bound the wait for an answer")?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").with_context(|| format!("ask for {path}"))?;
        let mut text = String::new();
        stream
            .read_to_string(&mut text)
            .with_context(|| format!("read the answer to {path}"))?;
        Ok(text)
    })?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("no head: {text:?}"))?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(Answer {
        code: code.with_context(|| format!("no status: {head:?}"))?,
        body: body.to_owned(),
    })
}

/// The samples of a Prometheus text, each under its name and labels as they are written.
pub fn samples(text: &str) -> Result<BTreeMap<String, f64>> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').with_context(|| format!("no value: {line:?}"))?;
            let value = value.parse().with_context(|| format!("no number: {line:?}"))?;
            Ok((series.to_owned(), value))
        })
        .collect()
}
