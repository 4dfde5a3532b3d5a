//! What an agent of ours asks for beyond the recordings: its grants, its admission rule, conditions, events, and other objects.

use std::time::Duration;

use serde_json::{Value, json};
use shroud_apiserver::{ApiServer, Grant, Identity, Options};

use crate::client::{Client, Request};

const NODE_A: &str = "/api/v1/nodes/node-a";
const OURS: &str = "fieldManager=shroud-agent&force=true";

fn server() -> ApiServer {
    let options = Options {
        second: Duration::from_millis(100),
        ..Options::default()
    };
    let server = ApiServer::local(options).unwrap();
    for (index, name) in (1..).zip(["node-a", "node-b"]) {
        let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady"});
        server
            .put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
                "spec": {"podCIDRs": [format!("10.244.{index}.0/24")]}, "status": {"conditions": [ready]}}))
            .unwrap();
    }
    server
}

fn agent(server: &ApiServer) -> Client {
    Client::connect(server, &Identity::agent("node-a")).unwrap()
}

fn apply(path: &str, name: &str, part: &str, content: &Value) -> Request {
    let (metadata, mut object) = (json!({"name": name}), json!({"apiVersion": "v1", "kind": "Node"}));
    object["metadata"] = metadata;
    match part {
        "annotations" => object["metadata"]["annotations"] = content.clone(),
        _ => object["status"] = json!({part: content}),
    }
    Request::patch(&format!("{path}?{OURS}"), "apply-patch+yaml", &object)
}

#[test]
fn an_agent_announces_itself_and_nobody_else() {
    let server = server();
    let mut client = agent(&server);
    let announcement = json!({"shroud.dev/node": "{}"});

    let own = client
        .ask(&apply(NODE_A, "node-a", "annotations", &announcement))
        .unwrap();
    let foreign = client
        .ask(&apply("/api/v1/nodes/node-b", "node-b", "annotations", &announcement))
        .unwrap();
    let other = client
        .ask(&apply(NODE_A, "node-a", "annotations", &json!({"other": "x"})))
        .unwrap();
    let label = client
        .ask(&Request::patch(
            NODE_A,
            "merge-patch+json",
            &json!({"metadata": {"labels": {"a": "b"}}}),
        ))
        .unwrap();
    let mut unbound = Client::connect(&server, &Identity::UnboundAgent).unwrap();
    let unbound = unbound
        .ask(&apply(NODE_A, "node-a", "annotations", &announcement))
        .unwrap();

    assert_eq!(
        [own.status, foreign.status, other.status, label.status, unbound.status],
        [200, 403, 403, 403, 403]
    );
    assert_eq!(
        server.get("nodes", "", "node-a").unwrap().unwrap()["metadata"]["annotations"],
        announcement
    );
    assert!(
        foreign.json()["message"]
            .as_str()
            .unwrap()
            .ends_with("the agent on node 'node-a' may not change node 'node-b'")
    );
    assert!(
        unbound.json()["message"]
            .as_str()
            .unwrap()
            .ends_with("the token is not bound to a node")
    );
    server.set_policy(None);
    let unjudged = client
        .ask(&apply("/api/v1/nodes/node-b", "node-b", "annotations", &announcement))
        .unwrap();
    assert_eq!(unjudged.status, 200);
}

#[test]
fn an_agent_sets_its_own_condition_and_leaves_the_others() {
    let conditions = json!([{"type": "NetworkUnavailable", "status": "False", "reason": "ShroudIsUp"}]);
    let both = json!([{"type": "Ready", "status": "True", "reason": "KubeletReady"}, conditions[0]]);
    let path = &format!("{NODE_A}/status");
    let patch = json!({"status": {"conditions": conditions}});
    for request in [
        apply(path, "node-a", "conditions", &conditions),
        Request::patch(path, "strategic-merge-patch+json", &patch),
    ] {
        let server = server();

        let answer = agent(&server).ask(&request).unwrap();

        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(
            server.get("nodes", "", "node-a").unwrap().unwrap()["status"]["conditions"],
            both
        );
    }

    // A merge patch would replace the list, and the rule sees that.
    let server = server();
    let answer = agent(&server)
        .ask(&Request::patch(path, "merge-patch+json", &patch))
        .unwrap();
    assert_eq!(answer.status, 403, "{}", answer.text());
    let ready = json!([{"type": "Ready", "status": "False"}]);
    let answer = agent(&server)
        .ask(&apply(path, "node-a", "conditions", &ready))
        .unwrap();
    assert_eq!(answer.status, 403, "{}", answer.text());
}

