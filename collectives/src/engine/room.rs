//! Groups of ranks: communicators that share their job's memory and this rank's progress thread.
//!
//! The first member on each host makes room for the members' words in its arena, and shows the
//! place in a notice until all members on the host have come. Nobody but the members takes part.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::group::Group;
use crate::join::{Job, open_wire};
use crate::memory::control::{NOTICES, Notice, WINDOW_BELL, state, subject};
use crate::memory::mapping::Words;
use crate::transport::Transport;
use crate::{Error, Options};

impl Group {
    /// The ranks `ranks` of these, which alone call this.
    pub(super) fn make_group(&self, ranks: &[usize], job: &Job) -> Result<Arc<Group>, Error> {
        let own = job.launch.rank;
        let options = Options { reduce_groups: 1, ..self.options.clone() };
        let hosts = self.hosts.among(ranks, own);
        let place = hosts.place(own);
        // Those of this host, as this group counts its members here.
        let members: Vec<usize> = hosts.local().iter().map(|&rank| self.hosts.place(ranks[rank])).collect();
        let room = Room { parent: self, members: &members, key: job.key };
        let (words, shown) = room.find(place)?;
        let wire = open_wire(job, &hosts, &options).map_err(|error| self.give_up(error))?;
        let locals = members.iter().map(|&member| self.local(member)).collect();
        let group = Arc::new(Group::new(self.engine.clone(), words, locals, place, hosts, options));
        self.engine.open(group.clone(), wire);
        group.declare_joined();
        if let Err(error) = room.wait_for_all(&group) {
            group.close();
            return Err(error);
        }
        drop(shown);
        Ok(group)
    }
}

/// A notice, until this is dropped. On a failure the room is not used for anything else, since
/// nothing of this rank's memory is from then on.
struct Shown<'a>(&'a Notice);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.0.key.store(0, Ordering::Release);
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
    fn find(&self, own: usize) -> Result<(Words, Option<Shown<'a>>), Error> {
        let (engine, first) = (&self.parent.engine, self.members[0]);
        if own > 0 {
            let notices = &engine.map.rank(self.parent.local(first)).notices;
            let find = || notices.iter().find(|notice| notice.key.load(Ordering::Acquire) == self.key);
            self.wait(|member| member == first && find().is_none())?;
            let place = find().expect("shown until this rank has joined").place.load(Ordering::Relaxed);
            return Ok((Words::at(place, self.members.len()), None));
        }
        let give_up = |error| self.parent.give_up(error);
        let range = engine.reserve(Words::bytes(self.members.len())).map_err(give_up)?;
        let place = engine.map.place_of(engine.rank, range.offset);
        let words = Words::at(place, self.members.len());
        if self.members.len() == 1 {
            return Ok((words, None));
        }
        let shown = self.show(place).map_err(give_up)?;
        self.ring();
        Ok((words, Some(shown)))
    }

    /// Shows where the words are, once one of this rank's notices is free.
    fn show(&self, place: u64) -> Result<Shown<'a>, Error> {
        let engine = &self.parent.engine;
        let deadline = Instant::now().checked_add(self.parent.options.startup_timeout);
        loop {
            let making = engine.making_room.lock();
            let free = engine.control().notices.iter().find(|notice| notice.key.load(Ordering::Relaxed) == 0);
            if let Some(notice) = free {
                notice.place.store(place, Ordering::Relaxed);
                notice.key.store(self.key, Ordering::Release);
                return Ok(Shown(notice));
            }
            drop(making);
            // Other threads of this rank make that many groups, each of which ends within a limit.
            self.parent.healthy()?;
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                let reason = format!("this rank makes {NOTICES} others, whose members do not come");
                return Err(Error::System { what: "making a group", reason });
            }
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
