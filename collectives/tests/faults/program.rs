//! What the ranks do: the other side of the tests. Each program runs until an error, or until it is told to stop.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use pillion_collectives::launch::Source;
use pillion_collectives::{Communicator, Error, Launch, Options, Reduce, Reduction, Start};
use pillion_kernels::{Buffer, Cpu, DType, Device, Event};
use rustix::process::Signal;

use crate::jobs::now;
use crate::{calls, lots};

/// The turn after which everything has been done once: staging memory is there, and what depends on the machine has been measured.
const WARM: usize = 3;

/// A rank's process: what the test told it.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) victim: usize,
    pub(crate) seed: u64,
    pub(crate) job: String,
    pub(crate) options: Options,
    folder: PathBuf,
}

/// Runs the program that the environment asks for, and ends the process; returns where nothing asks.
pub(crate) fn run() {
    let variable = |name: &str| std::env::var(format!("FAULTS_{name}"));
    let Ok(folder) = variable("FOLDER") else { return };
    // The kernel ties this wish to the thread that started this process, which is the test's.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let number = |name: &str| variable(name).unwrap().parse::<u64>().unwrap();
    let limit = |name: &str| Duration::from_millis(number(name));
    let rank = Rank {
        rank: number("RANK") as usize,
        world: number("WORLD") as usize,
        victim: number("VICTIM") as usize,
        seed: number("SEED"),
        job: variable("JOB").unwrap(),
        options: Options {
            timeout: limit("TIMEOUT"),
            warn_after: limit("WARN"),
            startup_timeout: limit("STARTUP"),
            ..Options::default()
        },
        folder: folder.into(),
    };
    std::process::exit(match rank.program(&variable("PROGRAM").unwrap()) {
        Ok(()) => 0,
        Err(error) => {
            rank.report("error", &error);
            1
        }
    });
}

/// An error's variant, and the rank that it names.
pub(crate) fn parts(error: &Error) -> (&'static str, Option<usize>) {
    match error {
        Error::PeerLost { rank, .. } => ("PeerLost", Some(*rank)),
        Error::Timeout { waiting_on, .. } => ("Timeout", waiting_on.first().copied()),
        Error::Mismatch { peer, .. } => ("Mismatch", Some(*peer)),
        Error::Aborted { rank, .. } => ("Aborted", Some(*rank)),
        Error::Rendezvous { .. } => ("Rendezvous", None),
        Error::OutOfMemory { .. } => ("OutOfMemory", None),
        Error::System { .. } => ("System", None),
        _ => ("another", None),
    }
}

