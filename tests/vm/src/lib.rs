//! Boots real kernels in an emulator, with an initial RAM file system of our own making, and runs test binaries inside.
//!
//! ```text
//!   vm (host)                                             init (pid 1 of the guest)
//!   ┌──────────────────────────────────────────┐          ┌──────────────────────────────────────┐
//!   │ suites ─> build ─> image ─> archive ───────initramfs──> mounts, modules, each program in turn │
//!   │                    verdict <─ console <──── ttyS0 ───── kernel messages                      │
//!   │                                       <──── ttyS1 ───── the programs and "vm: ok NAME"       │
//!   └──────────────────────────────────────────┘          └──────────────────────────────────────┘
//! ```
//!
//! No disk, no network, no login: what goes in is in the archive, what comes out is on the two serial lines. Success is only what says
//! so in the end; a panic, a warning of the kernel, silence or an early end are failures.
#![expect(
    clippy::disallowed_methods,
    reason = "a test harness: runs cargo, ldd, strip, xz and the emulator"
)]

pub mod archive;
pub mod build;
pub mod console;
pub mod guest;
pub mod image;
pub mod kernel;
pub mod program;
pub mod suite;
pub mod support;
