//! Checkpoints from outside: what `pillion checkpoint` says of them, and how a run goes on from one at other numbers of ranks.

use std::fs;
use std::path::Path;

use pillion_tests::program::{Step, TINY, Workplace};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// What `pillion checkpoint` prints of `path`, as JSON, and its exit code.
fn look(place: &Workplace, what: &str, path: &str) -> (Value, Option<i32>) {
    let ended = place.run(&format!("checkpoint {what} --json {path}"));
    ended.has_no_panic();
    (serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended}")), ended.code())
}

#[test]
fn a_run_a_folder_of_checkpoints_and_one_of_them_are_shown_and_verified() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 4 --save-every 2");
    let newest = "out/checkpoints/step-00000004";
    for (path, steps) in [("out", &[4, 2][..]), ("out/checkpoints", &[4, 2]), (newest, &[4])] {
        for what in ["show", "verify"] {
            let (found, code) = look(&place, what, path);
            assert_eq!(code, Some(0), "{found}");
            let found = found.as_array().expect("a list");
            assert_eq!(found.iter().map(|one| one["step"].as_u64().unwrap()).collect::<Vec<_>>(), steps);
            for one in found {
                assert_eq!((&one["shards"], &one["error"]), (&Value::from(2), &Value::Null));
                let on_disk: u64 = fs::read_dir(one["path"].as_str().map(|path| place.path(path)).unwrap())
                    .unwrap()
                    .map(|entry| entry.unwrap())
                    .filter(|entry| entry.file_name() != "manifest.json")
                    .map(|entry| entry.metadata().unwrap().len())
                    .sum();
                assert_eq!(one["bytes"].as_u64(), Some(on_disk));
            }
        }
    }
    let table = place.run(&format!("checkpoint verify {newest}")).succeeded().stdout;
    assert!(table.contains("whole") && table.contains("embedding"), "{table}");
    for nowhere in ["text", "nothing", "out/metrics.jsonl"] {
        place.run(&format!("checkpoint show {nowhere}")).refused(1, &[nowhere]);
    }
}

#[test]
fn damage_anywhere_is_found_named_and_survived() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 4 --save-every 2");
    let folder = "out/checkpoints/step-00000004";
    let names = ["manifest.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
    for name in names {
        let path = place.path(folder).join(name);
        let whole = fs::read(&path).unwrap();
        let len = whole.len();
        let mut damages: Vec<Vec<u8>> = [0, 1, 7, 8, len / 3, len / 2, len - 1]
            .into_iter()
            .map(|position| {
                let mut bytes = whole.clone();
                bytes[position] ^= 0x40;
                bytes
            })
            .collect();
        damages.extend([Vec::new(), whole[..len - 1].to_vec(), whole[..7].to_vec(), vec![0xff; len]]);
        for (number, damage) in damages.into_iter().enumerate() {
            fs::write(&path, damage).unwrap();
            let ended = place.run("checkpoint verify out");
            assert_eq!(ended.code(), Some(1), "damage {number} of {name}: {ended}");
            ended.has_no_panic();
            let words = ended.stderr.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{ended}"));
            assert!(words.contains(folder), "{words}");
            assert!(ended.stderr.contains("the newest whole one is out/checkpoints/step-00000002"), "{ended}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(place.run("checkpoint verify out").code(), Some(1), "without {name}");
        fs::write(&path, whole).unwrap();
        assert_eq!(place.run("checkpoint verify out").code(), Some(0), "{name} as it was");
    }
}

#[test]
fn a_run_that_goes_back_sets_later_checkpoints_aside() {
    let place = Workplace::new(PROGRAM);
    let whole = place.train("out", "--ranks 2 --steps 6 --save-every 2");
    let back = "--ranks 2 --steps 4 --resume out/checkpoints/step-00000002 --keep 1";
    let ended = place.run(&format!("train {TINY} --out out {back}")).succeeded();
    assert!(ended.stdout.contains("step-00000006.aside"), "{ended}");
    assert_eq!(place.checkpoints("out"), ["step-00000004", "step-00000004.aside", "step-00000006.aside"]);
    let losses = |steps: &[Step]| steps.iter().map(|step| step.loss).collect::<Vec<_>>();
    assert_eq!(losses(&place.steps("out")), losses(&whole[..4]));
}

/// Publishing takes part of two steps after that in which a save begins, so the last one is under way when numbers fail.
#[test]
fn a_save_under_way_is_finished_when_numbers_fail() {
    let place = Workplace::new(PROGRAM);
    let wild = "--lr 1000 --warmup 0 --clip 0 --weight-decay 1000 --steps 200 --save-every 1 --keep 1 --ranks 2";
    let ended = place.run(&format!("train {TINY} --out out {wild}"));
    ended.refused(1, &["not finite", "--resume auto"]);
    let last = place.steps("out").last().expect("the first step's numbers are finite").step;
    assert_eq!(place.checkpoints("out"), [format!("step-{last:08}")], "{ended}");
}

#[test]
fn what_an_interrupted_save_has_left_is_removed_by_the_next_run() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 2");
    let left = place.path("out/checkpoints/step-00000137.incomplete");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("rank-00000-of-00002.safetensors"), "half").unwrap();
    let ended = place.run(&format!("train {TINY} --out out --ranks 2 --steps 3 --resume auto")).succeeded();
    assert!(ended.stdout.contains("removed") && ended.stdout.contains("step-00000137.incomplete"), "{ended}");
    assert_eq!(place.checkpoints("out"), ["step-00000002", "step-00000003"]);
}

