//! Runs every command in README.md and the book as the document states it. A command without a row
//! in the table below fails the test, so each author of a command chooses how it is tested.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use pillion_tests::documents::{commands, root};
use pillion_tests::program::{Ended, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const COLLBENCH: &str = env!("CARGO_BIN_EXE_collbench-under-test");

/// How a command is tested.
enum How {
    /// It runs, and ends with 0.
    AsItStands,
    /// It runs with these words behind it, because it would take too long without.
    With(&'static str),
    /// Letters stand for values of the reader's: it runs with these in their places.
    For(&'static [(&'static str, &'static str)]),
    /// The test only parses the arguments of our program, because the command needs hosts, a
    /// cluster or another launcher.
    Parsed,
    /// A script has this line, because the command builds, or takes long.
    In(&'static str, &'static str),
}
use How::{AsItStands, For, In, Parsed, With};

/// The shortest run on the default text. `ci/run` makes one of the default model.
const SHORT_DEFAULT: &str = "--model tiny --steps 1 --validation-samples 16";
/// The shortest on the text of the tests, which is not tokenized for seconds.
const SHORT: &str = "--model tiny --steps 1 --validation-samples 16 --data text";
const SHORT_RUN: &str = "--only 3.3M/constant-16-seed-1 --samples 64 --validation-samples 16 --data text";
const SHORT_SIZES: &str = "-b 1K -e 1K -n 2 -w 1";

/// Every command, in the order in which the tests run them. Later commands read what earlier ones
/// have written.
const TABLE: &[(&str, How)] = &[
    ("cargo run --release -- train", With(SHORT_DEFAULT)),
    ("cargo run --release -- generate --prompt \"impl \"", AsItStands),
    ("pillion checkpoint show", AsItStands),
    ("pillion checkpoint verify", AsItStands),
    ("pillion data verify", AsItStands),
    ("pillion train --help", AsItStands),
    // tests/tokenize.rs and tests/huggingface.rs have tokenizers and models.
    ("pillion tokenize --tokenizer llama/tokenizer.json documents/ --out tokens", Parsed),
    ("pillion tokenize", Parsed),
    ("pillion data show", Parsed),
    ("pillion import", Parsed),
    ("pillion export", Parsed),
    ("pillion generate", Parsed),
    ("pillion eval", Parsed),
    ("pillion top", Parsed),
    ("pillion report", Parsed),
    ("pillion data show tokens", Parsed),
    ("pillion data verify tokens", Parsed),
    ("pillion train --data web:0.75 --data books:0.25", Parsed),
    ("pillion import Llama-3.2-1B --out runs/imported", Parsed),
    ("pillion train --from runs/imported --data tokens --lr 1e-5 --out runs/tuned", Parsed),
    ("pillion export --checkpoint runs/tuned --to tuned", Parsed),
    ("pillion eval --checkpoint runs/tuned --data tokens", Parsed),
    ("pillion train --config run.toml", Parsed),
    // tests/validation.rs has sets.
    ("pillion train --data tokens --validation-data code=held/code --validation-data held/books", Parsed),
    ("pillion train --dry-run", With(SHORT_DEFAULT)),
    ("pillion train --unit-noise", With(SHORT)),
    ("pillion config show", AsItStands),
    ("pillion config show > my.toml", AsItStands),
    ("pillion config check my.toml", AsItStands),
    ("pillion config check", Parsed),
    // tests/config.rs compares its run with one without a file.
    ("pillion train --config my.toml", Parsed),
    ("pillion completions bash > pillion.bash", AsItStands),
    ("pillion man --out share/man/man1", AsItStands),
    (
        "pillion train --data tokens --document-attention",
        For(&[("tokens", "text --model tiny --steps 1 --validation-samples 16")]),
    ),
    ("pillion train --tensorboard", With(SHORT)),
    ("pillion train --log json", With(SHORT)),
    ("pillion top runs/train --once", AsItStands),
    ("pillion report runs/train --out report.html", AsItStands),
    ("pillion report runs/train --tensorboard events", AsItStands),
    ("pillion train --ranks 4", With(SHORT)),
    ("pillion train --ranks 4 --launch threads", With(SHORT)),
    ("pillion train --resume auto", With("--steps 2")),
    ("pillion train --resume auto --change samples --samples 10240", With("--steps 3")),
    ("pillion train --resume auto --change lr,warmup --lr 0.001 --warmup 0.05", With("--steps 4")),
    (
        "pillion train --resume runs/train/checkpoints/step-00000100",
        For(&[("step-00000100", "step-00000003 --steps 4")]),
    ),
    ("mpirun -n 4 target/release/pillion train", With(SHORT)),
    ("mpirun -n 4 --host one:2,two:2 target/release/pillion train", Parsed),
    ("torchrun --nproc-per-node 4 --no-python target/release/pillion train", Parsed),
    ("srun -n 4 target/release/pillion train", Parsed),
    ("flux run -N 1 -n 4 target/release/pillion train", Parsed),
    ("mpiexec -n 4 target/release/pillion train", Parsed),
    ("mpirun_rsh -np 4 target/release/pillion train", Parsed),
    ("jsrun -n 4 target/release/pillion train", Parsed),
    (
        "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 2 --master-addr one --master-port 29500 --no-python target/release/pillion train",
        Parsed,
    ),
    ("pillion train --ranks 2 --nodes 2 --node-rank 0 --address one:29400", Parsed),
    ("srun -N 2 -n 4 target/release/pillion train", Parsed),
    ("mpirun -n 4 --host one:2,two:2 -x PILLION_ADDRESS=one:29400 target/release/pillion train", Parsed),
    // tests/over_tcp.rs has several hosts.
    (
        "pillion train --ranks 4 --nodes 2 --node-rank \"$JOB_COMPLETION_INDEX\" --address train-0.train:29400 --resume auto",
        For(&[("\"$JOB_COMPLETION_INDEX\"", "0"), ("auto", "auto --help")]),
    ),
    (
        "RANK=\"$JOB_COMPLETION_INDEX\" WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=train-0.train \
         MASTER_PORT=29400 pillion train --resume auto",
        Parsed,
    ),
    ("mpirun -n 4 --map-by numa --bind-to numa target/release/pillion train --threads 8", Parsed),
    ("srun -N 2 -n 8 --cpus-per-task 8 --cpu-bind=cores target/release/pillion train --threads 8", Parsed),
    ("numactl --cpunodebind=0 --membind=0 pillion train --ranks 4", Parsed),
    ("pillion train --auto", With(SHORT)),
    // tests/gpus.rs runs it where there are GPUs, or what stands for them.
    ("pillion train --device cuda", Parsed),
    ("pillion doctor", AsItStands),
    ("pillion plan", AsItStands),
    ("pillion plan --operations | head", AsItStands),
    ("cargo run --release -- plan --model llama2-7b --ranks 64", AsItStands),
    (
        "pillion plan --model llama2-7b --seq 4096 --micro-batch 1 --precision bf16 --gather copy --world 512 --link 50GB/s --latency 5us --flops 400T",
        AsItStands,
    ),
    (
        "pillion plan --model llama2-7b --seq 4096 --micro-batch 1 --precision bf16 --gather copy --world 512 --link 50GB/s --flops 400T \
         --ranks-per-host 8 --host-link 450GB/s --timeline step.json",
        AsItStands,
    ),
    (
        "pillion plan --model llama3.1-8b --seq 8192 --micro-batch 2 --precision bf16 --gather copy --world 8 --ranks-per-host 8 --host-link 450GB/s \
         --memory-bandwidth 2.4TB/s --calibrate 5762",
        AsItStands,
    ),
    (
        "pillion plan --model llama3.1-8b --seq 4096 --micro-batch 2 --precision bf16 --gather copy --world 8 --device h100",
        AsItStands,
    ),
    ("pillion plan --model small --ranks 2 --link 125MB/s --flops 69G --calibrate 2400 --json", AsItStands),
    ("pillion abs simulate", AsItStands),
    (
        "pillion abs simulate --noise-scale B --batch b --groups K",
        For(&[(" B ", " 1024 "), (" b ", " 64 "), (" K", " 4")]),
    ),
    ("pillion abs replay runs/train/metrics.jsonl --eta 0.7", AsItStands),
    ("pillion experiment paper --quick", With(SHORT_RUN)),
    ("pillion experiment paper", With(SHORT_RUN)),
    ("cargo run --release -- experiment paper", With(SHORT_RUN)),
    ("collbench --help", AsItStands),
    ("target/release/collbench reduce-scatter -b 1K -e 32M --check", AsItStands),
    (
        "mpirun -n 4 --oversubscribe --bind-to none target/release/collbench all --in-place --check --json results.json",
        With(SHORT_SIZES),
    ),
    ("cargo test --workspace", In("ci/run", "cargo test --workspace")),
    ("cargo build --release", In("ci/long", "cargo build --release")),
    ("cargo doc --open -p pillion-runtime", In("ci/run", "cargo doc --quiet --workspace --no-deps")),
    ("cargo build --release -p pillion-c", In("ci/long", "cargo build --release -p pillion-c")),
    (
        "cc -O2 -I bindings/c bindings/c/examples/zero1.c -L target/release -lpillion -lm -o zero1",
        In(
            "ci/long",
            "cc -O2 -I bindings/c bindings/c/examples/zero1.c -L target/release -lpillion -lm -o \"$out/zero1\"",
        ),
    ),
    (
        "LD_LIBRARY_PATH=target/release mpirun -n 2 ./zero1",
        In("ci/long", "LD_LIBRARY_PATH=target/release mpirun -n 2 \"$out/zero1\""),
    ),
    (
        "pip wheel --no-deps --wheel-dir wheels bindings/python",
        In("ci/python", "pip wheel --no-deps --wheel-dir \"$wheels\" bindings/python"),
    ),
    ("pip install wheels/pillion-*.whl", In("ci/python", "pip install --force-reinstall --no-deps \"${wheel[0]}\"")),
    (
        "torchrun --standalone --nproc-per-node 2 bindings/python/examples/ddp.py",
        In("ci/python", "run 2 ../examples/ddp.py --steps 100"),
    ),
    (
        "torchrun --standalone --nproc-per-node 2 bindings/python/examples/fsdp_norm_test.py",
        In("ci/python", "run 2 ../examples/fsdp_norm_test.py --samples 600"),
    ),
    (
        "export CPATH=$(python -c 'import pillion; print(pillion.__path__[0])')",
        In("ci/python", "export CPATH=$(\"$python\" -c 'import pillion; print(pillion.__path__[0])')"),
    ),
    (
        "export LIBRARY_PATH=$CPATH LD_LIBRARY_PATH=$CPATH",
        In("ci/python", "export LIBRARY_PATH=$CPATH LD_LIBRARY_PATH=$CPATH"),
    ),
    (
        "cc bindings/c/examples/mean.c -lpillion && ./a.out",
        In("ci/python", "cc ../../c/examples/mean.c -lpillion -o \"$program\" && \"$program\""),
    ),
    ("ci/long fuzz", In("ci/long", "fuzz) fuzz \"${@:2}\" ;;")),
    ("ci/long many", In("ci/long", "many) many \"${@:2}\" ;;")),
    (LONG[0], In("ci/long", LONG[0])),
    (LONG[1], In("ci/long", LONG[1])),
    (LONG[2], In("ci/long", LONG[2])),
    (LONG[3], In("ci/long", LONG[3])),
    (LONG[4], In("ci/long", LONG[4])),
    (LONG[5], In("ci/long", LONG[5])),
    (LONG[6], In("ci/long", LONG[6])),
    (LONG[7], In("ci/long", LONG[7])),
    (LONG[8], In("ci/long", LONG[8])),
    (LONG[9], In("ci/long", LONG[9])),
];

/// What builds for minutes, or compares with other programs for hours.
const LONG: [&str; 10] = [
    "cargo build --release --features mpi",
    "cargo run --release -p pillion-runtime --example mlp -- --ranks 2",
    "mpirun -n 2 target/release/examples/mlp",
    "cargo build --release -p pillion-benches",
    "cargo build --release -p pillion-benches --features mpi",
    "mpirun -n 2 --bind-to none target/release/collbench all --check --compare mpi",
    "benches/peers/setup && benches/peers/compare",
    "benches/peers/train",
    "benches/peers/kernels",
    "cargo bench -p pillion-benches --bench kernels",
];

#[test]
fn every_documented_command_has_a_test() {
    let documented = commands();
    assert!(documented.len() > 30, "{documented:?}");
    let unknown = documented.iter().filter(|found| !TABLE.iter().any(|(command, _)| *command == found.command));
    let unknown: Vec<_> = unknown.map(|found| format!("{}: `{}`", found.document.display(), found.command)).collect();
    assert!(unknown.is_empty(), "these are in no row of the table here:\n{}", unknown.join("\n"));
    for (command, _) in TABLE {
        let stands = documented.iter().any(|found| found.command == *command);
        assert!(stands, "`{command}` is in no document any more: remove its row");
    }
}

#[test]
fn what_builds_or_takes_long_is_in_a_script() {
    for (command, how) in TABLE {
        let In(script, line) = how else { continue };
        let text = fs::read_to_string(root().join(script)).expect("a script");
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let has = lines.into_iter().any(|found| found.trim() == *line || found.trim().ends_with(&format!(" {line}")));
        assert!(has, "{script} has no line `{line}`, which is to test `{command}`");
    }
}

/// Installs the programs where the documents expect them: on the PATH, in target/release, and
/// behind `cargo run --release --`.
fn install(place: &Workplace) {
    fs::create_dir_all(place.path("target/release")).unwrap();
    fs::create_dir(place.path("bin")).unwrap();
    for (name, program) in [("pillion", PROGRAM), ("collbench", COLLBENCH)] {
        for folder in ["target/release", "bin"] {
            symlink(program, place.path(folder).join(name)).unwrap();
        }
    }
    let cargo = "#!/bin/sh\n[ \"$1 $2 $3\" = 'run --release --' ] || { echo \"cargo $*: not here\" >&2; exit 1; }\nshift 3\nexec pillion \"$@\"\n";
    fs::write(place.path("bin/cargo"), cargo).unwrap();
    fs::set_permissions(place.path("bin/cargo"), PermissionsExt::from_mode(0o755)).unwrap();
}

/// Runs a line as a shell does.
fn shell(place: &Workplace, line: &str) -> Ended {
    let mut command = Command::new("sh");
    place.prepare(&mut command);
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(["-c", line]).env("PATH", format!("{}:{path}", place.path("bin").display()));
    // Open MPI refuses few cores and root unless told.
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("OMPI_MCA_hwloc_base_binding_policy", "none");
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_orte_tmpdir_base", place.path(""));
    place.spawn(command).finish()
}

fn is_there(program: &str) -> bool {
    // Its flags in the documents are Open MPI's.
    let version = Command::new(program).arg("--version").output();
    let there = version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("Open MPI"));
    if !there {
        eprintln!("SKIPPED: there is no Open MPI {program} on the PATH");
    }
    there
}

/// Runs the rows of the table whose command fits.
fn run(fits: impl Fn(&str) -> bool) {
    let place = Workplace::new(PROGRAM);
    install(&place);
    for (command, how) in TABLE.iter().filter(|(command, _)| fits(command)) {
        let line = match how {
            AsItStands => (*command).to_owned(),
            With(words) => format!("{command} {words}"),
            For(values) => {
                let put = |line: String, (letter, value): &(&str, &str)| {
                    assert!(line.contains(letter), "{line} has no {letter}");
                    line.replace(letter, value)
                };
                values.iter().fold((*command).to_owned(), put)
            }
            Parsed => {
                let program = command.find("pillion ").expect("our program stands there");
                format!("{} --help", &command[program..])
            }
            In(..) => continue,
        };
        if line.starts_with("mpirun") && !is_there("mpirun") {
            continue;
        }
        let ended = shell(&place, &line);
        assert_eq!(ended.code(), Some(0), "{line}: {ended}");
        ended.has_no_panic();
    }
}

#[test]
fn commands_that_train() {
    run(|command| ["train", "generate", "checkpoint", "data verify"].iter().any(|part| command.contains(part)));
}

/// What commands of models, tokens and pictures have in them.
const OTHERS: [&str; 10] =
    ["tokenize", "data show", "import", "export", "eval", "top", "report", "config", "completions", "man "];

#[test]
fn commands_of_models_tokens_and_pictures() {
    let trains = |command: &str| ["train", "generate", "experiment"].iter().any(|part| command.contains(part));
    // What is shown was trained.
    run(|command| command == "cargo run --release -- train" || !trains(command) && is_other(command));
}

fn is_other(command: &str) -> bool {
    OTHERS
        .iter()
        .any(|part| command.split_whitespace().collect::<Vec<_>>().join(" ").contains(&format!("pillion {part}")))
}

#[test]
fn commands_that_look_plan_and_simulate() {
    run(|command| ["doctor", "plan", "abs"].iter().any(|part| command.contains(part)) && !command.contains("train"));
}

#[test]
fn commands_that_experiment() {
    run(|command| command.contains("experiment"));
}

#[test]
fn commands_that_measure() {
    run(|command| command.contains("collbench"));
}

#[test]
fn no_row_is_left_out() {
    let tested = |command: &str| {
        ["train", "generate", "checkpoint", "data verify", "doctor", "plan", "abs", "experiment", "collbench"]
            .iter()
            .any(|part| command.contains(part))
            || is_other(command)
    };
    for (command, how) in TABLE {
        assert!(tested(command) || matches!(how, In(..)), "no test above runs `{command}`");
    }
}

#[test]
fn tests_that_the_reports_of_gpus_name_are_there() {
    let document = fs::read_to_string(root().join("docs/src/gpu-reports.md")).unwrap();
    let found = ["collectives", "kernels", "runtime", "tests"];
    let found = Command::new("grep")
        .args(["-rhE", "--include=*.rs", "fn [a-z_0-9]+\\("])
        .args(found)
        .current_dir(root())
        .output()
        .unwrap();
    let functions = String::from_utf8_lossy(&found.stdout).into_owned();
    // Names of tests are the only words in backticks with two underscores or more.
    let named = document.split('`').filter(|word| word.matches('_').count() > 1 && !word.contains(' '));
    let named: Vec<&str> = named.collect();
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        assert!(
            functions.contains(&format!("fn {name}(")),
            "docs/src/gpu-reports.md names {name}, and there is no such test"
        );
    }
}
