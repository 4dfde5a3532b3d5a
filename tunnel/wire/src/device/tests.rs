//! Two or three devices, joined by nothing but function calls.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::uapi::{Parser, Request};

/// What left a device.
#[derive(Default)]
struct Doors {
    sent: Vec<(Vec<u8>, Endpoint)>,
    delivered: Vec<Vec<u8>>,
}

impl Outbound for Doors {
    fn send(&mut self, datagram: &[u8], to: &mut Endpoint) {
        self.sent.push((datagram.to_vec(), to.clone()));
    }

    fn deliver(&mut self, packet: &[u8]) {
        self.delivered.push(packet.to_vec());
    }
}

/// A device with the address `192.0.2.NUMBER:51820` and the inner addresses `10.NUMBER.0.0/16`.
struct Host {
    number: u8,
    device: Device,
    doors: Doors,
}

fn now() -> Now {
    Now::read()
}

fn secret(number: u8) -> String {
    format!("00{number:02x}{}40", "0".repeat(58))
}

fn public(number: u8) -> PublicKey {
    let Some(Request::Set(set)) = request(&format!("set=1\nprivate_key={}\n\n", secret(number))).ok() else {
        panic!("not a set")
    };
    let Some(Secret::Replace(key)) = set.private_key else {
        panic!("no key")
    };
    PublicKey::from_bytes(public_key(&key)).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn request(text: &str) -> Result<Request, Errno> {
    let mut parser = Parser::default();
    text.split('\n').find_map(|line| parser.line(line.as_bytes())).unwrap()
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51820))
}

fn at(number: u8) -> Endpoint {
    Endpoint {
        remote: address(number),
        local: None,
    }
}

/// An IPv4 packet of a length.
fn packet(source: [u8; 4], destination: [u8; 4], length: usize) -> Vec<u8> {
    let mut packet = vec![0; length];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&destination);
    packet
}

impl Host {
    fn new(number: u8) -> Self {
        let mut host = Self {
            number,
            device: Device::new(now()),
            doors: Doors::default(),
        };
        host.device.set_mtu(1420);
        host.set(&format!("private_key={}", secret(number))).unwrap();
        host
    }

    fn set(&mut self, lines: &str) -> Result<(), Errno> {
        let Request::Set(set) = request(&format!("set=1\n{lines}\n\n"))? else {
            panic!("not a set")
        };
        self.device.check(&set)?;
        self.device.commit(set, now(), &mut self.doors);
        Ok(())
    }

    /// Makes another host a peer, with more lines about it.
    fn know(&mut self, peer: u8, lines: &str) {
        let key = hex(public(peer).as_bytes());
        self.set(&format!("public_key={key}\nallowed_ip=10.{peer}.0.0/16\n{lines}"))
            .unwrap();
    }

    fn describe(&self) -> String {
        String::from_utf8(self.device.describe(51820, 0).to_vec()).unwrap()
    }

    fn say(&mut self, packet: &[u8]) {
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len() + 16, 0xff);
        self.device.outbound(&mut buffer, packet.len(), now(), &mut self.doors);
    }

    fn say_to(&mut self, peer: u8, length: usize) {
        self.say(&packet([10, self.number, 0, 1], [10, peer, 0, 1], length));
    }

    fn hear(&mut self, datagram: &[u8], from: u8) {
        self.hear_after(Duration::ZERO, datagram, from);
    }

    fn hear_after(&mut self, after: Duration, datagram: &[u8], from: u8) {
        let now = now();
        let now = Now {
            instant: now.instant + after,
            ..now
        };
        self.device.inbound(datagram, &at(from), now, &mut self.doors);
    }

    fn tick(&mut self, after: Duration) {
        let now = now();
        self.device.tick(
            Now {
                instant: now.instant + after,
                ..now
            },
            &mut self.doors,
        );
    }

    /// The types of the messages sent since the last look.
    fn sent(&mut self) -> Vec<u8> {
        self.doors.sent.drain(..).map(|(datagram, _)| datagram[0]).collect()
    }

    fn last_sent(&self) -> Vec<u8> {
        self.doors.sent.last().unwrap().0.clone()
    }

    fn endpoint(&self, peer: u8) -> Option<SocketAddr> {
        let id = self.device.by_key[&public(peer)];
        self.device.peers[id.0].as_ref().unwrap().remote()
    }
}

