//! Traffic whose every payload is a marker over and over, and what became of it.
//!
//! A socket belongs to the namespace of the thread that made it, for good; so sockets are made inside, and used from
//! ordinary threads. Clients bind to nothing: the kernel chooses the source, as it does for any program on a node.

pub mod load;
pub mod pulse;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

use crate::marker::{LENGTH, Markers, payload};
use crate::netns::Netns;
use crate::topology::{Family, Host};

pub use load::{Load, Mix};
pub use pulse::{Beat, Pulse};

/// Payload lengths of echo requests and datagrams in bytes, each within the smallest MTU that IPv6 allows.
const SIZES: [usize; 5] = [32, 64, 333, 1000, 1200];

/// Bytes that a TCP flow carries in each direction.
const STREAM: usize = 100_000;

/// How long an unanswered message waits before it is sent again.
const RESEND: Duration = Duration::from_millis(250);

/// How long a flow may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What carries the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// Echo requests, answered by the other kernel.
    Icmp,
    /// Datagrams, sent back by a server.
    Udp,
    /// A connection with bytes in both directions.
    Tcp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Protocol; 3] = [Protocol::Icmp, Protocol::Udp, Protocol::Tcp];
}

/// Something to send: from a host to an address of another.
#[derive(Clone, Debug)]
pub struct Flow {
    /// What carries it.
    pub protocol: Protocol,
    /// Which of the addresses.
    pub family: Family,
    /// Who begins.
    pub from: Host,
    /// Who answers.
    pub to: Host,
    /// Lengths of the messages in bytes (ICMP and UDP), or of the one stream in each direction (TCP: their sum).
    pub sizes: Vec<usize>,
    /// How long the whole flow may take.
    pub patience: Duration,
    /// The server's port; 0 for any.
    pub port: u16,
}

/// What became of a flow.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The flow, in words.
    pub flow: String,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Payload bytes that were confirmed in both directions together.
    pub bytes: u64,
    /// Messages that had to be sent again.
    pub resent: u64,
    /// The longest time without progress.
    pub longest_gap: Duration,
}

/// What a flow has achieved so far.
struct Progress {
    bytes: u64,
    resent: u64,
    last: Instant,
    longest_gap: Duration,
}

impl Flow {
    /// A flow of the usual size.
    pub fn new(protocol: Protocol, family: Family, from: &Host, to: &Host) -> Flow {
        let sizes = match protocol {
            Protocol::Icmp | Protocol::Udp => SIZES.to_vec(),
            Protocol::Tcp => vec![STREAM],
        };
        Flow {
            protocol,
            family,
            from: from.clone(),
            to: to.clone(),
            sizes,
            patience: PATIENCE,
            port: 0,
        }
    }

    /// The same flow with messages of these lengths in bytes.
    pub fn sizes(self, sizes: &[usize]) -> Flow {
        Flow {
            sizes: sizes.to_vec(),
            ..self
        }
    }

    /// The same flow with this much time for all of it.
    pub fn patience(self, patience: Duration) -> Flow {
        Flow { patience, ..self }
    }

    /// The same flow to this port of the server, which only UDP and TCP have.
    pub fn port(self, port: u16) -> Flow {
        Flow { port, ..self }
    }

    /// Sends it, and says what became of it.
    pub fn run(&self, markers: &Markers) -> Outcome {
        let mut progress = Progress {
            bytes: 0,
            resent: 0,
            last: Instant::now(),
            longest_gap: Duration::ZERO,
        };
        let result = markers.issue(&self.to_string()).and_then(|marker| match self.protocol {
            Protocol::Icmp => self.echo_requests(&marker, &mut progress),
            Protocol::Udp => self.datagrams(&marker, &mut progress),
            Protocol::Tcp => self.stream(&marker, &markers.issue(&format!("{self}, answer"))?, &mut progress),
        });
        progress.step(0);
        Outcome {
            flow: self.to_string(),
            error: result.err().map(|error| format!("{error:#}")),
            bytes: progress.bytes,
            resent: progress.resent,
            longest_gap: progress.longest_gap,
        }
    }

