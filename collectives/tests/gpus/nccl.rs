//! Collectives between GPUs by NCCL: sums within the bound of another order, everything else with
//! the bits of the host's. Ranks are processes, each with a GPU of its own.

use half::bf16;
use pillion_collectives::{Error, GpuTransport, Options, Reduce, Reduction};
use pillion_kernels::{Buffer, DType, Device, Stream};

use crate::processes::{held, nothing_runs, open_after_failure, run_with};
use crate::same_bits::{Operation, gathers, grid, in_order, results, sums};
use crate::{Rank, standin};

/// Runs a job by NCCL, and demands that all ranks end well.
fn run(program: &str, world: usize, seed: u64, number: u64) {
    run_with(program, world, seed, number, &NCCL).well();
}

const NCCL: [(&str, &str); 2] = [("GPUS_BY", "nccl"), ("PILLION_STANDIN_DEVICES", "4")];

/// No input is larger: so many normals hardly ever are.
const LARGEST: f64 = 8.0;

/// How far two sums of `world` inputs may lie apart that are added in different orders. Each
/// addition, and each factor, rounds to half a unit of f32 at most, of a sum that is no larger than
/// all inputs together and what was there before; a result of bf16 is rounded once more, to one
/// side or the other.
fn bound(dtype: DType, world: usize) -> f64 {
    let most = (world as f64 + 1.0) * LARGEST;
    let rounding = 2.0 * (world as f64 + 3.0) * f64::from(f32::EPSILON) / 2.0 * most;
    match dtype {
        DType::F32 => rounding,
        DType::Bf16 => rounding + 2f64.powi(-7) * most,
        _ => 0.0,
    }
}

fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect(),
        DType::Bf16 => bytes.as_chunks::<2>().0.iter().map(|x| bf16::from_le_bytes(*x).to_f64()).collect(),
        DType::F64 => bytes.as_chunks::<8>().0.iter().map(|x| f64::from_le_bytes(*x)).collect(),
        other => panic!("no numbers of {other}"),
    }
}

fn check(rank: &Rank, world: usize, what: &str, operation: &Operation<'_>) {
    let [host, gpus] = results(rank, world, operation);
    for ((dtype, host), (_, gpus)) in host.iter().zip(&gpus) {
        let bound = bound(*dtype, world);
        for (index, (a, b)) in numbers(*dtype, host).iter().zip(numbers(*dtype, gpus)).enumerate() {
            let is_near = (a - b).abs() <= bound && a.abs() <= (world as f64 + 1.0) * LARGEST;
            assert!(is_near, "{what} of {dtype}: element {index} of rank {} is {b}, not {a}", rank.number);
        }
    }
}

pub(crate) fn near(rank: &Rank, world: usize, number: u64) {
    assert!(!rank.gpus.capabilities().rank_order && rank.gpus.mover().contains("(registered memory)"));
    if number == 1 {
        // A second communicator of the same ranks.
        standin::fail("ncclCommRegister", 1, 1);
        let other = rank.host.between_gpus(&rank.gpu, GpuTransport::Nccl).unwrap();
        assert!(other.mover().contains("(unregistered memory)"), "{}", other.mover());
        let stream = rank.gpu.stream();
        let sum = other.all_reduce(numbers_of(&*stream, rank, 5), Reduction::Sum, stream.record()).then(&*stream);
        stream.download::<f32>(sum.unwrap().view()).unwrap();
        return;
    }
    large_sums_of_numbers(rank, world);
    gathers(&mut |what, operation| crate::same_bits::check(rank, world, what, operation));
    sums(&mut |what, operation| check(rank, world, what, operation));
    in_order(rank, world);
    if world == 4 {
        grid(&mut |what, operation| check(rank, world, what, operation));
    }
}

fn numbers_of(stream: &dyn Stream, rank: &Rank, len: usize) -> Buffer {
    crate::numbers(stream, &rank.gpu, DType::F32, len, rank.number as u64)
}

