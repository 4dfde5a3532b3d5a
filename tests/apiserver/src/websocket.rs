//! The server's side of a WebSocket (RFC 6455), as far as `exec` needs it: the answer to the handshake, and frames to the client. Pure.
//!
//! What the client sends is never parsed: to `exec` without standard input it has nothing to say.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use sha1::{Digest, Sha1};

/// What the server appends to the client's key (RFC 6455, section 1.3).
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// The key of a request that asks for a WebSocket.
pub(crate) fn asked(headers: &HeaderMap) -> Option<&str> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let is = |name: &str, word: &str| {
        let mut words = text(name).unwrap_or_default().split(',').map(str::trim);
        words.any(|said| said.eq_ignore_ascii_case(word))
    };
    let asked = is("connection", "upgrade") && is("upgrade", "websocket") && is("sec-websocket-version", "13");
    text("sec-websocket-key").filter(|_| asked)
}

/// The `Sec-WebSocket-Accept` that shows the client that its key was understood.
pub(crate) fn accept(key: &str) -> String {
    STANDARD.encode(Sha1::digest(format!("{key}{GUID}")))
}

/// A binary message in one frame.
pub(crate) fn binary(payload: &[u8]) -> Vec<u8> {
    let length = payload.len();
    let mut frame = vec![0x82];
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(length @ ..126), _) => frame.push(length),
        (_, Ok(length)) => {
            frame.push(126);
            frame.extend(length.to_be_bytes());
        }
        (_, Err(_)) => {
            frame.push(127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    frame
}

/// The server has nothing more to say: code 1000.
pub(crate) const CLOSE: [u8; 4] = [0x88, 2, 0x03, 0xe8];

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 6455, section 1.3.
    #[test]
    fn the_handshake_is_answered_as_the_rfc_does() {
        assert_eq!(accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn only_a_whole_handshake_asks_for_a_websocket() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "x"),
        ] {
            assert_eq!(asked(&headers), None);
            headers.insert(name, value.parse().unwrap());
        }

        assert_eq!(asked(&headers), Some("x"));
    }

    #[test]
    fn a_frame_has_the_shortest_length_that_fits() {
        let heads = [125, 126, 65_535, 65_536].map(|length| {
            let frame = binary(&vec![b'x'; length]);
            frame[..frame.len() - length].to_vec()
        });

        let expected: [&[u8]; 4] = [
            &[0x82, 125],
            &[0x82, 126, 0, 126],
            &[0x82, 126, 0xff, 0xff],
            &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0],
        ];
        assert_eq!(heads, expected);
    }
}
