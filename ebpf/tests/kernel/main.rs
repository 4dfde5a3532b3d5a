//! The gate in a real kernel: verdicts, wires, attachments. Needs root; looks at the kernel through iproute2, bpftool and raw sockets.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::disallowed_methods,
    reason = "tests look at the kernel through iproute2 on purpose"
)]

mod attachments;
#[path = "../../common/tests/decisions/cases.rs"]
mod cases;
mod namespace;
#[path = "../../common/tests/decisions/packet.rs"]
mod packet;
mod tables;
mod verdicts;
mod wire;
