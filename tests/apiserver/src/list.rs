//! Lists: which revision they show, pages, selectors, and the checks of their parameters. It waits for nothing; a list of a revision that
//! is yet to come says so ([`List::awaited`]).

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::request::Parameters;
use crate::resource::Resource;
use crate::selector::Selector;
use crate::status::{Cause, Refusal};
use crate::store::{Key, Shape, State};

/// Continue tokens are base64 for URLs, without padding, and decoded without fuss.
const TOKEN: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// A list request, its parameters checked.
#[derive(Debug)]
pub(crate) struct List {
    namespace: String,
    selector: Selector,
    moment: Moment,
    limit: Option<usize>,
    /// Objects up to this key were on earlier pages.
    after: String,
}

/// Which revision a list shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Now,
    /// Now, and not before this revision.
    NotBefore(u64),
    /// Exactly this one.
    At(u64),
    /// The revision of an earlier page.
    Continued(u64),
}

impl List {
    pub(crate) fn parse(resource: &Resource, namespace: &str, parameters: &Parameters) -> Result<Self, Refusal> {
        check_options(parameters)?;
        let limit = number(parameters, "limit")?
            .and_then(|limit| usize::try_from(limit).ok())
            .filter(|limit| *limit > 0);
        let selector = Selector::parse(
            resource,
            parameters.text("labelSelector"),
            parameters.text("fieldSelector"),
        )?;
        let revision = parameters.text("resourceVersion");
        let token = parameters.text("continue");
        if !token.is_empty() && !revision.is_empty() && revision != "0" {
            return Err(Refusal::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        let (moment, after) = if token.is_empty() {
            let asked = parse_revision(revision)
                .map_err(|why| Refusal::bad_request(format!("invalid resource version: {why}")))?;
            let exact = parameters.text("resourceVersionMatch") == "Exact";
            let moment = match asked {
                None | Some(0) => Moment::Now,
                Some(revision) if exact => Moment::At(revision),
                Some(revision) => Moment::NotBefore(revision),
            };
            (moment, String::new())
        } else {
            parse_token(token).map_err(|why| Refusal::bad_request(format!("invalid continue token: {why}")))?
        };
        // From the cache the real server gives everything at once.
        let limit = if revision == "0" { None } else { limit };
        Ok(Self {
            namespace: namespace.into(),
            selector,
            moment,
            limit,
            after,
        })
    }

    /// The revision that must have come first.
    pub(crate) fn awaited(&self) -> Option<u64> {
        match self.moment {
            Moment::NotBefore(revision) | Moment::At(revision) => Some(revision),
            Moment::Now | Moment::Continued(_) => None,
        }
    }

    /// The body of the answer, on one line.
    pub(crate) fn answer(&self, state: &State, resource: &Resource, shape: Shape) -> Result<Bytes, Refusal> {
        let (revision, objects) = match self.moment {
            Moment::Now | Moment::NotBefore(_) => (state.revision(), state.objects(resource)),
            Moment::At(revision) => {
                let expired = || Refusal::new(410, "Expired", "The resourceVersion for the provided list is too old.");
                (revision, state.objects_at(resource, revision).ok_or_else(expired)?)
            }
            Moment::Continued(revision) => (
                revision,
                state.objects_at(resource, revision).ok_or_else(|| self.expired())?,
            ),
        };
        let selected = objects.into_iter().filter(|object| {
            let key = Key::of(&object.value);
            (self.namespace.is_empty() || key.namespace == self.namespace)
                && (self.after.is_empty() || key.path() + "\0" > self.after)
                && self.selector.matches(&object.value)
        });
        let mut selected: Vec<_> = selected.collect();
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if let Some(limit) = self.limit
            && selected.len() > limit
        {
            let remaining = selected.len() - limit;
            selected.truncate(limit);
            let last = selected
                .last()
                .map(|object| Key::of(&object.value).path())
                .unwrap_or_default();
            metadata["continue"] = token(&json!(revision), &format!("{last}\0")).into();
            if self.selector.is_empty() {
                metadata["remainingItemCount"] = remaining.into();
            }
        }
        Ok(assembled(resource, shape, &metadata, &selected))
    }

    /// 410, with a token that goes on from the same key at the newest revision.
    fn expired(&self) -> Refusal {
        let message = "The provided continue parameter is too old to display a consistent list result. You can start a new list \
            without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. \
            Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted \
            between the time the first chunk was returned and now may show up in the list.";
        let mut refusal = Refusal::new(410, "Expired", message);
        refusal.continue_token = Some(token(&json!(-1), self.after.trim_start_matches('/')));
        refusal
    }
}

/// Puts a list together from objects that are encoded already.
fn assembled(
    resource: &Resource,
    shape: Shape,
    metadata: &Value,
    objects: &[std::sync::Arc<crate::store::Object>],
) -> Bytes {
    let (kind, version) = match shape {
        Shape::Full => (format!("{}List", resource.kind), resource.api_version()),
        Shape::Metadata => ("PartialObjectMetadataList".into(), "meta.k8s.io/v1".into()),
    };
    // Items of a full list do not repeat their kind.
    let repeated = match shape {
        Shape::Full => format!(
            "{{\"kind\":\"{}\",\"apiVersion\":\"{}\",",
            resource.kind,
            resource.api_version()
        )
        .len(),
        Shape::Metadata => 0,
    };
    let mut body = Vec::with_capacity(
        256 + objects
            .iter()
            .map(|object| object.encoded(shape).len() + 1)
            .sum::<usize>(),
    );
    body.extend(format!("{{\"kind\":\"{kind}\",\"apiVersion\":\"{version}\",\"metadata\":").bytes());
    body.extend(crate::encode::compact(metadata));
    body.extend(b",\"items\":");
    if objects.is_empty() && shape == Shape::Metadata {
        body.extend(b"null");
    } else {
        body.push(b'[');
        for (index, object) in objects.iter().enumerate() {
            if index > 0 {
                body.push(b',');
            }
            if repeated > 0 {
                body.push(b'{');
            }
            body.extend(&object.encoded(shape)[repeated..]);
        }
        body.push(b']');
    }
    body.extend(b"}\n");
    body.into()
}

/// What `limit`, `timeoutSeconds` and the like must be.
pub(crate) fn number(parameters: &Parameters, name: &str) -> Result<Option<u64>, Refusal> {
    match parameters.text(name) {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| Refusal::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax"))),
    }
}

/// A revision, or what a Go program says of what is none.
pub(crate) fn parse_revision(text: &str) -> Result<Option<u64>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let why =
        || format!("resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax");
    text.parse().map(Some).map_err(|_| why())
}

/// Refuses parameters that contradict each other, on lists.
fn check_options(parameters: &Parameters) -> Result<(), Refusal> {
    let mut causes = Vec::new();
    let matching = parameters.text("resourceVersionMatch");
    if !matching.is_empty() {
        if parameters.text("resourceVersion").is_empty() {
            causes.push(Cause::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        if !matches!(matching, "Exact" | "NotOlderThan") {
            let message =
                format!("Unsupported value: {matching:?}: supported values: \"Exact\", \"NotOlderThan\", \"\"");
            causes.push(Cause {
                reason: "FieldValueNotSupported",
                message,
                field: "resourceVersionMatch".into(),
            });
        }
    }
    if parameters.find("sendInitialEvents").is_some() {
        causes.push(Cause::forbidden(
            "sendInitialEvents",
            "sendInitialEvents is forbidden for list",
        ));
    }
    if causes.is_empty() {
        Ok(())
    } else {
        Err(Refusal::invalid("ListOptions", "meta.k8s.io", "", &causes))
    }
}

fn token(revision: &Value, start: &str) -> String {
    // Go writes the fields in this order, and the final NUL as an escape.
    let text = format!(
        "{{\"v\":\"meta.k8s.io/v1\",\"rv\":{revision},\"start\":{}}}",
        json!(start)
    );
    TOKEN.encode(text)
}

fn parse_token(text: &str) -> Result<(Moment, String), String> {
    let bytes = TOKEN
        .decode(text)
        .map_err(|why| format!("continue key is not valid: {why}"))?;
    let token: Value = serde_json::from_slice(&bytes).map_err(|_| {
        let first = bytes.first().copied().unwrap_or_default();
        let shown = if first.is_ascii_graphic() {
            format!("'{}'", char::from(first))
        } else {
            format!("'\\u{first:04x}'")
        };
        format!("continue key is not valid: invalid character {shown} looking for beginning of value")
    })?;
    let start = token["start"]
        .as_str()
        .ok_or("continue key is not valid: no start key")?;
    let start = if start.starts_with('/') {
        start.to_owned()
    } else {
        format!("/{start}")
    };
    let moment = token["rv"].as_u64().map_or(Moment::Now, Moment::Continued);
    Ok((moment, start))
}
