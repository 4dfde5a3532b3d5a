//! Requests over loopback, against a reconcile thread that says what it is told to.

use std::io::{Read as _, Write as _};
use std::sync::mpsc::{Receiver, sync_channel};

use serde_json::json;

use super::*;

/// Longer than any request here takes.
const AGES: Duration = Duration::from_secs(30);

/// A server and what it is fed with.
struct World {
    address: SocketAddr,
    /// When the last pass ended.
    pulse: watch::Sender<Instant>,
    woken: Receiver<Wake>,
    /// The server's thread ends when this is dropped.
    _stop: oneshot::Sender<()>,
}

impl World {
    /// Serves on a free port, and gives each connection this long.
    fn new(patience: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (wakes, woken) = sync_channel(1);
        let (pulse, beats) = watch::channel(Instant::now());
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let sources = Sources {
            wakes,
            pulse: beats,
            stuck_after: AGES,
        };
        let (stop, stopped) = oneshot::channel();
        std::thread::spawn(move || {
            runtime.block_on(async move {
                tokio::select! {
                    _ = stopped => {}
                    never = accept(listener, sources, patience) => match never {},
                }
            });
        });
        Self {
            address,
            pulse,
            woken,
            _stop: stop,
        }
    }

    /// Asks, while the reconcile thread gives this answer to this question.
    fn told(self, question: serve::Request, said: Result<serde_json::Value, String>, path: &str) -> String {
        let reconcile = std::thread::spawn(move || match self.woken.recv().unwrap() {
            Wake::Question { request, answer } => {
                assert_eq!(request, question);
                answer.send(said).unwrap();
            }
            Wake::Mesh | Wake::Kernel | Wake::Stop => panic!("only questions are asked"),
        });
        let answer = get(self.address, path);
        reconcile.join().unwrap();
        answer
    }
}

fn get(address: SocketAddr, path: &str) -> String {
    exchange(address, &format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n"))
}

/// Sends a request and returns all of the answer, or what the kernel said instead.
fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(AGES)).unwrap();
    // The server may close before it has read all.
    drop(stream.write_all(request.as_bytes()));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => answer.extend(format!("\n{error}").bytes()),
    }
    String::from_utf8(answer).unwrap()
}

