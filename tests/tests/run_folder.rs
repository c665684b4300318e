//! The folder of a run, as users have them: in the text itself, full of their own files, behind
//! links and mounts, removed in the middle, on file systems without locks. A run never learns from
//! runs, and moves nothing but what runs wrote.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use pillion_tests::program::{TINY, Workplace};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
/// As [`TINY`], but for its text.
const FLAGS: &str =
    "--model tiny --seq 32 --micro-batch 2 --validation-samples 8 --samples 64 --batch 8 --round-to 8 --ranks 2";

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The line that says which text a run learns from.
fn tokens(stdout: &str) -> String {
    let line = stdout.lines().find(|line| line.starts_with("tokens: ")).expect("a run says so");
    line.split(", in ").next().unwrap().to_owned()
}

#[test]
fn a_run_inside_its_text_does_not_become_text() {
    let place = Workplace::new(PROGRAM);
    let here = |arguments: &str| {
        let mut command = place.command(arguments);
        command.current_dir(place.path("text"));
        place.spawn(command).finish().succeeded().stdout
    };
    let first = here(&format!("train {FLAGS} --data . --steps 2"));
    // The default folder, one with a name, and the text's folder itself.
    let outs = ["", "--out other", "--out .", "--out deep/er/run"];
    for out in outs {
        let stdout = here(&format!("train {FLAGS} --data . --steps 2 {out}"));
        assert_eq!(tokens(&stdout), tokens(&first), "{out}\n{stdout}");
    }
    for out in outs {
        let stdout = here(&format!("train --resume auto {out}"));
        assert_eq!(tokens(&stdout), tokens(&first), "{out}\n{stdout}");
        assert!(stdout.contains("after step 2") && stdout.contains("8 steps, 64 samples"), "{stdout}");
    }
}

#[test]
fn files_of_the_user_stay_where_they_are() {
    let place = Workplace::new(PROGRAM);
    fs::create_dir_all(place.path("work/checkpoints")).unwrap();
    fs::create_dir_all(place.path("work/trace")).unwrap();
    let mine = [
        "notes.md",
        "metrics.jsonl.incomplete",
        "checkpoints/best.pt",
        "checkpoints/epoch-3/model.pth",
        "trace/rank-0000.json",
        "tensorboard/events.out.tfevents.1.mine",
    ];
    for name in mine {
        fs::create_dir_all(place.path("work").join(name).parent().unwrap()).unwrap();
        fs::write(place.path("work").join(name), "mine").unwrap();
    }
    for _ in 0..3 {
        let mut command =
            place.command(&format!("train {FLAGS} --data ../text --out . --steps 1 --trace --tensorboard --keep 1"));
        command.current_dir(place.path("work"));
        place.spawn(command).finish().succeeded();
    }
    for name in mine {
        assert_eq!(fs::read_to_string(place.path("work").join(name)).unwrap(), "mine");
    }
    let ours = [
        ".pillion.lock",
        "checkpoints",
        "earlier-1",
        "earlier-2",
        "metrics.jsonl",
        "metrics.jsonl.incomplete",
        "notes.md",
        "run.json",
        "tensorboard",
        "tokens",
        "trace",
        "trace.json",
    ];
    assert_eq!(names(&place.path("work")), ours);
    for number in ["earlier-1", "earlier-2"] {
        let earlier = place.path("work").join(number);
        assert_eq!(names(&earlier), ["checkpoints", "metrics.jsonl", "run.json", "tensorboard", "trace.json"]);
        assert_eq!(names(&earlier.join("tensorboard")).len(), 1);
        assert_eq!(place.checkpoints(&format!("work/{number}")), ["step-00000001"]);
    }
}

#[test]
fn another_programs_checkpoint_of_the_same_step_is_not_replaced() {
    let place = Workplace::new(PROGRAM);
    for name in ["step-00000001", "step-00009000.incomplete", "step-00009000.old"] {
        let file = place.path(format!("{name}/checkpoints/{name}/model.pth"));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "mine").unwrap();
        // Before anything is trained that could not be saved.
        let ended = place.run(&format!("train {FLAGS} --data text --out {name} --steps 1"));
        ended.refused(1, &[name, "was not written by pillion", "--out DIR"]);
        assert_eq!(fs::read_to_string(file).unwrap(), "mine");
    }
}

