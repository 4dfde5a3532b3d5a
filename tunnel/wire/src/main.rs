//! `shroud-wire DEVICE [SOCKET-DIRECTORY]`: the data plane as a program of its own, for tests and for hosts without the agent.

use std::process::ExitCode;

use shroud_wire::{Error, LOG_FILTER, Options};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    // Whoever reads the log may die before us. The complaint about that would go to the same broken pipe, and be a panic.
    tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let mut arguments = std::env::args().skip(1);
    let Some(device) = arguments.next() else {
        tracing::error!("usage: shroud-wire DEVICE [SOCKET-DIRECTORY]");
        return ExitCode::from(2);
    };
    let mut options = Options::new(device);
    if let Some(folder) = arguments.next() {
        options.socket_dir = folder.into();
    }
    match shroud_wire::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            match error {
                // As `shroud wire` ends.
                Error::DeviceBusy(_) | Error::DeviceForeign(_) => ExitCode::from(4),
                Error::DeviceName(_) | Error::AlreadyRunning { .. } | Error::DeviceGone(_) | Error::System { .. } => {
                    ExitCode::FAILURE
                }
            }
        }
    }
}
