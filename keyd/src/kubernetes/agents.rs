//! Asks all agents of a cluster at once, each in its pod, on behalf of an operator. Never judges what they say.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use kube::api::{ListParams, Request};
use shroud_model::NodeName;

use super::api::{Api, Credentials, Failure};
use super::exec::{Container, Output, exec};
use super::object::{AgentPod, Metadata, Object};
use super::page::{asked, page};
use crate::{Error, FailureKind};

/// The container of the agent in its pod, as deploy/ names it.
const CONTAINER: &str = "agent";
/// How many agents are asked at once: each is a connection to the API server, and another from there to a kubelet.
const AT_ONCE: usize = 16;
/// How long an agent gets, from the first byte of the connection to the last of its answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// A cluster, as an operator reaches it, and where its agents are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// The file with address and credentials; `None` for those that `kubectl` would use.
    pub kubeconfig: Option<PathBuf>,
    /// The context in there; `None` for the current one.
    pub context: Option<String>,
    /// The namespace of the agents' pods.
    pub namespace: String,
    /// The labels of the agents' pods, as a selector.
    pub selector: String,
}

/// A pod that was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its name.
    pub pod: String,
    /// What it said, or why it said nothing, in words that are safe to print.
    pub said: Result<Output, String>,
}

impl Cluster {
    /// Runs a command beside each agent. Each node of the cluster is in the answer; one without an agent's pod with `None`.
    ///
    /// # Errors
    /// [`Error::ApiServer`] when the API server cannot be asked, or does not let us ask the agents.
    pub async fn ask(&self, command: &[&str]) -> Result<BTreeMap<NodeName, Option<Asked>>, Error> {
        let api = Api::new(Credentials::Operator {
            kubeconfig: self.kubeconfig.clone(),
            context: self.context.clone(),
        });
        let answers = self.ask_through(&api, command).await;
        answers.map_err(|Failure { kind, says, .. }| Error::ApiServer { kind, says })
    }

    async fn ask_through(&self, api: &Api, command: &[&str]) -> Result<BTreeMap<NodeName, Option<Asked>>, Failure> {
        let pods_path = format!("/api/v1/namespaces/{}/pods", self.namespace);
        let (nodes, pods) = tokio::try_join!(
            list::<Metadata>(api, "list nodes", None, |params| {
                Request::new("/api/v1/nodes").list_metadata(params)
            }),
            list::<AgentPod>(api, "list the agents' pods", Some(&self.selector), |params| {
                Request::new(&pods_path).list(params)
            }),
        )?;
        let names = nodes.into_iter().filter_map(|node| node.name.parse().ok());
        let mut answers: BTreeMap<NodeName, Option<Asked>> = names.map(|name| (name, None)).collect();
        let asked = futures_util::stream::iter(one_per_node(pods))
            .map(|(node, pod)| async move { Ok((node, self.ask_one(api, &pod, command).await?)) });
        let asked: Vec<(NodeName, Asked)> = asked.buffer_unordered(AT_ONCE).try_collect().await?;
        for (node, asked) in asked {
            // A pod whose Node is gone is about to go itself.
            if let Some(answer) = answers.get_mut(&node) {
                *answer = Some(asked);
            }
        }
        Ok(answers)
    }

    /// Asks one agent. It is an error not to be allowed to: then there is no sense in asking the others.
    async fn ask_one(&self, api: &Api, pod: &AgentPod, command: &[&str]) -> Result<Asked, Failure> {
        let attempt = format!("ask the agent in pod {}", pod.name);
        let said = if pod.phase == "Running" {
            let container = Container {
                namespace: &self.namespace,
                pod: &pod.name,
                name: CONTAINER,
            };
            match tokio::time::timeout(PATIENCE, exec(api, &attempt, &container, command)).await {
                Ok(Ok(output)) => Ok(output),
                Ok(Err(failure)) if matches!(failure.kind, FailureKind::Unauthorized | FailureKind::Forbidden) => {
                    return Err(failure);
                }
                Ok(Err(failure)) => Err(failure.says),
                Err(_) => Err(format!("{attempt}: no answer within {} s", PATIENCE.as_secs())),
            }
        } else {
            Err(format!("pod {} is {}", pod.name, pod.phase.to_lowercase()))
        };
        Ok(Asked {
            pod: pod.name.clone(),
            said,
        })
    }
}

/// All pages of a list.
async fn list<T: Object>(
    api: &Api,
    attempt: &str,
    labels: Option<&str>,
    request: impl Fn(&ListParams) -> Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<Vec<T>, Failure> {
    let mut objects = Vec::new();
    let mut next = None;
    loop {
        let page = page(api, attempt, request(&asked(None, labels, next))).await?;
        objects.extend(page.objects);
        next = page.next;
        if next.is_none() {
            return Ok(objects);
        }
    }
}

/// The pod to ask on each node: while one replaces another there are two.
fn one_per_node(pods: Vec<AgentPod>) -> BTreeMap<NodeName, AgentPod> {
    let merit = |pod: &AgentPod| (pod.phase == "Running", !pod.ends, pod.created.clone());
    let mut chosen: BTreeMap<NodeName, AgentPod> = BTreeMap::new();
    for pod in pods {
        let Ok(node) = pod.node.parse() else { continue };
        if chosen.get(&node).is_none_or(|other| merit(&pod) > merit(other)) {
            chosen.insert(node, pod);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_pods_on_a_node_the_one_that_stays_is_asked() {
        let pod = |name: &str, node: &str, phase: &str, ends: bool, created: &str| AgentPod {
            name: name.to_owned(),
            node: node.to_owned(),
            phase: phase.to_owned(),
            ends,
            created: created.to_owned(),
        };

        let chosen = one_per_node(vec![
            pod("goes", "a", "Running", true, "2026-11-25T10:00:00Z"),
            pod("stays", "a", "Running", false, "2026-11-25T09:00:00Z"),
            pod("older", "b", "Running", false, "2026-11-25T09:00:00Z"),
            pod("newer", "b", "Running", false, "2026-11-25T10:00:00Z"),
            pod("still-there", "c", "Running", true, "2026-11-25T09:00:00Z"),
            pod("not-yet", "c", "Pending", false, "2026-11-25T10:00:00Z"),
            pod("nowhere", "", "Pending", false, "2026-11-25T10:00:00Z"),
        ]);

        let names: Vec<(&str, &str)> = chosen.iter().map(|(node, pod)| (node.as_str(), &*pod.name)).collect();
        assert_eq!(names, [("a", "stays"), ("b", "newer"), ("c", "still-there")]);
    }
}
