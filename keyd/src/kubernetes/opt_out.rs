//! Follows who has opted out of encryption: pods by their own label, and all pods of a namespace by the namespace's.
//!
//! ```text
//!  namespaces with the label ──> for each of them: its pods ──┐
//!  pods with the label ───────────────────────────────────────┴─> Labelled ── Event::OptedOut
//! ```
//!
//! An opt-out is a permission, and one that nobody can confirm has lapsed: until everything was listed, and whenever the API server falls
//! silent on any part of it, nobody can say who has opted out. Going back to encryption costs a connection nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

use tokio::sync::{mpsc, watch};

use super::api::Api;
use super::follow::{Collection, Update, follow};
use super::object::{Namespace, Pod};
use super::pace::Pace;
use super::{Options, Silence, Telemetry, pass_on};
use crate::opt_out::{LABEL, OptOut, OptOutBy, OptOuts};
use crate::source::Event;

/// The value of the label that opts out; with any other, a pod stays although its namespace opts out.
const OUT: &str = "false";
/// The most namespaces whose pods are followed; each costs a watch. The pods of those beyond stay encrypted.
const MAX_NAMESPACES: usize = 64;
/// How many updates may wait until they are taken in.
const UPDATES: usize = 64;

/// Which part of it an update is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// The namespaces that opt out.
    Namespaces,
    /// The pods that have the label themselves.
    Pods,
    /// The pods of a namespace that opts out.
    PodsOf(String),
}

/// An update, and of what.
enum News {
    Namespaces(Update<Namespace>),
    Pods(Part, Update<Pod>),
}

/// What is known of the labels.
#[derive(Default)]
struct Labelled {
    namespaces: Option<BTreeSet<String>>,
    /// By part, then by key; a part is missing until it was listed.
    pods: BTreeMap<Part, BTreeMap<String, Pod>>,
    /// What the API server has to say of the parts it does not answer on.
    silent: BTreeMap<Part, String>,
}

/// Followers of namespaces' pods. They are polled together: there are few, and each does little.
type Followers<'a> = BTreeMap<String, Pin<Box<dyn Future<Output = Infallible> + 'a>>>;

/// Follows the labels for ever, and tells whenever it changes who has opted out.
pub(super) async fn follow_opt_outs(
    api: &Api,
    options: &Options,
    events: &mpsc::Sender<Event>,
    telemetry: &watch::Sender<Telemetry>,
) -> Infallible {
    if !options.opt_out {
        std::future::pending::<()>().await;
    }
    let (sender, mut news) = mpsc::channel(UPDATES);
    let collection = |name, path: String, labelled: bool| Collection {
        name,
        path,
        fields: None,
        labels: labelled.then(|| format!("{LABEL}={OUT}")),
        idle: options.watch_idle,
    };
    let follow_pods = |part: Part| {
        let pods = match &part {
            Part::Namespaces | Part::Pods => collection("pods that opt out", "/api/v1/pods".to_owned(), true),
            Part::PodsOf(namespace) => collection(
                "pods of a namespace that opts out",
                format!("/api/v1/namespaces/{namespace}/pods"),
                false,
            ),
        };
        let sender = sender.clone();
        async move {
            let mut tell = async |update| drop(sender.send(News::Pods(part.clone(), update)).await);
            follow(api, &pods, Pace::new(Instant::now()), &mut tell).await
        }
    };
    let follow_namespaces = async {
        let namespaces = collection("namespaces that opt out", "/api/v1/namespaces".to_owned(), true);
        let mut tell = async |update| drop(sender.send(News::Namespaces(update)).await);
        follow(api, &namespaces, Pace::new(Instant::now()), &mut tell).await
    };
    let follow_labelled_pods = follow_pods(Part::Pods);
    let take_in = async {
        let mut labelled = Labelled::default();
        let mut followers = Followers::new();
        let mut silences: BTreeMap<Part, Silence> = BTreeMap::new();
        let mut told = None;
        loop {
            let news = tokio::select! {
                news = news.recv() => news.expect("this very function holds a sender"),
                never = all(&mut followers) => match never {},
            };
            let (part, failure, answers) = match news {
                News::Namespaces(update) => {
                    let (failure, answers) = word(&update);
                    labelled.take_namespace(update);
                    (Part::Namespaces, failure, answers)
                }
                News::Pods(part, update) => {
                    let (failure, answers) = word(&update);
                    labelled.take_pod(&part, update);
                    (part, failure, answers)
                }
            };
            let silence = silences.entry(part.clone()).or_default();
            if let Some(failure) = failure {
                telemetry.send_modify(|telemetry| telemetry.count(failure.kind));
                if let Some(says) = silence.goes_on(&failure) {
                    labelled.silent.insert(part, says);
                }
            } else if answers {
                silence.ends();
                labelled.silent.remove(&part);
            }
            let namespaces = labelled.namespaces();
            followers.retain(|namespace, _| namespaces.contains(namespace));
            for namespace in &namespaces {
                followers
                    .entry(namespace.clone())
                    .or_insert_with(|| Box::pin(follow_pods(Part::PodsOf(namespace.clone()))));
            }
            let problem = labelled.problem();
            telemetry.send_if_modified(|telemetry| {
                let differs = telemetry.no_opt_outs != problem;
                telemetry.no_opt_outs = problem;
                differs
            });
            let opted_out = labelled.opted_out();
            if told.as_ref() != Some(&opted_out) {
                told = Some(opted_out.clone());
                pass_on(events, Some(Event::OptedOut(opted_out))).await;
            }
        }
    };
    tokio::select! {
        never = follow_namespaces => match never {},
        never = follow_labelled_pods => match never {},
        never = take_in => never,
    }
}

