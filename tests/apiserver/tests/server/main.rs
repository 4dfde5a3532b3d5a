//! Judges the test API server from outside: over TLS, by a client that knows no Kubernetes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod client;
mod cluster;
mod exec;
mod faults;
mod protocol;
mod recording;
mod replay;
mod scale;
