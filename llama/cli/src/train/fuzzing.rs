//! The parsers of settings, and of a trainer's part of a checkpoint, for fuzzers.

use super::recipe::Recipe;
/// A file of settings.
pub mod config_file {
    use std::path::Path;

    use super::Recipe;
    use crate::settings::file::SettingsFile;

    /// Files of settings.
    pub fn seeds() -> Vec<Vec<u8>> {
        let seeds = [
            "lr = 0.5\nmicro-batch = 8\nmodel = \"tiny\"\nprofile = true\nseq = 64",
            "mesh = \"replicate=2,shard=2\"\nshard = \"zero-2\"\nbucket = \"16MiB\"\nprefetch = 2\nslots = 3",
            "controller = \"stagewise\"\nstages = \"16:0.1,32:0.9\"\nbatch = 16\nround-to = 16\nshrink = true",
            "controller = \"linear-ramp\"\nramp = \"64:0.25\"\nround-to = 8\nmax-batch = 64",
            "group = [\"*norm*:decay=0\", \"*:lr=0.5\"]\nvalidation-data = [\"a\", \"b=c\"]\ndata = [\"a:0.7\", \"b:0.3\"]",
            "controller = \"noise-scale\"\nratio = 0.5\nema = 0.99\npatience = 2\ngrowth-limit = 1.5\ntest-interval = 3",
        ];
        seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect()
    }

    /// A recipe that is accepted is one that a checkpoint keeps.
    pub fn check(data: &[u8]) {
        let Ok(text) = str::from_utf8(data) else { return };
        let file = SettingsFile::parse(Path::new("run.toml"), text);
        let Ok(settings) = file.and_then(|file| file.settings()) else { return };
        for world in [1, 4] {
            if let Ok(recipe) = Recipe::new(&settings, world) {
                recipe.check_shape().expect("it has just been accepted");
                let json = serde_json::to_string(&recipe).expect("plain values");
                assert_eq!(serde_json::from_str::<Recipe>(&json).expect("it was written"), recipe);
            }
        }
    }
}

/// Values of single settings.
pub mod options {
    use pillion_llama::config::Preset;
    use pillion_runtime::Sharded;
    use pillion_runtime::checkpoint::Staging;

    use super::super::evaluation::ValidationData;
    use super::super::groups::{Group, Grouped};
    use super::super::parts::{SHARE, part};
    use crate::controller::stage;
    use crate::plan::quantity::{bandwidth, duration, size, speed};
    use crate::settings::{address, mesh, save_memory};

    /// A value of each kind.
    pub fn seeds() -> Vec<Vec<u8>> {
        let seeds =
            ["400Gbit/s", "5us", "1.5GFLOP/s", "64MiB", "replicate=2,shard=4", "copies", "node1:29400", "16:0.1"];
        let more = ["parameters,optimizer", "*norm*:lr=0.5,decay=0", "books=tokens/books", "tokens/code.bin:0.7"];
        seeds.iter().chain(&more).map(|seed| seed.as_bytes().to_vec()).collect()
    }

    /// What is read is in its range, and is read again as it is written.
    pub fn check(data: &[u8]) {
        let Ok(text) = str::from_utf8(data) else { return };
        for (read, range) in [(bandwidth(text), 1.0..=1e18), (speed(text), 1.0..=1e24), (duration(text), 0.0..=1e6)] {
            assert!(read.map_or(true, |value| range.contains(&value)), "{text}");
        }
        if let Ok(bytes) = size(text) {
            assert_eq!(size(&bytes.to_string()), Ok(bytes));
        }
        if let Ok(mesh_read) = mesh(text) {
            let written = format!("replicate={},shard={}", mesh_read.replicate, mesh_read.shard);
            assert_eq!(mesh(&written), Ok(mesh_read));
        }
        if let Ok(Staging::Ring { bytes }) = save_memory(text) {
            assert_eq!(save_memory(&bytes.to_string()), Ok(Staging::Ring { bytes }));
        }
        if let Ok(sharded) = text.parse::<Sharded>() {
            assert_eq!(sharded.to_string().parse(), Ok(sharded));
        }
        let _ = (address(text), stage(text));
        check_group(text);
        check_data(text);
    }

