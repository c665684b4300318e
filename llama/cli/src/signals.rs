//! Signals that ask a command to end.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::Error;

/// Is set when a signal asks the process to end; a second one ends it at once.
///
/// # Errors
/// When `/proc` does not say which signals are ignored.
pub(crate) fn flag() -> Result<Arc<AtomicBool>, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    let signals = pillion_collectives::stop::signals().map_err(|error| Error::file("/proc/self/status", error))?;
    for signal in signals {
        let register = || {
            signal_hook::flag::register_conditional_default(signal, stop.clone())?;
            signal_hook::flag::register(signal, stop.clone())
        };
        register().expect("these signals can be handled");
    }
    Ok(stop)
}
