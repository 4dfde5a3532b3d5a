//! What a real API server was recorded to answer, byte by byte, against the client: what it makes of each answer, and what it asks next.
//!
//! ```text
//!   tests/apiserver/golden ──> recording ──> server ══ plain HTTP ══> a part of the client ──> conclusions
//!                                               └── requests ────────────────────────────────────┘
//! ```
//!
//! `tests/apiserver` is held to the same recordings, from the other side. Each exchange is in `golden/conclusions.txt`, or is left out
//! there with the reason. What takes more than one exchange to show has a test of its own, below.

mod recording;
mod server;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use self::recording::{Answer, End, Exchange, exchange};
use self::server::{Request, Server};
use super::access::{ForeignNode, check};
use super::api::{Api, Credentials, Failure};
use super::complain::{Complaint, complain};
use super::follow::{Collection, Update, follow};
use super::object::Node;
use super::pace::Pace;
use super::publish::{OwnNode, publish};
use super::{Options, Wanted, run};
use crate::{Event, FailureKind, Record, Telemetry};

/// How long a part may be quiet until it is said to ask nothing more: longer than the first back-off, shorter than what the client leaves
/// between two lists. It is counted in turns of the runtime, of which client and server have theirs: on a busy machine all are late.
const QUIET: Duration = Duration::from_secs(2);
const TURN: Duration = Duration::from_millis(10);
/// How many exchanges are played at the same time: they wait most of the time.
const AT_ONCE: usize = 64;
/// How long a watch may say nothing, where nothing will come.
const SHORT_IDLE: Duration = Duration::from_millis(300);
const LONG_IDLE: Duration = Duration::from_secs(60);
/// How long something that must come may take.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn every_recorded_answer_is_understood_as_it_was() {
    let exchanges = recording::all();
    let mut told: Vec<String> = vec![String::new(); exchanges.len()];
    let places = Mutex::new(exchanges.iter().zip(&mut told));

    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((exchange, place)) = { places.lock().unwrap().next() } {
                    *place = conclusions(exchange, &exchanges);
                }
            });
        }
    });

    let found = told.concat();
    let known = include_str!("transcripts/golden/conclusions.txt");
    if found != known {
        let written = std::env::temp_dir().join("conclusions.txt");
        std::fs::write(&written, &found).unwrap();
        let differing = found.lines().zip(known.lines()).find(|(found, known)| found != known);
        panic!(
            "golden/conclusions.txt differs, first at {differing:?}; if this is right, the new one is {}",
            written.display()
        );
    }
}

