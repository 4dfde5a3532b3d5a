//! Whom the directory believes, in which order, and for how long.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use proptest::prelude::*;
use shroud_keyd::announcement::{AnnouncedKey, Backend, EncryptScope, Mode};
use shroud_keyd::directory::{EndpointFlaw, MAX_NODES, MAX_OPT_OUTS, Origin, Own};
use shroud_keyd::opt_out::OptOutBy;
use shroud_keyd::{
    Announcement, Directory, Event, Excerpt, Local, OptOut, OptOuts, Peer, Problem, PublicKeys, Reason, Record,
    Refusal, Snapshot, Unreadable,
};
use shroud_model::{InvalidKey, NodeName, Prefix, PublicKey};

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn prefixes(texts: &[&str]) -> BTreeSet<Prefix> {
    texts.iter().map(|text| prefix(text)).collect()
}

fn key(seed: u8) -> PublicKey {
    PublicKey::from_bytes([seed; 32]).unwrap()
}

/// The node `me` with key 1 and 10.244.0.0/24; the mesh's pods live in 10.244.0.0/16 and fd00:10:244::/48.
fn directory() -> Directory {
    let local = Local {
        node: name("me"),
        keys: PublicKeys::only(key(1), 1),
        pod_prefixes: Some(prefixes(&["10.244.0.0/24"])),
    };
    Directory::new(local, prefixes(&["10.244.0.0/16", "fd00:10:244::/48"]))
}

/// A sound record: address 172.18.0.`host`, prefix 10.244.`host`.0/24, key `host`, epoch 1.
fn node(text: &str, host: u8) -> Builder {
    Builder {
        node: text.to_owned(),
        addresses: vec![format!("172.18.0.{host}")],
        pods: vec![format!("10.244.{host}.0/24")],
        announcement: Announcement {
            public_key: key(host),
            listen_port: NonZeroU16::new(51820).unwrap(),
            endpoints: vec![format!("172.18.0.{host}:51820").parse().unwrap()],
            epoch: 1,
            next_key: None,
            backend: Backend::Userspace,
            mode: Mode::Native,
            overlays: Vec::new(),
            routable: false,
            encrypts_nodes: false,
            scope: EncryptScope::All,
        },
        raw: None,
    }
}

#[derive(Clone)]
struct Builder {
    node: String,
    addresses: Vec<String>,
    pods: Vec<String>,
    announcement: Announcement,
    raw: Option<Option<String>>,
}

impl Builder {
    fn next(mut self, seed: u8) -> Self {
        self.announcement.next_key = Some(AnnouncedKey {
            public_key: key(seed),
            epoch: self.announcement.epoch + 1,
        });
        self
    }

    fn key(mut self, seed: u8) -> Self {
        self.announcement.public_key = key(seed);
        self
    }

    fn pods(mut self, texts: &[&str]) -> Self {
        self.pods = texts.iter().map(|&text| text.to_owned()).collect();
        self
    }

    fn address(mut self, text: &str) -> Self {
        self.addresses.push(text.to_owned());
        self
    }

    fn endpoints(mut self, texts: &[&str]) -> Self {
        self.announcement.endpoints = texts.iter().map(|text| text.parse().unwrap()).collect();
        self
    }

    fn epoch(mut self, epoch: u64) -> Self {
        self.announcement.epoch = epoch;
        self
    }

    fn silent(mut self) -> Self {
        self.raw = Some(None);
        self
    }

    fn announcing(mut self, raw: &str) -> Self {
        self.raw = Some(Some(raw.to_owned()));
        self
    }

    fn record(&self) -> Record {
        Record {
            node: name(&self.node),
            addresses: self.addresses.iter().map(|text| text.parse().unwrap()).collect(),
            pod_prefixes: self.pods.iter().map(|text| prefix(text)).collect(),
            zone: None,
            announcement: self.raw.clone().unwrap_or_else(|| Some(self.announcement.to_json())),
        }
    }
}

fn list(nodes: &[Builder]) -> Vec<Result<Record, Unreadable>> {
    nodes.iter().map(|node| Ok(node.record())).collect()
}

fn unreadable(node: &str) -> Unreadable {
    Unreadable {
        node: Some(name(node)),
        reason: "cut off".to_owned(),
    }
}

fn after(lists: &[&[Builder]]) -> Directory {
    let mut directory = directory();
    for nodes in lists {
        directory.reset(list(nodes));
    }
    directory
}

fn snapshot(directory: &Directory) -> Arc<Snapshot> {
    directory.snapshot().expect("there was a list")
}

/// Who is a peer with which key, and who is refused for which reasons and which prefixes it keeps.
type View = (
    BTreeMap<String, PublicKey>,
    BTreeMap<String, (Vec<Reason>, Vec<String>)>,
);

fn view(directory: &Directory) -> View {
    let snapshot = snapshot(directory);
    let peers = snapshot
        .peers
        .iter()
        .map(|(node, peer)| (node.to_string(), peer.public_key));
    let refused = snapshot.refused.iter().map(|(node, refused)| {
        let prefixes = refused.pod_prefixes.iter().map(Prefix::to_string).collect();
        (node.to_string(), (refused.reasons.clone(), prefixes))
    });
    (peers.collect(), refused.collect())
}

fn peers<const N: usize>(expected: [(&str, u8); N]) -> BTreeMap<String, PublicKey> {
    expected
        .into_iter()
        .map(|(node, seed)| (node.to_owned(), key(seed)))
        .collect()
}

fn refused<const N: usize>(expected: [(&str, Reason, &[&str]); N]) -> BTreeMap<String, (Vec<Reason>, Vec<String>)> {
    expected
        .into_iter()
        .map(|(node, reason, prefixes)| {
            (
                node.to_owned(),
                (vec![reason], prefixes.iter().map(|&prefix| prefix.to_owned()).collect()),
            )
        })
        .collect()
}

