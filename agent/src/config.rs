//! The configuration: one file, one struct, every knob typed, documented and with a default we would run ourselves.
//!
//! A key we do not know or a value we cannot use is refused with the file, the key, the value, and what would be right; nothing is
//! guessed. `docs/shroud.example.yaml` shows each knob at its default, and a test holds the two together.

mod value;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shroud_ebpf::{MAX_OPEN_PORTS, Port};
use shroud_keyd::announcement::EncryptScope;
use shroud_model::{Mark, NodeName, OverlayFormat, OverlayKind, Prefix, Vni};

pub(crate) use value::{Detect, Interval};

use crate::cni::Cni;

/// Everything an operator can decide about one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Config {
    /// This node's name in the mesh. Default: the host name.
    #[serde(default = "host_name")]
    pub(crate) node: NodeName,

    /// The ranges from which this node's pods have their addresses, IPv4 and IPv6. Every node needs its own. May be left out where the
    /// directory is `kubernetes`; then the Node's `spec.podCIDRs` count.
    #[serde(default)]
    pub(crate) pod_prefixes: BTreeSet<Prefix>,

    /// All pod ranges of the mesh: traffic between two addresses in here never leaves a node in the clear, also when nobody knows
    /// the owner of the destination. Must cover `podPrefixes`, and must not contain a node's own underlay address.
    pub(crate) protected: BTreeSet<Prefix>,

    /// Pods, by address, whose traffic may stay in the clear. Dangerous: it must be the same on all nodes, and is only as trustworthy
    /// as the underlay. Default: none.
    #[serde(default)]
    pub(crate) exempt: BTreeSet<Prefix>,

    /// The devices that lead to the underlay, each of which gets a gate. `auto`: those with a default route, and those that reach a
    /// peer.
    #[serde(default)]
    pub(crate) uplinks: Detect<BTreeSet<String>>,

    /// The addresses at which other nodes reach this one. `auto`: the global addresses of the uplinks.
    #[serde(default)]
    pub(crate) addresses: Detect<BTreeSet<IpAddr>>,

    /// Where what must outlive the process is kept: the node's key and the last good directory. Mode 0700.
    #[serde(default = "default_state_dir")]
    pub(crate) state_dir: PathBuf,

    /// Where the status socket and the log of `shroud wire` live.
    #[serde(default = "default_runtime_dir")]
    pub(crate) runtime_dir: PathBuf,

    /// How pod packets find the other node.
    #[serde(default)]
    pub(crate) routing: Routing,

    /// What is encrypted.
    #[serde(default)]
    pub(crate) encrypt: Encrypt,

    /// How it is encrypted.
    #[serde(default)]
    pub(crate) encryption: Encryption,

    /// How this node's key changes.
    #[serde(default)]
    pub(crate) keys: Keys,

    /// What happens to what is not.
    #[serde(default)]
    pub(crate) gate: Gate,

    /// How this node's pods get their network.
    #[serde(default)]
    pub(crate) cni: Cni,

    /// Who is in the mesh.
    pub(crate) directory: Directory,

    /// Where probes and metrics are answered.
    #[serde(default)]
    pub(crate) http: Http,

    /// How often the kernel is compared with the plan when nothing announces a change. Bounds how long drift can live.
    #[serde(default = "default_resync")]
    pub(crate) resync: Interval,
}

/// How pod packets find the other node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Routing {
    /// `native`: a kernel route to each peer's pod prefix. `vxlan`, `geneve`: an overlay to each peer that can receive it, and routes to the
    /// others. `auto`: native where each peer is on this node's own link or both are `routable`, else VXLAN.
    pub(crate) mode: RoutingMode,

    /// The overlay's number (VNI); the same on all nodes.
    pub(crate) vni: Vni,

    /// The UDP port of VXLAN; the same on all nodes.
    pub(crate) vxlan_port: NonZeroU16,

    /// The UDP port of Geneve; the same on all nodes.
    pub(crate) geneve_port: NonZeroU16,

    /// Whether the underlay delivers packets for this node's pods to it by itself. Told to the other nodes, for their `auto`.
    pub(crate) routable: bool,
}

