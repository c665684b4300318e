//! The same run gives the same numbers however it is spread: over ranks, threads or processes, by whichever gather, on either device.

use pillion_tests::program::{Step, TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// 20 steps, in which the norm test asks for more.
const GROWING: &str = "--steps 20 --eta 0.35 --max-batch 64";

fn batches(steps: &[Step]) -> Vec<u64> {
    steps.iter().map(|step| step.batch_samples).collect()
}

#[track_caller]
fn agree(a: &[Step], b: &[Step]) {
    assert_eq!(batches(a), batches(b));
    for (a, b) in a.iter().zip(b) {
        for (name, a, b) in [
            ("loss", a.loss, b.loss),
            ("grad_norm", a.grad_norm, b.grad_norm),
            ("validation_loss", a.validation_loss.unwrap_or(0.0), b.validation_loss.unwrap_or(0.0)),
        ] {
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{name}: {a} and {b}");
        }
    }
}

#[test]
fn any_number_of_ranks_agrees_while_the_batch_grows_by_every_rule() {
    for growing in [
        GROWING,
        "--steps 20 --variant debiased --eta 0.4 --max-batch 64 --lr-coupling sqrt",
        "--steps 20 --controller noise-scale --ratio 8 --max-batch 64",
        "--steps 20 --controller linear-ramp --ramp 64:0.3 --max-batch 64",
    ] {
        let place = Workplace::new(PROGRAM);
        let [one, two, three, four] =
            [1, 2, 3, 4].map(|ranks| place.train(&ranks.to_string(), &format!("{growing} --ranks {ranks}")));
        let batches = batches(&one);
        assert_eq!(batches.len(), 20);
        assert!(batches[0] == 8 && batches[19] > 8, "the batch grows: {batches:?}");
        assert!(batches.iter().all(|batch| batch % 8 == 0), "{batches:?}");
        assert!(one[19].loss < 0.8 * one[0].loss, "it learns: {} to {}", one[0].loss, one[19].loss);
        assert!(one[19].validation_loss.is_some());
        for other in [two, three, four] {
            agree(&one, &other);
        }
    }
}

/// Two ranks, and every other way to run the same two.
fn every_way_is_bitwise_equal(precision: &str) {
    let place = Workplace::new(PROGRAM);
    let base = format!("{GROWING} --ranks 2 --precision {precision}");
    let expected = place.train("base", &base);
    assert!(batches(&expected)[19] > 8);
    for (number, way) in [
        "",
        "--launch threads",
        "--gather copy --prefetch 0",
        "--device lazy-cpu",
        "--device lazy-cpu --gather copy --prefetch 2 --launch threads",
        "--prefetch 0",
        "--prefetch 2",
        "--gather copy --slots 4",
        "--gather copy --no-overlap",
        "--gather copy --bucket 300KB",
        "--bucket 1MiB --recompute block --device lazy-cpu",
        "--auto",
        "--gather copy --auto",
    ]
    .into_iter()
    .enumerate()
    {
        let found = place.train(&format!("way-{number}"), &format!("{base} {way}"));
        assert_eq!(expected, found, "{way}");
    }
}

#[test]
fn every_way_of_running_two_ranks_is_bitwise_equal_in_f32() {
    every_way_is_bitwise_equal("f32");
}

#[test]
fn every_way_of_running_two_ranks_is_bitwise_equal_in_bf16() {
    every_way_is_bitwise_equal("bf16");
}

/// Every placement that reduces as often: with one micro-batch of each rank a step, that is all of them. Statistics of groups are added up in another
/// order, which is not among what steps are compared by.
#[test]
fn every_placement_of_four_ranks_is_bitwise_equal() {
    let place = Workplace::new(PROGRAM);
    let base = "--steps 12 --ranks 4 --controller constant --batch 8";
    let numbers = |steps: Vec<Step>| -> Vec<_> {
        steps.iter().map(|step| (step.loss, step.grad_norm, step.validation_loss)).collect()
    };
    let expected = numbers(place.train("base", base));
    assert_eq!(expected.len(), 12);
    for (number, way) in [
        "--shard zero-2",
        "--shard zero-1",
        "--shard nothing",
        "--shard parameters,optimizer --gather copy",
        "--shard nothing --device lazy-cpu",
        "--shard zero-1 --launch threads",
        "--shard zero-1 --bucket 300KB",
        "--shard zero-2 --bucket 64MiB",
        "--shard nothing --bucket 300KB",
    ]
    .into_iter()
    .enumerate()
    {
        let found = place.train(&format!("way-{number}"), &format!("{base} {way}"));
        assert_eq!(expected, numbers(found), "{way}");
    }
    // A grid sums within groups first, as a flat group does that is told to.
    let expected = place.train("groups", &format!("{base} --clip 0 --reduce-groups 2"));
    for (number, way) in
        ["", "--shard zero-2", "--gather copy --prefetch 2", "--device lazy-cpu"].into_iter().enumerate()
    {
        let flags = format!("{base} --clip 0 --mesh replicate=2,shard=2 {way}");
        let found = place.train(&format!("grid-{number}"), &flags);
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((found.loss, found.validation_loss), (expected.loss, expected.validation_loss), "{way}");
        }
        assert_eq!(found.len(), 12);
    }
}

