//! What a test may make go wrong: which requests, how, and how often. It holds the faults that are armed and hands them out; others carry
//! them out.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;

use crate::request::Verb;
use crate::status::Refusal;

/// Something that goes wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    requests: Requests,
    effect: Effect,
    times: Option<usize>,
}

/// Which requests a fault meets: all that agree with what is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    verb: Option<Verb>,
    resource: Option<String>,
    name: Option<String>,
    username: Option<String>,
    path: Option<String>,
}

/// How it goes wrong.
#[derive(Clone, Debug)]
pub enum Effect {
    /// This answer instead of the right one.
    Answer(Answer),
    /// The right answer, this much later.
    Delay(Duration),
    /// No answer; the connection stays.
    Hang,
    /// No answer, and the connection is reset.
    Reset,
    /// No answer, and the whole connection falls silent: nothing is sent any more, not even its end.
    Silence,
    /// The right head and half of the body; then the connection is closed without the rest.
    CutBody,
    /// Half of the body, as if it were all.
    TruncateBody,
    /// In an open watch, or one that is opened later (after its first events).
    Watch(WatchEffect),
}

/// What goes wrong inside a watch.
#[derive(Clone, Debug)]
pub enum WatchEffect {
    /// It ends, as at its timeout.
    End,
    /// An `ERROR` event with this `Status`; then it ends.
    Error(Value),
    /// These bytes and a newline, where an event should be; then it goes on.
    Line(Vec<u8>),
    /// The connection is closed without the terminating chunk.
    Cut,
    /// The connection is reset.
    Reset,
    /// The connection falls silent.
    Silence,
}

/// An answer made by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// Headers, `Content-Type` among them.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Fault {
    /// This effect on all requests of the API, until cleared.
    pub fn new(effect: Effect) -> Self {
        Self {
            requests: Requests::default(),
            effect,
            times: None,
        }
    }

    /// This answer to all requests of the API, until cleared.
    pub fn answer(answer: Answer) -> Self {
        Self::new(Effect::Answer(answer))
    }

    /// This effect inside watches, until cleared.
    pub fn watch(effect: WatchEffect) -> Self {
        Self {
            requests: Requests::default().verb(Verb::Watch),
            effect: Effect::Watch(effect),
            times: None,
        }
    }

    /// Only on these requests.
    pub fn on(mut self, requests: Requests) -> Self {
        let verb = requests.verb.or(self.requests.verb);
        self.requests = Requests { verb, ..requests };
        self
    }

    /// Only so many times.
    pub fn times(mut self, times: usize) -> Self {
        self.times = Some(times);
        self
    }
}

impl Requests {
    /// Those of this verb.
    pub fn verb(mut self, verb: Verb) -> Self {
        self.verb = Some(verb);
        self
    }

    /// Those about this resource: `nodes`, `nodes/status`.
    pub fn resource(mut self, resource: &str) -> Self {
        self.resource = Some(resource.into());
        self
    }

    /// Those about this object.
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Those of this user.
    pub fn user(mut self, username: &str) -> Self {
        self.username = Some(username.into());
        self
    }

    /// Those to this path, also outside the API: `/readyz`.
    pub fn path(mut self, path: &str) -> Self {
        self.path = Some(path.into());
        self
    }

    /// The lists of a resource.
    pub fn lists(resource: &str) -> Self {
        Self::default().verb(Verb::List).resource(resource)
    }

    /// The watches of a resource.
    pub fn watches(resource: &str) -> Self {
        Self::default().verb(Verb::Watch).resource(resource)
    }

    /// The patches of a resource.
    pub fn patches(resource: &str) -> Self {
        Self::default().verb(Verb::Patch).resource(resource)
    }
}

