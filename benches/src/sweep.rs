//! A run on one rank: every operation, type and size in turn.

use std::sync::Arc;

use pillion_collectives::{Backend, Communicator, Launch, Reduction, available_memory};
use pillion_kernels::DType;

use crate::Error;
use crate::arguments::{Buffers, Settings};
use crate::binding::{self, Binding};
use crate::case::Case;
use crate::gpu::{self, Gpu};
use crate::integral::largest;
use crate::link::Link;
use crate::machine::{self, Machine};
use crate::mpi::{Call, Library};
use crate::operation::{Form, Operation};
use crate::overlap;
use crate::pattern::Pattern;
use crate::report::{Measurement, Report, Times};
use crate::roofline::{self, Loops};
use crate::timing::{self, Flush, Repeat};

/// Bytes that `--cold` walks at least: caches that virtual machines report mislead.
const LEAST_FLUSH: usize = 64 << 20;

/// Measures everything that the settings say; returns the number of wrong elements over all ranks. Every rank calls this.
///
/// # Errors
/// Whatever keeps it from the end; the other ranks are told.
pub fn run(settings: &Settings, launch: &Launch, command: &[String]) -> Result<u64, Error> {
    // Before any other thread starts, which inherits it.
    let binding = binding::bind(launch, settings.bind)?;
    let library = settings.compare.map(|_| Library::begin(launch)).transpose()?;
    let mut link = Link::connect(launch, &settings.options)?;
    let result =
        Sweep::new(settings, &link, binding, library.as_ref()).and_then(|mut sweep| sweep.all(&mut link, command));
    // What every rank knows needs no telling, and telling might overtake the knowledge.
    if let Err(error) = &result
        && !error.is_everywhere()
    {
        link.abort(error);
    }
    drop(link);
    if let Some(library) = library.filter(|_| result.is_ok()) {
        library.finish()?;
    }
    result
}

struct Sweep<'a> {
    settings: &'a Settings,
    gpu: Option<Arc<Gpu>>,
    binding: Binding,
    library: Option<&'a Library>,
    machine: Machine,
    report: Report,
    repeat: Repeat,
    wrong: u64,
}

