//! The table of the cases, as user space writes it.

use shroud_ebpf::{Mode, Node, NodePath, Owner, Path, Table};
use shroud_model::{Mark, NodeId, Prefix};

use crate::cases::{DEVICE, LISTEN_PORT, MASK, OTHER_LISTEN_PORT, PLAIN, TUNNEL};
use crate::packet::VNI;

/// The table that `cases.rs` draws.
pub(crate) fn table(mode: Mode) -> Table {
    table_with(mode, Some(DEVICE))
}

/// The same with another encryption device.
pub(crate) fn table_with(mode: Mode, device: Option<u32>) -> Table {
    let owner = |node, path| Owner {
        node: NodeId(node),
        path,
    };
    Table {
        mode,
        listen_ports: [LISTEN_PORT, OTHER_LISTEN_PORT].into(),
        tunnel_mark: Mark::new(TUNNEL, MASK).unwrap(),
        plain_mark: Mark::new(PLAIN, MASK).unwrap(),
        protected: ["10.244.0.0/16", "fd00:10:244::/48"].map(prefix).into(),
        owners: [
            (prefix("10.244.1.0/24"), owner(1, Path::Local)),
            (prefix("fd00:10:244:1::/64"), owner(1, Path::Local)),
            (prefix("10.244.2.0/24"), owner(2, Path::Encrypted(device))),
            (prefix("fd00:10:244:2::/64"), owner(2, Path::Encrypted(device))),
            (prefix("10.244.3.0/24"), owner(3, Path::Fenced)),
            (prefix("fd00:10:244:3::/64"), owner(3, Path::Fenced)),
            (prefix("10.244.5.0/24"), owner(5, Path::Plain)),
            (prefix("fd00:10:244:5::/64"), owner(5, Path::Plain)),
        ]
        .into(),
        exempt: [prefix("10.244.1.7/32")].into(),
        opted_out: ["10.244.1.8", "10.244.2.8"]
            .map(|address| address.parse().unwrap())
            .into(),
        vxlan_ports: [4789, 8472].into(),
        geneve_ports: [6081].into(),
        nodes: [
            ("192.0.2.1", 1, NodePath::LocalOpen),
            ("192.0.2.2", 2, NodePath::Open),
            ("192.0.2.3", 3, NodePath::Open),
            ("192.0.2.5", 5, NodePath::Open),
            ("2001:db8::1", 1, NodePath::LocalOpen),
            ("2001:db8::2", 2, NodePath::Open),
            ("203.0.113.1", 1, NodePath::LocalProtected),
            ("203.0.113.2", 2, NodePath::Encrypted(device)),
            ("203.0.113.22", 2, NodePath::Fenced),
            ("203.0.113.3", 3, NodePath::Fenced),
            ("2001:db8:1::1", 1, NodePath::LocalProtected),
            ("2001:db8:1::2", 2, NodePath::Encrypted(device)),
        ]
        .map(|(address, node, path)| {
            (
                address.parse().unwrap(),
                Node {
                    node: NodeId(node),
                    path,
                },
            )
        })
        .into(),
        overlay: Some(VNI),
        open_ports: ["tcp/6443", "udp/53"].map(|port| port.parse().unwrap()).into(),
    }
}

pub(crate) fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}
