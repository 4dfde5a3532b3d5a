//! Plays every recording against the server. What is not played is left out by number, with the reason.

use std::time::Duration;

use serde_json::json;
use shroud_apiserver::{
    Action, Answer, Check, Fault, Grant, Options, Policy, Requests, ServiceAccount, StreamingLists, Validation, Verb,
    WatchEffect,
};

use crate::client::{Client, Request};
use crate::recording::Replay;

/// The server's seconds are a tenth of ours.
fn quick() -> Options {
    let account = ServiceAccount {
        namespace: "mesh".into(),
        name: "agent".into(),
    };
    let grants = vec![Grant::new(&account.username(), "get list watch patch", "", "nodes")];
    Options {
        second: Duration::from_millis(100),
        policy: None,
        account,
        grants,
        ..Options::default()
    }
}

#[test]
fn authentication_and_authorization() {
    let mut replay = Replay::new("01-auth", quick());

    replay.play_all(1..=13);
    replay.leave_out(
        14..=18,
        "the Node authorizer and NodeRestriction judge kubelets, which no test of ours plays over HTTP",
    );
    replay.play_all(19..=21);
    replay.finish();
}

#[test]
fn nodes_are_created_read_replaced_and_deleted() {
    let mut replay = Replay::new("02-node-crud", quick());

    replay.play_all(1..=32);
    replay.patch(298, "node-a", &json!({"finalizers": ["e.example/hold"]}));
    replay.play_all(33..=36);
    replay.finish();
}

#[test]
fn nodes_are_patched_and_applied() {
    let mut replay = Replay::new("03-patch", quick());
    replay.node(302, "node-a", "10.244.1.0/24", &json!({}));

    replay.play_all(1..=24);
    replay.delete(311, "node-a");
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}});
    let create = Request::new("POST", "/api/v1/nodes?fieldManager=creator").header("Content-Type", "application/json");
    replay.write(312, &create.body(&node.to_string()));
    replay.play_all(25..=40);
    replay.leave_out([41], "the YAML of our parser is 1.2, in which an unquoted Y is text");
    replay.play(42);
    replay.delete(320, "node-new");
    replay.play(43);
    replay.finish();
}

#[test]
fn lists() {
    let mut replay = Replay::new("04-list", quick());
    replay.server.advance_to(100);
    replay.server.compact();

    replay.play(1);
    for (index, name) in (1..).zip(["node-a", "node-b", "node-c", "node-d", "node-e"]) {
        let labels = if index <= 3 { json!({"mesh": "on"}) } else { json!({}) };
        replay.node(359 + index, name, &format!("10.244.{index}.0/24"), &labels);
    }
    replay.play_all(2..=17);
    replay.server.advance_to(365);
    replay.play_all(18..=23);
    replay.leave_out([24], "tables are for people");
    replay.play_all(25..=30);
    compressed(&mut replay, 31);
    replay.server.advance_to(370);
    replay.play(32);
    replay.server.advance_to(383);
    replay.server.compact();
    replay.play_all([33]);
    replay.server.advance_to(384);
    replay.play_all(34..=36);
    for (revision, name) in (978..).zip(["node-a", "node-b", "node-c", "node-d", "node-e"]) {
        replay.delete(revision, name);
    }
    replay.play_all(37..=44);
    replay.finish();
}

/// The recorded body is only described: it is compressed, and was long.
fn compressed(replay: &mut Replay, number: usize) {
    let (recorded, response) = replay.exchange(number);
    let filler = "y".repeat(200_000);
    replay.patch(366, "node-e", &json!({"annotations": {"filler": filler}}));
    let mut client = Client::connect(&replay.server, &shroud_apiserver::Identity::Admin).unwrap();
    let mut request = Request::get(recorded["path"].as_str().unwrap());
    for (name, value) in recorded["headers"].as_object().unwrap() {
        request = request.header(name, value.as_str().unwrap());
    }

    let answer = client.ask(&request).unwrap();

    for pair in response["headers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|pair| pair[0] != "Content-Length")
    {
        assert_eq!(answer.header(pair[0].as_str().unwrap()), pair[1].as_str());
    }
    let mut body = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(answer.body.as_slice()), &mut body).unwrap();
    assert!(body.contains(&filler) && answer.body.len() < 10_000);
    replay.patch(367, "node-e", &json!({"annotations": null}));
}

