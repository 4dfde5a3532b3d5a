//! In which form a client wants its answer: full objects or only metadata, indented or not. Pure.

use crate::status::Refusal;
use crate::store::Shape;

/// What is asked for, so that `as=` can be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Object,
    List(&'static str),
    Watch,
}

/// Chooses the shape by the `Accept` header.
pub(crate) fn shape(accept: &str, asked: Asked) -> Result<Shape, Refusal> {
    let ranges = accept.split(',').map(str::trim).filter(|range| !range.is_empty());
    let mut transforms = false;
    for range in ranges {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let parameter = |name: &str| {
            range
                .split(';')
                .skip(1)
                .find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
        };
        if !matches!(media, "application/json" | "application/*" | "*/*") {
            continue;
        }
        let right = parameter("g").is_none_or(|group| group == "meta.k8s.io")
            && parameter("v").is_none_or(|version| version == "v1");
        match (parameter("as"), asked) {
            (None, _) => return Ok(Shape::Full),
            (Some("PartialObjectMetadata"), Asked::Object | Asked::Watch) if right => return Ok(Shape::Metadata),
            (Some("PartialObjectMetadataList"), Asked::List(_)) if right => return Ok(Shape::Metadata),
            (Some(other @ "PartialObjectMetadata"), Asked::List(kind)) if right => {
                let message = format!("you requested {other}, but the requested object is a list (*core.{kind}List)");
                return Err(refused(message));
            }
            (Some("PartialObjectMetadataList"), Asked::Object | Asked::Watch) if right => {
                return Err(refused(
                    "you requested PartialObjectMetadataList, but the requested object is not a list".into(),
                ));
            }
            (Some(_), _) => transforms = true,
        }
    }
    if accept.trim().is_empty() {
        return Ok(Shape::Full);
    }
    if transforms {
        let types = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
        return Err(refused(format!("only the following media types are accepted: {types}")));
    }
    let types = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
    let streams = "application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch";
    let mut refusal = refused(format!(
        "406: Not Acceptable\n\nAvailable representations: {types}, {streams}"
    ));
    refusal.details = serde_json::json!({});
    Err(refusal)
}

/// Whether a plain answer is indented: when asked for, and for programs that people look at.
pub(crate) fn is_pretty(pretty: Option<&str>, user_agent: &str) -> bool {
    match pretty {
        Some(wanted) => matches!(wanted, "" | "1" | "true"),
        None => ["curl", "Wget", "Mozilla/5.0"]
            .iter()
            .any(|prefix| user_agent.starts_with(prefix)),
    }
}

/// Whether an error is indented: to a request that asked for another shape.
pub(crate) fn errors_are_pretty(accept: &str) -> bool {
    accept.contains("as=")
}

fn refused(message: String) -> Refusal {
    let mut refusal = Refusal::new(406, "NotAcceptable", message);
    refusal.indented = true;
    refusal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_range_that_can_be_served_counts() {
        let partial = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

        assert_eq!(shape("application/json", Asked::Object), Ok(Shape::Full));
        assert_eq!(shape("*/*", Asked::Watch), Ok(Shape::Full));
        assert_eq!(shape(partial, Asked::Watch), Ok(Shape::Metadata));
        assert_eq!(shape(table, Asked::List("Node")), Ok(Shape::Full));
        assert_eq!(shape("text/html", Asked::Object).unwrap_err().code, 406);
        assert_eq!(shape(partial, Asked::List("Node")).unwrap_err().code, 406);
    }
}
