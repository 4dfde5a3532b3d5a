//! The shipped binary on nodes made of network namespaces, judged by raw captures, the kernel as other tools see it, and its own words.
//!
//! ```text
//!   pod a0   pod a1      pod b0   pod b1
//!      \      /             \      /
//!       node a               node b          each runs the real `shroud agent`
//!          |                    |
//!     ============ underlay ============     every port captured, every frame searched for the payloads' marker
//! ```

#![expect(
    clippy::disallowed_methods,
    reason = "tests run the product, and look at the kernel through iproute2 on purpose"
)]

mod backend;
mod cni;
mod command_line;
mod explain;
mod faults;
mod gate;
mod hard_failures;
mod http;
mod kubernetes;
mod matrix;
mod mesh;
mod mtu;
mod nodes;
mod opt_out;
mod overlay;
mod pair;
mod plugin;
mod reconcile;
mod refused;
mod rotation;
mod secrets;
mod socket;
