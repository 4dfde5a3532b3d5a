//! Against the other implementations, each side beginning once.

use super::lab::{Lab, Outer, Program, Wire, eventually, run, transfer};
use std::time::Duration;

/// Whoever begins knows where the other is; the other learns it.
fn meets(program: Program, family: Outer) {
    if program.find().is_none() {
        return;
    }
    for shroud_begins in [true, false] {
        let lab = Lab::new(2);
        let ours = Wire::start(&lab, 1, Program::Shroud);
        let theirs = Wire::start(&lab, 2, program);
        let (beginner, other) = if shroud_begins {
            (&ours, &theirs)
        } else {
            (&theirs, &ours)
        };
        let secret = run("wg genpsk");
        let psk = |wire: &Wire<'_>| format!("preshared-key {}", wire.secret("psk", &secret));
        other.add_peer_with(beginner, &psk(other));
        beginner.add_peer_with(other, &format!("{} endpoint {}", psk(beginner), other.outer(family)));

        beginner.reaches(other.inner_v4());
        beginner.reaches(other.inner_v6());
        transfer(&ours, &theirs, theirs.inner_v4(), 2 << 20);
        transfer(&theirs, &ours, ours.inner_v6(), 2 << 20);

        eventually("our counters move", Duration::from_secs(2), || {
            let counters = ours.show("transfer");
            let moved = counters
                .split_whitespace()
                .skip(1)
                .all(|count| count.parse::<u64>().unwrap() > 2 << 20);
            if moved { Ok(()) } else { Err(counters) }
        });
        assert!(ours.show("latest-handshakes").split_whitespace().nth(1).unwrap() > "1700000000");
    }
}

#[test]
fn wireguard_go_over_ipv4() {
    meets(Program::WireguardGo, Outer::V4);
}

#[test]
fn wireguard_go_over_ipv6() {
    meets(Program::WireguardGo, Outer::V6);
}

#[test]
fn boringtun_over_ipv4() {
    meets(Program::Boringtun, Outer::V4);
}

#[test]
fn boringtun_over_ipv6() {
    meets(Program::Boringtun, Outer::V6);
}
