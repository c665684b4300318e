//! When tasks run that wait for each other on first-in, first-out lanes, and share links.
//!
//! A caller walks along the list. What belongs to its own lane it does itself, at once, before it goes on; everything else it
//! issues, which costs nothing, and there it starts when its lane has come to it and what it waits for is complete. That is how the engine
//! follows a plan on a processor, where kernels run within the call that asks for them.
//!
//! A task first takes its fixed time, and then flows through the links. Tasks that flow at the same time share each link they need: all slow down
//! alike, in proportion to their speed alone, until a link is full; what does not use that one may go on to be faster (progressive filling, which gives the
//! max-min fair rates: Bertsekas and Gallager 1992, 6.5.2). Two that need the same link have half of it each. While anything flows, the caller may be slower: whoever moves
//! the data takes a part of its processor.

use std::collections::VecDeque;

/// Lanes; the first is the caller's.
pub(super) const LANES: usize = 4;
/// Links that are shared.
pub(super) const LINKS: usize = 2;

/// Something that takes time.
#[derive(Clone, Debug)]
pub(super) struct Task<'a> {
    pub(super) lane: usize,
    /// Earlier tasks that must be complete before it starts.
    pub(super) after: &'a [usize],
    /// Seconds that no link matters to.
    pub(super) fixed: f64,
    /// Seconds that it then needs of all of each link. None on the caller's lane.
    pub(super) links: [f64; LINKS],
}

/// When something ran, in seconds from the beginning of the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Its start.
    pub start: f64,
    /// Its end.
    pub end: f64,
}

/// A task under way.
struct Running {
    task: usize,
    start: f64,
    /// When its fixed time is over.
    flows_from: f64,
    /// The share of its flow that is left.
    left: f64,
    /// Seconds that its flow takes alone.
    alone: f64,
}

