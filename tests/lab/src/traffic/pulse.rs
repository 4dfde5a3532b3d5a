//! Long-lived echo traffic that measures stalls: what a user of an established connection feels while daemons die.
//!
//! A TCP pulse feels the sender's retransmission backoff as well: after an outage of 3 s it may stay silent for another
//! 3 s. A UDP pulse sends again every interval, so its gap is the outage itself.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Socket, Type};

use super::{Protocol, connect, is_timeout, send_back, socket, tcp_listener, timed, udp_server};
use crate::marker::{Markers, payload};
use crate::topology::{Family, Host};

/// Time between two requests of a connection.
const INTERVAL: Duration = Duration::from_millis(10);

/// Bytes of a request, and of its answer.
const SIZE: usize = 64;

/// How long a blocked thread waits before it asks whether to stop.
const TICK: Duration = Duration::from_millis(50);

/// How long the first connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// Running echo connections between two hosts.
#[derive(Debug)]
pub struct Pulse {
    stop: Arc<AtomicBool>,
    connections: Vec<Arc<Mutex<State>>>,
    threads: Vec<JoinHandle<()>>,
}

/// How one connection fares.
#[derive(Clone, Debug)]
pub struct Beat {
    /// Who talks to whom.
    pub name: String,
    /// Answers received.
    pub echoes: u64,
    /// The longest time between two answers since the start or the last [`Pulse::forget`], the running wait included.
    pub longest_gap: Duration,
    /// Time since the last answer.
    pub silent_for: Duration,
    /// Why the connection broke, if it did.
    pub lost: Option<String>,
}

#[derive(Debug)]
struct State {
    name: String,
    echoes: u64,
    last: Instant,
    longest_gap: Duration,
    lost: Option<String>,
}

impl Pulse {
    /// Opens `connections` connections over TCP or UDP and keeps them talking.
    pub fn start(
        protocol: Protocol,
        family: Family,
        from: &Host,
        to: &Host,
        connections: usize,
        markers: &Markers,
    ) -> Result<Pulse> {
        let mut pulse = Pulse {
            stop: Arc::default(),
            connections: Vec::new(),
            threads: Vec::new(),
        };
        match protocol {
            Protocol::Tcp => pulse.start_tcp(family, from, to, connections, markers)?,
            Protocol::Udp => pulse.start_udp(family, from, to, connections, markers)?,
            Protocol::Icmp => bail!("a pulse runs over TCP or UDP"),
        }
        Ok(pulse)
    }

    fn start_tcp(
        &mut self,
        family: Family,
        from: &Host,
        to: &Host,
        connections: usize,
        markers: &Markers,
    ) -> Result<()> {
        let listener = tcp_listener(to, family, 0, CONNECT)?;
        let port = listener
            .local_addr()?
            .as_socket()
            .context("a listener has an address")?
            .port();
        let address = SocketAddr::new(to.address(family), port);
        for number in 0..connections {
            let name = format!("TCP pulse {number} {} -> {address}", from.name);
            let request = payload(&markers.issue(&name)?, SIZE);
            let client = connect(from, family, address, CONNECT).with_context(|| name.clone())?;
            let (server, _) = listener.accept().with_context(|| format!("{name}: accept"))?;

            let stop = Arc::clone(&self.stop);
            self.threads.push(thread::spawn(move || answer_stream(server, &stop)));
            self.talk(name, move |state, stop| stream(client, &request, state, stop));
        }
        Ok(())
    }

    fn start_udp(
        &mut self,
        family: Family,
        from: &Host,
        to: &Host,
        connections: usize,
        markers: &Markers,
    ) -> Result<()> {
        let server = udp_server(to, family, 0)?;
        let address = SocketAddr::new(to.address(family), server.local_addr()?.port());
        for number in 0..connections {
            let name = format!("UDP pulse {number} {} -> {address}", from.name);
            let request = payload(&markers.issue(&name)?, SIZE);
            let client = socket(&from.netns, family, Type::DGRAM, None)?;
            client.connect(&address.into()).with_context(|| name.clone())?;
            self.talk(name, move |state, stop| datagrams(&client, &request, state, stop));
        }
        let stop = Arc::clone(&self.stop);
        // A server that fails shows as silence in every connection.
        self.threads
            .push(thread::spawn(move || drop(send_back(&server, &stop))));
        Ok(())
    }

