//! The scripts in `docs/examples` do what the book says of them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use pillion_tests::documents::root;
use pillion_tests::program::{Ended, TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Starts two tasks with the variables of a Slurm step, and returns the higher exit code. Where
/// there is a file `time-limit`, it sends SIGUSR1 to the tasks once the run has made steps, as
/// Slurm does before the limit.
const SRUN: &str = r#"#!/bin/sh
echo "$*" >>srun.log
while [ "${1#-}" != "$1" ]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & zero=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & one=$!
if [ -e time-limit ]; then
  while kill -0 $zero 2>/dev/null && [ "$(cat runs/train/metrics.jsonl 2>/dev/null | wc -l)" -lt 3 ]; do sleep 0.05; done
  kill -USR1 $zero $one
fi
wait $zero; code=$?
wait $one; other=$?
[ $other -le $code ] || code=$other
exit $code
"#;

const SCONTROL: &str = "#!/bin/sh\necho \"$*\" >>scontrol.log\n";

/// Writes a program into the folder `bin`.
fn install(place: &Workplace, name: &str, text: &str) {
    let path = place.path("bin").join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// Runs `slurm.sh` as sbatch does on the first node.
fn slurm(place: &Workplace, arguments: &str) -> Ended {
    // Signals that whoever runs the tests has ignored would stay ignored.
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(root().join("docs/examples/slurm.sh")).args(arguments.split_whitespace());
    place.prepare(&mut command);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", place.path("bin").display()));
    command.env("SLURM_JOB_ID", "4711").env("SLURM_CPUS_PER_TASK", "1");
    place.spawn(command).finish()
}

#[test]
fn scripts_parse() {
    let files = fs::read_dir(root().join("docs/examples")).unwrap().flatten();
    // tests/config.rs has the files of settings.
    for script in files.filter(|file| file.path().extension().is_some_and(|extension| extension == "sh")) {
        let ended = Command::new("bash").arg("-n").arg(script.path()).output().unwrap();
        assert!(ended.status.success(), "{}: {}", script.path().display(), String::from_utf8_lossy(&ended.stderr));
    }
}

#[test]
fn the_script_for_slurm_queues_a_run_again_that_the_time_limit_ends_and_no_other() {
    let place = Workplace::new(PROGRAM);
    fs::create_dir(place.path("bin")).unwrap();
    install(&place, "srun", SRUN);
    install(&place, "scontrol", SCONTROL);
    symlink(place.program(), place.path("bin/pillion")).unwrap();
    let queued = || fs::read_to_string(place.path("scontrol.log")).unwrap_or_default();

    let refused = slurm(&place, "--micro-batch 0");
    assert_eq!(refused.code(), Some(2), "{refused}");
    assert_eq!(queued(), "");

    let settings = format!("{TINY} --samples 1000000");
    fs::write(place.path("time-limit"), "").unwrap();
    let interrupted = slurm(&place, &settings);
    assert_eq!(interrupted.code(), Some(75), "{interrupted}");
    assert_eq!(queued(), "requeue 4711\n");
    let made = place.steps("runs/train").len();
    assert_eq!(place.checkpoints("runs/train"), [format!("step-{made:08}")]);

    // Slurm starts the script again with the same arguments. This run ends by itself.
    fs::remove_file(place.path("time-limit")).unwrap();
    let steps = format!("{settings} --steps {}", made + 3);
    slurm(&place, &steps).succeeded();
    assert_eq!(queued(), "requeue 4711\n", "a run that is done is not queued again");
    assert_eq!(place.steps("runs/train"), place.train("whole", &format!("--samples 1000000 --steps {}", made + 3)));

    let options = fs::read_to_string(place.path("srun.log")).unwrap();
    let has_options = |line: &str| line.starts_with("--kill-on-bad-exit=0 --cpus-per-task=1 pillion train ");
    assert!(options.lines().count() == 3 && options.lines().all(has_options), "{options}");
}