#[test]
fn threads_change_no_bit() {
    let place = Workplace::new(PROGRAM);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if processors < 2 {
        println!("SKIPPED: this process may run on one processor only");
        return;
    }
    for precision in ["f32", "bf16"] {
        let flags = format!("{GROWING} --ranks 1 --seq 64 --micro-batch 8 --precision {precision}");
        let one = place.train("one", &format!("{flags} --threads 1"));
        for threads in [2, processors.min(5)] {
            assert_eq!(one, place.train("several", &format!("{flags} --threads {threads}")), "{threads} threads");
        }
    }
}

#[test]
fn a_profile_tells_where_the_time_goes_and_changes_no_bit() {
    let place = Workplace::new(PROGRAM);
    let plain = place.train("plain", "--steps 3 --ranks 2");
    let ended = place.run(&format!("train {TINY} --out profiled --steps 3 --ranks 2 --profile")).succeeded();
    assert_eq!(plain, place.steps("profiled"));
    let share = |name: &str| {
        let line = ended.stdout.lines().rev().find(|line| line.trim_start().starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name}\n{ended}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        let percent = words.iter().position(|word| *word == "%").expect("a share");
        words[percent - 1].parse::<f64>().expect("a number")
    };
    let kernels =
        ["linear ", "linear_backward_input", "linear_backward_weight", "attention ", "attention_backward", "adamw"];
    let sum: f64 = kernels.into_iter().map(share).sum();
    assert!(sum > 0.0 && sum <= 100.5, "{sum} %\n{ended}");
    assert_eq!(share("step"), 100.0);
}

#[test]
fn another_seed_is_another_run() {
    let place = Workplace::new(PROGRAM);
    let a = place.train("a", "--steps 2 --ranks 1");
    let b = place.train("b", "--steps 2 --ranks 1 --seed 8");
    assert_ne!(a[0].loss, b[0].loss);
    let c = place.train("c", "--steps 2 --ranks 1 --precision bf16");
    assert_ne!(a[0].loss, c[0].loss);
}

#[test]
fn the_norm_test_adds_no_collective() {
    let place = Workplace::new(PROGRAM);
    let collectives = |controller: &str| {
        let flags = format!("--steps 3 --max-batch 8 --ranks 2 --controller {controller}");
        place.train(controller, &flags);
        let lines = place.lines(controller);
        lines.iter().map(|line| line["collectives"].as_u64().expect("a count")).collect::<Vec<u64>>()
    };
    let constant = collectives("constant");
    assert!(constant.iter().all(|&count| count > 0), "{constant:?}");
    assert_eq!(constant, collectives("norm-test"));
}

#[test]
fn the_stagewise_controller_follows_its_list() {
    let place = Workplace::new(PROGRAM);
    let flags = "--samples 80 --controller stagewise --stages 8:0.3,16:0.7 --max-batch 16 --ranks 2";
    // 24 samples of batch 8, then 56 of batch 16: three whole batches, and the 8 samples that are left.
    assert_eq!(batches(&place.train("out", flags)), [8, 8, 8, 16, 16, 16, 8]);
}

#[test]
fn metrics_hold_every_promised_key() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--steps 2 --ranks 2");
    for line in place.lines("out") {
        let keys = "step loss lr grad_norm batch_samples batch_tokens samples_seen tokens_per_s step_ms exposed_ms host_waits bytes_sent \
                    groups group_square_norms sum_square_norm noise_scale flops mfu";
        for key in keys.split_whitespace() {
            assert!(line.get(key).is_some(), "{key} in {line}");
        }
        assert_eq!(line["batch_tokens"].as_u64(), Some(8 * 32));
        assert_eq!(line["host_waits"], 1);
    }
}

