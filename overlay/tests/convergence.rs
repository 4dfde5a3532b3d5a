//! Whatever is there, the steps lead to what is wanted, in one pass, and never through a state the kernel refuses. The kernel here is a
//! model: a map of devices that follows the rules found by the kernel tests.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use shroud_model::{Family, Mtu};
use shroud_overlay::{
    Change, Conflict, Desired, Device, DeviceState, Forwarding, Kind, Mac, Neighbour, Observed, Setting, Vni, Vtep,
    diff, differences,
};

const NAMES: [&str; 4] = ["shroud.a", "shroud.b", "shroud.c", "shroud.d"];

fn mac() -> impl Strategy<Value = Mac> {
    (1..6_u8).prop_map(|last| Mac::from([2, 0, 0, 0, 0, last]))
}

fn underlay(family: Family) -> impl Strategy<Value = IpAddr> {
    (1..6_u8).prop_map(move |last| match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(172, 18, 0, last)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, u16::from(last))),
    })
}

fn address() -> impl Strategy<Value = IpAddr> {
    (1..6_u8).prop_map(|third| IpAddr::V4(Ipv4Addr::new(10, 244, third, 0)))
}

fn vtep(family: Family) -> impl Strategy<Value = Vtep> {
    (mac(), underlay(family), btree_set(address(), 0..3)).prop_map(|(mac, underlay, addresses)| Vtep {
        mac,
        underlay,
        addresses,
    })
}

fn device() -> impl Strategy<Value = Device> {
    let kind = prop_oneof![Just(Kind::Vxlan), Just(Kind::Geneve)];
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    (kind, family, 1..3_u32, 1390..1393_u32, mac()).prop_flat_map(|(kind, family, number, mtu, mac)| {
        let port = 8470..8473_u16;
        (port, underlay(family), btree_set(vtep(family), 0..4)).prop_map(move |(port, local, vteps)| Device {
            kind,
            vni: Vni::new(number).unwrap(),
            port,
            local,
            mac,
            mtu: Mtu::new(mtu).unwrap(),
            vteps,
        })
    })
}

fn name() -> impl Strategy<Value = String> {
    prop::sample::select(&NAMES[..]).prop_map(str::to_owned)
}

/// Devices that can live together.
fn desired() -> impl Strategy<Value = Desired> {
    btree_map(name(), device(), 0..3).prop_map(|devices| {
        let mut kept: BTreeMap<String, Device> = BTreeMap::new();
        for (name, device) in devices {
            if kept.values().all(|other| place(other) != place(&device)) {
                kept.insert(name, device);
            }
        }
        Desired { devices: kept }
    })
}

/// What only one device can have: the kernel's rule for VXLAN, and for Geneve in external mode.
fn place(device: &Device) -> (Kind, Option<Vni>, u16, Option<Family>) {
    match device.kind {
        Kind::Vxlan => (
            device.kind,
            Some(device.vni),
            device.port,
            Some(Family::of(device.local)),
        ),
        Kind::Geneve => (device.kind, None, device.port, None),
    }
}

/// A device that once was right, with settings and forwarding entries that are not.
type Drifted = (Device, Vec<Setting>, BTreeMap<Mac, Forwarding>);

fn drifted() -> impl Strategy<Value = BTreeMap<String, Drifted>> {
    let setting = prop_oneof![
        Just(Setting::Up(false)),
        Just(Setting::Mtu(1500)),
        Just(Setting::Learning(true)),
        Just(Setting::Resolution(true)),
        Just(Setting::AutomaticAddress(true)),
        Just(Setting::Labelled(false)),
        Just(Setting::Mac(Mac::ZERO)),
        Just(Setting::Features(BTreeSet::from(["proxy".to_owned()]))),
    ];
    let entry = prop_oneof![
        underlay(Family::V4).prop_map(Forwarding::To),
        Just(Forwarding::Other("172.18.0.9 port 9".to_owned())),
    ];
    let state = (
        device(),
        prop::collection::vec(setting, 0..3),
        btree_map(mac(), entry, 0..4),
    );
    btree_map(name(), state, 0..4)
}

