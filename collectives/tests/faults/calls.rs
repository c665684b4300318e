//! Calls that differ between ranks, each on a communicator of its own; and communicators that come and go.

use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Error, Options, Reduce, Reduction, Sections, Sideband, Start, Window};
use pillion_kernels::{Buffer, Cpu, DType, Device, Element, Event, Span};

use crate::program::{Rank, held, parts, private};

/// Ranks of the job that makes wrong calls, and the one that is wrong.
pub(crate) const WORLD: usize = 3;
pub(crate) const ODD: usize = 1;

/// Elements of a part, and of a part of the wrong length; a page, so that nothing lies between two allocations.
const PART: usize = 1024;
/// Longer than a piece in which private memory is staged.
const LONG: usize = 3 << 20;

pub(crate) type Call = fn(&Communicator, &mut Memory) -> Result<(), Error>;

/// A call as messages describe it.
pub(crate) type Named = (&'static str, Call);

/// What all ranks but one call, and what that one calls.
pub(crate) const CASES: [(Named, Named); 20] = [
    (("all-gather #1 of 3072 × f32", gather), ("broadcast #1 of 3072 × f32 (root 0)", broadcast_0)),
    (("all-gather #1 of 3072 × f32", gather), ("all-gather #1 of 6144 × f32", gather_more)),
    (("all-gather #1 of 3072 × f32", gather), ("all-gather #1 of 3072 × u32", gather_integers)),
    (("all-gather #1 of 3072 × f32", gather), ("all-to-all #1 of 3072 × f32", all_to_all)),
    (("broadcast #1 of 3072 × f32 (root 0)", broadcast_0), ("broadcast #1 of 3072 × f32 (root 1)", broadcast_1)),
    (("broadcast #1 of 12 × f32 (root 0)", broadcast_12), ("broadcast #1 of 13 × f32 (root 0)", broadcast_13)),
    (("broadcast #1 of 13 × f32 (root 0)", broadcast_13), ("broadcast #1 of 3145728 × f32 (root 0)", broadcast_long)),
    (("broadcast #1 of 3145728 × f32 (root 0)", broadcast_long), ("broadcast #1 of 12 × f32 (root 0)", broadcast_12)),
    (("gather #1 of 3072 × f32 (root 0)", gather_to_0), ("gather #1 of 3072 × f32 (root 1)", gather_to_1)),
    (("scatter #1 of 3072 × f32 (root 0)", scatter_from_0), ("gather #1 of 3072 × f32 (root 0)", gather_to_0)),
    (("all-reduce #1 of 3072 × f32 (sum)", all_reduce_sum), ("all-reduce #1 of 3072 × f32 (max)", all_reduce_max)),
    (("all-reduce #1 of 3072 × f32 (sum)", all_reduce_sum), ("reduce-scatter #1 of 3072 × f32 (sum)", reduce_scatter)),
    (
        ("reduce-scatter #1 of 3072 × f32 (sum)", reduce_scatter),
        ("reduce-scatter #1 of 3072 × f32 (sum) with a sideband", reduce_scatter_and_sideband),
    ),
    (("reduce #1 of 3072 × f32 (sum) (root 0)", reduce_to_0), ("reduce #1 of 3072 × f32 (sum) (root 1)", reduce_to_1)),
    // The barrier and the agreements about memory come after those that made the memory.
    (("barrier #", barrier), ("scalar exchange #", scalars)),
    (("window gather #1 of 3072", gather_first_window), ("window gather #1 of 3072", gather_second_window)),
    (
        ("all-gather #1 of 3072 × f32 in 2 sections", gather_short_first),
        ("all-gather #1 of 3072 × f32 in 2 sections", gather_long_first),
    ),
    (
        ("window gather #1 of 3072 in 2 sections", gather_window_short_first),
        ("window gather #1 of 3072 in 2 sections", gather_window_long_first),
    ),
    (("an allocation of 4096 bytes", allocate), ("an allocation of 8192 bytes", allocate_more)),
    (("an allocation of 4096 bytes", allocate), ("a window of 12288 bytes", make_window)),
];

/// A sender's and a receiver's buffers: lengths, and whether the receiver's type is another.
const MESSAGES: [(usize, usize, bool); 4] =
    [(1000, 999, false), (1000, 1000, true), (LONG, 10, false), (10, LONG, false)];

/// Number of communicators that [`make_all`] reports about.
pub(crate) const REPORTS: usize = 2 * (CASES.len() + MESSAGES.len());

/// What calls use: from arenas, with a page of nobody's before and after each, or private.
pub(crate) struct Memory {
    buffers: Vec<Buffer>,
    windows: Vec<Window>,
    /// All of it, guards included, for a look afterwards.
    spans: Vec<Span>,
    /// What it holds.
    fill: u32,
}

impl Memory {
    fn new(communicator: &Communicator, in_arena: bool) -> Result<Memory, Error> {
        // A number, so that no copy changes its bits.
        let (stream, fill) = (Cpu.stream(), 1e6f32.to_bits() + communicator.rank() as u32);
        let mut memory = Memory { buffers: Vec::new(), windows: Vec::new(), spans: Vec::new(), fill };
        let lengths = [12, 13, PART, 2 * PART, 3 * PART, 3 * PART, 6 * PART, LONG];
        for (dtype, len) in
            lengths.map(|len| (DType::F32, len)).into_iter().chain([(DType::U32, PART), (DType::U32, 3 * PART)])
        {
            for (guard, dtype, len) in [(true, DType::U32, PART), (false, dtype, len), (true, DType::U32, PART)] {
                let mut buffer =
                    if in_arena { communicator.allocate(&Cpu, dtype, len)? } else { Cpu.allocate(dtype, len).unwrap() };
                match dtype {
                    DType::U32 => stream.upload(buffer.view_mut(), &vec![fill; len]),
                    _ => stream.upload(buffer.view_mut(), &vec![f32::from_bits(fill); len]),
                }
                memory.spans.push(buffer.span());
                if !guard {
                    memory.buffers.push(buffer);
                }
            }
        }
        for _ in 0..2 {
            memory.windows.push(communicator.window(&Cpu, DType::F32, WORLD * PART)?);
        }
        Ok(memory)
    }

    fn take<T: Element>(&mut self, len: usize) -> Buffer {
        let fits = |buffer: &Buffer| (buffer.len(), buffer.dtype()) == (len, T::DTYPE);
        let index = self.buffers.iter().position(fits).expect("as many as a call needs");
        self.buffers.remove(index)
    }

    fn is_untouched(&self) -> bool {
        self.spans.iter().all(|span| words(span).iter().all(|&word| word == self.fill))
    }
}

/// Elements of 4 bytes, as bits.
fn words(span: &Span) -> &[u32] {
    // SAFETY: the span keeps the memory, which is aligned to 64 bytes; whoever has used it has returned an error by now.
    unsafe { std::slice::from_raw_parts(span.address().cast().as_ptr(), span.len()) }
}

fn all_gather<T: Element>(communicator: &Communicator, memory: &mut Memory, len: usize) -> Result<(), Error> {
    let (shard, output) = (memory.take::<T>(len), memory.take::<T>(WORLD * len));
    communicator.all_gather(shard, output, Event::PAST).wait().map(|_| ())
}

fn gather(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    all_gather::<f32>(communicator, memory, PART)
}

fn gather_more(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    all_gather::<f32>(communicator, memory, 2 * PART)
}

fn gather_integers(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    all_gather::<u32>(communicator, memory, PART)
}

fn all_to_all(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    let (input, output) = (memory.take::<f32>(WORLD * PART), memory.take::<f32>(WORLD * PART));
    communicator.all_to_all(input, output, Start::Here).wait().map(|_| ())
}

fn broadcast(communicator: &Communicator, memory: &mut Memory, len: usize, root: usize) -> Result<(), Error> {
    communicator.broadcast(memory.take::<f32>(len), root, Start::Here).wait().map(|_| ())
}

fn broadcast_0(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    broadcast(communicator, memory, WORLD * PART, 0)
}

fn broadcast_1(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    broadcast(communicator, memory, WORLD * PART, 1)
}

fn broadcast_12(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    broadcast(communicator, memory, 12, 0)
}

fn broadcast_13(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    broadcast(communicator, memory, 13, 0)
}

fn broadcast_long(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    broadcast(communicator, memory, LONG, 0)
}

fn gather_to(communicator: &Communicator, memory: &mut Memory, root: usize) -> Result<(), Error> {
    let output = (communicator.rank() == root).then(|| memory.take::<f32>(WORLD * PART));
    communicator.gather(memory.take::<f32>(PART), output, root, Event::PAST).wait().map(|_| ())
}

fn gather_to_0(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    gather_to(communicator, memory, 0)
}

fn gather_to_1(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    gather_to(communicator, memory, 1)
}

fn scatter_from_0(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    let input = (communicator.rank() == 0).then(|| memory.take::<f32>(WORLD * PART));
    communicator.scatter(input, memory.take::<f32>(PART), 0, Event::PAST).wait().map(|_| ())
}

fn all_reduce_sum(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    communicator.all_reduce(memory.take::<f32>(WORLD * PART), Reduction::Sum, Start::Here).wait().map(|_| ())
}

fn all_reduce_max(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    communicator.all_reduce(memory.take::<f32>(WORLD * PART), Reduction::Max, Event::PAST).wait().map(|_| ())
}

fn reduce_with(communicator: &Communicator, memory: &mut Memory, sideband: Option<Sideband>) -> Result<(), Error> {
    let (input, output) = (memory.take::<f32>(WORLD * PART), memory.take::<f32>(PART));
    let reduce = Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband };
    communicator.reduce_scatter(reduce, Event::PAST).wait().map(|_| ())
}

