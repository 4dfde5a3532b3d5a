//! What a pass reads back from the kernel.
//!
//! With thousands of peers, reading everything takes longer than a change may wait. So what nobody says has changed is read in turn, a driver at
//! a time, and what is read and written in between is compared with what the last pass left. A notice of somebody else's, a failure and the
//! start make a pass read everything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use shroud_routing::Hop;

use crate::check::Driver;

/// Whose turn it is when nobody says that anything has changed; each once in a `resync`.
pub(super) const TURNS: [Driver; 3] = [Driver::Gate, Driver::Tunnel, Driver::Routing];

/// How many ways are asked for again in one turn. A way can change and nobody says so: the kernel learns of a smaller path by ICMP.
const WAYS: usize = 512;

/// What one pass reads back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing: only the mesh has changed.
    Nothing,
    /// What one driver works on.
    At(Driver),
    /// All there is.
    Everything,
}

impl Look {
    pub(super) fn is_at(self, driver: Driver) -> bool {
        match self {
            Self::Nothing => false,
            Self::At(turn) => turn == driver,
            Self::Everything => true,
        }
    }
}

/// The ways to peers that are not known, and those whose turn it is to be asked for again.
#[derive(Debug, Default)]
pub(super) struct Ways {
    /// The last that had its turn.
    last: Option<IpAddr>,
}

impl Ways {
    /// Which of the `wanted` ways to ask for. Where there are not many, all have a turn at once.
    pub(super) fn due(
        &mut self,
        wanted: &BTreeSet<IpAddr>,
        known: &BTreeMap<IpAddr, Hop>,
        look: Look,
    ) -> BTreeSet<IpAddr> {
        let unknown = wanted.iter().filter(|address| !known.contains_key(*address));
        let mut ask: BTreeSet<IpAddr> = unknown.copied().collect();
        match look {
            Look::Nothing => {}
            Look::Everything => ask.extend(wanted),
            Look::At(driver) if driver != Driver::Routing => {}
            Look::At(_) => {
                let behind = |address: &&IpAddr| self.last.is_none_or(|last| **address > last);
                let turn: Vec<IpAddr> = wanted.iter().filter(behind).take(WAYS).copied().collect();
                let rest = WAYS - turn.len();
                self.last = turn.last().copied().filter(|_| rest == 0);
                ask.extend(turn);
                ask.extend(wanted.iter().take(rest));
            }
        }
        ask
    }
}

#[cfg(test)]
mod tests {
    use shroud_routing::HopKind;

    use super::*;

    fn addresses(count: u32) -> BTreeSet<IpAddr> {
        (0..count)
            .map(|number| IpAddr::from((0xac12_0000 + number).to_be_bytes()))
            .collect()
    }

    fn known(wanted: &BTreeSet<IpAddr>) -> BTreeMap<IpAddr, Hop> {
        let hop = Hop {
            device: None,
            via: None,
            source: None,
            kind: HopKind::NoRoute,
            mtu: None,
        };
        wanted.iter().map(|address| (*address, hop.clone())).collect()
    }

    #[test]
    fn each_way_has_its_turn() {
        let (mut ways, wanted) = (Ways::default(), addresses(1200));
        let known = known(&wanted);
        let mut asked = BTreeSet::new();

        let turns: Vec<usize> = (0..3)
            .map(|_| {
                let turn = ways.due(&wanted, &known, Look::At(Driver::Routing));
                asked.extend(turn.iter().copied());
                turn.len()
            })
            .collect();

        assert_eq!(turns, [WAYS, WAYS, WAYS]);
        assert_eq!(asked, wanted);
    }

    #[test]
    fn few_are_asked_for_at_once_and_what_is_new_always() {
        let (mut ways, wanted) = (Ways::default(), addresses(5));
        let mut known = known(&wanted);
        let new = *wanted.first().unwrap();

        for _ in 0..2 {
            assert_eq!(ways.due(&wanted, &known, Look::At(Driver::Routing)), wanted);
        }
        assert_eq!(ways.due(&wanted, &known, Look::Everything), wanted);
        assert_eq!(ways.due(&wanted, &known, Look::Nothing), [].into());
        assert_eq!(ways.due(&wanted, &known, Look::At(Driver::Gate)), [].into());
        known.remove(&new);
        assert_eq!(ways.due(&wanted, &known, Look::Nothing), [new].into());
    }
}