#[test]
fn checkpoints_may_lie_on_another_file_system() {
    let place = Workplace::new(PROGRAM);
    let Ok(scratch) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED: /dev/shm cannot be written");
        return;
    };
    fs::create_dir(place.path("out")).unwrap();
    symlink(scratch.path(), place.path("out/checkpoints")).unwrap();
    for _ in 0..2 {
        place.run(&format!("train {FLAGS} --data text --out out --steps 1")).succeeded();
    }
    place.run("train --resume auto --out out/earlier-1 --steps 2").succeeded();
    assert_eq!((place.steps("out").len(), place.steps("out/earlier-1").len()), (1, 2));
}

#[test]
fn a_foreign_file_with_the_name_of_ours_is_not_overwritten() {
    let place = Workplace::new(PROGRAM);
    for (name, flag) in [("metrics.jsonl", ""), ("trace.json", "--trace")] {
        fs::create_dir(place.path(format!("with-{name}"))).unwrap();
        let path = place.path(format!("with-{name}")).join(name);
        fs::write(&path, "[\"mine\"]\n").unwrap();
        let ended = place.run(&format!("train {FLAGS} --data text --steps 1 {flag} --out with-{name}"));
        ended.refused(1, &[name, "was not written by pillion", "--out DIR"]);
        assert_eq!(fs::read_to_string(path).unwrap(), "[\"mine\"]\n");
    }
}

#[test]
fn checkpoints_that_cannot_be_written_are_refused_before_the_first_step() {
    let place = Workplace::new(PROGRAM);
    fs::create_dir_all(place.path("out")).unwrap();
    symlink("nowhere", place.path("out/checkpoints")).unwrap();
    let ended = place.run(&format!("train {TINY} --out out"));
    ended.refused(1, &["out/checkpoints", "leads nowhere", "--out DIR"]);
    assert!(!ended.stdout.contains("validation loss"), "{ended}");
}

#[test]
fn an_earlier_run_stays_where_it_is_when_the_next_one_cannot_begin() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--steps 2");
    let before = names(&place.path("out"));
    let tokens = place.path("out/tokens").join(&names(&place.path("out/tokens"))[0]);
    // A token that the vocabulary does not have, in the part that a run reads whole.
    let mut bytes = fs::read(&tokens).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].fill(0xff);
    fs::write(&tokens, bytes).unwrap();
    place.run(&format!("train {TINY} --out out --steps 2")).refused(1, &["token file"]);
    assert_eq!(names(&place.path("out")), before);
}

#[test]
fn lines_of_others_in_the_metrics_are_kept_aside() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--steps 2");
    let metrics = place.path("out/metrics.jsonl");
    let mut text = fs::read_to_string(&metrics).unwrap();
    text.push_str("my own note\n{\"step\":3,\"lo");
    fs::write(&metrics, text).unwrap();
    place.run("train --resume auto --out out --steps 3").succeeded();
    assert_eq!(place.lines("out").len(), 3);
    // What a crash has cut off belongs to a step that was made again.
    assert_eq!(fs::read_to_string(place.path("out/metrics.aside.jsonl")).unwrap(), "my own note\n");
}

