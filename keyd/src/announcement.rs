//! What a node says of itself: its public key and where it can be reached. Attacker input until the directory has verified it.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use serde::{Deserialize, Serialize, Serializer};
use shroud_model::{InvalidKey, OverlayFormat, OverlayKind, PublicKey};

use crate::document::Document;
use crate::key::follows;
use crate::refusal::{Excerpt, Refusal};

const WANTED_EPOCH: &str = "a whole number";

/// How the announcing node encrypts. Both speak the same WireGuard; the word is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel's WireGuard.
    Kernel,
    /// `shroud wire`.
    Userspace,
}

/// How the announcing node sends pod packets where it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// As they are, by routes.
    #[default]
    Native,
    /// In VXLAN.
    Vxlan,
    /// In Geneve.
    Geneve,
}

impl Mode {
    /// The overlay that it takes, if it takes one.
    pub const fn overlay(self) -> Option<OverlayKind> {
        match self {
            Self::Native => None,
            Self::Vxlan => Some(OverlayKind::Vxlan),
            Self::Geneve => Some(OverlayKind::Geneve),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.overlay().map_or("native", OverlayKind::name))
    }
}

/// Which traffic between pods the announcing node wants encrypted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EncryptScope {
    /// All of it.
    #[default]
    All,
    /// Only that with nodes of other zones, and with those that want all encrypted.
    CrossZone,
}

impl EncryptScope {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// A key, and its place among the keys of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AnnouncedKey {
    /// The key.
    pub public_key: PublicKey,
    /// Its epoch. Of two keys in a row, the later one's is higher and differs in its lowest bit.
    pub epoch: u64,
}

/// One node's announcement, parsed: well-formed, but not yet believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Announcement {
    /// The key the node answers to.
    pub public_key: PublicKey,
    /// The UDP port its device listens on.
    #[serde(rename = "port")]
    pub listen_port: NonZeroU16,
    /// Where others can reach it, best first.
    pub endpoints: Vec<SocketAddr>,
    /// Rises with each new key, so that an old announcement cannot be played again. Its lowest bit says on which of its devices a peer
    /// finds the key.
    pub epoch: u64,
    /// The key to come, which the node answers to as well.
    #[serde(rename = "next", skip_serializing_if = "Option::is_none")]
    pub next_key: Option<AnnouncedKey>,
    /// How the node encrypts.
    pub backend: Backend,
    /// How the node sends pod packets to whoever can receive them so.
    pub mode: Mode,
    /// The overlay packets that the node can receive right now.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "texts")]
    pub overlays: Vec<OverlayFormat>,
    /// Whether its underlay delivers packets for its pods to it by itself.
    #[serde(skip_serializing_if = "is_false")]
    pub routable: bool,
    /// Whether it encrypts its own traffic with nodes that do so too.
    #[serde(skip_serializing_if = "is_false")]
    pub encrypts_nodes: bool,
    /// Which traffic between pods it wants encrypted.
    #[serde(skip_serializing_if = "EncryptScope::is_all")]
    pub scope: EncryptScope,
}

impl Announcement {
    /// The version written, and the only one understood.
    pub const VERSION: u64 = 1;
    /// The longest announcement that is read, in bytes.
    pub const MAX_BYTES: usize = 4096;
    /// The most endpoints that are read.
    pub const MAX_ENDPOINTS: usize = 8;
    /// The most overlay formats that are read.
    pub const MAX_OVERLAYS: usize = 8;

    /// Parses a stranger's text. Unknown fields are skipped, and those that an earlier program did not know may be missing: within a
    /// version, fields are only added.
    ///
    /// # Errors
    /// [`Refusal`] says what is wrong, in words that are safe to print.
    pub fn parse(text: impl AsRef<[u8]>) -> Result<Self, Refusal> {
        let document = Document::parse(text.as_ref(), Self::MAX_BYTES, Self::VERSION)?;

        let listen_port = document.field("port", "a UDP port, 1 to 65535")?;
        let endpoints = document.list("endpoints", "a list of addresses with port", Self::MAX_ENDPOINTS)?;
        let public_key = public_key(&document)?;
        let epoch = document.field("epoch", WANTED_EPOCH)?;
        Ok(Self {
            public_key,
            listen_port,
            endpoints: endpoints.into_iter().map(canonical).collect(),
            epoch,
            next_key: next_key(&document, public_key, epoch)?,
            backend: document.field("backend", "\"kernel\" or \"userspace\"")?,
            mode: document.optional("mode", "\"native\", \"vxlan\" or \"geneve\"")?,
            overlays: match document.raw("overlays") {
                Some(_) => document.list("overlays", "a list such as \"vxlan:21320:4789\"", Self::MAX_OVERLAYS)?,
                None => Vec::new(),
            },
            routable: document.optional("routable", "true or false")?,
            encrypts_nodes: document.optional("encryptsNodes", "true or false")?,
            scope: document.optional("scope", "\"all\" or \"cross-zone\"")?,
        })
    }

