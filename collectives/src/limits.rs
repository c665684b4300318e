//! Limits that the system sets for a process: how a program meets them, and how messages name them.
//!
//! The crate itself never makes the kernel send SIGXFSZ: it compares sizes with the limit before it
//! asks for them. So an embedding program keeps its own signal handlers. A program that writes
//! files of its own calls [`ignore_file_size_signal`] early in `main`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use signal_hook::consts::SIGXFSZ;

/// Has writes beyond `ulimit -f` return an error. Otherwise the kernel ends the process with
/// SIGXFSZ, and nothing can be said.
///
/// # Errors
/// When the system refuses a signal handler.
pub fn ignore_file_size_signal() -> io::Result<()> {
    // A handler, because programs that this process starts would inherit "ignore".
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map(|_| ())
}

/// The error in words. An error that stands for a limit of this process names the limit and the
/// remedy.
pub fn explain(error: &io::Error) -> String {
    let hint = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::FBIG) => file_size(),
        Some(Errno::MFILE) => {
            format!("this process may open {} files: raise `ulimit -n`", number(Resource::Nofile))
        }
        Some(Errno::NFILE) => "the system's table of open files is full: raise fs.file-max".to_owned(),
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}

/// Why a thread or process could not be started, in words. The kernel's own text for it,
/// "Resource temporarily unavailable", names no limit.
pub fn explain_thread(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::AGAIN) => format!(
            "{error}: the limit of processes and threads is reached (`ulimit -u` is {}; a container \
             or control group may have its own, pids.max): raise it, or start fewer ranks or threads",
            number(Resource::Nproc)
        ),
        Some(Errno::NOMEM) => format!("{error}: raise `ulimit -v`, or start fewer ranks or threads"),
        _ => explain(error),
    }
}

/// A number of bytes to read, in powers of 1024.
pub fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    match (1..=units.len()).rev().find(|&power| bytes >> (10 * power) > 0) {
        None => format!("{bytes} bytes"),
        Some(power) => format!("{:.2} {}", bytes as f64 / 1024f64.powi(power as i32), units[power - 1]),
    }
}

/// The error for a shared memory of so many bytes, where files may not grow as large.
pub(crate) fn check_file_size(bytes: u64) -> Result<(), crate::Error> {
    match getrlimit(Resource::Fsize).current {
        Some(limit) if limit < bytes => {
            let reason = format!("it needs room for {}, but {}", human(bytes), file_size());
            Err(crate::Error::System { what: "making the job's shared memory", reason })
        }
        _ => Ok(()),
    }
}

fn file_size() -> String {
    format!("files may grow to {} bytes: lift the limit with `ulimit -f unlimited`", number(Resource::Fsize))
}

fn number(resource: Resource) -> String {
    getrlimit(resource).current.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_in_the_largest_unit() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1.00 KiB"),
            (1_572_864, "1.50 MiB"),
            (5 << 30, "5.00 GiB"),
            (u64::MAX, "16.00 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn limits_are_named_with_the_remedy() {
        let text = |errno: Errno| explain(&errno.into());
        assert!(text(Errno::FBIG).contains("ulimit -f unlimited"));
        assert!(text(Errno::MFILE).contains("raise `ulimit -n`"));
        assert!(explain_thread(&Errno::AGAIN.into()).contains("`ulimit -u` is"));
        assert_eq!(text(Errno::NOENT), io::Error::from(Errno::NOENT).to_string());
    }
}
