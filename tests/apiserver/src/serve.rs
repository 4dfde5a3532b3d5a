//! Answers one request: who asks, whether a fault meets it, whether it may, and what it gets. The work itself is done elsewhere; here is
//! only its order, and HTTP.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::access::{self, Asked};
use crate::body::{self, Piece};
use crate::clock;
use crate::context::Context;
use crate::decode;
use crate::discovery;
use crate::encode;
use crate::exec::{Exec, PROTOCOLS};
use crate::fault::{Effect, Facts};
use crate::identity::{User, uid};
use crate::journal::{Entry, Record};
use crate::link::Line;
use crate::list::List;
use crate::negotiate::{self, Asked as Form};
use crate::request::{Route, Target, Verb, route};
use crate::review;
use crate::status::Refusal;
use crate::store::{Key, Shape, metadata_only};
use crate::watch::{Watch, await_revision};
use crate::websocket;
use crate::write::{Patch, Writer, Written};

/// Above this size a list is compressed for who accepts it.
const GZIP_ABOVE: usize = 128 * 1024;

/// An answer before it is HTTP.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Bytes(Bytes),
    Stream(mpsc::Receiver<Piece>),
}

/// Ends the entry of a request that is never answered, because its client or its connection went.
struct Unanswered(Option<Arc<Entry>>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(entry) = &self.0 {
            entry.ended();
        }
    }
}

/// Everything known about a request before its body is read.
struct Call {
    context: Arc<Context>,
    route: Route,
    path: String,
    headers: HeaderMap,
    user: Option<User>,
    facts: Facts,
    line: Arc<Line>,
}

/// What comes after the head of a request.
struct Rest {
    body: Incoming,
    /// The connection itself, once the answer is that it is HTTP no longer.
    upgrade: Option<OnUpgrade>,
}

/// Answers a request.
pub(crate) async fn answer(
    context: Arc<Context>,
    line: Arc<Line>,
    request: Request<Incoming>,
) -> Result<Response<body::Answer>, Infallible> {
    let (mut parts, body) = request.into_parts();
    let upgrade = parts.extensions.remove();
    let (path, query) = (
        parts.uri.path().to_owned(),
        parts.uri.query().unwrap_or_default().to_owned(),
    );
    let route = route(parts.method.as_str(), &path, &query);
    let user = authenticate(&context, &parts.headers);
    let facts = facts(&route, user.as_ref(), &path);
    let entry = context.journal.open(Record {
        method: parts.method.to_string(),
        path: path.clone(),
        query,
        verb: facts.verb,
        resource: facts.resource.clone(),
        username: facts.username.clone(),
        agent: text(&parts.headers, header::USER_AGENT).to_owned(),
        status: None,
        bytes: 0,
        start: Instant::now(),
        end: None,
    });
    let mut unanswered = Unanswered(Some(entry.clone()));

    let effect = context.faults.on_request(&facts);
    match &effect {
        Some(Effect::Delay(duration)) => tokio::time::sleep(*duration).await,
        Some(Effect::Hang) => std::future::pending().await,
        Some(Effect::Reset) => {
            line.reset();
            std::future::pending().await
        }
        Some(Effect::Silence) => {
            line.silence();
            std::future::pending().await
        }
        Some(Effect::Answer(_) | Effect::CutBody | Effect::TruncateBody | Effect::Watch(_)) | None => {}
    }
    let response = if let Some(Effect::Answer(made)) = &effect {
        entry.answered(made.status);
        made_by_hand(&context, made, entry)
    } else {
        let call = Call {
            context: context.clone(),
            route,
            path,
            headers: parts.headers,
            user,
            facts,
            line,
        };
        let reply = call.reply(Rest { body, upgrade }).await;
        entry.answered(reply.status);
        reply.response(&context, effect.as_ref(), entry)
    };
    unanswered.0 = None;
    Ok(response)
}

impl Call {
    async fn reply(&self, rest: Rest) -> Reply {
        match self.outcome(rest).await {
            Ok(reply) => reply,
            Err(refusal) => self.refused(&refusal),
        }
    }

