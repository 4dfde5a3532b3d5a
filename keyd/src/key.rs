//! This node's key: made once, kept on this node, never replaced in silence.
//!
//! Two files in the state directory. `key` is the private key as `wg genkey` writes it: 44 characters of base64 and a newline, mode
//! 0600. `key.pub` is the public key in the same form; it proves that this node has had an identity, and checks the private key.
//! `key` is written first, so a crash between the two leaves a key without `key.pub`, which the next start adopts; `key.pub` without
//! `key` is a loss, and a person must decide.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{FlockOperation, Mode, Stat};
use shroud_model::{PrivateKey, PublicKey};
use thiserror::Error as ThisError;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::Error;
use crate::folder::{Entry, Existing, Folder, Written, failed, io_error};

const KEY: &str = "key";
const PUBLIC: &str = "key.pub";
/// 44 characters of base64 and a newline.
const TEXT: usize = 45;
const BYTES: usize = 32;

/// What is wrong with a key file or the state directory, and the remedy. Never holds any part of the key.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum Flaw {
    /// There was a key once.
    #[error(
        "is gone, while key.pub beside it shows that this node had an identity; restore it from a backup, or remove key.pub to get a new identity that all peers must learn"
    )]
    Missing,
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
    #[error("is corrupt: it is not the private half of the public key in key.pub; {}", RESTORE)]
    NotAPair,
    /// `key.pub` is unusable.
    #[error(
        "is corrupt: it holds no public key; restore it from a backup, or, if key is known to be good, remove key.pub to have it written anew"
    )]
    Public,
    /// Group or others may read or write the private key.
    #[error(
        "has mode {mode:04o}, so that others may read or change it; run chmod 0600 on it, and if others may have read it, remove key and key.pub to get a new identity that all peers must learn"
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
const RESTORE: &str =
    "restore it from a backup, or remove key and key.pub to get a new identity that all peers must learn";

/// This node's key pair. Only the public half can be printed.
#[derive(Clone)]
pub struct NodeKey {
    /// The secret, for the encryption device.
    pub private: Arc<PrivateKey>,
    /// What others know this node by.
    pub public: PublicKey,
    /// When the private key's file was last written, by this machine's clock.
    pub since: SystemTime,
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeKey")
            .field("public", &self.public)
            .field("since", &self.since)
            .finish_non_exhaustive()
    }
}