/// When each task runs, where the caller's processor loses the share `contention` while something flows.
///
/// # Panics
/// When a task waits for one that does not come earlier in the list.
pub(super) fn schedule(tasks: &[Task<'_>], contention: f64) -> Vec<Times> {
    let mut spans: Vec<Option<Times>> = vec![None; tasks.len()];
    let mut lanes: [VecDeque<usize>; LANES] = Default::default();
    let mut running: [Option<Running>; LANES] = Default::default();
    let (mut issued, mut now) = (0, 0.0);
    loop {
        let done = |task: &usize| spans[*task].is_some();
        while let Some(task) = tasks.get(issued) {
            let ready = task.lane > 0 || task.after.iter().all(done);
            if running[0].is_some() || !lanes[0].is_empty() || !ready {
                break;
            }
            lanes[task.lane].push_back(issued);
            issued += 1;
        }
        for (lane, running) in lanes.iter_mut().zip(&mut running) {
            if let (None, Some(&task)) = (&running, lane.front())
                && tasks[task].after.iter().all(done)
            {
                let Task { fixed, links, .. } = &tasks[task];
                let flow = links.iter().fold(0.0, |longest: f64, &seconds| longest.max(seconds));
                // All of what the caller does is slowed down.
                let (fixed, alone) = if tasks[task].lane == 0 { (0.0, *fixed) } else { (*fixed, flow) };
                let left = if alone > 0.0 { 1.0 } else { 0.0 };
                *running = Some(Running { task, start: now, flows_from: now + fixed, left, alone });
                lane.pop_front();
            }
        }
        let flows = |running: &Running| running.left > 0.0 && running.flows_from <= now;
        let demands = running.each_ref().map(|running| match running {
            Some(running) if tasks[running.task].lane > 0 && flows(running) => {
                Some(tasks[running.task].links.map(|seconds| seconds / running.alone))
            }
            _ => None,
        });
        let mut speeds = share(demands);
        speeds[0] = if demands.iter().any(Option::is_some) { 1.0 - contention } else { 1.0 };
        // When something changes next for each.
        let next = |(running, speed): (&Option<Running>, f64)| {
            let running = running.as_ref()?;
            let flows = flows(running);
            Some(if flows { now + running.left * running.alone / speed } else { running.flows_from.max(now) })
        };
        let changes: [Option<f64>; LANES] = std::array::from_fn(|lane| next((&running[lane], speeds[lane])));
        let Some(then) = changes.into_iter().flatten().min_by(f64::total_cmp) else { break };
        for lane in 0..LANES {
            let Some(task) = &mut running[lane] else { continue };
            if flows(task) {
                let over = changes[lane].is_some_and(|change| change <= then);
                task.left = if over { 0.0 } else { task.left - (then - now) * speeds[lane] / task.alone };
            }
            if task.left <= 0.0 && task.flows_from <= then {
                spans[task.task] = Some(Times { start: task.start, end: then });
                running[lane] = None;
            }
        }
        now = then;
    }
    spans.into_iter().map(|span| span.expect("nothing waits for what comes later")).collect()
}

/// Speeds of flows, as shares of their speeds alone. `demands`: the shares of each link that they need at full speed, of which one is 1.
fn share(demands: [Option<[f64; LINKS]>; LANES]) -> [f64; LANES] {
    let mut speeds: [Option<f64>; LANES] = demands.map(|demand| if demand.is_some() { None } else { Some(0.0) });
    loop {
        // The speed at which each link is full, if those whose speed is not known yet have the same.
        let full = |link: usize| {
            let (mut rest, mut growing) = (1.0, 0.0);
            for (demand, speed) in demands.iter().zip(speeds) {
                let demand = demand.map_or(0.0, |demand| demand[link]);
                match speed {
                    Some(speed) => rest -= speed * demand,
                    None => growing += demand,
                }
            }
            (growing > 0.0).then(|| rest / growing)
        };
        let first = (0..LINKS).filter_map(|link| Some((link, full(link)?))).min_by(|a, b| a.1.total_cmp(&b.1));
        let Some((link, speed)) = first else { return speeds.map(|speed| speed.unwrap_or(0.0)) };
        for (demand, known) in demands.iter().zip(&mut speeds) {
            if known.is_none() && demand.is_some_and(|demand| demand[link] > 0.0) {
                *known = Some(speed.min(1.0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COMPUTE: Task<'_> = Task { lane: 0, after: &[], fixed: 0.0, links: [0.0; LINKS] };
    const FIRST: Task<'_> = Task { lane: 1, ..COMPUTE };
    const SECOND: Task<'_> = Task { lane: 2, ..COMPUTE };

    fn spans(tasks: &[Task<'_>]) -> Vec<(f64, f64)> {
        schedule(tasks, 0.0).into_iter().map(|span| (span.start, span.end)).collect()
    }

    #[test]
    fn a_lane_is_first_in_first_out_and_the_caller_waits_for_its_own() {
        let tasks = [
            Task { fixed: 2.0, ..FIRST },
            Task { fixed: 3.0, ..COMPUTE },
            // Listed after a computation, so issued when that has run, though nothing orders them.
            Task { fixed: 1.0, ..FIRST },
            Task { fixed: 1.0, after: &[2], ..COMPUTE },
        ];
        assert_eq!(spans(&tasks), [(0.0, 2.0), (0.0, 3.0), (3.0, 4.0), (4.0, 5.0)]);
    }

    #[test]
    fn what_waits_for_an_edge_holds_up_its_lane_but_not_the_caller() {
        let tasks = [
            Task { fixed: 5.0, ..FIRST },
            Task { fixed: 1.0, after: &[0], ..SECOND },
            Task { fixed: 1.0, ..SECOND },
            Task { fixed: 1.0, ..COMPUTE },
        ];
        assert_eq!(spans(&tasks), [(0.0, 5.0), (5.0, 6.0), (6.0, 7.0), (0.0, 1.0)]);
    }

    #[test]
    fn two_flows_have_half_of_a_link_each_and_latency_is_not_shared() {
        // Alone: 1 + 4 s, and 4 s. The second has the link to itself for a second, then both need 4 − 1 + 4 s of it: the second has what it needs of
        // half the link at 1 + 2·3 = 7, the first has 4 − 3 s left for itself then.
        let tasks = [Task { fixed: 1.0, links: [4.0, 0.0], ..FIRST }, Task { links: [4.0, 0.0], ..SECOND }];
        assert_eq!(spans(&tasks), [(0.0, 8.0), (0.0, 7.0)]);
    }

    #[test]
    fn flows_through_different_links_do_not_slow_each_other() {
        let tasks = [Task { links: [4.0, 0.0], ..FIRST }, Task { links: [0.0, 3.0], ..SECOND }];
        assert_eq!(spans(&tasks), [(0.0, 4.0), (0.0, 3.0)]);
    }

    #[test]
    fn who_moves_data_takes_its_share_of_the_callers_processor_meanwhile() {
        // 1 s before anything flows; then 2 s at 3/4 of the speed, in which 1.5 s of work are done; 0.5 s are left.
        let tasks = [Task { fixed: 1.0, links: [2.0, 1.0], ..FIRST }, Task { fixed: 3.0, ..COMPUTE }];
        let spans = schedule(&tasks, 0.25);
        assert_eq!(spans, [Times { start: 0.0, end: 3.0 }, Times { start: 0.0, end: 3.5 }]);
    }

    #[test]
    fn what_one_flow_cannot_use_of_a_link_another_may() {
        // The first needs all of link 0 and a quarter of link 1 at full speed, the second all of link 1 alone: 3/4 of it is left, once link
        // 1 is full at s = 1/(1 + 1/4) for both… and the first may then not grow either, since it uses link 1.
        let speeds = share([None, Some([1.0, 0.25]), Some([0.0, 1.0]), None]);
        assert_eq!(speeds, [0.0, 0.8, 0.8, 0.0]);
        // Three: link 0 is full at 1/2, where two stop; the third has what they leave of link 1.
        let speeds = share([None, Some([1.0, 0.2]), Some([1.0, 0.2]), Some([0.0, 1.0])]);
        assert_eq!(speeds, [0.0, 0.5, 0.5, 0.8]);
    }

    /// Tasks by their raw numbers: (lane, edges as distances, fixed, links).
    type Raw = (usize, Vec<usize>, f64, [f64; LINKS]);

    fn raw() -> impl Strategy<Value = Vec<Raw>> {
        let edges = prop::collection::vec(1usize..6, 0..3);
        let time = || prop_oneof![Just(0.0), 0.0..3.0];
        prop::collection::vec((0..LANES, edges, time(), [time(), time()]), 1..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_order_holds_and_the_end_lies_between_the_longest_and_the_sum(raw in raw()) {
            let edges = |(index, task): (usize, &Raw)| task.1.iter().filter_map(|back| index.checked_sub(*back)).collect();
            let edges: Vec<Vec<usize>> = raw.iter().enumerate().map(edges).collect();
            let task = |(index, task): (usize, &Raw)| Task {
                lane: task.0,
                after: &edges[index],
                fixed: task.2,
                links: if task.0 == 0 { [0.0; LINKS] } else { task.3 },
            };
            let tasks: Vec<Task<'_>> = raw.iter().enumerate().map(task).collect();
            let spans = schedule(&tasks, 0.0);
            let mut last: [Option<usize>; LANES] = [None; LANES];
            let mut busy = [0.0; LANES];
            let mut carried = [0.0; LINKS];
            let mut sum = 0.0;
            for (index, task) in tasks.iter().enumerate() {
                let alone = task.fixed + task.links[0].max(task.links[1]);
                prop_assert!(spans[index].end - spans[index].start >= alone - 1e-9);
                for &earlier in task.after.iter().chain(&last[task.lane]).chain(&last[0]) {
                    prop_assert!(spans[earlier].end <= spans[index].start, "{} before {}", earlier, index);
                }
                last[task.lane] = Some(index);
                busy[task.lane] += alone;
                (0..LINKS).for_each(|link| carried[link] += task.links[link]);
                sum += alone;
            }
            let end = spans.iter().fold(0.0, |end: f64, span| end.max(span.end));
            prop_assert!(busy.into_iter().chain(carried).all(|least| end >= least - 1e-9), "{end} of {busy:?}");
            prop_assert!(end <= sum + 1e-9, "{end} of {sum}");
        }
    }
}
