//! Shared memory as a transport, with wires between hosts.

use std::sync::Arc;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Completion, DType, Device, Event, Failure};

use super::flight::{Course, Flight};
use super::group::Group;
use super::mail::MailFlight;
use super::watch::Watch;
use crate::algorithms::{AnyAlgorithm, BriefAllReduce, Combination, Scalars};
use crate::call::Purpose;
use crate::hosts::Hosts;
use crate::join::Job;
use crate::memory::control::Channel;
use crate::outcome::Outcome;
use crate::record::Record;
use crate::request::{Collective, Envelope, Message, Request};
use crate::transport::{Capabilities, Limit, Submitted, Transport, Turns};
use crate::{Error, Options, Sections, Traffic};

impl Transport for Group {
    fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            windows: true,
            reads_peers_in_place: !self.has_wire(),
            reads_private_memory: self.reads_private(),
            rank_order: true,
            device_memory: false,
            registered_memory: true,
        }
    }

    fn submit(&self, request: Request, after: Event, limit: Limit) -> Submitted {
        if let Err(error) = self.engine.maker.check() {
            return Submitted::Ended(Err(error));
        }
        Submitted::Flying(match request {
            Request::Collective(collective) => {
                let (algorithm, channel) = self.algorithm(collective);
                let course = Course::new(algorithm.call(), channel, limit);
                self.take_off(algorithm, course, after)
            }
            Request::Message(message) => {
                let outcome = Arc::new(Outcome::default());
                self.start_mail(MailFlight::new(self, message, after, limit, outcome.clone()));
                outcome
            }
        })
    }

    fn run(&self, request: Request, limit: Limit) -> Result<(), Error> {
        self.engine.maker.check()?;
        match request {
            // Of its own type: moving the largest of all algorithms about would take a tenth of its
            // time.
            Request::Collective(Collective::AllReduce { operands, len, reduction })
                if BriefAllReduce::fits(&self.hosts, len * operands.dtype.bytes()) =>
            {
                let (world, groups) = (self.hosts.world(), self.options.reduce_groups);
                let combination = Combination::new(&operands, reduction, world, groups);
                let mut algorithm = BriefAllReduce::new(operands, len, combination);
                match self.run_here(Channel::Reduce, &mut algorithm, limit) {
                    Some(result) => result,
                    None => self.run_there(AnyAlgorithm::Brief(algorithm), Channel::Reduce, limit),
                }
            }
            Request::Collective(collective) => self.run_collective(collective, limit),
            Request::Message(message) => self.run_message(message, limit),
        }
    }

    fn probe(&self, from: Option<usize>, tag: u32) -> Result<Option<Envelope>, Error> {
        self.find_message(from, tag)
    }

    fn exchange(&self, words: &[u64], purpose: Purpose, limit: Limit) -> Result<Vec<u64>, Error> {
        self.engine.maker.check()?;
        let mut scalars = Scalars::new(words, purpose, self.scalars.take(words.len()));
        match self.run_here(Channel::Control, &mut scalars, limit) {
            Some(result) => {
                result?;
                Ok(scalars.into_gathered())
            }
            None => {
                let gathered = Arc::new(Mutex::new(Vec::new()));
                let algorithm = AnyAlgorithm::Scalars(scalars.deliver_to(gathered.clone()));
                self.run_there(algorithm, Channel::Control, limit)?;
                Ok(std::mem::take(&mut *gathered.lock()))
            }
        }
    }

    fn put_back(&self, words: Vec<u64>) {
        self.scalars.put_back(words);
    }

    fn allocate(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        self.allocate_in_arena(device, dtype, len)
    }

    fn allocate_alone(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        self.allocate_in_own_arena(device, dtype, len)
    }

    fn window(
        self: Arc<Self>,
        device: &dyn Device,
        dtype: DType,
        len: usize,
        sections: Option<&Sections>,
    ) -> Result<(Buffer, Box<dyn Turns>), Error> {
        self.engine.maker.check()?;
        self.make_window(device, dtype, len, sections)
    }

    fn group(&self, ranks: &[usize], job: &Job) -> Result<Arc<dyn Transport>, Error> {
        self.engine.maker.check()?;
        Ok(self.make_group(ranks, job)?)
    }

    fn healthy(&self) -> Result<(), Error> {
        Group::healthy(self)
    }

    fn look(&self, op: &dyn Fn() -> String) -> Result<(), Error> {
        Group::healthy(self)?;
        Watch::new(Limit::NONE).look_around(self, &|_| false, op).map_err(|error| Group::fail(self, error))
    }

    fn fail(&self, error: Error) -> Error {
        Group::fail(self, error)
    }

    fn fail_after(&self, failure: Failure) -> Error {
        Group::fail_after(self, failure)
    }

    fn abort(&self, reason: &str) {
        Group::abort(self, reason);
    }

    fn traffic(&self) -> Traffic {
        let (operations, bytes) = self.completed();
        Traffic { operations, bytes }
    }

    fn record(&self) -> &Record {
        &self.record
    }

    fn close(&self) {
        if self.engine.maker.is_another() {
            return;
        }
        self.stop();
        // From a callback: the thread that ends the group is this one.
        if !self.engine.is_driver() {
            self.ended.wait();
        }
        self.engine.close();
    }
}

impl Group {
    /// How this rank does what is asked for, and on which channel.
    fn algorithm(&self, collective: Collective) -> (AnyAlgorithm, Channel) {
        AnyAlgorithm::of(collective, &self.hosts, self.name(self.rank), self.options.reduce_groups)
    }

    fn run_collective(&self, collective: Collective, limit: Limit) -> Result<(), Error> {
        let (mut algorithm, channel) = self.algorithm(collective);
        match self.run_here(channel, algorithm.as_dyn(), limit) {
            Some(result) => result,
            None => self.run_there(algorithm, channel, limit),
        }
    }

    /// Has the progress thread run an operation, and waits for it.
    fn run_there(&self, algorithm: AnyAlgorithm, channel: Channel, limit: Limit) -> Result<(), Error> {
        let course = Course::new(algorithm.call(), channel, limit);
        self.take_off(algorithm, course, Event::PAST).wait().map_err(Error::from)
    }

    fn run_message(&self, message: Message, limit: Limit) -> Result<(), Error> {
        let outcome = Arc::new(Outcome::default());
        self.run_mail_here(MailFlight::new(self, message, Event::PAST, limit, outcome.clone()));
        outcome.wait().map_err(Error::from)
    }

    fn take_off(&self, algorithm: AnyAlgorithm, course: Course, after: Event) -> Arc<Outcome> {
        let outcome = self.outcomes.get();
        self.submit_flight(Flight::new(algorithm, course, after, outcome.clone()));
        outcome
    }
}