#[test]
fn grants_decide_and_reviews_say_so() {
    let server = server();
    let mut client = agent(&server);
    let mut may = |verb: &str, resource: &str, namespace: &str| {
        let attributes = json!({"verb": verb, "resource": resource, "namespace": namespace});
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}});
        let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        let request = Request::new("POST", path)
            .header("Content-Type", "application/json")
            .body(&review.to_string());
        client.ask(&request).unwrap().json()["status"]["allowed"] == true
    };

    assert_eq!(
        [
            may("patch", "nodes", ""),
            may("delete", "nodes", ""),
            may("create", "nodes", "")
        ],
        [true, false, false]
    );
    assert_eq!(
        [
            may("watch", "configmaps", "shroud-system"),
            may("watch", "configmaps", "default")
        ],
        [true, false]
    );
    server.set_grants(vec![Grant::new(
        "system:serviceaccount:shroud-system:shroud",
        "get",
        "",
        "nodes",
    )]);
    assert_eq!([may("patch", "nodes", ""), may("get", "nodes", "")], [false, true]);
    let list = agent(&server).ask(&Request::get("/api/v1/nodes")).unwrap();
    assert_eq!(
        (list.status, list.header("X-Content-Type-Options")),
        (403, Some("nosniff"))
    );
}

#[test]
fn a_deny_list_is_watched_by_its_name() {
    let server = server();
    let map = |name: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "shroud-system"}, "data": {"node-b": ""}});
    let mut client = agent(&server);
    let path = "/api/v1/namespaces/shroud-system/configmaps?fieldSelector=metadata.name%3Dshroud-denied";

    client
        .open(&Request::get(&format!("{path}&watch=1&timeoutSeconds=5")))
        .unwrap();
    server.put(map("other")).unwrap();
    server.put(map("shroud-denied")).unwrap();
    server.delete("configmaps", "shroud-system", "shroud-denied").unwrap();

    let (lines, _) = client.lines();
    let events: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seen: Vec<_> = events
        .iter()
        .map(|event| {
            (
                event["type"].as_str().unwrap(),
                event["object"]["data"]["node-b"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(seen, [("ADDED", ""), ("DELETED", "")]);
    let elsewhere = client
        .ask(&Request::get("/api/v1/namespaces/default/configmaps"))
        .unwrap();
    assert_eq!(elsewhere.status, 403);
}

#[test]
fn pods_are_selected_by_their_node() {
    let server = server();
    for (name, node) in [("p1", "node-a"), ("p2", "node-b")] {
        server
            .put(
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
                "spec": {"nodeName": node, "containers": []}, "status": {"podIPs": [{"ip": "10.244.1.2"}]}}),
            )
            .unwrap();
    }

    let list = agent(&server)
        .ask(&Request::get("/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-a"))
        .unwrap()
        .json();

    let names: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pod| pod["metadata"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["p1"]);
}

#[test]
fn events_are_created_and_what_is_missing_is_named() {
    let server = server();
    let path = "/apis/events.k8s.io/v1/namespaces/default/events";
    let mut event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"generateName": "node-b."},
        "eventTime": "2026-01-01T00:00:07.000000Z", "reportingController": "shroud.dev/agent", "reportingInstance": "node-a",
        "action": "Refuse", "reason": "AnnouncementRefused", "type": "Warning", "note": "no",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": "node-b"}});
    let post = |event: &Value| {
        Request::new("POST", path)
            .header("Content-Type", "application/json")
            .body(&event.to_string())
    };

    let created = agent(&server).ask(&post(&event)).unwrap();
    event["eventTime"] = "2026-01-01T00:00:07Z".into();
    event.as_object_mut().unwrap().remove("action");
    let refused = agent(&server).ask(&post(&event)).unwrap();

    assert_eq!(created.status, 201, "{}", created.text());
    assert!(
        created.json()["metadata"]["name"]
            .as_str()
            .unwrap()
            .starts_with("node-b.")
    );
    assert_eq!(refused.status, 422);
    let causes = refused.json()["details"]["causes"].clone();
    let fields: Vec<_> = causes
        .as_array()
        .unwrap()
        .iter()
        .map(|cause| cause["field"].as_str().unwrap())
        .collect();
    assert_eq!(fields, ["action", "eventTime"]);
    assert_eq!(server.list("events").unwrap().len(), 1);
}

