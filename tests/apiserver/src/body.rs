//! The body of an answer: known at once, or a stream; and where it stops short when a fault says so.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;

use crate::journal::Entry;

/// A body, which keeps the journal.
#[derive(Debug)]
pub(crate) struct Answer {
    content: Content,
    entry: Arc<Entry>,
}

#[derive(Debug)]
enum Content {
    Whole(Option<Bytes>),
    /// The same without a `Content-Length`.
    Chunked(Option<Bytes>),
    Stream(mpsc::Receiver<Piece>),
    /// What was said is still on its way to the socket; then the connection ends.
    Cutting(Pin<Box<Sleep>>),
}

/// A piece of a stream.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Bytes, in one chunk.
    Bytes(Bytes),
    /// Nothing to be sent: HTTP has taken whatever came before, and the head.
    Taken(oneshot::Sender<()>),
    /// The connection ends here, in the middle of the body.
    Cut,
}

/// Waits until all that was said so far, and the head, is on its way to the client, or nobody receives any more.
pub(crate) async fn said(out: &mpsc::Sender<Piece>) {
    let (taken, is_taken) = oneshot::channel();
    if out.send(Piece::Taken(taken)).await.is_ok() && is_taken.await.is_ok() {
        tokio::time::sleep(TO_THE_SOCKET).await;
    }
}

/// The body ends before its end, on purpose.
#[derive(Debug)]
pub(crate) struct CutShort;

impl std::fmt::Display for CutShort {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the body is cut short, as the test asked")
    }
}

impl std::error::Error for CutShort {}

/// Beyond this many bytes the real server starts to send before it knows the length.
const CHUNKED_ABOVE: usize = 2048;

/// HTTP buffers what it has taken, and an error of the body throws the buffer away; it gets this long to reach the socket first.
const TO_THE_SOCKET: Duration = Duration::from_millis(20);

impl Answer {
    pub(crate) fn whole(bytes: Bytes, entry: Arc<Entry>) -> Self {
        let content = if bytes.len() > CHUNKED_ABOVE {
            Content::Chunked(Some(bytes))
        } else {
            Content::Whole(Some(bytes))
        };
        Self { content, entry }
    }

    /// With its length, however long.
    pub(crate) fn measured(bytes: Bytes, entry: Arc<Entry>) -> Self {
        Self {
            content: Content::Whole(Some(bytes)),
            entry,
        }
    }

    pub(crate) fn stream(pieces: mpsc::Receiver<Piece>, entry: Arc<Entry>) -> Self {
        Self {
            content: Content::Stream(pieces),
            entry,
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = CutShort;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutShort>>> {
        let piece = match &mut self.content {
            Content::Whole(bytes) | Content::Chunked(bytes) => bytes.take().map(Piece::Bytes),
            Content::Stream(pieces) => match pieces.poll_recv(context) {
                Poll::Ready(piece) => piece,
                Poll::Pending => return Poll::Pending,
            },
            Content::Cutting(pause) => return pause.as_mut().poll(context).map(|()| Some(Err(CutShort))),
        };
        match piece {
            None => Poll::Ready(None),
            Some(Piece::Bytes(bytes)) => {
                self.entry.sent(bytes.len());
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Some(Piece::Taken(taken)) => {
                // If nobody waits for it any more, nobody has to be told.
                let _told = taken.send(());
                self.poll_frame(context)
            }
            Some(Piece::Cut) => {
                self.content = Content::Cutting(Box::pin(tokio::time::sleep(TO_THE_SOCKET)));
                self.poll_frame(context)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Whole(None) | Content::Chunked(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Content::Chunked(_) | Content::Stream(_) | Content::Cutting(_) => SizeHint::default(),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.entry.ended();
    }
}
