//! The server must not be what a benchmark measures: 5,000 nodes, and a watch that follows 50 changes per second.

use std::time::{Duration, Instant};

use serde_json::json;
use shroud_apiserver::{ApiServer, Identity, Options};

use crate::client::{Client, Request};

#[test]
fn five_thousand_nodes_are_listed_and_watched() {
    let server = ApiServer::local(Options::default()).unwrap();
    for index in 0..5000 {
        let (high, low) = (index / 256, index % 256);
        server
            .put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{index}"), "labels": {"a": "b"}},
                "spec": {"podCIDRs": [format!("10.{high}.{low}.0/24")]},
                "status": {"addresses": [{"type": "InternalIP", "address": format!("172.18.{high}.{low}")}]}}))
            .unwrap();
    }
    let mut client = Client::connect(&server, &Identity::Admin).unwrap();

    // Twice: the first list encodes each object, the second finds them encoded.
    for within in [Duration::from_secs(10), Duration::from_secs(3)] {
        let start = Instant::now();
        let list = client.ask(&Request::get("/api/v1/nodes?resourceVersion=0")).unwrap();
        assert_eq!(list.json()["items"].as_array().unwrap().len(), 5000);
        eprintln!("a list of {} bytes in {:?}", list.body.len(), start.elapsed());
        assert!(start.elapsed() < within, "{:?}", start.elapsed());
    }

    client
        .open(&Request::get(&format!(
            "/api/v1/nodes?watch=1&resourceVersion={}",
            server.revision()
        )))
        .unwrap();
    let mut latencies = Vec::new();
    for index in 0..100 {
        let next = Instant::now() + Duration::from_millis(20);
        let changed = Instant::now();
        server
            .patch(
                "nodes",
                "",
                &format!("node-{index}"),
                &json!({"metadata": {"annotations": {"k": "v"}}}),
            )
            .unwrap();
        let line = client.chunk().unwrap().unwrap();
        latencies.push(changed.elapsed());
        assert!(String::from_utf8_lossy(&line).contains(&format!("\"name\":\"node-{index}\"")));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    latencies.sort();
    eprintln!(
        "from change to event: median {:?}, worst {:?}",
        latencies[50], latencies[99]
    );
    assert!(latencies[50] < Duration::from_millis(50), "{latencies:?}");
}
