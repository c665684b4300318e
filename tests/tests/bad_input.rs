//! Whatever a user gets wrong: an exit code that is not 0, one line that names the thing and the remedy, and nothing broken behind.

use std::fs;
use std::process::Command;

use pillion_tests::program::{Ended, TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Runs `train` on two ranks with each list of flags, and checks for exit code `code` and one line with each of the words.
#[track_caller]
fn refused(place: &Workplace, code: i32, cases: &[(&str, &[&str])]) {
    for (flags, parts) in cases {
        for launch in ["processes", "threads"] {
            // Data that is given twice is a mixture.
            let tiny = if flags.contains("--data") { TINY.replace("--data text", "") } else { TINY.to_owned() };
            let ended = place.run(&format!("train {tiny} --ranks 2 --steps 2 --out out --launch {launch} {flags}"));
            ended.refused(code, parts);
            // Besides the message there may be only clap's hint at --help.
            let lines = ended.stderr.lines().filter(|line| line.starts_with("pillion:") || line.starts_with("error:"));
            assert_eq!(lines.count(), 1, "{flags}: {ended}");
            assert!(place.checkpoints("out").is_empty(), "{flags}: {ended}");
        }
    }
}

#[test]
fn data_that_cannot_be_trained_on() {
    let place = Workplace::new(PROGRAM);
    fs::create_dir(place.path("empty-folder")).unwrap();
    fs::write(place.path("empty-file"), "").unwrap();
    fs::write(place.path("short"), "hello, world").unwrap();
    // 95 % of 3000 bytes to learn from, 150 to validate on: four windows of 32, none of 200.
    fs::write(place.path("small"), "fn f() {}\n".repeat(300)).unwrap();
    fs::write(place.path("binary"), [0xff, 0xfe, 0x00]).unwrap();
    refused(
        &place,
        1,
        &[
            ("--data nowhere", &["--data nowhere", "no such file", "check the path"]),
            ("--data empty-folder", &["--data empty-folder", "no text in it", "give a file or folder"]),
            ("--data empty-file", &["--data empty-file", "1 empty", "give a file or folder"]),
            ("--data short", &["13 tokens", "a sequence of 32 needs 33", "--data PATH or a shorter sequence"]),
            ("--data small --seq 200", &["validation", "151 tokens", "a sequence of 200 needs 201"]),
            ("--data binary", &["--data ", "binary: ", "not UTF-8", "convert it"]),
        ],
    );
    refused(
        &place,
        2,
        &[(
            "--data small --micro-batch 8",
            &["validation needs at least one micro-batch of 8", "4 there are", "smaller --micro-batch"],
        )],
    );
}

#[test]
fn data_that_is_a_stream_is_refused_for_what_it_is() {
    let place = Workplace::new(PROGRAM);
    let launches = ["--ranks 1", "--ranks 2", "--ranks 2 --launch threads"];
    for launch in launches {
        // What bash makes of `--data <(cat text)`: a pipe that the program inherits.
        for (shell, path) in [
            ("exec \"$@\" --data <(cat text/*)", "--data /dev/fd/"),
            ("cat text/* | exec \"$@\" --data /dev/stdin", "--data /dev/stdin"),
            ("cat text/* | exec \"$@\" --data -", "--data -: stdin is not read"),
        ] {
            let mut command = Command::new("bash");
            place.prepare(&mut command);
            command.args(["-c", shell, "bash"]).arg(place.program());
            command.args(
                format!("train {TINY} --steps 1 --out out {launch}").replace("--data text", "").split_whitespace(),
            );
            place.spawn(command).finish().refused(1, &[path, "cannot be read twice", "write the text to a file first"]);
        }
    }
    // A file whose name is a dash is a file.
    fs::copy(place.path("text/module_000.rs"), place.path("-")).unwrap();
    let tiny = TINY.replace("--data text", "");
    let named = format!("train {tiny} --ranks 1 --steps 1 --out out --data -");
    place.run(&named).succeeded();
}

#[test]
fn without_cargos_sources_the_default_data_names_the_flag() {
    let place = Workplace::new(PROGRAM);
    let mut command = place.command("train --ranks 2 --out out");
    command.env("CARGO_HOME", place.path("nowhere"));
    place.spawn(command).finish().refused(1, &["nowhere", "cargo fetch", "--data PATH"]);
}

#[test]
fn models_and_numbers_that_cannot_be() {
    let place = Workplace::new(PROGRAM);
    refused(
        &place,
        2,
        &[
            ("--heads 3", &["num_attention_heads = 3", "hidden_size = 64", "choose"]),
            ("--kv-heads 3", &["num_key_value_heads = 3", "num_attention_heads = 4"]),
            ("--hidden-size 20", &["heads are 5 wide", "even"]),
            ("--layers 0", &["num_hidden_layers is 0", "at least 1"]),
            ("--batch 7", &["--batch 7", "--micro-batch 2", "try 6 or 8"]),
            ("--batch 12", &["--batch 12", "--round-to 8", "try 8 or 16"]),
            ("--batch 0", &["--batch 0", "try 2"]),
            ("--round-to 3", &["--round-to 3", "--micro-batch 2", "try 2 or 4"]),
            ("--round-to 0", &["--round-to 0"]),
            ("--max-batch 12", &["--max-batch 12", "--round-to 8", "try 8 or 16"]),
            ("--batch 16 --max-batch 8", &["--max-batch 8 is below --batch 16", "raise it"]),
            ("--batch 18446744073709551608", &["--batch 18446744073709551608", "at most"]),
            ("--max-batch 9007199254740992", &["--max-batch 9007199254740992", "at most"]),
            ("--seq 4294967296", &["--seq 4294967296", "at most"]),
            ("--layers 1000000000000", &["num_hidden_layers is 1000000000000", "at most"]),
            ("--prefetch 18446744073709551615", &["--prefetch must be below"]),
            ("--micro-batch 0", &["--micro-batch is 0", "at least 1"]),
            ("--seq 0", &["--seq is 0", "at least 1"]),
            ("--samples 0", &["--samples is 0", "at least 1"]),
            ("--samples 7", &["--samples 7", "--micro-batch 2", "try 6 or 8"]),
            ("--validation-samples 0", &["--validation-samples is 0", "at least 1"]),
            ("--timeout 0", &["--timeout is 0", "at least 1"]),
            ("--eta 0", &["--eta: 0", "from 1e-6"]),
            ("--eta 1e-300", &["--eta: 0.000", "from 1e-6"]),
            ("--eta -1", &["--eta: -1", "from 1e-6"]),
            ("--eta nan", &["--eta: NaN", "from 1e-6"]),
            ("--eta 1", &["--eta: 1", "below 1", "at most b/eta² samples", "variant debiased"]),
            ("--lr nan", &["--lr NaN", "out of range"]),
            ("--lr inf", &["--lr inf", "out of range"]),
            ("--lr -0.1", &["--lr -0.1", "between 0 and"]),
            ("--clip nan", &["--clip NaN", "out of range"]),
            ("--clip -1", &["--clip -1", "out of range"]),
            ("--warmup 1", &["--warmup 1", "below 1"]),
            ("--warmup nan", &["--warmup NaN", "below 1"]),
            ("--final-lr 2", &["--final-lr 2", "between 0 and 1"]),
            ("--weight-decay -1", &["--weight-decay -1", "out of range"]),
            ("--prefetch 2 --slots 2", &["--slots 2", "--prefetch 2", "at least --slots 3"]),
            ("--controller stagewise", &["--controller stagewise needs --stages", "such as"]),
            (
                "--controller stagewise --stages 16:0.5,8:0.5",
                &["--stages: 8", "the stage before", "let batches shrink"],
            ),
            ("--stages 8:1", &["--stages needs --controller stagewise"]),
            ("--controller stagewise --stages 8:0.5", &["--stages: 1 stages with shares of sum 0.5", "sum 1"]),
            ("--controller stagewise --stages 8", &["--stages", "8", "batch:share"]),
            ("--controller linear-ramp", &["--controller linear-ramp needs --ramp", "such as"]),
            ("--controller linear-ramp --ramp 64:0", &["--ramp ends after 0", "above 0"]),
            ("--controller linear-ramp --ramp 9:0.5", &["--ramp: 9", "multiple of 8"]),
            ("--controller linear-ramp --ramp 64", &["--ramp", "batch:share"]),
            ("--ramp 64:0.5", &["--ramp needs --controller linear-ramp"]),
            ("--controller noise-scale --ratio 0", &["--ratio: 0", "from 1e-6"]),
            ("--ratio 1", &["--ratio needs --controller noise-scale"]),
            ("--controller noise-scale --eta 0.5", &["--eta needs --controller norm-test"]),
            ("--controller constant --patience 2", &["--patience needs --controller norm-test or noise-scale"]),
            (
                "--cooldown 0.3",
                &["--cooldown 0.3", "not read with --schedule cosine", "leave it out, or give --schedule wsd"],
            ),
            (
                "--schedule constant --final-lr 0.2",
                &["--final-lr 0.2", "not read with --schedule constant", "leave it out"],
            ),
            ("--non-finite-limit 3", &["--non-finite-limit 3", "not read with --on-non-finite stop", "leave it out"]),
            ("--shard zero-1 --gather window", &["--gather window", "--shard optimizer", "leave --gather out"]),
            (
                "--shard nothing --mesh replicate=1,shard=2",
                &["--mesh replicate=1,shard=2", "--shard nothing", "leave --mesh out"],
            ),
            ("--gpu-transport nccl", &["--gpu-transport", "give --device cuda, or leave it out"]),
            ("--variant printed", &["--variant", "printed"]),
            ("--ema 1", &["--ema: 1", "below 1"]),
            ("--patience 0", &["--patience: 0", "at least 1"]),
            ("--growth-limit 1", &["--growth-limit: 1", "above 1"]),
            ("--test-interval 0", &["--test-interval: 0", "at least 1"]),
            ("--controller constant --shrink", &["--shrink needs --controller norm-test, noise-scale or stagewise"]),
            ("--alignment 0", &["--alignment", "eta of 0", "above 0"]),
            ("--alignment 0.5 --shard nothing", &["--alignment 0.5", "shard at least the optimizer"]),
            ("--lr-coupling cube", &["--lr-coupling", "cube"]),
            ("--model huge", &["--model", "huge", "tiny, small"]),
            ("--steps few", &["--steps", "few"]),
            ("--controler constant", &["--controler"]),
        ],
    );
    refused(
        &place,
        2,
        &[("--ranks 0", &["0 ranks", "at least 1"]), ("--ranks 100000", &["100000 ranks", "at most", "ask for fewer"])],
    );
    refused(
        &place,
        2,
        &[("--threads 0", &["--threads is 0"]), ("--threads 100000", &["--threads 100000", "processors"])],
    );
    assert!(!place.path("out").exists(), "nothing was begun");
}

/// Runs `train` as two ranks by hand, as torchrun's variables say it.
fn by_hand(place: &Workplace, flags: &str) -> [Ended; 2] {
    let ranks = [0, 1].map(|rank: usize| {
        let mut command = place.command(&format!("train {TINY} --steps 1 --out out {flags}"));
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)] {
            command.env(name, value.to_string());
        }
        let port = 20_000 + std::process::id() % 10_000;
        command.env("MASTER_ADDR", flags.replace(' ', "_")).env("MASTER_PORT", port.to_string());
        place.spawn(command)
    });
    ranks.map(|rank| rank.finish())
}