    async fn outcome(&self, Rest { body, upgrade }: Rest) -> Result<Reply, Refusal> {
        let user = self.user.as_ref().ok_or_else(Refusal::unauthorized)?;
        match &self.route {
            Route::Version => Ok(Reply::json(200, discovery::VERSION.into())),
            Route::Health => Ok(Reply::text(200, "ok")),
            Route::Discovery | Route::Elsewhere if !user.groups.iter().any(|group| group == "system:authenticated") => {
                Err(access::forbidden_path(user, Verb::Get, &self.path))
            }
            Route::Discovery => match discovery::answer(&self.path) {
                Some(value) => Ok(Reply::object(200, &value, self.is_pretty())),
                None => Ok(Reply::text(404, "404 page not found\n")),
            },
            Route::Elsewhere => Ok(Reply::text(404, "404 page not found\n")),
            Route::Objects(target) => {
                self.authorize(user, target)?;
                if target.plural.starts_with("selfsubject") {
                    let body = read(body).await?;
                    let object = decode::json(&body, text(&self.headers, header::CONTENT_TYPE), "Review")?;
                    let answer = review::answer(&self.context, target, user, object, &self.manager(target))?;
                    return Ok(Reply::object(201, &answer, self.is_pretty()));
                }
                let Some(resource) = target.resource() else {
                    return if discovery::has_group(&target.group, &target.version) {
                        Err(Refusal::no_such_resource())
                    } else {
                        Ok(Reply::text(404, "404 page not found\n"))
                    };
                };
                if (target.plural.as_str(), target.subresource.as_str()) == ("pods", "exec") {
                    return self.exec(user, target, upgrade);
                }
                let known_part =
                    target.subresource.is_empty() || (target.subresource == "status" && resource.has_status);
                if !known_part {
                    return Err(Refusal::no_such_resource());
                }
                match target.verb {
                    Verb::Get => self.get(target).await,
                    Verb::List => self.list(target).await,
                    Verb::Watch => self.watch(target).await,
                    Verb::Create | Verb::Update | Verb::Patch | Verb::Delete => self.write(user, target, body).await,
                    Verb::Other => Err(Refusal::method_not_allowed()),
                }
            }
        }
    }

    fn authorize(&self, user: &User, target: &Target) -> Result<(), Refusal> {
        let grants = self.context.grants.lock().unwrap_or_else(PoisonError::into_inner);
        let mut asked = Asked::of(target);
        let impersonation = format!("impersonate-on:user-info:{}", asked.verb);
        if self.headers.contains_key("impersonate-user") {
            asked.verb = &impersonation;
        }
        if access::is_allowed(&grants, user, &asked) {
            Ok(())
        } else {
            Err(access::forbidden(user, &asked))
        }
    }

    async fn get(&self, target: &Target) -> Result<Reply, Refusal> {
        let resource = target.resource().ok_or_else(Refusal::no_such_resource)?;
        if let Ok(Some(revision)) = crate::list::parse_revision(target.parameters.text("resourceVersion")) {
            await_revision(&self.context, revision).await?;
        }
        let shape = negotiate::shape(text(&self.headers, header::ACCEPT), Form::Object)?;
        let state = self.context.store.read();
        let object = state
            .object(resource, &key(target))
            .ok_or_else(|| Refusal::not_found(resource, &target.name))?;
        if self.is_pretty() {
            return Ok(Reply::object(200, &shaped(object.value.clone(), shape), true));
        }
        Ok(Reply::line(200, object.encoded(shape)))
    }

    async fn list(&self, target: &Target) -> Result<Reply, Refusal> {
        let resource = target.resource().ok_or_else(Refusal::no_such_resource)?;
        let shape = negotiate::shape(text(&self.headers, header::ACCEPT), Form::List(resource.kind))?;
        let list = List::parse(resource, &target.namespace, &target.parameters)?;
        if let Some(revision) = list.awaited() {
            await_revision(&self.context, revision).await?;
        }
        let body = list.answer(&self.context.store.read(), resource, shape)?;
        if self.is_pretty() {
            let value: Value = serde_json::from_slice(&body).unwrap_or_default();
            return Ok(Reply::object(200, &value, true));
        }
        let accepts_gzip = text(&self.headers, header::ACCEPT_ENCODING).contains("gzip");
        Ok(if accepts_gzip && body.len() > GZIP_ABOVE {
            Reply::compressed(&body)
        } else {
            Reply::json(200, body)
        })
    }

