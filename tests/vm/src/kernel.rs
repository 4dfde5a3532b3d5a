//! An unpacked kernel package: the kernel itself, and its modules in the order in which they can be loaded.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// A kernel and where its modules lie.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// What the user calls it, e.g. `6.12`.
    pub name: String,
    /// What it calls itself, as in `uname -r`.
    pub release: String,
    /// The file to boot.
    pub image: PathBuf,
    modules: Vec<PathBuf>,
}

/// A kernel module, ready to load.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name with underscores.
    pub name: String,
    /// The ELF object.
    pub content: Vec<u8>,
}

impl Kernel {
    /// Finds the kernel that a package left unpacked in `folder` (`boot/vmlinuz-*` and `lib/modules/*`).
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn find(folder: &Path, name: &str) -> Result<Self> {
        let boot = folder.join("boot");
        let images: Vec<PathBuf> = files_below(&boot)
            .with_context(|| {
                format!(
                    "look for a kernel in {}; scripts/test-vm.sh puts it there",
                    boot.display()
                )
            })?
            .into_iter()
            .filter(|path| file_name(path).starts_with("vmlinuz-"))
            .collect();
        ensure!(
            images.len() == 1,
            "want one kernel in {}, found {images:?}",
            boot.display()
        );
        let image = images[0].clone();
        let release = file_name(&image).trim_start_matches("vmlinuz-").to_owned();
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|path| folder.join(path).join(&release).join("kernel"))
            .into_iter()
            .find(|path| path.is_dir())
            .with_context(|| format!("{} has no modules for {release}", folder.display()))?;
        Ok(Self {
            name: name.to_owned(),
            release,
            image,
            modules: files_below(&modules)?,
        })
    }

    /// The modules of these names and all they depend on, each after its dependencies. A name that this kernel has no module for is left
    /// out: it is built in, or younger than the kernel.
    ///
    /// # Errors
    /// When a module cannot be read.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.add_module(name, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn add_module(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<()> {
        let name = name.replace('-', "_");
        if !seen.insert(name.clone()) {
            return Ok(());
        }
        let matches = |path: &&PathBuf| {
            let stem = file_name(path).split(".ko").next().unwrap_or_default();
            stem.replace('-', "_") == name
        };
        let Some(path) = self.modules.iter().find(matches) else {
            return Ok(());
        };
        let content = read_module(path)?;
        for dependency in dependencies(&content) {
            self.add_module(&dependency, seen, order)?;
        }
        order.push(Module { name, content });
        Ok(())
    }
}

/// The ELF object of a `.ko` or `.ko.xz` file.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let content = if path.extension().is_some_and(|extension| extension == "xz") {
        let mut xz = Command::new("xz");
        xz.args(["--decompress", "--stdout"]).arg(path).stderr(Stdio::inherit());
        let output = xz.output().context("start xz (apt-get install xz-utils)")?;
        ensure!(output.status.success(), "{xz:?}: {}", output.status);
        output.stdout
    } else {
        fs::read(path).with_context(|| format!("read {}", path.display()))?
    };
    ensure!(content.starts_with(b"\x7fELF"), "{} is no ELF object", path.display());
    Ok(content)
}

/// What the module says it needs, in the words of `modinfo`: `depends=udp_tunnel,libchacha20poly1305`.
fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = module[at + key.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry.with_context(|| format!("list {}", folder.display()))?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_modules_own_words() {
        let module = b"\x7fELF...license=GPL\0depends=udp_tunnel,libchacha20poly1305\0retpoline=Y\0";
        let alone = b"\x7fELF...license=GPL\0depends=\0retpoline=Y\0";

        assert_eq!(dependencies(module), ["udp_tunnel", "libchacha20poly1305"]);
        assert_eq!(dependencies(alone), [] as [&str; 0]);
    }
}
