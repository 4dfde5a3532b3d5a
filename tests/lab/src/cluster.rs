//! A lab whose nodes are in a Kubernetes cluster: an API server on the underlay's router, a Node object for each node, and credentials for
//! each agent, as a pod on that node would have them.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};
use shroud_apiserver::{ApiServer, Exec, Executed, Identity, Options};

use crate::agent::{self, AgentOptions, LISTEN_PORT};
use crate::frame::Allowed;
use crate::topology::{Families, Family, GATEWAY, Host, Lab, Node};

/// The port of the API server, as everywhere.
const PORT: u16 = 6443;
/// TCP's number as an IP protocol.
const TCP: u8 = 6;
/// Where the agents live, and their deny list.
pub const NAMESPACE: &str = "shroud-system";
/// The ConfigMap that keeps nodes and keys out.
pub const DENY_LIST: &str = "shroud-denied";
/// The namespace of the pods.
pub const PODS: &str = "pods";
/// The label with a node's zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";
/// The annotation by which nodes announce themselves.
pub const ANNOTATION: &str = "shroud.dev/node";

/// How long an agent's watch may say nothing: tests do not wait for minutes.
const WATCH_IDLE: &str = "5s";

/// The cluster of a lab. Dropping it stops the API server.
#[derive(Debug)]
pub struct Cluster {
    /// The API server, to play everybody else in the cluster with, and to make go wrong.
    pub server: ApiServer,
    folder: PathBuf,
}

impl Cluster {
    /// Starts an API server in the lab's underlay, with a Node object for each node; nobody has announced anything.
    pub fn start(lab: &Lab, options: Options) -> Result<Cluster> {
        let address = match lab.underlay_families() {
            Families::V4 | Families::Both => GATEWAY.0.into(),
            Families::V6 => GATEWAY.1.into(),
        };
        let socket = lab.underlay.run(|| {
            let address = SocketAddr::new(address, PORT);
            TcpListener::bind(address).with_context(|| format!("listen on {address} in the underlay"))
        })?;
        let cluster = Cluster {
            server: ApiServer::start(vec![socket], options)?,
            folder: lab.folder.join("cluster"),
        };
        fs::create_dir_all(&cluster.folder).with_context(|| format!("create {}", cluster.folder.display()))?;
        for node in &lab.nodes {
            cluster.join(node)?;
        }
        let admin = cluster.server.kubeconfig(&Identity::Admin);
        fs::write(cluster.admin(), admin).with_context(|| format!("write {}", cluster.admin().display()))?;
        Ok(cluster)
    }

    /// Makes the Node object of a node, as its kubelet and the controllers do, and the credentials of its agent.
    pub fn join(&self, node: &Node) -> Result<()> {
        self.server.put(node_object(node))?;
        self.renew_credentials(node)
    }

    /// Writes the authority and the token that are good now to where the node's agent reads them.
    pub fn renew_credentials(&self, node: &Node) -> Result<()> {
        let folder = self.folder.join(&node.host.name);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let identity = Identity::agent(&node.host.name);
        let kubeconfig = self.server.kubeconfig_in(&identity, &folder)?;
        let file = self.kubeconfig(node);
        fs::write(&file, kubeconfig).with_context(|| format!("write {}", file.display()))
    }

    /// The kubeconfig of somebody who may do everything.
    pub fn admin(&self) -> PathBuf {
        self.folder.join("admin.kubeconfig")
    }

    /// The kubeconfig of a node's agent.
    pub fn kubeconfig(&self, node: &Node) -> PathBuf {
        self.folder.join(&node.host.name).join("kubeconfig")
    }

    /// The same options for an agent that has this cluster as its directory.
    pub fn agent(&self, node: &Node, options: &AgentOptions) -> AgentOptions {
        let kubeconfig = self.kubeconfig(node);
        AgentOptions {
            directory: format!(
                "{{ kubernetes: {{ kubeconfig: {}, denyList: {DENY_LIST}, watchIdle: {WATCH_IDLE} }} }}",
                kubeconfig.display()
            ),
            ..options.clone()
        }
    }

    /// The program under test as a plugin of `kubectl`, once there are agents' pods.
    pub fn plugin(&self) -> PathBuf {
        self.folder.join("kubectl-shroud")
    }

    /// Makes a pod for each node's agent, in which `/usr/bin/shroud` is this program, run on that node.
    pub fn add_agent_pods(&self, lab: &Lab, shroud: &Path) -> Result<()> {
        let program = fs::canonicalize(shroud).with_context(|| format!("find {}", shroud.display()))?;
        symlink(program, self.plugin()).with_context(|| format!("make {}", self.plugin().display()))?;
        for node in &lab.nodes {
            self.server.put(agent_pod(&node.host.name))?;
        }
        let (nodes, shroud) = (lab.nodes.clone(), shroud.to_owned());
        self.server.on_exec(move |exec| {
            let node = nodes.iter().find(|node| node.host.name == exec.node);
            let ran = node.context("no such node").and_then(|node| run(node, &shroud, exec));
            ran.unwrap_or_else(|error| Executed::Failed(format!("{error:#}")))
        });
        Ok(())
    }

