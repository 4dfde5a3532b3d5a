//! This node's keys: the one in force, made once and never replaced in silence, and while the node changes to another one, that too.
//!
//! Two files in the state directory for each. `key` is the private key as `wg genkey` writes it: 44 characters of base64 and a newline,
//! mode 0600. `key.pub` is the public key in the same form, followed by its epoch; it proves that this node has had an identity, and checks
//! the private key. `key` is written first, so a crash between the two leaves a key without `key.pub`, which the next start adopts;
//! `key.pub` without `key` is a loss, and a person must decide. `key.next` and `key.next.pub` are the same of the key to come.
//!
//! Epochs say which of two keys of a node is the newer one. They are the time at which a key was made, so that a node that has lost all it
//! knew still has a higher one, and each differs from the one before in its lowest bit: by that bit the two keys of a node that changes
//! from one to the other are told apart.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{FlockOperation, Mode, Stat};
use shroud_model::{PrivateKey, PublicKey};
use thiserror::Error as ThisError;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::Error;
use crate::announcement::AnnouncedKey;
use crate::folder::{Entry, Existing, Folder, Written, failed, io_error};

/// The key in force.
const CURRENT: Names = Names {
    private: "key",
    public: "key.pub",
};
/// The key to come.
const NEXT: Names = Names {
    private: "key.next",
    public: "key.next.pub",
};
/// 44 characters of base64 and a newline.
const TEXT: usize = 45;
const BYTES: usize = 32;
/// A public key, a space, an epoch of up to 20 digits, and a newline.
const PUBLIC_TEXT: usize = TEXT + 21;

/// The files of one key.
#[derive(Clone, Copy)]
struct Names {
    private: &'static str,
    public: &'static str,
}

/// What is wrong with a key file or the state directory, and the remedy. Never holds any part of the key.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum Flaw {
    /// There was a key once.
    #[error(
        "is gone, while {beside} beside it shows that this node had an identity; restore it from a backup, or remove {beside} to get a new identity that all peers must learn"
    )]
    Missing {
        /// The file beside it.
        beside: &'static str,
    },
    /// The file has another size than a key file.
    #[error(
        "is corrupt: {bytes} bytes instead of 44 characters of base64 and a newline; {}",
        RESTORE
    )]
    Length {
        /// Its size.
        bytes: u64,
    },
    /// The file is not the base64 of a key.
    #[error("is corrupt: not 44 characters of base64 and a newline; {}", RESTORE)]
    Encoding,
    /// The key is all zeroes.
    #[error("is corrupt: the key is all zeroes; {}", RESTORE)]
    Zero,
    /// The two files are not a pair.
    #[error("is corrupt: it is not the private half of the public key beside it; {}", RESTORE)]
    NotAPair,
    /// The file of the public key is unusable.
    #[error(
        "is corrupt: it holds no public key and epoch; restore it from a backup, or, if the private key beside it is known to be good, remove this file to have it written anew"
    )]
    Public,
    /// The key to come does not come after the one in force.
    #[error(
        "has epoch {next}, which does not follow the epoch {current} of the key in force; remove key.next and key.next.pub, and have the key rotated again"
    )]
    Epoch {
        /// Of the key in force.
        current: u64,
        /// Of the key to come.
        next: u64,
    },
    /// Group or others may read or write the private key.
    #[error(
        "has mode {mode:04o}, so that others may read or change it; run chmod 0600 on it, and if others may have read it, have the key rotated"
    )]
    Mode {
        /// Its permission bits.
        mode: u32,
    },
    /// Group or others may change the public key.
    #[error("has mode {mode:04o}, so that others may change it; run chmod 0644 on it")]
    PublicMode {
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("belongs to user {owner}, not to user {us} as which this program runs; run chown {us} on it")]
    Owner {
        /// Whose it is.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// It is a symbolic link.
    #[error("is a symbolic link, which could lead anywhere; put the file itself there")]
    Symlink,
    /// It is a folder, device, socket or pipe.
    #[error("is not a regular file; put the key file itself there")]
    NotAFile,
    /// Others may put files into the state directory, or swap it.
    #[error("is a folder with mode {mode:04o}, so that others may swap the key in it; run chmod go-w on it")]
    Folder {
        /// Its permission bits.
        mode: u32,
    },
}

