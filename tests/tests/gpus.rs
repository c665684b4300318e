//! Training on GPUs: over the stand-ins of `tests/standins` (`ci/cuda`), or on GPUs. The numbers
//! follow the processor's, and have the same bits however a run on GPUs is spread.

use pillion_collectives::Meeting;
use pillion_kernels::DType;
use pillion_llama::config::Preset;
use pillion_tests::program::{Step, TINY, Workplace};
use pillion_tests::rounding;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Little work, because the stand-ins take long for it.
const LITTLE: &str = "--seq 8 --micro-batch 1 --batch 4 --round-to 4 --validation-samples 2 --sample 0";

/// A workplace whose programs find the GPUs, or what stands for them: with the random choices of
/// this seed, in the series that STANDIN_SERIES names, 0 if none.
fn workplace(seed: u64) -> Workplace {
    workplace_with(seed, &[])
}

/// The same with more variables.
fn workplace_with(seed: u64, more: &[(&str, &str)]) -> Workplace {
    let own = |name: &str| name.starts_with("PILLION_STANDIN") || name == "PILLION_CUDA_CACHE";
    let variables = std::env::vars().filter(|(name, _)| own(name));
    let series = std::env::var("STANDIN_SERIES").ok().and_then(|series| series.parse().ok()).unwrap_or(0);
    let seed = ("PILLION_STANDIN_SEED".to_owned(), (seed + 10_000 * series).to_string());
    let more = more.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
    Workplace::new(PROGRAM).with_variables(variables.chain([seed]).chain(more))
}

/// The bound for runs of [`LITTLE`] in step `step`, from 1.
fn bound(dtype: DType, step: usize) -> f64 {
    rounding::bound(&Preset::named("tiny").unwrap().config(), dtype, [8, 4 * 8], step)
}

#[track_caller]
fn agree(dtype: DType, a: &[Step], b: &[Step]) {
    assert_eq!(a.len(), b.len());
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!((a.batch_samples, a.samples_seen), (b.batch_samples, b.samples_seen));
        let bound = bound(dtype, index + 1);
        let near = rounding::near(a.loss, b.loss, bound) && rounding::near(a.grad_norm, b.grad_norm, bound);
        assert!(near, "step {} within {bound:e}: {a:?} and {b:?}", index + 1);
    }
}

#[test]
fn ranks_on_gpus_follow_ranks_on_processors() {
    let place = workplace(1);
    for ranks in [1, 2, 4] {
        let base = format!("{LITTLE} --steps 3 --ranks {ranks} --oversubscribe");
        let [cpu, gpu] = ["cpu", "cuda"]
            .map(|device| place.train(&format!("{device}-{ranks}"), &format!("{base} --device {device}")));
        agree(DType::F32, &cpu, &gpu);
        let waits = place.lines(&format!("cuda-{ranks}")).iter().map(|line| line["host_waits"].as_u64()).max();
        assert_eq!(waits, Some(Some(1)), "the host waits once in a step");
    }
}

#[test]
fn attention_within_documents_follows_that_of_processors() {
    let place = workplace(15);
    place.write_notes("notes");
    let flags = TINY.replace("--data text", "--data notes");
    for (dtype, precision) in [(DType::F32, "f32"), (DType::Bf16, "bf16")] {
        let base = format!("{flags} {LITTLE} --steps 3 --ranks 2 --precision {precision}");
        let train = |out: &str, more: &str| {
            let out = format!("{out}-{precision}");
            place.run(&format!("train {base} --out {out} {more}")).succeeded();
            place.steps(&out)
        };
        let cpu = train("cpu", "--document-attention");
        agree(dtype, &cpu, &train("cuda", "--document-attention --device cuda"));
        assert_ne!(cpu[0].loss, train("whole", "")[0].loss);
    }
}

