//! How pod packets are wrapped, as far as both ends have to agree.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How packets are wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlayKind {
    /// RFC 7348. A device knows its peers' underlay addresses, all of one family.
    Vxlan,
    /// RFC 8926. One device for all peers of both families; the routes carry the peers' underlay addresses and the VNI.
    Geneve,
}

impl OverlayKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Vxlan, Self::Geneve];

    /// The kernel's word (`IFLA_INFO_KIND`).
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
        }
    }
}

impl fmt::Display for OverlayKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a number is no network identifier.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("VNI {0} is outside 1..=16777215")]
pub struct InvalidVni(pub u32);

/// A virtual network identifier: 24 bits in the header of VXLAN (RFC 7348) and Geneve (RFC 8926). Zero is left out, because the kernel
/// shows it for a Geneve device that has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    /// Checks the range.
    ///
    /// # Errors
    /// [`InvalidVni`] outside 1..=16777215.
    pub const fn new(number: u32) -> Result<Self, InvalidVni> {
        if number == 0 || number >= 1 << 24 {
            return Err(InvalidVni(number));
        }
        Ok(Self(number))
    }

    /// The number.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = InvalidVni;

    fn try_from(number: u32) -> Result<Self, InvalidVni> {
        Self::new(number)
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What sender and receiver of an overlay packet must agree on, and what a node announces that it takes: `vxlan:21320:4789`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OverlayFormat {
    /// How packets are wrapped.
    pub kind: OverlayKind,
    /// The overlay's number.
    pub vni: Vni,
    /// The UDP port packets are sent to.
    pub port: NonZeroU16,
}

/// Why a text is no overlay format.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no overlay format; write kind, VNI and UDP port, such as vxlan:21320:4789")]
pub struct InvalidOverlayFormat(pub String);

impl FromStr for OverlayFormat {
    type Err = InvalidOverlayFormat;

    fn from_str(text: &str) -> Result<Self, InvalidOverlayFormat> {
        let parse = || {
            let mut parts = text.split(':');
            let name = parts.next()?;
            let kind = OverlayKind::ALL.into_iter().find(|kind| kind.name() == name)?;
            let vni = Vni::new(parts.next()?.parse().ok()?).ok()?;
            let port = parts.next()?.parse().ok()?;
            let format = Self { kind, vni, port };
            // One spelling only: no leading zeroes or signs, nothing behind.
            (format.to_string() == text).then_some(format)
        };
        parse().ok_or_else(|| InvalidOverlayFormat(text.to_owned()))
    }
}

impl fmt::Display for OverlayFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.kind, self.vni, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_has_one_spelling() {
        for text in ["vxlan:21320:4789", "geneve:1:65535"] {
            assert_eq!(text.parse::<OverlayFormat>().unwrap().to_string(), text);
        }
        for text in [
            "vxlan:0:4789",
            "vxlan:1:0",
            "vxlan:+1:4789",
            "gre:1:1",
            "vxlan:1:1:1",
            "vxlan:16777216:1",
            "VXLAN:1:1",
            "",
        ] {
            assert!(text.parse::<OverlayFormat>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_vni_has_24_bits_and_is_not_zero() {
        assert_eq!(Vni::new(0), Err(InvalidVni(0)));
        assert_eq!(Vni::new(1), Ok(Vni(1)));
        assert_eq!(Vni::new(0x00ff_ffff), Ok(Vni(0x00ff_ffff)));
        assert_eq!(Vni::new(0x0100_0000), Err(InvalidVni(0x0100_0000)));
    }
}
