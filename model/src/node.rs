//! What a node is called.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a text is not a node's name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "a node name is 1 to 253 lower-case letters, digits, '-' and '.', each part beginning and ending with a letter or digit (RFC 1123)"
)]
pub struct InvalidNodeName;

/// A node's name: a DNS subdomain (RFC 1123), as Kubernetes names its Node objects. Safe in a path and in a terminal. Copies share the text:
/// whoever knows thousands of nodes has each name in a dozen places.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The number by which the gate's maps know this node: FNV-1a over the name, so that every agent, also after a restart, counts
    /// under the same number without having to remember it.
    pub fn id(&self) -> NodeId {
        let hash = self.0.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        NodeId(hash)
    }
}

/// A node's number in the gate's maps and counters. [`NodeId::UNKNOWN`] stands for traffic that belongs to no node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl NodeId {
    /// No node: an address that nobody in the mesh owns.
    pub const UNKNOWN: Self = Self(0);
}

impl FromStr for NodeName {
    type Err = InvalidNodeName;

    fn from_str(text: &str) -> Result<Self, InvalidNodeName> {
        let edge = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let well_formed = |label: &str| {
            let bytes = label.as_bytes();
            let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
                return false;
            };
            edge(first) && edge(last) && bytes.iter().all(|&byte| edge(byte) || byte == b'-')
        };
        if text.len() > 253 || !text.split('.').all(well_formed) {
            return Err(InvalidNodeName);
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for NodeName {
    type Error = InvalidNodeName;

    fn try_from(text: String) -> Result<Self, InvalidNodeName> {
        text.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_kubernetes_gives_are_accepted() {
        for name in ["a", "node-1", "ip-10-0-0-1.eu-west-1.compute.internal", "0"] {
            assert_eq!(name.parse::<NodeName>().map(String::from), Ok(name.to_owned()));
        }
    }

    #[test]
    fn names_that_could_hurt_a_path_or_a_terminal_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "A",
            "a..b",
            "-a",
            "a-",
            "a\u{1b}[31m",
            "a b",
            "ä",
            &"a".repeat(254),
        ] {
            assert_eq!(name.parse::<NodeName>(), Err(InvalidNodeName), "{name:?}");
        }
    }

    #[test]
    fn the_id_is_the_published_fnv_1a_value() {
        assert_eq!("a".parse::<NodeName>().unwrap().id(), NodeId(0xaf63_dc4c_8601_ec8c));
    }
}