    /// A group of tensors is read again as it is written.
    fn check_group(text: &str) {
        let Ok(group) = text.parse::<Group>() else { return };
        let setting = |name: &str, value: Option<f64>| value.map(|value| format!("{name}={value}"));
        let settings: Vec<String> = setting("lr", group.lr).into_iter().chain(setting("decay", group.decay)).collect();
        assert!(!settings.is_empty() && [group.lr, group.decay].into_iter().flatten().all(f64::is_finite));
        assert_eq!(format!("{}:{}", group.pattern, settings.join(",")).parse().as_ref(), Ok(&group));
        let _ = Grouped::new(&[group], &Preset::named("tiny").expect("a preset").config().units());
    }

    /// What a run learns from and is validated on is read again as it is written.
    fn check_data(text: &str) {
        if let Ok(ValidationData { name, path, .. }) = text.parse() {
            assert!(!name.trim().is_empty() && !path.as_os_str().is_empty());
            let written = format!("{name}={}", path.display());
            assert_eq!(written.parse(), Ok(ValidationData { name, path, all: false }));
        }
        if let Ok((path, Some(units))) = part(text) {
            let written = format!("{}:{}", path.display(), units as f64 / SHARE as f64);
            assert_eq!(part(&written).expect("a share"), (path, Some(units)));
        }
    }
}

/// A trainer's part of a checkpoint.
pub mod progress {
    use std::path::Path;

    use pillion_abs::Controller;

    use super::super::checkpoints::{Best, Habits, Progress, count};
    use super::super::resume::{adopt, changes};
    use super::super::run::controller;
    use super::Recipe;
    use crate::settings::file::train_settings;

    /// Parts that runs with different controllers write.
    pub fn seeds() -> Vec<Vec<u8>> {
        let seed = |flags: &str| {
            let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
            let settings = train_settings(&flags).expect("flags that can be");
            let recipe = Recipe::new(&settings, 2).expect("flags that can be");
            let controller = Controller::new(recipe.controller.clone()).expect("a recipe's").state().clone();
            let (data, left_out, habits) =
                ("7f22f24a24d624ed".to_owned(), vec![8..16, 24..32], Some(Habits::of(&settings)));
            let progress = Progress {
                recipe,
                data,
                data_path: None,
                tokens: Vec::new(),
                step: 3,
                samples: 40,
                left_out,
                habits,
                best: Some(Best { step: 2, loss: 3.5, on: "8 samples".to_owned() }),
                controller,
            };
            serde_json::to_vec(&progress).expect("plain values")
        };
        let controllers = [
            "",
            "--controller constant --document-attention --save-memory 64KiB --save-every 5 --keep 2",
            "--controller stagewise --stages 16:0.5,32:0.5 --round-to 16 --batch 16",
            "--controller linear-ramp --ramp 64:0.25 --round-to 8",
            "--controller noise-scale --ratio 0.5 --shrink",
        ];
        controllers.iter().map(|flags| seed(flags)).collect()
    }

    /// What is read is what was written, and a run that goes on accepts or refuses it.
    pub fn check(data: &[u8]) {
        let Ok(extra) = serde_json::from_slice(data) else { return };
        let Ok(saved) = Progress::parse(&extra) else { return };
        let written = serde_json::to_value(&saved).expect("plain values");
        let read = Progress::parse(&written).expect("it was written");
        assert_eq!(serde_json::to_value(&read).expect("plain values"), written);
        assert!(count(&saved.left_out) <= saved.samples);
        let mut settings = train_settings(&[]).expect("the defaults");
        adopt(&mut settings, &saved);
        for world in [1, 4] {
            let Ok(recipe) = Recipe::new(&settings, world) else { continue };
            let _ = changes(Path::new("checkpoint"), &saved, &recipe, &settings);
            if let Ok(controller) = controller(&recipe, Some(&saved)) {
                let limits = &recipe.controller;
                assert!((limits.base..=limits.cap).contains(&controller.batch()));
                assert!(recipe.lr(controller.batch(), saved.samples).is_finite());
            }
        }
    }
}
