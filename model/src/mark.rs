//! Packet marks: bits of `skb->mark` that we set and test, and that nobody else may use.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The mark bits that other well-known programs claim.
const FOREIGN: [(&str, u32); 4] = [
    ("kube-proxy", 0x0000_c000),
    ("Cilium", 0x0000_0f00),
    ("Calico", 0xffff_0000),
    ("Tailscale", 0x00ff_0000),
];

/// Why a text, or a value and a mask, are not a mark.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidMark {
    /// The text is not `value/mask`.
    #[error("{0:?} is not a mark; write a value and a mask, such as 0x1000/0x1000")]
    Syntax(String),
    /// The mask is empty, so the mark could never be told from no mark.
    #[error("mark {0:#x} has no bits in its mask; give a mask with at least one bit")]
    Empty(u32),
    /// The value has bits that the mask leaves out.
    #[error("mark {value:#x} has bits outside its mask {mask:#x}; give a value inside the mask")]
    OutsideMask {
        /// The mark's bits.
        value: u32,
        /// The bits the mark may use.
        mask: u32,
    },
}

/// A packet mark: the bits in `mask` have the value `value`; all other bits belong to somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mark {
    value: u32,
    mask: u32,
}

impl Mark {
    /// Checks that the value fits its mask and is not zero.
    ///
    /// # Errors
    /// [`InvalidMark`] says which of the two is wrong.
    pub const fn new(value: u32, mask: u32) -> Result<Self, InvalidMark> {
        if value == 0 || mask == 0 {
            return Err(InvalidMark::Empty(value));
        }
        if value & !mask != 0 {
            return Err(InvalidMark::OutsideMask { value, mask });
        }
        Ok(Self { value, mask })
    }

    /// The bits a marked packet carries.
    pub const fn value(self) -> u32 {
        self.value
    }

    /// The bits that are ours to set and test.
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// Whether two marks claim a common bit, so that one would be read as the other or overwrite it.
    pub const fn overlaps(self, other: Self) -> bool {
        self.mask & other.mask != 0
    }

    /// The well-known programs whose mark bits this mark would disturb, by name.
    pub fn conflicts(self) -> Vec<&'static str> {
        FOREIGN
            .into_iter()
            .filter(|(_, mask)| mask & self.mask != 0)
            .map(|(name, _)| name)
            .collect()
    }
}

impl FromStr for Mark {
    type Err = InvalidMark;

    fn from_str(text: &str) -> Result<Self, InvalidMark> {
        let number = |part: &str| match part.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => part.parse(),
        };
        let syntax = || InvalidMark::Syntax(text.to_owned());
        let (value, mask) = text.split_once('/').ok_or_else(syntax)?;
        Self::new(
            number(value).map_err(|_| syntax())?,
            number(mask).map_err(|_| syntax())?,
        )
    }
}

impl TryFrom<String> for Mark {
    type Error = InvalidMark;

    fn try_from(text: String) -> Result<Self, InvalidMark> {
        text.parse()
    }
}

impl From<Mark> for String {
    fn from(mark: Mark) -> Self {
        mark.to_string()
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_cannot_be_told_from_no_mark_is_refused() {
        assert_eq!(Mark::new(0, 0x30), Err(InvalidMark::Empty(0)));
        assert_eq!(Mark::new(1, 0), Err(InvalidMark::Empty(1)));
        assert_eq!(
            Mark::new(0x40, 0x30),
            Err(InvalidMark::OutsideMask {
                value: 0x40,
                mask: 0x30
            })
        );
    }

    #[test]
    fn a_mark_survives_its_text_form() {
        let mark = Mark::new(0x10, 0x30).unwrap();

        assert_eq!(mark.to_string(), "0x10/0x30");
        assert_eq!("0x10/0x30".parse(), Ok(mark));
        assert_eq!("16/48".parse(), Ok(mark));
        assert_eq!("0x10".parse::<Mark>(), Err(InvalidMark::Syntax("0x10".to_owned())));
    }

    #[test]
    fn conflicts_name_the_programs_whose_bits_are_taken() {
        assert_eq!(Mark::new(0x10, 0x30).unwrap().conflicts(), Vec::<&str>::new());
        assert_eq!(Mark::new(0x4000, 0x4000).unwrap().conflicts(), ["kube-proxy"]);
        assert_eq!(
            Mark::new(0x40000, 0xff0000).unwrap().conflicts(),
            ["Calico", "Tailscale"]
        );
    }
}
