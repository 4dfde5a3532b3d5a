//! The compiled BPF program, as it is checked in. `ebpf/build.sh` makes it.

use sha2::{Digest as _, Sha256};

/// `gate.o`, aligned as an ELF reader wants it.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!("../gate.o");

/// Names this build of the program in a pin path.
pub(crate) fn fingerprint() -> String {
    Sha256::digest(OBJECT)
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_checked_in_object_was_made_from_these_sources() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let recorded = fs::read_to_string(root.join("gate.o.sources")).unwrap();

        let mut files: Vec<String> = [
            "build.sh",
            "common/Cargo.toml",
            "program/Cargo.lock",
            "program/Cargo.toml",
        ]
        .map(str::to_owned)
        .into();
        files.extend(sources(root, "common/src"));
        files.extend(sources(root, "program/src"));
        files.sort();
        let list: String = files
            .iter()
            .map(|file| {
                format!(
                    "{}  {file}\n",
                    hexadecimal(&Sha256::digest(fs::read(root.join(file)).unwrap()))
                )
            })
            .collect();

        let computed = hexadecimal(&Sha256::digest(list));
        assert_eq!(
            computed,
            recorded.trim(),
            "gate.o is stale: run ebpf/build.sh (make ebpf) and commit gate.o and gate.o.sources"
        );
    }

    fn sources(root: &Path, folder: &str) -> Vec<String> {
        fs::read_dir(root.join(folder))
            .unwrap()
            .map(|file| format!("{folder}/{}", file.unwrap().file_name().into_string().unwrap()))
            .collect()
    }

    fn hexadecimal(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
