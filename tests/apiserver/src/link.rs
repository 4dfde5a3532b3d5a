//! One TCP connection and what may happen to it: it can be closed in the middle, reset, or fall silent while it stays open. It knows
//! nothing of what runs over it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Works,
    Silent,
    Closed,
    Reset,
}

/// The handle of a connection, for all who may end it.
#[derive(Debug)]
pub(crate) struct Line {
    fate: watch::Sender<Fate>,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self {
            fate: watch::Sender::new(Fate::Works),
        }
    }

    /// Nothing is sent any more, whatever is written; what comes is read and forgotten.
    pub(crate) fn silence(&self) {
        self.fate
            .send_if_modified(|fate| *fate == Fate::Works && std::mem::replace(fate, Fate::Silent) == Fate::Works);
    }

    /// Closed at once, as by a process that dies.
    pub(crate) fn close(&self) {
        self.fate
            .send_if_modified(|fate| *fate != Fate::Reset && std::mem::replace(fate, Fate::Closed) != Fate::Closed);
    }

    /// Closed at once, with a reset.
    pub(crate) fn reset(&self) {
        self.fate.send_replace(Fate::Reset);
    }

    pub(crate) fn is_silent(&self) -> bool {
        *self.fate.borrow() == Fate::Silent
    }

    /// Waits until the connection is to be ended.
    pub(crate) async fn ended(&self) {
        let ends = |fate: &Fate| matches!(fate, Fate::Closed | Fate::Reset);
        // The sender lives in `self`, so this cannot fail before there is an answer.
        let _end = self.fate.subscribe().wait_for(ends).await.map(|fate| *fate);
    }
}

/// A TCP connection that obeys its [`Line`].
#[derive(Debug)]
pub(crate) struct Link {
    tcp: TcpStream,
    line: Arc<Line>,
}

impl Link {
    pub(crate) fn new(tcp: TcpStream, line: Arc<Line>) -> Self {
        Self { tcp, line }
    }
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.line.is_silent() {
            return Pin::new(&mut self.tcp).poll_read(context, buffer);
        }
        // What comes is read until there is no more for now; an end or an error of the other side is not noticed either.
        let mut forgotten = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut forgotten);
            match Pin::new(&mut self.tcp).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) | Poll::Pending => break,
            }
        }
        Poll::Pending
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.line.is_silent() {
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.tcp).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.line.is_silent() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.line.is_silent() {
            return Poll::Pending;
        }
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if *self.line.fate.borrow() == Fate::Reset {
            // Lingering for no time at all is how TCP says "reset"; without it the close is an orderly one, which a test will notice.
            let _best_effort = SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO));
        }
    }
}
