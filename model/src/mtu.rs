//! Link sizes: how large a packet may be, and what each layer around it costs.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Family;

/// An IPv4 or IPv6 header without options, a UDP header, and WireGuard's own 32 bytes (type, index, counter, tag).
const OVER_IPV4: u32 = 20 + 8 + 32;
const OVER_IPV6: u32 = 40 + 8 + 32;

/// Why a number is not a link size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("MTU {0} is outside 576..=65535 bytes")]
pub struct InvalidMtu(pub u32);

/// The largest packet a link carries, in bytes, without its link-layer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

impl Mtu {
    /// Ethernet's.
    pub const ETHERNET: Self = Self(1500);

    /// Checks that the number is a link size IPv4 can live with.
    ///
    /// # Errors
    /// [`InvalidMtu`] outside 576..=65535.
    pub const fn new(bytes: u32) -> Result<Self, InvalidMtu> {
        if bytes < 576 || bytes > 65535 {
            return Err(InvalidMtu(bytes));
        }
        Ok(Self(bytes))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// What is left for the inner packet when WireGuard wraps it and `underlay` carries it.
    ///
    /// WireGuard pads the inner packet to 16 bytes but never beyond the device's MTU (whitepaper §5.4.6), so that a full packet costs no
    /// more than the headers.
    pub const fn inside_wireguard(self, underlay: Family) -> Self {
        let overhead = match underlay {
            Family::V4 => OVER_IPV4,
            Family::V6 => OVER_IPV6,
        };
        Self(self.0 - overhead)
    }
}

impl TryFrom<u32> for Mtu {
    type Error = InvalidMtu;

    fn try_from(bytes: u32) -> Result<Self, InvalidMtu> {
        Self::new(bytes)
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wireguard_costs_60_bytes_over_ipv4_and_80_over_ipv6() {
        assert_eq!(Mtu::ETHERNET.inside_wireguard(Family::V4), Mtu(1440));
        assert_eq!(Mtu::ETHERNET.inside_wireguard(Family::V6), Mtu(1420));
    }

    #[test]
    fn sizes_no_ip_link_has_are_refused() {
        assert_eq!(Mtu::new(575), Err(InvalidMtu(575)));
        assert_eq!(Mtu::new(65536), Err(InvalidMtu(65536)));
    }
}
