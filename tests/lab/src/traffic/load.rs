//! Many long-lived connections from two threads: what the users of a mesh feel while things go wrong around them.
//!
//! Every connection asks and is answered, over and over: a request goes out when it is due, and the next only after its answer. What is
//! sent is a row of blocks, each the connection's marker and the block's number, so that a byte that is lost, doubled, swapped or changed
//! shows at once, at either end. How long an answer is waited for is what the user feels; TCP's own retransmissions are part of it.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::OwnedFd;
use socket2::Socket;

use super::{connect, tcp_listener};
use crate::marker::{LENGTH, Markers};
use crate::topology::{Family, Host};

/// Bytes of a block: a marker, and the block's number.
const BLOCK: usize = LENGTH + 8;

/// Time between two requests of a connection that measures stalls.
const ECHO: Duration = Duration::from_millis(10);

/// Time between two requests of one that is all but idle.
const IDLE: Duration = Duration::from_millis(500);

/// Time between two requests of one that carries much, and the blocks of each: some 80 KB/s.
const BULK: (Duration, usize) = (Duration::from_millis(100), 200);

/// How long one connection may take to open.
const OPEN: Duration = Duration::from_secs(10);

/// How many connections of each kind there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// That carry much.
    pub bulk: usize,
    /// That ask every 10 ms, and so measure stalls.
    pub echo: usize,
    /// That are all but idle.
    pub idle: usize,
}

/// Running connections.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// How the connections fare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fare {
    /// How many there are.
    pub connections: usize,
    /// Answers so far, of all together.
    pub answers: u64,
    /// Which were lost, and why.
    pub lost: Vec<String>,
    /// The longest that any answer was waited for since the start or the last [`Load::forget`], a wait that goes on included.
    pub longest_stall: Duration,
}

/// What both threads and their owner know.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Whether all connections shall ask at once, due or not.
    hurry: AtomicBool,
    connections: Vec<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    name: String,
    answers: u64,
    /// When the request that the latest answer belongs to was sent.
    answered: Option<Instant>,
    /// When the request that has no answer yet was sent.
    asked: Option<Instant>,
    longest_stall: Duration,
    lost: Option<String>,
}

/// One end of a connection.
struct End {
    socket: Socket,
    /// What it sends: its marker, and the number of the next block.
    out: Row,
    /// What it must receive.
    expected: Row,
    /// Bytes of a block that have not all come yet.
    partial: Vec<u8>,
    /// Bytes that the socket did not take yet.
    unsent: Vec<u8>,
    /// Whether epoll looks for room in the socket.
    awaits_room: bool,
}

/// A row of blocks.
struct Row {
    marker: [u8; LENGTH],
    next: u64,
}

/// The asking end.
struct Client {
    end: End,
    beat: Duration,
    blocks: usize,
    due: Instant,
}

/// The answering end.
struct Server {
    end: End,
    /// Blocks of a request.
    blocks: usize,
    /// Blocks of the current one that have come.
    received: usize,
}

impl Mix {
    /// All of them.
    pub fn total(self) -> usize {
        self.bulk + self.echo + self.idle
    }

    /// Time between requests, and blocks of each, of the connection with this number.
    fn kind(self, number: usize) -> (Duration, usize) {
        if number < self.bulk {
            BULK
        } else if number < self.bulk + self.echo {
            (ECHO, 2)
        } else {
            (IDLE, 2)
        }
    }
}

