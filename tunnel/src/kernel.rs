//! WireGuard in the kernel, through `wireguard-control`.
//!
//! Two habits of that crate are kept in check here. Its `Key` prints itself in `Debug`, and its error texts may show a whole request: no
//! `Key` outlives a function of this module, and of its errors only number and kind go on. And its `apply` makes a device that is
//! missing: only [`create`] may do that.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use shroud_model::{Prefix, PresharedKey, PublicKey};
use wireguard_control as wg;
use wireguard_control::{DeviceUpdate, InterfaceName, Key, PeerConfigBuilder};
use zeroize::Zeroize as _;

use crate::update::{PeerUpdate, Presence, Update};
use crate::{Backend, Device, Error, ObservedPeer};

/// A device name nobody uses, for the question whether there are such devices at all.
const PROBE: &str = "shroud-probe";

/// Whether the kernel has WireGuard; if not, why one thinks so. The question loads the module where there is one.
pub(crate) fn probe() -> Result<(), String> {
    match wg::Device::get(&name(PROBE).map_err(|error| error.to_string())?, wg::Backend::Kernel) {
        Ok(_) => Ok(()),
        Err(error) => match number(&error) {
            // The family answered: there is no such device, as expected.
            Some(Errno::NODEV | Errno::OPNOTSUPP) => Ok(()),
            Some(Errno::NOENT) => {
                Err("this kernel has no WireGuard (generic netlink family \"wireguard\" is missing)".to_owned())
            }
            Some(Errno::PERM) => Err("WireGuard's netlink family asks for CAP_NET_ADMIN, which is missing".to_owned()),
            _ => Err(format!("WireGuard's netlink family does not answer: {}", bare(&error))),
        },
    }
}

/// Makes the device, unless it is there already.
pub(crate) fn create(device: &str) -> Result<(), Error> {
    let refused = |source| Error::Refused {
        operation: "create kernel device".to_owned(),
        device: device.to_owned(),
        source,
    };
    DeviceUpdate::new()
        .apply(&name(device)?, wg::Backend::Kernel)
        .map_err(|error| refused(bare(&error)))?;
    match read(device)? {
        Some(_) => Ok(()),
        None => Err(Error::NotWireGuard {
            device: device.to_owned(),
        }),
    }
}

/// Deletes the device. Answers whether there was one.
pub(crate) fn delete(device: &str) -> Result<bool, Error> {
    let refused = |source| Error::Refused {
        operation: "delete kernel device".to_owned(),
        device: device.to_owned(),
        source,
    };
    match wg::Device::get(&name(device)?, wg::Backend::Kernel) {
        Ok(mut found) => {
            wipe(&mut found);
            found.delete().map_err(|error| refused(bare(&error)))?;
            Ok(true)
        }
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(refused(bare(&error))),
    }
}