#[test]
fn there_is_no_snapshot_before_the_first_complete_list() {
    let mut directory = directory();
    directory.apply(Ok(node("a", 2).record()));
    assert_eq!(directory.snapshot(), None);

    directory.reset(list(&[node("a", 2)]));

    let expected = Snapshot {
        origin: Origin::Source,
        own: Own {
            pod_prefixes: prefixes(&["10.244.0.0/24"]),
            addresses: Vec::new(),
            zone: None,
        },
        peers: BTreeMap::from([(
            name("a"),
            Arc::new(Peer {
                public_key: key(2),
                endpoints: vec!["172.18.0.2:51820".parse().unwrap()],
                pod_prefixes: prefixes(&["10.244.2.0/24"]),
                addresses: vec!["172.18.0.2".parse().unwrap()],
                epoch: 1,
                next_key: None,
                backend: Backend::Userspace,
                mode: Mode::Native,
                overlays: Vec::new(),
                routable: false,
                encrypts_nodes: false,
                scope: EncryptScope::All,
                zone: None,
            }),
        )]),
        refused: BTreeMap::new(),
        opted_out: None,
        problems: Vec::new(),
    };
    assert_eq!(*snapshot(&directory), expected);
}

#[test]
fn a_node_without_a_sound_key_is_refused_and_its_prefix_is_fenced_in_its_name() {
    let zero = node("a", 2)
        .announcement
        .to_json()
        .replace(&key(2).to_string(), &format!("{}=", "A".repeat(43)));
    let cases = [
        (node("a", 2).silent(), Reason::NoAnnouncement),
        (
            node("a", 2).announcing(&zero),
            Reason::Announcement(Refusal::Key(InvalidKey::LowOrder)),
        ),
        (
            node("a", 2).announcing("{}"),
            Reason::Announcement(Refusal::Missing("version")),
        ),
        (
            node("a", 2).announcing("\u{1b}"),
            Reason::Announcement(Refusal::NotJson { line: 1, column: 1 }),
        ),
        (
            node("a", 2).announcing(&" ".repeat(5000)),
            Reason::Announcement(Refusal::TooLong {
                bytes: 5000,
                limit: 4096,
            }),
        ),
        (node("a", 2).key(1), Reason::OwnKey),
    ];
    for (bad, reason) in cases {
        let expected = (peers([("b", 3)]), refused([("a", reason, &["10.244.2.0/24"])]));

        assert_eq!(view(&after(&[&[bad, node("b", 3)]])), expected);
    }
}

#[test]
fn each_reason_has_a_word_that_stays() {
    let rival = || name("b");
    let pods = prefix("10.244.2.0/24");
    let words = [
        (
            Reason::Denied {
                what: "key",
                remark: Excerpt::of("stolen"),
            },
            "denied",
        ),
        (Reason::NoAnnouncement, "no-announcement"),
        (Reason::Announcement(Refusal::NotText), "announcement-refused"),
        (Reason::Replay { epoch: 1, seen: 2 }, "replay"),
        (Reason::NoEndpoint(Vec::new()), "no-endpoint"),
        (Reason::OwnKey, "own-key"),
        (
            Reason::KeyHeld {
                key: key(2),
                holder: rival(),
            },
            "key-held",
        ),
        (
            Reason::KeyContested {
                key: key(2),
                rival: rival(),
            },
            "key-contested",
        ),
        (
            Reason::PrefixHeld {
                prefix: pods,
                holder: rival(),
            },
            "prefix-held",
        ),
        (
            Reason::PrefixContested {
                prefix: pods,
                rival: rival(),
            },
            "prefix-contested",
        ),
        (Reason::PrefixNotProtected(pods), "prefix-not-protected"),
        (Reason::PrefixTooWide(pods), "prefix-too-wide"),
        (Reason::TooManyPrefixes(17), "too-many-prefixes"),
        (Reason::Unreadable("cut off".to_owned()), "unreadable"),
    ];

    for (reason, word) in &words {
        assert_eq!(reason.id(), *word, "{reason}");
    }
    assert_eq!(words.map(|(_, word)| word).as_slice(), Reason::IDS);
}

#[test]
fn the_first_holder_keeps_a_key_and_the_second_is_told_who_holds_it() {
    let directory = after(&[&[node("b", 3)], &[node("a", 2).key(3), node("b", 3)]]);

    let reason = Reason::KeyHeld {
        key: key(3),
        holder: name("b"),
    };
    assert_eq!(
        view(&directory),
        (peers([("b", 3)]), refused([("a", reason, &["10.244.2.0/24"])]))
    );
}

#[test]
fn the_first_holder_keeps_a_prefix_whatever_overlaps_it() {
    for claim in ["10.244.3.0/24", "10.244.3.128/25", "10.244.2.0/23"] {
        let claimer = node("a", 2).pods(&[claim, "10.244.9.0/24"]);
        let directory = after(&[&[node("b", 3)], &[claimer, node("b", 3)]]);

        let reason = Reason::PrefixHeld {
            prefix: prefix(claim),
            holder: name("b"),
        };
        assert_eq!(
            view(&directory),
            (peers([("b", 3)]), refused([("a", reason, &["10.244.9.0/24"])])),
            "{claim}"
        );
    }
}

#[test]
fn two_that_come_at_once_are_both_refused() {
    let directory = after(&[&[node("a", 2).key(9), node("b", 3).key(9)]]);
    let reason = |rival| Reason::KeyContested {
        key: key(9),
        rival: name(rival),
    };
    let expected = refused([
        ("a", reason("b"), &["10.244.2.0/24"]),
        ("b", reason("a"), &["10.244.3.0/24"]),
    ]);
    assert_eq!(view(&directory), (peers([]), expected));

    let directory = after(&[&[
        node("a", 2).pods(&["10.244.9.0/24"]),
        node("b", 3).pods(&["10.244.8.0/23"]),
    ]]);
    let reason = |given, rival| Reason::PrefixContested {
        prefix: prefix(given),
        rival: name(rival),
    };
    let expected = refused([
        ("a", reason("10.244.9.0/24", "b"), &[]),
        ("b", reason("10.244.8.0/23", "a"), &[]),
    ]);
    assert_eq!(view(&directory), (peers([]), expected));
}

