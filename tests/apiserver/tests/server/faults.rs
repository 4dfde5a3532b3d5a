//! Each thing that can go wrong does, and goes right again when the fault is cleared.

use std::time::Duration;

use serde_json::{Value, json};
use shroud_apiserver::{Answer, ApiServer, Effect, Fault, Identity, Options, Requests, Verb, WatchEffect};

use crate::client::{Client, End, Request};

const NODES: &str = "/api/v1/nodes";
const WATCH: &str = "/api/v1/nodes?watch=1&resourceVersion=0";

fn server() -> ApiServer {
    let server = ApiServer::local(Options::default()).unwrap();
    server.put(node("node-a")).unwrap();
    server
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": ["10.244.1.0/24"]}})
}

fn admin(server: &ApiServer) -> Client {
    Client::connect(server, &Identity::Admin).unwrap()
}

fn status(server: &ApiServer, path: &str) -> u16 {
    admin(server).ask(&Request::get(path)).unwrap().status
}

#[test]
fn an_answer_by_hand_comes_as_often_as_it_should() {
    let server = server();
    server.fault(
        Fault::answer(Answer::too_many_requests(7))
            .on(Requests::lists("nodes"))
            .times(2),
    );

    let first = admin(&server).ask(&Request::get(NODES)).unwrap();

    assert_eq!(
        (first.status, first.header("Retry-After"), first.text().as_str()),
        (429, Some("7"), "Too many requests, please try again later.\n")
    );
    assert_eq!(
        [
            status(&server, "/api/v1/nodes/node-a"),
            status(&server, NODES),
            status(&server, NODES)
        ],
        [200, 429, 200]
    );
}

#[test]
fn a_fault_by_path_meets_readiness() {
    let server = server();
    server.fault(Fault::answer(Answer::internal_error()).on(Requests::default().path("/readyz")));

    assert_eq!((status(&server, "/readyz"), status(&server, "/livez")), (500, 200));
    server.clear_faults();
    assert_eq!(status(&server, "/readyz"), 200);
}

#[test]
fn a_delay_delays_and_a_hang_hangs() {
    let server = server();
    server.fault(Fault::new(Effect::Delay(Duration::from_millis(300))).times(1));
    let start = std::time::Instant::now();
    assert_eq!(status(&server, NODES), 200);
    assert!(start.elapsed() >= Duration::from_millis(300));

    server.fault(Fault::new(Effect::Hang).on(Requests::patches("nodes")));
    let mut client = admin(&server);
    client
        .send(&Request::patch("/api/v1/nodes/node-a", "merge-patch+json", &json!({})))
        .unwrap();
    assert!(client.is_silent_for(Duration::from_millis(300)));
    assert_eq!(status(&server, NODES), 200);
}

#[test]
fn a_reset_is_a_reset_and_a_cut_body_is_no_end() {
    let server = server();
    server.fault(Fault::new(Effect::Reset).times(1));
    let mut client = admin(&server);
    client.send(&Request::get(NODES)).unwrap();
    assert_eq!(client.chunk(), Err(End::Reset));

    server.fault(Fault::new(Effect::CutBody).times(1));
    let error = admin(&server).ask(&Request::get(NODES)).unwrap_err().to_string();
    assert!(error.contains("Cut"), "{error}");

    server.fault(Fault::new(Effect::TruncateBody).times(1));
    let half = admin(&server).ask(&Request::get(NODES)).unwrap();
    assert_eq!(half.status, 200);
    serde_json::from_slice::<Value>(&half.body).unwrap_err();
    assert_eq!(status(&server, NODES), 200);
}

#[test]
fn an_open_watch_meets_faults() {
    let effects: [(WatchEffect, &[&str], End); 6] = [
        (WatchEffect::End, &[], End::Clean),
        (
            WatchEffect::expired(460, 471),
            &["too old resource version: 460 (471)"],
            End::Clean,
        ),
        (
            WatchEffect::error(500, "InternalError", "x"),
            &["InternalError"],
            End::Clean,
        ),
        (WatchEffect::Cut, &[], End::Cut),
        (WatchEffect::Reset, &[], End::Reset),
        (WatchEffect::Line(b"{garbage".to_vec()), &["{garbage"], End::Clean),
    ];
    for (effect, expected, end) in effects {
        let server = server();
        let mut client = admin(&server);
        client
            .open(&Request::get(&format!("{WATCH}&timeoutSeconds=1")))
            .unwrap();
        client.chunk().unwrap().expect("the node that is there");

        server.fault(Fault::watch(effect.clone()).on(Requests::watches("nodes")).times(1));

        let (lines, found) = client.lines();
        assert_eq!(found, end, "{effect:?}");
        assert_eq!(lines.len(), expected.len(), "{effect:?}: {lines:?}");
        assert!(
            lines.iter().zip(expected).all(|(line, part)| line.contains(part)),
            "{effect:?}: {lines:?}"
        );
    }
}

#[test]
fn a_silent_watch_stays_open_and_says_nothing() {
    let server = server();
    let mut client = admin(&server);
    client.open(&Request::get(WATCH)).unwrap();
    client.chunk().unwrap().expect("the node that is there");
    server.fault(Fault::watch(WatchEffect::Silence).times(1));

    server
        .patch("nodes", "", "node-a", &json!({"metadata": {"labels": {"a": "b"}}}))
        .unwrap();

    assert!(client.is_silent_for(Duration::from_millis(300)));
    assert_eq!(status(&server, NODES), 200);
    server.clear_faults();
    assert_eq!(client.chunk(), Err(End::Reset));
}