#[tokio::test]
async fn an_expired_watch_is_followed_by_a_list_half_a_minute_after_the_last_one() {
    let recorded = ["07-watch-expired 3", "07-watch-expired 8", "07-watch-expired 9"];
    let answers = [list_at("460")].into_iter().chain(recorded.map(answer)).collect();
    let mut server = Server::of_answers(answers);
    let api = Api::new(Credentials::File(server.kubeconfig()));
    let mut told = Vec::new();
    let mut tell = async |update: Update<Node>| told.push(line(&update));
    let mut asked = Vec::new();
    let nodes = nodes("/api/v1/nodes", LONG_IDLE);

    tokio::select! {
        never = follow(&api, &nodes, Pace::new(Instant::now()), &mut tell) => match never {},
        () = async {
            while asked.len() < 5 {
                let request = server.requests.recv().await.unwrap();
                asked.push((asks(&request), Instant::now()));
            }
        } => {}
    }

    let (requests, times): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
    let expected = [
        "a list",
        "a watch from 460",
        "a list",
        "a watch from 474",
        "a watch from 475",
    ];
    assert_eq!(requests, expected);
    let between = times[2] - times[0];
    assert!((30..40).contains(&between.as_secs()), "{between:?}");
    let expected = [
        "asks for a list",
        "listed: ",
        "watches",
        "fails (expired): watch nodes: 410 too old resource version: 460 (471)",
        "asks for a list",
        "listed: node-a 452d5850 []; node-b 6e70fa99 []",
        "watches",
        "applied: node-a 452d5850 []",
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn credentials_are_read_anew_after_what_may_come_from_them_and_kept_after_anything_else() {
    let cases = [
        ("01-auth 3", true),               // 401
        ("01-auth 6", true),               // 403
        ("09-too-many-requests 3", false), // 429
        ("10-lifecycle 20", false),        // 504
        ("04-list 35", false),             // 410
        ("10-lifecycle 3", true),          // cut off
    ];
    for (name, reads_anew) in cases {
        let mut server = Server::of_answers(vec![answer(name)]);
        let api = Api::new(Credentials::File(server.kubeconfig()));
        let mut tell = async |_: Update<Node>| {};
        let nodes = nodes("/api/v1/nodes", LONG_IDLE);

        let (first, second) = tokio::select! {
            never = follow(&api, &nodes, Pace::new(Instant::now()), &mut tell) => match never {},
            requests = async {
                let first = server.requests.recv().await.unwrap();
                server.give_token("second");
                (first, server.requests.recv().await.unwrap())
            } => requests,
        };

        assert_eq!(first.header("authorization"), Some("Bearer first"), "{name}");
        let token = if reads_anew { "Bearer second" } else { "Bearer first" };
        assert_eq!(second.header("authorization"), Some(token), "{name}");
        assert_eq!(second.connection == first.connection, !reads_anew, "{name}");
    }
}

#[tokio::test]
async fn events_are_the_same_however_the_bytes_are_cut() {
    for name in ["06-watch-raw-framing 1", "06-watch-raw-framing 2"] {
        let Answer::Sent { pieces, end } = answer(name) else {
            panic!("{name} is no answer")
        };
        let bytes = pieces.iter().flat_map(|(_, piece)| piece).copied().collect::<Vec<u8>>();
        for size in [1, 7, bytes.len()] {
            let pieces = bytes.chunks(size).map(|piece| (0.0, piece.to_vec())).collect();
            let cut = Answer::Sent { pieces, end };

            let told = play_follow("/api/v1/nodes", vec![list_at("444"), cut], LONG_IDLE).await;

            let expected = [
                "asks for a list",
                "listed: ",
                "watches",
                "applied: node-a fd3c289e []",
                "applied: node-b c29155e0 []",
                "then a watch from 446",
            ];
            assert_eq!(told, expected, "{name} in pieces of {size}");
        }
    }
}

#[tokio::test]
async fn bookmarks_keep_a_quiet_watch_alive() {
    // In recorded seconds, of which there are fifty in one of ours; the bookmarks were a minute apart.
    const SECOND: f64 = 0.02;
    for (idle, from, on_same_connection) in [(100.0, "953", true), (40.0, "894", false)] {
        let mut answers = vec![answer("14-watch-bookmark-interval 1"), list_at("894")];
        let mut server = Server::start(SECOND, Box::new(move |_| answers.pop()));
        let api = Api::new(Credentials::File(server.kubeconfig()));
        let nodes = nodes("/api/v1/nodes", Duration::from_secs_f64(idle * SECOND));
        let mut tell = async |_: Update<Node>| {};

        let requests = tokio::select! {
            never = follow(&api, &nodes, Pace::new(Instant::now()), &mut tell) => match never {},
            requests = async {
                let mut requests = Vec::new();
                while requests.len() < 3 {
                    requests.push(server.requests.recv().await.unwrap());
                }
                requests
            } => requests,
        };

        assert_eq!(asks(&requests[2]), format!("a watch from {from}"));
        assert_eq!(requests[2].connection == requests[1].connection, on_same_connection);
    }
}

#[tokio::test]
async fn whether_the_token_may_do_too_much_is_read_from_the_answer_to_a_dry_run() {
    let may_not = ["the token may not change other Nodes", "then nothing"].map(str::to_owned);
    let denied = play_check(
        "node-b",
        vec![allowed(), answer("08-service-account-and-admission-policy 18")],
    );
    let denied_without_reason = play_check(
        "node-b",
        vec![allowed(), answer("08-service-account-and-admission-policy 21")],
    );
    let gone = play_check("node-b", vec![allowed(), answer("02-node-crud 6")]);
    let made_anew = play_check("node-b", vec![allowed(), answer("03-patch 43")]);
    let unknown = play_check("node-b", vec![allowed(), answer("10-lifecycle 22")]);

    let (denied, denied_without_reason, gone, made_anew, unknown) =
        tokio::join!(denied, denied_without_reason, gone, made_anew, unknown);

    assert_eq!(denied, may_not);
    assert_eq!(denied_without_reason, may_not);
    assert_eq!(gone, may_not);
    assert_eq!(made_anew, may_not);
    let expected = [
        "fails (server): try to change Node node-b, without doing it: 504 Timeout: request did not complete within the allotted timeout",
        "then POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
    ];
    assert_eq!(unknown, expected);
}

#[tokio::test]
async fn a_server_that_fails_again_and_again_is_told_once_and_so_is_its_end() {
    let timeout = answer("10-lifecycle 20");
    let mut lists = vec![answer("04-list 40"), timeout.clone(), timeout.clone(), timeout];
    let answers = move |request: &Request| match asks(request).as_str() {
        _ if request.path.contains("/configmaps?") => Some(answer("08-service-account-and-admission-policy 12")),
        "a list" => lists.pop(),
        _ => None,
    };
    let mut world = World::start(Wanted::default(), false, answers);

    let (events, telemetry) = world
        .until(|events, telemetry| events.len() == 2 && telemetry.no_deny_list.is_some())
        .await;

    let says = "list nodes: 504 Timeout: request did not complete within the allotted timeout";
    assert_eq!(events, [Event::Silent(says.to_owned()), Event::Listed(Vec::new())]);
    assert_eq!((telemetry.lists, telemetry.failures[&FailureKind::Server]), (4, 3));
    assert!(telemetry.failures[&FailureKind::Forbidden] >= 3, "{telemetry:?}");
    let says = "list the deny list: 403 secrets is forbidden: User \"system:serviceaccount:mesh:agent\" cannot list resource \"secrets\" in \
        API group \"\" in the namespace \"mesh\"; deploy/README.md lists the rights that are needed";
    assert_eq!(telemetry.no_deny_list.as_deref(), Some(says));
}

/// What the client asks and nobody recorded, and why that may be.
const UNRECORDED: [(&str, &str); 11] = [
    (
        "GET /api/v1/namespaces/{}/configmaps?fieldSelector,limit",
        "a list of Nodes by name was, 04-list 19",
    ),
    (
        "GET /api/v1/namespaces/{}/configmaps?allowWatchBookmarks,fieldSelector,resourceVersion,timeoutSeconds,watch",
        "a watch of Nodes by name was, 05-watch 17",
    ),
    (
        "GET /api/v1/namespaces/{}/pods?allowWatchBookmarks,resourceVersion,timeoutSeconds,watch",
        "a watch of Nodes was, 05-watch 4",
    ),
    ("GET /api/v1/namespaces/{}/pods?limit", "a list of Nodes was, 04-list 6"),
    (
        "GET /api/v1/namespaces?allowWatchBookmarks,labelSelector,resourceVersion,timeoutSeconds,watch",
        "a watch of Nodes by label was, 05-watch 16",
    ),
    (
        "GET /api/v1/namespaces?labelSelector,limit",
        "a list of Nodes by label was, 04-list 9",
    ),
    (
        "GET /api/v1/pods?allowWatchBookmarks,labelSelector,resourceVersion,timeoutSeconds,watch",
        "a watch of Nodes by label was, 05-watch 16",
    ),
    (
        "GET /api/v1/pods?labelSelector,limit",
        "a list of Nodes by label was, 04-list 9",
    ),
    (
        "PATCH /api/v1/nodes/{}/status?fieldManager,force application/apply-patch+yaml",
        "a merge patch of the status was, 03-patch 22, and a forced apply, 03-patch 31",
    ),
    (
        "PATCH /api/v1/nodes/{}?dryRun,fieldManager,force application/apply-patch+yaml",
        "a dry run of a merge patch was, 03-patch 24",
    ),
    (
        "POST /apis/events.k8s.io/v1/namespaces/{}/events?fieldManager application/json",
        "Leases were created, 11-crd-and-lease 19; of Events the documentation of events.k8s.io/v1 says what they must have",
    ),
];

#[tokio::test]
async fn the_client_asks_what_was_recorded() {
    let wanted = Wanted {
        announcement: Some("{}".to_owned()),
        network_available: true,
        complaints: [(
            "node-b".parse().unwrap(),
            Complaint {
                note: "it announces no key".to_owned(),
            },
        )]
        .into(),
    };
    let answers = |request: &Request| {
        let recorded = match kind(&request.method, &request.path, None).as_str() {
            "GET /api/v1/nodes?limit" => "04-list 6",
            "GET /api/v1/nodes?continue,limit" if request.path.contains("LWJcdTAwMDAifQ") => "04-list 7",
            "GET /api/v1/nodes?continue,limit" => "04-list 8",
            "GET /api/v1/nodes?allowWatchBookmarks,resourceVersion,timeoutSeconds,watch" => "05-watch 1",
            "GET /api/v1/namespaces/{}/configmaps?fieldSelector,limit"
            | "GET /api/v1/namespaces/{}/pods?limit"
            | "GET /api/v1/pods?labelSelector,limit" => "04-list 40",
            "GET /api/v1/namespaces?labelSelector,limit" => return Some(list_of_one_namespace()),
            "PATCH /api/v1/nodes/{}?fieldManager,force" => "08-service-account-and-admission-policy 19",
            "PATCH /api/v1/nodes/{}/status?fieldManager,force" => "03-patch 22",
            "PATCH /api/v1/nodes/{}?dryRun,fieldManager,force" => "08-service-account-and-admission-policy 22",
            "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews" => return Some(allowed()),
            "POST /apis/events.k8s.io/v1/namespaces/{}/events?fieldManager" => "11-crd-and-lease 20",
            _ => return None,
        };
        Some(answer(recorded))
    };
    let mut world = World::start(wanted, true, answers);

    let requests = world.requests(16).await;

    let telemetry = world.telemetry.borrow().clone();
    let kind_of = |request: &Request| kind(&request.method, &request.path, request.header("content-type"));
    let asked: BTreeSet<String> = requests.iter().map(kind_of).collect();
    let recorded: BTreeSet<String> = recording::all()
        .iter()
        .map(|exchange| kind(&exchange.method, &exchange.path, exchange.content_type.as_deref()))
        .collect();
    let unrecorded: BTreeSet<&str> = asked.difference(&recorded).map(String::as_str).collect();
    let known: BTreeSet<&str> = UNRECORDED.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(unrecorded, known);
    assert_eq!(telemetry.failures, BTreeMap::new());
    let mut rights: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (object, verb) in requests.iter().map(right) {
        rights.entry(object).or_default().insert(verb);
    }
    let row = |(object, verbs): (String, BTreeSet<&str>)| {
        let verbs: Vec<String> = verbs.into_iter().map(|verb| format!("`{verb}`")).collect();
        format!("| `{object}` | {} ", verbs.join(", "))
    };
    assert_eq!(rights.into_iter().map(row).collect::<BTreeSet<_>>(), listed_rights());
}

/// The object that a request is about, and the verb, as RBAC has them.
fn right(request: &Request) -> (String, &'static str) {
    let path = request.path.split('?').next().unwrap();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let (group, below) = match parts.as_slice() {
        ["api", "v1", below @ ..] => (String::new(), below),
        ["apis", group, "v1", below @ ..] => (format!("{group}/"), below),
        _ => panic!("{path}"),
    };
    let below = match below {
        ["namespaces", _, below @ ..] => below,
        _ => below,
    };
    let object = match below {
        [object] | [object, _] => (*object).to_owned(),
        [object, _, part] => format!("{object}/{part}"),
        _ => panic!("{path}"),
    };
    let verb = match request.method.as_str() {
        "GET" if recording::query(&request.path).any(|(key, _)| key == "watch") => "watch",
        "GET" => "list",
        "PATCH" => "patch",
        "POST" => "create",
        other => panic!("{other}"),
    };
    (format!("{group}{object}"), verb)
}

/// The first two cells of each row of the table in docs/reference.md.
fn listed_rights() -> BTreeSet<String> {
    let page = include_str!("../../../docs/reference.md");
    let (_, table) = page.split_once("| Object | Verbs | For |").unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row[..row.match_indices('|').nth(2).unwrap().0].to_owned())
        .collect()
}

/// A request without what differs from one of its kind to the next: method, path without names, keys of the query, content type.
fn kind(method: &str, path: &str, content_type: Option<&str>) -> String {
    let mut previous = "";
    let mut told = format!("{method} ");
    for part in path.split('?').next().unwrap().split('/').skip(1) {
        let is_name = ["nodes", "namespaces"].contains(&previous);
        write!(told, "/{}", if is_name { "{}" } else { part }).unwrap();
        previous = part;
    }
    let keys: BTreeSet<&str> = recording::query(path).map(|(key, _)| key).collect();
    if !keys.is_empty() {
        let keys: Vec<&str> = keys.into_iter().collect();
        write!(told, "?{}", keys.join(",")).unwrap();
    }
    if let Some(content_type) = content_type {
        write!(told, " {content_type}").unwrap();
    }
    told
}

/// The whole client, as the agent runs it, on node-a.
struct World {
    work: Pin<Box<dyn Future<Output = ()>>>,
    server: Server,
    events: mpsc::Receiver<Event>,
    telemetry: watch::Receiver<Telemetry>,
    _wanted: watch::Sender<Wanted>,
}

impl World {
    fn start(wanted: Wanted, opt_out: bool, answers: impl FnMut(&Request) -> Option<Answer> + Send + 'static) -> Self {
        let server = Server::start(0.0, Box::new(answers));
        let options = Options {
            node: "node-a".parse().unwrap(),
            kubeconfig: Some(server.kubeconfig()),
            deny_list: "shroud-denied".to_owned(),
            opt_out,
            watch_idle: LONG_IDLE,
            bridged: false,
        };
        let (events_sender, events) = mpsc::channel(64);
        let (telemetry_sender, telemetry) = watch::channel(Telemetry::default());
        let (wanted_sender, wanted) = watch::channel(wanted);
        Self {
            work: Box::pin(run(options, events_sender, wanted, telemetry_sender)),
            server,
            events,
            telemetry,
            _wanted: wanted_sender,
        }
    }

    /// What was told of the nodes, and how the source fares, when both are as they should be.
    async fn until(&mut self, is_so: impl Fn(&[Event], &Telemetry) -> bool) -> (Vec<Event>, Telemetry) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut events = Vec::new();
        loop {
            let telemetry = self.telemetry.borrow_and_update().clone();
            if is_so(&events, &telemetry) {
                return (events, telemetry);
            }
            tokio::select! {
                event = self.events.recv() => events.push(event.unwrap()),
                changed = self.telemetry.changed() => changed.unwrap(),
                () = &mut self.work => panic!("it ended"),
                () = tokio::time::sleep_until(deadline) => panic!("in vain: {events:?} {telemetry:?}"),
            }
        }
    }

    /// What is asked until there are so many kinds of requests, or in vain.
    async fn requests(&mut self, kinds: usize) -> Vec<Request> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut requests: Vec<Request> = Vec::new();
        let mut seen = BTreeSet::new();
        while seen.len() < kinds {
            tokio::select! {
                request = self.server.requests.recv() => requests.push(request.unwrap()),
                () = &mut self.work => panic!("it ended"),
                () = tokio::time::sleep_until(deadline) => break,
            }
            seen.extend(
                requests
                    .last()
                    .map(|request| kind(&request.method, &request.path, None)),
            );
        }
        requests
    }
}

