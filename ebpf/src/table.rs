//! The gate's table as people think of it, and its translation to what lies in the maps.
//!
//! In the maps every prefix carries all that holds for it, so that the program needs one look-up for each address. Here each fact is
//! declared once. The `DECLARED` flags make the way back exact.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use shroud_gate::{
    Address, Direction, Entry, Flow, LAYOUT_VERSION, Lookup, MODE_AUDIT, MODE_ENFORCE, MODE_OFF, NO_OVERLAY,
    PATH_ENCRYPTED, PATH_FENCED, PATH_LOCAL, PATH_NONE, PATH_PLAIN, Packet, Settings, Shape, Upper, Verdict, flag,
};
use shroud_model::{Mark, NodeId, Prefix};

use crate::Error;
use crate::port::{self, Port};

/// What the gate does with protected traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Encrypt it, or drop it.
    Enforce,
    /// Encrypt it where possible; let the rest pass, and count it.
    Audit,
    /// Let everything pass, and count it.
    Off,
}

/// How traffic to an owner's prefix travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// The prefix is this node's own.
    Local,
    /// Through the encryption device with this interface index; dropped while there is none.
    Encrypted(Option<u32>),
    /// In the clear both ways: cluster configuration does not want it encrypted.
    Plain,
    /// The owner is known, but has no usable key, was refused, or is shut out: drop.
    Fenced,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Encrypted(Some(device)) => write!(f, "encrypted by device {device}"),
            Self::Encrypted(None) => f.write_str("encrypted, by no device yet"),
            Self::Plain => f.write_str("plain"),
            Self::Fenced => f.write_str("fenced"),
        }
    }
}

/// Whose a prefix is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The node.
    pub node: NodeId,
    /// How traffic gets there.
    pub path: Path,
}

/// Whose an address of the underlay is, and what that means for traffic to the node itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    /// The node.
    pub node: NodeId,
    /// How traffic gets there.
    pub path: NodePath,
}

/// How traffic to a node itself travels. It is protected between two addresses that both have a protected path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodePath {
    /// This node's own address; its own traffic is not protected.
    LocalOpen,
    /// This node's own address; its own traffic is protected.
    LocalProtected,
    /// Another node's, known so that what comes out of the tunnel can be checked; traffic to it is not protected.
    Open,
    /// Another node's, protected: through the encryption device with this interface index; dropped while there is none.
    Encrypted(Option<u32>),
    /// Another node's, protected, and shut: drop.
    Fenced,
}

/// One generation of the gate's maps; pure data, comparable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// What to do with protected traffic.
    pub mode: Mode,
    /// The tunnel's UDP ports on this node, at most four.
    pub listen_ports: BTreeSet<u16>,
    /// The mark of the tunnel's own packets.
    pub tunnel_mark: Mark,
    /// The mark of packets that the cluster's configuration exempts.
    pub plain_mark: Mark,
    /// Ranges between which traffic must be encrypted.
    pub protected: BTreeSet<Prefix>,
    /// Whose each prefix is; the longest one counts.
    pub owners: BTreeMap<Prefix, Owner>,
    /// Nodes' addresses in the underlay. An owner of the same single address means nothing beside a node.
    pub nodes: BTreeMap<IpAddr, Node>,
    /// Ranges that the cluster's configuration exempts.
    pub exempt: BTreeSet<Prefix>,
    /// Pods that have opted out: what they send may be in the clear. What is sent to them may not.
    pub opted_out: BTreeSet<IpAddr>,
    /// UDP destination ports that carry VXLAN, at most four.
    pub vxlan_ports: BTreeSet<u16>,
    /// UDP destination ports that carry Geneve, at most four.
    pub geneve_ports: BTreeSet<u16>,
    /// The VNI, 24 bits, of the overlay that carries protected traffic between the nodes of the mesh; `None` if none does. The ports
    /// above say what an overlay packet is.
    pub overlay: Option<u32>,
    /// Traffic between nodes from or to these ports stays in the clear, so that a node can always be healed (API server, name server,
    /// SSH); at most [`crate::MAX_OPEN_PORTS`].
    pub open_ports: BTreeSet<Port>,
}

