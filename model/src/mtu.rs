//! Link sizes: how large a packet may be, and what each layer around it costs.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Family;

/// An outer IP header (without options) and a UDP header.
const UDP_OVER_IPV4: u32 = 20 + 8;
const UDP_OVER_IPV6: u32 = 40 + 8;

/// WireGuard's own: type, index, counter, tag.
const WIREGUARD: u32 = 32;

/// What WireGuard pads to, whitepaper §5.4.6.
const WIREGUARD_BLOCK: u32 = 16;

/// A VXLAN header or a Geneve header without options, and the inner Ethernet header.
const OVERLAY: u32 = 8 + 14;

/// Why a number is not a link size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("MTU {0} is outside 576..=65535 bytes")]
pub struct InvalidMtu(pub u32);

/// The largest packet a link carries, in bytes, without its link-layer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

impl Mtu {
    /// The smallest there is: what every IPv4 host takes (RFC 791 §3.1).
    pub const MINIMUM: Self = Self(576);

    /// The smallest with which IPv6 works at all (RFC 8200 §5). A device with less loses its IPv6 addresses.
    pub const MINIMUM_IPV6: Self = Self(1280);

    /// Ethernet's.
    pub const ETHERNET: Self = Self(1500);

    /// Checks that the number is a link size IPv4 can live with.
    ///
    /// # Errors
    /// [`InvalidMtu`] outside 576..=65535.
    pub const fn new(bytes: u32) -> Result<Self, InvalidMtu> {
        if bytes < 576 || bytes > 65535 {
            return Err(InvalidMtu(bytes));
        }
        Ok(Self(bytes))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// What is left for the inner packet when WireGuard wraps it and `underlay` carries it.
    ///
    /// WireGuard pads the inner packet to 16 bytes but never beyond the device's MTU (whitepaper §5.4.6), so that a full packet costs no
    /// more than the headers.
    ///
    /// Never less than [`Mtu::MINIMUM`]: on a link so small the outer packet is larger than the link, and travels in fragments.
    pub const fn inside_wireguard(self, underlay: Family) -> Self {
        self.inside(underlay, WIREGUARD)
    }

    /// What is left for the inner packet when an overlay (VXLAN, or Geneve without options) wraps it on its way through a tunnel of this
    /// size: the outer IP and UDP headers, the overlay's own, and the inner Ethernet header (RFC 7348 §5, RFC 8926 §3.5).
    ///
    /// The wrapped packet fills whole blocks of 16 bytes at most. It was routed to the uplink before the gate led it into the tunnel, and
    /// the kernel's WireGuard limits padding by the MTU of that route (`calculate_skb_padding` in drivers/net/wireguard/send.c): a full
    /// packet that is no multiple of 16 would grow beyond the tunnel's MTU.
    ///
    /// Never less than [`Mtu::MINIMUM`], as with [`Mtu::inside_wireguard`].
    pub const fn inside_overlay(self, underlay: Family) -> Self {
        Self(self.0 - self.0 % WIREGUARD_BLOCK).inside(underlay, OVERLAY)
    }

    const fn inside(self, underlay: Family, headers: u32) -> Self {
        let outer = match underlay {
            Family::V4 => UDP_OVER_IPV4,
            Family::V6 => UDP_OVER_IPV6,
        };
        match Self::new(self.0.saturating_sub(outer + headers)) {
            Ok(mtu) => mtu,
            Err(_) => Self::MINIMUM,
        }
    }

    /// Whether packets of a family can be told to be no larger than this: IPv6 has a minimum (RFC 8200 §5).
    pub const fn carries(self, family: Family) -> bool {
        self.0 >= Self::minimum(family).0
    }

    /// This size, or the least that a family must be given where that is more. What no longer fits the link then travels in fragments of
    /// the outer packet: slower, but the family works.
    #[must_use]
    pub const fn at_least_for(self, family: Family) -> Self {
        if self.carries(family) {
            self
        } else {
            Self::minimum(family)
        }
    }

    const fn minimum(family: Family) -> Self {
        match family {
            Family::V4 => Self::MINIMUM,
            Family::V6 => Self::MINIMUM_IPV6,
        }
    }
}

impl TryFrom<u32> for Mtu {
    type Error = InvalidMtu;

