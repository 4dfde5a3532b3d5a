//! What a node's overlay should look like.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use shroud_model::Mtu;

use crate::{Kind, Mac, Vni};

/// Everything this crate is asked to bring about. What is ours and not in here is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// The overlay's devices, by name. A name begins with `shroud`.
    pub devices: BTreeMap<String, Device>,
}

/// One overlay device and what it knows of its peers. It is also up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// How it wraps packets. VXLAN knows its peers' underlay addresses, all of the family of `local`; Geneve has them in the routes.
    pub kind: Kind,
    /// The overlay's number. Geneve has it in the routes, not on the device.
    pub vni: Vni,
    /// The UDP port, ours and the peers'.
    pub port: u16,
    /// This node's underlay address, the source of what the device sends. Geneve has it in the routes.
    pub local: IpAddr,
    /// This node's own link-layer address.
    pub mac: Mac,
    /// The largest inner packet: the underlay's, less the wrapping.
    pub mtu: Mtu,
    /// The peers.
    pub vteps: BTreeSet<Vtep>,
}

/// The overlay's end at a peer (VXLAN tunnel end point).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vtep {
    /// Its link-layer address.
    pub mac: Mac,
    /// The node's underlay address.
    pub underlay: IpAddr,
    /// The next hops of our routes to its pods: its IPv4 mesh address, and its link-local address.
    pub addresses: BTreeSet<IpAddr>,
}

/// Two peers of a device want the same entry. The first in order has it, so packets for the other are lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// Two peers have one link-layer address.
    Mac {
        /// The address.
        mac: Mac,
        /// The underlay address of the peer that has it.
        kept: IpAddr,
        /// That of the peer left out.
        lost: IpAddr,
    },
    /// Two peers have one mesh address.
    Address {
        /// The address.
        address: IpAddr,
        /// The link-layer address of the peer that has it.
        kept: Mac,
        /// That of the peer left out.
        lost: Mac,
    },
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mac { mac, kept, lost } => write!(
                f,
                "the peers at {kept} and {lost} (or this node) have the same link-layer address {mac}, worked out from their names: rename one"
            ),
            Self::Address { address, kept, lost } => {
                write!(
                    f,
                    "the peers with link-layer addresses {kept} and {lost} have the same mesh address {address}: correct the pod prefixes"
                )
            }
        }
    }
}

impl Device {
    /// The forwarding entries: where frames to each link-layer address go. None for Geneve, whose routes say it.
    pub(crate) fn forwarding(&self) -> BTreeMap<Mac, IpAddr> {
        match self.kind {
            Kind::Geneve => BTreeMap::new(),
            // Backwards, so that the first in order stays.
            Kind::Vxlan => self.vteps.iter().rev().map(|vtep| (vtep.mac, vtep.underlay)).collect(),
        }
    }

    /// The neighbour entries: which link-layer address each next hop has.
    pub(crate) fn neighbours(&self) -> BTreeMap<IpAddr, Mac> {
        let vteps = self.vteps.iter().rev();
        vteps
            .flat_map(|vtep| vtep.addresses.iter().map(|address| (*address, vtep.mac)))
            .collect()
    }

    /// The peers that are in each other's way. A plan shows them to people.
    pub fn conflicts(&self) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        let mut macs = BTreeMap::from([(self.mac, self.local)]);
        let mut addresses = BTreeMap::new();
        for vtep in &self.vteps {
            let kept = *macs.entry(vtep.mac).or_insert(vtep.underlay);
            if kept != vtep.underlay {
                conflicts.push(Conflict::Mac {
                    mac: vtep.mac,
                    kept,
                    lost: vtep.underlay,
                });
            }
            for address in &vtep.addresses {
                let kept = *addresses.entry(*address).or_insert(vtep.mac);
                if kept != vtep.mac {
                    conflicts.push(Conflict::Address {
                        address: *address,
                        kept,
                        lost: vtep.mac,
                    });
                }
            }
        }
        conflicts
    }
}
