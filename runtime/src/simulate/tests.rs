//! Simulated steps that can be followed by hand, and what holds for all.

use super::*;
use crate::{Outline, Plan, Sharded, TensorSpec, UnitSpec};
use proptest::prelude::*;

const LINK: Link = Link { bandwidth: 1024.0, latency: 0.0 };

/// Computes one operation a second; ranks are alone on their hosts.
const MACHINE: Machine =
    Machine { flops: 1.0, memory: None, ranks_per_host: 1, link: LINK, host_link: Link::INSTANT, contention: 0.0 };

fn layout(lens: &[usize], world: usize) -> Layout {
    let unit = |(index, &len): (usize, &usize)| UnitSpec {
        name: format!("unit {index}"),
        tensors: vec![TensorSpec { name: index.to_string(), shape: vec![len], decay: true, frozen: false }],
    };
    Layout::new(&lens.iter().enumerate().map(unit).collect::<Vec<_>>(), world)
}

fn policy(prefetch: usize, slots: usize) -> Policy {
    Policy { gather: Gather::Copy, prefetch, slots, ..Policy::default() }
}

fn plan(layout: &Layout, policy: &Policy, mesh: Mesh, rounds: usize) -> Verified {
    Plan::step(&Outline::new(layout, policy, mesh), rounds).verify().expect("the planner makes no races")
}

/// Two seconds forward, four backward.
fn work(units: usize) -> Work {
    Work { forward: vec![2.0; units], backward: vec![4.0; units] }
}

/// Operations as (name, unit, start, end); two ranks, units of 512 elements: 1024 bytes of f32 a shard, a second on the link.
fn followed(
    prefetch: usize,
    slots: usize,
    units: usize,
    rounds: usize,
    machine: Machine,
) -> (Verified, Simulation, Vec<String>) {
    let layout = layout(&vec![512; units], 2);
    let policy = policy(prefetch, slots);
    let mesh = Mesh { replicate: 1, shard: 2 };
    let plan = plan(&layout, &policy, mesh, rounds);
    let simulation = simulate(&plan, &layout, &policy, mesh, &machine, &work(units));
    let line = |event: TraceEvent| {
        let (start, end) = (event.start.as_secs_f64(), (event.start + event.duration).as_secs_f64());
        format!("{} {} {start} {end}", event.name, event.unit.unwrap_or_default().replace("unit ", ""))
    };
    let lines = simulation.trace(&plan, &layout).into_iter().map(line).collect();
    (plan, simulation, lines)
}

#[test]
fn without_prefetch_the_computation_waits_for_every_gather() {
    let (plan, simulation, lines) = followed(0, 1, 2, 1, MACHINE);
    // The agreement's 88 bytes take 88/1024 = 0.0859375 s. The second gather of unit 0 and the reduction of unit 1 share the link: a second each alone, two together.
    let expected = [
        "gather 0 0 1",
        "forward 0 1 3",
        "gather 1 3 4",
        "forward 1 4 6",
        "backward 1 6 10",
        "reduce 1 10 12",
        "gather 0 10 12",
        "backward 0 12 16",
        "reduce 0 16 17",
        "agree  17 17.0859375",
        "update 0 17.0859375 17.0859375",
        "update 1 17.0859375 17.0859375",
    ];
    assert_eq!(sorted(lines), sorted(expected.map(String::from).to_vec()));
    assert_eq!(simulation.exposed(), 5.0859375);
    assert_eq!(simulation.communicating(&plan), 5.0859375, "nothing is hidden");
    assert_eq!(simulation.computing(), 12.0);
}

#[test]
fn prefetch_hides_what_comes_after_the_first_gather_and_before_the_last_reduction() {
    let (plan, simulation, lines) = followed(1, 2, 2, 1, MACHINE);
    let expected = [
        "gather 0 0 1",
        "gather 1 1 2",
        "forward 0 1 3",
        "forward 1 3 5",
        "backward 1 5 9",
        "reduce 1 9 10",
        "backward 0 9 13",
        "reduce 0 13 14",
        "agree  14 14.0859375",
        "update 0 14.0859375 14.0859375",
        "update 1 14.0859375 14.0859375",
    ];
    assert_eq!(sorted(lines), sorted(expected.map(String::from).to_vec()));
    assert_eq!(simulation.exposed(), 2.0859375);
    assert_eq!(simulation.communicating(&plan), 4.0859375, "two gathers, two reductions and the agreement");
}

