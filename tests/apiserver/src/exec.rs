//! `exec`: commands in containers. There are no containers; the test says what a command prints and how it ends.
//!
//! ```text
//!  client ── GET …/pods/NAME/exec?command=…, Upgrade: websocket ──> 101
//!         <── (1) standard output ── (2) standard error ── (3) Status ── close
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::encode;
use crate::link::Line;
use crate::websocket::{CLOSE, binary};

/// The subprotocols that the real server speaks and this one does.
pub(crate) const PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
/// The longest message, as the real server cuts what a command prints.
const PIECE: usize = 32 * 1024;

/// A command that somebody wants to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The node on which the pod runs.
    pub node: String,
    /// The container in it.
    pub container: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Who wants it.
    pub username: String,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executed {
    /// It ran to its end.
    Ended {
        /// What it printed.
        stdout: Vec<u8>,
        /// What it complained.
        stderr: Vec<u8>,
        /// Its exit code.
        code: i32,
    },
    /// It never ran; this is what the kubelet says.
    Failed(String),
}

impl Executed {
    /// What a kubelet says of a container that does not run.
    pub fn no_container(name: &str) -> Self {
        Self::Failed(format!("container not found ({name:?})"))
    }

    /// The Status object that ends the conversation.
    fn status(&self) -> Value {
        match self {
            Self::Ended { code: 0, .. } => json!({"metadata": {}, "status": "Success"}),
            Self::Ended { code, .. } => json!({"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
                "message": format!("command terminated with non-zero exit code: command terminated with exit code {code}"),
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}}),
            Self::Failed(why) => json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
                "message": format!("Internal error occurred: {why}"), "details": {"causes": [{"message": why}]}}),
        }
    }
}

type Run = Arc<dyn Fn(&Exec) -> Executed + Send + Sync>;

/// What runs commands.
#[derive(Default)]
pub(crate) struct Commands(Mutex<Option<Run>>);

impl Commands {
    pub(crate) fn set(&self, run: impl Fn(&Exec) -> Executed + Send + Sync + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(run));
    }

    fn current(&self) -> Option<Run> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs the command once the connection is a WebSocket, and tells the client. What the client says is read, and only its end noticed.
    pub(crate) async fn converse(&self, upgrade: OnUpgrade, line: Arc<Line>, exec: Exec) {
        // A client that went before it was answered has nothing to be told.
        let Ok(upgraded) = upgrade.await else { return };
        let (mut from, to) = tokio::io::split(TokioIo::new(upgraded));
        let run = self.current();
        let talk = async {
            let ran = tokio::task::spawn_blocking(move || match run {
                Some(run) => run(&exec),
                None => Executed::no_container(&exec.container),
            });
            // A panic in the test's closure is the test's, and shows there.
            let executed = ran.await.unwrap_or_else(|error| Executed::Failed(error.to_string()));
            // The client may be gone.
            let _told = tell(to, &executed).await;
        };
        let gone = async {
            let mut ignored = [0; 4096];
            while from.read(&mut ignored).await.is_ok_and(|count| count > 0) {}
        };
        tokio::select! {
            () = talk => {}
            () = gone => {}
            () = line.ended() => {}
        }
    }
}

impl fmt::Debug for Commands {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Commands")
    }
}

async fn tell(mut to: impl AsyncWrite + Unpin, executed: &Executed) -> std::io::Result<()> {
    let message = |channel: u8, text: &[u8]| binary(&[&[channel], text].concat());
    // So the real server tells that the command is on its way.
    to.write_all(&message(1, b"")).await?;
    if let Executed::Ended { stdout, stderr, .. } = executed {
        for (channel, text) in [(1, stdout), (2, stderr)] {
            for piece in text.chunks(PIECE) {
                to.write_all(&message(channel, piece)).await?;
            }
        }
    }
    to.write_all(&message(3, &encode::compact(&executed.status()))).await?;
    to.write_all(&CLOSE).await?;
    to.flush().await?;
    to.shutdown().await
}