/// The ways a pod packet can reach the other node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum RoutingMode {
    /// The pod packet itself is routed to the node that owns its destination.
    #[default]
    Native,
    /// It is wrapped in VXLAN (RFC 7348).
    Vxlan,
    /// It is wrapped in Geneve (RFC 8926).
    Geneve,
    /// Native where that needs nothing of the underlay, else VXLAN.
    Auto,
}

/// What is encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Encrypt {
    /// Which traffic between pods. `all`, or `cross-zone`: that between two nodes of one zone, by the label
    /// `topology.kubernetes.io/zone` of their Nodes, stays in the clear if both nodes ask for it. Needs the directory `kubernetes`.
    pub(crate) scope: EncryptScope,

    /// Whether the label `shroud.dev/encrypt: "false"` on a pod, or on a namespace for its pods, lets what these pods send leave in the
    /// clear; it should be the same on all nodes. Needs the directory `kubernetes`.
    pub(crate) opt_out: bool,

    /// Traffic between nodes that both ask for it, and between such nodes and pods.
    pub(crate) nodes: bool,

    /// Traffic between two nodes from or to one of these ports stays as it is. It is what a node needs to come back after it lost its key:
    /// the API server, DNS, and a way for people to log in; all but DNS encrypt by themselves. At most 16.
    pub(crate) open_ports: BTreeSet<Port>,
}

/// How pod packets are encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Encryption {
    /// `kernel`: the kernel's WireGuard. `userspace`: our own, a process that outlives the agent. `auto`: the kernel's where it works.
    pub(crate) backend: EncryptionBackend,

    /// The name of the encryption device; begins with `shroud`, by which it is recognised as ours. While keys change there are up to three
    /// more, whose names end in `-1` to `-3`.
    pub(crate) device: String,

    /// The UDP port of the tunnel. While keys change, and where some nodes have changed theirs and others have not, up to three of the ports
    /// that follow are in use too.
    pub(crate) listen_port: u16,

    /// How often an idle tunnel sends a packet, so that a dead peer is noticed and NAT stays open; `0` for never. With thousands of
    /// nodes, idle tunnels cost each of them some packets per second.
    pub(crate) keepalive: Interval,
}

/// How this node's key changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Keys {
    /// After how long this node takes a new key, up to a tenth sooner or later; `0` for only when asked (`shroud rotate`). No packet is lost
    /// by it. WireGuard's session keys change every two minutes anyway.
    pub(crate) rotate_every: Interval,

    /// How long a peer that still answers to the old key alone is waited for. After that the old key goes, and with it the connections of
    /// such a peer, until it hears of the new one.
    pub(crate) rotate_within: Interval,
}

/// The wish for a WireGuard implementation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum EncryptionBackend {
    /// The kernel's where it works, else ours.
    #[default]
    Auto,
    /// The kernel's or none.
    Kernel,
    /// Ours.
    Userspace,
}

/// The one place that decides whether a packet may leave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Gate {
    /// `enforce`: what cannot be encrypted is dropped. `audit`: it passes and is counted. `off`: everything passes in the clear, and is
    /// counted; dangerous.
    pub(crate) mode: GateMode,

    /// How the programs are attached: `tcx` (kernel 6.6 and later), `clsact`, or `auto` for the better one the kernel has.
    pub(crate) attach: GateAttach,

    /// Where programs and maps are pinned, on a BPF file system, so that they outlive the agent.
    pub(crate) pin_dir: PathBuf,

    /// The packet mark of encrypted packets on their way out, `value/mask`.
    pub(crate) tunnel_mark: Mark,

    /// The packet mark of pods that `exempt` lets out in the clear, `value/mask`.
    pub(crate) plain_mark: Mark,
}

/// What the gate does with a protected packet that cannot be encrypted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum GateMode {
    /// Drop and count.
    #[default]
    Enforce,
    /// Pass and count.
    Audit,
    /// Encrypt nothing, pass and count.
    Off,
}

/// How the gate's programs are attached to a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum GateAttach {
    /// The better one the kernel has.
    #[default]
    Auto,
    /// A tcx link, kernel 6.6 and later.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

