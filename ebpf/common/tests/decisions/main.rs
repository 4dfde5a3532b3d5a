//! The decisions, on the host. The same packets go through the loaded program in `ebpf/tests/kernel`.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod cases;
mod packet;

use std::collections::BTreeMap;
use std::net::IpAddr;

use cases::{Case, DEVICE, Fate, LISTEN_PORT, MASK, OTHER_LISTEN_PORT, PLAIN, TUNNEL, cases};
use packet::{VNI, echo, ethernet, geneve_of, udp, vxlan_of};
use proptest::prelude::*;
use shroud_gate::{
    Action, Address, Direction, Entry, Family, LAYOUT_VERSION, Link, Lookup, MODE_AUDIT, MODE_ENFORCE, MODE_OFF,
    OPEN_PORTS, PATH_ENCRYPTED, PATH_FENCED, PATH_LOCAL, PATH_NONE, PATH_PLAIN, Packet, Reason, Settings, Verdict,
    decrypted, egress, flag, ingress, open_port, pod_mark,
};

#[test]
fn enforce_does_to_each_packet_what_it_must() {
    let maps = Maps::new(MODE_ENFORCE);

    for case in cases() {
        let (action, reason) = match case.fate {
            Fate::Pass(reason) => (Action::Pass, reason),
            Fate::Redirect => (Action::Redirect(DEVICE), Reason::Encrypted),
            Fate::Drop(reason) => (Action::Drop, reason),
        };
        let expected = Verdict {
            action,
            reason,
            node: case.node,
            audited: false,
        };
        assert_eq!(decide(&case, &maps), expected, "{}", case.name);
    }
}

#[test]
fn audit_drops_nothing_but_still_encrypts() {
    let maps = Maps::new(MODE_AUDIT);

    for case in cases() {
        let (action, reason, audited) = match case.fate {
            Fate::Pass(reason) => (Action::Pass, reason, false),
            Fate::Redirect => (Action::Redirect(DEVICE), Reason::Encrypted, false),
            Fate::Drop(reason) => (Action::Pass, reason, true),
        };
        let expected = Verdict {
            action,
            reason,
            node: case.node,
            audited,
        };
        assert_eq!(decide(&case, &maps), expected, "{}", case.name);
    }
}

#[test]
fn off_lets_everything_pass_and_counts_what_is_protected() {
    let maps = Maps::new(MODE_OFF);

    for case in cases() {
        let reason = match case.fate {
            Fate::Pass(reason) => reason,
            Fate::Redirect | Fate::Drop(_) => Reason::Off,
        };
        let expected = Verdict {
            action: Action::Pass,
            reason,
            node: case.node,
            audited: false,
        };
        assert_eq!(decide(&case, &maps), expected, "{}", case.name);
    }
}

#[test]
fn without_an_encryption_device_protected_traffic_is_dropped() {
    let mut maps = Maps::new(MODE_ENFORCE);
    maps.entries
        .get_mut(&("10.244.2.0".parse().unwrap(), 24))
        .unwrap()
        .device = 0;

    let verdict = egress(&parse(&ethernet(&echo("10.244.1.2", "10.244.2.2")), &maps), 0, &maps);

    assert_eq!(
        verdict,
        Verdict {
            action: Action::Drop,
            reason: Reason::NoDevice,
            node: 2,
            audited: false
        }
    );
}

#[test]
fn each_peer_is_reached_through_the_device_of_its_own_entry() {
    let mut maps = Maps::new(MODE_ENFORCE);
    maps.entries
        .get_mut(&("fd00:10:244:2::".parse().unwrap(), 64))
        .unwrap()
        .device = 9;
    let action = |packet: &[u8]| egress(&parse(&ethernet(packet), &maps), 0, &maps).action;

    assert_eq!(action(&echo("10.244.1.2", "10.244.2.2")), Action::Redirect(DEVICE));
    assert_eq!(
        action(&echo("fd00:10:244:1::2", "fd00:10:244:2::2")),
        Action::Redirect(9)
    );
}

