//! Operations drawn by lot: every rank draws the same ones, of random sizes, from shared and private memory, on its own thread and on
//! the progress thread, one or two at a time.

use pillion_collectives::{Communicator, Error, Reduce, Reduction, Sideband, Start, Window};
use pillion_kernels::{Buffer, Cpu, DType, Device, Event, random};

use crate::program::{Rank, private};

/// Elements of a rank's part: in headers, in one piece, in several pieces.
const LENGTHS: [usize; 6] = [1, 12, 1000, 5000, 70_000, 300_000];

/// Operations after which staging memory is there, and what depends on the machine has been measured.
const WARM: usize = 60;

/// Memory for operations of one size.
struct Memory {
    part: Option<Buffer>,
    whole: Option<Buffer>,
    other: Option<Buffer>,
}

/// Where the drawing stands; the same on every rank.
struct Lots {
    seed: u64,
    drawn: u64,
}

impl Lots {
    fn below(&mut self, bound: usize) -> usize {
        self.drawn += 1;
        (random::bits(self.seed, 0, self.drawn) % bound as u64) as usize
    }
}

fn scalars_f64() -> Buffer {
    Cpu.allocate(DType::F64, 4).unwrap()
}

/// Draws operations until one fails.
pub(crate) fn draw(rank: &Rank, communicator: &Communicator, ready: impl Fn()) -> Result<(), Error> {
    let world = rank.world;
    let mut memories = Vec::new();
    for len in LENGTHS {
        let shared = |len| communicator.allocate(&Cpu, DType::F32, len).map(Some);
        memories.push(Memory { part: shared(len)?, whole: shared(world * len)?, other: shared(world * len)? });
        let own = |len| Some(private(len));
        memories.push(Memory { part: own(len), whole: own(world * len), other: own(world * len) });
    }
    let mut window = Some(communicator.window(&Cpu, DType::F32, world * 1000)?);
    communicator.barrier()?;
    let mut lots = Lots { seed: rank.seed, drawn: 0 };
    for turn in 0.. {
        if turn == WARM {
            ready();
        }
        let size = lots.below(memories.len());
        let memory = &mut memories[size];
        let start = if lots.below(2) == 0 { Start::Here } else { Start::After(Event::PAST) };
        one(rank, communicator, &mut lots, memory, &mut window, &start)?;
    }
    unreachable!("the loop has no end")
}

fn one(
    rank: &Rank,
    communicator: &Communicator,
    lots: &mut Lots,
    memory: &mut Memory,
    window: &mut Option<Window>,
    start: &Start,
) -> Result<(), Error> {
    let (world, start) = (rank.world, || start.clone());
    let take = |buffer: &mut Option<Buffer>| buffer.take().expect("put back by every operation that succeeds");
    let Memory { part, whole, other } = memory;
    let operation = lots.below(12);
    let root = lots.below(world);
    let is_root = rank.rank == root;
    match operation {
        0 => {
            let (a, b) = communicator.all_gather(take(part), take(whole), start()).wait()?;
            (*part, *whole) = (Some(a), Some(b));
        }
        1 => {
            let sideband = Some(Sideband { own: scalars_f64(), totals: scalars_f64() });
            let (input, output) = (take(whole), take(part));
            let reduce =
                Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband };
            let done = communicator.reduce_scatter(reduce, start()).wait()?;
            (*whole, *part) = (Some(done.input), Some(done.output));
        }
        2 => *whole = Some(communicator.all_reduce(take(whole), Reduction::Max, start()).wait()?),
        3 => *whole = Some(communicator.broadcast(take(whole), root, start()).wait()?),
        4 => {
            let (a, b) = communicator.all_to_all(take(whole), take(other), start()).wait()?;
            (*whole, *other) = (Some(a), Some(b));
        }
        5 => {
            let output = is_root.then(|| take(other));
            let (a, b) = communicator.reduce(take(whole), output, Reduction::Sum, root, start()).wait()?;
            (*whole, *other) = (Some(a), b.or(other.take()));
        }
        6 => {
            let output = is_root.then(|| take(whole));
            let (a, b) = communicator.gather(take(part), output, root, start()).wait()?;
            (*part, *whole) = (Some(a), b.or(whole.take()));
        }
        7 => {
            let input = is_root.then(|| take(whole));
            let (a, b) = communicator.scatter(input, take(part), root, start()).wait()?;
            (*whole, *part) = (a.or(whole.take()), Some(b));
        }
        8 => communicator.barrier()?,
        9 => {
            let (next, before) = ((rank.rank + 1) % world, (rank.rank + world - 1) % world);
            let sending = communicator.send(take(whole), next, Event::PAST);
            *other = Some(communicator.receive(take(other), before, start()).wait()?);
            *whole = Some(sending.wait()?);
        }
        10 => {
            let mut held = window.take().expect("put back");
            held.shard_mut(0)?;
            let mut held = communicator.gather_window(held, start()).wait()?;
            held.release(&Event::PAST).unwrap();
            *window = Some(held);
        }
        _ => {
            // A gather and a reduction at once.
            let gather = communicator.all_gather(take(part), take(whole), Event::PAST);
            let reduce = communicator.all_reduce(take(other), Reduction::Sum, Event::PAST);
            *other = Some(reduce.wait()?);
            let (a, b) = gather.wait()?;
            (*part, *whole) = (Some(a), Some(b));
        }
    }
    Ok(())
}