#[test]
fn the_survivor_of_a_contest_is_served_when_its_rival_gives_up() {
    let mut directory = after(&[&[node("a", 2).key(9), node("b", 3).key(9)]]);

    directory.apply(Ok(node("b", 3).record()));

    assert_eq!(view(&directory), (peers([("a", 9), ("b", 3)]), refused([])));
}

#[test]
fn this_node_always_holds_its_own_prefixes() {
    let directory = after(&[&[node("a", 2).pods(&["10.244.0.128/25", "10.244.2.0/24"])]]);

    let reason = Reason::PrefixHeld {
        prefix: prefix("10.244.0.128/25"),
        holder: name("me"),
    };
    assert_eq!(
        view(&directory),
        (peers([]), refused([("a", reason, &["10.244.2.0/24"])]))
    );
}

#[test]
fn the_first_holder_keeps_an_address_and_the_second_stays_a_peer_without_it() {
    let first = || node("a", 2);
    let second = || {
        let mut second = node("b", 3);
        second.addresses.push("172.18.0.2".to_owned());
        second
    };
    let addresses = |directory: &Directory, node: &str| snapshot(directory).peers[&name(node)].addresses.clone();
    let unused = |holder: Option<&str>, unused: &[&str]| Problem::Address {
        address: "172.18.0.2".parse().unwrap(),
        holder: holder.map(name),
        unused: unused.iter().map(|node| name(node)).collect(),
    };
    let own = |host: u8| vec![IpAddr::from([172, 18, 0, host])];

    let known = after(&[&[first()], &[first(), second()]]);
    assert_eq!((addresses(&known, "a"), addresses(&known, "b")), (own(2), own(3)));
    assert_eq!(snapshot(&known).problems, [unused(Some("a"), &["b"])]);

    let mut restarted = directory();
    restarted.restore(known.memory());
    restarted.reset(list(&[first(), second()]));
    assert_eq!(snapshot(&restarted).problems, [unused(Some("a"), &["b"])]);

    let at_once = after(&[&[first(), second()]]);
    assert_eq!(
        (addresses(&at_once, "a"), addresses(&at_once, "b")),
        (Vec::new(), own(3))
    );
    assert_eq!(snapshot(&at_once).problems, [unused(None, &["a", "b"])]);
}

#[test]
fn addresses_no_other_machine_can_have_are_left_out() {
    let mut node = node("a", 2);
    node.addresses
        .extend(["127.0.0.1", "fe80::1", "10.244.9.9", "0.0.0.0", "::ffff:172.18.0.2"].map(str::to_owned));

    let directory = after(&[&[node]]);

    assert_eq!(
        snapshot(&directory).peers[&name("a")].addresses,
        [IpAddr::from([172, 18, 0, 2])]
    );
}

#[test]
fn a_refused_node_keeps_its_addresses_fenced_only_if_it_ever_had_a_key() {
    let addresses = |directory: &Directory| snapshot(directory).refused[&name("a")].addresses.clone();

    let new = after(&[&[node("a", 2).silent()]]);
    let withdrawn = after(&[&[node("a", 2)], &[node("a", 2).silent()]]);
    let spoiled = after(&[&[node("a", 2).announcing("{}")]]);

    assert_eq!(addresses(&new), [] as [IpAddr; 0]);
    assert_eq!(addresses(&withdrawn), [IpAddr::from([172, 18, 0, 2])]);
    assert_eq!(addresses(&spoiled), [IpAddr::from([172, 18, 0, 2])]);
}

#[test]
fn a_spoiled_announcement_does_not_set_the_key_free() {
    let mut directory = after(&[&[node("a", 2), node("b", 3)]]);

    directory.apply(Ok(node("a", 2).silent().record()));
    directory.apply(Ok(node("b", 3).key(2).record()));

    let reason = Reason::KeyHeld {
        key: key(2),
        holder: name("a"),
    };
    let fenced: &[&str] = &["10.244.3.0/24"];
    let expected = refused([("a", Reason::NoAnnouncement, &["10.244.2.0/24"]), ("b", reason, fenced)]);
    assert_eq!(view(&directory), (peers([]), expected));
    directory.apply(Ok(node("a", 2).record()));
    assert!(snapshot(&directory).peers.contains_key(&name("a")));
}

#[test]
fn a_new_key_sets_the_old_one_free() {
    let mut directory = after(&[&[node("a", 2), node("b", 3)]]);

    directory.apply(Ok(node("a", 2).key(8).epoch(2).record()));
    directory.apply(Ok(node("c", 4).key(2).record()));

    assert_eq!(view(&directory), (peers([("a", 8), ("b", 3), ("c", 2)]), refused([])));
}

#[test]
fn a_key_set_free_serves_another_claimer_in_the_same_list() {
    let directory = after(&[&[node("a", 2)], &[node("a", 2).key(8).epoch(2), node("c", 4).key(2)]]);

    assert_eq!(view(&directory), (peers([("a", 8), ("c", 2)]), refused([])));
}

/// The words of the reasons why a node is refused.
fn reasons(directory: &Directory, node: &str) -> Vec<&'static str> {
    let snapshot = snapshot(directory);
    snapshot.refused[&name(node)].reasons.iter().map(Reason::id).collect()
}

/// The keys to come that are used.
fn next_keys(directory: &Directory) -> Vec<(String, PublicKey)> {
    let snapshot = snapshot(directory);
    let peers = snapshot.peers.iter();
    peers
        .filter_map(|(node, peer)| Some((node.to_string(), peer.next_key?.public_key)))
        .collect()
}

