//! WireGuard keys. Public keys are printable; secret ones have no `Debug`, `Clone` or `Serialize`, and are wiped when dropped.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of every key here, in bytes (Curve25519, RFC 7748).
const LENGTH: usize = 32;

/// The public keys that make any Diffie-Hellman result zero, little-endian with the top bit cleared.
///
/// Source: RFC 7748 §6.1 asks to refuse an all-zero result; the list of points is from <https://cr.yp.to/ecdh.html#validate>.
const LOW_ORDER: [[u8; LENGTH]; 7] = [
    [0; LENGTH],
    {
        let mut one = [0; LENGTH];
        one[0] = 1;
        one
    },
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    below_two_to_255(0xec),
    below_two_to_255(0xed),
    below_two_to_255(0xee),
];

/// 2^255 - 256 + `low`, little-endian: the values around the field's prime 2^255 - 19.
const fn below_two_to_255(low: u8) -> [u8; LENGTH] {
    let mut bytes = [0xff; LENGTH];
    bytes[0] = low;
    bytes[31] = 0x7f;
    bytes
}

/// Why a text is not a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidKey {
    /// The text is not 44 characters of standard base64.
    #[error("a key is 44 characters of base64 (32 bytes), this is {0} characters")]
    Encoding(usize),
    /// The key is all zeroes, or a point with which no secret can be agreed.
    #[error("the key is all zeroes or of low order: nobody can hold it")]
    LowOrder,
}

/// A Curve25519 public key, as WireGuard names a peer: 32 bytes, printed in base64. Never zero, never a low-order point.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; LENGTH]);

impl PublicKey {
    /// Checks that the bytes are a key with which a secret can be agreed.
    ///
    /// # Errors
    /// [`InvalidKey::LowOrder`] for zero and the other points of low order.
    pub fn from_bytes(bytes: [u8; LENGTH]) -> Result<Self, InvalidKey> {
        let mut canonical = bytes;
        canonical[31] &= 0x7f;
        if LOW_ORDER.contains(&canonical) {
            return Err(InvalidKey::LowOrder);
        }
        Ok(Self(bytes))
    }

    /// The key's 32 bytes.
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// The first 8 characters of the base64 form: enough to recognise a key in a table.
    pub fn fingerprint(&self) -> String {
        self.to_string().chars().take(8).collect()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        Self::from_bytes(decode(text)?)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A Curve25519 private key. It cannot be printed, copied or serialized; its memory is wiped when it is dropped.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; LENGTH]);

impl PrivateKey {
    /// Takes the 32 bytes of a private key.
    pub fn from_bytes(bytes: [u8; LENGTH]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for the one call that hands it to the encryption device or to the key file.
    pub fn expose(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

/// A WireGuard pre-shared key, mixed into each handshake with one peer. As secret as a [`PrivateKey`].
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; LENGTH]);

impl PresharedKey {
    /// Takes the 32 bytes of a pre-shared key.
    pub fn from_bytes(bytes: [u8; LENGTH]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for the one call that hands it to the encryption device.
    pub fn expose(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

fn decode(text: &str) -> Result<[u8; LENGTH], InvalidKey> {
    let bytes = STANDARD
        .decode(text)
        .map_err(|_| InvalidKey::Encoding(text.chars().count()))?;
    bytes.try_into().map_err(|_| InvalidKey::Encoding(text.chars().count()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_key_survives_its_text_form() {
        let key = PublicKey::from_bytes([7; 32]).unwrap();

        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(serde_json::to_string(&key).unwrap(), format!("\"{key}\""));
    }

    #[test]
    fn a_low_order_key_is_refused_whatever_its_top_bit() {
        for mut point in LOW_ORDER {
            assert_eq!(PublicKey::from_bytes(point), Err(InvalidKey::LowOrder));
            point[31] |= 0x80;
            assert_eq!(PublicKey::from_bytes(point), Err(InvalidKey::LowOrder));
        }
    }

    #[test]
    fn a_text_of_the_wrong_length_is_refused() {
        assert_eq!("".parse::<PublicKey>(), Err(InvalidKey::Encoding(0)));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(InvalidKey::Encoding(4)));
        assert_eq!("not base64!".parse::<PublicKey>(), Err(InvalidKey::Encoding(11)));
    }
}