#[test]
fn ranks_that_nccl_connects_follow_ranks_on_processors() {
    let place = workplace(9);
    let base = format!("{LITTLE} --steps 3 --ranks 2");
    let cpu = place.train("cpu", &base);
    for (number, way) in ["", "--launch processes --prefetch 2", "--precision bf16", "--shard zero-1", "--shard zero-2"]
        .into_iter()
        .enumerate()
    {
        let expected = if way.starts_with("--launch") || way.is_empty() {
            cpu.clone()
        } else {
            place.train(&format!("cpu-{number}"), &format!("{base} {way}"))
        };
        let found = place.train(&format!("nccl-{number}"), &format!("{base} {way} --device cuda --gpu-transport nccl"));
        agree(if way.contains("bf16") { DType::Bf16 } else { DType::F32 }, &expected, &found);
        let waits = place.lines(&format!("nccl-{number}")).iter().map(|line| line["host_waits"].as_u64()).max();
        assert_eq!(waits, Some(Some(1)), "{way}: the host waits once in a step");
    }
}

#[test]
fn ranks_share_a_gpu_by_nccl_where_its_variable_lets_them() {
    let shared = [("NCCL_MULTI_RANK_GPU_ENABLE", "1")];
    let flags = "--steps 2 --ranks 2";
    let on_gpu = format!("{flags} --device cuda:0 --gpu-transport nccl");
    let place = workplace_with(13, &shared);
    let [cpu, gpu] =
        [("cpu", flags), ("gpu", &on_gpu)].map(|(out, flags)| place.train(out, &format!("{LITTLE} {flags}")));
    agree(DType::F32, &cpu, &gpu);
    // Older versions know no such variable.
    for variables in [&[][..], &[shared[0], ("PILLION_STANDIN_NCCL", "22907")]] {
        let refused = workplace_with(13, variables).run(&format!("train {TINY} {LITTLE} {on_gpu} --out out"));
        assert!(!refused.status.success() && refused.stderr.contains("have the same GPU"), "{refused}");
    }
}

#[test]
fn two_hosts_train_on_gpus_by_nccl() {
    let place = workplace(10);
    let cpu = place.train("cpu", &format!("{LITTLE} --steps 2 --ranks 2"));
    let address = Meeting::free_address().unwrap();
    let start = |host: usize| {
        let nodes = format!("--ranks 1 --nodes 2 --node-rank {host} --address {address} --device cuda");
        let mut command = place.command(&format!("train {TINY} {LITTLE} --steps 2 --out spanned {nodes}"));
        command.env("PILLION_HOST", format!("host{host}")).env("PILLION_STANDIN_HOST", host.to_string());
        command.env("TMPDIR", place.path("."));
        place.spawn(command)
    };
    let hosts = [start(0), start(1)];
    let [first, second] = hosts.map(|host| host.finish().succeeded());
    assert!(first.stdout.contains("NCCL 2.32.3 (registered memory) moves"), "{first}{second}");
    assert!(!first.stderr.contains("NVLS is on"), "{first}");
    agree(DType::F32, &cpu, &place.steps("spanned"));
}

#[test]
fn every_way_of_running_two_ranks_on_gpus_is_bitwise_equal() {
    for precision in ["f32", "bf16"] {
        let base = format!("{LITTLE} --steps 3 --ranks 2 --precision {precision} --device cuda");
        let expected = workplace(1).train("base", &base);
        assert_eq!(expected.len(), 3);
        for (seed, way) in [
            "",
            "--prefetch 0",
            "--prefetch 2",
            "--slots 4",
            "--no-overlap",
            "--bucket 300KB",
            "--bucket 1MiB --recompute block",
            "--device cuda:1",
            "--launch processes",
            "--launch processes --prefetch 2 --device cuda:0",
            "--shard zero-2",
        ]
        .into_iter()
        .enumerate()
        {
            let base = base.replace("--device cuda", if way.contains("--device") { "" } else { "--device cuda" });
            let found = workplace(2 + seed as u64).train("way", &format!("{base} {way}"));
            // Placements reduce as often with one micro-batch of each rank alone.
            if way != "--shard zero-2" {
                assert_eq!(expected, found, "{precision} {way}");
            } else {
                let dtype = if precision == "bf16" { DType::Bf16 } else { DType::F32 };
                agree(dtype, &expected, &found);
            }
        }
    }
}

