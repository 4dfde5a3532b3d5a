//! What the agent says of itself: one structure, from which the status socket, the tables, the JSON and the exit code are rendered.
//!
//! The JSON is an interface: `version` rises when a field changes its meaning or goes; new fields may come without. `docs/status.md`
//! explains each.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use shroud_model::{Mtu, NodeName, Prefix, PublicKey};

use crate::check::Problem;

/// The version of the JSON form.
pub(crate) const VERSION: u32 = 2;

/// Whether every protected byte is encrypted and everything works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
    /// The gate enforces, every known node is an encrypted peer, the last pass failed nowhere.
    Healthy,
    /// Something needs a look; `summary` and `problems` say what.
    Degraded,
}

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    pub(crate) version: u32,
    pub(crate) verdict: Verdict,
    /// One line that says what the verdict rests on.
    pub(crate) summary: String,
    pub(crate) node: NodeName,
    pub(crate) public_key: PublicKey,
    pub(crate) fingerprint: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) pod_prefixes: Vec<Prefix>,
    pub(crate) routing: RoutingStatus,
    pub(crate) encryption: EncryptionStatus,
    /// How a change of this node's key goes; `null` while there is none.
    pub(crate) rotation: Option<RotationStatus>,
    pub(crate) gate: GateStatus,
    pub(crate) directory: DirectoryStatus,
    pub(crate) peers: Vec<PeerStatus>,
    pub(crate) refused: Vec<RefusedStatus>,
    /// The pods that have opted out of encryption, by address; `null` while nobody can say.
    pub(crate) opted_out: Option<Vec<OptOutStatus>>,
    pub(crate) pass: PassStatus,
    /// What needs a look, most pressing first.
    pub(crate) problems: Vec<Problem>,
}

/// How pod packets find the other nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RoutingStatus {
    /// How they are sent to peers that can receive them so: `native`, `vxlan` or `geneve`.
    pub(crate) mode: String,
    /// The overlay packets that this node can receive, as `kind:vni:port`.
    pub(crate) receives: Vec<String>,
}

/// Which WireGuard encrypts, and why that one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EncryptionStatus {
    pub(crate) backend: String,
    pub(crate) because: String,
    pub(crate) device: String,
    pub(crate) listen_port: u16,
    /// All encryption devices: one for each pair of keys with which a peer can be reached.
    pub(crate) devices: Vec<DeviceStatus>,
}

/// One encryption device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeviceStatus {
    pub(crate) name: String,
    pub(crate) listen_port: u16,
    /// Of the key that it has.
    pub(crate) fingerprint: String,
    /// How many peers can be reached through it.
    pub(crate) peers: usize,
    /// How many are sent to through it.
    pub(crate) used_for: usize,
}

/// How a change of this node's key goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RotationStatus {
    /// The key to come.
    pub(crate) public_key: PublicKey,
    pub(crate) fingerprint: String,
    /// How long it has taken so far, or since the agent was started.
    pub(crate) seconds: f64,
    /// How many peers use the new key, and the old one no more.
    pub(crate) followed: usize,
    /// How many do not answer at all; nobody waits for them.
    pub(crate) away: usize,
    /// Those that are waited for.
    pub(crate) waiting: Vec<NodeName>,
}

/// The gate at a glance; `shroud gate` has the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct GateStatus {
    pub(crate) mode: String,
    /// The devices it really is attached to, as read back from the kernel.
    pub(crate) uplinks: Vec<String>,
    pub(crate) pod_devices: Vec<String>,
    pub(crate) encrypted_packets: u64,
    pub(crate) dropped_packets: u64,
    /// Bytes of protected traffic that passed in the clear since the gate was first loaded: 0 unless the mode is or was audit or off.
    pub(crate) plaintext_bytes: u64,
}

/// Where the knowledge of the mesh comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DirectoryStatus {
    pub(crate) source: String,
    /// `waiting` before the first complete list, `cached` when what is known comes from the disk, `live` afterwards.
    pub(crate) state: String,
    pub(crate) problems: Vec<Problem>,
}

impl DirectoryStatus {
    /// What `state` can be.
    pub(crate) const STATES: [&str; 3] = ["waiting", "cached", "live"];
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PeerStatus {
    pub(crate) node: NodeName,
    /// Its key in the tunnel that is sent through.
    pub(crate) public_key: PublicKey,
    pub(crate) fingerprint: String,
    pub(crate) backend: String,
    /// The encryption device that is sent through.
    pub(crate) device: String,
    /// The endpoint in use; `null` when none can be reached.
    pub(crate) endpoint: Option<SocketAddr>,
    /// Seconds since the last handshake; `null` when there was none.
    pub(crate) handshake_age_seconds: Option<f64>,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    /// How pod packets are sent to it: `native`, `vxlan` or `geneve`.
    pub(crate) mode: String,
    /// The largest pod packet that gets there.
    pub(crate) mtu: Mtu,
    /// What probing the path found; `null` before the first probe.
    pub(crate) path: Option<PathStatus>,
    pub(crate) pod_prefixes: Vec<Prefix>,
    /// Whether the traffic of the two nodes themselves is encrypted too.
    pub(crate) encrypts_nodes: bool,
    /// Why traffic between the two nodes is in the clear, as the configuration wants it; `null` where it is encrypted or dropped.
    pub(crate) in_the_clear: Option<String>,
    pub(crate) problems: Vec<Problem>,
}

/// The path to a peer, through the tunnel and whatever lies below it, as in-tunnel probes find it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PathStatus {
    /// `unknown`, `confirmed`, `searching`, `reduced` or `silent`.
    pub(crate) state: String,
    /// The largest pod packet that the uplink promises to carry.
    pub(crate) expected_mtu: Mtu,
    pub(crate) rtt_milliseconds: Option<f64>,
    pub(crate) probes_sent: u64,
    /// Those too large for the path are among them.
    pub(crate) probes_lost: u64,
}

