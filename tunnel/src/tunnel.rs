//! The one interface over both backends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Child;
use std::time::SystemTime;

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use rustix::rand::{GetRandomFlags, getrandom};
use shroud_model::{Prefix, PublicKey};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::change::seconds;
use crate::error::RESTART_AFTER;
use crate::process::{self, Place};
use crate::uapi::Client;
use crate::update::{PeerUpdate, Presence, Update};
use crate::{Backend, Change, Desired, Error, Launcher, Observed, Peer, kernel};

/// How many steps about peers share a request. More would make one bad peer costlier, and save nothing that can be measured.
const PEERS_PER_REQUEST: usize = 256;

/// Where things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The folder of the control sockets, `/run/wireguard` for whoever looks with `wg`.
    pub socket_dir: PathBuf,
    /// The folder of the data plane's log.
    pub runtime_dir: PathBuf,
    /// How the data plane is started.
    pub launcher: Launcher,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            socket_dir: "/run/wireguard".into(),
            runtime_dir: "/run/shroud".into(),
            launcher: Launcher::default(),
        }
    }
}

/// What a removal removed, and what it could not.
#[derive(Debug, Default)]
#[must_use]
pub struct Removal {
    /// What is gone, one line each.
    pub removed: Vec<String>,
    /// What is still there, and why.
    pub errors: Vec<Error>,
}

/// The encrypted devices of one network namespace: that of the calling thread, which must always be the same.
pub struct Tunnel {
    options: Options,
    /// Data planes that we started ourselves, to be buried when they end.
    children: BTreeMap<String, Child>,
    /// How often in a row a device's data plane did not answer.
    silences: BTreeMap<String, u32>,
}