/// Where a node learns who is in the mesh: exactly one of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Directory {
    /// A folder with one announcement per node. Whoever can write there decides who is in the mesh.
    File(DirectoryFile),
    /// The Node objects of a cluster. Its API server is the authority for names, addresses and pod prefixes.
    Kubernetes(DirectoryKubernetes),
}

/// A folder as the directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct DirectoryFile {
    /// The folder; all nodes see the same one, or copies of it.
    pub(crate) path: PathBuf,

    /// Whether this node writes its own announcement there. Set to false when something else distributes the files.
    #[serde(default = "yes")]
    pub(crate) publish: bool,
}

/// A cluster as the directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct DirectoryKubernetes {
    /// The file with the API server's address and our credentials. `null`: those of the pod's ServiceAccount.
    pub(crate) kubeconfig: Option<PathBuf>,

    /// The ConfigMap, in the namespace of the credentials, that names nodes and keys to be kept out: each line of each of its values is a
    /// node's name, a public key or a key's fingerprint, and a remark.
    pub(crate) deny_list: String,

    /// How long a watch may say nothing before it is opened anew. API servers send a sign of life every minute.
    pub(crate) watch_idle: Interval,
}

impl Default for DirectoryKubernetes {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            deny_list: "shroud-denied".to_owned(),
            watch_idle: Interval::from_secs(150),
        }
    }
}

/// The HTTP side: metrics and probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Http {
    /// The address and port of `/metrics`, `/livez` and `/readyz`; `null` for none. Whoever can connect may read, and learns the nodes'
    /// names and how much they send to each other.
    #[serde(deserialize_with = "value::listen")]
    pub(crate) listen: Option<SocketAddr>,
}

impl Default for Routing {
    fn default() -> Self {
        Self {
            mode: RoutingMode::default(),
            vni: Vni::new(21320).expect("within 24 bits"),
            vxlan_port: NonZeroU16::new(4789).expect("not zero"),
            geneve_port: NonZeroU16::new(6081).expect("not zero"),
            routable: false,
        }
    }
}

impl Routing {
    /// The format of this node's overlay packets of a kind.
    pub(crate) fn format(&self, kind: OverlayKind) -> OverlayFormat {
        OverlayFormat {
            kind,
            vni: self.vni,
            port: match kind {
                OverlayKind::Vxlan => self.vxlan_port,
                OverlayKind::Geneve => self.geneve_port,
            },
        }
    }
}

impl Default for Encrypt {
    fn default() -> Self {
        let ports = ["tcp/22", "tcp/53", "udp/53", "tcp/6443"];
        Self {
            scope: EncryptScope::All,
            opt_out: false,
            nodes: false,
            open_ports: ports
                .iter()
                .map(|port| port.parse().expect("a protocol and a port"))
                .collect(),
        }
    }
}

impl Default for Encryption {
    fn default() -> Self {
        Self {
            backend: EncryptionBackend::default(),
            device: "shroud0".to_owned(),
            listen_port: 51820,
            keepalive: Interval::from_secs(25),
        }
    }
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            rotate_every: Interval::from_secs(0),
            rotate_within: Interval::from_secs(86_400),
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            mode: GateMode::default(),
            attach: GateAttach::default(),
            pin_dir: PathBuf::from("/sys/fs/bpf/shroud"),
            tunnel_mark: Mark::new(0x1000, 0x1000).expect("a bit inside its mask"),
            plain_mark: Mark::new(0x2000, 0x2000).expect("a bit inside its mask"),
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: Some(SocketAddr::from(([127, 0, 0, 1], 21320))),
        }
    }
}

fn default_state_dir() -> PathBuf {
    PathBuf::from("/var/lib/shroud")
}

fn default_runtime_dir() -> PathBuf {
    PathBuf::from("/run/shroud")
}

fn default_resync() -> Interval {
    Interval::from_secs(3)
}

fn yes() -> bool {
    true
}

/// The host name, or `localhost` where it is no node name; [`Config::parse`] then still refuses nothing, since the name is printed.
fn host_name() -> NodeName {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy().to_lowercase();
    name.parse()
        .unwrap_or_else(|_| "localhost".parse().expect("a valid name"))
}

