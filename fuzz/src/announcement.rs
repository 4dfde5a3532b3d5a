//! What a node says of itself, as it may stand in an annotation or in a file.

use serde_json::Value;
use shroud_keyd::Announcement;

use super::printable;

/// 2^255 - 19, big-endian: the prime of the field that a public key is a number of.
const PRIME: [u8; 32] = {
    let mut bytes = [0xff; 32];
    bytes[0] = 0x7f;
    bytes[31] = 0xed;
    bytes
};

/// Checks that a text is refused in safe words, or is an announcement within its limits that every reader reads alike.
pub fn check(bytes: &[u8]) {
    let announcement = match Announcement::parse(bytes) {
        Ok(announcement) => announcement,
        Err(refusal) => return printable::check(&refusal.to_string()),
    };

    assert!(bytes.len() <= Announcement::MAX_BYTES);
    assert!(announcement.endpoints.len() <= Announcement::MAX_ENDPOINTS);
    assert!(announcement.overlays.len() <= Announcement::MAX_OVERLAYS);
    let mut key = *announcement.public_key.as_bytes();
    key.reverse();
    assert!(key < PRIME, "a second spelling of a key: {announcement:?}");
    assert!(
        announcement
            .endpoints
            .iter()
            .all(|endpoint| endpoint.ip() == endpoint.ip().to_canonical()),
        "a second spelling of an address: {announcement:?}"
    );

    assert_eq!(Announcement::parse(announcement.to_json()), Ok(announcement.clone()));

    // A reader that minds depth and the size of numbers may refuse it; one that takes it must see the same.
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    assert_eq!(value["version"], Announcement::VERSION);
    assert_eq!(value["publicKey"], announcement.public_key.to_string());
    assert_eq!(value["port"], announcement.listen_port.get());
    assert_eq!(value["epoch"], announcement.epoch);
    match announcement.next_key {
        None => assert_eq!(value.get("next"), None),
        Some(next) => {
            assert_eq!(value["next"]["publicKey"], next.public_key.to_string());
            assert_eq!(value["next"]["epoch"], next.epoch);
            assert!(next.epoch > announcement.epoch && next.public_key != announcement.public_key);
        }
    }
    assert_eq!(
        value["endpoints"].as_array().map(Vec::len),
        Some(announcement.endpoints.len())
    );
}