/// Carries datagrams between the hosts until there are none; returns how many.
fn settle(hosts: &mut [&mut Host]) -> usize {
    let mut count = 0;
    loop {
        let mut flying = Vec::new();
        for host in hosts.iter_mut() {
            let from = host.number;
            flying.extend(
                host.doors
                    .sent
                    .drain(..)
                    .map(|(datagram, to)| (datagram, to.remote, from)),
            );
        }
        if flying.is_empty() {
            return count;
        }
        for (datagram, to, from) in flying {
            count += 1;
            for host in hosts.iter_mut().filter(|host| address(host.number) == to) {
                host.hear(&datagram, from);
            }
        }
        assert!(count < 1000, "they never fall silent");
    }
}

/// Two hosts that know each other and have a session.
fn acquainted() -> (Host, Host) {
    let (mut one, mut two) = (Host::new(1), Host::new(2));
    one.know(2, &format!("endpoint={}", address(2)));
    two.know(1, "");
    one.say_to(2, 100);
    settle(&mut [&mut one, &mut two]);
    assert_eq!(two.doors.delivered.len(), 1);
    two.doors.delivered.clear();
    (one, two)
}

#[test]
fn packets_that_waited_for_the_handshake_arrive_on_both_sides() {
    let (mut one, mut two) = (Host::new(1), Host::new(2));
    one.know(2, &format!("endpoint={}", address(2)));
    two.know(1, &format!("endpoint={}", address(1)));
    for length in [100, 200, 300] {
        one.say_to(2, length);
        two.say_to(1, length);
    }
    // Only one of the two initiations arrives.
    two.doors.sent.clear();

    settle(&mut [&mut one, &mut two]);

    let lengths = |host: &Host| host.doors.delivered.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(
        (lengths(&one), lengths(&two)),
        (vec![100, 200, 300], vec![100, 200, 300])
    );
}

#[test]
fn a_packet_is_padded_to_16_bytes_but_not_beyond_the_mtu() {
    let (mut one, mut two) = acquainted();
    one.device.set_mtu(1420);
    for (length, padded) in [
        (20, 32),
        (32, 32),
        (33, 48),
        (1408, 1408),
        (1409, 1420),
        (1420, 1420),
        (1421, 1421),
    ] {
        let packet = packet([10, 1, 0, 1], [10, 2, 0, 1], length);
        one.say(&packet);

        assert_eq!(one.last_sent().len(), padded + 32, "{length}");
        settle(&mut [&mut one, &mut two]);
        assert_eq!(two.doors.delivered.pop(), Some(packet));
    }
}

#[test]
fn a_source_counts_as_its_longest_prefix_says_whatever_else_the_sender_owns() {
    let (mut one, mut two) = acquainted();
    two.set(&format!(
        "public_key={}\nallowed_ip=10.0.0.0/8",
        hex(public(1).as_bytes())
    ))
    .unwrap();
    let mut from = |two: &mut Host, source: [u8; 4]| {
        one.say(&packet(source, [10, 2, 0, 1], 60));
        settle(&mut [&mut one, two]);
        two.doors.delivered.drain(..).count()
    };
    assert_eq!(from(&mut two, [10, 3, 0, 1]), 1);

    two.know(3, "");
    assert_eq!(from(&mut two, [10, 3, 0, 1]), 0);
    assert_eq!(from(&mut two, [10, 4, 0, 1]), 1);
    assert_eq!(from(&mut two, [11, 0, 0, 1]), 0);

    two.set(&format!("public_key={}\nremove=true", hex(public(3).as_bytes())))
        .unwrap();
    assert_eq!(from(&mut two, [10, 3, 0, 1]), 1);
}

/// A data message under an index that may be one of ours.
fn data(index: u32) -> Vec<u8> {
    let mut datagram = vec![0; 64];
    datagram[0] = 4;
    datagram[4..8].copy_from_slice(&index.to_le_bytes());
    datagram
}

#[test]
fn a_peer_that_uses_a_session_we_do_not_have_is_greeted_once_in_five_seconds() {
    let (mut one, mut two) = acquainted();
    let ours = one.device.by_index.keys().next().copied().unwrap();
    let nobodys = data((ours ^ 1) << 8);
    let over = data(ours << 8 | 77);

    one.hear(&nobodys, 3);
    assert_eq!(one.sent(), [], "no peer is there");

    for (start, datagram) in [(0, &nobodys), (10, &over)] {
        one.hear_after(Duration::from_secs(start), datagram, 2);
        assert_eq!(one.doors.sent[0].0[0], 1);
        settle(&mut [&mut one, &mut two]);

        one.hear_after(Duration::from_secs(start + 4), datagram, 2);
        assert_eq!(one.sent(), [], "too soon");
    }
}