#[test]
fn watches() {
    let mut replay = Replay::new("05-watch", quick());
    replay.node(410, "node-a", "10.244.1.0/24", &json!({}));
    replay.node(411, "node-b", "10.244.2.0/24", &json!({}));
    let annotate = |replay: &Replay, revision, name: &str, value: &str| {
        replay.patch(revision, name, &json!({"annotations": {"k": value}}))
    };

    replay.watch(1, |replay| {
        annotate(replay, 412, "node-a", "1");
        let again = json!({"metadata": {"annotations": {"k": "1"}}});
        replay.write(412, &Request::patch("/api/v1/nodes/node-a", "merge-patch+json", &again));
        replay.node(413, "node-c", "10.244.3.0/24", &json!({}));
        replay.delete(414, "node-c");
    });
    replay.watch(2, |replay| annotate(replay, 415, "node-b", "2"));
    replay.watch(3, |replay| annotate(replay, 416, "node-b", "3"));
    replay.watch(4, |replay| {
        annotate(replay, 417, "node-a", "4");
        replay.create(
            418,
            &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-c"}}),
        );
        replay.delete(419, "node-c");
    });
    replay.server.advance_to(421);
    replay.watch(5, |_| {});
    replay.server.advance_to(423);
    replay.watch(6, |_| {});
    replay.watch(7, |replay| annotate(replay, 424, "node-a", "5"));
    replay.server.advance_to(425);
    replay.watch(8, |_| {});
    replay.watch(9, |_| {});
    replay.server.advance_to(426);
    replay.watch(10, |_| {});
    replay.watch(11, |_| {});
    replay.play_all(12..=15);
    replay.server.advance_to(427);
    replay.watch(16, |replay| {
        replay.patch(428, "node-b", &json!({"labels": {"mesh": "on"}}));
        annotate(replay, 429, "node-b", "6");
        replay.patch(430, "node-b", &json!({"labels": null}));
    });
    replay.patch(431, "node-a", &json!({"labels": {"mesh": "on"}}));
    replay.server.advance_to(433);
    replay.watch(17, |replay| {
        annotate(replay, 434, "node-b", "8");
        annotate(replay, 435, "node-a", "8");
    });
    replay.play(18);
    replay.watch(19, |_| {});
    replay.play(20);
    replay.server.advance_to(437);
    replay.watch(21, |_| {});
    replay.watch(22, |_| {});
    replay.play(23);
    replay.watch(24, |_| {});
    replay.play(25);
    replay.watch(26, |replay| {
        for (index, name) in (0..).zip(["node-b", "node-a", "node-b", "node-a", "node-b"]) {
            replay.patch(438 + index, name, &json!({"annotations": {"burst": index.to_string()}}));
        }
    });
    replay.watch(27, |_| {});
    replay.finish();
}

#[test]
fn watches_that_have_expired() {
    let mut replay = Replay::new("07-watch-expired", quick());
    let annotate = |replay: &Replay, revision, name: &str, value: &str| {
        replay.patch(revision, name, &json!({"annotations": {"k": value}}))
    };
    replay.node(459, "node-a", "10.244.1.0/24", &json!({}));
    replay.node(460, "node-b", "10.244.2.0/24", &json!({}));
    for revision in 461..=463 {
        annotate(&replay, revision, "node-a", &(revision - 461).to_string());
    }

    replay.watch(1, |_| {});
    replay.leave_out(
        [2],
        "to a client this is the exchange before: etcd's compaction alone changes nothing for it",
    );
    replay.server.advance_to(471);
    replay.server.compact();
    replay.watch(3, |_| {});
    replay.watch(4, |_| {});
    replay.watch(5, |_| {});
    replay.watch(6, |_| {});
    replay.leave_out(
        [7],
        "of events only events.k8s.io/v1 is served; exchange 12 has the same words",
    );
    replay.server.advance_to(474);
    replay.play(8);
    replay.watch(9, |replay| annotate(replay, 475, "node-a", "r"));

    replay.another_server(Options {
        watch_cache: false,
        ..quick()
    });
    replay.node(459, "node-a", "10.244.1.0/24", &json!({}));
    replay.node(460, "node-b", "10.244.2.0/24", &json!({}));
    replay.server.advance_to(486);
    annotate(&replay, 487, "node-a", "x");
    replay.watch(10, |_| {});
    annotate(&replay, 488, "node-b", "x");
    replay.watch(11, |replay| {
        replay.server.compact();
        annotate(replay, 489, "node-a", "y");
    });
    replay.watch(12, |_| {});
    replay.watch(13, |_| {});
    replay.play(14);
    replay.watch(15, |_| {});
    replay.play(16);

    replay.another_server(Options {
        streaming_lists: StreamingLists::Refused,
        ..quick()
    });
    replay.play(17);
    replay.finish();
}

