//! One exchange with an API server: who it is, what it answered, and how it failed. Never decides when to ask again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderValue, header};
use http_body_util::{BodyExt as _, Limited};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt as _, Connection};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Mutex;
use tower::ServiceBuilder;

use crate::FailureKind;
use crate::refusal::Excerpt;

/// How long a connection may take to be made, its TLS handshake not counted.
const CONNECT: Duration = Duration::from_secs(10);
/// How long an answer may take. An API server itself gives up after a minute.
const ANSWER: Duration = Duration::from_secs(70);
/// How soon the kernel notices a server that went away without a word: 15 s of silence, then three probes.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);
/// The longest answer that is read, in bytes: a page of Nodes is a tenth of it.
const LONGEST_ANSWER: usize = 64 << 20;
/// How much of an error's answer is read.
const LONGEST_ERROR: usize = 64 << 10;

/// An API server, and who we are to it.
pub(super) struct Api {
    credentials: Credentials,
    connected: Mutex<Option<Connected>>,
}

/// Whose credentials are used, and where they lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    /// Those of a pod's ServiceAccount.
    Pod,
    /// An agent's, in a file.
    File(PathBuf),
    /// Those of whoever runs this program, as `kubectl` would find them.
    Operator {
        /// The file; without one, what `KUBECONFIG` names, or `~/.kube/config`.
        kubeconfig: Option<PathBuf>,
        /// The context in there, if not the current one.
        context: Option<String>,
    },
}

/// A client that has read its credentials.
#[derive(Clone)]
struct Connected {
    client: Client,
    namespace: String,
}

/// How an exchange failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    /// What the server asked us to wait.
    pub(super) retry_after: Option<Duration>,
    /// What was attempted, what was answered, and what helps. Safe to print.
    pub(super) says: String,
}

impl FailureKind {
    fn of(status: u16) -> Self {
        match status {
            400 | 405 | 406 | 413 | 415 => Self::BadRequest,
            401 => Self::Unauthorized,
            403 => Self::Forbidden,
            404 => Self::NotFound,
            409 => Self::Conflict,
            410 => Self::Expired,
            422 => Self::Invalid,
            429 => Self::Busy,
            _ => Self::Server,
        }
    }

    /// What an operator can do about it, to end a sentence with.
    fn hint(self) -> &'static str {
        match self {
            Self::Unauthorized => "; is the token of this cluster, and not expired?",
            Self::Forbidden => "; deploy/README.md lists the rights that are needed",
            Self::Folder
            | Self::Credentials
            | Self::Unreachable
            | Self::Silent
            | Self::NotFound
            | Self::Conflict
            | Self::Expired
            | Self::Invalid
            | Self::BadRequest
            | Self::Busy
            | Self::Server
            | Self::Malformed => "",
        }
    }
}

impl Failure {
    pub(super) fn new(kind: FailureKind, attempt: &str, why: impl std::fmt::Display) -> Self {
        Self {
            kind,
            retry_after: None,
            says: format!("{attempt}: {why}{}", kind.hint()),
        }
    }

    /// The failure that a Status object (meta/v1) tells of.
    pub(super) fn of_status(attempt: &str, status: &Status) -> Self {
        let message = Excerpt::up_to(&status.message, LONGEST_MESSAGE);
        Self::new(
            FailureKind::of(status.code),
            attempt,
            format_args!("{} {message}", status.code),
        )
    }
}

/// How much of a server's message is shown.
pub(super) const LONGEST_MESSAGE: usize = 240;

/// An API server's word on a failure (meta/v1 Status), as far as it is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) code: u16,
    message: String,
}

impl Api {
    /// Nothing is read or opened yet.
    pub(super) fn new(credentials: Credentials) -> Self {
        Self {
            credentials,
            connected: Mutex::new(None),
        }
    }

    /// The namespace that the credentials belong to.
    pub(super) async fn namespace(&self) -> Result<String, Failure> {
        Ok(self.connected().await?.namespace)
    }

