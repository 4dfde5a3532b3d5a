//! The network configuration list by which a container runtime attaches this node's pods (CNI specification 1.0.0, section 1).
//!
//! We write the file and nothing else: the plugins it names (`ptp` or `bridge`, and `host-local` for addresses) are the runtime's to run.
//! A runtime takes the file's presence for "the network is ready", so it comes only when the gate is on every uplink. It is ours when the
//! network in it has our name; a file of another network is left alone, whatever it is called.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shroud_keyd::announcement::Mode;
use shroud_model::{Family, Mtu, Prefix};

use crate::plan::Plan;

/// The network's name, by which we know the file as ours.
const NETWORK: &str = "shroud";
/// The bridge that the plugin `bridge` makes. Not `shroud…`: it is the plugin's, not ours.
const BRIDGE: &str = "cni-shroud";

/// How pods of this node get their network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Cni {
    /// Whether the agent writes the configuration list. Without it something else attaches the pods.
    pub(crate) install: bool,

    /// The folder in which the container runtime looks for it. It must exist.
    pub(crate) conf_dir: PathBuf,

    /// The file's name. Runtimes take the first in alphabetical order, and only names with this ending.
    pub(crate) name: String,

    /// The plugin that attaches a pod: `ptp` gives each a link of its own, `bridge` puts all on one bridge.
    pub(crate) plugin: Plugin,

    /// Where `host-local` remembers the addresses it gave away.
    pub(crate) data_dir: PathBuf,

    /// Whether pods get the node's address when they talk to the world outside the cluster. Needs iptables.
    pub(crate) ip_masq: bool,

    /// Whether the plugin `portmap` follows, which gives pods their `hostPort`. Needs iptables.
    pub(crate) port_map: bool,
}

/// The plugins that attach a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Plugin {
    #[default]
    Ptp,
    Bridge,
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            install: false,
            conf_dir: "/etc/cni/net.d".into(),
            name: "10-shroud.conflist".to_owned(),
            plugin: Plugin::default(),
            data_dir: "/var/lib/cni/networks".into(),
            ip_masq: false,
            port_map: false,
        }
    }
}

/// Why the file could not be put in its place or taken away.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The folder is not there. Making it could hide the place below a mount that comes later.
    #[error("write {}: the folder does not exist; make it, or name the runtime's in `cni.confDir`", path.display())]
    NoFolder { path: PathBuf },
    /// The file is another network's.
    #[error("write {}: it holds another network; remove it, or give ours another `cni.name`", path.display())]
    Foreign { path: PathBuf },
    /// The system refuses.
    #[error("{operation} {}: {source}", path.display())]
    System {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl Cni {
    fn path(&self) -> PathBuf {
        self.conf_dir.join(&self.name)
    }

    /// What is wrong with the file's name, if anything.
    pub(crate) fn flaw(&self) -> Option<&'static str> {
        let is_file_name = Path::new(&self.name)
            .file_name()
            .is_some_and(|name| name == self.name.as_str());
        let right = is_file_name && self.name.ends_with(".conflist") && !self.name.starts_with('.');
        (!right).then_some("is not the name of a configuration list; give a file name that ends in .conflist")
    }

    /// Brings the file into the wished state; a file that is right is not touched. Answers whether anything was written.
    ///
    /// # Errors
    /// [`Error::NoFolder`], [`Error::Foreign`], or what the system answers.
    pub(crate) fn ensure(&self, wished: &str) -> Result<bool, Error> {
        let path = self.path();
        match self.found()? {
            Some(found) if found == wished => return Ok(false),
            Some(found) if !is_ours(&found) => return Err(Error::Foreign { path }),
            _ => {}
        }
        if !self.conf_dir.is_dir() {
            return Err(Error::NoFolder { path });
        }
        // No runtime reads a file with this ending.
        let draft = self.conf_dir.join(format!(".{}.new", self.name));
        let written = write(&draft, wished).and_then(|()| fs::rename(&draft, &path));
        let kept = written.and_then(|()| File::open(&self.conf_dir)?.sync_all());
        match kept {
            Ok(()) => Ok(true),
            Err(source) => {
                // It may not have come into being; the error that counts is the first.
                drop(fs::remove_file(&draft));
                Err(Error::System {
                    operation: "write",
                    path,
                    source,
                })
            }
        }
    }

    /// Takes the file away if it is ours. Answers whether it was there.
    ///
    /// # Errors
    /// What the system answers.
    pub(crate) fn remove(&self) -> Result<Option<PathBuf>, Error> {
        let path = self.path();
        match self.found()? {
            Some(found) if is_ours(&found) => {}
            _ => return Ok(None),
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(Some(path)),
            Err(source) => Err(Error::System {
                operation: "remove",
                path,
                source,
            }),
        }
    }

    fn found(&self) -> Result<Option<String>, Error> {
        let path = self.path();
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::System {
                operation: "read",
                path,
                source,
            }),
        }
    }
}

fn write(draft: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(draft)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Whether a file holds our network. A torn one cannot be: it is renamed into place whole.
fn is_ours(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|list| list["name"] == NETWORK)
}

/// The configuration list for pods of these prefixes.
pub(crate) fn conflist(cni: &Cni, pod_prefixes: &BTreeSet<Prefix>, plan: &Plan) -> String {
    let list = list(cni, pod_prefixes.iter().copied(), pod_mtu(plan));
    format!("{list:#}\n")
}

/// The largest packet that every peer's pods can be sent.
fn pod_mtu(plan: &Plan) -> Mtu {
    let alone = || {
        let tunnel = plan.routing.links.values().map(|link| link.mtu).min();
        let tunnel = tunnel.unwrap_or_else(|| Mtu::ETHERNET.inside_wireguard(Family::V6));
        match plan.mode {
            Mode::Native => tunnel,
            Mode::Vxlan | Mode::Geneve => tunnel.inside_overlay(Family::V6),
        }
    };
    plan.peers.values().map(|peer| peer.mtu).min().unwrap_or_else(alone)
}