/// Whether an update is a failure, and whether it shows that the server answers.
fn word<T>(update: &Update<T>) -> (Option<super::Failure>, bool) {
    match update {
        Update::Failed(failure) => (Some(failure.clone()), false),
        Update::Listed(_) | Update::Watches => (None, true),
        Update::Applied(_) | Update::Deleted(_) | Update::Lists => (None, false),
    }
}

/// Drives all followers, for ever.
async fn all(followers: &mut Followers<'_>) -> Infallible {
    poll_fn(|context| {
        for follower in followers.values_mut() {
            if let Poll::Ready(never) = follower.as_mut().poll(context) {
                match never {}
            }
        }
        Poll::Pending
    })
    .await
}

impl Labelled {
    fn take_namespace(&mut self, update: Update<Namespace>) {
        match update {
            Update::Listed(all) => self.namespaces = Some(all.into_iter().map(|Namespace(name)| name).collect()),
            Update::Applied(Namespace(name)) => {
                self.namespaces.get_or_insert_default().insert(name);
            }
            Update::Deleted(name) => {
                self.namespaces.get_or_insert_default().remove(&name);
            }
            Update::Lists | Update::Watches | Update::Failed(_) => return,
        }
        let followed = self.namespaces();
        let is_followed = |part: &Part| match part {
            Part::PodsOf(namespace) => followed.contains(namespace),
            Part::Namespaces | Part::Pods => true,
        };
        self.pods.retain(|part, _| is_followed(part));
        self.silent.retain(|part, _| is_followed(part));
    }

    fn take_pod(&mut self, part: &Part, update: Update<Pod>) {
        if let Part::PodsOf(namespace) = part
            && !self.namespaces().contains(namespace)
        {
            // It was on its way when the namespace opted in again.
            return;
        }
        match update {
            Update::Listed(all) => {
                let all = all.into_iter().map(|pod| (pod.key.clone(), pod));
                self.pods.insert(part.clone(), all.collect());
            }
            Update::Applied(pod) => {
                let pods = self.pods.entry(part.clone()).or_default();
                pods.insert(pod.key.clone(), pod);
            }
            Update::Deleted(key) => {
                self.pods.entry(part.clone()).or_default().remove(&key);
            }
            Update::Lists | Update::Watches | Update::Failed(_) => {}
        }
    }

    /// The namespaces whose pods are followed.
    fn namespaces(&self) -> BTreeSet<String> {
        self.namespaces.iter().flatten().take(MAX_NAMESPACES).cloned().collect()
    }

    /// All pods that have opted out; `None` while that is not known.
    fn opted_out(&self) -> Option<OptOuts> {
        self.namespaces.as_ref()?;
        let parts = self.namespaces().into_iter().map(Part::PodsOf).chain([Part::Pods]);
        if !self.silent.is_empty() || !parts.into_iter().all(|part| self.pods.contains_key(&part)) {
            return None;
        }
        let mut opted_out = OptOuts::new();
        for (part, pods) in &self.pods {
            for pod in pods.values() {
                let by = match (pod.encrypt.as_deref(), part) {
                    (Some(OUT), _) => OptOutBy::Pod,
                    (None, Part::PodsOf(_)) => OptOutBy::Namespace,
                    (Some(_) | None, _) => continue,
                };
                let Some(node) = &pod.node else { continue };
                let claim = OptOut {
                    pod: pod.key.clone(),
                    node: node.clone(),
                    by,
                };
                opted_out.extend(pod.addresses.iter().map(|address| (*address, claim.clone())));
            }
        }
        Some(opted_out)
    }

