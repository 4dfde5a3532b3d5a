//! The WireGuard userspace configuration protocol: text in, typed requests out, and back.
//!
//! Only the words are here; `device` gives them meaning and `control` carries them. A request is parsed line by line,
//! so that the memory it takes is bounded by what it means and not by what was written. Nothing of a request is acted on before its
//! last line was understood.
//!
//! Source: <https://www.wireguard.com/xplatform/>, with the `-` prefix of `allowed_ip` that newer implementations know.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use shroud_model::{Prefix, PresharedKey, PrivateKey, PublicKey};
use zeroize::Zeroizing;

/// The longest line, without its end. The longest meaningful one, `preshared_key=` and 64 digits, has 78 bytes.
pub const LONGEST_LINE: usize = 128;
/// Peer sections in one request.
const MOST_PEERS: usize = 1 << 20;
/// Allowed IPs in one request.
const MOST_ALLOWED_IPS: usize = 1 << 22;

/// What a client asks for.
pub enum Request {
    /// The whole configuration and the counters.
    Get,
    /// A change, to be made as a whole or not at all.
    Set(Set),
}

/// A change of the device. `None` leaves a thing as it is.
#[derive(Default)]
pub struct Set {
    /// The device's identity.
    pub private_key: Option<Secret<PrivateKey>>,
    /// The UDP port; 0 lets the kernel choose.
    pub listen_port: Option<u16>,
    /// The mark on the packets the device sends; 0 is none.
    pub fwmark: Option<u32>,
    /// Takes all peers away first, with their sessions; those named below begin anew.
    pub replace_peers: bool,
    /// Changes of peers, in order.
    pub peers: Vec<SetPeer>,
}

/// A new secret, or the end of an old one.
pub enum Secret<K> {
    /// Use this one from now on.
    Replace(K),
    /// Use none.
    Clear,
}

/// A change of one peer.
pub struct SetPeer {
    /// Whom it is about.
    pub public_key: PublicKey,
    /// Takes the peer away. Nothing else of this section counts then.
    pub remove: bool,
    /// Does nothing when there is no such peer.
    pub update_only: bool,
    /// The secret mixed into handshakes.
    pub preshared_key: Option<Secret<PresharedKey>>,
    /// Where the peer's packets go until it is heard from elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// Seconds of silence after which an empty packet is sent; 0 is never.
    pub keepalive: Option<u16>,
    /// Whether allowed IPs that are not named below go away.
    pub replace_allowed_ips: bool,
    /// Changes of allowed IPs, in order.
    pub allowed_ips: Vec<AllowedIp>,
}

impl SetPeer {
    fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// A change of the allowed IPs of one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedIp {
    /// The peer owns this prefix from now on, whoever did before.
    Add(Prefix),
    /// The peer no longer owns this prefix.
    Remove(Prefix),
}

/// Reads requests from lines. One parser serves a connection: after each request it is ready for the next.
#[derive(Default)]
pub struct Parser {
    state: State,
    allowed_ips: usize,
}

#[derive(Default)]
enum State {
    #[default]
    Between,
    Getting,
    Setting(Set),
    /// The request is already refused; its remaining lines only say where it ends.
    Refused(Errno),
}

impl Parser {
    /// Takes one line without its end. An empty line ends a request, which is then returned, or the reason why it is none.
    pub fn line(&mut self, line: &[u8]) -> Option<Result<Request, Errno>> {
        if line.is_empty() {
            self.allowed_ips = 0;
            return match std::mem::take(&mut self.state) {
                State::Between => None,
                State::Getting => Some(Ok(Request::Get)),
                State::Setting(set) => Some(Ok(Request::Set(set))),
                State::Refused(errno) => Some(Err(errno)),
            };
        }
        if let Err(errno) = self.word(line) {
            self.state = State::Refused(errno);
        }
        None
    }

    fn word(&mut self, line: &[u8]) -> Result<(), Errno> {
        if let State::Refused(_) = self.state {
            return Ok(());
        }
        if line.len() > LONGEST_LINE {
            return Err(Errno::EMSGSIZE);
        }
        let line = std::str::from_utf8(line).map_err(|_| Errno::EPROTO)?;
        let (key, value) = line.split_once('=').ok_or(Errno::EPROTO)?;
        match &mut self.state {
            State::Between => {
                self.state = match (key, value) {
                    ("get", "1") => State::Getting,
                    ("set", "1") => State::Setting(Set::default()),
                    _ => return Err(Errno::EPROTO),
                };
                Ok(())
            }
            State::Getting => Err(Errno::EPROTO),
            State::Setting(set) => {
                if key == "allowed_ip" {
                    self.allowed_ips += 1;
                    if self.allowed_ips > MOST_ALLOWED_IPS {
                        return Err(Errno::E2BIG);
                    }
                }
                set.word(key, value)
            }
            State::Refused(_) => Ok(()),
        }
    }
}