impl Load {
    /// Opens the connections, spread over these pairs of hosts and both families, and keeps them talking.
    pub fn start(pairs: &[(&Host, &Host)], mix: Mix, markers: &Markers) -> Result<Load> {
        let ways: Vec<_> = pairs
            .iter()
            .flat_map(|(from, to)| Family::BOTH.map(|family| (*from, *to, family)))
            .collect();
        let listeners = ways
            .iter()
            .map(|(_, to, family)| tcp_listener(to, *family, 0, OPEN))
            .collect::<Result<Vec<_>>>()?;
        let begin = Instant::now();
        let (mut clients, mut servers, mut states) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..mix.total() {
            let way = number % ways.len();
            let (from, to, family) = ways[way];
            let port = listeners[way]
                .local_addr()?
                .as_socket()
                .context("a listener has an address")?
                .port();
            let address = SocketAddr::new(to.address(family), port);
            let name = format!("connection {number} {} -> {address}", from.name);
            let asks = markers.issue(&name)?;
            let answers = markers.issue(&format!("{name}, answers"))?;
            let client = connect(from, family, address, OPEN).with_context(|| name.clone())?;
            let (server, _) = listeners[way].accept().with_context(|| format!("{name}: accept"))?;
            let (beat, blocks) = mix.kind(number);
            clients.push(Client {
                end: End::new(client, asks, answers)?,
                beat,
                blocks,
                due: begin,
            });
            servers.push(Server {
                end: End::new(server, answers, asks)?,
                blocks,
                received: 0,
            });
            states.push(Mutex::new(State::new(name)));
        }

        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            connections: states,
        });
        let threads = vec![
            Shared::spawn(&shared, "load servers", |shared| serve(servers, shared))?,
            Shared::spawn(&shared, "load clients", |shared| ask(clients, shared))?,
        ];
        Ok(Load { shared, threads })
    }

    /// How the connections fare right now.
    pub fn fare(&self) -> Fare {
        let mut fare = Fare::default();
        for state in &self.shared.connections {
            let state = lock(state);
            fare.connections += 1;
            fare.answers += state.answers;
            fare.longest_stall = fare.longest_stall.max(state.longest_stall).max(state.waits());
            fare.lost
                .extend(state.lost.iter().map(|why| format!("{}: {why}", state.name)));
        }
        fare
    }

    /// The connections that have not been answered anything that they asked after this moment. Those that are lost are not among them;
    /// the idle ones are made to ask now.
    pub fn silent_since(&self, moment: Instant) -> Vec<String> {
        self.shared.hurry.store(true, Ordering::Release);
        let states = self.shared.connections.iter().map(lock);
        states
            .filter(|state| state.lost.is_none() && state.answered.is_none_or(|asked| asked < moment))
            .map(|state| state.name.clone())
            .collect()
    }

    /// Begins to measure stalls anew.
    pub fn forget(&self) {
        let now = Instant::now();
        for state in &self.shared.connections {
            let mut state = lock(state);
            state.longest_stall = Duration::ZERO;
            if state.asked.is_some() {
                state.asked = Some(now);
            }
        }
    }

    /// Ends all connections and says how they fared.
    pub fn stop(mut self) -> Fare {
        let fare = self.fare();
        self.end();
        fare
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // One that panicked has left its connections waiting, and that is what is reported.
            drop(thread.join());
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    /// Starts a thread whose end by an error is the end of all connections.
    fn spawn(
        shared: &Arc<Shared>,
        name: &str,
        work: impl FnOnce(&Shared) -> Result<()> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(shared);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Err(error) = work(&shared) {
                shared.lose_all(&error);
            }
        })
    }

    fn lose(&self, number: usize, error: &anyhow::Error) {
        let mut state = lock(&self.connections[number]);
        // An end hears of its own breach first; what the other end then sees is its echo.
        if state.lost.is_none() {
            state.lost = Some(format!("{error:#}"));
        }
        state.asked = None;
    }

    fn lose_all(&self, error: &anyhow::Error) {
        for number in 0..self.connections.len() {
            self.lose(number, error);
        }
    }
}

impl State {
    fn new(name: String) -> State {
        State {
            name,
            answers: 0,
            answered: None,
            asked: None,
            longest_stall: Duration::ZERO,
            lost: None,
        }
    }

    fn waits(&self) -> Duration {
        self.asked.map_or(Duration::ZERO, |asked| asked.elapsed())
    }

    fn answered(&mut self) {
        self.answers += 1;
        self.longest_stall = self.longest_stall.max(self.waits());
        self.answered = self.asked.take();
    }
}

impl Row {
    fn new(marker: [u8; LENGTH]) -> Row {
        Row { marker, next: 0 }
    }

