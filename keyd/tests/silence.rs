//! The Kubernetes source against an API server that takes a request and never answers it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;
use shroud_apiserver::{ApiServer, Effect, Fault, Identity, Requests, Verb};
use shroud_keyd::kubernetes::{Options, Wanted, run};
use shroud_keyd::{Event, FailureKind, Telemetry};
use tokio::sync::{mpsc, watch};

/// How long a watch may say nothing.
const IDLE: Duration = Duration::from_secs(2);
/// By when the next watch has told what the first did not; it would not have before an answer of any other kind is given up, after 70 s.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_watch_that_is_never_answered_is_given_up_when_it_has_been_idle_for_too_long() {
    for effect in [Effect::Hang, Effect::Silence] {
        let server = ApiServer::local(shroud_apiserver::Options::default()).unwrap();
        let watches = Requests::default().verb(Verb::Watch).resource("nodes");
        server.fault(Fault::new(effect.clone()).on(watches).times(1));
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig(&Identity::agent("node-a"))).unwrap();
        let options = Options {
            node: "node-a".parse().unwrap(),
            kubeconfig: Some(kubeconfig),
            deny_list: "shroud-denied".to_owned(),
            watch_idle: IDLE,
            opt_out: false,
            bridged: false,
        };
        let (sender, mut events) = mpsc::channel(16);
        let (telemetry_sender, telemetry) = watch::channel(Telemetry::default());
        let (_wanted_sender, wanted) = watch::channel(Wanted::default());
        let mut work = Box::pin(run(options, sender, wanted, telemetry_sender));

        let applied = async {
            loop {
                match events.recv().await.unwrap() {
                    Event::Listed(_) => {
                        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b"}});
                        server.put(node).unwrap();
                    }
                    Event::Applied(record) => break record.unwrap().node,
                    Event::Denied(_) => {}
                    other @ (Event::Deleted(_) | Event::OptedOut(_) | Event::Silent(_) | Event::Answers) => {
                        panic!("{other:?}")
                    }
                }
            }
        };
        let applied = tokio::select! {
            applied = tokio::time::timeout(PATIENCE, applied) => applied,
            () = &mut work => panic!("it ended"),
        };

        let node = applied.unwrap_or_else(|_| panic!("{effect:?}: {:?}", *telemetry.borrow()));
        assert_eq!(node.as_str(), "node-b");
        assert_eq!(telemetry.borrow().lists, 1);
        assert_eq!(telemetry.borrow().failures, BTreeMap::from([(FailureKind::Silent, 1)]));
    }
}
