//! What the guest runs: the agreement between the host, which writes it, and pid 1, which reads it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the guest finds its list of programs, as JSON.
pub const PROGRAMS: &str = "/etc/vm/programs.json";

/// Where the guest finds the paths of its kernel modules, one a line, each after those it depends on.
pub const MODULES: &str = "/etc/vm/modules";

/// The last line of a guest in which all went well.
pub const SUCCESS: &str = "vm: success";

/// The last line of any other guest that came to its end.
pub const FAILURE: &str = "vm: failure";

/// A program to be run in the guest, one after the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// What reports call it.
    pub name: String,
    /// The executable, as a path in the guest.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Environment variables beside `PATH` and `HOME`.
    pub environment: BTreeMap<String, String>,
    /// The folder it runs in.
    pub folder: PathBuf,
    /// How long it may take before it is killed and has failed.
    pub within: Duration,
}
