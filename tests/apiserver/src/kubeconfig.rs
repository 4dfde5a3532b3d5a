//! The files that lead a client to the server.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A kubeconfig that holds everything itself.
pub(crate) fn embedded(address: SocketAddr, namespace: &str, authority: &str, token: &str) -> String {
    let authority = format!("certificate-authority-data: {}", STANDARD.encode(authority));
    config(address, namespace, &authority, &format!("token: {token}"))
}

/// A kubeconfig that names `ca.crt` and `token` in a folder.
pub(crate) fn referring(address: SocketAddr, namespace: &str, folder: &Path) -> String {
    let path = |name: &str| folder.join(name).display().to_string();
    config(
        address,
        namespace,
        &format!("certificate-authority: {}", path("ca.crt")),
        &format!("tokenFile: {}", path("token")),
    )
}

/// Writes the files of a service account; each appears at once, as kubelet's do.
pub(crate) fn write_credentials(folder: &Path, authority: &str, token: &str, namespace: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make the folder {}", folder.display()))?;
    for (name, content) in [("ca.crt", authority), ("token", token), ("namespace", namespace)] {
        let (path, fresh) = (folder.join(name), folder.join(format!(".{name}.new")));
        fs::write(&fresh, content).with_context(|| format!("write {}", fresh.display()))?;
        fs::rename(&fresh, &path).with_context(|| format!("put {} in place", path.display()))?;
    }
    Ok(())
}

fn config(address: SocketAddr, namespace: &str, authority: &str, credentials: &str) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: test
  cluster:
    server: https://{address}
    {authority}
users:
- name: test
  user:
    {credentials}
contexts:
- name: test
  context: {{cluster: test, user: test, namespace: {namespace}}}
current-context: test
"
    )
}