#[test]
fn a_setting_that_is_wrong_for_all_ranks_is_said_once_whoever_starts_them() {
    let place = Workplace::new(PROGRAM);
    let mut cases: Vec<(&str, &[&str])> = vec![
        ("--reduce-groups 3", &["3 groups of reduction do not divide", "choose a divisor"]),
        ("--micro-batch 0", &["--micro-batch is 0", "at least 1"]),
        ("--threads 100000", &["--threads 100000", "processors"]),
    ];
    if cfg!(not(feature = "mpi")) {
        cases.push(("--backend mpi", &["this build has no MPI", "build with `--features mpi`"]));
        cases
            .push(("--backend hierarchical --wire mpi", &["this build has no MPI", "choose another backend and wire"]));
    }
    refused(&place, 2, &cases);
    cases.push(("--micro-bach 8", &["--micro-bach", "--micro-batch"]));
    cases.push(("--steps few", &["--steps", "few"]));
    for (flags, parts) in cases {
        let ended = by_hand(&place, flags);
        let said =
            |ended: &Ended| ended.stderr.lines().any(|line| line.contains("pillion:") || line.contains("error:"));
        assert_eq!(ended.iter().filter(|ended| said(ended)).count(), 1, "{flags}: {}{}", ended[0], ended[1]);
        assert_eq!(ended.each_ref().map(Ended::code), [Some(2); 2], "{flags}: {}{}", ended[0], ended[1]);
        assert!(parts.iter().all(|part| ended[0].stderr.contains(part)), "{flags}: {}{}", ended[0], ended[1]);
    }
    assert!(!place.path("out").exists(), "nothing was begun");
}

