//! Cryptokey routing: which peer owns an address. One table for all peers, longest prefix first, so that the answer is the same for
//! the destination of what we send and for the source of what we receive.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;
use shroud_model::Prefix;

/// The allowed IPs of all peers. `P` names a peer.
///
/// A prefix has at most one owner; giving it to another peer takes it from the first, in one step.
pub(crate) struct AllowedIps<P> {
    v4: PrefixMap<Ipv4Net, P>,
    v6: PrefixMap<Ipv6Net, P>,
    by_peer: BTreeMap<P, BTreeSet<Prefix>>,
}

impl<P: Copy + Ord> AllowedIps<P> {
    pub(crate) fn new() -> Self {
        Self {
            v4: PrefixMap::new(),
            v6: PrefixMap::new(),
            by_peer: BTreeMap::new(),
        }
    }

    /// The peer that owns the longest prefix around `address`.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<P> {
        match address {
            IpAddr::V4(address) => self.v4.get_lpm(&Ipv4Net::from(address)).map(|(_, &peer)| peer),
            IpAddr::V6(address) => self.v6.get_lpm(&Ipv6Net::from(address)).map(|(_, &peer)| peer),
        }
    }

    /// Gives `prefix` to `peer`, whoever had it before.
    pub(crate) fn insert(&mut self, prefix: Prefix, peer: P) {
        let before = match Net::from(prefix) {
            Net::V4(net) => self.v4.insert(net, peer),
            Net::V6(net) => self.v6.insert(net, peer),
        };
        if let Some(before) = before
            && let Some(prefixes) = self.by_peer.get_mut(&before)
        {
            prefixes.remove(&prefix);
        }
        self.by_peer.entry(peer).or_default().insert(prefix);
    }

    /// Takes `prefix` from `peer`; nothing happens when it is another's or nobody's.
    pub(crate) fn remove(&mut self, prefix: Prefix, peer: P) {
        if self
            .by_peer
            .get_mut(&peer)
            .is_some_and(|prefixes| prefixes.remove(&prefix))
        {
            self.forget(prefix);
        }
    }

    /// Takes all prefixes from `peer`.
    pub(crate) fn clear(&mut self, peer: P) {
        for prefix in self.by_peer.remove(&peer).unwrap_or_default() {
            self.forget(prefix);
        }
    }

    /// The prefixes of one peer, in order.
    pub(crate) fn of(&self, peer: P) -> impl Iterator<Item = Prefix> {
        self.by_peer.get(&peer).into_iter().flatten().copied()
    }

    fn forget(&mut self, prefix: Prefix) {
        match Net::from(prefix) {
            Net::V4(net) => drop(self.v4.remove(&net)),
            Net::V6(net) => drop(self.v6.remove(&net)),
        }
    }
}

/// A prefix in the trie's two key types.
enum Net {
    V4(Ipv4Net),
    V6(Ipv6Net),
}

impl From<Prefix> for Net {
    fn from(prefix: Prefix) -> Self {
        match prefix.address() {
            IpAddr::V4(address) => Self::V4(Ipv4Net::new_assert(address, prefix.length())),
            IpAddr::V6(address) => Self::V6(Ipv6Net::new_assert(address, prefix.length())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One step of a table's life.
    #[derive(Debug, Clone)]
    enum Step {
        Insert(Prefix, u8),
        Remove(Prefix, u8),
        Clear(u8),
    }

    /// Addresses that collide often: few bits vary.
    fn address() -> impl Strategy<Value = IpAddr> {
        let bits = prop_oneof![Just(0u8), Just(1), Just(2), Just(128), Just(255)];
        prop_oneof![
            prop::array::uniform2(bits.clone()).prop_map(|[a, b]| IpAddr::from([10, a, b, 1])),
            prop::array::uniform2(bits)
                .prop_map(|[a, b]| { IpAddr::from([0xfd, 0, a, 0, 0, 0, 0, 0, b, 0, 0, 0, 0, 0, 0, 1]) }),
        ]
    }

    fn prefix() -> impl Strategy<Value = Prefix> {
        (address(), 0u8..=128).prop_map(|(address, length)| {
            let longest = if address.is_ipv4() { 32 } else { 128 };
            Prefix::containing(address, length.min(longest)).unwrap()
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (prefix(), 0u8..4).prop_map(|(prefix, peer)| Step::Insert(prefix, peer)),
            2 => (prefix(), 0u8..4).prop_map(|(prefix, peer)| Step::Remove(prefix, peer)),
            1 => (0u8..4).prop_map(Step::Clear),
        ]
    }

    proptest! {
        #[test]
        fn it_answers_as_a_list_searched_by_hand(steps in prop::collection::vec(step(), 0..60), questions in prop::collection::vec(address(), 20)) {
            let mut table = AllowedIps::new();
            let mut list: BTreeMap<Prefix, u8> = BTreeMap::new();

            for step in steps {
                match step {
                    Step::Insert(prefix, peer) => {
                        table.insert(prefix, peer);
                        list.insert(prefix, peer);
                    }
                    Step::Remove(prefix, peer) => {
                        table.remove(prefix, peer);
                        if list.get(&prefix) == Some(&peer) {
                            list.remove(&prefix);
                        }
                    }
                    Step::Clear(peer) => {
                        table.clear(peer);
                        list.retain(|_, owner| *owner != peer);
                    }
                }
            }

            for address in questions {
                let expected = list.iter().filter(|(prefix, _)| prefix.contains(address)).max_by_key(|(prefix, _)| prefix.length());
                prop_assert_eq!(table.owner(address), expected.map(|(_, &peer)| peer), "{}", address);
            }
            for peer in 0..4 {
                let expected: Vec<Prefix> = list.iter().filter(|&(_, &owner)| owner == peer).map(|(&prefix, _)| prefix).collect();
                prop_assert_eq!(table.of(peer).collect::<Vec<_>>(), expected);
            }
        }
    }

    #[test]
    fn a_prefix_given_to_another_peer_moves() {
        let mut table = AllowedIps::new();
        let prefix = "10.1.0.0/16".parse().unwrap();
        table.insert(prefix, "a");

        table.insert(prefix, "b");
        table.remove(prefix, "a");

        assert_eq!(table.owner("10.1.2.3".parse().unwrap()), Some("b"));
        assert_eq!(table.of("a").count(), 0);
    }
}