fn reduce_scatter(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    reduce_with(communicator, memory, None)
}

fn reduce_scatter_and_sideband(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    let numbers = || Cpu.allocate(DType::F64, 4).unwrap();
    reduce_with(communicator, memory, Some(Sideband { own: numbers(), totals: numbers() }))
}

fn reduce_to(communicator: &Communicator, memory: &mut Memory, root: usize) -> Result<(), Error> {
    let output = (communicator.rank() == root).then(|| memory.take::<f32>(WORLD * PART));
    let input = memory.take::<f32>(WORLD * PART);
    communicator.reduce(input, output, Reduction::Sum, root, Event::PAST).wait().map(|_| ())
}

fn reduce_to_0(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    reduce_to(communicator, memory, 0)
}

fn reduce_to_1(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    reduce_to(communicator, memory, 1)
}

fn barrier(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    communicator.barrier()
}

fn scalars(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    communicator.all_gather_scalars(&[1]).map(|_| ())
}

fn gather_first_window(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    communicator.gather_window(memory.windows.remove(0), Event::PAST).wait().map(|_| ())
}

fn gather_second_window(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    communicator.gather_window(memory.windows.remove(1), Event::PAST).wait().map(|_| ())
}

fn gather_cut(communicator: &Communicator, memory: &mut Memory, chunks: &[usize]) -> Result<(), Error> {
    let (shard, output) = (memory.take::<f32>(PART), memory.take::<f32>(3 * PART));
    communicator.all_gather_sections(&Sections::new(chunks)?, shard, output, Event::PAST).wait().map(|_| ())
}

