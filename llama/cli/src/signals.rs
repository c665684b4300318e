//! Signals that ask a command to end.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::Error;

/// What a second signal does.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Second {
    /// Nothing more.
    Waits,
    /// Ends the process at once.
    Ends,
}

/// Is set when a signal asks the process to end.
///
/// # Errors
/// When `/proc` does not say which signals are ignored.
pub(crate) fn flag(second: Second) -> Result<Arc<AtomicBool>, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    let signals = pillion_collectives::stop::signals().map_err(|error| Error::file("/proc/self/status", error))?;
    for signal in signals {
        let register = || {
            if second == Second::Ends {
                signal_hook::flag::register_conditional_default(signal, stop.clone())?;
            }
            signal_hook::flag::register(signal, stop.clone())
        };
        register().expect("these signals can be handled");
    }
    Ok(stop)
}
