//! One memfd, mapped whole by every process: control pages, and an arena for each rank.
//!
//! The file is as large as could ever be needed (the host's memory for each rank) and empty: pages
//! appear as ranks reserve them, each by the rank that will use them, which also places them near
//! its core.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::available::available_memory;
use super::control::{GroupControl, RankControl};
use super::mailbox::Mailbox;
use crate::{Error, limits};

pub(crate) const PAGE: u64 = 4096;
/// Larger allocations start at multiples of it.
pub(crate) const HUGE_PAGE: u64 = pillion_kernels::HUGE_PAGE as u64;
const RESERVE_AT_ONCE: u64 = 256 << 20;
/// Half of the addresses that x86-64 gives a process.
const ADDRESSES: u64 = 1 << 46;

/// Sizes of the parts, equal on every rank of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) world: usize,
    /// Bytes of an arena.
    pub(crate) reserve: u64,
}

impl Shape {
    /// Arenas as large as the host's memory, so that the host's memory and not the arena is the
    /// limit; smaller only where so many would not fit into the address space, which gives every
    /// rank its share of 64 TiB all the same.
    pub(crate) fn of_host(world: usize) -> Shape {
        let info = rustix::system::sysinfo();
        Shape::with_memory(world, info.totalram as u64 * u64::from(info.mem_unit))
    }

    fn with_memory(world: usize, memory: u64) -> Shape {
        let reserve = memory.min(ADDRESSES / world as u64) / HUGE_PAGE * HUGE_PAGE;
        Shape { world, reserve }
    }

    /// The words of all ranks, as one group.
    pub(crate) fn all(self) -> Words {
        Words::at((self.world * size_of::<RankControl>()) as u64, self.world)
    }

    fn control_bytes(self) -> u64 {
        let all = self.all();
        (all.controls + Words::bytes(self.world)).next_multiple_of(HUGE_PAGE)
    }

    /// Where a rank's arena starts.
    fn arena(self, rank: usize) -> u64 {
        self.control_bytes() + rank as u64 * self.reserve
    }

    fn total(self) -> u64 {
        self.arena(self.world)
    }
}

/// Where the words of a group's members lie in the file: one [`GroupControl`] for each, then a
/// mailbox for each ordered pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Words {
    controls: u64,
    mailboxes: u64,
    world: usize,
}

impl Words {
    /// Of `world` members, from this byte of the file on.
    pub(crate) fn at(start: u64, world: usize) -> Words {
        Words { controls: start, mailboxes: start + (world * size_of::<GroupControl>()) as u64, world }
    }

    /// Their size.
    pub(crate) fn bytes(world: usize) -> u64 {
        (world * size_of::<GroupControl>() + world * world * size_of::<Mailbox>()) as u64
    }

    /// Where they start in the file.
    pub(crate) fn start(self) -> u64 {
        self.controls
    }
}

/// A group's members on this host. Where their words are is found once: every look at a peer needs
/// it.
pub(crate) struct Members {
    map: Arc<Mapping>,
    words: Words,
    /// By member: the rank as the mapping counts.
    locals: Box<[usize]>,
    controls: Box<[(NonNull<GroupControl>, NonNull<RankControl>)]>,
}

// SAFETY: the pointers are to words made of atomics, in the mapping that this holds.
unsafe impl Send for Members {}
// SAFETY: as above.
unsafe impl Sync for Members {}

impl Members {
    /// Of ranks that the mapping counts like this, with their words at `words`.
    pub(crate) fn new(map: Arc<Mapping>, words: Words, locals: Box<[usize]>) -> Members {
        assert!(locals.len() == words.world);
        let found = |(member, &local): (usize, &usize)| {
            (NonNull::from(map.group(words, member)), NonNull::from(map.rank(local)))
        };
        let controls = locals.iter().enumerate().map(found).collect();
        Members { map, words, locals, controls }
    }

    pub(crate) fn count(&self) -> usize {
        self.locals.len()
    }

    pub(crate) fn words(&self) -> Words {
        self.words
    }

