//! What a directory source says of one node: the authority's half, and the node's own half.
//!
//! A Kubernetes Node object becomes one of these, and so does a file of the file source.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use shroud_model::{NodeName, Prefix};

use crate::document::Document;
use crate::refusal::Refusal;

/// One node as a source describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Who it is about.
    pub node: NodeName,
    /// The authority's half: the node's addresses on the underlay.
    pub addresses: Vec<IpAddr>,
    /// The authority's half: the pod prefixes given to the node.
    pub pod_prefixes: Vec<Prefix>,
    /// The authority's half: the zone the node is in. A folder knows none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Zone>,
    /// The node's own half, as raw text that nobody has believed yet; `None` when the node has announced nothing.
    pub announcement: Option<String>,
}

/// A list of shared records in a document, where they are written like others.
pub(crate) mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::Record;

    pub(crate) fn serialize<S: Serializer>(records: &[Arc<Record>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(records.iter().map(AsRef::<Record>::as_ref))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Arc<Record>>, D::Error> {
        Ok(Vec::<Record>::deserialize(deserializer)?
            .into_iter()
            .map(Arc::new)
            .collect())
    }
}

/// A place in a source that should hold a record and does not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unreadable {
    /// The node it would be about, as far as the place says so.
    pub node: Option<NodeName>,
    /// The place and what is wrong with it, safe to print.
    pub reason: String,
}

/// A failure domain, such as a data centre, as the label `topology.kubernetes.io/zone` names it. Safe to print.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Zone(String);

/// A text that is no zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a zone is 1 to 63 letters, digits, '-', '_' or '.'")]
pub struct InvalidZone;

impl FromStr for Zone {
    type Err = InvalidZone;

    /// By the rules of label values (Kubernetes, "Labels and Selectors", syntax), but that what nobody named is no zone.
    fn from_str(text: &str) -> Result<Self, InvalidZone> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Zone {
    type Error = InvalidZone;

    fn try_from(text: String) -> Result<Self, InvalidZone> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if (1..=63).contains(&text.len()) && text.bytes().all(fits) {
            Ok(Self(text))
        } else {
            Err(InvalidZone)
        }
    }
}

impl From<Zone> for String {
    fn from(zone: Zone) -> Self {
        zone.0
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Record {
    /// The version written, and the only one understood.
    pub const VERSION: u64 = 1;
    /// The longest record that is read, in bytes.
    pub const MAX_BYTES: usize = 65_536;
    /// The most addresses that are read.
    pub const MAX_ADDRESSES: usize = 64;
    /// The most pod prefixes that are read. The directory allows fewer; this only bounds the parse.
    pub const MAX_POD_PREFIXES: usize = 1024;

    /// Parses a record; its announcement stays raw text. Unknown fields are skipped.
    ///
    /// # Errors
    /// [`Refusal`] says what is wrong, in words that are safe to print.
    pub fn parse(text: impl AsRef<[u8]>) -> Result<Self, Refusal> {
        let document = Document::parse(text.as_ref(), Self::MAX_BYTES, Self::VERSION)?;
        Ok(Self {
            node: document.field("node", "a node name (RFC 1123)")?,
            addresses: document.list("addresses", "a list of IP addresses", Self::MAX_ADDRESSES)?,
            pod_prefixes: document.list("podPrefixes", "a list of prefixes", Self::MAX_POD_PREFIXES)?,
            zone: None,
            announcement: document
                .raw("announcement")
                .filter(|&raw| raw != "null")
                .map(str::to_owned),
        })
    }

    /// The JSON that [`Record::parse`] reads. An announcement that is not JSON has no place in it and is left out.
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Versioned<'a> {
            version: u64,
            node: &'a NodeName,
            addresses: &'a [IpAddr],
            pod_prefixes: &'a [Prefix],
            #[serde(skip_serializing_if = "Option::is_none")]
            announcement: Option<&'a RawValue>,
        }
        serde_json::to_string(&Versioned {
            version: Self::VERSION,
            node: &self.node,
            addresses: &self.addresses,
            pod_prefixes: &self.pod_prefixes,
            announcement: self
                .announcement
                .as_deref()
                .and_then(|raw| serde_json::from_str(raw).ok()),
        })
        .expect("names, texts and lists have a JSON form")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            node: "a".parse().unwrap(),
            addresses: vec!["172.18.0.2".parse().unwrap(), "fd18::2".parse().unwrap()],
            pod_prefixes: vec!["10.244.1.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()],
            zone: None,
            announcement: Some(r#"{"version":1, "anything": [true]}"#.to_owned()),
        }
    }

    #[test]
    fn a_zone_is_a_label() {
        for good in ["eu-west-1a", "a", "Z_9.x", &"z".repeat(63)] {
            assert_eq!(good.parse::<Zone>().unwrap().to_string(), good);
        }
        for bad in ["", "a b", "\u{1b}[31m", "zön", &"z".repeat(64)] {
            assert_eq!(bad.parse::<Zone>(), Err(InvalidZone), "{bad}");
        }
    }

    #[test]
    fn a_record_survives_its_text_form_and_its_announcement_stays_raw() {
        assert_eq!(
            record().to_json(),
            r#"{"version":1,"node":"a","addresses":["172.18.0.2","fd18::2"],"podPrefixes":["10.244.1.0/24","fd00:10:244:1::/64"],"announcement":{"version":1, "anything": [true]}}"#
        );
        assert_eq!(Record::parse(record().to_json()), Ok(record()));
    }

    #[test]
    fn a_record_without_announcement_is_one() {
        let silent = Record {
            announcement: None,
            ..record()
        };

        assert_eq!(Record::parse(silent.to_json()), Ok(silent.clone()));
        assert_eq!(
            Record::parse(silent.to_json().replace('}', r#","announcement":null}"#)),
            Ok(silent)
        );
    }

    #[test]
    fn a_prefix_with_host_bits_makes_the_record_unreadable() {
        let refusal = Record::parse(record().to_json().replace("10.244.1.0/24", "10.244.1.7/24")).unwrap_err();

        assert_eq!(
            refusal.to_string(),
            "its field podPrefixes must be a list of prefixes, not 10.244.1.7/24"
        );
    }
}
