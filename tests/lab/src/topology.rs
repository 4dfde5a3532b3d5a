//! Builds the lab: an underlay with a bridge, nodes on it, pods behind the nodes, and a host on the "internet".
//!
//! Pods are plugged the way Calico and ptp do it: a veth per pod, a host route per pod on the node, and a gateway address
//! that exists only for the neighbour question (169.254.1.1 by proxy ARP, fe80::1 on the node's end). Forwarding is off in
//! every node: the daemon under test must switch it on, or [`Lab::route_plainly`] does in a lab without daemons.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::eventually::eventually;
use crate::marker::Markers;
use crate::netns::Netns;
use crate::remains;

/// Where the underlay's router answers.
pub const GATEWAY: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(172, 18, 0, 254),
    Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 0xfe),
);

/// The host that stands for the rest of the world.
pub const INTERNET: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(192, 0, 2, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
);

/// Labs built by this process so far.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order people expect.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];
}

/// One family of addresses, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Dual stack.
    Both,
}

impl Families {
    /// Whether that one is among them.
    pub fn has(self, family: Family) -> bool {
        match self {
            Families::V4 => family == Family::V4,
            Families::V6 => family == Family::V6,
            Families::Both => true,
        }
    }

    /// Each of them, IPv4 first.
    pub fn each(self) -> impl Iterator<Item = Family> {
        Family::BOTH.into_iter().filter(move |family| self.has(*family))
    }

    /// Of a value per family, the values of those that are among them.
    fn pick<T, const N: usize>(self, values: [(Family, T); N]) -> impl Iterator<Item = T> {
        values
            .into_iter()
            .filter(move |(family, _)| self.has(*family))
            .map(|(_, value)| value)
    }
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Topology {
    name: String,
    first: u8,
    nodes: u8,
    pods: u8,
    underlay: Families,
    pod_families: Families,
}

/// Something with a namespace and an address per family: a pod, a node, the internet.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its name in reports, e.g. `a0` for the first pod of node `a`.
    pub name: String,
    /// Where it lives.
    pub netns: Netns,
    /// Its IPv4 address; not in use where [`Topology`] leaves that family out.
    pub v4: Ipv4Addr,
    /// Its IPv6 address; not in use where [`Topology`] leaves that family out.
    pub v6: Ipv6Addr,
}

/// A node, its pods, and its corner of the file system.
#[derive(Clone, Debug)]
pub struct Node {
    /// The node itself, with its underlay addresses.
    pub host: Host,
    /// Its pods.
    pub pods: Vec<Host>,
    /// The IPv4 pod prefix it owns.
    pub prefix4: Ipv4Net,
    /// The IPv6 pod prefix it owns.
    pub prefix6: Ipv6Net,
    /// Its bridge port in the underlay namespace, where it is captured.
    pub port: String,
    /// The families in which it has addresses itself.
    pub underlay_families: Families,
    /// The families its pods have.
    pub pod_families: Families,
    /// The encryption device its agent shall make; unique on the machine, for its control socket lives in a shared folder. There may be more
    /// while keys change, whose names have something behind this one.
    pub device: String,
    /// Folder for its state, runtime files, configuration and log.
    pub folder: PathBuf,
    /// Where its agent pins BPF objects, on the lab's own BPF file system.
    pub pins: PathBuf,
    /// The folder of announcements that all nodes share.
    pub directory: PathBuf,
}

/// A built lab; dropping it removes everything, with every process inside.
#[derive(Debug)]
pub struct Lab {
    /// What it is for.
    pub name: String,
    /// The nodes, `a` first.
    pub nodes: Vec<Node>,
    /// The namespace with the bridge, which is also the router to the internet.
    pub underlay: Netns,
    /// The host behind that router.
    pub internet: Host,
    /// The markers of all traffic sent in this lab.
    pub markers: Markers,
    /// Its folder; holds the BPF file system, the announcements and a folder per node.
    pub folder: PathBuf,
    prefix: String,
    number: u32,
    underlay_families: Families,
    pod_families: Families,
}

