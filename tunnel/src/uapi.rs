//! A client of WireGuard's userspace configuration protocol. Source: <https://www.wireguard.com/xplatform/>.
//!
//! One connection carries one request. All waiting is bounded; all memory a secret passes through is wiped.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::Pid;
use shroud_model::{Prefix, PresharedKey, PublicKey};
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize as _, Zeroizing};

use crate::update::{Presence, Update};
use crate::{Backend, Device, Error, ObservedPeer};

/// How long the data plane may keep silent before it counts as not answering.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one whole answer may take. A device with thousands of peers has megabytes to say.
const WHOLE_ANSWER: Duration = Duration::from_secs(20);
/// The longest line of an answer, without its end. The longest meaningful one has 78 bytes.
const LONGEST_LINE: usize = 1024;
/// The longest answer: a million peers.
const LONGEST_ANSWER: usize = 1 << 30;

/// The control socket of one device.
pub(crate) struct Client {
    path: PathBuf,
}

impl Client {
    pub(crate) fn new(socket_dir: &Path, device: &str) -> Self {
        Self {
            path: socket_dir.join(format!("{device}.sock")),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The process that answers on the socket, or `None` when nobody does.
    pub(crate) fn owner(&self) -> Result<Option<Owner>, Error> {
        let operation = "find the data plane's process";
        let Some(stream) = self.connect(operation)? else {
            return Ok(None);
        };
        let credentials = socket_peercred(&stream).map_err(|error| self.failed(operation, error.into()))?;
        Ok(Some(Owner {
            pid: credentials.pid,
            user: credentials.uid.as_raw(),
        }))
    }

    /// Reads the device, or `None` when nobody serves the socket.
    pub(crate) fn read(&self) -> Result<Option<Device>, Error> {
        let operation = "read the device";
        let Some(mut stream) = self.connect(operation)? else {
            return Ok(None);
        };
        let mut answer = Answer::default();
        let said = self
            .send(operation, &mut stream, b"get=1\n\n")
            .and_then(|()| self.receive(operation, &mut stream, |key, value| answer.pair(key, value)));
        match said {
            // It ended just now, and with it the connection.
            Err(Error::Socket { source, .. }) if is_end(&source) => return Ok(None),
            said => said?,
        }
        self.check(operation, answer.number)?;
        answer.close();
        answer.device.peers = answer.peers.into_iter().collect();
        Ok(Some(answer.device))
    }

    /// Changes the device.
    pub(crate) fn write(&self, operation: &str, update: &Update<'_>) -> Result<(), Error> {
        let Some(mut stream) = self.connect(operation)? else {
            return Err(self.failed(operation, io::ErrorKind::NotFound.into()));
        };
        self.send(operation, &mut stream, request(update).as_bytes())?;
        let mut number = None;
        self.receive(operation, &mut stream, |key, value| {
            if key == "errno" {
                number = Some(value.parse().map_err(|_| "errno is no number")?);
            }
            Ok(())
        })?;
        self.check(operation, number)
    }

    /// Connects with a bound on the wait: a hung server's queue of connections fills up, and then `connect` waits for a place in it.
    fn connect(&self, operation: &str) -> Result<Option<UnixStream>, Error> {
        let failed = |error: rustix::io::Errno| self.failed(operation, error.into());
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).map_err(failed)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).map_err(failed)?;
        let address = SocketAddrUnix::new(self.path.as_path()).map_err(failed)?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Some(UnixStream::from(socket))),
            // No socket, or one that a process left behind when it ended.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    fn send(&self, operation: &str, stream: &mut UnixStream, request: &[u8]) -> Result<(), Error> {
        stream.write_all(request).map_err(|error| self.failed(operation, error))
    }

    /// Reads `key=value` lines up to the empty one.
    fn receive(
        &self,
        operation: &str,
        stream: &mut UnixStream,
        mut pair: impl FnMut(&str, &str) -> Result<(), &'static str>,
    ) -> Result<(), Error> {
        let garbled = |what| Error::Garbled {
            operation: operation.to_owned(),
            path: self.path.clone(),
            what,
        };
        let began = Instant::now();
        let mut chunk = Zeroizing::new(vec![0u8; 1 << 16]);
        let mut line = Zeroizing::new(Vec::with_capacity(LONGEST_LINE));
        let mut total = 0;
        loop {
            let read = match stream.read(&mut chunk[..]) {
                Ok(0) if total == 0 => return Err(self.failed(operation, io::ErrorKind::ConnectionReset.into())),
                Ok(0) => return Err(garbled("it ends in the middle")),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(operation, error)),
            };
            total += read;
            if total > LONGEST_ANSWER || began.elapsed() > WHOLE_ANSWER {
                return Err(garbled("it does not end"));
            }
            let mut rest = &chunk[..read];
            while let Some(end) = memchr::memchr(b'\n', rest) {
                let (piece, after) = (&rest[..end], &rest[end + 1..]);
                rest = after;
                if line.is_empty() {
                    if piece.is_empty() {
                        return Ok(());
                    }
                    // Whole in the chunk, as nearly all are.
                    pair_of(piece)
                        .and_then(|(key, value)| pair(key, value))
                        .map_err(garbled)?;
                    continue;
                }
                extend(&mut line, piece).map_err(garbled)?;
                pair_of(&line)
                    .and_then(|(key, value)| pair(key, value))
                    .map_err(garbled)?;
                // Only what was used: wiping the whole buffer for each of a thousand peers' lines takes longer than all the rest.
                line[..].zeroize();
                line.clear();
            }
            extend(&mut line, rest).map_err(garbled)?;
        }
    }

    fn check(&self, operation: &str, number: Option<i32>) -> Result<(), Error> {
        match number {
            Some(0) => Ok(()),
            Some(number) => Err(Error::Refused {
                operation: operation.to_owned(),
                device: self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
                source: io::Error::from_raw_os_error(number.saturating_abs()),
            }),
            None => Err(Error::Garbled {
                operation: operation.to_owned(),
                path: self.path.clone(),
                what: "no errno in it",
            }),
        }
    }

    fn failed(&self, operation: &str, source: io::Error) -> Error {
        let (operation, path) = (operation.to_owned(), self.path.clone());
        if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
            return Error::NotAnswering {
                operation,
                path,
                waited: PATIENCE,
            };
        }
        Error::Socket {
            operation,
            path,
            source,
        }
    }
}