fn gather_short_first(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    gather_cut(communicator, memory, &[1, PART - 1])
}

fn gather_long_first(communicator: &Communicator, memory: &mut Memory) -> Result<(), Error> {
    gather_cut(communicator, memory, &[PART - 1, 1])
}

fn gather_window_cut(communicator: &Communicator, chunks: &[usize]) -> Result<(), Error> {
    let window = communicator.window_of(&Cpu, DType::F32, &Sections::new(chunks)?)?;
    communicator.gather_window(window, Event::PAST).wait().map(|_| ())
}

fn gather_window_short_first(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    gather_window_cut(communicator, &[1, PART - 1])
}

fn gather_window_long_first(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    gather_window_cut(communicator, &[PART - 1, 1])
}

fn allocate(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    communicator.allocate(&Cpu, DType::F32, PART).map(|_| ())
}

fn allocate_more(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    communicator.allocate(&Cpu, DType::F32, 2 * PART).map(|_| ())
}

fn make_window(communicator: &Communicator, _: &mut Memory) -> Result<(), Error> {
    communicator.window(&Cpu, DType::F32, WORLD * PART).map(|_| ())
}

/// Makes every wrong call of [`CASES`], then every wrong message, from arenas and from private memory.
pub(crate) fn make_all(rank: &Rank) -> Result<(), Error> {
    let mut number = 0;
    let mut on_its_own = |in_arena: bool, call: &dyn Fn(&Communicator, &mut Memory) -> Result<(), Error>| {
        number += 1;
        let communicator =
            Communicator::connect(&rank.launch(&format!("{}.{number}", rank.job)), rank.options.clone())?;
        let mut memory = Memory::new(&communicator, in_arena)?;
        communicator.barrier()?;
        let error = call(&communicator, &mut memory).expect_err("ranks disagree");
        rank.report("case", &error);
        assert!(memory.is_untouched(), "case {number} wrote to memory after {error}");
        Ok::<(), Error>(())
    };
    for in_arena in [true, false] {
        for ((_, right), (_, wrong)) in CASES {
            on_its_own(in_arena, &|communicator, memory| {
                if communicator.rank() == ODD { wrong(communicator, memory) } else { right(communicator, memory) }
            })?;
        }
        for (sent, received, another_type) in MESSAGES {
            on_its_own(in_arena, &|communicator, _| {
                let memory = |dtype, len| {
                    if in_arena {
                        communicator.allocate(&Cpu, dtype, len)
                    } else {
                        Ok(Cpu.allocate(dtype, len).unwrap())
                    }
                };
                let (sending, receiving) =
                    (memory(DType::F32, sent)?, memory(if another_type { DType::U32 } else { DType::F32 }, received)?);
                match communicator.rank() {
                    // A short message is complete once it has been staged: the sender hears of the refusal with one that follows it, at
                    // the latest when there is no room for more.
                    0 => (0..3)
                        .try_fold(sending, |buffer, _| communicator.send(buffer, ODD, Event::PAST).wait())
                        .map(|_| ()),
                    ODD => communicator.receive(receiving, 0, Event::PAST).wait().map(|_| ()),
                    _ => communicator.barrier(),
                }
            })?;
        }
    }
    Ok(())
}

