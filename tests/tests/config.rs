//! `pillion config`: files of settings are checked, and what is shown is read again.

use std::fs;

use pillion_tests::documents::root;
use pillion_tests::program::{TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

#[test]
fn a_run_of_the_shown_settings_is_the_run_without_a_file() {
    let place = Workplace::new(PROGRAM);
    let flags = format!("{TINY} --ranks 2 --steps 3");
    let shown = place.run(&format!("config show {flags}")).succeeded().stdout;
    fs::write(place.path("my.toml"), &shown).unwrap();
    assert_eq!(place.run("config show my.toml").succeeded().stdout.replace(" # default", ""), marks_left_out(&shown));
    let plain = place.train("plain", "--ranks 2 --steps 3");
    place.run("train --config my.toml --out by-file").succeeded();
    assert_eq!(place.steps("by-file"), plain);
    place.run("train --config my.toml --out by-file --resume auto --steps 4").succeeded();
    assert_eq!(place.steps("by-file").len(), 4);
}

/// A shown file without what stands behind values that equal their defaults.
fn marks_left_out(shown: &str) -> String {
    shown.replace(" # default", "")
}

#[test]
fn files_are_checked_all_of_them() {
    let place = Workplace::new(PROGRAM);
    for (name, text) in [
        ("good.toml", "model = \"tiny\"\nseq = 32\nmicro-batch = 2\nsamples = 2000\nbatch = 8"),
        ("key.toml", "# A comment.\nmicro_batch = 8"),
        ("value.toml", "lr = \"fast\""),
        ("kind.toml", "seq = 64\n\nlr = true"),
        ("syntax.toml", "seq = 64\nlr = "),
        ("range.toml", "model = \"tiny\"\nlr = 1e9"),
        ("batch.toml", "micro-batch = 4\nbatch = 7"),
        ("shape.toml", "heads = 3"),
        ("both.toml", "auto = true\nslots = 3"),
        ("unread.toml", "schedule = \"constant\"\nfinal-lr = 0.5"),
        ("ranks.toml", "mesh = \"replicate=2,shard=2\"\nranks = 3"),
        ("grid.toml", "mesh = \"replicate=2,shard=2\""),
        ("from.toml", "from = \"nowhere\""),
        ("gpu.toml", "device = \"cuda\"\nprofile = true"),
        ("resumed.toml", "resume = \"nowhere\"\nlr = 0.5"),
    ] {
        fs::write(place.path(name), text).unwrap();
    }
    let good = place.run("config check good.toml grid.toml resumed.toml").succeeded();
    let lines: Vec<&str> = good.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{good}");
    assert!(lines[0].starts_with("good.toml: good for 2 ranks: ") && lines[0].ends_with("8 to 64 in a step"), "{good}");
    assert!(lines[1].starts_with("grid.toml: good for 4 ranks: "), "{good}");
    assert!(lines[2].starts_with("resumed.toml: good for 2 ranks, as far as it says itself"), "{good}");

    let bad: [(&str, &[&str]); 13] = [
        ("key.toml", &["line 2", "no setting `micro_batch`", "the nearest is `micro-batch`"]),
        ("value.toml", &["line 1", "'fast'", "--lr"]),
        ("kind.toml", &["line 3", "`lr` is a boolean"]),
        ("syntax.toml", &["line 2"]),
        ("range.toml", &["line 2", "--lr 1000000000", "out of range"]),
        ("batch.toml", &["line 2", "--batch 7", "try 4 or 8"]),
        ("shape.toml", &["num_attention_heads = 3", "choose"]),
        ("both.toml", &["--auto", "cannot be used with", "--slots"]),
        ("unread.toml", &["line 2", "--final-lr 0.5", "--schedule constant", "leave it out"]),
        ("ranks.toml", &["line 1", "a grid of 4 ranks", "there are 3"]),
        ("from.toml", &["nowhere", "no whole checkpoint"]),
        ("gpu.toml", &["line 1", "--device cuda does not have --profile"]),
        ("nowhere.toml", &["No such file"]),
    ];
    let names: Vec<&str> = bad.iter().map(|(name, _)| *name).collect();
    // A file that is bad hides no other, and a good one between them is still good.
    let ended = place.run(&format!("config check {} good.toml", names.join(" ")));
    assert_eq!((ended.code(), ended.stdout.lines().count()), (Some(2), 1), "{ended}");
    assert_eq!(ended.stderr.lines().count(), bad.len(), "{ended}");
    for (line, (name, parts)) in ended.stderr.lines().zip(bad) {
        assert!(line.starts_with(&format!("pillion: {name}")), "{name}: {line}");
        assert!(parts.iter().all(|part| line.contains(part)), "{parts:?}: {line}");
    }
    ended.has_no_panic();
    // What is refused depends on the number of ranks.
    place.run("config check grid.toml --ranks 2").refused(2, &["grid.toml", "a grid of 4 ranks", "there are 2"]);
    place.run("config check good.toml --ranks 3").refused(2, &["good.toml", "line 5", "--batch 8", "--round-to 6"]);
    place.run("config check good.toml --ranks 0").refused(2, &["--ranks", "0"]);
    place.run("config show range.toml").refused(2, &["--lr 1000000000", "out of range"]);
    assert!(!place.path("runs").exists(), "nothing was begun");
}

#[test]
fn examples_of_settings_are_good() {
    let place = Workplace::new(PROGRAM);
    let mut checked = 0;
    for file in fs::read_dir(root().join("docs/examples")).unwrap().flatten() {
        let path = file.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        for ranks in [2, 4, 64] {
            let ended = place.run(&format!("config check {} --ranks {ranks}", path.display())).succeeded();
            let text = fs::read_to_string(&path).unwrap();
            // The comment above the model has its size.
            let parameters = text.lines().find_map(|line| line.strip_prefix("# ")?.strip_suffix(" parameters."));
            let good = format!("good for {ranks} ranks: {} parameters, ", parameters.expect("a size"));
            assert!(ended.stdout.contains(&good), "{ended}");
        }
        checked += 1;
    }
    assert_eq!(checked, 5);
}
