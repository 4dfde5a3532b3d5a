//! F2 to F5: nodes that lie about prefixes, endpoints and keys, and one that lies about what it sends. F7 is in `forge`.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shroud_lab::{Family, Netns};

use crate::field::Field;
use crate::row::Row;

pub(crate) const ROWS: &[Row] = &[
    Row::new(
        "F2",
        "a node claims the pods of others, of all, and more",
        prefixes_hijacked,
    )
    .core(),
    Row::new(
        "F3",
        "a node announces endpoints that are nobody's or others'",
        endpoints_wrong,
    ),
    Row::new("F4", "a node announces keys of others, and of low order", keys_wrong),
    Row::new(
        "F5",
        "a node sends with the sources of another's pods",
        inner_sources_spoofed,
    ),
];

/// A key that nobody else has, for the base point of Curve25519 is not of low order.
const OTHER_KEY: &str = "CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// Where the liar is, if it is anywhere.
const ADDRESS: &str = "172.18.0.77";

/// Pods that are nobody else's.
const OWN: &str = "10.244.77.0/24";

/// Points whose product with any key is known (RFC 7748 section 7, and <https://cr.yp.to/ecdh.html>).
const LOW_ORDER: [&str; 7] = [
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
    "7P///////////////////////////////////////38=",
    "7f///////////////////////////////////////38=",
    "7v///////////////////////////////////////38=",
];

/// What node x says of itself.
fn record(addresses: &[&str], prefixes: &[&str], key: &str, endpoints: &[&str]) -> Value {
    json!({
        "version": 1,
        "node": "x",
        "addresses": addresses,
        "podPrefixes": prefixes,
        "announcement": { "version": 1, "publicKey": key, "port": 51820, "endpoints": endpoints, "epoch": 1, "backend": "userspace" },
    })
}

/// Node x says this.
fn said(field: &Field, record: &Value) -> Result<()> {
    fs::write(field.lab.directory().join("x.json"), record.to_string()).context("write x's record")
}

/// Node x says nothing more.
fn forgotten(field: &mut Field) -> Result<()> {
    fs::remove_file(field.lab.directory().join("x.json")).context("remove x's record")?;
    for name in ["a", "b", "c"] {
        field.says(name, "x is gone", |status| {
            status.refused.is_empty() && status.peers.len() == 2
        })?;
    }
    Ok(())
}

/// Node x says this; every agent refuses it, nobody programs anything of it, and nobody else feels it.
fn refused(field: &mut Field, record: &Value) -> Result<()> {
    said(field, record)?;
    for name in ["a", "b", "c"] {
        field
            .says(name, "it refuses x", |status| {
                status.refused.iter().any(|refused| refused.node == "x") && status.peers.len() == 2
            })
            .with_context(|| record.to_string())?;
    }
    field.holds_what_it_held().with_context(|| record.to_string())?;
    field.datagrams_pass()?;
    forgotten(field)
}

/// Node x says this and may be a peer; whoever is at the endpoints it announces is sent a handshake now and then, which he throws away, and
/// nobody else feels anything.
fn harmless(field: &mut Field, record: &Value) -> Result<()> {
    said(field, record)?;
    field.lasts(6);
    for (name, difference) in field.differences()? {
        let of_x = |line: &str| line.contains(OTHER_KEY) || line.contains("10.244.77.");
        ensure!(
            difference.lines().all(of_x),
            "{name} holds something else:\n{difference}"
        );
    }
    field.datagrams_pass()?;
    forgotten(field)
}

fn all_is_well(field: &mut Field) -> Result<()> {
    field.fault();
    field.heals()
}

fn prefixes_hijacked(field: &mut Field) -> Result<()> {
    for prefixes in [
        &["10.244.2.0/24"][..],
        &["10.244.2.0/25", OWN],
        &["10.244.2.10/32"],
        &["10.244.0.0/16"],
        &["0.0.0.0/0"],
        &["::/0"],
        &["fd00:10:244:2::/64"],
        &["fd00:10:244:2::10/128", OWN],
        &["172.18.0.0/24"],
        &["10.96.0.0/12"],
        &["192.0.2.1/32"],
    ] {
        refused(field, &record(&[ADDRESS], prefixes, OTHER_KEY, &["172.18.0.77:51820"]))?;
    }
    all_is_well(field)
}