/// The model.
#[derive(Default)]
struct Kernel {
    devices: BTreeMap<String, (Device, DeviceState)>,
    next: u32,
}

impl Kernel {
    fn observed(&self) -> Observed {
        let devices = self.devices.iter();
        Observed {
            devices: devices
                .map(|(name, (_, state))| (name.clone(), state.clone()))
                .collect(),
        }
    }

    fn create(&mut self, name: &str, device: &Device) {
        assert!(!self.devices.contains_key(name), "{name} exists");
        for (other, (there, _)) in &self.devices {
            assert!(place(there) != place(device), "{name} collides with {other}");
        }
        self.next += 1;
        let state = DeviceState {
            index: self.next,
            settings: differences(device, &[])
                .into_iter()
                .map(|missing| missing.new)
                .collect(),
            forwarding: BTreeMap::new(),
            neighbours: BTreeMap::new(),
        };
        self.devices.insert(name.to_owned(), (device.clone(), state));
    }

    fn state(&mut self, name: &str) -> &mut DeviceState {
        &mut self
            .devices
            .get_mut(name)
            .expect("entries and settings only for devices that exist")
            .1
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::CreateDevice { name, device } => self.create(name, device),
            Change::RemoveDevice { name, index, .. } => {
                assert_eq!(self.state(name).index, *index);
                self.devices.remove(name);
            }
            Change::SetDevice { name, differences } => {
                let state = self.state(name);
                for difference in differences {
                    assert!(
                        !difference.new.needs_another_device(),
                        "the kernel refuses {difference}"
                    );
                    let same = |old: &Setting| std::mem::discriminant(old) == std::mem::discriminant(&difference.new);
                    state.settings.retain(|old| !same(old));
                    state.settings.push(difference.new.clone());
                    if matches!(difference.new, Setting::Mac(_) | Setting::Resolution(_)) {
                        state.neighbours.clear();
                    }
                }
            }
            Change::SetForwarding { device, mac, old, new } => {
                let before = self.state(device).forwarding.insert(*mac, Forwarding::To(*new));
                assert_eq!(before, *old);
                assert!(
                    !matches!(before, Some(Forwarding::Other(_))),
                    "only a plain entry can be replaced"
                );
            }
            Change::RemoveForwarding { device, mac, old } => {
                assert_eq!(self.state(device).forwarding.remove(mac).as_ref(), Some(old));
            }
            Change::SetNeighbour {
                device, address, new, ..
            } => {
                self.state(device)
                    .neighbours
                    .insert(*address, Neighbour::Permanent(*new));
            }
            Change::RemoveNeighbour { device, address, old } => {
                assert_eq!(self.state(device).neighbours.remove(address), Some(*old));
            }
        }
    }
}

proptest! {
    #[test]
    fn one_pass_leads_to_what_is_wanted(
        drifted in drifted(),
        desired in desired(),
        neighbours in btree_map(address(), mac(), 0..4),
    ) {
        let mut kernel = Kernel::default();
        for (name, (device, settings, forwarding)) in drifted {
            if kernel.devices.values().any(|(other, _)| place(other) == place(&device)) {
                continue;
            }
            kernel.create(&name, &device);
            let state = kernel.state(&name);
            for setting in settings {
                let same = |old: &Setting| std::mem::discriminant(old) == std::mem::discriminant(&setting);
                state.settings.retain(|old| !same(old));
                state.settings.push(setting);
            }
            state.forwarding = forwarding;
            state.neighbours = neighbours.iter().map(|(address, mac)| (*address, Neighbour::Passing(*mac))).collect();
        }

        for change in diff(&desired, &kernel.observed()) {
            kernel.apply(&change);
        }

        prop_assert_eq!(diff(&desired, &kernel.observed()), []);
        prop_assert!(kernel.devices.keys().eq(desired.devices.keys()));
        for (name, device) in &desired.devices {
            let state = kernel.state(name);
            for (address, neighbour) in &state.neighbours {
                let wanted = device.vteps.iter().find(|vtep| vtep.addresses.contains(address));
                prop_assert_eq!(*neighbour, Neighbour::Permanent(wanted.expect("only what is wanted").mac));
            }
            for (mac, forwarding) in &state.forwarding {
                let wanted = device.vteps.iter().find(|vtep| vtep.mac == *mac);
                prop_assert_eq!(forwarding, &Forwarding::To(wanted.expect("only what is wanted").underlay));
            }
        }
    }
}