/// The remedy for a key that is there but no good.
const RESTORE: &str = "restore it from a backup, or remove it and the public key beside it to get a new identity that all peers must learn";

/// A key pair of this node. Only the public half can be printed.
#[derive(Clone)]
pub struct NodeKey {
    /// The secret, for the encryption device.
    pub private: Arc<PrivateKey>,
    /// What others know this node by.
    pub public: PublicKey,
    /// Higher than that of each earlier key of this node.
    pub epoch: u64,
    /// When the private key's file was last written, by this machine's clock.
    pub since: SystemTime,
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeKey")
            .field("public", &self.public)
            .field("epoch", &self.epoch)
            .field("since", &self.since)
            .finish_non_exhaustive()
    }
}

/// All keys of this node that others may know it by.
#[derive(Debug, Clone)]
pub struct NodeKeys {
    /// The one in force.
    pub current: NodeKey,
    /// The one that takes its place once all peers have it.
    pub next: Option<NodeKey>,
}

/// The public halves of a node's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKeys {
    /// The one in force.
    pub current: AnnouncedKey,
    /// The one that takes its place once all peers have it.
    pub next: Option<AnnouncedKey>,
}

impl NodeKeys {
    /// The keys, the older one first.
    pub fn iter(&self) -> impl Iterator<Item = &NodeKey> {
        std::iter::once(&self.current).chain(&self.next)
    }

    /// What others may know.
    pub fn public(&self) -> PublicKeys {
        let announced = |key: &NodeKey| AnnouncedKey {
            public_key: key.public,
            epoch: key.epoch,
        };
        PublicKeys {
            current: announced(&self.current),
            next: self.next.as_ref().map(announced),
        }
    }
}

impl PublicKeys {
    /// A key in force, and none to come.
    pub fn only(public_key: PublicKey, epoch: u64) -> Self {
        Self {
            current: AnnouncedKey { public_key, epoch },
            next: None,
        }
    }

    /// The keys, the older one first.
    pub fn iter(&self) -> impl Iterator<Item = PublicKey> {
        [Some(self.current), self.next]
            .into_iter()
            .flatten()
            .map(|key| key.public_key)
    }

    /// Whether a key is one of these.
    pub fn contains(&self, key: PublicKey) -> bool {
        self.iter().any(|own| own == key)
    }
}

/// Loads this node's keys, or makes one when the node never had any. What a crash has left half done is finished.
///
/// The state directory is made with mode 0700 when it is missing, and tightened to it when others may look into it. Processes that
/// start at once agree on one key.
///
/// # Errors
/// [`Error::Key`] names the file that cannot be trusted and the remedy; [`Error::Io`] the system call that failed. A key that is there
/// is never changed.
pub fn load_or_create(state_dir: &Path) -> Result<NodeKeys, Error> {
    load_all(&private_folder(state_dir)?)
}

/// Makes the key that is to follow the one in force, unless there is one already.
///
/// # Errors
/// As [`load_or_create`].
pub fn prepare(state_dir: &Path) -> Result<NodeKeys, Error> {
    let folder = private_folder(state_dir)?;
    let mut keys = load_all(&folder)?;
    if keys.next.is_none() {
        let epoch = epoch_after(keys.current.epoch, SystemTime::now());
        keys.next = Some(create(&folder, NEXT, epoch)?);
    }
    Ok(keys)
}