/// What lies in the maps for one generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) settings: Settings,
    pub(crate) entries: BTreeMap<Prefix, Entry>,
}

impl Table {
    /// The table as the maps can hold it: where an owner and a node claim the same single address, it is the node's.
    pub(crate) fn settled(&self) -> Cow<'_, Self> {
        let is_nodes = |prefix: &Prefix| is_host(*prefix) && self.nodes.contains_key(&prefix.address());
        let mut table = Cow::Borrowed(self);
        if self.owners.keys().any(is_nodes) {
            table.to_mut().owners.retain(|prefix, _| !is_nodes(prefix));
        }
        table
    }

    /// Translates to what lies in the maps.
    pub(crate) fn encode(&self) -> Result<Encoded, Error> {
        let mode = match self.mode {
            Mode::Enforce => MODE_ENFORCE,
            Mode::Audit => MODE_AUDIT,
            Mode::Off => MODE_OFF,
        };
        let settings = Settings {
            version: LAYOUT_VERSION,
            mode,
            tunnel_mark: self.tunnel_mark.value(),
            tunnel_mask: self.tunnel_mark.mask(),
            plain_mark: self.plain_mark.value(),
            plain_mask: self.plain_mark.mask(),
            overlay: encode_overlay(self.overlay)?,
            open_ports: port::encode(&self.open_ports)?,
            listen_ports: encode_ports("tunnel", &self.listen_ports)?,
            vxlan_ports: encode_ports("VXLAN", &self.vxlan_ports)?,
            geneve_ports: encode_ports("Geneve", &self.geneve_ports)?,
        };
        let prefixes: BTreeSet<Prefix> = self
            .protected
            .iter()
            .chain(self.owners.keys())
            .chain(&self.exempt)
            .copied()
            .chain(self.nodes.keys().chain(&self.opted_out).copied().map(Prefix::host))
            .collect();
        // Owners and nodes are in the order of their prefixes too.
        let (mut owners, mut nodes) = (self.owners.iter().peekable(), self.nodes.iter().peekable());
        let mut entries = Vec::with_capacity(prefixes.len());
        // A prefix comes before all that it covers, so those that cover the next one are always the last few that are open.
        let mut open: Vec<(Prefix, Held)> = Vec::new();
        for prefix in prefixes {
            while open.last().is_some_and(|(shorter, _)| !shorter.covers(prefix)) {
                open.pop();
            }
            let above = open.last().map(|(_, held)| *held).unwrap_or_default();
            let owner = owners.next_if(|(owned, _)| **owned == prefix).map(|(_, owner)| *owner);
            let node = nodes.next_if(|(address, _)| Prefix::host(**address) == prefix);
            let held = self.held(prefix, owner, above);
            let entry = self.entry(prefix, owner, held);
            entries.push((prefix, node.map_or(entry, |(_, node)| node.over(entry))));
            open.push((prefix, held));
        }
        Ok(Encoded {
            settings,
            entries: entries.into_iter().collect(),
        })
    }

    /// What holds for a prefix that has this owner, given what holds for the next shorter one.
    fn held(&self, prefix: Prefix, owner: Option<Owner>, above: Held) -> Held {
        Held {
            protected: above.protected || self.protected.contains(&prefix),
            exempt: above.exempt || self.exempt.contains(&prefix),
            owner: owner.or(above.owner),
        }
    }

    /// All that holds for a prefix that is no node's address, and what was declared of itself.
    fn entry(&self, prefix: Prefix, owner: Option<Owner>, held: Held) -> Entry {
        let flags = [
            (flag::PROTECTED, held.protected),
            (flag::EXEMPT, held.exempt),
            (flag::DECLARED_PROTECTED, self.protected.contains(&prefix)),
            (flag::DECLARED_EXEMPT, self.exempt.contains(&prefix)),
            (flag::DECLARED_OWNER, owner.is_some()),
            (
                flag::OPTED_OUT,
                is_host(prefix) && self.opted_out.contains(&prefix.address()),
            ),
        ];
        let flags = flags
            .into_iter()
            .filter(|(_, holds)| *holds)
            .fold(0, |flags, (bit, _)| flags | bit);
        let (path, device) = match held.owner.map(|owner| owner.path) {
            None => (PATH_NONE, None),
            Some(Path::Local) => (PATH_LOCAL, None),
            Some(Path::Encrypted(device)) => (PATH_ENCRYPTED, device),
            Some(Path::Plain) => (PATH_PLAIN, None),
            Some(Path::Fenced) => (PATH_FENCED, None),
        };
        Entry {
            node: held.owner.map_or(0, |owner| owner.node.0),
            path,
            flags,
            reserved: [0; 2],
            device: device.unwrap_or(0),
        }
    }
}

