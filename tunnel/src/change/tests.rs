//! `diff` against a model of what WireGuard does with each change.

use std::sync::Arc;

use proptest::collection::{btree_map, btree_set};
use proptest::option;
use proptest::prelude::*;
use shroud_model::PrivateKey;

use super::*;

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number + 9; 32]).unwrap()
}

fn prefix(number: u8) -> Prefix {
    format!("10.244.{number}.0/24").parse().unwrap()
}

fn desired(peers: BTreeMap<PublicKey, Peer>) -> Desired {
    Desired {
        device: "shroud0".to_owned(),
        backend: Backend::Userspace,
        private_key: Arc::new(PrivateKey::from_bytes([1; 32])),
        public_key: key(200),
        listen_port: 51820,
        mark: Mark::new(0x10, 0x30).unwrap(),
        peers,
    }
}

fn device(peers: BTreeMap<PublicKey, ObservedPeer>) -> Device {
    Device {
        backend: Backend::Userspace,
        public_key: Some(key(200)),
        listen_port: 51820,
        mark: 0x10,
        peers,
    }
}

fn observed(device: Device) -> Observed {
    Observed {
        at: now(),
        device: Some(device),
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
}

fn texts(changes: &[Change]) -> Vec<String> {
    changes.iter().map(Change::to_string).collect()
}

/// What WireGuard makes of a change (<https://www.wireguard.com/xplatform/>): a range belongs to one peer, the last to be given it.
fn wireguard(device: &mut Option<Device>, desired: &Desired, change: &Change) {
    if let Change::RemoveDevice { .. } = change {
        *device = None;
        return;
    }
    if let Change::CreateDevice { backend } = change {
        let blank = Device {
            backend: *backend,
            public_key: None,
            listen_port: 0,
            mark: 0,
            peers: BTreeMap::new(),
        };
        device.get_or_insert(blank);
        return;
    }
    let device = device.as_mut().expect("a change is made to a device that exists");
    let give = |device: &mut Device, peer: &PublicKey, ranges: &BTreeSet<Prefix>| {
        for (key, found) in &mut device.peers {
            found.allowed_ips.retain(|range| !ranges.contains(range));
            if key == peer {
                found.allowed_ips.extend(ranges.iter().copied());
            }
        }
    };
    match change {
        Change::RemoveDevice { .. } | Change::CreateDevice { .. } => {}
        Change::SetMark { new, .. } => device.mark = new.value(),
        Change::SetListenPort { new, .. } => device.listen_port = *new,
        Change::SetPrivateKey { new, .. } => {
            device.public_key = Some(*new);
            device.peers.remove(new);
        }
        Change::AddPeer {
            peer,
            endpoint,
            allowed_ips,
        } => {
            let wanted = &desired.peers[peer];
            let found = device.peers.entry(*peer).or_default();
            found.endpoint = *endpoint;
            found.preshared_key = wanted.preshared_key.clone();
            found.keepalive = wanted.keepalive;
            give(device, peer, allowed_ips);
        }
        Change::AddAllowedIps { peer, allowed_ips } => give(device, peer, allowed_ips),
        Change::RemoveAllowedIps { allowed_ips, .. } => {
            for found in device.peers.values_mut() {
                found.allowed_ips.retain(|range| !allowed_ips.contains(range));
            }
        }
        Change::SetEndpoint { peer, new, .. } => device.peers.get_mut(peer).unwrap().endpoint = Some(*new),
        Change::SetPresharedKey { peer, .. } => {
            device.peers.get_mut(peer).unwrap().preshared_key = desired.peers[peer].preshared_key.clone();
        }
        Change::SetKeepalive { peer, new, .. } => device.peers.get_mut(peer).unwrap().keepalive = *new,
        Change::RemovePeer { peer } => drop(device.peers.remove(peer)),
    }
}

fn owner(device: &Device, range: Prefix) -> Option<PublicKey> {
    device
        .peers
        .iter()
        .find(|(_, peer)| peer.allowed_ips.contains(&range))
        .map(|(key, _)| *key)
}

/// A byte of which a secret consists; secrets themselves cannot be printed, and so are made late.
fn some_byte() -> impl Strategy<Value = Option<u8>> {
    option::of(1u8..3)
}

fn secret(byte: u8) -> Arc<PresharedKey> {
    Arc::new(PresharedKey::from_bytes([byte; 32]))
}

fn some_endpoint() -> impl Strategy<Value = Option<SocketAddr>> {
    option::of((1u16..4).prop_map(|port| SocketAddr::from(([192, 0, 2, 1], port))))
}

fn some_keepalive() -> impl Strategy<Value = Option<Duration>> {
    option::of((1u64..4).prop_map(Duration::from_secs))
}

prop_compose! {
    fn a_peer()(endpoint in some_endpoint(), allowed_ips in btree_set((0u8..12).prop_map(prefix), 0..5),
                byte in some_byte(), keepalive in some_keepalive()) -> Peer {
        let preshared_key = byte.map(secret);
        Peer { endpoint, allowed_ips, preshared_key, keepalive }
    }
}

prop_compose! {
    fn a_found_peer()(endpoint in some_endpoint(), byte in some_byte(), keepalive in some_keepalive(),
                      age in option::of(0u64..400)) -> ObservedPeer {
        let preshared_key = byte.map(secret);
        let last_handshake = age.map(|age| now() - Duration::from_secs(age));
        ObservedPeer { endpoint, preshared_key, keepalive, last_handshake, ..ObservedPeer::default() }
    }
}

prop_compose! {
    /// A device on which each range has one owner, as WireGuard has it.
    fn a_device()(mut peers in btree_map((0u8..6).prop_map(key), a_found_peer(), 0..6), owners in proptest::collection::vec(option::of(0usize..6), 12))
                -> Device {
        for (number, owner) in owners.into_iter().enumerate() {
            if let Some(peer) = owner.and_then(|owner| peers.values_mut().nth(owner)) {
                peer.allowed_ips.insert(prefix(number as u8));
            }
        }
        device(peers)
    }
}

proptest! {
    #[test]
    fn changes_converge_and_no_range_is_without_an_owner_on_the_way(
        peers in btree_map((0u8..6).prop_map(key), a_peer(), 0..6),
        found in option::of(a_device()),
        same in any::<bool>(),
    ) {
        let desired = desired(peers);
        let mut found = found;
        if let Some(device) = found.as_mut().filter(|_| !same) {
            device.listen_port = 1;
            device.mark = 0;
            device.public_key = None;
        }
        let before = found.clone();

        let mut steps = vec![before.clone()];
        for change in diff(&desired, &Observed { at: now(), device: found.clone() }) {
            wireguard(&mut found, &desired, &change);
            steps.push(found.clone());
        }

        let after = found.clone().unwrap();
        prop_assert_eq!(texts(&diff(&desired, &observed(after.clone()))), Vec::<String>::new());
        prop_assert!(after.peers.keys().eq(desired.peers.keys()));
        for number in 0..12 {
            let range = prefix(number);
            let first = desired.peers.iter().find(|(_, peer)| peer.allowed_ips.contains(&range)).map(|(key, _)| *key);
            prop_assert_eq!(owner(&after, range), first);
            let had_one = before.as_ref().is_some_and(|device| owner(device, range).is_some());
            if had_one && first.is_some() {
                for device in steps.iter().flatten() {
                    prop_assert!(owner(device, range).is_some(), "{} had no owner on the way", range);
                }
            }
        }
    }
}

/// What a plan makes of nothing.
fn made(desired: &Desired) -> Device {
    let mut found = None;
    for change in diff(
        desired,
        &Observed {
            at: now(),
            device: None,
        },
    ) {
        wireguard(&mut found, desired, &change);
    }
    found.expect("the first step makes a device")
}

proptest! {
    #[test]
    fn two_plans_differ_as_the_device_between_them_does(
        peers in btree_map((0u8..6).prop_map(key), a_peer(), 0..6),
        changed in btree_map((0u8..6).prop_map(key), option::of(a_peer()), 0..3),
    ) {
        let before = desired(peers);
        let mut after = before.clone();
        for (key, peer) in changed {
            match peer {
                Some(peer) => drop(after.peers.insert(key, peer)),
                None => drop(after.peers.remove(&key)),
            }
        }

        if let Some(changes) = diff_plans(&after, &before) {
            prop_assert_eq!(changes, diff(&after, &observed(made(&before))));
        }
    }
}

#[test]
fn only_what_differs_between_two_plans_is_a_step() {
    let peer = |ranges: &[u8]| Peer {
        endpoint: Some("192.0.2.2:51820".parse().unwrap()),
        allowed_ips: ranges.iter().copied().map(prefix).collect(),
        ..Peer::default()
    };
    let before = desired([(key(1), peer(&[1])), (key(2), peer(&[2])), (key(3), peer(&[3, 4]))].into());
    let mut after = before.clone();
    after.peers.remove(&key(2));
    after.peers.insert(key(3), peer(&[4]));
    after.peers.insert(key(4), peer(&[2]));

    let steps = diff_plans(&after, &before).unwrap();

    let shown = |key: PublicKey| key.fingerprint();
    let (three, four, two) = (shown(key(3)), shown(key(4)), shown(key(2)));
    let expected = [
        format!("peer {four}: added, endpoint 192.0.2.2:51820, allowed IPs 10.244.2.0/24"),
        format!("peer {three}: allowed IPs 10.244.3.0/24 removed"),
        format!("peer {two}: removed"),
    ];
    assert_eq!(texts(&steps), expected);
    assert_eq!(diff_plans(&before, &before), Some(Vec::new()));
}

#[test]
fn only_the_device_can_tell_where_its_own_word_counts() {
    let peer = |endpoint: &str, range| Peer {
        endpoint: Some(endpoint.parse().unwrap()),
        allowed_ips: [prefix(range)].into(),
        ..Peer::default()
    };
    let before = desired([(key(1), peer("192.0.2.1:1", 1)), (key(2), peer("192.0.2.2:1", 2))].into());
    let changed = |change: &dyn Fn(&mut Desired)| {
        let mut after = before.clone();
        change(&mut after);
        diff_plans(&after, &before)
    };

    assert_eq!(changed(&|plan| plan.listen_port = 1), None);
    assert_eq!(
        changed(&|plan| drop(plan.peers.insert(key(1), peer("192.0.2.1:2", 1)))),
        None
    );
    assert_eq!(
        changed(&|plan| drop(plan.peers.insert(key(3), peer("192.0.2.3:1", 2)))),
        None
    );
}

#[test]
fn everything_is_made_in_order() {
    let peer = Peer {
        endpoint: Some("192.0.2.2:51820".parse().unwrap()),
        allowed_ips: BTreeSet::from([prefix(2), prefix(3)]),
        ..Peer::default()
    };
    let desired = desired(BTreeMap::from([(key(0), peer)]));

    let changes = diff(
        &desired,
        &Observed {
            at: now(),
            device: None,
        },
    );

    assert_eq!(
        texts(&changes),
        [
            "userspace device: created",
            "mark 0x0 -> 0x10",
            "listen port 0 -> 51820",
            "key none -> 0dHR0dHR",
            "peer CQkJCQkJ: added, endpoint 192.0.2.2:51820, allowed IPs 10.244.2.0/24 10.244.3.0/24",
        ]
    );
}

#[test]
fn another_backend_ends_the_old_device_first() {
    let other = Device {
        backend: Backend::Kernel,
        ..device(BTreeMap::new())
    };

    let changes = diff(&desired(BTreeMap::new()), &observed(other));

    assert_eq!(
        texts(&changes)[..2],
        ["kernel device: removed", "userspace device: created"]
    );
}

#[test]
fn a_range_that_moves_is_given_and_not_taken() {
    let peers = BTreeMap::from([
        (key(0), Peer::default()),
        (
            key(1),
            Peer {
                allowed_ips: BTreeSet::from([prefix(2)]),
                ..Peer::default()
            },
        ),
    ]);
    let found = BTreeMap::from([
        (
            key(0),
            ObservedPeer {
                allowed_ips: BTreeSet::from([prefix(2), prefix(3)]),
                ..ObservedPeer::default()
            },
        ),
        (key(1), ObservedPeer::default()),
    ]);

    let changes = diff(&desired(peers), &observed(device(found)));

    assert_eq!(
        texts(&changes),
        [
            "peer CgoKCgoK: allowed IPs 10.244.2.0/24 added",
            "peer CQkJCQkJ: allowed IPs 10.244.3.0/24 removed"
        ]
    );
}

#[test]
fn an_endpoint_is_only_set_where_wireguard_does_not_know_better() {
    let (wanted, learned) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.9:9".parse().unwrap());
    let changes = |endpoint, handshake: Option<SystemTime>, wish| {
        let peers = BTreeMap::from([(
            key(0),
            Peer {
                endpoint: wish,
                ..Peer::default()
            },
        )]);
        let found = ObservedPeer {
            endpoint,
            last_handshake: handshake,
            ..ObservedPeer::default()
        };
        texts(&diff(
            &desired(peers),
            &observed(device(BTreeMap::from([(key(0), found)]))),
        ))
    };
    let ago = |seconds| Some(now() - Duration::from_secs(seconds));
    let set = ["peer CQkJCQkJ: endpoint 192.0.2.9:9 -> 192.0.2.1:1".to_owned()];

    assert_eq!(
        changes(Some(learned), ago(179), Some(wanted)),
        [] as [String; 0],
        "it roams"
    );
    assert_eq!(changes(Some(learned), ago(180), Some(wanted)), set);
    assert_eq!(changes(Some(learned), None, Some(wanted)), set);
    assert_eq!(
        changes(Some(learned), Some(now() + Duration::from_secs(9)), Some(wanted)),
        set,
        "the clock was set back"
    );
    assert_eq!(
        changes(Some(learned), None, None),
        [] as [String; 0],
        "no wish, no change"
    );
    assert_eq!(
        changes(None, ago(1), Some(wanted)),
        ["peer CQkJCQkJ: endpoint none -> 192.0.2.1:1"]
    );
}

#[test]
fn our_own_key_among_the_peers_is_passed_over() {
    let peers = BTreeMap::from([(
        key(200),
        Peer {
            allowed_ips: BTreeSet::from([prefix(1)]),
            ..Peer::default()
        },
    )]);

    assert_eq!(diff(&desired(peers), &observed(device(BTreeMap::new()))), []);
}

#[test]
fn a_keepalive_is_counted_in_whole_seconds() {
    assert_eq!(seconds(None), None);
    assert_eq!(seconds(Some(Duration::from_millis(1))), Some(1));
    assert_eq!(seconds(Some(Duration::from_millis(25_900))), Some(25));
    assert_eq!(seconds(Some(Duration::from_secs(1 << 20))), Some(65535));
}