    fn next(&mut self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..LENGTH].copy_from_slice(&self.marker);
        block[LENGTH..].copy_from_slice(&self.next.to_be_bytes());
        self.next += 1;
        block
    }
}

impl End {
    fn new(socket: Socket, sends: [u8; LENGTH], receives: [u8; LENGTH]) -> Result<End> {
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        Ok(End {
            socket,
            out: Row::new(sends),
            expected: Row::new(receives),
            partial: Vec::new(),
            unsent: Vec::new(),
            awaits_room: false,
        })
    }

    /// Sends as many blocks, or what the socket takes of them for now.
    fn send(&mut self, blocks: usize, epoll: &OwnedFd, number: usize) -> Result<()> {
        for _ in 0..blocks {
            let block = self.out.next();
            self.unsent.extend_from_slice(&block);
        }
        self.flush(epoll, number)
    }

    fn flush(&mut self, epoll: &OwnedFd, number: usize) -> Result<()> {
        while !self.unsent.is_empty() {
            match (&self.socket).write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("send"),
            }
        }
        let awaits_room = !self.unsent.is_empty();
        if awaits_room != self.awaits_room {
            self.awaits_room = awaits_room;
            let room = if awaits_room {
                EventFlags::OUT
            } else {
                EventFlags::empty()
            };
            epoll::modify(
                epoll,
                &self.socket,
                EventData::new_u64(number as u64),
                EventFlags::IN | room,
            )?;
        }
        Ok(())
    }

    /// Reads what has come, and returns how many whole blocks that made; each is compared with what it must be.
    fn receive(&mut self) -> Result<usize> {
        let mut buffer = [0; 16384];
        let mut blocks = 0;
        loop {
            match (&self.socket).read(&mut buffer) {
                Ok(0) => bail!("the other side closed the connection"),
                Ok(length) => {
                    self.partial.extend_from_slice(&buffer[..length]);
                    let whole = self.partial.len() / BLOCK;
                    for block in self.partial[..whole * BLOCK].chunks(BLOCK) {
                        let number = self.expected.next;
                        if block != self.expected.next() {
                            bail!("block {number} did not come as it was sent");
                        }
                    }
                    self.partial.drain(..whole * BLOCK);
                    blocks += whole;
                    if length < buffer.len() {
                        return Ok(blocks);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(blocks),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("receive"),
            }
        }
    }
}

impl fmt::Display for Fare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections, {} answers, longest stall {:?}, lost: {:?}",
            self.connections, self.answers, self.longest_stall, self.lost
        )
    }
}

/// Makes an epoll that looks after these sockets, each under its number.
fn watch<'a>(sockets: impl Iterator<Item = &'a Socket>) -> Result<OwnedFd> {
    let epoll = epoll::create(CreateFlags::CLOEXEC).context("make an epoll")?;
    for (number, socket) in (0..).zip(sockets) {
        epoll::add(&epoll, socket, EventData::new_u64(number), EventFlags::IN).context("watch a connection")?;
    }
    Ok(epoll)
}

/// Waits for events; each is a connection's number, and whether there is room to send.
fn wait(epoll: &OwnedFd, events: &mut Vec<epoll::Event>, timeout: Duration) -> Result<Vec<(usize, bool)>> {
    let timeout = Timespec::try_from(timeout).context("a short wait")?;
    match epoll::wait(epoll, spare_capacity(events), Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("wait for connections"),
    }
    let heard = events.drain(..).map(|event| {
        let (flags, data) = (event.flags, event.data);
        let number = usize::try_from(data.u64()).context("a connection's number")?;
        Ok((number, flags.contains(EventFlags::OUT)))
    });
    heard.collect()
}

/// Takes a connection that broke out of the epoll, for an error is told again and again.
fn give_up(epoll: &OwnedFd, end: &End, number: usize, shared: &Shared, error: &anyhow::Error) {
    shared.lose(number, error);
    // One that is not watched any more is what we want.
    epoll::delete(epoll, &end.socket).unwrap_or_default();
}

