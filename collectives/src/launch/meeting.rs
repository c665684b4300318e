//! Where the ranks of several hosts meet, as launchers tell it.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZero;

use super::{LaunchError, Source};

/// Overrides where the ranks of all hosts meet.
pub(crate) const ADDRESS: &str = "PILLION_ADDRESS";
/// What no stranger knows.
const SECRET: &str = "PILLION_SECRET";

/// Where the ranks of all hosts meet over TCP. The same on every rank of a job.
#[derive(Clone, PartialEq, Eq)]
pub struct Meeting {
    /// `host:port`, of the host of rank 0. Rank 0 listens there.
    pub address: String,
    /// Tells jobs apart. Only with something in it that no stranger knows, such as
    /// `PILLION_SECRET`, does it keep strangers out.
    pub secret: String,
}

impl Meeting {
    /// An address of this host alone, for the ranks of one job. For a minute, the system gives its
    /// port to no socket that has not asked for that very port.
    ///
    /// # Errors
    /// When no port is free.
    pub fn free_address() -> io::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let mut visitor = TcpStream::connect(address)?;
        // The side that closes a connection first keeps its port (TIME_WAIT).
        drop(listener.accept()?);
        io::copy(&mut visitor, &mut io::sink())?;
        Ok(address)
    }
}

/// The secret stays out of messages.
impl std::fmt::Debug for Meeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meeting").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Reads it for a job of this launcher: from `PILLION_ADDRESS`, or where torchrun and srun say it.
///
/// # Errors
/// For an address without a port, and a port that is none.
pub(super) fn read(source: Source, get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Meeting>, LaunchError> {
    let address = match (get(ADDRESS), source) {
        (Some(address), _) => Some(address),
        (None, Source::Torchrun) => {
            let port = get("MASTER_PORT").map(|value| match value.trim().parse::<NonZero<u16>>() {
                Ok(port) => Ok(port.get()),
                Err(_) => {
                    let (variable, expected) = ("MASTER_PORT".into(), "a port from 1 to 65535");
                    Err(LaunchError::Malformed { variable, value, expected })
                }
            });
            // The agent's own store is at the port itself.
            let port = port.transpose()?.and_then(|port| port.checked_add(1));
            get("MASTER_ADDR").and_then(|host| joined(&host, port?))
        }
        (None, Source::Slurm) => {
            let nodes = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_NODELIST"));
            let number = |name| get(name).and_then(|value| value.parse::<u64>().ok());
            let (job, step) = (number("SLURM_JOB_ID"), number("SLURM_STEP_ID"));
            let number = job.zip(step).map(|(job, step)| job.wrapping_mul(31).wrapping_add(step));
            let port = number.map(|number| LEAST_PORT + (number % PORTS) as u16);
            nodes.and_then(|nodes| joined(&first_node(&nodes)?, port?))
        }
        _ => None,
    };
    let Some(address) = address else { return Ok(None) };
    if address.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<NonZero<u16>>().is_err()) {
        let (variable, expected) = (ADDRESS.into(), "host:port, as in node1:29400");
        return Err(LaunchError::Malformed { variable, value: address, expected });
    }
    let names = [
        SECRET,
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
    ];
    let parts = names.iter().map(|name| get(name).unwrap_or_default());
    let secret = parts.chain([address.clone()]).collect::<Vec<String>>().join("\n");
    Ok(Some(Meeting { address, secret }))
}

/// Ports of Slurm's jobs: below those that systems give to connections.
const LEAST_PORT: u16 = 20_000;
const PORTS: u64 = 10_000;

