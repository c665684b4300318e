//! Groups of ranks: communicators that share their job's memory and this rank's progress thread.
//!
//! The first member on each host makes room for the members' words in its arena, and shows the
//! place in a notice until all members on the host have come. Nobody but the members takes part.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::group::Group;
use crate::checks::expect;
use crate::join::{Job, open_wire};
use crate::memory::control::{Notice, WINDOW_BELL, state, subject};
use crate::memory::mapping::Words;
use crate::{Communicator, Error, Launch, Options};

impl Communicator {
    /// A communicator of these ranks of this one, numbered in this order. They alone call this, all
    /// with the same list. It costs some pages of memory and no thread, and has operations and
    /// failures of its own. Memory that any communicator of the job allocated is used in place by
    /// all of them.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a list without this rank, with a rank twice, or with one that there is
    /// not. This communicator's first error: [`Error::Timeout`] where members do not come within
    /// [`Options::startup_timeout`]. Between hosts also [`Error::Rendezvous`].
    pub fn group(&self, ranks: &[usize]) -> Result<Communicator, Error> {
        let own = ranks.iter().position(|&rank| rank == self.rank());
        let Some(own) = own else {
            let reason = format!("rank {} makes a group of ranks {ranks:?}: only members make it", self.rank());
            return Err(Error::Misuse { reason });
        };
        for (index, &rank) in ranks.iter().enumerate() {
            self.check_rank("a group with", rank)?;
            expect(!ranks[..index].contains(&rank), || format!("a group of ranks {ranks:?} has rank {rank} twice"))?;
        }
        let parent = &self.group;
        parent.healthy()?;
        let key = self.key_of(ranks);
        let job = Job {
            launch: Launch { rank: own, world: ranks.len(), ..self.job.launch.clone() },
            name: format!("{}+{key:x}", self.job.name),
            ranks: ranks.iter().map(|&rank| self.job.ranks[rank]).collect(),
            key,
            ..self.job.clone()
        };
        let options = Options { reduce_groups: 1, ..parent.options.clone() };
        let hosts = parent.hosts.among(ranks, own);
        // Those of this host, as the parent counts its members here.
        let members: Vec<usize> = hosts.local().iter().map(|&rank| parent.hosts.column(ranks[rank])).collect();
        let room = Room { parent, members: &members, key };
        let (words, notice) = room.find(hosts.column(own)).map_err(|error| self.give_up(error))?;
        let wire = open_wire(&job, &hosts, &options).map_err(|error| self.give_up(error))?;
        let locals = members.iter().map(|&member| parent.local(member)).collect();
        let column = hosts.column(own);
        let group = Group::new(parent.engine.clone(), words, locals, column, hosts, options);
        let group = Arc::new(group);
        parent.engine.open(group.clone(), wire);
        let group = Communicator::of(group, job);
        group.group.declare_joined();
        room.wait_for_all(&group.group)?;
        if let Some(notice) = notice {
            notice.key.store(0, Ordering::Release);
        }
        Ok(group)
    }

    /// What tells the next group of these ranks from others of the job, the same on every member.
    fn key_of(&self, ranks: &[usize]) -> u64 {
        let mut groups = self.groups.lock();
        let number = groups.entry(ranks.to_vec()).or_default();
        *number += 1;
        let mut hasher = DefaultHasher::new();
        (self.job.key, ranks, *number).hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// Where the members on this host put their words.
struct Room<'a> {
    parent: &'a Group,
    /// As the parent counts its members on this host.
    members: &'a [usize],
    key: u64,
}

impl<'a> Room<'a> {
    /// Makes room, on the first member; finds it, on the others.
    fn find(&self, own: usize) -> Result<(Words, Option<&'a Notice>), Error> {
        let (engine, first) = (&self.parent.engine, self.members[0]);
        if own > 0 {
            let notices = &engine.map.rank(self.parent.local(first)).notices;
            let find = || notices.iter().find(|notice| notice.key.load(Ordering::Acquire) == self.key);
            self.wait(|member| member == first && find().is_none())?;
            let place = find().expect("shown until this rank has joined").place.load(Ordering::Relaxed);
            return Ok((Words::at(place, self.members.len()), None));
        }
        let range = engine.reserve(Words::bytes(self.members.len()))?;
        let place = engine.map.place_of(engine.rank, range.offset);
        let words = Words::at(place, self.members.len());
        if self.members.len() == 1 {
            return Ok((words, None));
        }
        let notice = self.show(place)?;
        self.ring();
        Ok((words, Some(notice)))
    }

    /// Shows where the words are, once one of this rank's notices is free.
    fn show(&self, place: u64) -> Result<&'a Notice, Error> {
        let engine = &self.parent.engine;
        loop {
            let making = engine.making_room.lock();
            let free = engine.control().notices.iter().find(|notice| notice.key.load(Ordering::Relaxed) == 0);
            if let Some(notice) = free {
                notice.place.store(place, Ordering::Relaxed);
                notice.key.store(self.key, Ordering::Release);
                return Ok(notice);
            }
            drop(making);
            // Other threads of this rank make that many groups, each of which ends within a limit.
            self.parent.healthy()?;
            std::thread::yield_now();
        }
    }

    /// Waits until every member on this host takes part.
    fn wait_for_all(&self, group: &Group) -> Result<(), Error> {
        self.ring();
        let is_absent = |member| {
            let place = self.members.iter().position(|&other| other == member);
            place.is_some_and(|place| group.control(place).state.load(Ordering::Acquire) == state::ABSENT)
        };
        self.wait(is_absent)
    }

    fn wait(&self, late: impl Fn(usize) -> bool) -> Result<(), Error> {
        self.parent.wait_for_ranks("making a group", self.parent.options.startup_timeout, late)
    }

    fn ring(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        for &member in self.members.iter().filter(|&&member| member != self.parent.rank) {
            self.parent.ring_rank(member, WINDOW_BELL, subject::WINDOW);
        }
    }
}
