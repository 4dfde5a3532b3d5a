//! What the gate counted, and what it dropped.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aya::maps::{MapData, PerCpuHashMap};
use shroud_gate::{Address, Count, CounterKey, Direction, DropEvent, Reason};
use shroud_model::{Family, NodeId};

use crate::Error;
use crate::table::ip;

/// What was counted under one node, direction, family and reason, since the maps were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// The other node: the destination's owner on egress, the source's on ingress.
    pub node: NodeId,
    /// Which way.
    pub direction: Direction,
    /// IPv4 or IPv6; `None` if the packet could not be read.
    pub family: Option<Family>,
    /// Why the packets passed or not.
    pub reason: Reason,
    /// They would have been dropped, but audit mode let them pass.
    pub audited: bool,
    /// How many, as they would be on the wire.
    pub packets: u64,
    /// How many bytes, with link-layer headers.
    pub bytes: u64,
}

/// A packet that was dropped, or would have been. There are at most a hundred each second for each CPU; counters tell how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Interface index of the uplink.
    pub device: u32,
    /// Which way.
    pub direction: Direction,
    /// Source and destination, of the inner packet if there is one; `None` if the packet could not be read.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// IP protocol number.
    pub protocol: u8,
    /// Source and destination port, 0 if there are none.
    pub ports: (u16, u16),
    /// The other node, as in [`Counter`].
    pub node: NodeId,
    /// Why.
    pub reason: Reason,
    /// It would have been dropped, but audit mode let it pass.
    pub audited: bool,
}

type Key = [u8; size_of::<CounterKey>()];
type Value = [u8; size_of::<Count>()];

/// Sums what all CPUs counted.
pub(crate) fn read(map: &PerCpuHashMap<MapData, Key, Value>) -> Result<Vec<Counter>, Error> {
    let mut counters = BTreeMap::new();
    for item in map.iter() {
        let (key, values) = item.map_err(|source| Error::Map {
            operation: "read",
            name: "COUNTERS",
            source,
        })?;
        let total = values
            .iter()
            .map(Count::from_bytes)
            .fold(Count::default(), |sum, count| Count {
                packets: sum.packets + count.packets,
                bytes: sum.bytes + count.bytes,
            });
        counters.insert(CounterKey::from_bytes(&key), total);
    }
    Ok(counters
        .into_iter()
        .filter_map(|(key, count)| counter(key, count))
        .collect())
}

/// `None` for what a newer build may have counted under a number we do not know.
fn counter(key: CounterKey, count: Count) -> Option<Counter> {
    Some(Counter {
        node: NodeId(key.node),
        direction: Direction::from_number(key.direction)?,
        family: shroud_gate::Family::from_number(key.family).map(family),
        reason: Reason::from_number(key.reason)?,
        audited: key.audited != 0,
        packets: count.packets,
        bytes: count.bytes,
    })
}

/// Reads one item of the ring buffer.
pub(crate) fn event(bytes: &[u8]) -> Option<Event> {
    let event = DropEvent::from_bytes(bytes.first_chunk()?);
    let addresses = shroud_gate::Family::from_number(event.family).map(|family| {
        (
            ip(&Address {
                family,
                bytes: event.source,
            }),
            ip(&Address {
                family,
                bytes: event.destination,
            }),
        )
    });
    Some(Event {
        device: event.device,
        direction: Direction::from_number(event.direction)?,
        addresses,
        protocol: event.protocol,
        ports: (
            u16::from_be_bytes(event.source_port),
            u16::from_be_bytes(event.destination_port),
        ),
        node: NodeId(event.node),
        reason: Reason::from_number(event.reason)?,
        audited: event.audited != 0,
    })
}

fn family(family: shroud_gate::Family) -> Family {
    match family {
        shroud_gate::Family::V4 => Family::V4,
        shroud_gate::Family::V6 => Family::V6,
    }
}
