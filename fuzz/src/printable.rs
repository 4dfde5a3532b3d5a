//! What may reach a terminal or a log of what a stranger wrote.

/// Checks that a message is printable ASCII, and short enough for one line of a log.
pub fn check(message: &str) {
    assert!(
        message.len() < 1024 && message.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '),
        "{} bytes are not safe to print: {message:?}",
        message.len()
    );
}
