//! Which node claims which prefix, and who claims a part of the same addresses.

use std::collections::{BTreeMap, BTreeSet};

use shroud_model::{Family, NodeName, Prefix};

/// Claims on prefixes. Any number of nodes may claim any prefix; finding an overlap costs as many look-ups as there are different lengths.
#[derive(Default)]
pub(super) struct Ranges {
    claims: BTreeMap<Prefix, BTreeSet<NodeName>>,
    lengths: BTreeSet<(Family, u8)>,
}

impl Ranges {
    pub(super) fn insert(&mut self, prefix: Prefix, node: NodeName) {
        self.lengths.insert((prefix.family(), prefix.length()));
        self.claims.entry(prefix).or_default().insert(node);
    }

    /// A node other than `node` that claims an address of `prefix`: the first by prefix and name.
    pub(super) fn other(&self, prefix: Prefix, node: &NodeName) -> Option<&NodeName> {
        let family = prefix.family();
        let wider = self
            .lengths
            .range((family, 0)..(family, prefix.length()))
            .filter_map(|&(_, length)| Prefix::containing(prefix.address(), length))
            .find_map(|wider| {
                self.claims
                    .get(&wider)
                    .and_then(|nodes| nodes.iter().find(|&other| other != node))
            });
        wider.or_else(|| {
            // Prefixes sort by address, then length: what lies inside follows without a gap.
            self.claims
                .range(prefix..)
                .take_while(|&(&inside, _)| prefix.covers(inside))
                .find_map(|(_, nodes)| nodes.iter().find(|&other| other != node))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_overlap_is_found_exactly_when_comparing_all_pairs_finds_one(
            claims in prop::collection::vec((0u8..4, 0u8..64, 26u8..=32, any::<bool>()), 0..24),
        ) {
            let claims: Vec<(NodeName, Prefix)> = claims
                .into_iter()
                .map(|(node, host, length, v6)| {
                    let (address, length) = match v6 {
                        false => (std::net::Ipv4Addr::new(10, 0, 0, host).into(), length),
                        true => (std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()).into(), length + 96),
                    };
                    (format!("n{node}").parse().unwrap(), Prefix::containing(address, length).unwrap())
                })
                .collect();
            let mut ranges = Ranges::default();
            for (node, prefix) in &claims {
                ranges.insert(*prefix, node.clone());
            }

            for (node, prefix) in &claims {
                let naive = claims.iter().any(|(other, taken)| other != node && taken.overlaps(*prefix));
                prop_assert_eq!(ranges.other(*prefix, node).is_some(), naive, "{:?} {:?}", node, prefix);
            }
        }
    }
}
