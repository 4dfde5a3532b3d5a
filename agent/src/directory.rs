//! Keeps the directory: feeds it from its source and from the disk, hands snapshots on, and publishes what this node says of itself.
//!
//! The last good directory is on disk, so that a restarted agent knows its peers at once. What the source says afterwards counts; when it
//! says nothing, nothing changes.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::pin::Pin;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use shroud_keyd::announcement::Backend;
use shroud_keyd::directory::{Origin, Own};
use shroud_keyd::kubernetes::{self, Wanted};
use shroud_keyd::{
    Announcement, Directory, Event, FailureKind, Local, Memory, PublicKeys, Record, Telemetry, cache, file,
};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{info, warn};

use crate::check::{Check, Problem};
use crate::config::{self, Config, DirectoryFile, DirectoryKubernetes};
use crate::reconcile::{Mesh, Presence, Wake, wake};
use crate::status::DirectoryStatus;

/// What a source may have said before somebody takes it in.
const EVENTS: usize = 256;
/// How much longer than a write of the last good directory took the next one waits, so that a large directory on a slow disk costs a
/// twentieth of our time at most.
const SAVING_SHARE: u32 = 20;
/// How long a disk that took nothing is left alone.
const SAVE_AGAIN: Duration = Duration::from_secs(2);

/// The directory, and where its snapshots go.
pub(crate) struct Keeper {
    config: Config,
    directory: Directory,
    /// What was last written to the cache, and when the next may be.
    saved: Memory,
    next_save: Instant,
    mesh: watch::Sender<Mesh>,
    /// How the source fares, as it says itself or, of a folder, as is seen here.
    telemetry: watch::Sender<Telemetry>,
    /// What the source cannot do right now.
    source_problem: Option<String>,
    /// What the disk could not do.
    cache_problem: Option<String>,
    /// Why what this node says of itself is not out.
    publish_problem: Option<String>,
}

/// A source at work.
struct Feed {
    events: mpsc::Receiver<Event>,
    publisher: Publisher,
    /// The source's own work, where it is to be done here. It never ends.
    work: Pin<Box<dyn Future<Output = ()>>>,
}

/// How what this node says of itself gets out.
enum Publisher {
    /// By writing a file.
    File(DirectoryFile),
    /// By telling the source what is to be on the Node.
    Kubernetes(watch::Sender<Wanted>),
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
    match &config.directory {
        config::Directory::File(DirectoryFile { path, .. }) => format!("file {}", path.display()),
        config::Directory::Kubernetes(DirectoryKubernetes { kubeconfig: None, .. }) => "kubernetes".to_owned(),
        config::Directory::Kubernetes(DirectoryKubernetes {
            kubeconfig: Some(path), ..
        }) => format!("kubernetes {}", path.display()),
    }
}

