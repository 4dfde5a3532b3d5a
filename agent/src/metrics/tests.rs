//! The text as a reader sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use shroud_ebpf::{Direction, Reason};
use shroud_keyd::{FailureKind, directory};
use shroud_model::{Family as IpFamily, NodeId, PublicKey};

use super::*;
use crate::check::Check;
use crate::status::tests::{peer, status};
use crate::status::{OptOutStatus, PathStatus, RotationStatus};

/// Everything that a sample borrows.
struct World {
    status: Option<Status>,
    handshakes: BTreeMap<NodeName, u64>,
    uplinks: BTreeSet<String>,
    counters: Vec<Counter>,
    source: Telemetry,
    refused: BTreeMap<NodeName, Refused>,
    tally: Tally,
    convergence: Convergence,
}

impl World {
    fn new(peers: impl IntoIterator<Item = PeerStatus>) -> Self {
        Self {
            status: Some(status(peers)),
            handshakes: BTreeMap::new(),
            uplinks: ["eth0".to_owned()].into(),
            counters: Vec::new(),
            source: Telemetry::default(),
            refused: BTreeMap::new(),
            tally: Tally::new(),
            convergence: Convergence::new(),
        }
    }

    fn text(&self) -> String {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let names = |status: &Status| {
            let peers = status.peers.iter().map(|peer| &peer.node);
            peers
                .chain(self.refused.keys())
                .chain([&status.node])
                .map(|name| (name.id().0, name.to_string()))
                .collect()
        };
        let directory = status([]).directory;
        render(&Sample {
            now: at(1_800_000_000),
            key_since: at(1_799_999_000),
            directory: self.status.as_ref().map_or(&directory, |status| &status.directory),
            source: &self.source,
            refused: &self.refused,
            tally: &self.tally,
            convergence: &self.convergence,
            seen: self.status.as_ref().map(|status| Seen {
                status,
                handshakes: self
                    .handshakes
                    .iter()
                    .map(|(name, seconds)| (name, at(*seconds)))
                    .collect(),
                uplinks: &self.uplinks,
                counters: &self.counters,
                names: names(status),
            }),
        })
    }

    /// The samples of one metric.
    fn samples(&self, name: &str) -> Vec<String> {
        let is_of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        self.text().lines().filter(is_of).map(str::to_owned).collect()
    }
}

