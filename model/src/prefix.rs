//! Address ranges.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a text is not a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidPrefix {
    /// The text is not `address/length`.
    #[error("{0:?} is not a prefix; write an address and a length, such as 10.244.1.0/24 or fd00::/64")]
    Syntax(String),
    /// Bits behind the length are set, so the text names a host, not a range.
    #[error("{given} has bits set behind its length; write {meant}")]
    HostBits {
        /// What was written.
        given: String,
        /// The range that contains it.
        meant: Prefix,
    },
}

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "ipv4")]
    V4,
    /// IPv6.
    #[serde(rename = "ipv6")]
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        })
    }
}

/// An IP prefix with no bits behind its length: `10.244.1.0/24`, never `10.244.1.7/24`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(IpNet);

impl Prefix {
    /// The range of `length` bits that contains `address`, or `None` when the family has no such length.
    pub fn containing(address: IpAddr, length: u8) -> Option<Self> {
        IpNet::new(address, length).ok().map(|net| Self(net.trunc()))
    }

    /// The range of this one address.
    pub fn host(address: IpAddr) -> Self {
        Self(IpNet::from(address))
    }

    /// The first address of the range.
    pub fn address(self) -> IpAddr {
        self.0.network()
    }

    /// How many leading bits are fixed.
    pub fn length(self) -> u8 {
        self.0.prefix_len()
    }

    /// IPv4 or IPv6.
    pub fn family(self) -> Family {
        Family::of(self.address())
    }

    /// Whether the address lies in the range.
    pub fn contains(self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// Whether every address of `other` lies in this range.
    pub fn covers(self, other: Self) -> bool {
        self.0.contains(&other.0)
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        let net: IpNet = text.parse().map_err(|_| InvalidPrefix::Syntax(text.to_owned()))?;
        if net != net.trunc() {
            return Err(InvalidPrefix::HostBits {
                given: text.to_owned(),
                meant: Self(net.trunc()),
            });
        }
        Ok(Self(net))
    }
}

impl TryFrom<String> for Prefix {
    type Error = InvalidPrefix;

    fn try_from(text: String) -> Result<Self, InvalidPrefix> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn host_bits_are_refused_and_the_right_text_is_named() {
        let meant = "10.244.1.0/24".parse().unwrap();

        let error = "10.244.1.7/24".parse::<Prefix>();

        assert_eq!(
            error,
            Err(InvalidPrefix::HostBits {
                given: "10.244.1.7/24".to_owned(),
                meant
            })
        );
    }

    #[test]
    fn ranges_of_different_families_never_overlap() {
        let all_v4: Prefix = "0.0.0.0/0".parse().unwrap();
        let all_v6: Prefix = "::/0".parse().unwrap();

        assert!(!all_v4.overlaps(all_v6));
        assert!(all_v4.covers("10.0.0.0/8".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn a_prefix_survives_its_text_form(address: IpAddr, length in 0u8..=128) {
            if let Some(prefix) = Prefix::containing(address, length) {
                prop_assert_eq!(prefix.to_string().parse(), Ok(prefix));
                prop_assert!(prefix.contains(address));
            }
        }
    }
}