#[test]
fn a_reduction_that_adds_to_a_shard_waits_for_the_earlier_one_and_the_caller_for_its_slot() {
    let slow = Machine { link: Link { bandwidth: 102.4, latency: 0.0 }, ..MACHINE };
    let (_, _, lines) = followed(0, 2, 1, 3, slow);
    let starts = |name: &str| lines.iter().filter(|line| line.starts_with(name)).cloned().collect::<Vec<_>>();
    // Reductions take 10 s. A single unit has one gradient slot: the backward pass of the second
    // round, ready at 18, waits for the first reduction, which ends at 26.
    assert_eq!(starts("forward"), ["forward 0 10 12", "forward 0 16 18", "forward 0 30 32"]);
    assert_eq!(starts("backward"), ["backward 0 12 16", "backward 0 26 30", "backward 0 40 44"]);
    assert_eq!(starts("reduce"), ["reduce 0 16 26", "reduce 0 30 40", "reduce 0 44 54"]);
}

#[test]
fn latency_memory_and_flops_count_where_they_should() {
    let memory = Some(4.0);
    let machine = Machine { flops: 2.0, memory, link: Link { bandwidth: f64::INFINITY, latency: 3.0 }, ..MACHINE };
    let (_, simulation, lines) = followed(0, 1, 1, 1, machine);
    // Two ranks: one step of 3 s. Backward: 4/2 s, and 8 bytes for each of 512 elements at 4 bytes/s. The agreement's norm: 4 bytes for each of 256.
    // Update: 28.
    let backward = 4.0 + 2.0 + 8.0 * 512.0 / 4.0;
    let agree = backward + 3.0 + 256.0 + 3.0;
    assert_eq!(
        lines,
        [
            "gather 0 0 3".to_owned(),
            "forward 0 3 4".to_owned(),
            format!("backward 0 4 {backward}"),
            format!("reduce 0 {backward} {}", backward + 3.0),
            format!("agree  {} {agree}", backward + 3.0),
            format!("update 0 {agree} {}", agree + 28.0 * 256.0 / 4.0),
        ]
    );
    assert_eq!(simulation.exposed(), 9.0);
}

#[test]
fn groups_sum_their_shards_beside_the_reductions_that_come_after() {
    let layout = layout(&[512, 512], 2);
    let policy = Policy { replicas: 2, ..policy(1, 2) };
    let mesh = policy.mesh(4).unwrap();
    let plan = plan(&layout, &policy, mesh, 1);
    // A group on each host of two: gathers and reductions there are instant, and 128 of a shard's 256 f32 go to and fro between hosts: 1 s.
    let machine = Machine { ranks_per_host: 2, ..MACHINE };
    let simulation = simulate(&plan, &layout, &policy, mesh, &machine, &work(2));
    let ran = |wanted: fn(&Action) -> bool| -> Vec<(f64, f64)> {
        let spans = plan.operations.iter().zip(&simulation.spans).filter(|(operation, _)| wanted(&operation.action));
        spans.map(|(_, span)| (span.start, span.end)).collect()
    };
    // Forward to 4, backward to 12. Each unit is summed over the groups once it is reduced.
    assert_eq!(ran(|action| matches!(action, Action::Reduce { .. })), [(8.0, 8.0), (12.0, 12.0)]);
    assert_eq!(ran(|action| matches!(action, Action::AllReduce { .. })), [(8.0, 9.0), (12.0, 13.0)]);
    assert_eq!(simulation.sent(&plan, Track::Replicate), Sent { link: 2 * 1024, host: 0 });
}