/// From K, N, S = Σ‖G_k‖²/n_k and T = ‖ΣG_k‖² alone, by the formulas in the documentation of
/// `pillion-abs`: σ̂² = (S − T/N)/(K − 1)·b/N and |Ĝ|² = (T/N − (S − T/N)/(K − 1))/N for a step,
/// whose sums over steps, discounted by 0.9, give the noise scale and what the norm test asks for.
/// Each value is rounded some ten times, relative to the largest term of its difference.
#[test]
fn statistics_follow_from_the_sums_in_the_metrics() {
    let place = Workplace::new(PROGRAM);
    let eta = 0.35;
    for (shard, ranks) in [("zero-3", 2), ("zero-1", 4)] {
        let flags = format!("--steps 12 --eta {eta} --ema 0.9 --max-batch 64 --shard {shard} --ranks {ranks}");
        place.train("out", &flags);
        let (mut variance, mut square, mut debiased, mut scale) = (0.0, 0.0, 0.0, 0.0);
        let mut compared = 0;
        for line in place.lines("out") {
            let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"));
            let [groups, tokens, samples] = ["groups", "batch_tokens", "batch_samples"].map(number);
            let expected = if shard == "zero-3" { samples / 2.0 } else { f64::from(ranks) };
            assert_eq!(groups, expected, "{line}");
            let (sums, total) = (number("group_square_norms"), number("sum_square_norm") / tokens);
            let of_token = (sums - total) / (groups - 1.0);
            variance = 0.9 * variance + of_token * samples / tokens;
            square = 0.9 * square + total / tokens;
            debiased = 0.9 * debiased + (total - of_token) / tokens;
            scale = 0.9 * scale + sums * samples / tokens;
            let rounding = 10.0 * f64::EPSILON * scale;
            let close = |key: &str, value: f64, error: f64| {
                let found = number(key);
                assert!((found - value).abs() <= error, "{key}: {found} and {value}, ± {error:e}: {line}");
            };
            close("wanted_batch", variance / (eta * eta * square), 2.0 * rounding / (eta * eta * square));
            close("grad_norm", (total / tokens).sqrt(), 10.0 * f64::EPSILON * number("grad_norm"));
            if line["noise_scale"].is_null() {
                assert!(debiased <= 0.0, "{line}");
                continue;
            }
            // |Ĝ|² is rounded like σ̂², a sample's share of it.
            let error = rounding / debiased * (1.0 + variance / debiased / samples);
            close("noise_scale", variance / debiased, 2.0 * error);
            compared += 1;
        }
        assert!(compared > 0, "{shard}");
    }
}

#[test]
fn a_report_of_where_the_noise_points_changes_nothing_else() {
    let place = Workplace::new(PROGRAM);
    for placement in ["--ranks 2 --shard zero-1", "--ranks 4 --shard zero-3"] {
        let flags = format!("--steps 6 --ema 0 --eta 0.5 {placement}");
        let plain = place.train("plain", &flags);
        assert_eq!(plain, place.train("with", &format!("{flags} --alignment 0.5")));
        let mut compared = 0;
        for (plain, with) in place.lines("plain").iter().zip(place.lines("with")) {
            let same = |key: &str| assert_eq!(plain[key], with[key], "{key}");
            same("collectives");
            assert!(plain.get("alignment").is_none());
            let Some(alignment) = with.get("alignment") else {
                assert!(with["batch_samples"].as_u64() > Some(8), "a step of one round tells: {with}");
                continue;
            };
            let number = |value: &serde_json::Value| value.as_f64().expect("a number");
            for share in ["coordinates", "mass"] {
                assert!((0.0..=1.0).contains(&number(&alignment[share])) && number(&alignment[share]) > 0.0, "{with}");
            }
            // At 0.5: 1 − (2/π) arctan 2 of two ranks' coordinates, P(|t₃| ≥ 2) of four ranks'.
            let by_chance = if placement.contains("--ranks 2") { 0.2952 } else { 0.1393 };
            assert!((number(&alignment["coordinates_by_chance"]) - by_chance).abs() < 5e-5, "{with}");
            assert!((by_chance..=1.0).contains(&number(&alignment["mass_by_chance"])), "{with}");
            assert!(number(&alignment["mass"]) > number(&alignment["coordinates"]), "what is large passes: {with}");
            // σ̂²/Q = V_ip/Q² + V_⊥/Q, and B_simple = σ̂²/(Q − σ̂²/N); for the bound see statistics.rs, where both are compared with f64.
            let relative = number(&alignment["along"]) + number(&alignment["across"]);
            let noise_scale = relative / (1.0 - relative / number(&with["batch_samples"]));
            let Some(found) = with["noise_scale"].as_f64() else { continue };
            let amplified = 1e-5 * noise_scale / relative;
            assert!((noise_scale / found - 1.0).abs() < amplified, "{noise_scale} and {found}: {with}");
            compared += 1;
        }
        assert!(compared > 0, "{placement}");
    }
}

/// A rank that is alone compares its micro-batches; with one of these, or with whole gradients, there is nothing to compare, and it says so.
#[test]
fn a_batch_that_cannot_be_measured_is_said() {
    let place = Workplace::new(PROGRAM);
    let run = |flags: &str| {
        place.run(&format!(
            "train --data text --model tiny --seq 32 --micro-batch 2 --samples 2000 --steps 3 --ranks 1 {flags}"
        ))
    };
    let silent = run("--eta 0.1 --out default").succeeded();
    assert!(!silent.stderr.contains("single group"), "{silent}");
    assert_eq!(batches(&place.steps("default"))[0], 4);
    assert!(batches(&place.steps("default"))[2] > 4);
    for flags in ["--batch 2", "--batch 8 --shard zero-1"] {
        let said = run(&format!("{flags} --out alone")).succeeded();
        assert!(said.stderr.contains("a single group") && said.stderr.contains("--controller constant"), "{said}");
    }
    let constant = run("--batch 2 --controller constant --out constant").succeeded();
    assert!(!constant.stderr.contains("single group"), "{constant}");
}
