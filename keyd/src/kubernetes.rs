//! The Kubernetes source: Node objects as the directory, and this node's announcement as an annotation on its own.
//!
//! ```text
//!  API server ── Nodes (list, watch) ──> follow ── Event ──────────> the directory's keeper
//!      ^     ├── deny list (ConfigMap) ─> follow ── Event::Denied ──────┤
//!      │     └── labelled namespaces, pods > opt_out ── Event::OptedOut ──┘
//!      ├──────── PATCH of our own Node <── publish <───┐
//!      └──────── Events on refused Nodes <── complain <┴── Wanted ── the keeper
//!
//!  API server ── Nodes, pods (lists), exec ──> Cluster::ask ──> an operator who wants to hear all agents
//! ```
//!
//! The API server is the authority for names, addresses (`status.addresses`) and pod prefixes (`spec.podCIDRs`), and for who may write the
//! annotation; what an annotation says is believed no further than the directory verifies it. An API server that does not answer, or answers
//! nonsense, removes nobody: what is known stays, and the watch goes on from where it was.

mod access;
mod agents;
mod api;
mod complain;
mod exec;
mod follow;
mod object;
mod opt_out;
mod pace;
mod page;
mod publish;
#[cfg(test)]
mod transcripts;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use shroud_model::NodeName;
use tokio::sync::{mpsc, watch};

use self::access::{ForeignNode, check};
pub use self::agents::{Asked, Cluster};
use self::api::{Api, Credentials, Failure};
use self::complain::complain;
pub use self::complain::{Complaint, complaints};
pub use self::exec::Output;
use self::follow::{Collection, Update, chance, follow};
use self::object::{ConfigMap, Node, Object as _};
use self::opt_out::follow_opt_outs;
use self::pace::Pace;
pub use self::publish::FIELD_MANAGER;
use self::publish::{OwnNode, publish};
use crate::source::{Event, Telemetry};
use crate::{Excerpt, Record, Unreadable};

/// How many failures in a row make a silence: the first few are part of a server's life.
const SILENCE: u32 = 3;
/// How far the first lists of nodes that start together are spread, where the last good directory bridges the time.
const SPREAD: Duration = Duration::from_secs(5);

/// Where the API server is, and what is asked of it.
#[derive(Debug, Clone)]
pub struct Options {
    /// This node's name.
    pub node: NodeName,
    /// The file with address and credentials; `None` for the pod's ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// The name of the ConfigMap, in the namespace of the credentials, that names nodes and keys to be kept out.
    pub deny_list: String,
    /// Whether pods may opt out of encryption, so that their labels are followed.
    pub opt_out: bool,
    /// How long a watch may say nothing, from the request on, before it is opened anew.
    pub watch_idle: Duration,
    /// Whether an earlier run's directory bridges the time until the first list, so that there is no hurry.
    pub bridged: bool,
}

/// What the cluster should have from this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The announcement, as it stands in the annotation; `None` while there is nothing to announce.
    pub announcement: Option<String>,
    /// Whether this node attaches pods, and is ready to, so that the condition `NetworkUnavailable` is to be false.
    pub network_available: bool,
    /// The refused nodes that are to have an Event from here.
    pub complaints: BTreeMap<NodeName, Complaint>,
}

/// Follows an API server, and tells it what is `wanted`, for as long as somebody receives `events`.
pub async fn run(
    options: Options,
    events: mpsc::Sender<Event>,
    wanted: watch::Receiver<Wanted>,
    telemetry: watch::Sender<Telemetry>,
) {
    let Options { node, .. } = &options;
    let kubeconfig = options.kubeconfig.clone();
    let api = Api::new(kubeconfig.map_or(Credentials::Pod, Credentials::File));
    let (own, foreign) = (watch::Sender::new(None), watch::Sender::new(None));
    let patience = if options.bridged {
        SPREAD.mul_f64(chance())
    } else {
        Duration::ZERO
    };
    let pace = Pace::new(Instant::now() + patience);
    let failed = |failure: &Failure| telemetry.send_modify(|telemetry| telemetry.count(failure.kind));
    let published = |result: Result<(), Failure>| {
        result.as_ref().err().iter().for_each(|failure| failed(failure));
        telemetry.send_modify(|telemetry| telemetry.unpublished = result.err().map(|failure| failure.says));
    };
    let checked = |result: Result<Option<String>, Failure>| match result {
        Ok(problem) => telemetry.send_modify(|telemetry| telemetry.mighty_token = problem),
        Err(failure) => failed(&failure),
    };
    tokio::select! {
        never = follow_nodes(&api, &options, pace.clone(), &events, &own, &foreign, &telemetry) => match never {},
        never = follow_deny_list(&api, &options, pace, &events, &telemetry) => match never {},
        never = follow_opt_outs(&api, &options, &events, &telemetry) => match never {},
        never = publish(&api, node, wanted.clone(), &own, published) => match never {},
        never = complain(&api, node, wanted, failed) => match never {},
        never = check(&api, foreign.subscribe(), checked) => match never {},
        () = events.closed() => {}
    }
}