    async fn watch(&self, target: &Target) -> Result<Reply, Refusal> {
        let resource = target.resource().ok_or_else(Refusal::no_such_resource)?;
        let shape = negotiate::shape(text(&self.headers, header::ACCEPT), Form::Watch)?;
        let lists = self.context.options.streaming_lists;
        let watch = Watch::parse(resource, &target.namespace, shape, &target.parameters, lists)?;
        let (out, pieces) = mpsc::channel(16);
        // The task ends when the client goes, for then nobody receives.
        let (begun, has_begun) = oneshot::channel();
        tokio::spawn(watch.run(self.context.clone(), self.facts.clone(), self.line.clone(), begun, out));
        // Nothing is ever sent: that the sender is gone is the news.
        let _gone = has_begun.await;
        Ok(Reply {
            status: 200,
            headers: vec![("Content-Type", "application/json".into())],
            content: Content::Stream(pieces),
        })
    }

    fn exec(&self, user: &User, target: &Target, upgrade: Option<OnUpgrade>) -> Result<Reply, Refusal> {
        // Since v1.35 whoever may only read may not run commands by way of a GET.
        let create = Target {
            verb: Verb::Create,
            ..target.clone()
        };
        self.authorize(user, &create)?;
        let resource = target.resource().ok_or_else(Refusal::no_such_resource)?;
        let state = self.context.store.read();
        let pod = state
            .object(resource, &key(target))
            .ok_or_else(|| Refusal::not_found(resource, &target.name))?;
        let names: Vec<&str> = pod.value["spec"]["containers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|container| container["name"].as_str())
            .collect();
        let container = match (target.parameters.text("container"), names.as_slice()) {
            ("", [only]) => *only,
            ("", many) => {
                let (name, many) = (&target.name, many.join(" "));
                let message = format!("a container name must be specified for pod {name}, choose one of: [{many}]");
                return Err(Refusal::bad_request(message));
            }
            (named, _) if names.contains(&named) => named,
            (named, _) => {
                let message = format!("container {named} is not valid for pod {}", target.name);
                return Err(Refusal::bad_request(message));
            }
        };
        let Some(node) = pod.value["spec"]["nodeName"].as_str() else {
            let message = format!("pod {} does not have a host assigned", target.name);
            return Err(Refusal::bad_request(message));
        };
        let (Some(upgrade), Some(websocket_key)) = (upgrade, websocket::asked(&self.headers)) else {
            return Err(Refusal::bad_request("Upgrade request required"));
        };
        let mut offered = text(&self.headers, header::SEC_WEBSOCKET_PROTOCOL)
            .split(',')
            .map(str::trim);
        let Some(protocol) = offered.find(|protocol| PROTOCOLS.contains(protocol)) else {
            let message = format!("none of the subprotocols is one of {}", PROTOCOLS.join(", "));
            return Err(Refusal::bad_request(message));
        };
        let exec = Exec {
            namespace: target.namespace.clone(),
            pod: target.name.clone(),
            node: node.to_owned(),
            container: container.to_owned(),
            command: target.parameters.all("command").to_vec(),
            username: user.username.clone(),
        };
        let headers = vec![
            ("Connection", "Upgrade".to_owned()),
            ("Upgrade", "websocket".to_owned()),
            ("Sec-WebSocket-Accept", websocket::accept(websocket_key)),
            ("Sec-WebSocket-Protocol", protocol.to_owned()),
        ];
        let (context, line) = (self.context.clone(), self.line.clone());
        // The task ends with the command, with the client, or with the connection.
        tokio::spawn(async move { context.commands.converse(upgrade, line, exec).await });
        Ok(Reply {
            status: 101,
            headers,
            content: Content::Bytes(Bytes::new()),
        })
    }

    async fn write(&self, user: &User, target: &Target, body: Incoming) -> Result<Reply, Refusal> {
        let resource = target.resource().ok_or_else(Refusal::no_such_resource)?;
        let shape = negotiate::shape(text(&self.headers, header::ACCEPT), Form::Object)?;
        let named = !target.name.is_empty();
        if named == (target.verb == Verb::Create) || (named && resource.namespaced && target.namespace.is_empty()) {
            return Err(Refusal::method_not_allowed());
        }
        let media = text(&self.headers, header::CONTENT_TYPE).to_owned();
        let body = read(body).await?;
        let policy = self
            .context
            .policy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let writer = Writer {
            resource,
            subresource: &target.subresource,
            user,
            manager: self.manager(target),
            dry_run: target.parameters.text("dryRun") == "All",
            strict: target.parameters.text("fieldValidation") == "Strict",
            now: self.context.clock.now(),
            policy: policy.as_ref(),
        };
        let store = &self.context.store;
        let written = match target.verb {
            Verb::Create => {
                let object = decode::json(&body, &media, resource.kind)?;
                store.write(|state| writer.create(state, &target.namespace, object))?
            }
            Verb::Update => {
                let object = decode::json(&body, &media, resource.kind)?;
                store.write(|state| writer.update(state, &key(target), object))?
            }
            Verb::Delete => {
                let only = decode::preconditions(&body)?;
                store.write(|state| writer.delete(state, &key(target), &only))?
            }
            Verb::Patch => {
                let patch = self.patch(user, target, &media, &body)?;
                store.write(|state| writer.patch(state, &key(target), patch))?
            }
            Verb::Get | Verb::List | Verb::Watch | Verb::Other => return Err(Refusal::method_not_allowed()),
        };
        Ok(self.written(written, shape))
    }

    fn patch(&self, user: &User, target: &Target, media: &str, body: &[u8]) -> Result<Patch, Refusal> {
        match media.split(';').next().unwrap_or_default().trim() {
            "application/merge-patch+json" => Ok(Patch::Merge(decode::patch(body)?)),
            "application/strategic-merge-patch+json" => Ok(Patch::Strategic(decode::patch(body)?)),
            "application/json-patch+json" => Ok(Patch::Json(decode::operations(body)?)),
            "application/apply-patch+yaml" => {
                if target.parameters.text("fieldManager").is_empty() {
                    let cause = crate::status::Cause::required("fieldManager", "is required for apply patch");
                    return Err(Refusal::invalid("PatchOptions", "meta.k8s.io", "", &[cause]));
                }
                let create = Target {
                    verb: Verb::Create,
                    ..target.clone()
                };
                Ok(Patch::Apply {
                    wanted: decode::applied(body)?,
                    force: target.parameters.is_true("force"),
                    may_create: self.authorize(user, &create).map_err(|refusal| Refusal {
                        by_authorizer: false,
                        ..refusal
                    }),
                })
            }
            _ => {
                let refusal = Refusal::new(415, "UnsupportedMediaType", "415: Unsupported Media Type");
                Err(refusal.with_details(serde_json::json!({})))
            }
        }
    }

    fn written(&self, written: Written, shape: Shape) -> Reply {
        let is_object = written.answer["kind"] != "Status";
        let answer = if is_object {
            shaped(written.answer, shape)
        } else {
            written.answer
        };
        let mut reply = Reply::object(if written.created { 201 } else { 200 }, &answer, self.is_pretty());
        for warning in written.warnings {
            let quoted = String::from_utf8_lossy(&encode::compact(&warning.into())).into_owned();
            reply.headers.push(("Warning", format!("299 - {quoted}")));
        }
        reply
    }

    fn refused(&self, refusal: &Refusal) -> Reply {
        let pretty =
            refusal.indented || self.is_pretty() || negotiate::errors_are_pretty(text(&self.headers, header::ACCEPT));
        let mut reply = Reply::object(refusal.code, &refusal.json(), pretty);
        if let Some(seconds) = refusal.retry_after() {
            reply.headers.push(("Retry-After", seconds.to_string()));
        }
        if refusal.by_authorizer {
            reply.headers.push(("X-Content-Type-Options", "nosniff".into()));
        }
        reply
    }

    /// The field manager: as the request says, or by the name of the program.
    fn manager(&self, target: &Target) -> String {
        let said = target.parameters.text("fieldManager");
        let program = text(&self.headers, header::USER_AGENT)
            .split('/')
            .next()
            .unwrap_or_default();
        [said, program, "unknown"]
            .into_iter()
            .find(|name| !name.is_empty())
            .unwrap_or_default()
            .to_owned()
    }

    fn is_pretty(&self) -> bool {
        let asked = match &self.route {
            Route::Objects(target) => target.parameters.find("pretty"),
            Route::Version | Route::Health | Route::Discovery | Route::Elsewhere => None,
        };
        negotiate::is_pretty(asked, text(&self.headers, header::USER_AGENT))
    }
}

impl Reply {
    fn json(status: u16, body: Bytes) -> Self {
        Self {
            status,
            headers: vec![("Content-Type", "application/json".into())],
            content: Content::Bytes(body),
        }
    }

