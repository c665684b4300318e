//! The operations as the MPI library does them that this program is linked with, for `--compare mpi`. Raw bindings, every return code checked.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr;

use ::mpi::ffi;
use pillion_collectives::{Launch, Reduction};
use pillion_kernels::{Buffer, DType};

use crate::Error;
use crate::case::{Case, Operands};
use crate::operation::Operation;

/// A function of MPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    ReduceScatterBlock,
    ReduceScatter,
    Allgather,
    Allreduce,
    Bcast,
    Reduce,
    Gather,
    Scatter,
    Alltoall,
    Sendrecv,
    Barrier,
    Allgatherv,
    Gatherv,
    Scatterv,
    Alltoallv,
}

impl Call {
    /// Its name in MPI.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Call::ReduceScatterBlock => "MPI_Reduce_scatter_block",
            Call::ReduceScatter => "MPI_Reduce_scatter",
            Call::Allgather => "MPI_Allgather",
            Call::Allreduce => "MPI_Allreduce",
            Call::Bcast => "MPI_Bcast",
            Call::Reduce => "MPI_Reduce",
            Call::Gather => "MPI_Gather",
            Call::Scatter => "MPI_Scatter",
            Call::Alltoall => "MPI_Alltoall",
            Call::Sendrecv => "MPI_Sendrecv",
            Call::Barrier => "MPI_Barrier",
            Call::Allgatherv => "MPI_Allgatherv",
            Call::Gatherv => "MPI_Gatherv",
            Call::Scatterv => "MPI_Scatterv",
            Call::Alltoallv => "MPI_Alltoallv",
        }
    }
}

/// MPI, initialised by this program; while it exists, nobody finalises it.
pub(crate) struct Library {
    name: String,
    rank: usize,
    world: usize,
}