/// Reads one Node object, in JSON, as [`run`] reads each that the API server sends.
///
/// # Errors
/// [`Unreadable`] names the node, as far as the object does, and says what is wrong in words that are safe to print.
pub fn read_node(json: &str) -> Result<Record, Unreadable> {
    let object: &RawValue = serde_json::from_str(json).map_err(|error| Unreadable {
        node: None,
        reason: format!("it is no JSON: {}", Excerpt::of(&error.to_string())),
    })?;
    Node::read(object).record
}

async fn follow_nodes(
    api: &Api,
    options: &Options,
    pace: Pace,
    events: &mpsc::Sender<Event>,
    own: &watch::Sender<Option<OwnNode>>,
    foreign: &watch::Sender<Option<ForeignNode>>,
    telemetry: &watch::Sender<Telemetry>,
) -> Infallible {
    let nodes = Collection {
        name: "nodes",
        path: "/api/v1/nodes".to_owned(),
        fields: None,
        labels: None,
        idle: options.watch_idle,
    };
    let mut silence = Silence::default();
    let see = |node: &Node| {
        if let Some(seen) = OwnNode::of(node, &options.node) {
            own.send_if_modified(|own| own.replace(seen.clone()) != Some(seen));
        }
    };
    let mut tell = async |update: Update<Node>| {
        let event = match update {
            Update::Listed(nodes) => {
                nodes.iter().for_each(see);
                foreign.send_replace(ForeignNode::among(nodes.iter(), &options.node));
                silence.ends();
                Some(Event::Listed(nodes.into_iter().map(|node| node.record).collect()))
            }
            Update::Applied(node) => {
                see(&node);
                Some(Event::Applied(node.record))
            }
            Update::Deleted(name) => {
                if name == options.node.as_str() {
                    own.send_replace(None);
                }
                name.parse().ok().map(Event::Deleted)
            }
            Update::Lists => {
                telemetry.send_modify(|telemetry| telemetry.lists += 1);
                None
            }
            Update::Watches => {
                telemetry.send_modify(|telemetry| telemetry.watches += 1);
                silence.ends().then_some(Event::Answers)
            }
            Update::Failed(failure) => {
                telemetry.send_modify(|telemetry| telemetry.count(failure.kind));
                silence.goes_on(&failure).map(Event::Silent)
            }
        };
        pass_on(events, event).await;
    };
    follow(api, &nodes, pace, &mut tell).await
}

async fn follow_deny_list(
    api: &Api,
    options: &Options,
    mut pace: Pace,
    events: &mpsc::Sender<Event>,
    telemetry: &watch::Sender<Telemetry>,
) -> Infallible {
    let namespace = loop {
        match api.namespace().await {
            Ok(namespace) => break namespace,
            Err(failure) => {
                pace.failed(Instant::now(), None, chance());
                telemetry.send_modify(|telemetry| {
                    telemetry.count(failure.kind);
                    telemetry.no_deny_list = Some(failure.says);
                });
                tokio::time::sleep_until(pace.next().into()).await;
            }
        }
    };
    let deny_list = Collection {
        name: "the deny list",
        path: format!("/api/v1/namespaces/{namespace}/configmaps"),
        fields: Some(format!("metadata.name={}", options.deny_list)),
        labels: None,
        idle: options.watch_idle,
    };
    let mut silence = Silence::default();
    let known = || {
        telemetry.send_if_modified(|telemetry| telemetry.no_deny_list.take().is_some());
    };
    let mut tell = async |update: Update<ConfigMap>| {
        let event = match update {
            Update::Listed(mut maps) => {
                silence.ends();
                known();
                Some(Event::Denied(denied(&maps.pop().unwrap_or_default())))
            }
            Update::Applied(map) => Some(Event::Denied(denied(&map))),
            // Somebody who deletes the list, and not its lines, may have slipped; but it is the authority's word, and theirs to give.
            Update::Deleted(_) => Some(Event::Denied(BTreeMap::new())),
            Update::Lists => None,
            Update::Watches => {
                if silence.ends() {
                    known();
                }
                None
            }
            Update::Failed(failure) => {
                telemetry.send_modify(|telemetry| {
                    telemetry.count(failure.kind);
                    if let Some(says) = silence.goes_on(&failure) {
                        telemetry.no_deny_list = Some(says);
                    }
                });
                None
            }
        };
        pass_on(events, event).await;
    };
    follow(api, &deny_list, pace, &mut tell).await
}

