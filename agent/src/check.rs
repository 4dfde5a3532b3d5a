//! What can need a look, each with an id that stays: for alerts, runbooks and scripts, which should not have to read sentences.
//!
//! `docs/checks.md` says of each id what it means and what helps; a test holds the two together.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what has no check of its own is a failure of its driver, whatever is added"
)]

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::cni;

/// Declares the checks once, each with its id.
macro_rules! checks {
    ($($(#[doc = $says:literal])+ $name:ident = $id:literal,)+) => {
        /// The kinds of problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub(crate) enum Check {
            $($(#[doc = $says])+ #[serde(rename = $id)] $name,)+
            /// An agent of another version speaks of a check that this program does not know.
            #[serde(other, rename = "unknown")]
            Unknown,
        }

        impl Check {
            /// Every check that this version can report.
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$name),+];

            /// The word by which it is known outside.
            pub(crate) fn id(self) -> &'static str {
                match self {
                    $(Self::$name => $id,)+
                    Self::Unknown => "unknown",
                }
            }
        }
    };
}

checks! {
    /// The backend `kernel` is asked for, and the kernel has no WireGuard.
    WireguardMissing = "wireguard-missing",
    /// The backend `userspace` is in use, and the kernel has no TUN.
    TunMissing = "tun-missing",
    /// Another program has the tunnel's UDP port.
    TunnelPortTaken = "tunnel-port-taken",
    /// A device that is not ours has the encryption device's name.
    TunnelDeviceForeign = "tunnel-device-foreign",
    /// The encryption device could not be read or changed.
    TunnelFailed = "tunnel-failed",
    /// A change of this node's key waits for peers.
    KeyRotationWaits = "key-rotation-waits",
    /// This node's key could not be changed.
    KeyNotRotated = "key-not-rotated",
    /// The kernel has no such overlay devices.
    OverlayKindMissing = "overlay-kind-missing",
    /// Another program has the overlay's UDP port.
    OverlayPortTaken = "overlay-port-taken",
    /// A device that is not ours has an overlay device's name.
    OverlayDeviceForeign = "overlay-device-foreign",
    /// A device that is not ours uses the overlay's number and port.
    OverlayNumberTaken = "overlay-number-taken",
    /// The overlay could not be read or changed.
    OverlayFailed = "overlay-failed",
    /// An uplink has no gate.
    GateNotAttached = "gate-not-attached",
    /// The gate only counts, by configuration.
    GateAudits = "gate-audits",
    /// The gate is off, by configuration.
    GateOff = "gate-off",
    /// The gate could not be read or changed.
    GateFailed = "gate-failed",
    /// The directory has not given a complete list yet.
    DirectoryWaiting = "directory-waiting",
    /// The directory's source does not answer.
    DirectorySilent = "directory-silent",
    /// The directory says something that is not believed.
    DirectoryDoubtful = "directory-doubtful",
    /// The last good directory could not be kept on disk.
    DirectoryNotSaved = "directory-not-saved",
    /// This node's own record is not out.
    DirectoryNotPublished = "directory-not-published",
    /// The operator's deny list could not be read.
    DenyListUnknown = "deny-list-unknown",
    /// It could not be read which pods have opted out of encryption.
    OptOutsUnknown = "opt-outs-unknown",
    /// The agent's token may change other nodes.
    TokenTooMighty = "token-too-mighty",
    /// No device leads to the underlay.
    NoUplink = "no-uplink",
    /// A configured uplink does not exist.
    UplinkMissing = "uplink-missing",
    /// Other nodes have no address for this one.
    NoAddress = "no-address",
    /// The tunnel's own packets would have to go through the tunnel.
    AddressProtected = "address-protected",
    /// This node has no pod prefix.
    NoPodPrefix = "no-pod-prefix",
    /// Only traffic between zones is to be encrypted, and this node is in none.
    NoZone = "no-zone",
    /// A peer claims pod addresses of this node.
    PrefixOverlaps = "prefix-overlaps",
    /// No route leads to any endpoint of a peer.
    PeerUnreachable = "peer-unreachable",
    /// The way to a peer leads over a device without a gate.
    PeerNotOverUplink = "peer-not-over-uplink",
    /// A peer is not on the encryption device.
    PeerNotConfigured = "peer-not-configured",
    /// A peer does not shake hands.
    PeerNoHandshake = "peer-no-handshake",
    /// A peer receives another overlay than this node sends.
    PeerOverlayDiffers = "peer-overlay-differs",
    /// Two peers work out the same overlay address.
    OverlayConflict = "overlay-conflict",
    /// A node is known and kept out.
    NodeRefused = "node-refused",
    /// An agent does not know a node of the cluster.
    PeerUnknown = "peer-unknown",
    /// A node has another key than others take for its key.
    KeyDiffers = "key-differs",
    /// The configuration leaves traffic between two nodes in the clear.
    PairPlain = "pair-plain",
    /// A node of the cluster has no agent.
    AgentMissing = "agent-missing",
    /// The agent of a node does not answer.
    AgentSilent = "agent-silent",
    /// A route that is not ours is where ours should go.
    RouteForeign = "route-foreign",
    /// Addresses, routes or kernel settings could not be read or changed.
    RoutingFailed = "routing-failed",
    /// The folder for the CNI configuration does not exist.
    CniFolderMissing = "cni-folder-missing",
    /// Another network has the CNI configuration's file name.
    CniFileForeign = "cni-file-foreign",
    /// The CNI configuration could not be written.
    CniFailed = "cni-failed",
    /// Another program has the port for metrics and probes.
    HttpPortTaken = "http-port-taken",
    /// Metrics and probes cannot be answered.
    HttpFailed = "http-failed",
    /// This machine's network could not be looked at.
    LookFailed = "look-failed",
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl Check {
    /// A problem of this kind.
    pub(crate) fn says(self, says: impl Into<String>) -> Problem {
        Problem {
            check: self,
            says: says.into(),
        }
    }
}

/// Something that needs a look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Problem {
    pub(crate) check: Check,
    /// What is wrong, on what, and what helps.
    pub(crate) says: String,
}

