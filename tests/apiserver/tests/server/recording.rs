//! The recordings, and how one is played against the server: each request is sent again, and the answer compared with the recorded one,
//! byte by byte but for what must differ (uids, times, audit ids).
//!
//! Revisions are not among that: the server's counter is moved to where it stood when the exchange was recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use shroud_apiserver::{ApiServer, Identity, Options};

use crate::client::{Answer, Client, End, Request};

/// Headers that are not compared: they differ each time, or the recording leaves them out.
const UNCOMPARED: [&str; 4] = [
    "date",
    "audit-id",
    "x-kubernetes-pf-flowschema-uid",
    "x-kubernetes-pf-prioritylevel-uid",
];

/// A recording that is being played.
pub(crate) struct Replay {
    pub(crate) server: ApiServer,
    topic: &'static str,
    exchanges: Vec<Value>,
    /// Exchanges that were played or left out.
    seen: BTreeSet<usize>,
    /// Each recorded uid, and the one that stands for it here.
    uids: BTreeMap<String, String>,
}

impl Replay {
    pub(crate) fn new(topic: &'static str, options: Options) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden")
            .join(format!("{topic}.json"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let recording: Value = serde_json::from_str(&text).unwrap();
        let exchanges = recording["exchanges"].as_array().unwrap().clone();
        let server = ApiServer::local(options).unwrap();
        Self {
            server,
            topic,
            exchanges,
            seen: BTreeSet::new(),
            uids: BTreeMap::new(),
        }
    }

    /// Goes on with a fresh server: the recorder started the real one anew, with other options.
    pub(crate) fn another_server(&mut self, options: Options) {
        self.server = ApiServer::local(options).unwrap();
        self.uids.clear();
    }

    /// Plays one exchange.
    pub(crate) fn play(&mut self, number: usize) {
        let (request, response) = self.exchange(number);
        self.reach(&request, &response);

        let asked = self.request(&request);
        let answer = self
            .client(&request)
            .ask(&asked)
            .unwrap_or_else(|error| panic!("{}: {error:#}", self.name(number)));

        self.compare_head(number, &response, &answer);
        let recorded = response["body"].as_str().map(str::to_owned);
        let recorded =
            recorded.unwrap_or_else(|| response["stream"][0]["line"].as_str().unwrap_or_default().to_owned());
        self.compare(number, recorded.trim_end(), answer.text().trim_end());
    }

    /// Plays several exchanges in a row.
    pub(crate) fn play_all(&mut self, numbers: impl IntoIterator<Item = usize>) {
        numbers.into_iter().for_each(|number| self.play(number));
    }

    /// Plays a watch; `during` is what happens while it is open.
    pub(crate) fn watch(&mut self, number: usize, during: impl FnOnce(&Self)) {
        let (request, response) = self.exchange(number);
        let asked = self.request(&request);
        let mut client = self.client(&request);
        let answer = client
            .open(&asked)
            .unwrap_or_else(|error| panic!("{}: {error:#}", self.name(number)));
        during(self);
        self.compare_head(number, &response, &answer);

        let recorded: Vec<_> = response["stream"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["line"].as_str().unwrap())
            .collect();
        let (lines, end) = if response["end"].as_str().unwrap().starts_with("client") {
            let mut text = String::new();
            while text.lines().count() < recorded.len() {
                text += &String::from_utf8(client.chunk().unwrap().unwrap()).unwrap();
            }
            (text.lines().map(str::to_owned).collect(), None)
        } else {
            let (lines, end) = client.lines();
            (lines, Some(end))
        };
        let expected_end = match response["end"].as_str().unwrap() {
            text if text.starts_with("client") => None,
            text if text.contains("without a terminating chunk") => Some(End::Cut),
            _ => Some(End::Clean),
        };
        assert_eq!(end, expected_end, "{}", self.name(number));
        // How many bookmarks come between events depends on when the recorder looked; that there are some, and the last one, does not.
        let mut recorded: Vec<_> = recorded.into_iter().map(str::to_owned).collect();
        let mut lines = lines;
        assert_eq!(
            last_bookmark(&mut lines),
            last_bookmark(&mut recorded),
            "{}: the last bookmark",
            self.name(number)
        );
        self.compare(number, &recorded.join("\n"), &lines.join("\n"));
    }

    /// Says why exchanges are not played.
    pub(crate) fn leave_out(&mut self, numbers: impl IntoIterator<Item = usize>, _reason: &str) {
        for number in numbers {
            assert!(
                self.seen.insert(number),
                "{} is both played and left out",
                self.name(number)
            );
        }
    }

    /// Takes an exchange as played that needs an eye of its own, and returns its request and response.
    pub(crate) fn exchange(&mut self, number: usize) -> (Value, Value) {
        assert!(self.seen.insert(number), "{} was seen before", self.name(number));
        let exchange = &self.exchanges[number - 1];
        (exchange["request"].clone(), exchange["response"].clone())
    }

    /// Every exchange must have been played, or left out with a reason.
    pub(crate) fn finish(self) {
        let all: BTreeSet<_> = (1..=self.exchanges.len()).collect();
        let forgotten: Vec<_> = all.difference(&self.seen).collect();
        assert!(
            forgotten.is_empty(),
            "{}: exchanges {forgotten:?} are neither played nor left out with a reason",
            self.topic
        );
    }

    // What was not recorded but happened in between, under the recorder's name.

    /// Creates a node with its pod range, under a revision.
    pub(crate) fn node(&self, revision: u64, name: &str, range: &str, labels: &Value) {
        self.create(
            revision,
            &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
            "spec": {"podCIDR": range, "podCIDRs": [range]}}),
        );
    }