#[test]
fn a_number_nobody_knows_yet_is_read_as_the_safe_one() {
    let mut maps = Maps::new(99);
    maps.entries.get_mut(&("10.244.2.0".parse().unwrap(), 24)).unwrap().path = 99;

    let verdict = egress(&parse(&ethernet(&echo("10.244.1.2", "10.244.2.2")), &maps), 0, &maps);

    assert_eq!(
        verdict,
        Verdict {
            action: Action::Drop,
            reason: Reason::Fenced,
            node: 2,
            audited: false
        }
    );
}

#[test]
fn a_device_without_ethernet_is_read_from_the_first_byte() {
    let maps = Maps::new(MODE_ENFORCE);
    let packet = |bytes: &[u8]| Packet::parse(&mut &bytes[..], Link::Ip, &maps.settings);

    for bytes in [
        echo("10.244.1.2", "10.244.2.2"),
        echo("fd00:10:244:1::2", "fd00:10:244:2::2"),
    ] {
        assert_eq!(egress(&packet(&bytes), 0, &maps).action, Action::Redirect(DEVICE));
    }
    assert_eq!(egress(&packet(&[0x15; 60]), 0, &maps).reason, Reason::NotIp);
    assert_eq!(egress(&packet(&[]), 0, &maps).reason, Reason::Malformed);
}

#[test]
fn a_pod_cannot_mark_its_own_packets() {
    let maps = Maps::new(MODE_ENFORCE);
    let mark = |source, destination, mark| pod_mark(&parse(&ethernet(&echo(source, destination)), &maps), mark, &maps);

    assert_eq!(mark("10.244.1.2", "10.244.2.2", TUNNEL | 0x4000), 0x4000);
    assert_eq!(mark("10.244.1.2", "10.244.2.2", PLAIN), 0);
    assert_eq!(mark("10.244.1.7", "10.244.2.2", 0x4000), 0x4000 | PLAIN);
    assert_eq!(mark("10.244.1.2", "10.244.1.7", TUNNEL), PLAIN);
    assert_eq!(mark("10.244.1.8", "10.244.2.2", 0x4000), 0x4000 | PLAIN);
    assert_eq!(mark("10.244.1.2", "10.244.1.8", TUNNEL), 0);
    assert_eq!(
        pod_mark(&parse(&packet::frame(0x0806, &[0; 28]), &maps), MASK | 1, &maps),
        1
    );
}

#[test]
fn a_reason_survives_its_number() {
    for (index, reason) in Reason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, index + 1);
        assert_eq!(Reason::from_number(reason as u8), Some(reason));
    }
    assert_eq!(Reason::from_number(0), None);
    assert_eq!(Reason::from_number(17), None);
}