impl Library {
    /// Initialises MPI for calls from many threads, so that the communicators can use it beside us.
    pub(crate) fn begin(launch: &Launch) -> Result<Library, Error> {
        let mut granted = 0;
        // SAFETY: called once in the life of the process, before anybody else uses MPI. Null for argc and argv is allowed since MPI 2;
        // the level granted is written to memory of ours. A lower one is refused by whoever needs more.
        let code =
            unsafe { ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), ffi::RSMPI_THREAD_MULTIPLE, &mut granted) };
        check(code, "MPI_Init_thread")?;
        // SAFETY: MPI is initialised. Its errors would otherwise end the process without a word of ours.
        let code = unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) };
        check(code, "MPI_Comm_set_errhandler")?;
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI is initialised, and both pointers are valid for the write.
        let codes = unsafe {
            [ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank), ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size)]
        };
        check(codes[0], "MPI_Comm_rank")?;
        check(codes[1], "MPI_Comm_size")?;
        let (name, world) = (pillion_collectives::mpi_library(), launch.world);
        if (rank as usize, size as usize) != (launch.rank, world) {
            return Err(Error::Library {
                call: "MPI_Init_thread",
                reason: format!(
                    "{name} says rank {rank} of {size}, the launcher ({}) says rank {} of {world}: start the ranks with the mpirun of \
                     {name}, which this program is linked with",
                    launch.source, launch.rank
                ),
            });
        }
        Ok(Library { name, rank: launch.rank, world })
    }

    /// The library's own name and version, such as `Open MPI v4.1.4`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether MPI has elements of this type, and this reduction.
    pub(crate) fn has(&self, dtype: DType, reduction: Reduction) -> bool {
        datatype(dtype).is_ok() && combination(reduction).is_ok()
    }

    /// The functions that do what an operation does; none if MPI has none.
    pub(crate) fn calls(&self, operation: Operation) -> &'static [Call] {
        match operation {
            Operation::ReduceScatter => &[Call::ReduceScatterBlock, Call::ReduceScatter],
            Operation::AllGather => &[Call::Allgather],
            Operation::AllReduce | Operation::Scalars => &[Call::Allreduce],
            Operation::Broadcast => &[Call::Bcast],
            Operation::Reduce => &[Call::Reduce],
            Operation::Gather => &[Call::Gather],
            Operation::Scatter => &[Call::Scatter],
            Operation::AllToAll => &[Call::Alltoall],
            Operation::SendRecv => &[Call::Sendrecv],
            Operation::Barrier => &[Call::Barrier],
            Operation::Window => &[],
            Operation::ReduceScatterV => &[Call::ReduceScatter],
            Operation::AllGatherV => &[Call::Allgatherv],
            Operation::GatherV => &[Call::Gatherv],
            Operation::ScatterV => &[Call::Scatterv],
            Operation::AllToAllV => &[Call::Alltoallv],
        }
    }

    /// Calls the function with a case's buffers, on every rank at once.
    ///
    /// # Panics
    /// If `call` is not one of `calls` for the case's operation, or the case is of a form that is not the first one.
    pub(crate) fn run(&self, call: Call, case: &mut Case) -> Result<(), Error> {
        let pattern = *case.pattern();
        assert!(self.calls(pattern.operation).contains(&call), "{call:?} for {:?}", pattern.operation);
        assert!(pattern.form == pattern.operation.forms()[0], "MPI in the form {:?}", pattern.form);
        assert!((pattern.rank, pattern.world) == (self.rank, self.world), "a case of other ranks");
        let count = int(pattern.count)?;
        if pattern.operation == Operation::Scalars {
            return self.run_scalars(case, pattern.reduction);
        }
        let Operands { input, output } = case.operands();
        let dtype = input.as_ref().or(output.as_ref()).map_or(DType::F32, Buffer::dtype);
        for (buffer, len) in [(&*input, pattern.input_len()), (&*output, pattern.output_len())] {
            let holds = buffer.as_ref().map(|buffer| (buffer.bytes(), buffer.dtype()));
            assert!(
                holds == len.map(|len| (len * dtype.bytes(), dtype)),
                "{call:?} of {len:?} elements with {holds:?}"
            );
        }
        let from: *const c_void = input.as_ref().map_or(ptr::null(), |buffer| buffer.span().address().as_ptr().cast());
        let to: *mut c_void = output.as_mut().map_or(ptr::null_mut(), |buffer| buffer.span().address().as_ptr().cast());
        let (kind, combine) = (datatype(dtype)?, combination(pattern.reduction)?);
        let (next, previous) = ((self.rank + 1) % self.world, (self.rank + self.world - 1) % self.world);
        let takes_counts = call == Call::ReduceScatter || pattern.operation.is_uneven();
        let parts = if takes_counts { pattern.parts(self.rank) } else { Vec::new() };
        let counts = parts.iter().map(|&count| int(count)).collect::<Result<Vec<c_int>, Error>>()?;
        let ends = parts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end - count)
        });
        let starts = ends.map(int).collect::<Result<Vec<c_int>, Error>>()?;
        // What MPI calls the displacements; an all-to-all-v's are the same on both sides.
        let (counts, starts) = (counts.as_ptr(), starts.as_ptr());
        let own = int(parts.get(self.rank).copied().unwrap_or(0))?;
        // SAFETY: MPI is initialised while `self` exists, and every rank makes this call with the
        // same operation, count, type and root. The buffers that this rank must have were just seen
        // to hold `count` elements of this type, times the number of ranks where the operation is
        // one of parts (`Pattern::input_len` and `output_len` are MPI's own rules for them); a
        // buffer that only the root has may be null elsewhere. Input and output are two buffers,
        // borrowed for the length of this blocking call. `counts` and `starts` have one number for
        // each rank, where the call takes them, and say parts that follow each other in such a
        // buffer.
        let code = unsafe {
            let world = ffi::RSMPI_COMM_WORLD;
            match call {
                Call::ReduceScatterBlock => ffi::MPI_Reduce_scatter_block(from, to, count, kind, combine, world),
                Call::ReduceScatter => ffi::MPI_Reduce_scatter(from, to, counts, kind, combine, world),
                Call::Allgather => ffi::MPI_Allgather(from, count, kind, to, count, kind, world),
                Call::Allreduce => ffi::MPI_Allreduce(from, to, count, kind, combine, world),
                Call::Bcast => ffi::MPI_Bcast(to, count, kind, 0, world),
                Call::Reduce => ffi::MPI_Reduce(from, to, count, kind, combine, 0, world),
                Call::Gather => ffi::MPI_Gather(from, count, kind, to, count, kind, 0, world),
                Call::Scatter => ffi::MPI_Scatter(from, count, kind, to, count, kind, 0, world),
                Call::Alltoall => ffi::MPI_Alltoall(from, count, kind, to, count, kind, world),
                Call::Sendrecv => {
                    let (next, previous, status) = (next as c_int, previous as c_int, ffi::RSMPI_STATUS_IGNORE);
                    ffi::MPI_Sendrecv(from, count, kind, next, 0, to, count, kind, previous, 0, world, status)
                }
                Call::Barrier => ffi::MPI_Barrier(world),
                Call::Allgatherv => ffi::MPI_Allgatherv(from, own, kind, to, counts, starts, kind, world),
                Call::Gatherv => ffi::MPI_Gatherv(from, own, kind, to, counts, starts, kind, 0, world),
                Call::Scatterv => ffi::MPI_Scatterv(from, counts, starts, kind, to, own, kind, 0, world),
                Call::Alltoallv => ffi::MPI_Alltoallv(from, counts, starts, kind, to, counts, starts, kind, world),
            }
        };
        check(code, call.name())
    }

    fn run_scalars(&self, case: &mut Case, reduction: Reduction) -> Result<(), Error> {
        let combine = combination(reduction)?;
        let (own, combined) = case.scalars();
        // SAFETY: MPI is initialised while `self` exists; one double is read and another one written; both live through the call.
        let code = unsafe {
            let (kind, world) = (ffi::RSMPI_DOUBLE, ffi::RSMPI_COMM_WORLD);
            let (from, to) = (ptr::from_ref(own).cast(), ptr::from_mut(combined).cast());
            ffi::MPI_Allreduce(from, to, 1, kind, combine, world)
        };
        check(code, Call::Allreduce.name())
    }

    /// Finalises MPI, once every rank does. No communicator uses it any more.
    pub(crate) fn finish(self) -> Result<(), Error> {
        // SAFETY: this program initialised MPI and finalises it once, `self` being the only right to; nobody calls it later.
        check(unsafe { ffi::MPI_Finalize() }, "MPI_Finalize")
    }
}

