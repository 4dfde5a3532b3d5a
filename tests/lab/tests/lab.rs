//! The lab is judged before it judges: each oracle fires where it must and is silent where it must.

#![expect(
    clippy::disallowed_methods,
    reason = "tests look at the kernel through iproute2 on purpose"
)]
#![expect(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use shroud_lab::capture::Direction;
use shroud_lab::capture::tap::Tap;
use shroud_lab::frame::Allowed;
use shroud_lab::traffic::{Load, Mix, Pulse, run_all};
use shroud_lab::{Capture, Evidence, Family, Flow, Lab, Netns, Protocol, Topology, eventually};

#[test]
fn plain_traffic_between_pods_of_two_nodes_is_seen_in_every_family_and_protocol() {
    let lab = plain_lab("seen");

    for flow in every_kind(&lab, "a0", "b0") {
        let capture = Capture::start(&lab, rules(&lab)).unwrap();
        let outcome = flow.run(&lab.markers);
        let evidence = capture.stop().unwrap();

        assert_eq!(outcome.error, None, "{}{}", outcome.flow, lab.dump());
        assert_eq!(evidence.complete(), Ok(()));
        // Each message crosses two ports, in both directions.
        assert!(
            evidence.plaintext_bytes() >= 2 * outcome.bytes,
            "{}\n{evidence}",
            outcome.flow
        );
        assert!(evidence.stranger_frames() >= evidence.plaintext_frames(), "{evidence}");
        let offender = &evidence.ports["port-a"].offenders[0];
        assert_eq!(offender.flow.as_deref(), Some(outcome.flow.as_str()));
        assert!(evidence.clean().is_err());
    }
}

#[test]
fn traffic_that_stays_on_a_node_leaves_the_underlay_silent() {
    let lab = plain_lab("silent");
    let capture = Capture::start(&lab, rules(&lab)).unwrap();

    let outcomes = run_all(&every_kind(&lab, "a0", "a1"), &lab.markers, 2, &|_| ());
    let evidence = capture.stop().unwrap();

    let errors: Vec<_> = outcomes.iter().filter(|outcome| !outcome.ok()).collect();
    assert!(errors.is_empty(), "{errors:?}{}", lab.dump());
    assert_eq!(evidence.clean(), Ok(()));
    assert_eq!(evidence.plaintext_bytes(), 0);
}

#[test]
fn every_frame_that_a_link_counts_is_captured() {
    let lab = plain_lab("counted");
    // Neighbours are known afterwards, so that the number of frames is known, too.
    assert_ok(
        &Flow::new(Protocol::Icmp, Family::V4, lab.pod("a0"), lab.pod("b0")),
        &lab,
    );
    let before = link_frames(&lab, "port-a");
    let capture = Capture::start(&lab, rules(&lab)).unwrap();

    assert_ok(
        &Flow::new(Protocol::Icmp, Family::V4, lab.pod("a0"), lab.pod("b0")).sizes(&[64; 50]),
        &lab,
    );
    assert_ok(
        &Flow::new(Protocol::Tcp, Family::V6, lab.pod("a0"), lab.pod("b0")).sizes(&[3_000_000]),
        &lab,
    );
    let evidence = capture.stop().unwrap();

    // The link's counter over the time of the capture, and over a time around it; a late FIN may lie in between.
    let port = &evidence.ports["port-a"];
    let captured = port.from_node + port.to_node;
    let around = link_frames(&lab, "port-a") - before;
    assert!(
        port.counted > 100 && around - port.counted <= 3,
        "{around} around\n{evidence}"
    );
    assert!(
        (port.counted..=around).contains(&captured),
        "{captured} captured, {around} around\n{evidence}"
    );
    assert_eq!(evidence.complete(), Ok(()));
}

#[test]
fn a_capture_ends_while_traffic_goes_on() {
    let lab = plain_lab("goes-on");
    let pulse = Pulse::start(Protocol::Udp, Family::V4, lab.pod("a0"), lab.pod("b0"), 5, &lab.markers).unwrap();
    let capture = Capture::start(&lab, rules(&lab)).unwrap();
    eventually("frames", Duration::from_secs(5), || {
        match capture.so_far().plaintext_frames() {
            0..100 => Err("fewer than 100".into()),
            many => Ok(many),
        }
    })
    .unwrap();

    let start = Instant::now();
    let evidence = capture.stop().unwrap();

    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(evidence.complete(), Ok(()));
    assert!(pulse.worst().0 < Duration::from_secs(1));
}