#[test]
fn the_timeout_counts_for_ranks_that_never_come() {
    let place = Workplace::new(PROGRAM);
    let mut command = place.command(&format!("train {TINY} --steps 1 --out out --timeout 2"));
    command.envs([("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3")]);
    // The job's name: no other process's.
    command.env("MASTER_ADDR", format!("timeout-{}", std::process::id())).env("MASTER_PORT", "29500");
    // Anything else has limits longer than a test's patience.
    place.spawn(command).finish().refused(1, &["ranks [1, 2] did not come"]);
}

#[test]
fn a_model_that_does_not_fit_the_memory() {
    let place = Workplace::new(PROGRAM);
    // 70 billion parameters: over a terabyte of f32 weights, gradients and moments.
    refused(
        &place,
        2,
        &[
            (
                "--model llama2-70b",
                &["of memory", "2.00 MiB of it for checkpoints", "allows", "--recompute block, or a smaller --model"],
            ),
            ("--model llama2-70b --save-every 5", &["of it for checkpoints", "allows", "or --save-memory 1MiB"]),
            // A remedy that was taken is not named again.
            ("--model llama2-70b --recompute block", &["of memory", "choose a smaller --model"]),
            ("--model llama2-70b --auto", &["--auto found no setting", "of memory", "a smaller --model"]),
            ("--auto --prefetch 2", &["--auto", "cannot be used with", "--prefetch"]),
            ("--bucket 0", &["--bucket", "64MiB"]),
        ],
    );
    assert!(!place.path("out").exists(), "nothing was begun");
}