/// Loads this node's key, or makes one when the node never had any.
///
/// The state directory is made with mode 0700 when it is missing, and tightened to it when others may look into it. Processes that
/// start at once agree on one key.
///
/// # Errors
/// [`Error::Key`] names the file that cannot be trusted and the remedy; [`Error::Io`] the system call that failed. A key that is there
/// is never changed.
pub fn load_or_create(state_dir: &Path) -> Result<NodeKey, Error> {
    let folder = private_folder(state_dir)?;
    // Held until `folder` is closed; a second process waits here and then finds the first one's key.
    rustix::fs::flock(folder.fd(), FlockOperation::LockExclusive).map_err(io_error("lock", state_dir))?;

    let private = read_private(&folder)?;
    let public = read_public(&folder)?;
    match (private, public) {
        (Some((private, since)), Some(public)) => {
            let key = pair(private, since);
            if key.public != public {
                return Err(refuse(&folder, KEY, Flaw::NotAPair));
            }
            Ok(key)
        }
        (Some((private, since)), None) => adopt(&folder, private, since),
        (None, Some(_)) => Err(refuse(&folder, KEY, Flaw::Missing)),
        (None, None) => {
            let (private, since) = create(&folder)?;
            adopt(&folder, private, since)
        }
    }
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
fn read_private(folder: &Folder) -> Result<Option<(PrivateKey, SystemTime)>, Error> {
    let Some((mut file, stat)) = open(folder, KEY)? else {
        return Ok(None);
    };
    let mode = permissions(&stat);
    if mode & 0o077 != 0 {
        return Err(refuse(folder, KEY, Flaw::Mode { mode }));
    }
    let bytes = decode(folder, KEY, &mut file, &stat)?.map_err(|flaw| refuse(folder, KEY, flaw))?;
    if bytes.iter().all(|&byte| byte == 0) {
        return Err(refuse(folder, KEY, Flaw::Zero));
    }
    let since = file
        .metadata()
        .and_then(|metadata| metadata.modified())
        .map_err(failed("stat", &folder.path().join(KEY)))?;
    Ok(Some((PrivateKey::from_bytes(*bytes), since)))
}

/// The public key, or `None` when there is no such file.
fn read_public(folder: &Folder) -> Result<Option<PublicKey>, Error> {
    let Some((mut file, stat)) = open(folder, PUBLIC)? else {
        return Ok(None);
    };
    let mode = permissions(&stat);
    if mode & 0o022 != 0 {
        return Err(refuse(folder, PUBLIC, Flaw::PublicMode { mode }));
    }
    let bytes = decode(folder, PUBLIC, &mut file, &stat)?.map_err(|_| refuse(folder, PUBLIC, Flaw::Public))?;
    let public = PublicKey::from_bytes(*bytes).map_err(|_| refuse(folder, PUBLIC, Flaw::Public))?;
    Ok(Some(public))
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

/// Reads 44 characters of base64 and a newline. Every buffer that held them is wiped.
fn decode(
    folder: &Folder,
    name: &str,
    file: &mut File,
    stat: &Stat,
) -> Result<Result<Zeroizing<[u8; BYTES]>, Flaw>, Error> {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size != TEXT as u64 {
        return Ok(Err(Flaw::Length { bytes: size }));
    }
    let mut text = Zeroizing::new([0; TEXT]);
    file.read_exact(&mut *text)
        .map_err(failed("read", &folder.path().join(name)))?;

    let [encoded @ .., b'\n'] = &*text else {
        return Ok(Err(Flaw::Encoding));
    };
    // The decoder asks for room for whole groups of three bytes.
    let mut decoded = Zeroizing::new([0; BYTES + 1]);
    if STANDARD.decode_slice(encoded, &mut *decoded) != Ok(BYTES) {
        return Ok(Err(Flaw::Encoding));
    }
    let mut bytes = Zeroizing::new([0; BYTES]);
    bytes.copy_from_slice(&decoded[..BYTES]);
    Ok(Ok(bytes))
}

/// Makes a key and puts it in its place, never over another.
fn create(folder: &Folder) -> Result<(PrivateKey, SystemTime), Error> {
    let secret = StaticSecret::random();
    let mut bytes = Zeroizing::new(secret.to_bytes());
    // Clamped as `wg genkey` does it (RFC 7748 §5), so that the file reads the same in every program.
    bytes[0] &= 0b1111_1000;
    bytes[31] = (bytes[31] & 0b0111_1111) | 0b0100_0000;

    let text = encode(&bytes);
    match folder.write(KEY, &*text, Mode::RUSR | Mode::WUSR, Existing::Keep)? {
        Written::New => Ok((PrivateKey::from_bytes(*bytes), SystemTime::now())),
        // Somebody restored a backup at this moment: theirs counts.
        Written::AlreadyThere => read_private(folder)?.ok_or_else(|| refuse(folder, KEY, Flaw::Missing)),
    }
}

/// Takes the private key as this node's and writes the public half beside it.
fn adopt(folder: &Folder, private: PrivateKey, since: SystemTime) -> Result<NodeKey, Error> {
    let key = pair(private, since);
    let text = encode(key.public.as_bytes());
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    match folder.write(PUBLIC, &*text, mode, Existing::Keep)? {
        Written::New => Ok(key),
        Written::AlreadyThere if read_public(folder)? == Some(key.public) => Ok(key),
        Written::AlreadyThere => Err(refuse(folder, KEY, Flaw::NotAPair)),
    }
}

fn pair(private: PrivateKey, since: SystemTime) -> NodeKey {
    let secret = StaticSecret::from(*private.expose());
    let public = PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes())
        .expect("a clamped scalar times the base point is never of low order");
    NodeKey {
        private: Arc::new(private),
        public,
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
