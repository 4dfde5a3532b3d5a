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

use shroud_ebpf::Attach;

/// Whether this kernel has tcx (Linux 6.6).
fn has_tcx() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(6))
}

/// Whether a test that is about tcx alone can run; says so where it cannot.
fn needs_tcx(test: &str) -> bool {
    if !has_tcx() {
        eprintln!("SKIP {test}: this kernel has no tcx (Linux 6.6)");
    }
    has_tcx()
}

/// Every means of attachment that this kernel has.
fn every_means() -> Vec<Attach> {
    if has_tcx() {
        vec![Attach::Tcx, Attach::Clsact]
    } else {
        vec![Attach::Clsact]
    }
}
