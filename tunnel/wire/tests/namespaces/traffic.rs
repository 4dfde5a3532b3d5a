//! Our data plane at both ends: what gets through, and what must not.

use std::net::UdpSocket;
use std::time::Duration;

use super::lab::{Lab, Outer, Program, Wire, eventually, transfer};

const PATIENCE: Duration = Duration::from_secs(10);

fn pair(lab: &Lab, family: Outer) -> (Wire<'_>, Wire<'_>) {
    let one = Wire::start(lab, 1, Program::Shroud);
    let two = Wire::start(lab, 2, Program::Shroud);
    introduce(&one, &two, family);
    (one, two)
}

/// Each knows the other, and only `one` knows where the other is.
fn introduce(one: &Wire<'_>, two: &Wire<'_>, family: Outer) {
    one.add_peer(two);
    two.add_peer(one);
    one.set_endpoint(two, family);
}

#[test]
fn both_families_inside_over_both_families_outside() {
    for family in [Outer::V4, Outer::V6] {
        let lab = Lab::new(2);
        let (one, two) = pair(&lab, family);

        one.reaches(two.inner_v4());
        one.reaches(two.inner_v6());
        two.reaches(one.inner_v4());
        transfer(&one, &two, two.inner_v4(), 4 << 20);
        transfer(&two, &one, one.inner_v6(), 4 << 20);
    }
}

#[test]
fn a_preshared_key_must_be_the_same_on_both_sides() {
    let lab = Lab::new(2);
    let (one, two) = pair(&lab, Outer::V4);
    let (same, other) = (super::lab::run("wg genpsk"), super::lab::run("wg genpsk"));
    one.set(&format!(
        "peer {} preshared-key {}",
        two.public_key,
        one.secret("psk", &same)
    ));
    two.set(&format!(
        "peer {} preshared-key {}",
        one.public_key,
        two.secret("psk", &other)
    ));

    let refused = (0..5).all(|_| one.ping(two.inner_v4()).is_err());
    assert!(refused, "different keys agreed");

    two.set(&format!(
        "peer {} preshared-key {}",
        one.public_key,
        two.secret("psk", &same)
    ));
    one.reaches(two.inner_v4());
}

#[test]
fn a_changed_preshared_key_loses_no_packet() {
    let lab = Lab::new(2);
    let (one, two) = pair(&lab, Outer::V4);
    two.set_endpoint(&one, Outer::V4);
    one.reaches(two.inner_v4());
    let new = super::lab::run("wg genpsk");
    let before = one.last_handshake();

    one.set(&format!(
        "peer {} preshared-key {}",
        two.public_key,
        one.secret("psk", &new)
    ));
    one.ping(two.inner_v4())
        .expect("the old session carries on while only one side has the new key");
    two.set(&format!(
        "peer {} preshared-key {}",
        one.public_key,
        two.secret("psk", &new)
    ));
    two.ping(one.inner_v4())
        .expect("the old session carries on until there is a new one");

    eventually("a handshake with the new key", PATIENCE, || {
        one.ping(two.inner_v4())?;
        let after = one.last_handshake();
        if after == before { Err(after) } else { Ok(()) }
    });
}

#[test]
fn a_packet_from_an_address_that_another_peer_owns_is_dropped() {
    let lab = Lab::new(3);
    let (one, two) = pair(&lab, Outer::V4);
    let three = Wire::start(&lab, 3, Program::Shroud);
    one.set(&format!("peer {} allowed-ips 10.0.0.0/8", two.public_key));
    one.set(&format!("peer {} allowed-ips 10.3.0.0/16", three.public_key));
    two.node.ip("address add 10.3.0.9/32 dev lo");
    one.reaches(two.inner_v4());
    let receiver = one.node.enter(|| UdpSocket::bind((one.inner_v4(), 5555)).unwrap());
    receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let say = |from: &str, word: &str| {
        let from: std::net::IpAddr = from.parse().unwrap();
        let socket = two.node.enter(|| UdpSocket::bind((from, 0)).unwrap());
        socket.send_to(word.as_bytes(), (one.inner_v4(), 5555)).unwrap();
    };
    let hear = || {
        let mut bytes = [0; 64];
        let (length, from) = receiver.recv_from(&mut bytes).unwrap();
        (
            from.ip().to_string(),
            String::from_utf8(bytes[..length].to_vec()).unwrap(),
        )
    };

    // One tunnel keeps the order, so a forged packet that got through would be heard first.
    say("10.3.0.9", "forged");
    say("10.2.0.1", "honest");
    assert_eq!(hear(), ("10.2.0.1".to_owned(), "honest".to_owned()));

    one.set(&format!("peer {} remove", three.public_key));
    say("10.3.0.9", "no longer another's");
    assert_eq!(hear(), ("10.3.0.9".to_owned(), "no longer another's".to_owned()));
}

