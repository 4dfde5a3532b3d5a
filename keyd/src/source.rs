//! What a source of the directory tells, whichever it is.

use std::collections::BTreeMap;

use shroud_model::NodeName;

use crate::{OptOuts, Record, Unreadable};

/// One thing a source has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A complete list, in any order; for [`Directory::reset`](crate::Directory::reset). Ends an earlier silence.
    Listed(Vec<Result<Record, Unreadable>>),
    /// One node is new or has changed; for [`Directory::apply`](crate::Directory::apply).
    Applied(Result<Record, Unreadable>),
    /// The authority says that a node is gone; for [`Directory::delete`](crate::Directory::delete).
    Deleted(NodeName),
    /// The complete deny list: names of nodes, their keys or the keys' fingerprints, each with a remark; for
    /// [`Directory::deny`](crate::Directory::deny).
    Denied(BTreeMap<String, String>),
    /// All pods that have opted out; `None` while nobody can say. For [`Directory::opt_out`](crate::Directory::opt_out).
    OptedOut(Option<OptOuts>),
    /// The source does not answer, and why; what was known stays. Said once, not again while nothing changes.
    Silent(String),
    /// The source answers again, from where it was left.
    Answers,
}
