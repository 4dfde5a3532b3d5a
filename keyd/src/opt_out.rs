//! Pods that have opted out of encryption, as a source tells of them. Who may do so, and whether the addresses are really theirs, is for the
//! directory and the configuration to say.

use std::fmt;
use std::net::IpAddr;

use shroud_model::NodeName;

/// The label by which a pod, or a namespace for its pods, opts out: its value is `false`.
pub const LABEL: &str = "shroud.dev/encrypt";

/// A pod that has opted out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OptOut {
    /// The pod, as `namespace/name`. Safe to print: its source is the authority for names.
    pub pod: String,
    /// The node it runs on.
    pub node: NodeName,
    /// Whose label says so.
    pub by: OptOutBy,
}

/// Whose label says that a pod has opted out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OptOutBy {
    /// Its own.
    Pod,
    /// Its namespace's.
    Namespace,
}

impl fmt::Display for OptOutBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Namespace => "namespace",
        })
    }
}

/// All pods that have opted out, by each of their addresses. An address that two claim is in it for one of them.
pub type OptOuts = std::collections::BTreeMap<IpAddr, OptOut>;