#[test]
fn settings_and_entries_survive_their_bytes() {
    let settings = Maps::new(MODE_AUDIT).settings;
    let entry = Entry {
        node: 0x0102_0304_0506_0708,
        path: PATH_FENCED,
        flags: 255,
        reserved: [0; 2],
        device: 0x090a_0b0c,
    };

    assert_eq!(Settings::from_bytes(&settings.to_bytes()), settings);
    assert_eq!(Entry::from_bytes(&entry.to_bytes()), entry);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), mark: u32, ethernet: bool) {
        let maps = Maps::new(MODE_ENFORCE);
        let link = if ethernet { Link::Ethernet } else { Link::Ip };

        let packet = Packet::parse(&mut &bytes[..], link, &maps.settings);

        egress(&packet, mark, &maps);
        ingress(&packet, &maps);
        decrypted(&packet, &maps);
        pod_mark(&packet, mark, &maps);
    }

    #[test]
    fn no_change_of_a_good_packet_makes_it_panic(
        index: prop::sample::Index, changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), mark: u32,
    ) {
        let maps = Maps::new(MODE_ENFORCE);
        let mut case = cases().swap_remove(index.index(cases().len()));
        for (place, byte) in changes {
            let place = place.index(case.frame.len());
            case.frame[place] = byte;
        }
        case.mark = mark;

        decide(&case, &maps);
    }

    /// The sentence that the project lives by.
    #[test]
    fn between_protected_addresses_nothing_passes_in_the_clear(
        source in protected_or_node(), destination in protected_or_node(), ports in ports(), mark: u32, protocol: u8,
    ) {
        let maps = Maps::new(MODE_ENFORCE);
        let bytes = match protocol {
            0..128 => udp(&source, &destination, ports, b"payload"),
            128.. => packet::ip(&source, &destination, protocol, &[0; 40]),
        };

        let verdict = egress(&parse(&ethernet(&bytes), &maps), mark, &maps);

        let is_udp = protocol < 128 || protocol == 17;
        let exempt = may_leave(mark, &source, &destination);
        let tunnel = mark & MASK == TUNNEL && is_udp && [LISTEN_PORT, OTHER_LISTEN_PORT].contains(&ports.0) && is_node(&destination);
        let open = is_udp && (ports.0 == 53 || ports.1 == 53) && is_node(&source) && is_node(&destination);
        // Only with UDP do the ports above stand in the packet.
        prop_assert_eq!(verdict.action == Action::Pass, exempt || protocol < 128 && (tunnel || open), "{:?}", verdict);
    }

    #[test]
    fn nothing_comes_in_from_a_protected_address(source in protected(), destination: [u8; 4], ports: (u16, u16)) {
        let maps = Maps::new(MODE_ENFORCE);
        let destination = IpAddr::from(destination).to_string();

        let verdict = ingress(&parse(&ethernet(&udp(&source, &destination, ports, b"payload")), &maps), &maps);

        let exempt = may_arrive(&source, &destination);
        prop_assert_eq!(verdict.action == Action::Pass, exempt, "{:?}", verdict);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

    /// Whatever carries it, protected traffic leaves in the tunnel to its owner, or not at all.
    #[test]
    fn an_overlay_packet_hides_nothing(carrier in carrier(), source in protected(), destination in protected(), mark: u32) {
        let maps = Maps::new(MODE_ENFORCE);
        let frame = carrier.around(&source, &destination);

        let verdict = egress(&parse(&frame, &maps), mark, &maps);

        let exempt = may_leave(mark, &source, &destination);
        let owner = maps.owner(&destination);
        match verdict.action {
            Action::Pass => prop_assert!(exempt, "{verdict:?}"),
            Action::Redirect(_) if exempt => prop_assert!(maps.owner(&carrier.destination) != 0, "{verdict:?}"),
            Action::Redirect(_) => {
                prop_assert_eq!((carrier.vni, maps.owner(&carrier.destination), verdict.node), (VNI, owner, owner));
            }
            Action::Drop => {}
        }
    }

    /// Nobody in the underlay reaches a pod of this node by an overlay packet of his own, nor speaks for one of the mesh.
    #[test]
    fn no_overlay_packet_comes_in_that_did_not_come_out_of_the_tunnel(
        carrier in carrier(), source in anyone(), destination in anyone(),
    ) {
        let maps = Maps::new(MODE_ENFORCE);

        let verdict = ingress(&parse(&carrier.around(&source, &destination), &maps), &maps);

        let is_ours = maps.is_protected(&source) || (destination.starts_with("10.244.1.") && maps.owner(&destination) == 1);
        let exempt = may_arrive(&source, &destination);
        if is_ours && !exempt {
            prop_assert_eq!(verdict.action, Action::Drop, "{:?}", verdict);
        }
    }

    /// Out of the tunnel a node speaks for its own pods only.
    #[test]
    fn no_node_speaks_for_another(carrier in carrier(), source in anyone(), destination in anyone()) {
        let maps = Maps::new(MODE_ENFORCE);

        let verdict = decrypted(&parse(&carrier.around(&source, &destination), &maps), &maps);

        let owner = maps.owner(&carrier.source);
        let concerns_us = carrier.vni == VNI || maps.is_protected(&source) || maps.is_protected(&destination);
        let is_right = is_node(&carrier.source) && maps.owner(&source) == owner;
        prop_assert_eq!(verdict.action == Action::Pass, owner != 1 && (is_right || !concerns_us), "{:?}", verdict);
    }
}

/// The outside of an overlay packet.
#[derive(Debug)]
struct Carrier {
    source: String,
    destination: String,
    source_port: u16,
    vni: u32,
    is_geneve: bool,
}

impl Carrier {
    fn around(&self, source: &str, destination: &str) -> Vec<u8> {
        let inner = ethernet(&echo(source, destination));
        let (port, payload) = if self.is_geneve {
            (6081, geneve_of(self.vni, 0x6558, &inner))
        } else {
            (4789, vxlan_of(self.vni, &inner))
        };
        ethernet(&udp(
            &self.source,
            &self.destination,
            (self.source_port, port),
            &payload,
        ))
    }
}