fn line(answer: &str) -> &str {
    answer.lines().next().unwrap_or_default()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

#[test]
fn livez_is_the_pulse_of_the_reconcile_thread_and_asks_nobody() {
    let world = World::new(AGES);
    // One question waits already: there is no room for another.
    let _waiting = std::thread::spawn({
        let address = world.address;
        move || get(address, "/readyz")
    });
    let question = world.woken.recv().unwrap();
    assert!(matches!(question, Wake::Question { .. }));

    let alive = get(world.address, "/livez");
    world
        .pulse
        .send_replace(Instant::now().checked_sub(AGES + Duration::from_secs(1)).unwrap());
    let stuck = get(world.address, "/livez");

    assert_eq!(line(&alive), "HTTP/1.1 200 OK");
    assert!(body(&alive).starts_with("[+]reconcile: last pass ended 0."), "{alive}");
    assert_eq!(line(&stuck), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(
        body(&stuck),
        "[-]reconcile: last pass ended 31.0 s ago, at most 30 s are allowed\n"
    );
}

#[test]
fn a_thread_counts_as_stuck_when_it_missed_passes_and_the_longest_one_is_over() {
    let seconds = Duration::from_secs;
    let start = Instant::now();
    let limit = stuck_after(seconds(3));

    assert_eq!(limit, seconds(69));
    assert!(pulse(start, start + limit, limit).0);
    assert!(!pulse(start, start + limit + Duration::from_millis(1), limit).0);
}

#[test]
fn readyz_is_what_the_reconcile_thread_says() {
    let conditions = |holds: bool| {
        Ok(json!({ "conditions": [
            { "about": "gate", "holds": true, "says": "enforces on eth0" },
            { "about": "peers", "holds": holds, "says": "some" },
        ]}))
    };

    let ready = World::new(AGES).told(serve::Request::Readiness, conditions(true), "/readyz");
    let not_ready = World::new(AGES).told(serve::Request::Readiness, conditions(false), "/readyz?verbose");
    let unknown = World::new(AGES).told(serve::Request::Readiness, Err("it is dark".to_owned()), "/readyz");

    assert_eq!(line(&ready), "HTTP/1.1 200 OK");
    assert_eq!(body(&ready), "[+]gate: enforces on eth0\n[+]peers: some\nready\n");
    assert_eq!(line(&not_ready), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(
        body(&not_ready),
        "[+]gate: enforces on eth0\n[-]peers: some\nnot ready\n"
    );
    assert_eq!(line(&unknown), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body(&unknown), "[-]agent: it is dark\nnot ready\n");
}

#[test]
fn metrics_are_what_the_reconcile_thread_says() {
    let text = "# TYPE a gauge\na 1\n# EOF\n";

    let told = World::new(AGES).told(serve::Request::Metrics, Ok(text.into()), "/metrics");
    let failed = World::new(AGES).told(serve::Request::Metrics, Err("it is dark".to_owned()), "/metrics");

    assert_eq!(line(&told), "HTTP/1.1 200 OK");
    let content = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(told.contains(content), "{told}");
    assert_eq!(body(&told), text);
    assert_eq!(line(&failed), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body(&failed), "it is dark\n");
}

#[test]
fn a_reconcile_thread_that_has_too_much_to_do_or_is_gone_is_told_of() {
    let busy = World::new(AGES);
    let address = busy.address;
    let waiting: Vec<_> = (0..2)
        .map(|_| std::thread::spawn(move || get(address, "/metrics")))
        .collect();

    let answers: Vec<String> = waiting.into_iter().map(|asked| asked.join().unwrap()).collect();
    drop(busy.woken);
    let gone = get(address, "/readyz");

    let bodies: Vec<&str> = answers.iter().map(|answer| body(answer)).collect();
    assert!(bodies.contains(&"the agent is busy; ask again\n"), "{bodies:?}");
    assert!(
        bodies.contains(&"the reconcile thread did not answer within 5 s\n"),
        "{bodies:?}"
    );
    assert_eq!(body(&gone), "[-]agent: the agent is stopping\nnot ready\n");
}

#[test]
fn there_is_nothing_else_and_nothing_can_be_changed() {
    let world = World::new(AGES);
    let exchange = |request: &str| exchange(world.address, request);

    let elsewhere = exchange("GET /debug HTTP/1.1\r\nHost: node\r\n\r\n");
    let post = exchange("POST /livez HTTP/1.1\r\nHost: node\r\nContent-Length: 2\r\n\r\n{}");
    let head = exchange("HEAD /livez HTTP/1.1\r\nHost: node\r\n\r\n");
    let noise = exchange("\u{1b}[31m\r\n\r\n");

    assert_eq!(line(&elsewhere), "HTTP/1.1 404 Not Found");
    assert_eq!(
        body(&elsewhere),
        "there is nothing here; ask for one of /livez, /readyz, /metrics\n"
    );
    assert_eq!(line(&post), "HTTP/1.1 405 Method Not Allowed");
    assert!(post.contains("allow: GET, HEAD\r\n"), "{post}");
    assert_eq!(line(&head), "HTTP/1.1 200 OK");
    assert_eq!(body(&head), "");
    assert_eq!(line(&noise), "HTTP/1.1 400 Bad Request");
}

#[test]
fn a_request_is_bounded_in_size() {
    let world = World::new(AGES);
    let long = "x".repeat(LARGEST_HEAD);
    let many = "a: b\r\n".repeat(HEADERS + 1);

    for head in [format!("A: {long}\r\n"), many] {
        let answer = exchange(world.address, &format!("GET /livez HTTP/1.1\r\n{head}\r\n"));

        assert_eq!(line(&answer), "HTTP/1.1 431 Request Header Fields Too Large");
    }
}

#[test]
fn whoever_says_nothing_makes_room_for_others() {
    let world = World::new(Duration::from_millis(300));

    let _silent: Vec<_> = (0..CONNECTIONS)
        .map(|_| std::net::TcpStream::connect(world.address).unwrap())
        .collect();
    let begun = Instant::now();
    let answer = get(world.address, "/livez");

    assert_eq!(line(&answer), "HTTP/1.1 200 OK");
    let waited = begun.elapsed();
    assert!(
        Duration::from_millis(200) < waited && waited < Duration::from_secs(5),
        "{waited:?}"
    );
}

#[test]
fn a_port_that_is_taken_is_a_problem_until_it_is_free() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let (wakes, _woken) = sync_channel(1);
    let (_pulse, beats) = watch::channel(Instant::now());
    let (problem, mut found) = watch::channel(None);
    let (ended, _) = oneshot::channel();
    let sources = Sources {
        wakes,
        pulse: beats,
        stuck_after: AGES,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut wait = |wanted: bool| {
        runtime.block_on(async {
            let changed = found.wait_for(|problem: &Option<Problem>| problem.is_some() == wanted);
            let changed = tokio::time::timeout(AGES, changed).await;
            changed.unwrap().unwrap().clone()
        })
    };

    let server = Server::start(Some(address), sources, problem, ended).unwrap();
    let taken = wait(true).unwrap();
    drop(other);
    wait(false);
    let answer = get(address, "/livez");
    server.stop().unwrap();

    assert_eq!(taken.check, Check::HttpPortTaken);
    let says = format!("listen on {address}: another program has TCP port {}", address.port());
    assert!(taken.says.starts_with(&says), "{taken}");
    assert_eq!(line(&answer), "HTTP/1.1 200 OK");
    assert!(std::net::TcpStream::connect(address).is_err(), "it still answers");
}

#[test]
fn an_address_that_is_not_ours_is_another_problem() {
    let error = io::Error::from(io::ErrorKind::AddrNotAvailable);

    let problem = cannot_listen("192.0.2.1:80".parse().unwrap(), &error);

    assert_eq!(problem.check, Check::HttpFailed);
    assert!(problem.says.starts_with("listen on 192.0.2.1:80: "), "{problem}");
}
