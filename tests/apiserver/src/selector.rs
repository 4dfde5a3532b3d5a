//! Label and field selectors: their grammar, and whether an object matches. It asks no store.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::resource::Resource;
use crate::status::Refusal;

/// What a request selects; empty selects all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Selector {
    labels: Vec<LabelRequirement>,
    fields: Vec<FieldRequirement>,
}

#[derive(Clone, Debug, PartialEq)]
enum LabelRequirement {
    Exists(String),
    Absent(String),
    In(String, BTreeSet<String>),
    NotIn(String, BTreeSet<String>),
}

#[derive(Clone, Debug, PartialEq)]
struct FieldRequirement {
    field: String,
    value: String,
    equal: bool,
}

impl Selector {
    /// Parses the two parameters of a request.
    pub(crate) fn parse(resource: &Resource, labels: &str, fields: &str) -> Result<Self, Refusal> {
        Ok(Self {
            labels: parse_labels(labels)?,
            fields: parse_fields(resource, fields)?,
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether the object is selected.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"].get(key).and_then(Value::as_str);
        let labels = self.labels.iter().all(|requirement| match requirement {
            LabelRequirement::Exists(key) => label(key).is_some(),
            LabelRequirement::Absent(key) => label(key).is_none(),
            LabelRequirement::In(key, values) => label(key).is_some_and(|value| values.contains(value)),
            LabelRequirement::NotIn(key, values) => label(key).is_none_or(|value| !values.contains(value)),
        });
        labels
            && self
                .fields
                .iter()
                .all(|requirement| (field(object, &requirement.field) == requirement.value) == requirement.equal)
    }
}

/// The one name that a field selector asks for, by which such a request is authorized.
pub(crate) fn selected_name(fields: &str) -> Option<&str> {
    fields
        .split(',')
        .find_map(|one| one.strip_prefix("metadata.name="))
        .map(|name| name.trim_start_matches('='))
}

fn field(object: &Value, path: &str) -> String {
    match path.split('.').try_fold(object, |value, name| value.get(name)) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(yes)) => yes.to_string(),
        _ if path == "spec.unschedulable" => "false".into(),
        _ => String::new(),
    }
}

fn parse_fields(resource: &Resource, text: &str) -> Result<Vec<FieldRequirement>, Refusal> {
    let mut requirements = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (name, value, equal) = if let Some((name, value)) = part.split_once("!=") {
            (name, value, false)
        } else if let Some((name, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (name, value, true)
        } else {
            return Err(Refusal::bad_request(format!(
                "invalid selector: '{text}'; can't understand '{part}'"
            )));
        };
        let known = name == "metadata.name"
            || (name == "metadata.namespace" && resource.namespaced)
            || resource.selectable.contains(&name);
        if !known {
            return Err(Refusal::bad_request(format!("field label not supported: {name}")));
        }
        requirements.push(FieldRequirement {
            field: name.into(),
            value: value.into(),
            equal,
        });
    }
    Ok(requirements)
}

fn parse_labels(text: &str) -> Result<Vec<LabelRequirement>, Refusal> {
    let tokens = tokens(text);
    let mut rest = tokens.iter().map(String::as_str).peekable();
    let mut requirements = Vec::new();
    while rest.peek().is_some() {
        requirements.push(requirement(&mut rest)?);
        match rest.next() {
            None => break,
            Some(",") if rest.peek().is_some() => {}
            Some(other) => return Err(unexpected(other, "',' or 'end of string'")),
        }
    }
    Ok(requirements)
}

