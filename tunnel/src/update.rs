//! A change in WireGuard's own terms: what one request to a device says, whoever is asked.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use shroud_model::{Mark, Prefix, PrivateKey, PublicKey};

/// One request. What is `None` or empty stays as it is.
#[derive(Default)]
pub(crate) struct Update<'a> {
    pub(crate) private_key: Option<&'a PrivateKey>,
    pub(crate) listen_port: Option<u16>,
    pub(crate) mark: Option<Mark>,
    pub(crate) peers: Vec<PeerUpdate<'a>>,
}

/// What a request says about one peer.
pub(crate) struct PeerUpdate<'a> {
    pub(crate) public_key: PublicKey,
    pub(crate) presence: Presence,
    /// All zeroes clear it.
    pub(crate) preshared_key: Option<&'a [u8; 32]>,
    pub(crate) endpoint: Option<SocketAddr>,
    /// Seconds; 0 switches it off.
    pub(crate) keepalive: Option<u16>,
    /// Ranges to give to it.
    pub(crate) allowed_ips: BTreeSet<Prefix>,
}

/// What should become of a peer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// It is there afterwards.
    Ensured,
    /// It is changed if it is there.
    Assumed,
    /// It is gone afterwards.
    Removed,
}

impl PeerUpdate<'_> {
    /// Says nothing yet about the peer.
    pub(crate) fn new(public_key: PublicKey, presence: Presence) -> Self {
        Self {
            public_key,
            presence,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            allowed_ips: BTreeSet::new(),
        }
    }
}
