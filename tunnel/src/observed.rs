//! What the encrypted device is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shroud_model::{Prefix, PresharedKey, PublicKey};

use crate::Backend;

/// The device as it was at one moment.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The moment.
    pub at: SystemTime,
    /// The device, or `None` when there is none, or none that works.
    pub device: Option<Device>,
}

/// A WireGuard device.
#[derive(Debug, Clone)]
pub struct Device {
    /// Who does the encryption.
    pub backend: Backend,
    /// The public key that belongs to its private key, or `None` when it has none.
    pub public_key: Option<PublicKey>,
    /// The UDP port it listens on, 0 when it has none yet.
    pub listen_port: u16,
    /// The mark its own packets carry, 0 when none.
    pub mark: u32,
    /// Its peers.
    pub peers: BTreeMap<PublicKey, ObservedPeer>,
}

/// A peer on a device.
#[derive(Clone, Default)]
pub struct ObservedPeer {
    /// Where it was last heard from, or where it was said to be.
    pub endpoint: Option<SocketAddr>,
    /// What it may send, and what is sent to it.
    pub allowed_ips: BTreeSet<Prefix>,
    /// How often something is sent at least.
    pub keepalive: Option<Duration>,
    /// The last time the two agreed on a session key.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received from it, with WireGuard's own.
    pub rx_bytes: u64,
    /// Bytes sent to it, with WireGuard's own.
    pub tx_bytes: u64,
    pub(crate) preshared_key: Option<Arc<PresharedKey>>,
}

impl ObservedPeer {
    /// Whether a secret is mixed into the handshakes with it.
    pub fn has_preshared_key(&self) -> bool {
        self.preshared_key.is_some()
    }
}

impl fmt::Debug for ObservedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObservedPeer")
            .field("endpoint", &self.endpoint)
            .field("allowed_ips", &self.allowed_ips)
            .field("keepalive", &self.keepalive)
            .field("last_handshake", &self.last_handshake)
            .field("rx_bytes", &self.rx_bytes)
            .field("tx_bytes", &self.tx_bytes)
            .field("has_preshared_key", &self.has_preshared_key())
            .finish()
    }
}