impl Answer {
    fn text(status: u16, body: &str) -> Self {
        let headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("X-Content-Type-Options", "nosniff"),
        ];
        Self::with(status, &headers, body)
    }

    /// An answer with these headers.
    pub fn with(status: u16, headers: &[(&str, &str)], body: &str) -> Self {
        let cache = ("Cache-Control", "no-cache, private");
        let headers = [&[cache], headers]
            .concat()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Self {
            status,
            headers,
            body: body.into(),
        }
    }

    /// A `Status` object with this code, reason and message.
    pub fn status(code: u16, reason: &'static str, message: &str) -> Self {
        Self::refusal(&Refusal::new(code, reason, message))
    }

    fn refusal(refusal: &Refusal) -> Self {
        let mut headers = vec![("Content-Type", "application/json")];
        let seconds = refusal.retry_after().map(|seconds| seconds.to_string());
        if let Some(seconds) = &seconds {
            headers.push(("Retry-After", seconds));
        }
        let body = crate::encode::compact(&refusal.json());
        Self::with(refusal.code, &headers, &(String::from_utf8_lossy(&body) + "\n"))
    }

    /// 401, as for an expired token.
    pub fn unauthorized() -> Self {
        Self::refusal(&Refusal::unauthorized())
    }

    /// 429 of priority and fairness: text, and seconds to wait.
    pub fn too_many_requests(retry_after: u64) -> Self {
        let mut answer = Self::text(429, "Too many requests, please try again later.\n");
        answer.headers.push(("Retry-After".into(), retry_after.to_string()));
        answer
    }

    /// 429 of a server that is shutting down.
    pub fn shutting_down() -> Self {
        let mut answer = Self::text(429, "The apiserver is shutting down, please try again later.\n");
        answer.headers.retain(|(name, _)| name != "Cache-Control");
        answer.headers.extend([
            ("Retry-After".into(), "5".into()),
            ("Connection".into(), "close".into()),
        ]);
        answer
    }

    /// 429 of a cache that is not filled yet: a `Status`.
    pub fn initializing() -> Self {
        let refusal = Refusal::new(429, "TooManyRequests", "storage is (re)initializing");
        Self::refusal(&refusal.with_details(serde_json::json!({"retryAfterSeconds": 1})))
    }

    /// 504 of a request that etcd did not answer in time: JSON that says it is text, as recorded.
    pub fn etcd_timeout() -> Self {
        let body = "{\"metadata\":{},\"status\":\"Failure\",\"message\":\"Timeout: request did not complete within the allotted \
                    timeout\",\"reason\":\"Timeout\",\"details\":{},\"code\":504}\n";
        Self::with(504, &[("Content-Type", "text/plain; charset=utf-8")], body)
    }

    /// 500 with a `Status`.
    pub fn internal_error() -> Self {
        Self::status(500, "InternalError", "Internal error occurred: the test asked for it")
    }

    /// 503 with a `Status`; not recorded, but documented.
    pub fn unavailable() -> Self {
        Self::status(
            503,
            "ServiceUnavailable",
            "the server is currently unable to handle the request",
        )
    }

    /// 403 of RBAC for a user.
    pub fn forbidden(username: &str, verb: Verb, resource: &str) -> Self {
        let message = format!(
            "{resource} is forbidden: User {username:?} cannot {} resource {resource:?} in API group \"\" at the cluster scope",
            verb.name()
        );
        let details = crate::status::details("", "", resource);
        let mut answer = Self::refusal(&Refusal::new(403, "Forbidden", message).with_details(details));
        answer.headers.push(("X-Content-Type-Options".into(), "nosniff".into()));
        answer
    }
}

impl WatchEffect {
    /// The `ERROR` event of a watch whose revision is too old.
    pub fn expired(asked: u64, oldest: u64) -> Self {
        let message = format!("too old resource version: {asked} ({oldest})");
        Self::Error(Refusal::new(410, "Expired", message).json())
    }

    /// An `ERROR` event with another code.
    pub fn error(code: u16, reason: &'static str, message: &str) -> Self {
        Self::Error(Refusal::new(code, reason, message).json())
    }
}

/// What a fault is matched against.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) verb: Verb,
    pub(crate) resource: String,
    pub(crate) name: String,
    pub(crate) username: String,
    pub(crate) path: String,
}