    /// Replaces the deny list; each line a node, a key or a fingerprint.
    pub fn deny(&self, lines: &str) -> Result<()> {
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": DENY_LIST, "namespace": NAMESPACE },
            "data": { "denied": lines },
        });
        self.server.put(map).map(drop)
    }

    /// Makes or changes the Pod object of a pod, as its kubelet has it once it runs, in the namespace `pods`.
    pub fn run_pod(&self, node: &Node, pod: &Host, labels: &Value) -> Result<()> {
        let addresses: Vec<Value> = Family::BOTH.map(|family| json!({ "ip": pod.address(family) })).into();
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": pod.name, "namespace": PODS, "labels": labels },
            "spec": { "nodeName": node.host.name, "containers": [{ "name": "main", "image": "none" }] },
            "status": { "phase": "Running", "podIP": addresses[0]["ip"], "podIPs": addresses },
        });
        self.server.put(object).map(drop)
    }

    /// Makes or changes the namespace `pods`.
    pub fn label_namespace(&self, labels: &Value) -> Result<()> {
        let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": PODS, "labels": labels } });
        self.server.put(object).map(drop)
    }

    /// Puts a node into a zone.
    pub fn place(&self, node: &Node, zone: &str) -> Result<()> {
        let labels = json!({ "metadata": { "labels": { ZONE: zone } } });
        self.server.patch("nodes", "", &node.host.name, &labels).map(drop)
    }

    /// What the underlay may carry: WireGuard, and the agents' connections to the API server.
    pub fn allowed(&self, lab: &Lab) -> Allowed {
        let address = self.server.addresses()[0].ip();
        let length = if address.is_ipv4() { 24 } else { 64 };
        let underlay = IpNet::new_assert(address, length).trunc();
        Allowed::wireguard(LISTEN_PORT, lab.protected()).and("API server", (address.into(), underlay), Some(TCP))
    }

    /// The announcement on a Node object, if there is one.
    pub fn announcement(&self, node: &str) -> Result<Option<String>> {
        let object = self.server.get("nodes", "", node)?.unwrap_or_default();
        Ok(object["metadata"]["annotations"][ANNOTATION]
            .as_str()
            .map(str::to_owned))
    }
}

/// The name of the pod of a node's agent.
pub fn agent_pod_name(node: &str) -> String {
    format!("shroud-{node}")
}

/// The pod of a node's agent, as the DaemonSet of deploy/ and the kubelet make it.
pub fn agent_pod(node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": agent_pod_name(node),
            "namespace": NAMESPACE,
            "labels": { "app.kubernetes.io/name": "shroud", "app.kubernetes.io/component": "agent" },
        },
        "spec": { "nodeName": node, "containers": [{ "name": "agent", "image": "shroud" }] },
        "status": { "phase": "Running" },
    })
}

/// Runs a command of an agent's pod on the node. The socket, which in the pod is where it always is, has its own place there.
fn run(node: &Node, shroud: &Path, exec: &Exec) -> Result<Executed> {
    let (program, arguments) = exec.command.split_first().context("no command")?;
    ensure!(program == "/usr/bin/shroud", "{program}: no such file or directory");
    let socket = agent::socket(node);
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.extend(["--socket", socket.to_str().context("the socket's path is text")?]);
    let shroud = shroud.to_str().context("the program's path is text")?;
    let output = node.host.netns.exec(shroud, &arguments)?;
    Ok(Executed::Ended {
        stdout: output.stdout.into_bytes(),
        stderr: output.stderr.into_bytes(),
        code: output.status.code().context("killed by a signal")?,
    })
}

/// A Node object as kubelet and controllers make it: its labels, pod CIDRs and addresses.
pub fn node_object(node: &Node) -> Value {
    let name = &node.host.name;
    let pod_cidrs: Vec<String> = node.pod_prefixes().iter().map(ToString::to_string).collect();
    let underlay = node.underlay_families;
    let mut addresses: Vec<Value> = Family::BOTH
        .into_iter()
        .filter(|family| underlay.has(*family))
        .map(|family| json!({ "type": "InternalIP", "address": node.host.address(family) }))
        .collect();
    addresses.push(json!({ "type": "Hostname", "address": name }));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
        "spec": { "podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs },
        "status": { "addresses": addresses },
    })
}
