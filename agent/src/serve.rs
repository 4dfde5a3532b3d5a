//! The status socket: one request per connection, a line of JSON each way.
//!
//! The socket is 0600 in a 0700 directory, and whoever connects must be root or the agent's own user: what it tells (addresses of pods,
//! who talks to whom) is the operator's business alone, and so is a change of key, the only deed that can be asked for.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::cli::Source;
use crate::places::Places;

/// How long a request may take, from the first byte to the last.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request line, in bytes.
const LONGEST_REQUEST: u64 = 4096;
/// How many connections are served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 16;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "request", deny_unknown_fields)]
pub(crate) enum Request {
    /// The whole status.
    Status,
    /// The gate's counters.
    Gate,
    /// The text for Prometheus.
    Metrics,
    /// Whether this node may be relied upon.
    Readiness,
    /// A new key for this node.
    Rotate,
    /// What happens to a packet.
    Explain {
        /// Where it comes from.
        source: Source,
        /// Where it goes.
        destination: std::net::IpAddr,
    },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Response<T> {
    /// The answer.
    Ok(T),
    /// Why there is none.
    Error(String),
}

/// A question on its way to whoever can answer it.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<Result<serde_json::Value, String>>,
}

/// Makes the status socket.
///
/// # Errors
/// When the socket cannot be made; an old file in its place is replaced, since the caller holds the agent's lock.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves requests for as long as it is polled.
pub(crate) async fn serve(listener: UnixListener, questions: mpsc::Sender<Question>) -> io::Result<()> {
    let places = Places::new(CONNECTIONS);
    loop {
        let place = places.free().await;
        let (stream, _) = listener.accept().await?;
        place.serve("status", PATIENCE, answer(stream, questions.clone()));
    }
}

async fn answer(mut stream: UnixStream, questions: mpsc::Sender<Question>) -> io::Result<()> {
    let caller = stream.peer_cred()?;
    let own = rustix::process::geteuid().as_raw();
    // Read first, refuse afterwards: an answer to somebody who is still writing is lost with a broken pipe.
    let mut line = String::new();
    BufReader::new((&mut stream).take(LONGEST_REQUEST))
        .read_line(&mut line)
        .await?;
    let response = if caller.uid() != 0 && caller.uid() != own {
        warn!(
            uid = caller.uid(),
            "status request refused: only root and the agent's own user may ask"
        );
        Response::Error("only root and the agent's own user may ask".to_owned())
    } else {
        match serde_json::from_str(&line) {
            Ok(request) => ask(&questions, request).await,
            Err(error) => Response::Error(format!("not a request: {error}")),
        }
    };
    let mut text = serde_json::to_vec(&response).map_err(io::Error::other)?;
    text.push(b'\n');
    stream.write_all(&text).await
}

async fn ask(questions: &mpsc::Sender<Question>, request: Request) -> Response<serde_json::Value> {
    let (sender, receiver) = oneshot::channel();
    if questions
        .send(Question {
            request,
            answer: sender,
        })
        .await
        .is_err()
    {
        return Response::Error("the agent is stopping".to_owned());
    }
    match receiver.await {
        Ok(Ok(value)) => Response::Ok(value),
        Ok(Err(reason)) => Response::Error(reason),
        Err(_) => Response::Error("the agent is stopping".to_owned()),
    }
}

/// Why an agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// Nobody listens.
    #[error("no agent answers on {}: {source}; is `shroud agent` running, and is this its socket (--socket)?", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It answered that it cannot.
    #[error("the agent refused: {0}")]
    Refused(String),
}

/// Asks an agent, and waits for its answer.
///
/// # Errors
/// [`NoAnswer`] when it cannot be reached, does not answer in time, or refuses.
pub(crate) fn request<T: DeserializeOwned>(path: &Path, request: &Request) -> Result<T, NoAnswer> {
    use std::io::{BufRead, Write};

    let exchange = || -> io::Result<Response<T>> {
        let mut stream = std::os::unix::net::UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE * 2))?;
        let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut response = String::new();
        io::BufReader::new(stream).read_line(&mut response)?;
        serde_json::from_str(&response).map_err(io::Error::other)
    };
    match exchange() {
        Ok(Response::Ok(answer)) => Ok(answer),
        Ok(Response::Error(reason)) => Err(NoAnswer::Refused(reason)),
        Err(source) => Err(NoAnswer::Unreachable {
            path: path.to_owned(),
            source,
        }),
    }
}
