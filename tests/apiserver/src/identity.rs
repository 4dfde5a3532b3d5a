//! Who may be asking: identities that a test names, the users they are to the server, and their bearer tokens. It decides nothing.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;

use crate::policy::NODE_CLAIM;

/// Someone who talks to the server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identity {
    /// May do everything.
    Admin,
    /// The agent on a node: its token is bound to its pod, and so to the node.
    Agent(String),
    /// The agent's service account with a token that is bound to no pod.
    UnboundAgent,
    /// Somebody by name, who may do what the grants say.
    User(String),
}

impl Identity {
    /// The agent on the node of this name.
    pub fn agent(node: &str) -> Self {
        Self::Agent(node.into())
    }

    /// Its name in files: `admin`, `node-a`.
    pub fn name(&self) -> String {
        match self {
            Self::Admin => "admin".into(),
            Self::Agent(node) => node.clone(),
            Self::UnboundAgent => "unbound".into(),
            Self::User(name) => name.clone(),
        }
    }
}

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ServiceAccount {
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub fn username(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

/// Who is asking, as the server sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// The name that grants and errors use.
    pub username: String,
    /// Of the account.
    pub uid: String,
    /// All groups.
    pub groups: Vec<String>,
    /// What else the token says; `authentication.kubernetes.io/node-name` above all.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    pub(crate) fn anonymous() -> Self {
        Self {
            username: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            ..Self::default()
        }
    }
}

/// The tokens that are good, each with its user.
#[derive(Debug)]
pub(crate) struct Tokens {
    account: ServiceAccount,
    account_uid: String,
    good: Mutex<BTreeMap<String, (Identity, User)>>,
    current: Mutex<BTreeMap<Identity, String>>,
}

impl Tokens {
    pub(crate) fn new(account: ServiceAccount) -> Self {
        Self {
            account,
            account_uid: uid(),
            good: Mutex::default(),
            current: Mutex::default(),
        }
    }

    /// The identity's token, if it has one.
    pub(crate) fn current(&self, identity: &Identity) -> Option<String> {
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(identity)
            .cloned()
    }

    /// A new token beside those that are good already, for an agent on the node with this uid.
    pub(crate) fn issue(&self, identity: &Identity, node_uid: Option<String>, now: i64) -> String {
        let serial = uid();
        let user = self.user(identity, node_uid.unwrap_or_else(uid), &serial);
        let token = match identity {
            Identity::Admin | Identity::User(_) => format!("{}-{serial}", identity.name()),
            Identity::Agent(_) | Identity::UnboundAgent => self.jwt(&user, &serial, now),
        };
        self.good
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(token.clone(), (identity.clone(), user));
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(identity.clone(), token.clone());
        token
    }

    /// Lets all tokens of an identity expire.
    pub(crate) fn revoke(&self, identity: &Identity) {
        self.good
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, (owner, _)| owner != identity);
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(identity);
    }

    /// Whose token it is; none if it is not good.
    pub(crate) fn user_of(&self, token: &str) -> Option<User> {
        self.good
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(token)
            .map(|(_, user)| user.clone())
    }

    fn user(&self, identity: &Identity, node_uid: String, serial: &str) -> User {
        let groups = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        match identity {
            Identity::Admin => User {
                username: "admin".into(),
                groups: groups(&["system:masters", "system:authenticated"]),
                ..User::default()
            },
            Identity::User(name) => User {
                username: name.clone(),
                uid: format!("u-{name}"),
                groups: groups(&["dev", "system:authenticated"]),
                ..User::default()
            },
            Identity::Agent(_) | Identity::UnboundAgent => {
                let of_namespace = format!("system:serviceaccounts:{}", self.account.namespace);
                let mut extra = BTreeMap::from([("credential-id", format!("JTI={serial}"))]);
                if let Identity::Agent(node) = identity {
                    extra.insert("node-name", node.clone());
                    extra.insert("node-uid", node_uid);
                    extra.insert("pod-name", format!("{}-{node}", self.account.name));
                    extra.insert("pod-uid", uid());
                }
                User {
                    username: self.account.username(),
                    uid: self.account_uid.clone(),
                    groups: groups(&["system:serviceaccounts", &of_namespace, "system:authenticated"]),
                    extra: extra
                        .into_iter()
                        .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![value]))
                        .collect(),
                }
            }
        }
    }

    /// Looks like the real ones, claims and all; the signature is noise, as only this server judges it.
    fn jwt(&self, user: &User, serial: &str, now: i64) -> String {
        let claim = |key: &str| {
            user.extra
                .get(&format!("authentication.kubernetes.io/{key}"))
                .map(|values| values[0].clone())
        };
        let mut bound = json!({"namespace": self.account.namespace,
            "serviceaccount": {"name": self.account.name, "uid": self.account_uid}});
        if user.extra.contains_key(NODE_CLAIM) {
            bound["node"] = json!({"name": claim("node-name"), "uid": claim("node-uid")});
            bound["pod"] = json!({"name": claim("pod-name"), "uid": claim("pod-uid")});
        }
        let issuer = "https://kubernetes.default.svc";
        let claims = json!({"aud": [issuer], "exp": now + 3607, "iat": now, "iss": issuer, "jti": serial, "nbf": now,
            "kubernetes.io": bound, "sub": user.username});
        let header = json!({"alg": "RS256", "kid": "test"});
        let mut signature = [0; 32];
        getrandom::fill(&mut signature).expect("the kernel gives randomness");
        let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        format!(
            "{}.{}.{}",
            part(header.to_string().as_bytes()),
            part(claims.to_string().as_bytes()),
            part(&signature)
        )
    }
}

/// A random UUID.
pub(crate) fn uid() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives randomness");
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}