#[test]
fn a_namespace_must_exist() {
    let server = server();

    let refused =
        server.put(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "nowhere"}}));

    assert_eq!(
        refused.unwrap_err().to_string(),
        "namespaces \"nowhere\" not found (404)"
    );
}

#[test]
fn put_replaces_whatever_is_there() {
    let server = server();
    let lease = |holder: &str| {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l", "namespace": "default"},
            "spec": {"holderIdentity": holder}})
    };
    server.put(lease("a")).unwrap();

    server.put(lease("b")).unwrap();
    let status = json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]});
    server
        .patch(
            "nodes",
            "",
            "node-a",
            &json!({"status": status, "metadata": {"labels": {"x": "y"}}}),
        )
        .unwrap();

    assert_eq!(
        server.get("leases", "default", "l").unwrap().unwrap()["spec"]["holderIdentity"],
        "b"
    );
    let node = server.get("nodes", "", "node-a").unwrap().unwrap();
    assert_eq!(
        (&node["status"]["addresses"], &node["metadata"]["labels"]["x"]),
        (&status["addresses"], &json!("y"))
    );
}

#[test]
fn credentials_in_files_are_renewed_in_place() {
    let server = server();
    let folder = std::env::temp_dir().join(format!("shroud-apiserver-{}", std::process::id()));
    let identity = Identity::agent("node-a");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();

    let kubeconfig = server.kubeconfig_in(&identity, &folder).unwrap();
    let (token, authority) = (read("token"), read("ca.crt"));
    server.issue_token(&identity);
    server.rotate_authority().unwrap();
    server.write_credentials(&identity, &folder).unwrap();

    assert!(kubeconfig.contains(&format!("tokenFile: {}", folder.join("token").display())));
    assert_ne!((read("token"), read("ca.crt")), (token.clone(), authority));
    let mut client = Client::to(server.addresses()[0], &read("ca.crt"), Some(read("token"))).unwrap();
    assert_eq!(client.ask(&Request::get(NODE_A)).unwrap().status, 200);
    let mut old = Client::to(server.addresses()[0], &read("ca.crt"), Some(token)).unwrap();
    assert_eq!(
        old.ask(&Request::get(NODE_A)).unwrap().status,
        200,
        "the old token is good until it is revoked"
    );
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_watch_that_has_been_answered_misses_nothing() {
    let server = server();
    let path = "/api/v1/nodes?watch=1&sendInitialEvents=false&resourceVersionMatch=NotOlderThan&timeoutSeconds=600";
    for round in 0..100 {
        let mut client = agent(&server);

        client.open(&Request::get(path)).unwrap();
        let value = round.to_string();
        server
            .patch(
                "nodes",
                "",
                "node-a",
                &json!({"metadata": {"labels": {"round": value}}}),
            )
            .unwrap();

        let line: Value = serde_json::from_slice(&client.chunk().unwrap().unwrap()).unwrap();
        assert_eq!(line["object"]["metadata"]["labels"]["round"], value);
    }
}