/// The deny list in a ConfigMap: each line of each value is a node's name, a key or a key's fingerprint; what follows is a remark.
fn denied(map: &ConfigMap) -> BTreeMap<String, String> {
    let lines = map.data.values().flat_map(|text| text.lines());
    let entries = lines.map(|line| line.trim().split_once([' ', '\t']).unwrap_or((line.trim(), "")));
    entries
        .filter(|(entry, _)| !entry.is_empty() && !entry.starts_with('#'))
        .map(|(entry, remark)| (entry.to_owned(), remark.trim_start_matches([' ', '\t', '#']).to_owned()))
        .collect()
}

/// Waits until there is something new to see; for ever, when nobody will ever show anything new.
async fn news<T>(of: &mut watch::Receiver<T>) {
    if of.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn pass_on(events: &mpsc::Sender<Event>, event: Option<Event>) {
    if let Some(event) = event {
        // Nobody listening ends all of this soon: `run` waits for it.
        drop(events.send(event).await);
    }
}

/// Failures in a row, and what was last said of them.
#[derive(Default)]
struct Silence {
    failures: u32,
    said: Option<String>,
}

impl Silence {
    /// Takes another failure in; answers what is to be said, if it is news.
    fn goes_on(&mut self, failure: &Failure) -> Option<String> {
        self.failures = self.failures.saturating_add(1);
        if self.failures < SILENCE || self.said.as_ref() == Some(&failure.says) {
            return None;
        }
        self.said = Some(failure.says.clone());
        self.said.clone()
    }

    /// The server answers. Whether that is news.
    fn ends(&mut self) -> bool {
        self.failures = 0;
        self.said.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FailureKind;

    #[test]
    fn a_deny_list_is_lines_with_remarks() {
        let text = "node-x # stolen\n\n# nobody\n  node-y\nabc+/= of node-z";
        let map = ConfigMap {
            data: BTreeMap::from([
                ("nodes".to_owned(), text.to_owned()),
                ("more".to_owned(), "node-w".to_owned()),
            ]),
        };

        let expected = [
            ("abc+/=", "of node-z"),
            ("node-w", ""),
            ("node-x", "stolen"),
            ("node-y", ""),
        ];
        assert_eq!(
            denied(&map),
            expected
                .map(|(entry, remark)| (entry.to_owned(), remark.to_owned()))
                .into()
        );
    }

    #[test]
    fn a_text_that_is_no_json_is_no_node() {
        let unreadable = Unreadable {
            node: None,
            reason: "it is no JSON: expected value at line 1 column 1".to_owned(),
        };

        assert_eq!(read_node("Node"), Err(unreadable));
    }

    #[test]
    fn a_silence_is_told_after_some_failures_and_once() {
        let failure = |says: &str| Failure {
            kind: FailureKind::Server,
            retry_after: None,
            says: says.to_owned(),
        };
        let mut silence = Silence::default();

        let told: Vec<Option<String>> = ["a", "a", "a", "a", "b", "b"]
            .map(|says| silence.goes_on(&failure(says)))
            .into();

        let expected = [None, None, Some("a"), None, Some("b"), None];
        assert_eq!(told, expected.map(|says| says.map(str::to_owned)));
        assert!(silence.ends());
        assert!(!silence.ends());
        assert_eq!(silence.goes_on(&failure("a")), None);
    }
}