impl Keeper {
    /// Makes an empty directory that knows this node, and takes up what the disk remembers.
    pub(crate) fn new(
        config: &Config,
        keys: PublicKeys,
        mesh: watch::Sender<Mesh>,
        telemetry: watch::Sender<Telemetry>,
    ) -> Self {
        let local = Local {
            node: config.node.clone(),
            keys,
            pod_prefixes: (!config.pod_prefixes.is_empty()).then(|| config.pod_prefixes.clone()),
        };
        let mut keeper = Self {
            config: config.clone(),
            directory: Directory::new(local, config.protected.clone()),
            saved: Memory::default(),
            next_save: Instant::now(),
            mesh,
            telemetry,
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

    /// Follows the source, and publishes what this node says of itself whenever it changes. Ends only by an error.
    pub(crate) async fn run(
        mut self,
        mut presence: watch::Receiver<Option<Presence>>,
        wakes: SyncSender<Wake>,
    ) -> anyhow::Result<()> {
        let Feed {
            mut events,
            publisher,
            mut work,
        } = self.feed()?;
        let mut telemetry = self.telemetry.subscribe();
        let mut unsaved = false;
        loop {
            tokio::select! {
                event = events.recv() => {
                    let mut row = vec![event.context("whoever follows the directory's source ended")?];
                    row.extend(std::iter::from_fn(|| events.try_recv().ok()));
                    row.iter().for_each(|event| self.note(event));
                    unsaved |= self.directory.take(row);
                }
                changed = presence.changed() => changed.context("the reconcile thread is gone")?,
                Ok(()) = telemetry.changed() => {}
                () = sleep_until(self.next_save.into()), if unsaved => {}
                () = &mut work => anyhow::bail!("the directory's source ended by itself"),
            }
            let known = presence.borrow_and_update().clone();
            if let Some(presence) = &known {
                self.directory.set_own_keys(presence.keys);
            }
            if let Some(presence) = known.filter(|presence| !presence.addresses.is_empty()) {
                self.publish(&publisher, &presence);
            }
            if unsaved && Instant::now() >= self.next_save {
                unsaved = !self.save();
            }
            if self.tell() {
                wake(&wakes, Wake::Mesh)?;
            }
        }
    }

    /// Opens the configured source.
    fn feed(&self) -> anyhow::Result<Feed> {
        match &self.config.directory {
            config::Directory::File(folder) => {
                let source = file::Source::new(&folder.path).context("follow the directory's folder")?;
                let (events, _thread) = source.spawn().context("follow the directory's folder")?;
                Ok(Feed {
                    events,
                    publisher: Publisher::File(folder.clone()),
                    work: Box::pin(std::future::pending()),
                })
            }
            config::Directory::Kubernetes(cluster) => {
                let options = kubernetes::Options {
                    node: self.config.node.clone(),
                    kubeconfig: cluster.kubeconfig.clone(),
                    deny_list: cluster.deny_list.clone(),
                    opt_out: self.config.encrypt.opt_out,
                    watch_idle: *cluster.watch_idle,
                    bridged: self.directory.snapshot().is_some(),
                };
                let (sender, events) = mpsc::channel(EVENTS);
                let (publisher, wanted) = watch::channel(Wanted::default());
                let telemetry = self.telemetry.clone();
                Ok(Feed {
                    events,
                    publisher: Publisher::Kubernetes(publisher),
                    work: Box::pin(kubernetes::run(options, sender, wanted, telemetry)),
                })
            }
        }
    }

    /// Whether the source is a folder, which counts nothing by itself.
    fn follows_a_folder(&self) -> bool {
        matches!(self.config.directory, config::Directory::File(_))
    }

    /// Takes note of how the source fares.
    fn note(&mut self, event: &Event) {
        match event {
            Event::Listed(_) => {
                if self.follows_a_folder() {
                    self.telemetry.send_modify(|telemetry| telemetry.lists += 1);
                }
                self.source_problem = None;
            }
            Event::Silent(problem) => {
                if self.follows_a_folder() {
                    self.telemetry
                        .send_modify(|telemetry| telemetry.count(FailureKind::Folder));
                }
                if self.source_problem.as_ref() != Some(problem) {
                    warn!(problem, "the directory's source is silent; what is known stays");
                }
                self.source_problem = Some(problem.clone());
            }
            Event::Answers => {
                info!("the directory's source answers again");
                self.source_problem = None;
            }
            Event::Applied(_) | Event::Deleted(_) | Event::Denied(_) | Event::OptedOut(_) => {}
        }
    }

    /// Gets out what this node says of itself, if it differs from what is there, so that what somebody removed comes back. While a folder
    /// is away nothing is written: it might be the empty place below a mount.
    fn publish(&mut self, publisher: &Publisher, presence: &Presence) {
        match publisher {
            Publisher::File(folder) => {
                if self.source_problem.is_some() || !folder.publish {
                    return;
                }
                let record = record(&self.config, presence);
                self.publish_problem = match file::publish(&folder.path, &record) {
                    Ok(_) => None,
                    Err(error) => {
                        let problem = format!("{:#}", anyhow::Error::new(error));
                        warn!(problem, "cannot publish this node's record");
                        Some(problem)
                    }
                };
            }
            Publisher::Kubernetes(publisher) => {
                let snapshot = self.directory.snapshot();
                let own = snapshot.as_ref().map(|snapshot| snapshot.own.clone());
                let addresses = believed(presence, &own.unwrap_or_default());
                let complaints = snapshot.filter(|snapshot| snapshot.origin == Origin::Source);
                let wanted = Wanted {
                    announcement: Some(announcement(&self.config, presence, addresses).to_json()),
                    network_available: presence.attaches_pods,
                    complaints: complaints
                        .map(|snapshot| kubernetes::complaints(&snapshot, &self.config.node))
                        .unwrap_or_default(),
                };
                publisher.send_if_modified(|known| {
                    let differs = *known != wanted;
                    *known = wanted;
                    differs
                });
            }
        }
    }

    /// Keeps what the next run should remember. Answers whether the disk has it; where it does not, it is tried again soon.
    fn save(&mut self) -> bool {
        let begun = Instant::now();
        let memory = self.directory.memory();
        let saved = if memory == self.saved {
            Ok(())
        } else {
            cache::save(&self.config.state_dir, &memory)
        };
        let pause = begun.elapsed() * SAVING_SHARE;
        match saved {
            Ok(()) => {
                self.saved = memory;
                self.cache_problem = None;
                self.next_save = Instant::now() + pause;
                true
            }
            Err(error) => {
                self.cache_problem = Some(format!("{:#}", anyhow::Error::new(error)));
                self.next_save = Instant::now() + pause.max(SAVE_AGAIN);
                false
            }
        }
    }

    /// Hands the snapshot on, and answers whether it says anything new.
    fn tell(&mut self) -> bool {
        let snapshot = self.directory.snapshot();
        let state = match snapshot.as_ref().map(|snapshot| snapshot.origin) {
            None => "waiting",
            Some(Origin::Cache) => "cached",
            Some(Origin::Source) => "live",
        };
        let telemetry = self.telemetry.borrow();
        let own = [
            (Check::DirectorySilent, &self.source_problem),
            (Check::DirectoryNotSaved, &self.cache_problem),
            (Check::DirectoryNotPublished, &self.publish_problem),
            (Check::DirectoryNotPublished, &telemetry.unpublished),
            (Check::DenyListUnknown, &telemetry.no_deny_list),
            (Check::OptOutsUnknown, &telemetry.no_opt_outs),
            (Check::TokenTooMighty, &telemetry.mighty_token),
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

/// The addresses that others will believe: those the directory has of this node too, or all while it has none.
fn believed(presence: &Presence, own: &Own) -> Vec<IpAddr> {
    let listed = own
        .addresses
        .iter()
        .filter(|address| presence.addresses.contains(*address));
    let listed: Vec<IpAddr> = listed.copied().collect();
    if listed.is_empty() {
        presence.addresses.iter().copied().collect()
    } else {
        listed
    }
}

/// What this node says of itself, and in a folder also what an authority would.
fn record(config: &Config, presence: &Presence) -> Record {
    let addresses: Vec<IpAddr> = presence.addresses.iter().copied().collect();
    Record {
        node: config.node.clone(),
        addresses: addresses.clone(),
        pod_prefixes: config.pod_prefixes.iter().copied().collect(),
        zone: None,
        announcement: Some(announcement(config, presence, addresses).to_json()),
    }
}

fn announcement(config: &Config, presence: &Presence, addresses: Vec<IpAddr>) -> Announcement {
    let listen_port = NonZeroU16::new(config.encryption.listen_port).expect("checked when the configuration was read");
    let endpoints = addresses
        .into_iter()
        .take(Announcement::MAX_ENDPOINTS)
        .map(|address| SocketAddr::new(address, listen_port.get()));
    Announcement {
        public_key: presence.keys.current.public_key,
        listen_port,
        endpoints: endpoints.collect(),
        epoch: presence.keys.current.epoch,
        next_key: presence.keys.next,
        backend: match presence.backend {
            shroud_tunnel::Backend::Kernel => Backend::Kernel,
            shroud_tunnel::Backend::Userspace => Backend::Userspace,
        },
        mode: presence.mode,
        overlays: presence.overlays.clone(),
        routable: config.routing.routable,
        encrypts_nodes: config.encrypt.nodes,
        scope: config.encrypt.scope,
    }
}
