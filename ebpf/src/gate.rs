//! The gate in the kernel: its maps, its programs, and where they hang.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::EbpfLoader;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, LpmTrie, Map, MapData, MapError, PerCpuHashMap, RingBuf};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError, SchedClassifier};
use shroud_gate::{Address, Count, CounterKey, Entry, Family, PREFIX_KEY_BITS, PrefixKey, Settings};
use shroud_model::Prefix;

use crate::attachment::{self, Place};
use crate::device::{self, Device};
use crate::diff::Build;
use crate::event::{self, Counter, Event};
use crate::object::{self, OBJECT};
use crate::pin::{self, Pins};
use crate::sorted::side_by_side;
use crate::table::{Encoded, address, ip};
use crate::{Attach, Attachment, Change, Error, Hook, Mechanism, Observed, Table};

const PREFIXES: &str = "PREFIXES";
const SETTINGS: &str = "SETTINGS";
const ACTIVE: &str = "ACTIVE";
const COUNTERS: &str = "COUNTERS";
const EVENTS: &str = "EVENTS";
const EVENT_BUDGET: &str = "EVENT_BUDGET";
const MAPS: [&str; 6] = [PREFIXES, SETTINGS, ACTIVE, COUNTERS, EVENTS, EVENT_BUDGET];

const PROGRAMS: [&str; 8] = [
    "shroud_egress",
    "shroud_ingress",
    "shroud_pod",
    "shroud_l3_out",
    "shroud_l3_in",
    "shroud_l3_pod",
    "shroud_decrypt",
    "shroud_l3_decr",
];

/// So many events are handed out at once; the rest waits for the next call.
const EVENTS_AT_ONCE: usize = 4096;

/// How often a load is tried that a signal disturbed, before the signal is taken seriously.
const LOAD_ATTEMPTS: u32 = 10;

/// Where the gate lives and how it is attached.
#[derive(Debug, Clone)]
pub struct Options {
    /// A directory on a BPF file system; each node needs its own. Default `/sys/fs/bpf/shroud`.
    pub pin_directory: PathBuf,
    /// How programs are attached.
    pub attach: Attach,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pin_directory: PathBuf::from("/sys/fs/bpf/shroud"),
            attach: Attach::Auto,
        }
    }
}

/// What a cleanup removed, and what it could not.
#[derive(Debug, Default)]
#[must_use]
pub struct Removed {
    /// What was removed, for people.
    pub removed: Vec<String>,
    /// What could not be.
    pub errors: Vec<Error>,
}

/// The gate of this network namespace. Dropping it changes nothing in the kernel.
pub struct Gate {
    pins: Pins,
    build: String,
    mechanism: Mechanism,
    programs: BTreeMap<&'static str, Program>,
    /// The tcx links of ours, open: somebody who removes their pins detaches nothing as long as we live.
    links: BTreeMap<(u32, Hook), FdLink>,
    maps: BTreeMap<&'static str, MapData>,
    prefixes: LpmTrie<MapData, [u8; size_of::<PrefixKey>()], RawEntry>,
    settings: Array<MapData, [u8; size_of::<Settings>()]>,
    active: Array<MapData, u32>,
    /// What was written to each generation since somebody last looked; nothing where that is not known.
    written: [Option<BTreeMap<Slot, RawEntry>>; 2],
    counters: PerCpuHashMap<MapData, [u8; size_of::<CounterKey>()], [u8; size_of::<Count>()]>,
    events: RingBuf<MapData>,
}

type RawKey = Key<[u8; size_of::<PrefixKey>()]>;
type RawEntry = [u8; size_of::<Entry>()];
/// Where an entry is: the length of its key, and the key.
type Slot = (u32, [u8; size_of::<PrefixKey>()]);

struct Program {
    handle: SchedClassifier,
    id: u32,
}