fn carrier() -> impl Strategy<Value = Carrier> {
    // Number 4 is a node of nobody's.
    let node =
        || (prop_oneof![Just("192.0.2"), Just("203.0.113")], 1u8..5).prop_map(|(net, last)| format!("{net}.{last}"));
    let vni = prop_oneof![Just(VNI), 0u32..1 << 24];
    (node(), node(), ports(), vni, any::<bool>()).prop_map(|(source, destination, ports, vni, is_geneve)| Carrier {
        source,
        destination,
        source_port: ports.0,
        vni,
        is_geneve,
    })
}

fn anyone() -> impl Strategy<Value = String> {
    prop_oneof![
        protected(),
        node(),
        (0u8..4).prop_map(|last| format!("198.51.100.{last}"))
    ]
}

fn protected_or_node() -> impl Strategy<Value = String> {
    prop_oneof![protected(), (1u8..4).prop_map(|last| format!("203.0.113.{last}"))]
}

fn node() -> impl Strategy<Value = String> {
    (prop_oneof![Just("192.0.2"), Just("203.0.113")], 1u8..4).prop_map(|(net, last)| format!("{net}.{last}"))
}

fn ports() -> impl Strategy<Value = (u16, u16)> {
    let port = || {
        prop_oneof![
            Just(53),
            Just(6443),
            Just(LISTEN_PORT),
            Just(OTHER_LISTEN_PORT),
            1..=4788_u16,
            8473..=u16::MAX
        ]
    };
    (port(), port())
}

fn is_node(address: &str) -> bool {
    !address.starts_with("10.") && !address.ends_with(".4") && !address.starts_with("198.")
}

const EXEMPT: &str = "10.244.1.7";
/// Pods that have opted out, one of this node and one of a peer.
const OPTED_OUT: [&str; 2] = ["10.244.1.8", "10.244.2.8"];

/// Whether cluster configuration lets a packet between pods leave in the clear.
fn may_leave(mark: u32, source: &str, destination: &str) -> bool {
    let is_exempt = source == EXEMPT || destination == EXEMPT || OPTED_OUT.contains(&source);
    mark & MASK == PLAIN && is_exempt || destination.starts_with("10.244.5.")
}

/// Whether cluster configuration lets a packet between pods arrive in the clear.
fn may_arrive(source: &str, destination: &str) -> bool {
    source == EXEMPT || destination == EXEMPT || source == OPTED_OUT[1] || source.starts_with("10.244.5.")
}

fn protected() -> impl Strategy<Value = String> {
    (0u8..12, 0u8..12).prop_map(|(node, pod)| format!("10.244.{node}.{pod}"))
}

fn decide(case: &Case, maps: &Maps) -> Verdict {
    let packet = parse(&case.frame, maps);
    match case.direction {
        Direction::Egress => egress(&packet, case.mark, maps),
        Direction::Ingress => ingress(&packet, maps),
        Direction::Decrypted => decrypted(&packet, maps),
    }
}

fn parse(frame: &[u8], maps: &Maps) -> Packet {
    Packet::parse(&mut &frame[..], Link::Ethernet, &maps.settings)
}

struct Maps {
    settings: Settings,
    entries: BTreeMap<(IpAddr, u8), Entry>,
}

