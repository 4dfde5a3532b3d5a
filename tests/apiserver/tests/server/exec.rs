//! Commands in pods, over WebSockets: what a client sees, and what the test is asked.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use shroud_apiserver::{ApiServer, Exec, Executed, Grant, Identity, Options};

use crate::client::{Answer, Client, End, Request};

const EXEC: &str = "/api/v1/namespaces/shroud-system/pods/shroud-x/exec";

/// A server with a pod on a node, two without, and users who may do more or less.
fn server() -> ApiServer {
    let may = |who: &str, verbs: &str| Grant::new(who, verbs, "", "pods/exec").within("shroud-system");
    let options = Options {
        grants: vec![may("operator", "get create"), may("reader", "get")],
        ..Options::default()
    };
    let server = ApiServer::local(options).unwrap();
    let containers = json!([{ "name": "agent", "image": "shroud" }]);
    let two = json!([{ "name": "agent", "image": "shroud" }, { "name": "proxy", "image": "proxy" }]);
    for (name, containers, node) in [
        ("shroud-x", &containers, json!("node-a")),
        ("shroud-y", &containers, Value::Null),
        ("shroud-z", &two, json!("node-b")),
    ] {
        let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "shroud-system" },
            "spec": { "containers": containers } });
        if !node.is_null() {
            pod["spec"]["nodeName"] = node;
        }
        server.put(pod).unwrap();
    }
    server
}

/// The example of RFC 6455, section 1.3, with the subprotocols that kubectl offers.
fn upgrade(path: &str) -> Request {
    Request::get(path)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("Sec-WebSocket-Protocol", "v5.channel.k8s.io, v4.channel.k8s.io")
}

fn operator(server: &ApiServer) -> Client {
    Client::connect(server, &Identity::User("operator".into())).unwrap()
}

/// All that comes until the server closes, by channel.
fn conversation(client: &mut Client) -> Vec<(u8, Vec<u8>)> {
    let mut messages = Vec::new();
    loop {
        match client.frame().unwrap() {
            (0x2, message) => messages.push((message[0], message[1..].to_vec())),
            (0x8, code) => {
                assert_eq!(code, 1000_u16.to_be_bytes());
                return messages;
            }
            other => panic!("an unexpected frame: {other:?}"),
        }
    }
}

#[test]
fn a_command_prints_and_ends_as_the_test_says() {
    let server = server();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let asked = seen.clone();
    server.on_exec(move |exec| {
        asked.lock().unwrap().push(exec.clone());
        Executed::Ended {
            stdout: vec![b'x'; 70_000],
            stderr: b"oh".to_vec(),
            code: 3,
        }
    });
    let mut client = operator(&server);

    let head = client
        .open(&upgrade(&format!(
            "{EXEC}?command=shroud&command=-o+json&container=agent&stdout=true"
        )))
        .unwrap();
    let messages = conversation(&mut client);

    assert_eq!(head.status, 101);
    for (name, value) in [
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        ("Sec-WebSocket-Protocol", "v5.channel.k8s.io"),
    ] {
        assert_eq!(head.header(name), Some(value));
    }
    let lengths: Vec<(u8, usize)> = messages.iter().map(|(channel, text)| (*channel, text.len())).collect();
    assert_eq!(lengths[..5], [(1, 0), (1, 32_768), (1, 32_768), (1, 4_464), (2, 2)]);
    let [.., (3, status)] = messages.as_slice() else {
        panic!("no status: {lengths:?}");
    };
    let status: Value = serde_json::from_slice(status).unwrap();
    assert_eq!(
        (&status["reason"], &status["details"]["causes"]),
        (
            &json!("NonZeroExitCode"),
            &json!([{ "reason": "ExitCode", "message": "3" }])
        )
    );
    let exec = Exec {
        namespace: "shroud-system".into(),
        pod: "shroud-x".into(),
        node: "node-a".into(),
        container: "agent".into(),
        command: vec!["shroud".into(), "-o json".into()],
        username: "operator".into(),
    };
    assert_eq!(*seen.lock().unwrap(), [exec]);
}

#[test]
fn a_command_that_succeeds_and_one_that_never_runs_are_told_apart() {
    let server = server();
    let mut client = operator(&server);
    client.open(&upgrade(&format!("{EXEC}?command=true"))).unwrap();
    let never = conversation(&mut client);
    server.on_exec(|_| Executed::Ended {
        stdout: Vec::new(),
        stderr: Vec::new(),
        code: 0,
    });
    let mut client = operator(&server);
    client.open(&upgrade(&format!("{EXEC}?command=true"))).unwrap();
    let well = conversation(&mut client);

    let status = json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
        "message": "Internal error occurred: container not found (\"agent\")",
        "details": {"causes": [{"message": "container not found (\"agent\")"}]}});
    let told = |messages: &[(u8, Vec<u8>)]| serde_json::from_slice::<Value>(&messages[1].1).unwrap();
    assert_eq!((never.len(), told(&never)), (2, status));
    assert_eq!(
        (well.len(), told(&well)),
        (2, json!({"metadata": {}, "status": "Success"}))
    );
}

#[test]
fn what_cannot_be_run_is_refused_before_there_is_a_websocket() {
    let server = server();
    let path = |pod: &str, query: &str| format!("/api/v1/namespaces/shroud-system/pods/{pod}/exec?command=true{query}");
    let ask = |who: &str, request: &Request| -> Answer {
        let mut client = Client::connect(&server, &Identity::User(who.into())).unwrap();
        client.ask(request).unwrap()
    };
    let said = |answer: &Answer| (answer.status, answer.json()["message"].as_str().unwrap().to_owned());

    let cases = [
        (upgrade(&path("nobody", "")), 404, "pods \"nobody\" not found"),
        (
            upgrade(&path("shroud-x", "&container=proxy")),
            400,
            "container proxy is not valid for pod shroud-x",
        ),
        (
            upgrade(&path("shroud-z", "")),
            400,
            "a container name must be specified for pod shroud-z, choose one of: [agent proxy]",
        ),
        (
            upgrade(&path("shroud-y", "")),
            400,
            "pod shroud-y does not have a host assigned",
        ),
        (Request::get(&path("shroud-x", "")), 400, "Upgrade request required"),
        (
            upgrade(&path("shroud-x", "")).header("Sec-WebSocket-Protocol", "base64.channel.k8s.io"),
            400,
            "none of the subprotocols is one of v5.channel.k8s.io, v4.channel.k8s.io",
        ),
    ];
    for (request, status, message) in cases {
        assert_eq!(said(&ask("operator", &request)), (status, message.to_owned()));
    }
    // To read is not to run, though the request is a GET.
    let (status, message) = said(&ask("reader", &upgrade(&path("shroud-x", ""))));
    assert_eq!(status, 403);
    assert!(message.contains("cannot create resource \"pods/exec\""), "{message}");
    let (status, message) = said(&ask("nobody", &upgrade(&path("shroud-x", ""))));
    assert_eq!(status, 403);
    assert!(message.contains("cannot get resource \"pods/exec\""), "{message}");
}

#[test]
fn a_connection_ends_in_the_middle_of_a_command() {
    let server = server();
    server.on_exec(|_| {
        std::thread::sleep(Duration::from_secs(2));
        Executed::no_container("agent")
    });
    let mut client = operator(&server);
    let head = client.open(&upgrade(&format!("{EXEC}?command=sleep"))).unwrap();

    server.cut_connections();

    assert_eq!((head.status, client.frame()), (101, Err(End::Cut)));
}