/// Puts the next key in the place of the one in force, which is gone for good. Without a next key nothing changes.
///
/// # Errors
/// As [`load_or_create`].
pub fn promote(state_dir: &Path) -> Result<NodeKeys, Error> {
    let folder = private_folder(state_dir)?;
    let keys = load_all(&folder)?;
    let Some(next) = keys.next else { return Ok(keys) };
    // The public half goes first: a crash in between leaves a key to come that is in force, which nothing else can leave.
    folder.rename(NEXT.public, CURRENT.public)?;
    folder.sync()?;
    folder.rename(NEXT.private, CURRENT.private)?;
    folder.sync()?;
    Ok(NodeKeys {
        current: next,
        next: None,
    })
}

fn load_all(folder: &Folder) -> Result<NodeKeys, Error> {
    // Held until the folder is closed; a second process waits here and then finds what the first one has made.
    rustix::fs::flock(folder.fd(), FlockOperation::LockExclusive).map_err(io_error("lock", folder.path()))?;

    finish_promotion(folder)?;
    let now = SystemTime::now();
    let current = match load(folder, CURRENT, || first_epoch(now))? {
        Some(current) => current,
        None => match folder.entry(NEXT.private)? {
            Entry::Absent => create(folder, CURRENT, first_epoch(now))?,
            Entry::Symlink | Entry::Special | Entry::File { .. } => {
                let flaw = Flaw::Missing { beside: NEXT.private };
                return Err(refuse(folder, CURRENT.private, flaw));
            }
        },
    };
    let next = load(folder, NEXT, || epoch_after(current.epoch, now))?;
    if let Some(next) = next.as_ref().filter(|next| !follows(next.epoch, current.epoch)) {
        let flaw = Flaw::Epoch {
            current: current.epoch,
            next: next.epoch,
        };
        return Err(refuse(folder, NEXT.public, flaw));
    }
    Ok(NodeKeys { current, next })
}

/// Gives the key to come its place, if a crash has left only its public half there.
fn finish_promotion(folder: &Folder) -> Result<(), Error> {
    if !matches!(folder.entry(NEXT.public)?, Entry::Absent) {
        return Ok(());
    }
    let Some((private, since)) = read_private(folder, NEXT)? else {
        return Ok(());
    };
    let Some((in_force, epoch)) = read_public(folder, CURRENT)? else {
        return Ok(());
    };
    if pair(Arc::new(private), epoch, since).public == in_force {
        folder.rename(NEXT.private, CURRENT.private)?;
        folder.sync()?;
    }
    Ok(())
}

/// Loads one key, or `None` when neither of its files is there. A private key alone is adopted, with this epoch.
fn load(folder: &Folder, names: Names, epoch: impl Fn() -> u64) -> Result<Option<NodeKey>, Error> {
    let private = read_private(folder, names)?;
    let public = read_public(folder, names)?;
    match (private, public) {
        (Some((private, since)), Some((public, epoch))) => {
            let key = pair(Arc::new(private), epoch, since);
            if key.public != public {
                return Err(refuse(folder, names.private, Flaw::NotAPair));
            }
            Ok(Some(key))
        }
        (Some((private, since)), None) => adopt(folder, names, Arc::new(private), epoch(), since).map(Some),
        (None, Some(_)) => Err(refuse(folder, names.private, Flaw::Missing { beside: names.public })),
        (None, None) => Ok(None),
    }
}

/// The epoch of a node's first key: the time, made odd.
fn first_epoch(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()) | 1
}

/// The epoch of the key after another one: the time, if the clock does not say that it is earlier by now, with another lowest bit.
fn epoch_after(current: u64, now: SystemTime) -> u64 {
    let epoch = first_epoch(now).max(current.saturating_add(1));
    if follows(epoch, current) {
        epoch
    } else {
        epoch.saturating_add(1)
    }
}

/// Whether a key with one epoch may come after one with another.
pub(crate) fn follows(next: u64, current: u64) -> bool {
    next > current && next % 2 != current % 2
}

