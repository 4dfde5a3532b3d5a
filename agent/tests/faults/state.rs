//! D: the key, the memory, the disk under both, and the clock.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::field::{Field, beside, ends};
use crate::row::{self, Row};
use crate::strace::Failing;

pub(crate) const ROWS: &[Row] = &[
    Row::new(
        "D1/key",
        "the key is away, cut, empty, zero, noise, or open to others",
        key_broken,
    )
    .core(),
    Row::new(
        "D1/memory",
        "the last good directory is away, cut, empty or noise",
        memory_broken,
    ),
    Row::new("D2/full", "the disk is full", disk_full),
    Row::new("D2/read-only", "the disk can only be read", disk_read_only),
    Row::new("D2/sync", "the disk cannot say that it has written", disk_fails_to_sync).needs(row::strace),
    Row::new(
        "D4",
        "the clock jumps ten years ahead, and back, between handshakes",
        clock_jumps,
    )
    .needs(row::a_machine_of_its_own)
    .cuts_the_path(),
];

/// In seconds.
const TEN_YEARS: i64 = 10 * 365 * 24 * 3600;

/// What a key file can be.
enum Broken {
    Away,
    Text(&'static str),
    Mode(u32),
}

/// An agent without its key ends and says so; it never makes another in its place. The data plane has the key and goes on.
fn key_broken(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    let key = node.state().join("key");
    let kept = beside(&key);
    for broken in [
        Broken::Away,
        Broken::Text(""),
        Broken::Text("c2hvcnQ=\n"),
        Broken::Text("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"),
        Broken::Text("%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%\n"),
        Broken::Text("CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"),
        Broken::Mode(0o644),
    ] {
        field.agent("a").kill()?;
        fs::copy(&key, &kept).context("keep the key")?;
        match broken {
            Broken::Away => fs::remove_file(&key)?,
            Broken::Text(text) => fs::write(&key, text)?,
            Broken::Mode(mode) => fs::set_permissions(&key, Permissions::from_mode(mode))?,
        }
        let found = fs::read(&key).ok();

        field.agent("a").restart()?;
        let code = ends(field.agent("a"))?;

        ensure!(code == 1, "the agent ended with {code}");
        let log = node.log_tail(3);
        ensure!(
            log.contains(&key.display().to_string()),
            "it does not name {}:\n{log}",
            key.display()
        );
        ensure!(fs::read(&key).ok() == found, "the agent changed what it refused");
        field.datagrams_pass()?;
        fs::rename(&kept, &key).context("bring the key back")?;
        field.changes_nothing(|field| {
            field.fault();
            field.agent("a").restart()?;
            field.heals()
        })?;
    }
    Ok(())
}

fn memory_broken(field: &mut Field) -> Result<()> {
    let node = field.node("a");
    let memory = node.state().join("directory.json");
    let good = fs::read_to_string(&memory).context("read the last good directory")?;
    let half = good.get(..good.len() / 2).context("half of it")?;
    let changed = good.replacen("10.244.2.0", "10.244.9.0", 1);
    ensure!(changed != good, "no prefix of b in {good}");
    for text in [
        None,
        Some(""),
        Some(half),
        Some("\0\0\0\0"),
        Some("{}"),
        Some(changed.as_str()),
    ] {
        field.agent("a").kill()?;
        match text {
            None => fs::remove_file(&memory)?,
            Some(text) => fs::write(&memory, text)?,
        }
        field.changes_nothing(|field| {
            field.fault();
            field.agent("a").restart()?;
            field.heals()
        })?;
    }
    Ok(())
}

/// A file system of its own under the state of a node, for as long as this lives.
struct Disk(PathBuf);

impl Disk {
    /// Moves what is there onto one of so many KiB. The agent may not be running.
    fn mount(folder: &Path, kib: u32) -> Result<Disk> {
        let kept = beside(folder);
        fs::rename(folder, &kept).with_context(|| format!("keep {}", folder.display()))?;
        fs::create_dir(folder)?;
        let disk = Disk(folder.to_owned());
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("mode=700,size={kib}k"), "tmpfs"],
            folder,
        )?;
        for entry in fs::read_dir(&kept)? {
            let path = entry?.path();
            let name = path.file_name().context("a file has a name")?;
            fs::copy(&path, folder.join(name)).with_context(|| format!("copy {}", path.display()))?;
        }
        Ok(disk)
    }

    fn remount(&self, how: &str) -> Result<()> {
        run("mount", &["-o", &format!("remount,{how}")], &self.0)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: an agent may have the folder open. The lab removes what is below.
        if let Err(error) = run("umount", &["-l"], &self.0) {
            eprintln!("{error:#}");
        }
    }
}

