//! A save in the background: training goes on, and what is saved is what was there when it began.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use pillion_kernels::{Cpu, Device, LazyCpu};
use pillion_runtime::checkpoint::{self, Saved, Saver, Staging};
use pillion_runtime::{Engine, Error, Policy, Sharded, State};
use serde_json::json;

use super::{STAGINGS, engines, fill, names, newest, on_cpu, train, train_asking, uneven};

fn states(engine: &Engine) -> Vec<State> {
    (0..engine.layout().units.len()).map(|unit| engine.state(unit).unwrap()).collect()
}

/// Trains until the save under way is over; also how many steps that took.
fn train_until_saved(engine: &mut Engine, saver: &mut Saver) -> (Result<Saved, Error>, usize) {
    for steps in 1.. {
        let mut requests = [saver.request()];
        train_asking(engine, &mut requests);
        match saver.observe(engine, requests[0]) {
            Ok(None) => assert!(saver.is_busy()),
            Ok(Some(saved)) => return (Ok(saved), steps),
            Err(error) => return (Err(error), steps),
        }
    }
    unreachable!()
}

#[test]
fn what_is_saved_is_the_state_at_the_beginning_although_training_goes_on() {
    for (world, replicas, sharded) in [
        (1, 1, Sharded::EVERYTHING),
        (3, 1, Sharded::EVERYTHING),
        (4, 2, Sharded::EVERYTHING),
        (2, 1, Sharded::NOTHING),
        (2, 1, Sharded::OPTIMIZER),
    ] {
        let devices = [Arc::new(Cpu) as Arc<dyn Device>, Arc::new(LazyCpu::new(2))];
        for (device, staging) in devices.iter().flat_map(|device| STAGINGS.map(|staging| (device.clone(), staging))) {
            let dir = tempfile::tempdir().unwrap();
            let policy = Policy { replicas, sharded, ..Policy::default() };
            engines(world, &uneven(), policy, device, |mut engine| {
                let mut saver = Saver::new(dir.path(), None, staging).unwrap();
                fill(&mut engine, 0);
                engine.initialize(|_, _| |index: usize| index as f32).unwrap();
                train(&mut engine);
                for step in [1, 2] {
                    let expected = states(&engine);
                    let updates = engine.updates();
                    saver.begin(&engine, step, &json!({ "step": step })).unwrap();
                    let (saved, steps) = train_until_saved(&mut engine, &mut saver);
                    let saved = saved.unwrap();
                    assert!(steps >= 2, "the files, then the manifest, each heard of in a later step");
                    assert!(saved.step == step && saved.held <= saved.took && saved.not_removed.is_empty());
                    let after = states(&engine);
                    assert!(expected != after && engine.updates() == updates + steps as u64);
                    let found = newest(dir.path());
                    assert_eq!((found.path.clone(), found.extra()["step"].as_u64()), (saved.path, Some(step)));
                    found.verify().unwrap();
                    found.load(&mut engine).unwrap();
                    assert!(states(&engine) == expected && engine.updates() == updates);
                }
            });
        }
    }
}

#[test]
fn a_save_that_fails_on_one_rank_fails_on_all_and_training_goes_on() {
    for staging in STAGINGS {
        let dir = tempfile::tempdir().unwrap();
        on_cpu(3, &uneven(), |mut engine| {
            let mut saver = Saver::new(dir.path(), None, staging).unwrap();
            engine.initialize(|_, _| |index: usize| index as f32).unwrap();
            saver.begin(&engine, 1, &json!(null)).unwrap();
            // Whether its file is there by then or not, the folder cannot get its name any more.
            engine.communicator().barrier().unwrap();
            if engine.communicator().rank() == 0 {
                let _ = fs::remove_dir_all(dir.path().join("step-00000001.incomplete"));
            }
            let (saved, _) = train_until_saved(&mut engine, &mut saver);
            let error = saved.unwrap_err();
            assert!(matches!(error, Error::File { .. }), "{error}");
            assert!(!saver.is_busy());
            train(&mut engine);
            engine.communicator().barrier().unwrap();
            assert_eq!(names(dir.path()), [""; 0]);
            engine.communicator().barrier().unwrap();
            saver.begin(&engine, 2, &json!(null)).unwrap();
            assert_eq!(train_until_saved(&mut engine, &mut saver).0.unwrap().path, dir.path().join("step-00000002"));
        });
    }
}

#[test]
fn older_checkpoints_are_removed_once_a_newer_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    on_cpu(2, &uneven(), |mut engine| {
        let mut saver = Saver::new(dir.path(), Some(2), Staging::Copies).unwrap();
        for step in 1..=4 {
            fill(&mut engine, step);
            saver.begin(&engine, step, &json!(null)).unwrap();
            assert!(newest_step(dir.path()) < step, "the one under way does not count");
            saver.wait(&engine).unwrap().expect("it was under way");
            assert!(saver.wait(&engine).unwrap().is_none());
            engine.communicator().barrier().unwrap();
            let kept: Vec<String> = (step.max(2) - 1..=step).map(|step| format!("step-{step:08}")).collect();
            assert_eq!(names(dir.path()), kept);
            engine.communicator().barrier().unwrap();
        }
    });
    // One that is damaged is none of those that are kept, but what lies behind it goes.
    fs::write(dir.path().join("step-00000004/manifest.json"), "{}").unwrap();
    on_cpu(2, &uneven(), |mut engine| {
        let mut saver = Saver::new(dir.path(), Some(1), Staging::Copies).unwrap();
        fill(&mut engine, 5);
        saver.begin(&engine, 5, &json!(null)).unwrap();
        saver.wait(&engine).unwrap();
    });
    assert_eq!(names(dir.path()), ["step-00000005"]);
}