fn answer(name: &str) -> Answer {
    exchange(name).answer
}

fn nodes(path: &str, idle: Duration) -> Collection {
    Collection {
        name: "nodes",
        path: path.to_owned(),
        fields: None,
        labels: None,
        idle,
    }
}

/// Which part of the client an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    List,
    Watch,
    /// The write of our own Node.
    Publish,
    /// The question whether we could write another's.
    Check,
    /// An Event, which is a new object like any other.
    Complain,
}

impl Part {
    /// The part that would get this answer, or why none does.
    fn of(exchange: &Exchange) -> Result<Self, &'static str> {
        let resource = exchange.resource();
        let is_api = resource.starts_with("/api/") || resource.starts_with("/apis/");
        let is_node = resource.starts_with("/api/v1/nodes/");
        let fails = exchange.answer.status().is_none_or(|status| status >= 400);
        let watches = exchange.query("watch").is_some() || resource.starts_with("/api/v1/watch/");
        match exchange.method.as_str() {
            _ if matches!(exchange.answer, Answer::Abridged) => Err("the recording has not all the bytes"),
            "GET" if !is_api => Err("the client asks for objects alone"),
            // Whatever is asked, a failure has these words.
            "GET" if is_node && fails => Ok(Self::List),
            "GET" if is_node => Err("the client asks for collections alone"),
            "GET" if watches => Ok(Self::Watch),
            "GET" => Ok(Self::List),
            "PATCH" if !is_node => Err("the client changes Nodes alone"),
            "PATCH" if exchange.query("dryRun").is_some() => Ok(Self::Check),
            "PATCH" => Ok(Self::Publish),
            "POST" if resource.ends_with("/selfsubjectaccessreviews") => Ok(Self::Check),
            "POST" => Ok(Self::Complain),
            "PUT" => Err("the client replaces nothing"),
            "DELETE" => Err("the client deletes nothing"),
            other => panic!("{other}"),
        }
    }
}