#[test]
fn after_a_restart_the_first_packet_of_the_other_side_brings_the_session_back() {
    let (mut one, _) = acquainted();
    let mut two = Host::new(2);
    two.know(1, &format!("endpoint={}", address(1)));

    one.say_to(2, 100);
    settle(&mut [&mut one, &mut two]);
    assert_eq!(two.doors.delivered.len(), 0, "the first one is lost");
    one.say_to(2, 100);
    settle(&mut [&mut one, &mut two]);

    assert_eq!(two.doors.delivered.len(), 1);
}

#[test]
fn a_replayed_datagram_is_not_delivered_and_moves_no_endpoint() {
    let (mut one, mut two) = acquainted();
    one.say_to(2, 100);
    let datagram = one.last_sent();
    two.hear(&datagram, 1);
    assert_eq!(two.doors.delivered.len(), 1);

    two.hear(&datagram, 9);

    assert_eq!(two.doors.delivered.len(), 1);
    assert_eq!(two.endpoint(1), Some(address(1)));

    one.say_to(2, 100);
    two.hear(&one.last_sent(), 9);
    assert_eq!(two.endpoint(1), Some(address(9)));
    assert_eq!(two.device.by_endpoint.keys().collect::<Vec<_>>(), [&address(9)]);
}

#[test]
fn a_replayed_initiation_is_not_answered_and_moves_no_endpoint() {
    let (mut one, mut two) = (Host::new(1), Host::new(2));
    one.know(2, &format!("endpoint={}", address(2)));
    two.know(1, "");
    one.say_to(2, 100);
    let initiation = one.last_sent();
    two.hear(&initiation, 1);
    assert_eq!(two.sent(), [2]);

    two.hear(&initiation, 9);

    assert_eq!(two.sent(), []);
    assert_eq!(two.endpoint(1), Some(address(1)));
}

#[test]
fn a_peer_whose_clock_went_back_is_greeted_once_in_five_seconds() {
    let (mut one, mut two) = (Host::new(1), Host::new(2));
    one.know(2, &format!("endpoint={}", address(2)));
    two.know(1, "");
    one.say_to(2, 100);
    let late = one.last_sent();
    let mut restarted = Host::new(1);
    restarted.know(2, &format!("endpoint={}", address(2)));
    restarted.say_to(2, 100);
    settle(&mut [&mut restarted, &mut two]);

    two.hear(&late, 9);
    assert_eq!(two.sent(), [], "it does not come from the peer's endpoint");

    two.hear(&late, 1);
    let greeting = two.last_sent();
    assert_eq!(two.sent(), [1], "our own initiation");
    two.hear_after(Duration::from_secs(4), &late, 1);
    assert_eq!(two.sent(), [], "too soon");

    one.hear(&greeting, 2);
    assert_eq!(one.sent(), [1, 2], "its own first one, and the answer to ours");
}

#[test]
fn a_stranger_is_not_answered() {
    let (mut one, mut two) = (Host::new(1), Host::new(2));
    one.know(2, &format!("endpoint={}", address(2)));
    one.say_to(2, 100);

    two.hear(&one.last_sent(), 1);

    assert_eq!(two.sent(), []);
}

#[test]
fn keepalive_begins_a_handshake_at_once_and_speaks_in_silence() {
    let (mut one, mut two) = (Host::new(1), Host::new(2));
    two.know(1, "");
    one.know(2, &format!("endpoint={}\npersistent_keepalive_interval=25", address(2)));
    settle(&mut [&mut one, &mut two]);
    assert!(one.describe().contains("\npersistent_keepalive_interval=25\n"));
    assert!(
        !one.describe().contains("last_handshake_time_sec=0\n"),
        "{}",
        one.describe()
    );

    one.tick(Duration::from_secs(24));
    assert_eq!(one.sent(), []);
    one.tick(Duration::from_secs(26));
    assert_eq!(one.sent(), [4]);
    one.tick(Duration::from_secs(27));
    assert_eq!(one.sent(), []);
}

#[test]
fn the_timers_of_many_peers_run_in_several_goes() {
    let mut one = Host::new(1);
    for number in 2..42 {
        one.know(number, "");
    }

    let round: Vec<bool> = (0..6).map(|_| one.device.tick(now(), &mut one.doors)).collect();

    assert_eq!(round, [false, false, true, false, false, true]);
}

