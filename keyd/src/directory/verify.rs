//! What can be said of one record by looking at it alone: which of its claims are sound.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use shroud_model::{Family, Prefix};

use super::{EndpointFlaw, MAX_POD_PREFIXES, Problem, Reason};
use crate::{Announcement, Record};

/// The shortest pod prefix a single node may have. A /8 and a /32 are far more than any node's pods; what is wider is a slip of the
/// authority that would pull the whole mesh's traffic to one node.
const fn shortest(family: Family) -> u8 {
    match family {
        Family::V4 => 8,
        Family::V6 => 32,
    }
}

/// The sound claims of one record, and what is wrong with the rest.
pub(super) struct Claims {
    /// The announcement, with its usable endpoints only.
    pub(super) announcement: Result<Announcement, Reason>,
    /// The pod prefixes that may be a node's.
    pub(super) prefixes: BTreeSet<Prefix>,
    /// The underlay addresses that can be a node's.
    pub(super) addresses: Vec<IpAddr>,
    /// What is wrong with the authority's half.
    pub(super) reasons: Vec<Reason>,
    /// What is wrong, but not enough to refuse the node.
    pub(super) problems: Vec<Problem>,
}

impl Claims {
    /// Looks at a record. `seen` is the highest epoch this node has announced before.
    pub(super) fn of(record: &Record, seen: Option<u64>, protected: &BTreeSet<Prefix>) -> Self {
        let mut claims = Self {
            announcement: Err(Reason::NoAnnouncement),
            prefixes: BTreeSet::new(),
            addresses: addresses(record, protected),
            reasons: Vec::new(),
            problems: Vec::new(),
        };
        claims.take_prefixes(record, protected);
        claims.announcement = claims.take_announcement(record, seen, protected);
        claims
    }

    fn take_prefixes(&mut self, record: &Record, protected: &BTreeSet<Prefix>) {
        let given: BTreeSet<Prefix> = record.pod_prefixes.iter().copied().collect();
        if given.len() > MAX_POD_PREFIXES {
            self.reasons.push(Reason::TooManyPrefixes(given.len()));
        }
        for prefix in given.into_iter().take(MAX_POD_PREFIXES) {
            if prefix.length() < shortest(prefix.family()) {
                self.reasons.push(Reason::PrefixTooWide(prefix));
            } else if !protected.iter().any(|range| range.covers(prefix)) {
                self.reasons.push(Reason::PrefixNotProtected(prefix));
            } else {
                self.prefixes.insert(prefix);
            }
        }
    }

    fn take_announcement(
        &mut self,
        record: &Record,
        seen: Option<u64>,
        protected: &BTreeSet<Prefix>,
    ) -> Result<Announcement, Reason> {
        let raw = record.announcement.as_deref().ok_or(Reason::NoAnnouncement)?;
        let mut announcement = Announcement::parse(raw).map_err(Reason::Announcement)?;
        if let Some(seen) = seen.filter(|&seen| announcement.epoch < seen) {
            return Err(Reason::Replay {
                epoch: announcement.epoch,
                seen,
            });
        }

        let flaw = |endpoint: SocketAddr| endpoint_flaw(endpoint, &record.addresses, protected);
        let bad: Vec<(SocketAddr, EndpointFlaw)> = announcement
            .endpoints
            .iter()
            .filter_map(|&endpoint| Some((endpoint, flaw(endpoint)?)))
            .collect();
        announcement.endpoints.retain(|&endpoint| flaw(endpoint).is_none());
        if announcement.endpoints.is_empty() {
            return Err(Reason::NoEndpoint(bad));
        }
        let problem = |(endpoint, flaw)| Problem::Endpoint {
            node: record.node.clone(),
            endpoint,
            flaw,
        };
        self.problems.extend(bad.into_iter().map(problem));
        Ok(announcement)
    }
}

/// The addresses of a record that another machine on the underlay can have, each once.
fn addresses(record: &Record, protected: &BTreeSet<Prefix>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in record.addresses.iter().map(IpAddr::to_canonical) {
        let is_pod = protected.iter().any(|range| range.contains(address));
        if is_underlay(address) && !is_pod && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Why nothing is sent to an endpoint, or `None` when it is good.
fn endpoint_flaw(endpoint: SocketAddr, addresses: &[IpAddr], protected: &BTreeSet<Prefix>) -> Option<EndpointFlaw> {
    let address = endpoint.ip();
    if endpoint.port() == 0 {
        return Some(EndpointFlaw::NoPort);
    }
    if !is_underlay(address) {
        return Some(EndpointFlaw::NotUnderlay);
    }
    if protected.iter().any(|range| range.contains(address)) {
        return Some(EndpointFlaw::Pod);
    }
    if !addresses.iter().any(|known| known.to_canonical() == address) {
        return Some(EndpointFlaw::NotItsAddress);
    }
    None
}

/// Whether an address can be another machine's on the underlay.
fn is_underlay(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(link_local || address.is_loopback() || address.is_unspecified() || address.is_multicast())
}
