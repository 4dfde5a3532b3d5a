//! The few nouns that sibling crates share.
//!
//! A type lives here only when two siblings need it; each is parsed at the edge and has no wrong spelling inside. Nothing in this
//! crate does I/O.

mod key;
mod mark;
mod mtu;
mod node;
mod overlay;
mod prefix;

pub use key::{InvalidKey, PresharedKey, PrivateKey, PublicKey};
pub use mark::{InvalidMark, Mark};
pub use mtu::{InvalidMtu, Mtu};
pub use node::{InvalidNodeName, NodeId, NodeName};
pub use overlay::{InvalidOverlayFormat, InvalidVni, OverlayFormat, OverlayKind, Vni};
pub use prefix::{Family, InvalidPrefix, Prefix};