impl Tunnel {
    /// Does nothing yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            children: BTreeMap::new(),
            silences: BTreeMap::new(),
        }
    }

    /// Reads the device, whichever backend it has.
    ///
    /// A data plane that keeps silent several times in a row, or whose TUN device was deleted under it, is no device any more: the
    /// change that follows ends it and starts another.
    ///
    /// # Errors
    /// [`Error::NotAnswering`] for each of the first silences; otherwise what the device answers.
    pub fn observe(&mut self, device: &str) -> Result<Observed, Error> {
        check_name(device)?;
        self.bury();
        let at = SystemTime::now();
        let found = match self.client(device).read() {
            Ok(found) => {
                self.silences.remove(device);
                found
            }
            Err(error @ Error::NotAnswering { .. }) => {
                let silences = self.silences.entry(device.to_owned()).or_default();
                *silences += 1;
                if *silences < RESTART_AFTER {
                    return Err(error);
                }
                tracing::warn!(device, silences, "the data plane does not answer and is taken for dead");
                return Ok(Observed { at, device: None });
            }
            Err(error) => return Err(error),
        };
        match found {
            Some(_) if index(device).is_none() => Ok(Observed { at, device: None }),
            Some(found) => Ok(Observed {
                at,
                device: Some(found),
            }),
            None => Ok(Observed {
                at,
                device: kernel::read(device)?,
            }),
        }
    }

    /// Does all steps in their order, and answers what became of each. `desired` must be the one from which the changes were made: it has
    /// the secrets.
    ///
    /// Steps that are about peers share requests: a mesh of thousands is a few requests, and no packet is handled between two of them. A
    /// request that is refused as a whole is made again step by step, so that one bad peer costs nobody else anything.
    pub fn apply_all(&mut self, desired: &Desired, changes: &[Change]) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(changes.len());
        for run in changes.chunk_by(|one, next| one.is_of_a_peer() && next.is_of_a_peer()) {
            for batch in run.chunks(PEERS_PER_REQUEST) {
                if batch.len() > 1 && self.apply_together(desired, batch).is_ok() {
                    results.extend(batch.iter().map(|_| Ok(())));
                } else {
                    results.extend(batch.iter().map(|change| self.apply(desired, change)));
                }
            }
        }
        results
    }

    fn apply_together(&self, desired: &Desired, batch: &[Change]) -> Result<(), Error> {
        check_name(&desired.device)?;
        let mut update = Update::default();
        for change in batch {
            say(desired, change, &mut update)?;
        }
        self.write(desired, &format!("{} steps about peers", batch.len()), &update)
    }

    /// Does one step. `desired` must be the one from which the change was made: it has the secrets.
    ///
    /// # Errors
    /// What the device answers; [`Error::NoDevice`] when it went away in between.
    pub fn apply(&mut self, desired: &Desired, change: &Change) -> Result<(), Error> {
        check_name(&desired.device)?;
        if let Change::CreateDevice { backend } = change {
            return match backend {
                Backend::Kernel => kernel::create(&desired.device),
                Backend::Userspace => self.start(&desired.device),
            };
        }
        if let Change::RemoveDevice { backend } = change {
            return match backend {
                Backend::Kernel => kernel::delete(&desired.device).map(drop),
                Backend::Userspace => self.stop(&desired.device).map(drop),
            };
        }
        let mut update = Update::default();
        say(desired, change, &mut update)?;
        self.write(desired, &change.to_string(), &update)
            .map_err(|error| match (error, change) {
                (Error::Refused { device, source, .. }, Change::SetListenPort { new, .. })
                    if source.kind() == std::io::ErrorKind::AddrInUse =>
                {
                    Error::PortTaken { device, port: *new }
                }
                (error, _) => error,
            })
    }

    fn write(&self, desired: &Desired, operation: &str, update: &Update<'_>) -> Result<(), Error> {
        match desired.backend {
            Backend::Kernel => kernel::write(operation, &desired.device, update),
            Backend::Userspace => self.client(&desired.device).write(operation, update),
        }
    }

    /// Ends the device: the data plane's process and its socket, or the kernel's device. A TUN device stays, for routing to delete.
    pub fn remove(&mut self, device: &str) -> Removal {
        let mut removal = Removal::default();
        if let Err(error) = check_name(device) {
            removal.errors.push(error);
            return removal;
        }
        match self.stop(device) {
            Ok(true) => removal.removed.push(format!("data plane of {device}")),
            Ok(false) => {}
            Err(error) => removal.errors.push(error),
        }
        match kernel::delete(device) {
            Ok(true) => removal.removed.push(format!("kernel device {device}")),
            Ok(false) => {}
            Err(error) => removal.errors.push(error),
        }
        removal
    }

    fn client(&self, device: &str) -> Client {
        Client::new(&self.options.socket_dir, device)
    }

    fn place<'a>(&'a self, device: &'a str) -> Place<'a> {
        Place {
            launcher: &self.options.launcher,
            device,
            socket_dir: &self.options.socket_dir,
            runtime_dir: &self.options.runtime_dir,
        }
    }

    /// Starts the data plane, unless one answers and has its TUN device.
    fn start(&mut self, device: &str) -> Result<(), Error> {
        let hangs = self
            .silences
            .get(device)
            .is_some_and(|&silences| silences >= RESTART_AFTER);
        if !hangs && index(device).is_some() && matches!(self.client(device).read(), Ok(Some(_))) {
            return Ok(());
        }
        self.stop(device)?;
        let child = self.place(device).start()?;
        self.children.insert(device.to_owned(), child);
        self.silences.remove(device);
        Ok(())
    }

    fn stop(&mut self, device: &str) -> Result<bool, Error> {
        let stopped = self.place(device).stop()?;
        if let Some(mut child) = self.children.remove(device) {
            // A child that does not serve the socket is on its way in or out; it must not come back beside the next one.
            process::end(&mut child);
        }
        let socket = self.client(device);
        if socket.owner().is_ok_and(|owner| owner.is_none()) {
            match std::fs::remove_file(socket.path()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::system(format!("remove {}", socket.path().display()), error));
                }
                _ => {}
            }
        }
        Ok(stopped)
    }

    /// Takes note of the end of those we started, so that no zombie stays.
    fn bury(&mut self) {
        self.children.retain(|device, child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                tracing::warn!(device, %status, "the data plane ended");
                false
            }
            Err(_) => false,
        });
    }
}

/// The index of a device in this thread's network namespace.
pub(crate) fn index(device: &str) -> Option<u32> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    netdevice::name_to_index(&socket, device).ok()
}

fn check_name(device: &str) -> Result<(), Error> {
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_path = device == "." || device == "..";
    if device.is_empty() || device.len() > 15 || !device.bytes().all(harmless) || is_path {
        return Err(Error::InvalidName(device.to_owned()));
    }
    Ok(())
}