#[test]
fn a_window_moves_nothing_on_a_host_and_shards_between_hosts() {
    let layout = layout(&[640], 4);
    let policy = Policy { gather: Gather::Window, ..policy(0, 1) };
    let mesh = Mesh { replicate: 1, shard: 4 };
    let plan = plan(&layout, &policy, mesh, 1);
    let sent = |ranks_per_host: usize| {
        let machine = Machine { ranks_per_host, host_link: LINK, ..MACHINE };
        simulate(&plan, &layout, &policy, mesh, &machine, &work(1)).sent(&plan, Track::Gather)
    };
    // Shards of 160 f32.
    assert_eq!(sent(4), Sent { link: 0, host: 0 });
    assert_eq!(sent(2), Sent { link: 640, host: 0 });
    assert_eq!(sent(1), Sent { link: 3 * 640, host: 0 });
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

#[derive(Clone, Debug)]
struct Case {
    mesh: Mesh,
    lens: Vec<usize>,
    policy: Policy,
    rounds: usize,
    machine: Machine,
    work: Work,
}

impl Case {
    fn simulate(&self, machine: &Machine) -> (Verified, Simulation, f64) {
        let Case { policy, mesh, work, .. } = self;
        let layout = layout(&self.lens, mesh.shard);
        let plan = plan(&layout, policy, *mesh, self.rounds);
        let groups = machine.groups(*mesh).expect("powers of two");
        let buckets = Buckets::new(&layout, &plan.outline.buckets);
        let costs = Costs { layout: &layout, buckets, policy, mesh: *mesh, machine, work, groups };
        let alone = |operation: &crate::Operation| {
            let cost = costs.of(operation.action);
            cost.fixed + cost.links[0].max(cost.links[1])
        };
        let sum = plan.operations.iter().map(alone).sum();
        let simulation = simulate(&plan, &layout, policy, *mesh, machine, work);
        (plan, simulation, sum)
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let policy =
        (0usize..4, 1usize..3, 0u64..40_000, any::<[bool; 4]>()).prop_map(|(prefetch, more, bucket, flags)| {
            let [optimizer, parameters, gradients, window] = flags;
            let sharded = Sharded { optimizer, parameters: parameters && optimizer, gradients: gradients && optimizer };
            let gather = if window { Gather::Window } else { Gather::Copy };
            Policy { sharded, gather, bucket, ..policy(prefetch, prefetch + more) }
        });
    let link = || (100.0..1e5f64, 0.0..0.1f64).prop_map(|(bandwidth, latency)| Link { bandwidth, latency });
    let machine = (link(), link(), 0.5..20.0f64, prop_oneof![Just(1usize), Just(2), Just(4)]);
    let units = prop::collection::vec((1usize..5000, 0.0..4.0f64, 0.0..8.0f64), 1..6);
    (units, policy, prop_oneof![Just(1usize), Just(2), Just(4)], 1usize..4, machine).prop_map(
        |(units, policy, replicas, rounds, (link, host_link, flops, ranks_per_host))| {
            let policy = Policy { replicas, ..policy };
            Case {
                mesh: policy.mesh(4).expect("powers of two"),
                lens: units.iter().map(|unit| unit.0).collect(),
                policy,
                rounds,
                machine: Machine { flops, memory: Some(1e6), ranks_per_host, link, host_link, contention: 0.0 },
                work: Work {
                    forward: units.iter().map(|unit| unit.1).collect(),
                    backward: units.iter().map(|unit| unit.2).collect(),
                },
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_edge_of_the_plan_holds_and_the_step_lies_between_the_longest_and_the_sum(case in cases()) {
        let (plan, simulation, sum) = case.simulate(&case.machine);
        for (index, operation) in plan.operations.iter().enumerate() {
            for &earlier in &operation.after {
                prop_assert!(simulation.spans[earlier].end <= simulation.spans[index].start, "{} → {}", earlier, index);
            }
        }
        for track in [Track::Compute, Track::Gather, Track::Reduce, Track::Replicate] {
            prop_assert!(simulation.step >= simulation.busy(&plan, track) - 1e-9);
        }
        let communicating = simulation.communicating(&plan);
        prop_assert!(communicating >= simulation.exposed() - 1e-9, "who waits, waits for a collective");
        prop_assert!(simulation.step >= communicating - 1e-9);
        prop_assert!(simulation.step >= simulation.computing() && simulation.step <= sum + 1e-9, "{simulation:?} of {sum}");
    }

    #[test]
    fn without_prefetch_nothing_is_computed_during_a_gather(case in cases()) {
        let case = Case { policy: Policy { prefetch: 0, ..case.policy }, ..case };
        let (plan, simulation, _) = case.simulate(&case.machine);
        prop_assert!(simulation.exposed() >= simulation.busy(&plan, Track::Gather) - 1e-9);
    }

    #[test]
    fn faster_links_never_make_a_step_longer(case in cases(), factor in 1.0..4.0f64) {
        let faster = |link: Link| Link { bandwidth: link.bandwidth * factor, latency: link.latency / factor };
        let Machine { link, host_link, .. } = case.machine;
        let better = Machine { link: faster(link), host_link: faster(host_link), ..case.machine };
        prop_assert!(case.simulate(&better).1.step <= case.simulate(&case.machine).1.step + 1e-9);
    }
}
