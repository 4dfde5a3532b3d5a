//! A Kubernetes API server for tests: it answers as a real one was recorded to answer, and goes wrong when it is told to.
//!
//! [`ApiServer`] is all a test needs; `README.md` shows one. It shares no code with the client, for a server built from the code under
//! test agrees with its mistakes.

mod access;
mod authority;
mod body;
mod clock;
mod context;
mod decode;
mod discovery;
mod encode;
mod exec;
mod fault;
mod fields;
mod identity;
mod journal;
mod kubeconfig;
mod link;
mod list;
mod listen;
mod negotiate;
mod patch;
mod policy;
mod request;
mod resource;
mod review;
mod schema;
mod selector;
mod serve;
mod server;
mod status;
mod store;
mod validate;
mod watch;
mod websocket;
mod write;

pub use access::Grant;
pub use context::{Options, StreamingLists};
pub use exec::{Exec, Executed};
pub use fault::{Answer, Effect, Fault, Requests, WatchEffect};
pub use identity::{Identity, ServiceAccount, User};
pub use journal::Record;
pub use policy::{Action, Check, Policy, Validation};
pub use request::Verb;
pub use server::ApiServer;