/// MPI's name for a type that it has.
fn datatype(dtype: DType) -> Result<ffi::MPI_Datatype, Error> {
    // SAFETY: reads constants that the bindings' C code defines.
    unsafe {
        match dtype {
            DType::F32 => Ok(ffi::RSMPI_FLOAT),
            DType::F64 => Ok(ffi::RSMPI_DOUBLE),
            DType::I8 => Ok(ffi::RSMPI_INT8_T),
            DType::U8 => Ok(ffi::RSMPI_UINT8_T),
            DType::I32 => Ok(ffi::RSMPI_INT32_T),
            DType::U32 => Ok(ffi::RSMPI_UINT32_T),
            DType::I64 => Ok(ffi::RSMPI_INT64_T),
            DType::U64 => Ok(ffi::RSMPI_UINT64_T),
            DType::Bf16 | DType::F16 | DType::Bool => Err(missing(dtype.name())),
        }
    }
}

/// MPI's name for a reduction that it has.
fn combination(reduction: Reduction) -> Result<ffi::MPI_Op, Error> {
    // SAFETY: reads constants that the bindings' C code defines.
    unsafe {
        match reduction {
            Reduction::Sum => Ok(ffi::RSMPI_SUM),
            Reduction::Prod => Ok(ffi::RSMPI_PROD),
            Reduction::Min => Ok(ffi::RSMPI_MIN),
            Reduction::Max => Ok(ffi::RSMPI_MAX),
            Reduction::BitAnd => Ok(ffi::RSMPI_BAND),
            Reduction::BitOr => Ok(ffi::RSMPI_BOR),
            Reduction::BitXor => Ok(ffi::RSMPI_BXOR),
            Reduction::Avg | Reduction::PremulSum(_) => Err(missing(reduction.name())),
        }
    }
}

fn missing(name: &str) -> Error {
    Error::Usage(format!("MPI has no {name}: leave --compare out"))
}

fn int(count: usize) -> Result<c_int, Error> {
    let too_many = || format!("MPI counts with an int, {count} elements are more: choose a smaller maximum with -e");
    c_int::try_from(count).map_err(|_| Error::Usage(too_many()))
}

fn check(code: c_int, call: &'static str) -> Result<(), Error> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the standard has callers provide MPI_MAX_ERROR_STRING bytes, which `text` has; `length` is valid for the write.
    let known = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let reason = match text.get(..length as usize) {
        Some(text) if known == ffi::MPI_SUCCESS as c_int => String::from_utf8_lossy(text).into_owned(),
        _ => format!("MPI error {code}"),
    };
    Err(Error::Library { call, reason })
}