fn peer(mac: [u8; 6], underlay: &str, address: &str) -> Vtep {
    Vtep {
        mac: Mac::from(mac),
        underlay: underlay.parse().unwrap(),
        addresses: BTreeSet::from([address.parse().unwrap()]),
    }
}

#[test]
fn peers_in_each_others_way_are_named() {
    let device = Device {
        kind: Kind::Vxlan,
        vni: Vni::new(83).unwrap(),
        port: 8472,
        local: "172.18.0.1".parse().unwrap(),
        mac: Mac::from([2, 0, 0, 0, 0, 1]),
        mtu: Mtu::new(1390).unwrap(),
        vteps: BTreeSet::from([
            peer([2, 0, 0, 0, 0, 1], "172.18.0.9", "10.244.9.0"),
            peer([2, 0, 0, 0, 0, 2], "172.18.0.2", "10.244.2.0"),
            peer([2, 0, 0, 0, 0, 2], "172.18.0.3", "10.244.3.0"),
            peer([2, 0, 0, 0, 0, 4], "172.18.0.4", "10.244.2.0"),
        ]),
    };
    let (own, second) = (Mac::from([2, 0, 0, 0, 0, 1]), Mac::from([2, 0, 0, 0, 0, 2]));

    assert_eq!(
        device.conflicts(),
        [
            Conflict::Mac {
                mac: own,
                kept: "172.18.0.1".parse().unwrap(),
                lost: "172.18.0.9".parse().unwrap()
            },
            Conflict::Mac {
                mac: second,
                kept: "172.18.0.2".parse().unwrap(),
                lost: "172.18.0.3".parse().unwrap()
            },
            Conflict::Address {
                address: "10.244.2.0".parse().unwrap(),
                kept: second,
                lost: Mac::from([2, 0, 0, 0, 0, 4])
            },
        ]
    );
}

/// The first in order keeps what both want, pass after pass, instead of each taking it from the other.
#[test]
fn peers_in_each_others_way_do_not_take_turns() {
    let (first, second) = (
        peer([2, 0, 0, 0, 0, 2], "172.18.0.2", "10.244.2.0"),
        peer([2, 0, 0, 0, 0, 2], "172.18.0.3", "10.244.2.0"),
    );
    let device = Device {
        kind: Kind::Vxlan,
        vni: Vni::new(83).unwrap(),
        port: 8472,
        local: "172.18.0.1".parse().unwrap(),
        mac: Mac::from([2, 0, 0, 0, 0, 1]),
        mtu: Mtu::new(1390).unwrap(),
        vteps: BTreeSet::from([first.clone(), second]),
    };
    let desired = Desired {
        devices: BTreeMap::from([("shroud.vxlan".to_owned(), device)]),
    };
    let mut kernel = Kernel::default();

    for change in diff(&desired, &kernel.observed()) {
        kernel.apply(&change);
    }

    assert_eq!(
        kernel.state("shroud.vxlan").forwarding,
        BTreeMap::from([(first.mac, Forwarding::To(first.underlay))])
    );
    assert_eq!(diff(&desired, &kernel.observed()), []);
}
