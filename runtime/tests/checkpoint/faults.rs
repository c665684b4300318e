//! Damage, interruption and mistakes are noticed, named, and change nothing.

use std::fs;
use std::path::{Path, PathBuf};

use pillion_runtime::checkpoint;
use pillion_runtime::{TensorSpec, UnitSpec};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{assert_holds, copy_folder, fill, named, names, newest, on_cpu, save_steps, train, uneven};

/// Fails unless loading fails on every rank of 2 with a file error that contains `word`, and leaves the engines as they
/// were.
fn assert_refused(folder: &Path, units: &[UnitSpec], word: &str) {
    on_cpu(2, units, |mut engine| {
        fill(&mut engine, 77);
        let error = checkpoint::open(folder).and_then(|checkpoint| checkpoint.load(&mut engine)).unwrap_err();
        named(&error);
        assert!(error.to_string().contains(word), "{word} in: {error}");
        assert_holds(&engine, 77);
        engine.communicator().barrier().expect("the communicator is as usable as before");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_flipped_bit_anywhere_is_noticed_and_its_file_named(
        file in 0usize..4, place in 0.0..1.0, bit in 0u32..8,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let folders = save_steps(dir.path(), 3, &[1, 2]);
        let name = names(&folders[1]).swap_remove(file);
        let path = folders[1].join(&name);
        let mut bytes = fs::read(&path).unwrap();
        let position = (place * bytes.len() as f64) as usize;
        bytes[position] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        assert_refused(&folders[1], &uneven(), &name);
        let found = checkpoint::newest(dir.path()).unwrap();
        prop_assert_eq!(found.checkpoint.map(|checkpoint| checkpoint.path), Some(folders[0].clone()));
        prop_assert_eq!(found.skipped.iter().map(named).collect::<Vec<_>>(), [path]);
    }
}

#[test]
fn a_file_that_is_cut_or_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save_steps(dir.path(), 3, &[1]).remove(0);
    for name in names(&folder) {
        let path = folder.join(&name);
        let whole = fs::read(&path).unwrap();
        for len in [0, 7, 8, 100, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            let is_manifest = name == "manifest.json";
            let words =
                if is_manifest { name.clone() } else { format!("{name}: has {len} bytes instead of {}", whole.len()) };
            assert_refused(&folder, &uneven(), &words);
        }
        fs::write(&path, [&whole[..], b" "].concat()).unwrap();
        assert_refused(&folder, &uneven(), &name);
        fs::remove_file(&path).unwrap();
        assert_refused(&folder, &uneven(), &name);
        fs::write(&path, whole).unwrap();
    }
    checkpoint::open(&folder).unwrap().verify().expect("as it was");
}

#[test]
fn files_of_two_checkpoints_do_not_make_one() {
    let dir = tempfile::tempdir().unwrap();
    let folders = save_steps(dir.path(), 2, &[1, 2]);
    let name = "rank-00001-of-00002.safetensors";
    fs::copy(folders[0].join(name), folders[1].join(name)).unwrap();
    assert_refused(&folders[1], &uneven(), name);
}

#[test]
fn a_foreign_manifest_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save_steps(dir.path(), 2, &[1]).remove(0);
    for foreign in
        ["", "{}", "[1]", "{\"format\": \"pt\"}", "\u{0}", "{\"format\": \"pillion-checkpoint\", \"version\": 1}"]
    {
        fs::write(folder.join("manifest.json"), foreign).unwrap();
        assert_refused(&folder, &uneven(), "manifest.json");
        assert_eq!(checkpoint::list(dir.path()).unwrap(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_and_the_first_tensor_that_differs_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save_steps(dir.path(), 3, &[1]).remove(0);
    let with = |change: fn(&mut Vec<UnitSpec>)| {
        let mut units = uneven();
        change(&mut units);
        units
    };
    let cases = [
        (with(|units| units[2].tensors[0].shape = vec![11, 3]), "expected to be 2.0 [11, 3] of unit unit 2 with"),
        (with(|units| units[2].tensors[0].shape = vec![11, 3]), "but is 2.0 [3, 11] of unit unit 2 with"),
        (with(|units| units[0].tensors[1].name = "other".to_owned()), "other [106]"),
        (with(|units| units[0].tensors[1].decay = true), "0.1 [106] of unit unit 0 without weight decay"),
        (with(|units| units[1].name = "other".to_owned()), "1.0 [5] of unit other"),
        (with(|units| units.truncate(2)), "number 4 is expected to be absent, but is 2.0"),
        (with(|units| units[2].tensors.truncate(2)), "number 6 is expected to be absent, but is 2.2"),
        (
            with(|units| {
                let tensor = TensorSpec { name: "more".to_owned(), shape: vec![2], decay: false, frozen: false };
                units[2].tensors.push(tensor);
            }),
            "number 7 is expected to be more [2] of unit unit 2 without weight decay, but is absent",
        ),
    ];
    for (units, words) in &cases {
        assert_refused(&folder, units, words);
    }
}

#[test]
fn a_rank_that_cannot_load_is_named_by_the_others_which_stay_as_they_were() {
    let (dir, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = save_steps(dir.path(), 3, &[1]).remove(0);
    let copy = copies.path().join("copy");
    copy_folder(&folder, &copy);
    // Rank 1 of 2 needs this file for its shards; rank 0 neither needs nor verifies its own copy.
    let name = "rank-00001-of-00003.safetensors";
    fs::remove_file(copy.join(name)).unwrap();
    on_cpu(2, &uneven(), |mut engine| {
        fill(&mut engine, 50);
        let rank = engine.communicator().rank();
        let error = checkpoint::open([&folder, &copy][rank]).unwrap().load(&mut engine).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("rank 1 failed") == (rank == 0), "{error}");
        assert_holds(&engine, 50);
        checkpoint::open(&folder).unwrap().load(&mut engine).expect("the next one loads");
        assert_holds(&engine, 1);
    });
}

#[test]
fn ranks_that_open_different_checkpoints_load_neither() {
    let dir = tempfile::tempdir().unwrap();
    let folders = save_steps(dir.path(), 2, &[1, 2]);
    on_cpu(2, &uneven(), |mut engine| {
        fill(&mut engine, 50);
        let folder = &folders[engine.communicator().rank()];
        let error = checkpoint::open(folder).unwrap().load(&mut engine).unwrap_err().to_string();
        assert!(error.contains("another checkpoint on rank 1 than on rank 0"), "{error}");
        assert_holds(&engine, 50);
    });
}

#[test]
fn checkpoints_are_listed_newest_first_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let list = || checkpoint::list(dir.path()).unwrap();
    assert_eq!(checkpoint::list(&dir.path().join("absent")).unwrap(), Vec::<PathBuf>::new());
    assert!(checkpoint::newest(&dir.path().join("absent")).unwrap().checkpoint.is_none());
    assert_eq!(list(), Vec::<PathBuf>::new());
    let mut folders = save_steps(dir.path(), 1, &[9, 100_000_000, 10]);
    folders.sort_by_key(|folder| std::cmp::Reverse(checkpoint::open(folder).unwrap().manifest.step));
    copy_folder(&folders[0], &dir.path().join("step-00000200.incomplete"));
    copy_folder(&folders[0], &dir.path().join("best"));
    fs::create_dir(dir.path().join("step-00000300")).unwrap();
    fs::write(dir.path().join("step-00000400"), "a file").unwrap();
    assert_eq!(list(), folders);
    assert_eq!(newest(dir.path()).path, folders[0]);
    let file = dir.path().join("step-00000400");
    assert_eq!(named(&checkpoint::list(&file).unwrap_err()), file);
}

/// A save is a sequence of writes, each of which may be cut at any byte, and renames. After each of them the state
/// before, or the new one once its rename is done, must be what is found.
#[test]
fn a_save_cut_at_any_stage_is_never_taken_for_whole() {
    let dir = tempfile::tempdir().unwrap();
    let folders = save_steps(dir.path(), 2, &[1, 2]);
    let (first, second) = (&folders[0], &folders[1]);
    let whole = dir.path().join("kept aside");
    fs::rename(second, &whole).unwrap();
    let mut order = names(&whole);
    // The manifest is the last.
    order.rotate_left(1);
    assert_eq!(order[2], "manifest.json");
    let mut cuts = 0;
    // Under the final name it is worse than what a save can leave; it must not be taken for whole even then.
    for folder in [dir.path().join("step-00000002.incomplete"), second.clone()] {
        for (index, name) in order.iter().enumerate() {
            let last = fs::read(whole.join(name)).unwrap();
            for cut in [0, 1, 8, last.len() / 3, last.len() / 2, last.len() - 1] {
                fs::create_dir(&folder).unwrap();
                for earlier in &order[..index] {
                    fs::copy(whole.join(earlier), folder.join(earlier)).unwrap();
                }
                fs::write(folder.join(name), &last[..cut]).unwrap();
                assert_eq!(&newest(dir.path()).path, first, "{name} cut at {cut}");
                assert_eq!(&checkpoint::list(dir.path()).unwrap(), std::slice::from_ref(first));
                fs::remove_dir_all(&folder).unwrap();
                cuts += 1;
            }
        }
    }
    assert_eq!(cuts, 36);
    // Whole but for its rename.
    copy_folder(&whole, &dir.path().join("step-00000002.incomplete"));
    assert_eq!(&newest(dir.path()).path, first);
    // The next save of that step takes no notice of what it finds.
    save_steps(dir.path(), 2, &[2]);
    assert_eq!(&newest(dir.path()).path, second);
    assert_eq!(names(dir.path()), ["kept aside", "step-00000001", "step-00000002"]);
}

#[test]
fn a_step_that_is_saved_again_is_replaced_and_at_every_moment_one_of_the_two_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save_steps(dir.path(), 2, &[3]).remove(0);
    let names_of = |ending: &str| dir.path().join(format!("step-00000003{ending}"));
    let before = newest(dir.path()).manifest;
    // Between the renames: the old one is set aside, the new one is not yet in place.
    fs::rename(&folder, names_of(".old")).unwrap();
    copy_folder(&names_of(".old"), &names_of(".incomplete"));
    assert_eq!(newest(dir.path()).path, names_of(".old"));
    // A save that finds this, of other state at another world.
    on_cpu(3, &uneven(), |mut engine| {
        fill(&mut engine, 8);
        assert_eq!(checkpoint::save(&engine, dir.path(), 3, &json!("again")).unwrap(), folder);
        assert_eq!(names(dir.path()), ["step-00000003"], "nothing else is left");
        checkpoint::open(&folder).unwrap().load(&mut engine).unwrap();
        assert_holds(&engine, 8);
    });
    // After both: the old one is not yet removed.
    copy_folder(&folder, &names_of(".old"));
    let after = newest(dir.path());
    assert_eq!(after.path, folder);
    assert_ne!(after.manifest, before);
    // And when both are there, one save ends it.
    save_steps(dir.path(), 2, &[3]);
    assert_eq!(names(dir.path()), ["step-00000003"]);
}

#[test]
fn a_folder_that_cannot_be_made_is_named_on_every_rank_and_training_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    on_cpu(3, &uneven(), |mut engine| {
        engine.initialize(|_, _| |_: usize| 0.5).unwrap();
        for wrong in [file.clone(), file.join("under a file")] {
            let error = checkpoint::save(&engine, &wrong, 1, &Value::Null).unwrap_err();
            assert!(named(&error).starts_with(&wrong), "{error}");
            let is_other = engine.communicator().rank() != 0;
            assert_eq!(error.to_string().contains("rank 0 failed"), is_other, "{error}");
        }
        train(&mut engine);
        // The folders that lead there are made, too.
        checkpoint::save(&engine, &dir.path().join("all/new"), 1, &Value::Null).expect("a good folder");
    });
}

