//! Invariant I7: a planted key is found nowhere but in its file.

use anyhow::{Result, ensure};
use shroud_lab::{Agent, AgentOptions, Topology, http};

use crate::mesh::{Mesh, SHROUD};

/// A private key that can be searched for: 32 bytes of a pattern that nothing else has, clamped.
const KEY: [u8; 32] = *b"@anary-canary-canary-canary-canR";

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| (word << 8) | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let sextet = (word >> (18 - 6 * place)) & 63;
            text.push(if place <= chunk.len() {
                char::from(ALPHABET[sextet as usize])
            } else {
                '='
            });
        }
    }
    text
}

#[test]
fn the_private_key_is_found_nowhere_but_in_its_file() -> Result<()> {
    let lab = Topology::new("canary").nodes(2).pods(1).build()?;
    let state = lab.node("a").state();
    std::fs::create_dir_all(&state)?;
    std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let file = state.join("key");
    std::fs::write(&file, format!("{}\n", base64(&KEY)))?;
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let options = AgentOptions {
        log: "trace".to_owned(),
        ..AgentOptions::new(SHROUD)
    };
    let agents = lab
        .nodes
        .iter()
        .map(|node| Agent::start(node, &options))
        .collect::<Result<_>>()?;
    let mesh = Mesh { agents, lab };
    mesh.all_healthy()?;
    mesh.all_flows_work("a0", "b0")?;

    let node = mesh.lab.node("a");
    let mut places = vec![
        (
            "status",
            mesh.agent("a").ask(&["status", "-o", "json"])?.stdout.into_bytes(),
        ),
        (
            "gate",
            mesh.agent("a").ask(&["gate", "-o", "json"])?.stdout.into_bytes(),
        ),
        (
            "config show",
            node.host
                .netns
                .exec(
                    SHROUD,
                    &[
                        "config",
                        "show",
                        &shroud_lab::agent::config_file(node).display().to_string(),
                    ],
                )?
                .stdout
                .into_bytes(),
        ),
        ("metrics", http::get(&node.host.netns, "/metrics")?.body.into_bytes()),
        ("readiness", http::get(&node.host.netns, "/readyz")?.body.into_bytes()),
        ("log", std::fs::read(node.log())?),
        ("public key file", std::fs::read(state.join("key.pub"))?),
    ];
    for folder in [node.runtime(), mesh.lab.directory(), state.clone()] {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() && path != file {
                places.push(("a file", std::fs::read(path)?));
            }
        }
    }
    for pid in node.host.netns.processes() {
        for part in ["cmdline", "environ"] {
            places.push((part, std::fs::read(format!("/proc/{pid}/{part}")).unwrap_or_default()));
        }
    }

    ensure!(found(&std::fs::read(&file)?), "the search itself is blind");
    for (place, bytes) in places {
        ensure!(!found(&bytes), "the private key is in: {place}");
    }
    Ok(())
}

/// Whether the key, in any of the forms it could take, is in the bytes. Its first and last byte change when it is clamped.
fn found(bytes: &[u8]) -> bool {
    let hex: String = KEY[1..31].iter().map(|byte| format!("{byte:02x}")).collect();
    let decimal = KEY[1..31]
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let base64 = base64(&KEY);
    let forms = [
        KEY[1..31].to_vec(),
        hex.clone().into_bytes(),
        hex.to_uppercase().into_bytes(),
        decimal.into_bytes(),
        base64.as_bytes()[4..40].to_vec(),
    ];
    forms
        .iter()
        .any(|form| bytes.windows(form.len()).any(|window| window == form))
}