    fn try_from(bytes: u32) -> Result<Self, InvalidMtu> {
        Self::new(bytes)
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fits, by uplink, inside WireGuard alone ("native") and inside an overlay inside WireGuard. VXLAN and Geneve cost the same.
    #[test]
    fn the_table_of_sizes() {
        let rows = [
            // uplink, underlay, native, overlay
            (1280, Family::V4, 1220, 1166),
            (1280, Family::V6, 1200, 1130),
            (1400, Family::V4, 1340, 1278),
            (1400, Family::V6, 1320, 1242),
            (1500, Family::V4, 1440, 1390),
            (1500, Family::V6, 1420, 1338),
            (9000, Family::V4, 8940, 8878),
            (9000, Family::V6, 8920, 8842),
        ];
        for (uplink, underlay, native, overlay) in rows {
            let tunnel = Mtu(uplink).inside_wireguard(underlay);

            assert_eq!(tunnel, Mtu(native), "native over {underlay}, uplink {uplink}");
            assert_eq!(
                tunnel.inside_overlay(underlay),
                Mtu(overlay),
                "overlay over {underlay}, uplink {uplink}"
            );
            let wrapped = overlay + if underlay == Family::V4 { 50 } else { 70 };
            let wire = on_the_wire(wrapped, Mtu(uplink), underlay);
            assert!(
                wire <= uplink,
                "a full wrapped packet comes to {wire} bytes, whatever limits the padding"
            );
            assert_eq!(
                on_the_wire(native, tunnel, underlay),
                uplink,
                "a full packet fills the uplink"
            );
            for smaller in 1..=16 {
                let wire = on_the_wire(native - smaller, tunnel, underlay);
                assert!(wire <= uplink, "{smaller} bytes less than full come to {wire} bytes");
            }
        }
    }

    /// An outer packet built header by header, with WireGuard's padding (whitepaper §5.4.6; `calculate_skb_padding`,
    /// drivers/net/wireguard/send.c).
    fn on_the_wire(inner: u32, device: Mtu, underlay: Family) -> u32 {
        let padded = inner.next_multiple_of(16).min(device.bytes());
        let ip = match underlay {
            Family::V4 => 20,
            Family::V6 => 40,
        };
        let (udp, header, tag) = (8, 16, 16);
        ip + udp + header + padded + tag
    }

    #[test]
    fn the_smallest_links_give_the_smallest_size_and_no_overflow() {
        for bytes in 576..=700 {
            for underlay in [Family::V4, Family::V6] {
                for inside in [
                    Mtu(bytes).inside_wireguard(underlay),
                    Mtu(bytes).inside_overlay(underlay),
                ] {
                    assert_eq!(Mtu::new(inside.bytes()), Ok(inside), "{bytes} over {underlay}");
                }
            }
        }
        assert_eq!(Mtu(636).inside_wireguard(Family::V4), Mtu(576));
        assert_eq!(Mtu(635).inside_wireguard(Family::V4), Mtu::MINIMUM);
        assert_eq!(Mtu(637).inside_wireguard(Family::V4), Mtu(577));
    }

    #[test]
    fn ipv6_is_never_given_less_than_it_needs() {
        let small = Mtu(1280).inside_wireguard(Family::V6);

        assert!(small.carries(Family::V4) && !small.carries(Family::V6));
        assert_eq!(small.at_least_for(Family::V4), Mtu(1200));
        assert_eq!(small.at_least_for(Family::V6), Mtu(1280));
        assert_eq!(Mtu(1281).at_least_for(Family::V6), Mtu(1281));
    }

    #[test]
    fn sizes_no_ip_link_has_are_refused() {
        assert_eq!(Mtu::new(575), Err(InvalidMtu(575)));
        assert_eq!(Mtu::new(65536), Err(InvalidMtu(65536)));
    }
}
