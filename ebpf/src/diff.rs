//! What has to change, as a pure function of what should be and what is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::sorted::side_by_side;
use crate::{Hook, Mechanism, Owner, Table};

/// How many prefixes the text of a change names; a mesh has thousands.
const NAMED: usize = 20;

/// What should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Devices to the underlay, by name: the gate stands on both sides of each.
    pub uplinks: BTreeSet<String>,
    /// Devices to pods, by name: the gate marks what comes in there.
    pub pod_devices: BTreeSet<String>,
    /// The encryption devices, by name: the gate checks what comes out of them.
    pub encryption: BTreeSet<String>,
    /// What the gate decides by.
    pub table: Table,
}

/// A place where a program of ours hangs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// The device's name.
    pub device: String,
    /// Where on the device.
    pub hook: Hook,
    /// By which means.
    pub mechanism: Mechanism,
}

/// What is: attachments and tables read back from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The means by which this gate attaches.
    pub mechanism: Mechanism,
    /// Our attachments, and whether the program is this build's.
    pub attachments: BTreeMap<Attachment, Build>,
    /// What the maps in force hold; `None` if nothing was ever written, or somebody changed it.
    pub table: Option<Table>,
    /// Pins of programs and maps that somebody removed.
    pub missing_pins: BTreeSet<String>,
    /// Pins of links whose device is gone, by their names.
    pub stale_pins: BTreeSet<String>,
    /// Other layouts of our maps under the pin directory (`v1`), whose programs may still hang beside this one's.
    pub other_layouts: BTreeSet<String>,
}

/// Which build of the program hangs at an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Build {
    /// This one.
    Current,
    /// Another one of ours.
    Other,
}

/// One step from what is to what should be. Displays as "what: old -> new".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Pins programs and maps again.
    Pin {
        /// Their names.
        missing: BTreeSet<String>,
    },
    /// Fills the inactive generation and switches to it.
    ReplaceTable {
        /// What is in force.
        old: Option<Box<Table>>,
        /// What will be.
        new: Box<Table>,
    },
    /// Attaches a program, or puts this build's in the place of another.
    Attach {
        /// Where.
        attachment: Attachment,
        /// What hangs there.
        old: Option<Build>,
    },
    /// Detaches a program.
    Detach {
        /// Where.
        attachment: Attachment,
    },
    /// Removes the pins of links that hold nothing any more, for their device is gone.
    Unpin {
        /// Their names.
        stale: BTreeSet<String>,
    },
    /// Lets go of what another version of Shroud with another layout of the maps has left: its links, programs and maps.
    RemoveLayout {
        /// Its name under the pin directory.
        layout: String,
    },
}

/// What has to change, in the order in which it is safe: a table before the program that reads it, a new attachment before the old
/// one goes.
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Change> {
    let mut changes = Vec::new();
    if !observed.missing_pins.is_empty() {
        changes.push(Change::Pin {
            missing: observed.missing_pins.clone(),
        });
    }
    let table = desired.table.settled();
    if observed.table.as_ref() != Some(table.as_ref()) {
        let old = observed.table.clone().map(Box::new);
        changes.push(Change::ReplaceTable {
            old,
            new: Box::new(table.into_owned()),
        });
    }
    let wanted = attachments(desired, observed.mechanism);
    for attachment in &wanted {
        let old = observed.attachments.get(attachment).copied();
        if old != Some(Build::Current) {
            changes.push(Change::Attach {
                attachment: attachment.clone(),
                old,
            });
        }
    }
    for attachment in observed.attachments.keys() {
        if !wanted.contains(attachment) {
            changes.push(Change::Detach {
                attachment: attachment.clone(),
            });
        }
    }
    if !observed.stale_pins.is_empty() {
        changes.push(Change::Unpin {
            stale: observed.stale_pins.clone(),
        });
    }
    // Not in the same pass: an attachment above may fail, and until it hangs the other layout's program guards the place.
    if changes.is_empty() {
        let layouts = observed.other_layouts.iter().cloned();
        changes.extend(layouts.map(|layout| Change::RemoveLayout { layout }));
    }
    changes
}

fn attachments(desired: &Desired, mechanism: Mechanism) -> BTreeSet<Attachment> {
    let place = |device: &String, hook| Attachment {
        device: device.clone(),
        hook,
        mechanism,
    };
    let uplinks = desired
        .uplinks
        .iter()
        .flat_map(|device| [place(device, Hook::Egress), place(device, Hook::Ingress)]);
    let pods = desired.pod_devices.iter().map(|device| place(device, Hook::Pod));
    let encryption = desired.encryption.iter().map(|device| place(device, Hook::Decrypted));
    uplinks.chain(pods).chain(encryption).collect()
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.device, self.hook, self.mechanism)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pin { missing } => {
                write!(
                    f,
                    "pins {}: missing -> pinned",
                    missing.iter().cloned().collect::<Vec<_>>().join(", ")
                )
            }
            Self::Unpin { stale } => {
                let stale: Vec<&str> = stale.iter().map(String::as_str).collect();
                write!(f, "pins of devices that are gone, {}: pinned -> none", stale.join(", "))
            }
            Self::ReplaceTable { old: None, new } => write!(f, "gate table: none -> {}", summary(new)),
            Self::ReplaceTable { old: Some(old), new } => {
                write!(f, "gate table: {} -> {}", summary(old), summary(new))?;
                differences(f, old, new)
            }
            Self::Attach { attachment, old: None } => write!(f, "gate on {attachment}: none -> attached"),
            Self::Attach {
                attachment,
                old: Some(_),
            } => write!(f, "gate on {attachment}: another build -> this build"),
            Self::RemoveLayout { layout } => write!(f, "gate layout {layout}: beside this one -> none"),
            Self::Detach { attachment } => write!(f, "gate on {attachment}: attached -> none"),
        }
    }
}

fn summary(table: &Table) -> String {
    format!(
        "{:?}, {} protected, {} owned, {} exempt, {} opted out",
        table.mode,
        table.protected.len(),
        table.owners.len(),
        table.exempt.len(),
        table.opted_out.len()
    )
    .to_lowercase()
}

/// Names what two equal-looking summaries would hide.
fn differences(f: &mut fmt::Formatter<'_>, old: &Table, new: &Table) -> fmt::Result {
    let path = |owner: Option<&Owner>| owner.map_or("none".to_owned(), |owner| owner.path.to_string());
    let mut differing = side_by_side(&old.owners, &new.owners).filter(|(_, before, after)| before != after);
    for (prefix, before, after) in differing.by_ref().take(NAMED) {
        write!(f, "; {prefix}: {} -> {}", path(before), path(after))?;
    }
    match differing.count() {
        0 => Ok(()),
        more => write!(f, "; and {more} prefixes more"),
    }
}