impl Set {
    fn word(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        if key == "public_key" {
            if self.peers.len() >= MOST_PEERS {
                return Err(Errno::E2BIG);
            }
            let key = public_key(value)?;
            self.peers.push(SetPeer::new(key));
            return Ok(());
        }
        if let Some(peer) = self.peers.last_mut() {
            return peer.word(key, value);
        }
        match key {
            "private_key" => self.private_key = Some(secret(value, |bytes| PrivateKey::from_bytes(clamped(bytes)))?),
            "listen_port" => self.listen_port = Some(number(value)?),
            "fwmark" => self.fwmark = Some(number(value)?),
            "replace_peers" => self.replace_peers = yes(value)?,
            _ => return Err(Errno::EPROTO),
        }
        Ok(())
    }
}

impl SetPeer {
    fn word(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        match key {
            "remove" => self.remove = yes(value)?,
            "update_only" => self.update_only = yes(value)?,
            "preshared_key" => self.preshared_key = Some(secret(value, PresharedKey::from_bytes)?),
            "endpoint" => self.endpoint = Some(endpoint(value)?),
            "persistent_keepalive_interval" => self.keepalive = Some(number(value)?),
            "replace_allowed_ips" => self.replace_allowed_ips = yes(value)?,
            "allowed_ip" => self.allowed_ips.push(allowed_ip(value)?),
            "protocol_version" if value == "1" => {}
            "protocol_version" => return Err(Errno::EPROTONOSUPPORT),
            _ => return Err(Errno::EPROTO),
        }
        Ok(())
    }
}

/// A flag can only be raised: not writing it leaves it down.
fn yes(value: &str) -> Result<bool, Errno> {
    if value == "true" { Ok(true) } else { Err(Errno::EINVAL) }
}

/// Decimal digits only: `u16::from_str` would take a `+`.
fn number<N: std::str::FromStr>(value: &str) -> Result<N, Errno> {
    if !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Errno::EINVAL);
    }
    value.parse().map_err(|_| Errno::EINVAL)
}

fn public_key(value: &str) -> Result<PublicKey, Errno> {
    PublicKey::from_bytes(*bytes(value)?).map_err(|_| Errno::EINVAL)
}

/// A secret of all zeroes means none.
fn secret<K>(value: &str, key: impl FnOnce([u8; 32]) -> K) -> Result<Secret<K>, Errno> {
    let bytes = bytes(value)?;
    Ok(if *bytes == [0; 32] {
        Secret::Clear
    } else {
        Secret::Replace(key(*bytes))
    })
}

/// A scalar as Curve25519 uses it (RFC 7748 §5), so that one key has one text.
fn clamped(mut bytes: [u8; 32]) -> [u8; 32] {
    bytes[0] &= 0b1111_1000;
    bytes[31] = bytes[31] & 0b0111_1111 | 0b0100_0000;
    bytes
}

fn bytes(value: &str) -> Result<Zeroizing<[u8; 32]>, Errno> {
    let digits: &[u8; 64] = value.as_bytes().try_into().map_err(|_| Errno::EINVAL)?;
    let mut bytes = Zeroizing::new([0; 32]);
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(bytes)
}

fn digit(digit: u8) -> Result<u8, Errno> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(Errno::EINVAL),
    }
}

fn endpoint(value: &str) -> Result<SocketAddr, Errno> {
    let endpoint: SocketAddr = value.parse().map_err(|_| Errno::EINVAL)?;
    let address = endpoint.ip().to_canonical();
    if endpoint.port() == 0 || address.is_unspecified() {
        return Err(Errno::EINVAL);
    }
    // An IPv4 address in IPv6 clothes belongs on the IPv4 socket; a link-local one must keep its scope.
    Ok(if address == endpoint.ip() {
        endpoint
    } else {
        SocketAddr::new(address, endpoint.port())
    })
}

fn allowed_ip(value: &str) -> Result<AllowedIp, Errno> {
    match value.strip_prefix('-') {
        Some(prefix) => Ok(AllowedIp::Remove(self::prefix(prefix)?)),
        None => Ok(AllowedIp::Add(self::prefix(value.strip_prefix('+').unwrap_or(value))?)),
    }
}