    fn target(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.to.address(self.family), port)
    }

    fn echo_requests(&self, marker: &[u8; LENGTH], progress: &mut Progress) -> Result<()> {
        let (protocol, request, reply) = match self.family {
            Family::V4 => (socket2::Protocol::ICMPV4, 8, 0),
            Family::V6 => (socket2::Protocol::ICMPV6, 128, 129),
        };
        let socket = socket(&self.from.netns, self.family, Type::DGRAM, Some(protocol))?;
        socket
            .connect(&self.target(0).into())
            .with_context(|| format!("connect to {}", self.target(0)))?;
        let deadline = Instant::now() + self.patience;
        for (sequence, size) in (1u16..).zip(&self.sizes) {
            let data = payload(marker, *size);
            // The kernel fills in the identifier and the checksum of a datagram ICMP socket (icmp(7)).
            let [high, low] = sequence.to_be_bytes();
            let message = [&[request, 0, 0, 0, 0, 0, high, low], data.as_slice()].concat();
            ask(&socket, &message, deadline, progress, |answer| {
                let Some((header, body)) = answer.split_first_chunk::<8>() else {
                    bail!("a short echo reply")
                };
                if header[0] != reply || header[6..] != [high, low] {
                    return Ok(false);
                }
                ensure!(
                    body == data,
                    "an echo reply of {} bytes differs from its request",
                    body.len()
                );
                Ok(true)
            })?;
            progress.step(2 * *size);
        }
        Ok(())
    }

    fn datagrams(&self, marker: &[u8; LENGTH], progress: &mut Progress) -> Result<()> {
        let server = udp_server(&self.to, self.family, self.port)?;
        let port = server.local_addr().context("the server's port")?.port();
        let client = socket(&self.from.netns, self.family, Type::DGRAM, None)?;
        client
            .connect(&self.target(port).into())
            .with_context(|| format!("connect to {}", self.target(port)))?;
        let deadline = Instant::now() + self.patience;
        let done = AtomicBool::new(false);

        thread::scope(|scope| {
            let echo = scope.spawn(|| send_back(&server, &done));
            let result = (|| {
                for size in &self.sizes {
                    let data = payload(marker, *size);
                    ask(&client, &data, deadline, progress, |answer| {
                        ensure!(answer == payload(marker, answer.len()), "a datagram came back changed");
                        // One of another length is a late answer to a message that was sent twice.
                        Ok(answer.len() == *size)
                    })?;
                    progress.step(2 * *size);
                }
                Ok(())
            })();
            done.store(true, Ordering::Release);
            let served = echo.join().unwrap_or_else(|_| bail!("the server panicked"));
            result.and(served)
        })
    }

    fn stream(&self, marker: &[u8; LENGTH], answer: &[u8; LENGTH], progress: &mut Progress) -> Result<()> {
        let length = self.sizes.iter().sum();
        let sent = payload(marker, length);
        // A marker of its own for the way back, so that each direction is accounted for.
        let answered_with = payload(answer, length);
        let listener = tcp_listener(&self.to, self.family, self.port, self.patience)?;
        let port = listener
            .local_addr()?
            .as_socket()
            .context("a listener has an address")?
            .port();

        thread::scope(|scope| {
            let server = scope.spawn(|| -> Result<()> {
                let (connection, _) = listener.accept().context("server: accept")?;
                let mut connection = timed(connection, self.patience)?;
                receive(&mut connection, &sent, &mut |_| ()).context("server")?;
                connection.write_all(&answered_with).context("server: send")
            });
            let result = (|| -> Result<()> {
                let client = connect(&self.from, self.family, self.target(port), self.patience)?;
                let mut connection = timed(client, self.patience)?;
                progress.step(0);
                for chunk in sent.chunks(8192) {
                    connection.write_all(chunk).context("send")?;
                    progress.step(chunk.len());
                }
                receive(&mut connection, &answered_with, &mut |length| progress.step(length))
            })();
            let served = server.join().unwrap_or_else(|_| bail!("the server panicked"));
            match (result, served) {
                (Ok(()), served) => served,
                (Err(error), Ok(())) => Err(error),
                (Err(error), Err(server)) => Err(error.context(format!("(server side: {server:#})"))),
            }
        })
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Icmp => "ICMP",
            Protocol::Udp => "UDP",
            Protocol::Tcp => "TCP",
        };
        write!(
            f,
            "{protocol} {} -> {} ({})",
            self.from.name,
            self.to.name,
            self.to.address(self.family)
        )
    }
}

impl Outcome {
    /// Whether all of the payload arrived intact in both directions.
    pub fn ok(&self) -> bool {
        self.error.is_none()
    }
}

impl Progress {
    fn step(&mut self, bytes: usize) {
        let now = Instant::now();
        self.longest_gap = self.longest_gap.max(now - self.last);
        self.last = now;
        self.bytes += bytes as u64;
    }
}

