//! A client of its own for these tests: HTTP/1.1 over TLS on one connection, blocking, every byte to be seen. No Kubernetes library, so
//! that nothing smooths over what the server does.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use shroud_apiserver::{ApiServer, Identity};

/// How long a test waits for bytes that must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection.
pub(crate) struct Client {
    stream: StreamOwned<ClientConnection, TcpStream>,
    token: Option<String>,
    buffer: Vec<u8>,
    /// Of the latest answer.
    chunked: bool,
}

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

/// An answer, its body whole.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// As it should.
    Clean,
    /// The connection was closed in the middle.
    Cut,
    /// The connection was reset.
    Reset,
}

impl Request {
    pub(crate) fn new(method: &str, path: &str) -> Self {
        let headers = vec![("Accept".into(), "application/json".into())];
        Self {
            method: method.into(),
            path: path.into(),
            headers,
            body: Vec::new(),
        }
    }

    pub(crate) fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    pub(crate) fn patch(path: &str, kind: &str, patch: &Value) -> Self {
        Self::new("PATCH", path)
            .header("Content-Type", &format!("application/{kind}"))
            .body(&patch.to_string())
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn body(mut self, body: &str) -> Self {
        self.body = body.into();
        self
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    /// Connects as somebody, trusting the server's authority.
    pub(crate) fn connect(server: &ApiServer, identity: &Identity) -> Result<Self> {
        let token = server.token(identity);
        Self::to(server.addresses()[0], &server.authority(), Some(token))
    }

    /// Connects with a token, or as nobody.
    pub(crate) fn to(address: SocketAddr, authority: &str, token: Option<String>) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).context("read the authority")?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tcp = TcpStream::connect(address).context("connect")?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_nodelay(true)?;
        let name = ServerName::from(address.ip());
        let connection = ClientConnection::new(Arc::new(config), name)?;
        let mut stream = StreamOwned::new(connection, tcp);
        stream.flush().context("shake hands")?;
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).context("shake hands")?;
        }
        Ok(Self {
            stream,
            token,
            buffer: Vec::new(),
            chunked: false,
        })
    }

    /// How long a read may take from now on.
    pub(crate) fn set_patience(&self, patience: Duration) {
        self.stream.sock.set_read_timeout(Some(patience)).unwrap();
    }

    /// Asks, and reads the whole answer.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Answer> {
        let mut answer = self.open(request)?;
        let (body, end) = self.rest(&answer);
        if end != End::Clean {
            bail!("the body ended with {end:?} after {} bytes", body.len());
        }
        answer.body = body;
        Ok(answer)
    }

    /// Asks, and reads the head of the answer.
    pub(crate) fn open(&mut self, request: &Request) -> Result<Answer> {
        self.send(request).context("send the request")?;
        self.head()
    }

    pub(crate) fn send(&mut self, request: &Request) -> io::Result<()> {
        let mut text = format!("{} {} HTTP/1.1\r\nHost: apiserver\r\n", request.method, request.path);
        if !request.headers.iter().any(|(name, _)| name == "User-Agent") {
            text += "User-Agent: rec/1\r\n";
        }
        if let Some(token) = &self.token
            && !request.headers.iter().any(|(name, _)| name == "Authorization")
        {
            text += &format!("Authorization: Bearer {token}\r\n");
        }
        for (name, value) in &request.headers {
            text += &format!("{name}: {value}\r\n");
        }
        if !request.body.is_empty() {
            text += &format!("Content-Length: {}\r\n", request.body.len());
        }
        text += "\r\n";
        self.stream.write_all(text.as_bytes())?;
        self.stream.write_all(&request.body)?;
        self.stream.flush()
    }

    fn head(&mut self) -> Result<Answer> {
        let mut lines = Vec::new();
        loop {
            let line = self.line().context("read the head of the answer")?;
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        let mut first = lines[0].splitn(3, ' ').skip(1);
        let status = first
            .next()
            .and_then(|status| status.parse().ok())
            .context("read the status")?;
        let headers = lines[1..]
            .iter()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.into(), value.into()));
        let answer = Answer {
            status,
            headers: headers.collect(),
            body: Vec::new(),
        };
        self.chunked = answer.header("Transfer-Encoding") == Some("chunked");
        Ok(answer)
    }

    fn rest(&mut self, answer: &Answer) -> (Vec<u8>, End) {
        let mut body = Vec::new();
        if !self.chunked {
            let length: usize = answer
                .header("Content-Length")
                .and_then(|length| length.parse().ok())
                .unwrap_or(0);
            while self.buffer.len() < length {
                if let Err(end) = self.fill() {
                    return (std::mem::take(&mut self.buffer), end);
                }
            }
            return (self.buffer.drain(..length).collect(), End::Clean);
        }
        loop {
            match self.chunk() {
                Ok(Some(chunk)) => body.extend(chunk),
                Ok(None) => return (body, End::Clean),
                Err(end) => return (body, end),
            }
        }
    }

    /// The next chunk of the body; none at its end.
    pub(crate) fn chunk(&mut self) -> Result<Option<Vec<u8>>, End> {
        let line = self.line_or_end()?;
        let length = usize::from_str_radix(&line, 16).map_err(|_| End::Cut)?;
        while self.buffer.len() < length + 2 {
            self.fill()?;
        }
        let mut chunk: Vec<u8> = self.buffer.drain(..length + 2).collect();
        chunk.truncate(length);
        Ok((length > 0).then_some(chunk))
    }

    /// All lines until the body ends, and how it does.
    pub(crate) fn lines(&mut self) -> (Vec<String>, End) {
        let mut text = Vec::new();
        let end = loop {
            match self.chunk() {
                Ok(Some(chunk)) => text.extend(chunk),
                Ok(None) => break End::Clean,
                Err(end) => break end,
            }
        };
        (String::from_utf8_lossy(&text).lines().map(str::to_owned).collect(), end)
    }

    /// The next frame of a WebSocket, as servers send them: its opcode and its payload.
    pub(crate) fn frame(&mut self) -> Result<(u8, Vec<u8>), End> {
        let head = self.take(2)?;
        let length = match head[1] {
            126 => self.take(2)?,
            127 => self.take(8)?,
            short => vec![short],
        };
        let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        Ok((head[0] & 0xf, self.take(length)?))
    }

    /// So many bytes.
    fn take(&mut self, count: usize) -> Result<Vec<u8>, End> {
        while self.buffer.len() < count {
            self.fill()?;
        }
        Ok(self.buffer.drain(..count).collect())
    }

    /// Whether nothing at all comes for a while, not even an end.
    pub(crate) fn is_silent_for(&mut self, time: Duration) -> bool {
        self.set_patience(time);
        let start = Instant::now();
        let outcome = self.stream.read(&mut [0]);
        self.set_patience(PATIENCE);
        matches!(outcome, Err(error) if error.kind() == io::ErrorKind::WouldBlock) && start.elapsed() >= time
    }

    fn line(&mut self) -> Result<String> {
        self.line_or_end()
            .map_err(|end| anyhow::anyhow!("the connection ended: {end:?}"))
    }

    fn line_or_end(&mut self) -> Result<String, End> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> Result<(), End> {
        let mut bytes = [0; 16 * 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(End::Cut),
            Ok(count) => {
                self.buffer.extend(&bytes[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(End::Reset),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("nothing came for too long"),
            Err(_) => Err(End::Cut),
        }
    }
}