/// `address/length` or an address alone; bits behind the length are cleared, as the kernel does.
fn prefix(value: &str) -> Result<Prefix, Errno> {
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, Some(number(length)?)),
        None => (value, None),
    };
    let address: IpAddr = address.parse().map_err(|_| Errno::EINVAL)?;
    match length {
        Some(length) => Prefix::containing(address, length).ok_or(Errno::EINVAL),
        None => Ok(Prefix::host(address)),
    }
}

/// An answer under construction. It may hold the private key, so its memory is wiped when it goes, and when it grows.
pub(crate) struct Answer(Zeroizing<Vec<u8>>);

impl Answer {
    /// What is said of a peer with two allowed IPs, in bytes, mostly: a first guess of how long an answer becomes.
    const PEER: usize = 384;

    /// An empty answer with room for this many peers.
    pub(crate) fn with_peers(count: usize) -> Self {
        Self(Zeroizing::new(Vec::with_capacity(1024 + count * Self::PEER)))
    }

    /// The answer to a request that has no result but success or failure.
    pub(crate) fn outcome(outcome: Result<(), Errno>) -> Zeroizing<Vec<u8>> {
        let mut answer = Self::with_peers(0);
        answer.end(outcome)
    }

    /// Writes what is true of the device itself.
    pub(crate) fn device(&mut self, private_key: Option<&PrivateKey>, listen_port: u16, fwmark: u32) {
        if let Some(key) = private_key {
            self.secret("private_key", key.expose());
        }
        self.pair("listen_port", listen_port);
        if fwmark != 0 {
            self.pair("fwmark", fwmark);
        }
    }

    /// Writes what is true of one peer.
    pub(crate) fn peer(&mut self, peer: &PeerStatus<'_>) {
        self.digits("public_key", &hex(peer.public_key.as_bytes()));
        if let Some(key) = peer.preshared_key {
            self.secret("preshared_key", key.expose());
        }
        self.write(b"protocol_version=1\n");
        if let Some(endpoint) = peer.endpoint {
            self.pair("endpoint", endpoint);
        }
        let handshake = peer.last_handshake.map_or(Duration::ZERO, since_epoch);
        self.number("last_handshake_time_sec", handshake.as_secs());
        self.number("last_handshake_time_nsec", handshake.subsec_nanos().into());
        self.number("tx_bytes", peer.tx_bytes);
        self.number("rx_bytes", peer.rx_bytes);
        self.number("persistent_keepalive_interval", peer.keepalive.into());
    }

    /// Writes one allowed IP of the peer written last.
    pub(crate) fn allowed_ip(&mut self, prefix: Prefix) {
        self.pair("allowed_ip", prefix);
    }

    /// Ends the answer. An error is written as its negative number, as `wg` and wireguard-go have it, whatever the protocol's page says.
    pub(crate) fn end(&mut self, outcome: Result<(), Errno>) -> Zeroizing<Vec<u8>> {
        self.pair("errno", outcome.map_or_else(|errno| -(errno as i32), |()| 0));
        self.write(b"\n");
        std::mem::take(&mut self.0)
    }

    /// Never for a secret: formatting leaves copies behind.
    fn pair(&mut self, key: &str, value: impl std::fmt::Display) {
        use std::fmt::Write as _;

        self.write(key.as_bytes());
        self.write(b"=");
        write!(self, "{value}").expect("writing to memory cannot fail");
        self.write(b"\n");
    }

    /// As [`Self::pair`], several times faster: of thousands of peers there are tens of thousands of numbers.
    fn number(&mut self, key: &str, mut value: u64) {
        let mut digits = [b'0'; 20];
        let mut first = digits.len() - 1;
        while value > 9 {
            digits[first] += (value % 10) as u8;
            value /= 10;
            first -= 1;
        }
        digits[first] += value as u8;
        self.write(key.as_bytes());
        self.write(b"=");
        self.write(&digits[first..]);
        self.write(b"\n");
    }

    fn secret(&mut self, name: &str, key: &[u8; 32]) {
        let digits = Zeroizing::new(hex(key));
        self.digits(name, &digits);
    }

    fn digits(&mut self, name: &str, digits: &[u8; 64]) {
        self.write(name.as_bytes());
        self.write(b"=");
        self.write(digits);
        self.write(b"\n");
    }

