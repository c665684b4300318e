//! What an engine records of a step is the plan's operations, each once, and none before what it waits for has ended.

use std::collections::BTreeMap;

use pillion_kernels::DType;
use pillion_runtime::trace::{TraceEvent, Track};
use pillion_runtime::{Action, Gather, Pass, Sharded, Verified};

use crate::common::{Rank, Schedule, Setup, ranks};

/// What is recorded of an operation: track, name and units.
fn named(
    action: Action,
    plan: &Verified,
    unit_name: impl Fn(usize) -> String,
) -> (Track, &'static str, Option<String>) {
    let of_bucket = |bucket: usize| {
        let units = &plan.outline.buckets[bucket];
        match units.len() {
            1 => unit_name(units.start),
            _ => format!("{} to {}", unit_name(units.start), unit_name(units.end - 1)),
        }
    };
    let (track, name, unit) = match action {
        Action::Gather { bucket, .. } => return (Track::Gather, "gather", Some(of_bucket(bucket))),
        Action::Compute { unit, pass: Pass::Forward, .. } => (Track::Compute, "forward", Some(unit)),
        Action::Compute { unit, pass: Pass::Backward, .. } => (Track::Compute, "backward", Some(unit)),
        Action::Reduce { bucket, .. } => return (Track::Reduce, "reduce", Some(of_bucket(bucket))),
        Action::AllReduce { bucket } => return (Track::Replicate, "all-reduce", Some(of_bucket(bucket))),
        Action::Agree => (Track::Compute, "agree", None),
        Action::Update { unit } => (Track::Compute, "update", Some(unit)),
    };
    (track, name, unit.map(unit_name))
}

/// The event of each operation: a track's events, but for waits, are the track's operations in the plan's order.
fn events_of<'e>(
    plan: &Verified,
    events: &'e [TraceEvent],
    unit_name: impl Fn(usize) -> String,
) -> Vec<&'e TraceEvent> {
    let mut tracks: BTreeMap<Track, Vec<&TraceEvent>> = BTreeMap::new();
    events
        .iter()
        .filter(|event| event.name != "wait")
        .for_each(|event| tracks.entry(event.track).or_default().push(event));
    let mut tracks: BTreeMap<Track, _> =
        tracks.into_iter().map(|(track, events)| (track, events.into_iter())).collect();
    let mut next = |action: Action| {
        let (track, name, unit) = named(action, plan, &unit_name);
        let event = tracks.get_mut(&track).and_then(Iterator::next).unwrap_or_else(|| panic!("{action:?} is missing"));
        assert_eq!((event.name, &event.unit), (name, &unit));
        event
    };
    let found: Vec<&TraceEvent> = plan.operations.iter().map(|operation| next(operation.action)).collect();
    assert!(tracks.values_mut().all(|rest| rest.next().is_none()), "there are more than the plan's");
    found
}

fn check(rank: &mut Rank, schedule: &Schedule, setup: &Setup) {
    let rounds = schedule.rounds(0, setup.world());
    let plan = rank.engine.plan(rounds);
    rank.step(schedule, 0).unwrap();
    rank.engine.record(true).unwrap();
    assert_eq!(rank.engine.recorded(), [], "nothing yet");
    for step in 0..2 {
        let report = rank.step(schedule, step).unwrap();
        let events = rank.engine.recorded();
        let layout = rank.engine.layout();
        let of_plan = events_of(&plan, &events, |unit| layout.units[unit].name.clone());
        for (operation, event) in plan.operations.iter().zip(&of_plan) {
            assert_eq!(event.rank, rank.rank());
            for &earlier in &operation.after {
                let before = of_plan[earlier];
                let end = before.start + before.duration;
                assert!(end <= event.start, "{:?} began before the end of {before:?}: {event:?}", operation.action);
            }
        }
        let sum =
            |is: fn(&TraceEvent) -> bool| events.iter().filter(|&event| is(event)).map(|event| event.duration).sum();
        let waited: std::time::Duration = sum(|event| event.name == "wait" || event.name == "agree");
        assert!(waited >= report.exposed, "waiting is on the timeline: {waited:?} of {:?}", report.exposed);
        // What goes on between steps belongs to none.
        rank.engine.master(1).unwrap();
    }
    rank.engine.record(false).unwrap();
    rank.step(schedule, 0).unwrap();
    assert_eq!(rank.engine.recorded(), [], "no longer");
}

#[test]
fn a_timeline_has_every_operation_of_the_plan_once_and_after_what_it_waits_for() {
    for gather in [Gather::Copy, Gather::Window] {
        for world in [1, 2, 4] {
            let setup = Setup::new(world).gather(gather);
            let placements = match world {
                4 => vec![setup.clone(), setup.clone().replicas(2), setup.reduce(DType::Bf16).replicas(2)],
                _ => vec![setup.clone(), setup.clone().sharded(Sharded::NOTHING), setup.sharded(Sharded::OPTIMIZER)],
            };
            for setup in placements {
                let schedule = Schedule::uneven(world, 2);
                ranks(&setup, |mut rank: Rank| check(&mut rank, &schedule, &setup));
            }
        }
    }
}