impl Rank {
    /// Writes a line into this rank's file.
    pub(crate) fn say(&self, line: &str) {
        let path = self.folder.join(format!("said-{}", self.rank));
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub(crate) fn report(&self, what: &str, error: &Error) {
        let at = now();
        let (variant, named) = parts(error);
        let named = named.map_or_else(|| "-".to_owned(), |rank| rank.to_string());
        self.say(&format!("{what}\t{at}\t{variant}\t{named}\t{error}"));
    }

    pub(crate) fn is_victim(&self) -> bool {
        self.rank == self.victim
    }

    /// Whether the test has told the ranks to go on.
    fn may_go(&self) -> bool {
        self.folder.join("go").exists()
    }

    fn wait_to_go(&self) {
        while !self.may_go() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Does nothing, until the test kills this process.
    fn park(&self) -> ! {
        loop {
            std::thread::park();
        }
    }

    pub(crate) fn launch(&self, job: &str) -> Launch {
        Launch {
            rank: self.rank,
            world: self.world,
            local_rank: self.rank,
            local_world: self.world,
            job: job.to_owned(),
            source: Source::Local,
            ..Launch::single()
        }
    }

    fn connect(&self) -> Result<Communicator, Error> {
        Communicator::connect(&self.launch(&self.job), self.options.clone())
    }

    fn program(&self, name: &str) -> Result<(), Error> {
        match name {
            "start-up" if self.is_victim() => {
                self.say("ready");
                self.park()
            }
            "calls" => return calls::make_all(self),
            "leaks" => return calls::connect_and_drop(self),
            _ => {}
        }
        let communicator = self.connect()?;
        communicator.barrier()?;
        let ready = || self.say("ready");
        let result = match name {
            "beat" => {
                ready();
                self.beat(&communicator)
            }
            "barriers" => {
                ready();
                loop {
                    if let Err(error) = communicator.barrier() {
                        break Err(error);
                    }
                }
            }
            "leave" | "exit" | "panic" | "abort" | "awaited" | "idle" => {
                ready();
                self.end_as_told(name, &communicator)
            }
            "chain" | "chain-in-groups" => self.follow(name, &communicator, ready),
            "window" => self.hold_a_window(&communicator),
            "group" => return self.stay_in_a_group(&communicator),
            "making" => self.make_a_group(&communicator),
            "messages" => self.pass_messages(&communicator, ready),
            "reduce" | "staged" => self.reduce(&communicator, name == "reduce", ready),
            "lots" => lots::draw(self, &communicator, ready),
            "channels" => self.use_different_channels(&communicator),
            "memory" => self.allocate_too_much(&communicator),
            "start-up" | "stale" => Ok(()),
            other => panic!("no program is called {other}"),
        };
        // Before the communicator is gone, which may take a moment.
        if let Err(error) = &result {
            self.report("error", error);
            // Whoever asks again is told the same.
            assert_eq!(communicator.barrier().unwrap_err().to_string(), error.to_string());
            drop(communicator);
            std::process::exit(1);
        }
        result
    }

    /// Barriers, until the test says that it is enough.
    fn beat(&self, communicator: &Communicator) -> Result<(), Error> {
        let mut enough = [0.0];
        while enough[0] == 0.0 {
            enough[0] = f64::from(u8::from(self.may_go()));
            communicator.all_reduce_scalars(&mut enough, Reduction::Max)?;
        }
        Ok(())
    }

    /// One rank is killed. Rank 0 learns of it in the communicator or in a group, and is gone at
    /// once; the others look when both are.
    fn follow(&self, name: &str, communicator: &Communicator, ready: impl Fn()) -> Result<(), Error> {
        let all: Vec<usize> = (0..self.world).collect();
        let group = communicator.group(&all)?;
        ready();
        if self.is_victim() {
            self.park();
        }
        if self.rank > 0 {
            self.wait_to_go();
            return communicator.barrier();
        }
        let error = if name == "chain" { communicator.barrier() } else { group.barrier() }.unwrap_err();
        self.report("error", &error);
        std::process::exit(1);
    }

    /// One rank ends in some way; the others wait, each in another operation.
    fn end_as_told(&self, how: &str, communicator: &Communicator) -> Result<(), Error> {
        if !self.is_victim() {
            return match (how, (self.rank + self.world - self.victim) % self.world) {
                ("awaited", _) => communicator.barrier(),
                ("idle", _) => {
                    self.wait_to_go();
                    communicator.barrier()
                }
                (_, 1) => communicator.barrier(),
                (_, 2) => communicator.receive(private(10), self.victim, Event::PAST).wait().map(|_| ()),
                _ => communicator
                    .all_gather(private(100_000), private(self.world * 100_000), Start::Here)
                    .wait()
                    .map(|_| ()),
            };
        }
        match how {
            "idle" | "awaited" => self.park(),
            "leave" => {
                self.wait_to_go();
                Ok(())
            }
            "exit" => {
                self.wait_to_go();
                std::process::exit(0)
            }
            "abort" => {
                self.wait_to_go();
                communicator.abort("the disk is full");
                communicator.barrier()
            }
            _ => {
                self.wait_to_go();
                panic!("a rank's own mistake");
            }
        }
    }

    /// Barriers in a group of all ranks, until one fails; nothing else.
    fn stay_in_a_group(&self, communicator: &Communicator) -> Result<(), Error> {
        let ranks: Vec<usize> = (0..self.world).collect();
        let group = communicator.group(&ranks)?;
        self.say("ready");
        loop {
            group.barrier()?;
        }
    }

    /// Makes groups with a victim that makes one less.
    fn make_a_group(&self, communicator: &Communicator) -> Result<(), Error> {
        let ranks: Vec<usize> = (0..self.world).collect();
        let _first = communicator.group(&ranks)?;
        self.say("ready");
        if self.is_victim() {
            self.park();
        }
        communicator.group(&ranks).map(|_| ())
    }

    /// The victim reads a window for ever; the others want to write.
    fn hold_a_window(&self, communicator: &Communicator) -> Result<(), Error> {
        let window = communicator.window(&Cpu, DType::F32, self.world * 1000)?;
        let mut window = communicator.gather_window(window, Event::PAST).wait()?;
        self.say("ready");
        if self.is_victim() {
            self.park();
        }
        window.release(&Event::PAST).unwrap();
        window.shard_mut(0).map(|_| ())
    }

    /// Everybody sends to the next and receives from the one before, by turns in one piece and in many.
    fn pass_messages(&self, communicator: &Communicator, ready: impl Fn()) -> Result<(), Error> {
        const LEN: usize = 300_000;
        let (next, before) = ((self.rank + 1) % self.world, (self.rank + self.world - 1) % self.world);
        let mut outgoing = [private(LEN), communicator.allocate(&Cpu, DType::F32, LEN)?].map(Some);
        let mut incoming = private(LEN);
        for turn in 0.. {
            let slot = &mut outgoing[turn % 2];
            let sending = communicator.send(slot.take().expect("put back"), next, Event::PAST);
            incoming = communicator.receive(incoming, before, Event::PAST).wait()?;
            *slot = Some(sending.wait()?);
            if turn == WARM {
                ready();
            }
        }
        unreachable!("the loop has no end")
    }

    /// Large reductions without end, by turns on this thread and on the progress thread.
    fn reduce(&self, communicator: &Communicator, in_place: bool, ready: impl Fn()) -> Result<(), Error> {
        let len = self.world << 20;
        let mut input = if in_place { communicator.allocate(&Cpu, DType::F32, len)? } else { private(len) };
        let mut output = private(len / self.world);
        for turn in 0.. {
            let start = || if turn % 2 == 0 { Start::Here } else { Start::After(Event::PAST) };
            let reduce =
                Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
            Reduce { input, output, .. } = communicator.reduce_scatter(reduce, start()).wait()?;
            if !in_place {
                (output, input) = communicator.all_gather(output, input, start()).wait()?;
            }
            if turn == WARM {
                ready();
            }
        }
        unreachable!("the loop has no end")
    }

    /// The victim gathers where the others reduce.
    fn use_different_channels(&self, communicator: &Communicator) -> Result<(), Error> {
        if self.is_victim() {
            return communicator.all_gather(private(1000), private(self.world * 1000), Event::PAST).wait().map(|_| ());
        }
        let (input, output) = (private(self.world * 1000), private(1000));
        let reduce =
            Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
        communicator.reduce_scatter(reduce, Event::PAST).wait().map(|_| ())
    }

    /// More than the control group of this test allows, and less than the host has; then something small.
    fn allocate_too_much(&self, communicator: &Communicator) -> Result<(), Error> {
        let error = communicator.allocate(&Cpu, DType::F32, 48 << 20).expect_err("three times the limit");
        self.report("refused", &error);
        communicator.allocate(&Cpu, DType::F32, 1000)?;
        let error = communicator.window(&Cpu, DType::F32, 48 << 20).expect_err("more than the limit");
        self.report("refused", &error);
        communicator.barrier()
    }
}

/// Memory that no other rank can read.
pub(crate) fn private(len: usize) -> Buffer {
    let mut buffer = Cpu.allocate(DType::F32, len).unwrap();
    Cpu.stream().upload(buffer.view_mut(), &vec![1.0f32; len]);
    buffer
}

/// Files, threads and mappings of this process, and whether one of the mappings is a communicator's.
pub(crate) fn held() -> ([usize; 3], bool) {
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    ([count("/proc/self/fd"), count("/proc/self/task"), maps.lines().count()], maps.contains("memfd:pillion"))
}