/// What a prefix has from itself and all shorter ones.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    protected: bool,
    exempt: bool,
    /// The longest one's.
    owner: Option<Owner>,
}

impl Node {
    const PROTECTED: u8 = flag::NODE | flag::DECLARED_PROTECTED_NODE | flag::PROTECTED;

    /// The entry of this node's address, over all that holds for the address anyway.
    fn over(self, entry: Entry) -> Entry {
        let (path, device, flags) = match self.path {
            NodePath::LocalOpen => (PATH_LOCAL, None, flag::NODE),
            NodePath::LocalProtected => (PATH_LOCAL, None, Self::PROTECTED),
            NodePath::Open => (PATH_NONE, None, flag::NODE),
            NodePath::Encrypted(device) => (PATH_ENCRYPTED, device, Self::PROTECTED),
            NodePath::Fenced => (PATH_FENCED, None, Self::PROTECTED),
        };
        Entry {
            node: self.node.0,
            path,
            flags: entry.flags & !flag::DECLARED_OWNER | flags,
            reserved: [0; 2],
            device: device.unwrap_or(0),
        }
    }

    /// Translates back.
    fn decode(entry: &Entry) -> Option<Self> {
        let is_protected = entry.flags & flag::DECLARED_PROTECTED_NODE != 0;
        let path = match (entry.path, is_protected) {
            (PATH_LOCAL, false) => NodePath::LocalOpen,
            (PATH_LOCAL, true) => NodePath::LocalProtected,
            (PATH_NONE, false) => NodePath::Open,
            (PATH_ENCRYPTED, true) => NodePath::Encrypted(device(entry)),
            (PATH_FENCED, true) => NodePath::Fenced,
            _ => return None,
        };
        Some(Self {
            node: NodeId(entry.node),
            path,
        })
    }
}