    /// The JSON others parse.
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct Versioned<'a> {
            version: u64,
            #[serde(flatten)]
            announcement: &'a Announcement,
        }
        serde_json::to_string(&Versioned {
            version: Self::VERSION,
            announcement: self,
        })
        .expect("numbers, texts and lists have a JSON form")
    }
}

fn texts<S: Serializer>(formats: &[OverlayFormat], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(formats.iter().map(ToString::to_string))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !*value
}

/// The key to come, if one is announced.
fn next_key(document: &Document, current: PublicKey, epoch: u64) -> Result<Option<AnnouncedKey>, Refusal> {
    let Some(next) = document.inner("next")? else {
        return Ok(None);
    };
    let next = AnnouncedKey {
        public_key: public_key(&next)?,
        epoch: next.field("epoch", WANTED_EPOCH)?,
    };
    if next.public_key == current {
        return Err(Refusal::Malformed {
            field: "next",
            wanted: "another key than the one in force",
            found: Excerpt::of(&current.to_string()),
        });
    }
    if !follows(next.epoch, epoch) {
        return Err(Refusal::Malformed {
            field: "epoch",
            wanted: "of a next key higher than the one before, and odd where that is even",
            found: Excerpt::of(&next.epoch.to_string()),
        });
    }
    Ok(Some(next))
}

fn public_key(document: &Document) -> Result<PublicKey, Refusal> {
    const WANTED: &str = "a public key, 44 characters of base64";
    let text: String = document.field("publicKey", WANTED)?;
    let key: PublicKey = text.parse().map_err(|error| match error {
        InvalidKey::Encoding(_) => Refusal::Malformed {
            field: "publicKey",
            wanted: WANTED,
            found: Excerpt::of(&text),
        },
        InvalidKey::LowOrder => Refusal::Key(error),
    })?;
    if is_canonical(&key) {
        Ok(key)
    } else {
        Err(Refusal::KeyNotCanonical)
    }
}

/// Whether the key is the one spelling of its point: below the field's prime 2^255 - 19, top bit clear.
///
/// X25519 accepts the other spellings, so one private key would answer to two public keys that compare as different.
fn is_canonical(key: &PublicKey) -> bool {
    let [low, middle @ .., high] = key.as_bytes();
    *high < 0x7f || (*high == 0x7f && !(*low >= 0xed && middle.iter().all(|&byte| byte == 0xff)))
}

