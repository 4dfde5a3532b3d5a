//! What can go wrong, each told with what was tried, on what, and what helps. No text here ever holds a secret.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the encrypted device could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name is none a device can have.
    #[error("device {0:?}: not a device name; use 1 to 15 letters, digits, '-', '_' or '.'")]
    InvalidName(String),
    /// The control socket could not be used.
    #[error("{operation} through {}: {source}", path.display())]
    Socket {
        /// What was tried.
        operation: String,
        /// The socket.
        path: PathBuf,
        /// What the system answers.
        source: io::Error,
    },
    /// Somebody holds the control socket and says nothing.
    #[error("{operation}: no answer on {} within {} s; the data plane may hang, it is restarted when this happens {RESTART_AFTER} times in a row",
        path.display(), waited.as_secs_f32())]
    NotAnswering {
        /// What was tried.
        operation: String,
        /// The socket.
        path: PathBuf,
        /// How long.
        waited: Duration,
    },
    /// The answer breaks the protocol.
    #[error("{operation}: the answer on {} is not WireGuard's configuration protocol ({what}); is that socket's owner `shroud wire`?", path.display())]
    Garbled {
        /// What was tried.
        operation: String,
        /// The socket.
        path: PathBuf,
        /// What is wrong, without the text itself, which may be secret.
        what: &'static str,
    },
    /// The device refused.
    #[error("{operation} on {device}: {source}")]
    Refused {
        /// What was tried.
        operation: String,
        /// The device.
        device: String,
        /// Its error number.
        source: io::Error,
    },
    /// The device does not exist.
    #[error("{operation}: no device {device}; the next pass makes it")]
    NoDevice {
        /// What was tried.
        operation: String,
        /// The device.
        device: String,
    },
    /// There is a device of that name, and it is not WireGuard's.
    #[error(
        "create kernel device {device}: there is a device of that name that is not WireGuard's; delete it (ip link del {device}) or name another"
    )]
    NotWireGuard {
        /// The device.
        device: String,
    },
    /// The data plane cannot have its device.
    #[error("start the data plane of {device}: a device of that name exists and is another process's, or no TUN device; \
        delete it (ip link del {device}) or name another; the log {} says which", log.display())]
    DeviceTaken {
        /// The device.
        device: String,
        /// The data plane's log.
        log: PathBuf,
    },
    /// Another program has the UDP port.
    #[error(
        "set the listen port of {device}: another program has UDP port {port}; \
        stop that (ss -ulpn shows it), or choose another port for this node"
    )]
    PortTaken {
        /// The device.
        device: String,
        /// The port.
        port: u16,
    },
    /// The kernel backend is wanted, and the kernel cannot.
    #[error("backend \"kernel\": {0}; load or install the wireguard module, or use backend \"auto\" or \"userspace\"")]
    NoKernelWireGuard(String),
    /// The userspace backend is wanted, and there is no TUN.
    #[error("backend \"userspace\": /dev/net/tun: {0}; load the tun module, and let the container have the device")]
    NoTun(#[source] io::Error),
    /// The data plane could not be started.
    #[error("start {}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system answers.
        source: io::Error,
    },
    /// The data plane ended while it was starting.
    #[error("start {}: it ended at once ({status}); its log {} says why", program.display(), log.display())]
    Ended {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: String,
        /// Its log.
        log: PathBuf,
    },
    /// The data plane was started and does not answer.
    #[error("start {}: no answer on {} within {} s; its log {} may say why", program.display(), path.display(), waited.as_secs(), log.display())]
    Silent {
        /// The program.
        program: PathBuf,
        /// The socket.
        path: PathBuf,
        /// How long.
        waited: Duration,
        /// Its log.
        log: PathBuf,
    },
    /// A process holds the control socket, and nothing proves that it is ours to end.
    #[error("end the data plane of {device}: process {pid} holds its socket, but {because}; end it yourself")]
    NotOurs {
        /// The device.
        device: String,
        /// The process.
        pid: i32,
        /// What speaks against it.
        because: String,
    },
    /// A file or process could not be handled.
    #[error("{operation}: {source}")]
    System {
        /// What was tried, and on what.
        operation: String,
        /// What the system answers.
        source: io::Error,
    },
    /// The private key does not belong to the public key.
    #[error("set the key of {device}: the private key does not belong to public key {public_key}; nothing was changed")]
    KeyMismatch {
        /// The device.
        device: String,
        /// The public key, which is no secret.
        public_key: shroud_model::PublicKey,
    },
    /// An all-zero pre-shared key is WireGuard's way to say "none".
    #[error(
        "set the preshared key of peer {peer}: it is all zeroes, which WireGuard takes for none; make a new one (wg genpsk)"
    )]
    ZeroPresharedKey {
        /// The peer.
        peer: shroud_model::PublicKey,
    },
    /// The change is about a peer that is not desired: it was made from another plan.
    #[error("change peer {peer}: the plan has no such peer; the change is from another plan")]
    Stale {
        /// The peer.
        peer: shroud_model::PublicKey,
    },
}

/// How many silent answers in a row are taken for a hang.
pub(crate) const RESTART_AFTER: u32 = 3;

impl Error {
    pub(crate) fn system(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            operation: operation.into(),
            source: source.into(),
        }
    }
}