/// A node that is known and kept out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RefusedStatus {
    pub(crate) node: String,
    pub(crate) reasons: Vec<String>,
    /// The prefixes to which traffic is dropped.
    pub(crate) fenced: Vec<Prefix>,
}

/// A pod that has opted out: what it sends leaves in the clear.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct OptOutStatus {
    /// As `namespace/name`.
    pub(crate) pod: String,
    pub(crate) node: NodeName,
    pub(crate) address: IpAddr,
    /// Whose label says so: `pod` or `namespace`.
    pub(crate) by: String,
}

/// The last comparison of the kernel with the plan.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PassStatus {
    pub(crate) number: u64,
    /// How many changes it made; 0 when the kernel was as planned.
    pub(crate) changes: usize,
    pub(crate) failures: Vec<Problem>,
    pub(crate) seconds: f64,
    /// The changes of the latest pass that made any, newest last; bounded.
    pub(crate) latest_changes: Vec<String>,
}

/// The gate's counters, for `shroud gate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct GateCounters {
    pub(crate) version: u32,
    pub(crate) mode: String,
    pub(crate) counters: Vec<CounterStatus>,
    pub(crate) events: Vec<String>,
}

/// One counter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CounterStatus {
    /// The node at the other end, or empty when it is nobody we know.
    pub(crate) node: String,
    pub(crate) direction: String,
    pub(crate) family: String,
    pub(crate) verdict: String,
    pub(crate) reason: String,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) packets_per_second: f64,
    pub(crate) bytes_per_second: f64,
}

/// What happens to a packet, step by step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Explanation {
    pub(crate) version: u32,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) outcome: Outcome,
    /// One line that says why.
    pub(crate) because: String,
    pub(crate) steps: Vec<Step>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Outcome {
    /// It leaves this node encrypted, or arrived so.
    Encrypted,
    /// It stays on this node.
    Local,
    /// It leaves in the clear, because nothing protected is in it or the configuration says so.
    Plain,
    /// It is dropped.
    Dropped,
    /// It does not pass this node.
    Elsewhere,
}

/// One station of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Step {
    /// Who decides: `source`, `destination`, `route`, `gate` or `tunnel`.
    pub(crate) stage: String,
    pub(crate) says: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a healthy node a says of itself and of these peers.
    pub(crate) fn status(peers: impl IntoIterator<Item = PeerStatus>) -> Status {
        let key = PublicKey::from_bytes([1; 32]).unwrap();
        Status {
            version: VERSION,
            verdict: Verdict::Healthy,
            summary: "all is well".to_owned(),
            node: "a".parse().unwrap(),
            public_key: key,
            fingerprint: key.fingerprint(),
            addresses: vec!["172.18.0.1".parse().unwrap()],
            pod_prefixes: vec!["10.244.1.0/24".parse().unwrap()],
            routing: RoutingStatus {
                mode: "native".to_owned(),
                receives: Vec::new(),
            },
            encryption: EncryptionStatus {
                backend: "userspace".to_owned(),
                because: "asked for".to_owned(),
                device: "shroud0".to_owned(),
                listen_port: 51820,
                devices: Vec::new(),
            },
            rotation: None,
            gate: GateStatus {
                mode: "enforce".to_owned(),
                uplinks: vec!["eth0".to_owned()],
                pod_devices: Vec::new(),
                encrypted_packets: 0,
                dropped_packets: 0,
                plaintext_bytes: 0,
            },
            directory: DirectoryStatus {
                source: "file /nodes".to_owned(),
                state: "live".to_owned(),
                problems: Vec::new(),
            },
            peers: peers.into_iter().collect(),
            refused: Vec::new(),
            opted_out: Some(Vec::new()),
            pass: PassStatus::default(),
            problems: Vec::new(),
        }
    }

    /// A peer with which all is well.
    pub(crate) fn peer(name: &str) -> PeerStatus {
        let key = PublicKey::from_bytes([name.as_bytes()[0]; 32]).unwrap();
        PeerStatus {
            node: name.parse().unwrap(),
            public_key: key,
            fingerprint: key.fingerprint(),
            backend: "userspace".to_owned(),
            device: "shroud0".to_owned(),
            endpoint: None,
            handshake_age_seconds: Some(1.0),
            rx_bytes: 0,
            tx_bytes: 0,
            mode: "native".to_owned(),
            mtu: Mtu::new(1420).unwrap(),
            path: None,
            pod_prefixes: Vec::new(),
            encrypts_nodes: false,
            in_the_clear: None,
            problems: Vec::new(),
        }
    }
}