#[test]
fn a_node_holds_its_next_key_and_then_has_it() {
    let mut directory = after(&[&[node("a", 2).next(8)]]);
    assert_eq!(next_keys(&directory), [("a".to_owned(), key(8))]);

    // Nobody takes it meanwhile, as either.
    directory.apply(Ok(node("b", 3).key(8).record()));
    assert_eq!(reasons(&directory, "b"), ["key-held"]);
    directory.apply(Ok(node("b", 3).next(8).record()));
    assert_eq!(view(&directory), (peers([("a", 2), ("b", 3)]), refused([])));
    assert_eq!(next_keys(&directory), [("a".to_owned(), key(8))]);

    directory.apply(Ok(node("a", 2).key(8).epoch(2).record()));
    assert_eq!(view(&directory), (peers([("a", 8), ("b", 3)]), refused([])));
    assert_eq!(next_keys(&directory), []);
    // Now the old announcement is one that is played again, and the old key is free.
    directory.apply(Ok(node("c", 4).key(2).record()));
    directory.apply(Ok(node("a", 2).next(8).record()));
    assert_eq!(reasons(&directory, "a"), ["replay"]);
    assert_eq!(snapshot(&directory).peers[&name("c")].public_key, key(2));
}

#[test]
fn a_next_key_that_is_not_its_own_costs_a_node_nothing_but_that_key() {
    let says = |directory: &Directory| -> Vec<String> {
        snapshot(directory).problems.iter().map(ToString::to_string).collect()
    };

    let directory = after(&[&[node("a", 2), node("b", 3).next(2)]]);
    assert_eq!(view(&directory), (peers([("a", 2), ("b", 3)]), refused([])));
    assert_eq!(next_keys(&directory), []);
    let fingerprint = key(2).fingerprint();
    assert_eq!(
        says(&directory),
        [format!(
            "node b: its next key {fingerprint}.. is not used: node a holds it"
        )]
    );

    let directory = after(&[&[node("a", 2).next(1), node("b", 3).next(9), node("c", 4).next(9)]]);
    assert_eq!(next_keys(&directory), []);
    assert_eq!(says(&directory).len(), 3, "{:?}", says(&directory));
}

#[test]
fn a_next_key_is_kept_while_its_announcement_is_spoiled_and_set_free_by_a_better_one() {
    let mut directory = after(&[&[node("a", 2).next(8)]]);
    directory.apply(Ok(node("a", 2).announcing("nonsense").record()));
    directory.apply(Ok(node("b", 3).next(8).record()));
    assert_eq!(next_keys(&directory), []);

    directory.apply(Ok(node("a", 2).next(9).record()));

    assert_eq!(
        next_keys(&directory),
        [("a".to_owned(), key(9)), ("b".to_owned(), key(8))]
    );
}

#[test]
fn this_node_holds_its_next_key_too() {
    let mut directory = after(&[&[node("a", 2), node("b", 8)]]);
    assert_eq!(view(&directory), (peers([("a", 2), ("b", 8)]), refused([])));
    let next = AnnouncedKey {
        public_key: key(8),
        epoch: 2,
    };

    directory.set_own_keys(PublicKeys {
        next: Some(next),
        ..PublicKeys::only(key(1), 1)
    });
    assert_eq!(reasons(&directory, "b"), ["own-key"]);

    directory.set_own_keys(PublicKeys::only(key(9), 2));
    directory.apply(Ok(node("b", 8).record()));
    assert_eq!(view(&directory), (peers([("a", 2), ("b", 8)]), refused([])));
}

#[test]
fn prefixes_must_be_protected_and_not_absurdly_wide() {
    let wide: BTreeSet<Prefix> = prefixes(&["0.0.0.0/0", "::/0"]);
    let local = Local {
        node: name("me"),
        keys: PublicKeys::only(key(1), 1),
        pod_prefixes: Some(BTreeSet::new()),
    };
    let mut everything = Directory::new(local, wide);
    for (given, too_wide) in [
        ("0.0.0.0/0", true),
        ("10.0.0.0/7", true),
        ("10.0.0.0/8", false),
        ("fd00::/31", true),
        ("fd00::/32", false),
    ] {
        // Endpoints may not be protected, so this node is refused in any case; only its prefix matters here.
        everything.reset(list(&[node("a", 2).pods(&[given]).silent()]));
        let reasons = &snapshot(&everything).refused[&name("a")].reasons;
        let reason = Reason::PrefixTooWide(prefix(given));
        assert_eq!(reasons.contains(&reason), too_wide, "{given}");
    }

    let directory = after(&[&[node("a", 2).pods(&["10.245.0.0/24", "10.244.2.0/24"])]]);
    let reason = Reason::PrefixNotProtected(prefix("10.245.0.0/24"));
    assert_eq!(
        view(&directory),
        (peers([]), refused([("a", reason, &["10.244.2.0/24"])]))
    );
}

