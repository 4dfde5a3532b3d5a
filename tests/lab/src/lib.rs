//! Nodes and pods as network namespaces, raw captures of every underlay port, and the oracles that judge them.
//!
//! The lab owns the machine around the daemon: namespaces, veths, the underlay bridge, traffic, captures. It never uses a
//! crate of the code under test; it builds with iproute2 and looks with iproute2, `wg` and raw sockets, so that it does not
//! share the daemon's mistakes.
//!
//! ```text
//!   pod a0   pod a1      pod b0   pod b1      pod c0   pod c1
//!      \      /             \      /             \      /        10.244.N.10+i/32, fd00:10:244:N::10+i/128
//!     pod0  pod1           pod0  pod1           pod0  pod1
//!       node a               node b               node c
//!        eth0                 eth0                 eth0          172.18.0.N/24, fd00:172:18::N/64
//!          |                    |                    |
//!       port-a    (capture)  port-b    (capture)  port-c
//!     ====================== bridge "br0" ======================  namespace "underlay"
//!                172.18.0.254, fd00:172:18::fe
//!                               |
//!                         host "internet"                         192.0.2.1, 2001:db8::1
//! ```

#![expect(
    clippy::disallowed_methods,
    reason = "the lab builds and looks at the kernel through iproute2 on purpose, and starts the daemon under test"
)]

pub mod agent;
pub mod capture;
pub mod cluster;
pub mod demo;
pub mod eventually;
pub mod frame;
pub mod http;
pub mod marker;
pub mod netns;
pub mod remains;
pub mod stopped;
pub mod topology;
pub mod traffic;

pub use agent::{Agent, AgentOptions, Status};
pub use capture::{Capture, Evidence};
pub use cluster::Cluster;
pub use eventually::eventually;
pub use marker::Markers;
pub use netns::{Netns, Output};
pub use topology::{Families, Family, Host, Lab, Node, Topology};
pub use traffic::{Flow, Outcome, Protocol};
