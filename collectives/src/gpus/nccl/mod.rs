//! Collectives between GPUs by NCCL: on several hosts, or where GPUs of one host do not reach each
//! other's memory. Sums are in NCCL's own order.
//!
//! A rank has two communicators of NCCL's, one for the stream that gathers and one for the stream
//! that reduces. For each operation the hosts compare what they have called, and each enqueues one
//! group of calls. A *rider* goes with every group: whether the rank's work has failed so far, and
//! the numbers of a sideband. NCCL carries riders as they are, and this rank sums their numbers in
//! order of rank.

mod communicator;
mod library;
mod steps;
mod watch;

use std::sync::Arc;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, DType, Device};

use self::communicator::{Communicator, unique_id, wait_for};
use self::library::{Library, UniqueId};
use self::watch::{Operations, WaitingForNccl};
use super::watch::Watch;
use super::{GATHERS, LANES, Place, REDUCTIONS};
use crate::Error;
use crate::call::Purpose;
use crate::transport::Transport;

/// The version of NCCL that this process finds.
///
/// # Errors
/// [`Error::System`] where there is none, or it is too old, with the remedy.
pub fn nccl_version() -> Result<String, Error> {
    Ok(Library::get()?.version_name())
}

/// How a rank takes part.
pub(super) struct Nccl {
    communicators: Arc<[Communicator; LANES]>,
    /// What operations on each stream work in.
    scratch: [Mutex<Scratch>; LANES],
    operations: Arc<Operations>,
    watch: Watch,
}

/// Working memory of a stream's operations, kept from one to the next.
#[derive(Default)]
struct Scratch {
    /// Elements that are summed, and sums that are not in their places yet: f32.
    wide: Option<Buffer>,
    /// This rank's rider, and those of all: f64.
    riders: Option<Buffer>,
}

impl Nccl {
    /// Among the ranks of `place`, which all call this.
    ///
    /// # Errors
    /// [`Error::Misuse`] for ranks that share a GPU, or where sums have to be in an order;
    /// [`Error::System`] without NCCL, and for what it says.
    pub(super) fn connect(place: &Place<'_>, reduce_groups: usize) -> Result<Nccl, Error> {
        let &Place { control, gpu, rank, limit } = place;
        if reduce_groups > 1 {
            let reason = "NCCL sums in an order of its own, so it cannot sum in groups: leave reduce_groups \
                          (--reduce-groups) at 1";
            return Err(Error::Misuse { reason: reason.to_owned() });
        }
        if std::env::var("NCCL_COMM_BLOCKING").is_ok_and(|said| said.trim() == "1") {
            let reason = "NCCL_COMM_BLOCKING=1 has NCCL's calls wait, for dead ranks too: leave it out";
            return Err(Error::Misuse { reason: reason.to_owned() });
        }
        let library = Library::get();
        // Every rank has it before any waits for the others.
        let uuid = u128::from_le_bytes(gpu.uuid());
        let version = library.as_ref().map_or(0, |library| u64::from(library.version));
        let shown = control.exchange(&[version, uuid as u64, (uuid >> 64) as u64], Purpose::Gather, limit)?;
        let library = library?;
        let ranks = shown.as_chunks::<3>().0;
        if let Some(other) = ranks.iter().position(|other| other[0] != version) {
            let reason = match ranks[other][0] {
                0 => format!("rank {other} does not load NCCL, and says why"),
                theirs => format!("rank {other} has NCCL {theirs}, and rank {rank} {version}: give all the same"),
            };
            return Err(Error::Misuse { reason });
        }
        // NCCL's own variable, for tests.
        let may_share = version >= SHARES && std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|said| said == "1");
        let shares = || (0..ranks.len()).find(|&other| other != rank && ranks[other][1..] == ranks[rank][1..]);
        if let (false, Some(other)) = (may_share, shares()) {
            let reason = format!(
                "ranks {} and {} have the same GPU: NCCL needs one for each rank, unless \
                 NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL is 2.30 or newer; on one host the transport `peer` does not",
                rank.min(other),
                rank.max(other)
            );
            return Err(Error::Misuse { reason });
        }
        let ids = share_ids(&**control, library, rank, limit)?;
        let startup = control.options().startup_timeout;
        let connect = |lane: usize| {
            let look = || control.look(&|| "connecting by NCCL".to_owned());
            Communicator::connect(library, gpu, ids[lane], (rank, ranks.len()), &look, startup)
        };
        let communicators = Arc::new([connect(GATHERS)?, connect(REDUCTIONS)?]);
        let operations = Arc::new(Operations::default());
        let waiting = WaitingForNccl {
            communicators: communicators.clone(),
            operations: operations.clone(),
            control: control.clone(),
            gpu: gpu.clone(),
            rank,
            lateness: Default::default(),
        };
        let watch = Watch::start(control, gpu, rank, waiting)?;
        Ok(Nccl { communicators, scratch: Default::default(), operations, watch })
    }

    /// How NCCL moves elements, in words.
    pub(super) fn describe(&self) -> String {
        let version = nccl_version().unwrap_or_default();
        let is_registered = self.communicators.iter().all(|communicator| communicator.is_registered);
        format!("NCCL {version} ({}registered memory)", if is_registered { "" } else { "un" })
    }

    /// Ends NCCL's communicators. The streams have run what they were given.
    pub(super) fn close(&self) {
        self.watch.end();
        let ending: Vec<_> = self.communicators.iter().filter_map(Communicator::end).collect();
        wait_for(ending);
    }
}

/// The first version whose NCCL_MULTI_RANK_GPU_ENABLE=1 lets ranks share a GPU.
const SHARES: u64 = 23_000;

/// An id for each communicator, the same on all ranks.
fn share_ids(
    control: &dyn Transport,
    library: &'static Library,
    rank: usize,
    limit: crate::transport::Limit,
) -> Result<[UniqueId; LANES], Error> {
    const WORDS: usize = size_of::<UniqueId>() / 8;
    let mut own = [0; LANES * WORDS];
    if rank == 0 {
        for words in own.as_chunks_mut::<WORDS>().0 {
            let bytes = unique_id(library)?.0;
            words.iter_mut().zip(bytes.as_chunks::<8>().0).for_each(|(word, bytes)| *word = u64::from_ne_bytes(*bytes));
        }
    }
    let all = control.exchange(&own, Purpose::Gather, limit)?;
    let mut ids = [UniqueId([0; 128]); LANES];
    for (id, words) in ids.iter_mut().zip(all.as_chunks::<WORDS>().0) {
        id.0.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_ne_bytes());
    }
    control.put_back(all);
    Ok(ids)
}

impl Scratch {
    /// At least `len` elements of what `buffer` holds.
    fn of<'a>(buffer: &'a mut Option<Buffer>, gpu: &dyn Device, dtype: DType, len: usize) -> Result<&'a Buffer, Error> {
        if buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
            // The one before goes first: what is enqueued may use it, and the device knows.
            *buffer = None;
            let made = gpu.allocate(dtype, len);
            *buffer = Some(made.map_err(|error| Error::System {
                what: "making working memory of NCCL's operations on a GPU",
                reason: error.to_string(),
            })?);
        }
        Ok(buffer.as_ref().expect("just made"))
    }
}