#[test]
fn a_capture_that_missed_a_frame_is_not_evidence() {
    let mut evidence = Evidence::default();
    let port = evidence.ports.entry("port-a".into()).or_default();
    (port.from_node, port.to_node, port.counted) = (5, 4, 10);

    assert_eq!(evidence.ports["port-a"].missed(), 1);
    assert!(
        evidence
            .clean()
            .unwrap_err()
            .contains("9 frames captured, 0 dropped by the socket, 10 counted")
    );
}

#[test]
fn nodes_reach_remote_pods_and_pods_reach_the_internet() {
    let lab = plain_lab("reach");
    let pods: ipnet::IpNet = "10.244.0.0/16".parse().unwrap();
    let internet: ipnet::IpNet = "192.0.2.0/24".parse().unwrap();
    let allowed = rules(&lab).and("the internet", (pods, internet), None);
    let capture = Capture::start(&lab, allowed).unwrap();

    for family in Family::BOTH {
        for protocol in Protocol::ALL {
            assert_ok(&Flow::new(protocol, family, &lab.node("a").host, lab.pod("b0")), &lab);
            assert_ok(&Flow::new(protocol, family, &lab.node("a").host, lab.pod("a0")), &lab);
            assert_ok(&Flow::new(protocol, family, lab.pod("a0"), &lab.internet), &lab);
        }
    }

    let evidence = capture.stop().unwrap();
    assert!(evidence.ports["port-a"].allowed["the internet"] > 0, "{evidence}");
    assert!(evidence.plaintext_bytes() > 0, "{evidence}");
}

#[test]
fn a_flow_that_is_dropped_fails_and_says_so() {
    let lab = plain_lab("dropped");
    lab.node("a")
        .host
        .netns
        .ip("route add blackhole 10.244.2.10/32")
        .unwrap();
    lab.node("a")
        .host
        .netns
        .ip("-6 route add blackhole fd00:10:244:2::10/128")
        .unwrap();

    for flow in every_kind(&lab, "a0", "b0") {
        let outcome = flow.patience(Duration::from_millis(400)).run(&lab.markers);

        assert!(!outcome.ok(), "{} arrived through a black hole", outcome.flow);
        assert_eq!(outcome.bytes, 0, "{}", outcome.flow);
    }
}

#[test]
fn pulses_notice_an_interruption_and_its_end() {
    let lab = plain_lab("pulse");
    let pulse = |protocol, family| Pulse::start(protocol, family, lab.pod("a0"), lab.pod("b0"), 3, &lab.markers);
    let pulses = [
        pulse(Protocol::Tcp, Family::V4).unwrap(),
        pulse(Protocol::Udp, Family::V6).unwrap(),
    ];
    let beating = |count: u64| {
        let least = pulses
            .iter()
            .flat_map(Pulse::beats)
            .map(|beat| beat.echoes)
            .min()
            .unwrap();
        if least >= count {
            Ok(least)
        } else {
            Err(format!("{least} echoes"))
        }
    };
    let echoes = eventually("20 echoes each", Duration::from_secs(5), || beating(20)).unwrap();
    for pulse in &pulses {
        let (gap, lost) = pulse.worst();
        assert!(
            gap < Duration::from_millis(400) && lost.is_none(),
            "undisturbed: {gap:?} {lost:?}"
        );
    }

    lab.underlay.ip("link set port-b down").unwrap();
    eventually("silence of 600 ms in each", Duration::from_secs(5), || {
        let least = pulses
            .iter()
            .flat_map(Pulse::beats)
            .map(|beat| beat.silent_for)
            .min()
            .unwrap();
        if least > Duration::from_millis(600) {
            Ok(())
        } else {
            Err(format!("{least:?}"))
        }
    })
    .unwrap();
    lab.underlay.ip("link set port-b up").unwrap();

    lab.eventually("echoes again", Duration::from_secs(10), || beating(echoes + 40))
        .unwrap();
    for pulse in pulses {
        for beat in pulse.stop() {
            assert!(beat.longest_gap > Duration::from_millis(600), "{beat:?}");
            assert!(beat.silent_for < Duration::from_millis(600), "{beat:?}");
            assert_eq!(beat.lost, None);
        }
    }
}

