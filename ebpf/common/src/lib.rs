//! What the gate decides, shared by the BPF program and user space.
//!
//! The BPF program and `shroud explain` run the very same functions: [`egress`], [`ingress`],
//! [`decrypted`] and [`pod_mark`]. They see a packet through
//! [`Bytes`] and the maps through [`Lookup`], own nothing, allocate nothing and cannot panic.
//!
//! ```text
//!   packet ── Bytes ──> Packet::parse ──> egress / ingress / decrypted / pod_mark ──> Verdict
//!                                              ^
//!   maps ──── Lookup (Settings, Entry) ────────┘
//! ```

#![no_std]

mod decide;
mod layout;
mod packet;

pub use decide::{Action, Lookup, Reason, Verdict, decrypted, egress, ingress, pod_mark};
pub use layout::{
    Count, CounterKey, DropEvent, Entry, LAYOUT_VERSION, LISTEN_PORTS, MODE_AUDIT, MODE_ENFORCE, MODE_OFF, NO_OVERLAY,
    OPEN_PORTS, PATH_ENCRYPTED, PATH_FENCED, PATH_LOCAL, PATH_NONE, PATH_PLAIN, PORTS, PREFIX_KEY_BITS, PrefixKey,
    Settings, flag, open_port,
};
pub use packet::{Address, Bytes, Direction, Family, Flow, LONGEST_READ, Link, Packet, Shape, Upper, ip};
