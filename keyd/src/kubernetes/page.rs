//! One page of a list, as an API server answers it. Never decides whether to ask for the next.

use kube::api::ListParams;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::api::{Api, Failure};
use super::object::Object;
use crate::FailureKind;

/// How many objects are asked for at once. A Node has some 10 KB; a page of them is what we hold in memory for a moment.
const PAGE: u32 = 250;

/// A page.
pub(super) struct Page<T> {
    pub(super) objects: Vec<T>,
    /// The version of the whole list.
    pub(super) version: String,
    /// What to ask for the next page with; `None` on the last.
    pub(super) next: Option<String>,
}

/// What to ask for: the page that `next` leads to, or the first.
pub(super) fn asked(fields: Option<&str>, labels: Option<&str>, next: Option<String>) -> ListParams {
    ListParams {
        limit: Some(PAGE),
        continue_token: next,
        field_selector: fields.map(str::to_owned),
        label_selector: labels.map(str::to_owned),
        ..ListParams::default()
    }
}

/// Reads one page.
pub(super) async fn page<T: Object>(
    api: &Api,
    attempt: &str,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<Page<T>, Failure> {
    #[derive(Deserialize)]
    struct List<'a> {
        metadata: ListMetadata,
        /// An empty list of some kinds has `null` here.
        #[serde(borrow)]
        items: Option<Vec<&'a RawValue>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct ListMetadata {
        resource_version: String,
        #[serde(rename = "continue", default)]
        next: String,
    }

    let malformed = |why: String| Failure::new(FailureKind::Malformed, attempt, why);
    let text = api
        .ask(attempt, request.map_err(|error| malformed(error.to_string()))?)
        .await?;
    let list: List<'_> =
        serde_json::from_slice(&text).map_err(|error| malformed(format!("the answer is no list: {error}")))?;
    Ok(Page {
        objects: list.items.unwrap_or_default().into_iter().map(T::read).collect(),
        version: list.metadata.resource_version,
        next: Some(list.metadata.next).filter(|next| !next.is_empty()),
    })
}
