//! The layers below the API: chunks, keep-alive, HTTP/2, and what is said to who speaks no TLS.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use shroud_apiserver::{ApiServer, Identity, Options};

use crate::client::{Client, Request};
use crate::recording::{Replay, timeless};

const PARTIAL: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

#[test]
fn chunks_are_cut_as_the_real_server_cuts_them() {
    let mut replay = Replay::new(
        "06-watch-raw-framing",
        Options {
            second: Duration::from_millis(200),
            ..Options::default()
        },
    );
    replay.node(441, "node-a", "10.244.1.0/24", &json!({"mesh": "on"}));
    replay.node(442, "node-b", "10.244.2.0/24", &json!({}));
    replay.patch(443, "node-a", &json!({"annotations": {"burst": "3", "k": ""}}));
    replay.patch(444, "node-b", &json!({"annotations": {"burst": "4", "k": ""}}));

    let mut client = Client::connect(&replay.server, &Identity::Admin).unwrap();
    for number in 1..=3 {
        let (request, response) = replay.exchange(number);
        let raw = request["headers"]["(raw request)"].as_str().unwrap();
        let mut asked = Request::get(request["path"].as_str().unwrap()).header("Accept", PARTIAL);
        if raw.contains("Connection: close") {
            asked = asked.header("Connection", "close");
        }
        let answer = client.open(&asked).unwrap();
        assert_eq!(
            answer.header("Connection"),
            raw.contains("Connection: close").then_some("close")
        );
        if number == 1 {
            replay.patch(445, "node-a", &json!({"annotations": {"k": "r1"}}));
            // A chunk of its own, if the server has had the time to send the first.
            std::thread::sleep(Duration::from_millis(50));
            replay.patch(446, "node-b", &json!({"annotations": {"k": "r2"}}));
        }

        let recorded = response["stream"].as_array().unwrap().iter().skip(1);
        for chunk in recorded.map(|one| {
            one["line"]
                .as_str()
                .unwrap()
                .replace("\\r\\n", "\r\n")
                .replace("\\n", "\n")
        }) {
            let found = client.chunk().unwrap().unwrap_or_default();
            let framed = format!("{:x}\r\n{}\r\n", found.len(), String::from_utf8(found).unwrap());
            assert_eq!(
                without_uids(&timeless(&framed)),
                without_uids(&timeless(&chunk)),
                "exchange {number}"
            );
        }
    }
    replay.leave_out([4], "an answer of known length, as all the others in this suite");
    replay.finish();
}

fn without_uids(text: &str) -> String {
    crate::recording::uids(text)
        .iter()
        .fold(text.to_owned(), |text, uid| text.replace(uid, "uid"))
}

#[test]
fn plain_http_is_refused_in_plain_http() {
    let server = ApiServer::local(Options::default()).unwrap();
    let mut tcp = TcpStream::connect(server.addresses()[0]).unwrap();

    tcp.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();

    assert_eq!(
        answer,
        "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    );
}

#[test]
fn http2_serves_lists_and_watches() {
    let server = ApiServer::local(Options {
        second: Duration::from_millis(100),
        ..Options::default()
    })
    .unwrap();
    server
        .put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}))
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();

    let (list, watch) = runtime.block_on(async {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(server.authority().as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let address = server.addresses()[0];
        let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
        let tls = tls.connect(ServerName::from(address.ip()), tcp).await.unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls))
            .await
            .unwrap();
        tokio::spawn(connection);
        let mut ask = async |path: &str| {
            let request = hyper::Request::get(format!("https://{address}{path}"))
                .header("Authorization", format!("Bearer {}", server.token(&Identity::Admin)))
                .body(Empty::<Bytes>::new())
                .unwrap();
            let body = sender
                .send_request(request)
                .await
                .unwrap()
                .into_body()
                .collect()
                .await
                .unwrap()
                .to_bytes();
            String::from_utf8(body.to_vec()).unwrap()
        };
        let watch = "/api/v1/nodes?watch=1&timeoutSeconds=3&allowWatchBookmarks=true&resourceVersion=0";
        (ask("/api/v1/nodes").await, ask(watch).await)
    });

    assert!(list.contains("\"name\":\"node-a\""), "{list}");
    let kinds: Vec<_> = watch.lines().map(|line| line.split('"').nth(3).unwrap()).collect();
    assert_eq!(kinds, ["ADDED", "BOOKMARK"]);
}
