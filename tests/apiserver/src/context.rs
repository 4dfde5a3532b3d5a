//! What all requests share, and how a test sets it up.

use std::sync::Mutex;
use std::time::Duration;

use crate::access::Grant;
use crate::clock::Clock;
use crate::exec::Commands;
use crate::fault::Faults;
use crate::identity::{ServiceAccount, Tokens};
use crate::journal::Journal;
use crate::policy::Policy;
use crate::store::Store;

/// How a server is to behave.
#[derive(Clone, Debug)]
pub struct Options {
    /// The service account of agents.
    pub account: ServiceAccount,
    /// What users and groups may do; admins may do everything anyway.
    pub grants: Vec<Grant>,
    /// The admission rule.
    pub policy: Option<Policy>,
    /// How long a second of the server's own timers is (of `timeoutSeconds`, bookmarks, and the wait for a revision to come). Tests that
    /// wait for a timeout make it shorter.
    pub second: Duration,
    /// How often a watch that allows it gets a bookmark, in those seconds.
    pub bookmark_seconds: u32,
    /// Whether streaming lists work.
    pub streaming_lists: StreamingLists,
    /// Whether watches are served from a cache; without one, an expired watch is told so in other words.
    pub watch_cache: bool,
    /// Whether HTTP/2 is offered.
    pub http2: bool,
}

/// Whether `sendInitialEvents` works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamingLists {
    /// As in today's clusters.
    Served,
    /// The feature is off: 422.
    Refused,
    /// On an etcd that is too old for it: an `ERROR` event.
    Broken,
}

impl Default for Options {
    fn default() -> Self {
        let account = ServiceAccount {
            namespace: "shroud-system".into(),
            name: "shroud".into(),
        };
        Self {
            grants: Grant::agent(&account),
            policy: Some(Policy::agent(&account.username())),
            account,
            second: Duration::from_secs(1),
            bookmark_seconds: 60,
            streaming_lists: StreamingLists::Served,
            watch_cache: true,
            http2: true,
        }
    }
}

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) clock: Clock,
    pub(crate) tokens: Tokens,
    pub(crate) faults: Faults,
    pub(crate) commands: Commands,
    pub(crate) journal: Journal,
    pub(crate) grants: Mutex<Vec<Grant>>,
    pub(crate) policy: Mutex<Option<Policy>>,
    pub(crate) options: Options,
}

impl Context {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            store: Store::new(),
            clock: Clock::default(),
            tokens: Tokens::new(options.account.clone()),
            faults: Faults::new(),
            commands: Commands::default(),
            journal: Journal::default(),
            grants: Mutex::new(options.grants.clone()),
            policy: Mutex::new(options.policy.clone()),
            options,
        }
    }

    /// So many of the server's seconds.
    pub(crate) fn seconds(&self, count: u64) -> Duration {
        self.options
            .second
            .saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
    }
}