/// None without a host.
fn joined(host: &str, port: u16) -> Option<String> {
    let (host, is_v6) = (host.trim(), host.contains(':') && !host.starts_with('['));
    let address = if is_v6 { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    (!host.is_empty()).then_some(address)
}

/// The first of Slurm's list, such as `node[003-010,020]-ib,other`. None if it is no name of a host.
pub(super) fn first_node(list: &str) -> Option<String> {
    let (mut name, mut rest) = (String::new(), list.trim());
    loop {
        let (part, tail) = rest.split_at(rest.find(['[', ',']).unwrap_or(rest.len()));
        name.push_str(part);
        let Some(ranges) = tail.strip_prefix('[') else { break };
        let (numbers, after) = ranges.split_once(']')?;
        name.push_str(numbers.split([',', '-']).next().unwrap_or_default());
        rest = after;
    }
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    is_name.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meeting(source: Source, variables: &[(&str, &str)]) -> Result<Option<String>, String> {
        let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
        let meeting = read(source, &get).map_err(|error| error.to_string())?;
        Ok(meeting.map(|meeting| meeting.address))
    }

    #[test]
    fn the_first_node_of_a_list_is_the_one_of_rank_0() {
        for (list, first) in [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("node[003-010,020],other", "node003"),
            ("n[7]", "n7"),
            ("rack[2,5]-ib,x", "rack2-ib"),
            ("a,b[1-2]", "a"),
            ("rack[0-1]node[04-11],x", "rack0node04"),
        ] {
            assert_eq!(first_node(list).as_deref(), Some(first), "{list}");
        }
        for list in ["", ",a", "n[1-2", "n]1[", "a b", "[,]", "n[[1]]"] {
            assert_eq!(first_node(list), None, "{list}");
        }
    }

    #[test]
    fn launchers_say_where_ranks_meet() {
        let torch = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), ("TORCHELASTIC_RUN_ID", "x")];
        assert_eq!(meeting(Source::Torchrun, &torch), Ok(Some("10.0.0.1:29501".into())));
        let v6 = [("MASTER_ADDR", "fe80::1"), ("MASTER_PORT", "29500")];
        assert_eq!(meeting(Source::Torchrun, &v6), Ok(Some("[fe80::1]:29501".into())));
        let slurm = [("SLURM_STEP_NODELIST", "n[3-4]"), ("SLURM_JOB_ID", "1000"), ("SLURM_STEP_ID", "2")];
        assert_eq!(meeting(Source::Slurm, &slurm), Ok(Some("n3:21002".into())));
        let largest = [("SLURM_STEP_NODELIST", "n"), ("SLURM_JOB_ID", "18446744073709551615"), ("SLURM_STEP_ID", "4")];
        assert!(meeting(Source::Slurm, &largest).unwrap().unwrap().starts_with("n:2"));
        for (source, name) in [(Source::Torchrun, "MASTER_ADDR"), (Source::Slurm, "SLURM_STEP_NODELIST")] {
            let mut empty = [torch, slurm].concat();
            empty.iter_mut().filter(|(known, _)| *known == name).for_each(|(_, value)| *value = "");
            assert_eq!(meeting(source, &empty), Ok(None));
        }
        for bad in ["0", "99999", "x", ""] {
            let error = meeting(Source::Torchrun, &[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", bad)]).unwrap_err();
            assert!(error.contains("MASTER_PORT") && error.contains("from 1 to 65535"), "{error}");
        }
        assert_eq!(meeting(Source::OpenMpi, &torch), Ok(None));
        let given = [("PILLION_ADDRESS", "head:4000"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")];
        assert_eq!(meeting(Source::Torchrun, &given), Ok(Some("head:4000".into())));
        assert_eq!(meeting(Source::OpenMpi, &given), Ok(Some("head:4000".into())));
        for bad in ["head", "head:", ":4000", "head:70000"] {
            let error = meeting(Source::OpenMpi, &[("PILLION_ADDRESS", bad)]).unwrap_err();
            assert!(error.contains("PILLION_ADDRESS") && error.contains("node1:29400"), "{error}");
        }
    }

    #[test]
    fn jobs_restarts_and_secrets_are_told_apart() {
        let secret = |variables: &[(&str, &str)]| {
            let get =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
            read(Source::Torchrun, &get).unwrap().unwrap().secret
        };
        let base = [("PILLION_ADDRESS", "head:4000"), ("TORCHELASTIC_RESTART_COUNT", "0"), ("PILLION_SECRET", "a")];
        let mut other = base;
        other[1].1 = "1";
        assert_ne!(secret(&base), secret(&other));
        other = base;
        other[2].1 = "b";
        assert_ne!(secret(&base), secret(&other));
        let shown = format!("{:?}", Meeting { address: "head:1".into(), secret: "hidden".into() });
        assert!(!shown.contains("hidden"), "{shown}");
    }
}
