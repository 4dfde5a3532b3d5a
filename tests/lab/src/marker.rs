//! Random markers that ride in every payload, so that a single plaintext byte run on the wire can be recognised.
//!
//! A marker is 32 bytes: a tag of 8 that all markers of a lab share (one search finds them all), then 24 of its own. A
//! payload is the marker over and over, so each piece of 39 bytes or more, wherever it is cut, holds a whole tag.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

/// Length of a marker in bytes.
pub const LENGTH: usize = 32;

/// Length of the tag that all markers of a lab begin with, in bytes.
pub const TAG: usize = 8;

/// The markers of one lab and the flows they were given to.
#[derive(Clone, Debug)]
pub struct Markers {
    tag: [u8; TAG],
    flows: Arc<Mutex<BTreeMap<[u8; LENGTH], String>>>,
}

impl Markers {
    /// Makes an empty set with a random tag.
    pub fn new() -> Result<Markers> {
        Ok(Markers {
            tag: random()?,
            flows: Arc::default(),
        })
    }

    /// The tag every marker begins with.
    pub fn tag(&self) -> [u8; TAG] {
        self.tag
    }

    /// Makes a marker and remembers whose it is.
    pub fn issue(&self, flow: &str) -> Result<[u8; LENGTH]> {
        let mut marker: [u8; LENGTH] = random()?;
        marker[..TAG].copy_from_slice(&self.tag);
        self.flows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(marker, flow.to_owned());
        Ok(marker)
    }

    /// The flow whose marker `bytes` begin with.
    pub fn flow(&self, bytes: &[u8]) -> Option<String> {
        self.flows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(bytes.get(..LENGTH)?)
            .cloned()
    }
}

/// The marker over and over, `length` bytes of it.
pub fn payload(marker: &[u8; LENGTH], length: usize) -> Vec<u8> {
    marker.iter().copied().cycle().take(length).collect()
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes)
}
