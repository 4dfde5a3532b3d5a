//! A command in a pod: what it printed, and how it ended. Never decides which command.
//!
//! The API server carries it over a WebSocket in binary messages, whose first byte is a channel (v4.channel.k8s.io and later): 1 is standard
//! output, 2 standard error, and 3 a Status object with which everything is over.

use futures_util::StreamExt as _;
use kube::api::{AttachParams, Request};
use serde::Deserialize;

use super::api::{Api, Failure, LONGEST_MESSAGE, chain};
use crate::FailureKind;
use crate::refusal::Excerpt;

/// How much of what a command prints is read, in bytes: the status of an agent with 5,000 peers is a sixth of it.
const LONGEST_OUTPUT: usize = 32 << 20;

/// What a command printed, and the code with which it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub code: i32,
}

/// A container of a pod.
#[derive(Debug)]
pub(super) struct Container<'a> {
    pub(super) namespace: &'a str,
    pub(super) pod: &'a str,
    pub(super) name: &'a str,
}

/// Runs a command to its end.
pub(super) async fn exec(
    api: &Api,
    attempt: &str,
    container: &Container<'_>,
    command: &[&str],
) -> Result<Output, Failure> {
    let params = AttachParams::default()
        .stdout(true)
        .stderr(true)
        .container(container.name);
    let path = format!("/api/v1/namespaces/{}/pods", container.namespace);
    let request = Request::new(path).exec(container.pod, command.iter().copied(), &params);
    let request = request.map_err(|error| Failure::new(FailureKind::Malformed, attempt, error))?;
    let mut messages = api.upgrade(attempt, request).await?.into_stream();
    let mut channels = Channels::default();
    while let Some(message) = messages.next().await {
        let message = message.map_err(|error| Failure::new(FailureKind::Unreachable, attempt, chain(&error)))?;
        // All others are the WebSocket's own.
        if !message.is_binary() {
            continue;
        }
        let end = channels.take(&message.into_data());
        if let Some(code) = end.map_err(|(kind, why)| Failure::new(kind, attempt, why))? {
            let Channels { stdout, stderr } = channels;
            return Ok(Output { stdout, stderr, code });
        }
    }
    let why = "the connection ended before the command did";
    Err(Failure::new(FailureKind::Unreachable, attempt, why))
}

/// What has come so far.
#[derive(Default)]
struct Channels {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Channels {
    /// Takes a message; answers the exit code once there is one.
    fn take(&mut self, message: &[u8]) -> Result<Option<i32>, (FailureKind, String)> {
        match message.split_first() {
            Some((1, text)) => self.stdout.extend(text),
            Some((2, text)) => self.stderr.extend(text),
            // The server may open a channel with an empty message.
            Some((3, text)) if !text.is_empty() => return ended(text).map(Some),
            _ => {}
        }
        if self.stdout.len() + self.stderr.len() > LONGEST_OUTPUT {
            let why = format!("it printed more than {LONGEST_OUTPUT} bytes");
            return Err((FailureKind::Malformed, why));
        }
        Ok(None)
    }
}

/// The exit code in the Status object that ends a command.
fn ended(text: &[u8]) -> Result<i32, (FailureKind, String)> {
    #[derive(Deserialize)]
    #[serde(default)]
    #[derive(Default)]
    struct Ended {
        status: String,
        message: String,
        details: Details,
    }

    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Details {
        causes: Vec<Cause>,
    }

    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Cause {
        reason: String,
        message: String,
    }

    let malformed = |why: String| (FailureKind::Malformed, why);
    let ended: Ended = serde_json::from_slice(text)
        .map_err(|error| malformed(format!("how the command ended cannot be read: {error}")))?;
    if ended.status == "Success" {
        return Ok(0);
    }
    match ended.details.causes.iter().find(|cause| cause.reason == "ExitCode") {
        Some(cause) => cause
            .message
            .parse()
            .map_err(|_| malformed(format!("{} is no exit code", Excerpt::of(&cause.message)))),
        // It never ran.
        None => {
            let why = Excerpt::up_to(&ended.message, LONGEST_MESSAGE).to_string();
            Err((FailureKind::Server, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_told_apart() {
        let mut channels = Channels::default();

        let taken = ["\u{1}", "\u{1}{\"a\":", "\u{2}oh", "\u{3}", "", "\u{4}x", "\u{1}1}"];
        for message in taken {
            assert_eq!(channels.take(message.as_bytes()), Ok(None));
        }
        let end = channels.take(b"\x03{\"metadata\":{},\"status\":\"Success\"}");

        assert_eq!(end, Ok(Some(0)));
        assert_eq!(
            (channels.stdout, channels.stderr),
            (b"{\"a\":1}".to_vec(), b"oh".to_vec())
        );
    }

    #[test]
    fn an_exit_code_is_an_answer_and_a_command_that_never_ran_is_none() {
        let code = |code: &str| {
            format!(
                r#"{{"status":"Failure","message":"exit {code}","reason":"NonZeroExitCode","details":{{"causes":[{{"reason":"ExitCode","message":"{code}"}}]}}}}"#
            )
        };

        assert_eq!(ended(code("3").as_bytes()), Ok(3));
        let cases = [
            (code("x"), (FailureKind::Malformed, "x is no exit code")),
            (
                r#"{"status":"Failure","message":"container not found","reason":"InternalError"}"#.to_owned(),
                (FailureKind::Server, "container not found"),
            ),
            (
                "7".to_owned(),
                (
                    FailureKind::Malformed,
                    "how the command ended cannot be read: invalid type: integer `7`, expected struct Ended at line 1 column 1",
                ),
            ),
        ];
        for (text, (kind, why)) in cases {
            assert_eq!(ended(text.as_bytes()), Err((kind, why.to_owned())), "{text}");
        }
    }

    #[test]
    fn whoever_prints_without_end_is_not_read_to_the_end() {
        let mut channels = Channels::default();
        let mut message = vec![b'x'; LONGEST_OUTPUT + 1];
        message[0] = 2;

        assert_eq!(channels.take(&message), Ok(None));
        assert!(channels.take(&[1, b'y']).is_err());
    }
}
