//! How long to wait for whom, and what is said and done when they do not come.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::group::Group;
use crate::Error;
use crate::call::describe;
use crate::memory::control::{CHANNELS, Channel, monotonic_millis, state};
use crate::transport::Limit;
use crate::wire::Wire;

/// The patience of one wait.
pub(crate) struct Watch {
    limit: Limit,
    /// Looks so far that did not ask for the time: most waits are over before any does.
    glances: u32,
    /// When this was last looked at.
    checked: Option<Instant>,
    waited: Duration,
    warned: bool,
}

/// Asking for the time takes as long as some looks; who waits spins for thousands of them before it sleeps.
const GLANCES: u32 = 16;
/// Time between two looks at the other ranks' health.
const CHECK_EVERY: Duration = Duration::from_millis(1);
/// How much longer a rank waits for another host. A rank there may wait for one that is late, and
/// says so first.
const GRACE: Duration = Duration::from_millis(500);
/// What is known of a rank there.
const ELSEWHERE: &str = "it is on another host, and may wait for a rank there";
/// A longer gap between two looks means that this rank itself did not run; only this much of it counts as waiting. Far more than a nap,
/// and less than any deadline, or a job that was stopped as a whole would go on into a false alarm.
const LONGEST_GAP: Duration = Duration::from_millis(200);

impl Watch {
    pub(crate) fn new(limit: Limit) -> Watch {
        Watch { limit, glances: 0, checked: None, waited: Duration::ZERO, warned: false }
    }

    /// Looks, now and then, whether the wait is in vain. `late` is a rank of this host that is waited for, `is_late` tells it for each.
    pub(crate) fn check(
        &mut self,
        group: &Group,
        late: usize,
        is_late: &dyn Fn(usize) -> bool,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        let patient = self.limit.patient;
        if self.passed(|| patient && is_running(group, late)) {
            self.look_around(group, is_late, op)?;
            let all = || (0..group.world()).filter(|&rank| is_late(rank)).map(|rank| group.name(rank)).collect();
            self.judge(group, group.name(late), &all, op, &|| pulse(group, late), Duration::ZERO)?;
        }
        Ok(())
    }

    /// As [`Watch::check`], for the `target`-th step on a channel, which some rank of this host has
    /// yet to take. A rank that waits there for another host is not late: the rank for which it
    /// waits is.
    pub(crate) fn check_step(
        &mut self,
        group: &Group,
        channel: Channel,
        target: u64,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        let place = |rank: usize| &group.control(rank).channels[channel as usize];
        let is_late = |rank: usize| place(rank).steps.load(Ordering::Acquire) < target;
        let late = || (0..group.world()).filter(|&rank| is_late(rank));
        let patient = self.limit.patient;
        if !self.passed(|| patient && late().all(|rank| is_running(group, rank))) {
            return Ok(());
        }
        self.look_around(group, &is_late, op)?;
        let here = || late().filter(|&rank| place(rank).waits_for().is_none());
        let elsewhere = || late().filter_map(|rank| place(rank).waits_for());
        if let Some(first) = here().next() {
            let all = || here().map(|rank| group.name(rank)).collect();
            let how = || format!("{}{}", pulse(group, first), another_call(group, channel, first));
            self.judge(group, group.name(first), &all, op, &how, Duration::ZERO)?;
        } else if let Some(first) = elsewhere().next() {
            // Several ranks may wait for the same one.
            let all = || elsewhere().collect::<BTreeSet<usize>>().into_iter().collect();
            self.judge(group, first, &all, op, &|| ELSEWHERE.to_owned(), GRACE)?;
        }
        Ok(())
    }

