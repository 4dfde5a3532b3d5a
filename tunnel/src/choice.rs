//! Which backend to use on this machine.

use std::fs;

use crate::{Backend, Error, kernel};

/// What the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The kernel where it can, userspace where it cannot.
    #[default]
    Auto,
    /// The kernel or nothing.
    Kernel,
    /// Userspace or nothing.
    Userspace,
}

/// A backend, and why it is that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The backend.
    pub backend: Backend,
    /// One sentence for people.
    pub because: String,
}

/// Looks what this machine can, and decides. Leaves nothing behind, apart from a kernel module that the question may load.
///
/// # Errors
/// [`Error::NoKernelWireGuard`] or [`Error::NoTun`] when what is wanted is not there.
pub fn choose(wanted: Wanted) -> Result<Choice, Error> {
    match wanted {
        Wanted::Userspace => userspace("the configuration says so".to_owned()),
        Wanted::Kernel => match kernel::probe() {
            Ok(()) => Ok(Choice {
                backend: Backend::Kernel,
                because: "the configuration says so".to_owned(),
            }),
            Err(reason) => Err(Error::NoKernelWireGuard(reason)),
        },
        Wanted::Auto => match kernel::probe() {
            Ok(()) => Ok(Choice {
                backend: Backend::Kernel,
                because: "this kernel has WireGuard".to_owned(),
            }),
            Err(reason) => userspace(reason),
        },
    }
}

fn userspace(because: String) -> Result<Choice, Error> {
    fs::metadata("/dev/net/tun").map_err(Error::NoTun)?;
    Ok(Choice {
        backend: Backend::Userspace,
        because,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_agrees_with_what_the_kernel_can() {
        let choice = choose(Wanted::Auto).unwrap();

        match kernel::probe() {
            Ok(()) => assert_eq!(choice.backend, Backend::Kernel),
            Err(reason) => {
                assert_eq!(
                    choice,
                    Choice {
                        backend: Backend::Userspace,
                        because: reason
                    }
                );
                assert!(matches!(choose(Wanted::Kernel), Err(Error::NoKernelWireGuard(_))));
            }
        }
        assert_eq!(choose(Wanted::Userspace).unwrap().backend, Backend::Userspace);
    }
}
