//! Requests to the userspace data plane, as any local program with access to its socket may write them.

use shroud_wire::uapi::{Parser, Request};

/// Checks that every request is refused or is one that can be carried out, and that whatever was written, the next request is heard.
pub fn check(bytes: &[u8]) {
    let mut parser = Parser::default();
    for line in bytes.split(|&byte| byte == b'\n') {
        let Some(Ok(Request::Set(set))) = parser.line(line) else {
            continue;
        };
        for peer in &set.peers {
            if let Some(endpoint) = peer.endpoint {
                let address = endpoint.ip();
                assert!(endpoint.port() != 0 && !address.is_unspecified(), "{endpoint}");
                assert!(address == address.to_canonical(), "{endpoint}");
            }
        }
    }

    let _unfinished = parser.line(b"");
    assert!(parser.line(b"get=1").is_none());
    assert!(matches!(parser.line(b""), Some(Ok(Request::Get))));
}
