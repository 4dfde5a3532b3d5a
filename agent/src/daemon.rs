//! The composition root: makes every part, wires them together, and waits for the first that ends.
//!
//! ```text
//!  thread "main", tokio                              thread "reconcile", plain
//!   directory  ── Mesh (watch) ──────────────────────> pass: look, plan, gate, tunnel, routing
//!   monitor    ── Kernel ────────────────────────────>   │
//!   server     ── Question ──────────────────────────>   │
//!   publisher  <───────────── Presence (watch) ──────────┤
//!                                                        │
//!  thread "http", tokio                                  │
//!   probes     ── Question ──────────────────────────>   │
//!              <──────────────── Instant (watch) ────────┘
//! ```
//!
//! A part that ends ends the agent, with an error; whoever started it starts it again. Ending never touches the kernel: tunnels, routes and
//! the gate go on without us (invariant I6).

use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use shroud_keyd::{NodeKeys, Telemetry, key};
use shroud_routing::Monitor;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::config::Config;
use crate::directory;
use crate::http;
use crate::reconcile::{Reconciler, Wake, Wiring, wake};
use crate::serve::{self, Question};

/// Wake-ups that wait at most. Where one more finds no room there is a pass at once anyway, and a look at everything within `resync`.
const WAKES: usize = 64;

/// Runs the agent until it is told to end.
///
/// # Errors
/// When a part cannot be made, or ends by itself.
pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    info!(version = env!("CARGO_PKG_VERSION"), node = %config.node, "shroud agent starts");
    make_private_dir(&config.runtime_dir)?;
    let _only_one = take_lock(&config.runtime_dir)?;
    let keys = key::load_or_create(&config.state_dir).context("load this node's keys")?;
    for key in keys.iter() {
        info!(fingerprint = key.public.fingerprint(), epoch = key.epoch, "key");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(live(config, keys))
}

async fn live(config: Config, keys: NodeKeys) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let (wakes, woken) = sync_channel(WAKES);
    let (mesh_sender, mesh) = watch::channel(directory::unknown(&config));
    let (presence_sender, presence) = watch::channel(None);
    let (source_sender, source) = watch::channel(Telemetry::default());
    let (pulse_sender, pulse) = watch::channel(Instant::now());
    let (http_problem, http) = watch::channel(None);
    let (question_sender, questions) = mpsc::channel(16);
    let monitor = Monitor::open().context("subscribe to netlink changes")?;
    let own_port = monitor.ignore();
    let listener = serve::bind(&config.socket()).with_context(|| format!("make {}", config.socket().display()))?;
    let directory = directory::Keeper::new(&config, keys.public(), mesh_sender, source_sender);
    let (listen, stuck_after) = (config.http.listen, http::stuck_after(*config.resync));
    let wiring = Wiring {
        mesh,
        source,
        presence: presence_sender,
        http,
        pulse: pulse_sender,
        own_port,
    };

    let (ended_sender, ended) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new()
        .name("reconcile".to_owned())
        .spawn(move || {
            let _ended = ended_sender;
            // Some handles on the kernel own a runtime, which may not end inside another: they are opened and closed here.
            Reconciler::open(config, keys, wiring)?.run(&woken);
            anyhow::Ok(())
        })
        .context("start the reconcile thread")?;
    let (http_ended_sender, http_ended) = oneshot::channel();
    let sources = http::Sources {
        wakes: wakes.clone(),
        pulse,
        stuck_after,
    };
    let server = http::Server::start(listen, sources, http_problem, http_ended_sender)?;

    let end = tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
        _ = ended => Err(anyhow!("the reconcile thread ended by itself")),
        _ = http_ended => Err(anyhow!("the http thread ended by itself")),
        result = follow(monitor, wakes.clone()) => Err(failed("netlink monitor", result)),
        result = serve::serve(listener, question_sender) => Err(failed("status socket", result.map_err(Into::into))),
        result = pass_on(questions, wakes.clone()) => Err(failed("status questions", result)),
        result = directory.run(presence, wakes.clone()) => Err(failed("directory", result)),
    };
    let http_stopped = server.stop();
    if let Err(TrySendError::Full(stop)) = wakes.try_send(Wake::Stop) {
        // The thread is reading, so there will be room; if it is not, it has ended and this fails at once.
        drop(wakes.send(stop));
    }
    drop(wakes);
    thread.join().map_err(|_| anyhow!("the reconcile thread panicked"))??;
    http_stopped?;
    info!(
        reason = end.as_ref().copied().unwrap_or("a part failed"),
        "shroud agent ends; the data plane stays"
    );
    end.map(|_| ())
}

fn failed(part: &str, result: anyhow::Result<()>) -> anyhow::Error {
    match result {
        Ok(()) => anyhow!("the {part} ended by itself"),
        Err(error) => error.context(format!("the {part} failed")),
    }
}

async fn follow(mut monitor: Monitor, wakes: SyncSender<Wake>) -> anyhow::Result<()> {
    loop {
        monitor.changed().await?;
        wake(&wakes, Wake::Kernel)?;
    }
}

async fn pass_on(mut questions: mpsc::Receiver<Question>, wakes: SyncSender<Wake>) -> anyhow::Result<()> {
    while let Some(Question { request, answer }) = questions.recv().await {
        match wakes.try_send(Wake::Question { request, answer }) {
            Ok(()) => {}
            Err(TrySendError::Full(Wake::Question { answer, .. })) => {
                // Whoever asked may have gone; then nobody misses the answer.
                drop(answer.send(Err("the agent is busy; ask again".to_owned())));
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                return Err(anyhow!("the reconcile thread is gone"));
            }
        }
    }
    Ok(())
}

fn make_private_dir(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("make {}", dir.display()))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("close {}", dir.display()))
}

/// Makes sure that one agent works on this node; a second one, as in a rolling update, waits for the first to end.
fn take_lock(runtime_dir: &Path) -> anyhow::Result<File> {
    let path = runtime_dir.join("agent.lock");
    let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            warn!(lock = %path.display(), "another agent works on this node; waiting for it to end");
            file.lock().with_context(|| format!("wait for {}", path.display()))?;
        }
        Err(std::fs::TryLockError::Error(error)) => {
            return Err(anyhow!(error).context(format!("lock {}", path.display())));
        }
    }
    Ok(file)
}