/// Sums of f64, and means and multiplied sums of terms that are too large to be added first.
fn large_sums_of_numbers(rank: &Rank, world: usize) {
    let stream = rank.gpu.stream();
    let buffer = |dtype: DType, bytes: Vec<u8>| {
        let mut buffer = rank.gpu.allocate(dtype, bytes.len() / dtype.bytes()).unwrap();
        stream.upload_bytes(buffer.view_mut(), &bytes);
        buffer
    };
    let wide = buffer(DType::F64, (0..world as u64).flat_map(|index| (index as f64 + 0.5).to_le_bytes()).collect());
    let shard = rank.gpu.allocate(DType::F64, 1).unwrap();
    let reduce = |accumulate, input, output| Reduce {
        input,
        sections: None,
        output,
        reduction: Reduction::Sum,
        accumulate,
        sideband: None,
    };
    let pending = rank.gpus.reduce_scatter(reduce(false, wide, shard), stream.record());
    let Reduce { input, output, .. } = pending.then(&*stream).unwrap();
    let expected = world as f64 * (rank.number as f64 + 0.5);
    assert_eq!(stream.download::<f64>(output.view()).unwrap(), [expected]);
    let refused = rank.gpus.reduce_scatter(reduce(true, input, output), stream.record()).wait().err().unwrap();
    assert!(refused.to_string().contains("sums of f64 that are added"), "{refused}");
    let large = buffer(DType::F32, f32::MAX.to_le_bytes().repeat(3));
    let small = Reduction::PremulSum(1.0 / 1024.0);
    let summed = rank.gpus.all_reduce(large, small, stream.record()).then(&*stream).unwrap();
    assert_eq!(stream.download::<f32>(summed.view()).unwrap(), [f32::MAX / 1024.0 * world as f32; 3]);
}

#[test]
fn sums_are_near_and_the_rest_is_equal() {
    for (seed, world) in [2, 3, 4].into_iter().enumerate() {
        run("near", world, seed as u64, 0);
    }
}

#[test]
fn memory_that_nccl_does_not_register_is_moved_all_the_same() {
    run("near", 2, 7, 1);
    run_with("near", 2, 8, 0, &[NCCL[0], NCCL[1], ("PILLION_STANDIN_NCCL", "21903")]).well();
}

#[test]
fn ranks_on_several_hosts_take_nccl_by_themselves() {
    standin::reset(3);
    crate::run(2, Options { simulated_hosts: 2, ..Options::default() }, |rank: &Rank| {
        assert!(!rank.gpus.capabilities().rank_order && rank.gpus.hosts() == 2);
        in_order(rank, 2);
        let refused = rank.host.between_gpus(&rank.gpu, GpuTransport::Peer).err().unwrap();
        assert!(refused.to_string().contains("NCCL serves several"), "{refused}");
    });
}

#[test]
fn what_nccl_cannot_have_is_refused_by_name() {
    for (variables, named) in [
        (vec![("PILLION_STANDIN_DEVICES", "1")], "ranks 0 and 1 have the same GPU"),
        (vec![("PILLION_STANDIN_NCCL", "21805")], "version 2.18.5: install NCCL 2.19 or newer"),
    ] {
        let variables: Vec<_> = [NCCL[0]].into_iter().chain(variables).collect();
        for (status, said) in run_with("is refused", 2, 0, 0, &variables).0 {
            assert!(status.success() && said.contains(named), "{status}\n{said}");
        }
    }
}

#[test]
fn a_rank_that_dies_gives_up_fails_or_is_late_stops_the_others() {
    for (seed, (world, victim)) in [(2, 1), (3, 0), (4, 2)].into_iter().enumerate() {
        for (rank, (status, said)) in run_with("dies", world, seed as u64, victim, &NCCL).0.iter().enumerate() {
            assert_eq!(status.success(), rank as u64 != victim, "rank {rank} of {world}: {status}\n{said}");
        }
    }
    for seed in 0..2 {
        for program in ["fails", "gives up", "is late"] {
            run(program, 3, seed, 0);
        }
    }
    run("another call", 3, 0, 0);
    run("does not come", 3, 0, 0);
}

/// NCCL of rank 1 says that the network is gone, while all wait for rank 1.
pub(crate) fn loses_nccl(rank: &Rank, _: usize, _: u64) {
    let (gate, stream) = (crate::gate::Gate::new(), rank.gpu.stream());
    let pending = held(rank, &*stream, (rank.number == 1).then_some(&gate));
    if rank.number == 1 {
        standin::fail("asynchronous error of NCCL", 0, 6);
    }
    open_after_failure(rank, &gate);
    let error = pending.wait().unwrap_err();
    match &error {
        Error::System { what: "NCCL", reason } if rank.number == 1 => assert!(reason.contains("network"), "{error}"),
        Error::Aborted { reason, .. } if rank.number != 1 => assert!(reason.contains("NCCL"), "{error}"),
        other => panic!("{other}"),
    }
    nothing_runs(rank);
}

#[test]
fn an_error_that_nccl_finds_later_ends_the_job() {
    for seed in 0..2 {
        run("loses NCCL", 3, seed, 0);
    }
}