fn serve(mut servers: Vec<Server>, shared: &Shared) -> Result<()> {
    let epoll = watch(servers.iter().map(|server| &server.end.socket))?;
    let mut events = Vec::with_capacity(256);
    while !shared.stop.load(Ordering::Acquire) {
        for (number, _) in wait(&epoll, &mut events, 5 * ECHO)? {
            let server = &mut servers[number];
            if let Err(error) = server.answer(&epoll, number) {
                give_up(&epoll, &server.end, number, shared, &error.context("server"));
            }
        }
    }
    Ok(())
}

impl Server {
    /// Reads, and answers each whole request with one block.
    fn answer(&mut self, epoll: &OwnedFd, number: usize) -> Result<()> {
        self.received += self.end.receive()?;
        let requests = self.received / self.blocks;
        self.received %= self.blocks;
        self.end.send(requests, epoll, number)
    }
}

fn ask(mut clients: Vec<Client>, shared: &Shared) -> Result<()> {
    let epoll = watch(clients.iter().map(|client| &client.end.socket))?;
    let mut events = Vec::with_capacity(256);
    while !shared.stop.load(Ordering::Acquire) {
        let now = Instant::now();
        let hurry = shared.hurry.swap(false, Ordering::AcqRel);
        let mut next = now + ECHO;
        for (number, client) in clients.iter_mut().enumerate() {
            let waits = {
                let state = lock(&shared.connections[number]);
                state.asked.is_some() || state.lost.is_some()
            };
            if waits {
                continue;
            }
            if client.due > now && !hurry {
                next = next.min(client.due);
                continue;
            }
            lock(&shared.connections[number]).asked = Some(now);
            // All beat together: one wake-up for many.
            while client.due <= now {
                client.due += client.beat;
            }
            if let Err(error) = client.end.send(client.blocks, &epoll, number) {
                give_up(&epoll, &client.end, number, shared, &error);
            }
        }
        for (number, has_room) in wait(&epoll, &mut events, next.saturating_duration_since(Instant::now()))? {
            let client = &mut clients[number];
            let heard = client.end.receive().and_then(|blocks| {
                if has_room {
                    client.end.flush(&epoll, number)?;
                }
                Ok(blocks)
            });
            match heard {
                Ok(0) => {}
                Ok(1) => lock(&shared.connections[number]).answered(),
                Ok(more) => give_up(
                    &epoll,
                    &client.end,
                    number,
                    shared,
                    &anyhow::anyhow!("{more} answers to one request"),
                ),
                Err(error) => give_up(&epoll, &client.end, number, shared, &error),
            }
        }
    }
    Ok(())
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Two ends of a connection over loopback: one that is judged, and one that a test writes to.
    fn ends() -> (End, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, _) = listener.accept().unwrap();
        (End::new(here.into(), [1; LENGTH], [2; LENGTH]).unwrap(), other)
    }

    fn receive_all(end: &mut End, blocks: usize) -> Result<()> {
        let mut received = 0;
        while received < blocks {
            received += end.receive()?;
        }
        Ok(())
    }

    #[test]
    fn blocks_that_come_in_pieces_and_in_order_are_accepted() {
        let (mut end, mut other) = ends();
        let mut row = Row::new([2; LENGTH]);
        let bytes: Vec<u8> = (0..100).flat_map(|_| row.next()).collect();

        for piece in bytes.chunks(77) {
            other.write_all(piece).unwrap();
        }

        receive_all(&mut end, 100).unwrap();
        assert!(end.partial.is_empty());
    }

    #[test]
    fn a_block_that_is_lost_doubled_or_changed_is_noticed() {
        let block = |number: u64| {
            let mut row = Row::new([2; LENGTH]);
            row.next = number;
            row.next()
        };
        let mut changed = block(1);
        changed[7] ^= 1;
        for second in [block(2), block(0), changed] {
            let (mut end, mut other) = ends();
            other.write_all(&block(0)).unwrap();
            other.write_all(&second).unwrap();

            let error = receive_all(&mut end, 2).unwrap_err().to_string();

            assert_eq!(error, "block 1 did not come as it was sent");
        }
    }
}