    fn talk(&mut self, name: String, work: impl FnOnce(&Mutex<State>, &AtomicBool) -> Result<()> + Send + 'static) {
        let state = Arc::new(Mutex::new(State {
            name,
            echoes: 0,
            last: Instant::now(),
            longest_gap: Duration::ZERO,
            lost: None,
        }));
        let stop = Arc::clone(&self.stop);
        self.connections.push(Arc::clone(&state));
        self.threads.push(thread::spawn(move || {
            if let Err(error) = work(&state, &stop) {
                lock(&state).lost = Some(format!("{error:#}"));
            }
        }));
    }

    /// How each connection fares right now.
    pub fn beats(&self) -> Vec<Beat> {
        self.connections.iter().map(|state| lock(state).beat()).collect()
    }

    /// The longest gap of all connections, and the first that was lost.
    pub fn worst(&self) -> (Duration, Option<String>) {
        let beats = self.beats();
        let gap = beats.iter().map(|beat| beat.longest_gap).max().unwrap_or_default();
        (
            gap,
            beats
                .into_iter()
                .find_map(|beat| Some(format!("{}: {}", beat.name, beat.lost?))),
        )
    }

    /// Begins to measure gaps anew.
    pub fn forget(&self) {
        for state in &self.connections {
            let mut state = lock(state);
            state.longest_gap = Duration::ZERO;
            state.last = Instant::now();
        }
    }

    /// Ends all connections and says how they fared.
    pub fn stop(mut self) -> Vec<Beat> {
        let beats = self.beats();
        self.end();
        beats
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A thread that panicked has left its connection silent, and that is what is reported.
            drop(thread.join());
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    fn beat(&self) -> Beat {
        let silent_for = if self.lost.is_some() {
            Duration::ZERO
        } else {
            self.last.elapsed()
        };
        Beat {
            name: self.name.clone(),
            echoes: self.echoes,
            longest_gap: self.longest_gap.max(silent_for),
            silent_for,
            lost: self.lost.clone(),
        }
    }

    fn echo(&mut self) {
        self.echoes += 1;
        self.longest_gap = self.longest_gap.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

fn stream(client: Socket, request: &[u8], state: &Mutex<State>, stop: &AtomicBool) -> Result<()> {
    let mut connection = timed(client, TICK)?;
    lock(state).last = Instant::now();
    while !stop.load(Ordering::Acquire) {
        let next = Instant::now() + INTERVAL;
        connection.write_all(request).context("send")?;
        let mut answer = [0; SIZE];
        let mut filled = 0;
        while filled < SIZE {
            match connection.read(&mut answer[filled..]) {
                Ok(0) => bail!("the other side closed the connection"),
                Ok(length) => filled += length,
                Err(error) if is_timeout(&error) && stop.load(Ordering::Acquire) => return Ok(()),
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error).context("receive"),
            }
        }
        if answer != request {
            bail!("the answer differs from the request");
        }
        lock(state).echo();
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn answer_stream(server: Socket, stop: &AtomicBool) {
    let Ok(mut connection) = timed(server, TICK) else {
        return;
    };
    let mut buffer = [0; SIZE];
    while !stop.load(Ordering::Acquire) {
        match connection.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if connection.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(_) => return,
        }
    }
}

fn datagrams(mut client: &Socket, request: &[u8], state: &Mutex<State>, stop: &AtomicBool) -> Result<()> {
    let mut answer = [0; SIZE];
    lock(state).last = Instant::now();
    while !stop.load(Ordering::Acquire) {
        let next = Instant::now() + INTERVAL;
        // A datagram that cannot be sent, and an ICMP error about an earlier one, are gaps and not ends.
        if client.write(request).is_ok() {
            client.set_read_timeout(Some(INTERVAL))?;
            if let Ok(length) = client.read(&mut answer) {
                if answer[..length] != *request {
                    bail!("the answer differs from the request");
                }
                lock(state).echo();
            }
        }
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