#[test]
fn placements_and_grids_of_four_ranks_follow_those_on_processors() {
    let place = workplace(3);
    for (number, way) in
        ["--shard nothing", "--shard zero-1", "--shard zero-2 --mesh replicate=2,shard=2", "--mesh replicate=2,shard=2"]
            .into_iter()
            .enumerate()
    {
        let base = format!("{LITTLE} --steps 2 --ranks 4 --oversubscribe --gather copy {way}");
        let base =
            if way.contains("nothing") || way.contains("zero-1") { base.replace("--gather copy ", "") } else { base };
        let [cpu, gpu] = ["cpu", "cuda"]
            .map(|device| place.train(&format!("{device}-{number}"), &format!("{base} --device {device}")));
        agree(DType::F32, &cpu, &gpu);
    }
}

#[test]
fn a_run_goes_from_processors_to_gpus_and_back() {
    let place = workplace(4);
    let base = format!("{LITTLE} --ranks 2 --controller constant");
    let whole = place.train("whole", &format!("{base} --steps 4 --device cpu"));
    for (steps, device) in [(1, "cpu"), (3, "cuda"), (4, "cpu")] {
        let resume = if steps == 1 { "" } else { "--resume auto" };
        place.run(&format!("train {TINY} --out spread {base} --steps {steps} --device {device} {resume}")).succeeded();
    }
    agree(DType::F32, &whole, &place.steps("spread"));
}

/// What a rank's timeline says of operations of a kind: unit, start and end in microseconds.
fn spans(events: &[Value], rank: u64, kind: &str) -> Vec<(String, f64, f64)> {
    let is = |event: &&Value| {
        let name = event["name"].as_str().unwrap();
        event["ph"] == "X" && event["pid"] == rank && name.split(' ').next() == Some(kind)
    };
    let span = |event: &Value| {
        let [start, length] = ["ts", "dur"].map(|time| event[time].as_f64().unwrap());
        (event["args"]["unit"].as_str().unwrap_or("").to_owned(), start, start + length)
    };
    events.iter().filter(is).map(span).collect()
}

#[test]
fn a_timeline_has_the_times_of_the_streams() {
    for (seed, by) in [(11, "peer"), (12, "nccl")] {
        let place = workplace(seed);
        place.train("out", &format!("{LITTLE} --steps 2 --ranks 2 --trace --device cuda --gpu-transport {by}"));
        let trace = std::fs::read_to_string(place.path("out/trace.json")).unwrap();
        let trace: Value = serde_json::from_str(&trace).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        for rank in 0..2 {
            let [gathers, forwards, backwards, reduces, updates] =
                ["gather", "forward", "backward", "reduce", "update"].map(|kind| spans(events, rank, kind));
            assert_eq!(backwards.len(), reduces.len(), "{by}");
            assert_eq!(updates.len(), 2 * 4, "{by}: of two steps and four units: {updates:?}");
            // A microsecond for the rounding of times.
            for (unit, start, _) in &forwards {
                let is_there = |(of, _, end): &(String, f64, f64)| of == unit && *end <= start + 1.0;
                assert!(gathers.iter().any(is_there), "{by}: {unit} before {start}: {gathers:?}");
            }
            for ((unit, _, end), (of, start, _)) in backwards.iter().zip(&reduces) {
                assert!(unit == of && start + 1.0 >= *end, "{by}: {unit} ends at {end}, {of} begins at {start}");
            }
        }
        let exposed: Vec<f64> = place.lines("out").iter().map(|line| line["exposed_ms"].as_f64().unwrap()).collect();
        assert!(exposed.iter().all(|&time| time > 0.0), "{by}: {exposed:?}");
    }
}