impl Problem {
    /// The same, told of something that the reader has to be told.
    pub(crate) fn about(&self, whom: impl fmt::Display) -> Self {
        self.check.says(format!("{whom}: {}", self.says))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.says)
    }
}

/// The parts that bring the kernel into the planned state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Driver {
    /// Looking at the machine.
    Look,
    Gate,
    Tunnel,
    Overlay,
    Routing,
    Cni,
    /// Changing this node's key.
    Keys,
}

impl Driver {
    /// Every part, in the order in which they work.
    pub(crate) const ALL: [Self; 7] = [
        Self::Look,
        Self::Gate,
        Self::Tunnel,
        Self::Overlay,
        Self::Routing,
        Self::Cni,
        Self::Keys,
    ];

    /// Its name in logs and reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Gate => "gate",
            Self::Tunnel => "tunnel",
            Self::Overlay => "overlay",
            Self::Routing => "routing",
            Self::Cni => "cni",
            Self::Keys => "keys",
        }
    }

    /// The kind of problem behind an error of this part: by what the error is, never by its text.
    pub(crate) fn check(self, error: &anyhow::Error) -> Check {
        if let Some(error) = error.downcast_ref::<shroud_tunnel::Error>() {
            return of_tunnel(error);
        }
        if let Some(error) = error.downcast_ref::<shroud_overlay::Error>() {
            return of_overlay(error);
        }
        if let Some(error) = error.downcast_ref::<shroud_routing::Error>() {
            return of_routing(error, self);
        }
        if let Some(error) = error.downcast_ref::<shroud_ebpf::Error>() {
            return of_gate(error);
        }
        if let Some(error) = error.downcast_ref::<cni::Error>() {
            return of_cni(error);
        }
        self.failed()
    }

    /// Any other failure of this part.
    fn failed(self) -> Check {
        match self {
            Self::Look => Check::LookFailed,
            Self::Gate => Check::GateFailed,
            Self::Tunnel => Check::TunnelFailed,
            Self::Overlay => Check::OverlayFailed,
            Self::Routing => Check::RoutingFailed,
            Self::Cni => Check::CniFailed,
            Self::Keys => Check::KeyNotRotated,
        }
    }
}

