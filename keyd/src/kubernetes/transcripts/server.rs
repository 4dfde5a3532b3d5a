//! A server that answers with given bytes, over plain HTTP on loopback, and tells which requests came. It knows no Kubernetes.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::recording::{Answer, End};

/// A request as it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// Which connection it came on, from 1.
    pub(super) connection: usize,
    pub(super) method: String,
    /// With the query.
    pub(super) path: String,
    /// Names in lower case.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(found, _)| found == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Answers a request; without an answer, the connection stays and is silent.
type Answers = Box<dyn FnMut(&Request) -> Option<Answer> + Send>;

/// The server, and the kubeconfig that leads to it. It ends with the runtime it was started in.
pub(super) struct Server {
    pub(super) address: String,
    /// In the order in which they came.
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    folder: TempDir,
    /// Holds the address when nobody is to listen there.
    _reserved: Option<TcpSocket>,
}

impl Server {
    /// Answers in this order, and nothing more after the last.
    pub(super) fn of_answers(answers: Vec<Answer>) -> Self {
        let mut answers = VecDeque::from(answers);
        if let Some(Answer::Refused) = answers.front() {
            return Self::of_nobody();
        }
        Self::start(0.0, Box::new(move |_| answers.pop_front()))
    }

    /// Answers as `answers` says. A recorded second takes `second` seconds.
    pub(super) fn start(second: f64, answers: Answers) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, requests) = mpsc::unbounded_channel();
        let answers = Arc::new(Mutex::new(answers));
        tokio::spawn(async move {
            for connection in 1.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (sender, answers) = (sender.clone(), Arc::clone(&answers));
                // A connection that breaks off is the client's to notice.
                tokio::spawn(async move { drop(serve(stream, connection, second, &sender, &answers).await) });
            }
        });
        Self::at(address, requests, None)
    }

    /// An address at which connections are refused.
    fn of_nobody() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap().to_string();
        Self::at(address, mpsc::unbounded_channel().1, Some(socket))
    }

    fn at(address: String, requests: mpsc::UnboundedReceiver<Request>, reserved: Option<TcpSocket>) -> Self {
        let server = Self {
            address,
            requests,
            folder: tempfile::tempdir().unwrap(),
            _reserved: reserved,
        };
        server.give_token("first");
        server
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Writes the kubeconfig anew, with another token.
    pub(super) fn give_token(&self, token: &str) {
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            // Without TLS there is nothing to verify, and no authorities need to be read.
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "shroud-system"}}],
        });
        let write = |path: &Path| std::fs::write(path, kubeconfig.to_string());
        write(&self.kubeconfig()).unwrap();
    }
}

async fn serve(
    mut stream: TcpStream,
    connection: usize,
    second: f64,
    requests: &mpsc::UnboundedSender<Request>,
    answers: &Mutex<Answers>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    while let Some(request) = read(&mut stream, &mut buffer, connection).await? {
        let asked = Instant::now();
        let answer = (answers.lock().unwrap())(&request);
        // Nobody may be interested any more.
        drop(requests.send(request));
        let Some(Answer::Sent { pieces, end }) = answer else {
            return hold(stream).await;
        };
        for (at, piece) in pieces {
            sleep_until(asked + Duration::from_secs_f64(at * second)).await;
            stream.write_all(&piece).await?;
        }
        match end {
            End::Kept => {}
            End::Closed => return Ok(()),
            End::Open => return hold(stream).await,
        }
    }
    Ok(())
}

/// Says nothing until the client goes.
async fn hold(mut stream: TcpStream) -> std::io::Result<()> {
    while stream.read(&mut [0; 1024]).await? > 0 {}
    Ok(())
}

/// Reads one request; `None` when the client is gone.
async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>, connection: usize) -> std::io::Result<Option<Request>> {
    loop {
        if let Some(request) = parse(buffer, connection) {
            return Ok(Some(request));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// Takes one request out of what came, if it is whole.
fn parse(buffer: &mut Vec<u8>, connection: usize) -> Option<Request> {
    let head = buffer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&buffer[..head]).unwrap();
    let mut lines = text.trim_end().split("\r\n");
    let mut first = lines.next().unwrap().split(' ');
    let (method, path) = (first.next().unwrap().to_owned(), first.next().unwrap().to_owned());
    let headers = lines.map(|line| line.split_once(": ").unwrap());
    let headers: Vec<_> = headers
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let mut request = Request {
        connection,
        method,
        path,
        headers,
        body: String::new(),
    };
    let length = request
        .header("content-length")
        .map_or(0, |length| length.parse().unwrap());
    let body = buffer.get(head..head + length)?;
    request.body = String::from_utf8(body.to_vec()).unwrap();
    buffer.drain(..head + length);
    Some(request)
}