#[test]
fn a_rank_that_dies_or_stops_is_named_by_the_others() {
    for (signal, named) in [(Signal::KILL, "lost rank 1 ("), (Signal::STOP, "rank 1")] {
        let place = workplace(7);
        let flags = "--steps 100000 --ranks 3 --oversubscribe --launch processes --device cuda --timeout 5";
        let running = place.start(&format!("train {TINY} {LITTLE} {flags} --validate-every 0 --out out"));
        let ranks = running.ranks(3);
        running.wait_for_step(&place, "out", 2);
        kill_process(ranks[1], signal).unwrap();
        let ended = running.finish();
        let of = |rank: usize| {
            let line = format!("pillion: rank {rank}: ");
            ended.stderr.lines().filter(move |said| said.starts_with(&line)).collect::<Vec<&str>>()
        };
        let [first, second] = [0, 2].map(of);
        // A rank that hears of a late one from another, which says it, says nothing.
        let is_said = if signal == Signal::KILL { [&first, &second].map(Vec::len) == [1, 1] } else { true };
        let mut all = first.iter().chain(&second).peekable();
        assert!(is_said && all.peek().is_some() && all.all(|line| line.contains(named)), "{ended}");
        ended.has_no_panic();
    }
}

#[test]
fn a_model_generates_the_same_text_and_doctor_names_the_gpus() {
    let place = workplace(6);
    place.train("out", &format!("{LITTLE} --steps 2 --ranks 1"));
    let [cpu, gpu] = ["cpu", "cuda:1"].map(|device| {
        let flags = "generate --checkpoint out --tokens 12 --temperature 0";
        place.run(&format!("{flags} --device {device}")).succeeded().stdout
    });
    assert_eq!(cpu, gpu);
    let doctor = place.run("doctor").succeeded().stdout;
    let named = ["GPU 0", "--device cuda:1", "NCCL", "2.32.3"];
    assert!(named.iter().all(|text| doctor.contains(text)), "{doctor}");
}

#[test]
fn without_a_gpu_a_run_says_so_in_one_line_and_ends_with_2() {
    let place = Workplace::new(PROGRAM);
    let mut command = place.command("train --data text --model tiny --device cuda --out out");
    command.env_remove("LD_LIBRARY_PATH");
    let ended = place.spawn(command).finish();
    assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
    assert!(ended.stderr.lines().count() == 1 && ended.stderr.contains("libcuda.so.1"), "{}", ended.stderr);
    assert!(!place.path("out").exists());
}

#[test]
fn a_variable_that_has_streams_wait_for_each_other_is_warned_of() {
    let place = workplace(8);
    for (value, is_warned) in [("1", true), ("8", false)] {
        let mut command = place
            .command(&format!("train {TINY} {LITTLE} --steps 1 --ranks 1 --device cuda --out connections-{value}"));
        command.env("CUDA_DEVICE_MAX_CONNECTIONS", value);
        let ended = place.spawn(command).finish().succeeded();
        assert_eq!(ended.stderr.contains("CUDA_DEVICE_MAX_CONNECTIONS is 1"), is_warned, "{ended}");
    }
}

#[test]
fn what_gpus_do_not_have_is_refused_before_a_run_starts() {
    let place = workplace(5);
    for (flags, named) in [
        ("--gather window", "--gather window"),
        ("--profile", "--profile"),
        ("--device cuda:99", "no GPU 99"),
        ("--device cuda:x", "cuda:x"),
    ] {
        let device = if flags.contains("--device") { "" } else { "--device cuda" };
        let ended = place.run(&format!("train --data text --model tiny --out out {device} {flags}"));
        assert_eq!(ended.status.code(), Some(2), "{flags}: {}", ended.stderr);
        assert!(ended.stderr.contains(named), "{flags}: {}", ended.stderr);
    }
    let ended = place.run("train --data text --model tiny --out out --gpu-transport nccl");
    assert!(ended.status.code() == Some(2) && ended.stderr.contains("give --device cuda"), "{ended}");
    let mut command = place.command("train --data text --model tiny --out out --device cuda");
    command.env("PILLION_ATTENTION", "fast");
    let ended = place.spawn(command).finish();
    assert_eq!(ended.status.code(), Some(2), "{ended}");
    assert!(ended.stderr.contains("PILLION_ATTENTION is \"fast\""), "{ended}");
    assert!(!place.path("out").exists());
}
