//! Link-layer addresses, made from who a node is.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use shroud_model::NodeId;
use thiserror::Error;

/// Why a text is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a MAC address; write six bytes, such as 02:00:5e:10:00:01")]
pub struct InvalidMac(pub String);

/// A MAC address (EUI-48).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// "Everything else": the forwarding entry that floods, and which we never keep.
    pub const ZERO: Self = Self([0; 6]);

    /// The address of a node's overlay devices: 46 bits of the node's number in a unicast address that no vendor gives out (locally
    /// administered, IEEE 802c). Every node works it out from the name alone, so nobody has to announce it. With 5,000 nodes two share an
    /// address once in five million meshes; [`Device::conflicts`](crate::Device::conflicts) says so.
    pub const fn of(node: NodeId) -> Self {
        let [a, b, c, d, e, f, g, h] = node.0.to_be_bytes();
        Self([((a ^ g) & 0b1111_1100) | 0b10, b ^ h, c, d, e, f])
    }

    /// The IPv6 link-local address that goes with it (EUI-64, RFC 4291 appendix A). A route's IPv6 next hop: the kernel takes a link-local one
    /// on any device, another only where no route leads it elsewhere (`ip6_route_check_nh_onlink`), which during a change of mode one does.
    pub const fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let pair = u16::from_be_bytes;
        Ipv6Addr::new(
            0xfe80,
            0,
            0,
            0,
            pair([a ^ 0b10, b]),
            pair([c, 0xff]),
            pair([0xfe, d]),
            pair([e, f]),
        )
    }

    /// The six bytes.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl From<[u8; 6]> for Mac {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let invalid = || InvalidMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && !part.starts_with('+'))
                .ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use shroud_model::NodeName;

    use super::*;

    proptest! {
        #[test]
        fn a_nodes_address_is_unicast_and_locally_administered(id: u64) {
            assert_eq!(Mac::of(NodeId(id)).bytes()[0] & 0b11, 0b10);
        }

        #[test]
        fn what_is_shown_is_read(bytes: [u8; 6]) {
            assert_eq!(Mac::from(bytes).to_string().parse(), Ok(Mac::from(bytes)));
        }
    }

    /// Other nodes work out the same address, whatever their version: this value must never change.
    #[test]
    fn a_nodes_address_stays_what_it_was() {
        let node: NodeName = "node-1".parse().unwrap();

        assert_eq!(Mac::of(node.id()).to_string(), "9e:55:ec:c2:20:78");
    }

    #[test]
    fn a_link_local_address_is_the_one_the_kernel_would_make() {
        let mac: Mac = "9e:55:ec:c2:20:78".parse().unwrap();

        assert_eq!(mac.link_local().to_string(), "fe80::9c55:ecff:fec2:2078");
    }

    #[test]
    fn ten_thousand_nodes_have_ten_thousand_addresses() {
        let name = |number| format!("ip-10-0-{}-{}.eu-west-1.compute.internal", number / 256, number % 256);
        let macs: BTreeSet<Mac> = (0..10_000)
            .map(|number| Mac::of(name(number).parse::<NodeName>().unwrap().id()))
            .collect();

        assert_eq!(macs.len(), 10_000);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02-00-00-00-00-00",
            "+2:00:00:00:00:00",
            "0g:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(InvalidMac(text.to_owned())), "{text:?}");
        }
    }
}