fn requirement<'a>(rest: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> Result<LabelRequirement, Refusal> {
    let mut word = rest.next().unwrap_or_default();
    let absent = word == "!";
    if absent {
        word = rest.next().unwrap_or_default();
    }
    let key = identifier(word)?;
    if absent {
        return Ok(LabelRequirement::Absent(key));
    }
    match rest.peek().copied() {
        None | Some(",") => Ok(LabelRequirement::Exists(key)),
        Some("=" | "==") => {
            rest.next();
            Ok(LabelRequirement::In(key, BTreeSet::from([value(rest)?])))
        }
        Some("!=") => {
            rest.next();
            Ok(LabelRequirement::NotIn(key, BTreeSet::from([value(rest)?])))
        }
        Some(operator @ ("in" | "notin")) => {
            rest.next();
            let values = values(rest)?;
            Ok(if operator == "in" {
                LabelRequirement::In(key, values)
            } else {
                LabelRequirement::NotIn(key, values)
            })
        }
        Some(other) => Err(unexpected(other, "in, notin, =, ==, !=, gt, lt")),
    }
}

fn value<'a>(rest: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> Result<String, Refusal> {
    match rest.peek().copied() {
        None | Some(",") => Ok(String::new()),
        Some(word) => {
            rest.next();
            identifier(word)
        }
    }
}

fn values<'a>(rest: &mut impl Iterator<Item = &'a str>) -> Result<BTreeSet<String>, Refusal> {
    let opening = rest.next().unwrap_or_default();
    if opening != "(" {
        return Err(unexpected(opening, "'('"));
    }
    let mut values = BTreeSet::new();
    loop {
        values.insert(identifier(rest.next().unwrap_or_default())?);
        match rest.next().unwrap_or_default() {
            "," => {}
            ")" => return Ok(values),
            other => return Err(unexpected(other, "',', or ')'")),
        }
    }
}

fn identifier(word: &str) -> Result<String, Refusal> {
    if word.is_empty() || word.contains(['=', '!', '(', ')', ',']) {
        return Err(unexpected(word, "identifier"));
    }
    Ok(word.to_owned())
}

fn unexpected(found: &str, expected: &str) -> Refusal {
    Refusal::bad_request(format!(
        "unable to parse requirement: found '{found}', expected: {expected}"
    ))
}

fn tokens(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            ' ' | '\t' => {}
            '(' | ')' | ',' => tokens.push(character.into()),
            '=' | '!' => {
                let double = characters.next_if_eq(&'=').is_some();
                tokens.push(if double {
                    format!("{character}=")
                } else {
                    character.into()
                });
            }
            other => {
                let mut word = String::from(other);
                while let Some(next) = characters.next_if(|next| !" \t(),=!".contains(*next)) {
                    word.push(next);
                }
                tokens.push(word);
            }
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NODES: &Resource = &crate::resource::RESOURCES[0];

    #[test]
    fn label_selectors_select() {
        let node = json!({"metadata": {"name": "a", "labels": {"mesh": "on", "zone": "z1", "empty": ""}}});
        let selects = |text: &str| Selector::parse(NODES, text, "").unwrap().matches(&node);

        for yes in [
            "",
            "mesh",
            "mesh=on",
            "mesh==on",
            "mesh!=off",
            "!none",
            "none!=x",
            "zone in (z1, z2)",
            "zone notin (z3)",
            "empty=",
        ] {
            assert!(selects(yes), "{yes:?}");
        }
        for no in [
            "none",
            "mesh=off",
            "!mesh",
            "mesh!=on",
            "zone in (z2)",
            "zone notin (z1)",
            "mesh,none",
        ] {
            assert!(!selects(no), "{no:?}");
        }
    }

    #[test]
    fn field_selectors_select_and_refuse() {
        let node = json!({"metadata": {"name": "a"}});
        let selects = |text: &str| Selector::parse(NODES, "", text).map(|selector| selector.matches(&node));

        assert_eq!(selects("metadata.name=a"), Ok(true));
        assert_eq!(selects("metadata.name!=a"), Ok(false));
        assert_eq!(
            selects("spec.podCIDR=x").unwrap_err().message,
            "field label not supported: spec.podCIDR"
        );
        assert_eq!(selected_name("metadata.name=a"), Some("a"));
    }
}
