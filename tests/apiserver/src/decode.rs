//! Bodies of requests: JSON, YAML for applies, patches and delete options, and what the real server says of those it cannot read. Pure.

use serde_json::Value;

use crate::status::Refusal;
use crate::write::Preconditions;

/// An object of this kind.
pub(crate) fn json(body: &[u8], media: &str, kind: &str) -> Result<Value, Refusal> {
    match media.split(';').next().unwrap_or_default().trim() {
        "" | "application/json" => serde_json::from_slice(body).map_err(|_| {
            let text = String::from_utf8_lossy(body);
            Refusal::bad_request(format!(
                "the object provided is unrecognized (must be of type {kind}): couldn't get version/kind; json parse error: {} ({text})",
                complaint(body)
            ))
        }),
        "application/yaml" => yaml(body),
        _ => {
            let types = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
            let message = format!("the body of the request was in an unknown format - accepted media types include: {types}");
            Err(Refusal::new(415, "UnsupportedMediaType", message))
        }
    }
}

/// A merge patch.
pub(crate) fn patch(body: &[u8]) -> Result<Value, Refusal> {
    serde_json::from_slice(body).map_err(|_| Refusal::bad_request(format!("error decoding patch: {}", complaint(body))))
}

/// A JSON patch.
pub(crate) fn operations(body: &[u8]) -> Result<Vec<Value>, Refusal> {
    let found = match patch(body)? {
        Value::Array(operations) => return Ok(operations),
        Value::Object(_) => "object",
        Value::String(_) => "string",
        Value::Number(_) => "number",
        Value::Bool(_) => "bool",
        Value::Null => "null",
    };
    let why = format!("json: cannot unmarshal {found} into Go value of type []handlers.jsonPatchOp");
    Err(Refusal::bad_request(format!("error decoding patch: {why}")))
}

/// The body of an apply: YAML, of which JSON is a part.
pub(crate) fn applied(body: &[u8]) -> Result<Value, Refusal> {
    serde_json::from_slice(body).or_else(|_| yaml(body))
}

/// The options of a delete.
pub(crate) fn preconditions(body: &[u8]) -> Result<Preconditions, Refusal> {
    if body.is_empty() {
        return Ok(Preconditions::default());
    }
    let options = json(body, "", "DeleteOptions")?;
    let text = |name: &str| options["preconditions"][name].as_str().map(str::to_owned);
    Ok(Preconditions {
        uid: text("uid"),
        revision: text("resourceVersion"),
    })
}

fn yaml(body: &[u8]) -> Result<Value, Refusal> {
    let text = String::from_utf8_lossy(body);
    serde_saphyr::from_str(&text).map_err(|error| Refusal::bad_request(format!("error decoding YAML: {error}")))
}

/// What Go's decoder says, in the two cases that are recorded; of others only that the text is no JSON.
fn complaint(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let mut characters = text.chars().filter(|character| !character.is_whitespace());
    match (characters.next(), characters.next()) {
        (None, _) => "unexpected end of JSON input".into(),
        (Some('{'), Some(found)) if found != '"' => {
            format!("invalid character '{found}' looking for beginning of object key string")
        }
        (Some(found), _) if !"{[\"-0123456789tfn".contains(found) => {
            format!("invalid character '{found}' looking for beginning of value")
        }
        _ => "invalid character in JSON text".into(),
    }
}
