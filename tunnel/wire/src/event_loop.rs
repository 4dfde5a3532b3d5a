//! The one thread: waits for any door to open, carries what is there, and runs the timers.
//!
//! Each door has a bound of work per turn; epoll reports levels, so what is left over comes up again at once and no side starves.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use shroud_model::Family;

use crate::control::{self, Connection, ListenError, Listener, Reply, Wants};
use crate::device::{Device, LARGEST_PACKET, Now, Outbound};
use crate::socket::{Endpoint, Sockets};
use crate::tun::{AttachError, Tun};
use crate::uapi::{Answer, Request, Set};
use crate::{Error, Options};

/// How often the timers run. WireGuard's shortest is 5 s.
const TICK: Duration = Duration::from_millis(250);
/// How long timers may keep packets and requests waiting.
const MOMENT: Duration = Duration::from_millis(3);
/// Packets from one door before the others have their turn.
const BATCH: usize = 64;
/// Doors that can open at once before epoll has to be asked again.
const EVENTS: usize = 32;
/// Control connections. The longest-lived gives way to a new one.
const MOST_CONNECTIONS: usize = 32;

/// What an epoll event is about. Connections have the numbers from `FIRST_CONNECTION` on.
const SIGNAL: u64 = 0;
const TUN: u64 = 1;
const UDP_V4: u64 = 2;
const UDP_V6: u64 = 3;
const LISTENER: u64 = 4;
const FIRST_CONNECTION: u64 = 16;

/// Carries traffic until the process is told to end by SIGTERM or SIGINT.
///
/// At the end the control socket is removed; the TUN device stays, so that what is routed to it leaks nowhere. Whoever cleans up the host
/// deletes the link. Call it from the process's main thread, before there are others: it blocks the two signals.
///
/// # Errors
/// [`enum@Error`] when a door cannot be opened, or when the device is deleted by somebody else.
pub fn run(options: Options) -> Result<(), Error> {
    EventLoop::open(&options)?.serve()
}

struct EventLoop {
    name: String,
    epoll: Epoll,
    signals: SignalFd,
    tun: Tun,
    sockets: Sockets,
    listener: Listener,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    device: Device,
    buffer: Vec<u8>,
}

/// The doors packets leave by.
struct Doors<'a> {
    tun: &'a Tun,
    sockets: &'a Sockets,
}

impl Outbound for Doors<'_> {
    fn send(&mut self, datagram: &[u8], to: &mut Endpoint) {
        if let Err(error) = self.sockets.send(datagram, to) {
            tracing::debug!(to = %to.remote, length = datagram.len(), %error, "datagram lost");
        }
    }

    fn deliver(&mut self, packet: &[u8]) {
        // EIO: the link is down. EBADFD: it is gone, which the next read of the device reports.
        if let Err(error) = self.tun.write(packet) {
            tracing::debug!(length = packet.len(), %error, "packet lost");
        }
    }
}

impl EventLoop {
    fn open(options: &Options) -> Result<Self, Error> {
        let name = &options.device;
        let path = options.socket_dir.join(format!("{name}.sock"));
        let already_running = || Error::AlreadyRunning {
            device: name.clone(),
            socket: path.clone(),
        };
        // Asked first for the better message: the device would only say that it is busy.
        if control::is_answered(&path).map_err(Error::system("ask", path.display().to_string()))? {
            return Err(already_running());
        }
        let tun = Tun::attach(name).map_err(|error| match error {
            AttachError::Name => Error::DeviceName(name.clone()),
            AttachError::Busy => Error::DeviceBusy(name.clone()),
            AttachError::Foreign => Error::DeviceForeign(name.clone()),
            AttachError::Other(source) => Error::System {
                operation: "attach",
                object: name.clone(),
                source,
            },
        })?;
        let sockets = Sockets::bind(0, 0).map_err(Error::system("bind", "a UDP port"))?;
        let listener = Listener::bind(path.clone()).map_err(|error| match error {
            ListenError::AlreadyRunning => already_running(),
            ListenError::Other(source) => Error::System {
                operation: "listen on",
                object: path.display().to_string(),
                source,
            },
        })?;
        let mut device = Device::new(Now::read());
        device.set_mtu(tun.mtu().map_err(Error::system("read the MTU of", name))?);

        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(wait_failed)?;
        let signals = signals().map_err(Error::system("wait for", "signals"))?;
        watch(&epoll, &signals, SIGNAL)?;
        watch(&epoll, tun.descriptor(), TUN)?;
        watch(&epoll, listener.descriptor(), LISTENER)?;
        watch_sockets(&epoll, &sockets)?;
        tracing::info!(device = name, socket = %path.display(), port = sockets.port(), "carrying traffic");
        Ok(Self {
            name: name.clone(),
            epoll,
            signals,
            tun,
            sockets,
            listener,
            connections: BTreeMap::new(),
            next_connection: FIRST_CONNECTION,
            device,
            // Room for padding behind the largest packet, and for telling a datagram that is too long.
            buffer: vec![0; LARGEST_PACKET + 17],
        })
    }