#[test]
fn folders_that_cannot_be_written() {
    let place = Workplace::new(PROGRAM);
    fs::write(place.path("file"), "").unwrap();
    refused(
        &place,
        1,
        &[
            ("--out file/below", &["file/below", "Not a directory", "--out DIR"]),
            ("--out file", &["file", "is not a folder", "--out DIR"]),
            ("--out /proc/pillion", &["/proc/pillion", "--out DIR"]),
        ],
    );
    assert_eq!(fs::read(place.path("file")).unwrap(), b"");
}

#[test]
fn checkpoints_that_are_none() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    let checkpoint = place.path("run/checkpoints/step-00000001");
    let copy = |name: &str| {
        fs::create_dir(place.path(name)).unwrap();
        for file in fs::read_dir(&checkpoint).unwrap().flatten() {
            fs::copy(file.path(), place.path(name).join(file.file_name())).unwrap();
        }
    };
    let shard = "rank-00000-of-00001.safetensors";
    copy("cut-short");
    let bytes = fs::read(checkpoint.join(shard)).unwrap();
    fs::write(place.path("cut-short").join(shard), &bytes[..bytes.len() - 1]).unwrap();
    copy("lacking");
    fs::remove_file(place.path("lacking").join(shard)).unwrap();
    copy("edited");
    let manifest = fs::read_to_string(checkpoint.join("manifest.json")).unwrap();
    fs::write(place.path("edited/manifest.json"), manifest.replace("\"step\": 1", "\"step\": 2")).unwrap();
    fs::create_dir(place.path("empty")).unwrap();
    refused(
        &place,
        1,
        &[
            ("--resume nowhere", &["nowhere", "no whole checkpoint", "give the folder"]),
            ("--resume empty", &["empty", "no whole checkpoint", "give the folder"]),
            ("--resume cut-short", &["cut-short", shard, "bytes instead of", "older checkpoint"]),
            ("--resume lacking", &["lacking", shard]),
            ("--resume edited", &["edited/manifest.json", "is damaged, or was edited", "older checkpoint"]),
        ],
    );
    let other = "--resume run/checkpoints/step-00000001 --hidden-size 128";
    refused(&place, 2, &[(other, &["step-00000001", "hidden_size = 64", "128", "--resume"])]);
    let begun = ["metrics.jsonl", "checkpoints"].map(|name| place.path("out").join(name).exists());
    assert_eq!(begun, [false; 2], "nothing was begun");
}