    /// Asks and reads the whole answer.
    pub(super) async fn ask(&self, attempt: &str, request: http::Request<Vec<u8>>) -> Result<Vec<u8>, Failure> {
        let whole = async {
            let body = self.answer(attempt, request).await?;
            let read = Limited::new(body, LONGEST_ANSWER).collect().await;
            read.map(|read| read.to_bytes().into())
                .map_err(|error| Failure::new(FailureKind::Unreachable, attempt, chain(error.as_ref())))
        };
        self.forgetting(in_time(ANSWER, attempt, whole).await).await
    }

    /// Asks and returns as soon as the server has said that it will answer, for which it has no longer than `patience`.
    pub(super) async fn open(
        &self,
        attempt: &str,
        request: http::Request<Vec<u8>>,
        patience: Duration,
    ) -> Result<Body, Failure> {
        let answer = self.answer(attempt, request);
        self.forgetting(in_time(patience.min(ANSWER), attempt, answer).await)
            .await
    }

    /// Asks for a WebSocket instead of an answer.
    pub(super) async fn upgrade(
        &self,
        attempt: &str,
        mut request: http::Request<Vec<u8>>,
    ) -> Result<Connection, Failure> {
        let client = self.connected().await?.client;
        request.headers_mut().insert(header::USER_AGENT, self.program());
        let connection = client.connect(request).await;
        connection.map_err(|error| {
            if let kube::Error::Api(status) = error {
                let (code, message) = (status.code, status.message);
                return Failure::of_status(attempt, &Status { code, message });
            }
            Failure::new(FailureKind::Unreachable, attempt, chain(&error))
        })
    }

    /// What this program calls itself, with its version.
    fn program(&self) -> HeaderValue {
        HeaderValue::from_static(match self.credentials {
            Credentials::Pod | Credentials::File(_) => concat!("shroud-agent/", env!("CARGO_PKG_VERSION")),
            Credentials::Operator { .. } => concat!("kubectl-shroud/", env!("CARGO_PKG_VERSION")),
        })
    }