#[test]
fn a_connection_that_is_reset_is_lost() {
    let lab = plain_lab("reset");
    let pulse = Pulse::start(Protocol::Tcp, Family::V4, lab.pod("a0"), lab.pod("b0"), 1, &lab.markers).unwrap();

    lab.pod("a0")
        .netns
        .check("ss", &["--kill", "-t", "dst", "10.244.2.10"])
        .unwrap();

    let lost = eventually("a lost connection", Duration::from_secs(5), || {
        pulse.worst().1.ok_or_else(|| format!("{:?}", pulse.beats()))
    });
    assert!(lost.is_ok(), "{lost:?}");
}

/// A few connections of each kind between two pods.
fn load(lab: &Lab) -> Load {
    let mix = Mix {
        bulk: 2,
        echo: 3,
        idle: 3,
    };
    Load::start(&[(lab.pod("a0"), lab.pod("b0"))], mix, &lab.markers).unwrap()
}

fn all_speak(load: &Load) {
    let since = Instant::now();
    eventually("every connection speaks", Duration::from_secs(10), || {
        match load.silent_since(since).as_slice() {
            [] => Ok(()),
            silent => Err(format!("{silent:?}")),
        }
    })
    .unwrap();
}

#[test]
fn a_load_feels_an_interruption_and_its_end() {
    let lab = plain_lab("load");
    let load = load(&lab);
    all_speak(&load);
    load.forget();
    all_speak(&load);
    let undisturbed = load.fare();
    assert!(
        undisturbed.longest_stall < Duration::from_millis(400) && undisturbed.lost.is_empty(),
        "{undisturbed}"
    );

    let capture = Capture::start(&lab, rules(&lab)).unwrap();
    lab.underlay.ip("link set port-b down").unwrap();
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(load.silent_since(Instant::now() - Duration::from_millis(200)).len(), 8);
    lab.underlay.ip("link set port-b up").unwrap();

    all_speak(&load);
    let fare = load.stop();
    assert!(fare.longest_stall > Duration::from_millis(700), "{fare}");
    assert_eq!((fare.connections, fare.lost), (8, Vec::new()));
    // The capture has seen all that there was to see before and after.
    assert_eq!(capture.stop().unwrap().complete(), Ok(()));
}

#[test]
fn connections_of_a_load_that_are_killed_are_lost() {
    let lab = plain_lab("killed");
    let load = load(&lab);
    all_speak(&load);

    lab.pod("a0")
        .netns
        .check("ss", &["--kill", "-t", "dst", "10.244.2.10"])
        .unwrap();

    // Every second of eight is over IPv4.
    let lost = eventually("four lost connections", Duration::from_secs(5), || {
        let fare = load.fare();
        if fare.lost.len() == 4 {
            Ok(fare)
        } else {
            Err(fare.to_string())
        }
    });
    assert!(lost.is_ok(), "{lost:?}");
    all_speak(&load);
}

#[test]
fn a_tap_hands_out_frames_as_they_were_sent() {
    let lab = plain_lab("tap");
    let tap = Tap::open(&lab, "b").unwrap();
    let _pulse = Pulse::start(Protocol::Udp, Family::V4, lab.pod("a0"), lab.pod("b0"), 1, &lab.markers).unwrap();

    let is_udp = |frame: &[u8]| frame.get(23) == Some(&17);
    let frames = tap
        .frames(5, Direction::ToNode, is_udp, Duration::from_secs(5))
        .unwrap();

    // Ethernet, IPv4, UDP, and what a pulse sends.
    assert_eq!(frames.len(), 5);
    for frame in frames {
        assert_eq!(frame.len(), 14 + 20 + 8 + 64);
        assert_eq!(frame[26..34], [10, 244, 1, 10, 10, 244, 2, 10]);
    }
}

#[test]
fn nothing_is_left_behind() {
    let lab = plain_lab("gone");
    let folder = lab.folder.clone();
    let prefix = lab.underlay.name().trim_end_matches("underlay").to_owned();
    let mut sleeper = lab
        .pod("a0")
        .netns
        .spawn(
            Command::new("sleep")
                .arg("1000")
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        )
        .unwrap();
    fs::create_dir_all("/run/wireguard").unwrap();
    let socket = format!("/run/wireguard/{}.sock", lab.node("a").device);
    fs::write(&socket, "").unwrap();
    assert!(lab.bpf().join("../bpf").exists() && mounts().contains(folder.to_str().unwrap()));
    assert_eq!(namespaces(&prefix).len(), 2 + 2 + 4);

    assert_eq!(lab.remove(), Vec::<String>::new());

    assert_eq!(sleeper.try_wait().unwrap().and_then(|status| status.signal()), Some(9));
    assert_eq!(namespaces(&prefix), Vec::<String>::new());
    assert!(!folder.exists());
    assert!(!Path::new(&socket).exists());
    assert!(!mounts().contains(folder.to_str().unwrap()));
}

