//! What the encrypted device should be.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shroud_model::{Mark, Prefix, PresharedKey, PrivateKey, PublicKey};

/// Who does the encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// The kernel's WireGuard.
    Kernel,
    /// A `shroud wire` process behind a TUN device.
    Userspace,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        })
    }
}

/// The device and all its peers. A peer that is not in here is removed.
#[derive(Clone)]
pub struct Desired {
    /// The device's name.
    pub device: String,
    /// Who does the encryption.
    pub backend: Backend,
    /// This node's private key.
    pub private_key: Arc<PrivateKey>,
    /// The public key that belongs to it.
    pub public_key: PublicKey,
    /// The UDP port to listen on.
    pub listen_port: u16,
    /// The mark that the device's own packets carry, by which the gate lets them out. WireGuard sets the whole mark to the value.
    pub mark: Mark,
    /// The peers. This node's own key among them is passed over, as WireGuard does.
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// One peer.
#[derive(Clone, Default)]
pub struct Peer {
    /// Where it is to be found at first, or `None` when only it can find us.
    pub endpoint: Option<SocketAddr>,
    /// What it may send, and what is sent to it. A range that two peers ask for goes to the one whose key sorts first.
    pub allowed_ips: BTreeSet<Prefix>,
    /// A secret mixed into the handshakes with it.
    pub preshared_key: Option<Arc<PresharedKey>>,
    /// How often to send something when there is nothing to send: whole seconds, 1 to 65535.
    pub keepalive: Option<Duration>,
}

impl fmt::Debug for Desired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desired")
            .field("device", &self.device)
            .field("backend", &self.backend)
            .field("public_key", &self.public_key)
            .field("listen_port", &self.listen_port)
            .field("mark", &self.mark)
            .field("peers", &self.peers)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("endpoint", &self.endpoint)
            .field("allowed_ips", &self.allowed_ips)
            .field("has_preshared_key", &self.preshared_key.is_some())
            .field("keepalive", &self.keepalive)
            .finish()
    }
}