/// Appends to a line. A longer one would make the buffer move and leave a copy behind.
fn extend(line: &mut Vec<u8>, piece: &[u8]) -> Result<(), &'static str> {
    if line.len() + piece.len() > LONGEST_LINE {
        return Err("a line is too long");
    }
    line.extend_from_slice(piece);
    Ok(())
}

fn pair_of(line: &[u8]) -> Result<(&str, &str), &'static str> {
    if line.len() > LONGEST_LINE {
        return Err("a line is too long");
    }
    let text = std::str::from_utf8(line).map_err(|_| "a line is not UTF-8")?;
    text.split_once('=').ok_or("a line without '='")
}

fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Who answers on a control socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner {
    pub(crate) pid: Pid,
    pub(crate) user: u32,
}

/// The text of a request. Its buffer is as large as it will ever need to be, so that no copy of a secret stays behind in a smaller one.
fn request(update: &Update<'_>) -> Zeroizing<String> {
    let ranges: usize = update.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
    let mut text = Zeroizing::new(String::with_capacity(512 + update.peers.len() * 512 + ranges * 64));
    text.push_str("set=1\n");
    if let Some(key) = update.private_key {
        hex_line(&mut text, "private_key", key.expose());
    }
    if let Some(mark) = update.mark {
        line(&mut text, "fwmark", mark.value());
    }
    if let Some(port) = update.listen_port {
        line(&mut text, "listen_port", port);
    }
    for peer in &update.peers {
        hex_line(&mut text, "public_key", peer.public_key.as_bytes());
        match peer.presence {
            Presence::Ensured => {}
            Presence::Assumed => line(&mut text, "update_only", true),
            Presence::Removed => line(&mut text, "remove", true),
        }
        if let Some(key) = peer.preshared_key {
            hex_line(&mut text, "preshared_key", key);
        }
        if let Some(endpoint) = peer.endpoint {
            line(&mut text, "endpoint", endpoint);
        }
        if let Some(seconds) = peer.keepalive {
            line(&mut text, "persistent_keepalive_interval", seconds);
        }
        for range in &peer.allowed_ips {
            line(&mut text, "allowed_ip", range);
        }
    }
    text.push('\n');
    text
}

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key}={value}").expect("writing to a String cannot fail");
}