    /// A member's rank, as the mapping counts.
    pub(crate) fn local(&self, member: usize) -> usize {
        self.locals[member]
    }

    /// A member's words of this group.
    pub(crate) fn group(&self, member: usize) -> &GroupControl {
        // SAFETY: from a reference, as `Mapping::group` says, in the mapping that this holds; the
        // words are given back once every member is gone, which this rank is not while this lives.
        unsafe { self.controls[member].0.as_ref() }
    }

    /// A member's words as a rank of the host.
    pub(crate) fn rank(&self, member: usize) -> &RankControl {
        // SAFETY: from a reference into the mapping, which this holds.
        unsafe { self.controls[member].1.as_ref() }
    }

    /// Where messages from one member to another wait.
    pub(crate) fn mailbox(&self, from: usize, to: usize) -> &Mailbox {
        self.map.mailbox(self.words, from, to)
    }
}

/// What nobody can do to the shared file any more: touching a page beyond its end would be a bus
/// error.
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

/// What this process has mapped.
static MAPPED: Mutex<Vec<Mapped>> = Mutex::new(Vec::new());

struct Mapped {
    /// Device and number of the file.
    file: (u64, u64),
    mapping: Weak<Mapping>,
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

// SAFETY: the mapping is an address range; every access goes through atomics (control pages) or
// through unsafe functions that state their protocol.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the file for a rank; once for all ranks that are threads of one process. When the
    /// system refuses, the ranks that share the file already are told.
    pub(crate) fn new(file: OwnedFd, shape: Shape, rank: usize) -> Result<Arc<Mapping>, Error> {
        let status = rustix::fs::fstat(&file).map_err(Error::system("asking for a memfd's size"))?;
        let size = status.st_size as u64;
        if size != shape.total() {
            let reason = format!("it has {size} bytes where {} were expected", shape.total());
            return Err(Error::System { what: "mapping the job's shared memory", reason });
        }
        let mut mapped = MAPPED.lock();
        mapped.retain(|mapped| mapped.mapping.strong_count() > 0);
        let identity = (status.st_dev, status.st_ino);
        // A file that is mapped is open, so no other has its number.
        let known = mapped.iter().find(|mapped| mapped.file == identity);
        if let Some(mapping) = known.and_then(|known| known.mapping.upgrade()) {
            return Ok(mapping);
        }
        match Mapping::of(file, shape, size) {
            Ok(mapping) => {
                let mapping = Arc::new(mapping);
                mapped.push(Mapped { file: identity, mapping: Arc::downgrade(&mapping) });
                Ok(mapping)
            }
            Err((file, errno)) => {
                let error = Error::system(MAPPING)(errno);
                // The ranks' words alone need little.
                if let Ok(words) = Mapping::of(file, shape, shape.control_bytes()) {
                    words.group(shape.all(), rank).abort(&error.to_string());
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
    pub(crate) fn rank(&self, rank: usize) -> &RankControl {
        assert!(rank < self.shape.world);
        // SAFETY: inside the mapping, aligned to a page, and made of atomics and a pthread mutex,
        // for which zeroed memory is valid and which other processes may change at any time.
        unsafe { &*self.start.cast::<RankControl>().as_ptr().add(rank) }
    }

    /// A member's words of a group.
    pub(crate) fn group(&self, words: Words, member: usize) -> &GroupControl {
        assert!(member < words.world);
        // SAFETY: `place` finds the words inside the mapping. They are made of atomics, for which
        // zeroed memory is valid, and nothing else lies there until every member has gone.
        unsafe { &*self.place::<GroupControl>(words.controls, member) }
    }

    /// Where messages from one member of a group to another wait.
    pub(crate) fn mailbox(&self, words: Words, from: usize, to: usize) -> &Mailbox {
        assert!(from < words.world && to < words.world);
        // SAFETY: as for a member's words.
        unsafe { &*self.place::<Mailbox>(words.mailboxes, from * words.world + to) }
    }

    /// The `index`-th of some values that lie one after the other from a byte of the file on.
    fn place<T>(&self, start: u64, index: usize) -> *const T {
        let at = start + (index * size_of::<T>()) as u64;
        let fits = at.checked_add(size_of::<T>() as u64).is_some_and(|end| end <= self.bytes);
        assert!(fits && at.is_multiple_of(align_of::<T>() as u64), "words outside the shared file, at {at}");
        // SAFETY: inside the mapping, by the assertion.
        unsafe { self.start.as_ptr().add(at as usize).cast() }
    }

    /// Where a byte of a rank's arena lies in the file.
    pub(crate) fn place_of(&self, rank: usize, offset: u64) -> u64 {
        self.shape.arena(rank) + offset
    }

    /// Which rank's arena a byte of the file lies in, and where there.
    pub(crate) fn arena_of(&self, place: u64) -> Option<(usize, u64)> {
        let at = place.checked_sub(self.shape.control_bytes())?;
        let rank = at.checked_div(self.shape.reserve)? as usize;
        (rank < self.shape.world).then_some((rank, at % self.shape.reserve))
    }

    /// The address of a byte of a rank's arena.
    pub(crate) fn address(&self, rank: usize, offset: u64, bytes: u64) -> NonNull<u8> {
        assert!(rank < self.shape.world && self.contains(offset, bytes), "an address beyond an arena");
        // SAFETY: inside the mapping, by the assertion.
        unsafe { self.start.add((self.shape.arena(rank) + offset) as usize) }
    }

    /// Whether a range lies in an arena.
    pub(crate) fn contains(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.shape.reserve)
    }

    /// Where an address lies in the arena of `rank`, if it does.
    pub(crate) fn offset_of(&self, rank: usize, address: NonNull<u8>) -> Option<u64> {
        let arena = self.start.as_ptr().addr() as u64 + self.shape.arena(rank);
        (address.as_ptr().addr() as u64).checked_sub(arena).filter(|&offset| offset < self.shape.reserve)
    }

    /// Backs a range of an arena with memory, zeroed. Without this the first touch of a page that
    /// does not exist would be a bus error. The caller has compared the size with
    /// [`available_memory`].
    pub(crate) fn reserve(&self, rank: usize, offset: u64, bytes: u64) -> Result<(), Error> {
        if !self.contains(offset, bytes) {
            let available = self.shape.reserve.saturating_sub(offset);
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

    /// Gives the memory of a range back to the system: where it is reserved again, it is zeroed.
    /// Returns whether the system did so.
    pub(crate) fn discard(&self, rank: usize, offset: u64, bytes: u64) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let at = self.shape.arena(rank) + offset;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, at, bytes)).is_ok()
    }

    /// Asks for huge pages wherever a range has room for whole ones, and for the pages at once,
    /// which only a fault makes huge. Where the system does not want to, the range gets small pages
    /// later.
    fn populate_huge(&self, rank: usize, offset: u64, bytes: u64) {
        let first = self.shape.arena(rank) + offset;
        let (start, end) = (first.next_multiple_of(HUGE_PAGE), (first + bytes) / HUGE_PAGE * HUGE_PAGE);
        for at in (start..end).step_by(RESERVE_AT_ONCE as usize) {
            let size = RESERVE_AT_ONCE.min(end - at) as usize;
            for advice in [rustix::mm::Advice::LinuxHugepage, rustix::mm::Advice::LinuxPopulateWrite] {
                // SAFETY: inside the mapping. The one advice changes how pages are made; the other
                // makes them, as a write of what is there would, and fails where there is no
                // memory, as this function's caller then finds out.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_are_limited_by_memory_on_every_host_that_there_is() {
        const GIB: u64 = 1 << 30;
        for (world, memory) in [(1, GIB), (128, 24 * GIB), (128, 512 * GIB), (1024, 64 * GIB), (8, 8192 * GIB)] {
            let shape = Shape::with_memory(world, memory);
            assert_eq!(shape.reserve, memory, "{world} ranks");
            assert!(shape.total() < 1 << 47, "a process has so many addresses");
        }
        // Beyond that each rank has its share of 64 TiB, more than its share of any host's memory.
        assert_eq!(Shape::with_memory(1024, 4096 * GIB).reserve, 64 * GIB);
    }
}
