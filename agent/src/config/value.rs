//! Value types of the configuration that nobody else needs.

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::ops::Deref;
use std::time::Duration;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Something that is found out unless it is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Detect<T> {
    /// Find it out.
    #[default]
    Auto,
    /// It is this.
    Given(T),
}

impl<T: Serialize> Serialize for Detect<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Given(value) => value.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Detect<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AutoOrList<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for AutoOrList<T> {
            type Value = Detect<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`auto` or a list")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                if text != "auto" {
                    return Err(E::invalid_value(serde::de::Unexpected::Str(text), &self));
                }
                Ok(Detect::Auto)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                T::deserialize(SeqAccessDeserializer::new(list)).map(Detect::Given)
            }
        }

        deserializer.deserialize_any(AutoOrList(PhantomData))
    }
}

/// An address and port to listen on, or none.
pub(super) fn listen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let Some(value) = Option::<serde_json::Value>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let address = value.as_str().and_then(|text| text.parse::<SocketAddr>().ok());
    match address.filter(|address| address.port() != 0) {
        Some(address) => Ok(Some(address)),
        None => Err(D::Error::custom(
            "write an address and a port, such as 127.0.0.1:21320 or [::1]:21320, or null for none",
        )),
    }
}

/// A duration as operators write it: `500ms`, `25s`, `5m`, `1h`, or `0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interval(Duration);

impl Interval {
    pub(crate) const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl Deref for Interval {
    type Target = Duration;

    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            millis if !millis.is_multiple_of(1000) => write!(f, "{millis}ms"),
            0 => f.write_str("0s"),
            millis if millis.is_multiple_of(3_600_000) => write!(f, "{}h", millis / 3_600_000),
            millis if millis.is_multiple_of(60_000) => write!(f, "{}m", millis / 60_000),
            millis => write!(f, "{}s", millis / 1000),
        }
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Interval;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as 25s")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Interval, E> {
                parse(text).map(Interval).ok_or_else(|| {
                    E::custom(format_args!(
                        "{text:?} is not a duration; write a number and a unit, such as 500ms, 25s, 5m or 1h"
                    ))
                })
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Interval, E> {
                self.visit_str(&number.to_string())
            }
        }

        deserializer.deserialize_any(Text)
    }
}

fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let unit = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..unit].parse().ok()?;
    match &text[unit..] {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit_and_never_without() {
        assert_eq!(parse("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse("25s"), Some(Duration::from_secs(25)));
        assert_eq!(parse("5m"), Some(Duration::from_secs(300)));
        assert_eq!(parse("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(parse("0"), Some(Duration::ZERO));
        for wrong in [
            "",
            "25",
            "s",
            "-1s",
            "1.5s",
            "25 s",
            "25d",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