#[test]
fn more_prefixes_than_allowed_refuse_the_node() {
    let many: Vec<String> = (0..17).map(|low| format!("10.244.{}.0/24", 100 + low)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();

    let directory = after(&[&[node("a", 2).pods(&many)]]);

    assert_eq!(
        view(&directory),
        (peers([]), refused([("a", Reason::TooManyPrefixes(17), &many[..16])]))
    );
}

#[test]
fn an_endpoint_must_be_one_of_the_nodes_own_addresses_on_the_underlay() {
    let cases = [
        ("172.18.0.2:0", EndpointFlaw::NoPort),
        ("127.0.0.1:51820", EndpointFlaw::NotUnderlay),
        ("0.0.0.0:51820", EndpointFlaw::NotUnderlay),
        ("169.254.0.1:51820", EndpointFlaw::NotUnderlay),
        ("224.0.0.1:51820", EndpointFlaw::NotUnderlay),
        ("255.255.255.255:51820", EndpointFlaw::NotUnderlay),
        ("[::1]:51820", EndpointFlaw::NotUnderlay),
        ("[::]:51820", EndpointFlaw::NotUnderlay),
        ("[fe80::1]:51820", EndpointFlaw::NotUnderlay),
        ("[ff02::1]:51820", EndpointFlaw::NotUnderlay),
        ("[::ffff:127.0.0.1]:51820", EndpointFlaw::NotUnderlay),
        ("10.244.3.7:51820", EndpointFlaw::Pod),
        ("172.18.0.3:51820", EndpointFlaw::NotItsAddress),
    ];
    for (text, flaw) in cases {
        // The authority lists them all; only the last one is somebody else's.
        let address = text.parse::<std::net::SocketAddr>().unwrap().ip().to_string();
        let listed = |node: Builder| {
            if flaw == EndpointFlaw::NotItsAddress {
                node
            } else {
                node.address(&address)
            }
        };
        let endpoint = std::net::SocketAddr::new(
            address.parse::<IpAddr>().unwrap().to_canonical(),
            if flaw == EndpointFlaw::NoPort { 0 } else { 51820 },
        );

        let directory = after(&[&[listed(node("a", 2)).endpoints(&[text])]]);
        let reason = Reason::NoEndpoint(vec![(endpoint, flaw)]);
        assert_eq!(
            view(&directory),
            (peers([]), refused([("a", reason, &["10.244.2.0/24"])])),
            "{text}"
        );

        let directory = after(&[&[listed(node("a", 2)).endpoints(&[text, "172.18.0.2:51820"])]]);
        let snapshot = snapshot(&directory);
        assert_eq!(
            snapshot.peers[&name("a")].endpoints,
            ["172.18.0.2:51820".parse().unwrap()],
            "{text}"
        );
        assert_eq!(
            snapshot.problems,
            [Problem::Endpoint {
                node: name("a"),
                endpoint,
                flaw
            }],
            "{text}"
        );
    }
}

#[test]
fn an_old_announcement_is_not_believed_again() {
    let mut directory = after(&[&[node("a", 2)]]);
    directory.apply(Ok(node("a", 2).key(8).epoch(2).record()));

    directory.apply(Ok(node("a", 2).record()));

    let reason = Reason::Replay { epoch: 1, seen: 2 };
    let expected = (peers([]), refused([("a", reason, &["10.244.2.0/24"])]));
    assert_eq!(view(&directory), expected);

    // Nor after a restart.
    let mut restarted = crate::directory();
    restarted.restore(directory.memory());
    assert_eq!(view(&restarted), expected);
    restarted.reset(list(&[node("a", 2)]));
    assert_eq!(view(&restarted), expected);

    // But a node that was gone is a new node.
    restarted.delete(&name("a"));
    restarted.apply(Ok(node("a", 2).record()));
    assert_eq!(view(&restarted), (peers([("a", 2)]), refused([])));
}

#[test]
fn an_unreadable_record_leaves_the_last_good_one() {
    let mut directory = after(&[&[node("a", 2)]]);

    directory.reset(vec![Err(unreadable("a")), Err(unreadable("b"))]);

    let reason = Reason::Unreadable("cut off".to_owned());
    assert_eq!(view(&directory), (peers([("a", 2)]), refused([("b", reason, &[])])));
    let problem = |node| Problem::Unreadable {
        node: Some(name(node)),
        reason: "cut off".to_owned(),
    };
    assert_eq!(snapshot(&directory).problems, [problem("a"), problem("b")]);
}

#[test]
fn a_node_that_is_listed_twice_with_different_words_is_unreadable() {
    let directory = after(&[&[node("a", 2)], &[node("a", 2), node("a", 2), node("a", 3)]]);

    assert_eq!(view(&directory), (peers([("a", 2)]), refused([])));
    assert_eq!(snapshot(&directory).problems.len(), 1);
}

#[test]
fn a_list_that_shrinks_a_little_is_believed() {
    let five = [node("a", 2), node("b", 3), node("c", 4), node("d", 5), node("e", 6)];
    assert_eq!(snapshot(&after(&[&five, &five[1..]])).peers.len(), 4);
    let ten: Vec<Builder> = (2..12).map(|host| node(&format!("n{host}"), host)).collect();
    assert_eq!(
        snapshot(&after(&[&ten, &ten[2..]])).peers.len(),
        8,
        "a fifth is not more than a fifth"
    );
    assert_eq!(
        snapshot(&after(&[&five[..2], &five[..1]])).peers.len(),
        1,
        "one node is never too much"
    );
}

#[test]
fn a_list_that_shrinks_a_lot_needs_a_second_one_that_agrees() {
    let five = [node("a", 2), node("b", 3), node("c", 4), node("d", 5), node("e", 6)];
    let mut directory = after(&[&five, &five[..3]]);
    let brake = Problem::Brake {
        missing: BTreeSet::from([name("d"), name("e")]),
        known: 5,
    };
    assert_eq!(snapshot(&directory).peers.len(), 5);
    assert_eq!(snapshot(&directory).problems, [brake]);

    // Another accident is not agreement.
    directory.reset(Vec::new());
    assert_eq!(snapshot(&directory).peers.len(), 5);
    directory.reset(list(&five[..3]));
    assert_eq!(snapshot(&directory).peers.len(), 5);

    // What the list does say counts at once, and does not stop it from being repeated.
    let changed = [node("a", 2).key(9).epoch(2), node("b", 3), node("c", 4)];
    directory.reset(list(&changed));
    assert_eq!(view(&directory), (peers([("a", 9), ("b", 3), ("c", 4)]), refused([])));
    assert_eq!(snapshot(&directory).problems, []);
}

#[test]
fn a_delete_is_the_authoritys_word_and_needs_no_second() {
    let mut directory = after(&[&[node("a", 2), node("b", 3), node("c", 4)], &[node("a", 2)]]);
    assert_eq!(snapshot(&directory).peers.len(), 3);

    directory.delete(&name("b"));
    assert_eq!(snapshot(&directory).problems.len(), 1);
    directory.delete(&name("c"));

    assert_eq!(view(&directory), (peers([("a", 2)]), refused([])));
    assert_eq!(snapshot(&directory).problems, []);
}

#[test]
fn what_a_deleted_node_held_is_free() {
    let mut directory = after(&[&[node("a", 2)], &[node("a", 2), node("b", 2)]]);
    assert!(snapshot(&directory).refused.contains_key(&name("b")));

    directory.delete(&name("a"));

    assert_eq!(view(&directory), (peers([("b", 2)]), refused([])));
}

#[test]
fn the_cache_remembers_who_was_first() {
    let earlier = after(&[&[node("b", 3)], &[node("b", 3), node("a", 2)]]);
    let mut directory = directory();
    directory.restore(earlier.memory());
    assert_eq!(snapshot(&directory).origin, Origin::Cache);
    assert_eq!(snapshot(&directory).peers, snapshot(&earlier).peers);

    directory.reset(list(&[
        node("a", 2),
        node("b", 3),
        node("c", 4).key(3).pods(&["10.244.2.0/25"]),
    ]));

    let snapshot = snapshot(&directory);
    assert_eq!((snapshot.origin, snapshot.peers.len()), (Origin::Source, 2));
    let reasons = vec![
        Reason::KeyHeld {
            key: key(3),
            holder: name("b"),
        },
        Reason::PrefixHeld {
            prefix: prefix("10.244.2.0/25"),
            holder: name("a"),
        },
    ];
    assert_eq!(snapshot.refused[&name("c")].reasons, reasons);
}

#[test]
fn a_cache_in_which_somebody_holds_what_is_ours_is_corrected() {
    let mut memory = after(&[&[node("a", 2)]]).memory();
    memory.keys.insert(name("a"), key(1));
    memory.prefixes.insert(prefix("10.244.0.0/25"), name("a"));
    memory.records[0] = node("a", 2).key(1).pods(&["10.244.0.0/25"]).record().into();
    let mut directory = directory();

    directory.restore(memory);

    assert_eq!(snapshot(&directory).refused[&name("a")].pod_prefixes, BTreeSet::new());
    assert_eq!(snapshot(&directory).refused[&name("a")].reasons.len(), 2);
}

#[test]
fn the_directorys_word_about_this_node_is_only_compared() {
    let directory = after(&[&[node("me", 7)]]);

    let snapshot = snapshot(&directory);
    assert_eq!((snapshot.peers.len(), snapshot.refused.len()), (0, 0));
    assert_eq!(
        snapshot.problems,
        [Problem::LocalKey(key(7)), Problem::LocalPrefix(prefix("10.244.7.0/24"))]
    );
}

/// A directory that is the authority for the pod prefixes of `me`, too.
fn giving_prefixes() -> Directory {
    let local = Local {
        node: name("me"),
        keys: PublicKeys::only(key(1), 1),
        pod_prefixes: None,
    };
    Directory::new(local, prefixes(&["10.244.0.0/16", "fd00:10:244::/48"]))
}

#[test]
fn a_directory_can_give_this_node_its_prefixes_and_addresses() {
    let mut directory = giving_prefixes();

    let me = node("me", 1).pods(&["10.244.1.0/24", "10.9.0.0/24"]);
    directory.reset(vec![Ok(Record {
        zone: Some("z1".parse().unwrap()),
        ..me.record()
    })]);

    let snapshot = snapshot(&directory);
    let own = Own {
        pod_prefixes: prefixes(&["10.244.1.0/24"]),
        addresses: vec!["172.18.0.1".parse().unwrap()],
        zone: Some("z1".parse().unwrap()),
    };
    assert_eq!(snapshot.own, own);
    let flaw = Reason::PrefixNotProtected(prefix("10.9.0.0/24"));
    assert_eq!(snapshot.problems, [Problem::LocalFlaw(flaw.to_string())]);
}

/// Pods that would opt out, each as its address and its node.
fn opt_outs(pods: &[(&str, &str)]) -> OptOuts {
    let claim = |node: &str| OptOut {
        pod: "shop/cart".to_owned(),
        node: name(node),
        by: OptOutBy::Pod,
    };
    let pods = pods.iter();
    pods.map(|(address, node)| (address.parse().unwrap(), claim(node)))
        .collect()
}

fn opted_out(directory: &Directory) -> Option<Vec<String>> {
    let opted_out = snapshot(directory).opted_out.clone()?;
    Some(opted_out.keys().map(ToString::to_string).collect())
}

#[test]
fn a_pod_opts_out_by_its_nodes_addresses_alone() {
    let mut directory = after(&[&[node("a", 2), node("b", 3).silent()]]);
    assert_eq!(opted_out(&directory), None);

    directory.opt_out(Some(opt_outs(&[
        ("10.244.0.9", "me"),
        ("10.244.2.9", "a"),
        // Of another node, of a node that is refused, of nobody, and of no pod at all.
        ("10.244.0.8", "a"),
        ("10.244.3.9", "b"),
        ("10.244.2.8", "c"),
        ("172.18.0.2", "a"),
    ])));

    assert_eq!(opted_out(&directory).unwrap(), ["10.244.0.9", "10.244.2.9"]);
    let foreign = Problem::OptOut {
        pod: "shop/cart".to_owned(),
        node: name("a"),
        address: "10.244.0.8".parse().unwrap(),
    };
    assert_eq!(snapshot(&directory).problems, [foreign]);

    directory.deny(BTreeMap::from([("a".to_owned(), String::new())]));
    assert_eq!(opted_out(&directory).unwrap(), ["10.244.0.9"]);
    directory.opt_out(None);
    assert_eq!(opted_out(&directory), None);
}

#[test]
fn opt_outs_are_not_remembered() {
    let mut before = after(&[&[node("a", 2)]]);
    before.opt_out(Some(opt_outs(&[("10.244.0.9", "me")])));

    let mut directory = directory();
    directory.restore(before.memory());

    assert_eq!(opted_out(&directory), None);
}

#[test]
fn beyond_the_limit_pods_stay_encrypted() {
    let mut directory = after(&[&[node("a", 2).pods(&["10.244.128.0/17"])]]);
    let addresses = (0..MAX_OPT_OUTS + 3).map(|number| format!("10.244.{}.{}", 128 + number / 256, number % 256));
    let addresses: Vec<String> = addresses.collect();
    let pods: Vec<(&str, &str)> = addresses.iter().map(|address| (address.as_str(), "a")).collect();

    directory.opt_out(Some(opt_outs(&pods)));

    assert_eq!(opted_out(&directory).unwrap().len(), MAX_OPT_OUTS);
    assert_eq!(snapshot(&directory).problems, [Problem::TooManyOptOuts(3)]);
}

#[test]
fn this_node_keeps_the_prefixes_it_was_given_through_absence_and_restart() {
    let mut directory = giving_prefixes();
    directory.reset(list(&[node("me", 1)]));

    directory.delete(&name("me"));
    let gone = snapshot(&directory);
    directory.reset(list(&[]));
    let unlisted = snapshot(&directory);
    let mut restarted = giving_prefixes();
    restarted.restore(directory.memory());

    for snapshot in [&gone, &unlisted] {
        assert_eq!(snapshot.own.pod_prefixes, prefixes(&["10.244.1.0/24"]));
        assert_eq!(snapshot.problems, [Problem::LocalAbsent]);
    }
    assert_eq!(snapshot(&restarted).own, gone.own);
    assert_eq!(snapshot(&restarted).problems, []);

    directory.apply(Ok(node("me", 1).pods(&["10.244.9.0/24"]).record()));

    assert_eq!(snapshot(&directory).own.pod_prefixes, prefixes(&["10.244.9.0/24"]));
    assert_eq!(snapshot(&directory).problems, []);
}

#[test]
fn nobody_takes_a_prefix_that_the_directory_gave_this_node() {
    let mut directory = giving_prefixes();
    directory.reset(list(&[node("a", 2).pods(&["10.244.1.0/25"])]));

    directory.apply(Ok(node("me", 1).record()));

    let held = Reason::PrefixHeld {
        prefix: prefix("10.244.1.0/25"),
        holder: name("me"),
    };
    assert_eq!(snapshot(&directory).refused[&name("a")].reasons, [held]);
}

#[test]
fn whom_a_refusal_names_does_not_change_with_the_next_event() {
    let mut directory = giving_prefixes();
    let (first, wide) = (
        node("a", 2).pods(&["10.244.0.0/24"]),
        node("b", 3).pods(&["10.244.0.0/22"]),
    );
    directory.reset(list(&[node("me", 1), first, wide]));
    let refused = snapshot(&directory).refused.clone();

    directory.apply(Ok(node("c", 9).record()));

    let held = Reason::PrefixHeld {
        prefix: prefix("10.244.0.0/22"),
        holder: name("a"),
    };
    assert_eq!(refused[&name("b")].reasons, [held]);
    assert_eq!(snapshot(&directory).refused, refused);
}

#[test]
fn a_node_whose_record_becomes_unreadable_stays_as_it_was() {
    let mut directory = after(&[&[node("a", 2)]]);
    let bad = Unreadable {
        node: Some(name("a")),
        reason: "torn".to_owned(),
    };

    directory.apply(Err(bad));

    assert!(snapshot(&directory).peers.contains_key(&name("a")));
    assert_eq!(snapshot(&directory).problems.len(), 1);

    directory.apply(Ok(node("a", 2).record()));

    assert_eq!(snapshot(&directory).problems, []);
}

#[test]
fn the_deny_list_shuts_out_names_keys_and_fingerprints_at_once_and_outlives_a_restart() {
    for (entry, what) in [
        ("a".to_owned(), "name"),
        (key(2).to_string(), "key"),
        (key(2).fingerprint(), "key"),
    ] {
        let mut directory = after(&[&[node("a", 2), node("b", 3)]]);

        directory.deny(BTreeMap::from([(entry.clone(), "stolen".to_owned())]));

        let denied = Reason::Denied {
            what,
            remark: Excerpt::of("stolen"),
        };
        let expected = (peers([("b", 3)]), refused([("a", denied, &["10.244.2.0/24"])]));
        assert_eq!(view(&directory), expected, "{entry}");
        let mut restarted = self::directory();
        restarted.restore(directory.memory());
        assert_eq!(view(&restarted), expected, "{entry}");

        directory.deny(BTreeMap::new());

        assert_eq!(view(&directory).0, peers([("a", 2), ("b", 3)]));
    }
}

#[test]
fn a_denied_node_is_told_so_itself() {
    let mut directory = after(&[&[]]);

    directory.deny(BTreeMap::from([("me".to_owned(), String::new())]));

    assert_eq!(snapshot(&directory).problems, [Problem::LocalDenied("name")]);
}

#[test]
fn known_nodes_stay_when_there_are_too_many() {
    let crowd = |count: usize| -> Vec<Result<Record, Unreadable>> {
        (0..count)
            .map(|number| {
                let mut node = node(&format!("n{number:05}"), 2).pods(&[]).silent();
                node.addresses.clear();
                Ok(node.record())
            })
            .collect()
    };
    let mut directory = after(&[&[node("z", 3)]]);
    let mut list = crowd(MAX_NODES + 5);
    list.push(Ok(node("z", 3).record()));

    directory.reset(list);

    let snapshot = snapshot(&directory);
    assert!(snapshot.peers.contains_key(&name("z")));
    assert_eq!(
        (
            snapshot.peers.len() + snapshot.refused.len(),
            snapshot.problems.as_slice()
        ),
        (MAX_NODES, &[Problem::TooManyNodes(6)][..])
    );
}

#[test]
fn an_unchanged_directory_keeps_its_snapshot() {
    let mut directory = after(&[&[node("a", 2)]]);
    let before = snapshot(&directory);

    directory.apply(Ok(node("a", 2).record()));
    directory.reset(list(&[node("a", 2)]));

    assert!(Arc::ptr_eq(&before, &snapshot(&directory)));
}

#[derive(Debug, Clone)]
enum Step {
    Apply(Record),
    Delete(NodeName),
    Reset(Vec<Result<Record, Unreadable>>),
    Restart,
}

/// Few names, keys and prefixes, so that claims collide all the time.
fn record() -> impl Strategy<Value = Record> {
    let pods = prop::collection::vec((0u8..4, 22u8..=26), 0..3);
    (0u8..5, 1u8..6, pods, 0u64..4, 0u8..8).prop_map(|(who, seed, pods, epoch, fault)| {
        let who = if who == 4 { "me".to_owned() } else { format!("n{who}") };
        let pods: Vec<String> = pods
            .into_iter()
            .map(|(third, length)| {
                Prefix::containing(format!("10.244.{third}.64").parse().unwrap(), length)
                    .unwrap()
                    .to_string()
            })
            .collect();
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        let sound = node(&who, 2).pods(&pods).key(seed).epoch(epoch);
        match fault {
            0 => sound.silent().record(),
            1 => sound.announcing("nonsense").record(),
            2 => sound.endpoints(&["127.0.0.1:1"]).record(),
            _ => sound.record(),
        }
    })
}

fn entries() -> impl Strategy<Value = Vec<Result<Record, Unreadable>>> {
    let entry = prop_oneof![
        9 => record().prop_map(Ok),
        1 => (0u8..5).prop_map(|who| Err(unreadable(&format!("n{who}")))),
    ];
    prop::collection::vec(entry, 0..8)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => record().prop_map(Step::Apply),
        1 => (0u8..5).prop_map(|who| Step::Delete(name(&format!("n{who}")))),
        2 => entries().prop_map(Step::Reset),
        1 => Just(Step::Restart),
    ]
}

