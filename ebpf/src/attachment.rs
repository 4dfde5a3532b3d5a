//! Holds a program to a device, and lets it go.
//!
//! tcx (Linux 6.6): a link, which lives as long as its pin. clsact (older): a filter, which lives as long as the device, and which we
//! know again by its handle, priority and name. Either way a new program takes the place of an old one in one step.

use std::fmt;
use std::fs;
use std::io;
use std::mem;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, Link as _, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{
    self, NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcAttachType, TcHandle,
};
use aya::programs::{ProgramError, SchedClassifier};
use shroud_gate::Link;

use crate::device::{self, Device, Filter, Side};
use crate::{Error, pin};

/// Names of our programs begin with this.
pub(crate) const PREFIX: &str = "shroud_";

/// Ours come first among the filters of a device: a filter before ours could accept a packet that we would have dropped.
const PRIORITY: u16 = 1;

/// More than the kernel takes to let go of a link without pins.
const LINK_RELEASE: Duration = Duration::from_millis(500);

/// "SH": the upper half of our filters' handles.
const HANDLE: u16 = 0x5348;

/// How programs are to be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Attach {
    /// tcx where the kernel has it, clsact otherwise.
    #[default]
    Auto,
    /// tcx.
    Tcx,
    /// clsact.
    Clsact,
}

/// How programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mechanism {
    /// A tcx link.
    Tcx,
    /// A filter on the clsact qdisc.
    Clsact,
}

/// Where on a device a program hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// What leaves by an uplink.
    Egress,
    /// What comes in by an uplink.
    Ingress,
    /// What comes in from a pod.
    Pod,
    /// What the encryption device has decrypted.
    Decrypted,
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Pod => "pod",
            Self::Decrypted => "decrypted",
        })
    }
}

impl Attach {
    /// Chooses by trying: a kernel without tcx does not know the question.
    pub(crate) fn choose(self) -> Mechanism {
        match self {
            Self::Tcx => Mechanism::Tcx,
            Self::Clsact => Mechanism::Clsact,
            Self::Auto if SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok() => Mechanism::Tcx,
            Self::Auto => Mechanism::Clsact,
        }
    }
}

impl Hook {
    pub(crate) const ALL: [Self; 4] = [Self::Egress, Self::Ingress, Self::Pod, Self::Decrypted];

    /// The program for this hook on such a device.
    pub(crate) fn program(self, link: Link) -> &'static str {
        match (self, link) {
            (Self::Egress, Link::Ethernet) => "shroud_egress",
            (Self::Ingress, Link::Ethernet) => "shroud_ingress",
            (Self::Pod, Link::Ethernet) => "shroud_pod",
            (Self::Egress, Link::Ip) => "shroud_l3_out",
            (Self::Ingress, Link::Ip) => "shroud_l3_in",
            (Self::Pod, Link::Ip) => "shroud_l3_pod",
            (Self::Decrypted, Link::Ethernet) => "shroud_decrypt",
            (Self::Decrypted, Link::Ip) => "shroud_l3_decr",
        }
    }

    fn handle(self) -> TcHandle {
        match self {
            Self::Egress => TcHandle::new(HANDLE, 1),
            Self::Ingress => TcHandle::new(HANDLE, 2),
            Self::Pod => TcHandle::new(HANDLE, 3),
            Self::Decrypted => TcHandle::new(HANDLE, 4),
        }
    }

    fn side(self) -> Side {
        match self {
            Self::Egress => Side::Egress,
            Self::Ingress | Self::Pod | Self::Decrypted => Side::Ingress,
        }
    }

    fn attach_type(self) -> TcAttachType {
        match self.side() {
            Side::Egress => TcAttachType::Egress,
            Side::Ingress => TcAttachType::Ingress,
        }
    }
}

/// One hook of one device, with the means to reach it.
pub(crate) struct Place<'a> {
    pub(crate) device: &'a Device,
    pub(crate) hook: Hook,
}