impl Topology {
    /// Three nodes with two pods each, until told otherwise.
    pub fn new(name: &str) -> Topology {
        Topology {
            name: name.to_owned(),
            first: 1,
            nodes: 3,
            pods: 2,
            underlay: Families::Both,
            pod_families: Families::Both,
        }
    }

    /// Sets how many nodes there are (1 to 26, called `a` to `z`).
    pub fn nodes(self, nodes: u8) -> Topology {
        Topology { nodes, ..self }
    }

    /// Sets which node is the first, 1 for `a` until told otherwise: two labs whose underlays are joined share no node.
    pub fn first(self, first: u8) -> Topology {
        Topology { first, ..self }
    }

    /// Sets how many pods each node has (up to 200).
    pub fn pods(self, pods: u8) -> Topology {
        Topology { pods, ..self }
    }

    /// Dual stack until told otherwise: the families in which the nodes have addresses.
    pub fn underlay(self, underlay: Families) -> Topology {
        Topology { underlay, ..self }
    }

    /// Dual stack until told otherwise: the families in which the pods have addresses.
    pub fn pod_families(self, pod_families: Families) -> Topology {
        Topology { pod_families, ..self }
    }

    /// Sweeps what dead labs left, then builds.
    pub fn build(self) -> Result<Lab> {
        let last = self.first.saturating_add(self.nodes).saturating_sub(1);
        ensure!(
            self.first >= 1 && (self.first..=26).contains(&last),
            "a lab has 1 to 26 nodes, not {} from number {} on",
            self.nodes,
            self.first
        );
        ensure!(self.pods <= 200, "a node has up to 200 pods, not {}", self.pods);
        for error in remains::sweep() {
            remains::complain(&error);
        }

        let mut lab = Lab::empty(&self)?;
        for index in self.first..=last {
            let node = lab.build_node(index)?;
            lab.nodes.push(node);
            for _ in 0..self.pods {
                lab.add_pod(usize::from(index - self.first))?;
            }
        }
        Ok(lab)
    }
}

impl Lab {
    /// Three nodes with two pods each.
    pub fn new(name: &str) -> Result<Lab> {
        Topology::new(name).build()
    }

    /// The underlay and the internet, no node yet.
    fn empty(topology: &Topology) -> Result<Lab> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let prefix = format!("{}{pid}-{number}-", remains::NAMESPACE_PREFIX);
        let folder = PathBuf::from(format!("{}{pid}-{number}", remains::FOLDER_PREFIX));
        let underlay = Netns::new(&format!("{prefix}underlay"))?;
        let internet = Netns::new(&format!("{prefix}internet"))?;
        let internet = Host {
            name: "internet".into(),
            netns: internet,
            v4: INTERNET.0,
            v6: INTERNET.1,
        };
        // From here on, an early return removes what was built.
        let lab = Lab {
            name: topology.name.clone(),
            nodes: Vec::new(),
            underlay,
            internet,
            markers: Markers::new()?,
            folder,
            prefix,
            number,
            underlay_families: topology.underlay,
            pod_families: topology.pod_families,
        };