#[test]
fn service_accounts_and_the_admission_policy() {
    let mut replay = Replay::new("08-service-account-and-admission-policy", quick());
    replay.node(532, "node-a", "10.244.1.0/24", &json!({}));
    replay.node(533, "node-b", "10.244.2.0/24", &json!({}));
    let rule = |check, message: &str, forbidden| Validation {
        check,
        message: message.into(),
        forbidden,
    };
    let policy = Policy {
        name: "agent-own-node".into(),
        binding: "agent-own-node".into(),
        username: "system:serviceaccount:mesh:agent".into(),
        validations: vec![
            rule(Check::BoundToNode, "the token is not bound to a node", true),
            rule(
                Check::OwnNode,
                "the agent on node '{node}' may not change node '{object}'",
                true,
            ),
            rule(Check::SpecUnchanged, "the agent may not change spec", false),
        ],
        action: Action::Deny,
    };

    replay.leave_out(1..=4, "tokens are made by the test, not by TokenRequest");
    replay.play_all(5..=12);
    replay.leave_out(13..=14, "the policy is given as data, next line");
    replay.server.set_policy(Some(policy.clone()));
    replay.play_all(15..=24);
    replay.server.set_policy(Some(Policy {
        action: Action::Warn,
        ..policy
    }));
    replay.play(25);
    replay.server.set_policy(None);
    replay.server.advance_to(552);
    replay.watch(28, |replay| {
        replay
            .server
            .revoke_tokens(&shroud_apiserver::Identity::agent("node-a"));
        replay.patch(
            557,
            "node-a",
            &json!({"annotations": {"e.example/public-key": "after"}}),
        );
    });
    for number in [26, 27] {
        replay.server.fault(Fault::answer(Answer::unauthorized()).times(1));
        replay.play(number);
    }
    replay.finish();
}

#[test]
fn too_many_requests() {
    let mut replay = Replay::new("09-too-many-requests", quick());
    replay.leave_out(1..=2, "priority levels are not modelled; the fault is armed by hand");

    replay.server.fault(Fault::answer(Answer::too_many_requests(1)));
    replay.play_all(3..=6);
    replay.finish();
}

#[test]
fn the_servers_life() {
    let mut replay = Replay::new("10-lifecycle", quick());
    replay.node(631, "node-a", "10.244.1.0/24", &json!({}));
    replay.create(
        632,
        &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b"}}),
    );

    replay.watch(1, |replay| {
        replay.server.advance_to(639);
        std::thread::sleep(Duration::from_millis(6300));
        replay.server.fault(Fault::watch(WatchEffect::End).times(1));
    });
    refused(&mut replay, 2);
    replay.server.advance_to(643);
    replay.watch(3, |replay| replay.server.cut_connections());
    (4..=7).for_each(|number| refused(&mut replay, number));
    replay.play_all(8..=10);
    readiness(&mut replay, 11);
    replay.play(12);
    readiness(&mut replay, 14);
    replay.play(15);
    replay.watch(13, |replay| {
        replay.patch(663, "node-a", &json!({"annotations": {"k": "during-delay"}}));
        std::thread::sleep(Duration::from_millis(100));
        replay.server.fault(Fault::watch(WatchEffect::End).times(1));
    });
    replay.server.fault(Fault::answer(Answer::shutting_down()).times(1));
    replay.play(16);
    refused(&mut replay, 17);
    replay.server.advance_to(669);
    replay.play(19);
    etcd_times_out(&mut replay, 20..=22);
    replay.play(23);
    readiness(&mut replay, 24);
    replay.watch(18, |replay| {
        replay.patch(672, "node-a", &json!({"annotations": {"after": "stall"}}))
    });
    replay.play(25);
    replay.delete(683, "node-a");
    replay.node(684, "node-a", "10.244.1.0/24", &json!({}));
    replay.server.advance_to(685);
    etcd_times_out(&mut replay, [27, 29]);
    replay.play_all([28, 31]);
    replay.watch(30, |_| {});
    replay.watch(26, |replay| {
        replay.patch(688, "node-a", &json!({"annotations": {"after": "etcd-back"}}));
        replay.server.advance_to(691);
    });
    replay.finish();
}