#[test]
fn what_was_just_saved_stays_although_later_checkpoints_lie_there() {
    let dir = tempfile::tempdir().unwrap();
    let save = |step, keep| {
        on_cpu(2, &uneven(), |mut engine| {
            let mut saver = Saver::new(dir.path(), keep, Staging::Copies).unwrap();
            fill(&mut engine, step);
            saver.begin(&engine, step, &json!(null)).unwrap();
            saver.wait(&engine).unwrap();
        });
    };
    save(100, None);
    save(200, None);
    // Its manifest is sound: only who reads all of it knows better, and goes back to step 100.
    fs::write(dir.path().join("step-00000200/rank-00001-of-00002.safetensors"), "lost").unwrap();
    assert_eq!(newest_step(dir.path()), 100);
    save(110, Some(1));
    assert_eq!(newest_step(dir.path()), 110);
    assert_eq!(names(dir.path()), ["step-00000110", "step-00000200"]);
}

#[test]
fn checkpoints_of_later_steps_are_set_aside_whole() {
    let dir = tempfile::tempdir().unwrap();
    let steps = [3, 5, 7];
    let fill = || {
        for step in steps {
            fs::create_dir(dir.path().join(format!("step-{step:08}"))).unwrap();
            fs::write(dir.path().join(format!("step-{step:08}/manifest.json")), step.to_string()).unwrap();
        }
    };
    fill();
    let names_of = |moved: Vec<PathBuf>| {
        moved.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let moved = names_of(checkpoint::set_later_aside(&dir.path().join("step-00000003")).unwrap());
    assert_eq!(moved, ["step-00000007.aside", "step-00000005.aside"]);
    assert_eq!(names(dir.path()), ["step-00000003", "step-00000005.aside", "step-00000007.aside"]);
    assert_eq!(fs::read_to_string(dir.path().join("step-00000005.aside/manifest.json")).unwrap(), "5");
    assert!(checkpoint::set_later_aside(&dir.path().join("step-00000003")).unwrap().is_empty(), "what is aside stays");
    fs::remove_dir_all(dir.path().join("step-00000003")).unwrap();
    fill();
    let moved = names_of(checkpoint::set_later_aside(&dir.path().join("step-00000005")).unwrap());
    assert_eq!(moved, ["step-00000007.aside.2"], "another's place is not taken");
    let replaced = dir.path().join("step-00000003.old");
    fs::create_dir(&replaced).unwrap();
    let moved = names_of(checkpoint::set_later_aside(&replaced).unwrap());
    assert_eq!(moved, ["step-00000005.aside.2", "step-00000003.aside"], "what was to replace it is newer");
    checkpoint::set_later_aside(dir.path()).expect_err("the name has no step");
}

#[test]
fn what_interruptions_have_left_is_removed_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let kept = ["step-00000003", "step-00000004.old", "step-00000005.aside", "mine.incomplete"];
    for name in kept.iter().chain(&["step-00000006.incomplete", "step-00000002.removed", "step-00000002.old.removed"]) {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("token"), "x").unwrap();
    }
    // Another program's may have such a name.
    let foreign = ["step-00000008.incomplete", "step-00000009.removed"];
    for name in foreign {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("model.pth"), "x").unwrap();
    }
    assert_eq!(checkpoint::remove_left(dir.path()).unwrap().len(), 3);
    let mut expected: Vec<String> = kept.iter().chain(&foreign).map(|&name| name.to_owned()).collect();
    expected.sort();
    assert_eq!(names(dir.path()), expected);
    assert!(checkpoint::remove_left(&dir.path().join("nothing")).unwrap().is_empty());
}

fn newest_step(dir: &std::path::Path) -> u64 {
    checkpoint::newest(dir).unwrap().checkpoint.map_or(0, |checkpoint| checkpoint.manifest.step)
}

#[test]
fn a_saver_that_is_dropped_leaves_what_was_there() {
    for staging in STAGINGS {
        let dir = tempfile::tempdir().unwrap();
        on_cpu(2, &uneven(), |mut engine| {
            let mut saver = Saver::new(dir.path(), None, staging).unwrap();
            fill(&mut engine, 1);
            saver.begin(&engine, 1, &json!(null)).unwrap();
            saver.wait(&engine).unwrap();
            saver.begin(&engine, 2, &json!(null)).unwrap();
        });
        assert_eq!(newest_step(dir.path()), 1);
    }
}

/// A file does not show how it was staged.
#[test]
fn files_are_the_same_bytes_however_they_were_staged() {
    let rings = [Staging::LEAST_RING, 100, 1 << 20].map(|bytes| Staging::Ring { bytes });
    for (world, replicas, sharded) in
        [(1, 1, Sharded::EVERYTHING), (3, 1, Sharded::EVERYTHING), (4, 2, Sharded::OPTIMIZER)]
    {
        let policy = Policy { replicas, sharded, ..Policy::default() };
        let save = |staging| {
            let dir = tempfile::tempdir().unwrap();
            engines(world, &uneven(), policy, Arc::new(Cpu), |mut engine| {
                fill(&mut engine, 3);
                let mut saver = Saver::new(dir.path(), None, staging).unwrap();
                saver.begin(&engine, 3, &json!({ "samples": 3 })).unwrap();
                saver.wait(&engine).unwrap();
            });
            let folder = dir.path().join("step-00000003");
            let read = |name: String| (fs::read(folder.join(&name)).unwrap(), name);
            names(&folder).into_iter().map(read).collect::<Vec<_>>()
        };
        let copies = save(Staging::Copies);
        assert_eq!(copies.len(), 1 + world / replicas);
        for ring in rings {
            assert!(save(ring) == copies, "{ring:?} of {world} ranks");
        }
    }
}
