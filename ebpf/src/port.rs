//! A port of node traffic that stays in the clear, as people write it: `tcp/6443`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use shroud_gate::{OPEN_PORTS, open_port};
use thiserror::Error;

use crate::Error;

/// How many open ports a table holds at most.
pub const MAX_OPEN_PORTS: usize = OPEN_PORTS;

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of a transport protocol. Reads and writes as `tcp/6443`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Port {
    /// The protocol.
    pub protocol: Transport,
    /// The number, not 0.
    pub number: u16,
}

/// Text that is no port.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("read port {text:?}: it is not tcp/NUMBER or udp/NUMBER, with a number from 1 to 65535")]
pub struct InvalidPort {
    text: String,
}

impl Transport {
    /// IP protocol number.
    fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.protocol, self.number)
    }
}

impl FromStr for Port {
    type Err = InvalidPort;

    fn from_str(text: &str) -> Result<Self, InvalidPort> {
        parse(text).ok_or_else(|| InvalidPort { text: text.to_owned() })
    }
}

impl TryFrom<String> for Port {
    type Error = InvalidPort;

    fn try_from(text: String) -> Result<Self, InvalidPort> {
        text.parse()
    }
}

impl From<Port> for String {
    fn from(port: Port) -> Self {
        port.to_string()
    }
}

fn parse(text: &str) -> Option<Port> {
    let (protocol, number) = text.split_once('/')?;
    let protocol = match protocol {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => return None,
    };
    // One spelling for each port: no sign, no leading zero.
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
    let number = number.parse().ok().filter(|_| is_plain)?;
    Some(Port { protocol, number })
}

/// The ports as the settings hold them.
pub(crate) fn encode(ports: &BTreeSet<Port>) -> Result<[u32; OPEN_PORTS], Error> {
    if ports.len() > OPEN_PORTS || ports.iter().any(|port| port.number == 0) {
        return Err(Error::OpenPorts {
            given: ports.len(),
            most: OPEN_PORTS,
        });
    }
    let mut encoded = [0; OPEN_PORTS];
    for (to, port) in encoded.iter_mut().zip(ports) {
        *to = open_port(port.protocol.number(), port.number.to_be_bytes());
    }
    Ok(encoded)
}

/// Back from the settings; `None` if they hold what is no port.
pub(crate) fn decode(ports: &[u32; OPEN_PORTS]) -> Option<BTreeSet<Port>> {
    ports
        .iter()
        .filter(|port| **port != 0)
        .map(|port| decode_one(*port))
        .collect()
}

fn decode_one(port: u32) -> Option<Port> {
    let [_, protocol, high, low] = port.to_be_bytes();
    let protocol = [Transport::Tcp, Transport::Udp]
        .into_iter()
        .find(|known| known.number() == protocol)?;
    let number = u16::from_be_bytes([high, low]);
    Some(Port { protocol, number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_reads_as_it_is_written() {
        for text in ["tcp/6443", "udp/53", "tcp/1", "udp/65535"] {
            assert_eq!(text.parse::<Port>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "tcp",
            "tcp/",
            "6443",
            "tcp/0",
            "tcp/65536",
            "sctp/1",
            "tcp/+1",
            "tcp/01",
            "TCP/1",
            "tcp/1 ",
        ] {
            let error = text.parse::<Port>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn a_seventeenth_port_is_refused() {
        let ports = |count| {
            (1..=count)
                .map(|number| Port {
                    protocol: Transport::Tcp,
                    number,
                })
                .collect::<BTreeSet<_>>()
        };

        assert_eq!(decode(&encode(&ports(16)).unwrap()), Some(ports(16)));
        let error = encode(&ports(17)).unwrap_err();

        assert_eq!(
            error.to_string(),
            "put 17 open ports into the gate's table: give at most 16, none of them 0"
        );
    }
}