#[test]
fn settings_that_nothing_reads() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    let tiny = TINY.replace("--model tiny ", "");
    let from = format!("train {tiny} --ranks 1 --steps 1 --from run --out tuned");
    place.run(&format!("{from} --init-std 0.02")).refused(2, &["--init-std 0.02", "not read with --from", "leave out"]);
    assert!(!place.path("tuned").exists(), "nothing was begun");
    // A default may be given, because `pillion config show` gives all of them.
    let defaults = "--cooldown 0.2 --schedule constant --final-lr 0.1 --non-finite-limit 8 --gpu-transport auto";
    place.train("defaults", &format!("--ranks 1 --steps 1 {defaults}"));
    // What a run began with is not given again when it goes on.
    place.train("linear", "--ranks 1 --steps 1 --schedule wsd --cooldown 0.3 --final-lr 0.5");
    let changed = "--resume auto --change schedule --schedule constant --steps 2";
    place.run(&format!("train --out linear --ranks 1 {changed}")).succeeded();
}

#[test]
fn configuration_files_that_are_wrong() {
    let place = Workplace::new(PROGRAM);
    for (name, text) in [
        ("key.toml", "micro_batch = 2"),
        ("value.toml", "lr = \"fast\""),
        ("kind.toml", "lr = true"),
        ("number.toml", "lr = nan"),
        ("syntax.toml", "lr = "),
        ("nested.toml", "[train]\nlr = 0.1"),
        ("list.toml", "seq = 32\nlr = [0.1, 0.2]"),
        ("switch.toml", "profile = \"yes\""),
    ] {
        fs::write(place.path(name), text).unwrap();
    }
    let case = |name: &str| format!("train {TINY} --ranks 2 --out out --config {name}");
    for (name, parts) in [
        ("key.toml", &["key.toml, line 1", "no setting `micro_batch`", "nearest is `micro-batch`"][..]),
        ("value.toml", &["value.toml, line 1", "'fast'", "--lr"]),
        ("list.toml", &["list.toml, line 2", "`lr` is a list of 2 values", "give one"]),
        ("switch.toml", &["switch.toml, line 1", "`profile` is on or off", "profile = true"]),
        ("syntax.toml", &["syntax.toml, line 1"]),
        ("kind.toml", &["kind.toml", "`lr` is a boolean"]),
        ("number.toml", &["--lr NaN", "out of range"]),
        ("nested.toml", &["nested.toml", "no setting `train`"]),
        ("nowhere.toml", &["nowhere.toml: No such file", "give a file of settings"]),
    ] {
        place.run(&case(name)).refused(2, parts);
    }
    fs::write(place.path("good.toml"), "steps = 1\nlr = 0.001\nranks = 1").unwrap();
    place.run(&format!("{} --lr 0.002", case("good.toml"))).succeeded();
    assert_eq!(place.steps("out").len(), 1);
}