/// What the client makes of one exchange, as `golden/conclusions.txt` has it.
fn conclusions(exchange: &Exchange, all: &[Exchange]) -> String {
    let mut told = format!("{}: {}\n", exchange.name, exchange.note);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    match Part::of(exchange) {
        Err(reason) => writeln!(told, "  left out: {reason}").unwrap(),
        Ok(part) => {
            for line in runtime.block_on(play(part, exchange, all)) {
                writeln!(told, "  {line}").unwrap();
            }
        }
    }
    told
}

async fn play(part: Part, exchange: &Exchange, all: &[Exchange]) -> Vec<String> {
    let node = exchange.resource().strip_prefix("/api/v1/nodes/").unwrap_or("node-a");
    let (node, below) = node.split_once('/').unwrap_or((node, ""));
    let given = exchange.answer.clone();
    match part {
        Part::List => {
            // Answers about one object come from elsewhere too.
            let path = if exchange.resource().starts_with("/api/v1/nodes") {
                "/api/v1/nodes"
            } else {
                exchange.resource()
            };
            play_follow(path, with_pages(exchange, all), LONG_IDLE).await
        }
        Part::Watch => {
            let version = exchange.query("resourceVersion").filter(|version| !version.is_empty());
            let is_open = matches!(given, Answer::Sent { end: End::Open, .. });
            let idle = if is_open { SHORT_IDLE } else { LONG_IDLE };
            let first = match given {
                // Nobody would have answered the list before it, either.
                Answer::Refused => vec![given],
                Answer::Sent { .. } | Answer::Abridged => vec![list_at(version.unwrap_or("0")), given],
            };
            play_follow(exchange.resource(), first, idle).await
        }
        Part::Publish => {
            let wanted = Wanted {
                announcement: (below != "status").then(|| "{}".to_owned()),
                network_available: below == "status",
                ..Wanted::default()
            };
            play_publish(node, wanted, vec![given]).await
        }
        Part::Check if exchange.method == "POST" => play_check(node, vec![given]).await,
        Part::Check => play_check(node, vec![allowed(), given]).await,
        Part::Complain => play_complain(vec![given]).await,
    }
}