fn endpoints_wrong(field: &mut Field) -> Result<()> {
    for address in [
        "127.0.0.1",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "10.244.1.10",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
        "fd00:10:244:2::10",
    ] {
        let address: IpAddr = address.parse()?;
        let endpoint = SocketAddr::new(address, 51820).to_string();
        refused(field, &record(&[&address.to_string()], &[OWN], OTHER_KEY, &[&endpoint]))?;
    }
    // Those of others, which the folder's authority says are x's.
    for address in ["172.18.0.1", "172.18.0.2", "172.18.0.254"] {
        let endpoint = format!("{address}:51820");
        harmless(field, &record(&[address], &[OWN], OTHER_KEY, &[&endpoint]))?;
    }
    // One that is none of its addresses.
    refused(field, &record(&[ADDRESS], &[OWN], OTHER_KEY, &["192.0.2.1:51820"]))?;
    all_is_well(field)
}

fn keys_wrong(field: &mut Field) -> Result<()> {
    let mut keys: Vec<String> = LOW_ORDER.map(str::to_owned).into();
    for name in ["a", "b", "c"] {
        let key = field.status(name)?.raw["publicKey"]
            .as_str()
            .context("a public key")?
            .to_owned();
        keys.push(key);
    }
    for key in keys {
        refused(field, &record(&[ADDRESS], &[OWN], &key, &["172.18.0.77:51820"]))?;
    }
    all_is_well(field)
}

/// Datagrams that arrive at a place, by their payload.
pub(crate) struct Listener {
    socket: UdpSocket,
}

impl Listener {
    pub(crate) fn bind(netns: &Netns, address: IpAddr) -> Result<Listener> {
        let socket = netns.run(|| UdpSocket::bind((address, 0)).with_context(|| format!("bind to {address}")))?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Listener { socket })
    }

    pub(crate) fn address(&self) -> Result<SocketAddr> {
        self.socket.local_addr().context("a bound socket has an address")
    }

    /// How many datagrams with this payload have come, and none for a while.
    pub(crate) fn heard(&self, payload: &[u8]) -> usize {
        let mut buffer = [0; 2048];
        let mut heard = 0;
        while let Ok((length, _)) = self.socket.recv_from(&mut buffer) {
            heard += usize::from(buffer[..length] == *payload);
        }
        heard
    }
}

/// Node c is somebody else's by now: it sends into its tunnel what it likes. With its own source it arrives, with another's it does not.
fn inner_sources_spoofed(field: &mut Field) -> Result<()> {
    let c = field.node("c");
    let netns = &c.host.netns;
    let victim = field.lab.pod("a0").clone();
    for (family, own, stolen) in [
        (Family::V4, "10.244.3.77", "10.244.2.77"),
        (Family::V6, "fd00:10:244:3::77", "fd00:10:244:2::77"),
    ] {
        let listener = Listener::bind(&victim.netns, victim.address(family))?;
        let (target, device) = (listener.address()?, &c.device);
        netns.ip(&format!("route add {} dev {device} proto 99", target.ip()))?;
        for (source, arrives) in [(own, true), (stolen, false)] {
            // Of use at once.
            let flag = if family == Family::V6 { "nodad" } else { "" };
            netns.ip(&format!("address add {source} dev lo {flag}"))?;
            let payload = format!("from {source}");
            netns.run(|| {
                let socket = UdpSocket::bind((source.parse::<IpAddr>()?, 0)).context("bind to the source")?;
                for _ in 0..20 {
                    socket.send_to(payload.as_bytes(), target).context("send")?;
                }
                Ok(())
            })?;
            let heard = listener.heard(payload.as_bytes());
            ensure!((heard > 0) == arrives, "{heard} of 20 datagrams {payload} arrived");
            netns.ip(&format!("address delete {source} dev lo"))?;
        }
        netns.ip(&format!("route delete {} dev {device} proto 99", target.ip()))?;
    }
    field.fault();
    field.heals()
}