#[test]
fn generate_and_plan_refuse_in_the_same_way() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 2 --steps 1");
    for (arguments, code, parts) in [
        ("generate --checkpoint nowhere", 1, &["nowhere", "no whole checkpoint"][..]),
        ("generate --checkpoint run --temperature nan", 2, &["--temperature NaN"]),
        ("generate --checkpoint run --temperature=-1", 2, &["--temperature -1"]),
        ("generate --checkpoint run --prompt=", 2, &["--prompt is empty"]),
        ("plan --ranks 0", 2, &["--ranks 0", "at least 1"]),
        ("plan --heads 3", 2, &["num_attention_heads = 3"]),
        ("plan --batch 7", 2, &["--batch 7", "--micro-batch"]),
        ("plan --prefetch 3 --slots 1", 2, &["--slots 1", "--prefetch 3"]),
        ("plan --no-overlap", 2, &["--no-overlap", "leave it out"]),
        ("plan --mesh replicate=2,shard=2 --ranks 2", 2, &["a grid of 4 ranks", "there are 2"]),
        ("plan --mesh shard=2", 2, &["replicate=2,shard=4"]),
        ("plan --shard weights", 2, &["cannot be sharded", "zero-3"]),
        ("plan --shard parameters", 2, &["not the optimizer"]),
        ("plan --shard zero-1 --gather window", 2, &["--gather window", "leave --gather out"]),
        ("train --keep 0", 2, &["--keep"]),
        ("plan --rounds 0", 2, &["--rounds 0", "at least 1"]),
        ("plan --link 50GB/s", 2, &["--link", "--flops, --calibrate or --device"]),
        ("plan --timeline step.json", 2, &["--timeline", "--flops, --calibrate or --device"]),
        ("plan --flops 1T --link 1GB/s --contention 1", 2, &["--contention 1", "from 0 to 0.99"]),
        ("plan --flops 1T --link 1GB/s --contention nan", 2, &["--contention NaN", "from 0 to 0.99"]),
        ("plan --flops 1T --link 1GB/s --calibrate 1 --contention 0.5", 2, &["leave out one"]),
        (
            "plan --flops 1T --link 1GB/s --calibrate 1e12",
            2,
            &["--calibrate 1000000000000", "check that they are those"],
        ),
        ("plan --link 50 --flops 1T", 2, &["--link", "a unit is missing", "400Gbit/s"]),
        ("plan --flops 1T", 2, &["--link", "--ranks-per-host"]),
        ("plan --flops 1T --ranks-per-host 2", 2, &["--host-link"]),
        ("plan --flops 1T --ranks 6 --ranks-per-host 4 --link 1GB/s --host-link 1GB/s", 2, &["evenly on hosts of 4"]),
        ("plan --calibrate 1e15 --link 1GB/s", 2, &["--calibrate 1000000000000000", "however fast"]),
        ("plan --calibrate nan --link 1GB/s", 2, &["--calibrate NaN", "above 0"]),
        ("plan --flops 1T --link 1GB/s --timeline nowhere/step.json", 1, &["nowhere/step.json"]),
    ] {
        place.run(arguments).refused(code, parts);
    }
    let text =
        |seed: u64| place.run(&format!("generate --checkpoint run --tokens 20 --seed {seed}")).succeeded().stdout;
    assert_eq!(text(1), text(1));
    place.run("generate --checkpoint run/checkpoints/step-00000001 --tokens 1").succeeded();
    place.run("plan --model llama2-70b --ranks 512").succeeded();
}
