//! What a pass leaves alone while only the memory of an earlier run is known, and no source has spoken yet.
//!
//! The kernel may know better than the memory: a node that joined in the last moments before a crash is in the one and not in the other. So a
//! memory adds and changes, and takes nothing away; what has really gone goes with the first complete list. (Silence removes nobody.)

use std::collections::BTreeSet;
use std::net::IpAddr;

use shroud_ebpf::{Path, Table};
use shroud_model::Prefix;

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

/// Adds to the plan the owners that are in force and of which it knows nothing.
pub(super) fn keep_owners(planned: &mut Table, in_force: &Table) {
    for (prefix, owner) in &in_force.owners {
        planned.owners.entry(*prefix).or_insert(*owner);
    }
    for (address, node) in &in_force.nodes {
        planned.nodes.entry(*address).or_insert(*node);
    }
}

/// The pods of other nodes that have opted out as far as the table in force knows. While nobody can say who has, what they send is still let
/// in; but no pod of this node may send in the clear, for its address may have been another's that had opted out.
pub(super) fn opted_out_elsewhere(in_force: &Table) -> BTreeSet<IpAddr> {
    let own = in_force.owners.iter().filter(|(_, owner)| owner.path == Path::Local);
    let own: Vec<&Prefix> = own.map(|(prefix, _)| prefix).collect();
    let is_elsewhere = |address: &IpAddr| !own.iter().any(|prefix| prefix.contains(*address));
    in_force.opted_out.iter().copied().filter(is_elsewhere).collect()
}

#[cfg(test)]
mod tests {
    use shroud_ebpf::{Mode, Owner};
    use shroud_model::{Mark, NodeId};

    use super::*;

    #[test]
    fn only_pods_of_other_nodes_stay_opted_out_while_nobody_can_say() {
        let owner = |node, path| Owner {
            node: NodeId(node),
            path,
        };
        let in_force = Table {
            mode: Mode::Enforce,
            listen_ports: [51820].into(),
            tunnel_mark: Mark::new(1, 1).unwrap(),
            plain_mark: Mark::new(2, 2).unwrap(),
            protected: ["10.244.0.0/16".parse().unwrap()].into(),
            owners: [
                ("10.244.1.0/24".parse().unwrap(), owner(1, Path::Local)),
                ("10.244.2.0/24".parse().unwrap(), owner(2, Path::Encrypted(None))),
            ]
            .into(),
            nodes: [].into(),
            exempt: [].into(),
            opted_out: ["10.244.1.7", "10.244.2.7"].map(|text| text.parse().unwrap()).into(),
            vxlan_ports: [].into(),
            geneve_ports: [].into(),
            overlay: None,
            open_ports: [].into(),
        };

        assert_eq!(opted_out_elsewhere(&in_force), ["10.244.2.7".parse().unwrap()].into());
    }
}
