//! The loaded program gives the verdicts that the host tests expect, through `BPF_PROG_TEST_RUN`.

use std::collections::BTreeMap;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use shroud_ebpf::{Attach, Change, Direction, Gate, Mode, Reason, Table};

use crate::cases::{Fate, MASK, PLAIN, TUNNEL, cases};
use crate::namespace::{Namespace, PinDirectory};
use crate::packet::{echo, ethernet, frame};
use crate::tables::{table, table_with};

/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT` of `include/uapi/linux/pkt_cls.h`.
const GO_ON: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

#[test]
fn the_program_does_to_each_packet_what_it_must() {
    let mut loaded = Loaded::new(table(Mode::Enforce));
    let mut expected = BTreeMap::new();

    // BPF_PROG_TEST_RUN makes no packet that is shorter than its IP header; the host tests have those.
    for case in cases().into_iter().filter(|case| !is_cut_short(&case.frame)) {
        let (code, reason) = match case.fate {
            Fate::Pass(reason) => (GO_ON, reason),
            Fate::Redirect => (REDIRECT, Reason::Encrypted),
            Fate::Drop(reason) => (SHOT, reason),
        };
        let program = match case.direction {
            Direction::Egress => "shroud_egress",
            Direction::Ingress => "shroud_ingress",
            Direction::Decrypted => "shroud_decrypt",
        };
        let (given, mark) = loaded.run(program, &case.frame, case.mark);
        assert_eq!((given, mark), (code, case.mark), "{}", case.name);
        if reason != Reason::NotIp {
            *expected.entry((case.node, case.direction, reason as u8)).or_insert(0) += 1;
        }
    }

    let mut counted = BTreeMap::new();
    for counter in loaded.gate.counters().unwrap() {
        *counted
            .entry((counter.node.0, counter.direction, counter.reason as u8))
            .or_insert(0) += counter.packets;
        assert!(!counter.audited);
        assert!(counter.bytes >= counter.packets * 34, "{counter:?}");
    }
    assert_eq!(counted, expected);
}

#[test]
fn a_drop_is_told_with_who_and_why() {
    let mut loaded = Loaded::new(table(Mode::Enforce));

    loaded.run(
        "shroud_egress",
        &ethernet(&crate::packet::udp("10.244.1.2", "10.244.3.2", (1000, 2000), b"x")),
        0,
    );
    loaded.run("shroud_egress", &ethernet(&echo("10.244.1.2", "10.244.2.2")), 0);

    let told: Vec<_> = loaded
        .gate
        .events()
        .into_iter()
        .map(|event| {
            (
                event.addresses,
                event.protocol,
                event.ports,
                event.node.0,
                event.reason,
                event.audited,
            )
        })
        .collect();
    let addresses = Some(("10.244.1.2".parse().unwrap(), "10.244.3.2".parse().unwrap()));
    assert_eq!(told, [(addresses, 17, (1000, 2000), 3, Reason::Fenced, false)]);
}

#[test]
fn a_flood_of_drops_is_not_a_flood_of_events() {
    let mut loaded = Loaded::new(table(Mode::Enforce));
    let fenced = ethernet(&echo("10.244.1.2", "10.244.3.2"));

    for _ in 0..2000 {
        loaded.run("shroud_egress", &fenced, 0);
    }

    let told = loaded.gate.events().len();
    assert!((100..1000).contains(&told), "{told} events");
    let counted: u64 = loaded
        .gate
        .counters()
        .unwrap()
        .iter()
        .map(|counter| counter.packets)
        .sum();
    assert_eq!(counted, 2000);
}

#[test]
fn audit_lets_pass_and_counts_what_enforce_would_drop() {
    let mut loaded = Loaded::new(table(Mode::Audit));

    let fenced = loaded.run("shroud_egress", &ethernet(&echo("10.244.1.2", "10.244.3.2")), 0);
    let encrypted = loaded.run(
        "shroud_egress",
        &ethernet(&echo("fd00:10:244:1::2", "fd00:10:244:2::2")),
        0,
    );
    let incoming = loaded.run("shroud_ingress", &ethernet(&echo("10.244.2.2", "10.244.1.2")), 0);

    assert_eq!([fenced.0, encrypted.0, incoming.0], [GO_ON, REDIRECT, GO_ON]);
    let counted: Vec<_> = loaded
        .gate
        .counters()
        .unwrap()
        .iter()
        .map(|counter| (counter.reason, counter.audited, counter.packets))
        .collect();
    assert_eq!(
        counted,
        [
            (Reason::Encrypted, false, 1),
            (Reason::ClearText, true, 1),
            (Reason::Fenced, true, 1)
        ]
    );
}

#[test]
fn off_lets_everything_pass() {
    let mut loaded = Loaded::new(table(Mode::Off));

    let codes = [
        loaded
            .run("shroud_egress", &ethernet(&echo("10.244.1.2", "10.244.3.2")), 0)
            .0,
        loaded
            .run("shroud_egress", &ethernet(&echo("10.244.1.2", "10.244.2.2")), 0)
            .0,
        loaded
            .run(
                "shroud_ingress",
                &ethernet(&echo("fd00:10:244:2::2", "fd00:10:244:1::2")),
                0,
            )
            .0,
    ];

    assert_eq!(codes, [GO_ON; 3]);
    assert!(
        loaded
            .gate
            .counters()
            .unwrap()
            .iter()
            .all(|counter| counter.reason == Reason::Off)
    );
}

#[test]
fn without_an_encryption_device_nothing_is_sent() {
    let mut loaded = Loaded::new(table_with(Mode::Enforce, None));

    let (code, _) = loaded.run("shroud_egress", &ethernet(&echo("10.244.1.2", "10.244.2.2")), 0);

    assert_eq!(code, SHOT);
    assert_eq!(loaded.gate.counters().unwrap()[0].reason, Reason::NoDevice);
}

#[test]
fn a_pod_device_sets_marks_and_drops_nothing() {
    let mut loaded = Loaded::new(table(Mode::Enforce));
    let mut mark = |packet: Vec<u8>, mark| loaded.run("shroud_pod", &packet, mark);

    assert_eq!(
        mark(ethernet(&echo("10.244.1.2", "10.244.3.2")), MASK | 0x4000),
        (GO_ON, 0x4000)
    );
    assert_eq!(
        mark(ethernet(&echo("10.244.1.7", "10.244.2.2")), TUNNEL),
        (GO_ON, PLAIN)
    );
    assert_eq!(
        mark(ethernet(&echo("fd00:10:244:1::2", "fd00:10:244:2::2")), PLAIN),
        (GO_ON, 0)
    );
    assert_eq!(mark(frame(0x0806, &[0; 28]), TUNNEL), (GO_ON, 0));
}

#[test]
fn headerless_devices_have_programs_of_their_own() {
    let mut loaded = Loaded::new(table(Mode::Enforce));
    // BPF_PROG_TEST_RUN gives 14 bytes of Ethernet header to whatever we pass; these programs read from there on as on a bare device.
    let bare = |packet: &[u8]| packet.to_vec();

    assert_eq!(
        loaded
            .run("shroud_l3_out", &bare(&echo("10.244.1.2", "10.244.2.2")), 0)
            .0,
        REDIRECT
    );
    assert_eq!(
        loaded
            .run("shroud_l3_in", &bare(&echo("fd00:10:244:2::2", "fd00:10:244:1::2")), 0)
            .0,
        SHOT
    );
    assert_eq!(
        loaded.run("shroud_l3_pod", &bare(&echo("10.244.1.7", "10.244.2.2")), TUNNEL),
        (GO_ON, PLAIN)
    );
}

/// How many instructions a verifier walks at most (`BPF_COMPLEXITY_LIMIT_INSNS`, include/linux/bpf.h). Older kernels walk more paths than
/// this one: half as many again on 6.1.
const VERIFIER_LIMIT: u32 = 1_000_000;

#[test]
fn the_verifier_is_far_from_its_limit() {
    let loaded = Loaded::new(table(Mode::Enforce));

    let mut most = 0;
    for program in [
        "shroud_egress",
        "shroud_ingress",
        "shroud_pod",
        "shroud_l3_out",
        "shroud_l3_in",
        "shroud_l3_pod",
        "shroud_decrypt",
        "shroud_l3_decr",
    ] {
        let program = SchedClassifier::from_pin(loaded.path(program)).unwrap();
        let info = program.info().unwrap();
        let walked = info.verified_instruction_count().unwrap();
        eprintln!("{}: {walked} instructions walked", info.name_as_str().unwrap());
        most = most.max(walked);
    }
    assert!(most < VERIFIER_LIMIT / 4, "{most} instructions");
}

fn is_cut_short(frame: &[u8]) -> bool {
    let header = match frame[12..14] {
        [0x08, 0x00] => 20,
        [0x86, 0xdd] => 40,
        _ => 0,
    };
    frame.len() < 14 + header
}

/// A gate that hangs nowhere.
struct Loaded {
    gate: Gate,
    pins: PinDirectory,
    _namespace: Namespace,
}

impl Loaded {
    fn new(table: Table) -> Self {
        let namespace = Namespace::new();
        let pins = PinDirectory::new();
        let mut gate = Gate::open(&pins.options(Attach::Auto)).unwrap_or_else(|error| panic!("{error}"));
        gate.apply(&Change::ReplaceTable {
            old: None,
            new: Box::new(table),
        })
        .unwrap();
        Self {
            gate,
            pins,
            _namespace: namespace,
        }
    }

    fn path(&self, program: &str) -> String {
        let programs = self.pins.0.join("v3/programs");
        let build = std::fs::read_dir(programs).unwrap().next().unwrap().unwrap().path();
        build.join(program).to_str().unwrap().to_owned()
    }

    /// Runs a program on a packet; returns its code and the packet's mark afterwards.
    fn run(&mut self, program: &str, packet: &[u8], mark: u32) -> (i32, u32) {
        /// `mark` is the third word of the `struct __sk_buff` of `include/uapi/linux/bpf.h`.
        const MARK: std::ops::Range<usize> = 8..12;
        let program = SchedClassifier::from_pin(self.path(program)).unwrap();
        let mut context = [0; 192];
        context[MARK].copy_from_slice(&mark.to_ne_bytes());
        let mut after = [0; 192];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.ctx_in = Some(&context);
        options.ctx_out = Some(&mut after);
        let result = program.test_run(options).unwrap();
        (
            result.return_value.cast_signed(),
            u32::from_ne_bytes(after[MARK].try_into().unwrap()),
        )
    }
}
