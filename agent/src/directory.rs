//! Keeps the directory: feeds it from its source and from the disk, hands snapshots on, and publishes this node's own record.
//!
//! The last good directory is on disk, so that a restarted agent knows its peers at once. What the source says afterwards counts; when it
//! says nothing, nothing changes.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::mpsc::SyncSender;

use anyhow::Context as _;
use shroud_keyd::announcement::Backend;
use shroud_keyd::file::{self, Event, Source};
use shroud_keyd::{Announcement, Directory, Local, Memory, Record, cache};
use shroud_model::PublicKey;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::check::{Check, Problem};
use crate::config::Config;
use crate::reconcile::{Mesh, Presence, Wake, wake};
use crate::status::DirectoryStatus;

/// The directory, its source, and where its snapshots go.
pub(crate) struct Keeper {
    config: Config,
    public_key: PublicKey,
    directory: Directory,
    /// What was last written to the cache.
    saved: Memory,
    mesh: watch::Sender<Mesh>,
    /// What the source cannot do right now.
    source_problem: Option<String>,
    /// What the disk could not do.
    cache_problem: Option<String>,
    /// Why this node's own record is not out.
    publish_problem: Option<String>,
}

/// The mesh before anything is known of it.
pub(crate) fn unknown(config: &Config) -> Mesh {
    Mesh {
        snapshot: None,
        directory: DirectoryStatus {
            source: source_name(config),
            state: "waiting".to_owned(),
            problems: Vec::new(),
        },
    }
}

fn source_name(config: &Config) -> String {
    format!("file {}", config.directory.file.path.display())
}

impl Keeper {
    /// Makes an empty directory that knows this node, and takes up what the disk remembers.
    pub(crate) fn new(config: &Config, public_key: PublicKey, mesh: watch::Sender<Mesh>) -> Self {
        let local = Local {
            node: config.node.clone(),
            public_key,
            pod_prefixes: Some(config.pod_prefixes.clone()),
        };
        let mut keeper = Self {
            config: config.clone(),
            public_key,
            directory: Directory::new(local, config.protected.clone()),
            saved: Memory::default(),
            mesh,
            source_problem: None,
            cache_problem: None,
            publish_problem: None,
        };
        match cache::load(&config.state_dir) {
            Ok(Some(memory)) => {
                info!(nodes = memory.records.len(), "starting from the last good directory");
                keeper.directory.restore(memory.clone());
                keeper.saved = memory;
            }
            Ok(None) => {}
            Err(error) => {
                warn!(
                    error = format!("{:#}", anyhow::Error::new(error)),
                    "starting without the last good directory"
                );
            }
        }
        keeper.tell();
        keeper
    }

    /// Follows the source, and publishes this node's record whenever it changes. Ends only by an error.
    pub(crate) async fn run(
        mut self,
        mut presence: watch::Receiver<Option<Presence>>,
        wakes: SyncSender<Wake>,
    ) -> anyhow::Result<()> {
        let source = Source::new(&self.config.directory.file.path).context("follow the directory's folder")?;
        let (mut events, _thread) = source.spawn().context("follow the directory's folder")?;
        loop {
            tokio::select! {
                event = events.recv() => self.take(event.context("the thread that follows the folder ended")?),
                changed = presence.changed() => changed.context("the reconcile thread is gone")?,
            }
            let known = presence.borrow_and_update().clone();
            if let Some(presence) = known.filter(|presence| !presence.addresses.is_empty()) {
                self.publish(&presence);
            }
            self.save();
            if self.tell() {
                wake(&wakes)?;
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Listed(list) => {
                self.source_problem = None;
                self.directory.reset(list);
            }
            Event::Problem(problem) => {
                if self.source_problem.as_deref() != Some(&problem) {
                    warn!(problem, "the directory's source is silent; what is known stays");
                }
                self.source_problem = Some(problem);
            }
        }
    }

    /// Writes this node's record into the folder, if it differs from what is there, so that a record somebody removed comes back. While
    /// the folder is away nothing is written: it might be the empty place below a mount.
    fn publish(&mut self, presence: &Presence) {
        if self.source_problem.is_some() || !self.config.directory.file.publish {
            return;
        }
        let record = record(&self.config, self.public_key, presence);
        self.publish_problem = match file::publish(&self.config.directory.file.path, &record) {
            Ok(_) => None,
            Err(error) => {
                let problem = format!("{:#}", anyhow::Error::new(error));
                warn!(problem, "cannot publish this node's record");
                Some(problem)
            }
        };
    }

    /// Keeps what the next run should remember.
    fn save(&mut self) {
        let memory = self.directory.memory();
        if memory == self.saved {
            return;
        }
        self.cache_problem = match cache::save(&self.config.state_dir, &memory) {
            Ok(()) => {
                self.saved = memory;
                None
            }
            Err(error) => Some(format!("{:#}", anyhow::Error::new(error))),
        };
    }

    /// Hands the snapshot on, and answers whether it says anything new.
    fn tell(&mut self) -> bool {
        let snapshot = self.directory.snapshot();
        let state = match snapshot.as_ref().map(|snapshot| snapshot.origin) {
            None => "waiting",
            Some(shroud_keyd::directory::Origin::Cache) => "cached",
            Some(shroud_keyd::directory::Origin::Source) => "live",
        };
        let own = [
            (Check::DirectorySilent, &self.source_problem),
            (Check::DirectoryNotSaved, &self.cache_problem),
            (Check::DirectoryNotPublished, &self.publish_problem),
        ];
        let own = own
            .into_iter()
            .filter_map(|(check, problem)| Some(check.says(problem.as_ref()?)));
        let doubts = snapshot.iter().flat_map(|snapshot| &snapshot.problems);
        let problems: Vec<Problem> = own
            .chain(doubts.map(|doubt| Check::DirectoryDoubtful.says(doubt.to_string())))
            .collect();
        let directory = DirectoryStatus {
            source: source_name(&self.config),
            state: state.to_owned(),
            problems,
        };
        self.mesh.send_if_modified(|mesh| {
            let differs = mesh.snapshot != snapshot || mesh.directory != directory;
            *mesh = Mesh { snapshot, directory };
            differs
        })
    }
}

/// What this node says of itself.
fn record(config: &Config, public_key: PublicKey, presence: &Presence) -> Record {
    let listen_port = NonZeroU16::new(config.encryption.listen_port).expect("checked when the configuration was read");
    let endpoints = presence
        .addresses
        .iter()
        .take(Announcement::MAX_ENDPOINTS)
        .map(|address| SocketAddr::new(*address, listen_port.get()));
    let announcement = Announcement {
        public_key,
        listen_port,
        endpoints: endpoints.collect(),
        epoch: 1,
        backend: match presence.backend {
            shroud_tunnel::Backend::Kernel => Backend::Kernel,
            shroud_tunnel::Backend::Userspace => Backend::Userspace,
        },
        mode: presence.mode,
        overlays: presence.overlays.clone(),
        routable: config.routing.routable,
        encrypts_nodes: config.encrypt.nodes,
    };
    Record {
        node: config.node.clone(),
        addresses: presence.addresses.iter().copied().collect(),
        pod_prefixes: config.pod_prefixes.iter().copied().collect(),
        announcement: Some(announcement.to_json()),
    }
}
