//! Arguments that cannot be are errors with a code and a remedy, before any other rank hears of the
//! call; the communicator goes on.

mod common;

use std::sync::Arc;

use pillion_collectives::{
    Communicator, Error, Launch, Observation, Options, Parts, Pending, Reduce, Reduction, Sections, Sideband, Start,
};
use pillion_kernels::cpu::compare::Comparison;
use pillion_kernels::{Buffer, Cpu, DType, Device, LazyCpu};

/// The code of misuse, which programs in other languages see.
const MISUSE: i32 = 8;

fn f32s(len: usize) -> Buffer {
    Cpu.allocate(DType::F32, len).unwrap()
}

fn of(dtype: DType, len: usize) -> Buffer {
    Cpu.allocate(dtype, len).unwrap()
}

/// Runs `program` on three ranks.
fn ranks(program: impl Fn(&Communicator) + Sync) {
    common::run(Launch::threads(3), Options::default(), |_, communicator| program(&communicator));
}

fn refused<T>(pending: Pending<T>, part: &str) {
    said(pending.wait().err(), part);
}

fn said(error: Option<Error>, part: &str) {
    let error = error.unwrap_or_else(|| panic!("there is no error with {part:?}"));
    assert_eq!(error.code(), MISUSE, "{error}");
    assert!(error.to_string().contains(part), "{error}");
}

