//! Node keys, announcements, and the directory of who is in the mesh.
//!
//! ```text
//!  state directory ── key::load_or_create ──> this node's keys ──> Announcement ── file::publish ──> the folder
//!                                                                                                      │
//!  cache::load ─────────────┐                                                        file::Source <────┘
//!                           v                                                             │ Event
//!                       Directory  <──────────── restore, reset, apply, delete ───────────┘
//!                           │ snapshot (verified peers, refused nodes and why, problems)
//!                           v
//!                       the agent's plan
//! ```
//!
//! The directory is pure: it verifies and remembers, and touches neither disk, clock nor network. Nothing here touches the kernel's
//! networking.

pub mod announcement;
pub mod cache;
pub mod directory;
mod document;
mod error;
pub mod file;
mod folder;
pub mod key;
pub mod kubernetes;
pub mod opt_out;
pub mod record;
mod refusal;
mod source;
mod words;

pub use announcement::Announcement;
pub use directory::{Directory, Local, Memory, Peer, Problem, Reason, Refused, Snapshot};
pub use error::Error;
pub use key::{NodeKey, NodeKeys, PublicKeys};
pub use opt_out::{OptOut, OptOuts};
pub use record::{Record, Unreadable, Zone};
pub use refusal::{Excerpt, Refusal};
pub use source::{Event, FailureKind, Telemetry};

/// The annotation on a Node object that holds the node's announcement.
pub const ANNOTATION: &str = "shroud.dev/node";