/// Writes an IPv4-mapped IPv6 address as the IPv4 address it is.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

    fn text(key: &str) -> String {
        format!(
            r#"{{"version":1,"publicKey":"{key}","port":51820,"endpoints":["172.18.0.2:51820"],"epoch":1,"backend":"userspace","mode":"native"}}"#
        )
    }

    fn announcement() -> Announcement {
        Announcement {
            public_key: PublicKey::from_bytes([7; 32]).unwrap(),
            listen_port: NonZeroU16::new(51820).unwrap(),
            endpoints: vec!["172.18.0.2:51820".parse().unwrap()],
            epoch: 1,
            next_key: None,
            backend: Backend::Userspace,
            mode: Mode::Native,
            overlays: Vec::new(),
            routable: false,
            encrypts_nodes: false,
            scope: EncryptScope::All,
        }
    }

    #[test]
    fn our_own_announcement_is_the_documented_text() {
        assert_eq!(announcement().to_json(), text(KEY));
        assert_eq!(Announcement::parse(text(KEY)), Ok(announcement()));
    }

    #[test]
    fn an_announcement_of_eight_long_endpoints_fits() {
        let endpoints = vec!["[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap(); 8];
        let ours = Announcement {
            endpoints,
            epoch: u64::MAX - 1,
            next_key: Some(AnnouncedKey {
                public_key: PublicKey::from_bytes([8; 32]).unwrap(),
                epoch: u64::MAX,
            }),
            mode: Mode::Geneve,
            overlays: vec!["geneve:16777215:65535".parse().unwrap(); 8],
            routable: true,
            encrypts_nodes: true,
            scope: EncryptScope::CrossZone,
            ..announcement()
        };

        assert_eq!(Announcement::parse(ours.to_json()), Ok(ours));
    }

    #[test]
    fn a_later_program_may_add_fields() {
        let later = text(KEY).replace("{\"version\"", "{\"nextKey\":{\"a\":[1]},\"version\"");

        assert_eq!(Announcement::parse(later), Ok(announcement()));
    }

    #[test]
    fn an_earlier_program_may_lack_fields() {
        let earlier = text(KEY).replace(",\"mode\":\"native\"", "");

        assert_eq!(Announcement::parse(earlier), Ok(announcement()));
    }

    #[test]
    fn a_mode_or_format_nobody_knows_is_refused() {
        for (good, bad) in [
            ("\"native\"", "\"gre\""),
            ("\"native\"", "\"native\",\"overlays\":[\"vxlan:0:1\"]"),
            ("\"native\"", "\"native\",\"scope\":\"none\""),
        ] {
            let refusal = Announcement::parse(text(KEY).replace(good, bad)).unwrap_err();

            assert!(matches!(refusal, Refusal::Malformed { .. }), "{refusal}");
        }
    }

    #[test]
    fn a_next_key_comes_after_the_one_in_force_and_on_another_device() {
        let key = AnnouncedKey {
            public_key: PublicKey::from_bytes([8; 32]).unwrap(),
            epoch: 2,
        };
        let next = |epoch: &str| {
            let next = format!(
                r#"{{"next":{{"publicKey":"{}","epoch":{epoch}}},"version""#,
                key.public_key
            );
            Announcement::parse(text(KEY).replace("{\"version\"", &next))
        };

        assert_eq!(next("2").unwrap().next_key, Some(key));
        for bad in ["0", "1", "3", "-2", "\"2\"", "18446744073709551616"] {
            let refusal = next(bad).unwrap_err();
            assert!(
                matches!(refusal, Refusal::Malformed { field: "epoch", .. }),
                "{bad}: {refusal}"
            );
        }
        let same = format!(r#"{{"publicKey":"{KEY}","epoch":2}}"#);
        for bad in ["7", "null", "[]", "{}", &same] {
            let bad = text(KEY).replace("{\"version\"", &format!("{{\"next\":{bad},\"version\""));
            assert!(Announcement::parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let refusal = Announcement::parse(text(KEY).replace("\"version\":1", "\"version\":2")).unwrap_err();

        assert_eq!(
            refusal,
            Refusal::Version {
                found: Excerpt::of("2"),
                known: 1
            }
        );
    }

    #[test]
    fn a_field_given_twice_is_refused_even_when_unknown() {
        let twice = text(KEY).replace("{\"version\"", "{\"x\":1,\"x\":2,\"version\"");
        assert_eq!(Announcement::parse(twice), Err(Refusal::Duplicate(Excerpt::of("x"))));

        let escaped = text(KEY).replace("{\"version\"", "{\"\\u0070ort\":1,\"version\"");
        assert_eq!(
            Announcement::parse(escaped),
            Err(Refusal::Duplicate(Excerpt::of("port")))
        );
    }

    #[test]
    fn a_second_spelling_of_a_key_is_refused() {
        let top_bit = |mut bytes: [u8; 32]| {
            bytes[31] |= 0x80;
            PublicKey::from_bytes(bytes).unwrap().to_string()
        };
        let mut beyond_prime = [0xff; 32];
        beyond_prime[31] = 0x7f;
        let beyond_prime = PublicKey::from_bytes(beyond_prime).unwrap().to_string();

        assert_eq!(
            Announcement::parse(text(&top_bit([7; 32]))),
            Err(Refusal::KeyNotCanonical)
        );
        assert_eq!(Announcement::parse(text(&beyond_prime)), Err(Refusal::KeyNotCanonical));
    }

    #[test]
    fn a_zero_key_is_refused() {
        let zero = text("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");

        assert_eq!(Announcement::parse(zero), Err(Refusal::Key(InvalidKey::LowOrder)));
    }

    #[test]
    fn a_mapped_endpoint_is_read_as_ipv4_so_that_it_cannot_hide_loopback() {
        let mapped = text(KEY).replace("172.18.0.2:51820", "[::ffff:127.0.0.1]:1");

        let parsed = Announcement::parse(mapped).unwrap();

        assert_eq!(parsed.endpoints, ["127.0.0.1:1".parse().unwrap()]);
    }

    #[test]
    fn limits_hold() {
        let long = text(KEY).replace("{\"version\"", &format!("{{\"x\":\"{}\",\"version\"", "x".repeat(4096)));
        assert!(matches!(
            Announcement::parse(long),
            Err(Refusal::TooLong { limit: 4096, .. })
        ));

        let nine = ["\"172.18.0.2:51820\""; 9].join(",");
        let nine = text(KEY).replace("\"172.18.0.2:51820\"", &nine);
        assert_eq!(
            Announcement::parse(nine),
            Err(Refusal::TooMany {
                field: "endpoints",
                found: 9,
                limit: 8
            })
        );
    }
}