#[test]
fn a_peer_is_followed_to_its_new_address() {
    let lab = Lab::new(2);
    let (one, two) = pair(&lab, Outer::V4);
    one.reaches(two.inner_v4());

    two.node.ip("address del 192.0.2.2/24 dev eth0");
    two.node.ip("address add 192.0.2.22/24 dev eth0");
    two.reaches(one.inner_v4());

    assert_eq!(
        one.show("endpoints").trim(),
        format!("{}\t192.0.2.22:51820", two.public_key)
    );
    one.ping(two.inner_v4()).expect("the peer is where it was heard from");
}

#[test]
fn answers_leave_from_the_address_that_was_asked() {
    let lab = Lab::new(2);
    let (one, two) = pair(&lab, Outer::V4);
    for (address, endpoint) in [
        ("192.0.2.102/24", "192.0.2.102:51820"),
        ("2001:db8::102/64 nodad", "[2001:db8::102]:51820"),
    ] {
        two.node.ip(&format!("address add {address} dev eth0"));
        one.set(&format!("peer {} endpoint {endpoint}", two.public_key));

        one.reaches(two.inner_v4());

        // An answer from another address would have moved the endpoint there.
        assert_eq!(one.show("endpoints").trim(), format!("{}\t{endpoint}", two.public_key));
    }
}

#[test]
fn what_leaves_carries_the_mark() {
    let lab = Lab::new(2);
    let (one, two) = pair(&lab, Outer::V4);
    one.set("fwmark 0x20");
    super::lab::run(&format!("ip netns exec {} nft add table inet marks", one.node.name));
    super::lab::run(&format!(
        "ip netns exec {} nft add chain inet marks output {{ type filter hook output priority 0 ; }}",
        one.node.name
    ));
    for mark in ["0x20", "0x0"] {
        super::lab::run(&format!(
            "ip netns exec {} nft add rule inet marks output udp dport 51820 meta mark {mark} counter",
            one.node.name
        ));
    }

    one.reaches(two.inner_v4());

    let rules = super::lab::run(&format!(
        "ip netns exec {} nft list chain inet marks output",
        one.node.name
    ));
    let count = |mark: &str| {
        let line = rules
            .lines()
            .find(|line| line.contains(mark))
            .unwrap_or_else(|| panic!("{rules}"));
        line.split_whitespace()
            .skip_while(|word| *word != "packets")
            .nth(1)
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    assert!(count("mark 0x00000020") > 0, "{rules}");
    assert_eq!(count("mark 0x00000000"), 0, "{rules}");
    assert_eq!(one.show("fwmark").trim(), "0x20");
}

#[test]
fn a_handshake_flood_from_one_source_does_not_stop_another() {
    let lab = Lab::new(3);
    let (one, two) = pair(&lab, Outer::V4);
    let victim = one.outer(Outer::V4);
    let key: shroud_model::PublicKey = one.public_key.parse().unwrap();
    let key = boringtun::x25519::PublicKey::from(*key.as_bytes());
    let flood = lab.nodes[2].enter(|| UdpSocket::bind("192.0.2.3:0").unwrap());
    flood.set_nonblocking(true).unwrap();

    // Initiations of strangers: their mac1 is right, so that without a limit each would cost a Diffie-Hellman.
    let initiations: Vec<Vec<u8>> = (0..200u8)
        .map(|number| {
            let secret = boringtun::x25519::StaticSecret::from([number; 32]);
            let mut tunnel = boringtun::noise::Tunn::new(secret, key, None, None, number.into(), None);
            let mut buffer = [0; 148];
            tunnel.format_handshake_initiation(&mut buffer, false);
            buffer.to_vec()
        })
        .collect();
    let challenged = || {
        let mut reply = [0; 256];
        std::iter::from_fn(|| flood.recv_from(&mut reply).ok())
            .filter(|&(length, _)| length == 64)
            .count()
    };
    // Fewer than the device takes per second from everybody: it is this source that is over its rate.
    let mut count = 0;
    for initiation in initiations.iter().cycle().take(600) {
        flood.send_to(initiation, victim).unwrap();
        count += challenged();
    }
    eventually("most of the flood is challenged", Duration::from_secs(2), || {
        count += challenged();
        if count > 500 {
            Ok(())
        } else {
            Err(format!("{count} of 600"))
        }
    });

    two.set_endpoint(&one, Outer::V4);
    eventually("a handshake during the flood", Duration::from_secs(2), || {
        for initiation in &initiations {
            flood.send_to(initiation, victim).unwrap();
        }
        two.ping(one.inner_v4())
    });
}
