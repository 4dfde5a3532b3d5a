//! Beginning, ending, dying, and being configured.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wireguard_control::{Backend, Device, DeviceUpdate, InterfaceName, PeerConfigBuilder};

use super::lab::{Lab, Namespace, Outer, Program, Wire, eventually};

/// Starts the program where it should refuse to run, and returns what it said.
fn refusal(node: &Namespace, arguments: &[&str]) -> (Option<i32>, String) {
    let output: Output = node
        .command(Program::Shroud.find().unwrap().to_str().unwrap())
        .args(arguments)
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn killed_and_started_again_it_carries_traffic_within_two_seconds_and_nothing_of_the_device_is_lost() {
    let lab = Lab::new(2);
    let mut one = Wire::start(&lab, 1, Program::Shroud);
    let two = Wire::start(&lab, 2, Program::Shroud);
    one.add_peer(&two);
    two.add_peer(&one);
    one.set_endpoint(&two, Outer::V4);
    one.reaches(two.inner_v4());
    let (node, device) = (one.node, one.device.clone());
    let look = || {
        let index = node
            .ip(&format!("-o link show dev {device}"))
            .split(':')
            .next()
            .unwrap()
            .to_owned();
        let rest = [
            format!("-o address show dev {device}"),
            "route show".to_owned(),
            "-6 route show".to_owned(),
        ];
        // Only the link's state may differ: a TUN device that nobody holds has no carrier.
        (index, rest.map(|what| node.ip(&what).replace(" linkdown", "")))
    };
    let before = look();

    one.kill(Signal::SIGKILL);
    let orphaned = look();
    assert_eq!(orphaned, before);
    assert!(
        two.ping(one.inner_v4()).is_err(),
        "somebody answered for a dead process"
    );

    let start = Instant::now();
    one.spawn();
    one.configure_device();
    one.add_peer(&two);
    // The restarted side knows nothing and is told no keepalive: the other one's packets must wake it.
    one.set_endpoint(&two, Outer::V4);
    two.reaches_within(one.inner_v4(), Duration::from_secs(2));
    eprintln!("traffic back after {:?}", start.elapsed());
    assert_eq!(look(), before);
}

/// The exit code by which the agent knows that another name is needed.
const DEVICE_TAKEN: i32 = 4;

#[test]
fn a_second_instance_is_refused() {
    let lab = Lab::new(1);
    let one = Wire::start(&lab, 1, Program::Shroud);
    let elsewhere = tempfile::tempdir().unwrap();

    let (code, complaint) = refusal(one.node, &[&one.device]);
    assert_eq!(code, Some(1));
    assert!(complaint.contains("already running"), "{complaint}");

    let (code, complaint) = refusal(one.node, &[&one.device, elsewhere.path().to_str().unwrap()]);
    assert_eq!(code, Some(DEVICE_TAKEN));
    assert!(complaint.contains("another process holds this device"), "{complaint}");
    one.show("public-key");
}

#[test]
fn a_foreign_device_is_left_alone() {
    let lab = Lab::new(1);
    let node = &lab.nodes[0];
    let sockets = tempfile::tempdir().unwrap();
    node.ip("link add wforeign type bridge");

    let (code, complaint) = refusal(node, &["wforeign", sockets.path().to_str().unwrap()]);

    assert_eq!(code, Some(DEVICE_TAKEN));
    assert!(complaint.contains("not a TUN device of ours"), "{complaint}");
    assert!(node.ip("-d link show wforeign").contains("bridge"));
    assert_eq!(fs::read_dir(sockets.path()).unwrap().count(), 0);
}

#[test]
fn told_to_end_it_removes_its_socket_and_leaves_the_device() {
    let lab = Lab::new(1);
    let mut one = Wire::start(&lab, 1, Program::Shroud);
    assert_eq!(fs::metadata(one.socket()).unwrap().permissions().mode() & 0o777, 0o600);

    let status = one.kill(Signal::SIGTERM);

    assert_eq!(status.code(), Some(0));
    assert!(!one.socket().exists());
    one.node.ip(&format!("link show {}", one.device));
}

#[test]
fn another_user_is_not_spoken_to_even_if_the_file_lets_him() {
    let lab = Lab::new(1);
    let one = Wire::start(&lab, 1, Program::Shroud);
    fs::set_permissions(one.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let show = |user: u32| {
        let output = Command::new("wg")
            .args(["show", &one.device, "listen-port"])
            .uid(user)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };

    assert_eq!(show(65534), "");
    assert_eq!(show(0).trim(), "51820");
}

#[test]
fn it_goes_on_when_nobody_reads_its_log_any_more() {
    let lab = Lab::new(1);
    let mut one = Wire::start(&lab, 1, Program::Shroud);
    one.kill(Signal::SIGKILL);
    one.spawn_with_log(Stdio::piped());
    let thief = one.node.enter(|| UdpSocket::bind("0.0.0.0:4444").unwrap());

    one.try_set("listen-port 4444")
        .expect_err("the port is taken, which is logged");

    one.show("listen-port");
    drop(thief);
    assert_eq!(one.kill(Signal::SIGTERM).code(), Some(0));
}

#[test]
fn it_ends_when_the_device_is_deleted_by_somebody_else() {
    let lab = Lab::new(1);
    let mut one = Wire::start(&lab, 1, Program::Shroud);

    one.node.ip(&format!("link del {}", one.device));

    assert_eq!(one.wait().code(), Some(1));
    assert!(!one.socket().exists());
}

#[test]
fn a_taken_port_is_reported_and_the_old_one_stays() {
    let lab = Lab::new(2);
    let one = Wire::start(&lab, 1, Program::Shroud);
    let two = Wire::start(&lab, 2, Program::Shroud);
    one.add_peer(&two);
    two.add_peer(&one);
    one.set_endpoint(&two, Outer::V4);
    one.reaches(two.inner_v4());
    for taken in ["0.0.0.0:4444", "[2001:db8::2]:4444"] {
        let thief = two.node.enter(|| UdpSocket::bind(taken).unwrap());

        let complaint = two.try_set("listen-port 4444").unwrap_err();

        assert!(complaint.contains("Address already in use"), "{complaint}");
        assert_eq!(two.show("listen-port").trim(), "51820");
        two.ping(one.inner_v4()).expect("the old port still serves");
        drop(thief);
    }

    two.set("listen-port 4444");
    two.reaches(one.inner_v4());
    assert_eq!(two.show("listen-port").trim(), "4444");
    assert!(one.show("endpoints").contains("192.0.2.2:4444"));

    two.set("listen-port 0");
    let chosen = two.show("listen-port");
    assert_ne!(chosen.trim(), "4444");
    two.set("listen-port 0");
    assert_eq!(two.show("listen-port"), chosen);
}

#[test]
fn a_refused_change_changes_nothing() {
    let lab = Lab::new(1);
    let one = Wire::start(&lab, 1, Program::Shroud);
    let before = one.show("dump");
    let _thief = one.node.enter(|| UdpSocket::bind("0.0.0.0:4444").unwrap());
    let own: shroud_model::PublicKey = one.public_key.parse().unwrap();
    let own: String = own.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let peer = format!("public_key={}\nallowed_ip=10.9.0.0/16", "03".repeat(32));
    let requests = [
        "set=1\nlisten_port=4321\nfwmark=7\npublic_key=NOT\n\n".to_owned(),
        format!("set=1\nlisten_port=4321\nfwmark=7\n{peer}\nno_such_key=1\n\n"),
        format!("set=1\nlisten_port=4321\nfwmark=7\n{peer}\npublic_key={own}\n\n"),
        format!("set=1\nlisten_port=4444\nfwmark=7\n{peer}\n\n"),
        "set=1\nfwmark=7\nlisten_port=99999\n\n".to_owned(),
        "set=2\n\n".to_owned(),
        "hello\n\n".to_owned(),
    ];
    for request in requests {
        let answer = one.converse(request.as_bytes(), "\n\n");

        assert!(
            answer.starts_with("errno=") && answer != "errno=0\n\n",
            "{request:?}: {answer:?}"
        );
        assert_eq!(one.show("dump"), before, "{request:?}");
    }
}

/// What a user without privileges is told who attaches a TUN device, to delete it. `/dev/net/tun` is open to all there, as on most hosts.
fn attach_as_nobody(node: &Namespace, device: &str) -> Output {
    let script = format!(
        "mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && \
         exec setpriv --reuid=65534 --regid=65534 --clear-groups ip tuntap del dev {device} mode tun"
    );
    node.command("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()
        .unwrap()
}

#[test]
fn a_device_that_nobody_serves_is_not_to_be_had_by_other_users() {
    let lab = Lab::new(1);
    let mut one = Wire::start(&lab, 1, Program::Shroud);
    one.node.ip("tuntap add dev open mode tun");
    one.kill(Signal::SIGKILL);

    let twin = attach_as_nobody(one.node, "open");
    let ours = attach_as_nobody(one.node, &one.device);

    assert!(
        twin.status.success(),
        "the same attempt on a device without an owner: {twin:?}"
    );
    let complaint = String::from_utf8(ours.stderr).unwrap();
    assert!(complaint.contains("Operation not permitted"), "{complaint}");
    one.spawn();
    one.configure_device();
}

#[test]
fn one_connection_carries_many_requests() {
    let lab = Lab::new(1);
    let one = Wire::start(&lab, 1, Program::Shroud);
    let long = format!("set=1\nfwmark={}\n\n", "1".repeat(1 << 20));
    let request = format!("set=1\nfwmark=7\n\n{long}get=1\n\nset=1\nfwmark=0\n\nget=1\n\nset=1\nfwmark=9\n\nset=9\n\n");

    let answer = one.converse(request.as_bytes(), "errno=-71\n\n");

    let outcomes: Vec<&str> = answer
        .lines()
        .filter(|line| line.starts_with("errno") || line.starts_with("fwmark"))
        .collect();
    assert_eq!(
        outcomes,
        [
            "errno=0",
            "errno=-90",
            "fwmark=7",
            "errno=0",
            "errno=0",
            "errno=0",
            "errno=0",
            "errno=-71"
        ]
    );
    assert_eq!(one.show("fwmark").trim(), "0x9");
}

#[test]
fn wireguard_control_works_on_it() {
    let lab = Lab::new(1);
    let one = Wire::start(&lab, 1, Program::Shroud);
    let name: InterfaceName = one.device.parse().unwrap();
    let key = wireguard_control::Key::generate_private().get_public();
    let peer = PeerConfigBuilder::new(&key)
        .add_allowed_ip("10.9.0.0".parse().unwrap(), 16)
        .set_endpoint("[2001:db8::9]:51820".parse().unwrap())
        .set_persistent_keepalive_interval(25);

    DeviceUpdate::new()
        .set_fwmark(0x20)
        .set_listen_port(51999)
        .add_peer(peer)
        .apply(&name, Backend::Userspace)
        .unwrap();

    let device = Device::get(&name, Backend::Userspace).unwrap();
    assert_eq!((device.listen_port, device.fwmark), (Some(51999), Some(0x20)));
    assert_eq!(device.public_key.unwrap().to_base64(), one.public_key);
    let [peer] = &device.peers[..] else {
        panic!("{} peers", device.peers.len())
    };
    assert_eq!(peer.config.public_key.to_base64(), key.to_base64());
    assert_eq!(peer.config.endpoint, Some("[2001:db8::9]:51820".parse().unwrap()));
    assert_eq!(peer.config.persistent_keepalive_interval, Some(25));
    assert_eq!(peer.config.allowed_ips.len(), 1);

    DeviceUpdate::new()
        .remove_peer_by_key(&key)
        .apply(&name, Backend::Userspace)
        .unwrap();
    eventually("the peer is gone", Duration::from_secs(1), || {
        let peers = Device::get(&name, Backend::Userspace).unwrap().peers.len();
        if peers == 0 { Ok(()) } else { Err(peers.to_string()) }
    });
}