/// 12 micro-batches a step, which 1, 2, 3 and 4 ranks share evenly: all compute the same micro-batches' gradients from the same weights.
const SHARED: &str = "--controller constant --batch 24";
const SAVED: usize = 5;
const STEPS: usize = 15;

/// How far a loss may lie from that of the run that was not interrupted, as a share of it, `after` steps after the checkpoint.
///
/// The first step's weights are the same bits, and so are the micro-batches' losses, 12 f64 that are added in another order: 12 · 2⁻⁵³.
/// From there on gradients differ by the order in which 12 f32 are added, at most 11 roundings of 2⁻²⁴ of the terms' sizes, and each weight by at
/// most that share of the step that AdamW makes with it, lr · |g| / √v, where lr = 0.003 and |g|, the mean size of the terms, is below 4 √v, the
/// root of their mean square over the last steps. A loss changes by that times the gradient's 1-norm, at most √P times its norm, here below 4, with P = 1.6·10⁵ parameters:
/// 0.003 · 4 · 11 · 2⁻²⁴ · 400 · 4 = 1.3e-5 a step, were all roundings to point along the gradient. The loss is above 1.
fn bound(after: usize) -> f64 {
    12.0 * f64::EPSILON + 1.3e-5 * (after - 1) as f64
}

/// The farthest that losses lie apart, in units of the bound.
fn apart(whole: &[Step], resumed: &[Step]) -> f64 {
    assert_eq!((whole.len(), resumed.len()), (STEPS, STEPS));
    let after = whole.iter().zip(resumed).skip(SAVED).enumerate();
    after.map(|(index, (a, b))| (a.loss - b.loss).abs() / (bound(index + 1) * a.loss)).fold(0.0, f64::max)
}

/// Goes on, with these flags, from a copy of the checkpoint that `change` has been at.
fn resumed(place: &Workplace, out: &str, flags: &str, change: impl FnOnce(&Path)) -> Vec<Step> {
    let folder = place.path(out).join("checkpoints").join(format!("step-{SAVED:08}"));
    let from = place.path("first/checkpoints").join(format!("step-{SAVED:08}"));
    fs::create_dir_all(&folder).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    fs::copy(place.path("first/metrics.jsonl"), place.path(out).join("metrics.jsonl")).unwrap();
    change(&folder);
    place.train(out, &format!("{SHARED} --steps {STEPS} --resume auto {flags}"))
}