impl Encoded {
    /// Translates back; `None` if this is not, byte for byte, what a table becomes.
    pub(crate) fn decode(&self) -> Option<Table> {
        let Settings {
            version: LAYOUT_VERSION,
            mode,
            ..
        } = self.settings
        else {
            return None;
        };
        let declared = |bit| self.entries.iter().filter(move |(_, entry)| entry.flags & bit != 0);
        let mode = match mode {
            MODE_ENFORCE => Mode::Enforce,
            MODE_AUDIT => Mode::Audit,
            MODE_OFF => Mode::Off,
            _ => return None,
        };
        let owner = |entry: &Entry| {
            let path = match entry.path {
                PATH_LOCAL => Path::Local,
                PATH_ENCRYPTED => Path::Encrypted(device(entry)),
                PATH_PLAIN => Path::Plain,
                PATH_FENCED => Path::Fenced,
                _ => return None,
            };
            Some(Owner {
                node: NodeId(entry.node),
                path,
            })
        };
        let owners: Option<BTreeMap<_, _>> = declared(flag::DECLARED_OWNER)
            .map(|(prefix, entry)| Some((*prefix, owner(entry)?)))
            .collect();
        let nodes: Option<BTreeMap<_, _>> = declared(flag::NODE)
            .map(|(prefix, entry)| Some((prefix.address(), Node::decode(entry)?)))
            .collect();
        let table = Table {
            mode,
            listen_ports: decode_ports(&self.settings.listen_ports),
            tunnel_mark: Mark::new(self.settings.tunnel_mark, self.settings.tunnel_mask).ok()?,
            plain_mark: Mark::new(self.settings.plain_mark, self.settings.plain_mask).ok()?,
            protected: declared(flag::DECLARED_PROTECTED).map(|(prefix, _)| *prefix).collect(),
            owners: owners?,
            nodes: nodes?,
            exempt: declared(flag::DECLARED_EXEMPT).map(|(prefix, _)| *prefix).collect(),
            opted_out: declared(flag::OPTED_OUT).map(|(prefix, _)| prefix.address()).collect(),
            vxlan_ports: decode_ports(&self.settings.vxlan_ports),
            geneve_ports: decode_ports(&self.settings.geneve_ports),
            overlay: Some(self.settings.overlay).filter(|vni| *vni != NO_OVERLAY),
            open_ports: port::decode(&self.settings.open_ports)?,
        };
        let again = table.encode().ok()?;
        (again == *self).then_some(table)
    }
}

/// The encryption device of an entry, if there is one.
fn device(entry: &Entry) -> Option<u32> {
    Some(entry.device).filter(|index| *index != 0)
}

/// Whether a prefix is one address.
fn is_host(prefix: Prefix) -> bool {
    prefix == Prefix::host(prefix.address())
}

/// A VNI has 24 bits (RFC 7348 §5, RFC 8926 §3.4).
fn encode_overlay(overlay: Option<u32>) -> Result<u32, Error> {
    match overlay {
        None => Ok(NO_OVERLAY),
        Some(vni) if vni < 1 << 24 => Ok(vni),
        Some(vni) => Err(Error::Vni { vni }),
    }
}

fn encode_ports<const N: usize>(what: &'static str, ports: &BTreeSet<u16>) -> Result<[[u8; 2]; N], Error> {
    if ports.len() > N || ports.contains(&0) {
        return Err(Error::Ports {
            what,
            given: ports.len(),
            most: N,
        });
    }
    let mut encoded = [[0; 2]; N];
    for (to, port) in encoded.iter_mut().zip(ports) {
        *to = port.to_be_bytes();
    }
    Ok(encoded)
}

fn decode_ports(ports: &[[u8; 2]]) -> BTreeSet<u16> {
    ports
        .iter()
        .map(|port| u16::from_be_bytes(*port))
        .filter(|port| *port != 0)
        .collect()
}

/// The prefix itself and all shorter ones that contain it, longest first.
fn covering(prefix: Prefix) -> impl Iterator<Item = Prefix> {
    (0..=prefix.length())
        .rev()
        .filter_map(move |length| Prefix::containing(prefix.address(), length))
}

/// UDP's number (IANA protocol numbers).
const UDP: u8 = 17;

/// A packet as a person would describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Which way it passes the gate.
    pub direction: Direction,
    /// Where it says it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source and destination port, if it has any.
    pub ports: Option<(u16, u16)>,
    /// The packet's mark.
    pub mark: u32,
    /// The overlay packet around it, if there is one.
    pub overlay: Option<Wrapping>,
}

/// An overlay packet, but for what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrapping {
    /// The overlay's number.
    pub vni: u32,
    /// The node that wrapped it.
    pub source: IpAddr,
    /// The node it is sent to.
    pub destination: IpAddr,
}

