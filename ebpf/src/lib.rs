//! The gate: loads the BPF program, attaches it, fills its tables, reads its counters.
//!
//! It owns what lies under its pin directory and the filters that carry its handle; nothing else. It decides nothing: the table says
//! what is protected and who owns what, and `shroud-gate` says what follows for a packet.
//!
//! ```text
//!   Desired ──┐
//!             ├── diff (pure) ──> Change ──> Gate::apply ──> kernel
//!   Observed ─┘                                                │
//!      ^────────────────────── Gate::observe <─────────────────┘
//! ```

mod attachment;
mod device;
mod diff;
mod error;
mod event;
mod gate;
mod object;
mod pin;
mod port;
mod sorted;
mod table;

pub use attachment::{Attach, Hook, Mechanism};
pub use diff::{Attachment, Build, Change, Desired, Observed, diff};
pub use error::Error;
pub use event::{Counter, Event};
pub use gate::{Gate, Options, Removed};
pub use port::{InvalidPort, MAX_OPEN_PORTS, Port, Transport};
pub use shroud_gate::{Action, Direction, Reason, Verdict};
pub use table::{Facts, Mode, Node, NodePath, Owner, Path, Table, Wrapping, decide};
