use netlink_packet_core::{Emitable as _, Nla as _};
use netlink_packet_route::link::GeneveDf;
use shroud_model::Mtu;

use super::*;
use crate::differences;

fn device(kind: Kind) -> Device {
    Device {
        kind,
        vni: Vni::new(83).unwrap(),
        port: 6081,
        local: "172.18.0.1".parse().unwrap(),
        mac: "02:00:00:00:00:01".parse().unwrap(),
        mtu: Mtu::new(1390).unwrap(),
        vteps: BTreeSet::new(),
    }
}

/// What a kernel would say of a device made by `creation`, with these attributes of its kind.
fn described(device: &Device, data: InfoData, kind: InfoKind) -> LinkMessage {
    let mut message = creation("shroud.test", device);
    message.header.index = 7;
    message.header.flags = LinkFlags::Up | LinkFlags::Noarp;
    message.attributes.pop();
    message.attributes.extend([
        LinkAttribute::IfAlias(LABEL.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]),
    ]);
    message
}

/// As `geneve_fill_info` (drivers/net/geneve.c) lists them for a device in external mode.
fn external() -> Vec<InfoGeneve> {
    vec![
        InfoGeneve::Id(0),
        InfoGeneve::Ttl(0),
        InfoGeneve::Tos(0),
        InfoGeneve::Label(0),
        InfoGeneve::Df(GeneveDf::Unset),
        InfoGeneve::Port(6081),
        InfoGeneve::CollectMetadata,
        InfoGeneve::UdpZeroCsum6Rx(true),
        InfoGeneve::TtlInherit(false),
    ]
}

