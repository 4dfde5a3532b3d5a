//! Who claims what.

use std::collections::BTreeMap;

use shroud_model::NodeName;

/// The nodes that claim each key, address or prefix, in the order of their names. Nearly always there is one.
pub(super) struct Claimants<K>(BTreeMap<K, Vec<NodeName>>);

impl<K> Default for Claimants<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Copy> Claimants<K> {
    pub(super) fn insert(&mut self, what: K, node: &NodeName) {
        let nodes = self.0.entry(what).or_insert_with(|| Vec::with_capacity(1));
        if let Err(place) = nodes.binary_search(node) {
            nodes.insert(place, node.clone());
        }
    }

    pub(super) fn remove(&mut self, what: K, node: &NodeName) {
        let Some(nodes) = self.0.get_mut(&what) else { return };
        nodes.retain(|claimant| claimant != node);
        if nodes.is_empty() {
            self.0.remove(&what);
        }
    }

    /// All that claim it.
    pub(super) fn of(&self, what: K) -> &[NodeName] {
        self.0.get(&what).map_or(&[], Vec::as_slice)
    }

    /// The first other node that claims it.
    pub(super) fn other(&self, what: K, node: &NodeName) -> Option<&NodeName> {
        self.of(what).iter().find(|other| *other != node)
    }

    /// What is claimed and not before `first`, in order.
    pub(super) fn from(&self, first: K) -> impl Iterator<Item = (K, &[NodeName])> {
        self.0.range(first..).map(|(what, nodes)| (*what, nodes.as_slice()))
    }

    /// Every claim.
    pub(super) fn all(&self) -> impl Iterator<Item = (K, &NodeName)> {
        let claims = self.0.iter();
        claims.flat_map(|(what, nodes)| nodes.iter().map(|node| (*what, node)))
    }

    /// What several nodes claim.
    pub(super) fn contested(&self) -> impl Iterator<Item = (K, &[NodeName])> {
        let claims = self.0.iter().map(|(what, nodes)| (*what, nodes.as_slice()));
        claims.filter(|(_, nodes)| nodes.len() > 1)
    }
}
