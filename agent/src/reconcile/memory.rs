//! What a pass leaves alone while only the memory of an earlier run is known, and no source has spoken yet.
//!
//! The kernel may know better than the memory: a node that joined in the last moments before a crash is in the one and not in the other. So a
//! memory adds and changes, and takes nothing away; what has really gone goes with the first complete list. (Silence removes nobody.)

use shroud_ebpf::{Desired, Table};

use super::is_no_removal;

/// A step towards a plan.
pub(super) trait Step {
    /// Whether it takes something away that traffic may depend on.
    fn takes_away(&self) -> bool;
}

impl Step for shroud_ebpf::Change {
    fn takes_away(&self) -> bool {
        matches!(self, Self::Detach { .. })
    }
}

impl Step for shroud_tunnel::Change {
    fn takes_away(&self) -> bool {
        matches!(self, Self::RemovePeer { .. } | Self::RemoveAllowedIps { .. })
    }
}

impl Step for shroud_overlay::Change {
    fn takes_away(&self) -> bool {
        !is_no_removal(self)
    }
}

impl Step for shroud_routing::Change {
    fn takes_away(&self) -> bool {
        matches!(
            self,
            Self::RemoveRoute(_) | Self::RemoveRule(_) | Self::RemoveAddress { .. }
        )
    }
}

/// The plan with the owners that are in force and of which it knows nothing.
pub(super) fn keep_owners(planned: &Desired, in_force: &Table) -> Desired {
    let mut kept = planned.clone();
    for (prefix, owner) in &in_force.owners {
        kept.table.owners.entry(*prefix).or_insert(*owner);
    }
    for (address, node) in &in_force.nodes {
        kept.table.nodes.entry(*address).or_insert(*node);
    }
    kept
}
