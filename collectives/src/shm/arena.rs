//! One memfd, mapped whole by every rank: control pages, an arena for each rank, a heap for windows.
//!
//! The file is as large as could ever be needed (the host's memory for each rank) and empty: pages appear as ranks reserve
//! them, each by the rank that will use them, which also places them near its core.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::control::{RankControl, state};
use super::mail::{self, Mailbox};
use crate::{Error, limits};

pub(super) const PAGE: u64 = 4096;
/// What the processor can map with one entry; larger allocations start at multiples of it.
const HUGE_PAGE: u64 = 2 << 20;
const RESERVE_AT_ONCE: u64 = 256 << 20;
/// Half of the addresses that x86-64 gives a process, in which each rank that is a thread maps everything once.
const ADDRESSES: u64 = 1 << 46;

/// Sizes of the parts, equal on every rank of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) world: usize,
    /// Bytes of an arena.
    pub(crate) reserve: u64,
    /// Bytes of the windows' heap.
    pub(crate) heap: u64,
}

impl Shape {
    /// Arenas as large as the host's memory, so that the host's memory and not the arena is the limit; smaller only where so many
    /// would not fit into the address space.
    pub(crate) fn of_host(world: usize) -> Shape {
        let info = rustix::system::sysinfo();
        let memory = info.totalram as u64 * u64::from(info.mem_unit);
        let mapping = ADDRESSES / world as u64;
        let whole_pages = |bytes: u64| bytes / HUGE_PAGE * HUGE_PAGE;
        let reserve = whole_pages(memory.min(mapping / 2 / world as u64));
        Shape { world, reserve, heap: whole_pages(memory.min(mapping / 2)) }
    }

    fn control_bytes(self) -> u64 {
        ((self.world * size_of::<RankControl>()) as u64 + mail::bytes(self.world)).next_multiple_of(HUGE_PAGE)
    }

    /// Where a rank's arena starts; the windows' heap is that of rank `world`.
    pub(crate) fn arena(self, rank: usize) -> u64 {
        self.control_bytes() + rank as u64 * self.reserve
    }

    fn total(self) -> u64 {
        self.arena(self.world) + self.heap
    }

    /// Bytes of a rank's arena, or of the windows' heap.
    fn size(self, rank: usize) -> u64 {
        if rank < self.world { self.reserve } else { self.heap }
    }
}

/// What nobody can do to the shared file any more: touching a page beyond its end would be a bus error.
pub(crate) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Makes the shared file, whose size is final.
pub(crate) fn create(shape: Shape) -> Result<OwnedFd, Error> {
    // The kernel answers a larger size with SIGXFSZ, which ends the process.
    limits::check_file_size(shape.total())?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("pillion", flags).map_err(Error::system("making a memfd"))?;
    rustix::fs::ftruncate(&file, shape.total()).map_err(Error::system("sizing a memfd"))?;
    rustix::fs::fcntl_add_seals(&file, SEALS).map_err(Error::system("sealing a memfd"))?;
    Ok(file)
}

/// What failed when a rank cannot map the shared file.
pub(crate) const MAPPING: &str = "mapping the job's shared memory (is `ulimit -v` set?)";

/// The shared file, mapped.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: u64,
    shape: Shape,
    file: OwnedFd,
}