#[test]
fn a_device_is_not_its_own_peer() {
    let mut one = Host::new(1);
    let own = hex(public(1).as_bytes());
    assert_eq!(one.set(&format!("fwmark=1\npublic_key={own}")), Err(Errno::EINVAL));
    assert_eq!(
        one.set(&format!(
            "private_key={}\npublic_key={}",
            secret(2),
            hex(public(2).as_bytes())
        )),
        Err(Errno::EINVAL)
    );

    one.know(2, &format!("endpoint={}", address(2)));
    one.set(&format!("private_key={}", secret(2))).unwrap();

    assert_eq!(one.describe().matches("public_key").count(), 0, "{}", one.describe());
    assert_eq!(one.device.allowed_ips.owner(IpAddr::from([10, 2, 0, 1])), None);
}

#[test]
fn a_new_private_key_needs_new_handshakes() {
    let (mut one, mut two) = acquainted();
    one.set(&format!("private_key={}", secret(7))).unwrap();
    one.say_to(2, 100);
    assert_eq!(
        settle(&mut [&mut one, &mut two]),
        1,
        "an initiation that nobody answers"
    );

    two.know(7, "");
    two.set(&format!(
        "public_key={}\nallowed_ip=10.1.0.0/16",
        hex(public(7).as_bytes())
    ))
    .unwrap();
    one.set(&format!("private_key={}", secret(1))).unwrap();
    one.set(&format!("private_key={}", secret(7))).unwrap();
    one.say_to(2, 100);
    settle(&mut [&mut one, &mut two]);

    assert_eq!(two.doors.delivered.len(), 1);
}

#[test]
fn without_a_private_key_nothing_passes() {
    let (mut one, mut two) = acquainted();
    two.set(&format!("private_key={}", "0".repeat(64))).unwrap();
    one.say_to(2, 100);
    two.say_to(1, 100);

    settle(&mut [&mut one, &mut two]);

    assert_eq!((one.doors.delivered.len(), two.doors.delivered.len()), (0, 0));
    assert!(!two.describe().contains("private_key"));
}

#[test]
fn nothing_that_leads_to_a_peer_outlives_it() {
    let (mut one, _two) = acquainted();
    let key = hex(public(2).as_bytes());
    for number in 1..10 {
        one.set(&format!(
            "public_key={key}\npreshared_key={number:064x}\nendpoint=192.0.2.{number}:1"
        ))
        .unwrap();
        assert!(one.device.by_index.len() <= 2, "{:?}", one.device.by_index);
        assert_eq!(one.device.by_endpoint.len(), 1);
    }

    one.set(&format!("public_key={key}\nremove=true")).unwrap();

    assert_eq!(one.device.by_index, BTreeMap::new());
    assert_eq!(one.device.by_endpoint, BTreeMap::new());
    assert_eq!(one.device.by_key, BTreeMap::new());
    one.know(3, "");
    assert_eq!(one.device.peers.len(), 1, "the slot is used again");
}

#[test]
fn one_peer_too_many_is_refused_with_all_that_came_with_it() {
    let mut one = Host::new(1);
    one.device.most_peers = 2;
    let peer = |number: u8| format!("public_key={}\n", hex(public(number).as_bytes()));

    assert_eq!(one.set((peer(2) + &peer(3) + &peer(4)).trim_end()), Err(Errno::ENOSPC));
    assert_eq!(one.device.by_key.len(), 0);
    one.set((peer(2) + &peer(3)).trim_end()).unwrap();
    one.set((peer(3) + &peer(2)).trim_end()).unwrap();
    one.set(&format!("replace_peers=true\n{}", peer(4).trim_end())).unwrap();

    assert_eq!(one.device.by_key.len(), 1);
}

#[test]
fn update_only_makes_no_peer_and_replace_leaves_none() {
    let mut one = Host::new(1);
    one.set(&format!(
        "public_key={}\nupdate_only=true\nallowed_ip=10.0.0.0/8",
        hex(public(2).as_bytes())
    ))
    .unwrap();
    assert_eq!(one.describe().matches("public_key").count(), 0);

    one.know(2, "");
    one.set(&format!(
        "replace_peers=true\npublic_key={}\nallowed_ip=10.9.0.0/16",
        hex(public(3).as_bytes())
    ))
    .unwrap();

    let keys: Vec<PublicKey> = one.device.by_key.keys().copied().collect();
    assert_eq!(keys, [public(3)]);
    one.set(&format!(
        "public_key={}\nreplace_allowed_ips=true\nallowed_ip=10.8.0.0/16",
        hex(public(3).as_bytes())
    ))
    .unwrap();
    assert_eq!(one.describe().matches("allowed_ip").count(), 1);
}

