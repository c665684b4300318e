//! The examples train, each way that they can be started. They fail by themselves when they have not learned.

use std::path::PathBuf;
use std::process::Command;

/// An example, built if it is not yet: cargo does that beside this test only when it builds all tests. For all packages at once, since fewer would
/// make other features, and what the examples depend on once more.
fn example(name: &str) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    let built = cargo.args(["build", "--quiet", "--workspace", "--example", name]).status();
    assert!(built.expect("cargo runs").success(), "{name} is built");
    let this = std::env::current_exe().expect("this program");
    let profile = this.ancestors().nth(2).expect("deps, in the folder of a profile");
    profile.join("examples").join(name)
}

/// What it printed, once it has ended well.
fn run(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    stdout
}

/// The first step's loss.
fn first_loss(stdout: &str) -> f64 {
    let mut words = stdout.lines().find(|line| line.starts_with("step   0")).expect(stdout).split_whitespace();
    words.nth(3).expect(stdout).parse().expect(stdout)
}

#[test]
fn the_hand_written_network_learns_on_any_number_of_ranks() {
    let one = run(Command::new(example("mlp")).args(["--ranks", "1"]));
    for ranks in ["2", "3"] {
        let several = run(Command::new(example("mlp")).args(["--ranks", ranks]));
        // The same points and the same first network: only the order of sums differs, in the last of 24 bits, and six digits are printed.
        assert!((first_loss(&several) - first_loss(&one)).abs() <= 2e-6, "{one}{several}");
    }
}

#[test]
fn the_hand_written_network_learns_under_mpirun() {
    if Command::new("mpirun").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no mpirun (Debian: openmpi-bin)");
        return;
    }
    let mut command = Command::new("mpirun");
    command.args(["-n", "2", "--oversubscribe"]).arg(example("mlp"));
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    let printed = run(&mut command);
    assert_eq!(
        printed.lines().filter(|line| line.starts_with("step   0")).count(),
        1,
        "two ranks of one job: {printed}"
    );
}