/// Decides on a packet by a table, with the very code that runs in the kernel.
///
/// # Errors
/// [`Error::Ports`] if the table could not be put into the maps.
pub fn decide(table: &Table, facts: &Facts) -> Result<Verdict, Error> {
    let encoded = table.encode()?;
    let (source_port, destination_port) = facts.ports.unwrap_or_default();
    let flow = Flow {
        source: address(facts.source),
        destination: address(facts.destination),
        protocol: facts.protocol,
        upper: if facts.ports.is_some() {
            Upper::Ports
        } else {
            Upper::Other
        },
        source_port: source_port.to_be_bytes(),
        destination_port: destination_port.to_be_bytes(),
        icmpv6: 0,
    };
    let packet = match facts.overlay {
        None => Packet {
            shape: Shape::Ip,
            vni: 0,
            outer: flow,
            inner: flow,
        },
        Some(wrapping) => Packet {
            shape: Shape::OverlayOfIp,
            vni: wrapping.vni,
            outer: Flow {
                source: address(wrapping.source),
                destination: address(wrapping.destination),
                protocol: UDP,
                upper: Upper::Ports,
                ..flow
            },
            inner: flow,
        },
    };
    Ok(match facts.direction {
        Direction::Egress => shroud_gate::egress(&packet, facts.mark, &encoded),
        Direction::Ingress => shroud_gate::ingress(&packet, &encoded),
        Direction::Decrypted => shroud_gate::decrypted(&packet, &encoded),
    })
}

impl Lookup for Encoded {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn entry(&self, address: &Address) -> Entry {
        let found = covering(Prefix::host(ip(address))).find_map(|prefix| self.entries.get(&prefix));
        found.copied().unwrap_or_default()
    }
}

/// An address as the maps have it.
pub(crate) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address::v6(ip.octets()),
    }
}