/// Opens the state directory, made and tightened so that it is ours alone.
fn private_folder(path: &Path) -> Result<Folder, Error> {
    if !path.try_exists().map_err(failed("stat", path))? {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed("create folder", path))?;
    }
    let folder = Folder::open(path)?;
    let stat = folder.stat()?;
    check_owner(path, &stat)?;
    refuse_writable(path, &stat)?;
    if permissions(&stat) != 0o700 {
        rustix::fs::fchmod(folder.fd(), Mode::RWXU).map_err(io_error("set the mode of", path))?;
    }

    let parent = Folder::open(&path.join(".."))?;
    let stat = parent.stat()?;
    // In a sticky folder such as /tmp nobody else can rename what is ours.
    if permissions(&stat) & 0o1000 == 0 {
        refuse_writable(parent.path(), &stat)?;
    }
    rustix::fs::fsync(parent.fd()).map_err(io_error("sync folder", parent.path()))?;
    Ok(folder)
}

fn refuse_writable(path: &Path, stat: &Stat) -> Result<(), Error> {
    let mode = permissions(stat);
    if mode & 0o022 != 0 {
        return Err(Error::Key {
            path: path.to_owned(),
            flaw: Flaw::Folder { mode },
        });
    }
    Ok(())
}

fn check_owner(path: &Path, stat: &Stat) -> Result<(), Error> {
    let us = rustix::process::geteuid().as_raw();
    if stat.st_uid != us {
        return Err(Error::Key {
            path: path.to_owned(),
            flaw: Flaw::Owner { owner: stat.st_uid, us },
        });
    }
    Ok(())
}

