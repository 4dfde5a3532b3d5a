//! The HTTP side: metrics, and the probes by which a supervisor knows whether to restart this agent and whether to rely on it.
//!
//! ```text
//!   GET /livez    <── the pulse of the reconcile thread; nothing else
//!   GET /readyz   <── question ──> reconcile thread
//!   GET /metrics  <── question ──> reconcile thread
//! ```
//!
//! It has a thread of its own, so that a directory whose disk hangs cannot keep it from answering. It decides nothing, and changes
//! nothing. Everything is bounded: connections, the size of a request, and the time that it takes.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tracing::{debug, info, warn};

use crate::check::{Check, Problem};
use crate::metrics;
use crate::places::Places;
use crate::readiness::Readiness;
use crate::reconcile::Wake;
use crate::serve;

/// How many connections are served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 32;
/// How long a connection may take, from the first byte to the last. One connection is one request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the reconcile thread may take for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// The most bytes of a request's head.
const LARGEST_HEAD: usize = 16 * 1024;
/// The most header lines of a request.
const HEADERS: usize = 64;
/// How soon an address that cannot be had is tried again.
const RETRY: Duration = Duration::from_secs(3);
/// How long a pass may take on top of the time between passes. One that waits for a device that does not answer takes some seconds.
const LONGEST_PASS: Duration = Duration::from_secs(60);
/// How many passes may be left out.
const MISSED_PASSES: u32 = 3;

const TEXT: &str = "text/plain; charset=utf-8";

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// Whether this agent works.
    Livez,
    /// Whether this node may be relied upon.
    Readyz,
    /// What is counted.
    Metrics,
}

impl Endpoint {
    pub(crate) const ALL: [Self; 3] = [Self::Livez, Self::Readyz, Self::Metrics];

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Livez => "/livez",
            Self::Readyz => "/readyz",
            Self::Metrics => "/metrics",
        }
    }
}

/// What the answers are made from.
#[derive(Clone)]
pub(crate) struct Sources {
    /// Where questions go.
    pub(crate) wakes: SyncSender<Wake>,
    /// When the last pass ended.
    pub(crate) pulse: watch::Receiver<Instant>,
    /// How long after that the reconcile thread counts as stuck; see [`stuck_after`].
    pub(crate) stuck_after: Duration,
}

/// The thread that answers.
pub(crate) struct Server {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

/// How long the reconcile thread may be silent when a pass is due this often.
pub(crate) fn stuck_after(resync: Duration) -> Duration {
    resync * MISSED_PASSES + LONGEST_PASS
}

impl Server {
    /// Starts to answer at an address, or never does when there is none. An address that cannot be had is a problem, told in `problem`
    /// and tried again. `ended` hears of the thread's end, also of one by panic.
    ///
    /// # Errors
    /// When the system gives no thread or no event queue.
    pub(crate) fn start(
        listen: Option<SocketAddr>,
        sources: Sources,
        problem: watch::Sender<Option<Problem>>,
        ended: oneshot::Sender<Infallible>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime of the http thread")?;
        let (stop, stopped) = oneshot::channel();
        let answer = async move {
            match listen {
                Some(address) => keep_answering(address, sources, problem).await,
                None => std::future::pending().await,
            }
        };
        let thread = std::thread::Builder::new()
            .name("http".to_owned())
            .spawn(move || {
                let _ended = ended;
                runtime.block_on(async move {
                    tokio::select! {
                        // Told to stop, or the one who would tell is gone.
                        _ = stopped => {}
                        never = answer => match never {},
                    }
                });
            })
            .context("start the http thread")?;
        Ok(Self { stop, thread })
    }

    /// Stops answering, and waits until it has stopped.
    ///
    /// # Errors
    /// When the thread panicked.
    pub(crate) fn stop(self) -> anyhow::Result<()> {
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow!("the http thread panicked"))
    }
}