/// Runs flows, `at_once` of them at a time; `each` hears of every outcome. Outcomes come in the order of the flows.
pub fn run_all(flows: &[Flow], markers: &Markers, at_once: usize, each: &(dyn Fn(&Outcome) + Sync)) -> Vec<Outcome> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(flow) = flows.get(index) else { break };
                    let outcome = flow.run(markers);
                    each(&outcome);
                    outcomes
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((index, outcome));
                }
            });
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcomes.sort_by_key(|(index, _)| *index);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Sends until `accept` says that an answer is the one.
fn ask(
    mut socket: &Socket,
    message: &[u8],
    deadline: Instant,
    progress: &mut Progress,
    accept: impl Fn(&[u8]) -> Result<bool>,
) -> Result<()> {
    let mut buffer = [0; 1 << 16];
    let mut last_error = String::from("silence");
    for attempt in 0.. {
        progress.resent += u64::from(attempt > 0);
        // A route that is missing for a moment is a lost message, not a failed flow.
        if let Err(error) = socket.send(message) {
            last_error = format!("send: {error}");
            thread::sleep(RESEND.min(deadline.saturating_duration_since(Instant::now())));
        }
        let resend = deadline.min(Instant::now() + RESEND);
        while let Some(left) = resend
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            // socket2 cuts what is left of a microsecond, and no time at all is for ever.
            socket.set_read_timeout(Some(left.max(Duration::from_micros(1))))?;
            match socket.read(&mut buffer) {
                Ok(length) => {
                    if accept(&buffer[..length])? {
                        return Ok(());
                    }
                }
                Err(error) if is_timeout(&error) => {}
                // An ICMP error about an earlier message.
                Err(error) => last_error = format!("receive: {error}"),
            }
        }
        if Instant::now() >= deadline {
            bail!(
                "no answer to {} bytes, sent {} times: {last_error}",
                message.len(),
                attempt + 1
            );
        }
    }
    Ok(())
}

/// Sends every datagram back to where it came from.
fn send_back(server: &UdpSocket, done: &AtomicBool) -> Result<()> {
    let mut buffer = [0; 1 << 16];
    while !done.load(Ordering::Acquire) {
        match server.recv_from(&mut buffer) {
            Ok((length, from)) => {
                // An unreachable client is the client's to report.
                drop(server.send_to(&buffer[..length], from));
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => bail!("server: receive: {error}"),
        }
    }
    Ok(())
}

/// Reads as many bytes as `expected` has and compares them.
fn receive(connection: &mut TcpStream, expected: &[u8], each: &mut dyn FnMut(usize)) -> Result<()> {
    let mut buffer = [0; 16384];
    let mut offset = 0;
    while offset < expected.len() {
        let room = buffer.len().min(expected.len() - offset);
        let length = connection
            .read(&mut buffer[..room])
            .with_context(|| format!("receive after {offset} bytes"))?;
        ensure!(length > 0, "the stream ends after {offset} of {} bytes", expected.len());
        ensure!(
            buffer[..length] == expected[offset..offset + length],
            "the stream differs after byte {offset}"
        );
        offset += length;
        each(length);
    }
    Ok(())
}

fn socket(netns: &Netns, family: Family, kind: Type, protocol: Option<socket2::Protocol>) -> Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    netns.run(|| Socket::new(domain, kind, protocol).with_context(|| format!("make a socket in {}", netns.name())))
}

fn udp_server(host: &Host, family: Family, port: u16) -> Result<UdpSocket> {
    let server = host.netns.run(|| {
        let address = SocketAddr::new(host.address(family), port);
        UdpSocket::bind(address).with_context(|| format!("bind to {address} in {}", host.netns.name()))
    })?;
    server.set_read_timeout(Some(Duration::from_millis(20)))?;
    Ok(server)
}

/// A listener whose accept gives up after `patience`.
fn tcp_listener(host: &Host, family: Family, port: u16, patience: Duration) -> Result<Socket> {
    let listener = socket(&host.netns, family, Type::STREAM, None)?;
    // A test may use a port again that it has just used.
    listener.set_reuse_address(true)?;
    let address = SocketAddr::new(host.address(family), port);
    listener
        .bind(&address.into())
        .with_context(|| format!("bind to {address} in {}", host.netns.name()))?;
    listener.listen(1024)?;
    // Linux honours the receive timeout in accept (socket(7)).
    listener.set_read_timeout(Some(patience))?;
    Ok(listener)
}

/// Connects, again and again while the network says that there is no way: neighbours and routes may be about to come.
fn connect(from: &Host, family: Family, address: SocketAddr, patience: Duration) -> Result<Socket> {
    let deadline = Instant::now() + patience;
    loop {
        let client = socket(&from.netns, family, Type::STREAM, None)?;
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        match client.connect_timeout(&address.into(), left) {
            Ok(()) => return Ok(client),
            Err(error) if error.kind() != io::ErrorKind::ConnectionRefused && Instant::now() + RESEND < deadline => {
                thread::sleep(RESEND);
            }
            Err(error) => return Err(error).with_context(|| format!("connect to {address}")),
        }
    }
}

fn timed(socket: Socket, patience: Duration) -> Result<TcpStream> {
    let connection = TcpStream::from(socket);
    connection.set_nonblocking(false)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    Ok(connection)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