/// A page, and the pages that were recorded to follow it.
fn with_pages(exchange: &Exchange, all: &[Exchange]) -> Vec<Answer> {
    let mut answers = vec![exchange.answer.clone()];
    let token = |answer: &Answer| {
        let page = answer.json().filter(|_| answer.status() == Some(200))?;
        Some(page["metadata"]["continue"].as_str()?.to_owned())
    };
    let position = all.iter().position(|other| other.name == exchange.name).unwrap();
    while let Some(token) = token(answers.last().unwrap()) {
        let is_next = |other: &&Exchange| {
            let keys: Vec<_> = recording::query(&other.path).map(|(key, _)| key).collect();
            keys == ["limit", "continue"] && other.query("continue") == Some(&token)
        };
        let Some(next) = all[position + 1..].iter().find(is_next) else {
            break;
        };
        answers.push(next.answer.clone());
    }
    answers
}

/// A list of nothing at a version, which was not recorded.
fn list_at(version: &str) -> Answer {
    let list =
        format!(r#"{{"kind":"NodeList","apiVersion":"v1","metadata":{{"resourceVersion":"{version}"}},"items":[]}}"#);
    Answer::made("200 OK", &list)
}

/// A namespace that opts out, which was not recorded.
fn list_of_one_namespace() -> Answer {
    let namespace = r#"{"metadata":{"name":"shop","resourceVersion":"7","labels":{"shroud.dev/encrypt":"false"}}}"#;
    let list = format!(
        r#"{{"kind":"NamespaceList","apiVersion":"v1","metadata":{{"resourceVersion":"9"}},"items":[{namespace}]}}"#
    );
    Answer::made("200 OK", &list)
}

/// The review that was recorded, with the other answer, which was not.
fn allowed() -> Answer {
    let review = exchange("01-auth 13").answer.json().unwrap().to_string();
    assert!(review.contains(r#""allowed":false"#), "{review}");
    Answer::made(
        "201 Created",
        &review.replace(r#""allowed":false"#, r#""allowed":true"#),
    )
}

async fn play_follow(path: &str, answers: Vec<Answer>, idle: Duration) -> Vec<String> {
    let mut story = Story::new(answers);
    let api = Api::new(Credentials::File(story.server.kubeconfig()));
    let nodes = nodes(path, idle);
    let told = story.told.clone();
    let mut tell = async |update: Update<Node>| told.add(line(&update), asked_to_wait(&update));
    story
        .play(follow(&api, &nodes, Pace::new(Instant::now()), &mut tell))
        .await
}

async fn play_publish(node: &str, wanted: Wanted, answers: Vec<Answer>) -> Vec<String> {
    let mut story = Story::new(answers);
    let api = Api::new(Credentials::File(story.server.kubeconfig()));
    let own = watch::Sender::new(OwnNode::of(&bare(node), &node.parse().unwrap()));
    let (_sender, wanted) = watch::channel(wanted);
    let told = story.told.clone();
    let tell = |result: Result<(), Failure>| match result {
        Ok(()) => told.add("written".to_owned(), None),
        Err(failure) => told.add(failed(&failure), failure.retry_after),
    };
    story
        .play(publish(&api, &node.parse().unwrap(), wanted, &own, tell))
        .await
}

async fn play_check(node: &str, answers: Vec<Answer>) -> Vec<String> {
    let mut story = Story::new(answers);
    let api = Api::new(Credentials::File(story.server.kubeconfig()));
    let foreign = ForeignNode::among([bare(node)].iter(), &"another".parse().unwrap());
    let (_sender, foreign) = watch::channel(foreign);
    let told = story.told.clone();
    let tell = |result: Result<Option<String>, Failure>| match result {
        Ok(Some(says)) => told.add(format!("says: {says}"), None),
        Ok(None) => told.add("the token may not change other Nodes".to_owned(), None),
        Err(failure) => told.add(failed(&failure), failure.retry_after),
    };
    story.play(check(&api, foreign, tell)).await
}

async fn play_complain(answers: Vec<Answer>) -> Vec<String> {
    let mut story = Story::new(answers);
    let api = Api::new(Credentials::File(story.server.kubeconfig()));
    let complaint = Complaint {
        note: "it announces no key".to_owned(),
    };
    let wanted = Wanted {
        complaints: [("bad".parse().unwrap(), complaint)].into(),
        ..Wanted::default()
    };
    let (_sender, wanted) = watch::channel(wanted);
    let told = story.told.clone();
    let tell = |failure: &Failure| told.add(failed(failure), failure.retry_after);
    story
        .play(complain(&api, &"another".parse().unwrap(), wanted, tell))
        .await
}

/// A Node of which nothing is known.
fn bare(node: &str) -> Node {
    Node {
        uid: "0dbb3a5c".to_owned(),
        record: Ok(Record {
            node: node.parse().unwrap(),
            addresses: Vec::new(),
            pod_prefixes: Vec::new(),
            zone: None,
            announcement: None,
        }),
        network_unavailable: None,
    }
}

/// A part at work before a server, until it asks what the server has no answer for.
struct Story {
    server: Server,
    answers: usize,
    told: std::rc::Rc<Told>,
}

/// What a part said, and the longest that it was asked to wait.
#[derive(Default)]
struct Told {
    lines: RefCell<Vec<String>>,
    wait: RefCell<Option<Duration>>,
}

impl Told {
    fn add(&self, line: String, wait: Option<Duration>) {
        self.lines.borrow_mut().push(line);
        let mut longest = self.wait.borrow_mut();
        *longest = wait.max(*longest);
    }

    fn wait(&self) -> Duration {
        self.wait.borrow().unwrap_or_default()
    }
}

impl Story {
    fn new(answers: Vec<Answer>) -> Self {
        let is_refused = matches!(answers[0], Answer::Refused);
        Self {
            answers: if is_refused { 0 } else { answers.len() },
            server: Server::of_answers(answers),
            told: std::rc::Rc::default(),
        }
    }

    /// What the part says, then what it asks next.
    async fn play(&mut self, part: impl Future<Output = Infallible>) -> Vec<String> {
        let next = tokio::select! {
            never = part => match never {},
            next = next(&mut self.server, self.answers, &self.told) => next,
        };
        let mut lines = self.told.lines.take();
        for line in &mut lines {
            *line = line.replace(&self.server.address, "SERVER");
        }
        if self.answers == 0 {
            // The same again and again.
            let first = lines.iter().position(|line| line.starts_with("fails")).unwrap();
            lines.truncate(first + 1);
            return lines;
        }
        let next = next.map_or("nothing".to_owned(), |request| asks(&request));
        match self.told.wait() {
            Duration::ZERO => lines.push(format!("then {next}")),
            wait => lines.push(format!("then, not within {} s, {next}", wait.as_secs())),
        }
        lines
    }
}

/// The first request after those that are answered.
async fn next(server: &mut Server, answers: usize, told: &Told) -> Option<Request> {
    for _ in 0..answers {
        server.requests.recv().await.unwrap();
    }
    let answered = Instant::now();
    let mut quiet = Duration::ZERO;
    while quiet < QUIET + told.wait() {
        tokio::select! {
            request = server.requests.recv(), if answers > 0 => {
                let waited = answered.elapsed();
                assert!(waited >= told.wait(), "asked again after {waited:?}, and not {:?}", told.wait());
                return request;
            }
            () = tokio::time::sleep(TURN) => quiet += TURN,
        }
    }
    None
}

/// A request, as far as it differs from others of its kind.
fn asks(request: &Request) -> String {
    let value = |key: &str| recording::query(&request.path).find(|(found, _)| *found == key);
    match request.method.as_str() {
        "GET" if value("watch").is_some() => format!("a watch from {}", value("resourceVersion").unwrap().1),
        "GET" => match value("continue") {
            Some((_, token)) => format!("the page at {token}"),
            None => "a list".to_owned(),
        },
        method => format!("{method} {}", request.path),
    }
}

fn asked_to_wait(update: &Update<Node>) -> Option<Duration> {
    match update {
        Update::Failed(failure) => failure.retry_after,
        Update::Listed(_) | Update::Applied(_) | Update::Deleted(_) | Update::Lists | Update::Watches => None,
    }
}

fn line(update: &Update<Node>) -> String {
    match update {
        Update::Lists => "asks for a list".to_owned(),
        Update::Watches => "watches".to_owned(),
        Update::Listed(nodes) => {
            let nodes: Vec<String> = nodes.iter().map(known).collect();
            format!("listed: {}", nodes.join("; "))
        }
        Update::Applied(node) => format!("applied: {}", known(node)),
        Update::Deleted(name) => format!("deleted: {name}"),
        Update::Failed(failure) => failed(failure),
    }
}

fn failed(failure: &Failure) -> String {
    let Failure { kind, says, .. } = failure;
    format!("fails ({}): {says}", kind.id())
}

/// What is known of a node.
fn known(node: &Node) -> String {
    let uid = node.uid.get(..8).unwrap_or("no uid");
    match &node.record {
        Ok(Record {
            node,
            addresses,
            pod_prefixes,
            zone,
            announcement,
        }) => {
            let prefixes: Vec<String> = pod_prefixes.iter().map(ToString::to_string).collect();
            assert_eq!(
                (addresses.len(), zone, announcement),
                (0, &None, &None),
                "nothing recorded has these"
            );
            format!("{node} {uid} [{}]", prefixes.join(", "))
        }
        Err(unreadable) => format!("unreadable {uid}: {}", unreadable.reason),
    }
}
