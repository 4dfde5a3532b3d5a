//! B: the directory is away, broken, empty or halved. Silence and nonsense remove nobody: not one change is made to any kernel.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use shroud_apiserver::{Answer, Effect, Fault, Requests, WatchEffect};
use shroud_lab::{Status, eventually};

use crate::field::Field;
use crate::row::Row;

/// How long an agent may need to follow a cluster again: it waits up to half a minute between two complete lists, and between two tries.
const LISTS: u64 = 60;

pub(crate) const ROWS: &[Row] = &[
    Row::new(
        "B1/folder",
        "the folder is away, and an agent is started meanwhile",
        folder_away,
    )
    .core(),
    Row::new(
        "B1/cluster",
        "the API server is away, and an agent is started meanwhile",
        server_away,
    )
    .in_a_cluster()
    .heals_within(LISTS),
    Row::new(
        "B3/folder",
        "records are cut, empty, noise, links, or speak for others",
        records_broken,
    ),
    Row::new(
        "B3/cluster",
        "watches and lists are cut, noise, refused or late",
        answers_broken,
    )
    .in_a_cluster()
    .heals_within(LISTS),
    Row::new("B6/folder", "the folder is emptied, and halved", folder_emptied),
    Row::new("B6/cluster", "the list of nodes is empty", list_emptied)
        .in_a_cluster()
        .heals_within(LISTS),
];

/// Whether an agent lives from what it knows while its source is silent.
fn is_silent(status: &Status) -> bool {
    status.directory_says("directory-silent") && status.peers.len() == 2
}

/// While the source is away all say that it is silent, and an agent that starts meanwhile lives from memory.
fn lives_from_memory(field: &mut Field, silent: &str) -> Result<()> {
    for name in ["a", "b", "c"] {
        field.says(name, silent, is_silent)?;
    }
    field.agent("b").kill()?;
    field.agent("b").restart()?;
    field.says("b", "it lives from memory", |status| {
        is_silent(status) && status.raw["directory"]["state"] == "cached"
    })?;
    field.lasts(12);
    field.datagrams_pass()
}

fn folder_away(field: &mut Field) -> Result<()> {
    let folder = field.lab.directory();
    let away = folder.with_extension("away");
    field.changes_nothing(|field| {
        fs::rename(&folder, &away).context("take the folder away")?;
        lives_from_memory(field, "the folder is silent")?;
        fs::rename(&away, &folder).context("bring the folder back")?;
        field.fault();
        field.heals()
    })
}

fn server_away(field: &mut Field) -> Result<()> {
    field.changes_nothing(|field| {
        let server = &field.cluster()?.server;
        server.refuse()?;
        server.cut_connections();
        lives_from_memory(field, "the API server is silent")?;
        field.cluster()?.server.accept()?;
        field.fault();
        field.heals()
    })
}

/// What a folder may have of nodes that mean no good, or a disk that does.
fn records_broken(field: &mut Field) -> Result<()> {
    let folder = field.lab.directory();
    let record = fs::read_to_string(folder.join("b.json")).context("read b's record")?;
    let half = record.get(..record.len() / 2).context("half of b's record")?;
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    let large = format!("{record}{}", " ".repeat(70_000));
    let nonsense: [&[u8]; 7] = [
        half.as_bytes(),
        b"",
        b"\0\xff\xfe{",
        b"null",
        b"{\"version\":99}",
        deep.as_bytes(),
        large.as_bytes(),
    ];
    field.changes_nothing(|field| {
        for bytes in nonsense {
            for name in ["b.json", "x.json"] {
                fs::write(folder.join(name), bytes)?;
            }
            std::thread::sleep(Duration::from_millis(700));
        }
        // Twice the same node, a link, a folder, and one that nobody may expect.
        fs::write(folder.join("y.json"), &record)?;
        std::os::unix::fs::symlink("/etc/passwd", folder.join("z.json"))?;
        fs::create_dir(folder.join("w.json"))?;
        // At once, for a node whose record is not there has left.
        std::os::unix::fs::symlink("b.json", folder.join("c.link"))?;
        fs::rename(folder.join("c.link"), folder.join("c.json"))?;
        field.lasts(3);
        field.datagrams_pass()?;
        for name in ["x.json", "y.json", "z.json"] {
            fs::remove_file(folder.join(name)).with_context(|| format!("remove {name}"))?;
        }
        fs::remove_dir(folder.join("w.json"))?;
        field.fault();
        field.heals()
    })
}

