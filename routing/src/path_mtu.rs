//! How large a packet really gets to each peer, through the tunnel and whatever lies below it.
//!
//! The plan takes the uplink's word for the size of packets. A path may carry less and say nothing, because somebody drops its ICMP. So a
//! [`Prober`] asks the peers themselves: an echo request of the planned size, "do not fragment", to the peer's mesh address, which its
//! kernel answers. It goes the way pod packets go, and so through the gate and the tunnel.
//!
//! Nothing in here changes the kernel: whoever owns the routes reads [`Prober::snapshot`] and gives them the size found.

mod peers;
mod search;
mod socket;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use shroud_model::Mtu;

use crate::Error;
use peers::{Next, Peers};
use socket::Sockets;

/// How long the thread sleeps at most: how late it learns of new targets, or that it should end.
const NAP: Duration = Duration::from_millis(250);

/// What is known about the path to one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathMtu {
    /// The largest packet that gets through, as far as is known: the planned size until something smaller is found.
    pub mtu: Mtu,
    /// How far that is known.
    pub state: PathState,
    /// How long the last answer took.
    pub rtt: Option<Duration>,
    /// Probes sent so far.
    pub sent: u64,
    /// Probes that were not answered. Those too large for the path are among them.
    pub lost: u64,
}

/// How far the size of packets to a peer is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathState {
    /// Nothing was answered yet.
    #[default]
    Unknown,
    /// The planned size works.
    Confirmed,
    /// The planned size does not work, smaller ones do; how small is being found out.
    Searching,
    /// The planned size does not work; a smaller one was found.
    Reduced,
    /// The peer answers no probe of any size, which says nothing about sizes.
    Silent,
}

impl fmt::Display for PathState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::Confirmed => "confirmed",
            Self::Searching => "searching",
            Self::Reduced => "reduced",
            Self::Silent => "silent",
        })
    }
}

/// A thread that asks each peer every ten seconds or so whether packets of the planned size get there, and how large ones do when they
/// do not. At most a hundred probes a second go out, however many peers there are.
pub struct Prober {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    peers: Mutex<Peers>,
    stop: AtomicBool,
    began: Instant,
}

impl Prober {
    /// Opens the sockets, in the calling thread's network namespace, and starts the thread. There are no targets yet.
    ///
    /// The source of a probe is the one its route names: the mesh address, with routes of ours.
    ///
    /// # Errors
    /// [`Error::Probe`] when the process may not open raw sockets (CAP_NET_RAW), or no thread is to be had.
    pub fn start() -> Result<Self, Error> {
        let sockets = Sockets::open().map_err(Error::Probe)?;
        let shared = Arc::new(Shared {
            peers: Mutex::new(Peers::default()),
            stop: AtomicBool::new(false),
            began: Instant::now(),
        });
        let thread = std::thread::Builder::new().name("path-mtu".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run(&sockets)
        });
        Ok(Self {
            shared,
            thread: Some(thread.map_err(Error::Probe)?),
        })
    }

    /// Probes these peers from now on, by mesh address, and no others. What is known about those that stay is kept; a new planned size is
    /// taken at its word, unless the path was found to carry less.
    pub fn set_targets(&self, targets: &BTreeMap<IpAddr, Mtu>) {
        self.shared.peers().set_targets(targets, self.shared.began.elapsed());
    }

    /// The largest packets that get through, as far as is known, by mesh address.
    pub fn sizes(&self) -> BTreeMap<IpAddr, Mtu> {
        let known = self.snapshot().into_iter();
        known.map(|(address, path)| (address, path.mtu)).collect()
    }

    /// What is known, by mesh address.
    pub fn snapshot(&self) -> BTreeMap<IpAddr, PathMtu> {
        self.shared.peers().snapshot()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the path MTU thread panicked");
        }
    }
}

impl Shared {
    fn run(&self, sockets: &Sockets) {
        while !self.stop.load(Ordering::Relaxed) {
            let next = self.peers().next(self.began.elapsed());
            match next {
                Next::Send(probe) => {
                    if let Err(error) = sockets.send(&probe) {
                        // Among them EMSGSIZE: the device itself carries less. All of them say that the probe did not get there.
                        tracing::trace!(peer = %probe.peer, size = probe.size, %error, "probe not sent");
                        self.peers().failed(&probe, self.began.elapsed());
                    }
                }
                Next::Wait(until) => sockets.wait(until.saturating_sub(self.began.elapsed()).min(NAP)),
            }
            sockets.receive(|peer, sequence| self.peers().answered(peer, sequence, self.began.elapsed()));
        }
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
