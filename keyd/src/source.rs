//! What a source of the directory tells, whichever it is, and how it fares.

use std::collections::BTreeMap;

use shroud_model::NodeName;

use crate::words::words;
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

/// How the source fares, for status and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Telemetry {
    /// Complete lists that were asked for.
    pub lists: u64,
    /// Watches that were opened.
    pub watches: u64,
    /// Requests that failed, by kind.
    pub failures: BTreeMap<FailureKind, u64>,
    /// Why this node's announcement is not out.
    pub unpublished: Option<String>,
    /// Why the deny list is not known.
    pub no_deny_list: Option<String>,
    /// Why it is not known which pods have opted out.
    pub no_opt_outs: Option<String>,
    /// That our token may do more than it should, and what helps.
    pub mighty_token: Option<String>,
}

impl Telemetry {
    /// Counts a failure.
    pub fn count(&mut self, kind: FailureKind) {
        *self.failures.entry(kind).or_default() += 1;
    }
}

/// The kinds of failure that are told apart, by what has to be done about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// The folder of records cannot be read.
    Folder,
    /// The credentials could not be read.
    Credentials,
    /// No connection, or it broke off.
    Unreachable,
    /// No answer in time.
    Silent,
    /// 401: the token is not, or no longer, valid.
    Unauthorized,
    /// 403: known, and not allowed.
    Forbidden,
    /// 404.
    NotFound,
    /// 409: somebody else was there.
    Conflict,
    /// 410: what was asked for is too old.
    Expired,
    /// 422: understood, and not accepted.
    Invalid,
    /// 400, 405, 406, 413 and 415: not understood, and never will be.
    BadRequest,
    /// 429: too many requests, or a server that stops.
    Busy,
    /// 5xx, or any other status that is none of the above.
    Server,
    /// An answer that makes no sense.
    Malformed,
}

impl FailureKind {
    words! {
        Self::Folder => "folder",
        Self::Credentials => "credentials",
        Self::Unreachable => "unreachable",
        Self::Silent => "silent",
        Self::Unauthorized => "unauthorized",
        Self::Forbidden => "forbidden",
        Self::NotFound => "not-found",
        Self::Conflict => "conflict",
        Self::Expired => "expired",
        Self::Invalid => "invalid",
        Self::BadRequest => "bad-request",
        Self::Busy => "busy",
        Self::Server => "server",
        Self::Malformed => "malformed",
    }
}