impl Gate {
    /// Opens the gate that an earlier process pinned, or loads a new one. Attaches nothing.
    ///
    /// # Errors
    /// [`Error::NotBpffs`] if the pin directory would not outlive the process, [`Error::Load`] if the kernel refuses the program.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let pins = Pins::new(&options.pin_directory);
        let build = object::fingerprint();
        pins.prepare(&build)?;
        let handles = match pinned_programs(&pins, &build)? {
            Some(handles) => handles,
            None => load(&pins, &build)?,
        };
        let mut programs = BTreeMap::new();
        for (name, handle) in handles {
            let id = program_error("look at", name, handle.info())?.id();
            programs.insert(name, Program { handle, id });
        }
        remove_other_builds(&pins, &build)?;
        Ok(Self {
            mechanism: options.attach.choose(),
            programs,
            links: BTreeMap::new(),
            maps: MAPS
                .into_iter()
                .map(|name| Ok((name, open_map(&pins, name)?)))
                .collect::<Result<_, Error>>()?,
            prefixes: typed(&pins, PREFIXES, Map::LpmTrie)?,
            settings: typed(&pins, SETTINGS, Map::Array)?,
            active: typed(&pins, ACTIVE, Map::Array)?,
            written: [None, None],
            counters: typed(&pins, COUNTERS, Map::PerCpuHashMap)?,
            events: typed(&pins, EVENTS, Map::RingBuf)?,
            pins,
            build,
        })
    }

    /// Reads back from the kernel what is attached and what the maps in force hold. What was known of them before is forgotten.
    ///
    /// # Errors
    /// Any question the kernel would not answer.
    pub fn observe(&mut self) -> Result<Observed, Error> {
        self.written = [None, None];
        let devices = device::devices()?;
        // First: it opens the links.
        let attachments = self.attachments(&devices)?;
        Ok(Observed {
            mechanism: self.mechanism,
            attachments,
            table: self.read_table()?,
            missing_pins: self.missing_pins(),
            stale_pins: self.stale_pins(&devices)?,
            other_layouts: self
                .pins
                .other_layouts()?
                .iter()
                .filter_map(|path| name_of(path))
                .collect(),
        })
    }

    /// Makes one change.
    ///
    /// # Errors
    /// What could not be done. The gate that was in force then still is.
    pub fn apply(&mut self, change: &Change) -> Result<(), Error> {
        match change {
            Change::Pin { missing } => self.pin(missing),
            Change::ReplaceTable { new, .. } => self.replace_table(new),
            Change::Attach { attachment, .. } => self.attach(attachment),
            Change::Detach { attachment } => self.detach(attachment),
            Change::Unpin { stale } => self.unpin(stale),
            Change::RemoveLayout { layout } => self.remove_layout(layout),
        }
    }

    /// What was counted, ordered by node, reason, direction and family.
    ///
    /// # Errors
    /// [`Error::Map`] if the map cannot be read.
    pub fn counters(&self) -> Result<Vec<Counter>, Error> {
        event::read(&self.counters)
    }

    /// What was dropped since the last call; by anyone who asks, so ask from one place.
    pub fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while events.len() < EVENTS_AT_ONCE {
            let Some(item) = self.events.next() else { break };
            events.extend(event::event(&item));
        }
        events
    }

    /// Removes all that is ours in this network namespace and under the pin directory. For `shroud cleanup`: from here on nothing is
    /// encrypted and nothing is dropped.
    pub fn remove(options: &Options) -> Removed {
        let mut removed = Removed::default();
        let devices = removed.kept(device::devices()).unwrap_or_default();
        removed.filters(&devices);
        removed.links(&options.pin_directory, &devices);
        removed.pins(&options.pin_directory);
        removed
    }

    fn attachments(&mut self, devices: &BTreeMap<String, Device>) -> Result<BTreeMap<Attachment, Build>, Error> {
        let with_clsact = device::with_clsact()?;
        let mut found = BTreeMap::new();
        for device in devices.values() {
            for hook in Hook::ALL {
                let place = Place { device, hook };
                let tcx_program = self.tcx_program(&place)?;
                let mut add = |mechanism, program: Option<u32>| {
                    let Some(id) = program else { return };
                    let attachment = Attachment {
                        device: device.name.clone(),
                        hook,
                        mechanism,
                    };
                    found.insert(attachment, self.build_of(id, device, hook));
                };
                add(Mechanism::Tcx, tcx_program);
                if with_clsact.contains(&device.index) {
                    add(Mechanism::Clsact, place.clsact_program()?);
                }
            }
        }
        let there: BTreeSet<u32> = devices.values().map(|device| device.index).collect();
        self.links.retain(|(index, _), _| there.contains(index));
        Ok(found)
    }

    /// The program of ours that hangs at a place by a tcx link, whose pin somebody may have removed.
    fn tcx_program(&mut self, place: &Place<'_>) -> Result<Option<u32>, Error> {
        let key = (place.device.index, place.hook);
        let pin = self.pins.link(key.0, key.1);
        if let Some(link) = attachment::pinned_link(&pin)? {
            self.links.insert(key, link);
        }
        let Some(link) = self.links.get(&key) else {
            return Ok(None);
        };
        let program = place.program_behind(link, &pin)?;
        if program.is_none() {
            self.links.remove(&key);
        }
        Ok(program)
    }

    fn build_of(&self, id: u32, device: &Device, hook: Hook) -> Build {
        let Ok(link) = device.link else { return Build::Other };
        match self.programs.get(hook.program(link)) {
            Some(program) if program.id == id => Build::Current,
            Some(_) | None => Build::Other,
        }
    }

    fn attach(&mut self, attachment: &Attachment) -> Result<(), Error> {
        let Some(device) = device::devices()?.remove(&attachment.device) else {
            return Err(Error::NoDevice {
                device: attachment.device.clone(),
            });
        };
        let link = device.link.clone().map_err(|kind| Error::LinkType {
            device: attachment.device.clone(),
            kind,
        })?;
        let hook = attachment.hook;
        let name = hook.program(link);
        let program = self.programs.get_mut(name).ok_or(Error::Object { name })?;
        let place = Place { device: &device, hook };
        match attachment.mechanism {
            Mechanism::Tcx => {
                self.pins.prepare(&self.build)?;
                let link = place.attach_tcx(&mut program.handle, &self.pins.link(device.index, hook))?;
                self.links.insert((device.index, hook), link);
                Ok(())
            }
            Mechanism::Clsact => place.attach_clsact(&mut program.handle),
        }
    }

    fn detach(&mut self, attachment: &Attachment) -> Result<(), Error> {
        // With the device goes whatever hung on it.
        let Some(device) = device::devices()?.remove(&attachment.device) else {
            return Ok(());
        };
        let place = Place {
            device: &device,
            hook: attachment.hook,
        };
        self.links.remove(&(device.index, attachment.hook));
        match attachment.mechanism {
            Mechanism::Tcx => place
                .detach_tcx(&self.pins.link(device.index, attachment.hook))
                .map(drop),
            Mechanism::Clsact => place.detach_clsact(),
        }
    }

    /// Removing a link's pin detaches its program; this layout's program already hangs there.
    fn remove_layout(&self, layout: &str) -> Result<(), Error> {
        for path in self.pins.other_layouts()? {
            if name_of(&path).as_deref() == Some(layout) {
                fs::remove_dir_all(&path).map_err(|source| Error::Path {
                    operation: "remove",
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn missing_pins(&self) -> BTreeSet<String> {
        let maps = MAPS.into_iter().filter(|name| !self.pins.map(name).exists());
        let programs = PROGRAMS
            .into_iter()
            .filter(|name| !self.pins.program(&self.build, name).exists());
        let links = self
            .links
            .keys()
            .filter(|(index, hook)| !self.pins.link(*index, *hook).exists());
        let links = links.map(|(index, hook)| link_name(*index, *hook));
        maps.chain(programs).map(str::to_owned).chain(links).collect()
    }

    /// What is left of devices that are gone: a link that holds nothing is kept by its pin all the same.
    fn stale_pins(&self, devices: &BTreeMap<String, Device>) -> Result<BTreeSet<String>, Error> {
        let is_there = |name: &str| {
            let index = name.split('-').next().and_then(|index| index.parse().ok());
            index.is_none_or(|index: u32| devices.values().any(|device| device.index == index))
        };
        let names = pin::list(&self.pins.links())?;
        let names = names.iter().filter_map(|path| path.file_name()?.to_str());
        Ok(names.filter(|name| !is_there(name)).map(str::to_owned).collect())
    }

    fn unpin(&self, stale: &BTreeSet<String>) -> Result<(), Error> {
        for name in stale {
            pin::remove(&self.pins.links().join(name))?;
        }
        Ok(())
    }

    fn pin(&mut self, missing: &BTreeSet<String>) -> Result<(), Error> {
        self.pins.prepare(&self.build)?;
        for (name, map) in self.maps.iter().filter(|(name, _)| missing.contains(**name)) {
            let path = self.pins.map(name);
            map.pin(&path).map_err(|source| Error::Pin { path, source })?;
        }
        for (name, program) in self.programs.iter_mut().filter(|(name, _)| missing.contains(**name)) {
            let path = self.pins.program(&self.build, name);
            program
                .handle
                .pin(&path)
                .map_err(|source| Error::Pin { path, source })?;
        }
        let places: Vec<(u32, Hook)> = self.links.keys().copied().collect();
        for (index, hook) in places {
            let path = self.pins.link(index, hook);
            if missing.contains(&link_name(index, hook))
                && let Some(link) = self.links.remove(&(index, hook))
            {
                // One that cannot be pinned is gone, and the next pass attaches anew.
                let link = link.pin(&path).map_err(|source| Error::Pin { path, source })?;
                self.links.insert((index, hook), link.into());
            }
        }
        let maps = ids(self.maps.iter().map(|(name, map)| (*name, map)))?;
        self.pins.note_reads(&self.build, &maps)
    }

    fn read_table(&self) -> Result<Option<Table>, Error> {
        let generation = self.generation()?;
        let settings = map_error("read", SETTINGS, self.settings.get(&u32::from(generation), 0))?;
        let settings = Settings::from_bytes(&settings);
        let mut entries = BTreeMap::new();
        for (key, entry) in self.read_generation(generation)? {
            let Some(prefix) = prefix(key.prefix_len(), &PrefixKey::from_bytes(&key.data())) else {
                return Ok(None);
            };
            entries.insert(prefix, Entry::from_bytes(&entry));
        }
        Ok(Encoded { settings, entries }.decode())
    }

    /// All entries of one generation.
    fn read_generation(&self, generation: u8) -> Result<Vec<(RawKey, RawEntry)>, Error> {
        let mut entries = Vec::new();
        for key in self.prefixes.keys() {
            let key = map_error("read", PREFIXES, key)?;
            if PrefixKey::from_bytes(&key.data()).generation != generation {
                continue;
            }
            match self.prefixes.get(&key, 0) {
                Ok(entry) => entries.push((key, entry)),
                // Somebody took it away meanwhile.
                Err(MapError::KeyNotFound) => {}
                Err(error) => return map_error("read", PREFIXES, Err(error)),
            }
        }
        Ok(entries)
    }

    /// Fills the generation that no packet reads, then switches with one write. It holds the table before last, which in a large mesh
    /// differs in a few entries of thousands; only those are written.
    fn replace_table(&mut self, table: &Table) -> Result<(), Error> {
        let next = 1 - self.generation()?;
        let encoded = table.encode()?;
        let wanted: BTreeMap<Slot, RawEntry> = encoded
            .entries
            .iter()
            .map(|(prefix, entry)| {
                let key = PrefixKey::new(next, &address(prefix.address()));
                let length = PREFIX_KEY_BITS + u32::from(prefix.length());
                ((length, key.to_bytes()), entry.to_bytes())
            })
            .collect();
        let holds = match self.written[usize::from(next)].take() {
            Some(written) => written,
            None => {
                let entries = self.read_generation(next)?.into_iter();
                entries
                    .map(|(key, entry)| ((key.prefix_len(), key.data()), entry))
                    .collect()
            }
        };
        for ((length, key), _, wanted) in side_by_side(&holds, &wanted) {
            if wanted.is_none() {
                map_error("empty", PREFIXES, self.prefixes.remove(&Key::new(*length, *key)))?;
            }
        }
        for ((length, key), holds, wanted) in side_by_side(&holds, &wanted) {
            if let Some(entry) = wanted.filter(|_| wanted != holds) {
                let key = Key::new(*length, *key);
                map_error("fill", PREFIXES, self.prefixes.insert(&key, *entry, 0))?;
            }
        }
        map_error(
            "fill",
            SETTINGS,
            self.settings.set(u32::from(next), encoded.settings.to_bytes(), 0),
        )?;
        map_error("switch", ACTIVE, self.active.set(0, u32::from(next), 0))?;
        self.written[usize::from(next)] = Some(wanted);
        Ok(())
    }

    fn generation(&self) -> Result<u8, Error> {
        let active = map_error("read", ACTIVE, self.active.get(&0, 0))?;
        Ok(u8::from(active & 1 == 1))
    }
}

/// The programs of this build, if an earlier process pinned them and they read the maps that are pinned.
fn pinned_programs(pins: &Pins, build: &str) -> Result<Option<Vec<(&'static str, SchedClassifier)>>, Error> {
    if MAPS.iter().any(|name| !pins.map(name).exists()) {
        return Ok(None);
    }
    if !pins.reads(build, &pinned_ids(pins)?).exists() {
        return Ok(None);
    }
    let mut programs = Vec::new();
    for name in PROGRAMS {
        let path = pins.program(build, name);
        if !path.exists() {
            return Ok(None);
        }
        let program = program_error("open pinned", name, SchedClassifier::from_pin(&path))?;
        programs.push((name, program));
    }
    Ok(Some(programs))
}

/// The numbers by which the kernel knows the pinned maps.
fn pinned_ids(pins: &Pins) -> Result<Vec<u32>, Error> {
    let maps = MAPS.map(|name| Ok((name, open_map(pins, name)?)));
    let maps: Vec<(&'static str, MapData)> = maps.into_iter().collect::<Result<_, Error>>()?;
    ids(maps.iter().map(|(name, map)| (*name, map)))
}

/// The numbers of maps, in order. No two maps have the same number, also not one after the other.
fn ids<'a>(maps: impl Iterator<Item = (&'static str, &'a MapData)>) -> Result<Vec<u32>, Error> {
    let id = |(name, map): (&'static str, &MapData)| Ok(map_error("look at", name, map.info())?.id());
    let mut ids: Vec<u32> = maps.map(id).collect::<Result<_, Error>>()?;
    ids.sort_unstable();
    Ok(ids)
}

/// Loads this build onto the pinned maps (making those that are missing), and pins it.
fn load(pins: &Pins, build: &str) -> Result<Vec<(&'static str, SchedClassifier)>, Error> {
    let mut loader = EbpfLoader::new();
    for name in MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
    let mut object = loader.load(OBJECT).map_err(|source| Error::Load { source })?;
    pins.forget_reads(build)?;
    let mut programs = Vec::new();
    for name in PROGRAMS {
        let program = object.program_mut(name).ok_or(Error::Object { name })?;
        let program: &mut SchedClassifier = program_error("find", name, program.try_into())?;
        program_error("load", name, load_undisturbed(program))?;
        let path = pins.program(build, name);
        pin::remove(&path)?;
        program.pin(&path).map_err(|source| Error::Pin {
            path: path.clone(),
            source,
        })?;
        programs.push((
            name,
            program_error("open pinned", name, SchedClassifier::from_pin(&path))?,
        ));
    }
    pins.note_reads(build, &pinned_ids(pins)?)?;
    tracing::info!(build, "loaded the gate's program");
    Ok(programs)
}

/// The verifier gives up with EAGAIN when a signal comes in; a signal says nothing about the program.
fn load_undisturbed(program: &mut SchedClassifier) -> Result<(), ProgramError> {
    for _ in 0..LOAD_ATTEMPTS {
        match program.load() {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
    program.load()
}

/// Other builds live on as long as they are attached; their pins have no more use.
fn remove_other_builds(pins: &Pins, build: &str) -> Result<(), Error> {
    for directory in pin::list(&pins.programs())? {
        if !directory.ends_with(build) {
            fs::remove_dir_all(&directory).map_err(|source| Error::Path {
                operation: "remove",
                path: directory.clone(),
                source,
            })?;
        }
    }
    Ok(())
}

/// A layout's name, if it looks like one (`v1`): what else somebody keeps under the pin directory is not ours.
fn name_of(layout: &Path) -> Option<String> {
    let name = layout.file_name()?.to_str()?;
    let number = name.strip_prefix('v')?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then(|| name.to_owned())
}

/// What a link's pin is called among those that are missing.
fn link_name(index: u32, hook: Hook) -> String {
    format!("link {index}-{hook}")
}

fn open_map(pins: &Pins, name: &'static str) -> Result<MapData, Error> {
    map_error("open pinned", name, MapData::from_pin(pins.map(name)))
}

fn typed<M>(pins: &Pins, name: &'static str, variant: fn(MapData) -> Map) -> Result<M, Error>
where
    M: TryFrom<Map, Error = MapError>,
{
    map_error("open pinned", name, M::try_from(variant(open_map(pins, name)?)))
}

fn prefix(length: u32, key: &PrefixKey) -> Option<Prefix> {
    let address = ip(&Address {
        family: Family::from_number(key.family)?,
        bytes: key.address,
    });
    let length = u8::try_from(length.checked_sub(PREFIX_KEY_BITS)?).ok()?;
    Prefix::containing(address, length)
        .filter(|prefix: &Prefix| prefix.address() == address && is_v4_clean(address, key))
}

/// An IPv4 key has nothing behind its four bytes.
fn is_v4_clean(address: IpAddr, key: &PrefixKey) -> bool {
    address.is_ipv6() || key.address[4..].iter().all(|byte| *byte == 0)
}

fn map_error<T>(operation: &'static str, name: &'static str, result: Result<T, MapError>) -> Result<T, Error> {
    result.map_err(|source| Error::Map {
        operation,
        name,
        source,
    })
}

fn program_error<T>(operation: &'static str, name: &'static str, result: Result<T, ProgramError>) -> Result<T, Error> {
    result.map_err(|source| Error::Program {
        operation,
        name,
        source,
    })
}

impl Removed {
    fn filters(&mut self, devices: &BTreeMap<String, Device>) {
        let Some(with_clsact) = self.kept(device::with_clsact()) else {
            return;
        };
        for device in devices.values().filter(|device| with_clsact.contains(&device.index)) {
            for hook in Hook::ALL {
                let place = Place { device, hook };
                if let Some(Some(_)) = self.kept(place.clsact_program())
                    && self.kept(place.detach_clsact()).is_some()
                {
                    self.removed.push(format!("filter on {} {hook}", device.name));
                }
            }
        }
    }

    fn links(&mut self, directory: &Path, devices: &BTreeMap<String, Device>) {
        for pins in self
            .kept(pin::list(directory))
            .unwrap_or_default()
            .into_iter()
            .map(Pins::of_layout)
        {
            for device in devices.values() {
                for hook in Hook::ALL {
                    let place = Place { device, hook };
                    if let Some(true) = self.kept(place.detach_tcx(&pins.link(device.index, hook))) {
                        self.removed.push(format!("link on {} {hook}", device.name));
                    }
                }
            }
        }
    }

    fn pins(&mut self, directory: &Path) {
        if !directory.exists() {
            return;
        }
        let result = match fs::remove_dir_all(directory) {
            // A folder of the node that is mounted into a container cannot go, but all that was in it has.
            Err(_) if pin::list(directory).is_ok_and(|left| left.is_empty()) => Ok(()),
            result => result.map_err(|source| Error::Path {
                operation: "remove",
                path: directory.into(),
                source,
            }),
        };
        if self.kept(result).is_some() {
            self.removed.push(format!("pins {}", directory.display()));
        }
    }

    fn kept<T>(&mut self, result: Result<T, Error>) -> Option<T> {
        result.map_err(|error| self.errors.push(error)).ok()
    }
}