/// An address as people have it.
pub(crate) fn ip(address: &Address) -> IpAddr {
    match address.family {
        shroud_gate::Family::V4 => {
            let [a, b, c, d, ..] = address.bytes;
            IpAddr::from([a, b, c, d])
        }
        shroud_gate::Family::V6 => IpAddr::from(address.bytes),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shroud_gate::{Action, Reason};

    use super::*;

    #[test]
    fn a_table_survives_the_maps() {
        let table = table();

        let encoded = table.encode().unwrap();

        assert_eq!(encoded.decode(), Some(table));
    }

    #[test]
    fn an_entry_that_somebody_changed_is_no_table() {
        let mut encoded = table().encode().unwrap();

        // Not a declared fact, only an inherited one: the owner of an exempt pod.
        encoded.entries.get_mut(&prefix("10.244.2.9/32")).unwrap().path = PATH_LOCAL;

        assert_eq!(encoded.decode(), None);
    }

    #[test]
    fn a_pod_inherits_what_holds_for_its_range() {
        let encoded = table().encode().unwrap();

        let pod = encoded.entry(&address("10.244.2.9".parse().unwrap()));

        let flags = flag::PROTECTED | flag::EXEMPT | flag::DECLARED_EXEMPT;
        assert_eq!(
            pod,
            Entry {
                node: 2,
                path: PATH_ENCRYPTED,
                flags,
                reserved: [0; 2],
                device: 7
            }
        );
    }

    #[test]
    fn a_fifth_overlay_port_is_refused() {
        let table = Table {
            vxlan_ports: [1, 2, 3, 4, 5].into(),
            ..table()
        };

        let error = table.encode().unwrap_err();

        assert_eq!(
            error.to_string(),
            "put 5 VXLAN ports into the gate's table: give at most 4, none of them 0"
        );
    }

    #[test]
    fn what_explain_says_is_what_the_maps_say() {
        let facts = |destination: &str| Facts {
            direction: Direction::Egress,
            source: "10.244.1.2".parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol: 1,
            ports: None,
            mark: 0,
            overlay: None,
        };
        let verdict = |destination| {
            let verdict = decide(&table(), &facts(destination)).unwrap();
            (verdict.action, verdict.reason)
        };

        assert_eq!(verdict("10.244.2.2"), (Action::Redirect(7), Reason::Encrypted));
        assert_eq!(verdict("10.244.3.2"), (Action::Drop, Reason::Fenced));
        assert_eq!(verdict("10.244.5.2"), (Action::Pass, Reason::Plain));
        assert_eq!(verdict("10.244.9.2"), (Action::Drop, Reason::UnknownNode));
        assert_eq!(verdict("10.244.1.9"), (Action::Drop, Reason::Local));
        assert_eq!(verdict("198.51.100.1"), (Action::Pass, Reason::Unprotected));
    }

    proptest! {
        #[test]
        fn the_longest_owner_wins_whatever_else_is_declared(
            owners in proptest::collection::btree_map((any::<[u8; 4]>(), 0u8..=32), any::<u64>(), 0..20),
            exempt in proptest::collection::btree_set((any::<[u8; 4]>(), 0u8..=32), 0..10),
            asked: [u8; 4],
        ) {
            let range = |(bytes, length)| Prefix::containing(IpAddr::from(bytes), length).unwrap();
            let owners: BTreeMap<Prefix, Owner> = owners
                .into_iter()
                .map(|(prefix, node)| (range(prefix), Owner { node: NodeId(node), path: Path::Fenced }))
                .collect();
            let table = Table { owners, exempt: exempt.into_iter().map(range).collect(), ..table() };
            let asked = IpAddr::from(asked);

            let entry = table.encode().unwrap().entry(&address(asked));

            let owner = table.owners.iter().filter(|(prefix, _)| prefix.contains(asked)).max_by_key(|(prefix, _)| prefix.length());
            prop_assert_eq!(entry.node, owner.map_or(0, |(_, owner)| owner.node.0));
            prop_assert_eq!(entry.is_exempt(), table.exempt.iter().any(|prefix| prefix.contains(asked)));
        }
    }

    fn table() -> Table {
        Table {
            mode: Mode::Enforce,
            listen_ports: [51820, 51822].into(),
            tunnel_mark: Mark::new(0x10, 0x30).unwrap(),
            plain_mark: Mark::new(0x20, 0x30).unwrap(),
            protected: ["10.244.0.0/16", "fd00:10:244::/48"].map(prefix).into(),
            owners: [
                (
                    prefix("10.244.1.0/24"),
                    Owner {
                        node: NodeId(1),
                        path: Path::Local,
                    },
                ),
                (
                    prefix("10.244.2.0/24"),
                    Owner {
                        node: NodeId(2),
                        path: Path::Encrypted(Some(7)),
                    },
                ),
                (
                    prefix("10.244.3.0/24"),
                    Owner {
                        node: NodeId(3),
                        path: Path::Fenced,
                    },
                ),
                (
                    prefix("10.244.5.0/24"),
                    Owner {
                        node: NodeId(5),
                        path: Path::Plain,
                    },
                ),
            ]
            .into(),
            nodes: [
                ("192.0.2.1", 1, NodePath::LocalProtected),
                ("2001:db8::1", 1, NodePath::LocalOpen),
                ("192.0.2.2", 2, NodePath::Encrypted(Some(7))),
                ("192.0.2.3", 3, NodePath::Fenced),
                ("2001:db8::3", 3, NodePath::Open),
            ]
            .map(|(address, node, path)| {
                (
                    address.parse().unwrap(),
                    Node {
                        node: NodeId(node),
                        path,
                    },
                )
            })
            .into(),
            exempt: [prefix("10.244.2.9/32")].into(),
            opted_out: ["10.244.1.8", "192.0.2.3", "fd00:10:244:2::8"]
                .map(|address| address.parse().unwrap())
                .into(),
            vxlan_ports: [4789, 8472].into(),
            geneve_ports: [6081].into(),
            overlay: Some(42),
            open_ports: ["tcp/6443", "udp/53"].map(|port| port.parse().unwrap()).into(),
        }
    }

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }
}