    fn serve(mut self) -> Result<(), Error> {
        let mut next_tick = Instant::now();
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let wait = next_tick.saturating_duration_since(Instant::now());
            let count = match self.epoll.wait(&mut events, timeout(wait)) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(wait_failed(errno)),
            };
            for event in &events[..count] {
                match event.data() {
                    SIGNAL => {
                        if let Some(signal) = self.signals.read_signal().map_err(wait_failed)? {
                            tracing::info!(device = self.name, signal = signal.ssi_signo, "ending");
                            return Ok(());
                        }
                    }
                    TUN => self.carry_out()?,
                    UDP_V4 => self.carry_in(Family::V4),
                    UDP_V6 => self.carry_in(Family::V6),
                    LISTENER => self.accept()?,
                    number => self.converse(number)?,
                }
            }
            if Instant::now() >= next_tick {
                // Packets and requests have their turn before the rest of the timers.
                let all = self.tick()?;
                next_tick = Instant::now() + if all { TICK } else { Duration::ZERO };
            }
        }
    }

    /// Packets from the kernel to the network.
    fn carry_out(&mut self) -> Result<(), Error> {
        let now = Now::read();
        // Padding ends at the MTU; with one from before it was set, a full packet would be too large for the underlay.
        if let Ok(mtu) = self.tun.mtu() {
            self.device.set_mtu(mtu);
        }
        for _ in 0..BATCH {
            match self.tun.read(&mut self.buffer[..LARGEST_PACKET]) {
                Ok(Some(length)) => {
                    let mut doors = Doors {
                        tun: &self.tun,
                        sockets: &self.sockets,
                    };
                    self.device.outbound(&mut self.buffer, length, now, &mut doors);
                }
                Ok(None) => break,
                Err(error) => return Err(self.device_lost("read from", error)),
            }
        }
        Ok(())
    }

    /// Datagrams from the network to the kernel.
    fn carry_in(&mut self, family: Family) {
        let now = Now::read();
        for _ in 0..BATCH {
            match self.sockets.receive(family, &mut self.buffer) {
                Ok(Some((length, from))) => {
                    let mut doors = Doors {
                        tun: &self.tun,
                        sockets: &self.sockets,
                    };
                    self.device.inbound(&self.buffer[..length], &from, now, &mut doors);
                }
                Ok(None) => break,
                Err(error) => tracing::debug!(%family, %error, "datagram lost"),
            }
        }
    }

    /// Runs timers for a moment. Answers whether all have had their turn.
    fn tick(&mut self) -> Result<bool, Error> {
        let until = Instant::now() + MOMENT;
        match self.tun.mtu() {
            Ok(mtu) => self.device.set_mtu(mtu),
            Err(error) => return Err(self.device_lost("read the MTU of", error)),
        }
        let mut doors = Doors {
            tun: &self.tun,
            sockets: &self.sockets,
        };
        loop {
            if self.device.tick(Now::read(), &mut doors) {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    fn device_lost(&self, operation: &'static str, source: io::Error) -> Error {
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBADFD | Errno::ENODEV) => Error::DeviceGone(self.name.clone()),
            _ => Error::System {
                operation,
                object: self.name.clone(),
                source,
            },
        }
    }

    fn accept(&mut self) -> Result<(), Error> {
        let connection = match self.listener.accept() {
            Ok(Some(connection)) => connection,
            Ok(None) => return Ok(()),
            Err(error) => {
                tracing::warn!(%error, "control connection lost");
                return Ok(());
            }
        };
        if self.connections.len() >= MOST_CONNECTIONS {
            // Closing the descriptor takes it out of epoll as well.
            self.connections.pop_first();
        }
        let number = self.next_connection;
        self.next_connection += 1;
        watch(&self.epoll, connection.descriptor(), number)?;
        self.connections.insert(number, connection);
        Ok(())
    }

    fn converse(&mut self, number: u64) -> Result<(), Error> {
        let Some(mut connection) = self.connections.remove(&number) else {
            return Ok(());
        };
        let flags = match connection.turn(&mut |request| self.answer(request)) {
            Wants::Read => EpollFlags::EPOLLIN,
            Wants::Write => EpollFlags::EPOLLOUT,
            Wants::Nothing => return Ok(()),
        };
        self.epoll
            .modify(connection.descriptor(), &mut EpollEvent::new(flags, number))
            .map_err(wait_failed)?;
        self.connections.insert(number, connection);
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Get => self.device.describe(self.sockets.port(), self.sockets.mark()),
            Request::Set(set) => {
                let outcome = self.change(set);
                if let Err(errno) = outcome {
                    tracing::warn!(device = self.name, error = errno.desc(), "refused a change");
                }
                Answer::outcome(outcome)
            }
        }
    }

    /// Makes a change as a whole or not at all: what may fail comes first.
    fn change(&mut self, set: Set) -> Result<(), Errno> {
        self.device.check(&set)?;
        let mark = set.fwmark.unwrap_or(self.sockets.mark());
        match set.listen_port {
            Some(port) if !self.sockets.serves(port) => {
                let new = Sockets::bind(port, mark).map_err(errno)?;
                watch_sockets(&self.epoll, &new).map_err(|_| Errno::ENOMEM)?;
                tracing::info!(
                    device = self.name,
                    old = self.sockets.port(),
                    new = new.port(),
                    "listening on another port"
                );
                self.sockets = new;
            }
            Some(_) | None if mark != self.sockets.mark() => {
                self.sockets.set_mark(mark).map_err(errno)?;
                self.device.forget_local_addresses();
            }
            Some(_) | None => {}
        }
        let mut doors = Doors {
            tun: &self.tun,
            sockets: &self.sockets,
        };
        self.device.commit(set, Now::read(), &mut doors);
        Ok(())
    }
}

/// Has SIGTERM and SIGINT arrive as events instead of ending the process at any place.
fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(SignalFd::with_flags(
        &set,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

fn watch_sockets(epoll: &Epoll, sockets: &Sockets) -> Result<(), Error> {
    for (family, number) in [(Family::V4, UDP_V4), (Family::V6, UDP_V6)] {
        if let Some(descriptor) = sockets.descriptor(family) {
            watch(epoll, descriptor, number)?;
        }
    }
    Ok(())
}

fn watch<D: std::os::fd::AsFd>(epoll: &Epoll, descriptor: D, number: u64) -> Result<(), Error> {
    epoll
        .add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, number))
        .map_err(wait_failed)
}

fn wait_failed(errno: Errno) -> Error {
    Error::System {
        operation: "wait for",
        object: "events".to_owned(),
        source: errno.into(),
    }
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Rounded up to a millisecond, so that a short rest is slept and not spun away.
fn timeout(wait: Duration) -> EpollTimeout {
    EpollTimeout::try_from(wait + Duration::from_micros(999)).unwrap_or(EpollTimeout::ZERO)
}
