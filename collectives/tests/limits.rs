//! Limits of the system and of patience, met by a program that does nothing about them: this test
//! binary, started again.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pillion_collectives::{Communicator, Launch, Options};

/// Joins as the rank that the environment says, and prints what comes of it.
#[test]
#[ignore = "the entry point of the processes that the other tests start"]
fn process() {
    let variable = |name: &str| std::env::var(format!("TEST_{name}")).ok();
    let number = |name: &str| variable(name).map_or(0, |text| text.parse().unwrap());
    let mut launch = Launch::single();
    if let Some(job) = variable("JOB") {
        let (rank, world) = (number("RANK") as usize, 4);
        launch = Launch { rank, world, local_rank: rank, local_world: world, job, ..launch };
    }
    let mut options = Options { warn_after: Duration::from_millis(50), ..Options::default() };
    if let Some(limit) = variable("STARTUP_MS") {
        options.startup_timeout = Duration::from_millis(limit.parse().unwrap());
    }
    let message = Communicator::connect(&launch, options).err().map(|error| error.to_string());
    println!("connected: {message:?}");
}

fn command(program: &[&str]) -> Command {
    let own = std::env::current_exe().unwrap();
    let mut command = match program {
        [] => Command::new(&own),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(&own);
            command
        }
    };
    command.args(["--exact", "process", "--ignored", "--nocapture", "--test-threads=1"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_no_signal() {
    let text = stdout(&command(&["prlimit", "--fsize=1000000"]).output().unwrap());
    assert!(text.contains("1000000 bytes") && text.contains("ulimit -f unlimited"), "{text}");
}

/// Rank `rank` of four of a job; it runs.
fn rank(job: &str, rank: usize, startup_ms: u64, program: &[&str]) -> Child {
    let mut command = command(program);
    command.env("TEST_JOB", job).env("TEST_RANK", rank.to_string()).env("TEST_STARTUP_MS", startup_ms.to_string());
    command.spawn().unwrap()
}

#[test]
fn whoever_waits_at_the_start_says_for_whom() {
    let job = Launch::single().job;
    let waiting = [0, 2].map(|number| rank(&job, number, 2000, &[]));
    let [zero, two] = waiting.map(|rank| rank.wait_with_output().unwrap());
    let text = String::from_utf8_lossy(&zero.stderr).into_owned();
    // Rank 2 may come before or after the line.
    let missing = ["ranks [1, 3] to come; it gives up in", "ranks [1, 2, 3] to come; it gives up in"];
    assert!(text.contains("pillion: rank 0 has waited"), "{text}");
    assert!(missing.iter().any(|part| text.contains(part)), "{text}");
    assert!(stdout(&zero).contains("ranks [1, 3] did not come"), "{zero:?}");
    drop(two);

    let output = rank(&Launch::single().job, 3, 500, &[]).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("has waited")).collect();
    assert!(lines.len() == 1 && lines[0].contains("at the start for rank 0: nobody listens"), "{text}");
}

#[test]
fn a_rank_that_cannot_map_the_memory_ends_the_others() {
    // Rank 1 alone, so that it is admitted before it fails.
    for limited in [0, 1] {
        let job = Launch::single().job;
        let program = |rank| if rank == limited { &["prlimit", "--as=2000000000"][..] } else { &[] };
        let ranks = [0, 1, 2, 3].map(|number| rank(&job, number, 600_000, program(number)));
        for (number, rank) in ranks.into_iter().enumerate() {
            let text = stdout(&rank.wait_with_output().unwrap());
            let part = if number == limited { "ulimit -v" } else { "aborted" };
            assert!(text.contains(part) || text.contains("connected: None"), "rank {number}: {text}");
        }
    }
}