/// Why a configuration is refused: the file, the key, the value, and what would be right.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    file: PathBuf,
    /// Dotted path of the key, or empty when the file as a whole is wrong.
    key: String,
    /// The value as it stands in the file, where there is one.
    value: Option<String>,
    /// What is wrong and what would be right.
    reason: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        if !self.key.is_empty() {
            write!(f, "`{}`", self.key)?;
            if let Some(value) = &self.value {
                write!(f, " is {value}")?;
            }
            write!(f, ": ")?;
        }
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Refused {}

/// The shortest time that a key may be in force: several times what a change takes.
const SHORTEST_KEY: Duration = Duration::from_secs(600);

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// [`Refused`], naming file, key, value and remedy.
    pub(crate) fn load(file: &Path) -> Result<Self, Refused> {
        let text = std::fs::read_to_string(file).map_err(|error| Refused {
            file: file.to_owned(),
            key: String::new(),
            value: None,
            reason: format!("cannot be read: {error}; give a YAML file (see docs/shroud.example.yaml)"),
        })?;
        Self::parse(file, &text)
    }

    /// Checks a configuration's text; `file` only names it in refusals.
    ///
    /// # Errors
    /// [`Refused`], naming file, key, value and remedy.
    pub(crate) fn parse(file: &Path, text: &str) -> Result<Self, Refused> {
        let refuse = |key: &str, value: Option<String>, reason: String| Refused {
            file: file.to_owned(),
            key: key.to_owned(),
            value,
            reason,
        };
        // YAML 1.1 reads a bare `off` as false; here it is the name of a mode.
        let options = serde_saphyr::options! { strict_booleans: true };
        let document: serde_json::Value = serde_saphyr::from_str_with_options(text, options)
            .map_err(|error| refuse("", None, format!("is not YAML: {}", first_line(&error.to_string()))))?;
        if !document.is_object() {
            return Err(refuse(
                "",
                None,
                "is not a mapping of keys to values (see docs/shroud.example.yaml)".to_owned(),
            ));
        }
        let config: Self = serde_path_to_error::deserialize(document.clone()).map_err(|error| {
            let key = error.path().to_string();
            let key = if key == "." { String::new() } else { key };
            let value = value_at(&document, &key)
                .filter(|value| !value.is_object())
                .map(ToString::to_string);
            refuse(&key, value, error.into_inner().to_string())
        })?;
        config
            .check()
            .map_err(|(key, value, reason)| refuse(key, Some(value), reason))?;
        Ok(config)
    }

    /// What the types alone cannot say: how the knobs fit together.
    fn check(&self) -> Result<(), (&'static str, String, String)> {
        if self.pod_prefixes.is_empty() && matches!(self.directory, Directory::File(_)) {
            return Err((
                "podPrefixes",
                "[]".to_owned(),
                "name at least one range for this node's pods".to_owned(),
            ));
        }
        if matches!(self.directory, Directory::File(_)) {
            let reason = "goes by labels, which a folder does not have; use the directory `kubernetes`";
            if self.encrypt.scope != EncryptScope::All {
                return Err(("encrypt.scope", "cross-zone".to_owned(), reason.to_owned()));
            }
            if self.encrypt.opt_out {
                let reason = format!("{reason}, or name the pods' addresses in `exempt`");
                return Err(("encrypt.optOut", "true".to_owned(), reason));
            }
        }
        for prefix in &self.pod_prefixes {
            if !self.protected.iter().any(|range| range.covers(*prefix)) {
                let reason =
                    "lies outside `protected`, so its traffic would be in the clear; add the range there".to_owned();
                return Err(("podPrefixes", prefix.to_string(), reason));
            }
        }
        for range in &self.protected {
            if range.length() == 0 {
                let reason =
                    "is every address there is, the underlay's too; name the pod ranges of the mesh".to_owned();
                return Err(("protected", range.to_string(), reason));
            }
        }
        for range in &self.exempt {
            if !self.protected.iter().any(|protected| protected.covers(*range)) {
                let reason = "lies outside `protected`, where nothing needs an exemption; remove it".to_owned();
                return Err(("exempt", range.to_string(), reason));
            }
        }
        let device = &self.encryption.device;
        let well_formed = device.starts_with("shroud")
            && device.len() <= 13
            && device
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
        if !well_formed {
            let reason = "must begin with `shroud`, by which it is known as ours, and have at most 13 letters, digits, '-' or '.'";
            return Err(("encryption.device", device.clone(), reason.to_owned()));
        }
        let ports = self.encryption.listen_port..=self.encryption.listen_port.saturating_add(3);
        if self.encryption.listen_port == 0 || self.encryption.listen_port > u16::MAX - 3 {
            let reason = "is no port that a peer could be told, with three more behind it; give 1 to 65532".to_owned();
            return Err(("encryption.listenPort", self.encryption.listen_port.to_string(), reason));
        }
        if self.encryption.keepalive.as_secs() > u64::from(u16::MAX) {
            let reason = "is longer than WireGuard can count; give at most 65535s".to_owned();
            return Err(("encryption.keepalive", self.encryption.keepalive.to_string(), reason));
        }
        for (key, port) in [
            ("routing.vxlanPort", self.routing.vxlan_port),
            ("routing.genevePort", self.routing.geneve_port),
        ] {
            if ports.contains(&port.get()) {
                let reason =
                    "is the tunnel's port (`encryption.listenPort`), or one of the three behind it; give each its own"
                        .to_owned();
                return Err((key, port.to_string(), reason));
            }
        }
        if !self.keys.rotate_every.is_zero() && *self.keys.rotate_every < SHORTEST_KEY {
            let reason = "is too short for all peers to follow; give at least 10m, or 0 for never".to_owned();
            return Err(("keys.rotateEvery", self.keys.rotate_every.to_string(), reason));
        }
        if self.routing.vxlan_port == self.routing.geneve_port {
            let reason = "is also `routing.vxlanPort`; during a change of mode both are in use".to_owned();
            return Err(("routing.genevePort", self.routing.geneve_port.to_string(), reason));
        }
        if let Directory::Kubernetes(DirectoryKubernetes { watch_idle, .. }) = &self.directory
            && watch_idle.is_zero()
        {
            let reason = "would open the watch anew all the time; give more than the minute between two signs of life"
                .to_owned();
            return Err(("directory.kubernetes.watchIdle", watch_idle.to_string(), reason));
        }
        if let Some(flaw) = self.cni.flaw() {
            return Err(("cni.name", self.cni.name.clone(), flaw.to_owned()));
        }
        if self.encrypt.open_ports.len() > MAX_OPEN_PORTS {
            let reason = format!("is more than the gate looks for; name at most {MAX_OPEN_PORTS}");
            return Err((
                "encrypt.openPorts",
                format!("{} ports", self.encrypt.open_ports.len()),
                reason,
            ));
        }
        if self.resync.is_zero() || self.resync.as_secs() > 300 {
            return Err((
                "resync",
                self.resync.to_string(),
                "give 1ms to 300s; 3s repairs drift within 5 s".to_owned(),
            ));
        }
        let Gate {
            tunnel_mark,
            plain_mark,
            ..
        } = self.gate;
        if tunnel_mark.overlaps(plain_mark) {
            let reason = format!("shares bits with `gate.tunnelMark` {tunnel_mark}; each needs bits of its own");
            return Err(("gate.plainMark", plain_mark.to_string(), reason));
        }
        for (key, mark) in [("gate.tunnelMark", tunnel_mark), ("gate.plainMark", plain_mark)] {
            let conflicts = mark.conflicts();
            if !conflicts.is_empty() {
                let reason = format!("uses mark bits of {}; take bits from 0x30ff", conflicts.join(" and "));
                return Err((key, mark.to_string(), reason));
            }
        }
        Ok(())
    }

    /// The status socket's path.
    pub(crate) fn socket(&self) -> PathBuf {
        self.runtime_dir.join("shroud.sock")
    }
}