/// Digit by digit, so that no formatting buffer holds the secret.
fn hex_line(text: &mut String, key: &str, bytes: &[u8; 32]) {
    text.push_str(key);
    text.push('=');
    for byte in bytes {
        for half in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(half)]));
        }
    }
    text.push('\n');
}

/// The bytes of a secret.
fn secret(text: &str) -> Result<Zeroizing<[u8; 32]>, &'static str> {
    let mut bytes = Zeroizing::new([0u8; 32]);
    unhex(text, &mut bytes)?;
    Ok(bytes)
}

fn unhex(text: &str, bytes: &mut [u8; 32]) -> Result<(), &'static str> {
    const WRONG: &str = "a key is not 64 hexadecimal digits";
    let half = |digit: u8| match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(WRONG),
    };
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return Err(WRONG);
    };
    if pairs.len() != bytes.len() {
        return Err(WRONG);
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = half(pair[0])? << 4 | half(pair[1])?;
    }
    Ok(())
}

/// What an answer to `get` has said so far.
struct Answer {
    device: Device,
    /// The peers that have been told whole; a map of thousands is made fastest at once.
    peers: Vec<(PublicKey, ObservedPeer)>,
    peer: Option<(PublicKey, ObservedPeer)>,
    handshake: Duration,
    number: Option<i32>,
}

impl Default for Answer {
    fn default() -> Self {
        let device = Device {
            backend: Backend::Userspace,
            public_key: None,
            listen_port: 0,
            mark: 0,
            peers: Default::default(),
        };
        Self {
            device,
            peers: Vec::new(),
            peer: None,
            handshake: Duration::ZERO,
            number: None,
        }
    }
}

impl Answer {
    fn pair(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "private_key" => self.device.public_key = public(value)?,
            "listen_port" => self.device.listen_port = value.parse().map_err(|_| "listen_port is no port")?,
            "fwmark" => self.device.mark = mark(value).ok_or("fwmark is no mark")?,
            "errno" => self.number = Some(value.parse().map_err(|_| "errno is no number")?),
            "public_key" => {
                self.close();
                // A key nobody can hold is not one of ours; what it claims is taken back when our peers get their ranges.
                let mut bytes = [0; 32];
                unhex(value, &mut bytes)?;
                self.peer = PublicKey::from_bytes(bytes)
                    .ok()
                    .map(|key| (key, ObservedPeer::default()));
            }
            _ => self.peer_pair(key, value)?,
        }
        Ok(())
    }

    fn peer_pair(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        let Some((_, peer)) = &mut self.peer else { return Ok(()) };
        let number = || value.parse::<u64>().map_err(|_| "a counter is no number");
        match key {
            "preshared_key" => {
                let secret = secret(value)?;
                peer.preshared_key = (*secret != [0; 32]).then(|| Arc::new(PresharedKey::from_bytes(*secret)));
            }
            // One that we could not have set (with a zone) is as good as none.
            "endpoint" => peer.endpoint = value.parse::<SocketAddr>().ok(),
            "persistent_keepalive_interval" => {
                peer.keepalive = Some(number()?).filter(|&seconds| seconds != 0).map(Duration::from_secs);
            }
            "last_handshake_time_sec" => {
                self.handshake = self.handshake.saturating_add(Duration::from_secs(number()?));
            }
            "last_handshake_time_nsec" => {
                self.handshake = self.handshake.saturating_add(Duration::from_nanos(number()?));
            }
            "rx_bytes" => peer.rx_bytes = number()?,
            "tx_bytes" => peer.tx_bytes = number()?,
            "allowed_ip" => {
                peer.allowed_ips.insert(range(value).ok_or("allowed_ip is no range")?);
            }
            // `protocol_version`, and what newer implementations may add.
            _ => {}
        }
        Ok(())
    }

    /// Ends the peer's section.
    fn close(&mut self) {
        let handshake = std::mem::take(&mut self.handshake);
        if let Some((key, mut peer)) = self.peer.take() {
            peer.last_handshake = (!handshake.is_zero())
                .then(|| SystemTime::UNIX_EPOCH.checked_add(handshake))
                .flatten();
            self.peers.push((key, peer));
        }
    }
}