#[test]
fn what_four_ranks_saved_goes_on_with_one_two_and_three_within_the_bound_of_f32() {
    let place = Workplace::new(PROGRAM);
    let whole = place.train("whole", &format!("{SHARED} --steps {STEPS} --ranks 4"));
    place.train("first", &format!("{SHARED} --steps {SAVED} --ranks 4"));
    for (number, flags) in [
        "--ranks 4",
        "--ranks 1",
        "--ranks 2",
        "--ranks 3",
        "--ranks 2 --shard nothing",
        "--ranks 3 --shard zero-1",
        "--ranks 4 --mesh replicate=2,shard=2 --gather copy",
    ]
    .into_iter()
    .enumerate()
    {
        let found = resumed(&place, &format!("way-{number}"), flags, |_| {});
        let apart = apart(&whole, &found);
        println!("{flags}: {apart:.1e} of the bound");
        assert!(apart <= 1.0, "{flags}: {apart} times the bound");
        assert!(number > 0 || apart == 0.0, "with the same ranks the bits are the same");
    }
    // The bound is tight enough to see what a checkpoint is for.
    let moment = |part: &'static str| move |folder: &Path| zero(folder, part);
    for (lost, change) in [
        ("the number of updates", Box::new(|folder: &Path| another_update(folder)) as Box<dyn FnOnce(&Path)>),
        ("first moments", Box::new(moment(".m"))),
        ("second moments", Box::new(moment(".v"))),
        ("weights of one unit", Box::new(moment("head.master"))),
    ] {
        let found = resumed(&place, &lost.replace(' ', "-"), "--ranks 2", change);
        let apart = apart(&whole, &found);
        println!("without {lost}: {apart:.1e} times the bound");
        assert!(apart > 3.0, "without {lost}: {apart} times the bound");
    }
}

/// Earlier versions began runs with an η of 1 and more, by which no batch is expected to grow: such
/// a run goes on, rank 0 warns, and a new run is refused.
#[test]
fn an_eta_that_a_new_run_may_not_have_is_warned_of_in_a_resume() {
    let place = Workplace::new(PROGRAM);
    let first = place.train("out", "--ranks 2 --steps 2 --eta 0.75");
    rewrite(&place.path("out/checkpoints/step-00000002"), |text| {
        assert_eq!(text.matches("0.75").count(), 1, "{text}");
        *text = text.replace("0.75", "1.25");
    });
    let flags = format!("train {TINY} --ranks 2 --steps 4 --eta 1.25");
    let ended = place.run(&format!("{flags} --out out --resume auto")).succeeded();
    assert_eq!(ended.stderr.matches("not expected to grow: --eta: 1.25").count(), 1, "{ended}");
    assert_eq!(place.steps("out").len(), 4);
    assert_eq!(place.steps("out")[..2], first);
    place.run(&format!("{flags} --out new")).refused(2, &["--eta: 1.25", "below 1", "variant debiased"]);
}

/// Changes a manifest, and gives it the checksums that go with it.
fn rewrite(folder: &Path, change: impl FnOnce(&mut String)) {
    const ZEROS: &str = "00000000000000000000000000000000";
    let path = folder.join("manifest.json");
    let mut text = fs::read_to_string(&path).unwrap();
    let checksum = text.split('"').nth(3).expect("the first value").to_owned();
    assert_eq!(checksum.len(), ZEROS.len());
    text = text.replacen(&checksum, ZEROS, 1);
    change(&mut text);
    let checksum = format!("{:032x}", xxh3_128(text.as_bytes()));
    fs::write(path, text.replacen(ZEROS, &checksum, 1)).unwrap();
}

fn another_update(folder: &Path) {
    rewrite(folder, |text| {
        let found = format!("\"updates\": {SAVED},");
        assert!(text.contains(&found), "{text}");
        *text = text.replace(&found, "\"updates\": 0,");
    });
}

/// Puts zeros in place of all tensors whose names end so.
fn zero(folder: &Path, ending: &str) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let mut bytes = fs::read(&entry).unwrap();
        let before = format!("{:032x}", xxh3_128(&bytes));
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        let mut found = 0;
        for (_, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| name.ends_with(ending)) {
            let offset = |index: usize| start + tensor["data_offsets"][index].as_u64().unwrap() as usize;
            bytes[offset(0)..offset(1)].fill(0);
            found += 1;
        }
        assert!(found > 0, "there is no {ending}");
        fs::write(&entry, &bytes).unwrap();
        rewrite(folder, |text| *text = text.replace(&before, &format!("{:032x}", xxh3_128(&bytes))));
    }
}