    /// Appends, moving to a larger buffer by hand: `Vec` would free the old one with the key in it.
    fn write(&mut self, bytes: &[u8]) {
        if self.0.capacity() - self.0.len() < bytes.len() {
            let mut larger = Zeroizing::new(Vec::with_capacity(2 * self.0.capacity() + bytes.len()));
            larger.extend_from_slice(&self.0);
            self.0 = larger;
        }
        self.0.extend_from_slice(bytes);
    }
}

impl std::fmt::Write for Answer {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.write(text.as_bytes());
        Ok(())
    }
}

fn hex(key: &[u8; 32]) -> [u8; 64] {
    let mut digits = [0; 64];
    for (pair, byte) in digits.chunks_exact_mut(2).zip(key) {
        pair[0] = b"0123456789abcdef"[usize::from(byte >> 4)];
        pair[1] = b"0123456789abcdef"[usize::from(byte & 15)];
    }
    digits
}

/// What is true of one peer, without its allowed IPs.
pub(crate) struct PeerStatus<'a> {
    /// Who it is.
    pub(crate) public_key: PublicKey,
    /// The secret mixed into handshakes.
    pub(crate) preshared_key: Option<&'a PresharedKey>,
    /// Where its packets go.
    pub(crate) endpoint: Option<SocketAddr>,
    /// When the last handshake was completed.
    pub(crate) last_handshake: Option<SystemTime>,
    /// UDP payload sent to the peer, in bytes.
    pub(crate) tx_bytes: u64,
    /// Authenticated UDP payload received from the peer, in bytes.
    pub(crate) rx_bytes: u64,
    /// Seconds of silence after which an empty packet is sent; 0 is never.
    pub(crate) keepalive: u16,
}