        remains::register_folder(&lab.folder);
        for folder in [lab.directory(), lab.bpf()] {
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        rustix::mount::mount("bpf", lab.bpf(), "bpf", rustix::mount::MountFlags::empty(), None)
            .with_context(|| format!("mount a BPF file system on {}", lab.bpf().display()))?;

        let (v4, v6) = GATEWAY;
        lab.underlay.batch(&format!(
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             link set br0 up\n\
             address add {v4}/24 dev br0\n\
             address add {v6}/64 dev br0 nodad\n\
             link add internet type veth peer name eth0 netns {}\n\
             link set internet up\n\
             address add 192.0.2.254/24 dev internet\n\
             address add 2001:db8::fe/64 dev internet nodad\n",
            lab.internet.netns.name(),
        ))?;
        lab.internet.netns.batch(&format!(
            "link set eth0 up\n\
             address add {}/24 dev eth0\n\
             address add {}/64 dev eth0 nodad\n\
             route add default via 192.0.2.254\n\
             route add ::/0 via 2001:db8::fe\n",
            INTERNET.0, INTERNET.1,
        ))?;
        for (key, value) in [
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            // The nodes share the bridge with the router; a redirect would teach them a path the test did not ask for.
            ("net.ipv4.conf.all.send_redirects", "0"),
            ("net.ipv4.conf.br0.send_redirects", "0"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.br0.rp_filter", "0"),
        ] {
            lab.underlay.set_sysctl(key, value)?;
        }
        Ok(lab)
    }

    fn build_node(&self, index: u8) -> Result<Node> {
        let name = char::from(b'a' + index - 1).to_string();
        let port = format!("port-{name}");
        let netns = Netns::new(&format!("{}{name}", self.prefix))?;
        // Strict reverse path checks, as some distributions have them: the daemon must cope on its own devices.
        netns.set_sysctl("net.ipv4.conf.all.rp_filter", "0")?;
        netns.set_sysctl("net.ipv4.conf.default.rp_filter", "1")?;
        let node = Node {
            host: Host {
                name: name.clone(),
                netns,
                v4: Ipv4Addr::new(172, 18, 0, index),
                v6: Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, index.into()),
            },
            pods: Vec::new(),
            prefix4: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, index, 0), 24),
            // Written in hexadecimal, node 10 is `fd00:10:244:a::/64`.
            prefix6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, index.into(), 0, 0, 0, 0), 64),
            underlay_families: self.underlay_families,
            pod_families: self.pod_families,
            device: format!(
                "shroud{:0>3}{}{name}",
                base36(std::process::id() % 46_656),
                base36(self.number % 36)
            ),
            folder: self.folder.join(&name),
            pins: self.bpf().join(&name),
            directory: self.directory(),
            port,
        };

        remains::register_device(&node.device);
        fs::create_dir_all(&node.folder).with_context(|| format!("create {}", node.folder.display()))?;
        let mut devices = fs::read_to_string(self.folder.join("devices")).unwrap_or_default();
        writeln!(devices, "{}", node.device)?;
        fs::write(self.folder.join("devices"), devices).context("note the device for the next sweep")?;

        self.underlay.batch(&format!(
            "link add {port} type veth peer name eth0 netns {netns}\n\
             link set {port} master br0\n\
             link set {port} up\n",
            port = node.port,
            netns = node.host.netns.name(),
        ))?;
        let mut commands = String::from("link set eth0 up\n");
        commands.extend(self.underlay_families.pick([
            (
                Family::V4,
                format!(
                    "address add {}/24 dev eth0\nroute add default via {} dev eth0\n",
                    node.host.v4, GATEWAY.0
                ),
            ),
            (
                Family::V6,
                format!(
                    "address add {}/64 dev eth0 nodad\nroute add ::/0 via {} dev eth0\n",
                    node.host.v6, GATEWAY.1
                ),
            ),
        ]));
        node.host.netns.batch(&commands)?;
        // The way back for pods that talk to the internet with their own address.
        let back: String = self
            .underlay_families
            .pick([
                (Family::V4, format!("route add {} via {}\n", node.prefix4, node.host.v4)),
                (Family::V6, format!("route add {} via {}\n", node.prefix6, node.host.v6)),
            ])
            .collect();
        self.underlay.batch(&back)?;
        Ok(node)
    }

    /// Plugs one more pod into the node with this index and returns it.
    pub fn add_pod(&mut self, node: usize) -> Result<Host> {
        let node = self
            .nodes
            .get_mut(node)
            .with_context(|| format!("node number {node}"))?;
        let index = u8::try_from(node.pods.len()).context("too many pods")?;
        let device = format!("pod{index}");
        let [a, b, c, _] = node.prefix4.addr().octets();
        let mut segments = node.prefix6.addr().segments();
        // Reads the same in both families: 10.244.1.10 and fd00:10:244:1::10.
        let last = 10 + index;
        segments[7] = u16::from_str_radix(&last.to_string(), 16).context("decimal digits are hexadecimal digits")?;
        let pod = Host {
            name: format!("{}{index}", node.host.name),
            netns: Netns::new(&format!("{}{}-p{index}", self.prefix, node.host.name))?,
            v4: Ipv4Addr::new(a, b, c, last),
            v6: Ipv6Addr::from(segments),
        };

        let mut commands = format!(
            "link add {device} type veth peer name eth0 netns {netns}\n\
             link set {device} up\n\
             address add fe80::1/64 dev {device} nodad\n",
            netns = pod.netns.name(),
        );
        commands.extend(self.pod_families.pick([
            (Family::V4, format!("route add {}/32 dev {device} scope link\n", pod.v4)),
            (Family::V6, format!("route add {}/128 dev {device}\n", pod.v6)),
        ]));
        if !self.underlay_families.has(Family::V4) {
            // A kernel answers for others only where it has a route to them, and without IPv4 on the underlay there is no default route.
            commands.push_str(&format!("address add 169.254.1.1/32 dev {device} scope link\n"));
        }
        node.host.netns.batch(&commands)?;
        node.host
            .netns
            .set_sysctl(&format!("net.ipv4.conf.{device}.proxy_arp"), "1")?;
        // A proxied answer waits up to 0.8 s otherwise.
        node.host
            .netns
            .set_sysctl(&format!("net.ipv4.neigh.{device}.proxy_delay"), "0")?;
        let mut commands = String::from("link set eth0 up\n");
        commands.extend(self.pod_families.pick([
            (
                Family::V4,
                format!(
                    "address add {}/32 dev eth0\n\
                     route add 169.254.1.1 dev eth0 scope link\n\
                     route add default via 169.254.1.1 dev eth0\n",
                    pod.v4
                ),
            ),
            (
                Family::V6,
                format!(
                    "address add {}/128 dev eth0 nodad\nroute add ::/0 via fe80::1 dev eth0\n",
                    pod.v6
                ),
            ),
        ]));
        pod.netns.batch(&commands)?;
        node.pods.push(pod.clone());
        Ok(pod)
    }

    /// Does what a daemon without encryption would: forwarding on, and a route to each other node's pods.
    pub fn route_plainly(&self) -> Result<()> {
        for node in &self.nodes {
            node.host.netns.set_sysctl("net.ipv4.ip_forward", "1")?;
            node.host.netns.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
            let mut routes = String::new();
            for peer in self.nodes.iter().filter(|peer| peer.host.name != node.host.name) {
                writeln!(routes, "route add {} via {} dev eth0", peer.prefix4, peer.host.v4)?;
                writeln!(routes, "route add {} via {} dev eth0", peer.prefix6, peer.host.v6)?;
            }
            node.host.netns.batch(&routes)?;
        }
        Ok(())
    }

    /// The node called `name`; panics when there is none, for that is a mistake in the test.
    pub fn node(&self, name: &str) -> &Node {
        self.nodes
            .iter()
            .find(|node| node.host.name == name)
            .unwrap_or_else(|| panic!("the lab has no node {name:?}"))
    }

    /// The pod called `name`, e.g. `a0`; panics when there is none, for that is a mistake in the test.
    pub fn pod(&self, name: &str) -> &Host {
        self.pods()
            .find(|pod| pod.name == name)
            .unwrap_or_else(|| panic!("the lab has no pod {name:?}"))
    }

    /// All pods of all nodes.
    pub fn pods(&self) -> impl Iterator<Item = &Host> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// The ranges all pods live in; nothing of them may be seen on the underlay.
    pub fn protected(&self) -> Vec<IpNet> {
        vec![
            Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16).into(),
            Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48).into(),
        ]
    }

    /// The folder of announcements that all nodes share.
    pub fn directory(&self) -> PathBuf {
        self.folder.join("directory")
    }

    /// The families in which nodes have addresses.
    pub fn underlay_families(&self) -> Families {
        self.underlay_families
    }

    /// The lab's own BPF file system.
    pub fn bpf(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    /// As [`eventually`], with a dump of every node in the error.
    pub fn eventually<T>(&self, what: &str, within: Duration, probe: impl FnMut() -> Result<T, String>) -> Result<T> {
        eventually(what, within, probe).map_err(|error| error.context(self.dump()))
    }

    /// All there is to see in every node, as text; what fails to be looked at says so in its place.
    pub fn dump(&self) -> String {
        thread::scope(|scope| {
            let dumps: Vec<_> = self.nodes.iter().map(|node| scope.spawn(|| node.dump())).collect();
            dumps
                .into_iter()
                .map(|dump| dump.join().unwrap_or_else(|_| "(the dump panicked)\n".into()))
                .collect()
        })
    }

    /// Removes everything now, and says what could not be removed.
    pub fn remove(mut self) -> Vec<String> {
        self.take_down()
    }

    fn take_down(&mut self) -> Vec<String> {
        let names: Vec<String> = self
            .nodes
            .iter()
            .flat_map(|node| std::iter::once(&node.host).chain(&node.pods))
            .chain([&self.internet])
            .map(|host| host.netns.name().to_owned())
            .chain([self.underlay.name().to_owned()])
            .collect();
        let mut errors = remains::remove_namespaces(&names);
        for node in &self.nodes {
            errors.extend(remains::remove_sockets(&node.device));
        }
        errors.extend(remains::remove_folder(&self.folder));
        errors
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for error in self.take_down() {
            remains::complain(&error);
        }
    }
}