fn list(cni: &Cni, pod_prefixes: impl Iterator<Item = Prefix>, mtu: Mtu) -> Value {
    // One set per family: a pod gets one address of each. The first address of a prefix is this node's own in the mesh; `host-local`
    // gives away neither it nor the second, which is the pods' gateway.
    let mut ranges: BTreeMap<Family, Vec<Value>> = BTreeMap::new();
    for prefix in pod_prefixes {
        let set = ranges.entry(prefix.family()).or_default();
        set.push(json!({ "subnet": prefix.to_string() }));
    }
    let routes: Vec<Value> = ranges
        .keys()
        .map(|family| match family {
            Family::V4 => json!({ "dst": "0.0.0.0/0" }),
            Family::V6 => json!({ "dst": "::/0" }),
        })
        .collect();
    let ipam = json!({
        "type": "host-local",
        "dataDir": cni.data_dir.display().to_string(),
        "ranges": ranges.into_values().collect::<Vec<_>>(),
        "routes": routes,
    });
    let mut attach = json!({ "mtu": mtu.bytes(), "ipMasq": cni.ip_masq, "ipam": ipam });
    match cni.plugin {
        Plugin::Ptp => attach["type"] = json!("ptp"),
        Plugin::Bridge => {
            attach["type"] = json!("bridge");
            attach["bridge"] = json!(BRIDGE);
            attach["isGateway"] = json!(true);
        }
    }
    let mut plugins = vec![attach];
    if cni.port_map {
        plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
    }
    json!({ "cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes() -> Vec<Prefix> {
        ["10.244.1.0/24", "10.245.1.0/24", "fd00:10:244:1::/64"]
            .map(|prefix| prefix.parse().unwrap())
            .to_vec()
    }

    fn in_folder(folder: &Path) -> Cni {
        Cni {
            conf_dir: folder.to_owned(),
            ..Cni::default()
        }
    }

    #[test]
    fn a_pod_gets_an_address_and_a_default_route_of_each_family() {
        let list = list(&Cni::default(), prefixes().into_iter(), Mtu::new(1440).unwrap());

        assert_eq!(
            list,
            json!({
                "cniVersion": "1.0.0",
                "name": "shroud",
                "plugins": [{
                    "type": "ptp",
                    "mtu": 1440,
                    "ipMasq": false,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": "/var/lib/cni/networks",
                        "ranges": [
                            [{ "subnet": "10.244.1.0/24" }, { "subnet": "10.245.1.0/24" }],
                            [{ "subnet": "fd00:10:244:1::/64" }],
                        ],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                    },
                }],
            })
        );
    }

    #[test]
    fn bridge_and_portmap_are_chosen_by_configuration() {
        let cni = Cni {
            plugin: Plugin::Bridge,
            ip_masq: true,
            port_map: true,
            ..Cni::default()
        };

        let list = list(&cni, prefixes().into_iter().take(1), Mtu::new(1390).unwrap());

        let [bridge, portmap] = list["plugins"].as_array().unwrap().as_slice() else {
            panic!("two plugins: {list}");
        };
        assert_eq!(bridge["type"], "bridge");
        assert_eq!(bridge["isGateway"], true);
        assert_eq!(bridge["ipMasq"], true);
        assert_eq!(bridge["ipam"]["routes"], json!([{ "dst": "0.0.0.0/0" }]));
        assert_eq!(
            *portmap,
            json!({ "type": "portmap", "capabilities": { "portMappings": true } })
        );
    }

    #[test]
    fn the_file_is_written_when_it_differs_and_only_then() {
        let folder = tempfile::tempdir().unwrap();
        let cni = in_folder(folder.path());
        let first = list(&cni, prefixes().into_iter(), Mtu::new(1440).unwrap()).to_string();
        let second = list(&cni, prefixes().into_iter(), Mtu::new(1390).unwrap()).to_string();

        let written = [&first, &first, &second].map(|text| cni.ensure(text).unwrap());

        assert_eq!(written, [true, false, true]);
        assert_eq!(fs::read_to_string(cni.path()).unwrap(), second);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "a draft was left behind"
        );
        assert_eq!(cni.remove().unwrap(), Some(cni.path()));
        assert_eq!(cni.remove().unwrap(), None);
    }

    #[test]
    fn another_networks_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let cni = in_folder(folder.path());

        for foreign in [r#"{ "name": "other", "plugins": [] }"#, "no JSON", ""] {
            fs::write(cni.path(), foreign).unwrap();

            assert!(matches!(
                cni.ensure(r#"{ "name": "shroud" }"#),
                Err(Error::Foreign { .. })
            ));
            assert_eq!(cni.remove().unwrap(), None);
            assert_eq!(fs::read_to_string(cni.path()).unwrap(), foreign);
        }
    }

    #[test]
    fn a_missing_folder_is_said_and_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let cni = in_folder(&folder.path().join("net.d"));

        assert!(matches!(cni.ensure("{}"), Err(Error::NoFolder { .. })));
        assert!(!cni.conf_dir.exists());
        assert_eq!(cni.remove().unwrap(), None);
    }

    #[test]
    fn a_name_that_no_runtime_reads_is_refused() {
        let named = |name: &str| Cni {
            name: name.to_owned(),
            ..Cni::default()
        };

        assert_eq!(named("10-shroud.conflist").flaw(), None);
        for name in ["", ".conflist", "shroud.conf", "a/b.conflist", "../b.conflist"] {
            assert!(named(name).flaw().is_some(), "{name}");
        }
    }
}