impl Place<'_> {
    /// The program behind our pinned tcx link, if the link still holds it to this very device.
    fn tcx_program(&self, pin: &Path) -> Result<Option<u32>, Error> {
        match pinned_link(pin)? {
            Some(link) => self.program_behind(&link, pin),
            None => Ok(None),
        }
    }

    /// The program behind a tcx link of ours that is, or was, pinned at `pin`, if the link still holds it to this very device.
    pub(crate) fn program_behind(&self, link: &FdLink, pin: &Path) -> Result<Option<u32>, Error> {
        let failed = |source| Error::Link {
            operation: "look at",
            path: pin.into(),
            source,
        };
        let info = link.info().map_err(failed)?;
        let device = device_of(info.id()).map_err(|source| Error::Path {
            operation: "find the device of link",
            path: pin.into(),
            source,
        })?;
        Ok((device == Some(self.device.index)).then_some(info.program_id()))
    }

    /// The program behind our filter, if the device has it. The device must have a clsact qdisc.
    pub(crate) fn clsact_program(&self) -> Result<Option<u32>, Error> {
        let filters = device::filters(self.device.index, self.hook.side())?;
        Ok(filters
            .iter()
            .find(|filter| self.is_ours(filter))
            .map(|filter| filter.program))
    }

    fn is_ours(&self, filter: &Filter) -> bool {
        filter.handle == u32::from(self.hook.handle()) && filter.priority == PRIORITY && filter.name.starts_with(PREFIX)
    }

    /// Attaches a program by a tcx link pinned at `pin`, or puts it in the place of the one that hangs there.
    /// Returns the link: whoever keeps it open keeps the program there, whatever becomes of the pin.
    pub(crate) fn attach_tcx(&self, program: &mut SchedClassifier, pin: &Path) -> Result<FdLink, Error> {
        let failed = |source| self.failed("attach to", Mechanism::Tcx, source);
        let is_live = self.tcx_program(pin)?.is_some();
        if let Some(link) = pinned_link(pin)?.filter(|_| is_live) {
            let link = SchedClassifierLink::try_from(link).map_err(|source| Error::Link {
                operation: "open",
                path: pin.into(),
                source,
            })?;
            let id = program.attach_to_link(link).map_err(failed)?;
            return self.take(program, id, pin);
        }
        // What is left of a device that is gone.
        pin::remove(pin)?;
        let id = self.attach_when_free(program).map_err(failed)?;
        let link = self.take(program, id, pin)?;
        let pinned = link.pin(pin).map_err(|source| Error::Pin {
            path: pin.into(),
            source,
        })?;
        Ok(pinned.into())
    }

    /// The link by which a program was attached.
    fn take(&self, program: &mut SchedClassifier, id: SchedClassifierLinkId, pin: &Path) -> Result<FdLink, Error> {
        let link = program
            .take_link(id)
            .map_err(|source| self.failed("attach to", Mechanism::Tcx, source))?;
        FdLink::try_from(link).map_err(|source| Error::Link {
            operation: "take",
            path: pin.into(),
            source,
        })
    }

    /// Removes our pinned tcx link and waits until the kernel has let go of it. Says whether it held a program to this device.
    pub(crate) fn detach_tcx(&self, pin: &Path) -> Result<bool, Error> {
        let program = self.tcx_program(pin)?;
        pin::remove(pin)?;
        let until = Instant::now() + LINK_RELEASE;
        while program.is_some_and(|program| self.hangs(program)) && Instant::now() < until {
            thread::sleep(LINK_RELEASE / 100);
        }
        Ok(program.is_some())
    }

    /// A device that cannot be asked any more has nothing hanging on it. Nor has one about which we may not ask (CAP_SYS_ADMIN): then nobody
    /// waits, and whoever attaches next does.
    fn hangs(&self, program: u32) -> bool {
        let attached = SchedClassifier::query_tcx(&self.device.name, self.hook.attach_type());
        attached.is_ok_and(|(_, attached)| attached.iter().any(|info| info.id() == program))
    }

    /// Attaches a program before all others.
    ///
    /// The kernel lets go of a link some time after its last pin is gone, and until then refuses the same program on the same device.
    fn attach_when_free(&self, program: &mut SchedClassifier) -> Result<SchedClassifierLinkId, ProgramError> {
        let until = Instant::now() + LINK_RELEASE;
        loop {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            match program.attach_with_options(&self.device.name, self.hook.attach_type(), options) {
                Err(ProgramError::SyscallError(error))
                    if error.io_error.kind() == io::ErrorKind::AlreadyExists && Instant::now() < until =>
                {
                    thread::sleep(LINK_RELEASE / 100);
                }
                result => return result,
            }
        }
    }

    /// Attaches a program by a filter, or puts it in the place of the one that hangs there.
    pub(crate) fn attach_clsact(&self, program: &mut SchedClassifier) -> Result<(), Error> {
        let failed = |source| self.failed("attach to", Mechanism::Clsact, source);
        let name = &self.device.name;
        let has_qdisc = device::with_clsact()?.contains(&self.device.index);
        if !has_qdisc {
            tc::qdisc_add_clsact(name).map_err(|source| Error::Qdisc {
                device: name.clone(),
                source,
            })?;
        }
        let id = if has_qdisc && self.clsact_program()?.is_some() {
            program.attach_to_link(self.filter()?).map_err(failed)?
        } else {
            let options = NlOptions {
                priority: PRIORITY,
                handle: self.hook.handle(),
                classid: None,
            };
            let options = TcAttachOptions::Netlink(options);
            program
                .attach_with_options(name, self.hook.attach_type(), options)
                .map_err(failed)?
        };
        // Dropping it would detach it.
        mem::forget(program.take_link(id).map_err(failed)?);
        Ok(())
    }

    /// Removes our filter.
    pub(crate) fn detach_clsact(&self) -> Result<(), Error> {
        self.filter()?
            .detach()
            .map_err(|source| self.failed("detach from", Mechanism::Clsact, source))
    }

    fn filter(&self) -> Result<SchedClassifierLink, Error> {
        let (name, hook) = (&self.device.name, self.hook);
        SchedClassifierLink::attached(name, hook.attach_type(), PRIORITY, hook.handle(), None)
            .map_err(|source| self.failed("find", Mechanism::Clsact, ProgramError::IOError(source)))
    }

    fn failed(&self, operation: &'static str, mechanism: Mechanism, source: ProgramError) -> Error {
        Error::Attachment {
            operation,
            device: self.device.name.clone(),
            hook: self.hook,
            mechanism,
            source,
        }
    }
}

/// The index of the device to which an open link of ours holds its program; 0 when it holds to none any more.
///
/// Read from what `/proc` says of our own open files (since Linux 6.6, like tcx). To ask for the programs of a device instead takes
/// CAP_SYS_ADMIN, and this question is the only one of ours that would.
fn device_of(link: u32) -> io::Result<Option<u32>> {
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        match fs::read_to_string(entry?.path()) {
            Ok(text) if field(&text, "link_id") == Some(link) => return Ok(field(&text, "ifindex")),
            Ok(_) => {}
            // Another thread has closed it since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The number behind `name:` on one of the lines.
fn field(text: &str, name: &str) -> Option<u32> {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok();
    text.lines().find_map(value)
}

/// The link that is pinned there, if one is.
pub(crate) fn pinned_link(path: &Path) -> Result<Option<FdLink>, Error> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Link {
            operation: "open",
            path: path.into(),
            source,
        }),
    }
}