    /// What an operator should know.
    fn problem(&self) -> Option<String> {
        let beyond = self
            .namespaces
            .as_ref()
            .map_or(0, BTreeSet::len)
            .saturating_sub(MAX_NAMESPACES);
        let first = self.silent.values().next().cloned();
        first.or_else(|| {
            (beyond > 0).then(|| {
                format!("{beyond} namespaces more than {MAX_NAMESPACES} opt out; the pods of those last in the alphabet stay encrypted")
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FailureKind;
    use crate::kubernetes::api::Failure;

    fn pod(key: &str, address: &str, encrypt: Option<&str>) -> Pod {
        Pod {
            key: key.to_owned(),
            node: Some("node-a".parse().unwrap()),
            addresses: vec![address.parse().unwrap()],
            encrypt: encrypt.map(str::to_owned),
        }
    }

    fn shop() -> Part {
        Part::PodsOf("shop".to_owned())
    }

    /// Namespace `shop` opts out, and pod `other/x` by itself.
    fn labelled() -> Labelled {
        let mut labelled = Labelled::default();
        labelled.take_namespace(Update::Listed(vec![Namespace("shop".to_owned())]));
        let x = pod("other/x", "10.244.1.1", Some("false"));
        labelled.take_pod(&Part::Pods, Update::Listed(vec![x]));
        let members = vec![
            pod("shop/cart", "10.244.1.2", None),
            pod("shop/till", "10.244.1.3", Some("true")),
            pod("shop/loud", "10.244.1.4", Some("false")),
        ];
        labelled.take_pod(&shop(), Update::Listed(members));
        labelled
    }

    fn told(labelled: &Labelled) -> Option<Vec<String>> {
        let line = |(address, claim): (_, OptOut)| format!("{address} {} by {}", claim.pod, claim.by);
        Some(labelled.opted_out()?.into_iter().map(line).collect())
    }

    #[test]
    fn a_pods_own_label_counts_before_its_namespaces() {
        assert_eq!(
            told(&labelled()).unwrap(),
            [
                "10.244.1.1 other/x by pod",
                "10.244.1.2 shop/cart by namespace",
                "10.244.1.4 shop/loud by pod"
            ]
        );
    }

    #[test]
    fn nobody_can_say_until_everything_was_listed() {
        let mut labelled = Labelled::default();
        assert_eq!(told(&labelled), None);
        labelled.take_namespace(Update::Listed(vec![Namespace("shop".to_owned())]));
        assert_eq!(told(&labelled), None);
        labelled.take_pod(&Part::Pods, Update::Listed(Vec::new()));
        assert_eq!(told(&labelled), None);
        labelled.take_pod(&shop(), Update::Listed(Vec::new()));
        assert_eq!(told(&labelled).unwrap(), [""; 0]);
    }

    #[test]
    fn a_silent_server_confirms_no_opt_out() {
        let mut labelled = labelled();
        let failure = Failure::new(FailureKind::Server, "watch pods", "no");

        labelled.silent.insert(shop(), failure.says.clone());
        assert_eq!(told(&labelled), None);
        assert_eq!(labelled.problem(), Some("watch pods: no".to_owned()));

        labelled.silent.clear();
        assert_eq!(told(&labelled).unwrap().len(), 3);
        assert_eq!(labelled.problem(), None);
    }

    #[test]
    fn what_opts_in_again_or_goes_is_out_no_more() {
        let mut labelled = labelled();

        labelled.take_pod(&Part::Pods, Update::Deleted("other/x".to_owned()));
        labelled.take_pod(&shop(), Update::Applied(pod("shop/loud", "10.244.1.4", Some("yes"))));
        assert_eq!(told(&labelled).unwrap(), ["10.244.1.2 shop/cart by namespace"]);

        labelled.silent.insert(shop(), "no".to_owned());
        labelled.take_namespace(Update::Deleted("shop".to_owned()));
        assert_eq!(told(&labelled).unwrap(), [""; 0]);
        labelled.take_pod(&shop(), Update::Applied(pod("shop/cart", "10.244.1.2", None)));
        assert_eq!(told(&labelled).unwrap(), [""; 0]);
    }

    #[test]
    fn too_many_namespaces_are_left_out_and_told() {
        let mut labelled = Labelled::default();
        let names = (0..MAX_NAMESPACES + 2).map(|number| Namespace(format!("n{number:03}")));

        labelled.take_namespace(Update::Listed(names.collect()));

        assert_eq!(labelled.namespaces().len(), MAX_NAMESPACES);
        let problem = labelled.problem().unwrap();
        assert!(problem.starts_with("2 namespaces more than 64 opt out"), "{problem}");
    }
}