    /// Creates a node as another manager.
    pub(crate) fn create(&self, revision: u64, node: &Value) {
        self.write(
            revision,
            &Request::new("POST", "/api/v1/nodes")
                .header("Content-Type", "application/json")
                .body(&node.to_string()),
        );
    }

    /// Changes metadata of a node by a merge patch, under a revision.
    pub(crate) fn patch(&self, revision: u64, name: &str, metadata: &Value) {
        let patch = json!({"metadata": metadata});
        self.write(
            revision,
            &Request::patch(&format!("/api/v1/nodes/{name}"), "merge-patch+json", &patch),
        );
    }

    pub(crate) fn delete(&self, revision: u64, name: &str) {
        self.write(revision, &Request::new("DELETE", &format!("/api/v1/nodes/{name}")));
    }

    /// A write by the recorder that succeeds, under a revision.
    pub(crate) fn write(&self, revision: u64, request: &Request) {
        self.server.advance_to(revision - 1);
        let answer = Client::connect(&self.server, &Identity::Admin)
            .unwrap()
            .ask(request)
            .unwrap();
        assert!(answer.status < 300, "{request:?}: {}", answer.text());
        assert_eq!(self.server.revision(), revision, "{request:?}");
    }

    /// Moves the server's counter to where it was.
    fn reach(&self, request: &Value, response: &Value) {
        let body: Value = response["body"]
            .as_str()
            .and_then(|body| serde_json::from_str(body).ok())
            .unwrap_or_default();
        let revision: Option<u64> = body["metadata"]["resourceVersion"]
            .as_str()
            .and_then(|text| text.parse().ok());
        let is_list = body["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
        match revision {
            Some(revision) if is_list => self.server.advance_to(revision),
            Some(revision) if request["method"] != "GET" => self.server.advance_to(revision - 1),
            _ => {}
        }
    }

    fn request(&self, recorded: &Value) -> Request {
        let mut request = Request::new(recorded["method"].as_str().unwrap(), recorded["path"].as_str().unwrap());
        for (name, value) in recorded["headers"].as_object().unwrap() {
            // Tokens are not recorded; the identity says whose it was.
            if name != "Authorization" || identity(recorded).is_none() {
                request = request.header(name, value.as_str().unwrap());
            }
        }
        let body = recorded["body"].as_str().unwrap_or_default();
        let body = self
            .uids
            .iter()
            .fold(body.to_owned(), |body, (recorded, here)| body.replace(recorded, here));
        request.body(&completed(&body))
    }

    fn client(&self, recorded: &Value) -> Client {
        let token = identity(recorded).map(|identity| self.server.token(&identity));
        Client::to(self.server.addresses()[0], &self.server.authority(), token).unwrap()
    }

    fn compare_head(&self, number: usize, response: &Value, answer: &Answer) {
        assert_eq!(
            json!(answer.status),
            response["status"],
            "{}: {}",
            self.name(number),
            answer.text()
        );
        let kept = |name: &str| !UNCOMPARED.contains(&name.to_lowercase().as_str());
        let headers = response["headers"].as_array().unwrap().iter();
        let recorded: BTreeSet<_> = headers
            .map(|pair| {
                (
                    pair[0].as_str().unwrap().to_owned(),
                    pair[1].as_str().unwrap().to_owned(),
                )
            })
            .filter(|(name, _)| kept(name))
            .collect();
        let found: BTreeSet<_> = answer.headers.iter().filter(|(name, _)| kept(name)).cloned().collect();
        assert_eq!(found, recorded, "{}: {}", self.name(number), answer.text());
    }

    /// Compares two texts but for uids, which must only be the same where they were, and times.
    fn compare(&mut self, number: usize, recorded: &str, found: &str) {
        let (theirs, ours) = (uids(recorded), uids(found));
        if theirs.len() == ours.len() {
            for (theirs, ours) in theirs.into_iter().zip(ours) {
                self.uids.entry(theirs).or_insert(ours);
            }
        }
        let recorded = self
            .uids
            .iter()
            .fold(recorded.to_owned(), |text, (theirs, ours)| text.replace(theirs, ours));
        let (recorded, found) = (sorted_causes(&timeless(&recorded)), sorted_causes(&timeless(found)));
        if recorded != found {
            let at = recorded
                .bytes()
                .zip(found.bytes())
                .position(|(one, other)| one != other)
                .unwrap_or(recorded.len().min(found.len()));
            let around = |text: &str| {
                let start = text.floor_char_boundary(at.saturating_sub(200));
                text[start..text.floor_char_boundary(at + 300)].to_owned()
            };
            panic!(
                "{}\nrecorded: …{}…\nfound:    …{}…",
                self.name(number),
                around(&recorded),
                around(&found)
            );
        }
    }

    fn name(&self, number: usize) -> String {
        format!(
            "{} {number} ({})",
            self.topic,
            self.exchanges[number - 1]["note"].as_str().unwrap_or_default()
        )
    }
}

/// Who asked; none if the credentials are in the recorded headers, or there are none.
fn identity(recorded: &Value) -> Option<Identity> {
    match recorded["identity"].as_str().unwrap() {
        "client certificate admin" => Some(Identity::Admin),
        text if text.contains("alice") => Some(Identity::User("alice".into())),
        text if text.ends_with("on node-a") => Some(Identity::agent("node-a")),
        text if text.ends_with("on node-b") => Some(Identity::agent("node-b")),
        text if text.starts_with("service account") => Some(Identity::UnboundAgent),
        _ => None,
    }
}

/// Takes the bookmarks out that end no initial events, and returns the last of them.
fn last_bookmark(lines: &mut Vec<String>) -> Option<String> {
    let is_plain = |line: &String| line.starts_with("{\"type\":\"BOOKMARK\"") && !line.contains("initial-events-end");
    let last = lines.iter().rev().find(|line| is_plain(line)).cloned();
    lines.retain(|line| !is_plain(line));
    last
}

/// A body that was recorded as `xxx... (N bytes in all)`, whole.
fn completed(body: &str) -> String {
    let Some((start, rest)) = body.split_once("... (") else {
        return body.to_owned();
    };
    let length: usize = rest.split(' ').next().unwrap().parse().unwrap();
    let end = "\"}}}";
    format!("{start}{}{end}", "x".repeat(length - start.len() - end.len()))
}

/// All uids in a text, each once, in their order.
pub(crate) fn uids(text: &str) -> Vec<String> {
    let shape = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx".as_bytes();
    let mut found: Vec<String> = Vec::new();
    for window in text.as_bytes().windows(shape.len()) {
        let is_uid = window.iter().zip(shape).all(|(byte, wanted)| {
            if *wanted == b'x' {
                byte.is_ascii_hexdigit()
            } else {
                byte == wanted
            }
        });
        let uid = String::from_utf8_lossy(window).into_owned();
        if is_uid && !found.contains(&uid) {
            found.push(uid);
        }
    }
    found
}

/// The text with each time of a whole second replaced by one that is always the same.
pub(crate) fn timeless(text: &str) -> String {
    let shape = b"dddd-dd-ddTdd:dd:ddZ";
    let mut bytes = text.as_bytes().to_vec();
    for start in 0..bytes.len().saturating_sub(shape.len() - 1) {
        let window = &mut bytes[start..start + shape.len()];
        if window.iter().zip(shape).all(|(byte, wanted)| {
            if *wanted == b'd' {
                byte.is_ascii_digit()
            } else {
                byte == wanted
            }
        }) {
            window.copy_from_slice(b"2026-01-01T00:00:00Z");
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// Conflicts of an apply come in the order of a Go map, which is none.
fn sorted_causes(text: &str) -> String {
    let Ok(mut value) = serde_json::from_str::<Value>(text) else {
        return text.to_owned();
    };
    let Some(causes) = value["details"]["causes"].as_array_mut() else {
        return text.to_owned();
    };
    if !causes.iter().all(|cause| cause["reason"] == "FieldManagerConflict") {
        return text.to_owned();
    }
    causes.sort_by_key(Value::to_string);
    value.to_string()
}