#[test]
fn a_panic_leaves_nothing_behind() {
    let mut prefix = String::new();

    let result = catch_unwind(AssertUnwindSafe(|| {
        let lab = Topology::new("panic").nodes(1).pods(1).build().unwrap();
        prefix = lab.underlay.name().trim_end_matches("underlay").to_owned();
        panic!("on purpose, with {} namespaces", namespaces(&prefix).len());
    }));

    assert_eq!(
        result.unwrap_err().downcast::<String>().unwrap().as_str(),
        "on purpose, with 4 namespaces"
    );
    assert_eq!(namespaces(&prefix), Vec::<String>::new());
}

#[test]
fn a_new_lab_sweeps_what_dead_processes_left_and_nothing_else() {
    let mut child = Command::new("true").spawn().unwrap();
    let dead = child.id();
    child.wait().unwrap();
    let leftover = format!("shroud-{dead}-0-a");
    let foreign = Netns::new(&format!("foreign-{}", std::process::id())).unwrap();
    let alive = Netns::new(&format!("shroud-{}-77-a", std::process::id())).unwrap();
    Command::new("ip").args(["netns", "add", &leftover]).status().unwrap();
    fs::create_dir_all(format!("/run/shroud-lab-{dead}-0/bpf")).unwrap();

    Topology::new("sweep").nodes(1).pods(0).build().unwrap();

    assert_eq!(namespaces(&leftover), Vec::<String>::new());
    assert!(!Path::new(&format!("/run/shroud-lab-{dead}-0")).exists());
    assert_eq!(namespaces(foreign.name()), [foreign.name()]);
    assert_eq!(namespaces(alive.name()), [alive.name()]);
}

#[test]
fn nodes_start_without_forwarding() {
    let lab = Topology::new("forwarding").nodes(1).pods(1).build().unwrap();

    let node = &lab.node("a").host.netns;

    assert_eq!(node.sysctl("net.ipv4.ip_forward").unwrap(), "0");
    assert_eq!(node.sysctl("net.ipv6.conf.all.forwarding").unwrap(), "0");
}

#[test]
fn a_program_that_fails_is_quoted_with_what_it_said() {
    let lab = Topology::new("errors").nodes(1).pods(0).build().unwrap();

    let error = lab
        .node("a")
        .host
        .netns
        .ip("link set nonsense up")
        .unwrap_err()
        .to_string();

    assert!(
        error.contains("`ip link set nonsense up`") && error.contains("Cannot find device"),
        "{error}"
    );
}

#[test]
fn a_fact_that_never_comes_is_reported_with_its_last_value_and_a_dump() {
    let lab = Topology::new("never").nodes(1).pods(0).build().unwrap();

    let never: anyhow::Result<()> = lab.eventually("rain", Duration::from_millis(30), || Err("sunshine".into()));

    let error = format!("{:#}", never.unwrap_err());
    assert!(error.contains("rain: not within 30ms; last seen: sunshine"), "{error}");
    assert!(
        error.contains("--- ip rule") && error.contains("172.18.0.1/24"),
        "{error}"
    );
}

/// Two nodes with two pods each, forwarding and routes set by hand.
fn plain_lab(name: &str) -> Lab {
    let lab = Topology::new(name).nodes(2).pods(2).build().unwrap();
    lab.route_plainly().unwrap();
    lab
}

fn rules(lab: &Lab) -> Allowed {
    Allowed::wireguard(51820, lab.protected())
}

fn every_kind(lab: &Lab, from: &str, to: &str) -> Vec<Flow> {
    let kinds = Protocol::ALL
        .into_iter()
        .flat_map(|protocol| Family::BOTH.map(|family| (protocol, family)));
    kinds
        .map(|(protocol, family)| Flow::new(protocol, family, lab.pod(from), lab.pod(to)))
        .collect()
}

fn assert_ok(flow: &Flow, lab: &Lab) {
    let outcome = flow.run(&lab.markers);
    assert!(outcome.ok(), "{outcome:?}{}", lab.dump());
}

fn link_frames(lab: &Lab, link: &str) -> u64 {
    let text = lab.underlay.check("ip", &["-s", "-j", "link", "show", link]).unwrap();
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    let packets = |way: &str| links[0]["stats64"][way]["packets"].as_u64().unwrap();
    packets("rx") + packets("tx")
}

fn namespaces(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(prefix)).collect()
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mounts").unwrap()
}
