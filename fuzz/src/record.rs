//! What a source says of one node, as it may stand in a file.

use shroud_keyd::Record;

use super::printable;

/// Checks that a text is refused in safe words, or is a record within its limits that survives being written.
pub fn check(bytes: &[u8]) {
    let record = match Record::parse(bytes) {
        Ok(record) => record,
        Err(refusal) => return printable::check(&refusal.to_string()),
    };

    assert!(bytes.len() <= Record::MAX_BYTES);
    assert!(record.addresses.len() <= Record::MAX_ADDRESSES);
    assert!(record.pod_prefixes.len() <= Record::MAX_POD_PREFIXES);

    // An address may have a shorter spelling than ours, so that a record at the very limit grows beyond it.
    let text = record.to_json();
    if text.len() <= Record::MAX_BYTES {
        assert_eq!(Record::parse(text), Ok(record));
    }
}
