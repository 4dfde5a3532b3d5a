//! The listening sockets and the connections on them: accepting, refusing and coming back, TLS, HTTP/1.1 and HTTP/2. What is asked over
//! them is answered in [`crate::serve`].

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context as _, Result};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::authority::Authority;
use crate::context::Context;
use crate::link::{Line, Link};
use crate::serve;

/// Connections waiting to be accepted.
const BACKLOG: i32 = 1024;

/// The sockets of a server.
#[derive(Debug)]
pub(crate) struct Listeners {
    sockets: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
    accepting: Mutex<Vec<JoinHandle<()>>>,
    connections: Arc<Connections>,
}

/// The connections that are open, and what holds for the next one.
#[derive(Debug)]
pub(crate) struct Connections {
    open: Mutex<Vec<Weak<Line>>>,
    authority: Mutex<Authority>,
    /// Whether new connections fall silent at once.
    silent: Mutex<bool>,
    context: Arc<Context>,
}

impl Listeners {
    pub(crate) fn new(sockets: Vec<TcpListener>, authority: Authority, context: Arc<Context>) -> Result<Self> {
        let addresses = sockets
            .iter()
            .map(TcpListener::local_addr)
            .collect::<io::Result<_>>()
            .context("read the listening addresses")?;
        let connections = Connections {
            open: Mutex::default(),
            authority: Mutex::new(authority),
            silent: Mutex::new(false),
            context,
        };
        Ok(Self {
            sockets,
            addresses,
            accepting: Mutex::default(),
            connections: Arc::new(connections),
        })
    }

    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub(crate) fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Accepts connections, also again after [`Self::refuse`].
    pub(crate) fn accept(&self, runtime: &Handle) -> Result<()> {
        let mut accepting = self.accepting.lock().unwrap_or_else(PoisonError::into_inner);
        if !accepting.is_empty() {
            return Ok(());
        }
        for (socket, address) in self.sockets.iter().zip(&self.addresses) {
            SockRef::from(socket)
                .listen(BACKLOG)
                .with_context(|| format!("listen on {address}"))?;
            let socket = socket
                .try_clone()
                .with_context(|| format!("share the socket on {address}"))?;
            socket
                .set_nonblocking(true)
                .with_context(|| format!("make the socket on {address} wait for nobody"))?;
            let connections = self.connections.clone();
            let socket = {
                let _inside = runtime.enter();
                tokio::net::TcpListener::from_std(socket).with_context(|| format!("watch the socket on {address}"))?
            };
            accepting.push(runtime.spawn(async move {
                // An error here is about one connection (or too many of them), and says nothing about the next.
                loop {
                    if let Ok((tcp, _)) = socket.accept().await {
                        connections.clone().open(tcp);
                    } else {
                        tokio::task::yield_now().await;
                    }
                }
            }));
        }
        Ok(())
    }

    /// Lets new connections be refused. The sockets stay bound, in whichever namespace they were made, so that nobody takes the port.
    pub(crate) fn refuse(&self) -> Result<()> {
        let mut accepting = self.accepting.lock().unwrap_or_else(PoisonError::into_inner);
        for task in accepting.drain(..) {
            task.abort();
        }
        for (socket, address) in self.sockets.iter().zip(&self.addresses) {
            let socket = SockRef::from(socket);
            socket
                .shutdown(std::net::Shutdown::Both)
                .with_context(|| format!("stop listening on {address}"))?;
            // Linux gives a port that it chose itself back when listening stops; one that was asked for stays, and binding says EINVAL.
            if let Err(error) = socket.bind(&(*address).into())
                && error.kind() != io::ErrorKind::InvalidInput
            {
                return Err(error).with_context(|| format!("keep the address {address}"));
            }
        }
        Ok(())
    }
}

impl Connections {
    /// Ends all connections: in order or with a reset.
    pub(crate) fn end(&self, reset: bool) {
        for line in self.lines() {
            if reset { line.reset() } else { line.close() }
        }
    }

    /// All connections, and all that come, fall silent.
    pub(crate) fn silence(&self) {
        *self.silent.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.lines().iter().for_each(|line| line.silence());
    }

    /// New connections work; those that were silent are reset, as by a machine that comes back and knows of none.
    pub(crate) fn speak(&self) {
        *self.silent.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.lines()
            .iter()
            .filter(|line| line.is_silent())
            .for_each(|line| line.reset());
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lines().len()
    }

    pub(crate) fn authority(&self) -> Authority {
        self.authority.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn use_authority(&self, authority: Authority) {
        *self.authority.lock().unwrap_or_else(PoisonError::into_inner) = authority;
    }

    fn lines(&self) -> Vec<Arc<Line>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|line| line.strong_count() > 0);
        open.iter().filter_map(Weak::upgrade).collect()
    }

    fn open(self: Arc<Self>, tcp: TcpStream) {
        let line = Arc::new(Line::new());
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(&line));
        if *self.silent.lock().unwrap_or_else(PoisonError::into_inner) {
            line.silence();
        }
        // The task ends with its connection, and each connection with the server.
        tokio::spawn(async move {
            let work = self.run(tcp, line.clone());
            tokio::select! {
                () = work => {}
                () = line.ended() => {}
            }
        });
    }

    async fn run(&self, tcp: TcpStream, line: Arc<Line>) {
        // Small answers go at once; without this the second half of one may wait for the client.
        let _slower_without = tcp.set_nodelay(true);
        let mut first = [0];
        if tcp
            .peek(&mut first)
            .await
            .is_ok_and(|count| count == 1 && first[0].is_ascii_uppercase())
        {
            return refuse_plain_http(tcp).await;
        }
        let acceptor = TlsAcceptor::from(self.authority().config);
        // Who does not finish the handshake has nothing to be told.
        let Ok(tls) = acceptor.accept(Link::new(tcp, line.clone())).await else {
            return;
        };
        let speaks_http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        let context = self.context.clone();
        let service = service_fn(move |request| serve::answer(context.clone(), line.clone(), request));
        let io = TokioIo::new(tls);
        // How a connection ends, the client knows; the journal keeps what was asked on it.
        let _end = if speaks_http2 {
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .serve_connection(io, service)
                .await
        } else {
            http1::Builder::new()
                .title_case_headers(true)
                .timer(TokioTimer::new())
                .header_read_timeout(None)
                .serve_connection(io, service)
                .with_upgrades()
                .await
        };
    }
}

async fn refuse_plain_http(mut tcp: TcpStream) {
    let answer = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";
    // The client may have gone.
    let _sent = tcp.write_all(answer).await;
    let _closed = tcp.shutdown().await;
}