/// Reads the device, or `None` when there is no WireGuard device of that name.
pub(crate) fn read(device: &str) -> Result<Option<Device>, Error> {
    let mut found = match wg::Device::get(&name(device)?, wg::Backend::Kernel) {
        Ok(found) => found,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => {
            return Err(Error::Refused {
                operation: "read".to_owned(),
                device: device.to_owned(),
                source: bare(&error),
            });
        }
    };
    let public_key = found
        .public_key
        .as_ref()
        .and_then(|key| PublicKey::from_bytes(key.0).ok());
    let mut peers: BTreeMap<PublicKey, ObservedPeer> = BTreeMap::new();
    for info in &found.peers {
        // A key nobody can hold is not one of ours; what it claims is taken back when our peers get their ranges.
        let Ok(key) = PublicKey::from_bytes(info.config.public_key.0) else {
            continue;
        };
        let ranges = info
            .config
            .allowed_ips
            .iter()
            .filter_map(|range| Prefix::containing(range.address, range.cidr));
        match peers.entry(key) {
            // The kernel splits a long list of ranges over several messages; the later ones hold nothing else.
            Entry::Occupied(mut peer) => peer.get_mut().allowed_ips.extend(ranges),
            Entry::Vacant(peer) => {
                let secret = info.config.preshared_key.as_ref().filter(|key| key.0 != [0; 32]);
                peer.insert(ObservedPeer {
                    endpoint: info.config.endpoint,
                    allowed_ips: ranges.collect(),
                    keepalive: info
                        .config
                        .persistent_keepalive_interval
                        .filter(|&seconds| seconds != 0)
                        .map(|seconds| Duration::from_secs(u64::from(seconds))),
                    last_handshake: info.stats.last_handshake_time,
                    rx_bytes: info.stats.rx_bytes,
                    tx_bytes: info.stats.tx_bytes,
                    preshared_key: secret.map(|key| Arc::new(PresharedKey::from_bytes(key.0))),
                });
            }
        }
    }
    let device = Device {
        backend: Backend::Kernel,
        public_key,
        listen_port: found.listen_port.unwrap_or(0),
        mark: found.fwmark.unwrap_or(0),
        peers,
    };
    wipe(&mut found);
    Ok(Some(device))
}

/// Changes the device, which must exist.
pub(crate) fn write(operation: &str, device: &str, update: &Update<'_>) -> Result<(), Error> {
    if crate::tunnel::index(device).is_none() {
        return Err(Error::NoDevice {
            operation: operation.to_owned(),
            device: device.to_owned(),
        });
    }
    let mut request = DeviceUpdate::new();
    if let Some(key) = update.private_key {
        request = request.set_private_key(Key(*key.expose()));
    }
    if let Some(mark) = update.mark {
        request = request.set_fwmark(mark.value());
    }
    if let Some(port) = update.listen_port {
        request = request.set_listen_port(port);
    }
    for peer in &update.peers {
        request = request.add_peer(builder(peer));
    }
    request
        .apply(&name(device)?, wg::Backend::Kernel)
        .map_err(|error| Error::Refused {
            operation: operation.to_owned(),
            device: device.to_owned(),
            source: bare(&error),
        })
}

fn builder(peer: &PeerUpdate<'_>) -> PeerConfigBuilder {
    let mut builder = PeerConfigBuilder::new(&Key(*peer.public_key.as_bytes()));
    if let Some(key) = peer.preshared_key {
        builder = builder.set_preshared_key(Key(*key));
    }
    if let Some(endpoint) = peer.endpoint {
        builder = builder.set_endpoint(endpoint);
    }
    if let Some(seconds) = peer.keepalive {
        builder = builder.set_persistent_keepalive_interval(seconds);
    }
    for range in &peer.allowed_ips {
        builder = builder.add_allowed_ip(range.address(), range.length());
    }
    match peer.presence {
        Presence::Removed => builder.remove(),
        // `wireguard-control` cannot say "only if it is there". A peer that is made by mistake has no key, range or endpoint that was not
        // meant for it, and the next pass completes or removes it.
        Presence::Ensured | Presence::Assumed => builder,
    }
}

fn name(device: &str) -> Result<InterfaceName, Error> {
    device.parse().map_err(|_| Error::InvalidName(device.to_owned()))
}

fn is_absent(error: &io::Error) -> bool {
    match number(error) {
        Some(Errno::NODEV | Errno::NOENT | Errno::OPNOTSUPP) => true,
        _ => error.kind() == io::ErrorKind::NotFound,
    }
}

fn number(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

/// The error without its text, which may hold a request with keys in it.
fn bare(error: &io::Error) -> io::Error {
    error
        .raw_os_error()
        .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

fn wipe(device: &mut wg::Device) {
    if let Some(key) = &mut device.private_key {
        key.0.zeroize();
    }
    for peer in &mut device.peers {
        if let Some(key) = &mut peer.config.preshared_key {
            key.0.zeroize();
        }
    }
}