    fn object(status: u16, value: &Value, pretty: bool) -> Self {
        if pretty {
            return Self::json(status, encode::pretty(value).into());
        }
        Self::line(status, &encode::compact(value))
    }

    fn line(status: u16, line: &[u8]) -> Self {
        Self::json(status, [line, b"\n"].concat().into())
    }

    fn text(status: u16, text: &'static str) -> Self {
        let headers = vec![
            ("Content-Type", "text/plain; charset=utf-8".into()),
            ("X-Content-Type-Options", "nosniff".into()),
        ];
        Self {
            status,
            headers,
            content: Content::Bytes(text.into()),
        }
    }

    fn compressed(body: &[u8]) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(4));
        let compressed = std::io::Write::write_all(&mut encoder, body).and_then(|()| encoder.finish());
        let mut reply = Self::json(200, compressed.expect("a vector takes whatever is written").into());
        reply
            .headers
            .extend([("Content-Encoding", "gzip".into()), ("Vary", "Accept-Encoding".into())]);
        reply
    }

    fn response(self, context: &Context, effect: Option<&Effect>, entry: Arc<Entry>) -> Response<body::Answer> {
        let content = match (self.content, effect) {
            (Content::Bytes(bytes), Some(Effect::TruncateBody)) => {
                body::Answer::whole(bytes.slice(..bytes.len() / 2), entry)
            }
            (Content::Bytes(bytes), Some(Effect::CutBody)) => {
                let (out, pieces) = mpsc::channel(2);
                let half = bytes.slice(..bytes.len() / 2);
                out.try_send(Piece::Bytes(half))
                    .and_then(|()| out.try_send(Piece::Cut))
                    .expect("there is room for two");
                body::Answer::stream(pieces, entry)
            }
            (Content::Stream(_), Some(Effect::CutBody | Effect::TruncateBody)) => {
                let (out, pieces) = mpsc::channel(1);
                out.try_send(Piece::Cut).expect("there is room for one");
                body::Answer::stream(pieces, entry)
            }
            (Content::Bytes(bytes), _) => body::Answer::whole(bytes, entry),
            (Content::Stream(pieces), _) => body::Answer::stream(pieces, entry),
        };
        let mut response = Response::new(content);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let own = [
            ("Audit-Id", uid()),
            ("Cache-Control", "no-cache, private".into()),
            ("Date", clock::http_date(context.clock.now())),
        ];
        for (name, value) in own.into_iter().chain(self.headers) {
            insert(response.headers_mut(), name, &value);
        }
        response
    }
}