#[test]
fn indices_say_nothing_about_each_other() {
    let mut one = Host::new(1);
    for peer in 2..66 {
        one.know(peer, "");
    }
    let indices: Vec<u32> = one.device.by_index.keys().copied().collect();

    let neighbours = indices.windows(2).filter(|pair| pair[1] - pair[0] == 1).count();
    assert_eq!(
        (indices.len(), indices.iter().all(|&index| index < 1 << 24)),
        (64, true)
    );
    assert!(neighbours < 3, "{indices:?}");
    assert!(indices[63] - indices[0] > 1 << 20, "{indices:?}");
}

#[test]
fn a_datagram_longer_than_any_packet_is_dropped() {
    let (mut one, mut two) = acquainted();
    one.say_to(2, 100);
    let mut datagram = one.last_sent();
    for length in [65535, 65536, 65537, 70000, 1 << 20] {
        datagram.resize(length, 0);
        two.hear(&datagram, 1);
    }
    one.sent();
    one.say(&packet([10, 1, 0, 1], [10, 2, 0, 1], LARGEST_PACKET));
    settle(&mut [&mut one, &mut two]);

    assert_eq!(
        two.doors.delivered.last().map(Vec::len),
        None,
        "an encrypted packet of that size is no datagram"
    );
}

/// Lines of a configuration.
fn peer_lines() -> impl Strategy<Value = String> {
    let prefix = (any::<IpAddr>(), 0u8..=32).prop_map(|(address, length)| format!("allowed_ip={address}/{length}\n"));
    let somewhere = any::<IpAddr>().prop_filter("not the unspecified address", |address| {
        !address.to_canonical().is_unspecified()
    });
    let endpoint =
        (somewhere, 1u16..).prop_map(|(address, port)| format!("endpoint={}\n", SocketAddr::new(address, port)));
    (
        2u8..,
        prop::option::of(endpoint),
        prop::option::of(any::<u16>()),
        any::<[u8; 32]>(),
        prop::collection::vec(prefix, 0..5),
    )
        .prop_map(|(number, endpoint, keepalive, preshared_key, prefixes)| {
            let keepalive = keepalive.map(|keepalive| format!("persistent_keepalive_interval={keepalive}\n"));
            format!(
                "public_key={}\npreshared_key={}\n{}{}{}",
                hex(public(number).as_bytes()),
                hex(&preshared_key),
                endpoint.unwrap_or_default(),
                keepalive.unwrap_or_default(),
                prefixes.concat(),
            )
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What a device says of itself, said to a new device, makes that device say the same.
    #[test]
    fn a_configuration_survives_its_text_form(peers in prop::collection::vec(peer_lines(), 0..6)) {
        let mut one = Host::new(1);
        one.set(peers.concat().trim_end()).unwrap();
        let counted = ["last_handshake", "tx_bytes", "rx_bytes", "errno"];
        let configuration = |host: &Host| {
            let lines: Vec<String> = host.describe().lines().filter(|line| !counted.iter().any(|word| line.starts_with(word))).map(str::to_owned).collect();
            lines.join("\n").trim_end().to_owned()
        };

        let mut two = Host::new(2);
        two.set(&configuration(&one)).unwrap();

        prop_assert_eq!(configuration(&one), configuration(&two));
    }

    #[test]
    fn no_datagram_makes_it_panic(kind in 0u8..6, mut datagram in prop::collection::vec(any::<u8>(), 0..300)) {
        let (_one, mut two) = acquainted();
        if datagram.len() >= 8 {
            let known = two.device.by_index.keys().next().copied().unwrap();
            datagram[..4].copy_from_slice(&[kind, 0, 0, 0]);
            datagram[4..8].copy_from_slice(&(known << 8 | 1).to_le_bytes());
        }
        two.hear(&datagram, 1);
    }

    #[test]
    fn a_damaged_datagram_does_nothing(at in 0usize..132, bit in 0u8..8) {
        let (mut one, mut two) = acquainted();
        one.say_to(2, 100);
        let mut datagram = one.last_sent();
        datagram[at] ^= 1 << bit;

        two.hear(&datagram, 9);

        prop_assert_eq!(two.doors.delivered.len(), 0);
        prop_assert_eq!(two.endpoint(1), Some(address(1)));
    }

    #[test]
    fn no_inner_packet_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), version in 0u8..16) {
        let (mut one, mut two) = acquainted();
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = version << 4 | 5;
        }
        one.say(&bytes);
        settle(&mut [&mut one, &mut two]);
    }
}
