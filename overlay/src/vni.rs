//! Which overlay a packet belongs to.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vni_has_24_bits_and_is_not_zero() {
        assert_eq!(Vni::new(0), Err(InvalidVni(0)));
        assert_eq!(Vni::new(1), Ok(Vni(1)));
        assert_eq!(Vni::new(0x00ff_ffff), Ok(Vni(0x00ff_ffff)));
        assert_eq!(Vni::new(0x0100_0000), Err(InvalidVni(0x0100_0000)));
    }
}