fn of_tunnel(error: &shroud_tunnel::Error) -> Check {
    use shroud_tunnel::Error;

    match error {
        Error::NoKernelWireGuard(_) => Check::WireguardMissing,
        Error::NoTun(_) => Check::TunMissing,
        Error::PortTaken { .. } => Check::TunnelPortTaken,
        Error::NotWireGuard { .. } | Error::DeviceTaken { .. } => Check::TunnelDeviceForeign,
        _ => Check::TunnelFailed,
    }
}

fn of_overlay(error: &shroud_overlay::Error) -> Check {
    use shroud_overlay::Error;

    match error {
        Error::NoSuchKind { .. } => Check::OverlayKindMissing,
        Error::PortTaken { .. } => Check::OverlayPortTaken,
        Error::NotOurs { .. } => Check::OverlayDeviceForeign,
        Error::Occupied { .. } => Check::OverlayNumberTaken,
        _ => Check::OverlayFailed,
    }
}

fn of_routing(error: &shroud_routing::Error, driver: Driver) -> Check {
    use shroud_routing::Error;

    match error {
        Error::Occupied { .. } => Check::RouteForeign,
        Error::NotOurs { .. } => Check::TunnelDeviceForeign,
        // A kernel WireGuard device takes its port when it goes up, which is routing's to do.
        Error::Request { source, .. } if source.kind() == io::ErrorKind::AddrInUse => Check::TunnelPortTaken,
        _ => driver.failed(),
    }
}

fn of_gate(error: &shroud_ebpf::Error) -> Check {
    use shroud_ebpf::Error;

    match error {
        Error::NoDevice { .. } | Error::LinkType { .. } | Error::Attachment { .. } | Error::Qdisc { .. } => {
            Check::GateNotAttached
        }
        _ => Check::GateFailed,
    }
}