    /// As [`Watch::check`], for a message from any other rank; `is_in_vain` tells for one that has
    /// left whether none can come.
    pub(crate) fn check_any(
        &mut self,
        group: &Group,
        is_in_vain: &dyn Fn(usize) -> bool,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        if self.passed(|| false) {
            self.look_around(group, is_in_vain, op)?;
            let others = || (0..group.world()).filter(|&rank| rank != group.rank).map(|rank| group.name(rank));
            let first = others().next().unwrap_or(group.name(group.rank));
            self.judge(group, first, &|| others().collect(), op, &|| "none has sent it".to_owned(), Duration::ZERO)?;
        }
        Ok(())
    }

    /// As [`Watch::check`], for a message from or to a rank of another host, as the communicator counts ranks.
    pub(crate) fn check_wire(
        &mut self,
        group: &Group,
        late: usize,
        wire: &mut dyn Wire,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        if self.passed(|| false) {
            if let Some(error) = wire.failure() {
                return Err(error);
            }
            // A rank of this host may have finished its part and left.
            self.look_around(group, &|_| false, op)?;
            self.judge(group, late, &|| vec![late], op, &|| ELSEWHERE.to_owned(), GRACE)?;
        }
        Ok(())
    }

    /// As [`Watch::check`], for the event that an operation of this rank starts after.
    pub(crate) fn check_start(
        &mut self,
        group: &Group,
        wire: Option<&mut (dyn Wire + 'static)>,
        is_late: &dyn Fn(usize) -> bool,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        if self.passed(|| false) {
            if let Some(error) = wire.and_then(|wire| wire.failure()) {
                return Err(error);
            }
            self.look_around(group, is_late, op)?;
            self.warn(group, &|| format!("for the event that starts {} here", op()));
            if self.waited >= self.limit.within {
                return Err(Error::NotStarted { op: op(), seconds: self.waited.as_secs() });
            }
        }
        Ok(())
    }

    /// Whether it is time to look again, counting the time since the last look unless `excused`.
    fn passed(&mut self, excused: impl Fn() -> bool) -> bool {
        if self.glances < GLANCES {
            self.glances += 1;
            return false;
        }
        let Some(checked) = self.checked else {
            self.checked = Some(Instant::now());
            return false;
        };
        let gap = checked.elapsed();
        if gap < CHECK_EVERY {
            return false;
        }
        self.checked = Some(Instant::now());
        if !excused() {
            self.waited += gap.min(LONGEST_GAP);
        }
        true
    }

    /// Looks whether a rank of this host is known never to come.
    pub(super) fn look_around(
        &self,
        group: &Group,
        is_late: &dyn Fn(usize) -> bool,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        let states = || (0..group.world()).filter(|&rank| rank != group.rank).map(|rank| (rank, group.look_at(rank)));
        let dead = || states().filter(|&(_, state)| state == state::DEAD).map(|(rank, _)| rank);
        if let Some(any) = dead().next() {
            // One that had lost another before it died is not the one to look at.
            let (rank, how) = match dead().find(|&rank| !group.rank_control(rank).blames()) {
                Some(rank) => (group.name(rank), "it died"),
                None => match culprit(group, any) {
                    Some(culprit) if culprit == group.name(group.rank) => {
                        (group.name(any), "it gave up on this rank and ended")
                    }
                    Some(culprit) if is_plausible(group, culprit, is_late) => (culprit, "another rank gave up on it"),
                    _ => (group.name(any), "it gave up on another rank and ended"),
                },
            };
            return Err(Error::PeerLost { rank, op: op(), how });
        }
        if let Some((rank, _)) = states().find(|&(_, state)| state == state::ABORTED) {
            return Err(Error::Aborted { rank: group.name(rank), reason: group.control(rank).read_reason() });
        }
        if let Some((rank, _)) = states().find(|&(rank, state)| state == state::LEFT && is_late(rank)) {
            let (rank, how) = match group.control(rank).culprit() {
                Some(culprit) if culprit == group.name(group.rank) => (group.name(rank), "it gave up on this rank"),
                Some(culprit) if is_plausible(group, culprit, is_late) => (culprit, "another rank gave up on it"),
                Some(_) => (group.name(rank), "it gave up"),
                None => (group.name(rank), "it left early"),
            };
            return Err(Error::PeerLost { rank, op: op(), how });
        }
        Ok(())
    }

    /// Warns, then gives up on `all` that are late, `grace` after the limit.
    fn judge(
        &mut self,
        group: &Group,
        late: usize,
        all: &dyn Fn() -> Vec<usize>,
        op: &dyn Fn() -> String,
        how: &dyn Fn() -> String,
        grace: Duration,
    ) -> Result<(), Error> {
        self.warn(group, &|| format!("for rank {late} in {} ({})", op(), how()));
        if self.waited >= self.limit.within.saturating_add(grace) {
            let seconds = self.waited.as_secs();
            let others = all().into_iter().filter(|&rank| rank != late);
            let waiting_on = std::iter::once(late).chain(others).collect();
            return Err(Error::Timeout { op: op(), waiting_on, seconds, how: how() });
        }
        Ok(())
    }

    /// Says once, when this rank has waited for long, what it waits for.
    fn warn(&mut self, group: &Group, what: &dyn Fn() -> String) {
        if !self.warned && self.waited >= group.options.warn_after {
            self.warned = true;
            let (rank, seconds, what) = (group.name(group.rank), self.waited.as_secs_f32(), what());
            // A closed stderr must not end the thread that says this.
            let _ = writeln!(std::io::stderr(), "pillion: rank {rank} has waited {seconds:.0} s {what}");
        }
    }
}

/// Whom the error of a rank of this host names, in this group or another one.
fn culprit(group: &Group, rank: usize) -> Option<usize> {
    let in_another = || {
        let culprit = group.rank_control(rank).culprit()?;
        (0..group.world()).find(|&member| group.local(member) == culprit).map(|member| group.name(member))
    };
    group.control(rank).culprit().or_else(in_another)
}

/// Whether to believe a rank that has left and names this one. Not where the one named keeps pace here and is well, or has given up, too:
/// then whoever named it went a way of its own.
fn is_plausible(group: &Group, culprit: usize, is_late: &dyn Fn(usize) -> bool) -> bool {
    let Some(rank) = group.hosts.local().iter().position(|&local| local == culprit) else { return true };
    is_late(rank)
        || match group.look_at(rank) {
            state::JOINED => pulse_age(group, rank) > STOPPED_AFTER,
            state::LEFT => group.control(rank).culprit().is_none(),
            _ => true,
        }
}

/// A heart that has not beaten for longer than this many milliseconds has stopped; it beats every 200.
const STOPPED_AFTER: u64 = 2000;

/// Milliseconds since a rank's heart last beat.
fn pulse_age(group: &Group, rank: usize) -> u64 {
    monotonic_millis().saturating_sub(group.rank_control(rank).heartbeat.load(Ordering::Relaxed))
}

fn is_running(group: &Group, rank: usize) -> bool {
    group.control(rank).state.load(Ordering::Acquire) == state::JOINED && pulse_age(group, rank) <= STOPPED_AFTER
}

/// Which operation a rank of this host has called that this rank has not, on another channel.
fn another_call(group: &Group, channel: Channel, late: usize) -> String {
    let newest = |rank: usize, channel: usize| group.control(rank).channels[channel].newest();
    let is_ahead = |&other: &usize| newest(late, other).sequence > newest(group.rank, other).sequence;
    match (0..CHANNELS).filter(|&other| other != channel as usize).find(is_ahead) {
        Some(other) => format!(", and has called {}, which this rank has not", describe(newest(late, other))),
        None => String::new(),
    }
}

/// What a rank's heartbeat says about it.
fn pulse(group: &Group, rank: usize) -> String {
    if group.control(rank).state.load(Ordering::Acquire) == state::ABSENT {
        return "it has not joined".to_owned();
    }
    match pulse_age(group, rank) {
        age if age > STOPPED_AFTER => format!("it has not run for {} s: stopped?", age / 1000),
        _ => "it is running".to_owned(),
    }
}
