//! The data plane in real network namespaces, with real packets: against itself, and against the other implementations.
//!
//! ```text
//!   node 1              node 2              node 3
//!   10.1.0.1, fd00:1::1 10.2.0.1, fd00:2::1 ...        on the TUN device
//!   192.0.2.1           192.0.2.2           192.0.2.3  on eth0, and 2001:db8::1 ...
//!       └──────────────── bridge ───────────────┘
//! ```
#![expect(
    clippy::disallowed_methods,
    reason = "tests look at the kernel through iproute2 and wg on purpose"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod interop;
mod lab;
mod lifecycle;
mod traffic;