fn take(directory: &mut Directory, step: Step) {
    match step {
        Step::Apply(record) => directory.apply(Ok(record)),
        Step::Delete(node) => directory.delete(&node),
        Step::Reset(list) => directory.reset(list),
        Step::Restart => {
            let mut restarted = crate::directory();
            restarted.restore(directory.memory());
            *directory = restarted;
        }
    }
}

proptest! {
    #[test]
    fn a_row_of_events_ends_as_one_by_one(steps in prop::collection::vec(step(), 0..12)) {
        let (mut by_one, mut in_a_row) = (directory(), directory());
        by_one.reset(Vec::new());
        in_a_row.reset(Vec::new());
        let events = steps.iter().filter_map(|step| match step.clone() {
            Step::Apply(record) => Some(Event::Applied(Ok(record))),
            Step::Delete(node) => Some(Event::Deleted(node)),
            Step::Reset(list) => Some(Event::Listed(list)),
            Step::Restart => None,
        });
        in_a_row.take(events.collect::<Vec<_>>());
        for step in steps.into_iter().filter(|step| !matches!(step, Step::Restart)) {
            take(&mut by_one, step);
        }

        prop_assert_eq!(snapshot(&by_one), snapshot(&in_a_row));
    }

    #[test]
    fn no_two_nodes_ever_share_a_key_or_an_address(steps in prop::collection::vec(step(), 0..24)) {
        let mut directory = directory();
        for step in steps {
            take(&mut directory, step);
            let Some(snapshot) = directory.snapshot() else { continue };

            let mut keys = BTreeSet::from([key(1)]);
            let mut owned = vec![prefix("10.244.0.0/24")];
            for (node, peer) in &snapshot.peers {
                prop_assert!(keys.insert(peer.public_key), "{} shares a key: {:?}", node, snapshot);
                prop_assert!(!peer.endpoints.is_empty());
                prop_assert!(!snapshot.refused.contains_key(node));
            }
            let held = snapshot.peers.values().map(|peer| &peer.pod_prefixes);
            for prefixes in held.chain(snapshot.refused.values().map(|refused| &refused.pod_prefixes)) {
                for mine in prefixes {
                    prop_assert!(!owned.iter().any(|other| other.overlaps(*mine)), "{} is shared: {:?}", mine, snapshot);
                }
                owned.extend(prefixes);
            }
            prop_assert!(snapshot.refused.values().all(|refused| !refused.reasons.is_empty()));
            prop_assert!(!snapshot.peers.contains_key(&name("me")) && !snapshot.refused.contains_key(&name("me")));
        }
    }

    #[test]
    fn the_order_within_a_list_does_not_matter(
        before in prop::collection::vec(step(), 0..8),
        (list, shuffled) in entries().prop_flat_map(|list| (Just(list.clone()), Just(list).prop_shuffle())),
    ) {
        let [mut one, mut other] = [directory(), directory()];
        for step in before {
            take(&mut one, step.clone());
            take(&mut other, step);
        }

        one.reset(list);
        other.reset(shuffled);

        prop_assert_eq!(one.snapshot(), other.snapshot());
        prop_assert_eq!(one.memory(), other.memory());
    }

    #[test]
    fn records_of_nodes_that_contest_nothing_may_come_in_any_order(
        order in Just((2u8..10).collect::<Vec<u8>>()).prop_shuffle(),
    ) {
        let mut directory = directory();
        directory.reset(Vec::new());

        for host in order {
            directory.apply(Ok(node(&format!("n{host}"), host).record()));
        }

        let mut listed = crate::directory();
        listed.reset((2..10).map(|host| Ok(node(&format!("n{host}"), host).record())).collect());
        prop_assert_eq!(directory.snapshot(), listed.snapshot());
    }

    #[test]
    fn a_restart_changes_nothing_but_the_origin(steps in prop::collection::vec(step(), 0..16)) {
        let mut directory = directory();
        directory.reset(Vec::new());
        for step in steps {
            take(&mut directory, step);
        }
        let before = snapshot(&directory);

        take(&mut directory, Step::Restart);

        let after = snapshot(&directory);
        prop_assert_eq!(&before.peers, &after.peers);
        let held = |snapshot: &Snapshot| -> BTreeMap<NodeName, BTreeSet<Prefix>> {
            let known = snapshot.refused.iter().filter(|(_, refused)| {
                !refused.reasons.iter().any(|reason| matches!(reason, Reason::Unreadable(_)))
            });
            known.map(|(node, refused)| (node.clone(), refused.pod_prefixes.clone())).collect()
        };
        prop_assert_eq!(held(&before), held(&after));
    }

    #[test]
    fn no_announcement_makes_it_panic(text in ".{0,200}", mutation in 0usize..200, byte: u8) {
        let mut spoiled = node("a", 2).announcement.to_json().into_bytes();
        let position = mutation % spoiled.len();
        spoiled[position] = byte;
        let spoiled = String::from_utf8_lossy(&spoiled).into_owned();

        for raw in [text, spoiled] {
            let directory = after(&[&[node("a", 2).announcing(&raw)]]);
            for refused in snapshot(&directory).refused.values() {
                for reason in &refused.reasons {
                    let shown = reason.to_string();
                    prop_assert!(shown.len() < 1024 && shown.chars().all(|c| !c.is_control()), "{:?}", shown);
                }
            }
        }
    }
}