#[test]
fn a_fault_that_is_armed_already_meets_a_watch_after_its_first_events() {
    for round in 0..40 {
        for (effect, end) in [
            (WatchEffect::Silence, None),
            (WatchEffect::Reset, Some(End::Reset)),
            (WatchEffect::Cut, Some(End::Cut)),
        ] {
            let server = server();
            server.fault(Fault::watch(effect).times(1));

            let mut client = admin(&server);
            client.set_patience(Duration::from_secs(2));
            let head = client.open(&Request::get(WATCH)).unwrap();
            let first = client
                .chunk()
                .unwrap_or_else(|end| panic!("round {round}: {end:?} before the node that is there"));

            assert_eq!(head.status, 200);
            assert!(String::from_utf8(first.unwrap()).unwrap().contains("\"ADDED\""));
            match end {
                Some(end) => assert_eq!(client.chunk(), Err(end), "round {round}"),
                None => assert!(client.is_silent_for(Duration::from_millis(30))),
            }
        }
    }
}

#[test]
fn a_silent_server_accepts_and_answers_nothing() {
    let server = server();
    let mut open = admin(&server);
    assert_eq!(open.ask(&Request::get(NODES)).unwrap().status, 200);

    server.silence();

    open.send(&Request::get(NODES)).unwrap();
    assert!(open.is_silent_for(Duration::from_millis(200)));
    let fresh = std::net::TcpStream::connect(server.addresses()[0]).unwrap();
    fresh.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let outcome = std::io::Read::read(&mut &fresh, &mut [0]).unwrap_err();
    assert_eq!(outcome.kind(), std::io::ErrorKind::WouldBlock);
    server.clear_faults();
    assert_eq!(status(&server, NODES), 200);
}

#[test]
fn a_server_that_is_not_there_refuses_and_comes_back_on_its_port() {
    let chosen = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let asked_for = ApiServer::start(vec![std::net::TcpListener::bind(chosen).unwrap()], Options::default()).unwrap();
    for server in [server(), asked_for] {
        let address = server.addresses()[0];
        let mut open = admin(&server);

        server.refuse().unwrap();

        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(
            open.ask(&Request::get(NODES)).unwrap().status,
            200,
            "open connections go on"
        );
        server.cut_connections();
        open.send(&Request::get(NODES)).ok();
        assert!(open.chunk().is_err());
        server.accept().unwrap();
        assert_eq!(status(&server, NODES), 200);
        assert_eq!(server.addresses()[0], address);
    }
}

#[test]
fn a_revoked_token_is_refused_and_an_open_watch_goes_on() {
    let server = server();
    let agent = Identity::agent("node-a");
    let (mut watching, mut asking) = (
        Client::connect(&server, &agent).unwrap(),
        Client::connect(&server, &agent).unwrap(),
    );
    watching.open(&Request::get(WATCH)).unwrap();
    watching.chunk().unwrap().expect("the node that is there");

    server.revoke_tokens(&agent);
    server
        .patch("nodes", "", "node-a", &json!({"metadata": {"labels": {"a": "b"}}}))
        .unwrap();

    assert_eq!(asking.ask(&Request::get(NODES)).unwrap().status, 401);
    assert!(watching.chunk().unwrap().is_some());
    assert_eq!(
        Client::connect(&server, &agent)
            .unwrap()
            .ask(&Request::get(NODES))
            .unwrap()
            .status,
        200
    );
}

#[test]
fn a_new_authority_is_not_the_old_one() {
    let server = server();
    let old = server.authority();

    server.rotate_authority().unwrap();

    assert!(Client::to(server.addresses()[0], &old, None).is_err());
    assert_eq!(status(&server, NODES), 200);
}

#[test]
fn a_wrong_clock_shows_in_the_date_and_in_objects() {
    let server = server();
    server.set_clock_skew(-400 * 86400);

    server
        .put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b"}}))
        .unwrap();
    let answer = admin(&server).ask(&Request::get("/api/v1/nodes/node-b")).unwrap();

    let year = |text: &str| {
        text.split(|character: char| !character.is_ascii_digit())
            .find(|part| part.len() == 4)
            .unwrap()
            .to_owned()
    };
    let created = answer.json()["metadata"]["creationTimestamp"]
        .as_str()
        .unwrap()
        .to_owned();
    let right = admin(&server)
        .ask(&Request::get("/api/v1/nodes/node-a"))
        .unwrap()
        .json()["metadata"]["creationTimestamp"]
        .clone();
    assert_eq!(year(answer.header("Date").unwrap()), year(&created));
    assert_ne!(year(&created), year(right.as_str().unwrap()));
}

#[test]
fn the_log_tells_what_was_asked() {
    let server = server();
    let mut client = Client::connect(&server, &Identity::agent("node-a")).unwrap();
    client.ask(&Request::get("/api/v1/nodes?limit=500")).unwrap();
    let mut watching = admin(&server);
    watching.open(&Request::get(WATCH)).unwrap();
    let first = watching.chunk().unwrap().unwrap();

    let records = server.requests();

    assert_eq!(
        (server.count(Verb::List, "nodes"), server.count(Verb::Watch, "nodes")),
        (1, 1)
    );
    let [list, watch] = records.as_slice() else {
        panic!("{records:?}")
    };
    assert_eq!(
        (list.method.as_str(), list.path.as_str(), list.query.as_str()),
        ("GET", NODES, "limit=500")
    );
    assert_eq!(
        (list.username.as_str(), list.agent.as_str()),
        ("system:serviceaccount:shroud-system:shroud", "rec/1")
    );
    assert_eq!((list.status, list.end.is_some()), (Some(200), true));
    assert_eq!((watch.bytes, watch.end.is_some()), (first.len() as u64, false));
    drop(watching);
    let ended = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        server.requests()[1].end.is_some()
    });
    assert!(ended, "the log notices that the client has gone");
}