/// Adds what a step asks for to a request. Devices are not made by requests.
fn say<'a>(desired: &'a Desired, change: &Change, update: &mut Update<'a>) -> Result<(), Error> {
    let peer_of = |key: &PublicKey| desired.peers.get(key).ok_or(Error::Stale { peer: *key });
    match change {
        Change::CreateDevice { .. } | Change::RemoveDevice { .. } => {}
        Change::SetPrivateKey { .. } => {
            check_key(desired)?;
            update.private_key = Some(&desired.private_key);
        }
        Change::SetListenPort { new, .. } => update.listen_port = Some(*new),
        Change::SetMark { new, .. } => update.mark = Some(*new),
        Change::AddPeer {
            peer,
            endpoint,
            allowed_ips,
        } => {
            let wanted = peer_of(peer)?;
            let mut section = PeerUpdate::new(*peer, Presence::Ensured);
            section.preshared_key = wanted
                .preshared_key
                .is_some()
                .then(|| secret(peer, wanted))
                .transpose()?;
            section.endpoint = *endpoint;
            section.keepalive = seconds(wanted.keepalive);
            section.allowed_ips = allowed_ips.clone();
            update.peers.push(section);
        }
        Change::SetEndpoint { peer, new, .. } => {
            let mut section = PeerUpdate::new(*peer, Presence::Assumed);
            section.endpoint = Some(*new);
            update.peers.push(section);
        }
        Change::SetPresharedKey { peer, new, .. } => {
            let mut section = PeerUpdate::new(*peer, Presence::Assumed);
            section.preshared_key = Some(if *new { secret(peer, peer_of(peer)?)? } else { &[0; 32] });
            update.peers.push(section);
        }
        Change::SetKeepalive { peer, new, .. } => {
            let mut section = PeerUpdate::new(*peer, Presence::Assumed);
            section.keepalive = Some(seconds(*new).unwrap_or(0));
            update.peers.push(section);
        }
        Change::AddAllowedIps { peer, allowed_ips } => {
            let mut section = PeerUpdate::new(*peer, Presence::Assumed);
            section.allowed_ips = allowed_ips.clone();
            update.peers.push(section);
        }
        Change::RemoveAllowedIps { allowed_ips, .. } => {
            let taken = throw_away(allowed_ips).map_err(|error| Error::system(change.to_string(), error))?;
            update.peers.extend(taken);
        }
        Change::RemovePeer { peer } => update.peers.push(PeerUpdate::new(*peer, Presence::Removed)),
    }
    Ok(())
}

fn check_key(desired: &Desired) -> Result<(), Error> {
    let secret = StaticSecret::from(*Zeroizing::new(*desired.private_key.expose()));
    if x25519_dalek::PublicKey::from(&secret).as_bytes() != desired.public_key.as_bytes() {
        return Err(Error::KeyMismatch {
            device: desired.device.clone(),
            public_key: desired.public_key,
        });
    }
    Ok(())
}

fn secret<'a>(key: &PublicKey, peer: &'a Peer) -> Result<&'a [u8; 32], Error> {
    match peer.preshared_key.as_ref().map(|secret| secret.expose()) {
        Some(secret) if *secret != [0; 32] => Ok(secret),
        Some(_) => Err(Error::ZeroPresharedKey { peer: *key }),
        None => Err(Error::Stale { peer: *key }),
    }
}

/// Takes ranges from whoever has them, and from nobody else: a peer that nobody can be gets them, and goes away with them.
///
/// WireGuard before Linux 6.16 and most userspace implementations cannot remove one range; replacing a peer's list instead would leave its
/// other ranges without an owner for a moment. A packet that comes just then finds a peer without an endpoint, and is dropped.
fn throw_away(allowed_ips: &BTreeSet<Prefix>) -> Result<[PeerUpdate<'static>; 2], std::io::Error> {
    let nobody = loop {
        let mut bytes = [0u8; 32];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        if let Ok(key) = PublicKey::from_bytes(bytes) {
            break key;
        }
    };
    let mut taking = PeerUpdate::new(nobody, Presence::Ensured);
    taking.allowed_ips = allowed_ips.clone();
    Ok([taking, PeerUpdate::new(nobody, Presence::Removed)])
}