impl Requests {
    fn met_by(&self, facts: &Facts) -> bool {
        let says = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        // Without a path a fault is about the API's objects.
        (self.path.is_some() || !facts.resource.is_empty())
            && self.verb.is_none_or(|verb| verb == facts.verb)
            && says(&self.resource, &facts.resource)
            && says(&self.name, &facts.name)
            && says(&self.username, &facts.username)
            && says(&self.path, &facts.path)
    }
}

/// The faults that are armed, oldest first.
#[derive(Debug)]
pub(crate) struct Faults {
    armed: Mutex<Vec<(u64, Fault)>>,
    changed: watch::Sender<u64>,
}

impl Faults {
    pub(crate) fn new() -> Self {
        Self {
            armed: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    pub(crate) fn arm(&self, fault: Fault) {
        self.changed.send_modify(|serial| {
            *serial += 1;
            self.armed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((*serial, fault));
        });
    }

    pub(crate) fn clear(&self) {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Tells of each fault that is armed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The effect on a request that has come.
    pub(crate) fn on_request(&self, facts: &Facts) -> Option<Effect> {
        self.take(facts, 0, |effect| !matches!(effect, Effect::Watch(_)))
            .map(|(_, effect)| effect)
    }

    /// The effect on a watch that is open, and the serial of the fault. A watch meets each fault once: it says which was its latest.
    pub(crate) fn on_watch(&self, facts: &Facts, latest: u64) -> Option<(u64, WatchEffect)> {
        match self.take(facts, latest, |effect| matches!(effect, Effect::Watch(_)))? {
            (serial, Effect::Watch(effect)) => Some((serial, effect)),
            _ => None,
        }
    }

    fn take(&self, facts: &Facts, latest: u64, stage: fn(&Effect) -> bool) -> Option<(u64, Effect)> {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let meets =
            |(serial, fault): &(u64, Fault)| *serial > latest && stage(&fault.effect) && fault.requests.met_by(facts);
        let index = armed.iter().position(meets)?;
        let (serial, fault) = &mut armed[index];
        let taken = (*serial, fault.effect.clone());
        if let Some(times) = &mut fault.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                armed.remove(index);
            }
        }
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(verb: Verb, resource: &str) -> Facts {
        Facts {
            verb,
            resource: resource.into(),
            name: String::new(),
            username: "u".into(),
            path: "/p".into(),
        }
    }

    #[test]
    fn a_fault_meets_what_it_names_as_often_as_it_says() {
        let faults = Faults::new();
        faults.arm(
            Fault::answer(Answer::unauthorized())
                .on(Requests::lists("nodes"))
                .times(2),
        );

        let met = |verb, resource: &str| faults.on_request(&facts(verb, resource)).is_some();

        assert_eq!(
            [met(Verb::Watch, "nodes"), met(Verb::List, "pods"), met(Verb::List, "")],
            [false; 3]
        );
        assert_eq!(
            [
                met(Verb::List, "nodes"),
                met(Verb::List, "nodes"),
                met(Verb::List, "nodes")
            ],
            [true, true, false]
        );
    }

    #[test]
    fn a_fault_inside_watches_leaves_their_requests_alone() {
        let faults = Faults::new();
        faults.arm(Fault::watch(WatchEffect::End).times(1));

        assert!(faults.on_request(&facts(Verb::Watch, "nodes")).is_none());
        assert!(faults.on_watch(&facts(Verb::Watch, "nodes"), 0).is_some());
        assert!(faults.on_watch(&facts(Verb::Watch, "nodes"), 0).is_none());
    }

    #[test]
    fn a_watch_meets_a_lasting_fault_once() {
        let faults = Faults::new();
        faults.arm(Fault::watch(WatchEffect::Line(b"x".to_vec())));

        let (serial, _) = faults.on_watch(&facts(Verb::Watch, "nodes"), 0).unwrap();

        assert!(faults.on_watch(&facts(Verb::Watch, "nodes"), serial).is_none());
        assert!(faults.on_watch(&facts(Verb::Watch, "nodes"), 0).is_some());
    }
}
