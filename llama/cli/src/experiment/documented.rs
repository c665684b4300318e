//! What the book says about the experiment, computed again from its steps in
//! `docs/src/paper/steps`.

use std::fs;
use std::path::{Path, PathBuf};

use super::PaperArgs;
use super::compare::{self, Paired};
use super::grid::{self, Family, Run};
use super::report::{self, Group};
use super::results::Results;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src").join(name)
}

/// A file of the book.
fn document(name: &str) -> String {
    let path = path(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All runs of the experiment, from the tables of their steps.
fn runs() -> Vec<(Run, Results)> {
    let (data, out, samples, seeds, only) = (None, None, None, None, None);
    let settings =
        PaperArgs { data, out, ranks: 2, samples, seeds, validation_samples: 512, only, quick: false, report: true };
    let runs = grid::grid(&settings).unwrap();
    let read = |run: Run| {
        let text = document(&format!("paper/steps/{}.csv", run.name));
        let results = Results::of_csv(&text, run.samples);
        assert!(results.is_finished(), "{}", run.name);
        (run, results)
    };
    runs.into_iter().map(read).collect()
}

/// Every table of the page is what the command writes.
#[test]
fn the_tables_of_the_page_are_those_of_its_steps() {
    let (runs, page) = (runs(), document("paper/README.md"));
    let mut lacking = String::new();
    for model in ["3.3M", "10.8M"] {
        for table in report::model_tables(model, 8192, &report::groups(&runs, model)) {
            let text = report::markdown(&table);
            if !page.contains(text.trim_end()) {
                lacking.push_str(&text);
            }
        }
    }
    assert!(lacking.is_empty(), "docs/src/paper/README.md should have:\n{lacking}");
}

/// The figures of the page, as the command draws them: their names and their texts.
fn figures() -> Vec<(String, String)> {
    let runs = runs();
    let of = |model| report::figures(model, 8192, &report::groups(&runs, model)).unwrap();
    ["3.3M", "10.8M"].into_iter().flat_map(of).collect()
}

/// Every figure of the page is what the command draws.
#[test]
fn the_figures_of_the_page_are_those_of_its_steps() {
    for (name, svg) in figures() {
        let test = "cargo test -p pillion-cli -- --ignored the_figures_are_drawn_again";
        assert!(document(&format!("paper/{name}")) == svg, "{name} is not what its steps give: run {test}");
    }
}

#[test]
#[ignore = "writes the figures of the page"]
fn the_figures_are_drawn_again() {
    for (name, svg) in figures() {
        fs::write(path(&format!("paper/{name}")), svg).unwrap();
    }
}

/// Checks that a document has a text that was made of computed numbers.
#[track_caller]
fn assert_says(document: &str, text: &str) {
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat(document).contains(&flat(text)), "the document should say: {text}");
}

/// Differences that the texts quote, by two digits; the guide's table has three.
#[test]
fn the_texts_quote_the_differences_of_the_tables() {
    let (runs, page, guide) = (runs(), document("paper/README.md"), document("batch-sizes.md"));
    let groups = report::groups(&runs, "3.3M");
    let group = |name: &str| groups.iter().find(|group| group.schedule == name).expect("a schedule");
    let constants = |family| groups.iter().filter(|group| group.family == family).collect::<Vec<_>>();
    let (usual, long) = (constants(Family::Constant), constants(Family::LongWarmup));
    let at_equal_steps = |name: &str, constants: &[&Group]| {
        compare::difference_at_equal_steps(group(name), constants).expect("three seeds")
    };
    let less = |name: &str, other: &str| compare::difference(group(name), group(other)).expect("three seeds");
    let size = |paired: Paired| format!("{:.2} ± {:.2}", paired.mean.abs(), paired.half_width.unwrap());
    let signed = |paired: Paired| format!("{:+.2} ± {:.2}", paired.mean, paired.half_width.unwrap());
    for text in [
        format!("The stages end {} lower", size(at_equal_steps("stages 16-32-64", &usual))),
        format!("its loss differs by {}", signed(less("norm test 0.6", "constant 32"))),
        format!(
            "lowers the loss of the constant 32 by {} and that of the constant 64 by {}",
            size(less("constant 32, warm-up × 4", "constant 32")),
            size(less("constant 64, warm-up × 8", "constant 64"))
        ),
        format!("contains zero ({})", size(less("constant 16, warm-up × 2", "constant 16"))),
        format!(
            "η = 0.6 ends {} higher and η = 0.9 {} higher. For η = 0.3 ({}) and the stages ({})",
            size(at_equal_steps("norm test 0.6", &long)),
            size(at_equal_steps("norm test 0.9", &long)),
            signed(at_equal_steps("norm test 0.3", &long)),
            signed(at_equal_steps("stages 16-32-64", &long))
        ),
        format!("it ends {} lower than η = 0.9", size(less("norm test 0.9", "constant 16, warm-up × 2"))),
    ] {
        assert_says(&page, &text);
    }
    assert_says(&guide, &format!("gained {} nats", size(less("constant 64, warm-up × 8", "constant 64"))));
    for (row, name) in [
        ("norm test, η = 0.9", "norm test 0.9"),
        ("norm test, η = 0.6", "norm test 0.6"),
        ("norm test, η = 0.3", "norm test 0.3"),
        ("stages 16-32-64", "stages 16-32-64"),
    ] {
        let mean = |value: fn(&Results) -> f64| {
            group(name).seeds.iter().map(|(_, run)| value(run)).sum::<f64>() / group(name).seeds.len() as f64
        };
        let cell = |constants: &[&Group]| at_equal_steps(name, constants).cell().replace("**", "");
        let (steps, loss) = (mean(|run| run.steps.len() as f64), mean(|run| run.validation_loss().unwrap()));
        assert_says(&guide, &format!("| {row} | {steps:.0} | {loss:.3} | {} | {} |", cell(&usual), cell(&long)));
    }
}

/// How many intervals there are, and what a correction for their number leaves.
#[test]
fn the_page_says_how_many_intervals_separate() {
    let (runs, page) = (runs(), document("paper/README.md"));
    let mut intervals: Vec<Paired> = Vec::new();
    for model in ["3.3M", "10.8M"] {
        intervals.extend(compare::intervals(&report::groups(&runs, model)));
    }
    intervals.retain(|interval| interval.half_width.is_some());
    let separate = intervals.iter().filter(|interval| interval.separates()).count();
    let corrected = intervals.iter().filter(|interval| interval.separates_among(intervals.len())).count();
    assert!(intervals.iter().all(|interval| interval.seeds == 3));
    let count = intervals.len();
    assert_says(
        &page,
        &format!(
            "{separate} of the {count} intervals are on one side of zero; after a correction for {count} intervals (Bonferroni), {corrected} are."
        ),
    );
}

/// γ = ⟨√B⟩²/⟨B⟩ of every run, in the mean over progress: a step of batch b counts as 1/(1 + B/b).
#[test]
fn the_guide_says_what_the_noise_scales_of_the_runs_allow() {
    let (runs, guide) = (runs(), document("batch-sizes.md"));
    let gamma = |results: &Results| {
        let (mut weights, mut scales, mut roots) = (0.0, 0.0, 0.0);
        for line in &results.steps {
            let Some(scale) = line.noise_scale.filter(|&scale| scale > 0.0) else { continue };
            let weight = 1.0 / (1.0 + scale / line.batch_samples as f64);
            (weights, scales, roots) = (weights + weight, scales + weight * scale, roots + weight * scale.sqrt());
        }
        roots * roots / (weights * scales)
    };
    let gammas: Vec<f64> = runs.iter().map(|(_, results)| gamma(results)).collect();
    let (low, high) =
        gammas.iter().fold((f64::INFINITY, 0.0f64), |(low, high), &gamma| (low.min(gamma), high.max(gamma)));
    let saved = |gamma: f64| 100.0 * (1.0 - gamma.sqrt()) / 2.0;
    assert_says(
        &guide,
        &format!(
            "In our {} runs γ was {low:.2} to {high:.2}, so a batch proportional to √B could have saved {:.0} to {:.0} % of the time at most.",
            runs.len(),
            saved(high),
            saved(low)
        ),
    );
}

/// t₀ from the medians of a step's milliseconds a sample at batches of 8 and of 64, in the same
/// run.
#[test]
fn the_documents_say_what_is_known_of_the_time_of_a_step() {
    let (runs, page, guide) = (runs(), document("paper/README.md"), document("batch-sizes.md"));
    let of = |model: &str| {
        let differences: Vec<f64> = runs
            .iter()
            .filter(|(run, _)| run.model == model && run.schedule == "norm test 0.6")
            .map(|(_, results)| {
                let median = |batch: u64| {
                    let of_batch = results.steps.iter().filter(|line| line.batch_samples == batch);
                    let mut times: Vec<f64> = of_batch.map(|line| line.step_ms / batch as f64).collect();
                    times.sort_by(f64::total_cmp);
                    times[times.len() / 2]
                };
                (median(8) - median(64)) / (1.0 / 8.0 - 1.0 / 64.0)
            })
            .collect();
        let paired = Paired::of(&differences).unwrap();
        format!("{:.0} ± {:.0} ms", paired.mean, paired.half_width.unwrap())
    };
    for document in [page, guide] {
        assert_says(&document, &format!("t₀ is {} with 3.3 M parameters and {} with 10.8 M", of("3.3M"), of("10.8M")));
    }
}

/// What pure noise passes, in the guide's table.
#[test]
fn the_guide_says_what_noise_passes() {
    let guide = document("batch-sizes.md");
    for groups in [2, 4, 8, 16] {
        let share = |eta| 100.0 * pillion_abs::ByChance::of(groups, eta).unwrap().coordinates;
        assert_says(&guide, &format!("| {groups} | {:.1} % | {:.1} % | {:.1} % |", share(0.3), share(0.6), share(0.9)));
    }
}