/// The private key, or `None` when there is no such file.
fn read_private(folder: &Folder, names: Names) -> Result<Option<(PrivateKey, SystemTime)>, Error> {
    let name = names.private;
    let Some((mut file, stat)) = open(folder, name)? else {
        return Ok(None);
    };
    let mode = permissions(&stat);
    if mode & 0o077 != 0 {
        return Err(refuse(folder, name, Flaw::Mode { mode }));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size != TEXT as u64 {
        return Err(refuse(folder, name, Flaw::Length { bytes: size }));
    }
    let mut text = Zeroizing::new([0; TEXT]);
    let path = folder.path().join(name);
    file.read_exact(&mut *text).map_err(failed("read", &path))?;
    let [encoded @ .., b'\n'] = &*text else {
        return Err(refuse(folder, name, Flaw::Encoding));
    };
    let bytes = decode(encoded).ok_or_else(|| refuse(folder, name, Flaw::Encoding))?;
    if bytes.iter().all(|&byte| byte == 0) {
        return Err(refuse(folder, name, Flaw::Zero));
    }
    let since = file
        .metadata()
        .and_then(|metadata| metadata.modified())
        .map_err(failed("stat", &path))?;
    Ok(Some((PrivateKey::from_bytes(*bytes), since)))
}

/// The public key and its epoch, or `None` when there is no such file. Without an epoch, as `wg pubkey` writes it, it is the first one.
fn read_public(folder: &Folder, names: Names) -> Result<Option<(PublicKey, u64)>, Error> {
    let name = names.public;
    let Some((file, stat)) = open(folder, name)? else {
        return Ok(None);
    };
    let mode = permissions(&stat);
    if mode & 0o022 != 0 {
        return Err(refuse(folder, name, Flaw::PublicMode { mode }));
    }
    let mut bytes = Vec::new();
    file.take(PUBLIC_TEXT as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed("read", &folder.path().join(name)))?;
    let parse = |text: &str| {
        let line = text.strip_suffix('\n')?;
        let (key, epoch) = line.split_once(' ').unwrap_or((line, "1"));
        Some((key.parse().ok()?, epoch.parse().ok()?))
    };
    match std::str::from_utf8(&bytes).ok().and_then(parse) {
        Some(parsed) => Ok(Some(parsed)),
        None => Err(refuse(folder, name, Flaw::Public)),
    }
}

/// Opens a file that is regular and ours.
fn open(folder: &Folder, name: &str) -> Result<Option<(File, Stat)>, Error> {
    match folder.entry(name)? {
        Entry::Absent => Ok(None),
        Entry::Symlink => Err(refuse(folder, name, Flaw::Symlink)),
        Entry::Special => Err(refuse(folder, name, Flaw::NotAFile)),
        Entry::File { file, stat } => {
            check_owner(&folder.path().join(name), &stat)?;
            Ok(Some((file, stat)))
        }
    }
}

/// Decodes 44 characters of base64. Every buffer that held them is wiped.
fn decode(encoded: &[u8]) -> Option<Zeroizing<[u8; BYTES]>> {
    // The decoder asks for room for whole groups of three bytes.
    let mut decoded = Zeroizing::new([0; BYTES + 1]);
    if STANDARD.decode_slice(encoded, &mut *decoded) != Ok(BYTES) {
        return None;
    }
    let mut bytes = Zeroizing::new([0; BYTES]);
    bytes.copy_from_slice(&decoded[..BYTES]);
    Some(bytes)
}

/// Makes a key and puts it in its place, never over another.
fn create(folder: &Folder, names: Names, epoch: u64) -> Result<NodeKey, Error> {
    let secret = StaticSecret::random();
    let mut bytes = Zeroizing::new(secret.to_bytes());
    // Clamped as `wg genkey` does it (RFC 7748 §5), so that the file reads the same in every program.
    bytes[0] &= 0b1111_1000;
    bytes[31] = (bytes[31] & 0b0111_1111) | 0b0100_0000;

    let text = encode(&bytes);
    let (private, since) = match folder.write(names.private, &*text, Mode::RUSR | Mode::WUSR, Existing::Keep)? {
        Written::New => (PrivateKey::from_bytes(*bytes), SystemTime::now()),
        // Somebody restored a backup at this moment: theirs counts.
        Written::AlreadyThere => read_private(folder, names)?.ok_or_else(|| {
            let flaw = Flaw::Missing { beside: names.public };
            refuse(folder, names.private, flaw)
        })?,
    };
    adopt(folder, names, Arc::new(private), epoch, since)
}

/// Takes the private key as this node's and writes the public half beside it.
fn adopt(
    folder: &Folder,
    names: Names,
    private: Arc<PrivateKey>,
    epoch: u64,
    since: SystemTime,
) -> Result<NodeKey, Error> {
    let key = pair(private, epoch, since);
    let text = format!("{} {epoch}\n", key.public);
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    match folder.write(names.public, text.as_bytes(), mode, Existing::Keep)? {
        Written::New => Ok(key),
        Written::AlreadyThere => match read_public(folder, names)? {
            Some((public, epoch)) if public == key.public => Ok(NodeKey { epoch, ..key }),
            Some(_) | None => Err(refuse(folder, names.private, Flaw::NotAPair)),
        },
    }
}

fn pair(private: Arc<PrivateKey>, epoch: u64, since: SystemTime) -> NodeKey {
    let secret = StaticSecret::from(*private.expose());
    let public = PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes())
        .expect("a clamped scalar times the base point is never of low order");
    NodeKey {
        private,
        public,
        epoch,
        since,
    }
}

fn encode(bytes: &[u8; BYTES]) -> Zeroizing<[u8; TEXT]> {
    let mut text = Zeroizing::new([b'\n'; TEXT]);
    STANDARD
        .encode_slice(bytes, &mut text[..TEXT - 1])
        .expect("32 bytes are 44 characters of base64");
    text
}

fn permissions(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

fn refuse(folder: &Folder, name: &str, flaw: Flaw) -> Error {
    Error::Key {
        path: folder.path().join(name),
        flaw,
    }
}