#[test]
fn wrong_arguments_are_refused_and_the_communicator_goes_on() {
    ranks(|c| {
        let here = || Start::Here;
        let sum = Reduction::Sum;
        let reduce = |input, output, reduction, sideband| Reduce {
            input,
            sections: None,
            output,
            reduction,
            accumulate: false,
            sideband,
        };
        refused(c.all_gather(f32s(4), f32s(11), here()), "over 3 ranks");
        refused(c.all_gather(f32s(4), of(DType::F64, 12), here()), "one type");
        refused(c.all_gather(f32s(4), LazyCpu::new(1).allocate(DType::F32, 12).unwrap(), here()), "of one device");
        refused(c.all_gather_in_place(f32s(10), here()), "3 equal parts");
        refused(c.broadcast(f32s(4), 3, here()), "rank 3 of 3");
        let on_root = |root: usize, len| (c.rank() == root).then(|| f32s(len));
        refused(c.gather(f32s(4), on_root(7, 1), 7, here()), "rank 7 of 3");
        let not_the_root = (c.rank() != 1).then(|| f32s(12));
        refused(c.gather(f32s(4), not_the_root, 1, here()), "rank 1, gives the other buffer");
        if c.rank() == 1 {
            // Only the root can be wrong about what only it has; the others are not called.
            refused(c.gather(f32s(4), on_root(1, 11), 1, here()), "12 elements");
            refused(c.scatter(on_root(1, 11), f32s(4), 1, here()), "12 elements");
            refused(c.reduce(f32s(4), on_root(1, 5), sum, 1, here()), "4 elements");
        }
        refused(c.all_to_all(f32s(10), f32s(10), here()), "3 equal parts");
        refused(c.all_to_all(f32s(9), f32s(12), here()), "lengths that fit");
        refused(c.send(f32s(1), 3, here()), "rank 3 of 3");
        refused(c.receive(f32s(1), 9, here()), "rank 9 of 3");
        refused(c.all_reduce(f32s(4), Reduction::BitAnd, here()), "no band of f32");
        refused(c.all_reduce(of(DType::Bool, 4), Reduction::Avg, here()), "no avg of bool");
        refused(c.all_reduce_into(f32s(4), f32s(5), sum, here()), "lengths that are equal");
        refused(c.all_reduce_into(f32s(4), of(DType::Bf16, 4), sum, here()), "no sum of f32 into bf16");
        refused(c.all_reduce_into(of(DType::U8, 4), of(DType::I64, 4), sum, here()), "no sum of u8 into i64");
        refused(c.reduce_scatter(reduce(f32s(11), f32s(4), sum, None), here()), "a part for each rank");
        let narrow = Some(Sideband { own: of(DType::F64, 3), totals: of(DType::F64, 4) });
        refused(c.reduce_scatter(reduce(f32s(12), f32s(4), sum, narrow), here()), "a sideband is as many");
        let long = Some(Sideband { own: of(DType::F64, 65), totals: of(DType::F64, 65) });
        refused(c.reduce_scatter(reduce(f32s(12), f32s(4), sum, long), here()), "at most 64");
        refused(c.reduce_scatter_in_place(f32s(10), sum, here()), "3 equal parts");
        let observation =
            |len| Observation { totals: of(DType::F64, len), observer: Arc::new(Comparison { limit: 1.0 }) };
        let max = reduce(f32s(12), f32s(4), Reduction::Max, None);
        refused(c.reduce_scatter_observed(max, observation(5), here()), "their sum in f32");
        let summed = reduce(f32s(12), f32s(4), sum, None);
        refused(c.reduce_scatter_observed(summed, observation(4), here()), "an observation is 5 × f64");
        said(c.all_reduce_scalars(&mut [1.0], Reduction::BitOr).err(), "no bor of f64");
        said(c.all_gather_scalars(&[0; 65]).err(), "65 scalars at a time");
        said(c.broadcast_bytes(3, &[]).err(), "rank 3 of 3");
        let parts = |lengths: [usize; 3]| Parts::list(lengths.map(f32s).into());
        said(Parts::cut(f32s(5), &[2, 4]).err(), "lengths that fit");
        said(Parts::cut(f32s(5), &[2, usize::MAX]).err(), "lengths that fit");
        refused(c.all_gather_v(f32s(4), Parts::list(vec![f32s(4), f32s(4)]), here()), "of 2 parts");
        refused(c.all_gather_v(f32s(4), parts([5, 5, 5]), here()), "part of the output has 5 elements");
        refused(c.all_gather_v(of(DType::F64, 4), parts([4; 3]), here()), "give one type");
        refused(c.all_gather_v_in_place(Parts::list(Vec::new()), here()), "of no parts");
        refused(c.gather_v(f32s(4), None, 3, here()), "rank 3 of 3");
        refused(c.scatter_v((c.rank() != 1).then(|| parts([4; 3])), f32s(4), 1, here()), "gives the parts");
        refused(c.all_to_all_v(parts([1; 3]), Parts::cut(of(DType::F64, 9), &[1; 3]).unwrap(), here()), "one type");
        refused(c.reduce_scatter_v(parts([4; 3]), f32s(3), sum, here()), "part of the input has 4 elements");
        refused(c.reduce_scatter_v_in_place(parts([4; 3]), Reduction::BitXor, here()), "no bxor of f32");
        said(Sections::new(&[]).err(), "0 sections");
        said(Sections::new(&[1; 40_000]).err(), "40000 sections");
        said(Sections::new(&[usize::MAX, 2]).err(), "longer than any memory");
        said(c.window(&Cpu, DType::F32, 10).err(), "a window of 10 elements over 3 ranks");

        let mut window = c.window(&Cpu, DType::F32, 12).unwrap();
        said(window.shard_mut(1).err(), "section 1 of a window of 1");
        said(window.shard(1).err(), "section 1 of a window of 1");
        said(window.view().err(), "gathered before it is read");
        let mut window = c.gather_window(window, here()).wait().unwrap();
        said(window.shard_mut(0).err(), "released before it is written");
        refused(c.gather_window(window, here()), "released before it is gathered again");

        // Nothing of this was heard of.
        c.healthy().unwrap();
        let buffer = c.all_reduce(f32s(4), sum, here()).wait().unwrap();
        assert_eq!(Cpu.stream().download::<f32>(buffer.view()).unwrap(), [0.0; 4]);
        c.barrier().unwrap();
    });
}

#[test]
fn errors_keep_their_codes() {
    let text = || String::from("x");
    let errors = [
        Error::PeerLost { rank: 0, op: text(), how: "x" },
        Error::Timeout { op: text(), waiting_on: vec![0], seconds: 0, how: text() },
        Error::NotStarted { op: text(), seconds: 0 },
        Error::Before(pillion_kernels::Failure::new(Error::System { what: "x", reason: text() })),
        Error::Mismatch { ours: text(), theirs: text(), peer: 0 },
        Error::Aborted { rank: 0, reason: text() },
        Error::Options { reason: text(), said_by_rank_zero: false },
        Error::Misuse { reason: text() },
        Error::Rendezvous { rank: 0, world: 1, job: text(), reason: text() },
        Error::OutOfMemory { bytes: 1, available: 0, limit: "x" },
        Error::System { what: "x", reason: text() },
        Error::Interrupted,
        Error::Store { reason: String::new() },
    ];
    let codes: Vec<i32> = errors.iter().map(Error::code).collect();
    assert_eq!(codes, (1..=13).collect::<Vec<i32>>());
}