impl<'a> Sweep<'a> {
    fn new(
        settings: &'a Settings,
        link: &Link,
        binding: Binding,
        library: Option<&'a Library>,
    ) -> Result<Sweep<'a>, Error> {
        let world = link.communicator().world();
        let sums = settings.operations.iter().any(|one| one.reduces())
            && settings
                .reductions
                .iter()
                .any(|one| matches!(one, Reduction::Sum | Reduction::Avg | Reduction::PremulSum(_)));
        let numbers = settings.dtypes.iter().filter(|&&dtype| dtype != DType::Bool);
        let most = numbers.map(|&dtype| (largest(dtype), dtype)).min_by_key(|(most, _)| *most);
        if let Some((most, dtype)) = most
            && settings.check
            && sums
            && world > most
        {
            let text = format!(
                "--check knows the sums of at most {most} ranks of {dtype} exactly, here are {world}: use -o max"
            );
            return Err(Error::Usage(text));
        }
        let gpu = settings.gpu.map(|wanted| open_gpu(wanted, settings, link)).transpose()?;
        let machine = Machine::look(link.communicator())?;
        let flush_bytes = (2 * machine::last_level_cache()).max(LEAST_FLUSH);
        Ok(Sweep {
            settings,
            gpu,
            binding,
            library,
            machine,
            report: Report::new(settings.json.clone(), library.is_some(), link.launch().rank > 0)?,
            repeat: Repeat {
                warmup: settings.warmup,
                iterations: settings.iterations,
                flush: settings.cold.then(|| Flush::new(flush_bytes)),
            },
            wrong: 0,
        })
    }

    fn all(&mut self, link: &mut Link, command: &[String]) -> Result<u64, Error> {
        let settings = self.settings;
        self.introduce(link)?;
        for &operation in &settings.operations {
            let forms = settings.forms(operation);
            self.report.heading(operation.name(), forms, settings.overlap && operation.overlaps())?;
            let once = ([DType::F64], [0]);
            let (dtypes, sizes) = match operation.moves_buffers() {
                true => (&settings.dtypes[..], &settings.sizes[..]),
                false => (&once.0[..], &once.1[..]),
            };
            let in_turn = settings.reductions.iter().flat_map(|&one| dtypes.iter().map(move |&dtype| (dtype, one)));
            let calls: Vec<(DType, Reduction)> = match operation.reduces() {
                true => in_turn.filter(|&(dtype, one)| self.combines(operation, dtype, one)).collect(),
                false => dtypes.iter().map(|&dtype| (dtype, Reduction::Sum)).collect(),
            };
            if operation.reduces()
                && let [reduction] = settings.reductions[..]
            {
                let combines = |dtype: &DType| self.combines(operation, *dtype, reduction);
                let left_out: Vec<DType> = dtypes.iter().copied().filter(|dtype| !combines(dtype)).collect();
                for dtype in left_out {
                    self.report.comment(&format!("there is no {} of {dtype}: left out", reduction.name()))?;
                }
            }
            for (dtype, reduction) in calls {
                for &size in sizes {
                    let world = link.communicator().world();
                    let count = operation.count(size, world, dtype);
                    let (mut measured, mut of_library) = (Vec::new(), Vec::new());
                    for &form in forms {
                        let (ours, library) = self.measure(link, operation, form, (dtype, reduction), count)?;
                        measured.push(ours);
                        of_library.extend(library);
                    }
                    self.report.line(measured, of_library)?;
                }
            }
        }
        self.report.finish(&self.machine, command)?;
        // Nobody leaves while rank 0 may still fail.
        link.communicator().barrier()?;
        Ok(self.wrong)
    }

    fn introduce(&mut self, link: &Link) -> Result<(), Error> {
        let (settings, communicator) = (self.settings, link.communicator());
        let threads = if settings.threads { ", threads of one process" } else { "" };
        let hosts = match communicator.backend() {
            Backend::Hierarchical => format!(" over {} hosts", communicator.hosts()),
            _ => String::new(),
        };
        let yes = |flag: bool| if flag { "yes" } else { "no" };
        let Machine { cpu, cores, kernel, isa, .. } = &self.machine;
        let text = format!(
            "collbench {} on {cpu}, {cores} cores, {}, kernel {kernel}\n\
             ranks {} ({}{threads}), backend {}{hosts}, buffers {}, iterations {} after {}, check {}, cold {}, reduction groups {}\n\
             binding {}, processors {}{}{}\n",
            env!("CARGO_PKG_VERSION"),
            isa.join(" "),
            communicator.world(),
            link.launch().source,
            self.backend(communicator),
            self.buffers(),
            settings.iterations,
            settings.warmup,
            yes(settings.check),
            yes(settings.cold),
            settings.options.reduce_groups,
            self.binding,
            self.machine
                .affinity
                .iter()
                .enumerate()
                .map(|(rank, cpus)| format!("{rank}:{cpus}"))
                .collect::<Vec<_>>()
                .join(" "),
            self.library.map_or(String::new(), |library| format!("\ncompared with {}, in turn", library.name())),
            self.gpu.as_ref().map_or(String::new(), |gpu| format!(
                "\nGPU {}, {} moves elements",
                gpu.name,
                gpu.communicator.mover()
            )),
        );
        self.report.comment(&text)
    }

    fn measure(
        &mut self,
        link: &mut Link,
        operation: Operation,
        form: Form,
        (dtype, reduction): (DType, Reduction),
        count: usize,
    ) -> Result<(Measurement, Vec<Measurement>), Error> {
        let settings = self.settings;
        let Launch { rank, world, .. } = *link.launch();
        let pattern = Pattern { operation, form, reduction, dtype, rank, world, count, round: 0 };
        let size = operation.bytes(count, world, dtype);
        let (shared, private) = Case::bytes(&pattern, dtype, settings.buffers);
        link.with_room(shared)?;
        let library = self.library.filter(|library| library.has(dtype, reduction));
        let calls = library.map_or(&[][..], |library| library.calls(operation));
        let of_library = if calls.is_empty() { 0 } else { Case::bytes(&pattern, dtype, Buffers::Private).1 };
        // The roofline's loops take turns with the operation.
        let gpu = self.gpu.clone();
        let of_host = match &gpu {
            Some(_) => 0,
            None => shared + private + of_library + roofline::bytes(&pattern, dtype),
        };
        check_memory(link, operation, size, of_host)?;
        let communicator = gpu.as_ref().map_or(link.communicator(), |gpu| &gpu.communicator);
        let mut case = match &gpu {
            Some(gpu) => Case::on(&*gpu.device, pattern, dtype)?,
            None => Case::new(communicator, pattern, dtype, settings.buffers)?,
        };
        let mut wrong = settings.check.then_some(0);
        if let Some(wrong) = &mut wrong {
            *wrong += case.check(communicator, 1)?;
        }
        case.prepare(0);
        let mut theirs = match library {
            Some(library) if !calls.is_empty() => {
                Some((library, Case::new(communicator, pattern, dtype, Buffers::Private)?))
            }
            _ => None,
        };
        let mut wrong_calls = vec![settings.check.then_some(0); calls.len()];
        if let Some((library, theirs)) = &mut theirs {
            for (&call, wrong) in calls.iter().zip(&mut wrong_calls) {
                if let Some(wrong) = wrong {
                    let own = theirs.check_run(communicator, 1, |case| library.run(call, case))?;
                    *wrong = self.all_wrong(communicator, own)?;
                }
            }
            theirs.prepare(0);
        }
        // They run on processors.
        let mut loops = if gpu.is_some() { None } else { Loops::new(&pattern, dtype)? };
        // This, each of the library's calls, and the loops.
        let mut contenders = vec![settings.iterations; 1 + calls.len()];
        if loops.is_some() {
            contenders.extend([settings.iterations.min(roofline::MOST_ITERATIONS); Loops::COUNT]);
        }
        let samples = timing::alternate(&mut self.repeat, communicator, &contenders, |contender| {
            match (contender.checked_sub(1), &mut theirs, &mut loops) {
                (Some(call), Some((library, theirs)), _) if call < calls.len() => library.run(calls[call], theirs),
                (Some(call), _, Some(loops)) => {
                    loops.run(call - calls.len());
                    Ok(())
                }
                _ => case.run(communicator),
            }
        })?;
        let (samples, of_loops) = samples.split_at(1 + calls.len());
        let roofline = loops.map(|loops| loops.roofline(of_loops));
        drop(theirs);
        let overlap = match settings.overlap && operation.overlaps() && form == operation.forms()[0] {
            true => Some(overlap::measure(communicator, &mut case, &mut self.repeat)?),
            false => None,
        };
        if let Some(wrong) = &mut wrong {
            *wrong += case.check(communicator, 2)?;
            *wrong = self.all_wrong(communicator, *wrong)?;
        }
        let ours = Measurement {
            op: operation.name(),
            dtype: if operation == Operation::Barrier { "none" } else { dtype.name() },
            redop: if operation.reduces() { reduction.name() } else { "none" },
            root: operation.root().map_or(-1, |root| root as i64),
            size,
            count,
            ranks: world,
            backend: self.backend(communicator),
            call: None,
            hosts: communicator.hosts(),
            in_place: form == Form::InPlace,
            buffers: match operation {
                Operation::Window => "window",
                Operation::Barrier | Operation::Scalars => "none",
                _ => self.buffers(),
            },
            times: Times::new(&samples[0], size, operation.bus_factor(world), roofline.as_ref()),
            roofline,
            overlap,
            wrong,
        };
        let of_call = |((&call, wrong), samples): ((&Call, Option<u64>), &Vec<u64>)| Measurement {
            backend: format!("mpi library: {}", library.map_or("", Library::name)),
            call: Some(call.name()),
            buffers: if operation.chooses_buffers() { Buffers::Private.name() } else { "none" },
            times: Times::new(samples, size, operation.bus_factor(world), ours.roofline.as_ref()),
            overlap: None,
            wrong,
            ..ours.clone()
        };
        let of_library = calls.iter().zip(wrong_calls).zip(&samples[1..]).map(of_call).collect();
        Ok((ours, of_library))
    }

    /// Whether elements are combined so where they lie.
    fn combines(&self, operation: Operation, dtype: DType, reduction: Reduction) -> bool {
        let on_gpu = self.gpu.is_none() || gpu::combines(operation, dtype, reduction);
        on_gpu && reduction.supports(dtype, dtype)
    }

    /// What moves the bytes, in a word.
    fn backend(&self, communicator: &Communicator) -> String {
        self.gpu.as_ref().map_or_else(|| communicator.backend().to_string(), |gpu| gpu.backend().to_owned())
    }

    /// Where buffers lie, in a word.
    fn buffers(&self) -> &'static str {
        if self.gpu.is_some() { "device" } else { self.settings.buffers.name() }
    }

    /// Wrong elements over all ranks, which count for the run.
    fn all_wrong(&mut self, communicator: &Communicator, own: u64) -> Result<u64, Error> {
        let all = communicator.all_gather_scalars(&[own])?;
        let wrong = all.iter().map(|rank| rank[0]).sum();
        self.wrong += wrong;
        Ok(wrong)
    }
}

