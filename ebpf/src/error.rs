//! What can go wrong with the gate.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::pin::PinError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;
use aya::programs::tc::TcError;
use thiserror::Error;

use crate::{Hook, Mechanism};

/// A cause with its own causes. What went wrong is usually said by the innermost one ("no such device"), and some of the outer ones keep
/// it to themselves.
fn chain(mut error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    while let Some(source) = error.source() {
        let cause = source.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        error = source;
    }
    text
}

/// How many lines of the verifier's log are told: the last instructions, and why they are not allowed.
const VERIFIER_LINES: usize = 6;

/// Why a program is refused. The verifier tells the whole story, often of thousands of lines; its end is the reason.
fn refusal(source: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = source else {
        return chain(source);
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    let end = &lines[lines.len().saturating_sub(VERIFIER_LINES)..];
    format!("{io_error}; the verifier's last words: {}", end.join(" | "))
}

/// Why something could not be done to the gate.
#[derive(Debug, Error)]
pub enum Error {
    /// The pin directory would not survive this process.
    #[error(
        "keep the gate under {path}: not on a BPF file system; mount one there (mount -t bpf bpf DIR) or name a pin directory that is on one"
    )]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
    },
    /// A file or directory on the BPF file system.
    #[error("{operation} {path}: {}", chain(source))]
    Path {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object is refused, most likely by the kernel's verifier, or for want of CAP_BPF and CAP_NET_ADMIN.
    #[error(
        "load the gate's BPF object: {}; it needs Linux 6.1 or later, CAP_BPF and CAP_NET_ADMIN",
        chain(source)
    )]
    Load {
        /// Why not.
        source: EbpfError,
    },
    /// The object lacks something it should have: it does not belong to this build.
    #[error("find {name} in the gate's BPF object: it is not there; rebuild the object with ebpf/build.sh")]
    Object {
        /// The program or map.
        name: &'static str,
    },
    /// A program.
    #[error("{operation} program {name}: {}", refusal(source))]
    Program {
        /// What was attempted.
        operation: &'static str,
        /// The program.
        name: &'static str,
        /// Why not.
        source: ProgramError,
    },
    /// A map.
    #[error("{operation} map {name}: {}", chain(source))]
    Map {
        /// What was attempted.
        operation: &'static str,
        /// The map.
        name: &'static str,
        /// Why not.
        source: MapError,
    },
    /// A pin.
    #[error("pin {path}: {}", chain(source))]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: PinError,
    },
    /// A pinned link.
    #[error("{operation} link {path}: {}", chain(source))]
    Link {
        /// What was attempted.
        operation: &'static str,
        /// Where it is pinned.
        path: PathBuf,
        /// Why not.
        source: LinkError,
    },
    /// The device is gone.
    #[error("attach to {device}: there is no such device")]
    NoDevice {
        /// Its name.
        device: String,
    },
    /// The device carries something before the IP header that the gate cannot read.
    #[error(
        "attach to {device}: the gate reads Ethernet and bare IP, this device has link type {kind}; leave it out of the uplinks"
    )]
    LinkType {
        /// Its name.
        device: String,
        /// `ARPHRD_` name or number.
        kind: String,
    },
    /// Attaching or detaching.
    #[error("{operation} {device} {hook} ({mechanism}): {}", chain(source))]
    Attachment {
        /// What was attempted.
        operation: &'static str,
        /// The device.
        device: String,
        /// Where on the device.
        hook: Hook,
        /// By which means.
        mechanism: Mechanism,
        /// Why not.
        source: ProgramError,
    },
    /// The queueing discipline that clsact filters hang on.
    #[error("add the clsact qdisc to {device}: {}", chain(source))]
    Qdisc {
        /// The device.
        device: String,
        /// Why not.
        source: TcError,
    },
    /// Netlink.
    #[error("{operation} through netlink: {}", chain(source))]
    Netlink {
        /// What was attempted.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// More ports than the maps hold.
    #[error("put {given} {what} ports into the gate's table: give at most {most}, none of them 0")]
    Ports {
        /// VXLAN or Geneve.
        what: &'static str,
        /// How many were given.
        given: usize,
        /// How many fit.
        most: usize,
    },
    /// More open ports than the maps hold.
    #[error("put {given} open ports into the gate's table: give at most {most}, none of them 0")]
    OpenPorts {
        /// How many were given.
        given: usize,
        /// How many fit.
        most: usize,
    },
    /// A VNI that is none.
    #[error("put VNI {vni} into the gate's table: give one below 16777216")]
    Vni {
        /// What was given.
        vni: u32,
    },
}