fn run(program: &str, words: &[&str], path: &Path) -> Result<()> {
    let output = Command::new(program)
        .args(words)
        .arg(path)
        .output()
        .with_context(|| format!("start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "`{program} {}` {}: {said}",
        words.join(" "),
        path.display()
    );
    Ok(())
}

/// Puts a's state onto a disk of its own.
fn on_a_disk(field: &mut Field) -> Result<Disk> {
    let state = field.node("a").state();
    field.agent("a").kill()?;
    let disk = Disk::mount(&state, 64)?;
    field.agent("a").restart()?;
    field.fault();
    field.heals()?;
    Ok(disk)
}

/// Writes, besides the nodes' own, a record that announces nothing, so that there is something to remember.
fn somebody_comes(field: &Field, name: &str) -> Result<()> {
    let record = json!({
        "version": 1, "node": name, "addresses": ["172.18.0.77"], "podPrefixes": ["10.244.77.0/24"], "announcement": null,
    });
    fs::write(field.lab.directory().join(format!("{name}.json")), record.to_string()).context("write a record")
}

fn somebody_goes(field: &Field, name: &str) -> Result<()> {
    fs::remove_file(field.lab.directory().join(format!("{name}.json"))).context("remove a record")
}

/// With a disk that takes nothing, the agent says so, works on, and starts again.
fn says_so_and_works(field: &mut Field, name: &str) -> Result<()> {
    somebody_comes(field, name)?;
    field.says("a", "it cannot keep the directory", |status| {
        status.directory_says("directory-not-saved")
    })?;
    field.datagrams_pass()?;
    field.agent("a").kill()?;
    field.agent("a").restart()?;
    field.says("a", "it starts all the same", |status| status.peers.len() == 2)?;
    field.datagrams_pass()
}

fn disk_full(field: &mut Field) -> Result<()> {
    let disk = on_a_disk(field)?;
    let filler = disk.0.join("filler");
    let mut file = File::create(&filler)?;
    while file.write_all(&[7; 512]).is_ok() {}
    drop(file);

    says_so_and_works(field, "x")?;

    fs::remove_file(&filler)?;
    somebody_goes(field, "x")?;
    field.fault();
    field.heals()
}

fn disk_read_only(field: &mut Field) -> Result<()> {
    let disk = on_a_disk(field)?;
    disk.remount("ro")?;

    says_so_and_works(field, "x")?;

    disk.remount("rw")?;
    somebody_goes(field, "x")?;
    field.fault();
    field.heals()
}

fn disk_fails_to_sync(field: &mut Field) -> Result<()> {
    let failing = Failing::start(field.agent("a").pid(), "shroud", "fsync,fdatasync", "error=EIO")?;
    somebody_comes(field, "x")?;
    field.says("a", "it cannot keep the directory", |status| {
        status.directory_says("directory-not-saved")
    })?;
    field.datagrams_pass()?;
    drop(failing);
    somebody_goes(field, "x")?;
    field.fault();
    field.heals()
}

/// Ten years ahead for a while, and back. Sessions are new before, so that none has to be made meanwhile: a handshake in the future bars all
/// earlier ones (WireGuard takes none that is older than the last), which only new keys cure.
fn clock_jumps(field: &mut Field) -> Result<()> {
    for node in &field.lab.nodes {
        let netns = &node.host.netns;
        for peer in netns.check("wg", &["show", &node.device, "peers"])?.lines() {
            netns.check("wg", &["set", &node.device, "peer", peer, "remove"])?;
        }
    }
    field.fault();
    field.heals()?;
    let jump = |seconds: i64| -> Result<()> {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs();
        let then = now.checked_add_signed(seconds).context("a time after 1970")?;
        let output = Command::new("date")
            .args(["-s", &format!("@{then}")])
            .output()
            .context("start date")?;
        ensure!(
            output.status.success(),
            "date: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    for seconds in [TEN_YEARS, -TEN_YEARS, -3600, 3600] {
        jump(seconds)?;
        field.lasts(5);
        field.datagrams_pass()?;
    }
    field.fault();
    field.heals()
}