fn of_cni(error: &cni::Error) -> Check {
    match error {
        cni::Error::NoFolder { .. } => Check::CniFolderMissing,
        cni::Error::Foreign { .. } => Check::CniFileForeign,
        cni::Error::System { .. } => Check::CniFailed,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use anyhow::Context as _;

    use super::*;

    #[test]
    fn each_check_is_explained_once_and_nothing_else_is() {
        let page = include_str!("../../docs/checks.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));

        let mut explained: BTreeMap<&str, usize> = BTreeMap::new();
        for row in rows {
            let (id, rest) = row.split_once("` |").expect("a row begins with an id");
            assert_eq!(rest.matches(" | ").count(), 1, "{id}: a meaning and a remedy");
            *explained.entry(id).or_default() += 1;
        }

        let known: BTreeMap<&str, usize> = Check::ALL.iter().map(|check| (check.id(), 1)).collect();
        assert_eq!(explained, known);
    }

    #[test]
    fn an_id_is_kebab_case_and_the_same_in_text_and_json() {
        for check in Check::ALL {
            let id = check.id();
            assert!(id.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{id}");
            assert_eq!(serde_json::to_value(check).unwrap(), id);
        }
    }

    #[test]
    fn a_problem_keeps_its_form() {
        let problem = Check::NoUplink.says("no uplink: name one");

        let json = serde_json::json!({ "check": "no-uplink", "says": "no uplink: name one" });
        assert_eq!(serde_json::to_value(&problem).unwrap(), json);
        assert_eq!(problem.to_string(), "no-uplink: no uplink: name one");
        assert_eq!(
            problem.about("peer b").to_string(),
            "no-uplink: peer b: no uplink: name one"
        );
    }

    #[test]
    fn a_check_of_a_newer_agent_is_no_error() {
        let problem: Problem = serde_json::from_str(r#"{ "check": "moon-phase", "says": "full" }"#).unwrap();

        assert_eq!(problem, Check::Unknown.says("full"));
    }

    #[test]
    fn errors_are_told_apart_by_what_they_are() {
        let operation = || "create".to_owned();
        let device = || "shroud0".to_owned();
        let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
        let tunnel = |error: shroud_tunnel::Error| (Driver::Tunnel, anyhow::Error::new(error));
        let overlay = |error: shroud_overlay::Error| (Driver::Overlay, anyhow::Error::new(error));
        let routing = |error: shroud_routing::Error| (Driver::Routing, anyhow::Error::new(error));
        let gate = |error: shroud_ebpf::Error| (Driver::Gate, anyhow::Error::new(error));
        let cni = |error: cni::Error| (Driver::Cni, anyhow::Error::new(error));
        let cases = [
            (
                tunnel(shroud_tunnel::Error::NoKernelWireGuard("none".to_owned())),
                Check::WireguardMissing,
            ),
            (tunnel(shroud_tunnel::Error::NoTun(in_use())), Check::TunMissing),
            (
                tunnel(shroud_tunnel::Error::PortTaken {
                    device: device(),
                    port: 51820,
                }),
                Check::TunnelPortTaken,
            ),
            (
                tunnel(shroud_tunnel::Error::NotWireGuard { device: device() }),
                Check::TunnelDeviceForeign,
            ),
            (
                tunnel(shroud_tunnel::Error::DeviceTaken {
                    device: device(),
                    log: "shroud0.wire.log".into(),
                }),
                Check::TunnelDeviceForeign,
            ),
            (tunnel(shroud_tunnel::Error::InvalidName(device())), Check::TunnelFailed),
            (
                overlay(shroud_overlay::Error::NoSuchKind {
                    operation: operation(),
                    kind: shroud_overlay::Kind::Geneve,
                }),
                Check::OverlayKindMissing,
            ),
            (
                overlay(shroud_overlay::Error::PortTaken {
                    operation: operation(),
                    port: 4789,
                    by: "somebody".to_owned(),
                }),
                Check::OverlayPortTaken,
            ),
            (
                overlay(shroud_overlay::Error::NotOurs {
                    operation: operation(),
                    device: device(),
                    what: "a bridge".to_owned(),
                }),
                Check::OverlayDeviceForeign,
            ),
            (
                overlay(shroud_overlay::Error::Occupied {
                    operation: operation(),
                    by: "vxlan7".to_owned(),
                }),
                Check::OverlayNumberTaken,
            ),
            (overlay(shroud_overlay::Error::Open(in_use())), Check::OverlayFailed),
            (
                routing(shroud_routing::Error::Occupied {
                    route: "10.244.2.0/24".to_owned(),
                    by: "another".to_owned(),
                }),
                Check::RouteForeign,
            ),
            (
                routing(shroud_routing::Error::NotOurs {
                    operation: operation(),
                    device: device(),
                    kind: "bridge".to_owned(),
                    wanted: "tun",
                }),
                Check::TunnelDeviceForeign,
            ),
            (
                routing(shroud_routing::Error::Request {
                    operation: operation(),
                    source: in_use(),
                }),
                Check::TunnelPortTaken,
            ),
            (routing(shroud_routing::Error::Open(in_use())), Check::RoutingFailed),
            (
                gate(shroud_ebpf::Error::NoDevice { device: device() }),
                Check::GateNotAttached,
            ),
            (gate(shroud_ebpf::Error::Object { name: "egress" }), Check::GateFailed),
            (cni(cni::Error::NoFolder { path: "f".into() }), Check::CniFolderMissing),
            (cni(cni::Error::Foreign { path: "f".into() }), Check::CniFileForeign),
            ((Driver::Cni, anyhow::anyhow!("dark")), Check::CniFailed),
            ((Driver::Keys, anyhow::anyhow!("dark")), Check::KeyNotRotated),
            ((Driver::Look, anyhow::anyhow!("dark")), Check::LookFailed),
        ];

        for ((driver, error), check) in cases {
            assert_eq!(driver.check(&error), check, "{error:#}");
            let told = Err::<(), _>(error).context("told with more context").unwrap_err();
            assert_eq!(driver.check(&told), check, "{told:#}");
        }
    }
}