impl Host {
    /// Its address in a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

impl Node {
    /// The pod prefixes it owns, of the families its pods have.
    pub fn pod_prefixes(&self) -> Vec<IpNet> {
        let prefixes = [
            (Family::V4, IpNet::from(self.prefix4)),
            (Family::V6, IpNet::from(self.prefix6)),
        ];
        self.pod_families.pick(prefixes).collect()
    }

    /// Where the agent keeps its key.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Where the agent keeps its sockets.
    pub fn runtime(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Where the agent's output goes.
    pub fn log(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    /// The last lines of the agent's output.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log(), lines)
    }

    /// All there is to see in this node, as text.
    pub fn dump(&self) -> String {
        let mut text = format!("\n===== node {} ({}) =====\n", self.host.name, self.host.netns.name());
        for command in [
            "ip -s -d link",
            "ip address",
            "ip route show table all",
            "ip -6 route show table all",
            "ip rule",
            "ip -6 rule",
            "ip neighbour",
            "tc filter show dev eth0 ingress",
            "tc filter show dev eth0 egress",
            "bpftool net",
            "wg show",
        ] {
            let mut words = command.split(' ');
            let program = words.next().unwrap_or_default();
            let output = match self.host.netns.exec(program, &words.collect::<Vec<_>>()) {
                Ok(output) => output.stdout + &output.stderr,
                Err(error) => format!("{error:#}\n"),
            };
            text.push_str(&format!("--- {command}\n{output}"));
        }
        text.push_str(&format!("--- {}\n{}\n", self.log().display(), self.log_tail(40)));
        text
    }
}

/// The last lines of a file, or why it cannot be read.
fn tail(path: &Path, lines: usize) -> String {
    match fs::read_to_string(path) {
        Ok(text) => {
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({error})"),
    }
}

/// Short spelling of a process id: a device name has 15 characters.
fn base36(mut number: u32) -> String {
    let mut digits = Vec::new();
    while number > 0 || digits.is_empty() {
        digits.push(char::from_digit(number % 36, 36).unwrap_or('0'));
        number /= 36;
    }
    digits.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_device_name_fits_an_interface_name() {
        // 4194304 is the largest pid_max of a 64-bit kernel.
        assert_eq!(format!("shroud{}-{}z", base36(4_194_304), 99), "shroud2hwcg-99z");
        assert!("shroud2hwcg-99z".len() <= 15);
    }
}