/// The GPU, with room for the largest buffers of the run.
fn open_gpu(wanted: gpu::Wanted, settings: &Settings, link: &Link) -> Result<Arc<Gpu>, Error> {
    let &Launch { rank, world, .. } = link.launch();
    let mut bytes = 0;
    for &operation in settings.operations.iter().filter(|one| one.moves_buffers()) {
        for (&dtype, &size) in
            settings.dtypes.iter().flat_map(|dtype| settings.sizes.iter().map(move |size| (dtype, size)))
        {
            let count = operation.count(size, world, dtype);
            let (form, reduction) = (Form::OutOfPlace, Reduction::Sum);
            let pattern = Pattern { operation, form, reduction, dtype, rank, world, count, round: 0 };
            bytes = Case::bytes(&pattern, dtype, Buffers::Private).1.max(bytes);
        }
    }
    Ok(Arc::new(gpu::open(wanted, bytes, link.launch(), link.communicator())?))
}

/// Refuses what would not fit, on every rank alike: exceeding the host's memory would not fail, but wake the kernel's killer.
fn check_memory(link: &Link, operation: Operation, size: usize, of_rank: u64) -> Result<(), Error> {
    let (available, limit) = available_memory();
    let needed = of_rank.saturating_mul(link.launch().local_world as u64);
    let all = link.communicator().all_gather_scalars(&[needed, available])?;
    if let Some(short) = all.iter().find(|rank| rank[0] > rank[1]) {
        let (needed, available) = (short[0], short[1]);
        return Err(Error::Memory { operation: operation.name(), size, needed, available, limit });
    }
    Ok(())
}