fn value_at<'a>(document: &'a serde_json::Value, dotted: &str) -> Option<&'a serde_json::Value> {
    let pointer: String = dotted
        .split(['.', '['])
        .map(|part| format!("/{}", part.trim_end_matches(']')))
        .collect();
    document.pointer(&pointer)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "
podPrefixes: [10.244.1.0/24]
protected: [10.244.0.0/16]
directory: { file: { path: /etc/shroud/nodes } }
";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("shroud.yaml"), text).map_err(|refused| refused.to_string())
    }

    fn refusal(changed: &str) -> String {
        let key = changed.split(':').next().unwrap();
        let kept: String = SMALLEST
            .lines()
            .filter(|line| !line.starts_with(key))
            .map(|line| format!("{line}\n"))
            .collect();
        parse(&format!("{kept}\n{changed}")).unwrap_err()
    }

    #[test]
    fn the_example_file_shows_every_knob_at_its_default() {
        let example = include_str!("../../docs/shroud.example.yaml");

        let shown = Config::parse(Path::new("docs/shroud.example.yaml"), example).unwrap();

        let smallest = "
node: node-1
podPrefixes: [10.244.1.0/24, 'fd00:10:244:1::/64']
protected: [10.244.0.0/16, 'fd00:10:244::/48']
directory: { file: { path: /etc/shroud/nodes } }
";
        assert_eq!(shown, parse(smallest).unwrap());
        let every_knob = serde_json::to_value(&shown).unwrap();
        let written: serde_json::Value = serde_saphyr::from_str(example).unwrap();
        assert_eq!(keys(&every_knob), keys(&written), "the example leaves a knob out");
    }

    fn keys(value: &serde_json::Value) -> BTreeSet<String> {
        let Some(map) = value.as_object() else {
            return BTreeSet::new();
        };
        map.iter()
            .flat_map(|(key, value)| {
                keys(value)
                    .into_iter()
                    .map(move |below| format!("{key}.{below}"))
                    .chain([key.clone()])
            })
            .collect()
    }

    #[test]
    fn in_kubernetes_the_smallest_configuration_names_the_protected_ranges() {
        let config = parse("protected: [10.244.0.0/16]\ndirectory: { kubernetes: {} }").unwrap();

        assert_eq!(config.pod_prefixes, BTreeSet::new());
        assert_eq!(config.directory, Directory::Kubernetes(DirectoryKubernetes::default()));
        assert_eq!(parse(&serde_saphyr::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn a_directory_is_one_thing() {
        let text = refusal("directory: { file: { path: /nodes }, kubernetes: {} }");

        assert_eq!(
            text,
            "shroud.yaml: `directory`: invalid value: map, expected map with a single key"
        );
    }

    #[test]
    fn the_effective_configuration_reads_back_as_itself() {
        let config = parse(SMALLEST).unwrap();

        assert_eq!(parse(&serde_saphyr::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_known_ones() {
        let text = refusal("gate: { mod: audit }");

        assert!(
            text.starts_with("shroud.yaml: `gate.mod` is \"audit\": unknown field `mod`, expected one of `mode`"),
            "{text}"
        );
    }

    #[test]
    fn a_bad_value_is_refused_with_the_good_ones() {
        let cases = [
            (
                "gate: { mode: on }",
                "`gate.mode` is \"on\": unknown variant `on`, expected one of `enforce`, `audit`, `off`",
            ),
            (
                "podPrefixes: [10.244.1.7/24]",
                "`podPrefixes[0]` is \"10.244.1.7/24\": 10.244.1.7/24 has bits set behind its length; write 10.244.1.0/24",
            ),
            (
                "podPrefixes: [10.9.0.0/24]",
                "`podPrefixes` is 10.9.0.0/24: lies outside `protected`",
            ),
            (
                "protected: [0.0.0.0/0]",
                "`protected` is 0.0.0.0/0: is every address there is",
            ),
            (
                "exempt: [10.1.0.1/32]",
                "`exempt` is 10.1.0.1/32: lies outside `protected`",
            ),
            (
                "node: Node_1",
                "`node` is \"Node_1\": a node name is 1 to 253 lower-case letters",
            ),
            (
                "uplinks: eth0",
                "`uplinks` is \"eth0\": invalid value: string \"eth0\", expected `auto` or a list",
            ),
            (
                "encryption: { device: wg0 }",
                "`encryption.device` is wg0: must begin with `shroud`",
            ),
            (
                "encryption: { listenPort: 0 }",
                "`encryption.listenPort` is 0: is no port",
            ),
            (
                "encryption: { listenPort: 70000 }",
                "`encryption.listenPort` is 70000: invalid value: integer `70000`, expected u16",
            ),
            (
                "encryption: { keepalive: soon }",
                "`encryption.keepalive` is \"soon\": \"soon\" is not a duration; write a number and a unit, such as 500ms, 25s, 5m or 1h",
            ),
            (
                "routing: { mode: gre }",
                "`routing.mode` is \"gre\": unknown variant `gre`, expected one of `native`, `vxlan`, `geneve`, `auto`",
            ),
            (
                "routing: { vni: 0 }",
                "`routing.vni` is 0: VNI 0 is outside 1..=16777215",
            ),
            (
                "routing: { vxlanPort: 6081 }",
                "`routing.genevePort` is 6081: is also `routing.vxlanPort`",
            ),
            (
                "routing: { genevePort: 51820 }",
                "`routing.genevePort` is 51820: is the tunnel's port",
            ),
            (
                "encrypt: { scope: zone }",
                "`encrypt.scope` is \"zone\": unknown variant `zone`, expected `all` or `cross-zone`",
            ),
            (
                "encrypt: { scope: cross-zone }",
                "`encrypt.scope` is cross-zone: goes by labels, which a folder does not have; use the directory `kubernetes`",
            ),
            (
                "encrypt: { optOut: true }",
                "`encrypt.optOut` is true: goes by labels, which a folder does not have; use the directory `kubernetes`, or name",
            ),
            ("encrypt: { openPorts: [http] }", "`encrypt.openPorts[0]` is \"http\""),
            (
                "cni: { name: shroud.conf }",
                "`cni.name` is shroud.conf: is not the name of a configuration list; give a file name that ends in .conflist",
            ),
            (
                "http: { listen: localhost }",
                "`http.listen` is \"localhost\": write an address and a port, such as 127.0.0.1:21320 or [::1]:21320, or null for none",
            ),
            (
                "http: { listen: 21320 }",
                "`http.listen` is 21320: write an address and a port",
            ),
            (
                "http: { listen: '127.0.0.1:0' }",
                "`http.listen` is \"127.0.0.1:0\": write an address and a port",
            ),
            ("resync: 0s", "`resync` is 0s: give 1ms to 300s"),
            (
                "gate: { tunnelMark: 0x4000/0x4000 }",
                "`gate.tunnelMark` is 0x4000/0x4000: uses mark bits of kube-proxy",
            ),
            (
                "gate: { plainMark: 0x1000/0x1000 }",
                "`gate.plainMark` is 0x1000/0x1000: shares bits with `gate.tunnelMark`",
            ),
            (
                "gate: { plainMark: 7 }",
                "`gate.plainMark` is 7: invalid type: integer `7`, expected a string",
            ),
            ("directory: { file: {} }", "`directory.file`: missing field `path`"),
        ];
        for (changed, expected) in cases {
            let text = refusal(changed);
            assert!(
                text.starts_with(&format!("shroud.yaml: {expected}")),
                "{changed}\n  gave  {text}\n  meant {expected}"
            );
        }
    }

    #[test]
    fn probes_are_answered_on_loopback_where_it_says_or_not_at_all() {
        let listen = |more: &str| parse(&format!("{SMALLEST}{more}")).unwrap().http.listen;

        assert_eq!(listen(""), Some("127.0.0.1:21320".parse().unwrap()));
        assert_eq!(listen("http: { listen: '[::]:80' }"), Some("[::]:80".parse().unwrap()));
        assert_eq!(listen("http: { listen: null }"), None);
    }

    #[test]
    fn a_file_that_is_not_a_mapping_is_refused() {
        assert!(parse("").unwrap_err().contains("is not a mapping"));
        assert!(parse("[1, 2]").unwrap_err().contains("is not a mapping"));
        assert!(parse("a: [").unwrap_err().contains("is not YAML"));
        assert!(
            parse(&format!("{SMALLEST}\nresync: 3s\nresync: 4s"))
                .unwrap_err()
                .contains("resync")
        );
    }

    #[test]
    fn a_missing_file_is_refused_by_name() {
        let refused = Config::load(Path::new("/nonexistent/shroud.yaml"))
            .unwrap_err()
            .to_string();

        assert!(
            refused.starts_with("/nonexistent/shroud.yaml: cannot be read: No such file"),
            "{refused}"
        );
    }
}