#[test]
fn a_geneve_device_is_made_external_at_its_port_and_with_nothing_else() {
    let message = creation("shroud.geneve", &device(Kind::Geneve));

    let Some(LinkAttribute::LinkInfo(info)) = message.attributes.last() else {
        panic!("no link info: {message:?}");
    };
    let mut bytes = vec![0; info.as_slice().buffer_len()];
    info.as_slice().emit(&mut bytes);
    // IFLA_INFO_KIND "geneve"; IFLA_INFO_DATA with IFLA_GENEVE_COLLECT_METADATA (6, a flag) and IFLA_GENEVE_PORT (5, 6081 in network order).
    let expected = [
        &[0x0b, 0, 1, 0][..],
        b"geneve\0\0",
        &[0x10, 0, 2, 0],
        &[4, 0, 6, 0],
        &[6, 0, 5, 0, 0x17, 0xc1, 0, 0],
    ];
    assert_eq!(bytes, expected.concat());
    assert_eq!(
        message.attributes[..3],
        [
            LinkAttribute::IfName("shroud.geneve".to_owned()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
            LinkAttribute::Mtu(1390),
        ]
    );
    assert_eq!(message.attributes.len(), 4);
}

#[test]
fn a_geneve_device_as_we_make_it_needs_no_change() {
    let device = device(Kind::Geneve);

    let link = link(&described(&device, InfoData::Geneve(external()), InfoKind::Geneve)).unwrap();

    assert_eq!(differences(&device, &link.settings), []);
    assert!(link.is_ours(Vni::new(9).unwrap()), "by its label, for it has no number");
}

#[test]
fn a_geneve_device_of_another_shape_needs_another_device() {
    let device = device(Kind::Geneve);
    let mut point_to_point = external();
    point_to_point.retain(|attribute| *attribute != InfoGeneve::CollectMetadata);
    point_to_point.push(InfoGeneve::Remote(Ipv4Addr::new(172, 18, 0, 2)));
    let with = |extra: InfoGeneve| external().into_iter().chain([extra]).collect::<Vec<_>>();
    let mut elsewhere = external();
    elsewhere.retain(|attribute| !matches!(attribute, InfoGeneve::Port(_)));
    elsewhere.push(InfoGeneve::Port(6082));
    for (data, expected) in [
        (point_to_point, "remote 172.18.0.2 -> external"),
        (
            with(InfoGeneve::InnerProtoInherit),
            "external, innerprotoinherit -> external",
        ),
        (elsewhere, "port 6082 -> port 6081"),
    ] {
        let link = link(&described(&device, InfoData::Geneve(data), InfoKind::Geneve)).unwrap();

        let [difference] = &differences(&device, &link.settings)[..] else {
            panic!("{:?}", link.settings);
        };
        assert_eq!(difference.to_string(), expected);
        assert!(difference.new.needs_another_device());
    }
}

#[test]
fn every_vxlan_feature_we_do_not_want_needs_another_device() {
    let device = device(Kind::Vxlan);
    let plain = [
        InfoVxlan::Id(83),
        InfoVxlan::Port(6081),
        InfoVxlan::Local(Ipv4Addr::new(172, 18, 0, 1)),
        InfoVxlan::Df(VxlanDf::Set),
        InfoVxlan::UDPCsum(true),
        InfoVxlan::Ageing(300),
    ];
    let read = |extra: Option<InfoVxlan>| {
        let data = plain.iter().cloned().chain(extra).collect();
        link(&described(&device, InfoData::Vxlan(data), InfoKind::Vxlan)).unwrap()
    };
    assert_eq!(differences(&device, &read(None).settings), []);

    for extra in [
        InfoVxlan::Group(Ipv4Addr::new(239, 1, 1, 1)),
        InfoVxlan::Group6("ff02::9".parse().unwrap()),
        InfoVxlan::Link(3),
        InfoVxlan::Label(1),
        InfoVxlan::Limit(1),
        InfoVxlan::PortRange((1, 2)),
        InfoVxlan::Proxy(true),
        InfoVxlan::Rsc(true),
        InfoVxlan::L2Miss(true),
        InfoVxlan::L3Miss(true),
        InfoVxlan::CollectMetadata(true),
        InfoVxlan::UDPCsum(false),
        InfoVxlan::UDPZeroCsumTX(true),
        InfoVxlan::UDPZeroCsumRX(true),
        InfoVxlan::RemCsumTX(true),
        InfoVxlan::RemCsumRX(true),
        InfoVxlan::RemCsumNoPartial,
        InfoVxlan::Gbp,
        InfoVxlan::Gpe,
        InfoVxlan::TtlInherit(1),
        InfoVxlan::Vnifilter(true),
        InfoVxlan::Localbypass(false),
    ] {
        let different = differences(&device, &read(Some(extra.clone())).settings);

        let [difference] = &different[..] else {
            panic!("{extra:?}: {different:?}");
        };
        assert!(difference.new.needs_another_device(), "{difference}");
    }
}

#[test]
fn only_our_name_kind_and_number_or_label_make_a_device_ours() {
    let ours = described(
        &device(Kind::Vxlan),
        InfoData::Vxlan(vec![InfoVxlan::Id(83), InfoVxlan::Port(6081)]),
        InfoKind::Vxlan,
    );
    let read = |change: fn(&mut LinkMessage)| {
        let mut message = ours.clone();
        change(&mut message);
        link(&message).unwrap()
    };
    let [number, other] = [83, 84].map(|number| Vni::new(number).unwrap());
    let unlabelled: fn(&mut LinkMessage) = |message| {
        message
            .attributes
            .retain(|attribute| !matches!(attribute, LinkAttribute::IfAlias(_)))
    };

    assert!(read(|_| {}).is_ours(number));
    assert!(read(|_| {}).is_ours(other), "the label alone");
    assert!(read(unlabelled).is_ours(number), "the number alone");
    assert!(!read(unlabelled).is_ours(other));
    assert!(!read(|message| message.attributes[0] = LinkAttribute::IfName("vxlan0".to_owned())).is_ours(number));
    assert!(
        !read(|message| drop(message.attributes.pop())).is_ours(number),
        "no overlay device at all"
    );
}

#[test]
fn an_entry_with_a_next_hop_object_is_not_one_of_our_shape() {
    const NDA_NH_ID: u16 = 13;
    let mac: Mac = "02:00:00:00:00:02".parse().unwrap();
    let mut message = forwarding(7, mac, Some("172.18.0.2".parse().unwrap()));
    assert_eq!(
        read_forwarding(7, std::slice::from_ref(&message)),
        BTreeMap::from([(mac, Forwarding::To("172.18.0.2".parse().unwrap()))])
    );

    let object = netlink_packet_core::DefaultNla::new(NDA_NH_ID, vec![1, 0, 0, 0]);
    assert_eq!(object.kind(), NDA_NH_ID);
    message.attributes.push(NeighbourAttribute::Other(object));

    assert!(matches!(
        read_forwarding(7, &[message]).get(&mac),
        Some(Forwarding::Other(_))
    ));
}