impl Maps {
    fn new(mode: u32) -> Self {
        let port = |port: u16| port.to_be_bytes();
        let mut settings = Settings {
            version: LAYOUT_VERSION,
            mode,
            tunnel_mark: TUNNEL,
            tunnel_mask: MASK,
            plain_mark: PLAIN,
            plain_mask: MASK,
            overlay: VNI,
            open_ports: [0; OPEN_PORTS],
            listen_ports: [port(LISTEN_PORT), [0; 2], port(OTHER_LISTEN_PORT), [0; 2]],
            vxlan_ports: [port(4789), port(8472), [0; 2], [0; 2]],
            geneve_ports: [port(6081), [0; 2], [0; 2], [0; 2]],
        };
        settings.open_ports[..2].copy_from_slice(&[open_port(6, port(6443)), open_port(17, port(53))]);
        let entries = [
            ("10.244.0.0", 16, 0, 0, flag::PROTECTED),
            ("fd00:10:244::", 48, 0, 0, flag::PROTECTED),
            ("10.244.1.0", 24, 1, PATH_LOCAL, flag::PROTECTED),
            ("fd00:10:244:1::", 64, 1, PATH_LOCAL, flag::PROTECTED),
            ("10.244.2.0", 24, 2, PATH_ENCRYPTED, flag::PROTECTED),
            ("fd00:10:244:2::", 64, 2, PATH_ENCRYPTED, flag::PROTECTED),
            ("10.244.3.0", 24, 3, PATH_FENCED, flag::PROTECTED),
            ("fd00:10:244:3::", 64, 3, PATH_FENCED, flag::PROTECTED),
            ("10.244.5.0", 24, 5, PATH_PLAIN, flag::PROTECTED),
            ("fd00:10:244:5::", 64, 5, PATH_PLAIN, flag::PROTECTED),
            (OPTED_OUT[0], 32, 1, PATH_LOCAL, flag::PROTECTED | flag::OPTED_OUT),
            (OPTED_OUT[1], 32, 2, PATH_ENCRYPTED, flag::PROTECTED | flag::OPTED_OUT),
            (EXEMPT, 32, 1, PATH_LOCAL, flag::PROTECTED | flag::EXEMPT),
            ("192.0.2.1", 32, 1, PATH_LOCAL, flag::NODE),
            ("192.0.2.2", 32, 2, PATH_NONE, flag::NODE),
            ("192.0.2.3", 32, 3, PATH_NONE, flag::NODE),
            ("192.0.2.5", 32, 5, PATH_NONE, flag::NODE),
            ("2001:db8::1", 128, 1, PATH_LOCAL, flag::NODE),
            ("2001:db8::2", 128, 2, PATH_NONE, flag::NODE),
            ("203.0.113.1", 32, 1, PATH_LOCAL, flag::NODE | flag::PROTECTED),
            ("203.0.113.2", 32, 2, PATH_ENCRYPTED, flag::NODE | flag::PROTECTED),
            ("203.0.113.22", 32, 2, PATH_FENCED, flag::NODE | flag::PROTECTED),
            ("203.0.113.3", 32, 3, PATH_FENCED, flag::NODE | flag::PROTECTED),
            ("2001:db8:1::1", 128, 1, PATH_LOCAL, flag::NODE | flag::PROTECTED),
            ("2001:db8:1::2", 128, 2, PATH_ENCRYPTED, flag::NODE | flag::PROTECTED),
        ];
        let entries = entries
            .map(|(address, length, node, path, flags)| {
                (
                    (address.parse().unwrap(), length),
                    Entry {
                        node,
                        path,
                        flags,
                        reserved: [0; 2],
                        device: if path == PATH_ENCRYPTED { DEVICE } else { 0 },
                    },
                )
            })
            .into();
        Self { settings, entries }
    }
}

impl Maps {
    fn find(&self, address: &str) -> Entry {
        let Ok(IpAddr::V4(address)) = address.parse() else {
            panic!("{address} is not IPv4")
        };
        self.entry(&Address::v4(address.octets()))
    }

    fn owner(&self, address: &str) -> u64 {
        self.find(address).node
    }

    fn is_protected(&self, address: &str) -> bool {
        self.find(address).is_protected()
    }
}

impl Lookup for Maps {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn entry(&self, address: &Address) -> Entry {
        let covers = |prefix: &IpAddr, length: u8| {
            let (family, bytes) = match prefix {
                IpAddr::V4(ip) => (Family::V4, ip.octets().to_vec()),
                IpAddr::V6(ip) => (Family::V6, ip.octets().to_vec()),
            };
            let whole = usize::from(length / 8);
            family == address.family && bytes[..whole] == address.bytes[..whole]
        };
        let found = self
            .entries
            .iter()
            .filter(|((prefix, length), _)| covers(prefix, *length));
        found
            .max_by_key(|((_, length), _)| *length)
            .map(|(_, entry)| *entry)
            .unwrap_or_default()
    }
}
