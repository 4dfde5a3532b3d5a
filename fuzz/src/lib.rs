//! What must be true of every input.
//!
//! Each module is one kind of input: `check` takes bytes and panics when a promise is broken. The fuzzer looks for such bytes
//! (`targets/`); what it found worth keeping is replayed by the tests of the crate concerned, which include these modules by path.

pub mod announcement;
pub mod directory;
pub mod node_object;
pub mod printable;
pub mod record;
pub mod uapi;
