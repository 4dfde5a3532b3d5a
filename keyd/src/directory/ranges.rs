//! Which node claims which prefix, and who claims a part of the same addresses.

use std::collections::BTreeSet;

use shroud_model::{Family, NodeName, Prefix};

use super::claimants::Claimants;

/// Claims on prefixes. Any number of nodes may claim any prefix; finding an overlap costs as many look-ups as there are different lengths.
#[derive(Default)]
pub(super) struct Ranges {
    claims: Claimants<Prefix>,
    /// Every length that was ever claimed.
    lengths: BTreeSet<(Family, u8)>,
}

impl Ranges {
    pub(super) fn insert(&mut self, prefix: Prefix, node: &NodeName) {
        self.lengths.insert((prefix.family(), prefix.length()));
        self.claims.insert(prefix, node);
    }

    pub(super) fn remove(&mut self, prefix: Prefix, node: &NodeName) {
        self.claims.remove(prefix, node);
    }

    pub(super) fn has(&self, prefix: Prefix, node: &NodeName) -> bool {
        self.claims.of(prefix).contains(node)
    }

    /// A node other than `node` that claims an address of `prefix`: the first by prefix and name.
    pub(super) fn other(&self, prefix: Prefix, node: &NodeName) -> Option<&NodeName> {
        let wider = self.wider(prefix).find_map(|wider| self.claims.other(wider, node));
        wider.or_else(|| {
            self.inside(prefix)
                .map(|(_, claimant)| claimant)
                .find(|other| *other != node)
        })
    }

    /// The widest prefix that is claimed and covers `prefix`, or else `prefix` itself. No claim outside of it overlaps one inside.
    pub(super) fn widest(&self, prefix: Prefix) -> Prefix {
        let mut claimed = self.wider(prefix).filter(|wider| !self.claims.of(*wider).is_empty());
        claimed.next().unwrap_or(prefix)
    }

    /// All claims that `prefix` covers.
    pub(super) fn inside(&self, prefix: Prefix) -> impl Iterator<Item = (Prefix, &NodeName)> {
        // Prefixes sort by address, then length: what lies inside follows without a gap.
        let inside = self
            .claims
            .from(prefix)
            .take_while(move |(inside, _)| prefix.covers(*inside));
        inside.flat_map(|(inside, nodes)| nodes.iter().map(move |node| (inside, node)))
    }

    /// The prefixes that cover `prefix` and have a length that somebody claims, widest first.
    fn wider(&self, prefix: Prefix) -> impl Iterator<Item = Prefix> {
        let family = prefix.family();
        let lengths = self.lengths.range((family, 0)..(family, prefix.length()));
        lengths.filter_map(move |&(_, length)| Prefix::containing(prefix.address(), length))
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
                ranges.insert(*prefix, node);
            }

            for (node, prefix) in &claims {
                let naive = claims.iter().any(|(other, taken)| other != node && taken.overlaps(*prefix));
                prop_assert_eq!(ranges.other(*prefix, node).is_some(), naive, "{:?} {:?}", node, prefix);
            }
            for (_, prefix) in &claims {
                let widest = ranges.widest(*prefix);
                for (_, other) in claims.iter().filter(|(_, other)| !widest.covers(*other)) {
                    prop_assert!(!other.overlaps(widest), "{:?} reaches out of {:?}", other, widest);
                }
            }
        }
    }
}
