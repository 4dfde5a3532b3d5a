//! The control door: a Unix socket on which requests come in as lines and answers go out.
//!
//! Everything is bounded: connections, the length of a line, what a turn may read. A client that does not read its answers is not read
//! from. What a request means is decided elsewhere.

use std::fs;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Uid;
use zeroize::{Zeroize, Zeroizing};

use crate::uapi::{Answer, LONGEST_LINE, Parser, Request};

/// Where `wg` looks, whatever the system calls its runtime directory.
const WELL_KNOWN: &str = "/var/run/wireguard";
/// Reads and answers for one connection before the others have their turn.
const STEPS_PER_TURN: usize = 64;

/// The listening socket. Its file goes when it is dropped.
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

/// Why the socket could not be made.
#[derive(Debug)]
pub(crate) enum ListenError {
    /// A living process answers on it.
    AlreadyRunning,
    /// Something else.
    Other(io::Error),
}

impl From<io::Error> for ListenError {
    fn from(error: io::Error) -> Self {
        Self::Other(error)
    }
}

impl Listener {
    /// Makes `path`, for the owner alone, in the place of one that a dead process has left behind.
    pub(crate) fn bind(path: PathBuf) -> Result<Self, ListenError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        link_well_known(folder);
        if is_answered(&path)? {
            return Err(ListenError::AlreadyRunning);
        }
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&path);
        umask(before);
        let listener = bound?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// The descriptor to wait on.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes the next connection of somebody who may speak to us: root, or whoever we run as.
    pub(crate) fn accept(&self) -> io::Result<Option<Connection>> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let user = getsockopt(&stream, sockopt::PeerCredentials)?.uid();
        if user != 0 && user != Uid::effective().as_raw() {
            tracing::warn!(user, "refused a control connection");
            return Ok(None);
        }
        stream.set_nonblocking(true)?;
        Ok(Some(Connection::new(stream)))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the control socket was gone already");
        }
    }
}

/// Whether a process accepts connections on `path`.
pub(crate) fn is_answered(path: &Path) -> io::Result<bool> {
    match UnixStream::connect(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Lets `wg` find the socket on a host whose `/var/run` is a folder of its own. Without it everything else works, so failure is only noted.
fn link_well_known(folder: &Path) {
    if folder != Path::new("/run/wireguard") || Path::new(WELL_KNOWN).exists() {
        return;
    }
    if let Err(error) = symlink(folder, WELL_KNOWN) {
        tracing::warn!(path = WELL_KNOWN, %error, "no link to the control socket's folder: `wg` may not find the device");
    }
}

/// One client.
pub(crate) struct Connection {
    stream: UnixStream,
    /// What was read and not yet looked at.
    input: Zeroizing<[u8; 4096]>,
    unread: Range<usize>,
    /// Bytes of the line that has not ended yet.
    line: Zeroizing<Vec<u8>>,
    parser: Parser,
    answer: Reply,
    sent: usize,
}

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    /// A request.
    Read,
    /// Room for the rest of an answer.
    Write,
    /// Nothing: it is over.
    Nothing,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        // Never grows, so that no copy of a key stays behind in freed memory. One byte more than the longest line tells that it is too long.
        let line = Zeroizing::new(Vec::with_capacity(LONGEST_LINE + 1));
        Self {
            stream,
            input: Zeroizing::new([0; 4096]),
            unread: 0..0,
            line,
            parser: Parser::default(),
            answer: Zeroizing::default(),
            sent: 0,
        }
    }

    /// The descriptor to wait on.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Goes on as far as it can without waiting.
    pub(crate) fn turn(&mut self, serve: &mut dyn FnMut(Request) -> Reply) -> Wants {
        match self.try_turn(serve) {
            Ok(wants) => wants,
            Err(error) => {
                tracing::debug!(%error, "control connection lost");
                Wants::Nothing
            }
        }
    }

    fn try_turn(&mut self, serve: &mut dyn FnMut(Request) -> Reply) -> io::Result<Wants> {
        for _ in 0..STEPS_PER_TURN {
            if !self.flush()? {
                return Ok(Wants::Write);
            }
            if let Some(request) = self.next_request() {
                self.answer = match request {
                    Ok(request) => serve(request),
                    Err(errno) => Answer::outcome(Err(errno)),
                };
                continue;
            }
            match (&self.stream).read(&mut *self.input) {
                Ok(0) => return Ok(Wants::Nothing),
                Ok(length) => self.unread = 0..length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Wants::Read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // Room to write is what there nearly always is, so that the next turn comes even if nothing more is to be read.
        Ok(Wants::Write)
    }

    /// Cuts what was read into lines, up to the end of a request.
    fn next_request(&mut self) -> Option<Result<Request, Errno>> {
        for at in self.unread.clone() {
            let byte = self.input[at];
            self.unread.start = at + 1;
            if byte != b'\n' {
                if self.line.len() <= LONGEST_LINE {
                    self.line.push(byte);
                }
                continue;
            }
            let request = self.parser.line(&self.line);
            self.line.as_mut_slice().zeroize();
            self.line.clear();
            if request.is_some() {
                return request;
            }
        }
        self.input.zeroize();
        None
    }

    /// Writes the answer; whether all of it is gone.
    fn flush(&mut self) -> io::Result<bool> {
        while self.sent < self.answer.len() {
            match (&self.stream).write(&self.answer[self.sent..]) {
                Ok(0) => return Err(Errno::EPIPE.into()),
                Ok(length) => self.sent += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.answer = Zeroizing::default();
        self.sent = 0;
        Ok(true)
    }
}

/// The text of an answer.
pub(crate) type Reply = Zeroizing<Vec<u8>>;

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (client, server) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        server.set_nonblocking(true).unwrap();
        (client, Connection::new(server))
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let (mut client, mut connection) = pair();
        let before = connection.line.capacity();
        for _ in 0..256 {
            client.write_all(&[b'a'; 4096]).unwrap();
            assert_ne!(connection.turn(&mut |_| panic!("a request")), Wants::Nothing);
        }

        assert_eq!(connection.line.capacity(), before);
    }

    #[test]
    fn a_client_that_reads_nothing_is_answered_only_so_far() {
        let (mut client, mut connection) = pair();
        client.write_all(&b"get=1\n\n".repeat(1000)).unwrap();
        let mut served = 0;

        for _ in 0..100 {
            connection.turn(&mut |_| {
                served += 1;
                Zeroizing::new(vec![b'x'; 1 << 20])
            });
        }

        assert_eq!(served, 1, "the first answer fills the socket");
        let mut read = 0;
        let mut bytes = vec![0; 1 << 20];
        while served < 3 {
            read += client.read(&mut bytes).unwrap_or(0);
            connection.turn(&mut |_| {
                served += 1;
                Zeroizing::new(vec![b'x'; 1 << 20])
            });
        }
        assert!(read > 1 << 20, "{read}");
    }
}