// SAFETY: the mapping is an address range; every access goes through atomics (control pages) or through unsafe functions that
// state their protocol.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the file for a rank. When the system refuses, the ranks that share the file already are
    /// told.
    pub(crate) fn new(file: OwnedFd, shape: Shape, rank: usize) -> Result<Arc<Mapping>, Error> {
        let size = rustix::fs::fstat(&file).map_err(Error::system("asking for a memfd's size"))?.st_size as u64;
        if size != shape.total() {
            let reason = format!("it has {size} bytes where {} were expected", shape.total());
            return Err(Error::System { what: "mapping the job's shared memory", reason });
        }
        match Mapping::of(file, shape, size) {
            Ok(mapping) => Ok(Arc::new(mapping)),
            Err((file, errno)) => {
                let error = Error::system(MAPPING)(errno);
                // The ranks' words alone need little.
                if let Ok(words) = Mapping::of(file, shape, shape.control_bytes()) {
                    words.control(rank).write_reason(&error.to_string());
                    words.control(rank).state.store(state::ABORTED, Ordering::Release);
                }
                Err(error)
            }
        }
    }

    /// Maps the first `bytes` of the file.
    fn of(file: OwnedFd, shape: Shape, bytes: u64) -> Result<Mapping, (OwnedFd, rustix::io::Errno)> {
        let size = bytes as usize;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)
        };
        let start: NonNull<u8> = match start {
            Ok(start) => NonNull::new(start.cast()).expect("mmap never returns null for a non-fixed mapping"),
            Err(errno) => return Err((file, errno)),
        };
        // A core dump would otherwise read, and so make, every page of it. Where that cannot be
        // prevented, a dump is only slow. SAFETY: the range was mapped just now, and this advice
        // changes no content.
        let _ = unsafe { rustix::mm::madvise(start.as_ptr().cast(), size, rustix::mm::Advice::LinuxDontDump) };
        Ok(Mapping { start, bytes, shape, file })
    }

    /// The shared file.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// A rank's words.
    pub(crate) fn control(&self, rank: usize) -> &RankControl {
        assert!(rank < self.shape.world);
        // SAFETY: inside the mapping, aligned to a page, and made of atomics and a pthread mutex, for which zeroed memory is valid
        // and which other processes may change at any time.
        unsafe { &*self.start.cast::<RankControl>().as_ptr().add(rank) }
    }

    /// Where messages from one rank to another wait.
    pub(crate) fn mailbox(&self, from: usize, to: usize) -> &Mailbox {
        let world = self.shape.world;
        assert!(from < world && to < world);
        // SAFETY: the mailboxes follow the ranks' words, world² of them, inside the mapping (`control_bytes`); pages are aligned to more
        // than a mailbox is; a mailbox is made of atomics, as above.
        unsafe {
            let first = self.start.cast::<RankControl>().as_ptr().add(world).cast::<Mailbox>();
            &*first.add(from * world + to)
        }
    }

    /// The address of a byte of a rank's arena.
    pub(crate) fn address(&self, rank: usize, offset: u64, bytes: u64) -> NonNull<u8> {
        assert!(rank <= self.shape.world && self.contains(rank, offset, bytes), "an address beyond an arena");
        // SAFETY: inside the mapping, by the assertion.
        unsafe { self.start.add((self.shape.arena(rank) + offset) as usize) }
    }

    /// Whether a range lies in a rank's arena.
    pub(crate) fn contains(&self, rank: usize, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.shape.size(rank))
    }

    /// Where an address lies in the arena of `rank`, if it does.
    pub(crate) fn offset_of(&self, rank: usize, address: NonNull<u8>) -> Option<u64> {
        let arena = self.start.as_ptr().addr() as u64 + self.shape.arena(rank);
        (address.as_ptr().addr() as u64).checked_sub(arena).filter(|&offset| offset < self.shape.reserve)
    }

    /// Backs a range of an arena with memory, zeroed. Without this the first touch of a page that does not exist would be a bus
    /// error. The caller has compared the size with [`available_memory`].
    pub(crate) fn reserve(&self, rank: usize, offset: u64, bytes: u64) -> Result<(), Error> {
        if !self.contains(rank, offset, bytes) {
            let available = self.shape.size(rank).saturating_sub(offset);
            return Err(Error::OutOfMemory { bytes, available, limit: "the address space" });
        }
        self.populate_huge(rank, offset, bytes);
        // In pieces, so that one that a signal interrupts is soon made again.
        let end = offset + bytes;
        for start in (offset..end).step_by(RESERVE_AT_ONCE as usize) {
            let (at, size) = (self.shape.arena(rank) + start, RESERVE_AT_ONCE.min(end - start));
            let flags = FallocateFlags::empty();
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, at, size)).map_err(|errno| {
                match errno {
                    rustix::io::Errno::NOSPC | rustix::io::Errno::NOMEM => Error::OutOfMemory {
                        bytes,
                        available: available_memory().0,
                        limit: "the system's shared memory",
                    },
                    errno => Error::system("reserving shared memory")(errno),
                }
            })?;
        }
        Ok(())
    }

    /// Asks for huge pages wherever a range has room for whole ones, and for the pages at once, which only a fault makes huge. Where the
    /// system does not want to, the range gets small pages later.
    fn populate_huge(&self, rank: usize, offset: u64, bytes: u64) {
        let first = self.shape.arena(rank) + offset;
        let (start, end) = (first.next_multiple_of(HUGE_PAGE), (first + bytes) / HUGE_PAGE * HUGE_PAGE);
        for at in (start..end).step_by(RESERVE_AT_ONCE as usize) {
            let size = RESERVE_AT_ONCE.min(end - at) as usize;
            for advice in [rustix::mm::Advice::LinuxHugepage, rustix::mm::Advice::LinuxPopulateWrite] {
                // SAFETY: inside the mapping. The one advice changes how pages are made; the other makes them, as a write of what is there
                // would, and fails where there is no memory, as this function's caller then finds out.
                let advised = unsafe { rustix::mm::madvise(self.start.as_ptr().add(at as usize).cast(), size, advice) };
                if advised.is_err() {
                    return;
                }
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `of` with this size; every `Region` over it holds this `Mapping` alive,
        // so nothing refers to it. A failure leaves the range mapped, which is harmless.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes as usize) };
    }
}

/// Hands out offsets; memory returns when the last buffer and the communicator are gone.
#[derive(Default)]
pub(crate) struct Allocator {
    arena: AtomicU64,
    windows: AtomicU64,
}

impl Allocator {
    /// An unused range of this rank's arena.
    pub(crate) fn arena(&self, bytes: u64) -> u64 {
        take(&self.arena, bytes)
    }

    /// An unused range of the windows' heap; the same on every rank that asks for the same ranges in the same order.
    pub(crate) fn windows(&self, bytes: u64) -> u64 {
        take(&self.windows, bytes)
    }
}

fn take(end: &AtomicU64, bytes: u64) -> u64 {
    let alignment = if bytes >= HUGE_PAGE { HUGE_PAGE } else { PAGE };
    let after = |end: u64| end.next_multiple_of(alignment) + bytes.next_multiple_of(PAGE);
    let before = end.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |end| Some(after(end)));
    before.unwrap_or_else(|end| end).next_multiple_of(alignment)
}

/// Bytes that this process may still use, and who sets that limit: the host, or its control group (version 2).
pub fn available_memory() -> (u64, &'static str) {
    let host = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(u64::MAX);
    let group = std::fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|text| {
            let path = std::path::PathBuf::from(text.lines().find_map(|line| line.strip_prefix("0::"))?);
            // Every group above sets a limit, too.
            path.ancestors().filter_map(|group| left_in_group(group.to_str()?.trim_end_matches('/'))).min()
        })
        .unwrap_or(u64::MAX);
    if group < host { (group, "this control group's memory limit") } else { (host, "this host's available memory") }
}

/// Bytes that a control group may still use, if it has a limit.
fn left_in_group(path: &str) -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup{path}/{file}")).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?;
    // Pages that the kernel gives up before it refuses anybody.
    let statistics = read("memory.stat")?;
    let reclaimable = ["inactive_file ", "active_file ", "slab_reclaimable "].into_iter();
    let reclaimable = reclaimable
        .filter_map(|name| statistics.lines().find_map(|line| line.strip_prefix(name))?.parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(reclaimable)))
}