#[test]
fn a_folder_that_ranks_do_not_share_is_detected_and_nothing_is_left() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    // What another run has left where rank 1 looks.
    let stale = dirs[1].path().join("step-00000001.incomplete");
    for left in [false, true] {
        if left {
            fs::create_dir(&stale).unwrap();
            fs::write(stale.join("token"), "1").unwrap();
        }
        on_cpu(3, &uneven(), |engine| {
            let rank = engine.communicator().rank();
            let dir = dirs[usize::from(rank == 1)].path();
            let error = checkpoint::save(&engine, dir, 1, &Value::Null).unwrap_err().to_string();
            assert!(error.contains("all ranks share") && error.contains("rank 1 failed") == (rank != 1), "{error}");
            engine.communicator().barrier().unwrap();
            assert_eq!(names(dirs[0].path()), Vec::<String>::new());
            engine.communicator().barrier().unwrap();
            checkpoint::save(&engine, dirs[0].path(), 1, &Value::Null).expect("the next save");
        });
        fs::remove_dir_all(dirs[0].path().join("step-00000001")).unwrap();
    }
}

#[test]
fn units_of_one_name_are_refused_rather_than_saved_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut units = uneven();
    units[2].name = "unit 0".to_owned();
    on_cpu(2, &units, |engine| {
        let error = checkpoint::save(&engine, dir.path(), 1, &Value::Null).unwrap_err().to_string();
        assert!(error.contains("two units are called unit 0"), "{error}");
    });
}
