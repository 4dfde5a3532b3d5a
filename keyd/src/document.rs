//! A small versioned JSON object from a stranger: bounded, no field twice, unknown fields skipped.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::refusal::{Excerpt, Refusal};

/// The fields of one object, each still unparsed.
pub(crate) struct Document {
    fields: BTreeMap<String, Box<RawValue>>,
}

impl Document {
    /// Parses an object of at most `limit` bytes that says it has version `known`.
    pub(crate) fn parse(bytes: &[u8], limit: usize, known: u64) -> Result<Self, Refusal> {
        if bytes.len() > limit {
            return Err(Refusal::TooLong {
                bytes: bytes.len(),
                limit,
            });
        }
        let document = Self::object(std::str::from_utf8(bytes).map_err(|_| Refusal::NotText)?)?;
        let version = document.raw("version").ok_or(Refusal::Missing("version"))?;
        if serde_json::from_str::<u64>(version).ok() != Some(known) {
            return Err(Refusal::Version {
                found: Excerpt::of(version),
                known,
            });
        }
        Ok(document)
    }

    /// The object in a field, if the field is there.
    pub(crate) fn inner(&self, field: &str) -> Result<Option<Self>, Refusal> {
        self.raw(field).map(Self::object).transpose()
    }

    fn object(text: &str) -> Result<Self, Refusal> {
        let fields: Fields = serde_json::from_str(text).map_err(|error| match error.classify() {
            Category::Data => Refusal::NotAnObject,
            Category::Io | Category::Syntax | Category::Eof => Refusal::NotJson {
                line: error.line(),
                column: error.column(),
            },
        })?;
        if let Some(name) = fields.twice {
            return Err(Refusal::Duplicate(Excerpt::of(&name)));
        }
        Ok(Self { fields: fields.once })
    }

    /// The field's JSON text, if it is there.
    pub(crate) fn raw(&self, field: &str) -> Option<&str> {
        self.fields.get(field).map(|raw| raw.get())
    }

    /// The field's value, which must be there.
    pub(crate) fn field<T: DeserializeOwned>(&self, field: &'static str, wanted: &'static str) -> Result<T, Refusal> {
        let raw = self.raw(field).ok_or(Refusal::Missing(field))?;
        serde_json::from_str(raw).map_err(|_| Refusal::Malformed {
            field,
            wanted,
            found: Excerpt::of(raw),
        })
    }

    /// The field's value, or its default where it is missing.
    pub(crate) fn optional<T: DeserializeOwned + Default>(
        &self,
        field: &'static str,
        wanted: &'static str,
    ) -> Result<T, Refusal> {
        match self.raw(field) {
            Some(_) => self.field(field, wanted),
            None => Ok(T::default()),
        }
    }

    /// The field's texts, each parsed; the field must be there.
    pub(crate) fn list<T: std::str::FromStr>(
        &self,
        field: &'static str,
        wanted: &'static str,
        limit: usize,
    ) -> Result<Vec<T>, Refusal> {
        let texts: Vec<String> = self.field(field, wanted)?;
        if texts.len() > limit {
            return Err(Refusal::TooMany {
                field,
                found: texts.len(),
                limit,
            });
        }
        let malformed = |text: &str| Refusal::Malformed {
            field,
            wanted,
            found: Excerpt::of(text),
        };
        texts
            .iter()
            .map(|text| text.parse().map_err(|_| malformed(text)))
            .collect()
    }
}

/// An object's fields, and the first name that came twice.
struct Fields {
    once: BTreeMap<String, Box<RawValue>>,
    twice: Option<String>,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields {
            once: BTreeMap::new(),
            twice: None,
        };
        while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
            if fields.once.insert(name.clone(), value).is_some() {
                fields.twice.get_or_insert(name);
            }
        }
        Ok(fields)
    }
}