fn refused(replay: &mut Replay, number: usize) {
    let (_, response) = replay.exchange(number);
    assert_eq!(
        response["error"],
        "ConnectionRefusedError: [Errno 111] Connection refused"
    );
    replay.server.refuse().unwrap();
    let error = std::net::TcpStream::connect(replay.server.addresses()[0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(111));
    replay.server.accept().unwrap();
}

/// A check that fails answers with text that only the real server can write; a fault writes it for ours.
fn readiness(replay: &mut Replay, number: usize) {
    let (request, response) = replay.exchange(number);
    let headers: Vec<_> = response["headers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    let own: Vec<_> = headers
        .iter()
        .copied()
        .filter(|(name, _)| !["Cache-Control", "Content-Length"].contains(name))
        .collect();
    let made = Answer::with(500, &own, response["body"].as_str().unwrap());
    let path = request["path"].as_str().unwrap();
    replay
        .server
        .fault(Fault::answer(made).on(Requests::default().path(path)).times(1));

    let answer = Client::to(replay.server.addresses()[0], &replay.server.authority(), None)
        .unwrap()
        .ask(&Request::get(path))
        .unwrap();

    assert_eq!(
        (answer.status, answer.text().as_str()),
        (500, response["body"].as_str().unwrap())
    );
    assert!(
        headers.iter().all(|(name, value)| answer.header(name) == Some(value)),
        "{answer:?}"
    );
}

fn etcd_times_out(replay: &mut Replay, numbers: impl IntoIterator<Item = usize>) {
    for number in numbers {
        replay.server.fault(Fault::answer(Answer::etcd_timeout()).times(1));
        replay.play(number);
    }
}

#[test]
fn leases() {
    let mut replay = Replay::new("11-crd-and-lease", quick());

    replay.play(1);
    replay.leave_out([2], "there are no custom resources");
    let initializing = Fault::answer(Answer::initializing()).on(Requests::default().verb(Verb::List).resource("peers"));
    replay.server.fault(initializing.times(1));
    replay.play(3);
    replay.leave_out(4..=16, "there are no custom resources");
    replay.play_all(17..=23);
    replay.leave_out(24..=25, "leases are not applied for, so their times are not parsed");
    replay.finish();
}

#[test]
fn bookmarks_by_start_mode() {
    let mut replay = Replay::new("13-watch-bookmark-variants", quick());
    for (revision, name) in [(893, "node-a"), (894, "node-b")] {
        replay.create(
            revision,
            &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}),
        );
    }

    (1..=8).for_each(|number| replay.watch(number, |_| {}));
    replay.finish();
}

#[test]
fn bookmarks_come_every_minute_and_before_the_end() {
    let second = Duration::from_millis(30);
    let mut replay = Replay::new("14-watch-bookmark-interval", Options { second, ..quick() });
    let (request, response) = replay.exchange(1);
    replay.server.advance_to(894);
    let mut client = Client::connect(&replay.server, &shroud_apiserver::Identity::Admin).unwrap();
    let start = std::time::Instant::now();
    let accept = request["headers"]["Accept"].as_str().unwrap();
    client
        .open(&Request::get(request["path"].as_str().unwrap()).header("Accept", accept))
        .unwrap();

    let recorded = response["stream"].as_array().unwrap();
    for bookmark in recorded {
        let line = bookmark["line"].as_str().unwrap();
        let revision = line.split('"').rev().nth(1).unwrap().parse().unwrap();
        replay.server.advance_to(revision);
        let chunk = String::from_utf8(client.chunk().unwrap().unwrap()).unwrap();
        let after = start.elapsed().as_secs_f64() / second.as_secs_f64();
        assert_eq!(chunk.trim_end(), line);
        let recorded = bookmark["t"].as_f64().unwrap();
        assert!(
            (after - recorded).abs() < 20.0,
            "recorded after {recorded} s, found after {after} s"
        );
    }
    assert_eq!(client.chunk(), Ok(None));
    replay.finish();
}

#[test]
fn an_old_etcd_cannot_do_streaming_lists() {
    let mut replay = Replay::new(
        "15-old-etcd-no-streaming-list",
        Options {
            streaming_lists: StreamingLists::Broken,
            ..quick()
        },
    );
    replay.create(
        207,
        &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}),
    );

    (1..=4).for_each(|number| replay.watch(number, |_| {}));
    replay.watch(5, |replay| {
        replay.patch(208, "node-a", &json!({"annotations": {"a": "1"}}))
    });
    replay.play(6);
    replay.finish();
}

#[test]
fn no_recording_is_forgotten() {
    let players = [include_str!("replay.rs"), include_str!("protocol.rs")].concat();

    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    for file in std::fs::read_dir(golden).unwrap() {
        let topic = file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned();
        let played = players.contains(&format!("\"{topic}\""));
        // `version` is an answer of the server itself.
        assert!(played || topic == "version", "nothing plays {topic}");
    }
}