async fn keep_answering(address: SocketAddr, sources: Sources, problem: watch::Sender<Option<Problem>>) -> Infallible {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!(%address, "metrics and probes");
                problem.send_replace(None);
                return accept(listener, sources, PATIENCE).await;
            }
            Err(error) => {
                let found = cannot_listen(address, &error);
                if problem.borrow().as_ref() != Some(&found) {
                    warn!(check = %found.check, says = found.says, "nobody can ask for metrics and probes");
                    problem.send_replace(Some(found));
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn cannot_listen(address: SocketAddr, error: &io::Error) -> Problem {
    if error.kind() == io::ErrorKind::AddrInUse {
        let port = address.port();
        return Check::HttpPortTaken.says(format!(
            "listen on {address}: another program has TCP port {port}: stop it (`ss -ltnp` shows which), or change http.listen"
        ));
    }
    Check::HttpFailed.says(format!(
        "listen on {address}: {error}: is it an address of this node? (http.listen)"
    ))
}

async fn accept(listener: TcpListener, sources: Sources, patience: Duration) -> Infallible {
    let places = Places::new(CONNECTIONS);
    loop {
        let place = places.free().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // One that gave up while it waited, or a lack of descriptors, which passes.
                debug!(%error, "no connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        place.serve("http", patience, serve_one(stream, sources.clone()));
    }
}

async fn serve_one(stream: TcpStream, sources: Sources) -> hyper::Result<()> {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let sources = sources.clone();
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), &sources).await) }
    });
    http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(LARGEST_HEAD)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn answer(method: &Method, path: &str, sources: &Sources) -> Response<String> {
    let Some(endpoint) = Endpoint::ALL.into_iter().find(|endpoint| endpoint.path() == path) else {
        let paths = Endpoint::ALL.map(Endpoint::path).join(", ");
        return response(
            StatusCode::NOT_FOUND,
            TEXT,
            format!("there is nothing here; ask for one of {paths}\n"),
        );
    };
    if method != Method::GET && method != Method::HEAD {
        let text = "this can only be read: GET or HEAD\n".to_owned();
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
        refusal
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match endpoint {
        Endpoint::Livez => {
            let (alive, text) = pulse(*sources.pulse.borrow(), Instant::now(), sources.stuck_after);
            response(status(alive), TEXT, text)
        }
        Endpoint::Readyz => {
            let readiness = ask(serve::Request::Readiness, &sources.wakes)
                .await
                .unwrap_or_else(Readiness::unknown);
            response(status(readiness.is_ready()), TEXT, readiness.text())
        }
        Endpoint::Metrics => match ask(serve::Request::Metrics, &sources.wakes).await {
            Ok(text) => response(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(why) => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
        },
    }
}

fn status(well: bool) -> StatusCode {
    if well {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

fn response(status: StatusCode, content: &'static str, text: String) -> Response<String> {
    let mut response = Response::new(text);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content));
    response
}

/// Whether the reconcile thread works, told by when its last pass ended, and a line that says so.
fn pulse(last: Instant, now: Instant, stuck_after: Duration) -> (bool, String) {
    let silent = now.saturating_duration_since(last);
    let alive = silent <= stuck_after;
    let sign = if alive { '+' } else { '-' };
    let text = format!(
        "[{sign}]reconcile: last pass ended {:.1} s ago, at most {} s are allowed\n",
        silent.as_secs_f64(),
        stuck_after.as_secs()
    );
    (alive, text)
}

/// Asks the reconcile thread.
async fn ask<T: serde::de::DeserializeOwned>(request: serve::Request, wakes: &SyncSender<Wake>) -> Result<T, String> {
    let (answer, answered) = oneshot::channel();
    wakes.try_send(Wake::Question { request, answer }).map_err(|error| {
        match error {
            TrySendError::Full(_) => "the agent is busy; ask again",
            TrySendError::Disconnected(_) => "the agent is stopping",
        }
        .to_owned()
    })?;
    match tokio::time::timeout(ANSWER, answered).await {
        Ok(Ok(Ok(value))) => serde_json::from_value(value).map_err(|error| error.to_string()),
        Ok(Ok(Err(why))) => Err(why),
        Ok(Err(_)) => Err("the agent is stopping".to_owned()),
        Err(_) => Err(format!(
            "the reconcile thread did not answer within {} s",
            ANSWER.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests;
