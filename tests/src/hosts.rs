//! Two hosts on this machine: network namespaces with a link of 1 Gbit/s between them, made by the
//! scripts in `tests/hosts`.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::program::Workplace;

/// All hosts have the same addresses.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Two hosts, while this lives.
pub struct Hosts(&'static str, #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Hosts {
    /// Hosts of this name, where this process may make them and `programs` exist; else says what is
    /// missing.
    pub fn new(name: &'static str, programs: &[&str]) -> Option<Hosts> {
        let missing = if !rustix::process::getuid().is_root() {
            Some("root")
        } else {
            let lacks = |program: &&str| Command::new(program).arg("--version").output().is_err();
            ["ip", "tc"].iter().chain(programs).copied().find(lacks)
        };
        if let Some(missing) = missing {
            eprintln!("SKIPPED: two hosts need {missing} (Debian: iproute2, openmpi-bin)");
            return None;
        }
        // After a test that failed, the next can still run.
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let hosts = Hosts(name, turn);
        // What an earlier run may have left when it was killed.
        hosts.script("down", &[name]);
        let made = hosts.script("up", &[name, "1gbit"]);
        if !made.status.success() {
            eprintln!("SKIPPED: no network namespaces here: {}", String::from_utf8_lossy(&made.stderr));
            return None;
        }
        Some(hosts)
    }

    /// Their name.
    pub fn name(&self) -> &'static str {
        self.0
    }

    /// A script of the folder `tests/hosts`.
    pub fn path(script: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("hosts").join(script)
    }

    fn script(&self, script: &str, arguments: &[&str]) -> Output {
        Command::new(Hosts::path(script)).args(arguments).output().expect("a script of the repository runs")
    }

    /// A command line, split at spaces, on host 1 or 2, whose addresses are 10.77.0.1 and
    /// 10.77.0.2.
    pub fn command(&self, place: &Workplace, host: usize, line: &str) -> Command {
        let mut command = Command::new("ip");
        place.prepare(&mut command);
        command.args(["netns", "exec", &format!("{}{host}", self.0)]).args(line.split_whitespace());
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.script("down", &[self.0]);
    }
}