fn counter(node: &str, reason: Reason, packets: u64) -> Counter {
    Counter {
        node: if node.is_empty() { NodeId(0) } else { name(node).id() },
        direction: Direction::Egress,
        family: Some(IpFamily::V4),
        reason,
        audited: false,
        packets,
        bytes: packets * 100,
    }
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

/// Two peers, of which one has a problem, a refused node, and something in every metric.
fn lively() -> World {
    let b = PeerStatus {
        rx_bytes: 1000,
        tx_bytes: 2000,
        path: Some(PathStatus {
            state: "confirmed".to_owned(),
            expected_mtu: shroud_model::Mtu::new(1420).unwrap(),
            rtt_milliseconds: Some(0.5),
            probes_sent: 3,
            probes_lost: 0,
        }),
        ..peer("b")
    };
    let c = PeerStatus {
        problems: vec![Check::PeerNoHandshake.says("none")],
        ..peer("c")
    };
    let d = PeerStatus {
        in_the_clear: Some("one zone".to_owned()),
        ..peer("d")
    };
    let mut world = World::new([b, c, d]);
    let next = shroud_model::PublicKey::from_bytes([9; 32]).unwrap();
    world.status.as_mut().unwrap().rotation = Some(RotationStatus {
        public_key: next,
        fingerprint: next.fingerprint(),
        seconds: 4.0,
        followed: 1,
        away: 1,
        waiting: vec![name("d")],
    });
    world.handshakes = [(name("b"), 1_799_999_940)].into();
    world.uplinks = ["eth0".to_owned(), "eth1".to_owned()].into();
    world.counters = vec![
        counter("b", Reason::Encrypted, 7),
        counter("", Reason::UnknownNode, 2),
        counter("gone", Reason::Encrypted, 99),
        Counter {
            family: None,
            audited: true,
            ..counter("c", Reason::Malformed, 1)
        },
    ];
    world.source = Telemetry {
        lists: 4,
        failures: [(FailureKind::Folder, 1)].into(),
        ..Telemetry::default()
    };
    let refused = Refused {
        reasons: vec![
            directory::Reason::OwnKey,
            directory::Reason::TooManyPrefixes(17),
            directory::Reason::TooManyPrefixes(17),
        ],
        pod_prefixes: BTreeSet::new(),
        addresses: Vec::new(),
    };
    world.refused = [(name("d"), refused.clone()), (name("e"), refused)].into();
    let status = world.status.as_mut().unwrap();
    status.verdict = Verdict::Degraded;
    status.problems = vec![
        Check::NodeRefused.says("d"),
        Check::NodeRefused.says("e"),
        Check::PeerNoHandshake.says("c"),
    ];
    status.gate.plaintext_bytes = 100;
    // A pod with two addresses is one.
    status.opted_out = Some(
        ["10.244.1.7", "fd00::7"]
            .map(|address| opt_out("shop/cart", address))
            .into(),
    );
    world.tally.durations.observe(Duration::from_millis(20));
    world.tally.changes.insert(crate::check::Driver::Gate, 3);
    world.tally.failures.insert(crate::check::Driver::Routing, 1);
    let (start, key) = (Instant::now(), PublicKey::from_bytes([b'b'; 32]).unwrap());
    world.convergence.announced(&[key].into(), start);
    world
        .convergence
        .configured([key].iter(), start + Duration::from_millis(80));
    world
}

fn opt_out(pod: &str, address: &str) -> OptOutStatus {
    OptOutStatus {
        pod: pod.to_owned(),
        node: name("b"),
        address: address.parse().unwrap(),
        by: "namespace".to_owned(),
    }
}

#[test]
fn nobody_is_counted_while_nobody_can_say_who_has_opted_out() {
    let mut world = lively();

    world.status.as_mut().unwrap().opted_out = None;

    assert_eq!(world.samples("shroud_opted_out_pods"), [""; 0]);
}

#[test]
fn the_text_is_as_it_was() {
    let text = lively().text().replace(env!("CARGO_PKG_VERSION"), "VERSION");

    assert!(
        text == include_str!("golden/lively.txt"),
        "golden/lively.txt differs; if this is right, it is the new one:\n{text}"
    );
}

#[test]
fn each_metric_is_written_once_and_no_other() {
    for world in [lively(), World::new([])] {
        let text = world.text();
        let heads: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();

        assert_eq!(heads, ALL.iter().map(|family| family.name).collect::<Vec<_>>());
    }
}

#[test]
fn every_metric_has_a_sample_in_the_lively_world() {
    let text = lively().text();

    for family in ALL {
        let name = family.queried();
        let has_sample = text.lines().any(|line| {
            line.strip_prefix(&name)
                .is_some_and(|rest| rest.starts_with([' ', '{', '_']))
        });
        assert!(has_sample, "{name}");
    }
}

#[test]
fn names_follow_the_conventions() {
    for Family {
        name, kind, unit, help, ..
    } in ALL
    {
        assert!(name.starts_with("shroud_"), "{name}");
        assert!(
            name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'),
            "{name}"
        );
        assert!(
            unit.is_none_or(|unit| name.ends_with(&format!("_{unit}"))),
            "{name} does not end with its unit"
        );
        let ends_with_unit = name.ends_with("_seconds") || name.ends_with("_bytes");
        assert_eq!(ends_with_unit, unit.is_some(), "{name}");
        for ending in ["_total", "_info", "_count", "_sum", "_bucket"] {
            assert!(!name.ends_with(ending), "{name}: {kind:?} adds its ending by itself");
        }
        assert!(help.ends_with('.'), "{help}");
    }
}

#[test]
fn the_series_of_a_peer_go_with_it_and_no_total_moves() {
    let mut world = lively();
    let mentions = |world: &World, peer: &str| world.text().matches(&format!("peer=\"{peer}\"")).count();
    let nobody = |world: &World| world.samples("shroud_gate_packets_total").last().cloned();
    let before = (mentions(&world, "b"), mentions(&world, "c"));
    let plaintext = world.samples("shroud_gate_plaintext_bytes_total");

    world
        .status
        .as_mut()
        .unwrap()
        .peers
        .retain(|peer| peer.node != name("b"));
    world.handshakes.clear();

    // Received, sent, handshake, round trip, packets, bytes; the other has no handshake and no round trip, but a problem.
    assert_eq!(before, (6, 5));
    assert_eq!((mentions(&world, "b"), mentions(&world, "c")), (0, 5));
    assert_eq!(world.samples("shroud_gate_plaintext_bytes_total"), plaintext);
    assert_eq!(nobody(&world), nobody(&lively()));
    assert_eq!(mentions(&world, ""), mentions(&lively(), ""));
}

#[test]
fn without_a_look_at_the_machine_the_agents_own_counts_are_told() {
    let mut world = lively();
    world.status = None;

    assert_eq!(world.samples("shroud_healthy"), ["shroud_healthy 0"]);
    assert_eq!(world.samples("shroud_peer_receive_bytes_total"), [""; 0]);
    assert_eq!(world.samples("shroud_gate_plaintext_bytes_total"), [""; 0]);
    assert_eq!(
        world.samples("shroud_directory_lists_total"),
        ["shroud_directory_lists_total 4"]
    );
    assert_eq!(
        world.samples("shroud_reconcile_failures_total")[4],
        "shroud_reconcile_failures_total{driver=\"routing\"} 1"
    );
    check(&world.text()).unwrap();
}

#[test]
fn a_healthy_node_says_so() {
    assert_eq!(World::new([]).samples("shroud_healthy"), ["shroud_healthy 1"]);
    assert_eq!(lively().samples("shroud_healthy"), ["shroud_healthy 0"]);
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let good = "# TYPE a counter\n# HELP a Of \\\"b\\\".\na_total{x=\"1\"} 1\na_total{x=\"2\"} 1\n# EOF\n";
    check(good).unwrap();

    for (from, to) in [
        ("# EOF\n", ""),
        ("x=\"2\"", "x=\"1\""),
        ("x=\"2\"", "x=\"\"\""),
        ("x=\"2\"", "x=\"2\\\""),
        ("x=\"2\"", "x=\"\\t\""),
        ("x=\"2\"", "x-y=\"2\""),
        ("x=\"2\"} 1", "x=\"2\"} one"),
        ("x=\"2\"} 1", "x=\"2\"} -1"),
        ("a_total{x=\"2\"}", "a{x=\"2\"}"),
        ("a_total{x=\"2\"}", "b_total{x=\"2\"}"),
        ("# HELP a Of", "# TYPE a gauge\n# HELP a Of"),
    ] {
        let bad = good.replace(from, to);
        assert!(check(&bad).is_err(), "{bad}");
    }
    let histogram =
        "# TYPE h histogram\nh_bucket{le=\"0.5\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3.0\nh_count 2\n# EOF\n";
    check(histogram).unwrap();
    for (from, to) in [
        ("0.5\"} 1", "0.5\"} 3"),
        ("h_count 2", "h_count 3"),
        ("+Inf", "1.0"),
        ("h_sum 3.0\n", ""),
    ] {
        let bad = histogram.replace(from, to);
        assert!(check(&bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn whatever_the_names_and_numbers_the_text_can_be_read(
        (source, device) in (any::<String>(), any::<String>()),
        counts in prop::collection::vec((0..4u8, 0..16usize, any::<bool>(), any::<u32>()), 0..20),
        (rtt, age, rx) in (prop::option::of(0.0..1e9f64), any::<u32>(), any::<u64>()),
        took in prop::collection::vec(any::<u32>(), 0..20),
    ) {
        let mut world = lively();
        world.uplinks.insert(device);
        world.handshakes.insert(name("b"), age.into());
        world.counters = counts
            .into_iter()
            .map(|(node, reason, audited, packets)| Counter {
                audited,
                ..counter(["", "a", "b", "gone"][usize::from(node)], Reason::ALL[reason], packets.into())
            })
            .collect();
        for milliseconds in took {
            world.tally.durations.observe(Duration::from_millis(milliseconds.into()));
        }
        let status = world.status.as_mut().unwrap();
        status.directory.source = source;
        status.peers[0].rx_bytes = rx;
        status.peers[0].path.as_mut().unwrap().rtt_milliseconds = rtt;

        let text = world.text();

        prop_assert_eq!(check(&text), Ok(()), "{}", text);
    }
}

/// Reads the text by the rules of the format (OpenMetrics 1.0.0), and says what is against them. It knows nothing of how we write.
fn check(text: &str) -> Result<(), String> {
    let lines = text.strip_suffix("# EOF\n").ok_or("does not end with # EOF")?;
    let mut families = BTreeSet::new();
    let mut series = BTreeSet::new();
    let mut family: Option<(&str, &str)> = None;
    let mut histogram: Vec<(f64, f64)> = Vec::new();
    let mut sum_is_due = false;
    for line in lines.lines() {
        let wrong = |what: &str| Err(format!("{what}: {line}"));
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<&str> = comment.splitn(3, ' ').collect();
            match (words.as_slice(), family) {
                (["TYPE", name, kind], _) => {
                    if !families.insert(*name) || !["gauge", "counter", "info", "histogram"].contains(kind) {
                        return wrong("a second family or an unknown kind");
                    }
                    family = Some((name, kind));
                }
                (["UNIT", name, unit], Some((current, _))) if *name == current => {
                    if !name.ends_with(&format!("_{unit}")) {
                        return wrong("the unit is not in the name");
                    }
                }
                (["HELP", name, help], Some((current, _))) if *name == current => {
                    unescape(help)?;
                }
                _ => return wrong("an unexpected comment"),
            }
            continue;
        }
        let Some((name, kind)) = family else {
            return wrong("a sample before any family");
        };
        let (sample, labels, value) = split(line)?;
        let ending = sample.strip_prefix(name).ok_or(format!("not of {name}: {line}"))?;
        let value: f64 = value.parse().map_err(|error| format!("{error}: {line}"))?;
        if !series.insert((sample, labels.clone())) {
            return wrong("a series twice");
        }
        match (kind, ending) {
            ("gauge", "") => {}
            ("counter", "_total") if value >= 0.0 => {}
            ("info", "_info") if value == 1.0 => {}
            ("histogram", "_bucket") => {
                let bound = labels.get("le").ok_or(format!("no bound: {line}"))?;
                let bound = if bound == "+Inf" {
                    f64::INFINITY
                } else {
                    bound.parse().map_err(|_| "bound")?
                };
                if histogram
                    .last()
                    .is_some_and(|(before, count)| *before >= bound || *count > value)
                {
                    return wrong("buckets do not rise");
                }
                histogram.push((bound, value));
            }
            ("histogram", "_sum") => sum_is_due = true,
            ("histogram", "_count") => {
                let (bound, count) = histogram.pop().ok_or("no buckets")?;
                if bound != f64::INFINITY || count != value || !std::mem::take(&mut sum_is_due) {
                    return wrong("the count does not fit its buckets, or the sum is missing");
                }
                histogram.clear();
            }
            _ => return wrong("an ending or value that its kind cannot have"),
        }
    }
    Ok(())
}

/// Name, labels and value of a sample.
fn split(line: &str) -> Result<(&str, BTreeMap<&str, String>, &str), String> {
    let is_name =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let mut labels = BTreeMap::new();
    let end = line.find(['{', ' ']).ok_or(format!("no value: {line}"))?;
    let (name, mut rest) = line.split_at(end);
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, behind) = rest.split_once("=\"").ok_or(format!("no label: {line}"))?;
            let mut escaped = false;
            let close = behind
                .char_indices()
                .find(|(_, character)| {
                    let closes = *character == '"' && !escaped;
                    escaped = *character == '\\' && !escaped;
                    closes
                })
                .ok_or(format!("an open quote: {line}"))?
                .0;
            if !is_name(label) || labels.insert(label, unescape(&behind[..close])?).is_some() {
                return Err(format!("label {label}: {line}"));
            }
            rest = &behind[close + 1..];
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').ok_or(format!("no value: {line}"))?;
    if is_name(name) {
        Ok((name, labels, value))
    } else {
        Err(format!("name: {line}"))
    }
}

/// The text that an escaped one stands for.
fn unescape(text: &str) -> Result<String, String> {
    let mut characters = text.chars();
    let mut plain = String::new();
    while let Some(character) = characters.next() {
        match (character, character == '\\') {
            (_, true) => plain.push(match characters.next() {
                Some('n') => '\n',
                Some(known @ ('\\' | '"')) => known,
                other => return Err(format!("escape {other:?}: {text}")),
            }),
            ('"', _) => return Err(format!("a bare quote: {text}")),
            _ => plain.push(character),
        }
    }
    Ok(plain)
}