    async fn answer(&self, attempt: &str, mut request: http::Request<Vec<u8>>) -> Result<Body, Failure> {
        let client = self.connected().await?.client;
        request.headers_mut().insert(header::USER_AGENT, self.program());
        let response = client.send(request.map(Body::from)).await;
        let response = response.map_err(|error| Failure::new(FailureKind::Unreachable, attempt, chain(&error)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
        // What cannot be read of it does not matter: the status is the answer.
        let read = Limited::new(response.into_body(), LONGEST_ERROR).collect().await;
        let text = read.map(|read| read.to_bytes().to_vec()).unwrap_or_default();
        // Not every error is a Status object: proxies, and the server itself when it is busy, answer in plain text.
        let told = serde_json::from_slice::<Status>(&text).map(|status| status.message);
        let told = told.unwrap_or_else(|_| String::from_utf8_lossy(&text).trim().to_owned());
        Err(Failure {
            retry_after: retry_after.map(Duration::from_secs),
            ..Failure::of_status(
                attempt,
                &Status {
                    code: status.as_u16(),
                    message: told,
                },
            )
        })
    }

    /// Drops the connection and what was read of the credentials when a failure may come from them, so that the next attempt reads them
    /// anew: tokens and certificate authorities change while we run.
    async fn forgetting<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        if let Err(failure) = &result {
            match failure.kind {
                FailureKind::Credentials
                | FailureKind::Unreachable
                | FailureKind::Silent
                | FailureKind::Unauthorized
                | FailureKind::Forbidden => *self.connected.lock().await = None,
                FailureKind::Folder
                | FailureKind::NotFound
                | FailureKind::Conflict
                | FailureKind::Expired
                | FailureKind::Invalid
                | FailureKind::BadRequest
                | FailureKind::Busy
                | FailureKind::Server
                | FailureKind::Malformed => {}
            }
        }
        result
    }

    async fn connected(&self) -> Result<Connected, Failure> {
        let mut connected = self.connected.lock().await;
        if let Some(connected) = &*connected {
            return Ok(connected.clone());
        }
        let made = connect(&self.credentials).await?;
        *connected = Some(made.clone());
        Ok(made)
    }
}

/// A new object, to be made.
pub(super) fn post(attempt: &str, target: &str, body: &Value) -> Result<http::Request<Vec<u8>>, Failure> {
    let request = http::Request::post(target).header(header::CONTENT_TYPE, "application/json");
    with_body(attempt, request, body)
}

/// A server-side apply, of whose answer only the metadata is wanted: a whole Node is not worth its bytes.
pub(super) fn apply(attempt: &str, target: &str, body: &Value) -> Result<http::Request<Vec<u8>>, Failure> {
    let request = http::Request::patch(target)
        .header(header::CONTENT_TYPE, "application/apply-patch+yaml")
        .header(
            header::ACCEPT,
            "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
        );
    with_body(attempt, request, body)
}

fn with_body(attempt: &str, request: http::request::Builder, body: &Value) -> Result<http::Request<Vec<u8>>, Failure> {
    let request = request.body(body.to_string().into_bytes());
    request.map_err(|error| Failure::new(FailureKind::Malformed, attempt, error))
}

/// Reads the credentials, and prepares to connect.
async fn connect(credentials: &Credentials) -> Result<Connected, Failure> {
    let failed = |from: &str, error: &(dyn std::error::Error + 'static)| {
        let attempt = format!("read the API server's address and our credentials from {from}");
        Failure::new(FailureKind::Credentials, &attempt, chain(error))
    };
    let config = match credentials {
        Credentials::Pod => Config::incluster().map_err(|error| failed("the pod's ServiceAccount", &error))?,
        Credentials::File(path) => read(Some(path), None).await?,
        Credentials::Operator { kubeconfig, context } => read(kubeconfig.as_deref(), context.as_deref()).await?,
    };
    let mut connector = HttpConnector::new();
    let (idle, interval, probes) = KEEPALIVE;
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_keepalive(Some(idle));
    connector.set_keepalive_interval(Some(interval));
    connector.set_keepalive_retries(Some(probes));
    // The same for what was sent and is not acknowledged, which keepalive probes do not watch.
    connector.set_tcp_user_timeout(Some(idle + interval * probes));
    let of = config.cluster_url.to_string();
    let https = config.rustls_https_connector_with_connector(connector);
    let https = https.map_err(|error| failed(&of, &error))?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(|error| failed(&of, &error))?)
        .map_err(tower::BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build(https));
    Ok(Connected {
        client: Client::new(service, config.default_namespace.clone()),
        namespace: config.default_namespace,
    })
}

/// Reads a kubeconfig: this file, or what `kubectl` would read.
async fn read(file: Option<&Path>, context: Option<&str>) -> Result<Config, Failure> {
    let from = match file {
        Some(path) => path.display().to_string(),
        None => "the kubeconfig that KUBECONFIG names, or else ~/.kube/config".to_owned(),
    };
    let attempt = format!("read the API server's address and our credentials from {from}");
    let unread = |error: KubeconfigError| {
        let why = match (error, context) {
            (KubeconfigError::ReadConfig(error, _), _) => chain(&error),
            (KubeconfigError::LoadContext(_), Some(context)) => {
                format!(
                    "it has no context {} (`kubectl config get-contexts` lists them)",
                    Excerpt::of(context)
                )
            }
            // A parser's error may quote the file, and with it a token.
            _ => "it is no kubeconfig that can be used (`kubectl config view --kubeconfig FILE` says why)".to_owned(),
        };
        Failure::new(FailureKind::Credentials, &attempt, why)
    };
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    let content = match file {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let config = Config::from_custom_kubeconfig(content.map_err(unread)?, &options).await;
    config.map_err(unread)
}

async fn in_time<T>(
    patience: Duration,
    attempt: &str,
    answer: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| {
        Err(Failure::new(
            FailureKind::Silent,
            attempt,
            format_args!("no answer within {} s", patience.as_secs_f64()),
        ))
    })
}

/// An error and what caused it, in one line.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut told = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Many errors repeat their cause.
        if !told.contains(&said) {
            told = format!("{told}: {said}");
        }
        cause = error.source();
    }
    Excerpt::up_to(&told, LONGEST_MESSAGE).to_string()
}