fn made_by_hand(context: &Context, made: &crate::fault::Answer, entry: Arc<Entry>) -> Response<body::Answer> {
    let mut response = Response::new(body::Answer::measured(made.body.clone().into(), entry));
    *response.status_mut() = StatusCode::from_u16(made.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    insert(response.headers_mut(), "Date", &clock::http_date(context.clock.now()));
    for (name, value) in &made.headers {
        insert(response.headers_mut(), name, value);
    }
    response
}

fn insert(headers: &mut HeaderMap, name: &str, value: &str) {
    let name = HeaderName::from_bytes(name.as_bytes()).expect("a header's name");
    headers.append(
        name,
        HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static("?")),
    );
}

fn authenticate(context: &Context, headers: &HeaderMap) -> Option<User> {
    match text(headers, header::AUTHORIZATION) {
        "" => Some(User::anonymous()),
        credentials => context.tokens.user_of(credentials.strip_prefix("Bearer ")?.trim()),
    }
}

fn facts(route: &Route, user: Option<&User>, path: &str) -> Facts {
    let username = user.map(|user| user.username.clone()).unwrap_or_default();
    let path = path.to_owned();
    match route {
        Route::Objects(target) => Facts {
            verb: target.verb,
            resource: Asked::of(target).resource,
            name: target.name.clone(),
            username,
            path,
        },
        Route::Version | Route::Health | Route::Discovery | Route::Elsewhere => Facts {
            verb: Verb::Other,
            resource: String::new(),
            name: String::new(),
            username,
            path,
        },
    }
}

fn key(target: &Target) -> Key {
    Key {
        namespace: target.namespace.clone(),
        name: target.name.clone(),
    }
}

fn shaped(object: Value, shape: Shape) -> Value {
    match shape {
        Shape::Full => object,
        Shape::Metadata => metadata_only(&object),
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// Reads a body, up to the limit of the real server.
async fn read(mut body: Incoming) -> Result<Vec<u8>, Refusal> {
    const LIMIT: usize = 3_145_728;
    let mut bytes = Vec::new();
    let mut length = 0;
    while let Some(Ok(frame)) = body.frame().await {
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        // What is too much is read and dropped, so that the client gets to see the answer.
        if length <= LIMIT {
            bytes.extend(&data);
        }
    }
    if length > LIMIT {
        let message = format!("Request entity too large: limit is {LIMIT}");
        return Err(Refusal::new(413, "RequestEntityTooLarge", message));
    }
    Ok(bytes)
}