/// Communicators that end well and badly, 50 of them; what the process holds before and after.
pub(crate) fn connect_and_drop(rank: &Rank) -> Result<(), Error> {
    const ENDS: usize = 5;
    let [_, threads, _] = held().0;
    let round = |number: usize| {
        for end in 0..ENDS {
            let name = format!("{}.{number}.{end}", rank.job);
            if let Err(error) = come_and_go(rank, end, &name) {
                rank.say(&format!("{} {end} {error}", parts(&error).0));
            }
            // A communicator that could not connect ends its thread a moment later.
            let until = Instant::now() + Duration::from_secs(10);
            while held().0[1] != threads && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    // Stacks of the first threads stay for later ones.
    (0..3).for_each(round);
    rank.say(&format!("held {:?}", held()));
    (3..13).for_each(round);
    rank.say(&format!("held {:?}", held()));
    Ok(())
}

fn come_and_go(rank: &Rank, end: usize, name: &str) -> Result<(), Error> {
    if end == 4 {
        // Nobody else has this name.
        let options = Options { startup_timeout: Duration::from_millis(5), ..rank.options.clone() };
        return Communicator::connect(&rank.launch(&format!("{name}.{}", rank.rank)), options).map(|_| ());
    }
    let communicator = Communicator::connect(&rank.launch(name), rank.options.clone())?;
    let shared = communicator.allocate(&Cpu, DType::F32, 10_000)?;
    let mut window =
        communicator.gather_window(communicator.window(&Cpu, DType::F32, rank.world * 1000)?, Event::PAST).wait()?;
    window.release(&Event::PAST).unwrap();
    match (end, rank.is_victim()) {
        (0, _) => {
            let shared = communicator.all_reduce(shared, Reduction::Sum, Event::PAST).wait()?;
            let shared = communicator.broadcast(shared, 0, Start::Here).wait()?;
            drop(communicator);
            drop((shared, window));
            Ok(())
        }
        (1, true) => Ok(()),
        (2, true) => {
            communicator.abort("enough");
            Ok(())
        }
        (3, true) => communicator.broadcast(private(10), 0, Event::PAST).wait().map(|_| ()),
        _ => communicator.all_gather(private(1000), private(1000 * rank.world), Event::PAST).wait().map(|_| ()),
    }
}