/// A clock set before 1970 says "never" rather than something absurd.
fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "0303030303030303030303030303030303030303030303030303030303030303";

    /// The outcome of each request in a text.
    fn parse(text: &[u8]) -> Vec<Result<Request, Errno>> {
        let mut parser = Parser::default();
        text.split(|&byte| byte == b'\n')
            .filter_map(|line| parser.line(line))
            .collect()
    }

    fn refusal(text: &str) -> Option<Errno> {
        parse(text.as_bytes()).pop().and_then(Result::err)
    }

    fn set(text: &str) -> Set {
        match parse(text.as_bytes()).pop() {
            Some(Ok(Request::Set(set))) => set,
            Some(Ok(Request::Get)) => panic!("a get"),
            Some(Err(errno)) => panic!("{errno}"),
            None => panic!("nothing"),
        }
    }

    #[test]
    fn every_word_of_the_protocol_is_understood() {
        let set = set(&format!(
            "set=1\nprivate_key={KEY}\nlisten_port=51820\nfwmark=32\nreplace_peers=true\n\
             public_key={KEY}\nupdate_only=true\npreshared_key={KEY}\nendpoint=[2001:db8::1]:51820\n\
             persistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.1.2.3/16\nallowed_ip=-fd00::/64\n\
             allowed_ip=192.0.2.1\nprotocol_version=1\npublic_key={KEY}\nremove=true\n\n"
        ));

        assert!(matches!(set.private_key, Some(Secret::Replace(_))));
        assert_eq!(
            (set.listen_port, set.fwmark, set.replace_peers),
            (Some(51820), Some(32), true)
        );
        let [peer, removed] = &set.peers[..] else {
            panic!("{} peers", set.peers.len())
        };
        assert_eq!(peer.public_key.as_bytes(), &[3; 32]);
        assert!(peer.update_only && peer.replace_allowed_ips && !peer.remove);
        assert!(matches!(&peer.preshared_key, Some(Secret::Replace(key)) if *key.expose() == [3; 32]));
        assert_eq!(peer.endpoint, Some("[2001:db8::1]:51820".parse().unwrap()));
        assert_eq!(peer.keepalive, Some(25));
        assert_eq!(
            peer.allowed_ips,
            [
                AllowedIp::Add("10.1.0.0/16".parse().unwrap()),
                AllowedIp::Remove("fd00::/64".parse().unwrap()),
                AllowedIp::Add("192.0.2.1/32".parse().unwrap()),
            ]
        );
        assert!(removed.remove);
    }

    #[test]
    fn numbers_are_written_in_full() {
        for value in [0, 7, 10, 1_000_000_007, u64::MAX] {
            let mut answer = Answer::with_peers(0);
            answer.number("rx_bytes", value);
            assert_eq!(*answer.0, format!("rx_bytes={value}\n").into_bytes());
        }
    }

    #[test]
    fn a_secret_of_zeroes_means_none() {
        let zero = "0".repeat(64);

        let set = set(&format!(
            "set=1\nprivate_key={zero}\npublic_key={KEY}\npreshared_key={zero}\n\n"
        ));

        assert!(matches!(set.private_key, Some(Secret::Clear)));
        assert!(matches!(set.peers[0].preshared_key, Some(Secret::Clear)));
    }

    #[test]
    fn a_private_key_is_kept_as_it_is_used() {
        let set = set(&format!("set=1\nprivate_key={}\n\n", "ff".repeat(32)));

        let Some(Secret::Replace(key)) = set.private_key else {
            panic!("no key")
        };
        assert_eq!((key.expose()[0], key.expose()[31]), (0xf8, 0x7f));
    }

    #[test]
    fn an_ipv4_endpoint_in_ipv6_form_becomes_ipv4() {
        let set = set(&format!("set=1\npublic_key={KEY}\nendpoint=[::ffff:192.0.2.1]:7\n\n"));

        assert_eq!(set.peers[0].endpoint, Some("192.0.2.1:7".parse().unwrap()));
    }

    #[test]
    fn what_is_wrong_is_refused_with_a_reason() {
        let peer = format!("set=1\npublic_key={KEY}\n");
        let zero = "0".repeat(64);
        let cases = [
            ("get=2\n\n".to_owned(), Errno::EPROTO),
            ("\nfwmark=1\n\n".to_owned(), Errno::EPROTO),
            ("get=1\nfwmark=1\n\n".to_owned(), Errno::EPROTO),
            ("set=1\nfwmark\n\n".to_owned(), Errno::EPROTO),
            ("set=1\nremove=true\n\n".to_owned(), Errno::EPROTO),
            ("set=1\nlisten_port=65536\n\n".to_owned(), Errno::EINVAL),
            ("set=1\nlisten_port=+1\n\n".to_owned(), Errno::EINVAL),
            ("set=1\nfwmark=-1\n\n".to_owned(), Errno::EINVAL),
            ("set=1\nreplace_peers=false\n\n".to_owned(), Errno::EINVAL),
            (format!("set=1\nprivate_key={}\n\n", &KEY[1..]), Errno::EINVAL),
            (format!("set=1\nprivate_key={}g\n\n", &KEY[1..]), Errno::EINVAL),
            (format!("set=1\npublic_key={zero}\n\n"), Errno::EINVAL),
            (format!("set=1\npublic_key=01{}\n\n", &zero[2..]), Errno::EINVAL),
            (format!("{peer}private_key={KEY}\n\n"), Errno::EPROTO),
            (format!("{peer}endpoint=192.0.2.1\n\n"), Errno::EINVAL),
            (format!("{peer}endpoint=192.0.2.1:0\n\n"), Errno::EINVAL),
            (format!("{peer}endpoint=0.0.0.0:1\n\n"), Errno::EINVAL),
            (format!("{peer}endpoint=example.org:1\n\n"), Errno::EINVAL),
            (format!("{peer}allowed_ip=10.0.0.0/33\n\n"), Errno::EINVAL),
            (format!("{peer}allowed_ip=\n\n"), Errno::EINVAL),
            (format!("{peer}persistent_keepalive_interval=65536\n\n"), Errno::EINVAL),
            (format!("{peer}protocol_version=2\n\n"), Errno::EPROTONOSUPPORT),
            (
                format!("set=1\nfwmark={}\n\n", "1".repeat(LONGEST_LINE)),
                Errno::EMSGSIZE,
            ),
        ];
        for (text, errno) in cases {
            assert_eq!(refusal(&text), Some(errno), "{text}");
        }
    }

    #[test]
    fn after_a_refused_request_the_next_one_is_heard() {
        let outcomes = parse(b"set=1\nnonsense\nlisten_port=1\nget=1\n\n\n\nget=1\n\n");

        assert!(matches!(outcomes[..], [Err(Errno::EPROTO), Ok(Request::Get)]));
    }

    proptest! {
        #[test]
        fn no_text_at_all_makes_it_panic(text: Vec<u8>) {
            parse(&text);
        }

        #[test]
        fn no_text_of_known_words_makes_it_panic(words in prop::collection::vec((
            prop::sample::select(&["get", "set", "private_key", "listen_port", "public_key", "endpoint", "allowed_ip", "remove", ""][..]),
            prop_oneof![Just("1".to_owned()), Just("true".to_owned()), Just(KEY.to_owned()), "[0-9a-f:./%-]{0,20}"],
        ), 0..20)) {
            let text: String = words.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
            parse(format!("set=1\n{text}\n").as_bytes());
        }
    }
}
