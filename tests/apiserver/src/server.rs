//! The server as a test holds it: it starts, changes objects as kubelets, controllers and admins do, makes things go wrong, and tells what
//! was asked. It stops when it is dropped.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, PoisonError};

use anyhow::{Context as _, Result, anyhow};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::access::Grant;
use crate::authority::Authority;
use crate::context::{Context, Options};
use crate::exec::{Exec, Executed};
use crate::fault::Fault;
use crate::identity::{Identity, User};
use crate::journal::Record;
use crate::kubeconfig;
use crate::listen::Listeners;
use crate::policy::Policy;
use crate::request::Verb;
use crate::resource::Resource;
use crate::status::Refusal;
use crate::store::{Key, State};
use crate::write::{Patch, Preconditions, Writer};

/// A running API server.
#[derive(Debug)]
pub struct ApiServer {
    context: Arc<Context>,
    listeners: Listeners,
    /// Emptied when the server is dropped.
    runtime: Option<Runtime>,
}

impl ApiServer {
    /// Serves on these sockets, which may have been made in any network namespace.
    ///
    /// # Errors
    ///
    /// When the server's certificate cannot be made, or a socket cannot be used.
    pub fn start(sockets: Vec<TcpListener>, options: Options) -> Result<Self> {
        let addresses = sockets
            .iter()
            .map(|socket| Ok(socket.local_addr()?.ip()))
            .collect::<Result<Vec<_>>>()?;
        let authority = Authority::new(&addresses, options.http2)?;
        let context = Arc::new(Context::new(options));
        let listeners = Listeners::new(sockets, authority, context.clone())?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("apiserver")
            .enable_all()
            .build()
            .context("start the threads of the API server")?;
        let server = Self {
            context,
            listeners,
            runtime: Some(runtime),
        };
        for name in ["default", "kube-system", &server.context.options.account.namespace] {
            server.put(serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))?;
        }
        server.accept()?;
        Ok(server)
    }

    /// Serves on a free port of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn local(options: Options) -> Result<Self> {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port on 127.0.0.1")?;
        Self::start(vec![socket], options)
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        self.listeners.addresses()
    }

    // Objects, as everybody else in a cluster changes them.

    /// Creates or replaces an object, its status included.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or has no such kind.
    pub fn put(&self, object: Value) -> Result<Value> {
        let resource =
            Resource::of(&object).with_context(|| format!("put {} {}", object["apiVersion"], object["kind"]))?;
        let key = Key::of(&object);
        let exists = self.context.store.read().object(resource, &key).is_some();
        if !exists {
            return self.write(resource, "", |writer, state| {
                let created = writer.create(state, &key.namespace, object)?;
                Ok(created.answer)
            });
        }
        if resource.has_status && !object["status"].is_null() {
            let status = object.clone();
            self.write(resource, "status", |writer, state| replace(writer, state, &key, status))?;
        }
        self.write(resource, "", |writer, state| replace(writer, state, &key, object))
    }

    /// Changes an object by a merge patch (RFC 7386); `status` in it goes to the status.
    ///
    /// # Errors
    ///
    /// When there is no such object, or the server refuses the change.
    pub fn patch(&self, resource: &str, namespace: &str, name: &str, patch: &Value) -> Result<Value> {
        let (resource, key) = find(resource, namespace, name)?;
        if resource.has_status && !patch["status"].is_null() {
            let status = Patch::Merge(serde_json::json!({"status": patch["status"]}));
            self.write(resource, "status", |writer, state| {
                Ok(writer.patch(state, &key, status)?.answer)
            })?;
        }
        self.write(resource, "", |writer, state| {
            Ok(writer.patch(state, &key, Patch::Merge(patch.clone()))?.answer)
        })
    }

    /// Deletes an object.
    ///
    /// # Errors
    ///
    /// When there is no such object.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> Result<()> {
        let (resource, key) = find(resource, namespace, name)?;
        self.write(resource, "", |writer, state| {
            writer.delete(state, &key, &Preconditions::default())
        })?;
        Ok(())
    }

    /// The object, if it is there.
    ///
    /// # Errors
    ///
    /// When the server has no such resource.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Result<Option<Value>> {
        let (resource, key) = find(resource, namespace, name)?;
        Ok(self
            .context
            .store
            .read()
            .object(resource, &key)
            .map(|object| object.value.clone()))
    }

    /// All objects of a resource, in all namespaces.
    ///
    /// # Errors
    ///
    /// When the server has no such resource.
    pub fn list(&self, resource: &str) -> Result<Vec<Value>> {
        let (resource, _) = find(resource, "", "")?;
        Ok(self
            .context
            .store
            .read()
            .objects(resource)
            .iter()
            .map(|object| object.value.clone())
            .collect())
    }

    /// The revision of the latest write.
    pub fn revision(&self) -> u64 {
        self.context.store.read().revision()
    }

    /// Moves the revision, as writes to what nobody here looks at do.
    pub fn advance_to(&self, revision: u64) {
        self.context.store.write(|state| state.advance_to(revision));
    }

    /// Forgets all older revisions, as a restart of the API server after a compaction of etcd does: watches and pages that start from one
    /// have expired. Those that are open go on.
    pub fn compact(&self) {
        self.context.store.write(State::compact);
    }

    // Who may come in, and how they find the way.

    /// A kubeconfig with the authority and the token inside.
    pub fn kubeconfig(&self, identity: &Identity) -> String {
        kubeconfig::embedded(
            self.addresses()[0],
            &self.context.options.account.namespace,
            &self.listeners.connections().authority().pem,
            &self.token(identity),
        )
    }

    /// A kubeconfig beside `ca.crt` and `token` in a folder, which it names; [`Self::write_credentials`] writes and renews those.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn kubeconfig_in(&self, identity: &Identity, folder: &Path) -> Result<String> {
        self.write_credentials(identity, folder)?;
        let namespace = &self.context.options.account.namespace;
        Ok(kubeconfig::referring(self.addresses()[0], namespace, folder))
    }

    /// Writes `ca.crt`, `token` and `namespace` into a folder, as they are mounted into pods.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn write_credentials(&self, identity: &Identity, folder: &Path) -> Result<()> {
        let authority = self.listeners.connections().authority().pem;
        kubeconfig::write_credentials(
            folder,
            &authority,
            &self.token(identity),
            &self.context.options.account.namespace,
        )
    }

    /// The identity's token; the same until it is revoked or another is issued.
    pub fn token(&self, identity: &Identity) -> String {
        self.context
            .tokens
            .current(identity)
            .unwrap_or_else(|| self.issue_token(identity))
    }

    /// A new token; the old ones stay good until they are revoked.
    pub fn issue_token(&self, identity: &Identity) -> String {
        let node_uid = match identity {
            Identity::Agent(node) => self.get("nodes", "", node).ok().flatten(),
            Identity::Admin | Identity::UnboundAgent | Identity::User(_) => None,
        };
        let node_uid = node_uid.and_then(|node| node["metadata"]["uid"].as_str().map(str::to_owned));
        self.context.tokens.issue(identity, node_uid, self.context.clock.now())
    }

    /// Lets all tokens of an identity expire: 401. Open watches go on.
    pub fn revoke_tokens(&self, identity: &Identity) {
        self.context.tokens.revoke(identity);
    }

    /// The authority's certificate, in PEM.
    pub fn authority(&self) -> String {
        self.listeners.connections().authority().pem
    }

    /// Changes to a new authority and a certificate signed by it. Open connections go on.
    ///
    /// # Errors
    ///
    /// When the certificate cannot be made.
    pub fn rotate_authority(&self) -> Result<()> {
        let addresses: Vec<IpAddr> = self.addresses().iter().map(SocketAddr::ip).collect();
        let authority = Authority::new(&addresses, self.context.options.http2)?;
        self.listeners.connections().use_authority(authority);
        Ok(())
    }

    /// What users may do from now on.
    pub fn set_grants(&self, grants: Vec<Grant>) {
        *self.context.grants.lock().unwrap_or_else(PoisonError::into_inner) = grants;
    }

    /// The admission rule from now on.
    pub fn set_policy(&self, policy: Option<Policy>) {
        *self.context.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// What commands in containers do from now on; each call is on a thread of its own, and may take its time. Without it no container runs.
    pub fn on_exec(&self, run: impl Fn(&Exec) -> Executed + Send + Sync + 'static) {
        self.context.commands.set(run);
    }

    // What goes wrong.

    /// Arms a fault. The oldest one that meets a request counts.
    pub fn fault(&self, fault: Fault) {
        self.context.faults.arm(fault);
    }

    /// Disarms all faults, and lets a silent server speak again.
    pub fn clear_faults(&self) {
        self.context.faults.clear();
        self.listeners.connections().speak();
    }

    /// Sets the clock wrong by so many seconds: the `Date` header, timestamps, and the times in tokens.
    pub fn set_clock_skew(&self, seconds: i64) {
        self.context.clock.skew(seconds);
    }

    /// Refuses new connections; open ones go on.
    ///
    /// # Errors
    ///
    /// When a socket cannot be told.
    pub fn refuse(&self) -> Result<()> {
        self.listeners.refuse()
    }

    /// Accepts connections again, on the same ports.
    ///
    /// # Errors
    ///
    /// When a socket cannot be told.
    pub fn accept(&self) -> Result<()> {
        let runtime = self
            .runtime
            .as_ref()
            .ok_or_else(|| anyhow!("the server has been stopped"))?;
        self.listeners.accept(runtime.handle())
    }

    /// Closes all connections in the middle of whatever they do, as the death of the process does.
    pub fn cut_connections(&self) {
        self.listeners.connections().end(false);
    }

    /// Resets all connections.
    pub fn reset_connections(&self) {
        self.listeners.connections().end(true);
    }

    /// Says nothing any more, on any connection, and ends none, as if the machine had lost its power: new connections are accepted, what
    /// they send is read, and no byte comes back. [`Self::clear_faults`] ends it; then the silent connections are reset.
    pub fn silence(&self) {
        self.listeners.connections().silence();
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.listeners.connections().count()
    }

    // What was asked.

    /// All requests since the start or [`Self::forget_requests`], oldest first.
    pub fn requests(&self) -> Vec<Record> {
        self.context.journal.records()
    }

    /// How many requests of this verb and resource there were.
    pub fn count(&self, verb: Verb, resource: &str) -> usize {
        self.requests()
            .iter()
            .filter(|record| record.verb == verb && record.resource == resource)
            .count()
    }

    /// Starts the log anew; requests that go on are no longer seen.
    pub fn forget_requests(&self) {
        self.context.journal.clear();
    }

    fn write<T>(
        &self,
        resource: &'static Resource,
        subresource: &str,
        work: impl FnOnce(&Writer, &mut State) -> Result<T, Refusal>,
    ) -> Result<T> {
        let user = User {
            username: "test".into(),
            ..User::default()
        };
        let writer = Writer {
            resource,
            subresource,
            user: &user,
            manager: "test".into(),
            dry_run: false,
            strict: false,
            now: self.context.clock.now(),
            policy: None,
        };
        let refused = |refusal: Refusal| anyhow!("{} ({})", refusal.message, refusal.code);
        self.context.store.write(|state| work(&writer, state)).map_err(refused)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Replaces an object, whatever its revision is by now.
fn replace(writer: &Writer, state: &mut State, key: &Key, mut object: Value) -> Result<Value, Refusal> {
    if let Some(there) = state.object(writer.resource, key) {
        object["metadata"]["resourceVersion"] = there.value["metadata"]["resourceVersion"].clone();
    }
    Ok(writer.update(state, key, object)?.answer)
}

fn find(plural: &str, namespace: &str, name: &str) -> Result<(&'static Resource, Key)> {
    let resource = crate::resource::RESOURCES.iter().find(|one| one.plural == plural);
    let resource = resource.with_context(|| format!("the server has no resource {plural:?}"))?;
    Ok((
        resource,
        Key {
            namespace: namespace.into(),
            name: name.into(),
        },
    ))
}
