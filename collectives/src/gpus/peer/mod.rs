//! Collectives between GPUs of one host, without NCCL: each rank pulls what it gathers with the
//! copy engines of its GPU, and reads what it reduces in the memory of all ranks, in order of rank,
//! so a sum has the bits of shared memory's.
//!
//! The ranks are threads of one process, whose streams wait for each other by the driver's events
//! (`board.rs`), or a process each, whose streams wait at words (`processes.rs`). A call waits
//! until the other ranks have made theirs, and not for what GPUs do.

mod board;
mod marks;
mod meeting;
mod processes;
mod steps;

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use pillion_kernels::CudaStream;

use super::Place;
use crate::Error;
use crate::call::Purpose;
use crate::transport::{Limit, Transport};
use board::Board;
use meeting::Meeting;
pub(super) use processes::Memories;
use processes::Processes;

/// How a rank takes part.
pub(super) struct Peer {
    meeting: Meeting,
}

/// How the ranks of a group are spread.
enum Spread {
    /// Threads of one process; the number that rank 0 has given the group.
    Threads(u64),
    /// A process each.
    Processes,
}

impl Peer {
    /// Among the ranks of `place`, which all call this; and the memory that their streams read.
    pub(super) fn connect(place: &Place<'_>) -> Result<(Peer, Memories), Error> {
        let spread = spread(&**place.control, place.limit)?;
        let memories = match spread {
            Spread::Threads(_) => Memories::new(),
            Spread::Processes => processes::map_all(place)?,
        };
        Ok((Peer { meeting: meet(place, spread, memories.clone())? }, memories))
    }

    /// Among some of the ranks, which all call this.
    pub(super) fn group(&self, ranks: &[usize], place: &Place<'_>) -> Result<Peer, Error> {
        let memories = match &self.meeting {
            Meeting::Threads(_) => Memories::new(),
            Meeting::Processes(processes) => processes.memories_of(ranks),
        };
        let spread = spread(&**place.control, place.limit)?;
        Ok(Peer { meeting: meet(place, spread, memories)? })
    }

    /// Whether operations exchange words with the other ranks' hosts.
    pub(super) fn exchanges(&self) -> bool {
        matches!(self.meeting, Meeting::Processes(_))
    }

    /// The streams have run what they were given.
    pub(super) fn close(&self) {
        if let Meeting::Processes(processes) = &self.meeting {
            processes.close();
        }
    }
}

/// How the ranks of `control`, which all call this, are spread.
///
/// # Errors
/// [`Error::Misuse`] for some that share a process while others do not.
fn spread(control: &dyn Transport, limit: Limit) -> Result<Spread, Error> {
    /// Tells this process from others, also in other PID namespaces.
    static PROCESS: OnceLock<u64> = OnceLock::new();
    /// Tells groups of this process apart.
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let process = *PROCESS.get_or_init(|| RandomState::new().hash_one(std::process::id()));
    let all = control.exchange(&[process, NUMBER.fetch_add(1, Ordering::Relaxed)], Purpose::Gather, limit)?;
    let ranks = all.as_chunks::<2>().0;
    let world = ranks.len();
    if world > CudaStream::INPUTS {
        let most = CudaStream::INPUTS;
        return Err(Error::Misuse { reason: format!("{world} ranks on one host: GPUs reduce at most {most}") });
    }
    let of = |rank: usize| ranks.iter().filter(|other| other[0] == ranks[rank][0]).count();
    if of(0) == world {
        return Ok(Spread::Threads(ranks[0][1]));
    }
    if let Some(rank) = (0..world).find(|&rank| of(rank) > 1) {
        let reason = format!(
            "{} of {world} ranks are threads of rank {rank}'s process: run all ranks as threads of one process, or \
             each as a process of its own",
            of(rank)
        );
        return Err(Error::Misuse { reason });
    }
    Ok(Spread::Processes)
}

/// Has the ranks of `place`, which all call this, meet.
///
/// # Errors
/// [`Error::Misuse`] for GPUs that do not reach each other's memory.
fn meet(place: &Place<'_>, spread: Spread, memories: Memories) -> Result<Meeting, Error> {
    let &Place { control, gpu, limit, .. } = place;
    let Spread::Threads(number) = spread else {
        return Ok(Meeting::Processes(Processes::new(place, memories)?));
    };
    let board = Board::of(number, control.hosts().world());
    board.introduce(gpu);
    // Nobody goes on, and drops the board, before all have it.
    control.put_back(control.exchange(&[], Purpose::Barrier, limit)?);
    if let Some(other) = board.out_of_reach(gpu) {
        let (own, other) = (gpu.ordinal(), other.ordinal());
        let reason = format!(
            "GPU {own} does not reach the memory of GPU {other}: `nvidia-smi topo -p2p r` shows which GPUs do; \
             give the ranks others (CUDA_VISIBLE_DEVICES), or take NCCL"
        );
        return Err(Error::Misuse { reason });
    }
    Ok(Meeting::Threads(board))
}
