//! Frames of a port as they are, for a test that sends them once more or changes them.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::packet_socket::{self, PacketSocket};
use super::{Direction, links};
use crate::topology::Lab;

/// Room for frames that nobody has read yet, in bytes.
const ROOM: usize = 4 << 20;

/// Reads the frames of one underlay port.
pub struct Tap(PacketSocket);

impl Tap {
    /// Begins to read a port, by its node's name.
    pub fn open(lab: &Lab, node: &str) -> Result<Tap> {
        let port = &lab.node(node).port;
        let index = links(&lab.underlay)?
            .remove(port)
            .with_context(|| format!("no bridge port {port}"))?
            .index;
        let socket = lab
            .underlay
            .run(|| PacketSocket::open(index, ROOM).with_context(|| format!("open a packet socket on {port}")))?;
        Ok(Tap(socket))
    }

    /// So many frames of this direction that are wanted, within this time.
    pub fn frames(
        &self,
        count: usize,
        direction: Direction,
        wanted: impl Fn(&[u8]) -> bool,
        within: Duration,
    ) -> Result<Vec<Vec<u8>>> {
        let mut buffer = packet_socket::buffer();
        let mut frames = Vec::new();
        let give_up = Instant::now() + within;
        while frames.len() < count {
            match self.0.read(&mut buffer) {
                Ok((frame, way)) if way == direction && wanted(frame) => frames.push(frame.to_vec()),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error).context("read a frame"),
            }
            if Instant::now() > give_up {
                bail!("{} of {count} frames within {within:?}", frames.len());
            }
        }
        Ok(frames)
    }
}