fn public(private: &str) -> Result<Option<PublicKey>, &'static str> {
    let bytes = secret(private)?;
    if *bytes == [0; 32] {
        return Ok(None);
    }
    let public = x25519_dalek::PublicKey::from(&StaticSecret::from(*bytes));
    Ok(PublicKey::from_bytes(public.to_bytes()).ok())
}

fn mark(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn range(text: &str) -> Option<Prefix> {
    let (address, length) = text.split_once('/')?;
    Prefix::containing(address.parse::<IpAddr>().ok()?, length.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use shroud_model::PrivateKey;

    use super::*;
    use crate::update::PeerUpdate;

    /// A server that says `answer` to whatever it is asked.
    fn server(answer: &'static [u8]) -> (tempfile::TempDir, Client) {
        let folder = tempfile::tempdir().unwrap();
        let client = Client::new(folder.path(), "shroud0");
        let listener = UnixListener::bind(client.path()).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0u8; 65536];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(answer).unwrap_or_default();
        });
        (folder, client)
    }

    #[test]
    fn nobody_behind_the_socket_is_no_device() {
        let folder = tempfile::tempdir().unwrap();
        let client = Client::new(folder.path(), "shroud0");
        assert!(client.read().unwrap().is_none());

        drop(UnixListener::bind(client.path()).unwrap());

        assert!(client.path().exists());
        assert!(client.read().unwrap().is_none());
    }

    #[test]
    fn a_data_plane_that_ends_while_asked_is_no_device() {
        let (_folder, client) = server(b"");

        assert!(client.read().unwrap().is_none());
    }

    #[test]
    fn a_refusal_names_operation_device_and_number() {
        let (_folder, client) = server(b"errno=-98\n\n");

        let error = client.write("set listen port 51820", &Update::default()).unwrap_err();

        assert_eq!(
            error.to_string(),
            "set listen port 51820 on shroud0: Address already in use (os error 98)"
        );
    }

    #[test]
    fn an_answer_that_breaks_the_protocol_is_refused_without_being_quoted() {
        for answer in [
            &b"private_key=canary\nerrno=0\n\n"[..],
            b"no equals sign canary\n\n",
            b"listen_port=canary\n\n",
            b"public_key=\n\n",
            b"errno=canary\n\n",
            b"listen_port=1\n\n",
            b"\xff\xfe=canary\n\n",
            b"canary",
        ] {
            let (_folder, client) = server(answer);
            let error = client.read().unwrap_err();
            assert!(matches!(error, Error::Garbled { .. }), "{error}");
            assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
        }
    }

    #[test]
    fn a_handshake_beyond_all_time_is_none() {
        let (_folder, client) = server(
            b"public_key=0101010101010101010101010101010101010101010101010101010101010101\n\
              last_handshake_time_sec=18446744073709551615\nlast_handshake_time_nsec=18446744073709551615\nerrno=0\n\n",
        );

        let device = client.read().unwrap().unwrap();

        assert_eq!(device.peers.len(), 1);
        assert!(device.peers.values().all(|peer| peer.last_handshake.is_none()));
    }

    #[test]
    fn a_line_without_end_is_refused() {
        static LONG: [u8; 5000] = [b'a'; 5000];
        let (_folder, client) = server(&LONG);

        assert!(matches!(
            client.read(),
            Err(Error::Garbled {
                what: "a line is too long",
                ..
            })
        ));
    }

    #[test]
    fn a_server_that_hangs_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let client = Client::new(folder.path(), "shroud0");
        let _listener = UnixListener::bind(client.path()).unwrap();
        let began = Instant::now();

        let error = client.read().unwrap_err();

        assert!(matches!(error, Error::NotAnswering { .. }), "{error}");
        assert!(began.elapsed() < PATIENCE * 2, "{:?}", began.elapsed());
    }

    #[test]
    fn a_request_never_outgrows_the_buffer_it_was_given() {
        let key = PrivateKey::from_bytes([0xab; 32]);
        let secret = [0xcd; 32];
        let mut peer = PeerUpdate::new(PublicKey::from_bytes([9; 32]).unwrap(), Presence::Assumed);
        peer.preshared_key = Some(&secret);
        peer.endpoint = Some("[1234:5678:9abc:def0:1234:5678:9abc:def0]:65535".parse().unwrap());
        peer.keepalive = Some(u16::MAX);
        peer.allowed_ips = (0u8..100)
            .map(|n| {
                format!("1234:5678:9abc:def0:1234:5678:9abc:de{n:02x}/128")
                    .parse()
                    .unwrap()
            })
            .collect();
        let update = Update {
            private_key: Some(&key),
            listen_port: Some(u16::MAX),
            mark: Some(shroud_model::Mark::new(u32::MAX, u32::MAX).unwrap()),
            peers: vec![peer],
        };

        let text = request(&update);

        assert_eq!(text.capacity(), 512 + 512 + 100 * 64);
        assert!(text.starts_with(&format!("set=1\nprivate_key={}\nfwmark=4294967295\n", "ab".repeat(32))));
    }

    #[test]
    fn an_answer_is_read_as_a_whole() {
        let (_folder, client) = server(
            b"private_key=0101010101010101010101010101010101010101010101010101010101010101\nlisten_port=51820\nfwmark=16\n\
              public_key=0909090909090909090909090909090909090909090909090909090909090909\n\
              preshared_key=0000000000000000000000000000000000000000000000000000000000000000\nprotocol_version=1\n\
              endpoint=[fd00::1]:51820\nlast_handshake_time_sec=100\nlast_handshake_time_nsec=5\ntx_bytes=7\nrx_bytes=8\n\
              persistent_keepalive_interval=25\nallowed_ip=10.244.2.0/24\nallowed_ip=fd00::/64\nsomething_new=1\n\
              public_key=0000000000000000000000000000000000000000000000000000000000000000\nallowed_ip=0.0.0.0/0\nerrno=0\n\n",
        );

        let device = client.read().unwrap().unwrap();

        assert_eq!(device.public_key, public(&"01".repeat(32)).unwrap());
        assert_eq!((device.listen_port, device.mark, device.peers.len()), (51820, 16, 1));
        let peer = &device.peers[&PublicKey::from_bytes([9; 32]).unwrap()];
        assert_eq!(peer.endpoint, Some("[fd00::1]:51820".parse().unwrap()));
        assert_eq!(
            peer.last_handshake,
            Some(SystemTime::UNIX_EPOCH + Duration::new(100, 5))
        );
        assert_eq!((peer.rx_bytes, peer.tx_bytes, peer.has_preshared_key()), (8, 7, false));
        assert_eq!(peer.keepalive, Some(Duration::from_secs(25)));
        let ranges: Vec<String> = peer.allowed_ips.iter().map(Prefix::to_string).collect();
        assert_eq!(ranges, ["10.244.2.0/24", "fd00::/64"]);
    }
}