fn answers_broken(field: &mut Field) -> Result<()> {
    let watches = || Requests::watches("nodes");
    let event = |kind: &str, object: Value| json!({ "type": kind, "object": object }).to_string().into_bytes();
    let bookmark = json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "resourceVersion": "1" } });
    let stranger =
        json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "name": "nobody", "resourceVersion": "7" } });
    let faults = [
        Fault::watch(WatchEffect::Line(b"\x00\xff{\"type\":".to_vec())),
        Fault::watch(WatchEffect::Line(event("DELETED", stranger.clone()))),
        Fault::watch(WatchEffect::Line(event("MODIFIED", json!({ "kind": "Node" })))),
        Fault::watch(WatchEffect::Line(event("BOOKMARK", bookmark))),
        Fault::watch(WatchEffect::Cut),
        Fault::watch(WatchEffect::Reset),
        Fault::watch(WatchEffect::error(500, "InternalError", "no")),
        Fault::new(Effect::TruncateBody).on(watches()),
        Fault::new(Effect::CutBody).on(watches()),
        Fault::new(Effect::Hang).on(watches()),
        Fault::answer(Answer::too_many_requests(1)).on(watches()),
        Fault::answer(Answer::unauthorized()).on(watches()),
        Fault::answer(Answer::unavailable()).on(watches()),
    ];
    field.changes_nothing(|field| {
        for fault in faults {
            let server = &field.cluster()?.server;
            server.fault(fault.times(3));
            server.fault(Fault::watch(WatchEffect::End).on(watches()).times(3));
            std::thread::sleep(Duration::from_millis(700));
        }
        field.datagrams_pass()?;
        field.cluster()?.server.clear_faults();
        field.fault();
        field.heals()
    })
}

/// An accident with the folder: what is gone at one look and back at the next was never gone. (Agents write their own records at once.)
fn folder_emptied(field: &mut Field) -> Result<()> {
    let folder = field.lab.directory();
    let files: Vec<PathBuf> = ["a", "b", "c"].map(|name| folder.join(format!("{name}.json"))).into();
    let records = files.iter().map(fs::read).collect::<Result<Vec<_>, _>>()?;
    field.changes_nothing(|field| {
        for gone in [&files[..], &files[1..]] {
            // Nobody writes anew what an agent that does not live would have to write.
            for name in ["b", "c"] {
                field.agent(name).kill()?;
            }
            for file in gone {
                // Its owner may be writing it at this very moment.
                fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
            }
            field.says("a", "it believes no such list at once", |status| {
                status.peers.len() == 2 && status.directory_says("directory-doubtful")
            })?;
            for (file, record) in files.iter().zip(&records) {
                fs::write(file, record)?;
            }
            for name in ["b", "c"] {
                field.agent(name).restart()?;
            }
            field.fault();
            field.heals()?;
        }
        Ok(())
    })
}

/// As after a restore of an old backup: Nodes are gone, and no watch tells of it.
fn list_emptied(field: &mut Field) -> Result<()> {
    field.changes_nothing(|field| {
        let server = &field.cluster()?.server;
        server.refuse()?;
        server.cut_connections();
        eventually("nobody watches", Duration::from_secs(5), || {
            match server.connections() {
                0 => Ok(()),
                open => Err(format!("{open} connections")),
            }
        })?;
        let objects = server.list("nodes")?;
        for name in ["a", "b", "c"] {
            server.delete("nodes", "", name)?;
        }
        server.compact();
        server.accept()?;
        eventually("a's brake is told", Duration::from_secs(70), || {
            let status = field.agents[0].status().map_err(|error| format!("{error:#}"))?;
            if status.peers.len() == 2 && status.directory_says("directory-doubtful") {
                Ok(())
            } else {
                Err(format!("{} peers, {}", status.peers.len(), status.raw["directory"]))
            }
        })?;
        let server = &field.cluster()?.server;
        for object in objects {
            let metadata =
                json!({ "name": object["metadata"]["name"], "annotations": object["metadata"]["annotations"] });
            let (spec, status) = (&object["spec"], &object["status"]);
            server.put(
                json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec, "status": status }),
            )?;
        }
        field.fault();
        field.heals()
    })
}