#[test]
fn a_folder_may_be_a_link_or_have_dots_or_lie_where_nobody_may_write() {
    let place = Workplace::new(PROGRAM);
    fs::create_dir_all(place.path("real")).unwrap();
    symlink(place.path("real"), place.path("link")).unwrap();
    fs::create_dir_all(place.path("closed/inside")).unwrap();
    fs::set_permissions(place.path("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    for out in ["link", "link/", "real/.", "./real/../real", "closed/inside"] {
        let steps = |number| format!("train {FLAGS} --data text --out {out} --steps {number}");
        // Twice: the second sets the first aside. And on.
        for command in [steps(1), steps(2), format!("train --resume auto --out {out} --ranks 1 --steps 3")] {
            unprivileged(&place, &command).succeeded();
        }
        assert_eq!(place.steps(out).len(), 3, "{out}");
    }
    assert_eq!(names(&place.path("closed")), ["inside"], "nothing is written beside it");
    fs::set_permissions(place.path("closed"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs the program without the rights of root, where this user has them, which no permission keeps
/// out.
fn unprivileged(place: &Workplace, arguments: &str) -> pillion_tests::program::Ended {
    if !rustix::process::getuid().is_root() {
        return place.run(arguments);
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(place.program());
    command.args(arguments.split_whitespace());
    place.prepare(&mut command);
    place.spawn(command).finish()
}

#[test]
fn a_folder_may_be_a_mount_point() {
    let place = Workplace::new(PROGRAM);
    fs::create_dir_all(place.path("mounted")).unwrap();
    fs::create_dir_all(place.path("disk")).unwrap();
    let script = format!(
        "mount --bind disk mounted && for run in 1 2; do {} train {FLAGS} --data text --out mounted --steps 1 || exit 1; done",
        PROGRAM
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--map-root-user", "sh", "-c", &script]);
    place.prepare(&mut command);
    let probe =
        Command::new("unshare").args(["--mount", "--map-root-user", "mount", "--bind", "/tmp", "/tmp"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: this user can make no mount namespace");
        return;
    }
    place.spawn(command).finish().succeeded();
    assert_eq!(place.checkpoints("disk/earlier-1"), ["step-00000001"]);
}

#[test]
fn a_file_system_without_locks_is_warned_of() {
    let place = Workplace::new(PROGRAM);
    let source = "#include <errno.h>\nint flock(int fd, int op) { (void)fd; (void)op; errno = CODE; return -1; }\n";
    fs::write(place.path("flock.c"), source).unwrap();
    for code in ["ENOSYS", "ENOLCK", "EOPNOTSUPP"] {
        let library = place.path(format!("{code}.so"));
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", &format!("-DCODE={code}"), "-o"])
            .args([&library, &place.path("flock.c")])
            .status();
        assert!(compiled.unwrap().success(), "a C compiler built this program");
        let mut command = place.command(&format!("train {FLAGS} --data text --out {code} --steps 1 --launch threads"));
        command.env("LD_PRELOAD", &library);
        let ended = place.spawn(command).finish().succeeded();
        assert!(ended.stderr.contains("has no locks") && ended.stderr.contains("no other run writes here"), "{ended}");
        assert_eq!(place.steps(code).len(), 1);
    }
}

#[test]
fn a_folder_that_is_removed_during_a_run_is_made_again() {
    let place = Workplace::new(PROGRAM);
    let flags = FLAGS.replace("--samples 64", "--samples 1000000");
    let running = place.start(&format!("train {flags} --data text --out above/run --steps 100000 --launch threads"));
    running.wait_for_step(&place, "above/run", 3);
    fs::remove_dir_all(place.path("above")).unwrap();
    running.wait_for("its metrics again", || place.path("above/run/metrics.jsonl").exists());
    running.signal(Signal::TERM);
    let ended = running.finish();
    assert_eq!(ended.code(), Some(75), "{ended}");
    let steps = place.steps("above/run");
    assert!(steps.iter().map(|step| step.step).eq(1..=steps.len() as u64), "every line is there: {ended}");
    assert_eq!(place.checkpoints("above/run"), [format!("step-{:08}", steps.len())]);
    // Its text is tokenized again, and is the same.
    let more = steps.len() + 2;
    place.run(&format!("train --resume auto --out above/run --steps {more}")).succeeded();
    assert_eq!(place.steps("above/run").len(), more);
}

#[test]
fn a_run_waits_for_another_that_is_ending() {
    let place = Workplace::new(PROGRAM);
    place.run(&format!("train {FLAGS} --data text --out out --steps 1")).succeeded();
    // Holds the lock, as a rank does that the system is still tearing down, until it is told to
    // end.
    let mut holder = Command::new("flock");
    holder.args([place.path("out/.pillion.lock").to_str().unwrap(), "sh", "-c", "touch held; read line"]);
    holder.current_dir(place.path("")).stdin(std::process::Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    while !place.path("held").exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let running = place.start("train --resume auto --out out --steps 2");
    running.wait_for("its words", || running.stderr().contains("out: waiting for another run"));
    drop(holder.stdin.take());
    holder.wait().unwrap();
    running.finish().succeeded();
    assert_eq!(place.steps("out").len(), 2);
}

#[test]
fn who_holds_a_folder_is_named() {
    let place = Workplace::new(PROGRAM);
    let first = place.start(&format!("train {TINY} --samples 1000000 --out shared --launch threads"));
    first.wait_for_step(&place, "shared", 1);
    let ended = place.run(&format!("train {TINY} --out shared"));
    let holder = format!("process {}", first.pid().as_raw_nonzero());
    ended.refused(1, &["shared", "another run is writing here", &holder, "--out DIR"]);
}
