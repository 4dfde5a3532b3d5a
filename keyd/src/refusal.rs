//! Why a stranger's document is not believed, in fixed words.

use std::fmt;

use shroud_model::InvalidKey;
use thiserror::Error;

/// A stranger's text, safe to print: the beginning of it, everything but printable ASCII escaped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Excerpt(String);

impl Excerpt {
    /// How many characters of the original are shown.
    const SHOWN: usize = 48;

    /// Takes the beginning of a text.
    pub fn of(text: &str) -> Self {
        Self::up_to(text, Self::SHOWN)
    }

    /// Takes more of a text that has more to say, such as the message of a server we trust.
    pub(crate) fn up_to(text: &str, limit: usize) -> Self {
        let escaped = |c: char| -> String {
            match c {
                '"' | '\'' => c.to_string(),
                _ => c.escape_default().collect(),
            }
        };
        let mut shown: String = text.chars().take(limit).map(escaped).collect();
        if text.chars().nth(limit).is_some() {
            shown.push_str("...");
        }
        Self(shown)
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why an announcement or a record is refused. The texts are ours; foreign text appears only as an [`Excerpt`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Larger than anything we would write.
    #[error("it is {bytes} bytes long, more than the {limit} allowed")]
    TooLong {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Not UTF-8.
    #[error("it is not UTF-8 text")]
    NotText,
    /// Not JSON.
    #[error("it is not JSON, at line {line}, column {column}")]
    NotJson {
        /// Line of the first fault, from 1.
        line: usize,
        /// Column of the first fault, from 1.
        column: usize,
    },
    /// JSON, but not `{..}`.
    #[error("it is JSON, but not an object")]
    NotAnObject,
    /// A field appears twice, so two readers could see two documents.
    #[error("it has the field {0} twice")]
    Duplicate(Excerpt),
    /// A version this program does not know.
    #[error("its version is {found}, this program knows version {known}; upgrade the older of the two nodes")]
    Version {
        /// What it says.
        found: Excerpt,
        /// What we know.
        known: u64,
    },
    /// A field is not there.
    #[error("it has no field {0}")]
    Missing(&'static str),
    /// A field does not hold what belongs there.
    #[error("its field {field} must be {wanted}, not {found}")]
    Malformed {
        /// The field.
        field: &'static str,
        /// What belongs there.
        wanted: &'static str,
        /// What is there.
        found: Excerpt,
    },
    /// A list is longer than allowed.
    #[error("its field {field} has {found} entries, more than the {limit} allowed")]
    TooMany {
        /// The field.
        field: &'static str,
        /// How many there are.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The public key cannot be anybody's.
    #[error("its public key is refused: {0}")]
    Key(InvalidKey),
    /// The public key is a second spelling of another one.
    #[error("its public key is not in canonical form (RFC 7748, section 5), so that no private key yields it")]
    KeyNotCanonical,
    /// The record is about another node than its place says.
    #[error("it is about the node {found}, in the place of {place}")]
    WrongNode {
        /// The node it names.
        found: Excerpt,
        /// The node whose place it has.
        place: Excerpt,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_bounded_and_cannot_move_the_cursor() {
        assert_eq!(
            Excerpt::of("\u{1b}[31m\n\u{202e}").to_string(),
            "\\u{1b}[31m\\n\\u{202e}"
        );
        assert_eq!(
            Excerpt::of(&"x".repeat(1000)).to_string(),
            format!("{}...", "x".repeat(48))
        );
    }
}
